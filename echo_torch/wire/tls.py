"""The settings for TLS to a proxy in front of the learner, and OpenSSL's errors in plain words.

* We always verify the proxy's certificate. No option turns that off.
* The process that opens a connection reads the files when it opens it. So a `TLS` pickles, and each machine has its own
  files. A relative path counts from that process's current directory. The next connection sees a renewed certificate.
* An error that another try cannot fix becomes a HandshakeError or CertificateError. All others stay errors of the
  connection, and `connect` or a reconnect may try again.
"""

from __future__ import annotations

import dataclasses
import os
import ssl
from typing import Any, NoReturn

from echo_torch.errors import CertificateError, HandshakeError

# OpenSSL's codes for a server certificate that it refuses: X509_V_ERR_* of openssl/x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNTRUSTED = {2, 18, 19, 20, 21}
_HOSTNAME_MISMATCH = {62, 64}
# OpenSSL's reasons, or the peer's alerts, if the peer sends something that is not TLS.
_NO_TLS = {"WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}
# Parts of the alerts with which the peer refuses our certificate, or asks for one.
_CLIENT_CERTIFICATE_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")
# The peer speaks only versions older than TLS 1.2.
_OLD_TLS = {"TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL"}
# The alert of a server with a problem of its own, which may pass.
_SERVER_ERROR = "ALERT_INTERNAL_ERROR"
# All that a TLS 1.2 server says if it wants a client certificate and gets none.
_HANDSHAKE_FAILURE = "HANDSHAKE_FAILURE"


@dataclasses.dataclass(frozen=True)
class TLS:
    """Settings for TLS 1.2 or later to a proxy in front of the learner (stunnel, haproxy, ...).

    The proxy's certificate is always verified. The process that opens a connection reads the files when it opens it, so
    a relative path counts from that process's current directory.

    Args:
        ca_file: PEM file of the CA that issued the proxy's certificate, or of that certificate itself if it is
            self-signed. None to accept the CAs that the operating system trusts.
        cert_file: PEM file of your client certificate, with the intermediate certificates that the proxy needs to
            verify it. None if the proxy asks for no certificate.
        key_file: PEM file of the certificate's private key, without a passphrase. None if ``cert_file`` contains it.
        server_name: the name or IP address that the proxy's certificate must be for. None for the host that you
            connect to.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is empty, or there is a ``key_file`` without a ``cert_file``.
    """

    ca_file: str | os.PathLike[str] | None = None
    cert_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = str if field.name == "server_name" else (str, os.PathLike)
            if value is not None and not isinstance(value, kinds):
                expected = "a name" if field.name == "server_name" else "a path"
                raise TypeError(f"{field.name}: got {value!r}, expected {expected}")
            if value is not None and not os.fspath(value):
                raise ValueError(f"{field.name}: got {value!r}, expected None or something")
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file: got one without a cert_file")

    def context(self) -> ssl.SSLContext:
        """Read the files and return a new OpenSSL context.

        Raises:
            TLSFileError: a file cannot be read, or does not contain what it should. Names the file.
        """
        # This kind of context verifies certificates and names.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # If the peer could renegotiate, a write might have to wait for something to read.
        context.options |= ssl.OP_NO_RENEGOTIATION
        if self.ca_file is None:
            context.load_default_certs()
        else:
            self._load_ca(context, self.ca_file)
        if self.cert_file is not None:
            self._load_client_certificate(context, self.cert_file)
        return context

    def _load_ca(self, context: ssl.SSLContext, path: str | os.PathLike[str]) -> None:
        _check_readable("ca_file", path)
        try:
            context.load_verify_locations(path)
        except ssl.SSLError as error:
            raise TLSFileError(f"ca_file {os.fspath(path)}: no certificate in PEM ({error.reason})") from error

    def _load_client_certificate(self, context: ssl.SSLContext, path: str | os.PathLike[str]) -> None:
        files = f"cert_file {os.fspath(path)}"
        _check_readable("cert_file", path)
        if self.key_file is not None:
            _check_readable("key_file", self.key_file)
            files += f", key_file {os.fspath(self.key_file)}"
        try:
            context.load_cert_chain(path, self.key_file, _refuse_passphrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise TLSFileError(f"{files}: the key is not that of the certificate") from error
            what = f"not a certificate and its private key in PEM ({error.reason})"
            raise TLSFileError(f"{files}: {what}") from error
        except _EncryptedKeyError as error:
            raise TLSFileError(f"{files}: the key needs a passphrase; give one that needs none") from error


def check_tls(tls: Any) -> TLS | None:
    """Return ``tls``; raise TypeError unless it is a `TLS` or None."""
    if tls is not None and not isinstance(tls, TLS):
        raise TypeError(f"tls: got {tls!r}, expected None or a TLS, such as TLS(ca_file='ca.pem')")
    return tls


class _EncryptedKeyError(Exception):
    """The private key needs a passphrase."""


def _refuse_passphrase() -> NoReturn:
    """Raise instead of asking for the passphrase of a key.

    Without this, OpenSSL would ask at the terminal, where nobody may sit.
    """
    raise _EncryptedKeyError


def _check_readable(name: str, path: str | os.PathLike[str]) -> None:
    """Open the file once, because OpenSSL does not say which file it misses.

    Raises:
        TLSFileError: the file cannot be read; names the argument and the path.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise TLSFileError(f"{name} {os.fspath(path)}: {error.strerror}") from error


class TLSFileError(CertificateError):
    """A file of `TLS` cannot be used, or two of them do not belong together.

    Internal: a reconnect tries again, because the files may just be being replaced.
    """


class HostnameMismatchError(CertificateError):
    """The server's certificate is valid, but for another name.

    Internal: `do_tls_handshake` turns it into a CertificateError that says which names.
    """


def permanent_error(error: ssl.SSLError, tls: TLS, name: str) -> HandshakeError | None:
    """Return the error to raise if another try cannot succeed; None if the connection only broke.

    Args:
        error: what OpenSSL raised.
        tls: the user's settings, for the remedies in the message.
        name: the name that the certificate had to be for.
    """
    # We refuse the server's certificate.
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _HOSTNAME_MISMATCH:
            return HostnameMismatchError(f"its certificate is not for {name!r}")
        return CertificateError(_server_certificate_problem(error, tls))
    reason = error.reason or ""
    # The server refuses ours, or misses it.
    if any(part in reason for part in _CLIENT_CERTIFICATE_ALERTS):
        return CertificateError(_client_certificate_problem(reason, tls))
    if reason in _NO_TLS:
        return HandshakeError("the server speaks no TLS; if it is a plain echo server, leave out tls=")
    if reason in _OLD_TLS:
        return HandshakeError(f"the server speaks no TLS 1.2 or later ({reason})")
    # The connection broke, or the server has a problem of its own: both may pass.
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)) or _SERVER_ERROR in reason:
        return None
    if _HANDSHAKE_FAILURE in reason and tls.cert_file is None:
        reason += "; it may want a client certificate: give cert_file and key_file"
    return HandshakeError(f"TLS failed: {reason or error}")


def _server_certificate_problem(error: ssl.SSLCertVerificationError, tls: TLS) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "its certificate, or that of its CA, has expired"
    if code == _NOT_YET_VALID:
        return "its certificate is not valid yet; is the clock of one of the machines wrong?"
    if code in _UNTRUSTED:
        trusted = "the operating system trusts" if tls.ca_file is None else f"is in ca_file {os.fspath(tls.ca_file)}"
        return f"its certificate was not issued by a CA that {trusted} ({error.verify_message})"
    return f"its certificate is refused: {error.verify_message}"


def _client_certificate_problem(reason: str, tls: TLS) -> str:
    if tls.cert_file is None:
        return f"the server wants a client certificate; give cert_file and key_file ({reason})"
    return f"the server refuses the client certificate of cert_file {os.fspath(tls.cert_file)} ({reason})"
