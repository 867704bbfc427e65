"""The scores of labels in validation."""

from types import SimpleNamespace

import pytest
import torch

from slimserve.distill.validation import label_probability


def test_label_probabilities_are_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(64, 10, bias=False), torch.randn(4, 64) * 4
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = label_probability(model, (7, 2), hidden)
    expected = (hidden.double() @ head.weight.detach().double()[[7, 2]].T).softmax(-1)[:, 0]
    assert found.double().tolist() == pytest.approx(expected.tolist(), abs=1e-5)
