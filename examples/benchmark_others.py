"""What else carries batches to another process of the machine, beside the sink, as a table of ``benchmark.py``.

* ``pyzmq``: PUSH to PULL over TCP, with ``pickle`` of the batch as numpy arrays, which is faster than pickling tensors.
  Large leaves are frames of their own.
* ``gloo``: ``torch.distributed.isend`` of all leaves of a batch, then waiting for them. Blocking ``send`` calls one
  after the other are a third as fast for small leaves. The receiver knows what comes, and always receives into the same
  tensors.
* ``queue``: ``torch.multiprocessing.Queue``, which hands over the memory of the tensors. Each batch is a clone, so that
  you may change the batch when ``send`` returns, as with the sink and all the others.
* ``queue, shared``: the same without the clone, for a batch that is already in shared memory. It carries no bytes, only
  their location: later writes to the batch change what is received.
* ``ray``: ``ray.put`` of the batch as numpy arrays, and an actor that is called with the reference.

Each one gets a batch of tensors, as a loop has it, runs with its default configuration, and has at most 64 MiB under
way, as much as the sink's buffer holds. Only one of them exists at a time. The other side takes whole batches, one
after the other, and drops them. It answers ``wait()`` with the number of batches it took and a fingerprint of the
first, and both have to be right. It does not ack every batch, and nothing is checked or sent again. The sink sends to
the null peer, over TCP.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import pickle
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmark_rounds import measure, medians, send_all
from benchmark_senders import HOST, Calls, Case, Child, PeerProcess, cases, cpu_seconds, sink

# The cases of this table: small, medium and large samples.
CASES = ("29B", "28KB", "602KB")
# Most bytes of batches under way, and most batches.
AHEAD_BYTES = 64 * 1024 * 1024
MOST_AHEAD = 1000
# Most batches in a queue, because each leaf holds a file descriptor until it is received.
MOST_QUEUED = 64
# Least bytes of a leaf that is a pyzmq frame of its own, which saves one copy. Smaller leaves take longer that way.
FRAME_BYTES = 64 * 1024
# Seconds that the other side may take to receive what is under way.
RECEIVE_TIMEOUT_S = 60.0
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"

Take = Callable[[], dict[str, Any]]
"""Receives one batch."""
Compared = tuple[Calls, Callable[[], float]]
"""The two calls to measure, and one that returns the CPU seconds of the other side."""


def batches_ahead(case: Case, most: int = MOST_AHEAD) -> int:
    return max(2, min(most, AHEAD_BYTES // (case.size * case.payload)))


def arrays_of(case: Case) -> dict[str, Any]:
    return {name: leaf.numpy() for name, leaf in case.batch.items()}


# The other side.


def fingerprint(batch: dict[str, Any]) -> dict[str, Any]:
    """Return dtype, shape and checksum of each leaf."""
    arrays = {name: np.asarray(leaf) for name, leaf in batch.items()}
    return {name: (str(leaf.dtype), leaf.shape, zlib.crc32(leaf.tobytes())) for name, leaf in arrays.items()}


class BatchCounter:
    """Counts the batches taken, and keeps the fingerprint of the first."""

    def __init__(self) -> None:
        self._count = self._wanted = 0
        self._enough, self._ended = threading.Event(), False
        self._first: dict[str, Any] | None = None

    def add(self, batch: dict[str, Any]) -> None:
        if self._first is None:
            self._first = fingerprint(batch)
        self._count += 1
        # Wake the waiter once and not for each batch, which would slow this down.
        if self._count == self._wanted:
            self._enough.set()

    def end(self) -> None:
        """Note that no more batches will come."""
        self._ended = True
        self._enough.set()

    def wait_for(self, count: int) -> None:
        self._enough.clear()
        # Set this before looking at the count: `add` counts before it looks at this.
        self._wanted = count
        if self._count < count and not self._ended:
            self._enough.wait(RECEIVE_TIMEOUT_S)

    def report(self) -> tuple[int, dict[str, Any] | None]:
        return self._count, self._first


def check_received(name: str, report: Any, sent: int, case: Case) -> None:
    """Raise a RuntimeError unless all batches were taken and the first of them is the one that was sent."""
    taken, first = report
    if taken != sent:
        raise RuntimeError(f"{name}: {taken:,} batches arrived, {sent:,} were sent")
    if first != (expected := fingerprint(case.batch)):
        raise RuntimeError(f"{name}: {first} arrived, {expected} was sent")


def run_receiver(pipe: Any, connect: Callable[..., Take], *arguments: Any) -> None:
    """Take batches in a thread, and answer requests from the pipe.

    The answer to a number is the report, once that many batches are taken or no more will come. The answer to True is
    the CPU time, as in `answer_cpu`.
    """
    taken = BatchCounter()

    def take_all() -> None:
        try:
            take = connect(*arguments)
            while True:
                taken.add(take())
        finally:
            taken.end()

    threading.Thread(target=take_all, daemon=True).start()
    try:
        while asked := pipe.recv():
            if asked is True:
                pipe.send(cpu_seconds())
            else:
                taken.wait_for(asked)
                pipe.send(taken.report())
    except EOFError:
        pass


def take_from_pull(port: int, most: int) -> Take:
    import zmq

    channel = zmq.Context.instance().socket(zmq.PULL)
    channel.rcvhwm = most
    channel.connect(f"tcp://{HOST}:{port}")

    def take() -> dict[str, Any]:
        pickled, *leaves = channel.recv_multipart(copy=False)
        return pickle.loads(pickled.buffer, buffers=[leaf.buffer for leaf in leaves])

    return take


def take_from_gloo(port: int, leaves: dict[str, Any]) -> Take:
    import torch.distributed as dist

    join_gloo(1, dist.TCPStore(HOST, port, 2, is_master=False))
    batch = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in leaves.items()}

    def take() -> dict[str, Any]:
        for work in [dist.irecv(leaf, 0, tag=tag) for tag, leaf in enumerate(batch.values())]:
            work.wait()
        return batch

    return take


def take_from_queue(channel: Any) -> Take:
    return channel.get


# Senders: each is a context manager that also starts and ends the other side.


def counted(name: str, case: Case, receiver: Child, send: Callable[[], None]) -> Compared:
    sent = 0

    def send_one() -> None:
        nonlocal sent
        send()
        sent += 1

    def wait() -> None:
        receiver.pipe.send(sent)
        check_received(name, receiver.pipe.recv(), sent, case)

    return (send_one, wait), receiver.cpu_seconds


def is_small(apart: list[pickle.PickleBuffer], leaf: pickle.PickleBuffer) -> bool:
    """Return whether to pickle the bytes of a leaf; otherwise add it to ``apart``, the frames of their own."""
    small = leaf.raw().nbytes < FRAME_BYTES
    if not small:
        apart.append(leaf)
    return small


@contextmanager
def by_pyzmq(case: Case) -> Iterator[Compared]:
    import zmq

    most = batches_ahead(case)
    with zmq.Context() as context, context.socket(zmq.PUSH) as channel:
        channel.sndhwm, channel.linger = most, 0
        port = channel.bind_to_random_port(f"tcp://{HOST}")

        def send() -> None:
            apart: list[pickle.PickleBuffer] = []
            pickled = pickle.dumps(arrays_of(case), 5, buffer_callback=functools.partial(is_small, apart))
            channel.send_multipart([pickled, *apart])

        with Child(run_receiver, take_from_pull, port, most) as receiver:
            yield counted("pyzmq", case, receiver, send)


def join_gloo(rank: int, store: Any) -> None:
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)


@contextmanager
def by_gloo(case: Case) -> Iterator[Compared]:
    import torch.distributed as dist

    # A process group replaces this hook by one that prefixes every line with the rank.
    hook = sys.excepthook
    leaves = list(case.batch.values())
    store = dist.TCPStore(HOST, 0, 2, is_master=True, wait_for_workers=False)
    theirs = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in case.batch.items()}

    def send() -> None:
        for work in [dist.isend(leaf, 1, tag=tag) for tag, leaf in enumerate(leaves)]:
            work.wait()

    with Child(run_receiver, take_from_gloo, store.port, theirs) as receiver:
        join_gloo(0, store)
        yield counted("gloo", case, receiver, send)
    dist.destroy_process_group()
    sys.excepthook = hook


@contextmanager
def by_queue(case: Case, shared: bool) -> Iterator[Compared]:
    channel: Any = torch.multiprocessing.get_context("forkserver").Queue(batches_ahead(case, MOST_QUEUED))
    channel.cancel_join_thread()
    # Clone once, because the first `put` moves the tensors into shared memory.
    batch = {name: leaf.clone() for name, leaf in case.batch.items()}

    def send() -> None:
        channel.put(batch if shared else {name: leaf.clone() for name, leaf in batch.items()})

    with Child(run_receiver, take_from_queue, channel) as receiver:
        yield counted("queue", case, receiver, send)
    channel.close()


class RayBatchCounter(BatchCounter):
    """The counter as a Ray actor."""

    def cpu_seconds(self) -> float:
        return cpu_seconds()


@contextmanager
def by_ray(case: Case) -> Iterator[Compared]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        counter = ray.remote(RayBatchCounter).remote()
        add = counter.add.options(num_returns=0)
        half = batches_ahead(case) // 2
        sent, pending_reports = 0, []

        def send() -> None:
            nonlocal sent
            add.remote(ray.put(arrays_of(case)))
            sent += 1
            if sent % half == 0:
                pending_reports.append(counter.report.remote())
                if len(pending_reports) > 1:
                    ray.get(pending_reports.pop(0))

        def wait() -> None:
            check_received("ray", ray.get(counter.report.remote(), timeout=RECEIVE_TIMEOUT_S), sent, case)

        yield (send, wait), lambda: ray.get(counter.cpu_seconds.remote())
    finally:
        ray.shutdown()


@contextmanager
def by_sink(case: Case) -> Iterator[Compared]:
    with PeerProcess("null", case) as peer, sink(peer.port, case.batch) as calls:
        yield calls, peer.cpu_seconds


class Other(NamedTuple):
    """The module that it needs, and its senders."""

    needs: str
    senders: dict[str, Callable[[Case], AbstractContextManager[Compared]]]


OTHERS = {
    "pyzmq": Other("zmq", {"pyzmq": by_pyzmq}),
    "gloo": Other("torch", {"gloo": by_gloo}),
    "queue": Other(
        "torch",
        {"queue": lambda case: by_queue(case, shared=False), "queue, shared": lambda case: by_queue(case, shared=True)},
    ),
    "ray": Other("ray", {"ray": by_ray}),
}


def installed(name: str) -> bool:
    if name == "gloo":
        import torch.distributed as dist

        return dist.is_available() and dist.is_gloo_available()
    return importlib.util.find_spec(OTHERS[name].needs) is not None


def other_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table, one per case and sender, with the ratio of the sink's figures to the sender's."""
    compared = {"sink": by_sink}
    for name in filter(installed, options.others):
        compared.update(OTHERS[name].senders)
    for case in (cases()[name] for name in options.cases if name in CASES):
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
        names = list(compared)
        for _ in range(options.rounds):
            for name in names:
                with compared[name](case) as (calls, peer_cpu):
                    # Make sure that the other side is there. Otherwise the warm-up would include its start.
                    send_all(1, *calls)
                    figures[name].append(measure(calls, peer_cpu, case, options.seconds))
            names.reverse()
        results = {name: medians(found) for name, found in figures.items()}
        ours = results["sink"]
        for name, found in results.items():
            yield {
                "case": case.name,
                "B": case.size,
                "sender": name,
                **found,
                "sink_faster": ours["samples_s"] / found["samples_s"],
                "sink_cpu": ours["cpu_us"] / found["cpu_us"],
                "sink_blocked": ours["blocked_us"] / found["blocked_us"],
            }
