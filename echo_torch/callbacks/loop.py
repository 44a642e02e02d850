"""When to send, when to wait, and what to do if the learner is slow or the training fails.

`SinkCallback` is for hand-written loops, and what the adapters for trainers translate their events to::

    with SinkCallback(sink) as callback:
        for epoch in range(epochs):
            for batch in loader:
                outputs = step(batch)
                callback.on_batch_end(batch, outputs)
            callback.on_epoch_end()
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import optree
import torch

from echo_torch.errors import DeliveryTimeoutError
from echo_torch.sink import EchoSink
from echo_torch.support.validation import check_count, check_timeout
from echo_torch.workers import LoaderSender

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger(__name__)

_Self = TypeVar("_Self", bound="SinkCallback")

FLUSH_TIMEOUT_S = 60.0
"""Seconds that a flush may take by default: a learner in the middle of an evaluation is waited for."""
EXCEPTION_FLUSH_S = 5.0
"""Seconds that may pass between an error of the training and its report."""
CONNECT_S = 10.0
"""Seconds that the first batch may take at the least in a process that has not connected before."""
STALLED_FLUSH_S = 1.0
"""Seconds that a flush may take while the learner has acked nothing since it was last waited for in vain."""


class SinkCallback(LoaderSender):
    """Sends what a training loop tells of, and waits for it to be acked when an epoch ends.

    For one loop at a time. It pickles if its sink and ``select`` do.

    Args:
        sink: stays the caller's.
        select: makes what is sent of batch and outputs, ``select(batch, outputs)``, or None to send nothing of it. The
            outputs come detached, as far as they are tensors in dicts, lists and tuples, and no gradient is recorded.
            By default the batch is sent.
        every_n_batches: sends only every n-th.
        flush: waits at the end of each ``"epoch"``, before checkpoints and at the end of the training, or only at its
            ``"end"``.
        flush_timeout: most seconds that the loop is held up at a time, by a flush, or by a send for which there is no
            room; None for as long as the sink's ``stall_timeout``.
        on_stall: what to do after that: ``"warn"`` logs what is left and goes on, without the batches for which there
            is no room (``skipped`` counts them, and ``dropped`` of `EchoSink.stats` their samples, also those of
            workers), and hardly waits again until the learner acks something; or ``"raise"``.
        close: whether to close the sink when the training has ended.
        group: for distributed training, where flushes then end the same way on all ranks; see `EchoSink.wait`. They
            take up to ``flush_timeout`` each time then. A pickled callback has none.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    def __init__(
        self,
        sink: EchoSink,
        *,
        select: Callable[[Any, Any], Any] | None = None,
        every_n_batches: int = 1,
        flush: Literal["epoch", "end"] = "epoch",
        flush_timeout: float | None = FLUSH_TIMEOUT_S,
        on_stall: Literal["warn", "raise"] = "warn",
        close: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(sink, EchoSink):
            raise TypeError(f"sink: got {sink!r}, expected an EchoSink")
        if select is not None and not callable(select):
            raise TypeError(f"select: got {select!r}, expected something to call, or None")
        if flush not in ("epoch", "end"):
            raise ValueError(f"flush: got {flush!r}, expected 'epoch' or 'end'")
        if on_stall not in ("warn", "raise"):
            raise ValueError(f"on_stall: got {on_stall!r}, expected 'warn' or 'raise'")
        self.sink = sink
        self.group = group
        self.skipped = 0
        """Batches that this process did not send, or not in full, because there was no room for them."""
        self._select = select
        self._every_n = check_count("every_n_batches", every_n_batches, least=1)
        self._flushes_each_epoch = flush == "epoch"
        self._flush_timeout = check_timeout("flush_timeout", flush_timeout)
        self._raises_on_stall = on_stall == "raise"
        self._closes_sink = close
        self._batch_count = 0
        self._connected_pid: int | None = None  # the process
        self._acked_when_stalled: int | None = (
            None  # how many samples were acked when the learner was found to be stalled
        )
        self._ended = False  # by an error, or closed: nothing is waited for

    def setup(self) -> None:
        """Before the first step: connect, so that a wrong address is an error here.

        Raises:
            OSError, TimeoutError, HandshakeError, SpecMismatchError: as `EchoSink.connect`.
        """
        self._ended = False
        if self._connected_pid != os.getpid():
            self.sink.connect()
            self._connected_pid = os.getpid()

    def on_batch_end(self, batch: Any, outputs: Any = None, *, padding: int = 0) -> None:
        """After the step on ``batch``: send it.

        Args:
            batch: what the loader gave.
            outputs: what the step made of it; for ``select``.
            padding: how many samples at the end, of what ``select`` made if it is given, are repeated ones, not to be
                sent; see `padding`.

        Raises:
            SpecMismatchError, TypeError: what is sent differs from the sink's example.
            ConnectionClosedError: the learner is gone (``on_error="raise"`` of the sink).
            DeliveryTimeoutError: no room for ``flush_timeout`` seconds (``on_stall="raise"``).
        """
        self._batch_count += 1
        if self._batch_count % self._every_n:
            return
        selected = batch
        if self._select is not None:
            with torch.no_grad():
                selected = self._select(batch, optree.tree_map(_detach, outputs, none_is_leaf=True))
        if selected is None:
            return
        timeout = self._next_timeout(0.0)
        if timeout is not None and self._connected_pid != os.getpid():  # as in a worker, where this connects
            timeout = max(timeout, CONNECT_S)
        try:
            self.sink.send(selected, timeout=timeout, skip_last=padding)
            self._connected_pid = os.getpid()
        except DeliveryTimeoutError as error:
            self.skipped += 1
            self._report_stall("no room for a batch, which is not sent", error, once=True)
            self.sink._drop_rest(selected, padding, error.rows_accepted)
        else:
            self._report_recovery()

    def _send_from_loader(self, batch: Any) -> None:
        self.on_batch_end(batch)

    def on_epoch_end(self) -> None:
        """Wait until everything sent is acked; raises as `EchoSink.wait`, but for what ``on_stall`` lets pass."""
        if self._flushes_each_epoch:
            self._flush("the end of the epoch")

    def on_checkpoint(self) -> None:
        """Before a checkpoint is written: as `on_epoch_end`."""
        if self._flushes_each_epoch:
            self._flush("a checkpoint")

    def on_exception(self, error: BaseException) -> None:
        """When the training fails, or is interrupted: deliver for up to 5 seconds, and log what is left.

        Never raises, so that ``error`` is the one that is seen. Until the next `setup`, nothing is waited for any more.
        """
        if self._ended:
            return
        self._ended = True
        seconds = 0.0 if self._is_stalled() else EXCEPTION_FLUSH_S
        try:
            if self._closes_sink:
                self._connected_pid = None
                self.sink.close(seconds)
            else:
                self.sink.wait(seconds)
        except Exception as problem:
            _log.warning("after %s: %s", type(error).__name__, problem)

    def on_train_end(self) -> None:
        """Wait until everything sent is acked, whatever ``flush`` says, and close if ``close``; raises likewise."""
        if self._ended:
            return
        try:
            self._flush("the end of the training")
        finally:
            if self._closes_sink:
                self._ended = True  # a later end, of a `with` block for one, finds nothing left to do
                self._close()

    def state_dict(self) -> dict[str, Any]:
        """The counts of this callback, and the sink's `EchoSink.state_dict`."""
        return {"batches": self._batch_count, "skipped": self.skipped, "sink": self.sink.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; raises as `EchoSink.load_state_dict`."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state: got {state!r}, expected what state_dict() gives")
        batches = check_count("state['batches']", state.get("batches"), least=0)  # type: ignore[arg-type]
        skipped = check_count("state['skipped']", state.get("skipped"), least=0)  # type: ignore[arg-type]
        self.sink.load_state_dict(state.get("sink") or {})
        self._batch_count, self.skipped = batches, skipped

    def __enter__(self: _Self) -> _Self:
        self.setup()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.on_train_end()
        else:
            self.on_exception(error)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}  # no process group can be pickled

    def _flush(self, when: str) -> None:
        if self._ended:
            return
        try:
            # With a group, all ranks have the same patience, or the first to lose it would not wait for the others.
            self.sink.wait(
                self._next_timeout(STALLED_FLUSH_S) if self.group is None else self._flush_timeout, self.group
            )
        except DeliveryTimeoutError as error:
            self._report_stall(f"at {when}", error)
        else:
            self._report_recovery()

    def _close(self) -> None:
        self._connected_pid = None  # so that another `setup` finds that it is closed
        try:
            self.sink.close(self._next_timeout(STALLED_FLUSH_S))
        except DeliveryTimeoutError as error:
            self._report_stall("on closing", error)

    def _next_timeout(self, timeout_if_stalled: float) -> float | None:
        """How long to wait for the learner: at most ``timeout_if_stalled`` seconds, once that was in vain, until it acks again."""
        if self._raises_on_stall or not self._is_stalled():
            return self._flush_timeout
        return timeout_if_stalled if self._flush_timeout is None else min(timeout_if_stalled, self._flush_timeout)

    def _is_stalled(self) -> bool:
        """Whether the learner was waited for in vain, and has acked nothing since."""
        return self._acked_when_stalled is not None and self.sink.stats().samples_acked == self._acked_when_stalled

    def _report_stall(self, when: str, error: DeliveryTimeoutError, *, once: bool = False) -> None:
        """Raise, or warn; if ``once``, not again while the learner is known to be stalled."""
        already_stalled = self._acked_when_stalled is not None
        stats = self.sink.stats()
        self._acked_when_stalled = (
            stats.samples_acked if stats.in_flight else None
        )  # with a group, others may have stalled
        if self._raises_on_stall:
            raise error
        if not (once and already_stalled):
            _log.warning("%s: %s; the training goes on; %d batches skipped so far", when, error, self.skipped)

    def _report_recovery(self) -> None:
        """There was room, or all is acked; but room may have been left."""
        if self._acked_when_stalled is not None and not self._is_stalled():
            _log.warning("%s: takes samples again; %d batches skipped so far", self.sink.peer, self.skipped)
            self._acked_when_stalled = None


def padding(loader: Any, batch_idx: int) -> int:
    """How many samples at the end of a batch a ``DistributedSampler`` repeated to give every rank as many.

    Args:
        loader: a ``DataLoader``; 0 if its sampler is no ``DistributedSampler``.
        batch_idx: the batch's number in the epoch, from 0 on; only the last has any.
    """
    from torch.utils.data import DistributedSampler

    sampler = getattr(loader, "sampler", None)
    size = getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or not size or batch_idx + 1 != len(loader):
        return 0
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    seen = len(loader) * size if loader.drop_last else len(sampler)
    return max(0, seen - own)


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
