"""What an `EchoSink` has in one process: the connection, what is delivered by it, and the watermark."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from echo_torch.errors import ConnectionClosedError, raise_first
from echo_torch.metrics.stats import SinkStats
from echo_torch.processes.child import CHILD_CLOSE_S, FlagFiles, Reporter, find_parent
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


class Session:
    """One process's own; never used by another.

    Args:
        learner_names: how messages name them.
        payload_size: bytes of one sample.
        token: the sink's, by which parents and children find each other.
        origin: the process that made the sink.
        acked_at_risk: how many samples that a server acked it may discard if a connection breaks off.
        stall_timeout: seconds without any ack of a child after which `wait` and `close` give up.
        raise_on_loss: whether the loss of the learner is an error, or logged, and what is sent after that is dropped.
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
        self.peer = peer = ", ".join(learner_names)
        self._learner_count = len(learner_names)
        self.route: Route | None = None
        self.closed = False
        self.first_batch_logged = False
        """Whether it was logged how the first batch was read."""
        self.learner_gone = False
        """Whether the learner is, and that was logged; unless it is an error."""
        self.watermark = Watermark()
        self.children = ChildProcesses.get_shared(peer, token, acked_at_risk)
        self.totals = Totals(learner_names, payload_size, self.children)
        self._token = token
        self._origin = origin
        self._flag_files = FlagFiles(token, origin)
        self._stall_timeout = stall_timeout
        self._raise_on_loss = raise_on_loss
        self._reporter: Reporter | None = None
        self._lock = threading.RLock()
        shutdown.register_exit_handler(self)

    @property
    def unacked(self) -> int:
        return 0 if self.route is None else self.route.counts().unacked

    def connect(self, open_route: Callable[[float | None], Route], timeout: float | None) -> Route:
        """The open route, connecting first by ``open_route(timeout)`` if there is none."""
        route = self.route
        if route is None and not self.closed:
            route = self._connect_once(open_route, Deadline(timeout))
        if route is None or self.closed:
            raise self.closed_error("this sink was closed")
        return route

    def deliver(self, open_route: Callable[[float | None], Route], match: Match, timeout: float | None) -> Route | None:
        """Send, connecting first as `connect`; gives the route that took all of it, None if it was dropped."""
        if self.learner_gone and not self.closed:
            self.drop(match.rows)
            return None
        try:
            route = self.connect(open_route, timeout)
        except OSError as error:  # refused, unreachable, unknown, too late: whatever keeps us from the learner
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
        """Log, for the first batch, what it was taken for."""
        self.first_batch_logged = True
        what = f"{match.rows} samples" if match.batched else "one sample"
        _log.info("%s: the first batch is %s of %s", self.peer, what, spec.describe())

    def note_accepted(self, watermark: Watermark, step: int, route: Route) -> None:
        """Note that ``route`` took all of ``step``; in the watermark in which it began, if another was loaded since."""
        sent, acked = route.progress()
        watermark.finish_step(step, sent, acked)
        self.report_sent()

    def report_sent(self) -> None:
        """Let the parent know how much was sent, if there is one, before it can wait for it."""
        reporter, route = self._reporter, self.route
        if reporter is not None and route is not None:
            reporter.report_sent(route.progress()[0])

    def wait(self, timeout: float | None) -> None:
        """Until everything sent so far is acked, by children too; as `EchoSink.wait`."""
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
        """End the connection, and have the children end theirs, at the same time; raises what came of it."""
        try:
            self._close(timeout)
        except ConnectionError as error:
            if self._raise_on_loss:
                raise
            self.drop(0, error)

    def _close(self, timeout: float | None) -> None:
        self.closed = True  # whoever is connecting just now will see it
        deadline = Deadline(timeout)
        problems: list[Exception] = []
        self._flag_files.set_closed()
        self.children.request_close()
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
        """At the end of the process: what children have is delivered. Its own is seen to by others."""
        self.children.request_close()

    def finish_exit(self) -> None:
        """After that: wait for it."""
        self._close_children(Deadline(shutdown.DELIVER_AT_EXIT_S))

    def close_for_parent(self) -> None:
        """As the parent asks."""
        try:
            self.close(CHILD_CLOSE_S)
        except Exception as error:
            _log.warning("%s", error)

    def closed_error(self, how: str) -> ConnectionClosedError:
        unacked = self.unacked
        error = ConnectionClosedError(f"{self.peer}: {how}; {unacked} samples un-acked")
        error.unacked = unacked
        return error

    def _close_by_parent(self) -> ConnectionClosedError:
        self.closed = True
        return self.closed_error("this sink was closed")

    def drop(self, rows: int, error: OSError | None = None) -> None:
        """Count samples as dropped, and log ``error``; the learner is gone then, unless another has taken its place."""
        with self._lock:
            self._start_reporter()
            self.totals.dropped += rows
            if error is None or self.learner_gone:
                return
            self.learner_gone = self.route is None or self.route.closed
        if not self.learner_gone:
            _log.warning("%s", error)
            return
        self._flag_files.set_learner_gone(True)
        _log.warning("the learner is gone; samples are dropped from now on (on_error='warn'): %s", error)

    def _connect_once(self, open_route: Callable[[float | None], Route], deadline: Deadline) -> Route | None:
        """Connect, unless another thread did meanwhile or the sink was closed."""
        lock = self._lock
        if owned_by_this_thread(lock):
            raise RuntimeError("called by a signal handler or finaliser that interrupted connecting in the same thread")
        try:
            if not lock.acquire(timeout=clamp_timeout(deadline.remaining())):
                raise TimeoutError(f"{self.peer}: another thread is still connecting after {deadline.timeout:g} s")
            if self.route is None and not self.closed:
                if self._flag_files.closed_by_parent:
                    raise self._close_by_parent()
                route = open_route(
                    self._flag_files.limit_connect_timeout(None if deadline.timeout is None else deadline.remaining())
                )
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
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
            raise
        if self.closed and self.route is not None:
            self.route.close(0)
        return self.route

    def _start_reporter(self) -> None:
        """In a child, unless it was begun before."""
        parent = find_parent(self._origin)
        if parent is None or self._reporter is not None:
            return
        try:
            reporter = Reporter(self._token, parent, self, self._learner_count)
        except ConnectionClosedError:
            raise self._close_by_parent() from None
        except OSError as error:
            me = f"process {os.getpid()}"
            raise RuntimeError(f"{self.peer}: {me} cannot tell process {parent} what it sends: {error}") from error
        try:
            reporter.start()
        except BaseException:
            reporter.report_end()
            raise
        self._reporter = reporter

    # What is told, and saved.

    def stats(self) -> SinkStats:
        return self.totals.stats(self.route)

    def acked_through(self) -> int:
        if self.route is not None:
            self.route.counts()  # takes note of the acks that are there
        return self.watermark.acked_through(0 if self.route is None else self.route.progress()[1])

    def state_dict(self) -> dict[str, Any]:
        through = self.acked_through()  # before the counts, which are at least as far by then
        return {"acked_through": through, **self.totals.state_dict(self.route)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; nothing is changed if ``state`` is none."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state: got {state!r}, expected what state_dict() gives")
        through = check_count("state['acked_through']", state.get("acked_through"), least=-1)  # type: ignore[arg-type]
        self.totals.load_state_dict(state, self.route)
        self.watermark = Watermark(through)
