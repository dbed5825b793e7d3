"""From a configuration to environments, network and error critic: the one place that knows all three packages."""

import random

import numpy as np
import torch

import dni_rl
import envs
from agents.config import CriticConfig, EnvConfig, ModelConfig
from agents.model import CONVOLUTIONS, ActorCritic, Torso, conv_torso, mlp_torso
from envs.timestep import Environment, EnvSpec

EVALUATION_KEY = (0,)  # which no process has
_NO_CONTEXT = "this environment offers no privileged context"
_OFFER_CONTEXT = "set --env.kwargs.context, for one gymnasium or dm_env environment of your own to module:function"


def seed_global_generators(seed: int) -> None:
    """Those of PyTorch, NumPy and Python. Nothing of ours draws from the last two; an environment of the user's may."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def spread_seeds(seed: int, count: int, *, key: tuple[int, ...] = ()) -> list[int]:
    """Seeds of independent streams; those of different runs and keys do not overlap, unlike seed, seed + 1, ...

        ()              the run, in the first process or the only one
        (rank,)         the run, in each other process, counted from 1
        (rank, step)    the environments of a run that was resumed at this step, where their state cannot be saved
        EVALUATION_KEY  the environments of an evaluation, where seed is its own

    Args:
        seed: of the run.
        count: how many. More of them begin with the same ones.
        key: what they are for.
    """
    return [int(word) for word in np.random.SeedSequence(seed, spawn_key=key).generate_state(count, np.uint32)]


def build_environment(config: EnvConfig, seed: int, device: torch.device) -> Environment:
    """The environment of a run.

    Raises:
        ValueError: in one line, if it is unknown, cannot be built or its arguments are wrong; those by name, as env.kwargs.<name>, where
            it is the value that is wrong.
        ImportError: if an optional package is missing; says how to install it.
    """
    try:
        return envs.make(config.id, num_envs=config.num_envs, seed=seed, device=device, **config.kwargs)
    except envs.ArgumentError as error:
        raise ValueError(f"env.kwargs.{error}") from error
    except ValueError as error:
        raise ValueError(f"env: {error}") from error
    except Exception as error:
        if type(error).__module__ != "gymnasium.error":  # for one, that a package of the environment is not installed
            raise
        raise ValueError(f"env: {config.id} cannot be built: {' '.join(str(error).split())}") from error


def build_torso(config: ModelConfig, spec: EnvSpec) -> Torso:
    """The torso. 'auto' is a convolutional net for images of at least 36 x 36 pixels and an MLP otherwise."""
    shape, is_image = spec.observation_shape, spec.observation_dtype == torch.uint8
    is_large = is_image and len(shape) == 3 and min(shape[1:]) >= 36
    kind = config.torso
    if kind == "auto":
        kind = "conv" if is_large else "mlp"
    if kind in CONVOLUTIONS:
        if not is_large:
            raise ValueError(
                f"model.torso: found {kind!r} for observations {shape}, {spec.observation_dtype}; allowed for uint8 images [C, Y, X] of at "
                "least 36 x 36 pixels; use 'mlp'"
            )
        return conv_torso(shape, CONVOLUTIONS[kind], config.torso_sizes, spec.observation_scale)
    return mlp_torso(shape, () if kind == "none" else config.torso_sizes, spec.observation_scale if is_image else None)


def build_core(config: ModelConfig, input_size: int) -> dni_rl.Core:
    """The recurrent core, its input weights multiplied by the gain; initialised from torch's global generator."""
    core: dni_rl.Core
    if config.core == "multi_timescale":
        sizes = config.level_sizes or (config.hidden_size,) * len(config.periods)
        core = dni_rl.MultiTimescaleCore(
            input_size, sizes, config.periods, message=config.message, chrono_max=_memories(config)
        )
        # of a level, the columns behind these read the context from above
        entering = [
            level.get_parameter("weight_ih")[:, :width]
            for level, width in zip(core.levels, (input_size, *sizes[:-1]), strict=True)
        ]
    elif config.core == "elementwise_lstm":
        core = dni_rl.ElementwiseLSTM(input_size, config.hidden_size, chrono_max=config.chrono_max)
        entering = [core.weight_ih]
    else:
        kind = {"lstm": dni_rl.LSTM, "gru": dni_rl.GRU}[config.core]
        core = kind(input_size, config.hidden_size, config.num_layers, chrono_max=config.chrono_max)
        entering = [core.rnn.get_parameter("weight_ih_l0")]
    with torch.no_grad():
        for weight in entering:
            weight.mul_(config.input_gain)
    return core


def _memories(config: ModelConfig) -> list[float] | None:
    """The longest memory of each level, in agent steps: up to the next tick of the level above, the highest one's is chrono_max."""
    if config.chrono_max is None:
        return None
    return [min(config.chrono_max, float(above)) for above in config.periods[1:]] + [config.chrono_max]


def build_model(config: ModelConfig, spec: EnvSpec) -> ActorCritic:
    """The actor-critic network; initialised from torch's global generator. ValueError if a context is asked for that does not exist."""
    if config.privileged_value and not spec.context_size:
        raise ValueError(f"model.privileged_value: found true, but {_NO_CONTEXT}; allowed false; {_OFFER_CONTEXT}")
    torso = build_torso(config, spec)
    width = torso.output_size + spec.num_actions * config.previous_action + config.previous_reward
    return ActorCritic(
        torso,
        build_core(config, width),
        spec.num_actions,
        previous_action=config.previous_action,
        previous_reward=config.previous_reward,
        head_sizes=config.head_sizes,
        privileged_size=spec.context_size if config.privileged_value else 0,
    )


def build_critic(config: CriticConfig, model: ActorCritic, spec: EnvSpec) -> dni_rl.ErrorCritic | None:
    """The error critic, or None for truncated BPTT and RTRL. ValueError if a context is asked for that does not exist."""
    if not config.predicts:
        return None
    if config.kind == "cdni" and not spec.context_size:
        raise ValueError(
            f"critic.kind: found 'cdni', but {_NO_CONTEXT}; allowed every other kind; {_OFFER_CONTEXT}, or --critic.kind dni with "
            "--critic.past_steps"
        )
    kinds: dict[str, type[dni_rl.GradientCritic | dni_rl.LossCritic | dni_rl.SobolevCritic]] = {
        "loss_critic": dni_rl.LossCritic,
        "sobolev": dni_rl.SobolevCritic,
    }
    return kinds.get(config.kind, dni_rl.GradientCritic)(
        state_sizes=model.core.state_sizes,
        hidden_sizes=config.hidden_sizes,
        context_size=(spec.context_size if config.kind == "cdni" else 0)
        + len(config.past_steps) * (model.observed_size + 1)  # an average and the age of the episode
        + config.future_steps * (model.core.input_size + 1),  # an input and a flag
        normalize_context=bool(config.past_steps),  # averages over many steps are small
        normalize_targets=config.normalize_targets,
        dense_targets=config.dense_targets,
        gradient_discount=config.gradient_discount,
        scale=config.scale,
        max_norm_ratio=config.max_norm_ratio,
        warmup_updates=config.warmup_updates,
        slow_copy_rate=config.slow_copy_rate,
        target_lambda=config.target_lambda,
        targets_per_window=config.targets_per_window if config.dense_targets and config.target_lambda == 1.0 else None,
        yardstick_interval=config.yardstick_interval,
    )


def build_interfaces(config: CriticConfig, model: ActorCritic) -> list[dni_rl.GradientCritic]:
    """One critic for each message upwards in a multi-timescale core, from the lowest; none unless asked for."""
    core = model.core
    if not config.interfaces or not isinstance(core, dni_rl.MultiTimescaleCore):
        return []
    return [
        dni_rl.GradientCritic(
            state_sizes=(width,),
            hidden_sizes=config.hidden_sizes,
            normalize_targets=config.normalize_targets,
            scale=config.scale,
            warmup_updates=config.warmup_updates,
            slow_copy_rate=config.slow_copy_rate,
        )
        for width in core.hidden_sizes[:-1]
    ]


def build_auxiliary(config: CriticConfig, model: ActorCritic) -> dni_rl.AuxiliaryTask | None:
    """The auxiliary task of dni_aux, or None; on the model's device."""
    if config.kind != "dni_aux":
        return None
    core = model.core
    task = dni_rl.AuxiliaryTask(output_size=core.output_size, state_sizes=core.state_sizes, cost=config.auxiliary_cost)
    return task.to(next(model.parameters()).device)
