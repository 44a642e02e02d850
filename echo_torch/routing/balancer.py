"""A route to several learners: which of them gets what.

* Each learner has a route of its own, which keeps the promises. A batch goes to one of them; or, by a function of the
  user's, its samples to several.
* Where another learner could take a batch, nobody waits for one: a send comes in slices, and looks again which learner
  it should be after each.
* With failover, what a lost learner may not have goes to the others (`failover`), before anything else is sent.
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

from .failover import Failover, Learner, NoLearnerLeftError, NoRoomError, UncopiedRowsError
from .prefix import AckedPrefix

_log = logging.getLogger(__name__)

# Seconds that a send waits for one learner before it looks whether another has room. A learner that drains frees a
# batch's room in less.
SEND_SLICE_S = 0.01
# The share of its time that `close` keeps for the tails of those learners that have acked everything; and seconds, at
# the most.
RESEND_SHARE = 0.1
MAX_RESEND_S = 1.0

_TIMEOUT_TEXT = re.compile(r"within [\d.e-]+ s")
_ROUTING_ERRORS = (NoLearnerLeftError, NoRoomError, UncopiedRowsError)


class Balancer:
    """Sends to several learners, as a `Route`.

    Args:
        name: of all of them, for messages.
        learners: the learners.
        least_inflight: whether a batch goes to the one that has the fewest samples un-acked, of those that have room
            for it; otherwise they take turns, unless the batch says whose it is (`Match.shards`). Only for routes into
            our own client, as is failover.
        failover: whether the others get the share of one that is gone.
        stall_timeout: seconds without room anywhere after which `send` raises; None for ever.
    """

    def __init__(
        self, name: str, learners: Sequence[Learner], least_inflight: bool, failover: bool, stall_timeout: float | None
    ) -> None:
        self._name = name
        self._learners = learners
        self._least_inflight = least_inflight
        self._failover_enabled = failover
        self._stall_timeout = stall_timeout
        self._failover = Failover(learners)
        self._acked_prefix = AckedPrefix()
        self._acked_prefix_lock = threading.RLock()
        self._round_robin = itertools.count()
        self._closing = False
        self._loss_reported = False  # whether a caller was told that nobody is left
        self._last_progress = 0, 0

    # What became of the samples.

    @property
    def closed(self) -> bool:
        return self._closing or self._is_lost

    @property
    def _is_lost(self) -> bool:
        lost = (learner.route.closed for learner in self._learners)
        return all(lost) if self._failover_enabled else any(lost)

    def counts(self) -> Counts:
        return self._failover.counts(all_lost=self._is_lost)

    def peer_counts(self) -> list[PeerCounts]:
        return [counts for learner in self._learners for counts in learner.route.peer_counts()]

    def progress(self) -> tuple[int, int]:
        if owned_by_this_thread(self._acked_prefix_lock) or self._failover.owned_by_this_thread:
            return self._last_progress  # for a signal handler: as it was
        with self._acked_prefix_lock:
            total, sent, acked = self._failover.progress()
            self._last_progress = total, min(total, self._acked_prefix.update(total, sent, acked))
            return self._last_progress

    def times(self) -> Times:
        """Callers wait for one learner at a time, but connections side by side: so of their waits, the mean."""
        each = [learner.route.times() for learner in self._learners]
        total = each[0]
        for times in each[1:]:
            total = total.plus(times)
        waiting: Any = tuple(seconds / len(each) for seconds in total.waiting)
        return total._replace(connected=max(times.connected for times in each), waiting=waiting)

    def check(self) -> None:
        if not self._failover_enabled:
            for learner in self._learners:
                learner.route.check()
            return
        try:
            while self._failover.count_pending() and self._failover.pass_on_some():
                pass
            self._failover.raise_if_uncopied()
        except _ROUTING_ERRORS as error:
            raise self._to_public_error(error) from None

    # Sending.

    def send(self, match: Match, timeout: float | None) -> None:
        if self._closing:
            raise self._to_public_error(NoLearnerLeftError("closed"))
        deadline, done = Deadline(timeout), 0
        shares = self._split_by_learner(match)
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

    def _split_by_learner(self, match: Match) -> list[tuple[int, Any]]:
        """Which learner is to have which samples; None for all of them."""
        shards = match.shards
        if shards is None:
            return [(next(self._round_robin) % len(self._learners), None)]
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
        except (ConnectionClosedError, DeliveryTimeoutError, *_ROUTING_ERRORS) as error:
            self._loss_reported = self._loss_reported or isinstance(error, NoLearnerLeftError)
            public_error = self._to_public_error(error, "send", deadline)
            public_error.rows_accepted += done
            raise public_error from error.__cause__

    def _send_some(self, match: Match, first: int, deadline: Deadline) -> int:
        """As much as one learner takes before another might; gives how many samples."""
        if self._failover_enabled:
            self._failover.pass_on_all(deadline, self._stall_timeout)
        learner, others = self._choose_learner(first, match.rows)
        limit = deadline.within(SEND_SLICE_S) if others else deadline
        try:
            learner.route.send(match, limit.timeout_left)
        except DeliveryTimeoutError as error:
            if not others:
                raise
            if not error.rows_accepted:  # at once, from one that has acked nothing for ``stall_timeout``
                time.sleep(limit.remaining())
            return error.rows_accepted
        except ConnectionClosedError as error:
            if not self._failover_enabled:
                raise
            return error.rows_accepted
        return match.rows

    def _choose_learner(self, first: int, rows: int) -> tuple[Learner, bool]:
        """Who is to have the next samples, and whether that is to be asked again if there is no room."""
        learners = self._learners
        if not self._failover_enabled:
            lost = [learner for learner in learners if learner.route.closed]  # whose `send` says so
            if lost or not self._least_inflight:
                return (lost or learners[first:])[0], False
        alive = [learner for learner in (*learners[first:], *learners[:first]) if not learner.route.closed]
        if not alive:
            raise NoLearnerLeftError("no learner is left")
        usable = [learner for learner in alive if not (self._failover_enabled and learner.is_disconnected)] or alive
        if not self._least_inflight:
            return usable[0], len(alive) > 1
        if len(usable) > 1:  # who has no room at all may have been stopped
            with_room = [learner for learner in usable if learner.free_rows]
            usable = [learner for learner in with_room if learner.free_rows >= rows] or with_room or usable
        return min(usable, key=lambda learner: learner.route.counts().unacked), len(alive) > 1

    # Waiting, and the end.

    def wait(self, timeout: float | None) -> None:
        deadline = Deadline(timeout)
        try:
            self._wait(deadline)
        except (ConnectionClosedError, DeliveryTimeoutError, *_ROUTING_ERRORS) as error:
            self._loss_reported = self._loss_reported or isinstance(error, NoLearnerLeftError)
            raise self._to_public_error(error, "wait", deadline) from error.__cause__

    def _wait(self, deadline: Deadline, include_lost: bool = True) -> None:
        """Until everything is acked, by whomever; or all but what is lost, without failover."""
        again = True
        while again:
            again = self._failover_enabled and self._failover.pass_on_all(deadline, self._stall_timeout)
            learners = [
                learner
                for learner in self._learners
                if learner.undelivered is None and (include_lost or not learner.route.closed)
            ]
            for learner in learners:
                if not self._wait_for(learner, deadline):
                    again = True
            # What one left meanwhile, another caller may have passed on to one that was waited for before.
            again = again or any(learner.undelivered is not None for learner in learners)
        self._failover.raise_if_uncopied()

    def _wait_for(self, learner: Learner, deadline: Deadline) -> bool:
        """Wait for one; False if it is gone, and others have to see to what it left."""
        try:
            learner.route.wait(deadline.timeout_left)
        except ConnectionClosedError:
            if not self._failover_enabled or self._failover.closed:
                raise
            return False
        return True

    def close(self, timeout: float | None) -> None:
        self._closing = True
        deadline = Deadline(timeout)
        problems: list[Exception] = []
        try:
            if not self._failover.closed:
                self._deliver_all(deadline, problems)
            self._close_all(deadline, problems)
        except BaseException:  # an interrupt: as with one learner, the rest is left to the threads
            self._abandon_all()
            raise
        raise_first(problems)

    def _deliver_all(self, deadline: Deadline, problems: list[Exception]) -> None:
        timeout = deadline.timeout
        reserved = 0.0 if timeout is None else min(MAX_RESEND_S, RESEND_SHARE * timeout)
        try:
            # Without failover, who is lost already says so when it is closed, unless that was told.
            self._wait(Deadline(None if timeout is None else timeout - reserved), include_lost=self._failover_enabled)
        except DeliveryTimeoutError:
            pass  # whoever is late will say so
        except (ConnectionClosedError, *_ROUTING_ERRORS) as error:
            if not (self._loss_reported and isinstance(error, NoLearnerLeftError)):
                problems.append(self._to_public_error(error, "close", deadline))

    def _close_all(self, deadline: Deadline, problems: list[Exception]) -> None:
        self._failover.closed = True
        for learner in sorted(self._learners, key=lambda learner: learner.route.counts().unacked):
            try:
                learner.route.close(deadline.timeout_left)
            except (ConnectionClosedError, DeliveryTimeoutError) as error:
                if learner.undelivered is None:  # otherwise it is with others, or was told of
                    problems.append(self._to_public_error(error, "close", deadline))

    def _abandon_all(self) -> None:
        self._failover.closed = True
        for learner in self._learners:
            if learner.client is not None:
                learner.client.abandon()
        left = self._failover.count_pending()
        if left:
            text = "%s: close() was interrupted before %d samples of a learner that is gone were passed on"
            _log.warning(text, self._name, left)

    def _to_public_error(
        self, error: Exception, call: str = "", deadline: Deadline | None = None
    ) -> ConnectionClosedError | DeliveryTimeoutError:
        """What callers are told, with the count of what all learners have not acked."""
        unacked = self.counts().unacked
        public_error = error
        if not isinstance(public_error, (ConnectionClosedError, DeliveryTimeoutError)):
            late = isinstance(error, NoRoomError)
            if not late:
                what = str(error)
            elif deadline is not None and deadline.expired:
                what = f"{call}() not done within {deadline.timeout:g} s: {error}"
            else:
                what = f"{error}, and nothing was acked for {self._stall_timeout:g} s (stall_timeout)"
            text = f"{self._name}: {what}; {unacked} samples un-acked"
            public_error = DeliveryTimeoutError(f"{text}; delivery goes on") if late else ConnectionClosedError(text)
        elif isinstance(public_error, DeliveryTimeoutError) and deadline is not None and deadline.expired:
            # One learner knows what was left of the time, and not how much there was.
            public_error = DeliveryTimeoutError(
                _TIMEOUT_TEXT.sub(f"within {deadline.timeout:g} s", str(error), count=1)
            )
            public_error.rows_accepted = error.rows_accepted  # type: ignore[attr-defined]
        public_error.unacked = unacked
        return public_error
