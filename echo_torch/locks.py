"""What an RLock knows that makes it safe where Ctrl-C and signal handlers strike: whether this thread holds it.

``with lock`` on a plain ``Lock`` or an ``RLock`` is safe by itself: both are C code, and no interrupt comes between
their acquiring and the block. These are for what ``with`` cannot do.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable

is_mine: Callable[[threading.RLock], bool] = operator.methodcaller("_is_owned")
"""Whether the calling thread holds an ``RLock``."""


def release_if_mine(lock: threading.RLock) -> None:
    """Release after an interrupt anywhere around ``acquire``, when only the lock knows whether it was acquired.

    Nothing that a second interrupt could strike comes before the release.
    """
    try:  # noqa: SIM105
        lock.release()
    except RuntimeError:
        pass
