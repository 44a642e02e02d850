"""Flow control: how far callers run ahead of the acks, and how long acks may stay unread.

`SoftLimit`: callers may fill the whole ring. While a full ring is slower, they may fill only a part of it.

* If a ring is always full, callers fill it faster than it drains, so using all of it gains nothing. Worse, copies that
  cycle through 64 MiB miss the caches. One run measured both side by side, with samples of 28 KB and of 602 KB and a
  null peer. A full ring reached 0.82 and 0.87 of the speed of a raw ``sendall``. With 8 MiB it was 0.95 and 1.04.
* The limit is set when a full ring drains fast. If the ring drains slowly, memory is not the bottleneck.
* The limit is lifted as soon as the ring is empty, because bursts need the room. It is also lifted when a wait takes
  twice as long as it should, and at least `MIN_SLOW_WAIT_S`: the waiting caller then gets the room at once.
* If the ring is no larger than the window, callers cannot run ahead. They gain nothing from leaving rows to the I/O
  thread. So they write more rows themselves, while their own caches still hold them. That moved 1.3 times as many
  samples of 602 KB through `TcpClient`, and 1.1 times as many of 28 KB.

`AckBatching`: the I/O thread sleeps so that many acks arrive together. A wake-up for every few acks costs more than the
samples themselves.

* The kernel can batch only about ten acks: the server has no more in flight until we read or send (see `pump`). As soon
  as we do, it sends what it held back.
* So while only the window holds rows back, the I/O thread sleeps before it polls. The sleep is short: at the rate of
  the latest acks, the server acks only a share of the window meanwhile.

`NetworkWatch`: if rows wait for the peer, the learner or the network is slow. A full socket alone does not tell: it is
full, too, if the server stops reading.

* The kernel counts how long the peer's receive buffer was full. Then the learner is slow, or a proxy before it.
* Otherwise, if most of what is un-acked is still in our kernel's send buffer, the network is slow.
* If most of it is with the peer, and only its acks are missing, the learner is slow.
"""

from __future__ import annotations

import socket
import time

from echo_torch.ring.ring import Ring
from echo_torch.support.deadline import Deadline
from echo_torch.wire.tcp_info import read_tcp_info, send_queue_bytes

# Bytes per second from which draining counts as fast. Memory is faster than this, and most networks are slower.
FAST_BYTES_PER_S = 1e9
# Bytes by which callers run ahead while the limit is set. If the window is larger, they run ahead by the window.
SOFT_LIMIT_BYTES = 8 * 1024 * 1024
# Bytes that a caller writes itself if it can run ahead. They cost about as much as the system call itself, so `send`
# costs one copy and not two.
RUN_AHEAD_WRITE_BYTES = 64 * 1024
# Bytes that a caller writes itself if it cannot run ahead: a good part of what the socket takes.
LOCKSTEP_WRITE_BYTES = 1024 * 1024
# Seconds below which no wait counts as slow: the system does not always wake threads at once.
MIN_SLOW_WAIT_S = 0.02
# At most this share of the window may be acked while the I/O thread sleeps, so that the server does not run dry.
WINDOW_DIVISOR = 4
# Seconds to sleep. Below the first, a sleep costs more than it saves. Above the second, it saves hardly more.
MIN_POLL_INTERVAL_S = 0.0001
MAX_POLL_INTERVAL_S = 0.002
# Least seconds between two looks at the kernel's counters, which advance in steps of a few milliseconds.
NETWORK_WATCH_INTERVAL_S = 0.05
# So many segments may be on their way on a fast network, too: the peer's kernel delays its acknowledgment of the last.
DELAYED_SEGMENTS = 2


class SoftLimit:
    """Sets and lifts ``ring.soft_limit``, for a window of ``window`` rows."""

    def __init__(self, ring: Ring, window: int) -> None:
        # The ring whose limit this is.
        self._ring = ring
        # Most un-acked rows while the limit is set, if the ring allows as many.
        self._limit_rows = max(1, window, SOFT_LIMIT_BYTES // ring.row_bytes)
        # About how many bytes a caller writes itself before it leaves the rest to the I/O thread.
        self.caller_write_bytes = RUN_AHEAD_WRITE_BYTES if ring.max_unacked > window else LOCKSTEP_WRITE_BYTES

    def disable(self) -> None:
        """Set no limit from now on.

        Call this if a device copies the rows. A caller that waits keeps the device waiting, and no cache gains from a
        limit.
        """
        self._limit_rows = self._ring.capacity
        self._ring.soft_limit = self._ring.max_unacked

    def lift_if_empty(self) -> None:
        """Lift the limit if every row is acked; call this before you pack."""
        ring = self._ring
        if ring.soft_limit < ring.max_unacked and not ring.unacked:
            ring.soft_limit = ring.max_unacked

    def deadline_for(self, threshold: int) -> Deadline | None:
        """Return when to lift the limit if ``acked`` has not reached ``threshold`` by then; None without a limit."""
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
            # The wait lasted until `deadline_for` at most, so the ring was fast if ``acked`` reached the threshold.
            fast = ring.acked >= threshold
        else:
            fast = (ring.acked - acked) * ring.row_bytes >= FAST_BYTES_PER_S * (time.monotonic() - began)
        ring.soft_limit = min(self._limit_rows, ring.max_unacked) if fast else ring.max_unacked


class AckBatching:
    """Measures how fast acks arrive, for a window of ``window`` rows."""

    def __init__(self, window: int) -> None:
        # Most rows written and un-acked.
        self._window = window
        # The ``acked`` of the last call that saw new acks.
        self._acked = 0
        # When that call came, by ``time.monotonic``.
        self._measured_at = time.monotonic()

    def poll_interval(self, acked: int) -> float:
        """Return how many seconds to sleep before the next poll, if only acks matter. Call this after each pump."""
        now = time.monotonic()
        new_acks, elapsed = acked - self._acked, now - self._measured_at
        # Without new acks, it is too early to know the rate, or a sleep saves nothing. Let the next ack wake the
        # thread.
        if not new_acks:
            return 0.0
        self._acked, self._measured_at = acked, now
        # The time in which 1 / WINDOW_DIVISOR of the window is acked at this rate.
        seconds = min(MAX_POLL_INTERVAL_S, elapsed * self._window / (WINDOW_DIVISOR * new_acks))
        return seconds if seconds >= MIN_POLL_INTERVAL_S else 0.0


class NetworkWatch:
    """Tells a slow network from a slow learner, for one socket."""

    def __init__(self, sock: socket.socket) -> None:
        # The socket whose state the kernel tells.
        self._sock = sock
        # Whether the network, and not the learner, held rows up at the last look.
        self.network_is_slow = False
        # The kernel's counters at the last look, in microseconds.
        self._busy_us = self._peer_full_us = 0
        # When the next look is due, by ``time.monotonic``.
        self._next_look = time.monotonic() + NETWORK_WATCH_INTERVAL_S

    def look_if_due(self, unacked_bytes: int, socket_full: bool) -> None:
        """Look at the kernel's counters, at most once in `NETWORK_WATCH_INTERVAL_S`; call this while rows wait.

        Args:
            unacked_bytes: bytes of the rows written and not acked by the learner.
            socket_full: whether the socket took no more bytes. Where the kernel tells nothing, this decides.

        Raises:
            OSError: the socket is closed.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + NETWORK_WATCH_INTERVAL_S
        info = read_tcp_info(self._sock)
        if info is None:
            self.network_is_slow = socket_full
            return
        busy_us, peer_full_us = info.busy_us - self._busy_us, info.peer_full_us - self._peer_full_us
        self._busy_us, self._peer_full_us = info.busy_us, info.peer_full_us
        peer_was_full = busy_us > 0 and 2 * peer_full_us > busy_us
        in_our_kernel = 2 * send_queue_bytes(self._sock) > unacked_bytes
        delayed = info.unacked_segments <= DELAYED_SEGMENTS and not info.unsent_bytes
        self.network_is_slow = in_our_kernel and not peer_was_full and not delayed
