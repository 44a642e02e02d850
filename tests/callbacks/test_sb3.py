"""`echo_torch.callbacks.sb3`: algorithms that learn in environments which keep account, into a real server."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import optree
import pytest
import torch
from gymnasium import spaces
from learner_process import Learner
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, numpy_example
from echo_torch.callbacks.sb3 import SinkCallback, example

SHORT_S = 0.2
"""Seconds of a timeout that is meant to pass."""
LONG_S = 60.0
"""Seconds of one that is not, however busy the machine."""
BATCH = 32
"""Samples that the server hands out at a time."""
N_ENVS = 2
N_STEPS = 128
ROLLOUT = N_ENVS * N_STEPS
"""Transitions in one; more than the server takes while the next is made."""

Tree = dict[str, Any]


class BrokenError(Exception):
    pass


class Reach(gymnasium.Env[Tree, np.ndarray]):
    """Observations of two kinds, all different, and actions that a normal distribution leaves the bounds of.

    Episodes are of 5 steps; each second one is truncated.
    """

    observation_space = spaces.Dict({"at": spaces.Box(-np.inf, np.inf, (2,), np.float32), "phase": spaces.Discrete(6)})
    action_space = spaces.Box(-0.5, 0.5, (2,), np.float32)

    def __init__(self) -> None:
        self._at = np.zeros(2, np.float32)
        self._steps = self._episodes = 0

    def reset(self, *, seed: int | None = None, options: Tree | None = None) -> tuple[Tree, Tree]:
        super().reset(seed=seed)
        self._steps = 0
        self._episodes += 1
        self._at = np.array([self._episodes, 0], np.float32)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[Tree, float, bool, bool, Tree]:
        self._steps += 1
        self._at = self._at + action
        over = self._steps == 5
        return self._observation(), float(self._at.sum()), over and self._episodes % 2 == 1, over, {}

    def _observation(self) -> Tree:
        return {"at": self._at.copy(), "phase": self._steps}


class RecordingEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps the transitions of an environment; at one of them it ``fails`` instead."""

    def __init__(self, env: gymnasium.Env[Any, Any], fails_at: int | None, fails: Callable[[], None]) -> None:
        super().__init__(env)
        self.made: list[Tree] = []
        self._obs: Any = None
        self._fails_at, self._fails = fails_at, fails

    def reset(self, **options: Any) -> tuple[Any, Tree]:
        self._obs, info = self.env.reset(**options)
        return self._obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, Tree]:
        if len(self.made) == self._fails_at:
            self._fails()
        obs, reward, terminated, truncated, info = self.env.step(action)
        done = {"terminated": terminated, "truncated": truncated and not terminated}  # sb3 does not tell of both
        made = {"obs": self._obs, "action": action, "reward": reward, "next_obs": obs, **done}
        self.made.append(optree.tree_map(np.array, made))
        self._obs = obs
        return obs, reward, terminated, truncated, info


class Float64Rewards(VecEnvWrapper):
    """Gives rewards in float64, as ``SubprocVecEnv`` does."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, *rest = self.venv.step_wait()
        return (obs, rewards.astype(np.float64), *rest)


class CountingEnv(gymnasium.Env[Any, int]):
    """Adds up the actions, in integers, and ends after 100 steps."""

    action_space = spaces.Discrete(9)

    def __init__(self, in_a_dict: bool) -> None:
        numbers = spaces.Box(0, 900, (1,), np.int64)
        self.observation_space = spaces.Dict({"sum": numbers, "time": numbers}) if in_a_dict else numbers

    def reset(self, **_: Any) -> tuple[Any, Tree]:
        self._sum = self._time = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, Tree]:
        self._sum += int(action)
        self._time += 1
        return self._observation(), 1.0, self._time == 100, False, {}

    def _observation(self) -> Any:
        total = np.array([self._sum])
        return (
            {"sum": total, "time": np.array([self._time])} if isinstance(self.observation_space, spaces.Dict) else total
        )


class RecordingVecEnv(VecEnvWrapper):
    """Keeps the observations that it gives, of one environment."""

    def __init__(self, venv: Any) -> None:
        super().__init__(venv)
        self.given: list[Any] = []

    def reset(self) -> Any:
        return self._record(self.venv.reset())

    def step_wait(self) -> Any:
        obs, *rest = self.venv.step_wait()
        return (self._record(obs), *rest)

    def _record(self, obs: Any) -> Any:
        self.given.append(optree.tree_map(lambda leaf: leaf[0].copy(), obs))
        return obs


def cart_pole() -> gymnasium.Env[Any, Any]:
    """Falls, or is truncated."""
    return gymnasium.make("CartPole-v1", max_episode_steps=14)


class Envs:
    """``N_ENVS`` of them, of which the first may fail at one step.

    Args:
        make: makes one.
        fails_at: the step, from 0 on, in place of which ``fails`` is called.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env[Any, Any]] = cart_pole,
        fails_at: int | None = None,
        fails: Callable[[], None] = lambda: None,
    ) -> None:
        self._recorders = [RecordingEnv(make(), fails_at if index == 0 else None, fails) for index in range(N_ENVS)]
        self.env = DummyVecEnv([lambda account=account: account for account in self._recorders])

    @property
    def made(self) -> list[Tree]:
        """The transitions of all steps that all environments made, step by step."""
        return [one for step in zip(*(account.made for account in self._recorders), strict=False) for one in step]


class Watch(BaseCallback):
    """Keeps how many samples are in flight when a rollout ends, and when the training does."""

    def __init__(self, sink: EchoSink) -> None:
        super().__init__()
        self.rollouts: list[int] = []
        self.ends: list[int] = []
        self._sink = sink

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.rollouts.append(self._sink.stats().in_flight)

    def _on_training_end(self) -> None:
        self.ends.append(self._sink.stats().in_flight)


def ppo(envs: Envs, kind: type[PPO] = PPO) -> PPO:
    policy = "MultiInputPolicy" if isinstance(envs.env.observation_space, spaces.Dict) else "MlpPolicy"
    return kind(policy, envs.env, n_steps=N_STEPS, batch_size=64, n_epochs=1, seed=1, device="cpu")


def dqn(envs: Envs) -> DQN:
    return DQN("MlpPolicy", Float64Rewards(envs.env), learning_starts=100, buffer_size=1000, seed=1, device="cpu")


def sac(envs: Envs) -> SAC:
    return SAC("MultiInputPolicy", envs.env, learning_starts=480, buffer_size=1000, seed=1, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are ten times slower on as many threads as there are cores, if these are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server() -> Iterator[Learner]:
    """For transitions of CartPole, multiples of `BATCH`; slower than they are made."""
    with learner_for(ppo(Envs())) as server:
        yield server


def learner_for(model: Any, on: Any = "step", **options: Any) -> Learner:
    return Learner(numpy_example(example(model, on)), BATCH, **{"busy": 0.05, "num_buffers": 2, **options})


def sink_for(model: Any, server: Learner, on: Any = "step", **options: Any) -> EchoSink:
    return EchoSink("127.0.0.1", server.port, example(model, on), resend_at_close=False, **options)


def stacked(samples: list[Tree], like: Tree) -> Tree:
    """As one batch, with the dtypes of ``like``."""
    return optree.tree_map(lambda one, *leaves: np.stack(leaves).astype(np.asarray(one).dtype), like, *samples)


def is_same(got: Tree, expected: Tree) -> bool:
    equal = optree.tree_map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), got, expected)
    return all(optree.tree_leaves(equal))


def take(server: Learner, count: int, after: int = 0) -> Tree:
    """So many samples, of those that arrived after some."""
    return optree.tree_map(lambda leaf: leaf[after : after + count], server.take(after + count))


def learns(model: Any, envs: Envs, server: Learner) -> None:
    """Two rollouts, of which the transitions must arrive, and be acked at the end."""
    before = server.received()
    with sink_for(model, server) as sink:
        watch = Watch(sink)
        model.learn(2 * ROLLOUT, callback=[SinkCallback(sink), watch])
        assert watch.ends == [0]
        if isinstance(model, PPO):
            assert watch.rollouts == [0, 0]
        assert len(envs.made) == sink.stats().samples_sent == 2 * ROLLOUT
        got = take(server, 2 * ROLLOUT, before)
    assert is_same(got, stacked(envs.made, example(model)))
    assert got["terminated"].any()
    assert got["truncated"].any()


@pytest.mark.parametrize("make", [ppo, dqn])
def test_the_transitions_that_were_made_arrive_and_the_end_finds_them_acked(
    make: Callable[[Envs], Any], server: Learner
) -> None:
    envs = Envs()
    learns(make(envs), envs, server)


@pytest.mark.parametrize("make", [ppo, sac])
def test_observations_may_be_dicts_and_actions_are_those_that_the_environments_got(make: Callable[[Envs], Any]) -> None:
    envs = Envs(Reach)
    model = make(envs)
    with learner_for(model) as server:
        learns(model, envs, server)


class Recorded(PPO):
    """Keeps what it trains on."""

    def train(self) -> None:
        arrays = {name: getattr(self.rollout_buffer, name) for name in example(self, "rollout")}
        self.trained = [*getattr(self, "trained", []), optree.tree_map(np.copy, arrays)]
        super().train()


@pytest.mark.parametrize("env", [cart_pole, Reach])
def test_rollouts_arrive_as_they_are_trained_on(env: Callable[[], gymnasium.Env[Any, Any]]) -> None:
    """The second time the model has been trained, which changes its buffer."""
    model = ppo(Envs(env), Recorded)
    with learner_for(model, "rollout") as server:
        for count in (1, 2):
            with sink_for(model, server, "rollout") as sink:
                watch = Watch(sink)
                model.learn(ROLLOUT, callback=[SinkCallback(sink, on="rollout"), watch])
                assert (watch.rollouts, watch.ends) == ([0], [0])
                got = server.take(count * ROLLOUT)
    expected = []
    for arrays in model.trained:
        expected += [
            optree.tree_map(lambda array: array[step, index], arrays)  # noqa: B023
            for step in range(N_STEPS)
            for index in range(N_ENVS)
        ]
    assert is_same(got, stacked(expected, example(model, "rollout")))
    assert np.ptp(got["advantages"]) > 0


@pytest.mark.parametrize("in_a_dict", [False, True])
def test_normalised_observations_are_no_integers(in_a_dict: bool) -> None:
    """Though the space says so."""
    env = RecordingVecEnv(
        VecNormalize(DummyVecEnv([lambda: CountingEnv(in_a_dict)]), norm_obs_keys=["sum"] if in_a_dict else None)
    )
    model = DQN("MultiInputPolicy" if in_a_dict else "MlpPolicy", env, learning_starts=10, buffer_size=50, device="cpu")
    with Learner(numpy_example(example(model)), BATCH) as server, sink_for(model, server) as sink:
        model.learn(BATCH, callback=SinkCallback(sink))
        got = take(server, BATCH)
    *before, _ = env.given
    assert is_same(got["obs"], stacked(before, example(model)["obs"]))
    normalised = got["obs"]["sum"] if in_a_dict else got["obs"]
    assert len(np.unique(normalised)) > BATCH // 2
    if in_a_dict:
        assert got["obs"]["time"].dtype == np.int64


def test_algorithms_without_rollouts_say_so_before_the_first_step() -> None:
    envs = Envs()
    model = dqn(envs)
    sink = EchoSink("127.0.0.1", 1, example(model))
    with pytest.raises(ValueError, match="on: got 'rollout', but DQN has no rollout_buffer; use 'step'"):
        model.learn(100, callback=SinkCallback(sink, on="rollout"))
    assert envs.made == []


def test_making_an_example_takes_no_random_numbers() -> None:
    one, other = dqn(Envs()), dqn(Envs())
    example(one)
    assert [one.action_space.sample() for _ in range(20)] == [other.action_space.sample() for _ in range(20)]


def test_select_gets_the_transitions_and_the_variables_of_the_algorithm() -> None:
    """Which hold more than the environments said; the model itself, too."""
    envs = Envs()
    model = ppo(envs, Recorded)
    one = {"reward": np.float32(0), "value": np.float32(0)}

    def select(made: Tree, variables: Tree) -> Tree:
        assert variables["self"] is model
        return {"reward": made["reward"], "value": variables["values"].squeeze(1)}

    with Learner(numpy_example(one), BATCH) as server, EchoSink("127.0.0.1", server.port, one) as sink:
        model.learn(ROLLOUT, callback=SinkCallback(sink, select=select))
        got = take(server, ROLLOUT)
    assert np.array_equal(got["value"], model.trained[0]["values"].reshape(-1))
    assert np.array_equal(got["reward"], np.array([made["reward"] for made in envs.made], np.float32))


def test_learning_may_go_on_through_the_same_callback(server: Learner) -> None:
    before = server.received()
    envs = Envs()
    model = ppo(envs)
    with sink_for(model, server) as sink:
        callback = SinkCallback(sink)
        for _ in range(2):
            model.learn(ROLLOUT, callback=callback, reset_num_timesteps=False)
            assert sink.stats().in_flight == 0
        assert is_same(take(server, 2 * ROLLOUT, before), stacked(envs.made, example(model)))


@pytest.mark.parametrize("close", [False, True])
def test_the_sink_stays_open_unless_told_to_close_it(close: bool, server: Learner) -> None:
    before = server.received()
    envs = Envs()
    model = dqn(envs)
    with sink_for(model, server) as sink:
        model.learn(2 * BATCH, callback=SinkCallback(sink, close=close))
        assert is_same(take(server, 2 * BATCH, before), stacked(envs.made, example(model)))
        if close:
            with pytest.raises(ConnectionClosedError, match="closed"):
                sink.send(example(model))
        else:
            model.learn(2 * BATCH, callback=SinkCallback(sink))
            assert is_same(take(server, 4 * BATCH, before), stacked(envs.made, example(model)))


def test_the_step_at_which_another_callback_stops_is_sent_but_no_rollout_that_is_cut_short() -> None:
    envs = Envs()
    model = ppo(envs)
    with (
        learner_for(model) as steps,
        sink_for(model, steps) as sink,
        learner_for(model, "rollout") as rollouts,
        sink_for(model, rollouts, "rollout") as other,
    ):
        stop = StopTrainingOnMaxEpisodes(max_episodes=5)  # in each environment
        watch = Watch(sink)
        model.learn(9 * ROLLOUT, callback=[stop, SinkCallback(sink), SinkCallback(other, on="rollout"), watch])
        assert watch.ends == [0]
        assert len(envs.made) == sink.stats().samples_sent
        assert BATCH < len(envs.made) < ROLLOUT
        assert other.stats().samples_sent == 0
        whole = len(envs.made) // BATCH * BATCH
        assert is_same(take(steps, whole), stacked(envs.made[:whole], example(model)))


# Failures of the training.


def raising(error: BaseException) -> Callable[[], None]:
    def fails() -> None:
        raise error

    return fails


@pytest.mark.parametrize("make", [ppo, dqn])
@pytest.mark.parametrize("error", [BrokenError("the simulator died"), KeyboardInterrupt()])
def test_an_error_of_the_training_comes_out_with_everything_delivered(
    error: BaseException, make: Callable[[Envs], Any], server: Learner
) -> None:
    """In the middle of a rollout."""
    before = server.received()
    envs = Envs(fails_at=N_STEPS + 32, fails=raising(error))
    model = make(envs)
    with pytest.raises(type(error)) as raised, sink_for(model, server) as sink:
        model.learn(9 * ROLLOUT, callback=SinkCallback(sink))
    assert raised.value is error
    assert sink.stats().in_flight == 0
    assert len(envs.made) == sink.stats().samples_sent == ROLLOUT + 64
    assert is_same(take(server, ROLLOUT + 64, before), stacked(envs.made, example(model)))


def test_ctrl_c_comes_out_with_everything_delivered(server: Learner) -> None:
    """A real one; here the callback itself is the context, and closes the sink."""
    before = server.received()
    envs = Envs(fails_at=N_STEPS + 32, fails=lambda: signal.raise_signal(signal.SIGINT))
    model = ppo(envs)
    with sink_for(model, server) as sink:
        with pytest.raises(KeyboardInterrupt), SinkCallback(sink, close=True) as callback:
            model.learn(9 * ROLLOUT, callback=callback)
        assert is_same(take(server, ROLLOUT + 64, before), stacked(envs.made, example(model)))
        with pytest.raises(ConnectionClosedError, match="closed"):
            sink.send(example(model))


# A learner that is slow, or not there.


class Pause(BaseCallback):
    """Pauses the server after so many calls."""

    def __init__(self, server: Learner, after: int) -> None:
        super().__init__()
        self._server, self._after = server, after

    def _on_step(self) -> bool:
        if self.n_calls == self._after:
            self._server.pause()
        return True


@pytest.mark.parametrize("on_stall", ["warn", "raise"])
def test_a_learner_that_stalls_neither_hangs_the_training_nor_harms_its_checkpoints(
    on_stall: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    envs = Envs()
    model = ppo(envs)
    weights = []

    class Saved(CheckpointCallback):
        def _on_step(self) -> bool:
            if self.n_calls % self.save_freq == 0:
                weights.append({name: weight.clone() for name, weight in self.model.policy.state_dict().items()})
            return super()._on_step()

    with learner_for(model, busy=0.0) as server, sink_for(model, server, buffer_bytes=42 * 40) as sink:
        callback = SinkCallback(sink, flush_timeout=SHORT_S, on_stall=on_stall)
        callbacks = [Pause(server, N_STEPS), callback, Saved(N_STEPS, str(tmp_path))]
        began = time.monotonic()
        if on_stall == "raise":
            with pytest.raises(DeliveryTimeoutError, match="un-acked"):
                model.learn(4 * ROLLOUT, callback=callbacks)
            assert len(envs.made) <= 2 * ROLLOUT
        else:
            model.learn(4 * ROLLOUT, callback=callbacks)
            assert len(envs.made) == 4 * ROLLOUT
            assert callback.skipped > 0
            warnings = [record.message for record in caplog.records]
            assert any(
                "no room for a batch, which is not sent" in text and "the training goes on" in text for text in warnings
            )
            assert any(text.startswith("at the end of the epoch") and "samples un-acked" in text for text in warnings)
        assert time.monotonic() - began < LONG_S
        server.resume()
        sink.wait()
        whole = sink.stats().samples_sent // BATCH * BATCH
        got = take(server, whole)
    made = iter(rows(stacked(envs.made, example(model))))
    assert all(row in made for row in rows(got))  # in this order, some left out
    assert whole >= ROLLOUT
    saved = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(saved) == len(weights) == (1 if on_stall == "raise" else 4)
    for path, expected in zip(saved, weights, strict=True):
        found = PPO.load(path, device="cpu").policy.state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def rows(batch: Tree) -> list[bytes]:
    """The bytes of each sample."""
    leaves = optree.tree_leaves(batch)
    return [b"".join(leaf[index].tobytes() for leaf in leaves) for index in range(len(leaves[0]))]


def test_a_wrong_address_fails_before_the_first_step() -> None:
    envs = Envs()
    model = dqn(envs)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        sink = EchoSink("127.0.0.1", nobody.getsockname()[1], example(model), connect_timeout=SHORT_S)
        with pytest.raises(ConnectionRefusedError):
            model.learn(100, callback=SinkCallback(sink))
    assert envs.made == []


def test_bad_arguments_are_refused() -> None:
    sink = EchoSink("127.0.0.1", 1, {"obs": 0})
    with pytest.raises(ValueError, match="on: got 'episode', expected 'step' or 'rollout'"):
        SinkCallback(sink, on="episode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_stall: got 'hang'"):
        SinkCallback(sink, on_stall="hang")
    assert SinkCallback(sink, verbose=2).verbose == 2
