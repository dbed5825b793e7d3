"""Other people's environments as ours: gymnasium (single and vector), MiniGrid and dm_env to batched `TimeStep`s.

Use `GymnasiumVector` for an existing `gymnasium.vector.VectorEnv`, `GymnasiumEnvs` and `DmEnvs` for a list of single
environments stepped in this process, and `gymnasium_vector` to build either from an id or a constructor. Actions must
be discrete; what is not supported is refused with the reason, never reshaped in silence. What observations become
is said in `envs.spaces`.

No adapter is resumable: neither interface can save an environment's state, and copies of third-party objects
(emulators, handles, shared generators) are not reliably exact.
"""

import dataclasses
import importlib
import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from envs.arguments import (
    ArgumentError,
    built_with,
    callable_of,
    import_named,
    is_integer,
    refuse,
    require,
    require_flag,
)
from envs.minigrid import (
    MINIGRID_PREFIXES,
    MINIGRID_SCALE,
    check_symbolic,
    has_missions,
    image_view,
    is_minigrid,
    minigrid_context,
    minigrid_symbols,
    minigrid_view,
)
from envs.spaces import Encoder, check_observation, dm_spec, example_of, gymnasium_spec
from envs.timestep import Environment, EnvSpec, TimeStep

if TYPE_CHECKING:
    import gymnasium


def environment_seeds(seed: int, num_envs: int) -> list[int]:
    """Seeds of the environments of one run, different from each other and unrelated to those of other runs.

    The customary `seed + i` makes environment 1 of run 3 and environment 0 of run 4 the same, so runs that should be
    independent are not.

    Args:
        seed: the run's seed, not negative.
        num_envs: how many are wanted.

    Returns:
        `num_envs` different integers in [0, 2^31), the range every emulator accepts.

    Raises:
        ValueError: if the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    wanted = num_envs
    while True:
        # Drawn again, longer, in the rare case that two of them collide.
        drawn = np.random.SeedSequence(seed).generate_state(wanted, np.uint32) >> 1
        seeds = list(dict.fromkeys(drawn.tolist()))
        if len(seeds) >= num_envs:
            return seeds[:num_envs]
        wanted += 1


def checked_actions(actions: Tensor, num_actions: int, ignored: np.ndarray) -> np.ndarray:
    """Checks a batch of actions and moves it to NumPy.

    Args:
        actions: [B] integers.
        num_actions: A.
        ignored: [B] bool, rows whose action does not matter and may hold anything.

    Returns:
        [B] int64 in [0, A), 0 in the ignored rows.

    Raises:
        ValueError: if the shape or the type is wrong, or an action that counts is out of range.
    """
    if actions.shape != ignored.shape or actions.is_floating_point() or actions.dtype == torch.bool:
        raise ValueError(
            f"expected integer actions of shape {ignored.shape}, got {actions.dtype} of shape {tuple(actions.shape)}"
        )
    checked = np.where(ignored, 0, actions.cpu().numpy())  # synchronises: these environments live on the CPU
    out_of_range = (checked < 0) | (checked >= num_actions)
    if out_of_range.any():
        row = int(out_of_range.argmax())
        raise ValueError(f"actions must be in [0, {num_actions}), got {checked[row]} for environment {row}")
    return checked.astype(np.int64, copy=False)


class GymnasiumVector:
    """A `gymnasium.vector.VectorEnv` with next-step or same-step autoreset.

    With same-step autoreset no row is ever `last`; see `envs.timestep` for what such a step carries.

    Attributes:
        vector_env: what is wrapped.
    """

    resumable = False

    def __init__(
        self,
        vector_env: "gymnasium.vector.VectorEnv",
        *,
        seed: int,
        device: str | torch.device = "cpu",
        encoder: Encoder | None = None,
    ):
        """Wraps a vector environment.

        Args:
            vector_env: B environments with a discrete action space.
            seed: of the run; every sub-environment gets its own, see `environment_seeds`. Vector environments other than
                gymnasium's own get a single integer.
            device: of the TimeSteps.
            encoder: replaces the standard conversion of observations, see `envs.spaces`.

        Raises:
            ValueError: if the autoreset mode or a space is not supported.
        """
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

        mode = vector_env.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise ValueError(
                f"{type(vector_env).__name__} has metadata['autoreset_mode'] = {mode}; expected "
                "AutoresetMode.NEXT_STEP or AutoresetMode.SAME_STEP: episodes must restart by themselves"
            )
        self.vector_env = vector_env
        self.num_envs = vector_env.num_envs
        self.device = torch.device(device)
        self.spec, self._encode, self._action_start = gymnasium_spec(
            vector_env.single_observation_space, vector_env.single_action_space, encoder
        )
        self._example = example_of(vector_env.single_observation_space)
        self._same_step = mode == AutoresetMode.SAME_STEP
        seeds = environment_seeds(seed, self.num_envs)
        takes_a_list = isinstance(vector_env.unwrapped, AsyncVectorEnv | SyncVectorEnv)
        self._seed: Any = seeds if takes_a_list else seeds[0]
        self._last: np.ndarray | None = None
        self._closed = False

    def reset(self) -> TimeStep:
        """Starts B new episodes. The first call seeds the environments, later ones continue their generators."""
        observation, _ = self.vector_env.reset(seed=self._seed)
        self._seed = None
        self._last = np.zeros(self.num_envs, bool)
        return _first_step(self._encoded(observation), self.device)

    def step(self, actions: Tensor) -> TimeStep:
        """Takes `actions` [B]; see `Environment.step`."""
        if self._last is None:
            raise RuntimeError("call reset before step")
        actions_array = checked_actions(actions, self.spec.num_actions, ignored=self._last) + self._action_start
        raw_observation, reward, terminated, truncated, info = self.vector_env.step(actions_array)
        observation = self._encoded(raw_observation)
        ended = terminated | truncated
        final_observation = None
        if self._same_step:
            first, last = ended, np.zeros(self.num_envs, bool)
            if (truncated & ~terminated).any():
                final_observation = self._final_observation(observation, ended, info)
        else:
            first = self._last
            last = ended & ~first
            reward, terminated = np.where(first, 0, reward), terminated & ~first
            self._last = last
        return _time_step(observation, reward, ~terminated, first, last, self.device, final=final_observation)

    def _final_observation(self, observation: np.ndarray, ended: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        """`observation` [B, ...] with the rows that `ended` [B] replaced by what their episodes ended in."""
        # The rows of the others are whatever the array held before, so the mask decides.
        # gymnasium's own vectors give one; ALE's give an array of all rows without.
        rows = np.flatnonzero(info.get("_final_obs", ended)) if "final_obs" in info else np.empty(0, np.int64)
        if not ended[rows].all() or len(rows) != ended.sum():
            raise RuntimeError(
                f"{type(self.vector_env).__name__} resets within a step, but info['final_obs'] lacks the observation "
                f"in which an episode ended: rows {np.flatnonzero(ended).tolist()} ended, {rows.tolist()} were given"
            )
        final = observation.copy()
        final[rows] = self._encoded(np.stack([info["final_obs"][row] for row in rows]))
        return final

    def _encoded(self, observations: np.ndarray) -> np.ndarray:
        """[N, *encoded] of [N, *original], if that is what they are."""
        found = np.asarray(observations)
        name = type(self.vector_env.unwrapped).__name__
        check_observation(name, found.shape[1:], found.dtype, self._example)
        return self._encode(found)

    def state_dict(self) -> dict[str, Any]:
        """Refused: see the module."""
        raise RuntimeError(_NOT_RESUMABLE.format(type(self.vector_env).__name__))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refused: see the module."""
        raise RuntimeError(_NOT_RESUMABLE.format(type(self.vector_env).__name__))

    def close(self) -> None:
        """Closes the vector environment."""
        if not self._closed:
            self.vector_env.close()
        self._closed = True


class _SerialEnvs:
    """The loop shared by lists of single environments: next-step autoreset, one row after the other.

    Subclasses set `spec` and `_encode` and say how one environment is reset and stepped.
    """

    resumable = False
    spec: EnvSpec
    _encode: Encoder
    _example: np.ndarray  # of one observation, as the environment says that it looks
    _context: Callable[[Any], np.ndarray] | None = None

    def __init__(self, envs: Sequence[Any], device: str | torch.device):
        if not envs:
            raise ValueError("expected at least one environment, got an empty list")
        if len({id(env) for env in envs}) < len(envs):
            raise ValueError("expected environments of their own, got the same one twice; build a new one each time")
        self.envs = list(envs)
        self.num_envs = len(self.envs)
        self.device = torch.device(device)
        self._last: np.ndarray | None = None
        self._closed = False

    def _reset_row(self, row: int) -> Any:
        """Starts an episode in environment `row` and returns its observation."""
        raise NotImplementedError

    def _step_row(self, row: int, action: int) -> tuple[Any, float, float, bool]:
        """Returns observation, reward, discount and whether the episode is over."""
        raise NotImplementedError

    def reset(self) -> TimeStep:
        """Starts B new episodes. The first call uses the run's seed, later ones continue the generators."""
        observations = [self._reset_row(row) for row in range(self.num_envs)]
        self._last = np.zeros(self.num_envs, bool)
        return _first_step(self._encode(self._stacked(observations)), self.device, self._contexts())

    def step(self, actions: Tensor) -> TimeStep:
        """Takes `actions` [B]; see `Environment.step`."""
        if self._last is None:
            raise RuntimeError("call reset before step")
        first = self._last
        observations = []
        reward, discount = np.zeros(self.num_envs, np.float32), np.ones(self.num_envs, np.float32)
        last = np.zeros(self.num_envs, bool)
        for row, action in enumerate(checked_actions(actions, self.spec.num_actions, ignored=first).tolist()):
            if first[row]:
                observations.append(self._reset_row(row))
            else:
                observation, given, discount[row], last[row] = self._step_row(row, action)
                observations.append(observation)
                try:
                    reward[row] = given
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"{self._name}.step: found a reward of {_shown(given)}; expected a number"
                    ) from error
        self._last = last
        observation = self._encode(self._stacked(observations))
        return _time_step(observation, reward, discount, first, last, self.device, context=self._contexts())

    @property
    def _name(self) -> str:
        return type(getattr(self.envs[0], "unwrapped", self.envs[0])).__name__

    def _stacked(self, observations: list[Any]) -> np.ndarray:
        """[B, *original], if they look as the environment says: what is off by a shape or a type would be learned from all the same."""
        for observation in observations:
            found = np.asarray(observation)
            check_observation(self._name, found.shape, found.dtype, self._example)
        return np.stack(observations)

    def _set_context(self, context: Callable[[Any], np.ndarray]) -> None:
        """Has every step carry what a function of one environment gives. Environment 0 must have been reset."""
        self.spec = dataclasses.replace(self.spec, context_size=len(_context_vector(context, self.envs[0])))
        self._context = context

    def _contexts(self) -> np.ndarray | None:
        """[B, Z] privileged information, or None."""
        if self._context is None:
            return None
        vectors = [_context_vector(self._context, env) for env in self.envs]
        for vector in vectors:
            if len(vector) != self.spec.context_size:
                raise ValueError(
                    f"context: found {len(vector)} numbers; expected {self.spec.context_size}, as it first gave"
                )
        return np.stack(vectors)

    def state_dict(self) -> dict[str, Any]:
        """Refused: see the module."""
        raise RuntimeError(_NOT_RESUMABLE.format(type(self.envs[0]).__name__))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refused: see the module."""
        raise RuntimeError(_NOT_RESUMABLE.format(type(self.envs[0]).__name__))

    def close(self) -> None:
        """Closes every environment."""
        if not self._closed:
            for env in self.envs:
                env.close()
        self._closed = True


class GymnasiumEnvs(_SerialEnvs):
    """Single gymnasium environments side by side, stepped in this process.

    Does what `SyncVectorEnv` under `GymnasiumVector` does with less overhead (no gathering of `info`), and can hand out
    privileged context.
    """

    def __init__(
        self,
        envs: "Sequence[gymnasium.Env]",
        *,
        seed: int,
        device: str | torch.device = "cpu",
        encoder: Encoder | None = None,
        context: "Callable[[gymnasium.Env], np.ndarray] | None" = None,
    ):
        """Wraps a list of environments.

        Args:
            envs: B environments with equal spaces and discrete actions.
            seed: of the run; every environment gets its own, see `environment_seeds`.
            device: of the TimeSteps.
            encoder: replaces the standard conversion of observations, see `envs.spaces`.
            context: maps an environment to its [Z] privileged state, which the policy never sees.

        Raises:
            ArgumentError: if the context is no array of numbers.
            ValueError: if a space is not supported or the spaces differ.
        """
        super().__init__(envs, device)
        for env in self.envs:
            _check_members(env)
        observation_space, action_space = self.envs[0].observation_space, self.envs[0].action_space
        for row, env in enumerate(self.envs):
            if env.observation_space != observation_space or env.action_space != action_space:
                raise ValueError(
                    f"expected equal spaces; environment {row} has {env.observation_space} and {env.action_space}, "
                    f"environment 0 {observation_space} and {action_space}"
                )
        self.spec, self._encode, self._action_start = gymnasium_spec(observation_space, action_space, encoder)
        self._example = example_of(observation_space)
        self._seeds: list[int | None] = [*environment_seeds(seed, self.num_envs)]
        if context is not None:
            self.envs[0].reset(seed=self._seeds[0])  # the context of an environment that was never reset may not exist
            self._set_context(context)

    def _reset_row(self, row: int) -> Any:
        seed, self._seeds[row] = self._seeds[row], None
        given = self.envs[row].reset(seed=seed)
        if not isinstance(given, tuple) or len(given) != 2:
            raise ValueError(
                f"{self._name}.reset: found {_shown(given)}; expected (observation, info), as gymnasium has it and gym had not"
            )
        return given[0]

    def _step_row(self, row: int, action: int) -> tuple[Any, float, float, bool]:
        given = self.envs[row].step(action + self._action_start)
        if not isinstance(given, tuple) or len(given) != 5:
            raise ValueError(
                f"{self._name}.step: found {_shown(given)}; expected (observation, reward, terminated, truncated, info), as "
                "gymnasium has it and gym had not"
            )
        observation, reward, terminated, truncated, _ = given
        return observation, reward, 1.0 - terminated, terminated or truncated


class DmEnvs(_SerialEnvs):
    """`dm_env.Environment`s side by side, stepped in this process.

    Nested observations of numeric arrays are flattened, dictionaries in the order of their sorted keys, and
    concatenated. A discount strictly between 0 and 1 is passed on as it is.
    """

    def __init__(
        self,
        envs: Sequence[Any] | Callable[..., Any],
        *,
        num_envs: int | None = None,
        seed: int | None = None,
        device: str | torch.device = "cpu",
        context: Callable[[Any], np.ndarray] | None = None,
    ):
        """Wraps a list of environments, or builds one.

        Args:
            envs: B environments, seeded by who built them; or a constructor, which is called with a `seed` of its own
                for every environment (see `environment_seeds`), or without one if it has no such argument.
            num_envs: B, with a constructor only.
            seed: of the run, with a constructor only: dm_env has no way to seed an environment that exists.
            device: of the TimeSteps.
            context: maps an environment to its [Z] privileged state, which the policy never sees.

        Raises:
            ArgumentError: if the context is no array of numbers.
            ValueError: if a spec is not supported, the specs differ, or the arguments contradict each other.
        """
        if callable(envs):
            if num_envs is None or seed is None:
                raise ValueError(f"a constructor needs num_envs and seed, got num_envs={num_envs} and seed={seed}")
            built = [envs(seed=s) if _takes_seed(envs) else envs() for s in environment_seeds(seed, num_envs)]
        else:
            if num_envs is not None or seed is not None:
                raise ValueError("num_envs and seed go with a constructor; a list of environments has both already")
            built = list(envs)
        super().__init__(built, device)
        self.spec, self._encode, self._flatten, self._action_start, self._example = dm_spec(self.envs[0])
        for row, env in enumerate(self.envs):
            spec, _, _, action_start, _ = dm_spec(env)
            if (spec, action_start) != (self.spec, self._action_start):
                raise ValueError(f"expected equal specs; those of environment {row} differ from environment 0's")
        self._begun: dict[int, Any] = {}  # first steps of environments that were reset before the first `reset`
        if context is not None:
            # The context of an environment that was never reset may not exist; the episode is kept, so that its random
            # stream is that of a run without context.
            self._begun[0] = self.envs[0].reset()
            self._set_context(context)

    def _reset_row(self, row: int) -> Any:
        step = self._begun.pop(row) if row in self._begun else self.envs[row].reset()
        return self._flatten(step.observation)

    def _step_row(self, row: int, action: int) -> tuple[Any, float, float, bool]:
        step = self.envs[row].step(action + self._action_start)
        return self._flatten(step.observation), step.reward, step.discount, step.last()


def gymnasium_vector(
    env: "str | Callable[[], gymnasium.Env]",
    num_envs: int,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    vectorization: str = "sync",
    context: "str | Callable[[gymnasium.Env], np.ndarray] | None" = None,
    view_size: int | None = None,
    encoding: str | None = None,
    ignore_mission: bool = False,
    fast_view: bool = True,
    max_episode_steps: int | None = None,
    **env_kwargs: Any,
) -> Environment:
    """Builds B copies of one gymnasium environment.

    MiniGrid is recognised by its observation: the policy sees the egocentric symbolic view, encoded by `minigrid_view`.
    The direction is left out, as is customary, and so is the mission, a sentence.

    Args:
        env: a gymnasium id or a constructor of one environment.
        num_envs: B.
        seed: of the run.
        device: of the TimeSteps.
        vectorization: "sync" steps them in this process, "async" each in a process of its own, which pays where
            a step takes much longer than the exchange of its observation (about 0.1 ms).
        context: privileged state, which the policy never sees: a function of the environment, which gives [Z] numbers, or its place as
            "module:function", or "grid" for `minigrid_context`; with "sync" only.
        view_size: MiniGrid's view, cells to a side, odd; 7 unless given.
        encoding: of MiniGrid's view: "one_hot" (the default) or "symbolic", the small integers themselves.
        ignore_mission: take a MiniGrid environment whose mission differs between episodes, though the policy cannot
            read it.
        fast_view: whether MiniGrid's view is computed by `envs.minigrid.FastView`, which gives the same numbers, or by MiniGrid.
        max_episode_steps: cuts episodes there (`TimeStep.last` with discount 1); None: where its id says, or nowhere. What a
            constructor makes is wrapped in gymnasium's TimeLimit.
        **env_kwargs: go to `gymnasium.make` or to the constructor.

    Returns:
        A `GymnasiumEnvs` or a `GymnasiumVector`.

    Raises:
        ArgumentError: if an argument is not supported; one line that starts with its name.
        ValueError: if a space is not supported.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    require("vectorization", vectorization, vectorization in ("sync", "async"), "'sync' or 'async'")
    if vectorization == "async" and context is not None:
        allowed = "None with vectorization='async', as other processes' environments cannot be looked into"
        refuse("context", context, allowed, "use vectorization='sync'")
    require_flag("ignore_mission", ignore_mission)
    require_flag("fast_view", fast_view)
    owner = env if isinstance(env, str) else getattr(env, "__name__", repr(env))
    if max_episode_steps is not None:
        env_kwargs["max_episode_steps"] = max_episode_steps
    probe = built_with(
        lambda **arguments: _EnvConstructor(env, None, fast_view, arguments).unwrapped_view(), env_kwargs, owner
    )
    constructor = _EnvConstructor(env, view_size, fast_view, env_kwargs)
    encoder = None
    try:
        _check_members(probe)
        if is_minigrid(probe):
            require("encoding", encoding, encoding in (None, "one_hot", "symbolic"), "'one_hot' or 'symbolic'")
            encoder = minigrid_symbols if encoding == "symbolic" else minigrid_view
            check_symbolic(probe)
            if not ignore_mission and has_missions(probe):
                raise ValueError(
                    f"the mission of {_env_name(probe)} differs between episodes, and the policy sees the image only; "
                    "pass ignore_mission=True to train without it"
                )
        elif view_size is not None or encoding is not None or ignore_mission or context == "grid":
            raise ValueError(
                "view_size, encoding, ignore_mission and context='grid' are for MiniGrid, and "
                f"{_env_name(probe)} is not one of its environments"
            )
        context_function = minigrid_context if context == "grid" else named_context(context, "'grid' with MiniGrid, ")
    finally:
        probe.close()
    if vectorization == "async":
        from gymnasium.vector import AsyncVectorEnv

        # A fork of a process in which torch has started its threads can hang, so the workers start afresh.
        vector_env = AsyncVectorEnv([constructor.checking] * num_envs, context="spawn")
        try:
            built: GymnasiumVector | GymnasiumEnvs = GymnasiumVector(
                vector_env, seed=seed, device=device, encoder=encoder
            )
        except BaseException:
            vector_env.close()  # its processes would wait for the garbage collector
            raise
    else:
        envs = [constructor() for _ in range(num_envs)]
        built = GymnasiumEnvs(envs, seed=seed, device=device, encoder=encoder, context=context_function)
    if encoding == "symbolic":
        built.spec = dataclasses.replace(built.spec, observation_scale=MINIGRID_SCALE)
    return built


def named_context(context: object, or_else: str = "") -> Callable[[Any], np.ndarray] | None:
    """A function of one environment, from itself or its place, "module:function"; None stays None.

    Args:
        context: the argument.
        or_else: what else would have been allowed.
    """
    if isinstance(context, str) and ":" in context:
        return callable_of(*import_named(context))
    if context is None or callable(context):
        return context
    refuse("context", context, f"{or_else}'module:function', a function of the environment, or None")


def _context_vector(context: Callable[[Any], np.ndarray], env: Any) -> np.ndarray:
    """What a context function gives, as a vector [Z]."""
    try:
        given = context(env)
    except AttributeError as error:
        if getattr(env, "unwrapped", env) is env:
            raise
        raise ArgumentError(
            f"context: found {error}; allowed what a wrapped environment has; read it from env.unwrapped"
        ) from error
    try:
        vector = np.ravel(given)
    except (TypeError, ValueError):  # lists of unequal lengths, for one
        vector = np.empty(0)
    if vector.dtype.kind not in "biuf" or not vector.size:
        raise ArgumentError(
            f"context: found a function that gives {_shown(given)}; allowed one that gives an array of numbers; "
            "return np.array([...], np.float32)"
        )
    return vector


class _EnvConstructor:
    """Builds one environment; a class, so that it can be sent to another process."""

    def __init__(
        self,
        env: "str | Callable[[], gymnasium.Env]",
        view_size: int | None,
        fast_view: bool,
        env_kwargs: Mapping[str, Any],
    ):
        self.env = env
        self.view_size, self.fast_view = view_size, fast_view
        self.env_kwargs = dict(env_kwargs)
        # gymnasium.make sets the limit by itself
        self.time_limit = None if isinstance(env, str) else self.env_kwargs.pop("max_episode_steps", None)
        is_limit = self.time_limit is None or is_integer(self.time_limit, 1)
        require("max_episode_steps", self.time_limit, is_limit, "an integer of at least 1, or None")

    def unwrapped_view(self) -> "gymnasium.Env":
        """The environment before its view is taken out of MiniGrid's dictionary."""
        import gymnasium

        if not isinstance(self.env, str):
            env = self.env(**self.env_kwargs)
            return env if self.time_limit is None else gymnasium.wrappers.TimeLimit(env, self.time_limit)
        if self.env.startswith(MINIGRID_PREFIXES):
            importlib.import_module("minigrid")  # registers its ids, in worker processes too
        # The checker repeats at every step what tests check once, and warns about things we cannot change.
        return gymnasium.make(self.env, disable_env_checker=True, **self.env_kwargs)

    def __call__(self) -> "gymnasium.Env":
        env = self.unwrapped_view()
        return image_view(env, self.view_size, self.fast_view) if is_minigrid(env) else env

    def checking(self) -> "gymnasium.Env":
        """With a check of every observation, for other processes: on the way from there all are cast to the space's shape and type."""
        import gymnasium

        env = self()
        if env.observation_space.shape is None:
            return env  # of several parts, which is refused
        example, name = example_of(env.observation_space), type(env.unwrapped).__name__

        class Checking(gymnasium.ObservationWrapper):
            def observation(self, observation: Any) -> Any:
                found = np.asarray(observation)
                check_observation(name, found.shape, found.dtype, example)
                return observation

        return Checking(env)


def _env_name(env: "gymnasium.Env") -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def _shown(value: object) -> str:
    """It in a short line."""
    return " ".join(reprlib.repr(value).split())


def _check_members(env: "gymnasium.Env") -> None:
    """Raises ValueError if an environment lacks what every one has to say of itself, or cannot be seeded."""
    name = type(getattr(env, "unwrapped", env)).__name__
    for member in ("observation_space", "action_space"):
        if getattr(env, member, None) is None:
            raise ValueError(f"{name}: found no {member}; expected a gymnasium.spaces.Space; set it in __init__")
    if not _takes_seed(getattr(env, "unwrapped", env).reset):
        raise ValueError(
            f"{name}.reset: found no argument seed; expected reset(self, *, seed=None, options=None), as gymnasium has it and gym "
            "had not; begin it with super().reset(seed=seed)"
        )


def _takes_seed(constructor: Callable[..., Any]) -> bool:
    parameters = inspect.signature(constructor).parameters.values()
    return any(p.name == "seed" or p.kind is p.VAR_KEYWORD for p in parameters)


_NOT_RESUMABLE = "the state of {} cannot be saved: its interface has no way to restore it exactly (resumable is False)"


def _first_step(observation: np.ndarray, device: torch.device, context: np.ndarray | None = None) -> TimeStep:
    """The step in which every row starts an episode."""
    num_envs = len(observation)
    starts = np.ones(num_envs, bool)
    return _time_step(observation, np.zeros(num_envs), starts, starts, ~starts, device, context=context)


def _time_step(
    observation: np.ndarray,
    reward: np.ndarray,
    discount: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    device: torch.device,
    *,
    context: np.ndarray | None = None,
    final: np.ndarray | None = None,
) -> TimeStep:
    """A TimeStep of arrays. `observation`, `context` and `final` are handed over, the small ones copied."""

    def tensor(x: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.tensor(x, dtype=dtype, device=device)

    return TimeStep(
        observation=torch.from_numpy(observation).to(device),
        reward=tensor(reward, torch.float32),
        discount=tensor(discount, torch.float32),
        first=tensor(first, torch.bool),
        last=tensor(last, torch.bool),
        context=None if context is None else torch.from_numpy(context.astype(np.float32, copy=False)).to(device),
        final_observation=None if final is None else torch.from_numpy(final).to(device),
    )
