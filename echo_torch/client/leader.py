"""Of the callers that wait for acks, the one that polls the socket itself, which spares two thread switches.

Whoever else reads the acks that the leader waits for has to `wake` it. The others park, and lead when it is their turn.
"""

from __future__ import annotations

import select
import socket
import threading

from echo_torch.ring.ring import Waiter
from echo_torch.support.deadline import bounded_wait
from echo_torch.support.interrupts import is_mine

from .wakeup import WakeUp


class Leader:
    """Who polls a socket for acks; at most one thread at a time."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._lock = threading.RLock()
        self._thread = 0  # the one that leads; 0 for none
        self._poller = select.poll()
        self._wake_up = WakeUp()
        self.lock = self._wake_up.lock  # held inside `wake` and `close`, as only a signal handler can find

    def open(self) -> None:
        """Make the descriptors."""
        self._wake_up.open()
        self._poller.register(self._wake_up.reader, select.POLLIN)

    def follow(self, sock: socket.socket | None) -> None:
        """Poll this socket from the next time on, and no other; None for none."""
        if self._sock is not None:
            self._poller.unregister(self._sock)
        self._sock = sock
        if sock is not None:
            self._poller.register(sock, select.POLLIN)

    def lead(self, waiter: Waiter, seconds: float) -> bool:
        """Poll until acks came, `wake` was called, or ``seconds`` passed; False, at once, if somebody else leads.

        Reads nothing. ``waiter`` is the caller's own.
        """
        lock = self._lock
        try:
            if is_mine(lock) or not lock.acquire(False):  # a signal handler that interrupted the leader does not poll
                return False
            self._thread = threading.get_ident()
            if not waiter.opened:  # before anybody knew who leads
                self._poll(seconds)
            self._thread = 0
            lock.release()
            return True
        except BaseException:
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
            raise

    def _poll(self, seconds: float) -> None:
        # Of descriptors that were closed just now, or are somebody else's since, it can only learn to look again.
        events = dict(self._poller.poll(bounded_wait(seconds) * 1000))
        self._wake_up.seen(self._wake_up.reader.fileno() in events)

    def wake(self) -> None:
        """Have the leader, if that is another thread, look at the counters."""
        if self._thread and self._thread != threading.get_ident():
            self._wake_up.kick(anyway=True)

    def close(self) -> None:
        self.wake()
        self._wake_up.close()

    def disown(self) -> None:
        """In a forked child, as `WakeUp.disown`."""
        self._wake_up.disown()
