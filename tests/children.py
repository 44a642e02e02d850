"""A program for test_process: ``children.py METHOD PORT`` sends from this process and from two children of it."""

from __future__ import annotations

import multiprocessing
import sys

import numpy as np

from echo_torch import EchoSink


def work(sink: EchoSink, number: int) -> None:
    sink.send({"id": np.arange(number * 10, number * 10 + 10)})
    sink.close()


def main(method: str, port: int) -> None:
    context = multiprocessing.get_context(method)
    with EchoSink("127.0.0.1", port, {"id": np.zeros((), np.int64)}, replay_tail=False) as sink:
        children = [context.Process(target=work, args=(sink, number)) for number in (1, 2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        sink.send({"id": np.arange(10)})
    print([child.exitcode for child in children])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
