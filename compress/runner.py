"""Runs the steps of a recipe: for each step one walk over the blocks of a checkpoint, which writes the next checkpoint.

Memory holds one block at a time, whatever the model's size.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimserve.compress.artifacts import StepFolder
from slimserve.compress.calibration import CalibrationData, short_sequences
from slimserve.compress.checkpoint import CheckpointReader, CheckpointWriter, iterate_blocks, open_dense
from slimserve.compress.decoder import Block, decoder_of
from slimserve.compress.device import moved
from slimserve.compress.steps import BoundStep, Detail, Visitor
from slimserve.compress.stream import Stream
from slimserve.core.hardware import probe_hardware
from slimserve.core.model_config import CONFIG_FILE, read_decoder_config
from slimserve.core.model_files import copy_companions, count_parameters
from slimserve.core.progress import print_status, progress
from slimserve.core.storage import atomic_directory
from slimserve.core.variant import StepRecord

BetweenRounds = Callable[[Path], Path]
"""Gets the checkpoint after a step; returns the one to continue with, such as a distilled one."""


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RunResult:
    """Outcome of all steps."""

    checkpoint: Path
    num_parameters: int
    """Parameters before quantization."""
    records: list[StepRecord]


@dataclass(frozen=True)
class StepRunner:
    """Runs steps one after the other, each in its own folder under `work`."""

    name: str
    """Name of the variant, for status lines."""
    work: Path
    calibration: CalibrationData | None
    between_rounds: BetweenRounds | None
    device: torch.device = _CPU
    """Device on which the blocks, their Hessians and the rounding are computed."""

    def run(self, directory: Path, steps: Sequence[BoundStep]) -> RunResult:
        """Apply all steps to the model in `directory`; finished steps and blocks of an earlier run are kept."""
        checkpoint, num_parameters = directory, count_parameters(directory)
        records: list[StepRecord] = []
        for number, step in enumerate(steps):
            folder = StepFolder(self.work, str(number))
            title = f"{self.name}: {step.name} ({number + 1} of {len(steps)})"
            if folder.read_record() is None:
                walk_s, details = self.walk(title, checkpoint, step, folder)
                start = time.monotonic()
                self._write_checkpoint(checkpoint, step, details, folder)
                folder.write_record(walk_s + time.monotonic() - start, step.describe(details))
            records.append(folder.finish(step.name))
            if "fallback" in records[-1].detail:
                print_status(f"{title}: {records[-1].detail['fallback']}")
            checkpoint = folder.checkpoint
            if step.name != "quantize":
                num_parameters = count_parameters(checkpoint)
            if self.between_rounds and number + 1 < len(steps):
                checkpoint = self.between_rounds(checkpoint)
        return RunResult(checkpoint, num_parameters, records)

    def walk(self, title: str, checkpoint: Path, visitor: Visitor, folder: StepFolder) -> tuple[float, list[Detail]]:
        """Show every block to `visitor`, save what it returns in `folder`; return the seconds and the details."""
        start = time.monotonic()
        config = read_decoder_config(checkpoint)
        reader = open_dense(checkpoint, config)
        num_blocks = config["num_hidden_layers"]
        details, before_s = folder.read_progress()
        if details:
            print_status(f"{title}: resumed after block {len(details)} of {num_blocks}")
        streams = self._streams(visitor, folder, config, reader, is_first=not details)
        with progress(title, num_blocks, "blocks") as tick:
            for index, (_, block) in enumerate(iterate_blocks(reader, decoder_of(config).block, num_blocks)):
                if index < len(details):
                    continue
                for stream in streams.values():
                    stream.enter(index)
                # No step needs gradients; inference mode is not possible because inference tensors cannot be saved.
                with torch.no_grad():
                    after, detail = visitor.on_block(
                        index, moved(block, self.device), streams.get("x"), streams.get("dense")
                    )
                folder.write_block(index, after)
                details.append(detail)
                folder.write_progress(details, before_s + time.monotonic() - start)
                for stream in streams.values():
                    stream.leave()
                tick(index + 1, note=f"{_worst_error(detail)}{peak_rss_bytes() / 2**30:.1f} GiB")
        return before_s + time.monotonic() - start, details

    def _streams(
        self, visitor: Visitor, folder: StepFolder, config: dict[str, Any], reader: CheckpointReader, is_first: bool
    ) -> dict[str, Stream]:
        """Return the calibration stream `x` and, if the visitor wants it, the `dense` one."""
        if not visitor.needs_data:
            return {}
        assert self.calibration is not None
        tokens_NT = self.calibration.tokens_NT
        outer = {name: reader.read(name) for name in decoder_of(config).outer_names if name in reader.names}
        stored = outer[decoder_of(config).embedding].dtype
        has_products = self.device.type == "cuda" or probe_hardware().has_bf16_products
        decoder = decoder_of(config, stored if has_products else torch.float32, self.device)
        outer = moved(outer, self.device) if is_first else {}
        folder.streams.mkdir(exist_ok=True)
        names = ("x", "dense") if visitor.wants_dense else ("x",)
        short_MS = short_sequences(tokens_NT) if visitor.wants_short else None
        streams = {name: Stream(decoder, folder.streams, tokens_NT, name, short_MS) for name in names}
        if is_first:
            for stream in streams.values():
                stream.embed(outer)
        return streams

    def _write_checkpoint(self, before: Path, step: BoundStep, details: list[Detail], folder: StepFolder) -> None:
        """Write the step's checkpoint from its blocks, renumbered if some are left out."""
        config = read_decoder_config(before)
        reader, decoder = open_dense(before, config), decoder_of(config)
        with atomic_directory(folder.checkpoint) as output:
            writer = CheckpointWriter(output, decoder.stored_name)
            num_written = 0
            for index in range(config["num_hidden_layers"]):
                prefix = decoder.block.format(index=index)

                def original(prefix: str = prefix) -> Block:
                    return reader.read_prefix(prefix)

                block = step.emit(index, folder.read_block(index), original, details)
                if block is not None:
                    new_prefix = decoder.block.format(index=num_written)
                    writer.add({new_prefix + name: tensor for name, tensor in block.items()})
                    num_written += 1
            blocks_prefix = decoder.block.partition("{index}")[0]
            for name in reader.names:
                if not name.startswith(blocks_prefix):
                    writer.add(step.emit_outer(name, reader.read(name)))
            writer.close()
            copy_companions(before, output)
            text = json.dumps(step.config(config, details), indent=2) + "\n"
            (output / CONFIG_FILE).write_text(text, encoding="utf-8")


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _worst_error(detail: Detail) -> str:
    errors = detail.get("output_error")
    return f"error {max(errors.values()):.3f}, " if errors else ""
