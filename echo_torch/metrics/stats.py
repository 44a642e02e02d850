"""What became of the samples: as a client counts them, and as `EchoSink.stats` tells it."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, NamedTuple


class Counts(NamedTuple):
    """What became of the samples of one client, in samples."""

    sent: int = 0
    """Accepted by ``send``; those sent again do not count."""
    unacked: int = 0
    """Of those, not acknowledged as far as is known."""
    reconnects: int = 0
    """How often a lost connection was opened again."""
    resent: int = 0
    """Sent again then."""
    maybe_duplicated: int = 0
    """How many the server may have stored once too often, at the most: those sent again, and ``close``'s tail."""
    maybe_lost: int = 0
    """How many the server may not have stored, at the most; 0 while there is a connection, or hope for one."""


class PeerCounts(NamedTuple):
    """What became of the samples that one learner was sent, in samples."""

    sent: int = 0
    unacked: int = 0
    reconnects: int = 0
    resent: int = 0
    lost: int = 0
    """How many connections to it were lost for good."""

    @classmethod
    def from_counts(cls, counts: Counts, lost: bool) -> PeerCounts:
        return cls(counts.sent, counts.unacked, counts.reconnects, counts.resent, int(lost))

    def plus(self, other: PeerCounts) -> PeerCounts:
        return PeerCounts._make(map(operator.add, self, other))


@dataclasses.dataclass(frozen=True)
class PeerStats:
    """What became of the samples that one learner was sent, by this process and its DataLoader workers."""

    peer: str
    """The learner, as ``host:port``."""
    samples_sent: int
    samples_acked: int
    in_flight: int
    """Not acked; those of a connection that was lost may be with other learners since."""
    reconnects: int
    """How often a lost connection to it was opened again."""
    resent: int
    """Samples that were sent to it again then."""
    lost: int
    """How many connections to it were lost for good: one in each process at the most."""


# A verdict is against whoever keeps `send` waiting for this share of the time, or the connection for that.
BLOCKED_SHARE = 0.05
WAITING_SHARE = 0.5
# It is a warning if `send` was blocked for more than this share.
WARN_BLOCKED_SHARE = 1 / 3


def _uncompared_field(default: Any = 0.0) -> Any:
    """A number that is not among those that are compared and saved."""
    return dataclasses.field(default=default, compare=False)


@dataclasses.dataclass(frozen=True)
class SinkStats:
    """What a sink did in this process and its DataLoader workers: samples and payload bytes since it connected.

    Two of them are equal if they count the same, whatever the times.
    """

    samples_sent: int
    """Samples that ``send`` accepted."""
    bytes_sent: int
    samples_acked: int
    """Samples that the server acknowledged."""
    bytes_acked: int
    in_flight: int
    """Samples accepted and not acknowledged; after a connection was lost, those it took with it, maybe stored."""
    dropped: int
    """Samples given to ``send`` after the learner was gone, with ``on_error="warn"``, and those that a `SinkCallback`
    skipped for want of room."""
    blocked_seconds: float
    """Seconds that ``send`` waited for room."""
    reconnects: int = 0
    """How often a lost connection was opened again."""
    resent: int = 0
    """Samples that were sent again then."""
    maybe_duplicated: int = 0
    """How many more samples than were sent the learner may have got, at the most: those sent again, and the tail that
    `close` sends."""
    maybe_lost: int = 0
    """How many samples the learner may never get, at the most, now that the connection has ended: the un-acked ones,
    and the last ``resend_acked`` of the others unless `close` sent them again. 0 before that."""

    elapsed_seconds: float = _uncompared_field()
    """Seconds since this process first used the sink, or made it."""
    connected_seconds: float = _uncompared_field()
    """Seconds for which there was a connection, in each process that sent samples: what the next ones are a part of."""
    check_seconds: float = _uncompared_field()
    """Seconds that callers of ``send`` had batches compared with the example."""
    pack_seconds: float = _uncompared_field()
    """Seconds that they copied samples into the buffer, and wrote those that could be written at once."""
    blocked_by_learner_seconds: float = _uncompared_field()
    """Of ``blocked_seconds``, those in which the window was full: acks did not come."""
    blocked_by_network_seconds: float = _uncompared_field()
    """In which the socket was full."""
    blocked_by_device_seconds: float = _uncompared_field()
    """In which copies from a device were under way."""
    learner_seconds: float = _uncompared_field()
    """Seconds for which connections waited for acks with samples left to write, or with `wait` called."""
    network_seconds: float = _uncompared_field()
    """Seconds for which they waited for the socket to take more."""
    device_seconds: float = _uncompared_field()
    """Seconds for which they waited for copies from a device."""
    ack_p50_seconds: float = _uncompared_field()
    """Seconds from when samples were written to their acks: of half of those that were looked at."""
    ack_p99_seconds: float = _uncompared_field()
    """The same of 99 in 100, to within a fifth."""
    sent_per_second: float = _uncompared_field()
    """Samples accepted per second, over the last seconds in which `EchoSink.stats` or `EchoSink.wait` was called."""
    acked_per_second: float = _uncompared_field()
    """Samples acknowledged per second, over the same time."""
    loaded_sent: int = _uncompared_field(0)
    """How many of ``samples_sent`` are of runs before, and were added by `EchoSink.load_state_dict`."""
    loaded_acked: int = _uncompared_field(0)
    """The same of ``samples_acked``."""
    peers: tuple[PeerStats, ...] = _uncompared_field(())
    """What each learner was sent."""

    @property
    def bottleneck(self) -> str:
        """What holds things up, in words: the learner, the network, the device, or the training, and by how much.

        Of this run, without what `EchoSink.load_state_dict` added.
        """
        elapsed, connected = self.elapsed_seconds, self.connected_seconds
        sent, acked = self.samples_sent - self.loaded_sent, self.samples_acked - self.loaded_acked
        if elapsed <= 0 or connected <= 0 or not (sent or self.in_flight):
            return "idle: nothing was sent"
        share = (self.check_seconds + self.pack_seconds + self._blocked) / connected
        cost = f"send took {share:.1%} of the time" if share <= 1 else f"send took the time of {share:.1f} threads"
        megabytes = acked * self.bytes_acked / max(1, self.samples_acked) / 1e6
        waiting = {
            f"learner-bound: the server acks {acked / elapsed:,.0f} samples/s": (
                self.learner_seconds,
                self.blocked_by_learner_seconds,
            ),
            f"network-bound: the connection takes {megabytes / elapsed:,.1f} MB/s": (
                self.network_seconds,
                self.blocked_by_network_seconds,
            ),
            "device-bound: samples are copied from the device": (self.device_seconds, self.blocked_by_device_seconds),
        }
        threads, callers = map(sum, zip(*waiting.values(), strict=True))
        if max(callers / BLOCKED_SHARE, threads / WAITING_SHARE) >= connected:
            what = max(waiting, key=lambda what: sum(waiting[what]))
            waited = min(1.0, max(waiting[what]) / connected)
            return f"{what}, and was waited for {waited:.0%} of the time; {cost}"
        return f"producer-bound: the sink waits for data, {sent / elapsed:,.0f} samples/s; {cost}"

    @property
    def blocked_too_long(self) -> bool:
        """Whether `send` was blocked for more than a third of the time, in this run."""
        return self._blocked > WARN_BLOCKED_SHARE * self.connected_seconds > 0

    @property
    def _blocked(self) -> float:
        """As ``blocked_seconds``, of this run."""
        return self.blocked_by_learner_seconds + self.blocked_by_network_seconds + self.blocked_by_device_seconds

    def since(self, before: SinkStats) -> SinkStats:
        """What came after ``before`` was told; what is in flight, latencies and rates as they are now."""
        as_now = ("in_flight", "peers", "ack_p50_seconds", "ack_p99_seconds", "sent_per_second", "acked_per_second")
        names = [field.name for field in dataclasses.fields(self) if field.name not in as_now]
        return dataclasses.replace(self, **{name: getattr(self, name) - getattr(before, name) for name in names})

    def as_dict(self, prefix: str = "") -> dict[str, Any]:
        """All numbers by ``prefix`` and name: for ``self.log_dict`` of Lightning, TensorBoard, or W&B.

        Of several learners, those of each have names such as ``peer0/in_flight``.
        """
        numbers = {f"{prefix}{name}": value for name, value in vars(self).items() if name != "peers"}
        for index, peer in enumerate(self.peers if len(self.peers) > 1 else ()):
            for name, value in vars(peer).items():
                if name != "peer":
                    numbers[f"{prefix}peer{index}/{name}"] = value
        return numbers


SAVED_FIELDS = [field.name for field in dataclasses.fields(SinkStats) if field.compare]
"""Those that are saved."""
