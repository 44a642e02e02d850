"""How a system call's outcome is kept where Ctrl-C can strike."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any


def record(log: deque[Any], call: Callable[..., Any], *args: tuple[Any]) -> None:
    """Make a system call and append what it gives to ``log``, in one piece of C code that no interrupt can divide.

    ``args`` holds each argument in a tuple of its own.
    """
    log.extend(map(call, *args))
