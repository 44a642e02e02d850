"""`ClosingTail`: which rows are repeated, and in what portions."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from echo_torch.client.connection import Connection
from echo_torch.client.resend import ClosingTail
from echo_torch.ring.ring import Ring

ROW = 8


def ring_of(capacity: int, keep_acked: int) -> Ring:
    return Ring(np.zeros(capacity * ROW, np.uint8).data, ROW, keep_acked, chunk_bytes=4 * ROW)


def pack(ring: Ring, *values: int) -> None:
    for value in values:
        slot, rows = ring.next_free_run(1)
        assert rows == 1
        np.frombuffer(ring.buffer, np.int64)[slot] = value
        assert ring.commit(1)


def at(ring: Ring, row: int) -> int:
    return int(np.frombuffer(ring.buffer, np.int64)[ring.slot(row)])


def settle(ring: Ring) -> None:
    """Everything is written and acked."""
    ring.written = ring.acked = ring.packed


@pytest.mark.parametrize(
    ("sent", "keep_acked", "expected"),
    [(10, 3, [7, 8, 9]), (3, 3, [0, 1, 2]), (2, 5, [0, 1, 0, 1, 0]), (1, 4, [0, 0, 0, 0]), (0, 4, []), (5, 0, [])],
)
def test_the_last_rows_or_all_of_them_in_cycles(sent: int, keep_acked: int, expected: list[int]) -> None:
    ring = ring_of(32, keep_acked)
    tail = ClosingTail(ring, enabled=True)
    pack(ring, *range(sent))
    settle(ring)
    assert tail.packed == 0
    tail.start()
    assert tail.end_row == sent + len(expected)
    assert tail.pack() == 0
    assert [at(ring, row) for row in range(sent, ring.packed)] == expected
    assert tail.packed == len(expected)
    assert tail.pack() == 0  # once only
    assert ring.packed == tail.end_row


def test_in_a_small_ring_it_is_packed_in_portions() -> None:
    ring = ring_of(7, keep_acked=5)
    tail = ClosingTail(ring, enabled=True)
    for number in range(20):
        pack(ring, number)
        settle(ring)
    tail.start()
    seen: list[int] = []
    portions, left = 0, 5
    while left:
        before = ring.packed
        left = tail.pack()
        assert ring.packed > before
        seen += [at(ring, row) for row in range(before, ring.packed)]
        portions += 1
        settle(ring)
    assert seen == [15, 16, 17, 18, 19]
    assert portions > 1


def test_a_tail_that_is_not_enabled_is_not_packed() -> None:
    ring = ring_of(16, keep_acked=4)
    tail = ClosingTail(ring, enabled=False)
    pack(ring, 1, 2, 3)
    settle(ring)
    tail.start()
    assert tail.pack() == 0
    assert ring.packed == tail.end_row == 3


def test_once_it_is_started_no_other_row_is_accepted() -> None:
    ring = ring_of(16, keep_acked=4)
    tail = ClosingTail(ring, enabled=True)
    pack(ring, 1, 2, 3)
    tail.start()
    assert tail.start_row == 3
    ring.next_free_run(1)
    assert not ring.commit(1)
    tail.start()
    assert tail.end_row == 7


def test_a_ring_that_was_stopped_gets_no_more_of_it() -> None:
    ring = ring_of(16, keep_acked=4)
    tail = ClosingTail(ring, enabled=True)
    pack(ring, 1, 2, 3)
    settle(ring)
    tail.start()
    ring.stop()
    assert tail.pack() == 4
    assert ring.packed == 3


class BegunMeanwhile(ClosingTail):
    """Another thread begins and packs it just after somebody saw that it has not begun."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.begun: int | None = None
        super().__init__(ring, enabled=True)

    @property
    def start_row(self) -> int | None:  # type: ignore[override]
        before = self.begun
        if before is None and self.ring.packed:
            settle(self.ring)
            self.begun = self.ring.packed
            self.end_row = self.begun + self.ring.keep_acked
            self.pack()
        return before

    @start_row.setter
    def start_row(self, start_row: int | None) -> None:
        self.begun = start_row


def test_it_never_counts_as_sent() -> None:
    ring = ring_of(16, keep_acked=4)
    tail = BegunMeanwhile(ring)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours, "peer", ring, 16, tail, None)
        pack(ring, 1, 2, 3)
        assert connection.counts().sent == 3
        assert tail.packed == 4
