"""`SinkCallback` for Lightning's ``Trainer``, and `FabricSinkCallback` for its ``Fabric``.

Every rank sends its own shard, and a flush ends the same way on all. Samples that a distributed sampler repeats are
sent twice, unless you skip them. Spawned ranks hold copies of the sink: set ``close=True`` to be sure that their last
samples are delivered. They learn of no exceptions, and deliver un-acked samples when they exit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from echo_torch.callbacks import loop
from echo_torch.callbacks.fabric import FabricSinkCallback
from echo_torch.callbacks.lightning_stats import StatsCallback
from echo_torch.sink import EchoSink

__all__ = ["FabricSinkCallback", "SinkCallback"]
STAGES = ("train", "validate", "test", "predict")


class SinkCallback(StatsCallback):
    """Sends each batch after the ``Trainer``'s step on it, and waits for the acks when an epoch ends.

    Sanity checks send nothing. It also waits before a checkpoint, but not with ``save_weights_only``: then Lightning
    asks no callback. A resumed fit continues the counts if address, ``stages`` and ``select`` are the same. Loggers get
    the stats every ``log_every_n_steps`` steps and when an epoch ends, unless you set ``log_stats`` to False.

    Args:
        stages: whose batches to send: ``"train"``, ``"validate"`` (also within a fit), ``"test"``, ``"predict"``.
        skip_padding: leave out what a ``DistributedSampler`` repeats: the last samples of what ``select`` made.
        sink, policy: as for `loop.SinkCallback`, with its keyword arguments. ``group`` defaults to all ranks.

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
        self._skip_padding = skip_padding
        self._select = getattr(policy.get("select"), "__qualname__", None)
        self._running_stage = "fit"

    @property
    def state_key(self) -> str:
        return str(self._generate_state_key(peer=self.policy.sink.peer, stages=self._stages, select=self._select))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._running_stage = stage
        if self._sends_in_this_run():
            self._setup_policy()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.stage in self._stages:  # never in a sanity check, whose stage is "sanity_check"
            padded = loop.padding(trainer.train_dataloader, batch_idx) if self._skip_padding and trainer.training else 0
            self.policy.on_batch_end(batch, outputs, padding=padded)
            self._log_metrics_if_due(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.stage in self._stages:
            self.policy.on_epoch_end()
            self._log_metrics(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._sends_in_this_run():
            self.policy.on_exception(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._sends_in_this_run():
            self.policy.on_train_end()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._running_stage == "fit":  # a checkpoint loaded for a test must not reset the counts
            super().load_state_dict(state_dict)

    def _sends_in_this_run(self) -> bool:
        parts = ("train", "validate") if self._running_stage == "fit" else (self._running_stage,)
        return any(stage in self._stages for stage in parts)

    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = on_train_epoch_end
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end
