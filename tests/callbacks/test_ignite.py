"""`echo_torch.callbacks.ignite`: engines that train on digits, into a real server."""

from __future__ import annotations

import gc
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, EarlyStopping
from learner_process import Learner
from torch.utils.data import DataLoader
from training import Classifier, Digits, Item, arrived, learner, numbers_of, sink_to

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, numpy_example
from echo_torch.callbacks.ignite import SinkHandler

SHORT_S = 0.2
"""Seconds of a timeout that is meant to pass."""
BATCH = 32
EPOCH = 5
"""Batches in one; the last is smaller."""
COUNT = BATCH * EPOCH - 3
"""Digits in one; more than a learner takes that is paused."""


class BrokenError(Exception):
    pass


class Training:
    """An engine that trains a model, and an account of what it was trained on.

    Args:
        fails_at: the step, from 0 on, in place of which ``fails`` is called.
    """

    def __init__(self, fails_at: int | None = None, fails: Callable[[], None] = lambda: None) -> None:
        torch.manual_seed(0)
        self.model = Classifier()
        self.record: list[Item] = []
        self.engine = Engine(self._step)
        self._optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self._steps = 0
        self._fails_at, self._fails = fails_at, fails

    def run(self, workers: int = 0, **options: Any) -> None:
        self.engine.run(DataLoader(Digits(COUNT), BATCH, shuffle=True, num_workers=workers), **options)

    def _step(self, engine: Engine, batch: Item) -> Item:
        self._steps += 1
        if self._steps - 1 == self._fails_at:
            self._fails()
        outputs: Item = self.model(**batch)
        self._optimizer.zero_grad()
        outputs["loss"].backward()
        self._optimizer.step()
        self.record.append({name: leaf.clone() for name, leaf in batch.items()})
        return outputs


class Channel:
    """A sink to a server that others used before, and what arrives from it; there is room for 12 digits in flight."""

    def __init__(self, server: Learner) -> None:
        self.server = server
        self.sink = sink_to(server, buffer_bytes=272 * 20, max_inflight_msgs=4, resend_at_close=False)
        self._before = arrived(server, 0)

    def arrived(self, count: int | None = None) -> Counter[int]:
        """How often each number is among so many samples, by default all that were sent."""
        count = self.sink.stats().samples_sent if count is None else count
        return arrived(self.server, self._before.total() + count) - self._before

    def in_flight_at(self, engine: Engine, *events: Any) -> list[int]:
        """A list that grows at each of the events: handlers that were attached before have been called by then."""
        seen: list[int] = []
        for event in events:
            engine.add_event_handler(event, lambda *_, **__: seen.append(self.sink.stats().in_flight))
        return seen


@pytest.fixture(scope="module")
def server() -> Iterator[Learner]:
    """Slower than the training, so that something is in flight where nobody waits."""
    with learner(busy=0.05) as server:
        yield server


@pytest.fixture
def channel(server: Learner) -> Iterator[Channel]:
    channel = Channel(server)
    yield channel
    server.resume()
    channel.sink.close()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("echo_torch")]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_trained_on_arrives_and_each_epoch_ends_with_everything_acked(workers: int, channel: Channel) -> None:
    training = Training()
    SinkHandler(channel.sink).attach(training.engine)
    seen = channel.in_flight_at(training.engine, Events.EPOCH_COMPLETED)
    training.run(workers, max_epochs=3)
    assert seen == [0, 0, 0]
    assert channel.arrived() == numbers_of(training.record) == Counter(dict.fromkeys(range(COUNT), 3))
    channel.sink.send(Digits(1)[0])  # it stays open
    channel.sink.wait()
    assert channel.arrived() - numbers_of(training.record) == Counter([0])


def test_outputs_are_sent_detached_or_what_select_makes_of_both() -> None:
    example = {"loss": torch.zeros(()), "logits": torch.zeros(10), "id": 0}
    outputs: list[Item] = []
    grads: list[bool] = []

    def step(engine: Engine, batch: Item) -> Item | None:
        out: Item = model(**batch)
        outputs.append({"loss": out["loss"].expand(len(batch["id"])), "logits": out["logits"], "id": batch["id"]})
        return outputs[-1] if batch["id"][0] else None

    def select(batch: Item, output: Item | None) -> Item | None:
        if output is None:
            return None
        grads.append(output["logits"].requires_grad)
        return {**output, "id": -batch["id"]}

    model = Classifier()
    loader = DataLoader(Digits(24), 8)
    with (
        Learner(numpy_example(example), 32) as server,
        EchoSink("127.0.0.1", server.port, example, resend_at_close=False) as sink,
    ):
        for handler in (SinkHandler(sink, send="output"), SinkHandler(sink, send="output", select=select)):
            engine = Engine(step)
            handler.attach(engine)
            engine.run(loader)
        assert sink.stats().samples_sent == 32  # both leave out the first batch
        got = server.take(32)
    sent = [out for out in outputs if out["id"][0]]
    for name in ("loss", "logits"):
        assert torch.equal(torch.from_numpy(got[name]), torch.cat([out[name].detach() for out in sent]))
    assert got["id"].tolist() == [*range(8, 24), *range(-8, -24, -1)]
    assert all(out["logits"].requires_grad for out in outputs)
    assert grads == [False, False]


@pytest.mark.parametrize(
    ("stop", "options", "events", "batches"),
    [
        (lambda engine: engine.terminate(), {}, [Events.TERMINATE, Events.COMPLETED], EPOCH + 2),
        (lambda engine: engine.terminate(skip_completed=True), {}, [Events.TERMINATE], EPOCH + 2),
        (lambda engine: None, {"max_iters": EPOCH + 3}, [Events.TERMINATE, Events.COMPLETED], EPOCH + 3),
        (lambda engine: engine.terminate_epoch(), {}, [Events.TERMINATE_SINGLE_EPOCH], 2 * EPOCH + 2),
        (
            lambda engine: engine.terminate_epoch(skip_epoch_completed=True),
            {},
            [Events.TERMINATE_SINGLE_EPOCH],
            2 * EPOCH + 2,
        ),
    ],
    ids=["terminate", "terminate_skip_completed", "max_iters", "terminate_epoch", "terminate_epoch_skip_completed"],
)
def test_a_run_or_an_epoch_that_is_cut_short_ends_with_everything_acked(
    stop: Callable[[Engine], None], options: dict[str, Any], events: list[Events], batches: int, channel: Channel
) -> None:
    training = Training()
    SinkHandler(channel.sink).attach(training.engine)
    training.engine.add_event_handler(Events.ITERATION_COMPLETED(once=EPOCH + 2), stop)
    seen = channel.in_flight_at(training.engine, *events)
    training.run(**(options or {"max_epochs": 3}))
    assert seen == [0] * len(events)
    assert len(training.record) == batches
    assert channel.arrived() == numbers_of(training.record)


@pytest.mark.parametrize("stop", ["", "terminate", "skip_completed"])
def test_at_the_end_of_a_run_it_waits_whatever_flush_says_and_closes_if_told_to(
    stop: str, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, wait = Training(), channel.sink.wait
    waits, at_epoch = [], []
    monkeypatch.setattr(channel.sink, "wait", lambda *args: waits.append(wait(*args)))
    SinkHandler(channel.sink, flush="end", close=True).attach(training.engine)
    training.engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda: at_epoch.append(len(waits)))
    if stop:
        training.engine.add_event_handler(
            Events.EPOCH_COMPLETED(once=2), lambda: training.engine.terminate(stop == "skip_completed")
        )
    training.run(max_epochs=2)
    assert (at_epoch, len(waits)) == ([0], 1)
    assert channel.sink.stats().in_flight == 0
    with pytest.raises(ConnectionClosedError, match="closed"):
        channel.sink.send(Digits(1)[0])
    assert channel.arrived() == numbers_of(training.record)


def test_early_stopping_and_an_evaluator_with_a_handler_of_its_own(channel: Channel) -> None:
    """The sink is one: what is evaluated is sent between the epochs, and is acked before the trainer goes on."""
    training = Training()
    evaluated: list[Item] = []
    evaluator = Engine(lambda engine, batch: evaluated.append(batch))
    SinkHandler(channel.sink).attach(training.engine)
    SinkHandler(channel.sink).attach(evaluator)

    @training.engine.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        evaluator.run(DataLoader(Digits(20, first=200), BATCH))

    seen = channel.in_flight_at(training.engine, Events.EPOCH_COMPLETED)
    evaluator.add_event_handler(
        Events.COMPLETED, EarlyStopping(patience=1, score_function=lambda _: 0.0, trainer=training.engine)
    )
    training.run(max_epochs=9)
    assert seen == [0, 0]
    assert len(training.record) == 2 * EPOCH
    assert channel.arrived() == numbers_of(training.record) + numbers_of(evaluated)


def test_one_handler_may_serve_a_trainer_and_its_evaluator(channel: Channel) -> None:
    training = Training()
    evaluated: list[Item] = []
    evaluator = Engine(lambda engine, batch: evaluated.append(batch))
    handler = SinkHandler(channel.sink)
    handler.attach(training.engine)
    handler.attach(evaluator)
    training.engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: evaluator.run(DataLoader(Digits(20, first=200), BATCH))
    )
    seen = channel.in_flight_at(training.engine, Events.EPOCH_COMPLETED, Events.COMPLETED)
    training.run(max_epochs=2)
    assert seen == [0, 0, 0]
    assert channel.arrived() == numbers_of(training.record) + numbers_of(evaluated)


def test_an_interrupted_run_goes_on_with_nothing_in_flight_meanwhile(channel: Channel) -> None:
    training = Training()
    SinkHandler(channel.sink).attach(training.engine)
    training.engine.add_event_handler(Events.ITERATION_COMPLETED(every=7), training.engine.interrupt)
    for batches in (7, 14, 15):
        training.run(max_epochs=3)
        assert channel.sink.stats().in_flight == 0
        assert len(training.record) == batches
    assert channel.arrived() == numbers_of(training.record) == Counter(dict.fromkeys(range(COUNT), 3))


def test_an_interrupted_engine_may_be_dropped(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    """It raises GeneratorExit in itself then, which fails nothing and closes nothing."""
    training = Training()
    SinkHandler(channel.sink, close=True).attach(training.engine)
    training.engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), training.engine.interrupt)
    training.run(max_epochs=1)
    record = training.record
    del training
    gc.collect()
    channel.sink.send(record[0])
    assert channel.arrived() == numbers_of([*record, record[0]])
    assert warnings_of(caplog) == []


def test_an_engine_may_run_again(channel: Channel) -> None:
    training = Training()
    SinkHandler(channel.sink).attach(training.engine)
    for epochs in (1, 2):
        training.run(max_epochs=1)
        assert channel.sink.stats().in_flight == 0
        assert channel.arrived() == numbers_of(training.record) == Counter(dict.fromkeys(range(COUNT), epochs))


# Failures of the training.


def raising(error: BaseException) -> Callable[[], None]:
    def fails() -> None:
        raise error

    return fails


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [BrokenError("loss is nan"), KeyboardInterrupt()])
def test_an_error_of_the_training_comes_out_as_it_was_raised_with_everything_delivered(
    error: BaseException, workers: int, channel: Channel
) -> None:
    training = Training(EPOCH + 3, raising(error))
    SinkHandler(channel.sink).attach(training.engine)
    with pytest.raises(type(error)) as raised:
        training.run(workers, max_epochs=2)
    assert raised.value is error
    assert (error.__cause__, error.__context__) == (None, None)
    assert channel.sink.stats().in_flight == 0
    assert len(training.record) == EPOCH + 3
    assert channel.arrived() == numbers_of(training.record)


def test_ctrl_c_comes_out_with_everything_delivered(channel: Channel) -> None:
    """A real one; with ``close`` the sink is closed then."""
    training = Training(EPOCH + 3, lambda: signal.raise_signal(signal.SIGINT))
    SinkHandler(channel.sink, close=True).attach(training.engine)
    with pytest.raises(KeyboardInterrupt):
        training.run(max_epochs=2)
    assert channel.arrived() == numbers_of(training.record)
    with pytest.raises(ConnectionClosedError, match="closed"):
        channel.sink.send(Digits(1)[0])


def test_an_error_of_a_handler_comes_out_too(channel: Channel) -> None:
    """Raised at the end of an epoch, ignite tells of it once; of one in an iteration, twice."""
    error = BrokenError("no disk")
    training = Training()
    SinkHandler(channel.sink).attach(training.engine)
    training.engine.add_event_handler(Events.EPOCH_COMPLETED, raising(error))
    with pytest.raises(BrokenError) as raised:
        training.run(max_epochs=2)
    assert raised.value is error
    assert channel.arrived() == numbers_of(training.record)


@pytest.mark.parametrize("first", [True, False], ids=["attached_first", "attached_last"])
def test_a_handler_of_errors_that_raises_finds_everything_delivered(first: bool, channel: Channel) -> None:
    training = Training(EPOCH + 3, raising(BrokenError()))
    seen: list[int] = []

    def raises(error: Exception) -> None:
        seen.append(channel.sink.stats().in_flight)
        raise RuntimeError("of the user") from error

    if first:
        training.engine.add_event_handler(Events.EXCEPTION_RAISED, raises)
    SinkHandler(channel.sink).attach(training.engine)
    if not first:
        training.engine.add_event_handler(Events.EXCEPTION_RAISED, raises)
    with pytest.raises(RuntimeError, match="of the user"):
        training.run(max_epochs=2)
    assert seen == [0, 0]
    assert channel.arrived() == numbers_of(training.record)


@pytest.mark.parametrize("first", [True, False], ids=["attached_first", "attached_last"])
def test_an_error_that_another_handler_swallows_stays_swallowed_and_the_run_goes_on(
    first: bool, channel: Channel
) -> None:
    training = Training(EPOCH + 3, raising(BrokenError()))
    swallowed: list[BaseException] = []
    if first:
        training.engine.add_event_handler(Events.EXCEPTION_RAISED, swallowed.append)
    SinkHandler(channel.sink).attach(training.engine)
    if not first:
        training.engine.add_event_handler(Events.EXCEPTION_RAISED, swallowed.append)
    seen = channel.in_flight_at(training.engine, Events.EPOCH_COMPLETED, Events.COMPLETED)
    training.run(max_epochs=3)
    assert [type(error) for error in swallowed] == [BrokenError]
    assert seen == [0, 0, 0, 0]
    assert len(training.record) == 2 * EPOCH + 3
    assert channel.arrived() == numbers_of(training.record)


def test_two_handlers_on_one_engine_send_to_two_servers_and_let_an_error_out(channel: Channel) -> None:
    training = Training(EPOCH + 3, raising(BrokenError()))
    with learner() as second, sink_to(second, resend_at_close=False) as sink:
        SinkHandler(sink, every_n_batches=2).attach(training.engine)
        SinkHandler(channel.sink).attach(training.engine)
        with pytest.raises(BrokenError):
            training.run(max_epochs=2)
        assert sink.stats().in_flight == 0
        assert channel.sink.stats().in_flight == 0
        assert arrived(second, sink.stats().samples_sent) == numbers_of(training.record[1::2])
    assert channel.arrived() == numbers_of(training.record)


# A learner that is slow, or not there.


@pytest.mark.parametrize("on_stall", ["warn", "raise"])
def test_a_learner_that_stalls_neither_hangs_the_run_nor_harms_its_checkpoints(
    on_stall: Any, channel: Channel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the second epoch on, of which the first batches fill what room there is."""
    training = Training()
    handler = SinkHandler(channel.sink, flush_timeout=SHORT_S, on_stall=on_stall)
    handler.attach(training.engine)
    saver = DiskSaver(tmp_path, require_empty=False)
    training.engine.add_event_handler(
        Events.EPOCH_COMPLETED, Checkpoint({"model": training.model, "sink": handler}, saver, n_saved=None)
    )
    weights: list[dict[str, torch.Tensor]] = []

    @training.engine.on(Events.EPOCH_COMPLETED)
    def stall() -> None:
        weights.append({name: weight.clone() for name, weight in training.model.state_dict().items()})
        channel.server.pause()

    began = time.monotonic()
    if on_stall == "raise":
        with pytest.raises(DeliveryTimeoutError, match="un-acked"):
            training.run(max_epochs=3)
        assert len(training.record) <= 2 * EPOCH
    else:
        training.run(max_epochs=3)
        assert len(training.record) == 3 * EPOCH
        assert handler.skipped > 0
        warnings = warnings_of(caplog)
        assert any(
            "no room for a batch, which is not sent" in text and "the training goes on" in text for text in warnings
        )
        assert any(text.startswith("at the end of the epoch") and "samples un-acked" in text for text in warnings)
    assert time.monotonic() - began < 20
    saved = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(saved) == len(weights) == (1 if on_stall == "raise" else 3)
    for path, expected in zip(saved, weights, strict=True):
        found = torch.load(path, weights_only=True)["model"]
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    channel.server.resume()
    channel.sink.wait()
    assert channel.arrived() <= numbers_of(training.record)
    assert channel.arrived().total() >= COUNT


def test_a_wrong_address_fails_before_the_first_step() -> None:
    training = Training()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        sink = EchoSink("127.0.0.1", nobody.getsockname()[1], Digits(1)[0], connect_timeout=SHORT_S)
        SinkHandler(sink).attach(training.engine)
        with pytest.raises(ConnectionRefusedError):
            training.run()
    assert training.record == []


# Checkpoints.


def test_checkpoints_amid_an_epoch_and_a_resumed_run(channel: Channel, tmp_path: Path) -> None:
    """The run that is resumed goes on with the counts, so that each third batch of all is sent."""
    first, second = Training(EPOCH + 3, raising(BrokenError())), Training()
    handler = SinkHandler(channel.sink, every_n_batches=3)
    handler.attach(first.engine)
    checkpoint = Checkpoint({"sink": handler, "engine": first.engine}, DiskSaver(tmp_path), n_saved=1)
    amid = Events.ITERATION_COMPLETED(once=EPOCH + 2)
    first.engine.add_event_handler(amid, handler.on_checkpoint)
    seen = channel.in_flight_at(first.engine, amid)
    first.engine.add_event_handler(amid, checkpoint)
    with pytest.raises(BrokenError):
        first.run(max_epochs=3)
    assert seen == [0]

    assert channel.arrived() == numbers_of(first.record[2::3])

    with sink_to(channel.server, resend_at_close=False) as sink:
        resumed = SinkHandler(sink, every_n_batches=3)
        resumed.attach(second.engine)
        saved = torch.load(next(tmp_path.iterdir()), weights_only=True)
        Checkpoint.load_objects({"sink": resumed, "engine": second.engine}, saved)
        second.run()
        assert len(second.record) == 2 * EPOCH - 2
        assert sink.acked_through == 4
        both = numbers_of(first.record[2::3] + second.record[1::3])
        assert channel.arrived(sink.stats().samples_sent) == both


def test_bad_arguments_are_refused() -> None:
    sink = EchoSink("127.0.0.1", 1, Digits(1)[0])
    with pytest.raises(ValueError, match="send: got 'loss', expected 'batch' or 'output'"):
        SinkHandler(sink, send="loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_stall: got 'hang'"):
        SinkHandler(sink, on_stall="hang")
