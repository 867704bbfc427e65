"""Rankers on MovieLens without a server: the recipe of their training, and their scores in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from slimserve.core.hardware import probe_hardware
from slimserve.core.tokenizer import load_tokenizer
from slimserve.distill.models import load_model
from slimserve.distill.parallel import current_device
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.sections import label_example, label_token
from slimserve.distill.validation import label_probability, label_scores
from slimserve.workloads.interface import ScoringPrompt
from slimserve.workloads.item_tokens import item_tokens_of

MAX_TOKENS = 1024
_MICRO_TOKENS = 2048
_LONGEST_SEQUENCE, _PASS_TOKENS = 8192, 4096

Result = TypeVar("Result")
Scores = list[list[float]]
"""A list of scores for each prompt."""
LabelScores = list[tuple[list[bool], list[float]]]
"""The truths and the scores of each user's labels."""


def ranker_recipe(
    num_steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float,
    loss: Mapping[str, float],
    teachers: Sequence[Mapping[str, Any]] = (),
    num_validation: int = 0,
) -> DistillRecipe:
    """Return the recipe of a ranker that learns every label of the users' items; validation chooses nothing."""
    return DistillRecipe.model_validate(
        {
            "data": {
                "source": "recommendation",
                "num_examples": num_steps * batch_size,
                "num_validation": num_validation,
                "max_tokens": MAX_TOKENS,
                "seed": seed,
            },
            "supervision": {"sections": "answer"},
            "loss": loss,
            "training": {
                "learning_rate": learning_rate,
                "batch_size": batch_size,
                "micro_batch_tokens": _MICRO_TOKENS,
                "validate_every": 1000,
                "save_every_s": 120,
                "keep": "last",
            },
            "stages": [{"steps": num_steps}],
            "teachers": teachers,
        },
    )


def sequence_scores(directory: Path, prompts: Sequence[ScoringPrompt]) -> LabelScores:
    """Return the truths and scores of each user's labels after the skipped ones, from one pass through the items.

    A label is predicted from all labels before it, also those of candidates.
    """
    as_read = cast("Callable[[ScoringPrompt], ScoringPrompt]", item_tokens_of(directory))

    def scores(model: Any, tokenizer: Any, labels: tuple[int, ...]) -> LabelScores:
        examples = [
            label_example(tokenizer, as_read(one), str(number), _LONGEST_SEQUENCE) for number, one in enumerate(prompts)
        ]
        return cast("LabelScores", label_scores(model, examples, labels, _PASS_TOKENS))

    return _with_model(directory, prompts, scores)


def list_scores(directory: Path, prompts: Sequence[ScoringPrompt]) -> Scores:
    """Return the score of each candidate after its user's history, which is computed once for a list.

    Candidates do not see each other, as on a server. Within a sequence of labels, a label depends on those before it:
    of a user with a given number of "yes", the next label is more often the other one, and a model that uses the
    user's share of "yes" then ranks against the truth.
    """
    as_read = cast("Callable[[ScoringPrompt], ScoringPrompt]", item_tokens_of(directory))

    def scores(model: Any, tokenizer: Any, labels: tuple[int, ...]) -> Scores:
        return [_scores_of_list(model, tokenizer, labels, as_read(prompt)) for prompt in prompts]

    return _with_model(directory, prompts, scores)


def _scores_of_list(model: Any, tokenizer: Any, labels: tuple[int, ...], prompt: ScoringPrompt) -> list[float]:
    device, decoder = next(model.parameters()).device, model.get_decoder()
    history = tokenizer(prompt.query)["input_ids"]
    rows = [tokenizer(item, add_special_tokens=False)["input_ids"] for item in prompt.items]
    cache = decoder(torch.tensor([history], device=device), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows))
    longest = max(map(len, rows))
    # Padding is on the right, where causal attention never looks.
    tokens_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    states = decoder(tokens_BT, past_key_values=cache).last_hidden_state
    last_BD = states[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
    return cast("list[float]", label_probability(model, labels, last_BD).tolist())


def _with_model(
    directory: Path, prompts: Sequence[ScoringPrompt], scores: Callable[[Any, Any, tuple[int, ...]], Result]
) -> Result:
    """Return what `scores` returns for the loaded model, its tokenizer and its tokens of the labels."""
    tokenizer, device = load_tokenizer(directory), current_device()
    labels = tuple(label_token(tokenizer, label) for label in prompts[0].labels)
    model = load_model(directory, torch.float32).to(device).eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=probe_hardware().has_bf16_products):
        return scores(model, tokenizer, labels)
