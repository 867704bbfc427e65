"""The training loop.

    for each stage, for each step:
        the step's sequences, some of them perhaps written by the student just now
        for each micro-batch: teacher, student, loss / targets of the whole step, backward
        clip, AdamW, next learning rate
        now and then: validation on whole sequences, a state to go on from

Weights, optimizer and loss are float32, products bfloat16 unless asked otherwise. One process on a CPU or GPU, or as
many as `accelerate launch` starts, with DDP or FSDP as its configuration says; the outcome does not depend on how many.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from slimserve.core.errors import UserError
from slimserve.core.progress import ProgressCallback, print_status, progress
from slimserve.core.storage import write_atomically, write_remedy
from slimserve.distill.batches import Batch, make_batches, step_numbers
from slimserve.distill.cost import ModelShape, PeakMemory, training_flops
from slimserve.distill.losses import LossSettings
from slimserve.distill.recipe import DistillRecipe, Stage
from slimserve.distill.sampling import Sampler
from slimserve.distill.sections import Example, Section, sampled_example
from slimserve.distill.state import Progress, load_state, save_state
from slimserve.distill.student import Guidance, OnlineTeacher, StudentLoss
from slimserve.distill.supervision import Supervised, Supervision

_LEAST_RATE_FRAC = 0.1
"""Of the highest learning rate, at a stage's end."""
_BETAS = (0.9, 0.95)
BEST_FILE = "best.safetensors"


class Teacher(Protocol):
    """Whoever says what a batch's next tokens should be."""

    def guide(self, batch: Batch) -> Guidance: ...


@dataclass
class Job:
    """All that a training needs."""

    student: nn.Module
    recipe: DistillRecipe
    training: Sequence[Example]
    validation: Sequence[Example]
    folder: Path
    """For state, best weights and logs."""
    key: str
    """Of all that decides the outcome: a state of another key is not gone on from."""
    tokenizer: Any = None
    online: OnlineTeacher | None = None
    cached: Teacher | None = None
    """Instead of `online` where the loss has a top_k."""
    sampler: Sampler | None = None
    judge: Callable[[nn.Module], Mapping[str, float]] | None = None
    """More figures of a validation."""
    bad_batch: Path | None = None
    """Where the names of a step's sequences go whose loss is not finite."""
    peak_flops: float | None = None
    """FLOP/s that the machine could do, for the progress line."""


@dataclass
class Outcome:
    """What a training came to, and what it cost."""

    progress: Progress
    num_steps: int
    seconds: float
    """Of this call."""
    weights: dict[str, Tensor] | None = None
    """The student's, where FSDP has divided them over processes: whole on the first one."""


@dataclass(frozen=True)
class _Work:
    """One forward and backward pass."""

    batch: Batch
    teacher: Teacher | None
    settings: LossSettings
    weight: float = 1.0
    """0 where a process has nothing left to do but must keep step with the others."""


def train(job: Job) -> Outcome:
    """Train `job.student` in place through all stages, from where a state of the same key stands.

    Afterwards the student, or under FSDP the outcome, holds the best or the last weights, as the recipe says. Raises
    UserError where the loss is not finite, after the names of the step's sequences were written to `job.bad_batch`, and
    where nothing is left to learn.
    """
    begun = time.monotonic()
    loop = _Loop(job)
    try:
        loop.run()
    except (OSError, SafetensorError) as error:
        raise UserError(
            "work folder",
            job.folder,
            f"could not be written ({getattr(error, 'strerror', None) or error})",
            f"{write_remedy(error)} and run the same command again: it goes on from the last whole state",
        ) from error
    return Outcome(loop.progress, sum(loop.lengths), time.monotonic() - begun, loop.divided_weights())


class _Loop:
    """The state of one training."""

    def __init__(self, job: Job) -> None:
        from accelerate import Accelerator

        self.job = job
        training, loss = job.recipe.training, job.recipe.loss
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if training.batch_size < self.world:
            raise UserError(
                "training.batch_size", training.batch_size, f"is less than {self.world} processes", "raise it"
            )
        self.device = self.accelerator.device
        if training.checkpointing:
            student: Any = job.student
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        teacher_config: Any = job.online.model.config if job.online else None
        module = StudentLoss(job.student, loss.hidden, teacher_config)
        self.shape = ModelShape.of(module.student.config.to_dict())
        self.teacher_shape = ModelShape.of(teacher_config.to_dict()) if teacher_config and not job.cached else None
        if job.online:
            job.online.model.to(self.device)
        self.module, self.optimizer = self.accelerator.prepare(module, _optimizer(module, training.weight_decay))
        self.check_sharding()
        supervision = job.recipe.supervision.supervision
        self.sequences = supervision.apply_all(job.training)
        # Whole sequences and all sections, whatever is learnt: losses of different recipes are of the same tokens.
        self.whole = Supervision().apply_all(job.validation) if job.validation else []
        stages = job.recipe.stages
        self.lengths = [stage.num_steps(len(self.sequences), training.batch_size) for stage in stages]
        self.memory = PeakMemory(self.device.type == "cuda")
        found = load_state(job.folder, self.module, self.optimizer, job.key)
        self.progress = found or Progress(job.key)
        self.forget_later_steps()
        if found:
            print_status(f"resumed at step {sum(self.lengths[: found.stage]) + found.step} of {sum(self.lengths)}")
        self.saved_s = time.monotonic()

    def check_sharding(self) -> None:
        if isinstance(self.module, FullyShardedDataParallel):
            raise UserError("fsdp_version", 1, "is not supported", "set it to 2 in the configuration of accelerate")
        is_on_policy = any(stage.kind == "on_policy" for stage in self.job.recipe.stages)
        if isinstance(self.module, FSDPModule) and is_on_policy:
            raise UserError(
                "stages",
                "on_policy",
                "cannot be run under FSDP, whose processes would have to write equally many tokens",
                "use DDP for it",
            )

    @contextmanager
    def callable_student(self) -> Iterator[nn.Module]:
        """The student by itself; under FSDP, what lies outside its blocks is gathered for so long."""
        unwrapped: Any = self.accelerator.unwrap_model(self.module)
        if isinstance(self.module, FSDPModule):
            self.module.unshard()
        try:
            with self.autocast:
                yield unwrapped.student
        finally:
            if isinstance(self.module, FSDPModule):
                self.module.reshard()

    def divided_weights(self) -> dict[str, Tensor] | None:
        if not isinstance(self.module, FSDPModule):
            return None
        weights = get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {
            name.removeprefix("student."): tensor for name, tensor in weights.items() if name.startswith("student.")
        }

    def forget_later_steps(self) -> None:
        """Take rows off the log that a resumed run will write again."""
        file = self.job.folder / "steps.jsonl"
        if self.is_first and file.is_file():
            rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= self.done]
            write_atomically(file, "".join(kept))

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        if self.job.recipe.training.precision == "bf16":
            return cast("AbstractContextManager[Any]", torch.autocast(self.device.type, dtype=torch.bfloat16))
        return nullcontext()

    @property
    def is_first(self) -> bool:
        return bool(self.rank == 0)

    @property
    def done(self) -> int:
        """Steps of all stages so far."""
        return sum(self.lengths[: self.progress.stage]) + self.progress.step

    def run(self) -> None:
        total = sum(self.lengths)
        self.job.folder.mkdir(parents=True, exist_ok=True)
        if not self.done:
            self.validate()
        with progress("distill", total, "steps") as tick:
            while self.progress.stage < len(self.lengths):
                stage = self.job.recipe.stages[self.progress.stage]
                self.run_stage(stage, self.lengths[self.progress.stage], tick)
                self.progress.stage += 1
                self.progress.step = 0
                self.save()
        self.keep_weights()

    def run_stage(self, stage: Stage, num_steps: int, tick: ProgressCallback) -> None:
        training = self.job.recipe.training
        rate = stage.learning_rate or training.learning_rate
        lengths = [len(sequence.tokens) for sequence in self.sequences]
        seed = self.job.recipe.data.seed + self.progress.stage
        steps: Iterator[list[int]] = islice(
            step_numbers(lengths, training.batch_size, seed), self.progress.step, num_steps
        )
        is_on_policy = stage.kind == "on_policy"
        while round_of := list(islice(steps, stage.round_steps if is_on_policy else 1)):
            written = self.write_replies(stage, round_of) if is_on_policy else {}
            for numbers in round_of:
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * rate_frac(self.progress.step, num_steps, training.warmup_frac)
                self.step(numbers, [written[number] for number in numbers if number in written], tick)
                self.progress.step += 1
                is_last = self.progress.step == num_steps
                if is_last or self.done % training.validate_every == 0:
                    self.validate()
            if time.monotonic() - self.saved_s >= training.save_every_s:
                self.save()

    def step(self, numbers: Sequence[int], written: Sequence[Supervised], tick: ProgressCallback) -> None:
        """One optimizer step on given sequences of these numbers, but those for which the student wrote a reply."""
        begun = time.monotonic()
        torch.manual_seed(self.job.recipe.data.seed + self.done)
        self.memory.reset()
        works = self.works(numbers, written)
        num_targets = self.sum_over_processes(sum(work.batch.num_targets * work.weight for work in works))
        sums = torch.zeros(3, dtype=torch.float64)
        flops, tokens = 0.0, 0
        for number, work in enumerate(works):
            batch = work.batch.to(self.device)
            is_last = number == len(works) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.module):
                guidance = work.teacher.guide(batch) if work.teacher else Guidance()
                with self.autocast:
                    losses = self.module(batch, guidance, work.settings)
                # Gradients are averaged over processes, so that each divides by its share of all targets.
                self.accelerator.backward(losses.total * (work.weight * self.world / max(num_targets, 1.0)))
            sums += torch.stack([one.detach().double().cpu() * work.weight for one in losses])
            flops += work.weight * training_flops(
                self.shape,
                self.teacher_shape if work.teacher else None,
                batch.lengths,
                batch.num_targets,
                is_checkpointed=self.job.recipe.training.checkpointing,
            )
            tokens += round(work.weight * sum(batch.lengths))
        means = [self.sum_over_processes(float(value)) / max(num_targets, 1.0) for value in sums]
        found: Tensor = self.accelerator.clip_grad_norm_(self.module.parameters(), self.job.recipe.training.clip_norm)
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        if not (math.isfinite(means[0]) and math.isfinite(norm)):
            self.stop_at_bad_loss(works, means, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.note(begun, tick, means, norm, tokens, num_targets, flops)

    def works(self, numbers: Sequence[int], written: Sequence[Supervised]) -> list[_Work]:
        """This process's share of a step, as many passes as every other process has."""
        training, loss = self.job.recipe.training, self.job.recipe.loss
        teacher: Teacher | None = None
        if loss.kd_weight:
            teacher = self.job.cached or self.job.online
        own = {one.name for one in written}
        given = [number for number in numbers if self.sequences[number].name not in own]

        only_divergence = replace(loss.settings, kd_weight=1.0)

        def share_of(rank: int) -> list[_Work]:
            parts = []
            for sequences, chosen, settings, guide in (
                (self.sequences, given[rank :: self.world], loss.settings, teacher),
                (written, range(rank, len(written), self.world), only_divergence, self.job.online),
            ):
                batches = make_batches(sequences, chosen, training.micro_batch_tokens, is_packed=training.packed)
                parts += [_Work(batch, guide, settings) for batch in batches]
            return parts

        shares = [share_of(rank) for rank in range(self.world)]
        own_share = shares[self.rank]
        num_passes = max(map(len, shares))
        spare = own_share[-1] if own_share else next(share[0] for share in shares if share)
        return own_share + [replace(spare, weight=0.0)] * (num_passes - len(own_share))

    def write_replies(self, stage: Stage, round_of: Sequence[Sequence[int]]) -> dict[int, Supervised]:
        """By sequence number, what the student wrote for some of a round's prompts; those without a target are not."""
        assert self.job.sampler is not None
        # A reply is as long as it is: nothing is cut off it.
        whole = replace(self.job.recipe.supervision.supervision, lead_span=1.0)
        by_name = {example.name: example for example in self.job.training}
        seed = self.job.recipe.data.seed + self.done
        chosen = []
        for place, numbers in enumerate(round_of):
            asked = [number for number in numbers if by_name[self.sequences[number].name].num_prompt]
            num_written = min(len(asked), max(1, round(stage.fraction * len(numbers))))
            # A step's sequences are sorted by length, so the first ones would always be the shortest.
            chosen += random.Random(f"{seed} {place}").sample(asked, num_written)
        if not chosen:
            raise UserError(
                "stages", "on_policy", "has no prompt that a reply could be written to", "give data of conversations"
            )
        examples = [by_name[self.sequences[number].name] for number in chosen]
        prompts = [example.tokens[: example.num_prompt] for example in examples]
        mine = range(self.rank, len(prompts), self.world)
        with self.callable_student() as student:
            replies = self.job.sampler(student, [prompts[index] for index in mine], stage.sampling, seed + self.rank)
        gathered: list[tuple[int, list[int]]] = list(zip(mine, replies, strict=True))
        if self.world > 1:
            from accelerate.utils import gather_object

            gathered = gather_object(gathered)
        found = {}
        for index, reply in gathered:
            example = sampled_example(self.job.tokenizer, examples[index].name, prompts[index], reply)
            supervised = whole.apply(example)
            # Its prompt is given text, which the other sequences teach.
            targets = tuple(place for place in supervised.targets if place >= example.num_prompt)
            if targets:
                found[chosen[index]] = replace(supervised, targets=targets)
        return found

    @torch.no_grad()
    def validate(self) -> None:
        """Mean loss over whole sequences; the best so far is kept, and a row added to the history."""
        if not self.whole:
            return
        begun = time.monotonic()
        self.module.eval()
        loss = self.job.recipe.loss
        # A cache knows the training sequences only; the teacher itself is asked here.
        teacher = self.job.online if loss.kd_weight else None
        losses: list[Tensor] = []
        sections: list[Section] = []
        for batch in make_batches(self.whole, range(len(self.whole)), self.job.recipe.training.micro_batch_tokens):
            placed = batch.to(self.device)
            guidance = teacher.guide(placed) if teacher else Guidance()
            with self.autocast:
                losses.append(self.module(placed, guidance, loss.settings, is_measuring=True).double().cpu())
            for number in batch.numbers:
                own = self.job.validation[number].sections
                sections += [own[place] for place in self.whole[number].targets]
        row: dict[str, Any] = {"step": self.done}
        row |= _means(torch.cat(losses, dim=1), sections, self.job.recipe.supervision.supervision.sections)
        if self.job.judge:
            with self.callable_student() as student:
                row |= self.job.judge(student)
        row |= {"tokens_read": self.progress.tokens_read, "train_s": self.progress.train_s}
        self.progress.history.append(row)
        self.module.train()
        figures = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
        if self.is_first:
            print_status(f"step {self.done}, validation in {time.monotonic() - begun:.0f} s: {figures}")
        if self.progress.best_loss is None or row["loss"] < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = row["loss"], self.done
            if self.job.recipe.training.keep == "best":
                self.keep_best()

    def keep_best(self) -> None:
        """The weights as they are now, in a file that is whole or not there."""
        weights = get_model_state_dict(
            self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        )
        if not self.is_first:
            return
        partial = self.job.folder / f".{BEST_FILE}.partial"
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, partial)
        partial.rename(self.job.folder / BEST_FILE)

    def keep_weights(self) -> None:
        """Let the student hold what the recipe keeps."""
        file = self.job.folder / BEST_FILE
        if self.job.recipe.training.keep == "best" and self.progress.best_step != self.done and file.is_file():
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
            set_model_state_dict(self.module, load_file(file), options=options)
            print_status(f"weights of step {self.progress.best_step}, which had the least validation loss")

    def save(self) -> None:
        save_state(self.job.folder, self.module, self.optimizer, self.progress)
        self.saved_s = time.monotonic()

    def note(
        self,
        begun: float,
        tick: ProgressCallback,
        means: Sequence[float],
        norm: float,
        tokens: int,
        num_targets: float,
        flops: float,
    ) -> None:
        """Count a step that is done, log it, and show it."""
        seconds = time.monotonic() - begun
        where = self.progress
        where.tokens_read += round(self.sum_over_processes(tokens))
        where.targets += round(num_targets)
        where.flops += self.sum_over_processes(flops)
        where.train_s += seconds
        where.peak_bytes = max(where.peak_bytes, self.memory.peak_bytes())
        achieved = flops / seconds
        share = f", {achieved / self.job.peak_flops:.0%} of peak" if self.job.peak_flops else ""
        tick(
            self.done + 1,
            f"loss {means[0]:.4f}, {tokens / seconds:.0f} tokens/s, {achieved / 1e9:.0f} GFLOP/s{share}",
        )
        if self.is_first:
            row = {
                "step": self.done + 1,
                "loss": means[0],
                "divergence": means[1],
                "cross_entropy": means[2],
                "gradient_norm": norm,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "targets": num_targets,
                "tokens": tokens,
                "seconds": seconds,
                "flops": flops,
            }
            with (self.job.folder / "steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def stop_at_bad_loss(self, works: Sequence[_Work], means: Sequence[float], norm: float) -> None:
        names = [name for work in works for name in work.batch.names]
        file = self.job.bad_batch or self.job.folder / "bad-batch.json"
        told = {"step": self.done + 1, "loss": str(means[0]), "gradient_norm": str(norm), "sequences": names}
        if self.is_first:
            write_atomically(file, json.dumps(told, indent=2) + "\n")
        raise UserError(
            "loss",
            means[0] if not math.isfinite(means[0]) else f"with a gradient of {norm}",
            f"is not finite at step {self.done + 1}",
            f"lower the learning rate, or look at the sequences that {file} names",
        )

    def sum_over_processes(self, value: float) -> float:
        if self.world == 1:
            return value
        total: Tensor = self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.device))
        return float(total)


def _means(losses_3N: Tensor, sections: Sequence[Section], chosen: Collection[Section]) -> dict[str, float]:
    """Mean loss, divergence and cross-entropy over the chosen sections' targets, and the last two of every section."""

    def mean(of: Collection[Section]) -> Tensor:
        return losses_3N[:, [number for number, section in enumerate(sections) if section in of]].mean(1)

    row = dict(zip(("loss", "divergence", "cross_entropy"), mean(chosen).tolist(), strict=True))
    for section in sorted(set(sections)):
        _, divergence, cross_entropy = mean({section}).tolist()
        row |= {
            f"divergence_{section.name.lower()}": divergence,
            f"cross_entropy_{section.name.lower()}": cross_entropy,
        }
    return row


def rate_frac(step: int, num_steps: int, warmup_frac: float) -> float:
    """Share of the highest learning rate at a step: up evenly through the warm-up, then a cosine down to a tenth."""
    warmup = warmup_frac * num_steps
    if step + 1 <= warmup:
        return (step + 1) / warmup
    left = (step - warmup) / max(1.0, num_steps - warmup)
    return _LEAST_RATE_FRAC + (1 - _LEAST_RATE_FRAC) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, left))))


def _optimizer(module: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW in which norms and biases do not decay."""
    learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in learnt if parameter.ndim > 1]
    others = [parameter for parameter in learnt if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=_BETAS, fused=True)
