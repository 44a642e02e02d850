"""How long to wait before the next try: longer each time, and not in step with others who lost the same server."""

from __future__ import annotations

import random


class Backoff:
    """Pauses of ``first`` seconds, doubled each time up to ``longest``, each shortened at random by up to a half."""

    def __init__(self, first: float, longest: float) -> None:
        self._delay = first
        self._longest = longest

    def next_delay(self) -> float:
        """Seconds to wait now."""
        delay = self._delay
        self._delay = min(2 * delay, self._longest)
        return delay * random.uniform(0.5, 1.0)
