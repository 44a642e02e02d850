"""What an `EchoSink` has in one process: the connection, the counts, and the watermark."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from . import lifetime
from .checks import check_count, check_seconds
from .children import Children
from .deadline import Deadline, bounded_wait
from .errors import ConnectionClosedError
from .locks import is_mine
from .marks import Marks
from .meter import DEVICE, LEARNER, NETWORK, NOTHING, Times, quantile
from .report import CHILD_CLOSE_S, Report, parent_of
from .routes import Route
from .stats import COUNTED, Counts, SinkStats
from .watermark import Watermark

_log = logging.getLogger(__name__)

# Those that go on from another run.
_LASTING = [name for name in COUNTED if name != "in_flight"]
# Seconds of which rates are, at the most; and between two verdicts in the log, at the least.
RATE_S = 10.0
RATES = 8
VERDICT_S = 30.0
# A warning says so if `send` was blocked for more than this share of the time.
TOO_MUCH = 1 / 3


class Session:
    """One process's own; never used by another.

    Args:
        peer: how messages name the learner.
        payload_size: bytes of one sample.
        token: the sink's, by which parents and children find each other.
        origin: the process that made the sink.
        at_risk: how many samples that a server acked it may discard if a connection breaks off.
        stall_timeout: seconds without any ack of a child after which `close` gives up.
    """

    def __init__(
        self, peer: str, payload_size: int, token: str, origin: int, at_risk: int, stall_timeout: float | None
    ) -> None:
        self.peer = peer
        self.route: Route | None = None
        self.closed = False
        self.told = False
        """Whether it was logged how the first batch was read."""
        self.gone = False
        """Whether the learner is, and that was logged; with ``on_error="warn"``."""
        self.watermark = Watermark()
        self.children = Children.of(peer, token, at_risk)
        self._token = token
        self._origin = origin
        self._marks = Marks(token, origin)
        self._stall_timeout = stall_timeout
        self._report: Report | None = None
        self._lock = threading.RLock()
        self._payload_size = payload_size
        self.dropped = 0
        self.check_seconds = 0.0
        self._began = self._verdict_at = time.monotonic()
        self._moments = deque([(self._began, 0, 0)], maxlen=RATES)
        self._at_verdict = SinkStats(0, 0, 0, 0, 0, 0, 0.0)
        self._before: dict[str, Any] = dict.fromkeys(_LASTING, 0)  # what was counted before, in another process or run
        lifetime.tell(self)

    @property
    def unacked(self) -> int:
        return 0 if self.route is None else self.route.counts().unacked

    def connected(self, open: Callable[[float | None], Route], timeout: float | None) -> Route:
        """The open route, connecting first by ``open(timeout)`` if there is none."""
        route = self.route
        if route is None and not self.closed:
            route = self._connect_once(open, Deadline(timeout))
        if route is None or self.closed:
            raise self.ended("this sink was closed")
        return route

    def accepted(self, watermark: Watermark, step: int, route: Route) -> None:
        """Note that ``route`` took all of ``step``; in the watermark in which it began, if another was loaded since."""
        sent, acked = route.progress()
        watermark.sent(step, sent, acked)
        self.tell_sent()

    def tell_sent(self) -> None:
        """Let the parent know how much was sent, if there is one, before it can wait for it."""
        report, route = self._report, self.route
        if report is not None and route is not None:
            report.sent(route.progress()[0])

    def close(self, timeout: float | None) -> None:
        """End the connection, and have the children end theirs, at the same time; raises what came of it."""
        self.closed = True  # whoever is connecting just now will see it
        deadline = Deadline(timeout)
        problems = []
        self._marks.close()
        self.children.ask()
        for step in (functools.partial(self._close_route, timeout), functools.partial(self._await_children, deadline)):
            try:
                step()
            except Exception as error:
                problems.append(error)
        if self._report is not None:
            self._report.over(problems[0] if problems else None)
        self.children.forget()
        for other in problems[1:]:
            _log.warning("%s", other)
        if problems:
            raise problems[0]

    def _close_route(self, timeout: float | None) -> None:
        if self.route is not None:
            self.route.close(timeout)

    def _await_children(self, deadline: Deadline) -> None:
        self.children.finish(deadline.within(self._stall_timeout))
        self.children.wait(deadline, self._stall_timeout)

    def prepare_end(self) -> None:
        """At the end of the process: what children have is delivered. Its own is seen to by others."""
        self.children.ask()

    def end(self) -> None:
        """After that: wait for it."""
        self._await_children(Deadline(lifetime.FAREWELL_S))

    def finish(self) -> None:
        """As the parent asks."""
        try:
            self.close(CHILD_CLOSE_S)
        except Exception as error:
            _log.warning("%s", error)

    def ended(self, how: str) -> ConnectionClosedError:
        unacked = self.unacked
        error = ConnectionClosedError(f"{self.peer}: {how}; {unacked} samples un-acked")
        error.unacked = unacked
        return error

    def _ended_by_parent(self) -> ConnectionClosedError:
        self.closed = True
        return self.ended("this sink was closed")

    def drop(self, rows: int, error: OSError | None = None) -> None:
        """Count samples as dropped; with the first ``error``, log why."""
        with self._lock:
            self._begin_report()
            self.dropped += rows
            if error is None or self.gone:
                return
            self.gone = True
        self._marks.tell_gone(True)
        _log.warning("the learner is gone; samples are dropped from now on (on_error='warn'): %s", error)

    def _connect_once(self, open: Callable[[float | None], Route], deadline: Deadline) -> Route | None:
        """Connect, unless another thread did meanwhile or the sink was closed."""
        lock = self._lock
        if is_mine(lock):
            raise RuntimeError("called by a signal handler or finaliser that interrupted connecting in the same thread")
        try:
            if not lock.acquire(timeout=bounded_wait(deadline.remaining())):
                raise TimeoutError(f"{self.peer}: another thread is still connecting after {deadline.timeout:g} s")
            if self.route is None and not self.closed:
                if self._marks.closed:
                    raise self._ended_by_parent()
                route = open(self._marks.patience(None if deadline.timeout is None else deadline.remaining()))
                try:
                    self._begin_report()
                except BaseException:
                    route.close(0)
                    raise
                if self._report is not None:
                    self._report.route = route
                self.route = route
                self._marks.tell_gone(False)
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

    def _begin_report(self) -> None:
        """In a child, unless it was begun before."""
        parent = parent_of(self._origin)
        if parent is None or self._report is not None:
            return
        try:
            report = Report(self._token, parent, self)
        except ConnectionClosedError:
            raise self._ended_by_parent() from None
        except OSError as error:
            me = f"process {os.getpid()}"
            raise RuntimeError(f"{self.peer}: {me} cannot tell process {parent} what it sends: {error}") from error
        try:
            report.start()
        except BaseException:
            report.over()
            raise
        self._report = report

    # What is told, and saved.

    def stats(self) -> SinkStats:
        counted = self._with_children()
        total = {name: getattr(counted, name) + self._before[name] for name in _LASTING}
        return dataclasses.replace(counted, **total, **self._rates(counted))

    def _rates(self, counted: SinkStats) -> dict[str, Any]:
        """Samples per second since the moment, of those that are kept, that is ``RATE_S`` ago at the most."""
        now, kept = time.monotonic(), self._moments
        while len(kept) > 1 and now - kept[0][0] > RATE_S:
            kept.popleft()
        began, sent, acked = kept[0]
        seconds = now - began
        if now - kept[-1][0] >= RATE_S / RATES:
            kept.append((now, counted.samples_sent, counted.samples_acked))
        if seconds <= 0:
            return {}
        return {
            "sent_per_second": (counted.samples_sent - sent) / seconds,
            "acked_per_second": (counted.samples_acked - acked) / seconds,
        }

    def give_verdict(self) -> None:
        """Log what holds things up, if that was not done for a while."""
        if time.monotonic() - self._verdict_at < VERDICT_S:
            return
        now = self.stats()
        lately = now.since(self._at_verdict)
        self._verdict_at, self._at_verdict = time.monotonic(), now
        level = logging.WARNING if lately.blocked_seconds > TOO_MUCH * lately.elapsed_seconds > 0 else logging.INFO
        _log.log(level, "%s: %s", self.peer, lately.bottleneck)

    def acked_through(self) -> int:
        if self.route is not None:
            self.route.counts()  # takes note of the acks that are there
        return self.watermark.through(0 if self.route is None else self.route.progress()[1])

    def state_dict(self) -> dict[str, Any]:
        through = self.acked_through()  # before the counts, which are at least as far by then
        stats = self.stats()
        return {"acked_through": through, **{name: getattr(stats, name) for name in COUNTED}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; nothing is changed if ``state`` is none."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state: got {state!r}, expected what state_dict() gives")
        loaded: dict[str, Any] = {}
        through = check_count("state['acked_through']", state.get("acked_through"), least=-1)  # type: ignore[arg-type]
        for name in COUNTED:
            check = check_seconds if name == "blocked_seconds" else _check_number
            loaded[name] = check(f"state[{name!r}]", state.get(name))  # type: ignore[arg-type]
        loaded["maybe_lost"] += loaded.pop("in_flight")
        counted = self._with_children()
        self._before = {name: loaded[name] - getattr(counted, name) for name in _LASTING}
        self.watermark = Watermark(through)

    def _with_children(self) -> SinkStats:
        counted, theirs = self._counted(), self.children.counts()
        sent, acked = counted.samples_sent + theirs["sent"], counted.samples_acked + theirs["acked"]
        return dataclasses.replace(
            counted,
            samples_sent=sent,
            bytes_sent=sent * self._payload_size,
            samples_acked=acked,
            bytes_acked=acked * self._payload_size,
            in_flight=counted.in_flight + theirs["sent"] - theirs["acked"],
            dropped=counted.dropped + theirs["dropped"],
            blocked_seconds=counted.blocked_seconds + theirs["blocked_us"] / 1e6,
            reconnects=counted.reconnects + theirs["reconnects"],
            resent=counted.resent + theirs["resent"],
            maybe_duplicated=counted.maybe_duplicated + theirs["maybe_duplicated"],
            maybe_lost=counted.maybe_lost + theirs["maybe_lost"],
        )

    def _counted(self) -> SinkStats:
        """Here, since the sink connected."""
        counts, times = (Counts(), Times()) if self.route is None else (self.route.counts(), self.route.times())
        acked, blocked = counts.sent - counts.unacked, sum(times.blocked)
        return SinkStats(
            samples_sent=counts.sent,
            bytes_sent=counts.sent * self._payload_size,
            samples_acked=acked,
            bytes_acked=acked * self._payload_size,
            in_flight=counts.unacked,
            dropped=self.dropped,
            blocked_seconds=blocked,
            reconnects=counts.reconnects,
            resent=counts.resent,
            maybe_duplicated=counts.maybe_duplicated,
            maybe_lost=counts.maybe_lost,
            elapsed_seconds=time.monotonic() - self._began,
            check_seconds=self.check_seconds,
            pack_seconds=max(0.0, times.sending - blocked),
            blocked_by_learner_seconds=times.blocked[LEARNER] + times.blocked[NOTHING],
            blocked_by_network_seconds=times.blocked[NETWORK],
            blocked_by_device_seconds=times.blocked[DEVICE],
            learner_seconds=times.waiting[LEARNER],
            network_seconds=times.waiting[NETWORK],
            device_seconds=times.waiting[DEVICE],
            ack_p50_seconds=quantile(times.latencies, 0.5),
            ack_p99_seconds=quantile(times.latencies, 0.99),
        )


def _check_number(name: str, number: int) -> int:
    return check_count(name, number, least=0)
