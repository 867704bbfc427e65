"""Quantization of linear layers: grids, rounding to nearest, scale search, SmoothQuant, AWQ, errors.

Shape suffixes: O output features; I input features; G groups of S adjacent input features that share a scale, with G =
1 where the complete row shares one. All functions work on tensors only. Roundings that read data are in `rounding.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.core.errors import UserError

_FP8 = torch.float8_e4m3fn
_E8M0 = torch.float8_e8m0fnu
_LARGEST_E2M1 = 6.0
_SHRINKS: list[float] = torch.linspace(1.0, 0.7, 21).tolist()
"""Fractions of the extremes that the scale search tries."""
_SHRINKS_E2M1: list[float] = torch.linspace(1.5, 0.7, 33).tolist()
"""The same for 4-bit floats: their steps are finer below 4, so a group's largest value may be better off there."""
_SHRINKS_E8M0 = (1.0, 2.0, 0.5)
"""The same for scales that are powers of two."""
_SCALE_LIMITS = {_FP8: (2.0**-9, 448.0), _E8M0: (2.0**-126, 2.0**127)}
"""Smallest and largest scale in dtypes of which torch.finfo does not know the smallest value."""
_CHUNK_ROWS = 128
"""Rows whose scales are searched together: few enough to stay in one core's cache."""
_NUM_STRENGTHS = 20
"""Number of strengths that AWQ tries."""


@dataclass(frozen=True)
class Grid:
    """The values that a quantized layer can hold: integer or float codes times a scale."""

    kind: Literal["int", "float"]
    """Type of the codes: integers, float8_e4m3fn or, with 4 bits, E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign)."""
    num_bits: int
    """4 or 8."""
    symmetric: bool = True
    """False gives every scale a zero point, so that a one-sided group wastes no codes. Integers only."""
    group_size: int | None = None
    """Input features that share one scale; None means one scale per output feature."""
    scale_dtype: torch.dtype = torch.float32
    """Dtype of the stored scales; codes are computed with the scale as stored."""
    block_rows: int = 1
    """Output features that share the scales of a group, as in FP8 blocks of 128 x 128."""
    allows_short_group: bool = False
    """Whether the last group of a row may have fewer features than the others."""
    global_scale: float = 1.0
    """Factor by which stored scales are larger than scales; NVFP4 fits the range of FP8 to each weight by it."""

    def __post_init__(self) -> None:
        assert self.kind == "int" or self.symmetric, self
        assert self.num_bits in (4, 8), self
        assert _CHUNK_ROWS % self.block_rows == 0, self

    @property
    def lowest(self) -> float:
        """Smallest code."""
        return -(2.0 ** (self.num_bits - 1)) if self.kind == "int" else -self.highest

    @property
    def highest(self) -> float:
        """Largest code."""
        if self.kind == "int":
            return 2.0 ** (self.num_bits - 1) - 1
        return torch.finfo(_FP8).max if self.num_bits == 8 else _LARGEST_E2M1

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of the codes in memory: int8 for integers of any width, float8_e4m3fn for floats of any width."""
        return torch.int8 if self.kind == "int" else _FP8

    @property
    def _top(self) -> float:
        """Code to which a group's largest magnitude is mapped."""
        if self.num_bits == 8:
            return self.highest
        if self.kind == "int":
            return 7.5
        # A power of two lets the largest magnitude reach between 3.5 and 7, where compressed-tensors puts it too. With
        # 14/3 the nearest power of two is that one; slightly less decides ties as the library does.
        return 4.66666 if self.scale_dtype == _E8M0 else _LARGEST_E2M1

    @property
    def shrinks(self) -> Sequence[float]:
        """Factors of the extremes that the scale search tries."""
        if self.scale_dtype == _E8M0:
            return _SHRINKS_E8M0
        return _SHRINKS_E2M1 if self.kind == "float" and self.num_bits == 4 else _SHRINKS

    def width(self, num_inputs: int) -> int:
        """Return the input features per scale in a layer of `num_inputs`.

        Raises UserError that lists the possible sizes if the group size does not divide the inputs.
        """
        if self.group_size is None:
            return num_inputs
        if self.group_size < 1 or (num_inputs % self.group_size and not self.allows_short_group):
            choices = [size for size in range(8, num_inputs + 1) if num_inputs % size == 0] or [num_inputs]
            raise UserError(
                "group_size",
                self.group_size,
                f"does not divide the {num_inputs} input features of a layer",
                f"choose from {', '.join(map(str, choices))}",
            )
        return self.group_size

    def groups(self, matrix_OI: Tensor) -> Tensor:
        """Return the matrix as `[O, G, S]`; a short last group is filled with zeros."""
        width = self.width(matrix_OI.shape[1])
        missing = -matrix_OI.shape[1] % width
        padded_OI = functional.pad(matrix_OI, (0, missing)) if missing else matrix_OI
        return padded_OI.unflatten(1, (-1, width))

    def share(self, values_OG: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """Return the values after `reduce`, such as torch.sum, over the rows that share scales; the shape stays.

        Rows after the last count as zeros.
        """
        if self.block_rows == 1:
            return values_OG
        num_rows = len(values_OG)
        rows_BRG = functional.pad(values_OG, (0, 0, 0, -num_rows % self.block_rows)).unflatten(0, (-1, self.block_rows))
        return reduce(rows_BRG, dim=1, keepdim=True).expand_as(rows_BRG).flatten(0, 1)[:num_rows].contiguous()

    def fit(self, weight_OI: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Return scales `[O, G]` and zero points `[O, G]` that map the extremes of each group to the ends of the grid.

        Both are float32. Scales are exact in `scale_dtype`; zero points are codes, or None for a symmetric grid.
        `shrink` multiplies the extremes. A group of zeros gets the storable scale nearest to 1. Symmetric 8-bit
        integers map the largest magnitude to 127. Symmetric 4-bit integers map it to 7.5, half a step beyond the last
        code, as compressed-tensors does: an unused code would cost more.
        """
        groups_OGS = self.groups(weight_OI.float())
        if self.symmetric:
            span_OG = self.share(groups_OGS.abs().amax(dim=2), torch.amax)
            return self.storable((span_OG * (shrink / self._top)).masked_fill_(span_OG == 0, 1.0)), None
        # The grid must contain zero; otherwise padding and dead weights would become nonzero.
        low_OG = groups_OGS.amin(dim=2).clamp_(max=0)
        span_OG = groups_OGS.amax(dim=2).clamp_(min=0).sub_(low_OG)
        scale_OG = self.storable(span_OG * (shrink / (self.highest - self.lowest))).masked_fill_(span_OG == 0, 1.0)
        zero_OG = (self.lowest - low_OG * shrink / scale_OG).round_().clamp_(self.lowest, self.highest)
        return scale_OG, zero_OG

    def storable(self, scale: Tensor) -> Tensor:
        """Return the nearest scales that `scale_dtype` can store, given `global_scale`: float32, all positive."""
        if self.scale_dtype in _SCALE_LIMITS:
            lowest, highest = _SCALE_LIMITS[self.scale_dtype]
        else:
            lowest, highest = torch.finfo(self.scale_dtype).tiny, torch.finfo(self.scale_dtype).max
        return (scale * self.global_scale).clamp_(lowest, highest).to(self.scale_dtype).float() / self.global_scale

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the codes of the grid points nearest to `values`, as float32. The arguments broadcast."""
        codes = values / scale
        if self.kind == "float":
            codes.clamp_(self.lowest, self.highest)
            return codes.to(_FP8).float() if self.num_bits == 8 else _round_to_e2m1(codes)
        if zero is not None:
            codes += zero
        return codes.round_().clamp_(self.lowest, self.highest)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the values that `codes` represent, float32. The arguments broadcast."""
        return (codes if zero is None else codes - zero) * scale

    def nearest(self, x: Tensor) -> Tensor:
        """Return `[..., I]` rounded with scales from the extremes, as engines round inputs at run time; same dtype."""
        x_TI = x.reshape(-1, x.shape[-1]).float()
        scale_TG, zero_TG = self.fit(x_TI)
        zero_TG1 = None if zero_TG is None else zero_TG[:, :, None]
        codes_TGS = self.encode(self.groups(x_TI), scale_TG[:, :, None], zero_TG1)
        rounded_TI = self.decode(codes_TGS, scale_TG[:, :, None], zero_TG1).flatten(1)[:, : x.shape[-1]]
        return rounded_TI.to(x.dtype).view(x.shape)


def _round_to_e2m1(codes: Tensor) -> Tensor:
    """Return the nearest 4-bit floats to values from -6 to 6, ties to the even code."""
    magnitude = codes.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return codes.div_(step).round_().mul_(step)


def fp4_global_scale(peak: float) -> float:
    """Return NVFP4's factor of the stored scales of values up to `peak`, exact in float32: the peak's is 448.

    A peak of zero, or one whose factor is beyond float32, gives 1.
    """
    factor = float(torch.tensor(torch.finfo(_FP8).max * _LARGEST_E2M1) / torch.tensor(peak))
    return factor if 0 < factor < torch.inf else 1.0


@dataclass(frozen=True)
class Quantized:
    """A quantized weight."""

    codes_OI: Tensor
    """int8 from -2**(bits-1) to 2**(bits-1) - 1, symmetric or not; or float8_e4m3fn, with 4 bits too."""
    scale_OG: Tensor
    """float32, positive, exact in `grid.scale_dtype`."""
    zero_OG: Tensor | None
    """Zero points, int8 in the range of the codes; None for a symmetric grid."""
    grid: Grid
    notes: dict[str, int | float] = field(default_factory=dict)
    """Deviations from the request while rounding: `num_dead_inputs`, `damping_used`."""

    def dequantize(self) -> Tensor:
        """Return the weight that the engine computes with, `[O, I]` float32."""
        codes_OGS = self.grid.groups(self.codes_OI.float())
        zero_OG1 = None if self.zero_OG is None else self.zero_OG.float()[:, :, None]
        return self.grid.decode(codes_OGS, self.scale_OG[:, :, None], zero_OG1).flatten(1)[:, : self.codes_OI.shape[1]]

    def split(self, num_outputs: Sequence[int]) -> list[Quantized]:
        """Return the layers that were stacked along O, given the number of output features of each."""
        sizes = list(num_outputs)
        codes, scales = self.codes_OI.split(sizes), self.scale_OG.split(sizes)
        zeros = [None] * len(sizes) if self.zero_OG is None else self.zero_OG.split(sizes)
        return [Quantized(*parts, self.grid, dict(self.notes)) for parts in zip(codes, scales, zeros, strict=True)]

    def head(self, num_outputs: int) -> Quantized:
        """Return the first output features."""
        zero_OG = None if self.zero_OG is None else self.zero_OG[:num_outputs]
        return replace(
            self, codes_OI=self.codes_OI[:num_outputs], scale_OG=self.scale_OG[:num_outputs], zero_OG=zero_OG
        )


@dataclass(frozen=True)
class RoundingOptions:
    """Options of all rounding methods; each method reads those that apply to it."""

    damping: float = 0.01
    """Value added to the Hessian's diagonal, as a fraction of the diagonal's mean."""
    order: Literal["natural", "activation"] = "natural"
    """Order in which GPTQ rounds input features: as stored, or by descending diagonal of the Hessian."""
    sweeps: int = 5
    """Maximum passes of QuantEase over all input features; it stops early once no code changes."""
    scales: Literal["minmax", "mse"] = "minmax"
    """Scales from the extremes of each group, or those of least weighted squared error."""


@dataclass(frozen=True)
class RoundingMethod:
    """A rounding method, called with weight `[O, I]`, Hessian `[I, I]` or None, grid and options.

    Weight and Hessian (XᵀX / num_tokens, undamped) are float32 and are not changed. None means that there is no
    calibration data. Raises UserError if the group size does not divide I.
    """

    function: Callable[[Tensor, Tensor | None, Grid, RoundingOptions], Quantized]
    needs_data: bool = False
    """Whether the method requires the Hessian."""

    def __call__(self, weight_OI: Tensor, hessian_II: Tensor | None, grid: Grid, options: RoundingOptions) -> Quantized:
        return self.function(weight_OI, hessian_II, grid, options)


def fit_scales(
    weight_OI: Tensor, hessian_II: Tensor | None, grid: Grid, options: RoundingOptions
) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points as `Grid.fit` does, chosen by `options.scales`.

    "mse" tries several ranges per group, from the extremes down to 0.7 of them; 4-bit floats also try larger ranges. It
    takes the range of least squared rounding error, weighted by the Hessian's diagonal (by 1 without data), so it is
    never worse than "minmax".
    """
    if options.scales == "minmax":
        return grid.fit(weight_OI)
    energy_I = (
        weight_OI.new_ones(weight_OI.shape[1], dtype=torch.float32)
        if hessian_II is None
        else hessian_II.diagonal().float()
    )
    parts = [_search_scales(rows, energy_I, grid) for rows in weight_OI.float().split(_CHUNK_ROWS)]
    scale_OG = torch.cat([scale for scale, _ in parts])
    return scale_OG, None if grid.symmetric else torch.cat([zero for _, zero in parts if zero is not None])


def _search_scales(weight_OI: Tensor, energy_I: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    groups_OGS, energy_GS1 = grid.groups(weight_OI), grid.groups(energy_I[None])[0, :, :, None]
    best_OG, scale_OG, zero_OG = energy_I.new_tensor(torch.inf), energy_I.new_tensor(1.0), None
    for shrink in grid.shrinks:
        trial_OG, trial_zero_OG = grid.fit(weight_OI, shrink)
        zero_OG1 = None if trial_zero_OG is None else trial_zero_OG[:, :, None]
        codes_OGS = grid.encode(groups_OGS, trial_OG[:, :, None], zero_OG1)
        square_OGS = grid.decode(codes_OGS, trial_OG[:, :, None], zero_OG1).sub_(groups_OGS).square_()
        error_OG = grid.share((square_OGS.transpose(0, 1) @ energy_GS1)[:, :, 0].T, torch.sum)
        better_OG = error_OG < best_OG
        best_OG = torch.where(better_OG, error_OG, best_OG)
        scale_OG = torch.where(better_OG, trial_OG, scale_OG)
        if trial_zero_OG is not None:
            zero_OG = trial_zero_OG if zero_OG is None else torch.where(better_OG, trial_zero_OG, zero_OG)
    return scale_OG, zero_OG


def round_to_nearest(
    weight_OI: Tensor, hessian_II: Tensor | None, grid: Grid, options: RoundingOptions | None = None
) -> Quantized:
    """Round every weight to the nearest grid point. The Hessian has an effect only with `scales="mse"`."""
    scale_OG, zero_OG = fit_scales(weight_OI, hessian_II, grid, options or RoundingOptions())
    zero_OG1 = None if zero_OG is None else zero_OG[:, :, None]
    codes_OGS = grid.encode(grid.groups(weight_OI.float()), scale_OG[:, :, None], zero_OG1)
    codes_OI = codes_OGS.flatten(1)[:, : weight_OI.shape[1]]
    return Quantized(codes_OI.to(grid.code_dtype), scale_OG, None if zero_OG is None else zero_OG.to(torch.int8), grid)


def smooth_scales(input_peak_I: Tensor, weight_peak_I: Tensor, strength: float) -> Tensor:
    """Return SmoothQuant's factors, which divide inputs and multiply weight columns (arXiv 2211.10438, equation 4).

    The factor is input_peak**strength / weight_peak**(1 - strength), `[I]` float32, at least 1e-5; the arguments are
    largest magnitudes `[I]`. An input whose peak is zero, on either side, gets the factor 1.
    """
    inputs, weights = input_peak_I.double(), weight_peak_I.double()
    scale_I = inputs**strength / weights ** (1 - strength)
    return scale_I.clamp(min=1e-5).masked_fill((inputs <= 0) | (weights <= 0), 1.0).float()


def awq_scales(weight_OI: Tensor, hessian_II: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return AWQ's factors, which divide inputs and multiply weight columns (arXiv 2306.00978, section 3.2).

    A factor is the root mean square of its input to the power of a strength, scaled so that the largest and the
    smallest factor are inverse to each other. The strength from 0 to 0.95 is the one with the least error of the
    outputs, tr(E H Eᵀ), after rounding to nearest. The paper takes the mean magnitude in place of the root mean square,
    which the Hessian's diagonal gives. `rounded` returns a weight after rounding. An input that is always zero gets the
    factor 1. The result is `[I]` float32, positive.
    """
    size_I = hessian_II.diagonal().double().sqrt()
    is_live_I = size_I > 0
    best, best_I = float("inf"), torch.ones_like(size_I).float()
    for trial in range(_NUM_STRENGTHS if bool(is_live_I.any()) else 0):
        power_I = size_I ** (trial / _NUM_STRENGTHS)
        live = power_I[is_live_I]
        scale_I = (power_I / (live.max() * live.min()).sqrt()).masked_fill(~is_live_I, 1.0).float()
        error_OI = weight_OI - rounded(weight_OI * scale_I) / scale_I
        lost = float((error_OI @ hessian_II).mul_(error_OI).sum(dtype=torch.float64))
        if lost < best:
            best, best_I = lost, scale_I
    return best_I


def relative_error(weight_OI: Tensor, rounded_OI: Tensor) -> float:
    """Return the Frobenius norm of the rounding error over that of the weight; 0 for a weight of zeros."""
    norm = weight_OI.float().norm()
    return float((weight_OI.float() - rounded_OI).norm() / norm) if norm > 0 else 0.0


def output_error(weight_OI: Tensor, rounded_OI: Tensor, hessian_II: Tensor | None) -> float:
    """Return the root of tr(E H Eᵀ) / tr(W H Wᵀ): the error norm of the layer's outputs relative to their norm.

    E is the rounding error and H = XᵀX / num_tokens. Without H the result is `relative_error`. Outputs that are all
    zero give 0.
    """
    if hessian_II is None:
        return relative_error(weight_OI, rounded_OI)
    weight, hessian = weight_OI.float(), hessian_II.float()
    error = weight - rounded_OI
    lost, total = (float((matrix @ hessian).mul_(matrix).sum(dtype=torch.float64)) for matrix in (error, weight))
    return (max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0
