"""The callers' half of a connection: packs rows, waits for room and for acks, and raises errors.

`connection` holds what callers share with the I/O thread.

* Callers pack one after the other (`echo_torch.ring.ring`). To wait, a caller blocks on a lock of its own, or polls the
  socket for acks on behalf of all, until ``acked`` is far enough.
* A signal handler or finalizer may interrupt a call that holds a lock in the same thread. Its own call would then wait
  for that lock forever, so it raises RuntimeError.
* Every error names the peer and the counts.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import socket
import time
from typing import Any, NoReturn

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError
from echo_torch.metrics.stats import Counts, Outage, PeerCounts
from echo_torch.metrics.timing import Times
from echo_torch.ring.ring import Filler, Ring
from echo_torch.support.deadline import NEVER, Deadline, Timeout, as_deadline

from .connection import Connection
from .io_thread import IoThread
from .reconnect import Reconnector
from .resend import ClosingTail, UndeliveredRows

_log = logging.getLogger(__name__)

# Seconds that `close` waits for acks by default. A learner that drains at all needs far less.
CLOSE_TIMEOUT_S = 5.0
# Seconds after which a waiting caller looks for acks itself. Fewer than `pump.LOW_WATER_ACKS` acks wake nobody.
WAITER_HEARTBEAT_S = 0.05
# Seconds that a waiting caller waits for another thread's pump, which writes a megabyte at most.
IO_LOCK_TIMEOUT_S = 0.005
# Seconds to wait for the I/O thread to end after a connection failed. The thread has nothing left to do then.
THREAD_EXIT_TIMEOUT_S = 1.0
# Seconds between two checks whether an interrupted caller's device copy is done.
SETTLE_POLL_S = 0.001


class CloseDefault(enum.Enum):
    """What `TcpClient.close` does without a timeout."""

    LOG = "5 s, then log what is un-acked"


class Sender:
    """Delivers the rows of a ring over a socket, and over a new one after each loss. The base of `TcpClient`.

    Args:
        sock: connected and non-blocking, after the handshake. The sender owns it from now on.
        peer: the other side's name in messages.
        ring: rows of the size that the server expects.
        window: upper limit for rows that are written and not acked.
        stall_timeout: seconds without progress after which waiting calls raise; None to wait without limit.
        resend_at_close: whether `close` writes the last ``ring.keep_acked`` rows once more.
        linger: seconds that `close` waits at the end, when everything is acked.
        reconnector: opens another socket when one is lost; None to fail instead.
        gone_after: as for `TcpClient`.
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
        gone_after: float | None = None,
    ) -> None:
        # The other side's name in messages.
        self._peer = peer
        # The rows to deliver.
        self._ring = ring
        # Seconds without progress after which waiting calls raise; None for no limit.
        self._stall_timeout = stall_timeout
        # When this sender was made, in seconds of the monotonic clock.
        self._opened_at = time.monotonic()
        # Seconds that callers spent in `send_rows`.
        self._sending_seconds = 0.0
        # Seconds that callers waited for room, for each cause in `echo_torch.metrics.timing`.
        self._blocked_seconds = [0.0, 0.0, 0.0, 0.0]
        # Whether `close` raises without a timeout, too: at the end of a ``with`` block.
        self._close_raises = False
        # The process that made this sender. A forked child must not use it.
        self._pid = os.getpid()
        # What callers share with the I/O thread.
        tail = ClosingTail(ring, resend_at_close)
        self._connection = Connection(sock, peer, ring, window, tail, reconnector, gone_after)
        # The thread that writes what callers leave, and reconnects. The owner starts it.
        self._io_thread = IoThread(self._connection, linger)

    # What became of the rows.

    @property
    def closed(self) -> bool:
        """Whether `send` can only fail, because the client was closed or the peer is gone."""
        return self._ring.refuses_new_rows or self._connection.is_over or self._pid != os.getpid()

    @property
    def has_ended(self) -> bool:
        """Whether the connection is lost for good, or was closed and has ended."""
        return self._connection.is_over

    @property
    def failure(self) -> ConnectionClosedError | None:
        """Why the connection was lost for good; None while it was not, and after an orderly end."""
        return self._connection.failure

    @property
    def reconnecting(self) -> bool:
        """Whether the connection is lost and the I/O thread tries to open it again."""
        return self._connection.lost_error is not None and not self._connection.is_over

    def outage(self) -> Outage | None:
        """Return how long the connection has been lost; None while it is open, and after an orderly end."""
        connection, lost_at = self._connection, self._connection.lost_at
        if lost_at is None:
            return None
        tries = 0 if connection.reconnector is None else connection.reconnector.tries
        return Outage(time.monotonic() - lost_at, tries)

    @property
    def free_rows(self) -> int:
        """The number of samples that `send_rows` would take without waiting."""
        ring = self._ring
        return max(0, ring.soft_limit - ring.reserved + ring.acked)

    def counts(self) -> Counts:
        """Return what became of all samples so far, as far as the client knows without waiting."""
        # Read the acks that have arrived, if no other thread holds the I/O lock.
        if self._pid == os.getpid() and not self._connection.is_over:
            self._connection.pump_or_wake()
        return self._connection.counts()

    def peer_counts(self) -> list[PeerCounts]:
        """Return the counts of the one learner that this client sends to."""
        return [PeerCounts.from_counts(self.counts(), self.failure is not None)]

    def times(self) -> Times:
        """Return where the time went since the client was made."""
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
        """Return how many samples were sent, and how many of them have a known ack.

        This reads no new acks, so it is cheaper than `counts`.
        """
        sent = self._connection.sent
        return sent, min(self._ring.acked, sent)

    def _check_caller(self, call: str) -> None:
        """Raise if this connection cannot serve the caller.

        Args:
            call: the public method's name, for the message.

        Raises:
            ConnectionClosedError: another process made this connection.
            RuntimeError: the caller is a signal handler or finalizer that interrupted a call of its own thread.
        """
        connection = self._connection
        if self._pid != os.getpid():
            raise ConnectionClosedError(
                f"{self._peer}: this connection belongs to process {self._pid}; open one in process {os.getpid()}"
            )
        if connection.is_reentrant_call:
            raise RuntimeError(
                f"{call}() was called by a signal handler or finalizer that interrupted a call to the same client in "
                "the same thread; raise an exception there (sys.exit) and flush outside"
            )

    def has_room(self, rows: int) -> bool:
        """Whether ``rows`` samples fit into the ring now; for more than it ever holds, whether it is empty."""
        ring = self._ring
        self._allow_two_batches(rows)
        most = min(rows, ring.max_unacked)
        if ring.max_unacked - ring.reserved + ring.acked < most:
            # Read the acks that have arrived.
            self._connection.pump_or_wake()
        return ring.max_unacked - ring.reserved + ring.acked >= most

    def _allow_two_batches(self, rows: int) -> None:
        """Raise the limit for un-acked rows if it is below two batches of ``rows``."""
        ring = self._ring
        if 2 * rows > ring.max_unacked:
            with ring.packing_lock:
                ring.raise_limit(2 * rows)

    def _put_rows(self, rows: int, fill: Filler, deadline: Deadline, whole: bool = False) -> None:
        """Put rows into the ring. Blocks until there is room for all of them.

        Args:
            rows: how many.
            fill: packs one run of them; called for each run that fits.
            deadline: when to stop waiting for room.
            whole: whether to raise DeliveryTimeoutError at once if there is no room for all rows.

        Raises:
            ConnectionClosedError: the client was closed, or the peer is gone.
            DeliveryTimeoutError: there was no room in time. The ``rows_accepted`` of both errors counts the rows that
                the ring took.
        """
        self._check_caller("send")
        ring, began, done = self._ring, time.monotonic(), 0
        self._allow_two_batches(rows)
        if whole and not self.has_room(rows):
            self._check_open("send")
            self._raise_timeout("send", Deadline(0.0))
        self._connection.soft_limit.lift_if_empty()
        try:
            while done < rows:
                # Fill and count as many rows as are free in one run.
                with ring.packing_lock:
                    slot, run = ring.next_free_run(rows - done)
                    if run:
                        self._check_open("send")
                        # An interrupted caller's copy may still write into these rows.
                        if ring.uncommitted_copy is not None and not self._interrupted_copy_is_done():
                            run = 0
                        # If the connection ended meanwhile, `commit` takes none of these rows. Then raise.
                        elif not ring.commit(run, copy=fill(slot, done, run)):
                            self._check_open("send")
                done += run
                # The ring is full, or an interrupted copy blocks it. Get the packed rows out before you wait.
                if not run:
                    self._connection.write_or_wake()
                    self._wait_for_room(rows - done, deadline)
                    self._wait_for_interrupted_copy("send", deadline)
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            error.rows_accepted = done
            raise
        finally:
            # Do this once, and not after each run: the I/O thread would compete with the next run's copy for memory and
            # for the GIL. Rows that were packed before an error or Ctrl-C go out, too.
            self._connection.write_or_wake()
            self._sending_seconds += time.monotonic() - began

    def wait(self, timeout: Timeout = None) -> None:
        """Block until everything sent so far is acked.

        Raises:
            ConnectionClosedError: the connection ended first. Its ``unacked`` counts the samples without an ack.
            DeliveryTimeoutError: ``timeout`` or ``stall_timeout`` passed. Delivery goes on.
        """
        self._check_caller("wait")
        self._wait_until_acked("wait", self._ring.packed, as_deadline(timeout))

    def poll_or_raise(self) -> None:
        """Raise ConnectionClosedError if the connection has ended with samples un-acked."""
        if self.closed:
            with contextlib.suppress(DeliveryTimeoutError):  # another thread is in `close`
                self.wait(0.0)

    def undelivered(self) -> UndeliveredRows:
        """Return the samples that the server may not have. Call this once the connection has failed.

        Waits for the I/O thread to end, so that nothing moves the counters any more.
        """
        self._io_thread.join(Deadline(THREAD_EXIT_TIMEOUT_S))
        ring, sent = self._ring, self._connection.sent
        # Read ``ready`` before ``ready_when_abandoned``. In the other order, the copies could be abandoned in between,
        # and every packed row would look ready.
        ready = ring.ready
        return UndeliveredRows(
            ring, sent, min(sent, ready if ring.ready_when_abandoned is None else ring.ready_when_abandoned)
        )

    def abandon(self) -> None:
        """Return at once. The client delivers what you sent, for up to 5 s, and closes in the background."""
        self._io_thread.begin_exit()

    def close(self, timeout: Timeout | CloseDefault = CloseDefault.LOG) -> None:
        """Deliver everything sent so far, then end the connection.

        You may call this again. It leaves no thread and no open descriptor. After an interrupt, the rest is delivered
        in the background, for up to 5 s.

        Args:
            timeout: seconds to wait for acks; None for no limit other than ``stall_timeout``. Without it, `close` waits
                5 s and raises nothing, as the stock client does, but logs what is un-acked.

        Raises:
            DeliveryTimeoutError: samples were un-acked when the time was up. With ``resend_at_close``, also if only
                those that `close` sent again were un-acked. The client is closed all the same.
            ConnectionClosedError: the connection failed with samples un-acked, and no call has raised that yet. If all
                are acked, but the server may have lost the last ones, this logs a warning instead.
        """
        if timeout is not CloseDefault.LOG:
            self._close(as_deadline(timeout))
            return
        try:
            self._close(Deadline(CLOSE_TIMEOUT_S))
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            if self._close_raises:
                raise
            _log.warning("%s", str(error))

    def _close(self, deadline: Deadline) -> None:
        connection = self._connection
        if self._pid != os.getpid():
            self._io_thread.detach_after_fork()
            return
        if self._io_thread.is_current:
            self._io_thread.begin_exit()
            return
        self._check_caller("close")
        # Read this before `_check_open` below marks the failure as reported.
        already_reported = connection.failure_reported
        try:
            connection.stop_accepting()
            self._deliver_all(deadline)
        except ConnectionClosedError as error:
            self._io_thread.stop()
            if connection.unacked and not already_reported:
                raise
            if connection.at_risk and connection.failure_will_be_reported and not already_reported:
                _log.warning("%s", str(error))
        except DeliveryTimeoutError:
            self._io_thread.stop()
            raise
        except BaseException:
            # Ctrl-C: do not make the user wait. The I/O thread delivers the rest, for a bounded time.
            self._io_thread.begin_exit()
            raise
        else:
            self._io_thread.stop()
        finally:
            self._ring.free_buffer()

    def _deliver_all(self, deadline: Deadline) -> None:
        """Block until all rows are acked. Then send the closing tail, and block until it is acked, too."""
        tail = self._connection.closing_tail
        self._check_open("close")
        self._wait_until_acked("close", self._connection.sent, deadline)
        # The tail comes last, so that it pushes the acked rows out of the server's queue. It may be larger than the
        # room in the ring, so pack it piece by piece.
        while left := self._connection.pack_closing_tail():
            self._check_open("close")
            self._connection.write_or_wake()
            self._wait_until_acked("close", self._threshold_for_room(left), deadline)
            self._wait_for_interrupted_copy("close", deadline)
        self._connection.write_or_wake()
        self._wait_until_acked("close", tail.end_row, deadline)
        self._io_thread.sleep_after_last_ack(deadline)

    # Waiting.

    def _wait_for_room(self, rows: int, deadline: Deadline) -> None:
        """Block until there is room for some of ``rows`` rows. Then set the soft limit if that was fast, or lift it."""
        ring, soft_limit = self._ring, self._connection.soft_limit
        threshold = self._threshold_for_room(rows)
        began, acked = time.monotonic(), ring.acked
        self._connection.send_is_blocked = True
        try:
            soft_deadline = soft_limit.deadline_for(threshold)
            if soft_deadline is None:
                self._wait_until_acked("send", threshold, deadline)
            else:
                # While the soft limit is set, wait only until the ring counts as slow. `update_after_wait` then lifts
                # the limit, and the rest of the ring may have room at once. So this wait never raises for time.
                self._wait_until_acked(
                    "send", threshold, NEVER, min(soft_deadline, deadline, key=lambda moment: moment.at)
                )
        finally:
            self._connection.send_is_blocked = False
        soft_limit.update_after_wait(threshold, acked, began)

    def _wait_for_interrupted_copy(self, call: str, deadline: Deadline) -> None:
        """Block while a copy that an interrupted caller left is still under way.

        This is rare and short, so polling is good enough.
        """
        stall_deadline = Deadline(self._stall_timeout)
        while self._ring.uncommitted_copy is not None:
            with self._ring.packing_lock:
                if self._interrupted_copy_is_done():
                    return
            self._check_open(call)
            if deadline.expired or stall_deadline.expired:
                self._raise_timeout(call, deadline)
            time.sleep(SETTLE_POLL_S)

    def _interrupted_copy_is_done(self) -> bool:
        """Return whether the interrupted copy has ended well. If it failed, end the connection."""
        try:
            return self._ring.try_clear_uncommitted_copy()
        except RuntimeError as error:
            self._connection.fail_on_copy_error(error)
            return False

    def _threshold_for_room(self, rows: int) -> int:
        """Return the value of ``acked`` at which enough rows are free to go on packing.

        Enough is ``rows``, or a quarter of the soft limit if that is less. A wake-up for every row would cost more than
        the row.
        """
        ring = self._ring
        return ring.acked_needed_for(min(rows, max(1, ring.soft_limit // 4)))

    def _wait_until_acked(self, call: str, threshold: int, deadline: Deadline, until: Deadline | None = None) -> None:
        """Block until ``acked`` reaches ``threshold``.

        Args:
            call: the public method's name, for messages.
            threshold: the value to wait for.
            deadline: when to raise DeliveryTimeoutError.
            until: when to return although ``threshold`` is not reached. With it, this never raises
                DeliveryTimeoutError.
        """
        ring, connection, counted_at = self._ring, self._connection, time.monotonic()
        while ring.acked < threshold and not (until and until.expired):
            # Register before you pump and check, so that no ack is missed in between. After an interrupt, `finally`
            # removes the waiter.
            waiter = ring.add_waiter(threshold)
            try:
                # If the I/O thread pumps now, wait until it is done, because it may read the acks that this caller
                # needs. Until they are read, the poll below returns at once. Repeating it would take the GIL from the
                # I/O thread.
                connection.pump_or_wake(lock_timeout_s=IO_LOCK_TIMEOUT_S)
                if ring.acked >= threshold:
                    break
                self._check_open(call)
                # Time is up. `pump_or_wake` reads nothing if another thread holds the lock, so read the acks that are
                # there before you raise.
                if deadline.expired or self._seconds_until_stall() <= 0:
                    connection.read_acks()
                    if ring.acked >= threshold:
                        break
                    self._check_open(call)
                    if deadline.expired or self._seconds_until_stall() <= 0:
                        if until:
                            break
                        self._raise_timeout(call, deadline)
                # The I/O thread must not wait for itself.
                if self._io_thread.is_current:
                    raise RuntimeError(
                        f"{call}() in a logging handler or finalizer on the I/O thread would wait for itself"
                    )
                # Poll for all callers if nobody else does, or else block until someone wakes this caller.
                pause = min(deadline.remaining(), self._seconds_until_stall(), WAITER_HEARTBEAT_S)
                pause = min(pause, until.remaining()) if until else pause
                bottleneck = connection.bottleneck
                if not connection.try_poll_socket(waiter, pause):
                    waiter.wait(pause)
                if call == "send":
                    now = time.monotonic()
                    self._blocked_seconds[bottleneck] += now - counted_at
                    counted_at = now
            finally:
                ring.remove_waiter(waiter)
        # This caller may have polled for the others, so let another one take over.
        ring.wake_one()

    def _seconds_until_stall(self) -> float:
        """Return the seconds until the stall timeout passes; infinite if there is none."""
        return (
            float("inf") if self._stall_timeout is None else self._connection.seconds_until_stall(self._stall_timeout)
        )

    # Errors for callers.

    def _check_open(self, call: str) -> None:
        """Raise if the connection is over, or if ``call`` is ``"send"`` and the client was closed."""
        connection, failure = self._connection, self._connection.failure
        if failure is not None:
            connection.failure_reported = True
            raise self._with_unacked(
                type(failure)(f"{failure}; {call}() with {connection.describe_unacked()}")
            ) from failure
        if connection.is_over or (self._ring.refuses_new_rows and call == "send"):
            connection.failure_reported = connection.failure_reported or call == "close"
            what = f"{self._peer}: {call}() on a client that was closed; {connection.describe_unacked()}"
            raise self._with_unacked(ConnectionClosedError(what))

    def _raise_timeout(self, call: str, deadline: Deadline) -> NoReturn:
        """Raise because the deadline or the stall timeout passed."""
        if deadline.expired:
            what = f"{call}() not done within {deadline.timeout:g} s"
        else:
            what = f"nothing was acked for {self._stall_timeout:g} s (stall_timeout)"
        connection = self._connection
        text = f"{self._peer}: {what}; {connection.describe_unacked()}"
        # `close` ends the connection now, so delivery does not go on. If the connection is lost, the loss is the
        # reason, so raise ConnectionClosedError.
        if call == "close":
            connection.failure_reported = True
            raise self._with_unacked(
                (DeliveryTimeoutError if connection.lost_error is None else ConnectionClosedError)(text)
            )
        raise self._with_unacked(DeliveryTimeoutError(f"{text}; delivery goes on"))

    def _with_unacked(self, error: Any) -> Any:
        """Set the error's ``unacked``, and return the error."""
        error.unacked = self._connection.unacked
        return error
