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
results.json and table.md in the run's folder are written after every run; `--resume` skips those that are done.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dni_rl import data
from dni_rl.distributed import Batch, ProcessError, connect, fail, launch, train_pipeline
from dni_rl.experiments import common, images

RESULTS_FILE, TABLE_FILE = "results.json", "table.md"


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
    learning_rate: float = 3e-5
    learning_rate_drop_steps: tuple[int, ...] = (300_000, 400_000)
    threads: tuple[int, ...] = (
        1,
    )  # of the locked run in one process, one run for each; all others have one thread a process
    timeout_sec: float = 300.0  # for a message between processes
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        common.check_allowed(self, arm=("dni", "cdni"), schedule=("free", "fixed"))
        if any(bound < 0 for bound in self.staleness_bounds):
            raise ValueError(f"staleness_bounds: found {self.staleness_bounds}, allowed 0 or more")
        if any(threads < 1 for threads in self.threads):
            raise ValueError(f"threads: found {self.threads}, allowed 1 or more")
        if not self.timeout_sec > 0:
            raise ValueError(f"timeout_sec: found {self.timeout_sec}, allowed above 0")
        if any(not 0.0 < probability <= 1.0 for probability in self.update_probabilities):
            raise ValueError(f"update_probabilities: found {self.update_probabilities}, allowed above 0 to 1")
        self.net(self.arm)  # checks the rest

    def net(self, arm: str, **settings: Any) -> images.ImagesConfig:
        """The settings of a run in one process."""
        shared = {f.name for f in dataclasses.fields(images.ImagesConfig)} & {f.name for f in dataclasses.fields(self)}
        own = {name: getattr(self, name) for name in shared - {"arm", "unlocked"}}
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
    },
    # minutes on two cores
    "laptop": {
        "num_steps": 6_000,
        "learning_rate": 1e-3,
        "learning_rate_drop_steps": (4_000, 5_000),
    },
    "paper": {},
}


def make_config(preset: str, **overrides: Any) -> AsynchronousConfig:
    """A preset with settings replaced; the paper's critic for plain DNI where neither says otherwise."""
    settings = {**PRESETS[preset], **overrides}
    if preset != "smoke" and settings.get("arm") == "dni":
        settings.setdefault("critic_hidden_sizes", (1024, 1024))
    return AsynchronousConfig(**settings)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of the table.

    Attributes:
        arm: "backprop" or the config's.
        processes: 1, or one for each layer.
        max_staleness: with processes and without locking; otherwise None.
        update_probability: of each layer at each step.
        unlocked: whether layers compute on synthetic inputs.
        threads: of each process.
    """

    arm: str
    processes: int = 1
    max_staleness: int | None = None
    update_probability: float = 1.0
    unlocked: bool = False
    threads: int = 1

    def __str__(self) -> str:
        parts = [self.arm, "1 process" if self.processes == 1 else f"{self.processes} processes"]
        if self.max_staleness is not None:
            parts.append(f"staleness up to {self.max_staleness}")
        if self.update_probability != 1.0:
            parts.append(f"p = {self.update_probability:g}")
        if self.unlocked:
            parts.append("unlocked")
        if self.threads != 1:
            parts.append(f"{self.threads} threads")
        return ", ".join(parts)


def runs(config: AsynchronousConfig) -> list[Run]:
    """All of a config, those in one process first."""
    L = config.num_layers
    return [
        *[Run(arm="backprop", threads=threads) for threads in config.threads if config.backprop],
        *[Run(arm=config.arm, update_probability=p) for p in config.update_probabilities],
        *([Run(arm=config.arm, unlocked=True)] if config.unlocked else []),
        *([Run(arm="backprop", processes=L)] if config.backprop else []),
        *[Run(arm=config.arm, processes=L, max_staleness=bound) for bound in config.staleness_bounds],
    ]


# One process


def run_in_one_process(config: AsynchronousConfig, run: Run) -> dict[str, Any]:
    """Trains and tests; returns a row of the results."""
    train, test = images.load(config.dataset, "train"), images.load(config.dataset, "test")
    of_net = config.net(run.arm, update_probability=run.update_probability, unlocked=run.unlocked)
    batches = images.Batches(train, config.batch_size, config.seed, config.device)
    experiment = images.Experiment(of_net, train.images[0].numel())
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        start, start_cpu, losses = time.monotonic(), time.process_time(), []
        for step in range(config.num_steps):
            losses.append(experiment.update(step, *batches[step])["train/loss"].detach())
        last_losses = torch.stack(losses[-100:]).tolist()  # waits for the device
        seconds, cpu_sec = time.monotonic() - start, time.process_time() - start_cpu
        error = experiment.test_error(data.Images(test.images.to(config.device), test.labels.to(config.device)))
    finally:
        torch.set_num_threads(threads)
    return row(run, config, seconds, [cpu_sec], error, last_losses)


# Processes


def run_in_processes(config: AsynchronousConfig, todo: Sequence[Run], folder: Path) -> None:
    """What each of the processes does; that of the lowest layer tests the net and writes the results."""
    test = images.load(config.dataset, "test")
    with connect(config.device, timeout_sec=config.timeout_sec) as processes:
        if processes.rank == 0:
            batches = images.Batches(
                images.load(config.dataset, "train"), config.batch_size, config.seed, str(processes.device)
            )
        for run in todo:
            of_net = config.net(run.arm, device=str(processes.device))
            experiment = images.Experiment(of_net, test.images[0].numel())

            def set_learning_rates(step: int, experiment: images.Experiment = experiment) -> None:
                drops = sum(step >= drop for drop in config.learning_rate_drop_steps)
                for optimizer in experiment.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = config.learning_rate * 0.1**drops

            processes.barrier()  # so that no one's clock runs while another still builds its net
            reports = train_pipeline(
                experiment.net,
                processes,
                with_context(batches, config.num_steps, run.arm) if processes.rank == 0 else (),
                cross_entropy,
                max_staleness=run.max_staleness or 0,
                schedule="fixed" if config.schedule == "fixed" else "free",
                before_update=set_learning_rates,
            )
            if reports is None:
                continue
            where = processes.device
            error = experiment.test_error(data.Images(test.images.to(where), test.labels.to(where)))
            seconds = max(report.seconds for report in reports)
            cpu_sec = [report.cpu_sec for report in reports]
            result = row(run, config, seconds, cpu_sec, error, reports[-1].losses[-100:])
            result["mean_staleness"] = [report.mean_staleness for report in reports[:-1]]
            result["highest_staleness"] = [report.max_staleness for report in reports[:-1]]
            result["staleness_counts"] = [report.staleness for report in reports[:-1]]
            result["waiting_share"] = [report.waiting_sec / report.seconds for report in reports]
            result["blocked_share"] = [report.blocked_sec / report.seconds for report in reports]
            if run.max_staleness is not None:
                result["cosine_at_the_end"] = [_mean(report.cosines[-100:]) for report in reports[:-1]]
            add_result(folder, run, result)


def with_context(batches: images.Batches, num_steps: int, arm: str) -> Iterator[Batch]:
    """Batches for `train_pipeline`, with one-hot labels for critics that are conditioned."""
    for step in range(num_steps):
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
    last_losses: Sequence[float],
) -> dict[str, Any]:
    """What every run reports."""
    return {
        **dataclasses.asdict(run),
        "num_steps": config.num_steps,
        "seconds": seconds,
        "updates_per_sec": config.num_steps / seconds,
        "cpu_ms_per_update": [1000.0 * sec / config.num_steps for sec in cpu_sec],  # of each process
        "test_error": error,
        "train_loss_at_the_end": _mean(last_losses),
    }


def add_result(folder: Path, run: Run, result: Mapping[str, Any]) -> None:
    """Adds a row to results.json and draws table.md anew."""
    results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    results["runs"][str(run)] = dict(result)
    common.write_json(folder / RESULTS_FILE, results)
    (folder / TABLE_FILE).write_text(table(results) + "\n", encoding="utf-8")
    print(
        f"{run}: test error {result['test_error']:.2%}, {result['updates_per_sec']:.1f} updates/s",
        file=sys.stderr,
        flush=True,
    )


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""

    def shown(values: Sequence[float] | None, digits: int = 2) -> str | None:
        return None if values is None else " / ".join(f"{value:.{digits}f}" for value in values)

    rows = [
        (
            name,
            f"{100 * result['test_error']:.2f}",
            f"{result['updates_per_sec']:.1f}",
            shown(result["cpu_ms_per_update"], 1),
            shown(result.get("mean_staleness")),
            shown(result.get("highest_staleness"), 0),
            shown(result.get("blocked_share")),
            shown(result.get("waiting_share")),
            shown(result.get("cosine_at_the_end")),
        )
        for name, result in results["runs"].items()
    ]
    header = (
        "run",
        "test error, %",
        "updates/s",
        "CPU ms per update",
        "mean staleness",
        "highest",
        "blocked share",
        "idle share",
        "cosine",
    )
    return common.markdown(header, rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _start_results(config: AsynchronousConfig, folder: Path, resume: bool) -> list[Run]:
    """Opens the results of the folder; returns the runs that are still to be done."""
    path, settings = folder / RESULTS_FILE, json.loads(json.dumps(dataclasses.asdict(config)))
    done: Sequence[str] = ()
    if path.exists():
        if not resume:
            raise ValueError(
                f"{path}: results are there already; continue with --resume, or choose another --run-folder"
            )
        results = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(name for name in settings if results["config"].get(name) != settings[name])
        if different:
            raise ValueError(
                f"{path}: the runs there have other settings ({', '.join(different)}); choose another --run-folder"
            )
        done = results["runs"]
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
    parser.add_argument("--resume", action="store_true", help="skip runs that are done")
    common.add_settings(parser, AsynchronousConfig)
    settings = vars(parser.parse_args(arguments))
    preset, folder, resume = settings.pop("preset"), settings.pop("run_folder"), settings.pop("resume")
    is_a_process = "RANK" in os.environ and "WORLD_SIZE" in os.environ  # torchrun has started it
    rank = int(os.environ.get("RANK", 0))
    try:
        config = make_config(preset, **common.as_settings(settings))
        if is_a_process:
            # Every process decides alike what is to be done, from what rank 0 finds before any of them writes.
            todo = [run for run in runs(config) if run.processes > 1]
            if rank == 0:
                open_runs = _start_results(config, folder, resume)
                if any(run not in open_runs for run in todo):
                    raise ValueError(f"{folder}: some runs are done; under torchrun choose another --run-folder")
            run_in_processes(config, todo, folder)
        else:
            todo = _start_results(config, folder, resume)
            for run in todo:
                if run.processes == 1:
                    add_result(folder, run, run_in_one_process(config, run))
            together = [run for run in todo if run.processes > 1]
            if together:
                launch(run_in_processes, config.num_layers, config, together, folder, timeout_sec=7 * 24 * 3600.0)
    except (ValueError, data.DataError, ProcessError) as problem:
        if is_a_process:
            fail(f"asynchronous: {problem}")
        parser.exit(2, f"asynchronous: {problem}\n")
    if rank == 0:
        print((folder / TABLE_FILE).read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
