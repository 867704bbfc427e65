"""The student with its loss as one module, and the teacher that runs beside it.

Every weight is read inside one forward pass, so that a wrapper such as DDP or FSDP sees every use of it.
Shapes: B rows of T tokens, N targets, D hidden size (D' the teacher's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimserve.distill.batches import Batch
from slimserve.distill.chunked import TeacherPrediction, TeacherStates, TokenLosses, chunked_loss, token_losses
from slimserve.distill.losses import hidden_distance
from slimserve.distill.models import head_of
from slimserve.distill.recipe import LossSettings


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's output for one batch."""

    prediction: TeacherPrediction = None
    hidden: tuple[Tensor, ...] = ()
    """Hidden states `[N, D']` after each matched block."""


class TeacherModel(Protocol):
    """Anything that predicts the next tokens of a batch."""

    def predict(self, batch: Batch) -> TeacherOutput: ...


class StudentLoss(nn.Module):
    """Computes the loss summed over a batch's targets.

    `loss` says whether hidden states are matched; if they are, `teacher_config` gives the teacher's hidden size.
    """

    def __init__(self, student: nn.Module, loss: LossSettings | None = None, teacher_config: Any | None = None) -> None:
        super().__init__()
        self.student = student
        self.matching = loss or LossSettings()
        self._no_split_modules = getattr(student, "_no_split_modules", None)
        """Classes that accelerate's FSDP wraps if its configuration names none."""
        config: Any = student.config
        self.maps: nn.ModuleList = nn.ModuleList()
        if self.matching.hidden_weight:
            assert teacher_config is not None
            if config.hidden_size != teacher_config.hidden_size:
                self.maps.extend(
                    nn.Linear(config.hidden_size, teacher_config.hidden_size, bias=False)
                    for _ in range(self.matching.hidden_pairs)
                )

    def forward(
        self, batch: Batch, teacher: TeacherOutput, loss: LossSettings, is_measuring: bool = False
    ) -> TokenLosses | Tensor:
        """Return the losses summed over the N targets; `total` includes the distance of hidden states.

        With `is_measuring`, return each target's losses instead, `[3, N]` as `token_losses` gives them.
        """
        last, matched = read_states(self.student, batch, self.matching)
        hidden_ND = last.flatten(0, 1)[batch.source_N]
        device = hidden_ND.device.type
        if torch.is_autocast_enabled(device):
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
        compute = token_losses if is_measuring else chunked_loss
        losses = compute(hidden_ND, head_of(self.student), batch.labels_N, teacher.prediction, loss)
        if isinstance(losses, Tensor) or not teacher.hidden:
            return losses
        kind = self.matching.hidden_kind
        distances = [
            hidden_distance(self.maps[pair](ours) if self.maps else ours, theirs, kind).sum()
            for pair, (ours, theirs) in enumerate(zip(matched, teacher.hidden, strict=True))
        ]
        return losses._replace(total=losses.total + self.matching.hidden_weight * torch.stack(distances).mean())


class OnlineTeacher:
    """A frozen teacher that reads every batch itself."""

    def __init__(self, model: nn.Module, loss: LossSettings | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._matching = loss or LossSettings()

    @torch.no_grad()
    def predict(self, batch: Batch) -> TeacherOutput:
        last, matched = read_states(self.model, batch, self._matching)
        states = TeacherStates(last.flatten(0, 1)[batch.source_N], head_of(self.model))
        return TeacherOutput(states, tuple(matched))


def read_states(model: Any, batch: Batch, loss: LossSettings) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the last hidden states `[B, T, D]`, and `[N, D]` after each matched block at the targets' sources."""
    is_matched = loss.hidden_weight > 0
    outputs = model.get_decoder()(
        input_ids=batch.tokens_BT,
        position_ids=batch.positions_BT,
        use_cache=False,
        output_hidden_states=is_matched,
    )
    if not is_matched:
        return outputs.last_hidden_state, ()
    states, num_pairs = outputs.hidden_states, loss.hidden_pairs
    depths = [round(pair * (len(states) - 1) / num_pairs) for pair in range(1, num_pairs + 1)]
    return outputs.last_hidden_state, [states[depth].flatten(0, 1)[batch.source_N] for depth in depths]
