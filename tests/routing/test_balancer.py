"""One sink to several learners: what each gets, and what becomes of the share of one that is stopped or gone."""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
from collections.abc import Collection, Iterator
from typing import Any

import echo
import pytest
from calls import eventually
from learner_process import Learner
from numbered import FILLER, digest, example, fillers, samples
from torch.utils.data import DataLoader
from training import DigitLearner, Digits, digit

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink

SIZE = 64
BATCH = 32
PATIENCE_S = 30.0


def batch(number: int) -> dict[str, Any]:
    """The samples from ``number * BATCH`` on."""
    return samples(number * BATCH, BATCH, SIZE)


def parity(data: Any) -> Any:
    return data["id"] % 2


@contextlib.contextmanager
def two_learners(**options: Any) -> Iterator[list[Learner]]:
    with (
        Learner(example(SIZE), digest=digest, **options) as one,
        Learner(example(SIZE), digest=digest, **options) as two,
    ):
        yield [one, two]


def sink_to(learners: list[Any], **options: Any) -> EchoSink:
    return EchoSink("127.0.0.1", [learner.port for learner in learners], example(SIZE), **options)


def arrived(learner: Learner, wanted: Collection[int]) -> list[int]:
    """The numbers of what arrived, once all of ``wanted`` did; the bytes must be theirs."""
    filler = {name: leaf[0] for name, leaf in fillers(1, SIZE).items()}
    deadline = time.monotonic() + PATIENCE_S
    while True:
        learner.fill(filler)  # for the server gives full batches only
        got = learner.take(max(1, learner.received()))
        assert got["right"].all()
        numbers: list[int] = got["id"][got["id"] != FILLER].tolist()
        if set(wanted) <= set(numbers):
            return numbers
        assert time.monotonic() < deadline, f"{len(set(wanted) - set(numbers))} of {len(wanted)} samples are missing"


def of_batches(*numbers: int) -> list[int]:
    return [sample for number in numbers for sample in range(number * BATCH, (number + 1) * BATCH)]


def test_round_robin_alternates_between_learners() -> None:
    with two_learners() as learners:
        with sink_to(learners, resend_at_close=False) as sink:
            for number in range(8):
                sink.send(batch(number))
            sink.wait()
            assert [peer.samples_acked for peer in sink.stats().peers] == [4 * BATCH, 4 * BATCH]
            assert sink.stats().samples_acked == 8 * BATCH
            assert sink.acked_through == 7
        for first, learner in enumerate(learners):
            wanted = of_batches(*range(first, 8, 2))
            assert arrived(learner, wanted) == wanted


def test_a_routing_function_picks_the_learner_of_each_sample() -> None:
    with two_learners() as learners:
        sink = pickle.loads(pickle.dumps(sink_to(learners, route=parity, resend_at_close=False)))
        with sink:
            for number in range(4):
                sink.send(batch(number))
            sink.send({name: leaf[0] for name, leaf in samples(4 * BATCH, 1, SIZE).items()})  # one sample, even
            sink.send(samples(4 * BATCH + 1, 1, SIZE))
            for number in range(4 * BATCH + 2, 6 * BATCH):
                sink.send(samples(number, 1, SIZE))
            sink.wait()
        for remainder, learner in enumerate(learners):
            wanted = range(remainder, 6 * BATCH, 2)
            assert arrived(learner, wanted) == list(wanted)


def test_an_invalid_learner_index_raises_and_sends_nothing() -> None:
    with two_learners() as learners, sink_to(learners, route=len) as sink:
        with pytest.raises(ValueError, match="route: the function gave 2, expected 0 to 1"):
            sink.send(batch(0))  # two leaves
        assert sink.stats().samples_sent == 0


def test_least_inflight_bypasses_a_stopped_learner() -> None:
    buffer = 4 * BATCH * SIZE
    with two_learners() as learners:
        with sink_to(learners, route="least_inflight", buffer_bytes=buffer, max_inflight_msgs=BATCH) as sink:
            learners[0].freeze()
            try:
                for number in range(100):
                    sink.send(batch(number), timeout=PATIENCE_S)
                stopped, other = sink.stats().peers
                assert stopped.samples_sent <= buffer // SIZE
                assert stopped.samples_sent + other.samples_sent == 100 * BATCH
                assert sink.acked_through < 99
            finally:
                learners[0].thaw()
            sink.wait()
            assert sink.acked_through == 99
        numbers = arrived(learners[0], [])
        rest = set(range(100 * BATCH)) - set(numbers)
        assert len(rest) >= 100 * BATCH - stopped.samples_sent
        assert set(arrived(learners[1], rest)) | set(numbers) == set(range(100 * BATCH))


def test_round_robin_waits_for_the_next_learner() -> None:
    with two_learners() as learners:
        with sink_to(learners, buffer_bytes=10 * SIZE, max_inflight_msgs=2) as sink:
            learners[0].freeze()
            try:
                with pytest.raises(DeliveryTimeoutError, match=f"127.0.0.1:{learners[0].port}: send") as caught:
                    sink.send(batch(0), timeout=0.2)
                taken = caught.value.rows_accepted
                assert 0 < taken < BATCH
                assert caught.value.unacked >= taken - 8
                assert caught.value.rows_left is None
                sink.send(batch(1), timeout=PATIENCE_S)
            finally:
                learners[0].thaw()
            sink.send({name: leaf[taken:] for name, leaf in batch(0).items()})  # the first one's turn again
            sink.wait()
        assert set(arrived(learners[0], of_batches(0))) == set(of_batches(0))
        assert set(arrived(learners[1], of_batches(1))) == set(of_batches(1))


def test_a_timeout_names_the_rows_left_of_a_split_batch() -> None:
    with two_learners() as learners:
        options = {"route": parity, "buffer_bytes": 10 * SIZE, "max_inflight_msgs": 2, "resend_acked": 0}
        with sink_to(learners, **options) as sink:
            learners[1].freeze()
            try:
                with pytest.raises(DeliveryTimeoutError) as caught:
                    sink.send(batch(0), timeout=0.3)
            finally:
                learners[1].thaw()
            left = caught.value.rows_left
            assert left is not None
            assert caught.value.rows_accepted == BATCH - len(left) > BATCH / 2
            assert all(row % 2 for row in left)
            sink.send({name: leaf[left] for name, leaf in batch(0).items()})
            sink.wait()
        for remainder, learner in enumerate(learners):
            wanted = range(remainder, BATCH, 2)
            assert arrived(learner, wanted) == list(wanted)


def test_without_failover_one_lost_learner_fails_every_send() -> None:
    with two_learners() as learners:
        sink = sink_to(learners, route="least_inflight", reconnect=0)
        sink.connect()
        sink.send(batch(0))
        sink.wait()
        learners[0].kill()
        eventually(lambda: sink.stats().peers[0].lost)
        for _ in range(2):
            with pytest.raises(ConnectionClosedError, match=f"127.0.0.1:{learners[0].port}"):
                sink.send(batch(1))
        assert not sink.stats().peers[1].lost
        sink.close()


def test_without_failover_the_remaining_learner_still_gets_its_batches() -> None:
    with two_learners() as learners:
        sink = sink_to(learners, reconnect=0)
        sink.connect()
        learners[1].freeze()
        for number in range(4):
            sink.send(batch(number))
        learners[0].kill()
        eventually(lambda: sink.stats().peers[0].lost)
        learners[1].thaw()
        with contextlib.suppress(ConnectionClosedError):  # the first one may have acked everything
            sink.close()
        assert arrived(learners[1], of_batches(1, 3))[: 2 * BATCH] == of_batches(1, 3)


@pytest.mark.parametrize("route", ["round_robin", "least_inflight", parity], ids=["turns", "least", "function"])
def test_failover_resends_undelivered_rows_to_the_others(route: Any, caplog: pytest.LogCaptureFixture) -> None:
    with two_learners() as learners:
        with sink_to(learners, route=route, failover=True, reconnect=0, max_inflight_msgs=BATCH) as sink:
            learners[0].freeze()
            for number in range(10):
                sink.send(batch(number))
            before = sink.stats()
            with caplog.at_level(logging.WARNING, "echo_torch"):
                learners[0].kill()
                for number in range(10, 20):
                    sink.send(batch(number))
                sink.wait()
            stats = sink.stats()
            assert stats.samples_sent == stats.samples_acked == 20 * BATCH
            assert stats.resent >= before.peers[0].in_flight > 0
            assert stats.maybe_lost == 0
            assert sink.acked_through == 19
            assert "the learner is gone; its share" in caplog.text
            gone, other = stats.peers
            assert gone.lost
            assert not other.lost
        left = set(range(20 * BATCH)) - set(arrived(learners[1], of_batches(19)))
        assert len(left) <= gone.samples_acked  # which it acked before it was stopped


def test_failover_skips_a_learner_that_is_reconnecting() -> None:
    with two_learners() as learners, sink_to(learners, failover=True, reconnect=PATIENCE_S) as sink:
        learners[0].kill()
        for number in range(20):
            sink.send(batch(number), timeout=PATIENCE_S)
            time.sleep(0.005)  # the first one's end takes its time to be seen
        assert not sink.stats().peers[0].lost
        assert sink.stats().peers[1].samples_sent > 15 * BATCH
        with Learner(example(SIZE), digest=digest, port=learners[0].port) as again:
            eventually(lambda: sink.stats().peers[0].reconnects == 1)
            sink.send(batch(20))
            sink.send(batch(21))
            sink.close()
            assert set(arrived(again, [])) & set(of_batches(20, 21)) in (set(of_batches(20)), set(of_batches(21)))


def test_losing_the_last_learner_raises() -> None:
    with two_learners() as learners:
        sink = sink_to(learners, failover=True, reconnect=0, route="least_inflight").connect()
        sink.send(batch(0))
        sink.wait()
        for learner in learners:
            learner.freeze()
        sink.send(batch(1))
        sink.send(batch(2))
        for learner in learners:
            learner.kill()
        with pytest.raises(ConnectionClosedError, match="no learner is left") as caught:
            sink.wait()
        # The last of what the first one had acked may have been passed on to the other, which did not ack it again.
        assert 2 * BATCH <= caught.value.unacked <= 2 * BATCH + 8
        for _ in range(2):
            with pytest.raises(ConnectionClosedError, match="no learner is left"):
                sink.send(batch(3))
        with contextlib.suppress(ConnectionClosedError):
            sink.close()
        assert sink.stats().in_flight == caught.value.unacked
        assert sink.stats().maybe_lost >= 2 * BATCH


def test_on_error_warn_drops_batches_after_the_last_learner_is_lost() -> None:
    with two_learners() as learners, sink_to(learners, failover=True, reconnect=0, on_error="warn") as sink:
        for learner in learners:
            learner.kill()
        eventually(lambda: all(peer.lost for peer in sink.stats().peers))
        sink.send(batch(0))
        assert sink.stats().dropped == BATCH


def test_without_failover_every_learner_must_accept_the_first_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Learner(example(SIZE), digest=digest) as learner:
        with Learner(example(SIZE)) as gone:
            ports = [gone.port, learner.port]
        sink = EchoSink("127.0.0.1", ports, example(SIZE), connect_timeout=0.5)
        with pytest.raises(ConnectionRefusedError):
            sink.connect()
        with EchoSink("127.0.0.1", ports, example(SIZE), connect_timeout=0.5, failover=True) as sink:
            assert f"127.0.0.1:{ports[0]}: could not be connected to" in caplog.text
            for number in range(4):
                sink.send(batch(number))
            sink.wait()
            assert [peer.lost for peer in sink.stats().peers] == [1, 0]
        assert arrived(learner, of_batches(*range(4)))[: 4 * BATCH] == of_batches(*range(4))


def test_a_stopped_learner_does_not_delay_closing_the_others() -> None:
    with two_learners() as learners:
        sink = sink_to(learners, resend_acked=8).connect()
        learners[0].freeze()
        for number in range(4):
            sink.send(batch(number))
        late = rf"127.0.0.1:{learners[0].port}: close\(\) not done within 0.5 s; "
        with pytest.raises(DeliveryTimeoutError, match=late) as caught:
            sink.close(0.5)
        learners[0].thaw()
        assert caught.value.unacked == 2 * BATCH
        assert sink.stats().peers[1].in_flight == 0
        assert arrived(learners[1], of_batches(1, 3))[: 2 * BATCH] == of_batches(1, 3)


def test_close_resends_undelivered_rows_of_a_lost_learner() -> None:
    with two_learners() as learners:
        sink = sink_to(learners, failover=True, reconnect=0).connect()
        learners[0].freeze()
        for number in range(4):
            sink.send(batch(number))
        assert sink.stats().peers[0].samples_acked == 0
        learners[0].kill()
        sink.close()
        assert set(arrived(learners[1], of_batches(*range(4)))) == set(of_batches(*range(4)))


def test_send_times_out_when_no_learner_has_room() -> None:
    with two_learners() as learners:
        options = {"route": "least_inflight", "buffer_bytes": 2 * BATCH * SIZE, "resend_acked": 0}
        with sink_to(learners, **options) as sink:
            for learner in learners:
                learner.freeze()
            try:
                for number in range(4):
                    sink.send(batch(number))
                with pytest.raises(DeliveryTimeoutError, match=r"send\(\) not done within 0.2 s: no learner has room"):
                    sink.send(batch(4), timeout=0.2)
            finally:
                for learner in learners:
                    learner.thaw()
            sink.send(batch(4))


@pytest.mark.parametrize("options", [{"route": "least_inflight"}, {"failover": True}], ids=["least", "failover"])
def test_least_inflight_and_failover_require_our_client(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"client=.*expected echo_torch.TcpClient"):
        EchoSink("a", [1, 2], example(SIZE), client=echo.TcpClient, **options)


def test_failover_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="failover: got 'yes', expected True or False"):
        EchoSink("a", [1, 2], example(SIZE), failover="yes")  # type: ignore[arg-type]


def test_round_robin_works_with_the_stock_client() -> None:
    with two_learners() as learners, sink_to(learners, client=echo.TcpClient) as sink:
        for number in range(4):
            sink.send(batch(number))
        sink.wait()
        assert [peer.samples_acked for peer in sink.stats().peers] == [2 * BATCH, 2 * BATCH]


def test_workers_send_to_several_learners() -> None:
    with DigitLearner() as one, DigitLearner() as two:
        ports = [one.port, two.port]
        with EchoSink("127.0.0.1", ports, digit(0), route="least_inflight", failover=True) as sink:
            loader = DataLoader(Digits(640), BATCH, num_workers=2, collate_fn=sink.collate())
            assert sum(len(item["id"]) for item in loader) == 640
            sink.wait()
            stats = sink.stats()
            assert stats.samples_acked == sum(peer.samples_acked for peer in stats.peers) == 640
            assert all(peer.samples_sent for peer in stats.peers)
            del loader
        assert [peer.samples_acked for peer in sink.stats().peers] == [peer.samples_acked for peer in stats.peers]
        assert [peer.lost for peer in sink.stats().peers] == [0, 0]
        first = set(one.take(0)["id"].tolist())
        eventually(lambda: first | set(two.take(0)["id"].tolist()) == set(range(640)))
