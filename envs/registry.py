"""Environments by name: `make` turns an id into B environments behind one `TimeStep`.

    "PassiveTMaze", "MemoryCorridor", ...   this project's gridworlds: GRIDWORLDS below
    "ALE/Breakout-v5"                       Atari
    "MiniGrid-MemoryS7-v0"                  MiniGrid (an optional extra)
    "bsuite/memory_len/0"                   bsuite (an optional extra), by experiment and number of its setting
    "popgym-RepeatFirstEasy-v0"             POPGym (an optional extra)
    "CartPole-v1"                           any other id that gymnasium knows
    "module:Name"                           a class or function of an importable module, see `make`, or a gymnasium id
                                            that importing it registers; nothing in this package has to be touched

Packages are imported when an id asks for them.
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from envs.arguments import (
    ArgumentError,
    built_with,
    callable_of,
    import_named,
    is_number,
    refuse,
    require,
    require_integer,
)
from envs.minigrid import MINIGRID_PREFIXES
from envs.timestep import Environment

GRIDWORLDS = (
    *("PassiveTMaze", "ActiveTMaze", "KeyToDoor"),
    *("RepeatFirst", "RepeatPrevious", "MatchToSample", "MemoryCorridor", "MultiRoomKeyDoor"),
)

# What is achieved is paid with 1 - 0.9 * (share of the time limit used), that is with at least 0.1, and failure with 0 or less.
_MINIGRID_SUCCESS = 0.05

_OUR_ARGUMENTS = {"self", "num_envs", "seed", "device"}
# What is understood beside the arguments of the environment itself: of what a module names, and where `gymnasium_vector` builds it.
_IMPORTED_OPTIONS = ("context", "success_reward")
_GYMNASIUM_OPTIONS = (
    "vectorization",
    "context",
    "success_reward",
    "view_size",
    "encoding",
    "ignore_mission",
    "fast_view",
    "max_episode_steps",
)
_POPGYM_OPTIONS = ("vectorization", "context", "success_reward", "max_episode_steps")


def make(env_id: str, *, num_envs: int, seed: int, device: str | torch.device = "cpu", **kwargs: Any) -> Environment:
    """Builds B environments.

    Args:
        env_id: see the module.
        num_envs: B.
        seed: of the run; the environments are seeded differently from each other and from those of other runs.
        device: of the TimeSteps.
        **kwargs: settings of the environment. "module:Name" passes them to what it names, a class or function: of one
            `gymnasium.Env` or `dm_env.Environment`, which is called B times, in the case of dm_env with a seed each if
            it names that argument; or, if it takes num_envs, of all environments at once, as a
            `gymnasium.vector.VectorEnv`, or as an `Environment`, for which it must take seed and device too.
            Beside its own settings it has success_reward, an episode of which undiscounted return counts as a success,
            and, where it makes one environment, context: the place "module:function" of a function of one environment,
            as it was made, that gives what is privileged about it as an array.

    Raises:
        ValueError: if the id or a setting is unknown; names the nearest.
        ArgumentError: if a setting is known, and its value is not one that the environment takes; starts with its name.
        ImportError: if an optional package is missing; says how to install it.
    """
    require_integer("num_envs", num_envs, 1, way_out="say how many")
    require_integer("seed", seed, 0, way_out="choose one")
    if env_id in GRIDWORLDS:
        cls = getattr(importlib.import_module("envs.gridworlds"), env_id)
        _check_arguments(env_id, kwargs, _argument_names(cls))
        return cls(num_envs=num_envs, seed=seed, device=device, **kwargs)
    if env_id.startswith("ALE/"):
        return _make_atari(env_id, num_envs, seed, device, kwargs)
    if env_id.startswith("bsuite/"):
        from envs.third_party import make_bsuite

        _check_arguments(env_id, kwargs, {"context"})
        return make_bsuite(env_id, num_envs, seed=seed, device=device, **kwargs)
    if ":" in env_id:
        return _make_imported(env_id, num_envs, seed, device, kwargs)
    return _make_gymnasium(env_id, num_envs, seed, device, kwargs)


def _make_atari(
    env_id: str, num_envs: int, seed: int, device: str | torch.device, kwargs: dict[str, Any]
) -> Environment:
    from envs.atari import Atari

    allowed = _argument_names(Atari)
    assert allowed is not None
    _check_arguments(env_id, kwargs, allowed - {"game"})
    return Atari(env_id, num_envs=num_envs, seed=seed, device=device, **kwargs)


def _make_gymnasium(
    env_id: str, num_envs: int, seed: int, device: str | torch.device, kwargs: dict[str, Any], module: str | None = None
) -> Environment:
    """B environments of an id that is registered, by `module` if it is one of the user's."""
    if env_id.startswith(MINIGRID_PREFIXES):
        try:
            importlib.import_module("minigrid")  # registers its ids
        except ImportError as error:
            raise ImportError(f"{env_id} needs the package minigrid: pip install -e '.[minigrid]'") from error
    if env_id.startswith("popgym-"):
        from envs.third_party import import_popgym

        import_popgym(env_id)
    try:
        import gymnasium
        from gymnasium.envs.registration import load_env_creator
    except ImportError as error:
        raise ImportError(f"{env_id} needs the package gymnasium: pip install -e '.[agents]'") from error
    from envs.adapters import gymnasium_vector

    if env_id not in gymnasium.registry:
        nearest = difflib.get_close_matches(env_id, _known_ids(), n=3, cutoff=0.4)
        hint = f"the nearest are {nearest}" if nearest else f"expected one of {list(GRIDWORLDS)}, a gymnasium id"
        raise ValueError(f"unknown environment {env_id!r}; {hint}, or module:Name for a class of your own")
    spec = gymnasium.registry[env_id]
    creator: Any = spec.entry_point
    if isinstance(creator, str):
        creator = load_env_creator(creator)
    if creator is None:
        raise ValueError(f"{env_id} has no constructor of single environments; name its class as module:Name")
    names, is_popgym = _argument_names(creator), env_id.startswith("popgym-")
    options = _POPGYM_OPTIONS if is_popgym else _GYMNASIUM_OPTIONS
    _check_arguments(env_id, kwargs, None if names is None else names.union(options))
    success_reward = _pop_success_reward(kwargs)
    if is_popgym:
        from envs.third_party import make_popgym

        env = make_popgym(env_id, num_envs, seed=seed, device=device, **kwargs)
    else:
        # With the module's name another process can find the id as well.
        named = env_id if module is None else f"{module}:{env_id}"
        env = gymnasium_vector(named, num_envs, seed=seed, device=device, **kwargs)
    if env_id.startswith(MINIGRID_PREFIXES) and success_reward is None:
        success_reward = _MINIGRID_SUCCESS
    return _with_success_reward(env, success_reward)


def _make_imported(
    env_id: str, num_envs: int, seed: int, device: str | torch.device, kwargs: dict[str, Any]
) -> Environment:
    module, name = import_named(env_id)
    gymnasium = sys.modules.get("gymnasium")
    if not hasattr(module, name) and gymnasium is not None and name in gymnasium.registry:
        return _make_gymnasium(name, num_envs, seed, device, kwargs, module.__name__)
    target = callable_of(module, name)
    names = _argument_names(target, ours=True)
    takes = set(inspect.signature(target).parameters) if names is None else names
    is_dm = _is_subclass(target, "dm_env", "Environment")
    is_class_of_one = is_dm or _is_subclass(target, "gymnasium", "Env")
    makes_all = "num_envs" in takes and not is_class_of_one
    if inspect.isclass(target) and not is_class_of_one and not makes_all:
        raise ValueError(f"{env_id}: expected {_IMPORTED}; it takes {sorted(takes)}")
    options = set(_IMPORTED_OPTIONS if is_dm or makes_all else _GYMNASIUM_OPTIONS) - takes  # what it takes is its own
    _check_arguments(env_id, kwargs, None if names is None else (takes - _OUR_ARGUMENTS) | options)
    _check_required(env_id, target, kwargs)
    if not makes_all:
        _check_not_ours(env_id, target, {"num_envs", "device"})
    chosen = {key: kwargs.pop(key) for key in options & kwargs.keys()}
    success_reward = _pop_success_reward(chosen)

    def build(**arguments: Any) -> Environment:
        constructor = functools.partial(target, **arguments)
        return _adapted(env_id, constructor, takes, makes_all, num_envs, seed, device, chosen)

    env = built_with(build, kwargs, env_id)
    if env.num_envs != num_envs:
        raise ValueError(
            f"{env_id} gave {env.num_envs} environments, expected {num_envs}; let it take num_envs and make as many"
        )
    return _with_success_reward(env, success_reward)


def _adapted(
    env_id: str,
    constructor: functools.partial[Any],
    takes: set[str],
    makes_all: bool,
    num_envs: int,
    seed: int,
    device: str | torch.device,
    options: dict[str, Any],
) -> Environment:
    """B environments by what their constructor gives, which has the arguments of its own.

    Args:
        env_id: for messages.
        constructor: of one environment, or of all of them.
        takes: names of its arguments.
        makes_all: whether it is one of all of them.
        num_envs: B.
        seed: of the run.
        device: of the TimeSteps.
        options: for the adapter.
    """
    from envs.adapters import DmEnvs, GymnasiumVector, environment_seeds, gymnasium_vector, named_context

    def made(**arguments: Any) -> Any:
        return constructor(**{name: value for name, value in arguments.items() if name in takes})

    if _is_subclass(constructor.func, "gymnasium", "Env"):
        _check_not_ours(env_id, constructor, {"seed"})
        return gymnasium_vector(constructor, num_envs, seed=seed, device=device, **options)
    seeds = environment_seeds(seed, num_envs)
    env = made(num_envs=num_envs, seed=seed, device=device) if makes_all else made(seed=seeds[0])
    kind = type(env)
    if _is_subclass(kind, "gymnasium", "Env") and not makes_all:
        env.close()  # it has shown what it is
        _check_not_ours(env_id, constructor, {"seed"})
        return gymnasium_vector(constructor, num_envs, seed=seed, device=device, **options)
    _check_arguments(env_id, options, (takes - _OUR_ARGUMENTS).union(_IMPORTED_OPTIONS))
    if _is_subclass(kind, "dm_env", "Environment") and not makes_all:
        if "seed" not in takes and num_envs > 1:
            warnings.warn(
                f"{env_id} has no argument of the name seed, so that its environments may be all alike, and no run can be repeated",
                stacklevel=4,
            )
        envs = [env, *(made(seed=s) for s in seeds[1:])]
        return DmEnvs(envs, device=device, context=named_context(options.get("context")))
    if options.get("context") is not None:
        allowed = "None with environments that are made all at once, as a single one cannot be looked into"
        refuse("context", options["context"], allowed, "name what makes one gymnasium.Env or dm_env.Environment")
    if _is_subclass(kind, "gymnasium.vector", "VectorEnv"):
        return GymnasiumVector(env, seed=seed, device=device)
    lacks = [member for member in _ENVIRONMENT_MEMBERS if not hasattr(env, member)]
    if makes_all and lacks:
        raise ValueError(
            f"{env_id} gave {kind.__name__}, which is not an envs.Environment: it lacks {lacks}; nor is it a "
            "gymnasium.vector.VectorEnv. What makes one environment must not take num_envs"
        )
    if not makes_all or not {"seed", "device"} <= takes:
        raise ValueError(f"{env_id}: expected {_IMPORTED}; it takes {sorted(takes)} and gives {kind.__name__}")
    return env


_IMPORTED = (
    "a gymnasium.Env, gymnasium.vector.VectorEnv or dm_env.Environment, a function that gives one, or something that "
    "takes (num_envs, seed, device) and gives an envs.Environment"
)
_ENVIRONMENT_MEMBERS = (
    "spec", "num_envs", "device", "resumable", "reset", "step", "state_dict", "load_state_dict", "close"
)  # fmt: skip


def _pop_success_reward(kwargs: dict[str, Any]) -> float | None:
    success_reward = kwargs.pop("success_reward", None)
    is_bar = success_reward is None or is_number(success_reward, -math.inf, math.inf)
    require("success_reward", success_reward, is_bar, "a number, or None")
    return success_reward


def _with_success_reward(env: Environment, success_reward: float | None) -> Environment:
    """The environment with a success of its episodes, or as it is if None."""
    if success_reward is not None:
        env.spec = dataclasses.replace(env.spec, success_reward=success_reward)
    return env


def _is_subclass(target: Any, module: str, name: str) -> bool:
    """Whether `target` is a subclass of `module`.`name`: it cannot be one if nobody has imported that module."""
    base = getattr(sys.modules.get(module), name, None)
    return base is not None and inspect.isclass(target) and issubclass(target, base)


def _argument_names(target: Callable[..., Any], ours: bool = False) -> set[str] | None:
    """Names of the keyword arguments of a class or function, or None if it takes any.

    The **kwargs of a constructor are taken to go to those of its base classes.

    Args:
        target: a class or a function.
        ours: whether to keep num_envs, seed and device.
    """
    if not inspect.isclass(target):
        constructors: list[Any] = [target]
    else:
        constructors = [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
    names: set[str] = set()
    for constructor in constructors:
        if constructor is object.__init__:
            break
        parameters = inspect.signature(constructor).parameters.values()
        names.update(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    else:
        return None  # the last one takes **kwargs, and there is no base left to look at
    return names - {"self"} if ours else names - _OUR_ARGUMENTS


def _check_arguments(env_id: str, kwargs: dict[str, Any], allowed: Iterable[str] | None) -> None:
    """Raises ValueError for the first argument that is not among the allowed ones; None allows all."""
    if allowed is None:
        return
    allowed = sorted(allowed)
    for name in kwargs:
        if name not in allowed:
            nearest = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(
                f"{env_id} has no argument {name!r}; {hint}It takes {', '.join(allowed) or 'none'}; those of a configuration file for "
                "another environment go with --env.kwargs '{}'"
            )


def _required(target: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a class or function that have no default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(target).parameters.values()
    return [p.name for p in parameters if p.kind in named and p.default is p.empty]


def _check_required(env_id: str, target: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ArgumentError for the first argument of a class or function that has no default and is not given."""
    for name in _required(target):
        if name not in _OUR_ARGUMENTS | kwargs.keys():
            raise ArgumentError(
                f"{name}: found nothing; allowed what {env_id} takes, which has no default; give it a value"
            )


def _check_not_ours(env_id: str, constructor: Callable[..., Any], names: set[str]) -> None:
    """Raises ArgumentError if a constructor of one environment cannot do without what it is not given."""
    for name in _required(constructor):
        if name in names:
            way_out = "reset(seed=...) is where it comes" if name == "seed" else "leave it out"
            raise ArgumentError(
                f"{name}: found an argument of {env_id} that has no default; allowed none, as it makes one environment; {way_out}"
            )


def _known_ids() -> list[str]:
    """Ids that can be suggested, with those of the optional packages that are installed."""
    for package in ("ale_py", "minigrid", "popgym"):
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
    gymnasium = importlib.import_module("gymnasium")
    # Atari under its present names only: the old ones have other settings.
    entries = gymnasium.registry.items()
    ids = [id_ for id_, spec in entries if id_.startswith("ALE/") or not str(spec.entry_point).startswith("ale_py")]
    return [*GRIDWORLDS, *ids]
