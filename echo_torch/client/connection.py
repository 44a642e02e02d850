"""What a connection's callers and its I/O thread share: the socket, what moves rows, and what became of them.

* The I/O lock guards the pump: the socket, ``ring.written`` and ``ring.acked``. The I/O thread pumps as long as
  rows are left to write; a caller pumps for small work when the lock is free, which spares a thread switch, and for
  more if it cannot run ahead of the acks anyway (`backlog`). When everything is written, one of the callers that wait
  leads: it polls the socket itself, and wakes the others. Nobody blocks while holding it. Of the locks (``ring.turn``,
  the I/O lock, the leader's, the wake-up's) no two are held at once, but the last two inside the others, and the I/O
  lock inside the turn, once, when the ring moves.
* An interrupt (Ctrl-C) may break off whatever the main thread does here; the I/O thread makes good what that left
  undone, soon (`io_thread`).
* Whoever finds the connection lost says so (``lost``) under the I/O lock, and nobody touches the socket after that but
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

from .flow import Backlog
from .reconnect import Redial
from .replay import Tail
from .tls_pump import pump_for
from .wakeup import Leader, WakeUp

# A few rows may linger for this long to be written together, if the last write was as recent and acks are still out:
# one system call costs as much as several samples, or as copying 16 KB.
LINGER_S = 0.001
LINGER_BYTES = 16 * 1024
LINGER_SHARE = 2  # of the window

_Error = TypeVar("_Error", bound=BaseException)


class Link:
    """Moves the rows of a ring over one socket at a time.

    Args:
        sock: the first one, connected, non-blocking, hands shaken; owned from now on.
        peer: how messages name the other side.
        ring: rows of the size that the server expects.
        window: most rows written and un-acked.
        tail: what is sent once more at the end.
        redial: what opens others when one is lost; None to leave it at that.
    """

    def __init__(
        self, sock: socket.socket, peer: str, ring: Ring, window: int, tail: Tail, redial: Redial | None
    ) -> None:
        self.peer = peer
        self.ring = ring
        self.tail = tail
        self.redial = redial
        self.line = pump_for(sock, ring, window)
        self.backlog = Backlog(ring, window)
        self.lost: OSError | None = None
        self.failure: ConnectionClosedError | None = None
        self.told = False
        """Whether a caller was told of the failure, or need not be."""
        self.heard = False
        """Whether anybody waited when it came, and will be told."""
        self.listening = False
        """Whether the I/O thread polls for acks, or will."""
        self.watching = False
        """Whether it looks at a device's copies soon, and again until all are done."""
        self.lingering = False
        """Whether the I/O thread will look within LINGER_S."""
        self.lock = threading.RLock()
        """The I/O lock."""
        self.leader = Leader()
        self.wake_up = WakeUp()
        self._locks = (self.lock, ring.turn, self.wake_up.lock, self.leader.lock)
        self._acked_at_first = 0  # how much was acked when the socket was opened
        self._quiet_before = self._quiet_at_loss = 0.0  # of the sockets before, if rows were un-acked then
        self._reconnects = self._resent = 0
        self.waiting = [0.0, 0.0, 0.0, 0.0]
        """Seconds that the I/O thread waited, by `held_up_by`."""
        self.ended_at: float | None = None
        """When the connection ended for good."""

    # What became of the rows.

    @property
    def sent(self) -> int:
        """Rows that were accepted; the tail does not count."""
        packed = self.ring.packed  # before it is asked whether the tail has begun, which is packed after that
        begins = self.tail.begins
        return packed if begins is None else begins

    @property
    def unacked(self) -> int:
        """Of those, not acked as far as is known."""
        return max(0, self.sent - self.ring.acked)

    @property
    def repeating(self) -> bool:
        """Whether rows that were acked before are not acked again yet by the present connection."""
        return self.line.acked < self.ring.acked

    @property
    def at_risk(self) -> int:
        """Rows that may be lost although all was done, or was to be done, to have them stored."""
        return self.counts().maybe_lost if self.tail.wanted else self.unacked

    def counts(self) -> Counts:
        acked = self.ring.acked  # before `sent`, which is at least as far by then
        sent = self.sent
        return Counts(
            sent=sent,
            unacked=max(0, sent - acked),
            reconnects=self._reconnects,
            resent=self._resent,
            maybe_duplicated=self._resent + self.tail.packed,
            maybe_lost=max(0, sent - self.ring.released) if self.failure is not None else 0,
        )

    @property
    def held_up_by(self) -> int:
        """What keeps rows from being written, or acked: of `meter`."""
        ring, line = self.ring, self.line
        if ring.written < ring.ready:
            return NETWORK if line.full else LEARNER
        if ring.written < ring.packed:
            return DEVICE
        return LEARNER if ring.waited_for else NOTHING

    def whats_open(self) -> str:
        """The counts in words, and what is done about them."""
        unacked, lost = self.unacked, self.lost
        text = f"{unacked} samples un-acked"
        if not unacked and (self.at_risk or self.ring.unacked):
            text += f", but up to {min(self.sent, self.ring.replay)} that were acked last may be lost"
        if lost is not None and self.redial is not None and self.failure is None:
            text += f"; the connection was lost {self.redial.seconds_lost:.1f} s ago ({lost}) and is being opened again"
        return text

    # What callers do.

    @property
    def interrupted(self) -> bool:
        """Whether the caller is a signal handler, or finaliser, that interrupted a call of its own thread here."""
        return any(map(owned_by_this_thread, self._locks))

    def push(self) -> None:
        """See that rows just packed get written: here and now if `Backlog` has callers do that, else by the thread."""
        ring, line = self.ring, self.line
        if line.full:
            return  # the thread waits for the socket to take more
        pending = (ring.packed - ring.written) * ring.row_bytes
        if self._may_linger(pending):
            if not self.lingering:
                self.lingering = True
                self.wake_up.kick()
        elif pending > self.backlog.caller_bytes and ring.written - line.acked < line.window:
            self.wake_up.kick()
        else:
            self.nudge(read_acks=False)

    def _may_linger(self, pending: int) -> bool:
        ring, line = self.ring, self.line
        few = pending < LINGER_BYTES and (ring.packed - ring.written) * LINGER_SHARE < line.window
        return few and line.in_the_air and time.monotonic() - line.written_at < LINGER_S

    def nudge(self, read_acks: bool = True) -> None:
        """Pump here and now if possible, and have the thread see to what is left."""
        ring, line = self.ring, self.line
        if not self._try_pump(read_acks) or line.full:
            self.wake_up.kick()
        elif ring.packed > ring.written:
            copies = ring.copying_since is not None and not self.watching
            if copies or not self.listening or line.writable:
                self.wake_up.kick()

    def look(self) -> None:
        """Read the acks that are there, waiting for whoever pumps to be done with it."""
        with self.lock:
            self.pump(True, self.backlog.caller_bytes)

    def lead(self, waiter: Waiter, seconds: float) -> bool:
        """Poll for acks in place of the I/O thread; False, at once, if that does, or another caller."""
        return not self.listening and self.lost is None and self.leader.lead(waiter, seconds)

    def refuse(self) -> None:
        """Accept no more rows but the tail."""
        self.tail.fix()
        self.leader.wake()

    def patience(self, stall_timeout: float) -> float:
        """Seconds until nothing will have been acked for ``stall_timeout`` seconds of being connected."""
        if self.lost is not None:
            return stall_timeout
        return stall_timeout - self._quiet()

    def _quiet(self) -> float:
        """Seconds for which acks could have come and none did, over all connections since the last that settled one."""
        before = self._quiet_before if self.ring.acked <= self._acked_at_first else 0.0
        copying_since = self.ring.copying_since
        if not self.line.in_the_air and copying_since is None:
            return before
        return before + time.monotonic() - max(self.line.progress_at, copying_since or 0.0)

    # Pumping.

    def _try_pump(self, read_acks: bool) -> bool:
        """Pump if the I/O lock is free; gives whether it was."""
        lock = self.lock
        try:
            if owned_by_this_thread(lock) or not lock.acquire(False):
                return False
            self.pump(read_acks, self.backlog.caller_bytes)
            lock.release()
            return True
        except BaseException:
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
            raise

    def pump(self, read_acks: bool, write_bytes: int) -> None:
        """With the I/O lock held."""
        if self.lost is None and self.failure is None:
            try:
                self.line.run(read_acks, write_bytes)
            except OSError as error:
                self.lose(error)
        if self.ring.wake():
            self.leader.wake()

    def lose(self, error: OSError) -> None:
        """With the I/O lock held: leave the rest to the I/O thread, if anything can be done."""
        if self.redial is None or isinstance(error, ProtocolError):
            self.fail(error)
        else:
            settled = self.ring.acked > self._acked_at_first
            self.redial.lost(served=settled or not (self.repeating or self.ring.unacked), settled=settled)
            self._quiet_at_loss = self._quiet()
            self.lost = _bare(error)
            self.listening = True  # nobody leads
            self.leader.wake()
            self.wake_up.kick()

    def pack_tail(self) -> int:
        """As `Tail.pack`; a copy that fails ends the connection, and none are left."""
        try:
            return self.tail.pack()
        except RuntimeError as error:
            self.fail_to_copy(error)
            return 0

    def fail_to_copy(self, error: RuntimeError) -> None:
        """A device could not copy rows."""
        self.fail(error, f"samples could not be copied from their device: {error}")

    def fail(self, error: BaseException, how: str | None = None) -> None:
        """Keep the first failure, wake everybody, and let the thread end; ``how`` in place of the error's own words."""
        if self.failure is None:
            kind, words = ConnectionClosedError, f"connection lost: {error}"
            if isinstance(error, ConnectionClosedError):
                kind, words = type(error), str(error)
            failure = kind(f"{self.peer}: {how or words}")
            failure.__cause__ = _bare(error)
            self.heard = self.ring.waited_for
            # Nothing comes between the next two lines: no row is accepted once anybody can know of the failure.
            self.failure = failure
            self.ring.stopped = True
        self.ring.stop()
        self.leader.wake()
        self.wake_up.kick()

    def begin_again(self, sock: socket.socket) -> int:
        """Go on over another socket in place of the one that was lost; gives how many rows are sent again.

        By the I/O thread.
        """
        with self.lock:
            self.line.settle()
            again = self.ring.written - self.ring.released
            self.ring.written = self.ring.released
            self.line.latencies.begin_again()
            self.line = pump_for(sock, self.ring, self.line.window, self.line.latencies)
            self._resent += again
            self._reconnects += 1
            self._quiet_before = self._quiet_at_loss if self.ring.unacked else 0.0
            self._acked_at_first = self.ring.acked
            self.lost = None
        self.leader.follow(sock)
        return again


def _bare(error: _Error) -> _Error:
    """The error without what it came of, and the frames that it went through: they would keep the ring alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
