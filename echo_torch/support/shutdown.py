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
    """Something that has work to do before the process exits."""

    def begin_exit(self) -> None:
        """Start what takes time, without waiting for it. Called first, on all handlers."""

    def finish_exit(self, deadline: Deadline) -> None:
        """Wait for what `begin_exit` started."""


class Connection(ExitHandler, Protocol):
    """A connection, which must end by itself `DELIVER_AT_EXIT_S` after `begin_exit` at the latest."""

    def detach_after_fork(self) -> None:
        """In a forked child: close its copies of the descriptors, without taking a lock."""


# All connections whose threads run. Strong references: a connection must deliver even if its client is gone.
_open_connections: set[Connection] = set()
# Objects that use connections and have work to do before the connections end. This keeps none of them alive.
_exit_handlers: weakref.WeakSet[ExitHandler] = weakref.WeakSet()
# Pid of the multiprocessing child that registered our finalizer; 0 for none. A fork copies this variable, so compare it
# with the current pid.
_finalizer_pid = 0


def register_connection(connection: Connection) -> None:
    """Deliver ``connection`` at exit. Its thread calls this first, and `unregister_connection` last."""
    _open_connections.add(connection)


def unregister_connection(connection: Connection) -> None:
    _open_connections.discard(connection)


def register_exit_handler(handler: ExitHandler) -> None:
    """Call ``handler`` at exit. Holds only a weak reference, so this keeps no handler alive."""
    ensure_child_finalizer()
    _exit_handlers.add(handler)


def ensure_child_finalizer() -> None:
    """Make sure that a child of multiprocessing runs our steps at exit.

    Such a child ends without `atexit`, but it does run multiprocessing's own finalizers.
    """
    global _finalizer_pid
    if multiprocessing.parent_process() is not None and _finalizer_pid != os.getpid():
        _finalizer_pid = os.getpid()
        multiprocessing.util.Finalize(None, _on_exit, exitpriority=0)


def _on_exit() -> None:
    try:
        _run_all(list(_exit_handlers), Deadline(DELIVER_AT_EXIT_S))
    finally:
        # Do this after an interrupt, too: an interrupt ends the wait for a handler, but not the delivery of samples.
        _run_all(list(_open_connections), Deadline(DELIVER_AT_EXIT_S + _JOIN_GRACE_S))


def _run_all(handlers: Sequence[ExitHandler], deadline: Deadline) -> None:
    """Begin the exit of all handlers, then wait for each of them, even if some raise.

    Logs errors. An interrupt such as Ctrl-C ends only the step that it strikes, and is raised after the last step.
    """
    interrupt: BaseException | None = None
    steps: list[Callable[[], None]] = [handler.begin_exit for handler in handlers]
    for step in steps + [functools.partial(handler.finish_exit, deadline) for handler in handlers]:
        try:
            step()
        except Exception as error:
            _log.warning("error at process exit: %s", error)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _detach_all_after_fork() -> None:
    for connection in list(_open_connections):
        connection.detach_after_fork()
    _open_connections.clear()
    _exit_handlers.clear()


atexit.register(_on_exit)
os.register_at_fork(after_in_child=_detach_all_after_fork)
