"""Where the actors of `cartpole.py` run: in processes of `torch.multiprocessing`, or as actors of Ray.

An engine carries weights to the actors and reports how they end. What the actors see goes through their `EchoSink`s.
Neither side waits for the other here, so a slow or dead actor delays nobody.
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
        """Return the newest weights as one vector, which nobody changes any more, and their version."""

    def stopped(self) -> bool:
        """Return whether the actor should return."""


Act = Callable[..., Any]
"""``act(mailbox, number, *arguments)`` runs a whole actor. Its return value has to pickle."""


class Engine(abc.ABC):
    """The learner's side of an engine."""

    @abc.abstractmethod
    def start(self, act: Act, actors: int, weights: torch.Tensor, *arguments: Any) -> None:
        """Run ``act`` in ``actors`` actors, numbered from 0. ``weights``, float32 [N], are version 0."""

    @abc.abstractmethod
    def publish(self, version: int, weights: torch.Tensor) -> None:
        """Offer ``weights``, float32 [N], to the actors. ``version`` counts up by one. Does not block."""

    @abc.abstractmethod
    def ended(self) -> dict[int, Any]:
        """Return what actors that ended since the last call returned or raised, by number. Does not block."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Ask all actors to return."""

    @abc.abstractmethod
    def close(self) -> None:
        """End what still runs. Afterwards no process is left."""


class SharedMailbox:
    """Weights in shared memory. There is no lock, because an actor that is killed would keep it.

    Writers alternate between two places and write the version after the weights. A reader copies one place. If the
    version is the same before and after, only the other place can have been written meanwhile. (This needs a processor
    that shows writes in order. x86 does; ARM does not promise it.)
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
    """Actors in processes on this machine."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._pipes: dict[Connection, int] = {}

    def start(self, act: Act, actors: int, weights: torch.Tensor, *arguments: Any) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._mailbox = SharedMailbox(weights)
        # Start this now. Otherwise the first process starts it, and that unblocks interrupts.
        resource_tracker.ensure_running()
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
            except (EOFError, OSError):
                # An OSError means that the process died while it sent its outcome.
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
    """Run one actor in its process, and send what ``act`` returned or raised."""
    try:
        outcome = act(*arguments)
    except Exception as error:
        outcome = error
    # The learner's process may be gone.
    with contextlib.suppress(OSError):
        pipe.send(outcome)


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Delay Ctrl-C in this block, and block it for good in a process that is started here.

    The learner is the one who ends that process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RayActor:
    """An actor in its Ray process: one thread runs it, and another receives new weights."""

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
    """Actors of a Ray that is started for them on this machine.

    For actors on a cluster, let `ray.init` connect to it, and point the sinks to the learner's address.
    """

    def __init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Import it here, because the other engine does not need it.
        import ray

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
        """Skip actors that have not taken the last weights yet, so that nothing piles up. Newer weights come soon."""
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
