"""`WakeUp`: no kick is ever lost, whatever comes between, and none reaches a descriptor that is somebody else's."""

from __future__ import annotations

import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
from learner_process import Learner

from echo_torch import TcpClient
from echo_torch.client.wakeup import AckPoller, WakeUp
from echo_torch.ring.ring import Ring
from echo_torch.support.interrupts import owned_by_this_thread

pytestmark = pytest.mark.usefixtures("descriptors")

SOON_S = 10.0
STRESS_S = 1.0


@pytest.fixture
def wake_up() -> Iterator[WakeUp]:
    made = WakeUp()
    made.open()
    yield made
    made.close()


def readable(wake_up: WakeUp) -> bool:
    poller = select.poll()
    poller.register(wake_up.reader.fileno(), select.POLLIN)
    return bool(poller.poll(0))


class WakesWhileRead:
    """A reader in the middle of whose ``recv`` another thread kicks: before the bytes are taken, or after."""

    def __init__(self, wake_up: WakeUp, before: bool) -> None:
        self._wake_up = wake_up
        self._reader = wake_up.reader
        self._before = before

    def recv(self, size: int) -> bytes:
        if self._before:
            self._wake()
        data = self._reader.recv(size)
        if not self._before:
            self._wake()
        return data

    def _wake(self) -> None:
        thread = threading.Thread(target=self._wake_up.wake)
        thread.start()
        thread.join(SOON_S)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def test_wake_makes_the_reader_readable_until_it_is_cleared(wake_up: WakeUp) -> None:
    for _ in range(3):
        assert not readable(wake_up)
        wake_up.wake()
        wake_up.wake()
        assert readable(wake_up)
        wake_up.clear(True)


@pytest.mark.parametrize("before", [True, False], ids=["before the bytes are taken", "after"])
def test_a_wake_during_clear_swallows_no_later_one(wake_up: WakeUp, before: bool) -> None:
    """The sleeper looks at everything once it has seen: so that kick itself may be taken for seen, but no later one."""
    wake_up.wake()
    reader = wake_up.reader
    wake_up.reader = WakesWhileRead(wake_up, before)  # type: ignore[assignment]
    wake_up.clear(True)
    wake_up.reader = reader
    wake_up.wake()
    assert readable(wake_up)


@pytest.mark.parametrize("line", range(4))
def test_an_interrupted_wake_swallows_none_after_the_sleeper_woke_by_itself(wake_up: WakeUp, line: int) -> None:
    """Struck before its ``line``-th line, it may have said that it kicked without having done so."""
    lines = 0

    def strike(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code is not WakeUp.wake.__code__:
            return None
        if event == "line":
            lines += 1
            if lines > line:
                raise KeyboardInterrupt
        return strike

    before = sys.gettrace()
    sys.settrace(strike)
    try:
        with pytest.raises(KeyboardInterrupt):
            wake_up.wake()
    finally:
        sys.settrace(before)
    assert not owned_by_this_thread(wake_up.lock)
    wake_up.clear(readable(wake_up))
    wake_up.wake()
    assert readable(wake_up)


def test_no_wake_of_many_is_lost() -> None:
    """The sleeper must see each thing that was posted before a kick, with threads switched all the time."""
    wake_up = WakeUp()
    wake_up.open()
    posted = 0
    seen = threading.Semaphore(0)
    interval = sys.getswitchinterval()

    def sleep() -> None:
        poller = select.poll()
        poller.register(wake_up.reader, select.POLLIN)
        looked = 0
        while looked >= 0:
            wake_up.clear(bool(poller.poll(SOON_S * 1000)))
            while looked != posted:
                looked = posted
                seen.release()

    sys.setswitchinterval(1e-6)
    sleeper = threading.Thread(target=sleep, daemon=True)
    sleeper.start()
    try:
        end = time.monotonic() + STRESS_S
        while time.monotonic() < end:
            posted += 1
            for _ in range(5):
                wake_up.wake()
            assert seen.acquire(timeout=SOON_S / 2), "a kick was lost"
    finally:
        sys.setswitchinterval(interval)
        posted = -1
        wake_up.wake()
        sleeper.join(2 * SOON_S)
        wake_up.close()
    assert not sleeper.is_alive()


def test_wakes_after_close_reach_nobody() -> None:
    """The descriptors are somebody else's by then."""
    wake_up = WakeUp()
    wake_up.open()
    wake_up.close()
    pairs = [socket.socketpair() for _ in range(4)]
    try:
        for _ in range(3):
            wake_up.wake()
        assert not select.select([sock for pair in pairs for sock in pair], [], [], 0)[0]
        wake_up.clear(True)
        wake_up.wake()
        wake_up.close()
    finally:
        for pair in pairs:
            for sock in pair:
                sock.close()


def test_the_lock_tells_the_thread_that_is_inside() -> None:
    answers: list[bool] = []

    class Asks(WakeUp):
        def detach_after_fork(self) -> None:
            answers.append(owned_by_this_thread(self.lock))
            other = threading.Thread(target=lambda: answers.append(owned_by_this_thread(self.lock)))
            other.start()
            other.join(SOON_S)
            super().detach_after_fork()

    wake_up = Asks()
    assert not owned_by_this_thread(wake_up.lock)
    wake_up.close()
    assert answers == [True, False]
    assert not owned_by_this_thread(wake_up.lock)


# The one of those who wait that polls; ``TcpClient``'s tests have it among others.


@pytest.fixture
def ack_poller() -> Iterator[AckPoller]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ack_poller = AckPoller()
        ack_poller.open()
        ack_poller.set_socket(ours)
        yield ack_poller
        ack_poller.close()


@pytest.mark.parametrize("seconds", [0.0, -1e-9, -0.01])
def test_polling_for_no_time_or_a_time_that_has_passed_polls_once(ack_poller: AckPoller, seconds: float) -> None:
    """The time may be over by when it is looked at; ``poll`` would take less than none for ever."""
    waiter = Ring(memoryview(bytearray(8)), 8).add_waiter(1)
    began = time.monotonic()
    assert ack_poller.try_poll_socket(waiter, seconds)
    assert time.monotonic() - began < 10.0


def test_a_caller_does_not_poll_while_the_io_thread_reads_its_acks(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would return at once, again and again, and keep the GIL from the I/O thread: 25 polls for each sample."""
    polls, poll = 0, AckPoller.try_poll_socket

    def count_and_poll(*arguments: Any) -> bool:
        nonlocal polls
        polls += 1
        return poll(*arguments)

    monkeypatch.setattr(AckPoller, "try_poll_socket", count_and_poll)
    sample, count = {"x": np.zeros(29, np.uint8)}, 5000
    with Learner(sample, batch_size=100, digest=len) as learner, TcpClient("127.0.0.1", learner.port, sample) as client:
        for _ in range(count):
            client.send(sample)
        client.wait()
    assert polls < 2 * count
