"""Tests that the environment has the locked versions and only the dependency conflicts that we accept."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lines_of(file: str) -> list[str]:
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_installed_versions_are_those_of_the_lock_file() -> None:
    for line in lines_of("cpu.lock"):
        name, version = line.split(";")[0].strip().split("==")
        assert metadata.version(name) == version


def test_pip_check_reports_only_the_accepted_conflicts() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == sorted(lines_of("accepted-conflicts.txt"))


def test_packages_that_break_transformers_are_absent() -> None:
    for name in ("torchvision", "torchaudio", "torchcodec"):
        assert name not in {one.metadata["Name"] for one in metadata.distributions()}


def test_each_left_out_package_is_an_accepted_conflict() -> None:
    text = (ROOT / "requirements" / "overrides.txt").read_text()
    left_out = set(re.findall(r"^([\w-]+); ", text, flags=re.MULTILINE))
    missing = {re.search(r"requires ([\w-]+),", line).group(1) for line in lines_of("accepted-conflicts.txt")}  # type: ignore[union-attr]
    assert missing == left_out
