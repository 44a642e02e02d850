"""`Watermark`: the highest step up to which everything is acked.

Threads send steps in any order, and acks count rows. Rows are acked in the order in which they were sent. When a step
is complete, the watermark notes how many rows have been sent in all. The step is acked once that many rows are acked.

A step holds the watermark down while it is being sent, while its rows are not acked, and after its `send` failed.
"""

from __future__ import annotations

import math
import threading
from collections import deque

# Most failed steps that are remembered one by one. If more fail, every step from the lowest failed one on counts as
# missing for good. This bounds the memory.
MAX_MISSING = 1000


class Watermark:
    """Tracks the steps of one process; a step is the number of a batch.

    Args:
        through: the first value; -1 if nothing is acked yet.
    """

    def __init__(self, through: int = -1) -> None:
        # Hold it to read or change anything here.
        self.lock = threading.RLock()
        # The highest acked step. The watermark is lower if a step below it is not acked.
        self._acked_through = through
        # The step that the next batch gets if the caller passes none.
        self._next = through + 1
        # Steps that are being sent now, with the number of threads that send each.
        self._in_progress: dict[int, int] = {}
        # Steps whose `send` failed, so that not all of their rows were sent.
        self._missing: set[int] = set()
        # From this step on, every step counts as missing.
        self._missing_from = math.inf
        # Steps that are sent and not known to be acked: (rows sent in all when it was complete, step).
        self._sent: deque[tuple[int, int]] = deque()

    def begin_step(self, step: int | None) -> int:
        """Note that ``step`` is being sent, and return it; None stands for the one after the highest."""
        with self.lock:
            if step is None:
                step = self._next
            if step >= self._next:
                self._next = step + 1
            if self._missing:
                self._missing.discard(step)
            self._in_progress[step] = self._in_progress.get(step, 0) + 1
            return step

    def finish_step(self, step: int, rows_sent: int, rows_acked: int) -> None:
        """Note that all rows of ``step`` are sent.

        Args:
            step: as `begin_step` returned it.
            rows_sent: rows sent in all, by now.
            rows_acked: rows acked in all, by now.
        """
        # First into `_sent`, then out of `_in_progress`: an interrupt in between leaves the watermark too low, never
        # too high.
        with self.lock:
            self._sent.append((rows_sent, step))
            self._leave_progress(step)
            self._advance(rows_acked)

    def fail_step(self, step: int) -> None:
        """Note that not all rows of ``step`` were sent; it holds the watermark down until it begins again."""
        with self.lock:
            if len(self._missing) >= MAX_MISSING and step not in self._missing:
                self._missing_from = min(self._missing_from, *self._missing)
                self._missing.clear()
            if step < self._missing_from:
                self._missing.add(step)
            self._leave_progress(step)

    def acked_through(self, rows_acked: int) -> int:
        """Return the watermark, given how many rows are acked in all."""
        with self.lock:
            self._advance(rows_acked)
            unsure = (*(step for _, step in self._sent), *self._in_progress, *self._missing, self._missing_from)
            return int(min(self._acked_through, min(unsure) - 1))

    def _leave_progress(self, step: int) -> None:
        others = self._in_progress.pop(step) - 1
        if others:
            self._in_progress[step] = others

    def _advance(self, rows_acked: int) -> None:
        while self._sent and self._sent[0][0] <= rows_acked:
            step = self._sent.popleft()[1]
            if step > self._acked_through:
                self._acked_through = step
