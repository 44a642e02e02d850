"""Samples that carry a number, with bytes that depend on the number. Nothing here needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np

Batch = dict[str, Any]

FILLER = -1
"""The number of samples that only fill the server's last batch."""

_NUMBER_BYTES = 8
_NOISE = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
_STEP = 31
"""How far apart in the noise the bytes of consecutive samples begin, so that a mixture of two samples shows."""


def example(size: int) -> Batch:
    """Return a sample of ``size`` bytes."""
    return {"check": np.zeros(size - _NUMBER_BYTES, np.uint8), "id": np.zeros((), np.int64)}


def samples(first: int, count: int, size: int) -> Batch:
    """Return ``count`` samples of ``size`` bytes, numbered from ``first`` on."""
    ids = np.arange(first, first + count)
    return {"check": _checks(ids, size - _NUMBER_BYTES), "id": ids}


def fillers(count: int, size: int) -> Batch:
    ids = np.full(count, FILLER)
    return {"check": _checks(ids, size - _NUMBER_BYTES), "id": ids}


def digest(batch: Batch) -> Batch:
    """Return what a learner keeps: the numbers, and whether each sample has the bytes of its number."""
    check, ids = batch["check"], batch["id"]
    return {"id": ids.copy(), "right": (check == _checks(ids, check.shape[1])).all(axis=1)}


def _checks(ids: Any, size: int) -> Any:
    windows = np.lib.stride_tricks.sliding_window_view(_NOISE, size)
    return windows[ids * _STEP % len(windows)]
