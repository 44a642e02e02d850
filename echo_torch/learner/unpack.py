"""Converts a server's batches into tensors of an example's structure, shapes and dtypes.

* The leaves of ``echo.Server.sample().batch`` are read-only numpy views of the server's ring. They are valid until the
  next call of ``sample()``. Dropping the server frees the memory, so a tensor that shares it keeps the server alive.
* The server may have been made with another example, so the first batch is checked. A later batch is only compared
  with the layout of the one before.
* The server knows only numpy dtypes. Leaves of other dtypes arrive as unsigned integers and are viewed back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optree
import torch

from echo_torch.samples.leaf import Array, Leaf, torch_dtype
from echo_torch.samples.mismatch import server_batch_error
from echo_torch.samples.pytree import key_paths
from echo_torch.samples.spec import SampleSpec
from echo_torch.support import accelerator

# Makes tensors of the arrays of a batch. The second argument is the object that their memory belongs to.
Convert = Callable[[Sequence[Array], object], list[torch.Tensor]]


class Unpacker:
    """Checks batches, and makes tensors of them.

    Args:
        example: one sample, as `EchoSink` takes it.
        convert: `wrap_arrays`, `copy_arrays`, a `StreamUploader` or a `SynchronousUploader`.

    Raises:
        TypeError: a leaf is not a dense array of numbers, or PyTorch lacks its dtype.
        ValueError: a sample has no bytes.
    """

    def __init__(self, example: Any, convert: Convert) -> None:
        self._spec = SampleSpec(example)
        self._convert = convert
        # Structure, shapes and dtypes of the last batch that was checked; empty before the first.
        self._last_layout: tuple[Any, ...] = ()
        # The dtypes of the tensors, in wire order.
        self._dtypes: list[torch.dtype] = []
        for leaf in self._spec.leaves:
            if not isinstance(leaf.dtype, torch.dtype):
                raise TypeError(f"example{leaf.path}: got numpy dtype {leaf.dtype}, expected one that PyTorch has")
            self._dtypes.append(leaf.dtype)

    def to_tensors(self, batch: Any, owner: object) -> list[torch.Tensor]:
        """Return one tensor per leaf, ``(batch_size, *leaf.shape)``, of the example's dtype.

        Args:
            batch: a pytree of numpy arrays, ``server.sample().batch``.
            owner: the object whose memory the arrays show. A tensor that shares the memory keeps it alive.

        Raises:
            SpecMismatchError: the server was not made for samples like the example.
        """
        arrays, treespec = optree.tree_flatten(batch)
        layout = (treespec, *map(_layout_of_array, arrays))
        if layout != self._last_layout:
            self._check(arrays, treespec)
            self._last_layout = layout
        tensors = self._convert(arrays, owner)
        pairs = zip(tensors, self._dtypes, strict=True)
        return [tensor if tensor.dtype is dtype else tensor.view(dtype) for tensor, dtype in pairs]

    def unflatten(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Put tensors in wire order into the example's containers."""
        return self._spec.unflatten(tensors)

    def _check(self, arrays: Sequence[Any], treespec: Any) -> None:
        keys, leaves = key_paths(treespec), self._spec.leaves
        if keys != [leaf.key_path for leaf in leaves] or not all(map(_fits, leaves, arrays)):
            raise server_batch_error(leaves, keys, arrays)


def _layout_of_array(array: Any) -> object:
    return (array.shape, array.dtype) if isinstance(array, np.ndarray) else None


def _fits(leaf: Leaf, array: Any) -> bool:
    """Whether an array holds a batch of this leaf.

    If numpy lacks the leaf's dtype, only the bytes count, so any dtype of the same size will do.
    """
    if not isinstance(array, np.ndarray) or not array.ndim or array.shape[1:] != leaf.shape:
        return False
    fits_as_bytes = (
        leaf.torch_only and torch_dtype(array.dtype) is not None and array.itemsize == leaf.wire_dtype.itemsize
    )
    return fits_as_bytes or array.dtype == leaf.wire_dtype


class _WritableArray:
    """Presents the memory of a read-only array to numpy as writable.

    PyTorch warns if it gets a read-only array. The array that numpy makes of this object keeps this object alive, and
    with it the owner of the memory.
    """

    def __init__(self, array: Array, owner: object) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._keep_alive = (array, owner)


def wrap_arrays(arrays: Sequence[Array], owner: object) -> list[torch.Tensor]:
    """Return tensors that share the memory of the arrays and keep its owner alive."""
    # An empty array has no memory to share, so it is copied.
    return [
        torch.from_numpy(np.asarray(_WritableArray(array, owner)) if array.size else array.copy()) for array in arrays
    ]


def copy_arrays(arrays: Sequence[Array], owner: object) -> list[torch.Tensor]:
    """Return tensors with memory of their own.

    numpy copies in this thread. PyTorch would take threads from its pool, which training uses, and wait for them.
    """
    return [torch.from_numpy(array.copy()) for array in arrays]


class StreamUploader:
    """Copies arrays to an accelerator; call it from one thread that does nothing else with the device.

    It copies in a stream of its own, so computation in other streams goes on. If the memory of the arrays is pinned,
    the device copies by itself. If not, the driver copies, in this thread.
    """

    def __init__(self, device: torch.device) -> None:
        # Where the tensors go.
        self._device = device
        # Where the copies run; created by the first call, in the thread that copies.
        self._stream: torch.Stream | None = None

    def __call__(self, arrays: Sequence[Array], owner: object) -> list[torch.Tensor]:
        """Return tensors on the device; the copies are complete, so the arrays may be overwritten."""
        if self._stream is None:
            accelerator.dedicate_thread(self._device)
            self._stream = accelerator.new_stream(self._device)
        sources = wrap_arrays(arrays, owner)
        # The copies belong to this stream. `EchoDataset` tells the allocator which stream uses them:
        # `accelerator.record_use_by_current_stream`.
        copies = [accelerator.empty_like_on_stream(source, self._stream) for source in sources]
        for target, source in zip(copies, sources, strict=True):
            accelerator.run_on_stream(self._stream, functools.partial(target.copy_, source, non_blocking=True))
        accelerator.synchronize_stream(self._stream)
        return copies


class SynchronousUploader:
    """Copies arrays to a device that has no streams."""

    def __init__(self, device: torch.device) -> None:
        # Where the tensors go.
        self._device = device

    def __call__(self, arrays: Sequence[Array], owner: object) -> list[torch.Tensor]:
        return [tensor.to(self._device) for tensor in copy_arrays(arrays, owner)]
