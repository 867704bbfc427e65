"""Tests of quantized layers on disk against those that compressed-tensors itself writes and reads."""

import copy
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor

from slimserve.compress.formats import find_format, get_format
from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat, pack_codes, unpack_codes
from slimserve.compress.formats.head import add_head
from slimserve.compress.formats.interface import PackedLayer
from slimserve.compress.quantize import Grid, fp4_global_scale, round_to_nearest
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
    ("fp8-block", True, None, (256, 384)),
    ("w4a8", True, 32, (5, 96)),
    ("w4a8", True, None, (7, 13)),
    ("w4a8-fp8", True, None, (3, 256)),
    ("nvfp4", True, None, (7, 48)),
    ("nvfp4a16", True, None, (13, 16)),
    ("mxfp4", True, None, (7, 96)),
    ("mxfp4a16", True, None, (13, 32)),
]


def of(name: str) -> CompressedTensorsFormat:
    quant_format = get_format(name)
    assert isinstance(quant_format, CompressedTensorsFormat)
    return quant_format


def weight(shape: tuple[int, int]) -> Tensor:
    """Return rows of different magnitude and nonzero mean, so that zero points matter."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=draw) * torch.linspace(0.1, 4, shape[0])[:, None] + 0.3


pytestmark = pytest.mark.usefixtures("uncompiled_fp4")


def rounded(name: str, symmetric: bool, group: int | None, weights: list[Tensor]) -> list[PackedLayer]:
    """Return layers that share an input, rounded to nearest."""
    return of(name).pack(
        weights, of(name).make_grid(symmetric, group), lambda stacked, grid: round_to_nearest(stacked, None, grid)
    )


def library_state(layer: PackedLayer) -> dict[str, Tensor]:
    """Return a layer as the library has it before packing: dequantized weight, scales as floats, zero points."""
    state = {"weight": layer.dequantize(), "weight_scale": layer.tensors["weight_scale"]}
    if state["weight_scale"].dtype == torch.uint8:
        state["weight_scale"] = 2.0 ** (state["weight_scale"].float() - 127)
    state["weight_scale"] = state["weight_scale"].float()
    if "weight_global_scale" in layer.tensors:
        state["weight_global_scale"] = layer.tensors["weight_global_scale"]
    return state


@pytest.mark.parametrize(("name", "symmetric", "group", "shape"), CASES)
def test_layers_are_written_as_the_librarys_compressor_writes_them(
    name: str, symmetric: bool, group: int | None, shape: tuple[int, int]
) -> None:
    (layer,) = rounded(name, symmetric, group, [weight(shape)])
    grid = of(name).make_grid(symmetric, group)
    config = QuantizationConfig.model_validate(of(name).quantization_config(grid, []))
    state = library_state(layer)
    if state["weight_scale"].dtype != layer.tensors["weight_scale"].dtype and of(name).kind == "int":
        state["weight_scale"] = state["weight_scale"].to(layer.tensors["weight_scale"].dtype)
    if not symmetric:
        zeros = unpack_codes(layer.tensors, grid).zero_OG
        assert zeros is not None
        state["weight_zero_point"] = zeros
    compressor = BaseCompressor.get_value_from_registry(of(name).layout)
    expected = compressor.compress(state, config.config_groups["group_0"])
    assert layer.tensors.keys() == expected.keys()
    for suffix, tensor in expected.items():
        assert layer.tensors[suffix].dtype == tensor.dtype, suffix
        assert torch.equal(layer.tensors[suffix].float(), tensor.float()), suffix


PRESETS = {
    "w8a8": "W8A8",
    "w4a16": "W4A16",
    "fp8": "FP8_DYNAMIC",
    "fp8-block": "FP8_BLOCK",
    "w4a8": "W4A8",
    "w4a8-fp8": "W4AFP8",
    "nvfp4": "NVFP4",
    "nvfp4a16": "NVFP4A16",
    "mxfp4": "MXFP4",
    "mxfp4a16": "MXFP4A16",
}


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
    # The library's preset of INT4 has groups of 128; a recipe may choose others, or none.
    strategy = "channel" if group is None else "group"
    changes = {"group_size": group, "strategy": strategy} if of(name).group_size is None else {}
    expected = preset(name, ["Linear"], symmetric=symmetric, **changes)
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
    (layer,) = rounded(name, symmetric, group, [weight(shape)])
    described = of(name).quantization_config(of(name).make_grid(symmetric, group), ["lm_head"])
    assert find_format(described) is of(name)
    assert of(name).read_grid(described) == of(name).make_grid(symmetric, group)
    assert torch.equal(of(name).unpack(layer.tensors, described), layer.dequantize())
    scheme = QuantizationConfig.model_validate(described).config_groups["group_0"]
    packed = dict(layer.tensors)
    if of(name).kind == "int":
        packed["weight_scale"] = packed["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(of(name).layout)
    theirs = compressor.decompress(packed, scheme)["weight"].float()
    # The library unpacks 4-bit floats to bfloat16.
    is_fp4 = of(name).kind == "float" and of(name).num_bits == 4
    assert torch.allclose(theirs, layer.dequantize(), rtol=2**-8 if is_fp4 else 1e-6)
    if symmetric:
        state = library_state(layer)
        fake = fake_quantize(
            state["weight"], state["weight_scale"], None, scheme.weights, None, state.get("weight_global_scale")
        )
        assert torch.allclose(fake, layer.dequantize(), rtol=1e-6)


def test_scales_have_the_dtype_that_vllm_holds_them_in() -> None:
    scales = {
        name: pack_codes(round_to_nearest(weight((4, 128)), None, of(name).make_grid()))["weight_scale"]
        for name in PRESETS
    }
    assert {name: scale.dtype for name, scale in scales.items()} == {
        "w8a8": torch.float32,
        "w4a16": torch.bfloat16,
        "fp8": torch.float32,
        "fp8-block": torch.float32,
        "w4a8": torch.bfloat16,
        "w4a8-fp8": torch.bfloat16,
        "nvfp4": torch.float8_e4m3fn,
        "nvfp4a16": torch.float8_e4m3fn,
        "mxfp4": torch.uint8,
        "mxfp4a16": torch.uint8,
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
        (changed("fp8", "config_groups", "group_0", "weights", "strategy", value="block"), "block_structure"),
        (changed("fp8-block", "config_groups", "group_0", "weights", "block_structure", value=[64, 64]), "block_str"),
        (changed("nvfp4", "config_groups", "group_0", "weights", "group_size", value=32), "group_size"),
        (changed("nvfp4", "config_groups", "group_0", "input_activations", "dynamic", value=True), "dynamic"),
        (changed("mxfp4", "config_groups", "group_0", "input_activations", "group_size", value=16), "group_size"),
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
    rounded = of("w8a8").round_inputs(x, {})
    assert torch.equal(rounded[0], torch.tensor([127.0, 0.0, -1.0, 64.0]))
    assert torch.equal(rounded[1], torch.zeros(4))
    assert torch.allclose(rounded[2], torch.tensor([2.54, 0.02, -0.04, 1.0]))


def test_fp8_activations_keep_what_is_on_the_grid() -> None:
    on_grid = torch.tensor([[448.0, 1.0, -0.125, 0.0]])
    assert torch.equal(of("fp8").round_inputs(on_grid, {}), on_grid)
    rounded = of("fp8").round_inputs(torch.tensor([[448.0, 17.0, 1.07]]), {})
    assert torch.equal(rounded, torch.tensor([[448.0, 16.0, 1.125]]))


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_activations_keep_shape_and_dtype(name: str) -> None:
    x = torch.randn(2, 3, 5).bfloat16()
    rounded = of(name).round_inputs(x, {})
    assert (rounded.shape, rounded.dtype) == (x.shape, x.dtype)
    assert not torch.equal(rounded, x)


def test_grids_agree_with_the_config_that_is_written() -> None:
    described = of("w4a16").quantization_config(of("w4a16").make_grid(False, 64), ["lm_head"])
    weights = described["config_groups"]["group_0"]["weights"]
    assert (weights["symmetric"], weights["group_size"], weights["strategy"]) == (False, 64, "group")
    assert isinstance(of("w8a8").make_grid(), Grid)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("w8a8", "w4a16", "fp8")])
def test_a_layers_bytes_are_those_of_its_tensors(name: str) -> None:
    (layer,) = rounded(name, True, None, [weight((256, 384))])
    tensors = layer.tensors | of(name).input_tensors(3.0)
    tensors.pop("weight_shape", None)
    assert sum(tensor.nbytes for tensor in tensors.values()) == of(name).layer_bytes(256, 384, None, True)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8-block"])
def test_scales_without_a_search_equal_those_of_the_library(name: str) -> None:
    scheme = preset(name, ["Linear"])
    w = weight((256, 256))
    w[0, :32] = torch.tensor([1.75] + [0.5] * 31)  # MXFP4 decides between two powers of two
    (layer,) = rounded(name, True, None, [w])
    if name == "fp8-block":
        blocks = w.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = w.unflatten(1, (-1, scheme.weights.group_size))
        low, high = groups.amin(2), groups.amax(2)
    global_scale = generate_gparam(w.min(), w.max()) if name == "nvfp4" else None
    if global_scale is not None:
        assert torch.allclose(layer.tensors["weight_global_scale"], global_scale, rtol=1e-6)
    scale, _ = calculate_qparams(low, high, scheme.weights, global_scale)
    assert torch.allclose(library_state(layer)["weight_scale"], scale.float(), rtol=1e-6)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8-block", "fp8", "w4a8-fp8"])
def test_inputs_are_rounded_as_the_librarys_fake_quantization_rounds_them(name: str) -> None:
    x = torch.randn(1, 9, 256, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 8, 256)
    x[0, 3] = 0
    args = preset(name, ["Linear"]).input_activations
    peak = float(x.abs().max())
    tensors = of(name).input_tensors(peak)
    global_scale = tensors.get("input_global_scale")
    if global_scale is not None:
        assert torch.allclose(global_scale, generate_gparam(x.min(), x.max()), rtol=1e-6)
    scale, _ = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1), global_scale)
    expected = fake_quantize(x[0], scale[0], None, args, None, global_scale)
    assert torch.allclose(of(name).round_inputs(x, tensors)[0], expected, rtol=1e-5)


def test_layers_that_engines_fuse_share_one_global_scale() -> None:
    layers = rounded("nvfp4", True, None, [weight((5, 32)), 9 * weight((3, 32))])
    factors = {float(layer.tensors["weight_global_scale"]) for layer in layers}
    assert factors == {fp4_global_scale(float(9 * weight((3, 32)).abs().max()))}


def test_no_fp8_block_has_rows_of_two_layers() -> None:
    weights = [weight((128, 256)), 100 * weight((100, 256)), weight((128, 256))]
    for together, one in zip(rounded("fp8-block", True, None, weights), weights, strict=True):
        (alone,) = rounded("fp8-block", True, None, [one])
        assert together.tensors.keys() == alone.tensors.keys()
        for suffix, tensor in alone.tensors.items():
            assert torch.equal(together.tensors[suffix].float(), tensor.float()), suffix


@pytest.mark.parametrize(
    ("name", "outputs", "inputs", "problem"),
    [
        ("nvfp4", 13, 24, "inputs of mlp.up_proj: '24' are no multiple of 16"),
        ("nvfp4a16", 13, 7, "inputs of mlp.up_proj: '7' are no multiple of 16"),
        ("mxfp4", 13, 48, "inputs of mlp.up_proj: '48' are no multiple of 32"),
        ("mxfp4a16", 64, 16, "inputs of mlp.up_proj: '16' are no multiple of 32"),
        ("w4a8-fp8", 128, 192, "inputs of mlp.up_proj: '192' are no multiple of 128"),
        ("fp8-block", 128, 200, "inputs of mlp.up_proj: '200' are no multiple of 128"),
        ("fp8-block", 192, 128, "outputs of mlp.up_proj: '192' are no multiple of 128"),
    ],
)
def test_a_layer_with_an_impossible_size_is_named(name: str, outputs: int, inputs: int, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        of(name).check_layers({"mlp.gate_proj": (128, 128), "mlp.up_proj": (outputs, inputs)})


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "w4a8-fp8", "fp8-block", "w4a8", "w8a8"])
def test_possible_sizes_pass(name: str) -> None:
    of(name).check_layers({"mlp.gate_proj": (128, 256), "mlp.up_proj": (384, 128)})
