"""What Linux tells about one TCP connection: the option TCP_INFO, which fills in struct tcp_info of linux/tcp.h."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from typing import NamedTuple

# The fields in use, at their offsets: two single bytes, three times 32 bits, and two counters of 64 bits.
_FIELDS = struct.Struct("=2x2B20xI40xI72xI20x2Q")
# The request SIOCOUTQ has the number of this one.
_SIOCOUTQ = termios.TIOCOUTQ


class TcpInfo(NamedTuple):
    """The state of a connection, as the kernel sees it."""

    retransmits: int
    """How often the same bytes were sent again, without an answer."""
    probes: int
    """How often a peer with a full receive buffer was asked whether it has room, without an answer."""
    unacked_segments: int
    """Segments on their way: sent, and not acknowledged by the peer's kernel."""
    round_trip_us: int
    """Round-trip time in microseconds, smoothed."""
    unsent_bytes: int
    """Bytes in the socket's send buffer that are not on their way yet."""
    busy_us: int
    """Microseconds, since the connection opened, in which bytes were on their way or waited in the send buffer."""
    peer_full_us: int
    """The part of ``busy_us`` in which the peer's receive buffer was full, so that nothing could be sent."""


def read_tcp_info(sock: socket.socket) -> TcpInfo | None:
    """Return what the kernel tells about a connected socket, or None where it tells less: not on Linux, or before 4.10.

    Raises:
        OSError: the socket is closed.
    """
    if not hasattr(socket, "TCP_INFO"):
        return None
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _FIELDS.size)
    return TcpInfo._make(_FIELDS.unpack(info)) if len(info) == _FIELDS.size else None


def send_queue_bytes(sock: socket.socket) -> int:
    """Return how many bytes are in the socket's send buffer, on their way or not. Linux only.

    Raises:
        OSError: the socket is closed.
    """
    queued: int = struct.unpack("i", fcntl.ioctl(sock, _SIOCOUTQ, bytes(4)))[0]
    return queued
