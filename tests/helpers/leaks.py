"""What a test must not leave behind: threads of echo_torch and open file descriptors. And how to find its garbage."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
import traceback

CLEANUP_TIMEOUT_S = 10.0
"""Seconds in which dropped clients must have ended their threads."""


def freeze() -> None:
    """Has tests that collect garbage look at what they made, and not at all the trainers that were imported."""
    gc.collect()
    gc.freeze()


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("echo_torch")]


def assert_threads_end() -> None:
    """Check that all threads of echo_torch end soon. Otherwise fail with their stack traces."""
    deadline = time.monotonic() + CLEANUP_TIMEOUT_S
    while our_threads() and time.monotonic() < deadline:
        time.sleep(0.002)
    left, frames = {thread.ident: thread.name for thread in our_threads()}, sys._current_frames()
    assert not left, "".join(
        f"{name}\n{''.join(traceback.format_stack(frames[ident]))}" for ident, name in left.items() if ident in frames
    )


def open_descriptors() -> dict[str, str]:
    """Return the open file descriptors of this process, and what each one is."""
    found = {}
    for descriptor in os.listdir("/proc/self/fd"):
        # Suppress descriptors that were closed meanwhile, such as the listing's own.
        with contextlib.suppress(FileNotFoundError):
            found[descriptor] = os.readlink(f"/proc/self/fd/{descriptor}")
    return found
