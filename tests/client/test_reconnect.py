"""`Reconnector` and `Backoff`: when it is tried again, and when no more; with a clock that stands still until told."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest
from clock import Clock

from echo_torch.client import reconnect as reconnect_module
from echo_torch.client.reconnect import BACKOFF_S, Reconnector
from echo_torch.errors import ConnectionClosedError, HandshakeError
from echo_torch.support import deadline as deadline_module
from echo_torch.support.backoff import Backoff
from echo_torch.support.deadline import Deadline


class SleepingClock(Clock):
    """Sleeping moves it on."""

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += max(seconds, 1e-6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SleepingClock:
    made = SleepingClock()
    monkeypatch.setattr(reconnect_module, "time", made)
    monkeypatch.setattr(deadline_module, "time", made)
    return made


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as made:
        yield made


def never() -> bool:
    return False


class Server:
    """Refuses at the first so many tries; knows when each was, and how long it might have taken."""

    def __init__(self, clock: Clock, sock: socket.socket, refuses: float = float("inf")) -> None:
        self.at: list[float] = []
        self.timeouts: list[float] = []
        self._clock, self._sock, self._refuses = clock, sock, refuses

    def __call__(self, deadline: Deadline) -> socket.socket:
        self.at.append(self._clock.now)
        self.timeouts.append(deadline.remaining())
        if len(self.at) <= self._refuses:
            raise ConnectionRefusedError(f"try {len(self.at)}")
        return self._sock


def test_pauses_double_up_to_the_longest_and_vary() -> None:
    """Never less than half of it, never more: many actors that began together do not stay in step."""
    random.seed(1)
    made = [Backoff(0.05, 5.0) for _ in range(200)]
    for expected in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0):
        pauses = [backoff.next_delay() for backoff in made]
        assert expected / 2 <= min(pauses) < 0.55 * expected
        assert 0.95 * expected < max(pauses) <= expected


def test_the_first_try_is_made_at_once_and_the_next_after_pauses(clock: SleepingClock, sock: socket.socket) -> None:
    server = Server(clock, sock, refuses=6)
    reconnector = Reconnector(server, 60.0, 10.0)
    clock.advance(100)
    reconnector.connection_lost(was_useful=False, made_progress=False)
    assert reconnector.connect(never) is sock
    assert reconnector.tries == 7
    gaps = [later - earlier for earlier, later in zip(server.at, server.at[1:], strict=False)]
    assert server.at[0] == 1100.0
    for gap, longest in zip(gaps, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6), strict=True):
        assert longest / 2 <= gap <= longest + 1e-3


def test_when_the_time_has_passed_the_last_error_is_raised(clock: SleepingClock, sock: socket.socket) -> None:
    server = Server(clock, sock)
    reconnector = Reconnector(server, 60.0, 10.0)
    reconnector.connection_lost(was_useful=True, made_progress=True)
    with pytest.raises(ConnectionRefusedError) as caught:
        reconnector.connect(never)
    assert str(caught.value) == f"try {reconnector.tries}"
    assert reconnector.seconds_lost == pytest.approx(60.0, abs=0.01)
    assert len(server.at) == reconnector.tries > 10
    assert server.timeouts[0] == 10.0
    assert server.timeouts[-1] < 10.0  # no try may take longer than what is left
    assert min(server.timeouts) > 0  # nor is one made with no time left, which could only hide why the others failed


def test_what_may_pass_is_tried_again(clock: SleepingClock, sock: socket.socket) -> None:
    answers = iter([ConnectionClosedError("gone"), TimeoutError("late"), socket.gaierror(-3, "try again"), None])

    def dial(_: Deadline) -> socket.socket:
        error = next(answers)
        if error is not None:
            raise error
        return sock

    reconnector = Reconnector(dial, 60.0, None)
    reconnector.connection_lost(was_useful=True, made_progress=True)
    assert reconnector.connect(never) is sock


def test_another_service_is_not_tried_again(clock: SleepingClock) -> None:
    def dial(_: Deadline) -> socket.socket:
        raise HandshakeError("magic")

    reconnector = Reconnector(dial, 60.0, None)
    reconnector.connection_lost(was_useful=True, made_progress=True)
    with pytest.raises(HandshakeError):
        reconnector.connect(never)
    assert reconnector.tries == 1


def test_it_can_be_called_off_at_any_time(clock: SleepingClock, sock: socket.socket) -> None:
    """And nobody is called after that."""
    server = Server(clock, sock)
    reconnector = Reconnector(server, 60.0, None)
    reconnector.connection_lost(was_useful=True, made_progress=True)
    with pytest.raises(ConnectionRefusedError):
        reconnector.connect(lambda: clock.now >= 1003.0)
    assert clock.now == pytest.approx(1003.0, abs=0.06)
    assert server.at[-1] < 1003.0


def test_called_off_before_it_began_nothing_is_tried(clock: SleepingClock, sock: socket.socket) -> None:
    server = Server(clock, sock, refuses=0)
    reconnector = Reconnector(server, 60.0, None)
    reconnector.connection_lost(was_useful=True, made_progress=True)
    with pytest.raises(TimeoutError):
        reconnector.connect(lambda: True)
    assert not server.at


def test_connections_in_vain_share_one_time_and_pause_more_and_more(clock: SleepingClock, sock: socket.socket) -> None:
    server = Server(clock, sock, refuses=0)
    reconnector = Reconnector(server, 10.0, None)
    reconnector.connection_lost(was_useful=True, made_progress=True)

    def open_and_lose() -> None:
        for _ in range(1000):
            reconnector.connect(never)
            reconnector.connection_lost(was_useful=False, made_progress=False)

    with pytest.raises(TimeoutError):
        open_and_lose()
    assert reconnector.seconds_lost >= 10.0
    assert 6 < len(server.at) < 15


@pytest.mark.parametrize("seconds", [0.001, 1.0, 2.0, 60.0])
def test_there_is_time_for_several_tries(clock: SleepingClock, sock: socket.socket, seconds: float) -> None:
    server = Server(clock, sock)
    reconnector = Reconnector(server, seconds, None)
    reconnector.connection_lost(was_useful=True, made_progress=True)
    with pytest.raises(ConnectionRefusedError):
        reconnector.connect(never)
    assert len(server.at) >= 4


@pytest.mark.parametrize(("made_progress", "lived"), [(True, 0.0), (False, BACKOFF_S[1] + 1)])
def test_a_connection_that_was_worth_it_is_opened_again_at_once(
    clock: SleepingClock, sock: socket.socket, made_progress: bool, lived: float
) -> None:
    """And the time begins anew, however often."""
    reconnector = Reconnector(Server(clock, sock, refuses=0), 10.0, None)
    reconnector.connection_lost(was_useful=True, made_progress=True)
    for _ in range(50):
        opened_at = clock.now
        reconnector.connect(never)
        assert clock.now == opened_at
        clock.advance(lived + 0.5)
        reconnector.connection_lost(was_useful=made_progress, made_progress=made_progress)
        assert reconnector.seconds_lost == 0.0


def test_an_idle_connection_that_is_cut_often_is_opened_for_ever_with_pauses(
    clock: SleepingClock, sock: socket.socket
) -> None:
    """It did what there was to do: nothing is wrong but that it does not last."""
    reconnector = Reconnector(Server(clock, sock, refuses=0), 2.0, None)
    reconnector.connection_lost(was_useful=True, made_progress=True)
    began = clock.now
    for _ in range(100):
        reconnector.connect(never)
        reconnector.connection_lost(was_useful=True, made_progress=False)
    assert 100 * 0.25 * 0.9 < clock.now - began < 100 * 0.5
