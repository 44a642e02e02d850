"""What it costs a learner to take its batches as tensors, as a table of ``benchmark.py``.

One process feeds servers as fast as it can. This process takes the batches, in turns, as

* ``raw``: ``server.sample()``, numpy views that are valid until the next batch;
* ``raw + copy``: the same, with each leaf copied into existing memory. To keep a batch costs at least this much;
* ``EchoDataset``, and ``copy=False``.

There are two measurements. In the first, the learner takes batches as fast as they come: the whole time of a batch. In
the second, it works elsewhere for twice the slowest of those times, while the rings of the servers fill up: the time
that a batch then delays it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import echo
import numpy as np
import optree
from benchmark_rounds import timed
from benchmark_senders import HOST, Case, cases

from echo_torch import EchoDataset, EchoSink

CASES = ("29B", "28KB", "602KB")
# Batches per round of the learner that works in between.
BUSY_BATCHES = 20

Take = Callable[[], object]


def feed(ports: list[int], case: Case) -> None:
    def send(port: int) -> None:
        with EchoSink.from_batch(HOST, port, case.batch) as sink:
            while True:
                sink.send(case.batch)

    # Stay here until killed, because sinks end with a process that returns.
    with ThreadPoolExecutor(len(ports)) as pool:
        list(pool.map(send, ports))


@contextlib.contextmanager
def fed_servers(case: Case, count: int) -> Iterator[list[echo.Server]]:
    """Start one server for each way, because only one consumer may take from a server.

    A server that waits is full and costs nothing.
    """
    servers = [
        echo.Server(case.example, batch_size=case.size, transport=echo.TcpTransport(port=0)) for _ in range(count)
    ]
    for server in servers:
        server.start()
    ports = [server.port for server in servers]
    process = multiprocessing.get_context("spawn").Process(target=feed, args=(ports, case), daemon=True)
    process.start()
    try:
        yield servers
    finally:
        process.kill()
        process.join()
        for server in servers:
            server.close()


def ways(servers: list[echo.Server], case: Case) -> dict[str, Take]:
    example = {name: leaf[0] for name, leaf in case.batch.items()}
    memory = [np.zeros_like(leaf.numpy()) for leaf in optree.tree_leaves(case.batch)]
    raw, kept, copied, shared = servers

    def keep() -> None:
        for target, leaf in zip(memory, optree.tree_leaves(kept.sample().batch), strict=True):
            np.copyto(target, leaf)

    return {
        "raw": raw.sample,
        "raw + copy": keep,
        "EchoDataset": iter(EchoDataset(copied, example)).__next__,
        "copy=False": iter(EchoDataset(shared, example, copy=False)).__next__,
    }


def us_per_batch(take: Take, seconds: float) -> float:
    take()
    began, count = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        take()
        count += 1
    return took / count * 1e6


def us_held_up(take: Take, work_s: float) -> float:
    times = []
    for _ in range(BUSY_BATCHES):
        time.sleep(work_s)
        times.append(timed(take))
    return statistics.median(times) * 1e6


def dataset_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in (cases()[name] for name in CASES if name in options.cases):
        with fed_servers(case, 4) as servers:
            takes = ways(servers, case)
            fast: dict[str, list[float]] = {name: [] for name in takes}
            busy: dict[str, list[float]] = {name: [] for name in takes}
            for _ in range(options.rounds):
                for name, take in takes.items():
                    fast[name].append(us_per_batch(take, options.seconds / 2))
            work_s = 2e-6 * max(map(statistics.median, fast.values()))
            for _ in range(options.rounds):
                for name, take in takes.items():
                    busy[name].append(us_held_up(take, work_s))
        least = statistics.median(fast["raw + copy"])
        for name in takes:
            us = statistics.median(fast[name])
            row = {"case": case.name, "B": case.size, "way": name, "batch_us": us, "vs_copied": us / least}
            yield {**row, "held_up_us": statistics.median(busy[name])}
