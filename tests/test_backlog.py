"""`Backlog`: how far callers may run ahead after a ring was full, and how much they write themselves."""

from __future__ import annotations

import pytest

from echo_torch import backlog
from echo_torch.backlog import AHEAD_WRITE_BYTES, FAST_BYTES_S, HICCUP_S, LEVEL_WRITE_BYTES, MODEST_BYTES, Backlog
from echo_torch.ring import Ring

ROW = 1024 * 1024
CAPACITY = 40
MODEST = MODEST_BYTES // ROW


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(backlog, "time", made)
    return made


@pytest.fixture
def ring() -> Ring:
    """Full of rows that are written and not acked."""
    made = Ring(memoryview(bytearray(CAPACITY * ROW)), ROW, 2)
    assert made.commit(CAPACITY)
    made.written = CAPACITY
    return made


def drain(ring: Ring, clock: Clock, rows: int, bytes_s: float) -> float:
    began = clock.now
    ring.acked += rows
    clock.now += rows * ROW / bytes_s
    return began


def engaged(ring: Ring, clock: Clock) -> Backlog:
    """With its limit set, by a full ring that drained fast."""
    made = Backlog(ring, 8)
    assert made.patience(10) is None
    began = drain(ring, clock, 10, 2 * FAST_BYTES_S)
    made.waited(10, 0, began)
    assert ring.limit == MODEST
    return made


def test_a_full_ring_that_drains_slowly_keeps_its_room(ring: Ring, clock: Clock) -> None:
    made = Backlog(ring, 8)
    made.waited(10, 0, drain(ring, clock, 10, FAST_BYTES_S / 2))
    assert ring.limit == CAPACITY
    assert ring.free_run(CAPACITY)[1] > 0


def test_a_full_ring_that_drains_fast_is_filled_less(ring: Ring, clock: Clock) -> None:
    """Nothing more is packed until what is un-acked has come down to the limit."""
    engaged(ring, clock)
    assert ring.free_run(CAPACITY)[1] == 0
    assert ring.rows_free_at(1) == CAPACITY + 1 - MODEST
    ring.acked = CAPACITY - MODEST + 3
    assert ring.free_run(CAPACITY)[1] > 0
    packed = 0
    while rows := ring.free_run(CAPACITY)[1]:
        assert ring.commit(rows)
        packed += rows
    assert packed == 3
    assert ring.unacked == MODEST


def test_the_limit_stays_while_waits_end_in_time_and_goes_when_one_does_not(ring: Ring, clock: Clock) -> None:
    made = engaged(ring, clock)
    threshold = ring.acked + 5
    began = drain(ring, clock, 5, FAST_BYTES_S / 1.5)
    made.waited(threshold, threshold - 5, began)
    assert ring.limit == MODEST
    made.waited(ring.acked + 1, ring.acked, clock.now)
    assert ring.limit == CAPACITY


@pytest.mark.parametrize("rows", [1, 30])
def test_a_wait_under_the_limit_is_bounded(ring: Ring, clock: Clock, rows: int) -> None:
    """By twice what it takes where the ring drains fast, and by no less than a hiccup of the scheduler."""
    made = engaged(ring, clock)
    patience = made.patience(ring.acked + rows)
    assert patience is not None
    assert patience.timeout == max(HICCUP_S, 2 * rows * ROW / FAST_BYTES_S)
    reached = made.patience(ring.acked - 5)
    assert reached is not None
    assert reached.timeout == HICCUP_S


def test_an_empty_ring_has_all_its_room_again(ring: Ring, clock: Clock) -> None:
    made = engaged(ring, clock)
    ring.acked = CAPACITY - 1
    made.begin()
    assert ring.limit == MODEST
    ring.acked = CAPACITY
    made.begin()
    assert ring.limit == CAPACITY
    assert made.patience(1) is None


def test_callers_write_more_themselves_where_they_cannot_run_ahead(ring: Ring, clock: Clock) -> None:
    assert Backlog(ring, CAPACITY - ring.replay).caller_bytes == LEVEL_WRITE_BYTES
    made = Backlog(ring, 8)
    assert made.caller_bytes == AHEAD_WRITE_BYTES
    made = engaged(ring, clock)
    assert made.caller_bytes == LEVEL_WRITE_BYTES


def test_a_small_ring_is_never_limited(clock: Clock) -> None:
    ring = Ring(memoryview(bytearray(4 * 100)), 100)
    made = Backlog(ring, 2)
    made.waited(4, 0, drain(ring, clock, 4, 1e12))
    assert ring.limit == ring.capacity == 4


def test_rows_larger_than_the_limit_still_go_through(clock: Clock) -> None:
    ring = Ring(memoryview(bytearray(3 * 2 * MODEST_BYTES)), 2 * MODEST_BYTES)
    assert ring.commit(3)
    ring.written = 3
    made = Backlog(ring, 1)
    made.waited(1, 0, drain(ring, clock, 1, 1e15))
    assert ring.limit == 1
    ring.acked = 3
    assert ring.free_run(5)[1] == 1
