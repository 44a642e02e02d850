"""Every exception that echo_torch raises on its own account.

::

    ConnectionClosedError(ConnectionError)   closed, or the peer is gone
      ProtocolError                          the peer broke wire v1
    DeliveryTimeoutError(TimeoutError)       not acked in time; delivery goes on
    HandshakeError(ValueError)               not an echo server, or nonsense from one
      CertificateError                       TLS: the server's certificate will not do, or ours
    SpecMismatchError(ValueError)            two descriptions of one sample differ

Each takes one string and survives ``type(e)(str(e))`` and pickling, because DataLoader workers rebuild the exceptions
of a worker from its text alone. The counts are attributes, so that losing them never loses the message, which names
them too.

Refused and unreachable addresses stay what the operating system makes of them (``ConnectionRefusedError``,
``socket.gaierror``, ...), and running out of ``connect_timeout`` is a plain ``TimeoutError``.
"""

from __future__ import annotations

import logging

_log = logging.getLogger(__name__)


class _CountedError(Exception):
    """An exception that says what became of the samples.

    The counts are of the instance alone: Ray raises one that looks its cause's up only where its class has none.
    """

    unacked: int
    """Samples that were accepted by ``send`` and are not acknowledged: maybe stored, maybe lost."""

    rows_accepted: int
    """How many samples of the batch whose ``send`` raised were accepted before it did; those are its first ones."""

    rows_left: list[int] | None
    """Which samples of the batch were not accepted, if a function spread them over several learners: then
    ``rows_accepted`` says how many were, and not which."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.unacked = 0
        self.rows_accepted = 0
        self.rows_left = None


class ConnectionClosedError(_CountedError, ConnectionError):
    """The client was closed, or its peer is gone. Later calls raise it again, from the first failure."""


class ProtocolError(ConnectionClosedError):
    """The peer sent what wire version 1 does not allow; the connection was dropped."""


class DeliveryTimeoutError(_CountedError, TimeoutError):
    """A ``timeout`` passed, or nothing was acknowledged for ``stall_timeout``.

    Nothing is dropped and delivery goes on, unless it was ``close`` that ran out of time.
    """


class HandshakeError(ValueError):
    """What the peer said on accept is no echo handshake of wire version 1."""


class CertificateError(HandshakeError):
    """The server's certificate is refused here, or ours there, or a file of `TLS` cannot be used: nothing was sent."""


class SpecMismatchError(ValueError):
    """A server and an example, or a batch and an example, describe different samples."""

    rows_accepted: int = 0
    """Always 0: a batch is checked as a whole before any of it is sent."""


def raise_first(problems: list[Exception]) -> None:
    """Raise the first, if there is any, and log the others, when all steps of something were tried."""
    for text in map(str, problems[1:]):
        _log.warning("%s", text)
    try:
        if problems:
            raise problems[0]
    finally:
        problems.clear()  # their tracebacks hold the caller's frame, and with it what that holds
