"""Hosts that vanish without a word, in a network of their own whose link goes down, which takes root on Linux."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("vanishing.py")
RUN_S = 90.0


def vanish(when: str) -> dict[str, Any]:
    command = ["unshare", "--net", sys.executable, str(PROGRAM), when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=RUN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


@pytest.mark.parametrize(
    ("when", "in_flight", "says"),
    [("idle", 0, "timed out"), ("busy", 1, "the same bytes were sent again"), ("full", 256, "asked 2 times in vain")],
)
def test_a_host_that_vanishes_is_noticed(when: str, in_flight: int, says: str) -> None:
    """Whether or not anything is under way, and with what was un-acked counted; a paused learner is no such host."""
    report = vanish(when)
    assert report["closed"]
    assert report["in_flight"] == report["unacked"] == in_flight
    assert says in report["error"]
    assert report["seconds"] < 40
