"""Makes a student: loads the models and examples, trains, and writes a directory that stock tools load.

The directory appears only when it is complete. Until then the work is in `.NAME.building` beside it, so the same
command resumes where it was killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimserve.core.device import choose_device
from slimserve.core.errors import UserError
from slimserve.core.generation import repair_generation_config
from slimserve.core.model import model_name, resolve_model
from slimserve.core.model_config import read_decoder_config
from slimserve.core.model_files import count_parameters, model_hash
from slimserve.core.openai_client import find_target
from slimserve.core.progress import print_status
from slimserve.core.roofline import load_roofline
from slimserve.core.storage import atomic_directory, building_path, check_free_space, sha256_of_files, work_folder
from slimserve.core.tokenizer import check_tokenizer, load_tokenizer
from slimserve.core.variant import BaseModelRecord, Manifest, StepRecord, read_manifest, write_manifest
from slimserve.distill.cost import Cost
from slimserve.distill.data import Examples, check_data, load_examples, source_files
from slimserve.distill.items import ItemTask, TextModel, start_items
from slimserve.distill.models import check_same_tokens, load_model, stop_tokens, with_lora
from slimserve.distill.parallel import current_device
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.sampling import Sampler, make_process_sampler
from slimserve.distill.saving import check_saving, save_student
from slimserve.distill.sections import Example
from slimserve.distill.served_teacher import make_served_cache
from slimserve.distill.state import RESUMABLE
from slimserve.distill.student import OnlineTeacher
from slimserve.distill.supervision import SupervisedSequence
from slimserve.distill.teacher_cache import CachedTeacher, make_cache
from slimserve.distill.train import STEP_LOG, TrainingJob, TrainingResult, train
from slimserve.distill.validation import make_evaluator, validation_sequences
from slimserve.workloads.interface import Prompt, ScoringPrompt

_FORMAT = 1
"""Version of the training; raise it when the same recipe makes a different student."""
_STATE_BYTES = 12
"""Bytes of a parameter in the saved state of a training."""
LOG_FILE = "training.jsonl"
"""Log in the student's directory with one row per step."""


@dataclass(frozen=True)
class _Models:
    """The models of a run: their arguments and directories."""

    student: str
    student_directory: Path
    teacher: str | None = None
    teacher_directories: tuple[Path, ...] = ()
    """Directories of `teacher` and of the recipe's further teachers."""

    @property
    def is_teacher_served(self) -> bool:
        return self.teacher is not None and not self.teacher_directories

    @cached_property
    def teacher_hashes(self) -> list[str]:
        return [model_hash(directory) for directory in self.teacher_directories]


def distill(
    student: str,
    teacher: str | None,
    recipe: DistillRecipe,
    target: Path,
    *,
    recipe_name: str = "distill",
    sampler: Sampler | None = None,
    device: str = "auto",
) -> Path:
    """Train the model `student` to imitate `teacher` (None: train on the data alone) and write it to `target`.

    The student is saved as bfloat16 with its tokenizer and a manifest of the recipe, the losses and the costs. An
    earlier student of the same models and recipe is reused, and an interrupted run resumes. `sampler` samples the
    replies of on-policy stages (None: in this process). Raises UserError if the models do not fit each other or the
    recipe, if nothing is left to train on, or if `target` holds something else.

    Every process that `accelerate launch` or torchrun started must call it; only the first one writes and logs.
    """
    from accelerate import PartialState

    # Otherwise only the first process would read weights, and FSDP distributes the student's but not the teacher's.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    chosen = choose_device(device)
    if device.startswith("cuda"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    processes = PartialState(cpu=chosen.type == "cpu")
    with nullcontext() if processes.is_main_process else redirect_stderr(io.StringIO()):
        return _distill(student, teacher, recipe, target, recipe_name, sampler, processes)


def _distill(
    student: str,
    teacher: str | None,
    recipe: DistillRecipe,
    target: Path,
    recipe_name: str,
    sampler: Sampler | None,
    processes: Any,
) -> Path:
    models = _resolve(student, teacher, recipe)
    key = _key(models, recipe)
    is_done = target.exists()
    processes.wait_for_everyone()
    if is_done:
        return _reuse(target, key)
    _check_student(models, recipe, target)
    tokenizer = load_tokenizer(models.student_directory)
    for directory in models.teacher_directories:
        check_same_tokens(load_tokenizer(directory), tokenizer, directory.name)
    items = None
    if recipe.items.file is not None:
        items = start_items(recipe.items, models.student_directory, tokenizer, recipe.data.source)
    examples = _load_examples(models, recipe, tokenizer, items.as_tokens if items else None)
    if items is not None:
        examples = items.in_folds(examples)
    check_data(examples, recipe.loss)
    _print_plan(models, recipe, examples)
    with _shared_work_folder(target, key, processes) as work:
        with processes.main_process_first():
            job = _make_job(models, recipe, examples, tokenizer, work, key, sampler, items)
        job.bad_batch_file = target.with_name(f"{target.name}.bad-batch.json")
        result = train(job)
        if processes.is_main_process:
            begun = time.monotonic()
            with atomic_directory(target) as output:
                save_student(_complete_student(job, models, result.weights), models.student_directory, output, items)
                shutil.copyfile(work / STEP_LOG, output / LOG_FILE)
                write_step = StepRecord(name="write", seconds=time.monotonic() - begun)
                _write_manifest(output, models, recipe, recipe_name, examples, result, job, key, write_step, items)
    print_status(f"distilled {target.name}: {_summary(result)}; written to {target}")
    return target


def _load_examples(
    models: _Models, recipe: DistillRecipe, tokenizer: Any, adapt: Callable[[ScoringPrompt], Prompt] | None
) -> Examples:
    data = recipe.data
    return load_examples(
        tokenizer,
        models.student_directory,
        data.source,
        data.num_examples,
        data.num_validation,
        data.max_tokens,
        data.seed,
        recipe.loss.teacher_instruction,
        adapt,
    )


def _check_student(models: _Models, recipe: DistillRecipe, target: Path) -> None:
    """Raise UserError if the student could not be saved or served after its training; print what is repaired."""
    directory = models.student_directory
    for line in check_tokenizer(directory, read_decoder_config(directory)["vocab_size"]):
        print_status(line)
    for line in repair_generation_config(directory)[1]:
        print_status(line)
    # A checkpoint has float32 weights and two moments; the best weights are float32, the student is bfloat16.
    each = _STATE_BYTES * (not recipe.training.lora_rank) + 4 * (recipe.training.keep == "best") + 2
    check_free_space(target, each * count_parameters(directory))


@contextmanager
def _shared_work_folder(target: Path, key: str, processes: Any) -> Iterator[Path]:
    """Yield the work folder to all processes; the first one creates and locks it."""
    own = work_folder(target, key, RESUMABLE) if processes.is_main_process else nullcontext()
    with own:
        processes.wait_for_everyone()
        yield building_path(target)
        processes.wait_for_everyone()


def _resolve(student: str, teacher: str | None, recipe: DistillRecipe) -> _Models:
    if recipe.loss.kd_weight and teacher is None:
        raise UserError(
            "--teacher", "", "is missing", "name a teacher, or set loss.kd_weight=0 to fine-tune without one"
        )
    if not recipe.loss.kd_weight and teacher is not None:
        raise UserError("--teacher", teacher, "has no effect, because loss.kd_weight is 0", "remove one of them")
    if teacher is not None and teacher.startswith(("http://", "https://")):
        _check_served(teacher, recipe)
        return _Models(student, resolve_model(student), teacher)
    teachers = [teacher, *(one.model for one in recipe.teachers)] if teacher is not None else []
    return _Models(student, resolve_model(student), teacher, tuple(map(resolve_model, teachers)))


def _check_served(teacher: str, recipe: DistillRecipe) -> None:
    """Raise UserError if the recipe asks more of a teacher than a server returns."""
    loss = recipe.loss
    problem, remedy = "", ""
    if not loss.top_k:
        problem, remedy = "returns only the likeliest tokens", "set loss.top_k, such as 20"
    elif loss.temperature != 1:
        problem, remedy = "returns probabilities at temperature 1 only", "set loss.temperature to 1"
    elif recipe.teachers:
        problem, remedy = "cannot be mixed with further teachers", "leave out the recipe's teachers"
    elif recipe.items.file is not None:
        problem, remedy = "gives no hidden states for item tokens", "give the teacher's directory"
    if problem:
        raise UserError("--teacher", teacher, f"is a server, which {problem}", remedy)


def _key(models: _Models, recipe: DistillRecipe) -> str:
    """Return a hash of everything that determines the student; the time between checkpoints does not."""
    unused: Any = {"summary": True, "training": {"save_every_s"}, "teachers": {"__all__": {"model"}}}
    settings = recipe.model_dump(mode="json", exclude=unused)
    settings["training"]["precision"] = "bf16" if recipe.training.is_bf16 else "float32"
    hashes = [model_hash(models.student_directory), *models.teacher_hashes]
    hashes += [str(models.teacher)] if models.is_teacher_served else []
    content: list[Any] = [_FORMAT, hashes, settings, sha256_of_files(source_files(recipe.data.source))]
    items = settings.pop("items")
    if recipe.items.file is not None:
        content += [items, sha256_of_files([recipe.items.file])]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _make_job(
    models: _Models,
    recipe: DistillRecipe,
    examples: Examples,
    tokenizer: Any,
    work: Path,
    key: str,
    sampler: Sampler | None,
    items: ItemTask | None,
) -> TrainingJob:
    training, loss = recipe.training, recipe.loss
    student = load_model(models.student_directory, torch.float32)
    check_saving(student, models.student_directory)
    online = None
    if models.teacher_directories:
        dtype = torch.bfloat16 if training.is_bf16 else torch.float32
        first, *further = [load_model(directory, dtype) for directory in models.teacher_directories]
        weights = [one.weight for one in recipe.teachers]
        online = OnlineTeacher(first, loss, list(zip(further, weights, strict=True)))
    if items is not None:
        argument = models.teacher or models.student
        directory = next(iter(models.teacher_directories), models.student_directory)
        reader = TextModel(argument, model_hash(directory), online.model if online else student, tokenizer)
        items.put_into(student, tokenizer, reader, work)
    if training.lora_rank:
        student = with_lora(student, training.lora_rank, recipe.data.seed)
    stop = stop_tokens(models.student_directory, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop, default=0)
    machine = load_roofline()
    job = TrainingJob(
        student=student,
        recipe=recipe,
        training=examples.training,
        validation=examples.validation,
        folder=work,
        key=key,
        tokenizer=tokenizer,
        online=online,
        sampler=sampler or make_process_sampler(stop, pad),
        evaluate=make_evaluator(examples, training.micro_batch_tokens),
        peak_flops=machine.bf16_flops if machine and training.is_bf16 else None,
    )
    if loss.top_k and models.teacher is not None:
        given = _load_examples(models, recipe, tokenizer, items.as_text).training if items else examples.training
        job.cached, job.cached_validation = _make_caches(job, models, given, work)
        if items is not None:
            job.online = None  # it reads texts, and the validation's sequences are items
        error = job.cached.error
        merged = f" and {error.divergence_frac:.2%} of the divergence" if error.divergence_frac is not None else ""
        print_status(
            f"teacher's {loss.top_k} likeliest tokens: {error.num_bytes / 2**20:.0f} MiB; they miss "
            f"{error.missing_mass:.2%} of the probability{merged}"
        )
    return job


def _make_caches(
    job: TrainingJob, models: _Models, given: Sequence[Example], work: Path
) -> tuple[CachedTeacher, CachedTeacher | None]:
    """Return the teacher's caches of the training sequences and, if it is served, of the validation sequences.

    The teacher reads the examples `given`, which are the student's with texts in place of item tokens.
    """
    recipe, loss = job.recipe, job.recipe.loss
    training = recipe.supervision.apply_all(given)
    _check_aligned(training, recipe.supervision.apply_all(job.training))
    if job.online is not None:
        job.online.to(current_device())
        teachers = repr((models.teacher_hashes, [one.weight for one in recipe.teachers]))
        return make_cache(job.online, training, loss, work, teachers, recipe.training.micro_batch_tokens), None
    target = find_target(str(models.teacher), loss.served_model or None, "loss.served_model")
    validation = validation_sequences(job.validation, recipe)
    known = make_served_cache(target, validation, loss, work, job.tokenizer) if validation else None
    return make_served_cache(target, training, loss, work, job.tokenizer), known


def _check_aligned(given: Sequence[SupervisedSequence], sequences: Sequence[SupervisedSequence]) -> None:
    """Raise UserError if the sequences that the teacher reads do not have the student's targets."""
    if [len(one.targets) for one in given] != [len(one.targets) for one in sequences]:
        problem = "cuts labels off the texts that the teacher reads"
        raise UserError("data.max_tokens", max(len(one.tokens) for one in given), problem, "raise it")


def _complete_student(job: TrainingJob, models: _Models, weights: Mapping[str, Tensor] | None) -> nn.Module:
    """Return the trained student, or a new one with its weights if FSDP has sharded it."""
    if weights is None:
        return job.student
    student = load_model(models.student_directory, torch.float32)
    if job.recipe.training.lora_rank:
        student = with_lora(student, job.recipe.training.lora_rank, job.recipe.data.seed)
    student.load_state_dict(weights)
    return student


def _write_manifest(
    output: Path,
    models: _Models,
    recipe: DistillRecipe,
    recipe_name: str,
    examples: Examples,
    result: TrainingResult,
    job: TrainingJob,
    key: str,
    write_step: StepRecord,
    items: ItemTask | None,
) -> None:
    stats = result.stats
    is_best = recipe.training.keep == "best" and result.best_loss is not None
    detail: dict[str, Any] = {
        "key": key,
        "teacher": models.teacher,
        "teacher_sha256": models.teacher_hashes,
        "data_sha256": examples.sha256,
        "num_examples": len(examples.training),
        "num_validation": len(examples.validation),
        "num_too_long": examples.num_too_long,
        "precision": "bf16" if recipe.training.is_bf16 else "float32",
        "steps": result.num_steps,
        "kept_step": result.best_step if is_best else result.num_steps,
        "tokens_read": stats.tokens_read,
        "targets": stats.targets,
        "flops": stats.flops,
        "train_s": stats.train_s,
        "tokens_per_s": stats.tokens_read / stats.train_s if stats.train_s else 0.0,
        "flops_per_s": stats.flops / stats.train_s if stats.train_s else 0.0,
        "peak_flops_per_s": job.peak_flops,
        "peak_bytes": stats.peak_bytes,
        "sampling": vars(stats.sampling),
        "teacher_cache": vars(stats.teacher_cache),
        "total": vars(stats.total),
        "validation": stats.history,
    }
    if job.cached is not None:
        detail["cache_error"] = vars(job.cached.error)
    if items is not None:
        detail["items"] = {
            "file_sha256": sha256_of_files([recipe.items.file] if recipe.items.file else []),
            "num_items": len(items.texts),
            "num_slots": items.catalogue.num_slots,
            "first_token": items.catalogue.first_token,
            "tokens_per_item": items.catalogue.tokens_per_item,
            "num_ratings": len(items.interactions),
        }
    earlier = read_manifest(models.student_directory)
    base = BaseModelRecord(
        model=models.student,
        sha256=model_hash(models.student_directory),
        note=earlier.base.note if earlier else "",
    )
    manifest = Manifest(
        name=f"{model_name(models.student, models.student_directory)}-{recipe_name}",
        recipe=recipe_name,
        resolved_recipe=recipe.model_dump(mode="json"),
        base=base,
        steps=[StepRecord(name="distill", seconds=stats.total.seconds, detail=detail), write_step],
        num_parameters=count_parameters(output),
        seed=recipe.data.seed,
        peak_rss_bytes=stats.peak_bytes,
    )
    write_manifest(output, manifest)


def _reuse(target: Path, key: str) -> Path:
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest and any(step.detail.get("key") == key for step in manifest.steps):
        print_status(f"student {target.name}: reused from {target}")
        return target
    raise UserError(
        "output directory", target, "exists and holds something else", "name another directory, or delete it"
    )


def _print_plan(models: _Models, recipe: DistillRecipe, examples: Examples) -> None:
    teacher = f"imitates {models.teacher}" if models.teacher else "is fine-tuned"
    print_status(
        f"student {models.student} {teacher}: {len(examples.training)} training examples of {recipe.data.source} "
        f"({recipe.supervision}), {len(examples.validation)} validation examples"
        + (f"; {examples.num_too_long} skipped because they are too long" if examples.num_too_long else "")
    )


def _summary(result: TrainingResult) -> str:
    stats = result.stats
    best = (
        f", validation loss {result.best_loss:.4f} at step {result.best_step}" if result.best_loss is not None else ""
    )
    parts = [f"{result.num_steps} steps, {_cost_text(stats.training)}, {stats.peak_bytes / 2**30:.1f} GiB{best}"]
    parts += [f"sampled replies: {_cost_text(stats.sampling)}"] * (stats.sampling.tokens > 0)
    parts += [f"teacher's cache: {_cost_text(stats.teacher_cache)}"] * (stats.teacher_cache.tokens > 0)
    return "; ".join(parts)


def _cost_text(cost: Cost) -> str:
    return f"{cost.tokens} tokens, {cost.flops / 1e12:.0f} TFLOP in {cost.seconds:.0f} s"
