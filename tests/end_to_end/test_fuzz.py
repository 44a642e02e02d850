"""Peers that say anything, in any pieces, and end anyhow: what comes of it is documented, in time, and costs nothing.

Hypothesis draws what a peer says and does, and what the caller does meanwhile. All of it runs under a limit on the
address space, and what a greeting makes the client allocate is measured: no more than `HANDSHAKE_LIMIT` and a constant.

``pytest tests/end_to_end/test_fuzz.py --hypothesis-profile=thorough --timeout=0`` tries twenty times as much.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peers import PATIENCE_S, Peer, PeerConnection, Script, greeting

from echo_torch import (
    ConnectionClosedError,
    DeliveryTimeoutError,
    HandshakeError,
    ProtocolError,
    SpecMismatchError,
    TcpClient,
)
from echo_torch.metrics.stats import Counts
from echo_torch.wire import protocol
from echo_torch.wire.protocol import ACK, WireLeaf, encode_handshake

pytestmark = pytest.mark.usefixtures("descriptors", "little_memory")

SAMPLE = {"id": np.zeros((), np.int64), "x": np.zeros(3, np.float32)}
GREETING = greeting(SAMPLE)

LATER_S = 30.0
"""A deadline that is not meant to pass."""
SHORT_TIMEOUT_S = 0.1
"""One that is."""
MARGIN_S = 10.0
"""Seconds that a loaded machine may take to notice that a deadline has passed."""
TICK_S = 0.02
"""Seconds by which clocks may disagree."""

ROOM_BYTES = 1024**3
"""Address space for a test: 8 MiB for the stack, and 64 MiB for the malloc, of each of some ten threads."""
OBEYED_BYTES = 64 * 1024
"""What a peer may make a client allocate: as much as the longest greeting has."""
OVERHEAD_BYTES = 48 * 1024
"""What comes on top, measured as 37 KiB: a connection and its failure, the peer's thread included, are 11; a greeting's
bytes are allocated an eighth in advance, up to 8; and an error names eight leaves of 64 dimensions, 7, first as lines,
then joined, then as the message. A client that connects had no long greeting, but takes 64 KiB for acks, and 20 more.
"""


def fuzz(examples: int, *, threads: bool = False) -> settings:
    """So many, in the default profile; where ``threads`` matter, what fails is too unsteady to be made smaller."""
    return settings(
        deadline=None,
        phases=[phase for phase in Phase if not threads or phase not in (Phase.shrink, Phase.explain)],
        max_examples=examples * settings.default.max_examples // 100,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Limits, and what is left.


@pytest.fixture(scope="module", autouse=True)
def _connected_once() -> None:
    """What is imported for the first connection is not on its peer's account."""
    with Peer(lambda conn: conn.send_handshake(SAMPLE)) as peer:
        TcpClient(peer.host, peer.port, SAMPLE).close()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Leaves `ROOM_BYTES` of address space, above what the process has now."""
    with open("/proc/self/status") as status:
        (size,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize:"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def allocating(at_most: int) -> Iterator[None]:
    """The block, and the threads that run meanwhile, allocate no more than that at a time."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= at_most, f"{peak} bytes were allocated"


@contextlib.contextmanager
def leaving_nothing() -> Iterator[None]:
    """Neither a thread nor a descriptor is left by the block, and that at once."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("echo_torch")]
    assert len(os.listdir("/proc/self/fd")) == before


def drain(conn: PeerConnection) -> None:
    """Read until the client has left, in small pieces, as what they take is measured too."""
    with contextlib.suppress(ConnectionError):
        while conn.sock.recv(4096):
            pass


# Greetings.


class Act(NamedTuple):
    """What a peer does: says ``data`` in ``pieces`` of these sizes, pausing before the one at ``pause``, and ends."""

    data: bytes
    pieces: Sequence[int]
    pause: int | None
    end: Script


def finish(conn: PeerConnection) -> None:
    """FIN, and go on to read."""
    with contextlib.suppress(OSError):  # the client was faster
        conn.sock.shutdown(socket.SHUT_WR)


def stall(conn: PeerConnection) -> None:
    """Say nothing more, and stay."""


ENDS = [finish, PeerConnection.close, PeerConnection.reset]


def perform(act: Act) -> Script:
    def script(conn: PeerConnection) -> None:
        rest = memoryview(act.data)  # which is not copied
        for number, piece in enumerate(itertools.cycle(act.pieces)):
            if number == act.pause:
                time.sleep(TICK_S)
            if not rest:
                break
            conn.send(rest[:piece])
            rest = rest[piece:]
        act.end(conn)
        if conn.sock.fileno() >= 0:
            drain(conn)

    return script


def refusal(data: bytes) -> type[Exception] | None:
    """The reference: what a greeting that begins like this is refused with, if nothing follows."""
    at = 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        if at > OBEYED_BYTES:
            raise HandshakeError
        if at > len(data):
            raise ConnectionClosedError
        return int.from_bytes(data[at - 4 : at], "little")

    if not b"ECHO\x01".startswith(data[:5]):
        return HandshakeError
    try:
        num_arrays = take(9)
        if num_arrays > 4096:
            return HandshakeError
        for _ in range(num_arrays):
            num_dims = take(8)
            if num_dims > 64:
                return HandshakeError
            take(4 * num_dims)
    except (HandshakeError, ConnectionClosedError) as error:
        return type(error)
    return None if data[:at] == GREETING else SpecMismatchError


def greeted(act: Act, timeout: float) -> type[Exception] | None:
    """What comes of a client that meets this peer: None if it connects, else what is raised; checks all that holds."""
    with leaving_nothing(), Peer(perform(act)) as peer:
        refused: Exception | None = None
        began = time.monotonic()
        try:
            with allocating(OBEYED_BYTES + OVERHEAD_BYTES):
                client = TcpClient(peer.host, peer.port, SAMPLE, 1, connect_timeout=timeout)
        except (HandshakeError, SpecMismatchError, ConnectionClosedError, TimeoutError) as error:
            refused = error
        else:
            client.close(0)
        took = time.monotonic() - began
    assert took < timeout + MARGIN_S
    if refused is None:
        return None
    assert f"{peer.host}:{peer.port}" in str(refused)
    if type(refused) is TimeoutError:
        assert took >= timeout - TICK_S
    return type(refused)


u32 = st.sampled_from([0, 1, 2, 3, 4, 8, 64, 65, 4096, 4097, 2**16, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
dims = st.lists(u32, max_size=4) | st.builds(lambda size, count: [size] * count, u32, st.integers(0, 66))
arrays = st.builds(WireLeaf, u32, dims.map(tuple))


def header(num_arrays: int) -> bytes:
    return b"ECHO\x01" + struct.pack("<I", num_arrays)


def spliced(data: bytes, at: int, piece: bytes) -> bytes:
    """With this written over it."""
    at %= len(data)
    return data[:at] + piece + data[at + len(piece) :]


def flipped(data: bytes, bits: Sequence[int]) -> bytes:
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)


def cut(data: bytes, at: int) -> bytes:
    """Shorter; with -1, whole."""
    return data[: at % (len(data) + 1)]


right = st.builds(bytes.__add__, st.just(GREETING), st.binary(max_size=12) | st.integers(0, 99).map(lambda n: ACK * n))
nearly_right = (
    st.builds(flipped, right, st.lists(st.integers(0, 8 * 99), min_size=1, max_size=3))
    | st.builds(spliced, right, st.sampled_from([5, 9, 13, 17, 21, 25]), u32.map(lambda n: struct.pack("<I", n)))
    | st.builds(cut, right, st.integers(0, 99))
)
other = st.lists(arrays, max_size=6).map(encode_handshake)
noise = st.binary(max_size=60) | st.binary(max_size=60).map(lambda data: b"ECHO\x01" + data)
huge = st.builds(
    lambda announced, leaf, count, end: cut(header(announced) + encode_handshake([leaf] * count)[9:], end),
    st.integers(0, 4096) | st.sampled_from([2, 248, 4096, 4097, 2**32 - 1]),
    st.builds(lambda size, count: WireLeaf(size, (size,) * count), u32, st.sampled_from([0, 1, 4, 63, 64, 65])),
    st.integers(0, 4100) | st.sampled_from([247, 248, 249, 4096]),
    st.just(-1) | st.integers(0, 2**20),
)
streams = right | nearly_right | other | noise | huge


def acts(streams: st.SearchStrategy[bytes], ends: Sequence[Script]) -> st.SearchStrategy[Act]:
    pieces = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(lambda small: [*small, 2**16])
    return st.builds(Act, streams, pieces, st.none() | st.integers(0, 4), st.sampled_from(ends))


@fuzz(300)
@given(acts(streams, ENDS))
def test_any_greeting_that_ends_connects_if_it_is_right_and_else_says_why(act: Act) -> None:
    outcome = greeted(act, LATER_S)
    allowed = {refusal(act.data)}
    if act.end is PeerConnection.reset:  # which may overtake what was said
        allowed.add(ConnectionClosedError)
    assert outcome in allowed


@fuzz(30)
@given(acts(streams, [stall]))
def test_any_greeting_that_stalls_ends_at_the_deadline(act: Act) -> None:
    """Unless what was said before is enough to tell."""
    expected = refusal(act.data)
    if expected is ConnectionClosedError:
        assert greeted(act, SHORT_TIMEOUT_S) is TimeoutError
    else:
        assert greeted(act, LATER_S) is expected


@pytest.mark.parametrize(
    ("start", "flood", "error"),
    [
        (b"", b"\0", HandshakeError),
        (b"", b"ECHO", HandshakeError),
        (header(4096), struct.pack("<II", 2**32 - 1, 0), SpecMismatchError),
        (header(4096), struct.pack("<III", 2**32 - 1, 1, 2**32 - 1), SpecMismatchError),
        (header(4096), struct.pack("<II", 2**32 - 1, 64) + b"\xff" * 256, HandshakeError),
        (header(248), struct.pack("<II", 2**32 - 1, 64) + b"\xff" * 256, SpecMismatchError),
        (header(0), ACK, SpecMismatchError),
    ],
    ids=["zeros", "magic", "scalars", "vectors", "too many dimensions", "all dimensions", "no arrays, and acks"],
)
def test_a_peer_that_never_stops_greeting(start: bytes, flood: bytes, error: type[Exception]) -> None:
    def script(conn: PeerConnection) -> None:
        conn.send(start)
        while True:
            conn.send(chunk)

    chunk = flood * (2**16 // len(flood))
    act = Act(start + chunk * 2, [2**16], None, stall)
    assert refusal(act.data) is error
    with (
        leaving_nothing(),
        Peer(script) as peer,
        allocating(OBEYED_BYTES + OVERHEAD_BYTES),
        pytest.raises(error, match=str(peer.port)),
    ):
        TcpClient(peer.host, peer.port, SAMPLE, 1)


# That these tests would find it.


def test_without_the_caps_a_count_is_more_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for cap in ("MAX_ARRAYS", "MAX_DIMS", "HANDSHAKE_LIMIT"):
        monkeypatch.setattr(protocol, cap, 2**40)
    with pytest.raises(MemoryError):
        greeted(Act(header(1) + struct.pack("<III", 1, 2**32 - 1, 1), [2**16], None, stall), SHORT_TIMEOUT_S)


def test_without_the_limit_a_long_greeting_costs_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HANDSHAKE_LIMIT", 2**40)
    array = WireLeaf(1, (1,) * 64)
    with pytest.raises(AssertionError, match="bytes were allocated"):
        greeted(Act(encode_handshake([array] * 500), [2**16], None, finish), LATER_S)


# What comes after the greeting.

BRIEF_S = 0.02
"""How long a peer listens in vain, callers wait, and nothing is acked before that is a stall."""
RECONNECT_S = 0.1
"""For how long a lost connection is tried to be opened again."""
SMALL, LARGE = 3, 65_536
"""Numbers in a sample. Of the large ones, few fit into the buffers of a socket."""


def sample(number: int, length: int) -> dict[str, Any]:
    return {"id": np.array(number, np.int64), "x": np.full(length, number, np.float32)}


def payload(number: int, length: int) -> bytes:
    return struct.pack("<q", number) + struct.pack("<f", number) * length


class Plan(NamedTuple):
    """What a peer does on one connection."""

    greeting: bytes | None  # None for the right one
    moves: Sequence[tuple[str, Any]]  # methods of `Scene`, and what they take
    end: str  # another one


class Scene:
    """Carries out a plan, and says what a client may make of it.

    Args:
        plan: for one connection.
        length: of the samples.
        client_came: set by the test when the client is made.
        client_left: set by the test when it is done with the client.
    """

    def __init__(self, plan: Plan, length: int, client_came: threading.Event, client_left: threading.Event) -> None:
        self.plan = plan
        self.size = len(payload(0, length))
        self.greeting = greeting(sample(0, length)) if plan.greeting is None else plan.greeting
        self.client_came = client_came
        self.client_left = client_left
        self.honest = True
        self.said = bytearray()
        self.conn: PeerConnection | None = None

    @property
    def acks(self) -> int:
        """The most that a client may have taken for acks."""
        said = bytes(self.said)
        return len(said) - len(said.lstrip(ACK)) if self.plan.greeting is None else 0

    @property
    def received(self) -> bytes:
        return bytes(self.conn.received) if self.conn else b""

    def __call__(self, conn: PeerConnection) -> None:
        self.conn = conn
        conn.send(self.greeting)
        for move, argument in self.plan.moves:
            getattr(self, move)(conn, argument)
        getattr(self, self.plan.end)(conn)

    # Moves.

    def hear(self, conn: PeerConnection, count: int) -> None:
        """Read so many bytes, or what there is of them."""
        conn.sock.settimeout(BRIEF_S)
        with contextlib.suppress(TimeoutError):
            while count > 0:
                piece = conn.sock.recv(min(count, 2**16))
                if not piece:
                    raise ConnectionError("the client left")
                conn.received += piece
                count -= len(piece)
        conn.sock.settimeout(PATIENCE_S)

    def hear_payloads(self, conn: PeerConnection, count: int) -> None:
        self.hear(conn, count * self.size)

    def store(self, conn: PeerConnection, count: int) -> None:
        """Read so many payloads, or what there is of them, and ack each."""
        for _ in range(count):
            self.hear_payloads(conn, 1)
            self.ack(conn, 1)

    def ack(self, conn: PeerConnection, count: int) -> None:
        """As many as are due, at the most."""
        self._say(conn, ACK * min(count, len(conn.received) // self.size - len(self.said)))

    def say(self, conn: PeerConnection, data: bytes) -> None:
        self.honest = False
        self._say(conn, data)

    def answer(self, conn: PeerConnection, data: bytes) -> None:
        """Read as many payloads, or what there is of them, and say this in place of their acks."""
        self.hear_payloads(conn, len(data))
        self.say(conn, data)

    def _say(self, conn: PeerConnection, data: bytes) -> None:
        self.said += data
        conn.send(data)

    def pause(self, conn: PeerConnection, seconds: float) -> None:
        time.sleep(seconds)

    # Ends.

    def serve(self, conn: PeerConnection) -> None:
        """Read everything and ack it."""
        while piece := conn.sock.recv(2**20):
            conn.received += piece
            self.ack(conn, 2**20)

    def listen(self, conn: PeerConnection) -> None:
        """Read everything and say nothing."""
        conn.receive_all()

    def stall(self, conn: PeerConnection) -> None:
        """Do nothing until the client has left."""
        assert self.client_left.wait(PATIENCE_S)
        conn.receive_all()

    def finish(self, conn: PeerConnection) -> None:
        finish(conn)
        conn.receive_all()

    def hang_up(self, conn: PeerConnection) -> None:
        conn.close()

    def reset(self, conn: PeerConnection) -> None:
        assert self.client_came.wait(PATIENCE_S)  # or it may never hear the greeting
        conn.reset()


class Stage:
    """Has a scene for each connection, in the order in which they come; those beyond are hung up on."""

    def __init__(self, plans: Sequence[Plan], length: int) -> None:
        self.client_came, self.client_left = threading.Event(), threading.Event()
        self.scenes = [Scene(plan, length, self.client_came, self.client_left) for plan in plans]
        self.connections: list[PeerConnection] = []
        """The peer's."""

    def __call__(self, conn: PeerConnection) -> None:
        number = self.connections.index(conn)
        if number < len(self.scenes):
            self.scenes[number](conn)
        conn.close()

    @property
    def acks(self) -> int:
        return sum(scene.acks for scene in self.scenes)

    @property
    def honest(self) -> bool:
        return all(scene.honest for scene in self.scenes)


class Caller:
    """Calls a client, in one thread, and checks after each call all that holds whatever the peer does."""

    def __init__(self, client: TcpClient, stage: Stage, length: int) -> None:
        self.client = client
        self.stage = stage
        self.length = length
        self.accepted = 0
        """Samples, numbered from 0."""

    def send(self, count: int, timeout: float | None) -> None:
        for _ in range(count):
            data = sample(self.accepted, self.length)
            self.accepted += self.call(timeout, self.client.send, data) is None

    def send_rows(self, count: int, timeout: float | None) -> None:
        ids = np.arange(self.accepted, self.accepted + count)
        rows = [ids, np.repeat(ids.astype(np.float32), self.length).reshape(count, -1)]
        error = self.call(timeout, self.client.send_rows, rows)
        self.accepted += error.rows_accepted if error else count

    def wait(self, count: int, timeout: float | None) -> None:
        if self.call(timeout, self.client.wait) is None:
            assert self.client.in_flight == 0

    def close(self, timeout: float | None) -> bool:
        """Gives whether it was done without an error."""
        error = self.call(timeout, self.client.close)
        assert self.client.closed
        return error is None

    def call(
        self, timeout: float | None, method: Callable[..., None], *args: Any
    ) -> ConnectionClosedError | DeliveryTimeoutError | None:
        """Gives what was raised, if that is what may be."""
        raised: ConnectionClosedError | DeliveryTimeoutError | None = None
        began = time.monotonic()
        try:
            method(*args, timeout=timeout)
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            raised = error
        assert time.monotonic() - began < (timeout or 0.0) + MARGIN_S
        self.look()
        if raised is not None:
            assert 0 <= raised.unacked <= self.client.counts().sent
            assert not (self.stage.honest and isinstance(raised, ProtocolError))
        return raised

    def look(self, *_: object) -> None:
        counts = self.client.counts()
        assert 0 <= counts.unacked <= counts.sent
        assert counts.sent - counts.unacked <= self.stage.acks


class Play(NamedTuple):
    """One peer and one client, and what each of them does."""

    plans: Sequence[Plan]
    receive_buffer: int | None
    length: int
    window: int
    more_rows: int  # in the buffer than are needed
    resend_acked: int
    tail: bool
    calls: Sequence[tuple[str, int, float | None]]  # methods of `Caller`, and what they take
    company: bool  # whether another thread waits all the time
    close_timeout: float | None


timeouts = st.sampled_from([None, None, 0.0, BRIEF_S / 4, BRIEF_S])
honest_moves = st.one_of(
    st.tuples(st.just("store"), st.integers(1, 9)),
    st.tuples(st.just("hear"), st.integers(0, 200) | st.integers(0, 2**20)),
    st.tuples(st.just("hear_payloads"), st.integers(1, 9)),
    st.tuples(st.just("ack"), st.integers(1, 9)),
    st.tuples(st.just("pause"), st.sampled_from([0.0, BRIEF_S / 4])),
)
says = st.tuples(
    st.sampled_from(["say", "answer"]), st.integers(1, 40).map(lambda n: ACK * n) | st.binary(min_size=1, max_size=4)
)
cuts = st.sampled_from(["finish", "hang_up", "reset"])
plans = st.builds(
    Plan,
    st.none(),
    st.lists(honest_moves, max_size=6) | st.lists(says | honest_moves, min_size=1, max_size=6),
    st.sampled_from(["serve", "listen", "stall"]) | cuts,
)
plans_that_end = st.builds(Plan, st.none(), st.lists(honest_moves, max_size=4), cuts)
right_in_any_case = tuple(greeting(sample(0, length)) for length in (SMALL, LARGE))
wrong = (nearly_right | other | noise | huge).filter(lambda data: not data.startswith(right_in_any_case))
plans_of_another_peer = st.builds(Plan, wrong, st.just([]), st.sampled_from(["listen", "stall"]) | cuts)
sends = st.tuples(st.sampled_from(["send", "send_rows"]), st.integers(1, 5) | st.integers(1, 40), timeouts)
calls = sends | st.tuples(st.sampled_from(["wait", "look"]), st.just(0), timeouts)


def plays(*plans: st.SearchStrategy[Plan]) -> st.SearchStrategy[Play]:
    """With a connection for each of ``plans``."""
    return st.builds(
        Play,
        plans=st.tuples(*plans),
        receive_buffer=st.sampled_from([None, 4096]),
        length=st.sampled_from([SMALL, SMALL, LARGE]),
        window=st.sampled_from([1, 2, 7, 32]),
        more_rows=st.sampled_from([0, 0, 3, 50]),
        resend_acked=st.sampled_from([0, 1, 3]),
        tail=st.booleans(),
        calls=st.builds(lambda first, rest: [first, *rest], sends, st.lists(calls, max_size=6)),
        company=st.booleans(),
        close_timeout=timeouts,
    )


def act_out(play: Play, reconnect: float) -> tuple[Stage, Counts, bool]:
    """Gives also what the client counted, and whether `close` had nothing to say."""
    stage = Stage(play.plans, play.length)
    rows = play.window + play.resend_acked + play.more_rows + 1
    with (
        leaving_nothing(),
        Peer(stage, receive_buffer=play.receive_buffer) as peer,
        ThreadPoolExecutor() as threads,
    ):
        stage.connections = peer.connections
        client = TcpClient(
            peer.host,
            peer.port,
            sample(0, play.length),
            play.window,
            stall_timeout=BRIEF_S,
            buffer_bytes=len(payload(0, play.length)) * rows,
            reconnect=reconnect,
            resend_acked=play.resend_acked,
            resend_at_close=play.tail,
        )
        stage.client_came.set()
        try:
            done = make_calls(Caller(client, stage, play.length), play, threads)
        finally:
            stage.client_left.set()
            with contextlib.suppress(ConnectionClosedError, DeliveryTimeoutError):
                client.close(0)
        counts = client.counts()
    return stage, counts, done


def make_calls(caller: Caller, play: Play, threads: ThreadPoolExecutor) -> bool:
    """Gives whether `close` had nothing to say."""
    client = caller.client

    def keep_waiting() -> None:
        companion = Caller(client, caller.stage, play.length)
        while not client.closed:
            companion.call(BRIEF_S, client.wait)

    company = [threads.submit(keep_waiting)] * play.company
    for name, count, timeout in play.calls:
        getattr(caller, name)(count, timeout)
        assert client.counts().sent == caller.accepted
    done = caller.close(play.close_timeout)
    client.close(0)
    with pytest.raises(ConnectionClosedError):
        client.send(sample(0, play.length))
    for companion in company:
        companion.result(PATIENCE_S)
    assert client.counts().sent == caller.accepted
    return done


def with_tail(play: Play, accepted: int) -> bytes:
    """The payloads of the samples, and of those that are sent once more at the end."""
    numbers = list(range(accepted))
    period = min(play.resend_acked, accepted)
    if play.tail and period:
        numbers += [numbers[accepted - period + index % period] for index in range(play.resend_acked)]
    return b"".join(payload(number, play.length) for number in numbers)


@fuzz(200, threads=True)
@given(plays(plans))
def test_whatever_the_peer_does_calls_end_and_counts_add_up(play: Play) -> None:
    """Nothing is acked that the peer did not ack, and what it hears is what was sent, in order, as far as it goes."""
    stage, counts, done = act_out(play, 0.0)
    (scene,) = stage.scenes
    expected = with_tail(play, counts.sent)
    assert expected.startswith(scene.received)
    if stage.honest:
        assert len(scene.received) >= (counts.sent - counts.unacked) * scene.size
    if stage.honest and scene.plan.end == "serve" and done:
        assert scene.received == expected


@pytest.mark.slow
@fuzz(80, threads=True)
@given(plays(plans_that_end, plans_that_end | plans_of_another_peer, plans) | plays(plans_that_end, plans))
def test_whatever_the_peer_does_when_it_is_called_again(play: Play) -> None:
    """Each connection goes on in the sequence of samples, no later than at the first that may not be stored."""
    stage, counts, _ = act_out(play, RECONNECT_S)
    expected = with_tail(play, counts.sent)
    acked = counts.sent - counts.unacked
    acked_at_most = received = 0
    for scene in stage.scenes:
        latest = max(0, acked_at_most - play.resend_acked)
        starts = [row for row in range(latest + 1) if expected.startswith(scene.received, row * scene.size)]
        assert starts
        acked_at_most = max(acked_at_most, starts[-1] + scene.acks)
        received = max(received, starts[-1] + len(scene.received) // scene.size)
    assert acked <= acked_at_most
    if stage.honest:
        assert acked <= received
    assert counts.resent <= counts.reconnects * (play.window + play.resend_acked)


@pytest.mark.parametrize("flood", [ACK, b"\0", ACK * 63 + b"\xff"], ids=["acks", "zeros", "mostly acks"])
@pytest.mark.parametrize("caller", ["sends", "waits", "does nothing"])
def test_a_peer_that_never_stops_acking(flood: bytes, caller: str) -> None:
    """As a server does that expects samples of no bytes."""
    chunk = flood * (2**16 // len(flood))
    begin = threading.Event()

    def script(conn: PeerConnection) -> None:
        conn.send(GREETING)
        assert begin.wait(PATIENCE_S)
        while True:
            conn.send(chunk)

    with leaving_nothing(), Peer(script) as peer:
        client = TcpClient(peer.host, peer.port, SAMPLE)
        deadline = time.monotonic() + MARGIN_S
        with allocating(OBEYED_BYTES + OVERHEAD_BYTES):
            begin.set()
            while not client.closed:
                assert time.monotonic() < deadline
                if caller == "does nothing":
                    time.sleep(TICK_S)
                    continue
                with contextlib.suppress(ProtocolError):
                    client.send(SAMPLE, timeout=MARGIN_S)
                    if caller == "waits":
                        client.wait(MARGIN_S)
            with pytest.raises(ProtocolError, match=str(peer.port)):
                client.send(SAMPLE)
        with contextlib.suppress(ProtocolError):
            client.close()
