"""Every fault that this package is built to survive: what becomes of it, and the tests that produce it.

A row is the fault, what we do, and the tests, of this module or another. Where the stock client is known to hang, to
lose or to mix samples, the row is here because of that.

A peer that dies (FIN, RST, kill -9, ``server.close()``) while `wait` blocks
    ConnectionClosedError at once, with the un-acked count
    test_faults::test_calls_that_block_are_told_when_the_peer_dies
    test_tcp_client::test_calls_blocked_on_a_real_server_that_ends_are_woken
    test_tcp_client::test_wait_raises_with_the_count_when_the_peer_hangs_up
    test_tcp_client::test_wait_raises_when_the_peer_resets
    test_sink::test_raise_tells_every_call_from_the_first_failure

A server that is killed while `send` blocks on a full window, or in the middle of a batch
    ConnectionClosedError at once, with the un-acked count and how many samples of the batch were accepted
    test_faults::test_calls_that_block_are_told_when_the_peer_dies
    test_tcp_client::test_calls_blocked_on_a_real_server_that_ends_are_woken
    test_tcp_client::test_blocked_send_is_woken_when_the_peer_hangs_up
    test_sink::test_rows_accepted_when_the_peer_goes_in_the_middle_of_a_batch

`close` while other threads block in `send` and `wait`
    both wake and raise
    test_tcp_client::test_close_wakes_calls_that_block
    test_tcp_client::test_threads_may_send_wait_and_close_at_once

`wait` after `close` with a sample in flight
    ConnectionClosedError with the count
    test_tcp_client::test_close_raises_with_the_count_when_nothing_is_acked

`close` with un-acked samples
    delivers them; says how many are left if that takes too long or the peer is gone
    test_tcp_client::test_close_delivers_what_is_in_flight
    test_tcp_client::test_close_raises_with_the_count_when_nothing_is_acked
    test_tcp_client::test_close_tells_a_loss_that_nobody_was_told_of
    test_sink::test_close_sends_exactly_the_tail_once_more
    test_sink::test_close_on_a_peer_that_never_acks_gives_up_in_time

A peer that left before `close`
    the descriptors are freed by `close`, not by the garbage collector
    test_faults::test_close_frees_the_descriptors_when_the_peer_left
    test_tcp_client::test_the_descriptor_is_freed_when_the_peer_left

The last reference is dropped
    collected at once; delivers what was sent, in bounded time, and ends
    test_faults::test_what_is_dropped_is_collected_and_delivers
    test_faults::test_what_is_dropped_gives_up_in_time_and_says_what_is_left
    test_tcp_client::test_a_dropped_client_delivers_and_ends

The interpreter exits with samples in flight; children of multiprocessing end without ``close``
    delivers for up to 5 s and logs what is left; what kill -9 does is in the README
    test_processes::test_interpreter_exit_delivers_what_is_in_flight
    test_processes::test_interpreter_exit_is_bounded_and_says_what_is_left
    test_processes::test_interpreter_exit_with_one_peer_that_stalls_delivers_to_all_others
    test_processes::test_children_that_end_without_close_deliver_everything

SIGTERM, and ``sys.exit`` in a thread
    with the README's five lines, what was sent is delivered; nothing is harmed
    test_readme::test_sigterm_delivers_what_was_sent
    test_processes::test_sys_exit_in_a_thread_harms_nothing

A server that dies and starts again at its port
    un-acked samples are sent again, counted and logged; with another spec, or too late, ConnectionClosedError
    test_faults::test_a_server_that_is_killed_and_starts_again_gets_what_was_not_stored
    test_faults::test_a_server_that_starts_again_with_another_spec_is_the_end
    test_faults::test_a_server_that_does_not_start_again_in_time_is_the_end
    test_lost_connections::test_the_last_acked_and_all_unacked_are_sent_again_in_order
    test_lost_connections::test_many_cuts_at_any_byte
    test_lost_connections::test_a_loss_and_its_end_are_one_warning_each_with_cause_and_counts
    test_lost_connections::test_another_server_is_the_end_at_once
    test_lost_connections::test_when_the_time_is_up_who_waits_is_told

A server that never acks, or stops to
    DeliveryTimeoutError after `stall_timeout`, delivery goes on; never a reason to connect again
    test_faults::test_a_server_process_that_is_stopped_is_waited_for
    test_tcp_client::test_a_peer_that_never_acks_is_a_timeout_and_not_the_end
    test_sink::test_stall_timeout_is_no_end
    test_lost_connections::test_a_stall_is_no_reason_to_reconnect

A handshake that stalls at any byte, or dribbles; an accept queue that is full; a server process that is stopped
    TimeoutError when `connect_timeout` is over, which covers everything
    test_faults::test_a_handshake_that_stalls_at_any_byte_ends_at_the_deadline
    test_faults::test_a_full_accept_queue_ends_at_the_deadline
    test_faults::test_a_server_process_that_is_stopped_is_waited_for
    test_connect::test_a_greeting_that_stalls_anywhere_times_out
    test_connect::test_slow_bytes_do_not_extend_the_deadline
    test_connect::test_unresponsive_addresses_time_out_at_the_deadline

A handshake that announces billions of arrays or dimensions
    HandshakeError from the count alone, in no memory
    test_faults::test_counts_beyond_reason_are_refused_without_memory
    test_protocol::test_too_many_arrays_are_refused_by_their_count_alone
    test_protocol::test_too_many_dimensions_are_refused_by_their_count_alone
    test_protocol::test_more_than_the_limit_is_refused_before_it_is_held

Wrong magic or version, a port that refuses, a name that does not resolve
    the types of the stock client: ValueError, ConnectionRefusedError, ``socket.gaierror``; all name the peer
    test_tcp_client::test_wrong_greetings_raise_value_errors
    test_connect::test_an_answer_that_is_no_greeting_names_the_peer_and_what_is_wrong
    test_connect::test_a_refused_connection_names_the_peer
    test_connect::test_a_name_that_does_not_resolve_is_a_gaierror
    test_sink::test_connect_and_with_fail_early

IPv6 literals; a name of several addresses, of which only an IPv6 one answers
    all are tried under the one deadline
    test_connect::test_connects_to_a_literal_address
    test_connect::test_connects_to_localhost_whichever_family_listens
    test_connect::test_connects_to_the_first_address_that_answers

Threads that send samples of 4 MiB at the same time
    none is mixed, each thread's stay in order
    test_faults::test_threads_that_send_large_samples_never_mix_them
    test_tcp_client::test_many_threads_sending_never_mix_their_samples
    test_arrival::test_threads_on_one_sink_keep_their_own_order

A fork while a client is in use
    the child is refused, connects for itself through a sink, and ends without harm to the parent's connection
    test_processes::test_forks_among_large_samples_tear_none
    test_processes::test_a_forked_child_cannot_use_its_parents_client_and_leaves_it_alone
    test_processes::test_fork_while_threads_send_never_hangs_the_child
    test_processes::test_a_sink_sends_from_child_processes

Data that takes as many bytes as the right one: other dtypes, swapped, reshaped, another structure
    SpecMismatchError that names leaf, got and expected; nothing is sent
    test_faults::test_data_that_the_wire_cannot_tell_from_the_right_one_is_refused
    test_spec::test_another_shape_or_dtype_is_refused
    test_spec::test_another_structure_is_refused_by_key_path
    test_tcp_client::test_rejects_what_does_not_match_and_goes_on

Arrays of objects
    TypeError, in the example before anything is connected and in what is sent
    test_faults::test_samples_that_cannot_be_sent_never_connect
    test_spec::test_what_is_no_dense_array_of_numbers_is_no_batch

A sample without bytes, for which a server floods acks
    ValueError before anything is connected
    test_faults::test_samples_that_cannot_be_sent_never_connect
    test_spec::test_a_sample_without_bytes_is_refused

An ack too many, an ack before anything was sent, an ack that is not 0x01
    ProtocolError with both counts or the byte, connection dropped
    test_tcp_client::test_a_peer_that_breaks_the_protocol_is_dropped
    test_lost_connections::test_a_peer_that_breaks_the_protocol_is_not_called_again
    test_tcp_client::test_an_ack_before_any_send_drops_the_connection
    test_protocol::test_an_ack_too_many_is_refused_with_both_counts

A host that vanishes without a word
    ConnectionClosedError, idle or busy
    test_keepalive::test_a_host_that_vanishes_is_noticed

A host that forgets a connection it has let begin, being called by too many at once
    is called again a second later
    test_connect::test_a_peer_that_forgot_the_connection_is_retried

Ctrl-C while a call waits for the window
    every count settles; later calls work
    test_interrupts::test_interrupted_sends
    test_interrupts::test_interrupted_batches_of_a_sink
    test_interrupts::test_interrupted_waits

Ctrl-C in the middle of a write, of `close`, of connecting
    no payload is torn, nothing is left behind
    test_interrupts::test_interrupted_sends
    test_interrupts::test_interrupted_close_ends_soon_all_the_same
    test_interrupts::test_interrupted_connecting_leaves_nothing

``socket.setdefaulttimeout``
    no influence, on connecting, on idle connections, nor on busy ones
    test_tcp_client::test_sockets_default_timeout_does_not_matter
    test_connect::test_the_default_socket_timeout_is_ignored

`max_inflight_msgs` of 0, -1, 1.5
    ValueError, TypeError
    test_tcp_client::test_wrong_arguments
    test_sink::test_bad_arguments_are_refused_at_once

A port of loopback that nobody listens on is connected to itself
    counts as refused
    test_connect::test_a_self_connection_counts_as_refused

A learner that is paused for three times as long as keepalive takes
    nothing happens
    test_keepalive::test_a_host_that_vanishes_is_noticed

Acks that dribble, one in 50 ms; that come 32 in a segment; that come before a `wait` and within it
    all are counted; the window holds
    test_faults::test_acks_that_dribble_let_one_sample_through_each
    test_tcp_client::test_a_slow_but_steady_peer_never_stalls
    test_tcp_client::test_acks_in_a_clump_settle_everything
    test_tcp_client::test_wait_returns_only_when_everything_is_acked
"""

from __future__ import annotations

import ast
import itertools
import logging
import re
import select
import socket
import struct
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
from calls import HANG_TIMEOUT_S, Gate, check_error, running, until
from leaks import open_descriptors, our_threads
from learner_process import Learner
from peers import Peer, PeerConnection, full_queue, greeting

from echo_torch import (
    ConnectionClosedError,
    DeliveryTimeoutError,
    EchoSink,
    HandshakeError,
    SpecMismatchError,
    TcpClient,
)
from echo_torch.support import shutdown

pytestmark = pytest.mark.timeout(60)

SAMPLE = {"id": np.zeros((), np.int64)}
SIZE = 8


def sample(number: int) -> dict[str, Any]:
    return {"id": np.array(number, np.int64)}


class Keeper:
    """A script that acks everything, and gives the ids that a client has sent once it has left."""

    def __init__(self) -> None:
        self._left = threading.Semaphore(0)
        self._connections: list[PeerConnection] = []

    def __call__(self, conn: PeerConnection) -> None:
        self._connections.append(conn)
        conn.send_handshake(SAMPLE)
        try:
            conn.receive_all(ack_every=SIZE)
        finally:
            self._left.release()

    def received(self) -> list[int]:
        """Of the one client."""
        assert self._left.acquire(timeout=HANG_TIMEOUT_S)
        (conn,) = self._connections
        return np.frombuffer(bytes(conn.received), np.int64).tolist()


def silent(conn: PeerConnection) -> None:
    """Reads everything and acks nothing."""
    conn.send_handshake(SAMPLE)
    conn.receive_all()


def client_for(port: int, example: Any, window: int = 32, **options: Any) -> TcpClient:
    return TcpClient("127.0.0.1", port, example, window, **options)


def sink_for(port: int, example: Any, window: int = 1024, **options: Any) -> EchoSink:
    return EchoSink("127.0.0.1", port, example, max_inflight_msgs=window, resend_at_close=False, **options)


BOTH = pytest.mark.parametrize("make", [client_for, sink_for], ids=["TcpClient", "EchoSink"])


# The table.


def rows() -> list[list[str]]:
    """The lines of each row: the fault, what we do, the tests."""
    _, _, *found = (__doc__ or "").strip().split("\n\n")
    return [[line.strip() for line in row.splitlines()] for row in found]


def defined_in(module: Path) -> set[str]:
    """Its tests, as the table names them."""
    functions = [node.name for node in ast.parse(module.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {f"{module.stem}::{name}" for name in functions if name.startswith("test_")}


def test_the_table_is_true() -> None:
    """Each row has tests, all of them exist, and no other test of this module is left out."""
    here = Path(__file__)
    named = {test for _, _, *tests in rows() for test in tests}
    assert len(rows()) >= 28
    assert all(len(row) >= 3 for row in rows())
    assert named - set().union(*map(defined_in, here.parents[1].rglob("test_*.py"))) == set()
    assert defined_in(here) - named == {"test_faults::test_the_table_is_true"}


# Peers that die.


@contextmanager
def acks_nothing(how: str) -> Iterator[tuple[Callable[[], TcpClient], Callable[[], None]]]:
    """What makes a client with a window of 3 whose peer hears 3 samples and acks none, and what ends that peer."""
    gate = Gate()

    def script(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(3 * SIZE)
        gate.wait()
        (conn.reset if how == "RST" else conn.close)()

    if how == "kill -9":
        with Learner(SAMPLE) as learner:

            def connect() -> TcpClient:
                client = client_for(learner.port, SAMPLE, 3)
                learner.freeze()
                return client

            yield connect, learner.kill
    else:
        with Peer(script) as peer:
            yield lambda: client_for(peer.port, SAMPLE, 3), gate.open


@pytest.mark.parametrize("how", ["FIN", "RST", "kill -9"])
def test_calls_that_block_are_told_when_the_peer_dies(how: str) -> None:
    """`wait`, and `send` on a full window: at once, and from then on."""
    with acks_nothing(how) as (connect, end):
        client = connect()
        for number in range(3):
            client.send(sample(number))
        with running(client.wait, lambda: client.send(sample(3))) as outcomes:
            with pytest.raises(DeliveryTimeoutError) as caught:
                client.wait(0.1)
            check_error(caught.value, DeliveryTimeoutError, client.peer, 3)
            end()
        for error in outcomes:
            check_error(error, ConnectionClosedError, client.peer, 3)
        for call in (client.wait, lambda: client.send(sample(3))):
            with pytest.raises(ConnectionClosedError) as caught:
                call()
            check_error(caught.value, ConnectionClosedError, client.peer, 3)
        client.close()


@pytest.mark.parametrize("how", ["FIN", "RST", "kill -9"])
def test_close_frees_the_descriptors_when_the_peer_left(how: str) -> None:
    """Although the client is still there."""
    with acks_nothing(how) as (connect, end):
        before = len(open_descriptors())
        client = connect()
        for number in range(3):
            client.send(sample(number))
        with until(lambda: client.closed):
            end()
        with pytest.raises(ConnectionClosedError) as caught:
            client.close(0)
        check_error(caught.value, ConnectionClosedError, client.peer, 3)
        assert len(open_descriptors()) <= before


# Servers that start again.


@contextmanager
def left_by_its_server(make: Callable[..., Any], **options: Any) -> Iterator[Any]:
    """A client with 64 samples sent, of which 32 are un-acked, just after its server was killed."""
    with Learner(SAMPLE) as learner:
        sender = make(learner.port, SAMPLE, **options)
        for number in range(32):
            sender.send(sample(number))
        sender.wait(HANG_TIMEOUT_S)
        learner.freeze()
        for number in range(32, 64):
            sender.send(sample(number))
        with pytest.raises(DeliveryTimeoutError):
            sender.wait(0.1)  # by then, all are written
        learner.kill()
        with socket.socket() as keeper:  # bound and never listening: the port is given to nobody else meanwhile
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            keeper.bind(("127.0.0.1", learner.port))
            yield sender


def port_of(sender: Any) -> int:
    return int(sender.peer.rpartition(":")[2])


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@BOTH
def test_a_server_that_is_killed_and_starts_again_gets_what_was_not_stored(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The un-acked samples, before them the last 8 acked ones, after them what was sent meanwhile; then it goes on."""
    with left_by_its_server(make, buffer_bytes=200 * SIZE, reconnect=HANG_TIMEOUT_S) as sender:
        for number in range(64, 80):
            sender.send(sample(number))
        with Learner(SAMPLE, port=port_of(sender)) as learner:
            sender.wait(HANG_TIMEOUT_S)
            for number in range(80, 88):
                sender.send(sample(number))
            sender.wait(HANG_TIMEOUT_S)
            assert learner.take(64)["id"].tolist() == list(range(24, 88))
            counts = sender.counts() if isinstance(sender, TcpClient) else sender.stats()
            assert (counts.reconnects, counts.resent, counts.maybe_duplicated, counts.maybe_lost) == (1, 40, 40, 0)
            lost, warning = warnings_of(caplog)
            assert lost.startswith(f"{sender.peer}: connection lost")
            unacked = re.search(r", (\d+) samples un-acked$", lost)  # of those sent meanwhile, some may be in it
            assert unacked
            assert 32 <= int(unacked[1]) <= 48
            assert "40 samples are sent again" in warning
            sender.close()


@BOTH
def test_a_server_that_starts_again_with_another_spec_is_the_end(make: Callable[..., Any]) -> None:
    """At once, and for all calls; both specs are named."""
    other = {"id": np.zeros((2, 3), np.float32)}
    with (
        left_by_its_server(make, buffer_bytes=200 * SIZE, reconnect=60.0) as sender,
        running(lambda: sender.wait(3 * HANG_TIMEOUT_S)) as outcomes,
        Learner(other, port=port_of(sender)),
    ):
        with until(lambda: outcomes != [None]):
            pass
        with pytest.raises(ConnectionClosedError) as caught:
            sender.send(sample(64))
        for error in (*outcomes, caught.value):
            check_error(error, ConnectionClosedError, sender.peer, 32)
            assert "Server spec mismatch" in str(error)
            assert "server expects 4-byte items [2, 3], example has ['id']: torch.int64 []" in str(error)
        sender.close()


@BOTH
def test_a_server_that_does_not_start_again_in_time_is_the_end(make: Callable[..., Any]) -> None:
    """For `wait`, for `send` when the buffer is full, and for all later calls."""
    with left_by_its_server(make, buffer_bytes=60 * SIZE, reconnect=0.3) as sender:
        lost_at = time.monotonic()

        def send_until_it_fails() -> None:
            for number in range(64, 200):
                sender.send(sample(number))

        with running(sender.wait, send_until_it_fails) as outcomes:
            pass
        assert 0.2 < time.monotonic() - lost_at < HANG_TIMEOUT_S
        with pytest.raises(ConnectionClosedError) as caught:
            sender.wait()
        for error in (*outcomes, caught.value):
            check_error(error, ConnectionClosedError, sender.peer, 60 - 8)
            assert re.search(r"connection lost: .*; not open again after 0\.\d s and \d+ tries: .*refused", str(error))
        sender.close()


# Clients that are dropped.


@BOTH
def test_what_is_dropped_is_collected_and_delivers(make: Callable[..., Any]) -> None:
    keeper = Keeper()
    with Peer(keeper) as peer:
        dropped = make(peer.port, SAMPLE, 2, buffer_bytes=100 * SIZE)
        for number in range(50):
            dropped.send(sample(number))
        gone = weakref.ref(dropped)
        del dropped
        assert gone() is None
        assert keeper.received() == list(range(50))


@BOTH
def test_what_is_dropped_gives_up_in_time_and_says_what_is_left(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, descriptors: None
) -> None:
    monkeypatch.setattr(shutdown, "DELIVER_AT_EXIT_S", 0.2)
    with Peer(silent) as peer:
        dropped = make(peer.port, SAMPLE)
        dropped.send(sample(0))
        dropped.send(sample(1))
        with until(lambda: not our_threads()):
            del dropped
    (message,) = (record.getMessage() for record in caplog.records)
    assert f"127.0.0.1:{peer.port}" in message
    assert "2 samples un-acked" in message


# Peers that stall.


def test_a_server_process_that_is_stopped_is_waited_for() -> None:
    """By those who connect until their deadline, by those who send or wait until theirs; and then it goes on."""
    with Learner(SAMPLE) as learner:
        client = client_for(learner.port, SAMPLE, reconnect=60.0, resend_acked=0)
        learner.freeze()
        with pytest.raises(TimeoutError, match=f"{client.peer}: handshake not complete within 0.2 s; got 0 bytes"):
            client_for(learner.port, SAMPLE, connect_timeout=0.2)
        for number in range(32):
            client.send(sample(number))
        for call in (lambda: client.send(sample(32), timeout=0.1), lambda: client.wait(0.1)):
            with pytest.raises(DeliveryTimeoutError) as caught:
                call()
            check_error(caught.value, DeliveryTimeoutError, client.peer, 32)
        learner.thaw()
        client.wait(HANG_TIMEOUT_S)
        assert learner.take(32)["id"].tolist() == list(range(32))
        assert client.counts().reconnects == 0
        client.close()


@BOTH
def test_a_handshake_that_stalls_at_any_byte_ends_at_the_deadline(make: Callable[..., Any], descriptors: None) -> None:
    whole = greeting({"x": np.zeros((2, 3), np.float32)})
    lengths = itertools.count()

    def stall(conn: PeerConnection) -> None:
        conn.send(whole[: next(lengths)])
        conn.receive_all()

    def connect() -> None:
        with make(peer.port, {"x": np.zeros((2, 3), np.float32)}, connect_timeout=1.0):
            pass

    with Peer(stall) as peer:
        began = time.monotonic()
        with running(*[connect] * len(whole)) as outcomes:
            pass
        assert time.monotonic() - began < HANG_TIMEOUT_S
    hint = "(?:; if that server expects TLS, give tls=)?"
    pattern = rf"127\.0\.0\.1:{peer.port}: handshake not complete within .* s; got (\d+) bytes of it{hint}"
    got = [re.fullmatch(pattern, str(error)) for error in outcomes]
    assert {type(error) for error in outcomes} == {TimeoutError}
    assert sorted(int(match[1]) for match in got if match) == list(range(len(whole)))


@BOTH
def test_a_full_accept_queue_ends_at_the_deadline(make: Callable[..., Any], descriptors: None) -> None:
    with full_queue() as listener:
        port = listener.getsockname()[1]
        match = rf"127\.0\.0\.1:{port}: no connection within"
        with pytest.raises(TimeoutError, match=match) as caught, make(port, SAMPLE, connect_timeout=0.2):
            pass
    assert type(caught.value) is TimeoutError


# Peers that talk nonsense.


LARGE_ARRAY = struct.pack("<II", 4, 64) + bytes(4 * 64)


@pytest.mark.parametrize(
    ("said", "flood", "match"),
    [
        (b"ECHO\x01\xff\xff\xff\xff", bytes(1 << 16), "4294967295 num_arrays"),
        (b"ECHO\x01\x01\x00\x00\x00\x04\x00\x00\x00\xff\xff\xff\xff", bytes(1 << 16), "4294967295 num_dims"),
        (b"ECHO\x01\x00\x10\x00\x00", LARGE_ARRAY, "handshake bytes"),
    ],
    ids=["arrays", "dimensions", "bytes"],
)
def test_counts_beyond_reason_are_refused_without_memory(
    said: bytes, flood: bytes, match: str, descriptors: None
) -> None:
    """Although the peer goes on to send what it announced."""

    def script(conn: PeerConnection) -> None:
        conn.send(said)
        while True:
            conn.send(flood)

    with Peer(script) as peer:
        tracemalloc.start()
        try:
            with pytest.raises(HandshakeError, match=f"127.0.0.1:{peer.port}: handshake announces .*{match}"):
                client_for(peer.port, SAMPLE)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


# Data.


def test_threads_that_send_large_samples_never_mix_them() -> None:
    """Of 4 MiB, each made of one number: two threads through one client, two through one sink."""
    words = 1 << 19
    big = {"x": np.zeros(words, np.int64)}
    received: list[list[int]] = []
    left = threading.Semaphore(0)

    def check(conn: PeerConnection) -> None:
        conn.send_handshake(big)
        mine: list[int] = []
        received.append(mine)
        try:
            while True:
                payload = np.frombuffer(conn.receive(words * 8), np.int64)
                conn.received.clear()
                assert (payload == payload[0]).all()
                mine.append(int(payload[0]))
                conn.ack()
        finally:
            left.release()

    def send(sender: Any, first: int) -> None:
        for number in range(first, first + 6):
            sender.send({"x": np.full(words, number)})

    with Peer(check) as peer:
        with client_for(peer.port, big, 2) as client, sink_for(peer.port, big) as sink:
            with running(*[lambda s=s, n=n: send(s, n) for s in (client, sink) for n in (0, 10)]) as outcomes:
                pass
            assert outcomes == [None] * 4
        for _ in range(2):
            assert left.acquire(timeout=HANG_TIMEOUT_S)
    for mine in received:
        assert len(mine) == 12
        assert [number for number in mine if number < 10] == list(range(6))
        assert [number for number in mine if number >= 10] == list(range(10, 16))


RIGHT = {
    "image": np.arange(6, dtype=np.float32).reshape(2, 3),
    "more": np.arange(3, dtype=np.float32),
    "state": np.arange(3, dtype=np.int32),
}
LOOKALIKES: dict[str, tuple[Any, list[str]]] = {
    # name: what is sent, what the error names
    "int32 for float32": (
        {**RIGHT, "image": RIGHT["image"].astype(np.int32)},
        ["['image']: got torch.int32 [2, 3], expected torch.float32 [2, 3]"],
    ),
    "float32 for int32": ({**RIGHT, "state": RIGHT["more"]}, ["['state']: got torch.float32 [3], expected"]),
    "uint32 for int32": (
        {**RIGHT, "state": RIGHT["state"].astype(np.uint32)},
        ["['state']: got torch.uint32 [3], expected torch.int32"],
    ),
    "transposed": ({**RIGHT, "image": RIGHT["image"].T}, ["['image']: got torch.float32 [3, 2], expected"]),
    "flattened": ({**RIGHT, "image": RIGHT["image"].reshape(-1)}, ["['image']: got torch.float32 [6], expected"]),
    "swapped": (
        {**RIGHT, "more": RIGHT["state"], "state": RIGHT["more"]},
        ["['more']: got torch.int32 [3], expected", "['state']: got torch.float32 [3], expected"],
    ),
    "another key": (
        {"image": RIGHT["image"], "most": RIGHT["more"], "state": RIGHT["state"]},
        ["['more']: torch.float32 [3]: missing", "['most']: unexpected"],
    ),
    "a tuple": (tuple(RIGHT.values()), ["structure", "['image']", "['more']", "['state']"]),
}


@BOTH
@pytest.mark.parametrize(("lookalike", "named"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_data_that_the_wire_cannot_tell_from_the_right_one_is_refused(
    make: Callable[..., Any], lookalike: Any, named: list[str]
) -> None:
    """It takes as many bytes; nothing of it is sent, and the right one still goes through."""
    payload = b"".join(leaf.tobytes() for leaf in optree.tree_leaves(RIGHT))
    assert sum(leaf.nbytes for leaf in optree.tree_leaves(lookalike)) == len(payload)
    passed = Gate()

    def script(conn: PeerConnection) -> None:
        conn.send_handshake(RIGHT)
        assert conn.receive(len(payload)) == payload
        passed.open()
        conn.ack()
        conn.receive_all()

    with Peer(script) as peer:
        with make(peer.port, RIGHT) as sender:
            with pytest.raises(SpecMismatchError) as caught:
                sender.send(lookalike)
            for part in named:
                assert part in str(caught.value)
            sender.send(RIGHT)
        passed.wait()
        assert len(peer.connections[0].received) == len(payload)


@BOTH
@pytest.mark.parametrize(
    ("example", "kind", "match"),
    [
        ({"x": np.array([None, 1])}, TypeError, r"\['x'\]: got .*object"),
        ({"x": np.array(["a", "b"])}, TypeError, r"\['x'\]: got .*U1"),
        ({"x": np.zeros((3, 0))}, ValueError, "no bytes"),
        ({}, ValueError, "no bytes|no leaves"),
    ],
    ids=["objects", "strings", "no elements", "no leaves"],
)
def test_samples_that_cannot_be_sent_never_connect(
    make: Callable[..., Any], example: Any, kind: type[Exception], match: str
) -> None:
    with Peer(PeerConnection.receive_all) as peer:
        with pytest.raises(kind, match=match):
            make(peer.port, example)
        assert not peer.connections


# Acks.


@BOTH
def test_acks_that_dribble_let_one_sample_through_each(make: Callable[..., Any]) -> None:
    """One in 50 ms: all of them together take longer than `stall_timeout`, and no sample comes before its time."""
    window, count = 4, 16
    early: list[bool] = []

    def dribble(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(window * SIZE)
        for acked in range(count):
            time.sleep(0.05)
            early.append(bool(select.select([conn.sock], [], [], 0)[0]))
            conn.ack()
            if acked < count - window:
                conn.receive(SIZE)
        conn.receive_all()

    with Peer(dribble) as peer:
        with make(peer.port, SAMPLE, window, buffer_bytes=100 * SIZE, stall_timeout=0.4) as sender:
            for number in range(count):
                sender.send(sample(number))
            sender.wait()
        assert bytes(peer.connections[0].received) == np.arange(count).tobytes()
    assert early == [False] * count
