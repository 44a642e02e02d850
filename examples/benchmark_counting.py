"""What `EchoSink.send` pays to know where its time goes, as a table of ``benchmark.py``.

Times are differences between readings of the clock. This counts the readings in a ``send``, including those for limits
and pauses, and measures what one reading costs together with the addition that follows it.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from benchmark_rounds import batches_in, timed
from benchmark_senders import PeerProcess, cases, sink

# Samples per ``send``: one, as an actor sends them, and batches.
CASES = (("29B", 1), ("29B", 256), ("1KB", 256), ("28KB", 64))
# How many readings are timed together.
READINGS = 10_000


def readings_in(call: Callable[[], Any]) -> int:
    """Return how often this thread reads the clock during ``call``."""
    thread, readings, clock = threading.get_ident(), 0, time.monotonic

    def counting() -> float:
        nonlocal readings
        readings += threading.get_ident() == thread
        return clock()

    with mock.patch("time.monotonic", counting):
        call()
    return readings


class Total:
    seconds = 0.0


def seconds_per_reading() -> float:
    """Return the cost of one reading, including the sum that it is added to."""
    names = {"total": Total(), "time": time}
    return min(timeit.repeat("total.seconds += time.monotonic()", number=READINGS, repeat=5, globals=names)) / READINGS


def counting_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, size in CASES:
        case = cases()[name].cut(size)
        with PeerProcess("null", case) as peer, sink(peer.port, case.batch) as (send, wait):
            count = batches_in(send, wait, options.seconds)
            send_us = statistics.median(timed(send) for _ in range(count)) * 1e6
            wait()
            readings = statistics.mean(readings_in(send) for _ in range(count // 10 + 1))
            wait()
        reading_us = seconds_per_reading() * 1e6
        yield {
            "case": f"{size} x {name}",
            "send_us": send_us,
            "readings": readings,
            "reading_us": reading_us,
            "share": readings * reading_us / send_us,
        }
