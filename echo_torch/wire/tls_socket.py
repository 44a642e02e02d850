"""A socket that speaks TLS. OpenSSL encrypts and decrypts in memory, and plain system calls move the encrypted bytes.

``ssl.SSLSocket`` does not work for us:

* It encrypts and writes in one call, and runs signal handlers in between. An interrupt there loses the count of bytes
  that were written or read, so the connection cannot continue. Here, OpenSSL writes to a buffer in memory, and the size
  of the buffer tells how much it has encrypted. C code moves bytes from one place to the next (`call_and_append`), so
  no interrupt comes between.
* If the kernel does not take all bytes, you have to repeat the same write. Here, the bytes wait in memory.
* A forked child must drop its copy without sending anything. Closing this socket only closes a descriptor.

Nothing here blocks, except the handshake, which waits until its deadline. Only one thread at a time may use a socket.
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

# With this flag, ``send`` on a closed connection raises an error and sends no SIGPIPE.
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)

# The most bytes to pass to one call of `encrypt`. They may have to wait in memory for the socket. The limit is larger
# than one TLS record (16 KB), so that there are fewer calls. Each encryption and each system call takes the GIL twice,
# and waits for it while other threads are busy.
MAX_ENCRYPT_BYTES = 256 * 1024
# The most bytes that one system call reads.
_READ_BYTES = 64 * 1024
# The most bytes that a peer may send before data comes: more than its certificates, its session tickets and one record.
# A flood of key updates, of which each costs us new keys and perhaps an answer, ends there.
MAX_BYTES_WITHOUT_DATA = 256 * 1024
# The most encrypted bytes that may wait for a peer that does not read: one `encrypt`, and as much again for OpenSSL's
# answers to that peer.
MAX_UNFLUSHED_BYTES = 2 * MAX_ENCRYPT_BYTES
# Before our TLS handshake, we wait for a greeting: this many seconds plus this many round trips. A TLS server sends no
# greeting. A plain echo server sends one at once, and would read our TLS handshake as samples. One round trip is for
# the greeting's way here, and one is for delays.
GREETING_WAIT_S = 0.05
GREETING_WAIT_ROUND_TRIPS = 2
# Seconds for a second connection that only adds details to an error.
_READ_NAMES_S = 1.0


class TlsSocket(socket.socket):
    """A TCP socket that speaks TLS after `do_tls_handshake`.

    Connect it before the handshake. Until the handshake, and in all methods not defined below, it is a plain socket.
    """

    # Whether `init_tls` has set OpenSSL up.
    _tls_initialized = False

    def init_tls(self, context: ssl.SSLContext, name: str, tls: TLS) -> None:
        """Set up OpenSSL in memory. Sends nothing yet.

        Args:
            context: made by ``tls.context()``.
            name: the name or IP address that the server's certificate must be for.
            tls: the user's settings, for messages.

        Raises:
            HandshakeError: no certificate can be for ``name``.
        """
        # Two buffers of encrypted bytes: received ones to decrypt, and ones to send that `flush` has not taken yet.
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        # OpenSSL's state. It reads from the first buffer and writes to the second.
        try:
            self._ssl_object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name.partition("%")[0])
        except (TypeError, ValueError) as error:
            raise HandshakeError(f"no certificate can be for {name!r} ({error}); give server_name") from error
        # What `permanent_error` needs to explain an error.
        self._handshake_arguments = (tls, name)
        # Whether the peer sends no more.
        self.at_eof = False
        # At most one piece, taken from `_outgoing` and not sent completely.
        self._unsent: deque[bytes] = deque()
        # How many bytes of that piece the last system call sent. Empty as soon as `_unsent_offset` includes them.
        self._send_result: deque[int] = deque()
        # How many bytes of that piece are sent.
        self._unsent_offset = 0
        # Bytes received since there was data; an interrupt may lose some of the count.
        self._bytes_without_data = 0
        self._tls_initialized = True

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """OpenSSL's state, to ask for the version or the certificate."""
        return self._ssl_object

    # Sending.

    @property
    def outgoing_pending(self) -> int:
        """How many encrypted bytes `flush` has not taken yet.

        `encrypt` adds to them, and so do OpenSSL's answers to the peer.
        """
        return self._outgoing.pending

    def encrypt(self, data: memoryview) -> int:
        """Encrypt ``data`` for `flush` to send; return how many bytes it took. Pass at most `MAX_ENCRYPT_BYTES`."""
        return self._ssl_object.write(data)

    def flush(self) -> bool:
        """Send all encrypted bytes that the kernel takes; return whether none are left.

        If an interrupt ends a call, the next call continues where it stopped.

        Raises:
            OSError: the connection is lost.
        """
        # In the last call, an interrupt may have come between the system call and the counting.
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
        """Add the last system call's result to the offset, and drop the piece if it is sent completely."""
        if not self._send_result:
            return
        sent = self._unsent_offset + self._send_result[0]
        done = sent == len(self._unsent[0])
        unsent: deque[bytes] = deque() if done else self._unsent
        sent = 0 if done else sent
        no_result: deque[int] = deque()
        # Nothing comes between the next three lines. They call nothing, so no interrupt strikes there.
        self._unsent = unsent
        self._unsent_offset = sent
        self._send_result = no_result

    # Receiving.

    @property
    def has_undecrypted(self) -> bool:
        """Whether there are received bytes to decrypt. They may be less than a TLS record."""
        return self._incoming.pending > 0

    def receive_encrypted(self) -> None:
        """Read from the kernel what has arrived. Does nothing while enough received bytes wait to be decrypted.

        Raises:
            OSError: the connection is lost.
            ConnectionClosedError: the peer sends records without end and no data, or does not read our answers.
        """
        if self._bytes_without_data > MAX_BYTES_WITHOUT_DATA:
            raise ConnectionClosedError(f"the peer sent {self._bytes_without_data} bytes of TLS records without data")
        if self._outgoing.pending > MAX_UNFLUSHED_BYTES:
            raise ConnectionClosedError(f"the peer left {self._outgoing.pending} bytes of TLS records unread")
        if self.at_eof or self._incoming.pending >= _READ_BYTES:
            return
        pending = self._incoming.pending
        try:
            # The `map`s move the bytes from the kernel into memory in C, so no interrupt can lose them.
            if not any(map(self._incoming.write, map(super().recv, (_READ_BYTES,)))):
                self.at_eof = True
                self._incoming.write_eof()
        except BlockingIOError:
            pass
        self._bytes_without_data += self._incoming.pending - pending

    def decrypt_into(self, buffer: bytearray) -> int:
        """Decrypt received bytes into ``buffer``; return how many, or 0 if the peer has closed TLS properly.

        Raises:
            ssl.SSLWantReadError: no complete record is there.
            ssl.SSLError: the connection is broken, or the peer hung up without closing TLS.
        """
        count: int = self._ssl_object.read(len(buffer), buffer)  # type: ignore[assignment]
        self._bytes_without_data = 0
        return count

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return up to ``size`` decrypted bytes, or ``b""`` if the peer has hung up. Ignores ``flags``.

        Raises:
            BlockingIOError: nothing is there.
            HandshakeError, CertificateError: the server refuses us. With TLS 1.3, it tells us only after the handshake.
            OSError: the connection is lost.
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
        self._bytes_without_data = 0
        # Reading may have made OpenSSL answer the peer.
        self.flush()
        return data

    # Closing.

    def shutdown(self, how: int) -> None:
        """Send TLS's closing alert (close_notify) if the kernel takes it at once, and shut the socket down.

        Without the alert, the peer cannot tell a proper end from a lost connection.
        """
        # Send the alert only if nothing else waits to be sent: it must come after all data.
        if self._tls_initialized and not self._unsent and not self.outgoing_pending:
            # `unwrap` raises if the peer has not closed its side yet, or if the connection is broken. Ignore both.
            with contextlib.suppress(OSError, ValueError):
                self._ssl_object.unwrap()
            with contextlib.suppress(OSError):
                self.flush()
        super().shutdown(how)


def do_tls_handshake(sock: TlsSocket, tls: TLS, host: str, peer: str, deadline: Deadline) -> None:
    """Complete the TLS handshake on a socket that has just been connected. Never closes the socket.

    Args:
        sock: connected, non-blocking.
        tls: the user's settings.
        host: the host that the socket is connected to; the certificate must be for it unless ``tls`` says otherwise.
        peer: the peer's name, for messages.
        deadline: covers all of this.

    Raises:
        TimeoutError: the deadline passed.
        CertificateError: one side refuses the other's certificate, or a file of ``tls`` is not usable.
        HandshakeError: the server does not speak TLS, or none of the versions that we speak.
        ConnectionClosedError: the peer hung up.
    """
    name = tls.server_name or host
    try:
        context = tls.context()
        _check_no_greeting(sock, deadline)
        sock.init_tls(context, name, tls)
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
    """Raise HandshakeError if the server speaks first. Only a server without TLS does."""
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
    """Take the handshake as far as the received bytes allow; return whether it is complete."""
    sock.receive_encrypted()
    try:
        sock.ssl_object.do_handshake()
        complete = True
    except ssl.SSLWantReadError:
        complete = False
    except ssl.SSLError as error:
        with contextlib.suppress(OSError):
            sock.flush()  # sends the alert that tells the server why
        permanent = permanent_error(error, tls, name)
        if permanent is None:
            raise
        raise permanent from error
    # Flush in any case. The handshake is complete only when our last bytes are sent. If it is not, the caller waits for
    # an answer to these bytes.
    return sock.flush() and complete


def _wait_for_peer(sock: TlsSocket, peer: str, deadline: Deadline) -> None:
    """Block until the handshake can continue, or raise TimeoutError."""
    event = select.POLLIN if sock.flush() else select.POLLIN | select.POLLOUT
    # Bytes that trickle in do not extend the deadline.
    if not wait_ready(sock, event, deadline) or deadline.expired:
        what = f"TLS handshake not complete within {deadline.timeout:g} s"
        raise TimeoutError(f"{peer}: {what}; does that server speak TLS?")


def _fetch_certificate_names(sock: TlsSocket, context: ssl.SSLContext, tls: TLS, name: str, deadline: Deadline) -> str:
    """Return the names that the server's certificate is for, or an empty string if they cannot be read.

    OpenSSL does not show a certificate that it has refused. So this opens a second connection, which verifies all but
    the name, and closes it after the handshake.
    """
    context.check_hostname = False
    with TlsSocket(sock.family, sock.type) as other, contextlib.suppress(OSError, HandshakeError):
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            other.connect(sock.getpeername())
        if wait_ready(other, select.POLLOUT, deadline):
            other.init_tls(context, name, tls)
            while not _advance_handshake(other, tls, name):
                _wait_for_peer(other, "", deadline)
            return certificate_names(other.ssl_object)
    return ""


def certificate_names(ssl_object: ssl.SSLObject) -> str:
    """Return the names and addresses that the peer's certificate is for, separated by commas."""
    certificate: Any = ssl_object.getpeercert() or {}
    return ", ".join(name for _, name in certificate.get("subjectAltName", ()))
