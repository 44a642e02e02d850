"""Whether another process is alive, by the lock that it holds on a file, or by its pid.

A lock belongs to a process. The kernel drops it when the process ends, in whatever way. It also drops it when the
process closes any descriptor of the file. So if your own process holds a file's lock, never open that file again:
closing it would drop the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
from collections.abc import Callable
from pathlib import Path


def call_if_unlocked(path: Path, action: Callable[[], object]) -> bool:
    """Call ``action`` while holding the lock of a file; return False if another process holds it.

    Raises:
        OSError: the file is gone (``FileNotFoundError``), or cannot be opened or locked.
    """
    with io.FileIO(path, "r+") as file:
        free = try_lock(file.fileno())
        if free:
            action()
    return free


def try_lock(descriptor: int) -> bool:
    """Take the lock of a file without waiting; return False if another process holds it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN, EACCES
        return False
    return True


def has_ended(child: int) -> bool:
    """Whether process ``child`` has ended, even if its parent has not waited for it yet."""
    if hasattr(os, "waitid"):
        # A forkserver's child is not this process's child: the call raises, and the pid decides.
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return not is_alive(child)


def is_alive(pid: int) -> bool:
    """Whether a process with this pid exists. A zombie, whose parent has not waited for it yet, still exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, and belongs to another user
        return True
    return True
