"""Callbacks that put an `EchoSink` into the training loops people use.

`loop.SinkCallback` holds the policy, and serves hand-written loops; the other modules, one for each trainer, translate
its events. Each but `fabric` needs the trainer's package, and none is imported by ``import echo_torch``.

Whatever the trainer: the sink stays the caller's, unless ``close=True``. In a distributed job every rank sends what it
trains on, through a connection of its own. A distributed sampler repeats samples to give each rank as many, so these
may be sent twice; `loop.padding` counts them. A batch is sent when its step is done, unless an adapter says otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def require_extra(adapter: str, extra: str) -> Iterator[None]:
    """Around the import of a trainer: if it is not installed, an ImportError of one line that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ImportError(f"{adapter} needs the package {package}: pip install 'echo-torch[{extra}]'") from None
