"""The prompts of a load suite in their order, which is the same for every server with the same options and seed."""

from __future__ import annotations

import random
from pathlib import Path

from slimserve.core.errors import UserError
from slimserve.loadtest.settings import SuiteOptions
from slimserve.workloads import load_suite_names, load_workload, workload_names
from slimserve.workloads.interface import Prompt
from slimserve.workloads.item_tokens import item_tokens_of

MIXED = "mixed"
"""Suite that mixes the requests of the first two built-in workloads."""
MAX_PROMPTS = 2000
"""Number of prompts after which a closed loop repeats them."""


def suite_names() -> list[str]:
    """Return the names of the built-in suites; any workload argument is a suite as well."""
    return [*load_suite_names(), MIXED]


def suite_name(suite: str) -> str:
    """Return the name of a suite for files and titles: its workload's name."""
    return suite if suite == MIXED else load_workload(suite).name


def make_prompts(suite: str, options: SuiteOptions, num_prompts: int) -> list[tuple[str, Prompt]]:
    """Return at most `num_prompts` prompts, each with the name of the workload that evaluates its answer.

    They start at number `options.first_prompt` in the order of `options.prompt_seed` and wrap around at its end. Items
    in the catalogue of `options.item_tokens` are item tokens. Raises UserError for an unknown suite and for data that
    yields no prompt.
    """
    first = options.first_prompt
    known = _in_order(suite, options, first + num_prompts)
    if not known:
        raise UserError("workload", suite, "has no prompt for load", "give data with more rows, or shorter histories")
    if len(known) < first + num_prompts:
        first %= len(known)
        known = [*known[first:], *known[:first]]
        first = 0
    as_read = item_tokens_of(Path(options.item_tokens) if options.item_tokens else None)
    return [(name, as_read(prompt)) for name, prompt in known[first : first + num_prompts]]


def _in_order(suite: str, options: SuiteOptions, num_prompts: int) -> list[tuple[str, Prompt]]:
    if suite != MIXED:
        workload = load_workload(suite)
        return [(workload.name, prompt) for prompt in workload.load_prompts(options, num_prompts)]
    one, other = workload_names()[:2]
    numbers = random.Random(f"mixed {options.prompt_seed}")
    kinds = [one if numbers.random() < options.share else other for _ in range(num_prompts)]
    left = {kind: iter(load_workload(kind).load_prompts(options, kinds.count(kind))) for kind in set(kinds)}
    drawn = ((kind, next(left[kind], None)) for kind in kinds)
    return [(kind, prompt) for kind, prompt in drawn if prompt is not None]
