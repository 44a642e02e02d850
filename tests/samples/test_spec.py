"""`SampleSpec`: the wire order, the dtypes, which batches it takes, and what it says of those that it refuses."""

from __future__ import annotations

import array
import collections
import dataclasses
import pickle
import re
import tracemalloc
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import echo
import numpy as np
import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import default_collate

from echo_torch import EchoSink, SpecMismatchError, numpy_example
from echo_torch.samples.pytree import flatten
from echo_torch.samples.spec import SampleSpec
from echo_torch.wire.protocol import MAX_ARRAYS, WireLeaf, WireLeaves, encode_handshake

TORCH_ONLY_DTYPES = {
    torch.bfloat16: np.uint16,
    torch.float8_e4m3fn: np.uint8,
    torch.float8_e5m2: np.uint8,
    torch.complex32: np.uint32,
}
WHOLE = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
SHARED = [*WHOLE, "float16", "float32", "float64", "complex64", "complex128"]


EXPERIMENTAL = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    obs: Any
    act: Any


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are deprecated
        return torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=layout)


def csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are in beta
        return torch.eye(3).to_sparse_csr()


# What is sent, and in which order.


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Pytrees of every container that the wire order is defined for."""
    keys = st.text("abcxyz", min_size=1, max_size=3)

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        dicts = st.dictionaries(keys, inner, max_size=4)
        lists = st.lists(inner, max_size=4)
        return st.one_of(
            dicts, dicts.map(collections.OrderedDict), lists, lists.map(tuple), st.builds(Pair, inner, inner)
        )

    return st.recursive(leaves, containers, max_leaves=12)


@settings(deadline=None)
@given(trees(st.none() | st.integers(1, 100)))
def test_leaves_are_in_optrees_order(lengths: Any) -> None:
    """Dict keys sorted, OrderedDict as inserted, sequences as they are, None dropped, at any depth."""
    example = optree.tree_map(lambda length: torch.zeros(length, dtype=torch.uint8), lengths)
    theirs = [tuple(leaf.shape) for leaf in optree.tree_leaves(example)]
    if not theirs:
        return
    spec = SampleSpec(example)
    assert [leaf.shape for leaf in spec.leaves] == theirs
    assert [array.shape for array in spec.match(example).arrays] == theirs
    assert optree.tree_structure(spec.zeroed_numpy_sample()) == optree.tree_structure(example)
    assert optree.tree_leaves(optree.tree_map(lambda leaf: leaf.nbytes, spec.zeroed_numpy_sample())) == [
        n for (n,) in theirs
    ]


@pytest.mark.parametrize(
    ("example", "paths"),
    [
        ({"b": 1, "a": 2}, ["['a']", "['b']"]),
        (collections.OrderedDict(b=1, a=2), ["['b']", "['a']"]),
        ((1, [2, 3]), ["[0]", "[1][0]", "[1][1]"]),
        ({"p": Pair(1, None), "n": None}, ["['p'][0]"]),
        (1, [""]),
    ],
    ids=["dict", "OrderedDict", "sequences", "None", "bare"],
)
def test_paths_are_written_as_one_would_index(example: Any, paths: list[str]) -> None:
    assert [leaf.path for leaf in SampleSpec(example).leaves] == paths


def test_offsets_follow_each_other_without_padding() -> None:
    spec = SampleSpec(
        (torch.zeros(3, dtype=torch.uint8), torch.zeros(2, 5), torch.zeros(0, 7), 1, np.zeros((), np.float16))
    )
    assert [leaf.offset for leaf in spec.leaves] == [0, 3, 43, 43, 51]
    assert spec.payload_size == 53


def test_unflatten_rebuilds_the_example() -> None:
    spec = SampleSpec({"b": (1, None), "a": [2]})
    assert spec.unflatten(["first", "second"]) == {"b": ("second", None), "a": ["first"]}


@pytest.mark.parametrize("opened", [None, {"a": 1, "b": [2, None]}], ids=["nothing", "dict"])
def test_flatten_is_optrees_where_nothing_needs_to_be_opened(opened: Any) -> None:
    leaves, treespec = flatten(opened)
    assert (leaves, treespec) == tuple(optree.tree_flatten(opened))


@pytest.mark.parametrize(
    "container",
    [
        collections.UserDict(obs=1, act=[2, 3]),
        types.MappingProxyType({"obs": 1, "act": [2, 3]}),
        Record(1, [2, 3]),
        Record(1, types.MappingProxyType({0: 2, 1: 3})),
    ],
    ids=["UserDict", "mappingproxy", "dataclass", "mapping in dataclass"],
)
def test_containers_that_optree_takes_for_leaves_are_opened(container: Any) -> None:
    """At any depth, and as a dict would be: keys sorted."""
    leaves, _ = flatten({"deep": (container,)})
    assert leaves == [2, 3, 1]
    assert SampleSpec([container]).leaves[-1].path == "[0]['obs']"


# Dtypes.


@pytest.mark.parametrize("name", SHARED)
def test_dtypes_that_numpy_has_travel_as_they_are(name: str) -> None:
    """And a tensor, an array and a numpy scalar of one dtype make the same leaf."""
    tensor, array = torch.ones(1, dtype=getattr(torch, name)), np.ones(1, name)
    assert SampleSpec(tensor).leaves == SampleSpec(array).leaves
    assert SampleSpec(tensor[0]).leaves == SampleSpec(array[0]).leaves
    assert numpy_example(tensor).dtype == array.dtype
    assert SampleSpec(tensor).leaves[0].dtype is tensor.dtype


@EXPERIMENTAL
@pytest.mark.parametrize("dtype", TORCH_ONLY_DTYPES, ids=str)
def test_dtypes_that_numpy_lacks_travel_as_unsigned(dtype: torch.dtype) -> None:
    """Bit for bit, so that the learner can view them back."""
    values = torch.tensor([1.5, -2.0, 0.25]).to(dtype)
    for tensor in (values, values.repeat(2)[::2], values[:1].expand(3)):
        spec = SampleSpec(tensor)
        (array,) = spec.match(tensor).arrays
        assert array.dtype == numpy_example(tensor).dtype == TORCH_ONLY_DTYPES[dtype]
        assert array.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "scalar", [True, 3, 2.5, np.float32(1), np.uint8(7), np.float64(1)], ids=lambda v: type(v).__name__
)
def test_scalars_have_the_dtype_that_default_collate_gives_them(scalar: Any) -> None:
    collated = default_collate([scalar, scalar])
    spec = SampleSpec(scalar)
    assert spec.leaves[0].dtype is collated.dtype
    assert spec.match(scalar)[1:3] == (1, False)
    assert spec.match(collated)[1:3] == (2, True)


@EXPERIMENTAL
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32], ids=str)
def test_conjugated_views_are_resolved(dtype: torch.dtype) -> None:
    """A lazy conjugation is sent as the values that it stands for."""
    values = torch.tensor([1 + 2j, -3j]).to(dtype)
    spec = SampleSpec(values)
    (array,) = spec.match(values.conj()).arrays
    assert array.tobytes() == spec.match(values.conj().resolve_conj()).arrays[0].tobytes()


def test_negated_views_and_gradients_are_resolved() -> None:
    values = torch.tensor([1 + 2j, -3j], requires_grad=True)
    (array,) = SampleSpec(torch.zeros(2)).match(values.conj().imag).arrays
    assert array.tolist() == [-2.0, 3.0]


# What a server and a client are given.


def test_numpy_example_is_accepted_by_the_real_server() -> None:
    example = {
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        "b": (1, 2.5, True, None),
        "c": Pair(np.zeros(4, ">i2"), torch.zeros(())),
    }
    server = echo.Server(numpy_example(example), batch_size=32)
    server.close()


def test_numpy_example_is_zeroed_and_keeps_the_structure() -> None:
    got = numpy_example({"x": torch.full((2,), 7.0), "r": Record(1, 2.5)})
    assert got.keys() == {"x", "r"}
    assert got["x"].tolist() == [0.0, 0.0]
    assert got["r"] == {"act": np.zeros(()), "obs": np.zeros((), np.int64)}


def test_no_example_is_refused_as_that() -> None:
    with pytest.raises(TypeError, match=r"^example: got None, expected one sample, such as dataset\[0\]$"):
        EchoSink("learner", 7, None)


@pytest.mark.parametrize("example", [{}, {"x": torch.zeros(0, 3)}, [None, np.zeros((2, 0))]], ids=repr)
def test_a_sample_without_bytes_is_refused(example: Any) -> None:
    """The server would flood the client with acks for it."""
    with pytest.raises(ValueError, match="no bytes"):
        numpy_example(example)


def test_check_server_accepts_equal_sizes_and_names_both_sides_of_what_differs() -> None:
    spec = SampleSpec({"x": torch.zeros(3), "y": 1, "z": torch.zeros(2, dtype=torch.uint8)})
    spec.check_server([WireLeaf(4, (3,)), WireLeaf(8, ()), WireLeaf(1, (2,))], "learner:1")
    with pytest.raises(SpecMismatchError) as caught:
        spec.check_server([WireLeaf(4, (3,)), WireLeaf(2, (5, 6))], "learner:1")
    message = str(caught.value)
    assert "Server spec mismatch: learner:1" in message
    assert "leaf 0" not in message
    assert re.search(r"leaf 1: server expects 2-byte items \[5, 6\], example has \['y'\]: torch.int64 \[\]", message)
    assert re.search(r"leaf 2: server expects nothing, example has \['z'\]: torch.uint8 \[2\]", message)


def test_check_server_names_a_few_of_thousands_of_leaves_and_counts_the_rest() -> None:
    """And makes no more of them than it names."""
    spec = SampleSpec({"x": torch.zeros(3)})
    theirs = WireLeaves(encode_handshake([WireLeaf(4, (3,)), *[WireLeaf(9, (2**32 - 1,))] * (MAX_ARRAYS - 1)]))
    tracemalloc.start()
    try:
        with pytest.raises(SpecMismatchError) as caught:
            spec.check_server(theirs, "learner:1")
        cost = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert f"learner:1 expects {MAX_ARRAYS} arrays, the example has 1" in message
    named = re.findall(r"leaf (\d+): server expects 9-byte items \[4294967295\], example has nothing", message)
    assert list(map(int, named)) == list(range(1, len(named) + 1))
    assert message.endswith(f"... and {MAX_ARRAYS - 1 - len(named)} more")
    assert cost < 16 * 1024


# Batches that match.


@pytest.mark.parametrize(
    ("example", "batch"),
    [
        ({"b": 1.0, "a": 2}, {"a": 2, "b": 1.0}),
        ({"b": 1.0, "a": 2}, collections.OrderedDict(b=1.0, a=2)),
        ({"b": 1.0, "a": 2}, collections.UserDict(b=1.0, a=2)),
        ({"b": 1.0, "a": 2}, types.MappingProxyType({"b": 1.0, "a": 2})),
        (collections.OrderedDict(b=1.0, a=2), {"a": 2, "b": 1.0}),
        (collections.OrderedDict(b=1.0, a=2), collections.OrderedDict(a=2, b=1.0)),
        (collections.OrderedDict(obs=1.0, act=2), Record(1.0, 2)),
        (Record(1.0, 2), {"obs": 1.0, "act": 2}),
        ((1.0, 2), [1.0, 2]),
        ([1.0, 2], Pair(1.0, 2)),
        (Pair(1.0, 2), (1.0, 2)),
        (Pair(1.0, None), [1.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_containers_are_interchangeable_and_the_examples_order_is_sent(example: Any, batch: Any) -> None:
    spec = SampleSpec(example)
    for _ in range(2):  # learned, then known
        sent = [array.item() for array in spec.match(batch).arrays]
        assert sent == [array.item() for array in spec.match(example).arrays]


def test_what_default_collate_makes_of_examples_is_a_batch() -> None:
    sample = {"x": torch.ones(2), "p": Pair(np.ones(3, np.int16), 4), "f": 0.5, "b": True, "l": [1, (2.0,)]}
    match = SampleSpec(sample).match(default_collate([sample] * 5))
    assert (match.rows, match.batched) == (5, True)


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_a_common_first_dimension_makes_it_a_batch(rows: int) -> None:
    spec = SampleSpec({"x": torch.zeros(3), "y": 0})
    match = spec.match({"x": torch.ones(rows, 3), "y": torch.ones(rows, dtype=torch.int64)})
    assert (match.rows, match.batched) == (rows, True)
    assert [array.shape for array in match.arrays] == [(rows, 3), (rows,)]


def test_the_size_may_change_from_batch_to_batch() -> None:
    spec = SampleSpec(torch.zeros(2))
    assert [spec.match(torch.zeros(rows, 2)).rows for rows in (4, 4, 3, 0, 1, 4)] == [4, 4, 3, 0, 1, 4]
    assert spec.match(torch.zeros(2))[1:3] == (1, False)
    assert spec.match(torch.zeros(4, 2)).rows == 4


def test_batched_overrules_nothing_that_the_shapes_say_otherwise() -> None:
    spec = SampleSpec({"x": torch.zeros(3)})
    one, some = {"x": torch.zeros(3)}, {"x": torch.zeros(2, 3)}
    assert spec.match(one, batched=False)[1:3] == (1, False)
    assert spec.match(some, batched=True)[1:3] == (2, True)
    with pytest.raises(SpecMismatchError, match=re.escape("batch['x']: got torch.float32 [3], expected") + ".*B, 3"):
        spec.match(one, batched=True)
    with pytest.raises(SpecMismatchError, match=re.escape("got torch.float32 [2, 3], expected torch.float32 [3]")):
        spec.match(some, batched=False)


def test_matching_shares_the_memory_of_dense_leaves() -> None:
    tensor, array = torch.zeros(4, 3), np.zeros((4, 2))
    match = SampleSpec((tensor[0], array[0])).match((tensor, array))
    assert np.shares_memory(match.arrays[0], tensor.numpy())
    assert np.shares_memory(match.arrays[1], array)


def test_any_number_of_structures_can_be_met() -> None:
    """A fresh namedtuple type for each batch is right each time, and so is the first structure after all of them."""
    spec = SampleSpec((1, 2.0))
    for number in range(300):
        fresh = collections.namedtuple(f"Fresh{number}", "a b")
        assert [array.item() for array in spec.match(fresh(number, 0.5)).arrays] == [number, 0.5]
    assert spec.match([3, 4.0]).rows == 1
    assert len(pickle.dumps(SampleSpec((1, 2.0)))) < 10_000


def test_structures_are_not_kept_for_ever() -> None:
    """What a spec holds does not grow with the number of structures it has met."""
    spec = SampleSpec(collections.OrderedDict((str(i), i) for i in range(6)))
    sizes = []
    for number in range(400):
        order = sorted(range(6), key=lambda i, n=number: hash((n, i)))
        spec.match(collections.OrderedDict((str(i), i) for i in order))
        sizes.append(len(pickle.dumps(spec)))
    assert max(sizes[200:]) <= 2 * max(sizes[:100])


def test_a_spec_survives_pickling() -> None:
    spec = SampleSpec(collections.OrderedDict(b=torch.zeros(2, dtype=torch.bfloat16), a=(1, None)), root="data")
    batch = collections.OrderedDict(a=[torch.ones(3, dtype=torch.int64)], b=torch.ones(3, 2, dtype=torch.bfloat16))
    spec.match(batch)
    copy = pickle.loads(pickle.dumps(spec))
    assert (copy.leaves, copy.payload_size, copy.treespec) == (spec.leaves, spec.payload_size, spec.treespec)
    assert copy.match(batch).rows == 3
    with pytest.raises(SpecMismatchError, match=r"^data "):
        copy.match({"b": 1})


# Batches that do not.

EXAMPLE = {"obs": {"camera": torch.zeros(2, 3, dtype=torch.uint8)}, "act": torch.zeros(3), "reward": 0.5}


def matching_batch(rows: int = 4) -> dict[str, Any]:
    return {
        "obs": {"camera": torch.zeros(rows, 2, 3, dtype=torch.uint8)},
        "act": torch.zeros(rows, 3),
        "reward": torch.zeros(rows, dtype=torch.float64),
    }


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"act": None}, ["batch['act']: got None, expected torch.float32 [3] or [B, 3]"]),
        ({"more": torch.zeros(4)}, ["batch['more']: unexpected"]),
        (
            {"reward": None, "rewards": 1},
            ["batch['reward']: got None, expected torch.float64 [] or [B]", "batch['rewards']: unexpected"],
        ),
        ({"act": [1, 2]}, ["batch['act']: got list of 2, expected torch.float32 [3] or [B, 3]", "torch.tensor(x)"]),
        ({"act": {"x": 1}}, ["batch['act']: got dict of 1, expected torch.float32 [3] or [B, 3]"]),
        (
            {"obs": torch.zeros(2, 3)},
            [
                "batch['obs']['camera']: torch.uint8 [2, 3]: missing",
                "batch['obs']: unexpected leaf, expected dict of 1",
            ],
        ),
        ({"names": ["a", "b"] * 20}, ["batch['names']: unexpected list of 40"]),
        ({"info": {"names": ["a"], "tags": ["b"]}}, ["batch['info']: unexpected dict of 2"]),
        ({"collector": {"traj_ids": torch.zeros(2)}}, ["batch['collector']: unexpected dict of 1: ['traj_ids']"]),
    ],
    ids=["None", "extra", "renamed", "list for leaf", "dict for leaf", "leaf for dict", "strings", "more", "one key"],
)
def test_another_structure_is_refused_by_key_path(change: dict[str, Any], parts: list[str]) -> None:
    """Names every missing and every unexpected leaf, and the remedy; also when it is met again."""
    spec = SampleSpec(EXAMPLE)
    for _ in range(2):
        with pytest.raises(SpecMismatchError) as caught:
            spec.match({**matching_batch(), **change})
        for part in [*parts, "structure of the example", "select="]:
            assert part in str(caught.value)


def test_a_missing_key_is_named_with_what_was_expected() -> None:
    batch = matching_batch()
    del batch["act"]
    with pytest.raises(SpecMismatchError, match=r"batch\['act'\]: torch.float32 \[3\]: missing\n  send what"):
        SampleSpec(EXAMPLE).match(batch)


def test_an_example_of_lists_is_told_how_to_become_tensors() -> None:
    """As a tokenizer makes them of one text, while a collator makes tensors of many."""
    with pytest.raises(SpecMismatchError) as caught:
        SampleSpec({"ids": [1, 2, 3]}).match({"ids": torch.zeros(4, 3, dtype=torch.int64)})
    assert "batch['ids']: unexpected leaf, expected list of 3" in str(caught.value)
    assert "torch.tensor(x)" in str(caught.value)


def test_the_remedy_is_named_however_many_leaves_are_wrong() -> None:
    """Leaves that are missing do not push out those that are unexpected, nor what to do."""
    example = {f"k{i:02}": 0 for i in range(30)}
    with pytest.raises(SpecMismatchError) as caught:
        SampleSpec(example).match({f"j{i:02}": 0 for i in range(30)})
    message = str(caught.value)
    assert all(part in message for part in ["k00", "j00", "and 22 more", "select="])
    assert len(message) < 2000


def test_a_mapping_is_not_taken_for_a_sequence() -> None:
    with pytest.raises(SpecMismatchError) as caught:
        SampleSpec([1, 2]).match({0: 1, 1: 2})
    assert "batch[0]: unexpected; in dict of 2, expected list of 2" in str(caught.value)


MISMATCHES: dict[str, tuple[Any, Any, str, str, str]] = {
    # name: example, batch, got, expected, remedy
    "rank": (torch.zeros(3), torch.zeros(5, 4, 3), "torch.float32 [5, 4, 3]", "torch.float32 [3] or [B, 3]", "."),
    "rank 0": (torch.zeros(3), torch.tensor(1.0), "torch.float32 []", "torch.float32 [3] or [B, 3]", "."),
    "shape of a sample": (torch.zeros(3), torch.zeros(2), "torch.float32 [2]", "torch.float32 [3]", "pad or crop"),
    "shape of a batch": (
        torch.zeros(3), torch.zeros(5, 2), "torch.float32 [5, 2]", "torch.float32 [3] or [B, 3]", "pad or crop",
    ),
    "swapped": (torch.zeros(2, 3), torch.zeros(3, 2), "torch.float32 [3, 2]", "torch.float32 [2, 3]", "pad or crop"),
    "torch": (
        torch.zeros(3, dtype=torch.uint8), torch.zeros(5, 3), "torch.float32 [5, 3]", "torch.uint8 [3] or [B, 3]",
        r"\.to\(torch\.uint8\)",
    ),
    "numpy": (
        torch.zeros(3), np.zeros((5, 3)), "torch.float64 [5, 3]", "torch.float32 [3] or [B, 3]",
        r"\.astype\('float32'\)",
    ),
    "big-endian": (torch.zeros(3), np.zeros(3, ">f8"), "torch.float64 [3]", "torch.float32 [3]", r"\.astype\('float"),
    "python scalar": (np.float32(1), 2.0, "torch.float64 []", "torch.float32 [] or [B]", r"np\.float32\(x\)"),
    "numpy scalar": (0, np.int32(2), "torch.int32 []", "torch.int64 []", r"np\.int64\(x\)"),
    "same size": (torch.zeros(3), torch.zeros(3, dtype=torch.int32), "torch.int32", "torch.float32", r"\.to\("),
    "bits of bfloat16": (
        torch.zeros(3, dtype=torch.bfloat16), np.zeros(3, np.uint16), "torch.uint16 [3]", "torch.bfloat16 [3]",
        "send a tensor of torch.bfloat16",
    ),
    "bits of float8": (
        torch.zeros(3, dtype=torch.float8_e5m2), torch.zeros(3, dtype=torch.uint8), "torch.uint8 [3]",
        "torch.float8_e5m2 [3]", r"\.to\(torch\.float8_e5m2\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("example", "batch", "got", "expected", "remedy"), MISMATCHES.values(), ids=MISMATCHES)
def test_another_shape_or_dtype_is_refused(example: Any, batch: Any, got: str, expected: str, remedy: str) -> None:
    """Names path, got, expected and a remedy; nothing is ever cast."""
    with pytest.raises(SpecMismatchError) as caught:
        SampleSpec({"obs": {"camera": example}}).match({"obs": {"camera": batch}})
    assert re.search(
        rf"batch\['obs'\]\['camera'\]: got {re.escape(got)}.*, expected {re.escape(expected)}.*; .*{remedy}",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": torch.tensor(0.5, dtype=torch.float64)}, r"batch\['reward'\]: got torch.float64 \[\].*\.expand\(B"),
        (
            {"reward": 0.5},
            r"batch\['reward'\]: got torch.float64 \[\], expected torch.float64 \[B\]; .*torch\.full\(.B",
        ),
        (
            {"reward": np.float64(1)},
            r"batch\['reward'\]: .*, expected torch.float64 \[B\]; .*np\.broadcast_to\(x, \(B,\)",
        ),
        (
            {"act": torch.zeros(3)},
            r"batch\['act'\]: got torch.float32 \[3\], expected .* \[B, 3\]; .*x\.expand\(B, 3\)",
        ),
        ({"act": torch.zeros(5, 3)}, r"number of samples: 5 at batch\['act'\], 4 at batch\['obs'\]\['camera'\]"),
    ],
    ids=["0-d", "python", "numpy", "unbatched", "other size"],
)
def test_leaves_that_disagree_on_the_batch_are_refused(change: dict[str, Any], message: str) -> None:
    """Only the leaves that are the mistake are named, whichever comes first."""
    with pytest.raises(SpecMismatchError, match=message) as caught:
        SampleSpec(EXAMPLE).match({**matching_batch(), **change})
    assert "camera']: got" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [0.5, np.float32(2), np.ones((), np.float32), np.ones(3, np.int16), torch.ones(2, 3)], ids=repr
)
def test_the_remedy_for_a_value_without_a_batch_dimension_works(value: Any) -> None:
    """Pasted as it is printed, with the B that it names, it makes a batch that is right."""
    spec = SampleSpec({"x": torch.zeros(1), "y": value})
    batch = {"x": torch.zeros(4, 1), "y": value}
    with pytest.raises(SpecMismatchError) as caught:
        spec.match(batch)
    found = re.search(r"once per sample: (.*), B = (\d+) here", str(caught.value))
    assert found is not None
    batch["y"] = eval(found[1], {"np": np, "torch": torch, "x": value, "B": int(found[2])})
    match = spec.match(batch)
    assert match.rows == 4
    assert all(row.tobytes() == np.asarray(value, match.arrays[1].dtype).tobytes() for row in match.arrays[1])


def test_padding_that_varies_is_named_by_its_dimension() -> None:
    spec = SampleSpec({"ids": torch.zeros(16, dtype=torch.int64)})
    with pytest.raises(SpecMismatchError) as caught:
        spec.match({"ids": torch.zeros(4, 12, dtype=torch.int64)})
    assert "to one length: dimension 1 is 12, 16 in the example" in str(caught.value)


def test_further_batch_dimensions_are_told_how_to_become_one() -> None:
    spec = SampleSpec({"x": torch.zeros(3)})
    with pytest.raises(SpecMismatchError, match=r"of the first 2: x\.reshape\(-1, 3\)"):
        spec.match({"x": torch.zeros(4, 5, 3)})


AS_BATCH = {"x": torch.zeros(32, 3), "y": torch.zeros(32, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("batch", "batched"),
    [
        ({"x": torch.zeros(7, 3), "y": torch.zeros(7, dtype=torch.int64)}, None),
        ({"x": torch.zeros(3), "y": 0}, None),
        (AS_BATCH, True),
    ],
    ids=["ragged", "one sample", "batched=True"],
)
def test_an_example_that_is_a_batch_is_suspected(batch: Any, batched: bool | None) -> None:
    with pytest.raises(SpecMismatchError) as caught:
        SampleSpec(AS_BATCH).match(batch, batched)
    for part in ["the example looks like a batch of 32; pass one sample", "dataset[0]", "EchoSink.from_batch"]:
        assert part in str(caught.value)


def test_a_server_for_the_samples_of_an_example_that_is_a_batch() -> None:
    with pytest.raises(SpecMismatchError, match=r"the example looks like a batch of 32; pass one sample, .*from_batch"):
        SampleSpec(AS_BATCH).check_server([WireLeaf(4, (3,)), WireLeaf(8, ())], "learner:50051")


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.zeros(7, 3), "y": torch.zeros(6, dtype=torch.int64)},
        {"x": torch.zeros(7, 4), "y": torch.zeros(7, dtype=torch.int64)},
        {"x": torch.zeros(5, 32, 4), "y": torch.zeros(5, 32, dtype=torch.int64)},
    ],
    ids=["mixed sizes", "other shape", "batch of batches"],
)
def test_an_example_is_not_suspected_without_reason(batch: Any) -> None:
    with pytest.raises(SpecMismatchError) as caught:
        SampleSpec(AS_BATCH).match(batch)
    assert "from_batch" not in str(caught.value)


def test_every_wrong_leaf_is_named_but_not_without_end() -> None:
    batch = {f"k{i:02}": torch.zeros(2) for i in range(30)}
    with pytest.raises(SpecMismatchError) as caught:
        SampleSpec({key: torch.zeros(3) for key in batch}).match(batch)
    assert "k00" in str(caught.value)
    assert "k07" in str(caught.value)
    assert "and 22 more" in str(caught.value)
    assert len(str(caught.value)) < 2000


NO_NUMBERS: dict[str, tuple[Any, str]] = {
    "str": ("text", "str"),
    "bytes": (b"text", "bytes"),
    "array of str": (np.array(["a", "b"]), "U1"),
    "array of bytes": (np.array([b"a", b"b"]), "S1"),
    "object": (np.array([None, 1]), "object"),
    "set": ({1, 2}, "set"),
    "sparse": (torch.eye(3).to_sparse(), "torch.sparse_coo"),
    "sparse_csr": (csr(), "torch.sparse_csr"),
    "meta": (torch.zeros(3, 3, device="meta"), "torch.float32 Tensor on meta"),
    "meta bfloat16": (torch.zeros(3, 3, device="meta", dtype=torch.bfloat16), "torch.bfloat16 Tensor on meta"),
    "quantised": (quantised(), "torch.quint8"),
    "nested, strided": (nested(torch.strided), "torch.float32"),
    "nested, jagged": (nested(torch.jagged), "torch.jagged"),
}


@pytest.mark.parametrize(("value", "got"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_dense_array_of_numbers_is_no_example(value: Any, got: str) -> None:
    with pytest.raises(TypeError) as caught:
        numpy_example({"good": 1, "bad": [value]})
    assert re.search(rf"example\['bad'\]\[0\]: got .*{re.escape(got)}.*expected", str(caught.value))


@pytest.mark.parametrize(("value", "got"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_dense_array_of_numbers_is_no_batch(value: Any, got: str) -> None:
    """Names path, got and expected, whether or not the dtype is the example's."""
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        spec = SampleSpec({"good": 1, "bad": [torch.zeros(3, dtype=dtype)]})
        with pytest.raises((TypeError, SpecMismatchError)) as caught:
            spec.match({"good": 1, "bad": [value]})
        assert re.search(rf"batch\['bad'\]\[0\]: got .*{re.escape(got)}.*expected", str(caught.value)), dtype


def test_an_integer_beyond_int64_is_refused_by_path() -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape("batch['n']")):
        SampleSpec({"n": 1}).match({"n": 2**70})


# Memory that is not there.


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """Without its last element."""
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - tensor.itemsize)
    return tensor


def cut_to(view: torch.Tensor, nbytes: int) -> torch.Tensor:
    view.untyped_storage().resize_(nbytes)
    return view


def cut_base(dtype: torch.dtype) -> torch.Tensor:
    return cut_to(torch.zeros(8, 3, dtype=dtype)[4:], 4 * 3 * dtype.itemsize)


HOLLOW: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "freed": lambda dtype: freed(torch.zeros(4, 3, dtype=dtype)),
    "cut": lambda dtype: cut(torch.zeros(4, 3, dtype=dtype)),
    "a view of a freed one": lambda dtype: freed(torch.zeros(9, 3, dtype=dtype)[2:6]),
    "a transposed view of a freed one": lambda dtype: freed(torch.zeros(3, 4, dtype=dtype).T),
    "behind the end": cut_base,
    "strides over the end": lambda dtype: cut_to(torch.zeros(4, 6, dtype=dtype)[:, ::2], 12 * dtype.itemsize),
    "expanded": lambda dtype: freed(torch.zeros(3, dtype=dtype).expand(4, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", HOLLOW.values(), ids=HOLLOW)
@pytest.mark.parametrize("beside", [torch.zeros(4), np.zeros(4, np.float32)], ids=["tensors", "mixed"])
@pytest.mark.parametrize("with_grad", [False, True], ids=["plain", "with gradient"])
def test_a_tensor_without_all_its_memory_is_refused_by_path(
    make: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype, beside: Any, with_grad: bool
) -> None:
    """FSDP frees the storage of parameters between uses; ``numpy()`` then gives memory that was never written."""
    spec = SampleSpec({"a": torch.zeros(()), "b": torch.zeros(3, dtype=dtype)})
    spec.match({"a": torch.zeros(4), "b": torch.zeros(4, 3, dtype=dtype)})
    hollow = make(dtype)
    if with_grad and dtype.is_floating_point:
        hollow = torch.nn.Parameter(hollow)
    with pytest.raises(TypeError, match=r"batch\['b'\]: got torch\..* \[4, 3\] with \d+ bytes of storage, expected"):
        spec.match({"a": beside, "b": hollow})


WHOLE: dict[str, torch.Tensor] = {
    "a slice": torch.arange(24.0).reshape(8, 3)[4:],
    "every second": torch.arange(24.0).reshape(8, 3)[::2],
    "the last in a cut storage": cut_to(torch.arange(24.0).reshape(8, 3)[:4], 48),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "expanded": torch.arange(3.0).expand(4, 3),
    "without rows": torch.zeros(0, 3),
}


@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
def test_a_view_whose_memory_is_there_is_taken(whole: torch.Tensor) -> None:
    (array,) = SampleSpec(torch.zeros(3)).match(whole, batched=True).arrays
    assert array.tolist() == whole.tolist()


class ArrayLike:
    """As wrappers that stack frames: an array only when asked."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.zeros(3)


class OnlyDlpack:
    def __dlpack__(self, **options: Any) -> Any:
        return torch.zeros(3).__dlpack__(**options)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (ArrayLike(), "np.asarray(x)"),
        (OnlyDlpack(), "torch.from_dlpack(x)"),
        (Image.new("L", (3, 3)), "np.asarray(x)"),
        (array.array("f", [0.0]), "encode it as numbers"),
    ],
    ids=["array", "dlpack", "PIL", "buffer"],
)
def test_the_remedy_for_an_array_like_makes_it_an_array(value: Any, remedy: str) -> None:
    for refuse in (lambda: SampleSpec({"x": value}), lambda: SampleSpec({"x": 0.0}).match({"x": value})):
        with pytest.raises(TypeError, match=re.escape(remedy)):
            refuse()
