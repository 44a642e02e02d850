"""A helper of the tests in its own process, which the test calls by method name through a pipe.

The process comes from the `nursery`. It ends when the tests do, because the pipe that it reads from then closes. Tests
end it by its pid.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any, TypeVar

from nursery import NURSERY

ANSWER_S = 60.0
"""Seconds that the process may take for an answer. Only a broken one comes near it."""

_Self = TypeVar("_Self", bound="HelperProcess")


class HelperProcess:
    """The process, as a context manager.

    Args:
        main: a module-level function ``(pipe, *arguments)``. It sends one answer when it is ready, and then one for
            each request, with `answer_request`. Reading from a closed pipe ends it.
    """

    def __init__(self, main: Callable[..., None], *arguments: Any) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self._pid = NURSERY.start(_run, theirs, main, *arguments)
        self._ended = False

    def freeze(self) -> None:
        """Send SIGSTOP and wait until the process stops. Its kernel still answers for it."""
        os.kill(self._pid, signal.SIGSTOP)
        NURSERY.wait_for_stop(self._pid)

    def thaw(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL and wait until the process ends."""
        os.kill(self._pid, signal.SIGKILL)
        NURSERY.collect(self._pid)
        self._ended = True

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            self.kill()
        self._pipe.close()

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"{type(self).__name__} did not answer within {ANSWER_S:g} s")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _run(pipe: Pipe, main: Callable[..., None], *arguments: Any) -> None:
    # Ctrl-C at the terminal is for the tests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        main(pipe, *arguments)
    except (EOFError, BrokenPipeError):  # the parent is gone
        os._exit(0)


def answer_request(pipe: Pipe, who: Any) -> None:
    """Wait for one request, call the method of ``who`` that it names, and send the result or the error."""
    name, *arguments = pipe.recv()
    try:
        result = getattr(who, name)(*arguments)
    except Exception as error:
        result = error
    pipe.send(result)
