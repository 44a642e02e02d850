"""The callers' half of a connection: packing rows, waiting for them, and what is raised when that fails.

* Callers pack in turns (`ring`), and park or lead until ``acked`` is far enough. What they share with the I/O thread
  is in `connection`.
* A signal handler, or a finaliser, that finds its own thread holding one of the locks is turned away with a
  RuntimeError: it can neither go on nor wait for itself.
* Every error names the peer and the counts.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Any, NoReturn

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError
from echo_torch.metrics.stats import Counts
from echo_torch.metrics.timing import Times
from echo_torch.ring.ring import Filler, Ring
from echo_torch.support.deadline import NEVER, Deadline

from .connection import Connection
from .io_thread import IoThread
from .reconnect import Reconnector
from .resend import ResendTail, UndeliveredRows

_log = logging.getLogger(__name__)

# Seconds after which a caller who waits looks for itself, since acks fewer than LOW_WATER_ACKS wake nobody.
WAITER_HEARTBEAT_S = 0.05
# Seconds for the thread of a connection that was lost for good to be gone: it has nothing left to do.
THREAD_EXIT_TIMEOUT_S = 1.0
# Seconds between two looks at a device's copy that was not to be.
SETTLE_POLL_S = 0.001


class Sender:
    """Delivers the rows of a ring over a socket that has shaken hands, and others if that is lost.

    Args:
        sock: connected, non-blocking; owned from now on.
        peer: how messages name the other side.
        ring: rows of the size that the server expects.
        window: most rows written and un-acked.
        stall_timeout: seconds without progress after which waiting calls raise; None for ever.
        resend_at_close: whether, as the last thing, the ring's ``replay`` last rows are written once more.
        linger: seconds to wait, as the last thing, when everything is acked.
        reconnector: opens other connections; None to end with the first.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        ring: Ring,
        window: int,
        *,
        stall_timeout: float | None = None,
        resend_at_close: bool = False,
        linger: float = 0.0,
        reconnector: Reconnector | None = None,
    ) -> None:
        self.peer = peer
        self.ring = ring
        self.stall_timeout = stall_timeout
        self._opened_at = time.monotonic()
        self._sending_seconds = 0.0
        self._blocked_seconds = [0.0, 0.0, 0.0, 0.0]
        self._pid = os.getpid()
        self._connection = Connection(sock, peer, ring, window, ResendTail(ring, resend_at_close), reconnector)
        self.io_thread = IoThread(self._connection, linger)

    @property
    def closed(self) -> bool:
        """Whether no more rows are accepted."""
        return self.ring.refuses_new_rows or self._connection.failure is not None or self._pid != os.getpid()

    def counts(self) -> Counts:
        """What became of the rows, as far as is known."""
        return self._connection.counts()

    def times(self) -> Times:
        """Where the time went, of callers and of the thread."""
        connection = self._connection
        until, waiting, latencies = (
            connection.ended_at or time.monotonic(),
            connection.waited_seconds,
            connection.pump.latencies.counts,
        )
        return Times(
            connected=until - self._opened_at if connection.sent else 0.0,
            sending=self._sending_seconds,
            blocked=tuple(self._blocked_seconds),  # type: ignore[arg-type]
            waiting=tuple(waiting),  # type: ignore[arg-type]
            latencies=tuple(latencies),
        )

    def progress(self) -> tuple[int, int]:
        """How many rows were accepted, and how many of them are acked as far as was noted."""
        sent = self._connection.sent
        return sent, min(self.ring.acked, sent)

    def check_caller(self, call: str) -> None:
        """Turn away whom this connection cannot serve: another process, or a signal handler inside a call of ours."""
        connection = self._connection
        if self._pid != os.getpid():
            raise ConnectionClosedError(
                f"{self.peer}: this connection belongs to process {self._pid}; open one in process {os.getpid()}"
            )
        if connection.is_reentrant_call:
            raise RuntimeError(
                f"{call}() was called by a signal handler or finaliser that interrupted a call to the same client in "
                "the same thread; raise an exception there (sys.exit) and flush outside"
            )

    def send_rows(self, rows: int, fill: Filler, deadline: Deadline) -> None:
        """Put ``rows`` rows into the ring, waiting for room; ``fill`` is called for each run of them that fits.

        Raises:
            ConnectionClosedError: closed, or the peer is gone.
            DeliveryTimeoutError: no room in time. Both carry ``rows_accepted``.
        """
        self.check_caller("send")
        began, done = time.monotonic(), 0
        self._connection.soft_limit.lift_if_empty()
        try:
            while done < rows:
                packed = self._pack(rows - done, fill, done)
                done += packed
                if not packed:
                    self._connection.write_or_wake()
                    self._wait_for_room(rows - done, deadline)
                    self._wait_for_interrupted_copy("send", deadline)
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            error.rows_accepted = done
            raise
        finally:
            # Not after each run: the thread would compete for memory, and for the GIL, with the copying of the next.
            self._connection.write_or_wake()
            self._sending_seconds += time.monotonic() - began

    def wait(self, deadline: Deadline) -> None:
        """Block until every row packed so far is acked.

        Raises:
            ConnectionClosedError: the connection ended before that.
            DeliveryTimeoutError: it took too long; delivery goes on.
        """
        self.check_caller("wait")
        self._wait_until_acked("wait", self.ring.packed, deadline)

    @property
    def free_rows(self) -> int:
        """How many rows there is room for at once."""
        ring = self.ring
        return max(0, ring.soft_limit - ring.reserved + ring.acked)

    @property
    def reconnecting(self) -> bool:
        """Whether it is lost, and tried to be opened again."""
        return self._connection.lost_error is not None and self._connection.failure is None

    @property
    def failure(self) -> ConnectionClosedError | None:
        """What ended it."""
        return self._connection.failure

    def undelivered(self) -> UndeliveredRows:
        """What the peer may not have, now that the connection has ended; waits for the thread to be gone."""
        self.io_thread.join(Deadline(THREAD_EXIT_TIMEOUT_S))
        ring, sent = self.ring, self._connection.sent
        ready = ring.ready  # before it is asked whether the copies were abandoned, which are all done by then
        return UndeliveredRows(
            ring, sent, min(sent, ready if ring.ready_when_abandoned is None else ring.ready_when_abandoned)
        )

    def refresh(self) -> None:
        """Take note of acks that have arrived, if that can be done at once."""
        if self._pid == os.getpid() and self._connection.failure is None:
            self._connection.pump_now()

    def abandon(self) -> None:
        """Leave it to the thread to deliver what is packed, and to end."""
        self.io_thread.deliver_at_exit()

    def close(self, deadline: Deadline) -> None:
        """Deliver what is packed, and the tail again, until the deadline; then end thread and socket.

        An interrupt leaves it to the thread to do so, as for a client that was dropped; as does a call on that thread.

        Raises:
            ConnectionClosedError: the connection is lost with rows un-acked, and no call has said so yet. If all were
                acked, and only the tail of them is at risk, that is logged.
            DeliveryTimeoutError: rows are un-acked at the deadline.
        """
        connection = self._connection
        if self._pid != os.getpid():
            self.io_thread.detach_after_fork()
            return
        if self.io_thread.is_current:
            self.io_thread.deliver_at_exit()
            return
        self.check_caller("close")
        already_reported = connection.failure_reported
        try:
            connection.stop_accepting()
            self._deliver_all(deadline)
        except ConnectionClosedError as error:
            self.io_thread.stop()
            if connection.unacked and not already_reported:
                raise
            if connection.at_risk and connection.failure_will_be_reported and not already_reported:
                _log.warning("%s", error)
        except DeliveryTimeoutError:
            self.io_thread.stop()
            raise
        except BaseException:
            self.io_thread.deliver_at_exit()
            raise
        else:
            self.io_thread.stop()
        finally:
            self.ring.free_buffer()

    def _deliver_all(self, deadline: Deadline) -> None:
        """Wait for all rows to be acked, then for the tail of them."""
        tail = self._connection.resend_tail
        self._check_open("close")
        self._wait_until_acked("close", self._connection.sent, deadline)
        while left := self._connection.pack_tail():
            self._check_open("close")
            self._connection.write_or_wake()
            self._wait_until_acked("close", self._threshold_for_room(left), deadline)
            self._wait_for_interrupted_copy("close", deadline)
        self._connection.write_or_wake()
        self._wait_until_acked("close", tail.end_row, deadline)
        self.io_thread.linger(deadline)

    # Packing.

    def _pack(self, want: int, fill: Filler, first: int) -> int:
        """Fill and count as many rows as are free in one run; gives how many."""
        with self.ring.packing_lock:
            slot, rows = self.ring.next_free_run(want)
            if rows:
                self._check_open("send")
                if self.ring.uncommitted_copy is not None and not self._interrupted_copy_is_done():
                    return 0
                if not self.ring.commit(rows, copy=fill(slot, first, rows)):
                    self._check_open("send")
            return rows

    def move_rows(self, buffer: memoryview, staged: Any) -> None:
        """Have the rows in other memory of the same size, for rows that a device copies."""
        connection = self._connection
        with self.ring.packing_lock, connection.io_lock:
            self.ring.move_to(buffer, staged)
        connection.soft_limit.disable()

    def _wait_for_room(self, rows: int, deadline: Deadline) -> None:
        """Wait for room, at most for as many rows."""
        ring, soft_limit = self.ring, self._connection.soft_limit
        threshold = self._threshold_for_room(rows)
        began, acked, bottleneck = time.monotonic(), ring.acked, self._connection.bottleneck
        try:
            soft_deadline = soft_limit.deadline_for(threshold)
            if soft_deadline is None:
                self._wait_until_acked("send", threshold, deadline)
            else:  # and then, if that was not enough, for room in all of the ring, of which there may be some
                self._wait_until_acked(
                    "send", threshold, NEVER, min(soft_deadline, deadline, key=lambda moment: moment.at)
                )
        finally:
            self._blocked_seconds[bottleneck] += time.monotonic() - began
        soft_limit.update_after_wait(threshold, acked, began)

    def _wait_for_interrupted_copy(self, call: str, deadline: Deadline) -> None:
        """Wait for a copy that an interrupt has left under way: rarely, and not for long."""
        stall_deadline = Deadline(self.stall_timeout)
        while self.ring.uncommitted_copy is not None:
            with self.ring.packing_lock:
                if self._interrupted_copy_is_done():
                    return
            self._check_open(call)
            if deadline.expired or stall_deadline.expired:
                self._raise_timeout(call, deadline)
            time.sleep(SETTLE_POLL_S)

    def _interrupted_copy_is_done(self) -> bool:
        """As the ring says; a copy that fails ends the connection."""
        try:
            return self.ring.clear_uncommitted_copy()
        except RuntimeError as error:
            self._connection.fail_on_copy_error(error)
            return False

    def _threshold_for_room(self, rows: int) -> int:
        """The value of ``acked`` at which ``rows`` rows are free, or a good part of the ring.

        A wake-up for every row would cost more than the rows.
        """
        ring = self.ring
        return ring.acked_needed_for(min(rows, max(1, ring.soft_limit // 4)))

    # Waiting.

    def _wait_until_acked(self, call: str, threshold: int, deadline: Deadline, until: Deadline | None = None) -> None:
        """Park until ``acked`` reaches ``threshold``; with ``until``, at the most so long, and without timing out."""
        ring, connection = self.ring, self._connection
        while ring.acked < threshold and not (until and until.expired):
            waiter = ring.add_waiter(threshold)
            try:
                connection.pump_now()
                if ring.acked >= threshold:
                    break
                self._check_open(call)
                if deadline.expired or self._seconds_until_stall() <= 0:
                    connection.read_acks()
                    if ring.acked >= threshold:
                        break
                    self._check_open(call)
                    if deadline.expired or self._seconds_until_stall() <= 0:
                        if until:
                            break
                        self._raise_timeout(call, deadline)
                if self.io_thread.is_current:
                    raise RuntimeError(f"{call}() by a logging handler, or finaliser, on the thread that it waits for")
                pause = min(deadline.remaining(), self._seconds_until_stall(), WAITER_HEARTBEAT_S)
                pause = min(pause, until.remaining()) if until else pause
                if not connection.poll_for_acks(waiter, pause):
                    waiter.wait(pause)
            finally:
                ring.remove_waiter(waiter)
        ring.wake_one()

    def _seconds_until_stall(self) -> float:
        """Seconds until nothing will have been acked for ``stall_timeout``."""
        return float("inf") if self.stall_timeout is None else self._connection.seconds_until_stall(self.stall_timeout)

    # What callers are told.

    def _check_open(self, call: str) -> None:
        failure = self._connection.failure
        if failure is not None:
            self._connection.failure_reported = True
            raise self._with_unacked(
                type(failure)(f"{failure}; {call}() with {self._connection.describe_unacked()}")
            ) from failure
        if self.ring.refuses_new_rows and call == "send":
            what = f"{self.peer}: send() on a client that was closed; {self._connection.describe_unacked()}"
            raise self._with_unacked(ConnectionClosedError(what))

    def _raise_timeout(self, call: str, deadline: Deadline) -> NoReturn:
        if deadline.expired:
            what = f"{call}() not done within {deadline.timeout:g} s"
        else:
            what = f"nothing was acked for {self.stall_timeout:g} s (stall_timeout)"
        connection = self._connection
        text = f"{self.peer}: {what}; {connection.describe_unacked()}"
        if call == "close":
            connection.failure_reported = True
            raise self._with_unacked(
                (DeliveryTimeoutError if connection.lost_error is None else ConnectionClosedError)(text)
            )
        raise self._with_unacked(DeliveryTimeoutError(f"{text}; delivery goes on"))

    def _with_unacked(self, error: Any) -> Any:
        error.unacked = self._connection.unacked
        return error
