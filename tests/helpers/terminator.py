"""A proxy that terminates TLS in front of a learner, in its own process: Python's ``ssl``, on asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from multiprocessing.connection import Connection as Pipe
from typing import Any

from spawned import HelperProcess, answer_request

_PIECE = 1 << 16


class Terminator(HelperProcess):
    """The proxy, as a context manager.

    Args:
        backend: the learner's port.
        cert_file: the proxy's certificate and key.
        client_ca: the CA of the certificates that clients must have; None asks for none.
        most: the highest TLS version, as a name of ``ssl.TLSVersion``.
        port: where it listens; 0 lets the system choose.
    """

    def __init__(
        self,
        backend: int,
        cert_file: str,
        *,
        client_ca: str | None = None,
        most: str = "MAXIMUM_SUPPORTED",
        port: int = 0,
    ) -> None:
        super().__init__(_serve, backend, port, cert_file, client_ca, most)
        self.port: int = self._answer()

    def cut(self, abort: bool = False) -> int:
        """End all connections, by closing them in order or, with ``abort``, by RST. Return how many there were."""
        return self._ask("cut", abort)

    def stall(self) -> None:
        """Forward nothing that clients send, until `resume`."""
        self._ask("stall")

    def resume(self) -> None:
        self._ask("resume")

    def versions(self) -> list[str]:
        """Return the TLS versions of all connections so far."""
        return self._ask("versions")


class _Proxy:
    def __init__(self, loop: asyncio.AbstractEventLoop, backend: int, port: int, context: ssl.SSLContext) -> None:
        self._loop = loop
        self._backend = backend
        self._clients: set[asyncio.StreamWriter] = set()
        self._versions: list[str] = []
        self._forwarding = asyncio.Event()
        self._forwarding.set()
        self.port = asyncio.run_coroutine_threadsafe(self._listen(port, context), loop).result()

    async def _listen(self, port: int, context: ssl.SSLContext) -> int:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port, ssl=context)
        return self._server.sockets[0].getsockname()[1]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        self._versions.append(writer.get_extra_info("ssl_object").version())
        with contextlib.suppress(OSError):
            theirs, ours = await asyncio.open_connection("127.0.0.1", self._backend)
            await asyncio.gather(self._forward(reader, ours, True), self._forward(theirs, writer, False))
        self._clients.discard(writer)
        writer.close()

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, gated: bool) -> None:
        # Suppress the error of a connection that ends with a RST.
        with contextlib.suppress(OSError):
            while data := await source.read(_PIECE):
                if gated:
                    await self._forwarding.wait()
                sink.write(data)
                await sink.drain()
        sink.close()

    def _call(self, function: Any, *arguments: Any) -> None:
        async def call() -> None:
            function(*arguments)

        asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def cut(self, abort: bool) -> int:
        clients = list(self._clients)
        for writer in clients:
            self._call(writer.transport.abort if abort else writer.close)
        return len(clients)

    def stall(self) -> None:
        self._call(self._forwarding.clear)

    def resume(self) -> None:
        self._call(self._forwarding.set)

    def versions(self) -> list[str]:
        return self._versions


def _serve(pipe: Pipe, backend: int, port: int, cert_file: str, client_ca: str | None, most: str) -> None:
    context = server_context(cert_file, client_ca, most)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    proxy = _Proxy(loop, backend, port, context)
    pipe.send(proxy.port)
    while True:
        answer_request(pipe, proxy)


def server_context(cert_file: str, client_ca: str | None = None, most: str = "MAXIMUM_SUPPORTED") -> ssl.SSLContext:
    """Return the ``ssl`` context of a server, for the arguments of a `Terminator`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion[most]
    context.load_cert_chain(cert_file)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    return context
