"""One round of one sender, for the tables of ``benchmark.py``: how long it took, and what it used."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmark_senders import Calls, Case, cpu_seconds

# Least seconds of a warm-up, which also tells how many batches a round has.
WARM_UP_S = 0.05


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def batches_in(send: Callable[[], Any], wait: Callable[[], Any], seconds: float) -> int:
    """Warm up, and return how many batches it takes ``seconds`` to send and to see acked.

    It is a number and not a time, because a sender with a large buffer could accept in a second what takes a minute to
    ack.
    """
    count = 1
    while (took := send_all(count, send, wait)) < WARM_UP_S:
        count *= 2
    return max(1, round(count * seconds / took))


def send_all(count: int, send: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Send one batch ``count`` times and wait. Return how many seconds that took."""
    began = time.perf_counter()
    for _ in range(count):
        send()
    wait()
    return time.perf_counter() - began


def measure(calls: Calls, peer_cpu: Callable[[], float], case: Case, seconds: float) -> dict[str, float]:
    """Send for about ``seconds`` and return the figures of that round.

    ``peer_cpu`` returns the CPU seconds of the peer.
    """
    send, wait = calls
    count = batches_in(send, wait, seconds)
    # Do an uncounted round of the same length first, so that the memory of all buffers exists.
    send_all(count, send, wait)
    peer_before, cpu, began = peer_cpu(), cpu_seconds(), time.perf_counter()
    blocked = [timed(send) for _ in range(count)]
    wait()
    wall = time.perf_counter() - began
    cpu = cpu_seconds() - cpu
    samples = case.size * count
    return {
        "samples_s": samples / wall,
        "mb_s": samples * case.payload / 1e6 / wall,
        "cpu_us": cpu / samples * 1e6,
        "blocked_us": statistics.mean(blocked) * 1e6,
        "in_wait": 1 - sum(blocked) / wall,
        "peer_busy": (peer_cpu() - peer_before) / wall,
    }
