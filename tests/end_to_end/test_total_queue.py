"""Whatever is cut, everything arrives: numbered samples through a proxy that cuts connections, into a real server.

Counted at the learner: what is lost, what is unexpected (unknown, or with another's bytes), what came more than once.
``pytest tests/end_to_end/test_total_queue.py --cuts 1000`` cuts each case so many times and prints what was counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numbered
import numpy as np
import pytest
from cutting import KINDS, Cutter
from learner_process import Learner

from echo_torch import EchoSink, TcpClient

CUTS = 12
"""For each case, unless ``--cuts`` says otherwise: a hundred in all."""
BATCH_SIZE = 64
SLACK_BYTES = 8 << 20
"""By how much the sender may grow beyond its buffer, for whatever Python and its libraries do the first time."""
TURN_ROWS = 1_000
AHEAD_SHARE = 0.5
AHEAD_ROWS = (1, 3, 17, 64, 256)
STEP_ROWS = (1, 2, 7, 8, 9, 33)
REST_SHARE = 0.3
SENT_AFTER = 2_000
"""Samples that are sent after the last cut."""
FILLER_ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """Samples of ``size`` bytes, ``window`` of them un-acked, to a server whose queues hold ``queue``."""

    queue: int
    resend_acked: int
    size: int
    window: int
    busy: float
    """Seconds that the learner takes over a batch. While it is, the server's queue of the connection is full."""
    most: int
    """Most samples before a cut."""

    def __str__(self) -> str:
        learner = "busy" if self.busy else "fast"
        return f"Q{self.queue}-R{self.resend_acked}-{self.size}B-W{self.window}-{learner}"

    @property
    def buffer_bytes(self) -> int:
        """Little enough for the sender to go round it all the time, and to wait for room in it."""
        return (2 * self.window + self.resend_acked) * self.size

    @property
    def duplicates(self) -> int:
        """Most that one cut may cause."""
        return self.window + self.resend_acked


CASES = (
    Case(queue=1, resend_acked=1, size=29, window=1024, busy=0.004, most=8_000),
    Case(queue=8, resend_acked=8, size=29, window=1024, busy=0.0, most=20_000),
    Case(queue=8, resend_acked=8, size=4096, window=64, busy=0.004, most=2_000),
    Case(queue=8, resend_acked=8, size=32768, window=192, busy=0.004, most=1_000),
    Case(queue=32, resend_acked=32, size=29, window=256, busy=0.004, most=8_000),
    Case(queue=32, resend_acked=32, size=4096, window=256, busy=0.0, most=4_000),
    Case(queue=8, resend_acked=0, size=29, window=256, busy=0.004, most=4_000),
    Case(queue=32, resend_acked=0, size=4096, window=64, busy=0.004, most=2_000),
    Case(queue=32, resend_acked=8, size=29, window=256, busy=0.004, most=4_000),
)


@dataclasses.dataclass(frozen=True)
class Count:
    """What the learner got of the samples from 0 to ``sent``."""

    lost: int
    unexpected: int
    duplicated: int


def count(digest: numbered.Batch, sent: int) -> Count:
    """Count what a learner kept by `numbered.digest`."""
    ids, right = digest["id"], digest["right"]
    known = right & (ids >= 0) & (ids < sent)
    times = np.bincount(ids[known], minlength=sent)
    stored = np.count_nonzero(times)
    unexpected = np.count_nonzero(~known & ~(right & (ids == numbered.FILLER)))
    return Count(lost=sent - int(stored), unexpected=int(unexpected), duplicated=int(known.sum() - stored))


def cuts_of(config: pytest.Config) -> int:
    cuts = config.getoption("cuts")
    return CUTS if cuts is None else cuts


def limit_s(cuts: int) -> float:
    """Seconds that a case may take; a quarter of it would do on a slow machine."""
    return 60 + cuts


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        timeout = pytest.mark.timeout(limit_s(cuts_of(metafunc.config)) + 60)
        metafunc.parametrize("case", [pytest.param(case, id=str(case), marks=timeout) for case in CASES])


def test_total_queue(case: Case, pytestconfig: pytest.Config, record_property: Callable[[str, object], None]) -> None:
    seed = 0 if pytestconfig.getoption("cuts") is None else random.randrange(1 << 16)
    report = deliver(case, cuts_of(pytestconfig), EchoSink, seed)
    record_property("total queue", {"case": str(case), "seed": seed, **report})
    assert report["unexpected"] == 0, report
    assert report["lost"] <= report["cuts"] * max(0, case.queue - case.resend_acked), report
    assert report["duplicated"] <= report["cuts"] * case.duplicates + case.resend_acked, report
    assert report["duplicated"] <= report["maybe_duplicated"], report
    assert report["reconnects"] <= report["cuts"], report
    assert report["resent"] <= report["reconnects"] * case.duplicates, report
    assert report["maybe_lost"] == report["descriptors_left"] == 0, report
    assert report["growth_bytes"] <= case.buffer_bytes + SLACK_BYTES, report


def deliver(case: Case, cuts: int, make_sink: Callable[..., Any], seed: int) -> dict[str, Any]:
    """Send until so many cuts have been made and a little longer; gives what was counted."""
    example = numbered.example(case.size)
    began = time.monotonic()
    deadline = began + limit_s(cuts)
    with (
        Learner(example, BATCH_SIZE, busy=case.busy, digest=numbered.digest, producer_queue_size=case.queue) as learner,
        Cutter(learner.port, most_bytes=case.most * case.size, most_acks=case.most, seed=seed) as cutter,
    ):
        memory, descriptors = resident_bytes(), open_descriptors()
        options = {"buffer_bytes": case.buffer_bytes, "resend_acked": case.resend_acked}
        with make_sink("127.0.0.1", cutter.port, example, max_inflight_msgs=case.window, **options) as sink:
            try:
                cutter.cut_at_random(cuts)
                sent = send_until_cut(sink, cutter, cuts, case.size, random.Random(seed), deadline)
                growth = resident_bytes() - memory
                sink.close(timeout=deadline - time.monotonic())
                left = open_descriptors() - descriptors
                counted = count(collect(learner, sent, case.size, deadline), sent)
            except Exception as error:
                counts = f"{sink.stats()}, {dict(cutter.counts())}, received {learner.received()}"
                raise AssertionError(f"{case} with seed {seed}: {counts}") from error
        stats = sink.stats()
        return {
            "sent": sent,
            "cuts": cutter.counts()["cuts"],
            **dataclasses.asdict(counted),
            **{name: getattr(stats, name) for name in ("reconnects", "resent", "maybe_duplicated", "maybe_lost")},
            "growth_bytes": growth,
            "descriptors_left": left,
            "seconds": round(time.monotonic() - began, 1),
        }


def send_until_cut(sink: Any, cutter: Cutter, cuts: int, size: int, rng: random.Random, deadline: float) -> int:
    """Send until all cuts were made, and `SENT_AFTER` more; gives how many samples.

    By turns the sender runs ahead up to its window, and waits for the acks of a few samples at a time. Some turns end
    with a cut while nothing is un-acked: then what the server throws away is what it acked.
    """
    sent, enough = 0, None
    while enough is None or sent < enough:
        ahead, turn_ends = rng.random() < AHEAD_SHARE, sent + rng.randrange(TURN_ROWS)
        while sent < turn_ends:
            rows = rng.choice(AHEAD_ROWS if ahead else STEP_ROWS)
            sink.send(numbered.samples(sent, rows, size), timeout=deadline - time.monotonic())
            sent += rows
            if not ahead:
                sink.wait(timeout=deadline - time.monotonic())
        if enough is None and cutter.counts()["cuts"] >= cuts:
            enough = sent + SENT_AFTER
        if enough is None and rng.random() < REST_SHARE:
            sink.wait(timeout=deadline - time.monotonic())
            cutter.cut(rng.choice(list(KINDS)))
    return sent


def collect(learner: Learner, sent: int, size: int, deadline: float) -> numbered.Batch:
    """What the learner got, when all is there or nothing more comes.

    A server hands out full batches only, so fillers push what was sent last out of it.
    """
    with TcpClient("127.0.0.1", learner.port, numbered.example(size), BATCH_SIZE) as client:
        for _ in range(FILLER_ROUNDS):
            batch = numbered.fillers(BATCH_SIZE, size)
            client.send_rows([batch["check"], batch["id"]], timeout=deadline - time.monotonic())
            client.wait(timeout=deadline - time.monotonic())
            kept = learner.take(learner.received())
            if count(kept, sent).lost == 0:
                break
            time.sleep(0.05)
    return kept


def resident_bytes() -> int:
    """What this process holds, without what its allocator keeps only for later."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
