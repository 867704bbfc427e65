"""Server-sent events out of the bytes of a streamed answer, each with the time at which its last byte had come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec


class StreamError(Exception):
    """A stream is not what an OpenAI-compatible server sends; the message is the kind under which it is counted."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_event_of = msgspec.json.Decoder(_Event)


@dataclass(frozen=True)
class Chunk:
    """Tokens that came together; times in the clock of the pieces."""

    at_s: float
    num_tokens: int
    is_reasoning: bool
    """Of the chain of thought, where the server tells it from the answer."""


@dataclass
class Streamed:
    """One streamed answer."""

    chunks: list[Chunk]
    text: str = ""
    reasoning: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: str | None = None
    has_usage: bool = False
    """Whether the server counted; else each chunk with text counts as one token."""
    error: str | None = None
    """Kind of failure; what came before it is kept."""


def read_stream(pieces: Iterable[tuple[float, bytes]]) -> Streamed:
    """The tokens of a streamed completion or chat; `error` says what was wrong with it."""
    answer = Streamed([])
    texts: list[str] = []
    thoughts: list[str] = []
    is_done = False
    try:
        for at_s, data in events(pieces):
            if data == b"[DONE]":
                is_done = True
                break
            try:
                event = _event_of.decode(data)
            except UnicodeDecodeError as error:
                raise StreamError("invalid utf-8") from error
            except msgspec.MsgspecError as error:
                raise StreamError("invalid utf-8" if "utf-8" in str(error).lower() else "broken json") from error
            if event.error is not None:
                raise StreamError("error in stream")
            said = thought = ""
            for choice in event.choices:
                delta = choice.delta or _Delta()
                said += choice.text or delta.content or ""
                thought += delta.reasoning_content or delta.reasoning or ""
                answer.finish_reason = choice.finish_reason or answer.finish_reason
            texts.append(said)
            thoughts.append(thought)
            if event.usage is None:
                new = int(bool(said or thought))
            else:
                answer.has_usage = True
                new = event.usage.completion_tokens - answer.output_tokens
                answer.prompt_tokens = event.usage.prompt_tokens
                if event.usage.prompt_tokens_details is not None:
                    answer.cached_tokens = event.usage.prompt_tokens_details.cached_tokens
            if new > 0:
                answer.output_tokens += new
                answer.chunks.append(Chunk(at_s, new, bool(thought) and not said))
        if not is_done:
            raise StreamError("stream ended early")
        if not answer.chunks:
            raise StreamError("empty answer")
    except StreamError as error:
        answer.error = str(error)
    answer.text, answer.reasoning = "".join(texts), "".join(thoughts)
    return answer


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterable[tuple[float, bytes]]:
    """The data of each event and when its line had come whole; StreamError for what is no event stream."""
    rest = b""
    for at_s, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            stripped = line.rstrip(b"\r")
            if stripped.startswith(b"data:"):
                yield at_s, stripped[5:].strip()
            elif stripped and stripped[:1] != b":" and stripped.split(b":", 1)[0] not in {b"event", b"id", b"retry"}:
                raise StreamError("broken event stream")
    if rest.strip():
        raise StreamError("half an event at the end")
