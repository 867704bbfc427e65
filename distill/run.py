"""Make a student: models, examples, training, and a directory that stock tools load, whole or not at all.

The work lies in `.NAME.building` beside the output until then, so the same command goes on where it was killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimserve.core.errors import UserError
from slimserve.core.model import count_parameters, model_hash, model_name, resolve_model
from slimserve.core.progress import print_status
from slimserve.core.roofline import load_roofline
from slimserve.core.storage import atomic_directory, building_path, work_folder
from slimserve.core.variant import BaseModelRecord, Manifest, StepRecord, read_manifest, write_manifest
from slimserve.distill.data import Examples, load_examples
from slimserve.distill.evaluation import make_judge
from slimserve.distill.models import check_same_tokens, load_model, load_tokenizer, stop_tokens
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.sampling import Sampler, make_process_sampler
from slimserve.distill.student import OnlineTeacher
from slimserve.distill.supervision import sections_text
from slimserve.distill.teacher_cache import make_cache
from slimserve.distill.train import Job, Outcome, train

_FORMAT = 1
"""Raise it when the same recipe starts to give another student."""
LOG_FILE = "training.jsonl"
"""A row per step, in the student's directory."""


@dataclass(frozen=True)
class Pair:
    """The models of a run, by their arguments and where they lie."""

    student: str
    student_directory: Path
    teacher: str | None = None
    teacher_directory: Path | None = None


def distill(
    student: str,
    teacher: str | None,
    recipe: DistillRecipe,
    target: Path,
    *,
    recipe_name: str = "distill",
    sampler: Sampler | None = None,
) -> Path:
    """Train the model `student` to follow `teacher` (None: its data alone) and write it to `target`.

    The student is saved as bfloat16 with its tokenizer and a manifest that holds the recipe, the losses and the costs.
    An earlier student of the same models and recipe is reused, an interrupted run gone on with. `sampler` writes the
    replies of on-policy stages; this process if it is None. Raises UserError where models do not fit each other, the
    recipe asks for a teacher and none is given, nothing is left to learn, or `target` holds something else.

    Every process that `accelerate launch` or torchrun started calls it; the first one writes, and tells what happens.
    """
    from accelerate import PartialState

    # With it, transformers reads weights on the first process only, and FSDP spreads the student's but no teacher's.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    processes = PartialState(cpu=not torch.cuda.is_available())
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
    pair = _resolve(student, teacher, recipe)
    key = _key(pair, recipe)
    is_done = target.exists()
    processes.wait_for_everyone()
    if is_done:
        return _reuse(target, key)
    tokenizer = load_tokenizer(pair.student_directory)
    if pair.teacher_directory is not None:
        check_same_tokens(load_tokenizer(pair.teacher_directory), tokenizer, teacher)
    data = recipe.data
    examples = load_examples(
        tokenizer,
        pair.student_directory,
        data.source,
        data.num_examples,
        data.num_validation,
        data.max_tokens,
        data.seed,
    )
    _say_plan(pair, recipe, examples)
    with _shared_work_folder(target, key, processes) as work:
        with processes.main_process_first():
            job = _make_job(pair, recipe, examples, tokenizer, work, key, sampler)
        job.bad_batch = target.with_name(f"{target.name}.bad-batch.json")
        outcome = train(job)
        if processes.is_main_process:
            begun = time.monotonic()
            with atomic_directory(target) as output:
                _save(_whole_student(job, pair, outcome.weights), pair, output)
                shutil.copyfile(work / "steps.jsonl", output / LOG_FILE)
                written = StepRecord(name="write", seconds=time.monotonic() - begun)
                _write_manifest(output, pair, recipe, recipe_name, examples, outcome, job, key, written)
    print_status(f"distilled {target.name}: {_summary(outcome)}; at {target}")
    return target


@contextmanager
def _shared_work_folder(target: Path, key: str, processes: Any) -> Iterator[Path]:
    """The first process's work folder, for all of them."""
    own = work_folder(target, key, "state/progress.json") if processes.is_main_process else nullcontext()
    with own:
        processes.wait_for_everyone()
        yield building_path(target)
        processes.wait_for_everyone()


def _resolve(student: str, teacher: str | None, recipe: DistillRecipe) -> Pair:
    if recipe.loss.kd_weight and teacher is None:
        raise UserError(
            "--teacher", "", "is missing", "name one, or set loss.kd_weight=0 for plain fine-tuning without a teacher"
        )
    if not recipe.loss.kd_weight and teacher is not None:
        raise UserError("--teacher", teacher, "would teach nothing, as loss.kd_weight is 0", "leave one of them out")
    return Pair(student, resolve_model(student), teacher, resolve_model(teacher) if teacher is not None else None)


def _key(pair: Pair, recipe: DistillRecipe) -> str:
    """Hash of all that decides the outcome; how often a run is saved does not."""
    told = recipe.model_dump(mode="json", exclude={"summary": True, "training": {"save_every_s"}})
    source = Path(recipe.data.source)
    models = [model_hash(one) if one else "" for one in (pair.student_directory, pair.teacher_directory)]
    file = hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else ""
    return hashlib.sha256(json.dumps([_FORMAT, models, told, file], sort_keys=True).encode()).hexdigest()


def _make_job(
    pair: Pair,
    recipe: DistillRecipe,
    examples: Examples,
    tokenizer: Any,
    work: Path,
    key: str,
    sampler: Sampler | None,
) -> Job:
    training, loss = recipe.training, recipe.loss
    student = load_model(pair.student_directory, torch.float32)
    if training.lora_rank:
        student = _with_lora(student, training.lora_rank, recipe.data.seed)
    online = None
    if pair.teacher_directory is not None:
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        online = OnlineTeacher(load_model(pair.teacher_directory, dtype), loss.hidden)
    stop = stop_tokens(pair.student_directory, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop, default=0)
    machine = load_roofline()
    job = Job(
        student=student,
        recipe=recipe,
        training=examples.training,
        validation=examples.validation,
        folder=work,
        key=key,
        tokenizer=tokenizer,
        online=online,
        sampler=sampler or make_process_sampler(stop, pad),
        judge=make_judge(examples, training.micro_batch_tokens),
        peak_flops=machine.bf16_flops if machine and training.precision == "bf16" else None,
    )
    if loss.top_k:
        assert online is not None
        assert pair.teacher_directory is not None
        if torch.cuda.is_available():
            online.model.to("cuda")
        sequences = recipe.supervision.supervision.apply_all(examples.training)
        cached = make_cache(
            online,
            sequences,
            loss.settings,
            loss.top_k,
            work,
            model_hash(pair.teacher_directory),
            training.micro_batch_tokens,
        )
        error = cached.error
        print_status(
            f"teacher's {loss.top_k} likeliest tokens: {error.num_bytes / 2**20:.0f} MiB, {error.missing_mass:.2%} of "
            f"the probability and {error.divergence_frac:.2%} of the divergence left out"
        )
        job.cached = cached
    return job


def _with_lora(student: nn.Module, rank: int, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: nn.Module = get_peft_model(student, config)
    return wrapped


def _whole_student(job: Job, pair: Pair, weights: Mapping[str, Tensor] | None) -> nn.Module:
    """The trained student, or another one with its weights where it is divided over processes."""
    if weights is None:
        return job.student
    student = load_model(pair.student_directory, torch.float32)
    if job.recipe.training.lora_rank:
        student = _with_lora(student, job.recipe.training.lora_rank, job.recipe.data.seed)
    student.load_state_dict(weights)
    return student


def _save(student: Any, pair: Pair, output: Path) -> None:
    """The student as bfloat16, under the names that stock tools know, with its tokenizer and chat template."""
    if hasattr(student, "merge_and_unload"):
        student = student.merge_and_unload()
    student.to(torch.bfloat16).save_pretrained(output)
    for file in pair.student_directory.iterdir():
        is_companion = file.suffix in {".json", ".jinja", ".model", ".txt"} and ".safetensors" not in file.name
        if file.is_file() and is_companion and not (output / file.name).exists() and file.name != "slimserve.json":
            shutil.copyfile(file, output / file.name)


def _write_manifest(
    output: Path,
    pair: Pair,
    recipe: DistillRecipe,
    recipe_name: str,
    examples: Examples,
    outcome: Outcome,
    job: Job,
    key: str,
    written: StepRecord,
) -> None:
    where = outcome.progress
    detail: dict[str, Any] = {
        "key": key,
        "teacher": pair.teacher,
        "teacher_sha256": model_hash(pair.teacher_directory) if pair.teacher_directory else None,
        "data_sha256": examples.sha256,
        "num_examples": len(examples.training),
        "num_validation": len(examples.validation),
        "num_too_long": examples.num_too_long,
        "steps": outcome.num_steps,
        "kept_step": where.best_step
        if recipe.training.keep == "best" and where.best_loss is not None
        else outcome.num_steps,
        "tokens_read": where.tokens_read,
        "targets": where.targets,
        "flops": where.flops,
        "train_s": where.train_s,
        "tokens_per_s": where.tokens_read / where.train_s if where.train_s else 0.0,
        "flops_per_s": where.flops / where.train_s if where.train_s else 0.0,
        "peak_flops_per_s": job.peak_flops,
        "peak_bytes": where.peak_bytes,
        "validation": where.history,
    }
    if recipe.loss.top_k and job.cached is not None:
        cached: Any = job.cached
        detail["cache_error"] = vars(cached.error)
    earlier = read_manifest(pair.student_directory)
    base = BaseModelRecord(
        model=pair.student,
        sha256=model_hash(pair.student_directory),
        note=earlier.base.note if earlier else "",
    )
    manifest = Manifest(
        name=f"{model_name(pair.student, pair.student_directory)}-{recipe_name}",
        recipe=recipe_name,
        resolved_recipe=recipe.model_dump(mode="json"),
        base=base,
        steps=[StepRecord(name="distill", seconds=where.train_s, detail=detail), written],
        num_parameters=count_parameters(output),
        seed=recipe.data.seed,
        peak_rss_bytes=where.peak_bytes,
    )
    write_manifest(output, manifest)


def _reuse(target: Path, key: str) -> Path:
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest and any(step.detail.get("key") == key for step in manifest.steps):
        print_status(f"student {target.name}: reused, distilled earlier at {target}")
        return target
    raise UserError("output directory", target, "exists and holds something else", "name another, or delete it")


def _say_plan(pair: Pair, recipe: DistillRecipe, examples: Examples) -> None:
    supervision = recipe.supervision.supervision
    teacher = f"following {pair.teacher}" if pair.teacher else "from its data alone"
    print_status(
        f"student {pair.student} {teacher}: {len(examples.training)} examples of {recipe.data.source}, "
        f"{sections_text(supervision.sections)} of the {supervision.window} {supervision.lead_span:.0%}, "
        f"{len(examples.validation)} whole ones for validation"
        + (f"; {examples.num_too_long} were too long" if examples.num_too_long else "")
    )


def _summary(outcome: Outcome) -> str:
    where = outcome.progress
    best = f", validation loss {where.best_loss:.4f} at step {where.best_step}" if where.best_loss is not None else ""
    return (
        f"{outcome.num_steps} steps, {where.tokens_read} tokens, {where.flops / 1e12:.0f} TFLOP in {where.train_s:.0f} "
        f"s, {where.peak_bytes / 2**30:.1f} GiB{best}"
    )
