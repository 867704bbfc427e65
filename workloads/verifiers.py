"""Verifiers: whether a generated answer is right, given the reference answer.

A chain of thought before a closing think tag does not count. Names: `exact`, `number`, `choice`, `regex`,
`json_schema`, `maths`, and `python:MODULE:FUNCTION`, a function of (answer, reference) that returns true or false.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError
from slimserve.core.text import parse_json, read_text
from slimserve.workloads.interface import THINK_CLOSE

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|-?\.\d+")
_CHOICE = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?(?![A-Za-z0-9])")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Verifier:
    """A check of answers. `needs_answer` is false if it needs no reference answer."""

    check: Callable[[str, str], bool]
    needs_answer: bool = True

    def __call__(self, text: str, answer: str) -> bool:
        """Tell whether a reply is right; a chain of thought before the last closing think tag is cut off."""
        return self.check(text.rsplit(THINK_CLOSE, 1)[-1], answer)


def make_verifier(name: str, folder: Path, *, pattern: str | None = None, schema: str | None = None) -> Verifier:
    """Return the verifier of a name; UserError if it is unknown, or lacks its pattern, schema or package."""
    if name == "regex":
        return _regex_verifier(pattern)
    if name == "json_schema":
        return _schema_verifier(folder, schema)
    if name == "maths":
        return Verifier(_maths_verifier())
    if name.startswith("python:"):
        return Verifier(_function(name, folder))
    simple = {"exact": _is_exact, "number": _is_number, "choice": _is_choice}
    if name not in simple:
        names = ", ".join((*simple, "regex", "json_schema", "maths", "python:MODULE:FUNCTION"))
        raise UserError("verifier", name, "is unknown", f"choose from {names}")
    return Verifier(simple[name])


def _is_exact(text: str, answer: str) -> bool:
    """Compare the texts without case and with single spaces."""
    return " ".join(text.casefold().split()) == " ".join(answer.casefold().split())


def _is_number(text: str, answer: str) -> bool:
    """Compare the last number of both texts; commas between thousands are ignored."""
    ours, theirs = _last_number(text), _last_number(answer)
    return ours is not None and theirs is not None and abs(ours - theirs) <= _TOLERANCE * max(1.0, abs(theirs))


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _is_choice(text: str, answer: str) -> bool:
    """Compare the last capital letter that stands alone, such as in "The answer is (B)."."""
    ours, theirs = _CHOICE.findall(text), _CHOICE.findall(answer.strip().upper()[:1])
    return bool(ours) and bool(theirs) and ours[-1] == theirs[-1]


def _regex_verifier(pattern: str | None) -> Verifier:
    if pattern is None:
        raise UserError("pattern", None, "is missing", "write the regular expression of the verifier `regex`")
    uses_answer = "{answer}" in pattern
    try:
        re.compile(pattern.replace("{answer}", "x"))
    except re.error as error:
        raise UserError("pattern", pattern, f"is not a regular expression ({error})", "correct it") from error

    def check(text: str, answer: str) -> bool:
        return re.search(pattern.replace("{answer}", re.escape(answer)), text) is not None

    return Verifier(check, needs_answer=uses_answer)


def _schema_verifier(folder: Path, schema: str | None) -> Verifier:
    import jsonschema

    if schema is None:
        raise UserError("json_schema", None, "is missing", "name the file with the JSON schema")
    file = folder / schema
    try:
        validator = jsonschema.validators.validator_for(document := parse_json(read_text(file, "json_schema")))
        validator.check_schema(document)
    except (ValueError, jsonschema.SchemaError) as error:
        raise UserError("json_schema", file, f"is not a JSON schema ({error})", "correct the file") from error

    def check(text: str, _: str) -> bool:
        fenced = _FENCE.findall(text)
        try:
            value = parse_json(fenced[-1] if fenced else text)
        except ValueError:
            return False
        return bool(validator(document).is_valid(value))

    return Verifier(check, needs_answer=False)


def _maths_verifier() -> Callable[[str, str], bool]:
    try:
        import math_verify
    except ImportError as error:
        remedy = 'run: pip install "slimserve[eval]"'
        raise UserError("verifier", "maths", "needs the package `math-verify`", remedy) from error

    def check(text: str, answer: str) -> bool:
        # Without time limits: they need signals, which only the main thread may set.
        reference = math_verify.parse(
            answer if "$" in answer or "\\" in answer else f"${answer}$", parsing_timeout=None
        )
        given = math_verify.parse(text, parsing_timeout=None)
        return bool(math_verify.verify(reference, given, timeout_seconds=None))

    return check


def _function(name: str, folder: Path) -> Callable[[str, str], bool]:
    """Import the function of `python:MODULE:FUNCTION`; the workload file's folder is searched first."""
    _, module, *rest = name.split(":")
    if len(rest) != 1:
        raise UserError("verifier", name, "names no function", "write python:MODULE:FUNCTION")
    sys.path.insert(0, str(folder.resolve()))
    try:
        function: Any = getattr(importlib.import_module(module), rest[0])
    except Exception as error:  # the user's module may raise anything
        raise UserError("verifier", name, f"cannot be imported ({error!r})", "correct the module") from error
    finally:
        sys.path.pop(0)

    def check(text: str, answer: str) -> bool:
        try:
            return bool(function(text, answer))
        except Exception as error:  # the user's function may raise anything
            raise UserError("verifier", name, f"failed ({error!r})", "correct the function") from error

    return check
