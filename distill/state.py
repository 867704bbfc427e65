"""Checkpoints of a training as safetensors and JSON, so that nothing is unpickled.

A checkpoint holds weights, optimizer moments and the state of each component. It holds no random state, because every
step sets its own seed. A new checkpoint is written under another name and renamed; the old one is kept until then. A
run that is killed while it writes therefore resumes from the old one. Torch's distributed state dictionaries name
parameters alike in wrapped and plain modules, so a run may resume with another number of processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from slimserve.core.errors import UserError
from slimserve.core.storage import write_remedy

_FOLDER = "state"
_FORMAT = 2
_COMPONENTS_FILE = "progress.json"
RESUMABLE = f"*/{_COMPONENTS_FILE}"
"""Pattern of a file in the work folder that exists once there is a checkpoint or a served teacher's first answers."""


def save_state(
    folder: Path, key: str, module: nn.Module, optimizer: torch.optim.Optimizer, components: Mapping[str, Stateful]
) -> None:
    """Write a checkpoint of everything that determines the next step; only the first process writes.

    `key` identifies the run. Raises UserError if the checkpoint cannot be written.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, optimizer_state = get_state_dict(module, _inner(optimizer), options=options)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    tensors = {f"weights/{name}": value for name, value in _without_ties(weights).items()}
    for parameter, moments in optimizer_state["state"].items():
        tensors |= {f"moments/{parameter}/{name}": tensor for name, tensor in moments.items()}
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    document = {
        "format": _FORMAT,
        "key": key,
        "components": {name: component.state_dict() for name, component in components.items()},
        "groups": optimizer_state["param_groups"],
    }
    partial, old, final = folder / f".{_FOLDER}.partial", folder / f".{_FOLDER}.old", folder / _FOLDER
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "tensors.safetensors")
        (partial / _COMPONENTS_FILE).write_text(json.dumps(document), encoding="utf-8")
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise write_error("training state", folder, error) from error


def load_state(
    folder: Path, key: str, module: nn.Module, optimizer: torch.optim.Optimizer, components: Mapping[str, Stateful]
) -> bool:
    """Restore the checkpoint of the run `key`; False if there is none of this run and format.

    Raises UserError if the checkpoint cannot be read.
    """
    place = next((place for place in (folder / _FOLDER, folder / f".{_FOLDER}.old") if place.is_dir()), None)
    if place is None:
        return False
    try:
        document = json.loads((place / _COMPONENTS_FILE).read_text(encoding="utf-8"))
        if (document.get("format"), document.get("key")) != (_FORMAT, key):
            return False
        tensors = load_file(place / "tensors.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            "training state", place, f"cannot be read ({error})", f"delete {folder} to start again"
        ) from error
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "weights":
            weights[rest] = value
        else:
            parameter, _, moment = rest.rpartition("/")
            moments.setdefault(parameter, {})[moment] = value
    set_state_dict(
        module,
        _inner(optimizer),
        model_state_dict=weights,
        optim_state_dict={"state": moments, "param_groups": document["groups"]},
        options=StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False),
    )
    for name, component in components.items():
        component.load_state_dict(document["components"][name])
    return True


def write_error(field: str, folder: Path, error: Exception) -> UserError:
    """Return the UserError for a failed write to a run's work folder."""
    return UserError(
        field,
        folder,
        f"could not be written ({getattr(error, 'strerror', None) or error})",
        f"{write_remedy(error)} and run the same command again: it resumes from the last checkpoint",
    )


def _without_ties(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep tied weights under their first name only."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in weights.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor
    return kept


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
