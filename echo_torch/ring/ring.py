"""A fixed number of rows, the five counters that say where each row is, and the callers who wait for them.

A sample is one row of ``row_bytes`` bytes, and its bytes exist once: from packing until the row is released. So the
ring is the staging area, the backpressure, the bound on memory and the retransmission buffer, all at once::

    released <= acked <= written <= ready <= packed <= reserved <= released + capacity
    released = max(0, acked - keep_acked)

* The counters count rows since the ring was made and only grow; `slot` says where row ``i`` lies.
* The buffer is cut into chunks, and a chunk of rows goes to the memory that was released last: the caches still hold
  it, and no more of the buffer is touched than is needed at a time. Going round through all of a large one instead
  made every copy into it and out of it miss them.
* Callers move ``reserved`` and ``packed``, in turns (`packing_lock`). Whoever holds the connection's I/O lock moves
  ``written`` and ``acked``. Nobody else writes a counter, so none needs a lock to be read.
* An interrupt (Ctrl-C) can strike the main thread after any call. Hence a packer writes into rows that are not
  counted yet and then counts them by plain assignments, which nothing can come between: a packing that was broken off
  leaves no trace and no hole. That is also why packers take turns: a hole between two runs of rows would have to be
  skipped by writing, acking and replaying. The turn is held for as long as one memcpy into the ring and never while
  waiting.
* Rows may be counted as packed while a device still copies them here. ``ready`` is how far all copies are done, and
  nothing after that is written: it comes of a chain of runs of rows, which callers add to as they count the rows, and
  from which the holder of the I/O lock takes those away whose copies are done.
* Who waits, waits for ``acked`` to reach a number, parked on a lock of its own in C code. A wake-up looks at the
  counters and not at what changed, so one that an interrupt broke off is made good by the next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from echo_torch.support.deadline import clamp_timeout
from echo_torch.support.validation import check_count

# Small enough for what is in use to stay in the caches, large enough that runs of rows are not cut up for nothing.
CHUNK_BYTES = 2 * 1024 * 1024
# The server's default ``producer_queue_size``: how many samples that it acked it may discard when a connection ends.
SERVER_QUEUE_SAMPLES = 8


class PendingCopy(Protocol):
    """Bytes on their way into rows, which somebody else copies: a device."""

    def done(self) -> bool:
        """Whether all are there, without waiting; asked by the holder of the I/O lock that looks after such copies.

        Raises:
            RuntimeError: they never will be.
        """

    def has_stopped(self) -> bool:
        """Whether nothing is copied any more, without waiting; asked by callers."""

    def abandon(self) -> None:
        """Nobody will ask again: let no memory go before it is over."""


Filler = Callable[[int, int, int], "PendingCopy | None"]
"""``fill(slot, first, rows)`` packs a batch's rows from ``first`` on into the ring's from ``slot`` on.

Gives the copy that these rows wait for, if it only began one, and has put that into `Ring.uncommitted_copy` before it did.
"""


class _Run:
    """Rows from ``first`` up to the next run's, which wait for ``copy``, and those after them that wait for nothing."""

    __slots__ = ("copy", "first", "next", "started_at")

    def __init__(self, first: int, copy: PendingCopy | None) -> None:
        self.first = first
        self.copy = copy
        self.started_at = time.monotonic()
        self.next: _Run | None = None


class Waiter(NamedTuple):
    """One caller's wait for ``acked`` to reach ``threshold``."""

    threshold: int
    lock: threading.Lock
    """Held from the start, released to wake the waiter."""

    def wait(self, seconds: float) -> None:
        """Wait in C code to be woken; ``seconds`` may be infinite. May return early: look and park again."""
        self.lock.acquire(timeout=clamp_timeout(seconds))

    def wake(self) -> None:
        with suppress(RuntimeError):  # open already
            self.lock.release()

    @property
    def is_woken(self) -> bool:
        return not self.lock.locked()


class Ring:
    """``capacity`` rows of ``row_bytes`` bytes each; see the module's rules.

    Args:
        buffer: writable, contiguous, ``capacity * row_bytes`` bytes.
        row_bytes: bytes of one sample's payload.
        keep_acked: how many acked rows are kept, to be sent again by a new connection.
        chunk_bytes: most bytes of a chunk that has more than one row.
    """

    def __init__(self, buffer: memoryview, row_bytes: int, keep_acked: int = 0, chunk_bytes: int = CHUNK_BYTES) -> None:
        if row_bytes < 1:
            raise ValueError(f"row_bytes: got {row_bytes}, expected at least 1")
        self.row_bytes = row_bytes
        self.capacity = buffer.nbytes // row_bytes
        self.keep_acked = keep_acked
        if self.capacity < keep_acked + 1:
            raise ValueError(f"a ring of {buffer.nbytes} bytes has {self.capacity} rows, fewer than {keep_acked + 1}")
        self.chunk_rows = max(1, min(self.capacity, chunk_bytes // row_bytes))
        self._whole_chunks = self.capacity // self.chunk_rows  # what is left makes one that is shorter, at the end
        # In which chunk of memory each chunk of a round's rows lies.
        self._chunk_map = list(range(self._whole_chunks + 1))
        self._last_placed = -1  # where the chunk begins that was placed last
        self._released_end = self._next_swap = (
            0  # where the chunk ends that was released last, and the one to swap with next
        )
        self.buffer = buffer.cast("B")
        self.columns: Any = None
        """What a packer made of ``buffer``, to be forgotten with it."""
        self.pinned_rows: Any = None
        """What a stager did, if it had the ring moved into it."""
        self.packing_lock = threading.RLock()
        self.max_unacked = self.capacity - keep_acked
        """Most rows un-acked; the others are for those that are kept."""
        self.soft_limit = self.max_unacked
        """Most rows un-acked for now; less than ``max_unacked`` while more would only be slower."""
        self.acked = 0
        self.written = 0
        self.packed = 0
        self.reserved = 0
        self.refuses_new_rows = False
        self.stopped = False
        self.uncommitted_copy: PendingCopy | None = None
        """A copy into rows that are not counted; outside of `packing_lock`, one whose caller was interrupted before that."""
        self.ready_when_abandoned: int | None = None
        """How far all rows were there when it was abandoned."""
        self._last_done_run = self._last_run = _Run(0, None)  # the last run whose copy is done, and the last of all
        self._waiters: deque[Waiter] = deque()

    @property
    def ready(self) -> int:
        """Rows up to here are packed, and their bytes are there, as far as was looked."""
        packed = self.packed  # before it is asked which run is next, which may be packed after that
        run = self._last_done_run.next
        return packed if run is None else min(packed, run.first)

    @property
    def copying_since(self) -> float | None:
        """When the copy began that ``ready`` waits for; None if it waits for none."""
        run = self._last_done_run.next
        return None if run is None else run.started_at

    @property
    def released(self) -> int:
        return max(0, self.acked - self.keep_acked)

    @property
    def unacked(self) -> int:
        """Rows that were packed and are not acked."""
        return self.packed - self.acked

    @property
    def has_waiters(self) -> bool:
        """Whether anybody is parked."""
        return bool(self._waiters)

    def slot(self, row: int) -> int:
        """Where a row lies, in rows from the start of the buffer; for rows from ``released`` to ``reserved``."""
        chunk, rest = divmod(row % self.capacity, self.chunk_rows)
        return self._chunk_map[chunk] * self.chunk_rows + rest

    def view(self, row: int, end: int) -> memoryview:
        """The bytes of the rows from ``row`` up to ``end``, or up to the chunk's end."""
        place = row % self.capacity
        left = min(self.chunk_rows - place % self.chunk_rows, self.capacity - place)
        start = self.slot(row) * self.row_bytes
        return self.buffer[start : start + min(end - row, left) * self.row_bytes]

    # Packing: by the caller who holds `packing_lock`.

    def next_free_run(self, want: int) -> tuple[int, int]:
        """The slot and the length, at most ``want`` and maybe 0, of the free rows up to the end of the chunk."""
        place = self.reserved % self.capacity
        free = max(0, self.soft_limit - self.reserved + self.acked)
        chunk, rest = divmod(place, self.chunk_rows)
        # Once per chunk: whoever asks again after a packing that was broken off shall find the same memory.
        if free and not rest and self._last_placed < self.reserved:
            self._last_placed = self.reserved
            self._swap_chunk()
        left = self.chunk_rows - rest if chunk < self._whole_chunks else self.capacity - place
        return self._chunk_map[chunk] * self.chunk_rows + rest, min(want, free, left)

    def _swap_chunk(self) -> None:
        """Have the chunk that begins at ``reserved`` swap memory with the one released last that has not swapped yet.

        Which one that is only matters for speed: both hold no row that is packed and not released.
        """
        released = self.released
        newest = released - released % self.capacity % self.chunk_rows
        if newest > self._released_end:
            self._released_end = self._next_swap = newest
        last_row = self._next_swap - 1
        there, rest = divmod(last_row % self.capacity, self.chunk_rows)
        here, start = self.reserved % self.capacity // self.chunk_rows, last_row - rest
        if start < 0 or start + self.capacity <= self.reserved or max(here, there) >= self._whole_chunks:
            return  # there is none, or it is in use again, or one of the two is the short one
        self._next_swap = start
        places = self._chunk_map
        # Nothing comes between the two assignments of the next line: see the module's rules.
        places[here], places[there] = places[there], places[here]

    def commit(self, rows: int, resent: bool = False, copy: PendingCopy | None = None) -> bool:
        """Count the next ``rows`` rows, which the caller has filled, as packed; False if the ring accepts none now.

        ``resent`` rows are accepted by a ring that refuses others. With a ``copy``, they are not ready before it is done.
        """
        run = None if copy is None else _Run(self.packed, copy)
        # Nothing comes between this and the end, but where it is of no account.
        if self.stopped or (self.refuses_new_rows and not resent):
            return False
        end = self.packed + rows
        if run is None:
            self.reserved = end
            self.packed = end
            return True
        latest = self._last_run
        # Nothing comes between the next lines: a row is counted if, and only if, its copy is in the chain.
        latest.next = run
        self._last_run = run
        self.uncommitted_copy = None
        self.reserved = end
        self.packed = end
        return True

    def repeat_rows(self, slot: int, rows: int, period: int) -> None:
        """Fill the next free rows, from ``slot`` on, each with the row ``period`` before it, which is not released."""
        size = self.row_bytes
        for number in range(rows):
            target, source = slot + number, self.slot(self.reserved + number - period)
            self.buffer[target * size : (target + 1) * size] = self.buffer[source * size : (source + 1) * size]

    def clear_uncommitted_copy(self) -> bool:
        """Whether the rows that are packed next are nobody's: who was interrupted may have left a copy under way.

        Raises:
            RuntimeError: that copy failed.
        """
        if self.uncommitted_copy is not None:
            if not self.uncommitted_copy.has_stopped():
                return False
            self.uncommitted_copy = None
        return True

    def move_to(self, buffer: memoryview, pinned_rows: Any) -> None:
        """Go on in other memory of the same size, in which all rows lie in order.

        With the turn and the I/O lock held, and only while no copies are under way. A chunk is all of the memory then:
        what a device copies here comes in runs that are as long as can be, and does not go through the caches.
        """
        size, target = self.row_bytes, buffer.cast("B")
        row = self.released
        while row < self.packed:
            place = row % self.capacity
            rows = min(self.chunk_rows - place % self.chunk_rows, self.capacity - place, self.packed - row)
            slot = self.slot(row)
            target[place * size : (place + rows) * size] = self.buffer[slot * size : (slot + rows) * size]
            row += rows
        places = [0, 1]
        # Nothing comes between the next lines.
        self.buffer = target
        self.columns = None
        self.pinned_rows = pinned_rows
        self.chunk_rows = self.capacity
        self._whole_chunks = 1
        self._chunk_map = places

    def free_buffer(self) -> None:
        """Give the memory back, when nothing is packed or written any more."""
        with self.packing_lock:
            if self.stopped:
                self.buffer, self.columns, self.pinned_rows = memoryview(b""), None, None

    def abandon_copies(self) -> None:
        """Nothing will be written any more: have all copies look after themselves."""
        self.ready_when_abandoned = self.ready
        copies, run = [self.uncommitted_copy], self._last_done_run.next
        while run is not None:
            copies.append(run.copy)
            run = run.next
        for copy in copies:
            if copy is not None:
                copy.abandon()
        self.uncommitted_copy, self._last_done_run = None, self._last_run
        self._last_run.copy = None

    # Writing and acking: by the holder of the I/O lock.

    def poll_copies(self) -> None:
        """Take note of copies that are done.

        Raises:
            RuntimeError: one never will be.
        """
        while (run := self._last_done_run.next) is not None:
            if run.copy is not None and not run.copy.done():
                return
            run.copy = None
            self._last_done_run = run

    def unwritten_view(self, skip: int, limit: int, max_bytes: int) -> memoryview:
        """The next bytes to write: rows from ``written`` to ``limit``, less ``skip`` bytes, up to the chunk's end."""
        return self.view(self.written, limit)[skip : skip + max_bytes]

    # Waiting: by anybody.

    def acked_needed_for(self, rows: int) -> int:
        """The value of ``acked`` at which ``rows`` rows are free, as things stand now."""
        return max(0, self.reserved + rows - self.soft_limit)

    def add_waiter(self, threshold: int) -> Waiter:
        """Announce a wait for ``acked`` to reach ``threshold``; look at ``acked`` once more before parking on it."""
        waiter = Waiter(threshold, threading.Lock())
        waiter.lock.acquire()
        self._waiters.append(waiter)
        return waiter

    def remove_waiter(self, waiter: Waiter) -> None:
        """Take the announcement back. One that stays behind costs a wake-up too many, never one too few."""
        with suppress(ValueError):  # forgotten already
            self._waiters.remove(waiter)

    def wake(self, everybody: bool = False) -> bool:
        """Wake all whose wait is over, or everybody; gives whether that was anybody."""
        woken = False
        for waiter in list(self._waiters):
            if everybody or self.stopped or waiter.threshold <= self.acked:
                waiter.wake()
                self.remove_waiter(waiter)
                woken = True
        return woken

    def wake_one(self) -> None:
        """Wake somebody, if anybody waits, to look after the others."""
        for waiter in list(self._waiters)[:1]:
            waiter.wake()

    def refuse_new_rows(self) -> None:
        """Accept no more rows, and wake everybody to see it. What is packed is still delivered."""
        with self.packing_lock:
            self.refuses_new_rows = True
        self.wake(everybody=True)

    def stop(self) -> None:
        """Nothing will move any more: accept no rows and wake everybody."""
        self.stopped = True
        self.wake()


def min_buffer_bytes(payload_size: int, resend_acked: int) -> int:
    """Bytes of the smallest buffer to work with."""
    return (resend_acked + 2) * payload_size


def rows_in_buffer(payload_size: int, buffer_bytes: int, resend_acked: int) -> int:
    """How many samples fit into ``buffer_bytes``; ValueError if those are too few to work with."""
    rows = check_count("buffer_bytes", buffer_bytes, least=1) // payload_size
    need = min_buffer_bytes(payload_size, resend_acked)
    if buffer_bytes < need:
        raise ValueError(
            f"buffer_bytes: got {buffer_bytes}, room for {rows} samples of {payload_size} bytes; "
            f"expected at least {need}, for the {resend_acked} kept to be sent again and 2 more"
        )
    return rows
