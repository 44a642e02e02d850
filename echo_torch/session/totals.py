"""`Totals`: the counters of a sink in one process: its own, its children's, and those of earlier runs, added up."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from echo_torch.metrics.stats import LOSS_FIELDS, SAVED_FIELDS, PeerCounts, PeerStats, SinkStats
from echo_torch.metrics.timing import DEVICE, LEARNER, NETWORK, Times, quantile
from echo_torch.processes.parent import ChildProcesses
from echo_torch.routing.route import Route
from echo_torch.support.validation import check_count, check_seconds

_log = logging.getLogger(__name__)

# The counters that continue from an earlier run. ``in_flight`` does not: nothing of that run is in flight any more.
_PERSISTENT = [name for name in SAVED_FIELDS if name != "in_flight"]
# Rates are averages over about this many seconds. This many snapshots of the counters are kept for them.
RATE_SPAN_S = 10.0
RATE_SNAPSHOTS = 8
# Least seconds between two verdicts in the log.
VERDICT_INTERVAL_S = 30.0


class Totals:
    """The counters of one session.

    Args:
        learner_names: the learners' names in messages.
        payload_size: bytes of one sample.
        children: the children whose counts are added.
    """

    def __init__(self, learner_names: Sequence[str], payload_size: int, children: ChildProcesses) -> None:
        # Samples given to `send` and not sent, because the learner was gone or a callback found no room.
        self.dropped = 0
        # Seconds spent on comparing batches with the example.
        self.check_seconds = 0.0
        # The learners' names in messages.
        self._learner_names = learner_names
        # Bytes of one sample.
        self._payload_size = payload_size
        # The children whose counts are added.
        self._children = children
        # When the session was made, and when the last verdict was logged, by the monotonic clock.
        self._started_at = self._last_verdict_at = time.monotonic()
        # (when, samples sent, samples acked), for the rates.
        self._rate_snapshots = deque([(self._started_at, 0, 0)], maxlen=RATE_SNAPSHOTS)
        # The stats when the last verdict was logged; the next one judges what came since.
        self._stats_at_verdict = SinkStats(0, 0, 0, 0, 0, 0, 0.0)
        # What a loaded state adds to the counters of this process and its children.
        self._earlier: dict[str, Any] = dict.fromkeys(_PERSISTENT, 0)

    def stats(self, route: Route) -> SinkStats:
        """Return everything that `EchoSink.stats` returns; ``route`` is the session's connection."""
        counted = self._current_stats(route)
        total = {name: getattr(counted, name) + self._earlier[name] for name in _PERSISTENT}
        loaded = {"loaded_sent": self._earlier["samples_sent"], "loaded_acked": self._earlier["samples_acked"]}
        return dataclasses.replace(counted, **total, **loaded, **self._rates(counted), peers=self._peer_stats(route))

    def _peer_stats(self, route: Route) -> tuple[PeerStats, ...]:
        """Return what this process and its children sent to each learner."""
        mine, theirs = route.peer_counts(), self._children.peer_counts()
        peer_stats = []
        for name, one, other in zip_longest(self._learner_names, mine, theirs, fillvalue=PeerCounts()):
            sent, unacked, *rest = one.plus(other)
            peer_stats.append(PeerStats(str(name), sent, sent - unacked, unacked, *rest))
        return tuple(peer_stats)

    def own_times(self, route: Route) -> Times:
        """Return where the time went in this process."""
        return route.times()._replace(checking=self.check_seconds)

    def log_verdict(self, route: Route) -> None:
        """Log what limits the speed, at most once in `VERDICT_INTERVAL_S`."""
        if time.monotonic() - self._last_verdict_at < VERDICT_INTERVAL_S:
            return
        now = self.stats(route)
        recent = now.since(self._stats_at_verdict)
        self._last_verdict_at, self._stats_at_verdict = time.monotonic(), now
        level = logging.WARNING if recent.blocked_too_long else logging.INFO
        _log.log(level, "%s: %s", ", ".join(self._learner_names), recent.bottleneck)

    def state_dict(self, route: Route) -> dict[str, Any]:
        """Return the counters that another run can continue from, as plain numbers."""
        stats = self.stats(route)
        return {name: getattr(stats, name) for name in SAVED_FIELDS}

    def load_state_dict(self, state: Mapping[str, Any], route: Route) -> None:
        """Continue from a saved state; a state that is refused changes nothing."""
        # Check every number before the last line, which is the only change.
        loaded: dict[str, Any] = {}
        for name in SAVED_FIELDS:
            check = check_seconds if name == "blocked_seconds" else _check_number
            loaded[name] = check(f"state[{name!r}]", state.get(name))  # type: ignore[arg-type]
        loaded["maybe_lost"] += loaded.pop("in_flight")
        # The saved numbers replace what this process has counted so far: subtract that, since `stats` adds it again.
        counted = self._current_stats(route)
        self._earlier = {name: loaded[name] - getattr(counted, name) for name in _PERSISTENT}

    def _rates(self, counted: SinkStats) -> dict[str, Any]:
        """Return samples per second since the latest snapshot at least `RATE_SPAN_S` old, or else since the first."""
        now, snapshots = time.monotonic(), self._rate_snapshots
        while len(snapshots) > 1 and now - snapshots[1][0] >= RATE_SPAN_S:
            snapshots.popleft()
        began, sent, acked = snapshots[0]
        seconds = now - began
        if now - snapshots[-1][0] >= RATE_SPAN_S / RATE_SNAPSHOTS:
            snapshots.append((now, counted.samples_sent, counted.samples_acked))
        if seconds <= 0:
            return {}
        return {
            "sent_per_second": (counted.samples_sent - sent) / seconds,
            "acked_per_second": (counted.samples_acked - acked) / seconds,
        }

    def _current_stats(self, route: Route) -> SinkStats:
        """Return the stats of this process and its children, without those of earlier runs."""
        counts, theirs, outage = route.counts(), self._children.counts(), route.outage()
        times = self.own_times(route).plus(self._children.times())
        sent, unacked = counts.sent + theirs["sent"], counts.unacked + theirs["sent"] - theirs["acked"]
        return SinkStats(
            samples_sent=sent,
            bytes_sent=sent * self._payload_size,
            samples_acked=sent - unacked,
            bytes_acked=(sent - unacked) * self._payload_size,
            in_flight=unacked,
            dropped=self.dropped + theirs["dropped"],
            blocked_seconds=sum(times.blocked),
            **{field: getattr(counts, field) + theirs[field] for field in LOSS_FIELDS},
            elapsed_seconds=time.monotonic() - self._started_at,
            connected_seconds=times.connected,
            check_seconds=times.checking,
            pack_seconds=max(0.0, times.sending - sum(times.blocked)),
            blocked_by_learner_seconds=times.blocked[LEARNER],
            blocked_by_network_seconds=times.blocked[NETWORK],
            blocked_by_device_seconds=times.blocked[DEVICE],
            learner_seconds=times.waiting[LEARNER],
            network_seconds=times.waiting[NETWORK],
            device_seconds=times.waiting[DEVICE],
            ack_p50_seconds=quantile(times.latencies, 0.5),
            ack_p99_seconds=quantile(times.latencies, 0.99),
            disconnected_seconds=0.0 if outage is None else outage.seconds,
            reconnect_tries=0 if outage is None else outage.tries,
        )


def _check_number(name: str, number: int) -> int:
    return check_count(name, number, least=0)
