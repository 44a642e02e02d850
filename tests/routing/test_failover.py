"""What the learners that are left take over, and the end of a sink to several: what several threads, signal handlers
and late devices make of it. The learners are scripted, for a real one cannot be made to ack so much and no more.
"""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from calls import HANG_TIMEOUT_S, Gate, alarms, eventually, running
from fake_device import FakeDevice
from leaks import our_threads
from peers import Peer, PeerConnection

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, TcpClient
from echo_torch.client import sender
from echo_torch.routing.balancer import Balancer
from echo_torch.routing.failover import Failover, Learner
from echo_torch.samples.spec import SampleSpec
from echo_torch.support.deadline import NEVER

EXAMPLE = {"id": np.zeros((), np.int64)}
SIZE = 8
BRIEF_S = 0.1
THREADS = 2
BATCHES = 60


def batch(first: int, rows: int = 4) -> dict[str, Any]:
    return {"id": np.arange(first, first + rows)}


def acks(conn: PeerConnection) -> None:
    conn.send_handshake(EXAMPLE)
    conn.receive_all(SIZE)


def hears(conn: PeerConnection) -> None:
    conn.send_handshake(EXAMPLE)
    conn.receive_all()


class Dying:
    """Takes ``rows`` samples, acks none, and is gone for good when told."""

    def __init__(self, rows: int = 4) -> None:
        self._rows = rows
        self._gate = Gate()
        self.peer = Peer(self)

    def __call__(self, conn: PeerConnection) -> None:
        conn.send_handshake(EXAMPLE)
        conn.receive(self._rows * SIZE)
        self._gate.wait()
        conn.reset()

    def die(self) -> None:
        self.peer.refuse()
        self._gate.open()


def sink_to(*peers: Peer, **options: Any) -> EchoSink:
    options = {"failover": True, "reconnect": 0, "resend_at_close": False, **options}
    return EchoSink("127.0.0.1", [peer.port for peer in peers], EXAMPLE, **options).connect()


def numbers(peer: Peer) -> list[int]:
    received: list[int] = np.frombuffer(bytes(peer.connections[0].received), np.int64).tolist()
    return received


# The end.


@pytest.mark.parametrize("failover", [False, True])
def test_calls_return_after_close_timed_out(failover: bool) -> None:
    with Peer(hears) as stopped, Peer(acks) as other:
        sink = sink_to(stopped, other, failover=failover)
        sink.send(batch(0))
        sink.send(batch(4))
        with pytest.raises(DeliveryTimeoutError):
            sink.close(BRIEF_S)
        with running(sink.close, sink.wait) as outcomes:
            pass
        assert outcomes[0] is None
        assert isinstance(outcomes[1], ConnectionClosedError)
        assert f"127.0.0.1:{stopped.port}" in str(outcomes[1])
        assert sink.stats().in_flight == 4


def test_close_does_not_raise_a_reported_loss_again() -> None:
    for failover in (False, True):
        one, other = Dying(), Dying()
        with one.peer, other.peer:
            sink = sink_to(one.peer, other.peer, failover=failover)
            sink.send(batch(0))
            sink.send(batch(4))
            one.die()
            other.die()
            eventually(lambda sink=sink: all(peer.lost for peer in sink.stats().peers))  # type: ignore[misc]
            with pytest.raises(ConnectionClosedError):
                sink.wait()
            if failover:
                sink.close()
            else:  # of the other one, nothing was said
                with pytest.raises(ConnectionClosedError, match=f"127.0.0.1:{other.peer.port}"):
                    sink.close()
            assert sink.stats().in_flight == 8


def test_an_interrupted_close_is_completed_by_the_io_threads() -> None:
    gate = Gate()

    def acks_late(conn: PeerConnection) -> None:
        conn.send_handshake(EXAMPLE)
        conn.receive(4 * SIZE)
        gate.wait()
        conn.ack(4)
        conn.receive_all()

    def strike(*_: object) -> None:
        raise KeyboardInterrupt

    with Peer(acks_late) as late, Peer(acks) as other:
        sink = sink_to(late, other)
        sink.send(batch(0))
        sink.send(batch(4))
        with alarms(strike):
            signal.setitimer(signal.ITIMER_REAL, BRIEF_S)
            with pytest.raises(KeyboardInterrupt):
                sink.close()
        gate.open()
        eventually(lambda: not our_threads())
        sink.close()
        assert sink.stats().samples_acked == 8


# What is taken over.


def test_wait_covers_rows_that_another_thread_passes_on_meanwhile() -> None:
    first, rest = Gate(), Gate()

    def acks_late(conn: PeerConnection) -> None:
        conn.send_handshake(EXAMPLE)
        conn.receive(4 * SIZE)
        first.wait()
        conn.ack(4)
        conn.receive(5 * SIZE)
        rest.wait()
        conn.ack(5)
        conn.receive_all()

    dying = Dying()
    with Peer(acks_late) as late, dying.peer:
        sink = sink_to(late, dying.peer)
        sink.send(batch(0))
        sink.send(batch(4))
        waited: list[int] = []

        def wait() -> None:
            sink.wait()
            waited.append(sink.stats().samples_acked)

        with running(wait) as outcomes:
            eventually(lambda: len(late.connections[0].received) == 4 * SIZE)
            dying.die()
            eventually(lambda: bool(sink.stats().peers[1].lost))
            sink.send(batch(8, 1))  # passes on, while the other thread waits for the first four
            first.open()
            eventually(lambda: sink.stats().samples_acked == 4)
            with pytest.raises(DeliveryTimeoutError):
                sink.wait(BRIEF_S)
            assert not waited
            rest.open()
        assert outcomes == [None]
        assert waited == [9]
        assert sorted(numbers(late)) == list(range(9))
        sink.close()


class InterruptedClient(TcpClient):
    """Has a signal handler strike whenever it was given something."""

    def __init__(self, port: int, handler: Callable[[], None]) -> None:
        super().__init__("127.0.0.1", port, EXAMPLE)
        self._handler = handler

    def send_packed(self, rows: memoryview, most: int) -> int:
        taken = super().send_packed(rows, min(most, 2))
        self._handler()
        return taken


def test_a_signal_handler_during_failover_gets_a_runtime_error() -> None:
    dying, rejected = Dying(), []

    def handler() -> None:
        with pytest.raises(RuntimeError, match="signal handler"):
            failover.pass_on_all(NEVER, None)
        rejected.append(True)

    with dying.peer, Peer(acks) as peer:
        lost = TcpClient("127.0.0.1", dying.peer.port, EXAMPLE)
        target = InterruptedClient(peer.port, handler)
        failover = Failover([Learner(lost), Learner(target)])
        lost.send_rows([np.arange(4)])
        dying.die()
        eventually(lambda: lost.closed)
        assert failover.pass_on_all(NEVER, None)
        target.wait()
        assert numbers(peer) == [0, 1, 2, 3]
        assert len(rejected) == 2
        target.close()
        with pytest.raises(ConnectionClosedError):
            lost.close(0)


# Devices.


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    made = FakeDevice()
    made.install(monkeypatch)
    return made


class BlockingHandler(logging.Handler):
    """Keeps a connection's thread when it says what ended it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def emit(self, record: logging.LogRecord) -> None:
        if "ended with" in record.getMessage():
            self.gate.wait()


def test_uncopied_device_rows_are_not_passed_on_while_the_io_thread_is_blocked(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "THREAD_EXIT_TIMEOUT_S", BRIEF_S)
    handler, dying, log = BlockingHandler(), Dying(rows=2), logging.getLogger("echo_torch")
    with dying.peer:
        client = TcpClient("127.0.0.1", dying.peer.port, EXAMPLE)
        spec = SampleSpec({"id": torch.zeros((), dtype=torch.int64)})
        client.send_match(spec.match(batch(0, 2)))
        client.send_match(spec.match({"id": device.put(torch.arange(2, 6))}))
        log.addHandler(handler)
        try:
            dying.die()
            eventually(lambda: client.closed)
            undelivered = client.undelivered()
            assert (undelivered.remaining, undelivered.unrecoverable, undelivered.unacked) == (2, 4, 6)
            assert undelivered.view().tobytes() == np.arange(2).tobytes()
        finally:
            handler.gate.open()
            log.removeHandler(handler)
        with pytest.raises(ConnectionClosedError):
            client.close(HANG_TIMEOUT_S)
        device.run()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_uncopied_device_samples_are_reported_lost_and_sending_continues(
    device: FakeDevice, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dying = Dying(rows=2)
    with dying.peer, Peer(acks) as other:
        sink = sink_to(dying.peer, other, on_error=on_error)
        sink.send(batch(0, 2))
        sink.send(batch(2))
        sink.send({"id": device.put(torch.arange(100, 104))})
        dying.die()
        eventually(lambda: bool(sink.stats().peers[0].lost))
        what = "4 samples are lost, which had not been copied from their device"
        if on_error == "warn":
            sink.wait()
            assert what in caplog.text
        else:
            with pytest.raises(ConnectionClosedError, match=what) as caught:
                sink.wait()
            assert caught.value.unacked == 4
        sink.send(batch(6))
        sink.wait()
        stats = sink.stats()
        assert (stats.samples_sent, stats.samples_acked, stats.maybe_lost, stats.dropped) == (14, 10, 4, 0)
        assert sink.acked_through == 1
        sink.close()
        assert sorted(numbers(other)) == list(range(10))
        device.run()


# Learners that are lost one after the other while several threads send: what the others must have got in the end.


class DiesAfter:
    """Acks all that it gets, until it has got ``life`` samples; then nothing listens there any more."""

    def __init__(self, life: int | None) -> None:
        self.life = life
        self.received: list[int] = []
        self.dead = threading.Event()
        self.peer = Peer(self)

    def __call__(self, conn: PeerConnection) -> None:
        conn.send_handshake(EXAMPLE)
        rest = bytearray()
        while piece := conn.sock.recv(1 << 16):
            rest += piece
            whole = len(rest) // SIZE
            self.received += np.frombuffer(bytes(rest[: whole * SIZE]), np.int64).tolist()
            del rest[: whole * SIZE]
            if self.life is not None and len(self.received) >= self.life:
                self.peer.refuse()
                conn.reset()
                self.dead.set()
                return
            conn.ack(whole)


def send_batches(sink: EchoSink, first: int, chance: random.Random) -> int:
    """Send batches with the numbers from ``first`` on; gives the number after the last."""
    for _ in range(BATCHES):
        count = chance.choice([1, 3, 32, 200])
        sink.send({"id": np.arange(first, first + count)})
        first += count
        if chance.random() < 0.1:
            sink.wait()
    return first


@pytest.mark.parametrize("route", ["round_robin", "least_inflight"])
@pytest.mark.parametrize("seed", range(6))
def test_only_samples_acked_by_lost_learners_are_lost(seed: int, route: Any) -> None:
    chance = random.Random(seed)
    learners = [DiesAfter(None), *(DiesAfter(chance.randrange(1, 3000)) for _ in range(3))]
    chance.shuffle(learners)
    options: dict[str, Any] = {"buffer_bytes": chance.choice([100, 1000, 100_000]) * SIZE, "max_inflight_msgs": 64}
    options |= {"reconnect": chance.choice([0, 0.05]), "failover": True, "route": route}
    firsts = [thread * 1_000_000 for thread in range(THREADS)]
    ends = [0] * THREADS
    with contextlib.ExitStack() as stack:
        for learner in learners:
            stack.enter_context(learner.peer)
        sink = EchoSink("127.0.0.1", [learner.peer.port for learner in learners], EXAMPLE, **options).connect()

        def work(thread: int) -> None:
            ends[thread] = send_batches(sink, firsts[thread], random.Random(seed * THREADS + thread))

        with running(*(lambda thread=thread: work(thread) for thread in range(THREADS))) as outcomes:
            pass
        assert outcomes == [None] * THREADS
        sink.wait()
        stats = sink.stats()
        wanted = {number for first, end in zip(firsts, ends, strict=True) for number in range(first, end)}
        assert stats.samples_sent == stats.samples_acked == len(wanted)
        assert stats.maybe_lost == 0
        assert sink.acked_through == THREADS * BATCHES - 1
        got: set[int] = set()
        for learner, counts in zip(learners, stats.peers, strict=True):
            assert counts.lost == learner.dead.is_set()
            got |= set(learner.received[: max(0, counts.samples_acked - 8)] if counts.lost else learner.received)
        assert got == wanted
        sink.close()
        assert sink.stats().in_flight == 0


def test_a_learner_whose_connection_ended_in_order_is_taken_over_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the process's exit ends it, with samples un-acked, while a thread still waits: that wait must end."""
    monkeypatch.setattr("echo_torch.support.shutdown.DELIVER_AT_EXIT_S", BRIEF_S)
    with Peer(hears) as silent, Peer(acks) as other:
        clients = [TcpClient(peer.host, peer.port, EXAMPLE) for peer in (silent, other)]
        balancer = Balancer("both", [Learner(client) for client in clients], False, failover=True, stall_timeout=None)
        clients[0].send_rows([np.arange(4)])
        with running(lambda: balancer.wait(NEVER)) as outcomes:
            clients[0].abandon()
        assert outcomes == [None]
        assert numbers(other) == [0, 1, 2, 3]
        balancer.close(NEVER)
