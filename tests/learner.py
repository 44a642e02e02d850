"""A real ``echo.Server`` in a process of its own, that keeps what it receives.

The process is spawned, ends when its parent does (it reads from a pipe that then closes), and is ended by its pid.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection as Pipe
from typing import Any

import echo
import numpy as np
import optree

ANSWER_S = 60.0
"""Seconds that the process may take for any answer; only a broken one comes near it."""


class Learner:
    """The server process, as a context manager.

    Args:
        example: pytree of numpy arrays.
        batch_size: the server's; it hands samples out only in full batches, so tests send a multiple of it.
        options: further arguments of ``echo.Server``.
    """

    def __init__(self, example: Any, batch_size: int = 32, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, example, batch_size, options), daemon=True)
        self._process.start()
        theirs.close()
        self.port: int = self._answer()

    def take(self, samples: int) -> Any:
        """Wait until ``samples`` samples were received since the start; gives all of them, leaves ``(n, *shape)``."""
        return self._ask("take", samples)

    def received(self) -> int:
        """How many samples were received so far."""
        return self._ask("received")

    def pause(self) -> None:
        """Stop draining, after the batch that is being waited for."""
        self._ask("pause")

    def resume(self) -> None:
        self._ask("resume")

    def stop_server(self) -> None:
        """``server.close()``; the process lives on."""
        self._ask("stop_server")

    def kill(self) -> None:
        """``kill -9``."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(ANSWER_S)

    def __enter__(self) -> Learner:
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
            raise TimeoutError(f"the learner did not answer within {ANSWER_S:g} s")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class _Store:
    """The server and the batches that it gave, drained by a thread."""

    def __init__(self, example: Any, batch_size: int, options: dict[str, Any]) -> None:
        transport = echo.TcpTransport(port=0)
        self.server = echo.Server(example, batch_size=batch_size, transport=transport, **options)
        self.server.start()
        self._batch_size = batch_size
        self._batches: list[Any] = []
        self._arrived = threading.Condition()
        self._draining = threading.Event()
        self._draining.set()
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while self._draining.wait() and (sample := self.server.sample()) is not None:
            batch = optree.tree_map(np.copy, sample.batch)
            with self._arrived:
                self._batches.append(batch)
                self._arrived.notify_all()

    def take(self, samples: int) -> Any:
        with self._arrived:
            if not self._arrived.wait_for(lambda: self.received() >= samples, ANSWER_S / 2):
                raise TimeoutError(f"{self.received()} of {samples} samples arrived")
            return optree.tree_map(lambda *leaves: np.concatenate(leaves), *self._batches)

    def received(self) -> int:
        return len(self._batches) * self._batch_size

    def pause(self) -> None:
        self._draining.clear()

    def resume(self) -> None:
        self._draining.set()

    def stop_server(self) -> None:
        self.server.close()


def _serve(pipe: Pipe, example: Any, batch_size: int, options: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is for the tests
    store = _Store(example, batch_size, options)
    pipe.send(store.server.port)
    with contextlib.suppress(EOFError, OSError):
        while True:
            name, *arguments = pipe.recv()
            try:
                pipe.send(getattr(store, name)(*arguments))
            except Exception as error:
                pipe.send(error)
    os._exit(0)
