"""`EchoDataset` with a real GPU. test_dataset has the order of things on a fake one, for machines without."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import echo
import numpy as np
import pytest
import torch
from spawned import ANSWER_S

from echo_torch import EchoDataset, numpy_example

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BATCH = 32
EXAMPLE = {
    "half": torch.zeros(1 << 12, dtype=torch.bfloat16),
    "id": torch.tensor(0),
    "mask": torch.tensor(True),
    "none": torch.zeros(0),
}
LATE_CYCLES = 20_000_000
"""For a kernel that keeps a stream busy for some 10 ms."""


@contextlib.contextmanager
def filling(count: int, **options: Any) -> Iterator[echo.Server]:
    """A server that gets ``count`` batches, numbered, from a thread."""
    server = echo.Server(numpy_example(EXAMPLE), batch_size=BATCH, num_buffers=2, **options)

    def fill() -> None:
        for number in range(count):
            half = np.full(1 << 12, number, np.float32).view(np.uint32) >> 16  # exact: it is less than 256
            sample = {"id": np.array(number), "mask": np.array(number % 2 == 1), "none": np.zeros(0, np.float32)}
            for _ in range(BATCH):
                server.submit({**sample, "half": half.astype(np.uint16)})

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield server
    finally:
        thread.join(ANSWER_S)
        server.close()
        assert not thread.is_alive()


def check(batch: Any, number: int) -> None:
    assert {leaf.device for leaf in batch.values()} == {torch.device("cuda", 0)}
    assert (batch["half"].dtype, batch["none"].shape) == (torch.bfloat16, (BATCH, 0))
    assert (batch["half"] == number).all()
    assert (batch["id"] == number).all()
    assert (batch["mask"] == (number % 2 == 1)).all()


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("copy", [True, False])
def test_batches_on_the_gpu_are_the_callers(pinned: bool, copy: bool) -> None:
    torch.cuda.init()
    with filling(50, pin_host_memory=pinned) as server:
        kept = list(itertools.islice(EchoDataset(server, EXAMPLE, device="cuda", copy=copy), 50))
    for number, batch in enumerate(kept):
        check(batch, number)


def test_memory_of_a_batch_that_is_dropped_is_kept_for_what_still_reads_it() -> None:
    """In the stream that was current when it came, and is far behind; the next batches would have that memory."""
    torch.cuda.init()
    count, stream = 50, torch.cuda.Stream()
    sums = torch.zeros(count, device="cuda")
    torch.cuda.synchronize()
    with filling(count, pin_host_memory=True) as server, torch.cuda.stream(stream):
        for number, batch in enumerate(itertools.islice(EchoDataset(server, EXAMPLE, device="cuda"), count)):
            torch.cuda._sleep(LATE_CYCLES)
            sums[number] = batch["half"].float().mean()
            del batch
    stream.synchronize()
    assert torch.equal(sums.cpu(), torch.arange(count).float())


def test_batches_come_while_a_graph_is_captured() -> None:
    torch.cuda.init()
    graph, memory = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
    with filling(4) as server:
        batches = iter(EchoDataset(server, EXAMPLE, device="cuda"))
        check(next(batches), 0)  # and the next one is taken ahead meanwhile
        with torch.cuda.graph(graph):
            memory += 1
        for number in (1, 2, 3):
            check(next(batches), number)
    graph.replay()
    assert (memory == 1).all()


def test_the_device_that_is_current_is_the_one_that_is_meant() -> None:
    with filling(1) as server:
        dataset = EchoDataset(server, EXAMPLE, device="cuda")
        (batch,) = itertools.islice(dataset, 1)
        assert batch["id"].device == torch.device("cuda", torch.cuda.current_device())
