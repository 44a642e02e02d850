"""Rows that are sent once more: at the end of a connection, and to another server after it.

A server may discard the rows that it acked and still has in its queue when a connection ends, so what was sent last is
not safe. As many further rows as its queue has push them out of it, and what is lost then are repetitions.
"""

from __future__ import annotations

from echo_torch.ring.ring import Ring


class ResendTail:
    """The repetition of the ring's last ``ring.keep_acked`` rows, if it is ``enabled``."""

    def __init__(self, ring: Ring, enabled: bool) -> None:
        self._ring = ring
        self.enabled = enabled
        self.start_row: int | None = None
        """The row after the last one that is no repetition; None while there may be more of those."""
        self.end_row = 0
        """The row after the last one of all, once ``start_row`` is known."""

    def start(self) -> None:
        """Have the ring refuse all rows but these, and settle where they begin and end."""
        ring = self._ring
        ring.refuse_new_rows()
        with ring.packing_lock:
            if self.start_row is None:
                start_row = ring.packed
                self.end_row = start_row + (ring.keep_acked if self.enabled and start_row else 0)
                self.start_row = start_row

    @property
    def packed(self) -> int:
        """How many of them are packed."""
        return 0 if self.start_row is None else self._ring.packed - self.start_row

    def pack(self) -> int:
        """Pack as many of them as there is room for, in cycles if there were fewer rows; gives how many are left.

        To be called when all rows before them are acked: so there is always room for one more soon.

        Raises:
            RuntimeError: a copy failed, as `Ring.clear_uncommitted_copy` says.
        """
        ring = self._ring
        with ring.packing_lock:
            period = min(ring.keep_acked, self.start_row or 0)
            while ring.packed < self.end_row and ring.clear_uncommitted_copy():
                slot, rows = ring.next_free_run(self.end_row - ring.packed)
                if rows:
                    ring.repeat_rows(slot, rows, period)
                if not rows or not ring.commit(rows, resent=True):
                    break
            return self.end_row - ring.packed


class UndeliveredRows:
    """Rows of ``ring`` that another server can be given: those kept after their acks, and those un-acked.

    Args:
        ring: of a connection that has ended.
        sent: the row after the last one that was accepted.
        copied_end: the row after the last one whose bytes are there; those after it, a device had not copied yet.
    """

    def __init__(self, ring: Ring, sent: int, copied_end: int) -> None:
        self._ring = ring
        self._sent = sent
        self._acked = min(ring.acked, sent)
        self._first = self._next = min(ring.released, sent)
        self._end = max(self._first, copied_end)

    @property
    def remaining(self) -> int:
        """Rows that are still to be passed on."""
        return self._end - self._next

    @property
    def handed_over(self) -> int:
        """Rows that were."""
        return self._next - self._first

    @property
    def unacked(self) -> int:
        """Rows that nobody acked or was given."""
        return self._sent - max(self._next, self._acked)

    @property
    def unrecoverable(self) -> int:
        """Of those, the ones that nobody can be given, since their bytes are not there."""
        return self._sent - max(self._end, self._acked)

    def view(self) -> memoryview:
        """The bytes of the next rows, of as many as lie together."""
        return self._ring.view(self._next, self._end)

    def mark_handed_over(self, rows: int) -> None:
        """So many of them are somebody else's now."""
        self._next += rows
