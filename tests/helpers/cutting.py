"""A TCP proxy that cuts connections: at exact byte offsets drawn at random, or on request.

* One thread polls everything. It blocks only to connect to the server, which is on this machine.
* Each direction of a connection holds at most one piece of `PIECE_BYTES`. The proxy reads nothing that it can't pass
  on.
* A budget counts the bytes read in one direction. When it is spent and all those bytes are passed on, the proxy cuts
  the connection. Everything else under way is lost, in both directions. Bytes that were passed on may be lost too, if
  the receiver's kernel had no room for them and the cut is a reset, as on any network.
* If a client or server ends its connection, the proxy ends the other side in the same way.
"""

from __future__ import annotations

import contextlib
import math
import random
import select
import socket
import struct
import time
from collections import Counter
from multiprocessing.connection import Connection as Pipe
from typing import Any

from spawned import HelperProcess, answer_request

PIECE_BYTES = 64 * 1024

FIN, RST, SILENCE = "FIN", "RST", "silence"
"""How to end one side of a connection. Silence is `SILENCE_S` without anything, and then a FIN."""

KINDS = {
    "fin": (FIN, FIN),
    "reset": (RST, RST),
    "reset_client": (RST, SILENCE),
    "reset_server": (SILENCE, RST),
    "half_fin": (FIN, RST),
    "half_reset": (RST, FIN),
}
"""The cuts by name: how each ends the client's side, and how the server's."""

SILENCE_S = 0.05
FIN_TIMEOUT_S = 2.0
"""Seconds after a FIN in which the receiver has to end its side too."""

CONNECT_S = 5.0

LOST_ON_RESET = struct.pack("ii", 1, 0)


class Cutter(HelperProcess):
    """The proxy's process, as a context manager. It listens on ``127.0.0.1``.

    Args:
        server: the port on ``127.0.0.1`` to connect to.
        most_bytes: most bytes from the client before a cut. All magnitudes are drawn, larger ones more often.
        most_acks: most bytes from the server before a cut. About every other cut counts these.
        seed: of the random numbers.
        kinds: the cuts to draw from.
        sizes: bytes of a greeting and of a payload, needed to count un-acked payloads.
    """

    def __init__(
        self,
        server: int,
        *,
        most_bytes: int = 1 << 20,
        most_acks: int = 1 << 12,
        seed: int = 0,
        kinds: tuple[str, ...] = tuple(KINDS),
        sizes: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(_serve, server, _Plan(most_bytes, most_acks, seed, kinds), sizes)
        self.port: int = self._answer()

    def counts(self) -> Counter[str]:
        """Return how many connections were accepted ("connections") and cut: in all ("cuts"), and by kind."""
        return self._ask("counts")

    def watch(self) -> None:
        """Begin to count the un-acked payloads of future connections."""
        self._ask("watch")

    def most_unacked(self) -> int:
        """Return the most un-acked payloads of any connection since `watch`, partly received ones included."""
        return self._ask("most_unacked")

    def cut_at_random(self, cuts: int) -> None:
        """Cut open and future connections at random offsets, until ``cuts`` were cut."""
        self._ask("cut_at_random", cuts)

    def cut(self, kind: str) -> int:
        """Cut all connections now. Return how many there were."""
        return self._ask("cut", kind)

    def redirect_to(self, server: int) -> None:
        """Connect future clients to this port."""
        self._ask("redirect_to", server)

    def stop_listening(self) -> None:
        """Refuse connections from now on. Open ones stay."""
        self._ask("stop_listening")

    def listen_again(self) -> None:
        self._ask("listen_again")

    def freeze(self) -> None:
        """Read and pass on nothing. Connections stay open, and new ones get no answer."""
        self._ask("freeze")

    def thaw(self) -> None:
        self._ask("thaw")


class _Plan:
    """Draws when and how to cut the next connection."""

    def __init__(self, most_bytes: int, most_acks: int, seed: int, kinds: tuple[str, ...]) -> None:
        self._most = (most_bytes, most_acks)
        self._random = random.Random(seed)
        self._kinds = kinds

    def draw(self) -> tuple[str, int, int]:
        """Return a kind of cut, the direction whose bytes count (0 is the client's), and the number of bytes."""
        direction = self._random.randrange(2)
        magnitude = math.log(self._most[direction] + 1)
        budget = int(math.exp(self._random.triangular(0, magnitude, magnitude))) - 1
        return self._random.choice(self._kinds), direction, budget


class _Direction:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.budget = math.inf
        self.read = 0
        # Whether a FIN ended this direction. The FIN was passed on.
        self.ended = False
        self._held = memoryview(b"")

    @property
    def spent(self) -> bool:
        return self.budget == 0 and not self._held

    @property
    def waits_for(self) -> tuple[socket.socket, int] | None:
        if self._held:
            return self.sink, select.POLLOUT
        return None if self.ended or self.spent else (self.source, select.POLLIN)

    def move(self) -> None:
        """Pass on what is there. Raises OSError if either end was reset."""
        with contextlib.suppress(BlockingIOError):
            if not self._held:
                self._read()
            if self._held:
                self._held = self._held[self.sink.send(self._held) :]

    def _read(self) -> None:
        piece = self.source.recv(int(min(PIECE_BYTES, self.budget)))
        self.budget -= len(piece)
        self.read += len(piece)
        self._held = memoryview(piece)
        if not piece:
            self.ended = True
            self.sink.shutdown(socket.SHUT_WR)


class _ConnectionPair:
    """One client's connection and the connection to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.ends = (client, server)
        self.directions = (_Direction(client, server), _Direction(server, client))
        self.kind = ""
        self.watched = True

    @property
    def spent(self) -> bool:
        return any(direction.spent for direction in self.directions)

    @property
    def ended(self) -> bool:
        return all(direction.ended for direction in self.directions)


class _ClosingSocket:
    """One side of a connection that was cut: sends its FIN when it is due, and discards what still arrives."""

    def __init__(self, sock: socket.socket, silence: float) -> None:
        self.sock = sock
        self.fin_at: float = time.monotonic() + silence
        self.ends_at: float = self.fin_at + FIN_TIMEOUT_S
        self._fin_sent = False

    @property
    def next_at(self) -> float:
        return self.ends_at if self._fin_sent else self.fin_at

    def poll_closed(self) -> bool:
        """Check the socket, and close it if it is done. Return whether it was closed."""
        now = time.monotonic()
        try:
            if now >= self.fin_at and not self._fin_sent:
                self._fin_sent = True
                self.sock.shutdown(socket.SHUT_WR)
            gone = not self.sock.recv(PIECE_BYTES)
        except BlockingIOError:
            gone = False
        except OSError:
            gone = True
        if gone or now >= self.ends_at:
            self.sock.close()
            return True
        return False


class _Proxy:
    """What runs in the process. Its public methods are those of `Cutter`."""

    def __init__(self, server: int, plan: _Plan, sizes: tuple[int, int] | None) -> None:
        self._server = server
        self._plan = plan
        self._sizes = sizes
        self._most_unacked = 0
        self._last_cut = 0
        self._counts: Counter[str] = Counter()
        self._pairs: list[_ConnectionPair] = []
        self._closing: list[_ClosingSocket] = []
        self._frozen = False
        # Bound, but never listening. It keeps the port ours while we refuse connections, so that no outgoing connection
        # of another process gets it.
        self._placeholder = _bound(0)
        self.port: int = self._placeholder.getsockname()[1]
        self._listener: socket.socket | None = None
        self.listen_again()

    def counts(self) -> Counter[str]:
        return self._counts

    def watch(self) -> None:
        self._most_unacked = 0
        for pair in self._pairs:
            pair.watched = False

    def most_unacked(self) -> int:
        return self._most_unacked

    def cut_at_random(self, cuts: int) -> None:
        self._last_cut = self._counts["cuts"] + cuts
        for pair in list(self._pairs):
            self._schedule_cut(pair)

    def cut(self, kind: str) -> int:
        pairs = list(self._pairs)
        for pair in pairs:
            self._cut(pair, kind)
        return len(pairs)

    def redirect_to(self, server: int) -> None:
        self._server = server

    def stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def listen_again(self) -> None:
        if self._listener is None:
            self._listener = _bound(self.port)
            self._listener.listen()

    def freeze(self) -> None:
        self._frozen = True

    def thaw(self) -> None:
        self._frozen = False

    def run(self, pipe: Pipe) -> None:
        while True:
            ready = self._poll(pipe)
            if pipe.fileno() in ready:
                answer_request(pipe, self)
                # The request may have closed other sockets that were ready.
                continue
            self._closing = [closing for closing in self._closing if not closing.poll_closed()]
            if self._frozen:
                continue
            for pair in list(self._pairs):
                self._serve(pair, ready)
            if self._listener is not None and self._listener.fileno() in ready:
                self._accept(self._listener)

    def _poll(self, pipe: Pipe) -> set[int]:
        """Block until anything happens. Return the descriptors that are ready."""
        interest: Counter[int] = Counter({pipe.fileno(): select.POLLIN})
        if self._listener is not None and not self._frozen:
            interest[self._listener.fileno()] = select.POLLIN
        for closing in self._closing:
            interest[closing.sock.fileno()] = select.POLLIN
        for pair in [] if self._frozen else self._pairs:
            for direction in pair.directions:
                if wanted := direction.waits_for:
                    interest[wanted[0].fileno()] |= wanted[1]
        poller = select.poll()
        for descriptor, events in interest.items():
            poller.register(descriptor, events)
        now = time.monotonic()
        timeout = min((closing.next_at for closing in self._closing), default=math.inf) - now
        return {descriptor for descriptor, _ in poller.poll(None if timeout == math.inf else max(0.0, timeout) * 1000)}

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        self._counts["connections"] += 1
        try:
            server = socket.create_connection(("127.0.0.1", self._server), CONNECT_S)
        except OSError:
            _reset(client)
            return
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
        pair = _ConnectionPair(client, server)
        self._pairs.append(pair)
        self._schedule_cut(pair)

    def _schedule_cut(self, pair: _ConnectionPair) -> None:
        """Draw when and how to cut a connection, if more cuts are due."""
        if self._counts["cuts"] < self._last_cut:
            pair.kind, direction, budget = self._plan.draw()
            pair.directions[direction].budget = budget
            self._cut_if_spent(pair)

    def _serve(self, pair: _ConnectionPair, ready: set[int]) -> None:
        try:
            for direction in pair.directions:
                wanted = direction.waits_for
                if wanted and wanted[0].fileno() in ready:
                    direction.move()
                    self._count_unacked(pair)
        except OSError:
            self._end(pair, RST, RST)
            return
        if pair.ended:
            self._end(pair, FIN, FIN)
        else:
            self._cut_if_spent(pair)

    def _count_unacked(self, pair: _ConnectionPair) -> None:
        """Update the most un-acked payloads.

        Acks read here but not passed on yet lower the count below what the client may see. They never raise it.
        """
        if self._sizes and pair.watched:
            greeting, payload = self._sizes
            unacked = -(-pair.directions[0].read // payload) - max(0, pair.directions[1].read - greeting)
            self._most_unacked = max(self._most_unacked, unacked)

    def _cut_if_spent(self, pair: _ConnectionPair) -> None:
        if not pair.spent:
            return
        if self._counts["cuts"] < self._last_cut:
            self._cut(pair, pair.kind)
        else:
            # Another connection was cut first.
            for direction in pair.directions:
                direction.budget = math.inf

    def _cut(self, pair: _ConnectionPair, kind: str) -> None:
        self._counts["cuts"] += 1
        self._counts[kind] += 1
        self._end(pair, *KINDS[kind])

    def _end(self, pair: _ConnectionPair, *how: str) -> None:
        self._pairs.remove(pair)
        for sock, end in zip(pair.ends, how, strict=True):
            if end == RST:
                _reset(sock)
            else:
                self._closing.append(_ClosingSocket(sock, SILENCE_S if end == SILENCE else 0.0))


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LOST_ON_RESET)
    sock.close()


def _serve(pipe: Pipe, *arguments: Any) -> None:
    proxy = _Proxy(*arguments)
    pipe.send(proxy.port)
    proxy.run(pipe)
