from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from torch import Tensor

from slimserve.compress.quantize import (
    Grid,
    Quantized,
    RoundingOptions,
    awq_scales,
    fp4_global_scale,
    output_error,
    relative_error,
    round_to_nearest,
    smooth_scales,
)
from slimserve.core.errors import UserError

GRIDS = {
    "int8": Grid("int", 8),
    "fp8": Grid("float", 8),
    "int4 by rows": Grid("int", 4),
    "int4 g32": Grid("int", 4, group_size=32, scale_dtype=torch.bfloat16),
    "int4 g64": Grid("int", 4, group_size=64, scale_dtype=torch.bfloat16),
    "int4 asymmetric by rows": Grid("int", 4, symmetric=False, scale_dtype=torch.float16),
    "int4 asymmetric g64": Grid("int", 4, symmetric=False, group_size=64, scale_dtype=torch.bfloat16),
    "nvfp4": Grid("float", 4, group_size=16, scale_dtype=torch.float8_e4m3fn, global_scale=37.5),
    "mxfp4": Grid("float", 4, group_size=32, scale_dtype=torch.float8_e8m0fnu),
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SHAPES = [(3, 192), (1, 64), (130, 128)]
MSE = RoundingOptions(scales="mse")


def all_codes(grid: Grid) -> Tensor:
    if grid.kind == "int":
        return torch.arange(-(2 ** (grid.num_bits - 1)), 2 ** (grid.num_bits - 1)).float()
    if grid.num_bits == 4:
        return torch.cat((-E2M1, E2M1))
    every_byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return every_byte[~every_byte.isnan()]


def scale_of_every_weight(quantized: Quantized) -> tuple[Tensor, Tensor]:
    width = quantized.codes_OI.shape[1] // quantized.scale_OG.shape[1]
    zero_OG = torch.zeros_like(quantized.scale_OG) if quantized.zero_OG is None else quantized.zero_OG.float()
    return quantized.scale_OG.repeat_interleave(width, 1), zero_OG.repeat_interleave(width, 1)


def grid_one(name: str) -> Tensor:
    """Return the storable scale nearest to 1, which groups of zeros get."""
    return GRIDS[name].storable(torch.tensor(1.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [RoundingOptions(), MSE], ids=["minmax", "mse"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_weight_rounds_to_the_nearest_grid_point(
    name: str, options: RoundingOptions, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(shape)
    quantized = round_to_nearest(weight_OI, None, GRIDS[name], options)
    scale_OI, zero_OI = scale_of_every_weight(quantized)
    nearest_OI = torch.full(shape, torch.inf)
    for code in all_codes(GRIDS[name]):
        nearest_OI = torch.minimum(nearest_OI, (weight_OI - (code - zero_OI) * scale_OI).abs())
    torch.testing.assert_close((weight_OI - quantized.dequantize()).abs(), nearest_OI, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_and_scales_are_exact_in_their_stored_dtypes(name: str) -> None:
    torch.manual_seed(1)
    grid = GRIDS[name]
    for options in (RoundingOptions(), MSE):
        quantized = round_to_nearest(torch.randn(5, 192), None, grid, options)
        assert quantized.codes_OI.dtype == (torch.int8 if grid.kind == "int" else torch.float8_e4m3fn)
        assert quantized.codes_OI.is_contiguous()
        assert set(quantized.codes_OI.float().unique().tolist()) <= set(all_codes(grid).tolist())
        assert torch.equal(quantized.scale_OG, grid.storable(quantized.scale_OG))
        assert quantized.scale_OG.shape == (5, 192 // (grid.group_size or 192))
        assert (quantized.scale_OG > 0).all()
        assert (quantized.zero_OG is None) == grid.symmetric
        if quantized.zero_OG is not None:
            assert quantized.zero_OG.dtype == torch.int8
            assert quantized.zero_OG.shape == quantized.scale_OG.shape
            assert quantized.zero_OG.min() >= -8
            assert quantized.zero_OG.max() <= 7


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bit_scales_equal_those_of_compressed_tensors(symmetric: bool) -> None:
    torch.manual_seed(2)
    weight_OI = torch.randn(7, 96)
    weight_OI[0], weight_OI[1] = weight_OI[0].abs() + 1, -weight_OI[1].abs() - 1
    groups_OGS = weight_OI.unflatten(1, (3, 32))
    arguments = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=32)
    scale_OG, zero_OG = calculate_qparams(groups_OGS.amin(2), groups_OGS.amax(2), arguments)
    ours = round_to_nearest(weight_OI, None, Grid("int", 4, symmetric, 32))
    torch.testing.assert_close(ours.scale_OG, scale_OG)
    if ours.zero_OG is not None:
        assert torch.equal(ours.zero_OG, zero_OG.to(torch.int8))


@pytest.mark.parametrize("name", ["int8", "int4 g32", "int4 asymmetric g64"])
def test_a_shrunk_grid_reaches_that_fraction_of_the_extremes(name: str) -> None:
    torch.manual_seed(9)
    grid, weight_OI = GRIDS[name], torch.randn(4, 64)
    weight_OI[0] += 1
    scale_OG, zero_OG = grid.fit(weight_OI, shrink=0.75)
    groups_OGS = weight_OI.unflatten(1, (scale_OG.shape[1], -1))
    least_OG = grid.decode(torch.tensor(grid.lowest), scale_OG, zero_OG)
    greatest_OG = grid.decode(torch.tensor(grid.highest), scale_OG, zero_OG)
    if zero_OG is None:
        reach_OG, extreme_OG = torch.maximum(-least_OG, greatest_OG), groups_OGS.abs().amax(2)
        assert ((reach_OG - 0.75 * extreme_OG).abs() <= 1.01 * scale_OG).all()
    else:
        assert ((least_OG - 0.75 * groups_OGS.amin(2)).abs() <= 0.6 * scale_OG).all()
        assert ((greatest_OG - 0.75 * groups_OGS.amax(2)).abs() <= 0.6 * scale_OG).all()


def test_eight_bits_represent_the_largest_weight_of_a_row() -> None:
    weight_OI = torch.tensor([[0.1, -3.0, 1.0], [0.0, 0.02, 0.01]])
    for name in ("int8", "fp8"):
        dequantized = round_to_nearest(weight_OI, None, GRIDS[name]).dequantize()
        assert dequantized[0, 1] == pytest.approx(-3.0, rel=1e-6)
        assert dequantized[1, 1] == pytest.approx(0.02, rel=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_zeros_stay_zeros(name: str) -> None:
    weight_OI = torch.randn(3, 128)
    weight_OI[1] = 0
    weight_OI[2, :64] = 0
    for options in (RoundingOptions(), MSE):
        quantized = round_to_nearest(weight_OI, None, GRIDS[name], options)
        assert (quantized.dequantize()[weight_OI == 0] == 0).all()
        assert torch.equal(quantized.scale_OG[1], grid_one(name).expand_as(quantized.scale_OG[1]))
        assert torch.isfinite(quantized.scale_OG).all()


def test_a_group_too_small_for_the_scales_dtype_still_has_a_positive_scale() -> None:
    quantized = round_to_nearest(torch.full((1, 8), 1e-9), None, Grid("int", 4, scale_dtype=torch.float16))
    assert quantized.scale_OG.item() > 0
    assert quantized.dequantize().abs().max() <= 1e-9


@pytest.mark.parametrize(
    ("grid", "codes", "scale"),
    [
        (Grid("int", 8), [[127.0, -5.0, 0.0], [-127.0, 3.0, 88.0]], [[0.5], [0.25]]),
        (Grid("float", 8), [[448.0, -0.875, 0.0], [-448.0, 26.0, 1.125]], [[0.5], [2.0]]),
        (Grid("int", 4, symmetric=False), [[15.0, 0.0, 3.0], [-4.0, 11.0, 1.0]], [[0.5], [0.25]]),
    ],
)
def test_a_matrix_on_the_grid_round_trips_exactly(
    grid: Grid, codes: list[list[float]], scale: list[list[float]]
) -> None:
    weight_OI = torch.tensor(codes) * torch.tensor(scale)
    assert torch.equal(round_to_nearest(weight_OI, None, grid).dequantize(), weight_OI)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("with_hessian", [True, False])
def test_searched_scales_never_have_a_larger_weighted_error(name: str, with_hessian: bool) -> None:
    torch.manual_seed(3)
    weight_OI = torch.randn(140, 128) ** 3
    hessian_II = torch.diag(torch.rand(128) ** 4) if with_hessian else None
    energy_I = torch.ones(128) if hessian_II is None else hessian_II.diagonal()
    grid = GRIDS[name]
    errors = []
    for options in (RoundingOptions(), MSE):
        miss_OI = weight_OI - round_to_nearest(weight_OI, hessian_II, grid, options).dequantize()
        width = grid.group_size or 128
        errors.append((miss_OI.square() * energy_I).unflatten(1, (-1, width)).sum(2))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("name", ["int8", "fp8", "int4 asymmetric g64"])
def test_splitting_undoes_stacking(name: str) -> None:
    torch.manual_seed(4)
    layers = [torch.randn(size, 128) for size in (5, 1, 3)]
    parts = round_to_nearest(torch.cat(layers), None, GRIDS[name], MSE).split([5, 1, 3])
    for layer, part in zip(layers, parts, strict=True):
        alone = round_to_nearest(layer, None, GRIDS[name], MSE)
        assert torch.equal(part.codes_OI.float(), alone.codes_OI.float())
        assert torch.equal(part.dequantize(), alone.dequantize())


def test_a_group_size_that_does_not_divide_the_inputs_is_an_error_that_lists_alternatives() -> None:
    with pytest.raises(
        UserError, match=r"group_size: '64' does not divide the 96 .*choose from 8, 12, 16, 24, 32, 48, 96"
    ):
        round_to_nearest(torch.randn(2, 96), None, Grid("int", 4, group_size=64))


def test_output_error_is_the_relative_change_of_the_outputs() -> None:
    torch.manual_seed(5)
    weight_OI, inputs_TI = torch.randn(6, 33), torch.randn(50, 33) @ torch.randn(33, 33)
    quantized = round_to_nearest(weight_OI, None, Grid("int", 4))
    outputs_TO, moved_TO = inputs_TI @ weight_OI.T, inputs_TI @ quantized.dequantize().T
    expected = float((outputs_TO - moved_TO).norm() / outputs_TO.norm())
    assert output_error(weight_OI, quantized.dequantize(), inputs_TI.T @ inputs_TI / 50) == pytest.approx(
        expected, rel=1e-4
    )
    assert output_error(weight_OI, quantized.dequantize(), None) == relative_error(weight_OI, quantized.dequantize())
    assert relative_error(weight_OI, quantized.dequantize()) == pytest.approx(
        float((weight_OI - quantized.dequantize()).norm() / weight_OI.norm())
    )


def test_a_layer_of_zeros_has_no_error() -> None:
    quantized = round_to_nearest(torch.zeros(2, 3), None, Grid("int", 8))
    assert relative_error(torch.zeros(2, 3), quantized.dequantize()) == 0.0
    assert output_error(torch.zeros(2, 3), quantized.dequantize(), torch.eye(3)) == 0.0


def test_smoothing_with_strength_one_half_equalizes_the_peaks() -> None:
    inputs_I, weights_I = torch.tensor([100.0, 0.3, 2.0]), torch.tensor([0.01, 5.0, 2.0])
    scale_I = smooth_scales(inputs_I, weights_I, 0.5)
    torch.testing.assert_close(inputs_I / scale_I, weights_I * scale_I)


def test_smoothing_with_strength_zero_or_one_moves_the_complete_range() -> None:
    inputs_I, weights_I = torch.tensor([8.0, 0.5]), torch.tensor([4.0, 0.1])
    torch.testing.assert_close(smooth_scales(inputs_I, weights_I, 1.0), inputs_I)
    torch.testing.assert_close(smooth_scales(inputs_I, weights_I, 0.0), 1 / weights_I)
    torch.testing.assert_close(
        smooth_scales(inputs_I, weights_I, 0.8), torch.tensor([8**0.8 / 4**0.2, 0.5**0.8 / 0.1**0.2])
    )


def test_smoothing_leaves_dead_inputs_unchanged() -> None:
    scale_I = smooth_scales(torch.tensor([0.0, 3.0, 0.0, 1e-30]), torch.tensor([2.0, 0.0, 0.0, 1e4]), 0.8)
    assert scale_I[:3].tolist() == [1.0, 1.0, 1.0]
    assert scale_I[3] == pytest.approx(1e-5)
    assert scale_I.dtype == torch.float32


def test_awq_factors_are_the_best_of_their_kind_in_float64_and_spare_large_inputs() -> None:
    torch.manual_seed(4)
    weight_OI, inputs_NI = torch.randn(24, 32), torch.randn(200, 32)
    inputs_NI *= torch.linspace(0, 4, 32).exp()
    inputs_NI[:, 3] = 0
    hessian_II = inputs_NI.T @ inputs_NI / 200
    grid = GRIDS["int4 by rows"]

    def lost(scale_I: Tensor) -> float:
        error_OI = weight_OI - round_to_nearest(weight_OI * scale_I, None, grid).dequantize() / scale_I
        return float((inputs_NI.double() @ error_OI.double().T).square().sum())

    size_I = inputs_NI.square().mean(0).sqrt()
    live_I = size_I > 0
    best_I, best = torch.ones(32), float("inf")
    for trial in range(20):
        power_I = size_I ** (trial / 20)
        scale_I = power_I / (power_I[live_I].max() * power_I[live_I].min()).sqrt()
        scale_I[3] = 1.0
        if lost(scale_I) < best:
            best_I, best = scale_I, lost(scale_I)
    found_I = awq_scales(weight_OI, hessian_II, lambda weight: round_to_nearest(weight, None, grid).dequantize())
    torch.testing.assert_close(found_I, best_I)
    assert found_I[3] == 1
    assert found_I[31] > found_I[0] * 2
    assert best < 0.8 * lost(torch.ones(32))


def test_awq_gives_inputs_that_are_never_used_the_factor_one() -> None:
    ones = awq_scales(torch.randn(2, 3), torch.zeros(3, 3), lambda weight: weight)
    assert ones.tolist() == [1.0, 1.0, 1.0]


def test_scales_are_stored_as_fp8_times_a_global_scale_or_as_powers_of_two() -> None:
    scale = torch.tensor([1e-9, 0.011, 0.7, 1.4, 1.6, 1e9])
    stored = GRIDS["nvfp4"].storable(scale) * 37.5
    assert torch.allclose(stored, torch.tensor([2.0**-9, 0.40625, 26.0, 52.0, 60.0, 448.0]))
    assert GRIDS["mxfp4"].storable(scale)[1:5].tolist() == [2.0**-7, 0.5, 1.0, 2.0]


def test_four_bit_floats_round_ties_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.0])
    rounded = GRIDS["mxfp4"].encode(ties, torch.tensor(1.0), None)
    assert rounded.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0]


def test_rows_of_a_block_share_the_scale_of_their_largest_weight() -> None:
    torch.manual_seed(5)
    weight_OI = torch.randn(6, 8)
    grid = Grid("float", 8, group_size=4, block_rows=4)
    scale_OG = grid.fit(weight_OI)[0]
    for rows in (slice(0, 4), slice(4, 6)):
        for group in (0, 1):
            peak = weight_OI[rows, 4 * group : 4 * group + 4].abs().max()
            torch.testing.assert_close(scale_OG[rows, group], (peak / 448).expand(len(scale_OG[rows])))


@pytest.mark.parametrize("options", [RoundingOptions(), MSE], ids=["minmax", "mse"])
def test_a_short_last_group_is_rounded_as_if_zeros_filled_it(options: RoundingOptions) -> None:
    torch.manual_seed(6)
    weight_OI, energy_I = torch.randn(5, 75), torch.rand(96)
    energy_I[75:] = 0
    grid = Grid("float", 8, group_size=32, block_rows=4, allows_short_group=True)
    short = round_to_nearest(weight_OI, torch.diag(energy_I[:75]), grid, options)
    filled_OI = torch.nn.functional.pad(weight_OI, (0, 21))
    filled = round_to_nearest(filled_OI, torch.diag(energy_I), grid, options)
    assert torch.equal(short.scale_OG, filled.scale_OG)
    assert torch.equal(short.dequantize(), filled.dequantize()[:, :75])


def test_values_are_rounded_with_scales_from_their_own_extremes() -> None:
    torch.manual_seed(8)
    x = torch.randn(2, 3, 64).bfloat16()
    rounded = GRIDS["nvfp4"].nearest(x)
    assert (rounded.shape, rounded.dtype) == (x.shape, x.dtype)
    expected = round_to_nearest(x.flatten(0, 1).float(), None, GRIDS["nvfp4"]).dequantize()
    assert torch.equal(rounded.flatten(0, 1), expected.bfloat16())


def test_the_global_scale_gives_the_largest_weight_the_largest_stored_scale() -> None:
    torch.manual_seed(7)
    weight_OI = 0.02 * torch.randn(4, 32)
    grid = Grid("float", 4, group_size=16, scale_dtype=torch.float8_e4m3fn, global_scale=1.0)
    grid = replace(grid, global_scale=fp4_global_scale(float(weight_OI.abs().max())))
    quantized = round_to_nearest(weight_OI, None, grid)
    assert float((quantized.scale_OG * grid.global_scale).max()) == pytest.approx(448)
    assert float(quantized.dequantize().abs().max()) == pytest.approx(float(weight_OI.abs().max()))
    assert [fp4_global_scale(peak) for peak in (0.0, 1e-45, 6.0)] == [1.0, 1.0, 448.0]
