"""The training run: build, act, learn, log, checkpoint, resume. `scripts/train.py` is the command around it."""

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from torch import Tensor

from agents.build import build_critic, build_environment, build_interfaces, build_model, seed_global_generators
from agents.checkpoint import load_checkpoint, restoring, rng_state, save_checkpoint, set_rng_state
from agents.config import CONFIG_FILE, TrainConfig, from_dict, require_device, save_config, to_dict
from agents.credit import check_credit, credit_figure, measure_credit
from agents.learner import COSINE, Learner
from agents.metrics import MetricsWriter
from agents.parallel import ALONE, SilentWriter, Workers
from agents.rollout import Actor
from dni_rl.critics import explained_variance, norm_ratio
from dni_rl.files import hold_run

_log = logging.getLogger(__name__)

_NO_RUN_ID = "none"  # torchrun's name for every run that was given neither --rdzv-id nor --standalone
# Fields of a rollout, in the order in which data flows.
_FROM_ENVIRONMENT = ("observation", "context", "reward", "discount")
_FROM_MODEL = ("logits", "value", "final_value")


class NonFiniteError(RuntimeError):
    """Something became NaN or infinite; the run stopped and its last good checkpoint stands."""


class Trainer:
    """Everything of a run that changes while it runs, and one update of it.

    Args:
        config: the resolved configuration.
        workers: the processes that train together, each with environments of its own.

    Raises:
        ValueError: if environment, device or a combination of settings does not exist.
    """

    def __init__(self, config: TrainConfig, workers: Workers = ALONE):
        self.config, self.workers = config, workers
        self.device = workers.device(require_device(config.run.device))
        torch.set_num_threads(config.run.threads)
        # Of models, and of the global random generators behind them; a model then becomes that of the first process.
        env_seed, model_seed, actor_seed, learner_seed = workers.spread_seeds(config.run.seed, 4)
        seed_global_generators(model_seed)
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
            workers=workers,
        )
        self.actor = Actor(
            self.environment,
            model,
            rollout_length=algorithm.rollout_length,
            bptt_horizon=config.window_length,
            seed=actor_seed,
        )
        self.steps_per_update = workers.count * config.env.num_envs * algorithm.rollout_length
        self.means = _RunningMeans()  # of the learner's scalars, since the last line of metrics
        self.stopwatch = _Stopwatch()
        self.step = 0  # agent steps so far, all environments of all processes together

    def update(self) -> dict[str, Tensor]:
        """Collects a rollout and learns from it. Returns scalars, still on the device."""
        self.learner.set_progress(min(1.0, self.step / self.config.run.total_steps))
        rollout = self.actor.collect()
        metrics = self.learner.update(rollout)
        self.means.add(metrics)
        self.step += self.steps_per_update
        self.stopwatch.steps += self.steps_per_update
        return metrics

    def first_non_finite(self, metrics: dict[str, Tensor], *, thorough: bool = False) -> str | None:
        """Names the first tensor, in the order in which data flows, that holds NaN or infinity; None if all are finite.

        Args:
            metrics: what `update` returned. Cosines do not count: one may be undefined for a moment.
            thorough: look at all that a checkpoint keeps of the learner as well where the metrics are finite.
        """
        watched = {
            name: metrics[name] for name in metrics if name.startswith(("losses/", "sg/")) and not name.endswith(COSINE)
        }
        are_finite = all(math.isfinite(float(value)) for value in watched.values())
        if are_finite and not thorough:
            return None
        flow: dict[str, Any] = {}
        if self.actor.rollout is not None:
            flow |= {
                f"rollout.{name}": getattr(self.actor.rollout, name) for name in (*_FROM_ENVIRONMENT, *_FROM_MODEL)
            }
        learned = self.learner.state_dict()
        flow |= watched | {name: learned[name] for name in ("model", "critic")} | learned
        for name, tensor in _tensors(flow):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return name
        return None if are_finite else "metrics"

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly, the configuration included; in the first process that of all, by rank.

        The others wait for it, and have to call this too.
        """
        own = {"actor": self.actor.state_dict(), "means": self.means.state_dict(), "rng": rng_state()}
        others = self.workers.others(own | {"learner": self.learner.own_state_dict()})
        state = {
            "config": to_dict(self.config),
            "learner": self.learner.state_dict(),
            "stopwatch": self.stopwatch.state_dict(),
            **own,
        }
        if others:
            state["others"] = others
        if self.workers.launch is not None:
            state["launch"] = self.workers.launch
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict` of as many processes, with the "step" that the checkpoint adds.

        Environments that cannot be saved are built anew, with another seed for each step: with that of the run they would start again
        with the episodes of step 0.
        """
        own = state if self.workers.is_first else state["others"][self.workers.rank - 1]
        if state["step"] and not self.environment.resumable:
            (env_seed,) = self.workers.spread_seeds(self.config.run.seed, 1, step=state["step"])
            self.environment.close()
            self.environment = self.actor.environment = build_environment(self.config.env, env_seed, self.device)
        self.learner.load_state_dict(state["learner"] | own["learner"])
        self.actor.load_state_dict(own["actor"])
        self.means.load_state_dict(own["means"])
        set_rng_state(own["rng"])
        if "stopwatch" in state:  # older checkpoints have none
            self.stopwatch.load_state_dict(state["stopwatch"])
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


def train(config: TrainConfig, resume: Path | None = None, workers: Workers = ALONE) -> Path:
    """Trains until `total_steps`, or until Ctrl-C, and leaves config, metrics and checkpoints in the run's folder.

    Args:
        config: the resolved configuration.
        resume: folder (or checkpoint file) of a run to continue, or None. Processes that torchrun has restarted continue from
            what they had saved, in any case.
        workers: the processes that train together, from `agents.parallel.connect`. The first one writes.

    Returns:
        The run's folder.

    Raises:
        ValueError: if the configuration cannot be built, the folder is taken or cannot be written, or the checkpoint is unusable, that
            of another number of processes or of another experiment included; after a restart also if torchrun was given nothing to
            tell this run by.
        NonFiniteError: if a loss became NaN or infinite.
        RuntimeError: from a ValueError while it trains, such as one that an environment raises.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written; its message says where.
    """
    _check_workers(config, workers)
    directory = run_directory(config) if resume is None else resume if resume.is_dir() else resume.parent
    # from before its checkpoint is read, since a process that still writes there may be about to save a newer one
    with (hold_run(directory) if workers.is_first and directory.is_dir() else None) or nullcontext() as lock:
        _train(config, resume, directory, workers, lock)
    return directory


def _train(config: TrainConfig, resume: Path | None, directory: Path, workers: Workers, lock: IO[bytes] | None) -> None:
    checkpoint = workers.from_first(partial(_checkpoint_to_continue, resume, directory, workers))
    if checkpoint is not None:
        with restoring(resume or directory):
            saved = from_dict(checkpoint["config"])
        _check_resumable(config, saved)
        _check_length(config, saved, checkpoint["step"])
        _check_place(config, saved, directory)
        _check_count(workers, 1 + len(checkpoint.get("others", ())))
    trainer = Trainer(config, workers)
    try:
        if checkpoint is not None:
            with restoring(resume or directory):
                trainer.load_state_dict(checkpoint)
            if not trainer.environment.resumable:
                _log.warning(
                    "%s: the state of this environment cannot be saved; new episodes start at step %d",
                    config.env.id,
                    trainer.step,
                )
        run = config.run
        if run.credit_every_steps is not None:
            check_credit(config, trainer.environment.spec)  # here, where nothing has been written yet
        with (
            _writer(trainer, directory, None if checkpoint is None else trainer.step, lock) as writer,
            _interruptible() as interrupted,
        ):
            if resume != directory:
                # Whatever happens before the first one of the schedule, the run can be resumed, also where it goes on from an older
                # checkpoint than the folder's; and by it a restart finds out that this folder is its own.
                _save(trainer, writer, directory)
            if checkpoint is None and run.credit_every_steps is not None:
                # what the core can do before it has learned
                writer.write(trainer.step, _credit(trainer, writer))
            try:
                was_stopped = _loop(trainer, writer, directory, interrupted)
            except ValueError as error:  # no bad setting any more, but a fault in the program or the environment
                raise RuntimeError(f"step {trainer.step}: {error}") from error
        if was_stopped and trainer.step < run.total_steps:
            raise KeyboardInterrupt(
                f"a checkpoint of step {trainer.step} was saved; continue with --resume {directory}"
            )
    finally:
        trainer.close()


def _loop(trainer: Trainer, writer: MetricsWriter | SilentWriter, directory: Path, interrupted: Sequence[int]) -> bool:
    """Returns whether it was stopped. Whatever depends on more than the number of steps, all processes decide together."""
    run, workers = trainer.config.run, trainer.workers
    saved_step = None
    # Reading a scalar of every update is free on a CPU and a synchronisation on a GPU.
    check_every_update = trainer.device.type == "cpu"
    metrics: dict[str, Tensor] = {}
    (stops,) = workers.any(bool(interrupted))
    trainer.stopwatch.go()
    while trainer.step < run.total_steps and not stops:
        before = trainer.step
        metrics = trainer.update()
        # No line less than half an interval before the end: the last one would be of a few episodes, and is taken for the result.
        rest = run.total_steps - trainer.step
        logs = rest <= 0 or (_passes(before, trainer.step, run.log_every_steps) and rest >= run.log_every_steps / 2)
        measures = run.credit_every_steps is not None and (
            _passes(before, trainer.step, run.credit_every_steps) or trainer.step >= run.total_steps
        )
        saves = _passes(before, trainer.step, run.checkpoint_every_steps) or trainer.step >= run.total_steps
        culprit = None
        if check_every_update or logs or measures or saves:
            culprit = trainer.first_non_finite(metrics, thorough=saves)
        stops = _agree(trainer, directory, culprit, interrupted)
        row: dict[str, float | Tensor] = {}
        if logs:
            row = (
                _with_ratios(workers.means(trainer.means.pop()))
                | workers.means(trainer.actor.statistics.pop(), "charts/episodes")
                | {
                    "charts/SPS": trainer.stopwatch.speed(),
                    "charts/learning_rate": trainer.learner.optimizer.param_groups[0]["lr"],
                    "charts/entropy_cost": trainer.learner.entropy_cost,
                    "bptt/horizon": trainer.config.window_length,  # in steps, as the credit horizons beside it
                }
            )
        if measures:
            trainer.stopwatch.pause()
            row |= _credit(trainer, writer)
            trainer.stopwatch.go()
        if row:
            writer.write(trainer.step, row)
        if saves:
            _save(trainer, writer, directory)
            saved_step = trainer.step
        if logs or measures or saves:  # which takes time, in which a signal may have come
            stops |= workers.any(bool(interrupted))[0]
    if stops and saved_step != trainer.step:
        _agree(trainer, directory, trainer.first_non_finite(metrics, thorough=True))
        _save(trainer, writer, directory)
    return stops


def _writer(
    trainer: Trainer, directory: Path, resume_step: int | None, lock: IO[bytes] | None
) -> MetricsWriter | SilentWriter:
    if not trainer.workers.is_first:
        return SilentWriter()
    config = trainer.config
    hyperparameters = to_dict(config)
    if trainer.workers.count > 1:
        hyperparameters["processes"] = {"count": trainer.workers.count}
    try:
        writer = MetricsWriter(
            directory,
            total_steps=config.run.total_steps,
            resume_step=resume_step,
            tensorboard=config.run.tensorboard,
            progress=config.run.progress,
            hyperparameters=hyperparameters,
            lock=lock,
        )
        save_config(config, directory / CONFIG_FILE)
    except OSError as error:
        name = "run.output_dir" if resume_step is None else "--resume"
        raise ValueError(
            f"{name}: found {directory}, which cannot be made or written ({error.strerror or error}); allowed a folder that can; "
            f"set --{name.lstrip('-')} to one"
        ) from error
    return writer


def _save(trainer: Trainer, writer: MetricsWriter | SilentWriter, directory: Path) -> None:
    state = trainer.state_dict()
    if trainer.workers.is_first:
        save_checkpoint(directory, state, trainer.step)
        writer.flush()


def _credit(trainer: Trainer, writer: MetricsWriter | SilentWriter) -> dict[str, Tensor]:
    """Measures the credit horizon as the agent is now. Returns its scalars; the curves go to TensorBoard at once."""
    if not trainer.workers.is_first:
        return {}  # the others would find the same
    horizon = measure_credit(trainer.config, trainer.learner)
    if writer.has_tensorboard:
        writer.write_figure(trainer.step, "credit/curves", credit_figure([("delivered", horizon)]))
        for name, norm in (("delivered", horizon.delivered_norm), ("true", horizon.true_norm)):
            writer.write_histogram(trainer.step, f"credit/{name}_by_lag", norm)
    return horizon.scalars()


def _agree(trainer: Trainer, directory: Path, culprit: str | None, interrupted: Sequence[int] = ()) -> bool:
    """Whether any process was interrupted; NonFiniteError in all of them if any has found a culprit."""
    stops, is_spoiled = trainer.workers.any(bool(interrupted), culprit is not None)
    if is_spoiled:
        # What one process acted on spoils the gradients of all: the cause is where it came in.
        culprits = [(name, rank) for rank, name in enumerate(trainer.workers.all(culprit)) if name is not None]
        name, rank = min(culprits, key=lambda found: not found[0].startswith("rollout."))
        way_out = _way_out(name, trainer.config)
        if trainer.workers.count > 1 and name.startswith("rollout."):
            name = f"{name} of process {rank}"
        raise NonFiniteError(
            f"{name}: NaN or infinity at step {trainer.step}; stopped, the last good checkpoint in {directory} stands; {way_out}"
        )
    return stops


def _way_out(culprit: str, config: TrainConfig) -> str:
    """What may help against numbers that are not finite, by where they came in."""
    if culprit in [f"rollout.{name}" for name in _FROM_ENVIRONMENT]:
        return f"the environment returned it, so look for the cause in {config.env.id}"
    has_bound = config.critic.predicts and config.critic.kind != "bp_lambda"
    bound = ", or bound the synthetic gradient with a (smaller) critic.max_norm_ratio" if has_bound else ""
    return f"lower algorithm.learning_rate{bound}"


class _RunningMeans:
    """Means of scalars since the last log line, kept on the device; each over the updates that had it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int | Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            has_value: int | Tensor = 1
            if name.endswith(COSINE):
                has_value, value = ~value.isnan(), value.nan_to_num(nan=0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + has_value

    def pop(self) -> dict[str, float | Tensor]:
        means: dict[str, float | Tensor] = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class _Stopwatch:
    """Steps of training and their seconds, those before a resume included, and what it is paused for left out."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._since: float | None = None

    def go(self) -> None:
        """Starts, or ends a pause."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stands still until `go`."""
        self.seconds, self._since = self._read(), None

    def speed(self) -> float:
        """Steps per second so far."""
        return self.steps / self._read()

    def _read(self) -> float:
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "seconds": self._read()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.seconds = state["steps"], state["seconds"]


def _with_ratios(means: dict[str, Any]) -> dict[str, Any]:
    """The critics' measures as they are shown: ratios of means, since that of a window whose targets are nearly zero has no bound."""
    shown = dict(means)
    if (
        "losses/value_target" in shown
    ):  # which a rest of means that a checkpoint of an earlier version has kept is without
        bias, mean, square = (
            torch.as_tensor(shown.pop(f"losses/value_{name}")) for name in ("error", "target", "target_squared")
        )
        error = 2.0 * torch.as_tensor(shown["losses/value_loss"]) - bias.square()
        shown["losses/explained_variance"] = explained_variance(error, square - mean.square())
    for group in [name.removesuffix("/error") for name in means if name.endswith("/error")]:
        error, variance = (torch.as_tensor(shown.pop(f"{group}/{name}")) for name in ("error", "target_variance"))
        shown[f"{group}/explained_variance"] = explained_variance(error, variance)
    if "sg/predicted_norm" in shown:
        predicted, target = torch.as_tensor(shown.pop("sg/predicted_norm")), torch.as_tensor(shown["sg/target_norm"])
        shown["sg/norm_ratio"] = norm_ratio(predicted, target)
    return shown


def _tensors(values: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, lists and tuples, with their dotted names."""
    if isinstance(values, Tensor):
        yield name, values
    elif isinstance(values, dict | list | tuple):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _passes(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def _checkpoint_to_continue(resume: Path | None, directory: Path, workers: Workers) -> dict[str, Any] | None:
    """After a restart what the same run has saved; otherwise that of `resume`, or None for a new run."""
    if workers.restarted and workers.launch == _NO_RUN_ID:
        raise ValueError(
            f"torchrun: found a restart of a run without an id, which cannot tell whether {directory} is its own; allowed restarts with "
            f"--standalone, or with an --rdzv-id that no other run has; to go on from what is there, start again with --resume {directory}"
        )
    if workers.restarted:
        try:
            state = load_checkpoint(directory)
        except ValueError:  # it had not come so far, or the folder was refused to it; the writer will tell
            state = {}
        if state.get("launch") == workers.launch:
            return state
    return None if resume is None else load_checkpoint(resume)


def _check_workers(config: TrainConfig, workers: Workers) -> None:
    if workers.count == 1:
        return
    if config.critic.kind == "bp_lambda":
        raise ValueError(
            f"critic.kind: found 'bp_lambda' in {workers.count} processes; allowed every other kind; its traces weigh sequences within "
            "one process, so train in one"
        )
    needed = workers.count * config.env.num_envs * config.algorithm.rollout_length
    if config.run.total_steps < needed:
        raise ValueError(
            f"run.total_steps: found {config.run.total_steps}; allowed at least one rollout of each of {workers.count} processes, {needed} "
            "(processes x env.num_envs x algorithm.rollout_length); train longer, or with fewer environments"
        )


def _check_count(workers: Workers, saved: int) -> None:
    """Another number of processes is another batch size, and environments for which no state was saved."""
    if workers.count != saved:
        way_out = f"use torchrun --standalone --nproc-per-node {saved}" if saved > 1 else "leave torchrun out"
        raise ValueError(
            f"processes: found {workers.count}; allowed {saved}, as in the run to resume; {way_out}, or start a new run"
        )


def _check_resumable(config: TrainConfig, saved: TrainConfig) -> None:
    """What a resumed run may change: how long it is and what it writes. Everything else is another experiment.

    Where it runs it may change among GPUs, but not between GPU and CPU, whose random generators have nothing in common.
    """
    old_type, new_type = (torch.device(each.run.device).type for each in (saved, config))
    if new_type != old_type:
        raise ValueError(
            f"run.device: found {config.run.device!r}; allowed {old_type}, as in the run to resume, because the states of its random "
            f"generators fit no other kind of device; set --run.device {saved.run.device}, or start a new run"
        )
    # How it runs may change, what it computes may not.
    allowed = replace(saved, run=replace(config.run, seed=saved.run.seed))
    if allowed != config:
        old, new = to_dict(allowed), to_dict(config)
        key = next(f"{s}.{k}" for s in new for k in new[s] if new[s][k] != old[s][k])
        section, field = key.split(".")
        raise ValueError(
            f"{key}: found {new[section][field]!r}; allowed {old[section][field]!r}, as in the run to resume; start a new run instead"
        )


def _check_length(config: TrainConfig, saved: TrainConfig, step: int) -> None:
    """A run may be made longer, or end earlier. Not where its rates fall with its length: they would rise again, or end too high."""
    run = config.run
    if run.total_steps == saved.run.total_steps:
        return
    if run.total_steps < step:
        raise ValueError(
            f"run.total_steps: found {run.total_steps}; allowed at least {step}, the step of the checkpoint to resume; leave it out, or "
            "train longer"
        )
    annealed = [name for name in ("anneal_learning_rate", "anneal_entropy") if getattr(config.algorithm, name)]
    if annealed:
        raise ValueError(
            f"run.total_steps: found {run.total_steps}; allowed {saved.run.total_steps}, as in the run to resume, by whose length its "
            f"rates fall (algorithm.{annealed[0]}); leave it out, or start a new run, which can be made longer with "
            f"{' and '.join(f'--algorithm.{name} false' for name in annealed)}"
        )


def _check_place(config: TrainConfig, saved: TrainConfig, directory: Path) -> None:
    """A resumed run goes on in its folder. That may have been moved since: only what was set anew has to fit."""
    there = directory.resolve()
    for name, fits in (
        ("output_dir", Path(config.run.output_dir).resolve() == there.parent),
        ("name", run_directory(config).name == there.name),
    ):
        if getattr(config.run, name) != getattr(saved.run, name) and not fits:
            raise ValueError(
                f"run.{name}: found {getattr(config.run, name)!r}; allowed that of {directory}, where the run to resume goes on; leave "
                "it out, or start a new run"
            )


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Lets the first Ctrl-C, SIGTERM or SIGHUP end the loop after the update in flight, unless it is ignored, as SIGHUP is under
    nohup; the second one acts as usual."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: signals are somebody else's business
        previous.clear()
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
