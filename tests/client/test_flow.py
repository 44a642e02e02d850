"""How far callers may run ahead after a ring was full, how much they write themselves, and how long acks may lie.

On their own, and where a client uses them.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from clock import Clock
from peers import Peer, PeerConnection

from echo_torch import DeliveryTimeoutError, TcpClient
from echo_torch.client import flow
from echo_torch.client.flow import (
    FAST_BYTES_PER_S,
    LOCKSTEP_WRITE_BYTES,
    MAX_POLL_INTERVAL_S,
    MIN_POLL_INTERVAL_S,
    MIN_SLOW_WAIT_S,
    RUN_AHEAD_WRITE_BYTES,
    SOFT_LIMIT_BYTES,
    WINDOW_DIVISOR,
    AckBatching,
    SoftLimit,
)
from echo_torch.ring.ring import Ring

ROW = 1024 * 1024
CAPACITY = 40
SOFT_LIMIT_ROWS = SOFT_LIMIT_BYTES // ROW


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(flow, "time", clock)
    return clock


@pytest.fixture
def ring() -> Ring:
    """Full of rows that are written and not acked."""
    made = Ring(memoryview(bytearray((CAPACITY + 2) * ROW)), ROW, 2)
    assert made.commit(CAPACITY)
    made.written = CAPACITY
    return made


def drain(ring: Ring, clock: Clock, rows: int, bytes_s: float) -> float:
    began = clock.now
    ring.acked += rows
    clock.now += rows * ROW / bytes_s
    return began


def engaged(ring: Ring, clock: Clock) -> SoftLimit:
    """With its limit set, by a full ring that drained fast."""
    made = SoftLimit(ring, 8)
    assert made.deadline_for(10) is None
    began = drain(ring, clock, 10, 2 * FAST_BYTES_PER_S)
    made.update_after_wait(10, 0, began)
    assert ring.soft_limit == SOFT_LIMIT_ROWS
    return made


def test_a_full_ring_that_drains_slowly_keeps_its_room(ring: Ring, clock: Clock) -> None:
    made = SoftLimit(ring, 8)
    made.update_after_wait(10, 0, drain(ring, clock, 10, FAST_BYTES_PER_S / 2))
    assert ring.soft_limit == CAPACITY
    assert ring.next_free_run(CAPACITY)[1] > 0


def test_a_full_ring_that_drains_fast_is_filled_less(ring: Ring, clock: Clock) -> None:
    """Nothing more is packed until what is un-acked has come down to the limit."""
    engaged(ring, clock)
    assert ring.next_free_run(CAPACITY)[1] == 0
    assert ring.acked_needed_for(1) == CAPACITY + 1 - SOFT_LIMIT_ROWS
    ring.acked = CAPACITY - SOFT_LIMIT_ROWS + 3
    assert ring.next_free_run(CAPACITY)[1] > 0
    packed = 0
    while rows := ring.next_free_run(CAPACITY)[1]:
        assert ring.commit(rows)
        packed += rows
    assert packed == 3
    assert ring.unacked == SOFT_LIMIT_ROWS


def test_the_limit_stays_while_waits_end_in_time_and_goes_when_one_does_not(ring: Ring, clock: Clock) -> None:
    made = engaged(ring, clock)
    threshold = ring.acked + 5
    began = drain(ring, clock, 5, FAST_BYTES_PER_S / 1.5)
    made.update_after_wait(threshold, threshold - 5, began)
    assert ring.soft_limit == SOFT_LIMIT_ROWS
    made.update_after_wait(ring.acked + 1, ring.acked, clock.now)
    assert ring.soft_limit == CAPACITY


@pytest.mark.parametrize("rows", [1, 30])
def test_a_wait_under_the_limit_is_bounded(ring: Ring, clock: Clock, rows: int) -> None:
    """By twice what it takes where the ring drains fast, and by no less than a hiccup of the scheduler."""
    made = engaged(ring, clock)
    deadline = made.deadline_for(ring.acked + rows)
    assert deadline is not None
    assert deadline.timeout == max(MIN_SLOW_WAIT_S, 2 * rows * ROW / FAST_BYTES_PER_S)
    reached = made.deadline_for(ring.acked - 5)
    assert reached is not None
    assert reached.timeout == MIN_SLOW_WAIT_S


def test_an_empty_ring_has_all_its_room_again(ring: Ring, clock: Clock) -> None:
    made = engaged(ring, clock)
    ring.acked = CAPACITY - 1
    made.lift_if_empty()
    assert ring.soft_limit == SOFT_LIMIT_ROWS
    ring.acked = CAPACITY
    made.lift_if_empty()
    assert ring.soft_limit == CAPACITY
    assert made.deadline_for(1) is None


def test_callers_write_more_themselves_where_they_cannot_run_ahead(ring: Ring, clock: Clock) -> None:
    assert SoftLimit(ring, CAPACITY).caller_write_bytes == LOCKSTEP_WRITE_BYTES
    made = SoftLimit(ring, 8)
    assert made.caller_write_bytes == RUN_AHEAD_WRITE_BYTES
    assert engaged(ring, clock).caller_write_bytes == RUN_AHEAD_WRITE_BYTES


def test_a_small_ring_is_never_limited(clock: Clock) -> None:
    ring = Ring(memoryview(bytearray(4 * 100)), 100)
    made = SoftLimit(ring, 2)
    made.update_after_wait(4, 0, drain(ring, clock, 4, 1e12))
    assert ring.soft_limit == ring.capacity == 4


def test_rows_larger_than_the_limit_still_go_through(clock: Clock) -> None:
    ring = Ring(memoryview(bytearray(3 * 2 * SOFT_LIMIT_BYTES)), 2 * SOFT_LIMIT_BYTES)
    assert ring.commit(3)
    ring.written = 3
    made = SoftLimit(ring, 1)
    made.update_after_wait(1, 0, drain(ring, clock, 1, 1e15))
    assert ring.soft_limit == 1
    ring.acked = 3
    assert ring.next_free_run(5)[1] == 1


def test_the_limit_leaves_room_for_the_window(clock: Clock) -> None:
    for window, limit in [(4, SOFT_LIMIT_ROWS), (SOFT_LIMIT_ROWS + 5, SOFT_LIMIT_ROWS + 5), (CAPACITY, CAPACITY)]:
        ring = Ring(memoryview(bytearray(CAPACITY * ROW)), ROW)
        assert ring.commit(CAPACITY)
        ring.written = CAPACITY
        made = SoftLimit(ring, window)
        made.update_after_wait(1, 0, drain(ring, clock, 1, 1e15))
        assert ring.soft_limit == limit


@pytest.mark.parametrize("timeout", [0.0, 0.005, 1.0])
def test_a_learner_that_pauses_after_it_was_fast_still_gets_all_of_the_ring(timeout: float) -> None:
    """Whatever the timeout: there is room, so `send` does not time out before all of it is used."""
    size, capacity = 28_000, 1000
    fast_rows = 4 * capacity
    paused = threading.Event()
    block = [np.zeros((50, size), np.uint8)]

    def script(conn: PeerConnection) -> None:
        conn.send_handshake(np.zeros(size, np.uint8))
        buffer, heard, acked = bytearray(1 << 22), 0, 0
        while acked < fast_rows and (count := conn.sock.recv_into(buffer)):
            heard += count
            whole = min(fast_rows, heard // size)
            conn.ack(whole - acked)
            acked = whole
        paused.wait(30)

    with Peer(script) as peer:
        example = np.zeros(size, np.uint8)
        client = TcpClient("127.0.0.1", peer.port, example, 290, buffer_bytes=capacity * size)
        for _ in range(fast_rows // 50):
            client.send_rows(block)
        while client.counts().sent - client.in_flight < fast_rows:
            time.sleep(0.001)
        accepted = 0
        try:
            while accepted <= capacity:
                client.send_rows(block, timeout=timeout)
                accepted += 50
        except DeliveryTimeoutError:
            pass
        assert accepted == capacity
        paused.set()
        with pytest.raises(DeliveryTimeoutError):
            client.close(0.1)


# How long acks may lie unread: naps end before the window runs dry, and are not taken where they would cost more than
# they save.


@pytest.mark.parametrize("window", [1, 32, 1024])
@pytest.mark.parametrize("per_second", [1e3, 1e4, 1e5, 1e6, 1e7])
def test_no_more_than_a_share_of_the_window_is_acked_in_a_poll_interval(
    clock: Clock, window: int, per_second: float
) -> None:
    batching = AckBatching(window)
    acked = 0
    for took in (1e-5, 1e-3, 0.5):
        clock.now += took
        acked += max(1, round(took * per_second))
        interval = batching.poll_interval(acked)
        rate = max(1, round(took * per_second)) / took
        assert interval == 0.0 or MIN_POLL_INTERVAL_S <= interval <= MAX_POLL_INTERVAL_S
        assert interval * rate <= window / WINDOW_DIVISOR * (1 + 1e-9)
        if window / WINDOW_DIVISOR / rate >= MIN_POLL_INTERVAL_S:
            assert interval > 0.0


@pytest.mark.parametrize("took", [1e-6, 5.0])
def test_the_poll_interval_is_zero_where_nothing_was_acked(clock: Clock, took: float) -> None:
    batching = AckBatching(1024)
    clock.now += took
    assert batching.poll_interval(0) == 0.0


def test_a_poll_that_came_too_early_does_not_count(clock: Clock) -> None:
    """The rate is that since the last acks, however often was looked in between."""
    batching, undisturbed = AckBatching(1024), AckBatching(1024)
    for _ in range(10):
        clock.now += 1e-4
        batching.poll_interval(0)
    assert batching.poll_interval(300) == undisturbed.poll_interval(300) > 0.0


def test_only_what_came_since_the_last_poll_counts(clock: Clock) -> None:
    batching = AckBatching(1024)
    clock.now += 1.0
    assert batching.poll_interval(10_000_000) == 0.0
    clock.now += 1.0
    assert batching.poll_interval(10_000_100) == MAX_POLL_INTERVAL_S
