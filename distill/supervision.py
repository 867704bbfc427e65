"""What of a sequence is learnt: the sections that count, and the part of it that is read at all.

Two knobs, kept apart. Sections choose targets: both models still read every token, so a mask saves no time but the
output layer's. The lead span removes tokens from the forward pass, and with them time, memory and FLOPs ("Distilling
the Essence", arXiv 2512.21002).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from slimserve.core.errors import UserError
from slimserve.distill.sections import Example, Section

Window = Literal["left", "middle", "right"]

_NAMES = {"prompt": Section.PROMPT, "cot": Section.COT, "answer": Section.ANSWER}


@dataclass(frozen=True)
class Supervised:
    """A sequence as both models read it."""

    name: str
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    """Places of the tokens that are to be predicted, ascending; never the first, which nothing comes before."""


@dataclass(frozen=True)
class Supervision:
    """Sections that count, and the share of each sequence that is read."""

    sections: frozenset[Section] = frozenset(Section)
    lead_span: float = 1.0
    window: Window = "left"

    def apply(self, example: Example) -> Supervised:
        """The example's window, and its targets there; a section is what the window leaves of it."""
        begin, end = window_of(len(example.tokens), self.lead_span, self.window)
        targets = tuple(place for place in range(1, end - begin) if example.sections[begin + place] in self.sections)
        return Supervised(example.name, example.tokens[begin:end], targets)

    def apply_all(self, examples: Sequence[Example]) -> list[Supervised]:
        """Those examples that have a target left; UserError where none has."""
        found = [supervised for example in examples if (supervised := self.apply(example)).targets]
        if not found:
            raise UserError(
                "supervision",
                f"{sections_text(self.sections)} of the {self.window} {self.lead_span:.0%}",
                f"leaves no token to learn in any of {len(examples)} examples",
                "choose more sections or a larger lead_span",
            )
        return found


def window_of(num_tokens: int, lead_span: float, window: Window) -> tuple[int, int]:
    """First and one past the last token of a window of max(1, floor(num_tokens × lead_span)) tokens."""
    kept = max(1, int(num_tokens * lead_span))
    begin = {"left": 0, "middle": (num_tokens - kept) // 2, "right": num_tokens - kept}[window]
    return begin, begin + kept


def parse_sections(text: str) -> frozenset[Section]:
    """Sections from a text such as `cot+answer`, or `all`."""
    if text.strip() == "all":
        return frozenset(Section)
    names = [name.strip() for name in text.split("+")]
    unknown = [name for name in names if name not in _NAMES]
    if unknown or len(set(names)) < len(names):
        raise UserError("sections", text, "names no sections", f"join some of {', '.join(_NAMES)} by +, or write all")
    return frozenset(_NAMES[name] for name in names)


def sections_text(sections: frozenset[Section]) -> str:
    """As `parse_sections` reads it."""
    return "+".join(name for name, section in _NAMES.items() if section in sections)


def check_lead_span(lead_span: float, window: str) -> None:
    """UserError unless the share is in (0, 1] and the window is known."""
    if not 0 < lead_span <= 1:
        raise UserError("lead_span", lead_span, "is no share of a sequence", "write a number above 0 and up to 1")
    if window not in get_args(Window):
        raise UserError("window", window, "is unknown", f"choose from {', '.join(get_args(Window))}")
