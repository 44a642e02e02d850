"""A loader whose batches are sent as they pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from .sink import EchoSink

_Batch = TypeVar("_Batch")


class Tee(Generic[_Batch]):
    """See `EchoSink.tee`."""

    def __init__(self, sink: EchoSink, loader: Iterable[_Batch]) -> None:
        self._sink = sink
        self._loader = loader

    def __iter__(self) -> Iterator[_Batch]:
        for batch in self._loader:
            self._sink.send(batch)
            yield batch
        self._sink.wait()

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # raises as the loader does
