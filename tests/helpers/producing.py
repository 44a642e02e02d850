"""Processes with many sinks each, like actors that step many environments; for test_producers.

They import little, because each process is spawned and imports take longer than the work.
"""

from __future__ import annotations

import os
import threading
from multiprocessing.connection import Connection as Pipe
from typing import Any

import numpy as np
from spawned import HelperProcess, answer_request

from echo_torch import EchoSink

SINKS = 50
"""Sinks of each process."""
BATCHES = 8
BATCH = 32
EXAMPLE = {"index": np.zeros((), np.int64), "obs": np.zeros(100, np.uint8), "sink": np.zeros((), np.int64)}
BUFFER_BYTES = 64 * 116
"""Two batches, so that `send` has to wait."""


class SinkProcess(HelperProcess):
    """A process with sinks numbered from ``first`` on, none of them connected. It may not be ready yet."""

    def __init__(self, port: int, first: int) -> None:
        super().__init__(_run, port, first)

    def start_call(self, *request: Any) -> None:
        """Send a request without waiting for the answer."""
        self._pipe.send(request)

    def result(self) -> Any:
        """Return the answer to the latest request. The first answer belongs to no request: the process is ready."""
        return self._answer()


class _Sinks:
    def __init__(self, port: int, first: int) -> None:
        self._before = _threads_and_descriptors()
        self._sinks = {
            number: EchoSink("127.0.0.1", port, EXAMPLE, buffer_bytes=BUFFER_BYTES)
            for number in range(first, first + SINKS)
        }

    def connect(self) -> int:
        """Connect all sinks at once. Return how many threads that added."""
        errors: list[Exception] = []

        def connect(sink: EchoSink) -> None:
            try:
                sink.connect()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=connect, args=(sink,)) for sink in self._sinks.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return _threads_and_descriptors()[0] - self._before[0]

    def send(self) -> int:
        """Send from the sinks in turns. Return how many samples were acked."""
        for first in range(0, BATCHES * BATCH, BATCH):
            for number, sink in self._sinks.items():
                obs = np.full((BATCH, 100), number, np.uint8)
                sink.send({"index": np.arange(first, first + BATCH), "obs": obs, "sink": np.full(BATCH, number)})
        for sink in self._sinks.values():
            sink.wait()
        return sum(sink.stats().samples_acked for sink in self._sinks.values())

    def close(self) -> tuple[int, int]:
        """Close the sinks. Return how many more threads and descriptors there are than at the start."""
        for sink in self._sinks.values():
            sink.close()
        threads, descriptors = _threads_and_descriptors()
        return threads - self._before[0], descriptors - self._before[1]


def _threads_and_descriptors() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def _run(pipe: Pipe, port: int, first: int) -> None:
    sinks = _Sinks(port, first)
    pipe.send(None)
    while True:
        answer_request(pipe, sinks)
