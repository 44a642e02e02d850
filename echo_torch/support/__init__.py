"""Helpers for every wing. Nothing here knows about batches, sockets or learners.

* `deadline`: one moment on the monotonic clock that all steps of an operation share.
* `validation`: checks of numeric arguments, with one wording for all errors.
* `interrupts`: keeps state consistent when Ctrl-C strikes between any two calls.
* `shutdown`: ends open connections when the process exits, and drops them in a forked child.
* `accelerator`: the part of PyTorch's device API that we use: streams, events, pinned memory.
* `backoff`: growing pauses with jitter.
* `tracing`: ranges in PyTorch's profiler, and functions that ``torch.compile`` must not trace.

Rules:

* Signals reach only the main thread, after any call. Plain ``with lock`` is safe there; ``with condition`` and
  ``lock.acquire(timeout=...)`` in a helper are not.
* `shutdown` holds no lock. It runs at exit, in finalizers and in forked children.
"""
