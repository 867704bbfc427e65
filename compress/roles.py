"""Units that pruning can cut: MLP neurons and KV groups, found in the module tree and checked on a random model.

A unit is a neuron, or a KV head with its query heads. Cutting a unit removes rows of the layers before the sublayer's
consumer, columns of the consumer, and changes sizes in config.json. That this computes the same as setting the
columns to zero is checked on a small random model of the same architecture before anything is pruned.

Shape suffixes: U units; I input features of the consumer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from slimserve.compress import osscar
from slimserve.compress.decoder import Block, Decoder, Sublayer, decoder_of
from slimserve.compress.families import VLLM_DERIVES_HEAD_DIM, is_per_layer, with_changes, with_sizes
from slimserve.core.errors import UserError

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, Kind] = ("attention", "mlp")
_PROBE_WIDTH = 8
_PROBE_TOKENS = 6
_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that float32 explains."""


@dataclass(frozen=True)
class PruneRole:
    """The units of one sublayer."""

    kind: Kind
    producers: Mapping[str, tuple[int, ...]]
    """Rows of one unit in each segment of a producer's rows; a fused layer has several segments."""
    consumer: str
    num_units: int
    columns: int
    """Input features of the consumer that belong to one unit."""

    def config(self, config: Mapping[str, Any], num_kept: int) -> dict[str, Any]:
        """Return the config of the model with `num_kept` units; `config` is that of the model before."""
        if self.kind == "mlp":
            return with_changes(config, dict.fromkeys(_width_keys(config, self.num_units), num_kept))
        per_group = config["num_attention_heads"] // with_sizes(config)["num_key_value_heads"]
        changes = {"num_key_value_heads": num_kept, "num_attention_heads": num_kept * per_group}
        # The head size is no longer the hidden size divided by the heads.
        return with_changes(config, {**changes, "head_dim": with_sizes(config)["head_dim"]})

    def cut(self, block: Mapping[str, Tensor], kept_U: Tensor) -> Block:
        """Return a block with only the units `kept_U`; `block` is not changed, and the new tensors own their memory."""
        cut = dict(block)
        for layer, segments in self.producers.items():
            starts, start = [], 0
            for rows in segments:
                starts.append(start)
                start += rows * self.num_units
            kept = torch.cat(
                [osscar.expand_groups(kept_U, rows) + first for rows, first in zip(segments, starts, strict=True)]
            )
            for name in (f"{layer}.weight", f"{layer}.bias"):
                if name in cut:
                    cut[name] = cut[name][kept].contiguous()
        columns = osscar.expand_groups(kept_U, self.columns)
        cut[f"{self.consumer}.weight"] = cut[f"{self.consumer}.weight"][:, columns].contiguous()
        return cut

    def layer_sizes(self, decoder: Decoder, num_units: int) -> dict[str, tuple[int, int]]:
        """Return the output and input features of the sublayer's layers with another number of units."""
        shapes = decoder.block_shapes(0)
        sizes = {layer: (sum(rows) * num_units, shapes[f"{layer}.weight"][1]) for layer, rows in self.producers.items()}
        sizes[self.consumer] = (shapes[f"{self.consumer}.weight"][0], self.columns * num_units)
        return sizes


def find_role(config: Mapping[str, Any], kind: Kind) -> PruneRole:
    """Return the units that can be pruned. Raises UserError with the reason if there are none.

    `config` is that of a dense model; its sizes need not be stated.
    """
    role = _role(json.dumps({key: value for key, value in config.items() if key != "quantization_config"}), kind)
    if isinstance(role, str):
        what = "KV groups" if kind == "attention" else "MLP neurons"
        remedy = "remove other parts, or only quantize"
        raise UserError("prune", config["model_type"], f"cannot lose {what}: {role}", remedy)
    return role


def sublayer_of(decoder: Decoder, index: int, kind: Kind) -> Sublayer | None:
    """Return the attention or the MLP of a layer; None if it has not exactly one."""
    found = [one for one in decoder.sublayers[index] if one.is_attention == (kind == "attention")]
    return found[0] if len(found) == 1 else None


@lru_cache(maxsize=64)
def _role(config_json: str, kind: Kind) -> PruneRole | str:
    config = json.loads(config_json)
    try:
        decoder = decoder_of(config)
        roles = {_shape_role(decoder, index, kind) for index in _different_layers(decoder)}
        if len(roles) > 1:
            return "its layers have different sizes"
        (found,) = roles
        if isinstance(found, str):
            return found
        segments, columns, consumer, num_units = found
        role = PruneRole(kind, dict(segments), consumer, num_units, columns)
        _prove(config, role)
    except _CannotError as error:
        return str(error)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        return f"a cut model does not run ({type(error).__name__}: {error})"
    return role


class _CannotError(Exception):
    """The reason why units cannot be cut."""


def _different_layers(decoder: Decoder) -> Iterator[int]:
    seen = set()
    for index in range(len(decoder.sublayers)):
        kind = json.dumps(decoder.block_shapes(index))
        if kind not in seen:
            seen.add(kind)
            yield index


def _shape_role(
    decoder: Decoder, index: int, kind: Kind
) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], int, str, int] | str:
    """Return segments by layer, columns per unit, consumer and number of units, read from the shapes of a layer."""
    sublayer = sublayer_of(decoder, index, kind)
    if sublayer is None:
        return f"layer {index} does not have exactly one such part"
    if sublayer.has_experts:
        return "its MLP consists of experts"
    if sublayer.consumer is None or len(sublayer.stages) != 2:
        return f"{sublayer.path} is not a group of layers that read one input, followed by one layer"
    shapes, config = decoder.block_shapes(index), with_sizes(decoder.config)
    num_inputs = shapes[f"{sublayer.consumer}.weight"][1]
    if kind == "mlp":
        num_units, columns, unit = num_inputs, 1, (1,)
        choices = {num_inputs: unit, 2 * num_inputs: (1, 1)}
    else:
        num_units = config["num_key_value_heads"]
        head, columns = config["head_dim"], num_inputs // num_units
        if num_units * columns != num_inputs or columns % head:
            return "its heads do not have the sizes that its config states"
        rows = columns + 2 * head
        choices = {num_units * head: (head,), num_inputs: (columns,), num_units * rows: (columns, head, head)}
    segments = []
    for layer in sublayer.producers:
        rows_O = shapes[f"{layer}.weight"][0]
        if rows_O not in choices:
            return f"{layer} has {rows_O} rows, which are not those of {num_units} units"
        segments.append((layer, choices[rows_O]))
    return tuple(segments), columns, sublayer.consumer, num_units


def _width_keys(config: Mapping[str, Any], width: int) -> tuple[str, ...]:
    """Return the key of the config that states the width of the MLP, and its usual name if both are there."""
    keys = [key for key in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") if config.get(key) == width]
    if not keys:
        raise _CannotError("its config states no width of the MLP")
    return tuple(keys)


def _prove(config: Mapping[str, Any], role: PruneRole) -> None:
    """Raise _CannotError unless a small random model computes the same when units are cut as when they are masked."""
    if role.kind == "attention" and role.num_units < 2:
        raise _CannotError("it has a single KV head")
    if role.kind == "attention" and config["model_type"] in VLLM_DERIVES_HEAD_DIM:
        raise _CannotError(
            f"vLLM cannot load a cut model of type {config['model_type']}, because it derives the heads' width from "
            "their number"
        )
    small = _small(config)
    num_units = role.num_units
    if role.kind == "mlp":
        small = with_changes(small, dict.fromkeys(_width_keys(config, role.num_units), _PROBE_WIDTH))
        num_units = _PROBE_WIDTH
    tried = PruneRole(role.kind, role.producers, role.consumer, num_units, role.columns)
    kept_U = torch.arange(num_units)[1::2] if num_units < 4 else torch.arange(num_units)[num_units // 3 :: 2]
    dense, cut = Decoder(small), Decoder(tried.config(small, len(kept_U)))
    tensors = _random_tensors(dense)
    prefix = dense.block.format(index=0)
    block = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    after, shapes = tried.cut(block, kept_U), cut.block_shapes(0)
    for name, tensor in after.items():
        if tuple(tensor.shape) != shapes.get(name):
            layer = name.rpartition(".")[0]
            if layer in (*role.producers, role.consumer):
                raise _CannotError("transformers derives its sizes otherwise, so no config describes the cut model")
            raise _CannotError(f"{layer} spans all of them, so the others' outputs would change")
    masked = dict(block)
    gone_I = torch.ones(num_units * role.columns, dtype=torch.bool)
    gone_I[osscar.expand_groups(kept_U, role.columns)] = False
    masked[f"{role.consumer}.weight"] = masked[f"{role.consumer}.weight"].masked_fill(gone_I, 0)
    outer = {name: tensors[name] for name in dense.outer_names}
    tokens_1T = torch.arange(_PROBE_TOKENS)[None] % min(tensors[dense.embedding].shape[0], 64)
    logits = []
    with torch.no_grad():
        for decoder, one in ((dense, masked), (cut, after)):
            states = decoder.run(0, one, decoder.embed(outer, tokens_1T))
            assert states is not None
            logits.append(decoder.logits(outer, states))
    if not bool(torch.isfinite(logits[0]).all()):
        return  # the check of the model itself will say why
    difference = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1e-12))
    if not difference < _TOLERANCE:
        raise _CannotError(f"a small model with cut units differs from one with masked units by {difference:.1e}")


def _small(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a model of one layer and few tokens with the same heads."""
    depth = config["num_hidden_layers"]
    small = {
        key: value[:1] if is_per_layer(key, value, depth) else value
        for key, value in config.items()
        if key != "quantization_config"
    }
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return with_changes(small, {"num_hidden_layers": 1, "vocab_size": 64, **ids})


def _random_tensors(decoder: Decoder, prefix: str = "") -> dict[str, Tensor]:
    """Return tensors for which every part of the model matters, of names that begin with `prefix`."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in decoder.shapes.items():
        if not name.startswith(prefix):
            continue
        values = torch.randn(shape, generator=generator)
        tensors[name] = values * (shape[1] ** -0.5) if len(shape) > 1 else 1 + values / 4
    return tensors


@lru_cache(maxsize=64)
def _smoothing(config_json: str, index: int) -> dict[str, float]:
    """Return the offset of the weight of each norm of a layer that can be smoothed, by the norm's name."""
    decoder = decoder_of(json.loads(config_json))
    prefix = decoder.block.format(index=index)
    block = {name.removeprefix(prefix): tensor for name, tensor in _random_tensors(decoder, prefix).items()}
    x_1TD = torch.randn(1, _PROBE_TOKENS, decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    found: dict[str, float] = {}
    with torch.no_grad():
        expected = decoder.run(index, block, x_1TD)
        assert expected is not None
        for sublayer in decoder.sublayers[index]:
            if sublayer.norm is None:
                continue
            scale_I = torch.linspace(0.5, 2, decoder.hidden_size)
            for offset in (0.0, 1.0):
                smoothed = smooth(block, sublayer.norm, offset, sublayer.stages[0][0], scale_I)
                states = decoder.run(index, smoothed, x_1TD)
                assert states is not None
                if float((states - expected).abs().max() / expected.abs().max()) < _TOLERANCE:
                    found[sublayer.norm] = offset
                    break
    return found


def find_smoothing(decoder: Decoder, index: int) -> dict[str, float]:
    """Return the norms of a layer whose factors can move into the linear layers after them, each with its offset.

    The offset is 0 for a norm that multiplies by its weight, and 1 for one that multiplies by 1 + weight.
    """
    return _smoothing(json.dumps(decoder.config), index)


def smooth(block: Mapping[str, Tensor], norm: str, offset: float, layers: tuple[str, ...], scale_I: Tensor) -> Block:
    """Return a block whose norm gives outputs divided by `scale_I` and whose `layers` have columns multiplied by it."""
    smoothed = dict(block)
    weight_I = block[f"{norm}.weight"]
    smoothed[f"{norm}.weight"] = ((weight_I.float() + offset) / scale_I - offset).to(weight_I.dtype)
    bias_I = block.get(f"{norm}.bias")
    if bias_I is not None:
        smoothed[f"{norm}.bias"] = (bias_I.float() / scale_I).to(bias_I.dtype)
    for layer in layers:
        smoothed[f"{layer}.weight"] = block[f"{layer}.weight"].float() * scale_I
    return smoothed
