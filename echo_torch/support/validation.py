"""Arguments that are numbers: what they must be, in one place and in the same words."""

from __future__ import annotations

import operator


def check_timeout(name: str, timeout: float | None) -> float | None:
    """Give ``timeout`` back if it is ``None`` or a number of seconds that is not negative."""
    return None if timeout is None else check_seconds(name, timeout, " or None for no limit")


def check_seconds(name: str, seconds: float, otherwise: str = "") -> float:
    """Give ``seconds`` back if it is a number that is not negative."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name}: got {seconds!r}, expected seconds as a number{otherwise}")
    if not seconds >= 0:
        raise ValueError(f"{name}: got {seconds!r}, expected seconds >= 0{otherwise}")
    return seconds


def check_count(name: str, count: int, *, least: int) -> int:
    """Give ``count`` back as an int if it is a whole number, of Python or numpy, of at least ``least``."""
    try:
        number = operator.index(count)
    except TypeError:
        number = None
    if number is None or isinstance(count, bool):
        raise TypeError(f"{name}: got {count!r}, expected a whole number")
    if number < least:
        raise ValueError(f"{name}: got {count!r}, expected at least {least}")
    return number
