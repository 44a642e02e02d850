"""Rows that are sent once more: at the end of a connection, and to another server after it.

A server may discard the rows that it acked and still has in its queue when a connection ends, so what was sent last is
not safe. As many further rows as its queue has push them out of it, and what is lost then are repetitions.
"""

from __future__ import annotations

from echo_torch.ring.ring import Ring


class Tail:
    """The repetition of the ring's last ``ring.replay`` rows, if it is ``wanted``."""

    def __init__(self, ring: Ring, wanted: bool) -> None:
        self._ring = ring
        self.wanted = wanted
        self.begins: int | None = None
        """The row after the last one that is no repetition; None while there may be more of those."""
        self.ends = 0
        """The row after the last one of all, once ``begins`` is known."""

    def fix(self) -> None:
        """Have the ring refuse all rows but these, and settle where they begin and end."""
        ring = self._ring
        ring.refuse()
        with ring.turn:
            if self.begins is None:
                begins = ring.packed
                self.ends = begins + (ring.replay if self.wanted and begins else 0)
                self.begins = begins

    @property
    def packed(self) -> int:
        """How many of them are packed."""
        return 0 if self.begins is None else self._ring.packed - self.begins

    def pack(self) -> int:
        """Pack as many of them as there is room for, in cycles if there were fewer rows; gives how many are left.

        To be called when all rows before them are acked: so there is always room for one more soon.

        Raises:
            RuntimeError: a copy failed, as `Ring.settled` says.
        """
        ring = self._ring
        with ring.turn:
            period = min(ring.replay, self.begins or 0)
            while ring.packed < self.ends and ring.settled():
                slot, rows = ring.free_run(self.ends - ring.packed)
                if rows:
                    ring.repeat(slot, rows, period)
                if not rows or not ring.commit(rows, last=True):
                    break
            return self.ends - ring.packed


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
