"""The output of a dense or quantized checkpoint in plain torch.

It is the reference for engines, and it measures the quality that compression costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.compress.checkpoint import CheckpointReader, iterate_blocks, open_dense
from slimserve.compress.families import LayerRoles, roles_of
from slimserve.compress.formats import find_format
from slimserve.compress.formats.head import round_head_inputs, unpack_head
from slimserve.compress.forward import Block, Decoder, Linear, OuterTensors, dense_linear, read_outer_tensors
from slimserve.core.model_config import read_decoder_config


@torch.inference_mode()
def reference_logits(
    directory: Path, sequences: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Yield the logits `[T, V]` float32 of each sequence of token ids `[T]` int64; hidden states have `dtype`.

    Weights are dequantized. Where the format quantizes activations, each layer's input is first rounded to its dynamic
    per-token grid, as an engine should. The checkpoint is read block by block, so memory holds one block and all hidden
    states. Raises UserError for an unknown model family or quantization format.
    """
    config = read_decoder_config(directory)
    roles = roles_of(config)
    reader = open_dense(directory, config, roles)
    outer = read_outer_tensors(reader, roles)
    decoder = Decoder(config, roles, max(len(sequence) for sequence in sequences), dtype)
    states = [outer.embedding_VD[sequence].to(dtype)[None] for sequence in sequences]
    for _, block in iterate_blocks(reader, roles.block, config["num_hidden_layers"]):
        tensors, linear = reference_block(block, roles, config.get("quantization_config"))
        states = [decoder.block(tensors, linear, x_1TD) for x_1TD in states]
    head = _reference_head(reader, roles, outer, dtype)
    for x_1TD in states:
        yield head(decoder.final_norm(x_1TD, outer.final_norm_D))[0].float()


def _reference_head(
    reader: CheckpointReader, roles: LayerRoles, outer: OuterTensors, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return the output layer as the engine should apply it, `[..., D]` to `[..., V]`."""
    scale = _head_scale(roles)
    if scale not in reader.names:
        dense_VD = outer.head_VD.to(dtype)
        return lambda x: functional.linear(x, dense_VD)
    tensors = {"weight": outer.head_VD, "weight_scale": reader.read(scale)}
    weight_VD = unpack_head(tensors).to(dtype)
    return lambda x: functional.linear(round_head_inputs(x), weight_VD)


def _head_scale(roles: LayerRoles) -> str:
    return f"{roles.head}_scale"


def nll_per_token(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """Return the negative log-likelihood of each token except the first, `[T - 1]`, in nats."""
    return functional.cross_entropy(logits_TV[:-1], tokens_T[1:], reduction="none")


def kl_per_token(reference_TV: Tensor, logits_TV: Tensor) -> Tensor:
    """Return KL(reference || other) of the next-token distributions at each position, `[T]`, in nats."""
    reference = functional.log_softmax(reference_TV, dim=-1)
    return functional.kl_div(
        functional.log_softmax(logits_TV, dim=-1), reference, reduction="none", log_target=True
    ).sum(-1)


def divergences(dense: Path, variants: Sequence[Path], sequences: Sequence[Tensor]) -> list[float]:
    """Return KL(dense || variant) of each variant in nats: the mean over all tokens of `kl_per_token`.

    All checkpoints are computed in float32, one sequence at a time.
    """
    streams = [reference_logits(directory, sequences) for directory in (dense, *variants)]
    results: list[list[Tensor]] = [[] for _ in variants]
    for reference_TV, *others in zip(*streams, strict=True):
        for per_variant, logits_TV in zip(results, others, strict=True):
            per_variant.append(kl_per_token(reference_TV, logits_TV))
    return [float(torch.cat(per_variant).double().mean()) for per_variant in results]


def reference_block(block: Block, roles: LayerRoles, quantization: Mapping[str, Any] | None) -> tuple[Block, Linear]:
    """Return the block with its layers dequantized, and its linear layers as the engine should apply them.

    `quantization` is the `quantization_config` of config.json; None for a dense model. Raises UserError for an unknown
    format.
    """
    if quantization is None:
        return block, dense_linear(block)
    quant_format = find_format(quantization)
    dense = dict(block)
    roundings: dict[str, Callable[[Tensor], Tensor]] = {}
    """The engine's rounding of a layer's inputs, by layer."""
    for layer in roles.linears:
        tensors = {name.removeprefix(f"{layer}."): dense.pop(name) for name in block if name.startswith(f"{layer}.")}
        if "bias" in tensors:
            dense[f"{layer}.bias"] = tensors.pop("bias")
        # A layer that stays dense has no tensor besides its weight.
        is_quantized = tensors.keys() != {"weight"}
        if is_quantized:
            roundings[layer] = quant_format.round_inputs
        weight = quant_format.unpack(tensors, quantization) if is_quantized else tensors["weight"]
        dense[f"{layer}.weight"] = weight
    plain = dense_linear(dense)

    def linear(layer: str, x: Tensor) -> Tensor:
        return plain(layer, roundings[layer](x) if layer in roundings else x)

    return dense, linear


def reference_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by name, with quantized layers unpacked as in a dense model."""
    config = read_decoder_config(directory)
    roles = roles_of(config)
    reader = CheckpointReader(directory)
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, block in iterate_blocks(reader, roles.block, config["num_hidden_layers"]):
        dense, _ = reference_block(block, roles, config.get("quantization_config"))
        shapes.update({prefix + name: tuple(tensor.shape) for name, tensor in dense.items()})
    blocks_prefix = roles.block.partition("{index}")[0]
    outside = [name for name in reader.names if not name.startswith(blocks_prefix) and name != _head_scale(roles)]
    shapes.update({name: tuple(reader.read(name).shape) for name in outside})
    return shapes
