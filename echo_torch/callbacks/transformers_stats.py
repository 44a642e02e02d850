"""What a ``transformers.Trainer`` logs of `EchoSink.stats`: some of them, with each loss."""

from __future__ import annotations

from typing import Any

from echo_torch.callbacks import loop, require_extra

with require_extra("echo_torch.callbacks.transformers", "transformers"):
    from transformers import Trainer, TrainerCallback

LOGGED_STATS = ("samples_sent", "in_flight", "dropped", "blocked_seconds", "sent_per_second", "ack_p99_seconds")
"""Not all, for what is logged is printed, too."""


class StatsCallback(TrainerCallback):
    """Adds them, as ``echo/...``, to what was logged; reporters that come before, as TensorBoard's do, lack them."""

    policy: loop.SinkCallback

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if _is_training_log(logs):
            stats = _stats(self.policy)
            logs.update(stats)
            state.log_history[-1].update(stats)


class StatsMixin(Trainer):
    """Adds them before anybody is told."""

    sink_policy: loop.SinkCallback

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # in a copy, for the caller may log the same again
            logs = {**logs, **_stats(self.sink_policy)}
        super().log(logs, *args, **kwargs)


def _stats(policy: loop.SinkCallback) -> dict[str, Any]:
    stats = policy.sink.stats()
    return {f"echo/{name}": getattr(stats, name) for name in LOGGED_STATS}


def _is_training_log(logs: dict[str, Any]) -> bool:
    """And not of an evaluation, whose numbers go elsewhere, too, or of the end; nor has them already."""
    return "loss" in logs and not any(name.startswith("echo/") for name in logs)
