"""What a killed run goes on from, as safetensors and JSON: nothing here is unpickled.

No random state is kept: every step seeds its own. Written under a new name and renamed, with the old state kept until
then, so that a run killed while it writes goes on from the state before. Torch's own distributed state dictionaries
name parameters and moments alike whether the module is wrapped or not, so a run may go on with another number of
processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from slimserve.core.errors import UserError
from slimserve.core.storage import write_remedy

_STATE = "state"


@dataclass
class Progress:
    """Where a run is; plain JSON."""

    key: str
    """Of what the run was asked for; a state of another key is not gone on from."""
    stage: int = 0
    step: int = 0
    """Steps done of the stage."""
    best_loss: float | None = None
    best_step: int = 0
    """Counted over all stages."""
    tokens_read: int = 0
    targets: int = 0
    flops: float = 0.0
    train_s: float = 0.0
    peak_bytes: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """A row per validation."""


def save_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Keep everything that decides what the next step will be."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, moments = get_state_dict(module, _inner(optimizer), options=options)
    if not _is_first():
        return
    tensors = {f"weights/{name}": value for name, value in _once(weights).items()}
    for parameter, of_parameter in moments["state"].items():
        tensors |= {f"moments/{parameter}/{name}": tensor for name, tensor in of_parameter.items()}
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    partial = folder / f".{_STATE}.partial"
    old = folder / f".{_STATE}.old"
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "tensors.safetensors")
        text = json.dumps({"progress": asdict(progress), "groups": moments["param_groups"]})
        (partial / "progress.json").write_text(text, encoding="utf-8")
        final = folder / _STATE
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            "training state",
            folder,
            f"could not be written ({getattr(error, 'strerror', None) or error})",
            f"{write_remedy(error)} and run the same command again: it goes on from the last whole state",
        ) from error


def load_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> Progress | None:
    """Put a kept state back and say where it was; None where there is none of this key."""
    place = next((place for place in (folder / _STATE, folder / f".{_STATE}.old") if place.is_dir()), None)
    if place is None:
        return None
    try:
        told = json.loads((place / "progress.json").read_text(encoding="utf-8"))
        if told["progress"]["key"] != key:
            return None
        tensors = load_file(place / "tensors.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            "training state", place, f"cannot be read ({error})", f"delete {folder} to begin anew"
        ) from error
    weights = {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "moments":
            parameter, _, moment = rest.rpartition("/")
            moments.setdefault(parameter, {})[moment] = value
    optimizer_state = {"state": moments, "param_groups": told["groups"]}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
    set_state_dict(
        module, _inner(optimizer), model_state_dict=weights, optim_state_dict=optimizer_state, options=options
    )
    return Progress(**told["progress"])


def _once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights under their first name only."""
    seen: set[int] = set()
    found = {}
    for name, tensor in weights.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor
    return found


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, which accelerate wraps."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
