"""The bodies of `POST /v1/score` and `POST /v1/warm`, and the error that names what is wrong with it.

A score request has the fields of SGLang 0.5.23 (`ScoringRequest` in its `entrypoints/openai/protocol.py`), followed by
our own. Fields of SGLang that vLLM cannot serve are accepted with their default values and refused with any other.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

UnknownItems = Literal["error", "text"]
"""How a request treats an item id that is not in the catalogue: as an error, or by reading the item's text."""


def _null_is_empty(query: Any) -> Any:
    return "" if query is None else query


class HistoryItem(BaseModel):
    """An item of a history, by its id in the catalogue of the served model."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    item_id: str = Field(min_length=1)
    text: str | None = None
    """Text of the item, for `"unknown_items": "text"`."""


HistoryPart = str | Annotated[HistoryItem, WithJsonSchema(HistoryItem.model_json_schema())]
"""A text or an item. The schema stands in its place, because a reference leads nowhere inside an OpenAPI document."""


class ScoreRequest(BaseModel):
    """The body of `POST /v1/score`: SGLang's fields, followed by our own."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    query: str | list[int] = ""
    """Text or token ids that all items have in common; null is the same as none."""
    item_ids: list[str] | None = None
    """Ids of the items in the catalogue of a model with item tokens, in place of `items` or beside them."""
    items: str | list[str] | list[list[int]] | None = Field(default=None, validate_default=True)
    """Items to score: one text, several texts, or lists of token ids."""
    history: list[HistoryPart] = Field(default_factory=list)
    """Texts and items of the catalogue, as {"item_id": "…"}, that stand before the query."""
    unknown_items: UnknownItems = "error"
    """`error` rejects an id that the catalogue lacks; `text` takes the item's text in its place."""
    label_token_ids: list[int] | list[list[int]] | None = Field(default=None, min_length=1)
    """Token ids of the labels, whose probability after query + item is the score; or one list for each item."""
    apply_softmax: bool = False
    """True: the labels' probabilities sum to one. False: probabilities over the full vocabulary."""
    temperature: StrictFloat | StrictInt = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divisor of the labels' log-probabilities before the softmax; needs `apply_softmax`."""
    return_token_logprobs: bool = False
    """Return `token_logprobs` too: the labels' natural log-probabilities over the full vocabulary."""
    item_first: bool = False
    """Put the item before the query; then the items share no prefix."""
    embed_override_token_id: None = None
    query_embed_overrides: None = None
    item_embed_overrides: None = None
    score_extraction_token: None = None
    return_pooled_hidden_states: Literal[False] = False
    model: str | None = None
    labels: list[str] | list[list[str]] | None = Field(default=None, min_length=1)
    """Labels as texts in place of `label_token_ids`; each is tokenized as the text that follows its prompt."""
    calibrated: bool | str = False
    """Map the scores to probabilities by the calibration in the variant's manifest (`slimserve calibrate`); a text
    names the workload if the manifest has several for these labels. Needs `apply_softmax`."""
    label_scoring: Literal["token", "sequence"] = "token"
    """`token` rejects a label with several tokens; `sequence` scores it as the product of its tokens' probabilities."""
    apply_chat_template: bool = False
    """Make query + item (texts) one user message, and the labels the start of the answer to it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as {"enable_thinking": false}."""
    add_special_tokens: bool | None = None
    """Add the tokenizer's special tokens to texts; by default they are added except with a chat template."""
    return_logprobs: bool = False
    """Return the same values as `return_token_logprobs` under the key `logprobs`."""
    timeout_s: StrictFloat | StrictInt | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after which the request ends with 504."""
    cache_salt: str | None = Field(default=None, min_length=1)
    """Requests with different salts do not share cached prefixes."""
    priority: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Priority for vLLM's scheduler, if its policy uses one."""
    user: str | None = None
    """Name of the end user; the gateway sends all requests of a user to the same variant of an alias."""

    @field_validator("items")
    @classmethod
    def _has_items(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("item_ids") is None:
            raise ValueError("give the items, or their item_ids")
        return value

    _null_is_no_query = field_validator("query", mode="before")(_null_is_empty)

    @field_validator(
        "embed_override_token_id",
        "query_embed_overrides",
        "item_embed_overrides",
        "score_extraction_token",
        "return_pooled_hidden_states",
        mode="before",
    )
    @classmethod
    def _is_unsupported(cls, value: Any) -> Any:
        if value is not None and value is not False:
            raise ValueError("this server does not support the field; remove it")
        return value


class WarmRequest(BaseModel):
    """The body of `POST /v1/warm`: the fields of a score request that determine the prefix of its prompts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    query: str | list[int] = ""
    """Text or token ids that the items of the coming score requests have in common."""
    history: list[HistoryPart] = Field(default_factory=list)
    """Texts and items of the catalogue, as {"item_id": "…"}, that stand before the query."""
    unknown_items: UnknownItems = "error"
    """`error` rejects an id that the catalogue lacks; `text` takes the item's text in its place."""
    model: str | None = None
    apply_chat_template: bool = False
    """Read the query as the beginning of a user message."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as {"enable_thinking": false}."""
    add_special_tokens: bool | None = None
    """Add the tokenizer's special tokens to texts; by default they are added except with a chat template."""
    timeout_s: StrictFloat | StrictInt | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after which the request ends with 504."""
    cache_salt: str | None = Field(default=None, min_length=1)
    """Requests with different salts do not share cached prefixes."""
    priority: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Priority for vLLM's scheduler, if its policy uses one."""
    user: str | None = None
    """Name of the end user; the gateway sends all requests of a user to the same variant of an alias."""

    _null_is_no_query = field_validator("query", mode="before")(_null_is_empty)


class RequestError(Exception):
    """A mistake in a request; the answer has `status` and names the field `param`."""

    def __init__(self, param: str, problem: str, status: int = 400) -> None:
        self.param = param
        self.problem = problem
        self.status = status
        super().__init__(f"{param}: {problem}")

    def renamed(self, name: str, new_name: str) -> RequestError:
        """Return the same error for a request that calls the field `name` by `new_name`."""
        return RequestError(self.param.replace(name, new_name), self.problem, self.status)


@asynccontextmanager
async def time_limit(timeout_s: float | None) -> AsyncIterator[None]:
    """Cancel what runs inside after the request's own time limit, and raise RequestError with status 504."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        if timeout_s is None:
            raise
        raise RequestError("timeout_s", f"{timeout_s:g} s passed before the answer was computed", 504) from error


def validation_problem(error: ValidationError, body: bytes) -> tuple[str, str]:
    """Return the field of a JSON body that is wrong, such as `documents[1]`, and what is wrong with it.

    A field of several types has one error per type; the error of the type that fits best is returned.
    """
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    candidates = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    num_errors = Counter(each["loc"][1:2] for each in candidates)
    best = min(candidates, key=lambda each: (num_errors[each["loc"][1:2]], -len(each["loc"])))
    return _field_name(best["loc"], body), best["msg"]


def _field_name(location: Sequence[str | int], body: bytes) -> str:
    """Return the name of the field at pydantic's `location`; empty for the body itself.

    A location also names the type that was tried, as in (`documents`, 1, `str`). Such parts are left out, because the
    body has no such field. A missing field of the body itself is named.
    """
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    name = ""
    for part in location:
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            name += f"[{part}]"
            value = value[part]
        elif isinstance(part, str) and isinstance(value, dict) and (part in value or not name):
            name += f".{part}" if name else part
            value = value.get(part)
    return name
