"""The parent's half of the ledger: what its children sent for a sink, and waiting for that.

A child that ended with everything acked is counted, and its file removed. One that did not is kept until
`Children.wait` has said so.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from .deadline import Deadline
from .errors import ConnectionClosedError, DeliveryTimeoutError, ProtocolError
from .ledger import COUNTED, Entry, entries_of, remove

_log = logging.getLogger(__name__)

# Seconds between two looks at what children report, who do so every 20 ms.
LOOK_S = 0.005

KINDS = (None, DeliveryTimeoutError, ConnectionClosedError, ProtocolError)
"""What an entry's ``error_kind`` stands for."""


class Children:
    """The children of this process that send for one sink.

    Args:
        peer: how messages name the learner.
        token: the sink's.
    """

    def __init__(self, peer: str, token: str) -> None:
        self.lock = threading.RLock()
        self._peer = peer
        self._token = token
        self._parent = os.getpid()
        self._entries: dict[str, Entry] = {}
        self._told: set[str] = set()  # of those whose failure was raised
        self._ended = dict.fromkeys(COUNTED, 0)  # what those counted that are gone

    def counts(self) -> dict[str, int]:
        """Their numbers, added up, by the names of `ledger.COUNTED`."""
        with self.lock:
            entries = self._look()
            self._bury(entries)
            total = dict(self._ended)
            for entry in self._entries.values():
                for field in COUNTED:
                    total[field] += entry[field]
        return total

    def wait(self, deadline: Deadline, stall_timeout: float | None) -> None:
        """Wait until all that they sent so far is acked.

        Raises:
            ConnectionClosedError: one died, or lost its connection, with samples un-acked. Said once.
            DeliveryTimeoutError: the deadline, or ``stall_timeout`` seconds without any ack, passed; or one ended
                without having been able to deliver everything in time.
        """
        with self.lock:
            goals = [(entry, entry["sent"]) for entry in self._look()]
        acked, since = -1, time.monotonic()
        while True:
            left = [(entry, goal) for entry, goal in goals if entry["acked"] < goal and not _over(entry)]
            if not left:
                break
            now = sum(entry["acked"] for entry, _ in left)
            if now != acked:
                acked, since = now, time.monotonic()
            if deadline.expired or (stall_timeout is not None and time.monotonic() - since >= stall_timeout):
                raise self._late(left, deadline, stall_timeout)
            time.sleep(min(LOOK_S, deadline.remaining()))
        with self.lock:
            failed = [entry for entry, goal in goals if entry["acked"] < goal and entry.path.name not in self._told]
            self._told.update(entry.path.name for entry in failed)
            problem = self._problem(failed) if failed else None
            self._bury(list(self._entries.values()))
        if problem is not None:
            raise problem

    def finish(self, deadline: Deadline) -> None:
        """Ask all of them to deliver everything and to close, and wait for that."""
        with self.lock:
            entries = self._look()
        for entry in entries:
            entry["finish"] = 1
        while not all(entry["closed"] or entry.lock() for entry in entries) and not deadline.expired:
            time.sleep(LOOK_S)

    def forget(self) -> None:
        """Remove the files of all of them, whatever they hold."""
        with self.lock:
            for entry in self._look():
                self._remove(entry)
            remove(self._token)

    def _look(self) -> list[Entry]:
        """All of them, with those that are new."""
        if os.getpid() != self._parent:  # a forked copy
            return []
        for path in entries_of(self._token, self._parent):
            if path.name not in self._entries:
                self._entries[path.name] = Entry(path)
        return list(self._entries.values())

    def _bury(self, entries: list[Entry]) -> None:
        """Count, and remove, those that are over and have nothing more to say."""
        for entry in entries:
            if not (entry["closed"] or entry.lock()):
                continue
            lost = entry["sent"] - entry["acked"]
            if lost and entry.path.name not in self._told:
                continue
            for field in COUNTED:
                self._ended[field] += entry[field]
            if not entry["closed"]:
                self._ended["maybe_lost"] += lost
            self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.path.name]
        self._told.discard(entry.path.name)
        entry.path.unlink(missing_ok=True)
        entry.close()

    def _problem(self, failed: list[Entry]) -> ConnectionClosedError | DeliveryTimeoutError:
        kind, told, unacked = 0, [], 0
        for entry in failed:
            open_here = entry["sent"] - entry["acked"]
            unacked += open_here
            kind = max(kind, entry["error_kind"] or 2)
            how = entry.error if entry["error_kind"] else f"died with {open_here} samples un-acked"
            told.append(f"process {entry.child}: {how}")
        error = KINDS[kind](f"{self._peer}: {'; '.join(told)}")  # type: ignore[misc]  # never that of 0
        error.unacked = unacked
        return error

    def _late(
        self, left: list[tuple[Entry, int]], deadline: Deadline, stall_timeout: float | None
    ) -> DeliveryTimeoutError:
        unacked = sum(goal - entry["acked"] for entry, goal in left)
        what = f"not done within {deadline.timeout:g} s"
        if not deadline.expired:
            what = f"nothing was acked for {stall_timeout:g} s (stall_timeout)"
        who = ", ".join(str(entry.child) for entry, _ in left)
        error = DeliveryTimeoutError(
            f"{self._peer}: {what}; {unacked} samples un-acked of processes {who}; delivery goes on"
        )
        error.unacked = unacked
        return error


def _over(entry: Entry) -> bool:
    """Whether nothing more will be acked."""
    return bool(entry["closed"] or entry["error_kind"] or entry.lock())
