"""Train a small CNN on handwritten digits, and send every batch to an echo replay buffer.

What it shows:

* What a training loop needs: an `EchoSink`, `sink.send(batch)` after each step, `sink.wait()` after each epoch.
* What arrives: the learner is an `echo.Server` in its own process. It hands back everything it received, and the
  example compares every sample of every epoch with what was sent, bit by bit.
* What it costs: the time spent in the sink, as a share of the training time.

To run it (about ten seconds; the data comes with scikit-learn, nothing is downloaded):

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

# The server hands out full batches only, so the total number of samples must be a multiple of this.
LEARNER_BATCH = 32
# Of 1,797 digits. The rest is held out.
TRAIN_SAMPLES = 47 * LEARNER_BATCH
# Seconds that the learner may take to receive what is still on its way.
LEARNER_S = 10.0

Columns = dict[str, Any]
"""Arrays or tensors by name, each with one row per sample."""


def learn(pipe: Connection, example: Columns, expected: int) -> None:
    """Run the learner process: send the port, receive samples, and return them all when the trainer asks.

    It ends when the trainer closes its end of the pipe.
    """
    # Ctrl-C is for the trainer. When the trainer ends, the pipe below closes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = echo.Server(example, batch_size=LEARNER_BATCH, transport=echo.TcpTransport(port=0))
    server.start()
    batches = [{name: np.empty((0, *leaf.shape), leaf.dtype) for name, leaf in example.items()}]
    complete = threading.Event()

    # Drain all the time, because sends block while the learner takes nothing.
    def drain() -> None:
        while (sample := server.sample()) is not None:
            batches.append({name: leaf.copy() for name, leaf in sample.batch.items()})
            if len(batches) > expected // LEARNER_BATCH:
                complete.set()

    threading.Thread(target=drain, daemon=True).start()
    # Suppress the end of the pipe: the trainer has closed it, or has died.
    with contextlib.suppress(EOFError, OSError):
        pipe.send(server.port)
        pipe.recv()
        complete.wait(LEARNER_S)
        pipe.send({name: np.concatenate([batch[name] for batch in batches]) for name in example})
        pipe.recv()
    os._exit(0)


@contextlib.contextmanager
def child_process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run ``target(pipe, *arguments)`` in a child process, and yield this end of the pipe.

    If the child dies, the program exits with a message.
    """
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
        # Kill it, because closing the pipe is not enough: forked children may hold it open.
        process.kill()
        process.join()
        pipe.close()


def small_cnn() -> nn.Module:
    convolutions = nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def train(model: nn.Module, loader: DataLoader[Any], sink: EchoSink, sent_logits: torch.Tensor) -> tuple[float, float]:
    """Train and send every batch. Return the seconds that this took, and the seconds spent in the sink.

    ``sent_logits``, [epochs, digits, 10], receives a copy of all logits that are sent.
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
            # Logits that require grad are fine, and so is a smaller last batch.
            sink.send(batch | {"logits": logits})
            sink_s += perf_counter() - before
        before = perf_counter()
        # Block until the server has acknowledged the whole epoch.
        sink.wait()
        sink_s += perf_counter() - before
    return perf_counter() - began, sink_s


def check_received(received: Columns, expected: set[tuple[int, int]], sent: Columns) -> None:
    """Exit with a message unless exactly the expected samples arrived, and each one unchanged.

    ``expected`` holds pairs (epoch, index). ``sent[name][epoch, index]`` is the original.
    """
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
    # One thread is as fast for so small a model, and leaves the other cores to the learner.
    torch.set_num_threads(1)

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
            # Ask before the `with` block closes the sink, because `close` sends the last 8 samples again.
            learner.send("what did you receive?")
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
