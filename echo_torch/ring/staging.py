"""Packs a batch on the accelerator that holds it, and copies it into rows of the ring while the caller goes on.

Each run of rows takes three steps, in this order:

1. On the caller's current stream, one kernel packs all leaves into rows. Before that, each leaf that is not contiguous
   takes a kernel of its own. Anything you do to the batch after `send` comes later in the same stream. So you may
   overwrite or free the batch at once, and it needs no ``record_stream``.
2. A separate stream waits for that kernel, on the device, and copies the rows into pinned memory, which is the ring.
   The caller's stream goes on meanwhile.
3. An event after the copy shows when the rows may be written to the socket. Query it, and never wait for it.

`DeviceCopy` holds a reference to the packed rows until the event has passed, and only then frees them. With
``record_stream``, the allocator would record an event itself, and would free the rows later.

Packed rows have a place in the ring before they are copied. So on the device they take no more memory than the ring
does on the host (``buffer_bytes``). Making leaves contiguous takes some more for a moment. If the device has no room
for that, or memory cannot be pinned, the stager raises `StagingError`, and the batch must go through the host.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from echo_torch.samples.leaf import Leaf
from echo_torch.support import accelerator
from echo_torch.support.tracing import profiler_range

from .ring import Filler, Ring

# Dtypes in which rows are packed, widest first. The kernel packs in the widest one whose size divides every leaf's
# size.
_UNIT_DTYPES = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
# Bytes to which `pinned_copy` aligns arrays: the size of the widest of these dtypes.
_ALIGNMENT_BYTES = 16
# Seconds to stage nothing after device or pinned memory ran out. A failed try makes the allocator give up its whole
# cache, so do not try again at once.
OUT_OF_MEMORY_PAUSE_S = 10.0


class StagingError(Exception):
    """The rows of a batch from ``first`` on cannot be staged. The rows before it were.

    Args:
        why: the reason, in words.
        first: the first row that was not staged.
    """

    def __init__(self, why: str, first: int) -> None:
        super().__init__(why)
        # The first row that was not staged.
        self.first = first


class DeviceCopy:
    """A copy of rows from a device into the ring, on ``stream``; implements `ring.PendingCopy`."""

    def __init__(self, stream: torch.Stream) -> None:
        # The stream that copies.
        self._stream = stream
        # Passes when the copy is done; None until the whole copy is enqueued.
        self._event: torch.Event | None = None
        # The memory that the copy reads. The references keep it from being used again too early.
        self._kept_alive: list[torch.Tensor] = []

    def keep_alive(self, memory: Sequence[torch.Tensor]) -> None:
        """Keep this memory until the copy is done."""
        self._kept_alive.extend(memory)

    def record_event(self) -> None:
        """Record the event after the copy. Call this when the whole copy is enqueued."""
        self._event = self._stream.record_event()

    def done(self) -> bool:
        return self._event is not None and self._free_if_done(accelerator.dedicate_thread_and_query(self._event))

    def has_stopped(self) -> bool:
        # An interrupt may have stopped the caller before it recorded the event. An event recorded now comes after
        # everything that the caller enqueued.
        if self._event is None:
            self.record_event()
        return self._event is not None and self._free_if_done(self._event.query())

    def _free_if_done(self, done: bool) -> bool:
        if done:
            self._kept_alive.clear()
        return done

    def abandon(self) -> None:
        # Nobody queries the event any more. So let the allocator wait for the stream before it reuses the memory.
        for memory in self._kept_alive:
            if not memory.is_cpu:
                memory.record_stream(self._stream)


class Stager:
    """Packs samples into the rows of a ring if at least one of their leaves is on a device.

    Args:
        ring: the rows to fill, in pageable memory at first.
        leaves: one sample's leaves, in wire order.
        move_ring: moves the ring's rows to other memory. Its arguments are the memory and the tensor that owns it.
    """

    def __init__(self, ring: Ring, leaves: Sequence[Leaf], move_ring: Callable[[memoryview, Any], None]) -> None:
        # The rows to fill.
        self._ring = ring
        # One sample's leaves, in wire order.
        self._leaves = leaves
        # Moves the ring into pinned memory.
        self._move_ring = move_ring
        # The dtype in which rows are packed.
        self._unit = widest_common_unit(leaf.wire.nbytes for leaf in leaves)
        # For each device, the stream that copies its rows.
        self._copy_streams: dict[torch.device, torch.Stream] = {}
        # Why memory cannot be pinned; None if it can. This is text because an exception would keep its frames alive,
        # and with them the batch.
        self._pinning_error: str | None = None
        # Two values: the time, by ``time.monotonic``, before which nothing is staged, and the text of the error.
        self._out_of_memory = (0.0, "")

    def make_filler(self, arrays: Sequence[Any], batched: bool) -> Filler:
        """Return a function that packs runs of the samples in ``arrays`` and starts to copy them into rows.

        The returned filler raises `StagingError` too.

        Args:
            arrays: one checked tensor or numpy array per leaf, ``(B, *shape)``, or ``shape`` for a single sample.
            batched: whether the arrays have the batch dimension.

        Raises:
            RuntimeError: a graph is being captured, or this process was forked after the device was initialized.
            StagingError: the device has no room, or memory cannot be pinned.
        """
        stacked = arrays if batched else [array[None, ...] for array in arrays]
        device = main_device(stacked)
        accelerator.check_usable(device)
        self._pin_ring()
        if time.monotonic() < self._out_of_memory[0]:
            raise StagingError(self._out_of_memory[1], 0)
        target, copy_stream, total = self._ring.pinned_rows, self._copy_stream(device), len(stacked[0])

        def fill(slot: int, first: int, rows: int) -> DeviceCopy:
            part = stacked if rows == total else [array[first : first + rows] for array in stacked]
            try:
                packed, uploaded = self._pack(part, device)
            except (torch.OutOfMemoryError, accelerator.PinnedMemoryError) as error:
                self._out_of_memory = time.monotonic() + OUT_OF_MEMORY_PAUSE_S, str(error)
                raise StagingError(str(error), first) from None
            # The copy holds the packed rows from here on, before anything reads them on another stream.
            copy = DeviceCopy(copy_stream)
            copy.keep_alive((packed, *uploaded))
            copy_stream.wait_stream(accelerator.current_stream(device))
            # Tell the ring before the copy begins. After an interrupt, the next packer then waits for the copy, instead
            # of filling the same rows.
            self._ring.uncommitted_copy = copy
            with profiler_range("echo_torch.copy"):
                write = functools.partial(target[slot : slot + rows].copy_, packed, non_blocking=True)
                accelerator.run_on_stream(copy_stream, write)
            copy.record_event()
            return copy

        return fill

    def _copy_stream(self, device: torch.device) -> torch.Stream:
        """Return the stream that copies rows of this device, and make it on the first call."""
        stream = self._copy_streams.get(device)
        if stream is None:
            stream = self._copy_streams[device] = accelerator.new_stream(device)
        return stream

    def _pin_ring(self) -> None:
        """Move the ring into pinned memory on the first call. After a failure, do not try again.

        Raises:
            StagingError: memory cannot be pinned.
        """
        ring = self._ring
        with ring.packing_lock:
            if ring.pinned_rows is None and not ring.stopped and self._pinning_error is None:
                try:
                    memory = accelerator.empty_pinned(ring.capacity * ring.row_bytes)
                    self._move_ring(memory.numpy().data, memory.view(ring.capacity, ring.row_bytes))
                except accelerator.PinnedMemoryError as error:
                    self._pinning_error = str(error)
        if self._pinning_error is not None:
            raise StagingError(self._pinning_error, 0)

    def _pack(self, arrays: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Enqueue the packing of these rows on the device.

        Returns:
            The packed rows, and the pinned copy of the leaves that are numpy arrays, if there are any. Keep both alive
            until the rows are copied.
        """
        packed = torch.empty((len(arrays[0]), self._ring.row_bytes), dtype=torch.uint8, device=device)
        # Leave out leaves without bytes. They add nothing to a row.
        arrays = [array for array, leaf in zip(arrays, self._leaves, strict=True) if leaf.wire.nbytes]
        numpy_arrays = [array for array in arrays if not isinstance(array, torch.Tensor)]
        uploaded = [pinned_copy(numpy_arrays)] if numpy_arrays else []
        with profiler_range("echo_torch.pack"):
            accelerator.run_on_current_stream(functools.partial(pack_rows, arrays, uploaded, self._unit, packed))
        return packed, uploaded


def main_device(arrays: Iterable[Any]) -> torch.device:
    """Return the device that holds most bytes of the tensors."""
    sizes: dict[torch.device, int] = {}
    for array in arrays:
        if isinstance(array, torch.Tensor):
            sizes[array.device] = sizes.get(array.device, 0) + array.nbytes
    return max(sizes, key=sizes.__getitem__)


def widest_common_unit(sizes: Iterable[int]) -> torch.dtype:
    """Return the widest dtype whose size divides all these sizes, in bytes; sizes of 0 do not count."""
    common = int(np.gcd.reduce([size for size in sizes if size]))
    return next(unit for unit in _UNIT_DTYPES if common % unit.itemsize == 0)


def pinned_copy(arrays: Sequence[Any]) -> torch.Tensor:
    """Return the bytes of numpy arrays, one after the other and aligned, in pinned memory (uint8)."""
    offsets, size = aligned_offsets(arrays)
    memory = accelerator.empty_pinned(size)
    whole = memory.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        np.copyto(np.ndarray(array.shape, array.dtype, whole.data, offset), array)
    return memory


def aligned_offsets(arrays: Sequence[Any]) -> tuple[list[int], int]:
    """Return the byte offset of each array in a `pinned_copy` of them all, and the copy's size in bytes."""
    offsets, end = [], 0
    for array in arrays:
        begins = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        offsets.append(begins)
        end = begins + array.nbytes
    return offsets, end


def pack_rows(arrays: Sequence[Any], uploaded: Sequence[torch.Tensor], unit: torch.dtype, packed: torch.Tensor) -> None:
    """Enqueue the kernels that pack arrays ``(rows, *shape)``, in order, into ``packed``.

    Args:
        arrays: tensors on devices of the same type as that of ``packed``, and numpy arrays. The bytes of numpy arrays
            come from ``uploaded``.
        uploaded: one `pinned_copy` of all numpy arrays, or empty if there are none.
        unit: dtype whose size divides the bytes per row of every array.
        packed: uint8 ``(rows, bytes)``, on the device that packs.
    """
    rows, here = len(packed), packed.device
    # Upload all numpy arrays in one transfer, and cut the result into one tensor per array.
    uploaded_leaves: Iterator[torch.Tensor] = iter(())
    if uploaded:
        uploaded_bytes = uploaded[0].to(here, non_blocking=True)
        numpy_arrays = [array for array in arrays if not isinstance(array, torch.Tensor)]
        pairs = zip(aligned_offsets(numpy_arrays)[0], numpy_arrays, strict=True)
        uploaded_leaves = iter(
            [uploaded_bytes[offset : offset + array.nbytes].view(rows, -1) for offset, array in pairs]
        )
    tensors = (array if isinstance(array, torch.Tensor) else next(uploaded_leaves) for array in arrays)
    # View every leaf as columns of one dtype. Then a single concatenation packs all rows.
    columns = [
        as_units(tensor if tensor.device == here else tensor.to(here, non_blocking=True), unit) for tensor in tensors
    ]
    torch.cat(columns, dim=1, out=packed.view(unit))


def as_units(tensor: torch.Tensor, unit: torch.dtype) -> torch.Tensor:
    """View the bytes of a tensor ``(rows, *shape)`` as ``(rows, bytes // unit.itemsize)``; copies only if it must."""
    # A lazy conjugate or negative keeps the bytes of the original, so compute its values. The view needs no gradient.
    if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
    plain = tensor.contiguous()
    # A view in a wider dtype needs aligned memory and an aligned offset.
    if plain.data_ptr() % unit.itemsize or plain.storage_offset() * plain.itemsize % unit.itemsize:
        plain = plain.clone()
    rows, items = len(plain), plain.numel() // len(plain)
    flat = plain.view(rows, items)
    if flat.stride() != (items, 1):  # a dimension of size 1 may have any stride, which a wider view refuses
        flat = plain.as_strided((rows, items), (items, 1))
    return flat.view(unit)
