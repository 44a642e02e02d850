"""One socket: reads acks, writes rows, and moves the ring's counters ``written`` and ``acked``.

* Hold the connection's I/O lock for everything here but `Pump.has_writable_rows` and `Pump.awaits_acks`. Nothing
  blocks.
* A socket that replaces a lost one first gets rows that were acked on the old one. Their new acks count in
  `Pump.acked`, because the window depends on it. They do not change ``ring.acked``.
* The holder of the lock may be the main thread, which Ctrl-C can interrupt after any call. So the C code that makes a
  system call also records its result (`call_and_append`). Plain assignments, with no call between them, then add the
  result to the counters. If an interrupt strikes before them, the next `Pump.run` applies the recorded result.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from typing import NoReturn

from echo_torch.errors import ConnectionClosedError
from echo_torch.metrics.timing import LatencyHistogram
from echo_torch.ring.ring import Ring
from echo_torch.support.interrupts import call_and_append
from echo_torch.wire.protocol import check_acks

# Most bytes read by one system call; an ack is one byte. If the window is smaller, the buffer holds the window and one
# byte more, to notice an ack too many. The buffer is small because a machine may have hundreds of connections.
ACK_BUFFER_BYTES = 64 * 1024
# How many acks the kernel collects before it wakes a thread that polls for them. Each ack comes in a segment of its
# own, and a wake-up for each costs more than the sample itself. The server can have about ten segments in flight before
# TCP acknowledges them. TCP does so at once when we read or send, and otherwise after up to 40 ms. So the kernel
# collects few acks while a caller waits and nothing is sent, and more while there are rows to send. It never collects
# more than one part in `LOW_WATER_WINDOW_DIVISOR` of the window.
LOW_WATER_ACKS = 8
LOW_WATER_ACKS_SENDING = 16
LOW_WATER_WINDOW_DIVISOR = 4
# Callers read acks, too, when at least one part in this many of the window is un-acked.
CALLER_READ_WINDOW_DIVISOR = 2

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class Pump:
    """Writes the rows of ``ring`` from ``ring.written`` on to ``sock``, and reads their acks.

    Args:
        sock: connected and non-blocking, after the handshake.
        ring: rows of the size that the server expects.
        window: most rows written and un-acked on this socket.
        latencies: histogram of the socket before, to add to; None for a new one.
    """

    def __init__(self, sock: socket.socket, ring: Ring, window: int, latencies: LatencyHistogram | None = None) -> None:
        # The socket; this object does not close it.
        self.sock = sock
        # Times from writing a row to its ack. The next socket's pump adds to the same histogram.
        self.latencies = LatencyHistogram() if latencies is None else latencies
        # The rows to write, and the counters of the rows that are written and acked.
        self.ring = ring
        # Most rows written and un-acked on this socket.
        self.window = window
        # Rows up to here are acked on this socket; less than ``ring.acked`` while rows are sent again.
        self.acked = ring.written
        # Whether the socket took no more at the last try; the thread that sees it writable again resets this.
        self.socket_full = False
        # Whether the peer has ended the stream in order (FIN), and did not cut it off.
        self.peer_has_ended = False
        # When the last ack came, or, if later, when more of the oldest un-acked row was written.
        self.progress_at = time.monotonic()
        # When the socket last took bytes.
        self.written_at = 0.0
        # How many bytes of the row ``ring.written`` are written.
        self._partial_bytes = 0
        # The result of ``send`` that is not in the counters yet; at most one number.
        self._send_results: deque[int] = deque()
        # The same for ``recv_into``.
        self._recv_results: deque[int] = deque()
        # Where ``recv_into`` puts acks.
        self._ack_buffer = bytearray(min(ACK_BUFFER_BYTES, window + 1))
        # How many acks the kernel collects before it wakes a poll, as last set.
        self._low_water_mark = 1

    @property
    def has_writable_rows(self) -> bool:
        """Whether there are rows to write and the window has room for them."""
        return self.ring.written < min(self.ring.ready, self.acked + self.window)

    @property
    def is_blocked_by_window(self) -> bool:
        """Whether there are rows to write and only the window holds them back."""
        return not self.socket_full and self.ring.ready > self.ring.written >= self.acked + self.window

    @property
    def awaits_acks(self) -> bool:
        """Whether anything was written on this socket that is not acked."""
        return self.ring.written > self.acked or self._partial_bytes > 0

    def run(self, read_acks: bool, write_bytes: int) -> None:
        """Read the acks that have arrived, write rows, and tell the kernel how many acks are worth a wake-up.

        Args:
            read_acks: whether to read acks even if few are outstanding.
            write_bytes: most bytes to write, approximately.

        Raises:
            OSError: the connection is lost, or the peer broke the protocol.
        """
        # If there are results, an interrupt struck a caller between a system call and the counters. Apply them before
        # the buffer and the view are used again.
        if self._recv_results or self._send_results:
            self._apply_received()
            self._apply_sent()
        # Acks first: they make room in the window for the rows that are written next.
        if read_acks or (self.ring.written - self.acked) * CALLER_READ_WINDOW_DIVISOR >= self.window:
            self._read_acks()
        if not self.socket_full:
            self._write_rows(write_bytes)
        self._set_low_water_mark()

    def recover(self) -> None:
        """Apply what an interrupted caller recorded, after the socket was lost."""
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
        """Add the acks in the buffer to the counters, if there are any."""
        received = self._recv_results
        if not received:
            return
        count = received[0]
        if count == 0:
            self._raise_ended()
        check_acks(self._ack_buffer, count, self.ring.written - self.acked)
        self.progress_at = time.monotonic()
        acked = self.acked + count
        settled = max(acked, self.ring.acked)
        # Nothing comes between the next three lines: see the module's rules. Either all of the acks count and the
        # result is gone, or none does and the next call applies it.
        self.acked = acked
        self.ring.acked = settled
        received.clear()
        self.latencies.record_acked(acked, self.progress_at)

    def _raise_ended(self) -> NoReturn:
        self.peer_has_ended = True
        raise ConnectionClosedError("the peer closed the connection")

    @property
    def ended_in_order(self) -> bool:
        """Whether the peer has ended the stream at a row's border. A host that crashes rarely does."""
        return self.peer_has_ended and not self._partial_bytes

    def _write_rows(self, max_bytes: int) -> None:
        """Write rows until the window or the socket is full, or about ``max_bytes`` are written."""
        ring = self.ring
        while max_bytes > 0:
            limit = min(ring.ready, self.acked + self.window)  # the same as in `has_writable_rows`
            if ring.written >= limit:
                return
            view = ring.unwritten_view(self._partial_bytes, limit, max_bytes)
            try:
                call_and_append(self._send_results, self.sock.send, (view,), (_NO_SIGNAL,))
            except BlockingIOError:
                self.socket_full = True
                return
            except OSError:
                # The peer may have sent acks before it closed the connection. Rows that they cover need no resending.
                self._read_acks()
                raise
            max_bytes -= self._apply_sent()

    def _apply_sent(self) -> int:
        """Add the bytes that the socket took to the counters; return how many."""
        sent = self._send_results
        if not sent:
            return 0
        self.written_at = time.monotonic()
        if self.ring.written == self.acked:  # these bytes belong to the oldest un-acked row
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
        """Tell the kernel how many acks to collect before it wakes a poll."""
        ring = self.ring
        pending = ring.packed > ring.written
        # Nobody polls for acks now, so save the system call.
        if not pending and not ring.has_waiters:
            return
        most = min(
            LOW_WATER_ACKS_SENDING if pending else LOW_WATER_ACKS,
            self.window // LOW_WATER_WINDOW_DIVISOR,
            ring.written - self.acked,
        )
        mark = max(1, most)
        if mark != self._low_water_mark:
            with contextlib.suppress(OSError):  # a platform without the option: every ack wakes the poll
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._low_water_mark = mark
