"""For stable-baselines3: a callback that sends what a model collects.

    with EchoSink("learner", 50051, example(model)) as sink:
        model.learn(100_000, callback=SinkCallback(sink))

Callbacks are told of no errors: leaving the ``with`` block by one delivers what was sent before it.
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

    The rollouts of off-policy algorithms are of a few steps, ``train_freq``: after those it does not wait, but when the
    training ends. Nothing tells of checkpoints: call `on_checkpoint` before one that shall find everything acked.

    Args:
        sink: for samples as `example` gives one, or ``select`` makes of it; stays the caller's.
        on: ``"step"`` sends the transitions of all environments after each step: ``next_obs`` is an episode's last one
            where it ended, ``action`` what the environment got. ``"rollout"`` sends the ``rollout_buffer`` of an
            on-policy algorithm before it trains on it: steps in order, and in each its environments. One that is cut
            short is not trained on, nor sent.
        verbose: as for any callback.
        policy: further arguments of `loop.SinkCallback`; ``select(what would be sent, locals of the algorithm)``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range; by ``learn``, if ``on="rollout"`` and
            the algorithm has no such buffer. It also raises what the methods of `loop.SinkCallback` do.
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
