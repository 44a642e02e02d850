"""`SinkTrainerMixin`, for a ``transformers.Trainer`` that sends, and `SinkCallback`, for one that only flushes."""

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
    """Flushes when epochs and the training end, and before checkpoints. It sends nothing, for events carry no inputs.

    Put it last, to see the checkpoints that others ask for. Errors have no event: only `SinkTrainerMixin` sees them.
    What is logged with a loss has the main numbers of `EchoSink.stats`; for reporters too, with `SinkTrainerMixin`.

    Args:
        sink, policy: as for `loop.SinkCallback`, and its keyword arguments; by default, ``group`` is all ranks.
    """

    def __init__(self, sink: EchoSink, **policy: Any) -> None:
        self.policy = loop.SinkCallback(sink, **policy)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policy.group = self.policy.group or cpu_group()
        self.policy.setup()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # on_save comes after the writing. Whether a metric is the "best" is known only after the evaluation.
        if control.should_save or (control.should_evaluate and args.save_strategy == "best"):
            self.policy.on_checkpoint()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policy.on_epoch_end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policy.on_train_end()


class SinkTrainerMixin(StatsMixin):
    """``class MyTrainer(SinkTrainerMixin, Trainer)``: sends what it is trained on, and flushes as `SinkCallback`.

    Only what the model's ``forward`` takes is there to be sent, unless ``remove_unused_columns=False``. Each rank sends
    its own shard. accelerate pads these with samples of the epoch's beginning, so some may be sent twice.

    Args:
        args, kw: the Trainer's, and the keyword arguments of `loop.SinkCallback`.
        sink: stays the caller's.
        send: ``"trained"``: each micro-batch after its step, with the loss from `training_step` as outputs. Or
            ``"collated"``: where the loader makes them, before their step, with None as outputs; see `SinkCollate`.
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
        batch = copy.copy(inputs)  # trainers may pop from it
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
