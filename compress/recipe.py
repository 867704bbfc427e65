"""Recipes: the steps that compress a model, as TOML files with strict keys. For example:

summary = "A quarter of the MLP neurons removed, then W8A8 INT8"

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

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from slimserve.core.config import StrictModel, load_toml, set_value, validated
from slimserve.core.errors import UserError

MIXED = "mixed"
"""Calibration source that takes documents from all built-in workloads in turn."""
SELF_GENERATED = "self-generated"
"""Calibration source that the model writes itself."""


class Calibrate(StrictModel):
    """Samples for the steps that need data."""

    source: str = SELF_GENERATED
    """Names or files of workloads, separated by commas, `mixed` for all built-in workloads, path of a .txt or .jsonl
    file, or `self-generated` for text that the model writes in its chat format."""
    num_samples: int = Field(default=32, ge=1)
    """Number of token sequences."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens per sequence."""
    seed: int = 0
    """Random seed for the choice of samples and for methods that draw at random."""


class Keep(StrictModel):
    """A size or speed budget; exactly one of the three is given."""

    parameters: float | None = Field(default=None, gt=0)
    """Parameters of the pruned model: up to 1 a fraction of the dense model's, above 1 a number."""
    bytes: float | None = Field(default=None, gt=0)
    """Bytes of the final weights, quantized if the recipe quantizes: a fraction up to 1, above 1 a number."""
    speedup: float | None = Field(default=None, gt=1)
    """Speed of the decoder blocks relative to the dense model's on 512 tokens, measured on this machine."""

    @model_validator(mode="after")
    def _is_one(self) -> Keep:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("give exactly one of parameters, bytes, speedup")
        return self


class Prune(StrictModel):
    """Remove MLP neurons, KV groups or both; every block loses the same number.

    A KV group is a key-value head with its query heads.
    """

    step: Literal["prune"]
    keep: Keep | None = None
    """Budget that replaces the fractions; only possible in the first step.

    A search divides the cuts between MLP neurons, KV groups and complete blocks so that the output error is least.
    """
    mlp_remove_frac: float = Field(default=0, ge=0, lt=1)
    """Fraction of the MLP neurons to remove."""
    kv_remove_frac: float = Field(default=0, ge=0, lt=1)
    """Fraction of the KV groups to remove, rounded to complete groups."""
    method: str | None = None
    """Pruning method, a name in `prune.METHODS`; None takes that of `prune.DEFAULT_METHODS` for each kind of unit."""
    target: Literal["current", "dense", "residual"] | None = None
    """Outputs that a refit approximates; None takes that of the method.

    `current` are those of the model as pruned so far, `dense` those of the model before this step. `residual` are the
    latter plus what the hidden states before the sublayer have lost, so that the states after it come near to those of
    the dense model.
    """
    multiple: int = Field(default=32, ge=1)
    """The kept MLP width is a multiple of this number; 32 suits CPU kernels, 64 or 128 suit GPU kernels."""
    damping: float | None = Field(default=None, gt=0)
    """Value added to the diagonal of a Hessian, as a fraction of the diagonal's mean; None takes that of the method."""
    rounds: int = Field(default=1, ge=1)
    """Number of rounds in which the cuts are made; each round prunes the model that the previous one left."""

    @model_validator(mode="after")
    def _removes_something(self) -> Prune:
        has_fractions = bool(self.mlp_remove_frac or self.kv_remove_frac)
        if has_fractions == (self.keep is not None):
            raise ValueError("give mlp_remove_frac, kv_remove_frac or both, or give keep instead of them")
        return self


class PruneDepth(StrictModel):
    """Remove complete decoder blocks."""

    step: Literal["prune_depth"]
    num_blocks: int = Field(ge=1)
    """Number of blocks to remove."""
    method: str = "influence"
    """Depth-pruning method, a name in `steps.depth.METHODS`.

    `influence` removes the blocks that change the hidden states least, measured in one pass. `search` takes one pass
    per block and removes the block without which the model's output changes least.
    """


class Quantize(StrictModel):
    """Quantize every linear layer of the decoder blocks; the embedding stays as it is, by default the head too."""

    step: Literal["quantize"]
    format: str
    """Quantization format, a name in `formats.format_names()`."""
    method: str = "rtn"
    """Rounding method, a name in `rounding.ROUNDINGS`."""
    symmetric: bool = True
    """False gives every scale a zero point, in formats that have them."""
    group_size: int | None = None
    """Input features that share a scale, in formats with groups; the default is one scale per output feature.

    If the size does not divide every layer, the next smaller one that does is used.
    """
    scales: Literal["minmax", "mse"] = "minmax"
    """Scales from a group's extremes, or those with the least squared error weighted by the inputs' energy."""
    order: Literal["natural", "activation"] = "activation"
    """Order in which GPTQ rounds the input features; `activation` begins with those of the most energy."""
    sweeps: int = Field(default=5, ge=1)
    """Maximum number of sweeps of QuantEase over all input features."""
    damping: float = Field(default=0.01, gt=0)
    """Value added to the diagonal of a Hessian, as a fraction of the diagonal's mean."""
    smoothquant: float | None = Field(default=None, ge=0, le=1)
    """Strength with which SmoothQuant moves outliers from inputs to weights; for formats that round inputs."""
    awq: bool = False
    """Let AWQ choose factors that move the rounding error away from large inputs; for formats that keep inputs."""
    keep_worst: int = Field(default=0, ge=0)
    """Number of fused layers that stay dense: those with the largest output error.

    The fused layers of a block are qkv, o, gate-up and down.
    """
    head: Literal["dense", "int8"] = "dense"
    """`int8` rounds the output layer to W8A8, which halves the bytes that decoding reads of it.

    If the output layer is tied to the embedding, the embedding stays dense and the file grows by the INT8 copy.
    """

    kv_cache: Literal["dense", "fp8_e4m3"] = "dense"
    """`fp8_e4m3` calibrates the scales of an FP8 KV cache of half the bytes; for formats of compressed-tensors."""

    @field_validator("format")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        from slimserve.compress.formats import format_names

        if name not in format_names():
            raise ValueError(f"there is no such format; choose from {', '.join(format_names())}")
        return name

    @field_validator("group_size")
    @classmethod
    def _suits_kernels(cls, size: int | None, info: ValidationInfo) -> int | None:
        from slimserve.compress.formats import get_format

        sizes = get_format(info.data["format"]).group_sizes if "format" in info.data else ()
        if size is not None and sizes and size not in sizes:
            raise ValueError(f"kernels have no such size; choose from {', '.join(map(str, sizes))}")
        return size

    @model_validator(mode="after")
    def _suits_its_format(self) -> Quantize:
        from slimserve.compress.formats import get_format

        quant_format = get_format(self.format)
        if quant_format.has_fixed_rounding:
            fixed = {"symmetric", "group_size", "scales", "order", "sweeps", "damping", "smoothquant", "awq"}
            given = (fixed & self.model_fields_set) | ({"method"} if self.method != "rtn" else set())
            if given:
                raise ValueError(f"the library fixes how {self.format} rounds; leave out {', '.join(sorted(given))}")
        if self.smoothquant is not None and not quant_format.rounds_activations:
            raise ValueError(f"smoothquant needs a format that rounds activations, but {self.format} does not")
        if self.awq and quant_format.rounds_activations:
            raise ValueError(
                f"awq needs a format that keeps activations, but {self.format} rounds them; use smoothquant"
            )
        if self.head == "int8" and not quant_format.allows_int8_head:
            raise ValueError(f"head = int8 is not possible beside {self.format}")
        if self.kv_cache != "dense" and not quant_format.allows_fp8_kv_cache:
            raise ValueError(f"kv_cache = {self.kv_cache} is not possible beside {self.format}")
        return self


AnyStep = Prune | PruneDepth | Quantize


class Recipe(StrictModel):
    """Steps in the order in which they are applied."""

    summary: str
    """One line for `slimserve compress --list`."""
    calibration: Calibrate = Calibrate()
    steps: tuple[Annotated[AnyStep, Field(discriminator="step")], ...] = ()

    @model_validator(mode="after")
    def _has_valid_order(self) -> Recipe:
        if "quantize" in [step.step for step in self.steps[:-1]]:
            raise ValueError("quantize must be the last step, and there can be only one")
        if any(isinstance(step, Prune) and step.keep for step in self.steps[1:]):
            raise ValueError("a prune step with keep must be the first step: its search begins at the dense model")
        return self

    def calibrated_on(self, workloads: Sequence[str]) -> Recipe:
        """Return the recipe with these workloads as calibration source, unless it names a source of its own."""
        if "source" in self.calibration.model_fields_set or not workloads:
            return self
        calibration = self.calibration.model_copy(update={"source": ",".join(workloads)})
        return self.model_copy(update={"calibration": calibration})

    @property
    def budget(self) -> Prune | None:
        """The first step if it prunes to a budget, else None."""
        first = self.steps[0] if self.steps else None
        return first if isinstance(first, Prune) and first.keep else None


def list_recipes() -> dict[str, str]:
    """Return the summary of each built-in recipe by its name."""
    return {name: load_toml(_file_of(name), "recipe")["summary"] for name in _built_in()}


def load_recipe(argument: str, changes: Sequence[str] = ()) -> tuple[str, Recipe]:
    """Return the name and the recipe of a built-in name or of a `.toml` file.

    A change `TABLE.KEY=VALUE` sets a key of `calibration` or of the only step of that kind, as in
    `quantize.group_size=64`. The value is TOML, or else plain text. Raises UserError for a wrong name, file or key.
    """
    path = Path(argument)
    if argument in _built_in():
        path = _file_of(argument)
    elif path.suffix != ".toml" or not path.is_file():
        choices = ", ".join(_built_in())
        raise UserError("recipe", argument, "is unknown", f"choose from {choices}, or give the path of a .toml file")
    document = load_toml(path, "recipe")
    for change in changes:
        _change(document, change)
    return path.stem, validated(Recipe, document, "recipe", argument)


def _change(document: dict[str, Any], change: str) -> None:
    """Apply a change after replacing the kind of a step by its place, as `quantize.` by `steps.1.`."""
    table, dot, rest = change.partition(".")
    kinds = [step.get("step", "") for step in document.get("steps", [])]
    tables = {"calibration": "calibration"}
    tables |= {kind: f"steps.{place}" for place, kind in enumerate(kinds) if kinds.count(kind) == 1}
    if not dot or "=" not in rest or table not in tables:
        raise UserError(
            "--set",
            change,
            "names no table of the recipe" if dot and "=" in rest else "is not TABLE.KEY=VALUE",
            f"write for example {next(reversed(tables))}.KEY=VALUE; the recipe's tables: {', '.join(tables)}",
        )
    set_value(document, f"{tables[table]}.{rest}")


def _built_in() -> list[str]:
    return sorted(file.stem for file in _folder().glob("*.toml"))


def _file_of(name: str) -> Path:
    return _folder() / f"{name}.toml"


def _folder() -> Path:
    return Path(str(resources.files("slimserve.compress"))) / "recipes"
