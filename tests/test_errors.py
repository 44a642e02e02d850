"""What each exception is, and that none loses its text or its counts on the way between processes."""

from __future__ import annotations

import pickle

import pytest
from torch._utils import ExceptionWrapper

from echo_torch.errors import (
    ConnectionClosedError,
    DeliveryTimeoutError,
    HandshakeError,
    LearnerGoneError,
    ProtocolError,
    SpecMismatchError,
)

TREE: dict[type[Exception], set[type[Exception]]] = {
    ConnectionClosedError: {ConnectionError, OSError},
    LearnerGoneError: {ConnectionClosedError, ConnectionError, OSError},
    ProtocolError: {ConnectionClosedError, ConnectionError, OSError},
    DeliveryTimeoutError: {TimeoutError, OSError},
    HandshakeError: {ValueError},
    SpecMismatchError: {ValueError},
}
KINDS = list(TREE)
FAMILIES = {*TREE, ConnectionError, TimeoutError, OSError, ValueError, TypeError, RuntimeError}
UNACKED = [ConnectionClosedError, LearnerGoneError, ProtocolError, DeliveryTimeoutError]
ACCEPTING = [*UNACKED, SpecMismatchError]
TEXT = "learner:50051: nothing was acked for 3 s; 7 samples un-acked"


@pytest.mark.parametrize("kind", KINDS)
def test_is_caught_as_what_the_tree_says_and_nothing_else(kind: type[Exception]) -> None:
    assert {family for family in FAMILIES if isinstance(kind(TEXT), family)} == TREE[kind] | {kind}


@pytest.mark.parametrize("kind", KINDS)
def test_is_rebuilt_from_its_text(kind: type[Exception]) -> None:
    error = kind(TEXT)
    again = kind(str(error))
    assert type(again) is kind
    assert str(again) == str(error) == TEXT
    assert again.args == error.args


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataloader_worker_hands_it_on(kind: type[Exception]) -> None:
    """The wrapper crosses the process boundary and raises the same type, with the text in its message."""
    try:
        raise kind(TEXT)
    except Exception:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(kind, match="7 samples un-acked"):
        pickle.loads(pickle.dumps(wrapper)).reraise()


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_with_every_protocol(kind: type[Exception]) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(kind(TEXT), protocol))
        assert type(again) is kind
        assert (str(again), again.args) == (TEXT, (TEXT,))


@pytest.mark.parametrize(
    ("kind", "count"),
    [(kind, "unacked") for kind in UNACKED] + [(kind, "rows_accepted") for kind in ACCEPTING],
)
def test_counts_are_zero_until_set_and_pickled_then(kind: type[Exception], count: str) -> None:
    error = kind(TEXT)
    assert getattr(error, count) == getattr(pickle.loads(pickle.dumps(error)), count) == 0
    setattr(error, count, 7)
    assert getattr(pickle.loads(pickle.dumps(error)), count) == 7
    assert getattr(kind(TEXT), count) == 0


def test_both_counts_are_kept_apart() -> None:
    error = DeliveryTimeoutError(TEXT)
    error.unacked, error.rows_accepted = 7, 3
    again = pickle.loads(pickle.dumps(error))
    assert (again.unacked, again.rows_accepted) == (7, 3)
