"""Where things are kept, and how a directory appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slimserve.core.errors import UserError
from slimserve.core.progress import print_status

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_dir(kind: str) -> Path:
    """Return (and create) the cache directory for one kind of artefact.

    `SLIMSERVE_CACHE` names the root; without it, `$XDG_CACHE_HOME/slimserve` or
    `~/.cache/slimserve`. Deleting the root loses time, never results.
    """
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimserve"
    root = Path(os.environ.get("SLIMSERVE_CACHE") or fallback)
    path = root / kind
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "cache directory", path, f"cannot be made ({error.strerror})", "set SLIMSERVE_CACHE to a writable folder"
        ) from error
    return path


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a new directory beside `target` that is renamed to `target` on success.

    On any exception, Ctrl-C included, the temporary directory is removed and
    `target` is left as it was. A killed process leaves only `.NAME.partial-PID`,
    which nobody trusts and which the next build of the same target removes; killed
    between the two renames that replace an old target, it leaves that as `.NAME.replaced-PID`.
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
            f"{write_remedy(error)} or name another folder; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def building_path(target: Path) -> Path:
    """The folder beside `target` in which it is being made."""
    return target.parent / f".{target.name}.building"


@contextmanager
def work_folder(target: Path, key: str, resumable: str) -> Iterator[Path]:
    """The folder beside `target` in which it is being made: `.NAME.building`, gone when that is done.

    Kept when the making is interrupted and a file of the pattern `resumable` is there to go on from, but not after a
    UserError that no full disk caused: the same command would meet it again. One of another `key` is emptied first.
    UserError where another process makes the same target.
    """
    work = building_path(target)
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "output directory", target, "is being built by another process", "wait for it, or name another"
            ) from error
        identity = work / "identity"
        if not identity.is_file() or identity.read_text(encoding="utf-8") != key:
            for leftover in work.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != "lock":
                    leftover.unlink()
            write_atomically(identity, key)
        try:
            yield work
        except BaseException as error:
            from safetensors import SafetensorError

            is_hopeless = isinstance(error, UserError) and not isinstance(error.__cause__, OSError | SafetensorError)
            if not is_hopeless and any(work.glob(resumable)):
                print_status(
                    f"what is done lies in {work}: the same command resumes it; delete the folder to start anew"
                )
            else:
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work)


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` so that a reader sees the old file or the new one, never half."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        _fsync(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(
            "output file", path, f"could not be written ({error.strerror or error})", write_remedy(error)
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_remedy(error: Exception) -> str:
    """What to do about a write that failed."""
    number = getattr(error, "errno", None)
    if number is None:  # a library that writes files itself says no more than that it failed
        return "free some disk space, or check the permissions of the folder,"
    return "free some disk space" if number in _FULL else "check the permissions of the folder and its disk"


def sha256_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and bytes of files, in the order of their names."""
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
