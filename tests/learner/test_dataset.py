"""`EchoDataset`: what a real server received, as tensors; when a batch is overwritten; who may ask, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import echo
import numpy as np
import optree
import pytest
import torch
from fake_device import FakeDevice
from spawned import ANSWER_S
from tensordict import TensorDict
from torch.utils.data import DataLoader

from echo_torch import ConnectionClosedError, EchoDataset, EchoSink, SpecMismatchError, TcpClient, numpy_example
from echo_torch.learner import prefetch
from echo_torch.support import accelerator

BATCH = 4
EXAMPLE = {"id": torch.tensor(0), "bytes": torch.zeros(5, dtype=torch.uint8)}


@contextlib.contextmanager
def serving(example: Any = EXAMPLE, batch_size: int = BATCH, **options: Any) -> Iterator[echo.Server]:
    server = echo.Server(numpy_example(example), batch_size=batch_size, **options)
    try:
        yield server
    finally:
        server.close()


def fill(server: echo.Server, *numbers: int) -> None:
    """Batches of samples that are all the same; blocks if the ring is full."""
    for number in itertools.chain.from_iterable(itertools.repeat(number, BATCH) for number in numbers):
        server.submit({"id": np.array(number), "bytes": np.full(5, number % 256, np.uint8)})


@contextlib.contextmanager
def filling(server: echo.Server, *numbers: int) -> Iterator[None]:
    """The same meanwhile, in a thread."""
    thread = threading.Thread(target=fill, args=(server, *numbers))
    thread.start()
    yield
    thread.join(ANSWER_S)
    assert not thread.is_alive()


def number_of(batch: Any) -> int:
    """Of a batch that `fill` made, after a look at all of it."""
    number = int(batch["id"][0])
    assert torch.equal(batch["id"], torch.full((BATCH,), number))
    assert torch.equal(batch["bytes"], torch.full((BATCH, 5), number % 256, dtype=torch.uint8))
    return number


def numbers(batches: Any) -> list[int]:
    return [number_of(batch) for batch in batches]


# What comes.

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64,
    torch.complex128, *(getattr(torch, name) for name in dir(torch) if name.startswith("float8_")),
]  # fmt: skip


def random_leaf(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    return ((raw & 1).bool() if dtype is torch.bool else raw.view(dtype)).view(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "share"])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_every_dtype_comes_as_it_was_sent(copy: bool) -> None:
    """Bit for bit, by way of a sink and a socket; leaves without dimensions and without values, too."""
    rows = 32
    batch = {str(dtype): (random_leaf(dtype, rows, 2, 3), random_leaf(dtype, rows)) for dtype in DTYPES}
    batch["none"] = (torch.zeros(rows, 0, 2), torch.zeros(rows))
    example = optree.tree_map(lambda leaf: leaf[0], batch)
    with serving(example, rows, transport=echo.TcpTransport(port=0)) as server:
        server.start()
        with EchoSink("127.0.0.1", server.port, example, resend_at_close=False) as sink:
            sink.send(batch)
            sink.wait(ANSWER_S)
            (got,) = itertools.islice(EchoDataset(server, example, copy=copy), 1)
            for name, leaves in batch.items():
                for leaf, there in zip(leaves, got[name], strict=True):
                    assert (there.dtype, there.shape, bytes_of(there)) == (leaf.dtype, leaf.shape, bytes_of(leaf)), name
            server.close()


Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Fields:
    x: Any
    y: Any


A, B = torch.tensor(1), torch.zeros(2)
STRUCTURES = {
    "leaf": (B, B),
    "dict": ({"b": A, "a": B}, {"a": B, "b": A}),
    "OrderedDict": (OrderedDict(b=A, a=B), OrderedDict(b=A, a=B)),
    "nested": ([A, (B, {"c": Pair(A, B)}), None], [A, (B, {"c": Pair(A, B)}), None]),
    "dataclass": (Pair(Fields(A, B), A), Pair({"x": A, "y": B}, A)),
    "TensorDict": (TensorDict({"x": B, "z": {"y": A}}), {"x": B, "z": {"y": A}}),
    "numbers": ((1, 2.0, True), (torch.tensor(1), torch.tensor(2.0).double(), torch.tensor(True))),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_batches_have_the_containers_of_the_example(kind: str) -> None:
    example, expected = STRUCTURES[kind]
    with serving(example) as server:
        for _ in range(BATCH):
            server.submit(numpy_example(example))
        (got,) = itertools.islice(EchoDataset(server, example), 1)
        server.close()
    leaves, treespec = optree.tree_flatten(expected)
    theirs, their_treespec = optree.tree_flatten(got)
    assert their_treespec == treespec
    assert [(leaf.dtype, leaf.shape) for leaf in theirs] == [(leaf.dtype, (BATCH, *leaf.shape)) for leaf in leaves]


def test_it_has_the_counters_of_the_batch_that_came_last() -> None:
    with serving(num_buffers=4) as server:
        dataset = EchoDataset(server, EXAMPLE)
        assert dataset.info is None
        fill(server, 0, 1)
        infos = [dataset.info for _ in itertools.islice(dataset, 2)]
        assert [type(info) for info in infos] == [echo.SampleInfo] * 2
        assert infos[0] is not infos[1]
        server.close()


# Iterating.


def test_iterating_again_goes_on() -> None:
    """What was taken ahead is not lost."""
    with serving() as server, filling(server, *range(9)):
        dataset = EchoDataset(server, EXAMPLE)
        assert numbers(itertools.islice(dataset, 3)) == [0, 1, 2]
        for batch in dataset:
            assert number_of(batch) == 3
            break
        pairs = itertools.islice(zip(dataset, dataset, strict=True), 2)
        assert [numbers(pair) for pair in pairs] == [[4, 5], [6, 7]]
        assert numbers(itertools.islice(dataset, 1)) == [8]
        server.close()


def test_the_end_comes_when_the_server_is_closed() -> None:
    """After all that is full, to who waits for it in another thread, and again to who asks again."""
    with serving(num_buffers=4) as server, ThreadPoolExecutor(1) as pool:
        dataset = EchoDataset(server, EXAMPLE)
        fill(server, 0, 1, 2)
        came = threading.Event()
        server.submit(numpy_example(EXAMPLE))  # which is not a batch

        def iterate() -> list[int]:
            found = []
            for batch in dataset:
                found.append(number_of(batch))
                if len(found) == 3:
                    came.set()
            return found

        task = pool.submit(iterate)
        assert came.wait(ANSWER_S)
        server.close()
        assert task.result(ANSWER_S) == [0, 1, 2]
        ended = iter(dataset)
        assert [*ended, *ended, *dataset] == []


def test_full_batches_come_from_a_server_that_was_closed() -> None:
    with serving() as server:
        fill(server, 0, 1)
        server.close()
        assert numbers(EchoDataset(server, EXAMPLE)) == [0, 1]


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "share"])
@pytest.mark.parametrize("pin_memory", [True, False], ids=["pinned", "pageable"])
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_through_a_loader(copy: bool, pin_memory: bool) -> None:
    with serving() as server, filling(server, *range(8)):
        loader = DataLoader(EchoDataset(server, EXAMPLE, copy=copy), batch_size=None, pin_memory=pin_memory)
        for first in (0, 4):  # two epochs
            assert numbers(itertools.islice(loader, 4)) == [*range(first, first + 4)]
        with pytest.raises(TypeError, match="no len"):
            len(loader)
        server.close()


def test_a_loaders_workers_are_refused() -> None:
    """A forked one by itself, rather than by a loader, which takes 5 seconds to end one that raised."""
    context = multiprocessing.get_context("fork")
    with serving() as server, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 has it of any fork beside threads
        dataset = EchoDataset(server, EXAMPLE)
        fill(server, 0)
        assert numbers(itertools.islice(dataset, 1)) == [0]  # so its thread runs, and waits
        batches, (ours, theirs) = iter(dataset), context.Pipe()
        worker = context.Process(target=_refused, args=(theirs, batches, dataset))
        worker.start()
        try:
            assert ours.poll(ANSWER_S)
            errors = ours.recv()
        finally:
            worker.kill()
            worker.join()
        server.close()
    assert len(errors) == 2
    for text in errors:
        assert re.match(
            rf"an EchoDataset cannot be used in process {worker.pid}: .*{os.getpid()} only.*workers=0", text
        )


def _refused(pipe: Any, batches: Iterator[Any], dataset: EchoDataset) -> None:
    errors = []
    for ask in (batches.__next__, dataset.__iter__):
        try:
            ask()
        except RuntimeError as error:
            errors.append(str(error))
    pipe.send(errors)


def test_a_loaders_workers_that_are_spawned_are_refused() -> None:
    with serving() as server, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Got pickle error when attempting to start a worker", UserWarning)
        loader = DataLoader(EchoDataset(server, EXAMPLE), None, num_workers=1, multiprocessing_context="spawn")
        with pytest.raises(TypeError, match=f"cannot be pickled.*process {os.getpid()} only.*num_workers=0"):
            next(iter(loader))


def test_it_neither_pickles_nor_has_a_length() -> None:
    with serving() as server:
        dataset: Any = EchoDataset(server, EXAMPLE)
        with pytest.raises(TypeError, match="num_workers=0"):
            pickle.dumps(dataset)
        with pytest.raises(TypeError, match="has no len"):
            len(dataset)


# Whose memory it is.


def test_copies_are_the_callers() -> None:
    with serving(num_buffers=2) as server, filling(server, *range(20)):
        kept = list(itertools.islice(EchoDataset(server, EXAMPLE), 20))
        server.close()
    assert numbers(kept) == [*range(20)]
    for batch in kept:
        batch["bytes"].fill_(255)
    assert len({batch["bytes"].data_ptr() for batch in kept}) == 20
    assert sorted(int(batch["id"][0]) for batch in kept) == [*range(20)]


def test_without_copies_it_is_the_servers_memory() -> None:
    """Which has two slots here, and one given back is overwritten as soon as samples come."""
    watched = Watched(serving(num_buffers=2))
    with watched as server:
        batches = iter(EchoDataset(watched, EXAMPLE, copy=False))
        fill(server, 0, 1)
        first = next(batches)
        assert first["id"].data_ptr() == watched.last["id"].__array_interface__["data"][0]
        assert number_of(first) == 0
        first["bytes"] += 7  # it may be changed
        assert watched.last["bytes"][0, 0] == 7
        assert watched.calls == 1  # so nothing is taken ahead
        second = next(batches)
        fill(server, 2)
        assert number_of(second) == 1
        third = next(batches)
        assert third["id"].data_ptr() == first["id"].data_ptr() != second["id"].data_ptr()
        assert number_of(first) == number_of(third) == 2
        server.close()


def test_a_batch_of_the_servers_memory_outlives_the_server() -> None:
    example = torch.zeros(1 << 20)  # so large that the system takes it back if it is freed
    server = echo.Server(numpy_example(example), batch_size=1)
    server.submit(np.ones(1 << 20, np.float32))
    (batch,) = itertools.islice(EchoDataset(server, example, copy=False), 1)
    server.close()
    del server
    gc.collect()
    assert batch.sum() == 1 << 20


class Watched:
    """A server whose ``sample()`` is seen."""

    def __init__(self, serving: contextlib.AbstractContextManager[echo.Server]) -> None:
        self._serving = serving
        self.calls = 0
        self.asked = threading.Semaphore(0)
        self.last: Any = None

    def __enter__(self) -> echo.Server:
        self._server = self._serving.__enter__()
        return self._server

    def __exit__(self, *error: Any) -> None:
        self._serving.__exit__(*error)

    def sample(self) -> Any:
        self.calls += 1
        self.asked.release()
        sample = self._server.sample()
        self.last = sample and sample.batch
        return sample


# Who may ask.


def test_each_batch_goes_to_one_of_several_threads() -> None:
    with serving() as server, ThreadPoolExecutor(4) as pool, filling(server, *range(200)):
        dataset = EchoDataset(server, EXAMPLE)
        tasks = [pool.submit(lambda: numbers(itertools.islice(dataset, 50))) for _ in range(4)]
        found = [task.result(ANSWER_S) for task in tasks]
        server.close()
    assert sorted(itertools.chain(*found)) == [*range(200)]
    assert all(some == sorted(some) for some in found)


def test_without_copies_a_second_consumer_is_refused() -> None:
    """Until the iteration of the first is over, or is dropped."""
    with serving() as server, ThreadPoolExecutor(1) as pool, filling(server, *range(3)):
        dataset = EchoDataset(server, EXAMPLE, copy=False)

        def take_one() -> list[int]:
            return numbers(itertools.islice(dataset, 1))

        ours = iter(dataset)
        assert number_of(next(ours)) == 0
        with pytest.raises(RuntimeError, match=r"^another iteration over this EchoDataset goes on.*copy=True"):
            take_one()
        with pytest.raises(RuntimeError, match=r"^another iteration"):
            pool.submit(take_one).result(ANSWER_S)
        with pytest.raises(RuntimeError, match=r"^MainThread iterates over this EchoDataset.*copy=True"):
            pool.submit(next, ours).result(ANSWER_S)
        assert number_of(next(ours)) == 1
        del ours
        assert pool.submit(take_one).result(ANSWER_S) == [2]
        server.close()


def test_without_copies_two_iterations_do_not_take_turns() -> None:
    with serving() as server, filling(server, 0):
        dataset = EchoDataset(server, EXAMPLE, copy=False)
        with pytest.raises(RuntimeError, match="another iteration"):
            next(zip(dataset, dataset, strict=True))


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "share"])
def test_ctrl_c_gets_through_and_loses_nothing(copy: bool) -> None:
    watched = Watched(serving())
    with watched as server:
        dataset = EchoDataset(watched, EXAMPLE, copy=copy)
        for number in range(3):
            _interrupted(lambda: next(iter(dataset)), watched.asked)
            fill(server, number)
            assert numbers(itertools.islice(dataset, 1)) == [number]
        assert 3 <= watched.calls <= 3 + copy
        server.close()


def _interrupted(call: Callable[[], object], begun: threading.Semaphore) -> None:
    """The call, which would block, ends with Ctrl-C once somebody waits in ``sample()``."""
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        assert begun.acquire(timeout=ANSWER_S)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)

    def call_while_it_may_come() -> None:
        thread.start()
        call()

    with pytest.raises(KeyboardInterrupt):
        call_while_it_may_come()
    thread.join()


def test_what_sample_raises_is_raised_and_the_next_call_asks_again() -> None:
    class Server:
        answers: Iterator[Any] = iter([OSError("no"), KeyError("none"), None])

        def sample(self) -> Any:
            answer = next(self.answers)
            if answer is not None:
                raise answer
            return None

    batches = iter(EchoDataset(Server(), EXAMPLE))
    with pytest.raises(OSError, match=r"^no$"):
        next(batches)
    with pytest.raises(KeyError):
        next(batches)
    assert [*batches] == []


def test_an_error_that_was_handled_keeps_nothing() -> None:
    """As one for want of memory on a device would: no cycle through its traceback waits for the garbage collector."""

    class Memory:
        pass

    class Server:
        memory: weakref.ref[Memory] | None = None

        def sample(self) -> Any:
            memory = Memory()
            self.memory = weakref.ref(memory)
            raise OSError

    server = Server()
    batches = iter(EchoDataset(server, EXAMPLE))
    gc.disable()
    try:
        with contextlib.suppress(OSError):
            next(batches)
        first = server.memory
        with contextlib.suppress(OSError):
            next(batches)  # so the thread has done with the first
    finally:
        gc.enable()
    assert first is not None
    assert first() is None


def test_who_waits_long_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each batch: not once for each look at what is there, which would be so many looks in the next wait, too."""
    polls = wakeups = 0

    def see(frame: Any, event: str, function: Any) -> None:
        nonlocal polls, wakeups
        if getattr(function, "__qualname__", "") == "SimpleQueue.get":
            polls += event == "c_call"
            wakeups += event == "c_return"
            if event == "c_call" and polls in (20, 23):
                fill(server, polls)

    monkeypatch.setattr(prefetch, "POLL_INTERVAL_S", 0.001)
    with serving() as server:
        batches = iter(EchoDataset(server, EXAMPLE, copy=False))
        sys.setprofile(see)
        try:
            found = numbers(itertools.islice(batches, 2))
        finally:
            sys.setprofile(None)
        server.close()
    assert found == [20, 23]
    assert wakeups <= 2


def test_a_program_may_end_at_any_moment() -> None:
    """While batches come, are taken and copied, and nobody has closed the server; while threads wait for their turn."""
    program = (
        "import itertools, threading, time, echo, numpy as np, echo_torch\n"
        "example = np.zeros(1 << 12, np.uint8)\n"
        "server = echo.Server(example, batch_size=32, transport=echo.TcpTransport(port=0))\n"
        "server.start()\n"
        "print(server.port, flush=True)\n"
        "echo_torch.learner.prefetch.EXIT_TIMEOUT_S = 1000\n"
        "idle = echo.Server(example, batch_size=32)\n"
        "for _ in range(8):\n"
        "    waiting = iter(echo_torch.EchoDataset(idle, example)).__next__\n"
        "    threading.Thread(target=waiting, daemon=True).start()\n"
        "while sum(thread.name == 'echo_torch dataset' for thread in threading.enumerate()) < 8:\n"
        "    time.sleep(0.001)\n"
        "print(sum(map(len, itertools.islice(echo_torch.EchoDataset(server, example), 20))))\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            client = TcpClient("127.0.0.1", int(process.stdout.readline()), np.zeros(1 << 12, np.uint8))
            rows = [np.zeros((32, 1 << 12), np.uint8)]
            with contextlib.suppress(ConnectionClosedError):
                while True:
                    client.send_rows(rows, timeout=ANSWER_S)
            client.close()
            out, err = process.communicate(timeout=ANSWER_S / 2)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "640\n"), err


# What is wrong.

OTHERS = {
    "dtype": ({"id": torch.tensor(0.0).double(), "bytes": EXAMPLE["bytes"]}, "leaf 1: .*'id'.*int64.*float64"),
    "shape": ({"id": EXAMPLE["id"], "bytes": torch.zeros(4, dtype=torch.uint8)}, r"leaf 0: .*\[B, 5\].*\[B, 4\]"),
    "key": ({"i": EXAMPLE["id"], "bytes": EXAMPLE["bytes"]}, r"leaf 1: .*\['id'\].*\['i'\]"),
    "order": (OrderedDict(id=EXAMPLE["id"], bytes=EXAMPLE["bytes"]), r"leaf 0: .*\['bytes'\].*\['id'\]"),
    "fewer": ({"id": EXAMPLE["id"]}, r"leaf 1: the server has \['id'\]: int64 \[B\], the example nothing"),
    "bytes": ({"id": EXAMPLE["id"], "bytes": torch.zeros(5).bfloat16()}, "uint16.*, for torch.bfloat16"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_server_for_other_samples(what: str) -> None:
    example, message = OTHERS[what]
    with serving() as server:
        fill(server, 0, 1)
        batches = iter(EchoDataset(server, example))
        for _ in range(2):
            with pytest.raises(SpecMismatchError, match=rf"(?s)^Server spec mismatch.*{message}.*numpy_example"):
                next(batches)
        server.close()


def test_a_server_for_a_list_where_the_example_has_a_dict() -> None:
    with serving([B, B]) as server:
        for _ in range(BATCH):
            server.submit(numpy_example([B, B]))
        with pytest.raises(SpecMismatchError, match=r"(?s)leaf 0: \[0\] is in a dict .* a list .*leaf 1: \[1\] is"):
            next(iter(EchoDataset(server, {0: B, 1: B})))
        server.close()


def test_a_server_of_other_numbers_of_the_size_of_bfloat16() -> None:
    example = torch.zeros(3).bfloat16()
    with serving(np.zeros(3, np.float16)) as server:
        for _ in range(BATCH):
            server.submit(np.full(3, 0x3F80, np.uint16))
        (batch,) = itertools.islice(EchoDataset(server, example), 1)
        assert torch.equal(batch, torch.ones(BATCH, 3).bfloat16())
        server.close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"server": 1}, TypeError, "^server: got 1, expected an echo.Server"),
        ({"copy": None}, TypeError, "^copy: got None"),
        ({"device": "cuda:99"}, ValueError, "^device: got 'cuda:99', which cannot be used here"),
        ({"device": "gpu"}, ValueError, "^device: got 'gpu'"),
        ({"example": {"name": "x"}}, TypeError, r"example\['name'\]: got str"),
        (
            {"example": np.zeros(2, "M8[s]")},
            TypeError,
            "^example: got numpy dtype datetime64.s., expected one that PyTorch",
        ),
        ({"example": torch.zeros(0)}, ValueError, "no bytes"),
    ],
)
def test_arguments_that_are_wrong(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with serving() as server, pytest.raises(error, match=message):
        EchoDataset(**{"server": server, "example": EXAMPLE, **arguments})


# On a device, which is made up here, and as late as can be.


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice()
    device.install(monkeypatch)
    monkeypatch.setattr(accelerator, "device_type", lambda: "cpu")
    return device


def test_a_slot_is_kept_until_the_device_has_copied_it(device: FakeDevice) -> None:
    """And the next batch is copied while the caller has the last, whose memory is kept for the stream it works on."""
    watched = Watched(serving(num_buffers=2))
    with watched as server, ThreadPoolExecutor(1) as pool, filling(server, *range(6)):
        batches = iter(EchoDataset(watched, EXAMPLE, device="cpu", copy=False))
        task, kept = pool.submit(next, batches), []
        for number in range(5):
            device.waits.get(timeout=ANSWER_S)
            assert watched.calls == number + 1
            assert number > 0 or not task.done()
            device.run()
            kept.append(task.result(ANSWER_S) if number == 0 else next(batches))
            assert [id(leaf) for leaf in device.used[-2:]] == [id(leaf) for leaf in optree.tree_leaves(kept[-1])]
        device.waits.get(timeout=ANSWER_S)
        device.run()
        assert numbers(kept) == [*range(5)]
        assert device.freed_too_soon == 0
        server.close()


def test_that_a_slot_given_back_too_soon_is_noticed(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "synchronize_stream", lambda stream: None)
    with serving(num_buffers=2) as server, filling(server, *range(6)):
        kept = list(itertools.islice(EchoDataset(server, EXAMPLE, device="cpu"), 5))
        device.run()
        server.close()
        assert device.freed_too_soon > 0 or [int(batch["id"][0]) for batch in kept] != [*range(5)]


def test_a_batch_for_which_the_device_has_no_room_is_an_error_once(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = iter([True, True, True, False, True, True])  # for each of two leaves

    def empty_like(tensor: torch.Tensor, stream: Any) -> torch.Tensor:
        if not next(room):
            raise torch.OutOfMemoryError("out of memory")
        return device.empty_like_on_stream(tensor, stream)

    monkeypatch.setattr(accelerator, "empty_like_on_stream", empty_like)
    monkeypatch.setattr(accelerator, "synchronize_stream", lambda stream: device.run())
    with serving() as server, filling(server, 0, 1, 2):
        batches = iter(EchoDataset(server, EXAMPLE, device="cpu"))
        assert number_of(next(batches)) == 0
        with pytest.raises(torch.OutOfMemoryError):
            next(batches)
        assert number_of(next(batches)) == 2
        server.close()
