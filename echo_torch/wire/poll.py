"""Waiting for a socket in pieces, so that a deadline that can be revoked is looked at often enough."""

from __future__ import annotations

import select
import socket

from echo_torch.support.deadline import POLL_INTERVAL_S, Deadline


def wait_ready(sock: socket.socket, event: int, deadline: Deadline) -> bool:
    """Wait for a socket; gives whether the event came before the deadline, which is looked at once at least."""
    poller = select.poll()
    poller.register(sock, event)
    while not poller.poll(min(deadline.remaining(), POLL_INTERVAL_S) * 1000):
        if deadline.expired:
            return False
    return True
