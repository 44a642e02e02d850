"""Calls that block, how to end them, and checks of the errors they raise."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HANG_TIMEOUT_S = 10.0
"""Far more seconds than any call here takes. A call that takes longer hangs."""


@contextmanager
def running(*calls: Callable[[], object]) -> Iterator[list[BaseException | None]]:
    """Run ``calls`` on threads during the block. Afterwards, check that all of them end soon.

    Yields a list of what each call raised, or None; it is complete after the block.
    """
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
    """Blocks a script until the test opens it."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    def wait(self) -> None:
        assert self._event.wait(HANG_TIMEOUT_S)


@contextmanager
def until(condition: Callable[[], bool]) -> Iterator[None]:
    """After the block, wait until ``condition`` holds. Something outside of this process decides when."""
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
    """Call ``handler`` on alarms during the block, and on none afterwards.

    The exit waits for late alarms. Otherwise one could reach the previous handler, which limits the time of the tests.

    The garbage collector is off. An alarm that strikes in one of its callbacks, such as that of Hypothesis, causes a
    warning.
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
    """Check that an error is exactly of type ``kind`` and names the peer and the count of un-acked samples."""
    assert type(error) is kind
    assert error.unacked == unacked
    assert peer in str(error)
    assert f"{unacked} samples un-acked" in str(error)
