"""What the experiments share: a command line made of config fields, logs, checkpoints, progress, and matrices of runs.

A program has a frozen dataclass of settings, one function that carries out one run in a folder of its own, and presets. Runs of
one command are the members of a matrix, cells times seeds; a cell is an arm and a window, written "dni@5".
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import statistics
import sys
import threading
import time
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dni_rl import data
from dni_rl.files import hold_run, replace_file, write_text

CHECKPOINT_FILE = "checkpoint.pt"
RESULT_FILE = "result.json"
SUMMARY_FILE = "summary.json"
TABLE_FILE = "table.md"
FREE_FIELDS = ("num_steps", "device", "log_every_steps", "checkpoint_every_steps")  # what a resumed run may change
DIVERGED = "diverged"  # stands in tables for a score that is not finite


# Command line


def add_settings(parser: argparse.ArgumentParser, config_class: type, leave_out: Iterable[str] = ()) -> None:
    """Adds an option for every field of a config; what is not given stays out of the parsed namespace.

    Args:
        parser: to add to.
        config_class: a dataclass with fields of str, int, float, bool, tuples of those, and those or None.
        leave_out: fields that get no option.
    """
    for name, kind in typing.get_type_hints(config_class).items():
        option = f"--{name.rstrip('_').replace('_', '-')}"
        settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if name in leave_out:
            continue
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **settings)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(option, type=typing.get_args(kind)[0], nargs="*", **settings)
        elif isinstance(kind, types.UnionType):
            parser.add_argument(option, type=_or_none(typing.get_args(kind)[0]), **settings)
        else:
            parser.add_argument(option, type=kind, **settings)


def _or_none(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "none" else kind(text)

    parse.__name__ = f"{kind.__name__} or none"  # as argparse names it in its message
    return parse


def as_settings(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Parsed options as arguments of a config: lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in parsed.items()}


def check_allowed(config: Any, **allowed: Sequence[str]) -> None:
    """ValueError if a field of `config` is not one of the names that are allowed for it."""
    for name, names in allowed.items():
        if getattr(config, name) not in names:
            raise ValueError(f"{name}: found {getattr(config, name)!r}, allowed {', '.join(names)}")


def check_at_least(config: Any, least: int, *names: str) -> None:
    """ValueError if a field of `config` is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}: found {getattr(config, name)}, allowed {least} or more")


def check_critic(config: Any) -> None:
    """ValueError if a setting of critics is out of range.

    Of every arm, also of one without a critic: it would come up behind the first runs of a matrix otherwise.
    """
    if any(size < 1 for size in config.critic_hidden_sizes):
        found = " ".join(map(str, config.critic_hidden_sizes))
        raise ValueError(f"critic_hidden_sizes: found {found}, allowed positive sizes, or nothing for linear")
    for name in ("critic_scale", "warmup_updates", "auxiliary_cost"):
        if not getattr(config, name, 0) >= 0:
            raise ValueError(f"{name}: found {getattr(config, name)}, allowed 0 or more")
    if not 0.0 <= getattr(config, "gradient_discount", 1.0) <= 1.0:
        raise ValueError(f"gradient_discount: found {config.gradient_discount}, allowed 0 to 1")
    bound = getattr(config, "max_norm_ratio", None)
    if bound is not None and not bound > 0.0:
        raise ValueError(f"max_norm_ratio: found {bound}, allowed above 0, or none for no bound")


def by_step(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[Mapping[str, Any], ...]]:
    """The points [{"step": ...}, ...] of several curves, together where all have one; a run that was lengthened has one more."""
    of_runs = [{point["step"]: point for point in curve} for curve in curves]
    shared = set.intersection(*(set(points) for points in of_runs)) if of_runs else set()
    return [tuple(points[step] for points in of_runs) for step in sorted(shared)]


def check_each_once(**lists: Sequence[Any]) -> None:
    """ValueError if a list is empty, or has something twice."""
    for name, found in lists.items():
        if not found or len(set(found)) < len(found):
            raise ValueError(f"{name}: found {' '.join(map(str, found)) or 'none'}, allowed one or more, each once")


def check_seeds(seeds: Sequence[int]) -> None:
    """ValueError if there is no seed, or one is given twice or out of range."""
    check_each_once(seeds=seeds)
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds: found {seed}, allowed 0 to 2**32 - 1")


def check_device(name: str) -> None:
    """ValueError if this machine, or this build of PyTorch, lacks the device.

    Configs do not check it themselves, so that one of a run on another machine can be made here.
    """
    usable = ["cpu"]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        numbered = (f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))
        usable += [accelerator.type, *numbered]
    if name not in usable:
        raise ValueError(
            f"device: found {name!r}, which this machine lacks; allowed {', '.join(usable)}; use --device {usable[0]}"
        )


# Numbers that are not finite


def finite(value: Any) -> Any:
    """The same nest of dicts and lists with None in place of numbers that are not finite, which a run that diverged has, and JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def shown(value: float | None, digits: int, scale: float = 1.0) -> str:
    """A score as it stands in a table."""
    return DIVERGED if value is None or not math.isfinite(value) else f"{scale * value:.{digits}f}"


def mean(values: Iterable[float | None]) -> float | None:
    """Of numbers; None where there are none, or one of them is None or not finite, or their sum is too large for a float."""
    known = list(values)
    if not known or any(value is None or not math.isfinite(value) for value in known):
        return None
    try:
        return statistics.fmean(value for value in known if value is not None)
    except OverflowError:
        return None


# Learning


def set_learning_rates(
    optimizers: Iterable[torch.optim.Optimizer], rates: Iterable[float], drop_steps: Sequence[int], step: int
) -> None:
    """Sets each optimiser to its rate, divided by 10 at each of `drop_steps` that `step` has come to."""
    factor = 0.1 ** sum(step >= drop for drop in drop_steps)
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


class Clock:
    """Seconds of work on a device, between `start` and `stop`.

    An accelerator has been given work long before it is done, so whoever reads the clock, starts or stops it waits for the device; and
    nobody waits in between.

    Args:
        device: where the work is done.
        seconds: to go on from.
    """

    def __init__(self, device: str, seconds: float = 0.0):
        self._device, self._seconds = device, seconds
        self._started: float | None = None

    def start(self) -> None:
        """Lets it run, if it does not."""
        if self._started is None:
            self._wait()
            self._started = time.monotonic()

    def stop(self) -> None:
        """Holds it, once the device has done what it was given."""
        self._seconds, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """What it shows."""
        if self._started is None:
            return self._seconds
        self._wait()
        return self._seconds + time.monotonic() - self._started

    def _wait(self) -> None:
        if torch.device(self._device).type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self._device)


# Logs and checkpoints


class Log:
    """metrics.jsonl, one row a line, and TensorBoard; rows after `first_step`, from a run that was cut off, are dropped.

    Numbers that are not finite are null in metrics.jsonl. The folder should be held, see `held`.

    Raises:
        ValueError: if the rows up to `first_step` are missing or damaged, or TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool):
        path = folder / "metrics.jsonl"
        rows = "".join(_rows_until(first_step, path) if first_step else "")
        write_text(path, rows)
        self._events = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("tensorboard is not installed; install it, or use --no-tensorboard") from error
            self._events = SummaryWriter(str(folder), purge_step=first_step + 1)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row; `step` never decreases."""
        print(json.dumps(finite({"step": step, **metrics})), file=self._file, flush=True)
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """While it lasts, the folder, made if there is none, is this writer's alone.

    Raises:
        ValueError: if another process, or another writer of this one, holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with hold_run(folder) or contextlib.nullcontext():
        yield


def _rows_until(step: int, path: Path) -> Iterator[str]:
    """The lines of a metrics.jsonl up to `step`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise ValueError(
            f"{path}: found none that can be read, allowed the rows up to step {step}, which are continued; bring it back, or remove the "
            "checkpoint beside it to begin that run anew"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return  # of a run that was cut off while it wrote
        try:
            is_kept = json.loads(line)["step"] <= step
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: found text that is not a row of metrics; repair or remove it"
            ) from error
        if is_kept:
            yield line


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replaces the checkpoint as a whole: a run that is cut off here keeps the old one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getbuffer())


def load_checkpoint(path: Path, config: Any, *, resume: bool, free: Iterable[str] = ()) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote, or None where there is none.

    Args:
        path: of the checkpoint.
        config: a dataclass, of the run that is about to continue; the state has it as a dict under "config".
        resume: whether a checkpoint is wanted.
        free: fields of the config that may have changed.

    Raises:
        ValueError: if there is a checkpoint and none is wanted, it is damaged, or it is of a run with other settings.
    """
    if not path.exists():
        return None
    if not resume:
        raise ValueError(f"{path}: a run is there already; continue it with --resume, or choose another --run-folder")
    try:
        state = torch.load(path, map_location=config.device, weights_only=True)
        found = state["config"]
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: found no checkpoint that can be read; remove it to begin that run anew") from error
    found = {**defaults(config), **found}  # of a setting that the run is older than
    wanted = dataclasses.asdict(config)
    different = sorted(name for name in wanted if name not in free and found.get(name) != wanted[name])
    if different:
        changes = ", ".join(f"{name} {found.get(name)} -> {wanted[name]}" for name in different)
        raise ValueError(f"{path}: the run there has other settings ({changes}); choose another --run-folder")
    return state


def defaults(config: Any) -> dict[str, Any]:
    """Of a dataclass, those settings that have one: what a run that is older than a setting had."""
    return {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}


def write_json(path: Path, content: Any) -> None:
    """Writes a whole file or none."""
    write_text(path, json.dumps(content, indent=2) + "\n")


# Progress


class Progress:
    """One line on a terminal, rewritten in place; silent where stderr is none, and where it is not wanted.

    Args:
        label: stands at its start.
        total_steps: of the whole run.
        step: to start from.
        wanted: False to stay silent anyway.
    """

    def __init__(self, label: str, total_steps: int, step: int = 0, *, wanted: bool = True):
        self._shows = wanted and sys.stderr.isatty()
        self._label, self._total_steps, self._first_step = label, total_steps, step
        self._start_sec = time.monotonic()
        self._width = 0

    def show(self, step: int, note: str = "") -> None:
        """Draws the line at `step`, with a note behind it."""
        if not self._shows:
            return
        speed = (step - self._first_step) / max(time.monotonic() - self._start_sec, 1e-9)
        left_sec = round((self._total_steps - step) / speed) if speed > 0 else 0
        left = f"{left_sec // 60}:{left_sec % 60:02d} left"
        line = f"{self._label} {step / self._total_steps:4.0%} {speed:,.0f} steps/s {left} {note}"
        self._width = max(self._width, len(line))
        print(f"\r{line:<{self._width}}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self._shows and self._width:
            print(file=sys.stderr)


# One run


class Experiment(ABC):
    """A run in the making, as `carry_out` needs it.

    Attributes:
        config: its settings, a dataclass with `num_steps` and, unless `evaluation_is_due` is overridden, `eval_every_steps`.
        step: how far it has come.
        clock: runs while it is updated.
        curve: a point for every evaluation.
    """

    def __init__(self, config: Any):
        self.config = config
        self.step, self.clock = 0, Clock(config.device)
        self.curve: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        """That updates took so far, waiting for the device."""
        return self.clock.seconds

    @abstractmethod
    def update(self) -> dict[str, Tensor]:
        """Learns, moves `step` on, and returns metrics, still on the device."""

    def figures(self) -> dict[str, float]:
        """What else to log with the metrics."""
        return {}

    def evaluation_is_due(self, before: int) -> bool:
        """Whether to evaluate behind the update that began at step `before`."""
        return due(before, self.step, self.config.eval_every_steps, self.config.num_steps)

    def evaluation(self) -> dict[str, float]:
        """Evaluates, keeps what the result needs, and returns what to log."""
        return {}

    def add_to_curve(self, **found: Any) -> None:
        """Appends a point, with step and seconds."""
        self.curve.append({"step": self.step, "seconds": round(self.seconds, 3), **found})

    @abstractmethod
    def note(self) -> str:
        """A few words for the line of progress."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """What result.json holds; called at the end."""

    def account(self) -> dict[str, Any]:
        """What every result holds: steps, seconds and the curve."""
        return {"steps": self.step, "seconds": round(self.seconds, 3), "curve": self.curve}

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """What a resumed run needs, by name: objects with `state_dict` and `load_state_dict`, or None for what this run does not have."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "config": dataclasses.asdict(self.config),
            **{name: part.state_dict() for name, part in self.parts().items() if part is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.step, self.curve = state["step"], list(state["curve"])
        self.clock = Clock(self.config.device, state["seconds"])
        for name, part in self.parts().items():
            if part is not None:
                part.load_state_dict(state[name])


def carry_out(
    make_experiment: Callable[[Any], Experiment],
    config: Any,
    folder: Path,
    *,
    free: Iterable[str] = FREE_FIELDS,
    resume: bool = False,
    tensorboard: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Updates up to `config.num_steps`, logs, keeps a checkpoint, and writes the result.

    Each program's `run` is a partial of this one with `make_experiment` bound: unlike a lambda it can be passed to other processes.

    Args:
        make_experiment: called with the config once the folder is known to be free, or to hold the same run.
        config: the run: `num_steps`, `log_every_steps` and `checkpoint_every_steps`, and what the experiment needs.
        folder: for its files, made if missing.
        free: fields of the config that a resumed run may change.
        resume: continue from the folder's checkpoint, if it has one; more steps than before are allowed, and fewer if it has not come
            to as many yet.
        tensorboard: whether to write TensorBoard events as well.
        progress: whether to show a line of progress, on a terminal.

    Returns:
        The result, as in result.json; None in place of numbers that are not finite.

    Raises:
        ValueError: if the folder holds another run or a longer one, or another process writes there, the settings do not fit the data, or
            there is no such device.
        dni_rl.data.DataError: if the data cannot be had.
    """
    check_device(config.device)
    checkpoint, result_file = folder / CHECKPOINT_FILE, folder / RESULT_FILE
    state = load_checkpoint(checkpoint, config, resume=resume, free=free)
    if state is not None and state["step"] >= config.num_steps:
        _check_length(folder, state, config.num_steps)
        if (done := _result_there(result_file, state["step"])) is not None:
            return done
    experiment = make_experiment(config)
    with held(folder):
        state = load_checkpoint(checkpoint, config, resume=resume, free=free)  # again, now that no one else writes it
        if state is not None:
            experiment.load_state_dict(state)
        write_json(folder / "config.json", dataclasses.asdict(config))
        _update(experiment, folder, tensorboard, progress)
        result = finite(experiment.result())
        write_json(result_file, result)
    return result


def _result_there(file: Path, step: int) -> dict[str, Any] | None:
    """The result of a run that has come to `step`; None where the checkpoint has to tell: of this run when it was shorter, or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return finite(found) if isinstance(found, dict) and found.get("steps") == step else None


def _update(experiment: Experiment, folder: Path, tensorboard: bool, progress: bool) -> None:
    """Up to the end of the run."""
    config = experiment.config
    bar = Progress(folder.name, config.num_steps, experiment.step, wanted=progress)
    with Log(folder, experiment.step, tensorboard) as log:
        while experiment.step < config.num_steps:
            before = experiment.step
            experiment.clock.start()
            metrics = experiment.update()
            step = experiment.step
            logs = due(before, step, config.log_every_steps, config.num_steps)
            evaluates = experiment.evaluation_is_due(before)
            saves = due(before, step, config.checkpoint_every_steps, config.num_steps)
            if logs or evaluates or saves:
                experiment.clock.stop()
            if logs:
                log.write(step, {name: value.item() for name, value in metrics.items()} | experiment.figures())
                bar.show(step, experiment.note())
            if evaluates and (evaluation := experiment.evaluation()):
                log.write(step, evaluation)
            if saves:
                save_checkpoint(folder / CHECKPOINT_FILE, experiment.state_dict())
    bar.close()


def _check_length(folder: Path, state: Mapping[str, Any], num_steps: int) -> None:
    """ValueError if a run has come further than a run of so many steps, which the last update may have taken beyond them, would have."""
    there, aimed_at = state["step"], state["config"]["num_steps"]
    least = min(aimed_at, there + 1)
    if num_steps < least:
        raise ValueError(
            f"num_steps: found {num_steps}, but the run in {folder} has come to step {there} of {aimed_at}; allowed {least} or more, or "
            "choose another --run-folder"
        )


def due(before: int, step: int, every: int, total: int) -> bool:
    """Whether an update from `before` to `step` crossed a multiple of `every`, or reached the `total`."""
    return step // every > before // every or step >= total


# Matrices of runs


@dataclass(frozen=True)
class Cell:
    """What one row of a results table stands for.

    Attributes:
        arm: the method.
        window: T, in steps.
    """

    arm: str
    window: int

    def __str__(self) -> str:
        return f"{self.arm}@{self.window}"


def parse_cell(text: str) -> Cell:
    """ "dni@5" as a cell; ValueError if it is none."""
    arm, _, window = text.partition("@")
    if not arm or not window.isdecimal() or int(window) < 1:
        raise ValueError(f"cells: found {text!r}, allowed ARM@WINDOW, such as dni@5")
    return Cell(arm, int(window))


def grid(arms: Iterable[str], windows: Sequence[int]) -> tuple[str, ...]:
    """All cells of some arms and windows."""
    return tuple(str(Cell(arm, window)) for arm in arms for window in windows)


@dataclass(frozen=True)
class Member:
    """One run of a matrix.

    Attributes:
        name: of its folder, below that of the matrix.
        cell: which row it belongs to.
        config: its settings; a frozen dataclass with a field `seed`.
    """

    name: str
    cell: Cell
    config: Any


def members(
    make_config: Callable[..., Any],
    cells: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    of_arms: Mapping[str, Mapping[str, Any]] | None = None,
    given: Mapping[str, Any] | None = None,
) -> list[Member]:
    """All runs, seeds outermost, so that an interrupted matrix has the same number of seeds everywhere.

    Args:
        make_config: settings with arm, window and seed to a config.
        cells: as "arm@window".
        seeds: of each cell.
        settings: of all.
        of_arms: what an arm has otherwise, or one cell of it, by "arm" or "arm@window".
        given: what the user asked for, which comes before both.

    Raises:
        ValueError: if cells or seeds are missing, repeated or malformed, or a setting is out of range.
    """
    parsed = [parse_cell(cell) for cell in cells]
    check_each_once(cells=parsed)
    check_seeds(seeds)
    given, of_arms = given or {}, of_arms or {}
    matrix = []
    for seed in seeds:
        for cell in parsed:
            of_cell = {**of_arms.get(cell.arm, {}), **of_arms.get(f"{cell.arm}@{cell.window}", {})}
            of_run = {"arm": cell.arm, "window": cell.window, "seed": seed}
            config = make_config(**{**settings, **of_cell, **given, **of_run})
            matrix.append(Member(f"{cell.arm}-{cell.window}-seed{seed}", cell, config))
    return matrix


def run_members(
    run: Callable[..., dict[str, Any]],
    matrix: Sequence[Member],
    folder: Path,
    *,
    jobs: int = 1,
    resume: bool = False,
    tensorboard: bool = True,
) -> dict[str, dict[str, Any]]:
    """Carries out the runs, side by side in processes of one thread each where there is more than one job.

    When one fails or the user stops, and also when this process is killed, those processes end at once; `resume` goes on from their
    checkpoints.

    Args:
        run: (config, folder, resume=, tensorboard=, progress=) -> result; a function of a module.
        matrix: the runs.
        folder: of the matrix.
        jobs: how many at a time.
        resume: continue what was cut off, and skip what is done.
        tensorboard: whether to write TensorBoard events.

    Returns:
        The results, by name of the member.

    Raises:
        ValueError: if jobs is below 1, there is no such device, or a run is there already and resume is False.
        ChildProcessError: if one of the processes was killed, for example where memory ran out.
    """
    if jobs < 1:
        raise ValueError(f"jobs: found {jobs}, allowed 1 or more")
    for device in dict.fromkeys(member.config.device for member in matrix):
        check_device(device)
    if not resume:
        for member in matrix:
            load_checkpoint(folder / member.name / CHECKPOINT_FILE, member.config, resume=False)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}

    def note(member: Member, result: dict[str, Any]) -> None:
        results[member.name] = result
        print(f"{len(results)} of {len(matrix)} runs done: {member.name}", file=sys.stderr)

    options = {"resume": resume, "tensorboard": tensorboard}
    if jobs == 1:
        for member in matrix:
            note(member, run(member.config, folder / member.name, **options, progress=True))
        return results
    # spawn: a fork of a process that has used torch's thread pools may hang
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker, initargs=(ours,))
    try:
        with pool, contextlib.ExitStack() as on_error:
            # Workers would otherwise carry out what is in their queue, long after "stopped" is printed.
            on_error.callback(theirs.close)
            futures = {
                pool.submit(run, member.config, folder / member.name, **options, progress=False): member
                for member in matrix
            }
            for future in concurrent.futures.as_completed(futures):
                note(futures[future], future.result())
            on_error.pop_all()
    except concurrent.futures.BrokenExecutor as error:
        left = [member.name for member in matrix if member.name not in results]
        raise ChildProcessError(
            f"a process was killed, perhaps for want of memory, during one of {', '.join(left[:jobs])}; "
            "continue with --resume, with fewer --jobs if memory ran out"
        ) from error
    finally:
        ours.close()
        theirs.close()
    return results


def _begin_worker(parent: multiprocessing.connection.Connection) -> None:
    """Of a process of a pool: one thread for PyTorch, and its end as soon as the parent closes the other end of the pipe, or dies.

    Nothing is lost with it but steps since the last checkpoint, which is written atomically.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says what to do

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent])
        os._exit(130)

    threading.Thread(target=end_with_parent, daemon=True).start()


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, sample standard deviation, least and greatest of one cell's seeds; None where any seed has no value."""
    average, known = mean(values), [value for value in values if value is not None]
    if average is None:
        return {"mean": None, "std": None, "min": None, "max": None}
    try:
        std = statistics.stdev(known) if len(known) > 1 else None
    except OverflowError:
        std = None
    return {"mean": average, "std": std, "min": min(known), "max": max(known)}


def by_cell(matrix: Sequence[Member], results: Mapping[str, dict[str, Any]]) -> dict[Cell, dict[int, dict[str, Any]]]:
    """Results by cell and seed, in the order of the matrix."""
    table: dict[Cell, dict[int, dict[str, Any]]] = {}
    for member in matrix:
        table.setdefault(member.cell, {})[member.config.seed] = results[member.name]
    return table


def reached(curve: Sequence[Mapping[str, Any]], name: str, level: float, against: str) -> float | None:
    """Where on an axis a curve first falls to `level`, on a straight line between its points; None if it never does, or nobody knows.

    Args:
        curve: points in their order, each with `name`, which may be None or not finite, and the axis, None where it is not known.
        name: of what falls.
        level: to fall to.
        against: the axis, for example "step".
    """
    before: Mapping[str, Any] | None = None
    for point in curve:
        if point[name] is None or not math.isfinite(point[name]):
            before = None
            continue
        if point[name] <= level:
            if before is None:
                return point[against]
            share = (before[name] - level) / (before[name] - point[name])
            if before[against] is None or point[against] is None:
                return None
            return before[against] + share * (point[against] - before[against])
        before = point
    return None


def final(curve: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """`mean` of `name` over the points in the last tenth of a curve's steps, of which the last one always is."""
    last = curve[-1]["step"]
    return mean(point[name] for point in curve if point["step"] > 0.9 * last)


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; None is shown as a dash, floats with three digits after the point, very large ones with as many in all."""

    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) >= 1e9 else f"{value:.3f}".rstrip("0").rstrip(".")
        return "-" if value is None else str(value)

    lines = [list(header), ["---"] * len(header), *[[show(value) for value in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Programs


@dataclass(frozen=True)
class Plan:
    """What a command line asks of a program.

    Attributes:
        option: the values of `matrix_parser`'s options and of the program's own.
        matrix: the runs.
        jobs: how many at a time where `option.jobs` is None.
        more: further arguments of the program's `summarize`.
    """

    option: argparse.Namespace
    matrix: list[Member]
    jobs: int = 1
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def main(
    name: str,
    plan: Callable[[Sequence[str] | None], Plan],
    run: Callable[..., dict[str, Any]],
    summarize: Callable[..., dict[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    arguments: Sequence[str] | None = None,
    *,
    draw: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> None:
    """Carries out the matrix that a command line asks for, writes summary.json and prints its table.

    Args:
        name: of the program.
        plan: arguments -> what they ask for; ValueError if a setting is wrong.
        run: see `run_members`.
        summarize: (matrix, results, **more) -> what summary.json holds.
        table: the summary as Markdown.
        arguments: of the command line; None for those of the process.
        draw: puts figures beside the summary, with Matplotlib, unless --no-figures is given; such a program writes table.md, too.
    """
    with one_line_errors(name):
        asked = plan(arguments)
        option, folder = asked.option, asked.option.run_folder
        draws = draw is not None and option.figures
        if draws and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("matplotlib is not installed; install it, or use --no-figures")
        jobs = asked.jobs if option.jobs is None else option.jobs
        results = run_members(
            run, asked.matrix, folder, jobs=jobs, resume=option.resume, tensorboard=option.tensorboard
        )
        summary = {"preset": option.preset, **summarize(asked.matrix, results, **asked.more)}
        summary["configs"] = {member.name: dataclasses.asdict(member.config) for member in asked.matrix}
        write_json(folder / SUMMARY_FILE, summary)
        if draw is not None and draws:
            draw(json.loads(json.dumps(summary)), folder)
    shown = table(summary)
    if draw is not None:
        write_text(folder / TABLE_FILE, shown + "\n")
    print(shown)


def cells_plan(
    name: str,
    description: str | None,
    config_class: type,
    presets: Mapping[str, Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
    *,
    more_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """What a command line asks of a program whose matrix is cells times seeds.

    Args:
        name: of the program.
        description: its first line is shown by --help.
        config_class: of one run; `arm`, `window` and `seed` come from the matrix, every other field is an option.
        presets: settings by name, with "cells" and "seeds", and optionally "jobs" and "arms", see `members`.
        arguments: of the command line; None for those of the process.
        more_options: of `summarize`, by name, with their settings for `ArgumentParser.add_argument`.

    Raises:
        ValueError: see `members`.
    """
    parser = matrix_parser(name, description, presets)
    parser.add_argument("--cells", nargs="*", metavar="ARM@WINDOW", help="arms and windows; by default the preset's")
    more = more_options or {}
    for key, how in more.items():
        parser.add_argument(f"--{key.replace('_', '-')}", **how)
    option, given = parse(parser, arguments, config_class, leave_out=("arm", "window", "seed"))
    settings = dict(presets[option.preset])
    of_arms, jobs = settings.pop("arms", {}), settings.pop("jobs", 1)
    cells, seeds = settings.pop("cells"), settings.pop("seeds")
    cells, seeds = cells if option.cells is None else option.cells, seeds if option.seeds is None else option.seeds
    matrix = members(config_class, cells, seeds, settings, of_arms, given)
    return Plan(option, matrix, jobs, {key: getattr(option, key) for key in more})


def matrix_parser(name: str, description: str | None, presets: Iterable[str]) -> argparse.ArgumentParser:
    """The options of every program that runs a matrix; `seeds` and `jobs` are None where the preset's are wanted."""
    parser = argparse.ArgumentParser(
        prog=f"python -m dni_rl.experiments.{name}", description=(description or "").partition("\n")[0]
    )
    parser.add_argument("--preset", choices=list(presets), default="smoke")
    parser.add_argument("--seeds", type=int, nargs="*", help="by default the preset's")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at a time, of one thread each where there are several; by default the preset's, or 1",
    )
    parser.add_argument("--run-folder", type=Path, default=Path("runs") / name)
    parser.add_argument("--resume", action="store_true", help="continue what was cut off, skip what is done")
    parser.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=True)
    return parser


def parse(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    config_class: type,
    leave_out: Iterable[str] = (),
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Adds an option for every field of a config, see `add_settings`, and parses.

    Returns:
        The values of all options; and the settings that were given, as arguments of the config.
    """
    add_settings(parser, config_class, leave_out)
    option = parser.parse_args(arguments)
    fields = {field.name for field in dataclasses.fields(config_class)}
    return option, as_settings({name: value for name, value in vars(option).items() if name in fields})


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Ends the program `name` with one line where settings are wrong, data are missing, or the user stops it."""
    try:
        yield
    except (ValueError, OSError, data.DataError) as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; continue with --resume", file=sys.stderr)
        sys.exit(130)
