"""The examples in public docstrings run as they are written, against a real server; only host and port are replaced."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import echo
import numpy as np
import pytest
import torch
from learner_process import Learner
from torch.utils.data import DataLoader, TensorDataset

from echo_torch import EchoDataset, EchoSink, TcpClient, numpy_example
from echo_torch.callbacks.loop import SinkCallback

BATCH = 32
MAX_LINES = 6


def example_of(documented: type) -> str:
    """The code of the one block under ``Example::``."""
    (block,) = re.findall(r"^Example::\n\n((?: {4}.*\n|\n)+)", inspect.getdoc(documented) or "", re.MULTILINE)
    return textwrap.dedent(block).strip()


def run(documented: type, port: int = 0, **names: Any) -> None:
    exec(example_of(documented).replace('"learner"', '"127.0.0.1"').replace("50051", str(port)), names)


@pytest.fixture
def dataset() -> TensorDataset:
    return TensorDataset(torch.arange(BATCH), torch.rand(BATCH, 3))


@pytest.mark.parametrize("documented", [EchoSink, TcpClient, EchoDataset, SinkCallback])
def test_examples_are_short(documented: type) -> None:
    lines = [line for line in example_of(documented).splitlines() if line.strip()]
    assert 0 < len(lines) <= MAX_LINES


def test_the_sinks_example(dataset: TensorDataset) -> None:
    steps: list[Any] = []
    with Learner(numpy_example(dataset[0]), BATCH) as learner:
        run(EchoSink, learner.port, dataset=dataset, loader=DataLoader(dataset, batch_size=8), step=steps.append)
        numbers, _ = learner.take(BATCH)
    assert len(steps) == 4
    assert numbers.tolist() == list(range(BATCH))


def test_the_callbacks_example(dataset: TensorDataset) -> None:
    with Learner(numpy_example(dataset[0]), BATCH) as learner:
        with EchoSink("127.0.0.1", learner.port, dataset[0]) as sink:
            run(SinkCallback, sink=sink, loader=DataLoader(dataset, batch_size=8), step=lambda batch: None)
            assert sink.stats().samples_acked == BATCH
        numbers, _ = learner.take(BATCH)
    assert numbers.tolist() == list(range(BATCH))


def test_the_clients_example() -> None:
    sample = {"obs": np.zeros((3, 84, 84), np.uint8), "action": np.zeros((), np.int64)}
    with Learner(sample, 1) as learner:
        run(TcpClient, learner.port)
        received = learner.take(1)
    assert received["obs"].shape == (1, 3, 84, 84)


def test_the_datasets_example() -> None:
    example = {"obs": torch.zeros(4)}
    server = echo.Server(numpy_example(example), batch_size=2, transport=echo.TcpTransport(port=0))
    server.start()
    batches: list[Any] = []

    def step(batch: Any) -> None:
        batches.append(batch)
        server.close()

    for number in range(2):
        server.submit({"obs": np.full(4, number, np.float32)})
    run(EchoDataset, server=server, example=example, step=step, EchoDataset=EchoDataset)
    assert batches[0]["obs"].tolist() == [[0.0] * 4, [1.0] * 4]
