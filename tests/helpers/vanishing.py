"""A program for test_keepalive: ``vanishing.py WHEN`` makes the learner's host vanish and reports what a client does.

Run it in its own network namespace. Nothing reaches the host any more, and nothing tells the client. The program
prints, as JSON, what `send` raises after the client has noticed. WHEN is "idle", "busy", or "full": then the learner is
paused, and what was sent fills its buffers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
from learner_process import Learner

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, TcpClient
from echo_torch.wire import keepalive

SAMPLE = {"x": np.zeros(1 << 18, np.uint8)}


def set_loopback(state: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


def fill(client: TcpClient) -> None:
    try:
        while True:
            client.send(SAMPLE, timeout=1.0)
    except DeliveryTimeoutError:
        pass


def main(when: str) -> None:
    keepalive.KEEPALIVE_IDLE_S = keepalive.KEEPALIVE_INTERVAL_S = 1
    keepalive.KEEPALIVE_COUNT = 2
    set_loopback("up")
    with Learner(SAMPLE, num_buffers=2) as learner:
        client = TcpClient("127.0.0.1", learner.port, SAMPLE, 256, connect_timeout=30)
        client.send(SAMPLE)
        client.wait(10)
        if when == "full":
            learner.pause()
            fill(client)
            time.sleep(3 * (keepalive.KEEPALIVE_IDLE_S + keepalive.KEEPALIVE_COUNT * keepalive.KEEPALIVE_INTERVAL_S))
            assert not client.closed
        set_loopback("down")
        began = time.monotonic()
        if when == "busy":
            client.send(SAMPLE)
        while not client.closed and time.monotonic() < began + 60:
            time.sleep(0.05)
        report = {"closed": client.closed, "seconds": time.monotonic() - began, "in_flight": client.in_flight}
        try:
            client.send(SAMPLE)
        except ConnectionClosedError as error:
            report |= {"unacked": error.unacked, "error": str(error)}
        print(json.dumps(report))
        set_loopback("up")


if __name__ == "__main__":
    main(sys.argv[1])
