"""What sending costs: the sink and `TcpClient` beside the stock ``echo.TcpClient`` and the raw limit of the socket.

    python examples/benchmark.py [--quick] [--json FILE] [--cases 29B,1KB] [--peers null,real] [--rounds 5]

Every figure is the median of interleaved rounds in one run: the senders take turns on one peer, so that a drifting
machine drifts for all of them. Peers run in processes of their own:

* ``real``: an ``echo.Server`` whose learner does nothing but drain;
* ``null``: reads and acks as fast as it can, which shows the sender's own limit. How busy it was is printed: a peer
  below 100 % waited for the sender.

Senders, each with its default configuration, over the same data:

* ``sink``: ``EchoSink.send(batch)`` of B samples, torch tensors;
* ``client``: ``echo_torch.TcpClient.send(sample)``, B samples cut out of the batch beforehand;
* ``stock``: ``echo.TcpClient.send(sample)``, the same;
* ``raw``: ``sendall`` of the batch's packed bytes, acks read by a thread: the better of plain reading and reading with
  ``SO_RCVLOWAT``. It checks nothing, packs nothing, and its window (32,768 samples) is only there to end in time.

Times include the final ``wait()``. CPU is user + system of the sending process. "blocked" is how long the caller of
one batch's sends was away, median of all batches of a round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import select
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import echo
import optree
import torch

from echo_torch import EchoSink, TcpClient, numpy_example
from echo_torch.wire import ACK, WireLeaf, encode_handshake

HOST = "127.0.0.1"
ACK_MARK = 16
RAW_WINDOW = 32_768
WARM_UP_S = 0.1


def cases() -> dict[str, tuple[int, dict[str, torch.Tensor]]]:
    """Name -> batch size and one batch, whose leaves have the batch dimension first."""

    def batch(size: int, **leaves: tuple[tuple[int, ...], torch.dtype]) -> tuple[int, dict[str, torch.Tensor]]:
        return size, {
            name: torch.randint(0, 2, (size, *shape)).to(dtype) for name, (shape, dtype) in sorted(leaves.items())
        }

    steps = 5
    observation = {f"obs_{index:02d}": ((steps, 4 + index % 13), torch.float32) for index in range(43)}
    return {
        "29B": batch(
            256,
            obs=((4,), torch.float32),
            action=((), torch.int64),
            reward=((), torch.float32),
            done=((), torch.bool),
        ),
        "1KB": batch(256, obs=((250,), torch.float32), action=((), torch.int64), reward=((), torch.float32)),
        "28KB": batch(64, obs=((4, 84, 84), torch.uint8), action=((), torch.int64), reward=((), torch.float32)),
        "602KB": batch(16, image=((3, 224, 224), torch.float32), label=((), torch.int64)),
        "43 leaves": batch(64, **observation),
    }


# Peers.


def run_null_peer(pipe: Any, greeting: bytes, payload: int) -> None:
    listener = socket.create_server((HOST, 0))
    pipe.send(listener.getsockname()[1])

    def serve(line: socket.socket) -> None:
        buffer, left = bytearray(1 << 22), 0
        while count := line.recv_into(buffer):
            whole, left = divmod(left + count, payload)
            line.sendall(ACK * whole)

    def accept() -> None:
        while True:
            line, _ = listener.accept()
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.sendall(greeting)
            threading.Thread(target=serve, args=(line,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    answer_cpu(pipe)


def run_real_peer(pipe: Any, example: Any, batch_size: int) -> None:
    server = echo.Server(example, batch_size=batch_size, transport=echo.TcpTransport(port=0))
    server.start()
    pipe.send(server.port)

    def drain() -> None:
        while server.sample() is not None:
            pass

    threading.Thread(target=drain, daemon=True).start()
    answer_cpu(pipe)


def answer_cpu(pipe: Any) -> None:
    """Say how much CPU this process has used whenever asked; ends with the benchmark."""
    try:
        while pipe.recv():
            pipe.send(cpu_seconds())
    except EOFError:
        pass


class PeerProcess:
    """A peer in a process of its own."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()
        self.port: int = self._pipe.recv()

    def cpu_seconds(self) -> float:
        self._pipe.send(True)
        return float(self._pipe.recv())

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


# Senders: each is a context that gives the two calls to measure, "send one batch" and "wait for all".

Calls = tuple[Callable[[], Any], Callable[[], Any]]


@contextmanager
def sink(port: int, batch: dict[str, torch.Tensor]) -> Iterator[Calls]:
    with EchoSink(HOST, port, {name: leaf[0] for name, leaf in batch.items()}) as made:
        yield lambda: made.send(batch), made.wait


@contextmanager
def one_by_one(make: Callable[..., Any], port: int, batch: dict[str, torch.Tensor]) -> Iterator[Calls]:
    arrays = {name: leaf.numpy() for name, leaf in batch.items()}
    size = len(next(iter(arrays.values())))
    samples = [{name: leaf[row, ...] for name, leaf in arrays.items()} for row in range(size)]
    made = make(HOST, port, samples[0])

    def send() -> None:
        for sample in samples:
            made.send(sample)

    try:
        yield send, made.wait
    finally:
        made.close()


@contextmanager
def raw(port: int, batch: dict[str, torch.Tensor], mark: int) -> Iterator[Calls]:
    leaves = [leaf.numpy() for leaf in optree.tree_leaves(batch)]
    rows = len(leaves[0])
    payload = b"".join(leaf[row].tobytes() for row in range(rows) for leaf in leaves)
    line = socket.create_connection((HOST, port))
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.recv(1 << 16)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
    sent, acked, all_acked = [0], [0], threading.Event()

    def read() -> None:
        poller = select.poll()  # a blocking `recv` would stick to the mark of when it was called
        poller.register(line, select.POLLIN)
        while True:
            poller.poll()
            try:
                count = len(line.recv(1 << 16, socket.MSG_DONTWAIT))
            except BlockingIOError:
                continue
            if not count:
                return
            acked[0] += count
            if acked[0] == sent[0]:
                all_acked.set()

    def send() -> None:
        while sent[0] - acked[0] > max(4 * rows, RAW_WINDOW):
            time.sleep(0.0005)
        sent[0] += rows
        line.sendall(payload)

    def wait() -> None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        while acked[0] < sent[0]:
            all_acked.wait(0.001)
            all_acked.clear()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield send, wait
    finally:
        line.shutdown(socket.SHUT_RDWR)
        reader.join()
        line.close()


Sender = Callable[[int, dict[str, torch.Tensor]], Any]
SENDERS: dict[str, Sender] = {
    "sink": sink,
    "client": lambda port, batch: one_by_one(TcpClient, port, batch),
    "stock": lambda port, batch: one_by_one(echo.TcpClient, port, batch),
    "raw": lambda port, batch: raw(port, batch, 1),
    "raw lowat": lambda port, batch: raw(port, batch, ACK_MARK),
}


# Measuring.


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, peer: PeerProcess, batch: dict[str, torch.Tensor], seconds: float) -> dict[str, float]:
    """Send for about ``seconds`` and give the figures of that round."""
    rows = len(next(iter(batch.values())))
    with SENDERS[name](peer.port, batch) as (send, wait):
        stop = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < stop:
            send()
        wait()
        blocked = []
        peer_cpu, cpu, began = peer.cpu_seconds(), cpu_seconds(), time.perf_counter()
        before = began
        while before < began + seconds:
            send()
            now = time.perf_counter()
            blocked.append(now - before)
            before = now
        wait()
        wall = time.perf_counter() - began
        cpu = cpu_seconds() - cpu
        samples = rows * len(blocked)
        return {
            "samples_s": samples / wall,
            "cpu_us": cpu / samples * 1e6,
            "blocked_us": statistics.median(blocked) * 1e6,
            "peer_busy": (peer.cpu_seconds() - peer_cpu) / wall,
        }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def throughput(names: list[str], peers: list[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for case in names:
        size, batch = cases()[case]
        example = numpy_example({name: leaf[0] for name, leaf in batch.items()})
        leaves = [WireLeaf(leaf.dtype.itemsize, leaf.shape) for leaf in optree.tree_leaves(example)]
        payload = sum(leaf.nbytes for leaf in leaves)
        peer_arguments: dict[str, tuple[Any, ...]] = {
            "null": (run_null_peer, encode_handshake(leaves), payload),
            "real": (run_real_peer, example, max(32, size)),
        }
        for kind in peers:
            figures: dict[str, list[dict[str, float]]] = {name: [] for name in SENDERS}
            with PeerProcess(*peer_arguments[kind]) as peer:
                for _ in range(rounds):
                    for name in SENDERS:
                        figures[name].append(measure(name, peer, batch, seconds))
            results = {name: medians(found) for name, found in figures.items()}
            limit = max(results.pop("raw"), results.pop("raw lowat"), key=lambda found: found["samples_s"])
            for name, found in {**results, "raw": limit}.items():
                row = {"case": case, "B": size, "peer": kind, "sender": name, **found}
                row["mb_s"] = found["samples_s"] * payload / 1e6
                row["vs_stock"] = found["samples_s"] / results["stock"]["samples_s"]
                row["cpu_vs_stock"] = found["cpu_us"] / results["stock"]["cpu_us"]
                row["blocked_vs_stock"] = found["blocked_us"] / results["stock"]["blocked_us"]
                row["vs_limit"] = found["samples_s"] / limit["samples_s"]
                rows.append(row)
                print(throughput_line(row), flush=True)
    return rows


THROUGHPUT_HEAD = (
    f"{'sample':<10}{'B':>4} {'peer':<5}{'sender':<8}{'samples/s':>12}{'MB/s':>9}{'CPU us/sample':>15}"
    f"{'blocked us/batch':>18}{'x stock':>9}{'CPU/stock':>11}{'blocked/stock':>15}{'x limit':>9}{'peer busy':>11}"
)


def throughput_line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:<10}{row['B']:>4} {row['peer']:<5}{row['sender']:<8}{row['samples_s']:>12,.0f}"
        f"{row['mb_s']:>9,.0f}{row['cpu_us']:>15.3f}{row['blocked_us']:>18,.1f}{row['vs_stock']:>9.2f}"
        f"{row['cpu_vs_stock']:>11.4f}{row['blocked_vs_stock']:>15.4f}{row['vs_limit']:>9.2f}{row['peer_busy']:>11.0%}"
    )


# A main thread that is busy in Python.


def step() -> int:
    """Some 0.2 ms of pure Python, as a stand-in for what a training loop does beside its tensors."""
    total = 0
    for number in range(4000):
        total += number & 7
    return total


def busy_rate(name: str, port: int, batch: dict[str, torch.Tensor], seconds: float) -> float:
    """Samples per second that another thread gets sent while the main thread never lets go of the GIL by itself."""
    rows = len(next(iter(batch.values())))
    stop, sent = threading.Event(), [0]
    with SENDERS[name](port, batch) as (send, wait):

        def work() -> None:
            while not stop.is_set():
                send()
                sent[0] += rows
            wait()

        thread = threading.Thread(target=work)
        began = time.perf_counter()
        thread.start()
        while time.perf_counter() < began + seconds:
            step()
        stop.set()
        while thread.is_alive():
            step()
        return sent[0] / (time.perf_counter() - began)


def loop_rate(name: str | None, port: int, batch: dict[str, torch.Tensor], rate: float, seconds: float) -> float:
    """Steps per second of a loop that also sends ``rate`` samples per second; None sends nothing."""
    rows = len(next(iter(batch.values())))

    def loop(send: Callable[[], Any]) -> float:
        began = now = time.perf_counter()
        sent = steps = 0
        while now < began + seconds:
            step()
            steps += 1
            now = time.perf_counter()
            if sent + rows <= (now - began) * rate:
                send()
                sent += rows
        return steps / (time.perf_counter() - began)

    if name is None:
        return loop(lambda: None)
    with SENDERS[name](port, batch) as (send, wait):
        found = loop(send)
        wait()
        return found


def busy_main(rounds: int, seconds: float) -> dict[str, Any]:
    rate = 10_000.0
    size, batch = cases()["29B"]
    example = numpy_example({name: leaf[0] for name, leaf in batch.items()})
    busy: dict[str, list[float]] = {"sink": [], "client": [], "stock": []}
    loops: dict[str, list[float]] = {"sink": [], "stock": []}
    with PeerProcess(run_real_peer, example, size) as peer:
        for _ in range(rounds):
            for name, found in busy.items():
                found.append(busy_rate(name, peer.port, batch, seconds))
            for name, found in loops.items():
                alone = loop_rate(None, peer.port, batch, rate, seconds)
                found.append(loop_rate(name, peer.port, batch, rate, seconds) / alone)
    return {
        "samples_s": {name: statistics.median(found) for name, found in busy.items()},
        "rate": rate,
        "loop_kept": {name: statistics.median(found) for name, found in loops.items()},
    }


def print_busy(found: dict[str, Any]) -> None:
    print("\nMain thread busy in Python, real server, 29 B samples, B = 256")
    stock = found["samples_s"]["stock"]
    for name, samples in found["samples_s"].items():
        print(f"  {name:<8}{samples:>12,.0f} samples/s from a second thread {samples / stock:>8.1f} x stock")
    for name, kept in found["loop_kept"].items():
        print(f"  {name:<8}{kept:>12.3f} of the loop's rate kept while it sends {found['rate']:,.0f} samples/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest samples and shorter rounds: under 60 s")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="length of one round of one sender")
    parser.add_argument("--cases", help=f"of {', '.join(cases())}")
    parser.add_argument("--peers", default="null,real")
    options = parser.parse_args()
    names = options.cases.split(",") if options.cases else list(cases())
    if options.quick and not options.cases:
        names = ["29B"]
    seconds = options.seconds or (0.25 if options.quick else 0.6)
    print(THROUGHPUT_HEAD)
    rows = throughput(names, options.peers.split(","), options.rounds, seconds)
    busy = busy_main(options.rounds, seconds)
    print_busy(busy)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"throughput": rows, "busy": busy}, file, indent=2)


if __name__ == "__main__":
    main()
