"""A socket that speaks TLS: what is sent over it is sealed first, and what arrives is opened.

OpenSSL works in memory here, and the socket stays one like any other, since ``ssl.SSLSocket`` would not do:

* It reads and writes in one go with encrypting, and looks for signals in between: an interrupt takes with it how many
  bytes were written, or read, which then cannot go on. In memory, sealing is told by what lies there afterwards, and no
  interrupt can come between taking bytes from one place and putting them into the next: that is done in C (`record`).
* A write that did not fit would have to be repeated with the same bytes.
* A copy of this socket in a forked child can send nothing, whatever is done to it: closing it closes a descriptor.

Nothing blocks. One thread at a time may call.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections import deque
from typing import Any

from echo_torch.errors import CertificateError, ConnectionClosedError, HandshakeError
from echo_torch.support.deadline import Deadline
from echo_torch.support.interrupts import record

from .keepalive import round_trip
from .poll import ready
from .protocol import MAGIC
from .tls import TLS, OtherNameError, refusal

NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)

# Most bytes of one seal, which may have to wait for the socket in memory. Each takes the GIL twice, and so does each
# system call, for which a thread waits if others are busy: hence not a record (16 KB) at a time.
SEAL_BYTES = 256 * 1024
# Read by one system call.
_READ_BYTES = 64 * 1024
# Seconds for the peer to speak first, before we do. A TLS server never does, but an echo server that was taken for one
# does at once, and would take our handshake for samples. To that is added what its words take from afar, and as much
# again for what delays them, in round trips.
SPEAKS_FIRST_S = 0.05
SPEAKS_FIRST_TRIPS = 2
# Seconds for what only says more of an error that is known.
_TELLING_S = 1.0


class TlsSocket(socket.socket):
    """One that is to speak TLS once it is connected (`secure`)."""

    _begun = False

    def begin(self, context: ssl.SSLContext, name: str, tls: TLS) -> None:
        """Begin to speak it.

        Raises:
            HandshakeError: ``name`` cannot be one.
        """
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name.partition("%")[0])
        except (TypeError, ValueError) as error:
            raise HandshakeError(f"no certificate can be for {name!r} ({error}); give server_name") from error
        self._asked_for = (tls, name)
        self.ended = False
        """Whether the peer sends no more."""
        self._leaving: deque[bytes] = deque()  # taken from `_outgoing`, and not sent as a whole
        self._sent: deque[int] = deque()  # what a system call sent of it
        self._sent_before = 0  # bytes of it that are sent
        self._begun = True

    @property
    def tls(self) -> ssl.SSLObject:
        return self._tls

    # Out.

    @property
    def sealed(self) -> int:
        """Bytes that were sealed since `flush` has taken any: moved by `seal`, and by answers to the peer."""
        return self._outgoing.pending

    def seal(self, data: memoryview) -> int:
        """Encrypt up to `SEAL_BYTES`; gives how many."""
        return self._tls.write(data)

    def flush(self) -> bool:
        """Send what is sealed; gives whether all of it is gone. What an interrupt broke off, the next call completes.

        Raises:
            OSError: the connection is lost.
        """
        self._note_sent()
        while self._leaving or self._outgoing.pending:
            if not self._leaving:
                record(self._leaving, self._outgoing.read, (-1,))
            try:
                record(self._sent, super().send, (memoryview(self._leaving[0])[self._sent_before :],), (NO_SIGNAL,))
            except BlockingIOError:
                return False
            self._note_sent()
        return True

    def _note_sent(self) -> None:
        if not self._sent:
            return
        sent = self._sent_before + self._sent[0]
        done = sent == len(self._leaving[0])
        leaving: deque[bytes] = deque() if done else self._leaving
        sent = 0 if done else sent
        nothing: deque[int] = deque()
        # Nothing comes between the next three lines.
        self._leaving = leaving
        self._sent_before = sent
        self._sent = nothing

    # In.

    @property
    def arrived(self) -> bool:
        """Whether bytes are there to be opened; fewer than a record, maybe."""
        return self._incoming.pending > 0

    def fetch(self) -> None:
        """Read what has arrived, unless as much lies in memory that nobody has opened.

        Raises:
            OSError: the connection is lost.
        """
        if self.ended or self._incoming.pending >= _READ_BYTES:
            return
        try:
            # Taken from the system and put into memory in one piece of C code.
            if not any(map(self._incoming.write, map(super().recv, (_READ_BYTES,)))):
                self.ended = True
                self._incoming.write_eof()
        except BlockingIOError:
            pass

    def open_into(self, buffer: bytearray) -> int:
        """Decrypt into ``buffer``; gives how many bytes, 0 at the peer's orderly end.

        Raises:
            ssl.SSLWantReadError: more has to arrive before that.
            ssl.SSLError: the connection is broken, or ended without a word.
        """
        return self._tls.read(len(buffer), buffer)  # type: ignore[return-value]

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As of any socket: BlockingIOError if nothing is there; b"" if the peer has hung up.

        Raises:
            HandshakeError, CertificateError: the server refuses us, as one of TLS 1.3 says only now.
        """
        self.fetch()
        try:
            data = self._tls.read(size)
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""
        except ssl.SSLError as error:
            refused = refusal(error, *self._asked_for)
            if refused is None:
                raise
            raise refused from error
        self.flush()
        return data

    # The end.

    def shutdown(self, how: int) -> None:
        """Say so to the peer, if that can be done at once; it could not tell the end from a cut otherwise."""
        if self._begun and not self._leaving and not self.sealed:
            with contextlib.suppress(OSError, ValueError):  # the peer has not said so yet, or all is broken already
                self._tls.unwrap()
            with contextlib.suppress(OSError):
                self.flush()
        super().shutdown(how)


def secure(sock: TlsSocket, tls: TLS, host: str, peer: str, deadline: Deadline) -> None:
    """Speak TLS over a socket that has just been connected, which stays open whatever comes.

    Raises:
        TimeoutError: the deadline passed.
        CertificateError: a certificate will not do, the server's or ours, or a file of ``tls``.
        HandshakeError: the server speaks no TLS, or none that we do.
        ConnectionClosedError: the peer hung up.
    """
    name = tls.server_name or host
    try:
        context = tls.context()
        _hear_first(sock, deadline)
        sock.begin(context, name, tls)
        while not _step(sock, tls, name):
            _wait(sock, peer, deadline)
    except OtherNameError as error:
        names = _names(sock, context, tls, name, deadline.within(_TELLING_S))
        what = f"its certificate is for {names or 'others'}, and not for {name!r}; connect to that, or give server_name"
        raise CertificateError(f"{peer}: {what}") from error.__cause__
    except HandshakeError as error:
        raise type(error)(f"{peer}: {error}") from error.__cause__
    except TimeoutError:
        raise
    except OSError as error:
        raise ConnectionClosedError(f"{peer} broke the connection off during the TLS handshake: {error}") from error


def _hear_first(sock: TlsSocket, deadline: Deadline) -> None:
    patience = SPEAKS_FIRST_S + SPEAKS_FIRST_TRIPS * round_trip(sock)
    if not ready(sock, select.POLLIN, deadline.within(patience)):
        return
    said = socket.socket.recv(sock, len(MAGIC))
    if not said:
        raise ConnectionClosedError("it hung up at once")
    if MAGIC.startswith(said):
        raise HandshakeError("the server speaks no TLS: it is a plain echo server; leave out tls=")
    raise HandshakeError(f"the server speaks no TLS: it begins with {said!r}")


def _step(sock: TlsSocket, tls: TLS, name: str) -> bool:
    """Go on with the handshake as far as bytes have arrived; gives whether it is complete."""
    sock.fetch()
    try:
        sock.tls.do_handshake()
        complete = True
    except ssl.SSLWantReadError:
        complete = False
    except ssl.SSLError as error:
        with contextlib.suppress(OSError):
            sock.flush()  # tells the server why
        refused = refusal(error, tls, name)
        if refused is None:
            raise
        raise refused from error
    return sock.flush() and complete


def _wait(sock: TlsSocket, peer: str, deadline: Deadline) -> None:
    event = select.POLLIN if sock.flush() else select.POLLIN | select.POLLOUT
    if not ready(sock, event, deadline) or deadline.expired:  # bytes that dribble in do not extend the deadline
        what = f"TLS handshake not complete within {deadline.timeout:g} s"
        raise TimeoutError(f"{peer}: {what}; does that server speak TLS?")


def _names(sock: TlsSocket, context: ssl.SSLContext, tls: TLS, name: str, deadline: Deadline) -> str:
    """Whom the server's certificate is for, to tell who asked for another; on a connection of its own, and no more.

    OpenSSL shows no certificate that it refused, so here it is verified but for the name.
    """
    context.check_hostname = False
    with TlsSocket(sock.family, sock.type) as other, contextlib.suppress(OSError, HandshakeError):
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            other.connect(sock.getpeername())
        if ready(other, select.POLLOUT, deadline):
            other.begin(context, name, tls)
            while not _step(other, tls, name):
                _wait(other, "", deadline)
            return names_in(other.tls)
    return ""


def names_in(tls: ssl.SSLObject) -> str:
    """Whom the peer's certificate is for."""
    found: Any = tls.getpeercert() or {}
    return ", ".join(name for _, name in found.get("subjectAltName", ()))
