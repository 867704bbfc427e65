"""Checkpoints whose vocabulary has item tokens: growing a model, replacing rows, and checking them.

Item tokens are further rows of the embedding, so every loader reads them. They are only ever read. The output layer,
untied if it was tied, gives all of them one row, the mean of some rows of ordinary tokens. Their logit is therefore a
mean of ordinary logits, which is below the largest one whatever the hidden state is: greedy decoding never picks them.
A mask or a bias would say so more directly, but neither transformers nor vLLM reads one from a checkpoint of a Llama.

The mean is over the rows nearest in direction to the mean of all rows. In trained models these are tokens that hardly
occur: in SmolLM2-135M their mean logit is 17 to 23 nats below the logarithm of the softmax's denominator, that of all
rows 13 to 19 nats. Two thousand items take at most 1e-4 of the probability there.

Shapes: V vocabulary, D hidden size, R rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from slimserve.core.catalogue import CATALOGUE_FILE, Catalogue, check_tokens, token_text
from slimserve.core.errors import UserError
from slimserve.core.model import EMBEDDING
from slimserve.core.model_files import read_tensors
from slimserve.core.storage import atomic_file
from slimserve.core.tokenizer import load_tokenizer

_MULTIPLE = 64
"""The vocabulary's size is a multiple of this number, which vLLM and matrix products on GPUs pad it to."""
_HEAD = "lm_head.weight"
_TOKENIZER_FILE = "tokenizer.json"
_NUM_AVERAGED = 64
"""Number of ordinary rows whose mean is the output row of the item tokens."""
_TOLERANCE = 2**-6
"""Effect of rounding to bfloat16 on a product of rows, as a fraction."""


def padded_size(num_tokens: int) -> int:
    """Return the size of a vocabulary with room for `num_tokens` tokens."""
    return -(-num_tokens // _MULTIPLE) * _MULTIPLE


def add_item_tokens(tokenizer: Any, num_tokens: int) -> int:
    """Add the item tokens to a tokenizer in memory, and return the first one."""
    tokens = [_added_token(number) for number in range(num_tokens)]
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend.add_tokens(tokens)
    return int(backend.token_to_id(token_text(0)))


def write_item_tokens(directory: Path, num_tokens: int) -> None:
    """Add the item tokens to the tokenizer.json of a directory. Raises UserError if it has no such file."""
    file = directory / _TOKENIZER_FILE
    if not file.is_file():
        raise UserError("tokenizer", directory, f"has no {_TOKENIZER_FILE}", "use a model with a fast tokenizer")
    tokenizer = Tokenizer.from_file(str(file))
    add_item_tokens(tokenizer, num_tokens)
    tokenizer.save(str(file))


@torch.no_grad()
def grow_vocabulary(model: Any, rows_RD: Tensor, first_token: int, num_tokens: int) -> None:
    """Give a transformers model `num_tokens` item tokens in place; `rows_RD` are the rows of the first R of them."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    size = padded_size(first_token + num_tokens)
    grown = embedding.new_zeros(size, embedding.shape[1])
    grown[:first_token] = embedding[:first_token]
    grown[first_token : first_token + len(rows_RD)] = rows_RD
    grown_head = head.new_empty(size, head.shape[1])
    grown_head[:first_token] = head[:first_token]
    new_embedding, new_head = nn.Embedding(1, 1), nn.Linear(1, 1, bias=False)
    new_embedding.weight, new_head.weight = nn.Parameter(grown), nn.Parameter(grown_head)
    new_embedding.num_embeddings, new_embedding.embedding_dim = grown.shape
    new_head.out_features, new_head.in_features = grown_head.shape
    model.set_input_embeddings(new_embedding)
    model.set_output_embeddings(new_head)
    model.config.vocab_size, model.config.tie_word_embeddings = size, False
    reset_item_outputs(model, first_token)


def replace_rows(directory: Path, rows: dict[int, Tensor]) -> None:
    """Write rows of the embedding by their tokens; a reader sees the old file or the complete new one."""
    headers = read_tensors(directory)
    if EMBEDDING not in headers:
        raise UserError("weights", EMBEDDING, f"is missing from {directory}", "give a variant with item tokens")
    file = headers[EMBEDDING].file.resolve()
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    embedding = tensors[EMBEDDING].clone()
    for token, row in rows.items():
        embedding[token] = row.to(embedding.dtype)
    tensors[EMBEDDING] = embedding
    with atomic_file(file) as partial:  # its name ends otherwise, so no loader takes it for weights
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def check_catalogue(directory: Path, catalogue: Catalogue) -> None:
    """Raise UserError unless tokenizer, embedding and output layer of a variant fit its catalogue."""
    check_tokens(load_tokenizer(directory), catalogue, directory)
    headers = read_tensors(directory)
    first = catalogue.first_token

    def read(name: str, begin: int, end: int) -> Tensor:
        with safe_open(headers[name].file, framework="pt") as stored:
            rows: Tensor = stored.get_slice(name)[begin:end]
        return rows

    has_row = read(EMBEDDING, first, first + catalogue.num_tokens).ne(0).any(1).tolist()
    offsets = range(catalogue.tokens_per_item)
    empty = [item for item, token in catalogue.tokens.items() if not all(has_row[token - first + at] for at in offsets)]
    if empty:
        raise _misfit(directory, f"has the item {empty[0]!r}, whose row in the embedding is empty")
    if _HEAD not in headers:
        raise _misfit(directory, "belongs to a model whose output layer is the embedding and could write item tokens")
    if headers[_HEAD].dtype.startswith(("F", "BF")):
        ordinary, items = read(_HEAD, 0, first).float(), read(_HEAD, first, headers[_HEAD].shape[0])
        distinct = torch.cat((items[:1], items[(items != items[0]).any(1)])).float()
        # A mean of ordinary rows has no larger product with anything than one of them has, itself included.
        own, largest = distinct.square().sum(1), (distinct @ ordinary.T).max(1).values
        if bool((own > largest * (1 + _TOLERANCE)).any()):
            raise _misfit(directory, "has item tokens that the output layer could write")


def reset_item_outputs(model: Any, first_token: int) -> None:
    """Give all item tokens the row of the output layer that is never picked, in place."""
    head = model.get_output_embeddings().weight.data
    head[first_token:] = _unpicked(head[:first_token])


def _unpicked(head_VD: Tensor) -> Tensor:
    """Return the row of the output layer of a token that is never the likeliest, `[D]`."""
    rows_VD = head_VD.detach().float()
    nearness_V = nn.functional.cosine_similarity(rows_VD, rows_VD.mean(0, keepdim=True))
    return rows_VD[nearness_V.topk(min(_NUM_AVERAGED, len(rows_VD))).indices].mean(0).to(head_VD.dtype)


def _added_token(number: int) -> AddedToken:
    return AddedToken(token_text(number), normalized=False, special=False)


def _misfit(directory: Path, problem: str) -> UserError:
    return UserError("catalogue", directory / CATALOGUE_FILE, problem, "restore the files of the variant")
