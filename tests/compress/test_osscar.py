import itertools
import math

import pytest
import torch
from torch import Tensor

from slimserve.compress import osscar
from slimserve.compress.osscar import Tableau, expand_groups, factorize, local_search, refit, remove_greedily
from slimserve.core.errors import UserError

DAMPING = 0.01


def make_layer(seed: int, num_inputs: int, num_outputs: int, num_tokens: int = 60) -> tuple[Tensor, Tensor]:
    """Return the Hessian of correlated inputs of different scales, and a weight `[O, I]`."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(num_tokens, num_inputs, generator=generator, dtype=torch.float64)
    mix_II = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64)
    x_TI = (x_TI + x_TI @ mix_II / 2) * (0.2 + torch.rand(num_inputs, generator=generator, dtype=torch.float64))
    weight_OI = torch.randn(num_outputs, num_inputs, generator=generator, dtype=torch.float64)
    return x_TI.T @ x_TI / num_tokens, weight_OI


def damp(hessian_II: Tensor, damping: float = DAMPING) -> Tensor:
    return hessian_II + damping * hessian_II.diagonal().mean() * torch.eye(len(hessian_II), dtype=torch.float64)


def make_tableau(hessian_II: Tensor, weight_OI: Tensor, group_size: int) -> Tableau:
    return Tableau(torch.linalg.inv(damp(hessian_II)), weight_OI.T, group_size)


def solve(hessian_II: Tensor, weight_OI: Tensor, kept_I: Tensor) -> tuple[Tensor, float]:
    """Return the weight `[K, O]` and the loss by least squares on rows whose Hessian is H (the oracle)."""
    rows_II = torch.linalg.cholesky(damp(hessian_II)).T
    aim_IO = rows_II @ weight_OI.T
    weight_KO = torch.linalg.lstsq(rows_II[:, kept_I], aim_IO, driver="gelsd").solution
    return weight_KO, float((aim_IO - rows_II[:, kept_I] @ weight_KO).square().sum()) / 2


def loss_of(hessian_II: Tensor, weight_OI: Tensor, kept_U: Tensor, group_size: int) -> float:
    return solve(hessian_II, weight_OI, expand_groups(kept_U, group_size))[1]


def without(kept_U: Tensor, group: int) -> Tensor:
    return kept_U[kept_U != group]


def best_loss(hessian_II: Tensor, weight_OI: Tensor, group_size: int, num_kept: int) -> float:
    groups = range(len(hessian_II) // group_size)
    return min(
        loss_of(hessian_II, weight_OI, torch.tensor(subset), group_size)
        for subset in itertools.combinations(groups, num_kept)
    )


@pytest.mark.parametrize(("group_size", "num_outputs"), [(1, 5), (3, 17), (4, 1)])
def test_the_downdated_tableau_equals_direct_inversion(group_size: int, num_outputs: int) -> None:
    hessian_II, weight_OI = make_layer(0, 12, num_outputs)
    damped_II = damp(hessian_II)
    tableau = make_tableau(hessian_II, weight_OI, group_size)
    num_groups = 12 // group_size
    tableau.exchange(torch.tensor([num_groups - 1, 0]))
    tableau.exchange(torch.tensor([1]))
    tableau.exchange(torch.tensor([0]))
    assert tableau.removed.tolist() == [1, num_groups - 1]
    kept, removed = expand_groups(tableau.kept, group_size), expand_groups(tableau.removed, group_size)
    inverse_KK = torch.linalg.inv(damped_II[kept][:, kept])
    cross_KR = damped_II[kept][:, removed]
    weight_KO, loss = solve(hessian_II, weight_OI, kept)
    missing_RO = (damped_II @ weight_OI.T)[removed] - cross_KR.T @ weight_KO
    schur_RR = damped_II[removed][:, removed] - cross_KR.T @ inverse_KK @ cross_KR
    for actual, expected in (
        (tableau.matrix_II[kept][:, kept], inverse_KK),
        (tableau.matrix_II[removed][:, removed], -schur_RR),
        (tableau.matrix_II[kept][:, removed], -inverse_KK @ cross_KR),
        (tableau.matrix_II[removed][:, kept], -(inverse_KK @ cross_KR).T),
        (tableau.weight_IO[kept], weight_KO),
        (tableau.weight_IO[removed], missing_RO),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert tableau.loss == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("group_size", [1, 3])
def test_loss_changes_are_exact_for_one_group(group_size: int) -> None:
    hessian_II, weight_OI = make_layer(1, 15, 7)
    tableau = make_tableau(hessian_II, weight_OI, group_size)
    tableau.exchange(torch.tensor([1, 4]))
    changes_U = tableau.loss_changes()
    for group in range(15 // group_size):
        kept = tableau.kept
        other = without(kept, group) if group in kept else torch.cat([kept, torch.tensor([group])]).sort().values
        expected = loss_of(hessian_II, weight_OI, other, group_size) - loss_of(hessian_II, weight_OI, kept, group_size)
        assert float(changes_U[group]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("group_size", [1, 3])
def test_the_loss_change_of_a_swap_is_exact(group_size: int) -> None:
    hessian_II, weight_OI = make_layer(2, 21, 4)
    tableau = make_tableau(hessian_II, weight_OI, group_size)
    tableau.exchange(torch.tensor([0, 3, 5]))
    before = loss_of(hessian_II, weight_OI, tableau.kept, group_size)
    dropped, added = torch.tensor([6, 2]), torch.tensor([5, 0])
    price = tableau.swap_loss_change(dropped, added)
    tableau.exchange(dropped)
    tableau.exchange(added)
    assert tableau.removed.tolist() == [2, 3, 6]
    assert price == pytest.approx(loss_of(hessian_II, weight_OI, tableau.kept, group_size) - before, rel=1e-8)
    assert tableau.loss == pytest.approx(before + price, rel=1e-8)


@pytest.mark.parametrize("group_size", [1, 3])
def test_the_best_partner_of_each_removed_group_is_found(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(osscar, "_CHUNK_ROWS", 2)
    hessian_II, weight_OI = make_layer(3, 21, 5)
    tableau = make_tableau(hessian_II, weight_OI, group_size)
    tableau.exchange(torch.tensor([0, 2, 6]))
    before = loss_of(hessian_II, weight_OI, tableau.kept, group_size)
    partner_R, change_R = tableau.best_swaps()
    for added, partner, change in zip(tableau.removed, partner_R.tolist(), change_R.tolist(), strict=True):
        losses = {
            int(dropped): loss_of(
                hessian_II, weight_OI, torch.cat([without(tableau.kept, int(dropped)), added[None]]), group_size
            )
            for dropped in tableau.kept
        }
        assert partner == min(losses, key=lambda dropped: losses[dropped])
        assert change == pytest.approx(losses[partner] - before, rel=1e-7)


def test_greedy_removal_takes_the_group_of_least_loss_each_time() -> None:
    hessian_II, weight_OI = make_layer(4, 18, 7)
    tableau = make_tableau(hessian_II, weight_OI, 2)
    remove_greedily(tableau, 4)
    kept = torch.arange(9)
    while len(kept) > 4:
        losses = {int(group): loss_of(hessian_II, weight_OI, without(kept, int(group)), 2) for group in kept}
        kept = without(kept, min(losses, key=lambda group: losses[group]))
    assert tableau.kept.tolist() == kept.tolist()


def test_features_are_removed_in_batches_down_to_the_requested_number(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian_II, weight_OI = make_layer(5, 31, 3)
    tableau = make_tableau(hessian_II, weight_OI, 1)
    lowest = torch.sort(tableau.loss_changes()).indices[:5]
    sizes: list[int] = []
    exchange = tableau.exchange

    def exchange_and_count(groups: Tensor) -> None:
        sizes.append(len(groups))
        exchange(groups)

    monkeypatch.setattr(tableau, "exchange", exchange_and_count)
    remove_greedily(tableau, 31 - 18, num_batches=4)
    assert sizes == [5, 5, 5, 3]
    assert set(lowest.tolist()) <= set(tableau.removed.tolist())


def test_among_equal_groups_the_lower_index_stays() -> None:
    tableau = Tableau(torch.eye(6, dtype=torch.float64), torch.ones(6, 3, dtype=torch.float64), 1)
    remove_greedily(tableau, 2)
    assert tableau.kept.tolist() == [0, 1]


@pytest.mark.parametrize(("num_inputs", "group_size", "num_kept"), [(8, 1, 4), (18, 3, 3)])
def test_local_search_ends_near_the_best_subset_and_never_above_greedy(
    num_inputs: int, group_size: int, num_kept: int
) -> None:
    """A set that no single swap improves can still miss the optimum, which may need two swaps at once.

    So no bound holds for every matrix. On 300 other seeds, greedy removal was optimal in 72% (k = 1) and 77% (k = 3) of
    these small, correlated problems, and at worst 91% above the optimum. Local search was optimal in 94% and 95%, and
    at worst 37% above. Of the 40 seeds here one (k = 3) ends 42% above. The last assertion allows one such miss, and no
    other above 5%.
    """
    excess = []
    for seed in range(100, 140):
        hessian_II, weight_OI = make_layer(seed, num_inputs, 5, num_tokens=24)
        tableau = make_tableau(hessian_II, weight_OI, group_size)
        remove_greedily(tableau, num_kept)
        greedy = loss_of(hessian_II, weight_OI, tableau.kept, group_size)
        local_search(tableau)
        searched = loss_of(hessian_II, weight_OI, tableau.kept, group_size)
        assert searched <= greedy * (1 + 1e-12)
        excess.append(searched / best_loss(hessian_II, weight_OI, group_size, num_kept) - 1)
    assert min(excess) > -1e-9
    assert sum(value < 1e-9 for value in excess) >= 0.9 * len(excess)
    assert sum(excess) / len(excess) < 0.02
    assert sorted(excess)[-2] < 0.05


@pytest.mark.parametrize(("num_inputs", "group_size", "num_removed"), [(40, 1, 15), (30, 3, 4)])
def test_an_accepted_swap_never_raises_the_loss_and_the_end_is_a_local_optimum(
    num_inputs: int, group_size: int, num_removed: int
) -> None:
    hessian_II, weight_OI = make_layer(6, num_inputs, 7)
    tableau = make_tableau(hessian_II, weight_OI, group_size)
    order = torch.sort(tableau.loss_changes(), descending=True).indices
    tableau.exchange(order[:num_removed])
    start = loss_of(hessian_II, weight_OI, tableau.kept, group_size)
    log = local_search(tableau)
    assert log.num_swaps >= len(log.losses) - 1 >= 2
    assert log.losses[0] == pytest.approx(start)
    assert all(after < before for before, after in itertools.pairwise(log.losses))
    end = loss_of(hessian_II, weight_OI, tableau.kept, group_size)
    assert end < 0.7 * start
    assert log.losses[-1] == pytest.approx(end, rel=1e-8)
    assert len(tableau.removed) == num_removed
    assert float(tableau.best_swaps()[1].min()) > -1e-3 * end


def test_local_search_makes_fewer_swaps_where_many_at_once_would_raise_the_loss() -> None:
    """Two removed features are copies of one direction, so restoring the second one gains nothing."""
    x_TI = torch.eye(4, dtype=torch.float64)
    x_TI[:, 1] = x_TI[:, 0] + 0.01 * x_TI[:, 1]
    weight_OI = torch.tensor([[3.0, 3.0, 1.0, 1.1]], dtype=torch.float64)
    hessian_II = x_TI.T @ x_TI
    tableau = make_tableau(hessian_II, weight_OI, 1)
    tableau.exchange(torch.tensor([0, 1]))
    log = local_search(tableau)
    assert log.num_swaps == 1
    assert tableau.loss == pytest.approx(best_loss(hessian_II, weight_OI, 1, 2))


def test_local_search_does_nothing_without_removed_groups() -> None:
    tableau = make_tableau(*make_layer(7, 6, 3), 1)
    assert local_search(tableau) == (0, [0.0])


@pytest.mark.parametrize(("num_inputs", "num_outputs", "kept"), [(9, 4, [0, 3, 4, 8]), (5, 11, [2]), (7, 3, range(7))])
def test_refit_equals_least_squares(num_inputs: int, num_outputs: int, kept: list[int]) -> None:
    hessian_II, weight_OI = make_layer(8, num_inputs, num_outputs)
    kept_I = torch.tensor(kept)
    expected_KO, _ = solve(hessian_II, weight_OI, kept_I)
    own_OK, damping = refit(hessian_II, weight_OI, None, DAMPING, kept_I)
    aimed_OK, _ = refit(hessian_II, torch.zeros_like(weight_OI), damp(hessian_II) @ weight_OI.T, DAMPING, kept_I)
    torch.testing.assert_close(own_OK, expected_KO.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(aimed_OK, expected_KO.T, rtol=1e-9, atol=1e-9)
    assert damping == DAMPING
    assert own_OK.is_contiguous()
    assert aimed_OK.is_contiguous()


def test_damping_grows_only_until_a_singular_matrix_can_be_inverted() -> None:
    hessian_II, _ = make_layer(9, 10, 3, num_tokens=4)
    factor_II, damping = factorize(hessian_II, 0.0)
    assert 0 < damping <= 1e-6
    torch.testing.assert_close(factor_II @ factor_II.T, damp(hessian_II, damping))
    assert factorize(hessian_II, DAMPING).damping == DAMPING


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_with_nan_or_infinity_is_rejected(value: float) -> None:
    hessian_II, _ = make_layer(10, 5, 3)
    hessian_II[3, 1] = hessian_II[1, 3] = value
    with pytest.raises(UserError, match="calibration: 'Hessian' contains NaN or infinity"):
        factorize(hessian_II, DAMPING)
