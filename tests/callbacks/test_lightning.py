"""The callbacks for Lightning: a real ``Trainer`` and ``Fabric`` train on digits, and a real server gets them."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from leaks import freeze
from learner_process import Learner
from torch.multiprocessing import ProcessRaisedException
from training import Classifier, Digits, Item, arrived, learner, numbers_of, sink_to, wait_for_numbers

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, TcpClient

HELPERS = Path(__file__).parents[1] / "helpers"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("_imported", "_as_before"),
]

SAMPLES, BATCHES = 180, 3
"""Of an epoch; the last batch is a smaller one."""
SLOW: dict[str, Any] = {"busy": 0.05}
"""For a learner that is behind when an epoch ends, unless it is waited for: it acks no more than some 70 at once."""
FULL_SOON: dict[str, Any] = {"buffer_bytes": 80 * 272}
"""For a sink with room for one batch, beside what it keeps for a new connection."""
BOUND_S = 20.0
"""Far more than a flush with a timeout of 1 s may take, and less than one that has none."""
RUN_S = 90.0
"""Seconds for a program with two ranks; it takes some twenty."""


@pytest.fixture(scope="module")
def _imported() -> None:
    """Only here: it takes seconds, and all processes of pytest-xdist import this module, while one runs its tests."""
    global Fabric, EarlyStopping, ModelCheckpoint, CSVLogger, ODD, Model, ReportingSink, WaitsForWorkers, Watch
    global loader, trainer, FabricSinkCallback, SinkCallback
    from lightning.fabric import Fabric
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning_digits import ODD, Model, ReportingSink, WaitsForWorkers, Watch, loader, trainer

    from echo_torch.callbacks.lightning import FabricSinkCallback, SinkCallback

    freeze()


@pytest.fixture
def _as_before() -> Iterator[None]:
    """Puts back what a ``Trainer`` changes in its process: who is told of Ctrl-C, and the environment."""
    handler, environment = signal.getsignal(signal.SIGINT), dict(os.environ)
    yield
    signal.signal(signal.SIGINT, handler)
    os.environ.clear()
    os.environ.update(environment)


@contextlib.contextmanager
def receiving(server: dict[str, Any] | None = None, **options: Any) -> Iterator[tuple[Learner, EchoSink]]:
    """A learner with the options ``server``, and a sink for it that sends nothing twice, and has not connected."""
    with contextlib.ExitStack() as stack:
        received = stack.enter_context(learner(**(server or {})))
        yield received, stack.enter_context(contextlib.closing(sink_to(received, resend_at_close=False, **options)))


def check(received: Learner, sink: EchoSink, batches: list[Item]) -> None:
    """Exactly the samples of ``batches`` were sent, are acked by now, and arrived."""
    expected = numbers_of(batches)
    stats = sink.stats()
    assert (stats.samples_sent, stats.in_flight) == (expected.total(), 0)
    assert arrived(received, expected.total()) == expected


def checkpoints(path: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{step}", save_top_k=-1, **options)


def saved(path: Path, step: int) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path / f"step={step}.ckpt", weights_only=True)
    return checkpoint


# What is sent, and when it is waited for.


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_trained_on_arrives_and_is_acked_when_an_epoch_ends(tmp_path: Path, workers: int) -> None:
    """And nothing else: neither sanity checks nor validation."""
    with receiving({"busy": 0.2}) as (received, sink):  # slower than workers start, and than validation
        model, watch = Model(), Watch(sink)
        trainer(tmp_path, SinkCallback(sink), watch).fit(model, loader(SAMPLES, workers=workers), loader(90, 1000))
        assert len(model.trained) == 2 * BATCHES
        assert model.evaluated["sanity_check"]
        assert watch.in_flight["train"] == [0, 0]
        check(received, sink, model.trained)


@pytest.mark.parametrize("stages", [["train"], ["validate"], ["test"], ["predict"], ["train", "validate", "test"]])
def test_stages_say_what_is_sent(tmp_path: Path, stages: list[str]) -> None:
    """By a fit with validation, and all that may follow it on the same sink; a sanity check is of no stage."""
    with receiving(SLOW) as (received, sink):
        model, watch = Model(), Watch(sink)
        running = trainer(tmp_path, SinkCallback(sink, stages=stages), watch, max_epochs=1)
        running.fit(model, loader(SAMPLES), loader(90, 1000))
        running.validate(model, loader(90, 1000), verbose=False)
        running.test(model, loader(100, 1200), verbose=False)
        running.predict(model, loader(110, 1400))
        done = {"train": model.trained, **model.evaluated}
        assert all(done.values())
        assert not any(sum(watch.in_flight[stage]) for stage in stages)
        check(received, sink, [batch for stage in stages for batch in done[stage]])


def test_select_gets_the_outputs_detached(tmp_path: Path) -> None:
    seen: list[Item] = []

    def half(batch: Item, outputs: Item) -> Item:
        seen.append(outputs)
        return {name: leaf[::2] for name, leaf in batch.items()}

    with receiving() as (received, sink):
        model = Model()
        trainer(tmp_path, SinkCallback(sink, select=half)).fit(model, loader(SAMPLES))
        assert [outputs["logits"].shape for outputs in seen] == [(64, 10), (64, 10), (52, 10)] * 2
        assert not any(leaf.requires_grad for outputs in seen for leaf in outputs.values())
        check(received, sink, [half(batch, {}) for batch in model.trained])


def test_each_micro_batch_is_sent_when_gradients_are_accumulated(tmp_path: Path) -> None:
    with receiving() as (received, sink):
        model = Model()
        running = trainer(tmp_path, SinkCallback(sink), accumulate_grad_batches=2)
        running.fit(model, loader(SAMPLES))
        assert running.global_step == 4
        assert len(model.trained) == 2 * BATCHES
        check(received, sink, model.trained)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loggers_get_the_stats(tmp_path: Path, accumulate: int) -> None:
    """At the steps of Lightning's own numbers, and when an epoch ends, with everything acked."""
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 2, "max_epochs": 3}
    with receiving() as (received, sink):
        model, logger = Model(), CSVLogger(tmp_path)
        trainer(tmp_path, SinkCallback(sink), logger=logger, **options).fit(model, loader(SAMPLES))
        check(received, sink, model.trained)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [(int(row["step"]), int(row["echo/samples_sent"])) for row in rows if row["echo/samples_sent"]]
    acked = [int(row["echo/samples_acked"]) for row in rows if row["echo/in_flight"] == "0"]
    assert {step for step, _ in ours} >= {int(row["step"]) for row in rows if row["constant"]}
    assert len(set(ours)) == len(ours)
    assert [count for count in acked if count % SAMPLES == 0] == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES]
    assert ours[-1][1] == 3 * SAMPLES
    assert set(rows[0]) >= set(sink.stats().as_dict("echo/"))


def test_all_loggers_get_the_same_stats(tmp_path: Path) -> None:
    with receiving() as (received, sink):
        model, loggers = Model(), [CSVLogger(tmp_path / name) for name in ("one", "other")]
        trainer(tmp_path, SinkCallback(sink), logger=loggers, log_every_n_steps=1).fit(model, loader(SAMPLES))
        check(received, sink, model.trained)
    one, other = ((Path(logger.log_dir) / "metrics.csv").read_text() for logger in loggers)
    assert "echo/elapsed_seconds" in one
    assert one == other


def test_loggers_get_no_stats_if_not_wanted(tmp_path: Path) -> None:
    with receiving() as (received, sink):
        model, logger = Model(), CSVLogger(tmp_path)
        callback = SinkCallback(sink)
        callback.log_stats = False
        trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(model, loader(SAMPLES))
        check(received, sink, model.trained)
    assert "echo" not in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_two_sinks_on_one_trainer(tmp_path: Path) -> None:
    with receiving(SLOW) as (first, one), receiving(SLOW) as (second, other):
        model, watch = Model(), Watch(one, other)
        callbacks = SinkCallback(one), SinkCallback(other, stages=["train", "validate"])
        trainer(tmp_path, *callbacks, watch).fit(model, loader(SAMPLES), loader(90, 1000))
        assert watch.in_flight["train"] == [0] * 4
        check(first, one, model.trained)
        check(second, other, model.trained + model.evaluated["validate"])


def test_the_last_fit_s_sink_is_open_unless_close(tmp_path: Path) -> None:
    with receiving() as (received, sink):
        model = Model()
        trainer(tmp_path, SinkCallback(sink), max_epochs=1).fit(model, loader(SAMPLES))
        running = trainer(tmp_path, SinkCallback(sink, close=True), max_epochs=1)
        running.fit(model, loader(SAMPLES))
        check(received, sink, model.trained)
        running.save_checkpoint(tmp_path / "afterwards")
        with pytest.raises(ConnectionError, match="this sink was closed"):
            sink.send(Digits(1)[0])


# Fits that end early.


def test_max_steps_ends_an_epoch(tmp_path: Path) -> None:
    with receiving(SLOW) as (received, sink):
        model, watch = Model(), Watch(sink)
        trainer(tmp_path, SinkCallback(sink), watch, max_epochs=-1, max_steps=4).fit(model, loader(SAMPLES))
        assert len(model.trained) == 4
        assert watch.in_flight["train"] == [0, 0]
        check(received, sink, model.trained)


def test_early_stopping(tmp_path: Path) -> None:
    with receiving(SLOW) as (received, sink):
        model, watch = Model(), Watch(sink)
        stopping = EarlyStopping("constant", patience=1)
        trainer(tmp_path, stopping, SinkCallback(sink), watch, max_epochs=10).fit(model, loader(SAMPLES))
        assert len(model.trained) == 2 * BATCHES
        assert watch.in_flight["train"] == [0, 0]
        check(received, sink, model.trained)


def fail(kind: str) -> None:
    if kind == "SIGINT":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(BOUND_S)
    raise ValueError("no such step") if kind == "ValueError" else KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "workers"), [("ValueError", 0), ("ValueError", 2), ("KeyboardInterrupt", 2), ("SIGINT", 0)]
)
def test_an_error_in_mid_epoch_is_the_user_s_and_what_was_trained_on_arrives(
    tmp_path: Path, kind: str, workers: int
) -> None:
    """Lightning exits when it is interrupted. A fit that follows is as the first."""
    with receiving(SLOW) as (received, sink):
        model = Model(lambda step: fail(kind) if step == 6 else None)
        callback = SinkCallback(sink)
        with pytest.raises((ValueError, SystemExit)) as caught:
            trainer(tmp_path, callback).fit(model, loader(SAMPLES, workers=workers))
        assert repr(caught.value) == ("ValueError('no such step')" if kind == "ValueError" else "SystemExit(1)")
        assert len(model.trained) == 5
        check(received, sink, model.trained)
        model.at_step = None
        trainer(tmp_path, callback).fit(model, loader(SAMPLES))
        assert len(model.trained) == 5 + 2 * BATCHES
        check(received, sink, model.trained)


def test_a_wrong_address_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and listens not
        sink = EchoSink("127.0.0.1", nobody.getsockname()[1], Digits(1)[0], connect_timeout=0.1)
        model = Model()
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            trainer(tmp_path, SinkCallback(sink)).fit(model, loader(SAMPLES), loader(90, 1000))
        assert not model.trained
        assert not model.evaluated["sanity_check"]
        trainer(tmp_path, SinkCallback(sink)).validate(model, loader(90, 1000), verbose=False)  # which sends nothing


# A learner that does not keep up.


@pytest.mark.parametrize("on_stall", ["warn", "raise"])
def test_a_stalled_learner(tmp_path: Path, on_stall: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Does not keep the training from going on, or ends it, as the user said; the checkpoints are good."""
    with receiving(**FULL_SOON) as (received, sink):
        model = Model(lambda step: received.pause() if step == BATCHES + 1 else None)
        callback = SinkCallback(sink, flush_timeout=0.3, on_stall=on_stall)
        running = trainer(tmp_path, callback, checkpoints(tmp_path), max_epochs=5)
        began = time.monotonic()
        if on_stall == "raise":
            with pytest.raises(DeliveryTimeoutError):
                running.fit(model, loader(SAMPLES))
        else:
            running.fit(model, loader(SAMPLES))
            assert len(model.trained) == 5 * BATCHES
            assert callback.policy.skipped > 0
            assert "the training goes on" in caplog.text
            assert str(sink.stats().in_flight) in caplog.text
            weights = saved(tmp_path, 5 * BATCHES)["state_dict"]
            assert all(torch.equal(leaf, weights[name]) for name, leaf in model.state_dict().items())
        assert time.monotonic() - began < BOUND_S
        assert saved(tmp_path, BATCHES)["callbacks"][callback.state_key]["sink"]["acked_through"] == BATCHES - 1
        received.resume()
        sink.wait()
        assert numbers_of(model.trained) >= arrived(received, sink.stats().samples_acked)


@pytest.mark.parametrize("flush", ["epoch", "end"])
def test_a_learner_that_is_gone_leaves_a_checkpoint(tmp_path: Path, flush: Any) -> None:
    """Of a fit that fails for it; and it can be saved afterwards."""
    with receiving(reconnect=0.0) as (received, sink):
        model = Model(lambda step: received.stop_server() if step == BATCHES + 1 else None)
        callback = SinkCallback(sink, flush=flush)
        running = trainer(tmp_path, callback, checkpoints(tmp_path, save_on_exception=True))
        with pytest.raises(ConnectionClosedError):
            running.fit(model, loader(SAMPLES))
        states = [saved(tmp_path, BATCHES), saved(tmp_path, running.global_step)]
        running.save_checkpoint(tmp_path / "by hand")
        assert running.global_step > BATCHES
        assert [state["global_step"] for state in states] == [BATCHES, running.global_step]
        if flush == "epoch":
            assert states[1]["callbacks"][callback.state_key]["sink"]["acked_through"] >= BATCHES - 1


# Checkpoints.


def test_a_checkpoint_has_everything_acked(tmp_path: Path) -> None:
    """Also one that is saved in mid-epoch, and its watermark says so."""
    with receiving(SLOW) as (_, sink):
        callback = SinkCallback(sink)
        trainer(tmp_path, checkpoints(tmp_path, every_n_train_steps=2), callback).fit(Model(), loader(SAMPLES))
        for step in (2, 4, 6):
            state = saved(tmp_path, step)["callbacks"][callback.state_key]
            assert state["batches"] == step
            assert state["sink"]["acked_through"] == step - 1
            assert state["sink"]["in_flight"] == 0


def test_a_resumed_fit_goes_on_with_the_counts(tmp_path: Path) -> None:
    """And what is loaded to be tested does not take them back."""
    stages = ["train", "test"]
    with receiving() as (received, sink):
        model = Model()
        trainer(tmp_path, SinkCallback(sink, stages=stages), checkpoints(tmp_path), max_epochs=1).fit(
            model, loader(SAMPLES)
        )
        check(received, sink, model.trained)
        again = sink_to(received, resend_at_close=False)
        with contextlib.closing(again):
            callback, resumed = SinkCallback(again, stages=stages), Model()
            running = trainer(tmp_path, callback, checkpoints(tmp_path), max_epochs=3)
            running.fit(resumed, loader(SAMPLES), ckpt_path=tmp_path / f"step={BATCHES}.ckpt")
            assert len(resumed.trained) == 2 * BATCHES
            check(received, again, model.trained + resumed.trained)
            state = saved(tmp_path, 3 * BATCHES)["callbacks"][callback.state_key]
            assert (state["batches"], state["sink"]["acked_through"]) == (3 * BATCHES, 3 * BATCHES - 1)
            running.test(resumed, loader(100, 1200), ckpt_path=tmp_path / f"step={BATCHES}.ckpt", verbose=False)
            assert again.acked_through == 3 * BATCHES + 2 - 1
            check(received, again, model.trained + resumed.trained + resumed.evaluated["test"])


# On several ranks.


def reports(directory: Path) -> list[dict[str, Any]]:
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


def run(command: list[Any]) -> None:
    """Run a program in a process group of its own, of which nothing is left in the end."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=RUN_S)
            assert process.returncode == 0, errors
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_each_rank_sends_its_shard(tmp_path: Path) -> None:
    """Of 13 samples 7 each: what is padded arrives twice, unless that is skipped."""
    with learner() as padded, learner() as unpadded, learner() as by_hand:
        program = HELPERS / "lightning_digits.py"
        command = [sys.executable, program, tmp_path, *(str(one.port) for one in (padded, unpadded, by_hand))]
        run(command)
        shards = [Counter(report["trained"]) for report in reports(tmp_path / "padded")]
        assert [shard.total() for shard in shards] == [2 * 7, 2 * 7]
        assert arrived(padded, 2 * (ODD + 1)) == shards[0] + shards[1]
        (state,) = torch.load(tmp_path / "padded.ckpt", weights_only=True)["callbacks"].values()
        assert (state["rank"], state["batches"], state["sink"]["acked_through"]) == (0, 8, 7)
        assert arrived(unpadded, 2 * ODD) == Counter(dict.fromkeys(range(ODD), 2))
        assert sum(len(report["trained"]) for report in reports(tmp_path / "unpadded")) == 2 * (ODD + 1)
        assert arrived(by_hand, 2) == Counter([0, 1])


class ClientPerRank:
    """Connects each rank to a learner of its own."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = ports

    def __call__(self, host: str, _: int, *arguments: Any) -> TcpClient:
        return TcpClient(host, self.ports[dist.get_rank()], *arguments)


@pytest.mark.slow
def test_all_ranks_end_when_the_learner_of_one_stalls(tmp_path: Path) -> None:
    """Ranks that are spawned, each with a learner; the second takes what it is sent in the first epoch, and no more."""
    with learner() as lively, learner() as stalls:
        stalls.pause()
        sink = sink_to(lively, client=ClientPerRank([lively.port, stalls.port]))
        callback = ReportingSink(tmp_path, sink, flush_timeout=1.0, on_stall="raise")
        spawning = trainer(tmp_path, callback, strategy="ddp_spawn", devices=2, max_epochs=9)
        with pytest.raises(ProcessRaisedException, match="DeliveryTimeoutError"):
            spawning.fit(Model(), loader(100))
        ended = reports(tmp_path)
        assert [report["ended"] for report in ended] == ["DeliveryTimeoutError"] * 2
        assert all(report["seconds"] < BOUND_S for report in ended)
        assert arrived(lively, len(ended[0]["trained"])) == Counter(ended[0]["trained"])
        stalls.resume()
        got = arrived(stalls, 50)
        assert Counter(ended[1]["trained"][:50]) <= got <= Counter(ended[1]["trained"])


@pytest.mark.parametrize(
    ("strategy", "persistent"),
    [pytest.param("ddp_spawn", True, marks=pytest.mark.slow), ("ddp_fork", True), ("ddp_fork", False)],
)
def test_ranks_that_lightning_starts_wait_for_their_workers(tmp_path: Path, strategy: str, persistent: bool) -> None:
    """Two ranks of two workers each, which send what they collate; no two samples of an epoch are the same."""
    with learner() as received, sink_to(received) as sink:
        ranks = trainer(tmp_path, WaitsForWorkers(sink), strategy=strategy, devices=2)
        sending = loader(SAMPLES, size=16, workers=2, collate_fn=sink.collate(), persistent_workers=persistent)
        ranks.fit(Model(), sending)
        expected = Counter(dict.fromkeys(range(SAMPLES), 2))
        exits = 2 * 2 * (1 if persistent else 2)
        assert expected <= wait_for_numbers(received, expected) <= Counter(dict.fromkeys(range(SAMPLES), 2 + exits))


# Fabric.


def test_fabric(tmp_path: Path) -> None:
    """A loop that calls the events, as those who write one for a Trainer's callbacks do, and with keywords."""
    with receiving(SLOW) as (received, sink):
        callback = FabricSinkCallback(sink)
        fabric = Fabric(accelerator="cpu", callbacks=[callback])
        model = Classifier()
        module, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
        trained: list[Item] = []
        fabric.call("on_train_start", epochs=2)
        for epoch in range(2):
            for batch_idx, batch in enumerate(fabric.setup_dataloaders(loader(SAMPLES))):
                outputs = module(**batch)
                fabric.backward(outputs["loss"])
                optimizer.step()
                trained.append(batch)
                if epoch:
                    fabric.call("on_train_batch_end", outputs, batch, batch_idx)
                else:
                    fabric.call("on_train_batch_end", batch=batch, outputs=outputs, batch_idx=batch_idx, epoch=epoch)
            fabric.call("on_train_epoch_end", epoch=epoch)
            assert sink.stats().in_flight == 0
        check(received, sink, trained)

        batch = next(iter(loader(SAMPLES, size=SAMPLES)))
        fabric.call("on_train_batch_end", batch=batch, padding=2)
        trained.append({name: leaf[:-2] for name, leaf in batch.items()})
        fabric.save(tmp_path / "checkpoint", {"module": module, "sink": callback})
        check(received, sink, trained)
        fabric.call("on_train_batch_end", batch=batch)
        fabric.call("on_save_checkpoint", path=tmp_path)
        check(received, sink, [*trained, batch])
        fabric.call("on_train_batch_end", batch=batch)
        fabric.call("on_exception", ValueError())
        check(received, sink, [*trained, batch, batch])
        fabric.call("on_train_start")
        fabric.call("on_train_batch_end", batch=batch)
        fabric.call("on_train_end")
        check(received, sink, [*trained, batch, batch, batch])

        with contextlib.closing(sink_to(received)) as again:
            fabric.load(tmp_path / "checkpoint", {"module": module, "sink": FabricSinkCallback(again)})
            assert again.acked_through == 2 * BATCHES
            assert again.stats().samples_sent == numbers_of(trained).total()


# What does not depend on a fit.


def test_the_counts_of_another_rank_are_not_loaded() -> None:
    with receiving() as (_, sink):
        callback = SinkCallback(sink)
        callback.load_state_dict({**callback.state_dict(), "rank": 1, "batches": 7})
        assert callback.state_dict()["batches"] == 0
        callback.load_state_dict({**callback.state_dict(), "batches": 7})
        assert callback.state_dict()["batches"] == 7


def test_callbacks_of_one_trainer_have_different_keys() -> None:
    sinks = [EchoSink("127.0.0.1", port, Digits(1)[0]) for port in (1, 2)]
    callbacks = [
        SinkCallback(sinks[0]),
        SinkCallback(sinks[1]),
        SinkCallback(sinks[0], stages=["test"]),
        SinkCallback(sinks[0], select=fail),
    ]
    assert len({callback.state_key for callback in callbacks}) == len(callbacks)
    assert SinkCallback(sinks[0]).state_key == callbacks[0].state_key


def test_arguments_are_checked() -> None:
    sink = EchoSink("127.0.0.1", 1, Digits(1)[0])
    with pytest.raises(ValueError, match="stages: got 'val', expected some of 'train', 'validate', 'test', 'predict'"):
        SinkCallback(sink, stages=["train", "val"])
    with pytest.raises(ValueError, match="on_stall: got 'ignore'"):
        SinkCallback(sink, on_stall="ignore")
