"""From a configuration to environments, network and error critic: the one place that knows all three packages."""

import numpy as np
import torch
from torch import nn

import dni_rl
import envs
from agents.config import CriticConfig, EnvConfig, ModelConfig
from agents.model import ActorCritic, conv_torso, mlp_torso
from envs.timestep import Environment, EnvSpec


def spread_seeds(seed: int, count: int) -> list[int]:
    """`count` seeds of independent streams; those of different runs do not overlap, unlike seed, seed + 1, ..."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(count, np.uint32)]


def build_environment(config: EnvConfig, seed: int, device: torch.device) -> Environment:
    """The environment of a run. Raises ValueError in one line if it is unknown or its arguments are wrong."""
    return envs.make(config.id, num_envs=config.num_envs, seed=seed, device=device, **config.kwargs)


def build_torso(config: ModelConfig, spec: EnvSpec) -> tuple[nn.Module, int]:
    """The torso and its output width.

    'auto' is a convolutional net for images of at least 36 x 36 pixels, an MLP for small symbolic images, and nothing
    at all for vectors, which a core reads as they are.
    """
    shape, is_image = spec.observation_shape, spec.observation_dtype == torch.uint8
    kind = config.torso
    if kind == "auto":
        kind = "none" if not is_image else "conv" if len(shape) == 3 and min(shape[1:]) >= 36 else "mlp"
    if kind == "conv":
        if not is_image or len(shape) != 3:
            raise ValueError(
                f"model.torso: found 'conv' for observations {shape} {spec.observation_dtype}; allowed for uint8 images [C, Y, X]; use 'mlp'"
            )
        return conv_torso(shape, config.torso_sizes[-1]), config.torso_sizes[-1]
    sizes = () if kind == "none" else config.torso_sizes
    # Symbolic images (MiniGrid) hold object, colour and state codes up to about 10, not brightness.
    scale = None if not is_image else 255.0 if min(shape[-2:]) >= 36 else 10.0
    torso = mlp_torso(shape, sizes, scale)
    return torso, sizes[-1] if sizes else int(np.prod(shape))


def build_model(config: ModelConfig, spec: EnvSpec) -> ActorCritic:
    """The actor-critic network; initialised from torch's global generator."""
    torso, width = build_torso(config, spec)
    width += spec.num_actions * config.previous_action + config.previous_reward
    kind = {"lstm": dni_rl.LSTM, "gru": dni_rl.GRU}[config.core]
    core = kind(width, config.hidden_size, config.num_layers, chrono_max=config.chrono_max)
    return ActorCritic(
        torso,
        core,
        spec.num_actions,
        previous_action=config.previous_action,
        previous_reward=config.previous_reward,
        head_sizes=config.head_sizes,
    )


def build_critic(config: CriticConfig, model: ActorCritic, spec: EnvSpec) -> dni_rl.GradientCritic | None:
    """The error critic, or None for plain truncated BPTT. ValueError if a context is asked for that does not exist."""
    if config.kind == "none":
        return None
    if config.kind == "cdni" and not spec.context_size:
        raise ValueError(
            "critic.kind: found 'cdni', but this environment offers no privileged context; allowed none or dni here"
        )
    return dni_rl.GradientCritic(
        state_sizes=model.core.state_sizes,
        hidden_sizes=config.hidden_sizes,
        context_size=spec.context_size if config.kind == "cdni" else 0,
        normalize_targets=config.normalize_targets,
        dense_targets=config.dense_targets,
        gradient_discount=config.gradient_discount,
        scale=config.scale,
        max_norm_ratio=config.max_norm_ratio,
        warmup_updates=config.warmup_updates,
    )
