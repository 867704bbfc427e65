"""The trainer.

    for each round of steps:
        on-policy stages: the student samples replies to some of the prompts
        for each step:
            for each micro-batch: teacher, student, loss / targets of the full step, backward
            clip the gradient, AdamW
            every `validate_every` steps: validation on full sequences
        every `save_every_s` seconds: a checkpoint of all components

Weights, optimizer and loss are float32; products are bfloat16 unless the recipe says otherwise. The result does not
depend on the number of processes that `accelerate launch` starts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from slimserve.core.errors import UserError
from slimserve.core.progress import ProgressCallback, print_status, progress
from slimserve.core.storage import write_atomically
from slimserve.distill.batches import Batch, make_batches
from slimserve.distill.components import BestWeights, StageSchedule, StepLog, TrainingStats
from slimserve.distill.cost import Cost, ModelShape, PeakMemory, training_flops
from slimserve.distill.parallel import ParallelStudent
from slimserve.distill.recipe import DistillRecipe, LossSettings
from slimserve.distill.sampling import ReplyWriter, Sampler
from slimserve.distill.sections import Example
from slimserve.distill.state import load_state, save_state, write_error
from slimserve.distill.student import OnlineTeacher, StudentLoss, TeacherModel, TeacherOutput
from slimserve.distill.supervision import SupervisedSequence
from slimserve.distill.teacher_cache import CachedTeacher
from slimserve.distill.validation import Validator

STEP_LOG = "steps.jsonl"
"""Log in the work folder with one row per step."""


@dataclass
class TrainingJob:
    """Everything that a training needs."""

    student: nn.Module
    recipe: DistillRecipe
    training: Sequence[Example]
    validation: Sequence[Example]
    folder: Path
    """Work folder for checkpoints, best weights and logs."""
    key: str
    """Hash of everything that determines the result; a checkpoint with another key is ignored."""
    tokenizer: Any = None
    online: OnlineTeacher | None = None
    cached: CachedTeacher | None = None
    """Replaces `online` on given text if the loss has a top_k."""
    cached_validation: CachedTeacher | None = None
    """Cache of the validation sequences, if the teacher is served."""
    sampler: Sampler | None = None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    """Returns further metrics of a validation."""
    bad_batch_file: Path | None = None
    """File for the names of a step's sequences if its loss is not finite."""
    peak_flops: float | None = None
    """Peak FLOP/s of the machine, for the progress line."""

    @property
    def teacher(self) -> TeacherModel | None:
        """Teacher of the given text; None for plain fine-tuning."""
        return (self.cached or self.online) if self.recipe.loss.kd_weight else None


@dataclass
class TrainingResult:
    """The result and the cost of a training."""

    num_steps: int
    stats: TrainingStats
    best_loss: float | None
    best_step: int
    weights: dict[str, Tensor] | None = None
    """The student's weights if FSDP has sharded them, complete on the first process."""


@dataclass(frozen=True)
class _MicroBatch:
    """One forward and backward pass."""

    batch: Batch
    teacher: TeacherModel | None
    loss: LossSettings
    weight: float = 1.0
    """0 for a process that has no more work but must take part in the exchange of gradients."""


@dataclass
class _StepTotals:
    """Sums over the micro-batches of this process in a step."""

    losses_3: Tensor
    tokens: int = 0
    flops: float = 0.0


def train(job: TrainingJob) -> TrainingResult:
    """Train `job.student` in place through all stages, from the last checkpoint with the same key if there is one.

    Afterwards the student, or under FSDP the result, holds the best or the last weights, as the recipe says. Raises
    UserError if nothing is left to train on, if the work folder cannot be written, and if the loss is not finite; the
    names of that step's sequences are then in `job.bad_batch_file`.
    """
    try:
        return Trainer(job).run()
    except (OSError, SafetensorError) as error:
        raise write_error("work folder", job.folder, error) from error


class Trainer:
    """Runs one training; `components` are saved in its checkpoints."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        recipe = job.recipe
        if recipe.training.checkpointing:
            student: Any = job.student
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = StudentLoss(job.student, recipe.loss, job.online.config if job.online else None)
        self.shape = ModelShape.of(module.student.config.to_dict(), recipe.training.lora_rank)
        self.student = ParallelStudent(module, recipe)
        if job.online:
            job.online.to(self.student.device)
        self.sequences = recipe.supervision.apply_all(job.training)
        self.schedule = StageSchedule(recipe, [len(sequence.tokens) for sequence in self.sequences])
        self.stats = TrainingStats(teacher_cache=job.cached.cost if job.cached else Cost())
        self.best = BestWeights(self.student, job.folder, is_saving=recipe.training.keep == "best")
        self.components = {"schedule": self.schedule, "stats": self.stats, "best": self.best}
        self.validator = Validator(
            self.student, recipe, job.validation, job.cached_validation or job.online, job.evaluate
        )
        self.replies = ReplyWriter(
            self.student, recipe, job.training, self.sequences, job.sampler, job.tokenizer, self.shape
        )
        self.memory = PeakMemory(self.student.device.type == "cuda")
        self.log = StepLog(job.folder / STEP_LOG)

    def run(self) -> TrainingResult:
        self.job.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        if not self.schedule.num_done:
            self.validate()
        training = self.job.recipe.training
        saved = time.monotonic()
        with progress("distill", self.schedule.total, "steps") as tick:
            for steps in self.schedule.rounds():
                replies = self.write_replies(steps)
                for indices in steps:
                    self.step(indices, [replies[index] for index in indices if index in replies], tick)
                    self.schedule.advance()
                    if self.schedule.is_stage_done or self.schedule.num_done % training.validate_every == 0:
                        self.validate()
                if self.schedule.is_stage_done or time.monotonic() - saved >= training.save_every_s:
                    save_state(
                        self.job.folder, self.job.key, self.student.module, self.student.optimizer, self.components
                    )
                    saved = time.monotonic()
        if self.best.restore(self.schedule.total):
            print_status(f"kept the weights of step {self.best.step}, which had the lowest validation loss")
        return TrainingResult(
            self.schedule.total, self.stats, self.best.loss, self.best.step, self.student.gathered_student()
        )

    def resume(self) -> None:
        """Restore the last checkpoint of this job, if there is one."""
        student = self.student
        if load_state(self.job.folder, self.job.key, student.module, student.optimizer, self.components):
            print_status(f"resumed at step {self.schedule.num_done} of {self.schedule.total}")
        if student.is_first:
            self.log.drop_after(self.schedule.num_done)

    def write_replies(self, steps: Sequence[Sequence[int]]) -> dict[int, SupervisedSequence]:
        """Return the student's replies of an on-policy round by sequence index, and count their cost."""
        self.memory.reset()
        replies, cost = self.replies.write(steps, self.schedule.stage, self.schedule.seed)
        self.stats.sampling += cost
        self.stats.peak_bytes = max(self.stats.peak_bytes, self.memory.peak_bytes())
        return replies

    def step(self, indices: Sequence[int], replies: Sequence[SupervisedSequence], tick: ProgressCallback) -> None:
        """Run one optimizer step on the sequences at `indices`; a sampled reply replaces the sequence of its name."""
        begun = time.monotonic()
        student = self.student
        torch.manual_seed(self.schedule.seed)
        self.memory.reset()
        for group in student.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * group["rate_factor"]
        micro_batches = self.micro_batches(indices, replies)
        num_targets = student.sum(sum(one.batch.num_targets * one.weight for one in micro_batches))
        totals = _StepTotals(torch.zeros(3, dtype=torch.float64))
        for number, micro_batch in enumerate(micro_batches, start=1):
            with nullcontext() if number == len(micro_batches) else student.accumulate():
                self.forward_backward(micro_batch, num_targets, totals)
        means = [student.sum(float(value)) / max(num_targets, 1.0) for value in totals.losses_3]
        norm = student.clip_gradient(self.job.recipe.training.clip_norm)
        if not (math.isfinite(means[0]) and math.isfinite(norm)):
            self.stop_at_bad_loss(micro_batches, means[0], norm)
        student.optimizer.step()
        student.optimizer.zero_grad()
        self.record(begun, means, norm, num_targets, totals, tick)

    def forward_backward(self, micro_batch: _MicroBatch, num_targets: float, totals: _StepTotals) -> None:
        student, weight = self.student, micro_batch.weight
        batch = micro_batch.batch.to(student.device)
        output = micro_batch.teacher.predict(batch) if micro_batch.teacher else TeacherOutput()
        with student.autocast:
            losses = student.module(batch, output, micro_batch.loss)
        # Gradients are averaged over processes, so the sum is divided by each process's share of all targets.
        student.backward(losses.total * (weight * student.num_processes / max(num_targets, 1.0)))
        totals.losses_3 += torch.stack([one.detach().double().cpu() * weight for one in losses])
        totals.tokens += round(weight * sum(batch.lengths))
        is_checkpointed = self.job.recipe.training.checkpointing
        flops = training_flops(self.shape, batch.lengths, batch.num_targets, is_checkpointed=is_checkpointed)
        totals.flops += weight * (flops + (micro_batch.teacher.flops(batch) if micro_batch.teacher else 0.0))

    def micro_batches(self, indices: Sequence[int], replies: Sequence[SupervisedSequence]) -> list[_MicroBatch]:
        """Return this process's share of a step, with as many passes as every other process has."""
        training, loss = self.job.recipe.training, self.job.recipe.loss
        replaced = {reply.name for reply in replies}
        given = [index for index in indices if self.sequences[index].name not in replaced]
        only_divergence = loss.model_copy(update={"kd_weight": 1.0})
        num_processes = self.student.num_processes

        def share_of(rank: int) -> list[_MicroBatch]:
            return [
                _MicroBatch(batch, teacher, settings)
                for sequences, chosen, settings, teacher in (
                    (self.sequences, given[rank::num_processes], loss, self.job.teacher),
                    (replies, range(rank, len(replies), num_processes), only_divergence, self.job.online),
                )
                for batch in make_batches(sequences, chosen, training.micro_batch_tokens, is_packed=training.packed)
            ]

        shares = [share_of(rank) for rank in range(num_processes)]
        own = shares[self.student.rank]
        spare = own[-1] if own else next(share[0] for share in shares if share)
        return own + [replace(spare, weight=0.0)] * (max(map(len, shares)) - len(own))

    def validate(self) -> None:
        """Measure the validation loss, and keep the weights if it is the lowest."""
        row = self.validator.measure(self.schedule.num_done)
        if row:
            row |= {"tokens_read": self.stats.tokens_read, "train_s": self.stats.train_s}
            self.stats.history.append(row)
            self.best.update(row["loss"], self.schedule.num_done)

    def record(
        self,
        begun: float,
        means: Sequence[float],
        norm: float,
        num_targets: float,
        totals: _StepTotals,
        tick: ProgressCallback,
    ) -> None:
        """Count, log and show a finished step."""
        seconds = time.monotonic() - begun
        stats = self.stats
        stats.tokens_read += round(self.student.sum(totals.tokens))
        stats.targets += round(num_targets)
        stats.flops += self.student.sum(totals.flops)
        stats.train_s += seconds
        stats.peak_bytes = max(stats.peak_bytes, self.memory.peak_bytes())
        step, achieved = self.schedule.num_done + 1, totals.flops / seconds
        share = f", {achieved / self.job.peak_flops:.0%} of peak" if self.job.peak_flops else ""
        tick(step, f"loss {means[0]:.4f}, {totals.tokens / seconds:.0f} tokens/s, {achieved / 1e9:.0f} GFLOP/s{share}")
        if self.student.is_first:
            self.log.append(
                {
                    "step": step,
                    "loss": means[0],
                    "divergence": means[1],
                    "cross_entropy": means[2],
                    "gradient_norm": norm,
                    "learning_rate": self.student.optimizer.param_groups[0]["lr"],
                    "targets": num_targets,
                    "tokens": totals.tokens,
                    "seconds": seconds,
                    "flops": totals.flops,
                }
            )

    def stop_at_bad_loss(self, micro_batches: Sequence[_MicroBatch], loss: float, norm: float) -> None:
        step = self.schedule.num_done + 1
        names = [name for one in micro_batches for name in one.batch.names]
        file = self.job.bad_batch_file or self.job.folder / "bad-batch.json"
        if self.student.is_first:
            document = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "sequences": names}
            write_atomically(file, json.dumps(document, indent=2) + "\n")
        raise UserError(
            "loss" if not math.isfinite(loss) else "gradient norm",
            loss if not math.isfinite(loss) else norm,
            f"is not finite at step {step}",
            f"lower the learning rate, or inspect the sequences that {file} names",
        )
