"""One connection: a ring of rows, a socket, and the one thread that sees to both.

* The I/O lock guards the pump: the socket, ``ring.written`` and ``ring.acked``. The I/O thread pumps whenever the
  socket has something to say; a caller pumps for small work when the lock is free, which spares a thread switch.
  Nobody blocks while holding it. Of the three locks (``ring.turn``, the I/O lock, the wake-up's) no two are held at
  once, but the wake-up's inside the I/O lock.
* An interrupt (Ctrl-C) may break off whatever the main thread does here; `HEARTBEAT_S` later at the latest, the I/O
  thread makes good what that left undone.
* A signal handler, or a finaliser, that runs inside a pump or a packing of its own thread is turned away with a
  RuntimeError: it can neither go on nor wait for itself.
* The first failure is kept; it wakes everybody, and every later call raises from it.
* The thread holds the connection but never the client, so a dropped client is collected; the connection then delivers
  what it holds, for a bounded time, and ends.
* A forked child owns nothing here: it closes its copies of the descriptors and touches no lock.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from .deadline import Deadline
from .dial import hang_up
from .errors import ConnectionClosedError, DeliveryTimeoutError
from .pump import Pump
from .ring import Ring
from .wakeup import WakeUp

_log = logging.getLogger(__name__)

# Seconds after which the I/O thread looks at everything although nobody woke it: an upper bound on how long anything
# that an interrupt broke off, or a dropped client, stays unnoticed. A pass costs some 30 us of CPU.
HEARTBEAT_S = 1.0
# The same for a caller who waits: it looks for itself, since acks fewer than EAGER_ACKS wake nobody.
WAITER_HEARTBEAT_S = 0.05
# Seconds without an ack after which a wait is named in the log, and again after as many more.
STALL_WARNING_S = 30.0
# Seconds that a connection may go on delivering after its client was dropped, or at interpreter exit.
FAREWELL_S = 5.0
# What a caller writes itself, in bytes: about what a system call costs anyway. More is left to the I/O thread, so that
# `send` costs one copy and not two.
CALLER_WRITE_BYTES = 64 * 1024
# One system call's worth for the I/O thread, in bytes: large enough for calls not to count, small enough for the lock.
THREAD_WRITE_BYTES = 1024 * 1024
Fill = Callable[[int, int, int], None]
"""``fill(slot, first, rows)`` packs a batch's rows from ``first`` on into the ring's from ``slot`` on."""


class Connection:
    """Delivers the rows of a ring over a socket that has shaken hands.

    Args:
        sock: connected, non-blocking; owned from now on.
        peer: how messages name the other side.
        ring: rows of the size that the server expects.
        window: most rows written and un-acked.
        stall_timeout: seconds without progress after which waiting calls raise; None for ever.
        replay_tail: whether, as the last thing, the ring's ``replay`` last rows are written once more. That pushes all
            rows before them out of the server's queue, which it may discard when a connection ends.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        ring: Ring,
        window: int,
        stall_timeout: float | None,
        replay_tail: bool,
    ) -> None:
        self.peer = peer
        self.ring = ring
        self.stall_timeout = stall_timeout
        self.blocked_seconds = 0.0
        self.failure: ConnectionClosedError | None = None
        self.abandoned = False
        self._replay_tail = replay_tail
        self._tail_from: int | None = None  # where the rows that are written once more begin
        self._pid = os.getpid()
        self._line = Pump(sock, ring, window)
        self._io = threading.RLock()
        self._pumper = 0  # the thread that pumps; 0 for none
        self._packer = 0  # the thread that packs; 0 for none
        self._warned_at = self._line.progress_at
        self._failure_told = False
        self._stop = False
        self._farewell: Deadline | None = None
        self._wake_up = WakeUp()
        self._thread = threading.Thread(target=self._run, name=f"echo_torch {peer}", daemon=True)
        _live.add(self)
        try:
            self._thread.start()
        except BaseException:
            self._tear_down()
            raise

    # What callers do.

    @property
    def closed(self) -> bool:
        """Whether no more rows are accepted."""
        return self.ring.refusing or self.failure is not None or self._pid != os.getpid()

    @property
    def sent(self) -> int:
        """Rows that were accepted; those written once more at the end do not count."""
        return self.ring.packed if self._tail_from is None else self._tail_from

    @property
    def unacked(self) -> int:
        """Rows that were accepted and are not acked, as far as is known."""
        return max(0, self.sent - self.ring.acked)

    def send_rows(self, rows: int, fill: Fill, deadline: Deadline) -> None:
        """Put ``rows`` rows into the ring, waiting for room; ``fill`` is called for each run of them that fits.

        Raises:
            ConnectionClosedError: closed, or the peer is gone.
            DeliveryTimeoutError: no room in time. Both carry ``rows_accepted``.
        """
        self._enter("send")
        self._accept("send", rows, fill, deadline)

    def wait(self, deadline: Deadline) -> None:
        """Block until every row packed so far is acked.

        Raises:
            ConnectionClosedError: the connection ended before that.
            DeliveryTimeoutError: it took too long; delivery goes on.
        """
        self._enter("wait")
        self._wait_for("wait", self.ring.packed, deadline)

    def refresh(self) -> None:
        """Take note of acks that have arrived, if that can be done at once."""
        if self._pid == os.getpid() and self.failure is None:
            self._nudge()

    def close(self, deadline: Deadline) -> None:
        """Deliver what is packed, and the tail again, until the deadline; then end thread and socket, in any case.

        Raises:
            ConnectionClosedError: the connection had failed with rows un-acked, and no call has said so yet.
            DeliveryTimeoutError: rows are un-acked at the deadline.
        """
        if self._pid != os.getpid():
            self._disown()
            return
        self._enter("close")
        try:
            self.ring.refuse()
            if self.failure is None:
                self._wait_for("close", self.ring.packed, deadline)
                self._pack_tail(deadline)
                self._wait_for("close", self.ring.packed, deadline)
            elif self.ring.unacked and not self._failure_told:
                self._raise_failure("close")
        finally:
            self._stop = True
            self._wake_up.kick()
            if threading.current_thread() is not self._thread:
                self._thread.join()

    def _enter(self, call: str) -> None:
        """Turn away whom this connection cannot serve: another process, or a signal handler inside a call of ours."""
        if self._pid != os.getpid():
            raise ConnectionClosedError(
                f"{self.peer}: this connection belongs to process {self._pid}; open one in process {os.getpid()}"
            )
        me = threading.get_ident()
        if self._pumper == me or self._packer == me:
            raise RuntimeError(
                f"{call}() was called by a signal handler or finaliser that interrupted a call to the same client in "
                "the same thread; raise an exception there (sys.exit) and flush outside"
            )

    # Packing, on behalf of `call`: "send", or "close" for the tail.

    def _accept(self, call: str, rows: int, fill: Fill, deadline: Deadline) -> None:
        done = 0
        try:
            while done < rows:
                packed = self._pack(call, rows - done, fill, done)
                done += packed
                if packed:
                    self._push()
                else:
                    self._wait_for_room(call, rows - done, deadline)
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            error.rows_accepted = done
            raise

    def _pack(self, call: str, want: int, fill: Fill, first: int) -> int:
        """Fill and count as many rows as are free in one run; gives how many."""
        me = threading.get_ident()
        with self.ring.turn:
            if self._packer == me:  # a signal handler struck since `_enter` looked
                self._enter(call)
            try:
                self._packer = me
                slot, rows = self.ring.free_run(want)
                if rows:
                    self._check_open(call)
                    fill(slot, first, rows)
                    if not self.ring.commit(rows, last=call == "close"):
                        self._check_open(call)
                return rows
            finally:
                self._packer = 0

    def _pack_tail(self, deadline: Deadline) -> None:
        """Pack the last ``replay`` rows once more, or all of them in cycles if there were fewer; only once."""
        ring, size = self.ring, self.ring.row_bytes
        period = min(ring.replay, ring.packed)
        if not self._replay_tail or not period:
            return
        self._replay_tail = False
        self._tail_from = ring.packed

        def copy(slot: int, first: int, rows: int) -> None:
            """Each row from ``period`` rows before it, which are never released yet."""
            for target in range(slot, slot + rows):
                source = (target - period) % ring.capacity
                ring.buffer[target * size : (target + 1) * size] = ring.buffer[source * size : (source + 1) * size]

        self._accept("close", ring.replay, copy, deadline)

    def _wait_for_room(self, call: str, rows: int, deadline: Deadline) -> None:
        """Wait for a good part of the ring at once: a wake-up for every row would cost more than the rows."""
        ring = self.ring
        rows = min(rows, max(1, (ring.capacity - ring.replay) // 4))
        began = time.monotonic()
        try:
            self._wait_for(call, ring.rows_free_at(rows), deadline)
        finally:
            self.blocked_seconds += time.monotonic() - began

    # Waiting.

    def _wait_for(self, call: str, threshold: int, deadline: Deadline) -> None:
        """Park until ``acked`` reaches ``threshold``."""
        ring = self.ring
        while ring.acked < threshold:
            waiter = ring.enlist(threshold)
            try:
                self._nudge()
                if ring.acked >= threshold:
                    return
                self._check_open(call)
                if deadline.expired or self._patience() <= 0:
                    self._look()
                    if ring.acked >= threshold:
                        return
                    self._raise_timeout(call, deadline)
                waiter.park(min(deadline.remaining(), self._patience(), WAITER_HEARTBEAT_S))
            finally:
                ring.forget(waiter)

    def _patience(self) -> float:
        """Seconds until nothing will have been acked for ``stall_timeout``."""
        if self.stall_timeout is None:
            return float("inf")
        if not self._line.in_the_air:
            return self.stall_timeout
        return self._line.progress_at + self.stall_timeout - time.monotonic()

    def _check_open(self, call: str) -> None:
        if self.failure is not None:
            self._raise_failure(call)
        if self.ring.refusing and call == "send":
            raise self._counted(ConnectionClosedError(f"{self.peer}: send() on a client that was closed"))

    def _raise_failure(self, call: str) -> NoReturn:
        failure = self.failure
        assert failure is not None
        self._failure_told = True
        message = f"{failure}; {call}() with {self.unacked} samples un-acked"
        raise self._counted(type(failure)(message)) from failure

    def _raise_timeout(self, call: str, deadline: Deadline) -> NoReturn:
        if deadline.expired:
            what = f"{call}() not done within {deadline.timeout:g} s"
        else:
            what = f"nothing was acked for {self.stall_timeout:g} s (stall_timeout)"
        if self._tail_from is not None and not self.unacked:
            what += f"; the last samples, sent once more, are not acked: up to {self.ring.replay} may be lost"
        text = f"{self.peer}: {what}; {self.unacked} samples un-acked"
        raise self._counted(DeliveryTimeoutError(text if call == "close" else f"{text}, delivery goes on"))

    def _counted(self, error: Any) -> Any:
        error.unacked = self.unacked
        return error

    # Between callers and the I/O thread.

    def _push(self) -> None:
        """See that rows just packed get written: here and now if they are few, else by the thread."""
        ring = self.ring
        if self._line.full:
            return  # the thread waits for the socket to take more
        pending = (ring.packed - ring.written) * ring.row_bytes
        few = pending <= CALLER_WRITE_BYTES or ring.written - ring.acked >= self._line.window
        if not (few and self._try_pump()) or self._line.full or self._line.writable:
            self._wake_up.kick()

    def _nudge(self) -> None:
        """Read the acks that are there, write what they let through, and have the next ones looked out for."""
        if not self._try_pump(read_acks=True) or self._line.full or self._line.writable:
            self._wake_up.kick()

    def _look(self) -> None:
        """Read the acks that are there, waiting for whoever pumps to be done with it."""
        with self._io:
            if self.failure is None and not self._pumper:
                self._pump(True, CALLER_WRITE_BYTES)

    def _try_pump(self, read_acks: bool = False) -> bool:
        """Pump if the I/O lock is free; gives whether it was."""
        lock = self._io
        try:
            if not lock.acquire(False):
                return False
            if self.failure is None and not self._pumper:
                self._pump(read_acks, CALLER_WRITE_BYTES)
            lock.release()
            return True
        except BaseException:
            # Interrupted anywhere above: the lock may be ours or not, and an RLock knows. Nothing that a second
            # interrupt could strike comes before its release.
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
            raise

    def _pump(self, read_acks: bool, write_bytes: int) -> None:
        """With the I/O lock held."""
        try:
            self._pumper = threading.get_ident()
            self._line.run(read_acks, write_bytes, self.ring.waited_for or self.abandoned)
        except OSError as error:
            self._fail(error)
        finally:
            self._pumper = 0
        self.ring.wake()

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure, wake everybody, and let the thread end."""
        if self.failure is None:
            if isinstance(error, ConnectionClosedError):
                failure = type(error)(f"{self.peer}: {error}")
            else:
                failure = ConnectionClosedError(f"{self.peer}: connection lost: {error}")
            failure.__cause__ = error
            self.failure = failure
        self.ring.stop()
        if threading.current_thread() is not self._thread:
            self._wake_up.kick()

    # The I/O thread.

    def _run(self) -> None:
        try:
            poller = select.poll()
            poller.register(self._wake_up.reader, select.POLLIN)
            writable = True
            while (nap := self._pass(writable)) is not None:
                poller.register(self._line.sock, select.POLLIN | (select.POLLOUT if self._line.full else 0))
                events = dict(poller.poll(nap * 1000))
                writable = bool(events.get(self._line.sock.fileno(), 0) & ~select.POLLIN)
                self._wake_up.seen(self._wake_up.reader.fileno() in events)
        except BaseException as error:  # whatever ends this thread is what every caller is told
            self._fail(error)
            if not isinstance(error, Exception):
                raise
            _log.exception("%s: the I/O thread failed", self.peer)
        finally:
            self._tear_down()

    def _pass(self, writable: bool) -> float | None:
        """One look at everything; gives how many seconds it may be until the next, or None when it is time to end."""
        with self._io:
            if self._stop or self.failure is not None:
                return None
            if writable:
                self._line.full = False
            self._pump(True, THREAD_WRITE_BYTES)
        self._warn_of_stall()
        if self._said_farewell():
            return None
        return 0.0 if self._line.writable and not self._line.full else HEARTBEAT_S

    def _warn_of_stall(self) -> None:
        now = time.monotonic()
        silence = now - self._line.progress_at
        if self.ring.waited_for and self._line.in_the_air and min(silence, now - self._warned_at) >= STALL_WARNING_S:
            self._warned_at = now
            _log.warning(
                "%s: nothing acked for %.0f s, %d samples un-acked; is the learner draining?",
                self.peer,
                silence,
                self.unacked,
            )

    def _said_farewell(self) -> bool:
        """Whether the client was dropped and there is nothing, or no time, left to deliver."""
        if not self.abandoned:
            return False
        if self._farewell is None:
            self._farewell = Deadline(FAREWELL_S)
        if self.ring.unacked and not self._farewell.expired:
            return False
        if self._replay_tail and not self.ring.unacked:
            with contextlib.suppress(ConnectionClosedError, DeliveryTimeoutError):
                self._pack_tail(self._farewell)
            return not self.ring.unacked
        if self.ring.unacked:
            _log.warning("%s: client dropped with %d samples un-acked", self.peer, self.ring.unacked)
        return True

    def _tear_down(self) -> None:
        """Free everything and wake everybody; runs once, at the end of the I/O thread."""
        with self._io:
            if self.failure is None:
                self.failure = ConnectionClosedError(f"{self.peer}: the client was closed")
                self._failure_told = True
            hang_up(self._line.sock)
        self._wake_up.close()
        self.ring.stop()
        _live.discard(self)

    def _disown(self) -> None:
        """In a forked child: close its copies of the descriptors, which neither needs nor takes a lock."""
        self._line.sock.close()
        self._wake_up.disown()


_live: set[Connection] = set()
"""Connections whose thread runs: for interpreter exit and for fork."""


def _flush_at_exit() -> None:
    deadline = Deadline(FAREWELL_S)
    for connection in list(_live):
        try:
            connection.close(deadline)
        except Exception as error:
            _log.warning("at exit: %s", error)


def _disown_after_fork() -> None:
    for connection in list(_live):
        connection._disown()
    _live.clear()


atexit.register(_flush_at_exit)
os.register_at_fork(after_in_child=_disown_after_fork)
