"""Text: how well a model predicts held-out text, and how far its predictions are from those of a reference model.

Documents come from the `quality` split of the built-in workloads in turn, which no recipe uses: user histories with
their true labels, and problems with their worked derivations. A server returns the log-probability of each token and
those of the most likely tokens at its position. vLLM lists at most 20 of them, so the full distribution is not
available.

`coarse_kl` is therefore a lower bound of the Kullback-Leibler divergence: it compares the tokens that both sides list,
and all others as one bucket. Merging outcomes never raises a divergence (the data-processing inequality, Cover and
Thomas, Elements of Information Theory, section 2.8). The bound is exact if the listed tokens have all the mass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slimserve.workloads import load_workload, workload_names
from slimserve.workloads.interface import ChatPrompt, MetricData, Prompt, ScoringPrompt, TextReading

_PROMPTS_DRAWN = 400
_BLOCK = 64
"""Number of neighbouring tokens that are resampled together, because they are alike."""
_LEAST_MASS = 1e-6
"""Smallest mass of the bucket of all other tokens in the second distribution, since rounded log-probabilities may leave
none; a larger one only lowers the bound."""


def make_documents(num_documents: int, num_characters: int, seed: int = 0) -> list[str]:
    """Return texts of at least `num_characters` from the workloads in turn; fewer if the data runs out."""
    streams = []
    for workload in map(load_workload, workload_names()):
        parts = [_solved(prompt) for prompt in workload.make_prompts("quality", _PROMPTS_DRAWN, seed)]
        documents, text = [], ""
        for part in parts:
            text += part
            if len(text) >= num_characters:
                documents.append(text)
                text = ""
        streams.append(documents)
    in_turn = [document for pair in zip(*streams, strict=False) for document in pair]
    return in_turn[:num_documents]


def text_metrics(
    readings: Sequence[TextReading], reference: Sequence[TextReading] | None = None, groups: Sequence[int] = ()
) -> dict[str, MetricData]:
    """Return `perplexity` and `top1_accuracy`, the share of tokens that the model held most likely.

    With a reference's readings also `kl_nats` per token and `top1_agreement` with it. `groups` are the groups of the
    texts; without them, blocks of 64 tokens are the independent samples.
    """
    blocks = [
        (number, range(begin, min(begin + _BLOCK, len(reading.logprobs))))
        for number, reading in enumerate(readings)
        for begin in range(0, len(reading.logprobs), _BLOCK)
    ]
    counts = [len(places) for _, places in blocks]
    group_of = [groups[number] for number, _ in blocks] if groups else range(len(blocks))

    def mean_of(values: Sequence[Sequence[float]], is_exponent: bool = False, **facts: Any) -> MetricData:
        sums = [math.fsum(values[number][place] for place in places) for number, places in blocks]

        def statistic(rows: list[int]) -> float:
            mean = math.fsum(sums[row] for row in rows) / sum(counts[row] for row in rows)
            return math.exp(mean) if is_exponent else mean

        return MetricData(statistic, group_of, sum(counts), **facts)

    losses = [[-value for value in reading.logprobs] for reading in readings]
    hits = [
        [float(_likeliest(top) == token) for token, top in zip(reading.tokens[1:], reading.top, strict=True)]
        for reading in readings
    ]
    results = {
        "perplexity": mean_of(losses, True, ceiling=1.0, higher_is_better=False),
        "top1_accuracy": mean_of(hits, floor=0.0, ceiling=1.0),
    }
    if reference is not None:
        pairs = list(zip(reference, readings, strict=True))
        results["kl_nats"] = mean_of(
            [[coarse_kl(*tops) for tops in zip(ours.top, theirs.top, strict=True)] for ours, theirs in pairs],
            ceiling=0.0,
            higher_is_better=False,
        )
        results["top1_agreement"] = mean_of(
            [
                [float(_likeliest(a) == _likeliest(b)) for a, b in zip(ours.top, theirs.top, strict=True)]
                for ours, theirs in pairs
            ],
            ceiling=1.0,
        )
    return results


def coarse_kl(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return KL(reference || other) in nats over the tokens that both list and one bucket of all others.

    The arguments map tokens to log-probabilities in nats. The result is at most the divergence over the full
    vocabulary, and equal to it if the tokens that both list have all the mass of both.
    """
    terms = []
    rest_p = rest_q = 1.0
    for token in reference.keys() & other.keys():
        p = math.exp(reference[token])
        if p > 0:
            terms.append(p * (reference[token] - other[token]))
        rest_p -= p
        rest_q -= math.exp(other[token])
    if rest_p > 0:
        terms.append(rest_p * math.log(rest_p / max(rest_q, _LEAST_MASS)))
    # Rounded log-probabilities may sum to slightly more than 1, which would make the divergence slightly negative.
    return max(0.0, math.fsum(terms))


def _likeliest(top: Mapping[int, float]) -> int:
    return max(top, key=lambda token: (top[token], -token))


def _solved(prompt: Prompt) -> str:
    """Return a prompt with its true answer, without the messages before the last one."""
    if not isinstance(prompt, ChatPrompt):
        return prompt.solved if isinstance(prompt, ScoringPrompt) else f"{prompt.solved}\n\n"
    return f"{prompt.messages[-1]['content']}\n{prompt.solution}\n\n"
