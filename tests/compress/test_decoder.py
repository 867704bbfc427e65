"""Tests of the decoder and the reference logits of every family against transformers, and of the calibration stream."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slimserve.compress.checkpoint import CheckpointReader, iterate_blocks
from slimserve.compress.decoder import Decoder
from slimserve.compress.reference import kl_per_token, nll_per_token, reference_logits
from slimserve.compress.stream import Stream

from .conftest import TinyModel
from .families import tiny_config

SEQUENCES = [torch.randint(0, 67, (length,), generator=torch.Generator().manual_seed(length)) for length in (17, 5)]


def test_reference_logits_equal_those_of_transformers(tiny: TinyModel) -> None:
    logits = list(reference_logits(tiny.directory, SEQUENCES))
    for sequence, logits_TV in zip(SEQUENCES, logits, strict=True):
        expected_TV = tiny.model(sequence[None]).logits[0].float()
        torch.testing.assert_close(logits_TV, expected_TV, atol=2e-4, rtol=1e-4)


def test_nll_and_kl_equal_their_definitions() -> None:
    reference, other = torch.randn(2, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(9) % 7
    p, q = reference.softmax(-1), other.softmax(-1)
    torch.testing.assert_close(kl_per_token(reference, other), (p * (p / q).log()).sum(-1))
    by_hand = torch.stack([-q[position].log()[tokens[position + 1]] for position in range(8)])
    torch.testing.assert_close(nll_per_token(other, tokens), by_hand)


@pytest.mark.parametrize("has_short", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_hessians_of_a_stream_do_not_depend_on_the_batch_size(
    tiny_llama: TinyModel, tmp_path: Path, batch: int, has_short: bool
) -> None:
    tokens_NT = torch.randint(0, 67, (7, 11), generator=torch.Generator().manual_seed(1))
    short_MS = torch.randint(0, 67, (5, 4), generator=torch.Generator().manual_seed(2)) if has_short else None
    captured: dict[str, Any] = {}
    for name, module in tiny_llama.model.named_modules():
        if name.endswith(("v_proj", "o_proj", "up_proj", "down_proj")):
            module.register_forward_pre_hook(
                lambda _, args, name=name: captured.setdefault(name, []).append(args[0].detach().flatten(0, 1))
            )
    for given in (tokens_NT,) if short_MS is None else (tokens_NT, short_MS):
        tiny_llama.model(given)

    config = json.loads((tiny_llama.directory / "config.json").read_text())
    reader = CheckpointReader(tiny_llama.directory)
    decoder = Decoder(config)
    stream = Stream(decoder, tmp_path, tokens_NT, short_MS=short_MS)
    stream._tokens_at_once = batch * 11
    stream.embed({name: reader.read(name) for name in decoder.outer_names})
    for index, (prefix, block) in enumerate(iterate_blocks(reader, decoder.block, config["num_hidden_layers"])):
        stream.enter(index)
        for sublayer in decoder.sublayers[index]:
            hessians = {}
            for stage in sublayer.stages:
                for group, hessian in stream.hessians(sublayer, stage, block, wants_peak=True):
                    hessians[group[-1]] = hessian
            stream.advance(sublayer, block)
            for layer, hessian in hessians.items():
                if prefix + layer not in captured:
                    continue
                x = torch.cat(captured[prefix + layer])
                if hessian.peak_I is not None:
                    torch.testing.assert_close(hessian.peak_I, x.abs().amax(0), atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(hessian.mean(), x.T @ x / len(x), atol=1e-3, rtol=1e-3)
        stream.leave()


@pytest.mark.parametrize(
    ("family", "adds"),
    [
        ("llama", True),
        ("cohere2", True),
        ("stablelm", True),
        ("gemma2", False),
        ("olmo2", False),
        ("granite", False),
        ("opt", False),  # its MLP is no module with an output of its own
    ],
)
def test_a_block_that_norms_or_scales_the_outputs_of_its_sublayers_does_not_add_them(family: str, adds: bool) -> None:
    decoder = Decoder(tiny_config(family).to_dict())
    generator = torch.Generator().manual_seed(0)
    block = {
        name: 0.3 * torch.randn(shape, generator=generator) if len(shape) > 1 else torch.full(shape, 0.7)
        for name, shape in decoder.block_shapes(0).items()
    }
    assert decoder.adds_outputs(0, block) == adds
