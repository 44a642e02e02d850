"""Checks of numeric arguments, so that all errors use the same words."""

from __future__ import annotations

import operator


def check_timeout(name: str, timeout: float | None) -> float | None:
    """Return ``timeout`` if it is None or a number of seconds that is not negative.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative or not a number of seconds (NaN).
    """
    return None if timeout is None else check_seconds(name, timeout, " or None for no limit")


def check_seconds(name: str, seconds: float, otherwise: str = "") -> float:
    """Return ``seconds`` if it is a number that is not negative.

    Args:
        name: the argument's name, for messages.
        seconds: the value; infinity is allowed.
        otherwise: ends the messages, to name what else would be accepted.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative or NaN.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name}: got {seconds!r}, expected seconds as a number{otherwise}")
    # Not ``seconds < 0``, which is false for NaN.
    if not seconds >= 0:
        raise ValueError(f"{name}: got {seconds!r}, expected seconds >= 0{otherwise}")
    return seconds


def check_count(name: str, count: int, *, least: int) -> int:
    """Return ``count`` as an int if it is a whole number, of Python or NumPy, and at least ``least``.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is less than ``least``.
    """
    try:
        number = operator.index(count)
    except TypeError:
        number = None
    if number is None or isinstance(count, bool):
        raise TypeError(f"{name}: got {count!r}, expected a whole number")
    if number < least:
        raise ValueError(f"{name}: got {count!r}, expected at least {least}")
    return number
