"""`Session`: a sink's state in one process, and every step of its life: connect, deliver, wait, close, exit.

* Connecting happens once, under the session's lock. Everything else reads ``route`` without it.
* ``closed`` is set before anything is closed. A thread that is still connecting sees it and closes its new connection.
* Only this module knows ``on_error="warn"``: it decides between raising the loss of a learner and logging it.
* In a child, the reporter starts before the first sample is sent, so the parent's ``wait`` knows of every sample.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from echo_torch.errors import ConnectionClosedError, raise_first
from echo_torch.metrics.stats import SinkStats
from echo_torch.processes.child import CHILD_CLOSE_S, FlagFiles, Reporter, find_parent_pid
from echo_torch.processes.parent import ChildProcesses
from echo_torch.routing.route import Route
from echo_torch.samples.spec import Match, SampleSpec
from echo_torch.support import shutdown
from echo_torch.support.deadline import Deadline, clamp_timeout
from echo_torch.support.interrupts import owned_by_this_thread
from echo_torch.support.validation import check_count

from .totals import Totals
from .watermark import Watermark

_log = logging.getLogger(__name__)


class _StillConnectingError(TimeoutError):
    """Time is up, and another thread is still connecting."""


class Session:
    """The connection, children, watermark and totals of one sink in one process; no other process uses it.

    Args:
        learner_names: the learners' names in messages.
        payload_size: bytes of one sample.
        token: names the ledger's folder, where parents and children find each other.
        origin: pid of the process that made the sink.
        acked_at_risk: how many acked samples a server may discard if a connection breaks off.
        stall_timeout: seconds without any ack of a child after which `wait` and `close` give up; None for never.
        raise_on_loss: True to raise when the learner is lost; False to log it, and drop all later samples.
    """

    def __init__(
        self,
        learner_names: Sequence[str],
        payload_size: int,
        token: str,
        origin: int,
        acked_at_risk: int,
        stall_timeout: float | None,
        raise_on_loss: bool,
    ) -> None:
        # All learners' names, for messages.
        self.peer = peer = ", ".join(learner_names)
        # How many learners there are.
        self._learner_count = len(learner_names)
        # The connection, or connections to several learners; None until the first use.
        self.route: Route | None = None
        # Whether `close` was called, here or in the parent.
        self.closed = False
        # Whether the log says how the first batch was read.
        self.first_batch_logged = False
        # Whether the learner is lost and the log says so; stays False if the loss is raised instead.
        self.learner_gone = False
        # The highest step up to which everything is acked.
        self.watermark = Watermark()
        # The children that send for the same sink.
        self.children = ChildProcesses.get_or_create(peer, token, acked_at_risk)
        # The counters of this process, its children and earlier runs.
        self.totals = Totals(learner_names, payload_size, self.children)
        # Names the ledger's folder.
        self._token = token
        # Pid of the process that made the sink.
        self._origin = origin
        # News from the parent and its other children: the sink is closed, the learner is gone.
        self._flag_files = FlagFiles(token, origin)
        # Seconds without any ack of a child after which `wait` gives up; None for never.
        self._stall_timeout = stall_timeout
        # Whether the loss of the learner raises.
        self._raise_on_loss = raise_on_loss
        # Reports to the parent; None in a process without one, and before the first use.
        self._reporter: Reporter | None = None
        # Hold it to connect.
        self._lock = threading.RLock()
        # Hold it to start the reporter or to count dropped samples; never while connecting, which may take long.
        self._count_lock = threading.RLock()
        shutdown.register_exit_handler(self)

    @property
    def unacked(self) -> int:
        return 0 if self.route is None else self.route.counts().unacked

    def connect(self, open_route: Callable[[float | None], Route], timeout: float | None) -> Route:
        """Return the route; if there is none yet, open it with ``open_route(timeout)``.

        Raises:
            ConnectionClosedError: the sink was closed.
            OSError: as ``open_route`` raises it.
        """
        route = self.route
        if route is None and not self.closed:
            route = self._connect_once(open_route, Deadline(timeout))
        if route is None or self.closed:
            raise self.closed_error("this sink was closed")
        return route

    def deliver(self, open_route: Callable[[float | None], Route], match: Match, timeout: float | None) -> Route | None:
        """Send a batch, after connecting if need be.

        Returns:
            The route that accepted the whole batch, or None if samples of it were dropped.
        """
        if self.learner_gone and not self.closed:
            self.drop(match.rows)
            return None
        try:
            route = self.connect(open_route, timeout)
        except OSError as error:  # refused, unreachable, no such name, timed out: anything that prevents a connection
            if self._raise_on_loss or self.closed:
                raise
            self.drop(match.rows, error)
            return None
        try:
            route.send(match, timeout)
            return route
        except ConnectionClosedError as error:
            if self._raise_on_loss or self.closed:
                raise
            self.drop(match.rows - error.rows_accepted, error)
            return None

    def log_first_batch(self, match: Match, spec: SampleSpec) -> None:
        """Log how the first batch was read, so that you notice a batch that is taken for one sample."""
        self.first_batch_logged = True
        what = f"{match.rows} samples" if match.batched else "one sample"
        _log.info("%s: the first batch is %s of %s", self.peer, what, spec.describe())

    def note_accepted(self, watermark: Watermark, step: int, route: Route) -> None:
        """Note that ``route`` accepted the whole batch of ``step``.

        ``watermark`` is the one in which the step began; `load_state_dict` may have put another in its place.
        """
        sent, acked = route.progress()
        watermark.finish_step(step, sent, acked)
        self.report_sent()

    def report_sent(self) -> None:
        """Report the number of samples sent to the parent, if there is one.

        `send` calls it before it returns, so that a later `wait` in the parent includes these samples.
        """
        reporter, route = self._reporter, self.route
        if reporter is not None and route is not None:
            reporter.report_sent(route.progress()[0])

    def wait(self, timeout: float | None) -> None:
        """Block until everything sent so far is acked, by children too; raises as `EchoSink.wait`."""
        try:
            self._wait(Deadline(timeout))
        finally:
            self.totals.log_verdict(self.route)

    def _wait(self, deadline: Deadline) -> None:
        try:
            if self.route is not None:
                self.route.wait(deadline.timeout)
        except ConnectionError as error:
            if self._raise_on_loss:
                raise
            self.drop(0, error)
        try:
            self.children.wait(deadline, self._stall_timeout)
        except ConnectionError as error:
            if self._raise_on_loss:
                raise
            _log.warning("%s", error)

    def close(self, timeout: float | None) -> None:
        """Close the connection while the daemonic children close theirs; raises as `EchoSink.close`."""
        try:
            self._close(timeout)
        except ConnectionError as error:
            if self._raise_on_loss:
                raise
            self.drop(0, error)

    def _close(self, timeout: float | None) -> None:
        self.closed = True  # first: a thread that is connecting just now sees it, and closes its connection
        deadline = Deadline(timeout)
        problems: list[Exception] = []
        # The flag before the request: it stops the children that start too late to be asked.
        self._flag_files.set_closed()
        self.children.request_close()
        # The children close while this process does. Take every step, even if an earlier one fails.
        for step in (functools.partial(self._close_route, timeout), functools.partial(self._close_children, deadline)):
            try:
                step()
            except Exception as error:
                problems.append(error)
        if self._reporter is not None:
            self._reporter.report_end(problems[0] if problems else None)
        self.children.count_and_remove_all()
        raise_first(problems)

    def _close_route(self, timeout: float | None) -> None:
        if self.route is not None:
            self.route.close(timeout)

    def _close_children(self, deadline: Deadline) -> None:
        self.children.wait_for_close(deadline.within(self._stall_timeout))
        self.children.wait(deadline, self._stall_timeout)

    def begin_exit(self) -> None:
        """Ask the children to deliver, because this process ends. Its own connection registers its own exit step."""
        self.children.request_close()

    def finish_exit(self, deadline: Deadline) -> None:
        """Wait for the children."""
        self._close_children(deadline)

    def close_for_parent(self) -> None:
        """Close because the parent asks for it; logs what goes wrong, since nobody here can catch it."""
        try:
            self.close(CHILD_CLOSE_S)
        except Exception as error:
            _log.warning("%s", error)

    def closed_error(self, how: str) -> ConnectionClosedError:
        """Make the error for a call on a closed sink or connection; it names the number of un-acked samples."""
        unacked = self.unacked
        error = ConnectionClosedError(f"{self.peer}: {how}; {unacked} samples un-acked")
        error.unacked = unacked
        return error

    def _close_by_parent(self) -> ConnectionClosedError:
        """Mark the sink as closed, because the parent has closed it, and return the error to raise."""
        self.closed = True
        return self.closed_error("this sink was closed")

    def drop(self, rows: int, error: OSError | None = None) -> None:
        """Count ``rows`` samples as dropped, and log ``error``.

        An error also marks the learner as gone, unless the route is still open, because another learner may have taken
        over, or another thread is still connecting.
        """
        with self._count_lock:
            self._start_reporter()
            self.totals.dropped += rows
            if error is None or self.learner_gone:
                return
            if not isinstance(error, _StillConnectingError):
                self.learner_gone = self.route is None or self.route.closed
        if not self.learner_gone:
            _log.warning("%s", error)
            return
        self._flag_files.set_learner_gone(True)
        _log.warning("the learner is gone; samples are dropped from now on (on_error='warn'): %s", error)

    def _connect_once(self, open_route: Callable[[float | None], Route], deadline: Deadline) -> Route | None:
        """Connect under the lock, unless another thread did so meanwhile or the sink was closed."""
        lock = self._lock
        # The lock is reentrant: without this check a signal handler would connect a second time.
        if owned_by_this_thread(lock):
            raise RuntimeError("called by a signal handler or finalizer that interrupted connecting in the same thread")
        try:
            if not lock.acquire(timeout=clamp_timeout(deadline.remaining())):
                raise _StillConnectingError(
                    f"{self.peer}: another thread is still connecting after {deadline.timeout:g} s"
                )
            if self.route is None and not self.closed:
                if self._flag_files.closed_by_parent:
                    raise self._close_by_parent()
                route = open_route(
                    self._flag_files.limit_connect_timeout(None if deadline.timeout is None else deadline.remaining())
                )
                # Start the reporter before `route` is set: otherwise another thread could send samples that the parent
                # does not learn of.
                try:
                    self._start_reporter()
                except BaseException:
                    route.close(0)
                    raise
                if self._reporter is not None:
                    self._reporter.route = route
                self.route = route
                self._flag_files.set_learner_gone(False)
            lock.release()
        except BaseException:
            # Only the lock knows whether it was acquired, and whether the line above released it. Release it inline: an
            # interrupt can strike at the beginning of any helper.
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
            raise
        # `close` may have run while this thread was connecting, and found no route to close.
        if self.closed and self.route is not None:
            self.route.close(0)
        return self.route

    def _start_reporter(self) -> None:
        """Start reporting to the parent, if this process has one and does not report yet."""
        parent = find_parent_pid(self._origin)
        if parent is None:
            return
        with self._count_lock:
            if self._reporter is not None:
                return
            try:
                reporter = Reporter(self._token, parent, self, self._learner_count)
            except ConnectionClosedError:
                raise self._close_by_parent() from None
            except OSError as error:
                me = f"process {os.getpid()}"
                raise RuntimeError(f"{self.peer}: {me} cannot tell process {parent} what it sends: {error}") from error
            # An interrupt here must not leave the file open: the parent would take this process for one that still
            # sends.
            try:
                reporter.start()
            except BaseException:
                reporter.report_end()
                raise
            self._reporter = reporter

    # Reading and saving the state.

    def stats(self) -> SinkStats:
        return self.totals.stats(self.route)

    def acked_through(self) -> int:
        if self.route is not None:
            self.route.counts()  # reads the acks that have arrived
        return self.watermark.acked_through(0 if self.route is None else self.route.progress()[1])

    def state_dict(self) -> dict[str, Any]:
        through = self.acked_through()  # first, so that the counts are never behind it
        return {"acked_through": through, **self.totals.state_dict(self.route)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; a state that is refused changes nothing."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state: got {state!r}, expected what state_dict() returns")
        # Check everything before the last line, which changes the watermark.
        through = check_count("state['acked_through']", state.get("acked_through"), least=-1)  # type: ignore[arg-type]
        self.totals.load_state_dict(state, self.route)
        self.watermark = Watermark(through)
