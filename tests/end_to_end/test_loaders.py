"""Real loaders send from their workers to a real server, in all the ways that they can be run and can fail.

``pytest tests/end_to_end/test_loaders.py --loaders`` tries all cases of the matrix and prints what was counted.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import echo
import pytest
import torch
from calls import Gate, eventually
from leaks import open_descriptors
from peers import Peer, PeerConnection, full_queue
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils import signal_handling
from torchdata.stateful_dataloader import StatefulDataLoader
from training import (
    STALLING_COUNT,
    DigitLearner,
    Digits,
    Item,
    arrived,
    digit,
    learner,
    numbers_of,
    sink_to,
    wait_for_numbers,
)

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, SpecMismatchError
from echo_torch.processes import child as child_module
from echo_torch.ring.ring import SERVER_QUEUE_SAMPLES
from echo_torch.workers import Sent, SinkCollate, SinkDataset

HELPERS = Path(__file__).parents[1] / "helpers"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    # Of a machine with fewer cores than a case has workers.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

COUNT = 48
BATCH = 8
EPOCHS = 2
BUSY_S = 0.02 * 32
"""What a learner takes for a batch that is busy for 20 ms with each sample."""
TOO_MANY = 400
"""Samples, several times as many as a server acks that is paused."""

_numbers = itertools.count()


def new_numbers(count: int) -> int:
    """The first of ``count`` numbers that no test had before."""
    first = 0
    for _ in range(count):
        first = next(_numbers)
    return first - count + 1


class Map(Dataset[Item]):
    """Other numbers in each epoch, which is read in the worker."""

    def __init__(self, count: int, first: int, epoch: torch.Tensor) -> None:
        self.count = count
        self.first = first
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        return digit(self.first + self.count * int(self.epoch) + index)


class Stream(IterableDataset[Item]):
    """The same, each worker its share."""

    def __init__(self, items: Map) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        share = slice(None) if info is None else slice(info.id, None, info.num_workers)
        return (self.items[index] for index in range(len(self.items))[share])


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder, in which no file of a ledger may be left.

    Its name is short, for multiprocessing has sockets there.
    """
    path = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    gc.collect()  # of sinks, which exceptions may hold in cycles, the last files go
    eventually(lambda: not ledgers(path))


def ledgers(home: Path) -> list[Path]:
    return [path for folder in home.glob("echo_torch-*") for path in (folder, *folder.iterdir())]


@pytest.fixture(scope="module")
def fast() -> Iterator[DigitLearner]:
    with learner() as server:
        yield server


@pytest.fixture(scope="module")
def busy() -> Iterator[DigitLearner]:
    with learner(busy=BUSY_S) as server:
        yield server


def loader(collate: Any, items: Any, workers: int, method: str | None = "fork", **options: Any) -> DataLoader[Any]:
    context = multiprocessing.get_context(method) if workers else None
    return DataLoader(items, BATCH, num_workers=workers, collate_fn=collate, multiprocessing_context=context, **options)


# The matrix.

Case = tuple[str, bool, str, int, str]
CASES: list[Case] = [
    (method, persistent, kind, workers, speed)
    for method in ("fork", "spawn", "forkserver")
    for speed in ("fast", "busy")
    for workers in (0, 1, 4)
    for persistent in (False, True)
    for kind in ("map", "iterable")
    if workers or (not persistent and method == "fork")
]


def chosen(case: Case) -> bool:
    """Which cases are tried without ``--loaders``."""
    method, _, kind, workers, speed = case
    if method == "fork":
        return speed == "fast" or (workers == 4 and kind == "map")
    return case in [("spawn", False, "map", 1, "fast"), ("forkserver", True, "iterable", 1, "fast")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = metafunc.config.getoption("loaders")
        cases = CASES if every else list(filter(chosen, CASES))
        fast = ("fork", "forkserver", "spawn") if every else ("fork", "forkserver")
        marked = [pytest.param(case, marks=() if case[0] in fast else pytest.mark.slow) for case in cases]
        metafunc.parametrize("case", marked, ids=lambda case: "-".join(map(str, case)))


def test_every_sample_of_every_epoch_arrives(
    case: Case, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """At least once; and more often only where a worker ended, which repeats its last samples."""
    method, persistent, kind, workers, speed = case
    server: DigitLearner = request.getfixturevalue(speed)
    first = new_numbers(COUNT * EPOCHS)
    epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
    items = Map(COUNT, first, epoch)
    longest = 0.0
    with sink_to(server) as sink:
        batches = loader(
            sink.collate(),
            items if kind == "map" else Stream(items),
            workers,
            method,
            persistent_workers=persistent,
            worker_init_fn=sink.worker_init,
        )
        for number in range(EPOCHS):
            epoch[0] = number
            seen = numbers_of(batches)
            expected = Counter(range(first + COUNT * number, first + COUNT * (number + 1)))
            assert seen == expected
            began = time.monotonic()
            sink.wait()
            longest = max(longest, time.monotonic() - began)
            stats = sink.stats()
            assert (stats.samples_sent, stats.in_flight) == (COUNT * (number + 1), 0)
        del batches
        exits = (workers or 1) if persistent or not workers else workers * EPOCHS
        sink.close()
        stats = sink.stats()
    expected = Counter(range(first, first + COUNT * EPOCHS))
    got = wait_for_numbers(server, expected)
    repeated = got.total() - expected.total()
    assert repeated <= SERVER_QUEUE_SAMPLES * exits
    assert (stats.samples_acked, stats.maybe_lost) == (COUNT * EPOCHS, 0)
    assert repeated <= stats.maybe_duplicated <= SERVER_QUEUE_SAMPLES * exits
    record_property(
        "loaders",
        {
            "method": method if workers else "none",
            "persistent": persistent,
            "kind": kind,
            "workers": workers,
            "learner": speed,
            "samples": expected.total(),
            "lost": len(expected - got),
            "duplicates per exit": f"{repeated / exits:.1f}",
            "longest wait (s)": f"{longest:.2f}",
        },
    )


# What is sent, and by whom.


def test_iterable_datasets_send_what_they_make(fast: DigitLearner) -> None:
    """And need not hand it on."""
    first = new_numbers(COUNT)
    made = Stream(Map(COUNT, first, torch.zeros(1, dtype=torch.int64)))
    with sink_to(fast) as sink:
        tokens = list(loader(list, SinkDataset(made, sink, forward=False), 2))
        assert [token for batch in tokens for token in batch] == [Sent(1)] * COUNT
        sink.wait()
        assert sink.stats().samples_acked == COUNT
        wait_for_numbers(fast, Counter(range(first, first + COUNT)))


def test_a_batch_that_is_not_handed_on_is_counted_all_the_same(fast: DigitLearner) -> None:
    first = new_numbers(COUNT)
    with sink_to(fast) as sink:
        tokens = list(loader(sink.collate(forward=False), Digits(COUNT, first), 2))
        assert tokens == [Sent(BATCH)] * (COUNT // BATCH)
        sink.wait()
        wait_for_numbers(fast, Counter(range(first, first + COUNT)))


def test_two_loaders_two_sinks_and_the_main_process_at_once(fast: DigitLearner) -> None:
    """One sink is connected before its workers are forked. Each waits for its own."""
    first = new_numbers(4 * COUNT)
    with sink_to(fast).connect() as one, sink_to(fast) as two:
        sinks = (one, one, two)
        loaders = [
            loader(sink.collate(), Digits(COUNT, first + COUNT * number), 2) for number, sink in enumerate(sinks)
        ]
        own = loader(None, Digits(COUNT, first + COUNT * 3), 0)
        for *_, mine in zip(*loaders, own, strict=True):
            one.send(mine)
        one.wait()
        assert (one.stats().samples_acked, one.stats().in_flight) == (3 * COUNT, 0)
        two.wait()
        assert (two.stats().samples_acked, two.stats().in_flight) == (COUNT, 0)
        wait_for_numbers(fast, Counter(range(first, first + 4 * COUNT)))


class Busy:
    """A collate function that sends from threads of a worker, and from a process that the worker forks."""

    def __init__(self, sink: EchoSink) -> None:
        self.sink = sink

    def __call__(self, samples: list[Item]) -> Item:
        batch = default_collate(samples)
        parts = [{name: leaf[row::4] for name, leaf in batch.items()} for row in range(4)]
        threads = [threading.Thread(target=self.sink.send, args=(part,)) for part in parts[:3]]
        for thread in threads:
            thread.start()
        pid = os.fork()
        if not pid:
            self.sink.send(parts[3])
            self.sink.close()
            os._exit(0)
        os.waitpid(pid, 0)
        for thread in threads:
            thread.join()
        return batch


def test_threads_and_children_of_workers_send(fast: DigitLearner) -> None:
    first = new_numbers(COUNT)
    with sink_to(fast) as sink:
        assert numbers_of(loader(Busy(sink), Digits(COUNT, first), 2)) == Counter(range(first, first + COUNT))
        sink.wait()
        assert (sink.stats().samples_acked, sink.stats().in_flight) == (COUNT, 0)
        wait_for_numbers(fast, Counter(range(first, first + COUNT)))


def _rank_that_only_loads(sink: EchoSink, first: int) -> None:
    """Leaves everything to its workers, which it has still when it ends."""
    batches = loader(sink.collate(forward=False), Digits(COUNT, first), 2, persistent_workers=True)
    assert len(list(batches)) == COUNT // BATCH


def test_ranks_that_end_with_live_workers_lose_nothing(fast: DigitLearner) -> None:
    first = new_numbers(2 * COUNT)
    context = multiprocessing.get_context("fork")
    with sink_to(fast, max_inflight_msgs=1) as sink:
        ranks = [context.Process(target=_rank_that_only_loads, args=(sink, first + COUNT * i)) for i in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0, 0]
        wait_for_numbers(fast, Counter(range(first, first + 2 * COUNT)))


def _rank(sink: EchoSink, first: int, results: Any) -> None:
    """Sends by itself and by two workers, as a rank of a distributed job does."""
    batches = numbers_of(loader(sink.collate(), Digits(COUNT, first), 2))
    sink.send({name: leaf[None] for name, leaf in digit(first + COUNT).items()})
    sink.wait()
    results.put((batches.total(), sink.stats().samples_acked, sink.stats().in_flight))


def test_ranks_each_wait_for_their_own_workers(fast: DigitLearner) -> None:
    first = new_numbers(2 * (COUNT + 1))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with sink_to(fast) as sink:
        ranks = [
            context.Process(target=_rank, args=(sink, first + number * (COUNT + 1), results)) for number in range(2)
        ]
        for rank in ranks:
            rank.start()
        assert [results.get() for _ in ranks] == [(COUNT, COUNT + 1, 0)] * 2
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0, 0]
        sink.wait()
        assert sink.stats().samples_acked == 2, "those that the ranks sent themselves"
        wait_for_numbers(fast, Counter(range(first, first + 2 * (COUNT + 1))))
    results.close()


def test_the_pickle_of_a_sink_that_ray_makes_sends(fast: DigitLearner) -> None:
    """With what is defined where nobody can import it."""
    first = new_numbers(COUNT)
    with sink_to(fast).connect() as sink:
        collate = SinkCollate(sink, lambda samples: default_collate(samples), select=lambda batch: batch)
        copy = cloudpickle.loads(cloudpickle.dumps(collate))
        assert numbers_of(loader(copy, Digits(COUNT, first), 2)) == Counter(range(first, first + COUNT))
        sink.wait()
        assert sink.stats().samples_acked == COUNT
        wait_for_numbers(fast, Counter(range(first, first + COUNT)))


def test_workers_send_through_another_client(fast: DigitLearner) -> None:
    """It does not repeat its last samples, so others of main push them out of the server's queue."""
    first = new_numbers(COUNT)
    with sink_to(fast, client=echo.TcpClient) as sink:
        batches = loader(sink.collate(), Digits(COUNT, first), 2, persistent_workers=True)
        assert numbers_of(batches) == Counter(range(first, first + COUNT))
        sink.wait()
        assert (sink.stats().samples_acked, sink.stats().in_flight) == (COUNT, 0)
        wait_for_numbers(fast, Counter(range(first, first + COUNT)))


def test_a_worker_has_a_smaller_buffer() -> None:
    """16 MiB, of 64: what it holds while the server acks nothing."""
    sample = {"x": torch.zeros(1 << 16, dtype=torch.uint8)}
    go = Gate()

    def silent(conn: PeerConnection) -> None:
        conn.send_handshake({"x": sample["x"].numpy()})
        go.wait()
        conn.reset()

    with Peer(silent) as peer:
        sink = EchoSink("127.0.0.1", peer.port, sample, reconnect=0)
        batches = iter(loader(Flood(sink), [sample], 1))
        assert next(batches) == sink.stats().in_flight == (16 << 20) // (1 << 16) - SERVER_QUEUE_SAMPLES
        go.open()
        with pytest.raises(ConnectionClosedError, match="248 samples un-acked"):
            sink.wait()
        del batches
        sink.close()


class Flood:
    """Sends the same sample until there is no room; gives how many are un-acked then."""

    def __init__(self, sink: EchoSink) -> None:
        self.sink = sink

    def __call__(self, samples: list[Item]) -> int:
        with contextlib.suppress(DeliveryTimeoutError):
            while True:
                self.sink.send(samples[0], timeout=0.5)
        return self.sink.stats().in_flight


# What goes wrong.


def test_an_early_break_has_sent_what_was_read_ahead(fast: DigitLearner) -> None:
    first = new_numbers(TOO_MANY)
    with sink_to(fast) as sink:
        batches = loader(sink.collate(), Digits(TOO_MANY, first), 2, prefetch_factor=3)
        seen = numbers_of(itertools.islice(batches, 2))
        sink.wait()
        sent = sink.stats().samples_sent
        assert sink.stats().in_flight == 0
    assert seen.total() == 2 * BATCH
    assert seen.total() < sent <= seen.total() + 2 * 3 * BATCH
    eventually(lambda: sum(first <= number < first + TOO_MANY for number in arrived(fast, 1)) >= sent)
    assert sum(first <= number < first + TOO_MANY for number in arrived(fast, 1)) == sent


def test_batches_out_of_order_are_all_sent(fast: DigitLearner) -> None:
    first = new_numbers(COUNT)
    with sink_to(fast) as sink:
        assert numbers_of(loader(sink.collate(), Digits(COUNT, first), 3, in_order=False)) == Counter(
            range(first, first + COUNT)
        )
        sink.wait()
        wait_for_numbers(fast, Counter(range(first, first + COUNT)))


class Counting(Stream):
    """With a state, which its loader saves: how many it gave."""

    given = 0

    def __iter__(self) -> Iterator[Item]:
        for item in list(super().__iter__())[self.given :]:
            self.given += 1
            yield item
        self.given = 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")  # torchdata calls it
@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_is_resumed_sends_the_rest(fast: DigitLearner, kind: str, workers: int) -> None:
    """What was read ahead of the state is sent by both."""
    first = new_numbers(COUNT)
    items = Map(COUNT, first, torch.zeros(1, dtype=torch.int64))
    seen: Counter[int] = Counter()

    def loader(sink: EchoSink) -> StatefulDataLoader[Any]:
        made: Any = items if kind == "map" else SinkDataset(Counting(items), sink)
        collate = sink.collate() if kind == "map" else default_collate
        return StatefulDataLoader(made, BATCH, num_workers=workers, collate_fn=collate)

    with sink_to(fast) as sink:
        batches = loader(sink)
        iterator = iter(batches)
        for _ in range(3):
            seen += numbers_of([next(iterator)])
        state = batches.state_dict()
        del batches, iterator
    with sink_to(fast) as sink:
        batches = loader(sink)
        batches.load_state_dict(state)
        seen += numbers_of(batches)
        sink.wait()
        assert sink.stats().in_flight == 0
    expected = Counter(range(first, first + COUNT))
    assert seen == expected
    wait_for_numbers(fast, expected)


def failure(batches: Iterable[Any]) -> BaseException:
    """What a loop over ``batches`` ends in, without the frames, which would keep workers alive."""
    try:
        for _ in batches:
            pass
    except Exception as error:
        return error.with_traceback(None)
    raise AssertionError("nothing was raised")


class Fail:
    def __call__(self, samples: list[Item]) -> Item:
        raise LookupError("the user's own")


def without_labels(samples: list[Item]) -> Item:
    batch = default_collate(samples)
    del batch["labels"]
    return batch


@pytest.mark.parametrize(
    ("collate", "kind", "text"),
    [(Fail(), LookupError, "the user's own"), (without_labels, SpecMismatchError, r"batch\['labels'\].*missing")],
)
def test_what_fails_in_a_worker_is_raised_in_the_loop(
    fast: DigitLearner, collate: Any, kind: type[Exception], text: str
) -> None:
    with sink_to(fast) as sink:
        error = failure(loader(sink.collate(collate), Digits(COUNT), 2))
        assert type(error) is kind
        assert re.search(text, str(error), re.DOTALL)
        sink.wait()


@pytest.fixture
def death_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has torch set its handler of SIGCHLD anew, which it does once; trainers put others in its place."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_is_killed_is_told_of_with_its_samples(fast: DigitLearner, death_warnings: None) -> None:
    """By torch at any moment, and by the next wait, once."""
    first = new_numbers(TOO_MANY + 1)
    others = multiprocessing.active_children()
    with sink_to(fast) as sink, contextlib.ExitStack() as stack:
        fast.pause()
        stack.callback(fast.resume)
        batches = iter(loader(sink.collate(), Digits(TOO_MANY, first), 2, prefetch_factor=20))
        next(batches)
        victim = next(child for child in multiprocessing.active_children() if child not in others)
        eventually(lambda: sink.stats().samples_sent > 2 * STALLING_COUNT)
        began = time.monotonic()

        def struck() -> Iterator[None]:
            victim.kill()
            while time.monotonic() - began < 10:
                yield time.sleep(0.01)

        assert f"(pid {victim.pid}) is killed by signal" in str(failure(struck()))
        with pytest.raises(ConnectionClosedError, match=f"process {victim.pid}: died with") as error:
            sink.wait(10)
        assert time.monotonic() - began < 3
        fast.resume()
        lost: int = error.value.unacked
        assert lost > 0
        sink.wait()
        assert sink.stats().in_flight == lost
        assert lost <= sink.stats().maybe_lost <= lost + SERVER_QUEUE_SAMPLES
        assert "exited unexpectedly" in str(failure(batches))
        del batches
        sent = sink.stats().samples_sent
        sink.send(digit(first + TOO_MANY))
        sink.wait()
        assert sink.stats().samples_sent == sent + 1

        def came_of_them() -> int:
            return sum(first <= number < first + TOO_MANY for number in arrived(fast, 1))

        eventually(
            lambda: came_of_them() >= sent - lost - SERVER_QUEUE_SAMPLES
        )  # of the dead worker's, those in the queue
        assert came_of_them() <= sent


def test_a_learner_that_is_stalled_while_workers_end_is_told_of() -> None:
    """They may take 4 seconds, and the loader kills them after 5."""
    with learner() as server:
        sink = sink_to(server)
        server.pause()
        others = multiprocessing.active_children()
        assert numbers_of(loader(sink.collate(), Digits(TOO_MANY), 2)).total() == TOO_MANY
        assert set(multiprocessing.active_children()) == set(others)
        left = sink.stats().in_flight
        assert left > TOO_MANY - STALLING_COUNT
        with pytest.raises(DeliveryTimeoutError, match=r"close\(\) not done within 4 s; .* samples un-acked") as error:
            sink.wait(10)
        assert error.value.unacked == left
        sink.wait(10)
        sink.close()
        assert sink.stats().maybe_lost >= left


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_learner_that_dies_in_mid_epoch(on_error: Any, caplog: pytest.LogCaptureFixture) -> None:
    count = 1_000_000 if on_error == "raise" else 100 * BATCH
    with learner() as server:
        sink = sink_to(server, on_error=on_error)
        batches = iter(loader(sink.collate(), Digits(count), 2))
        seen = numbers_of(itertools.islice(batches, 2))
        server.kill()
        if on_error == "raise":
            began = time.monotonic()
            error = failure(batches)
            assert time.monotonic() - began < 4
            assert type(error) is ConnectionClosedError
            assert "not open again after" in str(error)
        else:
            seen += numbers_of(batches)
            assert seen.total() == count
            assert sink.stats().samples_sent + sink.stats().dropped == count
        del batches
        with pytest.raises(ConnectionClosedError) if on_error == "raise" else contextlib.nullcontext():
            sink.wait()
        sink.wait()
        sink.close()
        stats = sink.stats()
        assert stats.maybe_lost >= stats.in_flight > 0
        assert ("un-acked" in caplog.text) == (on_error == "warn")
    caplog.clear()  # its records hold errors, and these the sink


def test_workers_that_find_no_learner_tell_what_they_dropped() -> None:
    with full_queue() as listener:
        port = listener.getsockname()[1]
        sink = EchoSink("127.0.0.1", port, digit(0), on_error="warn", connect_timeout=0.1)
        assert numbers_of(loader(sink.collate(), Digits(COUNT), 2)).total() == COUNT
        sink.wait()
        assert (sink.stats().dropped, sink.stats().samples_sent) == (COUNT, 0)
        sink.close()


def test_workers_of_later_epochs_do_not_wait_for_a_learner_that_is_gone_and_find_it_when_it_comes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "WORKER_RECONNECT_S", 0.5)
    sample = {name: leaf.numpy() for name, leaf in digit(0).items()}

    def acking(conn: PeerConnection) -> None:
        conn.send_handshake(sample)
        conn.receive_all(ack_every=sum(leaf.nbytes for leaf in sample.values()))

    with Peer(acking) as peer:
        peer.refuse()
        sink = EchoSink("127.0.0.1", peer.port, digit(0), on_error="warn", connect_timeout=2.0, resend_at_close=False)
        took = []
        for _ in range(2):
            began = time.monotonic()
            assert numbers_of(loader(sink.collate(), Digits(COUNT), 1)).total() == COUNT
            took.append(time.monotonic() - began)
        assert took[1] + 1 < took[0], "the first is patient"
        assert sink.stats().dropped == 2 * COUNT
        assert len(list(home.glob("echo_torch-*/*.gone"))) == 1
        peer.listen()
        assert numbers_of(loader(sink.collate(), Digits(COUNT), 1)).total() == COUNT
        sink.close()
        assert (sink.stats().samples_acked, sink.stats().dropped) == (COUNT, 2 * COUNT)
        assert not list(home.glob("echo_torch-*/*.gone"))


def test_workers_are_told_to_end_by_close(fast: DigitLearner) -> None:
    first = new_numbers(COUNT)
    with sink_to(fast) as sink:
        batches = loader(sink.collate(), Digits(COUNT, first), 2, persistent_workers=True)
        assert numbers_of(batches).total() == COUNT
        sink.close()
        stats = sink.stats()
        assert (stats.samples_acked, stats.maybe_lost) == (COUNT, 0)
        wait_for_numbers(fast, Counter(range(first, first + COUNT)))
        with pytest.raises(ConnectionClosedError, match="this sink was closed"):
            list(batches)


def test_epochs_leave_nothing(fast: DigitLearner, home: Path, request: pytest.FixtureRequest) -> None:
    """No file, no descriptor, and no memory; with ``--loaders``, 200 of them."""
    epochs = 200 if request.config.getoption("loaders") else 8
    first = new_numbers(COUNT)
    with sink_to(fast) as sink:
        batches = loader(sink.collate(forward=False), Digits(COUNT, first), 2)
        for epoch in range(epochs):
            assert len(list(batches)) == COUNT // BATCH
            if epoch % 2:
                sink.wait()
                assert len(ledgers(home)) == 2, "the folder and its mark"
            if epoch == 3:
                gc.collect()
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                before = open_descriptors()
        gc.collect()
        eventually(lambda: len(open_descriptors()) <= len(before))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 16 * 1024, "KiB"
        assert sink.stats().samples_acked == epochs * COUNT


# How main ends.


class Program:
    """``loading.py``, in a process group of its own, with ``home`` as the temporary folder; a context manager."""

    def __init__(self, port: int, home: Path, how: str) -> None:
        self.records = home / how
        self.records.mkdir()
        program = str(HELPERS / "loading.py")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", program, str(port), str(self.records), how],
            env={**os.environ, "TMPDIR": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ready(self) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> tuple[int, str]:
        """Wait for it; its exit code, and the last line that it said on stderr. No worker outlives it."""
        _, errors = self.process.communicate(timeout=60)
        eventually(lambda: not any(map(lives, self.workers())))
        return self.process.returncode, (errors.strip().splitlines() or [""])[-1]

    def workers(self) -> list[int]:
        return [int(path.name.removeprefix("pid-")) for path in self.records.glob("pid-*")]

    def sent(self) -> Counter[int]:
        return Counter(int(line) for path in self.records.glob("sent-*") for line in path.read_text().split())

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def lives(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def check_arrived(server: DigitLearner, program: Program) -> None:
    """All that was sent, and of the tail of each worker once more what the server did not discard."""
    sent = program.sent()
    assert sent.total() >= 6 * BATCH
    assert len(program.workers()) == 2
    eventually(lambda: not sent - arrived(server, 1))
    got = arrived(server, 1)
    assert got.total() - len(got) <= 2 * SERVER_QUEUE_SAMPLES


@pytest.mark.parametrize(
    ("how", "code", "last"),
    [
        ("end", 0, ""),
        pytest.param("error", 1, "LookupError: the user's own", marks=pytest.mark.slow),
        pytest.param("exit", 3, "", marks=pytest.mark.slow),
    ],
)
def test_main_ends_with_live_workers(home: Path, how: str, code: int, last: str) -> None:
    with learner() as server, Program(server.port, home, how) as program:
        assert program.end() == (code, last)
        assert not ledgers(home)
        check_arrived(server, program)


@pytest.mark.parametrize("whole_group", [False, True], ids=["main", "group"])
def test_main_is_interrupted_with_live_workers(home: Path, whole_group: bool) -> None:
    with learner() as server, Program(server.port, home, "wait") as program:
        program.ready()
        (os.killpg if whole_group else os.kill)(program.process.pid, signal.SIGINT)
        assert program.end() == (-signal.SIGINT, "KeyboardInterrupt")
        assert not ledgers(home)
        check_arrived(server, program)


@pytest.mark.slow
def test_main_is_killed_and_the_next_run_removes_what_it_left(home: Path) -> None:
    """Its workers notice within 5 seconds, and deliver."""
    with learner() as server:
        with Program(server.port, home, "wait") as program:
            program.ready()
            program.process.kill()
            assert program.end()[0] == -signal.SIGKILL
            assert len(ledgers(home)) == 4
            check_arrived(server, program)
        with Program(server.port, home, "end") as program:
            assert program.end() == (0, "")
            assert not ledgers(home)


# A state that the iterator has.


class StatefulIterator(Iterator[Item]):
    """The items of a worker's share, one after another; with a state."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self.given = 0

    def __next__(self) -> Item:
        if self.given == len(self.items):
            raise StopIteration
        self.given += 1
        return self.items[self.given - 1]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class StatefulStream(Stream):
    def __iter__(self) -> Iterator[Item]:
        return StatefulIterator(list(super().__iter__()))


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")  # torchdata calls it
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_is_resumed_by_the_state_of_an_iterator_sends_the_rest(
    fast: DigitLearner, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing once more that the loop had seen."""
    first = new_numbers(COUNT)
    items = StatefulStream(Map(COUNT, first, torch.zeros(1, dtype=torch.int64)))
    with sink_to(fast) as sink:
        batches = StatefulDataLoader(SinkDataset(items, sink), BATCH, num_workers=workers)
        iterator = iter(batches)
        seen = numbers_of(itertools.islice(iterator, 3))
        state = batches.state_dict()
        del batches, iterator
    with sink_to(fast) as sink:
        batches = StatefulDataLoader(SinkDataset(items, sink), BATCH, num_workers=workers)
        batches.load_state_dict(state)
        rest = numbers_of(batches)
        sink.wait()
        assert sink.stats().samples_sent == rest.total()
    expected = Counter(range(first, first + COUNT))
    assert seen + rest == expected
    wait_for_numbers(fast, expected)
    assert "fast-forwarding" not in caplog.text
