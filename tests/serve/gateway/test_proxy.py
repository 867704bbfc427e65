"""Tests of the proxy over real connections: bytes pass unchanged, and broken requests and answers do no harm."""

import asyncio
import json
import os
import random

import pytest

from slimserve.serve.gateway.messages import Answer, Timeouts
from slimserve.serve.gateway.upstream import Backend
from tests.conftest import measures_time
from tests.serve.fake_engine import MAX_BODY, STREAM_HEAD, Client, Message, answer, chunk, run, served, until

pytestmark = measures_time

COMPLETE = {"model": "a", "prompt": "x"}


def test_a_stream_reaches_the_client_byte_for_byte_and_chunk_by_chunk() -> None:
    chunks = [chunk(os.urandom(random.Random(i).choice((1, 15, 16, 300, 70_000)))) for i in range(40)]

    async def scenario() -> None:
        async with served("a") as gateway:
            first_was_read = asyncio.Event()

            async def script(request: Message, writer: asyncio.StreamWriter) -> None:
                writer.write(STREAM_HEAD + chunks[0])
                await first_was_read.wait()
                for part in chunks[1:]:
                    writer.write(part)
                    await writer.drain()
                writer.write(b"0\r\n\r\n")

            gateway.engines["a"].script = script
            async with await gateway.connect() as client:
                client.send("/v1/completions", COMPLETE)
                head = await client.reader.readuntil(b"\r\n\r\n")
                assert b"transfer-encoding: chunked" in head
                assert await client.reader.readexactly(len(chunks[0])) == chunks[0], "before the second is sent"
                first_was_read.set()
                rest = b"".join(chunks[1:]) + b"0\r\n\r\n"
                assert await client.reader.readexactly(len(rest)) == rest
                gateway.engines["a"].script = gateway.engines["a"]._echo
                assert (await client.ask("/v1/completions", COMPLETE)).status == 200, "the connection is still usable"

    run(scenario())


def test_the_engine_gets_the_request_unchanged_except_for_hop_by_hop_headers() -> None:
    async def scenario() -> None:
        async with served("a") as gateway:
            body = b'{"model" : "a",\n "prompt": "\xc3\xa9"}'
            headers = (
                "Authorization: Bearer k\r\nX-Thing: 1\r\nX-Thing: 2\r\nTE: trailers\r\nKeep-Alive: 5\r\n"
                "X-Forwarded-For: 6.6.6.6\r\nX-Request-Id: mine-1\r\n"
            )
            response = await gateway.ask("/v1/completions?x=%20y", body, headers)
            (received,) = gateway.engines["a"].requests
            assert received.body == body
            assert received.target == "/v1/completions?x=%20y"
            assert sorted(received.headers) == [
                ("authorization", "Bearer k"),
                ("content-length", str(len(body))),
                ("host", "test"),
                ("x-request-id", "mine-1"),
                ("x-thing", "1"),
                ("x-thing", "2"),
            ]
            assert response.header("x-request-id") == "mine-1"

    run(scenario())


@pytest.mark.parametrize("header", ["", "X-Request-Id: a b\r\n", f"X-Request-Id: {'x' * 200}\r\n"])
def test_a_request_without_a_usable_id_gets_one(header: str) -> None:
    async def scenario() -> None:
        async with served("a") as gateway:
            response = await gateway.ask("/v1/completions", COMPLETE, header)
            request_id = response.header("x-request-id")
            assert request_id is not None
            assert len(request_id) == 32
            assert gateway.engines["a"].requests[0].header("x-request-id") == request_id

    run(scenario())


def test_a_chunked_body_reaches_the_engine_with_a_content_length() -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.writer.write(chunk(b'{"mod') + chunk(b'el":"a"}') + b"0\r\nTrailer: dropped\r\n\r\n")
            assert (await client.answer()).json()["body"] == '{"model":"a"}'
            assert "trailer" not in dict(gateway.engines["a"].requests[0].headers)

    run(scenario())


def test_connections_to_the_engine_are_reused() -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            for _ in range(20):
                assert (await client.ask("/v1/completions", COMPLETE)).status == 200
            assert gateway.engines["a"].num_connections == 1

    run(scenario())


def test_a_request_on_a_connection_that_the_engine_closed_is_sent_again() -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            engine = gateway.engines["a"]
            answered = 0

            async def close_instead(request: Message, writer: asyncio.StreamWriter) -> None:
                nonlocal answered
                answered += 1
                if answered == 2:
                    writer.transport.abort()
                else:
                    await answer(writer, {})

            engine.script = close_instead
            assert (await client.ask("/v1/completions", COMPLETE)).status == 200
            assert (await client.ask("/v1/completions", COMPLETE)).status == 200
            assert (answered, engine.num_connections) == (3, 2)

    run(scenario())


def test_a_request_that_kills_its_engine_is_sent_twice_at_most() -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            engine = gateway.engines["a"]
            await client.ask("/v1/completions", COMPLETE)

            async def die(request: Message, writer: asyncio.StreamWriter) -> None:
                writer.transport.abort()

            engine.script = die
            response = await client.ask("/v1/completions", COMPLETE)
            assert (response.status, response.json()["error"]["code"]) == (502, "engine_lost")
            assert len(engine.requests) == 3

    run(scenario())


def test_a_client_that_does_not_read_pauses_its_engine_and_the_gateway_buffers_little() -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            sent = 0

            async def flood(request: Message, writer: asyncio.StreamWriter) -> None:
                nonlocal sent
                writer.write(STREAM_HEAD)
                for _ in range(2000):
                    writer.write(chunk(b"x" * 32_768))
                    await writer.drain()
                    sent += 32_768
                writer.write(b"0\r\n\r\n")

            gateway.engines["a"].script = flood
            client.send("/v1/completions", COMPLETE)
            await asyncio.sleep(0.5)
            stuck_at = sent
            await asyncio.sleep(0.5)
            assert sent == stuck_at, "nothing is sent while the client does not read"
            (connection,) = gateway.server.connections
            assert connection._transport.get_write_buffer_size() < 1_000_000  # type: ignore[attr-defined]
            assert stuck_at < 20_000_000, "only the buffers of the sockets are filled"
            assert len((await client.answer()).body) == 2000 * 32_768

    run(scenario())


def test_a_client_that_reads_nothing_for_too_long_is_disconnected() -> None:
    async def scenario() -> None:
        async with served("a", timeouts=Timeouts(stall_s=0.3)) as gateway, await gateway.connect() as client:

            async def flood(request: Message, writer: asyncio.StreamWriter) -> None:
                writer.write(STREAM_HEAD)
                while True:
                    writer.write(chunk(b"x" * 32_768))
                    await writer.drain()

            gateway.engines["a"].script = flood
            client.send("/v1/completions", COMPLETE)
            await asyncio.wait_for(gateway.engines["a"].disconnected.wait(), 5)
            assert not gateway.server.connections

    run(scenario())


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_request_is_cancelled_at_once_when_its_client_disconnects(has_begun: bool) -> None:
    async def scenario() -> None:
        async with served("a") as gateway:
            engine = gateway.engines["a"]

            async def never_end(request: Message, writer: asyncio.StreamWriter) -> None:
                if has_begun:
                    writer.write(STREAM_HEAD + chunk(b"data: x\n\n"))
                await asyncio.sleep(60)

            engine.script = never_end
            client = await gateway.connect()
            client.send("/v1/completions", COMPLETE)
            await until(lambda: bool(engine.requests))
            client.writer.close()
            await asyncio.wait_for(engine.disconnected.wait(), 5)
            count = gateway.registry.get_sample_value
            labels = {"variant": "a", "status": "499"}
            await until(lambda: count("slimserve_gateway_requests_total", labels) == 1)
            assert count("slimserve_gateway_in_flight", {"variant": "a"}) == 0

    run(scenario())


def test_a_stream_whose_engine_dies_ends_with_an_error_event() -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:

            async def die(request: Message, writer: asyncio.StreamWriter) -> None:
                writer.write(STREAM_HEAD + chunk(b"data: 1\n\n"))
                await writer.drain()
                await asyncio.sleep(0.05)
                writer.transport.abort()

            gateway.engines["a"].script = die
            response = await client.ask("/v1/completions", COMPLETE)
            events = [line for line in response.body.decode().split("\n\n") if line]
            assert events[0] == "data: 1"
            assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "engine_lost"
            assert events[2:] == ["data: [DONE]"]
            assert await client.is_closed()

    run(scenario())


@pytest.mark.parametrize(
    "sent",
    [
        STREAM_HEAD + b"20\r\ndata: half of a ch",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{",
    ],
)
def test_an_answer_cut_within_a_chunk_or_body_closes_the_connection(sent: bytes) -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:

            async def die(request: Message, writer: asyncio.StreamWriter) -> None:
                writer.write(sent)
                await writer.drain()
                await asyncio.sleep(0.05)
                writer.transport.abort()

            gateway.engines["a"].script = die
            with pytest.raises(ConnectionError):
                await client.ask("/v1/completions", COMPLETE)

    run(scenario())


@pytest.mark.parametrize(
    "nonsense",
    [
        b"not http at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nno length",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nxHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\ny",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
    ],
)
def test_an_engine_that_does_not_speak_http_is_a_bad_gateway(nonsense: bytes) -> None:
    async def scenario() -> None:
        async with served("a") as gateway:

            async def talk(request: Message, writer: asyncio.StreamWriter) -> None:
                writer.write(nonsense)
                await writer.drain()
                await asyncio.sleep(1)

            gateway.engines["a"].script = talk
            assert (await gateway.ask("/v1/completions", COMPLETE)).status == 502

    run(scenario())


def test_an_engine_that_closes_every_connection_is_a_bad_gateway_at_once() -> None:
    async def scenario() -> None:
        async with served("a") as gateway:

            class HangUp(asyncio.Protocol):
                def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                    transport.abort()

            loop = asyncio.get_running_loop()
            server = await loop.create_server(HangUp, "127.0.0.1", 0)
            gateway.supervised["a"].backend = Backend("127.0.0.1", server.sockets[0].getsockname()[1])
            answers = await asyncio.gather(*(gateway.ask("/v1/completions", COMPLETE) for _ in range(64)))
            assert {response.status for response in answers} == {502}
            server.close()

    run(scenario())


def test_an_exception_in_the_gateway_is_answered_with_500(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> Answer:
        raise RuntimeError("a mistake in the gateway")

    async def scenario() -> None:
        async with served("a") as gateway:
            monkeypatch.setattr(gateway.gateway, "route", lambda request: fail())
            response = await gateway.ask("/v1/models")
            assert (response.status, response.json()["error"]["code"]) == (500, "internal_error")
            assert not any(connection.is_busy for connection in gateway.server.connections)

    run(scenario())


@pytest.mark.parametrize("num_bytes", [1, 3, 30])
def test_sixty_four_simultaneous_streams_are_complete_however_their_bytes_are_split(num_bytes: int) -> None:
    raw_answer = STREAM_HEAD + b"".join(chunk(b"data: %d\n\n" % i) for i in range(20)) + b"0\r\n\r\n"

    async def scenario() -> None:
        async with served("a") as gateway:

            async def drip(request: Message, writer: asyncio.StreamWriter) -> None:
                for start in range(0, len(raw_answer), num_bytes):
                    writer.write(raw_answer[start : start + num_bytes])
                    await asyncio.sleep(0)

            gateway.engines["a"].script = drip
            for _ in range(2):  # the second time over reused connections
                answers = await asyncio.gather(*(gateway.ask("/v1/completions", COMPLETE) for _ in range(64)))
                assert {response.body for response in answers} == {b"".join(b"data: %d\n\n" % i for i in range(20))}
            assert gateway.engines["a"].num_connections <= 64

    run(scenario())


SMUGGLED = {
    "two framings": b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/secret HTTP/1.1\r\n\r\n",
    "the other order": b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 3\r\nContent-Length: 30\r\n\r\n{}x",
    "a list of lengths": b"Content-Length: 3, 3\r\n\r\n{}x",
    "a signed length": b"Content-Length: +3\r\n\r\n{}x",
    "a space before the colon": b"Content-Length : 3\r\n\r\n{}x",
    "a folded header": b"X: a\r\n Content-Length: 3\r\n\r\n{}x",
    "an unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked and more": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunked twice": b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "a bare line feed": b"X: a\nContent-Length: 3\r\n\r\n{}x",
    "a null byte": b"X: a\0b\r\nContent-Length: 3\r\n\r\n{}x",
    "a chunk with a bare line feed": b"Transfer-Encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n",
    "an upgrade": b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
    "a second host": b"Host: other\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("framing", SMUGGLED.values(), ids=SMUGGLED.keys())
def test_a_request_with_ambiguous_framing_is_rejected_and_its_connection_closed(framing: bytes) -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\n" + framing)
            response = await client.answer()
            assert response.status == 400
            assert response.json()["error"]["type"] == "invalid_request_error"
            assert await client.is_closed()
            assert not gateway.engines["a"].requests, "the engine never saw it"

    run(scenario())


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET http://elsewhere/v1/models HTTP/1.1", 400),
        ("CONNECT elsewhere:443 HTTP/1.1", 400),
        ("GET * HTTP/1.1", 400),
        ("DESCRIBE /v1/models RTSP/1.0", 405),
        ("PROPFIND /v1/models HTTP/1.1", 405),
        ("GET /v1/models HTTP/2.0", 505),
        ("GET /live HTTP/1.0", 200),
        ("HEAD /live HTTP/1.1", 200),
        ("POST /live HTTP/1.1", 405),
        ("HEAD /version HTTP/1.1", 405),
    ],
)
def test_an_unusual_request_line_gets_the_matching_status(request_line: str, status: int) -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            client.writer.write(f"{request_line}\r\nHost: t\r\n\r\n".encode())
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert int(head.split()[1]) == status, head
            assert not gateway.engines["a"].requests

    run(scenario())


def test_heads_and_bodies_above_the_limit_are_rejected() -> None:
    async def scenario() -> None:
        async with served("a") as gateway:
            many = "".join(f"X-{i}: {'y' * 1000}\r\n" for i in range(80))
            assert (await gateway.ask("/v1/completions", COMPLETE, many)).status == 431
            async with await gateway.connect() as client:
                client.writer.write(b"POST /" + b"x" * 70_000)
                assert (await client.answer()).status == 431
            async with await gateway.connect() as client:
                # The announced length is enough to reject it, before any byte of the body arrives.
                client.writer.write(f"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n".encode())
                response = await client.answer()
                assert (response.status, response.json()["error"]["code"]) == (413, "body_too_large")
            async with await gateway.connect() as client:
                client.writer.write(b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
                for _ in range(MAX_BODY // 1000 + 1):
                    client.writer.write(chunk(b"x" * 1000))
                assert (await client.answer()).status == 413
            assert (await gateway.ask("/x", {"model": "a", "prompt": "x" * (MAX_BODY - 100)})).status == 200
            assert not gateway.server.uploads.num_bytes

    run(scenario())


def test_a_request_that_arrives_too_slowly_is_rejected() -> None:
    async def scenario() -> None:
        timeouts = Timeouts(idle_s=0.3, head_s=0.3, body_s=0.3)
        async with served("a", timeouts=timeouts) as gateway:
            for begin in (b"POST /x HT", b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\n{"):
                async with await gateway.connect() as client:
                    client.writer.write(begin)
                    assert (await client.answer()).status == 408
            async with await gateway.connect() as client:
                assert await client.is_closed(), "a connection that sends nothing is closed without an answer"

    run(scenario())


def test_an_engine_that_never_answers_is_a_gateway_timeout() -> None:
    async def scenario() -> None:
        async with served("a", timeouts=Timeouts(answer_s=0.3)) as gateway:

            async def silence(request: Message, writer: asyncio.StreamWriter) -> None:
                await asyncio.sleep(60)

            gateway.engines["a"].script = silence
            assert (await gateway.ask("/x", COMPLETE)).status == 504
            await asyncio.wait_for(gateway.engines["a"].disconnected.wait(), 5)

    run(scenario())


def test_pipelined_requests_are_not_mixed_up() -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            client.send("/v1/completions", COMPLETE)
            client.send("/v1/other", COMPLETE)
            assert (await client.answer()).json()["target"] == "/v1/completions"
            assert await client.is_closed(), "the client must send the second request again"
            assert len(gateway.engines["a"].requests) == 1

    run(scenario())


def test_a_client_that_expects_100_continue_gets_it() -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            client.writer.write(b"POST /x HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n")
            assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            client.writer.write(b'{"model":"a"}')
            assert (await client.answer()).status == 200

    run(scenario())


def test_ten_thousand_pieces_of_garbage_leave_nothing_behind() -> None:
    async def scenario() -> None:
        source = random.Random(7)
        valid = b'POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 13\r\n\r\n{"model":"a"}'

        def garbage() -> bytes:
            kind = source.randrange(3)
            if kind == 0:
                return source.randbytes(source.randrange(1, 300))
            mangled = bytearray(valid)
            for _ in range(source.randrange(1, 6)):
                mangled[source.randrange(len(mangled))] = source.randrange(256)
            return bytes(mangled) if kind == 1 else bytes(mangled[: source.randrange(1, len(mangled))])

        async def throw(gateway_port: int, pieces: list[bytes]) -> list[int]:
            statuses = []
            for piece in pieces:
                reader, writer = await asyncio.open_connection("127.0.0.1", gateway_port)
                writer.write(piece)
                writer.write_eof()
                data = await reader.read()
                statuses += [int(data.split()[1])] if data else []
                writer.close()
            return statuses

        async with served("a") as gateway:
            pieces = [garbage() for _ in range(10_000)]
            answered = await asyncio.gather(*(throw(gateway.port, pieces[i::20]) for i in range(20)))
            statuses = {status for part in answered for status in part}
            assert 400 in statuses
            assert not {status for status in statuses if status >= 500} - {505}
            await until(lambda: not gateway.server.connections)
            assert not gateway.server.uploads.num_bytes
            assert gateway.registry.get_sample_value("slimserve_gateway_in_flight", {"variant": "a"}) in {0, None}
            assert (await gateway.ask("/v1/completions", COMPLETE)).status == 200

    run(scenario())


def test_a_drain_lets_streams_finish_and_rejects_new_requests() -> None:
    async def scenario() -> None:
        async with served("a") as gateway:
            finish = asyncio.Event()

            async def slow(request: Message, writer: asyncio.StreamWriter) -> None:
                writer.write(STREAM_HEAD + chunk(b"data: 1\n\n"))
                await finish.wait()
                writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

            gateway.engines["a"].script = slow
            idle = await gateway.connect()
            await idle.ask("/live")
            running = await gateway.connect()
            running.send("/x", COMPLETE)
            await until(lambda: bool(gateway.engines["a"].requests))
            gateway.gateway.is_draining = True
            drain = asyncio.create_task(gateway.server.drain(10))
            assert await idle.is_closed()
            late = await gateway.ask("/x", COMPLETE)
            assert (late.status, late.header("connection")) == (503, "close")
            assert late.header("retry-after")
            assert (await gateway.ask("/ready")).status == 503
            assert not drain.done()
            finish.set()
            await drain
            assert (await running.answer()).body == b"data: 1\n\ndata: [DONE]\n\n"

    run(scenario())


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event() -> None:
    async def scenario() -> None:
        async with served("a") as gateway:

            async def endless(request: Message, writer: asyncio.StreamWriter) -> None:
                writer.write(STREAM_HEAD + chunk(b"data: 1\n\n"))
                await asyncio.sleep(60)

            async def silent(request: Message, writer: asyncio.StreamWriter) -> None:
                await asyncio.sleep(60)

            clients: list[Client] = []
            for script in (endless, silent):
                gateway.engines["a"].script = script
                clients.append(await gateway.connect())
                clients[-1].send("/x", COMPLETE)
                await until(lambda: len(gateway.engines["a"].requests) == len(clients))
            await asyncio.sleep(0.05)
            await gateway.server.drain(0.2)
            streamed = await clients[0].answer()
            assert b'"code": "shutdown"' in streamed.body
            assert streamed.body.endswith(b"data: [DONE]\n\n")
            assert (await clients[1].answer()).status == 503

    run(scenario())


@pytest.mark.parametrize("rest", [b"unk\n\n\r\n", b"unk\n\n\r", b"unk\n\n\r\n" + chunk(b"data: more\n\n"), b""])
def test_a_chunk_that_has_begun_is_read_to_its_end_before_the_error(rest: bytes) -> None:
    async def scenario() -> None:
        async with served("a") as gateway, await gateway.connect() as client:
            late = asyncio.Event()

            async def halves(request: Message, writer: asyncio.StreamWriter) -> None:
                writer.write(STREAM_HEAD + chunk(b"data: 1\n\n") + b"17\r\ndata: half of a ch")
                await late.wait()
                await asyncio.sleep(0.1)
                writer.write(rest)
                await asyncio.sleep(60)

            gateway.engines["a"].script = halves
            client.send("/x", COMPLETE)
            await until(lambda: bool(gateway.engines["a"].requests))
            asyncio.get_running_loop().call_later(0.2, late.set)
            await gateway.server.drain(0.2)
            if len(rest) < len(b"unk\n\n\r\n"):  # the chunk never ends
                with pytest.raises(ConnectionError):
                    await client.answer()
                return
            events = [line for line in (await client.answer()).body.decode().split("\n\n") if line]
            assert events[:2] == ["data: 1", "data: half of a chunk"]
            assert '"code": "shutdown"' in events[2]
            assert events[3:] == ["data: [DONE]"]

    run(scenario())
