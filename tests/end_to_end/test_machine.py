"""A client in any order of events: sends, waits, cuts, a learner that is elsewhere or silent, close and collection.

Real servers behind the proxy. What every call did is written down, and in the end what arrived is held against it.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numbered
import pytest
from cutting import KINDS, Cutter
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from leaks import our_threads
from learner_process import Learner

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, TcpClient
from echo_torch.wire.protocol import WireLeaf, encode_handshake

SIZE = 40
EXAMPLE = numbered.example(SIZE)
GREETING = len(encode_handshake([WireLeaf(1, EXAMPLE["check"].shape), WireLeaf(8, ())]))
QUEUE = RESEND_ACKED = 8
BATCH_SIZE = 64
LONG_S = 20.0
"""Far more than a call takes that nothing keeps from being done."""
MARGIN_S = 2.0
"""By how much a call may pass its time on a loaded machine."""
BRIEF_S = 0.1


class Stage:
    """What all examples share: two learners, the proxy in front of one of them, and what they got."""

    def __init__(self, learners: tuple[Learner, Learner], cutter: Cutter) -> None:
        self.learners = learners
        self.cutter = cutter
        self.next_id = 0
        self.needed: set[int] = set()
        self.possible: set[int] = set()
        self.most_duplicates = 0
        self._arrived: Counter[int] = Counter()
        self._seen = [0, 0]  # of each learner, how many were looked at

    def check_arrivals(self) -> None:
        """All that had to arrive did, nothing else did, and not too much of it twice.

        A learner hands out full batches only, so fillers push the last samples out.
        """
        arrived = self._arrived
        deadline = time.monotonic() + LONG_S
        while not self.needed <= arrived.keys():
            assert time.monotonic() < deadline, f"lost: {sorted(self.needed - arrived.keys())}"
            for index, learner in enumerate(self.learners):
                # With the tail, or the server may discard some of them, and have no full batch.
                with TcpClient("127.0.0.1", learner.port, EXAMPLE, BATCH_SIZE, resend_at_close=True) as client:
                    batch = numbered.fillers(BATCH_SIZE, SIZE)
                    client.send_rows([batch["check"], batch["id"]], timeout=LONG_S)
                    client.wait(LONG_S)
                got = learner.take(max(BATCH_SIZE, learner.received()))
                assert got["right"].all(), "torn or mixed"
                new = got["id"][self._seen[index] :]
                self._seen[index] = len(got["id"])
                arrived.update(new[new != numbered.FILLER].tolist())
        self.needed.clear()
        assert arrived.keys() <= self.possible, "unexpected"
        assert arrived.total() - len(arrived) <= self.most_duplicates


class Machine(RuleBasedStateMachine):
    """One client at a time."""

    stage: Stage

    @initialize()
    def begin(self) -> None:
        self.client: TcpClient | None = None
        self.frozen = self.refusing = False
        self.accepted: list[int] = []  # by the present client
        self.acked = 0

    @precondition(lambda self: self.client is None and not self.frozen and not self.refusing)
    @rule(
        window=st.sampled_from([1, 4, 32]),
        rows=st.sampled_from([RESEND_ACKED + 2, 40, 400]),
        reconnect=st.sampled_from([0.0, 0.3, LONG_S, LONG_S]),
        tail=st.booleans(),
    )
    def open(self, window: int, rows: int, reconnect: float, tail: bool) -> None:
        self.window = window
        self.tail = tail
        self.lasting = reconnect >= LONG_S  # whether it can only end by being closed
        self.accepted, self.acked = [], 0
        self.stage.cutter.cut_at_random(0)
        self.stage.cutter.watch()
        self.client = TcpClient(
            "127.0.0.1",
            self.stage.cutter.port,
            EXAMPLE,
            window,
            buffer_bytes=rows * SIZE,
            reconnect=reconnect,
            resend_acked=RESEND_ACKED,
            resend_at_close=tail,
        )

    @precondition(lambda self: self.client is not None)
    @rule(rows=st.integers(1, 100), one_by_one=st.booleans(), timeout=st.sampled_from([0.0, BRIEF_S, 3 * BRIEF_S]))
    def send(self, rows: int, one_by_one: bool, timeout: float) -> None:
        client, first = self.client, self.stage.next_id
        assert client is not None
        batch = numbered.samples(first, rows, SIZE)
        self.stage.next_id += rows
        done = 0

        def call() -> None:
            nonlocal done
            if not one_by_one:
                client.send_rows([batch["check"], batch["id"]], timeout=timeout)
                done = rows
            for index in range(rows if one_by_one else 0):
                client.send({name: leaf[index] for name, leaf in batch.items()}, timeout=timeout)
                done += 1

        error = self.outcome(call, timeout * (rows if one_by_one else 1))
        if error is not None and not one_by_one:
            done = error.rows_accepted
        self.accepted += range(first, first + done)

    @precondition(lambda self: self.client is not None)
    @rule(timeout=st.sampled_from([0.0, BRIEF_S, 3 * BRIEF_S]))
    def wait(self, timeout: float) -> None:
        assert self.client is not None
        if self.outcome(lambda: self.client.wait(timeout), timeout) is None:
            assert self.client.in_flight == 0

    @precondition(lambda self: self.client is not None)
    @rule(kind=st.sampled_from(list(KINDS)), rows=st.integers(1, 300))
    def cut_while_others_send_and_wait(self, kind: str, rows: int) -> None:
        """On two threads."""
        client, first = self.client, self.stage.next_id
        assert client is not None
        batch = numbered.samples(first, rows, SIZE)
        self.stage.next_id += rows
        errors: dict[str, Any] = {}

        def run(name: str, call: Callable[[], None]) -> None:
            errors[name] = self.outcome(call, BRIEF_S)

        calls = {
            "send": lambda: client.send_rows([batch["check"], batch["id"]], timeout=BRIEF_S),
            "wait": lambda: client.wait(BRIEF_S),
        }
        threads = [threading.Thread(target=run, args=item, daemon=True) for item in calls.items()]
        for thread in threads:
            thread.start()
        self.stage.cutter.cut(kind)
        for thread in threads:
            thread.join(LONG_S)
            assert not thread.is_alive(), "a call hangs"
        done = rows if errors["send"] is None else errors["send"].rows_accepted
        self.accepted += range(first, first + done)

    @precondition(lambda self: self.client is not None)
    @rule(kind=st.sampled_from(list(KINDS)))
    def cut(self, kind: str) -> None:
        self.stage.cutter.cut(kind)

    @precondition(lambda self: self.client is not None)
    @rule(cuts=st.integers(1, 5))
    def cut_soon(self, cuts: int) -> None:
        self.stage.cutter.cut_at_random(cuts)

    @precondition(lambda self: self.client is not None)
    @rule(which=st.integers(0, 1), kind=st.sampled_from(list(KINDS)))
    def restart_elsewhere(self, which: int, kind: str) -> None:
        """The address leads to another server from now on; the first one stores what it has."""
        self.stage.cutter.redirect_to(self.stage.learners[which].port)
        self.stage.cutter.cut(kind)

    @precondition(lambda self: self.client is not None or self.frozen)
    @rule()
    def toggle_silence(self) -> None:
        """Nothing passes any more, and nobody says so; or all does again."""
        self.frozen, self.lasting = not self.frozen, False
        (self.stage.cutter.freeze if self.frozen else self.stage.cutter.thaw)()

    @precondition(lambda self: self.client is not None or self.refusing)
    @rule()
    def toggle_refusing(self) -> None:
        self.refusing, self.lasting = not self.refusing, False
        (self.stage.cutter.stop_listening if self.refusing else self.stage.cutter.listen_again)()

    @precondition(lambda self: self.client is not None)
    @rule(timeout=st.sampled_from([0.0, BRIEF_S, 3 * BRIEF_S]))
    def close(self, timeout: float) -> None:
        self.end(timeout)

    @precondition(lambda self: self.client is not None and not self.frozen and not self.refusing)
    @rule()
    def drop(self) -> None:
        """It delivers by itself, and the tail too if it has one; without, the server may discard some.

        One that does not try for long to open its connection again may have given up after it was asked for the last
        time; who dropped it cannot know.
        """
        assert self.client is not None
        failed, duplicates = self.client.closed, self.client.counts().maybe_duplicated
        self.client = None
        gc.collect()  # errors whose frames refer to it, and to each other
        self.stage.cutter.cut_at_random(0)
        deadline = time.monotonic() + LONG_S
        while our_threads():
            assert time.monotonic() < deadline, "it never ended"
            time.sleep(0.005)
        sure = self.tail and not failed and self.lasting
        self.settle(0 if sure else len(self.accepted), duplicates + self.window + 2 * RESEND_ACKED)

    def outcome(self, call: Callable[[], object], timeout: float) -> Any:
        """Make a call, which must end in its time; gives its error if that says what became of the samples."""
        began = time.monotonic()
        problem = None
        try:
            call()
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            problem = error
        assert time.monotonic() - began < timeout + MARGIN_S, "a call took too long"
        if problem is not None:
            assert f"127.0.0.1:{self.stage.cutter.port}: " in str(problem)
            assert f"{problem.unacked} samples un-acked" in str(problem)
        return problem

    def end(self, timeout: float) -> None:
        """Close the client, and note what of its samples must have arrived."""
        client = self.client
        assert client is not None
        error = self.outcome(lambda: client.close(timeout), timeout)
        self.client = None
        counts = client.counts()
        assert counts.sent == len(self.accepted)
        if error is not None:
            assert counts.unacked == error.unacked
            assert counts.maybe_lost > 0
        assert counts.unacked <= counts.maybe_lost <= counts.unacked + RESEND_ACKED
        if self.tail and self.lasting and timeout >= LONG_S:
            assert counts.maybe_lost == 0
        self.settle(counts.maybe_lost, counts.maybe_duplicated)

    def settle(self, maybe_lost: int, maybe_duplicated: int) -> None:
        self.stage.needed.update(self.accepted[: len(self.accepted) - maybe_lost])
        self.stage.possible.update(self.accepted)
        self.stage.most_duplicates += maybe_duplicated
        self.accepted = []

    @invariant()
    def counts_add_up(self) -> None:
        if getattr(self, "client", None) is None:
            return
        counts = self.client.counts()
        acked = counts.sent - counts.unacked
        assert counts.sent == len(self.accepted)
        assert self.acked <= acked <= counts.sent
        self.acked = acked
        assert counts.resent == counts.maybe_duplicated
        assert self.stage.cutter.most_unacked() <= self.window

    def teardown(self) -> None:
        cutter = self.stage.cutter
        cutter.cut_at_random(0)
        cutter.thaw()
        cutter.listen_again()
        if self.client is not None:
            self.end(LONG_S)
        self.stage.check_arrivals()
        assert not our_threads()


@pytest.fixture
def stage() -> Iterator[Stage]:
    options = {"digest": numbered.digest, "producer_queue_size": QUEUE, "busy": 0.002}
    with (
        Learner(EXAMPLE, BATCH_SIZE, **options) as first,
        Learner(EXAMPLE, BATCH_SIZE, **options) as second,
        Cutter(first.port, most_bytes=200 * SIZE, most_acks=200, sizes=(GREETING, SIZE)) as cutter,
    ):
        yield Stage((first, second), cutter)


@pytest.mark.slow
def test_nothing_hangs_and_nothing_is_lost_without_being_said(stage: Stage) -> None:
    run_state_machine_as_test(
        type("StagedMachine", (Machine,), {"stage": stage}),
        settings=settings(
            max_examples=20,
            stateful_step_count=25,
            deadline=None,
            phases=[Phase.generate],  # what threads and processes do comes out differently each time
            suppress_health_check=list(HealthCheck),
        ),
    )
