"""Every exception class of echo_torch.

::

    ConnectionClosedError(ConnectionError)   closed, or the peer is gone
      ProtocolError                          the peer broke wire version 1
    DeliveryTimeoutError(TimeoutError)       not acked in time; delivery goes on
    HandshakeError(ValueError)               not an echo server, or nonsense from one
      CertificateError                       TLS: a certificate was refused, the server's or yours
    SpecMismatchError(ValueError)            two descriptions of one sample differ

* Each takes one string and survives ``type(e)(str(e))`` and pickling, because a DataLoader rebuilds the exception of a
  worker from its text alone.
* That loses the counts, which are attributes. So the message names them, too.
* An address that refuses or cannot be reached raises what the operating system says (``ConnectionRefusedError``,
  ``socket.gaierror``, ...). Running out of ``connect_timeout`` raises a plain ``TimeoutError``.
"""

from __future__ import annotations

import logging

_log = logging.getLogger(__name__)


class _CountedError(Exception):
    """An exception that says what became of the samples."""

    # Samples that `send` accepted and that are not acknowledged: maybe stored, maybe lost.
    unacked: int

    # How many samples of the batch `send` accepted before it raised: its first ones, unless `rows_left` is set.
    rows_accepted: int

    # Which samples of the batch were not accepted, by index, if a ``route`` function spread them over several learners;
    # None otherwise.
    rows_left: list[int] | None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        # On the instance only: Ray's wrapper asks its cause for an attribute only if its own class does not have it.
        self.unacked = 0
        self.rows_accepted = 0
        self.rows_left = None


class ConnectionClosedError(_CountedError, ConnectionError):
    """The client was closed, or its peer is gone.

    Every later call raises it again, with the first failure as its cause.
    """


class LearnerGoneError(ConnectionClosedError):
    """The learner has finished: it ended the connection in order, and nobody listens at its address any more."""


class ProtocolError(ConnectionClosedError):
    """The peer sent something that wire version 1 does not allow. The connection was dropped."""


class DeliveryTimeoutError(_CountedError, TimeoutError):
    """A ``timeout`` passed, or nothing was acknowledged for ``stall_timeout``.

    Nothing is dropped and delivery goes on, unless `close` raised it.
    """


class HandshakeError(ValueError):
    """The peer's first bytes are no echo handshake of wire version 1."""


class CertificateError(HandshakeError):
    """A certificate was refused, the server's or yours, or a file of `TLS` cannot be used. Nothing was sent."""


class SpecMismatchError(ValueError):
    """A server and an example, or a batch and an example, describe different samples."""

    # Always 0: `send` checks the whole batch before it sends any of it.
    rows_accepted: int = 0


def raise_first(problems: list[Exception]) -> None:
    """Raise the first of ``problems``, if there is one, and log the others; the list is empty afterwards."""
    for text in map(str, problems[1:]):
        _log.warning("%s", text)
    try:
        if problems:
            raise problems[0]
    finally:
        problems.clear()  # their tracebacks hold the caller's frame and everything in it
