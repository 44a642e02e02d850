"""The sending policy: when to send, when to wait, and what to do if the learner stalls or the training fails.

`SinkCallback` serves hand-written loops. The adapters for trainers translate their events into its methods.

* A batch is sent after its step. A flush blocks until everything sent is acked: at the end of an epoch, before a
  checkpoint, and at the end of the training.
* When a wait times out, the learner counts as *stalled* until it acks more samples. While it is stalled, a send does
  not wait, and a flush waits at most `STALLED_FLUSH_S`. So a dead learner delays the training once, and not with every
  batch. With ``on_stall="raise"``, the first timeout raises instead.
* `on_exception` never raises, so it cannot mask the error of the training.
* After an error or a close, a flush returns at once, until you call `setup` again.
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
"""Longest wait of `SinkCallback.on_exception`, in seconds. It delays the report of the error."""
CONNECT_S = 10.0
"""Shortest timeout, in seconds, of a send in a process that has not connected yet: that send also connects."""
STALLED_FLUSH_S = 1.0
"""Longest flush while the learner is stalled, in seconds."""


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
        select: ``select(batch, outputs)`` returns what to send, or None to send nothing. Gradients are off during the
            call. The tensors in ``outputs`` are detached, also those in dicts, lists and tuples. By default the batch
            is sent.
        send: whether to send at all. With False this only flushes, for batches that a loader's workers send.
        every_n_batches: send only every n-th batch.
        flush: ``"epoch"`` waits at the end of each epoch, before checkpoints, and at the end of the training. ``"end"``
            waits only at the end of the training.
        flush_timeout: most seconds that one flush may block the loop, or one send that waits for room. None means the
            sink's ``stall_timeout``.
        on_stall: what to do after ``flush_timeout``. ``"raise"`` raises. ``"warn"`` logs what is left and continues.
            Until the learner acks something, a flush waits at most `STALLED_FLUSH_S`. A send does not wait: a batch for
            which there is no room is skipped. ``skipped`` counts these batches. ``dropped`` of `EchoSink.stats` counts
            their samples, and also those that loader workers skip.
        close: whether to close the sink when the training ends.
        group: process group for distributed training. A flush then succeeds on all its ranks or fails on all. Each may
            take the whole ``flush_timeout``, even while a learner is stalled; see `EchoSink.wait`. A pickled callback
            loses its group.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    def __init__(
        self,
        sink: EchoSink,
        *,
        select: Callable[[Any, Any], Any] | None = None,
        send: bool = True,
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
        # The ranks that flush together; None for this process alone.
        self.group = group
        # Batches that this process did not send, or not completely, because there was no room for them.
        self.skipped = 0
        # Picks what to send from a batch and its outputs; None to send the batch.
        self._select = select
        # Whether to send batches.
        self._sends = send
        # What children had sent at `setup` or at the last flush; None once the log says that they send, too.
        self._sent_by_children: int | None = 0
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
        # Whether this has looked for what children send, since the last flush.
        self._looked_at_children = False
        # The id of the process that has connected. A forked child or a loader's worker connects for itself.
        self._connected_pid: int | None = None
        # How many samples were acked when the learner was found stalled; None if it is not stalled.
        self._acked_when_stalled: int | None = None
        # Whether an error or a close has ended the run. Then a flush returns at once, until the next `setup`.
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
            # What children sent for an earlier loop is not sent again.
            self._note_sent_by_children()

    def on_batch_end(self, batch: Any, outputs: Any = None, *, padding: int = 0) -> None:
        """Send ``batch`` after the step on it.

        Args:
            batch: the batch from the loader.
            outputs: what the step returned; passed to ``select``.
            padding: how many samples at the end of the batch are repeated ones, which are not sent; see the function
                `padding`. With ``select``, the last samples of what it returns are not sent.

        Raises:
            SpecMismatchError, TypeError: the batch differs from the sink's example.
            ConnectionClosedError: the learner is gone, and the sink has ``on_error="raise"``.
            DeliveryTimeoutError: there was no room for ``flush_timeout`` seconds, with ``on_stall="raise"``.
        """
        self._batch_count += 1
        if self._batch_count % self._every_n or not self._sends:
            return
        selected = batch
        if self._select is not None:
            with torch.no_grad():
                selected = self._select(batch, optree.tree_map(_detach, outputs, none_is_leaf=True))
        if selected is None:
            return
        self._warn_if_children_send()
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

    def _note_sent_by_children(self) -> None:
        if self._sent_by_children is not None:
            self._sent_by_children, self._looked_at_children = self.sink._sent_by_children(), False

    def _warn_if_children_send(self) -> None:
        """Log once if loader workers send by the same sink what this callback is about to send again."""
        if self._sent_by_children is None or self._looked_at_children:
            return
        # Look once after each flush: workers have sent a batch before the loop gets it.
        self._looked_at_children = True
        sent = self.sink._sent_by_children()
        if sent > self._sent_by_children:
            text = (
                "%s: %d samples were sent by child processes since the last flush, and %s sends its batches, too; if "
                "they are the same, use %s(sink, send=False), or leave out the sink in the loader"
            )
            name = type(self).__name__
            _log.warning(text, self.sink.peer, sent - self._sent_by_children, name, name)
            self._sent_by_children = None

    def on_epoch_end(self) -> None:
        """Block until everything sent is acked.

        Raises what `EchoSink.wait` raises. With ``on_stall="warn"``, a timeout is logged instead.
        """
        if self._flushes_each_epoch:
            self._flush("the end of the epoch")

    def on_checkpoint(self) -> None:
        """Flush before a checkpoint is written; see `on_epoch_end`."""
        if self._flushes_each_epoch:
            self._flush("a checkpoint")

    def on_exception(self, error: BaseException) -> None:
        """Wait up to 5 seconds for acks after the training failed or was interrupted, and log what is left.

        Never raises, so that you see ``error``. From then on a flush returns at once, until the next `setup`.
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
                # Set this before the close, so that a second end, such as that of a ``with`` block, does nothing.
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
            # With a group, all ranks use the same timeout. Otherwise the first rank to give up would not wait for the
            # other ranks.
            self.sink.wait(
                self._next_timeout(STALLED_FLUSH_S) if self.group is None else self._flush_timeout, self.group
            )
        except DeliveryTimeoutError as error:
            self._handle_stall(f"at {when}", error)
        else:
            self._report_recovery()
        self._note_sent_by_children()

    def _close(self) -> None:
        # Make the next `setup` connect again. That raises, because the sink is closed.
        self._connected_pid = None
        try:
            self.sink.close(self._next_timeout(STALLED_FLUSH_S))
        except DeliveryTimeoutError as error:
            self._handle_stall("on closing", error)

    def _next_timeout(self, timeout_if_stalled: float) -> float | None:
        """Return how many seconds to wait for the learner; None for the sink's ``stall_timeout``.

        That is ``flush_timeout``, but at most ``timeout_if_stalled`` while the learner is stalled. With
        ``on_stall="raise"``, it is always ``flush_timeout``.
        """
        if self._raises_on_stall or not self._is_stalled():
            return self._flush_timeout
        return timeout_if_stalled if self._flush_timeout is None else min(timeout_if_stalled, self._flush_timeout)

    def _is_stalled(self) -> bool:
        """Whether a wait timed out and the learner has acked nothing since."""
        return self._acked_when_stalled is not None and self.sink.stats().samples_acked == self._acked_when_stalled

    def _handle_stall(self, when: str, error: DeliveryTimeoutError, *, once: bool = False) -> None:
        """Raise or warn, as ``on_stall`` says. With ``once``, do not warn again while the learner is stalled."""
        already_stalled = self._acked_when_stalled is not None
        stats = self.sink.stats()
        # If nothing is in flight, this rank's learner has not stalled. The wait failed for another rank of the group.
        self._acked_when_stalled = stats.samples_acked if stats.in_flight else None
        if self._raises_on_stall:
            raise error
        if not (once and already_stalled):
            _log.warning("%s: %s; the training goes on; %d batches skipped so far", when, error, self.skipped)

    def _report_recovery(self) -> None:
        """Log that a stalled learner takes samples again, if it has acked something.

        Only an ack counts. A send also succeeds without one, as long as there is room.
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
