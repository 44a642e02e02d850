"""`Session`: a sink's state in one process, and every step of its life: connect, send, wait, close, exit.

* Connecting happens once, under the session's lock. Everything else reads ``route`` without it.
* ``closed`` is set before anything is closed. A thread that is still connecting sees it and closes its new connection.
* Only this module knows ``on_error`` and ``on_learner_gone``: it decides between raising the loss of a learner and
  logging it.
* In a child, the reporter starts before the first sample is sent, so the parent's ``wait`` knows of every sample.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError, LearnerGoneError, raise_first
from echo_torch.metrics.stats import SinkStats
from echo_torch.processes.child import CHILD_CLOSE_S, FlagFiles, Reporter, find_parent_pid
from echo_torch.processes.parent import ChildProcesses
from echo_torch.routing.connector import Connector
from echo_torch.routing.route import NOT_CONNECTED, Route
from echo_torch.samples.spec import Match, SampleSpec
from echo_torch.support import shutdown
from echo_torch.support.deadline import Deadline, as_deadline, clamp_timeout
from echo_torch.support.interrupts import owned_by_this_thread
from echo_torch.support.validation import check_count

from .totals import Totals
from .watermark import Watermark

_log = logging.getLogger(__name__)

# With ``on_error="warn"``: seconds after which a `send` that waits for room checks whether the connection is lost.
LOSS_CHECK_S = 0.25


class _StillConnectingError(TimeoutError):
    """Time is up, and another thread is still connecting."""


class Session:
    """The connection, children, watermark and totals of one sink in one process; no other process uses it.

    Args:
        connector: opens the connections.
        spec: what a sample is.
        token: names the ledger's folder, where parents and children find each other.
        origin: pid of the process that made the sink.
        raise_on_loss: True to raise when the learner is lost; False to log it, and drop all later samples.
    """

    def __init__(self, connector: Connector, spec: SampleSpec, token: str, origin: int, raise_on_loss: bool) -> None:
        # All learners' names, for messages.
        self.peer = peer = ", ".join(connector.learner_names)
        # The connection, or connections to several learners; NOT_CONNECTED until the first use.
        self.route: Route = NOT_CONNECTED
        # Whether `close` was called, here or in the parent.
        self.closed = False
        # Opens the connections.
        self._connector = connector
        # What a sample is.
        self._spec = spec
        # Whether `send` has logged how it read the first batch.
        self._first_batch_logged = False
        # Whether the learner is lost and `count_dropped` has logged that. Stays False if `send` raises the loss.
        self._learner_gone = False
        # Whether `send` has logged that it drops batches for which there is no room.
        self._drop_logged = False
        # Samples dropped since the connection was lost, while it was being opened again.
        self._dropped_while_lost = 0
        # The highest step up to which everything is acked.
        self._watermark = Watermark()
        # The children that send for the same sink.
        self._children = ChildProcesses.get_or_create(peer, token, connector.acked_at_risk)
        # The counters of this process, its children and earlier runs.
        self.totals = Totals(connector.learner_names, spec.payload_size, self._children)
        # Names the ledger's folder.
        self._token = token
        # Pid of the process that made the sink.
        self._origin = origin
        # News from the parent and its other children: the sink is closed, the learner is gone.
        self._flag_files = FlagFiles(token, origin)
        # Whether the loss of the learner raises.
        self._raise_on_loss = raise_on_loss
        # Reports to the parent; None in a process without one, and before the first use.
        self._reporter: Reporter | None = None
        # Hold it to connect.
        self._lock = threading.RLock()
        # Hold it to start the reporter or to count dropped samples; never while connecting, which may take long.
        self._count_lock = threading.RLock()
        shutdown.register_exit_handler(self)

    def connect(self, deadline: Deadline) -> None:
        """Connect now if there is no connection yet.

        Raises:
            ConnectionClosedError: the sink was closed, or the connection was lost.
            OSError: as `Connector.open_route` raises it.
        """
        if self._get_route(deadline).closed:
            raise self._closed_error("the connection was lost")
        self._learner_gone = False

    def send(self, make_match: Callable[[], Match], step: int | None, timeout: float | None) -> None:
        """Check a batch and send it, after connecting if need be; raises as `EchoSink.send`.

        Args:
            make_match: checks the batch.
            step: the number of the batch; None for the next.
            timeout: most seconds to connect and to wait for room; None for no limit. They begin after the check.
        """
        # Keep this watermark to the end: `load_state_dict` may put another in its place.
        watermark = self._watermark
        # The lock is reentrant: without this check a signal handler would enter a half-changed watermark.
        if owned_by_this_thread(watermark.lock):
            raise RuntimeError("send() was called by a signal handler that interrupted send() in the same thread")
        if self._reporter is not None and self._reporter.entry_removed:
            raise self._cannot_report("its file was removed")
        # If the caller numbers its steps, begin this one before the check. A refused batch then holds the watermark
        # down.
        if step is not None:
            step = watermark.begin_step(step)
        began = time.monotonic()
        try:
            match = make_match()
            self.totals.check_seconds += time.monotonic() - began
            # Log how the first batch was read, so that you notice a batch that is taken for one sample.
            if not self._first_batch_logged:
                self._first_batch_logged = True
                what = f"{match.rows} samples" if match.batched else "one sample"
                _log.info("%s: the first batch is %s of %s", self.peer, what, self._spec.describe())
            # If the caller does not, number the batch only now. A refused batch then uses up no number.
            if step is None:
                step = watermark.begin_step(None)
            route = self._deliver(match, as_deadline(timeout))
        except BaseException:
            # Ctrl-C as well: part of the batch may be sent, so hold the watermark down and report what was accepted.
            if step is not None:
                watermark.fail_step(step)
            self._report_sent()
            raise
        if route is None:
            watermark.fail_step(step)
            return
        watermark.finish_step(step, *route.progress())
        self._report_sent()

    def _deliver(self, match: Match, deadline: Deadline) -> Route | None:
        """Send a batch; return the route that accepted it whole, or None if samples of it were dropped."""
        if self._learner_gone and not self.closed:
            self.count_dropped(match.rows)
            return None
        try:
            route = self._get_route(deadline)
        except OSError as error:  # refused, unreachable, no such name, timed out: anything that prevents a connection
            if self._must_raise(error) or self.closed:
                raise
            self.count_dropped(match.rows, error)
            return None
        done, options = 0, {"whole": True} if self._connector.drops_when_full else {}
        while True:
            # With ``on_error="warn"``, do not wait for room until a lost connection is open again. Check now and then
            # whether it is lost. Not with ``shards``: if the rows go to several learners, those left over are not
            # simply the last ones.
            attempt_deadline = deadline
            if not self._raise_on_loss and match.shards is None:
                attempt_deadline = deadline.within(0.0 if route.reconnecting else LOSS_CHECK_S)
            try:
                route.send_match(
                    match.slice_rows(done, match.rows) if done else match, timeout=attempt_deadline, **options
                )
                if self._dropped_while_lost:
                    _log.warning("%s: connected again; %d samples were dropped", self.peer, self._dropped_while_lost)
                    self._dropped_while_lost = 0
                return route
            except ConnectionClosedError as error:
                if self._must_raise(error) or self.closed:
                    raise
                self.count_dropped(match.rows - done - error.rows_accepted, error)
                return None
            except DeliveryTimeoutError as error:
                if options and not error.rows_accepted:
                    self._drop_for_room(match.rows, error)
                    return None
                done, options = done + error.rows_accepted, {}
                if not self._raise_on_loss and route.reconnecting:
                    self._drop_while_lost(match.rows - done)
                    return None
                if attempt_deadline is deadline or deadline.expired or not attempt_deadline.expired:
                    error.rows_accepted = done
                    raise

    def _must_raise(self, error: OSError) -> bool:
        """Whether to raise ``error``, rather than to log it and drop samples.

        Returns False with ``on_error="warn"``, and with ``on_learner_gone="stop"`` if the learner has finished.
        """
        # In a later epoch's worker, only the flag that an earlier worker left says that the learner has finished.
        finished = isinstance(error, LearnerGoneError) or self._flag_files.learner_gone
        return self._raise_on_loss and not (finished and self._connector.gone_after is not None)

    @property
    def learner_gone(self) -> bool:
        """Whether the learner is lost, and samples are dropped."""
        return self._learner_gone

    def _drop_for_room(self, rows: int, error: DeliveryTimeoutError) -> None:
        """With ``on_full="drop"``, drop a batch that finds no room: count it, and log the first one."""
        if not self._drop_logged:
            self._drop_logged = True
            text = "%s: no room, %d samples un-acked; batches that find no room are dropped (on_full='drop')"
            _log.warning(text, self.peer, error.unacked)
        self.count_dropped(rows)

    def _drop_while_lost(self, rows: int) -> None:
        """Drop samples that find no room while the connection is lost: count them, and log the first ones."""
        if not self._dropped_while_lost:
            what = "the connection is lost and the buffer is full: samples are dropped until it is open again"
            _log.warning("%s: %s (on_error='warn')", self.peer, what)
        self._dropped_while_lost += rows
        self.count_dropped(rows)

    def _report_sent(self) -> None:
        """Report the number of samples sent to the parent, if there is one.

        `send` calls it before it returns, so that a later `wait` in the parent includes these samples.
        """
        if self._reporter is not None:
            self._reporter.report_sent(self.route.progress()[0])

    def wait(self, deadline: Deadline) -> None:
        """Block until everything sent so far is acked, by children too; raises as `EchoSink.wait`."""
        try:
            self._wait(deadline)
        finally:
            self.totals.log_verdict(self.route)

    def _wait(self, deadline: Deadline) -> None:
        try:
            self.route.wait(deadline)
        except ConnectionError as error:
            if self._must_raise(error):
                raise
            self.count_dropped(0, error)
        try:
            self._children.wait(deadline, self._connector.stall_timeout)
        except ConnectionError as error:
            if self._must_raise(error):
                raise
            _log.log(logging.INFO if isinstance(error, LearnerGoneError) else logging.WARNING, "%s", str(error))

    def close(self, deadline: Deadline) -> None:
        """Close the connection while the daemonic children close theirs; raises as `EchoSink.close`."""
        try:
            self._close(deadline)
        except ConnectionError as error:
            if self._must_raise(error):
                raise
            self.count_dropped(0, error)

    def _close(self, deadline: Deadline) -> None:
        self.closed = True  # first: a thread that is connecting just now sees it, and closes its connection
        if self._connector.gone_after is not None and self.route.outage() is not None:
            self._flag_files.set_learner_gone(True)
        problems: list[Exception] = []
        steps: list[Callable[[], None]] = [
            # Set the flag before the request. It stops children that start after the request.
            self._children.set_closed,
            self._children.request_close,
            # The children close while this process does.
            functools.partial(self.route.close, deadline),
            functools.partial(self.finish_exit, deadline),
            self._children.count_and_remove_all,
        ]
        # Take every step, even if an earlier one fails.
        for step in steps:
            try:
                step()
            except Exception as error:
                problems.append(error)
        if self._reporter is not None:
            self._reporter.report_end(problems[0] if problems else None)
        raise_first(problems)

    def begin_exit(self) -> None:
        """Ask the children to deliver, because this process ends. The connection has an exit handler of its own."""
        self._children.request_close()

    def finish_exit(self, deadline: Deadline) -> None:
        """Wait for the children, which were asked to close."""
        self._children.wait_for_close(deadline.within(self._connector.stall_timeout))
        self._children.wait(deadline, self._connector.stall_timeout)

    def close_for_parent(self) -> None:
        """Close because the parent asks for it; logs what goes wrong, since nobody here can catch it."""
        try:
            self.close(Deadline(CHILD_CLOSE_S))
        except Exception as error:
            _log.warning("%s", str(error))

    def _closed_error(self, how: str) -> ConnectionClosedError:
        """Make the error for a call on a closed sink or connection; it names the number of un-acked samples."""
        unacked = self.route.counts().unacked
        error = ConnectionClosedError(f"{self.peer}: {how}; {unacked} samples un-acked")
        error.unacked = unacked
        return error

    def _mark_closed_by_parent(self) -> ConnectionClosedError:
        """Mark the sink as closed, because the parent has closed it, and return the error to raise."""
        self.closed = True
        return self._closed_error("this sink was closed")

    def count_dropped(self, rows: int, error: OSError | None = None) -> None:
        """Count ``rows`` samples as dropped, and log ``error``.

        An error also marks the learner as gone, with two exceptions: another thread is still connecting, or the route
        is still open, because another learner may have taken over.
        """
        if owned_by_this_thread(self._count_lock):
            what = (
                "called by a signal handler or finalizer that interrupted counting of the same sink in the same thread"
            )
            raise RuntimeError(what)
        with self._count_lock:
            self._start_reporter()
            self.totals.dropped += rows
            if error is None or self._learner_gone:
                return
            if not isinstance(error, _StillConnectingError):
                self._learner_gone = self.route.closed
        # Log the error as text. A log handler may keep its records, and the error itself would keep its frames and the
        # batch alive.
        if not self._learner_gone:
            _log.warning("%s", str(error))
            return
        self._flag_files.set_learner_gone(True)
        if self._connector.gone_after is not None and (self._raise_on_loss or isinstance(error, LearnerGoneError)):
            _log.info("%s; samples are dropped from now on (on_learner_gone='stop')", str(error))
            return
        _log.warning("the learner is gone; samples are dropped from now on (on_error='warn'): %s", str(error))

    def _get_route(self, deadline: Deadline) -> Route:
        """Return the route; open it under the lock if there is none yet. Raises as `connect`."""
        if self.route is NOT_CONNECTED and not self.closed:
            lock = self._lock
            # The locks are reentrant: without this check a signal handler would connect a second time.
            if owned_by_this_thread(lock) or owned_by_this_thread(self._count_lock):
                what = "called by a signal handler or finalizer that interrupted connecting in the same thread"
                raise RuntimeError(what)
            try:
                if not lock.acquire(timeout=clamp_timeout(deadline.remaining())):
                    what = f"{self.peer}: another thread is still connecting after {deadline.timeout:g} s"
                    raise _StillConnectingError(what)
                # Another thread may have connected meanwhile.
                if self.route is NOT_CONNECTED and not self.closed:
                    self._open_route(deadline)
                lock.release()
            except BaseException:
                # Only the lock knows whether it was acquired, and whether the line above released it. Release it
                # inline: an interrupt can strike at the beginning of any helper.
                try:  # noqa: SIM105
                    lock.release()
                except RuntimeError:
                    pass
                raise
            # `close` may have run while this thread was connecting, and found no route to close. If samples were sent
            # over the route, the sender saw it while the sink was still open. Then `close` ran later, and finds it.
            if self.closed and not self.route.progress()[0]:
                self.route.close(Deadline(0))
        if self.closed:
            raise self._closed_error("this sink was closed")
        return self.route

    def _open_route(self, deadline: Deadline) -> None:
        if self._flag_files.closed_by_parent:
            raise self._mark_closed_by_parent()
        route = self._connector.open_route(self._spec, self._flag_files.limit_connecting(deadline))
        # Start the reporter before `route` is set: otherwise another thread could send samples that the parent does not
        # learn of.
        try:
            self._start_reporter()
        except BaseException:
            route.close(Deadline(0))
            raise
        if self._reporter is not None:
            self._reporter.route = route
        self.route = route
        self._flag_files.set_learner_gone(False)

    def _start_reporter(self) -> None:
        """Start reporting to the parent, if this process has one and does not report yet."""
        parent = find_parent_pid(self._origin)
        if parent is None:
            return
        with self._count_lock:
            if self._reporter is not None:
                return
            try:
                reporter = Reporter(self._token, parent, self, len(self._connector.addresses))
            except ConnectionClosedError:
                raise self._mark_closed_by_parent() from None
            except OSError as error:
                raise self._cannot_report(str(error)) from error
            # An interrupt here must not leave the file open. The parent would think that this process still sends.
            try:
                reporter.start()
            except BaseException:
                reporter.report_end()
                raise
            self._reporter = reporter

    def _cannot_report(self, why: str) -> RuntimeError:
        me, parent = os.getpid(), find_parent_pid(self._origin)
        return RuntimeError(f"{self.peer}: process {me} cannot tell process {parent} what it sends: {why}")

    def prepare_for_children(self) -> None:
        """Make what children need to report to this process, because one may start now."""
        self._children.prepare()

    # Reading and saving the state.

    def stats(self) -> SinkStats:
        return self.totals.stats(self.route)

    def sent_by_children(self) -> int:
        return self._children.counts()["sent"]

    def acked_through(self) -> int:
        self.route.counts()  # reads the acks that have arrived
        return self._watermark.acked_through(self.route.progress()[1])

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
        self._watermark = Watermark(through)
