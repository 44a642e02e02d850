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
_GROWTH = math.log(1.2)
_LEAST_S = 1e-6
_CLASSES = 140  # up to a day
# How many moments of writing are kept, and seconds between two: the latency of other rows is not known, for counting
# all of them would cost more than a hundredth of sending.
_MARKS = 64
_MARK_S = 0.001


# What `Times.pack` makes: all seconds, and the latencies.
_PACKED = struct.Struct(f"=11d{_CLASSES}q")
TIMES_BYTES = _PACKED.size

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

    def pack(self) -> bytes:
        """``TIMES_BYTES`` bytes, for another process."""
        latencies = self.latencies or (0,) * _CLASSES
        return _PACKED.pack(self.connected, self.checking, self.sending, *self.blocked, *self.waiting, *latencies)

    @classmethod
    def unpack(cls, packed: bytes | memoryview | bytearray) -> Times:
        """What was packed."""
        connected, checking, sending, *numbers = _PACKED.unpack(packed)
        causes = tuple(numbers[:4]), tuple(numbers[4:8])
        return cls(connected, checking, sending, *causes, tuple(numbers[8:]))


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(map(sum, zip_longest(one, other, fillvalue=0)))
    return one + other


class Latencies:
    """How long acks took, from when rows were written to when their acks were read; of some of them."""

    def __init__(self) -> None:
        self.counts = [0] * _CLASSES
        self._marks: deque[tuple[int, float]] = deque()
        self._next_mark = -math.inf

    def wrote(self, end: int, now: float) -> None:
        """Rows up to ``end`` are written."""
        if now >= self._next_mark and len(self._marks) < _MARKS:
            self._marks.append((end, now))
            self._next_mark = now + _MARK_S

    def acked(self, end: int, now: float) -> None:
        """Rows up to ``end`` are acked."""
        marks = self._marks
        while marks and marks[0][0] <= end:
            self.counts[_class_of(now - marks.popleft()[1])] += 1

    def begin_again(self) -> None:
        """Over another connection: what was written to the one before is not acked any more."""
        self._marks.clear()


def _class_of(seconds: float) -> int:
    if seconds <= _LEAST_S:
        return 0
    return min(_CLASSES - 1, math.ceil(math.log(seconds / _LEAST_S) / _GROWTH))


def quantile(counts: Sequence[int], share: float) -> float:
    """Seconds that ``share`` of what was counted took at the most, to within a fifth; 0 if nothing was counted."""
    below, enough = 0, share * sum(counts)
    for number, count in enumerate(counts):
        below += count
        if count and below >= enough:
            return _LEAST_S * math.exp(number * _GROWTH)
    return 0.0
