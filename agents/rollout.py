"""Acting: steps environments with the current policy and keeps what a learner needs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.model import ActorCritic
from dni_rl.cores import State
from envs.timestep import Environment, TimeStep, least_return


@dataclass(slots=True)
class Rollout:
    """T steps of B environments, and one more observation to bootstrap from.

    Attributes:
        observation: [T + 1, B, ...].
        action_tm1: [T + 1, B] action that led to each step.
        reward: [T + 1, B] of the transition into each step.
        discount: [T + 1, B], 0 where that transition terminated an episode.
        first: [T + 1, B] bool.
        last: [T + 1, B] bool.
        context: [T + 1, B, Z] what error critics are told, or None; of the environment, until `agents.learner.with_inputs` adds to it.
        action: [T, B] int64.
        logits: [T, B, A] of the policy that acted.
        value: [T + 1, B].
        final_value: [T + 1, B] value of the observation in which a time limit ended the last episode; meaningful only where
            same-step autoreset made step t the `first` of a new one.
        states: tuple of [T / K, B, n]: the core's state before every K-th step, K the truncation window, as the actor had it.
        privileged: [T + 1, B, Z] the environment's context, where the value function is told it, or None.
    """

    observation: Tensor
    action_tm1: Tensor
    reward: Tensor
    discount: Tensor
    first: Tensor
    last: Tensor
    context: Tensor | None
    action: Tensor
    logits: Tensor
    value: Tensor
    final_value: Tensor
    states: State
    privileged: Tensor | None = None


class EpisodeStatistics:
    """Returns, lengths and successes of finished episodes, counted on the device.

    With next-step autoreset an episode ends at its LAST step, with same-step autoreset at the `first` step of the next one.
    """

    _COUNTERS = ("_return", "_length", "_done", "_returns", "_lengths", "_successes", "_was_last")

    def __init__(self, num_envs: int, success_reward: float | None, device: torch.device):
        self.success_reward = success_reward
        zeros = torch.zeros(num_envs, dtype=torch.float64, device=device)
        self._return, self._length = zeros.clone(), zeros.clone()
        self._done, self._returns, self._lengths, self._successes = (zeros.clone() for _ in range(4))
        # of the step before those counted, at first that of the reset
        self._was_last = torch.zeros(num_envs, dtype=torch.bool, device=device)

    def observe_rollout(self, rewards: Tensor, first: Tensor | None, last: Tensor) -> None:
        """Counts T steps at once: rewards, first, last are [T, B]. The reset is not one of them: no transition led to it.

        `first` is None where it follows `last` and nothing else.
        """
        T = len(rewards)
        was_last = torch.cat([self._was_last.unsqueeze(0), last[:-1]])
        first = was_last if first is None else first
        restarted = first & was_last  # no transition led here
        ended = last | (first & ~was_last)
        # Sums since the last end: the running sum at an end minus the running sum at the end before.
        sums = torch.stack([rewards.to(torch.float64).masked_fill(restarted, 0.0), (~restarted).to(torch.float64)])
        carried = torch.stack([self._return, self._length]).unsqueeze(1)
        running = torch.cat([torch.zeros_like(carried), carried + sums.cumsum(1)], dim=1)  # [2, T + 1, B]
        steps = torch.arange(1, T + 1, device=rewards.device).unsqueeze(1)
        latest_end = torch.where(ended, steps, 0).cummax(0).values  # [T, B], 0 where none yet
        before = torch.cat([torch.zeros_like(latest_end[:1]), latest_end[:-1]])
        returns, lengths = running[:, 1:] - running.gather(1, before.expand(2, -1, -1))
        counted = ended.to(torch.float64)
        self._done += counted.sum(0)
        self._returns += (returns * counted).sum(0)
        self._lengths += (lengths * counted).sum(0)
        if self.success_reward is not None:
            self._successes += (ended & (returns >= least_return(self.success_reward))).sum(0)
        self._return, self._length = running[:, -1] - running.gather(1, latest_end[-1:].expand(2, -1, -1)).squeeze(1)
        self._was_last = last[-1].clone()

    def pop(self) -> dict[str, Tensor]:
        """Means over the episodes that ended since the last call; NaN where none did. No host synchronisation."""
        count = self._done.sum()
        results = {
            "charts/episodic_return": self._returns.sum() / count,
            "charts/episodic_length": self._lengths.sum() / count,
            "charts/episodes": count.clone(),
        }
        if self.success_reward is not None:
            results["charts/success_rate"] = self._successes.sum() / count
        for counter in (self._done, self._returns, self._lengths, self._successes):
            counter.zero_()
        return results

    def abandon(self) -> None:
        """Forgets the episodes under way, where new ones begin."""
        for counter in (self._return, self._length, self._was_last):
            counter.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Counters, for an exact resume."""
        return {name: getattr(self, name).clone() for name in self._COUNTERS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`."""
        for name in self._COUNTERS:
            setattr(self, name, state[name].to(getattr(self, name).device).clone())


def _check_own_memory(earlier: Tensor, now: Tensor) -> None:
    """Refuses an environment that writes every observation into the same memory: those of a rollout would all be its last."""
    if now.data_ptr() == 0 or earlier.data_ptr() != now.data_ptr():  # 0: of tensors without memory
        return
    raise ValueError(
        "observation: found the memory of the last step's once more; allowed tensors of their own for each step, since those of a rollout "
        "are kept; return a copy"
    )


class Actor:
    """Collects rollouts.

    Args:
        environment: B environments.
        model: the network that acts; the learner updates it in place.
        rollout_length: T.
        bptt_horizon: K, divides T: the core's state is kept before every K-th step.
        seed: of the stream that samples actions.
    """

    def __init__(
        self, environment: Environment, model: ActorCritic, *, rollout_length: int, bptt_horizon: int, seed: int
    ):
        self.environment, self.model = environment, model
        self.rollout_length, self.bptt_horizon = rollout_length, bptt_horizon
        device, spec, B = environment.device, environment.spec, environment.num_envs
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.statistics = EpisodeStatistics(B, spec.success_reward, device)
        self.state = model.core.initial_state(B)
        self.action_tm1 = torch.zeros(B, dtype=torch.int64, device=device)
        self.timestep: TimeStep | None = None
        self.rollout: Rollout | None = None  # the last one

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Takes T steps."""
        T, B, A = self.rollout_length, self.environment.num_envs, self.environment.spec.num_actions
        timestep = self.environment.reset() if self.timestep is None else self.timestep
        # argmax(logits + Gumbel noise) is a draw from softmax(logits); the noise of a whole rollout comes in one call
        noise = (
            torch.empty(T, B, A, device=self.environment.device).exponential_(generator=self.generator).log_().neg_()
        ).unbind()
        timesteps, actions, logits, outputs, states = [timestep], [self.action_tm1], [], [], []
        final_values: list[Tensor | None] = [None]
        for t in range(T):
            if t % self.bptt_horizon == 0:
                states.append(self.state)
            step_logits, output, self.state = self.model.act(
                timestep.observation, self.action_tm1, timestep.reward, timestep.first, self.state
            )
            self.action_tm1 = (step_logits + noise[t]).argmax(-1)
            timestep = self.environment.step(self.action_tm1)
            _check_own_memory(timesteps[-1].observation, timestep.observation)
            timesteps.append(timestep)
            actions.append(self.action_tm1)
            logits.append(step_logits)
            outputs.append(output)
            final_values.append(None if timestep.final_observation is None else self._final_value(timestep))
        self.timestep = timestep
        _, output, _ = self.model.act(
            timestep.observation, self.action_tm1, timestep.reward, timestep.first, self.state
        )
        contexts = [step.context for step in timesteps if step.context is not None]
        context = torch.stack(contexts) if contexts else None
        privileged = context if self.model.privileged_size else None
        value_tp1 = self.model.value_of(torch.stack([*outputs, output]), privileged)
        action_tm1 = torch.stack(actions)
        rollout = Rollout(
            observation=torch.stack([step.observation for step in timesteps]),
            action_tm1=action_tm1,
            reward=torch.stack([step.reward for step in timesteps]),
            discount=torch.stack([step.discount for step in timesteps]),
            first=torch.stack([step.first for step in timesteps]),
            last=torch.stack([step.last for step in timesteps]),
            context=context,
            action=action_tm1[1:],
            logits=torch.stack(logits),
            value=value_tp1,
            final_value=torch.stack([v if f is None else f for f, v in zip(final_values, value_tp1, strict=True)]),
            states=tuple(torch.stack(component) for component in zip(*states, strict=True)),
            privileged=privileged,
        )
        rewards = torch.stack([step.reward if step.raw_reward is None else step.raw_reward for step in timesteps[1:]])
        games_over = [step.game_over for step in timesteps[1:] if step.game_over is not None]
        if games_over:  # scores are those of whole games, whatever the agent takes for an episode
            self.statistics.observe_rollout(rewards, None, torch.stack(games_over))
        else:
            self.statistics.observe_rollout(rewards, rollout.first[1:], rollout.last[1:])
        self.rollout = rollout
        return rollout

    def _final_value(self, timestep: TimeStep) -> Tensor:
        """V of the observation in which a time limit cut an episode: the memory that acted there, one observation further."""
        assert timestep.final_observation is not None
        if self.model.privileged_size:
            raise ValueError(
                "model.privileged_value: found true with an environment that starts a new episode in the step that ends one, and has no "
                "context of its last observation; allowed environments with a LAST step; set --model.privileged_value false"
            )
        _, output, _ = self.model.act(
            timestep.final_observation, self.action_tm1, timestep.reward, torch.zeros_like(timestep.first), self.state
        )
        return self.model.value_of(output)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to act on exactly: core state, last step, random stream and the environments' own state.

        Without a resumable environment (an emulator that cannot be saved) new episodes start after loading.
        """
        state: dict[str, Any] = {
            "generator": self.generator.get_state(),
            "environment": None,
            "statistics": self.statistics.state_dict(),
        }
        if self.environment.resumable:
            timestep = self.timestep
            state |= {
                "environment": self.environment.state_dict(),
                "core_state": [s.clone() for s in self.state],
                "action_tm1": self.action_tm1.clone(),
                "timestep": None
                if timestep is None
                else {name: getattr(timestep, name) for name in TimeStep.__dataclass_fields__},
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.generator.set_state(state["generator"].cpu())
        if state["environment"] is None:
            if "statistics" in state:  # which checkpoints of earlier versions are without
                self.statistics.load_state_dict(state["statistics"])
                self.statistics.abandon()
            return
        device = self.environment.device
        self.environment.load_state_dict(state["environment"])
        self.state = tuple(s.to(device) for s in state["core_state"])
        self.action_tm1 = state["action_tm1"].to(device)
        self.statistics.load_state_dict(state["statistics"])
        kept = state["timestep"]
        if kept is not None:
            self.timestep = TimeStep(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in kept.items()})
