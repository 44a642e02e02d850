"""`EchoSink` against peers that do what a real server seldom does: it connects, sends, counts, fails and closes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import multiprocessing
import os
import pickle
import re
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from calls import eventually
from peers import Peer, PeerConnection

from echo_torch import (
    ConnectionClosedError,
    DeliveryTimeoutError,
    EchoSink,
    HandshakeError,
    SinkStats,
    SpecMismatchError,
    TcpClient,
    numpy_example,
)

EXAMPLE = {"index": 0}
SIZE = 8
SHORT_S = 0.2
"""Seconds of a timeout that is meant to pass."""
PATIENCE_S = 30.0
"""Seconds of one that is not."""


def batch(*indexes: int) -> dict[str, torch.Tensor]:
    return {"index": torch.tensor(indexes, dtype=torch.int64)}


class Script:
    """What the peer of a test does, and what it heard; ``ended`` is set for each client that left."""

    example: Any = EXAMPLE

    def __init__(self) -> None:
        self.connections: list[PeerConnection] = []
        self.ended = threading.Semaphore(0)

    def __call__(self, conn: PeerConnection) -> None:
        self.connections.append(conn)
        conn.send_handshake(numpy_example(self.example))
        try:
            self.converse(conn)
        finally:
            self.ended.release()

    def converse(self, conn: PeerConnection) -> None:
        """Take everything, ack everything."""
        conn.receive_all(ack_every=sum(leaf.nbytes for leaf in numpy_example(self.example).values()))

    def received_ids(self, connection: int = 0) -> list[int]:
        """The indexes that one connection carried, after it has ended."""
        assert self.ended.acquire(timeout=PATIENCE_S)
        return np.frombuffer(bytes(self.connections[connection].received), np.int64).tolist()


class SilentScript(Script):
    """Acks nothing, but reads."""

    def converse(self, conn: PeerConnection) -> None:
        conn.receive_all()


class LeavingScript(Script):
    """Hears as many samples as told, acks as many, and is gone."""

    def __init__(self, hears: int, acks: int = 0, example: Any = EXAMPLE) -> None:
        super().__init__()
        self.hears, self.acks = hears, acks
        self.example = example

    def converse(self, conn: PeerConnection) -> None:
        conn.receive(self.hears * SIZE)
        conn.ack(self.acks)
        conn.close()


class AckingScript(Script):
    """Acks as many samples as told, after `go`, and then no more; says so by `acked`."""

    def __init__(self, acks: int, wait: bool = False) -> None:
        super().__init__()
        self.acks = acks
        self.go, self.acked = threading.Event(), threading.Event()
        if not wait:
            self.go.set()

    def converse(self, conn: PeerConnection) -> None:
        conn.receive(self.acks * SIZE)
        assert self.go.wait(PATIENCE_S)
        conn.ack(self.acks)
        self.acked.set()
        conn.receive_all()


def sink_for(peer: Peer, **options: Any) -> EchoSink:
    """A sink that is done with a peer that left, unless the test says otherwise."""
    return EchoSink(peer.host, peer.port, options.pop("example", EXAMPLE), **{"reconnect": 0.0, **options})


def rows(count: int, resent: int = 8) -> dict[str, Any]:
    """The options for a ring of which ``count`` rows may be un-acked."""
    return {"buffer_bytes": (count + resent) * SIZE, "resend_acked": resent}


@pytest.fixture
def refusing() -> Iterator[socket.socket]:
    """A port that is taken, and at which nobody listens until the test does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        yield listener


# Connecting.


def test_a_sink_connects_at_the_first_send() -> None:
    """Not before: making one, asking for its counts and waiting for nothing need no learner."""
    script = Script()
    with Peer(script) as peer:
        sink = sink_for(peer)
        sink.wait()
        assert sink.stats() == SinkStats(0, 0, 0, 0, 0, 0, 0.0)
        assert repr(sink) == f"<EchoSink 127.0.0.1:{peer.port} {{['index']: torch.int64 []}}>"
        assert not script.connections
        sink.send(batch(1, 2))
        sink.wait()
        assert len(script.connections) == 1
        sink.close()


def test_a_sink_that_never_connected_closes_for_good() -> None:
    sink = EchoSink("nowhere.invalid", 1, EXAMPLE)
    sink.close()
    sink.close()
    with pytest.raises(ConnectionClosedError, match="closed"):
        sink.send(batch(1))


@pytest.mark.parametrize("enter", [EchoSink.connect, EchoSink.__enter__], ids=["connect", "with"])
def test_connect_and_with_fail_early(enter: Callable[[EchoSink], EchoSink]) -> None:
    """On a server for other samples, on one that is no echo server, and both times each; ``on_error`` has no say."""
    other = LeavingScript(0, example={"index": np.zeros(3, np.float32)})
    for script, kind in ((other, SpecMismatchError), (lambda conn: conn.send(b"HTTP/1.1 400"), HandshakeError)):
        with Peer(script) as peer:
            sink = sink_for(peer, on_error="warn")
            for _ in range(2):
                with pytest.raises(kind, match=rf"127\.0\.0\.1:{peer.port}"):
                    enter(sink)


def test_connect_gives_the_sink_and_connects_once() -> None:
    script = Script()
    with Peer(script) as peer:
        sink = sink_for(peer)
        assert sink.connect().connect() is sink
        with sink as same:
            assert same is sink
        assert len(script.connections) == 1
        with pytest.raises(ConnectionClosedError):
            sink.connect()


def test_a_learner_that_listens_late_is_found(refusing: socket.socket) -> None:
    """Refusals are tried again until `connect_timeout`."""
    script = Script()

    def serve() -> None:
        refusing.listen()
        connected, _ = refusing.accept()
        with connected:
            script(PeerConnection(connected))

    late = threading.Timer(SHORT_S, serve)
    late.start()
    with EchoSink("127.0.0.1", refusing.getsockname()[1], EXAMPLE, connect_timeout=PATIENCE_S, resend_acked=0) as sink:
        sink.send(batch(5))
    assert script.received_ids() == [5]
    late.join()


def test_a_learner_that_never_listens_is_given_up(refusing: socket.socket) -> None:
    sink = EchoSink("127.0.0.1", refusing.getsockname()[1], EXAMPLE, connect_timeout=SHORT_S)
    with pytest.raises(ConnectionRefusedError, match=re.escape(sink.peer)):
        sink.connect()
    with pytest.raises(ConnectionRefusedError):
        sink.send(batch(1))
    sink.close()


# Configuration.


def double(sample: Any) -> Any:
    return {"index": sample["index"] * 2}


def test_a_sink_pickles_as_configuration() -> None:
    """Before and after it connected; the copy, with the same options, opens a connection of its own."""
    script = Script()
    with Peer(script) as peer:
        sink = sink_for(peer, select=double, resend_at_close=False, max_inflight_msgs=3)
        early = pickle.dumps(sink)
        sink.send(batch(1, 2))
        for state in (early, pickle.dumps(sink)):
            copy = pickle.loads(state)
            assert (repr(copy), copy.stats()) == (repr(sink), SinkStats(0, 0, 0, 0, 0, 0, 0.0))
            copy.send(batch(7))
            copy.close()
        assert script.ended.acquire(timeout=PATIENCE_S)
        assert script.received_ids(1) == [14]
        sink.send(batch(3))
        sink.close()
        assert script.received_ids(0) == [2, 4, 6]
        assert len(script.connections) == 3


def test_a_closed_sink_pickles_as_an_open_one() -> None:
    script = Script()
    with Peer(script) as peer:
        sink = sink_for(peer, resend_at_close=False)
        sink.close()
        with pickle.loads(pickle.dumps(sink)) as copy:
            copy.send(batch(1))
        assert script.received_ids() == [1]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "on_error": ({"on_error": "ignore"}, ValueError, "on_error: got 'ignore', expected 'raise' or 'warn'"),
    "buffer too small": ({"buffer_bytes": 79}, ValueError, r"buffer_bytes: got 79, .* at least 80\b"),
    "buffer for a larger tail": ({"buffer_bytes": 80, "resend_acked": 20}, ValueError, r"at least 176\b"),
    "buffer 0": ({"buffer_bytes": 0}, ValueError, "buffer_bytes: got 0"),
    "unacked 0": ({"max_unacked": 0}, ValueError, "max_unacked: got 0"),
    "unacked float": ({"max_unacked": 1.5}, TypeError, "max_unacked: got 1.5"),
    "on_full": ({"on_full": "wait"}, ValueError, "on_full: got 'wait', expected 'block' or 'drop'"),
    "on_full foreign": ({"on_full": "drop", "client": object}, ValueError, "on_full='drop': .*TcpClient"),
    "buffer float": ({"buffer_bytes": 1e6}, TypeError, "buffer_bytes: got 1000000.0"),
    "resend_acked": ({"resend_acked": -1}, ValueError, "resend_acked: got -1"),
    "no number": ({"example": {"name": "x"}}, TypeError, r"example\['name'\]"),
    "no bytes": ({"example": {"x": torch.zeros(0)}}, ValueError, "no bytes"),
    **{f"window {n}": ({"max_inflight_msgs": n}, ValueError, f"max_inflight_msgs: got {n}") for n in (0, -1)},
    **{f"window {n}": ({"max_inflight_msgs": n}, TypeError, f"max_inflight_msgs: got {n!r}") for n in (1.5, True, "8")},
    **{f"{n} < 0": ({n: -1}, ValueError, f"{n}: got -1") for n in ("connect_timeout", "stall_timeout")},
    **{f"{n} NaN": ({n: math.nan}, ValueError, f"{n}: got nan") for n in ("connect_timeout", "stall_timeout")},
    **{f"{n} str": ({n: "1"}, TypeError, f"{n}: got '1'") for n in ("connect_timeout", "stall_timeout")},
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        EchoSink("nowhere.invalid", 1, **{"example": EXAMPLE, **options})


@pytest.mark.parametrize("timeout", [-1, math.nan, "1", True])
def test_bad_timeouts_of_calls_are_refused_and_do_no_harm(timeout: Any) -> None:
    script = Script()
    with Peer(script) as peer, sink_for(peer, resend_at_close=False) as sink:
        sink.send(batch(1))
        for call in (lambda t: sink.send(batch(2), timeout=t), lambda t: sink.wait(t), lambda t: sink.close(t)):
            with pytest.raises((TypeError, ValueError), match="timeout: got"):
                call(timeout)
        sink.close()
        assert script.received_ids() == [1]


def test_the_port_is_checked_before_it_is_dialled() -> None:
    with pytest.raises(ValueError, match="port: got 65536"):
        EchoSink("127.0.0.1", 65536, EXAMPLE).connect()


@pytest.mark.parametrize("options", [{"example": EXAMPLE}, {}], ids=["example", "from_batch"])
def test_select_makes_the_samples(options: dict[str, Any]) -> None:
    """Of what is sent and, with `from_batch`, of the batch that serves as the example."""
    script = Script()
    yields = [torch.tensor([[1.5, 2], [2.5, 3]]), {"name": ["a", "b"]}]
    with Peer(script) as peer:
        make = EchoSink if options else EchoSink.from_batch
        with make(peer.host, peer.port, *(options.values() or [yields]), select=second, resend_at_close=False) as sink:
            sink.send(yields)
        assert script.received_ids() == [2, 3]


def second(batch_and_names: Any) -> Any:
    return {"index": batch_and_names[0][:, 1].long()}


@pytest.mark.parametrize(
    "first",
    [batch(1, 2), batch(1), batch(), {"index": np.array([1, 2])}, {"index": torch.tensor([4])[[0, 0]]}],
    ids=["two", "one", "none", "numpy", "copy"],
)
def test_from_batch_takes_one_sample_of_it(first: Any) -> None:
    """Whatever its size, 0 included; other sizes may be sent."""
    script = Script()
    with Peer(script) as peer:
        with EchoSink.from_batch(peer.host, peer.port, first, resend_at_close=False) as sink:
            sink.send(batch(5, 6, 7))
            sink.send({"index": 8})
        assert script.received_ids() == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        ({"x": torch.zeros(2), "y": 3}, "batch['y']"),
        ([torch.zeros(2), {"y": torch.tensor(1.0)}], "batch[1]['y']"),
        ({"n": np.float32(1)}, "batch['n']"),
    ],
)
def test_from_batch_names_a_leaf_without_a_batch_dimension(bad: Any, path: str) -> None:
    with pytest.raises(ValueError, match=re.escape(path) + r".*scalar.*expected \[B, \.\.\.\]"):
        EchoSink.from_batch("nowhere.invalid", 1, bad)


# Sending.


def test_the_first_send_says_once_how_it_was_read(caplog: pytest.LogCaptureFixture) -> None:
    """The common mistake is a batch given as the example, and this is where it shows."""
    caplog.set_level(logging.INFO, "echo_torch")
    with Peer(Script()) as peer:
        for first, read in ((batch(1, 2, 3), "3 samples of"), ({"index": 1}, "one sample of")):
            caplog.clear()
            with sink_for(peer, resend_at_close=False) as sink:
                sink.send(first)
                sink.send(batch(1))
            records = [record for record in caplog.records if "first batch" in record.message]
            assert [record.name.split(".")[0] for record in records] == ["echo_torch"]
            assert f"127.0.0.1:{peer.port}" in records[0].message
            assert f"{read} {{['index']: torch.int64 []}}" in records[0].message


def test_batched_says_it_outright() -> None:
    script = Script()
    with Peer(script) as peer:
        with sink_for(peer, resend_at_close=False) as sink:
            sink.send(batch(1, 2), batched=True)
            sink.send({"index": 3}, batched=False)
            for wrong, batched in ((batch(1), False), ({"index": 1}, True)):
                with pytest.raises(SpecMismatchError, match=r"batch\['index'\]: got"):
                    sink.send(wrong, batched=batched)
        assert script.received_ids() == [1, 2, 3]


@pytest.mark.parametrize(
    "bad",
    [{"index": torch.zeros(3)}, {"other": 1}, {"index": "1"}, {"index": torch.zeros(3, 2, dtype=torch.int64)}],
    ids=["dtype", "structure", "str", "shape"],
)
def test_a_refused_batch_sends_nothing_and_the_next_goes_through(bad: Any) -> None:
    script = Script()
    with Peer(script) as peer:
        with sink_for(peer, resend_at_close=False) as sink:
            sink.send(batch(1))
            with pytest.raises((SpecMismatchError, TypeError), match="batch"):
                sink.send(bad)
            assert sink.stats().samples_sent == 1
            sink.send(batch(2, 3))
        assert script.received_ids() == [1, 2, 3]


def test_an_empty_batch_sends_nothing() -> None:
    script = Script()
    with Peer(script) as peer:
        with sink_for(peer) as sink:
            sink.send(batch())
            sink.wait()
            assert sink.stats().samples_sent == 0
        assert script.received_ids() == []


def test_the_window_is_at_most_8_mib_of_payload() -> None:
    """Of 1 MiB samples, 8 are un-acked at a time, whatever `max_inflight_msgs` is; each ack lets one more through."""
    mib = 1 << 20
    full, silence = threading.Semaphore(0), threading.Semaphore(0)
    more: list[bool] = []

    def script(conn: PeerConnection) -> None:
        conn.send_handshake(np.zeros(mib, np.uint8))
        for samples in (8, 1, 1):
            conn.receive(samples * mib)
            full.release()
            assert silence.acquire(timeout=PATIENCE_S)
            more.append(bool(select.select([conn.sock], [], [], 0)[0]))
            conn.ack()

    with Peer(script) as peer:
        sink = sink_for(peer, example=np.zeros(mib, np.uint8), resend_acked=0)
        sink.send(np.zeros((20, mib), np.uint8))
        for _ in range(3):
            assert full.acquire(timeout=PATIENCE_S)
            with pytest.raises(DeliveryTimeoutError):
                sink.wait(SHORT_S)
            silence.release()
        with pytest.raises(DeliveryTimeoutError):
            sink.close(SHORT_S)
    assert more == [False] * 3


def test_a_sample_larger_than_the_window_goes_alone() -> None:
    """The bound in bytes never stops a sample altogether."""
    size = 9 << 20
    script = Script()
    script.example = {"x": np.zeros(size, np.uint8)}
    with Peer(script) as peer:
        with sink_for(peer, example=script.example, resend_acked=0) as sink:
            sink.send({"x": np.ones((3, size), np.uint8)})
            sink.wait()
            assert sink.stats().samples_acked == 3
        assert script.ended.acquire(timeout=PATIENCE_S)
        assert len(script.connections[0].received) == 3 * size


# Counting.


def test_stats_count_samples_and_bytes() -> None:
    script = Script()
    with Peer(script) as peer:
        sink = sink_for(peer)
        sink.send(batch(*range(20)))
        sink.send({"index": 1})
        sink.wait()
        expected = SinkStats(21, 21 * SIZE, 21, 21 * SIZE, 0, 0, 0.0)
        assert sink.stats() == expected
        sink.close()
        assert sink.stats() == dataclasses.replace(expected, maybe_duplicated=8)  # what close sent once more
        assert len(script.received_ids()) == 21 + 8


def test_stats_of_what_is_not_acked() -> None:
    script = AckingScript(3)
    with Peer(script) as peer:
        sink = sink_for(peer)
        sink.send(batch(*range(5)))
        assert script.acked.wait(PATIENCE_S)
        with pytest.raises(DeliveryTimeoutError) as caught:
            sink.wait(SHORT_S)
        assert caught.value.unacked == 2
        stats = sink.stats()
        assert (stats.samples_sent, stats.samples_acked, stats.bytes_acked, stats.in_flight) == (5, 3, 3 * SIZE, 2)
        with pytest.raises(DeliveryTimeoutError):
            sink.close(0)


def test_blocked_seconds_and_rows_accepted_when_a_peer_withholds_acks() -> None:
    """A batch that does not fit into the ring is taken in part, and the error says how much of it."""
    with Peer(SilentScript()) as peer:
        sink = sink_for(peer, **rows(10))
        sink.send(batch(1, 2))
        assert sink.stats().blocked_seconds == 0
        with pytest.raises(DeliveryTimeoutError) as caught:
            sink.send(batch(*range(25)), timeout=SHORT_S)
        assert (caught.value.rows_accepted, caught.value.unacked) == (8, 10)
        assert sink.stats().blocked_seconds >= SHORT_S
        assert (sink.stats().samples_sent, sink.stats().in_flight) == (10, 10)
        with pytest.raises(DeliveryTimeoutError) as caught:
            sink.send({"index": 1}, timeout=0)
        assert caught.value.rows_accepted == 0
        with pytest.raises(DeliveryTimeoutError):
            sink.close(0)


def test_a_send_that_timed_out_is_taken_up_where_it_stopped() -> None:
    """`rows_accepted` is what a caller needs to send the rest, once."""
    go = threading.Event()

    class Late(Script):
        def converse(self, conn: PeerConnection) -> None:
            assert go.wait(PATIENCE_S)
            super().converse(conn)

    script = Late()
    with Peer(script) as peer:
        with sink_for(peer, resend_at_close=False, **rows(10)) as sink:
            with pytest.raises(DeliveryTimeoutError) as caught:
                sink.send(batch(*range(25)), timeout=SHORT_S)
            go.set()
            sink.send(batch(*range(25)[caught.value.rows_accepted :]))
        assert script.received_ids() == list(range(25))


def test_stall_timeout_is_no_end() -> None:
    """It names itself and the samples, in every call that waits, and delivery goes on."""
    script = AckingScript(2, wait=True)
    with Peer(script) as peer:
        with sink_for(peer, stall_timeout=SHORT_S, resend_at_close=False) as sink:
            sink.send(batch(1, 2))
            for _ in range(2):
                with pytest.raises(DeliveryTimeoutError, match=r"stall_timeout.*2 samples un-acked") as caught:
                    sink.wait()
                assert caught.value.unacked == 2
            script.go.set()
            assert script.acked.wait(PATIENCE_S)
            while sink.stats().in_flight:  # the acks are there, and are taken note of whenever somebody looks
                pass
            sink.wait()
        assert script.received_ids() == [1, 2]


# Tee.


def test_tee_sends_each_batch_before_it_is_handed_on_and_waits_at_the_end() -> None:
    script = Script()
    loader = [batch(1, 2), batch(3), batch(4, 5, 6)]
    with Peer(script) as peer:
        sink = sink_for(peer, resend_at_close=False)
        tee = sink.tee(loader)
        assert len(tee) == 3
        sent = []
        for index, passed in enumerate(tee):
            assert passed is loader[index]
            sent.append(sink.stats().samples_sent)
        assert sent == [2, 3, 6]
        assert sink.stats().samples_acked == 6
        assert [len(passed["index"]) for passed in tee] == [2, 1, 3]
        sink.close()
        assert script.received_ids() == [1, 2, 3, 4, 5, 6] * 2


def test_tee_left_early_has_sent_what_was_handed_on_and_waits_for_nothing() -> None:
    with Peer(SilentScript()) as peer:
        sink = sink_for(peer)
        for passed in sink.tee(iter([batch(1, 2), batch(3)])):
            assert len(passed["index"]) == 2
            break
        assert (sink.stats().samples_sent, sink.stats().in_flight) == (2, 2)
        with pytest.raises(DeliveryTimeoutError):
            sink.close(0)


def test_tee_has_a_length_only_if_the_loader_has() -> None:
    with pytest.raises(TypeError, match="len"):
        len(EchoSink("nowhere.invalid", 1, EXAMPLE).tee(iter([])))


# A peer that is gone.


@pytest.mark.usefixtures("descriptors")
def test_raise_tells_every_call_from_the_first_failure() -> None:
    """Sticky, and with the counts; a `close` after that has nothing new to say."""
    with Peer(LeavingScript(hears=5, acks=2)) as peer:
        sink = sink_for(peer)
        sink.send(batch(*range(5)))
        with pytest.raises(ConnectionClosedError, match=f"127.0.0.1:{peer.port}.*3 samples un-acked") as first:
            sink.wait()
        assert first.value.unacked == 3
        for _ in range(2):
            with pytest.raises(ConnectionClosedError, match="3 samples un-acked") as caught:
                sink.send(batch(1, 2))
            assert (caught.value.unacked, caught.value.rows_accepted) == (3, 0)
            assert caught.value.__cause__ is first.value.__cause__
        stats = sink.stats()
        assert (stats.samples_sent, stats.samples_acked, stats.in_flight, stats.dropped) == (5, 2, 3, 0)
        sink.close()


def test_rows_accepted_when_the_peer_goes_in_the_middle_of_a_batch() -> None:
    with Peer(LeavingScript(hears=10)) as peer:
        sink = sink_for(peer, **rows(10))
        with pytest.raises(ConnectionClosedError) as caught:
            sink.send(batch(*range(25)))
        assert (caught.value.rows_accepted, caught.value.unacked) == (10, 10)
        sink.close()


def test_close_is_the_first_to_say_that_samples_were_lost() -> None:
    """If no other call has; and then not again."""
    with Peer(LeavingScript(hears=2)) as peer:
        sink = sink_for(peer)
        sink.send(batch(1, 2))
        with pytest.raises(ConnectionClosedError) as caught:
            sink.close()
        assert caught.value.unacked == 2
        sink.close()


@pytest.mark.usefixtures("descriptors")
def test_warn_logs_the_loss_once_drops_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    """`wait` and `close` raise nothing either: a run doesn't die because the learner ended first."""
    with Peer(LeavingScript(hears=2, acks=1)) as peer:
        sink = sink_for(peer, on_error="warn")
        sink.send(batch(1, 2))
        sink.wait()
        for _ in range(3):
            sink.send(batch(1, 2, 3))
        sink.send({"index": 1})
        sink.wait()
        stats = sink.stats()
        assert (stats.samples_sent, stats.samples_acked, stats.in_flight, stats.dropped) == (2, 1, 1, 10)
        sink.close()
        assert sink.stats() == stats
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (gone,) = [text for text in warnings if "the learner is gone" in text]
    assert f"127.0.0.1:{peer.port}" in gone
    assert len(warnings) <= 2  # if nobody waited just when it was lost, the connection says so too


def test_warn_counts_the_part_of_a_batch_that_was_not_accepted() -> None:
    with Peer(LeavingScript(hears=10)) as peer:
        sink = sink_for(peer, on_error="warn", **rows(10))
        sink.send(batch(*range(25)))
        assert (sink.stats().samples_sent, sink.stats().dropped) == (10, 15)
        sink.close()


def test_warn_is_about_the_peer_and_not_about_the_data_or_a_closed_sink() -> None:
    with Peer(Script()) as peer:
        sink = sink_for(peer, on_error="warn")
        with pytest.raises(SpecMismatchError):
            sink.send({"other": 1})
        sink.send(batch(1))
        sink.close()
        with pytest.raises(ConnectionClosedError, match="closed"):
            sink.send(batch(1))
        assert sink.stats().dropped == 0


def test_warn_still_raises_when_a_timeout_passes() -> None:
    """A learner that is slow is not gone."""
    with Peer(SilentScript()) as peer:
        sink = sink_for(peer, on_error="warn")
        sink.send(batch(1))
        for call in (sink.wait, sink.close):
            with pytest.raises(DeliveryTimeoutError):
                call(SHORT_S)


def test_warn_still_raises_when_nothing_is_acked_for_too_long() -> None:
    with Peer(SilentScript()) as peer:
        sink = sink_for(peer, on_error="warn", stall_timeout=SHORT_S, **rows(10))
        sink.send(batch(*range(10)))
        for call in (sink.wait, lambda: sink.send(batch(1)), sink.close):
            with pytest.raises(DeliveryTimeoutError, match="stall_timeout"):
                call()
        assert sink.stats().dropped == 0


class FakeResolver:
    """Resolves every name to ``address``, or to nothing, and counts how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.address: tuple[str, int] | None = None
        self.asked = 0
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, *_: object, **__: object) -> list[tuple[Any, ...]]:
        self.asked += 1
        if self.address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", self.address)]


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> FakeResolver:
    return FakeResolver(monkeypatch)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def never_greets(conn: PeerConnection) -> None:
    conn.receive_all()


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("reason", ["refused", "unknown", "silent"])
def test_warn_covers_a_learner_that_cannot_be_connected_to_until_it_can(
    reason: str, refusing: socket.socket, directory: FakeResolver, caplog: pytest.LogCaptureFixture
) -> None:
    """The second send does not even try; `connect` does, raises as ever, and makes sends work again."""
    with Peer(Script()) as learner, Peer(never_greets) as mute:
        directory.address = {"refused": refusing.getsockname(), "silent": (mute.host, mute.port)}.get(reason)
        sink = EchoSink("learner", 7, EXAMPLE, on_error="warn", connect_timeout=SHORT_S)
        sink.send(batch(1, 2))
        asked = directory.asked
        assert asked > 0
        for _ in range(3):
            sink.send(batch(3, 4, 5))
        sink.send({"index": 6})
        sink.wait()
        assert directory.asked == asked
        assert (sink.stats().samples_sent, sink.stats().dropped) == (0, 12)
        assert len(warnings_of(caplog)) == 1
        assert "learner:7" in warnings_of(caplog)[0]

        with pytest.raises(OSError, match="learner:7"):
            sink.connect()
        sink.send({"index": 7})
        assert sink.stats().dropped == 13

        directory.address = (learner.host, learner.port)
        assert sink.connect() is sink
        sink.send(batch(8, 9))
        sink.wait()
        assert (sink.stats().samples_acked, sink.stats().dropped) == (2, 13)
        sink.close()
        assert len(warnings_of(caplog)) == 1
        assert bytes(learner.connections[0].received)[:16] == np.array([8, 9]).tobytes()


def test_warn_holds_the_timeout_while_another_thread_connects() -> None:
    """The late call drops its samples. The learner is not gone, though: what comes after the connect arrives."""
    accepted, greet = threading.Event(), threading.Event()

    class LateScript(Script):
        def __call__(self, conn: PeerConnection) -> None:
            accepted.set()
            assert greet.wait(PATIENCE_S)
            super().__call__(conn)

    with Peer(LateScript()) as learner:
        sink = sink_for(learner, on_error="warn", connect_timeout=PATIENCE_S)
        connecting = threading.Thread(target=sink.send, args=(batch(1),))
        connecting.start()
        assert accepted.wait(PATIENCE_S)
        began = time.monotonic()
        sink.send(batch(2, 3), timeout=SHORT_S)
        assert time.monotonic() - began < PATIENCE_S / 3
        assert (sink.stats().samples_sent, sink.stats().dropped) == (0, 2)
        greet.set()
        connecting.join()
        sink.send(batch(4))
        sink.wait()
        assert (sink.stats().samples_acked, sink.stats().dropped) == (2, 2)
        sink.close()


def test_warn_does_not_outlive_close_where_nothing_could_be_connected(directory: FakeResolver) -> None:
    sink = EchoSink("learner", 7, EXAMPLE, on_error="warn", connect_timeout=SHORT_S)
    sink.send(batch(1))
    sink.close()
    with pytest.raises(ConnectionClosedError, match="closed"):
        sink.send(batch(1))
    assert sink.stats().dropped == 1


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_connect_says_that_the_connection_died(on_error: Any) -> None:
    with Peer(LeavingScript(hears=1)) as peer:
        sink = sink_for(peer, on_error=on_error)
        sink.send(batch(1))
        if on_error == "warn":
            sink.wait(PATIENCE_S)
        else:
            with pytest.raises(ConnectionClosedError):
                sink.wait(PATIENCE_S)
        for _ in range(2):
            with pytest.raises(ConnectionClosedError, match=f"127.0.0.1:{peer.port}.*1 samples un-acked") as lost:
                sink.connect()
            assert lost.value.unacked == 1
        if on_error == "warn":
            sink.send(batch(1, 2))
            assert sink.stats().dropped == 2
        sink.close()
        assert len(peer.connections) == 1


# Timeouts and calls from elsewhere while it connects.


@pytest.mark.usefixtures("descriptors")
def test_the_timeout_of_send_bounds_connecting() -> None:
    with Peer(never_greets) as peer:
        sink = sink_for(peer, connect_timeout=PATIENCE_S)
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=f"127.0.0.1:{peer.port}"):
                sink.send(batch(1), timeout=SHORT_S)
            assert SHORT_S / 2 < time.monotonic() - began < PATIENCE_S / 3
        sink.close()


class HeldScript(Script):
    """Greets only when told to, and says when it was connected to."""

    def __init__(self) -> None:
        super().__init__()
        self.connected, self.go = threading.Event(), threading.Event()

    def __call__(self, conn: PeerConnection) -> None:
        self.connected.set()
        assert self.go.wait(PATIENCE_S)
        super().__call__(conn)


def start(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException | None]]:
    """Run a call on a thread, and note how it ends."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


@pytest.mark.usefixtures("descriptors")
def test_the_timeout_of_send_bounds_waiting_for_another_thread_that_connects() -> None:
    held = HeldScript()
    with Peer(held) as peer:
        sink = sink_for(peer, connect_timeout=PATIENCE_S)
        thread, outcome = start(lambda: sink.send(batch(1)))
        assert held.connected.wait(PATIENCE_S)
        with pytest.raises(TimeoutError, match=f"127.0.0.1:{peer.port}"):
            sink.send(batch(2), timeout=SHORT_S)
        held.go.set()
        thread.join(PATIENCE_S)
        assert outcome == [None]
        sink.wait(PATIENCE_S)
        sink.close()
        assert held.received_ids() == [1] * 9
        assert len(peer.connections) == 1


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize("greets", [True, False], ids=["that succeeds", "that fails"])
def test_close_does_not_wait_for_another_thread_that_connects(greets: bool, on_error: Any) -> None:
    """That thread finds the sink closed, and leaves no connection behind."""
    held = HeldScript()
    with Peer(held if greets else never_greets) as peer:
        sink = sink_for(peer, connect_timeout=PATIENCE_S if greets else 3 * SHORT_S, on_error=on_error)
        thread, outcome = start(lambda: sink.send(batch(1)))
        while not peer.connections:
            assert thread.is_alive()
            time.sleep(0.001)
        began = time.monotonic()
        sink.close(SHORT_S)
        assert time.monotonic() - began < PATIENCE_S / 3
        held.go.set()
        thread.join(PATIENCE_S)
        assert isinstance(outcome[0], ConnectionClosedError if greets else (ConnectionClosedError, TimeoutError))
        with pytest.raises(ConnectionClosedError, match="closed"):
            sink.send(batch(2))
        assert len(peer.connections) == 1
        if greets:
            assert held.received_ids() == []


@pytest.mark.usefixtures("descriptors")
def test_a_signal_handler_that_interrupts_connecting_is_turned_away() -> None:
    answers: list[str] = []
    held = HeldScript()

    def handler(*_: object) -> None:
        for call in (lambda: sink.send(batch(2)), sink.connect):
            try:
                call()
                answers.append("done")
            except RuntimeError as error:
                answers.append(str(error))
        held.go.set()

    def interrupt(conn: PeerConnection) -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        held(conn)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with Peer(interrupt) as peer:
            sink = sink_for(peer, connect_timeout=PATIENCE_S, resend_at_close=False)
            sink.send(batch(1))
            sink.wait(PATIENCE_S)
            sink.send(batch(3))
            sink.close()
            assert held.received_ids() == [1, 3]
            assert len(peer.connections) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(answers) == 2
    assert all("signal handler" in answer for answer in answers)


# Closing.


@pytest.mark.parametrize(
    ("sent", "options"),
    [
        (1, {}),
        (3, {}),
        (8, {}),
        (9, {}),
        (100, {}),
        (6, rows(2)),
        (100, rows(2)),
        (1, rows(7, resent=13)),
        (7, {"resend_acked": 1}),
        (7, {"resend_acked": 0}),
    ],
    ids=repr,
)
def test_close_sends_exactly_the_tail_once_more(sent: int, options: dict[str, Any]) -> None:
    """`resend_acked` further payloads: the last samples, in order, cycled if there were fewer."""
    script = Script()
    resent = options.get("resend_acked", 8)
    with Peer(script) as peer:
        sink = sink_for(peer, **options)
        sink.send(batch(*range(sent)))
        sink.close()
        kept = list(range(sent))[max(0, sent - resent) :]
        assert script.received_ids() == list(range(sent)) + [kept[i % len(kept)] for i in range(resent)]
        assert sink.stats().samples_sent == sink.stats().samples_acked == sent


@pytest.mark.parametrize("options", [{"resend_at_close": False}, {"resend_acked": 0}], ids=repr)
def test_close_sends_no_tail_when_told_not_to(options: dict[str, Any]) -> None:
    script = Script()
    with Peer(script) as peer:
        with sink_for(peer, **options) as sink:
            sink.send(batch(1, 2, 3))
        assert script.received_ids() == [1, 2, 3]


def test_close_without_samples_sends_no_tail() -> None:
    script = Script()
    with Peer(script) as peer:
        with sink_for(peer):
            pass
        assert script.received_ids() == []


@pytest.mark.usefixtures("descriptors")
def test_close_is_idempotent_and_send_after_it_raises() -> None:
    script = Script()
    with Peer(script) as peer:
        sink = sink_for(peer)
        sink.send(batch(1, 2))
        for _ in range(3):
            sink.close()
        with pytest.raises(ConnectionClosedError, match=f"127.0.0.1:{peer.port}.*closed"):
            sink.send(batch(3))
        sink.wait()
        assert len(script.received_ids()) == 2 + 8
        assert len(script.connections) == 1


@pytest.mark.usefixtures("descriptors")
def test_close_on_a_peer_that_never_acks_gives_up_in_time() -> None:
    """With the count; nothing is left behind, which the fixtures see, and a second `close` has nothing to say."""
    with Peer(SilentScript()) as peer:
        sink = sink_for(peer)
        sink.send(batch(*range(5)))
        with pytest.raises(DeliveryTimeoutError, match="5 samples un-acked") as caught:
            sink.close(SHORT_S)
        assert caught.value.unacked == 5
        sink.close(SHORT_S)
        for call in (lambda: sink.send(batch(6)), sink.wait, sink.connect):
            with pytest.raises(ConnectionClosedError, match=f"127.0.0.1:{peer.port}.*5 samples un-acked") as closed:
                call()
            assert closed.value.unacked == 5


@pytest.mark.parametrize("options", [{}, rows(8, resent=13)], ids=["all of it packed", "a part of it packed"])
def test_a_tail_that_is_not_acked_is_not_counted_as_sent(options: dict[str, Any]) -> None:
    """`close` says that it was not done, while the counts stay those of `send`."""
    with Peer(AckingScript(8)) as peer:
        sink = sink_for(peer, **options)
        sink.send(batch(*range(8)))
        with pytest.raises(DeliveryTimeoutError):
            sink.close(SHORT_S)
        assert sink.stats().samples_sent == 8


def test_leaving_a_with_block_closes() -> None:
    script = Script()
    with Peer(script) as peer:
        with sink_for(peer, resend_at_close=False) as sink:
            sink.send(batch(1, 2))
        assert script.received_ids() == [1, 2]
        with pytest.raises(ConnectionClosedError):
            sink.send(batch(3))


def leave_by_exception(sink: EchoSink) -> None:
    with sink:
        sink.send(batch(1, 2))
        raise KeyError("mine")


@pytest.mark.usefixtures("descriptors")
def test_the_exception_of_a_with_block_is_never_masked(caplog: pytest.LogCaptureFixture) -> None:
    """Even when closing fails too: that goes to the log."""
    with Peer(LeavingScript(hears=2)) as peer:
        with pytest.raises(KeyError, match="mine"):
            leave_by_exception(sink_for(peer))
        assert any("KeyError" in record.getMessage() and "un-acked" in record.getMessage() for record in caplog.records)


def test_a_with_block_left_by_an_exception_delivers_what_was_sent() -> None:
    script = Script()
    with Peer(script) as peer:
        with pytest.raises(KeyError, match="mine"):
            leave_by_exception(sink_for(peer, resend_at_close=False))
        assert script.received_ids() == [1, 2]


# Other clients.


def test_a_subclass_of_our_client_is_used_as_ours() -> None:
    """With blocks of samples and all options, and not sample by sample."""
    made: list[Any] = []

    class Mine(TcpClient):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(*args, **options)

    script = Script()
    with Peer(script) as peer:
        with sink_for(peer, client=Mine, connect_timeout=7.0) as sink:
            sink.send(batch(1, 2))
        assert len(script.received_ids()) == 2 + 8
        assert made[0]["connect_timeout"] == pytest.approx(7.0, abs=0.5)  # of a deadline that runs already


class FragileClient:
    """A client that only one thread may use at a time, and that says when two do; its peer is gone after ``lives``."""

    def __init__(self, lives: int = 1000) -> None:
        self.lives = lives
        self.inside = 0
        self.overlap = threading.Event()

    def send(self, data: Any) -> None:
        if not self.lives:
            raise BrokenPipeError("gone")
        self.lives -= 1
        self.inside += 1
        if self.inside > 1:
            self.overlap.set()
        self.overlap.wait(SHORT_S)  # long enough for another thread to come in, if it is let
        self.inside -= 1

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_foreign_client_is_used_by_one_thread_at_a_time() -> None:
    """The sink is thread-safe; the stock client, for one, mixes the bytes of samples that two threads send."""
    client = FragileClient()
    sink = EchoSink("nowhere", 1, EXAMPLE, client=lambda *_: client)
    threads = [threading.Thread(target=sink.send, args=({"index": 1},)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    assert not client.overlap.is_set()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_errors_of_a_foreign_client_are_translated(on_error: Any) -> None:
    client = FragileClient(lives=2)
    client.overlap.set()
    sink = EchoSink("learner", 7, EXAMPLE, client=lambda *_: client, on_error=on_error)
    if on_error == "warn":
        sink.send(batch(1, 2, 3, 4, 5))
        assert sink.stats().dropped == 3
    else:
        with pytest.raises(ConnectionClosedError, match=r"learner:7: gone.*2 samples un-acked") as caught:
            sink.send(batch(1, 2, 3, 4, 5))
        assert (caught.value.rows_accepted, caught.value.unacked) == (2, 2)
        assert isinstance(caught.value.__cause__, BrokenPipeError)
    assert (sink.stats().samples_sent, sink.stats().in_flight) == (2, 2)
    sink.close()
    assert sink.stats().in_flight == 0


# Who let go of it.


def send_and_die(sink: EchoSink) -> None:
    sink.send(batch(1))
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_one_that_dies(sink: EchoSink) -> None:
    child = multiprocessing.get_context("fork").Process(target=send_and_die, args=(sink,))
    child.start()
    child.join()
    child.close()
    sink.wait()


def close_too_soon(sink: EchoSink) -> None:
    sink.send(batch(1))
    sink.close(0.0)


@pytest.mark.parametrize("fails", [wait_for_one_that_dies, close_too_soon])
def test_no_error_that_is_over_keeps_a_sink(fails: Callable[[EchoSink], None]) -> None:
    def silent(conn: PeerConnection) -> None:
        conn.send_handshake({"index": np.array(0)})
        conn.receive_all()

    gc.disable()
    try:
        with Peer(silent) as peer:
            sink = EchoSink("127.0.0.1", peer.port, EXAMPLE, resend_at_close=False).connect()
            with contextlib.suppress(ConnectionClosedError, DeliveryTimeoutError):
                fails(sink)
                pytest.fail("did not raise")
            left = weakref.ref(sink)
            del sink
            assert left() is None
    finally:
        gc.enable()


def test_a_step_may_be_any_whole_number() -> None:
    """It is taken as it is now: a counter that is a tensor, or a small type that overflows, does not move the rest."""
    with Peer(Script()) as peer, sink_for(peer) as sink:
        counter = torch.tensor(0)
        for _ in range(3):
            sink.send(batch(1), step=counter)
            counter += 1
        sink.wait()
        counter += 1000
        assert sink.acked_through == 2
        sink.send(batch(1), step=np.uint8(255))
        sink.send(batch(1))
        sink.wait()
        assert sink.acked_through == 256


def slow_select(data: Any) -> Any:
    time.sleep(2 * SHORT_S)
    return data


def test_the_timeout_of_a_send_begins_after_select() -> None:
    with Peer(Script()) as peer, sink_for(peer, select=slow_select) as sink:
        sink.send(batch(1), timeout=SHORT_S)
        sink.wait()
        assert sink.stats().samples_acked == 1


def test_a_signal_handler_cannot_enter_the_counting_of_dropped_samples(refusing: socket.socket) -> None:
    """It would start to report to the parent a second time."""
    sink = EchoSink("127.0.0.1", refusing.getsockname()[1], EXAMPLE, on_error="warn", connect_timeout=0.0)
    # As if the handler had interrupted the holder.
    with sink._session()._count_lock, pytest.raises(RuntimeError, match="signal handler"):
        sink.send(batch(2))
    sink.send(batch(3, 4))
    assert sink.stats().dropped == 2
    sink.close()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_failed_connect_keeps_no_sink_alive(on_error: Any, refusing: socket.socket) -> None:
    gc.disable()
    try:
        sink = EchoSink("127.0.0.1", refusing.getsockname()[1], EXAMPLE, on_error=on_error, connect_timeout=SHORT_S)
        with contextlib.suppress(ConnectionRefusedError):
            sink.send(batch(1))
        gone = weakref.ref(sink)
        sink.close()
        del sink
        assert gone() is None
    finally:
        gc.enable()


def test_a_thread_that_finds_the_sink_closed_does_not_cut_short_what_others_sent() -> None:
    """It waited for the connection that another thread opened, while a third closed the sink."""
    with Peer(Script()) as peer:
        for _ in range(30):
            sink = sink_for(peer)
            accepted: list[int] = []

            def work(sink: EchoSink = sink, accepted: list[int] = accepted) -> None:
                with contextlib.suppress(ConnectionClosedError):
                    for _ in range(5):
                        sink.send(batch(*range(40)))
                        accepted.append(40)

            threads = [threading.Thread(target=work) for _ in range(3)]
            threads += [threading.Thread(target=sink.close, args=(PATIENCE_S,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            stats = sink.stats()
            assert (stats.samples_sent, stats.in_flight, stats.maybe_lost) == (sum(accepted), 0, 0)


def test_the_buffer_grows_by_itself_for_samples_that_need_more() -> None:
    """By default it holds ``resend_acked + 2`` samples, however large, and no limit of 64 MiB stops them."""
    large = {"x": np.zeros(7_000_000, np.uint8)}

    class LargeScript(Script):
        example = large

    script = LargeScript()
    with Peer(script) as peer:
        with sink_for(peer, example=large) as sink:
            for number in range(12):
                large["x"][:] = number
                sink.send(large)
            sink.wait()
            assert sink.stats().samples_acked == 12
        received = np.frombuffer(script.connections[0].received, np.uint8).reshape(-1, 7_000_000)
        assert received[:, ::999_999].tolist() == [[number] * 8 for number in (*range(12), *range(4, 12))]


def test_warn_does_not_sit_out_a_lost_connection_in_a_full_buffer(caplog: pytest.LogCaptureFixture) -> None:
    """It drops what finds no room until the learner is back, which then gets what the buffer holds."""
    first, again = LeavingScript(hears=4, acks=4), Script()
    scripts: Iterator[Script] = iter([first])
    with Peer(lambda conn: next(scripts, again)(conn)) as peer:
        sink = sink_for(peer, on_error="warn", reconnect=PATIENCE_S, resend_at_close=False, **rows(10))
        sink.connect()
        peer.refuse()
        sink.send(batch(0, 1, 2, 3))
        eventually(lambda: any("connection lost" in text for text in caplog.messages))
        began = time.monotonic()
        sink.send(batch(*range(4, 24)))  # 4 are acked, and the buffer holds 10
        for number in range(24, 44):
            sink.send(batch(number))
        assert time.monotonic() - began < 1.0
        assert (sink.stats().samples_sent, sink.stats().dropped) == (14, 30)
        full = [text for text in caplog.messages if "the buffer is full: samples are dropped" in text]
        assert len(full) == 1
        peer.listen()
        sink.wait(PATIENCE_S)
        sink.send(batch(44))
        sink.wait(PATIENCE_S)
        assert (sink.stats().samples_acked, sink.stats().dropped) == (15, 30)
        assert any("connected again; 30 samples were dropped" in text for text in caplog.messages)
        sink.close()
        assert again.received_ids() == [*range(14), 44]


def test_warn_notices_a_connection_that_is_lost_while_a_send_waits() -> None:
    """At most a second of a training loop is lost to it."""
    leave = threading.Event()

    class StuckScript(Script):
        def converse(self, conn: PeerConnection) -> None:
            conn.receive(10 * SIZE)
            assert leave.wait(PATIENCE_S)
            conn.close()

    with Peer(StuckScript()) as peer:
        sink = sink_for(peer, on_error="warn", reconnect=PATIENCE_S, resend_at_close=False, **rows(10)).connect()
        peer.refuse()
        sink.send(batch(*range(10)))
        sender = threading.Thread(target=sink.send, args=(batch(10, 11),))
        sender.start()
        sender.join(SHORT_S)
        assert sender.is_alive(), "a learner that only acks nothing is waited for"
        began = time.monotonic()
        leave.set()
        sender.join(PATIENCE_S)
        assert time.monotonic() - began < 1.0
        assert (sink.stats().samples_sent, sink.stats().dropped) == (10, 2)
        with pytest.raises(DeliveryTimeoutError):
            sink.wait(0)
        with contextlib.suppress(DeliveryTimeoutError):
            sink.close(0)
