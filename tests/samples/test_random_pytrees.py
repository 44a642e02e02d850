"""Random samples, batches and mistakes: what is right arrives byte for byte, and what is wrong is refused by path.

The reference is independent of echo_torch: the bytes of each leaf, joined in the order in which optree flattens the
example, for one row after the other.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import types
from collections.abc import Callable
from typing import Any

import echo
import numpy as np
import optree
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from echo_torch import EchoSink, SpecMismatchError, numpy_example
from echo_torch.samples.leaf import in_native_order
from echo_torch.samples.spec import SampleSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse"),
]

SERVER_BATCH = 32

FLOAT8 = [name for name in dir(torch) if name.startswith("float8_")]
WHOLE = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
NUMBERS = [*WHOLE, "float16", "float32", "float64", "complex64", "complex128"]
DTYPES = [getattr(torch, name) for name in ["bool", "bfloat16", "complex32", *NUMBERS, *FLOAT8]]
NOT_IN_NUMPY = [torch.bfloat16, torch.complex32, *(getattr(torch, name) for name in FLOAT8)]

NAMES = [f"{first}{second}" for first in "abAB" for second in ("", "0", "_x")]
PAIRS = {size: collections.namedtuple(f"Fields{size}", [f"f{i}" for i in range(size)]) for size in range(7)}

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """A leaf of the example: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


# Trees of the containers that optree knows; the order of their leaves is what travels.

ITEMS = st.builds(Item, st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple))


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mappings = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    sequences = st.lists(inner, max_size=4)
    ordered = st.permutations(NAMES).flatmap(
        lambda names: sequences.map(lambda values: collections.OrderedDict(zip(names, values, strict=False)))
    )
    return st.one_of(
        mappings, ordered, sequences, sequences.map(tuple), sequences.map(lambda values: PAIRS[len(values)](*values))
    )


TREES = st.recursive(st.one_of(st.none(), ITEMS, ITEMS, ITEMS), containers, max_leaves=10).filter(
    lambda tree: 0 < sum(item.nbytes for item in optree.tree_leaves(tree)) < 1 << 16
)


# Values.


def random_tensor(item: Item, rows: int | None, rng: random.Random) -> torch.Tensor:
    """Random bits; True and False are 1 and 0."""
    shape = item.shape if rows is None else (rows, *item.shape)
    raw = np.frombuffer(rng.randbytes(math.prod(shape) * item.dtype.itemsize), np.uint8).copy()
    if not len(raw):
        return torch.empty(shape, dtype=item.dtype)
    return torch.from_numpy(raw & 1 if item.dtype is torch.bool else raw).view(item.dtype).reshape(shape)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    room = torch.zeros((*tensor.shape, 2), dtype=torch.uint8).to(tensor.dtype)
    room[..., 0].copy_(tensor)
    return room[..., 0]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.dim() else tensor


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand(tensor.shape) if tensor.dim() and len(tensor) else tensor


def with_grad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.requires_grad_() if tensor.dtype in (torch.float32, torch.float64, torch.complex64) else tensor


def as_numpy(tensor: torch.Tensor) -> Any:
    return tensor if tensor.dtype in NOT_IN_NUMPY else tensor.numpy().copy("F")


def as_big_endian(tensor: torch.Tensor) -> Any:
    return tensor if tensor.dtype in NOT_IN_NUMPY else tensor.numpy().astype(tensor.numpy().dtype.newbyteorder(">"))


def as_scalar(tensor: torch.Tensor) -> Any:
    """A Python or numpy scalar, if it is one."""
    if tensor.dim() or tensor.dtype in NOT_IN_NUMPY:
        return tensor
    return tensor.item() if tensor.dtype in (torch.int64, torch.bool) else tensor.numpy()[()]


LAYOUTS: list[Callable[[torch.Tensor], Any]] = [
    torch.Tensor.clone, torch.Tensor.conj, strided, transposed, expanded, with_grad, as_numpy, as_big_endian, as_scalar
]  # fmt: skip


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; ``contiguous`` would keep odd strides where a dimension is 1."""
    return tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)


def raw(value: Any) -> bytes:
    """The bytes of a value in C order."""
    if isinstance(value, torch.Tensor):
        value = dense(value)
        return value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return in_native_order(np.asarray(value)).tobytes()


def reference(tree: Any, rows: int | None) -> list[bytes]:
    """The payload of each sample of a tree of the example's containers."""
    leaves = optree.tree_leaves(tree)
    if rows is None:
        return [b"".join(map(raw, leaves))]
    return [b"".join(raw(leaf[row]) for leaf in leaves) for row in range(rows)]


def fill(tree: Any, rows: int | None, rng: random.Random) -> Any:
    """A sample, or a batch, of the example's containers."""
    return optree.tree_map(lambda item: rng.choice(LAYOUTS)(random_tensor(item, rows, rng)), tree)


# Containers that stand for each other.


def with_other_containers(tree: Any, rng: random.Random, keep_order: bool = False) -> Any:
    """The same in other containers; with ``keep_order``, such that the leaves of an example stay in their order."""
    if isinstance(tree, dict):
        items = [(key, with_other_containers(value, rng, keep_order)) for key, value in tree.items()]
        if keep_order and isinstance(tree, collections.OrderedDict):
            return collections.OrderedDict(items)
        rng.shuffle(items)
        makers = [dict, collections.UserDict, lambda items: types.MappingProxyType(dict(items)), as_dataclass]
        return rng.choice(makers if keep_order else [*makers, collections.OrderedDict])(items)
    if isinstance(tree, (list, tuple)):
        values = [with_other_containers(value, rng, keep_order) for value in tree]
        return rng.choice([list, tuple, lambda values: PAIRS[len(values)](*values)])(values)
    return tree


def as_dataclass(items: list[tuple[str, Any]]) -> Any:
    return dataclasses.make_dataclass("Record", [key for key, _ in items])(**dict(items))


# Mistakes: each changes one place of a tree of dicts and lists, and gives the path that the error must name.


def plain(tree: Any) -> Any:
    """Copied into dicts and lists, which can be changed."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def written(path: Path) -> str:
    return "batch" + "".join(f"[{entry!r}]" for entry in path)


def paths_of(tree: Any, path: Path = ()) -> list[Path]:
    """Where the leaves are."""
    if isinstance(tree, dict):
        return [found for key in tree for found in paths_of(tree[key], (*path, key))]
    if isinstance(tree, list):
        return [found for index, value in enumerate(tree) for found in paths_of(value, (*path, index))]
    return [] if tree is None else [path]


def get(tree: Any, path: Path) -> Any:
    for entry in path:
        tree = tree[entry]
    return tree


def put(tree: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    get(tree, path[:-1])[path[-1]] = value
    return tree


@dataclasses.dataclass
class Place:
    """A leaf of a batch that is right, which is to become wrong."""

    tree: Any
    path: Path
    item: Item
    rows: int | None
    alone: bool
    """Whether it is the only leaf."""

    @property
    def tensor(self) -> torch.Tensor:
        value = get(self.tree, self.path)
        return dense(value if isinstance(value, torch.Tensor) else torch.from_numpy(in_native_order(np.array(value))))

    def becomes(self, value: Any) -> tuple[Any, str]:
        return put(self.tree, self.path, value), written(self.path)


def other_dtype(place: Place, rng: random.Random) -> Any:
    """Of the same size where there is one."""
    same = [d for d in DTYPES if d.itemsize == place.item.dtype.itemsize and d is not place.item.dtype]
    others = same or [torch.float32]
    return place.becomes(torch.empty(place.tensor.shape, dtype=rng.choice(others)))


def more_dimensions(place: Place, rng: random.Random) -> Any:
    """So many that it is neither a sample nor a batch."""
    return place.becomes(place.tensor[None, None] if place.rows is None else place.tensor[None])


def no_batch_dimension(place: Place, rng: random.Random) -> Any:
    """Or one dimension less, of a sample; alone, it may be one sample."""
    right = not place.tensor.dim() or (place.alone and place.rows is not None)
    return None if right else place.becomes(torch.empty(place.tensor.shape[1:], dtype=place.item.dtype))


def other_rows(place: Place, rng: random.Random) -> Any:
    """Than the other leaves have."""
    if place.rows is None or place.alone:
        return None
    return place.becomes(torch.empty((place.rows + 1, *place.item.shape), dtype=place.item.dtype))


def other_size(place: Place, rng: random.Random) -> Any:
    """Of one dimension of the sample."""
    if not place.item.shape:
        return None
    shape = list(place.tensor.shape)
    shape[-rng.randint(1, len(place.item.shape))] += 1
    return place.becomes(torch.empty(shape, dtype=place.item.dtype))


def swapped_dimensions(place: Place, rng: random.Random) -> Any:
    shape = place.item.shape
    return None if shape[-1:] == shape[-2:-1] or len(shape) < 2 else place.becomes(place.tensor.transpose(-1, -2))


def dropped(place: Place, rng: random.Random) -> Any:
    if not place.path or not isinstance(place.path[-1], str):
        return None
    del get(place.tree, place.path[:-1])[place.path[-1]]
    return place.tree, written(place.path)


def renamed(place: Place, rng: random.Random) -> Any:
    """The error names both."""
    if not place.path or not isinstance(place.path[-1], str):
        return None
    parent = get(place.tree, place.path[:-1])
    parent["renamed"] = parent.pop(place.path[-1])
    return place.tree, rng.choice([written(place.path), written((*place.path[:-1], "renamed"))])


def added(place: Place, rng: random.Random) -> Any:
    """Beside the leaf."""
    if not place.path:
        return None
    parent = get(place.tree, place.path[:-1])
    if isinstance(parent, list):
        parent.append(place.tensor)
        return place.tree, written((*place.path[:-1], len(parent) - 1))
    parent["more"] = place.tensor
    return place.tree, written((*place.path[:-1], "more"))


def nothing(place: Place, rng: random.Random) -> Any:
    return place.becomes(None)


def container(place: Place, rng: random.Random) -> Any:
    return place.becomes(rng.choice([[place.tensor] * 2, {"x": place.tensor}, ["text"] * (place.rows or 2)]))


def no_array(place: Place, rng: random.Random) -> Any:
    return place.becomes(rng.choice(["text", b"bytes", object(), np.array(["a", "b"]), np.array([None]), {1, 2}]))


def no_values(place: Place, rng: random.Random) -> Any:
    meta = torch.empty_like(place.tensor, device="meta")
    dense = torch.zeros(place.tensor.shape, dtype=torch.float32)
    return place.becomes(rng.choice([meta, dense.to_sparse()]))


def masked(place: Place, rng: random.Random) -> Any:
    is_numpy = place.item.dtype not in NOT_IN_NUMPY
    return place.becomes(np.ma.masked_array(place.tensor.numpy())) if is_numpy else None


MISTAKES: list[Callable[[Place, random.Random], Any]] = [
    other_dtype, more_dimensions, no_batch_dimension, other_rows, other_size, swapped_dimensions, dropped, renamed,
    added, nothing, container, no_array, no_values, masked,
]  # fmt: skip


def with_mistake(right: Any, tree: Any, rows: int | None, mistake: Any, rng: random.Random) -> tuple[Any, str] | None:
    """A batch that is right with one mistake in it, and the path to be named; None if it would be right again."""
    changed, items = plain(right), plain(tree)
    paths = paths_of(items)
    path = rng.choice(paths)
    made = mistake(Place(changed, path, get(items, path), rows, len(paths) == 1), rng)
    return None if made is None else (with_other_containers(made[0], rng), made[1])


SENDS = st.lists(
    st.tuples(st.none() | st.integers(0, 5), st.none() | st.sampled_from(MISTAKES)), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(TREES, SENDS, st.integers(0, 2**32))
def test_a_match_has_the_bytes_or_is_refused(tree: Any, sends: Any, seed: int) -> None:
    """In the example's order, whatever the containers; rows None is one sample."""
    rng = random.Random(seed)
    spec = SampleSpec(with_other_containers(fill(tree, None, rng), rng, keep_order=True))
    for rows, mistake in sends:
        right = fill(tree, rows, rng)
        wrong = None if mistake is None else with_mistake(right, tree, rows, mistake, rng)
        if wrong is not None:
            with pytest.raises((SpecMismatchError, TypeError)) as caught:
                spec.match(wrong[0])
            assert wrong[1] in str(caught.value)
        match = spec.match(with_other_containers(right, rng))
        assert (match.rows, match.batched) == (1 if rows is None else rows, rows is not None)
        arrays = match.arrays if match.batched else [array[None] for array in match.arrays]
        got = [b"".join(array[row].tobytes() for array in arrays) for row in range(match.rows)]
        assert got == reference(right, rows)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(TREES, SENDS, st.integers(0, 2**32))
def test_what_is_right_arrives_and_nothing_else_does(tree: Any, sends: Any, seed: int) -> None:
    """At a real server, in order; the sink goes on after what it refuses."""
    assume(any(mistake is not None for _, mistake in sends))
    rng = random.Random(seed)
    example = with_other_containers(fill(tree, None, rng), rng, keep_order=True)
    server = echo.Server(numpy_example(example), batch_size=SERVER_BATCH, transport=echo.TcpTransport(port=0))
    server.start()
    try:
        expected: list[bytes] = []
        with EchoSink("127.0.0.1", server.port, example, resend_at_close=False) as sink:
            for rows, mistake in sends:
                right = fill(tree, rows, rng)
                wrong = None if mistake is None else with_mistake(right, tree, rows, mistake, rng)
                if wrong is not None:
                    with pytest.raises((SpecMismatchError, TypeError)) as caught:
                        sink.send(wrong[0])
                    assert wrong[1] in str(caught.value)
                sink.send(with_other_containers(right, rng))
                expected += reference(right, rows)
            rest = fill(tree, SERVER_BATCH - len(expected) % SERVER_BATCH, rng)
            sink.send(with_other_containers(rest, rng))
            expected += reference(rest, SERVER_BATCH - len(expected) % SERVER_BATCH)
            got: list[bytes] = []
            while len(got) < len(expected):
                leaves = optree.tree_leaves(server.sample().batch)
                got += [b"".join(leaf[row].tobytes() for leaf in leaves) for row in range(SERVER_BATCH)]
            sink.wait()
            assert sink.stats().samples_acked == len(expected)
        assert got == expected
    finally:
        server.close()
