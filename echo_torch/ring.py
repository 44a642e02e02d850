"""A fixed number of rows, the five counters that say where each row is, and the callers who wait for them.

A sample is one row of ``row_bytes`` bytes, and its bytes exist once: from packing until the row is released. So the
ring is the staging area, the backpressure, the bound on memory and the retransmission buffer, all at once::

    released <= acked <= written <= packed <= reserved <= released + capacity      released = max(0, acked - replay)

* The counters count rows since the ring was made and only grow; `slot` says where row ``i`` lies.
* The buffer is cut into chunks, and a chunk of rows goes to the memory that was released last: the caches still hold
  it, and no more of the buffer is touched than is needed at a time. Going round through all of a large one instead
  made every copy into it and out of it miss them.
* Callers move ``reserved`` and ``packed``, in turns (`turn`). Whoever holds the connection's I/O lock moves
  ``written`` and ``acked``. Nobody else writes a counter, so none needs a lock to be read.
* An interrupt (Ctrl-C) can strike the main thread after any call. Hence a packer writes into rows that are not
  counted yet and then counts them by plain assignments, which nothing can come between: a packing that was broken off
  leaves no trace and no hole. That is also why packers take turns: a hole between two runs of rows would have to be
  skipped by writing, acking and replaying. The turn is held for as long as one memcpy into the ring and never while
  waiting.
* Who waits, waits for ``acked`` to reach a number, parked on a lock of its own in C code. A wake-up looks at the
  counters and not at what changed, so one that an interrupt broke off is made good by the next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from .deadline import bounded_wait

# Small enough for what is in use to stay in the caches, large enough that runs of rows are not cut up for nothing.
CHUNK_BYTES = 2 * 1024 * 1024

Fill = Callable[[int, int, int], None]
"""``fill(slot, first, rows)`` packs a batch's rows from ``first`` on into the ring's from ``slot`` on."""


class Waiter(NamedTuple):
    """One caller's wait for ``acked`` to reach ``threshold``."""

    threshold: int
    gate: threading.Lock
    """Held from the start, released to wake the waiter."""

    def park(self, seconds: float) -> None:
        """Wait in C code to be woken; ``seconds`` may be infinite. May return early: look and park again."""
        self.gate.acquire(timeout=bounded_wait(seconds))

    def open(self) -> None:
        with suppress(RuntimeError):  # open already
            self.gate.release()

    @property
    def opened(self) -> bool:
        return not self.gate.locked()


class Ring:
    """``capacity`` rows of ``row_bytes`` bytes each; see the module's rules.

    Args:
        buffer: writable, contiguous, ``capacity * row_bytes`` bytes.
        row_bytes: bytes of one sample's payload.
        replay: how many acked rows are kept, to be sent again by a new connection.
        chunk_bytes: most bytes of a chunk that has more than one row.
    """

    def __init__(self, buffer: memoryview, row_bytes: int, replay: int = 0, chunk_bytes: int = CHUNK_BYTES) -> None:
        if row_bytes < 1:
            raise ValueError(f"row_bytes: got {row_bytes}, expected at least 1")
        self.row_bytes = row_bytes
        self.capacity = buffer.nbytes // row_bytes
        self.replay = replay
        if self.capacity < replay + 1:
            raise ValueError(f"a ring of {buffer.nbytes} bytes has {self.capacity} rows, fewer than {replay + 1}")
        self.chunk_rows = max(1, min(self.capacity, chunk_bytes // row_bytes))
        self._whole_chunks = self.capacity // self.chunk_rows  # what is left makes one that is shorter, at the end
        # In which chunk of memory each chunk of a round's rows lies.
        self._places = list(range(self._whole_chunks + 1))
        self._placed = -1  # where the chunk begins that was placed last
        self._newest = self._unswapped = 0  # where the chunk ends that was released last, and the one to swap with next
        self.buffer = buffer.cast("B")
        self.turn = threading.RLock()
        self.room = self.capacity - replay
        """Most rows un-acked; the others are for those that are kept."""
        self.limit = self.room
        """Most rows un-acked for now; less than ``room`` while more would only be slower."""
        self.acked = 0
        self.written = 0
        self.packed = 0
        self.reserved = 0
        self.refusing = False
        self.stopped = False
        self._waiters: deque[Waiter] = deque()

    @property
    def released(self) -> int:
        return max(0, self.acked - self.replay)

    @property
    def unacked(self) -> int:
        """Rows that were packed and are not acked."""
        return self.packed - self.acked

    @property
    def waited_for(self) -> bool:
        """Whether anybody is parked."""
        return bool(self._waiters)

    def slot(self, row: int) -> int:
        """Where a row lies, in rows from the start of the buffer; for rows from ``released`` to ``reserved``."""
        chunk, rest = divmod(row % self.capacity, self.chunk_rows)
        return self._places[chunk] * self.chunk_rows + rest

    # Packing: by the caller who holds `turn`.

    def free_run(self, want: int) -> tuple[int, int]:
        """The slot and the length, at most ``want`` and maybe 0, of the free rows up to the end of the chunk."""
        place = self.reserved % self.capacity
        free = max(0, self.limit - self.reserved + self.acked)
        chunk, rest = divmod(place, self.chunk_rows)
        # Once per chunk: whoever asks again after a packing that was broken off shall find the same memory.
        if free and not rest and self._placed < self.reserved:
            self._placed = self.reserved
            self._place_chunk()
        left = self.chunk_rows - rest if chunk < self._whole_chunks else self.capacity - place
        return self._places[chunk] * self.chunk_rows + rest, min(want, free, left)

    def _place_chunk(self) -> None:
        """Have the chunk that begins at ``reserved`` swap memory with the one released last that has not swapped yet.

        Which one that is only matters for speed: both hold no row that is packed and not released.
        """
        released = self.released
        newest = released - released % self.capacity % self.chunk_rows
        if newest > self._newest:
            self._newest = self._unswapped = newest
        last_row = self._unswapped - 1
        there, rest = divmod(last_row % self.capacity, self.chunk_rows)
        here, start = self.reserved % self.capacity // self.chunk_rows, last_row - rest
        if start < 0 or start + self.capacity <= self.reserved or max(here, there) >= self._whole_chunks:
            return  # there is none, or it is in use again, or one of the two is the short one
        self._unswapped = start
        places = self._places
        # Nothing comes between the two assignments of the next line: see the module's rules.
        places[here], places[there] = places[there], places[here]

    def commit(self, rows: int, last: bool = False) -> bool:
        """Count the next ``rows`` rows, which the caller has filled, as packed; False if the ring accepts none now.

        ``last`` rows are accepted by a ring that refuses others.
        """
        if self.stopped or (self.refusing and not last):
            return False
        end = self.packed + rows
        self.reserved = end
        self.packed = end
        return True

    def repeat(self, slot: int, rows: int, period: int) -> None:
        """Fill the next free rows, from ``slot`` on, each with the row ``period`` before it, which is not released."""
        size = self.row_bytes
        for number in range(rows):
            target, source = slot + number, self.slot(self.reserved + number - period)
            self.buffer[target * size : (target + 1) * size] = self.buffer[source * size : (source + 1) * size]

    # Writing and acking: by the holder of the I/O lock.

    def written_view(self, skip: int, limit: int, max_bytes: int) -> memoryview:
        """The next bytes to write: rows from ``written`` to ``limit``, less ``skip`` bytes, up to the chunk's end."""
        place = self.written % self.capacity
        left = min(self.chunk_rows - place % self.chunk_rows, self.capacity - place)
        rows = min(limit - self.written, left)
        start = self.slot(place) * self.row_bytes
        return self.buffer[start + skip : min(start + rows * self.row_bytes, start + skip + max_bytes)]

    # Waiting: by anybody.

    def rows_free_at(self, rows: int) -> int:
        """The value of ``acked`` at which ``rows`` rows are free, as things stand now."""
        return max(0, self.reserved + rows - self.limit)

    def enlist(self, threshold: int) -> Waiter:
        """Announce a wait for ``acked`` to reach ``threshold``; look at ``acked`` once more before parking on it."""
        waiter = Waiter(threshold, threading.Lock())
        waiter.gate.acquire()
        self._waiters.append(waiter)
        return waiter

    def forget(self, waiter: Waiter) -> None:
        """Take the announcement back. One that stays behind costs a wake-up too many, never one too few."""
        with suppress(ValueError):  # forgotten already
            self._waiters.remove(waiter)

    def wake(self, everybody: bool = False) -> bool:
        """Wake all whose wait is over, or everybody; gives whether that was anybody."""
        woken = False
        for waiter in list(self._waiters):
            if everybody or self.stopped or waiter.threshold <= self.acked:
                waiter.open()
                self.forget(waiter)
                woken = True
        return woken

    def wake_one(self) -> None:
        """Wake somebody, if anybody waits, to look after the others."""
        for waiter in list(self._waiters)[:1]:
            waiter.open()

    def refuse(self) -> None:
        """Accept no more rows, and wake everybody to see it. What is packed is still delivered."""
        with self.turn:
            self.refusing = True
        self.wake(everybody=True)

    def stop(self) -> None:
        """Nothing will move any more: accept no rows and wake everybody."""
        self.stopped = True
        self.wake()
