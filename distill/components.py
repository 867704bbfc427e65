"""Parts of a training that are saved in its checkpoint: the schedule, the counters and the best weights.

Each one has `state_dict` and `load_state_dict` with plain JSON values. `StepLog` is the log file beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from slimserve.core.storage import write_atomically
from slimserve.core.text import split_lines
from slimserve.distill.batches import step_indices
from slimserve.distill.cost import Cost
from slimserve.distill.parallel import ParallelStudent
from slimserve.distill.recipe import DistillRecipe, Stage

_MIN_RATE_FRAC = 0.1
"""Learning rate at the end of a stage, as a fraction of the highest."""


class StageSchedule:
    """The position of a training in its stages, with the sequences and the learning rate of each step."""

    def __init__(self, recipe: DistillRecipe, lengths: Sequence[int]) -> None:
        """Plan all stages; `lengths` are the training sequences' numbers of tokens."""
        self._recipe = recipe
        self._lengths = lengths
        batch_size = recipe.training.batch_size
        self._num_steps = [stage.num_steps(len(lengths), batch_size) for stage in recipe.stages]
        self._stage = 0
        self._step = 0
        """Number of finished steps of the stage."""

    @property
    def stage(self) -> Stage:
        return self._recipe.stages[self._stage]

    @property
    def num_done(self) -> int:
        """Number of finished steps over all stages."""
        return sum(self._num_steps[: self._stage]) + self._step

    @property
    def total(self) -> int:
        """Number of steps of all stages."""
        return sum(self._num_steps)

    @property
    def is_stage_done(self) -> bool:
        return self._step == self._num_steps[self._stage]

    @property
    def seed(self) -> int:
        """Random seed of the next step."""
        return self._recipe.data.seed + self.num_done

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        training = self._recipe.training
        rate = self.stage.learning_rate or training.learning_rate
        return rate * rate_frac(self._step, self._num_steps[self._stage], training.warmup_frac)

    def rounds(self) -> Iterator[list[list[int]]]:
        """Yield the sequence indices of the remaining steps, grouped into rounds.

        A round of an on-policy stage has `round_steps` steps, any other round one. The caller calls `advance` after
        each step.
        """
        while self._stage < len(self._num_steps):
            stage, num_steps = self.stage, self._num_steps[self._stage]
            steps = step_indices(self._lengths, self._recipe.training.batch_size, self._recipe.data.seed + self._stage)
            remaining = islice(steps, self._step, num_steps)
            while chunk := list(islice(remaining, stage.round_steps if stage.kind == "on_policy" else 1)):
                yield chunk
            self._stage += 1
            self._step = 0

    def advance(self) -> None:
        """Count a finished step."""
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stage, self._step = state["stage"], state["step"]


@dataclass
class TrainingStats:
    """Totals of a training."""

    tokens_read: int = 0
    targets: int = 0
    flops: float = 0.0
    train_s: float = 0.0
    peak_bytes: int = 0
    """Highest memory use of one process in a step or while it sampled replies."""
    sampling: Cost = field(default_factory=Cost)
    """Cost of the replies that the student sampled."""
    teacher_cache: Cost = field(default_factory=Cost)
    """Cost of the teacher's pass for its cache."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row per validation."""

    @property
    def training(self) -> Cost:
        """Cost of the steps."""
        return Cost(self.train_s, self.tokens_read, self.flops)

    @property
    def total(self) -> Cost:
        """Cost of steps, sampled replies and the teacher's cache together."""
        return self.training + self.sampling + self.teacher_cache

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, Cost(**value) if isinstance(getattr(self, name), Cost) else value)


class BestWeights:
    """Remembers the lowest validation loss and, if the recipe keeps the best weights, saves those weights to a file."""

    def __init__(self, student: ParallelStudent, folder: Path, is_saving: bool) -> None:
        self._student = student
        self._file = folder / "best.safetensors"
        self._is_saving = is_saving
        self.loss: float | None = None
        """Lowest validation loss, or None before the first validation."""
        self.step = 0
        """Step of that loss, counted over all stages."""

    def update(self, loss: float, step: int) -> None:
        """Record a validation loss, and save the weights if it is the lowest."""
        if self.loss is not None and loss >= self.loss:
            return
        self.loss, self.step = loss, step
        if self._is_saving:
            weights = self._student.trained_weights()
            if self._student.is_first:
                partial = self._file.with_name(f".{self._file.name}.partial")
                save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, partial)
                partial.rename(self._file)

    def restore(self, last_step: int) -> bool:
        """Load the saved weights into the student unless they are those of the last step; tell whether it did."""
        is_needed = self._is_saving and self.step != last_step and self._file.is_file()
        if is_needed:
            self._student.load_weights(load_file(self._file))
        return is_needed

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss, self.step = state["loss"], state["step"]


class StepLog:
    """The JSONL log with one row per step."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def append(self, row: Mapping[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def drop_after(self, step: int) -> None:
        """Delete rows after `step`, which a resumed run writes again."""
        if self._file.is_file():
            rows = split_lines(self._file.read_text(encoding="utf-8"), keepends=True)
            write_atomically(
                self._file, "".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step)
            )


def rate_frac(step: int, num_steps: int, warmup_frac: float) -> float:
    """Return the learning rate of a step as a fraction of the highest: a linear warm-up, then a cosine to a tenth."""
    warmup = warmup_frac * num_steps
    if step + 1 <= warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1.0, num_steps - warmup)
    return _MIN_RATE_FRAC + (1 - _MIN_RATE_FRAC) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
