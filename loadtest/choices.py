"""Requests that ask for the probability of several continuations of a text, of any number of tokens each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimserve.workloads.interface import ChoicePrompt

CHOICE_PATH = "/v1/score"


def choice_body(prompt: ChoicePrompt) -> dict[str, Any]:
    """Return the body of `POST /v1/score` for one prompt: the choices are labels after a query without an item."""
    return {
        "query": prompt.query,
        "items": [""],
        "labels": prompt.choices,
        "label_scoring": "sequence",
        "apply_softmax": True,
        "return_logprobs": True,
    }


def choice_logprobs(answer: Mapping[str, Any]) -> list[float]:
    """Return the log-probabilities of the choices in nats; LookupError or TypeError if the answer has none."""
    return [float(value) for value in answer["logprobs"][0]]
