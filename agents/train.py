"""The training run: build, act, learn, log, checkpoint, resume. `scripts/train.py` is the command around it."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from agents.build import build_critic, build_environment, build_interfaces, build_model, spread_seeds
from agents.checkpoint import CHECKPOINT_FILE, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from agents.config import CONFIG_FILE, TrainConfig, from_dict, require_device, save_config, to_dict
from agents.credit import credit_figure, measure_credit
from agents.learner import Learner
from agents.metrics import MetricsWriter
from agents.rollout import Actor

_log = logging.getLogger(__name__)

_RATIOS = ("/explained_variance", "/cosine", "/norm_ratio")  # without a target gradient they have no meaning


class NonFiniteError(RuntimeError):
    """Something became NaN or infinite; the run stopped and its last good checkpoint stands."""


class Trainer:
    """Everything of a run that changes while it runs, and one update of it.

    Args:
        config: the resolved configuration.

    Raises:
        ValueError: if environment, device or a combination of settings does not exist.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.device = require_device(config.run.device)
        torch.set_num_threads(config.run.threads)
        env_seed, model_seed, actor_seed, learner_seed = spread_seeds(config.run.seed, 4)
        torch.manual_seed(model_seed)
        self.environment = build_environment(config.env, env_seed, self.device)
        spec, algorithm = self.environment.spec, config.algorithm
        model = build_model(config.model, spec).to(self.device)
        critic = build_critic(config.critic, model, spec)
        self.learner = Learner(
            model,
            None if critic is None else critic.to(self.device),
            algorithm,
            config.critic,
            num_envs=config.env.num_envs,
            seed=learner_seed,
            interfaces=[critic.to(self.device) for critic in build_interfaces(config.critic, model)],
        )
        self.actor = Actor(
            self.environment,
            model,
            rollout_length=algorithm.rollout_length,
            bptt_horizon=config.window_length,
            seed=actor_seed,
        )
        self.steps_per_update = config.env.num_envs * algorithm.rollout_length
        self.means = _RunningMeans()  # of the learner's scalars, since the last line of metrics
        self.step = 0  # agent steps so far, all environments together

    def update(self) -> dict[str, Tensor]:
        """Collects a rollout and learns from it. Returns scalars, still on the device."""
        self.learner.set_progress(min(1.0, self.step / self.config.run.total_steps))
        rollout = self.actor.collect()
        metrics = self.learner.update(rollout)
        self.means.add(metrics)
        self.step += self.steps_per_update
        return metrics

    def first_non_finite(self, metrics: dict[str, Tensor], *, thorough: bool = False) -> str | None:
        """Names the first tensor, in the order in which data flows, that holds NaN or infinity; None if all are finite.

        Args:
            metrics: what `update` returned. Measures of fit do not count: they are ratios, of which one may be undefined for
                a moment.
            thorough: look at everything else as well where the metrics are finite.
        """
        watched = {
            name: metrics[name]
            for name in metrics
            if name.startswith(("losses/", "sg/")) and not name.endswith(_RATIOS)
        }
        are_finite = all(math.isfinite(float(value)) for value in watched.values())
        if are_finite and not thorough:
            return None
        flow: list[tuple[str, Tensor | None]] = []
        if self.actor.rollout is not None:
            names = ("observation", "context", "reward", "discount", "logits", "value", "final_value")
            flow += [(f"rollout.{name}", getattr(self.actor.rollout, name)) for name in names]
        flow += list(watched.items())
        sides: dict[str, nn.Module | None] = {"model": self.learner.model, "critic": self.learner.critic}
        sides |= {f"interface_{level}": critic for level, critic in enumerate(self.learner.interfaces, 1)}
        for side, module in sides.items():
            if module is not None:
                flow += [(f"{side}.{name}", p) for name, p in module.named_parameters()]
        for name, tensor in flow:
            if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return name
        return None if are_finite else "metrics"

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly, the configuration included."""
        return {
            "config": to_dict(self.config),
            "learner": self.learner.state_dict(),
            "actor": self.actor.state_dict(),
            "means": self.means.state_dict(),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`, with the "step" that the checkpoint adds."""
        self.learner.load_state_dict(state["learner"])
        self.actor.load_state_dict(state["actor"])
        self.means.load_state_dict(state["means"])
        set_rng_state(state["rng"])
        self.step = state["step"]

    def close(self) -> None:
        """Frees the environments."""
        self.environment.close()


def run_directory(config: TrainConfig) -> Path:
    """The folder of a run: output_dir / name, the name made of environment, method and seed unless given."""
    name = config.run.name
    if name is None:
        env_id = config.env.id.replace("/", "-").replace(":", "-")
        core = "" if config.model.core == "lstm" else f"{config.model.core}_"
        name = f"{env_id}_{core}{config.critic.kind}_k{config.algorithm.bptt_horizon}_seed{config.run.seed}"
    return Path(config.run.output_dir) / name


def train(config: TrainConfig, resume: Path | None = None) -> Path:
    """Trains until `total_steps`, or until Ctrl-C, and leaves config, metrics and checkpoints in the run's folder.

    Args:
        config: the resolved configuration.
        resume: folder (or checkpoint file) of a run to continue, or None.

    Returns:
        The run's folder.

    Raises:
        ValueError: if the configuration cannot be built, the folder is taken, or the checkpoint is unusable.
        NonFiniteError: if a loss became NaN or infinite.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written; its message says where.
    """
    directory = run_directory(config)
    checkpoint = None
    if resume is not None:
        checkpoint = load_checkpoint(resume)
        directory = resume if resume.is_dir() else resume.parent
        try:
            saved = from_dict(checkpoint["config"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _foreign(resume, error) from error
        _check_resumable(config, saved)
    trainer = Trainer(config)
    try:
        if checkpoint is not None:
            try:
                trainer.load_state_dict(checkpoint)
            except (KeyError, TypeError, RuntimeError) as error:
                raise _foreign(resume, error) from error
            if not trainer.environment.resumable:
                _log.warning(
                    "%s: emulator state cannot be saved; new episodes start at step %d", config.env.id, trainer.step
                )
        run = config.run
        with (
            MetricsWriter(
                directory,
                total_steps=run.total_steps,
                resume_step=None if checkpoint is None else trainer.step,
                tensorboard=run.tensorboard,
                progress=run.progress,
                hyperparameters=to_dict(config),
            ) as writer,
            _interruptible() as interrupted,
        ):
            save_config(config, directory / CONFIG_FILE)
            if checkpoint is None and run.credit_every_steps is not None:
                # what the core can do before it has learned; and what cannot be measured is found out at once
                writer.write(trainer.step, _credit(trainer, writer))
            _loop(trainer, writer, directory, interrupted)
        if interrupted and trainer.step < run.total_steps:
            raise KeyboardInterrupt(
                f"a checkpoint of step {trainer.step} was saved; continue with --resume {directory}"
            )
    finally:
        trainer.close()
    return directory


def _loop(trainer: Trainer, writer: MetricsWriter, directory: Path, interrupted: list[int]) -> None:
    run, algorithm = trainer.config.run, trainer.config.algorithm
    started, start_step, saved_step = time.perf_counter(), trainer.step, None
    # Reading a scalar of every update is free on a CPU and a synchronisation on a GPU.
    check_every_update = trainer.device.type == "cpu"
    while trainer.step < run.total_steps and not interrupted:
        before = trainer.step
        metrics = trainer.update()
        logs = _passes(before, trainer.step, run.log_every_steps) or trainer.step >= run.total_steps
        measures = run.credit_every_steps is not None and (
            _passes(before, trainer.step, run.credit_every_steps) or trainer.step >= run.total_steps
        )
        saves = _passes(before, trainer.step, run.checkpoint_every_steps)
        saves = saves or trainer.step >= run.total_steps or bool(interrupted)
        if check_every_update or logs or measures or saves:
            _require_finite(trainer, trainer.first_non_finite(metrics, thorough=saves), directory)
        row: dict[str, float | Tensor] = {}
        if logs:
            row = (
                trainer.means.pop()
                | trainer.actor.statistics.pop()
                | {
                    "charts/SPS": (trainer.step - start_step) / (time.perf_counter() - started),
                    "charts/learning_rate": trainer.learner.optimizer.param_groups[0]["lr"],
                    "bptt/horizon": algorithm.bptt_horizon,
                }
            )
        if measures:
            paused = time.perf_counter()
            row |= _credit(trainer, writer)
            started += time.perf_counter() - paused
        if row:
            writer.write(trainer.step, row)
        if saves:
            save_checkpoint(directory, trainer.state_dict(), trainer.step)
            writer.flush()
            saved_step = trainer.step
    if interrupted and saved_step != trainer.step:  # the signal came between two updates
        _require_finite(trainer, trainer.first_non_finite({}, thorough=True), directory)
        save_checkpoint(directory, trainer.state_dict(), trainer.step)


def _credit(trainer: Trainer, writer: MetricsWriter) -> dict[str, Tensor]:
    """Measures the credit horizon as the agent is now. Returns its scalars; the curves go to TensorBoard at once."""
    horizon = measure_credit(trainer.config, trainer.learner)
    if writer.has_tensorboard:
        writer.write_figure(trainer.step, "credit/curves", credit_figure([("delivered", horizon)]))
        for name, norm in (("delivered", horizon.delivered_norm), ("true", horizon.true_norm)):
            writer.write_histogram(trainer.step, f"credit/{name}_by_lag", norm)
    return horizon.scalars()


def _require_finite(trainer: Trainer, culprit: str | None, directory: Path) -> None:
    if culprit is not None:
        stands = f"the last good checkpoint in {directory} stands"
        raise NonFiniteError(
            f"{culprit}: NaN or infinity at step {trainer.step}; stopped, "
            f"{stands if (directory / CHECKPOINT_FILE).exists() else 'before the first checkpoint'}; "
            "lower algorithm.learning_rate, or bound the synthetic gradient with critic.max_norm_ratio"
        )


class _RunningMeans:
    """Means of scalars since the last log line, kept on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def pop(self) -> dict[str, float | Tensor]:
        means: dict[str, float | Tensor] = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]


def _passes(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def _foreign(resume: Path | None, error: Exception) -> ValueError:
    """The error for a sound checkpoint that holds something else; on one line, which those of PyTorch are not."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(
        f"{resume}: found a checkpoint of another program or version, or of another environment ({reason}); allowed one of "
        "this very run; start a new run instead"
    )


def _check_resumable(config: TrainConfig, saved: TrainConfig) -> None:
    """What a resumed run may change: how long it is and what it writes. Everything else is another experiment."""
    free = {
        name: getattr(config.run, name)
        for name in (
            "total_steps",
            "device",
            "threads",
            "output_dir",
            "name",
            "log_every_steps",
            "checkpoint_every_steps",
            "credit_every_steps",
            "credit_length",
            "credit_num_envs",
            "tensorboard",
            "progress",
        )
    }
    if replace(saved, run=replace(saved.run, **free)) != config:
        old, new = to_dict(replace(saved, run=replace(saved.run, **free))), to_dict(config)
        key = next(f"{s}.{k}" for s in new for k in new[s] if new[s][k] != old[s][k])
        section, field = key.split(".")
        raise ValueError(
            f"{key}: found {new[section][field]!r}; allowed {old[section][field]!r}, as in the run to resume; start a new run instead"
        )


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Lets the first Ctrl-C (or SIGTERM) end the loop after the update in flight; the second one acts as usual."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: signals are somebody else's business
        previous.clear()
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
