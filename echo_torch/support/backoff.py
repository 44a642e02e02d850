"""Pauses between tries that grow, and that differ between clients.

Clients that lose the same server at the same moment would otherwise all return to it at the same moment.
"""

from __future__ import annotations

import random


class Backoff:
    """Pauses that start at ``first`` seconds and double up to ``longest``; each is cut at random by up to a half."""

    def __init__(self, first: float, longest: float) -> None:
        # Seconds of the next pause, before its random cut.
        self._delay = first
        # Seconds at which the pauses stop growing.
        self._longest = longest

    def next_delay(self) -> float:
        """Return how many seconds to wait now, and double the next pause."""
        delay = self._delay
        self._delay = min(2 * delay, self._longest)
        return delay * random.uniform(0.5, 1.0)
