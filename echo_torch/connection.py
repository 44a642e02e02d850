"""One connection: a ring of rows, a socket, and the one thread that sees to both.

* The I/O lock guards the pump: the socket, ``ring.written`` and ``ring.acked``. The I/O thread pumps as long as
  rows are left to write; a caller pumps for small work when the lock is free, which spares a thread switch, and for
  more if it cannot run ahead of the acks anyway (`backlog`). When everything is written, one of the callers that wait
  leads: it polls the socket itself, and wakes the others. Nobody blocks while holding it. Of the locks (``ring.turn``,
  the I/O lock, the leader's, the wake-up's) no two are held at once, but the wake-up's inside the I/O lock.
* An interrupt (Ctrl-C) may break off whatever the main thread does here; `HEARTBEAT_S` later at the latest, the I/O
  thread makes good what that left undone.
* A signal handler, or a finaliser, that finds its own thread holding one of these locks is turned away with a
  RuntimeError: it can neither go on nor wait for itself.
* The first failure is kept; it wakes everybody, and every later call raises from it.
* The thread holds the connection but never the client, so a dropped client is collected; the connection then delivers
  what it holds, for a bounded time, and ends.
* A forked child owns nothing here: it closes its copies of the descriptors and touches no lock.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import select
import socket
import threading
import time
from typing import Any, NoReturn

from . import lifetime
from .backlog import Backlog
from .deadline import NEVER, Deadline, bounded_wait
from .dial import hang_up
from .errors import ConnectionClosedError, DeliveryTimeoutError
from .leader import Leader
from .locks import is_mine, release_if_mine
from .pace import Pace
from .pump import Pump
from .ring import Fill, Ring
from .vigil import silence
from .wakeup import WakeUp

_log = logging.getLogger(__name__)

# Seconds after which the I/O thread looks at everything although nobody woke it: an upper bound on how long anything
# that an interrupt broke off, or a dropped client, stays unnoticed. A pass costs some 30 us of CPU.
HEARTBEAT_S = 1.0
# The same for a caller who waits: it looks for itself, since acks fewer than WAITING_ACKS wake nobody.
WAITER_HEARTBEAT_S = 0.05
# Small rows may linger for this long to be written together, if the last write was as recent and acks are still out:
# one system call costs as much as several samples.
LINGER_S = 0.001
LINGER_BYTES = 1024
LINGER_SHARE = 4  # of the window
# Seconds without an ack after which a wait is named in the log, and again after as many more.
STALL_WARNING_S = 30.0
# Seconds for an I/O thread that has done everything to be gone; bounded, since a signal handler may have interrupted
# another call's `Thread.join`, which then holds the thread's lock.
JOIN_S = 1.0
# One system call's worth for the I/O thread, in bytes: large enough for calls not to count, small enough for the lock.
THREAD_WRITE_BYTES = 1024 * 1024
# Whether `poll` tells of a peer that hung up without being asked for acks too. Where not, every ack wakes the thread.
_TELLS_HANG_UP = hasattr(select, "POLLRDHUP")
_HANG_UP = getattr(select, "POLLRDHUP", 0)


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
        self._end: int | None = None  # where the last row of all will end; known since the ring refuses others
        self._pid = os.getpid()
        self._line = Pump(sock, ring, window)
        self._io = threading.RLock()
        self._leader = Leader(sock)
        self._listening = False  # whether the I/O thread polls for acks
        self._pace = Pace(window)
        self._backlog = Backlog(ring, window)
        self._lingering = False  # whether the I/O thread will look within LINGER_S
        self._warned_at = self._line.progress_at
        self._failure_told = False
        self._stop = False
        self._farewell: Deadline | None = None
        self._wake_up = WakeUp()
        self._locks = (self._io, ring.turn, self._wake_up.lock, self._leader.lock)
        self._thread = threading.Thread(target=self._run, name=f"echo_torch {peer}", daemon=True)
        self._ended = threading.Lock()  # held while the thread runs

    def start(self) -> None:
        """Start the I/O thread, on which everything depends; until then, only memory and the socket are held.

        ``Thread.start`` waits in Python code that an interrupt can leave locked, and ``socketpair`` can be left with
        descriptors that nobody owns: so both are called on a thread of their own, where none strikes, which is waited
        for in C.
        """
        lifetime.expect_end_of_child()
        started = threading.Lock()
        outcome: list[BaseException] = []

        def start_thread() -> None:
            try:
                self._wake_up.open()
                self._leader.open()
                self._thread.start()
            except BaseException as error:
                outcome.append(error)
            started.release()

        self._ended.acquire()
        started.acquire()
        try:
            _thread.start_new_thread(start_thread, ())
            started.acquire()
        except BaseException:
            self._stop = True  # if the thread runs, or will, this is all that it needs to end
            raise
        if outcome:
            self._tear_down()
            raise outcome[0]

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
            ConnectionClosedError: the connection had failed with rows un-acked, and no call has said so yet; or it
                failed before the tail was acked.
            DeliveryTimeoutError: rows are un-acked at the deadline.
        """
        if self._pid != os.getpid():
            self.disown()
            return
        self._enter("close")
        try:
            end = self._refuse()
            if self.failure is None:
                self._wait_for("close", self.ring.packed, deadline)
                self._pack_tail(deadline)
                self._wait_for("close", end, deadline)
            elif self.ring.unacked and not self._failure_told:
                self._raise_failure("close")
        finally:
            self._stop = True
            self._wake_up.kick(anyway=True)  # an interrupted kick shall not make this one wait
            if threading.current_thread() is not self._thread:
                with self._ended:
                    pass
                self._thread.join(JOIN_S)

    def say_farewell(self) -> None:
        """Have the I/O thread deliver what is packed, and the tail, and end, all by itself."""
        self._refuse()
        self.abandoned = True
        self._wake_up.kick()

    def join(self, deadline: Deadline) -> bool:
        """Wait for the I/O thread to end; gives whether it did."""
        if not self._ended.acquire(timeout=bounded_wait(deadline.remaining())):
            return False
        self._ended.release()
        return True

    def _refuse(self) -> int:
        """Accept no more rows but the tail; gives where that ends."""
        self.ring.refuse()
        self._leader.wake()
        with self.ring.turn:
            if self._end is None:
                tail = self.ring.replay if self._replay_tail and self.ring.packed else 0
                self._end = self.ring.packed + tail
            return self._end

    def _enter(self, call: str) -> None:
        """Turn away whom this connection cannot serve: another process, or a signal handler inside a call of ours."""
        if self._pid != os.getpid():
            raise ConnectionClosedError(
                f"{self.peer}: this connection belongs to process {self._pid}; open one in process {os.getpid()}"
            )
        if any(map(is_mine, self._locks)):
            raise RuntimeError(
                f"{call}() was called by a signal handler or finaliser that interrupted a call to the same client in "
                "the same thread; raise an exception there (sys.exit) and flush outside"
            )

    # Packing, on behalf of `call`: "send", or "close" for the tail.

    def _accept(self, call: str, rows: int, fill: Fill, deadline: Deadline) -> None:
        done = 0
        self._backlog.begin()
        try:
            while done < rows:
                packed = self._pack(call, rows - done, fill, done)
                done += packed
                if not packed:
                    self._push()
                    self._wait_for_room(call, rows - done, deadline)
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            error.rows_accepted = done
            raise
        finally:
            # Not after each run: the thread would compete for memory, and for the GIL, with the copying of the next.
            self._push()

    def _pack(self, call: str, want: int, fill: Fill, first: int) -> int:
        """Fill and count as many rows as are free in one run; gives how many."""
        with self.ring.turn:
            slot, rows = self.ring.free_run(want)
            if rows:
                self._check_open(call)
                fill(slot, first, rows)
                if not self.ring.commit(rows, last=call == "close"):
                    self._check_open(call)
            return rows

    def _pack_tail(self, deadline: Deadline) -> None:
        """Pack the last ``replay`` rows once more, or all of them in cycles if there were fewer; only once."""
        ring = self.ring
        period = min(ring.replay, ring.packed)
        with ring.turn:  # of several calls of `close`, one
            if not self._replay_tail or not period:
                return
            self._replay_tail = False
            self._tail_from = ring.packed

        self._accept("close", ring.replay, lambda slot, first, rows: ring.repeat(slot, rows, period), deadline)

    def _wait_for_room(self, call: str, rows: int, deadline: Deadline) -> None:
        """Wait for a good part of the ring at once: a wake-up for every row would cost more than the rows."""
        ring = self.ring
        threshold = ring.rows_free_at(min(rows, max(1, min(ring.limit, ring.capacity - ring.replay) // 4)))
        began, acked = time.monotonic(), ring.acked
        try:
            patience = self._backlog.patience(threshold)
            if patience is None:
                self._wait_for(call, threshold, deadline)
            else:  # and then, if that was not enough, for room in all of the ring, of which there may be some
                self._wait_for(call, threshold, NEVER, min(patience, deadline, key=lambda moment: moment.at))
        finally:
            self.blocked_seconds += time.monotonic() - began
        self._backlog.waited(threshold, acked, began)

    # Waiting.

    def _wait_for(self, call: str, threshold: int, deadline: Deadline, until: Deadline | None = None) -> None:
        """Park until ``acked`` reaches ``threshold``; with ``until``, at the most so long, and without timing out."""
        ring = self.ring
        while ring.acked < threshold and not (until and until.expired):
            waiter = ring.enlist(threshold)
            try:
                self._nudge()
                if ring.acked >= threshold:
                    break
                self._check_open(call)
                if deadline.expired or self._patience() <= 0:
                    self._look()
                    if ring.acked >= threshold:
                        break
                    self._check_open(call)
                    if deadline.expired or self._patience() <= 0:
                        if until:
                            break
                        self._raise_timeout(call, deadline)
                pause = min(deadline.remaining(), self._patience(), WAITER_HEARTBEAT_S)
                pause = min(pause, until.remaining()) if until else pause
                if self._listening or not self._leader.lead(waiter, pause):
                    waiter.park(pause)
            finally:
                ring.forget(waiter)
        ring.wake_one()

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
        raise self._counted(type(failure)(f"{failure}; {call}() with {self._whats_open()}")) from failure

    def _raise_timeout(self, call: str, deadline: Deadline) -> NoReturn:
        if deadline.expired:
            what = f"{call}() not done within {deadline.timeout:g} s"
        else:
            what = f"nothing was acked for {self.stall_timeout:g} s (stall_timeout)"
        self._failure_told = self._failure_told or call == "close"
        text = f"{self.peer}: {what}; {self._whats_open()}"
        raise self._counted(DeliveryTimeoutError(text if call == "close" else f"{text}, delivery goes on"))

    def _whats_open(self) -> str:
        text = f"{self.unacked} samples un-acked"
        if self.unacked or not self.ring.unacked:
            return text
        return f"{text}, but their tail, which was sent once more, is: up to {self.ring.replay} may be lost"

    def _counted(self, error: Any) -> Any:
        error.unacked = self.unacked
        return error

    # Between callers and the I/O thread.

    def _push(self) -> None:
        """See that rows just packed get written: here and now if `Backlog` has callers do that, else by the thread."""
        ring, line = self.ring, self._line
        if line.full:
            return  # the thread waits for the socket to take more
        pending = (ring.packed - ring.written) * ring.row_bytes
        if self._may_linger(pending):
            if not self._lingering:
                self._lingering = True
                self._wake_up.kick()
        elif pending > self._backlog.caller_bytes and ring.written - ring.acked < line.window:
            self._wake_up.kick()
        else:
            self._nudge(read_acks=False)

    def _may_linger(self, pending: int) -> bool:
        ring, line = self.ring, self._line
        few = pending < LINGER_BYTES and (ring.packed - ring.written) * LINGER_SHARE < line.window
        return few and line.in_the_air and time.monotonic() - line.written_at < LINGER_S

    def _nudge(self, read_acks: bool = True) -> None:
        """Pump here and now if possible, and have the thread see to what is left."""
        ring, line = self.ring, self._line
        pumped = self._try_pump(read_acks)
        if not pumped or line.full or line.writable or (ring.packed > ring.written and not self._listening):
            self._wake_up.kick()

    def _look(self) -> None:
        """Read the acks that are there, waiting for whoever pumps to be done with it."""
        with self._io:
            if self.failure is None:
                self._pump(True, self._backlog.caller_bytes)

    def _try_pump(self, read_acks: bool = False) -> bool:
        """Pump if the I/O lock is free; gives whether it was."""
        lock = self._io
        try:
            if is_mine(lock) or not lock.acquire(False):
                return False
            if self.failure is None:
                self._pump(read_acks, self._backlog.caller_bytes)
            lock.release()
            return True
        except BaseException:
            release_if_mine(lock)
            raise

    def _pump(self, read_acks: bool, write_bytes: int) -> None:
        """With the I/O lock held."""
        try:
            self._line.run(read_acks, write_bytes)
        except OSError as error:
            self._fail(error)
        if self.ring.wake():
            self._leader.wake()

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure, wake everybody, and let the thread end."""
        if self.failure is None:
            if isinstance(error, ConnectionClosedError):
                failure = type(error)(f"{self.peer}: {error}")
            else:
                failure = ConnectionClosedError(f"{self.peer}: connection lost: {error}")
            failure.__cause__ = error.with_traceback(None)  # whose frames would keep the ring alive
            # Nothing comes between the next two lines: no row is accepted once anybody can know of the failure.
            self.failure = failure
            self.ring.stopped = True
        self.ring.stop()
        self._leader.wake()
        if threading.current_thread() is not self._thread:
            self._wake_up.kick()

    # The I/O thread.

    def _run(self) -> None:
        lifetime.begin(self)
        try:
            poller = select.poll()
            poller.register(self._wake_up.reader, select.POLLIN)
            writable = True
            while (nap := self._pass(writable)) is not None:
                pause = self._pace.nap(self.ring.acked)
                if pause and self._line.waits_for_acks:
                    time.sleep(pause)
                poller.register(self._line.sock, self._interest())
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

    def _interest(self) -> int:
        """What to poll the socket for: acks only if rows, or the end of an abandoned connection, wait for them."""
        self._listening = False  # a caller who packs from here on, and finds it so, kicks
        if self.ring.packed > self.ring.written or self.abandoned or not _TELLS_HANG_UP:
            self._listening = True
        else:
            self.ring.wake_one()  # to lead
        return _HANG_UP | (select.POLLIN if self._listening else 0) | (select.POLLOUT if self._line.full else 0)

    def _pass(self, writable: bool) -> float | None:
        """One look at everything; gives how many seconds it may be until the next, or None when it is time to end."""
        with self._io:
            if self._stop or self.failure is not None:
                return None
            if writable:
                self._line.full = False
            lingered, self._lingering = self._lingering, False
            written = self.ring.written
            self._pump(True, THREAD_WRITE_BYTES)
            self._lingering = lingered and self.ring.written > written
        if self._host_is_gone():
            return None
        self._warn_of_stall()
        if self._said_farewell():
            return None
        if self._line.writable and not self._line.full:
            return 0.0
        if self._lingering:
            return LINGER_S
        return WAITER_HEARTBEAT_S if self.abandoned else HEARTBEAT_S

    def _host_is_gone(self) -> bool:
        """Whether the peer's host answers no more; asked when acks have stayed away for a while."""
        line = self._line
        if not line.in_the_air or time.monotonic() - line.progress_at < HEARTBEAT_S:
            return False
        why = silence(line.sock)
        if why:
            self._fail(ConnectionClosedError(why))
        return bool(why)

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
            self._farewell = Deadline(lifetime.FAREWELL_S)
        if self.ring.unacked and not self._farewell.expired:
            return False
        if self._replay_tail and not self.ring.unacked:
            with contextlib.suppress(ConnectionClosedError, DeliveryTimeoutError):
                self._pack_tail(self._farewell)
            return not self.ring.unacked
        if self.ring.unacked:
            _log.warning("%s: ended with %s", self.peer, self._whats_open())
        return True

    def _tear_down(self) -> None:
        """Free everything and wake everybody; runs once, at the end of the I/O thread."""
        with self._io:
            if self.failure is None:
                self.failure = ConnectionClosedError(f"{self.peer}: the client was closed")
                self._failure_told = self._failure_told or not self.ring.unacked
            hang_up(self._line.sock)
        self._leader.close()
        self._wake_up.close()
        self.ring.stop()
        lifetime.end(self)
        self._ended.release()

    def disown(self) -> None:
        """In a forked child: close its copies of the descriptors, which neither needs nor takes a lock."""
        self._line.sock.close()
        self._wake_up.disown()
        self._leader.disown()
