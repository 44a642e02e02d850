"""What one sink gets from two learners, and what it costs if one of them stops, as tables of ``benchmark.py``.

* ``learners``: one sink sends batches as fast as they are taken, to one learner and to two. Learners that train sleep
  for a while over each batch, like learners that wait for a GPU. Others only drain and share this machine's cores with
  the sink.
* ``stopped``: a loop computes and sends to two learners, and one of them is stopped (SIGSTOP) for some seconds. Either
  learner could take all that the loop sends.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import echo
from benchmark_senders import HOST, Case, Child, answer_cpu, cases
from benchmark_table import Table, filled

from echo_torch import EchoSink

# Seconds that a training learner takes over a batch of 256 samples.
TRAIN_S = 0.02
# For the stopped learner: samples per batch, seconds of computing for each, and seconds that it is stopped.
STOPPED_BATCH = 64
COMPUTE_S = 0.01
STOP_S = 5.0


def run_learner(pipe: Any, example: Any, train_s: float) -> None:
    server = echo.Server(example, batch_size=256, transport=echo.TcpTransport(port=0))
    server.start()
    pipe.send(server.port)

    def train() -> None:
        while server.sample() is not None:
            time.sleep(train_s)

    threading.Thread(target=train, daemon=True).start()
    answer_cpu(pipe)


class Learner(Child):
    """A learner in its own process."""

    def __init__(self, case: Case, train_s: float) -> None:
        super().__init__(run_learner, case.example, train_s)
        self.port: int = self.pipe.recv()


def sink_to(learners: list[Learner], case: Case, **options: Any) -> EchoSink:
    ports = [learner.port for learner in learners]
    return EchoSink(HOST, ports, {name: leaf[0] for name, leaf in case.batch.items()}, **options)


# One learner, or two.

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one learner": (1, {}),
    "two, round_robin": (2, {"route": "round_robin"}),
    "two, least_inflight": (2, {"route": "least_inflight"}),
    "two, a function": (2, {"route": lambda batch: batch["action"]}),  # its results are 0 and 1, at random
    "two, failover": (2, {"route": "least_inflight", "failover": True}),
}


def rate(sink: EchoSink, case: Case, seconds: float) -> float:
    """Call `send` again and again for about ``seconds``. Return the samples per second that were acked."""
    before, began = sink.stats().samples_acked, time.perf_counter()
    while time.perf_counter() < began + seconds:
        sink.send(case.batch)
    return (sink.stats().samples_acked - before) / (time.perf_counter() - began)


def spread_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    case = cases()["1KB"]
    for train_s, learners_do in ((TRAIN_S, "train"), (0.0, "drain")):
        with ExitStack() as stack:
            sinks = {}
            for way, (count, more) in WAYS.items():
                learners = [stack.enter_context(Learner(case, train_s)) for _ in range(count)]
                # A small buffer, which is soon full, because this measures the learners.
                sinks[way] = stack.enter_context(sink_to(learners, case, buffer_bytes=8 << 20, **more))
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            for way in WAYS:
                rate(sinks[way], case, options.seconds)
            for _ in range(options.rounds):
                for way, sink in sinks.items():
                    rates[way].append(rate(sink, case, 2 * options.seconds))
                    sink.wait()
        for way, found in rates.items():
            faster = [one / alone for one, alone in zip(found, rates["one learner"], strict=True)]
            figures = {"samples_s": statistics.median(found), "faster": statistics.median(faster)}
            yield {"learners": learners_do, "way": way, **figures}


# One that is stopped.


def steps(sink: EchoSink, case: Case, seconds: float) -> tuple[float, float]:
    """Run a loop that computes and sends. Return its steps per second and its longest step in seconds."""
    began, count, longest = time.perf_counter(), 0, 0.0
    while (now := time.perf_counter()) < began + seconds:
        while time.perf_counter() < now + COMPUTE_S:
            pass
        sink.send(case.batch)
        count += 1
        longest = max(longest, time.perf_counter() - now)
    return count / (time.perf_counter() - began), longest


def stopped_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    case = cases()["28KB"].cut(STOPPED_BATCH)
    seconds = min(STOP_S, 10 * options.seconds)
    for route in ("round_robin", "least_inflight"):
        kept, longest, before_s = [], [], []
        for _ in range(min(3, options.rounds)):
            with Learner(case, 0.0) as one, Learner(case, 0.0) as two, sink_to([one, two], case, route=route) as sink:
                steps(sink, case, seconds / 5)
                before, _ = steps(sink, case, seconds)
                one.signal(signal.SIGSTOP)
                goes_on = threading.Timer(seconds, one.signal, [signal.SIGCONT])
                goes_on.start()
                during, longest_step = steps(sink, case, seconds)
                goes_on.join()
                sink.wait()
            before_s.append(before)
            kept.append(during / before)
            longest.append(longest_step)
        yield {
            "route": route,
            "stopped_s": seconds,
            "steps_s": statistics.median(before_s),
            "kept": statistics.median(kept),
            "longest_s": statistics.median(longest),
        }


# Tables.


def learners_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "learners": ("learners", ""),
        "                way": ("way", ""),
        " samples/s": ("samples_s", ",.0f"),
        "x one learner": ("faster", ".2f"),
    }
    return filled(Table("What one sink gets from two learners, batches of 256 x 1KB", columns), spread_rows(options))


def stopped_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "         route": ("route", ""),
        "stopped s": ("stopped_s", ".1f"),
        "steps/s before": ("steps_s", ".0f"),
        "kept of that": ("kept", ".3f"),
        "longest step s": ("longest_s", ".3f"),
    }
    title = "A loop that sends 64 x 28KB every 10 ms to two learners, of which one is stopped"
    return filled(Table(title, columns), stopped_rows(options))
