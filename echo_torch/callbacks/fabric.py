"""For Lightning's Fabric: `FabricSinkCallback`. It needs no package; `echo_torch.callbacks.lightning` has it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from echo_torch.callbacks import loop
from echo_torch.ranks import cpu_group
from echo_torch.sink import EchoSink


class StatefulCallback:
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

    def _setup_policy(self) -> None:
        self.policy.group = self.policy.group or cpu_group()
        self.policy.setup()


class FabricSinkCallback(StatefulCallback):
    """For ``Fabric(callbacks=[...])``: does its work on ``fabric.call(event, ...)``, for each method here.

    Keywords that an event does not know are ignored. ``fabric.save(path, {"sink": callback, ...})`` waits, and saves
    the counts; before other checkpoints, call ``"on_save_checkpoint"``. Each rank sends its own shard, with what
    a distributed sampler repeats, unless ``padding`` says how much that is: see `loop.padding`.

    Args:
        sink: stays the caller's.
        policy: the keyword arguments of `loop.SinkCallback`; ``group`` is all ranks by default.
    """

    def on_train_start(self, **_: Any) -> None:
        """Connect; raises as `EchoSink.connect`."""
        self._setup_policy()

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


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
