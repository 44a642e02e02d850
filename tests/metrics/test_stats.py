"""Where the time goes, and what is said of it: a forced case for each verdict, and the parts that these are made of."""

from __future__ import annotations

import dataclasses
import logging
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from calls import HANG_TIMEOUT_S, Gate
from fake_device import FakeDevice
from hypothesis import given
from hypothesis import strategies as st
from peers import Peer, PeerConnection

from echo_torch import DeliveryTimeoutError, EchoSink
from echo_torch.metrics.stats import SAVED_FIELDS, SinkStats
from echo_torch.metrics.timing import LatencyHistogram, Times, quantile
from echo_torch.session import totals

EXAMPLE = torch.zeros(1 << 15, dtype=torch.uint8)
SIZE = EXAMPLE.nbytes
BATCH = torch.zeros((16, SIZE), dtype=torch.uint8)


@contextmanager
def connected_sink(script: Callable[[PeerConnection], None], **options: Any) -> Iterator[tuple[Peer, EchoSink]]:
    with Peer(script, receive_buffer=64 * 1024) as peer:
        options = {"buffer_bytes": 2 << 20, **options}
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE, resend_at_close=False, **options).connect()
        try:
            yield peer, sink
        finally:
            sink.close(HANG_TIMEOUT_S)


def acks_everything(conn: PeerConnection) -> None:
    conn.send_handshake(EXAMPLE.numpy())
    conn.receive_all(SIZE)


def acks_slowly(conn: PeerConnection) -> None:
    """Acks less than 200 samples a second, of 5 batches."""
    conn.send_handshake(EXAMPLE.numpy())
    for _ in range(5 * len(BATCH)):
        conn.receive(SIZE)
        time.sleep(0.005)
        conn.ack()
    conn.receive_all()


# What holds things up.


def test_a_slow_learner() -> None:
    with connected_sink(acks_slowly, max_inflight_msgs=4) as (_, sink):
        for _ in range(5):
            sink.send(BATCH)
        sink.wait(HANG_TIMEOUT_S)
        stats = sink.stats()
        assert re.match(
            r"learner-bound: the server acks \d+ samples/s, and was waited for \d+% of the time; send took",
            stats.bottleneck,
        )
        assert stats.blocked_by_learner_seconds > 5 * stats.blocked_by_network_seconds
        assert stats.learner_seconds > stats.network_seconds
        assert 0.005 < stats.ack_p50_seconds <= stats.ack_p99_seconds < HANG_TIMEOUT_S
        rate = stats.samples_acked / stats.elapsed_seconds
        assert f"acks {rate:,.0f} samples/s" in stats.bottleneck


def test_a_peer_that_reads_slowly() -> None:
    """It acks each sample at once, and the window would let all of them through: a slow proxy, or a slow learner."""

    def reads_slowly(conn: PeerConnection) -> None:
        conn.send_handshake(EXAMPLE.numpy())
        for _ in range(25 * len(BATCH)):
            conn.receive(SIZE)
            conn.ack()
            time.sleep(0.002)
        conn.receive_all()

    with connected_sink(reads_slowly, max_inflight_msgs=10_000, buffer_bytes=32 << 20) as (_, sink):
        for _ in range(25):  # more than the kernel's buffers hold
            sink.send(BATCH)
        sink.wait(HANG_TIMEOUT_S)
        stats = sink.stats()
        assert stats.bottleneck.startswith("learner-bound: the server acks ")
        assert stats.learner_seconds > stats.network_seconds


def test_a_slow_producer() -> None:
    with connected_sink(acks_everything) as (_, sink):
        for _ in range(20):
            sink.send(BATCH[:1])
            time.sleep(0.01)
        sink.wait(HANG_TIMEOUT_S)
        stats = sink.stats()
        assert re.match(r"producer-bound: the sink waits for data, \d+ samples/s; send took", stats.bottleneck)
        share = (stats.check_seconds + stats.pack_seconds + stats.blocked_seconds) / stats.connected_seconds
        assert f"send took {share:.1%} of the time" in stats.bottleneck
        assert 0 < stats.check_seconds < stats.elapsed_seconds
        assert 0 < stats.pack_seconds < stats.elapsed_seconds


def test_a_slow_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    device.install(monkeypatch)
    with connected_sink(acks_everything) as (_, sink):
        sink.send(device.put(BATCH))
        time.sleep(0.8)  # most of the time, however busy the machine is
        device.run()
        sink.wait(HANG_TIMEOUT_S)
        stats = sink.stats()
        assert stats.bottleneck.startswith("device-bound: samples are copied from the device, and was waited for ")
        assert stats.device_seconds > 0.2


def test_a_slow_learner_of_a_worker() -> None:
    """Whose times count; while the connection of the process that made it, which sends nothing, does not."""
    with connected_sink(acks_slowly, max_inflight_msgs=4) as (_, sink):
        worker = multiprocessing.get_context("fork").Process(target=send_all, args=(sink,))
        worker.start()
        worker.join()
        stats = sink.stats()
        assert worker.exitcode == 0
        assert stats.samples_acked == 5 * len(BATCH)
        assert stats.bottleneck.startswith("learner-bound: ")
        assert 0.5 < stats.learner_seconds / stats.connected_seconds <= 1
        assert stats.connected_seconds < stats.elapsed_seconds
        assert stats.blocked_by_learner_seconds > 5 * stats.blocked_by_network_seconds
        assert 0 < stats.check_seconds < stats.connected_seconds
        assert 0.005 < stats.ack_p50_seconds <= stats.ack_p99_seconds < HANG_TIMEOUT_S


def send_all(sink: EchoSink) -> None:
    for _ in range(5):
        sink.send(BATCH)
    sink.close()


@pytest.mark.parametrize(("seconds", "cost"), [(4.0, "100.0% of the time"), (10.0, "the time of 2.5 threads")])
def test_no_more_than_all_of_the_time_is_taken(seconds: float, cost: str) -> None:
    stats = SinkStats(8, 8, 8, 8, 0, 0, seconds, blocked_by_learner_seconds=seconds)
    verdict = dataclasses.replace(stats, elapsed_seconds=8.0, connected_seconds=4.0).bottleneck
    assert (
        verdict == f"learner-bound: the server acks 1 samples/s, and was waited for 100% of the time; send took {cost}"
    )


def test_what_runs_before_did_is_not_in_the_verdict() -> None:
    state = {"acked_through": 7, **dict.fromkeys(SAVED_FIELDS, 0)}
    state |= {"samples_sent": 10**9, "samples_acked": 10**9, "bytes_acked": SIZE * 10**9, "blocked_seconds": 1e6}
    with connected_sink(acks_everything) as (_, sink):
        sink.load_state_dict(state)
        assert sink.stats().bottleneck == "idle: nothing was sent"
        for _ in range(3):
            sink.send(BATCH)
            time.sleep(0.1)
        sink.wait(HANG_TIMEOUT_S)
        stats = sink.stats()
        (rate, share) = re.findall(r"([\d,]+) samples/s; send took ([\d.]+)%", stats.bottleneck)[0]
        assert 0 < int(rate.replace(",", "")) <= 3 * len(BATCH) / 0.3
        assert 0 < float(share) < 100
        assert stats.samples_sent == 10**9 + 3 * len(BATCH)
        assert not stats.blocked_too_long


def test_there_is_no_connection_after_its_end() -> None:
    def dies(conn: PeerConnection) -> None:
        conn.send_handshake(EXAMPLE.numpy())
        conn.receive(SIZE)
        conn.close()

    with (
        connected_sink(dies, reconnect=0.0, on_error="warn") as (_, lost),
        connected_sink(acks_everything) as (_, closed),
    ):
        lost.send(BATCH)
        lost.wait(HANG_TIMEOUT_S)
        closed.send(BATCH)
        closed.close(HANG_TIMEOUT_S)
        for sink in (lost, closed):
            connected = sink.stats().connected_seconds
            assert 0 < connected < sink.stats().elapsed_seconds
            time.sleep(0.02)
            assert sink.stats().connected_seconds == connected


def test_nothing_was_sent() -> None:
    sink = EchoSink("nowhere.invalid", 1, EXAMPLE)
    assert sink.stats().bottleneck == "idle: nothing was sent"


# What is logged.


def test_a_verdict_is_logged_when_it_is_waited_but_not_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "echo_torch.session.totals")
    with connected_sink(acks_everything) as (_, sink):
        sink.send(BATCH[:1])
        sink.wait(HANG_TIMEOUT_S)
        assert not caplog.messages
        monkeypatch.setattr(totals, "VERDICT_INTERVAL_S", 0.2)
        time.sleep(0.2)
        sink.wait(HANG_TIMEOUT_S)
        sink.wait(HANG_TIMEOUT_S)
        (logged,) = caplog.records
        assert logged.levelno == logging.INFO
        assert logged.getMessage().startswith(f"{sink.peer}: producer-bound: the sink waits for data, ")


def test_send_that_is_blocked_for_too_long_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    def late(conn: PeerConnection) -> None:
        conn.send_handshake(EXAMPLE.numpy())
        gate.wait()
        conn.receive_all(SIZE)

    monkeypatch.setattr(totals, "VERDICT_INTERVAL_S", 0.2)
    with connected_sink(late, max_inflight_msgs=4) as (_, sink):
        with pytest.raises(DeliveryTimeoutError):
            sink.send(BATCH.repeat(10, 1), timeout=0.4)  # more than the buffer holds
        gate.open()
        sink.wait(HANG_TIMEOUT_S)
        (logged,) = [record for record in caplog.records if record.name == "echo_torch.session.totals"]
        assert logged.levelno == logging.WARNING
        assert logged.getMessage().startswith(f"{sink.peer}: learner-bound: ")


# Numbers.


def test_rates_are_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "RATE_SPAN_S", 0.2)
    with connected_sink(acks_everything) as (_, sink):
        sink.send(BATCH)
        sink.wait(HANG_TIMEOUT_S)
        assert sink.stats().sent_per_second > 0
        time.sleep(0.3)
        sink.stats()
        time.sleep(0.3)
        assert (sink.stats().sent_per_second, sink.stats().acked_per_second) == (0, 0)


def test_rates_are_not_of_the_moment_since_somebody_else_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "RATE_SPAN_S", 0.2)
    with connected_sink(acks_everything) as (_, sink):
        sink.send(BATCH)
        sink.wait(HANG_TIMEOUT_S)
        time.sleep(0.3)
        rate = sink.stats().sent_per_second
        assert rate > 0
        assert [sink.stats().sent_per_second for _ in range(2)] == pytest.approx([rate] * 2, rel=0.5)


def test_numbers_by_name_for_those_who_draw_them() -> None:
    stats = SinkStats(3, 30, 2, 20, 1, 0, 0.5)
    numbers = stats.as_dict("echo/")
    assert numbers["echo/samples_sent"] == 3
    assert numbers["echo/blocked_seconds"] == 0.5
    assert len(numbers) == len(SinkStats.__dataclass_fields__) - 1  # without the learners, of which there is one
    assert all(isinstance(value, (int, float)) for value in numbers.values())


def test_what_came_since() -> None:
    before = SinkStats(3, 30, 2, 20, 1, 0, 0.5, elapsed_seconds=10.0, ack_p50_seconds=7.0)
    now = SinkStats(10, 100, 10, 100, 0, 0, 2.5, elapsed_seconds=14.0, ack_p50_seconds=0.1)
    lately = now.since(before)
    assert lately == SinkStats(7, 70, 8, 80, 0, 0, 2.0)
    assert (lately.elapsed_seconds, lately.ack_p50_seconds) == (4.0, 0.1)


@given(st.lists(st.floats(1e-7, 1e4), min_size=1), st.floats(0.01, 1.0))
def test_quantiles_of_latencies_are_right_to_within_a_fifth(latencies: list[float], share: float) -> None:
    histogram = LatencyHistogram()
    for number, seconds in enumerate(latencies):
        histogram.record_written(number, float(number))
        histogram.record_acked(number, number + seconds)
    exact = max(1e-6, float(np.quantile(latencies, share, method="inverted_cdf")))
    assert exact / 1.0001 <= quantile(histogram.counts, share) <= exact * 1.2001
    assert quantile([0] * 10, share) == 0


def test_times_of_several_processes_add_up() -> None:
    one = Times(1.0, 2.0, 3.0, (1.0, 2.0, 3.0, 4.0), (0.5, 0.0, 0.0, 0.25), tuple(range(140)))
    assert Times.from_bytes(one.to_bytes()) == one
    assert Times.from_bytes(Times().to_bytes()).plus(one) == one.plus(Times()) == one
    twice = Times(2.0, 4.0, 6.0, (2.0, 4.0, 6.0, 8.0), (1.0, 0.0, 0.0, 0.5), tuple(range(0, 280, 2)))
    assert one.plus(one) == twice


def test_an_ack_is_of_all_rows_written_before_it() -> None:
    histogram = LatencyHistogram()
    for number in range(1, 1000):  # more than are kept
        histogram.record_written(number, float(number))
    histogram.record_acked(5, 10.0)
    assert sum(histogram.counts) == 5
    histogram.forget_unacked()
    histogram.record_acked(999, 10.0)
    assert sum(histogram.counts) == 5
    assert math.isclose(quantile(histogram.counts, 1.0), 9.0, rel_tol=0.21)


def test_printed_stats_are_a_few_aligned_lines() -> None:
    stats = SinkStats(
        12_345, 493_800, 12_000, 480_000, 345, 6, 0.0, reconnects=2, resent=40, maybe_duplicated=48, maybe_lost=1,
        ack_p50_seconds=0.0012, ack_p99_seconds=0.0345, sent_per_second=1234.4, acked_per_second=1200.0,
    )  # fmt: skip
    assert str(stats).splitlines() == [
        "samples   12,345 sent, 12,000 acked, 345 in flight, 6 dropped",
        "bytes     0.5 MB sent, 0.5 MB acked",
        "rate      1,234 samples/s sent, 1,200 acked",
        "ack after 1.2 ms (median), 34.5 ms (99 %)",
        "losses    2 reconnects, 40 sent again, at most 48 stored twice and 1 lost",
        "verdict   idle: nothing was sent",
    ]
    assert repr(stats).startswith("SinkStats(samples_sent=12345, ")
