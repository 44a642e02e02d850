"""``serve``: run a server that takes samples and counts them, to try things with."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from .arguments import HELP_ON_EXAMPLES, port_or_any, positive_int, sample_spec
from .errors import CommandError

# Seconds between two printed lines, and between two updates of the progress bar.
_LINE_INTERVAL_S = 1.0
_BAR_INTERVAL_S = 0.2


class _SampleCounter:
    """How many samples were taken out of the server. The draining thread writes it, the main thread reads it."""

    samples = 0


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="run an echo server that takes samples and counts them",
        description="Run an echo server for samples like the example. It counts what it receives and throws it "
        "away. It hands out full batches only, so an incomplete last batch is not counted. Ctrl-C ends it.",
        epilog=HELP_ON_EXAMPLES,
    )
    parser.add_argument(
        "--example", type=sample_spec, required=True, metavar="MODULE:OBJECT", help="a sample as it will be sent"
    )
    parser.add_argument(
        "--port", type=port_or_any, default=50051, help="0 to have the system choose (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=32,
        help="samples per batch; below 32, id-echo may hang under load (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        import echo
    except ImportError as error:
        raise CommandError(f"no id-echo to serve with ({error}); pip install 'echo-torch[server]'") from error
    transport = echo.TcpTransport(port=options.port)
    server = echo.Server(options.example.zeroed_numpy_sample(), batch_size=options.batch_size, transport=transport)
    try:
        server.start()
    except RuntimeError as error:
        raise CommandError(f"port {options.port}: {error}; choose another with --port, or 0 for any") from error
    counter = _SampleCounter()
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        try:
            print(
                f"listening on port {server.port} for samples of {options.example.describe()}; Ctrl-C ends", flush=True
            )
            _show_progress(pool.submit(_drain, server, options.batch_size, counter), counter)
        except KeyboardInterrupt:
            pass
        finally:
            server.close()
    took_s = time.monotonic() - began
    print(f"took {counter.samples:,} samples in {took_s:.1f} s, in full batches of {options.batch_size}")
    return 0


def _drain(server: Any, batch_size: int, counter: _SampleCounter) -> None:
    while server.sample() is not None:
        counter.samples += batch_size


def _show_progress(draining: Future[None], counter: _SampleCounter) -> None:
    """Show how many samples were taken until the draining ends.

    By itself the draining ends only with an error, which this raises.
    """
    with _display() as (show, pause_s):
        while not wait([draining], pause_s).done:
            show(counter.samples)
    draining.result()


@contextmanager
def _display() -> Iterator[tuple[Callable[[int], object], float]]:
    """Yield a function that shows a count, and the seconds between calls of it.

    It is a bar on a terminal that has tqdm, and lines otherwise.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        yield _LinePrinter().show, _LINE_INTERVAL_S
    else:
        with tqdm(unit=" samples", unit_scale=True, miniters=0) as bar:
            yield lambda samples: bar.update(samples - bar.n), _BAR_INTERVAL_S


class _LinePrinter:
    """Prints a line on stderr for every count that differs from the one before."""

    def __init__(self) -> None:
        self._shown = 0

    def show(self, samples: int) -> None:
        if samples != self._shown:
            print(f"{samples:,} samples, {samples - self._shown:,} of them in the last second", file=sys.stderr)
            self._shown = samples
