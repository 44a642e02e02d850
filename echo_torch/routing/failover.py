"""Hands over the undelivered samples of lost learners to the others.

* Each step runs under the failover lock and waits for no learner, so the lock is held for moments only.
* Callers take these steps, and so does the reporting thread in a child process. For a dropped sink nobody does.
* A sample that was handed over counts at its new learner, and no longer at the lost one.
* An interrupt after a sample is handed over, and before that is recorded, sends the sample twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from echo_torch.client.resend import UndeliveredRows
from echo_torch.client.tcp_client import TcpClient
from echo_torch.metrics.stats import Counts
from echo_torch.support.deadline import Deadline
from echo_torch.support.interrupts import owned_by_this_thread

from .route import Route

_log = logging.getLogger(__name__)

# Seconds between two tries to hand over samples while no learner has room.
PASS_ON_RETRY_S = 0.002


class NoLearnerLeftError(Exception):
    """All learners are lost."""


class NoRoomError(Exception):
    """No learner had room in time."""


class UncopiedRowsError(Exception):
    """Samples are lost because their learner was lost before the device had copied them to the host."""


class Learner:
    """One of several learners, and the route to it."""

    def __init__(self, route: Route) -> None:
        # The route to this learner.
        self.route = route
        # Its client if that is a `TcpClient`, which can do more than others; else None.
        self.client = route if isinstance(route, TcpClient) else None
        # The rows that the others must get, once this learner is lost; None before.
        self.undelivered: UndeliveredRows | None = None
        # How many samples each of the learners must have acked, in their order, for all rows of this one to be acked;
        # None until all are handed over.
        self.required_acks: tuple[int, ...] | None = None

    @property
    def is_disconnected(self) -> bool:
        """Whether the learner has no connection, for good or until it reconnects."""
        return self.route.closed or (self.client is not None and self.client.reconnecting)

    @property
    def free_rows(self) -> int:
        """Number of samples that the learner accepts without waiting."""
        return 0 if self.client is None else self.client.free_rows


class Failover:
    """Takes over the rows of every lost learner in ``learners``, and hands them to the others."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        # All learners, lost ones included.
        self._learners = learners
        # Index, learner and rows of each lost learner, in the order of the losses; replaced as a whole.
        self._lost_learners: list[tuple[int, Learner, UndeliveredRows]] = []
        # The failover lock: guards the handing over and its counts.
        self._lock = threading.RLock()
        # How many uncopied samples `raise_if_uncopied` has reported.
        self._uncopied_reported = 0
        # Whether `close` has begun to end connections: a connection that ends after that is no lost learner.
        self.closed = False

    def pass_on_all(self, deadline: Deadline, stall_timeout: float | None) -> bool:
        """Hand over all rows of lost learners, waiting for room; return whether there were any.

        Args:
            deadline: when to give up.
            stall_timeout: seconds without room at any learner after which to give up; None for no limit.

        Raises:
            NoLearnerLeftError: all learners are lost.
            NoRoomError: no learner had room in time.
        """
        some, stall = False, deadline.within(stall_timeout)
        while self.take_over_and_count():
            some = True
            if self.pass_on_some():
                stall = deadline.within(stall_timeout)
            elif stall.expired:
                raise NoRoomError("no learner has room for the samples of a lost one")
            else:
                time.sleep(PASS_ON_RETRY_S)
        return some

    @property
    def owned_by_this_thread(self) -> bool:
        """Whether the caller is a signal handler or finalizer that interrupted a step on its own thread."""
        return owned_by_this_thread(self._lock)

    def take_over_and_count(self) -> int:
        """Take over the rows of learners that were lost meanwhile; return how many rows are still to hand over.

        Raises:
            RuntimeError: a signal handler or finalizer interrupted a step on its own thread.
        """
        if self.owned_by_this_thread:
            raise RuntimeError("called by a signal handler or finalizer that interrupted failover of the same sink")
        for index, learner in enumerate(self._learners):
            if learner.undelivered is None and learner.client is not None and learner.client.has_ended:
                self._take_over(index, learner, learner.client)
        return sum(undelivered.remaining for _, _, undelivered in self._lost_learners)

    def _take_over(self, index: int, learner: Learner, client: TcpClient) -> None:
        """Take the undelivered rows of a lost learner; does nothing if another caller was faster."""
        with self._lock:
            if learner.undelivered is not None or self.closed:
                return
            # Blocks until the lost connection's thread has ended, which has nothing left to do.
            undelivered = client.undelivered()
            lost = [*self._lost_learners, (index, learner, undelivered)]
            # Nothing comes between the next two lines: the rows are taken over once.
            self._lost_learners = lost
            learner.undelivered = undelivered
        text = "the learner is gone; its share, and %d samples that it may not have stored, go to the others: %s"
        _log.warning(text, undelivered.remaining, client.failure or "its connection was closed")

    def pass_on_some(self) -> int:
        """Hand over some rows without waiting; return how many, 0 if no learner has room.

        Raises:
            NoLearnerLeftError: all learners are lost.
        """
        with self._lock:
            undelivered = next(
                (undelivered for _, _, undelivered in self._lost_learners if undelivered.remaining), None
            )
            # Another caller was faster. Return progress, so that callers look again.
            if undelivered is None:
                return 1
            alive = [learner for learner in self._learners if not learner.route.closed]
            if not alive:
                raise NoLearnerLeftError("no learner is left")
            # The learner with the most room; one that is reconnecting only if there is no other.
            target = max(
                [learner for learner in alive if not learner.is_disconnected] or alive,
                key=lambda learner: learner.free_rows,
            )
            free_rows = target.free_rows
            if not free_rows or target.client is None:
                return 0
            # An interrupt between these two calls sends the rows twice; the other order would lose them.
            taken = target.client.send_packed(undelivered.view(), free_rows)
            undelivered.mark_handed_over(taken)
            return taken

    def raise_if_uncopied(self) -> None:
        """Raise `UncopiedRowsError` if samples were lost on their device; each sample is reported once."""
        with self._lock:
            uncopied, reported = (
                sum(undelivered.unrecoverable for _, _, undelivered in self._lost_learners),
                self._uncopied_reported,
            )
            self._uncopied_reported = uncopied
        if uncopied > reported:
            what = f"{uncopied - reported} samples are lost, which had not been copied from their device by then"
            raise UncopiedRowsError(f"a learner is gone, and {what}")

    # Counts.

    def counts(self, all_lost: bool) -> Counts:
        """Return the counts of all learners together; ``all_lost`` says that no learner is left."""
        with self._lock:
            each = [self._learner_counts(learner, all_lost) for learner in self._learners]
            return Counts(*map(sum, zip(*each, strict=True)))

    def _learner_counts(self, learner: Learner, all_lost: bool) -> Counts:
        counts, undelivered = learner.route.counts(), learner.undelivered
        if undelivered is None:
            return counts
        # The new learners' own counts contain the rows that were handed over.
        moved = undelivered.handed_over
        return counts._replace(
            sent=counts.sent - moved,
            unacked=undelivered.unacked,
            resent=counts.resent + moved,
            maybe_duplicated=counts.maybe_duplicated + moved,
            maybe_lost=counts.maybe_lost - moved if all_lost else undelivered.unrecoverable,
        )

    def progress(self) -> tuple[int, list[int], list[int]]:
        """Return how many samples were sent in all, the numbers sent to each learner, and how many of those are acked.

        A lost learner's samples count as acked when the learners that have them now acked them.
        """
        with self._lock:
            each = [learner.route.progress() for learner in self._learners]
            sent, acked = [count for count, _ in each], [count for _, count in each]
            if self._lost_learners:
                self._count_passed_on_as_acked(sent, acked)
            return sum(sent) - sum(undelivered.handed_over for _, _, undelivered in self._lost_learners), sent, acked

    def _count_passed_on_as_acked(self, sent: list[int], acked: list[int]) -> None:
        """Raise ``acked`` of each lost learner to all that it was sent, once the others have acked its rows."""
        # Until all rows are handed over, nobody knows how far the others must have acked.
        if any(undelivered.remaining for _, _, undelivered in self._lost_learners):
            return
        sent_to_alive = tuple(
            0 if learner.undelivered is not None else count for count, learner in zip(sent, self._learners, strict=True)
        )
        # The latest loss first: that learner may have had rows of one that was lost before it.
        for index, learner, undelivered in reversed(self._lost_learners):
            learner.required_acks = learner.required_acks or sent_to_alive
            if all(map(int.__ge__, acked, learner.required_acks)):
                acked[index] = sent[index] - undelivered.unrecoverable
