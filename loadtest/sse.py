"""Parses the server-sent events of a streamed answer; each event has the arrival time of its last byte.

The number of tokens per chunk is the server's own count if it sends one with each chunk (`continuous_usage_stats`).
Without it, each chunk with text counts as one token, because dividing a final count among the chunks would invent gaps.
The number of tokens of the answer is then the final count, or else the number of chunks.

What a choice holds is read by core/openai_client.py. Events of the usual form take a shorter way through typed structs,
since a client that parses for long sends late.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from slimserve.core.openai_client import AnswerError, count_of, read_replies, server_sentence
from slimserve.workloads.interface import THINK_CLOSE, THINK_OPEN

_FIELD = re.compile(rb"[a-z][a-z0-9_-]*:|(?:data|event|id|retry)$")
"""Start of a line of an event stream; fields without a meaning are ignored."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NUM_QUOTED_BYTES = 4096


class StreamError(Exception):
    """A stream is not that of an OpenAI-compatible server, or reports an error."""

    def __init__(self, kind: str, sentence: str = "") -> None:
        self.kind = kind
        """Name of the failure."""
        self.sentence = sentence
        """The server's own explanation in one line; empty if it gives none."""
        super().__init__(kind)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None  # these three are messages.CHAIN_FIELDS
    reasoning_content: str | None = None
    thinking: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: None = None
    text: str | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: None = None
    object: str = ""


_event_of = msgspec.json.Decoder(_Event).decode
_NO_DELTA = _Delta()


class Chunk(NamedTuple):
    """Tokens that arrived together; the time is in the clock of the pieces."""

    at_s: float
    num_tokens: int


@dataclass
class StreamedReply:
    """One streamed answer."""

    chunks: list[Chunk] = field(default_factory=list)
    """Empty if the server sent the complete answer as one JSON document, although a stream was asked for."""
    text: str = ""
    reasoning: str = ""
    """Chain of thought, if the server sends it separately from the answer."""
    first_answer_s: float | None = None
    """Arrival time of the first non-space character after the chain of thought, or of the first token without a chain.
    None if the chain never ended."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: str | None = None
    has_usage: bool = False
    """True if the server counted the answer's tokens."""
    error: str | None = None
    """Kind of failure; everything before it is kept."""
    sentence: str = ""
    """The server's own explanation of the failure in one line; empty if it gives none."""


@dataclass
class _Parts:
    """The parts of a reply that have arrived."""

    texts: list[tuple[float, str]] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    tool_calls_at_s: float | None = None
    """Arrival time of the first part of a tool call, a refusal or another answer without text."""


def read_stream(pieces: Iterable[tuple[float, bytes]]) -> StreamedReply:
    """Return the tokens of a streamed completion or chat from pieces of (arrival time in seconds, bytes).

    A stream ends with [DONE], or after a finish reason. `error` of the reply is one of: stream ended early, half an
    event at the end, empty answer, error in stream, broken json, invalid utf-8, broken event stream; if the server
    sent a JSON document instead of a stream: error in answer, no reply in answer.
    """
    received = list(pieces)
    answer = StreamedReply()
    parts = _Parts()
    try:
        if _is_document(received):
            _read_document(received, answer, parts)
        else:
            _read_events(received, answer, parts)
            if not answer.chunks:
                raise StreamError("empty answer")
    except StreamError as error:
        answer.error, answer.sentence = error.kind, error.sentence
    answer.text, answer.reasoning = "".join(text for _, text in parts.texts), "".join(parts.thoughts)
    answer.output_tokens = answer.output_tokens or sum(chunk.num_tokens for chunk in answer.chunks)
    answer.first_answer_s = _first_answer_s(answer, parts)
    return answer


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield the arrival time and data of each event, as the HTML standard defines them (section 9.2.6).

    An event arrives with the empty line after it; a last [DONE] needs none. Raises StreamError for an event of the type
    `error`, and for bytes that are not an event stream.
    """
    rest = b""
    data: list[bytes] = []
    kind = b""
    at_s = 0.0
    is_begin = True
    for at_s, piece in pieces:
        whole = rest + piece
        if is_begin and len(whole) >= len(_BYTE_ORDER_MARK):
            whole, is_begin = whole.removeprefix(_BYTE_ORDER_MARK), False
        held = b""
        if b"\r" in whole:
            if whole.endswith(b"\r"):  # a line feed may follow
                whole, held = whole[:-1], b"\r"
            whole = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = whole.split(b"\n")
        rest += held
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif not line:
                if data:
                    yield at_s, _data_of(kind, data)
                data, kind = [], b""
            elif line.startswith(b"event:"):
                kind = line[6:].strip()
            elif line[:1] != b":" and not _FIELD.match(line.lstrip()):
                raise StreamError("broken event stream", server_sentence(line[:_NUM_QUOTED_BYTES]))
    for line in rest.split(b"\r"):
        if line.startswith(b"data:"):
            data.append(line[5:].strip())
            rest = b""
    if data == [b"[DONE]"]:
        yield at_s, data[0]
    elif kind == b"error" and data:
        _data_of(kind, data)
    elif data or rest.strip():
        raise StreamError("half an event at the end", server_sentence(rest[:_NUM_QUOTED_BYTES]))


def _data_of(kind: bytes, data: list[bytes]) -> bytes:
    joined = b"\n".join(data)
    if kind == b"error" and joined != b"[DONE]":
        raise StreamError("error in stream", server_sentence(joined))
    return joined


def _is_document(pieces: list[tuple[float, bytes]]) -> bool:
    """Return whether a body is JSON or a web page and no event stream."""
    begin = next((piece for _, piece in pieces if piece.strip()), b"").removeprefix(_BYTE_ORDER_MARK)
    return begin.lstrip()[:1] in {b"{", b"[", b"<"}


def _read_document(pieces: list[tuple[float, bytes]], answer: StreamedReply, parts: _Parts) -> None:
    """Fill `answer` and `parts` from a complete answer, which has no times of its tokens."""
    body = b"".join(piece for _, piece in pieces).removeprefix(_BYTE_ORDER_MARK)
    sentence = server_sentence(body[:_NUM_QUOTED_BYTES])
    if body.lstrip().startswith(b"<"):
        raise StreamError("broken event stream", sentence)
    document = _json_of(body)
    try:
        replies = read_replies(document, is_complete=True)
    except AnswerError as error:
        is_error = isinstance(document, dict) and (document.get("error") or document.get("object") == "error")
        raise StreamError("error in answer" if is_error else "no reply in answer", sentence) from error
    at_s = pieces[-1][0]
    parts.texts = [(at_s, reply.text) for reply in replies]
    parts.thoughts = [reply.reasoning for reply in replies]
    parts.tool_calls_at_s = at_s if any(reply.has_tool_calls for reply in replies) else None
    answer.finish_reason = next((reply.finish_reason for reply in replies if reply.finish_reason), None)
    _note_usage(answer, _usage_of(document))
    if not any(reply.text or reply.reasoning or reply.has_tool_calls for reply in replies) and not answer.output_tokens:
        raise StreamError("empty answer")


def _read_events(pieces: list[tuple[float, bytes]], answer: StreamedReply, parts: _Parts) -> None:
    """Fill `answer` and `parts` from the events up to [DONE]; StreamError if the stream ends in mid-answer."""
    num_counted = 0
    is_counted_by_chunk: bool | None = None  # unknown until the first token
    for at_s, data in events(pieces):
        if data == b"[DONE]":
            return
        event = _decode(data)
        text = thought = ""
        has_tool_calls = False
        for choice in event.choices or ():
            delta = choice.delta or _NO_DELTA
            text += choice.text or delta.content or ""
            thought += delta.reasoning or delta.reasoning_content or delta.thinking or ""
            has_tool_calls |= bool(delta.tool_calls or delta.function_call or delta.refusal or delta.audio)
            answer.finish_reason = choice.finish_reason or answer.finish_reason
        if text:
            parts.texts.append((at_s, text))
        if thought:
            parts.thoughts.append(thought)
        if has_tool_calls and parts.tool_calls_at_s is None:
            parts.tool_calls_at_s = at_s
        usage = event.usage
        _note_usage(answer, usage)
        # A count without a choice, or the first count after chunks without one, is the total and adds no token.
        count = usage.completion_tokens if usage is not None else None
        if count is not None and event.choices and is_counted_by_chunk is not False:
            num_tokens = count - num_counted
        else:
            num_tokens = int(bool(text or thought or has_tool_calls))
        if num_tokens > 0:
            if is_counted_by_chunk is None:
                is_counted_by_chunk = count is not None
            num_counted += num_tokens
            answer.chunks.append(Chunk(at_s, num_tokens))
    if answer.finish_reason is None:
        raise StreamError("stream ended early")


def _note_usage(answer: StreamedReply, usage: _Usage | None) -> None:
    if usage is None:
        return
    if usage.completion_tokens is not None:
        answer.has_usage = True
        answer.output_tokens = max(answer.output_tokens, usage.completion_tokens)
    answer.prompt_tokens = usage.prompt_tokens or answer.prompt_tokens
    if usage.prompt_tokens_details is not None:
        answer.cached_tokens = usage.prompt_tokens_details.cached_tokens


def _decode(data: bytes) -> _Event:
    try:
        event = _event_of(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _decode_any(data)
    return event if event.object != "error" else _decode_any(data)


def _decode_any(data: bytes) -> _Event:
    """Read an event that the fast reader rejects. Raises StreamError for an error of the server and for other data."""
    document = _json_of(data)
    try:
        replies = read_replies(document)
    except AnswerError as error:
        is_error = str(error) == "error"
        raise StreamError("error in stream" if is_error else "broken json", server_sentence(data)) from error
    choices = [
        _Choice(_Delta(reply.text, reply.reasoning, tool_calls=reply.has_tool_calls), finish_reason=reply.finish_reason)
        for reply in replies
    ]
    return _Event(choices, _usage_of(document))


def _usage_of(document: Any) -> _Usage | None:
    usage = document.get("usage")
    if not isinstance(usage, dict):
        return None
    cached = count_of(usage.get("prompt_tokens_details"), "cached_tokens")
    return _Usage(
        count_of(usage, "prompt_tokens"),
        count_of(usage, "completion_tokens"),
        _Details(cached) if cached is not None else None,
    )


def _json_of(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        raise StreamError("invalid utf-8") from error
    except (msgspec.MsgspecError, RecursionError) as error:
        kind = "invalid utf-8" if _is_not_utf8(data) else "broken json"
        raise StreamError(kind, server_sentence(data[:_NUM_QUOTED_BYTES])) from error


def _is_not_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


def _first_answer_s(answer: StreamedReply, parts: _Parts) -> float | None:
    """The answer starts after the last closing tag, by the same rule as in the verifier."""
    tag_at = answer.text.rfind(THINK_CLOSE)
    if tag_at < 0 and not answer.reasoning:
        if answer.text.lstrip().startswith(THINK_OPEN):
            return None
        return answer.chunks[0].at_s if answer.chunks else next((at_s for at_s, _ in parts.texts), None)
    begin = tag_at + len(THINK_CLOSE) if tag_at >= 0 else 0
    first = len(answer.text) - len(answer.text[begin:].lstrip())
    end = 0
    for at_s, text in parts.texts:
        end += len(text)
        if end > first:
            return at_s
    return parts.tool_calls_at_s
