import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimserve.compress import prune
from slimserve.compress.prune import (
    METHODS,
    PruneProblem,
    choose_kept,
    dense_target,
    loss_curve,
    magnitude,
    output_error,
    peak_magnitude,
)
from slimserve.compress.roles import PruneRole
from slimserve.compress.steps.width import kept_width
from slimserve.core.errors import UserError

NEEDS_DATA = {name for name, method in METHODS.items() if method.needs_data}


def make_inputs(seed: int, num_tokens: int, num_inputs: int) -> Tensor:
    """Return correlated inputs `[T, I]` with features of different scales."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(num_tokens, num_inputs, generator=generator, dtype=torch.float64)
    mix_II = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64)
    return (x_TI + x_TI @ mix_II / 2) * (0.2 + torch.rand(num_inputs, generator=generator, dtype=torch.float64))


def make_problem(
    x_TI: Tensor, num_outputs: int, group_size: int = 1, target_IO: Tensor | None = None, damping: float = 0.01
) -> PruneProblem:
    generator = torch.Generator().manual_seed(99)
    weight_OI = torch.randn(num_outputs, x_TI.shape[1], generator=generator, dtype=torch.float64)
    return PruneProblem(weight_OI, x_TI.T @ x_TI / len(x_TI), target_IO, group_size, damping)


def hessian_of(problem: PruneProblem) -> Tensor:
    assert problem.hessian_II is not None
    return problem.hessian_II


def ridge_of(problem: PruneProblem) -> Tensor:
    return problem.damping * hessian_of(problem).diagonal().mean()


def test_magnitude_is_the_loss_of_removal_for_white_inputs() -> None:
    torch.manual_seed(0)
    consumer_OI = torch.randn(5, 9)
    inputs_TI = torch.linalg.qr(torch.randn(200, 9, dtype=torch.float64)).Q
    for neuron, score in enumerate(magnitude(consumer_OI)):
        without = consumer_OI.double().clone()
        without[:, neuron] = 0
        lost = inputs_TI @ (consumer_OI.double() - without).T
        assert float(score) == pytest.approx(float(lost.square().sum()) / 2)


def test_peak_magnitude_keeps_a_single_large_value_that_the_norm_overlooks() -> None:
    spiky_OI = torch.tensor([[0.0, 0.6], [0.9, -0.7], [0.0, 0.6]])
    assert torch.allclose(peak_magnitude(spiky_OI), torch.tensor([0.9, 0.7], dtype=torch.float64))
    assert choose_kept(peak_magnitude(spiky_OI), 1).tolist() == [0]
    assert choose_kept(magnitude(spiky_OI), 1).tolist() == [1]


def test_the_kept_indices_are_the_best_subset() -> None:
    torch.manual_seed(1)
    scores_I = torch.rand(8)
    best = max(itertools.combinations(range(8), 3), key=lambda subset: float(scores_I[list(subset)].sum()))
    assert choose_kept(scores_I, 3).tolist() == list(best)


def test_ties_go_to_the_lower_index() -> None:
    assert choose_kept(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("width", "remove_frac", "multiple", "kept"),
    [(1536, 0.25, 32, 1152), (1536, 0.3, 32, 1088), (44, 0.25, 4, 32), (44, 0.9, 32, 32), (7, 0.5, 1, 4)],
)
def test_the_kept_width_is_a_multiple(width: int, remove_frac: float, multiple: int, kept: int) -> None:
    assert kept_width(width, remove_frac, multiple) == kept


@pytest.mark.parametrize(("width", "remove_frac", "multiple"), [(44, 0.01, 4), (32, 0.5, 32), (20, 0.5, 64)])
def test_removing_nothing_is_an_error(width: int, remove_frac: float, multiple: int) -> None:
    with pytest.raises(UserError, match="removes nothing"):
        kept_width(width, remove_frac, multiple)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("group_size", "num_outputs", "num_kept"), [(1, 5, 7), (3, 17, 3), (5, 1, 1), (3, 4, 5)])
def test_every_method_keeps_complete_groups_and_a_matching_weight(
    method: str, group_size: int, num_outputs: int, num_kept: int
) -> None:
    problem = make_problem(make_inputs(0, 40, 15), num_outputs, group_size)
    pruned = METHODS[method](problem, num_kept)
    kept = pruned.kept_U.tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == num_kept
    assert pruned.kept_I.tolist() == [group * group_size + offset for group in kept for offset in range(group_size)]
    assert pruned.weight_OK.shape == (num_outputs, num_kept * group_size)
    assert pruned.weight_OK.dtype == torch.float64
    assert pruned.weight_OK.is_contiguous()
    error = pruned.detail["relative_output_error"]
    assert error == pytest.approx(output_error(problem, pruned.kept_I, pruned.weight_OK), abs=1e-12)
    again = METHODS[method](problem, num_kept)
    assert torch.equal(again.weight_OK, pruned.weight_OK)
    assert again.detail == pruned.detail
    if num_kept * group_size == 15:
        torch.testing.assert_close(pruned.weight_OK, problem.weight_OI, rtol=0, atol=0)
        assert error == 0


@pytest.mark.parametrize("method", sorted(METHODS.keys() - NEEDS_DATA))
def test_methods_that_need_no_data_choose_the_same_without_it(method: str) -> None:
    problem = make_problem(make_inputs(1, 40, 12), 5, 2)
    blind = METHODS[method](replace(problem, hessian_II=None), 3)
    assert blind.kept_U.tolist() == METHODS[method](problem, 3).kept_U.tolist()
    assert "relative_output_error" not in blind.detail


def test_methods_that_use_more_information_have_a_smaller_error() -> None:
    problem = make_problem(make_inputs(2, 200, 60), 13)
    error = {name: METHODS[name](problem, 40).detail["relative_output_error"] for name in METHODS}
    assert error["osscar_search"] <= error["osscar"] < error["refit"] < error["magnitude"] < error["random"]
    assert error["osscar"] < error["wanda_refit"] < error["wanda"] < error["magnitude"]


@pytest.mark.parametrize("method", ["magnitude", "refit", "wanda_refit", "osscar", "osscar_search"])
@pytest.mark.parametrize("group_size", [1, 3])
def test_for_white_inputs_every_method_is_magnitude_pruning(method: str, group_size: int) -> None:
    problem = replace(make_problem(make_inputs(3, 9, 21), 5, group_size), hessian_II=torch.eye(21, dtype=torch.float64))
    norms = problem.weight_OI.square().sum(dim=0).reshape(-1, group_size).sum(dim=1)
    num_kept = len(norms) // 2
    pruned = METHODS[method](problem, num_kept)
    assert pruned.kept_U.tolist() == sorted(sorted(range(len(norms)), key=lambda group: -norms[group])[:num_kept])
    assert torch.equal(pruned.weight_OK, problem.weight_OI[:, pruned.kept_I])
    assert pruned.detail["relative_output_error"] == pytest.approx(float(1 - norms[pruned.kept_U].sum() / norms.sum()))


def test_random_depends_only_on_the_seed() -> None:
    problem = make_problem(make_inputs(4, 9, 40), 3)
    kept = [METHODS["random"](replace(problem, seed=seed), 20).kept_U.tolist() for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    other = make_problem(make_inputs(5, 9, 40), 7)
    assert METHODS["random"](other, 20).kept_U.tolist() == kept[0]


def test_wanda_keeps_the_columns_with_the_largest_contribution() -> None:
    x_TI = make_inputs(6, 50, 14)
    problem = make_problem(x_TI, 5, 2)
    written_I = torch.stack([torch.outer(x_TI[:, i], problem.weight_OI[:, i]).square().sum() for i in range(14)])
    written_U = written_I[0::2] + written_I[1::2]
    assert METHODS["wanda"](problem, 3).kept_U.tolist() == sorted(torch.topk(written_U, 3).indices.tolist())


def test_the_refit_after_wandas_choice_is_ridge_regression_on_the_kept_columns() -> None:
    x_TI = make_inputs(6, 50, 14)
    problem = make_problem(x_TI, 5, 2)
    pruned = METHODS["wanda_refit"](problem, 3)
    assert torch.equal(pruned.kept_U, METHODS["wanda"](problem, 3).kept_U)
    rows = torch.cat([x_TI, (ridge_of(problem) * len(x_TI)).sqrt() * torch.eye(14, dtype=torch.float64)])
    solution_KO = torch.linalg.lstsq(rows[:, pruned.kept_I], rows @ problem.weight_OI.T).solution
    torch.testing.assert_close(pruned.weight_OK, solution_KO.T)


def test_the_peak_of_a_group_is_that_of_its_highest_column() -> None:
    weight_OI = torch.tensor([[0.1, 0.9, 0.8, 0.8], [0.1, 0.0, 0.8, 0.8]], dtype=torch.float64)
    problem = PruneProblem(weight_OI, None, None, 2)
    assert METHODS["peak_magnitude"](problem, 1).kept_U.tolist() == [0]
    assert METHODS["magnitude"](problem, 1).kept_U.tolist() == [1]
    assert METHODS["magnitude"](problem, 1).detail["removed_score_frac"] == pytest.approx(0.83 / 3.39)


@pytest.mark.parametrize(("rows", "damped"), [(4, False), (512, False), (4, True)])
def test_output_error_is_the_relative_error_of_the_outputs(
    rows: int, damped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "_CHUNK_ROWS", rows)
    x_TI = make_inputs(7, 30, 11)
    problem = make_problem(x_TI, 5)
    kept_I = torch.tensor([0, 2, 3, 9])
    weight_OK = problem.weight_OI[:, kept_I] * 1.1
    if damped:
        x_TI = torch.cat([x_TI, (ridge_of(problem) * len(x_TI)).sqrt() * torch.eye(11, dtype=torch.float64)])
    y_TO = x_TI @ problem.weight_OI.T
    expected = (y_TO - x_TI[:, kept_I] @ weight_OK.T).square().sum() / y_TO.square().sum()
    assert output_error(problem, kept_I, weight_OK, damped=damped) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("group_size", [1, 3])
def test_search_never_ends_above_greedy(group_size: int) -> None:
    gained = 0
    for seed in range(10):
        problem = make_problem(make_inputs(seed, 40, 24), 5, group_size)
        greedy, searched = (METHODS[name](problem, 12 // group_size) for name in ("osscar", "osscar_search"))
        before = output_error(problem, greedy.kept_I, greedy.weight_OK, damped=True)
        after = output_error(problem, searched.kept_I, searched.weight_OK, damped=True)
        assert after <= before
        assert 1 - after / before == pytest.approx(searched.detail["search_gain_frac"], abs=1e-8)
        assert (searched.detail["num_swaps"] > 0) == (searched.detail["search_gain_frac"] > 0)
        gained += after < before
    assert gained > 0


@pytest.mark.parametrize("method", sorted(NEEDS_DATA))
@pytest.mark.parametrize("group_size", [1, 5])
def test_the_layers_own_outputs_as_target_equal_no_target(method: str, group_size: int) -> None:
    own = make_problem(make_inputs(8, 60, 15), 7, group_size)
    cross_IO = hessian_of(own) @ own.weight_OI.T
    target_IO = dense_target(cross_IO, own.weight_OI, hessian_of(own), own.damping)
    torch.testing.assert_close(
        target_IO, (hessian_of(own) + ridge_of(own) * torch.eye(15, dtype=torch.float64)) @ own.weight_OI.T
    )
    expected = METHODS[method](own, 2)
    targeted = METHODS[method](replace(own, target_IO=target_IO), 2)
    assert targeted.kept_U.tolist() == expected.kept_U.tolist()
    torch.testing.assert_close(targeted.weight_OK, expected.weight_OK, rtol=1e-9, atol=1e-9)
    assert targeted.detail["relative_output_error"] == pytest.approx(expected.detail["relative_output_error"], rel=1e-8)


@pytest.mark.parametrize("method", ["refit", "wanda_refit", "osscar", "osscar_search"])
def test_the_dense_target_reduces_the_error_against_the_dense_outputs(method: str) -> None:
    """Earlier pruned blocks have changed the inputs, while the target stays the same."""
    dense_TI = make_inputs(9, 80, 14)
    own = make_problem(dense_TI + 0.5 * make_inputs(10, 80, 14), 6)
    x_TI = dense_TI + 0.5 * make_inputs(10, 80, 14)
    y_TO = dense_TI @ own.weight_OI.T
    target_IO = dense_target(x_TI.T @ y_TO / 80, own.weight_OI, hessian_of(own), own.damping)
    errors = []
    for problem in (replace(own, target_IO=target_IO), own):
        pruned = METHODS[method](problem, 9)
        errors.append(float((y_TO - x_TI[:, pruned.kept_I] @ pruned.weight_OK.T).square().sum()))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("method", ["refit", "wanda_refit", "osscar", "osscar_search"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_redundant_inputs_of_low_rank_lose_nothing(method: str, damping: float) -> None:
    factors_TR = make_inputs(11, 50, 4)
    x_TI = factors_TR @ torch.randn(4, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pruned = METHODS[method](make_problem(x_TI, 5, damping=damping), 8)
    assert bool(pruned.weight_OK.isfinite().all())
    assert pruned.detail["relative_output_error"] < (1e-4 if damping else 1e-10)
    assert (pruned.detail["damping"] == damping) == (damping > 0)


@pytest.mark.parametrize("method", sorted(NEEDS_DATA))
def test_dead_inputs_are_removed_first_at_no_cost(method: str) -> None:
    x_TI = make_inputs(12, 50, 12)
    x_TI[:, [1, 6, 7]] = 0
    problem = make_problem(x_TI, 5)
    if method == "refit":
        problem.weight_OI[:, [1, 6, 7]] *= 1e-3
    pruned = METHODS[method](problem, 9)
    assert pruned.kept_U.tolist() == [0, 2, 3, 4, 5, 8, 9, 10, 11]
    torch.testing.assert_close(pruned.weight_OK, problem.weight_OI[:, pruned.kept_I])
    assert pruned.detail["relative_output_error"] == pytest.approx(0, abs=1e-12)
    assert pruned.detail.get("num_dead_inputs", 3) == 3


@pytest.mark.parametrize("method", sorted(NEEDS_DATA))
def test_zero_inputs_fall_back_to_magnitude_and_the_detail_says_so(method: str) -> None:
    problem = make_problem(torch.zeros(8, 10, dtype=torch.float64), 3, 2)
    pruned = METHODS[method](problem, 3)
    expected = METHODS["magnitude"](problem, 3)
    assert pruned.kept_U.tolist() == expected.kept_U.tolist()
    assert torch.equal(pruned.weight_OK, expected.weight_OK)
    assert "magnitude" in pruned.detail["fallback"]
    assert "fallback" not in expected.detail


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_loss_curve_is_the_error_of_a_refit_on_the_groups_that_the_method_keeps(
    method: str, group_size: int
) -> None:
    problem = make_problem(make_inputs(11, 300, 24), 7, group_size)
    sizes = [num for num in (24, 20, 15, 9, 6, 3, 2, 1) if num <= problem.num_groups]
    curve = loss_curve(problem, sizes, METHODS[method])
    weight_OI = problem.weight_OI
    hessian_II = hessian_of(problem) + ridge_of(problem) * torch.eye(24, dtype=torch.float64)
    # Methods that search have the curve of greedy removal, which takes single columns in fewer batches than `osscar`.
    searches = METHODS[method].scores is None
    tolerance = 0.25 if searches and group_size == 1 else 1e-9
    for size, loss in zip(sizes, curve, strict=True):
        kept = METHODS["osscar" if searches else method](problem, size).kept_I
        refitted_KO = torch.linalg.solve(hessian_II[kept][:, kept], hessian_II[kept] @ weight_OI.T)
        error_IO = weight_OI.T.clone()
        error_IO[kept] -= refitted_KO
        expected = float((error_IO * (hessian_II @ error_IO)).sum())
        assert loss == pytest.approx(expected, rel=tolerance, abs=1e-9)


def test_the_loss_curve_of_inputs_that_are_all_zero_is_zero() -> None:
    problem = make_problem(torch.zeros(5, 6, dtype=torch.float64), 3)
    assert loss_curve(problem, [6, 2], METHODS["wanda_refit"]) == [0.0, 0.0]


def test_a_cut_mlp_equals_a_masked_mlp() -> None:
    torch.manual_seed(2)
    hidden, width = 5, 7
    block = {
        "mlp.gate_proj.weight": torch.randn(width, hidden),
        "mlp.gate_proj.bias": torch.randn(width),
        "mlp.up_proj.weight": torch.randn(width, hidden),
        "mlp.up_proj.bias": torch.randn(width),
        "mlp.down_proj.weight": torch.randn(hidden, width),
        "mlp.down_proj.bias": torch.randn(hidden),
        "input_layernorm.weight": torch.randn(hidden),
    }
    before = {name: tensor.clone() for name, tensor in block.items()}
    kept_K = torch.tensor([0, 3, 6])
    producers = {"mlp.gate_proj": (1,), "mlp.up_proj": (1,)}
    cut = PruneRole("mlp", producers, "mlp.down_proj", width, 1).cut(block, kept_K)

    def forward(tensors: dict[str, Tensor], mask: Tensor) -> Tensor:
        inputs_TH = torch.linspace(-1, 1, 3 * hidden).reshape(3, hidden)
        gate = inputs_TH @ tensors["mlp.gate_proj.weight"].T + tensors["mlp.gate_proj.bias"]
        up = inputs_TH @ tensors["mlp.up_proj.weight"].T + tensors["mlp.up_proj.bias"]
        neurons = torch.nn.functional.silu(gate) * up * mask
        return neurons @ tensors["mlp.down_proj.weight"].T + tensors["mlp.down_proj.bias"]

    mask = torch.zeros(width)
    mask[kept_K] = 1
    torch.testing.assert_close(forward(cut, torch.ones(3)), forward(block, mask))
    assert cut["input_layernorm.weight"] is block["input_layernorm.weight"]
    assert all(torch.equal(block[name], tensor) for name, tensor in before.items())


HIDDEN, HEAD_DIM = 7, 4
KINDS = ("weight", "bias")


def attend(tensors: dict[str, Tensor], num_q_per_kv: int, kept_heads: list[int] | None = None) -> Tensor:
    """Compute causal attention with normed queries and keys by head; KV groups outside `kept_heads` are masked."""
    inputs_TH = torch.linspace(-1, 1, 5 * HIDDEN).sin().reshape(5, HIDDEN)

    def project(name: str) -> Tensor:
        rows = inputs_TH @ tensors[f"self_attn.{name}.weight"].T + tensors[f"self_attn.{name}.bias"]
        return rows.reshape(5, -1, HEAD_DIM)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / x.square().mean(dim=-1, keepdim=True).sqrt() * tensors[f"self_attn.{name}.weight"]

    query, key, value = norm(project("q_proj"), "q_norm"), norm(project("k_proj"), "k_norm"), project("v_proj")
    heads = []
    for head in range(query.shape[1]):
        group = head // num_q_per_kv
        scores = (query[:, head] @ key[:, group].T).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        kept = kept_heads is None or group in kept_heads
        heads.append(scores.softmax(dim=-1) @ value[:, group] * float(kept))
    return torch.cat(heads, dim=1) @ tensors["self_attn.o_proj.weight"].T + tensors["self_attn.o_proj.bias"]


@pytest.mark.parametrize(("num_kv", "num_q_per_kv", "kept"), [(3, 2, [0, 2]), (4, 3, [3]), (5, 1, [1, 2, 4])])
def test_a_cut_attention_equals_a_masked_attention(num_kv: int, num_q_per_kv: int, kept: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    queries, keys = num_kv * num_q_per_kv * HEAD_DIM, num_kv * HEAD_DIM
    shapes: dict[str, Any] = {
        "self_attn.q_proj": (queries, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, queries),
    }
    block = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    block |= {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}
    norms = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    block |= {name: torch.randn(HEAD_DIM, generator=generator) for name in norms}
    before = {name: tensor.clone() for name, tensor in block.items()}
    columns = num_q_per_kv * HEAD_DIM
    producers = {"self_attn.q_proj": (columns,), "self_attn.k_proj": (HEAD_DIM,), "self_attn.v_proj": (HEAD_DIM,)}
    role = PruneRole("attention", producers, "self_attn.o_proj", num_kv, columns)
    cut = role.cut(block, torch.tensor(kept))
    fused = {f"qkv.{kind}": torch.cat([block[f"self_attn.{name}_proj.{kind}"] for name in "qkv"]) for kind in KINDS}
    fused["self_attn.o_proj.weight"] = block["self_attn.o_proj.weight"]
    fused_role = PruneRole("attention", {"qkv": (columns, HEAD_DIM, HEAD_DIM)}, "self_attn.o_proj", num_kv, columns)
    for kind in KINDS:
        expected = torch.cat([cut[f"self_attn.{name}_proj.{kind}"] for name in "qkv"])
        assert torch.equal(fused_role.cut(fused, torch.tensor(kept))[f"qkv.{kind}"], expected)
    assert cut["self_attn.q_proj.weight"].shape == (len(kept) * num_q_per_kv * HEAD_DIM, HIDDEN)
    torch.testing.assert_close(attend(cut, num_q_per_kv), attend(block, num_q_per_kv, kept))
    assert cut.keys() == block.keys()
    assert all(cut[name].is_contiguous() for name in cut)
    assert all(torch.equal(block[name], tensor) for name, tensor in before.items())
