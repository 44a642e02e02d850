"""What is asked of an accelerator: streams, pinned memory, and whether it can be used at all.

Only the part of PyTorch that is the same for all accelerators, but for what it has for CUDA alone: on older releases,
whether a graph is captured.
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

_WITHOUT_STREAMS = {"mps"}
_DENSE_TYPES = {torch.Tensor, torch.nn.Parameter}

# What PyTorch does for threads of its own, and has no call for: the function of the driver, and the mode it is given.
_CAPTURE_MODE_FUNCTIONS = {
    "cuda": ("libcuda.so.1", "cuThreadExchangeStreamCaptureMode"),
    "hip": ("libamdhip64.so", "hipThreadExchangeStreamCaptureMode"),
}
_CAPTURE_MODE_THREAD_LOCAL = 1
_this_thread = threading.local()

# Pinned memory of this process.
_pinned_tensors: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()


@functools.cache
def device_type() -> str | None:
    """The type of this build's accelerator, ``"cuda"`` for instance; None if it has none, or none with streams."""
    device = torch.accelerator.current_accelerator()
    return None if device is None or device.type in _WITHOUT_STREAMS else device.type


def is_on_accelerator(value: Any) -> bool:
    """Whether it is a plain dense tensor of an accelerator."""
    return (
        type(value) in _DENSE_TYPES
        and not value.is_cpu
        and value.device.type == device_type()
        and value.layout is torch.strided
        and not value.is_nested
    )


class PinnedMemoryError(RuntimeError):
    """There is no pinned memory to be had."""


def check_usable(device: torch.device) -> None:
    """Raise RuntimeError where values of that device cannot be had.

    That is in a process that was forked from one that used it, and inside the capture of a graph.
    """
    _check_not_forked(device)
    _check_not_capturing(device, current_stream(device))


def _check_not_capturing(device: torch.device, stream: torch.Stream) -> None:
    capturing = getattr(stream, "is_capturing", None)
    if capturing is None and device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing
    if capturing is not None and capturing():
        raise RuntimeError(f"send() while a graph of {device} is captured; call it outside of that, after each replay")


def _check_not_forked(device: torch.device) -> None:
    forked = getattr(torch.get_device_module(device), "_is_in_bad_fork", None)
    if forked is not None and forked():
        raise RuntimeError(
            f"send() of a tensor on {device} in process {os.getpid()}, which was forked after {device.type} was "
            "initialised; start such processes with 'spawn' or 'forkserver', or send CPU tensors from them"
        )


def current_stream(device: torch.device) -> torch.Stream:
    """The one that this thread works on."""
    return torch.accelerator.current_stream(device)


def new_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


def run_on_current_stream(work: Callable[[], object]) -> None:
    """Have what ``work`` enqueues on the device run in the stream that this thread works on, as it does anyway."""
    work()


def run_on_stream(stream: torch.Stream, work: Callable[[], object]) -> None:
    """Have what ``work`` enqueues on the device run in this stream."""
    with _stream_context(stream):
        work()


def empty_like(tensor: torch.Tensor, stream: torch.Stream) -> torch.Tensor:
    """Memory on the device of a stream, whose tensor belongs to that stream."""
    with _stream_context(stream):
        return torch.empty_like(tensor, device=stream.device)


def record_current_stream(tensor: torch.Tensor) -> None:
    """Let nobody have its memory, once it is dropped, before what this thread's stream has to do by then is done."""
    tensor.record_stream(current_stream(tensor.device))


def synchronize(stream: torch.Stream) -> None:
    """Sleep until what is in the stream is done. Devices other than CUDA's may keep the processor busy meanwhile."""
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
    """As entering a stream does in PyTorch 2.7 and later."""
    before, device = torch.accelerator.current_stream(stream.device), torch.accelerator.current_device_index()
    try:
        torch.accelerator.set_stream(stream)
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(device)


def query_from_dedicated_thread(event: torch.Event) -> bool:
    """Whether what was before the event is done; for a thread that does nothing else with devices.

    Its current device becomes the event's: asking, and freeing the event later, would else begin to use another one.
    """
    device = event.device
    if device is not None:
        dedicate_thread(device)
    return event.query()


def dedicate_thread(device: torch.device) -> None:
    """Make the device current in a thread that does nothing else with devices; captures of others do not mind it."""
    if device != getattr(_this_thread, "device", None):
        torch.accelerator.set_device_index(device.index)
        if device.type == "cuda":
            _relax_capture_mode()
        _this_thread.device = device


def _relax_capture_mode() -> None:
    """Have questions of this thread not end the capture of a graph by another, as by default all do."""
    library, function = _CAPTURE_MODE_FUNCTIONS["hip" if torch.version.hip else "cuda"]
    try:
        driver = ctypes.CDLL(library, mode=os.RTLD_NOLOAD)
        status = getattr(driver, function)(ctypes.byref(ctypes.c_int(_CAPTURE_MODE_THREAD_LOCAL)))
    except (OSError, AttributeError) as error:
        status = error
    if status:
        _log.info("using a device while a graph is captured may end the capture: %s: %s", function, status)


def empty_pinned(size: int) -> torch.Tensor:
    """Host memory of so many bytes that a device copies to and from by itself, out of PyTorch's cache of such.

    That takes it from the system in powers of two.

    Raises:
        PinnedMemoryError: there is none.
    """
    try:
        with torch.inference_mode(False):  # a tensor of that mode could not be written to outside of it
            memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise PinnedMemoryError(f"no pinned memory of {size} bytes: {error}") from error
    _pinned_tensors[id(memory)] = memory
    return memory


def _keep_pinned_after_fork() -> None:
    """In a forked child: never free the copies, for the driver knows nothing of this process."""
    for reference in _pinned_tensors.valuerefs():
        memory = reference()
        if memory is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))


os.register_at_fork(after_in_child=_keep_pinned_after_fork)
