"""``python -m echo_torch``: the command line."""

import sys

from .cli import main

sys.exit(main(prog="python -m echo_torch"))
