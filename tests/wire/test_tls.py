"""TLS end to end: samples through a real terminator, in a process of its own, into a real learner."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
from calls import HANG_TIMEOUT_S, Gate, eventually, running
from cutting import Cutter
from learner_process import Learner
from numbered import FILLER, digest, example, fillers, samples
from peers import Peer, PeerConnection, Script, Scripts, greeting
from terminator import Terminator, server_context
from tls_records import ServerRecords, log_secrets
from torch.utils.data import DataLoader

from echo_torch import (
    TLS,
    CertificateError,
    ConnectionClosedError,
    DeliveryTimeoutError,
    EchoSink,
    HandshakeError,
    TcpClient,
)
from echo_torch.cli import main
from echo_torch.support.deadline import Deadline
from echo_torch.wire.connect import connect, do_handshake
from echo_torch.wire.poll import wait_ready
from echo_torch.wire.protocol import ACK
from echo_torch.wire.tls_socket import MAX_BYTES_WITHOUT_DATA, MAX_UNFLUSHED_BYTES, TlsSocket, do_tls_handshake

SIZE = 29
SHORT_TIMEOUT_S = 0.3
"""A deadline that is meant to pass."""
FIRST_NUMBERS = itertools.count(0, 1_000_000)
"""Where the numbers of each test's samples begin."""


@pytest.fixture
def tls(certificates: Path) -> TLS:
    return TLS(ca_file=certificates / "ca.pem")


@pytest.fixture(scope="module")
def learner() -> Iterator[Learner]:
    """For all tests that look only for their own samples."""
    with Learner(example(SIZE), digest=digest) as learner:
        yield learner


@pytest.fixture(scope="module")
def terminator(learner: Learner, certificates: Path) -> Iterator[Terminator]:
    with Terminator(learner.port, str(certificates / "server.pem")) as terminator:
        yield terminator


def sink_to(port: int, tls: TLS, **options: Any) -> EchoSink:
    return EchoSink("127.0.0.1", port, example(SIZE), tls=tls, **options)


def client_to(port: int, tls: TLS | None, **options: Any) -> TcpClient:
    return TcpClient("127.0.0.1", port, example(SIZE), tls=tls, **options)


def flush_partial_batch(learner: Learner, size: int = SIZE) -> None:
    """Have what waits for a whole batch handed out."""
    with EchoSink("127.0.0.1", learner.port, example(size)) as sink:
        sink.send(fillers(64, size))


def check_stored(learner: Learner, first: int, count: int, size: int = SIZE) -> None:
    """All numbers from ``first`` on are there, and no byte of anything is wrong."""
    flush_partial_batch(learner, size)
    wanted = set(range(first, first + count))
    eventually(lambda: wanted <= set(learner.take(0)["id"].tolist()))
    assert learner.take(0)["right"].all()


# What arrives.


@pytest.mark.parametrize(
    ("size", "batch", "batches", "version"),
    [
        (29, 256, 100, "TLSv1_3"),
        (29, 1, 300, "TLSv1_2"),
        (30_000, 64, 10, "TLSv1_3"),
        (60_000, 40, 4, "TLSv1_2"),
    ],
)
def test_all_samples_arrive(certificates: Path, tls: TLS, size: int, batch: int, batches: int, version: str) -> None:
    """In order, through a buffer that is smaller than what is sent."""
    sent = batch * batches
    with (
        Learner(example(size), digest=digest) as learner,
        Terminator(learner.port, str(certificates / "server.pem"), most=version) as terminator,
    ):
        options = {"buffer_bytes": min(sent // 2, 1000) * size, "tls": tls}
        with EchoSink("127.0.0.1", terminator.port, example(size), **options) as sink:
            for number in range(batches):
                sink.send(samples(number * batch, batch, size))
            sink.wait(HANG_TIMEOUT_S)
            assert sink.stats().samples_acked == sent
        assert sink.stats().maybe_duplicated == 8
        assert terminator.versions() == [version.replace("_", ".")]
        check_stored(learner, 0, sent, size)
        ids = learner.take(0)["id"]
    ours = ids[ids != FILLER].tolist()
    assert ours[:sent] == list(range(sent))
    assert ours[sent:] == list(range(sent - 8, sent))[: len(ours) - sent]  # the server may discard what is left of them


def test_several_threads_send_at_once(learner: Learner, terminator: Terminator, tls: TLS) -> None:
    first = next(FIRST_NUMBERS)
    with sink_to(terminator.port, tls) as sink:

        def send(number: int) -> None:
            for batch in range(20):
                sink.send(samples(first + 1000 * number + 50 * batch, 50, SIZE))
            sink.wait(HANG_TIMEOUT_S)

        with running(*[lambda number=number: send(number) for number in range(4)]) as outcomes:  # type: ignore[misc]
            pass
        assert outcomes == [None] * 4
    check_stored(learner, first, 4000)


def test_a_client_certificate_and_another_name(learner: Learner, certificates: Path) -> None:
    first = next(FIRST_NUMBERS)
    with Terminator(
        learner.port, str(certificates / "elsewhere.pem"), client_ca=str(certificates / "ca.pem")
    ) as terminator:
        own = TLS(certificates / "ca.pem", certificates / "client.pem", server_name="other.example")
        with sink_to(terminator.port, own) as sink:
            sink.send(samples(first, 64, SIZE))
    check_stored(learner, first, 64)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_may_be_for_a_name_or_an_address(terminator: Terminator, tls: TLS, host: str) -> None:
    with TcpClient(host, terminator.port, example(SIZE), tls=tls) as client:
        client.wait(HANG_TIMEOUT_S)


# Connections that are lost.


def test_nothing_is_lost_over_connections_that_are_cut(
    learner: Learner, terminator: Terminator, tls: TLS, descriptors: None
) -> None:
    first = next(FIRST_NUMBERS)
    count = 0
    with sink_to(terminator.port, tls, max_inflight_msgs=64, resend_acked=8) as sink:
        for cut in range(6):
            for _ in range(5):
                sink.send(samples(first + count, 200, SIZE))
                count += 200
            assert terminator.cut(abort=cut % 2 == 0)
            eventually(lambda: sink.stats().reconnects == cut + 1)  # noqa: B023
        sink.wait(HANG_TIMEOUT_S)
        stats = sink.stats()
    assert stats.samples_acked == count
    check_stored(learner, first, count)


def test_nothing_is_lost_over_connections_that_are_cut_anywhere(
    learner: Learner, terminator: Terminator, tls: TLS, descriptors: None
) -> None:
    """In the middle of a handshake, of a record, of what ends a connection."""
    first = next(FIRST_NUMBERS)
    count, cuts = 0, 8
    with Cutter(terminator.port, most_bytes=1 << 16, most_acks=1 << 15) as cutter:
        cutter.cut_at_random(cuts)
        with sink_to(cutter.port, tls, max_inflight_msgs=64, resend_acked=8, buffer_bytes=500 * SIZE) as sink:
            while cutter.counts()["cuts"] < cuts:
                sink.send(samples(first + count, 200, SIZE))
                count += 200
            sink.wait(HANG_TIMEOUT_S)
            stats = sink.stats()
    assert stats.samples_acked == count
    assert stats.reconnects > 0
    check_stored(learner, first, count)


def test_a_terminator_that_starts_again(learner: Learner, certificates: Path, tls: TLS) -> None:
    first = next(FIRST_NUMBERS)
    cert = str(certificates / "server.pem")
    with Terminator(learner.port, cert) as terminator:
        sink = sink_to(terminator.port, tls).connect()
        sink.send(samples(first, 64, SIZE))
        sink.wait(HANG_TIMEOUT_S)
        terminator.kill()
        sink.send(samples(first + 64, 64, SIZE))
    with Terminator(learner.port, cert, port=terminator.port):
        sink.wait(HANG_TIMEOUT_S)
        sink.close()
    check_stored(learner, first, 128)


def test_a_learner_that_starts_after_its_terminator(certificates: Path, tls: TLS) -> None:
    """Until then the terminator accepts and hangs up."""

    def script(conn: PeerConnection) -> None:
        conn.send_handshake(example(SIZE))
        conn.receive_all()

    with Peer(script) as peer, Terminator(peer.port, str(certificates / "server.pem")) as terminator:
        peer.refuse()
        with running(lambda: client_to(terminator.port, tls, retry_refused=True).close()) as outcomes:
            eventually(lambda: len(terminator.versions()) > 1)
            peer.listen()
        assert outcomes == [None]
        peer.refuse()
        with pytest.raises(ConnectionClosedError, match="closed the connection during the handshake, after 0 bytes"):
            client_to(terminator.port, tls)


def test_a_changed_certificate_ends_reconnecting(certificates: Path, tls: TLS, learner: Learner) -> None:
    with Terminator(learner.port, str(certificates / "server.pem")) as terminator:
        client = client_to(terminator.port, tls, reconnect=HANG_TIMEOUT_S)
        terminator.kill()
        client.send({name: leaf[0] for name, leaf in samples(next(FIRST_NUMBERS), 1, SIZE).items()})
    with (
        Terminator(learner.port, str(certificates / "strange.pem"), port=terminator.port),
        pytest.raises(ConnectionClosedError, match=r"connection lost: .*; .*its certificate was not issued by a CA"),
    ):
        client.wait(HANG_TIMEOUT_S)
    client.close()


def test_files_that_are_being_replaced_do_not_end_reconnecting(
    certificates: Path, tmp_path: Path, learner: Learner
) -> None:
    """As renewers do: a CA that is empty, then missing; a new certificate beside the old key."""
    first = next(FIRST_NUMBERS)
    ca, cert, key = tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem"
    whole = {
        ca: (certificates / "ca.pem").read_bytes(),
        cert: (certificates / "client.pem").read_bytes(),
        key: (certificates / "client.pem").read_bytes(),
    }
    broken = [(ca, b""), (ca, None), (cert, (certificates / "strange_client.pem").read_bytes()), (key, b"")]
    for path, text in whole.items():
        path.write_bytes(text)
    server = str(certificates / "server.pem")
    with Terminator(learner.port, server) as terminator:
        sink = sink_to(terminator.port, TLS(ca, cert, key), reconnect=HANG_TIMEOUT_S).connect()
        sink.send(samples(first, 64, SIZE))
        sink.wait(HANG_TIMEOUT_S)
        terminator.kill()
        sink.send(samples(first + 64, 64, SIZE))
    with Terminator(learner.port, server, port=terminator.port):
        for path, text in broken:
            # Break the next before the last is whole again: there is no moment when a try could succeed.
            path.unlink() if text is None else path.write_bytes(text)
            for other in whole.keys() - {path}:
                other.write_bytes(whole[other])
            with pytest.raises(DeliveryTimeoutError, match="is being opened again"):
                sink.wait(SHORT_TIMEOUT_S)
        path.write_bytes(whole[path])
        sink.wait(HANG_TIMEOUT_S)
        sink.close()
    check_stored(learner, first, 128)


def test_files_that_stay_broken_are_named_when_the_time_is_up(
    certificates: Path, tmp_path: Path, learner: Learner
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes((certificates / "ca.pem").read_bytes())
    server = str(certificates / "server.pem")
    with Terminator(learner.port, server) as terminator:
        client = client_to(terminator.port, TLS(ca), reconnect=2.0)
        ca.write_bytes(b"")
        terminator.kill()
    with Terminator(learner.port, server, port=terminator.port):
        client.send({name: leaf[0] for name, leaf in samples(next(FIRST_NUMBERS), 1, SIZE).items()})
        with pytest.raises(ConnectionClosedError, match=rf"connection lost: .*ca_file {ca}: no certificate in PEM"):
            client.wait(HANG_TIMEOUT_S)
        client.close()


@pytest.mark.parametrize("orderly", [True, False])
def test_a_peer_that_closes_is_noticed_at_once(certificates: Path, tls: TLS, orderly: bool) -> None:
    def leave(conn: PeerConnection) -> None:
        conn.send_handshake(example(SIZE))
        conn.receive(SIZE)
        if orderly:
            with contextlib.suppress(ssl.SSLZeroReturnError):
                conn.sock.unwrap()  # type: ignore[attr-defined]
        else:
            conn.close()

    with Peer(tls_script(leave, certificates)) as peer, client_to(peer.port, tls) as client:
        client.send({name: leaf[0] for name, leaf in samples(0, 1, SIZE).items()})
        with pytest.raises(ConnectionClosedError, match=r"(?s)the peer closed the connection.*1 samples un-acked"):
            client.wait(HANG_TIMEOUT_S)


def test_the_peer_receives_close_notify(certificates: Path, tls: TLS) -> None:
    """A proxy could not tell it from a cut otherwise, and may reset its connection to the learner."""
    received = []

    def listen(conn: PeerConnection) -> None:
        conn.send_handshake(example(SIZE))
        received.append(conn.sock.recv(1))  # raises if the end is not told

    with Peer(tls_script(listen, certificates)) as peer:
        client_to(peer.port, tls).close()
        eventually(lambda: received == [b""])


def tls_script(script: Script, certificates: Path, name: str = "server") -> Script:
    """The script of a peer that speaks TLS, in this process."""
    context = server_context(str(certificates / f"{name}.pem"))

    def run(conn: PeerConnection) -> None:
        conn.sock = context.wrap_socket(conn.sock, server_side=True, suppress_ragged_eofs=False)
        script(conn)

    return run


# What is refused.


def handshake_script(certificates: Path, name: str, **options: Any) -> Script:
    """A peer that speaks TLS and is not meant to get far."""
    context = server_context(str(certificates / f"{name}.pem"), **options)

    def run(conn: PeerConnection) -> None:
        try:
            conn.sock = context.wrap_socket(conn.sock, server_side=True)
        except (ssl.SSLError, ConnectionError):
            conn.close()

    return run


def test_certificates_that_are_refused(certificates: Path, tls: TLS, descriptors: None) -> None:
    ca = certificates / "ca.pem"
    cases = {
        "strange": f"its certificate was not issued by a CA that is in ca_file {ca} (",
        "elsewhere": "its certificate is for other.example, 10.0.0.5, and not for '127.0.0.1'; connect to that, or ",
        "expired": "its certificate, or that of its CA, has expired",
        "later": "its certificate is not valid yet; is the clock of one of the machines wrong?",
    }
    for name, words in cases.items():
        with Peer(handshake_script(certificates, name)) as peer:
            with pytest.raises(CertificateError) as caught:
                client_to(peer.port, tls)
            assert str(caught.value).startswith(f"127.0.0.1:{peer.port}: {words}")


def tls_alert(description: int) -> bytes:
    """A record of TLS that says that the handshake has failed, and why, as RFC 8446 numbers it."""
    return bytes((21, 3, 3, 0, 2, 2, description))


def test_the_system_cas_are_trusted_by_default(terminator: Terminator) -> None:
    with pytest.raises(CertificateError, match="not issued by a CA that the operating system trusts"):
        client_to(terminator.port, TLS())


@pytest.mark.parametrize("most", ["TLSv1_2", "TLSv1_3"])
def test_a_server_that_requires_a_client_certificate(certificates: Path, tls: TLS, most: str) -> None:
    """Of TLS 1.3, it says so only after the handshake."""
    options = {"client_ca": str(certificates / "ca.pem"), "most": most}
    with Peer(handshake_script(certificates, "server", **options)) as peer:
        with pytest.raises(
            HandshakeError, match=r"127\.0\.0\.1:\d+: .* client certificate[;:] give cert_file and key_"
        ):
            client_to(peer.port, tls)
        with pytest.raises(
            CertificateError, match=r"the server refuses the client certificate of cert_file .*strange_"
        ):
            client_to(peer.port, TLS(tls.ca_file, certificates / "strange_client.pem"))


def test_a_server_without_tls(learner: Learner, tls: TLS) -> None:
    """It is told by its greeting, before anything that it would take for samples is sent."""
    first = next(FIRST_NUMBERS)
    with pytest.raises(HandshakeError, match="it is a plain echo server; leave out tls="):
        client_to(learner.port, tls)
    check_stored(learner, first, 0)


class DistantTlsSocket(TlsSocket):
    """One whose peer is a quarter of a second away, as Linux has it in struct tcp_info."""

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        if (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO):
            return struct.pack("=68xI", 250_000).ljust(size, b"\0")
        return super().getsockopt(level, option, size)


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="nobody knows how far it is")
def test_a_server_without_tls_that_is_far_away(tls: TLS) -> None:
    """Its greeting is waited for as long as it may be on the way."""
    received = []

    def script(conn: PeerConnection) -> None:
        if select.select([conn.sock], [], [], SHORT_TIMEOUT_S)[0]:
            received.append(conn.sock.recv(1))
        conn.send_handshake(example(SIZE))
        conn.receive_all()

    deadline = Deadline(HANG_TIMEOUT_S)
    with Peer(script) as peer:
        address = (socket.AF_INET, ("127.0.0.1", peer.port))
        with connect([address], "it", deadline, DistantTlsSocket) as sock:
            assert isinstance(sock, DistantTlsSocket)
            with pytest.raises(HandshakeError, match="it is a plain echo server; leave out tls="):
                do_tls_handshake(sock, tls, "127.0.0.1", "it", deadline)
    assert not received


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", b"", "the server speaks no TLS: it begins with b'SSH-'"),
        (
            b"",
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "the server speaks no TLS; if it is a plain echo server, leave out ",
        ),
        (b"", greeting(example(SIZE)), "the server speaks no TLS; if it is a plain echo server, leave out tls="),
        (b"", tls_alert(70), "the server speaks no TLS 1.2 or later ("),
    ],
)
def test_servers_of_other_protocols(tls: TLS, before: bytes, after: bytes, words: str) -> None:
    def script(conn: PeerConnection) -> None:
        conn.send(before)
        if after:
            conn.receive(5)
            conn.send(after)
        conn.receive_all()

    with Peer(script) as peer, pytest.raises(HandshakeError) as caught:
        client_to(peer.port, tls)
    assert type(caught.value) is HandshakeError
    assert str(caught.value).startswith(f"127.0.0.1:{peer.port}: {words}")


@pytest.mark.parametrize("last_words", [b"", tls_alert(80)], ids=["none", "internal_error"])
def test_a_server_that_closes_during_the_handshake_may_be_retried(tls: TLS, last_words: bytes) -> None:
    def script(conn: PeerConnection) -> None:
        conn.receive(5)
        conn.send(last_words)
        conn.close()

    with Peer(script) as peer, pytest.raises(ConnectionClosedError, match=r"broke .* off during the TLS handshake"):
        client_to(peer.port, tls)


def test_an_old_version_of_tls(certificates: Path, tls: TLS) -> None:
    """The system's OpenSSL may not even serve it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert tls.context().minimum_version == ssl.TLSVersion.TLSv1_2
    assert tls.context().verify_mode == context.verify_mode == ssl.CERT_REQUIRED
    assert tls.context().check_hostname


# Time.


def stay_silent(conn: PeerConnection) -> None:
    conn.receive_all()


def send_slowly(conn: PeerConnection) -> None:
    """The header of a record, and then as little of it as can be, until the client has left."""
    conn.receive(5)
    conn.send(b"\x16\x03\x03\x40\x00")
    while True:
        conn.send(b"\0")
        time.sleep(0.02)


@pytest.mark.parametrize("script", [stay_silent, send_slowly])
def test_a_handshake_that_stalls_ends_with_connect_timeout(tls: TLS, script: Script) -> None:
    with Peer(script) as peer:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"TLS handshake not complete within 0\.3 s"):
            client_to(peer.port, tls, connect_timeout=SHORT_TIMEOUT_S)
        assert SHORT_TIMEOUT_S - 0.02 <= time.monotonic() - began < HANG_TIMEOUT_S


def test_reading_the_names_of_a_wrong_certificate_does_not_block(certificates: Path, tls: TLS) -> None:
    """For that takes another connection, where the server may say nothing, and the error is known."""
    scripts = Scripts(handshake_script(certificates, "elsewhere"), stay_silent)
    with (
        Peer(scripts) as peer,
        running(lambda: client_to(peer.port, tls, connect_timeout=None)) as outcomes,
    ):
        pass
    assert isinstance(outcomes[0], CertificateError)
    assert "its certificate is for others, and not for '127.0.0.1'" in str(outcomes[0])


def test_a_greeting_that_never_arrives_times_out() -> None:
    """As records of TLS that hold nothing, of which there may always be one more."""

    class NeverReadable(socket.socket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            raise BlockingIOError

    deadline = Deadline(SHORT_TIMEOUT_S)
    with Peer(lambda conn: conn.send(b"more")) as peer:
        address = (socket.AF_INET, ("127.0.0.1", peer.port))
        with (
            connect([address], "it", deadline, NeverReadable) as sock,
            running(lambda: do_handshake(sock, "it", deadline)) as outcomes,
        ):
            pass
    assert isinstance(outcomes[0], TimeoutError)


def test_undecrypted_bytes_are_not_read_without_limit(tls: TLS) -> None:
    """It waits in the kernel, whose memory has a bound."""
    said = 1 << 20
    deadline = Deadline(HANG_TIMEOUT_S)

    def script(conn: PeerConnection) -> None:
        conn.send(bytes(said))
        conn.close()

    with Peer(script) as peer:
        address = (socket.AF_INET, ("127.0.0.1", peer.port))
        with connect([address], "it", deadline, TlsSocket) as sock:
            assert isinstance(sock, TlsSocket)
            sock.init_tls(tls.context(), "127.0.0.1", tls)
            for _ in range(100):
                assert wait_ready(sock, select.POLLIN, deadline)
                sock.receive_encrypted()
            left = 0
            while wait_ready(sock, select.POLLIN, deadline) and (piece := socket.socket.recv(sock, said)):
                left += len(piece)
    assert said - left < 1 << 18


def test_a_stalled_handshake_can_be_cancelled(certificates: Path, tls: TLS, descriptors: None) -> None:
    """Here by closing a client that reconnects."""
    stalling = Gate()

    def first(conn: PeerConnection) -> None:
        tls_script(lambda conn: conn.send_handshake(example(SIZE)), certificates)(conn)
        conn.close()

    def later(conn: PeerConnection) -> None:
        stalling.open()
        conn.receive_all()

    scripts = iter([first])
    with Peer(lambda conn: next(scripts, later)(conn)) as peer:
        client = client_to(peer.port, tls, reconnect=600.0, connect_timeout=None)
        client.send({name: leaf[0] for name, leaf in samples(0, 1, SIZE).items()})
        stalling.wait()
        began = time.monotonic()
        with pytest.raises((ConnectionClosedError, DeliveryTimeoutError)):
            client.close(timeout=0)
        assert time.monotonic() - began < HANG_TIMEOUT_S


def test_a_plain_client_of_a_tls_server_gets_a_hint(terminator: Terminator) -> None:
    with pytest.raises(TimeoutError, match="got 0 bytes of it; if that server expects TLS, give tls="):
        client_to(terminator.port, None, connect_timeout=SHORT_TIMEOUT_S)


def cpu_while_waiting(seconds: float) -> float:
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


def test_no_busy_loop_while_nothing_moves(learner: Learner, terminator: Terminator, tls: TLS) -> None:
    """Idle, and with the window full."""
    first = next(FIRST_NUMBERS)
    with sink_to(terminator.port, tls, max_inflight_msgs=64) as sink:
        assert cpu_while_waiting(0.3) < 0.12
        terminator.stall()
        sink.send(samples(first, 1000, SIZE))
        assert cpu_while_waiting(0.3) < 0.12
        terminator.resume()
        sink.wait(HANG_TIMEOUT_S)
    check_stored(learner, first, 1000)


def test_no_busy_loop_while_the_socket_is_full(certificates: Path, tls: TLS) -> None:
    """Of what is sealed; rows are larger than one seal here."""
    going = Gate()
    rows = np.random.default_rng(0).integers(0, 256, (32, 1 << 20), np.uint8)

    def script(conn: PeerConnection) -> None:
        conn.send_handshake(rows[0])
        going.wait()
        conn.receive(rows.nbytes)
        conn.ack(32)
        conn.receive_all()

    peer = Peer(tls_script(script, certificates), receive_buffer=64 * 1024)
    with peer, TcpClient("127.0.0.1", peer.port, rows[0], 64, tls=tls) as client:
        client.send_rows([rows])
        eventually(lambda: cpu_while_waiting(0.1) < 0.03)  # all is full by then
        assert cpu_while_waiting(0.3) < 0.12
        going.open()
        client.wait(HANG_TIMEOUT_S)
        assert peer.connections[0].received == rows.tobytes()


# Floods: the peer is not trusted.


def records_script(
    script: Callable[[PeerConnection, ServerRecords, socket.socket], None], certificates: Path, folder: Path
) -> Script:
    """The script of a peer that makes its records by hand, and sends them by the socket below TLS."""
    context = server_context(str(certificates / "server.pem"))
    secrets = folder / "secrets"
    log_secrets(context, secrets)

    def run(conn: PeerConnection) -> None:
        conn.sock = context.wrap_socket(conn.sock, server_side=True)
        with socket.socket(fileno=os.dup(conn.sock.fileno())) as plain:
            plain.settimeout(HANG_TIMEOUT_S)
            script(conn, ServerRecords(secrets), plain)

    return run


def flood(_: PeerConnection, records: ServerRecords, plain: socket.socket) -> None:
    """Key updates without end, and no answer is read."""
    while True:
        plain.sendall(b"".join(records.key_update() for _ in range(100)))


def bytes_without_data(error: Exception) -> int:
    found = re.search(r"the peer sent (\d+) bytes of TLS records without data", str(error))
    assert found, error
    return int(found[1])


def test_a_flood_of_key_updates_ends_the_connection(
    certificates: Path, tls: TLS, tmp_path: Path, descriptors: None
) -> None:
    """Nothing that waits for acks waits longer, and no more is held in memory than what was received."""

    def script(conn: PeerConnection, records: ServerRecords, plain: socket.socket) -> None:
        plain.sendall(records.data(greeting(example(SIZE))))
        conn.receive(SIZE)
        flood(conn, records, plain)

    with Peer(records_script(script, certificates, tmp_path)) as peer:
        client = client_to(peer.port, tls)
        client.send({name: leaf[0] for name, leaf in samples(0, 1, SIZE).items()})
        with pytest.raises(ConnectionClosedError) as caught:
            client.wait(HANG_TIMEOUT_S)
        assert 0 < bytes_without_data(caught.value) - MAX_BYTES_WITHOUT_DATA <= 1 << 16
        assert caught.value.unacked == 1
        began = time.monotonic()
        client.close()
        assert time.monotonic() - began < HANG_TIMEOUT_S / 2


def test_a_flood_of_key_updates_does_not_hold_up_close(certificates: Path, tls: TLS, tmp_path: Path) -> None:
    """Of a client that has nothing to read, and so reads nothing of it."""

    def script(conn: PeerConnection, records: ServerRecords, plain: socket.socket) -> None:
        plain.sendall(records.data(greeting(example(SIZE))))
        flood(conn, records, plain)

    with Peer(records_script(script, certificates, tmp_path)) as peer:
        client = client_to(peer.port, tls)
        began = time.monotonic()
        client.close()
        assert time.monotonic() - began < HANG_TIMEOUT_S / 2


def test_a_flood_of_key_updates_in_place_of_a_greeting(
    certificates: Path, tls: TLS, tmp_path: Path, descriptors: None
) -> None:
    with Peer(records_script(flood, certificates, tmp_path)) as peer:
        with pytest.raises(ConnectionClosedError, match="broke the connection off during the handshake: ") as caught:
            client_to(peer.port, tls, connect_timeout=HANG_TIMEOUT_S)
        assert 0 < bytes_without_data(caught.value) - MAX_BYTES_WITHOUT_DATA <= 1 << 16


def test_key_updates_between_acks_are_answered(certificates: Path, tls: TLS, tmp_path: Path) -> None:
    """However many, as long as there are acks: this is more than a flood may be."""
    rounds, updates = 12, 1000

    def script(conn: PeerConnection, records: ServerRecords, plain: socket.socket) -> None:
        plain.sendall(records.data(greeting(example(SIZE))))
        for _ in range(rounds):
            conn.receive(SIZE)
            plain.sendall(b"".join(records.key_update() for _ in range(updates)) + records.data(ACK))
        conn.receive_all()

    assert rounds * updates * 27 > MAX_BYTES_WITHOUT_DATA
    with Peer(records_script(script, certificates, tmp_path)) as peer, client_to(peer.port, tls) as client:
        sent = samples(0, rounds, SIZE)
        for number in range(rounds):
            client.send({name: leaf[number] for name, leaf in sent.items()})
            client.wait(HANG_TIMEOUT_S)
    assert peer.connections[0].received == b"".join(
        leaf[number].tobytes() for number in range(rounds) for leaf in optree.tree_leaves(sent)
    )


def test_answers_that_the_peer_does_not_read_are_bounded(certificates: Path, tls: TLS, tmp_path: Path) -> None:
    """There is data between its key updates, so only the answers count; here, nothing sends them."""

    def script(_: PeerConnection, records: ServerRecords, plain: socket.socket) -> None:
        while True:
            plain.sendall(b"".join(records.key_update() for _ in range(5000)) + records.data(ACK))

    deadline = Deadline(HANG_TIMEOUT_S)
    with Peer(records_script(script, certificates, tmp_path)) as peer:
        address = (socket.AF_INET, ("127.0.0.1", peer.port))
        with connect([address], "it", deadline, TlsSocket) as sock:
            assert isinstance(sock, TlsSocket)
            do_tls_handshake(sock, tls, "127.0.0.1", "it", deadline)
            with pytest.raises(ConnectionClosedError, match="bytes of TLS records unread"):
                read_without_flushing(sock, deadline)
            assert 0 < sock.outgoing_pending - MAX_UNFLUSHED_BYTES <= 1 << 17


def read_without_flushing(sock: TlsSocket, deadline: Deadline) -> None:
    acks = bytearray(16)
    while wait_ready(sock, select.POLLIN, deadline):
        sock.receive_encrypted()
        with contextlib.suppress(ssl.SSLWantReadError):
            while sock.decrypt_into(acks):
                pass


# Processes.


def send_from(sink: EchoSink, first: int) -> None:
    sink.send(samples(first, 64, SIZE))
    sink.close()
    del sink
    gc.collect()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_open_their_own_connections(
    learner: Learner, terminator: Terminator, tls: TLS, method: str
) -> None:
    """And say nothing on that of their parent, not even that it ends."""
    first = next(FIRST_NUMBERS)
    with sink_to(terminator.port, tls) as sink:
        sink.send(samples(first, 64, SIZE))
        before = len(terminator.versions())
        child = multiprocessing.get_context(method).Process(target=send_from, args=(sink, first + 64))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        sink.send(samples(first + 128, 64, SIZE))
        sink.wait(HANG_TIMEOUT_S)
        assert sink.stats().reconnects == 0
    assert len(terminator.versions()) == before + 1
    check_stored(learner, first, 192)


class NumberedDataset:
    def __init__(self, first: int) -> None:
        self.first = first

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: leaf[0] for name, leaf in samples(self.first + index, 1, SIZE).items()}


def test_workers_of_a_loader(learner: Learner, terminator: Terminator, tls: TLS) -> None:
    first = next(FIRST_NUMBERS)
    with sink_to(terminator.port, tls) as sink:
        dataset: Any = NumberedDataset(first)
        for _ in DataLoader(dataset, 32, num_workers=2, collate_fn=sink.collate(), multiprocessing_context="fork"):
            pass
        sink.wait(HANG_TIMEOUT_S)
        assert sink.stats().samples_acked == 256
    check_stored(learner, first, 256)


# What it is told.


def test_tls_is_a_value(tmp_path: Path) -> None:
    tls = TLS(tmp_path / "ca.pem", "cert.pem", "key.pem", "learner")
    assert pickle.loads(pickle.dumps(tls)) == tls
    with pytest.raises(AttributeError):
        tls.ca_file = None  # type: ignore[misc]
    sink = EchoSink("127.0.0.1", 1, example(SIZE), tls=tls)
    assert isinstance(pickle.loads(pickle.dumps(sink)), EchoSink)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ca_file": 3}, TypeError, "ca_file: got 3, expected a path"),
        ({"server_name": b"learner"}, TypeError, "server_name: got b'learner', expected a name"),
        ({"server_name": ""}, ValueError, "server_name: got '', expected None or something"),
        ({"key_file": "key.pem"}, ValueError, "key_file: got one without a cert_file"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        TLS(**options)
    assert str(caught.value) == words


@pytest.mark.parametrize("make", [client_to, sink_to])
def test_the_tls_argument_must_be_a_tls(make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="tls: got True, expected None or a TLS, such as"):
        make(1, True)


def test_tls_requires_tcp_client(tls: TLS) -> None:
    with pytest.raises(ValueError, match="tls: only TcpClient has it"):
        sink_to(1, tls, client=lambda *_: None)


def test_bad_certificate_files(terminator: Terminator, certificates: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    ca, client, none = certificates / "ca.pem", certificates / "client.pem", tmp_path / "none.pem"
    text, locked = tmp_path / "text.pem", tmp_path / "locked.pem"
    text.write_text("hello")
    key = serialization.load_pem_private_key(client.read_bytes(), None)
    lock = serialization.BestAvailableEncryption(b"secret")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    locked.write_bytes(pem)
    cases = [
        (TLS(none), f"ca_file {none}: No such file or directory"),
        (TLS(text), f"ca_file {text}: no certificate in PEM"),
        (TLS(ca, none), f"cert_file {none}: No such file or directory"),
        (TLS(ca, client, none), f"key_file {none}: No such file or directory"),
        (TLS(ca, text), f"cert_file {text}: not a certificate and its private key in PEM"),
        (TLS(ca, client, certificates / "strange_client.pem"), "the key is not that of the certificate"),
        (TLS(ca, client, locked), "the key needs a passphrase; give one that needs none"),
    ]
    for tls, words in cases:
        with pytest.raises(CertificateError) as caught:
            client_to(terminator.port, tls)
        assert str(caught.value).startswith(f"127.0.0.1:{terminator.port}: ")
        assert words in str(caught.value)
        assert str(type(caught.value)(str(caught.value))) == str(caught.value)


# The command line.


def test_doctor_and_bench(terminator: Terminator, certificates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer, ca = f"127.0.0.1:{terminator.port}", str(certificates / "ca.pem")
    assert main(["doctor", peer, "--tls-ca", ca]) == 0
    out = capsys.readouterr().out
    assert "TLSv1.3, with a certificate for localhost, 127.0.0.1\n" in out
    assert f"OK: {peer} takes samples" in out
    assert main(["bench", peer, "--tls-ca", ca, "--seconds", "0.1"]) == 0
    assert "all acknowledged" in capsys.readouterr().out


def test_doctor_says_what_is_wrong(
    terminator: Terminator, learner: Learner, certificates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer, plain, ca = f"127.0.0.1:{terminator.port}", f"127.0.0.1:{learner.port}", str(certificates / "ca.pem")
    speaks_first = "no echo server: it waits for its client to speak first, as HTTP servers do, and proxies with TLS"
    cases = [
        ([peer, "--timeout", "0.3"], f"{peer}: {speaks_first}; check the port, or give --tls-ca"),
        ([peer, "--tls"], f"{peer}: its certificate was not issued by a CA that the operating system trusts"),
        ([peer, "--tls-ca", ca, "--tls-name", "learner"], f"{peer}: its certificate is for localhost, 127.0.0.1, and "),
        ([plain, "--tls-ca", ca], f"{plain}: the server speaks no TLS: it is a plain echo server; leave out tls="),
        ([peer, "--tls-key", ca], "--tls-*: key_file: got one without a cert_file"),
    ]
    for arguments, words in cases:
        assert main(["doctor", *arguments]) == 1
        assert capsys.readouterr().err.startswith(f"FAILED: {words}")
