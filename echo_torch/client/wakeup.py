"""How other threads make the I/O thread, which sleeps in ``poll``, look up."""

from __future__ import annotations

import contextlib
import socket
import threading


class WakeUp:
    """A pair of descriptors: one to poll, one to write to.

    Callable from any thread and after `close`. The lock keeps a wake-up from being written to a descriptor that was
    closed in between and may be somebody else's by now. Whoever kicks has made what it is about visible before. An
    interrupt inside `kick` may lose that wake-up and those that follow, until the sleeper wakes by itself.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held inside `kick` and `close`, as only a signal handler can find
        self._kicked = False
        self._writer: socket.socket | None = None
        self.reader: socket.socket
        """The end to poll; there since `open`."""

    def open(self) -> None:
        """Make the descriptors; until then, and after `close`, a kick does nothing."""
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def kick(self, anyway: bool = False) -> None:
        """Wake the sleeper, unless that was done and it has not looked since; or anyway."""
        if self._kicked and not anyway:
            return
        self._kicked = True
        with self.lock, contextlib.suppress(OSError):  # closed, or full of wake-ups
            if self._writer is not None:
                self._writer.send(b"\0")

    def seen(self, readable: bool) -> None:
        """From now on a kick wakes again; to be called whenever the sleeper wakes, before it looks at anything.

        ``readable`` is whether ``poll`` found the reader so. If not, a kick may have been interrupted half-way.
        """
        if readable:
            with contextlib.suppress(OSError):
                self.reader.recv(64)
        # Only now: the byte of a kick that came in between would have been taken for that of the one before.
        self._kicked = False

    def close(self) -> None:
        with self.lock:
            self.disown()

    def disown(self) -> None:
        """Close a forked child's copies, which no other thread can be using, without the lock, which one may hold."""
        if self._writer is not None:
            self.reader.close()
            self._writer.close()
