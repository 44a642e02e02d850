"""What goes over one socket: acks in, rows out, and what of it the ring's counters say.

* A socket that follows a lost one begins with rows that were acked before. Their acks count here, for the window, and
  settle nothing in the ring.
* Whoever calls anything here but `Pump.has_writable_rows` and `Pump.awaits_acks` holds the connection's I/O lock. Nothing blocks.
* The holder may be the main thread, which Ctrl-C can interrupt after any call. So what a system call did is recorded by
  the C code that made it (`call_and_append`), and taken into the counters by plain assignments that nothing can come between.
  A pump that was broken off is completed by the next one.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque

from echo_torch.errors import ConnectionClosedError
from echo_torch.metrics.timing import LatencyHistogram
from echo_torch.ring.ring import Ring
from echo_torch.support.interrupts import call_and_append
from echo_torch.wire.protocol import check_acks

# Most acks read by one system call, in bytes, one each; of a smaller window there are no more than that, and one that
# was too many. A machine may have hundreds of connections.
ACK_BUFFER_BYTES = 64 * 1024
# How many acks must lie in the kernel before whoever polls for them is woken: they come one byte a segment, and a
# wake-up for each costs more than the sample did. The server may have some ten segments under way before TCP
# acknowledges them, which it does at once when we read or send, and else after up to 40 ms. So: few while a caller
# waits and nothing is sent, more while there are rows to send, and never more than this share of the window.
LOW_WATER_ACKS = 8
LOW_WATER_ACKS_SENDING = 16
LOW_WATER_WINDOW_DIVISOR = 4
# Callers read acks in passing when this share of the window is un-acked.
CALLER_READ_WINDOW_DIVISOR = 2

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class Pump:
    """Moves the rows of ``ring`` from ``ring.written`` on through ``sock``, at most ``window`` of them un-acked."""

    def __init__(self, sock: socket.socket, ring: Ring, window: int, latencies: LatencyHistogram | None = None) -> None:
        self.sock = sock
        self.latencies = LatencyHistogram() if latencies is None else latencies
        self.ring = ring
        self.window = window
        self.acked = ring.written
        """How far this socket's peer acked; less than ``ring.acked`` while rows are sent again."""
        self.socket_full = False
        """Whether the socket took no more at the last try; reset by who saw that it does again."""
        self.progress_at = time.monotonic()
        """When the last ack came, or more of the oldest un-acked row was written if that was later."""
        self.written_at = 0.0
        """When the socket last took something."""
        self._partial_bytes = 0  # bytes of row `written` that are written
        self._send_results: deque[int] = deque()
        self._recv_results: deque[int] = deque()
        self._ack_buffer = bytearray(min(ACK_BUFFER_BYTES, window + 1))
        self._low_water_mark = 1

    @property
    def has_writable_rows(self) -> bool:
        """Whether there are rows to write that the window lets through."""
        return self.ring.written < min(self.ring.ready, self.acked + self.window)

    @property
    def is_blocked_by_window(self) -> bool:
        """Whether there are rows to write that the window, and nothing else, keeps back."""
        return not self.socket_full and self.ring.ready > self.ring.written >= self.acked + self.window

    @property
    def awaits_acks(self) -> bool:
        """Whether anything was written that is not acked."""
        return self.ring.written > self.acked or self._partial_bytes > 0

    def run(self, read_acks: bool, write_bytes: int) -> None:
        """Read the acks that are there, write rows, and say when the next acks are worth a wake-up.

        Args:
            read_acks: even if few can be there.
            write_bytes: write about that much at the most.

        Raises:
            OSError: the connection is lost, or the peer broke the protocol.
        """
        if self._recv_results or self._send_results:  # of a caller who was interrupted
            self._apply_received()
            self._apply_sent()
        if read_acks or (self.ring.written - self.acked) * CALLER_READ_WINDOW_DIVISOR >= self.window:
            self._read_acks()
        if not self.socket_full:
            self._write_rows(write_bytes)
        self._set_low_water_mark()

    def recover(self) -> None:
        """Take into the counters what a caller who was interrupted recorded; once the socket is lost."""
        with contextlib.suppress(OSError):
            self._apply_received()
        self._apply_sent()

    def _read_acks(self) -> None:
        try:
            call_and_append(self._recv_results, self.sock.recv_into, (self._ack_buffer,))
        except BlockingIOError:
            return
        self._apply_received()

    def _apply_received(self) -> None:
        received = self._recv_results
        if not received:
            return
        count = received[0]
        if count == 0:
            raise ConnectionClosedError("the peer closed the connection")
        check_acks(self._ack_buffer, count, self.ring.written - self.acked)
        self.progress_at = time.monotonic()
        acked = self.acked + count
        settled = max(acked, self.ring.acked)
        # Nothing comes between the next three lines: see the module's rules.
        self.acked = acked
        self.ring.acked = settled
        received.clear()
        self.latencies.record_acked(acked, self.progress_at)

    def _write_rows(self, max_bytes: int) -> None:
        """Write what the window lets through: at most about ``max_bytes``, or until the socket is full."""
        ring = self.ring
        while max_bytes > 0:
            limit = min(ring.ready, self.acked + self.window)  # as `has_writable_rows` has it
            if ring.written >= limit:
                return
            view = ring.unwritten_view(self._partial_bytes, limit, max_bytes)
            try:
                call_and_append(self._send_results, self.sock.send, (view,), (_NO_SIGNAL,))
            except BlockingIOError:
                self.socket_full = True
                return
            except OSError:
                self._read_acks()  # the peer may have acked before it hung up
                raise
            max_bytes -= self._apply_sent()

    def _apply_sent(self) -> int:
        sent = self._send_results
        if not sent:
            return 0
        self.written_at = time.monotonic()
        if self.ring.written == self.acked:  # of the oldest un-acked row
            self.progress_at = self.written_at
        count = sent[0]
        total = self._partial_bytes + count
        # Nothing comes between the next three lines: see the module's rules.
        self.ring.written = self.ring.written + total // self.ring.row_bytes
        self._partial_bytes = total % self.ring.row_bytes
        sent.clear()
        self.latencies.record_written(self.ring.written, self.written_at)
        return count

    def _set_low_water_mark(self) -> None:
        """Say how many acks must have come before a poll for them ends; only if it could matter by now."""
        ring = self.ring
        pending = ring.packed > ring.written
        if not pending and not ring.has_waiters:
            return
        most = min(
            LOW_WATER_ACKS_SENDING if pending else LOW_WATER_ACKS,
            self.window // LOW_WATER_WINDOW_DIVISOR,
            ring.written - self.acked,
        )
        mark = max(1, most)
        if mark != self._low_water_mark:
            with contextlib.suppress(OSError):  # not on this platform: a wake-up for every ack
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._low_water_mark = mark
