"""Calls that block, what ends them, and what they say then."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HANG_TIMEOUT_S = 10.0
"""Far more than anything here takes; what passes it hangs."""


@contextmanager
def running(*calls: Callable[[], object]) -> Iterator[list[BaseException | None]]:
    """Run ``calls`` on threads during the block; afterwards all must end soon, and the list says how each did."""
    outcomes: list[BaseException | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            calls[index]()
        except BaseException as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    yield outcomes
    for thread in threads:
        thread.join(HANG_TIMEOUT_S)
        assert not thread.is_alive(), "a call hangs"


class Gate:
    """Lets a script go on when the test says so."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    def wait(self) -> None:
        assert self._event.wait(HANG_TIMEOUT_S)


@contextmanager
def until(condition: Callable[[], bool]) -> Iterator[None]:
    """After the block, wait until ``condition`` holds, which something outside of this process's control decides."""
    yield
    eventually(condition)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + HANG_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "condition never held"
        time.sleep(0.002)


@contextmanager
def alarms(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Have ``handler`` called at alarms; after the block, for none any more.

    One that is late shall not strike whoever handles them otherwise, which is what bounds the time of the tests. The
    garbage collector rests: whoever has it call back, as Hypothesis does, can be struck there, which warns.
    """
    gc.disable()
    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(0.02)
        signal.signal(signal.SIGALRM, before)
        gc.enable()


def check_error(error: Any, kind: type[BaseException], peer: str, unacked: int) -> None:
    """Check an error's type, which must be exactly ``kind``, and that it names the peer and the count."""
    assert type(error) is kind
    assert error.unacked == unacked
    assert peer in str(error)
    assert f"{unacked} samples un-acked" in str(error)
