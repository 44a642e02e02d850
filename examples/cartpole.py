"""Actors play CartPole and stream what they see to a learner, which solves the game: in processes, or on Ray.

What it shows:

* What an actor needs: an `EchoSink`, and a `sink.send(unrolls)` for every T steps of its environments.
* What the learner needs: an `echo.Server`, whose batches it trains on as they come, and a way to publish weights.
* How fresh the data is: how many updates the learner has made since the policy that acted in a batch.
* What it costs: the share of the actors' time spent in the sink, and how much of that was waiting for the learner.
* That nothing is lost: the example looks for every unroll that was sent in what the learner received.

The game is solved at a mean return of 475 over the last 100 episodes, as Gymnasium defines it. To run it (less than a
minute on two cores):

    pip install '.[examples,ray]'
    python examples/cartpole.py --engine local
    python examples/cartpole.py --engine ray

The exit code is 0 only if everything that was sent arrived, and the game is solved or `--updates` updates were made.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import importlib.util
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import echo
import gymnasium
import numpy as np
import torch
from cartpole_agent import EXAMPLE, UNROLL, Agent, Tensors, network
from cartpole_engines import ENGINES, Engine, Mailbox
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.nn.utils import vector_to_parameters
from tqdm import tqdm

from echo_torch import EchoSink, numpy_example
from echo_torch.metrics.stats import SinkStats

SOLVED, EPISODES = 475.0, 100  # the mean return that solves the game, and over how many episodes
POLL_S = 0.2  # seconds between checks of the actors, and most seconds to wait for a batch
STOP_S = 30.0  # seconds for the actors to end and for the rest of their unrolls to arrive

# Data that is buffered gets old, so the buffers are small. The server prepares as few batches in advance as it can (2),
# and a sink holds one `send` of its actor in place of 64 MiB. If the learner is slow, `send` then blocks the actors,
# and the learner gets data that is a few updates old, and not thousands.
BATCH = 32  # unrolls; a server may hang with fewer
BATCHES = 2
RESENT = 8  # acknowledged samples that a sink keeps to send again; this is its default

Arrays = dict[str, np.ndarray[Any, Any]]


class Report(NamedTuple):
    """What an actor returns when it was asked to stop."""

    seconds: float
    stats: SinkStats


class Environments:
    """Vectorized CartPole. After the end of an episode, one step ignores the action and starts the next episode."""

    def __init__(self, count: int, seed: int) -> None:
        self._env = gymnasium.make_vec("CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point")
        assert self._env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        self._returns = np.zeros(count, np.float32)
        self._ended = np.zeros(count, bool)
        self.observation, _ = self._env.reset(seed=seed)

    def step(self, action: np.ndarray[Any, Any]) -> Arrays:
        """Apply the actions, int64 [environments]. Return the outcome under the names that it has in a sample."""
        valid = ~self._ended
        self.observation, reward, terminated, truncated, _ = self._env.step(action)
        self._returns += reward
        self._ended = terminated | truncated
        episode = np.where(self._ended, self._returns, 0)
        self._returns[self._ended] = 0
        return {"reward": reward, "terminated": terminated, "valid": valid, "episode": episode}


@torch.no_grad()
def act(mailbox: Mailbox, number: int, port: int, environments: int, seed: int) -> Report:
    """Play with the newest weights and send the unrolls, until asked to stop."""
    torch.set_num_threads(1)
    torch.manual_seed(1000 * seed + number)
    policy = network(2)
    game = Environments(environments, 1000 * seed + number)
    unrolls = {name: torch.stack([leaf] * environments) for name, leaf in EXAMPLE.items()}
    unrolls["actor"].fill_(number)
    unrolls["number"].copy_(torch.arange(environments))
    room = (environments + RESENT) * sum(leaf.nbytes for leaf in EXAMPLE.values())
    # No reconnecting, because a learner that is gone does not come back. If it has finished, the actor ends, too; if it
    # crashed, `send` raises.
    options = {"reconnect": 0, "on_learner_gone": "stop"}
    with EchoSink("127.0.0.1", port, EXAMPLE, buffer_bytes=room, resend_acked=RESENT, **options) as sink:
        began = time.perf_counter()
        while not mailbox.stopped() and not sink.learner_gone:
            version, weights = mailbox.newest()
            vector_to_parameters(weights, policy.parameters())
            unrolls["version"].fill_(version)
            play(policy, game, unrolls)
            # `unrolls` may change as soon as `send` returns.
            sink.send(unrolls)
            unrolls["number"] += environments
        seconds = time.perf_counter() - began
        # Block until the server has acknowledged everything.
        sink.wait()
        return Report(seconds, sink.stats())


def play(policy: nn.Module, game: Environments, unrolls: Tensors) -> None:
    """Fill ``unrolls`` with the next T steps of all environments."""
    unrolls["observation"][:, 0] = torch.from_numpy(game.observation)
    for step in range(UNROLL):
        log_probs = policy(unrolls["observation"][:, step]).log_softmax(-1)
        action = torch.multinomial(log_probs.exp(), 1)
        for name, column in game.step(action[:, 0].numpy()).items():
            unrolls[name][:, step] = torch.from_numpy(column)
        unrolls["action"][:, step] = action[:, 0]
        unrolls["log_prob"][:, step] = log_probs.gather(1, action)[:, 0]
        unrolls["observation"][:, step + 1] = torch.from_numpy(game.observation)


class Batches:
    """The batches of a server as tensors. A thread fetches them, so that the learner never waits in the server."""

    def __init__(self, server: echo.Server) -> None:
        self._server = server
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._next = self._thread.submit(self._fetch)

    def get(self) -> Tensors | None:
        """Return the next batch, or None if it takes longer than ``POLL_S``."""
        try:
            batch = self._next.result(POLL_S)
        except concurrent.futures.TimeoutError:
            return None
        self._next = self._thread.submit(self._fetch)
        return batch

    def _fetch(self) -> Tensors | None:
        sample = self._server.sample()
        return sample and {name: torch.tensor(leaf) for name, leaf in sample.batch.items()}  # copies

    def close(self) -> None:
        self._server.close()
        self._thread.shutdown()


def mean(numbers: Collection[float]) -> float:
    return sum(numbers) / max(1, len(numbers))


@dataclass
class Run:
    """What was learned, what was received, and how the actors ended."""

    engine: str
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    updates: int = 0
    steps: int = 0
    returns: collections.deque[float] = field(default_factory=lambda: collections.deque(maxlen=EPISODES))
    lags: list[float] = field(default_factory=list)  # mean of each batch, in updates
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # seconds, steps, mean return
    received: collections.Counter[int] = field(default_factory=collections.Counter)  # unrolls by actor
    ended: dict[int, Report | Exception] = field(default_factory=dict)  # a report or an error by actor

    @property
    def mean_return(self) -> float:
        return mean(self.returns)

    @property
    def solved(self) -> bool:
        return len(self.returns) == EPISODES and self.mean_return >= SOLVED

    @property
    def reports(self) -> dict[int, Report]:
        return {actor: how for actor, how in self.ended.items() if isinstance(how, Report)}

    @property
    def missing(self) -> int:
        """How many unrolls were sent but not received, counting only actors that reported."""
        return sum(report.stats.samples_sent - self.received[actor] for actor, report in self.reports.items())

    def note_received(self, batch: Tensors) -> None:
        """Count each actor's unrolls up to the first missing one.

        They arrive in order. The last ones of each sink arrive twice, which this does not count.
        """
        for actor, number in zip(batch["actor"].tolist(), batch["number"].tolist(), strict=True):
            self.received[actor] += number == self.received[actor]

    def note_update(self, batch: Tensors) -> None:
        self.lags.append(self.updates - batch["version"].double().mean().item())
        self.updates += 1
        self.steps += int(batch["valid"].sum())
        self.returns.extend(batch["episode"][batch["episode"] > 0].tolist())
        self.seconds = time.perf_counter() - self.began
        self.curve.append((self.seconds, self.steps, self.mean_return))

    def note_ended(self, engine: Engine) -> None:
        for actor, how in engine.ended().items():
            self.ended[actor] = how
            if isinstance(how, Exception):
                tqdm.write(f"actor {actor} is gone: {how!r}", file=sys.stderr)


def train(agent: Agent, engine: Engine, batches: Batches, run: Run, options: argparse.Namespace) -> None:
    """Train until the game is solved or ``--updates`` is reached, but no longer than ``--minutes``."""
    looked = 0.0
    with tqdm(desc=run.engine, unit=" steps", unit_scale=True, disable=None) as bar:
        while run.updates < options.updates if options.updates else not run.solved:
            if (batch := batches.get()) is not None:
                agent.update(batch)
                run.note_received(batch)
                run.note_update(batch)
                engine.publish(run.updates, agent.weights())
            now = time.perf_counter() - run.began
            if now > 60 * options.minutes:
                return
            if now > looked + POLL_S:
                looked = now
                run.note_ended(engine)
                if len(run.ended) == options.actors:
                    sys.exit("FAILED: no actor is left")
                rate, lag = run.updates / now, mean(run.lags[-100:])
                bar.update(run.steps - bar.n)
                bar.set_postfix_str(f"return {run.mean_return:.0f}, {rate:.0f} updates/s, lag {lag:.1f} updates")


def finish(server: echo.Server, engine: Engine, batches: Batches, run: Run, actors: int) -> None:
    """Ask the actors to end, and take what they still send: each waits until its unrolls are acknowledged."""
    engine.stop()
    # An unroll of no actor, to fill the server's last batch.
    filler = {name: leaf.numpy() for name, leaf in EXAMPLE.items()} | {"actor": np.array(-1)}
    deadline = time.monotonic() + STOP_S
    while (len(run.ended) < actors or run.missing) and time.monotonic() < deadline:
        run.note_ended(engine)
        if (batch := batches.get()) is not None:
            run.note_received(batch)
        elif len(run.ended) == actors:
            # The server keeps an incomplete last batch to itself, so fill it up.
            for _ in range(BATCH - 1):
                server.submit(filler)


def learn(engine_name: str, options: argparse.Namespace) -> Run:
    """Run the whole training. No process is left when this returns or raises."""
    torch.manual_seed(options.seed)
    agent = Agent()
    # One thread each is enough for a few actors, and leaves the cores to them.
    transport = echo.TcpTransport(port=0, num_threads=1)
    server = echo.Server(numpy_example(EXAMPLE), BATCH, transport, num_buffers=BATCHES, num_drainers=1)
    server.start()
    print(f"{engine_name:<10} {options.actors} actors; the learner listens on port {server.port}", flush=True)
    run = Run(engine_name)
    with contextlib.closing(Batches(server)) as batches, contextlib.closing(ENGINES[engine_name]()) as engine:
        engine.start(act, options.actors, agent.weights(), server.port, options.environments, options.seed)
        train(agent, engine, batches, run, options)
        finish(server, engine, batches, run, options.actors)
    return run


def tell(run: Run) -> None:
    """Print how a run went."""
    stats = [report.stats for report in run.reports.values()]
    seconds = sum(report.seconds for report in run.reports.values()) or 1.0
    waiting = sum(each.blocked_by_learner_seconds for each in stats)
    sink_s = sum(each.blocked_seconds + each.check_seconds + each.pack_seconds for each in stats)
    sent, acked = sum(each.samples_sent for each in stats), sum(each.samples_acked for each in stats)
    print(f"learned    {run.updates:,} updates from {run.steps:,} steps in {run.seconds:.1f} s")
    print(f"return     {run.mean_return:.1f} on average of the last {len(run.returns)} episodes")
    print(f"lag        {mean(run.lags):.1f} updates on average, {max(run.lags, default=0):.1f} at most")
    received = sent - run.missing
    print(f"sent       {sent:,} unrolls of {len(stats)} actors, {acked:,} acknowledged, {received:,} received")
    print(f"sink cost  {sink_s / seconds:.1%} of the actors' time; {waiting / seconds:.1%} was waiting for the learner")


def plot(runs: list[Run], path: str) -> None:
    """Draw the learning curves, against time and against steps."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for panel, column, label in zip(panels, (0, 1), ("seconds since the start", "steps"), strict=True):
        for run in runs:
            points = np.array(run.curve)
            panel.plot(points[:, column], points[:, 2], label=run.engine)
        panel.axhline(SOLVED, color="#8d99ae", linewidth=0.8, linestyle="--")
        panel.set_xlim(left=0)
        panel.set_xlabel(label)
    panels[0].set_ylabel(f"mean return of {EPISODES} episodes")
    panels[0].legend()
    figure.savefig(path, dpi=100)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Solve CartPole with actors that stream unrolls to a learner.")
    parser.add_argument("--engine", default="local", help="local, ray, or both, one after the other: local,ray")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--environments", type=int, default=16, help="of each actor")
    parser.add_argument("--minutes", type=float, default=5.0, help="to solve it in, or fail")
    parser.add_argument("--updates", type=int, default=0, help="end after so many, solved or not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE.png", help="draw the learning curves; needs matplotlib")
    options = parser.parse_args()
    options.engine = options.engine.split(",")
    for name in options.engine:
        if name not in ENGINES:
            parser.error(f"--engine: got {name}, expected of {', '.join(ENGINES)}")
    for option, needed, module, extra in (
        ("--engine", "ray" in options.engine, "ray", "ray"),
        ("--plot", options.plot, "matplotlib", "bench"),
    ):
        if needed and importlib.util.find_spec(module) is None:
            parser.error(f"{option}: {module} is not installed: pip install 'echo-torch[{extra}]'")
    return options


def main() -> None:
    options = parse_arguments()
    # One thread is as fast for so small a network, and leaves the other cores to the actors.
    torch.set_num_threads(1)
    runs = []
    for name in options.engine:
        runs.append(learn(name, options))
        tell(runs[-1])
    if options.plot:
        plot(runs, options.plot)
    for run in runs:
        if still := options.actors - len(run.ended):
            sys.exit(f"FAILED: {run.engine}: {still} actors did not end in {STOP_S:g} s")
        if run.missing:
            sys.exit(f"FAILED: {run.engine}: {run.missing:,} unrolls were sent and not received")
        if not options.updates and not run.solved:
            sys.exit(f"FAILED: {run.engine}: not solved in {options.minutes:g} minutes")


if __name__ == "__main__":
    main()
