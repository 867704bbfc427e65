"""Reads and writes safetensors one decoder block at a time, so that memory holds a block and a shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimserve.compress.decoder import decoder_of
from slimserve.core.errors import UserError
from slimserve.core.model_files import INDEX_FILE, WEIGHTS_FILE, read_tensors

_FLOAT_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_SHARD_BYTES = 2**29
"""Maximum bytes of a shard; a shard is in memory twice while it is written."""


class CheckpointReader:
    """Reads single tensors of a model directory by name; `names` leaves out what loaders do not read either."""

    def __init__(
        self,
        directory: Path,
        names: Container[str] | None = None,
        rename: Callable[[str], str] = lambda name: name,
    ) -> None:
        """Read the headers; `names` are the tensors that belong to the model, None stands for all.

        `rename` gives the name under which a tensor is read from the name that it has in the files.
        """
        headers = read_tensors(directory)
        self._stored = {rename(stored): stored for stored in headers}
        self._tensors = {
            name: headers[stored] for name, stored in self._stored.items() if names is None or name in names
        }

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """Return one tensor. Raises UserError with its name if it is missing or contains NaN or infinity."""
        if name not in self._tensors:
            raise UserError("weights", name, "is missing from the checkpoint", "check the sizes in config.json")
        with safe_open(self._tensors[name].file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(self._stored[name])
        if (
            tensor.dtype in _FLOAT_DTYPES
            and tensor.numel()
            and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
        ):
            raise UserError("weights", name, "contains NaN or infinity", "use a model with finite weights")
        return tensor

    def read_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return all tensors whose names begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): self.read(name) for name in self._tensors if name.startswith(prefix)}


def open_dense(directory: Path, config: Mapping[str, Any]) -> CheckpointReader:
    """Return a reader by the names of transformers' modules; of a quantized model it returns every tensor."""
    decoder = decoder_of(config)
    names = None if "quantization_config" in config else decoder.shapes
    return CheckpointReader(directory, names, decoder.module_name)


class CheckpointWriter:
    """Writes tensors as safetensors shards of about 0.5 GiB, with an index if there are several."""

    def __init__(self, directory: Path, rename: Callable[[str], str] = lambda name: name) -> None:
        """Write into `directory`; `rename` gives the name in the files from that of transformers' modules."""
        self._directory, self._rename = directory, rename
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors by their full names; full shards are written immediately."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > _SHARD_BYTES:
                self._flush()
            self._pending[self._rename(name)] = tensor.contiguous()
            self._pending_bytes += size

    def close(self) -> None:
        """Write the last shard and give all shards their final names; several shards get an index."""
        self._flush()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self._directory / WEIGHTS_FILE)
            return
        weight_map = {}
        for number, (shard, names) in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            shard.rename(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2)
        (self._directory / INDEX_FILE).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if not self._pending:
            return
        shard = self._directory / f"shard-{len(self._shards)}.safetensors"
        save_file(self._pending, shard, metadata={"format": "pt"})
        self._shards.append((shard, list(self._pending)))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def iterate_blocks(
    reader: CheckpointReader, prefix_template: str, num_blocks: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the prefix and the tensors of each decoder block in order; UserError names a missing block."""
    for index in range(num_blocks):
        prefix = prefix_template.format(index=index)
        block = reader.read_prefix(prefix)
        if not block:
            raise UserError(
                "weights", prefix, "is missing from the checkpoint", "check num_hidden_layers in config.json"
            )
        yield prefix, block
