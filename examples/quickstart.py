"""Train a small CNN on handwritten digits, and send every batch to an echo replay buffer on the way.

What it shows:

* what a training loop needs: an `EchoSink`, `sink.send(batch)` after each step, `sink.wait()` after each epoch;
* what arrives: the learner, an `echo.Server` in a process of its own, hands back all that it received, and every
  sample of every epoch is compared with what was sent, bit by bit;
* what that costs: the time spent in the sink, as a share of the training time.

To run it (some ten seconds; the data comes with scikit-learn, nothing is downloaded):

    pip install '.[examples]'
    python examples/quickstart.py

The exit code is 0 only if all samples arrived as they were sent.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import echo
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm import tqdm

from echo_torch import EchoSink, numpy_example

LEARNER_BATCH = 32  # the learner gets full batches only, so what is sent in all has to be a multiple of this
TRAIN_SAMPLES = 47 * LEARNER_BATCH  # of 1,797 digits; the others are held out
LEARNER_S = 10.0  # that the learner may take to receive what is under way

Columns = dict[str, Any]
"""Arrays or tensors by name, each with one row per sample."""


def learn(pipe: Connection, example: Columns, expected: int) -> None:
    """The learner process: tells its port, receives samples until the trainer asks for them, and ends when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, whose end is seen below
    server = echo.Server(example, batch_size=LEARNER_BATCH, transport=echo.TcpTransport(port=0))
    server.start()
    batches = [{name: np.empty((0, *leaf.shape), leaf.dtype) for name, leaf in example.items()}]
    complete = threading.Event()

    def drain() -> None:  # all the time: sends block while a learner takes nothing
        while (sample := server.sample()) is not None:
            batches.append({name: leaf.copy() for name, leaf in sample.batch.items()})
            if len(batches) > expected // LEARNER_BATCH:
                complete.set()

    threading.Thread(target=drain, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the trainer has closed its end of the pipe, or has died
        pipe.send(server.port)
        pipe.recv()
        complete.wait(LEARNER_S)
        pipe.send({name: np.concatenate([batch[name] for batch in batches]) for name in example})
        pipe.recv()
    os._exit(0)


@contextlib.contextmanager
def child_process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A learner that runs as ``target(pipe, *arguments)``, and this end of its pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, its_end = context.Pipe()
    process = context.Process(target=target, args=(its_end, *arguments), daemon=True)
    process.start()
    its_end.close()
    try:
        yield pipe
    except (EOFError, ConnectionError) as error:
        sys.exit(f"FAILED: the learner is gone: {error!r}")
    finally:
        process.kill()  # closing the pipe is not enough: forked children may hold it open
        process.join()
        pipe.close()


def small_cnn() -> nn.Module:
    convolutions = nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def train(model: nn.Module, loader: DataLoader[Any], sink: EchoSink, sent_logits: torch.Tensor) -> tuple[float, float]:
    """Train, sending every batch; gives the seconds that this took, and how many of them the sink took.

    A copy of all logits that are sent is left in ``sent_logits``, [epochs, digits, 10].
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    sink_s, began = 0.0, perf_counter()
    for epoch, kept_logits in enumerate(sent_logits):
        for index, image, label in tqdm(loader, f"epoch {epoch + 1}/{len(sent_logits)}", disable=None):
            logits = model(image)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, label).backward()
            optimizer.step()
            kept_logits[index] = logits.detach()

            batch = {"epoch": torch.full_like(index, epoch), "index": index, "image": image, "label": label}
            before = perf_counter()
            sink.send(batch | {"logits": logits})  # that they carry grad is fine, and so is a smaller last batch
            sink_s += perf_counter() - before
        before = perf_counter()
        sink.wait()  # until the server has acknowledged the whole epoch
        sink_s += perf_counter() - before
    return perf_counter() - began, sink_s


def check_received(received: Columns, expected: set[tuple[int, int]], sent: Columns) -> None:
    """Exit with a message unless exactly the expected (epoch, index) arrived, each with what ``sent`` has there."""
    epoch, index = received["epoch"], received["index"]
    arrived = set(zip(epoch.tolist(), index.tolist(), strict=True))
    for what, samples in {"missing": expected - arrived, "never sent": arrived - expected}.items():
        if samples:
            sys.exit(f"FAILED: {len(samples):,} samples {what}, such as (epoch, index) {min(samples)}")
    for name, originals in sent.items():
        pairs = zip(received[name], originals[epoch, index].numpy(), strict=True)
        different = sum(got.tobytes() != original.tobytes() for got, original in pairs)
        if different:
            sys.exit(f"FAILED: {name} of {different:,} samples not as it was sent")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on handwritten digits, sending every batch to a replay buffer.")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    epochs = options.epochs
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # as fast for a model this small, and leaves the other cores to the learner

    data = load_digits()
    images, labels = torch.from_numpy(data.images / 16).float().unsqueeze(1), torch.from_numpy(data.target).long()
    digits = TensorDataset(torch.arange(len(images)), images, labels)
    training_set, held_out = random_split(digits, [TRAIN_SAMPLES, len(digits) - TRAIN_SAMPLES])
    loader = DataLoader(training_set, batch_size=options.batch_size, shuffle=True)
    model = small_cnn()

    # One sample as it will be sent: only the shapes and dtypes count.
    example = {"epoch": 0, "index": 0, "image": images[0], "label": labels[0], "logits": torch.zeros(10)}
    expected = {(epoch, index) for epoch in range(epochs) for index in training_set.indices}
    sent_logits = torch.zeros(epochs, len(digits), 10)
    with child_process(learn, numpy_example(example), len(expected)) as learner:
        port = learner.recv()
        print(f"learner    listens on port {port}", flush=True)
        with EchoSink("127.0.0.1", port, example) as sink:
            loop_s, sink_s = train(model, loader, sink, sent_logits)
            sent = sink.stats().samples_sent
            learner.send("what did you receive?")  # before `close`, which sends the last 8 samples once more
            received = learner.recv()

    each_epoch = {"image": images.expand(epochs, *images.shape), "label": labels.expand(epochs, -1)}
    check_received(received, expected, {**each_epoch, "logits": sent_logits})
    with torch.no_grad():
        right = model(images[held_out.indices]).argmax(1) == labels[held_out.indices]
    print(f"sent       {sent:,} samples: {epochs} epochs x {TRAIN_SAMPLES:,}")
    print(f"received   {len(received['index']):,} samples: every index in every epoch, every bit as it was sent")
    print(f"accuracy   {right.float().mean():.1%} on {len(held_out)} held-out digits")
    print(f"sink cost  {sink_s / loop_s:.1%} of the training time: {sink_s:.3f} s of {loop_s:.2f} s")


if __name__ == "__main__":
    main()
