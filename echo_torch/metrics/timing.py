"""Where the time of a connection goes, and how long acks take; cheap enough to be always on.

Whoever adds to a number is the only one who does so at a time: the caller whose turn it is, or the holder of the I/O
lock. What is read meanwhile may be a moment old.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

LEARNER, NETWORK, DEVICE, NOTHING = range(4)
"""What holds rows up: acks that do not come, a socket that is full, a copy that is under way; or there are none."""

# Latencies are counted in classes, each by a fifth longer than the one before, from so many seconds on.
_LOG_GROWTH = math.log(1.2)
_FIRST_BUCKET_S = 1e-6
_BUCKETS = 140  # up to a day
# How many moments of writing are kept, and seconds between two: the latency of other rows is not known, for counting
# all of them would cost more than a hundredth of sending.
_MAX_WRITE_TIMES = 64
_WRITE_TIME_INTERVAL_S = 0.001


# What `Times.to_bytes` makes: all seconds, and the latencies.
_TIMES_STRUCT = struct.Struct(f"=11d{_BUCKETS}q")
TIMES_BYTES = _TIMES_STRUCT.size

_ByCause = tuple[float, float, float, float]


class Times(NamedTuple):
    """Seconds, since the connection was opened; or of several, added up."""

    connected: float = 0.0
    """Of these, 0 if nothing was sent."""
    checking: float = 0.0
    """That callers had batches compared with the example."""
    sending: float = 0.0
    """In ``send``, without checking."""
    blocked: _ByCause = (0.0, 0.0, 0.0, 0.0)
    """Of those, waiting for room: by what held it up."""
    waiting: _ByCause = (0.0, 0.0, 0.0, 0.0)
    """That the I/O thread waited: by what held rows up."""
    latencies: tuple[int, ...] = ()
    """How many acks took how long, by classes of `quantile`."""

    def plus(self, other: Times) -> Times:
        """Of both."""
        return Times._make(map(_sum, self, other))

    def to_bytes(self) -> bytes:
        """``TIMES_BYTES`` bytes, for another process."""
        latencies = self.latencies or (0,) * _BUCKETS
        return _TIMES_STRUCT.pack(self.connected, self.checking, self.sending, *self.blocked, *self.waiting, *latencies)

    @classmethod
    def from_bytes(cls, packed: bytes | memoryview | bytearray) -> Times:
        """What was packed."""
        connected, checking, sending, *numbers = _TIMES_STRUCT.unpack(packed)
        causes = tuple(numbers[:4]), tuple(numbers[4:8])
        return cls(connected, checking, sending, *causes, tuple(numbers[8:]))


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(map(sum, zip_longest(one, other, fillvalue=0)))
    return one + other


class LatencyHistogram:
    """How long acks took, from when rows were written to when their acks were read; of some of them."""

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS
        self._write_times: deque[tuple[int, float]] = deque()
        self._next_write_time = -math.inf

    def record_written(self, end: int, now: float) -> None:
        """Rows up to ``end`` are written."""
        if now >= self._next_write_time and len(self._write_times) < _MAX_WRITE_TIMES:
            self._write_times.append((end, now))
            self._next_write_time = now + _WRITE_TIME_INTERVAL_S

    def record_acked(self, end: int, now: float) -> None:
        """Rows up to ``end`` are acked."""
        write_times = self._write_times
        while write_times and write_times[0][0] <= end:
            self.counts[_bucket_of(now - write_times.popleft()[1])] += 1

    def forget_unacked(self) -> None:
        """Over another connection: what was written to the one before is not acked any more."""
        self._write_times.clear()


def _bucket_of(seconds: float) -> int:
    if seconds <= _FIRST_BUCKET_S:
        return 0
    return min(_BUCKETS - 1, math.ceil(math.log(seconds / _FIRST_BUCKET_S) / _LOG_GROWTH))


def quantile(counts: Sequence[int], share: float) -> float:
    """Seconds that ``share`` of what was counted took at the most, to within a fifth; 0 if nothing was counted."""
    below, enough = 0, share * sum(counts)
    for number, count in enumerate(counts):
        below += count
        if count and below >= enough:
            return _FIRST_BUCKET_S * math.exp(number * _LOG_GROWTH)
    return 0.0
