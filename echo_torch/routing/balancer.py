"""A route to several learners: decides which of them gets which samples.

* Each learner has its own route, and the delivery guarantees are that route's. A batch goes to one learner, or the
  user's function splits it among several.
* If several learners could take a batch, a send does not wait long for one of them. It waits in slices of
  `SEND_SLICE_S` and chooses the learner again after each.
* With failover, the undelivered samples of a lost learner go to the others before anything new is sent (`failover`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError, LearnerGoneError, raise_first
from echo_torch.metrics.stats import Counts, Outage, PeerCounts
from echo_torch.metrics.timing import Times
from echo_torch.samples.spec import Match
from echo_torch.support.deadline import Deadline
from echo_torch.support.interrupts import owned_by_this_thread

from .failover import Failover, Learner, NoLearnerLeftError, NoRoomError, UncopiedRowsError
from .prefix import AckedPrefix

_log = logging.getLogger(__name__)

# Seconds that a send waits for one learner before it looks for another with room. A learner that drains frees room for
# a batch in less.
SEND_SLICE_S = 0.01
# The share of its timeout that `close` reserves for the closing tails of the learners that have acked everything, and
# the most seconds for that.
RESEND_SHARE = 0.1
MAX_RESEND_S = 1.0

# Errors of this wing, which `Balancer._to_public_error` turns into public ones.
_ROUTING_ERRORS = (NoLearnerLeftError, NoRoomError, UncopiedRowsError)


class Balancer:
    """A `Route` to several learners.

    ``least_inflight`` and ``failover`` need a `TcpClient` for every learner.

    Args:
        name: how messages name all learners together.
        learners: the learners.
        least_inflight: whether a batch goes to the learner with the fewest un-acked samples, of those with room for it.
            If not, they take turns, unless the batch says which learner gets what (`Match.shards`).
        failover: whether the other learners get the share of a lost one.
        stall_timeout: seconds without room at any learner after which `send` raises; None for no limit.
    """

    def __init__(
        self, name: str, learners: Sequence[Learner], least_inflight: bool, failover: bool, stall_timeout: float | None
    ) -> None:
        # How messages name all learners together.
        self._name = name
        # The learners, lost ones included; a batch's shards are indices into this.
        self._learners = learners
        # Whether a batch goes to the learner with the fewest un-acked samples.
        self._least_inflight = least_inflight
        # Whether the other learners get the share of a lost one.
        self._failover_enabled = failover
        # Seconds without room at any learner after which `send` raises; None for no limit.
        self._stall_timeout = stall_timeout
        # Hands over the samples of lost learners, and counts them where they are now.
        self._failover = Failover(learners)
        # Turns the learners' counts into one prefix of acked samples.
        self._acked_prefix = AckedPrefix()
        # Guards `_acked_prefix` and `_last_progress`.
        self._acked_prefix_lock = threading.RLock()
        # Number of the next batch; says whose turn it is.
        self._round_robin = itertools.count()
        # Whether `close` was called.
        self._closing = False
        # Whether a call has raised that no learner is left, so that `close` need not raise it again.
        self._loss_reported = False
        # What `progress` last returned.
        self._last_progress = 0, 0

    # Counts and state.

    @property
    def closed(self) -> bool:
        return self._closing or self._is_lost

    @property
    def _is_lost(self) -> bool:
        lost = (learner.route.closed for learner in self._learners)
        return all(lost) if self._failover_enabled else any(lost)

    @property
    def reconnecting(self) -> bool:
        lost = (learner.is_disconnected for learner in self._learners)
        return not self.closed and (all(lost) if self._failover_enabled else any(lost))

    def outage(self) -> Outage | None:
        outages = [learner.route.outage() for learner in self._learners]
        lost = [outage for outage in outages if outage is not None]
        # With failover, the outage began with the latest loss; without it, with the first.
        if self._failover_enabled:
            return min(lost) if len(lost) == len(outages) else None
        return max(lost, default=None)

    def counts(self) -> Counts:
        return self._failover.counts(all_lost=self._is_lost)

    def peer_counts(self) -> list[PeerCounts]:
        return [counts for learner in self._learners for counts in learner.route.peer_counts()]

    def progress(self) -> tuple[int, int]:
        if owned_by_this_thread(self._acked_prefix_lock) or self._failover.owned_by_this_thread:
            # A signal handler interrupted this method or a failover step: the counts are half-way between two states.
            return self._last_progress
        with self._acked_prefix_lock:
            total, sent, acked = self._failover.progress()
            self._last_progress = total, min(total, self._acked_prefix.update(total, sent, acked))
            return self._last_progress

    def times(self) -> Times:
        """Return the times of all learners, added up.

        A caller waits for one learner at a time, so the callers' seconds add up. Connections wait in parallel, so their
        ``waiting`` is the mean and ``connected`` the maximum.
        """
        each = [learner.route.times() for learner in self._learners]
        total = each[0]
        for times in each[1:]:
            total = total.plus(times)
        waiting: Any = tuple(seconds / len(each) for seconds in total.waiting)
        return total._replace(connected=max(times.connected for times in each), waiting=waiting)

    def poll_or_raise(self) -> None:
        if not self._failover_enabled:
            for learner in self._learners:
                learner.route.poll_or_raise()
            return
        try:
            while self._failover.take_over_and_count() and self._failover.pass_on_some():
                pass
            self._failover.raise_if_uncopied()
        except _ROUTING_ERRORS as error:
            raise self._to_public_error(error) from None

    # Sending.

    def send_match(self, match: Match, *, timeout: Deadline, whole: bool = False) -> None:
        if self._closing:
            raise self._to_public_error(NoLearnerLeftError("closed"))
        done = 0
        shares = self._split_by_learner(match)
        if whole:
            for first, rows in shares:
                if not self._has_room(first, match.rows if rows is None else len(rows)):
                    raise self._to_public_error(NoRoomError("no learner has room"), "send", Deadline(0.0))
        for number, (first, rows) in enumerate(shares):
            share = match if rows is None else match.take_rows(rows)
            try:
                self._send_share(share, first, timeout)
            except (ConnectionClosedError, DeliveryTimeoutError) as error:
                # The batch was split, so the samples not accepted are no simple end of it: name them.
                if rows is not None:
                    left = [rows[error.rows_accepted :], *(others for _, others in shares[number + 1 :])]
                    error.rows_left = np.concatenate(left).tolist()
                error.rows_accepted += done
                raise
            done += share.rows

    def _has_room(self, first: int, rows: int) -> bool:
        """Whether the learner that would get ``rows`` samples now has room for them; see `_choose_learner`."""
        try:
            learner, _ = self._choose_learner(first, rows)
        except NoLearnerLeftError:
            return True  # sending raises it
        return learner.client is None or learner.client.closed or learner.client.has_room(rows)

    def _split_by_learner(self, match: Match) -> list[tuple[int, Any]]:
        """Return pairs: a learner's index, and the indices of its samples or None for the whole batch."""
        shards = match.shards
        if shards is None:
            return [(next(self._round_robin) % len(self._learners), None)]
        if isinstance(shards, int):
            return [(shards, None)]
        return [(int(shard), np.flatnonzero(shards == shard)) for shard in np.unique(shards)]

    def _send_share(self, match: Match, first: int, deadline: Deadline) -> None:
        """Send samples to one learner or, slice by slice, to several.

        Args:
            match: the samples.
            first: index of the learner whose turn it is; another one gets the samples if that one cannot.
            deadline: when to give up.
        """
        rows, done, stall = match.rows, 0, deadline.within(self._stall_timeout)
        try:
            while True:
                if self._failover_enabled:
                    self._failover.pass_on_all(deadline, self._stall_timeout)
                learner, others = self._choose_learner(first, rows - done)
                limit = deadline.within(SEND_SLICE_S) if others else deadline
                try:
                    learner.route.send_match(match.slice_rows(done, rows) if done else match, timeout=limit)
                    return
                except DeliveryTimeoutError as error:
                    if not others:
                        raise
                    accepted = error.rows_accepted
                    # A learner that has acked nothing for ``stall_timeout`` makes its client raise at once. Sleep for
                    # the rest of the slice, or this loop would spin.
                    if not accepted:
                        time.sleep(limit.remaining())
                except ConnectionClosedError as error:
                    if not self._failover_enabled:
                        raise
                    accepted = error.rows_accepted
                done += accepted
                if done == rows:
                    return
                # Room was found, so the stall timeout starts again.
                if accepted:
                    stall = deadline.within(self._stall_timeout)
                if stall.expired:
                    raise NoRoomError("no learner has room")
        except (ConnectionClosedError, DeliveryTimeoutError, *_ROUTING_ERRORS) as error:
            self._loss_reported = self._loss_reported or isinstance(error, NoLearnerLeftError)
            public_error = self._to_public_error(error, "send", deadline)
            public_error.rows_accepted += done
            try:
                raise public_error from error.__cause__
            finally:
                del public_error  # its traceback holds this frame

    def _choose_learner(self, first: int, rows: int) -> tuple[Learner, bool]:
        """Choose the learner for the next samples.

        Args:
            first: index of the learner whose turn it is.
            rows: number of samples to send.

        Returns:
            The learner, and whether another one could take the samples if this one has no room.
        """
        learners = self._learners
        if not self._failover_enabled:
            # Without failover one lost learner ends the route. Choose it, so that its own `send` raises why.
            lost = [learner for learner in learners if learner.route.closed]
            if lost or not self._least_inflight:
                return (lost or learners[first:])[0], False
        alive = [learner for learner in (*learners[first:], *learners[:first]) if not learner.route.closed]
        if not alive:
            raise NoLearnerLeftError("no learner is left")
        # A learner that is reconnecting is chosen only if there is no other.
        usable = [learner for learner in alive if not (self._failover_enabled and learner.is_disconnected)] or alive
        if not self._least_inflight:
            return usable[0], len(alive) > 1
        # A learner without any room may have stopped, however few samples it has un-acked. So prefer those with room
        # for all samples, then those with room for some.
        if len(usable) > 1:
            with_room = [learner for learner in usable if learner.free_rows]
            usable = [learner for learner in with_room if learner.free_rows >= rows] or with_room or usable
        return min(usable, key=lambda learner: learner.route.counts().unacked), len(alive) > 1

    # Waiting, and the end.

    def wait(self, deadline: Deadline) -> None:
        try:
            self._wait(deadline)
        except (ConnectionClosedError, DeliveryTimeoutError, *_ROUTING_ERRORS) as error:
            self._loss_reported = self._loss_reported or isinstance(error, NoLearnerLeftError)
            raise self._to_public_error(error, "wait", deadline) from error.__cause__

    def _wait(self, deadline: Deadline, include_lost: bool = True) -> None:
        """Block until every sample is acked by a learner that has it now.

        Args:
            deadline: when to give up.
            include_lost: without failover, whether to wait for lost learners too, which raises their error.
        """
        again = True
        while again:
            again = self._failover_enabled and self._failover.pass_on_all(deadline, self._stall_timeout)
            learners = [
                learner
                for learner in self._learners
                if learner.undelivered is None and (include_lost or not learner.route.closed)
            ]
            for learner in learners:
                try:
                    learner.route.wait(deadline)
                except ConnectionClosedError:
                    has_ended = learner.client is not None and learner.client.has_ended
                    if not self._failover_enabled or self._failover.closed or not has_ended:
                        raise
                    again = True  # the others must get its samples
            # Another caller may have handed over a lost learner's samples to one that this loop had waited for before.
            again = again or any(learner.undelivered is not None for learner in learners)
        self._failover.raise_if_uncopied()

    def close(self, deadline: Deadline) -> None:
        self._closing = True
        problems: list[Exception] = []
        try:
            if not self._failover.closed:
                self._deliver_all(deadline, problems)
            self._close_all(deadline, problems)
        except BaseException:  # an interrupt: as with one learner, the I/O threads deliver the rest
            self._abandon_all()
            raise
        raise_first(problems)

    def _deliver_all(self, deadline: Deadline, problems: list[Exception]) -> None:
        """Wait for all acks; keep some time for the closing tails, and add errors to ``problems``."""
        left = deadline.remaining()
        try:
            # Without failover, do not wait for lost learners: their own `close` raises, unless a call did before.
            self._wait(
                deadline.within(left - min(MAX_RESEND_S, RESEND_SHARE * left)), include_lost=self._failover_enabled
            )
        except DeliveryTimeoutError:
            pass  # the `close` of each late learner raises
        except (ConnectionClosedError, *_ROUTING_ERRORS) as error:
            if not (self._loss_reported and isinstance(error, NoLearnerLeftError)):
                problems.append(self._to_public_error(error, "close", deadline))

    def _close_all(self, deadline: Deadline, problems: list[Exception]) -> None:
        """Close every route, and add errors to ``problems``."""
        # From here on, an ended connection is no lost learner.
        self._failover.closed = True
        # The learners with the least left come first: a late one would use up the others' time.
        for learner in sorted(self._learners, key=lambda learner: learner.route.counts().unacked):
            try:
                learner.route.close(deadline)
            except (ConnectionClosedError, DeliveryTimeoutError) as error:
                # Otherwise other learners have its samples, or `_deliver_all` has recorded an error.
                if learner.undelivered is None:
                    problems.append(self._to_public_error(error, "close", deadline))

    def _abandon_all(self) -> None:
        """Let every client's I/O thread deliver the rest and end, without waiting."""
        self._failover.closed = True
        for learner in self._learners:
            if learner.client is not None:
                learner.client.abandon()
        left = self._failover.take_over_and_count()
        if left:
            # Only callers hand over samples, so nobody will do that now.
            text = "%s: close() was interrupted; %d samples of a lost learner were not passed on to the others"
            _log.warning(text, self._name, left)

    def _to_public_error(
        self, error: Exception, call: str = "", deadline: Deadline | None = None
    ) -> ConnectionClosedError | DeliveryTimeoutError:
        """Return the error to raise to the caller, with the number of samples that no learner has acked.

        Args:
            error: a routing error, or the error of one learner's route.
            call: name of the public method.
            deadline: the deadline of that call.
        """
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
            failures = [learner.client.failure for learner in self._learners if learner.client is not None]
            if late:
                public_error = DeliveryTimeoutError(f"{text}; delivery goes on")
            elif failures and all(isinstance(failure, LearnerGoneError) for failure in failures):
                public_error = LearnerGoneError(text)
            else:
                public_error = ConnectionClosedError(text)
        public_error.unacked = unacked
        return public_error
