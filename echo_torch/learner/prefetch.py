"""A thread that takes batches from a server, so that Ctrl-C can interrupt the threads that wait for them.

``echo.Server.sample()`` blocks in native code, which Ctrl-C does not interrupt. So a thread of our own calls it, and
your threads wait on a queue.

* Each prefetcher has one thread. It starts with the first request. It ends when the server ends, or after `stop`. While
  it is in ``sample()``, only the next batch or ``server.close()`` gets it out.
* The thread takes a batch when one is requested and none is ready, so at most one batch is ready. With ``read_ahead``,
  fetching a batch requests the next one.
* Each call of ``sample()`` gives the slot of the last batch, its memory, back to the server, whichever thread got
  the batch. So the thread converts a batch before it calls ``sample()`` again.
* A batch that nobody fetched stays ready, for example after Ctrl-C. It is lost only with the prefetcher.
* A dropped prefetcher may leave its thread in ``sample()``. The next prefetcher for that server waits for that thread
  on ``sample_lock``. Otherwise its call of ``sample()`` could give back a slot that the other thread still reads.
* One lock guards the state. No thread holds it while waiting. `stop` does not need it, so finalizers may call `stop`.
* Process exit stops the threads, and closes the server of a thread that is in ``sample()``. Otherwise a daemon thread
  may return from ``sample()``, or from PyTorch, while the interpreter is shutting down. That aborts the process.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from echo_torch.support.deadline import Deadline

# How long process exit waits for all threads together, in seconds.
EXIT_TIMEOUT_S = 5.0
# When a dataset is closed: most seconds to take what the server still has, and seconds without a batch after which that
# was all.
DISCARD_S = 0.5
DISCARD_IDLE_S = 0.02
# Seconds without a batch after which the log says so, once.
IDLE_WARNING_S = 5.0
# How long a thread waits for a batch before it looks again, in seconds. A Ctrl-C that comes just before the wait begins
# does not interrupt it, so this bounds the delay.
POLL_INTERVAL_S = 0.5

_log = logging.getLogger(__name__)

_Sample = TypeVar("_Sample")
_Batch = TypeVar("_Batch")


class _Outcome(NamedTuple, Generic[_Batch]):
    """What one call of ``sample()`` led to: a batch, an error, or neither at the end."""

    batch: _Batch | None = None
    error: BaseException | None = None


class Prefetcher(Generic[_Sample, _Batch]):
    """Calls ``sample`` and ``convert`` in a thread, and returns the results one after the other.

    Args:
        sample: blocks until there is a sample and returns it, or returns None at the end.
        convert: makes a batch of a sample. Called in the same thread, before the next call of ``sample``.
        close: makes ``sample`` return soon; called at process exit.
        describe_idle: says why no batch comes; called once, after `IDLE_WARNING_S`.
        sample_lock: held during ``sample`` and ``convert``; `sample_lock_for` returns the one of a server.
        read_ahead: whether to take the next batch as soon as you fetch one, rather than when you ask for it.
    """

    def __init__(
        self,
        sample: Callable[[], _Sample | None],
        convert: Callable[[_Sample], _Batch],
        close: Callable[[], object],
        *,
        describe_idle: Callable[[], str],
        sample_lock: threading.Lock,
        read_ahead: bool,
    ) -> None:
        self._sample = sample
        self._convert = convert
        self._close = close
        self._describe_idle = describe_idle
        self._sample_lock = sample_lock
        self._read_ahead = read_ahead
        # Whether the log says that no batch comes.
        self._idle_logged = False
        # Guards `_thread`, `_requested`, `_exhausted`, `_waiters` and `_ready`.
        self._lock = threading.Lock()
        # The thread, which stores itself here in its first step; None before.
        self._thread: threading.Thread | None = None
        # The thread of `discard_samples`; None before.
        self._discarding_thread: threading.Thread | None = None
        # requested: a batch is wanted and not ready yet. exhausted: there will be no more batches. stopped: `stop` was
        # called. in_sample: the thread is in `sample`, or about to call it.
        self._requested = self._exhausted = self._stopped = self._in_sample = False
        # One queue for each thread that waits in `next`; an item wakes it.
        self._waiters: set[queue.SimpleQueue[None]] = set()
        # The outcome that nobody has fetched yet, if any.
        self._ready: deque[_Outcome[_Batch]] = deque()
        # An item only wakes the prefetcher's thread. The thread looks at the state to see what to do.
        self._requests: queue.SimpleQueue[None] = queue.SimpleQueue()
        _live_prefetchers.add(self)

    def next(self) -> _Batch | None:
        """Block until the next batch is ready and return it; None at the end and from then on.

        Any thread may call this. Each batch goes to one caller.

        Raises:
            Exception: whatever ``sample`` or ``convert`` raised. The next call asks for another batch.
        """
        waiter: queue.SimpleQueue[None] = queue.SimpleQueue()
        idle = Deadline(IDLE_WARNING_S)
        while (outcome := self._pop_or_request(waiter)) is None:
            if idle.expired and not self._idle_logged:
                self._idle_logged = True
                _log.warning("no batch for %g s: %s", IDLE_WARNING_S, self._describe_idle())
            # An interrupt here loses nothing: the batch becomes ready all the same, and the next call returns it.
            with contextlib.suppress(queue.Empty):
                waiter.get(timeout=POLL_INTERVAL_S)
        if outcome.error is None:
            return outcome.batch
        try:
            raise outcome.error
        finally:
            # The traceback of the error refers to this frame. If the frame kept the error, the cycle would keep alive
            # whatever the frames in the traceback hold.
            del outcome

    def stop(self) -> None:
        """Tell the thread to end; takes no lock and does not wait."""
        self._stopped = True
        self._requests.put(None)

    def stop_at_exit(self) -> None:
        """Stop, and make ``sample`` return if the thread is in it."""
        # Set `_stopped` first, then read `_in_sample`. `_wait_for_sample` sets and reads them in the other
        # order. So at least one of the two sees what the other has set.
        self.stop()
        if self._in_sample:
            self._close()

    def discard_samples(self) -> None:
        """After `stop`: take what the server has and drop it, in a thread, until the server is closed.

        Returns when the server has had nothing for a moment, and after `DISCARD_S` in any case.
        """
        taken = queue.SimpleQueue[bool]()

        def discard() -> None:
            with contextlib.suppress(Exception), self._sample_lock:
                while self._sample() is not None:
                    taken.put(True)

        self._discarding_thread = threading.Thread(target=discard, name="echo_torch dataset discards", daemon=True)
        self._discarding_thread.start()
        deadline = Deadline(DISCARD_S)
        with contextlib.suppress(queue.Empty):
            while not deadline.expired:
                taken.get(timeout=DISCARD_IDLE_S)

    def join(self, timeout: float) -> None:
        """Wait for the threads to end, for at most ``timeout`` seconds."""
        deadline = Deadline(timeout)
        for thread in (self._thread, self._discarding_thread):
            if thread is not None:
                thread.join(deadline.remaining())

    def _pop_or_request(self, waiter: queue.SimpleQueue[None]) -> _Outcome[_Batch] | None:
        """Return the outcome that is ready; else request one, register ``waiter`` to be woken, and return None."""
        with self._lock:
            outcome = self._ready.popleft() if self._ready else _Outcome() if self._exhausted else None
            if outcome is None:
                self._waiters.add(waiter)
            # With `read_ahead`, fetching a batch requests the next one. Fetching an error does not: the caller may give
            # up.
            request = not self._exhausted and (outcome is None or (self._read_ahead and outcome.error is None))
            self._requested = self._requested or request
            start = request and self._thread is None
        # An interrupt here loses no request: the next call of `next` starts the thread, if there is none, and wakes it.
        if start:
            threading.Thread(target=self._run, name="echo_torch dataset", daemon=True).start()
        if request:
            self._requests.put(None)
        return outcome

    def _run(self) -> None:
        """Take batches until the end; the body of the thread."""
        with self._lock:
            # Two calls may each start a thread before the first thread gets here. The second one ends at once.
            if self._thread is not None:
                return
            self._thread = threading.current_thread()
        done = False
        while not done:
            self._requests.get()
            # There may be more wake-ups than requests, so ask the state.
            with self._lock:
                wanted = self._requested and not self._ready
            # Keep no outcome here while the thread waits: an error keeps alive whatever its frames hold.
            done = self._deliver(_Outcome()) if self._stopped else wanted and self._deliver(self._sample_and_convert())

    def _sample_and_convert(self) -> _Outcome[_Batch]:
        """Take one sample and convert it; an error becomes the outcome, for `next` to raise."""
        try:
            with self._sample_lock:
                sample = self._wait_for_sample()
                return _Outcome() if sample is None or self._stopped else _Outcome(self._convert(sample))
        except BaseException as error:
            return _Outcome(error=error)

    def _wait_for_sample(self) -> _Sample | None:
        # Set `_in_sample` first, then read `_stopped`; see `stop_at_exit`.
        self._in_sample = True
        try:
            return None if self._stopped else self._sample()
        finally:
            self._in_sample = False

    def _deliver(self, outcome: _Outcome[_Batch]) -> bool:
        """Make the outcome ready and wake all waiters; return whether it was the end."""
        with self._lock:
            self._requested = False
            self._exhausted = outcome.batch is None and outcome.error is None
            if not self._exhausted:
                self._ready.append(outcome)
            waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            waiter.put(None)
        return self._exhausted


# The lock of each server that still exists; see `sample_lock_for`.
_sample_locks: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


def sample_lock_for(server: Any) -> threading.Lock:
    """Return the one lock that all prefetchers of this server share."""
    try:
        return _sample_locks.setdefault(server, threading.Lock())
    except TypeError:  # the object is not hashable, or has no weak references: it gets no shared lock
        return threading.Lock()


# The prefetchers of this process that may have a thread.
_live_prefetchers: weakref.WeakSet[Prefetcher[Any, Any]] = weakref.WeakSet()


def _stop_all_at_exit() -> None:
    """Stop all prefetchers, then wait for their threads."""
    # Stop all of them before joining any: one thread may wait for a sample lock that another holds.
    prefetchers = list(_live_prefetchers)
    for prefetcher in prefetchers:
        prefetcher.stop_at_exit()
    deadline = Deadline(EXIT_TIMEOUT_S)
    for prefetcher in prefetchers:
        prefetcher.join(deadline.remaining())


atexit.register(_stop_all_at_exit)
# A forked child does not have the threads.
os.register_at_fork(after_in_child=_live_prefetchers.clear)
