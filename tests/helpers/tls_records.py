"""Makes TLS 1.3 records by hand, as RFC 8446 has them: key updates, which Python's ``ssl`` cannot send, and data."""

from __future__ import annotations

import ssl
import struct
from pathlib import Path

# A KeyUpdate that asks for one in return, and the types of what a record holds.
_KEY_UPDATE = bytes((24, 0, 0, 1, 1))
_HANDSHAKE, _DATA = bytes((22,)), bytes((23,))
_TAG_BYTES = 16


def log_secrets(context: ssl.SSLContext, file: Path) -> None:
    """Have a server's context write its secrets to ``file``, and send no records of its own after the handshake."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.keylog_filename = str(file)


class ServerRecords:
    """The records of a server after its last handshake, of which the secret is in ``file`` (`log_secrets`).

    The server's ``ssl`` object must have sent no data, and can send none any more.
    """

    def __init__(self, file: Path) -> None:
        secrets = [line.split()[2] for line in file.read_text().splitlines() if line.startswith("SERVER_TRAFFIC_")]
        self._use(bytes.fromhex(secrets[-1]))

    def key_update(self) -> bytes:
        """Return a record that changes the server's key, and wants the client to change its own."""
        record = self._seal(_KEY_UPDATE + _HANDSHAKE)
        self._use(self._expand("traffic upd", len(self._secret)))
        return record

    def data(self, data: bytes) -> bytes:
        return self._seal(data + _DATA)

    def _use(self, secret: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._secret = secret
        # The cipher that OpenSSL prefers: TLS_AES_256_GCM_SHA384.
        self._key = AESGCM(self._expand("key", 32))
        self._iv = int.from_bytes(self._expand("iv", 12), "big")
        self._sequence = 0

    def _seal(self, content: bytes) -> bytes:
        header = struct.pack("!BHH", 23, 0x0303, len(content) + _TAG_BYTES)
        nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        return header + self._key.encrypt(nonce, content, header)

    def _expand(self, label: str, length: int) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA384
        from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

        name = b"tls13 " + label.encode()
        info = struct.pack("!HB", length, len(name)) + name + b"\0"
        return HKDFExpand(SHA384(), length, info).derive(self._secret)
