"""Threads that sleep in ``poll``, and how other threads wake them.

* The I/O thread sleeps on a `WakeUp`.
* Of the callers that wait for acks, one becomes the ack poller: it polls the socket itself (`AckPoller`), which saves
  two thread switches. The other waiting callers park, and one of them takes over when the ack poller is done.
* If any other thread reads acks that the ack poller waits for, it must wake the ack poller.
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
    """A pair of descriptors: the sleeper polls one, other threads write to the other.

    * Any thread may call any method, also after `close`. The lock keeps `wake` from writing to a descriptor that was
      just closed and may belong to somebody else by now.
    * Before you call `wake`, make your change visible.
    * If an interrupt strikes inside `wake`, that wake-up may be lost. Later ones are lost too, until the sleeper wakes
      by itself.
    """

    def __init__(self) -> None:
        # Held only inside `wake` and `close`. If a caller finds that its own thread holds it already, the caller is a
        # signal handler that interrupted one of them.
        self.lock = threading.RLock()
        # Whether `wake` was called since the last `clear`; then another byte is not needed.
        self._is_woken = False
        # The end that `wake` writes to; None before `open`.
        self._writer: socket.socket | None = None
        # The end to poll; not set before `open`.
        self.reader: socket.socket

    def open(self) -> None:
        """Create the descriptors; before this, and after `close`, `wake` does nothing."""
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def wake(self, force: bool = False) -> None:
        """Wake the sleeper, unless a wake-up is pending already; with ``force``, in any case."""
        if self._is_woken and not force:
            return
        self._is_woken = True
        with self.lock, contextlib.suppress(OSError):  # closed, or full of wake-ups
            if self._writer is not None:
                self._writer.send(b"\0")

    def clear(self, readable: bool) -> None:
        """Take the pending wake-ups, so that the next `wake` wakes again.

        The sleeper calls this whenever it wakes, before it looks at anything.

        Args:
            readable: whether ``poll`` reported the reader as readable. If an interrupt hit `wake` before it wrote, a
                wake-up is pending and the reader is not readable.
        """
        if readable:
            with contextlib.suppress(OSError):
                self.reader.recv(64)
        # Do this after `recv`. Otherwise `recv` could take the byte of a newer wake-up together with the old one. Then
        # `_is_woken` would stay set, and nobody would wake the sleeper again.
        self._is_woken = False

    def close(self) -> None:
        """Close the descriptors; idempotent."""
        with self.lock:
            self.detach_after_fork()

    def detach_after_fork(self) -> None:
        """In a forked child: close its copies of the descriptors.

        Takes no lock: no other thread of the child can use them, and the fork may have copied the lock as held.
        """
        if self._writer is not None:
            self.reader.close()
            self._writer.close()


class AckPoller:
    """Lets one caller at a time, the ack poller, poll the socket for acks."""

    def __init__(self) -> None:
        # The socket to poll; None for none.
        self._sock: socket.socket | None = None
        # Held by the thread that polls.
        self._lock = threading.RLock()
        # Identifier of the thread that polls; 0 for none.
        self._thread_id = 0
        # Polls the socket and the wake-up.
        self._poller = select.poll()
        # Ends the poll early.
        self._wake_up = WakeUp()
        # The wake-up's lock. If a caller finds that its own thread holds it already, the caller is a signal handler.
        self.lock = self._wake_up.lock

    def open(self) -> None:
        """Create the descriptors."""
        self._wake_up.open()
        self._poller.register(self._wake_up.reader, select.POLLIN)

    def set_socket(self, sock: socket.socket | None) -> None:
        """Poll this socket from the next poll on; None for none."""
        if self._sock is not None:
            self._poller.unregister(self._sock)
        self._sock = sock
        if sock is not None:
            self._poller.register(sock, select.POLLIN)

    def try_poll_socket(self, waiter: Waiter, seconds: float) -> bool:
        """Block until acks arrive, `wake` is called, or ``seconds`` have passed; reads nothing.

        Args:
            waiter: the caller's own wait, as `Ring.add_waiter` returned it.
            seconds: most seconds to block.

        Returns:
            False, at once, if another thread polls already.
        """
        lock = self._lock
        try:
            # A signal handler must not poll if it interrupted the ack poller. The RLock alone would let it in.
            if owned_by_this_thread(lock) or not lock.acquire(False):
                return False
            # From here on, `wake` knows whom to wake. A thread that acked our rows before could only wake the waiter.
            # So check the waiter next.
            self._thread_id = threading.get_ident()
            if not waiter.is_woken:
                self._poll(seconds)
            self._thread_id = 0
            lock.release()
            return True
        except BaseException:
            # An interrupt may come before or after the lock was acquired. Only the lock knows, so try to release it. Do
            # so inline, with no call before it, because a second interrupt can strike where a Python function begins.
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
            raise

    def _poll(self, seconds: float) -> None:
        # If a descriptor was just closed, or is somebody else's by now, ``poll`` may return early. That is harmless:
        # the caller then looks at the counters again.
        events = dict(self._poller.poll(clamp_timeout(seconds) * 1000))
        self._wake_up.clear(self._wake_up.reader.fileno() in events)

    def wake(self) -> None:
        """Make the ack poller look at the counters, if it is another thread."""
        if self._thread_id and self._thread_id != threading.get_ident():
            self._wake_up.wake(force=True)

    def close(self) -> None:
        """Wake the ack poller and close the descriptors."""
        self.wake()
        self._wake_up.close()

    def detach_after_fork(self) -> None:
        """In a forked child: close its copies of the descriptors, without a lock (`WakeUp.detach_after_fork`)."""
        self._wake_up.detach_after_fork()
