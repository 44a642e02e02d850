"""What it costs to send from a loader's workers, as a table of ``benchmark.py``.

A loop over a ``DataLoader`` of 4 persistent workers, whose collate function computes for a while, as one that decodes
and augments does, and so is what the loop waits for. Compared with the same loop that sends nothing:

* ``sink``: ``collate_fn=sink.collate(...)``, and ``sink.wait()`` at the end of the epoch;
* ``sink, not forwarded``: the same with ``forward=False``: batches do not go to the main process;
* ``stock``: ``echo.TcpClient`` in the collate function, made in each worker at its first batch, for a client that is
  forked or pickled does not work; sample by sample, and nobody knows in the end what of it was acknowledged.
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
# Seconds of computing per sample, and samples of which size: 200 us is little, decoding one JPEG takes milliseconds.
COMPUTED = ((200e-6, "1KB"), (200e-6, "28KB"), (1e-3, "28KB"))
# Seconds of computing in an epoch, for each second that a round of other tables is to take. With a quarter of one, an
# epoch takes about a second, beside which its beginning and end are little.
EPOCH = 6.4

Epoch = Callable[[], int]
"""Iterates once; gives how many samples it saw."""


class Computes:
    """A collate function that uses the processor for so many seconds per sample."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, samples: list[Any]) -> Any:
        batch = default_collate(samples)
        until = time.process_time() + self._seconds * len(samples)
        while time.process_time() < until:
            pass
        return batch


class SendsStock:
    """Another collate function, whose samples are sent by a stock client of each worker's own."""

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
    """One batch's samples over and over, for a whole epoch."""
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
    """Rows of the table: for each case and sender its samples/s, and the share of the rate of who sends nothing.

    Senders take turns; each is compared with the loops without one just before and after.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than a small machine has cores
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
