"""The README's examples run as they are written, but for the port, which the system picks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from calls import Gate
from peers import Line, Peer

LIMIT_S = 60.0
README = Path(__file__).parents[1] / "README.md"
LEARNER, TRAINER, LOOP, WORKERS, SIGTERM = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def with_port(program: str, port: int | str) -> str:
    assert program.count("50051") == 1
    return program.replace("50051", str(port))


@pytest.mark.parametrize("trainer", [TRAINER, LOOP, WORKERS], ids=["trainer", "loop", "workers"])
def test_the_trainer_delivers_to_the_learner(trainer: str) -> None:
    learner = with_port(LEARNER, 0).replace("server.start()\n", "server.start()\nprint(server.port, flush=True)\n")
    learner += "    print(observation.shape, label.shape, flush=True)\n"
    with subprocess.Popen([sys.executable, "-c", learner], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            command = [sys.executable, "-W", "error", "-c", with_port(trainer, port)]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more would wait for each other, in steps this small
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=one_thread)
            assert (done.returncode, done.stderr) == (0, "")
            batches = [process.stdout.readline() for _ in range(30_000 // 256)]
            assert set(batches) == {"(256, 4) (256,)\n"}
        finally:
            process.kill()


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
    heard: list[int] = []

    def learner(line: Line) -> None:
        line.greet([np.zeros(1 << 17, np.int64)])
        ended.wait()
        while True:
            payload = np.frombuffer(line.hear(1 << 20), np.int64)
            line.received.clear()
            assert (payload == payload[0]).all()
            heard.append(int(payload[0]))
            line.ack()

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
    sent = len(heard) - 8  # the tail is sent twice
    assert sent >= IN_THE_BUFFER
    assert heard == [*range(sent), *range(sent - 8, sent)]
