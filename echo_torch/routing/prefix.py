"""How many of the first samples are all acked, when they went to several learners.

Each acks its own in order, but not all of them together. So it is remembered how much each had been sent by some
moments; what was sent by then is acked when each has acked as much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

# Most moments that are remembered; the latest makes way for another then.
MAX_SNAPSHOTS = 1024


class AckedPrefix:
    """Of what was sent; to be used by one thread at a time."""

    def __init__(self) -> None:
        self._snapshots: deque[tuple[tuple[int, ...], int]] = deque()
        self._acked = 0

    def update(self, total: int, sent: Sequence[int], acked: Sequence[int]) -> int:
        """How many of the ``total`` samples, from the first on, are acked, as far as moments are remembered.

        Args:
            total: samples sent in all; some of them may be in ``sent`` twice.
            sent: how many each learner was sent.
            acked: how many of these are acked.
        """
        snapshots = self._snapshots
        if not snapshots or total > snapshots[-1][1]:
            if len(snapshots) >= MAX_SNAPSHOTS:
                snapshots.pop()
            snapshots.append((tuple(sent), total))
        while snapshots and all(map(int.__ge__, acked, snapshots[0][0])):
            self._acked = snapshots.popleft()[1]
        return self._acked
