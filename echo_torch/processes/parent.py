"""The parent's half of the ledger: what its children sent for a sink, and waiting for that.

* A child that ended with everything acked is counted, and its file removed, whenever somebody looks. One that did not
  is kept until `ChildProcesses.wait` has said so.
* An interrupt may break off whatever is done here. A child moves from those that are looked at to those that were
  counted in one assignment, after its file is gone, and is told of in the last step before raising.
"""

from __future__ import annotations

import logging
import multiprocessing.util
import os
import threading
import time
import weakref
from itertools import zip_longest

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError
from echo_torch.metrics.stats import PeerCounts
from echo_torch.metrics.timing import Times
from echo_torch.support.deadline import Deadline

from . import ledger
from .ledger import ERROR_KINDS, SUMMED_FIELDS, LedgerEntry, entry_paths

_log = logging.getLogger(__name__)

# Seconds between two looks at what children report, who do so every 1 to 20 ms; the first ones come sooner.
POLL_INTERVAL_S = 0.005
FIRST_POLL_S = 0.0005

# Seconds in which a child that is asked to end its connection has done so, or does nothing: it takes 4 at the most.
CLOSE_ANSWER_S = 6.0

_State = tuple[dict[str, LedgerEntry], dict[str, int], Times, list[PeerCounts]]
"""Those that are looked at; and of those that were counted, the numbers, times, and the numbers of each learner."""

_cleanup_registered: set[tuple[int, str]] = (
    set()
)  # the processes and tokens whose files are removed at the end of the process
_shared: weakref.WeakValueDictionary[tuple[int, str], ChildProcesses] = weakref.WeakValueDictionary()


class ChildProcesses:
    """The children of this process that send for one sink.

    Args:
        peer: how messages name the learner.
        token: the sink's.
        acked_at_risk: how many samples that a child's server acked it may discard if the child dies.
    """

    def __init__(self, peer: str, token: str, acked_at_risk: int) -> None:
        self._lock = threading.RLock()
        self._peer = peer
        self._token = token
        self._acked_at_risk = acked_at_risk
        self._parent = os.getpid()
        self._state: _State = {}, dict.fromkeys(SUMMED_FIELDS, 0), Times(), []
        self._reported: set[str] = set()  # of those whose failure was raised
        weakref.finalize(self, ledger.remove_files, token, self._parent).atexit = False

    @classmethod
    def get_shared(cls, peer: str, token: str, acked_at_risk: int) -> ChildProcesses:
        """The same for all copies of a sink in this process: each child is counted, and told of, once."""
        key = os.getpid(), token
        if (
            key not in _cleanup_registered
        ):  # who drops the sink that it gave to a child is asked to remove the child's file later
            _cleanup_registered.add(key)
            multiprocessing.util.Finalize(None, ledger.remove_files, (token, key[0]), exitpriority=-1)
        return _shared.get(key) or _shared.setdefault(key, cls(peer, token, acked_at_risk))

    def counts(self) -> dict[str, int]:
        """Their numbers, added up, by the names of `ledger.SUMMED_FIELDS`."""
        with self._lock:
            self._poll()
            entries, ended, *_ = self._state
            # What is acked before what is sent, which is at least as much by then.
            return {
                field: ended[field] + sum(entry[field] for entry in entries.values())
                for field in reversed(SUMMED_FIELDS)
            }

    def times(self) -> Times:
        """Where their time went, added up."""
        with self._lock:
            self._poll()
            entries, _, total, _ = self._state
            for entry in entries.values():
                total = total.plus(entry.times)
            return total

    def peer_counts(self) -> list[PeerCounts]:
        """What each learner was sent by them, added up; empty if there are none."""
        with self._lock:
            self._poll()
            entries, *_, total = self._state
            for entry in entries.values():
                total = _add_counts(total, entry.peer_counts)
            return total

    def wait(self, deadline: Deadline, stall_timeout: float | None) -> None:
        """Wait until all that they sent so far is acked.

        Raises:
            ConnectionClosedError: one died, or lost its connection, with samples un-acked. Said once, and at once.
            DeliveryTimeoutError: the deadline, or ``stall_timeout`` seconds without any ack, passed; or one ended
                without having been able to deliver everything in time.
        """
        goals = [(entry, entry["sent"]) for entry in self._poll()]
        acked, since, pause = -1, time.monotonic(), FIRST_POLL_S
        while True:
            done = [(entry, goal) for entry, goal in goals if entry["acked"] >= goal]  # before they say that it is over
            finished = [(entry, goal) for entry, goal in goals if _is_finished(entry)]
            self._raise_failures([entry for entry, goal in finished if _has_lost_samples(entry, goal)])
            goals = [one for one in goals if one not in done and one not in finished]
            if not goals:
                return
            now = sum(entry["acked"] for entry, _ in goals)
            if now != acked:
                acked, since = now, time.monotonic()
            if deadline.expired or (stall_timeout is not None and time.monotonic() - since >= stall_timeout):
                raise self._timeout_error(goals, deadline, stall_timeout)
            time.sleep(min(pause, deadline.remaining()))
            pause = min(2 * pause, POLL_INTERVAL_S)

    def _raise_failures(self, entries: list[LedgerEntry]) -> None:
        with self._lock:
            failed = [entry for entry in entries if entry.path.name not in self._reported]
            if failed:
                problem = self._failure_error(failed)
                self._reported |= {entry.path.name for entry in failed}
                try:
                    raise problem
                finally:
                    del problem  # whose traceback holds this frame, and with it the sink

    def request_close(self) -> None:
        """Ask those that end with this process to deliver everything and to close."""
        for entry in self._poll():
            entry["finish"] = entry["daemon"]

    def wait_for_close(self, deadline: Deadline) -> None:
        """Wait for those who were asked to, as long as they may take if they do anything at all."""
        asked, soon = [entry for entry in self._poll() if entry["finish"]], deadline.within(CLOSE_ANSWER_S)
        while asked := [entry for entry in asked if not (entry["closed"] or entry.is_dead)]:
            if soon.expired:
                who = ", ".join(str(entry.child_pid) for entry in asked)
                _log.warning("%s: processes %s did not answer for %g s", self._peer, who, soon.timeout)
                return
            time.sleep(POLL_INTERVAL_S)

    def count_and_remove_all(self) -> None:
        """Count all of them as they are now, and remove their files."""
        with self._lock:
            for entry in self._poll():
                self._count_and_remove(entry)

    def _poll(self) -> list[LedgerEntry]:
        """Those that are not counted as ended, with those that are new."""
        if os.getpid() != self._parent:  # a forked copy
            return []
        with self._lock:
            for entry in list(self._state[0].values()):
                self._count_and_remove_if_done(entry)
            for path in entry_paths(self._token, self._parent):
                entries, ended, times, peers = self._state
                if path.name not in entries:
                    try:
                        new = LedgerEntry(path)
                    except FileNotFoundError:
                        continue
                    except OSError as error:  # too many files are open, say
                        raise OSError(error.errno, f"{self._peer}: {error.strerror}, for what a child tells") from error
                    self._state = {**entries, path.name: new}, ended, times, peers
                    self._count_and_remove_if_done(
                        new
                    )  # at once: of those that ended there may be more than files can be open
            return list(self._state[0].values())

    def _count_and_remove_if_done(self, entry: LedgerEntry) -> None:
        """Count, and remove, one that is over and has nothing more to say."""
        if (entry["closed"] or entry.is_dead) and (
            entry["sent"] == entry["acked"] or entry.path.name in self._reported
        ):
            self._count_and_remove(entry)

    def _count_and_remove(self, entry: LedgerEntry) -> None:
        name = entry.path.name
        died = entry.is_dead and not entry["closed"]
        entry.path.unlink(missing_ok=True)
        entries, ended, times, peers = self._state
        total = {field: ended[field] + entry[field] for field in SUMMED_FIELDS}
        if died:  # it may have counted by itself what it lost with its connection
            lost = entry["sent"] - entry["acked"] + min(entry["acked"], self._acked_at_risk)
            total["maybe_lost"] = ended["maybe_lost"] + max(lost, entry["maybe_lost"])
        left = {other: theirs for other, theirs in entries.items() if other != name}
        self._state = left, total, times.plus(entry.times), _add_counts(peers, entry.peer_counts)
        entry.close()
        self._reported.discard(name)

    def _failure_error(self, failed: list[LedgerEntry]) -> ConnectionClosedError | DeliveryTimeoutError:
        kind, reasons, unacked = 0, [], 0
        for entry in failed:
            unacked_here = entry["sent"] - entry["acked"]
            unacked += unacked_here
            kind = max(kind, entry["error_kind"] or 2)
            how = entry.error if entry["error_kind"] else f"died with {unacked_here} samples un-acked"
            reasons.append(f"process {entry.child_pid}: {how}")
        error = ERROR_KINDS[kind](f"{self._peer}: {'; '.join(reasons)}")  # type: ignore[misc]  # never that of 0
        error.unacked = unacked
        return error

    def _timeout_error(
        self, left: list[tuple[LedgerEntry, int]], deadline: Deadline, stall_timeout: float | None
    ) -> DeliveryTimeoutError:
        unacked = sum(goal - entry["acked"] for entry, goal in left)
        if deadline.expired:
            what = f"not done within {deadline.timeout:g} s"
        else:
            what = f"nothing was acked for {stall_timeout:g} s (stall_timeout)"
        who = ", ".join(str(entry.child_pid) for entry, _ in left)
        error = DeliveryTimeoutError(
            f"{self._peer}: {what}; {unacked} samples un-acked of processes {who}; delivery goes on"
        )
        error.unacked = unacked
        return error


def _add_counts(one: list[PeerCounts], other: list[PeerCounts]) -> list[PeerCounts]:
    return [mine.plus(theirs) for mine, theirs in zip_longest(one, other, fillvalue=PeerCounts())]


def _has_lost_samples(entry: LedgerEntry, goal: int) -> bool:
    """Whether not all of its first ``goal`` samples are acked, now that nothing more will be.

    With several learners, those that were acked at the end may be any.
    """
    return entry["acked"] < (goal if entry["learners"] == 1 else entry["sent"])


def _is_finished(entry: LedgerEntry) -> bool:
    """Whether nothing more will be acked."""
    return bool(entry["closed"] or entry["error_kind"] or entry.is_dead)
