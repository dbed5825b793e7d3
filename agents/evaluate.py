"""Evaluating a trained policy: whole episodes in fresh environments, their returns with spread, and a video of one.

An evaluation that takes the first N episodes to end, of many environments side by side, has more short episodes than there
should be, and where returns depend on the length a biased mean. Here every environment plays a number of episodes that is
fixed beforehand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.build import EVALUATION_KEY, build_environment, build_model, spread_seeds
from agents.checkpoint import load_checkpoint, restoring
from agents.config import TrainConfig, from_dict
from agents.model import ActorCritic
from envs.timestep import Environment, EnvSpec, TimeStep, least_return

MAX_VIDEO_FRAMES = 3000  # a GIF is held in memory; longer episodes are cut


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Finished episodes, ordered by environment and then time.

    Attributes:
        returns: [E] float64 sums of raw rewards, undiscounted.
        lengths: [E] agent steps.
        successes: [E] bool, or None where the environment has no notion of success.
    """

    returns: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Policy:
    """A network that acts, and where it comes from."""

    model: ActorCritic
    config: TrainConfig
    step: int


def load_policy(run: Path) -> tuple[Policy, Callable[[int, int], Environment]]:
    """Loads the policy of a training run, on the CPU.

    Args:
        run: the run's folder, or a checkpoint in it.

    Returns:
        The policy, and a function (num_envs, seed) that makes environments as it was trained in, with episodes of their own:
        none of them shares a random stream with any process of a training run, whatever the seeds.

    Raises:
        ValueError: in one line, if the checkpoint is missing, damaged or of something else.
        ImportError: if the environment needs a package that is missing.
    """
    checkpoint = load_checkpoint(run)
    with restoring(run):
        config = from_dict(checkpoint["config"])  # not the file beside it, which may have been changed since

    def make_environment(num_envs: int, seed: int) -> Environment:
        (env_seed,) = spread_seeds(seed, 1, key=EVALUATION_KEY)
        env_config = type(config.env)(id=config.env.id, num_envs=num_envs, kwargs=config.env.kwargs)
        return build_environment(env_config, env_seed, torch.device("cpu"))

    probe = make_environment(1, 0)
    try:
        model = build_model(config.model, probe.spec)
    finally:
        probe.close()
    with restoring(run):
        model.load_state_dict(checkpoint["learner"]["model"])
        step = int(checkpoint["step"])
    return Policy(model.eval(), config, step), make_environment


@torch.no_grad()
def evaluate(
    model: ActorCritic,
    environment: Environment,
    num_episodes: int,
    *,
    greedy: bool = False,
    seed: int = 0,
    on_step: Callable[[TimeStep], object] | None = None,
    on_episodes: Callable[[int], object] | None = None,
) -> Evaluation:
    """Plays whole episodes from a reset on.

    Of E episodes in B environments, each plays E // B, and the first E % B one more; what they play beyond that is not counted.
    An Atari game ends where the game does, not where a life is lost.

    Args:
        model: the network that acts.
        environment: B fresh environments, B at most E.
        num_episodes: E.
        greedy: takes the most probable action; otherwise actions are drawn from the policy.
        seed: of the stream from which actions are drawn.
        on_step: called with every TimeStep, the reset included.
        on_episodes: called with the number of counted episodes that just ended.

    Raises:
        ValueError: if there are more environments than episodes, or what the model computes is NaN or infinite.
    """
    B = environment.num_envs
    if not 1 <= B <= num_episodes:
        raise ValueError(f"num_episodes: found {num_episodes}, allowed at least one for each of {B} environments")
    quota = np.full(B, num_episodes // B)
    quota[: num_episodes % B] += 1
    generator = torch.Generator(device=environment.device).manual_seed(seed)
    finished: list[list[tuple[float, int]]] = [[] for _ in range(B)]
    returns, lengths = np.zeros(B), np.zeros(B, np.int64)

    timestep, state = environment.reset(), model.core.initial_state(B)
    action = torch.zeros(B, dtype=torch.int64, device=environment.device)
    boundaries = _Boundaries(B)
    if on_step is not None:
        on_step(timestep)
    while any(len(episodes) < wanted for episodes, wanted in zip(finished, quota, strict=True)):
        logits, _, state = model.act(timestep.observation, action, timestep.reward, timestep.first, state)
        if not bool(logits.isfinite().all()):
            raise ValueError(
                "logits: found NaN or infinity; allowed finite numbers; training keeps no such parameters, so look for the cause in "
                "what the environment returns"
            )
        action = logits.argmax(-1) if greedy else _draw(logits, generator)
        timestep = environment.step(action)
        if on_step is not None:
            on_step(timestep)
        reward = timestep.reward if timestep.raw_reward is None else timestep.raw_reward
        restarted, ended = boundaries.observe(timestep)
        returns += np.where(restarted, 0.0, reward.double().cpu().numpy())
        lengths += ~restarted
        num_counted = 0
        for row in np.flatnonzero(ended):
            if len(finished[row]) < quota[row]:
                finished[row].append((float(returns[row]), int(lengths[row])))
                num_counted += 1
        returns[ended], lengths[ended] = 0.0, 0
        if num_counted and on_episodes is not None:
            on_episodes(num_counted)
    all_returns, all_lengths = (np.array(x) for x in zip(*(e for row in finished for e in row), strict=True))
    threshold = environment.spec.success_reward
    return Evaluation(all_returns, all_lengths, None if threshold is None else all_returns >= least_return(threshold))


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Actions [B] of the policy softmax(logits [B, A])."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


class _Boundaries:
    """Tells where episodes end. Where a step has `game_over` that is where games do: there a row is also `last` and `first` when a life
    is lost. Training counts its scores in the same way.
    """

    def __init__(self, num_envs: int):
        self._was_last = np.zeros(num_envs, bool)

    def observe(self, timestep: TimeStep) -> tuple[np.ndarray, np.ndarray]:
        """Called with every step after the reset.

        Returns:
            Rows [B] bool in which there was no transition, because a new episode starts after a LAST step; and rows whose
            episode is over.
        """
        first = timestep.first.cpu().numpy()
        game_over = timestep.game_over
        last = (timestep.last if game_over is None else game_over).cpu().numpy()
        restarted = first & self._was_last
        ended = last if game_over is not None else last | (first & ~restarted)  # the latter with same-step autoreset
        self._was_last = last
        return restarted, ended


# Numbers


def summarize(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Mean, 95 % interval of the mean, standard deviation, median, minimum and maximum of returns and lengths.

    The interval of a mean is the percentile bootstrap (Efron 1979), that of the success rate Wilson's (1927), which does not
    shrink to nothing where all succeed. "success" has mean, low and high only, and is left out where there is no such notion.
    """
    summary = {"return": _describe(evaluation.returns), "length": _describe(evaluation.lengths)}
    if evaluation.successes is not None:
        low, high = wilson_interval(int(evaluation.successes.sum()), len(evaluation.successes))
        summary["success"] = {"mean": float(evaluation.successes.mean()), "low": low, "high": high}
    return summary


def _describe(values: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {
        "mean": float(values.mean()),
        "low": low,
        "high": high,
        "std": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of `values` [E]: percentiles of the means of resamples, with a fixed seed. NaN for E < 2."""
    if len(values) < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a probability of which `successes` of `trials` were seen (Wilson 1927)."""
    z, p = 1.959964, successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def format_summary(summary: dict[str, dict[str, float]]) -> str:
    """A table for people, without a last line break."""
    lines = [f"{'':8}{'mean':>9}  {'95 % interval':>20}{'std':>10}{'median':>10}{'min':>10}{'max':>10}"]
    for name in ("return", "length"):
        s = summary[name]
        # one episode has no spread
        interval = "-" if math.isnan(s["low"]) else f"{s['low']:.4g} to {s['high']:.4g}"
        std = "-" if math.isnan(s["std"]) else f"{s['std']:.4g}"
        cells = "".join(f"{s[key]:>10.4g}" for key in ("median", "min", "max"))
        lines.append(f"{name:8}{s['mean']:>9.4g}  {interval:>20}{std:>10}{cells}")
    if "success" in summary:
        s = summary["success"]
        interval = f"{100 * s['low']:.1f} to {100 * s['high']:.1f} %"
        lines.append(f"{'success':8}{100 * s['mean']:>7.1f} %  {interval:>20}")
    return "\n".join(lines)


# Video


def check_filmable(spec: EnvSpec, path: Path) -> None:
    """Raises ValueError, before any episode is played, unless observations are pictures and `path` can become a GIF.

    Raises:
        ImportError: if pillow is missing.
    """
    shape = spec.observation_shape
    if spec.observation_dtype != torch.uint8 or len(shape) != 3 or min(shape[1:]) < 36:
        raise ValueError(
            f"--video: found observations {shape}, {spec.observation_dtype}; allowed for images [C, Y, X] of at least 36 x 36 "
            "pixels, as Atari's; leave --video out"
        )
    if path.suffix.lower() != ".gif" or not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--video: found {path}; allowed the name of a .gif file in a folder that exists")
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("--video needs the package pillow: pip install -e '.[agents]'") from error


class Film:
    """Keeps what the first environment's agent sees in its first episode; pass `record` to `evaluate` as on_step.

    Attributes:
        frames: [Y, X] or [Y, X, 3] uint8 pictures, at most `MAX_VIDEO_FRAMES`.
    """

    def __init__(self, environment: Environment, *, is_stack: bool):
        """Starts empty.

        Args:
            environment: the one that is played.
            is_stack: whether the channels of an observation are successive frames, newest last, rather than colours.
        """
        self.is_stack = is_stack
        self.frames: list[np.ndarray] = []
        self._is_over = False
        self._boundaries = _Boundaries(environment.num_envs)

    def record(self, timestep: TimeStep) -> None:
        """Adds a frame until the episode is over."""
        if self._is_over or len(self.frames) >= MAX_VIDEO_FRAMES:
            return
        observation = timestep.observation
        if self.frames:
            self._is_over = bool(self._boundaries.observe(timestep)[1][0])
            if self._is_over and not timestep.last[0]:  # same-step autoreset already shows the next episode
                if timestep.final_observation is None:
                    return
                observation = timestep.final_observation
        self.frames.append(self._picture(observation[0]))

    def _picture(self, image: Tensor) -> np.ndarray:
        """[C, Y, X] to [Y, X], or [Y, X, 3] for three colours."""
        pixels = image.cpu().numpy()
        if len(pixels) == 3 and not self.is_stack:
            return np.moveaxis(pixels, 0, -1).copy()
        return pixels[-1].copy()

    def save(self, path: Path, *, frames_per_second: float) -> None:
        """Writes a GIF, scaled up without smoothing to at least 336 pixels in height."""
        save_gif(self.frames, path, frames_per_second=frames_per_second)


def save_gif(frames: Sequence[np.ndarray], path: Path, *, frames_per_second: float) -> None:
    """Writes uint8 pictures [Y, X] or [Y, X, 3] as an endless GIF, scaled up without smoothing to at least 336 rows."""
    from PIL import Image

    factor = max(1, math.ceil(336 / frames[0].shape[0]))
    images = [Image.fromarray(np.kron(f, _block(f, factor))) for f in frames]
    duration_ms = max(20, round(100 / frames_per_second) * 10)  # GIF counts in hundredths of a second
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration_ms, loop=0)


def _block(frame: np.ndarray, factor: int) -> np.ndarray:
    return np.ones((factor, factor, 1) if frame.ndim == 3 else (factor, factor), np.uint8)


def result_dict(policy: Policy, evaluation: Evaluation, **settings: Any) -> dict[str, Any]:
    """Everything about an evaluation as plain values, for a JSON file; NaN is None."""

    def plain(value: float) -> float | None:
        return None if math.isnan(value) else value

    summary = {name: {k: plain(v) for k, v in part.items()} for name, part in summarize(evaluation).items()}
    return {
        "environment": policy.config.env.id,
        "environment_kwargs": policy.config.env.kwargs,
        "step": policy.step,
        "episodes": len(evaluation.returns),
        **settings,
        **summary,
        "returns": evaluation.returns.tolist(),
        "lengths": evaluation.lengths.tolist(),
    }
