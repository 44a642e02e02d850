"""The learner's side: what an ``echo.Server`` receives, as batches of tensors for a training loop.

* A `Prefetcher` thread takes batches from the server, checks and converts them. The threads that iterate wait for it.
* With ``copy=True``, or on a device, a batch belongs to the caller. The thread prepares the next one meanwhile.
* With ``copy=False`` on the CPU, a batch is memory of the server. Taking the next batch overwrites it. So the thread
  takes the next one only when the caller asks for it, and only one iteration in one thread may ask.
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

from .prefetch import EXIT_TIMEOUT_S, Prefetcher, sample_lock_for
from .unpack import Convert, StreamUploader, SynchronousUploader, Unpacker, copy_arrays, wrap_arrays

_ONE_CONSUMER = (
    "with copy=False each batch overwrites the one before, so there can be one consumer only; iterate once at a time, "
    "in one thread, or use copy=True"
)


class _Batch(NamedTuple):
    """One batch from the prefetcher."""

    tensors: list[torch.Tensor]
    """One per leaf, in wire order."""
    info: Any
    """The server's counters (``echo.SampleInfo``)."""


class EchoDataset(IterableDataset[Any]):
    """Batches of an ``echo.Server`` as pytrees of tensors, ``(batch_size, *shape)`` each, until you close the server.

    Example::

        with EchoDataset(server, example) as batches:  # the server was made with numpy_example(example)
            for batch in batches:  # a leaf of shape (4,) comes as a tensor (batch_size, 4)
                step(batch)

    Iterate over it directly, or through ``DataLoader(dataset, batch_size=None)``, because the server makes the batches.
    A second iteration continues with the next batch. There is no length.

    * *The end.* ``server.close()``, called in any thread, ends all iterations, after the batches that the server still
      hands out. Samples that do not fill a batch are lost then, and full batches may be.
    * *Close it*, by ``with`` or `close`, which closes the server, too. A process that ends while actors are connected
      to an open server may end in a panic of the server's.
    * *Ctrl-C* interrupts waiting for a batch, which it cannot do in ``server.sample()``. The batch is not lost: you get
      it next. The same goes for a batch that was read ahead when you left a loop.
    * *One dataset.* Use one `EchoDataset` for the whole life of a server, because dropping it loses the batch that it
      has read ahead. Let nothing else call ``server.sample()``: each call returns the memory of the last batch to the
      server, whoever uses that batch.
    * *Several ranks*, each with a server, end after different numbers of batches. In every step, let them agree by an
      all-reduce that each has a batch, or use ``torch.distributed.algorithms.join.Join``.

    Args:
        server: an ``echo.Server`` made with ``numpy_example(example)``, or an object with the same ``sample()``. Close
            it, or this dataset. Process exit closes it, too, if this dataset's thread is in ``server.sample()`` then:
            only a batch or ``server.close()`` gets the thread out of there.
        example: one sample, as `EchoSink` takes it. Only structure, shapes and dtypes count. Batches have its dtypes,
            bfloat16 and float8 included, and its containers: dict, OrderedDict, list, tuple and namedtuple.
            TensorDicts, dataclasses and other mappings come as dicts.
        device: where you want the batches; the CPU by default. A batch is copied to an accelerator in a separate stream
            while you work on the one before, and is complete when you get it. If the server was made with
            ``pin_host_memory=True``, the device copies by itself; if not, the driver copies through memory of its own.
        copy: True for batches that you may keep. False for the server's own memory, *valid until you ask for the next
            batch*. You may change it until then; afterwards it may be overwritten at any moment. Only one thread may
            iterate, one iteration at a time. Do not use False in loops that read ahead, such as Lightning's and
            accelerate's. If ``device`` is not the CPU, ``copy`` makes no difference.

    Raises:
        TypeError: an argument has the wrong type, a leaf of the example is not a dense array of numbers, or PyTorch
            lacks its numpy dtype.
        ValueError: a sample has no bytes, or the device cannot be used here.

    Iterating raises the following errors. You can continue with the next batch after each of them.

    * `SpecMismatchError`: the server was not made for samples like the example.
    * `RuntimeError`: you iterate in another process, such as a DataLoader's worker, or with a second consumer although
      ``copy=False``.
    * What ``server.sample()`` raises, or PyTorch if the device is out of memory.
    """

    def __init__(
        self, server: Any, example: Any, *, device: torch.device | str | int | None = None, copy: bool = True
    ) -> None:
        if not callable(getattr(server, "sample", None)):
            raise TypeError(f"server: got {server!r}, expected an echo.Server, or an object with its sample()")
        if not isinstance(copy, bool):
            raise TypeError(f"copy: got {copy!r}, expected True or False")
        convert = _choose_converter(_resolve_device(device), copy)
        unpacker = Unpacker(example, convert)
        # Puts tensors into the example's containers.
        self._unflatten = unpacker.unflatten
        # Whether batches are memory of the server, so that only one consumer is allowed.
        self._shares_memory = convert is wrap_arrays
        # Whether batches are copied in another stream than the consumer's.
        self._on_accelerator = isinstance(convert, StreamUploader)
        # Takes batches from the server. Its callables must not refer to this dataset: the thread would keep it alive.
        self._prefetcher = Prefetcher(
            server.sample,
            lambda sample: _Batch(unpacker.to_tensors(sample.batch, server), sample.info),
            getattr(server, "close", lambda: None),
            describe_idle=lambda: _describe_idle(server),
            sample_lock=sample_lock_for(server),
            read_ahead=not self._shares_memory,
        )
        # Closes the server.
        self._close_server = getattr(server, "close", None)
        # Whether `close` is done.
        self._closed = False
        # The process that has the server and the thread.
        self._pid = os.getpid()
        # Guards `_consumer`, and the `thread` of each iterator.
        self._lock = threading.Lock()
        # The iterator that got the last batch, with `copy=False`.
        self._consumer: weakref.ref[_BatchIterator] | None = None
        # The server's counters as of the last batch.
        self._info: Any = None
        # Ends the thread when the dataset is dropped. Not at process exit, which `prefetch` handles.
        weakref.finalize(self, self._prefetcher.stop).atexit = False

    @property
    def info(self) -> Any:
        """The server's counters as of the last batch that you got (``echo.SampleInfo``); None before the first."""
        return self._info

    def __iter__(self) -> Iterator[Any]:
        self._check_process()
        return _BatchIterator(self)

    def close(self) -> None:
        """Close the server, and end all iterations; idempotent. In a forked child, this does nothing.

        With ``copy=True``, this first takes what the server still has, for half a second at most, and drops it. The
        server then has read what actors sent, so that closing ends their connections in order. If bytes come in that
        very moment, from an actor that never pauses for instance, the kernel resets the connection: it looks like a
        crash.
        """
        if os.getpid() != self._pid or self._closed:
            return
        self._prefetcher.stop()
        try:
            if not self._shares_memory:
                self._prefetcher.discard_samples()
        finally:
            # After an interrupt, too: only this gets the threads out of ``server.sample()``.
            if self._close_server is not None:
                self._close_server()
            self._prefetcher.join(EXIT_TIMEOUT_S)
        self._closed = True

    def __enter__(self) -> EchoDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"an EchoDataset cannot be pickled or copied: {self._remedy()}")

    def _next(self, iterator: _BatchIterator) -> _Batch | None:
        """Block until there is a batch for this iterator and return it; None at the end."""
        self._check_process()
        if self._shares_memory:
            self._check_single_consumer(iterator)
        batch = self._prefetcher.next()
        if batch is not None:
            self._info = batch.info
            if self._on_accelerator:
                # The memory belongs to the copying stream. Nobody may reuse it while this thread's stream works on it.
                for tensor in batch.tensors:
                    accelerator.record_use_by_current_stream(tensor)
        return batch

    def _check_single_consumer(self, iterator: _BatchIterator) -> None:
        """Raise RuntimeError if another consumer may still use the last batch; else note this one.

        A consumer is an iterator together with the thread that calls it. A dropped or exhausted iterator does not
        count, and neither does a thread that has ended.
        """
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
            f"its server receives samples in process {self._pid} only; iterate there, in a DataLoader with "
            "num_workers=0 (threads of that process receive samples and prepare batches in the background already)"
        )


class _BatchIterator(Iterator[Any]):
    """One iteration over an `EchoDataset`."""

    def __init__(self, dataset: EchoDataset) -> None:
        # Kept alive for as long as you iterate.
        self._dataset = dataset
        # Whether this iteration has reached the end.
        self.exhausted = False
        # With `copy=False`, the thread that last asked for a batch.
        self.thread: threading.Thread | None = None

    def __next__(self) -> Any:
        batch = None if self.exhausted else self._dataset._next(self)
        if batch is None:
            self.exhausted = True
            raise StopIteration
        return self._dataset._unflatten(batch.tensors)


def _describe_idle(server: Any) -> str:
    """Return why no batch comes, as far as the server tells."""
    try:
        server.port  # noqa: B018
    except RuntimeError:
        return "the transport of the server was not started; call server.start()"
    except AttributeError:  # not an `echo.Server`
        pass
    return "the server has no full batch; does anybody send to it?"


def _resolve_device(device: torch.device | str | int | None) -> torch.device:
    """Return the device with its index; raise ValueError if it cannot be used here."""
    # Allocating finds out whether the device works, and which index "cuda" means.
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (AssertionError, RuntimeError) as error:  # AssertionError if PyTorch was built without this device
        why = str(error).partition("\n")[0]
        raise ValueError(f"device: got {device!r}, which cannot be used here: {why}") from None


def _choose_converter(device: torch.device, copy: bool) -> Convert:
    """Return the function that makes tensors for this device."""
    if device.type == accelerator.device_type():
        return StreamUploader(device)
    if device.type != "cpu":
        return SynchronousUploader(device)
    return copy_arrays if copy else wrap_arrays
