"""Text: how well a model predicts held-out text of the other workloads, and how far that is from a reference model.

Half of the documents are member histories with their true labels, half problems with their worked derivations, all of
the `quality` split, which no recipe looks at. A server gives, per token, its log-probability and those of the most
likely tokens at that place; vLLM lists at most 20 of them, so the whole distribution is not to be had.

`coarse_kl` is therefore a lower bound of the Kullback-Leibler divergence: it compares the tokens that both sides list,
and everything else as one bucket. Merging outcomes never raises a divergence (the data-processing inequality, Cover and
Thomas, Elements of Information Theory, section 2.8), and it is exact where all mass lies on listed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slimserve.workloads.interface import Prompt, ScoringPrompt, Workload
from slimserve.workloads.metrics import MetricData
from slimserve.workloads.reasoning import Reasoning
from slimserve.workloads.recommendation import Recommendation

_PROMPTS_DRAWN = 400
_BLOCK = 64
"""Tokens that are resampled together: neighbours are alike."""
_LEAST_MASS = 1e-6
"""Log-probabilities come rounded, so a bucket's mass may vanish; a larger one only lowers the bound."""


@dataclass(frozen=True)
class TextReading:
    """What a model says of one document: the tokens from the second one on."""

    tokens: tuple[int, ...]
    """All of the document, the first one included."""
    logprobs: tuple[float, ...]
    """Of each token after the first, in nats."""
    top: tuple[dict[int, float], ...]
    """At each of these places, log-probability by token of the most likely ones."""


def make_documents(num_documents: int, num_characters: int, seed: int = 0) -> list[str]:
    """Texts of at least `num_characters`, of recommendation and reasoning in turn; fewer where the data runs out."""
    workloads: tuple[Workload, Workload] = (Recommendation(), Reasoning())
    streams = []
    for workload in workloads:
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


def text_figures(
    readings: Sequence[TextReading], reference: Sequence[TextReading] | None = None
) -> dict[str, MetricData]:
    """`perplexity`; and, to a reference's readings of the same tokens, `kl_nats` per token and `top1_agreement`."""
    blocks = [
        (number, range(begin, min(begin + _BLOCK, len(reading.logprobs))))
        for number, reading in enumerate(readings)
        for begin in range(0, len(reading.logprobs), _BLOCK)
    ]
    counts = [len(places) for _, places in blocks]

    def mean_of(values: Sequence[Sequence[float]], is_exponent: bool = False) -> MetricData:
        sums = [math.fsum(values[number][place] for place in places) for number, places in blocks]

        def statistic(rows: list[int]) -> float:
            mean = math.fsum(sums[row] for row in rows) / sum(counts[row] for row in rows)
            return math.exp(mean) if is_exponent else mean

        return MetricData(statistic, range(len(blocks)), sum(counts))

    figures = {"perplexity": mean_of([[-value for value in reading.logprobs] for reading in readings], True)}
    if reference is not None:
        pairs = list(zip(reference, readings, strict=True))
        figures["kl_nats"] = mean_of(
            [[coarse_kl(*tops) for tops in zip(ours.top, theirs.top, strict=True)] for ours, theirs in pairs]
        )
        figures["top1_agreement"] = mean_of(
            [
                [float(_likeliest(a) == _likeliest(b)) for a, b in zip(ours.top, theirs.top, strict=True)]
                for ours, theirs in pairs
            ]
        )
    return figures


def coarse_kl(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """KL(reference || other) in nats over the tokens that both list and one bucket of all others: a lower bound."""
    common = reference.keys() & other.keys()
    shares = [(math.exp(reference[token]), math.exp(other[token])) for token in common]
    shares.append((_rest(p for p, _ in shares), _rest(q for _, q in shares)))
    # Rounded log-probabilities may make shares sum to a little more than 1 and the divergence a little negative.
    return max(0.0, math.fsum(p * math.log(p / max(q, _LEAST_MASS)) for p, q in shares if p > _LEAST_MASS))


def _rest(shares: Iterable[float]) -> float:
    return max(0.0, 1 - math.fsum(shares))


def _likeliest(top: Mapping[int, float]) -> int:
    return max(top, key=lambda token: (top[token], -token))


def _solved(prompt: Prompt) -> str:
    """A prompt with its true answer, without the worked examples that all reasoning prompts begin with."""
    if isinstance(prompt, ScoringPrompt):
        return prompt.solved
    return f"{prompt.messages[-1]['content']}\n{prompt.solution}\n\n"
