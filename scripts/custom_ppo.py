"""PPO with an LSTM, written by hand for gymnasium's vector environments, that learns beyond its windows.

    python scripts/custom_ppo.py --critic none      truncated BPTT
    python scripts/custom_ppo.py --critic dni       the same agent with synthetic gradients; a minute on one core
    python scripts/custom_ppo.py --env-id CartPole-v1

The shape is that of CleanRL's ppo_atari_lstm.py: a rollout of T steps, passes over minibatches of whole environments. What a decoupled core
adds is marked with `# dni`: a rollout is learned as T / K windows side by side, each from the state in which the agent acted, and the error
critic learns in the first pass alone. It knows nothing of `agents/`; `scripts/custom_agent.py` is the shorter form for A2C.

The task is this project's T-maze through gymnasium: a cue in the first step decides a turn eight steps later, a window is four steps long.
This shows how it is done, not what it gains; docs/results compares. Observations are vectors, actions discrete, and environments reset in
the step after an episode's end, which is gymnasium's default.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import dni_rl
import envs.exports

NUM_ENVS, ROLLOUT, WINDOW, HIDDEN = 32, 32, 4, 32  # ROLLOUT is a multiple of WINDOW
EPOCHS, MINIBATCHES, CLIP = 2, 2, 0.2
DISCOUNT, GAE_LAMBDA, ENTROPY_COST, VALUE_COST, MAX_GRAD_NORM = 0.95, 0.95, 0.01, 0.5, 0.5


class Agent(nn.Module):
    """LSTM, policy and value."""

    def __init__(self, num_inputs: int, num_actions: int):
        super().__init__()
        self.torso = nn.Sequential(nn.Linear(num_inputs, 64), nn.Tanh())
        self.core = dni_rl.wrap(nn.LSTM(64, HIDDEN))  # dni: resets within a window, and states by which it can be cut
        self.policy = nn.Linear(HIDDEN, num_actions)
        self.value = nn.Linear(HIDDEN, 1)

    def unroll(self, observations: Tensor, state: dni_rl.State, first: Tensor) -> tuple[Tensor, Tensor, dni_rl.State]:
        """Logits [T, B, A], values [T, B] and the next state, of observations [T, B, D] from a state."""
        outputs, state = self.core.unroll(self.torso(observations), state, first)
        return self.policy(outputs), self.value(outputs).squeeze(-1), state


def side_by_side(x: Tensor, rows: Tensor) -> Tensor:
    """The windows [K, W * M, ...] of M environments, given by their rows, of [T, B, ...] or [T + 1, B, ...]."""
    return x[:ROLLOUT].unflatten(0, (-1, WINDOW)).transpose(0, 1)[:, :, rows].flatten(1, 2)


def at_ends(x: Tensor, rows: Tensor) -> Tensor:
    """The row behind each of those windows, [W * M, ...], of [T + 1, B, ...]."""
    return x[WINDOW::WINDOW][:, rows].flatten(0, 1)


def train(
    env_id: str, critic_kind: str, num_steps: int, seed: int
) -> tuple[Agent, dni_rl.GradientCritic | None, float]:
    """Trains for `num_steps` agent steps; returns agent, error critic and the mean return of the last tenth of them."""
    # Streams that no two runs share, unlike those of seed, seed + 1, ...
    env_seed, model_seed, action_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(3))
    torch.manual_seed(model_seed)
    envs.exports.register()
    options: dict[str, Any] = {}
    if env_id == "dni_rl/PassiveTMaze-v0":
        options = {"corridor_length": 8, "num_distractors": 2}
    environment = gymnasium.make_vec(env_id, num_envs=NUM_ENVS, **options)
    observed, acted = environment.single_observation_space, environment.single_action_space
    if not isinstance(observed, gymnasium.spaces.Box) or not isinstance(acted, gymnasium.spaces.Discrete):
        raise gymnasium.error.Error(
            f"--env-id: found {env_id} with {observed} and {acted}; allowed Box and Discrete; take another"
        )
    agent = Agent(int(np.prod(observed.shape)), int(acted.n))
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-8)
    critic = critic_optimizer = None
    if critic_kind == "dni":
        critic = dni_rl.GradientCritic(state_sizes=agent.core.state_sizes, gradient_discount=0.95, max_norm_ratio=1.0)
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=3e-2)
    torch.manual_seed(action_seed)  # the same draws with and without a critic

    def to_tensor(observation: np.ndarray) -> Tensor:
        return torch.as_tensor(observation, dtype=torch.float32).flatten(1)

    observation, _ = environment.reset(seed=env_seed)
    state = agent.core.initial_state(NUM_ENVS)
    # What the row of an observation is: the first of its episode, the last of it (of which the action is ignored).
    row = (to_tensor(observation), torch.ones(NUM_ENVS, dtype=torch.bool), torch.zeros(NUM_ENVS, dtype=torch.bool))
    running, finished = np.zeros(NUM_ENVS), []
    num_updates = num_steps // (NUM_ENVS * ROLLOUT)
    for update in range(num_updates):
        # Act.
        rows, taken, starts = [row], [], []
        for t in range(ROLLOUT):
            if t % WINDOW == 0:
                starts.append(state)  # dni: where each window starts
            with torch.no_grad():
                logits, value, state = agent.unroll(row[0][None], state, row[1][None])
            policy = Categorical(logits=logits[0])
            action = policy.sample()
            observation, reward, terminated, truncated, _ = environment.step(action.numpy())
            running += reward
            over = terminated | truncated
            if update >= 0.9 * num_updates:
                finished += running[over].tolist()
            running[over] = 0.0
            numbers = torch.as_tensor(np.stack([reward, terminated]), dtype=torch.float32)
            taken.append((action, policy.log_prob(action), value[0], *numbers))
            row = (to_tensor(observation), row[2], torch.as_tensor(over))
            rows.append(row)
        observations, first, last = (torch.stack(column) for column in zip(*rows, strict=True))  # [T + 1, B, ...]
        actions, log_probs, values, rewards, terminations = (torch.stack(column) for column in zip(*taken, strict=True))
        valid = ~last[:-1]  # an action in an episode's last step does nothing

        # Generalised advantages; a time limit counts the value of the last observation.
        with torch.no_grad():
            _, next_value, _ = agent.unroll(row[0][None], state, row[1][None])
        deltas = rewards + DISCOUNT * (1.0 - terminations) * torch.cat([values[1:], next_value]) - values
        advantages, carried = torch.zeros_like(deltas), torch.zeros(NUM_ENVS)
        for t in reversed(range(ROLLOUT)):
            carried = valid[t] * (deltas[t] + DISCOUNT * GAE_LAMBDA * ~last[t + 1] * carried)
            advantages[t] = carried
        returns = advantages + values
        normal = (advantages - advantages[valid].mean()) / (advantages[valid].std() + 1e-8)

        # Learn.
        going_on = ~(first | last)  # dni: [T + 1, B], whether the episode goes on behind the state before a step
        for epoch in range(EPOCHS):
            for mb in torch.randperm(NUM_ENVS).chunk(MINIBATCHES):
                start = dni_rl.cut([torch.cat([s[i][mb] for s in starts]) for i in range(len(state))])  # dni
                logits, new_values, end = agent.unroll(side_by_side(observations, mb), start, side_by_side(first, mb))
                policy = Categorical(logits=logits)
                ratio = (policy.log_prob(side_by_side(actions, mb)) - side_by_side(log_probs, mb)).exp()
                advantage = side_by_side(normal, mb)
                losses = -torch.minimum(ratio * advantage, ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * advantage)
                losses = losses + 0.5 * VALUE_COST * (new_values - side_by_side(returns, mb)).square()
                losses = (losses - ENTROPY_COST * policy.entropy()) * side_by_side(valid, mb)  # [K, W * M], not reduced

                optimizer.zero_grad()
                if critic_optimizer is not None:
                    critic_optimizer.zero_grad()  # dni
                alive = torch.cat([side_by_side(going_on, mb), at_ends(going_on, mb)[None]])  # dni
                # dni: in place of losses.mean().backward()
                dni_rl.backward(losses, start=start, end=end, critic=critic, alive=alive, fit=epoch == 0)
                nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                if critic_optimizer is not None and epoch == 0:
                    critic_optimizer.step()  # dni
    environment.close()
    return agent, critic, float(np.mean(finished)) if finished else float("nan")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains once and prints what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="dni_rl/PassiveTMaze-v0", help="of gymnasium (default: the T-maze)")
    parser.add_argument("--critic", choices=("none", "dni"), default="dni", help="error critic (default: dni)")
    parser.add_argument("--steps", type=int, default=600_000, help="agent steps (default: 600000)")
    parser.add_argument("--seed", type=int, default=0, help="of the run (default: 0)")
    arguments = parser.parse_args(argv)
    for name, least in (("steps", NUM_ENVS * ROLLOUT), ("seed", 0)):  # with fewer steps there is no update
        if getattr(arguments, name) < least:
            found = f"--{name}: found {getattr(arguments, name)}; allowed an integer of at least {least}"
            parser.exit(2, f"custom_ppo.py: {found}; leave it out for the default, {parser.get_default(name)}\n")
    torch.set_num_threads(1)
    try:
        _, _, mean_return = train(arguments.env_id, arguments.critic, arguments.steps, arguments.seed)
    except gymnasium.error.Error as error:
        parser.exit(2, f"custom_ppo.py: {' '.join(str(error).split())}\n")
    print(
        f"{arguments.env_id}, critic {arguments.critic}, seed {arguments.seed}: mean return {mean_return:.2f} at the end"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
