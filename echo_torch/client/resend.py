"""Rows that are sent once more: at the end of a connection, and to another server after it is lost.

A server may discard rows that it acked but still has in its queue when the connection ends. So the rows that were sent
last are not safe. They leave the queue once the server gets as many more rows as the queue holds. So `ClosingTail`
sends the last rows a second time. After that, the server can lose only repetitions.
"""

from __future__ import annotations

from echo_torch.ring.ring import Ring


class ClosingTail:
    """The closing tail: repeats the ring's last ``ring.keep_acked`` rows at close, if ``enabled``."""

    def __init__(self, ring: Ring, enabled: bool) -> None:
        # The ring whose last rows are repeated.
        self._ring = ring
        # Whether to repeat rows; if not, the tail is empty.
        self.enabled = enabled
        # The first row of the tail, which is the end of the callers' rows; None while callers may still add some.
        self.start_row: int | None = None
        # The end of the tail (exclusive); valid once ``start_row`` is set.
        self.end_row = 0

    def start(self) -> None:
        """Refuse callers' rows from now on, and fix where the tail starts and ends; idempotent."""
        ring = self._ring
        ring.refuse_new_rows()
        with ring.packing_lock:
            if self.start_row is None:
                start_row = ring.packed
                self.end_row = start_row + (ring.keep_acked if self.enabled and start_row else 0)
                self.start_row = start_row

    @property
    def packed(self) -> int:
        """Number of tail rows that are packed."""
        return 0 if self.start_row is None else self._ring.packed - self.start_row

    def pack(self) -> int:
        """Pack as many tail rows as there is room for; return how many are left.

        Call this only when all rows before the tail are acked. Then room for one more row always comes soon.

        Raises:
            RuntimeError: a device failed to copy rows (`Ring.try_clear_uncommitted_copy`).
        """
        ring = self._ring
        with ring.packing_lock:
            # If callers sent fewer rows than the tail has, the tail repeats them several times.
            period = min(ring.keep_acked, self.start_row or 0)
            # An interrupted caller may have left a copy that still writes into the next free rows. Pack nothing then.
            while ring.packed < self.end_row and ring.try_clear_uncommitted_copy():
                slot, rows = ring.next_free_run(self.end_row - ring.packed)
                if rows:
                    ring.repeat_rows(slot, rows, period)
                if not rows or not ring.commit(rows, resent=True):
                    break
            return self.end_row - ring.packed


class UndeliveredRows:
    """Rows of ``ring`` to hand over to another server: the un-acked ones, and the acked ones that the ring keeps.

    Args:
        ring: ring of a connection that has ended.
        sent: end (exclusive) of the rows that callers sent.
        copied_end: end (exclusive) of the rows whose bytes are in host memory. A device did not copy the rows after it.
    """

    def __init__(self, ring: Ring, sent: int, copied_end: int) -> None:
        # The ring that holds the bytes.
        self._ring = ring
        # End of the rows that callers sent.
        self._sent = sent
        # End of the rows that the lost server acked.
        self._acked = min(ring.acked, sent)
        # ``_first``: the first row to hand over. ``_next``: the next one; the rows before it are handed over already.
        self._first = self._next = min(ring.released, sent)
        # End of the rows that can be handed over.
        self._end = max(self._first, copied_end)

    @property
    def remaining(self) -> int:
        """Number of rows still to hand over."""
        return self._end - self._next

    @property
    def handed_over(self) -> int:
        """Number of rows handed over."""
        return self._next - self._first

    @property
    def unacked(self) -> int:
        """Number of rows that are neither acked nor handed over."""
        return self._sent - max(self._next, self._acked)

    @property
    def unrecoverable(self) -> int:
        """Number of un-acked rows that cannot be handed over, because a device did not copy their bytes in time."""
        return self._sent - max(self._end, self._acked)

    def view(self) -> memoryview:
        """Return the bytes of the next rows, as many as are contiguous in memory."""
        return self._ring.view(self._next, self._end)

    def mark_handed_over(self, rows: int) -> None:
        """Count the next ``rows`` rows as handed over."""
        self._next += rows
