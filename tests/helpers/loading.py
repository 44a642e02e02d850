"""A program for test_loaders: ``loading.py PORT FOLDER HOW`` sends from a loader's workers, and ends as HOW says.

* "end": after an epoch, with persistent workers that are still there.
* "error", "exit": in the middle of an epoch, by an exception or by ``sys.exit``.
* "wait": in the middle of an epoch it sleeps until a signal ends it.

In FOLDER, ``pid-PID`` marks a worker process, and ``sent-PID`` lists the numbers of the samples that a worker has sent.
The program prints "ready" in the middle of an epoch.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from training import Digits, Item, digit

from echo_torch import EchoSink
from echo_torch.workers import SinkCollate

COUNT = 4000
BATCH = 8


class Recorded:
    """Records what a collate function has sent in files that outlive this process."""

    def __init__(self, collate: SinkCollate, folder: Path) -> None:
        self.collate = collate
        self.folder = folder

    def __call__(self, samples: list[Item]) -> Item:
        (self.folder / f"pid-{os.getpid()}").touch()
        batch: Item = self.collate(samples)
        with open(self.folder / f"sent-{os.getpid()}", "a") as record:
            record.write("".join(f"{number}\n" for number in batch["id"].tolist()))
        return batch


def main(port: int, folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    sink = EchoSink("127.0.0.1", port, digit(0), max_inflight_msgs=4)
    batches = DataLoader(
        Digits(COUNT if how != "end" else 10 * BATCH),
        BATCH,
        num_workers=2,
        collate_fn=Recorded(sink.collate(), folder),
        multiprocessing_context=multiprocessing.get_context("fork"),
        persistent_workers=True,
    )
    for number, _ in enumerate(batches):
        if number == 5 and how != "end":
            print("ready", flush=True)
            if how == "error":
                raise LookupError("the user's own")
            if how == "exit":
                sys.exit(3)
            time.sleep(60)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
