"""The part of PyTorch's device API that we use: streams, events, pinned memory, and whether a device is usable.

* Tests replace these functions with those of a fake device.
* We use the API that all accelerators share, ``torch.accelerator``. CUDA gets its own code only where that API lacks
  something: to sleep until an event is done, to keep a thread's calls out of other threads' captures
  (`_set_thread_local_capture_mode`), and, on older releases of PyTorch, to find out whether a graph is being captured.
* A forked child must not use a device that its parent has used, and must not free the parent's pinned memory.
* While a thread captures a graph, a call to the device from any thread may end the capture. In the capturing thread,
  `check_usable` raises before we make such a call. In threads of our own, `dedicate_thread` prevents this.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

_log = logging.getLogger(__name__)

# Accelerators that have no streams. We treat such a machine as if it had no accelerator.
_WITHOUT_STREAMS = {"mps"}
# Exact types: a subclass may change what any operation does.
_DENSE_TYPES = {torch.Tensor, torch.nn.Parameter}

# PyTorch relaxes the capture mode of its own threads, but offers no call for ours. So we call the driver. For
# each platform: the driver's library, and its function that sets the mode of the calling thread.
_CAPTURE_MODE_FUNCTIONS = {
    "cuda": ("libcuda.so.1", "cuThreadExchangeStreamCaptureMode"),
    "hip": ("libamdhip64.so", "hipThreadExchangeStreamCaptureMode"),
}
# The mode to set. In this mode, a thread's calls can end only captures that the thread itself began.
_CAPTURE_MODE_THREAD_LOCAL = 1

# Its attribute ``device`` is the device that `dedicate_thread` has made current in this thread.
_this_thread = threading.local()

# All pinned memory of this process. The keys are ids, because ``==`` of tensors compares their elements.
_pinned_tensors: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()


@functools.cache
def device_type() -> str | None:
    """Return the type of this build's accelerator, for instance ``"cuda"``.

    None if the build has no accelerator, or one without streams.
    """
    device = torch.accelerator.current_accelerator()
    return None if device is None or device.type in _WITHOUT_STREAMS else device.type


def is_dense_on_accelerator(value: Any) -> bool:
    """Whether ``value`` is a plain, dense tensor on the accelerator."""
    return (
        type(value) in _DENSE_TYPES
        and not value.is_cpu
        and value.device.type == device_type()
        and value.layout is torch.strided
        and not value.is_nested
    )


class PinnedMemoryError(RuntimeError):
    """Pinned memory could not be allocated."""


def check_usable(device: torch.device) -> None:
    """Check that this thread can read tensors on ``device`` now.

    Raises:
        RuntimeError: this process was forked from one that used the device, or this thread is capturing a graph.
    """
    # Check for a fork first: in a forked child, other calls to the device fail with less helpful errors.
    _check_not_forked(device)
    _check_not_capturing(device, current_stream(device))


def _check_not_capturing(device: torch.device, stream: torch.Stream) -> None:
    capturing = getattr(stream, "is_capturing", None)
    # Older releases of PyTorch tell this for CUDA only.
    if capturing is None and device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing
    if capturing is not None and capturing():
        raise RuntimeError(
            f"send() while a graph of {device} is captured; call it outside the capture, after each replay"
        )


def _check_not_forked(device: torch.device) -> None:
    forked = getattr(torch.get_device_module(device), "_is_in_bad_fork", None)
    if forked is not None and forked():
        raise RuntimeError(
            f"send() of a tensor on {device} in process {os.getpid()}, which was forked after {device.type} was "
            "initialised; start such processes with 'spawn' or 'forkserver', or send CPU tensors from them"
        )


def current_stream(device: torch.device) -> torch.Stream:
    """Return the stream that this thread works on."""
    return torch.accelerator.current_stream(device)


def new_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


def run_on_current_stream(work: Callable[[], object]) -> None:
    """Call ``work``; what it enqueues runs in this thread's current stream.

    PyTorch does so without this function. A fake device in tests replaces it, to see the work.
    """
    work()


def run_on_stream(stream: torch.Stream, work: Callable[[], object]) -> None:
    """Call ``work``; what it enqueues runs in ``stream``."""
    with _stream_context(stream):
        work()


def empty_like_on_stream(tensor: torch.Tensor, stream: torch.Stream) -> torch.Tensor:
    """Allocate a tensor like ``tensor`` on the device of ``stream``, with memory that belongs to that stream."""
    with _stream_context(stream):
        return torch.empty_like(tensor, device=stream.device)


def record_use_by_current_stream(tensor: torch.Tensor) -> None:
    """Tell PyTorch that this thread's current stream uses ``tensor``.

    After you drop the tensor, PyTorch reuses its memory only when the stream has done all work that was enqueued before
    the drop.
    """
    tensor.record_stream(current_stream(tensor.device))


def synchronize_stream(stream: torch.Stream) -> None:
    """Block until all work in ``stream`` is done.

    On CUDA the thread sleeps. Other devices may keep a CPU core busy meanwhile.
    """
    with _stream_context(stream):
        event: Any
        if stream.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        else:
            event = stream.record_event()
    event.synchronize()


def _stream_context(stream: torch.Stream) -> contextlib.AbstractContextManager[Any]:
    return stream if hasattr(stream, "__enter__") else _set_stream_context(stream)


@contextlib.contextmanager
def _set_stream_context(stream: torch.Stream) -> Iterator[None]:
    """Do what ``with stream`` does in PyTorch 2.7 and later."""
    before, device = torch.accelerator.current_stream(stream.device), torch.accelerator.current_device_index()
    try:
        torch.accelerator.set_stream(stream)
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(device)


def dedicate_thread_and_query(event: torch.Event) -> bool:
    """Whether all work before ``event`` is done. Only for a thread that does nothing else with devices.

    Makes the event's device current in this thread. Otherwise querying the event now, or freeing it later, would
    initialize whatever device is current.
    """
    device = event.device
    if device is not None:
        dedicate_thread(device)
    return event.query()


def dedicate_thread(device: torch.device) -> None:
    """Make ``device`` current in a thread that does nothing else with devices.

    On CUDA, calls of this thread no longer end a capture that another thread has begun.
    """
    if device != getattr(_this_thread, "device", None):
        torch.accelerator.set_device_index(device.index)
        if device.type == "cuda":
            _set_thread_local_capture_mode()
        _this_thread.device = device


def _set_thread_local_capture_mode() -> None:
    """Keep this thread's calls from ending another thread's graph capture. By default they may end it."""
    library, function = _CAPTURE_MODE_FUNCTIONS["hip" if torch.version.hip else "cuda"]
    try:
        # RTLD_NOLOAD loads nothing: we want only the driver that PyTorch has loaded already.
        driver = ctypes.CDLL(library, mode=os.RTLD_NOLOAD)
        status = getattr(driver, function)(ctypes.byref(ctypes.c_int(_CAPTURE_MODE_THREAD_LOCAL)))
    except (OSError, AttributeError) as error:
        status = error
    if status:
        _log.info("using a device while a graph is captured may end the capture: %s failed: %s", function, status)


def empty_pinned(size: int) -> torch.Tensor:
    """Allocate ``size`` bytes of pinned host memory, which a device reads and writes without the CPU.

    The memory comes from PyTorch's cache, which allocates powers of two from the system.

    Returns:
        A one-dimensional uint8 tensor on the CPU, not initialized.

    Raises:
        PinnedMemoryError: the system has no more pinned memory.
    """
    try:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise PinnedMemoryError(f"cannot allocate {size} bytes of pinned memory: {error}") from error
    _pinned_tensors[id(memory)] = memory
    return memory


def _keep_pinned_after_fork() -> None:
    """In a forked child: keep the parent's pinned tensors forever.

    Freeing one would call the driver, which does not know this process.
    """
    for reference in _pinned_tensors.valuerefs():
        memory = reference()
        if memory is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))


os.register_at_fork(after_in_child=_keep_pinned_after_fork)
