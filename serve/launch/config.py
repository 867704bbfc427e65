"""Configuration of one `slimserve serve`: variants, aliases that split traffic between them, limits and API keys.

It comes from the command line (`NAME=MODEL ...`) or from a TOML file:

    port = 8000
    api_key_file = "keys.txt"
    vllm_args = ["--max-model-len", "4096"]     # for every variant

    [variants.dense]
    model = "smollm2-135m-instruct"

    [variants.small]
    model = "build/small"
    profile = "prefill"
    vllm_args = ["--enforce-eager"]             # follows the arguments for every variant, so it wins

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from slimserve.core.config import Settings, StrictModel, load_toml, setting, validated
from slimserve.core.errors import UserError
from slimserve.core.model import model_name, resolve_model
from slimserve.serve.launch.plan import TrafficProfile
from slimserve.serve.policy.keys import KEYS_FILE_VARIABLE, load_api_keys
from slimserve.serve.policy.limits import Limits

_KIND = "serve config"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class VariantSettings(StrictModel):
    """One `[variants.NAME]` table of the file."""

    model_config = ConfigDict(strict=True)

    model: str
    """Model argument: a directory, a Hugging Face id, a .gguf file or a built-in name."""
    profile: TrafficProfile | None = None
    """Traffic that this variant is tuned for; None takes the profile of the whole file."""
    vllm_args: list[str] = Field(default_factory=list)
    """Arguments for vLLM, after those for every variant."""


class ServeConfig(Settings):
    """The TOML file; fields with a command-line option may come from the command line instead."""

    model_config = ConfigDict(strict=True)

    variants: dict[str, VariantSettings] = setting({}, "Models.", option="", min_length=1, validate_default=True)
    aliases: dict[str, dict[str, _Weight]] = setting({}, "Weights of variants, by alias.", option="")
    vllm_args: list[str] = setting([], "Arguments for vLLM, for every variant.", option="")
    default: str | None = setting(
        None,
        "Variant or alias for requests that name no model; several variants reject them by default.",
        metavar="NAME",
        panel="Models",
    )
    profile: TrafficProfile = setting(
        "balanced",
        "Traffic to tune the launch for: prefill is scoring and long prompts, decode is long answers.",
        panel="Models",
    )
    host: str = setting(
        "127.0.0.1", "Address to listen on; 0.0.0.0 accepts connections from the network.", panel="Server"
    )
    port: int = setting(8000, "Port to listen on.", panel="Server", ge=1, le=65535)
    api_key_file: str | None = setting(
        None,
        "File with the API keys that clients may use, one per line; VLLM_API_KEY is accepted too.",
        metavar="PATH",
        panel="Server",
    )
    limits: Limits = Limits()


@dataclass(frozen=True)
class Variant:
    """A model and the name that it is served under."""

    name: str
    model: str
    """The model argument as the user gave it."""
    directory: Path
    profile: TrafficProfile
    vllm_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alias:
    """A model name whose traffic is split between several variants."""

    name: str
    shares: tuple[tuple[str, float], ...]
    """Pairs of variant and share; the shares sum to 1."""

    def pick(self, user: str | None, usable: frozenset[str]) -> str:
        """Return the variant for one request: always the same for a user, a random one without a user.

        A user's position between 0 and 1 does not depend on the shares, so that changed shares move as few users as
        possible. If the variant is not in `usable`, another variant of the alias takes its place.
        """
        position = random.random() if user is None else _position(self.name, user)
        shares = [share for share in self.shares if share[0] in usable]
        variant, position_within = _at(position, self.shares)
        if variant in usable or not shares:
            return variant
        return _at(position_within * sum(share for _, share in shares), shares)[0]


@dataclass(frozen=True)
class ResolvedServeConfig:
    """A checked configuration in which every model is a local directory."""

    variants: tuple[Variant, ...]
    aliases: tuple[Alias, ...] = ()
    default: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def aliases_of(self, variant: str) -> tuple[str, ...]:
        """Return the aliases that may send requests to a variant."""
        return tuple(alias.name for alias in self.aliases if any(name == variant for name, _ in alias.shares))

    def api_keys(self) -> frozenset[str]:
        """Return the API keys of the file and of the environment."""
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
    """Read a configuration from `NAME=MODEL` arguments or a TOML file, check it, and resolve its models.

    The other parameters come from the command line: `aliases` as NAME=V1:95,V2:5, `vllm_args` for every variant after
    those of the file, and `options` as fields of ServeConfig, where None means not given. Raises UserError for an
    invalid value, and for an option that the file sets to another value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if config_file is not None:
        if models:
            raise UserError("MODEL", models[0], "cannot be combined with --config", "name every variant in the file")
        document = load_toml(config_file, _KIND)
    elif models:
        document = {"variants": _variants_of(models)}
    else:
        raise UserError("MODEL", "", "is missing", "write: slimserve serve MODEL, NAME=MODEL ... or --config FILE.toml")
    if aliases:
        given["aliases"] = _aliases_of(aliases)
    _merge(document, given, str(config_file))
    if limits and isinstance(document.setdefault("limits", {}), dict):
        _merge(document["limits"], limits, f"[limits] of {config_file}")
    config = validated(ServeConfig, document, _KIND, config_file or "the command line")
    _check_names(config)
    return _resolve(config, tuple(vllm_args))


def _merge(document: dict[str, Any], given: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        if document.setdefault(name, value) != value:
            raise UserError(name, value, f"is {document[name]!r} in {where}", "leave one of the two out")


def _variants_of(models: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the variants by name; a single MODEL without a name has an empty one until it is resolved."""
    variants: dict[str, dict[str, str]] = {}
    for argument in models:
        name, equals, model = argument.partition("=")
        if not equals or not _NAME.fullmatch(name) or Path(argument).exists():
            if len(models) > 1:
                raise UserError("MODEL", argument, "has no name; several models need names", f"write: NAME={argument}")
            name, model = "", argument
        if name in variants:
            raise UserError("NAME=MODEL", argument, f"uses the name {name} a second time", "use another name")
        variants[name] = {"model": model}
    return variants


def _aliases_of(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    aliases: dict[str, dict[str, float]] = {}
    for argument in arguments:
        name, weights = _parse_alias(argument)
        if name in aliases:
            raise UserError("--alias", argument, f"uses the name {name} a second time", "use another name")
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


def _check_names(config: ServeConfig) -> None:
    names = config.variants.keys()
    for name in (*(name for name in names if name), *config.aliases):
        if not _NAME.fullmatch(name):
            raise UserError("name", name, "is not a valid name", "use at most 64 letters, digits, and . - _")
    for alias, weights in config.aliases.items():
        if alias in names:
            raise UserError("alias", alias, "is also the name of a variant", "give it another name")
        if not weights:
            raise UserError("alias", alias, "has no variants", "add a variant with its weight")
        for variant in weights.keys() - names - {""}:
            raise UserError("alias", alias, f"names {variant}, which is not a variant", _choice_of(names))
    if config.default is not None and config.default not in {*names, *config.aliases}:
        raise UserError(
            "default", config.default, "is neither a variant nor an alias", _choice_of((*names, *config.aliases))
        )


def _choice_of(names: Iterable[str]) -> str:
    known = ", ".join(filter(None, names))
    return f"choose from {known}" if known else "write NAME=MODEL, to give the model a name"


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
        config.limits,
    )


def _position(alias: str, user: str) -> float:
    digest = hashlib.blake2b(f"{alias}\0{user}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _at(position: float, shares: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """Return the variant at a position, and the position within its share, from 0 to 1."""
    for variant, share in shares:
        if position < share:
            return variant, position / share
        position -= share
    return shares[-1][0], 0.0
