"""A real ``echo.Server`` in its own process, which keeps what it receives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any

import echo
import numpy as np
import optree
from spawned import ANSWER_S, HelperProcess, answer_request

Digest = Callable[[Any], Any]


class Learner(HelperProcess):
    """The server process, as a context manager.

    Args:
        example: pytree of numpy arrays.
        batch_size: the server's. It hands out full batches only, so tests send a multiple of it.
        port: where it listens; 0 lets the system choose.
        busy: seconds that it takes over each batch.
        digest: a module-level function that returns what to keep of a batch; None keeps a copy of all of it.
        options: further arguments of ``echo.Server``.
    """

    def __init__(
        self,
        example: Any,
        batch_size: int = 32,
        *,
        port: int = 0,
        busy: float = 0.0,
        digest: Digest | None = None,
        **options: Any,
    ) -> None:
        super().__init__(_serve, example, batch_size, port, busy, digest, options)
        self.port: int = self._answer()

    def take(self, samples: int) -> Any:
        """Wait until ``samples`` samples arrived since the start. Return all samples, leaves ``(n, *shape)``."""
        return self._ask("take", samples)

    def received(self) -> int:
        """Return how many samples arrived so far."""
        return self._ask("received")

    def fill(self, sample: Any) -> None:
        """Have the process submit a whole batch of ``sample`` to its own server."""
        self._ask("fill", sample)

    def pause(self) -> None:
        """Stop draining after the batch that the server is waiting for."""
        self._ask("pause")

    def resume(self) -> None:
        self._ask("resume")

    def stop_server(self) -> None:
        """Call ``server.close()``. The process keeps running."""
        self._ask("stop_server")


class _Store:
    """The server and its batches so far. A thread drains it."""

    def __init__(
        self, example: Any, batch_size: int, port: int, busy: float, digest: Digest | None, options: dict[str, Any]
    ) -> None:
        transport = echo.TcpTransport(port=port)
        self.server = echo.Server(example, batch_size=batch_size, transport=transport, **options)
        self.server.start()
        self._batch_size = batch_size
        self._busy = busy
        self._digest = digest or _copy
        self._batches: list[Any] = []
        self._arrived = threading.Condition()
        self._draining = threading.Event()
        self._draining.set()
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while self._draining.wait() and (sample := self.server.sample()) is not None:
            batch = self._digest(sample.batch)
            with self._arrived:
                self._batches.append(batch)
                self._arrived.notify_all()
            if self._busy:
                time.sleep(self._busy)

    def take(self, samples: int) -> Any:
        with self._arrived:
            if not self._arrived.wait_for(lambda: self.received() >= samples, ANSWER_S / 2):
                raise TimeoutError(f"{self.received()} of {samples} samples arrived")
            return optree.tree_map(lambda *leaves: np.concatenate(leaves), *self._batches)

    def received(self) -> int:
        return len(self._batches) * self._batch_size

    def fill(self, sample: Any) -> None:
        for _ in range(self._batch_size):
            self.server.submit(sample)

    def pause(self) -> None:
        self._draining.clear()

    def resume(self) -> None:
        self._draining.set()

    def stop_server(self) -> None:
        self.server.close()


def _copy(batch: Any) -> Any:
    return optree.tree_map(np.copy, batch)


def _serve(pipe: Pipe, *arguments: Any) -> None:
    store = _Store(*arguments)
    pipe.send(store.server.port)
    while True:
        answer_request(pipe, store)
