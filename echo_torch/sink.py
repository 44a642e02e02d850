"""`EchoSink`: from what a training loop holds to an ``echo.Server``.

A sink is configuration. It pickles as such, and opens one connection in each process that uses it, at the first use:
which process that is, is looked up before any lock is touched, so that a fork at any moment is harmless.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import optree
import torch
from torch.utils.data import get_worker_info

from .checks import check_count, check_seconds, check_timeout
from .client import SERVER_QUEUE, Client, TcpClient, close_after, ring_rows
from .deadline import Deadline, bounded_wait
from .dial import check_address, peer_name
from .errors import ConnectionClosedError
from .leaves import dtypes_of
from .locks import is_mine
from .routes import RingRoute, Route, RowRoute
from .spec import SampleSpec
from .stats import Counts, SinkStats
from .trees import flatten

_log = logging.getLogger(__name__)

_Batch = TypeVar("_Batch")
_Sink = TypeVar("_Sink", bound="EchoSink")

# Most payload bytes un-acked at a time: more than a fast network's bandwidth-delay product, and few enough that what
# a cut may duplicate stays small.
WINDOW_BYTES = 8 * 1024 * 1024
# Seconds that `EchoSink.close` may take: a learner in the middle of an evaluation still gets what was sent.
CLOSE_TIMEOUT_S = 60.0
# Seconds that `close` gives the server where it does not send the tail once more: five times as long as one took that
# was not busy.
LINGER_S = 0.1
# Seconds that a DataLoader's worker may try to open a lost connection again: the loader grants 5 s at its end.
WORKER_RECONNECT_S = 2.0
# Seconds that leaving a `with` block by an exception may take.
EXCEPTION_CLOSE_TIMEOUT_S = 5.0


class _Session:
    """What a sink has in one process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.route: Route | None = None
        self.closed = False
        self.told = False  # how the first batch was read
        self.gone = False  # the learner, and that was logged; with on_error="warn"
        self.dropped = 0


class EchoSink:
    """Sends batches from a training loop to an ``echo.Server``, sample by sample.

    Thread-safe, picklable, and usable in forked children, which open connections of their own.

    Args:
        host: the learner's name, IPv4 or IPv6 address.
        port: its TCP port.
        example: one sample as the server shall get it, ``dataset[0]`` for instance: a pytree of tensors, numpy arrays
            and scalars. Only structure, shapes and dtypes count.
        max_inflight_msgs: most samples un-acked at a time, and at most 8 MiB of them.
        buffer_bytes: host memory for samples that are not acked; `send` blocks when it is full.
        select: makes what the server wants (like ``example``) of what is sent; a module-level function, to pickle.
        client: `TcpClient`, or any callable ``(host, port, data_sample, max_inflight_msgs)`` that gives a `Client`,
            such as ``echo.TcpClient``. Other clients than ours know no timeouts, and their promises hold.
        connect_timeout: seconds in which the connection must stand; until then a learner that does not listen yet is
            tried again.
        stall_timeout: seconds without any ack after which `send` and `wait` raise; None for ever.
        on_error: ``"raise"``, or ``"warn"`` to log the loss of the learner once, and drop and count what is sent after.
        reconnect: seconds for which a lost connection is tried to be opened again before that is an error; 0 not to.
            In a DataLoader's worker, 2 at the most. What may not have been stored is then sent again, so a learner may
            get samples twice: carry an index if that matters.
        replay_acked: samples that are kept after their ack, and sent again on a new connection and by `close`; at least
            the server's ``producer_queue_size``, or samples may be lost when a connection ends.
        replay_tail: whether `close` sends them. Without it, `close` waits for 0.1 s instead, and the server may discard
            samples if it is busy for longer.

    Raises:
        TypeError: a leaf of ``example`` is no dense array of numbers, or an argument has the wrong type.
        ValueError: a sample without bytes, or an argument out of range.
    """

    def __init__(
        self,
        host: str,
        port: int,
        example: Any,
        *,
        max_inflight_msgs: int = 1024,
        buffer_bytes: int = 64 * 1024 * 1024,
        select: Callable[[Any], Any] | None = None,
        client: Callable[..., Client] = TcpClient,
        connect_timeout: float | None = 10.0,
        stall_timeout: float | None = 1800.0,
        on_error: Literal["raise", "warn"] = "raise",
        reconnect: float = 60.0,
        replay_acked: int = SERVER_QUEUE,
        replay_tail: bool = True,
    ) -> None:
        check_address(host, port)
        for name, function in {"select": select, "client": client}.items():
            if not callable(function) and not (name == "select" and function is None):
                raise TypeError(f"{name}: got {function!r}, expected something to call")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error: got {on_error!r}, expected 'raise' or 'warn'")
        self._host = host
        self._port = port
        self._spec = SampleSpec(example)
        self._window = check_count("max_inflight_msgs", max_inflight_msgs, least=1)
        self._buffer_bytes = buffer_bytes
        self._select = select
        self._make_client = client
        self._connect_timeout = check_timeout("connect_timeout", connect_timeout)
        self._stall_timeout = check_timeout("stall_timeout", stall_timeout)
        self._on_error = on_error
        self._reconnect = check_seconds("reconnect", reconnect)
        self._replay_acked = check_count("replay_acked", replay_acked, least=0)
        self._replay_tail = replay_tail
        if _is_ours(client):
            ring_rows(self._spec.payload_size, buffer_bytes, self._replay_acked)
        self._sessions: dict[int, _Session] = {}

    @classmethod
    def from_batch(cls: type[_Sink], host: str, port: int, batch: Any, **options: Any) -> _Sink:
        """A sink whose example is one sample of ``batch``.

        Args:
            host, port, options: as for the class.
            batch: what the loader yields: leaves ``(B, *shape)``. ``select``, if given, is applied to it first.

        Raises:
            ValueError: a leaf has no batch dimension.
            TypeError: a leaf is no dense array of numbers.
        """
        select = options.get("select")
        leaves, treespec = flatten(batch if select is None else select(batch))
        for leaf, accessor in zip(leaves, treespec.accessors(), strict=True):
            dtypes_of(leaf, accessor.codify("batch"))
            if np.ndim(leaf) == 0:
                raise ValueError(f"{accessor.codify('batch')}: got a scalar, expected [B, ...]")
        return cls(host, port, optree.tree_unflatten(treespec, map(_one_of, leaves)), **options)

    def connect(self: _Sink) -> _Sink:
        """Connect now rather than at the first `send`; gives the sink itself.

        Raises:
            OSError, TimeoutError, HandshakeError, SpecMismatchError: as `TcpClient` raises them; and
            ConnectionClosedError after `close`. ``on_error`` has no say here.
        """
        session = self._session()
        if self._route(session, None).closed:
            raise self._ended("the connection was lost", session)
        session.gone = False
        return self

    def send(self, batch: Any, *, batched: bool | None = None, timeout: float | None = None) -> None:
        """Send one sample, or a batch of them; when it returns, ``batch`` may be changed.

        Args:
            batch: like the example, its leaves matched by key path; or with one more first dimension B on every leaf,
                which makes it B samples. A batch of 0 samples sends nothing.
            batched: says which of the two it is; None to tell by the number of dimensions.
            timeout: most seconds to wait for room, and before that for a connection; None to wait as long as
                ``connect_timeout`` and ``stall_timeout`` say.

        Raises:
            SpecMismatchError: the batch differs from the example; names path, got, expected. Nothing was sent.
            TypeError: a leaf is no dense array of numbers. Nothing was sent.
            ConnectionClosedError: closed, or the learner is gone.
            DeliveryTimeoutError: no room in time. Both carry ``rows_accepted``.
            OSError, HandshakeError: from connecting, as `connect`.

        With ``on_error="warn"``, a learner that is gone, or cannot be connected to, raises nothing; one that is there
        and acks nothing still does.
        """
        check_timeout("timeout", timeout)
        session = self._session()
        if self._select is not None:
            batch = self._select(batch)
        match = self._spec.match(batch, batched)
        if not session.told:
            self._tell_how_read(session, match.rows, match.batched)
        if session.gone and not session.closed:
            self._drop(session, match.rows)
            return
        try:
            route = self._route(session, timeout)
        except OSError as error:  # refused, unreachable, unknown, too late: whatever keeps us from the learner
            if self._on_error == "raise" or session.closed:
                raise
            self._drop(session, match.rows, error)
            return
        try:
            route.send(match, timeout)
        except ConnectionClosedError as error:
            if self._on_error == "raise" or session.closed:
                raise
            self._drop(session, match.rows - error.rows_accepted, error)

    def wait(self, timeout: float | None = None) -> None:
        """Block until everything sent so far, by this process, is acked.

        Raises:
            ConnectionClosedError: the connection ended before that (``on_error="raise"``).
            DeliveryTimeoutError: ``timeout`` or ``stall_timeout`` passed; delivery goes on.
        """
        check_timeout("timeout", timeout)
        session = self._session()
        if session.route is None:
            return
        try:
            session.route.wait(timeout)
        except ConnectionError as error:
            if self._on_error == "raise":
                raise
            self._drop(session, 0, error)

    def close(self, timeout: float | None = CLOSE_TIMEOUT_S) -> None:
        """Deliver what was sent, make the tail of it safe in the server, and end this process's connection.

        Idempotent. The descriptors and the thread are freed in any case.

        Args:
            timeout: most seconds for what is un-acked.

        Raises:
            DeliveryTimeoutError: samples were un-acked when the time was up; ``unacked`` says how many. 0 of them if it
                was only the tail, which is sent once more, that was not acked again.
            ConnectionClosedError: the connection had failed with samples un-acked, and no call had said so.
        """
        check_timeout("timeout", timeout)
        session = self._session()
        session.closed = True  # whoever is connecting just now will see it
        if session.route is None:
            return
        try:
            session.route.close(timeout)
        except ConnectionError as error:
            if self._on_error == "raise":
                raise
            self._drop(session, 0, error)

    def tee(self, loader: Iterable[_Batch]) -> Tee[_Batch]:
        """Iterate over ``loader``, sending each batch before it is handed on, and `wait` when it is exhausted."""
        return Tee(self, loader)

    def stats(self) -> SinkStats:
        """What was sent, acked and dropped by this process, and what that cost."""
        session = self._session()
        route, size = session.route, self._spec.payload_size
        counts = Counts() if route is None else route.counts()
        acked = counts.sent - counts.unacked
        return SinkStats(
            samples_sent=counts.sent,
            bytes_sent=counts.sent * size,
            samples_acked=acked,
            bytes_acked=acked * size,
            in_flight=counts.unacked,
            dropped=session.dropped,
            blocked_seconds=0.0 if route is None else route.blocked_seconds,
            reconnects=counts.reconnects,
            resent=counts.resent,
            maybe_duplicated=counts.maybe_duplicated,
            maybe_lost=counts.maybe_lost,
        )

    @property
    def peer(self) -> str:
        """The learner, as ``host:port``."""
        return peer_name(self._host, self._port)

    def __enter__(self: _Sink) -> _Sink:
        return self.connect()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        timeout = CLOSE_TIMEOUT_S if error is None else EXCEPTION_CLOSE_TIMEOUT_S
        close_after(error, functools.partial(self.close, timeout), self.peer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sessions": {}}

    def __repr__(self) -> str:
        return f"<EchoSink {self.peer} {self._spec.describe()}>"

    def _session(self) -> _Session:
        """This process's own; without a lock, for a lock may have been copied by a fork while it was held."""
        pid = os.getpid()
        session = self._sessions.get(pid)
        return session if session is not None else self._sessions.setdefault(pid, _Session())

    def _route(self, session: _Session, timeout: float | None) -> Route:
        """The open route, connecting first if there is none."""
        route = session.route
        if route is None and not session.closed:
            route = self._connect_once(session, Deadline(timeout))
        if route is None or session.closed:
            raise self._ended("this sink was closed", session)
        return route

    def _ended(self, how: str, session: _Session) -> ConnectionClosedError:
        unacked = 0 if session.route is None else session.route.counts().unacked
        error = ConnectionClosedError(f"{self.peer}: {how}; {unacked} samples un-acked")
        error.unacked = unacked
        return error

    def _connect_once(self, session: _Session, deadline: Deadline) -> Route | None:
        """Connect, unless another thread did meanwhile or the sink was closed."""
        lock = session.lock
        if is_mine(lock):
            raise RuntimeError("called by a signal handler or finaliser that interrupted connecting in the same thread")
        try:
            if not lock.acquire(timeout=bounded_wait(deadline.remaining())):
                raise TimeoutError(f"{self.peer}: another thread is still connecting after {deadline.timeout:g} s")
            if session.route is None and not session.closed:
                session.route = self._open(None if deadline.timeout is None else deadline.remaining())
            lock.release()
        except BaseException:
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
            raise
        if session.closed and session.route is not None:
            session.route.close(0)
        return session.route

    def _open(self, timeout: float | None) -> Route:
        window = max(1, min(self._window, WINDOW_BYTES // self._spec.payload_size))
        arguments = (self._host, self._port, self._spec.numpy_sample(), window)
        if _is_ours(self._make_client):
            limits = [limit for limit in (self._connect_timeout, timeout) if limit is not None]
            client = self._make_client(
                *arguments,
                connect_timeout=min(limits, default=None),
                stall_timeout=self._stall_timeout,
                buffer_bytes=self._buffer_bytes,
                reconnect=min(self._reconnect, WORKER_RECONNECT_S) if get_worker_info() else self._reconnect,
                replay_acked=self._replay_acked,
                replay_tail=self._replay_tail,
                linger=0.0 if self._replay_tail else LINGER_S,
                retry_refused=True,
            )
        else:
            client = self._make_client(*arguments)
        return RingRoute(client) if isinstance(client, TcpClient) else RowRoute(client, self._spec, self.peer)

    def _tell_how_read(self, session: _Session, rows: int, batched: bool) -> None:
        session.told = True
        what = f"{rows} samples" if batched else "one sample"
        _log.info("%s: the first batch is %s of %s", self.peer, what, self._spec.describe())

    def _drop(self, session: _Session, rows: int, error: OSError | None = None) -> None:
        """Count samples as dropped; with the first ``error``, log why."""
        with session.lock:
            session.dropped += rows
            if error is None or session.gone:
                return
            session.gone = True
        _log.warning("the learner is gone; samples are dropped from now on (on_error='warn'): %s", error)


class Tee(Generic[_Batch]):
    """A loader whose batches are sent as they pass; see `EchoSink.tee`."""

    def __init__(self, sink: EchoSink, loader: Iterable[_Batch]) -> None:
        self._sink = sink
        self._loader = loader

    def __iter__(self) -> Iterator[_Batch]:
        for batch in self._loader:
            self._sink.send(batch)
            yield batch
        self._sink.wait()

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # raises as the loader does


def _is_ours(make_client: Callable[..., Client]) -> bool:
    """Whether it takes the options of `TcpClient`; a function that returns one has seen to them itself."""
    return isinstance(make_client, type) and issubclass(make_client, TcpClient)


def _one_of(leaf: Any) -> Any:
    """An example of one item of a stacked leaf, which may have none."""
    if isinstance(leaf, torch.Tensor):
        return torch.empty(leaf.shape[1:], dtype=leaf.dtype, device="cpu")  # whatever the default device is
    return np.zeros(np.shape(leaf)[1:], np.asarray(leaf).dtype)
