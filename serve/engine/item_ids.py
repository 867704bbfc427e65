"""Item ids in requests: their place is taken by the texts of their tokens, from the catalogue of the served model.

Everything after that is the same as for texts: prompts, labels, the prefix cache. An id that the catalogue lacks is an
error, or with `"unknown_items": "text"` gives way to the text beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slimserve.core.catalogue import Catalogue
from slimserve.serve.engine.score_request import HistoryItem, RequestError, ScoreRequest, UnknownItems, WarmRequest


class ItemTexts:
    """Gives items the texts of their tokens. `count(outcome)` is called for each id that the catalogue lacks."""

    def __init__(self, catalogue: Catalogue | None, count: Callable[[UnknownItems], None]) -> None:
        self._texts = catalogue.texts if catalogue else None
        self._count = count

    def text(self, item_id: str, own_text: str | None, unknown: UnknownItems, param: str) -> str:
        """Return the text of an item's tokens; RequestError for an unknown id that has no text to give way to."""
        if self._texts is None:
            raise RequestError(param, "this model has no item tokens; send texts")
        if item_id in self._texts:
            return self._texts[item_id]
        if unknown == "text" and own_text is not None:
            self._count("text")
            return own_text
        self._count("error")
        remedy = "give its text too" if unknown == "text" else 'add it with slimserve items add, or set "unknown_items"'
        raise RequestError(param, f"{item_id[:80]!r} is not in the catalogue of this model; {remedy}")

    def candidates(self, ids: Sequence[str], texts: Sequence[str] | None, unknown: UnknownItems) -> list[str]:
        """Return the text of each candidate; `texts` are their own texts, if the request has them."""
        if texts is not None and len(texts) != len(ids):
            raise RequestError("item_ids", f"has {len(ids)} ids for {len(texts)} items; give one id for each item")
        return [
            self.text(item_id, texts[number] if texts is not None else None, unknown, f"item_ids[{number}]")
            for number, item_id in enumerate(ids)
        ]

    def history(self, parts: Sequence[str | HistoryItem], unknown: UnknownItems) -> str:
        """Return the text of a history of texts and items."""
        return "".join(
            part if isinstance(part, str) else self.text(part.item_id, part.text, unknown, f"history[{number}]")
            for number, part in enumerate(parts)
        )

    def in_score_request(self, request: ScoreRequest) -> ScoreRequest:
        """Return a score request in which texts stand for the items; RequestError names what does not go together."""
        query, items = self._query(request), request.items
        if request.item_ids is not None:
            texts = [items] if isinstance(items, str) else items
            if texts is not None and not all(isinstance(text, str) for text in texts):
                raise RequestError("item_ids", "needs items that are texts, not token ids")
            items = self.candidates(request.item_ids, texts, request.unknown_items)  # type: ignore[arg-type]  # checked above
        return request.model_copy(update={"query": query, "items": items, "history": [], "item_ids": None})

    def in_warm_request(self, request: WarmRequest) -> WarmRequest:
        """Return a warm request in which texts stand for the items."""
        return request.model_copy(update={"query": self._query(request), "history": []})

    def _query(self, request: ScoreRequest | WarmRequest) -> str | list[int]:
        if not request.history:
            return request.query
        if not isinstance(request.query, str):
            raise RequestError("history", "needs a query that is a text, not token ids")
        return self.history(request.history, request.unknown_items) + request.query


NO_ITEMS = ItemTexts(None, lambda _: None)
"""Items of a model without a catalogue."""
