"""What becomes of open connections when their process ends or forks.

At the end, all of them deliver side by side, each on its own thread, for as long as they are given. In a forked child,
they close their copies of the descriptors before anything else happens there.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import multiprocessing.util
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from .deadline import Deadline

_log = logging.getLogger(__name__)

# Seconds that a connection may go on delivering after its client was dropped, or at interpreter exit.
FAREWELL_S = 5.0
# Seconds on top, for its thread to say so and be gone.
_GRACE_S = 1.0


class User(Protocol):
    """What uses connections, and has something to do before they end."""

    def prepare_end(self) -> None:
        """Called at the end of the process, for all of them: begin with what takes time, without waiting for it."""

    def end(self) -> None:
        """Called after that: wait for it."""


class Mortal(Protocol):
    """A connection, as seen from here."""

    peer: str

    def say_farewell(self) -> None:
        """Deliver what is there for at most `FAREWELL_S`, and end, without being waited for."""

    def join(self, deadline: Deadline) -> bool:
        """Wait for the end; gives whether it came."""

    def disown(self) -> None:
        """In a forked child: close its copies of the descriptors, which neither needs nor takes a lock."""


_living: set[Mortal] = set()
_users: weakref.WeakSet[User] = weakref.WeakSet()
_child = 0  # the process, a child of multiprocessing, in which a finaliser is set


def begin(connection: Mortal) -> None:
    """To be called while a connection's thread runs, and undone by `end`."""
    _living.add(connection)


def end(connection: Mortal) -> None:
    _living.discard(connection)


def tell(user: User) -> None:
    """Have ``user`` told of the end of this process, unless it is gone by then."""
    expect_end_of_child()
    _users.add(user)


def expect_end_of_child() -> None:
    """multiprocessing ends forked children without `atexit`, but not without its own finalisers."""
    global _child
    if multiprocessing.parent_process() is not None and _child != os.getpid():
        _child = os.getpid()
        multiprocessing.util.Finalize(None, _end_all, exitpriority=0)


def _end_all() -> None:
    users = list(_users)
    try:
        _each([user.prepare_end for user in users] + [user.end for user in users])
    finally:
        deadline = Deadline(FAREWELL_S + _GRACE_S)
        connections = list(_living)
        farewells = [connection.say_farewell for connection in connections]
        _each(farewells + [functools.partial(_await, connection, deadline) for connection in connections])


def _each(steps: Sequence[Callable[[], None]]) -> None:
    """Take all the steps; what interrupts one, such as Ctrl-C, breaks off that one, and is raised at the end."""
    interrupt: BaseException | None = None
    for step in steps:
        try:
            step()
        except Exception as error:
            _log.warning("at the end of the process: %s", error)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _await(connection: Mortal, deadline: Deadline) -> None:
    if not connection.join(deadline):
        _log.warning("%s: not ended within %g s", connection.peer, FAREWELL_S + _GRACE_S)


def _disown_all() -> None:
    for connection in list(_living):
        connection.disown()
    _living.clear()
    _users.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_disown_all)
