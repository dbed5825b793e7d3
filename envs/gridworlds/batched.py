"""What the gridworlds share: a batch in lockstep, next-step autoreset, replayable random draws, saved state."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from envs.arguments import require_integer
from envs.timestep import EnvSpec, TimeStep

# One call of the generator serves this many steps. Part of the random stream: another value is another stream.
_STEPS_PER_DRAW = 32
# By so much the return of every success must exceed that of every failure: sums of rewards are rounded.
SUCCESS_MARGIN = 1e-4


class BatchedGridworld(ABC):
    """B gridworlds that step together. Implements `envs.timestep.Environment` but for the dynamics.

    A subclass names its state tensors in `state_names`, draws randomness in `_draw` and moves in `_advance`. It
    replaces its tensors and never writes into them, so that what a TimeStep holds never changes later.

    On the CPU a wrong action raises at once. On an accelerator that would stall every step, so there the check lags:
    the error comes within the next few steps, at the latest in `state_dict` or `close`, and what was computed meanwhile
    is void.

    Attributes:
        spec: what an agent must know.
        num_envs: B.
        device: where all tensors live.
        resumable: always True.
        observation_names: one name per entry of an observation.
        context_names: one name per entry of the context.
        state_names: attributes that hold the state, [B, ...] tensors.
    """

    resumable = True
    spec: EnvSpec
    observation_names: tuple[str, ...]
    context_names: tuple[str, ...]
    state_names: tuple[str, ...]

    def __init__(self, *, num_envs: int, seed: int, device: torch.device | str, dials: dict[str, Any]):
        """Starts the random stream; episodes start with `reset`.

        Args:
            num_envs: B.
            seed: of the random stream, in [0, 2**63); PyTorch's generator on the CPU reads its lowest 32 bits.
            device: where all tensors live.
            dials: the resolved settings of the task; saved states are only accepted by an equal task.
        """
        require_integer("num_envs", num_envs, 1)
        self.num_envs = num_envs
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._name = f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in dials.items())})"
        self._generator = torch.Generator(self.device)
        self._draws: list[tuple[Tensor, ...]] = []
        self._last = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        if self.device.type == "cuda":
            self._extremes = torch.zeros(2, dtype=torch.int64, device=self.device)  # -min and max of all actions so far
            self._extremes_on_host = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self.reseed(seed)

    def __repr__(self) -> str:
        return f"<{self._name}, num_envs={self.num_envs}, device={self.device}>"

    def reseed(self, seed: int) -> None:
        """Restarts the random stream; the next call must be `reset`."""
        require_integer("seed", seed, 0, 2**63 - 1)
        self._generator.manual_seed(int(seed))  # it takes no NumPy integer
        self._generator_state = self._generator.get_state()  # from which the current draws were made
        self._cursor = 0
        self._started = False

    def reset(self) -> TimeStep:
        """Starts B new episodes: every row is `first`. The random stream goes on."""
        if not self._started:
            self._refill()
            self._started = True
        self._last = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        return self._advance(torch.zeros(self.num_envs, dtype=torch.int64, device=self.device), *self._next_draws())

    def step(self, actions: Tensor) -> TimeStep:
        """Takes `actions` [B] int64 (rows that were `last` ignore theirs, which must be in range all the same).

        Raises:
            RuntimeError: before the first `reset`.
            ValueError: if shape, type or device are wrong, or an action is out of range (see the class on when).
        """
        if not self._started:
            raise RuntimeError("step was called before reset: call reset() first")
        return self._advance(self._checked(actions), *self._next_draws())

    @abstractmethod
    def reference_policy(self) -> Tensor:
        """Returns the actions [B] of a policy that sees the whole state and always succeeds."""

    def state_dict(self) -> dict[str, Any]:
        """Returns all it takes to continue bit for bit on the same kind of device: copies of tensors, and scalars."""
        self._raise_late_action_error(wait=True)
        tensors = {name: getattr(self, name).clone() for name in ("_last", *self.state_names)}
        return {
            "task": self._name,
            "started": self._started,
            "generator": self._generator_state.clone(),
            "cursor": self._cursor,
            **tensors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: if the state belongs to another task or batch size.
        """
        if state.get("task") != self._name:
            raise ValueError(f"the state belongs to {state.get('task')}, not to {self._name}: use the same dials")
        names = ("_last", *self.state_names)
        for name in names:
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(f"the state holds {len(state[name])} environments, expected num_envs={self.num_envs}")
        for name in names:
            setattr(self, name, state[name].to(self.device, copy=True))
        self._generator_state = state["generator"].cpu().clone()
        self._generator.set_state(self._generator_state)
        self._started = state["started"]
        if self._started:
            self._refill()  # the same draws again, and the generator is where it was
        self._cursor = state["cursor"]

    def close(self) -> None:
        """Nothing to free."""
        self._raise_late_action_error(wait=True)

    @abstractmethod
    def _draw(self, num_steps: int) -> tuple[Tensor, ...]:
        """Returns tensors [num_steps, B, ...] drawn from `self._generator`: the randomness of so many steps."""

    @abstractmethod
    def _advance(self, actions: Tensor, *draws: Tensor) -> TimeStep:
        """Moves every row by its action, or starts it anew where `self._last`, and sets `self._last`.

        Args:
            actions: [B] int64 in range.
            *draws: this step's share of `_draw`, [B, ...] each. They must be copied, not kept.
        """

    def _draw_distractors(self, num_steps: int, count: int) -> Tensor:
        """[num_steps, B, count] values of +-1, for `_draw`."""
        bits = torch.randint(
            2, (num_steps, self.num_envs, count), generator=self._generator, device=self.device, dtype=torch.float32
        )
        return bits.mul_(2.0).sub_(1.0)

    def _refill(self) -> None:
        self._generator_state = self._generator.get_state()
        self._draws = list(zip(*(draw.unbind() for draw in self._draw(_STEPS_PER_DRAW)), strict=True))
        self._cursor = 0

    def _next_draws(self) -> tuple[Tensor, ...]:
        if self._cursor == _STEPS_PER_DRAW:
            self._refill()
        self._cursor += 1
        return self._draws[self._cursor - 1]

    def _checked(self, actions: Tensor) -> Tensor:
        if actions.shape != (self.num_envs,) or actions.dtype != torch.int64 or actions.device != self.device:
            raise ValueError(
                f"actions must be int64 of shape ({self.num_envs},) on {self.device}, "
                f"got {actions.dtype} of shape {tuple(actions.shape)} on {actions.device}"
            )
        low, high = actions.aminmax()
        if self.device.type != "cuda":
            self._raise_if_out_of_range(int(low), int(high))
            return actions
        self._raise_late_action_error(wait=False)
        self._extremes = torch.maximum(self._extremes, torch.stack((-low, high)))
        self._extremes_on_host.copy_(self._extremes, non_blocking=True)
        return actions.clamp(0, self.spec.num_actions - 1)  # lookups stay in bounds until the error is seen

    def _raise_late_action_error(self, wait: bool) -> None:
        if self.device.type == "cuda":
            if wait:
                torch.cuda.synchronize(self.device)
            minus_low, high = self._extremes_on_host.tolist()  # host memory, a few steps old: nothing to wait for
            self._raise_if_out_of_range(-minus_low, high)

    def _raise_if_out_of_range(self, low: int, high: int) -> None:
        if low < 0 or high >= self.spec.num_actions:
            raise ValueError(
                f"actions must be in [0, {self.spec.num_actions - 1}], got {low if low < 0 else high}: "
                f"{type(self).__name__} has {self.spec.num_actions} actions"
            )
