"""Tests of quantized layers on disk against those that compressed-tensors itself writes and reads."""

import copy
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from torch import Tensor

from slimserve.compress.formats import find_format, get_format
from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat, pack_codes, unpack_codes
from slimserve.compress.formats.head import add_head
from slimserve.compress.quantize import Grid, round_to_nearest
from slimserve.core.errors import UserError

CASES = [
    ("w8a8", True, None, (5, 13)),
    ("fp8", True, None, (7, 19)),
    ("w4a16", True, None, (5, 13)),
    ("w4a16", False, None, (11, 21)),
    ("w4a16", True, 32, (5, 96)),
    ("w4a16", False, 32, (13, 96)),
    ("w4a16", False, 64, (9, 192)),
    ("w4a16", True, 128, (3, 256)),
]


def of(name: str) -> CompressedTensorsFormat:
    quant_format = get_format(name)
    assert isinstance(quant_format, CompressedTensorsFormat)
    return quant_format


def weight(shape: tuple[int, int]) -> Tensor:
    """Return rows of different magnitude and nonzero mean, so that zero points matter."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=draw) * torch.linspace(0.1, 4, shape[0])[:, None] + 0.3


@pytest.mark.parametrize(("name", "symmetric", "group", "shape"), CASES)
def test_layers_are_written_as_the_librarys_compressor_writes_them(
    name: str, symmetric: bool, group: int | None, shape: tuple[int, int]
) -> None:
    quantized = round_to_nearest(weight(shape), None, of(name).make_grid(symmetric, group))
    config = QuantizationConfig.model_validate(of(name).quantization_config(quantized.grid, []))
    scale = quantized.scale_OG.to(quantized.grid.scale_dtype)
    state = {"weight": quantized.dequantize(), "weight_scale": scale}
    if quantized.zero_OG is not None:
        state["weight_zero_point"] = quantized.zero_OG
    compressor = BaseCompressor.get_value_from_registry(of(name).layout)
    expected = compressor.compress(state, config.config_groups["group_0"])
    packed = pack_codes(quantized)
    assert packed.keys() == expected.keys()
    for suffix, tensor in expected.items():
        assert packed[suffix].dtype == tensor.dtype, suffix
        assert torch.equal(packed[suffix].float(), tensor.float()), suffix


PRESETS = {"w8a8": "W8A8", "w4a16": "W4A16", "fp8": "FP8_DYNAMIC"}


def preset(name: str, targets: list[str], **changes: Any) -> QuantizationScheme:
    """Return the library's own scheme with changed keys of its weights."""
    scheme = preset_name_to_scheme(PRESETS[name], targets)
    scheme.weights = type(scheme.weights).model_validate({**scheme.weights.model_dump(), **changes})
    scheme.format = of(name).layout
    return scheme


def described_alike(ours: QuantizationScheme, theirs: QuantizationScheme) -> bool:
    """Tell whether two schemes describe the same tensors; the observer of the scales does not matter."""

    def essentials(scheme: QuantizationScheme) -> dict[str, Any]:
        plain: dict[str, Any] = scheme.model_dump(mode="json")
        for part in ("weights", "input_activations"):
            if plain[part]:
                plain[part] = {key: value for key, value in plain[part].items() if not key.startswith("observer")}
        return plain

    return essentials(ours) == essentials(theirs)


@pytest.mark.parametrize(("name", "symmetric", "group"), sorted({case[:3] for case in CASES}, key=str))
def test_the_config_equals_the_librarys_preset(name: str, symmetric: bool, group: int | None) -> None:
    config = QuantizationConfig.model_validate(
        of(name).quantization_config(of(name).make_grid(symmetric, group), ["a"])
    )
    strategy = "channel" if group is None else "group"
    expected = preset(name, ["Linear"], symmetric=symmetric, group_size=group, strategy=strategy)
    assert described_alike(config.config_groups["group_0"], expected)
    assert (config.ignore, config.format, list(config.config_groups)) == (["a"], of(name).layout, ["group_0"])


@pytest.mark.parametrize(("name", "layout"), [("w8a8", "int-quantized"), ("w4a16", "mixed-precision")])
def test_an_int8_head_is_a_group_of_its_own(name: str, layout: str) -> None:
    described = add_head(of(name).quantization_config(of(name).make_grid(), []))
    config = QuantizationConfig.model_validate(described)
    assert config.format == layout
    assert described_alike(config.config_groups["group_1"], preset("w8a8", ["lm_head"]))
    assert find_format(described) is of(name)
    assert of(name).read_grid(described) == of(name).make_grid()


@pytest.mark.parametrize(("name", "symmetric", "group", "shape"), CASES)
def test_a_layer_is_read_back_as_it_was_and_as_the_library_reads_it(
    name: str, symmetric: bool, group: int | None, shape: tuple[int, int]
) -> None:
    quantized = round_to_nearest(weight(shape), None, of(name).make_grid(symmetric, group))
    described = of(name).quantization_config(quantized.grid, ["lm_head"])
    assert find_format(described) is of(name)
    grid = of(name).read_grid(described)
    assert grid == quantized.grid
    packed = pack_codes(quantized)
    again = unpack_codes(packed, grid)
    assert torch.equal(again.codes_OI.float(), quantized.codes_OI.float())
    assert torch.equal(again.dequantize(), quantized.dequantize())
    packed["weight_scale"] = packed["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(of(name).layout)
    scheme = QuantizationConfig.model_validate(described).config_groups["group_0"]
    assert torch.allclose(compressor.decompress(packed, scheme)["weight"], again.dequantize(), rtol=1e-6)


def test_scales_have_the_dtype_that_vllm_holds_them_in() -> None:
    scales = {
        name: pack_codes(round_to_nearest(weight((4, 8)), None, of(name).make_grid()))["weight_scale"]
        for name in PRESETS
    }
    assert {name: scale.dtype for name, scale in scales.items()} == {
        "w8a8": torch.float32,
        "w4a16": torch.bfloat16,
        "fp8": torch.float32,
    }


def test_a_scale_per_tensor_of_another_writer_applies_to_every_row() -> None:
    described = of("fp8").quantization_config(of("fp8").make_grid(), [])
    described["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    grid = of("fp8").read_grid(described)
    codes = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, 0.0]]).to(torch.float8_e4m3fn)
    layer = unpack_codes({"weight": codes, "weight_scale": torch.tensor([0.5], dtype=torch.bfloat16)}, grid)
    assert torch.equal(layer.dequantize(), torch.tensor([[0.5, -1.0, 1.5], [0.25, 2.0, 0.0]]))


def changed(name: str, *path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(of(name).quantization_config(of(name).make_grid(), []))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return config


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (changed("w4a16", "config_groups", "group_0", "weights", "actorder", value="group"), "actorder"),
        (changed("w4a16", "config_groups", "group_0", "input_activations", value={"num_bits": 8}), "input_activations"),
        (changed("w8a8", "config_groups", "group_0", "input_activations", "dynamic", value=False), "dynamic"),
        (changed("w8a8", "config_groups", "group_0", "input_activations", "symmetric", value=False), "symmetric"),
        (changed("fp8", "config_groups", "group_0", "input_activations", value=None), "input_activations"),
        (changed("fp8", "config_groups", "group_0", "weights", "strategy", value="block"), "strategy"),
        (changed("w8a8", "config_groups", "group_0", "weights", "num_bits", value=4), "not a format"),
        (changed("w8a8", "config_groups", "group_0", "format", value="nvfp4-pack-quantized"), "not a format"),
    ],
)
def test_configs_that_would_be_read_wrongly_are_rejected(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        find_format(config).unpack({}, config)


@pytest.mark.parametrize("order", ["weight", "static"])
def test_static_activation_ordering_is_read(order: str) -> None:
    config = changed("w4a16", "config_groups", "group_0", "weights", "actorder", value=order)
    grid = of("w4a16").read_grid(config)
    assert grid == of("w4a16").make_grid()


@pytest.mark.parametrize(
    ("name", "symmetric", "group", "field"),
    [("w8a8", False, None, "symmetric"), ("fp8", True, 64, "group_size"), ("w4a16", True, 48, "group_size")],
)
def test_a_format_rejects_settings_of_other_formats(name: str, symmetric: bool, group: int | None, field: str) -> None:
    with pytest.raises(UserError, match=field):
        of(name).make_grid(symmetric, group)


@pytest.mark.parametrize(
    ("requested", "inputs", "chosen"),
    [
        (128, [256, 1536], 128),
        (128, [576, 1536], 64),
        (128, [96, 256], 32),
        (64, [256, 512], 64),
        (32, [256], 32),
        (128, [576, 1529], None),
        (None, [256], None),
    ],
)
def test_the_largest_group_that_fits_is_chosen_and_noted(
    requested: int | None, inputs: list[int], chosen: int | None
) -> None:
    size, note = of("w4a16").choose_group_size(requested, inputs)
    assert size == chosen
    assert bool(note) == (chosen != requested)
    if note:
        assert str(chosen or "per output channel") in note
        assert any(str(width) in note for width in inputs if requested and width % requested)


def test_int8_activations_are_rounded_to_127ths_of_each_tokens_peak() -> None:
    x = torch.tensor([[127.0, 0.4, -0.6, 63.5], [0.0, 0.0, 0.0, 0.0], [2.54, 0.011, -0.03, 1.0]])
    rounded = of("w8a8").round_inputs(x)
    assert torch.equal(rounded[0], torch.tensor([127.0, 0.0, -1.0, 64.0]))
    assert torch.equal(rounded[1], torch.zeros(4))
    assert torch.allclose(rounded[2], torch.tensor([2.54, 0.02, -0.04, 1.0]))


def test_fp8_activations_keep_what_is_on_the_grid() -> None:
    on_grid = torch.tensor([[448.0, 1.0, -0.125, 0.0]])
    assert torch.equal(of("fp8").round_inputs(on_grid), on_grid)
    rounded = of("fp8").round_inputs(torch.tensor([[448.0, 17.0, 1.07]]))
    assert torch.equal(rounded, torch.tensor([[448.0, 16.0, 1.125]]))


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_activations_keep_shape_and_dtype(name: str) -> None:
    x = torch.randn(2, 3, 5).bfloat16()
    rounded = of(name).round_inputs(x)
    assert (rounded.shape, rounded.dtype) == (x.shape, x.dtype)
    assert not torch.equal(rounded, x)


def test_grids_agree_with_the_config_that_is_written() -> None:
    described = of("w4a16").quantization_config(of("w4a16").make_grid(False, 64), ["lm_head"])
    weights = described["config_groups"]["group_0"]["weights"]
    assert (weights["symmetric"], weights["group_size"], weights["strategy"]) == (False, 64, "group")
    assert isinstance(of("w8a8").make_grid(), Grid)
