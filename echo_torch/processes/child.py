"""The child's half of the ledger: a thread that reports to the parent what this process sent for a sink.

* Ctrl-C and signal handlers may interrupt any line of a sender. So the lock that wakes the thread is a plain
  ``threading.Lock``, which C code acquires and releases. The lock that guards the file is an RLock, because a handler
  may acquire it while its own thread holds it.
* Every wait for the thread has a limit.
* Three events cannot wake the thread, so it polls for them: the parent asks this child to finish, the parent dies, or
  the session is dropped.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError
from echo_torch.metrics.stats import LOSS_FIELDS
from echo_torch.routing.connector import WORKER_RECONNECT_S
from echo_torch.routing.route import NOT_CONNECTED, Route
from echo_torch.support import shutdown
from echo_torch.support.deadline import Deadline

from . import ledger
from .file_locks import is_alive

_log = logging.getLogger(__name__)

# Seconds between two polls while acks are outstanding. If acks do not come soon after the last write, the learner is
# busy. So the first pause is `FIRST_POLL_S`, and each later one is twice as long, up to `BUSY_POLL_S`.
FIRST_POLL_S = 0.001
BUSY_POLL_S = 0.02
# Seconds between two polls while nothing is outstanding. It may take the thread this long to notice the parent's
# request, or the parent's death.
IDLE_POLL_S = 0.1
# Seconds that a child takes at most to deliver what is left when it ends. A DataLoader kills workers that take longer
# than 5.
CHILD_CLOSE_S = 4.0
# Seconds to wait for the thread to end once it has nothing left to do.
JOIN_S = 1.0


def find_parent_pid(origin: int) -> int | None:
    """Return the pid of the process to report to, or None if there is none.

    Args:
        origin: pid of the process that made the sink.
    """
    if os.getpid() == origin:
        return None
    # Ask multiprocessing first: to the system, the parent of a forkserver's child is the forkserver.
    parent = multiprocessing.parent_process()
    if parent is not None:
        return parent.pid
    return origin if os.getppid() == origin else None


def make_death_check(parent: int) -> Callable[[], bool]:
    """Return a function that checks whether process ``parent`` has died."""
    # When the parent dies, the system gives this process another parent.
    if os.getppid() == parent:
        return lambda: os.getppid() != parent
    # A forkserver's child asks multiprocessing, which watches a pipe. Other children of the parent may still hold the
    # far end of that pipe, so look for the pid as well.
    process = multiprocessing.parent_process()
    return lambda: process is None or not process.is_alive() or not is_alive(parent)


class FlagFiles:
    """News for children that start later: "the sink is closed" and "the learner is gone".

    Each flag is an empty file in the ledger's folder, with the parent's pid in its name. The parent sets "the sink is
    closed". Daemonic children, such as DataLoader workers, set "the learner is gone" for each other, and read both
    flags. In any other process every flag reads as not set.

    Args:
        token: names the ledger's folder; the same in all copies of a sink.
        origin: pid of the process that made the sink.
    """

    def __init__(self, token: str, origin: int) -> None:
        # Names the ledger's folder.
        self._token = token
        # Pid of the parent whose flags this process shares; None unless this process is a daemonic child.
        self._parent = find_parent_pid(origin) if multiprocessing.current_process().daemon else None

    @property
    def closed_by_parent(self) -> bool:
        """Whether the parent has closed the sink."""
        return self._parent is not None and ledger.has_flag(self._token, self._parent, ledger.SINK_CLOSED)

    def set_learner_gone(self, gone: bool) -> None:
        """Tell the workers of later epochs whether this one failed to find the learner."""
        if self._parent is not None:
            (ledger.set_flag if gone else ledger.clear_flag)(self._token, self._parent, ledger.LEARNER_GONE)

    @property
    def learner_gone(self) -> bool:
        """Whether an earlier worker did not find the learner."""
        return self._parent is not None and ledger.has_flag(self._token, self._parent, ledger.LEARNER_GONE)

    def limit_connecting(self, deadline: Deadline) -> Deadline:
        """Return ``deadline``, cut to a few seconds if an earlier worker did not find the learner."""
        return deadline.within(WORKER_RECONNECT_S) if self.learner_gone else deadline


class ReportedTotals(Protocol):
    """The counts that the session keeps. Its connection keeps all others."""

    # Samples given to `send` and not sent.
    dropped: int
    # Seconds spent on comparing batches with the example.
    check_seconds: float


class ReportedSession(Protocol):
    """What a `Reporter` needs of a sink's session."""

    @property
    def totals(self) -> ReportedTotals: ...

    def close_for_parent(self) -> None:
        """Deliver everything and close, because the parent asks for it."""


class Reporter:
    """The thread that writes what became of this process's samples into its ledger file.

    The thread also closes the connection if the session is dropped without being closed. In a daemonic child it closes
    the connection when the parent dies, because a `send` that blocks would keep the orphan alive.

    Args:
        token: names the ledger's folder; the same in all copies of a sink.
        parent: pid of the process to report to.
        session: the session to report; held by a weak reference.
        learners: how many learners the session sends to.

    Raises:
        ConnectionClosedError: this process is daemonic, and its parent has closed the sink.
        OSError: the ledger file cannot be made.
    """

    def __init__(self, token: str, parent: int, session: ReportedSession, learners: int) -> None:
        # This process's file in the ledger.
        self._entry = ledger.create_entry(token, parent, multiprocessing.current_process().daemon, learners)
        # Returns whether the parent has died.
        self._parent_died = make_death_check(parent)
        # Whether somebody other than the parent has removed the file. The parent may then miss it.
        self.entry_removed = False
        # The session, by a weak reference. If nobody else holds the session, it is dropped, and the thread closes it.
        self._session = weakref.ref(session)
        # The session's connection; NOT_CONNECTED until it is open.
        self.route: Route = NOT_CONNECTED
        # The idle thread waits for this lock; releasing it wakes the thread.
        self._wake_lock = threading.Lock()
        self._wake_lock.acquire()
        # Whether the last report is written; then the thread ends.
        self._ended = False
        # Whether a client other than `TcpClient` failed with an unknown error; then its acks are no longer polled.
        self._client_failed = False
        # When to check next whether the parent has died.
        self._next_parent_check = Deadline(0.0)
        # The thread that closes the connection; None until it starts.
        self._close_thread: threading.Thread | None = None
        # Hold it to write to the file.
        self._lock = threading.RLock()
        # Runs `_run`.
        self._thread = threading.Thread(target=self._run, name=f"echo_torch report to {parent}", daemon=True)

    def start(self) -> None:
        shutdown.register_exit_handler(self)
        self._thread.start()

    def report_sent(self, count: int) -> None:
        """Report that ``count`` samples were accepted in all.

        `send` calls it before it returns, so that a `wait` in the parent afterwards includes these samples.
        """
        with self._lock:
            self._entry["sent"] = max(self._entry["sent"], count)
        self._wake()

    def begin_exit(self) -> None:
        """Ask the thread to deliver everything and close, as if the parent asked; returns at once."""
        self._entry["finish"] = 1
        self._wake()

    def finish_exit(self, deadline: Deadline) -> None:
        """Wait for what `begin_exit` asked for."""
        deadline = deadline.within(CHILD_CLOSE_S + JOIN_S / 2)
        # Join twice: one Ctrl-C breaks off the first join, and the second still waits for the last report.
        try:
            self._join_thread(deadline)
        finally:
            self._join_thread(deadline)

    def _join_thread(self, deadline: Deadline) -> None:
        if self._thread.is_alive():
            self._thread.join(deadline.remaining())

    def report_end(self, error: Exception | None = None) -> None:
        """Write the last report, with ``error`` if the connection failed, and free everything; idempotent."""
        # An interrupt in this block leaves `_ended` unset, so the thread, or a second call, writes the report again.
        with self._lock:
            if self._ended:
                return
            if error is not None:
                self._write_error(error)
            self._write_counts(ended=True)
            self._entry["closed"] = 1
            self._ended = True
        self._wake()
        # Wait for the reporting thread. But do not wait on that thread itself, nor on the closing thread, for which it
        # waits.
        if threading.current_thread() not in (self._thread, self._close_thread) and self._thread.is_alive():
            self._thread.join(JOIN_S)
        self._entry.close()

    def _wake(self) -> None:
        if self._wake_lock.locked():
            try:  # noqa: SIM105
                self._wake_lock.release()
            except RuntimeError:  # another thread released it first
                pass

    def _run(self) -> None:
        busy, pause, sent = False, FIRST_POLL_S, 0
        while not self._ended:
            # With no acks outstanding, sleep until `_wake`. The timeout is for the three events that cannot wake this
            # thread: see the module's rules.
            if not busy:
                self._wake_lock.acquire(timeout=IDLE_POLL_S)
            # Poll soon after new samples, and ever less often while none come.
            pause = min(2 * pause, BUSY_POLL_S) if sent == self._entry["sent"] else FIRST_POLL_S
            sent = self._entry["sent"]
            busy = self._poll()
            close = self._pending_close()
            if close is not None:
                self._run_close(close)
            elif busy:
                time.sleep(pause)

    def _poll(self) -> bool:
        """Write the current counts; return whether acks are outstanding that may still come."""
        # Check without the lock, because a client other than `TcpClient` may block here until everything is acked.
        failure = None if self._client_failed else self._check_route()
        with self._lock:
            if self._ended:
                return False
            if failure is not None:
                self._write_error(failure)
            return self._write_counts() and not self._client_failed

    def _pending_close(self) -> Callable[[], None] | None:
        """Return the function to close the connection with, or None if it stays open."""
        session = self._session()
        if session is None:  # dropped
            return self._close_route
        return session.close_for_parent if self._entry["finish"] or self._is_orphaned() else None

    def _is_orphaned(self) -> bool:
        """Whether this child is daemonic, and its parent has died without a request to finish."""
        # The checks cost system calls. So make them at most once in `IDLE_POLL_S`, however often the thread polls.
        if not self._next_parent_check.expired:
            return False
        self._next_parent_check = Deadline(IDLE_POLL_S)
        parent_died = self._parent_died()
        # A parent that ends removes all files itself. So a missing file means something only while the parent lives.
        self.entry_removed = self._entry.was_removed and not parent_died
        return bool(self._entry["daemon"]) and parent_died

    def _run_close(self, close: Callable[[], None]) -> None:
        """Close the connection on another thread, and report the acks that come meanwhile."""
        self._close_thread = threading.Thread(target=close, name=f"echo_torch end of {os.getpid()}", daemon=True)
        try:
            self._close_thread.start()
        except RuntimeError:  # the interpreter is ending and starts no more threads
            close()
        else:
            while self._close_thread.is_alive():
                self._close_thread.join(BUSY_POLL_S)
                with self._lock:
                    if not self._ended:
                        self._write_counts()
        self.report_end()

    def _close_route(self) -> None:
        """Close the connection of a session that was dropped."""
        error = None
        try:
            self.route.close(Deadline(CHILD_CLOSE_S))
        except Exception as problem:
            error = problem
            _log.warning("%s", problem)
        self.report_end(error)

    def _check_route(self) -> Exception | None:
        """Return the error that ended the connection while samples were un-acked, or None."""
        try:
            self.route.poll_or_raise()
        except ConnectionError as error:
            return error
        except Exception as problem:  # a client other than `TcpClient` may raise anything
            self._client_failed = True
            _log.warning("%s", problem, exc_info=problem)
            return problem
        return None

    def _write_counts(self, ended: bool = False) -> bool:
        """With the lock held, write the counts into the file; return whether acks are outstanding.

        Args:
            ended: whether the connection has ended.
        """
        entry, session = self._entry, self._session()
        counts = self.route.counts()
        if session is not None:
            entry["dropped"] = session.totals.dropped
            entry.write_times(self.route.times()._replace(checking=session.totals.check_seconds))
        entry.write_peer_counts(self.route.peer_counts())
        entry["sent"] = max(entry["sent"], counts.sent)
        for field in LOSS_FIELDS:
            entry[field] = getattr(counts, field)
        # The parent waits for the first n samples and does not know which learner got them. So while the connection
        # lives, count the acked samples from the first on, up to the first gap. Once it has ended, or its error is
        # written, count all acked samples: the parent then compares that count with everything sent.
        if ended or entry["error_kind"]:
            entry["acked"] = counts.sent - counts.unacked
        else:
            entry["acked"] = self.route.progress()[1]
        return counts.unacked > 0

    def _write_error(self, error: Exception) -> None:
        # The parent raises one of our own exceptions again. An unknown one becomes the nearest of them.
        kind = ledger.ERROR_KINDS.index(ConnectionClosedError)
        if type(error) in ledger.ERROR_KINDS:
            kind = ledger.ERROR_KINDS.index(type(error))
        elif isinstance(error, TimeoutError):
            kind = ledger.ERROR_KINDS.index(DeliveryTimeoutError)
        self._entry.write_error(kind, str(error))
