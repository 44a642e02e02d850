"""Leaves into rows, against the plainest reference: ``b"".join(leaf.tobytes())`` of each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_torch.ring.pack import JOIN_LEAF_BYTES, Packer, columns
from echo_torch.ring.ring import Ring
from echo_torch.samples.spec import SampleSpec

Array = np.ndarray[Any, Any]

DTYPES = ["?", "u1", "i1", "<u2", "<i2", "<f2", "<i4", "<f4", "<i8", "<f8", "<c8", "<c16"]
UNTOUCHED = 0xA5


def spread(array: Array) -> Array:
    """Every second item along each axis of something larger."""
    wide = np.zeros([2 * size + 1 for size in array.shape], array.dtype)
    view = wide[tuple(slice(0, 2 * size, 2) for size in array.shape)]
    view[...] = array
    return view


def unaligned(array: Array) -> Array:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = np.ndarray(array.shape, array.dtype, raw.data, 1)
    view[...] = array
    return view


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "spread": spread,
    "reversed": lambda array: np.flip(np.flip(array).copy()),
    "transposed": lambda array: array.T.copy().T,
    "unaligned": unaligned,
    "expanded": lambda array: np.broadcast_to(array[:1], array.shape),
}


def values(shape: Sequence[int], dtype: str, seed: int) -> Array:
    """Random bytes as items, none of them special to the copy (a bool is 0 or 1)."""
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8)
    return (raw & 1 if dtype == "?" else raw).view(dtype).reshape(shape)


def payload(arrays: Sequence[Array], row: int) -> bytes:
    return b"".join(array[row, ...].tobytes() for array in arrays)  # array[row] might be a scalar, and native


def pack(leaves: Sequence[Array], arrays: Sequence[Array], rows: int, slot: int, first: int, run: int) -> list[bytes]:
    """The rows of a ring after ``run`` rows of a batch, from ``first`` on, were put at ``slot``."""
    spec = SampleSpec(list(leaves))
    ring = np.full(rows * spec.payload_size, UNTOUCHED, np.uint8)
    Packer(Ring(ring.data, spec.payload_size), spec.leaves).make_filler(arrays, True)(slot, first, run)
    return [row.tobytes() for row in ring.reshape(rows, -1)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Array], list[Array]]:
    """An example's leaves, and a batch of such in any layout."""
    rows = draw(st.integers(0, 7))
    shapes = st.lists(st.integers(0, 4), max_size=3)
    kinds = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes, st.sampled_from(list(LAYOUTS))), max_size=5))
    kinds.insert(draw(st.integers(0, len(kinds))), ("u1", [], "contiguous"))  # a sample has at least one byte
    arrays = [LAYOUTS[layout](values((rows, *shape), dtype, seed)) for seed, (dtype, shape, layout) in enumerate(kinds)]
    return [np.zeros(shape, dtype) for dtype, shape, _ in kinds], arrays


@settings(deadline=None)
@given(batches(), st.data())
def test_a_run_of_rows_is_the_payloads_and_touches_nothing_else(
    batch: tuple[list[Array], list[Array]], data: st.DataObject
) -> None:
    """For any leaves, any layout and any run of the batch, at any slot of the ring."""
    leaves, arrays = batch
    total = len(arrays[0])
    first = data.draw(st.integers(0, total), "first")
    run = data.draw(st.integers(0, total - first), "run")
    slot = data.draw(st.integers(0, 3), "slot")
    rows = slot + run + data.draw(st.integers(1, 3), "after")
    got = pack(leaves, arrays, rows, slot, first, run)
    untouched = bytes([UNTOUCHED]) * sum(leaf.nbytes for leaf in leaves)
    expected = [payload(arrays, row) for row in range(first, first + run)]
    assert got == [untouched] * slot + expected + [untouched] * (rows - slot - run)


@settings(deadline=None)
@given(batches(), st.integers(0, 3))
def test_a_single_sample_is_its_payload(batch: tuple[list[Array], list[Array]], slot: int) -> None:
    """Given without a batch dimension; 0-d leaves included."""
    leaves, arrays = batch
    if not len(arrays[0]):
        return
    assert pack_one(leaves, [array[0, ...] for array in arrays], slot) == payload(arrays, 0)


def pack_one(leaves: Sequence[Array], arrays: Sequence[Array], slot: int) -> bytes:
    """A row after a single sample was put there; nothing else is touched."""
    spec = SampleSpec(list(leaves))
    ring = np.full(4 * spec.payload_size, UNTOUCHED, np.uint8)
    Packer(Ring(ring.data, spec.payload_size), spec.leaves).make_filler(arrays, False)(slot, 0, 1)
    rows = ring.reshape(4, -1)
    assert (np.delete(rows, slot, 0) == UNTOUCHED).all()
    return rows[slot].tobytes()


@pytest.mark.parametrize("nbytes", [JOIN_LEAF_BYTES // 2, JOIN_LEAF_BYTES, 2 * JOIN_LEAF_BYTES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_single_sample_of_small_or_large_leaves(nbytes: int, layout: str) -> None:
    arrays = [values((2, nbytes // 8, 4), "<i2", 1), np.arange(2, dtype=np.uint8)]
    sample = [LAYOUTS[layout](array[1, ...]) if array.ndim > 1 else array[1, ...] for array in arrays]
    leaves = [np.zeros(array.shape[1:], array.dtype) for array in arrays]
    assert pack_one(leaves, sample, 2) == b"".join(array.tobytes() for array in sample)


def test_a_single_sample_of_numpy_scalars() -> None:
    sample = [np.float32(1.5), np.int64(-2), np.bool_(True)]
    assert pack_one([np.asarray(value) for value in sample], sample, 0) == b"".join(x.tobytes() for x in sample)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_at_an_odd_offset(dtype: str) -> None:
    """A leaf behind a single byte is aligned in no row of odd size."""
    for layout, lay_out in LAYOUTS.items():
        arrays = [np.arange(5, dtype=np.uint8), lay_out(values((5, 3, 2), dtype, 1)), values((5,), "u1", 2)]
        got = pack([np.zeros(array.shape[1:], array.dtype) for array in arrays], arrays, 5, 0, 0, 5)
        assert got == [payload(arrays, row) for row in range(5)], layout


def test_runs_that_wrap_around_the_ring() -> None:
    """A batch put down in two runs, the second at the buffer's start, overwrites only those rows."""
    spec = SampleSpec(torch.zeros(3, dtype=torch.int16))
    ring = np.full(5 * 6, UNTOUCHED, np.uint8)
    batch = np.arange(12, dtype=np.int16).reshape(4, 3)
    fill = Packer(Ring(ring.data, 6), spec.leaves).make_filler([batch], True)
    fill(3, 0, 2)
    fill(0, 2, 2)
    rows = [row.tobytes() for row in ring.reshape(5, 6)]
    assert rows == [
        batch[2].tobytes(),
        batch[3].tobytes(),
        bytes([UNTOUCHED]) * 6,
        batch[0].tobytes(),
        batch[1].tobytes(),
    ]


def test_the_caller_may_change_the_batch_afterwards() -> None:
    spec = SampleSpec((1, 2.0))
    ring = np.zeros(2 * 16, np.uint8)
    arrays = [np.array([1, 2]), np.array([0.5, 1.5])]
    before = [payload(arrays, row) for row in range(2)]
    Packer(Ring(ring.data, 16), spec.leaves).make_filler(arrays, True)(0, 0, 2)
    for array in arrays:
        array[...] = -1
    assert [row.tobytes() for row in ring.reshape(2, 16)] == before


def test_columns_are_views_of_one_buffer_with_one_item_per_row() -> None:
    spec = SampleSpec({"a": torch.zeros(2, 3), "b": torch.zeros(0, 4), "c": True})
    ring = np.zeros(4 * spec.payload_size, np.uint8)
    made = columns(ring.data, 4, spec.payload_size, spec.leaves)
    assert [column.shape for column in made] == [(4, 2, 3), (4, 0, 4), (4,)]
    assert [column.dtype for column in made] == [np.float32, np.float32, np.bool_]
    made[0][3, 1, 2] = 1.0
    made[2][0] = True
    assert ring.nonzero()[0].tolist() == [24, 3 * 25 + 22, 3 * 25 + 23]
