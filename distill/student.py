"""The student with its loss as one module, and the teacher that runs beside it.

Every weight is read inside one forward pass, so that a wrapper such as DDP or FSDP sees every use of it.
Shapes: B rows of T tokens, N targets, D hidden size (D' the teacher's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from slimserve.distill.batches import Batch
from slimserve.distill.chunked import (
    TeacherMixture,
    TeacherPrediction,
    TeacherStates,
    TokenLosses,
    chunked_loss,
    token_losses,
)
from slimserve.distill.cost import ModelShape
from slimserve.distill.losses import hidden_distance
from slimserve.distill.models import head_of
from slimserve.distill.ranking import listwise_loss, log_odds, teacher_log_odds
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

    def flops(self, batch: Batch) -> float:
        """Return the FLOPs of a prediction."""
        ...


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
        head_VD, lists = head_of(self.student), batch.lists
        labels = lists.targets(batch.labels_N, loss) if lists else batch.labels_N
        losses = compute(hidden_ND, head_VD, labels, teacher.prediction, loss)
        if lists and loss.list_weight:
            theirs = teacher_log_odds(teacher.prediction, lists, loss.temperature)
            shares = lists.shares(batch.labels_N, loss)
            of_lists = listwise_loss(log_odds(hidden_ND, head_VD, lists), shares, lists.is_label_MK, theirs, loss)
            # A list counts once for each of its labels, so that every target has a loss of its own.
            of_labels = (loss.list_weight * of_lists[:, None]).expand_as(lists.is_label_MK)[lists.is_label_MK]
            if isinstance(losses, Tensor):
                losses[0].index_add_(0, lists.target_MK[lists.is_label_MK], of_labels)
            else:
                losses = losses._replace(total=losses.total + of_labels.sum())
        if isinstance(losses, Tensor) or not teacher.hidden:
            return losses
        kind = self.matching.hidden_kind
        distances = [
            hidden_distance(self.maps[pair](ours) if self.maps else ours, theirs, kind).sum()
            for pair, (ours, theirs) in enumerate(zip(matched, teacher.hidden, strict=True))
        ]
        return losses._replace(total=losses.total + self.matching.hidden_weight * torch.stack(distances).mean())


class OnlineTeacher:
    """A frozen teacher that reads every batch itself, or several with weights.

    `further` are the teachers after the first one, whose weight is the rest. Only the first one's hidden states are
    matched.
    """

    def __init__(
        self, model: nn.Module, loss: LossSettings | None = None, further: Sequence[tuple[nn.Module, float]] = ()
    ) -> None:
        self._models: list[Any] = [one.eval().requires_grad_(False) for one in (model, *(one for one, _ in further))]
        self._weights = (1 - sum(weight for _, weight in further), *(weight for _, weight in further))
        self._matching = loss or LossSettings()
        self._shapes = [ModelShape.of(one.config.to_dict()) for one in self._models]

    @property
    def model(self) -> Any:
        """The first teacher."""
        return self._models[0]

    @property
    def config(self) -> Any:
        """Configuration of the first teacher."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        return cast("torch.device", next(self._models[0].parameters()).device)

    def to(self, device: torch.device | str) -> None:
        """Move all teachers to `device`."""
        for model in self._models:
            model.to(device)

    @torch.no_grad()
    def predict(self, batch: Batch) -> TeacherOutput:
        batch = batch.for_teacher
        outputs = [
            read_states(model, batch, self._matching if number == 0 else LossSettings())
            for number, model in enumerate(self._models)
        ]
        parts = tuple(
            TeacherStates(last.flatten(0, 1)[batch.source_N], head_of(model))
            for model, (last, _) in zip(self._models, outputs, strict=True)
        )
        prediction = parts[0] if len(parts) == 1 else TeacherMixture(parts, self._weights)
        return TeacherOutput(prediction, tuple(outputs[0][1]))

    def flops(self, batch: Batch) -> float:
        return sum(shape.forward_flops(batch.for_teacher.lengths, batch.num_targets) for shape in self._shapes)


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
