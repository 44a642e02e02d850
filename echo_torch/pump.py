"""What goes over one socket: acks in, rows out, and what of it the ring's counters say.

* Whoever calls anything here but `Pump.writable` and `Pump.in_the_air` holds the connection's I/O lock. Nothing blocks.
* The holder may be the main thread, which Ctrl-C can interrupt after any call. So what a system call did is recorded by
  the C code that made it (`_record`), and taken into the counters by plain assignments that nothing can come between.
  A pump that was broken off is completed by the next one.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .errors import ConnectionClosedError
from .ring import Ring
from .wire import check_acks

# Acks read by one system call, in bytes, one each.
ACK_BYTES = 64 * 1024
# How many acks must lie in the kernel before the I/O thread is woken, while somebody waits for them: they come one
# byte a segment, and a wake-up for each costs more than the sample did. No more than this share of the window, though:
# with half a window of 32, a server's queue ran dry and its threads slept for milliseconds.
EAGER_ACKS = 16
EAGER_SHARE = 8
# The same while nobody waits, as a share of the window. Callers read them in passing before that many are there.
LAZY_SHARE = 2
CALLER_SHARE = 4

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class Pump:
    """Moves the rows of ``ring`` through ``sock``, at most ``window`` of them un-acked."""

    def __init__(self, sock: socket.socket, ring: Ring, window: int) -> None:
        self.sock = sock
        self.ring = ring
        self.window = window
        self.full = False
        """Whether the socket took no more at the last try; reset by who saw that it does again."""
        self.progress_at = time.monotonic()
        """When the last ack came, or the oldest un-acked row was begun if that was later."""
        self._partial = 0  # bytes of row `written` that are written
        self._sent: deque[int] = deque()
        self._received: deque[int] = deque()
        self._acks = bytearray(ACK_BYTES)
        self._ack_mark = 1

    @property
    def writable(self) -> bool:
        """Whether there are rows to write that the window lets through."""
        return self.ring.written < min(self.ring.packed, self.ring.acked + self.window)

    @property
    def in_the_air(self) -> bool:
        """Whether anything was written that is not acked."""
        return self.ring.written > self.ring.acked or self._partial > 0

    def run(self, read_acks: bool, write_bytes: int, eager: bool) -> None:
        """Read the acks that are there, write rows, and say when the next acks are worth a wake-up.

        Args:
            read_acks: even if few can be there.
            write_bytes: write about that much at the most.
            eager: whether somebody waits for acks.

        Raises:
            OSError: the connection is lost, or the peer broke the protocol.
        """
        self._take_acks()
        self._take_sent()
        if read_acks or (self.ring.written - self.ring.acked) * CALLER_SHARE >= self.window:
            self._read_acks()
        if not self.full:
            self._write_rows(write_bytes)
        self._set_ack_mark(eager or self.ring.packed > self.ring.written)

    def _read_acks(self) -> None:
        with contextlib.suppress(BlockingIOError):
            _record(self._received, self.sock.recv_into, (self._acks,))
            self._take_acks()

    def _take_acks(self) -> None:
        received = self._received
        if not received:
            return
        count = received[0]
        if count == 0:
            raise ConnectionClosedError("the peer closed the connection")
        check_acks(self._acks, count, self.ring.written - self.ring.acked)
        self.progress_at = time.monotonic()
        # Nothing comes between the next two lines: see the module's rules.
        self.ring.acked = self.ring.acked + count
        received.clear()

    def _write_rows(self, max_bytes: int) -> None:
        """Write what the window lets through: at most about ``max_bytes``, or until the socket is full."""
        ring = self.ring
        while max_bytes > 0 and self.writable:
            limit = min(ring.packed, ring.acked + self.window)
            view = ring.written_view(self._partial, limit, max_bytes)
            try:
                _record(self._sent, self.sock.send, (view,), (_NO_SIGNAL,))
            except BlockingIOError:
                self.full = True
                return
            except OSError:
                self._read_acks()  # the peer may have acked before it hung up
                raise
            max_bytes -= self._take_sent()

    def _take_sent(self) -> int:
        sent = self._sent
        if not sent:
            return 0
        if not self.in_the_air:
            self.progress_at = time.monotonic()
        count = sent[0]
        total = self._partial + count
        # Nothing comes between the next three lines: see the module's rules.
        self.ring.written = self.ring.written + total // self.ring.row_bytes
        self._partial = total % self.ring.row_bytes
        sent.clear()
        return count

    def _set_ack_mark(self, eager: bool) -> None:
        """Say how many acks must have come before the thread is woken; see EAGER_ACKS."""
        if eager:
            mark = max(1, min(EAGER_ACKS, self.window // EAGER_SHARE, self.ring.written - self.ring.acked))
        else:
            mark = max(1, self.window // LAZY_SHARE)
        if mark != self._ack_mark:
            with contextlib.suppress(OSError):  # not on this platform: a wake-up for every ack
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._ack_mark = mark


def _record(log: deque[int], call: Callable[..., int], *args: tuple[Any]) -> None:
    """Make a system call and append what it gives to ``log``, in one piece of C code that no interrupt can divide.

    ``args`` holds each argument in a tuple of its own.
    """
    log.extend(map(call, *args))
