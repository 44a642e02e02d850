"""`Pump` for a socket that speaks TLS.

* A row counts as written when it is sealed: it will be sent like that, and no other way. What the socket does not take
  waits there, at most one seal of it, and `socket_full` stands until it is gone.
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
from echo_torch.metrics.timing import LatencyHistogram
from echo_torch.ring.ring import Ring
from echo_torch.wire.protocol import check_acks
from echo_torch.wire.tls_socket import MAX_ENCRYPT_BYTES, TlsSocket

from .pump import Pump


def make_pump(sock: socket.socket, ring: Ring, window: int, latencies: LatencyHistogram | None = None) -> Pump:
    """The kind of `Pump` that this socket needs."""
    return (TlsPump if isinstance(sock, TlsSocket) else Pump)(sock, ring, window, latencies)


class TlsPump(Pump):
    """As `Pump`, through a `TlsSocket`."""

    sock: TlsSocket

    def __init__(self, sock: socket.socket, ring: Ring, window: int, latencies: LatencyHistogram | None = None) -> None:
        super().__init__(sock, ring, window, latencies)
        self._sealed_before = 0  # when what `_send_results` says was to be sealed
        self._decrypting = False

    def run(self, read_acks: bool, write_bytes: int) -> None:
        if self._decrypting or self._send_results:  # of a caller who was interrupted
            self._apply_received()
            self._recover_seal()
        super().run(read_acks, write_bytes)

    def recover(self) -> None:
        with contextlib.suppress(OSError):
            self._recover_seal()
        super().recover()

    def _read_acks(self) -> None:
        sock = self.sock
        sock.receive_encrypted()
        while sock.has_undecrypted or self._decrypting:
            self._decrypting = True
            try:
                count = sock.decrypt_into(self._ack_buffer)
            except ssl.SSLWantReadError:
                self._decrypting = False
                break
            if not count:
                raise ConnectionClosedError("the peer closed the connection")
            self._apply_acks(count)
        if sock.at_eof:
            raise ConnectionClosedError("the peer closed the connection")

    def _apply_received(self) -> None:
        count = len(self._ack_buffer.rstrip(b"\0")) if self._decrypting else 0
        if count:
            self._apply_acks(count)

    def _apply_acks(self, count: int) -> None:
        check_acks(self._ack_buffer, count, self.ring.written - self.acked)
        self.progress_at = time.monotonic()
        acked = self.acked + count
        settled = max(acked, self.ring.acked)
        zeros = bytes(count)
        # Nothing comes between the next four lines: see the rules of `pump`.
        self.acked = acked
        self.ring.acked = settled
        self._ack_buffer[:count] = zeros
        self._decrypting = False
        self.latencies.record_acked(acked, self.progress_at)

    def _write_rows(self, max_bytes: int) -> None:
        ring = self.ring
        while self._flush():
            limit = min(ring.ready, self.acked + self.window)  # as `has_writable_rows` has it
            if max_bytes <= 0 or ring.written >= limit:
                return
            view = ring.unwritten_view(self._partial_bytes, limit, min(max_bytes, MAX_ENCRYPT_BYTES))
            self._sealed_before = self.sock.unflushed_bytes
            self._send_results.append(len(view))
            sealed = self.sock.encrypt(view)
            self._send_results[0] = sealed
            max_bytes -= self._apply_sent()

    def _flush(self) -> bool:
        try:
            self.socket_full = not self.sock.flush()
        except OSError:
            self._read_acks()  # the peer may have acked before it hung up
            raise
        return not self.socket_full

    def _recover_seal(self) -> None:
        """Of what was to be sealed when an interrupt came: all is, or nothing.

        Raises:
            ConnectionClosedError: neither, which OpenSSL does only if it is told that it may.
        """
        sealed = self.sock.unflushed_bytes - self._sealed_before
        if self._send_results and not sealed:
            self._send_results.clear()
        if self._send_results and sealed <= self._send_results[0]:
            raise ConnectionClosedError("an interrupt left nobody to know how much was written")
        self._apply_sent()

    def _set_low_water_mark(self) -> None:
        """The kernel counts bytes, and not acks."""
