"""What happens to open connections when their process exits or forks.

* At exit, all connections deliver at the same time, each on its own thread, for `DELIVER_AT_EXIT_S`. Exit handlers run
  before that, because they use connections.
* A forked child closes its copies of the descriptors before any other code runs there. Otherwise a connection would
  stay open until the child ends, too.
* Nothing here takes a lock. This code also runs in finalizers, which may interrupt the holder of a lock, and in forked
  children, where nobody releases what another thread of the parent held.
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

# Seconds that a connection has to deliver what is un-acked, after its client was garbage collected or at exit.
DELIVER_AT_EXIT_S = 5.0
# Seconds more for its thread to log the outcome and end.
_JOIN_GRACE_S = 1.0


class ExitHandler(Protocol):
    """Something that uses connections and has work to do before they end."""

    def begin_exit(self) -> None:
        """Start what takes time, without waiting for it. Called first, on all handlers."""

    def finish_exit(self) -> None:
        """Wait for what `begin_exit` started."""


class ExitingConnection(Protocol):
    """What this module needs of a connection."""

    # The peer's name, for messages.
    peer: str

    def deliver_and_end(self) -> None:
        """Start to deliver what is un-acked, and to end after `DELIVER_AT_EXIT_S` at the latest. Does not block."""

    def join(self, deadline: Deadline) -> bool:
        """Block until the connection has ended; return whether it did before the deadline."""

    def detach_after_fork(self) -> None:
        """In a forked child: close its copies of the descriptors, without taking a lock."""


# All connections whose threads run. Strong references: a connection must deliver even if its client is gone.
_open_connections: set[ExitingConnection] = set()
# All handlers that still exist.
_exit_handlers: weakref.WeakSet[ExitHandler] = weakref.WeakSet()
# The multiprocessing child that has our finalizer. Compared with the current pid, because a fork copies the variable.
_finalizer_pid = 0


def register_connection(connection: ExitingConnection) -> None:
    """Deliver ``connection`` at exit. Its thread calls this first, and `unregister_connection` last."""
    _open_connections.add(connection)


def unregister_connection(connection: ExitingConnection) -> None:
    _open_connections.discard(connection)


def register_exit_handler(handler: ExitHandler) -> None:
    """Call ``handler`` at exit. Holds only a weak reference, so this keeps no handler alive."""
    register_child_finalizer()
    _exit_handlers.add(handler)


def register_child_finalizer() -> None:
    """Make sure that a child of multiprocessing runs our steps at exit.

    Such a child ends without `atexit`, but it does run multiprocessing's own finalizers.
    """
    global _finalizer_pid
    if multiprocessing.parent_process() is not None and _finalizer_pid != os.getpid():
        _finalizer_pid = os.getpid()
        multiprocessing.util.Finalize(None, _run_at_exit, exitpriority=0)


def _run_at_exit() -> None:
    handlers = list(_exit_handlers)
    try:
        # All begin before the first is waited for, so their waits overlap.
        _run_all([handler.begin_exit for handler in handlers] + [handler.finish_exit for handler in handlers])
    finally:
        # Also after an interrupt: it ends the wait for a handler, not the delivery of samples.
        deadline = Deadline(DELIVER_AT_EXIT_S + _JOIN_GRACE_S)
        connections = list(_open_connections)
        deliveries = [connection.deliver_and_end for connection in connections]
        _run_all(deliveries + [functools.partial(_join_or_warn, connection, deadline) for connection in connections])


def _run_all(steps: Sequence[Callable[[], None]]) -> None:
    """Run all steps, even if some raise.

    Logs errors. An interrupt such as Ctrl-C ends only the step that it strikes, and is raised after the last step.
    """
    interrupt: BaseException | None = None
    for step in steps:
        try:
            step()
        except Exception as error:
            _log.warning("error at process exit: %s", error)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _join_or_warn(connection: ExitingConnection, deadline: Deadline) -> None:
    if not connection.join(deadline):
        _log.warning("%s: the connection has not ended within %g s", connection.peer, DELIVER_AT_EXIT_S + _JOIN_GRACE_S)


def _detach_all_after_fork() -> None:
    for connection in list(_open_connections):
        connection.detach_after_fork()
    _open_connections.clear()
    _exit_handlers.clear()


atexit.register(_run_at_exit)
os.register_at_fork(after_in_child=_detach_all_after_fork)
