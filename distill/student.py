"""The student with its loss as one module.

Everything that reads a weight happens inside one forward pass, so that what wraps the module, as DDP or FSDP does, sees
every use of it. Shapes: B rows of T tokens, N targets, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimserve.distill.batches import Batch
from slimserve.distill.chunked import Teacher, TeacherStates, TokenLosses, chunked_loss, token_losses
from slimserve.distill.losses import LossSettings, hidden_distance
from slimserve.distill.models import head_of


@dataclass(frozen=True)
class HiddenSettings:
    """Hidden-state matching, for students that were cut out of their teacher."""

    weight: float = 0.0
    """Of the distance beside the loss; 0 turns it off."""
    kind: Literal["cosine", "mse"] = "cosine"
    num_pairs: int = 1
    """Blocks that are matched, at even depths, the last one always."""


@dataclass(frozen=True)
class Guidance:
    """What a teacher says of one batch."""

    teacher: Teacher = None
    hidden: tuple[Tensor, ...] = ()
    """Its hidden states `[N, D']` after the matched blocks."""


class StudentLoss(nn.Module):
    """Sums of the loss over a batch's targets."""

    def __init__(
        self, student: nn.Module, hidden: HiddenSettings | None = None, teacher_config: Any | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.hidden = hidden or HiddenSettings()
        self._no_split_modules = getattr(student, "_no_split_modules", None)
        """What accelerate's FSDP divides by itself where its configuration names no classes."""
        config: Any = student.config
        self.maps: nn.ModuleList = nn.ModuleList()
        if self.hidden.weight:
            assert teacher_config is not None
            if config.hidden_size != teacher_config.hidden_size:
                self.maps.extend(
                    nn.Linear(config.hidden_size, teacher_config.hidden_size, bias=False)
                    for _ in range(self.hidden.num_pairs)
                )

    def forward(
        self, batch: Batch, guidance: Guidance, settings: LossSettings, is_measuring: bool = False
    ) -> TokenLosses | Tensor:
        """Sums over the batch's N targets; the distance of hidden states is part of `total`.

        `is_measuring`: each target's losses instead, `[3, N]` as `token_losses` gives them.
        """
        last, matched = read_states(self.student, batch, self.hidden)
        hidden_ND = last.flatten(0, 1)[batch.before_N]
        device = hidden_ND.device.type
        if torch.is_autocast_enabled(device):
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
        if is_measuring:
            return token_losses(hidden_ND, head_of(self.student), batch.labels_N, guidance.teacher, settings)
        losses = chunked_loss(hidden_ND, head_of(self.student), batch.labels_N, guidance.teacher, settings)
        if not guidance.hidden:
            return losses
        distance = torch.stack(
            [
                hidden_distance(self.maps[pair](ours) if self.maps else ours, theirs, self.hidden.kind).sum()
                for pair, (ours, theirs) in enumerate(zip(matched, guidance.hidden, strict=True))
            ]
        ).mean()
        return losses._replace(total=losses.total + self.hidden.weight * distance)


class OnlineTeacher:
    """A teacher that reads every batch itself; frozen."""

    def __init__(self, model: nn.Module, hidden: HiddenSettings | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._hidden = hidden or HiddenSettings()

    @torch.no_grad()
    def guide(self, batch: Batch) -> Guidance:
        last, matched = read_states(self.model, batch, self._hidden)
        states = TeacherStates(last.flatten(0, 1)[batch.before_N], head_of(self.model))
        return Guidance(states, tuple(matched))


def read_states(model: Any, batch: Batch, hidden: HiddenSettings) -> tuple[Tensor, Sequence[Tensor]]:
    """The last hidden states `[B, T, D]`, and those `[N, D]` before the targets after each matched block."""
    is_matched = hidden.weight > 0
    outputs = model.get_decoder()(
        input_ids=batch.tokens_BT,
        position_ids=batch.positions_BT,
        use_cache=False,
        output_hidden_states=is_matched,
    )
    if not is_matched:
        return outputs.last_hidden_state, ()
    states, num_pairs = outputs.hidden_states, hidden.num_pairs
    depths = [round(pair * (len(states) - 1) / num_pairs) for pair in range(1, num_pairs + 1)]
    return outputs.last_hidden_state, [states[depth].flatten(0, 1)[batch.before_N] for depth in depths]
