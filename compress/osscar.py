"""OSSCAR structured pruning: which input groups of a linear layer to remove, and the weight that compensates for them.

The method is that of arXiv 2403.12983, section 3. All tensors are float64 and all functions work on tensors only.

Shape suffixes: O output features; I input features, in U groups of k adjacent features (U * k = I); K kept features;
R removed features or groups; S features that a pivot moves; C rows of one chunk.

With T tokens, inputs X `[T, I]` and wanted outputs Y `[T, O]`, let H = XᵀX / T + damping, G = XᵀY / T and P = H⁻¹ G.
Where Y are the layer's own outputs, P is its weight. The loss of a weight W that is zero outside the kept features is
half the mean squared output error: tr((P - W)ᵀ H (P - W)) / 2.

Greedy removal and local search both work on a `Tableau`. A block pivot moves groups from kept to removed or back by a
low-rank update, without inverting H again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slimserve.core.errors import UserError

_NUM_BATCHES = 32
"""Number of batches in which greedy removal takes single features; a batch has at least one feature."""
_MAX_SEARCH_ROUNDS = 20
_MIN_RELATIVE_GAIN = 0.01
"""Local search stops before a round that would lower the loss by less than this fraction.

Smaller gains fit the calibration set only: with a threshold of 1e-4, the held-out NLL of SmolLM2 rose for two of three
seeds (docs/log.md).
"""
_MIN_RELATIVE_CHANGE = 1e-9
"""A swap that changes the loss by a smaller fraction may be rounding error."""
_MIN_PIVOT_RATIO = 1e-6
"""Smallest accepted ratio of the smallest to the largest diagonal entry of a Cholesky factor.

Its square is the ratio of pivots of the matrix itself, 1e-12, which leaves a quarter of float64's digits.
"""
_CHUNK_ROWS = 256
"""Rows processed at once where a complete I x I temporary would need too much memory."""


class CholeskyFactor(NamedTuple):
    """Lower Cholesky factor `[I, I]` of a damped Hessian, and the damping that made the Hessian factorizable."""

    factor_II: Tensor
    damping: float


def factorize(hessian_II: Tensor, damping: float, mean_diagonal: float | None = None) -> CholeskyFactor:
    """Return the Cholesky factor of H + damping * mean_diagonal * I, both `[I, I]` float64.

    The damping grows tenfold until the factor is numerically sound. `mean_diagonal` defaults to the mean of H's
    diagonal; for a submatrix, pass the mean of the full Hessian. Raises UserError if H contains NaN or infinity.
    """
    mean_diagonal = float(hessian_II.diagonal().mean()) if mean_diagonal is None else mean_diagonal
    if not math.isfinite(float(hessian_II.sum())):
        raise UserError(
            "calibration", "Hessian", "contains NaN or infinity", "run the model in float32 or bfloat16, not float16"
        )
    while True:
        damped_hessian_II = hessian_II.clone()
        damped_hessian_II.diagonal().add_(damping * mean_diagonal)
        factor_II, info = torch.linalg.cholesky_ex(damped_hessian_II)
        del damped_hessian_II  # frees the memory before the next attempt makes its copy
        pivots = factor_II.diagonal()
        if not bool(info) and float(pivots.min() / pivots.max()) > _MIN_PIVOT_RATIO:
            return CholeskyFactor(factor_II, damping)
        damping = max(10 * damping, 1e-8)


def refit(
    hessian_II: Tensor, weight_OI: Tensor, target_IO: Tensor | None, damping: float, kept_I: Tensor
) -> tuple[Tensor, float]:
    """Return the weight `[O, K]` float64 over the features `kept_I` that minimises the loss, and the damping used.

    The minimiser is W_K = H_KK⁻¹ G_K with G = `target_IO`. Without a target, the layer's own outputs are the target;
    the result is then computed as a correction to `weight_OI`, which is exact where no correction is needed. Raises
    UserError as `factorize` does.
    """
    mean_diagonal = float(hessian_II.diagonal().mean())
    factor_KK, damping = factorize(hessian_II[kept_I[:, None], kept_I], damping, mean_diagonal)
    if target_IO is not None:
        return torch.cholesky_solve(target_IO[kept_I], factor_KK).T.contiguous(), damping
    is_removed_I = torch.ones(len(hessian_II), dtype=torch.bool, device=hessian_II.device)
    is_removed_I[kept_I] = False
    removed_R = is_removed_I.nonzero().flatten()
    lost_KO = hessian_II[kept_I[:, None], removed_R] @ weight_OI[:, removed_R].T
    return weight_OI[:, kept_I] + torch.cholesky_solve(lost_KO, factor_KK).T, damping


class Tableau:
    """The least-squares problem restricted to a set of kept groups; initially all groups are kept.

    `matrix_II` is symmetric. It holds H_KK⁻¹ for the kept features K, the negative Schur complement H_RK H_KK⁻¹ H_KR -
    H_RR for the removed features R, and -H_KK⁻¹ H_KR between them. `weight_IO` holds the refitted weight W_K in kept
    rows. Its removed rows hold G_R - H_RK W_K, the correlation of the removed inputs with the missing output.
    `is_kept_U` is a bool mask over groups, and `loss` is the loss due to the removed groups.
    """

    def __init__(self, inverse_II: Tensor, solution_IO: Tensor, group_size: int) -> None:
        """Take H⁻¹ `[I, I]`, which the tableau overwrites, the full solution P `[I, O]`, and the features per group."""
        self.matrix_II = inverse_II
        self.weight_IO = solution_IO.clone(memory_format=torch.contiguous_format)
        self.group_size = group_size
        self.is_kept_U = torch.ones(len(inverse_II) // group_size, dtype=torch.bool, device=inverse_II.device)
        self.loss = 0.0

    @property
    def kept(self) -> Tensor:
        """Indices of the kept groups, int64, ascending."""
        return self.is_kept_U.nonzero().flatten()

    @property
    def removed(self) -> Tensor:
        """Indices of the removed groups, int64, ascending."""
        return (~self.is_kept_U).nonzero().flatten()

    def exchange(self, groups: Tensor) -> None:
        """Remove `groups` if all of them are kept, or restore them if all are removed, by a principal block pivot."""
        sign = 1.0 if bool(self.is_kept_U[groups[0]]) else -1.0
        features_S = expand_groups(groups, self.group_size)
        rows_SI = self.matrix_II[features_S]
        block_SS = _invert_definite(sign * rows_SI[:, features_S]).mul_(sign)
        pivoted_SI = block_SS @ rows_SI
        weight_SO = block_SS @ self.weight_IO[features_S]
        self.loss += float((self.weight_IO[features_S] * weight_SO).sum()) / 2
        self.weight_IO.addmm_(rows_SI.T, weight_SO, alpha=-1)
        self.weight_IO[features_S] = sign * weight_SO
        self.matrix_II.addmm_(rows_SI.T, pivoted_SI, alpha=-1)
        pivoted_SI.mul_(sign)[:, features_S] = -block_SS
        self.matrix_II[features_S] = pivoted_SI
        self.matrix_II[:, features_S] = pivoted_SI.T
        self.is_kept_U[groups] = sign < 0

    def loss_changes(self) -> Tensor:
        """Return the change of the loss, `[U]` float64, if each group alone were removed or restored (section 3).

        The change is tr(W_jᵀ M_jj⁻¹ W_j) / 2: positive for kept groups, negative for removed ones.
        """
        if self.group_size == 1:
            return self.weight_IO.square().sum(dim=1) / (2 * self.matrix_II.diagonal())
        num_groups, size = len(self.is_kept_U), self.group_size
        block_Ukk = self.matrix_II.reshape(num_groups, size, num_groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        sign_U11 = torch.where(self.is_kept_U, 1.0, -1.0).to(block_Ukk)[:, None, None]
        return _energy(block_Ukk * sign_U11, self.weight_IO.reshape(num_groups, size, -1)) * sign_U11.flatten()

    def swap_loss_change(self, dropped: Tensor, added: Tensor) -> float:
        """Return the exact loss change if the removed groups `added` replace the kept groups `dropped`."""
        dropped_S, added_S = expand_groups(dropped, self.group_size), expand_groups(added, self.group_size)
        dropped_SI, added_SI = self.matrix_II[dropped_S], self.matrix_II[added_S]
        block_SS = _invert_definite(dropped_SI[:, dropped_S])
        mixed_SS = added_SI[:, dropped_S] @ block_SS
        missing_SO = self.weight_IO[added_S] - mixed_SS @ self.weight_IO[dropped_S]
        schur_SS = mixed_SS @ dropped_SI[:, added_S] - added_SI[:, added_S]
        lost = _energy(dropped_SI[:, dropped_S], self.weight_IO[dropped_S])
        return float(lost - _energy(schur_SS, missing_SO))

    def best_swaps(self) -> tuple[Tensor, Tensor]:
        """Return for each removed group the kept group to replace, `[R]` int64, and the exact loss change, `[R]`."""
        return self._best_feature_swaps() if self.group_size == 1 else self._best_group_swaps()

    def _best_feature_swaps(self) -> tuple[Tensor, Tensor]:
        kept, removed = self.kept, self.removed
        diagonal_I = self.matrix_II.diagonal()
        square_I = self.weight_IO.square().sum(dim=1)
        weight_KO = self.weight_IO[kept]
        lost_K = square_I[kept] / (2 * diagonal_I[kept])
        partners, changes = [], []
        for chunk_C in removed.split(_CHUNK_ROWS):
            ratio_CK = self.matrix_II[chunk_C][:, kept] / diagonal_I[kept]
            schur_CK = ratio_CK.square() * diagonal_I[kept] - diagonal_I[chunk_C, None]
            gain_CK = (self.weight_IO[chunk_C] @ weight_KO.T).mul_(ratio_CK).mul_(-2)
            gain_CK += ratio_CK.square_().mul_(square_I[kept])
            gain_CK += square_I[chunk_C, None]
            change_C, index_C = (lost_K - gain_CK.div_(schur_CK).div_(2)).min(dim=1)
            partners.append(kept[index_C])
            changes.append(change_C)
        return torch.cat(partners), torch.cat(changes)

    def _best_group_swaps(self) -> tuple[Tensor, Tensor]:
        removed = self.removed
        change_KR = torch.tensor(
            [[self.swap_loss_change(dropped[None], added[None]) for added in removed] for dropped in self.kept],
            dtype=torch.float64,
        )
        change_R, index_R = change_KR.min(dim=0)
        return self.kept[index_R], change_R


def expand_groups(groups: Tensor, group_size: int) -> Tensor:
    """Return the int64 indices of all features of `groups`, in the order of the groups."""
    return (groups[:, None] * group_size + torch.arange(group_size, device=groups.device)).flatten()


def _invert_definite(matrix_SS: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix_SS))


def _energy(matrix_kk: Tensor, weight_kO: Tensor) -> Tensor:
    """Return tr(Wᵀ M⁻¹ W) / 2, batched over leading dimensions."""
    factor_kk = torch.linalg.cholesky(matrix_kk)
    return torch.linalg.solve_triangular(factor_kk, weight_kO, upper=False).square().sum(dim=(-2, -1)) / 2


def remove_greedily(tableau: Tableau, num_kept: int, num_batches: int = _NUM_BATCHES) -> None:
    """Remove the groups that raise the loss least until `num_kept` groups remain (section 3).

    Single features are removed in `num_batches` batches; with 32 batches the loss of SmolLM2's layers is within 0.1% of
    removal one by one. Wider groups are removed one by one. Among equal groups the one with the lower index stays.
    """
    num_removed = len(tableau.kept) - num_kept
    batch_size = -(-num_removed // num_batches) if tableau.group_size == 1 else 1
    while (num_left := len(tableau.kept) - num_kept) > 0:
        kept = tableau.kept
        order = torch.sort(tableau.loss_changes()[kept], descending=True, stable=True).indices
        tableau.exchange(kept[order[-min(batch_size, num_left) :]])


class SearchLog(NamedTuple):
    """Number of groups swapped by local search, and the loss before it and after each of its rounds."""

    num_swaps: int
    losses: list[float]


def local_search(tableau: Tableau) -> SearchLog:
    """Swap kept groups for removed groups while that lowers the loss.

    Each round finds the best partner of every removed group and uses each kept group at most once. Of the best s swaps,
    the best s/2, s/4, ..., 1, it makes the set that lowers the loss most. The paper first drops the groups of lowest
    score and then looks for the best to restore. We evaluate all pairs exactly instead, which costs one product of
    matrices. The result is a set that no single swap improves, unless a round's gain falls below 1% of the loss or 20
    rounds are done.
    """
    num_swaps, losses = 0, [tableau.loss]
    while len(losses) <= _MAX_SEARCH_ROUNDS and 0 < len(tableau.kept) < len(tableau.is_kept_U):
        partner_R, change_R = tableau.best_swaps()
        num_improving = int((change_R < -_MIN_RELATIVE_CHANGE * tableau.loss).sum())
        order = torch.sort(change_R, stable=True).indices[:num_improving]
        swaps: dict[int, int] = {}
        for dropped, added in zip(partner_R[order].tolist(), tableau.removed[order].tolist(), strict=True):
            swaps.setdefault(dropped, added)
        if not swaps:
            break
        dropped_S, added_S = torch.tensor(list(swaps)), torch.tensor(list(swaps.values()))
        counts = [len(swaps) >> halvings for halvings in range(len(swaps).bit_length())]
        change, count = min((tableau.swap_loss_change(dropped_S[:n], added_S[:n]), n) for n in counts)
        if -change < _MIN_RELATIVE_GAIN * tableau.loss:
            break
        tableau.exchange(dropped_S[:count])
        tableau.exchange(added_S[:count])
        num_swaps += count
        losses.append(tableau.loss)
    return SearchLog(num_swaps, losses)
