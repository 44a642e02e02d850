"""Scripted peers: servers that do what you cannot make a real one do.

A `Peer` listens on its own port. It runs a script, a function of one accepted `PeerConnection`, on a thread for each
connection. When the peer closes, it raises what the script raised, unless that only says that the client left.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import optree

from echo_torch.wire.protocol import ACK, WireLeaf, encode_handshake

PATIENCE_S = 30.0
"""Seconds without data after which a peer gives up."""

LOST_ON_RESET = struct.pack("ii", 1, 0)


TCP_REPAIR = 19
"""A socket option from linux/tcp.h. A socket in this mode closes without sending anything."""


class PeerConnection:
    """The peer's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()

    def send_handshake(self, data_sample: Any) -> None:
        """Send the greeting of a server for samples like ``data_sample`` (numpy)."""
        self.send(greeting(data_sample))

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ack(self, count: int = 1) -> None:
        self.send(ACK * count)

    def receive(self, count: int) -> bytes:
        """Read exactly ``count`` bytes."""
        data = bytearray()
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise ConnectionError(f"the client left after {len(data)} of {count} bytes")
            data += piece
        self.received += data
        return bytes(data)

    def receive_all(self, ack_every: int = 0) -> None:
        """Read until the client leaves. With ``ack_every``, ack each further payload of that many bytes."""
        acked = len(self.received) // ack_every if ack_every else 0
        while piece := self.sock.recv(1 << 20):
            self.received += piece
            if ack_every:
                whole = len(self.received) // ack_every
                self.ack(whole - acked)
                acked = whole

    def close(self) -> None:
        """End the connection with a FIN."""
        # The client may have closed first.
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def drop_silently(self) -> None:
        """Close without sending anything, so that the client does not notice. Needs Linux and root."""
        self.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        self.sock.close()

    def reset(self) -> None:
        """End the connection with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LOST_ON_RESET)
        self.sock.close()


Script = Callable[[PeerConnection], None]


class Scripts:
    """Runs one script per connection, and the last one for all further connections."""

    def __init__(self, *scripts: Script) -> None:
        self._left = list(scripts)

    def __call__(self, conn: PeerConnection) -> None:
        script = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        script(conn)


class Peer:
    """Listens on ``127.0.0.1`` (or ``::1``) and runs ``script`` for each client. A context manager.

    Args:
        script: what to do with a client, on a thread for each.
        host: where to listen.
        receive_buffer: bytes that the system buffers for a script that does not read; None for its default.
    """

    def __init__(self, script: Script, host: str = "127.0.0.1", receive_buffer: int | None = None) -> None:
        self.host = host
        self.port = 0
        self.connections: list[PeerConnection] = []
        self._script = script
        self._receive_buffer = receive_buffer
        self._errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self.listen()

    def listen(self) -> None:
        """Accept clients, on the same port as before."""
        self._listener = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        if self._receive_buffer is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((self.host, self.port))
        self._listener.listen()
        self.port = self._listener.getsockname()[1]
        self._threads.append(threading.Thread(target=self._accept, daemon=True))
        self._threads[-1].start()

    def refuse(self) -> None:
        """Accept no more clients. Connected ones stay."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(PATIENCE_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                conn = PeerConnection(sock)
                self.connections.append(conn)
                self._threads.append(threading.Thread(target=self._run, args=(conn,), daemon=True))
                self._threads[-1].start()

    def _run(self, conn: PeerConnection) -> None:
        try:
            self._script(conn)
        except ConnectionError:
            pass  # the client left; the test checks whether it should have
        except OSError as error:
            if conn.sock.fileno() >= 0:
                self._errors.append(error)
        except BaseException as error:
            self._errors.append(error)
            conn.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.refuse()
        for conn in self.connections:
            with contextlib.suppress(OSError):
                conn.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for conn in self.connections:
            conn.sock.close()
        if self._errors and kind is None:
            raise self._errors[0]


@contextlib.contextmanager
def full_queue() -> Iterator[socket.socket]:
    """Yield a listener that never accepts and whose queue is full, so that connecting gets no answer."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            queued = stack.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(listener.getsockname())
        yield listener


def greeting(data_sample: Any) -> bytes:
    leaves: Sequence[np.ndarray[Any, Any]] = optree.tree_leaves(data_sample)
    return encode_handshake([WireLeaf(leaf.dtype.itemsize, leaf.shape) for leaf in leaves])
