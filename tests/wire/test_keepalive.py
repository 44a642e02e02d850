"""Hosts that vanish without a word, in a network of their own whose link goes down.

That takes Linux, and root or a kernel that lets users have such networks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"

PROGRAM = HELPERS / "vanishing.py"
PROGRAM_TIMEOUT_S = 90.0
UNSHARE_NETWORK = ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else [])]


def can_unshare_network() -> bool:
    """Whether such networks can be had; root on Linux always can, so that nothing is skipped there."""
    if sys.platform != "linux" or not os.geteuid():
        return sys.platform == "linux"
    return bool(shutil.which("unshare")) and not subprocess.call([*UNSHARE_NETWORK, "true"])


pytestmark = [
    pytest.mark.skipif(not can_unshare_network(), reason="no network namespaces here"),
    pytest.mark.slow,  # each case waits for as long as the kernel takes
]


def run_vanishing_host(when: str) -> dict[str, Any]:
    command = [*UNSHARE_NETWORK, sys.executable, str(PROGRAM), when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=PROGRAM_TIMEOUT_S)
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
    report = run_vanishing_host(when)
    assert report["closed"]
    assert report["in_flight"] == report["unacked"] == in_flight
    assert says in report["error"]
    assert report["seconds"] < 40
