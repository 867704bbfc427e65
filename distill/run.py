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
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimserve.core.errors import UserError
from slimserve.core.generation import repair_generation_config
from slimserve.core.model import model_name, resolve_model
from slimserve.core.model_config import GENERATION_FILE, read_decoder_config
from slimserve.core.model_files import copy_companions, count_parameters, model_hash
from slimserve.core.progress import print_status
from slimserve.core.roofline import load_roofline
from slimserve.core.storage import atomic_directory, building_path, check_free_space, work_folder
from slimserve.core.tokenizer import check_tokenizer, load_tokenizer
from slimserve.core.variant import BaseModelRecord, Manifest, StepRecord, read_manifest, write_manifest
from slimserve.distill.data import Examples, load_examples
from slimserve.distill.models import check_same_tokens, load_model, stop_tokens
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.sampling import Sampler, make_process_sampler
from slimserve.distill.state import CHECKPOINT
from slimserve.distill.student import OnlineTeacher
from slimserve.distill.teacher_cache import CachedTeacher, make_cache
from slimserve.distill.train import STEP_LOG, TrainingJob, TrainingResult, train
from slimserve.distill.validation import make_evaluator

_FORMAT = 1
"""Version of the training; raise it when the same recipe makes a different student."""
_STATE_BYTES = 12
"""Bytes of a parameter in the saved state of a training."""
ADAPTER_FOLDER = "adapter"
"""Folder in the student's directory with the LoRA adapter, which is merged into the student's weights."""
LOG_FILE = "training.jsonl"
"""Log in the student's directory with one row per step."""


@dataclass(frozen=True)
class _Models:
    """The models of a run: their arguments and directories."""

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
    models = _resolve(student, teacher, recipe)
    key = _key(models, recipe)
    is_done = target.exists()
    processes.wait_for_everyone()
    if is_done:
        return _reuse(target, key)
    _check_student(models, recipe, target)
    tokenizer = load_tokenizer(models.student_directory)
    if models.teacher_directory is not None:
        check_same_tokens(load_tokenizer(models.teacher_directory), tokenizer, teacher)
    data = recipe.data
    examples = load_examples(
        tokenizer,
        models.student_directory,
        data.source,
        data.num_examples,
        data.num_validation,
        data.max_tokens,
        data.seed,
    )
    _print_plan(models, recipe, examples)
    with _shared_work_folder(target, key, processes) as work:
        with processes.main_process_first():
            job = _make_job(models, recipe, examples, tokenizer, work, key, sampler)
        job.bad_batch_file = target.with_name(f"{target.name}.bad-batch.json")
        result = train(job)
        if processes.is_main_process:
            begun = time.monotonic()
            with atomic_directory(target) as output:
                _save(_complete_student(job, models, result.weights), models, output)
                shutil.copyfile(work / STEP_LOG, output / LOG_FILE)
                write_step = StepRecord(name="write", seconds=time.monotonic() - begun)
                _write_manifest(output, models, recipe, recipe_name, examples, result, job, key, write_step)
    print_status(f"distilled {target.name}: {_summary(result)}; written to {target}")
    return target


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
    own = work_folder(target, key, CHECKPOINT) if processes.is_main_process else nullcontext()
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
    return _Models(student, resolve_model(student), teacher, resolve_model(teacher) if teacher is not None else None)


def _key(models: _Models, recipe: DistillRecipe) -> str:
    """Return a hash of everything that determines the student; the time between checkpoints does not."""
    settings = recipe.model_dump(mode="json", exclude={"summary": True, "training": {"save_every_s"}})
    settings["training"]["precision"] = "bf16" if recipe.training.is_bf16 else "float32"
    source = Path(recipe.data.source)
    hashes = [model_hash(one) if one else "" for one in (models.student_directory, models.teacher_directory)]
    file = hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else ""
    return hashlib.sha256(json.dumps([_FORMAT, hashes, settings, file], sort_keys=True).encode()).hexdigest()


def _make_job(
    models: _Models,
    recipe: DistillRecipe,
    examples: Examples,
    tokenizer: Any,
    work: Path,
    key: str,
    sampler: Sampler | None,
) -> TrainingJob:
    training, loss = recipe.training, recipe.loss
    student = load_model(models.student_directory, torch.float32)
    _check_saving(student, models.student_directory)
    if training.lora_rank:
        student = _with_lora(student, training.lora_rank, recipe.data.seed)
    online = None
    if models.teacher_directory is not None:
        dtype = torch.bfloat16 if training.is_bf16 else torch.float32
        online = OnlineTeacher(load_model(models.teacher_directory, dtype), loss)
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
    if loss.top_k:
        assert online is not None
        assert models.teacher_directory is not None
        if torch.cuda.is_available():
            online.model.to("cuda")
        cached = make_cache(
            online,
            recipe.supervision.apply_all(examples.training),
            loss,
            work,
            model_hash(models.teacher_directory),
            training.micro_batch_tokens,
        )
        error = cached.error
        print_status(
            f"teacher's {loss.top_k} likeliest tokens: {error.num_bytes / 2**20:.0f} MiB; they miss "
            f"{error.missing_mass:.2%} of the probability and {error.divergence_frac:.2%} of the divergence"
        )
        job.cached = cached
    return job


def _with_lora(student: nn.Module, rank: int, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: nn.Module = get_peft_model(student, config)
    return wrapped


def _complete_student(job: TrainingJob, models: _Models, weights: Mapping[str, Tensor] | None) -> nn.Module:
    """Return the trained student, or a new one with its weights if FSDP has sharded it."""
    if weights is None:
        return job.student
    student = load_model(models.student_directory, torch.float32)
    if job.recipe.training.lora_rank:
        student = _with_lora(student, job.recipe.training.lora_rank, job.recipe.data.seed)
    student.load_state_dict(weights)
    return student


def _check_saving(student: Any, directory: Path) -> None:
    """Save the student without its weights, so that what transformers refuses to save is known before the training."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save_pretrained(student, Path(folder), state_dict={})
    except Exception as error:  # transformers checks all settings, with many types
        problem = f"could not be saved after the training ({error})"
        raise UserError("student", directory, problem, "correct its config.json or generation_config.json") from error


def _save(student: Any, models: _Models, output: Path) -> None:
    """Write the student as bfloat16 in the Hugging Face layout, with its tokenizer and chat template."""
    if hasattr(student, "merge_and_unload"):
        _save_adapter(student, output / ADAPTER_FOLDER)
        student = student.merge_and_unload()
    try:
        _save_pretrained(student.to(torch.bfloat16), output)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        problem = f"could not be saved ({error})"
        raise UserError("student", models.student_directory, problem, "report this; the training is kept") from error
    copy_companions(models.student_directory, output)


def _save_adapter(student: Any, folder: Path) -> None:
    """Write the LoRA adapter in bfloat16 in the layout of peft, without the path of the model it was trained on."""
    student.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    settings = folder / "adapter_config.json"
    config = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_pretrained(student: Any, output: Path, **options: Any) -> None:
    """Save config and weights; the generation settings are copied from the student's directory instead."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings, student.generation_config = student.generation_config, GenerationConfig()
    try:
        student.save_pretrained(output, **options)
    finally:
        student.generation_config = settings
    (output / GENERATION_FILE).unlink(missing_ok=True)


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
) -> None:
    stats = result.stats
    is_best = recipe.training.keep == "best" and result.best_loss is not None
    detail: dict[str, Any] = {
        "key": key,
        "teacher": models.teacher,
        "teacher_sha256": model_hash(models.teacher_directory) if models.teacher_directory else None,
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
        "validation": stats.history,
    }
    if isinstance(job.cached, CachedTeacher):
        detail["cache_error"] = vars(job.cached.error)
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
        steps=[StepRecord(name="distill", seconds=stats.train_s, detail=detail), write_step],
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
    return (
        f"{result.num_steps} steps, {stats.tokens_read} tokens, {stats.flops / 1e12:.0f} TFLOP in {stats.train_s:.0f} "
        f"s, {stats.peak_bytes / 2**30:.1f} GiB{best}"
    )
