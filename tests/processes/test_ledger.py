"""The ledger between a parent and real children of it: the files, waiting for what they say, and reporting.

The children of the first tests write by hand what a sink's report would, and do so when they are told.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import Gate, alarms, check_error, eventually, running
from leaks import open_descriptors
from peers import Peer, PeerConnection

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, ProtocolError
from echo_torch.metrics.stats import PeerCounts
from echo_torch.metrics.timing import Times
from echo_torch.processes import ledger
from echo_torch.processes.parent import ChildProcesses
from echo_torch.support.deadline import Deadline

HELPERS = Path(__file__).parents[1] / "helpers"

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

PEER = "learner:1"
ACKED_AT_RISK = 8
FORK = multiprocessing.get_context("fork")
SAMPLE = {"id": np.zeros((), np.int64)}
LONG_S = 30.0


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder, in which nothing may be left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    gc.collect()  # of sinks, which exceptions may hold in cycles, the last files go
    eventually(lambda: not list(tmp_path.iterdir()))


class Child:
    """A process that keeps a file of the ledger; a context manager that kills it."""

    def __init__(self, token: str, parent: int | None = None, learners: int = 1) -> None:
        ledger.make_folder(token, parent or os.getpid())
        self._pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(
            target=_run_child, args=(theirs, token, parent or os.getpid(), learners), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.path = Path(self._pipe.recv())

    def set(self, **fields: int) -> None:
        self._request("set", fields)

    def get(self, field: str) -> int:
        return self._request("get", field)

    def write_error(self, kind: int, text: str) -> None:
        self._request("write_error", kind, text)

    def write_times(self, times: Times) -> None:
        self._request("write_times", times)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _request(self, *request: Any) -> Any:
        self._pipe.send(request)
        return self._pipe.recv()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.close()
        self._pipe.close()


def _run_child(pipe: Pipe, token: str, parent: int, learners: int) -> None:
    entry = ledger.create_entry(token, parent, learners=learners)
    pipe.send(str(entry.path))
    while True:
        request, *arguments = pipe.recv()
        if request == "set":
            for field, number in arguments[0].items():
                entry[field] = number
        elif request == "write_error":
            entry.write_error(*arguments)
        elif request == "write_times":
            entry.write_times(*arguments)
        pipe.send(entry[arguments[0]] if request == "get" else None)


@pytest.fixture
def token() -> Iterator[str]:
    """With the folder that a parent makes before its first child."""
    made = ledger.new_token()
    ledger.make_folder(made, os.getpid())
    yield made
    ledger.remove_files(made, os.getpid())


@pytest.fixture
def children(token: str) -> Iterator[ChildProcesses]:
    made = ChildProcesses.get_or_create(PEER, token, ACKED_AT_RISK)
    yield made
    made.count_and_remove_all()


def in_child(function: Callable[[], Any]) -> Any:
    """What ``function`` gives, or the text of what it raises, in a forked child."""
    ours, theirs = FORK.Pipe()

    def run() -> None:
        try:
            theirs.send(function())
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = FORK.Process(target=run)
    process.start()
    assert ours.poll(30)
    answer = ours.recv()
    process.join()
    ours.close()
    theirs.close()
    return answer


# The files.


def test_a_child_writes_and_its_parent_reads(token: str, home: Path) -> None:
    with Child(token) as child:
        assert ledger.entry_paths(token, os.getpid()) == [child.path]
        assert ledger.entry_paths(token, os.getpid() + 1) == []
        entry = ledger.LedgerEntry(child.path)
        assert entry.child_pid == child.pid
        assert [entry[field] for field in ledger.FIELDS[:-1]] == [0] * (len(ledger.FIELDS) - 1)
        assert entry.peer_counts == [PeerCounts()]
        child.set(sent=5, acked=3, maybe_lost=1 << 40)
        assert (entry["sent"], entry["acked"], entry["maybe_lost"]) == (5, 3, 1 << 40)
        entry["finish"] = 1
        assert child.get("finish") == 1
        times = Times(connected=1.5, latencies=tuple(range(140)))
        child.write_times(times)
        child.write_error(2, "über" * 2000)
        child.write_error(1, "said later")
        assert entry["error_kind"] == 2
        assert entry.error.startswith("überüber")
        assert len(entry.error.encode()) > 2000
        assert entry.times == times
        assert not entry.is_dead
        child.kill()
        assert entry.is_dead
        entry.close()
        assert (entry["sent"], entry.error[:4]) == (5, "über")
        assert entry.is_dead


def test_files_are_private_and_have_no_holes(token: str) -> None:
    before = os.umask(0)
    try:
        with Child(token) as child:
            assert child.path.stat().st_mode & 0o777 == 0o600
            assert child.path.parent.stat().st_mode & 0o777 == 0o700
            assert child.path.stat().st_size == child.path.stat().st_blocks * 512, "a hole is a fault on a full disk"
    finally:
        os.umask(before)


@pytest.mark.parametrize("how", ["open to all", "a link", "a file"])
def test_a_folder_of_unsafe_ownership_is_refused(token: str, home: Path, how: str) -> None:
    folder = ledger.folder_path(token)
    ledger.remove_files(token, os.getpid())
    other = home / "other"
    if how == "open to all":
        folder.mkdir()
        folder.chmod(0o755)
    elif how == "a link":
        other.mkdir(mode=0o700)
        folder.symlink_to(other)
    else:
        folder.touch(0o600)
    assert in_child(lambda: ledger.create_entry(token, os.getppid())).startswith("PermissionError: ")
    if how != "a file":
        with pytest.raises(PermissionError, match="expected a folder of this user's, for nobody else"):
            ledger.entry_paths(token, os.getpid())
        with pytest.raises(PermissionError):
            ledger.make_folder(token, os.getpid())
    assert not other.exists() or not list(other.iterdir())
    (folder.unlink if how != "open to all" else folder.rmdir)()
    if other.exists():
        other.rmdir()


def test_a_link_in_place_of_a_file_is_not_followed(token: str) -> None:
    with Child(token) as child:
        path = child.path.with_name(f"{os.getpid()}.1.0")
        path.symlink_to(child.path)
        assert ledger.entry_paths(token, os.getpid()) == [child.path]
        path.unlink()


def test_an_unusable_temporary_folder_raises_in_the_child(
    token: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = home / "missing"
    monkeypatch.setattr(tempfile, "tempdir", str(missing))
    monkeypatch.setattr(ledger, "_FALLBACK_FOLDER", str(missing))
    lost = str(missing / Path(token).name)
    with pytest.raises(FileNotFoundError):
        ledger.make_folder(lost, os.getpid())
    with pytest.raises(FileNotFoundError):
        ledger.entry_paths(lost, os.getpid())
    said = in_child(lambda: ledger.create_entry(lost, os.getppid()))
    assert said.startswith("FileNotFoundError: ")
    assert "set TMPDIR to a folder that can be written to" in said
    missing.touch()
    assert "Error: " in in_child(lambda: ledger.create_entry(lost, os.getppid()))
    missing.unlink()


def test_children_use_the_folder_of_their_parent(token: str, home: Path) -> None:
    def elsewhere() -> str:
        tempfile.tempdir = str(home / "elsewhere")
        return str(ledger.create_entry(token, os.getppid()).path.parent)

    assert in_child(elsewhere) == str(ledger.folder_path(token))


def test_a_reused_pid_gets_a_new_file(token: str) -> None:
    parent = os.getpid()

    def begin() -> None:
        os.getpid = lambda: 4711
        ledger.create_entry(token, parent)

    for _ in range(2):
        in_child(begin)
    assert [ledger.LedgerEntry(path).child_pid for path in ledger.entry_paths(token, parent)] == [4711, 4711]


def test_without_file_locks_children_and_waits_raise(
    token: str, children: ChildProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with Child(token) as child:
        child.set(sent=1)
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "lockf", refuse)
            said = in_child(lambda: ledger.create_entry(token, os.getppid()))
            assert said.startswith("OSError: ")
            assert "does not support locks, set TMPDIR" in said
            assert ledger.entry_paths(token, os.getpid()) == [child.path]
            with pytest.raises(ConnectionClosedError, match=f"cannot be looked at, .*{os.strerror(errno.ENOLCK)}"):
                children.wait(Deadline(LONG_S), None)


def test_only_files_of_crashed_runs_are_removed(home: Path) -> None:
    dead = in_child(os.getpid)
    tokens = [ledger.new_token() for _ in range(4)]
    with Child(tokens[0], dead) as orphan, Child(tokens[1]) as mine, Child(tokens[1], dead), Child(tokens[2]) as left:
        orphan.path.with_name(f".{dead}.{dead}.0").touch()  # not even begun
        left.kill()
        others = home / "echo_torch-others"
        others.mkdir(mode=0o700)
        (others / "notes.txt").touch()
        (others / f"{dead}.{dead}.0.txt").touch()
        foreign = home / "echo_torch-foreign"
        foreign.mkdir()
        foreign.chmod(0o755)
        (foreign / f"{dead}.{dead}.0").touch()
        ledger.remove_leftovers(home)
        assert orphan.path.exists(), "it lives"
        assert [path.name for path in orphan.path.parent.iterdir()] == [orphan.path.name]
        orphan.kill()
        with Child(tokens[3]) as first:
            assert first.path.exists()
        assert not orphan.path.parent.exists()
        assert mine.path.exists()
        assert left.path.exists(), "its parent has not counted it"
        assert (others / "notes.txt").exists()
        assert (foreign / f"{dead}.{dead}.0").exists()
    for token in tokens:
        ledger.remove_files(token, os.getpid())
    ledger.remove_leftovers(home)
    for folder in (others, foreign):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


# Waiting.


def test_wait_returns_once_everything_sent_before_is_acked(token: str, children: ChildProcesses) -> None:
    children.wait(Deadline(LONG_S), None)
    with Child(token) as one, Child(token) as two:
        one.set(sent=5, acked=5)
        two.set(sent=3, acked=2)
        with running(lambda: children.wait(Deadline(LONG_S), None)) as outcomes:
            time.sleep(0.1)
            one.set(sent=7)  # is for another wait
            two.set(acked=3)
        assert outcomes == [None]
        one.set(acked=7)
    assert children.counts()["acked"] == 10


def test_a_wait_that_times_out_names_the_processes_and_can_be_repeated(token: str, children: ChildProcesses) -> None:
    with Child(token) as one, Child(token) as two, Child(token) as three:
        one.set(sent=5, acked=1)
        two.set(sent=3, acked=2)
        three.set(sent=9, acked=9)
        for deadline, stall, what in [
            (Deadline(0.05), None, "not done within 0.05 s"),
            (Deadline(LONG_S), 0.05, "nothing was acked for 0.05 s"),
            (Deadline(None), 0.05, "nothing was acked for 0.05 s"),
        ]:
            with pytest.raises(DeliveryTimeoutError, match=what) as error:
                children.wait(deadline, stall)
            check_error(error.value, DeliveryTimeoutError, PEER, 5)
            named = re.search(r"of processes (.*);", str(error.value))
            assert named
            assert set(named[1].split(", ")) == {str(one.pid), str(two.pid)}
        one.set(acked=5)
        two.set(acked=3)
        children.wait(Deadline(LONG_S), None)


def test_a_killed_child_is_raised_once_and_counted(token: str, children: ChildProcesses) -> None:
    with Child(token) as one, Child(token) as two:
        one.set(sent=30, acked=20)
        one.write_times(Times(blocked=(0.25, 0.0, 0.5, 0.0), latencies=(1,) * 140))
        two.set(sent=2, acked=2)
        two.write_times(Times(connected=3.0, checking=1.0, sending=2.0, waiting=(1.0, 2.0, 3.0, 4.0)))
        times = Times(3.0, 1.0, 2.0, (0.25, 0.0, 0.5, 0.0), (1.0, 2.0, 3.0, 4.0), (1,) * 140)
        assert children.times() == times
        with running(lambda: children.wait(Deadline(LONG_S), None)) as outcomes:
            time.sleep(0.05)
            one.kill()
        check_error(outcomes[0], ConnectionClosedError, PEER, 10)
        assert f"process {one.pid}: died with 10 samples un-acked" in str(outcomes[0])
        children.wait(Deadline(LONG_S), None)
        counts = children.counts()
        assert (counts["sent"], counts["acked"]) == (32, 22)
        assert counts["maybe_lost"] == 10 + ACKED_AT_RISK
        assert not one.path.exists()
        two.kill()
        children.wait(Deadline(LONG_S), None)
        assert children.counts() == {**counts, "maybe_lost": counts["maybe_lost"] + 2}
        assert children.times() == times
        assert [path.name for path in two.path.parent.iterdir()] == [f"{os.getpid()}.0.parent"]


def test_later_acks_of_one_learner_do_not_hide_the_loss_of_another(token: str, children: ChildProcesses) -> None:
    with Child(token, learners=2) as one:
        one.set(sent=10, acked=5)
        with running(lambda: children.wait(Deadline(LONG_S), None)) as outcomes:
            time.sleep(0.05)
            one.set(sent=20)
            one.write_error(ledger.ERROR_KINDS.index(ConnectionClosedError), "the reason")
            one.set(acked=15, closed=1)  # of any
        assert isinstance(outcomes[0], ConnectionClosedError)
        assert f"process {one.pid}: the reason" in str(outcomes[0])


def test_samples_lost_with_a_childs_connection_are_counted_once(token: str, children: ChildProcesses) -> None:
    for acked, told, expected in [(0, 20, 20), (10, 18, 18), (10, 10, 18)]:
        with Child(token) as one:
            before = children.counts()["maybe_lost"]
            one.set(sent=20, acked=acked, maybe_lost=told)
            one.write_error(ledger.ERROR_KINDS.index(ConnectionClosedError), "the reason")
            with pytest.raises(ConnectionClosedError):
                children.wait(Deadline(LONG_S), None)
            assert children.counts()["maybe_lost"] == before + told
            one.kill()
            assert children.counts()["maybe_lost"] == before + expected


def test_a_live_child_that_is_removed_counts_no_loss(token: str, children: ChildProcesses) -> None:
    with Child(token) as one:
        one.set(sent=20, acked=20)
        children.count_and_remove_all()
        assert children.counts()["maybe_lost"] == 0


def test_a_child_whose_file_was_deleted_is_counted_until_it_ends(token: str, children: ChildProcesses) -> None:
    with Child(token) as one:
        one.set(sent=5, acked=5)
        assert children.counts()["sent"] == 5
        one.path.unlink()
        one.set(sent=30)
        with pytest.raises(DeliveryTimeoutError, match="25 samples un-acked"):
            children.wait(Deadline(0.0), None)
        one.set(acked=20)
        os.kill(one.pid, signal.SIGKILL)  # it is a zombie for some time
        with pytest.raises(ConnectionClosedError, match="died with 10 samples un-acked"):
            children.wait(Deadline(LONG_S), None)
        counts = children.counts()
        assert (counts["sent"], counts["acked"], counts["maybe_lost"]) == (30, 20, 10 + ACKED_AT_RISK)


@pytest.mark.parametrize("kind", [DeliveryTimeoutError, ConnectionClosedError, ProtocolError])
def test_a_childs_connection_error_is_raised_once(token: str, children: ChildProcesses, kind: type[Exception]) -> None:
    with Child(token) as one, Child(token) as two:
        one.set(sent=5, acked=1, maybe_lost=4)
        one.write_error(ledger.ERROR_KINDS.index(kind), "the reason")
        two.set(sent=2)
        two.write_error(ledger.ERROR_KINDS.index(DeliveryTimeoutError), "another")
        with pytest.raises(kind) as error:
            children.wait(Deadline(LONG_S), None)
        assert type(error.value) is kind
        assert f"process {one.pid}: the reason" in str(error.value)
        assert f"process {two.pid}: another" in str(error.value)
        assert error.value.unacked == 6  # type: ignore[attr-defined]
        children.wait(Deadline(LONG_S), None)
        assert one.path.exists(), "it lives"
        one.set(closed=1)
        assert children.counts()["maybe_lost"] == 4
        assert not one.path.exists()


def test_daemonic_children_are_asked_to_close_and_waited_for(token: str, children: ChildProcesses) -> None:
    with Child(token) as one, Child(token) as two, Child(token) as three:
        for child in (one, two):
            child.set(daemon=1)
        children.request_close()
        assert [child.get("finish") for child in (one, two, three)] == [1, 1, 0]
        with running(lambda: children.wait_for_close(Deadline(LONG_S))) as outcomes:
            one.set(closed=1)
            two.kill()
        assert outcomes == [None]


def test_a_child_that_ignores_the_close_request_is_given_up(
    token: str, children: ChildProcesses, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("echo_torch.processes.parent.CLOSE_ANSWER_S", 0.2)
    with Child(token) as child:
        child.set(sent=3, acked=3, daemon=1)
        children.request_close()
        began = time.monotonic()
        children.wait_for_close(Deadline(LONG_S))
        assert 0.2 <= time.monotonic() - began < LONG_S / 2
    assert caplog.messages == [f"{PEER}: processes {child.pid} did not answer for 0.2 s"]


def test_acked_never_exceeds_sent_while_children_write(token: str, children: ChildProcesses) -> None:
    def count_on() -> None:
        entry = ledger.create_entry(token, os.getppid())
        number = 0
        while True:
            number += 1
            entry["sent"] = number
            entry["acked"] = number

    processes = [FORK.Process(target=count_on, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    eventually(lambda: children.counts()["acked"] > 0)
    for _ in range(2000):
        counts = children.counts()
        assert counts["acked"] <= counts["sent"]
    for process in processes:
        process.kill()
        process.join()
    ledger.remove_files(token, os.getpid())


def test_an_unfinished_file_is_removed_with_its_parent(token: str, home: Path) -> None:
    folder = ledger.folder_path(token)
    (folder / f".{os.getpid()}.1.0").touch()
    ledger.remove_files(token, os.getpid())
    assert not folder.exists()


def test_a_relative_temporary_folder_is_resolved_once(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(tempfile, "tempdir", ".")
    made = ledger.new_token()
    monkeypatch.chdir("/")
    assert ledger.folder_path(made).parent == home


def test_all_processes_share_one_fallback_folder(token: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_FALLBACK_FOLDER", str(home / "elsewhere"))
    (home / "elsewhere").mkdir()
    gone = str(home / "gone" / Path(token).name)
    monkeypatch.setattr(tempfile, "tempdir", str(home / "another"))
    assert ledger.folder_path(gone) == home / "elsewhere" / ledger.folder_path(token).name
    (home / "elsewhere").rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_another_user_gets_a_folder_of_its_own(token: str) -> None:
    """As one may that was handed the sink, and is no child; it may not even look into this one's."""

    def as_another() -> tuple[int, bool]:
        os.setuid(65534)
        me = os.getpid()
        ledger.make_folder(token, me)
        before = len(ledger.entry_paths(token, me))
        entry = ledger.create_entry(token, me)
        found = ledger.entry_paths(token, me) == [entry.path]
        entry.close()
        ledger.remove_files(token, me)
        return before, found

    with Child(token):
        assert in_child(as_another) == (0, True)


def test_a_full_disk_raises_in_the_child(token: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="no room for 4096 bytes in") as caught:
            ledger.create_entry(token, os.getppid())
        assert caught.value.errno == errno.ENOSPC
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in ledger.folder_path(token).iterdir()] == [f"{os.getpid()}.0.parent"]


def test_more_children_than_files_can_be_open(token: str, children: ChildProcesses) -> None:
    """Ended ones, of epochs during which nobody waited."""
    count = 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def many() -> None:
        for number in range(count):
            entry = ledger.create_entry(token, os.getppid())
            entry["sent"] = entry["acked"] = number
            entry["closed"] = 1
            entry.close()

    in_child(many)
    assert len(ledger.entry_paths(token, os.getpid())) == count
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(open_descriptors()) + 20, hard))
    try:
        children.wait(Deadline(LONG_S), None)
        assert children.counts()["acked"] == sum(range(count))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("closed", [True, False])
def test_copies_of_a_sink_count_each_child_once_and_the_last_removes_the_files(token: str, closed: bool) -> None:
    """Of a sink that was not closed, a child may live on: its file stays until it or the process ends."""
    first, second = (
        ChildProcesses.get_or_create(PEER, token, ACKED_AT_RISK),
        ChildProcesses.get_or_create(PEER, token, ACKED_AT_RISK),
    )
    with Child(token) as one, Child(token) as two:
        one.set(sent=3, acked=3, closed=1)
        two.set(sent=4, acked=4)
        assert first.counts()["sent"] == second.counts()["sent"] == 7
        if closed:
            first.set_closed()
        del first
        assert two.path.exists()
        del second
        assert not one.path.exists()
        assert two.path.exists() == two.path.parent.exists() == (not closed)


def test_a_forked_copy_neither_waits_nor_removes_anything(token: str) -> None:
    children = ChildProcesses.get_or_create(PEER, token, ACKED_AT_RISK)
    with Child(token) as child:
        child.set(sent=1)
        assert children.counts()["sent"] == 1

        def use() -> int:
            nonlocal children
            children.wait(Deadline(LONG_S), None)
            children.request_close()
            children.count_and_remove_all()
            sent = children.counts()["sent"]
            del children
            return sent

        assert in_child(use) == 1
        assert child.path.exists()
        assert child.get("finish") == 0
        children.count_and_remove_all()


@pytest.mark.slow
def test_threads_that_wait_and_count_while_children_come_and_go(
    token: str, children: ChildProcesses, descriptors: None
) -> None:
    stop = threading.Event()

    def count() -> None:
        last = 0
        while not stop.is_set():
            sent = children.counts()["sent"]
            assert sent >= last
            last = sent

    def wait() -> None:
        while not stop.is_set():
            children.wait(Deadline(LONG_S), None)

    with running(count, wait, wait, count) as outcomes:
        for _ in range(20):
            with Child(token) as one, Child(token) as two:
                for child in (one, two):
                    child.set(sent=2)
                    child.set(acked=2)
                one.set(closed=1)
        stop.set()
    assert outcomes == [None] * 4
    counts = children.counts()
    assert (counts["sent"], counts["acked"], counts["maybe_lost"]) == (80, 80, 20 * 2)


# Struck before it has a name, a file is closed all the same, but not without a word.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in.*WeakSet:pytest.PytestUnraisableExceptionWarning")
def test_interrupted_waits_count_each_child_once_and_release_the_lock(
    token: str, children: ChildProcesses, descriptors: None
) -> None:
    """Ctrl-C strikes anywhere in what main does while its children come and go."""
    chance = random.Random(0)
    armed = False
    strikes = 0

    def strike(*_: object) -> None:
        nonlocal armed, strikes
        if armed:
            armed = False
            strikes += 1
            raise KeyboardInterrupt

    total = 0
    with alarms(strike):
        for _ in range(30):
            with ExitStack() as stack:
                both = [stack.enter_context(Child(token)) for _ in range(2)]
                for child in both:
                    child.set(sent=3, acked=3)
                both[0].set(closed=1)
                both[1].kill()
                total += 6
                for _ in range(20):
                    with suppress(KeyboardInterrupt):
                        try:
                            armed = True
                            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 6e-4))
                            children.wait(Deadline(LONG_S), None)
                            assert children.counts()["sent"] == total
                        finally:
                            armed = False
    assert strikes > 25
    with running(children.counts) as outcomes:
        pass
    assert outcomes == [None]
    counts = children.counts()
    assert (counts["sent"], counts["acked"], counts["maybe_lost"]) == (total, total, total // 2)


# Reporting, by real sinks.


def acking(conn: PeerConnection) -> None:
    conn.send_handshake(SAMPLE)
    conn.receive_all(ack_every=8)


def samples(first: int, count: int) -> dict[str, Any]:
    return {"id": np.arange(first, first + count)}


def numbers(peer: Peer) -> list[int]:
    return sorted(int(number) for conn in peer.connections for number in np.frombuffer(bytes(conn.received), np.int64))


def sink_to(peer: Peer, **options: Any) -> EchoSink:
    return EchoSink("127.0.0.1", peer.port, SAMPLE, resend_at_close=False, **options)


def test_unpickling_a_sink_many_times_leaks_nothing(home: Path) -> None:
    """Each copy is dropped; what it sent is delivered first, and told of."""
    with Peer(acking) as peer, sink_to(peer) as sink, FORK.Pool(1) as pool:
        before = pool.apply(_left_open)
        for number in range(20):
            pool.apply(_send_and_drop, (sink, number * 100))
        sink.wait()
        assert sink.stats().samples_acked == 2000
        eventually(lambda: pool.apply(_left_open) == before)
        pool.close()
        pool.join()
    assert numbers(peer) == list(range(2000))


def _send_and_drop(sink: EchoSink, first: int) -> None:
    sink.send(samples(first, 100))


def _left_open() -> tuple[int, int]:
    return threading.active_count(), len(open_descriptors())


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_child_that_drops_its_sink_still_reports_everything(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # the fork server, which outlives this, keeps files in the temporary folder
        patch.setattr(tempfile, "tempdir", None)
        multiprocessing.forkserver.ensure_running()
    context = multiprocessing.get_context(method)
    with Peer(acking) as peer, sink_to(peer, max_inflight_msgs=4) as sink:
        process = context.Process(target=_drop_and_end, args=([sink],))
        process.start()
        process.join()
        assert process.exitcode == 0
        sink.wait(0.0)
        assert (sink.stats().samples_acked, sink.stats().in_flight) == (5000, 0)
    assert numbers(peer) == list(range(5000))


def _drop_and_end(sinks: list[EchoSink]) -> None:
    sinks.pop().send(samples(0, 5000))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_daemonic_child_exits_when_its_parent_is_killed(method: str, home: Path) -> None:
    heard = Gate()

    def silent(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(8)
        heard.open()
        conn.receive_all()

    program = str(HELPERS / "orphan.py")
    with Peer(silent) as peer:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", program, method, str(peer.port)],
            env={**os.environ, "TMPDIR": str(home)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            heard.wait()
            process.kill()
            said, _ = process.communicate(timeout=LONG_S)  # until all have ended that it started
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert "send() on a client that was closed" in said or "the client was closed; send() with" in said
    for folder in home.glob("pymp-*"):  # the fork server's, which nobody removes
        shutil.rmtree(folder)
    ledger.remove_leftovers(home)


def test_acks_during_a_childs_close_are_reported() -> None:
    """By a learner that takes its time."""
    closing, go, done = FORK.Event(), Gate(), FORK.Event()

    def slow(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(8 * 10)
        assert closing.wait(LONG_S)
        conn.ack(6)
        go.wait()
        conn.ack(4)
        conn.receive_all()

    def work() -> None:
        sink.send(samples(0, 10))
        with suppress(ConnectionClosedError):
            while True:
                sink.send(samples(0, 0))
                time.sleep(0.001)
        closing.set()
        done.wait()

    with Peer(slow) as peer:
        sink = sink_to(peer)
        process = FORK.Process(target=work, daemon=True)
        process.start()
        eventually(lambda: sink.stats().samples_sent == 10)
        with running(sink.close) as outcomes:
            eventually(lambda: sink.stats().samples_acked == 6)
            go.open()
        assert outcomes == [None]
        assert sink.stats().samples_acked == 10
        done.set()
        process.join()


def test_accepted_samples_are_reported_before_send_returns() -> None:
    """Well or badly, even if the child dies just then."""

    def silent(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive_all()

    def work(count: int) -> None:
        sink.connect()
        with suppress(DeliveryTimeoutError):
            sink.send(samples(0, count), timeout=0.0)
        os.kill(os.getpid(), signal.SIGKILL)

    with Peer(silent) as peer:
        sink = sink_to(peer, max_inflight_msgs=10, buffer_bytes=20 * 8)
        total = 0
        for count, taken in [(3, 3), (12, 12), (1000, 12)] * 3:
            process = FORK.Process(target=work, args=(count,))
            process.start()
            process.join()
            total += taken
            assert sink.stats().samples_sent == total
            with pytest.raises(ConnectionClosedError) as error:
                sink.wait(LONG_S)
            check_error(error.value, ConnectionClosedError, sink.peer, taken)
        assert sink.stats().maybe_lost == total
        sink.close()


def test_a_child_interrupted_at_exit_still_delivers(home: Path) -> None:
    struck, go = FORK.Event(), Gate()

    def slow(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(8 * 10)
        go.wait()
        conn.ack(10)
        conn.receive_all()

    def strike(*_: object) -> None:
        if not struck.is_set():
            struck.set()
            raise KeyboardInterrupt

    def work() -> None:
        signal.signal(signal.SIGINT, strike)
        sink.send(samples(0, 10))

    with Peer(slow) as peer, sink_to(peer) as sink:
        process = FORK.Process(target=work)
        process.start()
        eventually(lambda: sink.stats().samples_sent == 10)
        (path,) = home.glob(f"echo_torch-*/*.{process.pid}.*")
        entry = ledger.LedgerEntry(path)
        eventually(lambda: entry["finish"] == 1)
        entry.close()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        while not struck.wait(0.1):  # it came just before a wait, which it then does not end
            os.kill(process.pid, signal.SIGINT)
        process.join(0.2)  # as it would, if it ended
        go.open()
        process.join()
        sink.wait()
        assert sink.stats().samples_acked == 10


def test_close_without_a_timeout_stops_at_the_stall_timeout() -> None:
    def silent(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive_all()

    done = FORK.Event()

    def work() -> None:
        sink.send(samples(0, 20))
        done.wait()
        os._exit(0)

    with Peer(silent) as peer:
        sink = sink_to(peer, stall_timeout=0.1)
        process = FORK.Process(target=work)
        process.start()
        eventually(lambda: sink.stats().samples_sent == 20)
        with running(lambda: sink.close(None)) as outcomes:
            pass
        check_error(outcomes[0], DeliveryTimeoutError, sink.peer, 20)
        assert "nothing was acked for 0.1 s (stall_timeout)" in str(outcomes[0])
        done.set()
        process.join()


def test_an_unknown_client_error_in_a_child_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        def __init__(self, *_: Any) -> None:
            pass

        def send(self, data: Any) -> None:
            pass

        def wait(self) -> None:
            raise LookupError("odd")

        def close(self) -> None:
            pass

    sink = EchoSink("nobody", 1, SAMPLE, client=Odd)
    done = FORK.Event()

    def use() -> None:
        sink.send(samples(0, 1))
        done.wait()

    process = FORK.Process(target=use, daemon=True)
    process.start()
    eventually(lambda: sink.stats().samples_sent == 1)
    with pytest.raises(ConnectionClosedError, match="odd"):
        sink.wait(10)
    with running(lambda: sink.close(LONG_S)) as outcomes:
        pass
    assert outcomes == [None]
    done.set()
    process.join()


def test_without_a_ledger_folder_only_children_fail(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(home / "missing"))
    monkeypatch.setattr(ledger, "_FALLBACK_FOLDER", str(home / "missing"))
    with Peer(acking) as peer, sink_to(peer, on_error="warn") as sink:
        sink.send(samples(0, 10))
        sink.wait()
        told = in_child(lambda: sink.send(samples(10, 10)))
        assert told.startswith("RuntimeError: 127.0.0.1")
        assert f"cannot tell process {os.getpid()} what it sends" in told
        assert "missing" in told
    assert numbers(peer) == list(range(10))


@pytest.mark.parametrize("before", [True, False], ids=["started", "not started"])
def test_a_daemonic_child_cannot_send_after_its_parent_closed(before: bool) -> None:
    go, (ours, theirs) = FORK.Event(), FORK.Pipe()

    def work() -> None:
        go.wait()
        for _ in range(2):
            try:
                sink.send(samples(0, 10))
            except Exception as error:
                theirs.send(f"{type(error).__name__}: {error}")

    with Peer(acking) as peer:
        sink = sink_to(peer, on_error="warn")
        process = FORK.Process(target=work, daemon=True)
        if before:
            process.start()
        sink.close()
        if not before:
            process.start()
        go.set()
        process.join()
        assert [ours.recv(), ours.recv()] == [
            f"ConnectionClosedError: {sink.peer}: this sink was closed; 0 samples un-acked"
        ] * 2
        assert not peer.connections
        assert sink.stats().samples_sent == 0
    ours.close()
    theirs.close()


def test_a_daemonic_child_that_starts_during_close_is_refused(token: str) -> None:
    """A file that its parent may not have seen is none any more."""
    ledger.set_flag(token, os.getpid(), ledger.SINK_CLOSED)
    assert in_child(lambda: ledger.create_entry(token, os.getppid(), daemon=True)) == (
        "ConnectionClosedError: this sink was closed"
    )
    assert ledger.entry_paths(token, os.getpid()) == []
    with Child(token) as child:
        assert ledger.entry_paths(token, os.getpid()) == [child.path], "it is no daemon"


def test_child_files_are_removed_when_the_sink_was_dropped(home: Path) -> None:
    """As multiprocessing does with the arguments of a process, when that has started."""

    def rank(port: int) -> None:
        go = FORK.Event()
        process = FORK.Process(target=_send_when_told, args=(EchoSink("127.0.0.1", port, SAMPLE), go))
        process.start()
        go.set()
        process.join()
        assert list(home.iterdir())

    with Peer(acking) as peer:
        process = FORK.Process(target=rank, args=(peer.port,))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert not list(home.iterdir())


def _send_when_told(sink: EchoSink, go: Any) -> None:
    go.wait()
    sink.send(samples(0, 10))


def test_a_non_daemonic_child_keeps_sending_after_its_parent_closed() -> None:
    with Peer(acking) as peer:
        go = FORK.Event()

        def work() -> None:
            sink.send(samples(0, 10))
            go.wait()
            sink.send(samples(10, 10))
            sink.close()

        sink = sink_to(peer)
        process = FORK.Process(target=work)
        process.start()
        eventually(lambda: sink.stats().samples_sent == 10)
        sink.close()
        assert sink.stats().samples_acked == 10
        go.set()
        process.join()
        assert process.exitcode == 0
    assert numbers(peer) == list(range(20))


# What somebody else does to the folder, and what cannot be looked at.


def removed(path: Path) -> None:
    shutil.rmtree(path)


def send_and_wait(sink: EchoSink, sent: Any, go: Any) -> None:
    sink.send(samples(0, 10))
    sent.set()
    assert go.wait(LONG_S)
    time.sleep(0.3)  # its thread looks every 0.1 s
    with pytest.raises(RuntimeError, match=r"cannot tell process \d+ what it sends: its file was removed"):
        sink.send(samples(10, 10))
    sink.wait(LONG_S)
    sink.close()


@pytest.mark.parametrize("whole_temporary_folder", [False, True])
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_folder_that_is_removed_unseen_is_no_success(
    home: Path, whole_temporary_folder: bool, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The parent has never looked, and a child has sent: it must not seem that there was none."""
    with Peer(acking) as peer:
        sink = sink_to(peer, on_error=on_error)
        sent, go = FORK.Event(), FORK.Event()
        process = FORK.Process(target=send_and_wait, args=(sink, sent, go))
        process.start()
        assert sent.wait(LONG_S)
        (folder,) = home.glob("echo_torch-*")
        removed(home if whole_temporary_folder else folder)
        for call in (sink.wait, sink.close):
            if on_error == "raise":
                with pytest.raises(
                    ConnectionClosedError, match=f"what child processes sent cannot be looked at.*{folder.name}"
                ):
                    call(LONG_S)
            else:
                caplog.clear()
                call(LONG_S)
                assert any("cannot be looked at" in text for text in caplog.messages)
        assert sink.stats().samples_sent == 0
        go.set()
        process.join()
        assert process.exitcode == 0
        del sink
        home.mkdir(exist_ok=True)


def test_a_child_whose_file_was_seen_is_waited_for_when_the_folder_is_gone(
    token: str, children: ChildProcesses
) -> None:
    """What it writes is memory that both share."""
    with Child(token) as child:
        child.set(sent=5, acked=3)
        assert children.counts()["sent"] == 5
        removed(child.path.parent)
        with running(lambda: children.wait(Deadline(LONG_S), None)) as outcomes:
            child.set(sent=5, acked=5)
        assert isinstance(outcomes[0], ConnectionClosedError)
        assert children.counts()["acked"] == 5


def test_a_sink_without_children_needs_no_folder_and_no_descriptor(home: Path) -> None:
    with Peer(acking) as peer:
        sink = sink_to(peer).connect()
        sink.send(samples(0, 10))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                os.open("/dev/null", os.O_RDONLY)
            sink.wait(LONG_S)
            assert sink.stats().samples_acked == 10
            assert sink.state_dict()["acked_through"] == 0
            sink.close(LONG_S)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not list(home.iterdir())


def test_without_descriptors_the_connection_is_closed_and_then_said_what_cannot_be_looked_at(home: Path) -> None:
    with Peer(acking) as peer:
        sink = sink_to(peer).connect()
        sink.send(samples(0, 10))
        process = FORK.Process(target=int)
        process.start()
        process.join()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # even those that the close frees are too many
        try:
            with pytest.raises(ConnectionClosedError, match=r"cannot be looked at.*Too many open files"):
                sink.close(LONG_S)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("echo_torch 127")]
        assert sink.stats().samples_acked == 10
        sink.close()


def test_the_folder_of_a_living_sink_is_not_swept(home: Path) -> None:
    """Nor can somebody else take its name, therefore. It is empty between two children."""
    with Peer(acking) as peer:
        sink, other = sink_to(peer), sink_to(peer)
        for each in (sink, other):
            pickle.dumps(each)
        assert len(list(home.glob("echo_torch-*"))) == 2
        other.close()
        ledger.remove_leftovers(home)
        assert len(list(home.glob("echo_torch-*"))) == 2
        del other, each
        (folder,) = home.glob("echo_torch-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert [path.name for path in folder.iterdir()] == [f"{os.getpid()}.0.parent"]
        sink.close()
        del sink
    assert not list(home.iterdir())


def test_a_folder_of_a_crashed_run_is_swept_even_before_it_has_its_name(home: Path) -> None:
    dead = in_child(os.getpid)
    for name in (f"echo_torch-{32 * 'a'}-{os.getuid()}", f".echo_torch-{32 * 'b'}-{os.getuid()}"):
        (home / name).mkdir(mode=0o700)
        (home / name / f"{dead}.0.parent").touch()
    being_made = home / f".echo_torch-{32 * 'c'}-{os.getuid()}"
    being_made.mkdir(mode=0o700)
    ledger.remove_leftovers(home)
    assert list(home.iterdir()) == [being_made]
    being_made.rmdir()


def test_a_temporary_folder_in_which_nothing_can_be_made_ends_a_childs_send(home: Path) -> None:
    """At once: it does not try again and again. The parent's own connection is none the worse."""
    tempfile.tempdir = "/proc"
    with Peer(acking) as peer:
        sink = sink_to(peer)
        sink.send(samples(0, 10))
        began = time.monotonic()
        said = in_child(lambda: sink.send(samples(10, 10), timeout=LONG_S))
        assert said.startswith("RuntimeError: ")
        assert "set TMPDIR to a folder that can be written to" in said
        assert time.monotonic() - began < LONG_S / 2
        sink.wait(LONG_S)
        sink.close()
    assert numbers(peer) == list(range(10))


def test_threads_that_fork_at_the_same_time_make_one_folder(token: str, home: Path) -> None:
    ledger.remove_files(token, os.getpid())
    for _ in range(50):
        token = ledger.new_token()
        children = ChildProcesses.get_or_create(PEER, token, ACKED_AT_RISK)
        with running(*[children.prepare] * 4) as outcomes:
            pass
        assert outcomes == [None] * 4
        folder = ledger.folder_path(token)
        assert [path.name for path in folder.iterdir()] == [f"{os.getpid()}.0.parent"]
        children.set_closed()
        del children
        assert not folder.exists()
    assert not list(home.iterdir())
