"""The sending policy: when to send, when to wait, and what to do if the learner stalls or the training fails.

`SinkCallback` serves hand-written loops. The adapters for trainers translate their events into its methods.

* A batch is sent after its step. A flush blocks until everything sent is acked: at the end of an epoch, before a
  checkpoint, and at the end of the training.
* A learner that lets a wait time out counts as *stalled* until it acks more. Meanwhile a send does not wait and a flush
  waits `STALLED_FLUSH_S` at most. So a dead learner delays the training once, and not with every batch. With
  ``on_stall="raise"``, the first timeout raises instead.
* `on_exception` never raises, so it cannot mask the error of the training.
* After an error or a close, nothing waits until the next `setup`.
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
"""Default limit of a flush, in seconds: long enough for a learner that is busy with an evaluation."""
EXCEPTION_FLUSH_S = 5.0
"""Most seconds by which `SinkCallback.on_exception` delays the report of an error."""
CONNECT_S = 10.0
"""Least seconds that the first batch may take in a process that has not connected yet."""
STALLED_FLUSH_S = 1.0
"""Most seconds of a flush while the learner is stalled."""


class SinkCallback(LoaderSender):
    """Sends the batches of a training loop, and waits until they are acked when an epoch ends.

    Use one callback for one loop at a time. It pickles if its sink and ``select`` do.

    Example::

        from echo_torch.callbacks.loop import SinkCallback

        with SinkCallback(sink) as callback:
            for batch in loader:
                callback.on_batch_end(batch, step(batch))
            callback.on_epoch_end()

    Args:
        sink: the sink to send through. You keep it, unless ``close`` is set.
        select: ``select(batch, outputs)`` returns what to send, or None to send nothing. Tensors in the outputs, and in
            dicts, lists and tuples there, are detached, and gradients are off during the call. By default the batch is
            sent.
        every_n_batches: send only every n-th batch.
        flush: ``"epoch"`` waits at the end of each epoch, before checkpoints, and at the end of the training. ``"end"``
            waits only at the end of the training.
        flush_timeout: most seconds that one flush, or one send without room, may block the loop. None means the sink's
            ``stall_timeout``.
        on_stall: what to do after ``flush_timeout``. ``"raise"`` raises. ``"warn"`` logs what is left and continues:
            it skips batches for which there is no room, and hardly waits again until the learner acks something.
            ``skipped`` counts the skipped batches; ``dropped`` of `EchoSink.stats` counts their samples, including
            those that loader workers skip.
        close: whether to close the sink when the training ends.
        group: process group for distributed training. Flushes then end the same way on all its ranks, and each may take
            the whole ``flush_timeout``; see `EchoSink.wait`. A pickled callback loses its group.

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
        # The sink to send through.
        self.sink = sink
        # The ranks whose flushes end the same way; None for this process alone.
        self.group = group
        # Batches that this process did not send, or not completely, because there was no room for them.
        self.skipped = 0
        # What to send of a batch and its outputs; None for the batch.
        self._select = select
        # Only every n-th batch is sent.
        self._every_n = check_count("every_n_batches", every_n_batches, least=1)
        # Whether to flush at the end of an epoch and before a checkpoint.
        self._flushes_each_epoch = flush == "epoch"
        # Most seconds that a flush or a send may block; None for the sink's ``stall_timeout``.
        self._flush_timeout = check_timeout("flush_timeout", flush_timeout)
        # Whether a stalled learner is an error.
        self._raises_on_stall = on_stall == "raise"
        # Whether the end of the training closes the sink.
        self._closes_sink = close
        # Batches seen so far, the ones not sent included.
        self._batch_count = 0
        # The process that has connected. A fork or a loader's worker is another one, and connects itself.
        self._connected_pid: int | None = None
        # How many samples were acked when the learner was found stalled; None if it is not stalled.
        self._acked_when_stalled: int | None = None
        # Whether an error or a close has ended the run. Then nothing waits until the next `setup`.
        self._ended = False

    def setup(self) -> None:
        """Connect before the first step, so that a wrong address fails here.

        Raises:
            OSError, TimeoutError, HandshakeError, SpecMismatchError: see `EchoSink.connect`.
        """
        self._ended = False
        if self._connected_pid != os.getpid():
            self.sink.connect()
            self._connected_pid = os.getpid()

    def on_batch_end(self, batch: Any, outputs: Any = None, *, padding: int = 0) -> None:
        """Send ``batch`` after the step on it.

        Args:
            batch: the batch from the loader.
            outputs: what the step returned; passed to ``select``.
            padding: how many samples at the end are repeated ones and not sent; see `padding`. With ``select``, they
                are the last samples of what it made.

        Raises:
            SpecMismatchError, TypeError: the batch differs from the sink's example.
            ConnectionClosedError: the learner is gone, and the sink has ``on_error="raise"``.
            DeliveryTimeoutError: there was no room for ``flush_timeout`` seconds, with ``on_stall="raise"``.
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
        # This send also connects if the process, such as a loader's worker, is new. Leave time for that.
        if timeout is not None and self._connected_pid != os.getpid():
            timeout = max(timeout, CONNECT_S)
        try:
            self.sink.send(selected, timeout=timeout, skip_last=padding)
            self._connected_pid = os.getpid()
        except DeliveryTimeoutError as error:
            self.skipped += 1
            self._handle_stall("no room for a batch, which is not sent", error, once=True)
            # Count the samples that found no room as dropped.
            self.sink._count_dropped(selected, padding, error.rows_accepted)
        else:
            self._report_recovery()

    def _send_from_loader(self, batch: Any) -> None:
        self.on_batch_end(batch)

    def on_epoch_end(self) -> None:
        """Block until everything sent is acked.

        Raises what `EchoSink.wait` raises, except a stall that ``on_stall`` allows.
        """
        if self._flushes_each_epoch:
            self._flush("the end of the epoch")

    def on_checkpoint(self) -> None:
        """Flush before a checkpoint is written; see `on_epoch_end`."""
        if self._flushes_each_epoch:
            self._flush("a checkpoint")

    def on_exception(self, error: BaseException) -> None:
        """Deliver for up to 5 seconds after the training failed or was interrupted, and log what is left.

        Never raises, so that you see ``error``. Until the next `setup`, nothing waits any more.
        """
        if self._ended:
            return
        self._ended = True
        # Do not wait once more for a stalled learner.
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
        """Block until everything sent is acked, no matter what ``flush`` says, and close the sink if ``close`` is set.

        Raises what `on_epoch_end` raises.
        """
        if self._ended:
            return
        try:
            self._flush("the end of the training")
        finally:
            if self._closes_sink:
                # Set before the close, so that a later end, such as that of a ``with`` block, has nothing left to do.
                self._ended = True
                self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of this callback and `EchoSink.state_dict` of its sink."""
        return {"batches": self._batch_count, "skipped": self.skipped, "sink": self.sink.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state. Raises what `EchoSink.load_state_dict` raises."""
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
        return {**self.__dict__, "group": None}  # a process group does not pickle

    def _flush(self, when: str) -> None:
        if self._ended:
            return
        try:
            # With a group, all ranks use the same timeout. Otherwise the first to give up would not wait for the
            # others.
            self.sink.wait(
                self._next_timeout(STALLED_FLUSH_S) if self.group is None else self._flush_timeout, self.group
            )
        except DeliveryTimeoutError as error:
            self._handle_stall(f"at {when}", error)
        else:
            self._report_recovery()

    def _close(self) -> None:
        # The next `setup` then connects again, and so finds the sink closed.
        self._connected_pid = None
        try:
            self.sink.close(self._next_timeout(STALLED_FLUSH_S))
        except DeliveryTimeoutError as error:
            self._handle_stall("on closing", error)

    def _next_timeout(self, timeout_if_stalled: float) -> float | None:
        """Return how many seconds to wait for the learner.

        That is at most ``timeout_if_stalled`` while the learner is stalled, unless a stall raises anyway.
        """
        if self._raises_on_stall or not self._is_stalled():
            return self._flush_timeout
        return timeout_if_stalled if self._flush_timeout is None else min(timeout_if_stalled, self._flush_timeout)

    def _is_stalled(self) -> bool:
        """Whether a wait was in vain and the learner has acked nothing since."""
        return self._acked_when_stalled is not None and self.sink.stats().samples_acked == self._acked_when_stalled

    def _handle_stall(self, when: str, error: DeliveryTimeoutError, *, once: bool = False) -> None:
        """Raise or warn, as ``on_stall`` says. With ``once``, do not warn again while the learner is stalled."""
        already_stalled = self._acked_when_stalled is not None
        stats = self.sink.stats()
        # Nothing in flight means that this rank is fine: with a group, another one stalled.
        self._acked_when_stalled = stats.samples_acked if stats.in_flight else None
        if self._raises_on_stall:
            raise error
        if not (once and already_stalled):
            _log.warning("%s: %s; the training goes on; %d batches skipped so far", when, error, self.skipped)

    def _report_recovery(self) -> None:
        """Log that a stalled learner takes samples again, if it has acked something.

        A successful send proves nothing, because there may just have been room left.
        """
        if self._acked_when_stalled is not None and not self._is_stalled():
            _log.warning("%s: takes samples again; %d batches skipped so far", self.sink.peer, self.skipped)
            self._acked_when_stalled = None


def padding(loader: Any, batch_idx: int) -> int:
    """Return how many samples at the end of a batch are repeated ones.

    A ``DistributedSampler`` repeats samples so that every rank gets the same number. Only the last batch of an epoch
    has any.

    Args:
        loader: a ``DataLoader``. If its sampler is not a ``DistributedSampler``, the result is 0.
        batch_idx: the number of the batch in the epoch, from 0 on.
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
