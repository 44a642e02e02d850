"""Progress bars of what a sink sends, and of what the server has acknowledged; by tqdm.

Interrupts may strike wherever something is shown. So no lock of tqdm's is taken to draw: one that an interrupt left
held would be waited for, for ever, by whoever draws next on another thread. And what tells the thread here that there
is nothing more to look at is a lock that C code releases.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from .metrics.stats import SinkStats

# Seconds between two looks at the sink.
LOOK_S = 0.1


class Sink(Protocol):
    """What is shown here, and passed on to by a `Tee`: an `EchoSink`."""

    @property
    def peer(self) -> str:
        """How messages name the learner."""

    def send(self, batch: Any, /) -> None:
        """Send one sample, or a batch of them."""

    def wait(self) -> None:
        """Block until everything sent so far is acked."""

    def stats(self) -> SinkStats:
        """What became of the samples so far."""


class Batches:
    """Shows how many batches were passed on, and what became of their samples.

    Args:
        sink: by which they are sent.
        bar: the ``tqdm``.
    """

    def __init__(self, sink: Sink, bar: Any) -> None:
        self._sink = sink
        self._bar = bar

    def passed(self) -> None:
        """One more was."""
        if self._bar.update():  # has been drawn just now, as it is not for each
            self._tell()

    def wait(self) -> None:
        """For all that was sent."""
        _call(self._sink.wait, look=self._draw)

    def _draw(self) -> None:
        self._tell()
        self._bar.refresh()

    def _tell(self) -> None:
        stats = self._sink.stats()
        self._bar.set_postfix_str(f"{stats.samples_acked:,} acked, {stats.in_flight:,} in flight", refresh=False)


@contextlib.contextmanager
def of_batches(sink: Sink, total: int | None) -> Iterator[Batches]:
    """A bar of ``total`` batches, None if nobody knows; raises ImportError without tqdm."""
    with _bar(desc=sink.peer, total=total, unit=" batches", miniters=1) as bar:
        yield Batches(sink, bar)


def show_acks(sink: Sink, wait: Callable[[], None]) -> None:
    """Call ``wait``, with a bar of the samples in flight now, full when they are acked.

    Raises:
        ImportError: there is no tqdm.
    """
    began = sink.stats()

    def look() -> None:
        stats = sink.stats()
        bar.set_postfix_str(f"{stats.in_flight:,} in flight", refresh=False)
        bar.update(min(stats.samples_acked - began.samples_acked, began.in_flight) - bar.n)

    with _bar(desc=f"{sink.peer} acked", total=began.in_flight, unit=" samples", miniters=0) as bar:
        _call(wait, look)


def _bar(**options: Any) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True shows a bar by tqdm, which is not installed: pip install tqdm") from error

    class Bar(tqdm):  # type: ignore[misc]  # of no type that is known
        monitor_interval = 0  # no thread of tqdm's: what it sees to is ``miniters``, which is fixed here

        def refresh(self, *_: Any, **__: Any) -> Any:
            return super().refresh(nolock=True)

    return Bar(dynamic_ncols=True, **options)


def _call(wait: Callable[[], None], look: Callable[[], None]) -> None:
    """Call ``wait``, and ``look`` every now and then meanwhile, and once more at the end unless it raises."""
    waiting = threading.Lock()

    def run() -> None:
        while not waiting.acquire(timeout=LOOK_S):
            look()

    thread = threading.Thread(target=run, name="echo_torch progress", daemon=True)
    try:
        with waiting:
            thread.start()
            wait()
    finally:
        if thread.is_alive():  # and not before it began, where an interrupt struck
            thread.join()
    look()
