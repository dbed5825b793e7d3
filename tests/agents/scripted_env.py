"""An environment whose episodes are known beforehand, with either kind of autoreset: the ground truth of agent tests."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.build import build_model
from agents.config import ModelConfig
from agents.model import ActorCritic
from dni_rl import State
from envs.timestep import EnvSpec, TimeStep


@dataclass(frozen=True)
class Episode:
    """L transitions: observations [L + 1, D], contexts [L + 1, Z], rewards [L]; `terminates`, or else a time limit cuts it."""

    observations: Tensor
    contexts: Tensor
    rewards: Tensor
    terminates: bool


class ScriptedEnv:
    """B rows of random episodes that take no notice of the actions.

    Args:
        num_envs: B.
        seed: of the episodes: equal seeds give equal episodes, whatever the autoreset.
        device: the CPU.
        same_step: whether rows reset within the step that ends an episode, and so never show a LAST step.
        max_length: most transitions of an episode; the fewest are 1.
        context_size: Z.
        nan_field: field of TimeStep that becomes NaN in step `nan_step`, the reset being step 0.
        nan_step: see there.
    """

    resumable = False

    def __init__(
        self,
        *,
        num_envs: int,
        seed: int,
        device: Any = "cpu",
        same_step: bool = False,
        max_length: int = 5,
        context_size: int = 2,
        nan_field: str | None = None,
        nan_step: int = 0,
    ):
        self.num_envs, self.device, self.same_step = num_envs, torch.device(device), same_step
        self.spec = EnvSpec((3,), torch.float32, num_actions=3, context_size=context_size, success_reward=0.0)
        self.max_length = max_length
        self._generator = torch.Generator().manual_seed(seed)
        self._episodes: list[list[Episode]] = [[] for _ in range(num_envs)]
        self._places = [(0, 0)] * num_envs  # episode and step in it
        self._nan, self._steps = (nan_field, nan_step), 0

    def episode(self, row: int, index: int) -> Episode:
        """The `index`-th episode of a row."""
        while len(self._episodes[row]) <= index:
            for episodes in self._episodes:  # all rows at once, so that the order of asking does not matter
                episodes.append(self._draw())
        return self._episodes[row][index]

    def _draw(self) -> Episode:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=self._generator)

        length = int(torch.randint(1, self.max_length + 1, (), generator=self._generator))
        terminates = bool(torch.rand((), generator=self._generator) < 0.5)
        Z = self.spec.context_size
        return Episode(normal(length + 1, 3), normal(length + 1, Z), normal(length), terminates)

    def reset(self) -> TimeStep:
        """Starts at the first episodes."""
        self._places = [(0, 0)] * self.num_envs
        return self._timestep([self._row(row, None) for row in range(self.num_envs)])

    def step(self, actions: Tensor) -> TimeStep:
        """Ignores the actions."""
        assert actions.shape == (self.num_envs,)
        assert ((actions >= 0) & (actions < 3)).all()
        rows = []
        for row, (index, t) in enumerate(self._places):
            episode = self.episode(row, index)
            length = len(episode.rewards)
            if t == length:  # next-step autoreset
                self._places[row] = (index + 1, 0)
                rows.append(self._row(row, None))
            elif t + 1 == length and self.same_step:
                self._places[row] = (index + 1, 0)
                rows.append(self._row(row, episode))
            else:
                self._places[row] = (index, t + 1)
                rows.append(self._row(row, None))
        return self._timestep(rows)

    def _row(self, row: int, ended: Episode | None) -> dict[str, Any]:
        """The step at the row's place; `ended` is the episode that the same step finished."""
        index, t = self._places[row]
        episode = self.episode(row, index)
        last = t == len(episode.rewards)
        result = {
            "observation": episode.observations[t],
            "reward": episode.rewards[t - 1] if t else torch.tensor(0.0),
            "discount": 0.0 if last and episode.terminates else 1.0,
            "first": t == 0,
            "last": last,
            "context": episode.contexts[t],
            "final_observation": episode.observations[t],
            "cut": False,
        }
        if ended is not None:
            result |= {
                "reward": ended.rewards[-1],
                "discount": float(not ended.terminates),
                "cut": not ended.terminates,
            }
            result["final_observation"] = ended.observations[-1]
        return result

    def _timestep(self, rows: list[dict[str, Any]]) -> TimeStep:
        fields: dict[str, Any] = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        if not fields.pop("cut").any():
            fields["final_observation"] = None
        if not self.spec.context_size:
            fields["context"] = None
        name, at = self._nan
        if name is not None and self._steps == at:
            fields[name] = fields[name].clone().fill_(torch.nan)
        self._steps += 1
        return TimeStep(**fields)

    def state_dict(self) -> dict[str, Any]:
        """Refused, as by an emulator."""
        raise RuntimeError("not resumable")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refused, as by an emulator."""
        raise RuntimeError("not resumable")

    def close(self) -> None:
        """Nothing to free."""


class LivesEnv(ScriptedEnv):
    """Every episode is a life, and a game has two; rewards are clipped, raw ones kept, as by envs.atari."""

    def reset(self) -> TimeStep:
        """Starts at the first games."""
        self._is_second = torch.zeros(self.num_envs, dtype=torch.bool)
        return self._as_game(super().reset())

    def step(self, actions: Tensor) -> TimeStep:
        """Ignores the actions."""
        return self._as_game(super().step(actions))

    def _as_game(self, timestep: TimeStep) -> TimeStep:
        game_over = timestep.last & self._is_second
        self._is_second = self._is_second ^ timestep.last
        reward = timestep.reward.clamp(-0.1, 0.1)
        return replace(timestep, reward=reward, raw_reward=timestep.reward, game_over=game_over)

    def game(self, row: int, index: int) -> tuple[float, int]:
        """Points and length of the `index`-th game of a row: the step that goes on after a lost life is one of them."""
        lives = [self.episode(row, 2 * index + life).rewards for life in range(2)]
        return sum(float(rewards.sum()) for rewards in lives), 1 + sum(len(rewards) for rewards in lives)


def make_model(core: Any = "lstm", num_layers: int = 1, *, seed: int = 0, **settings: Any) -> ActorCritic:
    """A tiny actor-critic for ScriptedEnv whose policy is far from uniform."""
    torch.manual_seed(seed)
    env = ScriptedEnv(num_envs=1, seed=0)
    config = ModelConfig(core=core, num_layers=num_layers, hidden_size=5, torso_sizes=(4,), **settings)
    model = build_model(config, env.spec)
    with torch.no_grad():
        list(model.policy_head.parameters())[-2].mul_(100.0)  # the last weight, which starts almost at zero
    return model


def naive_row(
    model: ActorCritic, env: ScriptedEnv, row: int, actions: Tensor
) -> tuple[list[tuple[State, Tensor, Tensor]], dict[int, Tensor]]:
    """Acts out what row `row` shows, episode by episode with a fresh memory, given what it did [N].

    Returns:
        For each of N + 1 steps the state before it, logits, value; and by step, where a time limit cut an episode within the
        step, the value of the observation it ended in.
    """
    steps: list[tuple[State, Tensor, Tensor]] = []
    finals: dict[int, Tensor] = {}
    index = 0
    last_state = model.core.initial_state(1)
    with torch.no_grad():
        while len(steps) <= len(actions):
            episode = env.episode(row, index)
            length, state = len(episode.rewards), model.core.initial_state(1)
            action, reward = torch.zeros(3), torch.zeros(1)
            for t in range(length + 1):
                x = torch.cat([model.torso(episode.observations[t]), action, reward]).unsqueeze(0)
                output, next_state = model.core(x, state)
                told = episode.contexts[t].unsqueeze(0) if model.privileged_size else None
                logits, value = model.heads(output, told)
                if t == length and env.same_step:  # never acted on, only valued
                    if not episode.terminates:
                        finals[len(steps)] = value
                    break
                steps.append((last_state if t == 0 else state, logits, value))
                if len(steps) > len(actions):
                    break
                last_state = state = next_state
                action = F.one_hot(actions[len(steps) - 1], 3).float()
                if t < length:
                    reward = episode.rewards[t : t + 1].clamp(-1, 1)
            index += 1
    return steps, finals
