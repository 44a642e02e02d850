"""A route to several learners: which of them gets what.

* Each learner has a route of its own, which keeps the promises. A batch goes to one of them; or, by a function of the
  user's, its samples to several.
* Where another learner could take a batch, nobody waits for one: a send comes in slices, and looks again which learner
  it should be after each.
* With failover, what a lost learner may not have goes to the others (`estate`), before anything else is sent.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError, raise_first
from echo_torch.metrics.stats import Counts, PeerCounts
from echo_torch.metrics.timing import Times
from echo_torch.samples.spec import Match
from echo_torch.support.deadline import Deadline
from echo_torch.support.interrupts import owned_by_this_thread

from .failover import Estate, NobodyLeftError, NoRoomError, Peer, StuckError
from .prefix import Prefix

_log = logging.getLogger(__name__)

# Seconds that a send waits for one learner before it looks whether another has room. A learner that drains frees a
# batch's room in less.
SLICE_S = 0.01
# The share of its time that `close` keeps for the tails of those learners that have acked everything; and seconds, at
# the most.
TAIL_SHARE = 0.1
TAIL_S = 1.0

_WITHIN = re.compile(r"within [\d.e-]+ s")
_OURS = (NobodyLeftError, NoRoomError, StuckError)


class Spread:
    """Sends to several learners, as a `Route`.

    Args:
        name: of all of them, for messages.
        peers: the learners.
        least_inflight: whether a batch goes to the one that has the fewest samples un-acked, of those that have room
            for it; otherwise they take turns, unless the batch says whose it is (`Match.shards`). Only for routes into
            our own client, as is failover.
        failover: whether the others get the share of one that is gone.
        stall_timeout: seconds without room anywhere after which `send` raises; None for ever.
    """

    def __init__(
        self, name: str, peers: Sequence[Peer], least_inflight: bool, failover: bool, stall_timeout: float | None
    ) -> None:
        self._name = name
        self._peers = peers
        self._least_inflight = least_inflight
        self._failover = failover
        self._stall_timeout = stall_timeout
        self._estate = Estate(peers)
        self._prefix = Prefix()
        self._prefix_lock = threading.RLock()
        self._turns = itertools.count()
        self._closing = False
        self._told_lost = False  # whether a caller was told that nobody is left
        self._progress = 0, 0

    # What became of the samples.

    @property
    def closed(self) -> bool:
        return self._closing or self._is_lost

    @property
    def _is_lost(self) -> bool:
        lost = (peer.route.closed for peer in self._peers)
        return all(lost) if self._failover else any(lost)

    def counts(self) -> Counts:
        return self._estate.counts(hopeless=self._is_lost)

    def peers(self) -> list[PeerCounts]:
        return [counts for peer in self._peers for counts in peer.route.peers()]

    def progress(self) -> tuple[int, int]:
        if owned_by_this_thread(self._prefix_lock) or self._estate.interrupted:
            return self._progress  # for a signal handler: as it was
        with self._prefix_lock:
            total, sent, acked = self._estate.progress()
            self._progress = total, min(total, self._prefix.acked(total, sent, acked))
            return self._progress

    def times(self) -> Times:
        """Callers wait for one learner at a time, but connections side by side: so of their waits, the mean."""
        each = [peer.route.times() for peer in self._peers]
        total = each[0]
        for times in each[1:]:
            total = total.plus(times)
        waiting: Any = tuple(seconds / len(each) for seconds in total.waiting)
        return total._replace(connected=max(times.connected for times in each), waiting=waiting)

    def check(self) -> None:
        if not self._failover:
            for peer in self._peers:
                peer.route.check()
            return
        try:
            while self._estate.left() and self._estate.pass_on():
                pass
            self._estate.tell_of_stuck()
        except _OURS as error:
            raise self._in_words(error) from None

    # Sending.

    def send(self, match: Match, timeout: float | None) -> None:
        if self._closing:
            raise self._in_words(NobodyLeftError("closed"))
        deadline, done = Deadline(timeout), 0
        shares = self._shares(match)
        for number, (first, rows) in enumerate(shares):
            share = match if rows is None else match.take(rows)
            try:
                self._send_share(share, first, deadline)
            except (ConnectionClosedError, DeliveryTimeoutError) as error:
                if rows is not None:
                    left = [rows[error.rows_accepted :], *(others for _, others in shares[number + 1 :])]
                    error.rows_left = np.concatenate(left).tolist()
                error.rows_accepted += done
                raise
            done += share.rows

    def _shares(self, match: Match) -> list[tuple[int, Any]]:
        """Which learner is to have which samples; None for all of them."""
        shards = match.shards
        if shards is None:
            return [(next(self._turns) % len(self._peers), None)]
        if isinstance(shards, int):
            return [(shards, None)]
        return [(int(shard), np.flatnonzero(shards == shard)) for shard in np.unique(shards)]

    def _send_share(self, match: Match, first: int, deadline: Deadline) -> None:
        """To the learner ``first``, if they take turns, or whoever is to have it in its place."""
        rows, done, stall = match.rows, 0, deadline.within(self._stall_timeout)
        try:
            while True:
                accepted = self._send_some(match.slice_rows(done, rows) if done else match, first, deadline)
                done += accepted
                if done == rows:
                    return
                if accepted:
                    stall = deadline.within(self._stall_timeout)
                if stall.expired:
                    raise NoRoomError("no learner has room")
        except (ConnectionClosedError, DeliveryTimeoutError, *_OURS) as error:
            self._told_lost = self._told_lost or isinstance(error, NobodyLeftError)
            told = self._in_words(error, "send", deadline)
            told.rows_accepted += done
            raise told from error.__cause__

    def _send_some(self, match: Match, first: int, deadline: Deadline) -> int:
        """As much as one learner takes before another might; gives how many samples."""
        if self._failover:
            self._estate.settle(deadline, self._stall_timeout)
        peer, others = self._choose(first, match.rows)
        limit = deadline.within(SLICE_S) if others else deadline
        try:
            peer.route.send(match, limit.timeout_left)
        except DeliveryTimeoutError as error:
            if not others:
                raise
            if not error.rows_accepted:  # at once, from one that has acked nothing for ``stall_timeout``
                time.sleep(limit.remaining())
            return error.rows_accepted
        except ConnectionClosedError as error:
            if not self._failover:
                raise
            return error.rows_accepted
        return match.rows

    def _choose(self, first: int, rows: int) -> tuple[Peer, bool]:
        """Who is to have the next samples, and whether that is to be asked again if there is no room."""
        peers = self._peers
        if not self._failover:
            lost = [peer for peer in peers if peer.route.closed]  # whose `send` says so
            if lost or not self._least_inflight:
                return (lost or peers[first:])[0], False
        living = [peer for peer in (*peers[first:], *peers[:first]) if not peer.route.closed]
        if not living:
            raise NobodyLeftError("no learner is left")
        usable = [peer for peer in living if not (self._failover and peer.lost)] or living
        if not self._least_inflight:
            return usable[0], len(living) > 1
        if len(usable) > 1:  # who has no room at all may have been stopped
            roomy = [peer for peer in usable if peer.free_rows]
            usable = [peer for peer in roomy if peer.free_rows >= rows] or roomy or usable
        return min(usable, key=lambda peer: peer.route.counts().unacked), len(living) > 1

    # Waiting, and the end.

    def wait(self, timeout: float | None) -> None:
        deadline = Deadline(timeout)
        try:
            self._wait(deadline)
        except (ConnectionClosedError, DeliveryTimeoutError, *_OURS) as error:
            self._told_lost = self._told_lost or isinstance(error, NobodyLeftError)
            raise self._in_words(error, "wait", deadline) from error.__cause__

    def _wait(self, deadline: Deadline, lost_too: bool = True) -> None:
        """Until everything is acked, by whomever; or all but what is lost, without failover."""
        again = True
        while again:
            again = self._failover and self._estate.settle(deadline, self._stall_timeout)
            peers = [peer for peer in self._peers if peer.remains is None and (lost_too or not peer.route.closed)]
            for peer in peers:
                if not self._waited(peer, deadline):
                    again = True
            # What one left meanwhile, another caller may have passed on to one that was waited for before.
            again = again or any(peer.remains is not None for peer in peers)
        self._estate.tell_of_stuck()

    def _waited(self, peer: Peer, deadline: Deadline) -> bool:
        """Wait for one; False if it is gone, and others have to see to what it left."""
        try:
            peer.route.wait(deadline.timeout_left)
        except ConnectionClosedError:
            if not self._failover or self._estate.closed:
                raise
            return False
        return True

    def close(self, timeout: float | None) -> None:
        self._closing = True
        deadline = Deadline(timeout)
        problems: list[Exception] = []
        try:
            if not self._estate.closed:
                self._deliver_all(deadline, problems)
            self._close_all(deadline, problems)
        except BaseException:  # an interrupt: as with one learner, the rest is left to the threads
            self._abandon_all()
            raise
        raise_first(problems)

    def _deliver_all(self, deadline: Deadline, problems: list[Exception]) -> None:
        timeout = deadline.timeout
        spare = 0.0 if timeout is None else min(TAIL_S, TAIL_SHARE * timeout)
        try:
            # Without failover, who is lost already says so when it is closed, unless that was told.
            self._wait(Deadline(None if timeout is None else timeout - spare), lost_too=self._failover)
        except DeliveryTimeoutError:
            pass  # whoever is late will say so
        except (ConnectionClosedError, *_OURS) as error:
            if not (self._told_lost and isinstance(error, NobodyLeftError)):
                problems.append(self._in_words(error, "close", deadline))

    def _close_all(self, deadline: Deadline, problems: list[Exception]) -> None:
        self._estate.closed = True
        for peer in sorted(self._peers, key=lambda peer: peer.route.counts().unacked):
            try:
                peer.route.close(deadline.timeout_left)
            except (ConnectionClosedError, DeliveryTimeoutError) as error:
                if peer.remains is None:  # otherwise it is with others, or was told of
                    problems.append(self._in_words(error, "close", deadline))

    def _abandon_all(self) -> None:
        self._estate.closed = True
        for peer in self._peers:
            if peer.client is not None:
                peer.client.abandon()
        left = self._estate.left()
        if left:
            text = "%s: close() was interrupted before %d samples of a learner that is gone were passed on"
            _log.warning(text, self._name, left)

    def _in_words(
        self, error: Exception, call: str = "", deadline: Deadline | None = None
    ) -> ConnectionClosedError | DeliveryTimeoutError:
        """What callers are told, with the count of what all learners have not acked."""
        unacked = self.counts().unacked
        told = error
        if not isinstance(told, (ConnectionClosedError, DeliveryTimeoutError)):
            late = isinstance(error, NoRoomError)
            if not late:
                what = str(error)
            elif deadline is not None and deadline.expired:
                what = f"{call}() not done within {deadline.timeout:g} s: {error}"
            else:
                what = f"{error}, and nothing was acked for {self._stall_timeout:g} s (stall_timeout)"
            text = f"{self._name}: {what}; {unacked} samples un-acked"
            told = DeliveryTimeoutError(f"{text}; delivery goes on") if late else ConnectionClosedError(text)
        elif isinstance(told, DeliveryTimeoutError) and deadline is not None and deadline.expired:
            # One learner knows what was left of the time, and not how much there was.
            told = DeliveryTimeoutError(_WITHIN.sub(f"within {deadline.timeout:g} s", str(error), count=1))
            told.rows_accepted = error.rows_accepted  # type: ignore[attr-defined]
        told.unacked = unacked
        return told
