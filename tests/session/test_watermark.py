"""Up to which step all is acked: the bookkeeping by itself, and as a sink keeps it with a real server."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import echo
import numpy as np
import pytest
import torch
from calls import eventually, running
from hypothesis import given
from hypothesis import strategies as st
from peers import Peer, PeerConnection
from training import IMAGES, LABELS, STALLING_COUNT, arrived, learner, sink_to

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, SpecMismatchError, numpy_example
from echo_torch.metrics.stats import SAVED_FIELDS
from echo_torch.session import watermark
from echo_torch.session.watermark import Watermark

BATCH = 32
SHORT_S = 0.2
"""Seconds of a timeout that is meant to pass."""


# By itself.


def test_it_follows_the_acks() -> None:
    mark = Watermark()
    assert mark.acked_through(0) == -1
    for step in range(3):
        assert mark.begin_step(None) == step
        mark.finish_step(step, 10 * (step + 1), 0)
    assert [mark.acked_through(acked) for acked in (0, 9, 10, 19, 20, 30)] == [-1, -1, 0, 0, 1, 2]


def test_it_starts_at_the_given_step() -> None:
    mark = Watermark(41)
    assert mark.acked_through(0) == 41
    assert mark.begin_step(None) == 42
    assert mark.acked_through(0) == 41


def test_numbering_continues_from_the_highest_step() -> None:
    mark = Watermark()
    assert [mark.begin_step(step) for step in (None, 7, None, 3, None)] == [0, 7, 8, 3, 9]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_steps_in_any_order(order: list[int]) -> None:
    """What is lower and under way holds down what is higher and acked."""
    mark = Watermark()
    for step in order:
        mark.begin_step(step)
    for rows, step in enumerate(order, 1):
        mark.finish_step(step, rows, rows)
        pending = set(order[rows:])
        assert mark.acked_through(rows) == (min(pending) - 1 if pending and min(pending) < 2 else max(order[:rows]))


def test_a_step_that_failed_holds_it_down_until_it_is_sent_again() -> None:
    mark = Watermark()
    mark.fail_step(mark.begin_step(None))
    mark.finish_step(mark.begin_step(None), 1, 1)
    assert mark.acked_through(1) == -1
    assert mark.begin_step(0) == 0
    assert mark.acked_through(1) == -1
    mark.fail_step(0)
    mark.begin_step(0)
    mark.finish_step(0, 2, 1)
    assert [mark.acked_through(1), mark.acked_through(2)] == [-1, 1]


def test_a_step_sent_twice_at_once_is_acked_when_both_are() -> None:
    mark = Watermark()
    for _ in range(2):
        mark.begin_step(0)
    mark.finish_step(0, 1, 1)
    assert mark.acked_through(1) == -1
    mark.finish_step(0, 2, 1)
    assert [mark.acked_through(1), mark.acked_through(2)] == [-1, 0]


def test_a_step_being_resent_is_not_acked_meanwhile() -> None:
    mark = Watermark()
    for step in range(3):
        mark.begin_step(step)
        mark.finish_step(step, step + 1, step + 1)
    assert mark.acked_through(3) == 2
    mark.begin_step(1)
    assert mark.acked_through(3) == 0
    mark.finish_step(1, 4, 4)
    assert mark.acked_through(4) == 2


def test_too_many_failed_steps_hold_it_down_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the lowest of them on; those below are still told apart."""
    monkeypatch.setattr(watermark, "MAX_MISSING", 3)
    mark = Watermark()

    def send(step: int, rows: int) -> int:
        mark.begin_step(step)
        mark.finish_step(step, rows, rows)
        return mark.acked_through(rows)

    for step in (20, 12, 11, 13, 14, 9, 5):
        mark.fail_step(mark.begin_step(step))
    assert send(30, 1) == 4
    assert send(5, 2) == 8
    assert send(9, 3) == 10
    assert [send(step, 4 + step) for step in range(11, 21)] == [10] * 10


class Model:
    """What was begun, sent, failed and acked, one by one; and what may be claimed of it."""

    def __init__(self, through: int) -> None:
        self.through = through
        self.rows = self.acked = 0
        self.open: list[int] = []
        self.complete: list[tuple[int, int]] = []  # (step, the rows there were when the last of its own was)
        self.failed: set[int] = set()

    @property
    def highest_allowed(self) -> int:
        unsure = {*self.open, *self.failed, *(step for step, rows in self.complete if rows > self.acked)}
        acked = [self.through, *(step for step, rows in self.complete if rows <= self.acked)]
        return min(max(acked), min(unsure, default=math.inf) - 1)  # type: ignore[return-value]


@given(st.data(), st.integers(-1, 3), st.sampled_from([1, 3, 1000]))
def test_it_never_claims_too_much(data: st.DataObject, through: int, most_missing: int) -> None:
    """However the calls of several threads interleave. When all was sent in the end, it claims all."""
    model, mark = Model(through), Watermark(through)
    steps = st.one_of(st.none(), st.integers(0, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watermark, "MAX_MISSING", most_missing)
        most_failed = 0
        for action in data.draw(st.lists(st.sampled_from(["begin", "begin", "sent", "failed", "ack"]), max_size=40)):
            if action == "begin":
                step = mark.begin_step(data.draw(steps))
                model.open.append(step)
                model.failed.discard(step)
            elif action == "ack":
                model.acked = data.draw(st.integers(model.acked, model.rows))
            elif model.open:
                step = model.open.pop(data.draw(st.integers(0, len(model.open) - 1)))
                model.rows += data.draw(st.integers(0, 3))
                if action == "failed":
                    model.failed.add(step)
                    mark.fail_step(step)
                else:
                    model.complete.append((step, model.rows))
                    others = data.draw(st.integers(0, 2))  # are sent before the count of all is looked at
                    model.rows += others
                    mark.finish_step(step, model.rows, data.draw(st.integers(0, model.acked)))
            most_failed = max(most_failed, len(model.failed))
            assert mark.acked_through(model.acked) <= model.highest_allowed
        for step in [*model.open, *map(mark.begin_step, model.failed)]:
            model.rows += 1
            mark.finish_step(step, model.rows, 0)
            model.complete.append((step, model.rows))
        if most_failed <= most_missing:
            highest = max([through, *(step for step, _ in model.complete)])
            assert mark.acked_through(model.rows) == highest


# In a sink.


def digits(first: int, count: int = BATCH) -> dict[str, torch.Tensor]:
    """The digits with the numbers from ``first`` on."""
    numbers = torch.arange(first, first + count)
    return {"id": numbers, "image": IMAGES[numbers], "labels": LABELS[numbers]}


SIZE = sum(leaf[0].nbytes for leaf in digits(0, 1).values())


def test_everything_is_acked_after_wait() -> None:
    with learner() as server, sink_to(server, resend_at_close=False) as sink:
        assert sink.acked_through == -1
        for step in range(3):
            sink.send(digits(step * BATCH))
            sink.wait()
            assert sink.acked_through == step
        assert pickle.loads(pickle.dumps(sink)).acked_through == -1


def test_numbering_continues_from_a_given_step() -> None:
    with learner() as server, sink_to(server, resend_at_close=False) as sink:
        sink.send(digits(0), step=np.int64(5))
        sink.send(digits(BATCH))
        sink.wait()
        assert sink.acked_through == 6
        sink.send(digits(0, 0))
        assert sink.acked_through == 7


def test_a_paused_learner_stops_the_watermark() -> None:
    steps = 2 * STALLING_COUNT // BATCH
    with learner() as server, sink_to(server, resend_at_close=False) as sink:
        server.pause()
        for step in range(steps):
            sink.send(digits(step * BATCH))
        with pytest.raises(DeliveryTimeoutError):
            sink.wait(SHORT_S)
        through = sink.acked_through
        assert through < STALLING_COUNT // BATCH
        assert through == sink.stats().samples_acked // BATCH - 1
        server.resume()
        sink.wait()
        assert sink.acked_through == steps - 1


def test_a_batch_that_timed_out_holds_it_down_until_it_is_sent() -> None:
    """Under the same step; the next number is another batch's."""
    with learner() as server:
        sink = sink_to(server, buffer_bytes=2 * STALLING_COUNT * SIZE, resend_acked=0, resend_at_close=False)
        server.pause()
        step = 0
        with pytest.raises(DeliveryTimeoutError) as caught:  # noqa: PT012
            for step in range(100):
                sink.send(digits(step * BATCH), timeout=SHORT_S)
        server.resume()
        sink.wait()
        assert sink.acked_through == step - 1
        sink.send(digits((step + 1) * BATCH))
        sink.wait()
        assert sink.acked_through == step - 1
        sink.send(digits(step * BATCH), step=step)
        sink.wait()
        assert sink.acked_through == step + 1
        sink.close()
        twice = Counter(range(step * BATCH, step * BATCH + caught.value.rows_accepted))
        assert arrived(server, sink.stats().samples_sent) == Counter(range((step + 2) * BATCH)) + twice


def test_an_interrupted_send_holds_it_down_until_it_is_repeated() -> None:
    with learner() as server:
        sink = sink_to(server, buffer_bytes=STALLING_COUNT * SIZE, resend_acked=0, resend_at_close=False)
        sink.send(digits(0))
        server.pause()
        strike = threading.Timer(SHORT_S, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            strike.start()
            sink.send(digits(BATCH, 3 * STALLING_COUNT))
        strike.join()
        server.resume()
        sink.wait()
        assert sink.acked_through == 0
        sink.send(digits(BATCH, 3 * STALLING_COUNT), step=1)
        sink.wait()
        assert sink.acked_through == 1
        sink.close()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_samples_unacked_by_a_dead_learner_never_count(on_error: Any) -> None:
    with learner() as server:
        sink = sink_to(server, on_error=on_error, reconnect=0.0)
        sink.send(digits(0))
        sink.wait()
        server.kill()
        eventually(lambda: learner_found_gone(sink))
        dropped = sink.stats().dropped
        for _ in range(2):
            assert learner_found_gone(sink)
        assert sink.stats().dropped == dropped + (2 * BATCH if on_error == "warn" else 0)
        assert sink.acked_through == 0
        state = sink.state_dict()
        assert state["acked_through"] == 0
        assert state["samples_acked"] == BATCH


def learner_found_gone(sink: EchoSink) -> bool:
    """Whether the learner is found to be gone by sending to it."""
    before = sink.stats().dropped
    try:
        sink.send(digits(BATCH))
        sink.wait()
    except ConnectionClosedError:
        return True
    return sink.stats().dropped > before


def test_a_learner_that_was_never_there_acks_nothing() -> None:
    with learner() as server:
        sink = sink_to(server, on_error="warn", connect_timeout=0.0)
    sink.send(digits(0))
    sink.wait()
    assert sink.acked_through == -1
    assert sink.state_dict()["dropped"] == BATCH


def test_resent_samples_are_acked_once() -> None:
    """A connection that is lost and opened again."""
    connections: list[PeerConnection] = []

    def script(conn: PeerConnection) -> None:
        connections.append(conn)
        conn.send_handshake(numpy_example({"id": 0}))
        if len(connections) > 1:
            conn.receive_all(ack_every=8)
        conn.receive(5 * 8)
        conn.ack(3)
        conn.close()

    with Peer(script) as peer, EchoSink(peer.host, peer.port, {"id": 0}) as sink:
        for number in range(5):
            sink.send({"id": number})
        sink.wait()
        assert sink.acked_through == 4
        assert sink.stats().resent == 5


def test_the_stock_client_reports_acks_only_on_wait() -> None:
    with learner() as server, sink_to(server, client=echo_client) as sink:
        sink.send(digits(0))
        assert sink.acked_through == -1
        sink.wait()
        assert sink.acked_through == 0


def echo_client(host: str, port: int, sample: Any, window: int) -> echo.TcpClient:
    return echo.TcpClient(host, port, sample, max_inflight_msgs=window)


def test_threads_may_send_steps_in_any_order() -> None:
    """Nothing that `send` has taken is claimed before the peer has acked it."""
    threads, steps = 4, 120
    taken: set[int] = set()
    observed: list[int] = []
    order = random.Random(1)
    acked: Counter[int] = Counter()
    ended = threading.Event()

    def rows_of(step: int) -> int:
        return step % 4

    def script(conn: PeerConnection) -> None:
        conn.send_handshake(numpy_example({"step": 0}))
        choose = random.Random(2)
        while True:
            run = choose.randint(1, 20)
            for _ in range(run):
                acked[int(np.frombuffer(conn.receive(8), np.int64)[0])] += 1
                conn.ack()
            ended.wait(0.0005)

    def send(steps: list[int]) -> None:
        for step in steps:
            sink.send({"step": torch.full((rows_of(step),), step)}, step=step)
            taken.add(step)

    def watch() -> None:
        while not ended.is_set():
            by_now = taken.copy()
            through = sink.acked_through
            assert all(acked[step] == rows_of(step) for step in by_now if step <= through)
            observed.append(through)

    shares = [list(range(number, steps, threads)) for number in range(threads)]
    with Peer(script) as peer:
        sink = EchoSink(peer.host, peer.port, {"step": 0}, max_inflight_msgs=50, resend_at_close=False)
        for share in shares:
            near = [share[start : start + 10] for start in range(0, len(share), 10)]
            share[:] = [step for some in near for step in order.sample(some, len(some))]
        calls: list[Callable[[], object]] = [lambda share=share: send(share) for share in shares]
        with running(watch) as watched:
            with running(*calls) as sent:
                pass
            sink.wait()
            assert sink.acked_through == steps - 1
            ended.set()
        assert [*sent, *watched] == [None] * (threads + 1)
        assert observed
        sink.close()


# What `send` is told of a batch.


@pytest.mark.parametrize(("step", "kind"), [(-1, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)])
def test_bad_steps_are_refused(step: Any, kind: type[Exception]) -> None:
    with learner() as server, sink_to(server, resend_at_close=False) as sink:
        with pytest.raises(kind, match="step: got"):
            sink.send(digits(0), step=step)
        assert sink.stats().samples_sent == 0


def test_a_refused_batch_takes_no_step_number() -> None:
    with learner() as server, sink_to(server, resend_at_close=False) as sink:
        sink.send(digits(0))
        for bad in ({"skip_last": BATCH + 1}, {"skip_last": -1}):
            with pytest.raises(ValueError, match="skip_last: got"):
                sink.send(digits(0), **bad)
        with pytest.raises(TypeError, match="skip_last: got"):
            sink.send(digits(0), skip_last=1.5)  # type: ignore[arg-type]
        with pytest.raises(SpecMismatchError):
            sink.send({"id": 0})
        sink.wait()
        assert sink.acked_through == 0
        assert sink.stats().samples_sent == BATCH


@pytest.mark.parametrize(
    ("bad", "kind"), [({**digits(0), "image": torch.zeros(BATCH, 3)}, SpecMismatchError), ({}, KeyError)]
)
def test_a_refused_batch_holds_down_its_explicit_step(bad: Any, kind: type[Exception]) -> None:
    """By the sink, or by ``select``."""
    with (
        learner() as server,
        sink_to(server, select=lambda batch: {**batch, "id": batch["id"]}, resend_at_close=False) as sink,
    ):
        sink.send(digits(0), step=0)
        with pytest.raises(kind):
            sink.send(bad, step=1)
        sink.send(digits(2 * BATCH), step=2)
        sink.wait()
        assert sink.acked_through == 0
        sink.send(digits(BATCH), step=1)
        sink.wait()
        assert sink.acked_through == 2


def test_skip_last_drops_the_last_samples() -> None:
    """Of a batch, of one sample, and all of them."""
    with learner() as server:
        with sink_to(server, resend_at_close=False) as sink:
            sink.send(digits(0), skip_last=5)
            sink.send(digits(100), skip_last=np.int64(BATCH))
            one = {name: leaf[0] for name, leaf in digits(200, 1).items()}
            sink.send(one, skip_last=1)
            with pytest.raises(ValueError, match="expected at most the 1 samples"):
                sink.send(one, skip_last=2)
            sink.send(one)
            sink.wait()
            assert sink.acked_through == 3
        assert arrived(server, BATCH - 4) == Counter([*range(BATCH - 5), 200])


# What is saved.


def test_a_sink_resumes_from_a_saved_state() -> None:
    """As JSON, for it is plain numbers."""
    with learner() as server:
        with sink_to(server, resend_at_close=False) as sink:
            for step in range(3):
                sink.send(digits(step * BATCH))
            sink.wait()
            saved = json.loads(json.dumps(sink.state_dict()))
        with sink_to(server, resend_at_close=False) as sink:
            sink.load_state_dict(saved)
            assert sink.state_dict() == saved
            assert (sink.acked_through, sink.stats().samples_sent, sink.stats().in_flight) == (2, 3 * BATCH, 0)
            sink.send(digits(3 * BATCH))
            sink.wait()
            assert sink.acked_through == 3
            assert sink.stats().samples_acked == 4 * BATCH
            assert sink.stats().bytes_acked == 4 * BATCH * SIZE
            sink.load_state_dict(saved)
            assert sink.state_dict() == saved
            sink.send(digits(4 * BATCH), step=9)
            sink.wait()
            assert sink.acked_through == 9
            assert sink.stats().samples_sent == 4 * BATCH
        assert arrived(server, 5 * BATCH) == Counter(range(5 * BATCH))


def test_a_state_loaded_during_send_ignores_that_batch() -> None:
    sinks: list[EchoSink] = []

    def select(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sinks[0].load_state_dict(GOOD)
        return batch

    with learner() as server, sink_to(server, select=select, resend_at_close=False) as sink:
        sinks.append(sink)
        sink.send(digits(0), step=9)
        sink.wait()
        assert sink.acked_through == GOOD["acked_through"]
        assert sink.stats().samples_acked == GOOD["samples_acked"] + BATCH


def test_samples_in_flight_in_a_saved_state_count_as_maybe_lost() -> None:
    with learner() as server:
        sink = sink_to(server, resend_at_close=False)
        server.pause()
        sink.send(digits(0, 2 * STALLING_COUNT))
        with pytest.raises(DeliveryTimeoutError):
            sink.wait(SHORT_S)
        saved = sink.state_dict()
        assert saved["in_flight"] == 2 * STALLING_COUNT - saved["samples_acked"] > STALLING_COUNT
        server.resume()
        sink.close()
    other = EchoSink("nowhere.invalid", 1, {"id": 0})
    other.load_state_dict(saved)
    assert other.acked_through == -1
    assert other.stats().maybe_lost == saved["in_flight"]
    assert other.stats().in_flight == 0


GOOD = {"acked_through": 4, **dict.fromkeys(SAVED_FIELDS, 7)}


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({}, TypeError),
        ([], TypeError),
        (None, TypeError),
        *[({**GOOD, name: "1"}, TypeError) for name in GOOD],
        *[({**GOOD, name: -2}, ValueError) for name in GOOD],
        *[({key: value for key, value in GOOD.items() if key != name}, TypeError) for name in GOOD],
        ({**GOOD, "blocked_seconds": math.nan}, ValueError),
    ],
    ids=str,
)
def test_bad_states_are_refused_and_change_nothing(state: Any, kind: type[Exception]) -> None:
    sink = EchoSink("nowhere.invalid", 1, {"id": 0})
    sink.load_state_dict(GOOD)
    before = sink.state_dict()
    assert before["acked_through"] == 4
    with pytest.raises(kind, match="state"):
        sink.load_state_dict(state)
    assert sink.state_dict() == before
