"""Sending from where a DataLoader makes its batches: in its workers, or in the main process if it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import default_collate

from .sink import EchoSink

if TYPE_CHECKING:
    from .callbacks.loop import SinkCallback


class SinkCollate:
    """A ``collate_fn`` that sends each batch it makes, in whatever process it runs, before it hands it on.

    Loaders read ahead: a batch that was sent is not thereby trained on. Each worker has a connection of its own, which
    delivers on while the worker ends, for up to 5 s. `EchoSink.wait` and `EchoSink.stats` cover what their own process
    sent: in the main process, nothing of what workers did.

    Args:
        sink: stays the caller's. Or a `SinkCallback`, whose policy each process then has for itself: which batches it
            sends, and what if the learner is slow. It is pickled for workers that are not forked.
        collate_fn: makes a batch of a list of samples.
        select: makes what is sent of a batch; a module-level function, to pickle. By default the batch is sent.

    Raises:
        Exception: whatever ``collate_fn``, ``select`` and the sending raise; the loader raises it again.
    """

    def __init__(
        self,
        sink: EchoSink | SinkCallback,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        select: Callable[[Any], Any] | None = None,
    ) -> None:
        self._send = sink.send if isinstance(sink, EchoSink) else sink.on_batch_end
        self._collate_fn = collate_fn
        self._select = select

    def __call__(self, samples: list[Any]) -> Any:
        batch = self._collate_fn(samples)
        self._send(batch if self._select is None else self._select(batch))
        return batch
