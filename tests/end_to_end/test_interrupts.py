"""Ctrl-C at any point: thousands of interrupts inside `send`, `wait` and `close`, and every count settles.

A timer interrupts the main thread at random moments, once per arming, as Ctrl-C does. The peer checks that it only
ever sees whole payloads, in order, and every one whose `send` returned.
"""

from __future__ import annotations

import random
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import alarms, eventually, running
from peers import Peer, PeerConnection, Script
from terminator import server_context

from echo_torch import TLS, ConnectionClosedError, DeliveryTimeoutError, EchoSink, TcpClient
from echo_torch.client.resend import ClosingTail
from echo_torch.wire.tls_socket import GREETING_WAIT_S

HANG_TIMEOUT_S = 30.0

Behind = Callable[[Script], Script]


@pytest.fixture(params=[False, True], ids=["plain", "TLS"])
def tls(request: pytest.FixtureRequest, certificates: Path) -> TLS | None:
    """What is interrupted."""
    return TLS(ca_file=certificates / "ca.pem") if request.param else None


@pytest.fixture
def behind(tls: TLS | None, certificates: Path) -> Behind:
    """Makes of a peer's script one that speaks TLS, if that is wanted."""
    if tls is None:
        return lambda script: script
    context = server_context(str(certificates / "server.pem"))

    def wrap(script: Script) -> Script:
        def run(conn: PeerConnection) -> None:
            try:
                conn.sock = context.wrap_socket(conn.sock, server_side=True)
                script(conn)
            except ssl.SSLError:  # the client left, for an interrupt
                conn.close()

        return run

    return wrap


class Interrupts:
    """Raises KeyboardInterrupt in the main thread at a random moment after `arm`, unless `disarm` comes first."""

    def __init__(self) -> None:
        self.count = 0
        self._armed = False
        self._random = random.Random(0)

    def arm(self, longest_s: float) -> None:
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, self._random.uniform(1e-6, longest_s))

    def disarm(self) -> None:
        self._armed = False

    def strike(self, *_: object) -> None:
        if self._armed:
            self._armed = False
            self.count += 1
            raise KeyboardInterrupt


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    made = Interrupts()
    with alarms(made.strike):
        yield made
        made.disarm()


class Checker:
    """A peer's script: payloads of int64, each of one number; acks every one and keeps the numbers."""

    def __init__(self, words: int) -> None:
        self.sample = {"x": np.zeros(words, np.int64)}
        self.seen: list[int] = []

    def __call__(self, conn: PeerConnection) -> None:
        conn.send_handshake(self.sample)
        size = self.sample["x"].nbytes
        left = b""
        while data := conn.sock.recv(1 << 18):
            data = left + data
            whole = len(data) // size
            rows = np.frombuffer(data, np.int64, whole * size // 8).reshape(whole, size // 8)
            assert (rows == rows[:, :1]).all(), "a payload is torn"
            self.seen += rows[:, 0].tolist()
            left = data[whole * size :]
            conn.ack(whole)
        assert not left, "the connection ended inside a payload"


class CuttingChecker(Checker):
    """Goes away after a random number of bytes, again and again, while ``cutting``; a torn payload is dropped."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.cutting = True
        self.connections = 0
        self._random = random.Random(1)

    def __call__(self, conn: PeerConnection) -> None:
        conn.send_handshake(self.sample)
        self.connections += 1
        size = self.sample["x"].nbytes
        left = self._random.randrange(1, 400 * size) if self.cutting else 1 << 62
        rest = b""
        numbers: list[int] = []
        while data := conn.sock.recv(min(left, 1 << 18)):
            left -= len(data)
            data = rest + data
            whole = len(data) // size
            rows = np.frombuffer(data, np.int64, whole * size // 8).reshape(whole, size // 8)
            assert (rows == rows[:, :1]).all(), "a payload is torn"
            numbers += rows[:, 0].tolist()
            self.seen += rows[:, 0].tolist()
            rest = data[whole * size :]
            conn.ack(whole)
            if not left:
                break
        assert numbers == sorted(set(numbers)), "repeated or out of order"
        self._random.choice([conn.close, conn.reset])()


def storm(interrupts: Interrupts, strikes: int, longest_s: float, call: Callable[[int], Any]) -> set[int]:
    """Call with 0, 1, 2, ... until ``strikes`` interrupts struck; gives the numbers whose call returned."""
    returned = set()
    number = 0
    while interrupts.count < strikes:
        try:
            interrupts.arm(longest_s)
            call(number)
            returned.add(number)
            interrupts.disarm()
        except KeyboardInterrupt:
            pass
        except BaseException:
            interrupts.disarm()
            raise
        number += 1
    return returned


def check(seen: list[int], returned: set[int], accepted: int) -> None:
    assert seen == sorted(set(seen)), "repeated or out of order"
    assert returned <= set(seen), "a send that returned was lost"
    assert len(seen) == accepted


@pytest.mark.parametrize(
    ("words", "window", "longest_s", "strikes"),
    [
        (4, 32, 60e-6, 3000),  # small payloads, written by the caller
        (4, 1, 120e-6, 1000),  # a window that is always full: interrupts hit the waiting
        (20_000, 4, 600e-6, 400),  # payloads larger than what a caller writes: the thread writes them
    ],
)
def test_interrupted_sends(
    interrupts: Interrupts,
    tls: TLS | None,
    behind: Behind,
    words: int,
    window: int,
    longest_s: float,
    strikes: int,
) -> None:
    checker = Checker(words)
    with Peer(behind(checker)) as peer, TcpClient("127.0.0.1", peer.port, checker.sample, window, tls=tls) as client:
        returned = storm(
            interrupts, strikes, longest_s, lambda number: client.send({"x": np.full(words, number, np.int64)})
        )
        client.wait(HANG_TIMEOUT_S)
        assert client.in_flight == 0
        accepted = client.counts().sent
    check(checker.seen, returned, accepted)


def test_interrupted_batches_of_a_sink(interrupts: Interrupts) -> None:
    """Batches through a ring that is smaller than one of them, so that a send waits for room in its middle."""
    checker = Checker(4)
    rows = 100
    with Peer(checker) as peer:
        example = {"x": torch.zeros(4, dtype=torch.int64)}
        with EchoSink("127.0.0.1", peer.port, example, buffer_bytes=64 * 32, resend_at_close=False) as sink:

            def send(number: int) -> None:
                first = number * rows
                sink.send({"x": torch.arange(first, first + rows)[:, None].expand(rows, 4)})

            returned = storm(interrupts, 1000, 400e-6, send)
            sink.wait(HANG_TIMEOUT_S)
            stats = sink.stats()
            assert stats.in_flight == 0
    numbers = {batch * rows + row for batch in returned for row in range(rows)}
    check(checker.seen, numbers, stats.samples_sent)


@pytest.mark.parametrize(("words", "window", "longest_s"), [(4, 32, 200e-6), (2000, 4, 400e-6)])
def test_interrupted_sends_and_waits_over_connections_that_are_cut(
    interrupts: Interrupts, tls: TLS | None, behind: Behind, words: int, window: int, longest_s: float
) -> None:
    """Whoever is struck while finding out that the connection is lost: nothing is lost, and all counts settle."""
    checker = CuttingChecker(words)
    with Peer(behind(checker)) as peer:
        options = {"buffer_bytes": 100 * 8 * words, "reconnect": HANG_TIMEOUT_S, "tls": tls}
        client = TcpClient("127.0.0.1", peer.port, checker.sample, window, **options)

        def send_and_wait(number: int) -> None:
            client.send({"x": np.full(words, number, np.int64)})
            if number % 8 == 0:
                client.wait(HANG_TIMEOUT_S)

        returned = storm(interrupts, 5000 if tls is None else 1000, longest_s, send_and_wait)
        checker.cutting = False
        client.wait(HANG_TIMEOUT_S)
        client.close(HANG_TIMEOUT_S)
        counts = client.counts()
    assert returned <= set(checker.seen), "a send that returned was lost"
    assert len(set(checker.seen)) == counts.sent
    assert len(checker.seen) - counts.sent <= counts.resent
    assert counts.unacked == 0
    assert counts.reconnects >= (10 if tls is None else 3)


def test_an_interrupt_that_follows_another_at_once_leaves_no_lock_held() -> None:
    """The second strikes while the first one unwinds. A lock left held would have every later call turned away."""
    checker = Checker(4)
    left = strikes = 0

    def strike(*_: object) -> None:
        nonlocal left, strikes
        if left:
            left -= 1
            strikes += 1
            raise KeyboardInterrupt

    chance = random.Random(0)
    with alarms(strike), Peer(checker) as peer, TcpClient("127.0.0.1", peer.port, checker.sample) as client:
        while strikes < 2000:
            with suppress(KeyboardInterrupt):
                try:
                    left = 2
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 3e-4), 2e-5)
                    while left == 2:
                        client.send(checker.sample)
                        client.wait(HANG_TIMEOUT_S)
                finally:
                    while left:
                        pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            client.send(checker.sample)
            client.wait(HANG_TIMEOUT_S)


def test_interrupted_waits(interrupts: Interrupts, tls: TLS | None, behind: Behind) -> None:
    checker = Checker(4)
    with Peer(behind(checker)) as peer, TcpClient("127.0.0.1", peer.port, checker.sample, tls=tls) as client:

        def send_and_wait(number: int) -> None:
            client.send({"x": np.full(4, number, np.int64)})
            client.wait(HANG_TIMEOUT_S)
            assert client.in_flight == 0

        returned = storm(interrupts, 1500, 150e-6, send_and_wait)
        client.wait(HANG_TIMEOUT_S)
        assert client.in_flight == 0
        accepted = client.counts().sent
    check(checker.seen, returned, accepted)


def test_interrupted_close_ends_soon_all_the_same(interrupts: Interrupts, descriptors: None) -> None:
    """The peer never acks, so `close` is struck in its flush. The next one frees everything; neither hangs."""

    def silent(conn: PeerConnection) -> None:
        conn.send_handshake({"x": np.zeros(4, np.int64)})
        conn.receive_all()

    for _ in range(100):
        with Peer(silent) as peer:
            client = TcpClient("127.0.0.1", peer.port, {"x": np.zeros(4, np.int64)})
            client.send({"x": np.zeros(4, np.int64)})
            with suppress(KeyboardInterrupt):
                try:
                    interrupts.arm(2e-3)
                    client.close(timeout=1e-3)
                except DeliveryTimeoutError:
                    interrupts.disarm()
            # Struck before it began, `close` has done nothing yet; struck later, it has not told of the loss.
            with suppress(DeliveryTimeoutError, ConnectionClosedError):
                client.close(timeout=0)
            with pytest.raises(ConnectionClosedError):
                client.wait(HANG_TIMEOUT_S)
    assert interrupts.count > 10


def test_close_that_is_interrupted_leaves_the_rest_to_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here before the tail; a second `close` waits for it."""
    pack = ClosingTail.pack

    def strike(tail: ClosingTail) -> int:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return pack(tail)

    checker = Checker(4)
    with Peer(checker) as peer:
        client = TcpClient("127.0.0.1", peer.port, checker.sample, resend_at_close=True, resend_acked=2)
        for number in range(5):
            client.send({"x": np.full(4, number, np.int64)})
        client.wait(HANG_TIMEOUT_S)
        with monkeypatch.context() as patch:
            patch.setattr(ClosingTail, "pack", strike)
            with pytest.raises(KeyboardInterrupt):
                client.close()
        client.close(HANG_TIMEOUT_S)
    assert checker.seen == [0, 1, 2, 3, 4, 3, 4]
    assert client.counts().maybe_lost == 0


# Struck before it has a name, a socket is freed all the same, but not without a word, and what pytest does on hearing
# it can be struck as well; nor is a callback of the library silent.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lazily", [False, True], ids=["TcpClient", "EchoSink.send"])
def test_interrupted_connecting_leaves_nothing(
    interrupts: Interrupts, descriptors: None, tls: TLS | None, behind: Behind, lazily: bool
) -> None:
    """Nothing but KeyboardInterrupt comes out; the fixtures look for threads and descriptors."""
    checker = Checker(4)
    strikes, longest_s = (150, 3e-3) if tls is None else (50, GREETING_WAIT_S + 10e-3)
    with Peer(behind(checker)) as peer:

        def client(number: int) -> None:
            made = TcpClient("127.0.0.1", peer.port, checker.sample, tls=tls)
            interrupts.disarm()
            made.send({"x": np.full(4, number, np.int64)})
            made.close(HANG_TIMEOUT_S)

        def sink(number: int) -> None:
            made = EchoSink("127.0.0.1", peer.port, checker.sample, resend_at_close=False, tls=tls)
            try:
                interrupts.arm(longest_s)
                made.send({"x": np.full(4, number, np.int64)})
            finally:
                interrupts.disarm()
                made.close(HANG_TIMEOUT_S)

        returned = storm(interrupts, strikes, longest_s, sink if lazily else client)
    assert returned <= set(checker.seen)
    assert len(checker.seen) == len(set(checker.seen))


CALLING_HANDLER = """
import faulthandler, random, signal, sys
import numpy as np
from echo_torch import ConnectionClosedError, DeliveryTimeoutError, TcpClient
port, what = int(sys.argv[1]), sys.argv[2]
sample = {"x": np.zeros(4, np.int64)}
chance = random.Random(0)
outcomes = {}
struck = 0

def call(function, *arguments):
    try:
        function(*arguments)
        outcomes["done"] = outcomes.get("done", 0) + 1
    except (RuntimeError, ConnectionClosedError, DeliveryTimeoutError) as error:
        outcomes[type(error).__name__] = outcomes.get(type(error).__name__, 0) + 1

def handler(*_):
    global struck
    struck += 1
    call(getattr(client, sys.argv[3]), 0.05)

signal.signal(signal.SIGALRM, handler)
faulthandler.dump_traceback_later(20, exit=True)
for number in range(150):
    client = TcpClient("127.0.0.1", port, sample, 4)
    before = struck
    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 2e-3))
    while struck == before:
        call(client.send, sample)
        if what != "send":
            call(client.wait, 5)
        if what == "close":
            call(client.close, 5)
    call(client.close)
    assert client.closed
assert struck >= 150
assert outcomes["done"]
assert outcomes.keys() <= {"done", "RuntimeError", "ConnectionClosedError", "DeliveryTimeoutError"}, outcomes
print("ended")
"""


@pytest.mark.parametrize(
    ("what", "handler"),
    [
        ("send", "close"),
        ("wait", "wait"),
        ("close", "close"),
        pytest.param("send", "wait", marks=pytest.mark.slow),
        pytest.param("wait", "close", marks=pytest.mark.slow),
        pytest.param("close", "wait", marks=pytest.mark.slow),
    ],
)
def test_a_signal_handler_that_calls_us_hangs_nothing(what: str, handler: str) -> None:
    """Whatever it interrupts. In an interpreter of its own, which can be ended if it hangs."""
    checker = Checker(4)
    with Peer(checker) as peer:
        command = [sys.executable, "-W", "error", "-c", CALLING_HANDLER, str(peer.port), what, handler]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                out, err = process.communicate(timeout=HANG_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert (process.returncode, out) == (0, "ended\n"), err
    assert err == ""


def test_interrupted_looks_at_what_a_lost_connection_left(interrupts: Interrupts) -> None:
    """They wait for its thread, and leave nothing locked that `close` waits for."""
    sample = {"x": np.zeros((), np.int64)}

    def resets(conn: PeerConnection) -> None:
        conn.send_handshake(sample)
        conn.receive(8)
        conn.reset()

    with Peer(resets) as peer:
        client = TcpClient("127.0.0.1", peer.port, sample)
        client.send({"x": np.ones((), np.int64)})
        eventually(lambda: client.closed)
        storm(interrupts, 1000, 20e-6, lambda number: client.undelivered())
        assert client.undelivered().remaining == 1
        with running(lambda: client.close(0)) as outcomes:
            pass
        assert isinstance(outcomes[0], ConnectionClosedError)
