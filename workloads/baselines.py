"""Baselines that use no language model: what a task gives away without any understanding.

If one of them does as well as a model, the model's score on the task says little about its skill.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from slimserve.workloads.interface import Answer, Interaction, ScoringPrompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NUM_FACTORS = 8
_NUM_FOLDED = 16
"""Number of factors of `folded_factorization`."""
_FOLD_PENALTY = 300.0
"""Ridge penalty of a user's factors, in ratings of an item with factors of standard deviation 1.

Of 3 to 3,000, this has the highest pooled AUC on users of MovieLens' `load` split, after histories of 8 and of 24.
"""
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


def history_baselines(prompts: Sequence[ScoringPrompt], interactions: Sequence[Interaction]) -> dict[str, list[Answer]]:
    """Return the scores of `ranking_baselines` by the ids of items, and `matrix_factorization` from the histories.

    `interactions` are those of the training users.
    """
    lists = [replace(one, items=one.item_ids) for one in prompts]
    answers = ranking_baselines(lists, [(one.item, one.is_positive) for one in interactions], [])
    if interactions:
        answers["matrix_factorization"] = folded_factorization(lists, interactions)
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

    values = [float(positive) - rate for _, positive in training]
    places = ([users[group] for group in groups], [items[item] for item, _ in training])
    left, strengths, right = _decompose(values, places, (len(users), len(items)), rank)
    scores = np.clip(left * strengths @ right + rate, 0.0, 1.0)
    return [
        tuple(
            float(scores[users[prompt.group], items[item]]) if prompt.group in users and item in items else rate
            for item in prompt.items
        )
        for prompt in prompts
    ]


def folded_factorization(prompts: Sequence[ScoringPrompt], interactions: Sequence[Interaction]) -> list[Answer]:
    """Return scores of users that no training data has, from the items of their own histories.

    A user's factors are the ridge regression of what the history's labels deviate from item popularity and the user's
    share of positives on the factors of its items. A score is the mean of popularity and share, plus the product of
    both factors.
    """
    import numpy as np

    ids = list(dict.fromkeys(one.item for one in interactions))
    place = {item: number for number, item in enumerate(ids)}
    rate = sum(one.is_positive for one in interactions) / max(len(interactions), 1)
    counts = np.zeros((len(ids), 2))
    for one in interactions:
        counts[place[one.item]] += one.is_positive, 1
    popularity = (counts[:, 0] + _SMOOTHING * rate) / (counts[:, 1] + _SMOOTHING)
    factors = item_factors(interactions, ids, _NUM_FOLDED)
    factors = factors / max(float(np.std(factors)), 1e-9)
    answers: list[Answer] = []
    for prompt in prompts:
        share = _history_share(prompt, rate)
        labelled = [
            (place[item], line) for item, line in zip(prompt.line_ids, prompt.lines, strict=True) if item in place
        ]
        known = np.array([number for number, _ in labelled], dtype=int)
        liked = np.array([line.endswith(f"{prompt.labels[0]}\n") for _, line in labelled], dtype=float)
        deviations = liked - (popularity[known] + share) / 2
        gram = factors[known].T @ factors[known] + _FOLD_PENALTY * np.eye(_NUM_FOLDED)
        user = np.linalg.solve(gram, factors[known].T @ deviations)
        scores = [
            (popularity[place[item]] + share) / 2 + float(user @ factors[place[item]])
            if item in place
            else (rate + share) / 2
            for item in prompt.item_ids
        ]
        answers.append(tuple(float(np.clip(score, 0.0, 1.0)) for score in scores))
    return answers


def item_factors(interactions: Sequence[Interaction], ids: Sequence[str], rank: int) -> NDArray[np.float64]:
    """Return the factors of items in a truncated singular value decomposition of users by items, `[items, rank]`.

    A cell is 1 for a positive and 0 for another grade, minus the overall rate; pairs without a grade are 0. The factors
    are right singular vectors times their strengths, strongest first. Factors that the data does not have are 0.
    """
    import numpy as np

    place = {item: number for number, item in enumerate(ids)}
    users = {group: number for number, group in enumerate(dict.fromkeys(one.group for one in interactions))}
    rate = sum(one.is_positive for one in interactions) / max(len(interactions), 1)
    values = [float(one.is_positive) - rate for one in interactions]
    places = ([users[one.group] for one in interactions], [place[one.item] for one in interactions])
    factors = np.zeros((len(ids), rank))
    known = min(rank, len(users) - 1, len(ids) - 1)
    if known > 0:
        _, strengths, right = _decompose(values, places, (len(users), len(ids)), known)
        order = np.argsort(-strengths)
        factors[:, :known] = (right.T * strengths)[:, order]
    return factors


def _decompose(
    values: Sequence[float], places: tuple[Sequence[int], Sequence[int]], shape: tuple[int, int], rank: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return left vectors, strengths and right vectors of a sparse matrix; the same for the same matrix."""
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.linalg import svds

    start = np.random.default_rng(0).standard_normal(min(shape))  # svds would draw another one each time
    left, strengths, right = svds(coo_array((values, places), shape=shape).tocsr(), k=rank, v0=start)
    return left, strengths, right


def _history_share(prompt: ScoringPrompt, rate: float) -> float:
    """Return the first label's share of the labels that end the lines of a query."""
    lines = prompt.query.split("\n")
    counts = [sum(line.endswith(label) for line in lines) for label in prompt.labels[:2]]
    return (counts[0] + _SMOOTHING * rate) / (sum(counts) + _SMOOTHING)
