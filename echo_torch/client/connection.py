"""What callers and the I/O thread share: the current socket, the lock around it, and why the connection failed.

The I/O thread writes as long as rows are left to write. A caller writes small amounts itself if the I/O lock is free,
because waking the thread costs more. A caller that cannot run ahead of the acks writes more itself (`flow`). When
everything is written, one waiting caller polls the socket for acks, and wakes the others.

* Hold the I/O lock to use the pump, or to change ``ring.written`` and ``ring.acked``. Never block while you hold it.
* Do not hold two of the locks (``ring.packing_lock``, the I/O lock, the ack poller's, the wake-up's) at once. There are
  two exceptions: the last two nest inside the others, and the I/O lock nests inside the packing lock when the ring
  moves to other memory.
* Ctrl-C can interrupt whatever the main thread does here. The I/O thread soon completes what was left undone.
* Whoever finds the socket dead sets ``lost_error`` under the I/O lock. From then on only the I/O thread touches the
  socket. It may open another one, which starts again at the first row that is not released.
* If reconnecting is off or fails, the loss becomes ``failure``. The first failure wins and wakes everybody. Every later
  call raises an error from it.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, TypeVar

from echo_torch.errors import ConnectionClosedError, LearnerGoneError, ProtocolError
from echo_torch.metrics.stats import Counts
from echo_torch.metrics.timing import DEVICE, LEARNER, NETWORK, NOTHING
from echo_torch.ring.ring import Ring, Waiter
from echo_torch.support.interrupts import owned_by_this_thread

from .flow import NetworkWatch, SoftLimit
from .reconnect import Reconnector
from .resend import ClosingTail
from .tls_pump import make_pump
from .wakeup import AckPoller, WakeUp

# Seconds that a few rows may wait for others, to be written together. They wait only if acks are outstanding and the
# last write is no longer ago than this. One system call costs as much as several samples, or as copying 16 KB.
COALESCE_S = 0.001
# Rows wait only while they are fewer bytes than this.
COALESCE_BYTES = 16 * 1024
# Rows wait only while they are fewer than the window divided by this.
COALESCE_WINDOW_DIVISOR = 2

_Error = TypeVar("_Error", bound=BaseException)


class Connection:
    """Moves the rows of a ring over one socket at a time.

    Args:
        sock: the first socket, connected, non-blocking, after the handshake. The connection owns it from now on.
        peer: the other side's name in messages.
        ring: rows of the size that the server expects.
        window: upper limit for rows that are written and not acked.
        tail: the rows to resend at the end.
        reconnector: opens another socket when one is lost; None to fail instead.
        gone_after: a peer that ended its connection in order counts as gone when nobody has listened there for this
            many seconds; None for never.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        ring: Ring,
        window: int,
        tail: ClosingTail,
        reconnector: Reconnector | None,
        gone_after: float | None = None,
    ) -> None:
        # The other side's name in messages.
        self.peer = peer
        # The rows, and the counters of how far each stage is.
        self.ring = ring
        # The rows to resend at the end.
        self.closing_tail = tail
        # Opens another socket when one is lost; None if reconnecting is off.
        self.reconnector = reconnector
        # A peer that ended its connection in order is gone when nobody has listened there for this many seconds.
        self._gone_after = gone_after
        # Moves bytes over the current socket. The I/O lock guards it.
        self.pump = make_pump(sock, ring, window)
        # Decides how far callers run ahead of the acks, and how much they write themselves.
        self.soft_limit = SoftLimit(ring, window)
        # Tells whether the network or the learner is slow. The I/O lock guards it.
        self.network_watch = NetworkWatch(sock)
        # Why the current socket is lost; None while it works.
        self.lost_error: OSError | None = None
        # When the socket was lost or the connection failed, by ``time.monotonic``; None while it works.
        self.lost_at: float | None = None
        # Why the connection is lost for good; None before that, and after an orderly end.
        self.failure: ConnectionClosedError | None = None
        # Whether a call has raised the failure, or no call needs to.
        self.failure_reported = False
        # Whether a caller was waiting when the failure came. Its call raises the failure.
        self.failure_will_be_reported = False
        # Whether a `send` waits for room.
        self.send_is_blocked = False
        # Whether the I/O thread polls for acks, or is about to.
        self.io_thread_polls_acks = False
        # Whether the I/O thread soon queries the device's copies, and goes on until all are done.
        self.io_thread_polls_copies = False
        # Whether the I/O thread looks for rows to write within COALESCE_S.
        self.is_coalescing = False
        # The I/O lock; see the module's rules.
        self.io_lock = threading.RLock()
        # Lets one waiting caller poll the socket for acks.
        self.ack_poller = AckPoller()
        # Wakes the I/O thread.
        self.wake_up = WakeUp()
        # All locks of this connection, to recognize a signal handler that interrupted their holder.
        self._locks = (self.io_lock, ring.packing_lock, self.wake_up.lock, self.ack_poller.lock)
        # The value of ``ring.acked`` when the current socket was opened.
        self._acked_at_open = 0
        # Seconds without acks. First: on earlier sockets, as far as they still count. Second: in all, at the last loss.
        self._stalled_s_before = self._stalled_s_at_loss = 0.0
        # Number of reconnects, and number of rows that they sent again.
        self._reconnects = self._resent = 0
        # Seconds that the I/O thread waited, for each value of `bottleneck`.
        self.waited_seconds = [0.0, 0.0, 0.0, 0.0]
        # When the I/O thread closed the socket for good, in seconds of the monotonic clock; None before that.
        self.ended_at: float | None = None

    # What became of the rows.

    @property
    def is_over(self) -> bool:
        """Whether the connection has failed, or has ended after an orderly close."""
        return self.failure is not None or self.ended_at is not None

    @property
    def sent(self) -> int:
        """The number of accepted rows, without the closing tail."""
        # Read ``packed`` first. If the tail starts after that, ``packed`` holds no row of it.
        packed = self.ring.packed
        start_row = self.closing_tail.start_row
        return packed if start_row is None else start_row

    @property
    def gone_after(self) -> float | None:
        """Seconds after which the peer counts as gone, because the current socket ended in order; None for never."""
        return self._gone_after if self.pump.ended_in_order else None

    @property
    def unacked(self) -> int:
        """The number of accepted rows without a known ack."""
        return max(0, self.sent - self.ring.acked)

    @property
    def is_resending(self) -> bool:
        """Whether the current peer has not acked all rows yet that an earlier socket's peer acked."""
        return self.pump.acked < self.ring.acked

    @property
    def at_risk(self) -> int:
        """The number of rows to report as possibly lost."""
        # With the closing tail, acked rows count too once the connection has failed. Without it, only un-acked rows do.
        return self.counts().maybe_lost if self.closing_tail.enabled else self.unacked

    def counts(self) -> Counts:
        # Read ``acked`` before ``sent``, so that it is never the larger one.
        acked = self.ring.acked
        sent = self.sent
        return Counts(
            sent=sent,
            unacked=max(0, sent - acked),
            reconnects=self._reconnects,
            resent=self._resent,
            maybe_duplicated=self._resent + self.closing_tail.packed,
            maybe_lost=max(0, sent - self.ring.released) if self.is_over else 0,
        )

    @property
    def bottleneck(self) -> int:
        """What holds rows up, as one of the causes in `echo_torch.metrics.timing`."""
        ring = self.ring
        if ring.ready == ring.written < ring.packed:
            return DEVICE
        return self.slow_side if ring.written < ring.ready or ring.has_waiters else NOTHING

    @property
    def slow_side(self) -> int:
        """Whether NETWORK or LEARNER is slow, if rows or callers wait for one of them."""
        return NETWORK if self.network_watch.network_is_slow else LEARNER

    def describe_unacked(self) -> str:
        """Return the counts in words, and whether the connection is being opened again."""
        unacked, lost = self.unacked, self.lost_error
        text = f"{unacked} samples un-acked"
        if not unacked and (self.at_risk or self.ring.unacked):
            text += f", but up to {min(self.sent, self.ring.keep_acked)} that were acked last may be lost"
        if lost is not None and self.reconnector is not None and not self.is_over:
            text += (
                f"; the connection was lost {self.reconnector.seconds_lost:.1f} s ago ({lost})"
                " and is being opened again"
            )
        return text

    # Called by callers.

    @property
    def is_reentrant_call(self) -> bool:
        """Whether you are in a signal handler or finalizer that interrupted this thread while it held a lock."""
        return any(map(owned_by_this_thread, self._locks))

    def write_or_wake(self) -> None:
        """Write the rows just packed, or leave them to the I/O thread, whichever is cheaper."""
        ring, pump = self.ring, self.pump
        if pump.socket_full:
            return  # the I/O thread polls until the socket takes more
        pending = (ring.packed - ring.written) * ring.row_bytes
        # A few rows wait for others if acks are outstanding and the last write was a moment ago. If the thread does not
        # know of the wait yet, wake it, so that the wait ends in time.
        if (
            pending < COALESCE_BYTES
            and (ring.packed - ring.written) * COALESCE_WINDOW_DIVISOR < pump.window
            and pump.awaits_acks
            and time.monotonic() - pump.written_at < COALESCE_S
        ):
            if not self.is_coalescing:
                self.is_coalescing = True
                self.wake_up.wake()
        # Leave large amounts to the thread. But if the window is full, pump here, to read the acks that open it.
        elif pending > self.soft_limit.caller_write_bytes and ring.written - pump.acked < pump.window:
            self.wake_up.wake()
        else:
            self.pump_or_wake(read_acks=False)

    def pump_or_wake(self, read_acks: bool = True, lock_timeout_s: float = 0.0) -> None:
        """Pump on this thread if the I/O lock is free, and wake the I/O thread if work is left for it.

        Args:
            read_acks: whether to read acks even if few are outstanding.
            lock_timeout_s: seconds to wait for the I/O lock.
        """
        ring, pump, lock, pumped = self.ring, self.pump, self.io_lock, False
        if not owned_by_this_thread(lock):
            # Release the lock inline on both paths: an interrupt can strike where a helper function begins, and would
            # leave the lock held. Only the lock itself knows whether an interrupted `acquire` took it.
            try:
                if lock.acquire(timeout=lock_timeout_s):
                    self.run_pump(read_acks, self.soft_limit.caller_write_bytes)
                    pumped = True
                    lock.release()
            except BaseException:
                try:  # noqa: SIM105
                    lock.release()
                except RuntimeError:
                    pass
                raise
        if not pumped or pump.socket_full:
            self.wake_up.wake()
        elif ring.packed > ring.written:
            # Rows are left that need an ack or a copy first. Wake the thread, unless it already polls for both and no
            # row can be written now.
            copies = ring.copying_since is not None and not self.io_thread_polls_copies
            if copies or not self.io_thread_polls_acks or pump.has_writable_rows:
                self.wake_up.wake()

    def read_acks(self) -> None:
        """Read the acks that have arrived. Blocks while another thread pumps."""
        with self.io_lock:
            self.run_pump(True, self.soft_limit.caller_write_bytes)

    def try_poll_socket(self, waiter: Waiter, seconds: float) -> bool:
        """Poll for acks for at most ``seconds``. Returns False at once if another caller or the I/O thread polls.

        Args:
            waiter: the caller's own waiter.
            seconds: how long; may be infinite.
        """
        return (
            not self.io_thread_polls_acks
            and self.lost_error is None
            and self.ack_poller.try_poll_socket(waiter, seconds)
        )

    def stop_accepting(self) -> None:
        """Accept no more rows, except those of the closing tail."""
        self.closing_tail.start()
        self.ack_poller.wake()

    def seconds_until_stall(self, stall_timeout: float) -> float:
        """Return the seconds until ``stall_timeout`` seconds without an ack have passed. Only time connected counts."""
        if self.lost_error is not None:
            return stall_timeout
        return stall_timeout - self._stalled_seconds()

    def _stalled_seconds(self) -> float:
        """Return the seconds in which acks could have come and none did, over all sockets since the last new ack."""
        # Earlier sockets count only until the current one brings a new ack.
        before = self._stalled_s_before if self.ring.acked <= self._acked_at_open else 0.0
        copying_since = self.ring.copying_since
        if not self.pump.awaits_acks and copying_since is None:
            return before
        return before + time.monotonic() - max(self.pump.progress_at, copying_since or 0.0)

    # Pumping.

    def run_pump(self, read_acks: bool, write_bytes: int) -> None:
        """Pump, and wake the callers whose wait is over. Call this with the I/O lock held.

        A lost connection is handled here and not raised.
        """
        ring, pump = self.ring, self.pump
        if self.lost_error is None and not self.is_over:
            try:
                # Look before pumping, because rows that this pump writes cannot be slow yet.
                if ring.has_waiters or ring.ready > ring.written:
                    self.network_watch.look_if_due((ring.written - pump.acked) * ring.row_bytes, pump.socket_full)
                pump.run(read_acks, write_bytes)
            except OSError as error:
                self.mark_lost(error)
        if ring.wake():
            self.ack_poller.wake()

    def mark_lost(self, error: OSError) -> None:
        """Note that the socket is lost, and wake the I/O thread to reconnect, or fail if that is of no use.

        Call this with the I/O lock held.
        """
        # Do not reconnect to a peer that broke the protocol: it would do so again.
        if self.reconnector is None or isinstance(error, ProtocolError):
            self.fail(error if self.gone_after is None else LearnerGoneError(str(error)))
        else:
            # A connection was useful if it acked new rows, or had none to ack. Only then does the time allowed for
            # reconnecting start anew.
            made_progress = self.ring.acked > self._acked_at_open
            self.reconnector.connection_lost(
                was_useful=made_progress or not (self.is_resending or self.ring.unacked), made_progress=made_progress
            )
            self._stalled_s_at_loss = self._stalled_seconds()
            self.lost_at = self.lost_at or time.monotonic()
            self.lost_error = _without_traceback(error)
            # No caller may poll the dead socket.
            self.io_thread_polls_acks = True
            self.ack_poller.wake()
            self.wake_up.wake()

    def pack_closing_tail(self) -> int:
        """Pack rows of the closing tail, as `ClosingTail.pack`. Returns how many are left.

        If a copy fails, this ends the connection and returns 0.
        """
        try:
            return self.closing_tail.pack()
        except RuntimeError as error:
            self.fail_on_copy_error(error)
            return 0

    def move_ring(self, buffer: memoryview, pinned_rows: Any) -> None:
        """Move the ring's rows to other memory of the same size, to which a device can copy.

        Args:
            buffer: the new memory.
            pinned_rows: the tensor that owns it.
        """
        with self.ring.packing_lock, self.io_lock:
            self.ring.move_to_buffer(buffer, pinned_rows)
        # The soft limit keeps rows in the caches, which a device's copies bypass.
        self.soft_limit.disable()

    def fail_on_copy_error(self, error: RuntimeError) -> None:
        """End the connection because a device could not copy rows."""
        self.fail(error, f"samples could not be copied from their device: {error}")

    def fail(self, error: BaseException, how: str | None = None) -> None:
        """End the connection for good: keep the first failure, wake everybody, and let the I/O thread end.

        Args:
            error: the cause.
            how: the failure's text; by default it is made from the error.
        """
        if not self.is_over:
            kind, words = ConnectionClosedError, f"connection lost: {error}"
            if isinstance(error, ConnectionClosedError):
                kind, words = type(error), str(error)
            failure = kind(f"{self.peer}: {how or words}")
            failure.__cause__ = _without_traceback(error)
            self.lost_at = self.lost_at or time.monotonic()
            self.failure_will_be_reported = self.ring.has_waiters
            # Nothing comes between the next two lines: once anybody can see the failure, the ring takes no row.
            self.failure = failure
            self.ring.stopped = True
        # Wake everybody on every call: an interrupt may have cut an earlier call short.
        self.ring.stop()
        self.ack_poller.wake()
        self.wake_up.wake()

    def resume_on(self, sock: socket.socket) -> int:
        """Continue on another socket. Returns how many rows are sent again.

        Only the I/O thread calls this.
        """
        with self.io_lock:
            # First complete what an interrupted caller did on the old socket, so that the counters are true. Then start
            # again at the first row that is not released.
            self.pump.recover()
            resent = self.ring.written - self.ring.released
            self.ring.written = self.ring.released
            self.pump.latencies.forget_unacked()
            self.pump = make_pump(sock, self.ring, self.pump.window, self.pump.latencies)
            self.network_watch = NetworkWatch(sock)
            self._resent += resent
            self._reconnects += 1
            self._stalled_s_before = self._stalled_s_at_loss if self.ring.unacked else 0.0
            self._acked_at_open = self.ring.acked
            # From here on, callers may pump again.
            self.lost_error = self.lost_at = None
        self.ack_poller.set_socket(sock)
        return resent


def _without_traceback(error: _Error) -> _Error:
    """Return the error without its causes and its traceback, whose frames would keep the ring alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
