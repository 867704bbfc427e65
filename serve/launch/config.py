"""What one `slimserve serve` puts on one address: variants, aliases that split between them, limits, who may ask.

It comes from the command line (`NAME=MODEL …`) or from a TOML file:

    port = 8000
    api_key_file = "keys.txt"
    vllm_args = ["--max-model-len", "4096"]     # for every variant

    [variants.dense]
    model = "smollm2-135m-instruct"

    [variants.small]
    model = "build/small"
    profile = "prefill"
    vllm_args = ["--enforce-eager"]             # after those of every variant, so it wins

    [aliases.chat]                              # weights of a canary
    dense = 95
    small = 5

    [limits]
    max_running = 32
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimserve.core.errors import UserError
from slimserve.core.model import model_name, resolve_model
from slimserve.serve.launch.plan import TrafficProfile
from slimserve.serve.policy.keys import KEYS_FILE_VARIABLE, load_api_keys
from slimserve.serve.policy.limits import Limits

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class VariantSettings(_Strict):
    """One `[variants.NAME]` of the file."""

    model: str
    """A model argument."""
    profile: TrafficProfile | None = None
    """The kind of traffic to plan for; None: the stack's."""
    vllm_args: list[str] = Field(default_factory=list)


class ServeConfig(_Strict):
    """The whole file."""

    variants: dict[str, VariantSettings] = Field(min_length=1)
    aliases: dict[str, dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]]] = Field(
        default_factory=dict
    )
    """Weight of each variant under a name of its own."""
    default: str | None = None
    """The variant or alias of a request that names no model; None: the only variant, else such a request is refused."""
    profile: TrafficProfile = "balanced"
    vllm_args: list[str] = Field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    api_key_file: str | None = None
    limits: dict[str, int | float] = Field(default_factory=dict)
    """Fields of slimserve.serve.policy.limits.Limits that differ from its defaults."""


@dataclass(frozen=True)
class Variant:
    """One model under one name."""

    name: str
    model: str
    """The model argument as the user gave it."""
    directory: Path
    profile: TrafficProfile
    vllm_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alias:
    """A name that stands for several variants, each for its share of the traffic."""

    name: str
    shares: tuple[tuple[str, float], ...]
    """Variant and share; the shares sum to 1."""

    def pick(self, user: str | None, usable: frozenset[str]) -> str:
        """The variant of one request: always the same for a user, by chance for nobody in particular.

        A user's place between 0 and 1 does not depend on the shares, so changing them moves only as
        many users as they change. Where the variant picked is not usable, another of the alias is, if any.
        """
        place = random.random() if user is None else _place(self.name, user)
        shares = [share for share in self.shares if share[0] in usable] if usable else []
        picked, place_within = _at(place, self.shares)
        if picked in usable or not shares:
            return picked
        return _at(place_within * sum(share for _, share in shares), shares)[0]


@dataclass(frozen=True)
class ResolvedServeConfig:
    """Everything that `slimserve serve` was asked for, checked, with every model resolved."""

    variants: tuple[Variant, ...]
    aliases: tuple[Alias, ...] = ()
    default: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def aliases_of(self, variant: str) -> tuple[str, ...]:
        """The further names that a variant must answer to."""
        return tuple(alias.name for alias in self.aliases if any(name == variant for name, _ in alias.shares))

    def api_keys(self) -> frozenset[str]:
        """Keys of the file and of the environment."""
        named = {KEYS_FILE_VARIABLE: str(self.api_key_file)} if self.api_key_file else {}
        return load_api_keys(os.environ | named)


def load_serve_config(
    models: Sequence[str],
    config_file: Path | None = None,
    aliases: Sequence[str] = (),
    vllm_args: Sequence[str] = (),
    limits: Mapping[str, int | float] | None = None,
    **options: Any,
) -> ResolvedServeConfig:
    """Read a stack from `NAME=MODEL` arguments or a file, check it, and resolve its models.

    All but the first two come from the command line, too: `aliases` as NAME=V1:95,V2:5, `vllm_args` for every
    variant after those of the file, `options` as fields of ServeConfig, None where not given. What the file sets to
    something else is refused. Raises UserError.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if config_file is not None:
        if models:
            raise UserError("MODEL", models[0], "is given beside --config", "name every variant in the file")
        document = _read_toml(config_file)
    elif models:
        document = {"variants": _variants_of(models)}
    else:
        raise UserError("MODEL", "", "is missing", "write: slimserve serve MODEL, NAME=MODEL …, or --config FILE.toml")
    if aliases:
        given["aliases"] = _aliases_of(aliases)
    _merge(document, given, str(config_file))
    if limits and isinstance(document.setdefault("limits", {}), dict):
        _merge(document["limits"], limits, f"[limits] of {config_file}")
    config = _validated(document, str(config_file) if config_file else "the command line")
    return _resolve(config, tuple(vllm_args))


def _merge(document: dict[str, Any], given: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        if document.setdefault(name, value) != value:
            raise UserError(name, value, f"is {document[name]!r} in {where}", "leave one of the two out")


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError("--config", file, f"cannot be read ({error})", "name a TOML file, see docs/serve.md") from error


def _variants_of(models: Sequence[str]) -> dict[str, dict[str, str]]:
    """Name to model; a single MODEL without a name gets its name when it is resolved."""
    variants: dict[str, dict[str, str]] = {}
    for argument in models:
        name, equals, model = argument.partition("=")
        if not equals or not _NAME.fullmatch(name) or Path(argument).exists():
            if len(models) > 1:
                raise UserError("MODEL", argument, "has no name, as each of several needs", f"write: NAME={argument}")
            name, model = "", argument
        if name in variants:
            raise UserError("NAME=MODEL", argument, f"names {name} a second time", "give every variant its own name")
        variants[name] = {"model": model}
    return variants


def _aliases_of(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    aliases: dict[str, dict[str, float]] = {}
    for argument in arguments:
        name, weights = _parse_alias(argument)
        if name in aliases:
            raise UserError("--alias", argument, f"names {name} a second time", "give every alias its own name")
        aliases[name] = weights
    return aliases


def _parse_alias(argument: str) -> tuple[str, dict[str, float]]:
    name, _, targets = argument.partition("=")
    weights: dict[str, float] = {}
    for target in targets.split(","):
        variant, _, weight = target.strip().partition(":")
        try:
            value = float(weight or 1)
        except ValueError:
            value = 0.0
        if not variant or value <= 0 or variant in weights:
            problem = f"has no weight above 0 for one variant in {target!r}"
            raise UserError("--alias", argument, problem, "write: --alias NAME=V1:95,V2:5")
        weights[variant] = value
    return name, weights


def _validated(document: dict[str, Any], source: str) -> ServeConfig:
    try:
        config = ServeConfig.model_validate(document)
        Limits.model_validate(config.limits)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        remedy = "see docs/serve.md for the keys" if first["type"] == "extra_forbidden" else "change it"
        raise UserError(
            where or source, first.get("input"), f"is not valid in {source} ({first['msg']})", remedy
        ) from error
    names = config.variants.keys()
    for name in (*(name for name in names if name), *config.aliases):
        if not _NAME.fullmatch(name):
            raise UserError("name", name, "is no name", "use letters, digits, dots, dashes and underlines, at most 64")
    for alias, weights in config.aliases.items():
        if alias in names:
            raise UserError("alias", alias, "is a variant's name, too", "give it another name")
        if not weights:
            raise UserError("alias", alias, "stands for no variant", "name one with its weight")
        for variant in weights.keys() - names - {""}:
            raise UserError("alias", alias, f"names {variant}, which is no variant", _choice_of(names))
    if config.default is not None and config.default not in {*names, *config.aliases}:
        raise UserError("default", config.default, "is no variant and no alias", _choice_of((*names, *config.aliases)))
    return config


def _choice_of(names: Iterable[str]) -> str:
    known = ", ".join(filter(None, names))
    return f"choose from {known}" if known else "write NAME=MODEL, so that it can be named"


def _resolve(config: ServeConfig, vllm_args: tuple[str, ...]) -> ResolvedServeConfig:
    if config.api_key_file is not None:
        load_api_keys({KEYS_FILE_VARIABLE: config.api_key_file})
    variants = []
    for name, variant in config.variants.items():
        directory = resolve_model(variant.model)
        variants.append(
            Variant(
                name or model_name(variant.model, directory),
                variant.model,
                directory,
                variant.profile or config.profile,
                (*config.vllm_args, *variant.vllm_args, *vllm_args),
            )
        )
    aliases = tuple(
        Alias(name, tuple((variant, weight / sum(weights.values())) for variant, weight in weights.items()))
        for name, weights in config.aliases.items()
    )
    return ResolvedServeConfig(
        tuple(variants),
        aliases,
        config.default or (variants[0].name if len(variants) == 1 else None),
        config.host,
        config.port,
        Path(config.api_key_file) if config.api_key_file else None,
        Limits.model_validate(config.limits),
    )


def _place(alias: str, user: str) -> float:
    digest = hashlib.blake2b(f"{alias}\0{user}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _at(place: float, shares: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """The variant at a place, and where within its share that is, between 0 and 1."""
    for variant, share in shares:
        if place < share:
            return variant, place / share
        place -= share
    return shares[-1][0], 0.0
