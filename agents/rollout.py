"""Acting: steps environments with the current policy and keeps what a learner needs, in buffers allocated once."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.model import ActorCritic
from dni_rl.cores import State
from envs.timestep import Environment, TimeStep


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
        context: [T + 1, B, Z], or None.
        action: [T, B] int64.
        logits: [T, B, A] of the policy that acted.
        value: [T + 1, B].
        final_value: [T + 1, B] value of the observation in which a time limit ended the last episode; meaningful only where
            same-step autoreset made step t the `first` of a new one.
        states: tuple of [T / K, B, n]: the core's state before every K-th step, K the truncation window, as the actor had it.
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
        self._was_last = torch.ones(num_envs, dtype=torch.bool, device=device)  # nothing ends at the very first step

    def observe_rollout(self, rewards: Tensor, first: Tensor, last: Tensor) -> None:
        """Counts T steps at once: rewards, first, last are [T, B]."""
        for reward, is_first, is_last in zip(rewards.to(torch.float64), first, last, strict=True):
            restarted = is_first & self._was_last  # no transition led here
            self._return += reward.masked_fill(restarted, 0.0)
            self._length += ~restarted
            ended = is_last | (is_first & ~self._was_last)
            self._done += ended
            self._returns += self._return * ended
            self._lengths += self._length * ended
            if self.success_reward is not None:
                self._successes += ended & (self._return >= self.success_reward - 1e-6)
            self._return.masked_fill_(ended, 0.0)
            self._length.masked_fill_(ended, 0.0)
            self._was_last = is_last.clone()

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

    def state_dict(self) -> dict[str, Tensor]:
        """Counters, for an exact resume."""
        return {name: getattr(self, name).clone() for name in self._COUNTERS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`."""
        for name in self._COUNTERS:
            setattr(self, name, state[name].to(getattr(self, name).device).clone())


class Actor:
    """Collects rollouts.

    Args:
        environment: B environments.
        model: the network that acts; the learner updates it in place.
        rollout_length: T.
        bptt_horizon: K, divides T: the core's state is kept before every K-th step.
        seed: of the stream that samples actions.
    """

    def __init__(self, environment: Environment, model: ActorCritic, *, rollout_length: int, bptt_horizon: int, seed: int):
        self.environment, self.model = environment, model
        self.rollout_length, self.bptt_horizon = rollout_length, bptt_horizon
        device, spec, B, T = environment.device, environment.spec, environment.num_envs, rollout_length
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.statistics = EpisodeStatistics(B, spec.success_reward, device)
        self.state = model.core.initial_state(B)
        self.action_tm1 = torch.zeros(B, dtype=torch.int64, device=device)
        self.timestep: TimeStep | None = None

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.rollout = Rollout(
            observation=buffer(T + 1, B, *spec.observation_shape, dtype=spec.observation_dtype),
            action_tm1=buffer(T + 1, B, dtype=torch.int64),
            reward=buffer(T + 1, B),
            discount=buffer(T + 1, B),
            first=buffer(T + 1, B, dtype=torch.bool),
            last=buffer(T + 1, B, dtype=torch.bool),
            context=buffer(T + 1, B, spec.context_size) if spec.context_size else None,
            action=buffer(T, B, dtype=torch.int64),
            logits=buffer(T, B, spec.num_actions),
            value=buffer(T + 1, B),
            final_value=buffer(T + 1, B),
            states=tuple(buffer(T // bptt_horizon, B, *s.shape[1:]) for s in self.state),
        )
        self._raw_reward = buffer(T + 1, B)

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Takes T steps. The returned buffers are overwritten by the next call."""
        rollout, T = self.rollout, self.rollout_length
        timestep = self.environment.reset() if self.timestep is None else self.timestep
        self._store(0, timestep)
        for t in range(T):
            if t % self.bptt_horizon == 0:
                for kept, s in zip(rollout.states, self.state, strict=True):
                    kept[t // self.bptt_horizon].copy_(s)
            logits, value, self.state = self.model.step(
                timestep.observation, self.action_tm1, timestep.reward, timestep.first, self.state
            )
            action = self._sample(logits)
            rollout.logits[t], rollout.value[t], rollout.action[t] = logits, value, action
            timestep = self.environment.step(action)
            self.action_tm1 = action
            self._store(t + 1, timestep)
            if timestep.final_observation is not None:
                # The same memory that acted, one observation further, in the episode that the time limit cut.
                continues = torch.zeros_like(timestep.first)
                _, rollout.final_value[t + 1], _ = self.model.step(
                    timestep.final_observation, action, timestep.reward, continues, self.state
                )
        self.timestep = timestep
        _, rollout.value[T], _ = self.model.step(
            timestep.observation, self.action_tm1, timestep.reward, timestep.first, self.state
        )
        self.statistics.observe_rollout(self._raw_reward[1:], rollout.first[1:], rollout.last[1:])
        return rollout

    def _store(self, t: int, timestep: TimeStep) -> None:
        rollout = self.rollout
        rollout.observation[t] = timestep.observation
        rollout.action_tm1[t] = self.action_tm1
        rollout.reward[t] = timestep.reward
        rollout.discount[t] = timestep.discount
        rollout.first[t] = timestep.first
        rollout.last[t] = timestep.last
        if rollout.context is not None and timestep.context is not None:
            rollout.context[t] = timestep.context
        self._raw_reward[t] = timestep.reward if timestep.raw_reward is None else timestep.raw_reward

    def _sample(self, logits: Tensor) -> Tensor:
        # argmax p / e with e ~ Exp(1) is a draw from p (the exponential race): cheaper than torch.multinomial
        race = torch.empty_like(logits).exponential_(generator=self.generator)
        return (F.softmax(logits, dim=-1) / race).argmax(-1)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to act on exactly: core state, last step, random stream and the environments' own state.

        Without a resumable environment (an emulator that cannot be saved) new episodes start after loading.
        """
        state: dict[str, Any] = {"generator": self.generator.get_state(), "environment": None}
        if self.environment.resumable:
            timestep = self.timestep
            state |= {
                "environment": self.environment.state_dict(),
                "core_state": [s.clone() for s in self.state],
                "action_tm1": self.action_tm1.clone(),
                "statistics": self.statistics.state_dict(),
                "timestep": None
                if timestep is None
                else {name: getattr(timestep, name) for name in TimeStep.__dataclass_fields__},
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.generator.set_state(state["generator"].cpu())
        if state["environment"] is None:
            return
        device = self.environment.device
        self.environment.load_state_dict(state["environment"])
        self.state = tuple(s.to(device) for s in state["core_state"])
        self.action_tm1 = state["action_tm1"].to(device)
        self.statistics.load_state_dict(state["statistics"])
        kept = state["timestep"]
        if kept is not None:
            self.timestep = TimeStep(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in kept.items()})
