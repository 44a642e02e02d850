"""Which of `EchoSink.stats` a Lightning ``Trainer`` logs, and when."""

from __future__ import annotations

from typing import Any

from echo_torch.callbacks import require_extra
from echo_torch.callbacks.fabric import StatefulCallback

with require_extra("echo_torch.callbacks.lightning", "lightning"):
    from lightning.pytorch import Callback


class StatsCallback(StatefulCallback, Callback):
    """Sends all stats, as ``echo/...``, to the trainer's loggers, as often as Lightning logs its own numbers.

    Subclasses call `_log_metrics_if_due` after each batch, and `_log_metrics` when an epoch ends.
    """

    # Whether to log the stats at all.
    log_stats = True
    # The step of the latest log, so that a step that accumulates several batches is logged once.
    _last_logged_step = -1

    def _log_metrics(self, trainer: Any) -> None:
        """Log now. Runs on every rank, but Lightning's loggers do nothing except on the first."""
        self._last_logged_step = _logging_step(trainer)
        if not self.log_stats or not trainer.loggers:
            return
        # One snapshot, so that all loggers get the same numbers.
        stats = self.policy.sink.stats()
        for logger in trainer.loggers:
            logger.log_metrics(stats.as_dict(f"echo{logger.group_separator}"), self._last_logged_step)

    def _log_metrics_if_due(self, trainer: Any) -> None:
        """Log after a batch, once every ``log_every_n_steps`` steps, no matter how many batches a step accumulates."""
        step, every = _logging_step(trainer), trainer.log_every_n_steps
        if every and (step + 1) % every == 0 and step != self._last_logged_step:
            self._log_metrics(trainer)


def _logging_step(trainer: Any) -> int:
    """The step number under which Lightning logs its own numbers."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
