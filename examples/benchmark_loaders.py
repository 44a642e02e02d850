"""What it costs to send from a loader's workers, as a table of ``benchmark.py``.

A loop runs over a ``DataLoader`` of 4 persistent workers. The collate function computes for a while, like one that
decodes and augments, so the loop waits for the workers. These are compared with the same loop that sends nothing:

* ``sink``: ``collate_fn=sink.collate(...)``, and ``sink.wait()`` at the end of the epoch;
* ``sink, not forwarded``: the same with ``forward=False``, so that batches do not go to the main process;
* ``stock``: ``echo.TcpClient`` in the collate function, sample by sample. Each worker makes its own at its first batch,
  because a client does not survive a fork or pickling. In the end, nobody knows how much was acknowledged.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import echo
import torch
from benchmark_senders import HOST, Case, PeerProcess, cases
from torch.utils.data import DataLoader, default_collate

from echo_torch import EchoSink, numpy_example

WORKERS = 4
# Seconds of computing per sample, and the case. 200 us is little: to decode one JPEG takes milliseconds.
COMPUTED = ((200e-6, "1KB"), (200e-6, "28KB"), (1e-3, "28KB"))
# Seconds of computing per epoch, for each second that a round of other tables takes. With rounds of 0.25 s, an epoch
# takes about a second, which makes its beginning and end negligible.
EPOCH = 6.4

Epoch = Callable[[], int]
"""Iterates once and returns how many samples it saw."""


class Computes:
    """A collate function that uses the processor for a fixed time per sample."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, samples: list[Any]) -> Any:
        batch = default_collate(samples)
        until = time.process_time() + self._seconds * len(samples)
        while time.process_time() < until:
            pass
        return batch


class SendsStock:
    """A collate function that also sends its samples with a stock client, one client per worker."""

    def __init__(self, port: int, collate: Computes) -> None:
        self._port = port
        self._collate = collate
        self._clients: dict[int, Any] = {}

    def __call__(self, samples: list[Any]) -> Any:
        client = self._clients.get(os.getpid())
        if client is None:
            client = echo.TcpClient(HOST, self._port, numpy_example(samples[0]))
            self._clients[os.getpid()] = client
        batch = self._collate(samples)
        for sample in samples:
            client.send({name: leaf.numpy() for name, leaf in sample.items()})
        return batch


def samples_of(case: Case) -> list[dict[str, torch.Tensor]]:
    return [{name: leaf[row] for name, leaf in case.batch.items()} for row in range(case.size)]


def loader(case: Case, batches: int, collate: Any) -> DataLoader[Any]:
    """Return a loader that repeats one batch's samples for a whole epoch."""
    samples: Any = samples_of(case) * batches
    return DataLoader(samples, case.size, num_workers=WORKERS, persistent_workers=True, collate_fn=collate)


@contextmanager
def without(port: int, case: Case, batches: int, computes: Computes) -> Iterator[Epoch]:
    made = loader(case, batches, computes)
    yield lambda: sum(len(batch["reward"]) for batch in made)


@contextmanager
def stock(port: int, case: Case, batches: int, computes: Computes) -> Iterator[Epoch]:
    made = loader(case, batches, SendsStock(port, computes))
    yield lambda: sum(len(batch["reward"]) for batch in made)


@contextmanager
def with_sink(port: int, case: Case, batches: int, computes: Computes, forward: bool) -> Iterator[Epoch]:
    with EchoSink(HOST, port, samples_of(case)[0]) as sink:
        made = loader(case, batches, sink.collate(computes, forward=forward))

        def epoch() -> int:
            seen = sum(len(batch["reward"]) if forward else batch.samples for batch in made)
            sink.wait()
            return seen

        yield epoch


SENDERS: dict[str, Callable[..., Any]] = {
    "no sending": without,
    "sink": functools.partial(with_sink, forward=True),
    "sink, not forwarded": functools.partial(with_sink, forward=False),
    "stock": stock,
}


def rate(epoch: Epoch) -> float:
    began = time.perf_counter()
    return epoch() / (time.perf_counter() - began)


def loader_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table, one per case and sender.

    "kept" is the share that a sender keeps of the rate without sending.
    Senders take turns. Each is compared with the loops without a sender just before and after it.
    """
    # Ignore the warning about more workers than a small machine has cores.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    for compute, name in COMPUTED[:1] if options.quick else COMPUTED:
        case = cases()[name]
        batches = WORKERS * max(1, round(EPOCH * options.seconds / (compute * case.size * WORKERS)))
        with PeerProcess("real", case) as peer, ExitStack() as stack:
            epochs = {
                sender: stack.enter_context(make(peer.port, case, batches, Computes(compute)))
                for sender, make in SENDERS.items()
            }
            alone = epochs.pop("no sending")
            for epoch in (alone, *epochs.values()):
                epoch()  # starts the workers
            rates: dict[str, list[float]] = {sender: [] for sender in epochs}
            kept: dict[str, list[float]] = {sender: [] for sender in epochs}
            before = rate(alone)
            for _ in range(options.rounds):
                for sender, epoch in epochs.items():
                    found, after = rate(epoch), rate(alone)
                    rates[sender].append(found)
                    kept[sender].append(found / ((before + after) / 2))
                    before = after
            for sender in epochs:
                figures = {
                    "samples_s": statistics.median(rates[sender]),
                    "kept": statistics.median(kept[sender]),
                }
                yield {"case": name, "compute_us": compute * 1e6, "sender": sender, **figures}
