"""Files of a build: the progress of each step in the work folder, and the finished variant.

A step keeps its finished blocks, the hidden states of the calibration samples and a small state file. A killed build
therefore resumes after its last finished block, with the same result to the bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from slimserve.compress.checkpoint import CheckpointWriter, open_dense
from slimserve.compress.decoder import Block, decoder_of
from slimserve.compress.steps import Detail
from slimserve.core.model_config import CONFIG_FILE, read_config, read_decoder_config
from slimserve.core.model_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    copy_companions,
    has_derived_tensors,
    read_tensors,
    weight_files,
)
from slimserve.core.storage import write_atomically
from slimserve.core.variant import StepRecord

RESUMABLE = "step-*/state.json"
"""Pattern of the files in a work folder from which a build can resume."""


class StepFolder:
    """Files of one step of a build."""

    def __init__(self, work: Path, name: str) -> None:
        self.path = work / f"step-{name}"
        self.checkpoint = self.path / "checkpoint"
        self.streams = self.path / "streams"
        self._blocks = self.path / "blocks"
        self._state = self.path / "state.json"
        self._record = self.path / "done.json"

    def read_progress(self) -> tuple[list[Detail], float]:
        """Return the details of the finished blocks and the seconds that they took."""
        self._blocks.mkdir(parents=True, exist_ok=True)
        if not self._state.is_file():
            return [], 0.0
        state = json.loads(self._state.read_text(encoding="utf-8"))
        return state["blocks"], state["seconds"]

    def write_progress(self, details: list[Detail], seconds: float) -> None:
        """Record that the blocks of `details` are finished."""
        write_atomically(self._state, json.dumps({"seconds": seconds, "blocks": details}))

    def write_block(self, index: int, block: Block) -> None:
        """Save a finished block; it counts only after `write_progress`."""
        save_file({name: tensor.cpu().contiguous() for name, tensor in block.items()}, self._block_file(index))

    def read_block(self, index: int) -> Block:
        """Return a finished block."""
        block: Block = load_file(self._block_file(index))
        return block

    def read_record(self) -> dict[str, Any] | None:
        """Return the `seconds` and the `detail` of the step; None if the step is not finished."""
        if not self._record.is_file():
            return None
        record: dict[str, Any] = json.loads(self._record.read_text(encoding="utf-8"))
        return record

    def write_record(self, seconds: float, detail: dict[str, Any]) -> None:
        """Record that the step is finished and its checkpoint written."""
        write_atomically(self._record, json.dumps({"seconds": seconds, "detail": detail}))

    def finish(self, step_name: str) -> StepRecord:
        """Delete the blocks and hidden states of a finished step; return its entry in the manifest.

        Only the record makes them superfluous: without it, a killed build resumes from the blocks.
        """
        record = self.read_record()
        assert record is not None
        for leftover in (self._blocks, self.streams):
            shutil.rmtree(leftover, ignore_errors=True)
        return StepRecord(name=step_name, seconds=record["seconds"], detail=record["detail"])

    def _block_file(self, index: int) -> Path:
        return self._blocks / f"block-{index:05d}.safetensors"


def place_checkpoint(source: Path, output: Path, link: bool) -> None:
    """Put weights, config and companion files into the variant.

    With `link`, weight files are hard links where the file system allows it. If the files hold tensors that loaders do
    not read, the weights are written again without them.
    """
    copy_companions(source, output)
    config = read_decoder_config(source)
    reader = open_dense(source, config)
    files = weight_files(source)
    if has_derived_tensors(source) or len(reader.names) < len(read_tensors(source)):
        writer = CheckpointWriter(output, decoder_of(config).stored_name)
        for name in reader.names:
            writer.add({name: reader.read(name)})
        writer.close()
        files = []
    elif files[0].name != WEIGHTS_FILE:
        files.append(source / INDEX_FILE)
    for file in files:
        if not (link and _link(file, output / file.name)):
            shutil.copyfile(file, output / file.name)
    (output / CONFIG_FILE).write_text(json.dumps(read_config(source), indent=2) + "\n", encoding="utf-8")


def _link(file: Path, target: Path) -> bool:
    """Make a hard link if the file system has them; tell whether it was made."""
    try:
        target.hardlink_to(file)
    except OSError:
        return False
    return True
