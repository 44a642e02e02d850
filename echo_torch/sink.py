"""`EchoSink`: from what a training loop holds to an ``echo.Server``.

A sink is configuration. It pickles as such, and opens one connection in each process that uses it, at the first use:
which process that is, is looked up before any lock is touched, so that a fork at any moment is harmless.
"""

from __future__ import annotations

import functools
import multiprocessing.util
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch.utils.data import default_collate

from .client.tcp_client import Client, TcpClient, close_without_masking
from .metrics.stats import SinkStats
from .processes.ledger import new_token
from .progress import wait_with_bar
from .ranks import wait_together
from .ring.ring import SERVER_QUEUE_SAMPLES
from .routing.connector import Connector
from .routing.partition import Routing, check_routing, check_shards
from .routing.route import Route
from .samples.spec import Match, SampleSpec, example_from_batch
from .session.session import Session
from .support.interrupts import owned_by_this_thread
from .support.tracing import disable_compile, is_profiling, profiler_range
from .support.validation import check_count, check_seconds, check_timeout
from .tee import Tee
from .wire.connect import expand_addresses
from .wire.tls import TLS, check_tls
from .workers import LoaderSender, SinkCollate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Batch = TypeVar("_Batch")
_Sink = TypeVar("_Sink", bound="EchoSink")

# Seconds that `EchoSink.close` may take: a learner in the middle of an evaluation still gets what was sent.
CLOSE_TIMEOUT_S = 60.0
# Seconds that leaving a `with` block by an exception may take.
EXCEPTION_CLOSE_TIMEOUT_S = 5.0


class EchoSink(LoaderSender):
    """Sends batches from a training loop to an ``echo.Server``, sample by sample.

    Thread-safe, picklable, and usable in forked children, which open connections of their own.

    Args:
        host: the learner's name, IPv4 or IPv6 address; a list of them for several learners.
        port: its TCP port; a list of them for several learners. A single host, or port, goes with all of the other.
        example: one sample as the server shall get it, ``dataset[0]`` for instance: a pytree of tensors, numpy arrays
            and scalars. Only structure, shapes and dtypes count.
        max_inflight_msgs: most samples un-acked at a time, and at most 8 MiB of them.
        buffer_bytes: host memory, for each learner, for samples that are not acked; `send` blocks when it is full. By
            default 64 MiB, 16 MiB in each of a DataLoader's workers, or more if ``resend_acked + 2`` samples need that.
        select: makes what the server wants (like ``example``) of what is sent; a module-level function, to pickle.
        client: `TcpClient`, or any callable ``(host, port, data_sample, max_inflight_msgs)`` that gives a `Client`,
            such as ``echo.TcpClient``. Other clients than ours know no timeouts, and their promises hold.
        connect_timeout: seconds in which the connection must stand; until then a learner that does not listen yet is
            tried again.
        route: how batches are spread over several learners. ``"round_robin"``: each has its turn, and is waited for.
            ``"least_inflight"``: to the one with the fewest samples un-acked of those that have room, so that a slow
            one holds up nobody. Or a function of what is sent, one sample or a batch, that gives the index of the
            learner, or for a batch an integer tensor ``(B,)`` of them; a module-level function, to pickle.
        failover: whether the others get the share of a learner that is gone, with what it may not have, at the next
            `send`, `wait` or `close`; without it, the loss of one is the loss of all. A learner is gone when it could
            not be reached for ``reconnect`` seconds, and passed over before that.
        stall_timeout: seconds without any ack after which `send` and `wait` raise; None for ever.
        on_error: ``"raise"``, or ``"warn"`` to log the loss of the learner once, and drop and count what is sent after.
        reconnect: seconds for which a lost connection is tried to be opened again before that is an error; 0 not to.
            In a DataLoader's worker, 2 at the most. What may not have been stored is then sent again, so a learner may
            get samples twice: carry an index if that matters.
        resend_acked: samples that are kept after their ack, and sent again on a new connection and by `close`; at least
            the server's ``producer_queue_size``, or samples may be lost when a connection ends.
        resend_at_close: whether `close` sends them. Without it, `close` waits for 0.1 s instead, and the server may discard
            samples if it is busy for longer.
        tls: `TLS`, for a proxy in front of the learner that speaks it; None for connections that anybody can read, and
            change, on the way.

    Raises:
        TypeError: a leaf of ``example`` is no dense array of numbers, or an argument has the wrong type.
        ValueError: a sample without bytes, or an argument out of range.
    """

    def __init__(
        self,
        host: str | Sequence[str],
        port: int | Sequence[int],
        example: Any,
        *,
        max_inflight_msgs: int = 1024,
        buffer_bytes: int | None = None,
        select: Callable[[Any], Any] | None = None,
        client: Callable[..., Client] = TcpClient,
        route: Routing = "round_robin",
        failover: bool = False,
        connect_timeout: float | None = 10.0,
        stall_timeout: float | None = 1800.0,
        on_error: Literal["raise", "warn"] = "raise",
        reconnect: float = 60.0,
        resend_acked: int = SERVER_QUEUE_SAMPLES,
        resend_at_close: bool = True,
        tls: TLS | None = None,
    ) -> None:
        addresses = expand_addresses(host, port)
        check_routing(route, failover)
        for name, function in {"select": select, "client": client}.items():
            if not callable(function) and not (name == "select" and function is None):
                raise TypeError(f"{name}: got {function!r}, expected something to call")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error: got {on_error!r}, expected 'raise' or 'warn'")
        self._learner_count = len(addresses)
        self._choose_learner = route if callable(route) and self._learner_count > 1 else None
        self._spec = SampleSpec(example)
        self._select = select
        self._stall_timeout = check_timeout("stall_timeout", stall_timeout)
        self._on_error = on_error
        self._connector = Connector(
            addresses=addresses,
            least_inflight=route == "least_inflight",
            failover=failover,
            make_client=client,
            max_inflight_msgs=check_count("max_inflight_msgs", max_inflight_msgs, least=1),
            buffer_bytes=None if buffer_bytes is None else check_count("buffer_bytes", buffer_bytes, least=1),
            connect_timeout=check_timeout("connect_timeout", connect_timeout),
            stall_timeout=stall_timeout,
            reconnect=check_seconds("reconnect", reconnect),
            resend_acked=check_count("resend_acked", resend_acked, least=0),
            resend_at_close=resend_at_close,
            tls=check_tls(tls),
        )
        self._connector.check(self._spec)
        self._token = new_token()
        self._creator_pid = os.getpid()
        self._sessions: dict[int, Session] = {}
        self._register_process()

    @classmethod
    def from_batch(
        cls: type[_Sink], host: str | Sequence[str], port: int | Sequence[int], batch: Any, **options: Any
    ) -> _Sink:
        """A sink whose example is one sample of ``batch``.

        Args:
            host, port, options: as for the class.
            batch: what the loader yields: leaves ``(B, *shape)``. ``select``, if given, is applied to it first.

        Raises:
            ValueError: a leaf has no batch dimension.
            TypeError: a leaf is no dense array of numbers.
        """
        select = options.get("select")
        return cls(host, port, example_from_batch(batch if select is None else select(batch)), **options)

    def connect(self: _Sink) -> _Sink:
        """Connect now rather than at the first `send`; gives the sink itself.

        Raises:
            OSError, TimeoutError, HandshakeError, SpecMismatchError: as `TcpClient` raises them; and
            ConnectionClosedError after `close`. ``on_error`` has no say here.
        """
        session = self._session()
        if session.connect(self._open_route, None).closed:
            raise session.closed_error("the connection was lost")
        session.learner_gone = False
        return self

    @disable_compile
    def send(
        self,
        batch: Any,
        *,
        batched: bool | None = None,
        timeout: float | None = None,
        step: int | None = None,
        skip_last: int = 0,
    ) -> None:
        """Send one sample, or a batch of them; when it returns, ``batch`` may be changed.

        Args:
            batch: like the example, its leaves matched by key path; or with one more first dimension B on every leaf,
                which makes it B samples. A batch of 0 samples sends nothing.
            batched: says which of the two it is; None to tell by the number of dimensions.
            timeout: most seconds to wait for room, and before that for a connection; None to wait as long as
                ``connect_timeout`` and ``stall_timeout`` say.
            step: the number that `acked_through` knows this batch by, from 0 on; None for the one after the highest.
            skip_last: how many samples at the batch's end are not sent, such as those that a distributed sampler
                repeats.

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
        if not is_profiling():
            self._send(batch, batched, timeout, step, skip_last)
            return
        with profiler_range("echo_torch.send"):
            self._send(batch, batched, timeout, step, skip_last)

    def _send(self, batch: Any, batched: bool | None, timeout: float | None, step: int | None, skip_last: int) -> None:
        session = self._session()
        watermark = session.watermark
        if owned_by_this_thread(watermark.lock):
            raise RuntimeError("send() was called by a signal handler that interrupted send() in the same thread")
        if step is not None:
            step = watermark.begin_step(check_count("step", step, least=0))
        began = time.monotonic()
        try:
            match = self._match(batch, batched, skip_last)
            session.totals.check_seconds += time.monotonic() - began
            if not session.first_batch_logged:
                session.log_first_batch(match, self._spec)
            if step is None:  # so that a batch that is refused takes no number
                step = watermark.begin_step(None)
            accepted = session.deliver(self._open_route, match, timeout)
        except BaseException:
            if step is not None:
                watermark.fail_step(step)
            session.report_sent()
            raise
        if accepted is None:
            watermark.fail_step(step)
        else:
            session.note_accepted(watermark, step, accepted)

    def _send_from_loader(self, batch: Any) -> None:
        self.send(batch)

    def wait(self, timeout: float | None = None, group: ProcessGroup | None = None, *, progress: bool = False) -> None:
        """Block until everything sent so far, by this process and by its DataLoader workers, is acked.

        Other children count as well, from the moment that their `send` returns; those of another sink do not.

        Args:
            timeout: most seconds to wait; None to wait as long as ``stall_timeout`` says.
            group: in a distributed job, processes that all call this, each for its own sink: if it ends badly for any
                of them, all raise, rather than that some go on to wait for those that do not come any more. A group
                for CPU tensors, such as ``torch.distributed.new_group(backend="gloo")``. The others are waited for
                up to a minute longer than for the server.
            progress: whether to show a bar of the samples that are waited for; needs tqdm.

        Raises:
            ConnectionClosedError: the connection ended before that, or a child died or lost its own, which is said once
                (``on_error="raise"``); names processes and counts.
            DeliveryTimeoutError: ``timeout`` or ``stall_timeout`` passed; delivery goes on. With ``group``, both also
                if that happened to another process of it; or not all of them came.
        """
        check_timeout("timeout", timeout)
        wait = functools.partial(self._wait, timeout, group)
        if progress:
            wait_with_bar(self, wait)
        else:
            wait()

    def _wait(self, timeout: float | None, group: ProcessGroup | None) -> None:
        session = self._session()
        if group is None:
            session.wait(timeout)
        else:
            wait_together(session.peer, session.wait, timeout, self._stall_timeout, group)

    @property
    def acked_through(self) -> int:
        """The highest step up to which everything is acked, -1 for none; of what this process sent.

        A step is the number of a batch: the ``step`` that `send` was given, or else counted from 0 on. What was not
        sent in full, because `send` raised or the learner was gone, holds it down until the same step is sent again.
        A step that `send` was not given yet does not: whoever numbers batches has to send them in order.
        Acked is not durable: a server that crashes loses what it acked.
        """
        return self._session().acked_through()

    def state_dict(self) -> dict[str, Any]:
        """`acked_through` and what `stats` counts, as plain numbers, to go on from with `load_state_dict`."""
        return self._session().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have `acked_through` and `stats` go on from those of another run.

        What was in flight when ``state`` was made counts as ``maybe_lost`` from now on.

        Raises:
            TypeError, ValueError: ``state`` is not what `state_dict` gives. Nothing was changed.
        """
        self._session().load_state_dict(state)

    def _match(self, batch: Any, batched: bool | None, skip_last: int) -> Match:
        data = batch if self._select is None else self._select(batch)
        match = self._spec.match(data, batched)
        if self._choose_learner is not None:
            match = match._replace(shards=check_shards(self._choose_learner(data), match.rows, self._learner_count))
        return match.without_last(check_count("skip_last", skip_last, least=0)) if skip_last else match

    def _drop_rest(self, batch: Any, skip_last: int, accepted: int) -> None:
        """Count as dropped what `send` did not accept of ``batch``, for which there was no room."""
        self._session().drop(self._match(batch, None, skip_last).rows - accepted)

    def close(self, timeout: float | None = CLOSE_TIMEOUT_S) -> None:
        """Deliver what was sent, make the tail of it safe in the server, and end this process's connection.

        Its DataLoader workers, and other daemonic children, do so at the same time; sends there raise from then on.
        Idempotent. The descriptors and the thread are freed in any case.

        Args:
            timeout: most seconds for what is un-acked.

        Raises:
            DeliveryTimeoutError: samples were un-acked when the time was up; ``unacked`` says how many. 0 of them if it
                was only the tail, which is sent once more, that was not acked again.
            ConnectionClosedError: the connection had failed with samples un-acked, and no call had said so.
        """
        check_timeout("timeout", timeout)
        self._session().close(timeout)

    def collate(
        self,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        *,
        select: Callable[[Any], Any] | None = None,
        forward: bool = True,
    ) -> SinkCollate:
        """A ``collate_fn`` for a ``DataLoader`` that sends each batch where it is made; see `workers.SinkCollate`."""
        return SinkCollate(self, collate_fn, select=select, forward=forward)

    def worker_init(self, worker_id: int) -> None:
        """A ``worker_init_fn`` for a ``DataLoader``: connects a worker before its first batch; raises as `connect`."""
        self.connect()

    def tee(self, loader: Iterable[_Batch], *, progress: bool = False) -> Tee[_Batch]:
        """Iterate over ``loader``, sending each batch before it is handed on, and `wait` when it is exhausted.

        Args:
            loader: what it yields is sent.
            progress: whether to show a bar of its batches, with the samples acked and in flight; needs tqdm.
        """
        return Tee(self, loader, progress)

    def stats(self) -> SinkStats:
        """What was sent, acked and dropped by this process and its DataLoader workers, and what that cost."""
        return self._session().stats()

    @property
    def peer(self) -> str:
        """The learner, as ``host:port``, or all of them."""
        return self._session().peer

    def __enter__(self: _Sink) -> _Sink:
        return self.connect()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        timeout = CLOSE_TIMEOUT_S if error is None else EXCEPTION_CLOSE_TIMEOUT_S
        close_without_masking(error, functools.partial(self.close, timeout), self.peer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sessions": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register_process()

    def __repr__(self) -> str:
        return f"<EchoSink {self.peer} {self._spec.describe()}>"

    def _session(self) -> Session:
        """This process's own; without a lock, for a lock may have been copied by a fork while it was held."""
        pid = os.getpid()
        session = self._sessions.get(pid)
        if session is None:
            new = Session(
                self._connector.learner_names,
                self._spec.payload_size,
                self._token,
                self._creator_pid,
                self._connector.acked_at_risk,
                self._stall_timeout,
                self._on_error == "raise",
            )
            session = self._sessions.setdefault(pid, new)
        return session

    def _register_process(self) -> None:
        """Have a session that is told of the end of this process, even if only its children send.

        And in each that multiprocessing forks, such as the ranks of a job, each with workers.
        """
        self._session()
        multiprocessing.util.register_after_fork(self, EchoSink._session)

    def _open_route(self, timeout: float | None) -> Route:
        return self._connector.open_route(self._spec, timeout)
