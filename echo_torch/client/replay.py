"""The last rows once more, as the last thing that a connection does.

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
