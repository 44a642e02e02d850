"""What the hooks for torchrl send: frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torchrl.collectors import BaseCollector
    from torchrl.envs import EnvBase


def example(source: BaseCollector | EnvBase) -> TensorDictBase:
    """Return one frame for an `EchoSink`; pass it through `numpy_example` for the server. Its values mean nothing.

    Args:
        source: a collector that works in one process, which knows all keys; or an environment, if the policy adds no
            key but the action.

    Raises:
        TypeError: ``source`` is neither, or a collector with worker processes.
    """
    try:
        frames = source.fake_tensordict()
    except (AttributeError, NotImplementedError):
        what = "expected a collector that works in one process, or an environment"
        raise TypeError(f"source: got {type(source).__name__}, {what}") from None
    # A collector numbers its trajectories. An environment does not know of that.
    if ("collector", "traj_ids") not in frames.keys(include_nested=True):
        frames = frames.set(("collector", "traj_ids"), torch.zeros(frames.batch_size, dtype=torch.int64))
    return frames.reshape(-1)[0]


def flatten_frames(batch: TensorDictBase) -> TensorDictBase:
    """Flatten a batch and drop its padding, as torchrl does before it fills a replay buffer."""
    mask = batch.get(("collector", "mask"), None)
    return batch.reshape(-1) if mask is None else batch[mask]
