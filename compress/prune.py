"""Pruning methods: which input groups of a linear layer to keep, and the layer's new weight.

Shape suffixes: O output features; I input features of the consumer, the layer that loses input columns; U groups of k
adjacent columns; K kept columns; C rows of one chunk. Before a down projection a group is one MLP neuron (k = 1).
Before an attention's output projection it is a KV group: one KV head with its query heads (k = their total width).

A new pruning method is one row in `METHODS`, with a function from a `PruneProblem` and the number of groups to keep to
a `PrunedLayer`. `_unchanged` and `_refitted` make the row from scores of the groups. All tensors are float64. The
mathematics of OSSCAR is in `osscar.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from slimserve.compress import osscar
from slimserve.core.errors import UserError

Target = Literal["current", "dense", "residual"]
"""Outputs that a refit approximates: of the model as pruned so far, of the model before this step, or the latter plus
what the hidden states before the sublayer have lost."""

_CHUNK_ROWS = 512
"""Rows of a Hessian multiplied at once where only its upper triangle is read."""
_CURVE_BATCHES = 4
"""Batches of greedy removal between two points of a loss curve."""


@dataclass(frozen=True)
class PruneProblem:
    """A layer from which complete groups of input columns are to be removed. All tensors are float64."""

    weight_OI: Tensor
    hessian_II: Tensor | None
    """XᵀX / num_tokens of the layer's inputs, without damping. Methods that need no data accept None."""
    target_IO: Tensor | None
    """Right-hand side G of the least-squares problem, from `dense_target`.

    None aims at the layer's own outputs: G = (Hessian + damping) Wᵀ.
    """
    group_size: int
    damping: float = 0.01
    """Value added to the Hessian's diagonal, as a fraction of the diagonal's mean."""
    seed: int = 0
    """Random seed of methods that draw at random."""

    def __post_init__(self) -> None:
        num_outputs, num_inputs = self.weight_OI.shape
        assert num_inputs % self.group_size == 0
        for tensor, shape in (
            (self.weight_OI, (num_outputs, num_inputs)),
            (self.hessian_II, (num_inputs, num_inputs)),
            (self.target_IO, (num_inputs, num_outputs)),
        ):
            assert tensor is None or (tensor.dtype == torch.float64 and tensor.shape == shape)

    @property
    def num_groups(self) -> int:
        return int(self.weight_OI.shape[1]) // self.group_size

    def sum_per_group(self, scores_I: Tensor) -> Tensor:
        """Return the sum of the scores of each group's columns, `[U]`."""
        return scores_I.reshape(self.num_groups, self.group_size).sum(dim=1)


@dataclass(frozen=True)
class PrunedLayer:
    """The part of a layer that a pruning method keeps."""

    kept_U: Tensor
    """Indices of the kept groups, int64, ascending."""
    kept_I: Tensor
    """Indices of the kept input columns, int64, ascending."""
    weight_OK: Tensor
    """The layer's weight over the kept columns, float64; refitted if the method refits."""
    detail: dict[str, Any]
    """Values for the manifest, plain JSON."""


Scores = Callable[[PruneProblem], Tensor]
"""Function that returns a score of each group, `[U]`."""


@dataclass(frozen=True)
class PruningMethod:
    """A pruning method, called with a problem and the number of groups to keep; equal inputs give equal bits."""

    function: Callable[[PruneProblem, int], PrunedLayer]
    scores: Scores | None = None
    """The scores by which the method keeps the highest groups; None if it searches for the groups together."""
    needs_data: bool = False
    """True if the method reads the Hessian, so that the recipe needs calibration data."""
    uses_seed: bool = False
    """True if the result depends on the seed of the problem."""
    target: Target = "current"
    """Outputs that the refit approximates if the recipe names none."""
    damping: float = 0.01
    """Damping if the recipe states none."""

    def __call__(self, problem: PruneProblem, num_kept: int) -> PrunedLayer:
        """Keep `num_kept` groups, at least one. If all calibration inputs are zero, fall back to magnitude.

        The reason for a fallback is in `detail["fallback"]`. Raises UserError if the Hessian contains NaN or infinity.
        """
        if not self.needs_data or bool(_hessian(problem).diagonal().any()):
            return self.function(problem, num_kept)
        pruned = METHODS["magnitude"].function(problem, num_kept)
        return replace(pruned, detail={**pruned.detail, "fallback": "magnitude, as all calibration inputs are zero"})


def pruning_method(name: str) -> PruningMethod:
    """Return the method of that name. Raises UserError that lists the names if there is none."""
    if name not in METHODS:
        raise UserError("method", name, "is not a pruning method", f"choose from {', '.join(METHODS)}")
    return METHODS[name]


def magnitude(weight_OI: Tensor) -> Tensor:
    """Return half the squared norm of each column, `[I]` float64: the loss of removing it from white inputs.

    This is the OSSCAR removal score (arXiv 2403.12983, section 3) where the Hessian is the identity; it needs no data.
    """
    return weight_OI.double().square().sum(dim=0) / 2


def peak_magnitude(weight_OI: Tensor) -> Tensor:
    """Return the largest magnitude in each column, `[I]` float64.

    This score keeps neurons that write one large value, which the squared norm overlooks. Small models fail without
    these neurons (SmolLM2-135M, docs/log.md 2026-11-24).
    """
    return weight_OI.double().abs().amax(dim=0)


def choose_kept(scores_U: Tensor, num_kept: int) -> Tensor:
    """Return the indices of the `num_kept` highest scores, int64, ascending. The lower index wins a tie."""
    return torch.sort(_order(scores_U)[:num_kept]).values


def _order(scores_U: Tensor) -> Tensor:
    return torch.sort(scores_U, descending=True, stable=True).indices


def dense_target(cross_IO: Tensor, weight_OI: Tensor, hessian_II: Tensor, damping: float) -> Tensor:
    """Return `PruneProblem.target_IO` for the dense model's outputs Y, from `cross_IO` = XᵀY / num_tokens.

    The result is cross_IO + damping * mean(diagonal) * Wᵀ, so that damping pulls the refitted weight towards the
    current weight and not towards zero. This matters where a few inputs dominate the diagonal's mean. With a quarter of
    the neurons removed, SmolLM2's block 28 loses 0.14% of its output energy, and 0.23% if pulled towards zero. If Y = X
    Wᵀ, the problem equals that of the layer's own outputs.
    """
    return cross_IO + damping * hessian_II.diagonal().mean() * weight_OI.T


def output_error(problem: PruneProblem, kept_I: Tensor, weight_OK: Tensor, *, damped: bool = False) -> float:
    """Return the relative squared output error ‖X P - X_K W_K‖² / ‖X P‖² of a weight over the columns `kept_I`.

    X P are the layer's own outputs or, with a target, the nearest outputs that all inputs together can give. With
    `damped`, the norms use the damped Hessian; that is the objective that the methods minimise.
    """
    hessian_II = _hessian(problem)
    ridge = problem.damping * float(hessian_II.diagonal().mean()) if damped else 0.0
    return _relative_error(hessian_II, _full_solution(problem), kept_I, weight_OK, ridge)


def loss_curve(problem: PruneProblem, sizes: Sequence[int], method: PruningMethod) -> list[float]:
    """Return the damped squared output error per token, summed over features, that a refit leaves at each size.

    `sizes` are numbers of groups in descending order. The groups are those that the method keeps by its scores. For a
    method that searches, one greedy removal of OSSCAR passes through all sizes. The error assumes a refit, also for
    methods that do not refit. Inputs that are all zero lose nothing.
    """
    if not bool(_hessian(problem).diagonal().any()):
        return [0.0] * len(sizes)
    if method.scores is not None:
        return _nested_loss_curve(problem, sizes, _order(method.scores(problem)))
    tableau, _, _ = _make_tableau(problem)
    losses = []
    for size in sizes:
        if size < len(tableau.kept):
            osscar.remove_greedily(tableau, size, _CURVE_BATCHES)
        losses.append(2 * tableau.loss)
    return losses


def _nested_loss_curve(problem: PruneProblem, sizes: Sequence[int], order_U: Tensor) -> list[float]:
    """Return the errors if the last groups of the order are removed; all sizes come from one factorization.

    With the kept features K before the removed ones R, let H = L Lᵀ. The least error is tr(P_Rᵀ S P_R) with the Schur
    complement S = H_RR - H_RK H_KK⁻¹ H_KR = L_RR L_RRᵀ. So it is the sum of the squares of the last rows of Lᵀ P, which
    do not depend on how many features are removed.
    """
    order_I = osscar.expand_groups(order_U, problem.group_size)
    hessian_II = _hessian(problem)
    factor_II, damping = osscar.factorize(hessian_II[order_I[:, None], order_I], problem.damping)
    solution_IO = _full_solution(replace(problem, damping=damping))[order_I]
    lost_I = (factor_II.T @ solution_IO).square().sum(dim=1)
    return [float(lost_I[size * problem.group_size :].sum()) for size in sizes]


def _random_scores(problem: PruneProblem) -> Tensor:
    return torch.randperm(problem.num_groups, generator=torch.Generator().manual_seed(problem.seed)).double()


def _magnitude_scores(problem: PruneProblem) -> Tensor:
    return problem.sum_per_group(magnitude(problem.weight_OI))


def _peak_scores(problem: PruneProblem) -> Tensor:
    return peak_magnitude(problem.weight_OI).reshape(problem.num_groups, problem.group_size).amax(dim=1)


def _wanda_scores(problem: PruneProblem) -> Tensor:
    """Return each column's magnitude times its input's (arXiv 2306.11695, eq. 1), squared and summed per group."""
    return problem.sum_per_group(_hessian(problem).diagonal() * magnitude(problem.weight_OI))


def _unchanged(scores: Scores, **settings: Any) -> PruningMethod:
    """Return a method that keeps the groups of the highest scores, with the layer's own weight."""

    def prune(problem: PruneProblem, num_kept: int) -> PrunedLayer:
        scores_U = scores(problem)
        kept_U, total = choose_kept(scores_U, num_kept), float(scores_U.sum())
        removed_frac = 1 - float(scores_U[kept_U].sum()) / total if total > 0 else 0.0
        return _without_refit(problem, kept_U, {"removed_score_frac": removed_frac})

    return PruningMethod(prune, scores, **settings)


def _refitted(scores: Scores, **settings: Any) -> PruningMethod:
    """Return a method that keeps the groups of the highest scores, with a refitted weight. It reads the Hessian."""

    def prune(problem: PruneProblem, num_kept: int) -> PrunedLayer:
        return _with_refit(problem, choose_kept(scores(problem), num_kept), {})

    return PruningMethod(prune, scores, needs_data=True, **settings)


def _random(problem: PruneProblem, num_kept: int) -> PrunedLayer:
    return _without_refit(problem, choose_kept(_random_scores(problem), num_kept), {})


def _osscar(problem: PruneProblem, num_kept: int) -> PrunedLayer:
    kept_U, solution_IO, damping, _ = _choose_by_osscar(problem, num_kept, local_search=False)
    return _with_refit(replace(problem, damping=damping), kept_U, {}, solution_IO)


def _osscar_search(problem: PruneProblem, num_kept: int) -> PrunedLayer:
    kept_U, solution_IO, damping, log = _choose_by_osscar(problem, num_kept, local_search=True)
    gain = 1 - log.losses[-1] / log.losses[0] if log.losses[0] > 0 else 0.0
    detail = {"num_swaps": log.num_swaps, "num_search_rounds": len(log.losses) - 1, "search_gain_frac": gain}
    return _with_refit(replace(problem, damping=damping), kept_U, detail, solution_IO)


METHODS: dict[str, PruningMethod] = {
    "random": PruningMethod(_random, _random_scores, uses_seed=True),
    "magnitude": _unchanged(_magnitude_scores),
    "peak_magnitude": _unchanged(_peak_scores),
    "refit": _refitted(_magnitude_scores),
    "wanda": _unchanged(_wanda_scores, needs_data=True),
    "wanda_refit": _refitted(_wanda_scores),
    # The lost hidden states are noisier than a layer's own outputs, so their fit needs more damping.
    "wanda_residual": _refitted(_wanda_scores, target="residual", damping=0.1),
    "osscar": PruningMethod(_osscar, needs_data=True),
    "osscar_search": PruningMethod(_osscar_search, needs_data=True),
}
"""Pruning methods by the name that a recipe gives them."""

DEFAULT_METHODS = {"mlp": "wanda_refit", "attention": "osscar_search"}
"""Method for each kind of unit if a recipe names none. For neurons OSSCAR's search costs more and gains nothing."""


def _hessian(problem: PruneProblem) -> Tensor:
    assert problem.hessian_II is not None, "this method needs calibration data"
    return problem.hessian_II


def _without_refit(problem: PruneProblem, kept_U: Tensor, detail: dict[str, Any]) -> PrunedLayer:
    kept_I = osscar.expand_groups(kept_U, problem.group_size)
    weight_OK = problem.weight_OI[:, kept_I].contiguous()
    if problem.hessian_II is not None:
        detail["relative_output_error"] = output_error(problem, kept_I, weight_OK)
    return PrunedLayer(kept_U, kept_I, weight_OK, detail)


def _with_refit(
    problem: PruneProblem, kept_U: Tensor, detail: dict[str, Any], solution_IO: Tensor | None = None
) -> PrunedLayer:
    hessian_II = _hessian(problem)
    kept_I = osscar.expand_groups(kept_U, problem.group_size)
    weight_OK, damping = osscar.refit(hessian_II, problem.weight_OI, problem.target_IO, problem.damping, kept_I)
    if solution_IO is None:
        solution_IO = _full_solution(replace(problem, damping=damping))
    detail |= {
        "relative_output_error": _relative_error(hessian_II, solution_IO, kept_I, weight_OK),
        "damping": damping,
        "num_dead_inputs": int((hessian_II.diagonal() == 0).sum()),
    }
    return PrunedLayer(kept_U, kept_I, weight_OK, detail)


def _choose_by_osscar(
    problem: PruneProblem, num_kept: int, *, local_search: bool
) -> tuple[Tensor, Tensor, float, osscar.SearchLog]:
    """Return the kept groups, the full solution, the damping used and the search log.

    The large tableau is local to this function, so its memory is free before the refit.
    """
    tableau, solution_IO, damping = _make_tableau(problem)
    osscar.remove_greedily(tableau, num_kept)
    log = osscar.local_search(tableau) if local_search else osscar.SearchLog(0, [tableau.loss])
    return tableau.kept, solution_IO, damping, log


def _make_tableau(problem: PruneProblem) -> tuple[osscar.Tableau, Tensor, float]:
    """Return the tableau with all groups kept, the full solution and the damping used."""
    factor_II, damping = osscar.factorize(_hessian(problem), problem.damping)
    inverse_II = torch.cholesky_inverse(factor_II).T  # symmetric; the transpose is row-major
    del factor_II
    solution_IO = problem.weight_OI.T if problem.target_IO is None else inverse_II @ problem.target_IO
    return osscar.Tableau(inverse_II, solution_IO, problem.group_size), solution_IO, damping


def _full_solution(problem: PruneProblem) -> Tensor:
    """Return P `[I, O]`, the weight over all inputs that fits the target best."""
    if problem.target_IO is None:
        return problem.weight_OI.T
    return torch.cholesky_solve(problem.target_IO, osscar.factorize(_hessian(problem), problem.damping).factor_II)


def _relative_error(
    hessian_II: Tensor, solution_IO: Tensor, kept_I: Tensor, weight_OK: Tensor, ridge: float = 0.0
) -> float:
    error_IO = solution_IO.clone()
    error_IO[kept_I] -= weight_OK.T
    lost, total = _energy(hessian_II, error_IO, ridge), _energy(hessian_II, solution_IO, ridge)
    return lost / total if total > 0 else 0.0


def _energy(hessian_II: Tensor, x_IO: Tensor, ridge: float) -> float:
    """Return tr(xᵀ (H + ridge) x) from the upper triangle of H, which halves the work and needs little memory."""
    total = ridge * float(x_IO.square().sum())
    for start in range(0, len(x_IO), _CHUNK_ROWS):
        stop = start + _CHUNK_ROWS
        product_CO = hessian_II[start:stop, stop:] @ x_IO[stop:]
        product_CO.mul_(2).addmm_(hessian_II[start:stop, start:stop], x_IO[start:stop])
        total += float((product_CO * x_IO[start:stop]).sum())
    return total
