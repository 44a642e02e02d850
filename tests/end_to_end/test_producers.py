"""Many sinks into one real server at once, from several processes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from learner_process import Learner
from producing import BATCH, BATCHES, EXAMPLE, SINKS, SinkProcess

FILLER = 255
ARRIVE_S = 30.0
TAIL = 8
"""Samples that each sink sends once more when it is closed."""


def together(processes: list[SinkProcess], method: str) -> list[Any]:
    for process in processes:
        process.start_call(method)
    return [process.result() for process in processes]


def everything(learner: Learner, samples: int) -> list[list[int]]:
    """The indexes that came of each sink, once all are there; a server gives full batches only, so it is filled up."""
    filler = {name: np.full_like(leaf, FILLER) for name, leaf in EXAMPLE.items()}
    deadline = time.monotonic() + ARRIVE_S
    while True:
        learner.fill(filler)
        arrived = learner.take(max(1, learner.received()))
        assert (arrived["obs"] == arrived["sink"][:, None].astype(np.uint8)).all()
        each = [arrived["index"][arrived["sink"] == sink].tolist() for sink in range(2 * SINKS)]
        if all(len(indexes) >= samples for indexes in each):
            return each
        assert time.monotonic() < deadline, [len(indexes) for indexes in each]


def test_what_many_sinks_send_arrives_in_the_order_of_each() -> None:
    """And nothing is left behind of them."""
    samples = BATCHES * BATCH
    with Learner(EXAMPLE) as learner, SinkProcess(learner.port, 0) as one, SinkProcess(learner.port, SINKS) as other:
        processes = [one, other]
        assert [process.result() for process in processes] == [None, None]
        assert together(processes, "connect") == [SINKS, SINKS]
        assert together(processes, "send") == [SINKS * samples, SINKS * samples]
        assert together(processes, "close") == [(0, 0), (0, 0)]
        each = everything(learner, samples)
    expected = [*range(samples), *range(samples - TAIL, samples)]  # the server may discard what was sent once more
    for indexes in each:
        assert indexes == expected[: len(indexes)]
