"""`TcpClient`: speaks echo wire v1, call for call like ``echo.TcpClient``.

What it adds: every leaf is checked, several threads may use it, nothing hangs when the peer dies, and blocks of
samples are sent at once (`send_rows`).
"""

from __future__ import annotations

import functools
import logging
import socket
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError, SpecMismatchError
from echo_torch.metrics.stats import Counts
from echo_torch.metrics.timing import Times
from echo_torch.ring.pack import Packer
from echo_torch.ring.ring import SERVER_QUEUE_SAMPLES, Ring, rows_in_buffer
from echo_torch.ring.staging import Stager, StagingError
from echo_torch.samples.leaf import Array
from echo_torch.samples.pytree import flatten
from echo_torch.samples.spec import Match, SampleSpec, check_numpy
from echo_torch.support.deadline import NEVER, Deadline
from echo_torch.support.validation import check_count, check_seconds, check_timeout
from echo_torch.wire.connect import close_socket, connect_and_handshake, peer_name
from echo_torch.wire.tls import TLS, check_tls

from .io_thread import IoThread
from .reconnect import Reconnector
from .resend import UndeliveredRows
from .sender import Sender

_log = logging.getLogger(__name__)

# Seconds that `TcpClient.close` may take for what is un-acked: a learner that drains at all needs far less.
CLOSE_TIMEOUT_S = 5.0
# A batch that the device cannot stage comes in pieces of this share of the buffer at the most.
UNSTAGED_BUFFER_DIVISOR = 4


@runtime_checkable
class Client(Protocol):
    """What an `EchoSink` needs of a client: `TcpClient`, ``echo.TcpClient``, or one for another transport."""

    def send(self, data: Any, /) -> None:
        """Send one sample, a pytree of numpy arrays; when it returns, the arrays may be changed."""

    def wait(self) -> None:
        """Block until everything sent is acknowledged."""

    def close(self) -> None:
        """End the connection; may be called again."""


class TcpClient:
    """Sends samples to an ``echo.Server``; a drop-in for ``echo.TcpClient``.

    Thread-safe. A forked child cannot use its parent's client: calls there raise `ConnectionClosedError`. Dropping the
    last reference delivers what was sent, for up to 5 s, and closes; so does the end of the interpreter.

    Args:
        host: name, IPv4 or IPv6 address.
        port: the server's TCP port.
        data_sample: pytree of numpy arrays with the structure, shapes and dtypes of one sample.
        max_inflight_msgs: most samples that are un-acked at a time; `send` blocks above.
        connect_timeout: seconds for resolving, connecting and the handshakes together; None for no limit.
        stall_timeout: seconds without any ack after which `send` and `wait` raise; None for ever.
        buffer_bytes: host memory for samples not yet acked; by default ``max_inflight_msgs`` samples. With more,
            `send` and `send_rows` run ahead of the window.
        reconnect: seconds for which a lost connection is tried to be opened again, before that is an error. Then the
            last ``resend_acked`` acked samples and all un-acked ones are sent again, in order, so the server may store
            up to ``max_inflight_msgs + resend_acked`` of them twice. 0 to end with the first connection.
        resend_acked: how many acked samples are kept in the buffer for that; at least the server's
            ``producer_queue_size``, or it may lose some. By default 8, the server's default, or 0 if they are not
            needed.
        resend_at_close: whether `close` sends the last ``resend_acked`` samples once more, so that the server cannot
            discard samples that it acked and still has queued when the connection ends.
        linger: seconds that `close` waits, once all is acked, for the server to take them out of its queue.
        retry_refused: while nobody listens at the address yet, or behind the proxy there, with TLS, try again until
            ``connect_timeout``.
        tls: how to speak to a proxy that has TLS, in front of the server; None for a plain connection.

    Raises:
        TypeError: a leaf of ``data_sample`` is no numpy array, or an argument has the wrong type.
        ValueError: a sample without bytes, or an argument out of range.
        HandshakeError: the peer is no echo server of wire version 1, or speaks no TLS although it should.
        CertificateError: the server's certificate, or the client's, or a file of ``tls`` will not do.
        SpecMismatchError: the server expects other samples.
        ConnectionClosedError: the peer hung up during the handshake.
        TimeoutError: ``connect_timeout`` passed.
        OSError: as connecting raises it (``ConnectionRefusedError``, ``socket.gaierror``, ...).
    """

    def __init__(
        self,
        host: str,
        port: int,
        data_sample: Any,
        max_inflight_msgs: int = 32,
        *,
        connect_timeout: float | None = 10.0,
        stall_timeout: float | None = 1800.0,
        buffer_bytes: int | None = None,
        reconnect: float = 0.0,
        resend_acked: int | None = None,
        resend_at_close: bool = False,
        linger: float = 0.0,
        retry_refused: bool = False,
        tls: TLS | None = None,
    ) -> None:
        check_numpy(data_sample)
        self._spec = SampleSpec(data_sample, root="data")
        window = check_count("max_inflight_msgs", max_inflight_msgs, least=1)
        check_timeout("connect_timeout", connect_timeout)
        check_timeout("stall_timeout", stall_timeout)
        check_seconds("reconnect", reconnect)
        check_seconds("linger", linger)
        if resend_acked is None:
            resend_acked = SERVER_QUEUE_SAMPLES if reconnect or resend_at_close else 0
        keep_acked = check_count("resend_acked", resend_acked, least=0)
        size = self._spec.payload_size
        rows = rows_in_buffer(size, buffer_bytes, keep_acked) if buffer_bytes is not None else window + keep_acked
        window = min(window, rows - keep_acked)
        buffer = _allocate(rows, size)
        self._peer = peer_name(host, port)
        dial_server = functools.partial(_dial, host, port, self._spec, check_tls(tls))
        sock = dial_server(Deadline(connect_timeout), retry_refused=retry_refused)
        try:
            self._ring = ring = Ring(buffer, size, keep_acked)
            self._packer = Packer(ring, self._spec.leaves)
            self._sender = Sender(
                sock,
                self._peer,
                ring,
                window,
                stall_timeout=stall_timeout,
                resend_at_close=resend_at_close,
                linger=linger,
                reconnector=Reconnector(dial_server, reconnect, connect_timeout) if reconnect else None,
            )
            self._stager = Stager(ring, self._spec.leaves, self._sender.move_rows)
            self._unstaged_reported = False
            weakref.finalize(self, _mark_abandoned, self._sender.io_thread).atexit = False
        except BaseException:
            close_socket(sock)
            raise
        self._sender.io_thread.start()

    def send(self, data: Any, *, timeout: float | None = None) -> None:
        """Send one sample; when it returns, ``data`` may be changed.

        Args:
            data: pytree like ``data_sample``, with the same key paths, shapes and dtypes.
            timeout: most seconds to wait for room; None to wait as long as the server acks at all.

        Raises:
            SpecMismatchError: a leaf differs from ``data_sample``; the message contains ``Payload size`` if the
                number of bytes does. Nothing was sent.
            TypeError: a leaf is no dense array of numbers. Nothing was sent.
            ConnectionClosedError: closed, or the peer is gone.
            DeliveryTimeoutError: no room in time. Nothing was sent.
        """
        arrays = self._spec.try_numpy_leaves(data)
        if arrays is None:
            try:
                match = self._spec.match(data, batched=False)
            except SpecMismatchError as error:
                raise _with_payload_size(error, data, self._spec.payload_size) from None
            self.send_match(match, timeout=timeout)
            return
        self._sender.send_rows(1, self._packer.make_filler(arrays, False), _deadline(timeout))

    def send_match(self, match: Match, *, timeout: float | None = None) -> None:
        """Send what `SampleSpec.match` made of a batch, for a spec of the same leaves; raises as `send_rows`."""
        deadline = _deadline(timeout)
        if not match.on_device:
            self._sender.send_rows(match.rows, self._packer.make_filler(match.arrays, match.batched), deadline)
            return
        self._sender.check_caller("send")  # before memory is pinned, which takes locks
        try:
            self._sender.send_rows(match.rows, self._stager.make_filler(match.arrays, match.batched), deadline)
            return
        except StagingError as problem:
            why, first = str(problem), problem.first
        self._send_by_host(match, why, first, deadline)

    def _send_by_host(self, match: Match, why: str, first: int, deadline: Deadline) -> None:
        """Send the rows of a batch, from ``first`` on, that the device copies while it is waited for."""
        if not self._unstaged_reported:
            self._unstaged_reported = True
            _log.warning("%s: samples on a device are copied while send() waits, which is slow: %s", self._peer, why)
        step = max(1, self._ring.capacity // UNSTAGED_BUFFER_DIVISOR)
        done = first
        try:
            while done < match.rows:
                part = self._spec.to_host(match.slice_rows(done, done + step))
                self._sender.send_rows(len(part[0]), self._packer.make_filler(part, True), deadline)
                done += len(part[0])
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            error.rows_accepted += done
            raise

    def send_rows(self, arrays: Sequence[Array], *, timeout: float | None = None) -> None:
        """Send a block of samples whose leaves were checked and stacked before.

        Args:
            arrays: one per leaf in optree's order, shape ``(B, *leaf.shape)``, in the dtype of ``data_sample``.
            timeout: as for `send`.

        Raises:
            ValueError: an array has another shape or dtype. Nothing was sent.
            ConnectionClosedError, DeliveryTimeoutError: as `send`; ``rows_accepted`` says how many were taken.
        """
        leaves = self._spec.leaves
        if len(arrays) != len(leaves):
            raise ValueError(f"arrays: got {len(arrays)}, expected one for each of {len(leaves)} leaves")
        rows = len(arrays[0])
        for array, leaf in zip(arrays, leaves, strict=True):
            if array.shape != (rows, *leaf.shape) or array.dtype != leaf.wire_dtype:
                expected = f"{leaf.wire_dtype} {[rows, *leaf.shape]}"
                raise ValueError(f"arrays{leaf.path}: got {array.dtype} {list(array.shape)}, expected {expected}")
        self._sender.send_rows(rows, self._packer.make_filler(arrays, True), _deadline(timeout))

    def send_packed(self, rows: memoryview, *, most: int, timeout: float | None = None) -> int:
        """Send samples that are bytes already, as they travel, one behind the other; gives how many. Raises as `send`.

        Args:
            rows: whole samples.
            most: no more than so many of them.
            timeout: as for `send`.
        """
        ring, size = self._ring, self._spec.payload_size
        count = min(most, rows.nbytes // size)

        def fill(slot: int, first: int, run: int) -> None:
            ring.buffer[slot * size : (slot + run) * size] = rows[first * size : (first + run) * size]

        self._sender.send_rows(count, fill, _deadline(timeout))
        return count

    def wait(self, timeout: float | None = None) -> None:
        """Block until everything sent so far is acked.

        Raises:
            ConnectionClosedError: the connection ended before that; ``unacked`` says how many samples are open.
            DeliveryTimeoutError: ``timeout`` or ``stall_timeout`` passed; delivery goes on.
        """
        self._sender.wait(Deadline(timeout))

    def close(self, timeout: float | None = CLOSE_TIMEOUT_S) -> None:
        """Deliver what was sent, then end the connection; idempotent, and leaves no thread and no open descriptor.

        Args:
            timeout: most seconds for what is un-acked.

        Raises:
            DeliveryTimeoutError: samples, or with ``resend_at_close`` the last ones sent once more, were un-acked when the
                time was up. Closed all the same.
            ConnectionClosedError: the connection had failed with samples un-acked, and no call had said so.
        """
        self._sender.close(Deadline(timeout))

    def abandon(self) -> None:
        """Deliver what was sent, for up to 5 s, and close, all without being waited for."""
        self._sender.abandon()

    @property
    def free_rows(self) -> int:
        """Samples that `send_rows` would take without waiting."""
        return self._sender.free_rows

    @property
    def reconnecting(self) -> bool:
        """Whether the connection is lost, and tried to be opened again."""
        return self._sender.reconnecting

    @property
    def failure(self) -> ConnectionClosedError | None:
        """What ended the connection, if it has ended."""
        return self._sender.failure

    def undelivered(self) -> UndeliveredRows:
        """The samples that the server may not have, once the connection was lost for good, and before `close`."""
        return self._sender.undelivered()

    @property
    def in_flight(self) -> int:
        """Samples that were sent and are not acked, as far as is known without waiting."""
        return self.counts().unacked

    def counts(self) -> Counts:
        """What became of the samples since the client was made, as far as is known without waiting."""
        self._sender.refresh()
        return self._sender.counts()

    def progress(self) -> tuple[int, int]:
        """How many samples were sent, and how many of them are acked as far as was noted: cheaper than `counts`."""
        return self._sender.progress()

    @property
    def blocked_seconds(self) -> float:
        """Seconds that calls of `send` and `send_rows` waited for room."""
        return sum(self.times().blocked)

    def times(self) -> Times:
        """Where the time went, since the client was made."""
        return self._sender.times()

    @property
    def closed(self) -> bool:
        """Whether `send` can only fail: closed, or the peer is gone."""
        return self._sender.closed

    @property
    def peer(self) -> str:
        """The server, as ``host:port``."""
        return self._peer

    def __enter__(self) -> TcpClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        close_without_masking(error, self.close, self._peer)

    def __repr__(self) -> str:
        return f"<TcpClient {self._peer} {'closed' if self.closed else 'open'}>"


def _dial(
    host: str, port: int, spec: SampleSpec, tls: TLS | None, deadline: Deadline, retry_refused: bool = False
) -> socket.socket:
    """A socket to a server that expects these samples."""
    sock, theirs = connect_and_handshake(host, port, deadline, retry_refused=retry_refused, tls=tls)
    try:
        spec.check_server(theirs, peer_name(host, port))
        return sock
    except BaseException:
        close_socket(sock)
        raise


def _deadline(timeout: float | None) -> Deadline:
    return NEVER if timeout is None else Deadline(timeout)


def _with_payload_size(error: SpecMismatchError, data: Any, expected: int) -> SpecMismatchError:
    """The same error, opening with the sizes if they differ, as the stock client words it."""
    try:
        got = sum(leaf.nbytes if hasattr(leaf, "nbytes") else np.asarray(leaf).nbytes for leaf in flatten(data)[0])
    except Exception:  # a leaf that has no bytes to count, or does not say; the error names it
        return error
    return error if got == expected else SpecMismatchError(f"Payload size {got} != expected {expected}: {error}")


def _allocate(rows: int, size: int) -> memoryview:
    try:
        return np.empty(rows * size, np.uint8).data
    except (MemoryError, ValueError):
        what = f"{rows} samples of {size} bytes do not fit into memory"
        raise ValueError(f"max_inflight_msgs: {what}; give buffer_bytes for a smaller buffer") from None


def close_without_masking(error: BaseException | None, close: Callable[[], None], peer: str) -> None:
    """Close at the end of a ``with`` block, without ever masking the exception that ended it."""
    if error is None:
        close()
        return
    try:
        close()
    except Exception as problem:
        _log.warning("%s: while closing after %s: %s", peer, type(error).__name__, problem)


def _mark_abandoned(thread: IoThread) -> None:
    """May run anywhere, inside any lock: so it takes none, and the thread finds the flag."""
    thread.abandoned = True
