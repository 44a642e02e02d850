"""The one thread of a connection, which sees to its socket, and opens another when that is lost.

* It holds the connection but never the client, so a dropped client is collected; what is there is then delivered, for a
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

from .connection import COALESCE_S, Connection
from .flow import AckBatching
from .reconnect import Reconnector

_log = logging.getLogger(__name__)

# Seconds after which the thread looks at everything although nobody woke it: an upper bound on how long anything
# that an interrupt broke off, or a dropped client, stays unnoticed. A pass costs some 30 us of CPU.
HEARTBEAT_S = 1.0
# The same while the client is dropped and what it sent is still delivered.
ABANDONED_HEARTBEAT_S = 0.05
# A device's copy is looked at again after this share of the time that it has taken so far, and so many seconds at the
# least and at the most. It waits for the kernels before it, which may take a whole step of training.
COPY_POLL_SHARE = 0.5
COPY_POLL_S = (0.001, 0.01)
# Seconds without an ack after which a wait is named in the log, and again after as many more.
STALL_WARNING_S = 30.0
# Seconds for which a lost connection is tried to be opened again for nothing but the tail: a hiccup of the network
# takes less, and a server that starts again has lost its queue anyway.
TAIL_RECONNECT_S = 5.0
# Seconds for a thread that has done everything to be gone; bounded, since a signal handler may have interrupted
# another call's `Thread.join`, which then holds the thread's lock.
JOIN_TIMEOUT_S = 1.0
# Seconds between two looks at whether the thread has ended, where that is waited for with a limit.
JOIN_POLL_S = 0.001
# One system call's worth, in bytes: large enough for calls not to count, small enough for the lock.
WRITE_BYTES = 1024 * 1024
# Whether `poll` tells of a peer that hung up without being asked for acks too. Where not, every ack wakes the thread.
_HAS_POLLRDHUP = hasattr(select, "POLLRDHUP")
_POLLRDHUP = getattr(select, "POLLRDHUP", 0)


class IoThread:
    """Sees to ``connection``, and lingers for ``linger`` seconds at the end when everything is acked."""

    def __init__(self, connection: Connection, linger: float) -> None:
        self.peer = connection.peer
        self.abandoned = False
        """Whether the client is gone, and delivers no more than is there; set by its finaliser, or `deliver_at_exit`."""
        self._connection = connection
        self._linger_s = linger
        self._stopping = False
        self._warned_at = time.monotonic()
        self._exit_deadline: Deadline | None = None
        self._thread = threading.Thread(target=self._run, name=f"echo_torch {connection.peer}", daemon=True)
        self._running_lock = threading.Lock()  # held while the thread runs

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
                self._connection.wake_up.open()
                self._connection.ack_poller.open()
                self._connection.ack_poller.set_socket(self._connection.pump.sock)
                self._thread.start()
            except BaseException as error:
                outcome.append(error)
            started.release()

        self._running_lock.acquire()
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
        if self._linger_s and self._connection.sent:
            time.sleep(min(self._linger_s, deadline.remaining()))

    def stop(self) -> None:
        """Have the thread end, in any case, and wait for that; by another thread."""
        self._stopping = True
        self._connection.wake_up.wake(force=True)  # an interrupted kick shall not make this one wait
        with self._running_lock:
            pass
        self._thread.join(JOIN_TIMEOUT_S)

    def deliver_at_exit(self) -> None:
        """Have the thread deliver what is packed, and the tail, and end, all by itself."""
        self._connection.stop_accepting()
        self.abandoned = True
        self._connection.wake_up.wake()

    def join(self, deadline: Deadline) -> bool:
        """Wait for the thread to end; gives whether it did.

        By looking: an interrupt between acquiring the lock, with a limit, and releasing it would leave it locked.
        """
        while self._running_lock.locked():
            if deadline.expired:
                return False
            time.sleep(min(JOIN_POLL_S, deadline.remaining()))
        return True

    def detach_after_fork(self) -> None:
        """In a forked child: close its copies of the descriptors, which neither needs nor takes a lock."""
        self._connection.pump.sock.close()
        self._connection.wake_up.detach_after_fork()
        self._connection.ack_poller.detach_after_fork()

    # What the thread does.

    def _run(self) -> None:
        connection = self._connection
        shutdown.register_connection(self)
        try:
            while self._serve_socket():
                assert connection.reconnector is not None
                self._reconnect(connection.reconnector)
        except BaseException as error:  # whatever ends this thread is what every caller is told
            frames = error.__traceback__  # which `fail` forgets
            connection.fail(error)
            _log_safely(logging.ERROR, "%s: the I/O thread failed", self.peer, exc_info=(type(error), error, frames))
            if not isinstance(error, Exception):
                raise
        finally:
            self._tear_down()

    def _serve_socket(self) -> bool:
        """See to one socket until it is lost, or it is time to end; gives whether it is the former."""
        connection, pump = self._connection, self._connection.pump
        ack_batching = AckBatching(pump.window)
        poller = select.poll()
        poller.register(connection.wake_up.reader, select.POLLIN)
        writable = True
        while self._run_once(writable):
            pause = ack_batching.poll_interval(pump.acked)
            if pause and pump.is_blocked_by_window:
                time.sleep(pause)
            poller.register(pump.sock, self._poll_events())
            timeout = self._poll_timeout()
            bottleneck, began = connection.bottleneck, time.monotonic()
            events = dict(poller.poll(timeout * 1000))
            connection.waited_seconds[bottleneck] += time.monotonic() - began
            writable = bool(events.get(pump.sock.fileno(), 0) & ~select.POLLIN)
            connection.wake_up.clear(connection.wake_up.reader.fileno() in events)
        return connection.lost_error is not None and not self._should_stop()

    def _poll_events(self) -> int:
        """What to poll the socket for: acks only if somebody waits for them who does not poll."""
        connection, ring = self._connection, self._connection.ring
        connection.io_thread_polls_acks = False  # a caller who packs from here on, and finds it so, kicks
        rows_wait = ring.packed > ring.written or connection.is_resending
        if rows_wait or self.abandoned or connection.lost_error is not None or not _HAS_POLLRDHUP:
            connection.io_thread_polls_acks = True
        else:
            ring.wake_one()  # to lead
        return (
            _POLLRDHUP
            | (select.POLLIN if connection.io_thread_polls_acks else 0)
            | (select.POLLOUT if connection.pump.socket_full else 0)
        )

    def _poll_timeout(self) -> float:
        """Seconds until the next look at everything, unless something wakes us."""
        connection = self._connection
        connection.io_thread_polls_copies = False  # a caller whose copy begins from here on, and finds it so, kicks
        if connection.pump.has_writable_rows and not connection.pump.socket_full:
            return 0.0
        copying_since = connection.ring.copying_since
        if copying_since is not None:
            connection.io_thread_polls_copies = True
            elapsed = time.monotonic() - copying_since
            return min(max(elapsed * COPY_POLL_SHARE, COPY_POLL_S[0]), COPY_POLL_S[1])
        if connection.is_coalescing:
            return COALESCE_S
        return ABANDONED_HEARTBEAT_S if self.abandoned else HEARTBEAT_S

    def _run_once(self, writable: bool) -> bool:
        """One look at everything; gives whether there is to be another."""
        connection = self._connection
        with connection.io_lock:
            if self._should_stop() or connection.lost_error is not None:
                return False
            if writable:
                connection.pump.socket_full = False
            was_coalescing, connection.is_coalescing = connection.is_coalescing, False
            written = connection.ring.written
            self._poll_copies()
            connection.run_pump(True, WRITE_BYTES)
            connection.is_coalescing = was_coalescing and connection.ring.written > written
            self._check_host()
        self._warn_of_stall()
        if self._exit_is_due():
            self._stopping = True
        return not self._should_stop() and connection.lost_error is None

    def _should_stop(self) -> bool:
        return self._stopping or self._connection.failure is not None

    def _poll_copies(self) -> None:
        """With the I/O lock held; by this thread alone, for others may not ask (`accelerator.query_from_dedicated_thread`)."""
        try:
            self._connection.ring.poll_copies()
        except RuntimeError as error:
            self._connection.fail_on_copy_error(error)

    def _check_host(self) -> None:
        """With the I/O lock held: ask whether the peer's host still answers, when acks have stayed away for a while."""
        connection, pump = self._connection, self._connection.pump
        if connection.lost_error is None and pump.awaits_acks and time.monotonic() - pump.progress_at >= HEARTBEAT_S:
            why = unreachable_reason(pump.sock)
            if why:
                connection.mark_lost(ConnectionClosedError(why))

    def _warn_of_stall(self) -> None:
        pump, now = self._connection.pump, time.monotonic()
        stalled_s = now - pump.progress_at
        if (
            self._connection.ring.has_waiters
            and pump.awaits_acks
            and min(stalled_s, now - self._warned_at) >= STALL_WARNING_S
        ):
            self._warned_at = now
            what = self._connection.describe_unacked()
            _log_safely(
                logging.WARNING,
                "%s: nothing acked for %.0f s, %s; is the learner draining?",
                self.peer,
                stalled_s,
                what,
            )

    def _exit_is_due(self) -> bool:
        """Whether the client was dropped and there is nothing, or no time, left to deliver."""
        if not self.abandoned:
            return False
        connection, deadline = self._connection, self._get_exit_deadline()
        if connection.resend_tail.start_row is None:
            connection.stop_accepting()
        if not connection.unacked and connection.pack_tail() == 0 and not connection.ring.unacked:
            self.linger(deadline)
            return True
        return deadline.expired

    def _get_exit_deadline(self) -> Deadline:
        """The deadline of an abandoned connection."""
        if self._exit_deadline is None:
            self._exit_deadline = Deadline(shutdown.DELIVER_AT_EXIT_S)
        return self._exit_deadline

    def _reconnect(self, reconnector: Reconnector) -> None:
        """Go on over another socket in place of the one that was lost, or fail."""
        connection, cause = self._connection, self._connection.lost_error
        connection.ack_poller.set_socket(None)
        close_socket(connection.pump.sock)
        text = "%s: connection lost (%s); trying for %g s to open it again"
        _log_safely(logging.INFO, text, self.peer, cause, reconnector.give_up_after_s)
        try:
            sock = reconnector.connect(lambda: self._should_give_up(reconnector))
        except (HandshakeError, SpecMismatchError) as error:
            connection.fail(error, f"connection lost: {cause}; {error}")
        except OSError as error:
            spent = f"not open again after {reconnector.seconds_lost:.1f} s and {reconnector.tries} tries"
            connection.fail(error, f"connection lost: {cause}; {spent}: {error}")
        else:
            resent = connection.resume_on(sock)
            _log_safely(
                logging.WARNING,
                "%s: connection lost (%s) and open again after %.1f s; %d samples are sent again, which the server may "
                "then have twice",
                self.peer,
                cause,
                reconnector.seconds_lost,
                resent,
            )

    def _should_give_up(self, reconnector: Reconnector) -> bool:
        """Whether another connection is of no use any more, or comes too late."""
        if self._should_stop() or (self.abandoned and self._get_exit_deadline().expired):
            return True
        only_the_tail = self._connection.ring.refuses_new_rows and not self._connection.unacked
        return only_the_tail and reconnector.seconds_lost > TAIL_RECONNECT_S

    def _tear_down(self) -> None:
        """Free everything and wake everybody; once, at the end."""
        connection = self._connection
        with connection.io_lock:
            failed = connection.failure is not None
            if connection.failure is None:
                connection.failure = ConnectionClosedError(f"{self.peer}: the client was closed")
                connection.failure_reported = connection.failure_reported or not connection.at_risk
            close_socket(connection.pump.sock)
            connection.ended_at = time.monotonic()
        if connection.at_risk and (
            self.abandoned or (failed and not connection.failure_will_be_reported)
        ):  # there may be no call any more to say so
            how = f"{connection.failure};" if failed else f"{self.peer}:"
            _log_safely(logging.WARNING, "%s ended with %s", how, connection.describe_unacked())
        connection.ack_poller.close()
        connection.wake_up.close()
        connection.ring.stop()
        try:
            connection.ring.abandon_copies()
        finally:
            shutdown.unregister_connection(self)
            self._running_lock.release()


def _log_safely(level: int, text: str, *args: Any, **options: Any) -> None:
    """Log; what a handler raises shall not end the thread, with all that depends on it."""
    with contextlib.suppress(Exception):
        _log.log(level, text, *args, **options)
