"""`echo_torch.callbacks.torchrl` in a real ``Trainer`` and real collectors: a policy learns to name digits."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_process import Learner
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, SerialEnv
from torchrl.trainers import DefaultOptimizationStepper, Trainer
from training import IMAGES, LABELS, STALLING_COUNT, Classifier, arrived, learner, sink_to

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, numpy_example
from echo_torch.callbacks.torchrl import SinkCollectorHook, SinkHook, example
from echo_torch.callbacks.torchrl_samples import flatten_frames
from echo_torch.samples.spec import SampleSpec

EPISODE = 5
"""Frames of an episode; those of a batch are no multiple of it."""
BATCH = 12
LONG = 2 + STALLING_COUNT // BATCH + 2
"""Batches of a training that stalls if its learner does from the second on."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:split_trajs=True produces:UserWarning"),
    pytest.mark.filterwarnings("ignore:The default Trainer checkpoint format will change:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The legacy CKPT_BACKEND trainer checkpoint path:DeprecationWarning"),
]


class Digits(EnvBase):
    """Shows one digit after another, from ``first`` on. Naming it is rewarded."""

    def __init__(self, first: int = 0, fails_at: int = -1) -> None:
        super().__init__()
        self.observation_spec = Composite(
            id=Unbounded((), dtype=torch.int64), image=Unbounded((64,)), labels=Unbounded((), dtype=torch.int64)
        )
        self.action_spec = Categorical(10)
        self.reward_spec = Unbounded((1,))
        self.done_spec = Binary(1, dtype=torch.bool)
        self.acted_on: list[int] = []
        self._number = first
        self._fails_at = fails_at
        self._left = 0

    def _show(self) -> dict[str, torch.Tensor]:
        number = self._number
        return {"id": torch.tensor(number), "image": IMAGES[number], "labels": LABELS[number]}

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        self._left = EPISODE
        return TensorDict(self._show(), [])

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        number = int(tensordict["id"])
        if number == self._fails_at:
            raise ZeroDivisionError(f"digit {number}")
        self.acted_on.append(number)
        right = tensordict["action"] == tensordict["labels"]
        self._number += 1
        self._left -= 1
        ended = torch.tensor([self._left == 0])
        return TensorDict({**self._show(), "reward": right.float().reshape(1), "done": ended}, [])

    def _set_seed(self, seed: int | None) -> None:
        pass


class ArgmaxPolicy(torch.nn.Module):
    """The digit that the classifier finds most likely."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.layer = classifier.layer

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image).argmax(-1)


def collector_of(env: Any, classifier: Classifier | None = None, kind: Any = Collector, **options: Any) -> Any:
    policy = TensorDictModule(ArgmaxPolicy(classifier or Classifier()), in_keys=["image"], out_keys=["action"])
    return kind(env, policy, auto_register_policy_transforms=False, **{"frames_per_batch": BATCH, **options})


class Loss(torch.nn.Module):
    """Remembers the numbers it was given, and calls ``during`` with how many batches those were."""

    def __init__(self, classifier: Classifier, during: Callable[[int], None]) -> None:
        super().__init__()
        self.classifier = classifier
        self.trained_on: list[int] = []
        self._during = during
        self._batches = 0

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        self._batches += 1
        self._during(self._batches)
        if ("collector", "mask") in batch.keys(True):
            batch = batch[batch["collector", "mask"]]
        batch = batch.reshape(-1)
        self.trained_on += batch["id"].tolist()
        return TensorDict({"loss": self.classifier(batch["image"], batch["labels"])["loss"]}, [])


class Run:
    """A trainer of 3 batches, with all that it is made of."""

    def __init__(
        self,
        *,
        envs: int = 1,
        frames: int = 3 * BATCH,
        first: int = 0,
        split: bool = False,
        during: Callable[[int], None] = lambda batches: None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        classifier = Classifier()
        self.envs = [Digits(first + 500 * index) for index in range(envs)]
        env = self.envs[0] if envs == 1 else SerialEnv(envs, [lambda env=env: env for env in self.envs])
        self.collector = collector_of(env, classifier, total_frames=-1, split_trajs=split)
        self.loss = Loss(classifier, during)
        self.trainer = Trainer(
            collector=self.collector,
            total_frames=frames,
            frame_skip=1,
            optim_steps_per_batch=1,
            loss_module=self.loss,
            optimizer=torch.optim.SGD(classifier.parameters(), 0.1),
            optimization_stepper=DefaultOptimizationStepper(),
            progress_bar=False,
            **options,
        )

    @property
    def acted_on(self) -> Counter[int]:
        return Counter(number for env in self.envs for number in env.acted_on)


def digits_of(batch: TensorDictBase, outputs: Any = None) -> TensorDictBase:
    return batch.select("id", "image", "labels")


def hook_for(sink: EchoSink, **policy: Any) -> SinkHook:
    return SinkHook(sink, select=digits_of, **policy)


def full_for(learner: Learner) -> EchoSink:
    """A sink with room for a batch and a half, that does not wait for ever at its end."""
    row = 8 + 64 * 4 + 8
    return sink_to(learner, max_inflight_msgs=2, buffer_bytes=(BATCH + BATCH // 2) * row, resend_acked=0)


# The trainer.


@pytest.mark.parametrize("how", [{}, {"envs": 2}, {"split": True}], ids=["frames", "envs", "trajectories"])
def test_what_is_trained_on_arrives(how: dict[str, Any]) -> None:
    """Frame by frame and no padding, after each collection."""
    in_flight = []
    with learner() as server, sink_to(server, resend_at_close=False) as sink:
        run = Run(**how)
        hook_for(sink).register(run.trainer)
        run.trainer.register_op("post_steps", lambda: in_flight.append(sink.stats().in_flight))
        run.trainer.train()
        assert in_flight == [0, 0, 0]
        assert run.acted_on.total() == 3 * BATCH
        assert Counter(run.loss.trained_on) == run.acted_on
        assert arrived(server, 3 * BATCH) == run.acted_on


def test_all_of_a_batch_is_sent_by_default() -> None:
    """With everything that is nested in it, as the ops before left it; the op after gets the very same batch."""
    batches: list[TensorDictBase] = []

    def rewarded(batch: TensorDictBase) -> TensorDictBase:
        batches.append(batch.set(("next", "reward"), batch["next", "reward"] + 0.5))
        return batch

    run = Run(envs=2)
    probe = collector_of(Digits(), frames_per_batch=1, total_frames=1)
    example = next(iter(probe)).reshape(-1)[0]
    probe.shutdown()
    passed: list[Any] = []
    with Learner(numpy_example(example), 3 * BATCH) as server:
        with EchoSink("127.0.0.1", server.port, example, resend_at_close=False) as sink:
            run.trainer.register_op("batch_process", rewarded)
            SinkHook(sink).register(run.trainer)
            run.trainer.register_op("batch_process", passed.append)
            run.trainer.train()
        got = server.take(3 * BATCH)
    sent = torch.cat([batch.reshape(-1) for batch in batches]).to_dict()
    assert got["next"]["reward"].min() == 0.5
    assert all(mine is theirs for mine, theirs in zip(passed, batches, strict=True))
    np.testing.assert_equal(got, _numpy(sent))


def _numpy(tree: Any) -> Any:
    return {key: _numpy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree.numpy()


def test_two_hooks_send_side_by_side() -> None:
    def even(batch: TensorDictBase, outputs: Any) -> TensorDictBase | None:
        assert outputs is None
        return digits_of(batch[batch["id"] % 2 == 0])

    with learner() as one, learner() as other:
        with sink_to(one, resend_at_close=False) as sink, sink_to(other, resend_at_close=False) as second:
            run = Run()
            hook_for(sink).register(run.trainer)
            SinkHook(second, select=even).register(run.trainer, "second")
            assert {"sink", "second"} <= run.trainer.state_dict().keys()
            run.trainer.train()
        assert arrived(one, 3 * BATCH) == run.acted_on
        assert arrived(other, 3 * BATCH // 2) == Counter(n for n in run.acted_on if n % 2 == 0)


def test_a_wrong_address_fails_before_the_first_frame() -> None:
    with learner() as server:
        sink = sink_to(server, connect_timeout=0.1)
    run = Run()
    hook_for(sink).register(run.trainer)
    with pytest.raises(ConnectionRefusedError):
        run.trainer.train()
    assert not run.acted_on


@pytest.mark.parametrize("how", ["error", "interrupt", "signal"])
def test_an_error_comes_out_and_what_was_collected_arrives(how: str) -> None:
    """The second batch had been collected."""

    def fail(batches: int) -> None:
        if batches == 2 and how == "error":
            raise ZeroDivisionError("the user's")
        if batches == 2 and how == "interrupt":
            raise KeyboardInterrupt("the user's")
        if batches == 2:
            os.kill(os.getpid(), signal.SIGINT)

    run = Run(during=fail)
    with learner() as server, sink_to(server, resend_at_close=False) as sink:
        hook = hook_for(sink)
        hook.register(run.trainer)
        with pytest.raises(ZeroDivisionError if how == "error" else KeyboardInterrupt), hook:
            run.trainer.train()
        assert sink.stats().in_flight == 0
        assert run.acted_on.total() == 2 * BATCH
        assert arrived(server, 2 * BATCH) == run.acted_on
    run.collector.shutdown()


def test_training_that_is_stopped_early_has_sent_what_it_trained_on() -> None:
    run = Run(during=lambda batches: run.trainer.request_stop() if batches == 2 else None)
    with learner() as server, sink_to(server, resend_at_close=False) as sink:
        hook_for(sink).register(run.trainer)
        run.trainer.train()
        assert sink.stats().in_flight == 0
        assert arrived(server, 2 * BATCH) == run.acted_on == Counter(run.loss.trained_on)


@pytest.mark.parametrize("on_stall", ["warn", "raise"])
def test_a_learner_that_stalls(on_stall: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The training goes on and says what was skipped, or ends; its last checkpoint can be loaded either way."""
    file = tmp_path / "trainer.pt"
    with learner() as server:
        run = Run(
            during=lambda batches: server.pause() if batches == 2 else None,
            frames=LONG * BATCH,
            save_trainer_file=file,
            save_trainer_interval=1,
        )
        sink = full_for(server)
        hook = hook_for(sink, flush_timeout=0.2, on_stall=on_stall)
        hook.register(run.trainer)
        if on_stall == "raise":
            with pytest.raises(DeliveryTimeoutError, match="samples un-acked"):
                run.trainer.train()
            run.collector.shutdown()
        else:
            run.trainer.train()
            assert "at the end of the epoch" in caplog.text
            assert hook.skipped > 0
            assert Counter(run.loss.trained_on).total() == LONG * BATCH
        resumed = Run()
        hook_for(sink_to(server)).register(resumed.trainer)
        resumed.trainer.load_from_file(file)
        assert BATCH <= resumed.trainer.collected_frames <= run.trainer.collected_frames
        resumed.collector.shutdown()
        server.resume()
        sink.close()
        assert sink.stats().in_flight == 0


def test_a_sink_is_closed_at_the_end_if_asked_to() -> None:
    """Once, even if that was in vain and the hook is used as a context manager as well."""
    with learner() as server:
        sink = sink_to(server, resend_at_close=False)
        run = Run()
        hook_for(sink, close=True).register(run.trainer)
        run.trainer.train()
        with pytest.raises(ConnectionClosedError, match="closed"):
            sink.connect()
        assert arrived(server, 3 * BATCH) == run.acted_on
        server.pause()
        sink = full_for(server)
        with hook_for(sink, close=True, flush_timeout=0.1) as hook:
            run = Run(frames=LONG * BATCH)
            hook.register(run.trainer)
            run.trainer.train()
        assert run.acted_on.total() == LONG * BATCH
        assert sink.stats().maybe_lost == sink.stats().in_flight > 0
        server.resume()


def test_a_learner_that_ends_ends_the_training() -> None:
    """Without masking anything; and with ``on_error="warn"`` of the sink, it does not."""
    for on_error in ("raise", "warn"):
        with learner() as server:
            run = Run(during=lambda batches, server=server: server.kill() if batches == 2 else None)
            sink = sink_to(server, on_error=on_error, reconnect=0.0)
            hook_for(sink).register(run.trainer)
            if on_error == "raise":
                with pytest.raises(ConnectionClosedError, match="samples un-acked"):
                    run.trainer.train()
                run.collector.shutdown()
            else:
                run.trainer.train()
                assert len(run.loss.trained_on) == 3 * BATCH
            sink.close()


@pytest.mark.parametrize("unified", [False, True], ids=["legacy", "Checkpoint"])
def test_a_resumed_training_goes_on_counting(unified: bool, tmp_path: Path) -> None:
    """What the trainer's checkpoint says was acked when it was written."""
    where = tmp_path / "checkpoint"
    options = {"checkpoint": Checkpoint()} if unified else {}
    with learner() as server:
        with sink_to(server, resend_at_close=False) as sink:
            run = Run(save_trainer_file=where, **options)
            hook_for(sink).register(run.trainer)
            run.trainer.train()
            before = sink.state_dict()
        assert before["acked_through"] == 2
        assert before["samples_acked"] == 3 * BATCH
        with sink_to(server, resend_at_close=False) as sink:
            again = Run(first=100, frames=5 * BATCH, **({"checkpoint": Checkpoint()} if unified else {}))
            hook = hook_for(sink)
            hook.register(again.trainer)
            again.trainer.load_from_file(where)
            assert sink.state_dict() == before
            again.trainer.train()
            assert sink.acked_through == 4
            assert sink.stats().samples_acked == 5 * BATCH
            assert hook.state_dict()["batches"] == 5
        assert arrived(server, 5 * BATCH) == run.acted_on + again.acted_on


# Collectors.


def test_a_hook_of_a_collector_sends_what_is_collected() -> None:
    env = Digits()
    with learner() as server, sink_to(server, resend_at_close=False) as sink:
        hook = SinkCollectorHook(sink, select=digits_of)
        collector = collector_of(env, total_frames=2 * BATCH, post_collect_hook=hook)
        for _ in collector:
            assert sink.stats().in_flight == 0
        collector.shutdown()
        assert arrived(server, 2 * BATCH) == Counter(env.acted_on) != Counter()


def test_workers_of_a_collector_send_what_they_collect() -> None:
    """From processes of their own, which lose nothing when they end, though nobody waits for a busy learner."""
    many = 10 * BATCH
    with learner(busy=0.3) as server:
        sink = sink_to(server, max_inflight_msgs=8)
        collector = collector_of(
            [Digits, LaterDigits],
            kind=MultiSyncCollector,
            frames_per_batch=many,
            total_frames=2 * many,
            post_collect_hook=SinkCollectorHook(sink, select=digits_of, flush="end"),
        )
        given = Counter(number for batch in collector for number in batch["id"].reshape(-1).tolist())
        collector.shutdown()
        assert given == Counter([*range(many), *range(900, 900 + many)])
        sink.wait()
        assert sink.stats().samples_sent == 2 * many
        got = arrived(server, 2 * many)
        assert got.keys() >= given.keys()


class LaterDigits(Digits):
    def __init__(self) -> None:
        super().__init__(900)


class FailingDigits(Digits):
    def __init__(self) -> None:
        super().__init__(900, fails_at=900 + BATCH + 3)


def test_a_worker_that_fails_has_sent_what_it_collected() -> None:
    with learner() as server:
        collector = collector_of(
            [Digits, FailingDigits],
            kind=MultiSyncCollector,
            frames_per_batch=2 * BATCH,
            total_frames=6 * BATCH,
            post_collect_hook=SinkCollectorHook(sink_to(server), select=digits_of, flush="end"),
        )
        with pytest.raises(RuntimeError, match="worker 1"):
            for _ in collector:
                pass
        collector.shutdown()
        got = arrived(server, 3 * BATCH)
        assert got.keys() >= {*range(2 * BATCH), *range(900, 900 + BATCH)}


@pytest.mark.parametrize("what", ["collector", "split", "environment", "several environments", "workers"])
def test_the_example_of_a_collector_is_like_what_it_collects(what: str) -> None:
    """Which the environment's own rollouts are not: a collector numbers its trajectories."""
    environment = SerialEnv(2, Digits) if what == "several environments" else Digits()
    if what == "workers":
        collector = collector_of([Digits, Digits], None, MultiSyncCollector, total_frames=2 * BATCH)
    else:
        collector = collector_of(environment, split_trajs=what == "split", total_frames=2 * BATCH)
    try:
        one = example(environment if what in ("environment", "workers") else collector)
        spec = SampleSpec(one)
        for collected in collector:
            match = spec.match(flatten_frames(collected))
            assert match.rows == BATCH
    finally:
        collector.shutdown()


def test_the_example_of_something_else() -> None:
    with pytest.raises(
        TypeError, match="source: got int, expected a collector that works in one process, or an environment"
    ):
        example(1)  # type: ignore[arg-type]
