"""Sends from a real GPU to a real server. test_staging has the order of things on a fake one, for machines without."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import optree
import pytest
import torch
from learner_process import Learner
from spawned import ANSWER_S

from echo_torch import EchoSink, numpy_example
from echo_torch.support import accelerator

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

BATCH = 32
"""As many samples as a learner hands out at a time."""
MANY = 2000
LATE_CYCLES = 2_000_000
"""For a kernel that keeps a stream busy for about a millisecond."""
Batch = dict[str, torch.Tensor]


@contextmanager
def receiving(example: Any, **options: Any) -> Iterator[tuple[Learner, EchoSink]]:
    """A server for samples like ``example``, and a sink for it that sends nothing twice."""
    with (
        Learner(numpy_example(example), BATCH) as learner,
        EchoSink("127.0.0.1", learner.port, example, resend_at_close=False, **options) as sink,
    ):
        yield learner, sink


def numbered(numbers: torch.Tensor) -> Batch:
    """Samples of which each byte depends on its number, on the device of ``numbers``."""
    wide = numbers[:, None] + torch.arange(500, device=numbers.device)
    return {"id": numbers.long(), "bytes": (wide % 251).to(torch.uint8), "floats": wide[:, :7] / 2}


def check(learner: Learner, count: int) -> None:
    """Exactly the numbers from 0 to ``count`` arrived, each with its bytes."""
    got = learner.take(count)
    ids = torch.from_numpy(got["id"])
    assert torch.equal(ids.sort().values, torch.arange(count))
    for name, leaf in numbered(ids).items():
        assert torch.equal(torch.from_numpy(got[name]), leaf), name


# What arrives.

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "strided": lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "offset": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
}
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_arrives_exactly(layout: str) -> None:
    batch = {}
    for number, dtype in enumerate(DTYPES):
        raw = torch.from_numpy(
            np.random.default_rng(number).integers(0, 256, BATCH * 6 * dtype.itemsize, np.uint8)
        ).cuda()
        whole = (raw & 1).bool() if dtype is torch.bool else raw.view(dtype)
        batch[str(dtype)] = LAYOUTS[layout](whole.view(BATCH, 2, 3))
    with receiving({name: leaf[0] for name, leaf in batch.items()}) as (learner, sink):
        sink.send(batch)
        sink.wait(ANSWER_S)
        got = learner.take(BATCH)
    for name, leaf in batch.items():
        assert got[name].tobytes() == leaf.cpu().contiguous().view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize("rows", [1, 5, 100, 3000])
def test_batches_of_any_size(rows: int) -> None:
    """The largest of them does not fit into the buffer."""
    count = BATCH * -(-rows // BATCH)
    with receiving(_one(), buffer_bytes=1 << 20) as (learner, sink):
        for first in range(0, count, rows):
            sink.send(numbered(torch.arange(first, min(first + rows, count), device="cuda")))
        sink.wait(ANSWER_S)
        check(learner, count)


def test_leaves_on_the_cpu_beside_those_on_the_gpu() -> None:
    with receiving(_one()) as (learner, sink):
        for first in range(0, 10 * BATCH, BATCH):
            mixed: dict[str, Any] = numbered(torch.arange(first, first + BATCH, device="cuda"))
            mixed["id"] = mixed["id"].cpu().pin_memory() if first // BATCH % 2 else mixed["id"].cpu().numpy()
            sink.send(mixed)
            mixed["id"][...] = -1
        sink.wait(ANSWER_S)
        check(learner, 10 * BATCH)


def test_batches_from_the_cpu_in_between() -> None:
    with receiving(_one()) as (learner, sink):
        for first in range(0, 60 * BATCH, BATCH):
            device = "cuda" if first > 20 * BATCH and first % (2 * BATCH) else "cpu"
            sink.send(numbered(torch.arange(first, first + BATCH, device=device)))
        sink.wait(ANSWER_S)
        check(learner, 60 * BATCH)


def _one() -> Batch:
    return {name: leaf[0] for name, leaf in numbered(torch.arange(1)).items()}


# When it is read.


@pytest.mark.parametrize("buffer_bytes", [1 << 17, 1 << 26], ids=["ring always full", "ring never full"])
def test_a_batch_may_be_overwritten_as_soon_as_send_returns(buffer_bytes: int) -> None:
    """Thousands of times: a kernel that takes long, others that make the batch, send, and others that overwrite it."""
    batch = {name: leaf.cuda() for name, leaf in numbered(torch.arange(BATCH)).items()}
    with receiving(_one(), buffer_bytes=buffer_bytes) as (learner, sink):
        for first in range(0, MANY * BATCH, BATCH):
            torch.cuda._sleep(LATE_CYCLES)
            for name, leaf in numbered(torch.arange(first, first + BATCH, device="cuda")).items():
                batch[name].copy_(leaf)
            sink.send(batch)
            for leaf in batch.values():
                leaf.fill_(0)
        sink.wait(ANSWER_S)
        check(learner, MANY * BATCH)


def test_a_batch_may_be_freed_as_soon_as_send_returns() -> None:
    """Its memory is given to others at once, who write to it."""
    with receiving(_one()) as (learner, sink):
        for first in range(0, 200 * BATCH, BATCH):
            if first % (50 * BATCH) == 0:
                torch.cuda._sleep(LATE_CYCLES)
            batch = numbered(torch.arange(first, first + BATCH, device="cuda"))
            sink.send(batch)
            sizes = [leaf.nbytes for leaf in batch.values()]
            del batch
            for size in sizes:
                torch.zeros(size, dtype=torch.uint8, device="cuda")
        sink.wait(ANSWER_S)
        check(learner, 200 * BATCH)


def test_streams_of_threads() -> None:
    """Each of three threads makes its batches on a stream of its own, in a process whose sink another one made."""
    count = 100
    with receiving(_one()) as (learner, sink):

        def send(index: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for number in range(count):
                    first = (index * count + number) * BATCH
                    torch.cuda._sleep(LATE_CYCLES // 100)
                    sink.send(numbered(torch.arange(first, first + BATCH, device="cuda")))

        threads = [threading.Thread(target=send, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ANSWER_S)
        sink.wait(ANSWER_S)
        check(learner, 3 * count * BATCH)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_gpus_and_changes_of_the_current_one() -> None:
    with receiving(_one()) as (learner, sink):
        for number in range(40):
            torch.cuda.set_device(number // 2 % 2)
            batch = numbered(torch.arange(number * BATCH, (number + 1) * BATCH, device=f"cuda:{number % 2}"))
            if number % 3 == 0:
                batch["id"] = batch["id"].to(f"cuda:{1 - number % 2}")
            sink.send(batch)
            assert torch.cuda.current_device() == number // 2 % 2
        sink.wait(ANSWER_S)
        check(learner, 40 * BATCH)
    torch.cuda.set_device(0)


# What it costs.


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_send_waits_for_nothing() -> None:
    """Neither for the kernels before it nor for its own; and the thread's stream is as it was."""
    batch = numbered(torch.arange(BATCH, device="cuda"))
    with receiving(_one()) as (learner, sink):
        sink.send(batch)  # pins memory
        sink.wait(ANSWER_S)
        before = torch.cuda.current_stream()
        try:
            torch.cuda.set_sync_debug_mode("error")
            torch.cuda._sleep(1000 * LATE_CYCLES)
            sink.send(numbered(torch.arange(BATCH, 2 * BATCH, device="cuda")))
            busy = torch.cuda.Event()
            busy.record()
            assert not busy.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.current_stream() == before
        sink.wait(ANSWER_S)
        check(learner, 2 * BATCH)


def test_memory_of_the_device_is_bounded() -> None:
    """By the buffer, however far the device is behind; and nothing of it is kept."""
    buffer_bytes = 8 << 20
    example = {"image": torch.zeros(3, 64, 64)}
    batch = {"image": torch.randn(256, 3, 64, 64, device="cuda")}
    with receiving(example, buffer_bytes=buffer_bytes) as (learner, sink):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        for _ in range(10):
            torch.cuda._sleep(10 * LATE_CYCLES)
            sink.send(batch)
        sink.wait(ANSWER_S)
        after = torch.cuda.memory_stats()
        assert after["requested_bytes.all.peak"] - before <= buffer_bytes
        assert after["requested_bytes.all.current"] == before
        assert len(learner.take(10 * 256)["image"]) == 10 * 256


def test_memory_that_is_pinned_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[weakref.ref[torch.Tensor]] = []
    pinned = accelerator.empty_pinned

    def noted(size: int) -> torch.Tensor:
        memory = pinned(size)
        assert memory.is_pinned()
        taken.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(accelerator, "empty_pinned", noted)
    with receiving(_one()) as (learner, sink):
        for first in range(0, 4 * BATCH, BATCH):
            sink.send(numbered(torch.arange(first, first + BATCH, device="cuda")))
        sink.wait(ANSWER_S)
        check(learner, 4 * BATCH)
        assert [memory() is not None for memory in taken] == [True]
    assert [memory() for memory in taken] == [None]


def test_a_gpu_without_room_for_packing(caplog: pytest.LogCaptureFixture) -> None:
    batch = numbered(torch.arange(3000 * BATCH, device="cuda"))
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        with receiving(_one()) as (learner, sink):
            sink.send(batch)
            sink.wait(ANSWER_S)
            check(learner, 3000 * BATCH)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "samples on a device are copied while send() waits" in caplog.text


# Where it cannot be.


def test_beside_cuda_graphs() -> None:
    """What a replay computes is sent behind it; inside of the capture, nothing is, and the capture goes on."""
    numbers = torch.zeros(BATCH, dtype=torch.long, device="cuda")
    with receiving(_one()) as (learner, sink):
        sink.send(numbered(numbers))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            numbers += 1
            batch = numbered(numbers)
            with pytest.raises(RuntimeError, match="while a graph of cuda:0 is captured"):
                sink.send(batch)
        for _ in range(100):
            graph.replay()
            sink.send(batch)
        sink.wait(ANSWER_S)
        ids = torch.from_numpy(learner.take(101 * BATCH)["id"])
        assert torch.equal(ids.view(101, BATCH)[:, 0], torch.arange(101))


def test_what_is_under_way_does_not_end_a_capture() -> None:
    """The thread that asks for the copies does so while another one captures."""
    numbers = torch.arange(BATCH, device="cuda")
    with receiving(_one()) as (learner, sink):
        sink.send(numbered(numbers))
        sink.wait(ANSWER_S)
        for first in range(BATCH, 50 * BATCH, BATCH):
            batch = numbered(numbers + first)
            torch.cuda._sleep(20 * LATE_CYCLES)  # in front of the packing
            sink.send(batch)
            graph, apart = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            with torch.cuda.stream(apart):  # `torch.cuda.graph` would wait for the device first
                graph.capture_begin()
                made = numbers * 2
                time.sleep(0.005)
                graph.capture_end()
            graph.replay()
        sink.wait(ANSWER_S)
        check(learner, 50 * BATCH)
        assert torch.equal(made, 2 * numbers)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nothing_is_done_on_a_gpu_that_is_not_used() -> None:
    """Not even by the thread that asks for copies, whose current device would be the first one."""
    program = FROM_THE_SECOND.format(path=__file__)
    with Learner(numpy_example(_one()), BATCH) as learner:
        done = subprocess.run([sys.executable, "-c", program, str(learner.port)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "False\n"
        check(learner, BATCH)


FROM_THE_SECOND = """
import os, sys, torch
sys.path.insert(0, os.path.dirname({path!r}))
from echo_torch import EchoSink
from test_cuda import BATCH, _one, numbered
torch.cuda.set_device(1)
with EchoSink("127.0.0.1", int(sys.argv[1]), _one(), resend_at_close=False) as sink:
    sink.send(numbered(torch.arange(BATCH, device="cuda")))
    sink.wait()
print(torch._C._cuda_hasPrimaryContext(0))
"""


FORKED = """
import os, sys, torch
sys.path.insert(0, os.path.dirname({path!r}))
from echo_torch import EchoSink
from test_cuda import BATCH, _one, numbered
batch = numbered(torch.arange(BATCH, device="cuda"))
sink = EchoSink("127.0.0.1", {port}, _one(), resend_at_close=False)
sink.send(batch)
sink.wait()
for how in ("cuda", "cpu"):
    pid = os.fork()
    if pid == 0:
        try:
            sink.send(batch if how == "cuda" else numbered(torch.arange(BATCH, 2 * BATCH)))
        except RuntimeError as error:
            print(error, flush=True)
        sys.exit(0)  # with all that the end of a program frees
    print(how, os.waitpid(pid, 0)[1], flush=True)
sink.close()
"""


def test_a_process_forked_after_cuda_was_initialised() -> None:
    """It is told that it can send no tensor of the GPU; one of the CPU it can, and it ends in peace."""
    with Learner(numpy_example(_one()), BATCH) as learner:
        program = FORKED.format(path=__file__, port=learner.port)
        command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
        assert (done.returncode, done.stderr) == (0, "")
        error, *ended = done.stdout.splitlines()
        assert "which was forked after cuda was initialised" in error
        assert ended == ["cuda 0", "cpu 0"]
        check(learner, 2 * BATCH)


def test_a_profiler_shows_one_copy_for_each_send() -> None:
    batch = numbered(torch.arange(BATCH, device="cuda"))
    with receiving(_one()) as (learner, sink):
        sink.send(batch)
        sink.wait(ANSWER_S)
        with torch.profiler.profile() as profile:
            sink.send(batch)
            sink.wait(ANSWER_S)
        names = [event.name for event in profile.events()]
        assert {"echo_torch.send", "echo_torch.pack", "echo_torch.copy"} <= set(names)
        copies = [name for name in names if name.startswith("Memcpy DtoH")]
        assert len(copies) == 1
        assert learner.take(2 * BATCH)["id"].tolist() == 2 * list(range(BATCH))


def test_leaves_in_other_containers() -> None:
    nested = {"a": (torch.zeros(3), [torch.zeros(())]), "b": torch.zeros(2, 2)}
    batch = optree.tree_map(lambda leaf: torch.randn(BATCH, *leaf.shape, device="cuda"), nested)
    with receiving(nested) as (learner, sink):
        sink.send(batch)
        sink.wait(ANSWER_S)
        got = learner.take(BATCH)
    for sent, came in zip(optree.tree_leaves(batch), optree.tree_leaves(got), strict=True):
        assert torch.equal(sent.cpu(), torch.from_numpy(came))
