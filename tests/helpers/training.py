"""What the tests of the trainers share: handwritten digits with numbers, a model, and a learner for them."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calls import eventually
from learner_process import Learner
from torch import nn
from torch.utils.data import Dataset

from echo_torch import EchoSink

Item = dict[str, torch.Tensor]

_SKLEARN = importlib.util.find_spec("sklearn")
assert _SKLEARN is not None
assert _SKLEARN.origin is not None
# What `sklearn.datasets.load_digits` reads; to import it takes seconds, in each process that trains.
_DATA = np.loadtxt(Path(_SKLEARN.origin).parent / "datasets" / "data" / "digits.csv.gz", np.float32, delimiter=",")
IMAGES = torch.from_numpy(_DATA[:, :-1]) / 16
LABELS = torch.from_numpy(_DATA[:, -1]).long()


TAKE_S = 30.0
"""Seconds in which everything sent must arrive."""
STALLING_COUNT = 160
"""So many digits stall a paused learner. It acks about 70 of them."""
_FILLER = {"id": np.array(-1), "image": np.zeros(64, np.float32), "labels": np.array(-1)}


class Digits(Dataset[Item]):
    """The digits numbered from ``first`` on: ``id`` int64 (), ``image`` float32 (64,), ``labels`` int64 ().

    After the last image, the images begin again. The numbers continue.
    """

    def __init__(self, count: int, first: int = 0) -> None:
        self._ids = range(first, first + count)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Item:
        return digit(self._ids[index])


def digit(number: int) -> Item:
    index = number % len(IMAGES)
    return {"id": torch.tensor(number), "image": IMAGES[index], "labels": LABELS[index]}


class Classifier(nn.Module):
    """A linear classifier. Takes the items of a batch by name, and returns ``loss`` and ``logits``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor, labels: torch.Tensor, id: torch.Tensor | None = None) -> Item:
        logits = self.layer(image)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class DigitLearner(Learner):
    """A server for digits, of which you can take any number.

    A server hands out full batches only, and may hang if they are small. So this one fills batches up with samples that
    are no digits, and leaves those out of the result. While it is paused, it acks fewer than `STALLING_COUNT` samples.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(_FILLER, num_buffers=2, **options)

    def take(self, samples: int) -> Any:
        deadline = time.monotonic() + TAKE_S
        while True:
            self.fill(_FILLER)
            got = super().take(max(1, super().received()))
            digits = got["id"] != _FILLER["id"]
            if digits.sum() >= samples:
                return {name: leaf[digits] for name, leaf in got.items()}
            if time.monotonic() > deadline:
                raise TimeoutError(f"{digits.sum()} of {samples} digits arrived")
            time.sleep(0.01)

    def received(self) -> int:
        return len(self.take(0)["id"])


def learner(**options: Any) -> DigitLearner:
    return DigitLearner(**options)


def sink_to(learner: Learner, **options: Any) -> EchoSink:
    return EchoSink("127.0.0.1", learner.port, Digits(1)[0], **options)


def arrived(learner: Learner, count: int) -> Counter[int]:
    """Wait for ``count`` samples; how often each number is among all that arrived. Their bytes must be the digits'."""
    got = learner.take(count)
    numbers = torch.from_numpy(got["id"])
    digits = numbers % len(IMAGES)
    assert torch.equal(torch.from_numpy(got["image"]), IMAGES[digits])
    assert torch.equal(torch.from_numpy(got["labels"]), LABELS[digits])
    return Counter(numbers.tolist())


def wait_for_numbers(learner: Learner, expected: Counter[int]) -> Counter[int]:
    """Wait until all of ``expected`` arrived; how often each of these numbers did."""
    eventually(lambda: not expected - arrived(learner, 1))
    got = arrived(learner, 1)
    return Counter({number: got[number] for number in expected})


def numbers_of(batches: Iterable[Item]) -> Counter[int]:
    """How often each number is in what was recorded."""
    return Counter(number for batch in batches for number in batch["id"].tolist())
