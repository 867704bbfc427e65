"""Cache folders, and files and directories that appear completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from slimserve.core.errors import UserError
from slimserve.core.progress import print_status

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_dir(kind: str) -> Path:
    """Create and return the cache directory for one kind of artefact.

    `SLIMSERVE_CACHE` names the root; the default is the user's cache folder, usually `~/.cache/slimserve`. Deleting the
    root costs time but loses no results.
    """
    root = Path(os.environ.get("SLIMSERVE_CACHE") or platformdirs.user_cache_path("slimserve"))
    path = root / kind
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "cache directory", path, f"cannot be created ({error.strerror})", "set SLIMSERVE_CACHE to a writable folder"
        ) from error
    return path


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a new directory beside `target` that is renamed to `target` on success.

    On any exception, including Ctrl-C, the temporary directory is removed and `target` does not change. A killed
    process leaves `.NAME.partial-PID`, which the next build of the same target removes. A process killed between the
    two renames that replace an old target leaves the old one as `.NAME.replaced-PID`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        if not _is_running(int(leftover.name.rsplit("-", 1)[1])):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _fsync(path)
        if target.exists():
            replaced = target.parent / f".{target.name}.replaced-{os.getpid()}"
            target.rename(replaced)
            partial.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            partial.rename(target)
    except OSError as error:
        raise UserError(
            "output directory",
            target,
            f"could not be written ({error.strerror or error})",
            f"{write_remedy(error)} or name another folder; no partial output remains",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def building_path(target: Path) -> Path:
    """Return the folder beside `target` in which it is built."""
    return target.parent / f".{target.name}.building"


@contextmanager
def work_folder(target: Path, key: str, resumable: str) -> Iterator[Path]:
    """Yield the folder beside `target` in which it is built, `.NAME.building`; it is removed at the end.

    If the work is interrupted or fails, the folder stays if it has a file that matches `resumable`, so that the same
    command can resume. Work of another `key`, that is of another model or other settings, is set aside under another
    name, and is used again when its key returns. Raises UserError if another process builds the same target.
    """
    work = building_path(target)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock", blocking=False)
    try:
        held = lock.acquire()
    except Timeout as error:
        raise UserError(
            "output directory", target, "is being built by another process", "wait for it, or name another folder"
        ) from error
    with held:
        _swap_work(work, key)
        try:
            yield work
        except BaseException:
            if any(work.glob(resumable)):
                print_status(
                    f"unfinished work is in {work}; run the same command to resume, or delete the folder to start over"
                )
            else:
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work)


def _swap_work(work: Path, key: str) -> None:
    """Set work of another key aside, and bring work of this key back."""
    identity = work / "identity"
    found = identity.read_text(encoding="utf-8") if identity.is_file() else ""
    if found == key:
        return
    contents = [entry for entry in work.iterdir() if entry.name != "lock"]
    if contents != [identity] and contents:
        aside = _aside_path(work, found)
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-2")
        aside.mkdir()
        for entry in contents:
            entry.rename(aside / entry.name)
        print_status(
            f"unfinished work of another model or other settings was set aside in {aside}; delete the folder if you do "
            "not return to them"
        )
    kept = _aside_path(work, key)
    if kept.is_dir():
        for entry in kept.iterdir():
            entry.rename(work / entry.name)
        kept.rmdir()
        print_status(f"continuing the work that was set aside in {kept}")
    write_atomically(identity, key)


def _aside_path(work: Path, key: str) -> Path:
    return work.with_name(f"{work.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}")


def check_free_space(target: Path, num_bytes: float) -> None:
    """Raise UserError if the disk of `target`, which need not exist, has less than `num_bytes` bytes free.

    Bytes of unfinished work on the target count as free, because resuming uses them.
    """
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    free += sum(file.stat().st_size for file in building_path(target).rglob("*") if file.is_file())
    if free < num_bytes:
        raise UserError(
            "output directory",
            target,
            f"could not be written (its disk has {free / 2**20:.1f} MiB free, and the work needs at least "
            f"{num_bytes / 2**20:.1f} MiB)",
            "free some disk space or name another folder",
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it replaces `path`, so that readers see one of the two."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        _fsync(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(
            "output file", path, f"could not be written ({error.strerror or error})", write_remedy(error)
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`; a reader sees either the old file or the complete new one."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def cached_result(folder: Path, name: str, inputs: object, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the result in `folder/NAME-HASH.json`, computed first if there is none.

    `inputs` is everything that determines the result, such as the hash of a model and the test prompts themselves. The
    file's name has the hash of their `repr`, which must therefore be the same in every process.
    """
    file = folder / f"{name}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(dict(compute())))
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def write_remedy(error: Exception) -> str:
    """Return what a user can do about a failed write."""
    number = getattr(error, "errno", None)
    if number is None:  # libraries that write files report no error number
        return "free some disk space, or check the permissions of the folder,"
    return "free some disk space" if number in _FULL else "check the permissions of the folder and its disk"


def sha256_of_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the names and bytes of files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
