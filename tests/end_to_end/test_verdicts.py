"""What `SinkStats.bottleneck` says for each thing that can be slow, with a real server and samples of three sizes."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from learner_process import Learner
from torch.utils.data import DataLoader, Dataset

from echo_torch import DeliveryTimeoutError, EchoSink, SinkStats, TcpClient

BATCH_SIZE = 64
# Of samples that a slow producer or loader makes at a time. They fit into the buffer, whatever their size.
SMALL_BATCH = 8
SECONDS = 1.0
# The socket option that limits the rate at which the kernel sends, as a slow link does; Python has no name for it.
SO_MAX_PACING_RATE = 47

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the network from the learner")


@pytest.fixture(params=[45, 28_000, 150_000])
def example(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.zeros(request.param, dtype=torch.uint8)


@contextlib.contextmanager
def connected(example: torch.Tensor, busy: float = 0.0) -> Iterator[tuple[Learner, EchoSink]]:
    with Learner(example.numpy(), BATCH_SIZE, busy=busy, digest=len) as learner:
        # A buffer that is full soon.
        sink = EchoSink("127.0.0.1", learner.port, example, buffer_bytes=2 << 20, resend_at_close=False)
        sink.send(example.expand(BATCH_SIZE, -1))
        sink.wait(20)
        try:
            yield learner, sink
        finally:
            with contextlib.suppress(ConnectionError, DeliveryTimeoutError):
                sink.close(0.1)


def send_for(sink: EchoSink, example: torch.Tensor, pause: float = 0.0, rows: int = BATCH_SIZE) -> SinkStats:
    """Send batches for `SECONDS`; return what the stats say of that time."""
    before, end = sink.stats(), time.monotonic() + SECONDS
    batch = example.expand(rows, -1)
    with contextlib.suppress(DeliveryTimeoutError):
        while time.monotonic() < end:
            sink.send(batch, timeout=max(0.01, end - time.monotonic()))
            time.sleep(pause)
    return sink.stats().since(before)


def test_a_slow_learner(example: torch.Tensor) -> None:
    with connected(example, busy=0.1) as (_, sink):
        stats = send_for(sink, example)
    assert stats.bottleneck.startswith("learner-bound: the server acks ")
    assert stats.blocked_by_learner_seconds > stats.blocked_by_network_seconds


def test_a_stopped_learner(example: torch.Tensor) -> None:
    with connected(example) as (learner, sink):
        learner.pause()
        stats = send_for(sink, example)
    assert stats.bottleneck.startswith("learner-bound: the server acks ")
    assert stats.blocked_by_learner_seconds > SECONDS / 2 > 2 * stats.blocked_by_network_seconds


def test_a_killed_learner(example: torch.Tensor) -> None:
    with connected(example) as (learner, sink):
        learner.kill()
        stats = send_for(sink, example)
        found = re.match(r"disconnected: the connection was lost ([\d.]+) s ago, tried (\d+) times", stats.bottleneck)
        assert found
        assert 0 < float(found[1]) < SECONDS + 10
        assert int(found[2]) == stats.reconnect_tries >= 2
        assert stats.disconnected_seconds == pytest.approx(float(found[1]), abs=0.051)


def test_a_throttled_link(example: torch.Tensor) -> None:
    with connected(example) as (_, sink):
        client = sink._session().route
        assert isinstance(client, TcpClient)
        bytes_per_s = example.nbytes * 2000 if example.nbytes < 1000 else 4_000_000
        client._connection.pump.sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, bytes_per_s)
        stats = send_for(sink, example)
    assert re.match(
        r"network-bound: the connection takes \d+\.\d MB/s, and was waited for \d+% of the time; send took",
        stats.bottleneck,
    )
    assert stats.blocked_by_network_seconds > stats.blocked_by_learner_seconds


def test_a_slow_producer(example: torch.Tensor) -> None:
    with connected(example) as (_, sink):
        stats = send_for(sink, example, pause=0.05, rows=SMALL_BATCH)
    assert stats.bottleneck.startswith("producer-bound: the sink waits for data, ")


class SlowItems(Dataset[torch.Tensor]):
    """Items that take 3 ms each to load."""

    def __init__(self, example: torch.Tensor) -> None:
        self.example = example

    def __len__(self) -> int:
        return 40 * SMALL_BATCH

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.003)
        return self.example


def test_a_slow_loader(example: torch.Tensor) -> None:
    with connected(example) as (_, sink):
        before = sink.stats()
        for batch in DataLoader(SlowItems(example), SMALL_BATCH, num_workers=1, multiprocessing_context="fork"):
            sink.send(batch)
        stats = sink.stats().since(before)
    assert stats.samples_sent == len(SlowItems(example))
    assert stats.bottleneck.startswith("producer-bound: the sink waits for data, ")
