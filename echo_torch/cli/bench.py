"""``bench``: measure how many samples this machine gets into a server."""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from echo_torch.errors import DeliveryTimeoutError, HandshakeError, SpecMismatchError
from echo_torch.ring.ring import SERVER_QUEUE_SAMPLES, min_buffer_bytes
from echo_torch.samples.leaf import Array
from echo_torch.sink import EchoSink
from echo_torch.wire.connect import peer_name

from .arguments import add_address, add_tls, positive_int, seconds, tls_from_options
from .errors import CommandError, one_line
from .reach import REACH_TIMEOUT_S, reach
from .table import table

# Most bytes of one batch, and most bytes that wait in the sink. Both are small enough that the last samples arrive soon
# after the time is up.
BATCH_BYTES = 64 * 1024 * 1024
_BACKLOG_BYTES = 64 * 1024 * 1024
# Least number of samples that may wait in the sink: more than the window, so that it never runs dry.
_BACKLOG_SAMPLES = 4096
# Seconds without any ack after which the learner counts as not draining.
STALL_S = 10.0


class _Measurement(NamedTuple):
    """The figures of one run."""

    samples: int
    """Samples sent and acknowledged."""
    repeated: int
    """How many of them the server received twice."""
    wall_s: float
    cpu_s: float
    blocked_s: float


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure how many samples this machine gets into an echo server",
        description="Send samples of zeros, of the size that the server expects, as fast as possible. The learner "
        "receives them like any other samples.",
    )
    add_address(parser)
    parser.add_argument("--seconds", type=seconds, default=3.0, help="how long to send (default: %(default)g)")
    parser.add_argument("--batch-size", type=positive_int, default=256, help="samples per send (default: %(default)s)")
    add_tls(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    host, port = options.address
    peer = peer_name(host, port)
    tls = tls_from_options(options)
    leaves = reach(host, port, REACH_TIMEOUT_S, tls=tls)
    payload = sum(leaf.nbytes for leaf in leaves)
    size = min(options.batch_size, max(1, BATCH_BYTES // payload))
    try:
        batch = [_zeros((size, *leaf.shape), leaf.itemsize) for leaf in leaves]
        backlog = min(_BACKLOG_BYTES, payload * max(_BACKLOG_SAMPLES, 2 * size))
        backlog = max(backlog, min_buffer_bytes(payload, SERVER_QUEUE_SAMPLES))
        limits = {"buffer_bytes": backlog, "stall_timeout": STALL_S, "reconnect": 0.0}
        sink = EchoSink.from_batch(host, port, batch, tls=tls, **limits)
    except (TypeError, ValueError, MemoryError) as error:
        what = f"samples of {payload:,} bytes cannot be made here"
        raise CommandError(f"{peer}: {what} ({one_line(error)}); is that the right server?") from error
    print(f"warning: this fills the learner at {peer} with samples of zeros, which it cannot tell from others")
    print(f"sending batches of {size:,} samples of {payload:,} bytes for {options.seconds:g} s", flush=True)
    try:
        measured = _send(sink, batch, options.seconds)
    except DeliveryTimeoutError as error:
        what = f"nothing was acknowledged for {STALL_S:g} s, and {error.unacked:,} samples are left"
        raise CommandError(f"{peer}: {what}; is the learner stopped, or does it not drain?") from error
    except (OSError, HandshakeError, SpecMismatchError) as error:
        raise CommandError(f"{error}; is the learner still running?") from error
    print(f"sent {measured.samples:,} samples, all acknowledged; the last {measured.repeated:,} twice\n")
    print(_results_table(measured, payload))
    return 0


def _zeros(shape: tuple[int, ...], itemsize: int) -> Array:
    """Return zeros with items of this size: unsigned integers where numpy has them, otherwise opaque bytes.

    The array is a copy because all of ``np.zeros`` may be a single page, which is cheaper to read than any real batch.
    """
    dtype = np.dtype(f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}")
    zeros: Array = np.zeros(shape, dtype).copy()
    return zeros


def _send(sink: EchoSink, batch: list[Array], limit_s: float) -> _Measurement:
    """Send for ``limit_s`` seconds, wait until everything is acknowledged, and close the sink.

    Raises what `EchoSink` raises.
    """
    with sink:
        began, cpu_s = time.perf_counter(), time.process_time()
        try:
            while time.perf_counter() - began < limit_s:
                sink.send(batch, batched=True)
            sink.wait()
        except DeliveryTimeoutError:
            with suppress(DeliveryTimeoutError):
                # Close now. Leaving the block would try to deliver the rest.
                sink.close(0)
            raise
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
    stats = sink.stats()
    return _Measurement(stats.samples_acked, stats.maybe_duplicated, wall_s, cpu_s, stats.blocked_seconds)


def _results_table(measured: _Measurement, payload: int) -> str:
    rate = measured.samples / measured.wall_s
    rows = [
        ("samples/s", f"{rate:,.0f}", ""),
        ("MB/s", f"{rate * payload / 1e6:,.1f}", ""),
        ("CPU", f"{1e6 * measured.cpu_s / measured.samples:,.2f}", "us/sample, of this process"),
        ("blocked", f"{100 * measured.blocked_s / measured.wall_s:,.1f}", "% of the time, in send, for want of room"),
    ]
    return table(rows, "<><")
