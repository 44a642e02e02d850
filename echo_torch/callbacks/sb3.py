"""A callback for stable-baselines3 that sends what a model collects.

Usage::

    with EchoSink("learner", 50051, example(model)) as sink:
        model.learn(100_000, callback=SinkCallback(sink))

stable-baselines3 does not report errors to callbacks. If an error leaves the ``with`` block, the sink delivers what was
sent before it.
"""

from __future__ import annotations

from typing import Any, Literal

from echo_torch.callbacks import loop, require_extra
from echo_torch.callbacks.sb3_samples import example, rollout, transitions
from echo_torch.sink import EchoSink

with require_extra(__name__, "sb3"):
    from stable_baselines3.common.callbacks import BaseCallback

__all__ = ["SinkCallback", "example"]


class SinkCallback(loop.SinkCallback, BaseCallback):
    """Connects when ``learn`` begins, sends, and waits for acks when a rollout or the training ends.

    With off-policy algorithms it waits only at the end of the training, because their rollouts are just ``train_freq``
    steps long. stable-baselines3 has no event for checkpoints: call `on_checkpoint` before one that needs everything
    acked.

    Args:
        sink: made with an example like that of `example`, or like what ``select`` makes of it. You keep the sink.
        on: ``"step"`` sends the transitions of all environments after each step. There ``action`` is the one that the
            environment received, and ``next_obs`` is the last observation of the episode if it ended. ``"rollout"``
            sends the ``rollout_buffer`` of an on-policy algorithm before it trains on it, ordered by step, then by
            environment. A rollout that is cut short is neither trained on nor sent.
        verbose: see ``BaseCallback``.
        policy: further arguments of `loop.SinkCallback`. ``select`` gets what would be sent and the locals of the
            algorithm.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range. ``learn`` raises this if
            ``on="rollout"`` and the algorithm has no such buffer; it also raises what the methods of
            `loop.SinkCallback` raise.
    """

    def __init__(self, sink: EchoSink, *, on: Literal["step", "rollout"] = "step", verbose: int = 0, **policy: Any):
        if on not in ("step", "rollout"):
            raise ValueError(f"on: got {on!r}, expected 'step' or 'rollout'")
        super().__init__(sink, **policy)
        BaseCallback.__init__(self, verbose)
        self._sends_on = on

    def _init_callback(self) -> None:
        self._example = example(self.model, self._sends_on)
        self.setup()

    def _on_step(self) -> bool:
        if self._sends_on == "step":
            self.on_batch_end(transitions(self.model, self.locals, self._example), self.locals)
        return True

    def _on_rollout_end(self) -> None:
        if self._sends_on == "rollout":
            self.on_batch_end(rollout(self.model), self.locals)
        if hasattr(self.model, "rollout_buffer"):
            self.on_epoch_end()

    def _on_training_end(self) -> None:
        self.on_train_end()
