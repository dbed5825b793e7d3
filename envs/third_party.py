"""Memory tasks of other people's suites: bsuite over dm_env, POPGym over gymnasium. Use them through `envs.make`.

    bsuite/memory_len/0                 bsuite's own names: an experiment and the number of its setting (Osband et al., "Behaviour
                                        Suite for Reinforcement Learning", 2020)
    popgym-RepeatPreviousEasy-v0        POPGym's ids (Morad et al., "POPGym: Benchmarking Partially Observable Reinforcement
                                        Learning", 2023)

Their environments are adapted, not changed: observations, rewards and ends are theirs. What is added is privileged context for
error critics, and whether an episode was a success where its return tells. `BsuiteRecorder` keeps the record that bsuite's own
scores are computed from; `scripts/bsuite_score.py` is the command.
"""

import dataclasses
import difflib
import functools
import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from envs.adapters import DmEnvs, gymnasium_vector
from envs.arguments import require
from envs.timestep import Environment, TimeStep

if TYPE_CHECKING:
    import gymnasium

# Lowest return of a success, where the return tells. In memory_len and memory_size it is +1 or -1; in discounting_chain one of five
# chains pays 1.1 and the others 1. The return of umbrella_length is drowned in random rewards.
BSUITE_SUCCESS = {"memory_len": 0.5, "memory_size": 0.5, "discounting_chain": 1.05}

# Numbers of episodes at which bsuite keeps a row of its record, times powers of ten.
_LOGGED = (10, 12, 14, 17, 20, 25, 30, 40, 50, 60, 70, 80, 90)


def make_bsuite(
    env_id: str, num_envs: int, *, seed: int, device: str | torch.device = "cpu", context: str | None = None
) -> Environment:
    """Builds B copies of a bsuite environment.

    bsuite fixes the seed of each setting, or leaves it open; here every environment has a seed of its own, which changes the
    episodes and not the task.

    Args:
        env_id: "bsuite/<experiment>/<number of its setting>".
        num_envs: B.
        seed: of the run.
        device: of the TimeSteps.
        context: "first_observation" for `FirstObservation`, or None.

    Raises:
        ValueError: if the id or the context is unknown, or the environment's actions are not discrete.
        ImportError: if bsuite is missing; says how to install it.
    """
    require("context", context, context in (None, "first_observation"), "'first_observation' or None")
    bsuite_id = env_id.removeprefix("bsuite/")
    _import(env_id, "bsuite")
    settings: Mapping[str, Mapping[str, Any]] = importlib.import_module("bsuite.sweep").SETTINGS
    if bsuite_id not in settings:
        nearest = difflib.get_close_matches(bsuite_id, settings, n=3, cutoff=0.4)
        hint = f"the nearest are {[f'bsuite/{name}' for name in nearest]}" if nearest else "see bsuite.sweep.SWEEP"
        raise ValueError(f"unknown environment {env_id!r}; {hint}")
    experiment = bsuite_id.split("/")[0]
    loader = importlib.import_module("bsuite.bsuite").EXPERIMENT_NAME_TO_ENVIRONMENT[experiment]
    env = DmEnvs(functools.partial(loader, **settings[bsuite_id]), num_envs=num_envs, seed=seed, device=device)
    env.spec = dataclasses.replace(env.spec, success_reward=BSUITE_SUCCESS.get(experiment))
    return env if context is None else FirstObservation(env)


def make_popgym(
    env_id: str,
    num_envs: int,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    context: str | None = None,
    vectorization: str = "sync",
    **kwargs: Any,
) -> Environment:
    """Builds B copies of a POPGym environment; observations of several parts are flattened, discrete ones as one-hot.

    Args:
        env_id: an id that POPGym registers.
        num_envs: B.
        seed: of the run.
        device: of the TimeSteps.
        context: "state" for the hidden state that POPGym gives out, flattened; or None.
        vectorization: see `gymnasium_vector`.
        **kwargs: of the environment.

    Raises:
        ValueError: if the context is unknown, or an action space is not supported.
        ImportError: if popgym is missing; says how to install it.
    """
    require("context", context, context in (None, "state"), "'state' or None")
    reader = None if context is None else popgym_state
    return gymnasium_vector(
        _PopgymConstructor(env_id),
        num_envs,
        seed=seed,
        device=device,
        vectorization=vectorization,
        context=reader,
        **kwargs,
    )


def import_popgym(env_id: str) -> None:
    """Registers POPGym's ids. ImportError if it is missing."""
    _import(env_id, "popgym")


def popgym_state(env: "gymnasium.Env") -> np.ndarray:
    """The hidden Markov state of a POPGym environment as a vector [Z], discrete parts as one-hot."""
    from gymnasium.spaces import flatten

    base: Any = env.unwrapped
    return np.asarray(flatten(base.state_space, base.get_state()), np.float32)


class _PopgymConstructor:
    """Builds one environment; a class, so that it can be sent to another process."""

    def __init__(self, env_id: str):
        self.env_id = env_id

    def __repr__(self) -> str:
        return self.env_id

    def __call__(self, **kwargs: Any) -> "gymnasium.Env":
        import gymnasium
        from gymnasium.spaces import Box, Discrete
        from gymnasium.wrappers import FlattenObservation

        import_popgym(self.env_id)
        env = gymnasium.make(self.env_id, disable_env_checker=True, **kwargs)
        return env if isinstance(env.observation_space, Box | Discrete) else FlattenObservation(env)


def _import(env_id: str, package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{env_id} needs the package {package}: pip install -e '.[{package}]'") from error


class FirstObservation:
    """Gives error critics the episode's first observation beside the present one, as context; the policy sees neither twice.

    In the memory tasks of bsuite the first observation holds what is to be remembered and each one the time, so this is all there
    is to know of the state, read from what the environment shows in any case.

    Attributes:
        env: what is wrapped.
    """

    def __init__(self, env: Environment):
        """Wraps an environment whose observations are float32.

        Raises:
            ValueError: if they are images.
        """
        if env.spec.observation_dtype != torch.float32:
            raise ValueError(
                f"context 'first_observation' needs float32 observations, got {env.spec.observation_dtype}: images are too large"
            )
        self.env = env
        self.num_envs, self.device, self.resumable = env.num_envs, env.device, env.resumable
        size = int(np.prod(env.spec.observation_shape))
        self.spec = dataclasses.replace(env.spec, context_size=2 * size)
        self._first_observation = torch.zeros(self.num_envs, size, device=self.device)

    def reset(self) -> TimeStep:
        """Starts B new episodes."""
        return self._with_context(self.env.reset())

    def step(self, actions: Tensor) -> TimeStep:
        """Takes `actions` [B]; see `Environment.step`."""
        return self._with_context(self.env.step(actions))

    def _with_context(self, step: TimeStep) -> TimeStep:
        now = step.observation.flatten(1)  # [B, D]
        self._first_observation = torch.where(step.first[:, None], now, self._first_observation)
        return dataclasses.replace(step, context=torch.cat((self._first_observation, now), dim=1))

    def state_dict(self) -> dict[str, Any]:
        """That of the environment, and the first observations."""
        return {"env": self.env.state_dict(), "first_observation": self._first_observation.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.env.load_state_dict(state["env"])
        self._first_observation = state["first_observation"].to(self.device).clone()

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()


class BsuiteRecorder:
    """bsuite's record of a training run over B environments: rows of running totals, by number of episodes.

    bsuite scores how an agent did while it learned, in its first `num_episodes` episodes. An agent that learns from B environments
    has its episodes from all of them, so they are counted as one stream, in the order in which they end, and a return counts when
    its episode ends. With B = 1 the rows are those of bsuite's own wrapper.

    Attributes:
        bsuite_id: experiment and number.
        num_episodes: after how many bsuite stops.
        episodes: how many have ended.
        rows: what bsuite's logger would have been given, in order.
    """

    def __init__(self, env: Environment, bsuite_id: str):
        """Listens to an environment of `make_bsuite` that has not been stepped.

        Args:
            env: what `make_bsuite` returned.
            bsuite_id: as in bsuite, without the "bsuite/" in front.
        """
        inner = env.env if isinstance(env, FirstObservation) else env
        if not isinstance(inner, DmEnvs):
            raise ValueError(f"expected an environment of make_bsuite, got {type(env).__name__}")
        self.bsuite_id = bsuite_id
        self.num_episodes: int = inner.envs[0].bsuite_num_episodes
        self.episodes = 0
        self.rows: list[dict[str, float]] = []
        self._steps, self._total_return = 0, 0.0
        self._raw = list(inner.envs)
        inner.envs = [_Listened(raw, self._end) for raw in self._raw]

    def _end(self, length: int, episode_return: float) -> None:
        """Counts an episode that has ended."""
        self.episodes += 1
        self._steps += length
        self._total_return += episode_return
        power = 10 ** max(0, len(str(self.episodes)) - 2)
        if self.episodes < 10 or (self.episodes % power == 0 and self.episodes // power in _LOGGED):
            totals: dict[str, float] = {}
            for raw in self._raw:
                for name, value in raw.bsuite_info().items():
                    totals[name] = totals.get(name, 0.0) + value
            self.rows.append(
                {
                    "steps": self._steps,
                    "episode": self.episodes,
                    "total_return": self._total_return,
                    "episode_len": length,
                    "episode_return": episode_return,
                    **totals,
                }
            )

    def save(self, folder: str | Path) -> Path:
        """Writes the rows as bsuite's CSV file, which its own loader and analysis read; as a whole or not at all. Returns the file.

        Raises:
            ValueError: if the folder already holds a record of this id.
        """
        csv_logging = importlib.import_module("bsuite.logging.csv_logging")
        path = record_path(folder, self.bsuite_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        # bsuite writes the file anew at every row, and a record that is there is taken for finished.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as part:
            logger = csv_logging.Logger(self.bsuite_id, part)
            for row in self.rows:
                logger.write(row)
            if path.exists():
                raise ValueError(
                    f"{path}: found a record of {self.bsuite_id}, allowed none; remove it, or choose another folder"
                )
            record_path(part, self.bsuite_id).replace(path)
        return path


class _Listened:
    """A dm_env environment that tells when its episodes end, and is otherwise the one inside."""

    def __init__(self, env: Any, end: Callable[[int, float], None]):
        self._env, self._end = env, end
        self._length, self._return = 0, 0.0

    def reset(self) -> Any:
        self._length, self._return = 0, 0.0
        return self._env.reset()

    def step(self, action: int) -> Any:
        step = self._env.step(action)
        self._length += 1
        self._return += step.reward
        if step.last():
            self._end(self._length, self._return)
        return step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)


def record_path(folder: str | Path, bsuite_id: str) -> Path:
    """Where bsuite keeps the record of an id."""
    return Path(folder) / f"bsuite_id_-_{bsuite_id.replace('/', '-')}.csv"


def bsuite_scores(folder: str | Path) -> dict[str, tuple[float, Sequence[str]]]:
    """bsuite's own score of every experiment that has records in a folder, in [0, 1], with the ids that it is made of.

    Raises:
        ValueError: if there are no records.
    """
    if not any(Path(folder).glob("bsuite_id_-_*.csv")):
        raise ValueError(f"{folder}: found no records of bsuite; expected files bsuite_id_-_<id>.csv")
    frame, _ = importlib.import_module("bsuite.logging.csv_load").load_bsuite(str(folder))
    scores: dict[str, tuple[float, Sequence[str]]] = {}
    for experiment, part in frame.groupby("bsuite_env"):
        analysis = importlib.import_module(f"bsuite.experiments.{experiment}.analysis")
        ids = sorted(part.bsuite_id.unique(), key=lambda name: int(name.split("/")[1]))
        scores[str(experiment)] = (float(analysis.score(part)), ids)
    return scores
