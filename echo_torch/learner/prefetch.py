"""A thread that takes batches from a server, so that who waits for one can be interrupted.

``echo.Server.sample()`` waits in code that no Ctrl-C gets through to, until a batch comes. So a thread of our own waits
there, and whoever asks for a batch waits on a queue. For each taker:

* One thread calls ``sample()``, and converts what it gives. It starts with the first question, and ends with the
  server, or after the taker was stopped; until the server has a next batch, or is closed, nothing gets it out of there.
* It takes a batch only when one was asked for, and none is there; with ``ahead``, as soon as the last one is fetched.
  So no slot of the server is given back before the batch in it was converted, and at most one is taken ahead.
* What was taken stays until it is fetched: it is not lost if who asked was interrupted, or has stopped asking. It is
  lost with the taker.
* A taker that is dropped may leave its thread in ``sample()``. The next one for that server waits for it to come out:
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
END_S = 5.0
# Seconds after which a Ctrl-C is seen at the latest: one that comes just as the waiting begins does not end it.
LOOK_S = 0.5

_Sample = TypeVar("_Sample")
_Batch = TypeVar("_Batch")


class _Taken(NamedTuple, Generic[_Batch]):
    """What one call of ``sample()`` came to: a batch, an error, or none of them at the end."""

    batch: _Batch | None = None
    error: BaseException | None = None


class Taker(Generic[_Sample, _Batch]):
    """Gives what ``convert`` makes of what ``sample`` gives, one after the other.

    Args:
        sample: blocks until there is one; None at the end.
        convert: called in the same thread, before ``sample`` is again.
        close: has ``sample`` end soon; called at the end of the process.
        turn: held in ``sample`` and ``convert``; the same for all takers of a server.
        ahead: take the next one as soon as one is fetched, rather than when it is asked for.
    """

    def __init__(
        self,
        sample: Callable[[], _Sample | None],
        convert: Callable[[_Sample], _Batch],
        close: Callable[[], object],
        *,
        turn: threading.Lock,
        ahead: bool,
    ) -> None:
        self._sample = sample
        self._convert = convert
        self._close = close
        self._turn = turn
        self._ahead = ahead
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._asked = self._ended = self._stopped = self._in_sample = False
        self._waiting: set[queue.SimpleQueue[None]] = set()  # who has to be told that something is there
        self._there: deque[_Taken[_Batch]] = deque()
        self._questions: queue.SimpleQueue[None] = queue.SimpleQueue()
        _living.add(self)

    def next(self) -> _Batch | None:
        """The next batch; None at the end, and from then on. Any thread may ask, and each batch goes to one of them.

        Raises:
            Exception: whatever ``sample`` or ``convert`` raised; the next call asks again.
        """
        told: queue.SimpleQueue[None] = queue.SimpleQueue()
        while (taken := self._fetch(told)) is None:
            with contextlib.suppress(queue.Empty):
                told.get(timeout=LOOK_S)
        if taken.error is None:
            return taken.batch
        try:
            raise taken.error
        finally:
            del taken  # an error knows this frame, and would so keep itself, and what the frames it came by hold

    def stop(self) -> None:
        """Take no more. Without a lock, and without waiting."""
        self._stopped = True
        self._questions.put(None)

    def end(self) -> None:
        """At the end of the process: stop, and have ``sample`` end."""
        self.stop()
        if self._in_sample:
            self._close()

    def join(self, timeout: float) -> None:
        """Wait for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _fetch(self, told: queue.SimpleQueue[None]) -> _Taken[_Batch] | None:
        """What is there; or else ask for it, and to be told."""
        with self._lock:
            taken = self._there.popleft() if self._there else _Taken() if self._ended else None
            if taken is None:
                self._waiting.add(told)
            ask = not self._ended and (taken is None or (self._ahead and taken.error is None))
            self._asked = self._asked or ask
            start = ask and self._thread is None
        if start:
            threading.Thread(target=self._run, name="echo_torch dataset", daemon=True).start()
        if ask:
            self._questions.put(None)
        return taken

    def _run(self) -> None:
        with self._lock:
            if self._thread is not None:  # who started that one was interrupted, and started another
                return
            self._thread = threading.current_thread()
        over = False
        while not over:
            self._questions.get()
            with self._lock:
                wanted = self._asked and not self._there
            over = self._stopped or (wanted and self._answer(self._take()))

    def _take(self) -> _Taken[_Batch]:
        try:
            with self._turn:
                sample = self._wait_for_sample()
                return _Taken() if sample is None or self._stopped else _Taken(self._convert(sample))
        except BaseException as error:
            return _Taken(error=error)

    def _wait_for_sample(self) -> _Sample | None:
        self._in_sample = True  # before the other is looked at, as `end` does it the other way round
        try:
            return None if self._stopped else self._sample()
        finally:
            self._in_sample = False

    def _answer(self, taken: _Taken[_Batch]) -> bool:
        """Tell those who wait; gives whether it was the last."""
        with self._lock:
            self._asked = False
            self._ended = taken.batch is None and taken.error is None
            if not self._ended:
                self._there.append(taken)
            waiting, self._waiting = self._waiting, set()
        for told in waiting:
            told.put(None)
        return self._ended


_turns: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


def turn_of(server: Any) -> threading.Lock:
    """The one lock for that server."""
    try:
        return _turns.setdefault(server, threading.Lock())
    except TypeError:  # it has no hash, or no weak references
        return threading.Lock()


_living: weakref.WeakSet[Taker[Any, Any]] = weakref.WeakSet()


def _end_all() -> None:
    """All are told first, as one may wait for the turn of another."""
    takers = list(_living)
    for taker in takers:
        taker.end()
    until = Deadline(END_S)
    for taker in takers:
        taker.join(until.remaining())


atexit.register(_end_all)
os.register_at_fork(after_in_child=_living.clear)  # whose threads are not there
