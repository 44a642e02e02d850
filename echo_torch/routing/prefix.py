"""How many samples, counted from the first, are acked without a gap when they went to several learners.

Each learner acks its own samples in order, but the learners are not in step. So this module keeps snapshots of how many
samples each learner had been sent. The samples up to a snapshot are acked when each learner has acked that many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

# Most snapshots to keep. If there are more, a new one replaces the latest, so that the oldest still make progress.
MAX_SNAPSHOTS = 1024


class AckedPrefix:
    """The length of the acked prefix; only one thread at a time may call it."""

    def __init__(self) -> None:
        # For each snapshot, oldest first: samples sent to each learner, and samples sent in all.
        self._snapshots: deque[tuple[tuple[int, ...], int]] = deque()
        # Length of the prefix that is known to be acked.
        self._acked = 0

    def update(self, total: int, sent: Sequence[int], acked: Sequence[int]) -> int:
        """Take a snapshot and return the length of the acked prefix, as far as snapshots tell.

        Args:
            total: samples sent in all; samples that were handed over count once here and twice in ``sent``.
            sent: samples sent to each learner.
            acked: how many of those are acked, for each learner.
        """
        snapshots = self._snapshots
        if not snapshots or total > snapshots[-1][1]:
            if len(snapshots) >= MAX_SNAPSHOTS:
                snapshots.pop()
            snapshots.append((tuple(sent), total))
        while snapshots and all(map(int.__ge__, acked, snapshots[0][0])):
            self._acked = snapshots.popleft()[1]
        return self._acked
