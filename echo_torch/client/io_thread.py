"""The one thread of a connection: serves the socket, reconnects when it is lost, and frees everything at the end.

* The thread holds the connection but never the client. So Python can collect a client that you drop. The thread then
  delivers what is packed, for a bounded time, and ends.
* If an exception ends the thread, it becomes the failure that all callers see.
* The thread looks at everything once in `HEARTBEAT_S`, and so completes what an interrupt left undone elsewhere.
* A forked child has no such thread. It closes its copies of the descriptors and touches no lock.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import select
import threading
import time
from typing import Any

from echo_torch.errors import ConnectionClosedError, HandshakeError, LearnerGoneError, SpecMismatchError
from echo_torch.metrics.timing import LEARNER, NETWORK
from echo_torch.support import shutdown
from echo_torch.support.deadline import Deadline
from echo_torch.wire.connect import shutdown_and_close
from echo_torch.wire.keepalive import unreachable_reason

from .connection import COALESCE_S, Connection
from .flow import NETWORK_WATCH_INTERVAL_S, AckBatching
from .reconnect import Reconnector

_log = logging.getLogger(__name__)

# Seconds after which the thread looks at everything although nobody woke it. So it notices an interrupted call, or a
# dropped client, within that time. A look costs about 30 us of CPU.
HEARTBEAT_S = 1.0
# The same while the thread delivers what a dropped client has sent.
ABANDONED_HEARTBEAT_S = 0.05
# The pause before the thread asks again whether a device's copy is done: this share of the time that the copy has taken
# so far, and the shortest and longest pause in seconds. A copy waits for the kernels before it, which may take a whole
# step of training.
COPY_POLL_SHARE = 0.5
COPY_POLL_S = (0.001, 0.01)
# Seconds without an ack after which the log says that a caller waits, and between two such warnings. The first is for a
# blocked `send`, which holds up the training. A `wait` may have to sit out an evaluation of the learner.
SEND_STALL_WARNING_S = 5.0
STALL_WARNING_S = 30.0
# Seconds to try to reconnect if only the closing tail is left to send. A hiccup of the network takes less, and a server
# that restarts has lost its queue anyway.
TAIL_RECONNECT_S = 5.0
# Seconds to wait in `Thread.join` for a thread that has done everything. Bounded, because a signal handler may have
# interrupted another call's `Thread.join`, which then holds the thread's lock.
JOIN_TIMEOUT_S = 1.0
# Seconds between two looks in `IoThread.join`.
JOIN_POLL_S = 0.001
# Most bytes for one pump: enough for system calls to cost little, and few enough to hold the lock for a short time.
WRITE_BYTES = 1024 * 1024
# Whether `poll` can watch for the peer's close alone, and ignore acks. If not, every ack wakes the thread.
_HAS_POLLRDHUP = hasattr(select, "POLLRDHUP")
_POLLRDHUP = getattr(select, "POLLRDHUP", 0)


class IoThread:
    """Serves ``connection`` until it is closed or fails.

    Args:
        connection: what callers and the thread share.
        linger: seconds to wait at the end, when everything is acked, for the server to empty its queue.
    """

    def __init__(self, connection: Connection, linger: float) -> None:
        # How messages name the other side.
        self.peer = connection.peer
        # Whether the client is gone and the thread must deliver what is packed and end by itself. Set by the client's
        # finalizer and by `begin_exit`.
        self.abandoned = False
        # What callers and the thread share.
        self._connection = connection
        # Seconds to wait at the end, when everything is acked.
        self._linger_s = linger
        # Whether the thread must end at once.
        self._stopping = False
        # When the log last warned of a stall; at first, when this object was created.
        self._warned_at = time.monotonic()
        # When an abandoned connection ends even with rows left; None until it is first needed.
        self._exit_deadline: Deadline | None = None
        # The thread; `start` starts it.
        self._thread = threading.Thread(target=self._run, name=f"echo_torch {connection.peer}", daemon=True)
        # Held from `start` until the thread has freed everything.
        self._running_lock = threading.Lock()

    def start(self) -> None:
        """Create the wake-ups' descriptors and start the thread.

        Raises:
            RuntimeError: the system has no thread left.
            OSError: the system has no descriptor left.
        """
        # Ctrl-C strikes the main thread only. ``Thread.start`` waits in Python code, which an interrupt can leave with
        # a lock held, and an interrupted ``socketpair`` can leave descriptors that nobody owns. So a helper thread
        # calls both, and this thread waits for it in C code.
        shutdown.ensure_child_finalizer()
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
        except RuntimeError:  # the system has no thread left
            self._tear_down()
            raise
        except BaseException:
            # An interrupt. The I/O thread may run already, or start later: this makes it end and free everything.
            self._stopping = True
            raise
        if outcome:
            self._tear_down()
            raise outcome[0]

    # For other threads.

    @property
    def is_current(self) -> bool:
        """Whether the I/O thread itself asks, from a logging handler for example."""
        # Not by the thread's identifier, which the system gives to another thread after this one has ended.
        return threading.current_thread() is self._thread

    def sleep_after_last_ack(self, deadline: Deadline) -> None:
        """Sleep, so that the server can take what it acked out of its queue."""
        if self._linger_s and self._connection.sent:
            time.sleep(min(self._linger_s, deadline.remaining()))

    def stop(self) -> None:
        """End the thread at once, and block until it has ended; call this on another thread."""
        self._stopping = True
        # Force it: after an interrupt inside an earlier `wake`, a lost wake-up may seem pending.
        self._connection.wake_up.wake(force=True)
        # The thread releases this lock as the last thing it does.
        with self._running_lock:
            pass
        self._thread.join(JOIN_TIMEOUT_S)

    def begin_exit(self) -> None:
        """Let the thread deliver what is packed and the closing tail, and then end; returns at once."""
        self._connection.stop_accepting()
        self.abandoned = True
        self._connection.wake_up.wake()

    def join(self, deadline: Deadline) -> bool:
        """Block until the thread ends or the deadline passes; return whether it ended."""
        # Polls the lock. Acquiring it with a timeout is not safe: an interrupt before the release leaves it locked.
        while self._running_lock.locked():
            if deadline.expired:
                return False
            time.sleep(min(JOIN_POLL_S, deadline.remaining()))
        return True

    def finish_exit(self, deadline: Deadline) -> None:
        """Wait at the process's exit for the thread to end, and log if it has not."""
        if not self.join(deadline):
            _log.warning("%s: the connection has not ended within %g s", self.peer, deadline.timeout)

    def detach_after_fork(self) -> None:
        """In a forked child: close its copies of the descriptors; takes no lock."""
        self._connection.pump.sock.close()
        self._connection.wake_up.detach_after_fork()
        self._connection.ack_poller.detach_after_fork()

    # On the I/O thread.

    def _run(self) -> None:
        connection = self._connection
        shutdown.register_connection(self)
        try:
            while self._serve_socket():
                assert connection.reconnector is not None
                self._reconnect(connection.reconnector)
        except BaseException as error:  # whatever ends this thread is the failure that callers see
            frames = error.__traceback__  # kept for the log, because `fail` removes it from the error
            connection.fail(error)
            _log_safely(logging.ERROR, "%s: the I/O thread failed", self.peer, exc_info=(type(error), error, frames))
            if not isinstance(error, Exception):
                raise
        finally:
            self._tear_down()

    def _serve_socket(self) -> bool:
        """Serve one socket; return True when it is lost and must be replaced, False when the thread must end."""
        connection, ring, pump = self._connection, self._connection.ring, self._connection.pump
        ack_batching = AckBatching(pump.window)
        poller = select.poll()
        poller.register(connection.wake_up.reader, select.POLLIN)
        writable = True
        while True:
            # Look at everything once.
            with connection.io_lock:
                if self._should_stop() or connection.lost_error is not None:
                    break
                if writable:
                    pump.socket_full = False
                # Callers left a few rows here for COALESCE_S, to be written together. The pump below writes them. If
                # there were any, wait for COALESCE_S once more, because others may follow.
                was_coalescing, connection.is_coalescing = connection.is_coalescing, False
                written = ring.written
                # Poll the copies first, so that the pump below can write the rows whose copy is done. Only this thread
                # may poll them (`accelerator.dedicate_thread_and_query`).
                try:
                    ring.poll_copies()
                except RuntimeError as error:
                    connection.fail_on_copy_error(error)
                connection.run_pump(True, WRITE_BYTES)
                connection.is_coalescing = was_coalescing and ring.written > written
                # If no acks come, does the peer's host still answer?
                if (
                    connection.lost_error is None
                    and pump.awaits_acks
                    and time.monotonic() - pump.progress_at >= HEARTBEAT_S
                ):
                    why = unreachable_reason(pump.sock)
                    if why:
                        connection.mark_lost(ConnectionClosedError(why))
            self._warn_of_stall()
            if self._deliver_if_abandoned():
                self._stopping = True
            if self._should_stop() or connection.lost_error is not None:
                break

            # Only acks can make more rows writable: sleep until several have come, in place of one wake-up for each.
            pause = ack_batching.poll_interval(pump.acked)
            if pause and pump.is_blocked_by_window:
                time.sleep(pause)

            # Poll for acks only if this thread needs them itself. Otherwise one of the waiting callers becomes the ack
            # poller. Clear the flag before you look at the counters: a caller that packs from here on, and reads
            # False, wakes this thread.
            connection.io_thread_polls_acks = False
            rows_wait = ring.packed > ring.written or connection.is_resending
            if rows_wait or self.abandoned or connection.lost_error is not None or not _HAS_POLLRDHUP:
                connection.io_thread_polls_acks = True
            else:
                ring.wake_one()
            poll_in = select.POLLIN if connection.io_thread_polls_acks else 0
            poller.register(pump.sock, _POLLRDHUP | poll_in | (select.POLLOUT if pump.socket_full else 0))

            # How long until the thread looks at everything again, if nothing wakes it? Clear this flag before you look,
            # too: if a caller begins a copy from here on, and reads False, it wakes this thread.
            connection.io_thread_polls_copies = False
            bottleneck = connection.bottleneck
            copying_since = ring.copying_since
            if pump.has_writable_rows and not pump.socket_full:
                timeout = 0.0
            elif copying_since is not None:
                connection.io_thread_polls_copies = True
                elapsed = time.monotonic() - copying_since
                timeout = min(max(elapsed * COPY_POLL_SHARE, COPY_POLL_S[0]), COPY_POLL_S[1])
            elif connection.is_coalescing:
                timeout = COALESCE_S
            elif bottleneck in (LEARNER, NETWORK):
                timeout = NETWORK_WATCH_INTERVAL_S
            else:
                timeout = ABANDONED_HEARTBEAT_S if self.abandoned else HEARTBEAT_S

            began = time.monotonic()
            events = dict(poller.poll(timeout * 1000))
            connection.waited_seconds[bottleneck] += time.monotonic() - began
            # True for POLLOUT. Also true for an error or a closed connection, because the next write reports it.
            writable = bool(events.get(pump.sock.fileno(), 0) & ~select.POLLIN)
            # Clear the wake-up before the next look, so that one that comes during the look is not lost.
            connection.wake_up.clear(connection.wake_up.reader.fileno() in events)
        return connection.lost_error is not None and not self._should_stop()

    def _should_stop(self) -> bool:
        return self._stopping or self._connection.failure is not None

    def _warn_of_stall(self) -> None:
        """Log a warning if a caller waits and nothing was acked for too long."""
        pump, now = self._connection.pump, time.monotonic()
        stalled_s = now - pump.progress_at
        limit_s = SEND_STALL_WARNING_S if self._connection.send_is_blocked else STALL_WARNING_S
        if self._connection.ring.has_waiters and pump.awaits_acks and min(stalled_s, now - self._warned_at) >= limit_s:
            self._warned_at = now
            text = "%s: nothing acked for %.0f s, %s; is the learner draining?"
            _log_safely(logging.WARNING, text, self.peer, stalled_s, self._connection.describe_unacked())

    def _deliver_if_abandoned(self) -> bool:
        """If the client was dropped, go on delivering; return whether everything is delivered or the time is up."""
        if not self.abandoned:
            return False
        connection, deadline = self._connection, self._get_exit_deadline()
        if connection.closing_tail.start_row is None:
            connection.stop_accepting()
        # The tail may be packed only when all rows before it are acked.
        if not connection.unacked and connection.pack_closing_tail() == 0 and not connection.ring.unacked:
            self.sleep_after_last_ack(deadline)
            return True
        return deadline.expired

    def _get_exit_deadline(self) -> Deadline:
        """Return when an abandoned connection ends; the time starts with the first call."""
        if self._exit_deadline is None:
            self._exit_deadline = Deadline(shutdown.DELIVER_AT_EXIT_S)
        return self._exit_deadline

    def _reconnect(self, reconnector: Reconnector) -> None:
        """Replace the lost socket by a new one, or fail the connection."""
        connection, cause = self._connection, self._connection.lost_error
        # Unregister before closing: the descriptor's number may belong to another file right after.
        connection.ack_poller.set_socket(None)
        shutdown_and_close(connection.pump.sock)
        text = "%s: connection lost (%s); trying for up to %g s to reconnect, %d samples un-acked"
        # With `gone_after`, you expect the learner to finish some day. So its orderly end deserves no warning.
        gone_after = connection.gone_after
        level = logging.WARNING if gone_after is None else logging.DEBUG
        _log_safely(level, text, self.peer, cause, reconnector.give_up_after_s, connection.unacked)
        try:
            sock = reconnector.connect(lambda: self._should_give_up(reconnector), gone_after)
        except LearnerGoneError as error:
            connection.fail(error, f"the learner has finished: {error}, and nobody listens there any more")
        except (HandshakeError, SpecMismatchError) as error:
            connection.fail(error, f"connection lost: {cause}; {error}")
        except OSError as error:
            spent = f"not open again after {reconnector.seconds_lost:.1f} s and {reconnector.tries} tries"
            connection.fail(error, f"connection lost: {cause}; {spent}: {error}")
        else:
            resent = connection.resume_on(sock)
            _log_safely(
                logging.WARNING,
                "%s: connection lost (%s) and open again after %.1f s; %d samples are sent again, so the server may "
                "store them twice",
                self.peer,
                cause,
                reconnector.seconds_lost,
                resent,
            )

    def _should_give_up(self, reconnector: Reconnector) -> bool:
        """Whether a new connection would be of no use any more, or come too late."""
        if self._should_stop() or (self.abandoned and self._get_exit_deadline().expired):
            return True
        only_the_tail = self._connection.ring.refuses_new_rows and not self._connection.unacked
        return only_the_tail and reconnector.seconds_lost > TAIL_RECONNECT_S

    def _tear_down(self) -> None:
        """Free everything and wake every waiting thread; called once, at the end."""
        connection = self._connection
        with connection.io_lock:
            failed = connection.failure is not None
            shutdown_and_close(connection.pump.sock)
            connection.ended_at = time.monotonic()
        # If samples may be lost, and perhaps no later call raises that, log it.
        reported = connection.failure_reported or connection.failure_will_be_reported
        expected = isinstance(connection.failure, LearnerGoneError)
        if connection.at_risk and (self.abandoned or (failed and not expected and not reported)):
            how = f"{connection.failure};" if failed else f"{self.peer}:"
            _log_safely(logging.WARNING, "%s ended with %s", how, connection.describe_unacked())
        connection.ack_poller.close()
        connection.wake_up.close()
        # Wake the callers only after `ended_at` is set, so that they see it.
        connection.ring.stop()
        try:
            connection.ring.abandon_copies()
        finally:
            # Release the lock last: it lets `stop` and `join` return, and then their caller may free the memory.
            shutdown.unregister_connection(self)
            self._running_lock.release()


def _log_safely(level: int, text: str, *args: Any, **options: Any) -> None:
    """Log a message; an exception in a logging handler must not end the thread."""
    with contextlib.suppress(Exception):
        _log.log(level, text, *args, **options)
