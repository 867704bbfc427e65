"""A server that sends broken responses; the model's name selects the fault, and `in-turn` goes through all of them.

python faulty_server.py --port 9000 [--self-signed FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_NEVER_S = 60.0


def chunk(data: bytes) -> bytes:
    """Return one chunk of a chunked HTTP body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(text: str = " a", usage: int | None = None) -> bytes:
    """Return one event of a streamed chat."""
    body: dict[str, object] = {"choices": [{"index": 0, "delta": {"content": text}}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": 5, "completion_tokens": usage}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def stream(*parts: bytes) -> bytes:
    """Return a complete streamed response."""
    return _SSE_HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n"


def status(code: int, body: bytes = b'{"error": 1}', kind: bytes = b"application/json") -> bytes:
    """Return a complete response that is no stream."""
    head = b"HTTP/1.1 %d Whatever\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (code, kind, len(body))
    return head + body


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
TOKENS = token(usage=1) + token(usage=2)
USAGE = {"prompt_tokens": 5, "completion_tokens": 2}
CALL = {"delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{}"}}]}}
ANSWERS: dict[str, tuple[bytes, str | None]] = {
    "good": (stream(TOKENS, DONE), None),
    "no-usage": (stream(token(), token(), DONE), None),
    "http-401": (status(401), "http 401"),
    "http-404": (status(404), "http 404"),
    "http-500": (status(500), "http 500"),
    "broken-json": (stream(TOKENS, b"data: {not json\n\n", DONE), "broken json"),
    "no-events": (stream(b"<html>welcome</html>\n"), "broken event stream"),
    "half-event": (stream(TOKENS, b'data: {"choices": [{"del'), "half an event at the end"),
    "invalid-utf8": (stream(token("a").replace(b'"a"', b'"\xff\xfe"'), DONE), "invalid utf-8"),
    "error-event": (stream(TOKENS, b'data: {"error": {"message": "out of memory"}}\n\n'), "error in stream"),
    "no-done": (stream(TOKENS), "stream ended early"),
    "empty": (stream(DONE), "empty answer"),
    "broken-http": (b"SMTP/1.0 hello\r\n\r\n", "broken http"),
    "broken-chunk": (_SSE_HEAD + chunk(TOKENS) + b"zz\r\n", "broken http"),
    "half-chunk": (_SSE_HEAD + chunk(TOKENS) + b"ff\r\ndata: {", "closed in mid-stream"),
    "closes-in-stream": (_SSE_HEAD + chunk(TOKENS), "closed in mid-stream"),
    "closes-in-answer": (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "closed in mid-answer"),
    "closes-at-once": (b"", "closed before an answer"),
    "resets": (_SSE_HEAD + chunk(TOKENS), "connection reset"),
    "tool-calls": (stream(event({"choices": [CALL]}), event({"choices": [CALL]}), DONE), None),
    "null-choices": (stream(token(), token(), event({"choices": None, "usage": USAGE}), DONE), None),
    "no-choices": (stream(token(), token(), event({"usage": USAGE}), DONE), None),
    "null-usage": (stream(token(), token(), event({"choices": [], "usage": None}), DONE), None),
    "reasoning": (stream(event({"choices": [{"delta": {"reasoning": "h"}}]}), token(), DONE), None),
    "other-lines": (stream(b": ping\r\n\r\n", TOKENS.replace(b"data: ", b"data:").replace(b"\n", b"\r\n"), DONE), None),
    "not-streamed": (
        status(200, json.dumps({"choices": [{"message": {"content": "a b"}}], "usage": USAGE}).encode()),
        None,
    ),
    "no-message": (status(200, b'{"choices": [{"index": 0}]}'), "no reply in answer"),
    "error-with-200": (status(200, b'{"error": {"message": "no such adapter"}}'), "error in answer"),
    "web-page": (status(200, b"<html><title>Sign in</title></html>", b"text/html"), "broken event stream"),
    "http-400": (status(400, b'{"error": {"message": "max_tokens is too large: 4096"}}'), "http 400"),
    "http-422": (status(422, b'{"detail": [{"loc": ["body", "n"], "msg": "Field required"}]}'), "http 422"),
    "http-502": (status(502, b"<html><title>502 Bad Gateway</title></html>", b"text/html"), "http 502"),
    "error-text": (stream(TOKENS, b"event: error\ndata: overloaded\n\n"), "error in stream"),
    "never-answers": (b"", "timeout"),
    "stops-in-stream": (_SSE_HEAD + chunk(TOKENS), "timeout"),
}
"""Response and expected kind of failure by model name; None for a good response, which has two tokens."""
SENTENCES = {
    "error-event": "out of memory",
    "error-with-200": "no such adapter",
    "web-page": "Sign in",
    "http-400": "max_tokens is too large: 4096",
    "http-422": "n: Field required",
    "http-502": "502 Bad Gateway",
    "error-text": "overloaded",
    "no-events": "welcome",
}
"""What the server says about the failure, by model name."""
_KEPT_OPEN = {name for name, (_, error) in ANSWERS.items() if error is None or error.startswith("http ")}


class FaultyServer:
    """Serves each connection in its own thread."""

    def __init__(self) -> None:
        self._turns = itertools.cycle(ANSWERS)

    def serve(self, port: int, wrap: Callable[[socket.socket], socket.socket]) -> None:
        with socket.create_server(("127.0.0.1", port), backlog=200) as listener:
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._answer_all, args=(connection, wrap), daemon=True).start()

    def _answer_all(self, plain: socket.socket, wrap: Callable[[socket.socket], socket.socket]) -> None:
        try:
            with wrap(plain) as connection:
                while self._answer(connection):
                    pass
        except OSError:
            pass  # the client disconnected

    def _answer(self, connection: socket.socket) -> bool:
        """Answer one request; return whether the connection stays open."""
        received = b""
        while b"\r\n\r\n" not in received:
            data = connection.recv(65536)
            if not data:
                return False
            received += data
            if received[:1] not in {b"G", b"P"}:
                connection.sendall(status(400))
                return False
        head, _, body = received.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields.get(b"content-length", 0))
        while len(body) < length:
            body += connection.recv(65536)
        if head.startswith(b"GET"):
            document = json.dumps({"data": [{"id": name} for name in ("in-turn", *ANSWERS)]}).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(document), document))
            return True
        model = json.loads(body)["model"]
        name = next(self._turns) if model == "in-turn" else model
        connection.sendall(ANSWERS[name][0])
        if ANSWERS[name][1] == "timeout":
            time.sleep(_NEVER_S)
        if name == "resets":
            time.sleep(0.05)  # lets the client read the bytes before the reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return name in _KEPT_OPEN


def make_certificate(file: Path) -> None:
    """Write a key and a self-signed certificate for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    plain_key = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(plain_key + certificate.public_bytes(pem))


def main() -> None:
    parser = argparse.ArgumentParser(description="Server that sends broken responses.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--self-signed", type=Path, help="use TLS with a new certificate in this file")
    arguments = parser.parse_args()
    if arguments.self_signed:
        make_certificate(arguments.self_signed)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(arguments.self_signed)
        FaultyServer().serve(arguments.port, lambda plain: tls.wrap_socket(plain, server_side=True))
    FaultyServer().serve(arguments.port, lambda plain: plain)


if __name__ == "__main__":
    main()
