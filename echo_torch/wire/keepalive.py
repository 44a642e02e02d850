"""Whether the host at the other end is still there, which a host that vanishes (power, cable) does not say.

* While nothing is under way, the kernel asks (keepalive) and ends the connection if there is no answer.
* While the peer has not said anything yet, that is asked soon: a host that is called by many at once may forget a
  connection that it has let begin (its queue is full by then), and answers that it knows of none. Of itself it would
  be silent, and so would we, who wait for it to speak first.
* While something is, the kernel only repeats it, for a quarter of an hour; `unreachable_reason` looks at how often it did.
* A learner that is paused is no fault: its kernel answers for it. So nothing here counts time without acks, and
  TCP_USER_TIMEOUT, which ends connections to hosts that are only slow, is not used.

Both are Linux's; elsewhere the defaults of the operating system and ``stall_timeout`` remain.
"""

from __future__ import annotations

import socket
import struct

# Seconds until the first question to an idle peer and between them, and how many may stay without an answer: together
# a minute, as fast as is usual for datacentres, and too slow for a hiccup of the network to count.
KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_COUNT = 3
# Seconds until the first question while the peer's greeting is waited for; the kernel counts whole ones.
GREETING_IDLE_S = 1
# How often the same bytes were sent without an answer, which takes some seven seconds on a fast network; and how many
# questions whether a full peer has room again stayed without one. A peer that lives answers the first.
MAX_RETRANSMITS = 5
MAX_PROBES = 2
# Where these two are in struct tcp_info of linux/tcp.h, in bytes; and the round trip's time, in microseconds.
_RETRANSMITS_OFFSET, _PROBES_OFFSET = 2, 3
_ROUND_TRIP_FIELD = struct.Struct("=68xI")


def enable_keepalive(sock: socket.socket, greeted: bool = True) -> None:
    """Turn keepalive on, for a peer that has said something, or one that has not yet."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": KEEPALIVE_IDLE_S if greeted else GREETING_IDLE_S,
        "TCP_KEEPINTVL": KEEPALIVE_INTERVAL_S,
        "TCP_KEEPCNT": KEEPALIVE_COUNT,
    }
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def unreachable_reason(sock: socket.socket) -> str | None:
    """Why the peer's host is taken to be gone, if it is, while something is under way to it."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _PROBES_OFFSET + 1)
    if info[_RETRANSMITS_OFFSET] >= MAX_RETRANSMITS:
        return f"the peer's host does not answer: the same bytes were sent again {info[_RETRANSMITS_OFFSET]} times"
    if info[_PROBES_OFFSET] >= MAX_PROBES:
        return f"the peer's host does not answer: it was full, and asked {info[_PROBES_OFFSET]} times in vain since"
    return None


def round_trip_seconds(sock: socket.socket) -> float:
    """Seconds that a word to the peer's host and its answer take, as connecting did; 0 where that is not known."""
    if not hasattr(socket, "TCP_INFO"):
        return 0.0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ROUND_TRIP_FIELD.size)
    microseconds: int = _ROUND_TRIP_FIELD.unpack(info)[0] if len(info) == _ROUND_TRIP_FIELD.size else 0
    return microseconds / 1e6
