"""How far small samples run ahead of a slow learner (``max_unacked``), and what is done then (``on_full``)."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import pytest
import torch
from calls import HANG_TIMEOUT_S, eventually
from learner_process import Learner
from torch.utils.data import DataLoader, TensorDataset

from echo_torch import DeliveryTimeoutError, EchoSink
from echo_torch.callbacks.loop import SinkCallback


def test_small_samples_run_ahead_of_the_learner_by_max_unacked_only() -> None:
    """Of 45 bytes, which the buffer holds more than a million of; or by two batches, whatever is more."""
    sample = {"x": np.zeros(45, np.uint8)}
    with Learner(sample, batch_size=32) as learner:
        learner.pause()
        for limit, rows, most in ((None, 256, 4096), (100, 10, 100), (100, 1000, 2000)):
            options: dict[str, Any] = {} if limit is None else {"max_unacked": limit}
            sink = EchoSink("127.0.0.1", learner.port, sample, resend_at_close=False, **options)
            for _ in range(most // rows):
                sink.send({"x": torch.zeros(rows, 45, dtype=torch.uint8)})
            with contextlib.suppress(DeliveryTimeoutError):
                while True:  # the server takes some
                    sink.send({"x": torch.zeros(rows, 45, dtype=torch.uint8)}, timeout=0.5)
            stats = sink.stats()
            # The server may have taken some since.
            assert most - max(rows, 100) <= stats.in_flight <= most
            with pytest.raises(DeliveryTimeoutError):
                sink.close(0.0)
        sink = EchoSink("127.0.0.1", learner.port, sample, max_unacked=None, resend_at_close=False)
        sink.send({"x": torch.zeros(100_000, 45, dtype=torch.uint8)}, timeout=HANG_TIMEOUT_S)
        assert sink.stats().in_flight > 90_000
        with pytest.raises(DeliveryTimeoutError):
            sink.close(0.0)


def test_on_full_drop_drops_whole_batches_and_waits_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """While the learner is stopped; all that was accepted arrives in order when it goes on."""
    sample = {"id": np.zeros((), np.int64), "x": np.zeros(8, np.uint8)}
    batches, rows = 200, 32
    with Learner(sample, batch_size=32) as learner:
        sink = EchoSink("127.0.0.1", learner.port, sample, max_unacked=300, on_full="drop").connect()
        learner.pause()
        accepted: list[int] = []
        longest = 0.0
        for number in range(batches):
            ids, before, began = torch.arange(number * rows, (number + 1) * rows), sink.stats(), time.monotonic()
            sink.send({"id": ids, "x": torch.zeros(rows, 8, dtype=torch.uint8)})
            longest = max(longest, time.monotonic() - began)
            after = sink.stats()
            assert {after.samples_sent - before.samples_sent, after.dropped - before.dropped} == {0, rows}
            accepted += ids.tolist() if after.samples_sent > before.samples_sent else []
        stats = sink.stats()
        assert 0 < stats.dropped == batches * rows - len(accepted)
        assert 200 < stats.in_flight <= 300
        assert longest < HANG_TIMEOUT_S
        learner.resume()
        sink.wait(HANG_TIMEOUT_S)
        sink.send({"id": torch.arange(10_000, 10_032), "x": torch.zeros(rows, 8, dtype=torch.uint8)})
        assert sink.stats().dropped == stats.dropped
        assert learner.take(len(accepted) + 32)["id"].tolist() == accepted + list(range(10_000, 10_032))
        sink.close()
    (line,) = [record for record in caplog.records if "are dropped" in record.message]
    assert "on_full='drop'" in line.message


def test_on_full_drop_takes_a_batch_that_never_finds_room_when_the_buffer_is_empty() -> None:
    sample = {"x": np.zeros(1000, np.uint8)}
    with (
        Learner(sample, batch_size=32) as learner,
        EchoSink("127.0.0.1", learner.port, sample, buffer_bytes=20_000, on_full="drop") as sink,
    ):
        for _ in range(2):
            sink.send({"x": torch.zeros(64, 1000, dtype=torch.uint8)})
            sink.wait(HANG_TIMEOUT_S)
        assert (sink.stats().samples_acked, sink.stats().dropped) == (128, 0)


@pytest.mark.parametrize("route", ["round_robin", "least_inflight", "function"])
def test_on_full_drop_with_several_learners(route: Any) -> None:
    """Of which one is stopped: its share is dropped, or goes to the other with ``least_inflight``."""
    sample = np.zeros((), np.int64)
    with Learner(sample, batch_size=32) as stopped, Learner(sample, batch_size=32) as running:
        ports = [stopped.port, running.port]
        which = (lambda ids: ids // 16 % 2) if route == "function" else route
        sink = EchoSink("127.0.0.1", ports, sample, route=which, max_unacked=64, on_full="drop").connect()
        stopped.pause()
        for number in range(60):
            began = time.monotonic()
            sink.send(torch.arange(number * 32, number * 32 + 32))
            assert time.monotonic() - began < HANG_TIMEOUT_S
            # Until the running learner has acked its share.
            while sum(peer.in_flight for peer in sink.stats().peers[1:]):
                time.sleep(0.001)
        stats = sink.stats()
        assert stats.samples_sent + stats.dropped == 60 * 32
        assert stats.peers[0].in_flight in range(1, 65)
        got = running.take(stats.peers[1].samples_acked // 32 * 32).tolist()
        assert len(set(got)) == len(got)
        if route == "least_inflight":
            assert stats.dropped == 0
        else:
            assert stats.dropped > 300
        stopped.resume()
        sink.close(HANG_TIMEOUT_S)


@pytest.mark.parametrize("learners", [1, 2])
def test_on_full_drop_takes_a_larger_batch_beside_a_smaller_one(learners: int) -> None:
    """Although both exceed ``max_unacked``: there is always room for two of the largest batch."""
    sample = np.zeros((), np.int64)
    with Learner(sample, batch_size=32) as one, Learner(sample, batch_size=32) as other:
        ports = [one.port, other.port][:learners]
        sink = EchoSink("127.0.0.1", ports, sample, max_unacked=10, on_full="drop").connect()
        for learner in (one, other):
            learner.pause()
        for _ in range(learners):
            sink.send(torch.arange(100))
        for _ in range(learners):
            sink.send(torch.arange(300))
        assert (sink.stats().samples_sent, sink.stats().dropped) == (400 * learners, 0)
        for learner in (one, other):
            learner.resume()
        sink.close(HANG_TIMEOUT_S)


def test_callbacks_and_workers_follow() -> None:
    sample = torch.zeros((), dtype=torch.int64)
    with Learner(sample.numpy(), batch_size=32) as learner:
        sink = EchoSink("127.0.0.1", learner.port, sample, max_unacked=64, on_full="drop").connect()
        learner.pause()
        data = TensorDataset(torch.arange(1024))
        collate = sink.collate(select=_first_of)
        loader = DataLoader(data, 32, num_workers=1, collate_fn=collate, persistent_workers=True)
        batches = [batch[0] for batch in loader]
        assert torch.equal(torch.cat(batches), torch.arange(1024))
        callback = SinkCallback(sink)
        for batch in batches:
            callback.on_batch_end(batch)
        # The worker reports what it dropped every now and then.
        eventually(lambda: sink.stats().samples_sent + sink.stats().dropped == 2 * 1024)
        stats = sink.stats()
        assert stats.dropped > 1024
        assert callback.skipped == 0
        learner.resume()
        sink.close(HANG_TIMEOUT_S)
        assert sink.stats().samples_acked == stats.samples_sent


def _first_of(batch: Any) -> Any:
    return batch[0]
