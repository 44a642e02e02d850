"""What the ranks of a distributed job have to agree on: whether `EchoSink.wait` raises, and through which group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .errors import ConnectionClosedError, DeliveryTimeoutError
from .support.deadline import Deadline

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

# Seconds by which the last rank may come later to `wait` than the first, on top of what the waiting itself may take.
SKEW_S = 60.0
# The longest that a rank waits for the others where the waiting itself has no limit: as torch.distributed's own.
MAX_WAIT_S = 1800.0
# Seconds between two looks at whether all ranks have come.
POLL_INTERVAL_S = 0.005

_OUTCOMES = ("acked everything", "ran out of time", "lost the connection", "failed")


def cpu_group() -> ProcessGroup | None:
    """A group of all ranks for CPU tensors: the default one if it takes them, else a new one of gloo.

    None without a default group, and with one rank. All ranks have to call it, as for any new group.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    return world if "cpu:" in dist.get_backend_config(world) else dist.new_group(backend="gloo")


def check_group(group: ProcessGroup) -> None:
    """ValueError unless this process is one of the ranks of ``group``, and it reduces CPU tensors."""
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
    wait: Callable[[float | None], None],
    timeout: float | None,
    stall_timeout: float | None,
    group: ProcessGroup,
) -> None:
    """``wait(timeout)``, which may give up after ``stall_timeout``; and then raise on all ranks or none, as `raise_on_all_ranks`."""
    check_group(group)
    problem = None
    try:
        wait(timeout)
    except Exception as error:
        problem = error
    limits = [limit for limit in (timeout, stall_timeout) if limit is not None]
    try:
        raise_on_all_ranks(peer, problem, getattr(problem, "unacked", 0), group, min(limits, default=None))
    finally:
        del problem  # whose traceback holds this frame, and with it the sink


def raise_on_all_ranks(
    peer: str, problem: Exception | None, unacked: int, group: ProcessGroup, max_wait: float | None
) -> None:
    """Tell all ranks of ``group`` how this one's ``wait`` ended; raise on all of them if it ended badly on any.

    One all-reduce of CPU tensors, to which every rank has to come.

    Args:
        peer: this rank's server.
        problem: what this rank's ``wait`` raised; None if all is acked.
        unacked: samples un-acked here.
        group: its backend reduces CPU tensors.
        max_wait: seconds that the waiting of the others may take; None for no limit.

    Raises:
        Exception: ``problem``, if there is one.
        ConnectionClosedError, DeliveryTimeoutError: the worst of what other ranks met, with the number of samples
            un-acked there.
        DeliveryTimeoutError: not all ranks came in time.
    """
    import torch.distributed as dist

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    table = torch.zeros(2, size, dtype=torch.int64, device="cpu")  # whatever the default device is
    table[0, rank], table[1, rank] = _outcome(problem), unacked
    limit = (MAX_WAIT_S if max_wait is None else max_wait) + SKEW_S
    try:
        work = dist.all_reduce(table, group=group, async_op=True)
        assert work is not None
        arrived = _all_arrived(work, limit)
    except RuntimeError as error:  # a rank is gone, for one
        if problem is not None:
            raise problem from None
        what = f"the {size} ranks could not tell each other how wait() ended ({error})"
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


def _all_arrived(work: Work, seconds: float) -> bool:
    """Whether all ranks come within that time. As ``work.wait``, which lets no Ctrl-C through, however."""
    deadline = Deadline(seconds)
    while not work.is_completed():
        if deadline.expired:
            return False
        time.sleep(POLL_INTERVAL_S)
    work.wait()
    return True


def _outcome(problem: Exception | None) -> int:
    if problem is None:
        return 0
    if isinstance(problem, DeliveryTimeoutError):
        return 1
    return 2 if isinstance(problem, ConnectionError) else 3
