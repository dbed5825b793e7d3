"""Runs a matrix of methods, windows, tasks and seeds, and writes a report (table, figures, JSON) and a TensorBoard board.

    python scripts/compare.py configs/compare/tmaze.yaml --jobs 2 --report docs/results/tmaze
    python scripts/compare.py configs/compare/tmaze.yaml --jobs 8 --devices cuda:0 cuda:1
    tensorboard --logdir runs/tmaze

Every member of the matrix is a process of `scripts/train.py`. What is done is skipped, what was interrupted is resumed from its last
checkpoint, and a member that fails is reported and does not stop the others. `--report-only` writes the report of what is there.

The matrix is a YAML file:

    title, config       of the page; a file of configs/ that all members start from
    metric, bar         what is compared, by its name in metrics.jsonl; the value from which on a task counts as solved
    seeds               a list
    tasks, methods      settings by name, as train.py's options without the dashes
    windows             optional: windows of truncated BPTT, as a list, or with settings of their own as a mapping. Each method is then
                        run at each of them as "<method>, window <K>", but for those that set algorithm.bptt_horizon themselves
    dial                optional: the task setting that says how far credit has to reach, or that number by task. It is the x-axis of
                        the board, and solved lengths are in its unit
    overrides           optional: settings of one "<method> / <task>"; null leaves it out

Statistics follow Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021): interquartile means
over finished seeds with 95 % percentile bootstrap intervals, over several tasks stratified by task, computed by scipy. Memory is the
largest resident set of the member's process, interpreter and PyTorch included; what it holds on a GPU is not in it.
"""

import argparse
import json
import math
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import bootstrap, trim_mean

from agents.checkpoint import CHECKPOINT_FILE
from agents.config import CONFIG_FILE, from_dict, load_config, to_dict
from agents.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = {"title", "config", "metric", "bar", "seeds", "tasks", "methods"}
OPTIONAL = {"windows", "dial", "overrides"}
WINDOW = "algorithm.bptt_horizon"
REACHES = 0.9  # of the dial: an expected horizon that long foretells success; see `foretelling`
RECORD_FILE = "compare.json"  # in a run's folder: what only this script knows of it
READING = "**Reading.**"  # what stands on a page from here on was written by hand, and stays
NUM_RESAMPLES = 9999
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Member:
    """One run of the matrix."""

    method: str
    task: str
    seed: int
    config: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Folder of the run."""
        return "_".join(_safe(part) for part in (self.method, self.task, f"seed{self.seed}"))

    @property
    def total_steps(self) -> int:
        """Length of the run in agent steps."""
        return int(self.settings["run.total_steps"])

    def resolved(self) -> dict[str, dict[str, Any]]:
        """The full configuration. ValueError if a setting is unknown or bad."""
        data = to_dict(load_config(ROOT / self.config))
        for name, value in {**self.settings, "run.seed": self.seed}.items():
            section, *inner, key = name.split(".")
            target = data.setdefault(section, {})
            for step in inner:
                target = target.setdefault(step, {})
            target[key] = value
        return to_dict(from_dict(data))


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean and its interval.

    Attributes:
        value: the mean of the middle half.
        low: lower end of the 95 % interval; None with fewer than two values in a stratum, which say nothing of their spread.
        high: upper end.
        n: number of values.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        interval = "no interval" if self.low is None else f"[{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.3f} {interval} n = {self.n}"


# The matrix


def load_matrix(path: Path) -> dict[str, Any]:
    """Reads the YAML file, with every window written out as a method and every dial as a number.

    Raises:
        SystemExit: with one line, if keys are unknown or missing, or say what cannot be.
    """
    matrix = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown, missing = set(matrix) - REQUIRED - OPTIONAL, REQUIRED - set(matrix)
    if unknown or missing:
        raise SystemExit(
            f"compare.py: {path}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}; allowed {sorted(REQUIRED | OPTIONAL)}"
        )
    matrix = {"windows": [], "dial": None, "overrides": {}, **matrix}
    for group in ("tasks", "methods"):  # a name without settings is one that changes nothing
        matrix[group] = {str(name): settings or {} for name, settings in matrix[group].items()}
    matrix["methods"] = _at_windows(matrix["methods"], matrix["windows"])
    try:
        matrix["dial_name"], matrix["dials"] = _dials(matrix["dial"], matrix["tasks"])
        pairs = [f"{method} / {task}" for method in matrix["methods"] for task in matrix["tasks"]]
        for pair in matrix["overrides"]:
            if pair not in pairs:
                raise ValueError(f"overrides: found {pair!r}; allowed '<method> / <task>' of those above")
    except ValueError as error:
        raise SystemExit(f"compare.py: {path}: {error}") from None
    return matrix


def _at_windows(methods: Mapping[str, dict[str, Any]], windows: Any) -> dict[str, dict[str, Any]]:
    """Each method at each window, but for those that bring a window of their own."""
    if not windows:
        return dict(methods)
    if not isinstance(windows, Mapping):
        windows = dict.fromkeys(windows)
    expanded: dict[str, dict[str, Any]] = {}
    for name, settings in methods.items():
        if WINDOW in settings:
            expanded[name] = settings
        else:
            for window, special in windows.items():
                expanded[f"{name}, window {window}"] = {WINDOW: window, **(special or {}), **settings}
    return expanded


def _dials(dial: Any, tasks: Mapping[str, dict[str, Any]]) -> tuple[str, dict[str, int]]:
    """The dial's name and its value by task; no values where there is no dial."""
    if dial is None:
        return "", {}
    if isinstance(dial, Mapping):
        name, values = "length", dict(dial)
    else:
        name, values = str(dial).rsplit(".", 1)[-1].replace("_", " "), {t: s.get(dial) for t, s in tasks.items()}
    if set(values) != set(tasks) or not all(type(value) is int and value >= 0 for value in values.values()):
        raise ValueError(
            f"dial: found {values}; allowed an integer for each of the tasks {list(tasks)}, or a setting that all of them have"
        )
    return name, {task: values[task] for task in tasks}


def members(matrix: dict[str, Any]) -> Iterator[Member]:
    """All runs, seeds outermost, so that an interrupted matrix has the same number of seeds everywhere."""
    for seed in matrix["seeds"]:
        for task, task_settings in matrix["tasks"].items():
            for method, method_settings in matrix["methods"].items():
                special = matrix["overrides"].get(f"{method} / {task}", {})
                if special is None:  # not to be run
                    continue
                yield Member(method, task, seed, matrix["config"], {**task_settings, **method_settings, **special})


# Running


def is_done(folder: Path, total_steps: int) -> bool:
    """Whether the run reached its last step."""
    try:
        return read_metrics(folder)[-1]["step"] >= total_steps
    except (ValueError, IndexError):
        return False


def made_with_other_settings(member: Member, runs: Path) -> str | None:
    """The first setting in which a run that exists is not the member of the matrix, in one line; None if there is none.

    How long it is, what it logs and on which device it ran make no other experiment, nor do settings of a critic that is not there.
    """
    try:
        now = member.resolved()
        then = to_dict(load_config(runs / member.name / CONFIG_FILE))
    except ValueError:  # no such run, or one whose settings train.py refuses
        return None
    for section in ("env", "model", "critic", "algorithm"):
        has_none = section == "critic" and now[section]["kind"] in ("none", "rtrl")
        for key in ("kind",) if has_none else now[section]:
            if now[section][key] != then[section][key]:
                return (
                    f"{section}.{key}: found a run with {then[section][key]!r}; allowed {now[section][key]!r}, as in the matrix; "
                    "remove its folder, or choose another with --runs"
                )
    return None


def run(member: Member, runs: Path, device: str | None = None, measure: bool = False) -> str | None:
    """Trains one member.

    Args:
        member: of the matrix.
        runs: folder of the runs.
        device: where to run it; None for the configuration's.
        measure: whether to measure its credit horizon afterwards, unless training did.

    Returns:
        None, or the reason why it failed in one line. It is also kept beside the run, with the memory that the process took.
    """
    folder = runs / member.name
    problem = made_with_other_settings(member, runs)
    if problem is None and not is_done(folder, member.total_steps):
        command = [sys.executable, str(ROOT / "scripts" / "train.py")]
        if (folder / CHECKPOINT_FILE).exists():
            command += ["--resume", str(folder), "--run.total_steps", str(member.total_steps)]
        else:
            (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            command += ["--config", str(ROOT / member.config), "--run.output_dir", str(runs), "--run.name", member.name]
            command += ["--run.seed", str(member.seed), "--run.progress", "false"]
            for key, value in member.settings.items():
                command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        if device is not None:
            command += ["--run.device", device]
        code, problem, memory = execute(command)
        record = read_record(folder)
        record["peak_memory_bytes"] = max(memory, record.get("peak_memory_bytes", 0))
        record["failure"] = None if code in (130, -2, -15) else problem  # an interrupted run has not failed
        write_record(folder, record)
    if problem is None and measure and "horizon" not in read_record(folder) and not _has_logged_horizons(folder):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "horizon.json"
            _, problem, _ = execute(
                [sys.executable, str(ROOT / "scripts" / "horizon.py"), str(folder), "--json", str(file)]
            )
            if problem is None:
                (measured,) = json.loads(file.read_text(encoding="utf-8"))
                write_record(folder, {**read_record(folder), "horizon": measured["horizon"]})
    return problem


def execute(command: Sequence[str]) -> tuple[int, str | None, int]:
    """Runs a command. Returns its exit code, None or the last line of its errors, and its largest resident set in bytes."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone, unlike RUSAGE_CHILDREN
        process.returncode = code = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return code, None if code == 0 else (lines or [f"exit code {code}"])[-1], memory


def read_record(folder: Path) -> dict[str, Any]:
    """What earlier calls of this script noted of a run; empty if nothing."""
    try:
        return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Notes something of a run, also of one that has left nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_FILE).write_text(json.dumps(dict(record)), encoding="utf-8")


def run_all(
    todo: Sequence[Member], runs: Path, *, jobs: int, devices: Sequence[str] | None, measure: bool
) -> dict[str, str]:
    """Runs members side by side, each job on the next free device. Returns the reasons of those that failed, by name.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the members in flight have saved their checkpoints.
    """
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for job in range(jobs):
        free.put(devices[job % len(devices)] if devices else None)

    def work(member: Member) -> str | None:
        device = free.get()  # as many as threads, so there always is one
        try:
            return run(member, runs, device, measure)
        finally:
            free.put(device)

    failures: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(work, member): member for member in todo}
        try:
            for number, future in enumerate(as_completed(pending), 1):
                name, problem = pending[future].name, future.result()
                print(f"{number} of {len(todo)}: {name}: {problem or 'done'}", file=sys.stderr, flush=True)
                if problem:
                    failures[name] = problem
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failures


# What came out


def collect(matrix: dict[str, Any], runs: Path) -> list[dict[str, Any]]:
    """What is there: one row per member that has begun, with its curve. Runs made with other settings are left out."""
    rows = []
    for member in members(matrix):
        folder = runs / member.name
        try:
            logged = read_metrics(folder)
        except ValueError:
            continue
        metrics = [row for row in logged if np.isfinite(row.get(matrix["metric"], np.nan))]
        if not metrics or made_with_other_settings(member, runs):
            continue
        record, horizons = read_record(folder), _measured(logged, "credit/horizon")
        steps, curve = [int(row["step"]) for row in metrics], [row[matrix["metric"]] for row in metrics]
        reached = next((s for s, x in zip(steps, curve, strict=True) if x >= matrix["bar"]), None)
        learning = [value for step, value in horizons.items() if reached is None or step < reached]
        expected = {
            step: value
            for step, value in _measured(logged, "credit/expected_horizon").items()
            if reached is None or step < reached
        }
        dial = matrix["dials"].get(member.task, math.inf)
        rows.append(
            {
                "method": member.method,
                "task": member.task,
                "seed": member.seed,
                "total_steps": member.total_steps,
                "finished": is_done(folder, member.total_steps),
                "end": curve[-1],
                "best": max(curve),
                "area": area_under(steps, curve, member.total_steps),
                "steps_to_bar": reached,
                "steps_per_second": metrics[-1]["charts/SPS"],
                "peak_memory_bytes": record.get("peak_memory_bytes"),
                "horizon": horizons[max(horizons)] if horizons else record.get("horizon"),
                "horizon_learning": float(np.median(learning)) if learning else None,
                "expected_horizon": max(expected.values(), default=None),  # before the bar was reached
                "foretold_at": min((step for step, value in expected.items() if value >= REACHES * dial), default=None),
                "steps": steps,
                "curve": [round(x, 4) for x in curve],
            }
        )
    return rows


def _measured(logged: Sequence[Mapping[str, float]], name: str) -> dict[int, float]:
    """What training measured after its first update, by agent step."""
    return {int(row["step"]): row[name] for row in logged if row["step"] and math.isfinite(row.get(name, math.nan))}


def _has_logged_horizons(folder: Path) -> bool:
    try:
        return bool(_measured(read_metrics(folder), "credit/horizon"))
    except ValueError:
        return False


def area_under(steps: Sequence[int], curve: Sequence[float], total_steps: int) -> float:
    """Mean of a curve over the whole run, by trapezoids; before its first point, and after the last, it is level.

    Args:
        steps: rising, in agent steps.
        curve: the value at each.
        total_steps: length of the run.
    """
    first, last = min(steps[0], 0), max(steps[-1], total_steps)
    return float(np.trapezoid([curve[0], *curve, curve[-1]], [first, *steps, last]) / (last - first))


def interquartile_mean(strata: Sequence[Sequence[float]]) -> Estimate:
    """Mean of the middle half of all values, with a percentile bootstrap interval.

    Seeds are drawn again within each stratum, so that every task keeps its weight (Agarwal et al. 2021, section 4.1). With fewer
    than four values nothing is cut off, and this is the mean.

    Args:
        strata: the values of each task, at least one.
    """
    samples = [np.asarray(values, float) for values in strata]
    pooled = np.concatenate(samples)
    value = float(trim_mean(pooled, 0.25))
    if min(map(len, samples)) < 2:
        return Estimate(value, None, None, len(pooled))
    interval = bootstrap(
        samples,
        lambda *drawn, axis: trim_mean(np.concatenate(drawn, axis=axis), 0.25, axis=axis),
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), len(pooled))


def summarise(
    matrix: dict[str, Any], rows: Sequence[dict[str, Any]], failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Statistics of every method: those of each task under "tasks", and those of all of them.

    Only finished seeds count. A task with a failed seed is not solved, whatever the others did: leaving out the runs that
    diverged would flatter the method.
    """
    failed = {(m.method, m.task, m.seed) for m in members(matrix) if m.name in failures}
    summary: list[dict[str, Any]] = []
    for method in matrix["methods"]:
        cells: dict[str, dict[str, Any]] = {}
        for task in matrix["tasks"]:
            chosen = [r for r in rows if (r["method"], r["task"]) == (method, task) and r["finished"]]
            num_failed = sum((method, task) == key[:2] for key in failed)
            if not chosen and not num_failed:
                continue
            end, area = (
                interquartile_mean([[row[name] for row in chosen]]) if chosen else None for name in ("end", "area")
            )
            cells[task] = {
                "dial": matrix["dials"].get(task),
                "num_failed": num_failed,
                "end": end,
                "area": area,
                "solved": end is not None and not num_failed and end.value >= matrix["bar"],
                "surely_solved": end is not None and not num_failed and (end.low or -math.inf) >= matrix["bar"],
                **{
                    name: _median(row[name] for row in chosen)
                    for name in (
                        "steps_per_second",
                        "peak_memory_bytes",
                        "horizon",
                        "horizon_learning",
                        "expected_horizon",
                    )
                },
            }
        whole = len(cells) == len(matrix["tasks"]) and all(cell["end"] is not None for cell in cells.values())
        strata = {
            name: [
                [r[name] for r in rows if (r["method"], r["task"]) == (method, task) and r["finished"]]
                for task in matrix["tasks"]
            ]
            for name in ("end", "area")
        }
        lengths = {name: [c["dial"] for c in cells.values() if c[name]] for name in ("solved", "surely_solved")}
        summary.append(
            {
                "method": method,
                "tasks": cells,
                "end": interquartile_mean(strata["end"]) if whole else None,
                "area": interquartile_mean(strata["area"]) if whole else None,
                "solved_length": max(lengths["solved"], default=None) if matrix["dials"] else None,
                "surely_solved_length": max(lengths["surely_solved"], default=None) if matrix["dials"] else None,
            }
        )
    return summary


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


# The report


def markdown(
    matrix: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    summary: Sequence[dict[str, Any]],
    failures: Mapping[str, str],
    command: str,
) -> str:
    """The report's text."""
    bar, metric = matrix["bar"], matrix["metric"]
    lines = [
        f"# {matrix['title']}",
        "",
        f"`{metric}` at the *end* of training: seeds at or above {bar:g}, mean, and every seed. Made by",
        "",
        f"    {command}",
        "",
        f"| method | {' | '.join(matrix['tasks'])} | steps/s |",
        f"|---|{'---|' * (len(matrix['tasks']) + 1)}",
    ]
    for method in matrix["methods"]:
        cells = []
        for task in matrix["tasks"]:
            chosen = [row for row in rows if (row["method"], row["task"]) == (method, task)]
            ends = [row["end"] for row in chosen]
            good = sum(end >= bar for end in ends)
            each = " ".join(f"{row['end']:.2f}{'' if row['finished'] else '*'}" for row in chosen)
            cells.append(f"**{good} of {len(ends)}**, mean {np.mean(ends):.3f} ({each})" if ends else "not run")
        speeds = [row["steps_per_second"] for row in rows if row["method"] == method]
        lines.append(f"| {method} | {' | '.join(cells)} | {np.median(speeds) if speeds else 0:,.0f} |")
    budgets = {row["task"]: row["total_steps"] for row in rows}
    lines += ["", "Steps: " + ", ".join(f"{task} {steps:,}" for task, steps in budgets.items()) + "."]
    reached = [row["steps_to_bar"] for row in rows if row["steps_to_bar"] is not None]
    if reached:
        lines += ["", f"Steps at which {bar:g} was first reached: {min(reached):,} to {max(reached):,}."]
    fell = [
        f"{r['method']}, {r['task']}, seed {r['seed']} ({r['best']:.2f} to {r['end']:.2f})"
        for r in rows
        if r["best"] >= bar > r["end"]
    ]
    lines += ["", f"Runs that reached the bar and ended below it: {'; '.join(fell) or 'none'}."]
    unfinished = [
        f"{r['method']}, {r['task']}, seed {r['seed']} at step {r['steps'][-1]:,}" for r in rows if not r["finished"]
    ]
    if unfinished:
        lines += ["", f"\\* unfinished when this page was made: {'; '.join(unfinished)}."]
    if failures:
        lines += ["", "Failed: " + "; ".join(f"{name}: {why}" for name, why in failures.items())]
    if any(row["finished"] for row in rows):
        lines += ["", *_statistics(matrix, summary), "", *_costs(matrix, summary)]
        if told := foretelling(matrix, rows):
            lines += ["", *_foretelling(matrix, told)]
    return "\n".join(lines) + "\n"


def _statistics(matrix: dict[str, Any], summary: Sequence[dict[str, Any]]) -> list[str]:
    """Interquartile means of the end and of the area under the curve."""
    tasks, bar, dial = list(matrix["tasks"]), matrix["bar"], matrix["dial_name"]
    together = ["all of them"] if len(tasks) > 1 else []
    lines = [
        f"Interquartile mean over the n finished seeds, with its {100 * CONFIDENCE:g} % bootstrap interval (percentiles of "
        f"{NUM_RESAMPLES:,} resamples; over all tasks stratified by task).",
    ]
    for name, title in (("end", "at the end"), ("area", "area under the curve")):
        with_length = name == "end" and bool(dial)
        columns = [title, *tasks, *together, *([f"solved {dial}"] if with_length else [])]
        lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        for row in summary:
            cells = [row["tasks"].get(task) for task in tasks]
            texts = [
                "not run"
                if cell is None
                else f"{cell[name] or ''}{', ' if cell[name] and cell['num_failed'] else ''}"
                f"{cell['num_failed'] or ''}{' failed' if cell['num_failed'] else ''}"
                for cell in cells
            ]
            texts += [str(row[name] or "incomplete")] * len(together)
            if with_length:
                lengths = [row[name] for name in ("solved_length", "surely_solved_length")]
                texts.append("{} ({})".format(*("none" if length is None else length for length in lengths)))
            lines.append(f"| {row['method']} | {' | '.join(texts)} |")
    if dial:
        lines += [
            "",
            f"Solved {dial}: the longest of those above whose interquartile mean is at least {bar:g}, no seed having failed; in "
            f"brackets, the longest whose whole interval is. Area under the curve: the mean of `{matrix['metric']}` over the run.",
        ]
    else:
        lines += ["", f"Area under the curve: the mean of `{matrix['metric']}` over the run."]
    return lines


def _costs(matrix: dict[str, Any], summary: Sequence[dict[str, Any]]) -> list[str]:
    """Time and memory by task, and the credit horizons where they were measured."""
    tasks = list(matrix["tasks"])
    cells = [cell for row in summary for cell in row["tasks"].values()]
    parts = ["microseconds for each agent step, environments included"]
    if any(cell["peak_memory_bytes"] is not None for cell in cells):
        parts.append("largest resident memory of the process in MiB (without what it holds on a GPU)")
    if any(cell["horizon"] is not None for cell in cells):
        parts.append("effective credit horizon in steps, at the end (and its median before the bar was reached)")
    if any(cell["expected_horizon"] is not None for cell in cells):
        parts.append("the longest expected credit horizon measured before that")
    lines = [
        f"Cost: {'; '.join(parts)}. Medians over finished seeds; runs side by side slow each other down.",
        "",
        f"| cost | {' | '.join(tasks)} |",
        f"|{'---|' * (len(tasks) + 1)}",
    ]
    for row in summary:
        texts = []
        for task in tasks:
            cell = row["tasks"].get(task)
            if cell is None or cell["steps_per_second"] is None:
                texts.append("not run" if cell is None else "none finished")
                continue
            memory = cell["peak_memory_bytes"]
            text = f"{1e6 / cell['steps_per_second']:.1f} µs" + (
                "" if memory is None else f", {memory / 2**20:,.0f} MiB"
            )
            if cell["horizon"] is not None:
                learning = "" if cell["horizon_learning"] is None else f" ({cell['horizon_learning']:g})"
                text += f", horizon {cell['horizon']:g}{learning}"
            if cell["expected_horizon"] is not None:
                text += f", expected {cell['expected_horizon']:g}"
            texts.append(text)
        lines.append(f"| {row['method']} | {' | '.join(texts)} |")
    return lines


def foretelling(matrix: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the expected horizon foretold what was learned, by method; of finished runs with a measurement before the bar was reached.

    A horizon of at least `REACHES` of the dial, at any of those measurements, says that the bar will be reached. `leads` are the shares
    of the budget from the first of them to the bar, of runs that were foretold and learned.
    """
    told = []
    for method in matrix["methods"]:
        chosen = [
            row for row in rows if row["method"] == method and row["finished"] and row["expected_horizon"] is not None
        ]
        if not chosen or not matrix["dials"]:
            continue
        verdicts = [(row["foretold_at"] is not None, row["steps_to_bar"] is not None) for row in chosen]
        told.append(
            {
                "method": method,
                **{
                    f"{'' if yes else 'not '}foretold, {'' if learned else 'not '}learned": verdicts.count(
                        (yes, learned)
                    )
                    for yes in (True, False)
                    for learned in (True, False)
                },
                "leads": [
                    (row["steps_to_bar"] - row["foretold_at"]) / row["total_steps"]
                    for row, verdict in zip(chosen, verdicts, strict=True)
                    if all(verdict)
                ],
            }
        )
    return told


def _foretelling(matrix: dict[str, Any], told: Sequence[dict[str, Any]]) -> list[str]:
    kinds = [name for name in told[0] if "learned" in name]

    def line(name: str, chosen: Sequence[dict[str, Any]]) -> str:
        leads = [lead for row in chosen for lead in row["leads"]]
        counts = " | ".join(str(sum(row[kind] for row in chosen)) for kind in kinds)
        return f"| {name} | {counts} | {f'{np.median(leads):.0%}' if leads else ''} |"

    return [
        f"What the expected credit horizon foretells: one of at least {REACHES:g} of the {matrix['dial_name']}, at any measurement "
        f"before {matrix['bar']:g} was reached, says that it will be; if there is none, that it will not. Runs, and the median share "
        "of the budget between the first such measurement and the bar:",
        "",
        f"| method | {' | '.join(kinds)} | lead |",
        f"|{'---|' * (len(kinds) + 2)}",
        *(line(row["method"], [row]) for row in told),
        line("all", told),
    ]


def figure(matrix: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Curves: a panel per task, a colour per method, a line per seed and a thick one for their mean."""
    plt = _pyplot()
    tasks, methods = list(matrix["tasks"]), list(matrix["methods"])
    size = (4.2 * len(tasks) + 2.8, 3.4)  # the names of the methods stand at the right
    chart, panels = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, task in zip(panels[0], tasks, strict=True):
        for method, colour in zip(methods, _colours(plt, len(methods)), strict=True):
            chosen = [row for row in rows if (row["method"], row["task"]) == (method, task)]
            for row in chosen:
                panel.plot(np.array(row["steps"]) / 1e6, row["curve"], color=colour, alpha=0.3, linewidth=0.8)
            if chosen:
                grid = np.linspace(0, chosen[0]["total_steps"], 200)
                mean = np.mean([np.interp(grid, row["steps"], row["curve"]) for row in chosen], axis=0)
                panel.plot(grid / 1e6, mean, color=colour, linewidth=2.2, label=method)
        panel.set(title=task, xlabel="million agent steps")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(matrix["metric"])
    lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines() if line.get_label()[0] != "_"}
    if lines:  # of all panels, as a method need not be in each
        chart.legend(lines.values(), lines, fontsize=7, loc="outside right upper")
    chart.savefig(path, dpi=110)
    plt.close(chart)


def dial_figure(matrix: dict[str, Any], summary: Sequence[dict[str, Any]], path: Path) -> bool:
    """Interquartile means with their intervals, and credit horizons, against the dial. Returns whether there was anything to draw."""
    if len(set(matrix["dials"].values())) < 2 or not any(
        cell["end"] for row in summary for cell in row["tasks"].values()
    ):
        return False
    all_cells = [cell for row in summary for cell in row["tasks"].values()]
    kinds = {
        "expected_horizon": "expected credit horizon before the bar",
        "horizon_learning": "effective credit horizon while learning",
        "horizon": "effective credit horizon at the end",
    }
    horizon = next((kind for kind in kinds if any(cell[kind] is not None for cell in all_cells)), None)
    has_horizon = horizon is not None
    plt = _pyplot()
    size = (4.0 * (2 + has_horizon) + 2.8, 3.4)  # the names of the methods stand at the right
    chart, panels = plt.subplots(1, 2 + has_horizon, figsize=size, squeeze=False, layout="constrained")
    dials = sorted(set(matrix["dials"].values()))
    for number, (row, colour) in enumerate(zip(summary, _colours(plt, len(summary)), strict=True)):
        shift = 1.0 + 0.012 * (number - (len(summary) - 1) / 2)  # intervals side by side, not on top of each other
        for panel, name in zip(panels[0], ("end", "area"), strict=False):
            cells = [cell for cell in row["tasks"].values() if cell[name] is not None]
            if cells:
                cells.sort(key=lambda cell: cell["dial"])
                values, x = [cell[name].value for cell in cells], np.array([cell["dial"] for cell in cells]) * shift
                panel.plot(x, values, "o-", color=colour, markersize=3, label=row["method"])
                for place, cell in zip(x, cells, strict=True):
                    if cell[name].low is not None:
                        panel.plot([place] * 2, [cell[name].low, cell[name].high], color=colour, linewidth=1.2)
        if horizon is not None:
            points = sorted((c["dial"], c[horizon]) for c in row["tasks"].values() if c[horizon] is not None)
            if points:
                panels[0][2].plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=row["method"])
    titles = [f"{matrix['metric']} at the end", "area under the curve", f"{kinds.get(horizon or '')}, in steps"]
    for panel, title in zip(panels[0], titles, strict=False):
        if dials[0] > 0:
            panel.set_xscale("log", base=2)
        panel.set_xticks(dials, [str(dial) for dial in dials], minor=False)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(matrix["dial_name"])
        panel.grid(alpha=0.3)
    panels[0][0].axhline(matrix["bar"], color="grey", linewidth=0.8, linestyle="--")
    chart.legend(*panels[0][0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    chart.savefig(path, dpi=110)
    plt.close(chart)
    return True


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _colours(plt: Any, count: int) -> list[Any]:
    """A colour for each method, and none twice as long as there are twenty."""
    palette = plt.cm.tab10.colors if count <= 10 else plt.cm.tab20.colors
    return [palette[i % len(palette)] for i in range(count)]


def write_report(
    matrix: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    failures: Mapping[str, str],
    command: str,
    report: Path,
) -> str:
    """Writes page, figures and JSON beside each other, and keeps what was written by hand on an earlier page. Returns the text."""
    summary = summarise(matrix, rows, failures)
    report.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(matrix, rows, summary, failures, command)
    page = report.with_name(f"{report.name}.md")
    figure(matrix, rows, report.with_name(f"{report.name}.png"))
    pictures = f"![curves]({report.name}.png)\n"
    if dial_figure(matrix, summary, report.with_name(f"{report.name}_dial.png")):
        pictures += f"\n![against the {matrix['dial_name']}]({report.name}_dial.png)\n"
    earlier = page.read_text(encoding="utf-8") if page.exists() else ""
    _, found, reading = earlier.partition(READING)
    page.write_text(f"{text}\n{pictures}" + (f"\n{found}{reading}" if found else ""), encoding="utf-8")
    content = {"rows": rows, "summary": summary, "failures": dict(failures)}
    report.with_name(f"{report.name}.json").write_text(json.dumps(content, default=vars), encoding="utf-8")
    return text


# The board


def write_board(
    matrix: dict[str, Any], rows: Sequence[dict[str, Any]], failures: Mapping[str, str], board: Path
) -> None:
    """Writes TensorBoard runs anew: one for each method whose x-axis is the dial, and one for each member with its hyperparameters.

    The curves of the members are in their own folders; here are the numbers of the report. A board of custom scalars shows what
    the tab of scalars would, with intervals as bands.

    Args:
        matrix: of `load_matrix`.
        rows: of `collect`.
        failures: reasons by name of the member.
        board: a folder of its own, cleared before.

    Raises:
        ValueError: if the folder holds anything but events of TensorBoard.
    """
    from torch.utils.tensorboard import SummaryWriter

    if board.exists():
        foreign = [f for f in board.rglob("*") if f.is_file() and not f.name.startswith("events.out.tfevents.")]
        if foreign:
            raise ValueError(f"--board: found {foreign[0]}; allowed a folder with nothing but TensorBoard events")
        shutil.rmtree(board)
    if matrix["dials"]:
        dial = matrix["dial_name"]
        charts: dict[str, list[Any]] = {
            f"{matrix['metric']} at the end against {dial}": [
                "Margin",
                [f"dial/end{e}" for e in ("", "_low", "_high")],
            ],
            f"area under the curve against {dial}": ["Margin", [f"dial/area{e}" for e in ("", "_low", "_high")]],
            f"longest expected credit horizon before the bar, in steps, against {dial}": [
                "Multiline",
                ["dial/expected_credit_horizon$"],
            ],
            f"effective credit horizon while learning, in steps, against {dial}": [
                "Multiline",
                ["dial/credit_horizon_learning$"],
            ],
            f"effective credit horizon at the end, in steps, against {dial}": ["Multiline", ["dial/credit_horizon$"]],
            f"agent steps per second against {dial}": ["Multiline", ["dial/steps_per_second$"]],
            f"memory in MiB against {dial}": ["Multiline", ["dial/memory_mib$"]],
        }
        with SummaryWriter(str(board)) as writer:
            writer.add_custom_scalars({matrix["title"]: charts})
        for row in summarise(matrix, rows, failures):
            if not row["tasks"]:
                continue
            with SummaryWriter(str(board / "methods" / _safe(row["method"]))) as writer:
                for cell in sorted(row["tasks"].values(), key=lambda cell: cell["dial"]):
                    for name, value in _dial_scalars(cell).items():
                        writer.add_scalar(f"dial/{name}", value, global_step=cell["dial"])
    names = {(m.method, m.task, m.seed): m for m in members(matrix)}
    settings = {key: _flat_settings(member) for key, member in names.items()}
    known = [flat for flat in settings.values() if flat]
    varied = [key for key in (known[0] if known else ()) if any(f.get(key) != known[0][key] for f in known)]
    with SummaryWriter(str(board / "members")) as writer:
        for row in rows:
            key = (row["method"], row["task"], row["seed"])
            hyperparameters = {"method": row["method"], "task": row["task"]}
            hyperparameters |= {name: _plain(settings[key].get(name)) for name in varied}
            results = {
                "report/end": row["end"],
                "report/area_under_curve": row["area"],
                "report/best": row["best"],
                "report/steps_per_second": row["steps_per_second"],
                "report/memory_mib": _or_nan(row["peak_memory_bytes"]) / 2**20,
                "report/credit_horizon": _or_nan(row["horizon"]),
                "report/credit_horizon_learning": _or_nan(row["horizon_learning"]),
                "report/expected_credit_horizon": _or_nan(row["expected_horizon"]),
            }
            writer.add_hparams(hyperparameters, results, run_name=names[key].name, global_step=row["steps"][-1])


def _dial_scalars(cell: Mapping[str, Any]) -> dict[str, float]:
    """What the board shows of one method at one value of the dial; without an interval the band has no width."""
    scalars: dict[str, float] = {}
    for name in ("end", "area"):
        estimate = cell[name]
        if estimate is not None:
            scalars[name] = estimate.value
            scalars[f"{name}_low"] = estimate.value if estimate.low is None else estimate.low
            scalars[f"{name}_high"] = estimate.value if estimate.high is None else estimate.high
    memory = cell["peak_memory_bytes"]
    others = {
        "credit_horizon": cell["horizon"],
        "credit_horizon_learning": cell["horizon_learning"],
        "expected_credit_horizon": cell["expected_horizon"],
        "steps_per_second": cell["steps_per_second"],
        "memory_mib": None if memory is None else memory / 2**20,
    }
    return scalars | {name: value for name, value in others.items() if value is not None}


def _flat_settings(member: Member) -> dict[str, Any]:
    """Every setting of a member, arguments of the environment one by one; empty if train.py would refuse them."""
    try:
        resolved = member.resolved()
    except ValueError:
        return {}
    kwargs = resolved["env"].pop("kwargs")
    flat = {f"{section}.{key}": value for section, settings in resolved.items() for key, value in settings.items()}
    return flat | {f"env.kwargs.{key}": value for key, value in kwargs.items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _safe(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)


def main() -> int:
    """Runs the matrix and writes the report. Returns 1 if a member failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, help="YAML file: config, methods, tasks, seeds")
    parser.add_argument("--jobs", type=int, help="processes side by side; default one for each device")
    parser.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="cpu, cuda:0, ...; jobs are dealt to them in turn"
    )
    parser.add_argument("--runs", type=Path, help="folder of the runs; default runs/<name of the file>")
    parser.add_argument("--report", type=Path, help="writes <report>.md, .json and .png; default <runs>/report")
    parser.add_argument("--board", type=Path, help="folder of the TensorBoard board; default <runs>/board")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="runs these only; the report has all")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="runs these only; the report has all")
    parser.add_argument(
        "--credit", action="store_true", help="also measures credit horizons at the end, where training logged none"
    )
    parser.add_argument("--report-only", action="store_true", help="runs nothing")
    arguments = parser.parse_args()
    jobs = len(arguments.devices or ("cpu",)) if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        parser.error(f"--jobs: found {jobs}; allowed an integer of at least 1")
    matrix = load_matrix(arguments.matrix)
    runs = arguments.runs or Path("runs") / arguments.matrix.stem
    for name in ("methods", "tasks"):
        unknown = set(getattr(arguments, name) or ()) - set(matrix[name])
        if unknown:
            parser.error(f"--{name}: found {sorted(unknown)}; allowed {list(matrix[name])}")
    todo = [
        member
        for member in ([] if arguments.report_only else members(matrix))
        if member.method in (arguments.methods or matrix["methods"])
        and member.task in (arguments.tasks or matrix["tasks"])
    ]
    try:
        now_failed = run_all(todo, runs, jobs=jobs, devices=arguments.devices, measure=arguments.credit)
    except KeyboardInterrupt:
        print("compare.py: interrupted; the same command goes on from the last checkpoints", file=sys.stderr)
        return 130
    failures = {m.name: made_with_other_settings(m, runs) for m in members(matrix)}
    failures |= {m.name: failures[m.name] or read_record(runs / m.name).get("failure") for m in members(matrix)}
    failures = {name: why for name, why in {**failures, **now_failed}.items() if why}
    rows = collect(matrix, runs)
    report = arguments.report or runs / "report"
    command = f"python scripts/compare.py {arguments.matrix} --jobs {jobs} --report {report}"
    text = write_report(matrix, rows, failures, command, report)
    try:
        write_board(matrix, rows, failures, arguments.board or runs / "board")
    except ValueError as error:
        parser.error(str(error))
    print(text)
    return 1 if now_failed else 0


if __name__ == "__main__":
    sys.exit(main())
