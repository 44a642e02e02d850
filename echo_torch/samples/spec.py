"""What one sample looks like, and whether a batch is made of such samples.

The wire knows nothing but item sizes, so every leaf of every batch is checked here: its key path, shape and dtype.

* The wire order is optree's: dict keys sorted, OrderedDict and sequences in their own order, ``None`` dropped.
* Leaves match by key path: mappings of any type are interchangeable, and so are list, tuple and namedtuple. Whatever
  order a batch has its keys in, its leaves travel in the example's order.
* The same structure comes again and again, so where its leaves are is learnt once. A batch that is right costs no more
  than finding that out; what is wrong with another is looked into after that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import optree
import torch

from echo_torch.support import accelerator
from echo_torch.wire.protocol import WireLeaf

from .leaf import TORCH_ONLY_DTYPES, Array, Leaf, checked_dtypes, shape_of, to_host, to_wire_array
from .mismatch import leaves_error, server_spec_error, structure_error
from .pytree import (
    flatten,
    flatten_with_opened,
    format_key_path,
    has_only_builtin_containers,
    in_transform_or_fake_mode,
    key_paths,
)

# How many structures of batches are remembered; a loader yields one or two, and a fresh one each time is no leak.
_MAX_STRUCTURES = 64
# After so many different structures in a row the next is not tried for the last one: to find that it differs is slow,
# since optree writes it all down for the error.
_MAX_MISSES = 8

_TENSORS = {torch.Tensor}
_ARRAYS = {np.ndarray}
_NUMPY_TYPES = {np.ndarray, *np.sctypeDict.values()}


class Match(NamedTuple):
    """A batch that was found to be right."""

    arrays: list[Any]
    """One array per leaf in wire order, sharing the batch's memory where possible; a tensor if that is on a device.

    Of shape ``(rows, *leaf.shape)``, or ``leaf.shape`` if the batch was one sample.
    """
    rows: int
    batched: bool
    """False if the batch was one sample."""
    on_device: bool = False
    """Whether some are tensors."""
    shards: Any = None
    """Which of several learners the samples are for, ``(rows,)``, or all of them; None if that is open."""

    def slice_rows(self, first: int, end: int) -> Match:
        """Its samples from ``first`` up to ``end``, or to the last."""
        arrays = self.arrays if self.batched else [array[None, ...] for array in self.arrays]
        shards = self.shards[first:end] if isinstance(self.shards, np.ndarray) else self.shards
        return Match([array[first:end] for array in arrays], min(end, self.rows) - first, True, self.on_device, shards)

    def take(self, rows: Array) -> Match:
        """Copies of the samples of a batch with these indexes, for one learner."""
        arrays = [
            array[torch.from_numpy(rows).to(array.device)] if isinstance(array, torch.Tensor) else array[rows]
            for array in self.arrays
        ]
        return Match(arrays, len(rows), True, self.on_device)

    def without_last(self, count: int) -> Match:
        """The same without its last ``count`` samples, of which there are as many at least."""
        if count > self.rows:
            raise ValueError(f"skip_last: got {count}, expected at most the {self.rows} samples of the batch")
        return self.slice_rows(0, self.rows - count)


class SampleSpec:
    """The leaves of one sample, made from an example of it.

    Args:
        example: pytree of tensors, numpy arrays and Python or numpy scalars; only shapes and dtypes count.
        root: what messages call the data that is matched.

    Raises:
        TypeError: a leaf is no dense array of numbers; the message names its path.
        ValueError: a sample has no bytes.
    """

    def __init__(self, example: Any, root: str = "batch") -> None:
        self.root = root
        flat, self.treespec = flatten(example)
        offset = 0
        leaves = []
        for leaf, key in zip(flat, key_paths(self.treespec), strict=True):
            path = format_key_path(key)
            dtype, wire_dtype = checked_dtypes(leaf, f"example{path}")
            shape = shape_of(leaf)
            leaves.append(Leaf(path, key, shape, dtype, wire_dtype, offset, dtype in TORCH_ONLY_DTYPES))
            offset += leaves[-1].wire.nbytes
        self.leaves = tuple(leaves)
        self.payload_size = offset
        if offset == 0:
            raise ValueError(f"a sample has no bytes: {self.describe()}; the example needs a leaf that is not empty")
        self._dtypes = [leaf.wire_dtype for leaf in leaves]
        self._any_torch_only = any(leaf.torch_only for leaf in leaves)
        self._identity_order = tuple(range(len(leaves)))
        self._last_structure = (
            (self.treespec, self._identity_order) if has_only_builtin_containers(self.treespec) else None
        )
        self._misses = 0  # how many in a row had another structure than the one before
        self._orders: dict[Any, tuple[int, ...]] = {}
        self._cached_shapes: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def __getstate__(self) -> dict[str, Any]:
        """Without what was learnt, which may hold types that do not pickle."""
        return {
            **self.__dict__,
            "_last_structure": (self.treespec, self._identity_order)
            if has_only_builtin_containers(self.treespec)
            else None,
            "_misses": 0,
            "_orders": {},
            "_cached_shapes": (-1, []),
        }

    def describe(self) -> str:
        """All leaves on one line."""
        return "{" + ", ".join(map(str, self.leaves)) + "}"

    def numpy_sample(self) -> Any:
        """The example's structure with zeroed numpy arrays, as ``echo.Server`` and clients take it."""
        return optree.tree_unflatten(self.treespec, [np.zeros(leaf.shape, leaf.wire_dtype) for leaf in self.leaves])

    def unflatten(self, arrays: Iterable[Any]) -> Any:
        """A sample of the example's structure from leaves in wire order."""
        return optree.tree_unflatten(self.treespec, arrays)

    def check_server(self, theirs: Sequence[WireLeaf], peer: str) -> None:
        """Compare with what a server expects.

        Raises:
            SpecMismatchError: naming both sides, leaf by leaf.
        """
        same_length = len(theirs) == len(self.leaves)
        if not same_length or any(got != leaf.wire for got, leaf in zip(theirs, self.leaves, strict=True)):
            raise server_spec_error(self.leaves, theirs, peer)

    def try_numpy_leaves(self, sample: Any) -> list[Array] | None:
        """The leaves of one sample that is all numpy and in the structure met last; None to have it `match`-ed."""
        leaves = self._try_flatten_as_last(sample)
        if leaves is None or self._any_torch_only or not _NUMPY_TYPES.issuperset(map(type, leaves)):
            return None
        return (
            leaves if self._shapes_and_dtypes_match(leaves, self._expected_shapes(1, False), on_device=False) else None
        )

    def match(self, batch: Any, batched: bool | None = None) -> Match:
        """Check ``batch`` against the example, leaf by leaf.

        Args:
            batch: one sample, or samples stacked along a new first dimension that all leaves share.
            batched: says which of the two; None to tell by the rank of the leaves.

        Raises:
            SpecMismatchError: structure, shape or dtype differ; names path, got, expected and remedy.
            TypeError: a leaf is no dense array of numbers.
        """
        leaves = self.leaves
        arrays = self._try_fast_arrays(batch)
        if arrays is None:
            arrays = self._to_arrays(self._leaves_in_wire_order(batch))
            on_device = torch.Tensor in set(map(type, arrays))
        else:  # tensors all of them, or none
            on_device = type(arrays[0]) is torch.Tensor
        first = arrays[0]
        stacked = first.ndim > len(leaves[0].shape) if batched is None else batched
        rows = len(first) if stacked and first.ndim else 1
        if not self._shapes_and_dtypes_match(arrays, self._expected_shapes(rows, stacked), on_device):
            raise leaves_error(self.root, leaves, self._leaves_in_wire_order(batch), batched)
        return Match(arrays, rows, stacked, on_device)

    def to_host(self, match: Match) -> list[Array]:
        """The arrays of a match, after waiting for those that are on a device.

        Raises:
            RuntimeError: its device cannot be used here, or now.
        """
        arrays = []
        for array, leaf in zip(match.arrays, self.leaves, strict=True):
            if isinstance(array, torch.Tensor):
                accelerator.check_usable(array.device)
                array = to_host(array, leaf)
            arrays.append(array)
        return arrays

    def _try_fast_arrays(self, batch: Any) -> list[Any] | None:
        """The arrays of a batch of the structure met last, all of it plain tensors or all of it arrays; or None.

        This is what a training loop sends again and again; whatever else there is takes the long way.
        """
        flat = self._try_flatten_as_last(batch)
        if flat is None or in_transform_or_fake_mode():
            return None
        types = set(map(type, flat))
        if types == _TENSORS and accelerator.is_on_accelerator(flat[0]):
            return self._try_fast_device_tensors(flat)
        if self._any_torch_only:
            return None
        if types == _TENSORS:
            try:
                return [tensor.numpy() for tensor in flat]
            except Exception:  # another device or layout, a gradient, a lazy negation, a mode: the long way tells
                return None
        return flat if types == _ARRAYS else None

    def _try_fast_device_tensors(self, flat: list[Any]) -> list[Any] | None:
        """Those of tensors that are all on a device, or None."""
        pairs = zip(flat, self.leaves, strict=True)
        if not all(tensor.dtype is leaf.dtype and accelerator.is_on_accelerator(tensor) for tensor, leaf in pairs):
            return None
        return [tensor.detach() for tensor in flat]

    def _to_arrays(self, flat: list[Any]) -> list[Any]:
        """An array for each leaf, or the tensor that stays on its device."""
        in_transform = in_transform_or_fake_mode()
        values = []
        for value, leaf in zip(flat, self.leaves, strict=True):
            stays = not in_transform and accelerator.is_on_accelerator(value) and value.dtype is leaf.dtype
            values.append(value.detach() if stays else to_wire_array(value, leaf, self.root))
        return values

    def _try_flatten_as_last(self, tree: Any) -> list[Any] | None:
        """The leaves in wire order, some of them maybe containers, if they are found where they were last; or None."""
        last = self._last_structure
        if last is None or self._misses >= _MAX_MISSES:
            return None
        treespec, order = last
        try:
            flat: list[Any] = treespec.flatten_up_to(tree)
        except Exception:  # another structure; but what comes is what its `repr` raises, if that does
            self._misses += 1
            return None
        self._misses = 0
        return flat if order == self._identity_order else [flat[i] for i in order]

    def _shapes_and_dtypes_match(self, arrays: list[Any], shapes: list[tuple[int, ...]], on_device: bool) -> bool:
        if [array.shape for array in arrays] != shapes:
            return False
        if not on_device:
            return [array.dtype for array in arrays] == self._dtypes
        # A tensor has its leaf's dtype, or it would not be here.
        pairs = zip(arrays, self._dtypes, strict=True)
        return all(isinstance(array, torch.Tensor) or array.dtype == dtype for array, dtype in pairs)

    def _leaves_in_wire_order(self, batch: Any) -> list[Any]:
        """The leaves of a batch of any structure that has the example's."""
        flat, treespec, opened = flatten_with_opened(batch)
        last = self._last_structure
        known = last is not None and treespec == last[0]
        if known and not opened:
            self._misses = 0
        order = self._orders.get(treespec)
        if order is None:
            order = self._learn_order(treespec)
        if not known:
            self._last_structure = (treespec, order) if has_only_builtin_containers(treespec) else None
        return flat if order == self._identity_order else [flat[i] for i in order]

    def _expected_shapes(self, rows: int, batched: bool) -> list[tuple[int, ...]]:
        """The shapes that the arrays of a batch must have."""
        wanted = rows if batched else -2
        known, shapes = self._cached_shapes
        if known != wanted:
            shapes = [(rows, *leaf.shape) if batched else leaf.shape for leaf in self.leaves]
            self._cached_shapes = (wanted, shapes)
        return shapes

    def _learn_order(self, treespec: Any) -> tuple[int, ...]:
        """Where each leaf of the example is found among the leaves of a structure not seen before."""
        keys = key_paths(treespec)
        found = dict(zip(keys, range(len(keys)), strict=True))
        if found.keys() != {leaf.key_path for leaf in self.leaves}:
            raise structure_error(self.root, self.leaves, self.treespec, treespec)
        if len(self._orders) >= _MAX_STRUCTURES:
            self._orders.clear()
        order = tuple(found[leaf.key_path] for leaf in self.leaves)
        if has_only_builtin_containers(treespec):
            self._orders[treespec] = order
        return order


def numpy_example(example: Any) -> Any:
    """What to pass to ``echo.Server`` for samples like ``example``.

    Args:
        example: one sample: a pytree of tensors, numpy arrays and scalars.

    Returns:
        The same structure with numpy arrays of the same shapes, zeroed. bfloat16 becomes uint16 and the float8 types
        become uint8: the learner gets the values back with ``torch.from_numpy(leaf).view(torch.bfloat16)``.

    Raises:
        TypeError: a leaf is no dense array of numbers.
        ValueError: the sample has no bytes.
    """
    return SampleSpec(example).numpy_sample()


def example_from_batch(batch: Any) -> Any:
    """An example of one sample of ``batch``, leaves ``(B, *shape)``; raises ValueError for one without a B."""
    leaves, treespec = flatten(batch)
    for leaf, accessor in zip(leaves, treespec.accessors(), strict=True):
        checked_dtypes(leaf, accessor.codify("batch"))
        if np.ndim(leaf) == 0:
            raise ValueError(f"{accessor.codify('batch')}: got a scalar, expected [B, ...]")
    return optree.tree_unflatten(treespec, map(_leaf_example, leaves))


def _leaf_example(leaf: Any) -> Any:
    """An example of one item of a stacked leaf, which may have none."""
    if isinstance(leaf, torch.Tensor):
        return torch.empty(leaf.shape[1:], dtype=leaf.dtype, device="cpu")  # whatever the default device is
    return np.zeros(np.shape(leaf)[1:], np.asarray(leaf).dtype)


def check_numpy(data_sample: Any) -> None:
    """Raise TypeError unless every leaf is a numpy array, as the stock client demands of its ``data_sample``."""
    leaves, treespec = flatten(data_sample)
    for leaf, key in zip(leaves, key_paths(treespec), strict=True):
        if not isinstance(leaf, np.ndarray):
            raise TypeError(f"data_sample{format_key_path(key)}: got {type(leaf).__name__}, expected a numpy array")
