"""A fixed number of rows, five counters that say how far each stage is, and the callers that wait for acks.

The docstring of `echo_torch.ring` gives the order of the counters, and the lock that you hold to move each. The
counters count rows since the ring was made. `Ring.slot` maps row ``i`` to its place in the buffer.

* The buffer is cut into chunks. A new chunk of rows takes the memory that was released last, because the caches still
  hold it. So the ring touches no more of the buffer than is in use. If it cycled through a large buffer instead, every
  copy into the buffer and out of it would miss the caches.
* Ctrl-C can interrupt the main thread after any call. So a packer first fills rows that are not counted yet. Then it
  counts them with plain assignments, which no interrupt can divide. An interrupted packer leaves no trace and no hole.
* One caller packs at a time. Two at once could leave a hole between their rows, and writing, acks and resending would
  have to skip it. A packer holds the lock for one memcpy into the ring, and never while it waits.
* A row may count as packed while a device still copies it. Copies of all rows before ``ready`` are done, and only those
  rows are written. A linked list of runs tracks the copies. Callers append a run when they count its rows, and the
  holder of the I/O lock moves past runs whose copies are done.
* A caller waits in C code, on a lock of its own, for ``acked`` to reach a number. A wake-up compares ``acked`` with
  each caller's number, whatever has changed. So if an interrupt cuts a wake-up short, the next one wakes the same
  callers.
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

# Bytes of a chunk: few enough that the chunks in use stay in the caches, and so many that few runs of rows cross a
# chunk's end.
CHUNK_BYTES = 2 * 1024 * 1024
# The server's default ``producer_queue_size``. The server may discard this many acked samples when a connection ends.
SERVER_QUEUE_SAMPLES = 8


class PendingCopy(Protocol):
    """A copy of bytes into rows that a device makes on its own."""

    def done(self) -> bool:
        """Return whether all bytes have arrived, without waiting.

        Only the I/O thread calls this, with the I/O lock held.

        Raises:
            RuntimeError: the copy failed, so the bytes never arrive.
        """

    def has_stopped(self) -> bool:
        """Return whether the copy has ended, without waiting. Callers call this, on their own threads.

        Raises:
            RuntimeError: the copy failed.
        """

    def abandon(self) -> None:
        """Keep the memory of the copy until it has ended. Nobody calls `done` or `has_stopped` after this."""


Filler = Callable[[int, int, int], "PendingCopy | None"]
"""``fill(slot, first, rows)`` packs a batch's rows, from row ``first`` on, into the ring from ``slot`` on.

It packs ``rows`` rows. It returns None if they are filled, or else the pending copy that fills them. It assigns the
pending copy to `Ring.uncommitted_copy` before the copy begins, so an interrupt cannot lose it.
"""


class _CopyRun:
    """The rows from ``first`` up to the next run. ``copy`` fills the first of them; the rest are filled already.

    Args:
        first: the run's first row.
        copy: fills the rows at the start of the run.
    """

    __slots__ = ("copy", "first", "next", "started_at")

    def __init__(self, first: int, copy: PendingCopy | None) -> None:
        # The run's first row.
        self.first = first
        # The copy that must end before the rows are ready; None once it is done.
        self.copy = copy
        # When the run was made, in seconds of the monotonic clock.
        self.started_at = time.monotonic()
        # The run after this one; None for the last run.
        self.next: _CopyRun | None = None


class Waiter(NamedTuple):
    """One caller's wait for ``acked`` to reach ``threshold``."""

    # The value of ``acked`` that the caller waits for.
    threshold: int
    # Locked from the start. Releasing it wakes the caller.
    lock: threading.Lock

    def wait(self, seconds: float) -> None:
        """Block in C code until `wake`, for at most ``seconds``, which may be infinite.

        This may return early, so check ``acked`` and wait again.
        """
        self.lock.acquire(timeout=clamp_timeout(seconds))

    def wake(self) -> None:
        with suppress(RuntimeError):  # woken before
            self.lock.release()

    @property
    def is_woken(self) -> bool:
        return not self.lock.locked()


class Ring:
    """A ring of as many rows of ``row_bytes`` bytes as ``buffer`` holds; see the module's rules.

    Args:
        buffer: writable and contiguous memory.
        row_bytes: bytes of one sample's payload.
        keep_acked: number of acked rows to keep, so that a new connection can resend them.
        chunk_bytes: upper limit for a chunk's size. A chunk has at least one row, however large.
        max_unacked: upper limit for un-acked rows, if fewer than the buffer holds; None for all.

    Raises:
        ValueError: ``row_bytes`` is below 1, or the buffer has fewer than ``keep_acked + 1`` rows.
    """

    def __init__(
        self,
        buffer: memoryview,
        row_bytes: int,
        keep_acked: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
        max_unacked: int | None = None,
    ) -> None:
        if row_bytes < 1:
            raise ValueError(f"row_bytes: got {row_bytes}, expected at least 1")
        # Bytes of one row.
        self.row_bytes = row_bytes
        # Number of rows in the buffer.
        self.capacity = buffer.nbytes // row_bytes
        # Number of acked rows that stay in the buffer, so that they can be sent again.
        self.keep_acked = keep_acked
        if self.capacity < keep_acked + 1:
            raise ValueError(f"a ring of {buffer.nbytes} bytes has {self.capacity} rows, fewer than {keep_acked + 1}")
        # Rows per chunk.
        self.chunk_rows = max(1, min(self.capacity, chunk_bytes // row_bytes))
        # Number of chunks of full length. The rows that are left form a shorter chunk at the end.
        self._whole_chunks = self.capacity // self.chunk_rows
        # Maps a chunk of rows, numbered from the start of each round, to the chunk of memory that holds it.
        self._chunk_map = list(range(self._whole_chunks + 1))
        # First row of the last chunk for which `next_free_run` chose memory; -1 before the first.
        self._last_placed = -1
        # ``_released_end``: the row after the newest chunk that is fully released.
        # ``_next_swap``: the row after the released chunk whose memory the next new chunk takes.
        self._released_end = self._next_swap = 0
        # The memory of all rows, as bytes.
        self.buffer = buffer.cast("B")
        # The packer's views of ``buffer``, cleared when the buffer changes; None until a packer makes them.
        self.columns: Any = None
        # The pinned tensor that is ``buffer``; None while the rows are in pageable memory.
        self.pinned_rows: Any = None
        # Orders the callers that pack. Its holder moves ``reserved`` and ``packed``.
        self.packing_lock = threading.RLock()
        # Upper limit for un-acked rows. The buffer has room for as many beside the acked rows that it keeps, or more.
        # `raise_limit` moves it.
        self.max_unacked = min(self.capacity - keep_acked, max_unacked or self.capacity)
        # The present limit for un-acked rows. It is below ``max_unacked`` while more rows would only be slower.
        self.soft_limit = self.max_unacked
        # The counters start here, from the last stage to the first. This one: rows that the peer acknowledged.
        self.acked = 0
        # Rows that the socket has taken in full.
        self.written = 0
        # Rows that callers packed. A device may still copy the last ones.
        self.packed = 0
        # Rows that are no longer free. `commit` moves it just before ``packed``.
        self.reserved = 0
        # Whether the ring takes only rows of the closing tail.
        self.refuses_new_rows = False
        # Whether the ring takes no rows at all, because the connection has ended.
        self.stopped = False
        # A copy into rows that are not counted yet. If you see one while nobody holds `packing_lock`, an interrupt
        # stopped its caller before `commit`.
        self.uncommitted_copy: PendingCopy | None = None
        # The value of ``ready`` when the copies were abandoned; None before that.
        self.ready_when_abandoned: int | None = None
        # The two ends of the list of runs.
        # ``_last_done_run``: the last run whose copy is done, where the list begins. ``_last_run``: the newest run.
        self._last_done_run = self._last_run = _CopyRun(0, None)
        # The callers that wait for acks, in the order in which they came.
        self._waiters: deque[Waiter] = deque()

    @property
    def ready(self) -> int:
        """The number of rows, from the first on, whose bytes are in the ring, as the last `poll_copies` found."""
        # Read ``packed`` before the list. Otherwise rows that a caller adds in between, with a copy under way, would
        # count as ready.
        packed = self.packed
        run = self._last_done_run.next
        return packed if run is None else min(packed, run.first)

    @property
    def copying_since(self) -> float | None:
        """The monotonic time at which the oldest pending copy began; None if no copy is pending."""
        run = self._last_done_run.next
        return None if run is None else run.started_at

    @property
    def released(self) -> int:
        """The number of rows whose memory may be used again: all acked ones except the last ``keep_acked``."""
        return max(0, self.acked - self.keep_acked)

    @property
    def unacked(self) -> int:
        """The number of rows that are packed and not acked."""
        return self.packed - self.acked

    @property
    def has_waiters(self) -> bool:
        """Whether any caller waits for acks."""
        return bool(self._waiters)

    def slot(self, row: int) -> int:
        """Return a row's place, in rows from the start of the buffer, for rows from ``released`` to ``reserved``."""
        chunk, rest = divmod(row % self.capacity, self.chunk_rows)
        return self._chunk_map[chunk] * self.chunk_rows + rest

    def view(self, row: int, end: int) -> memoryview:
        """Return the bytes of the rows from ``row`` up to ``end``, or up to the end of the chunk if that is nearer."""
        place = row % self.capacity
        left = min(self.chunk_rows - place % self.chunk_rows, self.capacity - place)
        start = self.slot(row) * self.row_bytes
        return self.buffer[start : start + min(end - row, left) * self.row_bytes]

    # Packing. Call these with `packing_lock` held.

    def raise_limit(self, max_unacked: int) -> None:
        """Allow so many un-acked rows, or as many as the buffer holds, if more are not allowed already."""
        most = min(self.capacity - self.keep_acked, max_unacked)
        if most > self.max_unacked:
            # A soft limit that is set stays as it is.
            if self.soft_limit == self.max_unacked:
                self.soft_limit = most
            self.max_unacked = most

    def next_free_run(self, want: int) -> tuple[int, int]:
        """Return the slot and the number of the next free rows in the chunk: at most ``want``, and maybe 0."""
        place = self.reserved % self.capacity
        free = max(0, self.soft_limit - self.reserved + self.acked)
        chunk, rest = divmod(place, self.chunk_rows)
        # At a chunk's first row, choose its memory. Do this once per chunk: a caller that asks again after an
        # interrupted packing must get the same memory.
        if free and not rest and self._last_placed < self.reserved:
            self._last_placed = self.reserved
            self._reuse_released_chunk()
        left = self.chunk_rows - rest if chunk < self._whole_chunks else self.capacity - place
        return self._chunk_map[chunk] * self.chunk_rows + rest, min(want, free, left)

    def _reuse_released_chunk(self) -> None:
        """Let the new chunk at ``reserved`` swap memory with the chunk that was released last and has not swapped yet.

        The choice only matters for speed, because both chunks of memory hold only free rows.
        """
        released = self.released
        # If more chunks were released since the last call, begin with the newest of them.
        newest = released - released % self.capacity % self.chunk_rows
        if newest > self._released_end:
            self._released_end = self._next_swap = newest
        # Find the released chunk to swap with (``start`` is its first row), and the places of both chunks in the map.
        last_row = self._next_swap - 1
        there, rest = divmod(last_row % self.capacity, self.chunk_rows)
        here, start = self.reserved % self.capacity // self.chunk_rows, last_row - rest
        if start < 0 or start + self.capacity <= self.reserved or max(here, there) >= self._whole_chunks:
            return  # no chunk is left, or its memory is in use again, or one of the two is the short chunk
        self._next_swap = start
        places = self._chunk_map
        # Nothing comes between the two assignments of the next line. An interrupt there would map two chunks to the
        # same memory.
        places[here], places[there] = places[there], places[here]

    def commit(self, rows: int, resent: bool = False, copy: PendingCopy | None = None) -> bool:
        """Count the next ``rows`` rows, which you have filled, as packed. Returns False if the ring takes no rows now.

        Args:
            rows: how many.
            resent: whether they belong to the closing tail. A ring that refuses new rows still takes these.
            copy: what fills them. The rows become ready when it is done.
        """
        # Make the run first: a call lets an interrupt in.
        run = None if copy is None else _CopyRun(self.packed, copy)
        # Once the ring has stopped, no row may count. Nothing comes between this check and the counting below that
        # would do harm.
        if self.stopped or (self.refuses_new_rows and not resent):
            return False
        end = self.packed + rows
        if run is None:
            self.reserved = end
            self.packed = end
            return True
        latest = self._last_run
        # Nothing comes between the next lines: rows count if, and only if, their copy is in the list of runs.
        latest.next = run
        self._last_run = run
        self.uncommitted_copy = None
        self.reserved = end
        self.packed = end
        return True

    def repeat_rows(self, slot: int, rows: int, period: int) -> None:
        """Fill the next ``rows`` free rows, from ``slot`` on, with copies of the rows ``period`` before them.

        The source rows must not be released.
        """
        size = self.row_bytes
        for number in range(rows):
            target, source = slot + number, self.slot(self.reserved + number - period)
            self.buffer[target * size : (target + 1) * size] = self.buffer[source * size : (source + 1) * size]

    def try_clear_uncommitted_copy(self) -> bool:
        """Return whether the next free rows are safe to fill: no interrupted caller's copy still goes there.

        Raises:
            RuntimeError: that copy failed.
        """
        if self.uncommitted_copy is not None:
            if not self.uncommitted_copy.has_stopped():
                return False
            self.uncommitted_copy = None
        return True

    def move_to_buffer(self, buffer: memoryview, pinned_rows: Any) -> None:
        """Move all rows to other memory of the same size, in order.

        Call this with the packing lock and the I/O lock held, and only while no copies are under way. Afterwards, one
        chunk spans all of the memory. A device's copies bypass the caches, so small chunks gain nothing, and long runs
        take fewer copies.

        Args:
            buffer: the new memory.
            pinned_rows: the object that owns it, kept with it.
        """
        # Copy the rows that are not released, run by run, each to its place in a ring that has one chunk.
        size, target = self.row_bytes, buffer.cast("B")
        row = self.released
        while row < self.packed:
            place = row % self.capacity
            rows = min(self.chunk_rows - place % self.chunk_rows, self.capacity - place, self.packed - row)
            slot = self.slot(row)
            target[place * size : (place + rows) * size] = self.buffer[slot * size : (slot + rows) * size]
            row += rows
        places = [0, 1]
        # Nothing comes between the next lines: the memory and the map must change together.
        self.buffer = target
        self.columns = None
        self.pinned_rows = pinned_rows
        self.chunk_rows = self.capacity
        self._whole_chunks = 1
        self._chunk_map = places

    def free_buffer(self) -> None:
        """Free the memory if the ring has stopped."""
        with self.packing_lock:
            if self.stopped:
                self.buffer, self.columns, self.pinned_rows = memoryview(b""), None, None

    def abandon_copies(self) -> None:
        """Abandon all pending copies, because nothing is written any more."""
        # Record ``ready`` first: once the list is empty, every packed row looks ready.
        self.ready_when_abandoned = self.ready
        copies, run = [self.uncommitted_copy], self._last_done_run.next
        while run is not None:
            copies.append(run.copy)
            run = run.next
        for copy in copies:
            if copy is not None:
                copy.abandon()
        # Empty the list, so that the ring keeps no copy alive.
        self.uncommitted_copy, self._last_done_run = None, self._last_run
        self._last_run.copy = None

    # Writing and acks. Call these with the I/O lock held.

    def poll_copies(self) -> None:
        """Advance ``ready`` past the copies that are done.

        Raises:
            RuntimeError: a copy failed.
        """
        while (run := self._last_done_run.next) is not None:
            if run.copy is not None and not run.copy.done():
                return
            run.copy = None
            self._last_done_run = run

    def unwritten_view(self, skip: int, limit: int, max_bytes: int) -> memoryview:
        """Return the next bytes to write.

        Args:
            skip: bytes of the first row that are written already.
            limit: the row to stop at. The view also stops at the end of the chunk.
            max_bytes: upper limit for the view's size.
        """
        return self.view(self.written, limit)[skip : skip + max_bytes]

    # Waiting. Anybody may call these.

    def acked_needed_for(self, rows: int) -> int:
        """Return the value of ``acked`` at which ``rows`` rows are free, under the present soft limit."""
        return max(0, self.reserved + rows - self.soft_limit)

    def add_waiter(self, threshold: int) -> Waiter:
        """Register a wait for ``acked`` to reach ``threshold``.

        Check ``acked`` again before you block: an ack that came before the registration wakes nobody.
        """
        waiter = Waiter(threshold, threading.Lock())
        waiter.lock.acquire()
        self._waiters.append(waiter)
        return waiter

    def remove_waiter(self, waiter: Waiter) -> None:
        """Remove a waiter. If an interrupt prevents this, a needless wake-up follows, and never a missed one."""
        with suppress(ValueError):  # `wake` has removed it
            self._waiters.remove(waiter)

    def wake(self, everybody: bool = False) -> bool:
        """Wake the callers whose wait is over, or all of them. Returns whether any caller was woken.

        Once the ring has stopped, every wait is over.
        """
        woken = False
        for waiter in list(self._waiters):
            if everybody or self.stopped or waiter.threshold <= self.acked:
                waiter.wake()
                self.remove_waiter(waiter)
                woken = True
        return woken

    def wake_one(self) -> None:
        """Wake the first caller that waits, so that it polls for acks on behalf of the others."""
        for waiter in list(self._waiters)[:1]:
            waiter.wake()

    def refuse_new_rows(self) -> None:
        """Take no more new rows, and wake all callers so that they notice. Packed rows are still delivered."""
        with self.packing_lock:
            self.refuses_new_rows = True
        self.wake(everybody=True)

    def stop(self) -> None:
        """Take no more rows, and wake all callers, because no counter moves any more."""
        self.stopped = True
        self.wake()


def min_buffer_bytes(payload_size: int, resend_acked: int) -> int:
    """Return the smallest buffer size that works, in bytes."""
    return (resend_acked + 2) * payload_size


def rows_in_buffer(payload_size: int, buffer_bytes: int, resend_acked: int) -> int:
    """Return how many samples fit into ``buffer_bytes``.

    Args:
        payload_size: bytes of one sample.
        buffer_bytes: bytes of the buffer.
        resend_acked: number of acked samples that the buffer must keep.

    Raises:
        ValueError: the buffer is too small.
    """
    rows = check_count("buffer_bytes", buffer_bytes, least=1) // payload_size
    need = min_buffer_bytes(payload_size, resend_acked)
    if buffer_bytes < need:
        raise ValueError(
            f"buffer_bytes: got {buffer_bytes}, room for {rows} samples of {payload_size} bytes; "
            f"expected at least {need}, for the {resend_acked} kept to be sent again and 2 more"
        )
    return rows
