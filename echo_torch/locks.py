"""What an RLock knows that makes it safe where Ctrl-C and signal handlers strike: whether this thread holds it.

``with lock`` on a plain ``Lock`` or an ``RLock`` is safe by itself: both are C code, and no interrupt comes between
their acquiring and the block. These are for what ``with`` cannot do.
"""

from __future__ import annotations

import threading
from typing import Any


def is_mine(lock: Any) -> bool:
    """Whether the calling thread holds ``lock``, an ``RLock``."""
    return bool(lock._is_owned())


def release_if_mine(lock: threading.RLock) -> None:
    """Release after an interrupt anywhere around ``acquire``, when only the lock knows whether it was acquired.

    Nothing that a second interrupt could strike comes before the release.
    """
    try:  # noqa: SIM105
        lock.release()
    except RuntimeError:
        pass
