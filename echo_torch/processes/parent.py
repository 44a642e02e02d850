"""The parent's half of the ledger: adds up what its children sent for a sink, and waits for the acks.

* Every call first looks for new files, and for children that have ended. A child that ended with everything acked is
  added to the totals, and its file is removed. Any other is kept until `ChildProcesses.wait` has raised its failure.
* A process without children has no folder and looks at none. The folder is made just before the first child starts: at
  a fork, or when the sink is pickled.
* If the files cannot be read, because the folder was removed or no descriptors are left, `wait` raises. The counts then
  hold what is known.
* Ctrl-C may interrupt any line here. So a child moves from the open entries to the totals in one assignment, after its
  file is gone, and its failure is marked as reported in the last step before it is raised.
"""

from __future__ import annotations

import logging
import multiprocessing
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

# Seconds between two polls of the children's files, which children update every 1 to 20 ms. The pause begins at
# `FIRST_POLL_S` and doubles up to `POLL_INTERVAL_S`.
POLL_INTERVAL_S = 0.005
FIRST_POLL_S = 0.0005

# Seconds to wait for a child that was asked to close. It takes at most 4; one that takes longer hangs.
CLOSE_ANSWER_S = 6.0

# The open entries by file name; then the totals of the children that were counted: fields, times, and counts of each
# learner.
_State = tuple[dict[str, LedgerEntry], dict[str, int], Times, list[PeerCounts]]

# The pids and tokens whose files are removed when the process ends.
_cleanup_registered: set[tuple[int, str]] = set()
# One object for each pid and token, as long as a copy of the sink uses it.
_shared: weakref.WeakValueDictionary[tuple[int, str], ChildProcesses] = weakref.WeakValueDictionary()


class ChildProcesses:
    """The children of this process that send for one sink.

    Args:
        peer: the learner's name in messages.
        token: names the ledger's folder; the same in all copies of a sink.
        acked_at_risk: how many acked samples of a child its server may discard if the child dies.
    """

    def __init__(self, peer: str, token: str, acked_at_risk: int) -> None:
        # Hold it to change `_state` or `_reported`.
        self._lock = threading.RLock()
        # The learner's name in messages.
        self._peer = peer
        # Names the ledger's folder.
        self._token = token
        # How many acked samples count as maybe lost when a child dies.
        self._acked_at_risk = acked_at_risk
        # Pid of this process; it differs in a forked copy, which has no children here.
        self._parent = os.getpid()
        # Everything that is known of the children, in one tuple, so that one assignment changes all of it.
        self._state: _State = {}, dict.fromkeys(SUMMED_FIELDS, 0), Times(), []
        # File names of the open entries whose failure was raised.
        self._reported: set[str] = set()
        # Whether children may have been started, so that there is a folder.
        self._has_folder = False
        # Whether the folder is complete.
        self._folder_made = False
        # Whether the sink is closed, so that later children must not send.
        self._closed = False
        # Why the last look at the children's files failed; None if it succeeded.
        self._blindness: OSError | None = None
        # You may drop the sink here while children still use it, or start with it later. So this keeps their files. It
        # does not run at exit, because children may still deliver then: `get_or_create` registers what runs at exit.
        self._finalizer = weakref.finalize(self, ledger.remove_files, token, self._parent, keep_living=True)
        self._finalizer.atexit = False

    @classmethod
    def get_or_create(cls, peer: str, token: str, acked_at_risk: int) -> ChildProcesses:
        """Return the one object for all copies of a sink in this process, so that each child is counted once."""
        key = os.getpid(), token
        # You may hand a sink to a child and drop it here before the child makes its file. So the files are removed once
        # more when this process ends. Priority -1 makes multiprocessing do so after it has joined the children.
        if key not in _cleanup_registered:
            _cleanup_registered.add(key)
            multiprocessing.util.Finalize(None, ledger.remove_files, (token, key[0]), exitpriority=-1)
        return _shared.get(key) or _shared.setdefault(key, cls(peer, token, acked_at_risk))

    def prepare(self) -> None:
        """Make the folder, because a child may start now. If that fails, the child says so when it sends."""
        if not self._folder_made and os.getpid() == self._parent:
            # Set this first: from here on, a missing folder does not mean that there are no children.
            self._has_folder = True
            try:
                ledger.make_folder(self._token, self._parent)
                self._folder_made = True  # only now: another thread that forks must not rely on it earlier
            except OSError as error:  # children cannot report, and so do not send
                self._has_folder = self._folder_made
                _log.debug("%s: no folder for the reports of children: %s", self._peer, error)
            if self._closed:
                ledger.set_flag(self._token, self._parent, ledger.SINK_CLOSED)

    def set_closed(self) -> None:
        """Tell this process's daemonic children, later ones included, that the sink is closed."""
        self._closed = True
        # A daemonic process cannot have daemonic children.
        if multiprocessing.current_process().daemon or os.getpid() != self._parent:
            return
        if self._has_folder:
            ledger.set_flag(self._token, self._parent, ledger.SINK_CLOSED)
        # From now on, dropping the sink removes the folder and all files.
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, ledger.remove_files, self._token, self._parent)
        self._finalizer.atexit = False

    def counts(self) -> dict[str, int]:
        """Return the sums of the children's counts, by the names of `ledger.SUMMED_FIELDS`."""
        with self._lock:
            self._poll()
            entries, ended, *_ = self._state
            # Children write meanwhile. Read ``acked`` before ``sent``, so that it is never the larger one.
            return {
                field: ended[field] + sum(entry[field] for entry in entries.values())
                for field in reversed(SUMMED_FIELDS)
            }

    def times(self) -> Times:
        """Return where the children's time went, added up."""
        with self._lock:
            self._poll()
            entries, _, total, _ = self._state
            for entry in entries.values():
                total = total.plus(entry.times)
            return total

    def peer_counts(self) -> list[PeerCounts]:
        """Return what the children sent to each learner, added up; empty if there were no children."""
        with self._lock:
            self._poll()
            entries, *_, total = self._state
            for entry in entries.values():
                total = _add_counts(total, entry.peer_counts)
            return total

    def wait(self, deadline: Deadline, stall_timeout: float | None) -> None:
        """Block until everything that the children sent so far is acked.

        Raises:
            ConnectionClosedError: a child died, or lost its connection, with samples un-acked. Raised at once, and once
                for each child.
            DeliveryTimeoutError: the deadline passed, or ``stall_timeout`` seconds passed without any ack, or a child
                ended without delivering everything in time.
        """
        goals = [(entry, entry["sent"]) for entry in self._poll()]
        acked, acked_at, pause = -1, time.monotonic(), FIRST_POLL_S
        while True:
            # Read ``acked`` before you ask whether a child has finished. With several learners, ``acked`` counts up to
            # the first gap while the connection lives, and all acked samples once it has ended. In the other order, a
            # child that ends between the two lines could look done although it has lost some of the first samples.
            done = [(entry, goal) for entry, goal in goals if entry["acked"] >= goal]
            finished = [(entry, goal) for entry, goal in goals if self._is_finished(entry)]
            self._raise_failures([entry for entry, goal in finished if _has_lost_samples(entry, goal)])
            goals = [one for one in goals if one not in done and one not in finished]
            if not goals or self._blindness is not None:
                break
            acked_now = sum(entry["acked"] for entry, _ in goals)
            # Any change restarts the stall clock. That includes the drop when a child leaves the goals.
            if acked_now != acked:
                acked, acked_at = acked_now, time.monotonic()
            if deadline.expired or (stall_timeout is not None and time.monotonic() - acked_at >= stall_timeout):
                raise self._timeout_error(goals, deadline, stall_timeout)
            time.sleep(min(pause, deadline.remaining()))
            pause = min(2 * pause, POLL_INTERVAL_S)
        if self._blindness is not None:
            what = "what child processes sent cannot be looked at, so some of it may be un-acked"
            raise ConnectionClosedError(f"{self._peer}: {what}: {self._blindness}") from self._blindness

    def _raise_failures(self, entries: list[LedgerEntry]) -> None:
        """Raise one error for those of ``entries`` whose failure was not raised yet, if there are any."""
        with self._lock:
            failed = [entry for entry in entries if entry.path.name not in self._reported]
            if failed:
                problem = self._failure_error(failed)
                # Mark them last: an interrupt before this line leaves the failure to the next `wait`.
                self._reported |= {entry.path.name for entry in failed}
                try:
                    raise problem
                finally:
                    del problem  # its traceback holds this frame, and this frame holds the sink

    def request_close(self) -> None:
        """Ask the daemonic children to deliver everything and close; does not wait."""
        for entry in self._poll():
            entry["finish"] = entry["daemon"]

    def wait_for_close(self, deadline: Deadline) -> None:
        """Wait for the children that were asked to close, and log those that do not within `CLOSE_ANSWER_S`."""
        asked, answer_by = [entry for entry in self._poll() if entry["finish"]], deadline.within(CLOSE_ANSWER_S)
        while asked := [entry for entry in asked if not (entry["closed"] or self._is_dead(entry))]:
            if answer_by.expired:
                who = ", ".join(str(entry.child_pid) for entry in asked)
                _log.warning("%s: processes %s did not answer for %g s", self._peer, who, answer_by.timeout)
                return
            time.sleep(POLL_INTERVAL_S)

    def count_and_remove_all(self) -> None:
        """Add all children to the totals as they are now, even living ones, and remove their files."""
        with self._lock:
            for entry in self._poll():
                self._count_and_remove(entry)

    def _poll(self) -> list[LedgerEntry]:
        """Count the children that have ended, look for new ones, and return the open entries."""
        # A forked copy has none of these children. It must not touch the lock either, which the fork may have copied
        # while another thread held it.
        if not self._has_folder or os.getpid() != self._parent:
            return []
        with self._lock:
            try:
                for entry in list(self._state[0].values()):
                    self._count_and_remove_if_done(entry)
                for path in entry_paths(self._token, self._parent):
                    entries, ended, times, peers = self._state
                    if path.name not in entries:
                        try:
                            new = LedgerEntry(path)
                        except FileNotFoundError:
                            continue
                        self._state = {**entries, path.name: new}, ended, times, peers
                        # Do this before opening the next file: more children may have ended than files can be open.
                        self._count_and_remove_if_done(new)
                self._blindness = None
            except OSError as error:
                self._note_blindness(error)
            return list(self._state[0].values())

    def _note_blindness(self, error: OSError) -> None:
        """Note and log that the files cannot be looked at: the folder was removed, or no descriptors are left."""
        if self._blindness is None:
            _log.warning("%s: what child processes sent cannot be looked at: %s", self._peer, error)
        self._blindness = error.with_traceback(None)

    def _is_dead(self, entry: LedgerEntry) -> bool:
        """Whether a child has ended or closed its file, as far as that can be seen."""
        try:
            return entry.is_dead
        except OSError as error:
            self._note_blindness(error)
            return False

    def _is_finished(self, entry: LedgerEntry) -> bool:
        """Whether no more acks of the child can come."""
        return bool(entry["closed"] or entry["error_kind"] or self._is_dead(entry))

    def _count_and_remove_if_done(self, entry: LedgerEntry) -> None:
        """Count and remove a child that has ended, unless it lost samples and no `wait` has raised that yet."""
        if (entry["closed"] or self._is_dead(entry)) and (
            entry["sent"] == entry["acked"] or entry.path.name in self._reported
        ):
            self._count_and_remove(entry)

    def _count_and_remove(self, entry: LedgerEntry) -> None:
        name = entry.path.name
        died = not entry["closed"] and self._is_dead(entry)
        # Remove the file first. If an interrupt strikes before the assignment to `_state`, the entry stays open and the
        # next poll counts it. In the other order, the next poll would find the file again and count it twice.
        entry["counted"] = 1
        entry.path.unlink(missing_ok=True)
        entries, ended, times, peers = self._state
        total = {field: ended[field] + entry[field] for field in SUMMED_FIELDS}
        # A killed child may have lost all un-acked samples and the last acked ones. If it had lost its connection
        # before, it has counted them itself: take the larger number.
        if died:
            lost = entry["sent"] - entry["acked"] + min(entry["acked"], self._acked_at_risk)
            total["maybe_lost"] = ended["maybe_lost"] + max(lost, entry["maybe_lost"])
        left = {other: theirs for other, theirs in entries.items() if other != name}
        self._state = left, total, times.plus(entry.times), _add_counts(peers, entry.peer_counts)
        entry.close()
        self._reported.discard(name)

    def _failure_error(self, failed: list[LedgerEntry]) -> ConnectionClosedError | DeliveryTimeoutError:
        """Make one error of the worst kind that names all ``failed`` children."""
        kind, reasons, unacked = 0, [], 0
        for entry in failed:
            unacked_here = entry["sent"] - entry["acked"]
            unacked += unacked_here
            # A child that died without writing an error counts as a lost connection.
            kind = max(kind, entry["error_kind"] or ERROR_KINDS.index(ConnectionClosedError))
            how = entry.error if entry["error_kind"] else f"died with {unacked_here} samples un-acked"
            reasons.append(f"process {entry.child_pid}: {how}")
        error = ERROR_KINDS[kind](f"{self._peer}: {'; '.join(reasons)}")  # type: ignore[misc]  # kind is never 0
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


def _prepare_all() -> None:
    """Before a fork: any sink of this process may get a child now."""
    # Not `values()`: another thread may add one meanwhile. This copies the references in one step.
    for reference in _shared.valuerefs():
        children = reference()
        if children is not None:
            children.prepare()


os.register_at_fork(before=_prepare_all)


def _add_counts(one: list[PeerCounts], other: list[PeerCounts]) -> list[PeerCounts]:
    return [mine.plus(theirs) for mine, theirs in zip_longest(one, other, fillvalue=PeerCounts())]


def _has_lost_samples(entry: LedgerEntry, goal: int) -> bool:
    """Whether a child that is finished may have samples un-acked among its first ``goal`` ones.

    One learner acks in order, so its count answers that. With several learners, the acked samples may be any of those
    sent: then only a child with everything acked has lost none.
    """
    return entry["acked"] < (goal if entry["learners"] == 1 else entry["sent"])
