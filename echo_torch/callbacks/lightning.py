"""Lightning: `SinkCallback` for its ``Trainer``, `FabricSinkCallback` for its ``Fabric``.

In a distributed job every rank sends its own shard, and flushes end the same way on all of them. Samples that a
distributed sampler repeats to give every rank as many are sent twice, unless the padding is skipped. Ranks that are
spawned or forked have copies of the sink: ``close=True`` makes the tail of what they sent safe, as `EchoSink.close`
does. Lightning does not tell these ranks of an exception; what is un-acked then is delivered when they exit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from echo_torch.callbacks import loop, needed_for
from echo_torch.sink import EchoSink

with needed_for(__name__, "lightning"):
    from lightning.pytorch import Callback

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

STAGES = ("train", "validate", "test", "predict")


class _Stateful:
    """Holds the policy, and saves its state."""

    def __init__(self, sink: EchoSink, **policy: Any) -> None:
        self.policy = loop.SinkCallback(sink, **policy)

    def state_dict(self) -> dict[str, Any]:
        """Wait as at an epoch's end; then the counts, among them `EchoSink.acked_through`, and whose they are."""
        self.policy.on_checkpoint()
        return {"rank": _rank(), **self.policy.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, on the rank that saved it: a checkpoint has the counts of rank 0."""
        if state_dict.get("rank") == _rank():
            self.policy.load_state_dict(state_dict)


class SinkCallback(_Stateful, Callback):
    """Sends each batch after the ``Trainer``'s step on it, and waits for the acks when an epoch ends.

    Sanity checks send nothing. Before a checkpoint is written it waits, too, unless that has ``save_weights_only``:
    then Lightning asks no callback. A resumed fit goes on with the counts of the checkpoint if the learner's address,
    ``stages`` and the name of ``select`` are as they were.

    Args:
        sink: stays the caller's.
        stages: whose batches to send: ``"train"``, ``"validate"`` (of a fit, too), ``"test"``, ``"predict"``.
        skip_padding: does not send the samples of a train batch that a ``DistributedSampler`` repeated.
        policy: the other keyword arguments of `loop.SinkCallback`; ``group`` is all ranks by default.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    def __init__(
        self, sink: EchoSink, *, stages: Iterable[str] = ("train",), skip_padding: bool = False, **policy: Any
    ) -> None:
        super().__init__(sink, **policy)
        self._stages = tuple(stages)
        for stage in self._stages:
            if stage not in STAGES:
                raise ValueError(f"stages: got {stage!r}, expected some of {', '.join(map(repr, STAGES))}")
        self._skips_padding = skip_padding
        self._select = getattr(policy.get("select"), "__qualname__", None)
        self._running = "fit"

    @property
    def state_key(self) -> str:
        key: str = self._generate_state_key(peer=self.policy.sink.peer, stages=self._stages, select=self._select)
        return key

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Connect, if this stage sends anything; raises as `EchoSink.connect`."""
        self._running = stage
        if self._sends():
            if trainer.world_size > 1:
                _join_ranks(self.policy)
            self.policy.setup()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "train" in self._stages:
            padding = loop.padding(trainer.train_dataloader, batch_idx) if self._skips_padding else 0
            self.policy.on_batch_end(batch, outputs, padding=padding)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.stage in self._stages:  # which is "sanity_check" in one
            self.policy.on_epoch_end()

    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = on_train_epoch_end

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if trainer.state.stage in self._stages:
            self.policy.on_batch_end(batch, outputs)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._sends():
            self.policy.on_exception(exception)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self._sends():
            self.policy.on_train_end()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._running == "fit":  # what is loaded to be tested does not take the counts back
            super().load_state_dict(state_dict)

    def _sends(self) -> bool:
        parts = ("train", "validate") if self._running == "fit" else (self._running,)
        return any(stage in self._stages for stage in parts)


class FabricSinkCallback(_Stateful):
    """For ``Fabric(callbacks=[...])``: does its work on ``fabric.call(event, ...)``, for each method here.

    Keywords that an event does not know are ignored. ``fabric.save(path, {"sink": callback, ...})`` waits, and saves
    the counts; before other checkpoints, call ``"on_save_checkpoint"``.

    Args:
        sink: stays the caller's.
        policy: the keyword arguments of `loop.SinkCallback`; ``group`` is all ranks by default.
    """

    def on_train_start(self, **_: Any) -> None:
        """Connect; raises as `EchoSink.connect`."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            _join_ranks(self.policy)
        self.policy.setup()

    def on_train_batch_end(
        self, outputs: Any = None, batch: Any = None, batch_idx: int = 0, *, padding: int = 0, **_: Any
    ) -> None:
        """Send ``batch``, in the order of arguments that a ``Trainer`` has; see `loop.SinkCallback.on_batch_end`."""
        self.policy.on_batch_end(batch, outputs, padding=padding)

    def on_train_epoch_end(self, **_: Any) -> None:
        self.policy.on_epoch_end()

    def on_save_checkpoint(self, **_: Any) -> None:
        self.policy.on_checkpoint()

    def on_exception(self, exception: BaseException, **_: Any) -> None:
        self.policy.on_exception(exception)

    def on_train_end(self, **_: Any) -> None:
        self.policy.on_train_end()


def _join_ranks(policy: loop.SinkCallback) -> None:
    """Have the flushes of all ranks end the same way, which needs a group for CPU tensors."""
    if policy.group is None:
        takes_cpu = "cpu:" in dist.get_backend_config()
        policy.group = dist.group.WORLD if takes_cpu else dist.new_group(backend="gloo")


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
