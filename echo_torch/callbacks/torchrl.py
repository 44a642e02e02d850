"""Hooks for torchrl's ``Trainer`` and collectors.

A frame is a sample. A collected batch of size ``[frames]`` or ``[envs, T]`` is sent as one batch of frames, without the
padding of ``split_trajs=True``. Make the sink with ``example(collector)``, unless ``select`` makes something else.
``select`` gets the flattened batch, and None for the outputs::

    hook = SinkHook(sink, select=lambda batch, outputs: batch.select("observation", "action", ("next", "reward")))

In a distributed job, each rank sends what it collects, through its own connection. Nothing is padded or repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from echo_torch.callbacks import require_extra
from echo_torch.callbacks.loop import SinkCallback
from echo_torch.callbacks.torchrl_samples import example, flatten_frames

with require_extra(__name__, "torchrl"):
    from torchrl.trainers.trainers import TrainerHookBase

__all__ = ["SinkCollectorHook", "SinkHook", "example"]

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torchrl.trainers import Trainer


class SinkHook(SinkCallback, TrainerHookBase):
    """Sends what a ``Trainer`` collects, and waits for acks after the optimization steps on it, before a checkpoint.

    torchrl does not report errors or interrupts to hooks. Use the hook as a context manager to deliver, for up to 5
    seconds, what was collected before one::

        with SinkHook(sink) as hook:
            hook.register(trainer)
            trainer.train()

    A batch is sent before the trainer trains on it, after the ``"batch_process"`` ops that were registered before this
    hook.

    * With ``async_collection``, or with a collector that fills a replay buffer itself, the trainer gets no batches: use
      `SinkCollectorHook`.
    * With ``learner_backend="ray"``, the trainer ends its hooks after an error as if there were none. Set a short
      ``flush_timeout`` there, and ``on_error="warn"`` on the sink.

    Arguments and errors are those of `SinkCallback`. An epoch is one collection.
    """

    def register(self, trainer: Trainer, name: str = "sink") -> None:
        """Add this hook to ``trainer``. Its checkpoints then store the hook's `state_dict` under ``name``."""
        trainer.register_module(name, self)
        trainer.register_op("setup", self.setup)
        trainer.register_op("batch_process", self._send)
        trainer.register_op("post_steps", self.on_epoch_end)
        trainer.register_op("shutdown", self.on_train_end)

    def _send(self, batch: TensorDictBase) -> TensorDictBase:
        self.on_batch_end(flatten_frames(batch))
        return batch


class SinkCollectorHook(SinkCallback):
    """A collector's ``post_collect_hook``: sends each batch from the process that collected it, and waits for the acks.

    In a ``MultiSyncCollector`` or ``MultiAsyncCollector``, every worker process gets a copy and connects after its
    first collection. An error raised here ends the worker, and with it the collection.

    Whatever the trainer gets has been acked, unless the learner stalls. Batches that the trainer no longer gets may
    have been sent too. With ``flush="end"`` the hook never waits, and a worker that ends has 5 seconds to deliver.

    Arguments and errors are those of `SinkCallback`. ``select`` must pickle, and ``close`` has no effect.
    """

    def __call__(self, collected: TensorDictBase) -> None:
        self.setup()
        self.on_batch_end(flatten_frames(collected))
        self.on_epoch_end()
