"""The README's examples and commands run as they are written, but for ports, which the system picks."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from calls import Gate
from learner_process import Learner
from peers import Peer, PeerConnection

LIMIT_S = 60.0
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


LEARNER, TRAINER, LOOP, WORKERS, RAY, SIGTERM, SEVERAL, MODULE = blocks("python")


def with_port(program: str, port: int | str) -> str:
    assert program.count("50051") == 1
    return program.replace("50051", str(port))


@pytest.mark.parametrize(
    "trainer",
    [
        pytest.param(TRAINER, id="trainer"),
        pytest.param(LOOP, id="loop", marks=pytest.mark.slow),
        pytest.param(WORKERS, id="workers", marks=pytest.mark.slow),
    ],
)
def test_the_trainer_delivers_to_the_learner(trainer: str) -> None:
    learner = with_port(LEARNER, 0).replace("server.start()\n", "server.start()\nprint(server.port, flush=True)\n")
    learner += "        print(observation.shape, label.shape, flush=True)\n"
    with subprocess.Popen([sys.executable, "-c", learner], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            command = [sys.executable, "-W", "error", "-c", with_port(trainer, port)]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more would wait for each other, in steps this small
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=one_thread)
            assert (done.returncode, done.stderr) == (0, "")
            batches = [process.stdout.readline() for _ in range(30_000 // 256)]
            assert set(batches) == {"torch.Size([256, 4]) torch.Size([256])\n"}
        finally:
            process.kill()


SEND_TO_TWO = """
with sink:
    sink.send({"environment": torch.arange(7), "observation": torch.randn(7, 4)})
    sink.wait()
    print([learner.samples_acked for learner in sink.stats().peers], spare.peer)
"""


def test_two_learners_get_what_the_function_says() -> None:
    example = {"environment": np.zeros((), np.int64), "observation": np.zeros(4, np.float32)}
    with Learner(example) as one, Learner(example) as two:
        program = with_port(SEVERAL, one.port).replace("50052", str(two.port)) + SEND_TO_TWO
        command = [sys.executable, "-W", "error", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.stdout, done.stderr) == ("[4, 3] 10.0.0.1:50053, 10.0.0.2:50053\n", "")


LOADER = """
import torch
from echo_torch import EchoSink

dataset = [torch.zeros(1 << 17, dtype=torch.int64)]

def batches():
    for number in range(1000):
        print(number, flush=True)
        yield torch.full((1 << 17,), number)

loader = batches()
"""
IN_THE_BUFFER = 64 - 8
"""How many samples of 1 MiB a sink takes before `send` blocks, if nothing is acked; it keeps room for a tail."""


def test_sigterm_delivers_what_was_sent() -> None:
    """It comes when the buffer is full and `send` blocks."""
    ended = Gate()
    received: list[int] = []

    def learner(conn: PeerConnection) -> None:
        conn.send_handshake([np.zeros(1 << 17, np.int64)])
        ended.wait()
        while True:
            payload = np.frombuffer(conn.receive(1 << 20), np.int64)
            conn.received.clear()
            assert (payload == payload[0]).all()
            received.append(int(payload[0]))
            conn.ack()

    with Peer(learner) as peer:
        command = [sys.executable, "-W", "error", "-c", LOADER + with_port(SIGTERM, peer.port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                while int(process.stdout.readline()) < IN_THE_BUFFER:
                    pass
                process.send_signal(signal.SIGTERM)
                ended.open()
                _, err = process.communicate(timeout=LIMIT_S)
            finally:
                process.kill()
    assert (process.returncode, err) == (143, "")
    sent = len(received) - 8  # the tail is sent twice
    assert sent >= IN_THE_BUFFER
    assert received == [*range(sent), *range(sent - 8, sent)]


# Commands, and what they print.

WELL, DIFFERS, NO_ECHO, NOBODY, STOPPED, EXAMPLE, BENCH = blocks("console")


def test_everything_in_the_readme_is_of_a_kind_that_is_run() -> None:
    """But for four: the verdicts, which test_stats forces, a bar, which test_progress has drawn, the picture, and TLS.

    For that it takes stunnel, and the right to change a firewall.
    """
    fences = re.findall(r"^```(.*)$", README, re.MULTILINE)
    assert set(fences[::2]) == {"bash", "python", "console", "text"}
    assert set(fences[1::2]) == {""}
    assert (len(blocks("bash")), len(blocks("text"))) == (1, 4)


@contextlib.contextmanager
def started(*command: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], str]]]:
    """A program of Python's, and what waits for a line that it prints, and gives the group that was found in it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, **pipes) as process:  # type: ignore[call-overload]

        def wait_for_output(pattern: str) -> str:
            for line in process.stdout:
                if found := re.search(pattern, line):
                    return found[1]
            raise AssertionError(f"{command} ended with {process.wait()} before it said {pattern!r}")

        try:
            yield process, wait_for_output
        finally:
            process.kill()  # also one that is stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current directory of the commands, with the README's module."""
    path = tmp_path_factory.mktemp("commands")
    (path / "mymodule.py").write_text(MODULE)
    return path


SERVE = shlex.split(next(iter(re.findall(r"`python (-m echo_torch serve [^`]*)`", README))))
HTTP = shlex.split(next(iter(re.findall(r"`python (-m http.server) 8080`", README))))


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[str]:
    """Of a learner that is started as the README says."""
    with started(*SERVE, "--port", "0", folder=folder) as (_, wait_for_output):
        yield wait_for_output(r"port (\d+)")


def shown(text: str) -> str:
    """Without what is measured, and how it is aligned."""
    text = re.sub(r"[\d,]+\.\d+|\d{1,3}(,\d{3})+", "#", text)
    return re.sub(r" +", " ", text)


def check(block: str, folder: Path, at: str, code: int) -> None:
    """Run the block's command with another port; it prints what is there."""
    first, expected = block.split("\n", 1)
    assert first.startswith("$ python ")
    written = next(iter(re.findall(r"127\.0\.0\.1:(\d+)", first)), at)
    command = first.removeprefix("$ python ").replace(written, at)
    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert shown(done.stdout.replace(f":{at}", f":{written}")) == shown(expected)
    assert done.returncode == code


@pytest.mark.parametrize(
    ("block", "code"),
    [
        pytest.param(WELL, 0, id="well"),
        pytest.param(DIFFERS, 1, id="differs", marks=pytest.mark.slow),
        pytest.param(BENCH, 0, id="bench"),
        pytest.param(EXAMPLE, 0, id="example", marks=pytest.mark.slow),
    ],
)
def test_commands_that_reach_a_learner(folder: Path, port: str, block: str, code: int) -> None:
    check(block, folder, port, code)


@pytest.mark.slow
def test_the_doctor_of_a_web_server(folder: Path) -> None:
    with started(*HTTP, "0", folder=folder) as (_, wait_for_output):
        check(NO_ECHO, folder, wait_for_output(r"port (\d+)"), 1)


@pytest.mark.slow
def test_the_doctor_of_a_closed_port(folder: Path) -> None:
    with Peer(lambda conn: None) as peer:
        peer.refuse()
        check(NOBODY, folder, str(peer.port), 1)


@pytest.mark.slow
def test_the_doctor_of_a_learner_that_is_stopped(folder: Path) -> None:
    with started(*SERVE, "--port", "0", folder=folder) as (process, wait_for_output):
        at = wait_for_output(r"port (\d+)")
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        check(STOPPED, folder, at, 1)


RUN_ELSEWHERE = {
    "python examples/quickstart.py": "test_examples",
    "python examples/workers.py": "test_examples",
    "python examples/cartpole.py --engine local": "test_examples, but not until it is solved",
    "python examples/cartpole.py --engine ray": "the same",
    "python -m pytest -n 4": "the tests",
    "python -m pytest -m cuda": "test_cuda, where there is a GPU",
    "python -m http.server 8080": "here",
    "python -m echo_torch": "here",
    "python -m echo_torch serve --example mymodule:dataset": "here",
}


@functools.cache
def answer(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.slow
def test_every_command_in_the_text_is_there(folder: Path) -> None:
    """What takes longer than a test may is only asked whether it knows its options, and finds its tests."""
    commands = set(re.findall(r"`(python [^`\n]*)`", README))
    for line in blocks("bash")[0].splitlines():
        commands.add(line.split("#")[0].split("&&")[1].strip())
    long = commands - RUN_ELSEWHERE.keys()
    assert RUN_ELSEWHERE.keys() <= commands
    for command in long:
        program, *options = shlex.split(command)[1:]
        if program == "-m":
            answer(program, *options, "--collect-only", "-q")
        else:
            known = set(re.findall(r"--[\w-]+", answer(program, "--help")))
            assert {option for option in options if option.startswith("--")} <= known, command
