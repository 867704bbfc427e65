import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from slimserve.workloads.interface import TextReading
from slimserve.workloads.text import coarse_kl, make_documents, text_metrics


def listed(shares: NDArray[np.float64], count: int) -> dict[int, float]:
    """Return the log-probabilities of the `count` most likely tokens, as a server lists them."""
    best = np.argsort(-shares)[:count]
    return {int(token): float(np.log(shares[token])) for token in best}


def reading(tops: Sequence[dict[int, float]], tokens: Sequence[int]) -> TextReading:
    return TextReading((0, *tokens), tuple(top[token] for top, token in zip(tops, tokens, strict=True)), tuple(tops))


@pytest.mark.parametrize("seed", range(20))
def test_the_divergence_over_listed_tokens_is_a_lower_bound(seed: int) -> None:
    draw = np.random.default_rng(seed)
    p, q = draw.dirichlet(np.full(300, 0.05)), draw.dirichlet(np.full(300, 0.05))
    p, q = (0.97 * side + 0.03 / 300 for side in (p, 0.7 * p + 0.3 * q))
    full = float(np.sum(p * np.log(p / q)))
    bound = coarse_kl(listed(p, 20), listed(q, 20))
    assert 0 <= bound <= full
    assert coarse_kl(listed(p, 300), listed(q, 300)) == pytest.approx(full)


def test_the_divergence_is_exact_where_all_mass_is_listed() -> None:
    p, q = (
        {1: math.log(0.5), 2: math.log(0.25), 3: math.log(0.25)},
        {1: math.log(0.25), 2: math.log(0.25), 3: math.log(0.5)},
    )
    assert coarse_kl(p, q) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert coarse_kl(p, p) == 0


def test_lists_without_a_common_token_have_the_bound_zero() -> None:
    assert coarse_kl({1: math.log(0.9)}, {2: math.log(0.9)}) == 0


def test_text_metrics_equal_those_computed_by_hand() -> None:
    p = [{1: math.log(0.5), 2: math.log(0.5 - 1e-9)}] * 70
    q = [{1: math.log(0.2), 2: math.log(0.8)}] * 70
    tokens = [1] * 70
    results = text_metrics([reading(q, tokens)], [reading(p, tokens)])
    assert results["perplexity"].value == pytest.approx(1 / 0.2)
    assert results["kl_nats"].value == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8))
    assert results["top1_agreement"].value == 0
    assert results["perplexity"].n == 70
    assert len(results["perplexity"].groups) == 2
    assert set(text_metrics([reading(q, tokens)])) == {"perplexity", "top1_accuracy"}
    assert results["top1_accuracy"].value == 0


def test_documents_are_long_enough_distinct_and_alternate_in_kind() -> None:
    documents = make_documents(4, 600)
    assert len(set(documents)) == 4
    assert all(len(document) >= 600 for document in documents)
    assert ["<think>" in document for document in documents] == [False, True, False, True]
    assert make_documents(2, 600) == documents[:2]
