"""Rounding methods: GPTQ and QuantEase as pure tensor functions, and the registry of all methods.

Both minimise the change of the layer's outputs, tr(E H Eᵀ), where E = W - Q is the rounding error and H is the damped
Hessian. Both visit the input features and round each to the grid point nearest to a target that compensates for the
errors of other features:

    target_i = W_i + Σ_j feedback_ij E_j

GPTQ visits each feature once and compensates for the features before it. QuantEase repeats and compensates for all
other features. One loop therefore serves both; they differ in `feedback`. Rows are independent, so layers that share an
input can be stacked along O and rounded together.

Shape suffixes: O output features; I input features; G groups of input features that share a scale; B features of a
block. Inside this file weights are transposed, `[I, O]`, so that the weights of one feature are contiguous.

A new method is a function with the signature of `gptq`, plus one row in `ROUNDINGS`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimserve.compress.quantize import Grid, Quantized, RoundingMethod, RoundingOptions, fit_scales, round_to_nearest
from slimserve.core.errors import UserError

_BLOCK_SIZE = 32
"""Features whose feedback to each other is applied one by one; feedback between blocks is a matrix product."""
_MAX_FLOAT64_WIDTH = 2048
"""Widest Hessian that is factorized in float64; for wider ones float64 costs more time and memory than it gains."""
_MAX_DAMPING_RAISES = 3


@torch.no_grad()
def gptq(weight_OI: Tensor, hessian_II: Tensor | None, grid: Grid, options: RoundingOptions | None = None) -> Quantized:
    """Round feature by feature; each compensates for the errors of those before it (GPTQ, arXiv 2210.17323, section 3).

    The implementation differs from the paper in three points. It feeds errors back through the Cholesky factor of H
    itself, so it inverts nothing; QuIP (arXiv 2307.13304) proves that the result is the same. Groups keep the scales
    fitted to the original weight, so `order="activation"` needs no permuted groups in the file. `scales="mse"` finally
    refits the scales to the codes by least squares, which never raises the objective.

    `weight_OI` and `hessian_II` (XᵀX / num_tokens, undamped) are float32 and are not changed. An input that is zero in
    all samples is rounded to nearest and counted in the note `num_dead_inputs`. If H cannot be factorized, the damping
    grows tenfold, up to three times; the note `damping_used` then holds the value. Raises UserError without a Hessian,
    if the group size does not divide I, and if no damping suffices.
    """
    options = options or RoundingOptions()
    factors = _factorize("gptq", hessian_II, options)
    return _round_once(weight_OI, hessian_II, grid, options, factors).quantized(factors.notes)


@torch.no_grad()
def quantease(
    weight_OI: Tensor, hessian_II: Tensor | None, grid: Grid, options: RoundingOptions | None = None
) -> Quantized:
    """Improve GPTQ's solution by coordinate descent (QuantEase, arXiv 2309.01885, section 3).

    Each of up to `options.sweeps` sweeps sets every feature to its best codes given all others, until no code changes.
    The objective never rises by more than float32 rounding: at most 1.5e-6 of a row's objective in nine sweeps,
    measured on real layers. The implementation differs from the paper in two points. The feedback of a complete block
    is recomputed from the errors, so rounding errors do not accumulate. `scales="mse"` also moves the scales to their
    least-squares values after each sweep. Arguments, notes and errors are those of `gptq`.
    """
    options = options or RoundingOptions()
    factors = _factorize("quantease", hessian_II, options)
    state = _round_once(weight_OI, hessian_II, grid, options, factors)
    damped_hessian_II = factors.damped_hessian_II.float()
    feedback_II = damped_hessian_II / damped_hessian_II.diagonal()[:, None]
    feedback_II.fill_diagonal_(0)
    for _ in range(options.sweeps):
        before_IO = state.codes_IO.clone()
        for block in _blocks(len(before_IO)):
            feedback_BI = feedback_II[block].clone()
            feedback_BI[:, block].triu_()  # round_block adds the block's own earlier features, which change on the way
            target_BO = torch.addmm(state.weight_IO[block], feedback_BI, state.error_IO)
            state.round_block(block, target_BO, feedback_II)
        if torch.equal(before_IO, state.codes_IO):
            break
        if options.scales == "mse":
            state.refit_scales(damped_hessian_II)
    return state.quantized(factors.notes)


ROUNDINGS: dict[str, RoundingMethod] = {
    "rtn": RoundingMethod(round_to_nearest),
    "gptq": RoundingMethod(gptq, needs_data=True),
    "quantease": RoundingMethod(quantease, needs_data=True),
}
"""Rounding methods by the name that a recipe gives them."""


def rounding_method(name: str) -> RoundingMethod:
    """Return the method of that name. Raises UserError that lists the names if there is none."""
    if name not in ROUNDINGS:
        raise UserError("method", name, "is not a rounding method", f"choose from {', '.join(ROUNDINGS)}")
    return ROUNDINGS[name]


@dataclass(frozen=True)
class _Factors:
    """The damped Hessian H of a layer's inputs and its Cholesky factor."""

    damped_hessian_II: Tensor
    """H, features in their natural order."""
    order_I: Tensor
    """Features in the order in which GPTQ rounds them."""
    upper_II: Tensor
    """Upper triangular V with V Vᵀ = H, features in `order_I`."""
    notes: dict[str, int | float]


def _factorize(method: str, hessian_II: Tensor | None, options: RoundingOptions) -> _Factors:
    if hessian_II is None:
        raise UserError("method", method, "needs calibration data", "give the recipe calibration data, or use rtn")
    dtype = torch.float64 if len(hessian_II) <= _MAX_FLOAT64_WIDTH else torch.float32
    energy_I = hessian_II.diagonal().to(dtype)
    is_dead_I = energy_I <= 0
    num_dead = int(is_dead_I.sum())
    mean = energy_I[~is_dead_I].mean() if num_dead < len(energy_I) else energy_I.new_tensor(1.0)
    order_I = torch.arange(len(energy_I), device=energy_I.device)
    if options.order == "activation":
        order_I = energy_I.argsort(descending=True, stable=True)
    notes: dict[str, int | float] = {"num_dead_inputs": num_dead} if num_dead else {}
    damping = options.damping
    for num_raises in range(_MAX_DAMPING_RAISES + 1):
        damped_hessian_II = hessian_II.to(dtype, copy=True)
        # A dead input is uncorrelated with all others, so any positive diagonal entry makes it round to nearest.
        damped_hessian_II.diagonal().copy_(torch.where(is_dead_I, mean, energy_I + damping * mean))
        # LAPACK gives the lower factor; reversing both axes turns it into the upper one.
        reverse_I = order_I.flip(0)
        lower_II, failed = torch.linalg.cholesky_ex(damped_hessian_II[reverse_I[:, None], reverse_I])
        if not failed:
            if num_raises:
                notes["damping_used"] = damping
            return _Factors(damped_hessian_II, order_I, lower_II.flip(0, 1), notes)
        damping = max(10 * damping, 1e-4)
    raise UserError(
        "damping",
        options.damping,
        "leaves the Hessian of a layer's inputs singular",
        "raise it, or calibrate on more text",
    )


@dataclass
class _RoundingState:
    """A weight during rounding, with its codes, scales and errors. The methods change it in place."""

    weight_IO: Tensor
    grid: Grid
    scale_GO: Tensor
    zero_GO: Tensor | None
    group_I: list[int]
    """Group index of each feature."""
    codes_IO: Tensor
    """Codes, as float32."""
    error_IO: Tensor
    """Weight minus dequantized codes."""

    def round_block(self, block: slice, target_BO: Tensor, feedback_II: Tensor) -> None:
        """Round the features of a block one by one.

        `target_BO` lacks the feedback from earlier features of the same block; it is overwritten.
        """
        for index in range(block.start, block.stop):
            target_O = target_BO[index - block.start]
            if index > block.start:
                earlier = slice(block.start, index)
                target_O.addmv_(self.error_IO[earlier].T, feedback_II[index, earlier])
            scale_O, zero_O = self.scale_and_zero(self.group_I[index])
            codes_O = self.grid.encode(target_O, scale_O, zero_O)
            self.codes_IO[index] = codes_O
            torch.sub(self.weight_IO[index], self.grid.decode(codes_O, scale_O, zero_O), out=self.error_IO[index])

    def refit_scales(self, damped_hessian_II: Tensor) -> None:
        """Set each group's scale in turn to the minimiser of the objective, with codes and other scales fixed."""
        width = self.grid.width(len(self.weight_IO))
        for group in range(len(self.scale_GO)):
            features = slice(group * width, (group + 1) * width)
            scale_O, zero_O = self.scale_and_zero(group)
            unit_BO = self.grid.decode(self.codes_IO[features], torch.ones_like(scale_O), zero_O)
            slope_O = (damped_hessian_II[features] @ self.error_IO).mul_(unit_BO).sum(0)
            curvature_O = (damped_hessian_II[features, features] @ unit_BO).mul_(unit_BO).sum(0)
            slope_O, curvature_O = self.grid.share(torch.stack((slope_O, curvature_O), 1), torch.sum).unbind(1)
            # The objective is a parabola in the scale, so the storable scale nearest to its vertex is the best.
            best_O = self.grid.storable(scale_O + slope_O / curvature_O)
            scale_O.copy_(torch.where(curvature_O > 0, best_O, scale_O))
            torch.sub(self.weight_IO[features], unit_BO.mul_(scale_O), out=self.error_IO[features])

    def scale_and_zero(self, group: int) -> tuple[Tensor, Tensor | None]:
        return self.scale_GO[group], None if self.zero_GO is None else self.zero_GO[group]

    def reorder(self, order_I: Tensor) -> None:
        """Permute the features; `order_I` holds positions in the present order."""
        # One after the other, because two copies of all three would be the largest memory of a build.
        self.weight_IO = self.weight_IO[order_I]
        self.codes_IO = self.codes_IO[order_I]
        self.error_IO = self.error_IO[order_I]
        self.group_I = [self.group_I[index] for index in order_I.tolist()]

    def quantized(self, notes: dict[str, int | float]) -> Quantized:
        return Quantized(
            self.codes_IO.T.contiguous().to(self.grid.code_dtype),
            self.scale_GO.T.contiguous(),
            None if self.zero_GO is None else self.zero_GO.T.to(torch.int8).contiguous(),
            self.grid,
            notes,
        )


def _round_once(
    weight_OI: Tensor, hessian_II: Tensor | None, grid: Grid, options: RoundingOptions, factors: _Factors
) -> _RoundingState:
    """Run GPTQ and return its state, with features in their natural order."""
    width = grid.width(weight_OI.shape[1])
    scale_OG, zero_OG = fit_scales(weight_OI, hessian_II, grid, options)
    weight_IO = weight_OI.float().T.contiguous()
    state = _RoundingState(
        weight_IO=weight_IO,
        grid=grid,
        scale_GO=scale_OG.T.contiguous(),
        zero_GO=None if zero_OG is None else zero_OG.T.contiguous(),
        group_I=[index // width for index in range(len(weight_IO))],
        codes_IO=torch.empty_like(weight_IO),
        error_IO=torch.empty_like(weight_IO),
    )
    state.reorder(factors.order_I)
    feedback_II = (factors.upper_II / factors.upper_II.diagonal()).T.float().contiguous()
    for block in _blocks(len(weight_IO)):
        earlier = slice(0, block.start)
        target_BO = torch.addmm(state.weight_IO[block], feedback_II[block, earlier], state.error_IO[earlier])
        state.round_block(block, target_BO, feedback_II)
    del feedback_II
    state.reorder(factors.order_I.argsort())
    if options.scales == "mse":
        state.refit_scales(factors.damped_hessian_II.float())
    return state


def _blocks(num_features: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK_SIZE, num_features)) for start in range(0, num_features, _BLOCK_SIZE)]
