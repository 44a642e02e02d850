"""What sending costs: the sink and `TcpClient` beside the stock ``echo.TcpClient`` and the raw limit of the socket.

    python examples/benchmark.py [--quick] [--json FILE] [--cases 29B,1KB] [--peers null,real] [--tables busy,loop]
    python examples/benchmark.py --tables throughput,others [--others pyzmq,gloo,queue,ray] [--plot FILE.png]
    python examples/benchmark.py --device cuda [--quick] [--json FILE] [--tables staging,step]

Every figure is the median of interleaved rounds in one run. The senders take turns on one peer, so that a machine whose
speed drifts drifts for all of them. ``benchmark_senders.py`` says what is compared, and ``benchmark_others.py`` which
other libraries are. The table of those covers what is installed and names the rest.

Times include the final ``wait()``. CPU is user + system time of the sending process. "blocked" is how long the sends of
one batch block the caller, mean over all batches of a round. A sender with a buffer blocks for less and waits for the
buffer in the end: "in wait()" is the share of the round spent there.

The last table compares the figures with the targets of the package. It does not change the exit code.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmark_counting import counting_rows
from benchmark_dataset import dataset_rows
from benchmark_device import launch_rows, send_rows, staging_rows, step_rows, where
from benchmark_learners import learners_table, stopped_table
from benchmark_loaders import WORKERS, loader_rows
from benchmark_others import OTHERS, installed, other_rows
from benchmark_plot import draw
from benchmark_producers import BUFFER_KIB, SINKS, producers
from benchmark_rounds import batches_in, measure, medians, send_all, timed
from benchmark_senders import SENDERS, Calls, Case, PeerProcess, cases, elsewhere, sink
from benchmark_table import Table, filled

# The sample rate at which all senders run beside a training loop, and the batches in one slice of the loop.
LOOP_RATE = 10_000.0
SLICE_BATCHES = 4
# A peer that is busy for less than this share of the time is faster than the sender, and mostly waits for it.
FASTER_BELOW = 0.8
# Many sinks at once send for as long as this many rounds, so that each of them gets its turn.
PRODUCER_ROUNDS = 5
# How many calls of `send` must leave memory as it was.
MEMORY_SENDS = 10_000
# Most lots of that many sends to warm up with: one for each MiB of the ring.
MOST_WARM_UP_LOTS = 64
# Noise from Python's own caches, in blocks of memory. A leak of one block per thousand sends exceeds it.
BLOCKS_NOISE = 10
# Noise from the allocator's pages, in bytes. A leak of 7 bytes per send exceeds it.
RESIDENT_NOISE = 64 * 1024


# Throughput.


def measure_all(kind: str, case: Case, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield one row per sender, with the ratios between them."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in SENDERS}
    with PeerProcess(kind, case) as peer:
        names = list(figures)
        for _ in range(rounds):
            for name in names:
                with SENDERS[name](peer.port, case.batch) as calls:
                    figures[name].append(measure(calls, peer.cpu_seconds, case, seconds))
            # Reverse, because each sender finds the machine as the one before left it.
            names.reverse()
    results = {name: medians(found) for name, found in figures.items()}
    limit = max(results.pop("raw"), results.pop("raw lowat"), key=lambda found: found["samples_s"])
    stock = results["stock"]
    for name, found in {**results, "raw": limit}.items():
        yield {
            "case": case.name,
            "B": case.size,
            "peer": kind,
            "sender": name,
            **found,
            "vs_stock": found["samples_s"] / stock["samples_s"],
            "cpu_vs_stock": found["cpu_us"] / stock["cpu_us"],
            "blocked_vs_stock": found["blocked_us"] / stock["blocked_us"],
            "vs_limit": found["samples_s"] / limit["samples_s"],
        }


def throughput(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "   sample": ("case", ""),
        "  B": ("B", ""),
        "peer": ("peer", ""),
        "sender": ("sender", ""),
        " samples/s": ("samples_s", ",.0f"),
        " MB/s": ("mb_s", ",.0f"),
        "CPU us/sample": ("cpu_us", ".3f"),
        "blocked us/batch": ("blocked_us", ",.1f"),
        "in wait()": ("in_wait", ".0%"),
        "x stock": ("vs_stock", ".2f"),
        "CPU/stock": ("cpu_vs_stock", ".4f"),
        "blocked/stock": ("blocked_vs_stock", ".4f"),
        "x limit": ("vs_limit", ".2f"),
        "peer busy": ("peer_busy", ".0%"),
    }
    table = Table("Throughput", columns)
    for name in options.cases:
        for kind in options.peers:
            for row in measure_all(kind, cases()[name], options.rounds, options.seconds):
                table.add(row)
    say_how_busy([row for row in table.rows if (row["peer"], row["sender"]) == ("null", "sink")])
    return table.rows


def say_how_busy(rows: list[dict[str, Any]]) -> None:
    """Print whether the null peer was faster than the sink. Otherwise the figures measure the peer."""
    if rows:
        shares = ", ".join(f"{row['peer_busy']:.0%} ({row['case']})" for row in rows)
        faster = all(row["peer_busy"] < FASTER_BELOW for row in rows)
        print(
            f"The null peer was busy for {shares} of the sink's time: {'' if faster else 'NOT always '}faster than it."
        )


# The round trip of one sample.


def trip(name: str, peer: PeerProcess, case: Case, seconds: float) -> float:
    """Return the microseconds from ``send`` with one sample to the end of ``wait``, median of many."""
    with SENDERS[name](peer.port, case.cut(1).batch) as (send, wait):

        def there_and_back() -> None:
            send()
            wait()

        count = batches_in(there_and_back, wait, seconds)
        return statistics.median(timed(there_and_back) for _ in range(count)) * 1e6


def round_trips(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "sample": ("case", ""),
        "client us": ("client_us", ".1f"),
        "stock us": ("stock_us", ".1f"),
        "client/stock": ("vs_stock", ".2f"),
    }
    table = Table("Round trip of one sample, send + wait, real server", columns)
    for case in (cases()["29B"], cases()["28KB"]):
        found: dict[str, list[float]] = {"client": [], "stock": []}
        with PeerProcess("real", case) as peer:
            for _ in range(options.rounds):
                for name, times in found.items():
                    times.append(trip(name, peer, case, options.seconds / 2))
        client, stock = (statistics.median(times) for times in found.values())
        table.add({"case": case.name, "client_us": client, "stock_us": stock, "vs_stock": client / stock})
    return table.rows


# What the caller pays while there is room.


def room_round(calls: Calls, source: Any, target: Any) -> dict[str, float]:
    """Time one ``send``, and one copy of as many bytes. Read ``source`` just before each, so that caches are alike."""
    send, wait = calls
    np.add.reduce(source)
    send_us = timed(send) * 1e6
    wait()
    np.add.reduce(source)
    return {"send_us": send_us, "memcpy_us": timed(lambda: np.copyto(target, source)) * 1e6}


def room(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time `EchoSink.send` of 9.6 MB into an empty ring, beside one memcpy of the same bytes."""
    columns = {
        "send us": ("send_us", ",.0f"),
        "memcpy us": ("memcpy_us", ",.0f"),
        "send/memcpy": ("vs_memcpy", ".2f"),
    }
    table = Table("Caller blocked in EchoSink.send of 9.6 MB (16 x 602 KB) while the ring has room, null peer", columns)
    case = cases()["602KB"]
    source = case.batch["image"].numpy().reshape(-1)
    target = np.zeros_like(source)
    with PeerProcess("null", case) as peer, sink(peer.port, case.batch) as calls:
        found = [room_round(calls, source, target) for _ in range(10 + 30 * options.rounds)]
    # Leave out the first rounds, which touch their memory for the first time.
    middle = medians(found[10:])
    table.add({**middle, "vs_memcpy": middle["send_us"] / middle["memcpy_us"]})
    return table.rows


# Memory and threads.


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def memory_held() -> tuple[int, int]:
    gc.collect()
    return resident_bytes(), sys.getallocatedblocks()


def warm_up(lot: Callable[[], None]) -> None:
    """Send until the ring has touched all the memory that it will use.

    It touches memory as backlogs grow, and never more than its size.
    """
    before, still = resident_bytes(), 0
    for _ in range(MOST_WARM_UP_LOTS):
        lot()
        after = resident_bytes()
        still = still + 1 if after <= before else 0
        before = max(before, after)
        if still == 5:
            break


def growth(name: str, peer: PeerProcess, case: Case, lots: int) -> dict[str, Any]:
    """Return what ``MEMORY_SENDS`` calls add to this process' memory, mean of ``lots`` lots of them."""
    threads = threading.active_count()
    with SENDERS[name](peer.port, case.batch) as (send, wait):
        threads = threading.active_count() - threads

        def lot() -> None:
            send_all(MEMORY_SENDS, send, wait)

        warm_up(lot)
        before = memory_held()
        for _ in range(lots):
            lot()
        resident, blocks = ((after - first) / lots for first, after in zip(before, memory_held(), strict=True))
    return {"sender": name, "lots": lots, "resident": resident, "blocks": blocks, "threads": threads}


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "sender": ("sender", ""),
        "resident bytes": ("resident", "+,.0f"),
        "Python blocks": ("blocks", "+,.0f"),
        "threads": ("threads", "+"),
    }
    case = cases()["29B"]
    table = Table(
        f"Growth by {MEMORY_SENDS:,} sends after warm-up, mean of {options.rounds} times; threads of a connection; "
        "29 B, null peer",
        columns,
    )
    with PeerProcess("null", case) as peer:
        table.add(growth("sink", peer, case, options.rounds))
        table.add(growth("client", peer, case.cut(1), options.rounds))
    return table.rows


# A main thread that is busy in Python.


def step() -> int:
    """Spend about 0.2 ms in pure Python, as a training loop does beside its tensors."""
    total = 0
    for number in range(4000):
        total += number & 7
    return total


def busy_rate(name: str, port: int, case: Case, seconds: float) -> float:
    """Return the samples per second of a second thread, while the main thread never releases the GIL by itself."""
    rates: list[float] = []
    with SENDERS[name](port, case.batch) as (send, wait):

        def work() -> None:
            count = batches_in(send, wait, seconds)
            rates.append(count * case.size / send_all(count, send, wait))

        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            step()
    return rates[0]


def busy(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "sender": ("sender", ""),
        " samples/s": ("samples_s", ",.0f"),
        "x stock": ("vs_stock", ".1f"),
    }
    table = Table("Sent by a second thread while the main thread is busy in Python, 29 B, real server", columns)
    case = cases()["29B"]
    # Enough for senders of single samples, and keeps a round from taking seconds.
    few = case.cut(32)
    found: dict[str, list[float]] = {"sink": [], "client": [], "stock": []}
    with PeerProcess("real", case) as peer:
        for _ in range(options.rounds):
            for name, rates in found.items():
                rates.append(busy_rate(name, peer.port, case if name == "sink" else few, options.seconds))
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    for name, rate in middle.items():
        table.add({"sender": name, "samples_s": rate, "vs_stock": rate / middle["stock"]})
    return table.rows


# What a training loop keeps of its speed.


def loop_slice(calls: Calls, size: int) -> dict[str, float]:
    """Run a loop that sends a few batches, evenly spaced. Return its steps and its samples per second."""
    send, wait = calls
    period = size / LOOP_RATE
    steps = sent = 0
    began = time.perf_counter()
    while (now := time.perf_counter() - began) < SLICE_BATCHES * period:
        if now >= sent * period:
            send()
            sent += 1
        step()
        steps += 1
    wait()
    wall = time.perf_counter() - began
    return {"steps_s": steps / wall, "samples_s": sent * size / wall}


def loop_turns(senders: dict[str, Calls], size: int, turns: int) -> dict[str, list[dict[str, float]]]:
    """Run slices with each sender in turn.

    Each slice is compared with the mean of the slices without a sender just before and after it.
    """
    alone: Calls = (lambda: None, lambda: None)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in senders}
    before = loop_slice(alone, size)
    for _ in range(turns):
        for name, calls in senders.items():
            middle, after = loop_slice(calls, size), loop_slice(alone, size)
            middle["alone_steps_s"] = (before["steps_s"] + after["steps_s"]) / 2
            middle["kept"] = middle["steps_s"] / middle["alone_steps_s"]
            found[name].append(middle)
            before = after
    return found


def loop(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the speed that a loop keeps.

    With "elsewhere", another process sends, so the loop only shares the machine with it.
    """
    columns = {
        "sender": ("sender", ""),
        "samples/s": ("samples_s", ",.0f"),
        "steps/s": ("steps_s", ",.0f"),
        "steps/s alone": ("alone_steps_s", ",.0f"),
        " kept": ("kept", ".3f"),
    }
    table = Table(f"A loop in Python that sends {LOOP_RATE:,.0f} samples/s, 29 B, B = 256, real server", columns)
    case = cases()["29B"]
    with PeerProcess("real", case) as peer, ExitStack() as stack:
        compared = {"sink": SENDERS["sink"], "stock": SENDERS["stock"], "elsewhere": elsewhere}
        senders = {name: stack.enter_context(make(peer.port, case.batch)) for name, make in compared.items()}
        loop_turns(senders, case.size, 1)
        found = loop_turns(senders, case.size, max(3, round(100 * options.seconds)))
    for name, slices in found.items():
        table.add({"sender": name, **medians(slices)})
    return table.rows


# What a loop keeps of its speed whose loader's workers send.


def loaders(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "case": ("case", ""),
        "computing us/sample": ("compute_us", ".0f"),
        "             sender": ("sender", ""),
        "samples/s": ("samples_s", ",.0f"),
        " kept": ("kept", ".3f"),
    }
    what = f"A loop over {WORKERS} workers that send what they collate, real server"
    table = Table(what, columns)
    for row in loader_rows(options):
        table.add(row)
    return table.rows


# What else carries batches to another process.


def counting(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "    batch": ("case", ""),
        "send us": ("send_us", ",.1f"),
        "readings of the clock": ("readings", ".1f"),
        "us each": ("reading_us", ".3f"),
        "share": ("share", ".2%"),
    }
    return filled(
        Table("What EchoSink.send pays to know where its time goes, null peer", columns), counting_rows(options)
    )


def dataset(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "sample": ("case", ""),
        "  B": ("B", ""),
        "learner takes": ("way", ""),
        "us/batch": ("batch_us", ",.0f"),
        "x raw + copy": ("vs_copied", ".2f"),
        "held up us/batch": ("held_up_us", ",.0f"),
    }
    return filled(Table("What taking batches costs the learner, fed by a sink", columns), dataset_rows(options))


def others(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "sample": ("case", ""),
        "  B": ("B", ""),
        "       sender": ("sender", ""),
        " samples/s": ("samples_s", ",.0f"),
        " MB/s": ("mb_s", ",.0f"),
        "CPU us/sample": ("cpu_us", ".3f"),
        "blocked us/batch": ("blocked_us", ",.1f"),
        "in wait()": ("in_wait", ".0%"),
        "sink x its": ("sink_faster", ".2f"),
        "CPU: sink / its": ("sink_cpu", ".4f"),
        "blocked: sink / its": ("sink_blocked", ".4f"),
        "peer busy": ("peer_busy", ".0%"),
    }
    rows = filled(
        Table("Other ways of batches to another process; the sink sends to the null peer", columns), other_rows(options)
    )
    if missing := [name for name in options.others if not installed(name)]:
        print(f"Left out, as it is not installed: {', '.join(missing)}.")
    return rows


# What many sinks at once get from one server.


def producers_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    return producers(SINKS, PRODUCER_ROUNDS * options.seconds, BUFFER_KIB)


# What was to be reached.


class Target(NamedTuple):
    """A bound on the figure ``key``, for the rows of a table whose columns have the values ``of``."""

    says: str
    table: str
    of: dict[str, tuple[str, ...]]
    key: str
    bound: float
    at_least: bool = False


def rows_of(sender: str, peer: str, *names: str) -> dict[str, tuple[str, ...]]:
    return {"sender": (sender,), "peer": (peer,), **({"case": names} if names else {})}


SMALL_NULL = rows_of("sink", "null", "29B")
SMALL_REAL = rows_of("sink", "real", "29B", "1KB")
LARGE_NULL = rows_of("sink", "null", "28KB", "602KB")
OTHER_SENDERS = {"sender": tuple(sender for other in OTHERS.values() for sender in other.senders)}
# The columns that say what a row is about.
SAYS_OF = ("case", "model", "sender", "peer", "way", "route", "sinks", "how")
TWO = ("two, round_robin", "two, least_inflight")
TARGETS = [
    Target("samples/s, x stock", "throughput", SMALL_NULL, "vs_stock", 100, True),
    Target("CPU per sample, / stock", "throughput", SMALL_NULL, "cpu_vs_stock", 1 / 100),
    Target("blocked per batch, / stock", "throughput", SMALL_NULL, "blocked_vs_stock", 1 / 100),
    Target("samples/s, x raw limit", "throughput", SMALL_REAL, "vs_limit", 0.95, True),
    Target("CPU per sample, / stock", "throughput", SMALL_REAL, "cpu_vs_stock", 1 / 15),
    Target("MB/s, x raw limit", "throughput", LARGE_NULL, "vs_limit", 0.9, True),
    Target("CPU per sample, / stock", "throughput", rows_of("sink", "real", "43 leaves"), "cpu_vs_stock", 1 / 10),
    Target("CPU per sample, / stock", "throughput", rows_of("client", "real"), "cpu_vs_stock", 1 / 2),
    Target("client's round trip, / stock", "trips", {}, "vs_stock", 1.1),
    Target("blocked in send, ring has room, / memcpy", "room", {}, "vs_memcpy", 1.3),
    Target("samples/s, main thread busy, x stock", "busy", {"sender": ("sink",)}, "vs_stock", 10, True),
    Target("loop rate kept", "loop", {"sender": ("sink",)}, "kept", 0.97, True),
    Target("loop rate kept, workers send", "loaders", {"sender": ("sink",)}, "kept", 0.95, True),
    Target("share of send that times take", "counting", {}, "share", 0.01),
    Target("samples/s, sink x other", "others", OTHER_SENDERS, "sink_faster", 1, True),
    Target("CPU per sample, sink / other", "others", OTHER_SENDERS, "sink_cpu", 1),
    Target("samples/s, two learners / one", "learners", {"learners": ("train",), "way": TWO}, "faster", 1.8, True),
    Target("steps kept, a learner stopped", "stopped", {"route": ("least_inflight",)}, "kept", 0.8, True),
    Target("samples lost of many sinks", "producers", {}, "lost", 0),
    Target(f"resident bytes grown per {MEMORY_SENDS:,} sends", "memory", {}, "resident", RESIDENT_NOISE),
    Target(f"Python blocks grown per {MEMORY_SENDS:,} sends", "memory", {}, "blocks", BLOCKS_NOISE),
    Target("threads per connection", "memory", {}, "threads", 1),
    Target("device to host, x pinned copy", "staging", {}, "kept", 0.95, True),
    Target("host time of send (us)", "send", {}, "p50_us", 100),
    Target("step slower by", "step", {"sender": ("sink",)}, "slower", 0.02),
    Target("step overhead, / .cpu() + stock", "step", {"sender": ("sink",)}, "vs_stock", 1 / 10),
    Target("kernels and copies per send", "launches", {"what": ("all",)}, "per_send", 3),
]


def judge(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Compare each target with every figure measured for it."""
    table = Table(
        "Targets",
        {
            f"{'target':>42}": ("target", ""),
            f"{'of':>18}": ("of", ""),
            "    bound": ("bound", ""),
            "  figure": ("figure", ",.4g"),
            "verdict": ("verdict", ""),
        },
    )
    for target in TARGETS:
        for row in results.get(target.table, []):
            if any(row[key] not in values for key, values in target.of.items()):
                continue
            figure = row[target.key]
            reached = figure >= target.bound if target.at_least else figure <= target.bound
            table.add(
                {
                    "target": target.says,
                    "of": " ".join(str(row[key]) for key in SAYS_OF if key in row),
                    "bound": f"{'>=' if target.at_least else '<='} {target.bound:.3g}",
                    "figure": figure,
                    "verdict": "reached" if reached else "missed",
                }
            )
    return table.rows


# An accelerator.


def staging_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "batch MB": ("mb", ",.1f"),
        "sink GB/s": ("sink_gb_s", ",.2f"),
        "pinned copy GB/s": ("copy_gb_s", ",.2f"),
        "of copy": ("kept", ".3f"),
    }
    return filled(Table("From the device into pinned rows, 4 leaves, no socket", columns), staging_rows(options))


def send_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "samples": ("rows", ","),
        "batch MB": ("mb", ",.2f"),
        "send us, median": ("p50_us", ",.1f"),
        "95 % below": ("p95_us", ",.1f"),
    }
    return filled(
        Table("Caller blocked in EchoSink.send, 4 leaves on the device, ring empty", columns), send_rows(options)
    )


def step_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {
        "model             ": ("model", "<18"),
        "sender        ": ("sender", "<14"),
        "ms/step": ("step_ms", ".3f"),
        "slower by": ("slower", ".2%"),
        "sent GB/s": ("gb_s", ".2f"),
        "/ stock": ("vs_stock", ".3f"),
    }
    return filled(Table("Training steps that each send their batch, null peer", columns), step_rows(options))


def launches_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = {f"{'kernels and copies':60}": ("what", "<60"), "per send": ("per_send", ".1f")}
    return filled(Table("What a send of 4 leaves launches", columns), launch_rows(options))


DEVICE_TABLES: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "staging": staging_table,
    "send": send_table,
    "step": step_table,
    "launches": launches_table,
}
TABLES: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "throughput": throughput,
    "trips": round_trips,
    "room": room,
    **({"memory": memory} if os.path.exists("/proc/self/statm") else {}),
    "busy": busy,
    "loop": loop,
    "loaders": loaders,
    "counting": counting,
    "dataset": dataset,
    "others": others,
    "learners": learners_table,
    "stopped": stopped_table,
    **({"producers": producers_table} if os.path.exists("/proc/self/statm") else {}),
}
NOT_QUICK = ("others", "learners", "stopped", "producers")
PLOTTED = ("throughput", "others")


def parse_arguments() -> argparse.Namespace:
    def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
        def chosen(value: str) -> list[str]:
            if unknown := set(value.split(",")) - set(names):
                raise argparse.ArgumentTypeError(f"got {', '.join(sorted(unknown))}, expected of {', '.join(names)}")
            return value.split(",")

        return chosen

    def at_least_one(value: str) -> int:
        if int(value) < 1:
            raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
        return int(value)

    def positive(value: str) -> float:
        if not float(value) > 0:
            raise argparse.ArgumentTypeError(f"got {value}, expected more than 0")
        return float(value)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quick = f"under 60 s: rounds of 0.1 s, and throughput of 29 B only, without the tables {', '.join(NOT_QUICK)}"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", metavar="FILE.png", help=f"draw the tables {' and '.join(PLOTTED)}; needs matplotlib")
    parser.add_argument(
        "--rounds", type=at_least_one, default=5, help="how often each sender has its turn (default: 5)"
    )
    parser.add_argument("--seconds", type=positive, help="length of one round of one sender (default: 0.6)")
    parser.add_argument("--cases", type=some_of(list(cases())), help=f"of throughput, dataset: {', '.join(cases())}")
    parser.add_argument("--peers", type=some_of(["null", "real"]), default="null,real", help="for throughput")
    which = f"for the table of others, of {','.join(OTHERS)} (default: all that are installed)"
    parser.add_argument("--others", type=some_of(list(OTHERS)), default=",".join(OTHERS), help=which)
    parser.add_argument("--device", type=torch.device, help="measure sending from this accelerator, such as cuda")
    names = f"of {','.join(TABLES)}; with --device, of {','.join(DEVICE_TABLES)}"
    parser.add_argument("--tables", type=some_of([*TABLES, *DEVICE_TABLES]), help=names)
    options = parser.parse_args()
    tables = DEVICE_TABLES if options.device else TABLES
    options.tables = options.tables or [name for name in tables if not (options.quick and name in NOT_QUICK)]
    if options.plot and not set(PLOTTED) & set(options.tables):
        parser.error(f"--plot: got tables {', '.join(options.tables)}, expected one of {', '.join(PLOTTED)}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed: pip install 'echo-torch[bench]'")
    options.cases = options.cases or (["29B"] if options.quick else list(cases()))
    options.seconds = options.seconds or (0.1 if options.quick else 0.6)
    return options


def main() -> None:
    options = parse_arguments()
    if options.device:
        print(where(options.device))
    tables = DEVICE_TABLES if options.device else TABLES
    results = {name: run(options) for name, run in tables.items() if name in options.tables}
    results["targets"] = judge(results)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)
    if options.plot:
        draw(options.plot, results)


if __name__ == "__main__":
    main()
