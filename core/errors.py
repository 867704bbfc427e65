"""The error that a user sees: which field, which value, what is wrong, and what to do."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

_LIBRARIES = (str(Path(__file__).parent.parent), sys.prefix, sys.base_prefix)
"""Folders of this package, the installed packages and the standard library."""


class UserError(Exception):
    """A mistake that the user can correct; the command line prints it in one line and exits with code 2.

    `field` is the option, key or file as the user wrote it, `value` its content, `problem` what is wrong with it, and
    `remedy` the next thing to type or check.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field}: {str(value)!r} {problem}; {remedy}")

    def __str__(self) -> str:
        text = " ".join(super().__str__().split())
        # Half of a surrogate pair, which JSON may hold, can be neither printed nor sent.
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def exception_text(error: BaseException) -> str:
    """Return an exception that a user's code or data raised in one line, with the user's file and line if it has one.

    A file of the user is any outside of this package, the standard library and the installed packages.
    """
    text = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_user(frame.filename)]
    return f"{text}, {frames[-1].filename}:{frames[-1].lineno}" if frames else text


def _is_of_user(filename: str) -> bool:
    return not filename.startswith(_LIBRARIES) and "site-packages" not in filename and Path(filename).is_file()
