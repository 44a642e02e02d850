"""Fixtures, and what holds after every test: no thread of ours is left, and no descriptor."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import issue_all
from clock import Clock
from hypothesis import settings
from leaks import CLEANUP_TIMEOUT_S, assert_threads_end, freeze, open_descriptors, our_threads
from nursery import NURSERY

# For torch, here and in what the tests start, and before it is imported: several threads would wait for each other in
# steps this small, and a process that was forked after they had worked waits for ever for those that it does not have.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("thorough", max_examples=2000)
"""For `--hypothesis-profile`: twenty times as many examples as by default, where a test does not say how many."""


UNDIVIDED = ("test_ray.py", "test_lightning.py")
"""Those whose tests share what takes long to start, or to import."""
WAITING = ("test_keepalive.py",)
"""Those that do little but wait, for up to half a minute."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuts", type=int, help="cuts for each case of test_total_queue, and print what was counted")
    parser.addoption("--loaders", action="store_true", help="all cases of test_loaders, and print what was counted")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: modules whose tests share what takes long to start are not divided among processes."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if module.endswith(UNDIVIDED) else nodeid

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread what waits over the rest, beside which it costs nothing; at the end all others would wait for it."""
    waiting = [item for item in items if item.path.name in WAITING]
    others = [item for item in items if item.path.name not in WAITING]
    for number, item in enumerate(waiting):
        others.insert(number * len(others) // len(waiting), item)
    items[:] = others


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With ``--cuts`` or ``--loaders``: a table of what the cases recorded, failed ones too."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())]
    for option, title in (("cuts", "total queue"), ("loaders", "loaders")):
        rows = [value for report in reports for name, value in report.user_properties if name == title]
        if not config.getoption(option) or not rows:
            continue
        terminalreporter.section(title)
        for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
            terminalreporter.line(f"| {' | '.join(map(str, cells))} |")


def pytest_collection_finish() -> None:
    freeze()


@pytest.fixture
def clock() -> Clock:
    """To be overridden by tests, which know the module whose time it shall tell."""
    return Clock()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificate of a CA, ``ca.pem``, and those that it issued."""
    folder = tmp_path_factory.mktemp("certificates")
    issue_all(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _nursery() -> None:
    """Begins it before any test, so that no test seems to leave its descriptor."""
    NURSERY.begin()


@pytest.fixture(autouse=True)
def _default_start_method() -> None:
    """Has processes started as by default: importing torchrl, for its own tests, has all of them spawned."""
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]
    multiprocessing.get_start_method()  # which settles it: torchrl takes another where nothing is


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Fails a test that leaves a thread of echo_torch behind."""
    yield
    if our_threads():
        gc.collect()
    assert_threads_end()


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Fails a test that leaves more open file descriptors than it found."""
    before = open_descriptors()
    yield
    gc.collect()
    deadline = time.monotonic() + CLEANUP_TIMEOUT_S
    while len(after := open_descriptors()) > len(before) and time.monotonic() < deadline:
        time.sleep(0.01)  # a connection whose constructor was interrupted ends on its own thread
    assert len(after) <= len(before), sorted(after.values())
