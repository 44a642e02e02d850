"""An accelerator that computes on the CPU, but only when it is told to, and in as wrong an order as its streams allow.

`FakeDevice.install` puts it in place of what `echo_torch.support.accelerator` asks PyTorch for. What is enqueued in a
stream waits there, as on a real device, until `FakeDevice.run` or a synchronisation comes to it. Tensors are "on" the
device that `FakeDevice.put` gave, and no others.
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
    """Passes when its stream comes to where it was recorded."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


class FakeStream:
    """What was enqueued and not done yet: work, events to be recorded, and events to wait for."""

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
    """One device with any number of streams, of which each thread has a current one."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.lock = threading.RLock()
        self.freed_too_soon = 0
        """How often memory was to be copied that nobody had kept."""
        self.used: list[torch.Tensor] = []
        """What is not to be freed before the stream of the thread that got it."""
        self.waits: queue.SimpleQueue[FakeStream] = queue.SimpleQueue()
        """The streams that threads began to wait for."""
        self._current = threading.local()
        self._memory: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _install(
            monkeypatch,
            is_on_accelerator=lambda value: id(value) in self._memory,
            current_stream=lambda device: self.current,
            new_stream=lambda device: FakeStream(self),
            run_on_current_stream=self.enqueue,
            run_on_stream=self.run_on,
            empty_like=self.empty_like,
            synchronize=self.wait_for,
            record_current_stream=self.used.append,
            dedicate_thread=lambda device: None,
        )

    @property
    def current(self) -> FakeStream:
        """The stream of the calling thread."""
        if not hasattr(self._current, "stream"):
            self._current.stream = FakeStream(self)
        stream: FakeStream = self._current.stream
        return stream

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of its own that is on the device."""
        there = tensor.clone(memory_format=torch.preserve_format)
        self._memory[id(there)] = there
        return there

    def enqueue(self, pack: Callable[[], object]) -> None:
        """A kernel that packs; until it runs, no rows are there, though new memory may still hold some from before."""
        assert isinstance(pack, functools.partial)
        pack.args[-1].fill_(0xA5)
        self.current.enqueue(pack)

    def run_on(self, stream: FakeStream, work: Callable[[], object]) -> None:
        """A copy into host memory holds what it copies weakly, as a device does."""
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

    def empty_like(self, tensor: torch.Tensor, stream: FakeStream) -> torch.Tensor:
        """New memory, which holds something from before."""
        there = self.put(tensor)
        there.view(-1).view(torch.uint8).fill_(0xA5)
        return there

    def wait_for(self, stream: FakeStream) -> None:
        reached = threading.Event()
        stream.enqueue(reached.set)
        self.waits.put(stream)
        reached.wait()

    def step(self, stream: FakeStream) -> bool:
        """Do the next thing of a stream, if it has one that does not wait; gives whether it did."""
        with self.lock:
            if not stream.ops or not stream.ops[0]():
                return False
            stream.ops.popleft()
            return True

    def run(self, first: Sequence[FakeStream] | None = None) -> None:
        """Do everything that is there: what the newest streams can do first, or else ``first``."""
        order = list(first or reversed(self.streams))
        order += [stream for stream in self.streams if stream not in order]
        while any(self.step(stream) for stream in order):
            pass


class ImmediateStream:
    """A stream of a device that does everything while it is enqueued."""

    def wait_stream(self, other: Any) -> None:
        pass

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.passed = True
        return event


def install_immediate_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has all tensors be on a device that is never late."""
    _install(
        monkeypatch,
        is_on_accelerator=lambda value: isinstance(value, torch.Tensor),
        current_stream=lambda device: ImmediateStream(),
        new_stream=lambda device: ImmediateStream(),
        run_on_current_stream=lambda work: work(),
        run_on_stream=lambda stream, enqueue: enqueue(),
    )


def _install(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    functions["empty_pinned"] = lambda size: torch.full((size,), 0xA5, dtype=torch.uint8)
    functions["query_from_dedicated_thread"] = lambda event: event.query()
    functions["check_usable"] = lambda device: None
    for name, function in functions.items():
        monkeypatch.setattr(accelerator, name, function)


def payloads(batch: Any) -> list[bytes]:
    """The payload of each sample of a batch of named tensors, in the order of the names."""
    leaves = [batch[name].contiguous().view(len(batch[name]), -1).view(torch.uint8) for name in sorted(batch)]
    return [row.numpy().tobytes() for row in torch.cat(leaves, dim=1)]
