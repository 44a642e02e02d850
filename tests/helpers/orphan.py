"""A program for test_ledger: ``orphan.py METHOD PORT`` has a daemonic child send more than a learner takes.

The child prints the error that this ends in.
"""

from __future__ import annotations

import multiprocessing
import sys

import numpy as np

from echo_torch import ConnectionClosedError, EchoSink
from echo_torch.session import session


def work(sink: EchoSink) -> None:
    session.CHILD_CLOSE_S = 0.1
    try:
        sink.send({"id": np.arange(1000)})
    except ConnectionClosedError as error:
        print(error, flush=True)


def main(method: str, port: int) -> None:
    sink = EchoSink("127.0.0.1", port, {"id": np.zeros((), np.int64)}, buffer_bytes=20 * 8)
    process = multiprocessing.get_context(method).Process(target=work, args=(sink,), daemon=True)
    process.start()
    process.join()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
