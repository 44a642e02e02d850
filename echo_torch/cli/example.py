"""``example``: print the code of a server for samples like a given one.

The printed code runs as it is, without torch and without the classes of the example. Plain containers replace those
classes, chosen so that the leaves keep their order on the wire.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from echo_torch.samples.leaf import Leaf
from echo_torch.samples.spec import SampleSpec

from .arguments import HELP_ON_EXAMPLES, sample_spec
from .errors import CommandError

_INDENT = "    "


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "example",
        help="print the line that starts an echo server for a torch example",
        description="Print an echo.Server(...) for samples like the example, as numpy code to paste into the learner. "
        "For dtypes that numpy lacks, such as bfloat16, comments say how to view the leaves in torch.",
        epilog=HELP_ON_EXAMPLES,
    )
    parser.add_argument("example", type=sample_spec, metavar="MODULE:OBJECT", help="a sample as it will be sent")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    print(server_code(options.example))
    return 0


def server_code(spec: SampleSpec) -> str:
    """Return a program that creates ``server``, an ``echo.Server`` for samples of ``spec``.

    Raises:
        CommandError: a key of a dict cannot be written as code.
    """
    sample = list(_lines(spec.treespec, iter(spec.leaves), _INDENT, ""))
    imports = ["import echo", "import numpy as np"]
    if any("OrderedDict(" in line for line in sample):
        imports.insert(0, "from collections import OrderedDict\n")
    lines = [*imports, "", "server = echo.Server(", *sample]
    lines += [f"{_INDENT}batch_size=256,", f"{_INDENT}transport=echo.TcpTransport(port=50051),", ")"]
    return "\n".join(lines)


def _lines(treespec: Any, leaves: Iterator[Leaf], indent: str, label: str) -> Iterator[str]:
    """Yield the lines of a tree, one per leaf and per bracket. ``label`` goes before the value."""
    if treespec.type is None:
        leaf = next(leaves)
        yield f"{indent}{label}np.zeros({leaf.shape}, {_dtype_code(leaf.wire_dtype)}),{_comment(leaf)}"
        return
    if treespec.type is type(None):
        yield f"{indent}{label}None,"
        return
    mapping = issubclass(treespec.type, dict)
    opening, closing = "{}" if mapping else "[]" if treespec.type is list else "()"
    # Only an OrderedDict keeps its order. optree sorts the keys of other dicts.
    if issubclass(treespec.type, OrderedDict):
        opening, closing = "OrderedDict({", "})"
    yield f"{indent}{label}{opening}"
    for entry, child in zip(treespec.entries(), treespec.children(), strict=True):
        yield from _lines(child, leaves, indent + _INDENT, f"{_key_code(entry)}: " if mapping else "")
    yield f"{indent}{closing},"


def _key_code(key: Any) -> str:
    # Write an enum member as its value, which looks up and sorts the same.
    if isinstance(key, (str, int)):
        return repr(str.__str__(key) if isinstance(key, str) else int(key))
    raise CommandError(f"the key {key!r} has no code that gives it; use strings as keys")


def _dtype_code(dtype: np.dtype[Any]) -> str:
    name = "bool_" if dtype == np.bool_ else dtype.name
    if dtype.isnative and np.dtype(getattr(np, name, None)) == dtype:
        return f"np.{name}"
    return f"np.{np.dtype((np.void, dtype)) if dtype.fields else dtype!r}"


def _comment(leaf: Leaf) -> str:
    return f"  # torch.from_numpy(sample.batch{leaf.path}).view({leaf.dtype})" if leaf.torch_only else ""
