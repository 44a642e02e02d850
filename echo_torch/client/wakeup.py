"""Who sleeps in ``poll``, and how other threads make them look up: the I/O thread, and the leader of those who wait.

Of the callers that wait for acks, the `AckPoller` polls the socket itself, which spares two thread switches. Whoever else
reads the acks that it waits for has to wake it. The others park, and lead when it is their turn.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading

from echo_torch.ring.ring import Waiter
from echo_torch.support.deadline import clamp_timeout
from echo_torch.support.interrupts import owned_by_this_thread


class WakeUp:
    """A pair of descriptors: one to poll, one to write to.

    Callable from any thread and after `close`. The lock keeps a wake-up from being written to a descriptor that was
    closed in between and may be somebody else's by now. Whoever kicks has made what it is about visible before. An
    interrupt inside `wake` may lose that wake-up and those that follow, until the sleeper wakes by itself.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held inside `wake` and `close`, as only a signal handler can find
        self._is_woken = False
        self._writer: socket.socket | None = None
        self.reader: socket.socket
        """The end to poll; there since `open`."""

    def open(self) -> None:
        """Make the descriptors; until then, and after `close`, a kick does nothing."""
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def wake(self, force: bool = False) -> None:
        """Wake the sleeper, unless that was done and it has not looked since; or anyway."""
        if self._is_woken and not force:
            return
        self._is_woken = True
        with self.lock, contextlib.suppress(OSError):  # closed, or full of wake-ups
            if self._writer is not None:
                self._writer.send(b"\0")

    def clear(self, readable: bool) -> None:
        """From now on a kick wakes again; to be called whenever the sleeper wakes, before it looks at anything.

        ``readable`` is whether ``poll`` found the reader so. If not, a kick may have been interrupted half-way.
        """
        if readable:
            with contextlib.suppress(OSError):
                self.reader.recv(64)
        # Only now: the byte of a kick that came in between would have been taken for that of the one before.
        self._is_woken = False

    def close(self) -> None:
        with self.lock:
            self.detach_after_fork()

    def detach_after_fork(self) -> None:
        """Close a forked child's copies, which no other thread can be using, without the lock, which one may hold."""
        if self._writer is not None:
            self.reader.close()
            self._writer.close()


class AckPoller:
    """Who polls a socket for acks; at most one thread at a time."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._lock = threading.RLock()
        self._thread_id = 0  # the one that leads; 0 for none
        self._poller = select.poll()
        self._wake_up = WakeUp()
        self.lock = self._wake_up.lock  # held inside `wake` and `close`, as only a signal handler can find

    def open(self) -> None:
        """Make the descriptors."""
        self._wake_up.open()
        self._poller.register(self._wake_up.reader, select.POLLIN)

    def set_socket(self, sock: socket.socket | None) -> None:
        """Poll this socket from the next time on, and no other; None for none."""
        if self._sock is not None:
            self._poller.unregister(self._sock)
        self._sock = sock
        if sock is not None:
            self._poller.register(sock, select.POLLIN)

    def poll_for_acks(self, waiter: Waiter, seconds: float) -> bool:
        """Poll until acks came, `wake` was called, or ``seconds`` passed; False, at once, if somebody else leads.

        Reads nothing. ``waiter`` is the caller's own.
        """
        lock = self._lock
        try:
            if owned_by_this_thread(lock) or not lock.acquire(
                False
            ):  # a signal handler that interrupted the leader does not poll
                return False
            self._thread_id = threading.get_ident()
            if not waiter.is_woken:  # before anybody knew who leads
                self._poll(seconds)
            self._thread_id = 0
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
        events = dict(self._poller.poll(clamp_timeout(seconds) * 1000))
        self._wake_up.clear(self._wake_up.reader.fileno() in events)

    def wake(self) -> None:
        """Have the leader, if that is another thread, look at the counters."""
        if self._thread_id and self._thread_id != threading.get_ident():
            self._wake_up.wake(force=True)

    def close(self) -> None:
        self.wake()
        self._wake_up.close()

    def detach_after_fork(self) -> None:
        """In a forked child, as `WakeUp.detach_after_fork`."""
        self._wake_up.detach_after_fork()
