"""The command line: what is wrong between here and a learner, how much goes through, and a learner to try it with.

Each command is a module with `add_command`, which describes its arguments, and a function that runs it and gives the exit
code: 0, or 1 after one line on stderr that says what is wrong and what to do about it. Arguments that are wrong exit
with 2, as argparse has it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from . import bench, doctor, example, serve
from .errors import CommandError

# Ctrl-C, as shells have it: 128 + SIGINT.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None, prog: str = "echo-torch") -> int:
    """Run one command and give its exit code.

    Args:
        argv: the arguments; None for those of this process.
        prog: what the help calls the program.

    Raises:
        SystemExit: from argparse, after ``--help`` or arguments that are wrong.
    """
    logging.getLogger("echo_torch").addHandler(logging.NullHandler())  # commands say in one line what it would warn of
    options = _parser(prog).parse_args(argv)
    try:
        code: int = options.run(options)
        return code
    except CommandError as error:
        sys.stdout.flush()  # or what was found before would come after it
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Look into what goes from PyTorch to an echo server.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (doctor, bench, example, serve):
        command.add_command(commands)
    return parser
