"""Waits for a socket in short pieces, so that a `RevocableDeadline` is checked often enough."""

from __future__ import annotations

import select
import socket

from echo_torch.support.deadline import POLL_INTERVAL_S, Deadline


def wait_ready(sock: socket.socket, event: int, deadline: Deadline) -> bool:
    """Block until ``event`` comes at ``sock``; return False if the deadline expires first.

    Args:
        sock: any socket with a descriptor.
        event: ``select.POLLIN``, ``select.POLLOUT``, or both.
        deadline: polls at least once, even if it has expired.
    """
    poller = select.poll()
    poller.register(sock, event)
    while not poller.poll(min(deadline.remaining(), POLL_INTERVAL_S) * 1000):
        if deadline.expired:
            return False
    return True
