"""How far callers run ahead of the acks: as far as the ring goes, or less while more would only be slower.

A ring that is always full is one that callers fill faster than it drains; nothing is gained then by filling all of it,
and copies that go round through 64 MiB miss the caches. Measured side by side in one run, with samples of 28 KB and of
602 KB and a null peer: 0.82 and 0.87 of what a raw ``sendall`` reaches with a full ring, 0.95 and 1.04 with 8 MiB.

* The limit is set when a ring that was full drains fast. Where it drains slowly, the memory is not what holds it up.
* It is lifted as soon as the ring is empty, and when a wait for a part of it takes twice as long as it should, and
  `HICCUP_S` at the least: then bursts need the room, and who waits gets it at once.

Callers whose ring has no more room than the window cannot run ahead. They gain nothing from leaving what they packed to
the I/O thread, and write more of it themselves, while their own caches hold it: 1.3 times as many samples of 602 KB got
through `TcpClient` so, and 1.1 times of 28 KB.

How long acks may lie unread (`Pace`): to be woken for every few of them costs more than the samples did. The kernel
cannot be told to wake us for more than some ten: the server has no more under way before we read or send (`pump`). What
it sends meanwhile it sends at once then. So while rows wait for nothing but the window, the I/O thread sleeps for a
time in which, as fast as acks came in last, only a share of the window will be acked.
"""

from __future__ import annotations

import time

from echo_torch.ring.ring import Ring
from echo_torch.support.deadline import Deadline

# Bytes per second that are fast: some share of what memory does, and more than most networks do.
FAST_BYTES_S = 1e9
# What callers run ahead by while the limit is set, in bytes; the window, if that is more.
MODEST_BYTES = 8 * 1024 * 1024
# What a caller writes itself, in bytes, if it can run ahead: about what a system call costs anyway, so that `send`
# costs one copy and not two. And if it cannot: a good part of what the socket takes.
AHEAD_WRITE_BYTES = 64 * 1024
LEVEL_WRITE_BYTES = 1024 * 1024
# Seconds that a wait may take at the least before it counts as slow: threads are not always woken at once.
HICCUP_S = 0.02
# At most this share of the window may be acked while the I/O thread sleeps, so that the server does not run dry.
SHARE = 4
# Seconds: below the first, sleeping costs more than it saves; above the second, it would save hardly more.
LEAST_S = 0.0001
MOST_S = 0.002


class Backlog:
    """Sets and lifts ``ring.limit``, for a window of ``window`` rows."""

    def __init__(self, ring: Ring, window: int) -> None:
        self._ring = ring
        modest = max(1, window, MODEST_BYTES // ring.row_bytes)
        self._modest = min(modest, ring.room)
        self.caller_bytes = AHEAD_WRITE_BYTES if ring.room > window else LEVEL_WRITE_BYTES
        """About how much a caller writes itself."""

    def use_all(self) -> None:
        """Set no limit from now on: whoever waits would keep a device waiting, and no caches gain by it."""
        self._modest = self._ring.room
        self._ring.limit = self._ring.room

    def begin(self) -> None:
        """Somebody is about to pack."""
        ring = self._ring
        if ring.limit < ring.room and not ring.unacked:
            ring.limit = ring.room

    def patience(self, threshold: int) -> Deadline | None:
        """Until when to wait for ``acked`` to reach ``threshold`` before the limit is lifted; None if there is none."""
        ring = self._ring
        if ring.limit == ring.room:
            return None
        return Deadline(max(HICCUP_S, 2 * (threshold - ring.acked) * ring.row_bytes / FAST_BYTES_S))

    def waited(self, threshold: int, acked: int, began: float) -> None:
        """Learn from a wait for ``threshold`` that began at some moment, when so many rows were acked."""
        ring = self._ring
        if ring.limit < ring.room:
            fast = ring.acked >= threshold
        else:
            fast = (ring.acked - acked) * ring.row_bytes >= FAST_BYTES_S * (time.monotonic() - began)
        ring.limit = self._modest if fast else ring.room


class Pace:
    """How fast acks come in, for a window of ``window`` rows."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._acked = 0
        self._at = time.monotonic()

    def nap(self, acked: int) -> float:
        """Seconds that may pass before the next look, if only acks matter; to be asked after every look."""
        now = time.monotonic()
        came, took = acked - self._acked, now - self._at
        if not came:  # too early to tell, or nothing to hurry for: the next one that comes shall wake us
            return 0.0
        self._acked, self._at = acked, now
        seconds = min(MOST_S, took * self._window / (SHARE * came))
        return seconds if seconds >= LEAST_S else 0.0
