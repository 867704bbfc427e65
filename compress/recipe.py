"""Recipes: what to do to a model, as small TOML files with strict keys.

summary = "A quarter of the MLP neurons cut, then W8A8 INT8"

[calibration]
num_samples = 64

[[steps]]
step = "prune"
mlp_remove_frac = 0.25

[[steps]]
step = "quantize"
format = "w8a8"
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from slimserve.core.config import StrictModel, invalid_key_error
from slimserve.core.errors import UserError


class Calibrate(StrictModel):
    """What the steps that look at data look at."""

    source: str = "mixed"
    """A workload, `mixed` for all of them, or the path of a .txt or .jsonl file."""
    num_samples: int = Field(default=32, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    """Tokens per sample."""
    seed: int = 0


class Keep(StrictModel):
    """A budget; give one of the three."""

    parameters: float | None = Field(default=None, gt=0)
    """Of the pruned model: up to 1 a share of the dense model's, above it a number."""
    bytes: float | None = Field(default=None, gt=0)
    """Of the outcome's weights, quantization included: up to 1 a share of the dense model's, above it a number."""
    speedup: float | None = Field(default=None, gt=1)
    """Of the decoder blocks over the dense model's when they read 512 tokens, measured on this machine."""

    @model_validator(mode="after")
    def _is_one(self) -> Keep:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("give one of parameters, bytes, speedup")
        return self


class Prune(StrictModel):
    """Remove MLP neurons, KV groups (a KV head with its query heads) or both, the same number in every block."""

    step: Literal["prune"]
    keep: Keep | None = None
    """Instead of shares: search the split between MLP neurons, KV groups and whole blocks that meets a budget at the
    least output error. Only in a recipe's first step."""
    mlp_remove_frac: float = Field(default=0, ge=0, lt=1)
    """Share of the MLP neurons to remove."""
    kv_remove_frac: float = Field(default=0, ge=0, lt=1)
    """Share of the KV groups to remove, rounded to whole groups."""
    method: str = "osscar_search"
    """Pruning method, a name in `prune.METHODS`."""
    target: Literal["current", "dense"] = "current"
    """Whose outputs a refit aims at: of the model as pruned so far, or of the model before this step."""
    multiple: int = Field(default=32, ge=1)
    """The kept MLP width is a multiple of this: 32 suits CPU kernels, 64 or 128 GPU kernels."""
    damping: float = Field(default=0.01, gt=0)
    """Added to a Hessian's diagonal, as a share of the diagonal's mean."""
    rounds: int = Field(default=1, ge=1)
    """Remove in this many rounds, each on the model that the round before left."""

    @model_validator(mode="after")
    def _removes_something(self) -> Prune:
        has_shares = bool(self.mlp_remove_frac or self.kv_remove_frac)
        if has_shares == (self.keep is not None):
            raise ValueError("give mlp_remove_frac, kv_remove_frac or both, or keep instead of them")
        return self


class PruneDepth(StrictModel):
    """Remove whole decoder blocks."""

    step: Literal["prune_depth"]
    num_blocks: int = Field(ge=1)
    """How many blocks to remove."""
    method: str = "influence"
    """Depth-pruning method, a name in `steps.depth.METHODS`.

    `influence` removes the blocks that change the hidden states least, measured in one pass. `search` takes one pass
    per block and removes the block without which the model's output changes least.
    """


class Quantize(StrictModel):
    """Quantize every linear layer of the decoder blocks; embeddings stay as they are, the head too unless asked."""

    step: Literal["quantize"]
    format: Literal["w8a8", "w4a16", "fp8", "nf4", "int8-bnb"]
    method: str = "rtn"
    """Rounding method, a name in `rounding.ROUNDINGS`."""
    symmetric: bool = True
    """False gives w4a16 zero points."""
    group_size: Literal[32, 64, 128] | None = None
    """w4a16: inputs that share a scale, 32, 64 or 128; where it does not divide a layer, the next that does."""
    scales: Literal["minmax", "mse"] = "minmax"
    """From a group's extremes, or those of least squared error, weighted by the inputs' energy."""
    order: Literal["natural", "activation"] = "activation"
    """Order in which GPTQ rounds the inputs; `activation` starts with those of most energy."""
    sweeps: int = Field(default=5, ge=1)
    """Passes of QuantEase."""
    damping: float = Field(default=0.01, gt=0)
    smoothquant: float | None = Field(default=None, ge=0, le=1)
    """Strength with which outliers move from the inputs into the weights; w8a8 and fp8 only."""
    keep_worst: int = Field(default=0, ge=0)
    """So many fused layers (qkv, o, gate-up, down of one block) with the largest output error stay unquantized."""
    head: Literal["dense", "int8"] = "dense"
    """int8: the output layer in W8A8 by rounding to nearest, which halves what decoding reads of it. Where it is tied
    to the embedding, which stays as it is, the file grows by the INT8 copy. Not with bitsandbytes or fp8."""

    @model_validator(mode="after")
    def _fits_its_format(self) -> Quantize:
        if self.format in {"nf4", "int8-bnb"}:
            fixed = {"method", "symmetric", "group_size", "scales", "order", "sweeps", "damping", "smoothquant"}
            given = fixed & self.model_fields_set
            if given - {"method"} or self.method != "rtn":
                raise ValueError(f"bitsandbytes fixes how {self.format} rounds; leave out {', '.join(sorted(given))}")
        if self.smoothquant is not None and self.format not in {"w8a8", "fp8"}:
            raise ValueError(f"smoothquant is for quantized activations, which {self.format} has not")
        if self.head == "int8" and self.format not in {"w8a8", "w4a16"}:
            raise ValueError(f"head = int8 goes with w8a8 and w4a16, not with {self.format}")
        return self


AnyStep = Prune | PruneDepth | Quantize


class Recipe(StrictModel):
    """Steps in the order in which they are applied."""

    summary: str
    calibration: Calibrate = Calibrate()
    steps: tuple[Annotated[AnyStep, Field(discriminator="step")], ...] = ()

    @model_validator(mode="after")
    def _quantize_once_and_last(self) -> Recipe:
        kinds = [step.step for step in self.steps]
        if "quantize" in kinds[:-1]:
            raise ValueError("quantize must be the last step, and stand only once")
        if any(isinstance(step, Prune) and step.keep for step in self.steps[1:]):
            raise ValueError("a prune step with keep must be the first step: its search sets out from the dense model")
        return self

    @property
    def budget(self) -> Prune | None:
        """The first step, where it prunes to a budget."""
        first = self.steps[0] if self.steps else None
        return first if isinstance(first, Prune) and first.keep else None


def list_recipes() -> dict[str, Recipe]:
    """The recipes that the package ships, by name."""
    folder = resources.files("slimserve.compress") / "recipes"
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {name: _parse((folder / f"{name}.toml").read_text(encoding="utf-8"), name) for name in names}


def load_recipe(argument: str, settings: Sequence[str] = ()) -> tuple[str, Recipe]:
    """A recipe and its name, from a shipped name or the path of a `.toml` file, with `key=value` settings on top.

    A key names a table and its key: `calibration.num_samples`, or the key of the one step of that kind:
    `quantize.group_size`. Values are TOML; what is not, is taken as text.
    """
    shipped = list_recipes()
    path = Path(argument)
    if argument in shipped:
        text = (resources.files("slimserve.compress") / "recipes" / f"{argument}.toml").read_text(encoding="utf-8")
    elif path.suffix == ".toml" and path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise UserError(
            "recipe", argument, "is unknown", f"choose from {', '.join(shipped)}, or give the path of a .toml file"
        )
    return path.name.removesuffix(".toml"), _parse(text, argument, settings)


def _parse(text: str, origin: str, settings: Sequence[str] = ()) -> Recipe:
    try:
        raw = tomllib.loads(text)
        for setting in settings:
            _set(raw, setting)
        return Recipe.model_validate(raw)
    except tomllib.TOMLDecodeError as error:
        raise UserError("recipe", origin, f"is not TOML ({error})", "mend the file") from error
    except ValidationError as error:
        raise invalid_key_error("recipe", error, "steps", origin) from error


def _set(raw: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    table, dot, name = key.strip().partition(".")
    steps = {"calibration": [raw.setdefault("calibration", {})]}
    for step in raw.get("steps", []):
        steps.setdefault(step.get("step", ""), []).append(step)
    if not equals or not dot or len(steps.get(table, [])) != 1:
        raise UserError(
            "--set",
            setting,
            "names no table of the recipe" if equals and dot else "is not TABLE.KEY=VALUE",
            f"write for example {'.'.join([next(reversed(steps)), 'KEY'])}=VALUE; tables: {', '.join(steps)}",
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    steps[table][0][name] = value
