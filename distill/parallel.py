"""The student and its optimizer on one process or several, as accelerate wraps them (DDP or FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from slimserve.core.errors import UserError
from slimserve.distill.item_embedding import item_embedding_of
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.student import StudentLoss

_BETAS = (0.9, 0.95)


def current_device() -> torch.device:
    """Return the device of this process: accelerate's, if something has set it up, else a GPU if there is one."""
    from accelerate import PartialState

    return cast("torch.device", PartialState(cpu=not torch.cuda.is_available()).device)


class ParallelStudent:
    """The student with its loss and optimizer, and all operations that depend on the number of processes."""

    def __init__(self, module: StudentLoss, recipe: DistillRecipe) -> None:
        """Wrap `module`; UserError if the recipe or the configuration of accelerate does not suit the processes."""
        from accelerate import Accelerator

        training = recipe.training
        self._accelerator = Accelerator(cpu=current_device().type == "cpu")
        self.rank, self.num_processes = self._accelerator.process_index, self._accelerator.num_processes
        if training.batch_size < self.num_processes:
            raise UserError(
                "training.batch_size",
                training.batch_size,
                f"is less than the {self.num_processes} processes",
                "raise it to at least one sequence per process",
            )
        self.device = self._accelerator.device
        self._is_bf16 = training.is_bf16
        self.module, self.optimizer = self._accelerator.prepare(module, _optimizer(module, recipe))
        if isinstance(self.module, FullyShardedDataParallel):
            raise UserError("fsdp_version", 1, "is not supported", "set it to 2 in the configuration of accelerate")
        if isinstance(self.module, FSDPModule) and item_embedding_of(module):
            raise UserError("items.file", recipe.items.file, "is not supported under FSDP", "use DDP for it")
        if isinstance(self.module, FSDPModule) and any(stage.kind == "on_policy" for stage in recipe.stages):
            raise UserError(
                "stages",
                "on_policy",
                "cannot run under FSDP, because all processes would have to sample equally many tokens",
                "use DDP for it",
            )

    @property
    def is_first(self) -> bool:
        return bool(self.rank == 0)

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        """Context in which products have the recipe's precision."""
        if self._is_bf16:
            return cast("AbstractContextManager[Any]", torch.autocast(self.device.type, dtype=torch.bfloat16))
        return nullcontext()

    @contextmanager
    def plain_student(self) -> Iterator[Any]:
        """Yield the student without wrappers; under FSDP, weights outside its blocks are gathered meanwhile."""
        unwrapped: Any = self._accelerator.unwrap_model(self.module)
        if isinstance(self.module, FSDPModule):
            self.module.unshard()
        try:
            with self.autocast:
                yield unwrapped.student
        finally:
            if isinstance(self.module, FSDPModule):
                self.module.reshard()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def accumulate(self) -> AbstractContextManager[Any]:
        """Context of a backward pass whose gradients are not yet exchanged between processes."""
        return cast("AbstractContextManager[Any]", self._accelerator.no_sync(self.module))

    def clip_gradient(self, max_norm: float) -> float:
        """Scale the gradient down to `max_norm` if it is larger, and return its norm before."""
        norm: Tensor = self._accelerator.clip_grad_norm_(self.module.parameters(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def sum(self, value: float) -> float:
        """Return the sum of a value over all processes."""
        if self.num_processes == 1:
            return value
        total: Tensor = self._accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.device))
        return float(total)

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the concatenated lists of all processes."""
        if self.num_processes == 1:
            return items
        from accelerate.utils import gather_object

        return cast("list[Any]", gather_object(items))

    def trained_weights(self) -> dict[str, Any]:
        """Return the trained weights on the CPU, complete on the first process."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return cast("dict[str, Any]", get_model_state_dict(self.module, options=options))

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights as `trained_weights` returned them."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
        set_model_state_dict(self.module, dict(weights), options=options)

    def gathered_student(self) -> dict[str, Tensor] | None:
        """Return all weights of a student that FSDP has sharded, complete on the first process; otherwise None."""
        if not isinstance(self.module, FSDPModule):
            return None
        weights = get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {
            name.removeprefix("student."): tensor for name, tensor in weights.items() if name.startswith("student.")
        }


def _optimizer(module: nn.Module, recipe: DistillRecipe) -> torch.optim.Optimizer:
    """Return AdamW without weight decay for norms, biases and items.

    `rate_factor` of a group multiplies the schedule's learning rate.
    """
    training, embedding = recipe.training, item_embedding_of(module)
    of_items = embedding.item_parameters() if embedding else []
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    others = [parameter for parameter in trained if not any(parameter is one for one in of_items)]
    groups = [
        {"params": [one for one in others if one.ndim > 1], "weight_decay": training.weight_decay, "rate_factor": 1.0},
        {"params": [one for one in others if one.ndim <= 1], "weight_decay": 0.0, "rate_factor": 1.0},
        {
            "params": of_items,
            "weight_decay": 0.0,
            "rate_factor": recipe.items.learning_rate / training.learning_rate,
        },
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=_BETAS, fused=True)
