"""Life and death of processes: import, interpreter exit, fork, spawn.

Each case runs a small program in an interpreter of its own against a peer in this one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from peers import Peer, PeerConnection

SAMPLE = {"id": np.zeros((), np.int64)}
SIZE = 8
HELPERS = Path(__file__).parents[1] / "helpers"
LIMIT_S = 60.0
PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
from echo_torch import ConnectionClosedError, EchoSink, TcpClient
port = int(sys.argv[1])
SAMPLE = {"id": np.zeros((), np.int64)}
def sample(number):
    return {"id": np.array(number, np.int64)}
"""


def run(program: str, port: int) -> str:
    """Run a program, given as text, that sends to ``port``."""
    return execute(["-c", PRELUDE + textwrap.dedent(program), str(port)])


def execute(arguments: list[str]) -> str:
    """Run Python and give what it printed; it must end with exit code 0 and say nothing on stderr."""
    command = [sys.executable, "-W", "error", "-W", "ignore:.*fork:DeprecationWarning", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, err
    assert not err
    return out


def numbers(conn: PeerConnection) -> list[int]:
    return np.frombuffer(bytes(conn.received), np.int64).tolist()


def acking(conn: PeerConnection) -> None:
    conn.send_handshake(SAMPLE)
    conn.receive_all(ack_every=SIZE)


def test_import_loads_no_server_no_trainer_and_starts_nothing() -> None:
    out = execute(
        [
            "-c",
            textwrap.dedent("""
    import sys, threading
    import torch
    import echo_torch
    heavy = "echo lightning pytorch_lightning transformers accelerate ignite stable_baselines3 torchrl ray"
    heavy += " tensordict tokenizers"
    print([name for name in heavy.split() if name in sys.modules], threading.active_count())
    """),
        ]
    )
    assert out == "[] 1\n"


def test_interpreter_exit_delivers_what_is_in_flight() -> None:
    """Neither closed nor waited for: the program just ends, with more packed than the window lets out."""
    with Peer(acking) as peer:
        run(
            """
            client = TcpClient("127.0.0.1", port, SAMPLE, 4, buffer_bytes=80_000)
            client.send_rows([np.arange(5000)])
            """,
            peer.port,
        )
        assert numbers(peer.connections[0]) == list(range(5000))


def test_interpreter_exit_is_bounded_and_says_what_is_left() -> None:
    def silent(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive_all()

    with Peer(silent) as peer:
        out = run(
            """
            import logging
            logging.basicConfig(stream=sys.stdout)
            client = TcpClient("127.0.0.1", port, SAMPLE)
            client.send(sample(1))
            """,
            peer.port,
        )
    assert f"127.0.0.1:{peer.port}: ended with 1 samples un-acked" in out


@pytest.mark.slow
def test_interpreter_exit_with_one_peer_that_stalls_delivers_to_all_others() -> None:
    """And their tails: none has to wait for the time that another takes in vain."""

    def silent(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive_all()

    def steady(conn: PeerConnection) -> None:
        """Takes a second for everything, so that nothing of it was done before the exit."""
        conn.send_handshake(SAMPLE)
        conn.receive(SIZE)
        for _ in range(10):
            time.sleep(0.1)
            conn.ack()
            conn.receive(SIZE)
        conn.ack()
        conn.receive_all(ack_every=SIZE)

    with Peer(silent) as stalled, Peer(steady) as healthy:
        began = time.monotonic()
        out = run(
            f"""
            import logging
            logging.basicConfig(stream=sys.stdout)
            def sink(port):
                return EchoSink("127.0.0.1", port, SAMPLE, max_inflight_msgs=1, resend_acked=3).connect()
            sinks = [sink(port), sink({healthy.port}), sink(port), sink({healthy.port}), sink({healthy.port})]
            for sink in sinks:
                sink.send({{"id": np.arange(200)}})
            """,
            stalled.port,
        )
        assert time.monotonic() - began < LIMIT_S / 2
        assert [numbers(conn) for conn in healthy.connections] == [[*range(200), 197, 198, 199]] * 3
    assert out.count("un-acked") == 2


def test_sys_exit_in_a_thread_harms_nothing() -> None:
    with Peer(acking) as peer:
        run(
            """
            client = TcpClient("127.0.0.1", port, SAMPLE)
            sink = EchoSink("127.0.0.1", port, SAMPLE, resend_at_close=False)
            def work(sender):
                sender.send(sample(0))
                sys.exit(3)
            for sender in (client, sink):
                thread = threading.Thread(target=work, args=(sender,))
                thread.start()
                thread.join()
                sender.send(sample(1))
                sender.close()
            """,
            peer.port,
        )
        assert [numbers(conn) for conn in peer.connections] == [[0, 1]] * 2


def test_a_forked_child_cannot_use_its_parents_client_and_leaves_it_alone() -> None:
    """The child sends, waits, closes, drops and exits; the parent goes on as if nothing had been."""
    with Peer(acking) as peer:
        out = run(
            """
            client = TcpClient("127.0.0.1", port, SAMPLE)
            client.send(sample(0))
            pid = os.fork()
            if pid == 0:
                for call in (lambda: client.send(sample(-1)), client.wait):
                    try:
                        call()
                    except ConnectionClosedError as error:
                        print("belongs" in str(error), flush=True)
                print(client.closed, flush=True)
                client.close()
                del client
                sys.exit(0)
            print(os.waitpid(pid, 0)[1], flush=True)
            for number in range(1, 100):
                client.send(sample(number))
            client.wait()
            client.close()
            """,
            peer.port,
        )
        assert out.split() == ["True", "True", "True", "0"]
        assert len(peer.connections) == 1
        assert numbers(peer.connections[0]) == list(range(100))


def test_fork_while_a_thread_connects_never_hangs_the_child() -> None:
    """The first lookup in a process may import what a child could then never import."""
    with Peer(acking) as peer:
        out = run(
            """
            importing, go = threading.Event(), threading.Event()
            class Late:
                def find_spec(self, name, path=None, target=None):
                    importing.set()
                    go.wait()
            sys.meta_path.insert(0, Late())
            thread = threading.Thread(target=lambda: TcpClient("127.0.0.1", port, SAMPLE).close())
            thread.start()
            importing.wait(0.5)
            pid = os.fork()
            if pid == 0:
                signal.alarm(10)
                sys.meta_path.pop(0)
                TcpClient("127.0.0.1", port, SAMPLE).close()
                os._exit(0)
            print(os.waitpid(pid, 0)[1])
            go.set()
            thread.join()
            """,
            peer.port,
        )
        assert out == "0\n"


def test_fork_while_threads_send_never_hangs_the_child() -> None:
    """Forks at random moments, with locks held by threads that the child does not have."""
    with Peer(acking) as peer:
        out = run(
            """
            client = TcpClient("127.0.0.1", port, SAMPLE, 8)
            sink = EchoSink("127.0.0.1", port, SAMPLE, resend_at_close=False).connect()
            stop = threading.Event()
            sent = [0, 0]
            def work(index, send):
                while not stop.is_set():
                    send(sample(sent[index]))
                    sent[index] += 1
            threads = [threading.Thread(target=work, args=(0, client.send)),
                       threading.Thread(target=work, args=(1, sink.send))]
            for thread in threads:
                thread.start()
            status = []
            for number in range(25):
                pid = os.fork()
                if pid == 0:
                    signal.alarm(20)
                    try:
                        client.send(sample(-1))
                    except ConnectionClosedError:
                        pass
                    client.close()
                    sink.send(sample(1_000_000 + number))
                    sink.close()
                    os._exit(0)
                status.append(os.waitpid(pid, 0)[1])
            stop.set()
            for thread in threads:
                thread.join()
            client.close()
            sink.close()
            print(status == [0] * 25, sent[0], sent[1])
            """,
            peer.port,
        )
        right, from_client, from_sink = out.split()
        assert right == "True"
        assert numbers(peer.connections[0]) == list(range(int(from_client)))
        assert numbers(peer.connections[1]) == list(range(int(from_sink)))
        children = sorted(numbers(conn) for conn in peer.connections[2:])
        assert children == [[1_000_000 + number] for number in range(25)]


@pytest.mark.slow
def test_forks_among_large_samples_tear_none() -> None:
    """Of 4 MiB, each made of one number. Parent and child send at the same time; the children end in three ways."""
    words = 1 << 19
    received: list[list[int]] = []

    def check(conn: PeerConnection) -> None:
        conn.send_handshake({"x": np.zeros(words, np.int64)})
        mine: list[int] = []
        received.append(mine)
        while True:
            payload = np.frombuffer(conn.receive(words * 8), np.int64)
            conn.received.clear()
            assert (payload == payload[0]).all()
            mine.append(int(payload[0]))
            conn.ack()

    with Peer(check) as peer:
        out = run(
            """
            def big(number):
                return {"x": np.full(1 << 19, number)}
            client = TcpClient("127.0.0.1", port, big(0), 2)
            sink = EchoSink("127.0.0.1", port, big(0), resend_at_close=False).connect()
            def work(send, first):
                for number in range(first, first + 5):
                    send(big(number))
            status = []
            leave = [lambda: os._exit(0), sys.exit, lambda: os.kill(os.getpid(), signal.SIGKILL)]
            for index in range(3):
                threads = [threading.Thread(target=work, args=(sender.send, 5 * index)) for sender in (client, sink)]
                for thread in threads:
                    thread.start()
                pid = os.fork()
                if pid == 0:
                    signal.alarm(20)
                    try:
                        client.send(big(-1))
                    except ConnectionClosedError:
                        pass
                    for number in range(3):
                        sink.send(big(100 * (index + 1) + number))
                    sink.close()
                    leave[index]()
                status.append(os.waitpid(pid, 0)[1])
                for thread in threads:
                    thread.join()
            client.close()
            sink.close()
            print(status == [0, 0, signal.SIGKILL])
            """,
            peer.port,
        )
    assert out == "True\n"
    assert received[:2] == [list(range(15))] * 2
    assert received[2:] == [[100, 101, 102], [200, 201, 202], [300, 301, 302]]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def test_a_sink_sends_from_child_processes(method: str) -> None:
    """The sink travels as configuration, although connected; each process opens a connection of its own."""
    check_children(method, "close")


@pytest.mark.parametrize(
    ("method", "how"),
    [
        pytest.param("fork", "end", marks=pytest.mark.slow),
        ("fork", "drop"),
        pytest.param("forkserver", "end", marks=pytest.mark.slow),
        pytest.param("forkserver", "drop", marks=pytest.mark.slow),
        pytest.param("spawn", "end", marks=pytest.mark.slow),
    ],
)
def test_children_that_end_without_close_deliver_everything(method: str, how: str) -> None:
    """multiprocessing ends forked children without ``atexit``; far more is packed than the window lets out."""
    check_children(method, how)


def check_children(method: str, how: str) -> None:
    with Peer(acking) as peer:
        program = str(HELPERS / "children.py")
        assert execute([program, method, str(peer.port), how]) == "[0, 0]\n"
        received = sorted(numbers(conn) for conn in peer.connections)
    assert received == [list(range(first, first + 1000)) for first in (0, 1000, 2000)]
