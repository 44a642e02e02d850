"""`TcpClient`: speaks echo wire version 1, with the same calls as ``echo.TcpClient``.

It adds four things: it checks every leaf, several threads may use it, no call hangs when the peer dies, and `send_rows`
sends a block of samples at once.
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
from echo_torch.ring.pack import Packer
from echo_torch.ring.ring import SERVER_QUEUE_SAMPLES, Ring, rows_in_buffer
from echo_torch.ring.staging import Stager, StagingError
from echo_torch.samples.leaf import Array
from echo_torch.samples.pytree import flatten
from echo_torch.samples.spec import Match, SampleSpec, check_numpy_leaves
from echo_torch.support.deadline import Deadline, Timeout, as_deadline
from echo_torch.support.validation import check_count, check_seconds, check_timeout
from echo_torch.wire.connect import connect_and_handshake, peer_name, shutdown_and_close
from echo_torch.wire.tls import TLS, check_tls

from .io_thread import IoThread
from .reconnect import Reconnector
from .sender import Sender

_log = logging.getLogger(__name__)

# A batch that cannot be staged goes through the host in pieces of at most the buffer's rows divided by this.
UNSTAGED_BUFFER_DIVISOR = 4


@runtime_checkable
class Client(Protocol):
    """The methods that `EchoSink` needs: `TcpClient` and ``echo.TcpClient`` have them, or write your own client."""

    def send(self, data: Any, /) -> None:
        """Send one sample, a pytree of numpy arrays. You may change the arrays once this returns."""

    def wait(self) -> None:
        """Block until everything sent is acknowledged."""

    def close(self) -> None:
        """End the connection. Further calls do nothing."""


class TcpClient(Sender):
    """Sends samples to an ``echo.Server``; a drop-in replacement for ``echo.TcpClient``.

    Any thread may use a client. A forked child cannot use its parent's: calls there raise `ConnectionClosedError`. If
    you drop the last reference, or the interpreter exits, the client still delivers what you sent, for up to 5 s, and
    then closes.

    Example::

        import numpy as np
        from echo_torch import TcpClient
        sample = {"obs": np.zeros((3, 84, 84), np.uint8), "action": np.zeros((), np.int64)}
        with TcpClient("learner", 50051, sample) as client:
            client.send(sample)
            client.wait()

    Args:
        host: name, IPv4 or IPv6 address.
        port: the server's TCP port.
        data_sample: pytree of numpy arrays with the structure, shapes and dtypes of one sample.
        max_inflight_msgs: the window: upper limit for samples that are sent and not acked. `send` blocks at the limit.
        connect_timeout: seconds for name lookup, connecting and the handshakes together; None for no limit.
        stall_timeout: seconds without any ack after which `send` and `wait` raise; None for no limit.
        buffer_bytes: host memory for samples that are not acked; by default room for ``max_inflight_msgs`` samples.
            With more, `send` and `send_rows` run ahead of the window.
        max_unacked: upper limit for samples that were accepted and are not acked, if fewer than the buffer holds; but
            always two of the largest batch so far. None for as many as the buffer holds.
        reconnect: seconds for which the client tries to open a lost connection again, before calls raise. It then
            resends the last ``resend_acked`` acked samples and all un-acked ones, in order. So the server may store up
            to ``max_inflight_msgs + resend_acked`` samples twice. 0 turns reconnecting off.
        resend_acked: number of acked samples to keep for resending. With fewer than the server's
            ``producer_queue_size``, samples may be lost. By default 8, as the server's default, or 0 if neither
            ``reconnect`` nor ``resend_at_close`` is set.
        resend_at_close: whether `close` sends the last ``resend_acked`` samples once more. When a connection ends, the
            server may discard acked samples that are still in its queue. Resending pushes them out of the queue.
        gone_after: seconds after which a server that ended the connection in order, and where nobody listens any more,
            counts as gone: calls then raise `LearnerGoneError`. With ``reconnect=0``, it counts as gone at once. None
            to try for all of ``reconnect``, as after a crash.
        linger: seconds that `close` waits after the last ack, so that the server can empty its queue.
        retry_refused: whether to try again, until ``connect_timeout``, while nobody listens at the address yet. With
            ``tls``, this includes the server behind the proxy.
        tls: how to speak to a TLS proxy in front of the server; None for a plain connection.

    Raises:
        TypeError: a leaf of ``data_sample`` is not a numpy array, or an argument has the wrong type.
        ValueError: the sample has no bytes, or an argument is out of range.
        HandshakeError: the peer is not an echo server of wire version 1, or does not speak TLS when it should.
        CertificateError: the server's or the client's certificate is refused, or a file of ``tls`` cannot be used.
        SpecMismatchError: the server expects other samples.
        ConnectionClosedError: the peer hung up during the handshake.
        TimeoutError: ``connect_timeout`` passed.
        OSError: connecting failed (``ConnectionRefusedError``, ``socket.gaierror``, ...).
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
        max_unacked: int | None = None,
        reconnect: float = 0.0,
        resend_acked: int | None = None,
        resend_at_close: bool = False,
        gone_after: float | None = None,
        linger: float = 0.0,
        retry_refused: bool = False,
        tls: TLS | None = None,
    ) -> None:
        check_numpy_leaves(data_sample)
        # The structure, shapes and dtypes of one sample.
        self._spec = SampleSpec(data_sample, root="data")
        window = check_count("max_inflight_msgs", max_inflight_msgs, least=1)
        if max_unacked is not None:
            check_count("max_unacked", max_unacked, least=1)
        check_timeout("connect_timeout", connect_timeout)
        check_timeout("stall_timeout", stall_timeout)
        check_seconds("reconnect", reconnect)
        check_timeout("gone_after", gone_after)
        check_seconds("linger", linger)
        if resend_acked is None:
            resend_acked = SERVER_QUEUE_SAMPLES if reconnect or resend_at_close else 0
        keep_acked = check_count("resend_acked", resend_acked, least=0)
        size = self._spec.payload_size
        rows = rows_in_buffer(size, buffer_bytes, keep_acked) if buffer_bytes is not None else window + keep_acked
        window = min(window, rows - keep_acked)
        # Allocate before you connect, so that a lack of memory opens no connection.
        buffer = _allocate(rows, size)
        dial_server = functools.partial(_dial, host, port, self._spec, check_tls(tls))
        sock = dial_server(Deadline(connect_timeout), retry_refused=retry_refused)
        try:
            ring = Ring(buffer, size, keep_acked, max_unacked=max_unacked)
            super().__init__(
                sock,
                peer_name(host, port),
                ring,
                window,
                stall_timeout=stall_timeout,
                resend_at_close=resend_at_close,
                linger=linger,
                reconnector=Reconnector(dial_server, reconnect, connect_timeout) if reconnect else None,
                gone_after=gone_after,
            )
            # Packs samples in host memory into rows.
            self._packer = Packer(ring, self._spec.leaves)
            # Packs samples on a device into rows. It must not hold the client, which could then not be dropped.
            self._stager = Stager(ring, self._spec.leaves, self._connection.move_ring)
            # Whether the log has the warning that batches go through the host.
            self._unstaged_reported = False
            # When the client is dropped, the thread delivers the rest. At exit, `shutdown` sees to that instead.
            weakref.finalize(self, _mark_abandoned, self._io_thread).atexit = False
        except BaseException:
            shutdown_and_close(sock)
            raise
        # Start the thread last, when everything that it uses is in place. A failed start closes the socket by itself.
        self._io_thread.start()

    def send(self, data: Any, *, timeout: Timeout = None) -> None:
        """Send one sample. Blocks until the buffer has room. You may change ``data`` once this returns.

        Args:
            data: pytree like ``data_sample``, with the same key paths, shapes and dtypes.
            timeout: seconds to wait for room; None to wait as long as the server acks at all (``stall_timeout``).

        Raises:
            SpecMismatchError: a leaf differs from ``data_sample``. The message contains ``Payload size`` if the number
                of bytes differs. Nothing was sent.
            TypeError: a leaf is not a dense array of numbers. Nothing was sent.
            ConnectionClosedError: the client was closed, or the peer is gone.
            DeliveryTimeoutError: there was no room in time. Nothing was sent.
        """
        # The fast path: plain numpy leaves that fit. Everything else goes through `match`, which converts or explains.
        arrays = self._spec.try_fast_numpy_leaves(data)
        if arrays is None:
            try:
                match = self._spec.match(data, batched=False)
            except SpecMismatchError as error:
                raise _with_payload_size(error, data, self._spec.payload_size) from None
            self.send_match(match, timeout=timeout)
            return
        self._put_rows(1, self._packer.make_filler(arrays, False), as_deadline(timeout))

    def send_match(self, match: Match, *, timeout: Timeout = None, whole: bool = False) -> None:
        """Send a batch, or a sample, that `SampleSpec.match` has checked. Raises the same errors as `send_rows`.

        Args:
            match: the checked leaves, from a spec with the same leaves as this client's.
            timeout: as for `send`.
            whole: whether to raise DeliveryTimeoutError at once, and send nothing, if there is no room for all of it.
        """
        deadline = as_deadline(timeout)
        if not match.on_device:
            self._put_rows(match.rows, self._packer.make_filler(match.arrays, match.batched), deadline, whole)
            return
        # Check the caller before the stager pins memory, which takes locks.
        self._check_caller("send")
        try:
            self._put_rows(match.rows, self._stager.make_filler(match.arrays, match.batched), deadline, whole)
            return
        except StagingError as problem:
            why, first = str(problem), problem.first
        self._send_by_host(match, why, first, deadline)

    def _send_by_host(self, match: Match, why: str, first: int, deadline: Deadline) -> None:
        """Send a batch through pageable host memory. Blocks while the device copies.

        Args:
            match: the batch.
            why: why it cannot be staged, for the log.
            first: the first row to send. The rows before it were staged.
            deadline: when to stop waiting for room.
        """
        if not self._unstaged_reported:
            self._unstaged_reported = True
            _log.warning("%s: samples on a device are copied while send() waits, which is slow: %s", self._peer, why)
        # Send in pieces, so that the host copy needs only a share of the buffer's memory.
        step = max(1, self._ring.capacity // UNSTAGED_BUFFER_DIVISOR)
        done = first
        try:
            while done < match.rows:
                part = self._spec.to_host(match.slice_rows(done, done + step))
                self._put_rows(len(part[0]), self._packer.make_filler(part, True), deadline)
                done += len(part[0])
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            error.rows_accepted += done
            raise

    def send_rows(self, arrays: Sequence[Array], *, timeout: Timeout = None) -> None:
        """Send a block of samples whose leaves are stacked already.

        Args:
            arrays: one array per leaf, in optree's order, with shape ``(B, *leaf.shape)`` and the dtype that
                ``data_sample`` has.
            timeout: as for `send`.

        Raises:
            ValueError: an array has another shape or dtype. Nothing was sent.
            ConnectionClosedError: the client was closed, or the peer is gone.
            DeliveryTimeoutError: there was no room in time. The ``rows_accepted`` of both errors counts the samples
                that were accepted.
        """
        leaves = self._spec.leaves
        if len(arrays) != len(leaves):
            raise ValueError(f"arrays: got {len(arrays)}, expected one for each of {len(leaves)} leaves")
        rows = len(arrays[0])
        for array, leaf in zip(arrays, leaves, strict=True):
            if array.shape != (rows, *leaf.shape) or array.dtype != leaf.wire_dtype:
                expected = f"{leaf.wire_dtype} {[rows, *leaf.shape]}"
                raise ValueError(f"arrays{leaf.path}: got {array.dtype} {list(array.shape)}, expected {expected}")
        self._put_rows(rows, self._packer.make_filler(arrays, True), as_deadline(timeout))

    def send_packed(self, rows: memoryview, most: int) -> int:
        """Send samples that are packed already, without waiting. Returns how many were accepted.

        Args:
            rows: whole samples as wire bytes, one after the other.
            most: upper limit for the number of samples.
        """
        ring, size = self._ring, self._spec.payload_size
        count = min(most, rows.nbytes // size)

        def fill(slot: int, first: int, run: int) -> None:
            ring.buffer[slot * size : (slot + run) * size] = rows[first * size : (first + run) * size]

        try:
            self._put_rows(count, fill, Deadline(0.0))
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            return error.rows_accepted
        return count

    @property
    def in_flight(self) -> int:
        """The number of samples that are sent and not acked, as far as the client knows without waiting."""
        return self.counts().unacked

    @property
    def blocked_seconds(self) -> float:
        """Seconds that `send` and `send_rows` have waited for room."""
        return sum(self.times().blocked)

    @property
    def peer(self) -> str:
        """The server, as ``host:port``."""
        return self._peer

    def __enter__(self) -> TcpClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close_raises = True
        close_without_masking(error, self.close, self._peer)

    def __repr__(self) -> str:
        return f"<TcpClient {self._peer} {'closed' if self.closed else 'open'}>"


def _dial(
    host: str, port: int, spec: SampleSpec, tls: TLS | None, deadline: Deadline, retry_refused: bool = False
) -> socket.socket:
    """Return a connected socket to a server that expects these samples. Raises as `TcpClient` does."""
    sock, theirs = connect_and_handshake(host, port, deadline, retry_refused=retry_refused, tls=tls)
    try:
        spec.check_server(theirs, peer_name(host, port))
        return sock
    except BaseException:
        shutdown_and_close(sock)
        raise


def _with_payload_size(error: SpecMismatchError, data: Any, expected: int) -> SpecMismatchError:
    """Return the error with both payload sizes in front if they differ, in the words of the stock client."""
    try:
        got = sum(leaf.nbytes if hasattr(leaf, "nbytes") else np.asarray(leaf).nbytes for leaf in flatten(data)[0])
    except Exception:  # a leaf has no bytes to count. The error names that leaf already
        return error
    return error if got == expected else SpecMismatchError(f"Payload size {got} != expected {expected}: {error}")


def _allocate(rows: int, size: int) -> memoryview:
    """Allocate the buffer. Raises ValueError if that much memory is not available."""
    try:
        return np.empty(rows * size, np.uint8).data
    except (MemoryError, ValueError):
        what = f"{rows} samples of {size} bytes do not fit into memory"
        raise ValueError(f"max_inflight_msgs: {what}; give buffer_bytes for a smaller buffer") from None


def close_without_masking(error: BaseException | None, close: Callable[[], None], peer: str) -> None:
    """Close at the end of a ``with`` block.

    Args:
        error: the exception that ended the block, if any. What ``close`` raises is then logged, so that it does not
            mask this exception.
        close: closes the client or sink.
        peer: the other side's name in the log.
    """
    if error is None:
        close()
        return
    try:
        close()
    except Exception as problem:
        _log.warning("%s: while closing after %s: %s", peer, type(error).__name__, problem)


def _mark_abandoned(thread: IoThread) -> None:
    """Tell the I/O thread that its client is gone.

    The garbage collector may run this anywhere, while any lock is held. So this takes no lock and wakes nobody. The
    thread sees the flag within a second.
    """
    thread.abandoned = True
