"""Progress bars of what a sink sends, and of what the server has acknowledged; by tqdm."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sink import EchoSink

# Seconds between two looks at the sink.
LOOK_S = 0.1


class Batches:
    """Shows how many batches were passed on, and what became of their samples.

    Args:
        sink: by which they are sent.
        bar: the ``tqdm``.
    """

    def __init__(self, sink: EchoSink, bar: Any) -> None:
        self._sink = sink
        self._bar = bar

    def passed(self) -> None:
        """One more was."""
        if self._bar.update():  # has been drawn just now, as it is not for each
            self._tell()

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """While all that was sent is waited for."""
        return _looking(self._draw)

    def _draw(self) -> None:
        self._tell()
        self._bar.refresh()

    def _tell(self) -> None:
        stats = self._sink.stats()
        self._bar.set_postfix_str(f"{stats.samples_acked:,} acked, {stats.in_flight:,} in flight", refresh=False)


@contextlib.contextmanager
def of_batches(sink: EchoSink, total: int | None) -> Iterator[Batches]:
    """A bar of ``total`` batches, None if nobody knows; raises ImportError without tqdm."""
    with _bar(desc=sink.peer, total=total, unit=" batches") as bar:
        yield Batches(sink, bar)


@contextlib.contextmanager
def of_acks(sink: EchoSink) -> Iterator[None]:
    """A bar of the samples in flight now, full when they are acked; raises ImportError without tqdm."""
    began = sink.stats()

    def look() -> None:
        stats = sink.stats()
        bar.set_postfix_str(f"{stats.in_flight:,} in flight", refresh=False)
        bar.update(min(stats.samples_acked - began.samples_acked, began.in_flight) - bar.n)

    with _bar(desc=f"{sink.peer} acked", total=began.in_flight, unit=" samples", miniters=0) as bar, _looking(look):
        yield


def _bar(**options: Any) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True shows a bar by tqdm, which is not installed: pip install tqdm") from error
    return tqdm(dynamic_ncols=True, **options)


@contextlib.contextmanager
def _looking(look: Callable[[], None]) -> Iterator[None]:
    """Calls ``look`` every now and then, and once more at the end."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(LOOK_S):
            look()

    thread = threading.Thread(target=run, name="echo_torch progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()
