"""Prepare images in a loader's workers and send them from there to a process that trains on them.

What it shows:

* What a loader needs: `collate_fn=sink.collate()`, and one `sink.wait()` that covers what all its workers sent.
* Real work in the workers: each sample is a photograph's JPEG bytes, decoded, cropped at random, flipped, brightened.
* ``forward=False``: the batches go from the workers to the learner and never pass through the process that has the
  loader. Its loop only counts.
* Progress bars of what was prepared, what was acknowledged, and what the learner has trained on.

The learner, an `echo.Server` in its own process, learns to tell two photographs apart by a piece of them. It is tested
on a part of both that no worker cuts from.

To run it (about ten seconds; the photographs come with scikit-learn, nothing is downloaded):

    pip install '.[examples]'
    python examples/workers.py

The exit code is 0 only if every sample arrived at least once per epoch.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.resources
import io
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import echo
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from quickstart import child_process
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from echo_torch import EchoSink, numpy_example

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
HELD_OUT = 0.25  # share of each photograph, at its right, that the learner is tested on
PIECE = (72, 144)  # least and most pixels of a piece's side, before it is scaled
SIDE = 64  # pixels of a piece's side, as it is sent
BATCH = 32
LEARNER_S = 30.0  # seconds that the learner may take for the rest after everything is acknowledged

Sample = dict[str, Any]
"""The leaves ``index`` int64 [], ``image`` uint8 [3, SIDE, SIDE], ``label`` int64 []."""


def photographs() -> list[bytes]:
    """Return the JPEG files as they are."""
    folder = importlib.resources.files("sklearn.datasets.images")
    return [(folder / name).read_bytes() for name in PHOTOGRAPHS]


def uniform(low: float, high: float) -> float:
    """Return a random number between ``low`` and ``high``.

    It uses torch's generator, because a loader seeds that differently in each worker and epoch.
    """
    return low + (high - low) * torch.rand(()).item()


def piece(photograph: Image.Image, left: float, right: float) -> Image.Image:
    """Cut a random square between the shares ``left`` and ``right`` of the width, and scale it."""
    side = int(uniform(*PIECE))
    x = int(uniform(left * photograph.width, right * photograph.width - side))
    y = int(uniform(0, photograph.height - side))
    return photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (x, y, x + side, y + side))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Pieces(Dataset[Sample]):
    """Prepared pieces of each photograph in turn, new ones every time."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._files = photographs()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        label = index % len(self._files)
        image = piece(Image.open(io.BytesIO(self._files[label])).convert("RGB"), 0, 1 - HELD_OUT)
        if uniform(0, 1) < 0.5:
            image = ImageOps.mirror(image)
        image = ImageEnhance.Brightness(image).enhance(uniform(0.7, 1.3))
        return {"index": index, "image": pixels(image), "label": label}


def small_cnn() -> nn.Module:
    convolutions = nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, len(PHOTOGRAPHS)))


def learn(pipe: Connection, example: Sample, count: int, epochs: int) -> None:
    """Run the learner process: send the port, train on all that arrives, and send the accuracy.

    It trains until it has each of ``count`` samples ``epochs`` times. It ends when the other process does.
    """
    # Ctrl-C is for the other process. When that one ends, `end_with` ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(pipe,), daemon=True).start()
    # The default lock is shared between processes and would outlive this one.
    tqdm.set_lock(threading.RLock())
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = small_cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    missing = collections.Counter(dict.fromkeys(range(count), epochs))
    server = echo.Server(example, batch_size=BATCH, transport=echo.TcpTransport(port=0))
    server.start()
    pipe.send(server.port)
    trained = bar(2, "trained on", count * epochs)
    while missing and (sample := server.sample()) is not None:
        batch = {name: torch.tensor(leaf) for name, leaf in sample.batch.items()}
        missing -= collections.Counter(batch["index"].tolist())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["image"] / 255), batch["label"]).backward()
        optimizer.step()
        trained.update(BATCH)
    trained.close()
    pipe.send(accuracy(model))
    # Keep draining: the sinks send their last samples again when they close.
    while server.sample() is not None:
        pass


def end_with(pipe: Connection) -> None:
    """End this process when the other end of the pipe is closed."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(0)


def accuracy(model: nn.Module) -> float:
    """Return the accuracy on pieces of the parts that no worker cuts from."""
    images, labels = [], []
    for label, file in enumerate(photographs()):
        photograph = Image.open(io.BytesIO(file)).convert("RGB")
        for _ in range(200):
            images.append(pixels(piece(photograph, 1 - HELD_OUT, 1)))
            labels.append(label)
    with torch.no_grad():
        right = model(torch.stack(images) / 255).argmax(1) == torch.tensor(labels)
    return right.double().mean().item()


def bar(row: int, what: str, total: int) -> tqdm[Any]:
    """A progress bar, shown if stderr is a terminal. The learner's bar is below those of the other process."""
    return tqdm(total=total, desc=f"{what:<12}", unit=" samples", disable=None, position=row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare images in a loader's workers, which send them to a learner.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1024, help="per epoch; rounded up to the learner's batches")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    count = -(-options.samples // BATCH) * BATCH  # the learner gets full batches only
    total = count * options.epochs

    dataset = Pieces(count)
    with child_process(learn, numpy_example(dataset[0]), count, options.epochs) as learner:
        port = learner.recv()
        print(f"learner    listens on port {port}", flush=True)
        with (
            EchoSink("127.0.0.1", port, dataset[0]) as sink,
            bar(0, "prepared", total) as prepared,
            bar(1, "acknowledged", total) as acknowledged,
        ):
            loader = DataLoader(
                dataset,
                BATCH,
                shuffle=True,
                num_workers=options.workers,
                persistent_workers=options.workers > 0,
                collate_fn=sink.collate(forward=False),
            )
            began = time.perf_counter()
            for _ in range(options.epochs):
                for sent in loader:
                    prepared.update(sent.samples)
                    acknowledged.update(sink.stats().samples_acked - acknowledged.n)
                # Block until the server has acknowledged what all workers sent.
                sink.wait()
            seconds = time.perf_counter() - began
            counted = sink.stats()
            acknowledged.update(counted.samples_acked - acknowledged.n)
            if not learner.poll(LEARNER_S):
                sys.exit(f"FAILED: the learner does not have each of {count:,} samples {options.epochs} times")
            accuracy_held_out = learner.recv()
    print(f"sent       {counted.samples_sent:,} samples by {options.workers} workers in {seconds:.1f} s")
    print(f"received   each of {count:,} samples at least {options.epochs} times")
    print(f"accuracy   {accuracy_held_out:.1%} on parts of the photographs that were not sent")
    print(f"sink cost  {counted.blocked_seconds:.3f} s that workers waited for room")


if __name__ == "__main__":
    main()
