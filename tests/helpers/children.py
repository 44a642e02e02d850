"""A program for test_processes: ``children.py METHOD PORT HOW`` sends from this process and from two children.

HOW is what the children do after the last sample: "close" the sink, just "end", or "drop" a sink of their own.
"""

from __future__ import annotations

import multiprocessing
import sys

import numpy as np

from echo_torch import EchoSink

EXAMPLE = {"id": np.zeros((), np.int64)}


def work(sink: EchoSink, number: int, how: str, port: int) -> None:
    if how == "drop":
        sink = sink_for(port)
    sink.send({"id": np.arange(number * 1000, number * 1000 + 1000)})
    if how == "close":
        sink.close()


def sink_for(port: int) -> EchoSink:
    return EchoSink("127.0.0.1", port, EXAMPLE, max_inflight_msgs=4, resend_at_close=False)


def main(method: str, port: int, how: str) -> None:
    context = multiprocessing.get_context(method)
    with sink_for(port) as sink:
        children = [context.Process(target=work, args=(sink, number, how, port)) for number in (1, 2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        sink.send({"id": np.arange(1000)})
    print([child.exitcode for child in children])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
