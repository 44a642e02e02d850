"""Flow control: how far callers run ahead of the acks, and how long acks may stay unread.

`SoftLimit`: callers may fill the whole ring, or less of it while a full ring would only be slower.

* A ring that is always full is filled faster than it drains, so using all of it gains nothing. Worse, copies that go
  round through 64 MiB miss the caches. Measured side by side in one run, with samples of 28 KB and of 602 KB and a null
  peer: 0.82 and 0.87 of what a raw ``sendall`` reaches with a full ring, 0.95 and 1.04 with 8 MiB.
* The limit is set when a full ring drains fast. If it drains slowly, memory is not the bottleneck.
* The limit is lifted as soon as the ring is empty, because bursts need the room. It is also lifted when a wait takes
  twice as long as it should, and at least `MIN_SLOW_WAIT_S`: the waiting caller then gets the room at once.
* A ring that is no larger than the window does not let callers run ahead. Leaving rows to the I/O thread gains them
  nothing, so they write more themselves, while their own caches hold the rows. That moved 1.3 times as many samples of
  602 KB through `TcpClient`, and 1.1 times as many of 28 KB.

`AckBatching`: waking the I/O thread for every few acks costs more than the samples did.

* The kernel can batch only about ten acks: the server has no more in flight until we read or send (see `pump`). As soon
  as we do, it sends what it held back.
* So while rows wait for nothing but the window, the I/O thread sleeps before it polls. The sleep is so short that, at
  the rate of the latest acks, only a share of the window is acked meanwhile.
"""

from __future__ import annotations

import time

from echo_torch.ring.ring import Ring
from echo_torch.support.deadline import Deadline

# Bytes per second from which draining counts as fast: a share of what memory does, and more than most networks do.
FAST_BYTES_PER_S = 1e9
# Bytes by which callers run ahead while the limit is set; a larger window takes precedence.
SOFT_LIMIT_BYTES = 8 * 1024 * 1024
# Bytes that a caller writes itself if it can run ahead: they cost about as much as the system call itself, so that
# `send` costs one copy and not two. And if it cannot run ahead: a good part of what the socket takes.
RUN_AHEAD_WRITE_BYTES = 64 * 1024
LOCKSTEP_WRITE_BYTES = 1024 * 1024
# Seconds below which no wait counts as slow: the system does not always wake threads at once.
MIN_SLOW_WAIT_S = 0.02
# At most this share of the window may be acked while the I/O thread sleeps, so that the server does not run dry.
WINDOW_DIVISOR = 4
# Seconds. Below the first, sleeping costs more than it saves. Above the second, it saves hardly more.
MIN_POLL_INTERVAL_S = 0.0001
MAX_POLL_INTERVAL_S = 0.002


class SoftLimit:
    """Sets and lifts ``ring.soft_limit``, for a window of ``window`` rows."""

    def __init__(self, ring: Ring, window: int) -> None:
        # The ring whose limit this is.
        self._ring = ring
        limit_rows = max(1, window, SOFT_LIMIT_BYTES // ring.row_bytes)
        # Most un-acked rows while the limit is set.
        self._limit_rows = min(limit_rows, ring.max_unacked)
        # About how many bytes a caller writes itself before it leaves the rest to the I/O thread.
        self.caller_write_bytes = RUN_AHEAD_WRITE_BYTES if ring.max_unacked > window else LOCKSTEP_WRITE_BYTES

    def disable(self) -> None:
        """Set no limit from now on.

        For rows that a device copies: a caller that waits keeps the device waiting, and no cache gains from a limit.
        """
        self._limit_rows = self._ring.max_unacked
        self._ring.soft_limit = self._ring.max_unacked

    def lift_if_empty(self) -> None:
        """Lift the limit if every row is acked; call this before you pack."""
        ring = self._ring
        if ring.soft_limit < ring.max_unacked and not ring.unacked:
            ring.soft_limit = ring.max_unacked

    def deadline_for(self, threshold: int) -> Deadline | None:
        """Return until when ``acked`` must reach ``threshold``, or else the limit is lifted; None without a limit."""
        ring = self._ring
        if ring.soft_limit == ring.max_unacked:
            return None
        # Twice the time that a fast ring needs for these rows.
        return Deadline(max(MIN_SLOW_WAIT_S, 2 * (threshold - ring.acked) * ring.row_bytes / FAST_BYTES_PER_S))

    def update_after_wait(self, threshold: int, acked: int, began: float) -> None:
        """Set or lift the limit after a wait for room.

        Args:
            threshold: value of ``ring.acked`` that the caller waited for.
            acked: value of ``ring.acked`` when the wait began.
            began: when the wait began, by ``time.monotonic``.
        """
        ring = self._ring
        if ring.soft_limit < ring.max_unacked:
            # The wait ended at `deadline_for`, so the ring was fast if it got there.
            fast = ring.acked >= threshold
        else:
            fast = (ring.acked - acked) * ring.row_bytes >= FAST_BYTES_PER_S * (time.monotonic() - began)
        ring.soft_limit = self._limit_rows if fast else ring.max_unacked


class AckBatching:
    """Measures how fast acks arrive, for a window of ``window`` rows."""

    def __init__(self, window: int) -> None:
        # Most rows written and un-acked.
        self._window = window
        # The ``acked`` of the last call that saw new acks.
        self._acked = 0
        # When that call was, by ``time.monotonic``.
        self._measured_at = time.monotonic()

    def poll_interval(self, acked: int) -> float:
        """Return for how many seconds to sleep before polling again, if only acks matter; call this after each pump."""
        now = time.monotonic()
        new_acks, elapsed = acked - self._acked, now - self._measured_at
        # No new acks: too early to know the rate, or nothing to save. The next ack shall wake the thread.
        if not new_acks:
            return 0.0
        self._acked, self._measured_at = acked, now
        # The time in which 1 / WINDOW_DIVISOR of the window is acked at this rate.
        seconds = min(MAX_POLL_INTERVAL_S, elapsed * self._window / (WINDOW_DIVISOR * new_acks))
        return seconds if seconds >= MIN_POLL_INTERVAL_S else 0.0
