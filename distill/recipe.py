"""What a student is made with: strict settings from a TOML file, from options, or both."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from slimserve.core.config import StrictModel, invalid_key_error
from slimserve.core.errors import UserError
from slimserve.distill.losses import Divergence, LossSettings
from slimserve.distill.sampling import SamplingSettings
from slimserve.distill.student import HiddenSettings
from slimserve.distill.supervision import Supervision, Window, parse_sections


class Data(StrictModel):
    """What is learnt from."""

    source: str = "reasoning"
    """A workload, or a .jsonl file of conversations."""
    num_examples: int = Field(default=1000, ge=1)
    num_validation: int = Field(default=64, ge=0)
    max_tokens: int = Field(default=2048, ge=2)
    """Of a sequence; what is longer is cut on the right."""
    seed: int = 42


class Supervise(StrictModel):
    """What of a sequence is learnt."""

    sections: str = "all"
    """`all`, or some of prompt, cot, answer joined by +."""
    lead_span: float = Field(default=1.0, gt=0, le=1)
    """Share of each sequence that both models read."""
    window: Window = "left"
    """Which share."""

    @field_validator("sections")
    @classmethod
    def _are_sections(cls, text: str) -> str:
        try:
            parse_sections(text)
        except UserError as error:
            raise ValueError(str(error)) from error
        return text

    @property
    def supervision(self) -> Supervision:
        return Supervision(parse_sections(self.sections), self.lead_span, self.window)


class Loss(StrictModel):
    """How student and teacher are compared; see distill/losses.py."""

    divergence: Divergence = "forward_kl"
    kd_weight: float = Field(default=0.5, ge=0, le=1)
    """Of the divergence; the rest is cross-entropy on the text. 0 is plain fine-tuning."""
    temperature: float = Field(default=1.0, gt=0)
    skew: float = Field(default=0.1, ge=0, le=1)
    beta: float = Field(default=0.5, gt=0, lt=1)
    top_k: int = Field(default=0, ge=0)
    """Keep so many of the teacher's likeliest tokens on disk instead of running it at every step; 0: run it."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Of the distance between hidden states, for students cut out of their teacher."""
    hidden_kind: Literal["cosine", "mse"] = "cosine"
    hidden_pairs: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _hidden_needs_states(self) -> Loss:
        if self.hidden_weight and (self.top_k or not self.kd_weight):
            raise ValueError("hidden_weight needs a teacher that runs: set kd_weight above 0 and top_k to 0")
        return self

    @property
    def settings(self) -> LossSettings:
        return LossSettings(self.divergence, self.kd_weight, self.temperature, self.skew, self.beta)

    @property
    def hidden(self) -> HiddenSettings:
        return HiddenSettings(self.hidden_weight, self.hidden_kind, self.hidden_pairs)


class Training(StrictModel):
    """How the loop runs."""

    learning_rate: float = Field(default=2e-5, gt=0)
    """The highest, after the warm-up; a cosine takes it to a tenth at the end of the stage."""
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_frac: float = Field(default=0.1, ge=0, lt=1)
    batch_size: int = Field(default=8, ge=1)
    """Sequences of a step, over all processes."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Of one forward pass; more is accumulated, which does not change the outcome."""
    packed: bool = False
    """Lay sequences end to end instead of padding them."""
    clip_norm: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "float32"] = "bf16"
    """Of products; weights and optimizer are float32."""
    checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them."""
    lora_rank: int = Field(default=0, ge=0)
    """Train low-rank additions to every linear layer of the blocks, merged when saved; 0: all weights."""
    validate_every: int = Field(default=50, ge=1)
    """Steps."""
    save_every_s: float = Field(default=300, ge=0)
    """Seconds between states that a killed run goes on from."""
    keep: Literal["best", "last"] = "best"
    """Which weights become the student: those of least validation loss, or the last ones."""


class Stage(StrictModel):
    """A part of the training with data of its own."""

    kind: Literal["off_policy", "on_policy"] = "off_policy"
    """Learn from the given text, or also from what the student writes."""
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    """Instead of training.learning_rate."""
    fraction: float = Field(default=0.5, gt=0, le=1)
    """on_policy: share of each step's sequences that the student writes; only the divergence is learnt from them."""
    temperature: float = Field(default=0.8, gt=0)
    max_new_tokens: int = Field(default=300, ge=1)
    round_steps: int = Field(default=1, ge=1)
    """on_policy: steps for which the student writes at once; more is faster and a little less on-policy."""

    @model_validator(mode="after")
    def _has_one_length(self) -> Stage:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    def num_steps(self, num_examples: int, batch_size: int) -> int:
        """Optimizer steps; two epochs unless the stage says otherwise."""
        per_epoch = -(-num_examples // batch_size)
        return self.steps or max(1, round((self.epochs or 2.0) * per_epoch))

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(self.temperature, self.max_new_tokens)


class DistillRecipe(StrictModel):
    """Everything but the models."""

    summary: str = ""
    data: Data = Data()
    supervision: Supervise = Supervise()
    loss: Loss = Loss()
    training: Training = Training()
    stages: tuple[Stage, ...] = (Stage(),)

    @model_validator(mode="after")
    def _stages_fit(self) -> DistillRecipe:
        if not self.stages:
            raise ValueError("give at least one stage")
        if any(stage.kind == "on_policy" for stage in self.stages) and (self.loss.top_k or not self.loss.kd_weight):
            raise ValueError("an on_policy stage needs a teacher that runs: set kd_weight above 0 and top_k to 0")
        return self


def load_distill_recipe(file: Path | None, settings: Sequence[str], options: Mapping[str, Any]) -> DistillRecipe:
    """A recipe from a TOML file (None: the defaults), with `table.key=value` settings and options on top.

    `options` are given by the same dotted keys; those that are None were not given. UserError names the key.
    """
    raw: dict[str, Any] = {}
    if file is not None:
        try:
            raw = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError("recipe", file, f"cannot be read ({error})", "give the path of a TOML file") from error
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError("--set", setting, "is not KEY=VALUE", "write for example training.batch_size=4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        _put(raw, key.strip(), value, setting)
    for key, value in options.items():
        if value is not None:
            _put(raw, key, value, key)
    return parse_distill_recipe(raw, str(file or "options"))


def parse_distill_recipe(raw: Mapping[str, Any], origin: str) -> DistillRecipe:
    """A recipe from plain data; UserError names the key that is refused."""
    try:
        return DistillRecipe.model_validate(raw)
    except ValidationError as error:
        raise invalid_key_error("recipe", error, "stages", origin) from error


def _put(raw: dict[str, Any], key: str, value: Any, given: str) -> None:
    """Set `table.key`, or `stages.0.key`, making what is missing on the way."""
    *path, last = key.split(".")
    place: Any = raw
    for part in path:
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise UserError("--set", given, f"names stage {part}, which is not there", "number them from 0")
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.setdefault(part, [{}] if part == "stages" else {})
    if not isinstance(place, dict):
        raise UserError("--set", given, "names no key of a table", "write for example stages.0.steps=100")
    place[last] = value
