"""Batches of an accelerator: when they are packed, copied, written and overwritten, on one that is as late as can be.

The device is a fake one (`fake_device`), so that this holds where there is no other; the peer is scripted, for a real
server does not show the order in which bytes come. In test_cuda, both are real.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import echo
import numpy as np
import pytest
import torch
from calls import HANG_TIMEOUT_S, Gate, eventually, running
from clock import Clock
from fake_device import FakeDevice, FakeEvent, FakeStream, payloads
from hypothesis import given, settings
from hypothesis import strategies as st
from leaks import assert_threads_end
from peers import Peer, PeerConnection, Scripts

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, SpecMismatchError
from echo_torch.client import connection, pump
from echo_torch.client.flow import AckBatching
from echo_torch.client.io_thread import HEARTBEAT_S
from echo_torch.ring import ring, staging
from echo_torch.ring.ring import Ring
from echo_torch.ring.staging import DeviceCopy, main_device, pack_rows, widest_common_unit
from echo_torch.samples.spec import SampleSpec
from echo_torch.support import accelerator

ROWS = 8
EXAMPLE = {"a": torch.zeros(3, dtype=torch.int32), "b": torch.zeros((), dtype=torch.uint8)}
SIZE = 13
SHORT_S = 0.2
SLOW_WARNING = "samples on a device are copied while send() waits, which is slow"


def batch(first: int, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Samples with the numbers from ``first`` on, no two of which have a byte in common at the same place."""
    numbers = torch.arange(first, first + rows)
    return {"a": (numbers[:, None] * 0x01010101 + torch.arange(3)).int(), "b": numbers.to(torch.uint8)}


def batch_on(device: FakeDevice, first: int, rows: int = ROWS) -> dict[str, torch.Tensor]:
    return {name: device.put(leaf) for name, leaf in batch(first, rows).items()}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    made = FakeDevice()
    made.install(monkeypatch)
    return made


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which connections tell how long nothing was acked: however late threads are on a machine that is busy."""
    clock.now = time.monotonic()
    for module in (connection, pump, ring):
        monkeypatch.setattr(module, "time", clock)
    return clock


def acks_everything(conn: PeerConnection) -> None:
    conn.send_handshake(SampleSpec(EXAMPLE).zeroed_numpy_sample())
    conn.receive_all(SIZE)


@contextmanager
def connected_sink(
    script: Callable[[PeerConnection], None] = acks_everything, **options: Any
) -> Iterator[tuple[Peer, EchoSink]]:
    with Peer(script) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE, resend_at_close=False, **options).connect()
        try:
            yield peer, sink
        finally:
            sink.close(HANG_TIMEOUT_S)


def received_samples(peer: Peer, number: int = 0) -> list[bytes]:
    """The samples that a connection received so far."""
    received = bytes(peer.connections[number].received)
    return [received[at : at + SIZE] for at in range(0, len(received), SIZE)]


# The order of things.


def produce_send_overwrite(device: FakeDevice, sink: EchoSink, batches: int = 3) -> list[bytes]:
    """Enqueue kernels that make a batch, send it, and enqueue others that overwrite it; gives what is to arrive."""
    sent = []
    for number in range(batches):
        made = batch(number * ROWS)
        there = {name: device.put(torch.zeros_like(leaf)) for name, leaf in made.items()}
        for name, leaf in made.items():
            device.current.enqueue(lambda to=there[name], leaf=leaf: to.copy_(leaf))
        sink.send(there)
        for leaf in there.values():
            device.current.enqueue(lambda to=leaf: to.fill_(0x77))
        sent += payloads(made)
    return sent


def send_before_device_runs(device: FakeDevice) -> list[bytes]:
    """What arrives, and what should, of a device that does nothing until all is sent, and then our own stream first."""
    with connected_sink() as (peer, sink):
        expected = produce_send_overwrite(device, sink)
        gc.collect()
        device.run()
        sink.wait(HANG_TIMEOUT_S)
        return [got == want for got, want in zip(received_samples(peer), expected, strict=True)]


def wait_before_device_runs(device: FakeDevice) -> list[bool]:
    """The same if what was written before the device did anything is what counts: nothing must be."""
    with connected_sink() as (peer, sink):
        expected = produce_send_overwrite(device, sink, batches=1)
        with pytest.raises(DeliveryTimeoutError, match=f"{ROWS} samples un-acked"):
            sink.wait(SHORT_S)
        assert not received_samples(peer)
        device.run()
        sink.wait(HANG_TIMEOUT_S)
        return [got == want for got, want in zip(received_samples(peer), expected, strict=True)]


@contextmanager
def device_running(device: FakeDevice) -> Iterator[None]:
    """The device does what it is given, a while later."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.002):
            device.run()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        device.run()


def send_more_than_the_ring_holds(device: FakeDevice, batches: int = 10) -> list[bool]:
    """The same for a ring that has room for one and a half batches: rows are used again, while the device is late."""
    with connected_sink(buffer_bytes=20 * SIZE) as (peer, sink), device_running(device):
        expected = produce_send_overwrite(device, sink, batches=batches)
        sink.wait(HANG_TIMEOUT_S)
        return [got == want for got, want in zip(received_samples(peer), expected, strict=True)]


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def interrupt_send(device: FakeDevice, sink: EchoSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a send interrupted when its copy is enqueued."""
    record = FakeStream.record_event

    def interrupts(stream: FakeStream) -> FakeEvent:
        if stream is not device.current:
            monkeypatch.setattr(FakeStream, "record_event", record)
            raise Interrupted
        return record(stream)

    monkeypatch.setattr(FakeStream, "record_event", interrupts)
    with pytest.raises(Interrupted):
        sink.send(batch_on(device, 100))


def send_after_an_interrupt(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A send is broken off when its copy is enqueued, and others follow, the first of them from the CPU."""
    gate = Gate()

    def acks_late(conn: PeerConnection) -> None:
        conn.send_handshake(SampleSpec(EXAMPLE).zeroed_numpy_sample())
        conn.receive(SIZE)
        gate.wait()
        conn.ack()
        conn.receive_all(SIZE)

    with connected_sink(acks_late, max_inflight_msgs=1) as (peer, sink):
        interrupt_send(device, sink, monkeypatch)
        later = threading.Timer(SHORT_S, device.run)
        later.start()
        sink.send(batch(0))
        later.join()  # all but one of the samples from the CPU lie in the ring now
        gate.open()
        expected = payloads(batch(0)) + produce_send_overwrite(device, sink)
        device.run()
        sink.wait(HANG_TIMEOUT_S)
        return [got == want for got, want in zip(received_samples(peer), expected, strict=True)]


def test_a_late_device(device: FakeDevice) -> None:
    assert all(send_before_device_runs(device))
    assert not device.freed_too_soon


def test_nothing_is_written_before_it_is_there(device: FakeDevice) -> None:
    assert all(wait_before_device_runs(device))


def test_rows_are_used_again(device: FakeDevice) -> None:
    assert all(send_more_than_the_ring_holds(device))


def test_a_send_that_is_interrupted_leaves_nothing(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(send_after_an_interrupt(device, monkeypatch))


def test_the_closing_tail_is_not_what_an_interrupted_send_left(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a block is left by Ctrl-C: `close` repeats the last samples in the rows that the copy goes to."""
    with Peer(acks_everything) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE).connect()
        sink.send(batch(0))
        interrupt_send(device, sink, monkeypatch)
        with device_running(device):
            sink.close(HANG_TIMEOUT_S)
        assert received_samples(peer) == 2 * payloads(batch(0))


def test_a_copy_left_by_an_interrupted_send_blocks_nobody_for_ever(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Peer(acks_everything) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE).connect()
        sink.send(batch(0))
        interrupt_send(device, sink, monkeypatch)
        with pytest.raises(DeliveryTimeoutError, match=r"send\(\) not done within 0.2 s"):
            sink.send(batch(ROWS), timeout=SHORT_S)
        with pytest.raises(DeliveryTimeoutError, match=r"close\(\) not done within 0.2 s"):
            sink.close(SHORT_S)
        assert_threads_end()
        assert received_samples(peer) == payloads(batch(0))
    device.run()


def _does_not_wait(stream: FakeStream, other: FakeStream) -> None:
    """For a copy that does not wait for the kernel that packs."""


def _passed_at_once(stream: FakeStream) -> FakeEvent:
    """For an event that is recorded before the copy."""
    event = FakeEvent()
    event.passed = True
    return event


def _ignores_unreleased_rows(ring: Ring, want: int) -> tuple[int, int]:
    """For rows that are used again although they are not released."""
    place = ring.reserved % ring.capacity
    return place, min(want, ring.capacity - place)


def test_a_copy_that_does_not_wait_for_the_packing_would_be_seen(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeStream, "wait_stream", _does_not_wait)
    assert not any(send_before_device_runs(device))


def test_a_packing_that_does_not_follow_the_caller_would_be_seen(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FakeStream(device)
    monkeypatch.setattr(accelerator, "run_on_current_stream", lambda work: other.enqueue(work))
    monkeypatch.setattr(accelerator, "current_stream", lambda _: other)
    assert not any(send_before_device_runs(device))


def test_an_event_that_does_not_follow_the_copy_would_be_seen(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_stream = FakeStream.wait_stream
    real = FakeStream.record_event

    def wait_for(stream: FakeStream, other: FakeStream) -> None:
        monkeypatch.setattr(FakeStream, "record_event", real)
        wait_stream(stream, other)
        monkeypatch.setattr(FakeStream, "record_event", _passed_at_once)

    monkeypatch.setattr(FakeStream, "wait_stream", wait_for)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        wait_before_device_runs(device)


def test_rows_used_again_too_soon_would_be_seen(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "next_free_run", _ignores_unreleased_rows)
    with pytest.raises((AssertionError, ValueError, ConnectionClosedError, DeliveryTimeoutError)):
        # So many batches that the device is late for some of them, however busy the machine is.
        assert all(send_more_than_the_ring_holds(device, batches=100))


def test_what_an_interrupted_send_left_would_be_seen(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "try_clear_uncommitted_copy", lambda ring: True)
    assert not all(send_after_an_interrupt(device, monkeypatch))


def test_packed_rows_freed_too_soon_would_be_seen(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceCopy, "keep_alive", lambda copy, memory: None)
    send_before_device_runs(device)
    assert device.freed_too_soon


# What is sent.


def test_batches_from_the_cpu_in_between(device: FakeDevice) -> None:
    """Rows that were in flight before the ring was pinned, and those that are ready before others on the device are."""
    with connected_sink() as (peer, sink):
        expected = []
        for number in range(0, 60 * ROWS, 2 * ROWS):
            sink.send(batch(number) if number < 10 * ROWS else batch_on(device, number))
            sink.send(batch(number + ROWS))
            expected += payloads(batch(number, 2 * ROWS))
        device.run()
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer) == expected


def test_a_batch_that_is_larger_than_the_ring(device: FakeDevice) -> None:
    with connected_sink(buffer_bytes=20 * SIZE) as (peer, sink), device_running(device):
        sink.send(batch_on(device, 0, 100))
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer) == payloads(batch(0, 100))


def test_single_samples(device: FakeDevice) -> None:
    with connected_sink() as (peer, sink), device_running(device):
        for number in range(5):
            sink.send({name: device.put(leaf[0]) for name, leaf in batch(number).items()})
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer) == payloads(batch(0, 5))


@pytest.mark.parametrize("elsewhere", ["tensor", "numpy", "view"])
def test_leaves_on_the_cpu_beside_those_on_the_device(device: FakeDevice, elsewhere: str) -> None:
    """They may be overwritten as well."""
    with connected_sink() as (peer, sink):
        mixed: dict[str, Any] = batch_on(device, 0)
        own = batch(0)["a"]
        mixed["a"] = {"tensor": own, "numpy": own.numpy(), "view": own.repeat(1, 2)[:, :3]}[elsewhere]
        sink.send(mixed)
        mixed["a"][...] = 7
        device.run()
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer) == payloads(batch(0))


def test_what_is_left_out_at_the_end(device: FakeDevice) -> None:
    with connected_sink() as (peer, sink), device_running(device):
        sink.send(batch_on(device, 0), skip_last=3)
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer) == payloads(batch(0, ROWS - 3))


def test_another_client_gets_arrays(device: FakeDevice) -> None:
    """It takes samples of numpy, so these are waited for."""
    with Peer(acks_everything) as peer, EchoSink("127.0.0.1", peer.port, EXAMPLE, client=echo.TcpClient) as sink:
        sink.send(batch_on(device, 0))
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer) == payloads(batch(0))


def test_a_wrong_batch_names_its_leaf_and_sends_nothing(device: FakeDevice) -> None:
    with connected_sink() as (peer, sink), device_running(device):
        wrong = batch_on(device, 0)
        wrong["a"] = device.put(wrong["a"].long())
        with pytest.raises(SpecMismatchError, match=r"batch\['a'\]: got torch.int64 \[8, 3\], expected torch.int32"):
            sink.send(wrong)
        wrong["a"] = device.put(batch(0)["a"][:, :2])
        with pytest.raises(SpecMismatchError, match=r"batch\['a'\]: got torch.int32 \[8, 2\]"):
            sink.send(wrong)
        sink.send(batch_on(device, 0))
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer) == payloads(batch(0))


def test_threads_that_each_have_a_stream(device: FakeDevice) -> None:
    with connected_sink(buffer_bytes=20 * SIZE) as (peer, sink), device_running(device):

        def send(first: int) -> None:
            for number in range(first, first + 10 * ROWS, ROWS):
                sink.send(batch_on(device, number))

        with running(lambda: send(0), lambda: send(1000)) as outcomes:
            pass
        assert outcomes == [None, None]
        sink.wait(HANG_TIMEOUT_S)
        got = received_samples(peer)
        for first in (0, 1000):
            rows = payloads(batch(first, 10 * ROWS))
            assert [row for row in got if row in rows] == rows
        assert len(got) == 20 * ROWS


def test_a_copy_that_begins_while_the_thread_goes_to_sleep_wakes_it(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has looked and found none under way, and before it sleeps: no ack will come to wake it."""
    asked, about_to_sleep, sent = set(), Gate(), Gate()
    query, poll_interval = FakeEvent.query, AckBatching.poll_interval

    def noted(event: FakeEvent) -> bool:
        passed = query(event)
        if threading.current_thread().name.startswith("echo_torch"):
            asked.add(passed)
        return passed

    def held_up(ack_batching: AckBatching, acked: int) -> float:
        if True in asked:
            about_to_sleep.open()
            sent.wait()
        return poll_interval(ack_batching, acked)

    with connected_sink() as (_, sink):
        monkeypatch.setattr(FakeEvent, "query", noted)
        monkeypatch.setattr(AckBatching, "poll_interval", held_up)
        sink.send(batch_on(device, 0))
        eventually(lambda: asked == {False})
        device.run()
        about_to_sleep.wait()
        eventually(lambda: sink.stats().samples_acked == ROWS)
        sink.send(batch_on(device, ROWS))
        device.run()
        sent.open()
        sink.wait(HEARTBEAT_S / 2)


# What goes wrong.


def test_waiting_for_a_device_that_hangs_ends(device: FakeDevice) -> None:
    with connected_sink(stall_timeout=SHORT_S) as (_, sink):
        sink.send(batch_on(device, 0))
        with pytest.raises(DeliveryTimeoutError, match=r"nothing was acked for 0.2 s \(stall_timeout\); 8 samples"):
            sink.wait()
        device.run()
        eventually(lambda: sink.stats().samples_acked == ROWS)


def test_a_device_that_is_slow_does_not_hang(device: FakeDevice, clock: Clock) -> None:
    """Something is acked now and then, though the last batch was enqueued long ago."""
    batches = 6
    with connected_sink(stall_timeout=HANG_TIMEOUT_S) as (_, sink):
        for number in range(batches):
            sink.send(batch_on(device, number * ROWS))
        (copying,) = (stream for stream in device.streams if stream is not device.current)
        of_one = len(copying.ops) // batches
        for left in reversed(range(batches)):
            clock.advance(0.8 * HANG_TIMEOUT_S)
            with pytest.raises(DeliveryTimeoutError, match=r"wait\(\) not done within 0.2 s"):
                sink.wait(SHORT_S)
            while len(copying.ops) > left * of_one:
                for stream in device.streams:
                    device.step(stream)
            eventually(lambda left=left: sink.stats().samples_acked == (batches - left) * ROWS)
        sink.wait(HANG_TIMEOUT_S)


def test_closing_while_a_device_hangs_ends(device: FakeDevice) -> None:
    with Peer(acks_everything) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE).connect()
        sink.send(batch_on(device, 0))
        with pytest.raises(DeliveryTimeoutError, match="8 samples un-acked"):
            sink.close(SHORT_S)
        assert_threads_end()
        device.run()


def _fails(event: FakeEvent) -> bool:
    raise RuntimeError("an illegal memory access was encountered")


def test_a_copy_that_fails_ends_the_connection_in_clear_words(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Peer(acks_everything) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE).connect()
        monkeypatch.setattr(FakeEvent, "query", _fails)
        sink.send(batch_on(device, 0))
        says_why = "samples could not be copied from their device: an illegal memory access was encountered"
        with pytest.raises(ConnectionClosedError, match=says_why) as caught:
            sink.wait(HANG_TIMEOUT_S)
        assert caught.value.unacked == ROWS
        sink.close()
        assert_threads_end()


def test_a_device_without_room_for_packing(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was staged before is not sent again, and the device is not asked again for a while."""
    made: list[int] = []
    empty = torch.empty

    def runs_out(size: Any, **options: Any) -> torch.Tensor:
        made.append(size[0])
        if len(made) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return empty(size, **options)

    monkeypatch.setattr(staging, "OUT_OF_MEMORY_PAUSE_S", 0.2)
    with connected_sink(buffer_bytes=20 * SIZE) as (peer, sink), device_running(device):
        monkeypatch.setattr(staging.torch, "empty", runs_out)
        sink.send(batch_on(device, 0, 40))
        asked = len(made)
        sink.send(batch_on(device, 40))
        assert len(made) == asked == 2
        sink.wait(HANG_TIMEOUT_S)
        time.sleep(0.2)
        sink.send(batch_on(device, 40 + ROWS))
        assert len(made) > asked
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer) == payloads(batch(0, 40 + 2 * ROWS))
    assert caplog.messages.count(f"{sink.peer}: {SLOW_WARNING}: out of memory") == 1


def test_without_pinned_memory_it_is_slower_and_right(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(size: int) -> torch.Tensor:
        raise accelerator.PinnedMemoryError("out of pinned memory")

    monkeypatch.setattr(accelerator, "empty_pinned", none_left)
    with connected_sink(buffer_bytes=20 * SIZE) as (peer, sink):
        for first in range(0, 10 * ROWS, ROWS):
            sink.send(batch_on(device, first))
        sink.send({name: leaf[0] for name, leaf in batch(10 * ROWS).items()})
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer) == payloads(batch(0, 10 * ROWS + 1))
    assert caplog.messages.count(f"{sink.peer}: {SLOW_WARNING}: out of pinned memory") == 1


def test_pinned_memory_is_taken_once_and_given_back(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[weakref.ref[torch.Tensor]] = []
    pinned = accelerator.empty_pinned

    def noted(size: int) -> torch.Tensor:
        memory = pinned(size)
        taken.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(accelerator, "empty_pinned", noted)
    with Peer(acks_everything) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE, buffer_bytes=20 * SIZE).connect()
        with device_running(device):
            for number in range(0, 10 * ROWS, ROWS):
                sink.send(batch_on(device, number))
                sink.send(batch(number))
            assert [memory() is not None for memory in taken] == [True]
            sink.close(HANG_TIMEOUT_S)
        assert [memory() for memory in taken] == [None]
        with pytest.raises(ConnectionClosedError):
            sink.send(batch_on(device, 0))
        with pytest.raises(ConnectionClosedError):
            sink.send(batch(0))


def test_packed_rows_are_kept_no_longer_than_needed(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[weakref.ref[torch.Tensor]] = []
    empty = torch.empty

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        memory = empty(*args, **options)
        packed.append(weakref.ref(memory))
        return memory

    with connected_sink() as (_, sink):
        monkeypatch.setattr(staging.torch, "empty", noted)
        sink.send(batch_on(device, 0))
        assert [memory() is None for memory in packed] == [False]
        device.run()
        sink.wait(HANG_TIMEOUT_S)
        assert [memory() is None for memory in packed] == [True]


def test_a_connection_that_is_cut_while_the_device_is_late(device: FakeDevice) -> None:
    """The samples that were not there yet are written to the next one, behind those that are sent again."""
    cut = Gate()

    def leaves(conn: PeerConnection) -> None:
        conn.send_handshake(SampleSpec(EXAMPLE).zeroed_numpy_sample())
        conn.receive(ROWS * SIZE)
        cut.wait()
        conn.reset()

    with Peer(Scripts(leaves, acks_everything)) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE, resend_at_close=False).connect()
        sink.send(batch(0))
        sink.send(batch_on(device, ROWS))
        cut.open()
        eventually(lambda: sink.stats().reconnects == 1)
        device.run()
        sink.wait(HANG_TIMEOUT_S)
        assert received_samples(peer, 1) == payloads(batch(0, 2 * ROWS))
        sink.close(HANG_TIMEOUT_S)


class Capturing:
    """A stream whose work is captured."""

    def is_capturing(self) -> bool:
        return True


def test_inside_the_capture_of_a_graph_nothing_can_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "current_stream", lambda device: Capturing())
    with pytest.raises(RuntimeError, match=r"send\(\) while a graph of cuda:1 is captured; call it outside"):
        accelerator.check_usable(torch.device("cuda:1"))


def test_a_process_that_was_forked_too_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "current_stream", lambda device: torch.Stream(device="cpu"))
    accelerator.check_usable(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match=r"on cuda:0 in process \d+, which was forked after cuda was initialised"):
        accelerator.check_usable(torch.device("cuda:0"))


# Packing.

DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.uint16, torch.complex32,
]  # fmt: skip
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor,
    "strided": lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "offset": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
    "needs a gradient": lambda tensor: tensor.requires_grad_() if tensor.is_floating_point() else tensor,
}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@settings(deadline=None)
@given(st.data())
def test_packed_rows_are_the_payloads(data: st.DataObject) -> None:
    """For leaves of any dtype and layout, against the bytes of each sample's leaves one behind the other."""
    rows = data.draw(st.integers(1, 5), "rows")
    shapes = st.lists(st.integers(1, 4), max_size=3)
    kinds = data.draw(
        st.lists(st.tuples(st.sampled_from(DTYPES), shapes, st.sampled_from(sorted(LAYOUTS))), min_size=1)
    )
    tensors = []
    for seed, (dtype, shape, layout) in enumerate(kinds):
        count = rows * int(np.prod(shape)) * dtype.itemsize
        raw = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, count, np.uint8))
        whole = (raw & 1).bool() if dtype is torch.bool else raw.view(dtype)
        tensors.append(LAYOUTS[layout](whole.view(rows, *shape)))
    sizes = [tensor[0].nbytes for tensor in tensors]
    packed = torch.zeros((rows, sum(sizes)), dtype=torch.uint8)
    pack_rows(tensors, [], widest_common_unit(sizes), packed)
    for row in range(rows):
        want = b"".join(
            tensor[row].detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors
        )
        assert packed[row].numpy().tobytes() == want


def test_lazy_conjugates_and_negations_are_packed_as_what_they_stand_for() -> None:
    values = torch.randn(2, 3, dtype=torch.complex64)
    packed = torch.zeros((2, 36), dtype=torch.uint8)
    pack_rows([values.conj(), values.conj().imag], [], widest_common_unit([24, 12]), packed)
    want = torch.cat([values.resolve_conj().conj_physical().view(torch.uint8), (-values.imag).view(torch.uint8)], 1)
    assert torch.equal(packed, want)


@pytest.mark.parametrize(
    ("sizes", "unit"),
    [
        ([16, 32], torch.complex128),
        ([8, 16], torch.int64),
        ([28_224, 4, 0], torch.int32),
        ([6, 4], torch.int16),
        ([8, 1], torch.uint8),
    ],
)
def test_rows_are_packed_in_the_widest_unit(sizes: list[int], unit: torch.dtype) -> None:
    assert widest_common_unit(sizes) is unit


def test_the_device_with_most_bytes_packs() -> None:
    small, large = torch.zeros(4, device="cpu"), torch.zeros(4, dtype=torch.float64, device="meta")
    assert main_device([small, large, small.numpy(), small]) == torch.device("cpu")
    assert main_device([small, large, np.zeros(100)]) == torch.device("meta")


# In the trace of a profiler, and in what is compiled.


def test_a_profiler_shows_what_send_does(device: FakeDevice) -> None:
    with connected_sink() as (_, sink), torch.profiler.profile() as profile:
        sink.send(batch_on(device, 0))
        device.run()
        sink.wait(HANG_TIMEOUT_S)
    names = {event.key for event in profile.key_averages()}
    assert {"echo_torch.send", "echo_torch.pack", "echo_torch.copy"} <= names


def test_a_compiled_function_may_send() -> None:
    """What it sends is what was computed, not what was traced; as a part of one graph it cannot be."""
    with connected_sink() as (peer, sink):

        def step(numbers: torch.Tensor) -> torch.Tensor:
            doubled = numbers * 2
            sink.send({"a": doubled, "b": doubled[:, 0].to(torch.uint8)})
            return doubled.sum()

        inputs = [torch.arange(6, dtype=torch.int32).view(2, 3) + number for number in range(3)]
        compiled = torch.compile(step, backend="eager")
        assert [int(compiled(numbers)) for numbers in inputs] == [30, 42, 54]
        sink.wait(HANG_TIMEOUT_S)
        expected = [{"a": 2 * numbers, "b": (2 * numbers[:, 0]).to(torch.uint8)} for numbers in inputs]
        assert received_samples(peer) == [row for sent in expected for row in payloads(sent)]
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="it sends to another process"):
            torch.compile(step, backend="eager", fullgraph=True)(inputs[0])
    torch.compiler.reset()


def test_only_one_thread_asks_for_copies(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may be capturing a graph, which such a question would end."""
    asked_by = set()
    query = FakeEvent.query

    def noted(event: FakeEvent) -> bool:
        asked_by.add(threading.current_thread().name)
        return query(event)

    monkeypatch.setattr(FakeEvent, "query", noted)
    with connected_sink() as (_, sink):
        for number in range(10):
            sink.send(batch_on(device, number))
            sink.stats()
            sink.send(batch(number))
        asked_by.clear()  # of what the streams ask each other
        sink.stats()
        with device_running(device):
            sink.wait(HANG_TIMEOUT_S)
        assert {name for name in asked_by if name.startswith("echo_torch") or name == "MainThread"} == {
            f"echo_torch {sink.peer}"
        }


def test_a_stall_counts_for_what_an_interrupted_send_left(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected_sink(stall_timeout=SHORT_S) as (_, sink):
        sink.send(batch(0))
        sink.wait(HANG_TIMEOUT_S)
        interrupt_send(device, sink, monkeypatch)
        with pytest.raises(DeliveryTimeoutError, match=r"stall_timeout"):
            sink.send(batch(ROWS))
        device.run()


def sink_with_a_failing_uncommitted_copy(peer: Peer, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> EchoSink:
    """By an interrupted send; one batch before it is acked."""
    sink = EchoSink("127.0.0.1", peer.port, EXAMPLE).connect()
    sink.send(batch(0))
    sink.wait(HANG_TIMEOUT_S)
    interrupt_send(device, sink, monkeypatch)
    monkeypatch.setattr(FakeEvent, "query", _fails)
    return sink


def test_what_an_interrupted_send_left_and_fails_ends_the_connection(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Peer(acks_everything) as peer:
        sink = sink_with_a_failing_uncommitted_copy(peer, device, monkeypatch)
        with pytest.raises(ConnectionClosedError, match="could not be copied from their device: an illegal"):
            sink.send(batch(ROWS))
        sink.close()
        assert_threads_end()


def test_what_an_interrupted_send_left_and_fails_ends_a_sink_that_was_dropped(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its thread finds that out when it is about to repeat the last samples."""
    with Peer(acks_everything) as peer:
        sink = sink_with_a_failing_uncommitted_copy(peer, device, monkeypatch)
        del sink
        gc.collect()
        assert_threads_end()
    assert "could not be copied from their device: an illegal memory access was encountered; ended with" in caplog.text


def test_a_device_without_room_keeps_no_batch(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(*_: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with connected_sink() as (_, sink):
        with monkeypatch.context() as patch:
            patch.setattr(staging.torch, "empty", runs_out)
            sent = batch_on(device, 0)
            kept = weakref.ref(sent["a"])
            gc.disable()
            try:
                sink.send(sent)
                del sent
                assert kept() is None
            finally:
                gc.enable()
        sink.wait(HANG_TIMEOUT_S)
