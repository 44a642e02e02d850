"""Sending from where a DataLoader makes its batches: in its workers, or in the main process if it has none.

`EchoSink.wait` in the process that has the loader covers what its workers sent, and so does `EchoSink.stats`. Loaders
read ahead: a batch that was sent is not thereby trained on, and a loop that is left early has sent up to
``prefetch_factor`` batches per worker more than it saw.

Workers that are not persistent end with each epoch, and each sends its last samples once more for that; with
``persistent_workers=True`` they do so only at the end, and need not connect again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import IterableDataset, default_collate

if TYPE_CHECKING:
    from .callbacks.loop import SinkCallback
    from .sink import EchoSink


class Sent(NamedTuple):
    """What comes out of a loader in place of a batch that was sent and is not handed on."""

    samples: int
    """How many were collated."""


class SinkCollate:
    """A ``collate_fn`` that sends each batch it makes, in whatever process it runs, before it hands it on.

    It pickles for workers that are not forked, if its functions do. Each worker has a connection of its own.

    Args:
        sink: stays the caller's. Or a `SinkCallback`, whose policy each process then has for itself: which batches it
            sends, and what if the learner is slow.
        collate_fn: makes a batch of a list of samples.
        select: makes what is sent of a batch, or None to send nothing of it. By default the batch is sent.
        forward: whether the loader hands the batch on; or else a `Sent`, which costs next to nothing.

    Raises:
        Exception: whatever ``collate_fn``, ``select`` and the sending raise; the loader raises it again.
    """

    def __init__(
        self,
        sink: EchoSink | SinkCallback,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        *,
        select: Callable[[Any], Any] | None = None,
        forward: bool = True,
    ) -> None:
        self._send = _sender(sink)
        self._collate_fn = collate_fn
        self._select = select
        self._forward = forward

    def __call__(self, samples: list[Any]) -> Any:
        batch = self._collate_fn(samples)
        _send(self._send, self._select, batch)
        return batch if self._forward else Sent(len(samples))


class SinkDataset(IterableDataset[Any]):
    """An iterable dataset that sends each item of another one before it hands it on: of simulators in workers, say.

    An item that was handed on may be changed. With a ``batch_size``, prefer `SinkCollate`, unless what is sent differs
    from what is collated: it sends a batch at once.

    Args:
        dataset: what to iterate over; each worker gets its own copy, which has to shard itself as usual.
        sink: stays the caller's; or a `SinkCallback`, as for `SinkCollate`.
        select: makes what is sent of an item, or None to send nothing of it. By default the item is sent.
        forward: whether the item is handed on; or else a `Sent`.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        sink: EchoSink | SinkCallback,
        *,
        select: Callable[[Any], Any] | None = None,
        forward: bool = True,
    ) -> None:
        self.dataset = dataset
        self._send = _sender(sink)
        self._select = select
        self._forward = forward

    def __iter__(self) -> Iterator[Any]:
        for item in self.dataset:
            _send(self._send, self._select, item)
            yield item if self._forward else Sent(1)

    def __getattr__(self, name: str) -> Any:
        """The state of ``dataset``, if it has one, for loaders that save it."""
        if name in ("state_dict", "load_state_dict"):
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _sender(sink: EchoSink | SinkCallback) -> Callable[[Any], None]:
    return sink.on_batch_end if hasattr(sink, "on_batch_end") else sink.send


def _send(send: Callable[[Any], None], select: Callable[[Any], Any] | None, what: Any) -> None:
    chosen = what if select is None else select(what)
    if chosen is not None:
        send(chosen)
