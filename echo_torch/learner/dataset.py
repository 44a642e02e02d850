"""The learner's side: what an ``echo.Server`` receives, as batches of tensors for a training loop.

A `Prefetcher` thread asks the server, checks and converts; the threads that iterate wait for it. What a batch is worth:

* on a device, or with ``copy=True``, it is the caller's, and the next one is made while the caller works on it;
* with ``copy=False`` on the CPU it is the server's memory, until the next one is asked for. So the next one is not
  asked for before the caller does, and only one iteration, in one thread, may do so.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch.utils.data import IterableDataset, get_worker_info

from echo_torch.support import accelerator

from .prefetch import Prefetcher, sample_lock_for
from .unpack import Convert, SynchronousUploader, Unpacker, Uploader, copy_arrays, wrap_arrays

_ONE_CONSUMER = (
    "with copy=False the batch of one would be overwritten as the other asks for its own; drop the iterator of the "
    "one, or use copy=True"
)


class _Batch(NamedTuple):
    tensors: list[torch.Tensor]
    info: Any


class EchoDataset(IterableDataset[Any]):
    """Batches of an ``echo.Server`` as pytrees of tensors, ``(batch_size, *shape)`` each, until the server is closed.

    To be iterated over as it is, or through ``DataLoader(dataset, batch_size=None)``: it is the server that makes the
    batches. Iterating again goes on with the next batch. It has no length. After ``server.close()``, in any thread, the
    batches come that the server still hands out, and then all iterations end; what has not made a full batch is lost,
    and full ones may be.

    Ctrl-C gets through while a batch is waited for, as it does not in ``server.sample()``. What is waited for is not
    lost then, nor what was taken ahead when a loop is left: it comes next.

    Use one `EchoDataset` per server for as long as there is the server: what one has taken ahead is lost with it. Let
    nothing else call ``server.sample()``: each call gives the last batch back, whoever has it.
    Where several ranks have a server each, they end after different numbers of batches. Have all ranks agree on each
    step that there is a batch, by an all-reduce; or have them use ``torch.distributed.algorithms.join.Join``.

    Args:
        server: an ``echo.Server`` made with ``numpy_example(example)``; anything that has its ``sample()``. Stays the
            caller's to close, but for the end of the process, which closes it if a batch is waited for. Nothing but the
            next batch, or its end, gets this dataset's thread out of it.
        example: one sample, as `EchoSink` takes it; only its structure, shapes and dtypes count. Batches come in its
            containers: dict, OrderedDict, list, tuple, namedtuple; as dicts where these count as such (TensorDict,
            dataclasses, other mappings). bfloat16, float8 and so on come as such.
        device: where batches are to be; the CPU by default. On an accelerator they are copied by a stream of our own
            while the caller works on the batch before, and are complete when they come. The device copies by itself if
            the server was made with ``pin_host_memory=True``, and else by way of the driver's own memory.
        copy: True for batches that are the caller's to keep. False for the memory of the server: *valid until the next
            batch is asked for*, and then overwritten at any moment. It may be changed meanwhile. One thread may ask, in
            one iteration at a time. No good for what asks ahead: Lightning's and accelerate's loops do. Makes no
            difference with another ``device`` than the CPU.

    Raises:
        TypeError: an argument has the wrong type; a leaf of the example is no dense array of numbers, or has a numpy
            dtype that PyTorch lacks.
        ValueError: a sample has no bytes, or the device cannot be used here.

    Iterating raises `SpecMismatchError` if the server was not made for samples like the example; `RuntimeError` in
    another process than this one, such as a DataLoader's worker, and for a second consumer with ``copy=False``; and
    what ``server.sample()`` does, or PyTorch for want of memory on the device. One may go on then, with the next batch.
    """

    def __init__(
        self, server: Any, example: Any, *, device: torch.device | str | int | None = None, copy: bool = True
    ) -> None:
        if not callable(getattr(server, "sample", None)):
            raise TypeError(f"server: got {server!r}, expected an echo.Server, or what has its sample()")
        if not isinstance(copy, bool):
            raise TypeError(f"copy: got {copy!r}, expected True or False")
        convert = _choose_converter(_resolve_device(device), copy)
        unpacker = Unpacker(example, convert)
        self._unflatten = unpacker.unflatten
        self._shares_memory = convert is wrap_arrays
        self._on_accelerator = isinstance(convert, Uploader)
        self._prefetcher = Prefetcher(
            server.sample,
            lambda sample: _Batch(unpacker.to_tensors(sample.batch, server), sample.info),
            getattr(server, "close", lambda: None),
            sample_lock=sample_lock_for(server),
            read_ahead=not self._shares_memory,
        )
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._consumer: weakref.ref[_BatchIterator] | None = None
        self._info: Any = None
        weakref.finalize(self, self._prefetcher.stop).atexit = False

    @property
    def info(self) -> Any:
        """The server's counters as of the last batch that was given (``echo.SampleInfo``); None before the first."""
        return self._info

    def __iter__(self) -> Iterator[Any]:
        self._check_process()
        return _BatchIterator(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"an EchoDataset cannot be pickled or copied: {self._remedy()}")

    def _next(self, iterator: _BatchIterator) -> _Batch | None:
        """The next batch for one of the iterations; None at the end."""
        self._check_process()
        if self._shares_memory:
            self._check_single_consumer(iterator)
        batch = self._prefetcher.next()
        if batch is not None:
            self._info = batch.info
            if self._on_accelerator:
                for tensor in batch.tensors:
                    accelerator.record_current_stream(tensor)
        return batch

    def _check_single_consumer(self, iterator: _BatchIterator) -> None:
        """Raise RuntimeError if another consumer may still use the last batch, or is to use the next."""
        here = threading.current_thread()
        with self._lock:
            current = None if self._consumer is None else self._consumer()
            if current is not None and current is not iterator and not current.exhausted:
                raise RuntimeError(f"another iteration over this EchoDataset goes on; {_ONE_CONSUMER}")
            thread = iterator.thread
            if thread is not None and thread is not here and thread.is_alive():
                raise RuntimeError(f"{thread.name} iterates over this EchoDataset; {_ONE_CONSUMER}")
            iterator.thread = here
            self._consumer = weakref.ref(iterator)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            here = "a DataLoader's worker" if get_worker_info() is not None else f"process {os.getpid()}"
            raise RuntimeError(f"an EchoDataset cannot be used in {here}: {self._remedy()}")

    def _remedy(self) -> str:
        return (
            f"its server takes samples in process {self._pid} only; iterate there, in a DataLoader with "
            "num_workers=0 (the server receives in threads of its own, and batches are made in another)"
        )


class _BatchIterator(Iterator[Any]):
    """One iteration; keeps the dataset."""

    def __init__(self, dataset: EchoDataset) -> None:
        self._dataset = dataset
        self.exhausted = False
        self.thread: threading.Thread | None = None
        """That a batch was lent to, if any was."""

    def __next__(self) -> Any:
        batch = None if self.exhausted else self._dataset._next(self)
        if batch is None:
            self.exhausted = True
            raise StopIteration
        return self._dataset._unflatten(batch.tensors)


def _resolve_device(device: torch.device | str | int | None) -> torch.device:
    """The device that is meant, with its index."""
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (AssertionError, RuntimeError) as error:  # the former where PyTorch was built without it
        why = str(error).partition("\n")[0]
        raise ValueError(f"device: got {device!r}, which cannot be used here: {why}") from None


def _choose_converter(device: torch.device, copy: bool) -> Convert:
    if device.type == accelerator.device_type():
        return Uploader(device)
    if device.type != "cpu":
        return SynchronousUploader(device)
    return copy_arrays if copy else wrap_arrays
