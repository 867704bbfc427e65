"""The distillation recipe: every setting of a training except its models, from a TOML file, `--set` and options.

This module imports no torch, so that the command line shows its help at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from slimserve.core.config import Settings, load_toml, set_value, setting, validated
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.distill.supervision import Supervision, sections_text
from slimserve.workloads import DEFAULT_TRAINING_WORKLOAD

_key = partial(setting, option="")
"""Declares a recipe key that has no command-line option of its own; `--set` reaches it."""

Divergence = Literal["forward_kl", "reverse_kl", "skewed_forward_kl", "skewed_reverse_kl", "js"]
HiddenDistance = Literal["cosine", "mse"]
LabelKind = Literal["soft", "hard"]

_FOLDER = Path(__file__).with_name("recipes")


class DataSettings(Settings):
    """The training and validation data."""

    source: str = setting(
        DEFAULT_TRAINING_WORKLOAD,
        "Training data: a workload, several joined by +, or a JSONL file with one conversation per line "
        "(default: reasoning).",
        option="--workload",
        metavar="NAME|FILE.jsonl",
    )
    num_examples: int = _key(1000, "Maximum number of training examples.", ge=1)
    num_validation: int = _key(64, "Maximum number of validation examples; 0 disables validation.", ge=0)
    max_tokens: int = _key(2048, "Maximum length of a sequence in tokens; the end of a longer one is cut off.", ge=2)
    seed: int = _key(42, "Random seed of data order, sampled replies and LoRA weights.")


class LossSettings(Settings):
    """The loss of a token: (1 - kd_weight) × cross-entropy + kd_weight × T² × divergence (distill/losses.py)."""

    divergence: Divergence = _key("forward_kl", "Divergence between the student's and the teacher's distribution.")
    kd_weight: float = _key(0.5, "Weight of the divergence; 0 is plain fine-tuning without a teacher.", ge=0, le=1)
    temperature: float = _key(1.0, "Temperature T of both distributions in the divergence.", gt=0)
    skew: float = _key(0.1, "Share α of the mixture in the skewed divergences.", ge=0, le=1)
    beta: float = _key(0.5, "Share β of the teacher in the mixture of `js`.", gt=0, lt=1)
    top_k: int = _key(
        0, "Number of the teacher's likeliest tokens to cache on disk; 0 runs the teacher in every step.", ge=0
    )
    served_model: str = _key("", "Name of a served teacher at its server; the default is the only model there.")
    teacher_instruction: str = _key(
        "", 'Instruction, such as "Be concise.", that only the teacher reads before the last user message.'
    )
    hidden_weight: float = _key(0.0, "Weight of the distance between hidden states, for pruned students.", ge=0)
    hidden_kind: HiddenDistance = _key("cosine", "Distance between hidden states.")
    hidden_pairs: int = _key(
        1, "Number of blocks whose hidden states are matched, at even depths; the last is always one of them.", ge=1
    )

    labels: LabelKind = _key(
        "soft", "Target of a ranker's labels: the probabilities that the data gives (soft), or the label in the text."
    )
    list_weight: float = _key(
        0.0, "Weight of the listwise loss at the labels of a sequence; the rest is the loss of each label.", ge=0, le=1
    )

    @model_validator(mode="after")
    def _some_losses_need_a_running_teacher(self) -> LossSettings:
        if self.hidden_weight and (self.top_k or not self.kd_weight):
            raise ValueError("hidden_weight needs a running teacher: set kd_weight above 0 and top_k to 0")
        if self.list_weight and self.top_k and self.kd_weight:
            raise ValueError("list_weight needs a running teacher or none: set top_k or kd_weight to 0")
        return self


class TrainingSettings(Settings):
    """Optimizer, batch sizes, validation and checkpoints."""

    learning_rate: float = _key(
        2e-5, "Highest learning rate, after the warm-up; a cosine lowers it to a tenth by the end of the stage.", gt=0
    )
    weight_decay: float = _key(0.05, "Weight decay of matrices; norms and biases have none.", ge=0)
    warmup_frac: float = _key(0.1, "Fraction of a stage's steps in which the learning rate rises.", ge=0, lt=1)
    batch_size: int = _key(8, "Number of sequences per step, over all processes.", ge=1)
    micro_batch_tokens: int = _key(
        4096, "Maximum number of tokens in one forward pass; it changes the memory, not the result.", ge=1
    )
    packed: bool = _key(False, "Concatenate sequences instead of padding them.")
    clip_norm: float = _key(1.0, "Maximum norm of the gradient; a larger one is scaled down.", gt=0)
    precision: Literal["auto", "bf16", "float32"] = _key(
        "auto",
        "Precision of products: bf16, or float32; auto chooses bf16 unless the CPU is slower at it. Weights and "
        "optimizer are float32.",
    )
    checkpointing: bool = _key(False, "Recompute activations in the backward pass instead of storing them.")
    lora_rank: int = _key(
        0, "Rank of LoRA adapters on every linear layer, merged when the student is saved; 0 trains all weights.", ge=0
    )
    validate_every: int = _key(50, "Number of steps between two validations.", ge=1)
    save_every_s: float = _key(300, "Seconds between two checkpoints from which a killed run resumes.", ge=0)
    keep: Literal["best", "last"] = _key("best", "Weights to keep: those with the lowest validation loss or the last.")

    @property
    def is_bf16(self) -> bool:
        """Tell whether products are in bfloat16 on this machine."""
        return self.precision == "bf16" or (self.precision == "auto" and probe_hardware().has_bf16_products)


class FurtherTeacher(Settings):
    """A teacher beside that of `--teacher`; the student imitates the mixture of their distributions."""

    model: str = _key(..., "Model to imitate as well.")
    weight: float = _key(..., "Weight of this teacher in the mixture; that of --teacher is the rest.", gt=0, lt=1)


class Stage(Settings):
    """A part of the training with its own data and length."""

    kind: Literal["off_policy", "on_policy"] = _key(
        "off_policy", "Train on given text only, or (on_policy) also on replies that the student samples."
    )
    steps: int | None = _key(None, "Number of optimizer steps.", ge=1)
    epochs: float | None = _key(
        None, "Number of passes over the training data, if `steps` is not set; default 2.", gt=0
    )
    learning_rate: float | None = _key(None, "Learning rate of this stage instead of training.learning_rate.", gt=0)
    fraction: float = _key(
        0.5,
        "on_policy: share of each step's sequences that the student samples; they train the divergence only.",
        gt=0,
        le=1,
    )
    temperature: float = _key(0.8, "on_policy: sampling temperature.", gt=0)
    max_new_tokens: int = _key(300, "on_policy: maximum number of tokens per reply.", ge=1)
    round_steps: int = _key(
        1, "on_policy: number of steps whose replies are sampled together; more is faster but less on-policy.", ge=1
    )

    @model_validator(mode="after")
    def _has_one_length(self) -> Stage:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    def num_steps(self, num_examples: int, batch_size: int) -> int:
        """Return the number of optimizer steps: `steps`, or enough for `epochs` (default 2) passes over the data."""
        per_epoch = -(-num_examples // batch_size)
        return self.steps or max(1, round((self.epochs or 2.0) * per_epoch))


class ItemSettings(Settings):
    """Items that the student learns to read as tokens of their own (distill/item_embedding.py)."""

    file: Path | None = setting(
        None,
        'Items that the student reads as tokens instead of texts, one {"id": …, "text": …} per line (default: none).',
        option="--items",
        metavar="FILE.jsonl",
    )
    tokens_per_item: int = setting(
        1, "Number of tokens that stand for an item (default: 1).", option="--tokens-per-item", ge=1
    )
    num_slots: int = _key(
        0, "Number of items that the vocabulary has room for; 0 leaves an eighth of the slots free.", ge=0
    )
    learning_rate: float = _key(
        1e-3, "Highest learning rate of the encoder and the residuals; it changes as training.learning_rate does.", gt=0
    )
    num_factors: int = _key(16, "Number of factors of an item in the matrix of users by items.", ge=1)
    num_folds: int = _key(
        10,
        "Number of parts of the training users; the sequences of a user read what the users of the other parts say of "
        "the items. 0 lets them read what all users say, the label to predict included.",
        ge=0,
    )
    shrinkage: float = _key(
        20.0, "Number of ratings at which an item keeps half of its residual; fewer keep less.", gt=0
    )
    unrated_frac: float = _key(
        0.1, "Share of the items that a step reads as if nobody had rated them, for the sake of new items.", ge=0, lt=1
    )


class DistillRecipe(Settings):
    """All settings of a training except the models."""

    summary: str = _key("", "One line about the recipe.")
    data: DataSettings = DataSettings()
    supervision: Supervision = Supervision()
    loss: LossSettings = LossSettings()
    training: TrainingSettings = TrainingSettings()
    teachers: tuple[FurtherTeacher, ...] = _key((), "Further teachers with their weights.")
    items: ItemSettings = ItemSettings()
    stages: tuple[Stage, ...] = _key((Stage(),), "Stages in their order.")

    @model_validator(mode="after")
    def _stages_fit_the_loss(self) -> DistillRecipe:
        if not self.stages:
            raise ValueError("give at least one stage")
        if self.loss.teacher_instruction and (self.supervision.window != "left" or not self.loss.kd_weight):
            remedy = 'set loss.kd_weight above 0 and supervision.window to "left"'
            raise ValueError(f"teacher_instruction needs a teacher and the left window: {remedy}")
        if self.teachers and not self.loss.kd_weight:
            raise ValueError("teachers have no effect: set loss.kd_weight above 0")
        if sum(one.weight for one in self.teachers) >= 1:
            raise ValueError("the weights of teachers must leave a rest for that of --teacher: lower them")
        if any(stage.kind == "on_policy" for stage in self.stages) and (self.loss.top_k or not self.loss.kd_weight):
            raise ValueError("an on_policy stage needs a running teacher: set kd_weight above 0 and top_k to 0")
        return self

    @model_validator(mode="after")
    def _items_fit_the_loss(self) -> DistillRecipe:
        if self.items.file is None:
            return self
        if self.loss.kd_weight and not self.loss.top_k:
            raise ValueError("a teacher reads the items' texts once, before the training: set loss.top_k, such as 8")
        if any(stage.kind == "on_policy" for stage in self.stages):
            raise ValueError("a student cannot write items, so on_policy stages and items.file do not go together")
        if self.supervision.lead_span < 1 or "prompt" in sections_text(self.supervision.section_set):
            raise ValueError('only labels of items are learned: set supervision.sections = "answer" and lead_span = 1')
        return self


def load_distill_recipe(
    file: Path | None, assignments: Sequence[str] = (), options: Mapping[str, Mapping[str, Any]] | None = None
) -> DistillRecipe:
    """Return the recipe of a TOML file (None: the defaults), changed by `table.key=value` assignments and by options.

    `file` may also be the name of a built-in recipe. `options` holds tables of keys, such as `{"data": {"source":
    "reasoning"}}`; they take precedence. Raises UserError that names an unknown recipe or the first invalid key.
    """
    document = load_toml(_recipe_file(file), "recipe") if file is not None else {}
    for assignment in assignments:
        set_value(document, assignment)
    for name, keys in (options or {}).items():
        table = document.setdefault(name, {})
        if isinstance(table, dict):
            table.update(keys)
    return validated(DistillRecipe, document, "recipe", file or "the options")


def distill_recipe_names() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def _recipe_file(file: Path) -> Path:
    """Return the file of a built-in recipe's name; any other file as it is."""
    if file.is_file() or file.suffix == ".toml":
        return file
    if str(file) not in distill_recipe_names():
        choices = ", ".join(distill_recipe_names())
        raise UserError("recipe", file, "is unknown", f"choose from {choices}, or give the path of a .toml file")
    return _FOLDER / f"{file}.toml"
