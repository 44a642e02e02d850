"""Train on two learners at once, each with a server of its own, to which every actor sends: DDP, fed by `EchoSink`.

What it shows:

* one `echo.Server` in each rank of a DDP job, and an `EchoDataset` over it: no rank has another's samples;
* actors, in processes of their own, whose one sink spreads batches over all ranks by ``route="least_inflight"``: a rank
  that is slower for a while gets fewer, and holds up no actor; with ``failover=True``, nor does one that dies;
* ranks that agree on each step that all of them have a batch: they end after different numbers of batches, and none may
  be left in an all-reduce for which the others do not come;
* who ends when: the learners train for as many steps as they like, then the actors stop and `close`, for which the
  ranks still take what they send, and the servers close last.

The actors draw handwritten digits, shift and blur them; the ranks learn to read them, and are tested on digits that no
actor has.

To run it (some ten seconds; the digits come with scikit-learn, nothing is downloaded):

    pip install '.[examples]'
    torchrun --standalone --nproc-per-node 2 examples/ddp.py

The exit code is 0 only if all ranks got as many batches as they asked for, and have the same model in the end.
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
BATCH = 64  # samples, of a rank's step and of an actor's `send`
BLUR = 0.1  # standard deviation of what is added to a pixel, from 0 to 1
GONE_S = 5.0  # after which a rank that cannot be reached is given up
DONE = "actors are done"

EXAMPLE = {"actor": torch.tensor(0), "image": torch.zeros(1, 8, 8), "label": torch.tensor(0)}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All of them in an order that is the same everywhere: images [1797, 1, 8, 8] from 0 to 1, and labels [1797]."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(data.images / 16).float().unsqueeze(1)[order], torch.from_numpy(data.target).long()[order]


# The actors.


def act(number: int, ports: list[int], stop: Event) -> None:
    """Send batches until told to stop; each sample is a digit that was shifted by a pixel, or not, and blurred."""
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
    """Start them, and give what stops them; ``store`` says when they have ended, told to or not."""
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
    """A server of this rank, for as long as there are actors."""
    server = echo.Server(numpy_example(EXAMPLE), batch_size=BATCH, transport=echo.TcpTransport(port=0))
    server.start()

    def close_after_actors() -> None:
        while not store.check([DONE]):  # to wait in it would keep all others from it
            time.sleep(0.1)
        server.close()

    threading.Thread(target=close_after_actors, daemon=True).start()
    return server


def next_of_all(batches: Iterator[Any]) -> Any:
    """The next batch of this rank, or None as soon as any rank has none: its actors, and so its server, have ended."""
    batch = next(batches, None)
    have = torch.tensor(batch is not None, dtype=torch.int32)
    dist.all_reduce(have, dist.ReduceOp.MIN)
    return batch if have else None


def train(model: nn.Module, dataset: EchoDataset, steps: int) -> int:
    """Train for ``steps`` batches of this rank; gives how many there were."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    done = 0
    progress = tqdm(total=steps, desc="steps", disable=None if dist.get_rank() == 0 else True)
    batches = iter(dataset)
    while done < steps and (batch := next_of_all(batches)) is not None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["image"]), batch["label"]).backward()  # which averages over all ranks
        optimizer.step()
        done += 1
        progress.update()
    progress.close()
    return done


def check(model: nn.Module, done: int, steps: int) -> None:
    """Exit with a message unless all ranks trained to the end, and came to the same."""
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
    for _ in dataset:  # what the actors have sent until then, so that they can close
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
