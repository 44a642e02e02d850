"""What a real ``echo.Server`` receives is, byte for byte and in order, what was sent."""

from __future__ import annotations

import collections
import enum
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import echo
import ml_dtypes
import numpy as np
import optree
import pytest
import torch
from compare import assert_same, to_numpy
from learner_process import Learner
from torch.utils.data import DataLoader, Dataset

import echo_torch
from echo_torch import Client, EchoSink, numpy_example


def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


EXAMPLE = {
    "index": zeros(torch.int64),
    "floats": (
        zeros(torch.float32, 3),
        zeros(torch.float64, 2, 2),
        zeros(torch.float16, 5),
        zeros(torch.bfloat16, 3, 2),
        zeros(torch.complex64, 2),
    ),
    "ints": collections.OrderedDict(
        w=zeros(torch.uint8, 7),
        v=zeros(torch.int8, 3, 1),
        u=zeros(torch.int16, 3),
        t=zeros(torch.int32, 1),
        s=[zeros(torch.int64, 2, 2), None],
    ),
    "flags": zeros(torch.bool, 5),
    "scalars": [zeros(torch.bfloat16), zeros(torch.float32), zeros(torch.bool), zeros(torch.uint8)],
    "empty": zeros(torch.float32, 0, 3),
}
PAYLOAD = sum(leaf.nbytes for leaf in optree.tree_leaves(numpy_example(EXAMPLE)))


class Bench:
    """A learner for samples like `EXAMPLE`; every sample that is made for it has an index of its own."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._next = 0
        self._rows = 0
        self.address = ("127.0.0.1", learner.port)

    def batch(self, rows: int) -> Any:
        """A batch of random bits."""
        first, self._next = self._next, self._next + rows
        random = np.random.default_rng(first)

        def fill(leaf: torch.Tensor) -> torch.Tensor:
            shape = (rows, *leaf.shape)
            raw = random.integers(0, 256, math.prod(shape) * leaf.element_size(), np.uint8)
            if not len(raw):
                return torch.empty(shape, dtype=leaf.dtype)
            return torch.from_numpy(raw & 1 if leaf.dtype is torch.bool else raw).view(leaf.dtype).reshape(shape)

        return {**optree.tree_map(fill, EXAMPLE), "index": torch.arange(first, first + rows)}

    def sink(self, **options: Any) -> EchoSink:
        """One that sends nothing twice: the tests wait for what they sent before they close it."""
        return EchoSink(*self.address, EXAMPLE, resend_at_close=False, **options)

    def received(self, rows: int) -> Any:
        """Everything, after ``rows`` samples more have arrived."""
        self._rows += rows
        return self._learner.take(self._rows)

    def check(self, *batches: Any) -> None:
        """Wait for the batches; each must have arrived as it is, its rows in their order."""
        everything = self.received(sum(len(batch["index"]) for batch in batches))
        for batch in batches:
            mine = np.isin(everything["index"], batch["index"].numpy())
            assert_same(optree.tree_map(lambda leaf, mine=mine: leaf[mine], everything), to_numpy(batch))


def rows_of(batch: Any) -> Iterator[Any]:
    for row in range(len(batch["index"])):
        yield optree.tree_map(lambda leaf, row=row: leaf[row, ...], batch)


def join(batches: list[Any]) -> Any:
    return optree.tree_map(lambda *leaves: torch.cat(leaves), *batches)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Learner(numpy_example(EXAMPLE)) as learner:
        yield Bench(learner)


def strided(leaf: torch.Tensor) -> torch.Tensor:
    return torch.stack([leaf, torch.zeros_like(leaf)], dim=-1)[..., 0]


def transposed(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.movedim(0, -1).contiguous().movedim(-1, 0)


def expanded(leaf: torch.Tensor) -> torch.Tensor:
    """All rows the same, and one in memory; the index stays what it is."""
    return leaf if leaf.dtype is torch.int64 and leaf.dim() == 1 else leaf[:1].expand(leaf.shape)


def offset(leaf: torch.Tensor) -> torch.Tensor:
    return torch.cat([leaf[-1:], leaf])[1:]


def with_grad(leaf: torch.Tensor) -> torch.Tensor:
    """A leaf of the graph or, every other time, the result of an operation."""
    if not leaf.is_floating_point() and not leaf.is_complex():
        return leaf
    leaf = leaf.clone().requires_grad_()
    return leaf if leaf.dim() == 1 else leaf.view_as(leaf)


def arrays(leaf: torch.Tensor) -> Any:
    """numpy where it has the dtype, in Fortran order; a mixed batch."""
    return leaf if leaf.dtype is torch.bfloat16 else np.asfortranarray(leaf.numpy())


@pytest.mark.parametrize(
    "lay_out", [strided, transposed, expanded, offset, with_grad, arrays], ids=lambda f: f.__name__
)
def test_any_layout_arrives(bench: Bench, lay_out: Callable[[torch.Tensor], Any]) -> None:
    """For all dtypes at once, nested, 0-d and empty leaves among them; as a batch and sample by sample."""
    batch = optree.tree_map(lay_out, bench.batch(64))
    with bench.sink() as sink:
        sink.send(optree.tree_map(lambda leaf: leaf[:40], batch))
        for row in rows_of(optree.tree_map(lambda leaf: leaf[40:], batch)):
            sink.send(row)
        bench.check({**batch, "index": torch.as_tensor(batch["index"])})


def test_ragged_batches_arrive(bench: Bench) -> None:
    """Of any sizes, 0 and 1 included."""
    batches = [bench.batch(rows) for rows in (30, 30, 0, 1, 29, 6)]
    with bench.sink() as sink:
        for batch in batches:
            sink.send(batch)
        bench.check(join(batches))


@pytest.mark.parametrize("extra", [{"resend_acked": 0}, {"resend_acked": 8}, {"max_inflight_msgs": 1}], ids=repr)
def test_batches_larger_than_the_ring_arrive(bench: Bench, extra: dict[str, Any]) -> None:
    """They go through in pieces, many times around."""
    batches = [bench.batch(rows) for rows in (320, 1, 95)]
    with bench.sink(buffer_bytes=11 * PAYLOAD, **extra) as sink:
        for batch in batches:
            sink.send(batch)
        bench.check(join(batches))


def test_a_batch_may_be_changed_after_send(bench: Bench) -> None:
    batches = [bench.batch(32) for _ in range(8)]
    reused = optree.tree_map(torch.clone, batches[0])
    with bench.sink() as sink:
        for batch in batches:
            optree.tree_map_(lambda mine, new: mine.copy_(new), reused, batch)
            sink.send(reused)
        optree.tree_map_(torch.Tensor.zero_, reused)
        bench.check(join(batches))


def test_other_containers_and_key_orders_arrive_alike(bench: Bench) -> None:
    """Leaves travel in the example's order, whatever the batch's."""

    class Floats(NamedTuple):
        a: Any
        b: Any
        c: Any
        d: Any
        e: Any

    batch = bench.batch(32)
    other = collections.UserDict(
        {
            **dict(reversed(batch.items())),
            "floats": Floats(*batch["floats"]),
            "ints": dict(reversed(batch["ints"].items())),
            "scalars": tuple(batch["scalars"]),
        }
    )
    with bench.sink() as sink:
        sink.send(other)
        bench.check(batch)


@pytest.mark.parametrize("capacity", [10, 10_000])
def test_threads_on_one_sink_keep_their_own_order(bench: Bench, capacity: int) -> None:
    """Samples of several senders mix, but none is torn, lost or overtaken by another of its thread."""
    batches = [[bench.batch(rows) for rows in (1, 20, 7, 36)] for _ in range(4)]
    begin = threading.Barrier(4)

    def work(sink: EchoSink, mine: list[Any]) -> None:
        begin.wait(30)
        for batch in mine:
            sink.send(batch)

    with bench.sink(buffer_bytes=capacity * PAYLOAD) as sink:
        threads = [threading.Thread(target=work, args=(sink, mine)) for mine in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        sink.wait()
        bench.check(*map(join, batches))


def test_a_sink_on_the_stock_client_delivers_the_same(bench: Bench) -> None:
    batch = bench.batch(64)
    sink = bench.sink(client=echo.TcpClient)
    sink.send(optree.tree_map(lambda leaf: leaf[:50], batch))
    for row in rows_of(optree.tree_map(lambda leaf: leaf[50:], batch)):
        sink.send(row)
    sink.wait()
    stats = sink.stats()
    assert (stats.samples_sent, stats.samples_acked, stats.bytes_acked) == (64, 64, 64 * PAYLOAD)
    bench.check(batch)
    sink.close()


@pytest.mark.parametrize("make", [echo.TcpClient, echo_torch.TcpClient], ids=["stock", "ours"])
def test_both_clients_deliver_the_same(bench: Bench, make: Callable[..., Client]) -> None:
    """`echo_torch.TcpClient` is a drop-in: one call for the other, one arrival for the other."""
    batch = bench.batch(32)
    client = make(*bench.address, numpy_example(EXAMPLE), max_inflight_msgs=5)
    for row in rows_of(to_numpy(batch)):
        client.send(row)
    client.wait()
    bench.check(batch)
    client.close()


class Shelf:
    """A user's client: keeps the samples in memory, and is strict about its use."""

    def __init__(self, host: str, port: int, data_sample: Any, max_inflight_msgs: int) -> None:
        self.made_with = (host, port, data_sample, max_inflight_msgs)
        self.samples: list[Any] = []
        self.waits = 0
        self.closed = False

    def send(self, data: Any) -> None:
        self.samples.append(optree.tree_map(np.copy, data))

    def wait(self) -> None:
        if self.closed:
            raise ConnectionError("closed")
        self.waits += 1

    def close(self) -> None:
        self.closed = True


def test_a_users_client_is_given_numpy_samples_like_the_example() -> None:
    """Made with the four arguments that ``echo.TcpClient`` takes too; waited for, closed, and closed again."""
    made: list[Shelf] = []

    def make(*args: Any) -> Client:
        made.append(Shelf(*args))
        return made[0]

    example = {"b": torch.zeros(2, dtype=torch.bfloat16), "a": (0, None)}
    sink = EchoSink("nowhere", 1, example, client=make, max_inflight_msgs=7)
    assert not made
    sink.send({"a": [torch.arange(3)], "b": torch.ones(3, 2, dtype=torch.bfloat16)})
    sink.send({"a": [3], "b": torch.ones(2, dtype=torch.bfloat16)})
    sink.wait()
    sink.close()
    sink.close()
    (shelf,) = made
    assert shelf.made_with[:2] == ("nowhere", 1)
    assert shelf.made_with[3] == 7
    assert_same(shelf.made_with[2], numpy_example(example))
    for index, sample in enumerate(shelf.samples):
        assert_same(sample, {"b": np.full(2, 0x3F80, np.uint16), "a": (np.array(index), None)})
    assert len(shelf.samples) == 4
    assert shelf.waits >= 1
    assert shelf.closed


class Samples(Dataset[Any]):
    """``size`` samples, each made by ``make(index)``."""

    def __init__(self, make: Callable[[int], Any], size: int = 96) -> None:
        self._make = make
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


def as_tuple(index: int) -> Any:
    return torch.full((2, 3), index / 7), torch.tensor(index, dtype=torch.int32), index % 10


def as_dict(index: int) -> Any:
    return {"y": index, "x": torch.full((4,), index, dtype=torch.bfloat16), "meta": {"weight": index / 3, "last": True}}


def as_array(index: int) -> Any:
    return np.full((3, 2), index, np.uint8), index


@pytest.mark.parametrize("make", [as_tuple, as_dict, as_array], ids=lambda f: f.__name__)
def test_a_plain_dataloader_needs_no_more_than_its_first_sample(make: Callable[[int], Any]) -> None:
    """``dataset[0]`` describes what ``default_collate`` makes of it, the ragged last batch included."""
    dataset = Samples(make)
    with (
        Learner(numpy_example(dataset[0])) as learner,
        EchoSink("127.0.0.1", learner.port, dataset[0], resend_at_close=False) as sink,
    ):
        for batch in DataLoader(dataset, batch_size=20):
            sink.send(batch)
        sink.wait()
        got = learner.take(len(dataset))
    for index in range(len(dataset)):
        mine = optree.tree_map(lambda leaf, index=index: leaf[index, ...], got)
        expected = optree.tree_map(np.asarray, to_numpy(dataset[index]))
        assert_same(mine, expected)


def test_samples_of_several_connections_all_arrive(bench: Bench) -> None:
    """Several sinks at once, each with its own order."""
    batches = [bench.batch(64) for _ in range(3)]
    sinks = [bench.sink() for _ in batches]
    for first in range(0, 64, 16):
        for sink, batch in zip(sinks, batches, strict=True):
            sink.send(optree.tree_map(lambda leaf, first=first: leaf[first : first + 16], batch))
    for sink in sinks:
        sink.wait()
    bench.check(*batches)
    for sink in sinks:
        sink.close()


class Action(enum.IntEnum):
    LEFT = 3
    RIGHT = 4


class Seconds(float):
    """A number of a class of its own."""


def of_32(dtype: Any, *shape: int) -> np.ndarray[Any, Any]:
    """32 samples of different numbers."""
    return np.arange(1, 1 + 32 * math.prod(shape)).reshape(32, *shape).astype(dtype)


RECORD = np.dtype([("x", ">f4"), ("flags", "?"), ("y", "<i8", (2,))], align=True)
KINDS: dict[str, tuple[Any, Any, Any]] = {
    # name: example, batch of 32, what must arrive
    "big-endian batch": (torch.zeros(3), of_32(">f4", 3), of_32("<f4", 3)),
    "big-endian example": (np.zeros(3, ">f4"), torch.from_numpy(of_32("<f4", 3)), of_32("<f4", 3)),
    "big-endian both": (np.zeros((), ">i8"), of_32(">i8"), of_32("<i8")),
    "big-endian complex": (np.zeros(2, ">c8"), of_32(">c8", 2) * 1j, of_32("<c8", 2) * 1j),
    "records": (
        np.zeros((), RECORD),
        np.array([(row, row % 2, (row, -row)) for row in range(32)], RECORD),
        np.array([(row, row % 2, (row, -row)) for row in range(32)], RECORD.newbyteorder("=")),
    ),
    "an array as dtype": (np.zeros((), "(2,)f4"), of_32("f4", 2), of_32("f4", 2)),
    "dates": (np.zeros(2, ">M8[ms]"), of_32(">M8[ms]", 2), of_32("<M8[ms]", 2)),
    "durations": (np.zeros(2, "m8[s]"), of_32("m8[s]", 2), of_32("m8[s]", 2)),
    "long doubles": (np.zeros(2, "g"), of_32("g", 2) / 3, of_32("g", 2) / 3),
    "void": (np.zeros((), "V4"), of_32("i4").view("V4"), of_32("i4").view("V4")),
    "bools of other bytes": (np.zeros((), "?"), of_32("u1").view("?"), of_32("u1").view("?")),
    "ml_dtypes batch": (torch.zeros(2, dtype=torch.bfloat16), of_32(ml_dtypes.bfloat16, 2), 16),
    "ml_dtypes example": (np.zeros(2, ml_dtypes.bfloat16), torch.from_numpy(of_32("f4", 2)).to(torch.bfloat16), 16),
    "ml_dtypes float8": (torch.zeros(2, dtype=torch.float8_e5m2), of_32(ml_dtypes.float8_e5m2, 2), 8),
    "scalars as [B, 1]": (torch.zeros(1), of_32("f4", 1), of_32("f4", 1)),
}


@pytest.mark.parametrize(("example", "batch", "expected"), KINDS.values(), ids=KINDS)
def test_what_is_accepted_arrives_as_the_numbers_that_were_meant(example: Any, batch: Any, expected: Any) -> None:
    if isinstance(expected, int):  # the bits of a dtype that numpy lacks
        as_torch = batch if isinstance(batch, torch.Tensor) else torch.from_numpy(batch.view(f"u{expected // 8}"))
        expected = as_torch.view(getattr(torch, f"uint{expected}")).numpy()
    with Learner(numpy_example({"x": example})) as learner:
        with EchoSink("127.0.0.1", learner.port, {"x": example}, resend_at_close=False) as sink:
            sink.send({"x": batch})
            sink.wait()
        arrived = learner.take(32)["x"]
    assert arrived.dtype.isnative
    assert arrived.dtype == expected.dtype
    assert repr(arrived.tolist()) == repr(expected.tolist())  # as text, for records hold arrays


def test_numbers_of_classes_of_their_own_arrive_as_numbers() -> None:
    """As ``default_collate`` takes them: an action of an enumeration is an int."""
    example = {"action": Action.LEFT, "seconds": Seconds(0), "reward": np.float64(0)}
    sent = [
        {"action": Action.RIGHT, "seconds": Seconds(0.5), "reward": 1.5},
        {"action": 7, "seconds": 2.5, "reward": np.array(3.5, ">f8")},
    ]
    with Learner(numpy_example(example)) as learner:
        with EchoSink("127.0.0.1", learner.port, example, resend_at_close=False) as sink:
            for sample in sent * 16:
                sink.send(sample)
            sink.wait()
        arrived = learner.take(32)
    assert {name: leaf.dtype for name, leaf in arrived.items()} == {
        "action": np.int64, "seconds": np.float64, "reward": np.float64,
    }  # fmt: skip
    assert arrived["action"].tolist() == [4, 7] * 16
    assert arrived["seconds"].tolist() == [0.5, 2.5] * 16
    assert arrived["reward"].tolist() == [1.5, 3.5] * 16
