"""The command line: diagnose the way to a learner, measure it, and run a learner to try things with.

Each command is a module. Its `add_command` describes the arguments, and another function runs the command and returns
the exit code: 0, or 1 after one line on stderr that names the problem and the remedy. Wrong arguments exit with 2, as
usual with argparse, and Ctrl-C with 130. What commands share: `arguments`, `errors`, `reach` (the way to a server, step
by step) and `table`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from . import bench, doctor, example, serve
from .errors import CommandError

# The exit code after Ctrl-C, as shells define it: 128 + SIGINT.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None, prog: str = "echo-torch") -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments; None for those of this process.
        prog: the name of the program in the help.

    Raises:
        SystemExit: raised by argparse after ``--help`` or wrong arguments.
    """
    # Silence the package's log: a command reports the same problem itself, in one line.
    logging.getLogger("echo_torch").addHandler(logging.NullHandler())
    options = _parser(prog).parse_args(argv)
    try:
        code: int = options.run(options)
        return code
    except CommandError as error:
        # Flush first, so that stdout's earlier lines stay above the error.
        sys.stdout.flush()
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Check, measure and try the way from PyTorch to an echo server."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (doctor, bench, example, serve):
        command.add_command(commands)
    return parser
