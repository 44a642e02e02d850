"""The child's half of the ledger: what it sent for a sink, told to its parent.

Interrupts and signal handlers may strike wherever a child sends: so what wakes the thread is a lock, which C code waits
for and releases, and what guards the file is an RLock. Nobody waits for the thread without a limit.
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
from echo_torch.metrics.stats import Counts
from echo_torch.metrics.timing import Times
from echo_torch.routing.connector import WORKER_RECONNECT_S
from echo_torch.routing.route import Route
from echo_torch.support import shutdown
from echo_torch.support.deadline import Deadline

from . import ledger
from .file_locks import is_alive

_log = logging.getLogger(__name__)

# Seconds between two looks at the acks while some are out, first and later, and at what the parent asks for otherwise.
# They come soon after the last write, or the learner is busy.
FIRST_POLL_S = 0.001
BUSY_POLL_S = 0.02
IDLE_POLL_S = 0.1
# Seconds that a child may take at its end to deliver: a DataLoader kills workers that take longer than 5.
CHILD_CLOSE_S = 4.0
# Seconds for the thread to be gone when there is nothing left to do.
JOIN_S = 1.0


def find_parent(origin: int) -> int | None:
    """The process to report to; None in one that is no child of a process that has the sink.

    Args:
        origin: the process that made the sink.
    """
    if os.getpid() == origin:
        return None
    parent = multiprocessing.parent_process()
    if parent is not None:  # the forkserver's children have another parent than the system says
        return parent.pid
    return origin if os.getppid() == origin else None


def make_death_check(parent: int) -> Callable[[], bool]:
    """Gives what tells whether the process to report to has died."""
    if os.getppid() == parent:
        return lambda: os.getppid() != parent
    process = multiprocessing.parent_process()  # by a pipe, whose other end processes may have that it forked
    return lambda: process is None or not process.is_alive() or not is_alive(parent)


class FlagFiles:
    """What a parent and those of its children that end with it tell each other for later, when some may not have begun.

    It is kept in the ledger's folder. In a process that is no such child, nothing is told by a parent.

    Args:
        token: the sink's.
        origin: the process that made the sink.
    """

    def __init__(self, token: str, origin: int) -> None:
        self._token = token
        self._parent = find_parent(origin) if multiprocessing.current_process().daemon else None

    def set_closed(self) -> None:
        """Tell children that the sink was closed here."""
        if not multiprocessing.current_process().daemon:  # which has no children that end with it
            ledger.set_flag(self._token, os.getpid(), ledger.SINK_CLOSED)

    @property
    def closed_by_parent(self) -> bool:
        """Whether the parent has closed the sink."""
        return self._parent is not None and ledger.has_flag(self._token, self._parent, ledger.SINK_CLOSED)

    def set_learner_gone(self, gone: bool) -> None:
        """Tell the workers of later epochs whether the learner was found."""
        if self._parent is not None:
            (ledger.set_flag if gone else ledger.clear_flag)(self._token, self._parent, ledger.LEARNER_GONE)

    def limit_connect_timeout(self, timeout: float | None) -> float | None:
        """Seconds to connect in, of ``timeout``: few if a worker before has waited for the learner in vain."""
        if self._parent is None or not ledger.has_flag(self._token, self._parent, ledger.LEARNER_GONE):
            return timeout
        return WORKER_RECONNECT_S if timeout is None else min(timeout, WORKER_RECONNECT_S)


class ReportedTotals(Protocol):
    """What only the session counts."""

    dropped: int
    check_seconds: float


class ReportedSession(Protocol):
    """What has a connection to report of: a sink's session."""

    @property
    def totals(self) -> ReportedTotals: ...

    def close_for_parent(self) -> None:
        """Deliver everything and close, as the parent asks."""


class Reporter:
    """Tells the parent, from a thread of its own, what became of the samples of this process.

    If the session is dropped without having been closed, the thread closes the connection; and if the parent dies that
    this process, being daemonic, ends with: a `send` that blocks would not let it.

    Args:
        token: the sink's.
        parent: to whom to report.
        session: of whom to report; not kept alive.
        learners: how many it sends to.

    Raises:
        ConnectionClosedError: the parent has closed the sink, and this process ends with it.
        OSError: there is no place for the report.
    """

    def __init__(self, token: str, parent: int, session: ReportedSession, learners: int) -> None:
        self._entry = ledger.create_entry(token, parent, multiprocessing.current_process().daemon, learners)
        self._parent_died = make_death_check(parent)
        self._session = weakref.ref(session)
        self.route: Route | None = None
        """Its connection, once there is one."""
        self._wake_lock = threading.Lock()  # released to wake the thread
        self._wake_lock.acquire()
        self._ended = False
        self._client_failed = False  # whether the client fails in a way of its own
        self._next_parent_check = Deadline(0.0)  # at the parent
        self._close_thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._run, name=f"echo_torch report to {parent}", daemon=True)

    def start(self) -> None:
        shutdown.register_exit_handler(self)
        self._thread.start()

    def report_sent(self, count: int) -> None:
        """So many samples were accepted in all: said before anybody can wait for them."""
        with self._lock:
            self._entry["sent"] = max(self._entry["sent"], count)
        self._wake()

    def begin_exit(self) -> None:
        """Have the thread deliver everything and close, as if the parent asked for it."""
        self._entry["finish"] = 1
        self._wake()

    def finish_exit(self) -> None:
        """At the end of the process, after `begin_exit`; one interrupt does not keep the rest from being told."""
        deadline = Deadline(CHILD_CLOSE_S + JOIN_S / 2)
        try:
            self._join_thread(deadline)
        finally:
            self._join_thread(deadline)

    def _join_thread(self, deadline: Deadline) -> None:
        if self._thread.is_alive():
            self._thread.join(deadline.remaining())

    def report_end(self, error: Exception | None = None) -> None:
        """The connection has ended, maybe in ``error``: say so, and free everything."""
        with self._lock:
            if self._ended:
                return
            if error is not None:
                self._write_error(error)
            self._write_counts(ended=True)
            self._entry["closed"] = 1
            self._ended = True
        self._wake()
        if threading.current_thread() not in (self._thread, self._close_thread) and self._thread.is_alive():
            self._thread.join(JOIN_S)
        self._entry.close()

    def _wake(self) -> None:
        if self._wake_lock.locked():
            try:  # noqa: SIM105
                self._wake_lock.release()
            except RuntimeError:  # another thread did
                pass

    def _run(self) -> None:
        busy, pause, sent = False, FIRST_POLL_S, 0
        while not self._ended:
            if not busy:
                self._wake_lock.acquire(timeout=IDLE_POLL_S)
            pause = min(2 * pause, BUSY_POLL_S) if sent == self._entry["sent"] else FIRST_POLL_S
            sent = self._entry["sent"]
            busy = self._poll()
            close = self._pending_close()
            if close is not None:
                self._run_close(close)
            elif busy:
                time.sleep(pause)

    def _poll(self) -> bool:
        """Tell how things are; gives whether acks are out that may come."""
        failure = None if self._client_failed else self._check_route()
        with self._lock:
            if self._ended:
                return False
            if failure is not None:
                self._write_error(failure)
            return self._write_counts() and not self._client_failed

    def _pending_close(self) -> Callable[[], None] | None:
        """What is to end the connection, if that is to be."""
        session = self._session()
        if session is None:
            return self._close_route
        return session.close_for_parent if self._entry["finish"] or self._is_orphaned() else None

    def _is_orphaned(self) -> bool:
        """Whether the parent has died that a daemonic child ends with, and which would have asked it to finish."""
        if not self._entry["daemon"] or not self._next_parent_check.expired:
            return False
        self._next_parent_check = Deadline(IDLE_POLL_S)
        return self._parent_died()

    def _run_close(self, close: Callable[[], None]) -> None:
        """Have the connection closed, on another thread, and go on telling what comes of it."""
        self._close_thread = threading.Thread(target=close, name=f"echo_torch end of {os.getpid()}", daemon=True)
        try:
            self._close_thread.start()
        except RuntimeError:  # the interpreter is ending, and starts none any more
            close()
        else:
            while self._close_thread.is_alive():
                self._close_thread.join(BUSY_POLL_S)
                with self._lock:
                    if not self._ended:
                        self._write_counts()
        self.report_end()

    def _close_route(self) -> None:
        """For a session that was dropped."""
        error = None
        try:
            if self.route is not None:
                self.route.close(CHILD_CLOSE_S)
        except Exception as problem:
            error = problem
            _log.warning("%s", problem)
        self.report_end(error)

    def _check_route(self) -> Exception | None:
        """What ended the connection with samples un-acked."""
        try:
            if self.route is not None:
                self.route.check()
        except ConnectionError as error:
            return error
        except Exception as problem:  # of a client that is not ours
            self._client_failed = True
            _log.warning("%s", problem, exc_info=problem)
            return problem
        return None

    def _write_counts(self, ended: bool = False) -> bool:
        """Store the counts; gives whether acks are out."""
        entry, session = self._entry, self._session()
        counts = Counts() if self.route is None else self.route.counts()
        if session is not None:
            times = Times() if self.route is None else self.route.times()
            entry["dropped"] = session.totals.dropped
            entry.write_times(times._replace(checking=session.totals.check_seconds))
        if self.route is not None:
            entry.write_peer_counts(self.route.peer_counts())
        entry["sent"] = max(entry["sent"], counts.sent)
        for field in ("reconnects", "resent", "maybe_duplicated", "maybe_lost"):
            entry[field] = getattr(counts, field)
        # Until it is over, or that was said, those to wait for first: who waits knows how much had been sent, and not
        # to whom.
        if ended or entry["error_kind"] or self.route is None:
            entry["acked"] = counts.sent - counts.unacked
        else:
            entry["acked"] = self.route.progress()[1]
        return counts.unacked > 0

    def _write_error(self, error: Exception) -> None:
        kind = ledger.ERROR_KINDS.index(ConnectionClosedError)
        if type(error) in ledger.ERROR_KINDS:
            kind = ledger.ERROR_KINDS.index(type(error))
        elif isinstance(error, TimeoutError):
            kind = ledger.ERROR_KINDS.index(DeliveryTimeoutError)
        self._entry.write_error(kind, str(error))
