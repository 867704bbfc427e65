"""The proxy server: it accepts client connections and drains them at shutdown.

The relay between clients and engines is hand-written on httptools (llhttp), because a proxy shares the cores with the
engines and CPU time per streamed chunk is what it costs. `make bench-gateway` measured, on a shared 2-core machine,
64 streams and one chunk per 10 ms and stream, in CPU seconds per million chunks:

    this relay 17    nginx 14    HAProxy 16    aiohttp 45

At one chunk per 50 ms, closer to a real engine, this relay takes 20 to 23 and aiohttp 65 to 72. With 64 streams of 20
tokens/s that is 3% of a core against 9%, on cores that the engine computes on. nginx and HAProxy cannot end a cut
stream with an error event, nor route by a field of a body of any size.
"""

from __future__ import annotations

import asyncio
import socket

from slimserve.serve.gateway.client_side import CHUNK_TIMEOUT_S, ClientSide
from slimserve.serve.gateway.messages import ServerState
from slimserve.serve.policy.errors import shutdown


class ProxyServer(ServerState):
    """Listens on one address and serves an application."""

    _server: asyncio.Server | None = None

    async def start(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ClientSide(self, loop), sock=listener, backlog=2048)

    async def drain(self, seconds: float) -> None:
        """Let requests in flight finish for at most `seconds`, then end them with an error.

        The application rejects new requests meanwhile.
        """
        self.draining = True
        for connection in list(self.connections):
            connection.close_if_idle()
        if not await self._is_idle_within(seconds):
            error = shutdown(seconds)
            error.retry_after_s = 1
            for connection in list(self.connections):
                connection.interrupt(error)
            await self._is_idle_within(2 * CHUNK_TIMEOUT_S)

    async def _is_idle_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while any(connection.is_busy for connection in self.connections):
                    self.request_ended.clear()
                    await self.request_ended.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
        await asyncio.sleep(0.05)  # Lets the last bytes of the last answers leave.
        for connection in list(self.connections):
            connection.abort()
