"""Spaces of gymnasium and specs of dm_env as ours: what is supported, and what observations become.

    uint8 images [Y, X], [Y, X, C] or [C, Y, X]     uint8 [C, Y, X], the smaller outer axis taken for the channels
    MiniGrid's symbolic view [X, Y, 3]              uint8 [20, Y, X] one-hot with values 0 and 255, see `envs.minigrid.minigrid_view`
    one discrete number                             float32 one-hot
    any other numeric array                         float32, flattened to a vector unless it has three axes or more

Actions must be discrete. Everything else is refused with the reason.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from envs.timestep import EnvSpec

Encoder = Callable[[np.ndarray], np.ndarray]  # [B, *original] -> [B, *encoded], always a new array


def example_of(observation_space: Any) -> np.ndarray:
    """An observation of a supported space, zeros."""
    from gymnasium import spaces

    if isinstance(observation_space, spaces.Discrete):
        return np.zeros((), np.int64)
    return np.zeros(observation_space.shape, observation_space.dtype)


def check_observation(name: str, shape: tuple[int, ...], dtype: np.dtype, example: np.ndarray) -> None:
    """ValueError if an observation does not look like `example`: what is off by a shape or a type would be learned from all the same."""
    is_image = example.dtype == np.uint8 and example.ndim > 1  # which stays as it is
    is_number = not example.shape and example.dtype.kind in "iu"  # of one of several values
    fits = dtype == np.uint8 if is_image else dtype.kind in ("biu" if is_number else "biuf")
    if shape != example.shape or not fits:
        raise ValueError(
            f"{name}: found an observation of shape {shape} and type {dtype}; expected shape {example.shape} and type {example.dtype}, "
            "as its observation space says; correct either"
        )


def gymnasium_spec(observation_space: Any, action_space: Any, encoder: Encoder | None) -> tuple[EnvSpec, Encoder, int]:
    """The spec of environments with these spaces, the conversion of their observations, and the number of the first action.

    Args:
        observation_space: of one environment.
        action_space: likewise.
        encoder: replaces the conversion above; None for that.

    Raises:
        ValueError: if a space is not supported.
    """
    from gymnasium import spaces

    if not isinstance(action_space, spaces.Discrete):
        raise ValueError(f"the action space is {action_space}, but only Discrete is supported")
    if isinstance(observation_space, spaces.Discrete):
        n, start = int(observation_space.n), int(observation_space.start)
        encoder = encoder or _one_hot_encoder(n, start)
        spec = _spec_of(encoder(np.full(1, start)), int(action_space.n))
    elif isinstance(observation_space, spaces.Box | spaces.MultiBinary | spaces.MultiDiscrete):
        example = example_of(observation_space)
        encoder = encoder or _array_encoder(example)
        spec = _spec_of(encoder(example[None]), int(action_space.n))
    else:
        raise ValueError(
            f"the observation space is {observation_space}, but only Box, Discrete, MultiBinary and MultiDiscrete are "
            "supported; select or flatten its parts, with gymnasium.wrappers.FlattenObservation for one, in a function or "
            "class of your module, and name that: --env.id my_module:make"
        )
    if isinstance(observation_space, spaces.Box) and observation_space.dtype == np.uint8:
        spec = _scaled(spec, observation_space.high)
    return spec, encoder, int(action_space.start)


def dm_spec(env: Any) -> tuple[EnvSpec, Encoder, Callable[[Any], np.ndarray], int, np.ndarray]:
    """The spec of a `dm_env.Environment`, the conversion of a batch, that of one observation before batching, the number of the first
    action, and an example of one observation.

    Raises:
        ValueError: if a spec is not supported.
    """
    action_spec = env.action_spec()
    if getattr(action_spec, "shape", None) != () or not np.issubdtype(action_spec.dtype, np.integer):
        raise ValueError(
            f"the action spec is {action_spec}, but only one discrete action (shape (), integer) is supported"
        )
    if not hasattr(action_spec, "minimum") or not hasattr(action_spec, "maximum"):
        raise ValueError(f"the action spec {action_spec} has no bounds; expected a DiscreteArray or BoundedArray")
    start = int(action_spec.minimum)
    num_actions = int(action_spec.maximum) - start + 1
    if getattr(env.reward_spec(), "shape", ()) != ():
        raise ValueError(f"the reward spec is {env.reward_spec()}, but only a scalar reward is supported")
    observation_spec = env.observation_spec()
    leaves = _leaves(observation_spec)
    if len(leaves) == 1 and hasattr(leaves[0], "num_values"):
        one_hot = _one_hot_encoder(int(leaves[0].num_values), 0)
        spec = _spec_of(one_hot(np.zeros(1, np.int64)), num_actions)
        return spec, one_hot, lambda observation: np.asarray(_leaves(observation)[0]), start, np.zeros((), np.int64)
    for leaf in leaves:
        if not np.issubdtype(leaf.dtype, np.number) and leaf.dtype != np.bool_:
            raise ValueError(f"the observation spec {leaf} is not numeric")
    if len(leaves) == 1:
        flatten: Callable[[Any], np.ndarray] = lambda observation: np.asarray(_leaves(observation)[0])  # noqa: E731
        example = np.zeros(leaves[0].shape, leaves[0].dtype)
    else:
        flatten = _concatenated
        example = _concatenated([np.zeros(leaf.shape, leaf.dtype) for leaf in leaves])
    encoder = _array_encoder(example)
    spec = _spec_of(encoder(example[None]), num_actions)
    if example.dtype == np.uint8 and hasattr(leaves[0], "maximum"):
        spec = _scaled(spec, leaves[0].maximum)
    return spec, encoder, flatten, start, example


def _scaled(spec: EnvSpec, highest: Any) -> EnvSpec:
    """With the scale of bytes up to this bound: of planes of 0 and 1, say, 255 would all but erase what they show."""
    return dataclasses.replace(spec, observation_scale=float(np.max(highest)) or spec.observation_scale)


def _leaves(nest: Any) -> list[Any]:
    """Arrays or specs of a nest of dictionaries, lists and tuples, dictionaries in the order of their sorted keys."""
    if isinstance(nest, Mapping):
        return [leaf for key in sorted(nest) for leaf in _leaves(nest[key])]
    if isinstance(nest, list | tuple):
        return [leaf for part in nest for leaf in _leaves(part)]
    return [nest]


def _concatenated(nest: Any) -> np.ndarray:
    """All numbers of a nest as one float32 vector."""
    return np.concatenate([np.ravel(leaf) for leaf in _leaves(nest)], dtype=np.float32, casting="unsafe")


def _one_hot_encoder(num_values: int, start: int) -> Encoder:
    """[B] numbers from `start` on to float32 [B, num_values]."""

    def encoded(x: np.ndarray) -> np.ndarray:
        one_hot = np.asarray(x)[:, None] == np.arange(start, start + num_values)
        if not one_hot.any(1).all():
            wrong = np.asarray(x)[~one_hot.any(1)][0]
            raise ValueError(
                f"found the observation {wrong}; expected a number from {start} to {start + num_values - 1}, as the space of "
                f"{num_values} values says; correct either"
            )
        return one_hot.astype(np.float32)

    return encoded


def _array_encoder(example: np.ndarray) -> Encoder:
    """Picks the conversion of arrays that look like `example` (without a batch); see the module."""
    if example.dtype == np.uint8 and example.ndim == 2:
        return lambda x: np.array(x)[:, None]  # [B, 1, Y, X]
    if example.dtype == np.uint8 and example.ndim == 3:
        if example.shape[-1] <= example.shape[0]:  # [Y, X, C], gymnasium's custom
            return lambda x: np.array(np.moveaxis(x, -1, 1), order="C")
        return np.array
    if example.dtype == np.uint8 and example.ndim > 3:
        raise ValueError(f"images of shape {example.shape} are not supported; expected [Y, X], [Y, X, C] or [C, Y, X]")
    if example.ndim >= 3:
        return lambda x: np.array(x, np.float32)
    return lambda x: np.array(x, np.float32).reshape(len(x), -1)


def _spec_of(encoded: np.ndarray, num_actions: int) -> EnvSpec:
    """The spec of environments whose encoded observations look like `encoded` [1, ...]."""
    return EnvSpec(encoded.shape[1:], torch.from_numpy(encoded).dtype, num_actions)
