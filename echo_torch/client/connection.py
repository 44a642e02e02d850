"""What a connection's callers and its I/O thread share: the socket, what moves rows, and what became of them.

* The I/O lock guards the pump: the socket, ``ring.written`` and ``ring.acked``. The I/O thread pumps as long as
  rows are left to write; a caller pumps for small work when the lock is free, which spares a thread switch, and for
  more if it cannot run ahead of the acks anyway (`soft_limit`). When everything is written, one of the callers that wait
  leads: it polls the socket itself, and wakes the others. Nobody blocks while holding it. Of the locks (``ring.packing_lock``,
  the I/O lock, the leader's, the wake-up's) no two are held at once, but the last two inside the others, and the I/O
  lock inside the turn, once, when the ring moves.
* An interrupt (Ctrl-C) may break off whatever the main thread does here; the I/O thread makes good what that left
  undone, soon (`io_thread`).
* Whoever finds the connection lost says so (``lost_error``) under the I/O lock, and nobody touches the socket after that but
  the I/O thread, which may open another. The ring then begins again with the rows that are not released.
* Otherwise the loss becomes the failure. The first one is kept; it wakes everybody, and every later call raises from
  it.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import TypeVar

from echo_torch.errors import ConnectionClosedError, ProtocolError
from echo_torch.metrics.stats import Counts
from echo_torch.metrics.timing import DEVICE, LEARNER, NETWORK, NOTHING
from echo_torch.ring.ring import Ring, Waiter
from echo_torch.support.interrupts import owned_by_this_thread

from .flow import SoftLimit
from .reconnect import Reconnector
from .resend import ResendTail
from .tls_pump import make_pump
from .wakeup import AckPoller, WakeUp

# A few rows may linger for this long to be written together, if the last write was as recent and acks are still out:
# one system call costs as much as several samples, or as copying 16 KB.
COALESCE_S = 0.001
COALESCE_BYTES = 16 * 1024
COALESCE_WINDOW_DIVISOR = 2  # of the window

_Error = TypeVar("_Error", bound=BaseException)


class Connection:
    """Moves the rows of a ring over one socket at a time.

    Args:
        sock: the first one, connected, non-blocking, hands shaken; owned from now on.
        peer: how messages name the other side.
        ring: rows of the size that the server expects.
        window: most rows written and un-acked.
        tail: what is sent once more at the end.
        reconnector: what opens others when one is lost; None to leave it at that.
    """

    def __init__(
        self, sock: socket.socket, peer: str, ring: Ring, window: int, tail: ResendTail, reconnector: Reconnector | None
    ) -> None:
        self.peer = peer
        self.ring = ring
        self.resend_tail = tail
        self.reconnector = reconnector
        self.pump = make_pump(sock, ring, window)
        self.soft_limit = SoftLimit(ring, window)
        self.lost_error: OSError | None = None
        self.failure: ConnectionClosedError | None = None
        self.failure_reported = False
        """Whether a caller was told of the failure, or need not be."""
        self.failure_will_be_reported = False
        """Whether anybody waited when it came, and will be told."""
        self.io_thread_polls_acks = False
        """Whether the I/O thread polls for acks, or will."""
        self.io_thread_polls_copies = False
        """Whether it looks at a device's copies soon, and again until all are done."""
        self.is_coalescing = False
        """Whether the I/O thread will look within COALESCE_S."""
        self.io_lock = threading.RLock()
        """The I/O lock."""
        self.ack_poller = AckPoller()
        self.wake_up = WakeUp()
        self._locks = (self.io_lock, ring.packing_lock, self.wake_up.lock, self.ack_poller.lock)
        self._acked_at_open = 0  # how much was acked when the socket was opened
        self._stalled_s_before = self._stalled_s_at_loss = 0.0  # of the sockets before, if rows were un-acked then
        self._reconnects = self._resent = 0
        self.waited_seconds = [0.0, 0.0, 0.0, 0.0]
        """Seconds that the I/O thread waited, by `bottleneck`."""
        self.ended_at: float | None = None
        """When the connection ended for good."""

    # What became of the rows.

    @property
    def sent(self) -> int:
        """Rows that were accepted; the tail does not count."""
        packed = self.ring.packed  # before it is asked whether the tail has begun, which is packed after that
        start_row = self.resend_tail.start_row
        return packed if start_row is None else start_row

    @property
    def unacked(self) -> int:
        """Of those, not acked as far as is known."""
        return max(0, self.sent - self.ring.acked)

    @property
    def is_resending(self) -> bool:
        """Whether rows that were acked before are not acked again yet by the present connection."""
        return self.pump.acked < self.ring.acked

    @property
    def at_risk(self) -> int:
        """Rows that may be lost although all was done, or was to be done, to have them stored."""
        return self.counts().maybe_lost if self.resend_tail.enabled else self.unacked

    def counts(self) -> Counts:
        acked = self.ring.acked  # before `sent`, which is at least as far by then
        sent = self.sent
        return Counts(
            sent=sent,
            unacked=max(0, sent - acked),
            reconnects=self._reconnects,
            resent=self._resent,
            maybe_duplicated=self._resent + self.resend_tail.packed,
            maybe_lost=max(0, sent - self.ring.released) if self.failure is not None else 0,
        )

    @property
    def bottleneck(self) -> int:
        """What keeps rows from being written, or acked: of `meter`."""
        ring, pump = self.ring, self.pump
        if ring.written < ring.ready:
            return NETWORK if pump.socket_full else LEARNER
        if ring.written < ring.packed:
            return DEVICE
        return LEARNER if ring.has_waiters else NOTHING

    def describe_unacked(self) -> str:
        """The counts in words, and what is done about them."""
        unacked, lost = self.unacked, self.lost_error
        text = f"{unacked} samples un-acked"
        if not unacked and (self.at_risk or self.ring.unacked):
            text += f", but up to {min(self.sent, self.ring.keep_acked)} that were acked last may be lost"
        if lost is not None and self.reconnector is not None and self.failure is None:
            text += f"; the connection was lost {self.reconnector.seconds_lost:.1f} s ago ({lost}) and is being opened again"
        return text

    # What callers do.

    @property
    def is_reentrant_call(self) -> bool:
        """Whether the caller is a signal handler, or finaliser, that interrupted a call of its own thread here."""
        return any(map(owned_by_this_thread, self._locks))

    def write_or_wake(self) -> None:
        """See that rows just packed get written: here and now if `SoftLimit` has callers do that, else by the thread."""
        ring, pump = self.ring, self.pump
        if pump.socket_full:
            return  # the thread waits for the socket to take more
        pending = (ring.packed - ring.written) * ring.row_bytes
        if self._may_coalesce(pending):
            if not self.is_coalescing:
                self.is_coalescing = True
                self.wake_up.wake()
        elif pending > self.soft_limit.caller_write_bytes and ring.written - pump.acked < pump.window:
            self.wake_up.wake()
        else:
            self.pump_now(read_acks=False)

    def _may_coalesce(self, pending: int) -> bool:
        ring, pump = self.ring, self.pump
        few = pending < COALESCE_BYTES and (ring.packed - ring.written) * COALESCE_WINDOW_DIVISOR < pump.window
        return few and pump.awaits_acks and time.monotonic() - pump.written_at < COALESCE_S

    def pump_now(self, read_acks: bool = True) -> None:
        """Pump here and now if possible, and have the thread see to what is left."""
        ring, pump = self.ring, self.pump
        if not self._try_pump(read_acks) or pump.socket_full:
            self.wake_up.wake()
        elif ring.packed > ring.written:
            copies = ring.copying_since is not None and not self.io_thread_polls_copies
            if copies or not self.io_thread_polls_acks or pump.has_writable_rows:
                self.wake_up.wake()

    def read_acks(self) -> None:
        """Read the acks that are there, waiting for whoever pumps to be done with it."""
        with self.io_lock:
            self.run_pump(True, self.soft_limit.caller_write_bytes)

    def poll_for_acks(self, waiter: Waiter, seconds: float) -> bool:
        """Poll for acks in place of the I/O thread; False, at once, if that does, or another caller."""
        return (
            not self.io_thread_polls_acks and self.lost_error is None and self.ack_poller.poll_for_acks(waiter, seconds)
        )

    def stop_accepting(self) -> None:
        """Accept no more rows but the tail."""
        self.resend_tail.start()
        self.ack_poller.wake()

    def seconds_until_stall(self, stall_timeout: float) -> float:
        """Seconds until nothing will have been acked for ``stall_timeout`` seconds of being connected."""
        if self.lost_error is not None:
            return stall_timeout
        return stall_timeout - self._stalled_seconds()

    def _stalled_seconds(self) -> float:
        """Seconds for which acks could have come and none did, over all connections since the last that settled one."""
        before = self._stalled_s_before if self.ring.acked <= self._acked_at_open else 0.0
        copying_since = self.ring.copying_since
        if not self.pump.awaits_acks and copying_since is None:
            return before
        return before + time.monotonic() - max(self.pump.progress_at, copying_since or 0.0)

    # Pumping.

    def _try_pump(self, read_acks: bool) -> bool:
        """Pump if the I/O lock is free; gives whether it was."""
        lock = self.io_lock
        try:
            if owned_by_this_thread(lock) or not lock.acquire(False):
                return False
            self.run_pump(read_acks, self.soft_limit.caller_write_bytes)
            lock.release()
            return True
        except BaseException:
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
            raise

    def run_pump(self, read_acks: bool, write_bytes: int) -> None:
        """With the I/O lock held."""
        if self.lost_error is None and self.failure is None:
            try:
                self.pump.run(read_acks, write_bytes)
            except OSError as error:
                self.mark_lost(error)
        if self.ring.wake():
            self.ack_poller.wake()

    def mark_lost(self, error: OSError) -> None:
        """With the I/O lock held: leave the rest to the I/O thread, if anything can be done."""
        if self.reconnector is None or isinstance(error, ProtocolError):
            self.fail(error)
        else:
            made_progress = self.ring.acked > self._acked_at_open
            self.reconnector.connection_lost(
                was_useful=made_progress or not (self.is_resending or self.ring.unacked), made_progress=made_progress
            )
            self._stalled_s_at_loss = self._stalled_seconds()
            self.lost_error = _without_traceback(error)
            self.io_thread_polls_acks = True  # nobody leads
            self.ack_poller.wake()
            self.wake_up.wake()

    def pack_tail(self) -> int:
        """As `ResendTail.pack`; a copy that fails ends the connection, and none are left."""
        try:
            return self.resend_tail.pack()
        except RuntimeError as error:
            self.fail_on_copy_error(error)
            return 0

    def fail_on_copy_error(self, error: RuntimeError) -> None:
        """A device could not copy rows."""
        self.fail(error, f"samples could not be copied from their device: {error}")

    def fail(self, error: BaseException, how: str | None = None) -> None:
        """Keep the first failure, wake everybody, and let the thread end; ``how`` in place of the error's own words."""
        if self.failure is None:
            kind, words = ConnectionClosedError, f"connection lost: {error}"
            if isinstance(error, ConnectionClosedError):
                kind, words = type(error), str(error)
            failure = kind(f"{self.peer}: {how or words}")
            failure.__cause__ = _without_traceback(error)
            self.failure_will_be_reported = self.ring.has_waiters
            # Nothing comes between the next two lines: no row is accepted once anybody can know of the failure.
            self.failure = failure
            self.ring.stopped = True
        self.ring.stop()
        self.ack_poller.wake()
        self.wake_up.wake()

    def resume_on(self, sock: socket.socket) -> int:
        """Go on over another socket in place of the one that was lost; gives how many rows are sent again.

        By the I/O thread.
        """
        with self.io_lock:
            self.pump.recover()
            resent = self.ring.written - self.ring.released
            self.ring.written = self.ring.released
            self.pump.latencies.forget_unacked()
            self.pump = make_pump(sock, self.ring, self.pump.window, self.pump.latencies)
            self._resent += resent
            self._reconnects += 1
            self._stalled_s_before = self._stalled_s_at_loss if self.ring.unacked else 0.0
            self._acked_at_open = self.ring.acked
            self.lost_error = None
        self.ack_poller.set_socket(sock)
        return resent


def _without_traceback(error: _Error) -> _Error:
    """The error without what it came of, and the frames that it went through: they would keep the ring alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
