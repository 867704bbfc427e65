"""The embedding of a student that learns item tokens.

    row of an item = encoder(features of the item) + n / (n + shrinkage) · residual of the item

n is the number of the item's ratings in the training data. An item with few ratings therefore keeps the encoder's row,
and one without any has exactly that row. In a step of the training a share of the items is read as if nobody had rated
them, so that the encoder learns rows for new items, of which only the text is known.

The rating features of an item would include the label that is to be predicted, and a student would trust them more
than it can for other users. The training users are therefore divided into folds, and the sequences of a user read
features without the ratings of the user's fold. In tokens, `fold · N · K` is added to the tokens of such a sequence,
so that the batch needs no further tensor. Fold 0 has the ratings of all training users; it is what validation reads
and what is kept. Shapes: B sequences of T tokens, G folds, N slots, E features of texts, S of ratings, F of both, K
tokens per item, D hidden size, U items of a batch in their folds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimserve.distill.item_encoder import ItemEncoder

_CHUNK = 4096


class ItemEmbedding(nn.Module):
    """Reads ordinary tokens from the student's own embedding, and item tokens from the encoder and the residuals."""

    text_NE: Tensor
    ratings_GNS: Tensor
    keep_N: Tensor

    def __init__(
        self,
        ordinary: nn.Parameter,
        encoder: ItemEncoder,
        text_NE: Tensor,
        ratings_GNS: Tensor,
        num_ratings_N: Tensor,
        first_token: int,
        shrinkage: float,
        unrated_frac: float,
    ) -> None:
        """`ordinary` is the student's embedding; the features of slots without an item are 0."""
        super().__init__()
        num_tokens, hidden_size = encoder.bias_KD.shape
        self.weight = ordinary
        self.encoder_FKD = nn.Parameter(encoder.weight_FKD.clone())
        self.bias_KD = nn.Parameter(encoder.bias_KD.clone())
        self.residual_NKD = nn.Parameter(torch.zeros(len(text_NE), num_tokens, hidden_size))
        # The features follow from the data, so checkpoints do not hold them.
        self.register_buffer("text_NE", text_NE, persistent=False)
        self.register_buffer("ratings_GNS", ratings_GNS, persistent=False)
        self.register_buffer("keep_N", num_ratings_N / (num_ratings_N + shrinkage), persistent=False)
        self._start = encoder
        self._first_token = first_token
        self._unrated_frac = unrated_frac

    def item_parameters(self) -> list[nn.Parameter]:
        """Return what belongs to the items; the rest is the student's own embedding."""
        return [self.encoder_FKD, self.bias_KD, self.residual_NKD]

    def encoder(self) -> ItemEncoder:
        """Return the encoder as it is trained so far."""
        trained = (one.detach().float().cpu().clone() for one in (self.encoder_FKD, self.bias_KD))
        return replace(self._start, **dict(zip(("weight_FKD", "bias_KD"), trained, strict=True)))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        is_item_BT = tokens_BT >= self._first_token
        embedded_BTD = functional.embedding(tokens_BT.masked_fill(is_item_BT, 0), self.weight)
        if not bool(is_item_BT.any()):
            return embedded_BTD
        places_M = tokens_BT[is_item_BT] - self._first_token
        num_tokens = len(self.bias_KD)
        numbers_U, of_M = (places_M // num_tokens).unique(return_inverse=True)
        items_U = numbers_U % len(self.keep_N)
        rows_UKD = self._rows(numbers_U // len(self.keep_N), items_U, self._draw_rated()[items_U])
        embedded_BTD = embedded_BTD.clone()
        embedded_BTD[is_item_BT] = rows_UKD[of_M, places_M % num_tokens].to(embedded_BTD.dtype)
        return embedded_BTD

    def _draw_rated(self) -> Tensor:
        """Return 1 for the items that are read as rated, `[N]`; the same for all micro-batches of a step."""
        if not self.training:
            return torch.ones_like(self.keep_N)
        draw = torch.Generator().manual_seed(torch.initial_seed())
        return (torch.rand(len(self.keep_N), generator=draw) >= self._unrated_frac).to(self.keep_N)

    def _rows(self, folds_U: Tensor, items_U: Tensor, is_rated_U: Tensor) -> Tensor:
        """Return the rows of items in folds, `[U, K, D]`; those that are read as unrated have only their text."""
        features_UF = torch.cat(
            (self.text_NE[items_U], self.ratings_GNS[folds_U, items_U] * is_rated_U[:, None]), dim=1
        )
        with torch.autocast(features_UF.device.type, enabled=False):
            rows_UKD = torch.einsum("uf,fkd->ukd", features_UF, self.encoder_FKD) + self.bias_KD
            return rows_UKD + (self.keep_N[items_U] * is_rated_U)[:, None, None] * self.residual_NKD[items_U]

    @torch.no_grad()
    def all_rows(self) -> Tensor:
        """Return the rows of all slots in the order of their tokens, `[N·K, D]`."""
        numbers_N = torch.arange(len(self.keep_N), device=self.keep_N.device)
        is_rated_N = torch.ones_like(self.keep_N)
        rows = [self._rows(part * 0, part, is_rated_N[part]) for part in numbers_N.split(_CHUNK)]
        return torch.cat(rows).flatten(0, 1)


def item_embedding_of(student: Any) -> ItemEmbedding | None:
    """Return the item embedding of a student, with LoRA adapters or without; None if it learns no items."""
    return next((module for module in student.modules() if isinstance(module, ItemEmbedding)), None)
