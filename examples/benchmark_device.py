"""What it costs to send from an accelerator: the tables of ``benchmark.py --device cuda``.

* ``staging``: how fast rows get from the device into pinned memory, packed on the way, beside bare non-blocking copies
  of the same bytes into pinned memory. No socket is involved.
* ``send``: how long ``sink.send(batch)`` blocks the caller while the ring has room.
* ``step``: what a training step loses if each step sends its batch, by the sink, or by ``tensor.cpu()`` and the stock
  client. The rates show whether bus and network had room.
* ``launches``: kernels and copies per send, as the profiler counts them.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import echo
import numpy as np
import torch
from benchmark_senders import HOST, Case, PeerProcess
from torch import nn

from echo_torch import EchoSink, numpy_example
from echo_torch.ring.ring import Ring
from echo_torch.ring.staging import Stager
from echo_torch.samples.spec import SampleSpec

RING_BYTES = 64 * 1024 * 1024
# Bytes of the batches to stage, and how many of them are on their way at a time.
STAGED_BYTES = (1 << 20, 16 << 20, 48 << 20)
IN_FLIGHT = 2
# Sends to take the median of, and training steps in one round.
SENDS = 200
STEPS = 20

Batch = dict[str, torch.Tensor]


def synchronize(device: torch.device) -> None:
    """Wait for the device. The CPU, on which you can try the tables, needs no waiting."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def where(device: torch.device) -> str:
    """Describe what the figures are measured on."""
    words = [f"torch {torch.__version__}", str(device)]
    if device.type == "cuda":
        words.append(torch.cuda.get_device_name(device))
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            words.append(f"driver {subprocess.run(query, capture_output=True, text=True).stdout.split()[0]}")
    return ", ".join(words)


def observations(rows: int, device: torch.device, pixels: int = 28_224) -> Batch:
    """Return four leaves, one of which has most of the bytes."""
    return {
        "obs": torch.randint(0, 255, (rows, pixels), dtype=torch.uint8, device=device),
        "action": torch.randint(0, 4, (rows,), device=device),
        "reward": torch.rand(rows, device=device),
        "weight": torch.rand(rows, device=device),
    }


def example_of(batch: Batch) -> Batch:
    return {name: torch.empty(leaf.shape[1:], dtype=leaf.dtype) for name, leaf in batch.items()}


def case_of(name: str, batch: Batch) -> Case:
    """Copy the batch to the CPU, for a peer."""
    return Case(name, len(next(iter(batch.values()))), {key: leaf.cpu() for key, leaf in batch.items()})


# Staging.


def staged(batch: Batch, count: int, device: torch.device) -> Callable[[], float]:
    """Return a function that stages one batch ``count`` times and returns the seconds that took.

    It leaves the ring empty after each run.
    """
    spec = SampleSpec(example_of(batch))
    ring = Ring(np.empty(RING_BYTES // spec.payload_size * spec.payload_size, np.uint8).data, spec.payload_size)
    stager = Stager(ring, spec.leaves, ring.move_to_buffer)
    ends: deque[int] = deque()

    def settle(until: int) -> None:
        """Act as if everything up to ``until`` had been written and acknowledged at once."""
        while ring.acked < until:
            ring.poll_copies()
            ring.written = ring.acked = ring.ready

    def run() -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            match = spec.match(batch)
            fill, done = stager.make_filler(match.arrays, True), 0
            while done < match.rows:
                slot, rows = ring.next_free_run(match.rows - done)
                if not rows:
                    settle(ends.popleft() if ends else ring.packed)
                    continue
                ring.commit(rows, copy=fill(slot, done, rows))
                done += rows
            ends.append(ring.packed)
            if len(ends) > IN_FLIGHT:
                settle(ends.popleft())
        settle(ring.packed)
        ends.clear()
        return time.perf_counter() - began

    return run


def copied(size: int, count: int, device: torch.device) -> Callable[[], float]:
    """Return a function that copies as many bytes into pinned memory, as often, without packing them."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    targets = [torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu") for _ in range(IN_FLIGHT)]

    def run() -> float:
        synchronize(device)
        began = time.perf_counter()
        for number in range(count):
            targets[number % IN_FLIGHT].copy_(source, non_blocking=True)
        synchronize(device)
        return time.perf_counter() - began

    return run


def staging_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = options.device
    for size in STAGED_BYTES:
        batch = observations(max(1, size // 28_240), device)
        total = sum(leaf.nbytes for leaf in batch.values())
        count = max(3, round(options.seconds * 10e9 / total))
        runs = {"sink": staged(batch, count, device), "copy": copied(total, count, device)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(1 + options.rounds):
            for name, run in runs.items():
                took = run()
                # Leave out the first run, which pins memory.
                if number:
                    times[name].append(took)
        rates = {name: total * count / statistics.median(took) / 1e9 for name, took in times.items()}
        yield {
            "mb": total / 1e6,
            "sink_gb_s": rates["sink"],
            "copy_gb_s": rates["copy"],
            "kept": rates["sink"] / rates["copy"],
        }


# Sending.


def send_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = options.device
    for rows in (1, 64, 512):
        batch = observations(rows, device)
        case = case_of("observations", batch)
        with PeerProcess("null", case) as peer, EchoSink(HOST, peer.port, example_of(batch)) as sink:
            took = []
            for number in range(20 + SENDS):
                synchronize(device)
                began = time.perf_counter()
                sink.send(batch)
                if number >= 20:
                    took.append((time.perf_counter() - began) * 1e6)
                sink.wait()
        took.sort()
        yield {
            "rows": rows,
            "mb": case.payload * rows / 1e6,
            "p50_us": took[len(took) // 2],
            "p95_us": took[int(len(took) * 0.95)],
        }


# Training steps.


def wide_mlp(device: torch.device) -> tuple[nn.Module, Batch]:
    layers = [layer for _ in range(6) for layer in (nn.Linear(4096, 4096), nn.ReLU())]
    batch = {"input": torch.randn(256, 4096, device=device), "label": torch.randint(0, 10, (256,), device=device)}
    return nn.Sequential(*layers, nn.Linear(4096, 10)).to(device), batch


def small_conv(device: torch.device) -> tuple[nn.Module, Batch]:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(3, 64), *block(64, 128), *block(128, 256), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    batch = {"input": torch.randn(64, 3, 96, 96, device=device), "label": torch.randint(0, 10, (64,), device=device)}
    return nn.Sequential(*layers, nn.Linear(256, 10)).to(device), batch


MODELS = {"MLP, 6 x 4096": wide_mlp, "conv net, 96 x 96": small_conv}
Send = Callable[[Batch], Any]


@contextmanager
def nothing(port: int, example: Batch) -> Iterator[Send]:
    yield lambda batch: None


@contextmanager
def by_sink(port: int, example: Batch) -> Iterator[Send]:
    with EchoSink(HOST, port, example) as sink:
        yield sink.send


@contextmanager
def by_stock(port: int, example: Batch) -> Iterator[Send]:
    client = echo.TcpClient(HOST, port, numpy_example(example))

    def send(batch: Batch) -> None:
        arrays = {name: leaf.cpu().numpy() for name, leaf in batch.items()}
        for row in range(len(arrays["label"])):
            client.send({name: leaf[row, ...] for name, leaf in arrays.items()})

    try:
        yield send
        client.wait()
    finally:
        client.close()


def steps(model: nn.Module, batch: Batch, send: Send, device: torch.device) -> float:
    """Return the seconds per training step. Each step fills its batch anew and sends it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(STEPS):
        # Overwrite the input in place, as you may do with a batch that was sent.
        batch["input"].normal_()
        nn.functional.cross_entropy(model(batch["input"]), batch["label"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        send(batch)
    synchronize(device)
    return (time.perf_counter() - began) / STEPS


def step_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = options.device
    senders = {"none": nothing, "sink": by_sink, ".cpu() + stock": by_stock}
    for name, make in MODELS.items():
        model, batch = make(device)
        case = case_of(name, batch)
        times: dict[str, list[float]] = {sender: [] for sender in senders}
        with PeerProcess("null", case) as peer:
            for number in range(1 + options.rounds):
                for sender, open_sender in senders.items():
                    with open_sender(peer.port, example_of(batch)) as send:
                        steps(model, batch, send, device)
                        took = steps(model, batch, send, device)
                    if number:
                        times[sender].append(took)
        alone = statistics.median(times["none"])
        lost = {sender: statistics.median(took) - alone for sender, took in times.items()}
        for sender, took in times.items():
            step = statistics.median(took)
            yield {
                "model": name,
                "sender": sender,
                "step_ms": step * 1e3,
                "slower": lost[sender] / alone,
                "gb_s": 0.0 if sender == "none" else case.payload * case.size / step / 1e9,
                "vs_stock": lost[sender] / lost[".cpu() + stock"] if lost[".cpu() + stock"] else 0.0,
            }


# Launches.


def launch_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = options.device
    batch = observations(64, device)
    sends = 10
    with (
        PeerProcess("null", case_of("observations", batch)) as peer,
        EchoSink(HOST, peer.port, example_of(batch)) as sink,
    ):
        for _ in range(5):
            sink.send(batch)
        sink.wait()
        synchronize(device)
        with torch.profiler.profile() as profile:
            for _ in range(sends):
                sink.send(batch)
                sink.wait()
            synchronize(device)
    on_device = [event for event in profile.events() if event.device_type not in (torch.autograd.DeviceType.CPU,)]
    counted = Counter(event.name for event in on_device if not event.name.startswith("echo_torch"))
    for name, count in counted.most_common():
        yield {"what": name[:60], "per_send": count / sends}
    yield {"what": "all", "per_send": sum(counted.values()) / sends}
