"""`Pump` for a socket that speaks TLS.

* A row counts as written when it is sealed: it will be sent like that, and no other way. What the socket does not take
  waits there, at most one seal of it, and `full` stands until it is gone.
* An interrupt may come between sealing, or opening, and the note of it, inside of OpenSSL's calls too. So what was to
  be sealed is noted before, and counts if anything lies there then that did not before. Of opened acks the buffer
  itself tells, which is all zeros otherwise.
* All that has arrived is opened at once: what OpenSSL has taken wakes nobody who polls. Who polls is woken by every
  record, since the kernel cannot know how many acks are in it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time

from echo_torch.errors import ConnectionClosedError
from echo_torch.metrics.timing import Latencies
from echo_torch.ring.ring import Ring
from echo_torch.wire.protocol import check_acks
from echo_torch.wire.tls_socket import MAX_ENCRYPT_BYTES, TlsSocket

from .pump import Pump


def pump_for(sock: socket.socket, ring: Ring, window: int, latencies: Latencies | None = None) -> Pump:
    """The kind of `Pump` that this socket needs."""
    return (TlsPump if isinstance(sock, TlsSocket) else Pump)(sock, ring, window, latencies)


class TlsPump(Pump):
    """As `Pump`, through a `TlsSocket`."""

    sock: TlsSocket

    def __init__(self, sock: socket.socket, ring: Ring, window: int, latencies: Latencies | None = None) -> None:
        super().__init__(sock, ring, window, latencies)
        self._sealed_before = 0  # when what `_sent` says was to be sealed
        self._opening = False

    def run(self, read_acks: bool, write_bytes: int) -> None:
        if self._opening or self._sent:  # of a caller who was interrupted
            self._take_acks()
            self._settle_seal()
        super().run(read_acks, write_bytes)

    def settle(self) -> None:
        with contextlib.suppress(OSError):
            self._settle_seal()
        super().settle()

    def _read_acks(self) -> None:
        sock = self.sock
        sock.receive_encrypted()
        while sock.has_undecrypted or self._opening:
            self._opening = True
            try:
                count = sock.decrypt_into(self._acks)
            except ssl.SSLWantReadError:
                self._opening = False
                break
            if not count:
                raise ConnectionClosedError("the peer closed the connection")
            self._count_acks(count)
        if sock.at_eof:
            raise ConnectionClosedError("the peer closed the connection")

    def _take_acks(self) -> None:
        count = len(self._acks.rstrip(b"\0")) if self._opening else 0
        if count:
            self._count_acks(count)

    def _count_acks(self, count: int) -> None:
        check_acks(self._acks, count, self.ring.written - self.acked)
        self.progress_at = time.monotonic()
        acked = self.acked + count
        settled = max(acked, self.ring.acked)
        zeros = bytes(count)
        # Nothing comes between the next four lines: see the rules of `pump`.
        self.acked = acked
        self.ring.acked = settled
        self._acks[:count] = zeros
        self._opening = False
        self.latencies.acked(acked, self.progress_at)

    def _write_rows(self, max_bytes: int) -> None:
        ring = self.ring
        while self._flush():
            limit = min(ring.ready, self.acked + self.window)  # as `writable` has it
            if max_bytes <= 0 or ring.written >= limit:
                return
            view = ring.written_view(self._partial, limit, min(max_bytes, MAX_ENCRYPT_BYTES))
            self._sealed_before = self.sock.unflushed_bytes
            self._sent.append(len(view))
            sealed = self.sock.encrypt(view)
            self._sent[0] = sealed
            max_bytes -= self._take_sent()

    def _flush(self) -> bool:
        try:
            self.full = not self.sock.flush()
        except OSError:
            self._read_acks()  # the peer may have acked before it hung up
            raise
        return not self.full

    def _settle_seal(self) -> None:
        """Of what was to be sealed when an interrupt came: all is, or nothing.

        Raises:
            ConnectionClosedError: neither, which OpenSSL does only if it is told that it may.
        """
        sealed = self.sock.unflushed_bytes - self._sealed_before
        if self._sent and not sealed:
            self._sent.clear()
        if self._sent and sealed <= self._sent[0]:
            raise ConnectionClosedError("an interrupt left nobody to know how much was written")
        self._take_sent()

    def _set_ack_mark(self) -> None:
        """The kernel counts bytes, and not acks."""
