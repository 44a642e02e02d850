"""`Pump` for a socket that speaks TLS.

* A row counts as written when it is encrypted: it can then be sent in no other way. What the socket does not take stays
  in memory, the result of one `encrypt` at the most, and ``socket_full`` stays set until it is sent.
* Ctrl-C can strike between encrypting and recording it, also inside OpenSSL's calls. So the size is recorded before
  `encrypt`. It counts if encrypted bytes are in memory afterwards that were not there before.
* The same holds for decrypting acks. There the buffer itself is the record: it is all zeros but for acks that the
  counters do not contain yet.
* Everything that has arrived is decrypted at once, because bytes inside OpenSSL do not wake a poll.
* Every TLS record wakes a poll, because the kernel cannot know how many acks it holds.
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
    """Return a `TlsPump` for a `TlsSocket`, and a `Pump` for any other socket; arguments as for `Pump`."""
    return (TlsPump if isinstance(sock, TlsSocket) else Pump)(sock, ring, window, latencies)


class TlsPump(Pump):
    """A `Pump` that encrypts rows and decrypts acks; see the module's rules."""

    # The socket; this object does not close it.
    sock: TlsSocket

    def __init__(self, sock: socket.socket, ring: Ring, window: int, latencies: LatencyHistogram | None = None) -> None:
        super().__init__(sock, ring, window, latencies)
        # Encrypted bytes in memory just before the `encrypt` that `_send_results` records.
        self._outgoing_before = 0
        # Whether the ack buffer may hold acks that the counters do not contain.
        self._decrypting = False

    def run(self, read_acks: bool, write_bytes: int) -> None:
        if self._decrypting or self._send_results:  # a caller was interrupted
            self._apply_received()
            self._recover_encrypted()
        super().run(read_acks, write_bytes)

    def recover(self) -> None:
        with contextlib.suppress(OSError):
            self._recover_encrypted()
        super().recover()

    def _read_acks(self) -> None:
        sock = self.sock
        sock.receive_encrypted()
        while sock.has_undecrypted or self._decrypting:
            # Set before `decrypt_into`: after an interrupt there, `_apply_received` looks into the buffer.
            self._decrypting = True
            try:
                count = sock.decrypt_into(self._ack_buffer)
            except ssl.SSLWantReadError:
                self._decrypting = False
                break
            if not count:
                self._raise_ended()
            self._apply_acks(count)
        if sock.at_eof:
            self._raise_ended()

    def _apply_received(self) -> None:
        """Add the acks that an interrupt left in the buffer to the counters; an ack is never a zero byte."""
        count = len(self._ack_buffer.rstrip(b"\0")) if self._decrypting else 0
        if count:
            self._apply_acks(count)

    def _apply_acks(self, count: int) -> None:
        check_acks(self._ack_buffer, count, self.ring.written - self.acked)
        self.progress_at = time.monotonic()
        acked = self.acked + count
        settled = max(acked, self.ring.acked)
        zeros = bytes(count)
        # Nothing comes between the next four lines: see the rules of `pump`. `zeros` is made before, since making it is
        # a call.
        self.acked = acked
        self.ring.acked = settled
        self._ack_buffer[:count] = zeros
        self._decrypting = False
        self.latencies.record_acked(acked, self.progress_at)

    def _write_rows(self, max_bytes: int) -> None:
        ring = self.ring
        while self._flush():
            limit = min(ring.ready, self.acked + self.window)  # the same as in `has_writable_rows`
            if max_bytes <= 0 or ring.written >= limit:
                return
            view = ring.unwritten_view(self._partial_bytes, limit, min(max_bytes, MAX_ENCRYPT_BYTES))
            # Record the intent before the call: after an interrupt, `_recover_encrypted` finds out what happened.
            self._outgoing_before = self.sock.outgoing_pending
            self._send_results.append(len(view))
            encrypted = self.sock.encrypt(view)
            self._send_results[0] = encrypted
            max_bytes -= self._apply_sent()

    def _flush(self) -> bool:
        """Send what is encrypted; return whether all of it is sent."""
        try:
            self.socket_full = not self.sock.flush()
        except OSError:
            # The peer may have sent acks before it closed the connection. They save rows from being sent again.
            self._read_acks()
            raise
        return not self.socket_full

    def _recover_encrypted(self) -> None:
        """Find out whether OpenSSL encrypted the bytes of an interrupted `encrypt`: all of them, or none.

        Raises:
            ConnectionClosedError: some of them, which OpenSSL does only in a mode that nothing here enables.
        """
        encrypted = self.sock.outgoing_pending - self._outgoing_before
        # No new bytes: the interrupt came before the encryption.
        if self._send_results and not encrypted:
            self._send_results.clear()
        # Records are longer than the bytes that they hold. No more bytes than that means that some are missing.
        if self._send_results and encrypted <= self._send_results[0]:
            raise ConnectionClosedError("an interrupt struck while rows were encrypted; how many were is unknown")
        self._apply_sent()

    def _set_low_water_mark(self) -> None:
        """Do nothing: the kernel counts bytes, and a TLS record has more of them than acks."""
