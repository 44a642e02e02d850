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

from .route import RingRoute, Route

_log = logging.getLogger(__name__)

# Seconds between two tries to pass something on while nobody has room.
PASS_ON_S = 0.002


class NobodyLeftError(Exception):
    """All learners are gone."""


class NoRoomError(Exception):
    """No learner had room in time."""


class StuckError(Exception):
    """Samples are lost that had not been copied from their device when a learner was."""


class Peer:
    """One of several learners, and the route to it."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.client = route.client if isinstance(route, RingRoute) else None
        """Ours, which tells more than others."""
        self.remains: UndeliveredRows | None = None
        """What it left to the others when it was lost."""
        self.settled_at: tuple[int, ...] | None = None
        """How much each of the others must have acked for that to be acked."""

    @property
    def lost(self) -> bool:
        """Whether its connection is, for good or for now."""
        return self.route.closed or (self.client is not None and self.client.reconnecting)

    @property
    def free_rows(self) -> int:
        """How many samples it takes without waiting."""
        return 0 if self.client is None else self.client.free_rows


class Estate:
    """Of all that are lost among ``peers``."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self._peers = peers
        self._lost: list[tuple[int, Peer, UndeliveredRows]] = []  # by index, in the order in which they were
        self._lock = threading.RLock()
        self._told_stuck = 0
        self.closed = False
        """Whether learners are not lost any more, but their connections ended."""

    def settle(self, deadline: Deadline, stall_timeout: float | None) -> bool:
        """Pass on all that there is; gives whether there was anything.

        Raises:
            NobodyLeftError: to take it.
            NoRoomError: in time.
        """
        some, stall = False, deadline.within(stall_timeout)
        while self.left():
            some = True
            if self.pass_on():
                stall = deadline.within(stall_timeout)
            elif stall.expired:
                raise NoRoomError("no learner has room for what one that is gone has left")
            else:
                time.sleep(PASS_ON_S)
        return some

    @property
    def interrupted(self) -> bool:
        """Whether the caller is a signal handler, or finaliser, that interrupted its own thread here."""
        return owned_by_this_thread(self._lock)

    def left(self) -> int:
        """How many samples are still to be passed on."""
        if self.interrupted:
            raise RuntimeError("called by a signal handler or finaliser that interrupted the same sink's passing on")
        for index, peer in enumerate(self._peers):
            if peer.remains is None and peer.client is not None and peer.client.failure is not None:
                self._bury(index, peer, peer.client)
        return sum(remains.remaining for _, _, remains in self._lost)

    def _bury(self, index: int, peer: Peer, client: TcpClient) -> None:
        with self._lock:
            if peer.remains is not None or self.closed:
                return
            remains = client.undelivered()
            lost = [*self._lost, (index, peer, remains)]
            # Nothing comes between the next two lines: what it left is passed on once.
            self._lost = lost
            peer.remains = remains
        text = "the learner is gone; its share, and %d samples that it may not have, go to the others: %s"
        _log.warning(text, remains.remaining, client.failure)

    def pass_on(self) -> int:
        """Some of it, without waiting; gives how many samples.

        Raises:
            NobodyLeftError: to take it.
        """
        with self._lock:
            remains = next((remains for _, _, remains in self._lost if remains.remaining), None)
            if remains is None:  # another caller was faster
                return 1
            living = [peer for peer in self._peers if not peer.route.closed]
            if not living:
                raise NobodyLeftError("no learner is left")
            heir = max([peer for peer in living if not peer.lost] or living, key=lambda peer: peer.free_rows)
            free_rows = heir.free_rows
            if not free_rows or not isinstance(heir.route, RingRoute):
                return 0
            taken = heir.route.send_packed(remains.view(), free_rows)
            remains.mark_handed_over(taken)
            return taken

    def tell_of_stuck(self) -> None:
        """Raise, once, if samples are lost that were not copied from their device in time."""
        with self._lock:
            stuck, told = sum(remains.unrecoverable for _, _, remains in self._lost), self._told_stuck
            self._told_stuck = stuck
        if stuck > told:
            what = f"{stuck - told} samples are lost, which had not been copied from their device by then"
            raise StuckError(f"a learner is gone, and {what}")

    # What became of the samples.

    def counts(self, hopeless: bool) -> Counts:
        """Of all; ``hopeless`` if nobody is left to take anything."""
        with self._lock:
            each = [self._counts_of(peer, hopeless) for peer in self._peers]
            return Counts(*map(sum, zip(*each, strict=True)))

    def _counts_of(self, peer: Peer, hopeless: bool) -> Counts:
        counts, remains = peer.route.counts(), peer.remains
        if remains is None:
            return counts
        moved = remains.handed_over
        return counts._replace(
            sent=counts.sent - moved,
            unacked=remains.unacked,
            resent=counts.resent + moved,
            maybe_duplicated=counts.maybe_duplicated + moved,
            maybe_lost=counts.maybe_lost - moved if hopeless else remains.unrecoverable,
        )

    def progress(self) -> tuple[int, list[int], list[int]]:
        """How many samples were sent in all, how many each was sent, and how many of these are acked, by whomever."""
        with self._lock:
            each = [peer.route.progress() for peer in self._peers]
            sent, acked = [count for count, _ in each], [count for _, count in each]
            if self._lost:
                self._add_passed_on(sent, acked)
            return sum(sent) - sum(remains.handed_over for _, _, remains in self._lost), sent, acked

    def _add_passed_on(self, sent: list[int], acked: list[int]) -> None:
        """Count what was passed on as acked as soon as it is, by those who have it now."""
        if any(remains.remaining for _, _, remains in self._lost):
            return
        living = tuple(0 if peer.remains is not None else count for count, peer in zip(sent, self._peers, strict=True))
        for index, peer, remains in reversed(self._lost):  # who was lost later may have had it in between
            peer.settled_at = peer.settled_at or living
            if all(map(int.__ge__, acked, peer.settled_at)):
                acked[index] = sent[index] - remains.unrecoverable
