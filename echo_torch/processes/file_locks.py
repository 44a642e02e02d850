"""Whether other processes live: as the locks tell that they hold on files, and the system.

A lock is of a process and goes with it, in whatever way that ends; and with any descriptor of the file that it closes.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
from collections.abc import Callable
from pathlib import Path


def call_if_unlocked(path: Path, action: Callable[[], object]) -> bool:
    """Call ``action`` if nobody else holds the lock of a file; gives whether nobody does."""
    with io.FileIO(path, "r+") as file:
        free = try_lock(file.fileno())
        if free:
            action()
    return free


def try_lock(descriptor: int) -> bool:
    """Gives whether nobody else holds the lock; raises OSError where there are none."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN, EACCES
        return False
    return True


def has_ended(child: int) -> bool:
    """Whether a process has, waited for by its parent or not yet."""
    if hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError):  # not of this one, which may be only the parent in name
            return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return not is_alive(child)


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
