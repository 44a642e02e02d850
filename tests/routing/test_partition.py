"""What a user's function may give for a batch, as the index of a learner."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from echo_torch.routing.partition import check_routing, check_shards


@pytest.mark.parametrize(("route", "kind"), [("random", ValueError), (None, TypeError), (3, TypeError)])
def test_an_unknown_route_raises(route: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"route: got .*, expected 'round_robin' or 'least_inflight', or a function"):
        check_routing(route, False)


@pytest.mark.parametrize("given", [1, np.int8(1), torch.tensor(1), np.array([1, 1, 1]), torch.tensor([1, 1, 1])])
def test_one_learner_for_all_samples(given: Any) -> None:
    assert check_shards(given, 3, 2) == 1


@pytest.mark.parametrize("given", [[0, 2, 1], np.array([0, 2, 1], np.uint8), torch.tensor([0, 2, 1])])
def test_a_learner_for_each_sample(given: Any) -> None:
    shards = check_shards(given, 3, 3)
    assert isinstance(shards, np.ndarray)
    assert shards.tolist() == [0, 2, 1]


def test_an_empty_batch_takes_an_empty_list() -> None:
    shards = check_shards([], 0, 3)
    assert isinstance(shards, np.ndarray)
    assert shards.shape == (0,)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (0.5, TypeError, "gave float64"),
        (None, TypeError, "gave object"),
        (torch.tensor([True, False, True]), TypeError, "gave bool"),
        ([0, 1], ValueError, "gave [2], expected [] or [3]"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, "gave [3, 1]"),
        (2, ValueError, "gave 2, expected 0 to 1"),
        ([0, -1, 1], ValueError, "gave -1, expected 0 to 1"),
    ],
)
def test_invalid_learner_indices_raise(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        check_shards(given, 3, 2)
    assert message in str(caught.value)
