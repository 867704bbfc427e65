import errno
import os
from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.core.storage import atomic_directory, cache_dir, cached_result, sha256_of_files, write_atomically

_UNUSED_PID = 2**22 + 1


def test_a_directory_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "variant"
    with atomic_directory(target) as partial:
        (partial / "weights").write_text("w")
        assert not target.exists()
    assert (target / "weights").read_text() == "w"
    assert [path.name for path in tmp_path.iterdir()] == ["variant"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_directory_leaves_nothing_and_keeps_the_old_one(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    target = tmp_path / "variant"
    target.mkdir()
    (target / "old").write_text("kept")
    with pytest.raises(interruption), atomic_directory(target) as partial:
        (partial / "weights").write_text("half")
        raise interruption
    assert [path.name for path in tmp_path.rglob("*")] == ["variant", "old"]


def test_files_of_a_killed_build_are_removed_but_not_those_of_a_running_one(tmp_path: Path) -> None:
    dead = tmp_path / f".variant.partial-{_UNUSED_PID}"
    alive = tmp_path / f".variant.partial-{os.getppid()}"
    dead.mkdir()
    alive.mkdir()
    with atomic_directory(tmp_path / "variant"):
        assert not dead.exists()
        assert alive.exists()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device.*free some disk space"):
        with atomic_directory(tmp_path / "variant"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_is_computed_once_for_each_of_its_inputs(tmp_path: Path) -> None:
    values = iter((1, 2))

    def result(*inputs: object) -> int:
        return int(cached_result(tmp_path / "new", "auc", inputs, lambda: {"value": next(values)})["value"])

    assert [result("model", 8), result("model", 8), result("model", 9), result("model", 8)] == [1, 1, 2, 1]
    assert len(list((tmp_path / "new").glob("auc-*.json"))) == 2


def test_the_hash_depends_on_names_and_bytes_but_not_on_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("x")
    two.write_text("y")
    before = sha256_of_files([one, two])
    assert sha256_of_files([two, one]) == before
    one.write_text("y")
    two.write_text("x")
    assert sha256_of_files([one, two]) != before


def test_the_cache_is_in_the_directory_of_the_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path / "here"))
    assert cache_dir("models") == tmp_path / "here" / "models"
    monkeypatch.delenv("SLIMSERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir("models") == tmp_path / "xdg" / "slimserve" / "models"
