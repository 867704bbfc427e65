"""Settings: strict pydantic models that the command line, TOML files and Python share.

A command declares each of its options once, as a field of a `Settings` model::

    class LoadSettings(Settings):
        users: int = setting(4, "Number of closed-loop users.", panel="Traffic", ge=1)
        duration_s: Duration = setting(60.0, "Length of the measured window.", option="--duration", panel="Traffic")

    @app.command()
    @takes_settings(LoadSettings)
    def loadtest(suite: Suite, settings: LoadSettings) -> None: ...

A TOML file is read with `load_toml`, changed by `--set table.key=value` with `set_value`, and checked with `validated`.
All three report a bad value as one `UserError` that names the key or option.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from slimserve.core.errors import UserError
from slimserve.core.text import read_text

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_PLAIN_TYPES = (bool, int, float, str, Path)
_METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """An immutable model that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(StrictModel):
    """The options of a command; each field is declared with `setting`."""


@dataclass(frozen=True)
class Text:
    """Marks a type that the command line takes as text, such as `60s` for a duration in seconds."""

    metavar: str
    write: Callable[[Any], str] = str
    """Turns a value of the type back into text, for the default that the help shows."""


def parse_duration(value: object) -> object:
    """Return the seconds of `90`, `90s`, `1.5m`, `500ms` or `1h`; a number is already in seconds."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError("this is not a duration; write 90, 90s, 1.5m or 500ms")
    return float(match[1]) * _SECONDS_PER_UNIT[match[2] or "s"]


def parse_fraction(value: object) -> object:
    """Return the fraction of `3%` or `0.03`; a number is already a fraction."""
    if not isinstance(value, str):
        return value
    try:
        return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise ValueError("this is not a fraction; write 3% or 0.03") from None


Duration = Annotated[float, BeforeValidator(parse_duration), Text("DURATION", lambda seconds: f"{seconds:g}s")]
"""Seconds as a float; on the command line `90`, `90s`, `1.5m` or `500ms`."""
Fraction = Annotated[float, BeforeValidator(parse_fraction), Text("PERCENT", lambda frac: f"{100 * frac:g}%")]
"""A fraction from 0 to 1; on the command line `3%` or `0.03`."""


def setting(
    default: Any,
    description: str,
    *,
    option: str | tuple[str, ...] = (),
    panel: str | None = None,
    metavar: str | None = None,
    **constraints: Any,
) -> Any:
    """Declare a field of a `Settings` model.

    `option` replaces the command-line spelling, which is `--` and the field's name with dashes; an empty string keeps
    the field off the command line. The default `...` makes the option required. `constraints` are pydantic's (`ge`,
    `lt`, `min_length`, …).
    """
    names = (option,) if isinstance(option, str) else option
    extra: dict[str, Any] = {"option": list(names), "panel": panel, "metavar": metavar}
    return Field(default=default, description=description, json_schema_extra=extra, **constraints)


def load_toml(file: Path, kind: str) -> dict[str, Any]:
    """Read a TOML file; `kind` names what it holds (`recipe`, `pipeline`) in the UserError if it cannot be read."""
    try:
        return tomllib.loads(read_text(file, kind, "give the path of a TOML file"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(kind, file, f"cannot be read ({error})", "give the path of a TOML file") from error


def set_value(document: dict[str, Any], assignment: str) -> None:
    """Apply `table.key=value` (`--set`) to a document in place.

    The value is TOML, or else plain text. A number in the path is an index into an array of tables, as in
    `stages.0.steps=100`; a missing array is made with one empty table. Raises UserError where the path leads nowhere.
    """
    path, equals, text = assignment.partition("=")
    if not equals:
        raise UserError("--set", assignment, "is not KEY=VALUE", "write for example quantize.group_size=64")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = path.strip().split(".")
    place: Any = document
    for name, following in itertools.pairwise([*tables, key]):
        if isinstance(place, list):
            if not name.isdigit() or int(name) >= len(place):
                raise UserError("--set", assignment, f"has no entry {name}", f"use 0 to {len(place) - 1}")
            place = place[int(name)]
        elif isinstance(place, dict):
            place = place.setdefault(name, [{}] if following.isdigit() else {})
    if not isinstance(place, dict):
        raise UserError("--set", assignment, "names no key of a table", "write for example stages.0.steps=100")
    place[key] = value


def validated(model: type[Model], document: Mapping[str, Any], kind: str, origin: object) -> Model:
    """Validate a document; UserError names the first key that is refused and the file that it came from."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise invalid_key_error(kind, error, kind, origin) from error


def invalid_key_error(kind: str, error: ValidationError, root: str, origin: object) -> UserError:
    """Turn a validation error into a UserError; `root` names a problem that belongs to no single key."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or root
    return UserError(f"{kind} key {where}", first["input"], f"is invalid: {_message(first)}", f"correct it in {origin}")


def takes_settings(
    model: type[Settings], *, parameter: str = "settings", only_given: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Give a typer command one option per field of `model`; nested models are flattened.

    The command receives the validated model as the argument `parameter`; with `only_given`, a nested dictionary of the
    options that the user wrote, to be merged over a file. A bad value is a UserError that names the option.
    """
    options = list(_options_of(model))

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != parameter]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            given: dict[str, Any] = {}
            for option in options:
                value = values.pop(option.parameter)
                if value is None or value == []:
                    continue
                if only_given and value is False:
                    continue
                table = given
                for name in option.path[:-1]:
                    table = table.setdefault(name, {})
                table[option.path[-1]] = value
            values[parameter] = given if only_given else _from_options(model, given, options)
            function(**values)

        added = [option.as_parameter(has_default=not only_given) for option in options]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        del command.__wrapped__
        return command

    return decorate


@dataclass(frozen=True)
class _Option:
    """One field of a settings model as an option of the command line."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def parameter(self) -> str:
        return "_".join(self.path)

    @property
    def flags(self) -> tuple[str, ...]:
        written = tuple(self._extra.get("option") or ())
        return written or (f"--{self.path[-1].replace('_', '-')}",)

    @property
    def _extra(self) -> dict[str, Any]:
        extra = self.field.json_schema_extra
        return extra if isinstance(extra, dict) else {}

    def as_parameter(self, has_default: bool) -> inspect.Parameter:
        import typer

        kind, metavar, is_many = _kind_of(self.field)
        is_required = self.field.is_required()
        default = None if is_required else self.field.get_default(call_default_factory=True)
        shown: Any = None
        if kind is bool:
            shown = False
        elif default not in (None, "", ()) and not is_many:
            text = next((mark for mark in self.field.metadata if isinstance(mark, Text)), None)
            shown = text.write(default) if text else default
        help_default: bool | str = shown is not None and kind is not bool
        if not has_default and kind is not bool:
            # The option itself has no default, so that a value of the file is not overwritten.
            help_default, shown = (str(shown) if shown is not None else False), None
        annotation: Any = list[str] | None if is_many else kind if kind is bool else kind | None
        option = typer.Option(
            *self.flags,
            help=self.field.description,
            metavar=self._extra.get("metavar") or metavar or _METAVARS.get(kind),
            rich_help_panel=self._extra.get("panel"),
            show_default=help_default,
        )
        return inspect.Parameter(
            self.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if is_required else shown,
            annotation=Annotated[annotation, option],
        )


def _options_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[_Option]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _options_of(field.annotation, (*path, name))
            continue
        option = _Option((*path, name), field)
        if option.flags != ("",):
            yield option


def _kind_of(field: FieldInfo) -> tuple[Any, str | None, bool]:
    """Return the type that typer parses, the metavar, and whether the option may be given several times."""
    text = next((mark for mark in field.metadata if isinstance(mark, Text)), None)
    if text is not None:
        return str, text.metavar, False
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
        if get_origin(annotation) is Annotated:
            text = next((mark for mark in get_args(annotation) if isinstance(mark, Text)), None)
            return str, text.metavar if text else None, False
    if get_origin(annotation) is Literal:
        return str, "|".join(map(str, get_args(annotation))), False
    if get_origin(annotation) in (tuple, list):
        return str, None, True
    return (annotation if annotation in _PLAIN_TYPES else str), None, False


def _from_options(model: type[Settings], given: Mapping[str, Any], options: list[_Option]) -> Settings:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        location = tuple(part for part in first["loc"] if isinstance(part, str))
        option = next((one for one in options if one.path == location[: len(one.path)]), None)
        name = option.flags[-1] if option else "options"
        value = first["input"] if option else ""
        raise UserError(name, value, f"is invalid: {_message(first)}", "see --help") from error


def _message(error: Any) -> str:
    """Pydantic's sentence without its prefix, in lower case at the start."""
    text = str(error["msg"]).removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
