"""What a connection that has ended leaves behind: rows that its server may not have."""

from __future__ import annotations

from echo_torch.ring.ring import Ring


class Remains:
    """Rows of ``ring`` that another server can be given: those kept after their acks, and those un-acked.

    Args:
        ring: of a connection that has ended.
        sent: the row after the last one that was accepted.
        there: the row after the last one whose bytes are there; those after it, a device had not copied yet.
    """

    def __init__(self, ring: Ring, sent: int, there: int) -> None:
        self._ring = ring
        self._sent = sent
        self._acked = min(ring.acked, sent)
        self._first = self._next = min(ring.released, sent)
        self._end = max(self._first, there)

    @property
    def left(self) -> int:
        """Rows that are still to be passed on."""
        return self._end - self._next

    @property
    def passed_on(self) -> int:
        """Rows that were."""
        return self._next - self._first

    @property
    def unacked(self) -> int:
        """Rows that nobody acked or was given."""
        return self._sent - max(self._next, self._acked)

    @property
    def stuck(self) -> int:
        """Of those, the ones that nobody can be given, since their bytes are not there."""
        return self._sent - max(self._end, self._acked)

    def view(self) -> memoryview:
        """The bytes of the next rows, of as many as lie together."""
        return self._ring.view(self._next, self._end)

    def pass_on(self, rows: int) -> None:
        """So many of them are somebody else's now."""
        self._next += rows
