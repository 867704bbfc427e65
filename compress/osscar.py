"""OSSCAR: which input groups of a linear layer to remove, and the weight that makes up for them (arXiv 2403.12983).

Shapes: I input features of the layer, in U groups of k neighbours (U k = I); O output features; K kept and
R removed ones (or groups) of the inputs; S those that change sides. All tensors are float64. With
H = XᵀX / T + damping, G = XᵀY / T and the full solution P = H⁻¹ G (for the layer's own outputs simply
its weight), the loss of a weight W over the kept features is half the squared output error,
tr((P - W)ᵀ H (P - W)) / 2.

Greedy removal and local search share one picture, the `Tableau`, which a block pivot turns from
one kept set to another with a rank-k update and no new inversion.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slimserve.core.errors import UserError

_NUM_ROUNDS = 32
"""Greedy removal of single features goes in so many batches (of one at least)."""
_MAX_SEARCH_ROUNDS = 20
_MIN_GAIN = 0.01
"""The search ends before a round that would lower the loss by less than this share of it.

Smaller gains are the calibration set's own: with rounds of 0.01% and more, held-out NLL of SmolLM2 rose in two of
three seeds (docs/log.md).
"""
_ROUNDING = 1e-9
"""A swap whose gain is a smaller share of the loss may be none at all."""
_MIN_PIVOT_RATIO = 1e-6
"""Smallest over largest pivot of a sound Cholesky factor: half of float64's digits, squared in the matrix."""
_ROWS = 256
"""Rows worked on at once where a whole I × I temporary would be large."""


class Factor(NamedTuple):
    """Cholesky factor of a damped Hessian `[I, I]`, lower, and the damping that it took to get it."""

    factor_II: Tensor
    damping: float


def factorize(hessian_II: Tensor, damping: float, mean_diagonal: float | None = None) -> Factor:
    """Factor gram + damping * mean(diag) * I; damping grows tenfold until the sum is sound in float64.

    For a part of a Hessian give the `mean_diagonal` of the whole; it must be positive. Raises
    UserError where the matrix holds NaN or infinity.
    """
    mean_diagonal = float(hessian_II.diagonal().mean()) if mean_diagonal is None else mean_diagonal
    if not math.isfinite(float(hessian_II.sum())):
        raise UserError(
            "calibration", "Hessian", "holds NaN or infinity", "run the model in float32 or bfloat16, not float16"
        )
    while True:
        damped_II = hessian_II.clone()
        damped_II.diagonal().add_(damping * mean_diagonal)
        factor_II, info = torch.linalg.cholesky_ex(damped_II)
        del damped_II
        pivots = factor_II.diagonal()
        if not bool(info) and float(pivots.min() / pivots.max()) > _MIN_PIVOT_RATIO:
            return Factor(factor_II, damping)
        damping = max(10 * damping, 1e-8)


def refit(
    hessian_II: Tensor, weight_OI: Tensor, target_IO: Tensor | None, damping: float, kept_I: Tensor
) -> tuple[Tensor, float]:
    """The weight `[O, K]` over the features `kept_I` that minimises the loss, and the damping used.

    W_K = H_KK⁻¹ G_K, where G is `target_IO` or, for the layer's own outputs, H Wᵀ; then it is
    computed as a correction to the weight, which is exact where nothing needs correction.
    """
    mean_diagonal = float(hessian_II.diagonal().mean())
    factor_KK, damping = factorize(hessian_II[kept_I[:, None], kept_I], damping, mean_diagonal)
    if target_IO is not None:
        return torch.cholesky_solve(target_IO[kept_I], factor_KK).T.contiguous(), damping
    removed = torch.ones(len(hessian_II), dtype=torch.bool)
    removed[kept_I] = False
    removed_I = removed.nonzero().flatten()
    lost_KO = hessian_II[kept_I[:, None], removed_I] @ weight_OI[:, removed_I].T
    return weight_OI[:, kept_I] + torch.cholesky_solve(lost_KO, factor_KK).T, damping


class Tableau:
    """The least squares problem as seen from a kept set, starting from everything kept.

    With K the kept and R the removed features, `matrix_II` is symmetric and holds H_KK⁻¹, minus the
    Schur complement C_RR = H_RR - H_RK H_KK⁻¹ H_KR, and -H_KK⁻¹ H_KR between them. `weight_IO` holds
    the refitted weight W_K on kept rows, and on removed rows g_R = G_R - H_RK W_K, the correlation of
    these inputs with what is missing in the outputs. `kept_U` tells which are which; `loss` is
    what the removed groups cost. The tableau owns `inverse_II` and changes it.
    """

    def __init__(self, inverse_II: Tensor, solution_IO: Tensor, group_size: int) -> None:
        self.matrix_II = inverse_II
        self.weight_IO = solution_IO.clone(memory_format=torch.contiguous_format)
        self.group_size = group_size
        self.kept_U = torch.ones(len(inverse_II) // group_size, dtype=torch.bool)
        self.loss = 0.0

    @property
    def kept(self) -> Tensor:
        """Kept groups, ascending."""
        return self.kept_U.nonzero().flatten()

    @property
    def removed(self) -> Tensor:
        """Removed groups, ascending."""
        return (~self.kept_U).nonzero().flatten()

    def exchange(self, groups: Tensor) -> None:
        """Remove `groups`, all of them kept, or take them back, all of them removed: a principal block pivot."""
        sign = 1.0 if bool(self.kept_U[groups[0]]) else -1.0
        inputs = expand(groups, self.group_size)
        rows_SI = self.matrix_II[inputs]
        block_SS = _invert_definite(sign * rows_SI[:, inputs]).mul_(sign)
        pivoted_SI = block_SS @ rows_SI
        weight_SO = block_SS @ self.weight_IO[inputs]
        self.loss += float((self.weight_IO[inputs] * weight_SO).sum()) / 2
        self.weight_IO.addmm_(rows_SI.T, weight_SO, alpha=-1)
        self.weight_IO[inputs] = sign * weight_SO
        self.matrix_II.addmm_(rows_SI.T, pivoted_SI, alpha=-1)
        pivoted_SI.mul_(sign)[:, inputs] = -block_SS
        self.matrix_II[inputs] = pivoted_SI
        self.matrix_II[:, inputs] = pivoted_SI.T
        self.kept_U[groups] = sign < 0

    def changes(self) -> Tensor:
        """By how much the loss would change `[U]` if each group alone changed sides (section 3).

        ½ tr(W_jᵀ M_jj⁻¹ W_j), positive for kept groups and negative for removed ones.
        """
        if self.group_size == 1:
            return self.weight_IO.square().sum(dim=1) / (2 * self.matrix_II.diagonal())
        num_groups, size = len(self.kept_U), self.group_size
        block_Ukk = self.matrix_II.reshape(num_groups, size, num_groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        sign_U11 = torch.where(self.kept_U, 1.0, -1.0).to(block_Ukk)[:, None, None]
        return _loss(block_Ukk * sign_U11, self.weight_IO.reshape(num_groups, size, -1)) * sign_U11.flatten()

    def swap_change(self, dropped: Tensor, added: Tensor) -> float:
        """By how much the loss changes, exactly, if the kept groups `dropped` give way to the removed `added`."""
        out, back = expand(dropped, self.group_size), expand(added, self.group_size)
        out_SI, back_SI = self.matrix_II[out], self.matrix_II[back]
        block_SS = _invert_definite(out_SI[:, out])
        mixed_SS = back_SI[:, out] @ block_SS
        missing_SO = self.weight_IO[back] - mixed_SS @ self.weight_IO[out]
        schur_SS = mixed_SS @ out_SI[:, back] - back_SI[:, back]
        lost = _loss(out_SI[:, out], self.weight_IO[out])
        return float(lost - _loss(schur_SS, missing_SO))

    def best_swaps(self) -> tuple[Tensor, Tensor]:
        """For each removed group the best kept one to give way to it, and the loss's change by that swap, exactly."""
        return self._best_swaps_of_features() if self.group_size == 1 else self._best_swaps_of_groups()

    def _best_swaps_of_features(self) -> tuple[Tensor, Tensor]:
        kept, removed = self.kept, self.removed
        diagonal_I = self.matrix_II.diagonal()
        square_I = self.weight_IO.square().sum(dim=1)
        weight_KO = self.weight_IO[kept]
        lost_K = square_I[kept] / (2 * diagonal_I[kept])
        partners, changes = [], []
        for part in removed.split(_ROWS):
            ratio_RK = self.matrix_II[part][:, kept] / diagonal_I[kept]
            schur_RK = ratio_RK.square() * diagonal_I[kept] - diagonal_I[part, None]
            gain_RK = (self.weight_IO[part] @ weight_KO.T).mul_(ratio_RK).mul_(-2)
            gain_RK += ratio_RK.square_().mul_(square_I[kept])
            gain_RK += square_I[part, None]
            change, index = (lost_K - gain_RK.div_(schur_RK).div_(2)).min(dim=1)
            partners.append(kept[index])
            changes.append(change)
        return torch.cat(partners), torch.cat(changes)

    def _best_swaps_of_groups(self) -> tuple[Tensor, Tensor]:
        removed = self.removed
        change_KR = torch.tensor(
            [[self.swap_change(out[None], back[None]) for back in removed] for out in self.kept], dtype=torch.float64
        )
        change, index = change_KR.min(dim=0)
        return self.kept[index], change


def expand(groups: Tensor, group_size: int) -> Tensor:
    """The features of groups, in the groups' order."""
    return (groups[:, None] * group_size + torch.arange(group_size)).flatten()


def _invert_definite(matrix_SS: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix_SS))


def _loss(matrix_kk: Tensor, weight_kO: Tensor) -> Tensor:
    """½ tr(Wᵀ M⁻¹ W), over leading batch dimensions."""
    factor_kk = torch.linalg.cholesky(matrix_kk)
    return torch.linalg.solve_triangular(factor_kk, weight_kO, upper=False).square().sum(dim=(-2, -1)) / 2


def remove_greedily(tableau: Tableau, num_kept: int, num_rounds: int = _NUM_ROUNDS) -> None:
    """Remove groups until `num_kept` are left, at each step a batch of those that change the loss least (section 3).

    Single features go in `num_rounds` batches: with 32 of them the loss of SmolLM2's layers is within 0.1% of
    one-by-one removal. Wider groups go one by one. Of equal groups the lower index stays.
    """
    num_removed = len(tableau.kept) - num_kept
    batch = -(-num_removed // num_rounds) if tableau.group_size == 1 else 1
    while (num_left := len(tableau.kept) - num_kept) > 0:
        kept = tableau.kept
        order = torch.sort(tableau.changes()[kept], descending=True, stable=True).indices
        tableau.exchange(kept[order[-min(batch, num_left) :]])


class SearchLog(NamedTuple):
    """What local search did: groups swapped in all, and the loss before it and after each of its rounds."""

    num_swaps: int
    losses: list[float]


def search(tableau: Tableau) -> SearchLog:
    """Swap kept groups for removed ones while that lowers the loss.

    Each round takes the best partner of every removed group, each kept group once, and of
    the best s of these swaps, of the best s/2, s/4 ... 1, makes those that together lower the loss
    most. Where the paper drops the lowest-scored groups first and then looks for the best to take
    back, we price all pairs exactly: it costs one product of g and W, and ends in a kept set that no
    single swap improves (unless the gains get too small or the rounds run out before).
    """
    num_swaps, losses = 0, [tableau.loss]
    while len(losses) <= _MAX_SEARCH_ROUNDS and 0 < len(tableau.kept) < len(tableau.kept_U):
        partner_R, change_R = tableau.best_swaps()
        order = torch.sort(change_R, stable=True).indices[: int((change_R < -_ROUNDING * tableau.loss).sum())]
        swaps: dict[int, int] = {}
        for dropped, added in zip(partner_R[order].tolist(), tableau.removed[order].tolist(), strict=True):
            swaps.setdefault(dropped, added)
        if not swaps:
            break
        out, back = torch.tensor(list(swaps)), torch.tensor(list(swaps.values()))
        counts = [len(swaps) >> halvings for halvings in range(len(swaps).bit_length())]
        change, count = min((tableau.swap_change(out[:count], back[:count]), count) for count in counts)
        if -change < _MIN_GAIN * tableau.loss:
            break
        tableau.exchange(out[:count])
        tableau.exchange(back[:count])
        num_swaps += count
        losses.append(tableau.loss)
    return SearchLog(num_swaps, losses)
