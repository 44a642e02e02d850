"""The README's example runs as it is written, but for the port, which the system picks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LIMIT_S = 60.0
README = Path(__file__).parents[1] / "README.md"


def test_the_trainer_delivers_to_the_learner() -> None:
    learner, trainer = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert learner.count("50051") == trainer.count("50051") == 1
    learner = learner.replace("port=50051", "port=0")
    learner = learner.replace("server.start()\n", "server.start()\nprint(server.port, flush=True)\n")
    learner += "    print(observation.shape, label.shape, flush=True)\n"
    with subprocess.Popen([sys.executable, "-c", learner], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            command = [sys.executable, "-W", "error", "-c", trainer.replace("50051", port)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
            assert (done.returncode, done.stderr) == (0, "")
            batches = [process.stdout.readline() for _ in range(30_000 // 256)]
            assert set(batches) == {"(256, 4) (256,)\n"}
        finally:
            process.kill()
