"""Tests of HTTP exchanges with a server that sends known bytes, and with plain sockets."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET, SOCK_STREAM, create_server, socket
from types import SimpleNamespace

import gevent
import pytest

from slimserve.loadtest.http_client import Exchange, HttpClient
from slimserve.loadtest.sse import read_stream
from slimserve.serve.launch.process import free_port
from tests.conftest import measures_time
from tests.loadtest.faulty_server import ANSWERS, TOKENS, chunk

pytestmark = measures_time

_FAULTY_SERVER = Path(__file__).parent / "faulty_server.py"


@contextmanager
def faulty_server(*options: str) -> Iterator[int]:
    """Run faulty_server.py in its own process and yield its port."""
    port = free_port()
    server = subprocess.Popen([sys.executable, str(_FAULTY_SERVER), "--port", str(port), *options])
    try:
        while True:
            assert server.poll() is None
            with socket(AF_INET, SOCK_STREAM) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def faulty_url() -> Iterator[str]:
    with faulty_server() as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def scripted(*turns: Callable[[socket], None]) -> Iterator[str]:
    """Yield the URL of a server that handles its i-th connection with the i-th function."""
    with create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for turn in turns:
                connection, _ = listener.accept()
                with connection:
                    turn(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)
        assert not thread.is_alive(), "not every connection was made"


def read_request(connection: socket) -> bytes:
    """Read one request whose body has two bytes."""
    received = b""
    while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < 2:
        data = connection.recv(65536)
        assert data
        received += data
    return received


def ask(url: str, model: str, timeout_s: float = 0.5) -> Exchange:
    return HttpClient(url, {}, timeout_s).post("/v1/chat/completions", json.dumps({"model": model}).encode())


@pytest.mark.parametrize("model", ANSWERS)
def test_each_fault_has_its_own_error(faulty_url: str, model: str) -> None:
    exchange = ask(faulty_url, model)
    error = exchange.error or (f"http {exchange.status}" if exchange.status != 200 else None)
    streamed = read_stream(exchange.pieces)
    assert (error or streamed.error) == ANSWERS[model][1]
    assert exchange.end_s >= exchange.sent_s
    if model in {"closes-in-stream", "resets", "stops-in-stream", "broken-chunk"}:
        assert streamed.output_tokens == 2, "tokens before the fault are kept"


def test_a_request_ends_after_its_timeout(faulty_url: str) -> None:
    exchange = ask(faulty_url, "never-answers", timeout_s=0.3)
    assert exchange.end_s - exchange.sent_s == pytest.approx(0.3, abs=0.1)


def test_one_stream_does_not_wait_for_another(faulty_url: str) -> None:
    client = HttpClient(faulty_url, {}, 0.5)
    bodies = [json.dumps({"model": model}).encode() for model in ["never-answers"] * 20 + ["good"] * 20]
    begin = time.perf_counter()
    jobs = [gevent.spawn(client.post, "/v1/chat/completions", body) for body in bodies]
    gevent.joinall(jobs)
    assert time.perf_counter() - begin < 2
    assert [job.value.error for job in jobs] == ["timeout"] * 20 + [None] * 20
    client.close()


def test_a_refused_connection_and_an_unknown_host_are_different_errors() -> None:
    assert ask(f"http://127.0.0.1:{free_port()}", "good").error == "connection refused"
    assert ask("http://no-such-host.invalid", "good", timeout_s=20).error == "unknown host"
    assert ask(f"http://{'x' * 70}.invalid", "good", timeout_s=20).error == "unknown host"


def test_a_server_without_tls_and_a_self_signed_certificate_are_errors(faulty_url: str, tmp_path: Path) -> None:
    assert ask(faulty_url.replace("http", "https"), "good", timeout_s=5).error == "tls failed"
    with faulty_server("--self-signed", str(tmp_path / "own.pem")) as port:
        assert ask(f"https://127.0.0.1:{port}", "good", timeout_s=5).error == "tls failed"


def test_answers_are_read_over_tls_with_a_trusted_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
    with faulty_server("--self-signed", str(tmp_path / "own.pem")) as port:
        client = HttpClient(f"https://127.0.0.1:{port}", {}, 5)
        for _ in range(2):
            exchange = client.post("/v1/chat/completions", b'{"model": "good"}')
            assert (exchange.error, read_stream(exchange.pieces).output_tokens) == (None, 2)


def answer_ok(connection: socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def test_a_connection_is_reused_and_a_stale_one_is_replaced_without_an_error() -> None:
    received: list[bytes] = []

    def answer_two(connection: socket) -> None:
        for _ in range(2):
            received.append(read_request(connection))
            answer_ok(connection)

    def answer_one(connection: socket) -> None:
        received.append(read_request(connection))
        answer_ok(connection)

    with scripted(answer_two, answer_one) as url:
        client = HttpClient(f"{url}/base/", {"Authorization": "Bearer k"}, 5)
        for _ in range(3):
            exchange = client.post("/v1/x", b"{}")
            assert (exchange.error, exchange.status, exchange.body) == (None, 200, b"ok")
            gevent.sleep(0.05)  # the server's close arrives
        client.close()
    assert len(received) == 3
    assert received[0].startswith(b"POST /base/v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer k\r\n" in received[0]


def test_a_connection_that_failed_is_not_reused(faulty_url: str) -> None:
    client = HttpClient(faulty_url, {}, 0.3)
    for model in ("stops-in-stream", "good", "broken-http", "good", "http-500", "good"):
        exchange = client.post("/v1/chat/completions", json.dumps({"model": model}).encode())
    assert exchange.error is None


def test_interim_responses_and_bodies_that_end_with_the_connection_are_read() -> None:
    def answer(connection: socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.0 200 OK\r\nX-Name: V\r\n\r\nto the end")

    with scripted(answer) as url:
        exchange = HttpClient(url, {}, 5).post("/", b"{}")
    assert (exchange.error, exchange.status, exchange.body) == (None, 200, b"to the end")
    assert exchange.headers["x-name"] == "V"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives receive times")
@pytest.mark.parametrize("busy_s", [0.25, 1.4])
def test_bytes_have_the_kernels_receive_time_however_long_the_client_is_busy(busy_s: float) -> None:
    sent_s: list[float] = []

    def answer(connection: socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(TOKENS))
        time.sleep(0.1)
        sent_s.append(time.perf_counter())
        connection.sendall(chunk(TOKENS))
        time.sleep(busy_s + 0.1)
        connection.sendall(b"0\r\n\r\n")

    def be_busy() -> None:
        gevent.sleep(0.05)
        time.sleep(busy_s)  # blocks the loop while the second chunk arrives

    with scripted(answer) as url:
        busy = gevent.spawn(be_busy)
        exchange = HttpClient(url, {}, 5).post("/", b"{}")
        busy.join()
    assert exchange.error is None
    assert len(exchange.pieces) == 2
    assert exchange.pieces[1][0] == pytest.approx(sent_s[0], abs=0.02)


@pytest.mark.parametrize("step_s", [-3600.0, -0.5, 0.5, 3600.0])
def test_a_change_of_the_system_clock_does_not_move_a_receive_time(
    monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    steps = [0.0]

    def answer(connection: socket) -> None:
        read_request(connection)
        steps.append(step_s)
        time.sleep(0.05)
        answer_ok(connection)

    changing = SimpleNamespace(perf_counter=time.perf_counter, time=lambda: time.time() + steps[-1])
    monkeypatch.setattr("slimserve.loadtest.http_client.time", changing)
    with scripted(answer) as url:
        exchange = HttpClient(url, {}, 5).post("/", b"{}")
        end_s = time.perf_counter()
    assert exchange.error is None
    assert exchange.sent_s + 0.05 <= exchange.end_s <= end_s
