"""The examples, run as a reader would run them: in a process of their own, with what they print as the evidence."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"

RUN_S = 90.0
"""Seconds for a whole run; it takes less than ten."""
GONE_S = 20.0
"""Seconds in which all its processes must have ended after it did; they take milliseconds."""


@contextlib.contextmanager
def running(*options: str) -> Iterator[subprocess.Popen[str]]:
    """The quickstart, in a process group of its own, of which nothing is left in the end."""
    process = subprocess.Popen(
        [sys.executable, str(QUICKSTART), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def alive(group: int) -> list[str]:
    """The processes of a group that still run, by their stat lines. Nobody may have collected those that ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            line = stat.read_text()
            state, _parent, its_group = line.rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(line)
    return found


def assert_all_gone(group: int) -> None:
    deadline = time.monotonic() + GONE_S
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(group)


def figures(pattern: str, report: str) -> list[float]:
    """The numbers that the groups of a pattern match, on the one line that it matches."""
    (line,) = re.findall(rf"^{pattern}", report, re.MULTILINE)
    return [float(number.replace(",", "")) for number in ([line] if isinstance(line, str) else line)]


@pytest.mark.parametrize("batch_size", [64, 100])
def test_quickstart_delivers_every_sample(batch_size: int) -> None:
    with running("--epochs", "2", "--batch-size", str(batch_size)) as process:
        # Both pipes end only when no process holds them any more, so nothing that it started keeps its stdout.
        report, errors = process.communicate(timeout=RUN_S)
        assert process.returncode == 0, errors
        assert_all_gone(process.pid)
    samples = 2 * 1504
    assert figures(r"sent +([\d,]+) samples", report) == [samples]
    assert figures(r"received +([\d,]+) samples", report) == [samples]
    (accuracy,) = figures(r"accuracy +([\d.]+)%", report)
    assert 80 < accuracy <= 100
    share, sink_s, loop_s = figures(r"sink cost +([\d.]+)% .*: ([\d.]+) s of ([\d.]+) s", report)
    assert 0 < sink_s < loop_s
    assert share == pytest.approx(100 * sink_s / loop_s, abs=1)


def test_quickstart_killed_leaves_no_process() -> None:
    with running("--epochs", "1000") as process:
        assert process.stdout is not None
        assert "listens on port" in process.stdout.readline()
        process.kill()
        process.communicate(timeout=GONE_S)
        assert process.returncode == -signal.SIGKILL
        assert_all_gone(process.pid)


@pytest.fixture(scope="module")
def quickstart() -> dict[str, Any]:
    """The names that the example defines, without a run of it."""
    return runpy.run_path(str(QUICKSTART))


@pytest.mark.parametrize(
    ("indices", "flip", "says"),
    [
        ([2, 0, 1], 0, None),
        ([2, 0, 1, 2], 0, None),
        ([2], 0, "2 samples missing, such as (epoch, index) (0, 0)"),
        ([2, 0, 1, 5], 0, "1 samples never sent, such as (epoch, index) (0, 5)"),
        ([2, 0, 1], 1, "logits of 1 samples not as it was sent"),
        ([2, 0, 1, 2], 1, "logits of 1 samples not as it was sent"),
    ],
    ids=["right", "a duplicate", "missing", "never sent", "one bit", "one bit of a duplicate"],
)
def test_quickstart_check_fails_when_it_should(
    quickstart: dict[str, Any], indices: list[int], flip: int, says: str | None
) -> None:
    sent = torch.randn(1, 6, 10)  # one epoch of six digits, of which three are for training
    logits = sent[0, indices].numpy()
    logits.view(np.uint32)[-1, -1] ^= flip
    received = {"epoch": np.zeros(len(indices), np.int64), "index": np.array(indices), "logits": logits}
    expectation = pytest.raises(SystemExit, match=re.escape(says)) if says else contextlib.nullcontext()
    with expectation:
        quickstart["check_received"](received, {(0, 0), (0, 1), (0, 2)}, {"logits": sent})
