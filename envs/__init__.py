"""Environments as batches of `TimeStep`s: memory gridworlds, Atari, and adapters for gymnasium, MiniGrid and dm_env."""

from envs.arguments import ArgumentError
from envs.registry import make
from envs.timestep import Environment, EnvSpec, TimeStep

__all__ = ["ArgumentError", "EnvSpec", "Environment", "TimeStep", "make"]
