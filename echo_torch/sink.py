"""`EchoSink`: sends the batches of a training loop to an ``echo.Server``.

* A sink is configuration, so you can pickle it. Its state in one process is a `Session`, which is not pickled.
* Each process that uses the sink opens its own connection, at the first use.
* The sink looks up its process id before it touches any lock, so you may fork at any moment.
"""

from __future__ import annotations

import functools
import multiprocessing.util
import os
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
from .samples.spec import Match, SampleSpec, example_from_batch
from .session.session import Session
from .support.deadline import NEVER, as_deadline
from .support.tracing import disable_compile, is_profiling, profiler_range
from .support.validation import check_count, check_seconds, check_timeout
from .tee import Tee
from .wire.connect import pair_hosts_and_ports
from .wire.tls import TLS, check_tls
from .workers import LoaderSender, SinkCollate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Batch = TypeVar("_Batch")
_Sink = TypeVar("_Sink", bound="EchoSink")

# Default upper limit for un-acked samples. A learner that is not slower than its actors never has so many to ack.
MAX_UNACKED = 4096
# Default timeout of `EchoSink.close`, in seconds: a learner in the middle of an evaluation still gets everything.
CLOSE_TIMEOUT_S = 60.0
# Timeout of the close when an exception leaves the ``with`` block, in seconds.
EXCEPTION_CLOSE_TIMEOUT_S = 5.0


class EchoSink(LoaderSender):
    """Sends batches from a training loop to an ``echo.Server``, sample by sample.

    Thread-safe and picklable. You may use it in child processes: each opens its own connection. ``with`` connects at
    once and closes at the end.

    Example::

        from echo_torch import EchoSink
        with EchoSink("learner", 50051, example=dataset[0]) as sink:
            for batch in loader:
                step(batch)
                sink.send(batch)
            sink.wait()

    Args:
        host: the learner's name, IPv4 or IPv6 address; a list for several learners.
        port: the learner's TCP port; a list for several learners. A single host goes with all ports of a list, and a
            single port with all hosts.
        example: one sample as the server expects it, for instance ``dataset[0]``: a pytree of tensors, numpy arrays and
            scalars. Only its structure, shapes and dtypes count.
        max_inflight_msgs: most samples that are un-acked at a time; never more than 8 MiB of them.
        buffer_bytes: bytes of host memory for un-acked samples, for each learner; `send` blocks while it is full. By
            default 64 MiB, or 16 MiB in a DataLoader worker, or more if ``resend_acked + 2`` samples need it.
        max_unacked: most samples accepted and not acked, at each learner and in each process. It keeps small samples
            from running too far ahead of the learner. Rises to two of the largest batch so far, if the buffer holds
            them. None for as many as ``buffer_bytes`` hold.
        on_full: what `send` does without room for a batch. ``"block"`` waits for room. ``"drop"`` drops the whole batch
            and counts it (``stats().dropped``), for actors that would rather act than wait.
        select: a function that turns what you send into what the server expects. Pass a module-level function if the
            sink must pickle.
        client: `TcpClient`, or any callable ``(host, port, data_sample, max_inflight_msgs)`` that returns a `Client`,
            such as ``echo.TcpClient``. Other clients than `TcpClient` have no timeouts, and only their own delivery
            guarantees hold. If you override ``wait``, ``close`` or ``send_match`` in a subclass of `TcpClient`, the
            sink passes a `Deadline` as their timeout: hand it on.
        connect_timeout: seconds to connect; None for no limit. The sink tries again while the learner does not listen
            yet.
        route: how batches are spread over several learners. ``"round_robin"`` sends to each in turn, and waits for one
            that has no room. ``"least_inflight"`` sends to the one with the fewest un-acked samples among those with
            room, so that a slow learner delays nobody. Or a function of what you send that returns the learner's index,
            or for a batch an integer tensor ``(B,)`` of indices; a module-level one if the sink must pickle.
        failover: whether the other learners take over from one that is gone, at the next `send`, `wait` or `close`.
            They also get the samples that it may not have. A learner is gone when it could not be reached for
            ``reconnect`` seconds; until then the sink skips it. Without ``failover``, the loss of one learner counts as
            the loss of all.
        stall_timeout: seconds without any ack after which `send` and `wait` raise; None for never.
        on_error: ``"raise"``, or ``"warn"`` to log the loss of the learner once, and to drop and count all later
            samples. While the connection is being opened again, only samples that find no room are dropped.
        on_learner_gone: what happens when the learner has finished, that is, when it ended the connection in order and
            nobody has listened at its address for ``stop_after`` seconds. ``"raise"`` tries for all of ``reconnect``,
            as after a crash, and then raises. ``"stop"`` ends sending quietly: `learner_gone` becomes True, and `send`
            drops and counts all later samples. A crash has the same effect with either value.
        stop_after: seconds, for ``on_learner_gone="stop"``.
        reconnect: seconds for which the sink tries to open a lost connection again; 0 for not at all. At most 2 in a
            DataLoader worker. Once connected, the sink sends the samples again that the server may not have stored, so
            a learner may get samples twice. Put an index into your samples if that matters.
        resend_acked: how many acked samples the sink keeps, to send them again on a new connection and in `close`. With
            fewer than the server's ``producer_queue_size``, samples may be lost when a connection ends.
        resend_at_close: whether `close` sends those samples again. Without it, `close` waits 0.1 s instead, and a
            server that is busy for longer may discard samples.
        tls: a `TLS`, for a proxy with TLS in front of the learner. With None, anybody on the way can read and change
            your samples.

    Raises:
        TypeError: a leaf of ``example`` is no dense array of numbers, or an argument has the wrong type.
        ValueError: the sample has no bytes, or an argument is out of range.
    """

    def __init__(
        self,
        host: str | Sequence[str],
        port: int | Sequence[int],
        example: Any,
        *,
        max_inflight_msgs: int = 1024,
        buffer_bytes: int | None = None,
        max_unacked: int | None = MAX_UNACKED,
        on_full: Literal["block", "drop"] = "block",
        select: Callable[[Any], Any] | None = None,
        client: Callable[..., Client] = TcpClient,
        route: Routing = "round_robin",
        failover: bool = False,
        connect_timeout: float | None = 10.0,
        stall_timeout: float | None = 1800.0,
        on_error: Literal["raise", "warn"] = "raise",
        on_learner_gone: Literal["raise", "stop"] = "raise",
        stop_after: float = 3.0,
        reconnect: float = 60.0,
        resend_acked: int = SERVER_QUEUE_SAMPLES,
        resend_at_close: bool = True,
        tls: TLS | None = None,
    ) -> None:
        addresses = pair_hosts_and_ports(host, port)
        check_routing(route, failover)
        for name, function in {"select": select, "client": client}.items():
            if not callable(function) and not (name == "select" and function is None):
                raise TypeError(f"{name}: got {function!r}, expected something to call")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error: got {on_error!r}, expected 'raise' or 'warn'")
        if on_learner_gone not in ("raise", "stop"):
            raise ValueError(f"on_learner_gone: got {on_learner_gone!r}, expected 'raise' or 'stop'")
        check_seconds("stop_after", stop_after)
        if on_full not in ("block", "drop"):
            raise ValueError(f"on_full: got {on_full!r}, expected 'block' or 'drop'")
        self._learner_count = len(addresses)
        self._choose_learner = route if callable(route) and self._learner_count > 1 else None
        self._spec = SampleSpec(example)
        self._select = select
        self._on_error = on_error
        self._connector = Connector(
            addresses=addresses,
            least_inflight=route == "least_inflight",
            failover=failover,
            make_client=client,
            max_inflight_msgs=check_count("max_inflight_msgs", max_inflight_msgs, least=1),
            buffer_bytes=None if buffer_bytes is None else check_count("buffer_bytes", buffer_bytes, least=1),
            max_unacked=None if max_unacked is None else check_count("max_unacked", max_unacked, least=1),
            drops_when_full=on_full == "drop",
            connect_timeout=check_timeout("connect_timeout", connect_timeout),
            stall_timeout=check_timeout("stall_timeout", stall_timeout),
            reconnect=check_seconds("reconnect", reconnect),
            resend_acked=check_count("resend_acked", resend_acked, least=0),
            resend_at_close=resend_at_close,
            gone_after=stop_after if on_learner_gone == "stop" else None,
            tls=check_tls(tls),
        )
        self._connector.check(self._spec)
        self._token = new_token()
        self._creator_pid = os.getpid()
        self._sessions: dict[int, Session] = {}
        self._create_session_eagerly()

    @classmethod
    def from_batch(
        cls: type[_Sink], host: str | Sequence[str], port: int | Sequence[int], batch: Any, **options: Any
    ) -> _Sink:
        """Make a sink whose example is one sample of ``batch``.

        Args:
            host, port, options: as for the class.
            batch: what the loader yields, with leaves ``(B, *shape)``. ``select``, if given, is applied to it first.

        Raises:
            ValueError: a leaf has no batch dimension.
            TypeError: a leaf is no dense array of numbers.
        """
        select = options.get("select")
        return cls(host, port, example_from_batch(batch if select is None else select(batch)), **options)

    def connect(self: _Sink) -> _Sink:
        """Connect now rather than at the first `send`, and return the sink.

        It raises even with ``on_error="warn"``.

        Raises:
            OSError, TimeoutError, HandshakeError, SpecMismatchError: as `TcpClient` raises them.
            ConnectionClosedError: the sink was closed, or the connection was lost.
        """
        self._session().connect(NEVER)
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
        """Send one sample or a batch of samples; you may change ``batch`` as soon as this returns.

        Args:
            batch: one sample like the example, with its leaves matched by key path; or B samples, with one more first
                dimension B on every leaf. A batch of 0 samples sends nothing.
            batched: True for a batch, False for one sample, None to decide by the number of dimensions.
            timeout: most seconds to connect and to wait for room. None for the limits ``connect_timeout`` and
                ``stall_timeout``.
            step: the number of this batch for `acked_through`, 0 or more; None for the highest so far plus 1.
            skip_last: how many samples at the end of the batch not to send, such as those that a distributed sampler
                repeats.

        Raises:
            SpecMismatchError: the batch differs from the example; names path, got, expected. Nothing was sent.
            TypeError: a leaf is no dense array of numbers. Nothing was sent.
            ConnectionClosedError: the sink was closed, or the learner is gone; ``rows_accepted`` says how many samples
                of the batch were accepted.
            DeliveryTimeoutError: there was no room in time; has ``rows_accepted``, too.
            OSError, HandshakeError: as `connect` raises them.

        With ``on_error="warn"``, it logs a learner that is gone or cannot be reached, and raises nothing. While a lost
        connection is being opened again, it drops what finds no room in the buffer. A learner that is there and acks
        nothing still raises DeliveryTimeoutError.
        """
        check_timeout("timeout", timeout)
        if step is not None:
            step = check_count("step", step, least=0)
        # The session calls this once the step has begun.
        make_match = functools.partial(self._match, batch, batched, skip_last)
        if not is_profiling():
            self._session().send(make_match, step, timeout)
            return
        with profiler_range("echo_torch.send"):
            self._session().send(make_match, step, timeout)

    def _send_from_loader(self, batch: Any) -> None:
        self.send(batch)

    def wait(self, timeout: float | None = None, group: ProcessGroup | None = None, *, progress: bool = False) -> None:
        """Block until everything sent so far, by this process and by its DataLoader workers, is acked.

        If other child processes use this sink, it also covers every sample of theirs whose `send` has returned.

        Args:
            timeout: most seconds to wait; None for the limit ``stall_timeout``.
            group: in a distributed job, a group of processes that all call this, each for its own sink. If the wait
                fails in one process, it raises in all, so that none goes on and waits for the others forever. Pass a
                group for CPU tensors, such as ``torch.distributed.new_group(backend="gloo")``. The wait for the other
                processes may take up to a minute longer than the wait for the server.
            progress: whether to show a bar of the samples in flight; needs tqdm.

        Raises:
            ConnectionClosedError: the connection ended with samples un-acked, or a child died or lost its connection.
                Names processes and counts. A child's failure is raised once. With ``on_error="warn"`` all this is
                logged instead.
            DeliveryTimeoutError: ``timeout`` or ``stall_timeout`` passed; delivery goes on. With ``group``, also if not
                all processes came in time.
            ImportError: ``progress`` without tqdm.

        With ``group``, the first two are also raised for the failure of another process.
        """
        session = self._session()
        wait = functools.partial(session.wait, as_deadline(timeout))
        if group is not None:
            wait = functools.partial(wait_together, session.peer, wait, timeout, self._connector.stall_timeout, group)
        if progress:
            wait_with_bar(self, wait)
        else:
            wait()

    @property
    def acked_through(self) -> int:
        """The highest step up to which everything that this process sent is acked; -1 for none.

        A step is the number of a batch: the ``step`` that you passed to `send`, or else a count from 0. A batch that
        was not sent in full, because `send` raised or the learner was gone, holds this number down until you send the
        same step again. A step that you have not sent yet does not hold it down: so send your steps in order.

        Acked is not durable: a server that crashes loses what it acked.
        """
        return self._session().acked_through()

    def state_dict(self) -> dict[str, Any]:
        """Return `acked_through` and the counters of `stats` as plain numbers, for `load_state_dict`."""
        return self._session().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue `acked_through` and the counters of `stats` from another run.

        Samples that were in flight when ``state`` was saved count as ``maybe_lost`` from now on.

        Args:
            state: what `state_dict` returned.

        Raises:
            TypeError, ValueError: ``state`` is something else. Nothing was changed.
        """
        self._session().load_state_dict(state)

    def _match(self, batch: Any, batched: bool | None, skip_last: int) -> Match:
        data = batch if self._select is None else self._select(batch)
        match = self._spec.match(data, batched)
        if self._choose_learner is not None:
            match = match._replace(shards=check_shards(self._choose_learner(data), match.rows, self._learner_count))
        return match.without_last_rows(check_count("skip_last", skip_last, least=0)) if skip_last else match

    def _count_dropped(self, batch: Any, skip_last: int, accepted: int) -> None:
        """Count as dropped the samples of ``batch`` that `send` did not accept. It accepted ``accepted``."""
        self._session().count_dropped(self._match(batch, None, skip_last).rows - accepted)

    def _sent_by_children(self) -> int:
        """Return how many samples the children of this process have sent."""
        return self._session().sent_by_children()

    def close(self, timeout: float | None = CLOSE_TIMEOUT_S) -> None:
        """Deliver everything, send the last ``resend_acked`` samples again, and close; idempotent.

        DataLoader workers and other daemonic children close at the same time; a `send` there raises from then on. The
        descriptors and the thread are freed in any case.

        Args:
            timeout: most seconds to wait for acks; None for the limit ``stall_timeout``.

        Raises:
            DeliveryTimeoutError: samples were un-acked when the time was up; ``unacked`` says how many. It is 0 if all
                were acked, and only those that `close` sent again were not.
            ConnectionClosedError: the connection had failed with samples un-acked, and no call has raised that yet.
        """
        self._session().close(as_deadline(timeout))

    def collate(
        self,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        *,
        select: Callable[[Any], Any] | None = None,
        forward: bool = True,
    ) -> SinkCollate:
        """Return a ``collate_fn`` for a ``DataLoader`` that sends each batch where it is made.

        The arguments are those of `workers.SinkCollate`.
        """
        return SinkCollate(self, collate_fn, select=select, forward=forward)

    def worker_init(self, worker_id: int) -> None:
        """Connect a worker before its first batch, as ``DataLoader(worker_init_fn=...)``; raises as `connect`."""
        self.connect()

    def tee(self, loader: Iterable[_Batch], *, progress: bool = False) -> Tee[_Batch]:
        """Return an iterable over ``loader`` that sends each batch before it yields it, and waits at the end.

        Args:
            loader: yields batches as `send` takes them.
            progress: whether to show a bar of the batches, with the samples acked and in flight; needs tqdm.
        """
        return Tee(self, loader, progress)

    def stats(self) -> SinkStats:
        """Return what this process and its DataLoader workers sent, and where the time went."""
        return self._session().stats()

    @property
    def learner_gone(self) -> bool:
        """Whether a `send` of this process found that the learner is gone, so that samples are dropped.

        Only with ``on_learner_gone="stop"`` or ``on_error="warn"``; otherwise `send` raises.
        """
        return self._session().learner_gone

    @property
    def peer(self) -> str:
        """The learner as ``host:port``; several are separated by commas."""
        return self._session().peer

    def __enter__(self: _Sink) -> _Sink:
        return self.connect()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        timeout = CLOSE_TIMEOUT_S if error is None else EXCEPTION_CLOSE_TIMEOUT_S
        close_without_masking(error, functools.partial(self.close, timeout), self.peer)

    def __getstate__(self) -> dict[str, Any]:
        # A child may use the copy and report to this process.
        self._session().prepare_for_children()
        return {**self.__dict__, "_sessions": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._create_session_eagerly()

    def __repr__(self) -> str:
        return f"<EchoSink {self.peer} {self._spec.describe()}>"

    def _session(self) -> Session:
        """Return this process's session, made at the first call."""
        # No lock here: a fork may have copied it while another thread held it. `setdefault` lets one thread win.
        pid = os.getpid()
        session = self._sessions.get(pid)
        if session is None:
            raise_on_loss = self._on_error == "raise"
            new = Session(self._connector, self._spec, self._token, self._creator_pid, raise_on_loss)
            session = self._sessions.setdefault(pid, new)
        return session

    def _create_session_eagerly(self) -> None:
        """Make the session now, so that it waits for the children when this process ends, even if only they send.

        Processes that multiprocessing forks do the same, because they may have workers of their own: the ranks of a
        job, for instance.
        """
        self._session()
        multiprocessing.util.register_after_fork(self, EchoSink._session)
