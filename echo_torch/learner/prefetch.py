"""A thread that takes batches from a server, so that who waits for one can be interrupted.

``echo.Server.sample()`` waits in code that no Ctrl-C gets through to, until a batch comes. So a thread of our own waits
there, and whoever asks for a batch waits on a queue. For each prefetcher:

* One thread calls ``sample()``, and converts what it gives. It starts with the first question, and ends with the
  server, or after the prefetcher was stopped; until the server has a next batch, or is closed, nothing gets it out of there.
* It takes a batch only when one was asked for, and none is there; with ``read_ahead``, as soon as the last one is fetched.
  So no slot of the server is given back before the batch in it was converted, and at most one is taken ahead.
* What was taken stays until it is fetched: it is not lost if who asked was interrupted, or has stopped asking. It is
  lost with the prefetcher.
* A prefetcher that is dropped may leave its thread in ``sample()``. The next one for that server waits for it to come out:
  each call gives back the slot of the last batch, whoever got it.
* One lock guards the state. It is not held while anybody waits, and stopping does not need it: finalisers may do so.
* The end of the process ends the thread, and the server for that: a daemon thread that comes back to the interpreter
  when that is ending aborts it, out of ``sample()`` as out of PyTorch.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from echo_torch.support.deadline import Deadline

# Seconds that the end of the process waits for the threads.
EXIT_TIMEOUT_S = 5.0
# Seconds after which a Ctrl-C is seen at the latest: one that comes just as the waiting begins does not end it.
POLL_INTERVAL_S = 0.5

_Sample = TypeVar("_Sample")
_Batch = TypeVar("_Batch")


class _Outcome(NamedTuple, Generic[_Batch]):
    """What one call of ``sample()`` came to: a batch, an error, or none of them at the end."""

    batch: _Batch | None = None
    error: BaseException | None = None


class Prefetcher(Generic[_Sample, _Batch]):
    """Gives what ``convert`` makes of what ``sample`` gives, one after the other.

    Args:
        sample: blocks until there is one; None at the end.
        convert: called in the same thread, before ``sample`` is again.
        close: has ``sample`` end soon; called at the end of the process.
        sample_lock: held in ``sample`` and ``convert``; the same for all prefetchers of a server.
        read_ahead: take the next one as soon as one is fetched, rather than when it is asked for.
    """

    def __init__(
        self,
        sample: Callable[[], _Sample | None],
        convert: Callable[[_Sample], _Batch],
        close: Callable[[], object],
        *,
        sample_lock: threading.Lock,
        read_ahead: bool,
    ) -> None:
        self._sample = sample
        self._convert = convert
        self._close = close
        self._sample_lock = sample_lock
        self._read_ahead = read_ahead
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._requested = self._exhausted = self._stopped = self._in_sample = False
        self._waiters: set[queue.SimpleQueue[None]] = set()  # who has to be told that something is there
        self._ready: deque[_Outcome[_Batch]] = deque()
        self._requests: queue.SimpleQueue[None] = queue.SimpleQueue()
        _live_prefetchers.add(self)

    def next(self) -> _Batch | None:
        """The next batch; None at the end, and from then on. Any thread may ask, and each batch goes to one of them.

        Raises:
            Exception: whatever ``sample`` or ``convert`` raised; the next call asks again.
        """
        waiter: queue.SimpleQueue[None] = queue.SimpleQueue()
        while (outcome := self._pop_or_request(waiter)) is None:
            with contextlib.suppress(queue.Empty):
                waiter.get(timeout=POLL_INTERVAL_S)
        if outcome.error is None:
            return outcome.batch
        try:
            raise outcome.error
        finally:
            del outcome  # an error knows this frame, and would so keep itself, and what the frames it came by hold

    def stop(self) -> None:
        """Take no more. Without a lock, and without waiting."""
        self._stopped = True
        self._requests.put(None)

    def stop_at_exit(self) -> None:
        """At the end of the process: stop, and have ``sample`` end."""
        self.stop()
        if self._in_sample:
            self._close()

    def join(self, timeout: float) -> None:
        """Wait for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _pop_or_request(self, waiter: queue.SimpleQueue[None]) -> _Outcome[_Batch] | None:
        """What is there; or else ask for it, and to be told."""
        with self._lock:
            outcome = self._ready.popleft() if self._ready else _Outcome() if self._exhausted else None
            if outcome is None:
                self._waiters.add(waiter)
            ask = not self._exhausted and (outcome is None or (self._read_ahead and outcome.error is None))
            self._requested = self._requested or ask
            start = ask and self._thread is None
        if start:
            threading.Thread(target=self._run, name="echo_torch dataset", daemon=True).start()
        if ask:
            self._requests.put(None)
        return outcome

    def _run(self) -> None:
        with self._lock:
            if self._thread is not None:  # who started that one was interrupted, and started another
                return
            self._thread = threading.current_thread()
        done = False
        while not done:
            self._requests.get()
            with self._lock:
                wanted = self._requested and not self._ready
            done = self._stopped or (wanted and self._deliver(self._sample_and_convert()))

    def _sample_and_convert(self) -> _Outcome[_Batch]:
        try:
            with self._sample_lock:
                sample = self._wait_for_sample()
                return _Outcome() if sample is None or self._stopped else _Outcome(self._convert(sample))
        except BaseException as error:
            return _Outcome(error=error)

    def _wait_for_sample(self) -> _Sample | None:
        self._in_sample = True  # before the other is looked at, as `stop_at_exit` does it the other way round
        try:
            return None if self._stopped else self._sample()
        finally:
            self._in_sample = False

    def _deliver(self, outcome: _Outcome[_Batch]) -> bool:
        """Tell those who wait; gives whether it was the last."""
        with self._lock:
            self._requested = False
            self._exhausted = outcome.batch is None and outcome.error is None
            if not self._exhausted:
                self._ready.append(outcome)
            waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            waiter.put(None)
        return self._exhausted


_sample_locks: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


def sample_lock_for(server: Any) -> threading.Lock:
    """The one lock for that server."""
    try:
        return _sample_locks.setdefault(server, threading.Lock())
    except TypeError:  # it has no hash, or no weak references
        return threading.Lock()


_live_prefetchers: weakref.WeakSet[Prefetcher[Any, Any]] = weakref.WeakSet()


def _stop_all_at_exit() -> None:
    """All are told first, as one may wait for the turn of another."""
    prefetchers = list(_live_prefetchers)
    for prefetcher in prefetchers:
        prefetcher.stop_at_exit()
    deadline = Deadline(EXIT_TIMEOUT_S)
    for prefetcher in prefetchers:
        prefetcher.join(deadline.remaining())


atexit.register(_stop_all_at_exit)
os.register_at_fork(after_in_child=_live_prefetchers.clear)  # whose threads are not there
