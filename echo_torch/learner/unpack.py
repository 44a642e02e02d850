"""The batches that a server gives into tensors of an example's structure, shapes and dtypes.

* The leaves of ``echo.Server.sample().batch`` are numpy views of the server's ring: read-only, good until the next call
  of ``sample()``, and of freed memory once the server is dropped. A tensor that shares their memory keeps the server.
* Who made the server told it no more than numpy dtypes, so a batch is checked against the example before it is taken
  for one of its kind; later ones have only to look as the one before.
* dtypes that numpy lacks are viewed back from their bytes.
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

# Makes tensors of the arrays of a batch, and of what their memory belongs to.
Convert = Callable[[Sequence[Array], object], list[torch.Tensor]]


class Unpacker:
    """Checks batches, and makes tensors of them.

    Args:
        example: one sample, as `EchoSink` takes it.
        convert: `wrap_arrays`, `copy_arrays`, or an `Uploader`.

    Raises:
        TypeError: a leaf is no dense array of numbers, or of a dtype of which there are no tensors.
        ValueError: a sample has no bytes.
    """

    def __init__(self, example: Any, convert: Convert) -> None:
        self._spec = SampleSpec(example)
        self._convert = convert
        self._last_layout: tuple[Any, ...] = ()
        self._dtypes: list[torch.dtype] = []
        for leaf in self._spec.leaves:
            if not isinstance(leaf.dtype, torch.dtype):
                raise TypeError(f"example{leaf.path}: got numpy dtype {leaf.dtype}, expected one that PyTorch has")
            self._dtypes.append(leaf.dtype)

    def to_tensors(self, batch: Any, owner: object) -> list[torch.Tensor]:
        """One per leaf, ``(batch_size, *leaf.shape)``, of the example's dtype.

        Args:
            batch: what the server gave.
            owner: has to be there for as long as its memory is.

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
        """In the example's containers."""
        return self._spec.unflatten(tensors)

    def _check(self, arrays: Sequence[Any], treespec: Any) -> None:
        keys, leaves = key_paths(treespec), self._spec.leaves
        if keys != [leaf.key_path for leaf in leaves] or not all(map(_fits, leaves, arrays)):
            raise server_batch_error(leaves, keys, arrays)


def _layout_of_array(array: Any) -> object:
    return (array.shape, array.dtype) if isinstance(array, np.ndarray) else None


def _fits(leaf: Leaf, array: Any) -> bool:
    """Whether an array is one of samples of this leaf. Any dtype of their size will do for bytes."""
    if not isinstance(array, np.ndarray) or not array.ndim or array.shape[1:] != leaf.shape:
        return False
    fits_as_bytes = (
        leaf.torch_only and torch_dtype(array.dtype) is not None and array.itemsize == leaf.wire_dtype.itemsize
    )
    return fits_as_bytes or array.dtype == leaf.wire_dtype


class _WritableArray:
    """The memory of an array, for numpy to take it for writable, and to keep what it belongs to."""

    def __init__(self, array: Array, owner: object) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._keep_alive = (array, owner)


def wrap_arrays(arrays: Sequence[Array], owner: object) -> list[torch.Tensor]:
    """Tensors of the same memory."""
    return [
        torch.from_numpy(np.asarray(_WritableArray(array, owner)) if array.size else array.copy()) for array in arrays
    ]


def copy_arrays(arrays: Sequence[Array], owner: object) -> list[torch.Tensor]:
    """Tensors of their own, copied in this thread: PyTorch would take some from those that train, and wait for them."""
    return [torch.from_numpy(array.copy()) for array in arrays]


class Uploader:
    """Makes tensors on an accelerator, for a thread that does nothing else with it.

    They are copied in a stream of our own, beside what others compute meanwhile. If the memory of the arrays is pinned,
    the device does that by itself; if not, the driver does, in this thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.Stream | None = None

    def __call__(self, arrays: Sequence[Array], owner: object) -> list[torch.Tensor]:
        """Copies that are complete when this returns, so that the arrays may be overwritten."""
        if self._stream is None:
            accelerator.dedicate_thread(self._device)
            self._stream = accelerator.new_stream(self._device)
        sources = wrap_arrays(arrays, owner)
        copies = [accelerator.empty_like(source, self._stream) for source in sources]
        for target, source in zip(copies, sources, strict=True):
            accelerator.run_on_stream(self._stream, functools.partial(target.copy_, source, non_blocking=True))
        accelerator.synchronize(self._stream)
        return copies


class SynchronousUploader:
    """Makes tensors on a device without streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, arrays: Sequence[Array], owner: object) -> list[torch.Tensor]:
        return [tensor.to(self._device) for tensor in copy_arrays(arrays, owner)]
