"""Up to which step everything is acked, while steps are sent by several threads and acked as rows."""

from __future__ import annotations

import math
import threading
from collections import deque

# How many steps are remembered one by one whose `send` raised; with more, all from the lowest of them on count as
# missing for good.
MAX_MISSING = 1000


class Watermark:
    """The highest step up to which all is acked.

    A step is the number of a batch. What belongs to it is acked when as many rows are as had been sent by then, since
    rows are acked in the order in which they were sent.

    Args:
        through: where it stands at first; -1 for nothing.
    """

    def __init__(self, through: int = -1) -> None:
        self.lock = threading.RLock()
        self._acked_through = through
        self._next = through + 1
        self._in_progress: dict[int, int] = {}  # being sent just now, and by how many
        self._missing: set[int] = set()  # not sent in full, since `send` raised
        self._missing_from = math.inf  # and of those from here on it is not known which
        self._sent: deque[tuple[int, int]] = deque()  # (rows sent by then, step), in full and not known to be acked

    def begin_step(self, step: int | None) -> int:
        """Note that ``step``, or else the one after the highest, is being sent; gives it."""
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
        """Note that it was sent in full, and how many rows were sent and acked in all by now."""
        with self.lock:
            self._sent.append((rows_sent, step))
            self._leave_progress(step)
            self._advance(rows_acked)

    def fail_step(self, step: int) -> None:
        """Note that it was not: nothing from there on counts as acked until the same step begins again."""
        with self.lock:
            if len(self._missing) >= MAX_MISSING and step not in self._missing:
                self._missing_from = min(self._missing_from, *self._missing)
                self._missing.clear()
            if step < self._missing_from:
                self._missing.add(step)
            self._leave_progress(step)

    def acked_through(self, rows_acked: int) -> int:
        """The watermark, now that so many rows are acked."""
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
