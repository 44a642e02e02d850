"""`echo_torch.callbacks.loop`: hand-written loops that train on real data, into a real server."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from calls import eventually, running
from learner_process import Learner
from peers import Peer, PeerConnection
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from training import STALLING_COUNT, Classifier, Digits, Item, arrived, learner, numbers_of, sink_to

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, SpecMismatchError, numpy_example
from echo_torch.callbacks import loop
from echo_torch.callbacks.loop import SinkCallback, padding

SHORT_S = 0.2
"""Seconds of a timeout that is meant to pass."""
LONG_S = 30.0
"""Seconds of one that is not."""
TIGHT: dict[str, Any] = {"buffer_bytes": 272 * 20, "max_inflight_msgs": 4}
"""Options of a sink with room for 12 digits that are not acked."""

Step = Callable[[Item], Any]


@pytest.fixture(scope="module")
def server() -> Iterator[Learner]:
    with learner() as server:
        yield server


def trained(record: list[Item]) -> Step:
    """A training step that keeps a copy of what it was given."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(batch: Item) -> Any:
        outputs = model(**batch)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        record.append({name: leaf.clone() for name, leaf in batch.items()})
        return outputs

    return step


def batches(count: int, size: int = 4, **options: Any) -> DataLoader[Item]:
    return DataLoader(Digits(count), size, **options)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


# Sending and waiting.


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_trained_on_arrives_and_each_epoch_ends_with_everything_acked(workers: int) -> None:
    """The last batch of an epoch is smaller."""
    record: list[Item] = []
    step = trained(record)
    with learner() as server, sink_to(server) as sink, SinkCallback(sink) as callback:
        for _ in range(3):
            for batch in batches(50, 8, shuffle=True, num_workers=workers):
                callback.on_batch_end(batch, step(batch))
            callback.on_epoch_end()
            stats = sink.stats()
            assert (stats.in_flight, stats.samples_acked) == (0, numbers_of(record).total())
        assert arrived(server, 150) == numbers_of(record) == Counter(dict.fromkeys(range(50), 3))


@pytest.mark.parametrize(("flush", "waits"), [("epoch", [True, True, True]), ("end", [False, False, True])])
def test_flush_says_when_to_wait(flush: Any, waits: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of an epoch, before a checkpoint, and at the end of the training."""
    calls: list[float | None] = []
    monkeypatch.setattr(EchoSink, "wait", lambda self, timeout, group: calls.append(timeout))
    callback = SinkCallback(EchoSink("127.0.0.1", 1, Digits(1)[0]), flush=flush, flush_timeout=7)
    waited = []
    for event in (callback.on_epoch_end, callback.on_checkpoint, callback.on_train_end):
        event()
        waited.append(calls == [7])
        calls.clear()
    assert waited == waits


def test_every_nth_batch_is_sent_and_the_count_goes_on_over_epochs() -> None:
    with learner() as server, sink_to(server) as sink:
        callback = SinkCallback(sink, every_n_batches=3)
        callback.setup()
        for _ in range(2):
            for batch in batches(16):
                callback.on_batch_end(batch)
            callback.on_epoch_end()
        callback.on_train_end()
        assert sink.acked_through == 1
        assert sink.stats().samples_acked == 8
        # The third batch, and the second of the second epoch.
        assert server.take(8)["id"].tolist() == [8, 9, 10, 11, 4, 5, 6, 7]


def test_select_gets_batch_and_outputs_without_gradient() -> None:
    example = {"id": 0, "guess": 0, "logits": torch.zeros(10)}
    seen: list[bool] = []

    def select(batch: Item, outputs: Any) -> Any:
        loss, (logits,) = outputs
        seen.extend([loss.requires_grad, logits.requires_grad, (logits * 2).requires_grad, torch.is_grad_enabled()])
        if batch["id"][0] == 0:
            return None
        return {"id": batch["id"], "logits": logits, "guess": logits.argmax(1)}

    record: list[Item] = []
    step = trained(record)
    sent = []
    with (
        Learner(numpy_example(example), 1) as server,
        EchoSink("127.0.0.1", server.port, example) as sink,
        SinkCallback(sink, select=select) as callback,
    ):
        for batch in batches(12):
            outputs = step(batch)
            callback.on_batch_end(batch, (outputs["loss"], [outputs["logits"]]))
            sent.append(outputs["logits"].detach().clone())
            assert outputs["loss"].requires_grad  # the loop's own is left alone
        callback.on_epoch_end()
        got = server.take(8)
    assert got["id"].tolist() == list(range(4, 12))
    assert torch.equal(torch.from_numpy(got["logits"]), torch.cat(sent[1:]))
    assert torch.equal(torch.from_numpy(got["guess"]), torch.cat(sent[1:]).argmax(1))
    assert seen == [False] * 12


def test_no_batch_is_no_error(server: Learner) -> None:
    with sink_to(server) as sink, SinkCallback(sink) as callback:
        callback.on_batch_end(None)
        assert sink.stats().samples_sent == 0


def test_a_batch_may_be_changed_once_it_was_told_of() -> None:
    with learner() as server, sink_to(server) as sink, SinkCallback(sink) as callback:
        batch = next(iter(batches(4)))
        callback.on_batch_end(batch)
        batch["id"].fill_(99)
        callback.on_epoch_end()
        assert server.take(4)["id"].tolist() == [0, 1, 2, 3]


# Beginning and end.


def test_setup_connects_and_a_wrong_address_fails_there() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        sink = EchoSink("127.0.0.1", nobody.getsockname()[1], Digits(1)[0], connect_timeout=SHORT_S)
        with pytest.raises(ConnectionRefusedError, match="refused"), SinkCallback(sink):
            pytest.fail("the loop was entered")


def test_setup_again_leaves_a_learner_that_is_gone_alone(caplog: pytest.LogCaptureFixture) -> None:
    """With ``on_error="warn"``, a test after the fit must not fail because the learner ended in between."""
    with learner() as server:
        sink = sink_to(server, on_error="warn", reconnect=0.0)
        callback = SinkCallback(sink)
        callback.setup()
        server.kill()
        for batch in batches(40):
            callback.on_batch_end(batch)
        callback.on_train_end()
        callback.setup()
        callback.on_batch_end(next(iter(batches(4))))
        callback.on_train_end()
        stats = sink.stats()
        assert stats.dropped >= 4
        assert stats.dropped + stats.samples_sent == 44
        sink.close()
    assert [text for text in warnings_of(caplog) if "the learner is gone" in text]


@pytest.mark.parametrize("close", [False, True])
def test_the_sink_stays_open_unless_told_to_close_it(close: bool, server: Learner) -> None:
    with sink_to(server) as sink:
        with SinkCallback(sink, close=close) as callback:
            callback.on_batch_end(next(iter(batches(4))))
        assert sink.stats().in_flight == 0
        if close:
            with pytest.raises(ConnectionClosedError, match="closed"):
                callback.setup()
        else:
            sink.send(Digits(1)[0])
            sink.wait()


def test_it_pickles_with_its_sink(server: Learner) -> None:
    before = server.received()
    with sink_to(server) as sink:
        callback = pickle.loads(pickle.dumps(SinkCallback(sink, every_n_batches=2)))
        with callback:
            for batch in batches(8):
                callback.on_batch_end(batch)
        assert callback.sink.stats().samples_acked == 4
        callback.sink.close()
        assert sink.stats().samples_sent == 0
    eventually(lambda: server.received() >= before + 4)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sink": "localhost"}, TypeError, "sink: got 'localhost', expected an EchoSink"),
        ({"select": "id"}, TypeError, "select: got 'id', expected something to call, or None"),
        ({"every_n_batches": 0}, ValueError, "every_n_batches: got 0, expected at least 1"),
        ({"every_n_batches": 1.5}, TypeError, "every_n_batches: got 1.5, expected a whole number"),
        ({"flush": "batch"}, ValueError, "flush: got 'batch', expected 'epoch' or 'end'"),
        ({"flush_timeout": -1}, ValueError, "flush_timeout: got -1, expected seconds >= 0"),
        ({"on_stall": "ignore"}, ValueError, "on_stall: got 'ignore', expected 'warn' or 'raise'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    sink = EchoSink("127.0.0.1", 1, Digits(1)[0])
    with pytest.raises(kind, match=message):
        SinkCallback(**{"sink": sink, **options})


def test_a_wrong_batch_is_the_loops_error(server: Learner) -> None:
    with sink_to(server) as sink, pytest.raises(SpecMismatchError, match=r"batch\['image'\]"), SinkCallback(sink) as it:
        it.on_batch_end({**next(iter(batches(4))), "image": torch.zeros(4, 8, 8)})


# Failures of the training.


class BrokenError(Exception):
    pass


def fail(callback: SinkCallback, step: Step, error: BaseException, at: int = 4) -> None:
    """A loop that ``error`` ends after so many batches, of 4 digits each, were told of."""
    with callback:
        for index, batch in enumerate(batches(STALLING_COUNT)):
            callback.on_batch_end(batch, step(batch))
            if index == at:
                raise error


@pytest.mark.parametrize("error", [BrokenError("loss is nan"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_of_the_training_comes_out_with_everything_delivered(error: BaseException) -> None:
    record: list[Item] = []
    step = trained(record)
    with learner() as server, sink_to(server) as sink:
        with pytest.raises(type(error)) as raised:
            fail(SinkCallback(sink), step, error)
        assert raised.value is error
        assert sink.stats().in_flight == 0
        assert arrived(server, 20) == numbers_of(record)


def test_an_error_is_never_masked_by_a_learner_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    with learner() as server:
        server.pause()
        sink = sink_to(server, reconnect=0.0)
        callback = SinkCallback(sink, close=True)
        callback.setup()
        for batch in batches(STALLING_COUNT):
            callback.on_batch_end(batch)
        server.kill()
        callback.on_exception(BrokenError())
    assert [text for text in warnings_of(caplog) if text.startswith("after BrokenError: ") and "un-acked" in text]


def test_an_error_waits_for_a_stalled_learner_for_a_bounded_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EXCEPTION_FLUSH_S", SHORT_S)
    with learner() as server:
        server.pause()
        sink = sink_to(server)
        began = time.monotonic()
        with pytest.raises(BrokenError):
            fail(SinkCallback(sink, flush_timeout=LONG_S), trained([]), BrokenError(), at=STALLING_COUNT // 4 - 1)
        assert time.monotonic() - began < LONG_S / 2
        assert [text for text in warnings_of(caplog) if text.startswith("after BrokenError: ") and "un-acked" in text]
        server.resume()
        sink.close()
        assert arrived(server, STALLING_COUNT).total() >= STALLING_COUNT


def test_an_error_of_another_sink_is_an_error_as_any() -> None:
    """A stall that ends the training for one sink does not make those of others close with samples un-acked."""
    with learner(busy=0.2) as server:
        sink = sink_to(server, resend_at_close=False)
        callback = SinkCallback(sink, close=True)
        callback.setup()
        for batch in batches(STALLING_COUNT):
            callback.on_batch_end(batch)
        assert sink.stats().in_flight > 0
        callback.on_exception(DeliveryTimeoutError("another learner stalls"))
        assert sink.stats().in_flight == 0
        assert arrived(server, STALLING_COUNT) == Counter(range(STALLING_COUNT))


def test_after_an_error_nothing_waits_any_more_until_the_next_setup(server: Learner) -> None:
    """Trainers go on telling: of the exception once more, of a checkpoint that is written because of it, of the end."""
    with sink_to(server) as sink:
        callback = SinkCallback(sink, flush_timeout=LONG_S)
        callback.setup()
        callback.on_exception(BrokenError())
        server.pause()
        for batch in batches(STALLING_COUNT):
            callback.on_batch_end(batch)
        began = time.monotonic()
        callback.on_exception(BrokenError())
        callback.on_checkpoint()
        callback.on_epoch_end()
        callback.on_train_end()
        assert time.monotonic() - began < LONG_S / 2
        assert sink.stats().in_flight
        server.resume()
        callback.setup()
        callback.on_epoch_end()
        assert sink.stats().in_flight == 0


def test_ctrl_c_in_a_loop_delivers_what_was_trained_on() -> None:
    """A real one, sent to a program of its own."""
    program = """
        import sys, time
        from training import Digits
        from torch.utils.data import DataLoader
        from echo_torch import EchoSink
        from echo_torch.callbacks.loop import SinkCallback

        with EchoSink("127.0.0.1", int(sys.argv[1]), Digits(1)[0], resend_at_close=False) as sink:
            with SinkCallback(sink) as callback:
                for batch in DataLoader(Digits(20), 4):
                    callback.on_batch_end(batch)
                print("trained", flush=True)
                time.sleep(60)
    """
    lines = "\n".join(line[8:] for line in program.splitlines())
    with learner() as server:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", lines, str(server.port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"trained\n"
                process.send_signal(signal.SIGINT)
                _, stderr = process.communicate(timeout=LONG_S)
            finally:
                process.kill()
        assert stderr.decode().rstrip().endswith("KeyboardInterrupt")
        assert arrived(server, 20) == Counter(range(20))


# A learner that is slow.


def test_a_stalled_learner_is_named_and_the_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """It waits once, not for each batch; what did not fit is counted, and no step from there on counts as acked."""
    record: list[Item] = []
    step = trained(record)
    with learner() as server:
        server.pause()
        with sink_to(server, **TIGHT) as sink, SinkCallback(sink, flush_timeout=SHORT_S) as callback:
            began = time.monotonic()
            for batch in batches(400):
                callback.on_batch_end(batch, step(batch))
            callback.on_epoch_end()
            assert time.monotonic() - began < LONG_S / 2
            assert len(record) == 100
            sent = sink.stats().samples_sent
            assert 0 < sent < STALLING_COUNT
            assert callback.skipped >= 100 - sent // 4 - 1
            first, second = warnings_of(caplog)
            assert "no room for a batch" in first
            assert "samples un-acked" in first
            assert "at the end of the epoch" in second
            assert f"{callback.skipped} batches skipped" in second

            server.resume()
            callback.on_epoch_end()
            assert "takes samples again" in warnings_of(caplog)[-1]
            skipped = callback.skipped
            for batch in batches(8):
                callback.on_batch_end(batch, step(batch))
            callback.on_epoch_end()
            assert callback.skipped == skipped
            assert sink.stats().samples_sent == sent + 8
            assert sink.acked_through == (sent + 3) // 4 - (1 if sent % 4 else 0) - 1
            assert arrived(server, sent + 8).total() == sent + 8


def test_a_learner_that_stalls_with_room_left_is_waited_for_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That batches still find room does not mean that it takes them."""
    monkeypatch.setattr(loop, "STALLED_FLUSH_S", SHORT_S)
    with learner() as server:
        server.pause()
        with sink_to(server) as sink, SinkCallback(sink, flush_timeout=1.0) as callback:
            began = time.monotonic()
            for _ in range(4):
                for batch in batches(STALLING_COUNT, 16):
                    callback.on_batch_end(batch)
                callback.on_epoch_end()
            assert time.monotonic() - began < 3.0
            assert ["at the end of the epoch" in text for text in warnings_of(caplog)] == [True] * 4
            stalled_at = sink.stats().samples_acked
            server.resume()
            eventually(lambda: sink.stats().samples_acked > stalled_at)
            callback.on_train_end()
            assert "takes samples again" in warnings_of(caplog)[-1]
            assert (callback.skipped, sink.stats().samples_acked) == (0, 4 * STALLING_COUNT)


def test_a_learner_that_stalls_on_another_rank_is_not_taken_for_this_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group, all ranks hear of it; those whose samples are all acked go on to wait for room."""
    timeouts: list[float | None] = []

    def wait(sink: EchoSink, timeout: float | None, group: Any) -> None:
        raise DeliveryTimeoutError("on rank 1")

    monkeypatch.setattr(EchoSink, "wait", wait)
    monkeypatch.setattr(EchoSink, "send", lambda sink, batch, timeout, skip_last: timeouts.append(timeout))
    callback = SinkCallback(EchoSink("127.0.0.1", 1, Digits(1)[0]), flush_timeout=LONG_S)
    callback.on_epoch_end()
    callback.on_batch_end(next(iter(batches(4))))
    assert timeouts == [LONG_S]


def test_a_stalled_learner_ends_the_training_if_told_to() -> None:
    with learner() as server:
        server.pause()
        sink = sink_to(server, **TIGHT)
        began = time.monotonic()
        callback = SinkCallback(sink, flush_timeout=SHORT_S, on_stall="raise")
        with pytest.raises(DeliveryTimeoutError, match="samples un-acked") as raised:
            fail(callback, trained([]), BrokenError("it went on for too long"), at=STALLING_COUNT // 4 - 1)
        assert time.monotonic() - began < LONG_S / 2
        assert raised.value.unacked > 0
        assert callback.skipped == 1
        server.resume()
        sink.close()


def test_a_stalled_learner_ends_the_training_at_a_flush_if_told_to() -> None:
    with learner() as server:
        server.pause()
        sink = sink_to(server)
        callback = SinkCallback(sink, flush_timeout=SHORT_S, on_stall="raise")
        callback.setup()
        for batch in batches(STALLING_COUNT):
            callback.on_batch_end(batch)
        with pytest.raises(DeliveryTimeoutError, match="samples un-acked"):
            callback.on_epoch_end()
        server.resume()
        callback.on_epoch_end()
        assert sink.stats().in_flight == 0
        sink.close()


def test_a_slow_learner_that_goes_on_is_waited_for() -> None:
    """No batch is skipped however often there is no room, as long as there is within the time."""
    with learner(busy=0.005) as server, sink_to(server, **TIGHT) as sink, SinkCallback(sink) as callback:
        for batch in batches(200):
            callback.on_batch_end(batch)
        callback.on_epoch_end()
        assert (callback.skipped, sink.stats().samples_acked) == (0, 200)
        assert arrived(server, 200) == Counter(range(200))


def test_closing_a_stalled_learner_is_named_too(caplog: pytest.LogCaptureFixture) -> None:
    with learner() as server:
        server.pause()
        with SinkCallback(sink_to(server), flush_timeout=SHORT_S, close=True) as callback:
            for batch in batches(STALLING_COUNT):
                callback.on_batch_end(batch)
        at_the_end, on_closing = warnings_of(caplog)
    assert "at the end of the training" in at_the_end
    assert "on closing" in on_closing
    assert "samples un-acked" in on_closing


# State, and what samplers repeat.


def test_state_goes_on_in_another_run() -> None:
    with learner() as server, sink_to(server) as one, sink_to(server) as other:
        callback = SinkCallback(one, every_n_batches=2)
        for batch in batches(20):
            callback.on_batch_end(batch)
        callback.on_checkpoint()
        state = callback.state_dict()
        assert (state["batches"], state["skipped"]) == (5, 0)
        assert (state["sink"]["acked_through"], state["sink"]["samples_acked"]) == (1, 8)
        assert server.take(8)["id"].tolist() == [*range(4, 8), *range(12, 16)]

        resumed = SinkCallback(other, every_n_batches=2)
        resumed.load_state_dict(state)
        for batch in batches(20):
            resumed.on_batch_end(batch)
        resumed.on_epoch_end()
        assert (other.acked_through, other.stats().samples_acked) == (4, 20)
        assert server.take(20)["id"].tolist()[8:] == [*range(4), *range(8, 12), *range(16, 20)]


def test_a_state_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(TypeError, match="state: got None, expected what state_dict"):
        SinkCallback(EchoSink("127.0.0.1", 1, Digits(1)[0])).load_state_dict(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"batches": None}, {"skipped": -1}, {"sink": None}, {"sink": {"acked_through": 1}}])
def test_a_state_that_is_none_changes_nothing(change: dict[str, Any], server: Learner) -> None:
    with sink_to(server) as sink, SinkCallback(sink) as callback:
        callback.on_batch_end(next(iter(batches(4))))
        callback.on_epoch_end()
        before = callback.state_dict()
        with pytest.raises((TypeError, ValueError), match="state"):
            callback.load_state_dict({**before, "batches": 7, "skipped": 7, **change})
        assert callback.state_dict() == before


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 50])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 24, 25])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("sampler_drops", [False, True])
def test_padding_is_what_the_sampler_repeats(
    world: int, count: int, size: int, drop_last: bool, sampler_drops: bool
) -> None:
    """Without it, no rank gives a sample that another gave, and together they give no other than before."""
    dataset = TensorDataset(torch.arange(count))
    seen, kept = [], []
    for rank in range(world):
        sampler = DistributedSampler(dataset, world, rank, seed=1, drop_last=sampler_drops)
        batches = DataLoader(dataset, size, sampler=sampler, drop_last=drop_last)
        for index, (batch,) in enumerate(batches):
            seen += batch.tolist()
            kept += batch.tolist()[: len(batch) - padding(batches, index)]
    assert sorted(kept) == sorted(set(seen))


def test_only_a_distributed_sampler_pads() -> None:
    assert padding(batches(5), 1) == 0
    assert padding(iter([1, 2]), 0) == 0
    assert padding(DataLoader(Digits(5), None), 4) == 0


def test_padding_is_not_sent() -> None:
    with learner() as server:
        for rank in range(2):
            sampler = DistributedSampler(Digits(13), 2, rank, shuffle=False)
            with sink_to(server, resend_at_close=False) as sink, SinkCallback(sink) as callback:
                loader = batches(13, 3, sampler=sampler)
                for index, batch in enumerate(loader):
                    callback.on_batch_end(batch, padding=padding(loader, index))
                callback.on_epoch_end()
                assert sink.stats().samples_acked == (7, 6)[rank]
        assert arrived(server, 13) == Counter(range(13))


def test_two_callbacks_of_one_loop_send_to_two_learners(server: Learner) -> None:
    before = server.received()
    with learner() as other, sink_to(server) as one, sink_to(other) as two:
        with SinkCallback(one) as every, SinkCallback(two, every_n_batches=2) as second:
            for batch in batches(16):
                every.on_batch_end(batch)
                second.on_batch_end(batch)
        assert arrived(other, 8) == Counter([4, 5, 6, 7, 12, 13, 14, 15])
    eventually(lambda: server.received() >= before + 16)


def test_a_callback_of_another_thread_than_that_of_setup(server: Learner) -> None:
    with sink_to(server) as sink, SinkCallback(sink) as callback:
        with running(lambda: [callback.on_batch_end(batch) for batch in batches(8)]) as outcomes:
            pass
        assert outcomes == [None]
        callback.on_epoch_end()
        assert sink.stats().samples_acked == 8


def test_the_first_batch_may_take_as_long_as_connecting() -> None:
    """In a worker nobody has connected before; and a slow handshake is no learner that stalls."""
    sample = numpy_example(Digits(1)[0])

    def greets_late(conn: PeerConnection) -> None:
        time.sleep(3 * SHORT_S)
        conn.send_handshake(sample)
        conn.receive_all(sum(leaf.nbytes for leaf in sample.values()))

    with Peer(greets_late) as peer:
        sink = EchoSink("127.0.0.1", peer.port, Digits(1)[0], resend_at_close=False)
        callback = SinkCallback(sink, flush_timeout=SHORT_S, on_stall="raise")
        callback.on_batch_end(Digits(1)[0])
        sink.wait(LONG_S)
        assert sink.stats().samples_acked == 1
        sink.close()


@pytest.mark.parametrize("send", [True, False])
def test_samples_that_workers_send_too_are_noticed(send: bool, caplog: pytest.LogCaptureFixture) -> None:
    """By a callback that would send each of them again; one with ``send=False`` only flushes."""
    example = torch.zeros((), dtype=torch.int64)
    with Learner(example.numpy(), batch_size=32) as server:
        sink = EchoSink("127.0.0.1", server.port, example)
        data = torch.arange(128)
        loader = DataLoader(data, 32, num_workers=1, collate_fn=sink.collate(), persistent_workers=True)  # type: ignore[arg-type]
        with SinkCallback(sink, send=send) as callback:
            for _ in range(2):
                for batch in loader:
                    callback.on_batch_end(batch)
                callback.on_epoch_end()
        assert sink.stats().samples_acked == (512 if send else 256)
        sink.close()
    lines = [record.getMessage() for record in caplog.records if "sent by child processes" in record.message]
    if send:
        (line,) = lines
        assert "SinkCallback(sink, send=False)" in line
    else:
        assert lines == []


def test_a_sink_whose_children_sent_in_an_earlier_epoch_only_is_not_suspected(caplog: pytest.LogCaptureFixture) -> None:
    example = torch.zeros((), dtype=torch.int64)
    with Learner(example.numpy(), batch_size=32) as server:
        sink = EchoSink("127.0.0.1", server.port, example)
        with SinkCallback(sink) as callback:
            for _ in DataLoader(torch.arange(64), 32, num_workers=1, collate_fn=sink.collate()):  # type: ignore[arg-type]
                pass
            callback.on_epoch_end()
            callback.on_batch_end(torch.arange(32))
        # Nor is it by the callback of the next loop.
        with SinkCallback(sink) as callback:
            callback.on_batch_end(torch.arange(32))
        assert sink.stats().samples_acked == 128
        sink.close()
    assert not [record for record in caplog.records if "sent by child processes" in record.message]
