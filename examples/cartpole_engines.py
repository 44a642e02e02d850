"""Where the actors of `cartpole.py` run: processes of `torch.multiprocessing`, or actors of Ray.

An engine takes weights to the actors, and tells how these end. What they see goes through the `EchoSink` that each of
them has. Nobody waits for the other side here, so an actor that is slow, or dead, holds nobody up.
"""

from __future__ import annotations

import abc
import contextlib
import multiprocessing.connection
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch


class Mailbox(Protocol):
    """An actor's side of an engine."""

    def newest(self) -> tuple[int, torch.Tensor]:
        """The version of the newest weights, and the weights as one vector, which nobody changes any more."""

    def stopped(self) -> bool:
        """Whether the actor shall return."""


Act = Callable[..., Any]
"""``act(mailbox, number, *arguments)``: an actor's life; what it returns has to pickle."""


class Engine(abc.ABC):
    """The learner's side of it."""

    @abc.abstractmethod
    def start(self, act: Act, actors: int, weights: torch.Tensor, *arguments: Any) -> None:
        """Have ``act`` run ``actors`` times, with numbers from 0 on; ``weights``, float32 [N], are version 0."""

    @abc.abstractmethod
    def publish(self, version: int, weights: torch.Tensor) -> None:
        """Let the actors have these ``weights``, float32 [N]; ``version`` counts up by one. Does not wait."""

    @abc.abstractmethod
    def ended(self) -> dict[int, Any]:
        """Actors that have ended since the last call, by number: what they returned or raised. Does not wait."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Ask all actors to return."""

    @abc.abstractmethod
    def close(self) -> None:
        """End what still runs; then no process is left."""


class SharedMailbox:
    """Weights in shared memory, without a lock, which an actor that is killed would keep.

    They are written to two places by turns, and the version after them. Who finds the same version before and after
    copying from one place knows that only the other one can have been written to meanwhile. (That asks for a processor
    that has writes seen in their order, as x86 does and ARM does not promise.)
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self._places = torch.stack([weights, weights]).share_memory_()
        self._version = torch.zeros((), dtype=torch.int64).share_memory_()
        self._stopped = torch.zeros((), dtype=torch.bool).share_memory_()

    def newest(self) -> tuple[int, torch.Tensor]:
        while True:
            version = int(self._version)
            weights = self._places[version % 2].clone()
            if version == int(self._version):
                return version, weights

    def stopped(self) -> bool:
        return bool(self._stopped)

    def put(self, version: int, weights: torch.Tensor) -> None:
        self._places[version % 2] = weights
        self._version.fill_(version)

    def stop(self) -> None:
        self._stopped.fill_(True)


class LocalEngine(Engine):
    """Processes on this machine."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._pipes: dict[Connection, int] = {}

    def start(self, act: Act, actors: int, weights: torch.Tensor, *arguments: Any) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._mailbox = SharedMailbox(weights)
        resource_tracker.ensure_running()  # or the first process starts it, which unblocks interrupts
        for number in range(actors):
            pipe, its_end = context.Pipe(duplex=False)
            its = (its_end, act, self._mailbox, number, *arguments)
            process = context.Process(target=live, args=its, daemon=True)
            with interrupts_blocked():
                process.start()
                self._processes.append(process)
                self._pipes[pipe] = number
            its_end.close()

    def publish(self, version: int, weights: torch.Tensor) -> None:
        self._mailbox.put(version, weights)

    def ended(self) -> dict[int, Any]:
        found = {}
        for pipe in multiprocessing.connection.wait(self._pipes, timeout=0):
            number = self._pipes.pop(pipe)
            try:
                found[number] = pipe.recv()
            except (EOFError, OSError):  # the latter in the middle of what it told
                process = self._processes[number]
                process.join()
                found[number] = RuntimeError(f"process {process.pid} ended with exit code {process.exitcode}")
            pipe.close()
        return found

    def stop(self) -> None:
        self._mailbox.stop()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def live(pipe: Connection, act: Act, *arguments: Any) -> None:
    """The process of an actor: tells what ``act`` returned or raised."""
    try:
        outcome = act(*arguments)
    except Exception as error:
        outcome = error
    with contextlib.suppress(OSError):  # the learner's process is gone
        pipe.send(outcome)


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Ctrl-C comes later here, and never in a process that is started meanwhile: the learner is who ends that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RayActor:
    """The process of an actor: one thread runs it, while another is told of new weights."""

    def __init__(self, weights: torch.Tensor) -> None:
        self._newest = 0, weights
        self._stopped = False

    def run(self, act: Act, *arguments: Any) -> Any:
        return act(self, *arguments)

    def newest(self) -> tuple[int, torch.Tensor]:
        return self._newest

    def stopped(self) -> bool:
        return self._stopped

    def put(self, version: int, weights: torch.Tensor) -> None:
        self._newest = version, weights

    def stop(self) -> None:
        self._stopped = True


class RayEngine(Engine):
    """Actors of a Ray that is started for them, on this machine.

    For those on a cluster, have `ray.init` connect to it, and the sinks to the learner's address.
    """

    def __init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray  # only here, for the other engine does without

        self._ray = ray
        self._actors: list[Any] = []
        self._runs: dict[Any, int] = {}
        self._taken: dict[int, Any] = {}

    def start(self, act: Act, actors: int, weights: torch.Tensor, *arguments: Any) -> None:
        quiet = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
        self._ray.init(address="local", num_cpus=actors, **quiet)
        remote = self._ray.remote(num_cpus=1, max_concurrency=2)(RayActor)
        for number in range(actors):
            self._actors.append(remote.remote(weights))
            self._runs[self._actors[number].run.remote(act, number, *arguments)] = number

    def publish(self, version: int, weights: torch.Tensor) -> None:
        """Leaves out actors that have not taken the last ones yet, so that nothing piles up: newer ones come soon."""
        shared = self._ray.put(weights)
        for number, actor in enumerate(self._actors):
            if number not in self._taken or self._is_done(self._taken[number]):
                self._taken[number] = actor.put.remote(version, shared)

    def ended(self) -> dict[int, Any]:
        found = {}
        for run in filter(self._is_done, list(self._runs)):
            number = self._runs.pop(run)
            try:
                found[number] = self._ray.get(run)
            except self._ray.exceptions.RayError as error:
                found[number] = error
        return found

    def _is_done(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])

    def stop(self) -> None:
        for actor in self._actors:
            actor.stop.remote()

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()


ENGINES: dict[str, type[Engine]] = {"local": LocalEngine, "ray": RayEngine}
