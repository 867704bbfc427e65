"""Supervision: the tokens of a sequence that are trained on, and the part of the sequence that is read.

Sections and the lead span are independent. Sections choose the targets: both models still read every token, so a mask
saves nothing but the output layer's work. The lead span removes tokens from the forward pass, and with them time,
memory and FLOPs ("Distilling the Essence", arXiv 2512.21002).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import field_validator

from slimserve.core.config import Settings, setting
from slimserve.core.errors import UserError
from slimserve.distill.sections import Example, Label, Section

Window = Literal["left", "middle", "right"]


@dataclass(frozen=True)
class SupervisedSequence:
    """A sequence as the student reads it, and the teacher too unless it has a prompt of its own."""

    name: str
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    """Positions of the tokens to predict, ascending; never 0, because nothing precedes the first token."""
    labels: tuple[Label, ...] = ()
    """Labels of a ranker; those that are targets are trained."""
    teacher_tokens: tuple[int, ...] = ()
    """Tokens that the teacher reads, if it has a prompt of its own; they end with the same reply."""

    @property
    def for_teacher(self) -> SupervisedSequence:
        """The sequence as the teacher reads it; its targets are the same tokens in the same order."""
        if not self.teacher_tokens:
            return self
        shift = len(self.teacher_tokens) - len(self.tokens)
        targets = tuple(target + shift for target in self.targets)
        return SupervisedSequence(self.name, self.teacher_tokens, targets)


class Supervision(Settings):
    """The supervised sections and the part of each sequence that is read."""

    sections: str = setting("all", "Sections to train on: all, or prompt, cot and answer joined by + (default: all).")
    lead_span: float = setting(1.0, "Fraction of each sequence that both models read (default: 1).", gt=0, le=1)
    window: Window = setting("left", "Part of each sequence that the lead span covers (default: left).")

    @field_validator("sections")
    @classmethod
    def _check_sections(cls, text: str) -> str:
        parse_sections(text)
        return text

    @property
    def section_set(self) -> frozenset[Section]:
        return parse_sections(self.sections)

    def apply(self, example: Example) -> SupervisedSequence:
        """Cut the example to its window and choose the targets there.

        If the teacher has a prompt of its own, only the reply has targets, and the window must be on the left.
        """
        begin, end = window_of(len(example.tokens), self.lead_span, self.window)
        chosen, teacher_prompt = self.section_set, example.teacher_prompt
        first = example.num_prompt if teacher_prompt else 1
        targets = tuple(at for at in range(first, end - begin) if example.sections[begin + at] in chosen)
        teacher_tokens = (*teacher_prompt, *example.tokens[example.num_prompt : end]) if teacher_prompt else ()
        labels = tuple(label._replace(position=label.position - begin) for label in example.labels)
        return SupervisedSequence(example.name, example.tokens[begin:end], targets, labels, teacher_tokens)

    def apply_all(self, examples: Sequence[Example]) -> list[SupervisedSequence]:
        """Return the sequences that have a target; UserError if none has."""
        sequences = [sequence for example in examples if (sequence := self.apply(example)).targets]
        if not sequences:
            raise UserError(
                "supervision",
                self,
                f"leaves no target in {len(examples)} examples",
                "choose more sections or a larger lead_span",
            )
        return sequences

    def __str__(self) -> str:
        return f"{sections_text(self.section_set)} in the {self.window} {self.lead_span:.0%}"


def window_of(num_tokens: int, lead_span: float, window: Window) -> tuple[int, int]:
    """Return begin and end of a window of max(1, floor(num_tokens × lead_span)) tokens."""
    size = max(1, int(num_tokens * lead_span))
    begin = {"left": 0, "middle": (num_tokens - size) // 2, "right": num_tokens - size}[window]
    return begin, begin + size


def parse_sections(text: str) -> frozenset[Section]:
    """Return the sections of a text such as `cot+answer` or `all`; ValueError if it names no sections."""
    if text.strip() == "all":
        return frozenset(Section)
    names = [name.strip().upper() for name in text.split("+")]
    if len(set(names)) < len(names) or not set(names) <= set(Section.__members__):
        raise ValueError(f"join some of {', '.join(Section.__members__).lower()} with +, or write all")
    return frozenset(Section[name] for name in names)


def sections_text(sections: frozenset[Section]) -> str:
    """Return the text from which `parse_sections` makes these sections."""
    return "+".join(section.name.lower() for section in sorted(sections))
