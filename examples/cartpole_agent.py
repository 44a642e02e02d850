"""The learning side of `cartpole.py`: the sample, the networks, and IMPALA's V-trace (Espeholt et al., 2018)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

UNROLL = 64  # steps T of one environment in a sample
DISCOUNT = 0.99
# Scale of the rewards. It makes values about 3 instead of 100, a size that networks learn fast.
REWARD = 1 / 30
ENTROPY = 0.01
LEARNING_RATE = 1e-3

Tensors = dict[str, torch.Tensor]

# One sample: T steps of one environment.
EXAMPLE: Tensors = {
    "actor": torch.tensor(0),
    "number": torch.tensor(0),  # of this actor's samples, from 0 on
    "version": torch.tensor(0),  # of the policy that acted
    "observation": torch.zeros(UNROLL + 1, 4),  # one more than steps, to value what came after the last
    "action": torch.zeros(UNROLL, dtype=torch.int64),
    "log_prob": torch.zeros(UNROLL),  # of the action, by the policy that acted
    "reward": torch.zeros(UNROLL),
    "terminated": torch.zeros(UNROLL, dtype=torch.bool),  # the pole fell; False if the episode was truncated
    "valid": torch.zeros(UNROLL, dtype=torch.bool),  # False where the environment started anew and ignored the action
    "episode": torch.zeros(UNROLL),  # the return of the episode that this step ended, or 0
}


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def vtrace(values: torch.Tensor, ratio: torch.Tensor, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the targets of the values and the advantages of the actions, both float32 [B, T].

    Args:
        values: float32 [B, T + 1], of the observations.
        ratio: float32 [B, T], the importance ratios: how much likelier the actions are now.
        batch: unrolls.

    A truncated episode could have continued, so the value of its last observation counts. The value after a terminated
    episode does not. The step after either end is not valid. It corrects nothing, so nothing beyond it matters.
    """
    weight = ratio.clamp(max=1) * batch["valid"]
    discount = DISCOUNT * ~batch["terminated"]
    delta = weight * (batch["reward"] + discount * values[:, 1:] - values[:, :-1])
    correction = torch.zeros_like(values)
    for step in reversed(range(weight.shape[1])):
        correction[:, step] = delta[:, step] + discount[:, step] * weight[:, step] * correction[:, step + 1]
    targets = values + correction
    return targets[:, :-1], batch["reward"] + discount * targets[:, 1:] - values[:, :-1]


class Agent:
    """The policy, and the value network that helps to train it."""

    def __init__(self) -> None:
        self._policy, self._value = network(2), network(1)
        parameters = [*self._policy.parameters(), *self._value.parameters()]
        self._optimizer = torch.optim.Adam(parameters, LEARNING_RATE)

    def weights(self) -> torch.Tensor:
        """Return a copy of the policy's weights, float32 [N]."""
        return parameters_to_vector(self._policy.parameters()).detach()

    def update(self, batch: Tensors) -> None:
        """Do one optimizer step on a batch of unrolls."""
        log_probs = self._policy(batch["observation"][:, :-1]).log_softmax(-1)
        log_prob = log_probs.gather(-1, batch["action"][..., None])[..., 0]
        values = self._value(batch["observation"])[..., 0]
        ratio = (log_prob - batch["log_prob"]).exp().detach()
        targets, advantages = vtrace(values.detach(), ratio, {**batch, "reward": REWARD * batch["reward"]})

        valid = batch["valid"]
        gain = (ratio.clamp(max=1) * advantages * log_prob)[valid].mean()
        entropy = -(log_probs.exp() * log_probs).sum(-1)[valid].mean()
        value_loss = nn.functional.smooth_l1_loss(values[:, :-1][valid], targets[valid])
        self._optimizer.zero_grad()
        (value_loss - gain - ENTROPY * entropy).backward()
        self._optimizer.step()
