"""`SinkTrainerMixin` for a ``transformers.Trainer`` that sends, and `SinkCallback` for one that only flushes."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal

from echo_torch.callbacks import loop
from echo_torch.callbacks.transformers_stats import StatsCallback, StatsMixin
from echo_torch.ranks import cpu_group
from echo_torch.sink import EchoSink
from echo_torch.workers import SinkCollate


class SinkCallback(StatsCallback):
    """Flushes at the end of epochs, before checkpoints, and at the end of the training. Sends nothing.

    It cannot send, because the events of transformers carry no inputs. Put it last, so that it sees the checkpoints
    that other callbacks request. Errors have no event either: only `SinkTrainerMixin` sees them. The main numbers of
    `EchoSink.stats` are logged with each loss. They reach reporters only with `SinkTrainerMixin`.

    Args:
        sink, policy: as for `loop.SinkCallback`, with its keyword arguments. ``group`` defaults to all ranks.
    """

    def __init__(self, sink: EchoSink, **policy: Any) -> None:
        self.policy = loop.SinkCallback(sink, **policy)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policy.group = self.policy.group or cpu_group()
        self.policy.setup()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `on_save` comes too late, after the writing. With "best", only the evaluation decides, so flush before it.
        if control.should_save or (control.should_evaluate and args.save_strategy == "best"):
            self.policy.on_checkpoint()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policy.on_epoch_end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policy.on_train_end()


class SinkTrainerMixin(StatsMixin):
    """``class MyTrainer(SinkTrainerMixin, Trainer)`` sends what it trains on, and flushes like `SinkCallback`.

    A batch holds only the inputs of the model's ``forward``, unless ``remove_unused_columns=False``. Each rank sends
    its own shard. accelerate pads shards with samples from the beginning of the epoch, so some may be sent twice.

    Args:
        args, kw: those of the Trainer, and the keyword arguments of `loop.SinkCallback`, which raise as there.
        sink: the sink to send through. You keep it.
        send: ``"trained"`` sends each micro-batch after its step, with the loss from `training_step` as outputs.
            ``"collated"`` sends each batch where the loader makes it, with None as outputs; see `SinkCollate`.
    """

    def __init__(self, *args: Any, sink: EchoSink, send: Literal["trained", "collated"] = "trained", **kw: Any) -> None:
        if send not in ("trained", "collated"):
            raise ValueError(f"send: got {send!r}, expected 'trained' or 'collated'")
        policy = kw.keys() & inspect.signature(loop.SinkCallback).parameters
        callback = SinkCallback(sink, **{name: kw.pop(name) for name in policy})
        self.sink_policy = callback.policy
        self._sends_in_collate = send == "collated"
        super().__init__(*args, **kw)
        self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            self.sink_policy.on_exception(error)
            raise

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        batch = copy.copy(inputs)  # a trainer may pop entries from the inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._sends_in_collate:
            self.sink_policy.on_batch_end(batch, loss)
        return loss

    def get_train_dataloader(self) -> Any:
        collator = self.data_collator  # type: ignore[has-type]
        self.data_collator = SinkCollate(self.sink_policy, collator) if self._sends_in_collate else collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator
