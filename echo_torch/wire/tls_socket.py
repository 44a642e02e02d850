"""A socket that speaks TLS: what is sent over it is sealed first, and what arrives is opened.

OpenSSL works in memory here, and the socket stays one like any other, since ``ssl.SSLSocket`` would not do:

* It reads and writes in one go with encrypting, and looks for signals in between: an interrupt takes with it how many
  bytes were written, or read, which then cannot go on. In memory, sealing is told by what lies there afterwards, and no
  interrupt can come between taking bytes from one place and putting them into the next: that is done in C (`call_and_append`).
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
from echo_torch.support.interrupts import call_and_append

from .keepalive import round_trip_seconds
from .poll import wait_ready
from .protocol import MAGIC
from .tls import TLS, HostnameMismatchError, permanent_error

NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)

# Most bytes of one seal, which may have to wait for the socket in memory. Each takes the GIL twice, and so does each
# system call, for which a thread waits if others are busy: hence not a record (16 KB) at a time.
MAX_ENCRYPT_BYTES = 256 * 1024
# Read by one system call.
_READ_BYTES = 64 * 1024
# Seconds for the peer to speak first, before we do. A TLS server never does, but an echo server that was taken for one
# does at once, and would take our handshake for samples. To that is added what its words take from afar, and as much
# again for what delays them, in round trips.
GREETING_WAIT_S = 0.05
GREETING_WAIT_ROUND_TRIPS = 2
# Seconds for what only says more of an error that is known.
_READ_NAMES_S = 1.0


class TlsSocket(socket.socket):
    """One that is to speak TLS once it is connected (`do_tls_handshake`)."""

    _tls_started = False

    def start_tls(self, context: ssl.SSLContext, name: str, tls: TLS) -> None:
        """Begin to speak it.

        Raises:
            HandshakeError: ``name`` cannot be one.
        """
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self._ssl_object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name.partition("%")[0])
        except (TypeError, ValueError) as error:
            raise HandshakeError(f"no certificate can be for {name!r} ({error}); give server_name") from error
        self._handshake_arguments = (tls, name)
        self.at_eof = False
        """Whether the peer sends no more."""
        self._unsent: deque[bytes] = deque()  # taken from `_outgoing`, and not sent as a whole
        self._send_result: deque[int] = deque()  # what a system call sent of it
        self._unsent_offset = 0  # bytes of it that are sent
        self._tls_started = True

    @property
    def ssl_object(self) -> ssl.SSLObject:
        return self._ssl_object

    # Out.

    @property
    def unflushed_bytes(self) -> int:
        """Bytes that were sealed since `flush` has taken any: moved by `encrypt`, and by answers to the peer."""
        return self._outgoing.pending

    def encrypt(self, data: memoryview) -> int:
        """Encrypt up to `MAX_ENCRYPT_BYTES`; gives how many."""
        return self._ssl_object.write(data)

    def flush(self) -> bool:
        """Send what is sealed; gives whether all of it is gone. What an interrupt broke off, the next call completes.

        Raises:
            OSError: the connection is lost.
        """
        self._account_for_sent()
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                call_and_append(self._unsent, self._outgoing.read, (-1,))
            try:
                call_and_append(
                    self._send_result, super().send, (memoryview(self._unsent[0])[self._unsent_offset :],), (NO_SIGNAL,)
                )
            except BlockingIOError:
                return False
            self._account_for_sent()
        return True

    def _account_for_sent(self) -> None:
        if not self._send_result:
            return
        sent = self._unsent_offset + self._send_result[0]
        done = sent == len(self._unsent[0])
        unsent: deque[bytes] = deque() if done else self._unsent
        sent = 0 if done else sent
        nothing: deque[int] = deque()
        # Nothing comes between the next three lines.
        self._unsent = unsent
        self._unsent_offset = sent
        self._send_result = nothing

    # In.

    @property
    def has_undecrypted(self) -> bool:
        """Whether bytes are there to be opened; fewer than a record, maybe."""
        return self._incoming.pending > 0

    def receive_encrypted(self) -> None:
        """Read what has arrived, unless as much lies in memory that nobody has opened.

        Raises:
            OSError: the connection is lost.
        """
        if self.at_eof or self._incoming.pending >= _READ_BYTES:
            return
        try:
            # Taken from the system and put into memory in one piece of C code.
            if not any(map(self._incoming.write, map(super().recv, (_READ_BYTES,)))):
                self.at_eof = True
                self._incoming.write_eof()
        except BlockingIOError:
            pass

    def decrypt_into(self, buffer: bytearray) -> int:
        """Decrypt into ``buffer``; gives how many bytes, 0 at the peer's orderly end.

        Raises:
            ssl.SSLWantReadError: more has to arrive before that.
            ssl.SSLError: the connection is broken, or ended without a word.
        """
        return self._ssl_object.read(len(buffer), buffer)  # type: ignore[return-value]

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As of any socket: BlockingIOError if nothing is there; b"" if the peer has hung up.

        Raises:
            HandshakeError, CertificateError: the server refuses us, as one of TLS 1.3 says only now.
        """
        self.receive_encrypted()
        try:
            data = self._ssl_object.read(size)
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""
        except ssl.SSLError as error:
            permanent = permanent_error(error, *self._handshake_arguments)
            if permanent is None:
                raise
            raise permanent from error
        self.flush()
        return data

    # The end.

    def shutdown(self, how: int) -> None:
        """Say so to the peer, if that can be done at once; it could not tell the end from a cut otherwise."""
        if self._tls_started and not self._unsent and not self.unflushed_bytes:
            with contextlib.suppress(OSError, ValueError):  # the peer has not said so yet, or all is broken already
                self._ssl_object.unwrap()
            with contextlib.suppress(OSError):
                self.flush()
        super().shutdown(how)


def do_tls_handshake(sock: TlsSocket, tls: TLS, host: str, peer: str, deadline: Deadline) -> None:
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
        _check_no_greeting(sock, deadline)
        sock.start_tls(context, name, tls)
        while not _advance_handshake(sock, tls, name):
            _wait_for_peer(sock, peer, deadline)
    except HostnameMismatchError as error:
        names = _fetch_certificate_names(sock, context, tls, name, deadline.within(_READ_NAMES_S))
        what = f"its certificate is for {names or 'others'}, and not for {name!r}; connect to that, or give server_name"
        raise CertificateError(f"{peer}: {what}") from error.__cause__
    except HandshakeError as error:
        raise type(error)(f"{peer}: {error}") from error.__cause__
    except TimeoutError:
        raise
    except OSError as error:
        raise ConnectionClosedError(f"{peer} broke the connection off during the TLS handshake: {error}") from error


def _check_no_greeting(sock: TlsSocket, deadline: Deadline) -> None:
    wait_s = GREETING_WAIT_S + GREETING_WAIT_ROUND_TRIPS * round_trip_seconds(sock)
    if not wait_ready(sock, select.POLLIN, deadline.within(wait_s)):
        return
    first_bytes = socket.socket.recv(sock, len(MAGIC))
    if not first_bytes:
        raise ConnectionClosedError("it hung up at once")
    if MAGIC.startswith(first_bytes):
        raise HandshakeError("the server speaks no TLS: it is a plain echo server; leave out tls=")
    raise HandshakeError(f"the server speaks no TLS: it begins with {first_bytes!r}")


def _advance_handshake(sock: TlsSocket, tls: TLS, name: str) -> bool:
    """Go on with the handshake as far as bytes have arrived; gives whether it is complete."""
    sock.receive_encrypted()
    try:
        sock.ssl_object.do_handshake()
        complete = True
    except ssl.SSLWantReadError:
        complete = False
    except ssl.SSLError as error:
        with contextlib.suppress(OSError):
            sock.flush()  # tells the server why
        permanent = permanent_error(error, tls, name)
        if permanent is None:
            raise
        raise permanent from error
    return sock.flush() and complete


def _wait_for_peer(sock: TlsSocket, peer: str, deadline: Deadline) -> None:
    event = select.POLLIN if sock.flush() else select.POLLIN | select.POLLOUT
    if not wait_ready(sock, event, deadline) or deadline.expired:  # bytes that dribble in do not extend the deadline
        what = f"TLS handshake not complete within {deadline.timeout:g} s"
        raise TimeoutError(f"{peer}: {what}; does that server speak TLS?")


def _fetch_certificate_names(sock: TlsSocket, context: ssl.SSLContext, tls: TLS, name: str, deadline: Deadline) -> str:
    """Whom the server's certificate is for, to tell who asked for another; on a connection of its own, and no more.

    OpenSSL shows no certificate that it refused, so here it is verified but for the name.
    """
    context.check_hostname = False
    with TlsSocket(sock.family, sock.type) as other, contextlib.suppress(OSError, HandshakeError):
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            other.connect(sock.getpeername())
        if wait_ready(other, select.POLLOUT, deadline):
            other.start_tls(context, name, tls)
            while not _advance_handshake(other, tls, name):
                _wait_for_peer(other, "", deadline)
            return certificate_names(other.ssl_object)
    return ""


def certificate_names(tls: ssl.SSLObject) -> str:
    """Whom the peer's certificate is for."""
    found: Any = tls.getpeercert() or {}
    return ", ".join(name for _, name in found.get("subjectAltName", ()))
