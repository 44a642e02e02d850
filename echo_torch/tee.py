"""`Tee`: an iterable that sends the batches of a loader while you iterate over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from . import progress

_Batch = TypeVar("_Batch")


class Tee(Generic[_Batch]):
    """Sends each batch of a loader, then yields it; waits for the acks when the loader is exhausted.

    Args:
        sink: sends the batches.
        loader: yields them.
        show: whether to show a progress bar.
    """

    def __init__(self, sink: progress.Sink, loader: Iterable[_Batch], show: bool) -> None:
        # Sends the batches.
        self._sink = sink
        # Yields the batches.
        self._loader = loader
        # Whether to show a progress bar.
        self._with_bar = show

    def __iter__(self) -> Iterator[_Batch]:
        return self._iterate_with_bar() if self._with_bar else self._iterate()

    def _iterate(self) -> Iterator[_Batch]:
        yield from self._send_each()
        self._sink.wait()

    def _iterate_with_bar(self) -> Iterator[_Batch]:
        with progress.batch_bar(self._sink, self._length()) as bar:
            for batch in self._send_each():
                yield batch
                bar.advance()
            bar.wait()

    def _send_each(self) -> Iterator[_Batch]:
        for batch in self._loader:
            self._sink.send(batch)
            yield batch

    def _length(self) -> int | None:
        try:
            return len(self)
        except TypeError:
            return None

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # raises as the loader does
