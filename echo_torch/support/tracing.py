"""What PyTorch's profiler shows of us, and what its compiler must not see."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

_NULL_CONTEXT: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

_Args = ParamSpec("_Args")

is_profiling: Callable[[], bool] = _profiler_enabled
"""Whether a profiler runs."""


def profiler_range(name: str) -> contextlib.AbstractContextManager[Any]:
    """A range of that name in the trace, while a profiler runs: entering one costs a microsecond even if none does."""
    return record_function(name) if is_profiling() else _NULL_CONTEXT


def disable_compile(function: Callable[_Args, None]) -> Callable[_Args, None]:
    """As ``torch.compiler.disable``, which takes a second to import: not before there is a compiler."""
    disabled: Callable[_Args, None] | None = None

    @functools.wraps(function)
    def call(*args: _Args.args, **kwargs: _Args.kwargs) -> None:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                function(*args, **kwargs)
                return
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        disabled(*args, **kwargs)

    # For a compiled function that would inline this one.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = "it sends to another process"  # type: ignore[attr-defined]
    return call
