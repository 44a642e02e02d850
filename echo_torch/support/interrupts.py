"""What keeps state whole where Ctrl-C and signal handlers strike: whether this thread holds a lock, and `call_and_append`.

``with lock`` on a plain ``Lock`` or an ``RLock`` is safe by itself: both are C code, and no interrupt comes between
their acquiring and the block. These are for what ``with`` cannot do.

Whoever acquires such a lock with a limit releases it in an ``except`` block of the same function, calling
``lock.release()`` before anything else; only the lock knows whether it was acquired. A helper would not do: a second
interrupt can strike where a Python function begins.
"""

from __future__ import annotations

import operator
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

owned_by_this_thread: Callable[[threading.RLock], bool] = operator.methodcaller("_is_owned")
"""Whether the calling thread holds an ``RLock``."""


def call_and_append(log: deque[Any], call: Callable[..., Any], *args: tuple[Any]) -> None:
    """Make a system call and append what it gives to ``log``, in one piece of C code that no interrupt can divide.

    ``args`` holds each argument in a tuple of its own.
    """
    log.extend(map(call, *args))
