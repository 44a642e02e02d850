"""Samples that carry a number, and bytes that only this number has; nothing here needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np

Batch = dict[str, Any]

FILLER = -1
"""The number of samples that only fill the server's last batch."""

_NUMBER_BYTES = 8
_NOISE = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
_STEP = 31
"""How far apart in the noise the bytes of consecutive samples begin: a mixture of two is seen."""


def example(size: int) -> Batch:
    """A sample of ``size`` bytes."""
    return {"check": np.zeros(size - _NUMBER_BYTES, np.uint8), "id": np.zeros((), np.int64)}


def samples(first: int, count: int, size: int) -> Batch:
    """The samples of ``size`` bytes with the numbers from ``first`` on."""
    ids = np.arange(first, first + count)
    return {"check": _checks(ids, size - _NUMBER_BYTES), "id": ids}


def fillers(count: int, size: int) -> Batch:
    ids = np.full(count, FILLER)
    return {"check": _checks(ids, size - _NUMBER_BYTES), "id": ids}


def digest(batch: Batch) -> Batch:
    """What a learner keeps: the numbers, and whether the bytes are theirs."""
    check, ids = batch["check"], batch["id"]
    return {"id": ids.copy(), "right": (check == _checks(ids, check.shape[1])).all(axis=1)}


def _checks(ids: Any, size: int) -> Any:
    windows = np.lib.stride_tricks.sliding_window_view(_NOISE, size)
    return windows[ids * _STEP % len(windows)]
