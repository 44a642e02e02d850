"""How the ranks of a distributed job agree on whether `EchoSink.wait` raises.

If it raised on one rank alone, the others would go on and wait for that rank in their next collective. So each rank
first waits for its own server. Then one all-reduce tells all of them how that ended, and all raise, or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .errors import ConnectionClosedError, DeliveryTimeoutError
from .support.deadline import Deadline

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

# Seconds by which the last rank may call `wait` later than the first, on top of the time limit of `wait` itself.
SKEW_S = 60.0
# Seconds that a rank waits for the others if `wait` has no time limit; torch.distributed's own default.
MAX_WAIT_S = 1800.0
# Seconds between two checks whether all ranks have come.
POLL_INTERVAL_S = 0.005

# How a rank's `wait` ended: the index is the number in the all-reduce, and a higher one is worse.
_OUTCOMES = ("acked everything", "ran out of time", "lost the connection", "failed")


def cpu_group() -> ProcessGroup | None:
    """Return a group of all ranks for CPU tensors: the default group if it takes them, else a new gloo group.

    Returns None if there is no default group or only one rank. All ranks must call it, as for any new group.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    return world if "cpu:" in dist.get_backend_config(world) else dist.new_group(backend="gloo")


def check_group(group: ProcessGroup) -> None:
    """Raise ValueError unless this process is a rank of ``group``, and the group reduces CPU tensors."""
    import torch.distributed as dist

    if dist.get_rank(group) < 0:
        raise ValueError(f"group: this process, rank {dist.get_rank()}, is not in it")
    backends = dist.get_backend_config(group)
    if "cpu:" not in backends:
        raise ValueError(
            f"group: got {backends}, expected one for CPU tensors: torch.distributed.new_group(backend='gloo')"
        )


def wait_together(
    peer: str,
    wait: Callable[[], None],
    timeout: float | None,
    stall_timeout: float | None,
    group: ProcessGroup,
) -> None:
    """Call ``wait`` on each rank of ``group``, then raise on all of them or on none.

    Args:
        peer: this rank's server, for messages.
        wait: blocks until this rank's samples are acked.
        timeout: seconds after which ``wait`` gives up; None for no limit.
        stall_timeout: seconds without any ack after which ``wait`` gives up; None for never.
        group: takes CPU tensors.

    Raises as `raise_on_all_ranks`, and ValueError for an unfit group.
    """
    check_group(group)
    problem = None
    try:
        wait()
    except Exception as error:
        problem = error
    # The others may take as long as this rank was allowed to.
    limits = [limit for limit in (timeout, stall_timeout) if limit is not None]
    try:
        raise_on_all_ranks(peer, problem, getattr(problem, "unacked", 0), group, min(limits, default=None))
    finally:
        del problem  # its traceback holds this frame, and this frame holds the sink


def raise_on_all_ranks(
    peer: str, problem: Exception | None, unacked: int, group: ProcessGroup, max_wait: float | None
) -> None:
    """Raise on all ranks of ``group`` if the ``wait`` of any of them failed.

    It takes one all-reduce of CPU tensors, so every rank must call it.

    Args:
        peer: this rank's server, for messages.
        problem: what this rank's ``wait`` raised; None if everything is acked.
        unacked: samples un-acked on this rank.
        group: takes CPU tensors.
        max_wait: seconds that the ``wait`` of other ranks may take; None for no limit.

    Raises:
        Exception: ``problem``, if there is one.
        ConnectionClosedError, DeliveryTimeoutError: the worst failure of the other ranks, with their number of un-acked
            samples.
        DeliveryTimeoutError: not all ranks came in time, or the all-reduce failed.
    """
    import torch.distributed as dist

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    # Each rank fills its own column, with outcome and count. The sum over all ranks is the whole table.
    table = torch.zeros(2, size, dtype=torch.int64, device="cpu")  # "cpu" whatever the default device is
    table[0, rank], table[1, rank] = _outcome_code(problem), unacked
    limit = (MAX_WAIT_S if max_wait is None else max_wait) + SKEW_S
    try:
        work = dist.all_reduce(table, group=group, async_op=True)
        assert work is not None
        arrived = _wait_for_all_ranks(work, limit)
    except RuntimeError as error:  # a rank is gone, for instance
        if problem is not None:
            raise problem from None
        what = f"the {size} ranks could not exchange how wait() ended ({error})"
        raise DeliveryTimeoutError(f"{peer}: {what}; here, on rank {rank}, everything is acked") from error
    if problem is not None:
        raise problem
    if not arrived:
        what = f"not all {size} ranks came to wait() within {limit:g} s"
        raise DeliveryTimeoutError(f"{peer}: {what}; here, on rank {rank}, everything is acked")
    outcomes, counts = table.tolist()
    if not any(outcomes):
        return
    bad = [index for index, outcome in enumerate(outcomes) if outcome]
    summary = ", ".join(
        f"rank {index} {_OUTCOMES[outcomes[index]]} ({counts[index]} samples un-acked)" for index in bad
    )
    kind = DeliveryTimeoutError if max(outcomes) == 1 else ConnectionClosedError
    problem = kind(f"{peer}: wait() on other ranks: {summary}; here, on rank {rank}, everything is acked")
    problem.unacked = sum(counts)
    raise problem


def _wait_for_all_ranks(work: Work, seconds: float) -> bool:
    """Wait for the all-reduce; return False if not all ranks come within ``seconds``."""
    # Poll, because ``work.wait`` lets no Ctrl-C through. It returns at once when the work is complete.
    deadline = Deadline(seconds)
    while not work.is_completed():
        if deadline.expired:
            return False
        time.sleep(POLL_INTERVAL_S)
    work.wait()
    return True


def _outcome_code(problem: Exception | None) -> int:
    if problem is None:
        return 0
    if isinstance(problem, DeliveryTimeoutError):
        return 1
    return 2 if isinstance(problem, ConnectionError) else 3
