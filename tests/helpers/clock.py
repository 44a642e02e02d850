"""A clock that tests move by hand."""

from __future__ import annotations


class Clock:
    """Stands still until `advance`. Replaces the module ``time`` where only ``monotonic`` is used."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
