"""`EchoSink.wait` on which the processes of a group agree: real ones, on gloo, each with a sink of its own."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from peers import Peer, PeerConnection

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, numpy_example, ranks

EXAMPLE = {"index": 0}
SHORT_S = 0.3
"""Seconds of a timeout that is meant to pass."""
PATIENCE_S = 60.0
"""Seconds of one that is not."""

Case = Callable[[int, Any], None]


class Script:
    """A peer that acks what it hears until it is told to stall, or to die."""

    def __init__(self) -> None:
        self.acks = threading.Event()
        self.acks.set()

    def __call__(self, conn: PeerConnection) -> None:
        conn.send_handshake(numpy_example(EXAMPLE))
        while True:
            conn.receive(8)
            assert self.acks.wait(PATIENCE_S)
            conn.ack()


class RankUnderTest:
    """What a rank has: a peer, and a sink to it."""

    def __init__(self, rank: int, world: Any) -> None:
        self.rank, self.world = rank, world
        self.script = Script()
        self.peer = Peer(self.script)
        self.sink = EchoSink(self.peer.host, self.peer.port, EXAMPLE, reconnect=0.0, resend_at_close=False)

    def send(self, count: int = 5) -> None:
        self.sink.send({"index": np.arange(count)})

    def die(self) -> None:
        """The learner is gone."""
        self.peer.refuse()
        for conn in self.peer.connections:
            conn.reset()

    def met(self, group: Any = None, timeout: float = PATIENCE_S) -> Exception | None:
        """What `wait` raises."""
        try:
            self.sink.wait(timeout, group=group or self.world)
        except Exception as error:
            return error
        return None

    def agrees(self) -> None:
        """Whatever was before, all is acked in the end, and the group can still be used."""
        self.script.acks.set()
        self.send()
        assert self.met() is None
        assert self.sink.stats().in_flight == 0


def everything(rank: int, world: Any, directory: Path) -> None:
    """All cases one after the other, for a process costs more than all of them."""
    threading.excepthook = lambda args: None  # a peer whose client left
    for case in CASES:
        side = RankUnderTest(rank, world)
        dist.barrier(world)
        case(side)
        dist.barrier(world)
        side.sink.close()
        (directory / f"{case.__name__} {rank}").touch()


def all_is_acked(side: RankUnderTest) -> None:
    if side.rank != 1:  # which never sent anything
        side.send()
    assert side.met() is None
    assert side.sink.stats().in_flight == 0


def one_stalls(side: RankUnderTest) -> None:
    """All say which, and how much is open there."""
    if side.rank == 1:
        side.script.acks.clear()
    side.send(5)
    error = side.met(timeout=SHORT_S)
    assert type(error) is DeliveryTimeoutError
    assert error.unacked == 5
    assert side.sink.peer in str(error)
    if side.rank != 1:
        assert "rank 1 ran out of time (5 samples un-acked)" in str(error)
        assert f"here, on rank {side.rank}, everything is acked" in str(error)
    side.agrees()


def two_stall(side: RankUnderTest) -> None:
    if side.rank:
        side.script.acks.clear()
    side.send(side.rank + 5)
    error = side.met(timeout=SHORT_S)
    assert type(error) is DeliveryTimeoutError
    if side.rank == 0:
        assert error.unacked == 13
        assert "rank 1 ran out of time (6 samples un-acked), rank 2 ran out of time (7 samples" in str(error)
    side.agrees()


def one_is_left_alone(side: RankUnderTest) -> None:
    """Its learner is gone. With another's stalling at the same time, it is this that is told."""
    if side.rank:
        side.script.acks.clear()
    side.send(4)
    if side.rank == 2:
        side.die()
    error = side.met(timeout=SHORT_S)
    assert type(error) is (DeliveryTimeoutError if side.rank == 1 else ConnectionClosedError)
    if side.rank == 0:
        assert error.unacked == 8
        assert "rank 2 lost the connection (4 samples un-acked)" in str(error)
    if side.rank != 2:
        side.script.acks.set()
        side.sink.wait()
    error = side.met()
    assert type(error) is ConnectionClosedError


def one_comes_late(side: RankUnderTest) -> None:
    """The others give up in time, and find each other again."""
    skew, ranks.SKEW_S = ranks.SKEW_S, SHORT_S
    side.send()
    if side.rank == 2:
        time.sleep(5 * SHORT_S)
        assert side.met() is None
    else:
        began = time.monotonic()
        error = side.met(timeout=SHORT_S)
        assert time.monotonic() - began < 4 * SHORT_S
        assert type(error) is DeliveryTimeoutError
        assert "not all 3 ranks came to wait() within 0.6 s" in str(error)
        assert f"here, on rank {side.rank}, everything is acked" in str(error)
    ranks.SKEW_S = skew
    side.agrees()


def ctrl_c_comes_out(side: RankUnderTest) -> None:
    """While the others are waited for; who find later what was told to them."""
    meeting = dist.new_group(backend="gloo")
    side.send()
    side.sink.wait()
    if side.rank == 0:
        threading.Timer(SHORT_S, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            side.sink.wait(group=side.world)
    dist.barrier(meeting)
    if side.rank != 0:
        assert side.met() is None
    side.agrees()


def another_device_is_the_default(side: RankUnderTest) -> None:
    side.send()
    with torch.device("meta"):
        assert side.met() is None


def some_agree_among_themselves(side: RankUnderTest) -> None:
    """In a smaller group. Who is not in it is told so before anything is waited for."""
    group = dist.new_group([0, 2], backend="gloo")
    if side.rank != 0:
        side.script.acks.clear()
    side.send(3)
    error = side.met(group, timeout=SHORT_S)
    if side.rank == 1:
        assert type(error) is ValueError
        assert "group: this process, rank 1, is not in it" in str(error)
    else:
        assert type(error) is DeliveryTimeoutError
        assert error.unacked == 3
    side.agrees()


def a_group_for_no_cpu_tensors(side: RankUnderTest) -> None:
    group = dist.new_group(backend="fake_cuda")
    side.script.acks.clear()
    side.send()
    error = side.met(group)
    assert type(error) is ValueError
    assert "expected one for CPU tensors: torch.distributed.new_group(backend='gloo')" in str(error)
    side.agrees()


CASES = [
    all_is_acked,
    one_stalls,
    two_stall,
    one_is_left_alone,
    one_comes_late,
    ctrl_c_comes_out,
    another_device_is_the_default,
    some_agree_among_themselves,
    a_group_for_no_cpu_tensors,
]


def _join(rank: int, size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=PATIENCE_S)
    dist.init_process_group("gloo", f"file://{directory}/store", limit, rank=rank, world_size=size)
    dist.Backend.register_backend("fake_cuda", dist.ProcessGroupGloo, devices="cuda")
    try:
        everything(rank, dist.group.WORLD, directory)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_end_a_wait_alike(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_join, (3, tmp_path), nprocs=3)
    done = {path.name for path in tmp_path.iterdir()} - {"store"}
    assert done == {f"{case.__name__} {rank}" for case in CASES for rank in range(3)}


def test_without_a_process_group_there_is_none_to_agree_with() -> None:
    sink = EchoSink("nowhere.invalid", 1, EXAMPLE)
    with pytest.raises(ValueError, match="process group"):
        sink.wait(group=dist.GroupMember.NON_GROUP_MEMBER)
