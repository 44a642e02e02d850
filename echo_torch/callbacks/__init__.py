"""Callbacks that put an `EchoSink` into the training loops people use.

`loop.SinkCallback` holds the policy and serves hand-written loops. An adapter translates one trainer's events into its
methods and needs that trainer's package, except `fabric`; `lightning_stats`, `transformers_stats` and `sb3_samples` are
parts of adapters. ``import echo_torch`` imports none of them.

What holds for every trainer:

* You keep the sink, unless you set ``close=True``.
* In a distributed job, every rank sends what it trains on, through its own connection.
* A distributed sampler repeats samples so that every rank gets the same number. Repeated samples may be sent twice;
  `loop.padding` counts them.
* A batch is sent when its step is done, unless an adapter says otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def require_extra(adapter: str, extra: str) -> Iterator[None]:
    """Import a trainer inside this block: if it is not installed, raise a one-line ImportError that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ImportError(f"{adapter} needs the package {package}: pip install 'echo-torch[{extra}]'") from None
