"""Argument types of the commands: addresses, samples, numbers. Each one names what is wrong with its argument.

``module:object`` is imported as ``import`` would from the current directory. The object may be

* a sample: a pytree of tensors, numpy arrays and numbers;
* a torch dataset: its item 0 is used, or the first item of an iterable one;
* a callable without arguments that returns one of these.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from echo_torch.samples.spec import SampleSpec
from echo_torch.wire.connect import check_address
from echo_torch.wire.tls import TLS

from .errors import CommandError, one_line

HELP_ON_EXAMPLES = (
    "MODULE:OBJECT is imported from the current directory or what is installed. The object is one sample, a Dataset "
    "(item 0 is used), or a function or class that returns one of these when called."
)


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "address",
        type=address,
        metavar="HOST:PORT",
        help="the echo server: a name or an address, IPv6 in brackets: [::1]:50051",
    )


def add_tls(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "TLS", "For a learner behind a proxy that speaks TLS. Each of these options turns it on."
    )
    group.add_argument("--tls", action="store_true", help="use TLS; the operating system trusts the proxy's CA")
    group.add_argument("--tls-ca", metavar="FILE", help="PEM file of the CA that issued the proxy's certificate")
    group.add_argument("--tls-cert", metavar="FILE", help="PEM file of a client certificate")
    group.add_argument("--tls-key", metavar="FILE", help="PEM file of its key, if not in the same file")
    group.add_argument("--tls-name", metavar="NAME", help="the name in the proxy's certificate (default: HOST)")


def tls_from_options(options: argparse.Namespace) -> TLS | None:
    """Build the TLS settings from the options of `add_tls`; None if TLS is off."""
    try:
        tls = TLS(options.tls_ca, options.tls_cert, options.tls_key, options.tls_name)
    except ValueError as error:
        raise CommandError(f"--tls-*: {error}") from error
    return tls if options.tls or tls != TLS() else None


def address(text: str) -> tuple[str, int]:
    """Parse ``host:port`` or ``[v6]:port``."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (colon and host) or (":" in host and not bracketed) or "/" in host:
        raise ArgumentTypeError(f"got {text!r}, expected HOST:PORT, such as learner:50051 or [::1]:50051")
    if not (port.isascii() and port.isdigit()):
        raise ArgumentTypeError(f"got {text!r}, expected a number after the last colon, such as learner:50051")
    if bracketed:
        host = host[1:-1]
    try:
        check_address(host, int(port))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return host, int(port)


def port_or_any(text: str) -> int:
    """Parse a port to listen on; 0 lets the system choose."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise ArgumentTypeError(f"got {text!r}, expected 0 to 65535")
    return int(text)


def positive_int(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"got {text!r}, expected seconds, more than 0")
    return value


def sample_spec(text: str) -> SampleSpec:
    """Return the spec of the sample that ``module:object`` names."""
    module, _, name = text.partition(":")
    if not (module and name):
        raise ArgumentTypeError(f"got {text!r}, expected MODULE:OBJECT, such as mymodule:dataset")
    found = _import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ArgumentTypeError(f"{text}: {getattr(found, '__name__', type(found).__name__)} has no {part!r}")
        found = getattr(found, part)
    sample = _call_user_code(lambda: _take_sample(found), f"{text}: getting a sample from it")
    try:
        return SampleSpec(sample)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{text}: {error}") from error


def _import_module(module: str) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return _call_user_code(lambda: importlib.import_module(module), f"importing {module}")
    except ArgumentTypeError as problem:
        missing = problem.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and f"{module}.".startswith(f"{missing.name}."):
            where = f"neither in {here} nor installed; name it as `import` does, without .py"
            raise ArgumentTypeError(f"no module {missing.name}: {where}") from missing
        raise


def _take_sample(found: Any) -> Any:
    if callable(found) and not isinstance(found, Dataset):
        found = found()
    if isinstance(found, IterableDataset):
        return next(iter(found))
    return found[0] if isinstance(found, Dataset) else found


def _call_user_code(call: Callable[[], Any], what: str) -> Any:
    """Call the user's code and turn whatever it raises into an ArgumentTypeError.

    A program that exits when it is imported raises SystemExit, so this catches that too.
    """
    try:
        return call()
    except (Exception, SystemExit) as error:
        raise ArgumentTypeError(f"{what} raised {one_line(error)}") from error
