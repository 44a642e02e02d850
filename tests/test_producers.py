"""Many sinks into one real server at once, from several processes."""

from __future__ import annotations

from typing import Any

from learner import Learner
from producing import BATCH, BATCHES, EXAMPLE, SINKS, Farm

TAIL = 8
"""Samples that each sink sends once more when it is closed."""


def together(farms: list[Farm], method: str) -> list[Any]:
    for farm in farms:
        farm.begin(method)
    return [farm.ended() for farm in farms]


def test_what_many_sinks_send_arrives_in_the_order_of_each() -> None:
    """And nothing is left behind of them."""
    samples = BATCHES * BATCH
    with Learner(EXAMPLE) as learner, Farm(learner.port, 0) as one, Farm(learner.port, SINKS) as other:
        farms = [one, other]
        assert [farm.ended() for farm in farms] == [None, None]
        assert together(farms, "connect") == [SINKS, SINKS]
        assert together(farms, "send") == [SINKS * samples, SINKS * samples]
        assert together(farms, "close") == [(0, 0), (0, 0)]
        arrived = learner.take(2 * SINKS * (samples + TAIL))
    assert (arrived["obs"] == arrived["sink"][:, None]).all()
    expected = [*range(samples), *range(samples - TAIL, samples)]
    for sink in range(2 * SINKS):
        assert arrived["index"][arrived["sink"] == sink].tolist() == expected
