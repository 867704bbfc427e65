"""Build a variant: one walk over the checkpoint's blocks per step, resumable, written whole or not at all.

A step reads the checkpoint that the step before wrote. While it walks, finished blocks, the hidden states of the
calibration samples and a small state file lie in a work folder beside the target, so that a killed build goes on
at the block where it stopped, with the same result to the bit.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimserve.compress import budget
from slimserve.compress.calibration import Calibration, check_source, load_calibration
from slimserve.compress.checkpoint import CheckpointReader, CheckpointWriter, iterate_blocks
from slimserve.compress.families import LayerRoles, roles_of, with_sizes
from slimserve.compress.forward import Block, Decoder
from slimserve.compress.prune import pruning_method
from slimserve.compress.recipe import Prune, Quantize, Recipe
from slimserve.compress.reference import divergences
from slimserve.compress.steps import BoundStep, Detail, ErrorProfile, Visitor, bind
from slimserve.compress.stream import Stream
from slimserve.core.errors import UserError
from slimserve.core.model import count_parameters, model_hash, model_name, weight_files
from slimserve.core.progress import print_status, progress
from slimserve.core.storage import (
    atomic_directory,
    cache_dir,
    sha256_of_files,
    work_folder,
    write_atomically,
    write_remedy,
)
from slimserve.core.variant import (
    MANIFEST_FILE,
    BaseModelRecord,
    Manifest,
    StepRecord,
    disk_bytes,
    read_manifest,
    write_manifest,
)

_JUDGED_SEQUENCES = 8
"""On which the shapes that meet a budget are compared."""
_TIMING_SLACK = 1.03
"""A shape that is timed anew may be so much slower than the budget allows."""
_BUILD_FORMAT = 3
"""Raise it when the same recipe starts to give other bytes, so that old builds are not reused."""

BetweenRounds = Callable[[Path], Path]
"""Gets the checkpoint after a pruning step or round and returns the one to go on with, such as a distilled one."""


def build_variant(
    model: str,
    directory: Path,
    recipe_name: str,
    recipe: Recipe,
    target: Path | None,
    between_rounds: BetweenRounds | None = None,
) -> Path:
    """Compress the model in `directory` and return the variant's directory.

    `model` is the argument as the user gave it, kept in the manifest. Without `target` the variant goes to the
    cache, under a name that depends on the model's content and the resolved recipe, and an earlier build of the
    same is reused. An interrupted build of the same is resumed. `between_rounds` is called after each step that
    another follows, again when a build is resumed; it does not count for what is reused. Raises UserError
    where the model's family is unknown, a step does not fit its shapes, `target` holds something else, the disk is
    full, or a weight or activation is not finite.
    """
    base = _base_of(model, directory)
    resolved = recipe.model_dump(mode="json")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if recipe.steps and "quantization_config" in config:
        raise UserError("model", model, "is quantized already", "give the model that it was made from")
    roles = roles_of(config)
    # Of a step with a budget the shapes are yet to be found; what follows it is checked on the dense ones.
    budgeted = recipe.budget
    if budgeted:
        pruning_method(budgeted.method)  # raises before the search, which takes minutes
    steps = bind(recipe.steps[1:] if budgeted else recipe.steps, config, roles, recipe.calibration.seed)
    needs_data = budgeted is not None or any(step.needs_data for step in steps)
    source_hash = ""
    if needs_data:
        check_source(recipe.calibration.source)
        file = Path(recipe.calibration.source)
        source_hash = sha256_of_files([file]) if file.is_file() else ""
    made_of = json.dumps([base.sha256, _what_matters(resolved, needs_data), source_hash], sort_keys=True)
    key = hashlib.sha256(f"{_BUILD_FORMAT} {made_of}".encode()).hexdigest()[:12]
    name = f"{model_name(model, directory)}-{recipe_name}"
    if target is None:
        target = cache_dir("variants") / f"{name}-{key}"
    if target.exists():
        return _reuse(target, made_of, needs_data)

    try:
        with work_folder(target, key, "step-*/state.json") as work:
            calibration = _calibrate(recipe, directory) if needs_data else None
            builder = _Builder(name, work, roles, calibration, between_rounds)
            done: list[StepRecord] = []
            start_from = directory
            if budgeted:
                start_from, done = builder.fit_budget(model, directory, recipe, budgeted)
                if between_rounds and recipe.steps[1:]:
                    start_from = between_rounds(start_from)
                config = json.loads((start_from / "config.json").read_text(encoding="utf-8"))
                steps = bind(recipe.steps[1:], config, roles, recipe.calibration.seed)
            done += builder.run(start_from, steps)
            with atomic_directory(target) as output:
                start = time.monotonic()
                _place_checkpoint(builder.result, output, is_ours=bool(recipe.steps))
                done.append(StepRecord(name="write", seconds=time.monotonic() - start))
                manifest = Manifest(
                    name=name,
                    recipe=recipe_name,
                    resolved_recipe=resolved,
                    base=base,
                    steps=done,
                    num_parameters=builder.num_parameters,
                    calibration_sha256=calibration.sha256 if calibration else None,
                    calibration={**calibration.detail, "source_sha256": source_hash} if calibration else {},
                    seed=recipe.calibration.seed,
                    peak_rss_bytes=_peak_rss_bytes(),
                )
                write_manifest(output, manifest)
    except (OSError, SafetensorError) as error:
        raise UserError(
            "output directory",
            target,
            f"could not be written ({getattr(error, 'strerror', None) or error})",
            f"{write_remedy(error)} and run the same command again: it resumes at the last finished block",
        ) from error
    print_status(f"built {name}: {disk_bytes(target) / 2**20:.0f} MiB in {manifest.build_s:.1f} s at {target}")
    return target


@dataclass
class _Builder:
    """Runs the steps one after the other, each in a folder of its own under `work`."""

    name: str
    work: Path
    roles: LayerRoles
    calibration: Calibration | None
    between_rounds: BetweenRounds | None
    num_parameters: int = 0

    def run(self, directory: Path, steps: list[BoundStep]) -> list[StepRecord]:
        """Apply all steps; afterwards `result` is the last one's checkpoint."""
        self.result = directory
        self.num_parameters = count_parameters(directory)
        done: list[StepRecord] = []
        for number, step in enumerate(steps):
            folder = self.work / f"step-{number}"
            output = folder / "checkpoint"
            title = f"{self.name}: {step.name} ({number + 1} of {len(steps)})"
            record = folder / "done.json"
            if not record.is_file():
                before_s, details = self._walk(title, step, folder)
                start = time.monotonic()
                self._emit(step, details, folder / "blocks", output)
                seconds = before_s + time.monotonic() - start
                write_atomically(record, json.dumps({"seconds": seconds, "detail": step.describe(details)}))
            # Only now: without the record, a killed build goes on from the blocks.
            for leftover in (folder / "blocks", folder / "streams"):
                shutil.rmtree(leftover, ignore_errors=True)
            finished = json.loads(record.read_text(encoding="utf-8"))
            done.append(StepRecord(name=step.name, seconds=finished["seconds"], detail=finished["detail"]))
            if "fallback" in finished["detail"]:
                print_status(f"{title}: {finished['detail']['fallback']}")
            self.result = output
            if step.name != "quantize":
                self.num_parameters = count_parameters(output)
            if self.between_rounds and number + 1 < len(steps):
                self.result = self.between_rounds(output)
        return done

    def fit_budget(self, model: str, directory: Path, recipe: Recipe, step: Prune) -> tuple[Path, list[StepRecord]]:
        """The pruned checkpoint that meets the step's budget at the least error, and what was done for it.

        Builds the few shapes of least estimated error as variants of their own under `work`, and takes the one whose
        next-token distributions are nearest to the dense model's, on sequences that the builds did not look at.
        """
        assert step.keep is not None
        start = time.monotonic()
        config = with_sizes(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        folder = self.work / "step-budget"
        record = folder / "finalists.json"
        if not record.is_file():
            write_atomically(record, json.dumps(self._find_finalists(directory, recipe, step, config, folder)))
        # Read back, since a speed measured anew after an interruption might rank others.
        found = json.loads(record.read_text(encoding="utf-8"))
        built = []
        for number, raw in enumerate(found["finalists"], start=1):
            candidate = budget.Candidate.read(raw)
            print_status(f"{self.name}: finalist {number} of {len(found['finalists'])}: {candidate.shape}")
            steps = tuple(candidate.steps(step, budget.Shape.of(config)))
            concrete = recipe.model_copy(update={"steps": steps})
            built.append(build_variant(model, directory, f"finalist-{number}", concrete, folder / f"finalist-{number}"))
        unseen = self._unseen(directory, recipe)
        # One by one: two models' heads at a time are enough.
        losses = [divergences(directory, [variant], unseen)[0] for variant in built]
        fitting = [n for n, raw in enumerate(found["finalists"]) if raw["cost"] <= found["limit"] * _TIMING_SLACK]
        best = min(fitting or range(len(built)), key=lambda number: (losses[number], number))
        manifest = read_manifest(built[best])
        assert manifest is not None
        detail = {
            **found,
            "keep": step.keep.model_dump(exclude_none=True),
            "finalists": [
                {**raw["shape"], "estimated_error": raw["estimated_error"], "cost": raw["cost"], "kl": kl}
                for raw, kl in zip(found["finalists"], losses, strict=True)
            ],
            "chosen": found["finalists"][best]["shape"],
        }
        if not fitting:
            detail["fallback"] = "none of the shapes was as fast as asked when it was timed again"
            print_status(f"{self.name}: {detail['fallback']}")
        seconds = max(0.0, time.monotonic() - start - manifest.build_s)
        searched = StepRecord(name="fit_budget", seconds=seconds, detail=detail)
        return built[best], [searched, *(done for done in manifest.steps if done.name != "write")]

    def _find_finalists(
        self, directory: Path, recipe: Recipe, step: Prune, config: dict[str, Any], folder: Path
    ) -> dict[str, Any]:
        """The shapes of least estimated error with their costs, and the limit; plain JSON."""
        assert step.keep is not None
        last = recipe.steps[-1]
        quantization = last if isinstance(last, Quantize) else None
        num_bytes = sum(file.stat().st_size for file in weight_files(directory))
        allowance = budget.Budget(step.keep, config, self.roles, count_parameters(directory), num_bytes, quantization)
        shapes = self._shapes_that_fit(allowance, step, recipe, config)
        self.result = directory
        _, curves = self._walk(f"{self.name}: error curves", ErrorProfile(step, config, self.roles), folder)
        finalists = budget.rank(shapes, allowance.dense, curves)[: budget.NUM_FINALISTS]
        return {
            "limit": allowance.limit,
            "shapes_that_fit": len(shapes),
            "finalists": [{**asdict(candidate), "cost": allowance.measure(candidate.shape)} for candidate in finalists],
        }

    def _shapes_that_fit(
        self, allowance: budget.Budget, step: Prune, recipe: Recipe, config: dict[str, Any]
    ) -> list[budget.Shape]:
        """Shapes within the budget that the steps after this one can work on; UserError where there are none."""
        shapes, refusal = [], None
        for shape in allowance.shapes(step.multiple):
            try:
                bind(recipe.steps[1:], shape.put_into(config), self.roles, recipe.calibration.seed)
            except UserError as error:
                refusal = error
            else:
                shapes.append(shape)
        if refusal is not None and not shapes:
            raise refusal
        return shapes

    def _unseen(self, directory: Path, recipe: Recipe) -> list[Tensor]:
        """Calibration sequences beyond those that the builds look at; the last of these where there are no more."""
        asked = recipe.calibration
        wanted = asked.num_samples + _JUDGED_SEQUENCES
        tokens_NT = load_calibration(directory, asked.source, wanted, asked.sequence_length, asked.seed).tokens_NT
        beyond = tokens_NT[asked.num_samples :]
        if not len(beyond):
            print_status(
                f"{self.name}: {asked.source} has no more text, so finalists are judged on what they were built on"
            )
        return list(beyond if len(beyond) else tokens_NT[-_JUDGED_SEQUENCES:])

    def _walk(self, title: str, visitor: Visitor, folder: Path) -> tuple[float, list[Detail]]:
        """Show every block to `visitor` and keep what it makes of it under `folder`; seconds, and its details."""
        start = time.monotonic()
        reader = CheckpointReader(self.result)
        config = json.loads((self.result / "config.json").read_text(encoding="utf-8"))
        num_blocks = config["num_hidden_layers"]
        blocks = folder / "blocks"
        blocks.mkdir(parents=True, exist_ok=True)
        details, before_s = _read_state(folder)
        if details:
            print_status(f"{title}: resumed after block {len(details)} of {num_blocks}")
        streams = self._streams(visitor, folder, config, reader, first=not details)
        with progress(title, num_blocks, "blocks") as tick:
            for index, (_, block) in enumerate(iterate_blocks(reader, self.roles.block, num_blocks)):
                if index < len(details):
                    continue
                for stream in streams.values():
                    stream.enter(index, config["hidden_size"])
                # Gradients are never wanted, and inference tensors cannot be saved.
                with torch.no_grad():
                    after, detail = visitor.on_block(index, block, streams.get("x"), streams.get("dense"))
                save_file({key: tensor.contiguous() for key, tensor in after.items()}, _block_file(blocks, index))
                details.append(detail)
                _write_state(folder, details, before_s + time.monotonic() - start)
                for stream in streams.values():
                    stream.leave()
                tick(index + 1, note=f"{_worst_error(detail)}{_peak_rss_bytes() / 2**30:.1f} GiB")
        return before_s + time.monotonic() - start, details

    def _streams(
        self, visitor: Visitor, folder: Path, config: dict[str, Any], reader: CheckpointReader, first: bool
    ) -> dict[str, Stream]:
        """The calibration stream by its name, and the dense one where the visitor wants it."""
        if not visitor.needs_data:
            return {}
        assert self.calibration is not None
        tokens_NT = self.calibration.tokens_NT
        embedding_VD = reader.read(self.roles.embedding)
        decoder = Decoder(config, self.roles, tokens_NT.shape[1], embedding_VD.dtype)
        where = folder / "streams"
        where.mkdir(exist_ok=True)
        streams = {name: Stream(decoder, where, tokens_NT, name) for name in ("x", "dense")[: 1 + visitor.wants_dense]}
        if first:
            for stream in streams.values():
                stream.embed(embedding_VD)
        return streams

    def _emit(self, step: BoundStep, details: list[Detail], blocks: Path, output: Path) -> None:
        """Write the step's checkpoint from its blocks, numbered anew where some are left out."""
        reader = CheckpointReader(self.result)
        config = json.loads((self.result / "config.json").read_text(encoding="utf-8"))
        with atomic_directory(output) as partial:
            writer = CheckpointWriter(partial)
            number = 0
            for index in range(config["num_hidden_layers"]):
                prefix = self.roles.block.format(index=index)
                block: Block | None = load_file(_block_file(blocks, index))
                block = step.emit(index, block, lambda prefix=prefix: reader.read_prefix(prefix), details)  # type: ignore[misc,arg-type]
                if block is not None:
                    here = self.roles.block.format(index=number)
                    writer.add({here + layer: tensor for layer, tensor in block.items()})
                    number += 1
            # Blocks beyond the config's depth are dropped: stock vLLM refuses them.
            of_blocks = self.roles.block.partition("{index}")[0]
            for tensor_name in reader.names:
                if not tensor_name.startswith(of_blocks):
                    writer.add(step.emit_outer(tensor_name, reader.read(tensor_name)))
            writer.close()
            _copy_companions(self.result, partial)
            text = json.dumps(step.config(config, details), indent=2) + "\n"
            (partial / "config.json").write_text(text, encoding="utf-8")


def _calibrate(recipe: Recipe, directory: Path) -> Calibration:
    asked = recipe.calibration
    calibration = load_calibration(directory, asked.source, asked.num_samples, asked.sequence_length, asked.seed)
    found = len(calibration.tokens_NT)
    if found < asked.num_samples:
        print_status(f"calibration: only {found} of {asked.num_samples} sequences found in {asked.source}")
    return calibration


def _read_state(folder: Path) -> tuple[list[Detail], float]:
    """Details of the blocks that are done, and the seconds they took."""
    file = folder / "state.json"
    if not file.is_file():
        return [], 0.0
    state = json.loads(file.read_text(encoding="utf-8"))
    return state["blocks"], state["seconds"]


def _write_state(folder: Path, details: list[Detail], seconds: float) -> None:
    write_atomically(folder / "state.json", json.dumps({"seconds": seconds, "blocks": details}))


def _block_file(blocks: Path, index: int) -> Path:
    return blocks / f"block-{index:05d}.safetensors"


def _worst_error(detail: Detail) -> str:
    errors = detail.get("output_error")
    return f"error {max(errors.values()):.3f}, " if errors else ""


def _base_of(model: str, directory: Path) -> BaseModelRecord:
    manifest = read_manifest(directory)
    note = manifest.base.note if manifest else ""
    return BaseModelRecord(model=model, sha256=model_hash(directory), note=note)


def _what_matters(resolved_recipe: dict[str, Any], needs_data: bool) -> dict[str, Any]:
    """The parts of a recipe that the outcome depends on."""
    steps, calibration = resolved_recipe["steps"], resolved_recipe["calibration"]
    if needs_data:
        return {"steps": steps, "calibration": calibration}
    uses_seed = any(step["step"] == "prune" and pruning_method(step["method"]).uses_seed for step in steps)
    return {"steps": steps, **({"seed": calibration["seed"]} if uses_seed else {})}


def _reuse(target: Path, made_of: str, needs_data: bool) -> Path:
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest and {"steps", "calibration"} <= manifest.resolved_recipe.keys():
        source_hash = manifest.calibration.get("source_sha256", "")
        matters = _what_matters(manifest.resolved_recipe, needs_data)
        if made_of == json.dumps([manifest.base.sha256, matters, source_hash], sort_keys=True):
            print_status(f"variant {manifest.name}: reused, built earlier at {target}")
            return target
    raise UserError("output directory", target, "exists and holds something else", "name another, or delete it")


def _place_checkpoint(source: Path, output: Path, is_ours: bool) -> None:
    """Weights, config and companions of a checkpoint: linked from our own work folder, else copied."""
    _copy_companions(source, output)
    index = source / "model.safetensors.index.json"
    for file in [*weight_files(source), source / "config.json", *([index] if index.is_file() else [])]:
        if not (is_ours and _link(file, output / file.name)):
            shutil.copyfile(file, output / file.name)


def _link(file: Path, target: Path) -> bool:
    """Whether a hard link could be made; not every file system has them."""
    try:
        target.hardlink_to(file)
    except OSError:
        return False
    return True


def _copy_companions(source: Path, output: Path) -> None:
    """Copy tokenizer, chat template and generation settings: all but weights, config and manifest."""
    for file in source.iterdir():
        weights = file.suffix in {".safetensors", ".bin", ".gguf", ".pt", ".pth"} or ".safetensors." in file.name
        if file.is_file() and not weights and file.name not in {"config.json", MANIFEST_FILE}:
            shutil.copyfile(file, output / file.name)


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
