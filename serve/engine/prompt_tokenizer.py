"""Tokenize prompts that share most of their text, with the result of tokenizing each joined text.

Prompt and item are tokenized as one text, because a merge may cross the seam: the tokens of "The capital is" + "n't"
are not those of its two parts. To tokenize a long history once and not once per item, the text is cut where this kind
of tokenizer never merges: between an ASCII letter and a single space followed by a letter ("…the | capital…"). Every
byte-level BPE splits words there before it merges, and what follows does not change the words before. Another such
place is before an item token (core/catalogue.py), because tokenizers split texts at added tokens first. The parts left
of the query's last cut and right of the first cut after the item are tokenized once. With another kind of
tokenizer, or without such a cut, each joined text is tokenized as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimserve.core.catalogue import token_text
from slimserve.serve.engine.score_request import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CUT = r"(?<=[A-Za-z])(?= [A-Za-z])"
_BEFORE_ITEM = r"(?=<\|item_\d+\|>)"
_SHOWN_CHARACTERS = 40
_NEAR_END_CHARACTERS = 200


@dataclass(frozen=True)
class PromptTexts:
    """The texts of a request's prompts; each prompt is `head + item + tail`."""

    head: str
    items: tuple[str, ...]
    tail: str
    add_special_tokens: bool

    def prompt(self, index: int) -> str:
        """Return the joined text of one prompt."""
        return self.head + self.items[index] + self.tail


class PromptTokenizer:
    """Tokenizes joined texts and does the work for their common parts once.

    `encode(text, add_special_tokens)` is the model's tokenizer. `backend` is a `tokenizers.Tokenizer` with the same
    tokens, if there is one; nothing else may use it.
    """

    def __init__(self, encode: Callable[[str, bool], list[int]], backend: Tokenizer | None = None) -> None:
        self._encode_one = encode
        self._backend = backend
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        config = json.loads(backend.to_str()) if backend is not None else None
        has_items = config is not None and any(token["content"] == token_text(0) for token in config["added_tokens"])
        self._cut = re.compile(f"{_CUT}|{_BEFORE_ITEM}" if has_items else _CUT)
        self.can_share = config is not None and _cuts_are_safe(config)
        """Whether joined texts may be cut; otherwise each is tokenized completely."""
        around = _added_around(self.encode("a", True), self.encode("a", False))
        self.can_share = self.can_share and around is not None
        self._before, self._after = around or ([], [])

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the tokens of one text."""
        if self._backend is None:
            return self._encode_one(text, add_special_tokens)
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Return the tokens of each text; equal texts are tokenized once."""
        distinct = list(dict.fromkeys(texts))
        if self._backend is None:
            encoded = [self._encode_one(text, add_special_tokens) for text in distinct]
        else:
            batch = self._backend.encode_batch_fast(distinct, add_special_tokens=add_special_tokens)
            encoded = [encoding.ids for encoding in batch]
        by_text = dict(zip(distinct, encoded, strict=True))
        return [by_text[text] for text in texts]

    def prompts(self, texts: PromptTexts) -> list[list[int]]:
        """Return the tokens of `head + item + tail` for each item, equal to those of each joined text."""
        left = self._last_cut(texts.head)
        tail_cut = self._cut.search(texts.tail) if self.can_share else None
        if not left and tail_cut is None:
            return self.encode_all([texts.prompt(index) for index in range(len(texts.items))], texts.add_special_tokens)
        right = tail_cut.start() if tail_cut else len(texts.tail)
        before = (self._before if texts.add_special_tokens else []) + self.encode(texts.head[:left], False)
        after = self.encode(texts.tail[right:], False) + (self._after if texts.add_special_tokens else [])
        middles = self.encode_all([texts.head[left:] + item + texts.tail[:right] for item in texts.items])
        return [before + middle + after for middle in middles]

    def continuations(self, texts: Sequence[str], labels: Sequence[str]) -> list[list[tuple[int, ...]]]:
        """Return for each text and label the tokens that follow those of `text` in `text + label`.

        Raises RequestError if a label merges with the last token of the text, so that it has no tokens of its own.
        """
        endings = [text[self._last_cut(text) :] for text in texts]
        joined = [ending + label for ending in endings for label in ("", *labels)]
        tokens_of = dict(zip(joined, self.encode_all(joined), strict=True))
        rows = []
        for text, ending in zip(texts, endings, strict=True):
            plain = tokens_of[ending]
            for label in labels:
                tokens = tokens_of[ending + label]
                if tokens[: len(plain)] != plain or len(tokens) == len(plain):
                    raise RequestError(
                        "labels",
                        f"{label!r} is not a continuation of {text[-_SHOWN_CHARACTERS:]!r} in tokens: "
                        f"{plain[-4:]} become {tokens[max(len(plain) - 4, 0) :]} when it follows; move the space that "
                        "ends the prompt to the front of the label, or give label_token_ids",
                    )
            rows.append([tuple(tokens_of[ending + label][len(plain) :]) for label in labels])
        return rows

    def _last_cut(self, text: str) -> int:
        """Return the last position where `text` may be cut, whatever follows it; 0 if there is none."""
        if not self.can_share:
            return 0
        for start in (max(len(text) - _NEAR_END_CHARACTERS, 0), 0):
            if cuts := [match.start() for match in self._cut.finditer(text, start)]:
                return cuts[-1]
        return 0

    def first_tokens_end(self, text: str, num_tokens: int) -> int:
        """Return the number of characters of `text` that its first `num_tokens` tokens cover."""
        if self._backend is None:
            tokens = self._encode_one(text, False)
            return len(text) if len(tokens) <= num_tokens else len(text) * num_tokens // len(tokens)
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        return len(text) if len(offsets) <= num_tokens else int(offsets[num_tokens][0])


def _cuts_are_safe(config: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is a byte-level BPE that splits words first, and no added token spans a cut."""
    normalizer = config.get("normalizer") or {"type": "NFC"}
    splitter = config.get("pre_tokenizer") or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    splits = [step for step in steps if step.get("type") in {"Split", "Digits"}]
    return (
        config["model"]["type"] == "BPE"
        and normalizer["type"] in {"NFC", "NFD", "NFKC", "NFKD"}
        and [step["type"] for step in steps if step not in splits] == ["ByteLevel"]
        and steps[-1]["type"] == "ByteLevel"
        and bool(steps[-1].get("use_regex") or any(_splits_words(step) for step in splits))
        and not steps[-1].get("add_prefix_space")
        and not any(" " in token["content"] or token["lstrip"] or token["rstrip"] for token in config["added_tokens"])
    )


def _splits_words(step: dict[str, Any]) -> bool:
    """Return whether a Split step is a known regular expression, in which words include their leading space."""
    pattern = step.get("pattern", {}).get("Regex", "")
    return step.get("behavior") == "Isolated" and not step.get("invert") and r"\s+(?!\S)" in pattern


def _added_around(with_special: list[int], without: list[int]) -> tuple[list[int], list[int]] | None:
    """Return the special tokens that a tokenizer adds before and after a text; None if it changes other tokens."""
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return with_special[:start], with_special[start + len(without) :]
    return None
