"""Many sinks send to one server at once, as actors do: a table of ``benchmark.py``, and a program of its own.

    python examples/benchmark_producers.py [--sinks 1,10,100,500] [--seconds 3] [--buffer-kib 256]

A farm of actors is some processes, about one per core, each with many environments. So up to ``PROCESSES`` processes
share the sinks. Every sink has its own connection to one ``echo.Server``, which runs in its own process and is drained
as fast as possible. They send batches of 32 samples of 1 KB as fast as they can. A process does so in two ways: *in
turns*, from one thread, as a process would that steps its environments together; or with *a thread each*, where a sink
waits for the server and not for the other sinks. (More than 50 threads wait for the GIL.)

All sinks connect at the same moment, and close at the same moment. In a process with more than 50, the others follow
one after another. "least / most" compares what the server had acknowledged of each sink when the time was up. Memory,
threads and descriptors are per sink: what the processes have gained since before they had sinks, once while the sinks
are idle and once after they have sent. Those of the server are per connection.

Each sample carries the number of its sink and its own number. This shows whether everything acknowledged arrived, and
in order. Samples that came twice are the ones that a sink sends again when it closes.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import echo
import numpy as np
import torch
from benchmark_senders import HOST, Child, cpu_seconds
from benchmark_table import Table, filled

from echo_torch import EchoSink, numpy_example

SINKS = (1, 10, 100, 500)
PROCESSES = 10
BATCH = 32
SERVER_BATCH = 256
FLOATS = 250
# A buffer that holds 250 samples. A server that many sinks share takes little of each.
BUFFER_KIB = 256
EXAMPLE = {
    "index": torch.tensor(0),
    "obs": torch.zeros(FLOATS),
    "sink": torch.tensor(0),
}
# The sink number of samples that only fill the server's last batch.
FILLER = -1
# Seconds between an order and the moment it is for, long enough for all processes to receive it.
NOTICE_S = 0.2
# Seconds for which the sinks are idle, to see what that costs. Their heartbeat is one second.
IDLE_S = 2.0
# How many sinks of a process connect at the same time. With more threads, each waits for all the others.
MOST_AT_ONCE = 50
# Seconds that connecting may take, and seconds after the last close in which everything must have arrived.
PATIENCE_S = 60.0
KIB = 1024


class Footprint(NamedTuple):
    """What a process, or several together, use."""

    resident: int
    threads: int
    descriptors: int
    cpu_seconds: float

    @classmethod
    def now(cls) -> Footprint:
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
        tasks, descriptors = os.listdir("/proc/self/task"), os.listdir("/proc/self/fd")
        return cls(pages * resource.getpagesize(), len(tasks), len(descriptors), cpu_seconds())

    def minus(self, other: Footprint) -> Footprint:
        return Footprint(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))

    @classmethod
    def sum(cls, several: Sequence[Footprint]) -> Footprint:
        return cls(*map(sum, zip(*several, strict=True)))


# The learner.


class Learner:
    """A server that is drained as fast as possible, and what arrived there."""

    def __init__(self) -> None:
        transport = echo.TcpTransport(port=0)
        self._server = echo.Server(numpy_example(EXAMPLE), batch_size=SERVER_BATCH, transport=transport)
        self._server.start()
        self.port = self._server.port
        self._arrived: list[tuple[Any, Any]] = []
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while (sample := self._server.sample()) is not None:
            self._arrived.append((sample.batch["sink"].copy(), sample.batch["index"].copy()))

    def footprint(self) -> Footprint:
        """Return what the process uses."""
        return Footprint.now()

    def check(self, acked: dict[int, int]) -> dict[str, int]:
        """Count samples that are missing, came twice, or came out of order.

        ``acked`` holds, per sink, how many samples from 0 on must be there. Waits up to ``PATIENCE_S`` for missing
        ones.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self._fill()
            found = judge(*self._so_far(), acked)
            if not found["lost"] or time.monotonic() > deadline:
                return found

    def _fill(self) -> None:
        """Fill up the server's last batch, so that the samples in it come out."""
        count = len(self._arrived)
        while len(self._arrived) == count:
            self._server.submit({**numpy_example(EXAMPLE), "sink": np.array(FILLER)})

    def _so_far(self) -> tuple[Any, Any]:
        sinks, indices = zip(*self._arrived, strict=True)
        return np.concatenate(sinks), np.concatenate(indices)


def judge(sinks: Any, indices: Any, acked: dict[int, int]) -> dict[str, int]:
    """Return what became of the ``acked`` samples of each sink.

    ``sinks`` and ``indices`` are the two numbers of all samples that arrived, in order of arrival.
    """
    found = {"lost": 0, "twice": 0, "disordered": 0}
    order = np.argsort(sinks, kind="stable")
    sinks, indices = sinks[order], indices[order]
    for sink, count in acked.items():
        mine = indices[np.searchsorted(sinks, sink) : np.searchsorted(sinks, sink, side="right")]
        numbers, first = np.unique(mine, return_index=True)
        found["lost"] += count - int((numbers < count).sum())
        found["twice"] += len(mine) - len(numbers)
        found["disordered"] += int((np.diff(first) < 0).sum())
    return found


def run_learner(pipe: Any) -> None:
    learner = Learner()
    pipe.send(learner.port)
    answer(pipe, learner)


# The actors.


class Actor:
    """One sink, and the samples that it sends."""

    def __init__(self, port: int, number: int, buffer_bytes: int | None, obs: torch.Tensor) -> None:
        self.number = number
        self.sink = EchoSink(HOST, port, EXAMPLE, buffer_bytes=buffer_bytes, connect_timeout=PATIENCE_S)
        self._next = 0
        self._batch = {
            "index": torch.arange(BATCH),
            "obs": obs,
            "sink": torch.full((BATCH,), number),
        }

    def send(self) -> None:
        torch.arange(self._next, self._next + BATCH, out=self._batch["index"])
        self.sink.send(self._batch)
        self._next += BATCH

    def send_until(self, end: float) -> None:
        while time.monotonic() < end:
            self.send()


class Actors:
    """The actors of one process. All of them send the same observations."""

    def __init__(self, port: int, numbers: Sequence[int], buffer_bytes: int | None) -> None:
        obs = torch.rand(BATCH, FLOATS)
        self.before = Footprint.now()
        self._actors = [Actor(port, number, buffer_bytes, obs) for number in numbers]

    def footprint(self) -> Footprint:
        """Return what the actors use."""
        return Footprint.now().minus(self.before)

    def connect(self, at: float) -> dict[str, Any]:
        return at_once(at, [actor.sink.connect for actor in self._actors], MOST_AT_ONCE)

    def send(self, at: float, seconds: float, thread_each: bool) -> dict[str, Any]:
        """Send for some seconds, then wait for all acks.

        Returns how many samples of each sink were acked when the time was up and in the end, and when the end was.
        """
        end = at + seconds
        if thread_each:
            outcome = at_once(at, [lambda actor=actor: actor.send_until(end) for actor in self._actors])
        else:
            outcome = at_once(at, [lambda: self._send_in_turns(end)])
        in_time = {actor.number: actor.sink.stats().samples_acked for actor in self._actors}
        for actor in self._actors:
            actor.sink.wait()
        acked = {actor.number: actor.sink.stats().samples_acked for actor in self._actors}
        return {**outcome, "in_time": in_time, "acked": acked, "ended": time.monotonic()}

    def _send_in_turns(self, end: float) -> None:
        while time.monotonic() < end:
            for actor in self._actors:
                actor.send()

    def close(self, at: float) -> dict[str, Any]:
        return at_once(at, [actor.sink.close for actor in self._actors], MOST_AT_ONCE)


def at_once(at: float, calls: Sequence[Callable[[], Any]], threads: int = sys.maxsize) -> dict[str, Any]:
    """Make all calls at a moment of the monotonic clock, in up to ``threads`` threads.

    Returns when the last call was done, and what was raised.
    """
    errors: list[str] = []

    def make(share: Sequence[Callable[[], Any]]) -> None:
        time.sleep(max(0.0, at - time.monotonic()))
        for call in share:
            try:
                call()
            except Exception as error:
                errors.append(repr(error))

    shares = [calls[number::threads] for number in range(min(threads, len(calls)))]
    running = [threading.Thread(target=make, args=(share,)) for share in shares]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return {"ended": time.monotonic(), "errors": errors}


def run_actors(pipe: Any, port: int, numbers: Sequence[int], buffer_bytes: int | None) -> None:
    answer(pipe, Actors(port, numbers, buffer_bytes))


def answer(pipe: Any, who: Any) -> None:
    """Call the methods that are asked for, until the pipe is closed."""
    try:
        while True:
            method, *arguments = pipe.recv()
            pipe.send(getattr(who, method)(*arguments))
    except EOFError:
        pass


# The table.


def ask(children: Sequence[Child], *request: Any) -> list[Any]:
    """Send a request to all children at once, and return their answers."""
    for child in children:
        child.pipe.send(request)
    return [child.pipe.recv() for child in children]


def order(children: Sequence[Child], method: str, *arguments: Any) -> tuple[float, list[Any]]:
    """Have all children begin a call at the same moment.

    Returns the seconds that the last one took, and the answers.
    """
    at = time.monotonic() + NOTICE_S
    answers = ask(children, method, at, *arguments)
    for error in [error for answer in answers for error in answer["errors"]][:1]:
        print(f"{method}: {error}", file=sys.stderr)
    return max(answer["ended"] for answer in answers) - at, answers


def taken(children: Sequence[Child]) -> Footprint:
    return Footprint.sum(ask(children, "footprint"))


def measure(sinks: int, thread_each: bool, seconds: float, buffer_bytes: int | None) -> dict[str, Any]:
    """Measure one row of the table."""
    with ExitStack() as stack:
        learner = stack.enter_context(Child(run_learner))
        port = learner.pipe.recv()
        shares = [range(sinks)[number::PROCESSES] for number in range(min(sinks, PROCESSES))]
        farm = [stack.enter_context(Child(run_actors, port, share, buffer_bytes)) for share in shares]
        server_alone, unused = taken([learner]), taken(farm)
        connect_s, connected = order(farm, "connect")
        idle_from = taken(farm)
        time.sleep(IDLE_S)
        idle = taken(farm)
        send_s, outcome = order(farm, "send", seconds, thread_each)
        acked = {number: count for answer in outcome for number, count in answer["acked"].items()}
        in_time = [count for answer in outcome for count in answer["in_time"].values()]
        busy, server = taken(farm), taken([learner]).minus(server_alone)
        close_s, closed = order(farm, "close")
        (arrived,) = ask([learner], "check", acked)
    samples = sum(acked.values())
    return {
        "sinks": sinks,
        "how": "a thread each" if thread_each else "in turns",
        "connect_s": connect_s,
        "failed": sum(len(answer["errors"]) for answer in [*connected, *outcome, *closed]),
        "samples_s": samples / send_s,
        "fairness": min(in_time) / max(in_time),
        "cpu_us": (busy.cpu_seconds - idle.cpu_seconds) / samples * 1e6,
        "idle_kib": (idle.resident - unused.resident) / sinks / KIB,
        "busy_kib": (busy.resident - unused.resident) / sinks / KIB,
        "threads": idle.threads / sinks,
        "descriptors": idle.descriptors / sinks,
        "idle_cpu": (idle.cpu_seconds - idle_from.cpu_seconds) / IDLE_S,
        "server_kib": server.resident / sinks / KIB,
        "server_threads": server.threads / sinks,
        "server_descriptors": server.descriptors / sinks,
        "close_s": close_s,
        **arrived,
    }


COLUMNS = {
    "sinks": ("sinks", ""),
    "      sending": ("how", ""),
    "connect s": ("connect_s", ".3f"),
    "failed": ("failed", ""),
    "samples/s": ("samples_s", ",.0f"),
    "least / most": ("fairness", ".2f"),
    "CPU us/sample": ("cpu_us", ".2f"),
    "KiB idle": ("idle_kib", ",.0f"),
    "KiB": ("busy_kib", ",.0f"),
    "threads": ("threads", ".2f"),
    "descriptors": ("descriptors", ".2f"),
    "idle CPU": ("idle_cpu", ".2%"),
    "server: KiB": ("server_kib", ",.0f"),
    "threads ": ("server_threads", ".2f"),
    "descriptors ": ("server_descriptors", ".2f"),
    "close s": ("close_s", ".3f"),
    "lost": ("lost", ""),
    "disordered": ("disordered", ""),
    "twice": ("twice", ",d"),
}


def producers(sinks: Sequence[int], seconds: float, buffer_kib: int) -> list[dict[str, Any]]:
    """Print the table and return its rows."""
    buffer = f"buffers of {buffer_kib} KiB" if buffer_kib else "default buffers"
    title = f"Many sinks into one server, 1 KB, B = {BATCH}, {buffer}, up to {PROCESSES} processes, real server"
    table = Table(title, COLUMNS)
    ways = [(count, False) for count in sinks]
    ways += [(count, True) for count in sinks if 1 < count / PROCESSES <= MOST_AT_ONCE]  # where it could matter
    return filled(table, (measure(count, each, seconds, buffer_kib * KIB or None) for count, each in sorted(ways)))


def main() -> None:
    def counts(value: str) -> list[int]:
        return [int(count) for count in value.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sinks", type=counts, default=list(SINKS), help="how many, of each row (default: 1,10,100,500)"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for which each row sends (default: 3)")
    parser.add_argument(
        "--buffer-kib", type=int, default=BUFFER_KIB, help="of each sink, 0 for its default (default: %(default)s)"
    )
    options = parser.parse_args()
    producers(options.sinks, options.seconds, options.buffer_kib)


if __name__ == "__main__":
    main()
