"""Batches on an accelerator into rows of the ring: packed there, and copied here without anybody waiting.

For each run of rows, in this order:

1. On the stream that the caller works on, one kernel packs all leaves into rows; leaves that are not contiguous take
   one each before that. What the caller does to the batch after `send` comes after that in the same stream: so it may
   be overwritten, or freed, at once, and needs no ``record_stream``.
2. A stream of our own waits for that kernel, on the device, and copies the rows into pinned memory, which is the ring.
   The caller's stream goes on meanwhile.
3. An event behind the copy tells when the rows may be written to the socket. It is asked, never waited for.

The packed rows are freed only once the event has passed, because a reference is kept until then. That does the work of
``record_stream``, after which the allocator would have to ask an event of its own, and would know later.

What is packed and not copied yet is in the ring: so all of it takes no more memory on the device than the ring here,
``buffer_bytes``, beside what making leaves contiguous takes for a moment. Where the device has no room for that, or
memory cannot be pinned, `StagingError` says so, and the batch has to come by way of the host.
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

# What rows are packed in: the widest of which all leaves are whole numbers. Their size is what leaves are aligned to.
_UNIT_DTYPES = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
_ALIGNMENT_BYTES = 16
# Seconds for which a device that had no room is not asked again: it gave back all that it kept in reserve for that.
OUT_OF_MEMORY_PAUSE_S = 10.0


class StagingError(Exception):
    """Rows of a batch cannot be staged; those before ``first`` were."""

    def __init__(self, why: str, first: int) -> None:
        super().__init__(why)
        self.first = first


class DeviceCopy:
    """Rows that a device copies here, on ``stream``; see `ring.PendingCopy`."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream
        self._event: torch.Event | None = None
        self._kept_alive: list[torch.Tensor] = []

    def keep_alive(self, memory: Sequence[torch.Tensor]) -> None:
        """Let nobody have this memory before the copy is done."""
        self._kept_alive.extend(memory)

    def record_event(self) -> None:
        """All of it is enqueued."""
        self._event = self._stream.record_event()

    def done(self) -> bool:
        return self._event is not None and self._free_if_done(accelerator.query_from_dedicated_thread(self._event))

    def has_stopped(self) -> bool:
        if self._event is None:  # whoever enqueued it was interrupted
            self.record_event()
        return self._event is not None and self._free_if_done(self._event.query())

    def _free_if_done(self, done: bool) -> bool:
        if done:
            self._kept_alive.clear()
        return done

    def abandon(self) -> None:
        for memory in self._kept_alive:
            if not memory.is_cpu:
                memory.record_stream(self._stream)


class Stager:
    """Fills the rows of ``ring`` with samples of ``leaves`` of which some, at least, are on a device.

    Args:
        ring: in pageable memory at first.
        leaves: in the order of the wire.
        move_ring: has the ring go on in other memory, of which the second argument is kept with it.
    """

    def __init__(self, ring: Ring, leaves: Sequence[Leaf], move_ring: Callable[[memoryview, Any], None]) -> None:
        self._ring = ring
        self._leaves = leaves
        self._move_ring = move_ring
        self._unit = widest_common_unit(leaf.wire.nbytes for leaf in leaves)
        self._copy_streams: dict[torch.device, torch.Stream] = {}
        # Why not, in words: an error would hold what it went through, the batch for one.
        self._pinning_error: str | None = None
        self._out_of_memory = (0.0, "")

    def make_filler(self, arrays: Sequence[Any], batched: bool) -> Filler:
        """What packs runs of the samples in ``arrays``, which were checked, and begins to copy them into rows.

        Args:
            arrays: one per leaf, ``(B, *shape)``, or ``shape`` for a single sample; tensors or numpy arrays.
            batched: which of the two.

        Raises:
            RuntimeError: inside the capture of a graph, or in a process that cannot use the device since it was forked.
            StagingError: no memory, as `Filler` may, too.
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
            copy = DeviceCopy(copy_stream)
            copy.keep_alive((packed, *uploaded))
            copy_stream.wait_stream(accelerator.current_stream(device))
            self._ring.uncommitted_copy = copy
            with profiler_range("echo_torch.copy"):
                write = functools.partial(target[slot : slot + rows].copy_, packed, non_blocking=True)
                accelerator.run_on_stream(copy_stream, write)
            copy.record_event()
            return copy

        return fill

    def _copy_stream(self, device: torch.device) -> torch.Stream:
        """Our own, on which rows of that device are copied."""
        stream = self._copy_streams.get(device)
        if stream is None:
            stream = self._copy_streams[device] = accelerator.new_stream(device)
        return stream

    def _pin_ring(self) -> None:
        """Have the ring in pinned memory, once."""
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
        """All leaves of some rows, in memory of the device that will hold them; and what of it comes from elsewhere."""
        packed = torch.empty((len(arrays[0]), self._ring.row_bytes), dtype=torch.uint8, device=device)
        arrays = [array for array, leaf in zip(arrays, self._leaves, strict=True) if leaf.wire.nbytes]
        numpy_arrays = [array for array in arrays if not isinstance(array, torch.Tensor)]
        uploaded = [pinned_copy(numpy_arrays)] if numpy_arrays else []
        with profiler_range("echo_torch.pack"):
            accelerator.run_on_current_stream(functools.partial(pack_rows, arrays, uploaded, self._unit, packed))
        return packed, uploaded


def main_device(arrays: Iterable[Any]) -> torch.device:
    """The device that most bytes are on, of all that are on any."""
    sizes: dict[torch.device, int] = {}
    for array in arrays:
        if isinstance(array, torch.Tensor):
            sizes[array.device] = sizes.get(array.device, 0) + array.nbytes
    return max(sizes, key=sizes.__getitem__)


def widest_common_unit(sizes: Iterable[int]) -> torch.dtype:
    """The widest dtype that leaves of so many bytes are whole numbers of."""
    common = int(np.gcd.reduce([size for size in sizes if size]))
    return next(unit for unit in _UNIT_DTYPES if common % unit.itemsize == 0)


def pinned_copy(arrays: Sequence[Any]) -> torch.Tensor:
    """The bytes of arrays, one behind the other and aligned, in memory from which a device copies them by itself."""
    offsets, size = aligned_offsets(arrays)
    memory = accelerator.empty_pinned(size)
    whole = memory.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        np.copyto(np.ndarray(array.shape, array.dtype, whole.data, offset), array)
    return memory


def aligned_offsets(arrays: Sequence[Any]) -> tuple[list[int], int]:
    """Where each of some arrays begins in `pinned_copy` them, in bytes, and where the last one ends."""
    offsets, end = [], 0
    for array in arrays:
        begins = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        offsets.append(begins)
        end = begins + array.nbytes
    return offsets, end


def pack_rows(arrays: Sequence[Any], uploaded: Sequence[torch.Tensor], unit: torch.dtype, packed: torch.Tensor) -> None:
    """Enqueue what packs ``(rows, *shape)`` each, in order, into uint8 ``(rows, bytes)``.

    Args:
        arrays: tensors on any device of the kind; in place of arrays of numpy, what ``uploaded`` has of them is taken.
        uploaded: `pinned_copy` those, if there are any.
        unit: what all of them are whole numbers of.
        packed: on the device that is to pack.
    """
    rows, here = len(packed), packed.device
    uploaded_leaves: Iterator[torch.Tensor] = iter(())
    if uploaded:
        uploaded_bytes = uploaded[0].to(here, non_blocking=True)
        numpy_arrays = [array for array in arrays if not isinstance(array, torch.Tensor)]
        pairs = zip(aligned_offsets(numpy_arrays)[0], numpy_arrays, strict=True)
        uploaded_leaves = iter(
            [uploaded_bytes[offset : offset + array.nbytes].view(rows, -1) for offset, array in pairs]
        )
    tensors = (array if isinstance(array, torch.Tensor) else next(uploaded_leaves) for array in arrays)
    columns = [
        as_units(tensor if tensor.device == here else tensor.to(here, non_blocking=True), unit) for tensor in tensors
    ]
    torch.cat(columns, dim=1, out=packed.view(unit))


def as_units(tensor: torch.Tensor, unit: torch.dtype) -> torch.Tensor:
    """The bytes of ``(rows, *shape)`` as ``(rows, bytes / unit)``, without a copy where that is possible."""
    if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
    plain = tensor.contiguous()
    if plain.data_ptr() % unit.itemsize or plain.storage_offset() * plain.itemsize % unit.itemsize:
        plain = plain.clone()
    rows, items = len(plain), plain.numel() // len(plain)
    flat = plain.view(rows, items)
    if flat.stride() != (items, 1):  # where a size is 1, the stride may be anything
        flat = plain.as_strided((rows, items), (items, 1))
    return flat.view(unit)
