"""What keeps state consistent when Ctrl-C or a signal handler strikes between two calls.

* ``with lock`` is safe on a plain ``Lock`` or ``RLock``. Both are C code, so no interrupt comes between acquiring the
  lock and entering the block.
* ``with`` always waits. If you acquire an ``RLock`` with a timeout, or without blocking, catch everything in the same
  function, and call ``lock.release()`` in the ``except`` block before anything else. Ignore the RuntimeError that it
  raises if you do not hold the lock. Only the lock knows: an interrupt can strike before you store what ``acquire``
  returned.
* Do not move that release into a helper. A second interrupt can strike where a Python function begins.
* An interrupt after a system call loses its result. `call_and_append` makes the call and keeps the result in one step.
* A signal handler may call the code that it interrupted, and an ``RLock`` would let it in. So ask
  `owned_by_this_thread` before you acquire one.
"""

from __future__ import annotations

import operator
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

owned_by_this_thread: Callable[[threading.RLock], bool] = operator.methodcaller("_is_owned")
"""Whether the calling thread holds this ``RLock``."""


def call_and_append(log: deque[Any], call: Callable[..., Any], *args: tuple[Any]) -> None:
    """Call ``call`` and append its result to ``log``, all in C code that no interrupt can divide.

    Args:
        log: receives the result. If the call raises, nothing is appended.
        call: a function in C, such as ``sock.send``.
        args: each argument of ``call``, in a tuple of its own.
    """
    # `map` and `extend` run in C and check for no signals. `map` takes one item of each tuple, so it calls once.
    log.extend(map(call, *args))
