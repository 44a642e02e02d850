"""`SinkCollate` and `SinkDataset` in real loaders: what they yield is sent, by whatever process makes it."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, default_convert
from training import Digits, Item, arrived, digit, learner, numbers_of, sink_to

from echo_torch import DeliveryTimeoutError, EchoSink, SpecMismatchError
from echo_torch.callbacks.loop import SinkCallback
from echo_torch.ring.ring import SERVER_QUEUE_SAMPLES
from echo_torch.workers import Sent, SinkCollate, SinkDataset

COUNT = 36
BATCH = 8
FULL_SOON = 12 * 272
"""Bytes of a buffer for few samples more than the 8 of the tail."""
TOO_MANY = 400
"""Samples, several times as many as a server acks that is paused, and these buffers hold."""


def odd_ones(batch: Item) -> Item:
    chosen = batch["id"] % 2 == 1
    return {name: leaf[chosen] for name, leaf in batch.items()}


def reversed_collate(samples: list[Item]) -> Item:
    return default_collate(samples[::-1])


def loader(collate: SinkCollate, workers: int, method: str | None = None, count: int = COUNT) -> DataLoader[Item]:
    context = multiprocessing.get_context(method) if method else None
    return DataLoader(Digits(count), BATCH, num_workers=workers, collate_fn=collate, multiprocessing_context=context)


def some_repeated(got: Counter[int], expected: Counter[int], at_most: int) -> bool:
    """Whether all of ``expected`` came, nothing else, and of these no more than ``at_most`` once more."""
    return got >= expected and set(got) == set(expected) and 0 <= got.total() - expected.total() <= at_most


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (1, "spawn")])
def test_what_a_loader_yields_arrives(workers: int, method: str | None) -> None:
    """The sink is connected when a worker gets it. There, its connection repeats its tail, a batch at the most."""
    with learner() as server, sink_to(server) as sink:
        batches = list(loader(SinkCollate(sink), workers, method))
        assert [batch["id"].tolist() for batch in batches] == [
            list(range(first, min(first + BATCH, COUNT))) for first in range(0, COUNT, BATCH)
        ]
        sink.wait()
        assert sink.stats().samples_sent == COUNT
        assert some_repeated(arrived(server, COUNT), numbers_of(batches), at_most=SERVER_QUEUE_SAMPLES * workers)


def test_the_collate_function_makes_the_batch_and_select_what_is_sent_of_it() -> None:
    with learner() as server, sink_to(server) as sink:
        batches = list(loader(SinkCollate(sink, reversed_collate, select=odd_ones), 0))
        assert batches[0]["id"].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
        sink.wait()
        assert arrived(server, COUNT // 2) == Counter(range(1, COUNT, 2))
        assert sink.stats().samples_acked == COUNT // 2


def test_a_sample_that_does_not_fit_is_the_loaders_error() -> None:
    with learner() as server, sink_to(server) as sink:
        collate = SinkCollate(sink, lambda samples: {"image": torch.zeros(1)})
        with pytest.raises(SpecMismatchError, match=r"batch\['labels'\]: torch.int64 \[\]: missing"):
            next(iter(loader(collate, 0)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stalled_learner_is_waited_for_as_long_as_the_policy_says(workers: int) -> None:
    """It goes on when all batches are made, so that the workers need not wait for it once more when they end.

    What is not sent is counted where the loader is.
    """
    with learner() as server, sink_to(server, buffer_bytes=FULL_SOON, max_inflight_msgs=4) as sink:
        server.pause()
        patient = loader(SinkCollate(SinkCallback(sink, flush_timeout=0.1)), workers, count=TOO_MANY)
        seen = []
        for batch in patient:
            seen.append(batch)
            if len(seen) == len(patient):
                server.resume()
        assert numbers_of(seen) == Counter(range(TOO_MANY))
        assert server.received() < TOO_MANY - BATCH, "it never stalled"
        counted = sink.stats()
        assert counted.samples_sent + counted.dropped == TOO_MANY
        server.pause()
        policy = SinkCallback(sink, flush_timeout=0.1, on_stall="raise")
        strict = iter(loader(SinkCollate(policy), workers, count=TOO_MANY))  # its workers end with it: not before
        with pytest.raises(DeliveryTimeoutError, match="un-acked"):
            list(strict)
        assert sink.stats().dropped == counted.dropped, "that was raised"
        server.resume()
        del strict


# Loaders that do not batch.


def test_a_batch_that_the_dataset_made_is_one_item() -> None:
    made = default_collate([digit(number) for number in range(BATCH)])
    with learner() as server, sink_to(server) as sink:
        collate = sink.collate(default_convert, forward=False)
        assert list(DataLoader([made], batch_size=None, collate_fn=collate)) == [Sent(1)]
        assert list(DataLoader(SinkDataset([made], sink, forward=False), batch_size=None)) == [Sent(1)]
        assert sink.stats().samples_sent == 2 * BATCH


# What a dataset has besides its items.


class Plain(IterableDataset[Item]):
    def __iter__(self) -> Iterator[Item]:
        return map(digit, range(COUNT))


class Rich(Plain):
    """With all that a loader, or a trainer, may ask for."""

    epoch = given = 0

    def __len__(self) -> int:
        return COUNT

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def nowhere() -> EchoSink:
    return EchoSink("127.0.0.1", 1, digit(0))


def test_a_dataset_that_sends_has_what_the_dataset_has() -> None:
    """And its pickle, which a worker gets, has that of its own."""
    original = SinkDataset(Rich(), nowhere())
    copy = pickle.loads(pickle.dumps(original))
    assert len(DataLoader(copy, BATCH)) == len(DataLoader(Rich(), BATCH)) == 5
    copy.set_epoch(3)
    copy.load_state_dict({"given": 7})
    assert (copy.dataset.epoch, copy.state_dict()) == (3, {"given": 7})
    assert (original.dataset.epoch, original.state_dict()) == (0, {"given": 0})


METHODS = ("set_epoch", "state_dict", "load_state_dict")


def test_a_dataset_that_sends_has_nothing_that_the_dataset_lacks() -> None:
    """Whether it is asked by `hasattr`, or as protocols of newer versions of Python ask."""
    for dataset, has in ((Rich(), True), (Plain(), False)):
        sending = SinkDataset(dataset, nowhere())
        for name in METHODS:
            assert hasattr(sending, name) is has
            assert (inspect.getattr_static(sending, name, None) is not None) is has
    for name in METHODS:
        assert not hasattr(iter(sending), name)
    with pytest.raises(TypeError, match="'Plain' has no len"):
        len(DataLoader(sending, BATCH))


# What is refused.


@pytest.mark.parametrize("sink", ["x", None, SinkCallback])
def test_what_is_no_sink_is_refused(sink: Any) -> None:
    for make in (SinkCollate, functools.partial(SinkDataset, Plain())):
        with pytest.raises(TypeError, match=r"sink: got .*, expected an EchoSink or an .*loop.SinkCallback"):
            make(sink)


def test_what_cannot_be_called_is_refused() -> None:
    sink = nowhere()
    with pytest.raises(TypeError, match="collate_fn: got None, expected something to call"):
        sink.collate(None)
    for make in (sink.collate, functools.partial(SinkDataset, Plain(), sink)):
        with pytest.raises(TypeError, match="select: got 3, expected something to call, or None"):
            make(select=3)
