"""Sinks in Ray's tasks and actors, on a cluster of two nodes on this machine, with a learner outside of it.

All tests share the cluster, which takes longer to start than they do, and so a process of pytest-xdist (conftest).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_process import Learner
from test_readme import RAY, with_port
from torch.utils.data import DataLoader

from echo_torch import DeliveryTimeoutError, EchoSink, SpecMismatchError

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

EXAMPLE = {"id": np.zeros((), np.int64)}
BATCH = 32
LIFE = 10_000_000
"""More than anybody sends before it is killed."""
FILLER = -1
COUNT = 10 * BATCH
TAIL = 8
"""Samples that a sink sends once more when it is closed; the server may discard them."""
ANSWER_S = 60.0
"""Seconds that a task or an actor may take; the first ones start processes that import torch."""


def ids(first: int, count: int) -> dict[str, Any]:
    return {"id": np.arange(first, first + count)}


def running() -> dict[int, int]:
    """All processes that have not ended, each with its parent."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(stat.parent.name)] = int(parent)
    return found


def descendants() -> set[int]:
    """Those that come of this one."""
    parents, found, new = running(), set[int](), {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in new} - found:
        found |= new
    return found


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray, with two nodes; of which no process is left in the end."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    resource_tracker.ensure_running()  # multiprocessing's, which outlives whoever has it started
    before, handler = descendants(), signal.getsignal(signal.SIGTERM)
    memory = 80 * 1024 * 1024  # the least that there may be
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": memory, "resources": {"here": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=2, object_store_memory=memory, resources={"elsewhere": 1})
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as the program that a user starts is
        yield ray
        mine = descendants() - before
    finally:
        ray.shutdown()
        cluster.shutdown()
        signal.signal(signal.SIGTERM, handler)
    eventually(lambda: not mine & running().keys())


@pytest.fixture
def learner() -> Iterator[Learner]:
    with Learner(EXAMPLE) as learner:
        yield learner


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; for as long as a process may take to start."""
    deadline = time.monotonic() + ANSWER_S
    while not condition():
        assert time.monotonic() < deadline, "condition never held"
        time.sleep(0.01)


class Actor:
    """What an actor does with a sink, which it is given, or makes for a port."""

    def __init__(self, sink: EchoSink | int) -> None:
        self.sink = EchoSink("127.0.0.1", sink, EXAMPLE) if isinstance(sink, int) else sink

    def where(self) -> tuple[str, int]:
        """Its node and process."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def deliver(self, first: int) -> int:
        """Send `COUNT` samples in batches, and see them acked; gives how many of this process are."""
        return deliver(self.sink, first)

    def flood(self, first: int) -> None:
        """Send until the process is killed."""
        for number in itertools.count(first, BATCH):
            self.sink.send(ids(number, BATCH))

    def send(self, batch: Any) -> int:
        """Gives how many samples of this process are in flight."""
        self.sink.send(batch)
        return self.sink.stats().in_flight

    def wait(self, timeout: float) -> None:
        self.sink.wait(timeout)

    def load(self, count: int) -> int:
        """Have samples sent by two workers of a loader; gives how many are acked."""
        loader = DataLoader(
            list(ids(0, count)["id"]),
            BATCH,
            num_workers=2,
            collate_fn=self.sink.collate(as_batch, forward=False),
            multiprocessing_context="fork",
        )
        assert sum(sent.samples for sent in loader) == count
        self.sink.wait(ANSWER_S)
        return self.sink.stats().samples_acked

    def close(self) -> None:
        self.sink.close()


def as_batch(numbers: list[Any]) -> dict[str, Any]:
    return {"id": np.stack(numbers)}


def deliver(sink: EchoSink, first: int) -> int:
    for number in range(first, first + COUNT, BATCH):
        sink.send(ids(number, BATCH))
    sink.wait(ANSWER_S)
    return sink.stats().samples_acked


def deliver_and_close(sink: EchoSink, first: int) -> int:
    acked = deliver(sink, first)
    sink.close()
    return acked


@pytest.fixture
def actor(ray: Any) -> Iterator[Callable[..., Any]]:
    """Makes actors on one of the nodes, which are killed in the end."""
    made = []

    def make(sink: EchoSink | int, node: str = "here", **options: Any) -> Any:
        made.append(ray.remote(num_cpus=0, resources={node: 0.01}, **options)(Actor).remote(sink))
        return made[-1]

    yield make
    for one in made:
        ray.kill(one)


def test_sinks_are_handed_to_tasks_and_actors_of_any_node(ray: Any, learner: Learner, actor: Any) -> None:
    """Or made there; and each process has a connection of its own."""
    sink = EchoSink("127.0.0.1", learner.port, EXAMPLE)
    given, makes = actor(sink), actor(learner.port, "elsewhere")
    task = ray.remote(num_cpus=0)(deliver_and_close)
    answers = [
        given.deliver.remote(0),
        makes.deliver.remote(COUNT),
        task.options(resources={"here": 0.01}).remote(sink, 2 * COUNT),
        task.options(resources={"elsewhere": 0.01}).remote(ray.put(sink), 3 * COUNT),
    ]
    assert ray.get(answers, timeout=ANSWER_S) == [COUNT] * 4
    ray.get([given.close.remote(), makes.close.remote()], timeout=ANSWER_S)
    nodes, pids = zip(*ray.get([given.where.remote(), makes.where.remote()], timeout=ANSWER_S), strict=True)
    assert len(set(nodes)) == len({*pids, os.getpid()} - {os.getpid()}) == 2
    arrived = received_with(learner, range(4 * COUNT))
    for first in range(0, 4 * COUNT, COUNT):
        mine = arrived[arrived // COUNT == first // COUNT].tolist()
        expected = [*range(first, first + COUNT), *range(first + COUNT - TAIL, first + COUNT)]
        assert mine == expected[: len(mine)]
    assert sink.stats().samples_sent == 0


def test_an_actor_that_is_killed_connects_again_when_it_is_back(ray: Any, learner: Learner, actor: Any) -> None:
    """By the system, and by Ray; nobody hangs, and of what was acked nothing is lost but what a server may discard."""
    mine = actor(EchoSink("127.0.0.1", learner.port, EXAMPLE), max_restarts=2)
    kills = [lambda pid: os.kill(pid, signal.SIGKILL), lambda _: ray.kill(mine, no_restart=False)]
    for life, kill in enumerate(kills):
        flood_until(kill, ray, mine, learner, life * LIFE)
    pid_of(ray, mine)
    assert ray.get(mine.deliver.remote(2 * LIFE), timeout=ANSWER_S) == COUNT
    ray.get(mine.close.remote(), timeout=ANSWER_S)
    arrived = received_with(learner, range(2 * LIFE, 2 * LIFE + COUNT))
    for first in (0, LIFE):
        of_this = arrived[(arrived >= first) & (arrived < first + LIFE)].tolist()
        assert of_this == list(range(first, first + len(of_this)))
        assert len(of_this) > COUNT
    assert arrived[arrived >= 2 * LIFE][:COUNT].tolist() == list(range(2 * LIFE, 2 * LIFE + COUNT))


def flood_until(kill: Callable[[int], None], ray: Any, actor: Any, learner: Learner, first: int) -> None:
    """Have an actor deliver some samples, and killed while it sends many more."""
    pid = pid_of(ray, actor)
    assert ray.get(actor.deliver.remote(first), timeout=ANSWER_S) == COUNT
    received = learner.received()
    flood = actor.flood.remote(first + COUNT)
    eventually(lambda: learner.received() > received + 10 * COUNT)
    kill(pid)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(flood, timeout=ANSWER_S)


def pid_of(ray: Any, actor: Any) -> int:
    """An actor's process; of one that begins again, once it does."""
    pids: list[int] = []

    def answers() -> bool:
        with contextlib.suppress(ray.exceptions.ActorUnavailableError):
            pids.append(ray.get(actor.where.remote(), timeout=ANSWER_S)[1])
        return bool(pids)

    eventually(answers)
    return pids[0]


def received_with(learner: Learner, expected: range) -> Any:
    """What it received by the time that all the expected samples are there; its last batch is filled up for that."""
    found: list[Any] = []

    def are_there() -> bool:
        learner.fill({"id": np.int64(FILLER)})
        found.append(learner.take(BATCH)["id"])
        return bool(np.isin(expected, found[-1]).all())

    eventually(are_there)
    return found[-1][found[-1] != FILLER]


def test_wait_covers_no_actors_and_they_raise_what_is_raised_there(ray: Any, learner: Learner, actor: Any) -> None:
    """And an actor that nobody refers to any more delivers what it has."""
    with EchoSink("127.0.0.1", learner.port, EXAMPLE) as sink:
        assert deliver(sink, 0) == COUNT
        learner.pause()
        mine = ray.remote(num_cpus=0)(Actor).remote(sink)
        assert ray.get(mine.send.remote(ids(COUNT, COUNT)), timeout=ANSWER_S) > 0
        sink.wait(0)
        assert (sink.stats().samples_sent, sink.stats().in_flight) == (COUNT, 0)
        with pytest.raises(DeliveryTimeoutError, match="un-acked") as late:
            ray.get(mine.wait.remote(0.01), timeout=ANSWER_S)
        assert isinstance(late.value, ray.exceptions.RayTaskError)
        assert type(late.value.cause) is DeliveryTimeoutError
        assert late.value.cause.unacked == late.value.unacked > 0
        with pytest.raises(SpecMismatchError, match=r"batch\['id'\]: got torch.float32") as wrong:
            ray.get(mine.send.remote({"id": np.zeros(3, np.float32)}), timeout=ANSWER_S)
        assert type(wrong.value.cause) is SpecMismatchError
        del mine
        learner.resume()
    assert set(received_with(learner, range(2 * COUNT))) == set(range(2 * COUNT))


def test_an_actor_waits_for_the_workers_of_its_loader(
    ray: Any, learner: Learner, actor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the folder is not there in which the sink that it was given would have them tell."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "of the driver"))
    Path(tempfile.tempdir).mkdir()
    sink = EchoSink("127.0.0.1", learner.port, EXAMPLE)
    Path(tempfile.tempdir).rmdir()
    mine = actor(sink, "elsewhere")
    assert ray.get(mine.load.remote(COUNT), timeout=ANSWER_S) == COUNT
    ray.get(mine.close.remote(), timeout=ANSWER_S)
    assert set(received_with(learner, range(COUNT))) == set(range(COUNT))


def test_the_readmes_actors_deliver_to_the_learner(ray: Any) -> None:
    with Learner({"obs": np.zeros(4, np.float32), "action": np.zeros((), np.int64)}) as learner:
        program: dict[str, Any] = {"__name__": "__main__"}
        exec(with_port(RAY, learner.port), program)
        assert set(learner.take(2 * 100 * 16)["action"]) == {0, 1}
        for actor in program["actors"]:
            ray.kill(actor)
