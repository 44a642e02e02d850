"""What became of a sink's samples, as one process tells it: its own, its children's, and those of runs before."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from echo_torch.metrics.stats import SAVED_FIELDS, Counts, PeerCounts, PeerStats, SinkStats
from echo_torch.metrics.timing import DEVICE, LEARNER, NETWORK, NOTHING, Times, quantile
from echo_torch.processes.parent import Children
from echo_torch.routing.route import Route
from echo_torch.support.validation import check_count, check_seconds

_log = logging.getLogger(__name__)

# Those that go on from another run.
_LASTING = [name for name in SAVED_FIELDS if name != "in_flight"]
# Seconds of which rates are, at the most, and how many moments are kept for that.
RATE_S = 10.0
MOMENTS = 8
# Seconds between two verdicts in the log, at the least.
VERDICT_S = 30.0


class Account:
    """Of one session.

    Args:
        learners: how messages name them.
        payload_size: bytes of one sample.
        children: whose counts are added.
    """

    def __init__(self, learners: Sequence[str], payload_size: int, children: Children) -> None:
        self.dropped = 0
        """Samples that were given to ``send`` and not sent, for the learner was gone."""
        self.check_seconds = 0.0
        """Seconds that batches were compared with the example."""
        self._learners = learners
        self._payload_size = payload_size
        self._children = children
        self._began = self._verdict_at = time.monotonic()
        self._moments = deque([(self._began, 0, 0)], maxlen=MOMENTS)
        self._at_verdict = SinkStats(0, 0, 0, 0, 0, 0, 0.0)
        self._before: dict[str, Any] = dict.fromkeys(_LASTING, 0)  # what was counted before, in another process or run

    def stats(self, route: Route | None) -> SinkStats:
        """With what was sent by ``route``."""
        counted = self._counted(route)
        total = {name: getattr(counted, name) + self._before[name] for name in _LASTING}
        loaded = {"loaded_sent": self._before["samples_sent"], "loaded_acked": self._before["samples_acked"]}
        return dataclasses.replace(counted, **total, **loaded, **self._rates(counted), peers=self._peers(route))

    def _peers(self, route: Route | None) -> tuple[PeerStats, ...]:
        """What each learner was sent, by this process and its children."""
        mine, theirs = [] if route is None else route.peers(), self._children.peers()
        told = []
        for name, one, other in zip_longest(self._learners, mine, theirs, fillvalue=PeerCounts()):
            sent, unacked, *rest = one.plus(other)
            told.append(PeerStats(str(name), sent, sent - unacked, unacked, *rest))
        return tuple(told)

    def times(self, route: Route | None) -> Times:
        """Where the time went in this process."""
        return (Times() if route is None else route.times())._replace(checking=self.check_seconds)

    def give_verdict(self, route: Route | None) -> None:
        """Log what holds things up, if that was not done for a while."""
        if time.monotonic() - self._verdict_at < VERDICT_S:
            return
        now = self.stats(route)
        lately = now.since(self._at_verdict)
        self._verdict_at, self._at_verdict = time.monotonic(), now
        level = logging.WARNING if lately.blocked_too_long else logging.INFO
        _log.log(level, "%s: %s", ", ".join(self._learners), lately.bottleneck)

    def state_dict(self, route: Route | None) -> dict[str, Any]:
        """What of `stats` another run can go on from."""
        stats = self.stats(route)
        return {name: getattr(stats, name) for name in SAVED_FIELDS}

    def load_state_dict(self, state: Mapping[str, Any], route: Route | None) -> None:
        """Go on from there; nothing is changed if ``state`` is none."""
        loaded: dict[str, Any] = {}
        for name in SAVED_FIELDS:
            check = check_seconds if name == "blocked_seconds" else _check_number
            loaded[name] = check(f"state[{name!r}]", state.get(name))  # type: ignore[arg-type]
        loaded["maybe_lost"] += loaded.pop("in_flight")
        counted = self._counted(route)
        self._before = {name: loaded[name] - getattr(counted, name) for name in _LASTING}

    def _rates(self, counted: SinkStats) -> dict[str, Any]:
        """Samples per second since the last moment, of those that are kept, that is ``RATE_S`` ago; or the first."""
        now, kept = time.monotonic(), self._moments
        while len(kept) > 1 and now - kept[1][0] >= RATE_S:
            kept.popleft()
        began, sent, acked = kept[0]
        seconds = now - began
        if now - kept[-1][0] >= RATE_S / MOMENTS:
            kept.append((now, counted.samples_sent, counted.samples_acked))
        if seconds <= 0:
            return {}
        return {
            "sent_per_second": (counted.samples_sent - sent) / seconds,
            "acked_per_second": (counted.samples_acked - acked) / seconds,
        }

    def _counted(self, route: Route | None) -> SinkStats:
        """In this process and its children, since the sink was made here."""
        counts, theirs = Counts() if route is None else route.counts(), self._children.counts()
        times = self.times(route).plus(self._children.times())
        sent, unacked = counts.sent + theirs["sent"], counts.unacked + theirs["sent"] - theirs["acked"]
        return SinkStats(
            samples_sent=sent,
            bytes_sent=sent * self._payload_size,
            samples_acked=sent - unacked,
            bytes_acked=(sent - unacked) * self._payload_size,
            in_flight=unacked,
            dropped=self.dropped + theirs["dropped"],
            blocked_seconds=sum(times.blocked),
            reconnects=counts.reconnects + theirs["reconnects"],
            resent=counts.resent + theirs["resent"],
            maybe_duplicated=counts.maybe_duplicated + theirs["maybe_duplicated"],
            maybe_lost=counts.maybe_lost + theirs["maybe_lost"],
            elapsed_seconds=time.monotonic() - self._began,
            connected_seconds=times.connected,
            check_seconds=times.checking,
            pack_seconds=max(0.0, times.sending - sum(times.blocked)),
            blocked_by_learner_seconds=times.blocked[LEARNER] + times.blocked[NOTHING],
            blocked_by_network_seconds=times.blocked[NETWORK],
            blocked_by_device_seconds=times.blocked[DEVICE],
            learner_seconds=times.waiting[LEARNER],
            network_seconds=times.waiting[NETWORK],
            device_seconds=times.waiting[DEVICE],
            ack_p50_seconds=quantile(times.latencies, 0.5),
            ack_p99_seconds=quantile(times.latencies, 0.99),
        )


def _check_number(name: str, number: int) -> int:
    return check_count(name, number, least=0)
