"""A small recurrent actor-critic, written by hand, that gains a decoupled core in three changed lines.

    python scripts/custom_agent.py --critic none      truncated BPTT, as it was
    python scripts/custom_agent.py --critic dni       the same agent with synthetic gradients; half a minute on one core

It knows nothing of `agents/`: model, losses and optimisers are its own. Each of the three lines is marked and stands below the one
that it replaces; along with them comes the critic, an object with an optimiser of its own.

The task is a T-maze of this project: a cue in the first step decides a turn eight steps later, and a window of backpropagation is four
steps long. This shows how it is done, not what it gains: here plain windows solve the maze on most seeds as well. docs/results compares
both where it matters, on longer corridors and with the same care for either.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import dni_rl
import envs

State = tuple[Tensor, ...]

CORRIDOR, NUM_ENVS, WINDOW, HIDDEN = 8, 64, 4, 32
DISCOUNT, ENTROPY_COST, BASELINE_COST = 0.95, 0.01, 0.1


class Agent(nn.Module):
    """LSTM, policy and value."""

    def __init__(self, num_inputs: int, num_actions: int):
        super().__init__()
        # core = nn.LSTM(num_inputs, HIDDEN)
        self.core = dni_rl.wrap(nn.LSTM(num_inputs, HIDDEN))  # changed line 1 of 3: also resets within a window
        self.policy = nn.Linear(HIDDEN, num_actions)
        self.value = nn.Linear(HIDDEN, 1)

    def unroll(self, observations: Tensor, state: State, first: Tensor) -> tuple[Tensor, Tensor, State]:
        """Logits [T, B, A], values [T, B] and the next state, of observations [T, B, D] from a state."""
        outputs, state = self.core.unroll(observations, state, first)
        return self.policy(outputs), self.value(outputs).squeeze(-1), state


def train(critic_kind: str, num_steps: int, seed: int) -> tuple[Agent, dni_rl.GradientCritic | None, float]:
    """Trains for `num_steps` agent steps; returns agent, error critic and the success rate of the last tenth of them."""
    # Streams that no two runs share, unlike those of seed, seed + 1, ...
    env_seed, model_seed, action_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(3))
    torch.manual_seed(model_seed)
    env = envs.make("PassiveTMaze", num_envs=NUM_ENVS, seed=env_seed, corridor_length=CORRIDOR, num_distractors=2)
    agent = Agent(env.spec.observation_shape[0], env.spec.num_actions)
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-3, betas=(0.9, 0.99))
    critic = critic_optimizer = None
    if critic_kind == "dni":
        critic = dni_rl.GradientCritic(state_sizes=agent.core.state_sizes, gradient_discount=0.95, max_norm_ratio=1.0)
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=3e-2, betas=(0.9, 0.99))
    torch.manual_seed(action_seed)  # the same draws with and without a critic

    state, step = agent.core.initial_state(NUM_ENVS), env.reset()
    num_updates = num_steps // (NUM_ENVS * WINDOW)
    successes = episodes = 0
    for update in range(num_updates):
        # state = tuple(s.detach() for s in state)
        state = dni_rl.cut(state)  # changed line 2 of 3: remembers where the window starts

        # Act for a window.
        steps, actions, acting_state = [step], [], state
        with torch.no_grad():
            for _ in range(WINDOW):
                logits, _, acting_state = agent.unroll(step.observation[None], acting_state, step.first[None])
                actions.append(torch.distributions.Categorical(logits=logits[0]).sample())
                step = env.step(actions[-1])
                steps.append(step)
            _, bootstrap_value, _ = agent.unroll(step.observation[None], acting_state, step.first[None])

        # Learn from it: one loss per step and environment, 0 in an episode's last step, whose action does nothing.
        observations, first, last = (
            torch.stack([getattr(s, n) for s in steps]) for n in ("observation", "first", "last")
        )
        logits, values, next_state = agent.unroll(observations[:-1], state, first[:-1])
        returns, g = [], bootstrap_value[0]
        for t in reversed(range(WINDOW)):
            g = steps[t + 1].reward + DISCOUNT * steps[t + 1].discount * g
            returns.append(g)
            g = torch.where(last[t], values[t].detach(), g)  # a time limit: the value of the last observation counts
        advantages = torch.stack(returns[::-1]) - values
        policy = torch.distributions.Categorical(logits=logits)
        losses = -policy.log_prob(torch.stack(actions)) * advantages.detach() - ENTROPY_COST * policy.entropy()
        losses = (losses + BASELINE_COST * advantages.square()) * ~last[:-1]

        optimizer.zero_grad()
        if critic_optimizer is not None:
            critic_optimizer.zero_grad()
        # losses.mean().backward()
        alive = ~(first | last)  # [T + 1, B], whether the episode goes on behind the state before a step
        dni_rl.backward(losses, start=state, end=next_state, critic=critic, alive=alive)  # changed line 3 of 3
        optimizer.step()
        if critic_optimizer is not None:
            critic_optimizer.step()
        state = next_state

        if update >= 0.9 * num_updates:
            for s in steps[1:]:
                episodes += int(s.last.sum())
                successes += int((s.last & (s.reward == 1.0)).sum())
    return agent, critic, successes / episodes if episodes else math.nan


def main(argv: Sequence[str] | None = None) -> int:
    """Trains once and prints what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--critic", choices=("none", "dni"), default="dni", help="error critic (default: dni)")
    parser.add_argument("--steps", type=int, default=600_000, help="agent steps (default: 600000)")
    parser.add_argument("--seed", type=int, default=0, help="of the run (default: 0)")
    arguments = parser.parse_args(argv)
    for name, least in (("steps", NUM_ENVS * WINDOW), ("seed", 0)):  # with fewer steps there is no update
        if getattr(arguments, name) < least:
            found = f"--{name}: found {getattr(arguments, name)}; allowed an integer of at least {least}"
            parser.exit(2, f"custom_agent.py: {found}; leave it out for the default, {parser.get_default(name)}\n")
    torch.set_num_threads(1)
    _, _, success = train(arguments.critic, arguments.steps, arguments.seed)
    print(f"critic {arguments.critic}, seed {arguments.seed}: {100 * success:.1f} % success at the end (chance: 50 %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
