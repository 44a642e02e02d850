"""Counts of samples: `Counts` and `PeerCounts` inside the package, `SinkStats` and `PeerStats` for the user.

* ``sent`` counts what ``send`` accepted. Samples that are sent again do not count again.
* ``maybe_lost`` and ``maybe_duplicated`` are upper bounds.
* A `SinkStats` is a snapshot. It is built from `Counts` and `Times` of this process and of its children.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from typing import Any, NamedTuple


class Counts(NamedTuple):
    """What happened to the samples of one client."""

    sent: int = 0
    """Samples that ``send`` accepted."""
    unacked: int = 0
    """How many of these have no known ack yet."""
    reconnects: int = 0
    """How often a lost connection was opened again."""
    resent: int = 0
    """Samples that were sent again after reconnecting."""
    maybe_duplicated: int = 0
    """Upper bound of the extra copies that the server stored: ``resent``, and the closing tail that ``close`` sends."""
    maybe_lost: int = 0
    """Upper bound of the samples that the server did not store. 0 while the connection is open or may reopen."""


# The counters of `Counts` that move only when connections are lost or closed.
LOSS_FIELDS = Counts._fields[2:]


class Outage(NamedTuple):
    """A lost connection."""

    seconds: float
    """How long ago it was lost."""
    tries: int
    """How often it was tried to open it again."""


class PeerCounts(NamedTuple):
    """What happened to the samples for one learner. The first four fields mean what they do in `Counts`."""

    sent: int = 0
    unacked: int = 0
    reconnects: int = 0
    resent: int = 0
    lost: int = 0
    """How many connections to it were lost for good."""

    @classmethod
    def from_counts(cls, counts: Counts, lost: bool) -> PeerCounts:
        """Take the counts of one connection, and whether it is lost for good."""
        return cls(counts.sent, counts.unacked, counts.reconnects, counts.resent, int(lost))

    def plus(self, other: PeerCounts) -> PeerCounts:
        """Return the sums of both."""
        return PeerCounts._make(map(operator.add, self, other))


@dataclasses.dataclass(frozen=True)
class PeerStats:
    """What this process and its DataLoader workers sent to one learner."""

    peer: str
    """The learner, as ``host:port``."""
    samples_sent: int
    """Samples that ``send`` accepted for this learner."""
    samples_acked: int
    """Samples that the learner acknowledged."""
    in_flight: int
    """Samples that it has not acknowledged. If a connection was lost, other learners may have got its samples since."""
    reconnects: int
    """How often a lost connection to it was opened again."""
    resent: int
    """Samples that were sent to it again after reconnecting."""
    lost: int
    """How many connections to it were lost for good: at most one in each process."""


# `SinkStats.bottleneck` names a culprit if `send` was blocked for at least the first share of the connected time, or if
# the connection waited for at least the second.
BLOCKED_SHARE = 0.05
WAITING_SHARE = 0.5
# The log line is a warning if `send` was blocked for more than this share of the connected time.
WARN_BLOCKED_SHARE = 1 / 3
# What is slow if a socket is full. Only Linux counts how long the peer's buffer was full.
_NETWORK = "network" if sys.platform == "linux" else "learner- or network"


def _uncompared_field(default: Any = 0.0) -> Any:
    """Return a field that is neither compared nor saved."""
    return dataclasses.field(default=default, compare=False)


@dataclasses.dataclass(frozen=True)
class SinkStats:
    """What a sink did in this process and its DataLoader workers, since it connected.

    Two objects are equal if their counts and ``blocked_seconds`` are. Other times, rates and ``peers`` do not matter.
    """

    samples_sent: int
    """Samples that ``send`` accepted."""
    bytes_sent: int
    """Payload bytes of these samples."""
    samples_acked: int
    """Samples that the server acknowledged."""
    bytes_acked: int
    """Payload bytes of these samples."""
    in_flight: int
    """Samples that were accepted and not acknowledged. After a lost connection, the server may have stored them."""
    dropped: int
    """Samples that were not sent: those given to ``send`` after the learner was gone, with ``on_error="warn"``; those
    that found no room, with ``on_full="drop"``; and those that a `SinkCallback` skipped because there was no room."""
    blocked_seconds: float
    """Seconds that ``send`` waited for room in the buffer."""
    reconnects: int = 0
    """How often a lost connection was opened again."""
    resent: int = 0
    """Samples that were sent again after reconnecting."""
    maybe_duplicated: int = 0
    """Upper bound of the extra copies that the learner got: ``resent``, and the samples that `close` sends again."""
    maybe_lost: int = 0
    """Upper bound of the samples that the learner never gets. 0 until the connection has ended. Then it counts the
    unacknowledged samples, and the last ``resend_acked`` others unless `close` sent them again."""

    elapsed_seconds: float = _uncompared_field()
    """Seconds since this process created the sink or first used it."""
    connected_seconds: float = _uncompared_field()
    """Seconds with an open connection, summed over all processes that sent samples. The times below are parts of it."""
    check_seconds: float = _uncompared_field()
    """Seconds that ``send`` compared batches with the example."""
    pack_seconds: float = _uncompared_field()
    """Seconds that ``send`` copied samples into the buffer, and wrote those that could be written at once."""
    blocked_by_learner_seconds: float = _uncompared_field()
    """The part of ``blocked_seconds`` in which the learner did not read, or did not ack."""
    blocked_by_network_seconds: float = _uncompared_field()
    """The part of ``blocked_seconds`` in which the network took no more. Only Linux tells this from the learner; other
    systems count every full socket here."""
    blocked_by_device_seconds: float = _uncompared_field()
    """The part of ``blocked_seconds`` in which copies from a device were not done."""
    learner_seconds: float = _uncompared_field()
    """Seconds that connections waited for the learner, while samples were left to write or you called `wait`."""
    network_seconds: float = _uncompared_field()
    """Seconds that they waited for the network instead."""
    device_seconds: float = _uncompared_field()
    """Seconds that connections waited for copies from a device."""
    ack_p50_seconds: float = _uncompared_field()
    """Median of the seconds from writing a sample to reading its ack, over some samples; up to a fifth too high."""
    ack_p99_seconds: float = _uncompared_field()
    """99th percentile of the same."""
    sent_per_second: float = _uncompared_field()
    """Samples accepted per second, measured between recent calls of `EchoSink.stats` and `EchoSink.wait`."""
    acked_per_second: float = _uncompared_field()
    """Samples acknowledged per second, over the same time."""
    loaded_sent: int = _uncompared_field(0)
    """How many of ``samples_sent`` belong to earlier runs, added by `EchoSink.load_state_dict`."""
    loaded_acked: int = _uncompared_field(0)
    """How many of ``samples_acked`` belong to earlier runs."""
    disconnected_seconds: float = _uncompared_field()
    """Seconds since this process lost its connection, or the last one that batches could go to; 0 while it is open."""
    reconnect_tries: int = _uncompared_field(0)
    """How often it was tried since to open the connection again."""
    peers: tuple[PeerStats, ...] = _uncompared_field(())
    """The counts of each learner."""

    def __str__(self) -> str:
        """A few aligned lines for people: counts, rates, latency, verdict; ``repr`` has everything."""
        lines = {
            "samples": f"{self.samples_sent:,} sent, {self.samples_acked:,} acked, {self.in_flight:,} in flight, "
            f"{self.dropped:,} dropped",
            "bytes": f"{self.bytes_sent / 1e6:,.1f} MB sent, {self.bytes_acked / 1e6:,.1f} MB acked",
            "rate": f"{self.sent_per_second:,.0f} samples/s sent, {self.acked_per_second:,.0f} acked",
            "ack after": f"{self.ack_p50_seconds * 1e3:,.1f} ms (median), {self.ack_p99_seconds * 1e3:,.1f} ms (99 %)",
            "losses": f"{self.reconnects:,} reconnects, {self.resent:,} sent again, at most {self.maybe_duplicated:,} "
            f"stored twice and {self.maybe_lost:,} lost",
            "verdict": self.bottleneck,
        }
        return "\n".join(f"{name:10}{text}" for name, text in lines.items())

    @property
    def bottleneck(self) -> str:
        """What limits the rate, in words: the learner, the network, the device or the producer, and by how much.

        A proxy in front of the learner that reads slowly counts as the learner.

        Covers this run only, without the counts that `EchoSink.load_state_dict` added.
        """
        elapsed, connected = self.elapsed_seconds, self.connected_seconds
        sent, acked = self.samples_sent - self.loaded_sent, self.samples_acked - self.loaded_acked
        if elapsed <= 0 or connected <= 0 or not (sent or self.in_flight):
            return "idle: nothing was sent"
        # Callers may be several threads, so the share can exceed 1.
        share = (self.check_seconds + self.pack_seconds + self._blocked_seconds_this_run) / connected
        cost = f"send took {share:.1%} of the time" if share <= 1 else f"send took the time of {share:.1f} threads"
        if self.disconnected_seconds:
            lost = f"the connection was lost {self.disconnected_seconds:,.1f} s ago"
            return f"disconnected: {lost}, tried {self.reconnect_tries} times to open it again; {cost}"
        # Payload acked in this run; the totals tell the bytes per sample.
        megabytes = acked * self.bytes_acked / max(1, self.samples_acked) / 1e6
        # For each verdict, the seconds that I/O threads waited, and that callers of `send` were blocked.
        waiting = {
            f"learner-bound: the server acks {acked / elapsed:,.0f} samples/s": (
                self.learner_seconds,
                self.blocked_by_learner_seconds,
            ),
            f"{_NETWORK}-bound: the connection takes {megabytes / elapsed:,.1f} MB/s": (
                self.network_seconds,
                self.blocked_by_network_seconds,
            ),
            "device-bound: samples are copied from the device": (self.device_seconds, self.blocked_by_device_seconds),
        }
        # Blocked callers weigh more: they cost training time. An I/O thread that waits costs none.
        threads, callers = map(sum, zip(*waiting.values(), strict=True))
        if max(callers / BLOCKED_SHARE, threads / WAITING_SHARE) >= connected:
            what = max(waiting, key=lambda what: sum(waiting[what]))
            waited = min(1.0, max(waiting[what]) / connected)
            return f"{what}, and was waited for {waited:.0%} of the time; {cost}"
        return f"producer-bound: the sink waits for data, {sent / elapsed:,.0f} samples/s; {cost}"

    @property
    def blocked_too_long(self) -> bool:
        """Whether ``send`` was blocked for more than a third of the connected time, in this run."""
        return self._blocked_seconds_this_run > WARN_BLOCKED_SHARE * self.connected_seconds > 0

    @property
    def _blocked_seconds_this_run(self) -> float:
        """Like ``blocked_seconds``, but for this run only."""
        return self.blocked_by_learner_seconds + self.blocked_by_network_seconds + self.blocked_by_device_seconds

    def since(self, before: SinkStats) -> SinkStats:
        """Return what happened since ``before``, an earlier result of `EchoSink.stats`.

        Samples in flight, latencies, rates, a lost connection and ``peers`` are those of now.
        """
        as_now = (
            "in_flight",
            "peers",
            "ack_p50_seconds",
            "ack_p99_seconds",
            "sent_per_second",
            "acked_per_second",
            "disconnected_seconds",
            "reconnect_tries",
        )
        names = [field.name for field in dataclasses.fields(self) if field.name not in as_now]
        return dataclasses.replace(self, **{name: getattr(self, name) - getattr(before, name) for name in names})

    def as_dict(self, prefix: str = "") -> dict[str, Any]:
        """Return all numbers by name, for Lightning's ``self.log_dict``, TensorBoard or W&B.

        With several learners, the numbers of each one have names such as ``peer0/in_flight``.

        Args:
            prefix: goes before each name, for example ``"echo/"``.
        """
        numbers = {f"{prefix}{name}": value for name, value in vars(self).items() if name != "peers"}
        for index, peer in enumerate(self.peers if len(self.peers) > 1 else ()):
            for name, value in vars(peer).items():
                if name != "peer":
                    numbers[f"{prefix}peer{index}/{name}"] = value
        return numbers


# The fields that `EchoSink.state_dict` saves.
SAVED_FIELDS = [field.name for field in dataclasses.fields(SinkStats) if field.compare]
