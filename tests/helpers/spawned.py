"""A helper of the tests in a process of its own, and how it is asked: by the name of a method, through a pipe.

The process is spawned, ends when its parent does (it reads from a pipe that then closes), and is ended by its pid.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any, TypeVar

ANSWER_S = 60.0
"""Seconds that the process may take for any answer; only a broken one comes near it."""

_Self = TypeVar("_Self", bound="Spawned")


class Spawned:
    """The process, as a context manager.

    Args:
        main: a module-level function ``(pipe, *arguments)``. It sends one answer when it is ready, then one for each
            request (`answer`), and ends with `end` when the pipe is closed.
    """

    def __init__(self, main: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(main, theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def freeze(self) -> None:
        """``kill -STOP``: the process does nothing any more, while its kernel still answers for it."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """``kill -9``."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(ANSWER_S)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self.kill()
        self._process.close()
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


def _run(main: Callable[..., None], pipe: Pipe, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is for the tests
    try:
        main(pipe, *arguments)
    except (EOFError, BrokenPipeError):  # the parent is gone
        os._exit(0)


def answer(pipe: Pipe, who: Any) -> None:
    """Wait for one request and call the method of ``who`` that it names."""
    name, *arguments = pipe.recv()
    try:
        result = getattr(who, name)(*arguments)
    except Exception as error:
        result = error
    pipe.send(result)
