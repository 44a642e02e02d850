"""Leaves that are easily taken for what they are not, and remedies that do what they say."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peers import Line, Peer

from echo_torch import EchoSink, TcpClient
from echo_torch.leaves import how_to_cast
from echo_torch.spec import SampleSpec

EXAMPLE = {"pair": (np.zeros(2, np.float32), 0)}


def local_batch() -> dict[str, Any]:
    """A batch of a type that nobody can import, and so cannot be pickled."""
    local = collections.namedtuple("local", "x y")
    return {"pair": local(np.ones((3, 2), np.float32), np.arange(3))}


def test_a_spec_pickles_whatever_it_has_met() -> None:
    spec = SampleSpec(EXAMPLE)
    assert spec.match(local_batch()).rows == 3
    copy = pickle.loads(pickle.dumps(spec))
    assert copy.leaves == spec.leaves
    assert copy.match(local_batch()).rows == spec.match(local_batch()).rows == 3


def test_a_sink_pickles_whatever_it_has_sent() -> None:
    def acking(line: Line) -> None:
        line.greet({"pair": (np.zeros(2, np.float32), np.zeros((), np.int64))})
        line.hear_all(ack_every=16)

    with Peer(acking) as peer:
        sink = EchoSink(peer.host, peer.port, EXAMPLE, replay_tail=False)
        sink.send(local_batch())
        copy = pickle.loads(pickle.dumps(sink))
        copy.send(local_batch())
        sink.close()
        copy.close()
    assert [len(line.received) for line in peer.lines] == [48, 48]


MASKED = np.ma.masked_array(np.zeros(3, np.float32), [False, True, False])


def test_a_masked_array_is_no_example() -> None:
    with pytest.raises(TypeError, match=r"example\['x'\]: got a masked array.*\.filled"):
        SampleSpec({"x": MASKED})
    with pytest.raises(TypeError, match="masked array"):
        TcpClient("127.0.0.1", 1, {"x": MASKED})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [MASKED, np.ma.masked_array(np.zeros((5, 3), np.float32))], ids=["sample", "batch"])
def test_a_masked_array_is_no_batch(masked: Any, dtype: torch.dtype) -> None:
    spec = SampleSpec({"x": torch.zeros(3, dtype=dtype)})
    with pytest.raises(TypeError, match=r"batch\['x'\]: got a masked array.*\.filled"):
        spec.match({"x": masked})
    assert spec.numpy_leaves({"x": masked}) is None


class Rows(Mapping[str, Any]):
    """As a TensorDict: a mapping that iterates over its rows."""

    def __init__(self, items: dict[str, Any], rows: int = 2) -> None:
        self._items = items
        self._rows = rows

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(Rows({key: value[row] for key, value in self._items.items()}) for row in range(self._rows))

    def __len__(self) -> int:
        return self._rows

    def keys(self) -> Any:
        return self._items.keys()


def test_a_mapping_is_opened_by_its_keys_and_not_by_what_it_iterates_over() -> None:
    arrays = {"a": np.arange(2), "b": np.zeros((2, 3), np.float32)}
    spec = SampleSpec({"a": 0, "b": np.zeros(3, np.float32)})
    assert [leaf.path for leaf in SampleSpec(Rows(arrays)).leaves] == ["['a']", "['b']"]
    for batch in (Rows(arrays), Rows({"b": arrays["b"], "a": arrays["a"]})):
        match = spec.match(batch)
        assert match.rows == 2
        np.testing.assert_array_equal(match.arrays[0], arrays["a"])
    nested = SampleSpec({"inner": {"a": 0}}).match({"inner": Rows({"a": np.arange(2)})})
    assert nested.rows == 2


@pytest.mark.parametrize(
    "name", ["bool", "uint8", "uint16", "int8", "int32", "int64", "float16", "float32", "complex64"]
)
@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.ones(2, np.float64), torch.ones(2)], ids=repr)
def test_the_remedy_makes_what_is_expected(value: Any, name: str) -> None:
    dtype = getattr(torch, name)
    remedy = how_to_cast(value, dtype)
    assert remedy.startswith("convert with ")
    expression = remedy.removeprefix("convert with ")
    converted = eval(expression if "(x" in expression else f"x{expression}", {"np": np, "torch": torch, "x": value})
    assert SampleSpec(converted).leaves[0].dtype == dtype
    assert SampleSpec(converted).leaves[0].shape == np.shape(value)


def test_the_remedy_for_booleans_is_known_to_numpy_1_too() -> None:
    assert how_to_cast(1, torch.bool) == "convert with np.bool_(x)"
