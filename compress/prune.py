"""Structured pruning: which groups of a layer's inputs to keep, its new weight, and the cut of the layers before it.

Shapes: O output features, I input features of the consumer, the layer that loses input
columns; U groups of k neighbouring columns (MLP neurons before a down projection: k = 1; KV groups
before an attention's output projection: k = their query heads' width); K columns are kept. A
pruning method is a function from a `PruneProblem` and the number of groups to keep to a `Pruned`,
and a row in `METHODS`. The mathematics of OSSCAR is in `osscar.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slimserve.compress import osscar
from slimserve.compress.families import LayerRoles
from slimserve.core.errors import UserError

_ROWS = 512
"""Rows of a Hessian multiplied at once where only its upper half is read."""
_CURVE_ROUNDS = 4
"""Batches of removal between two points of a loss curve."""


@dataclass(frozen=True)
class PruneProblem:
    """A consumer of which whole groups of input columns are to be removed. All tensors are float64."""

    weight_OI: Tensor
    hessian_II: Tensor | None
    """XᵀX / num_tokens of the consumer's inputs, undamped; None is enough for methods outside `NEEDS_DATA`."""
    target_IO: Tensor | None
    """G, the right-hand side of the least squares problem for the outputs aimed at (see `dense_target`).

    None: the consumer's own outputs, G = (gram + damping) Wᵀ.
    """
    group_size: int
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of the diagonal's mean."""
    seed: int = 0
    """Of the method `random`."""

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


@dataclass(frozen=True)
class Pruned:
    """What a method keeps of a consumer."""

    kept_U: Tensor
    """Indices of the kept groups, ascending, int64."""
    kept_I: Tensor
    """The input columns of these groups, ascending, int64."""
    weight_OK: Tensor
    """The consumer's weight over these columns, float64: refitted or just cut, as the method does."""
    detail: dict[str, Any]
    """Numbers for the manifest."""


Method = Callable[[PruneProblem, int], Pruned]


def magnitude(consumer_OI: Tensor) -> Tensor:
    """Sublayer the squared norm of each consumer column, `[I]` float64: the objective's rise when it is removed.

    This is the OSSCAR removal score (arXiv 2403.12983, section 3) for inputs whose Hessian
    matrix is the identity, so it looks at no data.
    """
    return consumer_OI.double().square().sum(dim=0) / 2


def peak_magnitude(consumer_OI: Tensor) -> Tensor:
    """Largest magnitude in each consumer column, `[I]` float64.

    Keeps the neurons that write one large value, which the squared norm does not see and
    without which small models fall apart (SmolLM2-135M, docs/log.md 2026-11-24).
    """
    return consumer_OI.double().abs().amax(dim=0)


def kept_width(width: int, remove_frac: float, multiple: int) -> int:
    """Neurons to keep of `width`: `1 - remove_frac` of them, rounded to the nearest `multiple` (at least one).

    Raises UserError where the multiple does not fit the width or nothing would be removed.
    """
    kept = max(multiple, round(width * (1 - remove_frac) / multiple) * multiple)
    if kept >= width:
        raise UserError(
            "mlp_remove_frac",
            remove_frac,
            f"removes nothing of {width} neurons in steps of {multiple}",
            "remove more, or lower `multiple`",
        )
    return kept


def choose_kept(scores_U: Tensor, num_kept: int) -> Tensor:
    """Indices of the `num_kept` highest scores, ascending; ties go to the lower index."""
    order = torch.sort(scores_U, descending=True, stable=True).indices
    return torch.sort(order[:num_kept]).values


def dense_target(cross_IO: Tensor, weight_OI: Tensor, hessian_II: Tensor, damping: float) -> Tensor:
    """`PruneProblem.target_IO` for the dense model's outputs Y, from `cross_IO` = XᵀY / num_tokens.

    Adds damping * mean(diag) * Wᵀ, so that damping draws the refitted weight to the current one and
    not to zero. That matters where a few inputs dominate the diagonal's mean: with a quarter of the
    neurons removed, SmolLM2's block 28 loses 0.14% of its output energy, and 0.23% when drawn to zero.
    With Y = X Wᵀ the problem equals that of the consumer's own outputs.
    """
    return cross_IO + damping * hessian_II.diagonal().mean() * weight_OI.T


def objective(problem: PruneProblem, kept_I: Tensor, weight_OK: Tensor, *, damped: bool = False) -> float:
    """Relative squared output error, ‖X P - X_K W_K‖² / ‖X P‖², of a weight over the columns `kept_I`.

    X P are the outputs aimed at: the consumer's own, or those nearest to the target that the full
    set of inputs can give. With `damped` the norms are those of the damped Hessian, which is what
    the methods minimise.
    """
    hessian_II = _hessian(problem)
    ridge = problem.damping * float(hessian_II.diagonal().mean()) if damped else 0.0
    return _relative_error(hessian_II, _solution(problem), kept_I, weight_OK, ridge)


def loss_curve(problem: PruneProblem, sizes: Sequence[int]) -> list[float]:
    """Mean squared output error per token (damped, summed over features) that OSSCAR leaves at each number of groups.

    `sizes` fall; removal is greedy, in one go through all of them. Inputs that are all zero lose nothing.
    """
    if not bool(_hessian(problem).diagonal().any()):
        return [0.0] * len(sizes)
    tableau, _, _ = _tableau(problem)
    losses = []
    for size in sizes:
        if size < len(tableau.kept):
            osscar.remove_greedily(tableau, size, _CURVE_ROUNDS)
        losses.append(2 * tableau.loss)
    return losses


def cut_mlp(block: Mapping[str, Tensor], roles: LayerRoles, kept_K: Tensor) -> dict[str, Tensor]:
    """A block whose MLP has only the neurons `kept_K`: producer rows and biases, consumer columns.

    `block` maps names relative to the block to tensors and is not changed; the results
    own their memory.
    """
    return _cut(block, dict.fromkeys(roles.mlp_producers, kept_K), roles.mlp_consumer, kept_K)


def cut_attention(
    block: Mapping[str, Tensor], roles: LayerRoles, kept_heads_U: Tensor, num_q_per_kv: int, head_dim: int
) -> dict[str, Tensor]:
    """A block whose attention has only the KV groups `kept_heads_U`, each one KV head with its query heads.

    Cuts rows and biases of query, key and value, and columns of the output projection, whose
    bias stays. Norms of queries and keys are per `head_dim` and stay too. `block` is not changed.
    """
    kv_rows = osscar.expand_groups(kept_heads_U, head_dim)
    query_rows = osscar.expand_groups(kept_heads_U, num_q_per_kv * head_dim)
    rows = {roles.query: query_rows, roles.key: kv_rows, roles.value: kv_rows}
    return _cut(block, rows, roles.attention_consumer, query_rows)


def _cut(block: Mapping[str, Tensor], rows: Mapping[str, Tensor], consumer: str, columns: Tensor) -> dict[str, Tensor]:
    cut = dict(block)
    for layer, kept in rows.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in cut:
                cut[name] = cut[name][kept].contiguous()
    cut[f"{consumer}.weight"] = cut[f"{consumer}.weight"][:, columns].contiguous()
    return cut


def _random(problem: PruneProblem, num_kept: int) -> Pruned:
    generator = torch.Generator().manual_seed(problem.seed)
    kept_U = choose_kept(torch.randperm(problem.num_groups, generator=generator), num_kept)
    return _without_refit(problem, kept_U, {})


def _magnitude(problem: PruneProblem, num_kept: int) -> Pruned:
    return _by_score(problem, num_kept, _grouped(magnitude(problem.weight_OI), problem).sum(dim=1))


def _peak_magnitude(problem: PruneProblem, num_kept: int) -> Pruned:
    return _by_score(problem, num_kept, _grouped(peak_magnitude(problem.weight_OI), problem).amax(dim=1))


def _wanda(problem: PruneProblem, num_kept: int) -> Pruned:
    """Magnitude of a column times its input's (arXiv 2306.11695, equation 1), squared and summed over a group."""
    energy_I = _hessian(problem).diagonal() * magnitude(problem.weight_OI)
    return _by_score(problem, num_kept, _grouped(energy_I, problem).sum(dim=1))


def _refit(problem: PruneProblem, num_kept: int) -> Pruned:
    kept_U = choose_kept(_grouped(magnitude(problem.weight_OI), problem).sum(dim=1), num_kept)
    return _with_refit(problem, kept_U, {})


def _osscar(problem: PruneProblem, num_kept: int) -> Pruned:
    kept_U, solution_IO, damping, _ = _choose_by_osscar(problem, num_kept, local_search=False)
    return _with_refit(replace(problem, damping=damping), kept_U, {}, solution_IO)


def _osscar_search(problem: PruneProblem, num_kept: int) -> Pruned:
    kept_U, solution_IO, damping, log = _choose_by_osscar(problem, num_kept, local_search=True)
    gain = 1 - log.losses[-1] / log.losses[0] if log.losses[0] > 0 else 0.0
    detail = {"swaps": log.num_swaps, "search_rounds": len(log.losses) - 1, "search_gain": gain}
    return _with_refit(replace(problem, damping=damping), kept_U, detail, solution_IO)


def _on_data(method: Method) -> Method:
    """`method`, or magnitude where the inputs are all zero and tell nothing, with the reason in the detail."""

    def guarded(problem: PruneProblem, num_kept: int) -> Pruned:
        if bool(_hessian(problem).diagonal().any()):
            return method(problem, num_kept)
        pruned = _magnitude(problem, num_kept)
        return replace(pruned, detail={**pruned.detail, "fallback": "magnitude, as all calibration inputs are zero"})

    return guarded


_DATA_METHODS: dict[str, Method] = {
    "refit": _on_data(_refit),
    "wanda": _on_data(_wanda),
    "osscar": _on_data(_osscar),
    "osscar_search": _on_data(_osscar_search),
}

NEEDS_DATA: frozenset[str] = frozenset(_DATA_METHODS)
"""Methods that look at the Hessian."""

METHODS: dict[str, Method] = {
    "random": _random,
    "magnitude": _magnitude,
    "peak_magnitude": _peak_magnitude,
    **_DATA_METHODS,
}
"""Pruning methods by name: `(problem, number of groups to keep, at least one)`. The same input gives the same bits."""


def _hessian(problem: PruneProblem) -> Tensor:
    assert problem.hessian_II is not None, "this method needs calibration data"
    return problem.hessian_II


def _grouped(scores_I: Tensor, problem: PruneProblem) -> Tensor:
    return scores_I.reshape(problem.num_groups, problem.group_size)


def _by_score(problem: PruneProblem, num_kept: int, scores_U: Tensor) -> Pruned:
    kept_U = choose_kept(scores_U, num_kept)
    total = float(scores_U.sum())
    share = 1 - float(scores_U[kept_U].sum()) / total if total > 0 else 0.0
    return _without_refit(problem, kept_U, {"removed_score_share": share})


def _without_refit(problem: PruneProblem, kept_U: Tensor, detail: dict[str, Any]) -> Pruned:
    kept_I = osscar.expand_groups(kept_U, problem.group_size)
    weight_OK = problem.weight_OI[:, kept_I].contiguous()
    if problem.hessian_II is not None:
        detail["relative_output_error"] = objective(problem, kept_I, weight_OK)
    return Pruned(kept_U, kept_I, weight_OK, detail)


def _with_refit(
    problem: PruneProblem, kept_U: Tensor, detail: dict[str, Any], solution_IO: Tensor | None = None
) -> Pruned:
    hessian_II = _hessian(problem)
    kept_I = osscar.expand_groups(kept_U, problem.group_size)
    weight_OK, damping = osscar.refit(hessian_II, problem.weight_OI, problem.target_IO, problem.damping, kept_I)
    if solution_IO is None:
        solution_IO = _solution(replace(problem, damping=damping))
    detail |= {
        "relative_output_error": _relative_error(hessian_II, solution_IO, kept_I, weight_OK),
        "damping": damping,
        "dead_inputs": int((hessian_II.diagonal() == 0).sum()),
    }
    return Pruned(kept_U, kept_I, weight_OK, detail)


def _choose_by_osscar(
    problem: PruneProblem, num_kept: int, *, local_search: bool
) -> tuple[Tensor, Tensor, float, osscar.SearchLog]:
    """Kept groups, full solution, damping used, what local search did. The large tableau lives in here only."""
    tableau, solution_IO, damping = _tableau(problem)
    osscar.remove_greedily(tableau, num_kept)
    log = osscar.local_search(tableau) if local_search else osscar.SearchLog(0, [tableau.loss])
    return tableau.kept, solution_IO, damping, log


def _tableau(problem: PruneProblem) -> tuple[osscar.Tableau, Tensor, float]:
    """The problem with all groups kept, its full solution, and the damping that it took."""
    factor_II, damping = osscar.factorize(_hessian(problem), problem.damping)
    inverse_II = torch.cholesky_inverse(factor_II).T  # symmetric, and row-major this way round
    del factor_II
    solution_IO = problem.weight_OI.T if problem.target_IO is None else inverse_II @ problem.target_IO
    return osscar.Tableau(inverse_II, solution_IO, problem.group_size), solution_IO, damping


def _solution(problem: PruneProblem) -> Tensor:
    """P `[I, O]`, the weight over all inputs that fits the target best."""
    if problem.target_IO is None:
        return problem.weight_OI.T
    return torch.cholesky_solve(problem.target_IO, osscar.factorize(_hessian(problem), problem.damping).factor_II)


def _relative_error(
    hessian_II: Tensor, solution_IO: Tensor, kept_I: Tensor, weight_OK: Tensor, ridge: float = 0.0
) -> float:
    error_IO = solution_IO.clone()
    error_IO[kept_I] -= weight_OK.T
    lost, whole = _energy(hessian_II, error_IO, ridge), _energy(hessian_II, solution_IO, ridge)
    return lost / whole if whole > 0 else 0.0


def _energy(hessian_II: Tensor, x_IO: Tensor, ridge: float) -> float:
    """tr(xᵀ (gram + ridge) x), from the upper half of the symmetric matrix: half the work, little memory."""
    total = ridge * float(x_IO.square().sum())
    for start in range(0, len(x_IO), _ROWS):
        rows = slice(start, start + _ROWS)
        product_RO = hessian_II[rows, start + _ROWS :] @ x_IO[start + _ROWS :]
        product_RO.mul_(2).addmm_(hessian_II[rows, rows], x_IO[rows])
        total += float((product_RO * x_IO[rows]).sum())
    return total
