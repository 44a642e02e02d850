"""A learner that has finished: actors stop quietly with ``on_learner_gone="stop"``, and a crash is treated as ever."""

from __future__ import annotations

import logging
import multiprocessing
import socket
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import echo
import numpy as np
import pytest
import torch
from calls import HANG_TIMEOUT_S, eventually
from learner_process import Learner
from peers import Peer, PeerConnection
from torch.utils.data import DataLoader, Dataset

from echo_torch import (
    ConnectionClosedError,
    DeliveryTimeoutError,
    EchoDataset,
    EchoSink,
    LearnerGoneError,
    TcpClient,
    numpy_example,
)
from echo_torch.learner import prefetch

EXAMPLE = torch.zeros(64, dtype=torch.uint8)
BATCH = torch.zeros((32, 64), dtype=torch.uint8)
STOP_AFTER_S = 0.3


def sink_to(port: int, **options: Any) -> EchoSink:
    return EchoSink("127.0.0.1", port, EXAMPLE, on_learner_gone="stop", stop_after=STOP_AFTER_S, **options)


def send_until_gone(sink: EchoSink) -> None:
    deadline = time.monotonic() + HANG_TIMEOUT_S
    while not sink.learner_gone:
        assert time.monotonic() < deadline
        sink.send(BATCH)
        time.sleep(0.002)


@pytest.mark.parametrize("reconnect", [60, 0])
def test_a_learner_that_has_finished_ends_sending_quietly(reconnect: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_torch")
    with (
        Learner(EXAMPLE.numpy(), batch_size=32, digest=len) as learner,
        sink_to(learner.port, reconnect=reconnect) as sink,
    ):
        sink.send(BATCH)
        sink.wait(HANG_TIMEOUT_S)
        assert not sink.learner_gone
        caplog.clear()
        learner.stop_server()
        began = time.monotonic()
        send_until_gone(sink)
        assert time.monotonic() - began < HANG_TIMEOUT_S
        sink.send(BATCH)
        stats = sink.stats()
        assert stats.dropped >= 32
        assert stats.samples_acked + stats.in_flight + stats.dropped >= stats.samples_sent
        sink.wait()
    # One line at INFO, and none above.
    (line,) = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert line.levelno == logging.INFO
    assert "samples are dropped from now on (on_learner_gone='stop')" in line.getMessage()


def test_by_default_it_raises() -> None:
    with Learner(EXAMPLE.numpy(), batch_size=32) as learner:
        sink = EchoSink("127.0.0.1", learner.port, EXAMPLE, reconnect=0.5)
        sink.send(BATCH)
        sink.wait(HANG_TIMEOUT_S)
        learner.stop_server()
        with pytest.raises(ConnectionClosedError) as caught:
            send_until_gone(sink)
        assert not isinstance(caught.value, LearnerGoneError)
        sink.close()


def test_a_crash_is_none() -> None:
    """A reset connection is tried again for all of ``reconnect``, and raises then."""
    with Learner(EXAMPLE.numpy(), batch_size=32) as learner:
        sink = sink_to(learner.port, reconnect=4 * STOP_AFTER_S)
        # Bytes that the learner has not read make the kernel send a reset when it dies.
        learner.pause()
        sink.send(torch.zeros((4096, 64), dtype=torch.uint8))
        time.sleep(0.1)
        learner.kill()
        with pytest.raises(ConnectionClosedError) as caught:
            sink.wait(HANG_TIMEOUT_S)
        assert not isinstance(caught.value, LearnerGoneError)
        assert not sink.learner_gone
        sink.close()


def test_a_learner_that_comes_back_in_time_gets_everything() -> None:
    with Learner(EXAMPLE.numpy(), batch_size=32) as learner:
        sink = EchoSink("127.0.0.1", learner.port, EXAMPLE, on_learner_gone="stop", stop_after=HANG_TIMEOUT_S)
        sink.send(BATCH)
        sink.wait(HANG_TIMEOUT_S)
        learner.stop_server()
        port = learner.port
    sink.send(BATCH)
    with Learner(EXAMPLE.numpy(), batch_size=32, port=port) as again:
        sink.wait(HANG_TIMEOUT_S)
        assert again.take(32).shape == (32, 64)
        assert not sink.learner_gone
        sink.close()


def test_several_learners_that_have_finished() -> None:
    """With failover, the last one counts."""
    with Learner(EXAMPLE.numpy(), batch_size=32) as one, Learner(EXAMPLE.numpy(), batch_size=32) as other:
        sink = EchoSink(
            "127.0.0.1", [one.port, other.port], EXAMPLE, failover=True, on_learner_gone="stop", stop_after=STOP_AFTER_S
        ).connect()
        # Nothing is under way when a server closes: bytes that it has not read would make it a crash.
        one.stop_server()
        eventually(lambda: (sink.send(BATCH), sink.stats().peers[0].lost)[1] == 1)
        assert not sink.learner_gone
        sink.wait(HANG_TIMEOUT_S)
        other.stop_server()
        send_until_gone(sink)
        sink.close()


def test_workers_of_this_and_of_later_epochs_stop_too() -> None:
    with Learner(EXAMPLE.numpy(), batch_size=32) as learner:
        sink = sink_to(learner.port)
        data = GatedItems()
        loader = DataLoader(data, 32, num_workers=2, collate_fn=sink.collate())
        batches = iter(loader)
        next(batches), next(batches)
        sink.wait(HANG_TIMEOUT_S)
        learner.stop_server()
        data.gate.set()
        assert sum(1 for _ in batches) == 14
        assert sum(1 for _ in loader) == 16
        sink.wait(HANG_TIMEOUT_S)
        assert sink.stats().dropped >= 512
        sink.close()


class GatedItems(Dataset[torch.Tensor]):
    """Of the items, workers get the first 64, and the others once the gate is open."""

    def __init__(self) -> None:
        self.gate = multiprocessing.Event()

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> torch.Tensor:
        assert index < 64 or self.gate.wait(HANG_TIMEOUT_S)
        return EXAMPLE


def test_a_client_raises_that_its_server_has_finished() -> None:
    with Learner(EXAMPLE.numpy(), batch_size=32) as learner:
        client = TcpClient("127.0.0.1", learner.port, EXAMPLE.numpy(), gone_after=STOP_AFTER_S, reconnect=60)
        learner.stop_server()
        client.send(EXAMPLE.numpy())
        with pytest.raises(LearnerGoneError, match=r"the learner has finished: .* nobody listens there any more"):
            client.wait(HANG_TIMEOUT_S)
        client.close()


def test_a_cut_within_a_sample_is_a_crash() -> None:
    """Even if the peer ends the stream in order: of a sample that is larger than the buffers, a part was written."""
    large = np.zeros(32 << 20, np.uint8)

    def script(conn: PeerConnection) -> None:
        conn.send_handshake(large)
        conn.receive(1 << 20)
        conn.sock.shutdown(socket.SHUT_WR)
        time.sleep(0.5)

    with Peer(script) as peer:
        client = TcpClient("127.0.0.1", peer.port, large, gone_after=0.0)
        client.send(large)
        with pytest.raises(ConnectionClosedError) as caught:
            client.wait(HANG_TIMEOUT_S)
        assert not isinstance(caught.value, LearnerGoneError)
        client.close()


# The learner's side.


def test_a_dataset_closes_its_server() -> None:
    """So a learner that leaves its loop while an actor is connected ends well; and nobody listens any more."""
    program = """
        import sys, echo, torch
        from echo_torch import EchoDataset, numpy_example
        example = torch.zeros(64, dtype=torch.uint8)
        server = echo.Server(numpy_example(example), batch_size=32, transport=echo.TcpTransport(port=0))
        server.start()
        print(server.port, flush=True)
        with EchoDataset(server, example) as dataset:
            for number, batch in enumerate(dataset):
                if number == 2:
                    break
        print("closed", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        sink = sink_to(int(process.stdout.readline()))
        for _ in range(3):
            sink.send(BATCH)
        sink.wait(HANG_TIMEOUT_S)
        # Nothing is under way when the server closes: bytes that it has not read would make it a crash.
        out = process.stdout.readline()
        send_until_gone(sink)
        _, err = process.communicate(timeout=HANG_TIMEOUT_S)
        sink.close()
    assert (process.returncode, out) == (0, "closed\n")
    assert "panic" not in err


def test_close_takes_what_the_server_still_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than its buffers hold. Otherwise it would close with bytes unread, which resets the connection."""
    monkeypatch.setattr(prefetch, "DISCARD_S", HANG_TIMEOUT_S)
    monkeypatch.setattr(prefetch, "DISCARD_IDLE_S", 1.0)
    server = echo.Server(numpy_example(EXAMPLE), batch_size=32, transport=echo.TcpTransport(port=0))
    server.start()
    sink = sink_to(server.port)
    with EchoDataset(server, EXAMPLE) as dataset:
        sink.send(torch.zeros((2048, 64), dtype=torch.uint8))
        next(iter(dataset))
        with pytest.raises(DeliveryTimeoutError):
            sink.wait(0.2)
    assert sink.stats().samples_acked == 2048
    send_until_gone(sink)
    sink.close()


def test_close_is_idempotent_and_ends_the_iteration() -> None:
    server = echo.Server(numpy_example(EXAMPLE), batch_size=32)
    with EchoDataset(server, EXAMPLE) as dataset:
        batches = iter(dataset)
    assert next(batches, None) is None
    dataset.close()


def test_an_interrupted_close_closes_the_server_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the thread that takes what the server still has would be in ``server.sample()`` at exit."""
    discard = prefetch.Prefetcher.discard_samples

    def interrupted(prefetcher: prefetch.Prefetcher[Any, Any]) -> None:
        discard(prefetcher)
        raise KeyboardInterrupt

    monkeypatch.setattr(prefetch.Prefetcher, "discard_samples", interrupted)
    server = echo.Server(numpy_example(EXAMPLE), batch_size=32)
    dataset = EchoDataset(server, EXAMPLE)
    with pytest.raises(KeyboardInterrupt):
        dataset.close()
    assert server.sample() is None
    assert dataset._prefetcher._discarding_thread is not None
    assert not dataset._prefetcher._discarding_thread.is_alive()


@pytest.mark.parametrize("started", [False, True])
def test_a_dataset_without_batches_says_why(
    started: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "IDLE_WARNING_S", 0.1)
    monkeypatch.setattr(prefetch, "POLL_INTERVAL_S", 0.02)
    server = echo.Server(numpy_example(EXAMPLE), batch_size=32, transport=echo.TcpTransport(port=0))
    if started:
        server.start()
    with EchoDataset(server, EXAMPLE) as dataset:
        batches = iter(dataset)
        for _ in range(2):
            threading.Timer(0.5, _submit, (server,)).start()
            assert next(batches).shape == (32, 64)
    (line,) = caplog.records
    why = "does anybody send to it?" if started else "call server.start()"
    assert line.getMessage().startswith("no batch for 0.1 s: ")
    assert why in line.getMessage()


def _submit(server: echo.Server) -> None:
    for _ in range(32):
        server.submit(np.zeros(64, np.uint8))
