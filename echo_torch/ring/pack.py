"""Packs the leaves of a batch into rows of the ring, on the CPU.

* If a single sample has small leaves, the packer joins them into one bytes object and copies that. This costs less than
  one numpy call per leaf.
* Otherwise each leaf has a column in the ring: a strided view with the leaf's dtype and one item per row. Assigning to
  a slice of a column copies the leaf for many rows in one numpy call, whatever the strides on either side.
* Columns need not be aligned to their item size. The view tells numpy so, and numpy copies bytes where it has to. On
  rows of 29 bytes to 602 KB, this was never slower than columns of raw bytes. From 256 bytes per leaf on, it ran at the
  speed of memcpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from echo_torch.samples.leaf import Array, Leaf

from .ring import Filler, Ring

# Bytes per leaf, on average, up to which one copy of the joined leaves is faster than a copy of each leaf.
JOIN_LEAF_BYTES = 2048


class Packer:
    """Packs samples into the rows of a ring, in whatever memory the rows are at that time.

    Args:
        ring: its rows hold one sample each.
        leaves: one sample's leaves, in wire order.
    """

    def __init__(self, ring: Ring, leaves: Sequence[Leaf]) -> None:
        # The rows to fill.
        self._ring = ring
        # One sample's leaves, in wire order.
        self._leaves = leaves
        # Whether a single sample's leaves are small enough to be joined before the copy.
        self._joins_leaves = ring.row_bytes <= JOIN_LEAF_BYTES * len(leaves)

    def make_filler(self, arrays: Sequence[Array], batched: bool) -> Filler:
        """Return a function that copies runs of the samples in ``arrays`` into rows.

        Args:
            arrays: one checked array per leaf, ``(B, *shape)``, or ``shape`` for a single sample.
            batched: whether the arrays have the batch dimension.
        """
        if batched:
            return self._make_batch_filler(arrays)
        if self._joins_leaves:
            try:
                return self._make_joined_filler(b"".join(arrays))  # type: ignore[arg-type]  # arrays are buffers
            except TypeError:  # join() takes contiguous arrays only
                pass
        return self._make_sample_filler(arrays)

    def _make_joined_filler(self, row: bytes) -> Filler:
        ring, size = self._ring, self._ring.row_bytes

        def fill(slot: int, first: int, rows: int) -> None:
            ring.buffer[slot * size : (slot + 1) * size] = row

        return fill

    def _make_sample_filler(self, arrays: Sequence[Array]) -> Filler:
        def fill(slot: int, first: int, rows: int) -> None:
            for target, array in zip(self._ring_columns(), arrays, strict=True):
                target[slot] = array

        return fill

    def _make_batch_filler(self, arrays: Sequence[Array]) -> Filler:
        def fill(slot: int, first: int, rows: int) -> None:
            run = slice(slot, slot + rows)
            # The whole batch usually fits into one run. Then the arrays need no slicing.
            if rows < len(arrays[0]):
                part = slice(first, first + rows)
                for target, array in zip(self._ring_columns(), arrays, strict=True):
                    target[run] = array[part]
            else:
                for target, array in zip(self._ring_columns(), arrays, strict=True):
                    target[run] = array

        return fill

    def _ring_columns(self) -> tuple[Array, ...]:
        """Return the columns of the ring's current memory."""
        ring = self._ring
        # The ring forgets the columns when its rows move to other memory.
        if ring.columns is None:
            ring.columns = columns(ring.buffer, ring.capacity, ring.row_bytes, self._leaves)
        targets: tuple[Array, ...] = ring.columns
        return targets


def columns(buffer: memoryview, rows: int, row_bytes: int, leaves: Iterable[Leaf]) -> tuple[Array, ...]:
    """Return one array ``(rows, *leaf.shape)`` per leaf, all views of the same ``rows * row_bytes`` bytes."""
    made = []
    for leaf in leaves:
        # Within a row a leaf is contiguous. From one row to the next, the view steps over the other leaves.
        inner = np.empty(leaf.shape, leaf.wire_dtype).strides if leaf.wire.nbytes else (0,) * len(leaf.shape)
        made.append(np.ndarray((rows, *leaf.shape), leaf.wire_dtype, buffer, leaf.offset, (row_bytes, *inner)))
    return tuple(made)
