"""What one sample looks like, and whether a batch is made of such samples.

* The wire order is optree's: dict keys sorted, OrderedDict and sequences in their own order, ``None`` dropped.
* Leaves match by key path. Mappings of any type are interchangeable, and so are list, tuple and namedtuple. Whatever
  the order of a batch's keys, its leaves travel in the example's order.
* Most batches have the structure of the batch before. So a spec learns the leaf order of each structure once, and the
  fast path tries only the last structure.
* The comparison only decides whether a batch is wrong. If it is, `mismatch` finds out what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import optree
import torch

from echo_torch.support import accelerator
from echo_torch.wire.protocol import WireLeaf

from .leaf import (
    TORCH_ONLY_DTYPES,
    Array,
    Leaf,
    checked_dtypes,
    covers_all_elements,
    in_native_order,
    shape_of,
    tensor_to_wire_array,
    to_wire_array,
    uncovered_error,
)
from .mismatch import leaves_error, server_spec_error, structure_error
from .pytree import (
    flatten,
    flatten_with_opened_flag,
    format_key_path,
    has_only_builtin_containers,
    in_transform_or_fake_mode,
    key_paths,
)

# How many structures a spec remembers. A loader yields one or two. The limit keeps batches of ever new structures from
# filling the memory.
_MAX_STRUCTURES = 64
# A miss is a batch without the last structure. After this many misses in a row, the fast path is not tried any more.
# A miss is slow, because optree formats both structures for an error that nobody reads.
_MAX_MISSES = 8

# The sets of leaf types that the fast paths accept.
_TENSORS = {torch.Tensor}
_ARRAYS = {np.ndarray}
_NUMPY_TYPES = {np.ndarray, *np.sctypeDict.values()}


class Match(NamedTuple):
    """A batch that matches the example."""

    arrays: list[Any]
    """One numpy array per leaf in wire order, or a tensor if the leaf is on a device.

    Each has shape ``(rows, *leaf.shape)``, or ``leaf.shape`` if the batch was one sample. It shares the batch's memory
    where possible.
    """
    rows: int
    """How many samples there are."""
    batched: bool
    """False if the batch was one sample without a batch dimension."""
    on_device: bool = False
    """Whether any of the ``arrays`` is a tensor."""
    shards: Any = None
    """The index of the learner to send to: an int array ``(rows,)``, or an int for all rows. None: the sink chooses."""

    def slice_rows(self, first: int, end: int) -> Match:
        """Return the samples from ``first`` up to ``end``; ``end`` may lie beyond the last."""
        arrays = self.arrays if self.batched else [array[None, ...] for array in self.arrays]
        shards = self.shards[first:end] if isinstance(self.shards, np.ndarray) else self.shards
        return Match([array[first:end] for array in arrays], min(end, self.rows) - first, True, self.on_device, shards)

    def take_rows(self, rows: Array) -> Match:
        """Return copies of the samples with these indexes, without ``shards``; only for a batch."""
        arrays = [
            array[torch.from_numpy(rows).to(array.device)] if isinstance(array, torch.Tensor) else array[rows]
            for array in self.arrays
        ]
        return Match(arrays, len(rows), True, self.on_device)

    def without_last_rows(self, count: int) -> Match:
        """Return all but the last ``count`` samples.

        Raises:
            ValueError: there are fewer than ``count`` samples.
        """
        if count > self.rows:
            raise ValueError(f"skip_last: got {count}, expected at most the {self.rows} samples of the batch")
        return self.slice_rows(0, self.rows - count)


class SampleSpec:
    """The leaves of one sample, taken from an example, and the comparison of batches with them.

    Args:
        example: a pytree of tensors, numpy arrays and Python or numpy scalars. Only structure, shapes and dtypes count.
        root: what error messages call the data that you match.

    Raises:
        TypeError: a leaf is not a dense array of numbers; the message names its path.
        ValueError: a sample has no bytes.
    """

    def __init__(self, example: Any, root: str = "batch") -> None:
        if example is None:
            raise TypeError("example: got None, expected one sample, such as dataset[0]")
        # What error messages call the data.
        self.root = root
        # The structure of the example. Containers that optree takes for leaves are dicts in it.
        flat, self.treespec = flatten(example)
        offset = 0
        leaves = []
        for leaf, key in zip(flat, key_paths(self.treespec), strict=True):
            path = format_key_path(key)
            dtype, wire_dtype = checked_dtypes(leaf, f"example{path}")
            shape = shape_of(leaf)
            leaves.append(Leaf(path, key, shape, dtype, wire_dtype, offset, dtype in TORCH_ONLY_DTYPES))
            offset += leaves[-1].wire.nbytes
        # In wire order.
        self.leaves = tuple(leaves)
        # Bytes of one sample on the wire.
        self.payload_size = offset
        if offset == 0:
            raise ValueError(f"a sample has no bytes: {self.describe()}; the example needs a leaf that is not empty")
        # Prepared once for `match`: the wire dtypes, whether numpy lacks the dtype of any leaf, and the order of leaves
        # that are in wire order already.
        self._dtypes = [leaf.wire_dtype for leaf in leaves]
        self._any_torch_only = any(leaf.torch_only for leaf in leaves)
        self._identity_order = tuple(range(len(leaves)))
        # The structure of the last batch and the order of its leaves; None if it has custom containers, because optree
        # does not compare their keys.
        self._last_structure = (
            (self.treespec, self._identity_order) if has_only_builtin_containers(self.treespec) else None
        )
        # How many batches in a row did not have the structure of the one before.
        self._misses = 0
        # For each known structure: at which index among the batch's leaves each leaf of the example is.
        self._orders: dict[Any, tuple[int, ...]] = {}
        # The last result of `_expected_shapes`: the number of rows and the shapes. The number is -1 before the first
        # result, and -2 for one sample without a batch dimension.
        self._cached_shapes: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the learned structures, which may hold types that do not pickle."""
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
        """Return a description of all leaves on one line."""
        return "{" + ", ".join(map(str, self.leaves)) + "}"

    def zeroed_numpy_sample(self) -> Any:
        """Return a sample of zeroed numpy arrays, as ``echo.Server`` and clients take it."""
        return optree.tree_unflatten(self.treespec, [np.zeros(leaf.shape, leaf.wire_dtype) for leaf in self.leaves])

    def unflatten(self, arrays: Iterable[Any]) -> Any:
        """Put leaves in wire order into the example's containers."""
        return optree.tree_unflatten(self.treespec, arrays)

    def check_server(self, theirs: Sequence[WireLeaf], peer: str) -> None:
        """Check that a server expects samples like the example.

        Args:
            theirs: the leaves that the server announced.
            peer: the server, as messages name it.

        Raises:
            SpecMismatchError: the server expects other samples; the message names both sides, leaf by leaf.
        """
        same_length = len(theirs) == len(self.leaves)
        if not same_length or any(got != leaf.wire for got, leaf in zip(theirs, self.leaves, strict=True)):
            raise server_spec_error(self.leaves, theirs, peer)

    def try_fast_numpy_leaves(self, sample: Any) -> list[Array] | None:
        """Return the leaves of one sample if it passes the fastest check; None means that you have to call `match`.

        The fastest check accepts only a correct sample that has the last structure and only numpy leaves. A sample that
        it does not accept may still be correct.
        """
        leaves = self._try_flatten_as_last(sample)
        if leaves is None or self._any_torch_only or not _NUMPY_TYPES.issuperset(map(type, leaves)):
            return None
        return (
            leaves if self._shapes_and_dtypes_match(leaves, self._expected_shapes(1, False), on_device=False) else None
        )

    def match(self, batch: Any, batched: bool | None = None) -> Match:
        """Check ``batch`` against the example, leaf by leaf, and return its arrays.

        Args:
            batch: one sample, or samples stacked along a new first dimension that all leaves share.
            batched: True for stacked samples, False for one sample, None to decide by the first leaf's dimensions.

        Raises:
            SpecMismatchError: structure, shape or dtype differ; the message names path, got, expected and remedy.
            TypeError: a leaf is not a dense array of numbers.
            RuntimeError: the device of a tensor cannot be used after a fork, or while this thread captures a graph.
        """
        leaves = self.leaves
        arrays = self._try_fast_arrays(batch)
        if arrays is None:
            arrays = self._to_arrays(self._leaves_in_wire_order(batch))
            on_device = torch.Tensor in set(map(type, arrays))
        else:  # the fast path returns only tensors or only arrays
            on_device = type(arrays[0]) is torch.Tensor
        first = arrays[0]
        stacked = first.ndim > len(leaves[0].shape) if batched is None else batched
        rows = len(first) if stacked and first.ndim else 1
        shapes = self._expected_shapes(rows, stacked)
        if not self._shapes_and_dtypes_match(arrays, shapes, on_device):
            arrays = list(map(in_native_order, arrays))
            if not self._shapes_and_dtypes_match(arrays, shapes, on_device):
                # Flatten again: an array no longer tells what type the value had, and the remedies depend on that.
                raise leaves_error(self.root, leaves, self._leaves_in_wire_order(batch), batched)
        return Match(arrays, rows, stacked, on_device)

    def to_host(self, match: Match) -> list[Array]:
        """Return the arrays of a match; blocks until those on a device are copied to the host.

        Raises:
            RuntimeError: the device cannot be used after a fork, or while this thread captures a graph.
        """
        arrays = []
        for array, leaf in zip(match.arrays, self.leaves, strict=True):
            if isinstance(array, torch.Tensor):
                accelerator.check_usable(array.device)
                array = tensor_to_wire_array(array, leaf)
            arrays.append(array)
        return arrays

    def _try_fast_arrays(self, batch: Any) -> list[Any] | None:
        """Return the arrays if the batch has the last structure and only plain tensors or only numpy arrays, else None.

        A training loop sends such batches again and again. All others take `_to_arrays`.
        """
        flat = self._try_flatten_as_last(batch)
        if flat is None or in_transform_or_fake_mode():
            return None
        types = set(map(type, flat))
        if types == _TENSORS and accelerator.is_dense_on_accelerator(flat[0]):
            return self._try_fast_device_tensors(flat)
        if self._any_torch_only:
            return None
        if types == _TENSORS:
            try:
                arrays = [tensor.numpy() for tensor in flat]
            except Exception:  # other device or layout, gradient, lazy negation, dispatch mode: left to `_to_arrays`
                return None
            for tensor, array in zip(flat, arrays, strict=True):
                # Almost every tensor fills a storage of its own. That is quick to see.
                filled = tensor.untyped_storage().nbytes() == array.nbytes
                if not filled or tensor.storage_offset() or not array.flags.c_contiguous:
                    for value, leaf in zip(flat, self.leaves, strict=True):
                        self._detach_covered(value, leaf)
                    break
            return arrays
        return flat if types == _ARRAYS else None

    def _try_fast_device_tensors(self, flat: list[Any]) -> list[Any] | None:
        """Return the tensors if all are on an accelerator in the right dtype, else None."""
        pairs = zip(flat, self.leaves, strict=True)
        if not all(
            tensor.dtype is leaf.dtype and accelerator.is_dense_on_accelerator(tensor) for tensor, leaf in pairs
        ):
            return None
        return list(map(self._detach_covered, flat, self.leaves))

    def _detach_covered(self, tensor: torch.Tensor, leaf: Leaf) -> torch.Tensor:
        """Return a tensor without its gradient; raise TypeError if its storage does not hold all its elements."""
        if not covers_all_elements(tensor):
            raise uncovered_error(tensor, self.root + leaf.path)
        return tensor.detach()

    def _to_arrays(self, flat: list[Any]) -> list[Any]:
        """Return an array for each leaf, or a tensor for a leaf that stays on its device."""
        in_transform = in_transform_or_fake_mode()
        values = []
        for value, leaf in zip(flat, self.leaves, strict=True):
            stays = not in_transform and accelerator.is_dense_on_accelerator(value) and value.dtype is leaf.dtype
            values.append(self._detach_covered(value, leaf) if stays else to_wire_array(value, leaf, self.root))
        return values

    def _try_flatten_as_last(self, tree: Any) -> list[Any] | None:
        """Return the leaves in wire order if the tree has the last structure, else None.

        A returned leaf may be a container: ``flatten_up_to`` looks no deeper than the leaves of the last structure.
        """
        last = self._last_structure
        if last is None or self._misses >= _MAX_MISSES:
            return None
        treespec, order = last
        try:
            flat: list[Any] = treespec.flatten_up_to(tree)
        except Exception:  # ValueError for another structure, but a failing `repr` in its message may raise anything
            self._misses += 1
            return None
        self._misses = 0
        return flat if order == self._identity_order else [flat[i] for i in order]

    def _shapes_and_dtypes_match(self, arrays: list[Any], shapes: list[tuple[int, ...]], on_device: bool) -> bool:
        if [array.shape for array in arrays] != shapes:
            return False
        if not on_device:
            return [array.dtype for array in arrays] == self._dtypes
        # A tensor needs no check: only a tensor with its leaf's dtype stays on its device.
        pairs = zip(arrays, self._dtypes, strict=True)
        return all(isinstance(array, torch.Tensor) or array.dtype == dtype for array, dtype in pairs)

    def _leaves_in_wire_order(self, batch: Any) -> list[Any]:
        """Return the leaves of a batch in wire order.

        Raises:
            SpecMismatchError: the batch does not have the key paths of the example.
        """
        flat, treespec, opened = flatten_with_opened_flag(batch)
        last = self._last_structure
        known = last is not None and treespec == last[0]
        # `_try_flatten_as_last` fails for a batch with a container that had to be opened, even if the structure is the
        # last one. Do not reset the misses for it, so that the fast path is given up.
        if known and not opened:
            self._misses = 0
        order = self._orders.get(treespec)
        if order is None:
            order = self._learn_order(treespec)
        if not known:
            self._last_structure = (treespec, order) if has_only_builtin_containers(treespec) else None
        return flat if order == self._identity_order else [flat[i] for i in order]

    def _expected_shapes(self, rows: int, batched: bool) -> list[tuple[int, ...]]:
        """Return the shapes that the arrays of a batch must have."""
        wanted = rows if batched else -2  # -1 is the empty cache
        known, shapes = self._cached_shapes
        if known != wanted:
            shapes = [(rows, *leaf.shape) if batched else leaf.shape for leaf in self.leaves]
            self._cached_shapes = (wanted, shapes)
        return shapes

    def _learn_order(self, treespec: Any) -> tuple[int, ...]:
        """Return, for each leaf of the example, its index among the leaves of a new structure.

        Remembers the answer, but not for custom containers, because optree does not compare their keys.

        Raises:
            SpecMismatchError: the structure does not have the key paths of the example.
        """
        keys = key_paths(treespec)
        found = dict(zip(keys, range(len(keys)), strict=True))
        if found.keys() != {leaf.key_path for leaf in self.leaves}:
            raise structure_error(self.root, self.leaves, self.treespec, treespec)
        if len(self._orders) >= _MAX_STRUCTURES:
            self._orders.clear()  # simple, and rare: the structures in use are learned again
        order = tuple(found[leaf.key_path] for leaf in self.leaves)
        if has_only_builtin_containers(treespec):
            self._orders[treespec] = order
        return order


def numpy_example(example: Any) -> Any:
    """Return what to pass to ``echo.Server`` for samples like ``example``.

    Args:
        example: one sample: a pytree of tensors, numpy arrays and scalars.

    Returns:
        The same structure with zeroed numpy arrays of the same shapes. dtypes that numpy lacks become unsigned integers
        of the same size: bfloat16 becomes uint16, the float8 types become uint8. `EchoDataset` converts them back; if
        you call ``server.sample()`` yourself, use ``torch.from_numpy(leaf).view(torch.bfloat16)``.

    Raises:
        TypeError: a leaf is not a dense array of numbers.
        ValueError: the sample has no bytes.
    """
    return SampleSpec(example).zeroed_numpy_sample()


def example_from_batch(batch: Any) -> Any:
    """Return an example of one sample of a batch.

    Args:
        batch: a pytree with leaves ``(B, *shape)``; B may be 0.

    Raises:
        TypeError: a leaf is not a dense array of numbers.
        ValueError: a leaf has no batch dimension.
    """
    leaves, treespec = flatten(batch)
    for leaf, accessor in zip(leaves, treespec.accessors(), strict=True):
        checked_dtypes(leaf, accessor.codify("batch"))
        if np.ndim(leaf) == 0:
            raise ValueError(f"{accessor.codify('batch')}: got a scalar, expected [B, ...]")
    return optree.tree_unflatten(treespec, map(_leaf_example, leaves))


def _leaf_example(leaf: Any) -> Any:
    """Return a leaf with the shape and dtype of one item of a stacked leaf; its values do not matter."""
    # Not `leaf[0]`, because the batch may be empty.
    if isinstance(leaf, torch.Tensor):
        return torch.empty(leaf.shape[1:], dtype=leaf.dtype, device="cpu")  # whatever the default device is
    return np.zeros(np.shape(leaf)[1:], np.asarray(leaf).dtype)


def check_numpy_leaves(data_sample: Any) -> None:
    """Raise TypeError unless every leaf is a numpy array, as ``echo.TcpClient`` requires of its ``data_sample``."""
    leaves, treespec = flatten(data_sample)
    for leaf, key in zip(leaves, key_paths(treespec), strict=True):
        if not isinstance(leaf, np.ndarray):
            raise TypeError(f"data_sample{format_key_path(key)}: got {type(leaf).__name__}, expected a numpy array")
