"""The gridworlds, offered to others: as gymnasium environments, single or batched, and as a dm_env environment.

    envs.exports.register()
    gymnasium.make("dni_rl/PassiveTMaze-v0", corridor_length=40)
    gymnasium.make_vec("dni_rl/PassiveTMaze-v0", num_envs=64, corridor_length=40)    # one batch of tensors, numpy out
    GridworldDmEnv("PassiveTMaze", seed=0, corridor_length=40)

Keyword arguments are those of the class in `envs.gridworlds`. The privileged context is in `info["context"]`, or, for
dm_env, in the attribute `context`. Importing this module registers nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import dm_env
import gymnasium
import numpy as np
import torch
from dm_env import specs
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from envs import gridworlds
from envs.arguments import refuse
from envs.gridworlds import BatchedGridworld
from envs.registry import GRIDWORLDS as NAMES
from envs.timestep import TimeStep

GRIDWORLDS: dict[str, Callable[..., BatchedGridworld]] = {name: getattr(gridworlds, name) for name in NAMES}


def register() -> list[str]:
    """Makes the gridworlds known to gymnasium; calling it again changes nothing.

    Returns:
        The ids, "dni_rl/<class name>-v0".
    """
    ids = {f"dni_rl/{name}-v0": name for name in GRIDWORLDS}
    for env_id, name in ids.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(
                env_id,
                entry_point="envs.exports:GridworldEnv",
                vector_entry_point="envs.exports:GridworldVectorEnv",
                kwargs={"name": name},
            )
    return list(ids)


class GridworldEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One gridworld as a `gymnasium.Env`. A time limit is `truncated`, every other end is `terminated`."""

    metadata = {"render_modes": []}  # noqa: RUF012, the name and type are gymnasium's

    def __init__(self, name: str, *, render_mode: str | None = None, **dials: Any):
        """Builds the environment; `reset(seed=...)` seeds it.

        Args:
            name: a key of GRIDWORLDS.
            render_mode: None, there is nothing to render.
            **dials: keyword arguments of that class, but for `num_envs` and `seed`.

        Raises:
            ValueError: if the name is unknown or a dial is out of range.
        """
        _check_render_mode(render_mode)
        self._env = _make(name, 1, dials)
        self.observation_space = _observation_space(self._env)
        self.action_space = gymnasium.spaces.Discrete(self._env.spec.num_actions)
        self._seeded = False
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; `seed` restarts the random stream, `options` has no entries."""
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            self._env.reseed(_draw_seed(self.np_random))
            self._seeded = True
        self._over = False
        step = self._env.reset()
        return _to_numpy(step.observation[0]), _info(step, row=0)

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one action.

        Raises:
            RuntimeError: if there is no episode under way.
            ValueError: if the action is out of range.
        """
        if self._over:
            raise RuntimeError("step was called without an episode under way: call reset() first")
        step = self._env.step(_to_actions([action], self._env))
        self._over = bool(step.last)
        terminated = self._over and float(step.discount) == 0.0
        truncated = self._over and not terminated
        return _to_numpy(step.observation[0]), float(step.reward), terminated, truncated, _info(step, row=0)

    def close(self) -> None:
        """Frees the gridworld."""
        self._env.close()


class GridworldVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """A batch of gridworlds as a `gymnasium.vector.VectorEnv` with next-step autoreset, numpy arrays out.

    The step after an episode's end ignores the action and returns the first observation of a new one, with reward 0.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012, gymnasium's

    def __init__(self, num_envs: int, name: str, *, render_mode: str | None = None, **dials: Any):
        """Builds the batch; `reset(seed=...)` seeds it.

        Args:
            num_envs: B.
            name: a key of GRIDWORLDS.
            render_mode: None, there is nothing to render.
            **dials: keyword arguments of that class, but for `num_envs` and `seed`.

        Raises:
            ValueError: if the name is unknown or a dial is out of range.
        """
        _check_render_mode(render_mode)
        self._env = _make(name, num_envs, dials)
        self.num_envs = num_envs
        self.single_observation_space = _observation_space(self._env)
        self.single_action_space = gymnasium.spaces.Discrete(self._env.spec.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seeded = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts B episodes; `seed`, one for the batch, restarts the random stream, `options` has no entries."""
        if seed is not None and not isinstance(seed, (int, np.integer)):
            raise ValueError(f"seed must be one int for the whole batch or None, got {seed!r}")
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            self._env.reseed(_draw_seed(self.np_random))
            self._seeded = True
        step = self._env.reset()
        return _to_numpy(step.observation), _info(step)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes [B] actions; returns observations [B, D], [B] rewards, terminations, truncations, and the context."""
        step = self._env.step(_to_actions(actions, self._env))
        terminated = step.last & (step.discount == 0)
        truncated = step.last & ~terminated
        arrays = (step.observation, step.reward, terminated, truncated)
        observation, reward, terminations, truncations = (_to_numpy(x) for x in arrays)
        return observation, reward, terminations, truncations, _info(step)

    def close_extras(self, **kwargs: Any) -> None:
        """Frees the gridworlds."""
        self._env.close()


class GridworldDmEnv(dm_env.Environment):
    """One gridworld as a `dm_env.Environment`.

    Attributes:
        context: float32 [Z] privileged information of the latest step, for critics only.
    """

    context: np.ndarray

    def __init__(self, name: str, *, seed: int, **dials: Any):
        """Builds the environment.

        Args:
            name: a key of GRIDWORLDS.
            seed: of the random stream.
            **dials: keyword arguments of that class, but for `num_envs`.

        Raises:
            ValueError: if the name is unknown or a dial is out of range.
        """
        self._env = _make(name, 1, dials, seed)
        self._over = True

    def reset(self) -> dm_env.TimeStep:
        """Starts an episode."""
        self._over = False
        return self._convert(self._env.reset())

    def step(self, action: np.int32 | int) -> dm_env.TimeStep:
        """Takes one action; before the first and after the last step of an episode it starts one instead."""
        if self._over:
            return self.reset()
        return self._convert(self._env.step(_to_actions([action], self._env)))

    def observation_spec(self) -> specs.BoundedArray:
        """Float32 vector in [-1, 1]."""
        return specs.BoundedArray(self._env.spec.observation_shape, np.float32, -1.0, 1.0, name="observation")

    def action_spec(self) -> specs.DiscreteArray:
        """One of `num_actions` integers."""
        return specs.DiscreteArray(self._env.spec.num_actions, name="action")

    def close(self) -> None:
        """Frees the gridworld."""
        self._env.close()

    def _convert(self, step: TimeStep) -> dm_env.TimeStep:
        self.context = _info(step, row=0)["context"]
        observation = _to_numpy(step.observation[0])
        if step.first:
            return dm_env.restart(observation)
        self._over = bool(step.last)
        step_type = dm_env.StepType.LAST if self._over else dm_env.StepType.MID
        return dm_env.TimeStep(step_type, float(step.reward), float(step.discount), observation)


def _make(name: str, num_envs: int, dials: Mapping[str, Any], seed: int = 0) -> BatchedGridworld:
    """The gridworld; what is seeded by `reset` leaves the seed out."""
    for given in ("num_envs", "seed"):
        if given in dials:
            way_out = "give it to reset(seed=...)" if given == "seed" else "gymnasium.make_vec makes several"
            refuse(given, dials[given], f"what {name} takes beside num_envs and seed", way_out)
    if name not in GRIDWORLDS:
        raise ValueError(f"name must be one of {sorted(GRIDWORLDS)}, got {name!r}")
    return GRIDWORLDS[name](num_envs=num_envs, seed=seed, **dials)


def _check_render_mode(render_mode: str | None) -> None:
    if render_mode is not None:
        raise ValueError(f"render_mode must be None (gridworlds have nothing to render), got {render_mode!r}")


def _observation_space(env: BatchedGridworld) -> gymnasium.spaces.Box:
    return gymnasium.spaces.Box(-1.0, 1.0, env.spec.observation_shape, np.float32)


def _draw_seed(generator: np.random.Generator) -> int:
    return int(generator.integers(2**63 - 1))


def _to_actions(actions: Any, env: BatchedGridworld) -> torch.Tensor:
    array = np.asarray(actions)
    if not np.issubdtype(array.dtype, np.integer):  # torch would truncate 1.7 to 1 without a word
        raise ValueError(f"actions must be integers in [0, {env.spec.num_actions - 1}], got {actions!r}")
    return torch.as_tensor(array, dtype=torch.int64, device=env.device)


def _to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.cpu().numpy()  # no copy on the CPU: the gridworlds never write into what they returned


def _info(step: TimeStep, row: int | None = None) -> dict[str, Any]:
    """Returns the context [B, Z] with gymnasium's mask of the rows that have it, or the [Z] of one row."""
    assert step.context is not None  # every gridworld has one
    context = _to_numpy(step.context)
    if row is not None:
        return {"context": context[row]}
    return {"context": context, "_context": np.ones(len(context), dtype=bool)}
