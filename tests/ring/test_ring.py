"""The ring's methods one by one, then its invariant under several packing threads; no sockets.

In the machine at the end, real threads pack rows that say who packed them and as the how-many-th. The rules, all on
one thread as the holder of the I/O lock would be, write and ack; what is written must be whole rows, each sender's in
order, none lost and none twice.
"""

from __future__ import annotations

import functools
import itertools
import math
import queue
import struct
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from echo_torch.ring.ring import Ring

TIMEOUT_S = 30.0
"""Seconds after which a thread that has not answered is taken to hang."""


def ring_at(*, capacity: int = 4, keep_acked: int = 0, acked: int = 0, written: int = 0, packed: int = 0) -> Ring:
    """A ring of rows of 3 bytes, whose byte ``i`` is ``i``, with its counters as a connection might have left them."""
    ring = Ring(memoryview(bytearray(range(3 * capacity))), 3, keep_acked)
    assert ring.commit(packed)
    ring.written = max(written, acked)
    ring.acked = acked
    return ring


def counters(ring: Ring) -> tuple[int, int, int, int, int]:
    return ring.released, ring.acked, ring.written, ring.packed, ring.reserved


# A new ring.


@pytest.mark.parametrize(("nbytes", "capacity"), [(12, 4), (14, 4), (15, 5)])
def test_capacity_counts_whole_rows(nbytes: int, capacity: int) -> None:
    ring = Ring(memoryview(bytearray(nbytes)), 3)
    assert (ring.capacity, ring.row_bytes, ring.keep_acked) == (capacity, 3, 0)
    assert counters(ring) == (0, 0, 0, 0, 0)
    assert (ring.unacked, ring.has_waiters, ring.refuses_new_rows, ring.stopped) == (0, False, False, False)


def test_capacity_counts_bytes_whatever_the_items_of_the_buffer() -> None:
    ring = Ring(memoryview(bytearray(24)).cast("d"), 6)
    assert ring.capacity == 4
    ring.buffer[0:2] = b"ab"
    assert ring.buffer.nbytes == 24


@pytest.mark.parametrize(("nbytes", "row_bytes", "keep_acked"), [(2, 3, 0), (8, 3, 2), (0, 1, 0)])
def test_too_few_rows_are_refused(nbytes: int, row_bytes: int, keep_acked: int) -> None:
    with pytest.raises(ValueError, match=f"fewer than {keep_acked + 1}"):
        Ring(memoryview(bytearray(nbytes)), row_bytes, keep_acked)


@pytest.mark.parametrize("row_bytes", [0, -1])
def test_rows_without_bytes_are_refused(row_bytes: int) -> None:
    with pytest.raises(ValueError, match="row_bytes"):
        Ring(memoryview(bytearray(8)), row_bytes)


@pytest.mark.parametrize(("keep_acked", "acked", "released"), [(0, 0, 0), (0, 3, 3), (2, 1, 0), (2, 2, 0), (2, 4, 2)])
def test_the_last_acked_rows_are_kept(keep_acked: int, acked: int, released: int) -> None:
    ring = ring_at(keep_acked=keep_acked, acked=acked, packed=acked)
    assert ring.released == released


def test_unacked_rows_are_those_packed_and_not_acked() -> None:
    assert ring_at(acked=2, written=3, packed=5).unacked == 3


# Packing.


@pytest.mark.parametrize(
    ("state", "want", "run"),
    [
        ({}, 3, (0, 3)),
        ({}, 9, (0, 4)),
        ({}, 0, (0, 0)),
        ({"packed": 3}, 9, (3, 1)),
        ({"packed": 4}, 9, (0, 0)),
        ({"packed": 4, "written": 4}, 9, (0, 0)),
        ({"packed": 4, "acked": 3}, 9, (0, 3)),
        ({"packed": 3, "acked": 3}, 9, (3, 1)),
        ({"packed": 6, "acked": 3}, 9, (2, 1)),
        ({"packed": 6, "acked": 6}, 1, (2, 1)),
        ({"packed": 6, "acked": 6}, 9, (2, 2)),
        ({"packed": 8, "acked": 8}, 9, (0, 4)),
        ({"keep_acked": 2, "packed": 4, "acked": 2}, 9, (0, 0)),
        ({"keep_acked": 2, "packed": 4, "acked": 4}, 9, (0, 2)),
        ({"keep_acked": 3, "packed": 4, "acked": 4}, 9, (0, 1)),
    ],
)
def test_next_free_run_ends_at_the_wanted_the_free_and_the_wrap(state: dict[str, int], want: int, run) -> None:
    ring = ring_at(**state)
    before = counters(ring)
    assert ring.next_free_run(want) == run
    assert counters(ring) == before


def test_commit_counts_rows_as_reserved_and_packed_at_once() -> None:
    ring = ring_at()
    assert ring.commit(3)
    assert ring.commit(1)
    assert counters(ring) == (0, 0, 0, 4, 4)


def test_an_interrupted_packing_leaves_no_trace() -> None:
    """The turn is free again, no row is counted, and the next packer gets the same slots."""
    ring = ring_at(packed=1)
    run = ring.next_free_run(2)

    def pack() -> None:
        with ring.packing_lock:
            ring.buffer[3:5] = b"??"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack()
    assert counters(ring) == (0, 0, 0, 1, 1)
    assert ring.next_free_run(2) == run == (1, 2)
    others: queue.SimpleQueue[bool] = queue.SimpleQueue()
    threading.Thread(target=lambda: others.put(ring.packing_lock.acquire(blocking=False))).start()
    assert others.get(timeout=TIMEOUT_S)


def test_a_ring_that_refuses_new_rows_accepts_only_resent_ones() -> None:
    ring = ring_at(packed=1)
    ring.refuse_new_rows()
    assert not ring.commit(1)
    assert counters(ring) == (0, 0, 0, 1, 1)
    assert ring.commit(2, resent=True)
    assert counters(ring) == (0, 0, 0, 3, 3)
    assert not ring.stopped


@pytest.mark.parametrize("resent", [False, True])
def test_a_stopped_ring_accepts_no_rows(resent: bool) -> None:
    ring = ring_at(packed=1)
    ring.stop()
    assert not ring.commit(1, resent=resent)
    assert counters(ring) == (0, 0, 0, 1, 1)


def test_refuse_new_rows_waits_for_the_holder_of_the_packing_lock() -> None:
    """So that what is packed when it returns is all that will ever be."""
    ring = ring_at()
    packing, go_on = threading.Event(), threading.Event()
    packed_after_refuse: queue.SimpleQueue[int] = queue.SimpleQueue()

    def pack() -> None:
        with ring.packing_lock:
            packing.set()
            go_on.wait(TIMEOUT_S)
            ring.commit(2)

    def refuse() -> None:
        ring.refuse_new_rows()
        packed_after_refuse.put(ring.packed)

    threads = [threading.Thread(target=pack), threading.Thread(target=refuse)]
    threads[0].start()
    assert packing.wait(TIMEOUT_S)
    threads[1].start()
    with pytest.raises(queue.Empty):
        packed_after_refuse.get(timeout=0.05)
    go_on.set()
    assert packed_after_refuse.get(timeout=TIMEOUT_S) == 2
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert not ring.commit(1)


# Writing.


@pytest.mark.parametrize(
    ("written", "skip", "limit", "max_bytes", "view"),
    [
        (0, 0, 2, 99, range(6)),
        (0, 0, 4, 99, range(12)),
        (1, 0, 3, 99, range(3, 9)),
        (1, 1, 3, 99, range(4, 9)),
        (1, 2, 2, 99, range(5, 6)),
        (2, 0, 6, 99, range(6, 12)),
        (3, 2, 6, 99, range(11, 12)),
        (4, 0, 6, 99, range(6)),
        (5, 1, 8, 99, range(4, 12)),
        (0, 0, 4, 7, range(7)),
        (1, 2, 4, 1, range(5, 6)),
        (2, 1, 4, 5, range(7, 12)),
        (3, 0, 6, 3, range(9, 12)),
        (2, 0, 2, 99, range(0)),
    ],
)
def test_unwritten_view_ends_at_the_limit_the_wrap_and_the_bytes(written, skip, limit, max_bytes, view) -> None:
    ring = ring_at(written=written, packed=8)
    assert bytes(ring.unwritten_view(skip, limit, max_bytes)) == bytes(view)
    assert ring.written == written


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    capacity=st.integers(1, 9),
    start=st.integers(0, 20),
    rows=st.integers(1, 9),
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=6),
)
def test_unwritten_views_in_any_pieces_are_all_bytes_once_and_in_order(capacity, start, rows, pieces) -> None:
    """As a socket takes them that is now and then full: whole rows are counted, the rest is skipped the next time."""
    rows = min(rows, capacity)
    ring = ring_at(capacity=capacity, acked=start, packed=start + rows)
    stream, partial = b"", 0
    for piece in itertools.cycle(pieces):
        if ring.written == ring.packed:
            break
        view = ring.unwritten_view(partial, ring.packed, piece)
        assert 0 < len(view) <= piece
        stream += view
        ring.written, partial = start + len(stream) // 3, len(stream) % 3
    slots = [(start + row) % capacity for row in range(rows)]
    assert stream == b"".join(bytes(range(3 * slot, 3 * slot + 3)) for slot in slots)


# Which memory is used.


def pack_and_ack(ring: Ring, rows: int, in_flight: int) -> list[int]:
    """Pack ``rows`` rows, each acked when ``in_flight`` more are packed; gives their slots."""
    slots = []
    for row in range(rows):
        slot, free = ring.next_free_run(1)
        assert free == 1
        assert slot == ring.slot(row)
        slots.append(slot)
        assert ring.commit(1)
        ring.written = ring.packed
        ring.acked = max(ring.acked, ring.packed - in_flight)
    return slots


@pytest.mark.parametrize("keep_acked", [0, 3])
@pytest.mark.parametrize("in_flight", [0, 1, 4, 9])
@pytest.mark.parametrize("rest", [0, 1, 3])
def test_what_was_released_last_is_used_first(keep_acked: int, in_flight: int, rest: int) -> None:
    """Of 100 rows and more in chunks of 4, what is in flight touches no more memory than it takes, and two chunks."""
    ring = Ring(memoryview(bytearray(2 * (100 + rest))), 2, keep_acked, chunk_bytes=9)
    slots = pack_and_ack(ring, 90, in_flight)  # the shorter chunk at the end, if there is one, is used in its turn
    assert len(set(slots)) <= keep_acked + in_flight + 2 * 4


@pytest.mark.parametrize("burst", [1, 3, 4, 17, 30])
@pytest.mark.parametrize("rest", [0, 1])
def test_bursts_use_the_same_memory_again(burst: int, rest: int) -> None:
    """As a training loop makes them: all of a batch is packed before any of it is acked, and all is before the next."""
    ring = Ring(memoryview(bytearray(2 * (400 + rest))), 2, 0, chunk_bytes=8)
    slots = set()
    while ring.packed + burst <= 380:  # the short chunk at the end, if there is one, is used in its turn
        for _ in range(burst):
            slots.add(ring.next_free_run(1)[0])
            assert ring.commit(1)
        ring.written = ring.acked = ring.packed
    assert len(slots) <= burst + 3 * 4


@pytest.mark.parametrize("before", [0, 1, 7, 100, 333])
@pytest.mark.parametrize(("chunk_bytes", "keep_acked"), [(1, 0), (8, 0), (8, 5), (64, 2), (1000, 0)])
def test_all_rows_can_be_in_flight_whatever_came_before(before: int, chunk_bytes: int, keep_acked: int) -> None:
    """No two of them share memory, nor do those that are kept; and the ring takes neither more nor fewer."""
    ring = Ring(memoryview(bytearray(2 * 101)), 2, keep_acked, chunk_bytes)
    pack_and_ack(ring, before, in_flight=6)
    ring.acked = ring.packed
    while ring.next_free_run(1000)[1]:
        assert ring.commit(ring.next_free_run(7)[1])
    assert ring.reserved - ring.acked == ring.max_unacked == 101 - keep_acked
    kept = {ring.slot(row) for row in range(ring.released, ring.reserved)}
    assert len(kept) == ring.reserved - ring.released
    assert kept <= set(range(101))


def test_repeat_rows_copies_the_rows_before_across_chunks() -> None:
    ring = Ring(memoryview(bytearray(3 * 20)), 3, 5, chunk_bytes=12)
    pack_and_ack(ring, 47, in_flight=0)
    for row in range(ring.released, ring.packed):
        ring.buffer[3 * ring.slot(row) : 3 * ring.slot(row) + 3] = bytes([row] * 3)
    copied = 0
    while copied < 5:
        slot, rows = ring.next_free_run(5 - copied)
        ring.repeat_rows(slot, rows, 5)
        assert ring.commit(rows, resent=True)
        copied += rows
    tail = [bytes(ring.buffer[3 * ring.slot(row) : 3 * ring.slot(row) + 3]) for row in range(47, 52)]
    assert tail == [bytes([row] * 3) for row in range(42, 47)]


# Waiting.


def free_rows(ring: Ring) -> int:
    return ring.max_unacked - (ring.reserved - ring.acked)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), spare=st.integers(1, 8), keep_acked=st.integers(0, 5))
def test_acked_needed_for_is_the_first_ack_at_which_rows_not_free_yet_are(data, spare: int, keep_acked: int) -> None:
    acked = data.draw(st.integers(0, 20), "acked")
    unacked = data.draw(st.integers(0, spare), "unacked")
    ring = ring_at(capacity=keep_acked + spare, keep_acked=keep_acked, acked=acked, packed=acked + unacked)
    rows = data.draw(st.integers(1, spare), "rows")
    threshold = ring.acked_needed_for(rows)
    assert threshold <= ring.packed
    if rows > free_rows(ring):
        ring.acked = threshold - 1
        assert free_rows(ring) < rows
        ring.acked = threshold
        assert free_rows(ring) == rows


@pytest.mark.parametrize("state", [{}, {"packed": 3}, {"packed": 4, "acked": 1}, {"packed": 10, "acked": 8}])
@pytest.mark.parametrize("keep_acked", [0, 3])
def test_rows_that_are_free_are_not_waited_for(state: dict[str, int], keep_acked: int) -> None:
    ring = ring_at(capacity=8, keep_acked=keep_acked, **state)
    assert free_rows(ring) >= 2
    assert ring.acked_needed_for(2) <= ring.acked


def is_woken(waiter) -> bool:
    return not waiter.lock.locked()


def test_wake_wakes_only_waiters_whose_threshold_is_reached() -> None:
    ring = ring_at(packed=4, written=4)
    waiters = [ring.add_waiter(threshold) for threshold in (3, 1, 2, 2, 4)]
    seen = []
    for acked in (0, 1, 2, 4):
        ring.acked = acked
        ring.wake()
        seen.append([is_woken(waiter) for waiter in waiters])
    assert seen == [
        [False, False, False, False, False],
        [False, True, False, False, False],
        [False, True, True, True, False],
        [True, True, True, True, True],
    ]
    assert not ring.has_waiters


@pytest.mark.parametrize("wake_all", [lambda ring: ring.wake(everybody=True), Ring.refuse_new_rows, Ring.stop])
def test_wake_everybody_refuse_new_rows_and_stop_wake_all_waiters(wake_all) -> None:
    ring = ring_at(packed=4)
    waiters = [ring.add_waiter(threshold) for threshold in (1, 4, 4)]
    wake_all(ring)
    assert all(is_woken(waiter) for waiter in waiters)
    assert not ring.has_waiters


def test_after_a_stop_every_wake_is_for_everybody() -> None:
    """Who announced a wait while the ring stopped is still woken."""
    ring = ring_at(packed=4)
    ring.stop()
    late = ring.add_waiter(4)
    ring.wake()
    assert is_woken(late)


def test_a_wake_that_was_missed_is_made_good_by_the_next() -> None:
    ring = ring_at(packed=4, written=4)
    waiter = ring.add_waiter(2)
    ring.acked = 2  # and whoever did it was interrupted before `wake`
    assert not is_woken(waiter)
    ring.acked = 3
    ring.wake()
    assert is_woken(waiter)


def test_a_removed_waiter_is_not_woken_and_the_others_are() -> None:
    ring = ring_at(packed=4)
    gone, there = ring.add_waiter(1), ring.add_waiter(1)
    ring.remove_waiter(gone)
    ring.remove_waiter(gone)
    assert ring.has_waiters
    ring.wake(everybody=True)
    assert not is_woken(gone)
    assert is_woken(there)
    ring.remove_waiter(there)
    assert not ring.has_waiters


def test_wait_returns_at_once_when_woken_before_and_then_blocks_again() -> None:
    waiter = ring_at().add_waiter(1)
    waiter.wake()
    waiter.wake()
    waiter.wait(math.inf)
    assert not is_woken(waiter)


@pytest.mark.parametrize("seconds", [0.0, 0.01, -1e-9])
def test_wait_ends_with_its_timeout(seconds: float) -> None:
    ring = ring_at()
    waiter = ring.add_waiter(1)
    waiter.wait(seconds)
    assert not is_woken(waiter)
    assert ring.has_waiters


@pytest.mark.parametrize("seconds", [math.inf, TIMEOUT_S, 1e12])
def test_a_waiting_thread_is_woken(seconds: float) -> None:
    ring = ring_at(packed=1, written=1)
    waiter_added = threading.Event()

    def wait_for_the_ack() -> None:
        waiter = ring.add_waiter(1)
        waiter_added.set()
        waiter.wait(seconds)

    thread = threading.Thread(target=wait_for_the_ack, daemon=True)
    thread.start()
    assert waiter_added.wait(TIMEOUT_S)
    ring.acked = 1
    ring.wake()
    thread.join(TIMEOUT_S / 2)
    assert not thread.is_alive()


# Several senders at once.

SENDERS = 3
UNIT = struct.Struct("<BI")
GARBAGE = 0xEE
DONE = -1


def row_of(sender: int, number: int, size: int) -> bytes:
    """The ``number``-th row of a sender: it says so over and over, so that a torn or mixed row is seen."""
    return (UNIT.pack(sender, number) * (size // UNIT.size + 1))[:size]


class InterruptedPackingError(Exception):
    """Stands for a Ctrl-C that strikes in the middle of a packing."""


class PackingThread(threading.Thread):
    """Carries out orders; reports `DONE`, or the ``acked`` it waits for before it parks, or what it died of."""

    def __init__(self, ring: Ring, ident: int) -> None:
        super().__init__(name=f"sender {ident}", daemon=True)
        self.ring = ring
        self.number = ident
        self.rows = 0
        self.orders: queue.SimpleQueue[functools.partial[None] | None] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()

    def run(self) -> None:
        try:
            while (order := self.orders.get()) is not None:
                order()
                self.reports.put(DONE)
        except BaseException as error:
            self.reports.put(error)

    def send(self, rows: int) -> None:
        while rows and not self.ring.stopped:
            packed = self.pack(rows)
            rows -= packed
            if not packed:
                self.wait_for_room(rows)

    def pack(self, want: int) -> int:
        ring, size = self.ring, self.ring.row_bytes
        with ring.packing_lock:
            slot, rows = ring.next_free_run(want)
            for row in range(rows):
                start = (slot + row) * size
                ring.buffer[start : start + size] = row_of(self.number, self.rows + row, size)
            if rows and ring.commit(rows):
                self.rows += rows
            return rows

    def pack_and_be_interrupted(self, want: int, after: int) -> None:
        """Begin to pack ``want`` rows, and be interrupted when ``after`` bytes of them are there."""
        ring = self.ring
        try:
            with ring.packing_lock:
                slot, rows = ring.next_free_run(want)
                start, end = slot * ring.row_bytes, (slot + rows) * ring.row_bytes
                for at in range(start, min(start + after, end)):
                    ring.buffer[at] = GARBAGE
                raise InterruptedPackingError
        except InterruptedPackingError:
            pass

    def wait_for_room(self, rows: int) -> None:
        ring = self.ring
        threshold = ring.acked_needed_for(min(rows, max(1, (ring.capacity - ring.keep_acked) // 2)))
        while ring.acked < threshold and not ring.stopped:
            waiter = ring.add_waiter(threshold)
            try:
                if ring.acked < threshold and not ring.stopped:
                    self.reports.put(threshold)
                    waiter.wait(math.inf)
            finally:
                ring.remove_waiter(waiter)


class SenderState:
    """What the rules know of one sender: how many orders it has not done, and which ack it was waiting for."""

    def __init__(self, ring: Ring, ident: int) -> None:
        self.sender = PackingThread(ring, ident)
        self.pending_orders = 0
        self.waits_for_acked = 0
        self.rows_written = 0  # its rows that were written
        self.sender.start()

    def order(self, what, *arguments: int) -> None:
        self.pending_orders += 1
        self.sender.orders.put(functools.partial(what, self.sender, *arguments))

    def settle(self, acked: int) -> bool:
        """Wait until it has done all its orders or waits for more than ``acked``; gives whether it waits."""
        while self.pending_orders and self.waits_for_acked <= acked:
            report = self.sender.reports.get(timeout=TIMEOUT_S)
            if isinstance(report, BaseException):
                raise report
            if report == DONE:
                self.pending_orders -= 1
                self.waits_for_acked = 0
            else:
                self.waits_for_acked = report
        return self.pending_orders > 0


class RingMachine(RuleBasedStateMachine):
    """No draw and no choice of a rule depends on how far the threads have come, so examples can be replayed."""

    @initialize(
        keep_acked=st.sampled_from([0, 1, 4]),
        spare=st.integers(1, 7),
        row_bytes=st.sampled_from([5, 8, 17]),
        rest=st.integers(0, 4),
        chunk_bytes=st.sampled_from([1, 20, 40, 1 << 20]),
    )
    def start(self, keep_acked: int, spare: int, row_bytes: int, rest: int, chunk_bytes: int) -> None:
        buffer = memoryview(bytearray((keep_acked + spare) * row_bytes + rest))
        self.ring = Ring(buffer, row_bytes, keep_acked, chunk_bytes)
        self.senders = [SenderState(self.ring, ident) for ident in range(SENDERS)]
        self.partial = b""
        self.rows: list[bytes] = []

    @rule(sender=st.integers(0, SENDERS - 1), rows=st.integers(1, 12))
    def send(self, sender: int, rows: int) -> None:
        self.senders[sender].order(PackingThread.send, rows)

    @rule(sender=st.integers(0, SENDERS - 1), rows=st.integers(1, 12), after=st.integers(0, 60))
    def send_and_be_interrupted(self, sender: int, rows: int, after: int) -> None:
        self.senders[sender].order(PackingThread.pack_and_be_interrupted, rows, after)

    @rule(rows=st.integers(1, 9), max_bytes=st.integers(1, 99))
    def write(self, rows: int, max_bytes: int) -> None:
        ring = self.ring
        limit = min(ring.packed, ring.written + rows)
        if limit == ring.written:
            return
        view = ring.unwritten_view(len(self.partial), limit, max_bytes)
        assert 0 < len(view) <= max_bytes
        stream = self.partial + view
        whole = len(stream) // ring.row_bytes
        for row in range(whole):
            self.check_written(stream[row * ring.row_bytes : (row + 1) * ring.row_bytes])
        self.partial = stream[whole * ring.row_bytes :]
        ring.written += whole

    def check_written(self, row: bytes) -> None:
        """The row is whole, one sender's, and that sender's next."""
        sender, number = UNIT.unpack_from(row)
        assert sender < SENDERS, row
        assert row == row_of(sender, number, len(row))
        assert number == self.senders[sender].rows_written
        self.senders[sender].rows_written += 1
        self.rows.append(row)

    @rule(rows=st.integers(1, 9), wake=st.sampled_from([True, True, True, False]))
    def ack(self, rows: int, wake: bool) -> None:
        """Without ``wake``: an interrupt came between the counting and the waking."""
        self.ring.acked = min(self.ring.acked + rows, self.ring.written)
        if wake:
            self.ring.wake()

    @rule()
    def settle(self) -> None:
        """Let the senders run as far as they can: those that still wait have a reason, and no other waiter is left."""
        self.ring.wake()
        waiting = [state.settle(self.ring.acked) for state in self.senders]
        assert self.ring.has_waiters == any(waiting)
        assert self.ring.packed == self.ring.reserved == sum(state.sender.rows for state in self.senders)
        assert self.ring.packed > self.ring.acked or not any(waiting)

    @invariant()
    def counters_are_in_order(self) -> None:
        """Read from left to right: `released`, `acked` and `written` stand still, `packed` follows `reserved`."""
        ring = self.ring
        assert ring.released <= ring.acked <= ring.written <= ring.packed <= ring.reserved
        assert ring.reserved <= ring.released + ring.capacity

    @invariant()
    def rows_that_may_be_sent_again_are_untouched(self) -> None:
        ring, size = self.ring, self.ring.row_bytes
        for row in range(ring.released, ring.written):
            start = ring.slot(row) * size
            assert ring.buffer[start : start + size] == self.rows[row]

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            self.ring.stop()
            for state in self.senders:
                state.sender.orders.put(None)
            for state in self.senders:
                state.sender.join(TIMEOUT_S)
        assert not any(state.sender.is_alive() for state in self.senders)
        assert [state.rows_written for state in self.senders] == [state.sender.rows for state in self.senders]
        assert counters(self.ring)[1:] == (len(self.rows),) * 4

    def drain(self) -> None:
        """Until every order is done and every row acked; each round lets somebody on, or `settle` fails."""
        self.settle()
        while self.ring.unacked:
            while self.ring.written < self.ring.packed:
                self.write(rows=self.ring.capacity, max_bytes=1 << 20)
            self.ack(rows=self.ring.capacity, wake=True)
            self.counters_are_in_order()
            self.rows_that_may_be_sent_again_are_untouched()
            self.settle()


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads take turns far more often than they would by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("frequent_switches")
def test_the_invariant_holds_and_every_row_is_written_once_and_in_order() -> None:
    run_state_machine_as_test(
        RingMachine,
        settings=settings(
            max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
