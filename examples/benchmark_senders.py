"""What the benchmark compares: samples of several sizes, peers to send them to, and senders.

Peers run in their own processes:

* ``real``: an ``echo.Server`` whose learner does nothing but drain;
* ``null``: reads and acks as fast as it can, which shows the sender's own limit. The benchmark prints how busy it was:
  a peer below 100 % waited for the sender.

Senders, each in its default configuration, with the same data:

* ``sink``: ``EchoSink.send(batch)`` of B samples, torch tensors;
* ``client``: ``echo_torch.TcpClient.send(sample)``, with B samples cut out of the batch beforehand;
* ``stock``: ``echo.TcpClient.send(sample)``, likewise. Its window is 32 samples, the sink's 1,024. ``stock 1024`` has
  the sink's window;
* ``raw``: ``sendall`` of the batch's packed bytes, with a thread that reads acks: the better of plain reading and
  reading with ``SO_RCVLOWAT``. It checks nothing and packs nothing. Its window (32,768 samples) only makes it end in
  time.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import echo
import optree
import torch

from echo_torch import EchoSink, TcpClient, numpy_example
from echo_torch.wire.protocol import ACK, WireLeaf, encode_handshake

HOST = "127.0.0.1"
ACK_MARK = 16
RAW_WINDOW = 32_768


class Case(NamedTuple):
    """Samples of one kind, and a batch of them. The leaves of the batch have the batch dimension first."""

    name: str
    size: int
    batch: dict[str, torch.Tensor]

    @property
    def example(self) -> Any:
        return numpy_example({name: leaf[0] for name, leaf in self.batch.items()})

    @property
    def leaves(self) -> list[WireLeaf]:
        return [WireLeaf(leaf.dtype.itemsize, leaf.shape) for leaf in optree.tree_leaves(self.example)]

    @property
    def payload(self) -> int:
        """The bytes of one sample."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def cut(self, size: int) -> Case:
        return self._replace(size=size, batch={name: leaf[:size] for name, leaf in self.batch.items()})


@functools.cache
def cases() -> dict[str, Case]:
    def case(name: str, size: int, **leaves: tuple[tuple[int, ...], torch.dtype]) -> Case:
        made = {key: torch.randint(0, 2, (size, *shape)).to(dtype) for key, (shape, dtype) in sorted(leaves.items())}
        return Case(name, size, made)

    steps = 5
    action, reward = ((), torch.int64), ((), torch.float32)
    observation = {f"obs_{index:02d}": ((steps, 4 + index % 13), torch.float32) for index in range(43)}
    made = [
        case("29B", 256, obs=((4,), torch.float32), action=action, reward=reward, done=((), torch.bool)),
        case("1KB", 256, obs=((250,), torch.float32), action=action, reward=reward),
        case("28KB", 64, obs=((4, 84, 84), torch.uint8), action=action, reward=reward),
        case("602KB", 16, image=((3, 224, 224), torch.float32), label=((), torch.int64)),
        case("43 leaves", 64, **observation),
    ]
    return {case.name: case for case in made}


# Peers.


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


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
    """Send the CPU seconds of this process whenever asked. Ends with the benchmark."""
    try:
        while pipe.recv():
            pipe.send(cpu_seconds())
    except EOFError:
        pass


class Child:
    """A process that runs ``target(pipe, *arguments)`` and ends with the benchmark."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        # Load these once for all children, because they take more than a second.
        context.set_forkserver_preload(["echo", "torch"])
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def cpu_seconds(self) -> float:
        self.pipe.send(True)
        return float(self.pipe.recv())

    def signal(self, number: int) -> None:
        """Send a signal, as ``kill -number`` does."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self._process.terminate()
        self._process.join()


class PeerProcess(Child):
    """A peer in its own process."""

    def __init__(self, kind: str, case: Case) -> None:
        if kind == "null":
            super().__init__(run_null_peer, encode_handshake(case.leaves), case.payload)
        else:
            super().__init__(run_real_peer, case.example, max(32, case.size))
        self.port: int = self.pipe.recv()


# Senders: each is a context manager that yields the two calls to measure, "send one batch" and "wait for all".

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
        # Poll, because a blocking `recv` would keep the SO_RCVLOWAT mark of when it was called.
        poller = select.poll()
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


def run_sender(pipe: Any, port: int, batch: dict[str, Any]) -> None:
    """Send a batch when asked with True. When asked with False, wait for all acks and answer."""
    with sink(port, {name: torch.from_numpy(leaf) for name, leaf in batch.items()}) as (send, wait):
        try:
            while True:
                if pipe.recv():
                    send()
                else:
                    wait()
                    pipe.send(None)
        except EOFError:
            pass


@contextmanager
def elsewhere(port: int, batch: dict[str, torch.Tensor]) -> Iterator[Calls]:
    """A sink in another process, which costs this one only its share of the machine."""
    context = multiprocessing.get_context("forkserver")
    pipe, theirs = context.Pipe()
    # Send arrays, because tensors would move into shared memory.
    copies = {name: leaf.numpy() for name, leaf in batch.items()}
    process = context.Process(target=run_sender, args=(theirs, port, copies), daemon=True)
    process.start()
    theirs.close()

    def wait() -> None:
        pipe.send(False)
        pipe.recv()

    try:
        yield lambda: pipe.send(True), wait
    finally:
        pipe.close()
        process.join()


Sender = Callable[[int, dict[str, torch.Tensor]], Any]
SENDERS: dict[str, Sender] = {
    "sink": sink,
    "client": lambda port, batch: one_by_one(TcpClient, port, batch),
    "stock": lambda port, batch: one_by_one(echo.TcpClient, port, batch),
    "stock 1024": lambda port, batch: one_by_one(
        functools.partial(echo.TcpClient, max_inflight_msgs=1024), port, batch
    ),
    "raw": lambda port, batch: raw(port, batch, 1),
    "raw lowat": lambda port, batch: raw(port, batch, ACK_MARK),
}
