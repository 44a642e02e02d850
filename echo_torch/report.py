"""The child's half of the ledger: what it sent for a sink, told to its parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable

from . import lifetime
from .children import KINDS
from .errors import ConnectionClosedError, DeliveryTimeoutError
from .ledger import begin
from .stats import SinkStats

# Seconds between two looks at the acks while some are out, and at what the parent asks for otherwise.
BUSY_S = 0.02
IDLE_S = 0.1


def parent_of(origin: int) -> int | None:
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


class Report:
    """Tells the parent, from a thread of its own, what became of the samples of this process.

    Args:
        token: the sink's.
        parent: to whom to report.
        stats: what to report.
        failure: what ended the connection, if anything did.
        finish: closes the connection, delivering everything; called when the parent asks for it.
    """

    def __init__(
        self,
        token: str,
        parent: int,
        stats: Callable[[], SinkStats],
        failure: Callable[[], Exception | None],
        finish: Callable[[], None],
    ) -> None:
        self._entry = begin(token, parent)
        self._stats = stats
        self._failure = failure
        self._finish = finish
        self._wake = threading.Event()
        self._ending = False
        self._lock = threading.Lock()
        lifetime.expect_end_of_child()
        self._thread = threading.Thread(target=self._run, name=f"echo_torch report to {parent}", daemon=True)
        self._thread.start()

    def sent(self, count: int) -> None:
        """So many samples were accepted in all: before anybody can wait for them."""
        self._entry["sent"] = count
        if not self._wake.is_set():
            self._wake.set()

    def end(self, error: Exception | None = None) -> None:
        """The connection has ended, maybe in ``error``: say so, and free everything."""
        with self._lock:
            if self._ending:
                return
            self._ending = True
            if error is not None:
                self._say(error)
            self._publish()
            self._entry["closed"] = 1
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._entry.close()

    def _run(self) -> None:
        busy = False
        while not self._ending:
            if not busy:
                self._wake.wait(IDLE_S)
            self._wake.clear()
            failure = self._failure()
            with self._lock:
                if self._ending:
                    return
                busy = self._publish()
                if failure is not None:
                    self._say(failure)
                finish = bool(self._entry["finish"])
            if finish:
                self._finish()
            elif busy:
                time.sleep(BUSY_S)

    def _publish(self) -> bool:
        """Store the counts; gives whether acks are out."""
        stats, entry = self._stats(), self._entry
        entry["blocked_us"] = int(stats.blocked_seconds * 1e6)
        entry["sent"] = max(entry["sent"], stats.samples_sent)
        for field in ("dropped", "reconnects", "resent", "maybe_duplicated", "maybe_lost"):
            entry[field] = getattr(stats, field)
        entry["acked"] = stats.samples_acked
        return stats.in_flight > 0

    def _say(self, error: Exception) -> None:
        kind = KINDS.index(ConnectionClosedError)
        if type(error) in KINDS:
            kind = KINDS.index(type(error))
        elif isinstance(error, TimeoutError):
            kind = KINDS.index(DeliveryTimeoutError)
        self._entry.fail(kind, str(error))
