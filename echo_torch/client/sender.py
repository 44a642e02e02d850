"""The callers' half of a connection: packing rows, waiting for them, and what is raised when that fails.

* Callers pack in turns (`ring`), and park or lead until ``acked`` is far enough. What they share with the I/O thread
  is in `link`.
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
from echo_torch.ring.ring import Fill, Ring
from echo_torch.support.deadline import NEVER, Deadline

from .connection import Link
from .io_thread import IoThread
from .reconnect import Redial
from .replay import Remains, Tail

_log = logging.getLogger(__name__)

# Seconds after which a caller who waits looks for itself, since acks fewer than WAITING_ACKS wake nobody.
WAITER_HEARTBEAT_S = 0.05
# Seconds for the thread of a connection that was lost for good to be gone: it has nothing left to do.
REMAINS_S = 1.0
# Seconds between two looks at a device's copy that was not to be.
SETTLE_LOOK_S = 0.001


class Connection:
    """Delivers the rows of a ring over a socket that has shaken hands, and others if that is lost.

    Args:
        sock: connected, non-blocking; owned from now on.
        peer: how messages name the other side.
        ring: rows of the size that the server expects.
        window: most rows written and un-acked.
        stall_timeout: seconds without progress after which waiting calls raise; None for ever.
        replay_tail: whether, as the last thing, the ring's ``replay`` last rows are written once more.
        linger: seconds to wait, as the last thing, when everything is acked.
        redial: opens other connections; None to end with the first.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        ring: Ring,
        window: int,
        *,
        stall_timeout: float | None = None,
        replay_tail: bool = False,
        linger: float = 0.0,
        redial: Redial | None = None,
    ) -> None:
        self.peer = peer
        self.ring = ring
        self.stall_timeout = stall_timeout
        self._began = time.monotonic()
        self._sending = 0.0
        self._blocked = [0.0, 0.0, 0.0, 0.0]
        self._pid = os.getpid()
        self._link = Link(sock, peer, ring, window, Tail(ring, replay_tail), redial)
        self.thread = IoThread(self._link, linger)

    @property
    def closed(self) -> bool:
        """Whether no more rows are accepted."""
        return self.ring.refusing or self._link.failure is not None or self._pid != os.getpid()

    def counts(self) -> Counts:
        """What became of the rows, as far as is known."""
        return self._link.counts()

    def times(self) -> Times:
        """Where the time went, of callers and of the thread."""
        link = self._link
        until, waiting, latencies = link.ended_at or time.monotonic(), link.waiting, link.line.latencies.counts
        return Times(
            connected=until - self._began if link.sent else 0.0,
            sending=self._sending,
            blocked=tuple(self._blocked),  # type: ignore[arg-type]
            waiting=tuple(waiting),  # type: ignore[arg-type]
            latencies=tuple(latencies),
        )

    def progress(self) -> tuple[int, int]:
        """How many rows were accepted, and how many of them are acked as far as was noted."""
        sent = self._link.sent
        return sent, min(self.ring.acked, sent)

    def enter(self, call: str) -> None:
        """Turn away whom this connection cannot serve: another process, or a signal handler inside a call of ours."""
        link = self._link
        if self._pid != os.getpid():
            raise ConnectionClosedError(
                f"{self.peer}: this connection belongs to process {self._pid}; open one in process {os.getpid()}"
            )
        if link.interrupted:
            raise RuntimeError(
                f"{call}() was called by a signal handler or finaliser that interrupted a call to the same client in "
                "the same thread; raise an exception there (sys.exit) and flush outside"
            )

    def send_rows(self, rows: int, fill: Fill, deadline: Deadline) -> None:
        """Put ``rows`` rows into the ring, waiting for room; ``fill`` is called for each run of them that fits.

        Raises:
            ConnectionClosedError: closed, or the peer is gone.
            DeliveryTimeoutError: no room in time. Both carry ``rows_accepted``.
        """
        self.enter("send")
        began, done = time.monotonic(), 0
        self._link.backlog.begin()
        try:
            while done < rows:
                packed = self._pack(rows - done, fill, done)
                done += packed
                if not packed:
                    self._link.push()
                    self._wait_for_room(rows - done, deadline)
                    self._wait_to_settle("send", deadline)
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            error.rows_accepted = done
            raise
        finally:
            # Not after each run: the thread would compete for memory, and for the GIL, with the copying of the next.
            self._link.push()
            self._sending += time.monotonic() - began

    def wait(self, deadline: Deadline) -> None:
        """Block until every row packed so far is acked.

        Raises:
            ConnectionClosedError: the connection ended before that.
            DeliveryTimeoutError: it took too long; delivery goes on.
        """
        self.enter("wait")
        self._wait_for("wait", self.ring.packed, deadline)

    @property
    def free_rows(self) -> int:
        """How many rows there is room for at once."""
        ring = self.ring
        return max(0, ring.limit - ring.reserved + ring.acked)

    @property
    def reconnecting(self) -> bool:
        """Whether it is lost, and tried to be opened again."""
        return self._link.lost is not None and self._link.failure is None

    @property
    def failure(self) -> ConnectionClosedError | None:
        """What ended it."""
        return self._link.failure

    def remains(self) -> Remains:
        """What the peer may not have, now that the connection has ended; waits for the thread to be gone."""
        self.thread.join(Deadline(REMAINS_S))
        ring, sent = self.ring, self._link.sent
        ready = ring.ready  # before it is asked whether the copies were abandoned, which are all done by then
        return Remains(ring, sent, min(sent, ready if ring.arrived is None else ring.arrived))

    def refresh(self) -> None:
        """Take note of acks that have arrived, if that can be done at once."""
        if self._pid == os.getpid() and self._link.failure is None:
            self._link.nudge()

    def abandon(self) -> None:
        """Leave it to the thread to deliver what is packed, and to end."""
        self.thread.deliver_at_exit()

    def close(self, deadline: Deadline) -> None:
        """Deliver what is packed, and the tail again, until the deadline; then end thread and socket.

        An interrupt leaves it to the thread to do so, as for a client that was dropped; as does a call on that thread.

        Raises:
            ConnectionClosedError: the connection is lost with rows un-acked, and no call has said so yet. If all were
                acked, and only the tail of them is at risk, that is logged.
            DeliveryTimeoutError: rows are un-acked at the deadline.
        """
        link = self._link
        if self._pid != os.getpid():
            self.thread.detach_after_fork()
            return
        if self.thread.is_current:
            self.thread.deliver_at_exit()
            return
        self.enter("close")
        told = link.told
        try:
            link.refuse()
            self._deliver_all(deadline)
        except ConnectionClosedError as error:
            self.thread.end()
            if link.unacked and not told:
                raise
            if link.at_risk and link.heard and not told:
                _log.warning("%s", error)
        except DeliveryTimeoutError:
            self.thread.end()
            raise
        except BaseException:
            self.thread.deliver_at_exit()
            raise
        else:
            self.thread.end()
        finally:
            self.ring.free()

    def _deliver_all(self, deadline: Deadline) -> None:
        """Wait for all rows to be acked, then for the tail of them."""
        tail = self._link.tail
        self._check_open("close")
        self._wait_for("close", self._link.sent, deadline)
        while left := self._link.pack_tail():
            self._check_open("close")
            self._link.push()
            self._wait_for("close", self._room_at(left), deadline)
            self._wait_to_settle("close", deadline)
        self._link.push()
        self._wait_for("close", tail.ends, deadline)
        self.thread.linger(deadline)

    # Packing.

    def _pack(self, want: int, fill: Fill, first: int) -> int:
        """Fill and count as many rows as are free in one run; gives how many."""
        with self.ring.turn:
            slot, rows = self.ring.free_run(want)
            if rows:
                self._check_open("send")
                if self.ring.begun is not None and not self._settled():
                    return 0
                if not self.ring.commit(rows, copy=fill(slot, first, rows)):
                    self._check_open("send")
            return rows

    def move_rows(self, buffer: memoryview, staged: Any) -> None:
        """Have the rows in other memory of the same size, for rows that a device copies."""
        link = self._link
        with self.ring.turn, link.lock:
            self.ring.move(buffer, staged)
        link.backlog.use_all()

    def _wait_for_room(self, rows: int, deadline: Deadline) -> None:
        """Wait for room, at most for as many rows."""
        ring, backlog = self.ring, self._link.backlog
        threshold = self._room_at(rows)
        began, acked, held_up_by = time.monotonic(), ring.acked, self._link.held_up_by
        try:
            patience = backlog.patience(threshold)
            if patience is None:
                self._wait_for("send", threshold, deadline)
            else:  # and then, if that was not enough, for room in all of the ring, of which there may be some
                self._wait_for("send", threshold, NEVER, min(patience, deadline, key=lambda moment: moment.at))
        finally:
            self._blocked[held_up_by] += time.monotonic() - began
        backlog.waited(threshold, acked, began)

    def _wait_to_settle(self, call: str, deadline: Deadline) -> None:
        """Wait for a copy that an interrupt has left under way: rarely, and not for long."""
        patience = Deadline(self.stall_timeout)
        while self.ring.begun is not None:
            with self.ring.turn:
                if self._settled():
                    return
            self._check_open(call)
            if deadline.expired or patience.expired:
                self._raise_timeout(call, deadline)
            time.sleep(SETTLE_LOOK_S)

    def _settled(self) -> bool:
        """As the ring says; a copy that fails ends the connection."""
        try:
            return self.ring.settled()
        except RuntimeError as error:
            self._link.fail_to_copy(error)
            return False

    def _room_at(self, rows: int) -> int:
        """The value of ``acked`` at which ``rows`` rows are free, or a good part of the ring.

        A wake-up for every row would cost more than the rows.
        """
        ring = self.ring
        return ring.rows_free_at(min(rows, max(1, ring.limit // 4)))

    # Waiting.

    def _wait_for(self, call: str, threshold: int, deadline: Deadline, until: Deadline | None = None) -> None:
        """Park until ``acked`` reaches ``threshold``; with ``until``, at the most so long, and without timing out."""
        ring, link = self.ring, self._link
        while ring.acked < threshold and not (until and until.expired):
            waiter = ring.enlist(threshold)
            try:
                link.nudge()
                if ring.acked >= threshold:
                    break
                self._check_open(call)
                if deadline.expired or self._patience() <= 0:
                    link.look()
                    if ring.acked >= threshold:
                        break
                    self._check_open(call)
                    if deadline.expired or self._patience() <= 0:
                        if until:
                            break
                        self._raise_timeout(call, deadline)
                if self.thread.is_current:
                    raise RuntimeError(f"{call}() by a logging handler, or finaliser, on the thread that it waits for")
                pause = min(deadline.remaining(), self._patience(), WAITER_HEARTBEAT_S)
                pause = min(pause, until.remaining()) if until else pause
                if not link.lead(waiter, pause):
                    waiter.park(pause)
            finally:
                ring.forget(waiter)
        ring.wake_one()

    def _patience(self) -> float:
        """Seconds until nothing will have been acked for ``stall_timeout``."""
        return float("inf") if self.stall_timeout is None else self._link.patience(self.stall_timeout)

    # What callers are told.

    def _check_open(self, call: str) -> None:
        failure = self._link.failure
        if failure is not None:
            self._link.told = True
            raise self._counted(type(failure)(f"{failure}; {call}() with {self._link.whats_open()}")) from failure
        if self.ring.refusing and call == "send":
            what = f"{self.peer}: send() on a client that was closed; {self._link.whats_open()}"
            raise self._counted(ConnectionClosedError(what))

    def _raise_timeout(self, call: str, deadline: Deadline) -> NoReturn:
        if deadline.expired:
            what = f"{call}() not done within {deadline.timeout:g} s"
        else:
            what = f"nothing was acked for {self.stall_timeout:g} s (stall_timeout)"
        link = self._link
        text = f"{self.peer}: {what}; {link.whats_open()}"
        if call == "close":
            link.told = True
            raise self._counted((DeliveryTimeoutError if link.lost is None else ConnectionClosedError)(text))
        raise self._counted(DeliveryTimeoutError(f"{text}; delivery goes on"))

    def _counted(self, error: Any) -> Any:
        error.unacked = self._link.unacked
        return error
