"""Which of several learners a batch, or each of its samples, goes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from echo_torch.samples.leaf import Array

Routing = Literal["round_robin", "least_inflight"] | Callable[[Any], Any]
"""How batches are spread; a function gives the learner's index for each sample."""
ROUTING_NAMES = ("round_robin", "least_inflight")


def check_routing(route: Any, failover: Any) -> None:
    """Raise TypeError or ValueError unless ``route`` is one, and ``failover`` says whether."""
    names = " or ".join(map(repr, ROUTING_NAMES))
    if isinstance(route, str):
        if route not in ROUTING_NAMES:
            raise ValueError(f"route: got {route!r}, expected {names}, or a function of a batch")
    elif not callable(route):
        raise TypeError(f"route: got {route!r}, expected {names}, or a function of a batch")
    if not isinstance(failover, bool):
        raise TypeError(f"failover: got {failover!r}, expected True or False")


def check_shards(given: Any, rows: int, learners: int) -> int | Array:
    """What a user's function gave for a batch, checked: one learner for all samples, or int64 ``(rows,)``.

    Raises:
        TypeError: no whole numbers.
        ValueError: another shape, or no learner's index.
    """
    shards = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    if shards.size and shards.dtype.kind not in "iu":  # an empty list has no whole numbers, and none that are not
        raise TypeError(f"route: the function gave {shards.dtype}, expected whole numbers, the index of a learner")
    if shards.shape not in ((), (rows,)):
        raise ValueError(f"route: the function gave {list(shards.shape)}, expected [] or [{rows}], one for each sample")
    wrong = shards[(shards < 0) | (shards >= learners)]
    if wrong.size:
        raise ValueError(
            f"route: the function gave {wrong.flat[0]}, expected 0 to {learners - 1}, the index of a learner"
        )
    if shards.size and (shards == shards.flat[0]).all():
        return int(shards.flat[0])
    return shards.astype(np.int64)
