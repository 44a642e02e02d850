"""What stable-baselines3 models collect, as samples: transitions and rollouts.

Names are those of gymnasium and of the rollout buffer. Dtypes are those of the spaces, as in the algorithms' own
buffers, except that observations from a ``VecNormalize`` are float32.
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
    """Return one sample for an `EchoSink`; pass it through `numpy_example` for the server. Its values mean nothing.

    Args:
        model: the algorithm.
        on: as for `sb3.SinkCallback`. ``"step"`` returns ``obs, action, reward, next_obs, terminated, truncated``.

    Raises:
        ValueError: ``on="rollout"``, and the algorithm has no ``rollout_buffer``.
    """
    if on == "rollout":
        if not hasattr(model, "rollout_buffer"):
            raise ValueError(f"on: got 'rollout', but {type(model).__name__} has no rollout_buffer; use 'step'")
        fresh = copy.copy(model.rollout_buffer)
        # After training, some arrays of the buffer have other shapes. A reset restores them.
        fresh.reset()
        return _map_leaves(lambda array: array[0], _flatten_buffer(fresh))
    # Sample from copies, because sampling advances the random state of the spaces.
    obs = _float32_if_normalized(model, copy.deepcopy(model.observation_space).sample())
    action = copy.deepcopy(model.action_space).sample()
    ends = {"terminated": np.False_, "truncated": np.False_}
    return {"obs": obs, "action": action, "reward": np.float32(0), "next_obs": obs, **ends}


def transitions(model: BaseAlgorithm, step: Mapping[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Return the transitions of all environments at one step, leaves ``(n_envs, *shape)``.

    Args:
        model: the algorithm. Its observations are still those before the step.
        step: the local variables of its ``collect_rollouts``.
        like: its `example`, for the dtypes.
    """
    ended = np.asarray(step["dones"], bool)
    truncated = np.zeros_like(ended)
    next_obs = copy.deepcopy(step["new_obs"])
    # Where an episode ended, the new observation is already the first of the next episode.
    for index in np.flatnonzero(ended):
        info = step["infos"][index]
        truncated[index] = info.get("TimeLimit.truncated", False)
        if "terminal_observation" in info:
            _set_row(next_obs, int(index), info["terminal_observation"])
    made = {
        "obs": model._last_obs,
        # Only on-policy algorithms have ``clipped_actions``.
        "action": step.get("clipped_actions", step["actions"]),
        "reward": step["rewards"],
        "next_obs": next_obs,
        "terminated": ended & ~truncated,
        "truncated": truncated,
    }
    return _map_leaves(lambda one, all_envs: np.asarray(all_envs, np.asarray(one).dtype), like, made)


def rollout(model: BaseAlgorithm) -> dict[str, Any]:
    """Return what an on-policy algorithm is about to train on, leaves ``(n_steps * n_envs, *shape)``.

    The rows are ordered by step, then by environment.
    """
    return _flatten_buffer(model.rollout_buffer)


def _float32_if_normalized(model: BaseAlgorithm, obs: Any) -> Any:
    """Cast normalized observations to float32: their space may say integers."""
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
