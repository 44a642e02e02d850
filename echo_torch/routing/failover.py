"""What learners that were lost for good leave to the others: the samples that they may not have.

* They are passed on in steps that wait for nothing, so that the lock which makes them one caller's at a time is held
  for moments only.
* It is callers who pass on, and in a child the thread that reports: nobody does for a sink that was dropped.
* What was passed on is counted where it is now, and no more where it was.
* An interrupt between a sample's being passed on and its being noted sends it twice.
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

from .route import Route, TcpClientRoute

_log = logging.getLogger(__name__)

# Seconds between two tries to pass something on while nobody has room.
PASS_ON_RETRY_S = 0.002


class NoLearnerLeftError(Exception):
    """All learners are gone."""


class NoRoomError(Exception):
    """No learner had room in time."""


class UncopiedRowsError(Exception):
    """Samples are lost that had not been copied from their device when a learner was."""


class Learner:
    """One of several learners, and the route to it."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.client = route.client if isinstance(route, TcpClientRoute) else None
        """Ours, which tells more than others."""
        self.undelivered: UndeliveredRows | None = None
        """What it left to the others when it was lost."""
        self.required_acks: tuple[int, ...] | None = None
        """How much each of the others must have acked for that to be acked."""

    @property
    def is_disconnected(self) -> bool:
        """Whether its connection is, for good or for now."""
        return self.route.closed or (self.client is not None and self.client.reconnecting)

    @property
    def free_rows(self) -> int:
        """How many samples it takes without waiting."""
        return 0 if self.client is None else self.client.free_rows


class Failover:
    """Of all that are lost among ``learners``."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        self._learners = learners
        self._lost_learners: list[
            tuple[int, Learner, UndeliveredRows]
        ] = []  # by index, in the order in which they were
        self._lock = threading.RLock()
        self._uncopied_reported = 0
        self.closed = False
        """Whether learners are not lost any more, but their connections ended."""

    def pass_on_all(self, deadline: Deadline, stall_timeout: float | None) -> bool:
        """Pass on all that there is; gives whether there was anything.

        Raises:
            NoLearnerLeftError: to take it.
            NoRoomError: in time.
        """
        some, stall = False, deadline.within(stall_timeout)
        while self.count_pending():
            some = True
            if self.pass_on_some():
                stall = deadline.within(stall_timeout)
            elif stall.expired:
                raise NoRoomError("no learner has room for what one that is gone has left")
            else:
                time.sleep(PASS_ON_RETRY_S)
        return some

    @property
    def owned_by_this_thread(self) -> bool:
        """Whether the caller is a signal handler, or finaliser, that interrupted its own thread here."""
        return owned_by_this_thread(self._lock)

    def count_pending(self) -> int:
        """How many samples are still to be passed on."""
        if self.owned_by_this_thread:
            raise RuntimeError("called by a signal handler or finaliser that interrupted the same sink's passing on")
        for index, learner in enumerate(self._learners):
            if learner.undelivered is None and learner.client is not None and learner.client.failure is not None:
                self._take_over(index, learner, learner.client)
        return sum(undelivered.remaining for _, _, undelivered in self._lost_learners)

    def _take_over(self, index: int, learner: Learner, client: TcpClient) -> None:
        with self._lock:
            if learner.undelivered is not None or self.closed:
                return
            undelivered = client.undelivered()
            lost = [*self._lost_learners, (index, learner, undelivered)]
            # Nothing comes between the next two lines: what it left is passed on once.
            self._lost_learners = lost
            learner.undelivered = undelivered
        text = "the learner is gone; its share, and %d samples that it may not have, go to the others: %s"
        _log.warning(text, undelivered.remaining, client.failure)

    def pass_on_some(self) -> int:
        """Some of it, without waiting; gives how many samples.

        Raises:
            NoLearnerLeftError: to take it.
        """
        with self._lock:
            undelivered = next(
                (undelivered for _, _, undelivered in self._lost_learners if undelivered.remaining), None
            )
            if undelivered is None:  # another caller was faster
                return 1
            alive = [learner for learner in self._learners if not learner.route.closed]
            if not alive:
                raise NoLearnerLeftError("no learner is left")
            target = max(
                [learner for learner in alive if not learner.is_disconnected] or alive,
                key=lambda learner: learner.free_rows,
            )
            free_rows = target.free_rows
            if not free_rows or not isinstance(target.route, TcpClientRoute):
                return 0
            taken = target.route.send_packed(undelivered.view(), free_rows)
            undelivered.mark_handed_over(taken)
            return taken

    def raise_if_uncopied(self) -> None:
        """Raise, once, if samples are lost that were not copied from their device in time."""
        with self._lock:
            uncopied, reported = (
                sum(undelivered.unrecoverable for _, _, undelivered in self._lost_learners),
                self._uncopied_reported,
            )
            self._uncopied_reported = uncopied
        if uncopied > reported:
            what = f"{uncopied - reported} samples are lost, which had not been copied from their device by then"
            raise UncopiedRowsError(f"a learner is gone, and {what}")

    # What became of the samples.

    def counts(self, all_lost: bool) -> Counts:
        """Of all; ``all_lost`` if nobody is left to take anything."""
        with self._lock:
            each = [self._learner_counts(learner, all_lost) for learner in self._learners]
            return Counts(*map(sum, zip(*each, strict=True)))

    def _learner_counts(self, learner: Learner, all_lost: bool) -> Counts:
        counts, undelivered = learner.route.counts(), learner.undelivered
        if undelivered is None:
            return counts
        moved = undelivered.handed_over
        return counts._replace(
            sent=counts.sent - moved,
            unacked=undelivered.unacked,
            resent=counts.resent + moved,
            maybe_duplicated=counts.maybe_duplicated + moved,
            maybe_lost=counts.maybe_lost - moved if all_lost else undelivered.unrecoverable,
        )

    def progress(self) -> tuple[int, list[int], list[int]]:
        """How many samples were sent in all, how many each was sent, and how many of these are acked, by whomever."""
        with self._lock:
            each = [learner.route.progress() for learner in self._learners]
            sent, acked = [count for count, _ in each], [count for _, count in each]
            if self._lost_learners:
                self._count_passed_on_as_acked(sent, acked)
            return sum(sent) - sum(undelivered.handed_over for _, _, undelivered in self._lost_learners), sent, acked

    def _count_passed_on_as_acked(self, sent: list[int], acked: list[int]) -> None:
        """Count what was passed on as acked as soon as it is, by those who have it now."""
        if any(undelivered.remaining for _, _, undelivered in self._lost_learners):
            return
        sent_to_alive = tuple(
            0 if learner.undelivered is not None else count for count, learner in zip(sent, self._learners, strict=True)
        )
        for index, learner, undelivered in reversed(
            self._lost_learners
        ):  # who was lost later may have had it in between
            learner.required_acks = learner.required_acks or sent_to_alive
            if all(map(int.__ge__, acked, learner.required_acks)):
                acked[index] = sent[index] - undelivered.unrecoverable
