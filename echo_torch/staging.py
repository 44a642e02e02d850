"""Batches on an accelerator into rows of the ring: packed there, and copied here without anybody waiting.

For each run of rows, in this order:

1. On the stream that the caller works on, one kernel packs all leaves into rows. What the caller does to the batch
   after `send` comes after that in the same stream: so it may be overwritten, or freed, at once, and needs no
   ``record_stream``.
2. A stream of our own waits for that kernel, on the device, and copies the rows into pinned memory, which is the ring.
   The caller's stream goes on meanwhile.
3. An event behind the copy tells when the rows may be written to the socket. It is asked, never waited for.

The packed rows are freed only once the event has passed, because a reference is kept until then. That does the work of
``record_stream``, after which the allocator would have to ask an event of its own, and would know later.

Extra memory on the device: a batch is packed in pieces of a quarter of the ring at most, and what is not copied yet is
in the ring. So it is less than one and a half times ``buffer_bytes``. Where the device has no room for a piece, the
leaves are copied one by one, and `send` waits for that.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from . import accelerator
from .leaves import Leaf, on_host
from .pack import Packer
from .ring import Fill, Ring
from .tracing import profiled

_log = logging.getLogger(__name__)

# A batch is packed in pieces of this share of the ring at the most.
PIECE_SHARE = 4
# What rows are packed in: the widest of which all leaves are whole numbers.
_UNITS = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)


class DeviceCopy:
    """Rows that a device copies here, on ``stream``; see `ring.Copy`."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream
        self._event: torch.Event | None = None
        self._kept: list[Any] = []

    def keep(self, memory: Any) -> None:
        """Let nobody have this memory before the copy is done."""
        self._kept.append(memory)

    def begun(self) -> None:
        """All of it is enqueued."""
        self._event = self._stream.record_event()

    def done(self) -> bool:
        if self._event is None or not accelerator.passed(self._event):
            return False
        self._kept.clear()
        return True

    def finish(self) -> None:
        self._stream.synchronize()
        self._kept.clear()


class Stager:
    """Fills the rows of ``ring`` with samples of ``leaves`` of which some, at least, are on a device.

    Args:
        ring: in pageable memory at first.
        leaves: in the order of the wire.
        packer: for what there is no room for on the device.
        move: has the ring go on in other memory.
        peer: how messages name the other side.
    """

    def __init__(
        self, ring: Ring, leaves: Sequence[Leaf], packer: Packer, move: Callable[[memoryview], None], peer: str
    ) -> None:
        self._ring = ring
        self._leaves = leaves
        self._packer = packer
        self._move = move
        self._peer = peer
        self._unit = unit_of(leaf.wire.nbytes for leaf in leaves)
        self._piece_rows = max(1, ring.capacity // PIECE_SHARE)
        self._rows: torch.Tensor | None = None  # the ring's memory, (capacity, row_bytes)
        self._is_pinned = False
        self._streams: dict[torch.device, torch.Stream] = {}

    def filler(self, arrays: Sequence[Any], batched: bool) -> Fill:
        """What packs runs of the samples in ``arrays``, which were checked, and begins to copy them into rows.

        Args:
            arrays: one per leaf, ``(B, *shape)``, or ``shape`` for a single sample; tensors or numpy arrays.
            batched: which of the two.

        Raises:
            RuntimeError: inside the capture of a graph, or in a process that cannot use the device since it was forked.
        """
        stacked = arrays if batched else [array[None, ...] for array in arrays]
        device = device_of(stacked)
        accelerator.check_process(device)
        producing = accelerator.current_stream(device)
        accelerator.check_usable(device, producing)
        with self._ring.turn:
            if self._rows is None:
                self._rows = self._pin()
        return self._begin(stacked, device, producing, self._rows)

    def _begin(
        self, stacked: Sequence[Any], device: torch.device, producing: torch.Stream, target: torch.Tensor
    ) -> Fill:
        copying = self._stream(device)
        total = len(stacked[0])
        piece: tuple[int, torch.Tensor, list[Any]] | None = None
        on_cpu: Fill | None = None

        def fill(slot: int, first: int, rows: int) -> DeviceCopy | None:
            nonlocal on_cpu
            if on_cpu is None:
                copy = DeviceCopy(copying)
                self._ring.begun = copy
                try:
                    begin(copy, slot, first, rows)
                    return copy
                except torch.OutOfMemoryError as error:
                    text = (
                        "%s: %s has no memory to pack %d bytes; its samples are copied leaf by leaf, and waited for: %s"
                    )
                    _log.warning(text, self._peer, device, rows * self._ring.row_bytes, error)
                    self._ring.settle()
                    on_cpu = self._packer.filler(self._on_host(stacked), True)
            on_cpu(slot, first, rows)
            return None

        def begin(copy: DeviceCopy, slot: int, first: int, rows: int) -> None:
            nonlocal piece
            end = slot + rows
            while slot < end:
                if piece is None or not piece[0] <= first < piece[0] + len(piece[1]):
                    count = min(self._piece_rows, total - first)
                    part = stacked if count == total else [array[first : first + count] for array in stacked]
                    piece = (first, *self._pack(part, producing, device))
                    copying.wait_stream(producing)
                begins, packed, uploaded = piece
                source = packed[first - begins : first - begins + end - slot]
                copy.keep((packed, uploaded))  # before: an interrupt may come after
                with profiled("echo_torch.copy"):
                    rows_here = target[slot : slot + len(source)]
                    accelerator.run_on(
                        copying, functools.partial(rows_here.copy_, source, non_blocking=self._is_pinned)
                    )
                slot, first = slot + len(source), first + len(source)
            copy.begun()

        return fill

    def release(self) -> None:
        """Keep the ring's memory no longer than the ring does."""
        self._rows = None

    def _stream(self, device: torch.device) -> torch.Stream:
        """Our own, on which rows of that device are copied."""
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = accelerator.new_stream(device)
        return stream

    def _pin(self) -> torch.Tensor:
        """The ring's memory as rows, after having had it pinned if that is possible."""
        ring = self._ring
        size = ring.capacity * ring.row_bytes
        try:
            memory = accelerator.pinned(size)
        except RuntimeError as error:
            text = "%s: no pinned memory of %d bytes; samples on a device are copied slowly, and waited for: %s"
            _log.warning(text, self._peer, size, error)
            memory = torch.frombuffer(ring.buffer, dtype=torch.uint8, count=size)
        else:
            self._move(memory.numpy().data)
            self._is_pinned = True
        return memory.view(ring.capacity, ring.row_bytes)

    def _pack(
        self, arrays: Sequence[Any], producing: torch.Stream, device: torch.device
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """All leaves of some rows, in memory of the device that will hold them; and what of it comes from elsewhere."""
        packed = torch.empty((len(arrays[0]), self._ring.row_bytes), dtype=torch.uint8, device=device)
        there, uploaded = [], []
        for array, leaf in zip(arrays, self._leaves, strict=True):
            if not leaf.wire.nbytes:
                continue
            if not isinstance(array, torch.Tensor):
                array = own_bytes(array)
                uploaded.append(array)
            there.append(array)
        with profiled("echo_torch.pack"):
            accelerator.run_on(producing, functools.partial(pack_rows, there, self._unit, packed))
        return packed, uploaded

    def _on_host(self, stacked: Sequence[Any]) -> list[Any]:
        pairs = zip(stacked, self._leaves, strict=True)
        return [on_host(array, leaf) if isinstance(array, torch.Tensor) else array for array, leaf in pairs]


def device_of(arrays: Iterable[Any]) -> torch.device:
    """The device that most bytes are on, of all that are on any."""
    sizes: dict[torch.device, int] = {}
    for array in arrays:
        if isinstance(array, torch.Tensor):
            sizes[array.device] = sizes.get(array.device, 0) + array.nbytes
    return max(sizes, key=sizes.__getitem__)


def unit_of(sizes: Iterable[int]) -> torch.dtype:
    """The widest dtype that leaves of so many bytes are whole numbers of."""
    common = int(np.gcd.reduce([size for size in sizes if size]))
    return next(unit for unit in _UNITS if common % unit.itemsize == 0)


def own_bytes(array: Any) -> torch.Tensor:
    """A copy of ``(rows, *shape)`` as uint8 ``(rows, bytes)``, which a device may read later."""
    own = np.array(array, order="C")
    return torch.from_numpy(own.reshape(-1).view(np.uint8).reshape(len(own), -1))


def pack_rows(tensors: Sequence[torch.Tensor], unit: torch.dtype, packed: torch.Tensor) -> None:
    """Enqueue what packs ``(rows, *shape)`` each, in order, into uint8 ``(rows, bytes)``."""
    here = packed.device
    columns = [
        as_units(tensor if tensor.device == here else tensor.to(here, non_blocking=True), unit) for tensor in tensors
    ]
    torch.cat(columns, dim=1, out=packed.view(unit))


def as_units(tensor: torch.Tensor, unit: torch.dtype) -> torch.Tensor:
    """The bytes of ``(rows, *shape)`` as ``(rows, bytes / unit)``, without a copy where that is possible."""
    if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
    plain = tensor.contiguous()
    if plain.data_ptr() % unit.itemsize:
        plain = plain.clone()
    items = plain.numel() // len(plain)
    return plain.as_strided((len(plain), items), (items, 1)).view(unit)  # where a size is 1, the stride may be anything
