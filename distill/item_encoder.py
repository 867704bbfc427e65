"""The item encoder: a linear map from what is known of an item to its rows in the embedding.

Known of every item is its text, as the mean of a language model's last hidden states over its tokens. Known of an item
that users have rated is also how many did, how many of them liked it, and its factors in a truncated singular value
decomposition of users by items. An item that nobody has rated has zeros there, which are the means of the others, and
a last feature that says so.

The encoder lies in the variant's directory and names the language model, so that new items get their rows without
training. Shapes: N items, T text features, F features, K tokens per item, D hidden size of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimserve.core.catalogue import ENCODER_FILE
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.progress import progress
from slimserve.workloads.baselines import item_factors
from slimserve.workloads.interface import Interaction, hash_number

MAX_TEXT_TOKENS = 256
"""Number of tokens of an item's text that are read."""
_BATCH = 32
_RIDGE = 0.1
"""Penalty of the first map from texts to rows, as a fraction of the mean square of a feature over all items."""
_PSEUDO_COUNTS = 5.0
"""Weight of the overall share of positives in an item's share, in ratings."""


@dataclass(frozen=True)
class ItemEncoder:
    """A trained encoder, as it is kept beside a variant's weights."""

    weight_FKD: Tensor
    bias_KD: Tensor
    mean_T: Tensor
    """Mean of the text features over the items of the training."""
    scale: float
    """Mean distance of the text features of an item from their means, so that those of an item have a length of 1."""
    text_model: str
    """Argument of the language model that reads the items' texts."""
    text_model_sha256: str

    def rows(self, states_NT: Tensor) -> Tensor:
        """Return the rows of items of which only the text is known, `[N, K, D]`."""
        text_NT = (states_NT - self.mean_T) / self.scale
        return torch.einsum("nt,tkd->nkd", text_NT, self.weight_FKD[: len(self.mean_T)]) + self.bias_KD

    def save(self, directory: Path) -> None:
        """Write the encoder into a variant's directory."""
        tensors = {"weight": self.weight_FKD, "bias": self.bias_KD, "mean": self.mean_T}
        tensors["scale"] = torch.tensor(self.scale)
        metadata = {"text_model": self.text_model, "text_model_sha256": self.text_model_sha256}
        file = directory / ENCODER_FILE
        file.parent.mkdir(exist_ok=True)
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, file, metadata)


def load_encoder(directory: Path) -> ItemEncoder:
    """Read the encoder of a variant. Raises UserError if there is none or its file is broken."""
    file = directory / ENCODER_FILE
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in ("weight", "bias", "mean", "scale")}
            names = stored.metadata()
        return ItemEncoder(
            tensors["weight"],
            tensors["bias"],
            tensors["mean"],
            float(tensors["scale"]),
            names["text_model"],
            names["text_model_sha256"],
        )
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(
            "item encoder", file, f"cannot be read ({error})", "give a variant that was trained with items.file"
        ) from error


@torch.no_grad()
def text_states(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the mean of a language model's last hidden states over the tokens of each text, `[N, T]` float32."""
    tokens = [tokenizer(text)["input_ids"][:MAX_TEXT_TOKENS] for text in texts]
    order = sorted(range(len(tokens)), key=lambda number: len(tokens[number]))
    states_NT = torch.zeros(len(tokens), model.config.hidden_size)
    decoder, device = model.get_decoder(), next(model.parameters()).device
    with progress("item texts", len(order), "items") as tick:
        for begin in range(0, len(order), _BATCH):
            chosen = order[begin : begin + _BATCH]
            longest = len(tokens[chosen[-1]])
            # Padding is on the right, where causal attention never looks.
            rows_BT = torch.tensor([tokens[n] + [0] * (longest - len(tokens[n])) for n in chosen], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=probe_hardware().has_bf16_products):
                hidden_BTD = decoder(input_ids=rows_BT, use_cache=False).last_hidden_state.float().cpu()
            for number, hidden_TD in zip(chosen, hidden_BTD, strict=True):
                states_NT[number] = hidden_TD[: len(tokens[number])].mean(0)
            tick(begin + len(chosen))
    return states_NT


def folded_features(
    ids: Sequence[str], interactions: Sequence[Interaction], num_factors: int, num_folds: int
) -> Tensor:
    """Return the features of items from all ratings, and from those without each fold of users, `[1 + folds, N, S]`.

    The factors of a fold are rotated onto those of all ratings (orthogonal Procrustes), because a decomposition of
    other data has its factors in another order and with other signs.
    """
    every = interaction_features(ids, interactions, num_factors)
    folds = {group: fold_of(group, num_folds) for group in {one.group for one in interactions}}
    features = [every]
    for fold in range(1, num_folds + 1):
        without = [one for one in interactions if folds[one.group] != fold]
        part = interaction_features(ids, without, num_factors)
        factors = slice(2, 2 + num_factors)
        left, _, right = torch.linalg.svd(part[:, factors].T @ every[:, factors])
        part[:, factors] = part[:, factors] @ (left @ right)
        features.append(part)
    return torch.stack(features)


def fold_of(group: int, num_folds: int) -> int:
    """Return the fold of a training user, from 1 on; 0 without folds."""
    return 1 + hash_number(f"fold {group}") % num_folds if num_folds else 0


def interaction_features(ids: Sequence[str], interactions: Sequence[Interaction], num_factors: int) -> Tensor:
    """Return the features of items from their ratings, `[N, num_factors + 3]` float32.

    They are the log-odds of a positive rating, the logarithm of the number of ratings, the factors, and 1 for an item
    with ratings. All but the last have mean 0 over the items with ratings; an item without ratings has zeros.
    """
    place = {item: number for number, item in enumerate(ids)}
    known = [one for one in interactions if one.item in place]
    cells = torch.tensor([2 * place[one.item] + one.is_positive for one in known], dtype=torch.int64)
    counts_N2 = torch.bincount(cells, minlength=2 * len(ids)).reshape(-1, 2).float()
    totals_N = counts_N2.sum(1)
    features = torch.zeros(len(ids), num_factors + 3)
    is_rated_N = totals_N > 0
    if not bool(is_rated_N.any()):
        return features
    rate = float(counts_N2[:, 1].sum() / totals_N.sum())
    smoothed_N2 = counts_N2 + _PSEUDO_COUNTS * torch.tensor([1 - rate, rate])
    columns = [(smoothed_N2[:, 1] / smoothed_N2[:, 0]).log()[:, None], totals_N.clamp_min(1).log()[:, None]]
    factors_NR = torch.from_numpy(item_factors(known, ids, num_factors)).float()
    for begin, part in ((0, columns[0]), (1, columns[1]), (2, factors_NR)):
        centred = part - part[is_rated_N].mean(0)
        # One scale for all factors, because those of little strength would otherwise become as large as the others.
        features[:, begin : begin + part.shape[1]] = centred / centred[is_rated_N].std().clamp_min(1e-6)
    features[:, -1] = 1
    return features * is_rated_N[:, None]


def count_ratings(ids: Sequence[str], interactions: Sequence[Interaction]) -> Tensor:
    """Return the number of ratings of each item, `[N]` float32."""
    place = {item: number for number, item in enumerate(ids)}
    numbers = [place[one.item] for one in interactions if one.item in place]
    return torch.bincount(torch.tensor(numbers, dtype=torch.int64), minlength=len(ids)).float()


def first_map(text_NT: Tensor, targets_NKD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ridge regression of rows on standardized text features: `[T, K, D]` and the bias `[K, D]`."""
    bias_KD = targets_NKD.mean(0)
    rows_NR = (targets_NKD - bias_KD).flatten(1).double()
    x_NT = text_NT.double()
    gram_TT = x_NT.T @ x_NT
    gram_TT.diagonal().add_(_RIDGE * gram_TT.diagonal().mean())
    weight_TR = torch.linalg.solve(gram_TT, x_NT.T @ rows_NR)
    return weight_TR.reshape(-1, *bias_KD.shape).float(), bias_KD


def piece_means(embedding_VD: Tensor, tokens: Sequence[int], num_pieces: int) -> Tensor:
    """Return the mean token embedding of each of `num_pieces` equal pieces of a text, `[K, D]`.

    A piece of a text that has fewer tokens than pieces repeats its neighbour; a text without tokens has zeros.
    """
    if not tokens:
        return embedding_VD.new_zeros(num_pieces, embedding_VD.shape[1])
    rows_LD = embedding_VD[list(tokens)]
    bounds = [number * len(rows_LD) / num_pieces for number in range(num_pieces + 1)]
    pieces = [rows_LD[int(begin) : max(int(end), int(begin) + 1)] for begin, end in pairwise(bounds)]
    return torch.stack([piece.mean(0) for piece in pieces])
