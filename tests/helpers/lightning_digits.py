"""A ``LightningModule`` that records what it trains on, and a program for test_lightning that trains it on two ranks.

``lightning_digits.py DIRECTORY PORT PORT PORT`` fits three times, each time for another learner. It leaves in DIRECTORY
what each rank trained on (`ReportingSink`). Lightning runs the program again for the second rank.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from training import Classifier, Digits, Item

from echo_torch import EchoSink
from echo_torch.callbacks.lightning import FabricSinkCallback, SinkCallback

ODD = 13
"""An odd number of samples for two ranks, so that both ranks get one of them."""
OTHER_S = 30.0
"""Seconds that a rank that failed waits for the other one to fail."""


class Model(LightningModule):
    """Records the batches that it trained and evaluated on.

    Args:
        at_step: called at the beginning of each training step with its number, from 1 on.
    """

    def __init__(self, at_step: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.classifier = Classifier()
        self.at_step = at_step
        self.trained: list[Item] = []
        self.evaluated: dict[str, list[Item]] = {"sanity_check": [], "validate": [], "test": [], "predict": []}

    def training_step(self, batch: Item, batch_idx: int) -> Item:
        if self.at_step is not None:
            self.at_step(len(self.trained) + 1)
        self.log("constant", 1.0)
        self.trained.append(batch)
        outputs: Item = self.classifier(**batch)
        return outputs

    def validation_step(self, batch: Item, batch_idx: int) -> Item:
        self.evaluated[self.trainer.state.stage.value].append(batch)
        outputs: Item = self.classifier(**batch)
        return outputs

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """Return a quiet trainer, for two epochs on the CPU by default."""
    return Trainer(
        callbacks=list(callbacks),
        default_root_dir=path,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", "max_epochs": 2, "logger": False, **options},
    )


def loader(count: int, first: int = 0, *, size: int = 64, workers: int = 0, **options: Any) -> DataLoader[Item]:
    return DataLoader(Digits(count, first), size, shuffle=first == 0, num_workers=workers, **options)


class WaitsForWorkers(Callback):
    """Waits at the end of an epoch, and checks that this covered what the loader's workers sent."""

    def __init__(self, sink: EchoSink) -> None:
        self._sink = sink

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Model) -> None:
        self._sink.wait(OTHER_S)
        stats = self._sink.stats()
        trained = sum(len(batch["id"]) for batch in pl_module.trained)
        assert (stats.samples_sent, stats.samples_acked) == (trained, trained), (stats, trained)


class Watch(Callback):
    """Records what is in flight when the callbacks before it have done their work at the end of an epoch."""

    def __init__(self, *sinks: EchoSink) -> None:
        self.in_flight: dict[str, list[int]] = {}
        self._sinks = sinks

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.in_flight.setdefault(trainer.state.stage.value, []).extend(s.stats().in_flight for s in self._sinks)

    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = on_train_epoch_end


class ReportingSink(SinkCallback):
    """Writes ``rank<rank>.json`` into a directory: the numbers trained on, how the fit ended, and its seconds.

    A rank whose flush fails stays until the other one has reported, because its exit would end both.
    """

    def __init__(self, directory: Path, sink: EchoSink, **options: Any) -> None:
        super().__init__(sink, **options)
        self._directory = directory

    def on_train_start(self, trainer: Trainer, pl_module: Model) -> None:
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Model) -> None:
        try:
            super().on_train_epoch_end(trainer, pl_module)
        except Exception as error:
            self._report(trainer, pl_module, type(error).__name__)
            deadline = time.monotonic() + OTHER_S
            while len(list(self._directory.glob("rank*.json"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            raise

    def on_train_end(self, trainer: Trainer, pl_module: Model) -> None:
        self._report(trainer, pl_module, "done")

    def _report(self, trainer: Trainer, model: Model, ended: str) -> None:
        numbers = [number for batch in model.trained for number in batch["id"].tolist()]
        report = {"trained": numbers, "ended": ended, "seconds": time.monotonic() - self._began}
        self._directory.mkdir(exist_ok=True)
        whole = self._directory / f"{trainer.global_rank}.part"
        whole.write_text(json.dumps(report))
        whole.rename(self._directory / f"rank{trainer.global_rank}.json")


def sink_for(port: int) -> EchoSink:
    return EchoSink("127.0.0.1", port, Digits(1)[0], resend_at_close=False)


def main(directory: Path, *ports: int) -> None:
    torch.set_num_threads(1)
    padded, unpadded, by_hand = map(sink_for, ports)

    callback = ReportingSink(directory / "padded", padded)
    fitting = trainer(directory, callback, strategy="ddp", devices=2)
    fitting.fit(Model(), loader(ODD, size=2))
    fitting.save_checkpoint(directory / "padded.ckpt")
    assert callback.policy.group is dist.group.WORLD

    callback = ReportingSink(directory / "unpadded", unpadded, skip_padding=True)
    trainer(directory, callback, strategy="ddp", devices=2).fit(Model(), loader(ODD, size=2))

    # Ranks whose own group takes no CPU tensors, as with NCCL.
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("cuda:gloo", f"file://{directory}/store", rank=rank, world_size=2)
    fabric = FabricSinkCallback(by_hand)
    fabric.on_train_start()
    fabric.on_train_batch_end(batch=Digits(2)[rank])
    fabric.on_train_epoch_end()
    assert dist.get_backend(fabric.policy.group) == "gloo"
    assert by_hand.stats().in_flight == 0
    dist.destroy_process_group()

    for sink in (padded, unpadded, by_hand):
        sink.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
