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
POLL_INTERVAL_S = 0.1


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


class BatchBar:
    """Shows how many batches were passed on, and what became of their samples.

    Args:
        sink: by which they are sent.
        bar: the ``tqdm``.
    """

    def __init__(self, sink: Sink, bar: Any) -> None:
        self._sink = sink
        self._bar = bar

    def advance(self) -> None:
        """One more was."""
        if self._bar.update():  # has been drawn just now, as it is not for each
            self._set_counts()

    def wait(self) -> None:
        """For all that was sent."""
        _wait_and_refresh(self._sink.wait, refresh=self._draw)

    def _draw(self) -> None:
        self._set_counts()
        self._bar.refresh()

    def _set_counts(self) -> None:
        stats = self._sink.stats()
        self._bar.set_postfix_str(f"{stats.samples_acked:,} acked, {stats.in_flight:,} in flight", refresh=False)


@contextlib.contextmanager
def batch_bar(sink: Sink, total: int | None) -> Iterator[BatchBar]:
    """A bar of ``total`` batches, None if nobody knows; raises ImportError without tqdm."""
    with _make_bar(desc=sink.peer, total=total, unit=" batches", miniters=1) as bar:
        yield BatchBar(sink, bar)


def wait_with_bar(sink: Sink, wait: Callable[[], None]) -> None:
    """Call ``wait``, with a bar of the samples in flight now, full when they are acked.

    Raises:
        ImportError: there is no tqdm.
    """
    before = sink.stats()

    def refresh() -> None:
        stats = sink.stats()
        bar.set_postfix_str(f"{stats.in_flight:,} in flight", refresh=False)
        bar.update(min(stats.samples_acked - before.samples_acked, before.in_flight) - bar.n)

    with _make_bar(desc=f"{sink.peer} acked", total=before.in_flight, unit=" samples", miniters=0) as bar:
        _wait_and_refresh(wait, refresh)


def _make_bar(**options: Any) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True shows a bar by tqdm, which is not installed: pip install tqdm") from error

    class Bar(tqdm):  # type: ignore[misc]  # of no type that is known
        monitor_interval = 0  # no thread of tqdm's: what it sees to is ``miniters``, which is fixed here

        def refresh(self, *_: Any, **__: Any) -> Any:
            return super().refresh(nolock=True)

    return Bar(dynamic_ncols=True, **options)


def _wait_and_refresh(wait: Callable[[], None], refresh: Callable[[], None]) -> None:
    """Call ``wait``, and ``refresh`` every now and then meanwhile, and once more at the end unless it raises."""
    waiting = threading.Lock()

    def run() -> None:
        while not waiting.acquire(timeout=POLL_INTERVAL_S):
            refresh()

    thread = threading.Thread(target=run, name="echo_torch progress", daemon=True)
    try:
        with waiting:
            thread.start()
            wait()
    finally:
        if thread.is_alive():  # and not before it began, where an interrupt struck
            thread.join()
    refresh()
