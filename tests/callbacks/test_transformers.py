"""`SinkTrainerMixin` and `SinkCallback` in real Trainers: what the model saw in training is what arrives."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from calls import eventually
from learner_process import Learner
from spawned import HelperProcess, answer_request
from torch.utils.data import default_collate
from training import STALLING_COUNT, Classifier, Digits, Item, arrived, learner, numbers_of, sink_to
from transformers import BatchEncoding, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from echo_torch import DeliveryTimeoutError, EchoSink, SpecMismatchError
from echo_torch.callbacks.transformers import SinkCallback, SinkTrainerMixin
from echo_torch.callbacks.transformers_stats import LOGGED_STATS
from echo_torch.ranks import cpu_group

COUNT = 36
BATCH = 8
STEPS = 5
"""Of an epoch; the last batch has half as many samples."""
PAYLOAD = 272
MANY = 4 * STALLING_COUNT
SLOW = {"busy": 0.03}
"""A learner that is seconds behind, as soon as it got more than it can hold."""
MANY_PER_STEP = {"per_device_train_batch_size": 32}
"""20 steps of an epoch with that many."""
HELD_OUT = Digits(64, first=1000)
"""For evaluations."""

IGNORE_FORK_WARNING = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Recorder(Classifier):
    """Records what it is trained on. ``before_step`` is called with the number of batches so far, and may raise."""

    def __init__(self, before_step: Callable[[int], object] = lambda steps: None) -> None:
        super().__init__()
        self.seen: list[Item] = []
        self.losses: list[float] = []
        self._before_step = before_step

    def forward(self, image: torch.Tensor, labels: torch.Tensor, id: torch.Tensor | None = None) -> Item:
        if self.training:
            assert id is not None
            self._before_step(len(self.seen))
        made = super().forward(image, labels)
        if self.training:
            self.seen.append({"id": id.clone()})
            self.losses.append(made["loss"].item())
        return made

    @property
    def numbers(self) -> Counter[int]:
        return numbers_of(self.seen)


class SinkTrainer(SinkTrainerMixin, Trainer):
    model: Recorder


def arguments(path: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(
        output_dir=str(path), report_to="none", use_cpu=True, dataloader_pin_memory=False, **{**defaults, **options}
    )


def trainer_for(
    sink: EchoSink, path: Path, model: Recorder | None = None, count: int = COUNT, **options: Any
) -> SinkTrainer:
    """A trainer on ``count`` digits; ``options`` are its own, and with ``args``, of `arguments`."""
    args = arguments(path, **options.pop("args", {}))
    model = Recorder() if model is None else model
    return SinkTrainer(model=model, args=args, train_dataset=Digits(count), sink=sink, **options)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More of them would only wait for each other, in steps this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def server() -> Iterator[Learner]:
    with learner() as server:
        yield server


@pytest.fixture
def sink(server: Learner) -> Iterator[EchoSink]:
    with sink_to(server) as sink:
        yield sink


class CallAtEnds(TrainerCallback):
    """Calls ``look`` at the end of each epoch, and of the training, and keeps what it gives."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self.epochs: list[Any] = []
        self.end: list[Any] = []
        self._look = look

    def on_epoch_end(self, *_: Any, **kwargs: Any) -> None:
        self.epochs.append(self._look())

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.end.append(self._look())


def watch(trainer: Trainer, sink: EchoSink) -> CallAtEnds:
    """Looks after the sink's own callback: how many samples are acked, and how many are not."""

    def look() -> tuple[int, int]:
        stats = sink.stats()
        return stats.samples_acked, stats.in_flight

    callback = CallAtEnds(look)
    trainer.add_callback(callback)
    return callback


def exactly_arrived(server: Learner, sink: EchoSink, expected: Counter[int]) -> None:
    """These, and no others: neither on their way nor there."""
    assert expected
    stats = sink.stats()
    assert (stats.samples_sent, stats.samples_acked) == (expected.total(), expected.total())
    assert arrived(server, expected.total()) == expected


def mostly_arrived(server: Learner, expected: Counter[int], at_most: int) -> None:
    """These, no others, and no more than ``at_most`` of them once more: the tails that workers repeat."""
    assert expected
    eventually(lambda: arrived(server, 1) >= expected)
    got = arrived(server, 1)
    assert set(got) == set(expected)
    assert got.total() <= expected.total() + at_most


@IGNORE_FORK_WARNING
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_trained_on_arrives_by_the_end_of_each_epoch(
    workers: int, server: Learner, sink: EchoSink, tmp_path: Path
) -> None:
    trainer = trainer_for(sink, tmp_path, args={"dataloader_num_workers": workers})
    watched = watch(trainer, sink)
    trainer.train()
    assert watched.epochs == [(COUNT, 0), (2 * COUNT, 0)]
    assert trainer.model.numbers == Counter(range(COUNT)) + Counter(range(COUNT))
    exactly_arrived(server, sink, trainer.model.numbers)


@IGNORE_FORK_WARNING
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_collated_arrives_by_the_end_of_each_epoch(
    workers: int, server: Learner, sink: EchoSink, tmp_path: Path
) -> None:
    """Evaluation data is collated too, and not sent."""
    args = {"dataloader_num_workers": workers, "eval_strategy": "epoch"}
    trainer = trainer_for(sink, tmp_path, args=args, send="collated", eval_dataset=HELD_OUT)
    watched = watch(trainer, sink)
    trainer.train()
    assert watched.epochs == [(COUNT, 0), (2 * COUNT, 0)]
    if workers:
        mostly_arrived(server, trainer.model.numbers, at_most=2 * workers * BATCH)
    else:
        exactly_arrived(server, sink, trainer.model.numbers)


def test_every_micro_batch_of_an_accumulated_one_arrives(server: Learner, sink: EchoSink, tmp_path: Path) -> None:
    """Steps of 2, 2 and 1 batches, and the end in the middle of an epoch, which is an epoch's end nevertheless."""
    trainer = trainer_for(sink, tmp_path, args={"gradient_accumulation_steps": 2, "max_steps": 4})
    watched = watch(trainer, sink)
    trainer.train()
    assert len(trainer.model.seen) == STEPS + 2
    assert watched.epochs == [(COUNT, 0), (COUNT + 2 * BATCH, 0)]
    exactly_arrived(server, sink, trainer.model.numbers)


def test_evaluation_and_prediction_are_not_sent_and_a_second_fit_is(
    server: Learner, sink: EchoSink, tmp_path: Path
) -> None:
    args = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trainer = trainer_for(sink, tmp_path, args=args, eval_dataset=HELD_OUT)
    trainer.train()
    trainer.evaluate()
    trainer.predict(HELD_OUT)
    exactly_arrived(server, sink, trainer.model.numbers)
    trainer.train()
    assert trainer.model.numbers.total() == 4 * COUNT
    exactly_arrived(server, sink, trainer.model.numbers)


def test_early_stopping_ends_with_everything_acked(server: Learner, sink: EchoSink, tmp_path: Path) -> None:
    """Nothing is learned, so the second evaluation is no better than the first."""
    args = {
        "num_train_epochs": 9,
        "learning_rate": 0.0,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    }
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = trainer_for(sink, tmp_path, args=args, eval_dataset=HELD_OUT, callbacks=[stopping])
    watched = watch(trainer, sink)
    trainer.train()
    assert watched.epochs == [(COUNT, 0), (2 * COUNT, 0)]
    exactly_arrived(server, sink, trainer.model.numbers)


def test_select_gets_each_batch_with_its_detached_loss(server: Learner, sink: EchoSink, tmp_path: Path) -> None:
    """Of every third one, and what is sent of these are the samples with odd numbers."""
    got: list[torch.Tensor] = []

    def odd_ones(batch: Item, loss: torch.Tensor) -> Item:
        got.append(loss)
        chosen = batch["id"] % 2 == 1
        return {name: leaf[chosen] for name, leaf in batch.items()}

    trainer = trainer_for(sink, tmp_path, select=odd_ones, every_n_batches=3)
    trainer.train()
    model = trainer.model
    assert not any(loss.requires_grad for loss in got)
    assert [loss.item() for loss in got] == model.losses[2::3]
    expected = numbers_of(model.seen[2::3])
    exactly_arrived(server, sink, Counter({number: times for number, times in expected.items() if number % 2}))


def encoded(samples: list[Item]) -> BatchEncoding:
    return BatchEncoding(default_collate(samples))


class Popping(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        return super().training_step(model, {**inputs, "labels": labels}, num_items_in_batch)


class PoppingSinkTrainer(SinkTrainerMixin, Popping):
    pass


@pytest.mark.parametrize("collate", [default_collate, encoded])
def test_what_a_trainer_takes_out_of_its_inputs_is_sent(
    collate: Any, server: Learner, sink: EchoSink, tmp_path: Path
) -> None:
    model = Recorder()
    trainer = PoppingSinkTrainer(
        model=model, args=arguments(tmp_path), train_dataset=Digits(COUNT), data_collator=collate, sink=sink
    )
    trainer.train()
    exactly_arrived(server, sink, model.numbers)


def test_what_forward_does_not_take_is_sent_only_if_it_is_kept(server: Learner, tmp_path: Path) -> None:
    class Anonymous(Classifier):
        def forward(self, image: torch.Tensor, labels: torch.Tensor, **others: torch.Tensor) -> Item:  # type: ignore
            return super().forward(image, labels)

    class Strict(Classifier):
        def forward(self, image: torch.Tensor, labels: torch.Tensor) -> Item:  # type: ignore[override]
            return super().forward(image, labels)

    with sink_to(server) as sink:
        options: dict[str, Any] = {"train_dataset": Digits(COUNT), "sink": sink}
        with pytest.raises(SpecMismatchError, match=r"batch\['id'\]: torch.int64 \[\]: missing"):
            SinkTrainer(model=Strict(), args=arguments(tmp_path), **options).train()
        SinkTrainer(model=Anonymous(), args=arguments(tmp_path, remove_unused_columns=False), **options).train()
        exactly_arrived(server, sink, Counter(range(COUNT)) + Counter(range(COUNT)))


@pytest.mark.parametrize(
    ("args", "written"),
    [
        ({"save_strategy": "steps", "save_steps": 8}, [8, 16, 20]),
        ({"save_strategy": "epoch"}, [20]),
        (
            {
                "save_strategy": "best",
                "eval_strategy": "steps",
                "eval_steps": 8,
                "metric_for_best_model": "evaluations",
                "greater_is_better": True,
            },
            [8, 16, 20],
        ),
    ],
)
def test_everything_is_acked_when_a_checkpoint_is_written(
    args: dict[str, Any], written: list[int], tmp_path: Path
) -> None:
    saved: dict[int, tuple[int, int]] = {}

    class Saving(SinkTrainer):
        def save_model(self, *arguments: Any, **options: Any) -> None:
            stats = sink.stats()
            saved[self.state.global_step] = (stats.samples_acked, stats.in_flight)
            super().save_model(*arguments, **options)

    evaluations = itertools.count()
    with learner(**SLOW) as server, sink_to(server) as sink:
        trainer = Saving(
            model=Recorder(),
            args=arguments(tmp_path, num_train_epochs=1, **MANY_PER_STEP, **args),
            train_dataset=Digits(MANY),
            eval_dataset=HELD_OUT,
            compute_metrics=lambda _: {"evaluations": next(evaluations)},
            sink=sink,
        )
        trainer.train()
        assert saved == {step: (32 * step, 0) for step in written}
        exactly_arrived(server, sink, trainer.model.numbers)


def test_a_resumed_fit_sends_what_it_trains_on(server: Learner, sink: EchoSink, tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 3}
    first = trainer_for(sink, tmp_path, args={**args, "max_steps": 3})
    first.train()
    second = trainer_for(sink, tmp_path, args=args)
    second.train(resume_from_checkpoint=True)
    assert len(second.model.seen) == 2 * STEPS - 3
    exactly_arrived(server, sink, first.model.numbers + second.model.numbers)


def test_with_flush_end_everything_is_acked_when_the_training_ends(tmp_path: Path) -> None:
    with learner(**SLOW) as server, sink_to(server) as sink:
        args = {**MANY_PER_STEP, "num_train_epochs": 1}
        trainer = trainer_for(sink, tmp_path, count=MANY, args=args, flush="end")
        watched = watch(trainer, sink)
        trainer.train()
        assert watched.epochs != watched.end == [(MANY, 0)]
        exactly_arrived(server, sink, trainer.model.numbers)


def interrupt(steps: int) -> None:
    if steps == 7:
        signal.raise_signal(signal.SIGINT)


def divide(steps: int) -> None:
    if steps == 7:
        raise ZeroDivisionError("in the model")


@IGNORE_FORK_WARNING
@pytest.mark.parametrize(("fail", "error"), [(divide, ZeroDivisionError), (interrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_or_an_interrupt_comes_out_and_what_was_trained_on_arrives(
    fail: Callable[[int], None], error: type[BaseException], workers: int, tmp_path: Path
) -> None:
    with learner(**SLOW) as server, sink_to(server) as sink:
        args = {**MANY_PER_STEP, "dataloader_num_workers": workers}
        trainer = trainer_for(sink, tmp_path, Recorder(fail), MANY, args=args)
        with pytest.raises(error):
            trainer.train()
        assert len(trainer.model.seen) == 7
        exactly_arrived(server, sink, trainer.model.numbers)


@IGNORE_FORK_WARNING
def test_an_error_leaves_what_workers_have_collated_to_them(server: Learner, sink: EchoSink, tmp_path: Path) -> None:
    """They read ahead, so more arrives than was trained on."""
    trainer = trainer_for(sink, tmp_path, Recorder(divide), args={"dataloader_num_workers": 2}, send="collated")
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.train()
    traceback.clear_frames(caught.value.__traceback__)  # which hold the loader, whose workers end now
    trained = trainer.model.numbers
    assert trained.total() == COUNT + 2 * BATCH
    eventually(lambda: arrived(server, 1) >= trained)
    assert set(arrived(server, 1)) == set(range(COUNT))


def test_an_error_is_not_masked_by_a_learner_that_is_gone(
    server: Learner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(steps: int) -> None:
        if steps == 10:
            server.stop_server()
            raise ZeroDivisionError("in the model")

    server.pause()
    with contextlib.suppress(ConnectionError), sink_to(server, reconnect=0) as sink:
        trainer = trainer_for(sink, tmp_path, Recorder(fail), MANY, args=MANY_PER_STEP)
        with pytest.raises(ZeroDivisionError, match="in the model"):
            trainer.train()
    assert "after ZeroDivisionError: " in caplog.text
    assert "samples un-acked" in caplog.text


def full_soon(server: Learner) -> EchoSink:
    """A sink with room for 64 samples, and no more than 56 un-acked ones; it is less patient than a test's limit."""
    return sink_to(server, buffer_bytes=64 * PAYLOAD, stall_timeout=20.0)


class Pausing(TrainerCallback):
    """Pauses the learner when the first checkpoint is written, and keeps the weights of each."""

    def __init__(self, server: Learner) -> None:
        self.weights: dict[int, Item] = {}
        self._server = server

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights[state.global_step] = {name: leaf.clone() for name, leaf in model.state_dict().items()}
        if len(self.weights) == 1:
            self._server.pause()


def intact(path: Path, weights: dict[int, Item]) -> bool:
    """Whether the checkpoints there are those, and can be loaded."""
    found = {name.name: safetensors.torch.load_file(name / "model.safetensors") for name in path.glob("checkpoint-*")}
    assert found.keys() == {f"checkpoint-{step}" for step in weights}
    return all(
        torch.equal(found[f"checkpoint-{step}"][name], leaf)
        for step, leaves in weights.items()
        for name, leaf in leaves.items()
    )


SAVING = {"save_strategy": "steps", "save_steps": 20, "num_train_epochs": 1}


@IGNORE_FORK_WARNING
@pytest.mark.parametrize(("send", "workers"), [("trained", 0), ("collated", 0), ("collated", 2)])
def test_a_training_goes_on_without_a_stalled_learner_and_says_so(
    send: str, workers: int, server: Learner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:

    def go_on(steps: int) -> None:
        """So that workers need not wait for it when they end."""
        if steps == 75:
            server.resume()

    with full_soon(server) as sink:
        pausing = Pausing(server)
        options = {"send": send, "flush_timeout": 0.2, "callbacks": [pausing]}
        args = {**SAVING, "dataloader_num_workers": workers}
        trainer = trainer_for(sink, tmp_path, Recorder(go_on), MANY, args=args, **options)
        trainer.train()
        assert len(trainer.model.seen) == MANY // BATCH
        assert intact(tmp_path, pausing.weights)
        assert sorted(pausing.weights) == [20, 40, 60, 80]
        if not workers:
            assert trainer.sink_policy.skipped > 0
            assert "the training goes on" in caplog.text
            assert "not done within 0.2 s; " in caplog.text
            sink.wait()
            assert arrived(server, sink.stats().samples_acked) <= trainer.model.numbers


@IGNORE_FORK_WARNING
@pytest.mark.parametrize(("send", "workers"), [("trained", 0), ("collated", 2)])
def test_on_stall_raise_ends_the_training_and_leaves_the_checkpoint_intact(
    send: str, workers: int, server: Learner, tmp_path: Path
) -> None:
    with full_soon(server) as sink:
        pausing = Pausing(server)
        options = {"send": send, "on_stall": "raise", "flush_timeout": 0.2, "callbacks": [pausing]}
        args = {**SAVING, "dataloader_num_workers": workers, "num_train_epochs": 3}
        trainer = trainer_for(sink, tmp_path, count=MANY, args=args, **options)
        with pytest.raises(DeliveryTimeoutError, match=r"not done within 0.2 s; \d+ samples un-acked") as caught:
            trainer.train()
        server.resume()  # for workers, which end now
        traceback.clear_frames(caught.value.__traceback__)
        assert sorted(pausing.weights)[:1] == [20]
        assert intact(tmp_path, pausing.weights)


def test_a_wrong_address_fails_before_the_first_step(tmp_path: Path) -> None:
    with learner() as server:
        sink = sink_to(server, connect_timeout=0.2)
    for send in ("trained", "collated"):
        trainer = trainer_for(sink, tmp_path, send=send)
        with pytest.raises(ConnectionRefusedError):
            trainer.train()
        assert not trainer.model.seen


def test_arguments_are_checked_before_the_trainer_is_made(server: Learner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="send: got 'both', expected 'trained' or 'collated'"):
        trainer_for(sink_to(server), tmp_path, send="both")
    with pytest.raises(ValueError, match="on_stall: got 'wait'"):
        trainer_for(sink_to(server), tmp_path, on_stall="wait")
    with pytest.raises(TypeError, match="sink: got None"):
        trainer_for(None, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_stal"):
        trainer_for(sink_to(server), tmp_path, on_stal="warn")


def test_close_closes_the_sink_when_the_training_has_ended(server: Learner, tmp_path: Path) -> None:
    """Which sends the tail of it once more."""
    sink = sink_to(server)
    trainer = trainer_for(sink, tmp_path, close=True)
    trainer.train()
    with pytest.raises(ConnectionError, match="closed"):
        sink.send(Digits(1)[0])
    assert trainer.model.numbers <= arrived(server, 2 * COUNT)


class Sending(SinkTrainer):
    """Sends by itself, too, what it is trained on, to another sink."""

    def __init__(self, *arguments: Any, other: EchoSink, **options: Any) -> None:
        self._other = other
        super().__init__(*arguments, **options)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self._other.send(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch=num_items_in_batch)


def test_a_callback_flushes_what_others_send_beside_the_mixin(server: Learner, sink: EchoSink, tmp_path: Path) -> None:
    with learner(**SLOW) as slow, sink_to(slow) as other:
        callback = SinkCallback(other)
        trainer = Sending(
            model=Recorder(),
            args=arguments(tmp_path, **MANY_PER_STEP),
            train_dataset=Digits(MANY),
            sink=sink,
            other=other,
            callbacks=[callback],
        )
        ends = [watch(trainer, each) for each in (sink, other)]
        trainer.train()
        for watched in ends:
            assert watched.epochs == [(MANY, 0), (2 * MANY, 0)]
        exactly_arrived(server, sink, trainer.model.numbers)
        exactly_arrived(slow, other, trainer.model.numbers)


class Rank(HelperProcess):
    """One of two ranks of a job, which trains when it is told to."""

    def __init__(self, rank: int, port: int, path: Path) -> None:
        super().__init__(_serve_rank, rank, port, path)

    def ready(self) -> None:
        self._answer()

    def begin(self, name: str) -> None:
        self._pipe.send((name,))

    def end(self) -> Any:
        return self._answer()


@pytest.mark.parametrize("mixin", [True, False])
def test_losses_are_logged_with_stats(server: Learner, sink: EchoSink, tmp_path: Path, mixin: bool) -> None:
    """Reporters that were there before get them of the mixin only; an evaluation's metrics are its own."""
    args = {"logging_strategy": "steps", "logging_steps": 2, "eval_strategy": "epoch"}
    reporter = Reporter()
    if mixin:
        trainer: Trainer = trainer_for(sink, tmp_path, args=args, eval_dataset=HELD_OUT, callbacks=[reporter])
    else:
        kinds = {"args": arguments(tmp_path, **args), "train_dataset": Digits(COUNT), "eval_dataset": HELD_OUT}
        trainer = Trainer(model=Recorder(), callbacks=[reporter, SinkCallback(sink)], **kinds)
    trainer.train()
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert [logs["step"] for logs in logged] == [2, 4, 6, 8, 10]
    for logs in logged:
        assert {name for name in logs if name.startswith("echo/")} == {f"echo/{name}" for name in LOGGED_STATS}
    sent = [logs["echo/samples_sent"] for logs in logged]
    assert sent == ([16, 32, 36 + 8, 36 + 24, 72] if mixin else [0] * 5)
    assert sum("echo/in_flight" in logs for logs in reporter.logs) == (len(logged) if mixin else 0)
    assert not any(name.startswith("echo/") for name in trainer.evaluate())


def test_what_a_caller_logs_is_not_changed(sink: EchoSink, tmp_path: Path) -> None:
    """Or the numbers of the first time would be logged each time."""
    trainer = trainer_for(sink, tmp_path)
    logs = {"loss": 1.0}
    for _ in range(2):
        trainer.log(logs)
        sink.send(Digits(1)[0])
    assert logs == {"loss": 1.0}
    assert [logged["echo/samples_sent"] for logged in trainer.state.log_history] == [0, 1]


class Reporter(TrainerCallback):
    """Such as TensorBoard's: keeps what it is told when it is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class _Training:
    def __init__(self, rank: int, port: int, path: Path) -> None:
        self._rank = rank
        self._port = port
        self._path = path

    def train(self) -> tuple[Counter[int], list[tuple[int, int]], bool]:
        """What this rank trained on, how much of it was acked at each epoch's end, and whether all ranks agreed on it.

        The backend takes CPU tensors.
        """
        assert cpu_group() is None
        self._join("gloo")
        sink = EchoSink("127.0.0.1", self._port, Digits(1)[0])
        args = {"ddp_backend": "gloo", "per_device_train_batch_size": 4}
        trainer = trainer_for(sink, self._path / "out", count=20, args=args)
        watched = watch(trainer, sink)
        trainer.train()
        group = trainer.sink_policy.group
        return trainer.model.numbers, watched.epochs, group is not None and group is dist.group.WORLD

    def group_beside_a_backend_for_other_tensors(self) -> tuple[bool, int]:
        """Whether `cpu_group` gives the default one, and the sum of the ranks' numbers by the one it gives."""
        dist.destroy_process_group()
        self._join("cuda:gloo")
        group = cpu_group()
        table = torch.tensor([self._rank + 1])
        dist.all_reduce(table, group=group)
        return group is dist.group.WORLD, int(table)

    def _join(self, backend: str) -> None:
        store = self._path / f"store of {backend}"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=self._rank, world_size=2)


def _serve_rank(pipe: Pipe, rank: int, port: int, path: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    training = _Training(rank, port, path)
    pipe.send(None)
    while True:
        answer_request(pipe, training)


@pytest.mark.slow
def test_each_rank_sends_its_own_shard(server: Learner, tmp_path: Path) -> None:
    with Rank(0, server.port, tmp_path) as one, Rank(1, server.port, tmp_path) as two:
        for rank in (one, two):
            rank.ready()
        for rank in (one, two):
            rank.begin("train")
        (mine, epochs, world), (theirs, *others) = one.end(), two.end()
        assert others == [epochs, world]
        assert (epochs, world) == ([(12, 0), (24, 0)], True)
        assert arrived(server, 48) == mine + theirs
        assert set(mine + theirs) == set(range(20))
        for rank in (one, two):
            rank.begin("group_beside_a_backend_for_other_tensors")
        assert [one.end(), two.end()] == [(False, 1 + 2)] * 2
