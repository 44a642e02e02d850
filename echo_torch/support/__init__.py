"""What every wing leans on, and what knows nothing of batches, sockets or learners.

* `deadline`: one moment on the monotonic clock that all steps of an operation share.
* `validation`: checks of numeric arguments, with one wording for all errors.
* `interrupts`: what keeps state whole when Ctrl-C strikes between any two calls.
* `shutdown`: what happens to open connections when the process exits or forks.
* `accelerator`: the part of PyTorch's device API that we use: streams, events, pinned memory.
* `backoff`: growing pauses with jitter. `tracing`: profiler ranges, and what ``torch.compile`` must not trace.

Rules:

* Signals reach only the main thread, after any call. Plain ``with lock`` is safe there; ``with condition`` and
  ``lock.acquire(timeout=...)`` in a helper are not.
* `shutdown` holds no lock. It runs at exit, in finalizers and in forked children.
"""
