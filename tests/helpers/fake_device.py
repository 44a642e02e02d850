"""An accelerator that computes on the CPU, only on request, and in as wrong an order as its streams allow.

`FakeDevice.install` replaces what `echo_torch.support.accelerator` asks PyTorch for. Work that is enqueued in a stream
waits there, as on a real device, until `FakeDevice.run` or a synchronization does it. Only tensors returned by
`FakeDevice.put` are "on" the device.
"""

from __future__ import annotations

import functools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from echo_torch.support import accelerator


class FakeEvent:
    """Passes when its stream reaches the place where it was recorded."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


class FakeStream:
    """What is enqueued and not done yet: work, events to record, and events to wait for."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.ops: deque[Callable[[], bool]] = deque()
        device.streams.append(self)

    def enqueue(self, work: Callable[[], object]) -> None:
        def done() -> bool:
            work()
            return True

        self.ops.append(done)

    def wait_stream(self, other: FakeStream) -> None:
        self.ops.append(other.record_event().query)

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        self.enqueue(lambda: setattr(event, "passed", True))
        return event


class FakeDevice:
    """One device with any number of streams. Each thread has a current stream."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.lock = threading.RLock()
        self.freed_too_soon = 0
        """How often a copy found that nobody had kept its source alive."""
        self.used: list[torch.Tensor] = []
        """Memory that must not be freed before the current stream of the thread that received it."""
        self.waits: queue.SimpleQueue[FakeStream] = queue.SimpleQueue()
        """The streams that threads began to wait for."""
        self._current = threading.local()
        self._memory: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _install(
            monkeypatch,
            is_dense_on_accelerator=lambda value: id(value) in self._memory,
            current_stream=lambda device: self.current,
            new_stream=lambda device: FakeStream(self),
            run_on_current_stream=self.enqueue,
            run_on_stream=self.run_on,
            empty_like_on_stream=self.empty_like_on_stream,
            synchronize_stream=self.wait_for,
            record_use_by_current_stream=self.used.append,
            dedicate_thread=lambda device: None,
        )

    @property
    def current(self) -> FakeStream:
        """The current stream of the calling thread."""
        if not hasattr(self._current, "stream"):
            self._current.stream = FakeStream(self)
        stream: FakeStream = self._current.stream
        return stream

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``tensor`` that is on the device."""
        there = tensor.clone(memory_format=torch.preserve_format)
        self._memory[id(there)] = there
        return there

    def enqueue(self, pack: Callable[[], object]) -> None:
        """Enqueue a kernel that packs rows.

        Fills its target with 0xA5 first: until the kernel runs, memory holds something old and not the rows.
        """
        assert isinstance(pack, functools.partial)
        pack.args[-1].fill_(0xA5)
        self.current.enqueue(pack)

    def run_on(self, stream: FakeStream, work: Callable[[], object]) -> None:
        """Enqueue a copy into host memory. Like a real device, it does not keep its source alive."""
        assert isinstance(work, functools.partial)
        assert work.keywords == {"non_blocking": True}
        (source,) = work.args
        whole = weakref.ref(source if source._base is None else source._base)
        write, layout = work.func, (source.size(), source.stride(), source.storage_offset())

        def copy() -> None:
            memory = whole()
            if memory is None:
                self.freed_too_soon += 1
            else:
                write(memory.as_strided(*layout))

        stream.enqueue(copy)

    def empty_like_on_stream(self, tensor: torch.Tensor, stream: FakeStream) -> torch.Tensor:
        """Return new memory, which holds something old."""
        there = self.put(tensor)
        there.view(-1).view(torch.uint8).fill_(0xA5)
        return there

    def wait_for(self, stream: FakeStream) -> None:
        reached = threading.Event()
        stream.enqueue(reached.set)
        self.waits.put(stream)
        reached.wait()

    def step(self, stream: FakeStream) -> bool:
        """Do the next operation of a stream, unless there is none or it waits. Return whether it did one."""
        with self.lock:
            if not stream.ops or not stream.ops[0]():
                return False
            stream.ops.popleft()
            return True

    def run(self, first: Sequence[FakeStream] | None = None) -> None:
        """Do everything that can be done. The streams in ``first`` go first, or else the newest ones."""
        order = list(first or reversed(self.streams))
        order += [stream for stream in self.streams if stream not in order]
        while any(self.step(stream) for stream in order):
            pass


class ImmediateStream:
    """A stream of a device that does everything as soon as it is enqueued."""

    def wait_stream(self, other: Any) -> None:
        pass

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.passed = True
        return event


def install_immediate_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put all tensors on a device that is never late."""
    _install(
        monkeypatch,
        is_dense_on_accelerator=lambda value: isinstance(value, torch.Tensor),
        current_stream=lambda device: ImmediateStream(),
        new_stream=lambda device: ImmediateStream(),
        run_on_current_stream=lambda work: work(),
        run_on_stream=lambda stream, enqueue: enqueue(),
    )


def _install(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    functions["empty_pinned"] = lambda size: torch.full((size,), 0xA5, dtype=torch.uint8)
    functions["dedicate_thread_and_query"] = lambda event: event.query()
    functions["check_usable"] = lambda device: None
    for name, function in functions.items():
        monkeypatch.setattr(accelerator, name, function)


def payloads(batch: Any) -> list[bytes]:
    """Return the payload of each sample in a batch of named tensors. Leaves are in the order of their names."""
    leaves = [batch[name].contiguous().view(len(batch[name]), -1).view(torch.uint8) for name in sorted(batch)]
    return [row.numpy().tobytes() for row in torch.cat(leaves, dim=1)]
