"""Ranges in PyTorch's profiler, and functions that its compiler must not trace."""

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
"""Whether a profiler runs in this thread."""


def profiler_range(name: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context that shows as a range called ``name`` in the profiler's trace.

    Without a profiler it does nothing, because entering a real range costs a microsecond even then.
    """
    return record_function(name) if is_profiling() else _NULL_CONTEXT


def disable_compile(function: Callable[_Args, None]) -> Callable[_Args, None]:
    """Keep ``torch.compile`` from tracing ``function``, as ``torch.compiler.disable`` does.

    That one imports the compiler, which takes a second. So we use it only from the first call on that finds the
    compiler imported.
    """
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

    # Without these marks, a compiled function that calls this one would inline it.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = "it sends to another process"  # type: ignore[attr-defined]
    return call
