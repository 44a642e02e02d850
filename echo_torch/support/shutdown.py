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
DELIVER_AT_EXIT_S = 5.0
# Seconds on top, for its thread to say so and be gone.
_JOIN_GRACE_S = 1.0


class ExitHandler(Protocol):
    """What uses connections, and has something to do before they end."""

    def begin_exit(self) -> None:
        """Called at the end of the process, for all of them: begin with what takes time, without waiting for it."""

    def finish_exit(self) -> None:
        """Called after that: wait for it."""


class ExitingConnection(Protocol):
    """A connection, as seen from here."""

    peer: str

    def deliver_at_exit(self) -> None:
        """Deliver what is there for at most `DELIVER_AT_EXIT_S`, and end, without being waited for."""

    def join(self, deadline: Deadline) -> bool:
        """Wait for the end; gives whether it came."""

    def detach_after_fork(self) -> None:
        """In a forked child: close its copies of the descriptors, which neither needs nor takes a lock."""


_open_connections: set[ExitingConnection] = set()
_exit_handlers: weakref.WeakSet[ExitHandler] = weakref.WeakSet()
_finalizer_pid = 0  # the process, a child of multiprocessing, in which a finaliser is set


def register_connection(connection: ExitingConnection) -> None:
    """To be called while a connection's thread runs, and undone by `unregister_connection`."""
    _open_connections.add(connection)


def unregister_connection(connection: ExitingConnection) -> None:
    _open_connections.discard(connection)


def register_exit_handler(handler: ExitHandler) -> None:
    """Have ``handler`` told of the end of this process, unless it is gone by then."""
    register_child_finalizer()
    _exit_handlers.add(handler)


def register_child_finalizer() -> None:
    """multiprocessing ends forked children without `atexit`, but not without its own finalisers."""
    global _finalizer_pid
    if multiprocessing.parent_process() is not None and _finalizer_pid != os.getpid():
        _finalizer_pid = os.getpid()
        multiprocessing.util.Finalize(None, _run_at_exit, exitpriority=0)


def _run_at_exit() -> None:
    handlers = list(_exit_handlers)
    try:
        _run_all([handler.begin_exit for handler in handlers] + [handler.finish_exit for handler in handlers])
    finally:
        deadline = Deadline(DELIVER_AT_EXIT_S + _JOIN_GRACE_S)
        connections = list(_open_connections)
        deliveries = [connection.deliver_at_exit for connection in connections]
        _run_all(deliveries + [functools.partial(_join_or_warn, connection, deadline) for connection in connections])


def _run_all(steps: Sequence[Callable[[], None]]) -> None:
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


def _join_or_warn(connection: ExitingConnection, deadline: Deadline) -> None:
    if not connection.join(deadline):
        _log.warning("%s: not ended within %g s", connection.peer, DELIVER_AT_EXIT_S + _JOIN_GRACE_S)


def _detach_all_after_fork() -> None:
    for connection in list(_open_connections):
        connection.detach_after_fork()
    _open_connections.clear()
    _exit_handlers.clear()


atexit.register(_run_at_exit)
os.register_at_fork(after_in_child=_detach_all_after_fork)
