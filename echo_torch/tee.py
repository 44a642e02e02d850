"""A loader whose batches are sent as they pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from . import progress

_Batch = TypeVar("_Batch")


class Tee(Generic[_Batch]):
    """See `EchoSink.tee`."""

    def __init__(self, sink: progress.Sink, loader: Iterable[_Batch], show: bool) -> None:
        self._sink = sink
        self._loader = loader
        self._shows = show

    def __iter__(self) -> Iterator[_Batch]:
        return self._show() if self._shows else self._pass()

    def _pass(self) -> Iterator[_Batch]:
        yield from self._send()
        self._sink.wait()

    def _show(self) -> Iterator[_Batch]:
        with progress.of_batches(self._sink, self._length()) as shown:
            for batch in self._send():
                yield batch
                shown.passed()
            shown.wait()

    def _send(self) -> Iterator[_Batch]:
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
