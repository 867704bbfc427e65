from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimserve.compress.quantize import Grid, Quantized, RoundingOptions, output_error, round_to_nearest
from slimserve.compress.rounding import ROUNDINGS
from slimserve.core.errors import UserError

GRIDS = {
    "int8": Grid("int", 8),
    "fp8": Grid("float", 8),
    "int4 by rows": Grid("int", 4),
    "int4 g32": Grid("int", 4, group_size=32, scale_dtype=torch.bfloat16),
    "int4 g64": Grid("int", 4, group_size=64, scale_dtype=torch.bfloat16),
    "int4 asymmetric by rows": Grid("int", 4, symmetric=False),
    "int4 asymmetric g32": Grid("int", 4, symmetric=False, group_size=32, scale_dtype=torch.bfloat16),
    "nvfp4": Grid("float", 4, group_size=16, scale_dtype=torch.float8_e4m3fn, global_scale=37.5),
    "mxfp4": Grid("float", 4, group_size=32, scale_dtype=torch.float8_e8m0fnu),
}
ACTIVATION = RoundingOptions(order="activation")
by_method = pytest.mark.parametrize("method", [name for name, method in ROUNDINGS.items() if method.needs_data])
by_grid = pytest.mark.parametrize("name", GRIDS)


def make_layer(num_outputs: int, num_inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight, and the Hessian of correlated inputs of very different sizes."""
    torch.manual_seed(seed)
    inputs_TI = torch.randn(3 * num_inputs, num_inputs) @ torch.randn(num_inputs, num_inputs) * num_inputs**-0.5
    inputs_TI = (inputs_TI + torch.randn(3 * num_inputs, 1)) * torch.rand(num_inputs).mul(4).exp()
    return torch.randn(num_outputs, num_inputs), inputs_TI.T @ inputs_TI / (3 * num_inputs)


def damped(hessian_II: Tensor, damping: float = 0.01) -> Tensor:
    damped_hessian_II = hessian_II.double()
    return damped_hessian_II + damping * damped_hessian_II.diagonal().mean() * torch.eye(
        len(hessian_II), dtype=torch.float64
    )


def row_objectives(weight_OI: Tensor, quantized: Quantized, damped_hessian_II: Tensor) -> Tensor:
    error_OI = weight_OI.double() - quantized.dequantize().double()
    return ((error_OI @ damped_hessian_II) * error_OI).sum(1)


def textbook_gptq(weight_OI: Tensor, damped_hessian_II: Tensor, grid: Grid, order: list[int]) -> Tensor:
    """Return the codes of optimal brain surgery, from which GPTQ (section 3) starts: H⁻¹ updated after each feature."""
    start = round_to_nearest(weight_OI, None, grid)
    width = weight_OI.shape[1] // start.scale_OG.shape[1]
    weight, inverse = weight_OI.double().clone(), torch.linalg.inv(damped_hessian_II)
    codes_OI = torch.zeros_like(weight_OI)
    for index in order:
        scale_O = start.scale_OG[:, index // width].double()
        zero_O = None if start.zero_OG is None else start.zero_OG[:, index // width].double()
        codes_O = grid.encode(weight[:, index], scale_O, zero_O)
        codes_OI[:, index] = codes_O.float()
        error_O = (weight[:, index] - grid.decode(codes_O, scale_O, zero_O)) / inverse[index, index]
        weight -= error_O[:, None] * inverse[index]
        inverse -= inverse[:, index, None] * inverse[index] / inverse[index, index]
        inverse[index, index] = 1.0  # a finished feature needs only its zero row and column
    return codes_OI


@by_method
@by_grid
def test_uncorrelated_inputs_round_to_nearest(method: str, name: str) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(5, 192)
    nearest = round_to_nearest(weight_OI, None, GRIDS[name])
    for options in (RoundingOptions(), ACTIVATION):
        rounded = ROUNDINGS[method](weight_OI, torch.eye(192), GRIDS[name], options)
        assert torch.equal(rounded.codes_OI.float(), nearest.codes_OI.float())
        assert rounded.codes_OI.dtype == nearest.codes_OI.dtype
        assert torch.equal(rounded.scale_OG, nearest.scale_OG)
        assert rounded.zero_OG is None or torch.equal(rounded.zero_OG, nearest.zero_OG)
        assert rounded.notes == {}


@by_grid
@pytest.mark.parametrize("options", [RoundingOptions(), ACTIVATION], ids=["natural", "activation"])
def test_gptq_equals_the_slow_textbook_version(name: str, options: RoundingOptions) -> None:
    grid = GRIDS[name]
    weight_OI, hessian_II = make_layer(7, 96 if grid.group_size in (16, 32) else 64 if grid.group_size else 75)
    order = torch.arange(len(hessian_II))
    if options.order == "activation":
        order = hessian_II.diagonal().argsort(descending=True)
    expected_OI = textbook_gptq(weight_OI, damped(hessian_II), grid, order.tolist())
    rounded = ROUNDINGS["gptq"](weight_OI, hessian_II, grid, options)
    assert torch.equal(rounded.codes_OI.float(), expected_OI)
    assert not torch.equal(expected_OI, round_to_nearest(weight_OI, None, grid).codes_OI.float())


def test_activation_order_equals_permuting_by_hand() -> None:
    weight_OI, hessian_II = make_layer(5, 75)
    order_I = hessian_II.diagonal().argsort(descending=True)
    by_hand = ROUNDINGS["gptq"](
        weight_OI[:, order_I], hessian_II[order_I][:, order_I], GRIDS["int8"], RoundingOptions()
    )
    rounded = ROUNDINGS["gptq"](weight_OI, hessian_II, GRIDS["int8"], ACTIVATION)
    assert torch.equal(rounded.codes_OI[:, order_I], by_hand.codes_OI)
    assert torch.equal(rounded.scale_OG, by_hand.scale_OG)


@by_grid
def test_methods_that_use_data_have_a_smaller_output_error(name: str) -> None:
    weight_OI, hessian_II = make_layer(33, 192)
    grid = GRIDS[name]
    damped_hessian_II = damped(hessian_II).float()
    nearest, once, swept, searched = (
        output_error(weight_OI, ROUNDINGS[method](weight_OI, hessian_II, grid, options).dequantize(), damped_hessian_II)
        for method, options in (
            ("rtn", RoundingOptions()),
            ("gptq", ACTIVATION),
            ("quantease", ACTIVATION),
            ("quantease", RoundingOptions(order="activation", scales="mse")),
        )
    )
    assert nearest > 1.5 * once > 1.5 * swept
    assert searched < nearest / 1.5
    # 8 bits leave too little error for a clear difference, and powers of two too few scales.
    assert searched < swept or grid.num_bits == 8 or grid.scale_dtype == torch.float8_e8m0fnu


@by_grid
@pytest.mark.parametrize("scales", ["minmax", "mse"])
def test_no_sweep_raises_the_objective_of_any_row(name: str, scales: str) -> None:
    weight_OI, hessian_II = make_layer(9, 192)
    damped_hessian_II = damped(hessian_II)
    options = RoundingOptions(scales="mse" if scales == "mse" else "minmax")
    previous_O = row_objectives(
        weight_OI, ROUNDINGS["gptq"](weight_OI, hessian_II, GRIDS[name], options), damped_hessian_II
    )
    first_O = previous_O
    for sweeps in range(6):
        swept = ROUNDINGS["quantease"](weight_OI, hessian_II, GRIDS[name], replace(options, sweeps=sweeps))
        objective_O = row_objectives(weight_OI, swept, damped_hessian_II)
        assert (objective_O <= previous_O * (1 + 1e-6)).all()
        previous_O = objective_O
    assert previous_O.sum() < 0.99 * first_O.sum()


@pytest.mark.parametrize(
    "grid",
    [Grid("int", 4), Grid("int", 4, symmetric=False, group_size=7), Grid("float", 8)],
    ids=["sym", "asym", "fp8"],
)
def test_no_single_code_can_be_improved_after_the_sweeps(grid: Grid) -> None:
    weight_OI, hessian_II = make_layer(3, 35)
    damped_hessian_II = damped(hessian_II)
    swept = ROUNDINGS["quantease"](weight_OI, hessian_II, grid, RoundingOptions(sweeps=100))
    reached_O = row_objectives(weight_OI, swept, damped_hessian_II)
    codes = torch.arange(-8, 8).to(torch.int8)
    if grid.kind == "float":
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        codes = codes[~codes.float().isnan()]
    for index in range(35):
        for code in codes:
            changed_OI = swept.codes_OI.clone()
            changed_OI[:, index] = code
            changed_O = row_objectives(weight_OI, replace(swept, codes_OI=changed_OI), damped_hessian_II)
            assert (changed_O >= reached_O * (1 - 1e-6)).all()


def test_sweeps_stop_once_no_code_changes() -> None:
    num_rounded = []

    class CountingGrid(Grid):
        def encode(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
            num_rounded.append(1)
            return super().encode(values, scale, zero)

    ROUNDINGS["quantease"](torch.randn(3, 40), torch.eye(40), CountingGrid("int", 8), RoundingOptions(sweeps=50))
    assert len(num_rounded) == 40 + 40  # GPTQ, and one sweep that changes nothing


def test_no_scale_of_a_block_can_be_improved_after_the_sweeps() -> None:
    weight_OI, hessian_II = make_layer(6, 30)
    damped_hessian_II = damped(hessian_II)
    grid = Grid("float", 8, group_size=12, block_rows=4, allows_short_group=True)
    swept = ROUNDINGS["quantease"](weight_OI, hessian_II, grid, RoundingOptions(sweeps=50, scales="mse"))
    assert swept.scale_OG.shape == (6, 3)
    reached = row_objectives(weight_OI, swept, damped_hessian_II).sum()
    for rows in (slice(0, 4), slice(4, 6)):
        assert (swept.scale_OG[rows] == swept.scale_OG[rows][:1]).all()
        for group in range(3):
            for factor in (0.97, 0.99, 1.01, 1.03):
                moved_OG = swept.scale_OG.clone()
                moved_OG[rows, group] *= factor
                moved = replace(swept, scale_OG=moved_OG)
                assert row_objectives(weight_OI, moved, damped_hessian_II).sum() > reached


def test_no_single_scale_can_be_improved_after_the_sweeps() -> None:
    weight_OI, hessian_II = make_layer(3, 36)
    damped_hessian_II = damped(hessian_II)
    options = RoundingOptions(sweeps=50, scales="mse")
    swept = ROUNDINGS["quantease"](weight_OI, hessian_II, Grid("int", 4, group_size=12), options)
    reached_O = row_objectives(weight_OI, swept, damped_hessian_II)
    for group in range(3):
        for factor in (0.97, 0.99, 1.01, 1.03):
            moved_OG = swept.scale_OG.clone()
            moved_OG[:, group] *= factor
            assert (row_objectives(weight_OI, replace(swept, scale_OG=moved_OG), damped_hessian_II) > reached_O).all()


@by_method
@by_grid
def test_refitted_scales_are_exact_in_the_stored_dtype(method: str, name: str) -> None:
    weight_OI, hessian_II = make_layer(5, 64)
    weight_OI[1] = 0
    grid = GRIDS[name]
    rounded = ROUNDINGS[method](weight_OI, hessian_II, grid, RoundingOptions(scales="mse"))
    assert rounded.scale_OG[1].eq(grid.storable(torch.tensor(1.0))).all()
    assert rounded.dequantize()[1].eq(0).all()
    assert torch.equal(rounded.scale_OG, grid.storable(rounded.scale_OG))
    assert (rounded.scale_OG > 0).all()
    assert not torch.equal(rounded.scale_OG, round_to_nearest(weight_OI, None, grid).scale_OG)


@by_method
@pytest.mark.parametrize(
    "options",
    [RoundingOptions(), RoundingOptions(damping=0.0), RoundingOptions(order="activation", scales="mse")],
    ids=["natural", "undamped", "activation"],
)
def test_dead_inputs_round_to_nearest_and_are_counted(method: str, options: RoundingOptions) -> None:
    weight_OI, hessian_II = make_layer(5, 70)
    dead = [0, 33, 69]
    hessian_II[dead] = 0
    hessian_II[:, dead] = 0
    rounded = ROUNDINGS[method](weight_OI, hessian_II, GRIDS["int8"], options)
    assert rounded.notes == {"num_dead_inputs": 3}
    miss_OD = (weight_OI - rounded.dequantize())[:, dead].abs()
    assert (miss_OD <= 0.5001 * rounded.scale_OG).all()
    # Live inputs must give the same codes without the dead ones; the damping's mean is over live inputs only.
    live = [index for index in range(70) if index not in dead]
    if options == RoundingOptions():
        weight_OI[:, dead] = 0
        without = ROUNDINGS[method](weight_OI, hessian_II, GRIDS["int8"], options)
        alone = ROUNDINGS[method](weight_OI[:, live], hessian_II[live][:, live], GRIDS["int8"], options)
        assert torch.equal(without.codes_OI[:, live], alone.codes_OI)


@by_method
def test_a_zero_hessian_rounds_to_nearest(method: str) -> None:
    weight_OI = torch.randn(3, 40)
    rounded = ROUNDINGS[method](weight_OI, torch.zeros(40, 40), GRIDS["int8"], ACTIVATION)
    assert torch.equal(rounded.codes_OI, round_to_nearest(weight_OI, None, GRIDS["int8"]).codes_OI)
    assert rounded.notes == {"num_dead_inputs": 40}


@by_method
def test_a_hessian_of_fewer_tokens_than_inputs_works(method: str) -> None:
    torch.manual_seed(6)
    weight_OI, inputs_TI = torch.randn(9, 130), torch.randn(11, 130)
    hessian_II = inputs_TI.T @ inputs_TI / 11
    rounded = ROUNDINGS[method](weight_OI, hessian_II, GRIDS["int4 by rows"], ACTIVATION)
    assert rounded.notes == {}
    nearest = round_to_nearest(weight_OI, None, GRIDS["int4 by rows"])
    assert output_error(weight_OI, rounded.dequantize(), hessian_II) < 0.3 * output_error(
        weight_OI, nearest.dequantize(), hessian_II
    )


@by_method
def test_damping_is_raised_as_far_as_needed_and_recorded(method: str) -> None:
    hessian_II = torch.eye(5)
    hessian_II[0, 1] = hessian_II[1, 0] = 1.05  # least eigenvalue -0.05
    rounded = ROUNDINGS[method](torch.randn(3, 5), hessian_II, GRIDS["int8"], RoundingOptions(damping=0.001))
    assert rounded.notes == {"damping_used": pytest.approx(0.1)}


@by_method
@pytest.mark.parametrize("off_diagonal", [300.0, float("nan")])
def test_a_hessian_that_no_damping_fixes_is_an_error(method: str, off_diagonal: float) -> None:
    hessian_II = torch.eye(5)
    hessian_II[0, 1] = hessian_II[1, 0] = off_diagonal
    with pytest.raises(UserError, match="damping: '0.01' leaves the Hessian"):
        ROUNDINGS[method](torch.randn(3, 5), hessian_II, GRIDS["int8"], RoundingOptions())


@by_method
@pytest.mark.parametrize("name", ["int8", "int4 asymmetric g32"])
def test_stacked_layers_round_as_they_do_alone(method: str, name: str) -> None:
    weight_OI, hessian_II = make_layer(12, 96)
    options = RoundingOptions(order="activation", scales="mse")
    together = ROUNDINGS[method](weight_OI, hessian_II, GRIDS[name], options).split([5, 7])
    for part, rows in zip(together, (weight_OI[:5], weight_OI[5:]), strict=True):
        alone = ROUNDINGS[method](rows, hessian_II, GRIDS[name], options)
        assert torch.equal(part.codes_OI, alone.codes_OI)
        torch.testing.assert_close(part.scale_OG, alone.scale_OG, rtol=1e-4, atol=0)


@by_method
def test_codes_do_not_depend_on_the_scale_of_the_inputs(method: str) -> None:
    weight_OI, hessian_II = make_layer(5, 70)
    hessian_II[:, 3] = hessian_II[3] = 0
    rounded = ROUNDINGS[method](weight_OI, hessian_II, GRIDS["int8"], ACTIVATION)
    scaled = ROUNDINGS[method](weight_OI, hessian_II * 2.0**-20, GRIDS["int8"], ACTIVATION)
    assert torch.equal(rounded.codes_OI, scaled.codes_OI)


@by_method
def test_the_arguments_are_not_changed(method: str) -> None:
    weight_OI, hessian_II = make_layer(5, 64)
    hessian_II = hessian_II.double()  # float64 needs no conversion, so a missing copy would show
    weight, hessian = weight_OI.clone(), hessian_II.clone()
    ROUNDINGS[method](weight_OI, hessian_II, GRIDS["int4 g32"], RoundingOptions(order="activation", scales="mse"))
    assert torch.equal(weight, weight_OI)
    assert torch.equal(hessian, hessian_II)


@by_method
def test_missing_data_is_an_error(method: str) -> None:
    with pytest.raises(UserError, match=f"method: '{method}' needs calibration data"):
        ROUNDINGS[method](torch.randn(3, 5), None, GRIDS["int8"], RoundingOptions())


@by_method
def test_a_group_size_that_does_not_divide_the_inputs_is_an_error_that_lists_alternatives(method: str) -> None:
    weight_OI, hessian_II = make_layer(3, 48)
    with pytest.raises(UserError, match=r"group_size: '32' does not divide the 48 .*choose from 8, 12, 16, 24, 48"):
        ROUNDINGS[method](weight_OI, hessian_II, GRIDS["int4 g32"], RoundingOptions())
