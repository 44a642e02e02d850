"""The one thread of a connection, which sees to its socket, and opens another when that is lost.

* It holds the link but never the client, so a dropped client is collected; what is there is then delivered, for a
  bounded time, and the thread ends.
* Whatever ends it becomes the failure that all callers see.
* A forked child has no such thread, and nothing of it: it closes its copies of the descriptors, and touches no lock.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import select
import threading
import time
from typing import Any

from echo_torch.errors import ConnectionClosedError, HandshakeError, SpecMismatchError
from echo_torch.support import shutdown
from echo_torch.support.deadline import Deadline
from echo_torch.wire.connect import close_socket
from echo_torch.wire.keepalive import unreachable_reason

from .connection import LINGER_S, Link
from .flow import Pace
from .reconnect import Redial

_log = logging.getLogger(__name__)

# Seconds after which the thread looks at everything although nobody woke it: an upper bound on how long anything
# that an interrupt broke off, or a dropped client, stays unnoticed. A pass costs some 30 us of CPU.
HEARTBEAT_S = 1.0
# The same while the client is dropped and what it sent is still delivered.
FAREWELL_HEARTBEAT_S = 0.05
# A device's copy is looked at again after this share of the time that it has taken so far, and so many seconds at the
# least and at the most. It waits for the kernels before it, which may take a whole step of training.
COPY_SHARE = 0.5
COPY_LOOK_S = (0.001, 0.01)
# Seconds without an ack after which a wait is named in the log, and again after as many more.
STALL_WARNING_S = 30.0
# Seconds for which a lost connection is tried to be opened again for nothing but the tail: a hiccup of the network
# takes less, and a server that starts again has lost its queue anyway.
TAIL_REDIAL_S = 5.0
# Seconds for a thread that has done everything to be gone; bounded, since a signal handler may have interrupted
# another call's `Thread.join`, which then holds the thread's lock.
JOIN_S = 1.0
# Seconds between two looks at whether the thread has ended, where that is waited for with a limit.
JOIN_LOOK_S = 0.001
# One system call's worth, in bytes: large enough for calls not to count, small enough for the lock.
WRITE_BYTES = 1024 * 1024
# Whether `poll` tells of a peer that hung up without being asked for acks too. Where not, every ack wakes the thread.
_TELLS_HANG_UP = hasattr(select, "POLLRDHUP")
_HANG_UP = getattr(select, "POLLRDHUP", 0)


class IoThread:
    """Sees to ``link``, and lingers for ``linger`` seconds at the end when everything is acked."""

    def __init__(self, link: Link, linger: float) -> None:
        self.peer = link.peer
        self.abandoned = False
        """Whether the client is gone, and delivers no more than is there; set by its finaliser, or `deliver_at_exit`."""
        self._link = link
        self._linger_s = linger
        self._stopping = False
        self._warned_at = time.monotonic()
        self._farewell: Deadline | None = None
        self._thread = threading.Thread(target=self._run, name=f"echo_torch {link.peer}", daemon=True)
        self._ended = threading.Lock()  # held while the thread runs

    def start(self) -> None:
        """Start the thread, on which everything depends; until then, only memory and the socket are held.

        ``Thread.start`` waits in Python code that an interrupt can leave locked, and ``socketpair`` can be left with
        descriptors that nobody owns: so both are called on a thread of their own, where none strikes, which is waited
        for in C.
        """
        shutdown.register_child_finalizer()
        started = threading.Lock()
        outcome: list[BaseException] = []

        def start_thread() -> None:
            try:
                self._link.wake_up.open()
                self._link.leader.open()
                self._link.leader.follow(self._link.line.sock)
                self._thread.start()
            except BaseException as error:
                outcome.append(error)
            started.release()

        self._ended.acquire()
        started.acquire()
        try:
            _thread.start_new_thread(start_thread, ())
            started.acquire()
        except RuntimeError:  # no thread can be had
            self._tear_down()
            raise
        except BaseException:
            self._stopping = True  # if the thread runs, or will, this is all that it needs to end
            raise
        if outcome:
            self._tear_down()
            raise outcome[0]

    # What others do.

    @property
    def is_current(self) -> bool:
        """Whether the caller is this thread: a logging handler, say."""
        return threading.current_thread() is self._thread  # whose number another has after its end

    def linger(self, deadline: Deadline) -> None:
        """Give the server time to take what it acked out of its queue."""
        if self._linger_s and self._link.sent:
            time.sleep(min(self._linger_s, deadline.remaining()))

    def end(self) -> None:
        """Have the thread end, in any case, and wait for that; by another thread."""
        self._stopping = True
        self._link.wake_up.kick(anyway=True)  # an interrupted kick shall not make this one wait
        with self._ended:
            pass
        self._thread.join(JOIN_S)

    def deliver_at_exit(self) -> None:
        """Have the thread deliver what is packed, and the tail, and end, all by itself."""
        self._link.refuse()
        self.abandoned = True
        self._link.wake_up.kick()

    def join(self, deadline: Deadline) -> bool:
        """Wait for the thread to end; gives whether it did.

        By looking: an interrupt between acquiring the lock, with a limit, and releasing it would leave it locked.
        """
        while self._ended.locked():
            if deadline.expired:
                return False
            time.sleep(min(JOIN_LOOK_S, deadline.remaining()))
        return True

    def detach_after_fork(self) -> None:
        """In a forked child: close its copies of the descriptors, which neither needs nor takes a lock."""
        self._link.line.sock.close()
        self._link.wake_up.detach_after_fork()
        self._link.leader.detach_after_fork()

    # What the thread does.

    def _run(self) -> None:
        link = self._link
        shutdown.register_connection(self)
        try:
            while self._attend():
                assert link.redial is not None
                self._open_again(link.redial)
        except BaseException as error:  # whatever ends this thread is what every caller is told
            frames = error.__traceback__  # which `fail` forgets
            link.fail(error)
            _say(logging.ERROR, "%s: the I/O thread failed", self.peer, exc_info=(type(error), error, frames))
            if not isinstance(error, Exception):
                raise
        finally:
            self._tear_down()

    def _attend(self) -> bool:
        """See to one socket until it is lost, or it is time to end; gives whether it is the former."""
        link, line = self._link, self._link.line
        pace = Pace(line.window)
        poller = select.poll()
        poller.register(link.wake_up.reader, select.POLLIN)
        writable = True
        while self._pass(writable):
            pause = pace.nap(line.acked)
            if pause and line.waits_for_acks:
                time.sleep(pause)
            poller.register(line.sock, self._interest())
            nap = self._nap()
            held_up_by, began = link.held_up_by, time.monotonic()
            events = dict(poller.poll(nap * 1000))
            link.waiting[held_up_by] += time.monotonic() - began
            writable = bool(events.get(line.sock.fileno(), 0) & ~select.POLLIN)
            link.wake_up.seen(link.wake_up.reader.fileno() in events)
        return link.lost is not None and not self._over()

    def _interest(self) -> int:
        """What to poll the socket for: acks only if somebody waits for them who does not poll."""
        link, ring = self._link, self._link.ring
        link.listening = False  # a caller who packs from here on, and finds it so, kicks
        rows_wait = ring.packed > ring.written or link.repeating
        if rows_wait or self.abandoned or link.lost is not None or not _TELLS_HANG_UP:
            link.listening = True
        else:
            ring.wake_one()  # to lead
        return _HANG_UP | (select.POLLIN if link.listening else 0) | (select.POLLOUT if link.line.full else 0)

    def _nap(self) -> float:
        """Seconds until the next look at everything, unless something wakes us."""
        link = self._link
        link.watching = False  # a caller whose copy begins from here on, and finds it so, kicks
        if link.line.writable and not link.line.full:
            return 0.0
        copying_since = link.ring.copying_since
        if copying_since is not None:
            link.watching = True
            took = time.monotonic() - copying_since
            return min(max(took * COPY_SHARE, COPY_LOOK_S[0]), COPY_LOOK_S[1])
        if link.lingering:
            return LINGER_S
        return FAREWELL_HEARTBEAT_S if self.abandoned else HEARTBEAT_S

    def _pass(self, writable: bool) -> bool:
        """One look at everything; gives whether there is to be another."""
        link = self._link
        with link.lock:
            if self._over() or link.lost is not None:
                return False
            if writable:
                link.line.full = False
            lingered, link.lingering = link.lingering, False
            written = link.ring.written
            self._look_at_copies()
            link.pump(True, WRITE_BYTES)
            link.lingering = lingered and link.ring.written > written
            self._look_for_host()
        self._warn_of_stall()
        if self._said_farewell():
            self._stopping = True
        return not self._over() and link.lost is None

    def _over(self) -> bool:
        return self._stopping or self._link.failure is not None

    def _look_at_copies(self) -> None:
        """With the I/O lock held; by this thread alone, for others may not ask (`accelerator.query_from_dedicated_thread`)."""
        try:
            self._link.ring.look()
        except RuntimeError as error:
            self._link.fail_to_copy(error)

    def _look_for_host(self) -> None:
        """With the I/O lock held: ask whether the peer's host still answers, when acks have stayed away for a while."""
        link, line = self._link, self._link.line
        if link.lost is None and line.in_the_air and time.monotonic() - line.progress_at >= HEARTBEAT_S:
            why = unreachable_reason(line.sock)
            if why:
                link.lose(ConnectionClosedError(why))

    def _warn_of_stall(self) -> None:
        line, now = self._link.line, time.monotonic()
        quiet = now - line.progress_at
        if self._link.ring.waited_for and line.in_the_air and min(quiet, now - self._warned_at) >= STALL_WARNING_S:
            self._warned_at = now
            what = self._link.whats_open()
            _say(logging.WARNING, "%s: nothing acked for %.0f s, %s; is the learner draining?", self.peer, quiet, what)

    def _said_farewell(self) -> bool:
        """Whether the client was dropped and there is nothing, or no time, left to deliver."""
        if not self.abandoned:
            return False
        link, deadline = self._link, self._until_farewell()
        if link.tail.begins is None:
            link.refuse()
        if not link.unacked and link.pack_tail() == 0 and not link.ring.unacked:
            self.linger(deadline)
            return True
        return deadline.expired

    def _until_farewell(self) -> Deadline:
        """The deadline of an abandoned connection."""
        if self._farewell is None:
            self._farewell = Deadline(shutdown.DELIVER_AT_EXIT_S)
        return self._farewell

    def _open_again(self, redial: Redial) -> None:
        """Go on over another socket in place of the one that was lost, or fail."""
        link, cause = self._link, self._link.lost
        link.leader.follow(None)
        close_socket(link.line.sock)
        text = "%s: connection lost (%s); trying for %g s to open it again"
        _say(logging.INFO, text, self.peer, cause, redial.seconds)
        try:
            sock = redial.open(lambda: self._would_be_in_vain(redial))
        except (HandshakeError, SpecMismatchError) as error:
            link.fail(error, f"connection lost: {cause}; {error}")
        except OSError as error:
            spent = f"not open again after {redial.seconds_lost:.1f} s and {redial.tries} tries"
            link.fail(error, f"connection lost: {cause}; {spent}: {error}")
        else:
            again = link.begin_again(sock)
            _say(
                logging.WARNING,
                "%s: connection lost (%s) and open again after %.1f s; %d samples are sent again, which the server may "
                "then have twice",
                self.peer,
                cause,
                redial.seconds_lost,
                again,
            )

    def _would_be_in_vain(self, redial: Redial) -> bool:
        """Whether another connection is of no use any more, or comes too late."""
        if self._over() or (self.abandoned and self._until_farewell().expired):
            return True
        only_the_tail = self._link.ring.refusing and not self._link.unacked
        return only_the_tail and redial.seconds_lost > TAIL_REDIAL_S

    def _tear_down(self) -> None:
        """Free everything and wake everybody; once, at the end."""
        link = self._link
        with link.lock:
            failed = link.failure is not None
            if link.failure is None:
                link.failure = ConnectionClosedError(f"{self.peer}: the client was closed")
                link.told = link.told or not link.at_risk
            close_socket(link.line.sock)
            link.ended_at = time.monotonic()
        if link.at_risk and (self.abandoned or (failed and not link.heard)):  # there may be no call any more to say so
            how = f"{link.failure};" if failed else f"{self.peer}:"
            _say(logging.WARNING, "%s ended with %s", how, link.whats_open())
        link.leader.close()
        link.wake_up.close()
        link.ring.stop()
        try:
            link.ring.abandon()
        finally:
            shutdown.unregister_connection(self)
            self._ended.release()


def _say(level: int, text: str, *args: Any, **options: Any) -> None:
    """Log; what a handler raises shall not end the thread, with all that depends on it."""
    with contextlib.suppress(Exception):
        _log.log(level, text, *args, **options)
