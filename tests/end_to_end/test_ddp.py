"""``examples/ddp.py``, run as a reader would run it, but for fewer steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp.py"
RUN_S = 90.0
"""Seconds for a whole run; it takes some ten."""


@pytest.mark.slow
def test_two_ranks_train_on_what_one_actor_sends_to_both() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLE), "--steps", "20", "--actors", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            report, errors = process.communicate(timeout=RUN_S)
        finally:
            process.terminate()  # if it is late; torchrun then ends the ranks, which a kill would leave behind
    assert process.returncode == 0, errors
    shares = re.search(r"sent the learners ([\d,]+) and ([\d,]+) samples", report)
    assert shares is not None, report
    assert all(int(share.replace(",", "")) >= 20 * 64 for share in shares.groups())
    assert "2 ranks, 1,280 samples each" in report
