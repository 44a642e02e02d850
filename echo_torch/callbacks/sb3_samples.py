"""What models of stable-baselines3 collect, as samples: transitions, and rollouts.

Names are gymnasium's and the rollout buffer's; dtypes are those of the spaces, as in the algorithms' own buffers, but
float32 for observations that a ``VecNormalize`` gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optree

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

_ROLLOUT = ("observations", "actions", "rewards", "values", "log_probs", "advantages", "returns", "episode_starts")


def example(model: BaseAlgorithm, on: Literal["step", "rollout"] = "step") -> dict[str, Any]:
    """One sample, for an `EchoSink`, and through `numpy_example` for the server; what it says means nothing.

    ``on`` is as for `sb3.SinkCallback`: ``"step"`` for ``obs, action, reward, next_obs, terminated, truncated``.

    Raises:
        ValueError: ``on="rollout"``, and the algorithm has no ``rollout_buffer``.
    """
    if on == "rollout":
        if not hasattr(model, "rollout_buffer"):
            raise ValueError(f"on: got 'rollout', but {type(model).__name__} has no rollout_buffer; use 'step'")
        fresh = copy.copy(model.rollout_buffer)
        fresh.reset()  # after training, some of its arrays have other shapes
        return _map_leaves(lambda array: array[0], _flatten_buffer(fresh))
    # Of copies, for they draw from the spaces' random numbers.
    obs = _cast_normalized(model, copy.deepcopy(model.observation_space).sample())
    action = copy.deepcopy(model.action_space).sample()
    ends = {"terminated": np.False_, "truncated": np.False_}
    return {"obs": obs, "action": action, "reward": np.float32(0), "next_obs": obs, **ends}


def transitions(model: BaseAlgorithm, step: Mapping[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Those of all environments at one step, leaves ``(n_envs, *shape)``.

    Args:
        model: its observations are still those before the step.
        step: the variables of its ``collect_rollouts``.
        like: its `example`.
    """
    ended = np.asarray(step["dones"], bool)
    truncated = np.zeros_like(ended)
    next_obs = copy.deepcopy(step["new_obs"])
    for index in np.flatnonzero(ended):  # there, it is the first observation of the next episode
        info = step["infos"][index]
        truncated[index] = info.get("TimeLimit.truncated", False)
        if "terminal_observation" in info:
            _set_row(next_obs, int(index), info["terminal_observation"])
    made = {
        "obs": model._last_obs,
        "action": step.get("clipped_actions", step["actions"]),  # of on-policy algorithms, and of others
        "reward": step["rewards"],
        "next_obs": next_obs,
        "terminated": ended & ~truncated,
        "truncated": truncated,
    }
    return _map_leaves(lambda one, all_envs: np.asarray(all_envs, np.asarray(one).dtype), like, made)


def rollout(model: BaseAlgorithm) -> dict[str, Any]:
    """What an on-policy algorithm is about to train on, leaves ``(n_steps * n_envs, *shape)``: steps in order."""
    return _flatten_buffer(model.rollout_buffer)


def _cast_normalized(model: BaseAlgorithm, obs: Any) -> Any:
    """With the dtype of what is normalised, which may be integers by its space."""
    wrapper = model.get_vec_normalize_env()
    if wrapper is None or not wrapper.norm_obs:
        return obs
    if isinstance(obs, dict):
        return {name: np.float32(leaf) if name in wrapper.norm_obs_keys else leaf for name, leaf in obs.items()}
    return np.float32(obs)


def _flatten_buffer(buffer: Any) -> dict[str, Any]:
    arrays = {name: getattr(buffer, name) for name in _ROLLOUT}
    return _map_leaves(lambda array: array.reshape(-1, *array.shape[2:]), arrays)


def _set_row(obs: Any, index: int, last: Any) -> None:
    if isinstance(obs, dict):
        for name, leaf in obs.items():
            _set_row(leaf, index, last[name])
    else:
        obs[index] = last


def _map_leaves(function: Callable[..., Any], *trees: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = optree.tree_map(function, *trees)
    return made
