"""Tests that the wheel and the editable install add one import name, and that the commands start from the wheel."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOREIGN = ("serve", "compress", "compare", "contracts", "core", "loadtest", "distill", "workloads", "report", "benches")
CHECK = f"""
import importlib.util as u
names = {(*FOREIGN, "pipeline")!r}
print([name for name in names if u.find_spec(name)], u.find_spec("slimserve") is not None)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a virtual environment that contains only the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    venv.create(folder / "env")
    (wheel,) = folder.glob("slimserve-*.whl")
    run(*pip, "--python", folder / "env" / "bin" / "python", "install", "--no-deps", wheel, cwd=folder)
    return folder / "env"


def test_the_wheel_adds_only_the_import_name_slimserve(environment: Path, tmp_path: Path) -> None:
    assert run(environment / "bin" / "python", "-c", CHECK, cwd=tmp_path) == "[] True\n"


def test_the_editable_install_adds_only_the_import_name_slimserve(tmp_path: Path) -> None:
    assert run(sys.executable, "-I", "-c", CHECK, cwd=tmp_path) == "[] True\n"


@pytest.mark.parametrize(
    "command", ["compress", "serve", "loadtest", "compare", "distill", "pipeline", "inspect", "check"]
)
def test_each_command_starts_from_the_wheel(environment: Path, tmp_path: Path, command: str) -> None:
    # The dependencies come from the test environment; a path entry does not activate its editable install.
    path = sysconfig.get_paths()["purelib"]
    assert "Usage: " in run(environment / "bin" / "slimserve", command, "--help", cwd=tmp_path, PYTHONPATH=path)


def test_the_wheel_holds_every_module_and_data_file(environment: Path, tmp_path: Path) -> None:
    code = "import slimserve; print(slimserve.__path__[0])"
    installed = Path(run(environment / "bin" / "python", "-c", code, cwd=tmp_path).strip())
    for pattern in ("*.py", "*.j2", "*.toml"):
        for file in (ROOT / "slimserve").glob(f"**/{pattern}"):
            assert (installed / file.relative_to(ROOT / "slimserve")).is_file(), file
        for link in (path for path in (ROOT / "slimserve").iterdir() if path.is_symlink()):
            for file in link.resolve().rglob(pattern):
                assert (installed / link.name / file.relative_to(link.resolve())).is_file(), file
