"""`Leader`: the one of those who wait that polls; `TcpClient`'s tests have it among others."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from echo_torch.client.leader import Leader
from echo_torch.ring.ring import Ring


@pytest.fixture
def leader() -> Iterator[Leader]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        leader = Leader()
        leader.open()
        leader.follow(ours)
        yield leader
        leader.close()


@pytest.mark.parametrize("seconds", [0.0, -1e-9, -0.01])
def test_who_leads_for_no_time_or_for_time_that_is_over_polls_once(leader: Leader, seconds: float) -> None:
    """The time may be over by when it is looked at; ``poll`` would take less than none for ever."""
    waiter = Ring(memoryview(bytearray(8)), 8).enlist(1)
    began = time.monotonic()
    assert leader.lead(waiter, seconds)
    assert time.monotonic() - began < 10.0
