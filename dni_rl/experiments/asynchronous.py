"""Layers that learn when they like: in one process with a random draw, and in processes of their own with messages that are late.

python -m dni_rl.experiments.asynchronous --preset laptop --run-folder runs/asynchronous
torchrun --nproc-per-node 4 -m dni_rl.experiments.asynchronous --preset laptop --run-folder runs/asynchronous

Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients" (2017), sec. 3.1 and appendix, train a net
of four layers on MNIST whose layers learn in random order, each with probability p, or on synthetic inputs as well
("complete unlock"). That is simulated in one process, and compared with backpropagation. Then the same net is trained
by four real processes, a layer in each (`dni_rl.distributed`): with backward locking, which is backpropagation, and
without it, for several bounds on staleness. For each run: updates per second, processor time of each process, test
error, and how late gradients really were.

The command starts the processes itself; under torchrun it is one of them, and only the runs with processes are done.
results.json and table.md in the run's folder are written after every run, and each run has a folder of its own with metrics.jsonl and
TensorBoard events. `--resume` skips runs that are done and goes on from the checkpoint of one that was cut off. With processes there is
none in flight at a checkpoint: all gradients have come back, as at the end of the data.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dni_rl import data
from dni_rl.distributed import Batch, ProcessError, Processes, StageReport, connect, fail, launch, train_pipeline
from dni_rl.distributed.pipeline import on_host
from dni_rl.experiments import common, images
from dni_rl.files import write_text

RESULTS_FILE, TABLE_FILE = "results.json", "table.md"
NUM_LAST_LOSSES = 100  # whose mean is the training loss at the end
# What may change when runs are resumed.
FREE_FIELDS = ("log_every_steps", "eval_every_steps", "checkpoint_every_steps", "timeout_sec")


@dataclass(frozen=True, kw_only=True)
class AsynchronousConfig:
    """One set of runs. Defaults are the paper's, as far as it states them; staleness bounds are ours."""

    arm: str = "cdni"  # of the decoupled runs: "dni" or "cdni"
    dataset: str = "mnist"  # "synthetic" needs no files
    num_layers: int = 4  # and so many processes
    hidden_size: int = 256
    critic_hidden_sizes: tuple[int, ...] = ()
    staleness_bounds: tuple[int, ...] = (0, 1, 2, 4, 8)  # in batches; one run with processes for each
    schedule: str = (
        "free"  # "fixed": every gradient as late as the bound allows, for results that do not depend on the machine
    )
    update_probabilities: tuple[float, ...] = (1.0, 0.5, 0.2, 0.05)  # one run in one process for each
    unlocked: bool = True  # whether to do the run with synthetic inputs
    backprop: bool = True  # whether to do the locked runs
    batch_size: int = 256
    num_steps: int = 500_000
    learning_rate: float = 3e-5  # Adam, for layers
    backprop_learning_rate: float | None = None  # Adam, for layers of the locked runs; None for the same
    critic_learning_rate: float | None = None  # Adam, for critics; None for the same
    input_learning_rate: float | None = None  # Adam, for the models of synthetic inputs; None for that of the layers
    learning_rate_drop_steps: tuple[int, ...] = (300_000, 400_000)  # all are divided by 10 at each
    threads: tuple[int, ...] = (
        1,
    )  # of the locked run in one process, one run for each; all others have one thread a process
    timeout_sec: float = 300.0  # for a message between processes
    log_every_steps: int = 100
    eval_every_steps: int = 5_000  # of runs in one process; the others are tested at their end
    checkpoint_every_steps: int = 5_000  # runs with processes empty their pipeline there
    seeds: tuple[int, ...] = (0,)  # of every run
    device: str = "cpu"  # or "cuda", of which every process takes a GPU, if there are enough

    def __post_init__(self):
        common.check_allowed(self, arm=("dni", "cdni"), schedule=("free", "fixed"), device=("cpu", "cuda"))
        lists = {name: getattr(self, name) for name in ("staleness_bounds", "update_probabilities", "threads")}
        common.check_each_once(**{name: found for name, found in lists.items() if found})
        common.check_seeds(self.seeds)
        if any(bound < 0 for bound in self.staleness_bounds):
            raise ValueError(f"staleness_bounds: found {self.staleness_bounds}, allowed 0 or more")
        if any(threads < 1 for threads in self.threads):
            raise ValueError(f"threads: found {self.threads}, allowed 1 or more")
        if not self.timeout_sec > 0:
            raise ValueError(f"timeout_sec: found {self.timeout_sec}, allowed above 0")
        if any(not 0.0 < probability <= 1.0 for probability in self.update_probabilities):
            raise ValueError(f"update_probabilities: found {self.update_probabilities}, allowed above 0 to 1")
        if self.backprop_learning_rate is not None and not self.backprop_learning_rate > 0.0:
            raise ValueError(
                f"backprop_learning_rate: found {self.backprop_learning_rate}, allowed above 0, or none for learning_rate"
            )
        if not runs(self):
            raise ValueError(
                "update_probabilities, staleness_bounds: found none of either, nor unlocked, nor backprop, allowed one run or more; leave "
                "one of those options out"
            )
        self.net(self.arm)  # checks the rest

    def net(self, arm: str, **settings: Any) -> images.ImagesConfig:
        """The settings of a run in one process."""
        shared = {f.name for f in dataclasses.fields(images.ImagesConfig)} & {f.name for f in dataclasses.fields(self)}
        own = {name: getattr(self, name) for name in shared - {"arm", "unlocked"}}
        if arm == "backprop" and self.backprop_learning_rate is not None:
            own["learning_rate"] = self.backprop_learning_rate
        return images.ImagesConfig(**{**own, "arm": arm, **settings})


PRESETS: dict[str, dict[str, Any]] = {
    # seconds, needs no files: shows that the program runs
    "smoke": {
        "dataset": "synthetic",
        "num_layers": 3,
        "hidden_size": 32,
        "batch_size": 32,
        "num_steps": 100,
        "learning_rate": 1e-2,
        "learning_rate_drop_steps": (),
        "staleness_bounds": (0, 2),
        "update_probabilities": (0.5,),
        "timeout_sec": 30.0,
        "log_every_steps": 20,
        "eval_every_steps": 50,
        "checkpoint_every_steps": 50,
    },
    # Under half an hour on two cores. Lower probabilities want more steps: see `dni_rl.experiments.images`.
    "laptop": {
        "num_steps": 3_000,
        "learning_rate": 1e-3,
        "learning_rate_drop_steps": (2_000, 2_500),
        "staleness_bounds": (0, 2, 8),
        "update_probabilities": (1.0, 0.2),
        "eval_every_steps": 500,
        "checkpoint_every_steps": 500,
        "seeds": (0, 1, 2),
    },
    "paper": {"seeds": (0, 1, 2)},
}


def make_config(preset: str, **overrides: Any) -> AsynchronousConfig:
    """A preset with settings replaced; critics, and layers that they need, as in `dni_rl.experiments.images`.

    Where an arm wants slower layers than backpropagation, the locked runs keep the preset's rate.
    """
    arm = overrides.get("arm", AsynchronousConfig.arm)
    of_arm = images.PRESETS[preset].get("of_arms", {}).get(arm, {})
    settings = {**PRESETS[preset], **of_arm}
    if "learning_rate" in of_arm and "learning_rate" not in overrides:
        settings["backprop_learning_rate"] = PRESETS[preset]["learning_rate"]
    return AsynchronousConfig(**{**settings, **overrides})


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; those that differ in their seed alone are a row of the table.

    Attributes:
        arm: "backprop" or the config's.
        processes: 1, or one for each layer.
        max_staleness: with processes and without locking; otherwise None.
        update_probability: of each layer at each step.
        unlocked: whether layers compute on synthetic inputs.
        threads: of each process.
        seed: of all randomness.
    """

    arm: str
    processes: int = 1
    max_staleness: int | None = None
    update_probability: float = 1.0
    unlocked: bool = False
    threads: int = 1
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^a-z0-9.]+", "-", str(self))

    @property
    def label(self) -> str:
        """What it is, whatever its seed."""
        parts = [self.arm, "1 process" if self.processes == 1 else f"{self.processes} processes"]
        if self.max_staleness is not None:
            parts.append(f"staleness up to {self.max_staleness}")
        if self.update_probability != 1.0:
            parts.append(f"p = {self.update_probability}")
        if self.unlocked:
            parts.append("unlocked")
        if self.threads != 1:
            parts.append(f"{self.threads} threads")
        return ", ".join(parts)


def runs(config: AsynchronousConfig) -> list[Run]:
    """All of a config, those in one process first; of each kind, seeds outermost."""
    L = config.num_layers
    alone = [
        *[Run(arm="backprop", threads=threads) for threads in config.threads if config.backprop],
        *[Run(arm=config.arm, update_probability=p) for p in config.update_probabilities],
        *([Run(arm=config.arm, unlocked=True)] if config.unlocked else []),
    ]
    together = [
        *([Run(arm="backprop", processes=L)] if config.backprop else []),
        *[Run(arm=config.arm, processes=L, max_staleness=bound) for bound in config.staleness_bounds],
    ]
    return [dataclasses.replace(run, seed=seed) for kind in (alone, together) for seed in config.seeds for run in kind]


# One process


class _InOneProcess(images.Training):
    """A run that also tells its processor time, and its last losses."""

    def __init__(self, config: images.ImagesConfig):
        super().__init__(config)
        self.cpu_sec = 0.0
        self.losses: collections.deque[Tensor] = collections.deque(maxlen=NUM_LAST_LOSSES)

    def update(self) -> dict[str, Tensor]:
        started = time.process_time()
        metrics = super().update()
        self.cpu_sec += time.process_time() - started
        self.losses.append(metrics["train/loss"].detach())
        return metrics

    def result(self) -> dict[str, Any]:
        return {**super().result(), "cpu_sec": self.cpu_sec, "last_losses": torch.stack(list(self.losses)).tolist()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "cpu_sec": self.cpu_sec, "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.cpu_sec = state["cpu_sec"]
        self.losses.extend(state["losses"])


def run_in_one_process(config: AsynchronousConfig, run: Run, folder: Path, **how: Any) -> dict[str, Any]:
    """Trains and tests; returns a row of the results.

    Args:
        config: of all runs.
        run: which.
        folder: of all runs.
        how: to be carried out, see `common.carry_out`.
    """
    of_net = config.net(run.arm, update_probability=run.update_probability, unlocked=run.unlocked, seed=run.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        free = (*common.FREE_FIELDS, "eval_every_steps")
        result = common.carry_out(_InOneProcess, of_net, folder / run.folder, free=free, **how)
    finally:
        torch.set_num_threads(threads)
    return row(run, config, result["seconds"], [result["cpu_sec"]], result["error"], result["last_losses"])


# Processes


def run_in_processes(
    config: AsynchronousConfig,
    todo: Sequence[Run] | None,
    folder: Path,
    *,
    resume: bool = False,
    tensorboard: bool = True,
) -> None:
    """What each of the processes does; that of the lowest layer tests the net and writes the results.

    Args:
        config: of all runs.
        todo: runs; None for what the process of the lowest layer finds to be left, which it tells the others.
        folder: of all runs.
        resume: whether some may be done, where it has to find out.
        tensorboard: whether to write TensorBoard events.
    """
    with connect(config.device, timeout_sec=config.timeout_sec) as processes, contextlib.ExitStack() as whole:

        def left() -> list[Run]:
            whole.enter_context(common.held(folder))
            return [run for run in _start_results(config, folder, resume) if run.processes > 1]

        if todo is None:
            todo = _told(processes, left)
        where, lowest = processes.device, processes.rank == 0
        test = images.load(config.dataset, "test")
        for run in todo:
            with contextlib.ExitStack() as lock:
                reports, experiment = _train(config, run, folder / run.folder, processes, resume, lock)
                if lowest:
                    error = experiment.error(data.Images(test.images.to(where), test.labels.to(where)))
                    _log(folder / run.folder, reports, error, config.log_every_steps, tensorboard)
                    add_result(folder, run, row_of_processes(run, config, reports, error))


def _train(
    config: AsynchronousConfig,
    run: Run,
    folder: Path,
    processes: Processes,
    resume: bool,
    lock: contextlib.ExitStack,
) -> tuple[list[StageReport], images.Experiment]:
    """Trains from one checkpoint to the next; the reports, and all that was learned, are in the process of the lowest layer.

    That process holds the run's folder as long as `lock` does.
    """
    of_net = config.net(run.arm, device=str(processes.device), seed=run.seed)
    lowest, checkpoint = processes.rank == 0, folder / common.CHECKPOINT_FILE
    test = images.load(config.dataset, "test")
    experiment = images.Experiment(of_net, test.images[0].numel())

    def begun() -> Any:
        lock.enter_context(common.held(folder))
        free = (*FREE_FIELDS, "device")
        return on_host(common.load_checkpoint(checkpoint, of_net, resume=resume, free=free))

    saved = _told(processes, begun)
    step, reports = 0, list[StageReport]()
    if saved is not None:
        experiment.net.load_state_dict(saved["net"])
        step, reports = saved["step"], [StageReport(**report) for report in saved["reports"]]
    drawn: images.Batches | None = None
    if lowest:
        drawn = images.Batches(images.load(config.dataset, "train"), config.batch_size, run.seed, str(processes.device))
    bar = common.Progress(str(run), config.num_steps, step, wanted=lowest)
    while step < config.num_steps:
        processes.barrier()  # so that no one's clock runs while another still builds its net, or writes a checkpoint
        stop = min((step // config.checkpoint_every_steps + 1) * config.checkpoint_every_steps, config.num_steps)
        piece = train_pipeline(
            experiment.net,
            processes,
            iter(()) if drawn is None else with_context(drawn, range(step, stop), run.arm),
            cross_entropy,
            max_staleness=run.max_staleness or 0,
            schedule="fixed" if config.schedule == "fixed" else "free",
            before_update=functools.partial(_before_update, experiment, bar, config.log_every_steps, step),
        )
        step = stop
        if piece is None:
            continue
        before = [[report] for report in reports] or [[] for _ in piece]
        reports = [StageReport.joined([*old, new]) for old, new in zip(before, piece, strict=True)]
        state = {
            "step": step,
            "config": dataclasses.asdict(of_net),
            "net": experiment.net.state_dict(),
            "reports": [dataclasses.asdict(report) for report in reports],
        }
        common.save_checkpoint(checkpoint, state)
    bar.close()
    return reports, experiment


def _before_update(
    experiment: images.Experiment, bar: common.Progress, every: int, first_step: int, batch: int
) -> None:
    step = first_step + batch
    experiment.set_learning_rates(step)
    if step % every == 0:
        bar.show(step)


def _told(processes: Processes, find: Callable[[], Any]) -> Any:
    """What rank 0 finds; every process gets the same, or the same error."""
    told: list[Any] = [None, ""]
    if processes.rank == 0:
        try:
            told[0] = find()
        except ValueError as problem:
            told[1] = str(problem)
    try:
        dist.broadcast_object_list(told, src=0)
    except RuntimeError as error:
        raise ProcessError(
            f"process {processes.rank}: process 0 did not tell what is left; see what it said"
        ) from error
    if told[1]:
        raise ValueError(told[1])
    return told[0]


def _log(folder: Path, reports: Sequence[StageReport], error: float, every: int, tensorboard: bool) -> None:
    """What the processes measured, as the runs in one process log it; critics by the order in which gradients arrived."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = reports[-1].losses
    with common.Log(folder, 0, tensorboard) as log:
        for step in range(1, len(losses) + 1):
            if common.due(step - 1, step, every, len(losses)):
                cosines = {
                    f"critic_{i}/cosine": report.cosines[step - 1]
                    for i, report in enumerate(reports, start=1)
                    if len(report.cosines) >= step
                }
                log.write(step, {"train/loss": losses[step - 1], **cosines})
        log.write(len(losses), {"test/error": error})


def with_context(batches: images.Batches, steps: Iterable[int], arm: str) -> Iterator[Batch]:
    """Batches for `train_pipeline`, with one-hot labels for critics that are conditioned."""
    for step in steps:
        x, labels = batches[step]
        yield x, F.one_hot(labels, images.NUM_CLASSES) if arm == "cdni" else None, labels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[B], not reduced."""
    return F.cross_entropy(logits, labels, reduction="none")


# Results


def row(
    run: Run,
    config: AsynchronousConfig,
    seconds: float,
    cpu_sec: Sequence[float],
    error: float,
    last_losses: Sequence[float | None],
) -> dict[str, Any]:
    """What every run reports."""
    return {
        **dataclasses.asdict(run),
        "num_steps": config.num_steps,
        "seconds": seconds,
        "updates_per_sec": config.num_steps / seconds,
        "cpu_ms_per_update": [1000.0 * sec / config.num_steps for sec in cpu_sec],  # of each process
        "test_error": error,
        "train_loss_at_the_end": common.mean(last_losses),
    }


def row_of_processes(
    run: Run, config: AsynchronousConfig, reports: Sequence[StageReport], error: float
) -> dict[str, Any]:
    """What a run with processes reports, from the lowest layer; staleness is that of all layers but the highest."""
    seconds, last_losses = max(report.seconds for report in reports), reports[-1].losses[-NUM_LAST_LOSSES:]
    result = row(run, config, seconds, [report.cpu_sec for report in reports], error, last_losses)
    below = reports[:-1]
    result["mean_staleness"] = [report.mean_staleness for report in below]
    result["highest_staleness"] = [report.max_staleness for report in below]
    result["staleness_counts"] = [report.staleness for report in below]
    result["waiting_share"] = [report.waiting_sec / report.seconds for report in reports]
    result["blocked_share"] = [report.blocked_sec / report.seconds for report in reports]
    if run.max_staleness is not None:
        # a batch without a gradient, as all are that come before the critic above has one, has no cosine
        last = [report.cosines[-NUM_LAST_LOSSES:] for report in below]
        result["cosine_at_the_end"] = [common.mean(cosine for cosine in of if not math.isnan(cosine)) for of in last]
    return result


def add_result(folder: Path, run: Run, result: Mapping[str, Any]) -> None:
    """Adds a row to results.json and draws table.md anew."""
    results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    results["runs"][str(run)] = common.finite(result)
    common.write_json(folder / RESULTS_FILE, results)
    _write_table(folder)
    print(
        f"{run}: test error {result['test_error']:.2%}, {result['updates_per_sec']:.1f} updates/s",
        file=sys.stderr,
        flush=True,
    )


def _write_table(folder: Path) -> str:
    shown = table(json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")))
    write_text(folder / TABLE_FILE, shown + "\n")
    return shown


def by_label(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of runs that differ in their seed alone."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, result in results["runs"].items():
        found.setdefault(name.partition(", seed ")[0], []).append(result)
    return found


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: test errors by seed, all else as means over seeds."""

    def shown(found: Sequence[Mapping[str, Any]], name: str, digits: int = 2) -> str | None:
        """A number for each process."""
        if name not in found[0]:
            return None
        return " / ".join(
            common.shown(common.mean(seeds), digits) for seeds in zip(*(one[name] for one in found), strict=True)
        )

    rows = []
    for label, found in by_label(results).items():
        errors = [result["test_error"] for result in found]
        rows.append(
            (
                label,
                " ".join(common.shown(error, 2, 100.0) for error in errors),
                common.shown(common.mean(errors), 2, 100.0),
                common.shown(common.mean(result["updates_per_sec"] for result in found), 1),
                shown(found, "cpu_ms_per_update", 1),
                shown(found, "mean_staleness"),
                shown(found, "highest_staleness", 0),
                shown(found, "blocked_share"),
                shown(found, "waiting_share"),
                shown(found, "cosine_at_the_end"),
            )
        )
    header = (
        "run",
        "test error by seed, %",
        "mean",
        "updates/s",
        "CPU ms per update",
        "mean staleness",
        "highest",
        "blocked share",
        "idle share",
        "cosine",
    )
    return common.markdown(header, rows)


def _start_results(config: AsynchronousConfig, folder: Path, resume: bool) -> list[Run]:
    """Opens the results of the folder; returns the runs that are still to be done."""
    path, settings = folder / RESULTS_FILE, json.loads(json.dumps(dataclasses.asdict(config)))
    done: Sequence[str] = ()
    if path.exists():
        if not resume:
            raise ValueError(
                f"{path}: results are there already; continue with --resume, or choose another --run-folder"
            )
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            found, done = {**json.loads(json.dumps(common.defaults(config))), **results["config"]}, results["runs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: found no results that can be read; remove it, and --resume makes it anew from the runs' own folders"
            ) from error
        different = sorted(name for name in settings if name not in FREE_FIELDS and found.get(name) != settings[name])
        if different:
            raise ValueError(
                f"{path}: the runs there have other settings ({', '.join(different)}); choose another --run-folder"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
        common.write_json(path, {"config": settings, "machine": machine, "runs": {}})
    return [run for run in runs(config) if str(run) not in done]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: a preset, and every field of `AsynchronousConfig` to override it."""
    parser = argparse.ArgumentParser(
        prog="python -m dni_rl.experiments.asynchronous", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--run-folder", type=Path, default=Path("runs/asynchronous"))
    parser.add_argument("--resume", action="store_true", help="continue what was cut off, skip what is done")
    parser.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=True)
    common.add_settings(parser, AsynchronousConfig)
    settings = vars(parser.parse_args(arguments))
    preset, folder = settings.pop("preset"), settings.pop("run_folder")
    how = {"resume": settings.pop("resume"), "tensorboard": settings.pop("tensorboard")}
    is_a_process = "RANK" in os.environ and "WORLD_SIZE" in os.environ  # torchrun has started it
    try:
        config = make_config(preset, **common.as_settings(settings))
        common.check_device(config.device)
        if is_a_process:
            run_in_processes(config, None, folder, **how)
        else:
            with common.held(folder):
                todo = _start_results(config, folder, how["resume"])
                for run in todo:
                    if run.processes == 1:
                        add_result(folder, run, run_in_one_process(config, run, folder, **how))
                together = [run for run in todo if run.processes > 1]
                if together:
                    process = functools.partial(run_in_processes, **how)
                    launch(process, config.num_layers, config, together, folder, timeout_sec=7 * 24 * 3600.0)
    except (ValueError, OSError, data.DataError, ProcessError) as problem:
        if is_a_process:
            fail(f"asynchronous: {problem}")
        parser.exit(2, f"asynchronous: {problem}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nasynchronous: stopped; continue with --resume\n")
    if int(os.environ.get("RANK", 0)) == 0:
        print(_write_table(folder))


if __name__ == "__main__":
    main()
