"""What every environment of this project hands to an agent: batched dm-env semantics.

An episode is a FIRST step, MID steps and a LAST step, exactly as in dm_env, with a batch of them side by side. The
reward and discount of a step belong to the transition that led to it. After a LAST step the next call to
`step` ignores that row's action and returns the FIRST step of a new episode ("next-step autoreset"), so that the
last observation is seen by the agent and its value can be bootstrapped.

    step        FIRST   MID   ...   LAST (terminated)   LAST (time limit)
    first       True    False       False               False
    last        False   False       True                True
    reward      0       r           r                   r
    discount    1       1           0                   1

Vector environments that reset within the same call ("same-step autoreset") never show a LAST step: their row is `first`
and carries the reward and discount of the episode that just ended, and `final_observation` holds the observation
in which it ended.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TimeStep:
    """One step of B environments. Its tensors are kept for a rollout, so the environment must not write into them again.

    Attributes:
        observation: [B, ...] what the policy sees.
        reward: [B] float32, of the transition into this step; 0 where an episode starts (see the module on same-step autoreset).
        discount: [B] float32, 0 where the transition terminated the episode, otherwise 1: a time limit keeps it. What lies between is the
            environment's own, as dm_env allows, and multiplies the agent's.
        first: [B] bool, the observation starts an episode: recurrent state must be cleared before it is used.
        last: [B] bool, the episode is over: the action taken here is ignored, and the next step is `first`.
        context: [B, Z] float32 privileged information, for error critics and perhaps the value function (not the policy), or None.
        final_observation: [B, ...] or None. Only under same-step autoreset, when at least one row is cut by a time
            limit: the observation in which that episode ended; rows that did not end repeat `observation`.
        raw_reward: [B] float32 what counts for the score, where `reward` is not the same (Atari: clipped, or episodes end with a life),
            otherwise None.
        game_over: [B] bool where episodes end with each lost life (Atari): the game itself ended here. None elsewhere.
    """

    observation: Tensor
    reward: Tensor
    discount: Tensor
    first: Tensor
    last: Tensor
    context: Tensor | None = None
    final_observation: Tensor | None = None
    raw_reward: Tensor | None = None
    game_over: Tensor | None = None


@dataclass(frozen=True, slots=True)
class EnvSpec:
    """What an agent must know of an environment to be built.

    Attributes:
        observation_shape: shape of one observation, without the batch.
        observation_dtype: torch.float32 for vectors, torch.uint8 for images [C, Y, X] (divided by `observation_scale` in the torso).
        num_actions: number of discrete actions.
        context_size: Z, width of the privileged context; 0 where there is none.
        success_reward: an episode counts as a success when its undiscounted return is at least this; None where the
            notion does not exist.
        frames_per_step: emulator frames per agent step (Atari frame skip), 1 elsewhere.
        observation_scale: what the torso divides uint8 observations by: 255 for brightness and for planes of 0 and 255, less for small
            numbers that stand for something else. float32 observations are taken as they are.
    """

    observation_shape: tuple[int, ...]
    observation_dtype: torch.dtype
    num_actions: int
    context_size: int = 0
    success_reward: float | None = None
    frames_per_step: int = 1
    observation_scale: float = 255.0


def least_return(success_reward: float) -> float:
    """The return from which on an episode is a success: rewards are float32, whose sum may miss `success_reward` by their rounding."""
    return success_reward - 1e-6 * max(1.0, abs(success_reward))


@runtime_checkable
class Environment(Protocol):
    """A batch of environments. Implemented by the gridworlds, by Atari and by every adapter.

    Attributes:
        spec: what an agent must know.
        num_envs: B.
        device: where the tensors of a TimeStep live.
        resumable: whether `state_dict` restores the environment exactly.
    """

    spec: EnvSpec
    num_envs: int
    device: torch.device
    resumable: bool

    def reset(self) -> TimeStep:
        """Starts B new episodes: every row is `first`."""

    def step(self, actions: Tensor) -> TimeStep:
        """Takes `actions` [B] int64 (rows that were `last` ignore theirs).

        Raises:
            ValueError: if an action is out of range or the shape is wrong.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly, random generators included; also before the first `reset`.

        Raises:
            RuntimeError: where `resumable` is False.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""

    def close(self) -> None:
        """Frees emulators and processes. Calling it twice is fine."""
