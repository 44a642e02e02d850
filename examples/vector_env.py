"""PPO on CartPole as CleanRL has it: actors with vector environments, in processes of their own, and a learner.

    pip install '.[examples]'
    python examples/vector_env.py [--autoreset next_step | same_step]

* A sample is a window of `T` steps of one environment. Each `send` has one window of each environment.
* Gymnasium's rewards are float64, and a sink casts nothing: the actor's buffers have the dtypes of the example.
* After an episode, ``next_step`` environments take a step that only resets them: ``valid`` is False there.
  ``same_step`` environments reset at once: there the last observation is in ``infos["final_obs"]``.
* The server is a queue (FIFO), not a replay memory: it hands out each sample once. For DQN, keep a memory behind it
  (`replayed`). A queue makes data old, so it is short: two batches in the server, and ``max_unacked`` in the sink.
* Weights get back to the actors by shared memory. Between hosts, put a file or a parameter server in its place.
* The exit code is 0 if the mean return of the last 100 episodes reached ``--target``.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterable, Iterator

import echo
import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from echo_torch import EchoDataset, EchoSink, numpy_example

T, BATCH, ENVS, ACTORS = 32, 32, 8, 2  # steps of a window, windows of a batch, environments of each actor
GAMMA, LAMBDA, CLIP, EPOCHS, LEARNING_RATE = 0.99, 0.95, 0.2, 4, 1e-3

EXAMPLE = {
    "obs": torch.zeros(T, 4),
    "next_obs": torch.zeros(T, 4),  # what followed, also where an episode ended
    "action": torch.zeros(T, dtype=torch.int64),
    "log_prob": torch.zeros(T),
    "reward": torch.zeros(T),
    "terminated": torch.zeros(T, dtype=torch.bool),
    "done": torch.zeros(T, dtype=torch.bool),
    "valid": torch.zeros(T, dtype=torch.bool),  # False for a step that only reset the environment
    "episode_return": torch.zeros(T),  # of the episode that ended here, or else 0
}


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, n)) for n in (2, 1)
        )


@torch.no_grad()
def act(seed: int, port: int, weights: torch.Tensor, autoreset: str) -> None:
    """An actor: plays with the newest weights and sends windows, until the learner has finished."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    agent, mode = Agent(), AutoresetMode[autoreset.upper()]
    envs = gymnasium.make_vec("CartPole-v1", ENVS, "sync", vector_kwargs={"autoreset_mode": mode})
    obs, _ = envs.reset(seed=seed)
    windows = {name: torch.stack([leaf] * ENVS) for name, leaf in EXAMPLE.items()}  # (ENVS, T, ...)
    returns, resets = np.zeros(ENVS), np.zeros(ENVS, bool)
    # When the learner has finished, or was lost for 2 s, `learner_gone` becomes True, and nothing raises.
    gone = {"on_learner_gone": "stop", "stop_after": 0.5, "on_error": "warn", "reconnect": 2}
    with EchoSink("127.0.0.1", port, EXAMPLE, max_unacked=2 * ENVS, **gone) as sink:
        while not sink.learner_gone:
            vector_to_parameters(weights.clone(), agent.parameters())
            for t in range(T):
                policy = torch.distributions.Categorical(logits=agent.actor(torch.from_numpy(obs)))
                action = policy.sample()
                next_obs, reward, terminated, truncated, infos = envs.step(action.numpy())
                done, followed = terminated | truncated, next_obs.copy()
                if "final_obs" in infos:  # then `next_obs` has the first observation of the next episode already
                    followed[done] = np.stack(infos["final_obs"][done])
                returns += reward
                # In the order of EXAMPLE. Here the float64 rewards become float32.
                values = obs, followed, action, policy.log_prob(action), reward, terminated, done, ~resets
                for leaf, value in zip(windows.values(), (*values, np.where(done, returns, 0)), strict=True):
                    leaf[:, t] = torch.as_tensor(value)
                returns[done] = 0
                obs, resets = next_obs, done & (mode is AutoresetMode.NEXT_STEP)
            sink.send(windows)  # may be changed as soon as this returns


def update(agent: Agent, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    """One PPO update on a batch of windows, leaves ``(BATCH, T, ...)``."""
    valid = batch["valid"]
    with torch.no_grad():
        values, next_values = agent.critic(batch["obs"])[..., 0], agent.critic(batch["next_obs"])[..., 0]
        # A step that was cut off by a time limit has a future, one that terminated has none.
        advantage = batch["reward"] + GAMMA * next_values * ~batch["terminated"] - values
        for t in reversed(range(T - 1)):
            advantage[:, t] += GAMMA * LAMBDA * ~batch["done"][:, t] * valid[:, t + 1] * advantage[:, t + 1]
        target, advantage = (advantage + values)[valid], advantage[valid]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    obs, action, old = batch["obs"][valid], batch["action"][valid], batch["log_prob"][valid]
    for _ in range(EPOCHS):
        policy = torch.distributions.Categorical(logits=agent.actor(obs))
        ratio = (policy.log_prob(action) - old).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        value_loss = (agent.critic(obs)[:, 0] - target).square().mean()
        optimizer.zero_grad()
        (0.5 * value_loss - gain - 0.01 * policy.entropy().mean()).backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()


def replayed(batches: Iterable[dict[str, torch.Tensor]], capacity: int, size: int) -> Iterator[object]:
    """For DQN: keep the last ``capacity`` samples, and yield ``size`` random ones for each batch that comes."""
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, ReplayBuffer

    memory = ReplayBuffer(storage=LazyTensorStorage(capacity), batch_size=size)
    for batch in batches:
        memory.extend(TensorDict(batch, batch_size=[len(batch["obs"])]))
        yield memory.sample()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoreset", default="next_step", choices=["next_step", "same_step"])
    parser.add_argument("--updates", type=int, default=1500, help="end after so many in any case")
    parser.add_argument("--target", type=float, default=400.0, help="mean return to reach; CartPole's most is 500")
    options = parser.parse_args()
    agent, returns = Agent(), deque[float](maxlen=100)
    optimizer = torch.optim.Adam(agent.parameters(), LEARNING_RATE)
    weights = parameters_to_vector(agent.parameters()).detach().clone().share_memory_()
    server = echo.Server(numpy_example(EXAMPLE), BATCH, echo.TcpTransport(port=0), num_buffers=2)
    server.start()
    actors = spawn(act, (server.port, weights, options.autoreset), ACTORS, join=False)
    with EchoDataset(server, EXAMPLE) as batches:
        for number, batch in enumerate(batches, 1):
            update(agent, optimizer, batch)
            weights.copy_(parameters_to_vector(agent.parameters()).detach())
            returns.extend(batch["episode_return"][batch["done"]].tolist())
            mean = sum(returns) / max(1, len(returns))
            if mean >= options.target or number == options.updates:
                break
    print(f"{number} updates, mean return {mean:.0f}")
    while not actors.join():  # raises if one failed
        pass
    raise SystemExit(0 if mean >= options.target else 1)


if __name__ == "__main__":
    main()
