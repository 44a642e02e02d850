"""The bars of `EchoSink.tee` and `EchoSink.wait`, by a real tqdm; what they draw, and that they leave nothing."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calls import HANG_TIMEOUT_S, eventually, running
from learner_process import Learner
from peers import Peer, PeerConnection
from tqdm.auto import tqdm

from echo_torch import DeliveryTimeoutError, EchoSink, numpy_example

EXAMPLE = {"index": 0}
SIZE = 8
BATCH = {"index": torch.arange(32)}
IN_FLIGHT = re.compile(r"(\d+)/64 .* (\d+) in flight")
DRAWN_S = 0.11
"""Seconds after which tqdm draws again."""


@pytest.fixture(scope="module")
def learner() -> Iterator[Learner]:
    with Learner(numpy_example(EXAMPLE)) as learner:
        yield learner


@pytest.fixture
def sink(learner: Learner) -> Iterator[EchoSink]:
    with EchoSink("127.0.0.1", learner.port, EXAMPLE) as sink:
        yield sink


def drawn(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The states of the bars, one after the other."""
    out, err = capsys.readouterr()
    assert out == ""
    return [state.strip() for state in re.split(r"[\r\n]+|\x1b\[A", err) if state.strip()]


@pytest.mark.parametrize("made", [list, iter], ids=["of known length", "endless as far as is known"])
def test_tee_shows_batches_and_what_became_of_them(
    sink: EchoSink, made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in sink.tee(made([BATCH] * 4), progress=True):
        time.sleep(DRAWN_S)
    states = drawn(capsys)
    assert all(state.startswith(f"{sink.peer}: ") for state in states)
    assert ("4/4" if made is list else "4 batches") in states[-1]
    assert "128 acked, 0 in flight" in states[-1]
    counts = [re.findall(r"([\d,]+) acked, ([\d,]+) in flight", state) for state in states]
    assert len({pair[0] for pair in counts if pair}) > 1, "while the batches passed"


def test_tee_shows_nothing_unless_asked(sink: EchoSink, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in sink.tee([BATCH] * 4):
        pass
    sink.wait()
    assert drawn(capsys) == []


def test_tee_left_early_ends_its_bar(sink: EchoSink, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in sink.tee([BATCH] * 4, progress=True):
        break
    assert "0/4" in drawn(capsys)[-1]
    sink.wait()


def slow(conn: PeerConnection) -> None:
    """Acks 3 batches."""
    conn.send_handshake(numpy_example(EXAMPLE))
    for _ in range(3):
        conn.receive(len(BATCH["index"]) * SIZE)
        time.sleep(3 * DRAWN_S)
        conn.ack(len(BATCH["index"]))
    conn.receive_all()


def test_wait_shows_how_many_of_those_in_flight_are_acked(capsys: pytest.CaptureFixture[str]) -> None:
    with Peer(slow) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE, resend_at_close=False)
        sink.send(BATCH)
        sink.wait()  # of which nothing is shown
        sink.send(BATCH)
        sink.send(BATCH)
        sink.wait(HANG_TIMEOUT_S, progress=True)
        states = drawn(capsys)
        sink.close(HANG_TIMEOUT_S)
    assert all(state.startswith(f"{sink.peer} acked: ") for state in states)
    shown = [tuple(map(int, found[0])) for state in states if (found := IN_FLIGHT.findall(state))]
    assert shown == sorted(shown)
    assert {acked + in_flight for acked, in_flight in shown} == {64}
    assert {0, 64} <= {acked for acked, _ in shown}


def test_a_wait_that_fails_raises_what_it_would(capsys: pytest.CaptureFixture[str]) -> None:
    def silent(conn: PeerConnection) -> None:
        conn.send_handshake(numpy_example(EXAMPLE))
        conn.receive_all()

    with Peer(silent) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE, resend_at_close=False)
        sink.send(BATCH)
        with pytest.raises(DeliveryTimeoutError, match="32 samples un-acked"):
            sink.wait(0.2, progress=True)
        with pytest.raises(DeliveryTimeoutError):
            sink.close(0)
    assert "0/32" in drawn(capsys)[-1]


def test_a_lock_of_tqdm_that_an_interrupt_left_held_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    """As one in the middle of drawing does, in the main thread, which can then take it again."""

    def wait() -> None:
        with tqdm.get_lock():
            sink.wait(HANG_TIMEOUT_S, progress=True)
            list(sink.tee([BATCH], progress=True))

    with Peer(slow) as peer:
        sink = EchoSink("127.0.0.1", peer.port, EXAMPLE, resend_at_close=False)
        sink.send(BATCH)
        sink.send(BATCH)
        with running(wait) as outcomes:
            pass
        assert outcomes == [None]
        sink.close(HANG_TIMEOUT_S)
    assert "96 acked, 0 in flight" in drawn(capsys)[-1]


def test_drawing_that_is_interrupted_leaves_no_lock_of_tqdm_held(
    sink: EchoSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(bar: Any, *args: Any, **options: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    batches = iter(sink.tee([BATCH] * 4, progress=True))
    next(batches)
    monkeypatch.setattr(tqdm, "display", interrupted)
    time.sleep(DRAWN_S)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    with running(lambda: tqdm(disable=None, file=sys.stderr).refresh()) as outcomes:
        pass
    assert outcomes == [None]


def test_an_interrupt_as_soon_as_the_thread_runs_leaves_none(sink: EchoSink, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "echo_torch progress":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sink.wait(progress=True)
    eventually(lambda: not any(thread.name == "echo_torch progress" for thread in threading.enumerate()))


def test_without_tqdm_nothing_is_sent(sink: EchoSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        next(iter(sink.tee([BATCH], progress=True)))
    with pytest.raises(ImportError, match="pip install tqdm"):
        sink.wait(progress=True)
    assert sink.stats().samples_sent == 0
