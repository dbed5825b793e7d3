"""The credit horizon of an agent: how far back the gradients that it learns from reach, on sequences of its own making.

`measure_credit` is the one measurement: on a schedule during training (`run.credit_every_steps`, logged as `credit/...`) and offline
(`scripts/horizon.py`). It acts with the current policy in environments of its own, the same episodes each time as far as actions
allow, and leaves the run as it was: parameters, gradients, environments and random generators. The measure itself, and what it does
not see, is `dni_rl.horizon.credit_horizon`. Where the environment has a context, the expected horizon is measured as well, with all that
stays the same within an episode as the probe; it takes more sequences than the other, so set `run.credit_num_envs` to 64 or more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agents.build import build_environment, spread_seeds
from agents.checkpoint import rng_state, set_rng_state
from agents.config import TrainConfig
from agents.learner import Learner, Windows, make_windows, with_inputs
from agents.losses import normalized_advantages
from agents.rollout import Actor, Rollout
from dni_rl.horizon import CreditHorizon, credit_horizon
from envs.timestep import EnvSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_OBSERVATION_BYTES = 2**30  # of one measurement, two batches of which are held at a time


def measure_credit(
    config: TrainConfig, learner: Learner, *, seed: int | None = None, with_critics: bool = True
) -> CreditHorizon:
    """Acts in fresh environments and measures, by lag, what reaches the past of the true gradients of the agent's losses.

    The losses are those that the learner minimises, at the policy that acted. What is delivered is what one update would:

        none, and every error critic     windows of algorithm.bptt_horizon steps, bootstrapped by the critic
        model.core multi_timescale       the same in ticks of each level, with the interface critics where there are any
        rtrl                             everything, for the parameters of the core: as if nothing were cut. That sensitivities are a
                                         little older than the parameters, and what lies in front of the core, is not seen

    Sequences are of run.credit_length steps, half of which are measured: the others give the first ones a future, as long as the
    longest lag. Another as many are acted beforehand, so that they begin in the middle of episodes. Environments that cannot be
    saved (Atari) are no obstacle: the measurement starts new games, and what is measured is the first
    2 * run.credit_length steps of them.

    Cost: 2 * run.credit_length steps of acting, one unroll, and up to 64 backward passes through it; twice as many, step by step,
    for the multi-timescale core.

    Args:
        config: of the run; environment, algorithm and run.credit_... are read.
        learner: whose model and critics are measured; not changed.
        seed: of environments and actions; None for that of the run. Neither has anything in common with the streams that a run
            trains on.
        with_critics: False for truncated BPTT alone, with the same windows, in place of the run's method: what its critics have to
            be better than.

    Returns:
        Credit by lag, up to lag run.credit_length / 2.

    Raises:
        ValueError: if the environment cannot be built, or the sequences would take too much memory.
    """
    rollout, averages = _acted(config, learner, config.run.seed if seed is None else seed)
    windows = _as_windows(rollout, learner, averages)
    model, algorithm, levelled = learner.model, learner.algorithm, learner.levelled
    critic = learner.critic if with_critics else None
    context = windows.context if critic is not None and critic.context_size else None
    with torch.no_grad():
        inputs = model.core_inputs(windows.observation, windows.action_tm1, windows.reward, windows.first)
    measure = partial(
        credit_horizon,
        model.core,
        _losses(learner, windows),
        inputs,
        windows.state,
        windows.first,
        probe=_to_be_remembered(rollout),
        num_lags=config.run.credit_length // 2,
        margin=config.run.credit_length // 2,
    )
    if learner.sensitivity is not None and with_critics:
        return measure()
    if levelled is not None:
        interfaces = learner.interfaces if with_critics and learner.interfaces else None
        return measure(
            unroll=partial(
                levelled.unroll_in_ticks,
                ticks=algorithm.bptt_horizon,
                critic=critic,
                context=context,
                alive=windows.valid,
                interface_critics=interfaces,
            )
        )
    return measure(window=algorithm.bptt_horizon, critic=critic, context=context, alive=windows.valid)


def check_credit(config: TrainConfig, spec: EnvSpec) -> None:
    """Raises ValueError where observations of sequences as long as run.credit_length would not fit in memory."""
    run = config.run
    step_bytes = math.prod(spec.observation_shape) * spec.observation_dtype.itemsize
    needed = run.credit_length * run.credit_num_envs * step_bytes
    if needed > MAX_OBSERVATION_BYTES:
        fits = max(1, MAX_OBSERVATION_BYTES // (run.credit_length * step_bytes))
        raise ValueError(
            f"run.credit_num_envs: found {run.credit_num_envs} with run.credit_length {run.credit_length}, whose observations take "
            f"{needed / 2**20:,.1f} MiB; allowed {MAX_OBSERVATION_BYTES / 2**20:,.1f} MiB; set --run.credit_num_envs {fits}, or a "
            "shorter length"
        )


def _acted(config: TrainConfig, learner: Learner, seed: int) -> tuple[Rollout, Tensor | None]:
    """T steps of the current policy in B environments that are built for this and closed again, and the averages of past observations
    before them, where critics are told any.
    """
    length = config.run.credit_length
    *_, env_seed, actor_seed = spread_seeds(seed, 16)  # the run itself has the first few of these streams
    device = next(learner.model.parameters()).device
    generators = rng_state()  # an environment of the user's may draw from the global ones
    try:
        environment = build_environment(replace(config.env, num_envs=config.run.credit_num_envs), env_seed, device)
        try:
            check_credit(config, environment.spec)
            actor = Actor(environment, learner.model, rollout_length=length, bptt_horizon=length, seed=actor_seed)
            before, rollout = actor.collect(), actor.collect()
        finally:
            environment.close()
    finally:
        set_rng_state(generators)
    return rollout, with_inputs(before, learner.model, learner.critic_config)[1]


def _as_windows(rollout: Rollout, learner: Learner, averages: Tensor | None) -> Windows:
    """The whole rollout as one window, with the context that critics are told."""
    algorithm = learner.algorithm
    rollout = _with_inputs(rollout, learner, averages)
    return make_windows(rollout, len(rollout.action), algorithm.discount, algorithm.gae_lambda)


def _to_be_remembered(rollout: Rollout) -> Tensor | None:
    """[T, B, Z] what stays the same within every episode but not from one to the next, out of the privileged context; None if nothing.

    The cue of a maze, not the position in it: what a memory has to carry, whether or not the critics are told.
    """
    if rollout.context is None or rollout.context.shape[1] < 2:
        return None
    context = rollout.context[:-1]
    stays = ((context[1:] == context[:-1]) | rollout.first[1:-1].unsqueeze(-1)).flatten(0, 1).all(0)
    varies = (context != context[0, 0]).flatten(0, 1).any(0)
    chosen = stays & varies
    return context[..., chosen] if chosen.any() else None


def _with_inputs(rollout: Rollout, learner: Learner, averages: Tensor | None) -> Rollout:
    """As the learner, which sees no further ahead than to the end of one of its own rollouts."""
    if not learner.critic_config.future_steps:
        return with_inputs(rollout, learner.model, learner.critic_config, averages)[0]
    contexts: list[Tensor] = []
    for start in range(0, len(rollout.action), learner.algorithm.rollout_length):
        rows = slice(start, start + learner.algorithm.rollout_length + 1)
        part = replace(
            rollout,
            observation=rollout.observation[rows],
            action_tm1=rollout.action_tm1[rows],
            reward=rollout.reward[rows],
            first=rollout.first[rows],
            context=None if rollout.context is None else rollout.context[rows],
        )
        part, averages = with_inputs(part, learner.model, learner.critic_config, averages)
        if part.context is not None:
            # at a cut the critic is asked by the rollout that ends there
            contexts.append(part.context[1:] if start else part.context)
    return replace(rollout, context=torch.cat(contexts)) if contexts else rollout


def _losses(learner: Learner, windows: Windows) -> Callable[[Tensor], Tensor]:
    """Maps outputs [T, B, H] to losses [T, B]."""
    if learner.algorithm.normalize_advantages:
        windows = replace(windows, advantage=normalized_advantages(windows.advantage, windows.valid))

    def losses(outputs: Tensor) -> Tensor:
        logits, values = learner.model.heads(outputs, windows.privileged)
        return learner.losses(logits, values, windows).total

    return losses


def credit_figure(curves: Sequence[tuple[str, CreditHorizon]]) -> "Figure":
    """Norms and cosines by lag, a colour for each named curve, up to the longest lag with a true gradient.

    Dashed are the norm of the true gradient and the expected cosine.

    A figure of its own, outside of pyplot: nothing is left behind that has to be closed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    chart = Figure(figsize=(9.0, 3.2 + 0.2 * len(curves)), dpi=110, layout="constrained")
    norms, cosines = chart.subplots(1, 2, sharex=True)
    smallest = math.inf
    colours = colormaps["tab10" if len(curves) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for number, (name, horizon) in enumerate(curves):
        colour = colours[number % len(colours)]
        true, delivered, cosine = (x.cpu() for x in (horizon.true_norm, horizon.delivered_norm, horizon.cosine))
        exists = true > 0
        lags = torch.arange(1, len(true) + 1)
        smallest = min(smallest, float(torch.where(exists, true, math.inf).min()))
        norms.plot(lags, true.where(exists, math.nan), "--", color=colour, linewidth=1.0)
        norms.plot(lags, delivered.where(delivered > 0, math.nan), color=colour, label=name)
        cosines.plot(lags, cosine.where(exists, math.nan), color=colour)
        if horizon.expected_cosine is not None:
            expected = horizon.expected_cosine.cpu().where(exists, math.nan)
            cosines.plot(lags, expected, "--", color=colour, linewidth=1.0)
    cosines.axhline(0.5, color="grey", linewidth=0.8)
    norms.set(xlabel="lag in steps", ylabel="RMS norm (dashed: true)", title="gradient delivered")
    if math.isfinite(smallest):
        norms.set(yscale="log")
        norms.set_ylim(bottom=smallest / 10.0)
    cosines.set(xlabel="lag in steps", title="cosine with the true gradient (dashed: expected)", ylim=(-1.05, 1.05))
    chart.legend(loc="outside lower left", fontsize=7)
    return chart
