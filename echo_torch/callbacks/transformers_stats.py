"""Which of `EchoSink.stats` a ``transformers.Trainer`` logs: some of them, with each loss."""

from __future__ import annotations

from typing import Any

from echo_torch.callbacks import loop, require_extra

with require_extra("echo_torch.callbacks.transformers", "transformers"):
    from transformers import Trainer, TrainerCallback

LOGGED_STATS = ("samples_sent", "in_flight", "dropped", "blocked_seconds", "sent_per_second", "ack_p99_seconds")
"""Only some of the stats, because transformers also prints what it logs."""


class StatsCallback(TrainerCallback):
    """Adds the stats, as ``echo/...``, to a log that has a loss.

    Reporters that run before this callback, such as TensorBoard's, do not get them.
    """

    policy: loop.SinkCallback

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if _is_training_log(logs):
            stats = _stats(self.policy)
            logs.update(stats)
            state.log_history[-1].update(stats)


class StatsMixin(Trainer):
    """Adds the stats before any callback or reporter sees the log."""

    sink_policy: loop.SinkCallback

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        # Add to a copy, because the caller may log the same dict again.
        if "loss" in logs:
            logs = {**logs, **_stats(self.sink_policy)}
        super().log(logs, *args, **kwargs)


def _stats(policy: loop.SinkCallback) -> dict[str, Any]:
    stats = policy.sink.stats()
    return {f"echo/{name}": getattr(stats, name) for name in LOGGED_STATS}


def _is_training_log(logs: dict[str, Any]) -> bool:
    """Whether a log has a training loss and no stats yet.

    The logs of an evaluation and of the end of the training have no ``loss``; their numbers are also used elsewhere.
    """
    return "loss" in logs and not any(name.startswith("echo/") for name in logs)
