"""torchrl: hooks for its ``Trainer`` and for its collectors.

A frame is a sample: what was collected, of batch size ``[frames]`` or ``[envs, T]``, is sent as one batch of frames,
without the padding of ``split_trajs=True``. The sink's example is like ``collected.reshape(-1)[0]``, unless ``select``
makes something else of it, which gets the batch flattened and None for the outputs::

    hook = SinkHook(sink, select=lambda batch, outputs: batch.select("observation", "action", ("next", "reward")))

In a distributed job each rank sends what it collects, through a connection of its own; nothing is padded or repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from echo_torch.callbacks import require_extra
from echo_torch.callbacks.loop import SinkCallback

with require_extra(__name__, "torchrl"):
    from torchrl.trainers.trainers import TrainerHookBase

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torchrl.trainers import Trainer


class SinkHook(SinkCallback, TrainerHookBase):
    """Sends what a ``Trainer`` collects, and waits for it after the optimisation steps on it, before a checkpoint.

    The trainer tells nobody of an error or an interrupt. With the hook as a context manager, what was collected by
    then is delivered for up to 5 seconds::

        with SinkHook(sink) as hook:
            hook.register(trainer)
            trainer.train()

    A batch is sent as the ``"batch_process"`` ops registered before this one left it, and before it is trained on. With
    ``async_collection``, or a collector that fills a replay buffer itself, the trainer is given none: use
    `SinkCollectorHook`. With ``learner_backend="ray"`` the trainer ends its hooks after an error as if there were none,
    so give a short ``flush_timeout`` there, and the sink ``on_error="warn"``.

    Arguments and errors are those of `SinkCallback`; an epoch is one collection.
    """

    def register(self, trainer: Trainer, name: str = "sink") -> None:
        """Add this hook to ``trainer``, whose checkpoints then keep its `state_dict` as ``name``."""
        trainer.register_module(name, self)
        trainer.register_op("setup", self.setup)
        trainer.register_op("batch_process", self._send)
        trainer.register_op("post_steps", self.on_epoch_end)
        trainer.register_op("shutdown", self.on_train_end)

    def _send(self, batch: TensorDictBase) -> TensorDictBase:
        self.on_batch_end(_flatten_frames(batch))
        return batch


class SinkCollectorHook(SinkCallback):
    """A collector's ``post_collect_hook``: sends each batch from the process that collected it, and waits for it.

    In a ``MultiSyncCollector`` or ``MultiAsyncCollector`` that is each of the worker processes, which get a copy, and
    connect when they have collected for the first time. What is raised here ends the worker, and with it the
    collection. What the trainer is given has been acked, unless the learner stalls; what it is not given any more may
    have been sent as well. With ``flush="end"`` nothing is waited for, and a worker that ends has 5 seconds to deliver.

    Arguments and errors are those of `SinkCallback`, whose ``select`` must pickle then; ``close`` does nothing here.
    """

    def __call__(self, collected: TensorDictBase) -> None:
        self.setup()
        self.on_batch_end(_flatten_frames(collected))
        self.on_epoch_end()


def _flatten_frames(batch: TensorDictBase) -> TensorDictBase:
    """Flat, and without padding, as torchrl itself puts a batch into a replay buffer."""
    mask = batch.get(("collector", "mask"), None)
    return batch.reshape(-1) if mask is None else batch[mask]
