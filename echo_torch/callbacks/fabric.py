"""`FabricSinkCallback` for Lightning's Fabric.

It needs no package; `echo_torch.callbacks.lightning` re-exports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from echo_torch.callbacks import loop
from echo_torch.ranks import cpu_group
from echo_torch.sink import EchoSink


class StatefulCallback:
    """Base of the Lightning callbacks: holds the policy and saves its state in checkpoints."""

    def __init__(self, sink: EchoSink, **policy: Any) -> None:
        self.policy = loop.SinkCallback(sink, **policy)

    def state_dict(self) -> dict[str, Any]:
        """Flush as at the end of an epoch, then return the counts and the rank they belong to.

        The counts include `EchoSink.acked_through`.
        """
        self.policy.on_checkpoint()
        return {"rank": _rank(), **self.policy.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the counts, but only on the rank that saved them.

        A checkpoint holds the counts of rank 0 only, so the other ranks ignore it.
        """
        if state_dict.get("rank") == _rank():
            self.policy.load_state_dict(state_dict)

    def _setup_policy(self) -> None:
        self.policy.group = self.policy.group or cpu_group()
        self.policy.setup()


class FabricSinkCallback(StatefulCallback):
    """Callback for ``Fabric(callbacks=[...])``: acts on ``fabric.call(event, ...)``, one method per event.

    Each method ignores keywords it does not know. ``fabric.save(path, {"sink": callback, ...})`` flushes and saves the
    counts. Before any other checkpoint, call the event ``"on_save_checkpoint"`` yourself.

    Each rank sends its own shard, including the samples that a distributed sampler repeats. Pass ``padding`` with
    ``"on_train_batch_end"`` to leave those out; `loop.padding` computes it.

    Args:
        sink: the sink to send through. You keep it.
        policy: keyword arguments of `loop.SinkCallback`. ``group`` defaults to all ranks.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    def on_train_start(self, **_: Any) -> None:
        """Connect. Raises what `EchoSink.connect` raises."""
        self._setup_policy()

    def on_train_batch_end(
        self, outputs: Any = None, batch: Any = None, batch_idx: int = 0, *, padding: int = 0, **_: Any
    ) -> None:
        """Send ``batch``; see `loop.SinkCallback.on_batch_end`.

        The arguments come in the order of a ``Trainer``'s hook of this name.
        """
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
