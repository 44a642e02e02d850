"""``doctor``: find out whether samples get from here to a server, and if not, why."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from echo_torch.samples.leaf import Leaf
from echo_torch.wire.connect import peer_name
from echo_torch.wire.protocol import WireLeaf

from .arguments import HELP_ON_EXAMPLES, add_address, add_tls, sample_spec, seconds, tls_from_options
from .errors import CommandError
from .reach import REACH_TIMEOUT_S, reach
from .table import table

_REMEDY = "start the server as the command `example` prints it, or send what the server expects"
# What no comparison with a server can tell.
_CAVEAT = "the wire carries no names and no dtypes: compare these with the learner yourself"


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="find out what is wrong between here and an echo server",
        description="Resolve, connect, shake hands, and compare what the server expects with an example, leaf by "
        "leaf. No sample is sent. Exits with 0 if all is well. Otherwise prints one line that names the problem "
        "and the remedy, and exits with 1.",
        epilog=HELP_ON_EXAMPLES,
    )
    add_address(parser)
    parser.add_argument("--example", type=sample_spec, metavar="MODULE:OBJECT", help="a sample as it will be sent")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=REACH_TIMEOUT_S,
        metavar="SECONDS",
        help="how long to try to reach the server (default: %(default)g)",
    )
    add_tls(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    host, port = options.address
    peer = peer_name(host, port)
    theirs = reach(host, port, options.timeout, _print_step, tls_from_options(options))
    if options.example is None:
        print("\n" + table([("leaf", "server", ""), *_numbered(map(_size_cells, theirs))], "><<"), end="\n\n")
        verdict = "give --example to compare with what you send"
    else:
        ours = options.example.leaves
        rows = _numbered(itertools.starmap(_comparison_row, _paired_leaves(theirs, ours)))
        print("\n" + table([("leaf", "server", "", "example", "", "", ""), *rows], "><<<<<<"), end="\n\n")
        if theirs != [leaf.wire for leaf in ours]:
            raise CommandError(f"{peer}: {_describe_mismatch(theirs, ours)}")
        verdict = "the sizes of the example fit"
    print(f"OK: {peer} takes samples; {verdict}; {_CAVEAT}")
    return 0


def _print_step(step: str, took_s: float, what: str) -> None:
    print(f"{step:9}  {1e3 * took_s:7.2f} ms  {what}", flush=True)


def _numbered(rows: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    return ((str(index), *row) for index, row in enumerate(rows))


def _paired_leaves(theirs: Sequence[WireLeaf], ours: Sequence[Leaf]) -> Iterable[tuple[WireLeaf | None, Leaf | None]]:
    return itertools.zip_longest(theirs, ours)


def _size_cells(leaf: WireLeaf | None) -> tuple[str, str]:
    return (f"{leaf.itemsize}-byte", str(list(leaf.shape))) if leaf else ("nothing", "")


def _comparison_row(server: WireLeaf | None, leaf: Leaf | None) -> tuple[str, ...]:
    what = f"{leaf.path} {leaf.dtype}".lstrip() if leaf else ""
    differs = "" if server and leaf and server == leaf.wire else "DIFFERS"
    return (*_size_cells(server), *_size_cells(leaf.wire if leaf else None), what, differs)


def _describe_mismatch(theirs: Sequence[WireLeaf], ours: Sequence[Leaf]) -> str:
    """Name the first leaf that differs, how many more do, and the remedy."""
    differing = [
        (index, server, leaf)
        for index, (server, leaf) in enumerate(_paired_leaves(theirs, ours))
        if not (server and leaf) or server != leaf.wire
    ]
    index, server, leaf = differing[0]
    expected = f"server expects {' items '.join(_size_cells(server))}" if server else "server expects nothing more"
    got = f"example has {leaf} ({leaf.wire.itemsize}-byte items)" if leaf else "example has nothing more"
    others = f", and {len(differing) - 1:,} more differ" if len(differing) > 1 else ""
    return f"leaf {index} differs: {expected}, {got}{others}; {_remedy(theirs, ours)}"


def _remedy(theirs: Sequence[WireLeaf], ours: Sequence[Leaf]) -> str:
    one_each = [WireLeaf(leaf.wire_dtype.itemsize, leaf.shape[1:]) for leaf in ours if leaf.shape]
    return "the example is a batch: give one sample of it" if list(theirs) == one_each else _REMEDY
