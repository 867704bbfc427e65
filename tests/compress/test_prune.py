import itertools

import pytest
import torch

from compress.families import FAMILIES
from compress.prune import choose_kept, cut_mlp, kept_width, magnitude, peak_magnitude
from contracts.errors import UserError

LLAMA = FAMILIES["llama"]


def test_magnitude_is_what_removal_costs_on_white_inputs() -> None:
    torch.manual_seed(0)
    consumer_OI = torch.randn(5, 9)
    inputs_TI = torch.linalg.qr(torch.randn(200, 9, dtype=torch.float64)).Q
    for neuron, score in enumerate(magnitude(consumer_OI)):
        without = consumer_OI.double().clone()
        without[:, neuron] = 0
        lost = inputs_TI @ (consumer_OI.double() - without).T
        assert float(score) == pytest.approx(float(lost.square().sum()) / 2)


def test_peak_magnitude_keeps_the_one_large_value_that_the_norm_overlooks() -> None:
    spiky_OI = torch.tensor([[0.0, 0.6], [0.9, -0.7], [0.0, 0.6]])
    assert torch.allclose(peak_magnitude(spiky_OI), torch.tensor([0.9, 0.7], dtype=torch.float64))
    assert choose_kept(peak_magnitude(spiky_OI), 1).tolist() == [0]
    assert choose_kept(magnitude(spiky_OI), 1).tolist() == [1]


def test_the_choice_is_the_best_subset() -> None:
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
def test_a_cut_that_removes_nothing_is_refused(width: int, remove_frac: float, multiple: int) -> None:
    with pytest.raises(UserError, match="removes nothing"):
        kept_width(width, remove_frac, multiple)


def test_a_cut_mlp_computes_what_a_masked_one_does() -> None:
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
    cut = cut_mlp(block, LLAMA, kept_K)

    def forward(tensors: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
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
