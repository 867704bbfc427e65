"""The output of a dense or quantized checkpoint in plain torch.

It is the reference for engines, and it measures the quality that compression costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.compress.checkpoint import CheckpointReader, iterate_blocks, open_dense
from slimserve.compress.decoder import Block, Sublayer, Visit, decoder_of
from slimserve.compress.device import moved
from slimserve.compress.formats import find_format
from slimserve.compress.formats.head import round_head_inputs, unpack_head
from slimserve.compress.formats.kv_cache import KeyValueRounding, has_fp8_kv_cache, scale_names
from slimserve.core.model_config import read_decoder_config


@torch.inference_mode()
def reference_logits(
    directory: Path,
    sequences: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield the logits `[T, V]` float32 of each sequence of token ids `[T]` int64; hidden states have `dtype`.

    The layers are computed on `device`, and the logits are returned on the CPU.

    Weights are dequantized. Where the format quantizes activations, each layer's input is first rounded to its dynamic
    grid, as an engine should; the same holds for keys and values of an FP8 cache. The checkpoint is read block by
    block, so memory holds one block and all hidden states. Raises UserError for a model that is no decoder, and for an
    unknown quantization format.
    """
    config = read_decoder_config(directory)
    reader = open_dense(directory, config)
    device = torch.device(device)
    decoder = decoder_of(config, dtype, device)
    outer = moved({name: reader.read(name) for name in decoder.outer_names if name in reader.names}, device)
    states = [decoder.embed(outer, sequence[None].to(device)) for sequence in sequences]
    for index, (_, block) in enumerate(iterate_blocks(reader, decoder.block, config["num_hidden_layers"])):
        tensors, visit = reference_block(
            moved(block, device), decoder.sublayers[index], config.get("quantization_config")
        )
        states = [_advanced(decoder.run(index, tensors, x_1TD, visit)) for x_1TD in states]
    scale = f"{decoder.head}_scale"
    round_head = None
    if scale in reader.names:
        parts = {"weight": reader.read(decoder.head), "weight_scale": reader.read(scale)}
        outer[decoder.head] = unpack_head(moved(parts, device))
        round_head = round_head_inputs
    if decoder.head in outer:
        outer[decoder.head] = outer[decoder.head].to(dtype)
    for x_1TD in states:
        yield decoder.logits(outer, x_1TD, round_head)[0].float().cpu()


def _advanced(x_BTD: Tensor | None) -> Tensor:
    assert x_BTD is not None
    return x_BTD


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


def reference_block(
    block: Block, sublayers: Sequence[Sublayer], quantization: Mapping[str, Any] | None
) -> tuple[Block, Visit]:
    """Return the block with its layers dequantized, and a visit that rounds inputs and cache as the engine should.

    `quantization` is the `quantization_config` of config.json; None for a dense model. Raises UserError for an unknown
    format.
    """
    if quantization is None:
        return block, Visit()
    quant_format = find_format(quantization)
    dense = dict(block)
    on_key_value = None
    for sublayer in sublayers:
        if sublayer.is_attention and has_fp8_kv_cache(quantization):
            scales = {name.removeprefix(f"{sublayer.path}."): tensor for name, tensor in block.items()}
            on_key_value = KeyValueRounding(scales)
            dense = {name: tensor for name, tensor in dense.items() if name not in scale_names(sublayer.path)}
    roundings: dict[str, Callable[[Tensor], Tensor]] = {}
    for layer in (layer for sublayer in sublayers for layer in sublayer.linears):
        tensors = {name.removeprefix(f"{layer}."): dense.pop(name) for name in block if name.startswith(f"{layer}.")}
        if "bias" in tensors:
            dense[f"{layer}.bias"] = tensors.pop("bias")
        # A layer that stays dense has no tensor besides its weight.
        is_quantized = tensors.keys() != {"weight"}
        if is_quantized:
            inputs = {suffix: tensor for suffix, tensor in tensors.items() if suffix.startswith("input_")}
            roundings[layer] = partial(quant_format.round_inputs, tensors=inputs)
        dense[f"{layer}.weight"] = quant_format.unpack(tensors, quantization) if is_quantized else tensors["weight"]
    return dense, Visit(roundings=roundings, on_key_value=on_key_value)


def reference_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by name, with quantized layers unpacked as in a dense model."""
    config = read_decoder_config(directory)
    decoder = decoder_of(config)
    reader = CheckpointReader(directory, rename=decoder.module_name)
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (prefix, block) in enumerate(iterate_blocks(reader, decoder.block, config["num_hidden_layers"])):
        dense, _ = reference_block(block, decoder.sublayers[index], config.get("quantization_config"))
        shapes.update({prefix + name: tuple(tensor.shape) for name, tensor in dense.items()})
    blocks_prefix = decoder.block.partition("{index}")[0]
    outside = [name for name in reader.names if not name.startswith(blocks_prefix) and name != f"{decoder.head}_scale"]
    shapes.update({name: tuple(reader.read(name).shape) for name in outside})
    return shapes
