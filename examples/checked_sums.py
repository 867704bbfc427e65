"""A reasoning workload with long chains of thought: sums and shopping, each derived and then checked in another way.

Prompts are short. The first half of a chain derives the result digit by digit. The second half confirms it from the
other end, as reasoning models do, so half of a sequence already holds the answer. Chains have about 160 to 320 tokens.

    slimserve distill --student smollm2-135m-instruct --workload examples/checked_sums.py …
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from slimserve.workloads.interface import ChatPrompt, Split, split_of
from slimserve.workloads.reasoning import Reasoning, last_number

_GOODS = (
    "apples",
    "books",
    "candles",
    "cups",
    "lamps",
    "pens",
    "plates",
    "ropes",
    "shirts",
    "spoons",
    "stamps",
    "toys",
)
_NAMES = ("Ann", "Ben", "Eve", "Ida", "Leo", "Max", "Mia", "Tom")
_BILLS = (100, 200, 300, 400, 500)


@dataclass(frozen=True)
class CheckedSums(Reasoning):
    """Sums of two-digit numbers and purchases with change, in turn."""

    max_tokens: int = 480

    name: ClassVar[str] = "checked_sums"
    preset_prompts: ClassVar[Mapping[str, int]] = {"quick": 64, "full": 512}
    kinds: ClassVar[tuple[str, ...]] = ("sum", "purchase")

    def problems(self, kind: str, split: Split) -> Iterator[dict[str, Any]]:
        """Yield the distinct problems of a split; the same ones on every machine."""
        make = {"sum": _make_sum, "purchase": _make_purchase}[kind]
        seen = set()
        for number in itertools.count():
            problem = make(random.Random(f"{kind} {number}"))
            if problem["question"] not in seen and split_of(problem["question"]) == split:
                seen.add(problem["question"])
                yield problem

    def chain_of_thought(self, problem: Mapping[str, Any]) -> str:
        """Return the derivation and its check."""
        return str(problem["chain"])

    def is_correct(self, prompt: ChatPrompt, text: str) -> bool:
        """Tell whether the last number after the think tags is the answer."""
        return last_number(text) == float(prompt.answer)


def _make_sum(draw: random.Random) -> dict[str, Any]:
    """Return a sum whose partial results are all positive."""
    terms = [draw.randint(11, 99)]
    for _ in range(draw.randint(4, 5)):
        term, total = draw.randint(11, 99), sum(terms)
        terms.append(-term if term < total and draw.random() < 0.4 else term)
    expression = str(terms[0]) + "".join(f" {'-' if term < 0 else '+'} {abs(term)}" for term in terms[1:])
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(_add(total, term))
        total += term
    # The check adds the numbers from the last to the first, and subtracts at the end.
    added, taken = [term for term in reversed(terms) if term > 0], [-term for term in terms if term < 0]
    check, sum_added = [f"All that is added, from the last: {' + '.join(map(str, added))}."], added[0]
    for term in added[1:]:
        check.append(_add(sum_added, term))
        sum_added += term
    for term in taken:
        check.append(_add(sum_added, -term))
        sum_added -= term
    question = f"What is {expression}?"
    return _problem(question, steps, check, total)


def _make_purchase(draw: random.Random) -> dict[str, Any]:
    """Return a purchase of two kinds of goods that is paid with one bill."""
    first, second = draw.sample(_GOODS, 2)
    counts = [draw.randint(2, 6) for _ in range(2)]
    prices = [draw.randint(11, 39) for _ in range(2)]
    costs = [count * price for count, price in zip(counts, prices, strict=True)]
    cost = sum(costs)
    paid = next(bill for bill in _BILLS if bill > cost)
    change = paid - cost
    name = draw.choice(_NAMES)
    question = (
        f"{name} buys {counts[0]} {first} at {prices[0]} dollars each and {counts[1]} {second} at {prices[1]} dollars "
        f"each, and pays with {paid} dollars. How many dollars does {name} get back?"
    )
    steps = [f"The {first}: {_multiply(counts[0], prices[0])}", f"The {second}: {_multiply(counts[1], prices[1])}"]
    steps += [f"Together: {_add(*costs)}", f"Back: {_add(paid, -cost)}"]
    check = [f"The change and the {second}: {_add(change, costs[1])}"]
    check += [f"And the {first}: {_add(change + costs[1], costs[0])} That is the {paid} dollars that were paid."]
    return _problem(question, steps, check, change)


def _problem(question: str, steps: list[str], check: list[str], answer: int) -> dict[str, Any]:
    chain = " ".join([*steps, f"So the result is {answer}. Let me check it.", *check, f"So {answer} is right."])
    return {"question": question, "answer": str(answer), "chain": chain}


def _add(total: int, term: int) -> str:
    """Return the addition of a number of up to three digits, one digit at a time; a negative one is subtracted."""
    sign, digits = "-" if term < 0 else "+", str(abs(term))
    parts = [int(digit) * 10**power for power, digit in zip(range(len(digits))[::-1], digits, strict=True)]
    steps = []
    for part in filter(None, parts):
        after = total - part if term < 0 else total + part
        steps.append(f"{total} {sign} {part} = {after}")
        total = after
    return ", ".join(steps) + "."


def _multiply(count: int, price: int) -> str:
    """Return the product with a price of two digits, by tens and ones."""
    tens, ones = price // 10 * 10, price % 10
    if not ones:
        return f"{count} × {price} = {count * price}."
    return f"{count} × {tens} = {count * tens}, {count} × {ones} = {count * ones}, {_add(count * tens, count * ones)}"


WORKLOAD = CheckedSums()
