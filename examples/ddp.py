"""Train on two learners at once, each with its own server, to which every actor sends: DDP, fed by `EchoSink`.

What it shows:

* Each rank of a DDP job has one `echo.Server` and an `EchoDataset` over it. No rank gets another rank's samples.
* Each actor is a process with one sink. ``route="least_inflight"`` spreads its batches over all ranks: a rank that is
  slow for a while gets fewer and delays no actor. With ``failover=True``, a rank that dies delays no actor either.
* Before each step, the ranks agree that all of them have a batch. They run out of batches at different times, and a
  rank alone in an all-reduce would wait forever.
* How to end: the learners train for as many steps as they like. Then the actors stop and `close`, while the ranks still
  take what they send. The servers close last.

The actors draw handwritten digits, shift them and add noise. The ranks learn to read them and are tested on digits that
no actor has.

To run it (about ten seconds; the digits come with scikit-learn, nothing is downloaded):

    pip install '.[examples]'
    torchrun --standalone --nproc-per-node 2 examples/ddp.py

The exit code is 0 only if every rank got as many batches as it asked for and all ranks end with the same model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from typing import Any

import echo
import torch
import torch.distributed as dist
from quickstart import TRAIN_SAMPLES, small_cnn
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from echo_torch import EchoDataset, EchoSink, numpy_example

HOST = "127.0.0.1"
BATCH = 64  # samples per step of a rank, and per `send` of an actor
BLUR = 0.1  # standard deviation of the noise on a pixel, whose values are 0 to 1
GONE_S = 5.0  # seconds after which an unreachable rank is given up
DONE = "actors are done"

EXAMPLE = {"actor": torch.tensor(0), "image": torch.zeros(1, 8, 8), "label": torch.tensor(0)}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all digits in the same order everywhere: images [1797, 1, 8, 8] from 0 to 1, and labels [1797]."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(data.images / 16).float().unsqueeze(1)[order], torch.from_numpy(data.target).long()[order]


# The actors.


def act(number: int, ports: list[int], stop: Event) -> None:
    """Send batches until ``stop`` is set. Each sample is a digit, shifted by at most one pixel, with noise."""
    torch.set_num_threads(1)
    torch.manual_seed(number)
    images, labels = (data[:TRAIN_SAMPLES] for data in digits())
    sink_s, began = 0.0, time.perf_counter()
    options: dict[str, Any] = {
        "route": "least_inflight",
        "failover": True,
        "reconnect": GONE_S,
        "buffer_bytes": 1 << 20,
    }
    with EchoSink(HOST, ports, EXAMPLE, **options) as sink:
        while not stop.is_set():
            drawn = torch.randint(TRAIN_SAMPLES, (BATCH,))
            right, down = torch.randint(-1, 2, (2,)).tolist()
            image = images[drawn].roll((down, right), (2, 3))
            image += torch.randn_like(image) * BLUR

            before = time.perf_counter()
            sink.send({"actor": torch.full((BATCH,), number), "image": image, "label": labels[drawn]})
            sink_s += time.perf_counter() - before
    stats, took = sink.stats(), time.perf_counter() - began
    shares = " and ".join(f"{learner.samples_acked:,}" for learner in stats.peers)
    print(f"actor {number}    sent the learners {shares} samples; the sink took {sink_s / took:.0%} of its time")


def start_actors(count: int, ports: list[int], store: dist.Store) -> Event:
    """Start the actors and return the event that stops them.

    ``store`` gets the key `DONE` when all of them have ended, for whatever reason.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    processes = [context.Process(target=act, args=(number, ports, stop), daemon=True) for number in range(count)]
    for process in processes:
        process.start()

    def watch() -> None:
        for process in processes:
            process.join()
        store.set(DONE, "")

    threading.Thread(target=watch, daemon=True).start()
    return stop


# The ranks.


def serve(store: dist.Store) -> echo.Server:
    """Start this rank's server. It closes when the actors are done."""
    server = echo.Server(numpy_example(EXAMPLE), batch_size=BATCH, transport=echo.TcpTransport(port=0))
    server.start()

    def close_after_actors() -> None:
        # Poll, because a blocking wait on the store would keep everyone else from using it.
        while not store.check([DONE]):
            time.sleep(0.1)
        server.close()

    threading.Thread(target=close_after_actors, daemon=True).start()
    return server


def next_of_all(batches: Iterator[Any]) -> Any:
    """Return the next batch of this rank, or None as soon as any rank has none.

    A rank runs out of batches when its actors, and so its server, have ended.
    """
    batch = next(batches, None)
    have = torch.tensor(batch is not None, dtype=torch.int32)
    dist.all_reduce(have, dist.ReduceOp.MIN)
    return batch if have else None


def train(model: nn.Module, dataset: EchoDataset, steps: int) -> int:
    """Train for up to ``steps`` batches of this rank. Return how many there were."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    done = 0
    progress = tqdm(total=steps, desc="steps", disable=None if dist.get_rank() == 0 else True)
    batches = iter(dataset)
    while done < steps and (batch := next_of_all(batches)) is not None:
        optimizer.zero_grad()
        # backward() averages the gradients over all ranks.
        nn.functional.cross_entropy(model(batch["image"]), batch["label"]).backward()
        optimizer.step()
        done += 1
        progress.update()
    progress.close()
    return done


def check(model: nn.Module, done: int, steps: int) -> None:
    """Exit with a message unless all ranks trained to the end and have the same model."""
    parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    all_of_them: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, (done, parameters))
    if any(theirs != steps for theirs, _ in all_of_them):
        sys.exit(f"FAILED: the actors ended after {[theirs for theirs, _ in all_of_them]} of {steps} steps")
    if any(not torch.equal(theirs, parameters) for _, theirs in all_of_them):
        sys.exit("FAILED: the ranks have different models")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on several learners at once, to which every actor sends.")
    parser.add_argument("--steps", type=int, default=400, help="batches that each rank trains on (default: 400)")
    parser.add_argument("--actors", type=int, default=2, help="processes that send (default: 2)")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("to be run as: torchrun --standalone --nproc-per-node 2 examples/ddp.py")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    store, rank, ranks = next(dist.rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)

    server = serve(store)
    ports: list[Any] = [None] * ranks
    dist.all_gather_object(ports, server.port)
    stop = start_actors(options.actors, ports, store) if rank == 0 else None
    dataset, model = EchoDataset(server, EXAMPLE), DistributedDataParallel(small_cnn())
    began = time.perf_counter()
    done = train(model, dataset, options.steps)
    took = time.perf_counter() - began
    if stop is not None:
        stop.set()
    # Take what the actors still send, so that they can close.
    for _ in dataset:
        pass
    check(model, done, options.steps)
    if rank == 0:
        images, labels = (data[TRAIN_SAMPLES:] for data in digits())
        with torch.no_grad():
            right = model.module(images).argmax(1) == labels
        print(f"trained    {ranks} ranks, {done * BATCH:,} samples each, {ranks * done * BATCH / took:,.0f} samples/s")
        print(
            f"accuracy   {right.float().mean():.1%} on {len(labels)} held-out digits, with the same model in all ranks"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
