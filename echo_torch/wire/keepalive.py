"""Detects a host that vanished (power, cable) without closing its connections.

* On an idle connection, the kernel sends keepalive probes and ends the connection if no answer comes.
* Before the peer's greeting, the kernel probes sooner. A host that many clients call at once may complete the TCP
  handshake on our side and then drop the connection, because its queue is full. We would wait for its greeting forever,
  but it answers a probe with a reset.
* While our bytes are unacknowledged, the kernel sends no keepalive probes. It retransmits, or asks a full peer whether
  it has room, for a quarter of an hour. `unreachable_reason` reads how often it did, so you can give up sooner.
* A paused learner is not a fault, and its kernel still answers. So nothing here counts time without acks. Neither do we
  use TCP_USER_TIMEOUT, which ends connections to hosts that are only slow.

The probe settings and the counters need Linux. Elsewhere you get the defaults of the operating system, and
``stall_timeout``.
"""

from __future__ import annotations

import socket

from .tcp_info import read_tcp_info

# Seconds of silence before the first probe, seconds between probes, and how many probes may stay unanswered. Together
# they take a minute: as fast as is usual in data centers, and slow enough to survive a hiccup of the network.
KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_COUNT = 3
# Seconds before the first probe while we wait for the peer's greeting. The kernel accepts whole seconds only.
GREETING_IDLE_S = 1
# Retransmissions of the same bytes without an answer. Five take some seven seconds on a fast network.
MAX_RETRANSMITS = 5
# Unanswered probes of a peer whose receive buffer was full, which ask whether it has room again. A host that is alive
# answers the first.
MAX_PROBES = 2


def enable_keepalive(sock: socket.socket, greeted: bool = True) -> None:
    """Turn keepalive on.

    Args:
        sock: a TCP socket.
        greeted: whether the peer has sent its greeting; until then, the kernel probes sooner.
    """
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
    """Return why the peer's host counts as gone, or None.

    Only for a socket with unacknowledged bytes; the kernel watches an idle one by itself.
    """
    info = read_tcp_info(sock)
    if info is None:
        return None
    if info.retransmits >= MAX_RETRANSMITS:
        return f"the peer's host does not answer: the same bytes were sent again {info.retransmits} times"
    if info.probes >= MAX_PROBES:
        return f"the peer's host does not answer: its buffer was full, we asked {info.probes} times in vain"
    return None


def round_trip_seconds(sock: socket.socket) -> float:
    """Return the round-trip time in seconds, as measured by the kernel; 0 where it does not tell."""
    info = read_tcp_info(sock)
    return 0.0 if info is None else info.round_trip_us / 1e6
