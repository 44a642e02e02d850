"""Progress bars of what a sink sends and of what the server has acknowledged, drawn by tqdm.

Ctrl-C may interrupt the main thread anywhere here. Two rules follow:

* Bars draw without tqdm's lock. If an interrupt left it held, the next thread that draws would wait for ever.
* A plain lock, which C code releases, tells the thread here to end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from .metrics.stats import SinkStats

# Seconds between two updates of a bar.
POLL_INTERVAL_S = 0.1


class Sink(Protocol):
    """What bars and `Tee` need of an `EchoSink`."""

    @property
    def peer(self) -> str:
        """The learner's name in messages."""

    def send(self, batch: Any, /) -> None:
        """Send one sample, or a batch of them."""

    def wait(self) -> None:
        """Block until everything sent so far is acked."""

    def stats(self) -> SinkStats:
        """Return the counters."""


class BatchBar:
    """A bar of batches, with the number of samples acked and in flight behind it.

    Args:
        sink: the sink that sends the batches.
        bar: the tqdm bar.
    """

    def __init__(self, sink: Sink, bar: Any) -> None:
        # The sink that sends the batches.
        self._sink = sink
        # The tqdm bar.
        self._bar = bar

    def advance(self) -> None:
        """Count one more batch."""
        # `update` returns True if it has drawn the bar, which it does not do each time. Only then are counts needed.
        if self._bar.update():
            self._set_counts()

    def wait(self) -> None:
        """Block until everything sent so far is acked, and keep the bar up to date."""
        _wait_and_refresh(self._sink.wait, refresh=self._draw)

    def _draw(self) -> None:
        self._set_counts()
        self._bar.refresh()

    def _set_counts(self) -> None:
        stats = self._sink.stats()
        self._bar.set_postfix_str(f"{stats.samples_acked:,} acked, {stats.in_flight:,} in flight", refresh=False)


@contextlib.contextmanager
def batch_bar(sink: Sink, total: int | None) -> Iterator[BatchBar]:
    """Show a bar of ``total`` batches, or without an end if that is None.

    Raises:
        ImportError: tqdm is not installed.
    """
    with _make_bar(desc=sink.peer, total=total, unit=" batches", miniters=1) as bar:
        yield BatchBar(sink, bar)


def wait_with_bar(sink: Sink, wait: Callable[[], None]) -> None:
    """Call ``wait`` under a bar of the samples that are in flight now; the bar is full when they are acked.

    Raises:
        ImportError: tqdm is not installed.
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

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        # Start no monitor thread: it would adjust ``miniters``, which is fixed here.
        monitor_interval = 0

        def refresh(self, *_: Any, **__: Any) -> Any:
            return super().refresh(nolock=True)

    return Bar(dynamic_ncols=True, **options)


def _wait_and_refresh(wait: Callable[[], None], refresh: Callable[[], None]) -> None:
    """Call ``wait``; meanwhile call ``refresh`` every `POLL_INTERVAL_S` on another thread, and once more at the end."""
    # This thread holds the lock while it waits. The other thread ends when it gets the lock.
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
        if thread.is_alive():  # an interrupt may have come before the thread started
            thread.join()
    refresh()
