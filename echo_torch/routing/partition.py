"""Checks the ``route`` argument of a sink, and what a user's routing function returns for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from echo_torch.samples.leaf import Array

Routing = Literal["round_robin", "least_inflight"] | Callable[[Any], Any]
"""How batches are spread: by name, or by a function from a batch to learner indices."""
# The names that `Routing` accepts.
ROUTING_NAMES = ("round_robin", "least_inflight")


def check_routing(route: Any, failover: Any) -> None:
    """Check the arguments ``route`` and ``failover`` of a sink.

    Raises:
        TypeError: ``route`` is neither a name nor a function, or ``failover`` is no bool.
        ValueError: ``route`` is an unknown name.
    """
    names = " or ".join(map(repr, ROUTING_NAMES))
    if isinstance(route, str):
        if route not in ROUTING_NAMES:
            raise ValueError(f"route: got {route!r}, expected {names}, or a function of a batch")
    elif not callable(route):
        raise TypeError(f"route: got {route!r}, expected {names}, or a function of a batch")
    if not isinstance(failover, bool):
        raise TypeError(f"failover: got {failover!r}, expected True or False")


def check_shards(given: Any, rows: int, learners: int) -> int | Array:
    """Check and convert what a user's routing function returned for a batch.

    Args:
        given: learner indices, shape ``()`` or ``(rows,)``: an int, a sequence, an array or a tensor.
        rows: number of samples in the batch.
        learners: number of learners.

    Returns:
        One learner's index for all samples, or an int64 array of shape ``(rows,)``.

    Raises:
        TypeError: the values are no whole numbers.
        ValueError: the shape is wrong, or a value is no learner's index.
    """
    shards = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    # NumPy turns an empty list into a float array, so check the dtype only if there are values.
    if shards.size and shards.dtype.kind not in "iu":
        raise TypeError(f"route: the function gave {shards.dtype}, expected whole numbers, the index of a learner")
    if shards.shape not in ((), (rows,)):
        raise ValueError(f"route: the function gave {list(shards.shape)}, expected [] or [{rows}], one for each sample")
    wrong = shards[(shards < 0) | (shards >= learners)]
    if wrong.size:
        raise ValueError(
            f"route: the function gave {wrong.flat[0]}, expected 0 to {learners - 1}, the index of a learner"
        )
    # One learner for all samples: the batch need not be split.
    if shards.size and (shards == shards.flat[0]).all():
        return int(shards.flat[0])
    return shards.astype(np.int64)
