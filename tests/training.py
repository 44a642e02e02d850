"""What the tests of the trainers share: handwritten digits that carry a number, a model, and what arrived of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from learner import Learner
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

from echo_torch import EchoSink, numpy_example

Item = dict[str, torch.Tensor]

_DATA = load_digits()
IMAGES = torch.from_numpy(_DATA.images / 16).float().reshape(-1, 64)
LABELS = torch.from_numpy(_DATA.target).long()


class Digits(Dataset[Item]):
    """The digits with the numbers from ``first`` on: ``id`` int64 (), ``image`` float32 (64,), ``labels`` int64 ()."""

    def __init__(self, count: int, first: int = 0) -> None:
        self._ids = range(first, first + count)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Item:
        number = self._ids[index]
        return {"id": torch.tensor(number), "image": IMAGES[number], "labels": LABELS[number]}


class Classifier(nn.Module):
    """A linear one; gives ``loss`` and ``logits``, and takes the items of a batch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor, labels: torch.Tensor, id: torch.Tensor | None = None) -> Item:
        logits = self.layer(image)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def learner(**options: Any) -> Learner:
    """A server for digits. It hands each sample out by itself, so that any number of them can be taken."""
    return Learner(numpy_example(Digits(1)[0]), 1, **options)


def sink_to(learner: Learner, **options: Any) -> EchoSink:
    return EchoSink("127.0.0.1", learner.port, Digits(1)[0], **options)


def arrived(learner: Learner, count: int) -> Counter[int]:
    """Wait for ``count`` samples; how often each number is among all that arrived. Their bytes must be the digits'."""
    got = learner.take(count)
    numbers = torch.from_numpy(got["id"])
    assert torch.equal(torch.from_numpy(got["image"]), IMAGES[numbers])
    assert torch.equal(torch.from_numpy(got["labels"]), LABELS[numbers])
    return Counter(np.asarray(got["id"]).tolist())


def numbers_of(batches: Iterable[Item]) -> Counter[int]:
    """How often each number is in what was recorded."""
    return Counter(number for batch in batches for number in batch["id"].tolist())
