"""What a ``Trainer`` of Lightning logs of `EchoSink.stats`, and when."""

from __future__ import annotations

from typing import Any

from echo_torch.callbacks import require_extra
from echo_torch.callbacks.fabric import StatefulCallback

with require_extra("echo_torch.callbacks.lightning", "lightning"):
    from lightning.pytorch import Callback


class StatsCallback(StatefulCallback, Callback):
    """Gives the trainer's loggers all of the stats, as ``echo/...``: as often as Lightning's own, and when told to."""

    log_stats = True
    """Whether it does."""
    _last_logged_step = -1

    def _log_metrics(self, trainer: Any) -> None:
        """On every rank: the loggers of Lightning do nothing on others than the first."""
        self._last_logged_step = _logging_step(trainer)
        if not self.log_stats or not trainer.loggers:
            return
        stats = self.policy.sink.stats()  # the same for all
        for logger in trainer.loggers:
            logger.log_metrics(stats.as_dict(f"echo{logger.group_separator}"), self._last_logged_step)

    def _log_metrics_if_due(self, trainer: Any) -> None:
        """After a batch: once every ``log_every_n_steps``, however many batches a step accumulates."""
        step, every = _logging_step(trainer), trainer.log_every_n_steps
        if every and (step + 1) % every == 0 and step != self._last_logged_step:
            self._log_metrics(trainer)


def _logging_step(trainer: Any) -> int:
    """What Lightning logs its own numbers by."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
