"""Learners that are lost one after the other while several threads send: what the others must have got in the end."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import Any

import numpy as np
import pytest
from calls import running
from peers import Line, Peer

from echo_torch import EchoSink

EXAMPLE = {"id": np.zeros((), np.int64)}
SIZE = 8
THREADS = 2
BATCHES = 60


class Mortal:
    """Acks all that it gets, until it has got ``life`` samples; then nothing listens there any more."""

    def __init__(self, life: int | None) -> None:
        self.life = life
        self.received: list[int] = []
        self.dead = threading.Event()
        self.peer = Peer(self)

    def __call__(self, line: Line) -> None:
        line.greet(EXAMPLE)
        rest = bytearray()
        while piece := line.sock.recv(1 << 16):
            rest += piece
            whole = len(rest) // SIZE
            self.received += np.frombuffer(bytes(rest[: whole * SIZE]), np.int64).tolist()
            del rest[: whole * SIZE]
            if self.life is not None and len(self.received) >= self.life:
                self.peer.refuse()
                line.reset()
                self.dead.set()
                return
            line.ack(whole)


def send(sink: EchoSink, first: int, chance: random.Random) -> int:
    """Send batches with the numbers from ``first`` on; gives the number after the last."""
    for _ in range(BATCHES):
        count = chance.choice([1, 3, 32, 200])
        sink.send({"id": np.arange(first, first + count)})
        first += count
        if chance.random() < 0.1:
            sink.wait()
    return first


@pytest.mark.parametrize("route", ["round_robin", "least_inflight"])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_lost_but_what_the_lost_had_acked(seed: int, route: Any) -> None:
    chance = random.Random(seed)
    learners = [Mortal(None), *(Mortal(chance.randrange(1, 3000)) for _ in range(3))]
    chance.shuffle(learners)
    options: dict[str, Any] = {"buffer_bytes": chance.choice([100, 1000, 100_000]) * SIZE, "max_inflight_msgs": 64}
    options |= {"reconnect": chance.choice([0, 0.05]), "failover": True, "route": route}
    firsts = [thread * 1_000_000 for thread in range(THREADS)]
    ends = [0] * THREADS
    with contextlib.ExitStack() as stack:
        for learner in learners:
            stack.enter_context(learner.peer)
        sink = EchoSink("127.0.0.1", [learner.peer.port for learner in learners], EXAMPLE, **options).connect()

        def work(thread: int) -> None:
            ends[thread] = send(sink, firsts[thread], random.Random(seed * THREADS + thread))

        with running(*(lambda thread=thread: work(thread) for thread in range(THREADS))) as outcomes:
            pass
        assert outcomes == [None] * THREADS
        sink.wait()
        stats = sink.stats()
        wanted = {number for first, end in zip(firsts, ends, strict=True) for number in range(first, end)}
        assert stats.samples_sent == stats.samples_acked == len(wanted)
        assert stats.maybe_lost == 0
        assert sink.acked_through == THREADS * BATCHES - 1
        got: set[int] = set()
        for learner, told in zip(learners, stats.peers, strict=True):
            assert told.lost == learner.dead.is_set()
            got |= set(learner.received[: max(0, told.samples_acked - 8)] if told.lost else learner.received)
        assert got == wanted
        sink.close()
        assert sink.stats().in_flight == 0
