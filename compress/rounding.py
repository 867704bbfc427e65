"""Roundings that look at data: GPTQ and QuantEase, as pure functions of a weight and the gram of its inputs.

Both keep the layer's outputs, not its weights: they minimise tr(E H Eᵀ), where E = W - Q is the
rounding error and H the damped gram of the inputs. Both walk over the input features and round
each to the grid point nearest to a target that makes up for the errors elsewhere:

    target_i = W_i + Σ_j feedback_ij E_j

GPTQ walks once and makes up for the features before; QuantEase walks again and again and makes up
for all others. So one loop serves both, and they differ by `feedback`. Rows do not interact: layers
that share an input can be stacked along O and rounded in one go.

Shapes: O output features, I input features, G groups, B features of a block. Inside this file weights
lie transposed, `[I, O]`, for the weights of one feature to be contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimserve.compress.quantize import Grid, Quantized, Rounding, RoundingOptions, fit_scales, round_to_nearest
from slimserve.core.errors import UserError

__all__ = ["NEEDS_DATA", "ROUNDINGS", "Rounding", "RoundingOptions", "gptq", "quantease"]

_BLOCK = 32
"""Features whose feedback to each other is applied one by one; that to others is a matrix product per block."""
_FLOAT64_UP_TO = 2048
"""Widest layer whose gram is factorised in float64: beyond, time and memory cost more than the digits give."""
_MOST_RAISES = 3


@torch.no_grad()
def gptq(weight_OI: Tensor, hessian_II: Tensor | None, grid: Grid, options: RoundingOptions | None = None) -> Quantized:
    """Round feature by feature, each making up for the rounding of those before it (GPTQ, arXiv 2210.17323 §3).

    We differ from the paper in three points. The error is fed back through the Cholesky factor of H
    itself (QuIP, arXiv 2307.13304, proves that this is GPTQ), so nothing is inverted. Groups keep scales
    that were fitted on the original weight, so that `order="activation"` needs no permuted groups in the
    file. And `scales="mse"` refits the scales to the codes at the end by least squares, which never
    raises the objective.

    `weight_OI` and `hessian_II` are float32 and not changed; `hessian_II` is XᵀX / num_tokens, undamped. An input that
    was never seen is rounded to nearest and counted in the notes as `num_dead_inputs`; a gram that cannot
    be factorised gets ten times the damping, up to three times, noted as `damping_used`. Raises UserError
    without a gram, where the group size does not divide I, and where no damping helped.
    """
    options = options or RoundingOptions()
    curvature = _factorise("gptq", hessian_II, options)
    state = _gptq(weight_OI, hessian_II, grid, options, curvature)
    return state.quantized(curvature.notes)


@torch.no_grad()
def quantease(
    weight_OI: Tensor, hessian_II: Tensor | None, grid: Grid, options: RoundingOptions | None = None
) -> Quantized:
    """Coordinate descent from GPTQ's solution (QuantEase, arXiv 2309.01885 §3).

    Each of up to `options.sweeps` sweeps sets every feature in turn to the best codes given all others,
    until no code changes; the objective never rises by more than float32 noise (measured on real layers:
    1.5e-6 of a row's objective over nine sweeps). We differ from the paper in that the
    feedback of a whole block is recomputed from the errors, so that no rounding noise builds up, and in that
    `scales="mse"` also moves the scales to their least-squares values after each sweep.
    Arguments, notes and errors are those of `gptq`.
    """
    options = options or RoundingOptions()
    curvature = _factorise("quantease", hessian_II, options)
    state = _gptq(weight_OI, hessian_II, grid, options, curvature)
    damped_hessian_II = curvature.damped_hessian_II.float()
    feedback_II = damped_hessian_II / damped_hessian_II.diagonal()[:, None]
    feedback_II.fill_diagonal_(0)
    for _ in range(options.sweeps):
        before_IO = state.codes_IO.clone()
        for block in _blocks(len(before_IO)):
            of_others_BI = feedback_II[block].clone()
            of_others_BI[:, block].triu_()  # the block's own earlier features are yet to be rounded anew
            target_BO = torch.addmm(state.weight_IO[block], of_others_BI, state.error_IO)
            state.round_block(block, target_BO, feedback_II)
        if torch.equal(before_IO, state.codes_IO):
            break
        if options.scales == "mse":
            state.refit_scales(damped_hessian_II)
    return state.quantized(curvature.notes)


ROUNDINGS: dict[str, Rounding] = {"rtn": round_to_nearest, "gptq": gptq, "quantease": quantease}
"""Roundings by the name that a recipe gives them."""

NEEDS_DATA: frozenset[str] = frozenset({"gptq", "quantease"})
"""The roundings that cannot do without a gram."""


@dataclass(frozen=True)
class _Curvature:
    """The damped gram H of a layer's inputs and its factor."""

    damped_hessian_II: Tensor
    """H, features in their natural order."""
    order_I: Tensor
    """Features in the order in which GPTQ rounds them."""
    upper_II: Tensor
    """V, upper triangular with V Vᵀ = H, features in `order_I`."""
    notes: dict[str, int | float]


def _factorise(method: str, hessian_II: Tensor | None, options: RoundingOptions) -> _Curvature:
    if hessian_II is None:
        raise UserError("method", method, "needs calibration data", "give the recipe calibration data, or use rtn")
    dtype = torch.float64 if len(hessian_II) <= _FLOAT64_UP_TO else torch.float32
    energy_I = hessian_II.diagonal().to(dtype)
    dead_I = energy_I <= 0
    num_dead = int(dead_I.sum())
    mean = energy_I[~dead_I].mean() if num_dead < len(energy_I) else energy_I.new_tensor(1.0)
    order_I = torch.arange(len(energy_I))
    if options.order == "activation":
        order_I = energy_I.argsort(descending=True, stable=True)
    notes: dict[str, int | float] = {"num_dead_inputs": num_dead} if num_dead else {}
    damping = options.damping
    for num_raises in range(_MOST_RAISES + 1):
        damped_hessian_II = hessian_II.to(dtype, copy=True)
        # A dead input touches no other: any positive curvature makes it round to nearest.
        damped_hessian_II.diagonal().copy_(torch.where(dead_I, mean, energy_I + damping * mean))
        # Reversing both axes turns the lower factor, which LAPACK gives, into the upper one.
        reverse_I = order_I.flip(0)
        lower_II, failed = torch.linalg.cholesky_ex(damped_hessian_II[reverse_I[:, None], reverse_I])
        if not failed:
            if num_raises:
                notes["damping_used"] = damping
            return _Curvature(damped_hessian_II, order_I, lower_II.flip(0, 1), notes)
        damping = max(10 * damping, 1e-4)
    raise UserError(
        "damping",
        options.damping,
        "leaves the gram of a layer's inputs singular",
        "raise it, or calibrate on more text",
    )


@dataclass
class _State:
    """A weight while it is rounded: its codes, and what they miss it by. Methods change it in place."""

    weight_IO: Tensor
    grid: Grid
    scale_GO: Tensor
    zero_GO: Tensor | None
    group_I: list[int]
    """The group of each feature."""
    codes_IO: Tensor
    """Float32 holding codes."""
    error_IO: Tensor
    """Weight minus what the codes stand for."""

    def round_block(self, block: slice, target_BO: Tensor, feedback_II: Tensor) -> None:
        """Round a block's features; `target_BO` lacks the feedback of the block's own earlier ones, and is used up."""
        for index in range(block.start, block.stop):
            target_O = target_BO[index - block.start]
            if index > block.start:
                earlier = slice(block.start, index)
                target_O.addmv_(self.error_IO[earlier].T, feedback_II[index, earlier])
            scale_O, zero_O = self.step_of(self.group_I[index])
            codes_O = self.grid.encode(target_O, scale_O, zero_O)
            self.codes_IO[index] = codes_O
            torch.sub(self.weight_IO[index], self.grid.decode(codes_O, scale_O, zero_O), out=self.error_IO[index])

    def refit_scales(self, damped_hessian_II: Tensor) -> None:
        """Move each group's scale in turn to the minimiser of the objective, codes and other scales fixed."""
        width = len(self.weight_IO) // len(self.scale_GO)
        for group in range(len(self.scale_GO)):
            features = slice(group * width, (group + 1) * width)
            scale_O, zero_O = self.step_of(group)
            steps_BO = self.grid.decode(self.codes_IO[features], torch.ones_like(scale_O), zero_O)
            slope_O = (damped_hessian_II[features] @ self.error_IO).mul_(steps_BO).sum(0)
            bend_O = (damped_hessian_II[features, features] @ steps_BO).mul_(steps_BO).sum(0)
            # The objective is a parabola in the scale, so the storable scale nearest to its vertex is the best.
            best_O = self.grid.storable(scale_O + slope_O / bend_O)
            scale_O.copy_(torch.where(bend_O > 0, best_O, scale_O))
            torch.sub(self.weight_IO[features], steps_BO.mul_(scale_O), out=self.error_IO[features])

    def step_of(self, group: int) -> tuple[Tensor, Tensor | None]:
        return self.scale_GO[group], None if self.zero_GO is None else self.zero_GO[group]

    def reorder(self, order_I: Tensor) -> None:
        """Put the features in the order that is given as positions among the present ones."""
        self.weight_IO, self.codes_IO, self.error_IO = (
            matrix[order_I] for matrix in (self.weight_IO, self.codes_IO, self.error_IO)
        )
        self.group_I = [self.group_I[index] for index in order_I.tolist()]

    def quantized(self, notes: dict[str, int | float]) -> Quantized:
        return Quantized(
            self.codes_IO.T.contiguous().to(self.grid.code_dtype),
            self.scale_GO.T.contiguous(),
            None if self.zero_GO is None else self.zero_GO.T.to(torch.int8).contiguous(),
            self.grid,
            notes,
        )


def _gptq(
    weight_OI: Tensor, hessian_II: Tensor | None, grid: Grid, options: RoundingOptions, curvature: _Curvature
) -> _State:
    width = grid.width(weight_OI.shape[1])
    scale_OG, zero_OG = fit_scales(weight_OI, hessian_II, grid, options)
    weight_IO = weight_OI.float().T.contiguous()
    state = _State(
        weight_IO=weight_IO,
        grid=grid,
        scale_GO=scale_OG.T.contiguous(),
        zero_GO=None if zero_OG is None else zero_OG.T.contiguous(),
        group_I=[index // width for index in range(len(weight_IO))],
        codes_IO=torch.empty_like(weight_IO),
        error_IO=torch.empty_like(weight_IO),
    )
    state.reorder(curvature.order_I)
    feedback_II = (curvature.upper_II / curvature.upper_II.diagonal()).T.float().contiguous()
    for block in _blocks(len(weight_IO)):
        earlier = slice(0, block.start)
        target_BO = torch.addmm(state.weight_IO[block], feedback_II[block, earlier], state.error_IO[earlier])
        state.round_block(block, target_BO, feedback_II)
    state.reorder(curvature.order_I.argsort())
    if options.scales == "mse":
        state.refit_scales(curvature.damped_hessian_II.float())
    return state


def _blocks(num_features: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, num_features)) for start in range(0, num_features, _BLOCK)]
