"""Baselines that use no language model: what a task gives away without any understanding.

If one of them does as well as a model, the model's score on the task says little about its skill.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from slimserve.workloads.interface import Answer, ScoringPrompt

_NUM_FACTORS = 8
_LEAST_KNOWN = 0.5
"""Fraction of users and items that must be known for a matrix factorization."""
_SMOOTHING = 2.0
"""Number of pseudo-counts of the overall rate, so that an item that was seen once is not certain."""


def ranking_baselines(
    prompts: Sequence[ScoringPrompt], training: Sequence[tuple[str, bool]], training_groups: Sequence[int]
) -> dict[str, list[Answer]]:
    """Return the scores of `history_share` and `item_popularity` for candidate lists.

    `history_share` gives every candidate the share of the first label among the labels in the query, so it cannot rank
    within a list. `item_popularity` gives a candidate the share of positives among its occurrences in `training`, pairs
    of an item and whether it was positive; unknown items get the overall rate. `popularity_and_history` is the mean of
    both. `matrix_factorization` is there if most users and items of the lists occur in `training`, whose pairs have the
    users `training_groups`.
    """
    rate = sum(positive for _, positive in training) / len(training) if training else 0.5
    counts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for item, positive in training:
        counts[item][0] += positive
        counts[item][1] += 1

    def popularity(item: str) -> float:
        positives, total = counts.get(item, (0.0, 0.0))
        return (positives + _SMOOTHING * rate) / (total + _SMOOTHING)

    answers: dict[str, list[Answer]] = {}
    shares = [_history_share(prompt, rate) for prompt in prompts]
    if len(set(shares)) > 1:
        answers["history_share"] = [(share,) * len(one.items) for share, one in zip(shares, prompts, strict=True)]
    if any(item in counts for prompt in prompts for item in prompt.items):
        popular = [tuple(map(popularity, prompt.items)) for prompt in prompts]
        answers["item_popularity"] = list(popular)
        if "history_share" in answers:
            answers["popularity_and_history"] = [
                tuple((score + share) / 2 for score in scores) for scores, share in zip(popular, shares, strict=True)
            ]
    if factors := _matrix_factorization(prompts, training, training_groups, rate):
        answers["matrix_factorization"] = factors
    return answers


def _matrix_factorization(
    prompts: Sequence[ScoringPrompt], training: Sequence[tuple[str, bool]], groups: Sequence[int], rate: float
) -> list[Answer]:
    """Return scores from a truncated singular value decomposition of users by items; none if too few repeat."""
    items = {item: number for number, item in enumerate(dict.fromkeys(item for item, _ in training))}
    users = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    pairs = [(prompt.group, item) for prompt in prompts for item in prompt.items]
    num_known = sum(group in users and item in items for group, item in pairs)
    # More factors would reproduce the unknown pairs, which are 0, instead of filling them in.
    rank = min(_NUM_FACTORS, len(users) // 4, len(items) // 4)
    if not pairs or num_known < _LEAST_KNOWN * len(pairs) or rank < 1:
        return []
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.linalg import svds

    values = [float(positive) - rate for _, positive in training]
    places = ([users[group] for group in groups], [items[item] for item, _ in training])
    left, strengths, right = svds(coo_array((values, places), shape=(len(users), len(items))).tocsr(), k=rank)
    scores = np.clip(left * strengths @ right + rate, 0.0, 1.0)
    return [
        tuple(
            float(scores[users[prompt.group], items[item]]) if prompt.group in users and item in items else rate
            for item in prompt.items
        )
        for prompt in prompts
    ]


def _history_share(prompt: ScoringPrompt, rate: float) -> float:
    """Return the first label's share of the labels that end the lines of a query."""
    lines = prompt.query.split("\n")
    counts = [sum(line.endswith(label) for line in lines) for label in prompt.labels[:2]]
    return (counts[0] + _SMOOTHING * rate) / (sum(counts) + _SMOOTHING)
