"""How far callers run ahead of the acks: as far as the ring goes, or less while more would only be slower.

A ring that is always full is one that callers fill faster than it drains; nothing is gained then by filling all of it,
and copies that go round through 64 MiB miss the caches. Measured side by side in one run, with samples of 28 KB and of
602 KB and a null peer: 0.82 and 0.87 of what a raw ``sendall`` reaches with a full ring, 0.95 and 1.04 with 8 MiB.

* The limit is set when a ring that was full drains fast. Where it drains slowly, the memory is not what holds it up.
* It is lifted as soon as the ring is empty, and when a wait for a part of it takes twice as long as it should, and
  `MIN_SLOW_WAIT_S` at the least: then bursts need the room, and who waits gets it at once.

Callers whose ring has no more room than the window cannot run ahead. They gain nothing from leaving what they packed to
the I/O thread, and write more of it themselves, while their own caches hold it: 1.3 times as many samples of 602 KB got
through `TcpClient` so, and 1.1 times of 28 KB.

How long acks may lie unread (`AckBatching`): to be woken for every few of them costs more than the samples did. The kernel
cannot be told to wake us for more than some ten: the server has no more under way before we read or send (`pump`). What
it sends meanwhile it sends at once then. So while rows wait for nothing but the window, the I/O thread sleeps for a
time in which, as fast as acks came in last, only a share of the window will be acked.
"""

from __future__ import annotations

import time

from echo_torch.ring.ring import Ring
from echo_torch.support.deadline import Deadline

# Bytes per second that are fast: some share of what memory does, and more than most networks do.
FAST_BYTES_PER_S = 1e9
# What callers run ahead by while the limit is set, in bytes; the window, if that is more.
SOFT_LIMIT_BYTES = 8 * 1024 * 1024
# What a caller writes itself, in bytes, if it can run ahead: about what a system call costs anyway, so that `send`
# costs one copy and not two. And if it cannot: a good part of what the socket takes.
RUN_AHEAD_WRITE_BYTES = 64 * 1024
LOCKSTEP_WRITE_BYTES = 1024 * 1024
# Seconds that a wait may take at the least before it counts as slow: threads are not always woken at once.
MIN_SLOW_WAIT_S = 0.02
# At most this share of the window may be acked while the I/O thread sleeps, so that the server does not run dry.
WINDOW_DIVISOR = 4
# Seconds: below the first, sleeping costs more than it saves; above the second, it would save hardly more.
MIN_POLL_INTERVAL_S = 0.0001
MAX_POLL_INTERVAL_S = 0.002


class SoftLimit:
    """Sets and lifts ``ring.soft_limit``, for a window of ``window`` rows."""

    def __init__(self, ring: Ring, window: int) -> None:
        self._ring = ring
        limit_rows = max(1, window, SOFT_LIMIT_BYTES // ring.row_bytes)
        self._limit_rows = min(limit_rows, ring.max_unacked)
        self.caller_write_bytes = RUN_AHEAD_WRITE_BYTES if ring.max_unacked > window else LOCKSTEP_WRITE_BYTES
        """About how much a caller writes itself."""

    def disable(self) -> None:
        """Set no limit from now on: whoever waits would keep a device waiting, and no caches gain by it."""
        self._limit_rows = self._ring.max_unacked
        self._ring.soft_limit = self._ring.max_unacked

    def lift_if_empty(self) -> None:
        """Somebody is about to pack."""
        ring = self._ring
        if ring.soft_limit < ring.max_unacked and not ring.unacked:
            ring.soft_limit = ring.max_unacked

    def deadline_for(self, threshold: int) -> Deadline | None:
        """Until when to wait for ``acked`` to reach ``threshold`` before the limit is lifted; None if there is none."""
        ring = self._ring
        if ring.soft_limit == ring.max_unacked:
            return None
        return Deadline(max(MIN_SLOW_WAIT_S, 2 * (threshold - ring.acked) * ring.row_bytes / FAST_BYTES_PER_S))

    def update_after_wait(self, threshold: int, acked: int, began: float) -> None:
        """Learn from a wait for ``threshold`` that began at some moment, when so many rows were acked."""
        ring = self._ring
        if ring.soft_limit < ring.max_unacked:
            fast = ring.acked >= threshold
        else:
            fast = (ring.acked - acked) * ring.row_bytes >= FAST_BYTES_PER_S * (time.monotonic() - began)
        ring.soft_limit = self._limit_rows if fast else ring.max_unacked


class AckBatching:
    """How fast acks come in, for a window of ``window`` rows."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._acked = 0
        self._at = time.monotonic()

    def poll_interval(self, acked: int) -> float:
        """Seconds that may pass before the next look, if only acks matter; to be asked after every look."""
        now = time.monotonic()
        new_acks, elapsed = acked - self._acked, now - self._at
        if not new_acks:  # too early to tell, or nothing to hurry for: the next one that comes shall wake us
            return 0.0
        self._acked, self._at = acked, now
        seconds = min(MAX_POLL_INTERVAL_S, elapsed * self._window / (WINDOW_DIVISOR * new_acks))
        return seconds if seconds >= MIN_POLL_INTERVAL_S else 0.0
