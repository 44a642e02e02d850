"""Where the time of a connection goes, and how long acks take.

* `Times` is a value: a snapshot that can be added to others and sent to another process.
* `LatencyHistogram` is updated while rows are written and acked. Its caller holds the I/O lock.
* The latency of every row is too expensive to measure. The histogram samples: it takes the time of at most one write
  per millisecond.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

# What rows wait for: the learner, which does not read or does not ack; the network; a copy from a device; or no rows
# wait. These index the tuples of seconds in `Times`.
LEARNER, NETWORK, DEVICE, NOTHING = range(4)

# The upper ends of the histogram's buckets: the first, in seconds, and the logarithm of the factor from each to the
# next. So a latency is known to within a fifth.
_LOG_GROWTH = math.log(1.2)
_FIRST_BUCKET_S = 1e-6
_BUCKETS = 140  # up to a day
# How many writes can await their ack in the histogram, and the seconds between two of them. Measuring every row would
# cost more than a hundredth of sending.
_MAX_WRITE_TIMES = 64
_WRITE_TIME_INTERVAL_S = 0.001


# The format of `Times.to_bytes`: all seconds, then the counts of the histogram.
_TIMES_STRUCT = struct.Struct(f"=11d{_BUCKETS}q")
TIMES_BYTES = _TIMES_STRUCT.size

# Seconds for LEARNER, NETWORK, DEVICE and NOTHING.
_ByCause = tuple[float, float, float, float]


class Times(NamedTuple):
    """Where the time of one connection went, in seconds; or the sums over several connections."""

    connected: float = 0.0
    """How long the connection was open, until now or until it ended; 0 if nothing was sent."""
    checking: float = 0.0
    """How long callers compared batches with the example."""
    sending: float = 0.0
    """How long callers were in ``send``, without checking."""
    blocked: _ByCause = (0.0, 0.0, 0.0, 0.0)
    """How long callers waited for room in the buffer, by cause; part of ``sending``."""
    waiting: _ByCause = (0.0, 0.0, 0.0, 0.0)
    """How long the I/O thread waited, by what its rows waited for."""
    latencies: tuple[int, ...] = ()
    """How many of the measured acks fell into each bucket of the histogram; for `quantile`."""

    def plus(self, other: Times) -> Times:
        """Return the sums of both."""
        return Times._make(map(_sum, self, other))

    def to_bytes(self) -> bytes:
        """Pack into ``TIMES_BYTES`` bytes, for another process."""
        latencies = self.latencies or (0,) * _BUCKETS
        return _TIMES_STRUCT.pack(self.connected, self.checking, self.sending, *self.blocked, *self.waiting, *latencies)

    @classmethod
    def from_bytes(cls, packed: bytes | memoryview | bytearray) -> Times:
        """Unpack what `to_bytes` returned."""
        connected, checking, sending, *numbers = _TIMES_STRUCT.unpack(packed)
        causes = tuple(numbers[:4]), tuple(numbers[4:8])
        return cls(connected, checking, sending, *causes, tuple(numbers[8:]))


def _sum(one: Any, other: Any) -> Any:
    """Add two fields of `Times`; the shorter tuple counts as filled up with zeros."""
    if isinstance(one, tuple):
        return tuple(map(sum, zip_longest(one, other, fillvalue=0)))
    return one + other


class LatencyHistogram:
    """How long acks took, from writing a row to reading its ack, for a sample of the rows.

    ``end`` counts rows, like ``ring.written`` and ``ring.acked``. ``now`` is the time of ``time.monotonic()``.
    """

    def __init__(self) -> None:
        # How many acks fell into each bucket.
        self.counts = [0] * _BUCKETS
        # The writes that await their ack, oldest first: (rows written by then, time).
        self._write_times: deque[tuple[int, float]] = deque()
        # Earlier writes than this are not measured.
        self._next_write_time = -math.inf

    def record_written(self, end: int, now: float) -> None:
        """Note that all rows up to ``end`` are written."""
        if now >= self._next_write_time and len(self._write_times) < _MAX_WRITE_TIMES:
            self._write_times.append((end, now))
            self._next_write_time = now + _WRITE_TIME_INTERVAL_S

    def record_acked(self, end: int, now: float) -> None:
        """Note that all rows up to ``end`` are acked."""
        write_times = self._write_times
        while write_times and write_times[0][0] <= end:
            self.counts[_bucket_of(now - write_times.popleft()[1])] += 1

    def forget_unacked(self) -> None:
        """Drop the writes that await their ack: call this on a new socket, where acks for the old one never come."""
        self._write_times.clear()


def _bucket_of(seconds: float) -> int:
    if seconds <= _FIRST_BUCKET_S:
        return 0
    return min(_BUCKETS - 1, math.ceil(math.log(seconds / _FIRST_BUCKET_S) / _LOG_GROWTH))


def quantile(counts: Sequence[int], share: float) -> float:
    """Return the latency that ``share`` of the counted acks did not exceed.

    Args:
        counts: the counts of a `LatencyHistogram`, or sums of several.
        share: for example 0.5 for the median.

    Returns:
        Seconds, at most a fifth too high; 0 if nothing was counted.
    """
    below, enough = 0, share * sum(counts)
    for number, count in enumerate(counts):
        below += count
        if count and below >= enough:
            return _FIRST_BUCKET_S * math.exp(number * _LOG_GROWTH)
    return 0.0
