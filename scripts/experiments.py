"""Carries out the papers' experiments one after the other, and writes the pages of docs/results from what they left.

    python scripts/experiments.py run                                       smoke: all of them in minutes, without data files
    python scripts/experiments.py run --preset laptop --only copy ptb
    python scripts/experiments.py run --preset paper --device cuda --jobs 4
    python scripts/experiments.py report

Every entry is a command of `dni_rl.experiments` with a folder of its own, <runs>/<preset>/<entry>, and `--resume`: what is done is
skipped, what was interrupted goes on from its last checkpoint, and an entry that fails is reported and does not stop the others. What an
entry prints is in output.log in its folder. An experiment is added as a line of ENTRIES.

The report has a page for each experiment, with figures (PNG) and JSON beside it. It counts runs that are finished and have the settings of
the entry's command, says which are missing and which were left out, and asks the program itself which there should be. Where the runs of
an entry are not at hand, because another machine made them, the page keeps what the JSON has of them. What stands on a page from
"**Reading.**" on is written by hand, and kept; a page that has no such mark and is not of this script is left alone.

Intervals of means and of differences between two methods (seed by seed) are 95 % t intervals over seeds; those of ratios of means are
percentile bootstraps over the seeds of both, computed by scipy.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import bootstrap
from scipy.stats import t as t_distribution

from dni_rl.experiments import common

ROOT = Path(__file__).resolve().parent.parent
RUNS, PAGES = Path("runs/experiments"), Path("docs/results")
PRESETS = ("smoke", "laptop", "paper")
READING = "**Reading.**"  # what stands on a page from here on was written by hand, and stays
MADE_BY = "python scripts/experiments.py report"  # stands on every page of this script
LIST_START, LIST_END = "<!-- written by scripts/experiments.py report -->", "<!-- end -->"  # in the list of pages
RECORD_FILE, LOG_FILE = (
    "machine.json",
    "output.log",
)  # in an entry's folder: where its runs were made, and what they printed
CONFIDENCE, NUM_RESAMPLES = 0.95, 9999
MAX_POINTS = 120  # of a curve, in the JSON
MAX_PICTURE_BYTES = 250_000  # of a program's own figure; larger ones are stored in fewer colours
# Settings in which two runs may differ and be of the same experiment.
FREE_FIELDS = ("device", "log_every_steps", "eval_every_steps", "checkpoint_every_steps", "timeout_sec")


@dataclass(frozen=True)
class Entry:
    """One command, and where its results are shown.

    Attributes:
        name: of the entry and of its folder.
        program: a module of `dni_rl.experiments`.
        options: of its command line, beside the preset.
        page: on which it is shown; by default one of its own.
    """

    name: str
    program: str
    options: str = ""
    page: str = ""

    @property
    def module(self) -> ModuleType:
        """The program."""
        return importlib.import_module(f"dni_rl.experiments.{self.program}")

    @property
    def is_matrix(self) -> bool:
        """Whether it plans a matrix of arms and seeds, with `plan`; asynchronous layers have results of their own."""
        return self.program != "asynchronous"

    def arguments(self, preset: str, folder: Path) -> list[str]:
        """Of its command line."""
        return ["--preset", preset, *self.options.split(), "--run-folder", str(folder), "--resume"]

    def command(self, preset: str) -> str:
        """The command as it stands on a page."""
        folder = RUNS / preset / self.name
        return f"python -m dni_rl.experiments.{self.program} {' '.join(self.arguments(preset, folder))}"


ENTRIES = (
    Entry("images", "images", "--arms backprop none dni cdni"),
    Entry("images_p0.2", "images", "--arms dni cdni --update-probability 0.2", page="images"),
    Entry("images_unlocked", "images", "--arms dni cdni --unlocked", page="images"),
    Entry("cnn", "images", "--model cnn --arms"),
    Entry("greedy_cnn", "images", "--model greedy_cnn --arms"),
    Entry("copy", "copy"),
    Entry("repeat_copy", "copy", "--task repeat_copy", page="copy"),
    Entry("ptb", "ptb"),
    Entry("two_networks", "timescales"),
    Entry("sequential_mnist", "sequential_mnist"),
    Entry("alignment", "alignment"),
    Entry("understanding", "understanding"),
    Entry("asynchronous", "asynchronous"),
)

# Title of a page, and what else to say of it; a page that is not here has its program's own words.
TITLES = {
    "images": (
        "Images with every layer decoupled",
        "Fully connected nets whose layers learn from synthetic gradients; now and then, in random order (p = 0.2), and on synthetic "
        'inputs as well ("complete unlock"). Jaderberg et al. (2017), sec. 3.1 and appendix, report about 2 % error on MNIST at p = 0.2 '
        "and about 2 % unlocked.",
    ),
    "greedy_cnn": (
        "A published negative result, run again",
        "Belilovsky et al. (2020) report that on CIFAR-10 a net of three convolutions reaches with DNI far less than by backpropagation. "
        'The arms "published" have the critic as they published it, the others start at zero and have normalised targets.',
    ),
    "copy": (
        "Copy and repeat copy with short windows",
        "Length of the longest episode solved, after Jaderberg et al. (2017), sec. 3.2. `none` is truncated BPTT.",
    ),
    "ptb": (
        "Penn Treebank, character by character",
        "Bits per character with short windows, after Jaderberg et al. (2017), sec. 3.2. `none` is truncated BPTT.",
    ),
    "two_networks": (
        "Two networks at two speeds",
        "Network A ticks at every step and counts odd digits, network B ticks every T steps and counts 3s; what A learns from B's error "
        "is the arm. Jaderberg et al. (2017), sec. 3.3.",
    ),
    "sequential_mnist": (
        "Sequential MNIST",
        "Digits read row by row by a small LSTM, after Pemberton & Costa (2024), whose results no source at hand gives in numbers. "
        "`none` is truncated BPTT, and at the longest window full BPTT.",
    ),
    "understanding": ("Understanding synthetic gradients", "The studies of Czarnecki et al. (2017), part by part."),
    "asynchronous": (
        "Asynchronous layers",
        "Layers that learn in random order in one process, and in processes of their own with messages that are late.",
    ),
}


# Running


def run_entry(entry: Entry, preset: str, runs: Path, jobs: int | None = None, device: str | None = None) -> str | None:
    """Carries out what is left of an entry.

    Args:
        entry: of ENTRIES.
        preset: one of PRESETS.
        runs: folder of all.
        jobs: runs at a time; None for the preset's.
        device: None for the preset's.

    Returns:
        None, or in one line the reason why it failed.
    """
    folder = runs / preset / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"dni_rl.experiments.{entry.program}", *entry.arguments(preset, folder)]
    command += ["--jobs", str(jobs)] if jobs is not None and entry.is_matrix else []
    command += ["--device", device] if device is not None else []
    # The nets of smoke are so small that threads would wait for each other most of the time.
    environment = {**({"OMP_NUM_THREADS": "1"} if preset == "smoke" else {}), **os.environ}
    before, started = _results_there(folder), time.monotonic()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open(folder / LOG_FILE, "ab+") as log:
        log.seek(0, os.SEEK_END)
        start = log.tell()
        # In a session of its own, so that it is told to stop once, together with its workers, whoever told this process.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
        finally:
            made = sorted(name for name, when in _results_there(folder).items() if before.get(name) != when)
            if made:
                call = {"date": date, "seconds": round(time.monotonic() - started, 1), "runs": made}
                _add_record(folder, call | _machine(device))
        log.seek(start)
        lines = log.read().decode(errors="replace").strip().splitlines()
    if code == 0:
        return None
    return lines[-1].rpartition("\r")[2].strip() if lines else f"exit code {code}"


def _results_there(folder: Path) -> dict[str, Any]:
    """What says of each run that it is done, and when it was."""
    done: dict[str, Any] = {f.parent.name: f.stat().st_mtime_ns for f in folder.glob(f"*/{common.RESULT_FILE}")}
    with contextlib.suppress(OSError, ValueError, KeyError):
        together = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]
        done |= {name: row["seconds"] for name, row in together.items()}
    return done


def _machine(device: str | None) -> dict[str, Any]:
    """What runs of this call are made on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    on_gpu = device is not None and device.startswith("cuda") and torch.cuda.is_available()
    gpu = torch.cuda.get_device_name(device) if on_gpu else None
    return {"processor": processor, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__}


def _add_record(folder: Path, call: Mapping[str, Any]) -> None:
    common.write_json(folder / RECORD_FILE, [*_read_json(folder / RECORD_FILE, []), call])


def _read_json(path: Path, otherwise: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return otherwise


def run_all(entries: Sequence[Entry], preset: str, runs: Path, jobs: int | None, device: str | None) -> int:
    """Carries out entries one after the other, a line for each. Returns 1 if one failed, 130 after Ctrl-C, otherwise 0."""
    failed = []
    for number, entry in enumerate(entries, 1):
        started = time.monotonic()
        try:
            problem = run_entry(entry, preset, runs, jobs, device)
        except KeyboardInterrupt:
            print(f"{entry.name}: stopped; the same command goes on from the last checkpoints", file=sys.stderr)
            return 130
        seconds = round(time.monotonic() - started)
        took = f"{seconds // 60}:{seconds % 60:02d}"
        print(
            f"{number} of {len(entries)}: {entry.name}: {f'failed after {took}: {problem}' if problem else f'done in {took}'}",
            flush=True,
        )
        if problem:
            failed.append(entry.name)
    if failed:
        print(f"{len(failed)} of {len(entries)} failed: {', '.join(failed)}; {LOG_FILE} in their folders has the rest")
    return 1 if failed else 0


# What came out


def planned(entry: Entry, preset: str) -> list[common.Member]:
    """The runs that an entry's command stands for, as the program itself has planned them.

    Raises:
        ValueError: if the program refuses its options.
    """
    try:
        with common.one_line_errors(entry.program):
            return entry.module.plan(entry.arguments(preset, Path("nowhere"))).matrix
    except SystemExit:
        raise ValueError(f"{entry.name}: its program refuses the options: {entry.options}") from None


def section(entry: Entry, preset: str, folder: Path) -> dict[str, Any] | None:
    """What the JSON has of an entry: the program's summary of the runs that are finished, settings, curves; None if none is.

    Args:
        entry: of ENTRIES.
        preset: of the runs.
        folder: of the entry.
    """
    if not entry.is_matrix:
        return _asynchronous_section(entry, preset, folder)
    matrix = planned(entry, preset)
    results: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for member in matrix:
        found = _finished(folder / member.name, asdict(member.config))
        if isinstance(found, str):
            left_out[member.name] = found
        elif found is not None:
            results[member.name] = found
    chosen = [member for member in matrix if member.name in results]
    if not chosen:
        for name, why in left_out.items():
            print(f"{entry.name}: {name} left out: {why}", file=sys.stderr)
        return None
    settings, of_member = _shared({member.name: asdict(member.config) for member in chosen})
    return {
        **_head(entry, preset, folder),
        "planned": len(matrix),
        "finished": len(chosen),
        "missing": [m.name for m in matrix if m.name not in results and m.name not in left_out],
        "left_out": left_out,
        "seeds": sorted({member.config.seed for member in chosen}),
        "settings": settings,
        "settings_of_runs": of_member,
        "summary": _rounded(entry.module.summarize(chosen, results)),
        "curves": {m.name: _curve(m, results[m.name]) for m in chosen},
    }


def _head(entry: Entry, preset: str, folder: Path) -> dict[str, Any]:
    machines = _read_json(folder / RECORD_FILE, [])
    return {"program": entry.program, "command": entry.command(preset), "machines": machines}


def _finished(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | str | None:
    """The result of a run; None if it is not finished; or why it is no run of this config, in one line."""
    found = _read_json(folder / "config.json", None)
    result = _read_json(folder / common.RESULT_FILE, None)
    if found is None or result is None:
        return None
    wanted = json.loads(json.dumps(config))
    # a setting that the run does not know was added to the program later
    for name in wanted:
        if name in found and name not in FREE_FIELDS and found[name] != wanted[name]:
            return f"{name}: found a run with {found[name]!r}; allowed {wanted[name]!r}; remove its folder and run the entry again"
    # The result may be of a shorter run that is about to be lengthened; the log says how far this one came.
    last = 0
    with contextlib.suppress(OSError, json.JSONDecodeError):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = json.loads(lines[-1])["step"] if lines else 0
    return result if last >= config["num_steps"] else None


def _asynchronous_section(entry: Entry, preset: str, folder: Path) -> dict[str, Any] | None:
    """As `section`, of the program whose runs are rows of one file."""
    results = _read_json(folder / "results.json", None)
    if results is None or not results["runs"]:
        return None
    config = entry.module.make_config(preset)
    wanted = json.loads(json.dumps(asdict(config)))
    for name in wanted:
        if name not in FREE_FIELDS and results["config"].get(name, wanted[name]) != wanted[name]:
            print(
                f"{entry.name}: left out: {name}: found runs with {results['config'][name]!r}; allowed {wanted[name]!r}",
                file=sys.stderr,
            )
            return None
    names = [str(run) for run in entry.module.runs(config)]
    return {
        **_head(entry, preset, folder),
        "planned": len(names),
        "finished": len(results["runs"]),
        "missing": [name for name in names if name not in results["runs"]],
        "left_out": {},
        "seeds": [config.seed],
        "settings": results["config"],
        "settings_of_runs": {},
        "summary": _rounded(results),
        "curves": {},
    }


def _shared(configs: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings that all runs have in common, and by run the others."""
    first = next(iter(configs.values()))
    same = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in configs.values())}
    return same, {name: {k: v for k, v in config.items() if k not in same} for name, config in configs.items()}


def _rounded(value: Any) -> Any:
    """Numbers with six digits; the implied loss point by point is left out, as the figure has it."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(inner) for key, inner in value.items() if key != "first"}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value


def _curve(member: common.Member, result: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a run against its steps, as lists by name; empty lists where the program keeps no curve."""
    points = result.get("curve", [])
    if "solved" in result:  # lengths by when they were solved: stairs
        before, points = 0, [{"step": 0, "length": 0}]
        for solved in result["solved"]:
            points += [{"step": solved["step"], "length": length} for length in (before, solved["length"])]
            before = solved["length"]
        points.append({"step": result["steps"], "length": before})
    if len(points) > MAX_POINTS:
        points = [points[i] for i in np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int)]
    names = [name for name, value in (points[0] if points else {}).items() if isinstance(value, int | float)]
    numbers = {name: _rounded([point[name] for point in points]) for name in names}
    return {"arm": member.cell.arm, "window": member.cell.window, "seed": member.config.seed, **numbers}


# Statistics


@dataclass(frozen=True)
class Estimate:
    """A mean, or a ratio of means, over seeds.

    Attributes:
        value: None where a seed diverged.
        low: lower end of the 95 % interval; None with fewer than two seeds, which say nothing of their spread.
        high: upper end.
        std: sample standard deviation; None for ratios and with fewer than two seeds.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    std: float | None = None

    def interval(self, digits: int, scale: float = 1.0) -> str | None:
        """ "[low, high]"."""
        if self.low is None or self.high is None:
            return None
        return f"[{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"

    def shown(self, digits: int, scale: float = 1.0) -> str | None:
        """The value, and its interval if there is one."""
        if self.value is None:
            return None
        return f"{scale * self.value:.{digits}f} {self.interval(digits, scale) or '(one seed)'}"


def mean(values: Iterable[float | None]) -> Estimate:
    """Mean and t interval over seeds."""
    known = list(values)
    if not known or any(value is None or not math.isfinite(value) for value in known):
        return Estimate(None)
    numbers = [float(value) for value in known if value is not None]
    value = statistics.fmean(numbers)
    if len(numbers) < 2:
        return Estimate(value)
    std = statistics.stdev(numbers)
    half = float(t_distribution.ppf(0.5 + CONFIDENCE / 2, len(numbers) - 1)) * std / math.sqrt(len(numbers))
    return Estimate(value, value - half, value + half, std)


def difference(of: Mapping[str, float | None], baseline: Mapping[str, float | None]) -> Estimate:
    """Mean of the difference between two methods, over the seeds that both have."""
    pairs = [(of[seed], baseline[seed]) for seed in of if seed in baseline]
    return mean([None if a is None or b is None else a - b for a, b in pairs])


def ratio(of: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean over mean, with a percentile bootstrap over the seeds of both; None where the baseline is 0."""
    if not of or not baseline or not statistics.fmean(baseline):
        return Estimate(None)
    value = statistics.fmean(of) / statistics.fmean(baseline)
    if min(len(of), len(baseline)) < 2:
        return Estimate(value)
    with np.errstate(divide="ignore", invalid="ignore"):
        interval = bootstrap(
            (np.asarray(of, float), np.asarray(baseline, float)),
            lambda a, b, axis: a.mean(axis) / b.mean(axis),
            vectorized=True,
            n_resamples=NUM_RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


# Tables


@dataclass(frozen=True)
class Score:
    """What a table is about.

    Attributes:
        label: of the score.
        key: of the part of a row that has "per_seed"; "" for the row itself.
        published: key of the published value.
        scale: factor from what is stored to what is shown.
        digits: after the point.
        more: further columns, by the row's key for them.
    """

    label: str
    key: str = ""
    published: str = "published"
    scale: float = 1.0
    digits: int = 3
    more: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """How the results of a program are shown.

    Attributes:
        scores: a table for each.
        curves: what to draw, by name in the curves, with a label and a factor.
        axes: what to draw it against.
        dial: what the second part of a cell is.
        each_window: whether windows have panels of their own.
        against_window: whether there is a figure of the score against the window.
        note: below the tables.
    """

    scores: tuple[Score, ...]
    curves: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    axes: tuple[str, ...] = ("step",)
    dial: str = "window"
    each_window: bool = False
    against_window: bool = False
    note: str = ""


_ERROR = Score("test error, %", scale=100.0, digits=2)
VIEWS = {
    "images": View((_ERROR,), {"error": ("test error, %", 100.0)}, dial="layers"),
    "copy": View(
        (
            Score(
                "longest episode solved",
                digits=1,
                more={"ratio to none": "ratio", "published ratio": "published_ratio"},
            ),
        ),
        {"length": ("longest episode solved", 1.0)},
        each_window=True,
        against_window=True,
    ),
    "ptb": View(
        (
            Score(
                "test bits",
                more={
                    "bits to reach": "threshold_bits",
                    "share of tokens": "data_ratio",
                    "published share of tokens": "published_data_ratio",
                    "share of seconds": "time_ratio",
                    "published share of seconds": "published_time_ratio",
                },
            ),
        ),
        {"bits": ("validation bits per token", 1.0)},
        axes=("tokens", "seconds"),
        against_window=True,
        note="Shares: tokens and seconds to the bits in validation, over those that {baseline} took. The bits to reach are the lowest "
        "that all seeds of both reached. Seconds are those of training; runs side by side slow each other down.",
    ),
    "timescales": View(
        (
            Score(
                "error of network A",
                "a_error",
                published="",
                more={"share of steps": "a_steps_ratio", "published: under": "published_a_steps_ratio"},
            ),
            Score("error of network B", "b_error", "published_b_error", more={"share of steps": "b_steps_ratio"}),
        ),
        {"a_error": ("error of network A", 1.0), "b_error": ("error of network B", 1.0)},
        dial="T",
        note="Share of steps: those to the final error of the locked system (backprop), over those that it took itself; none "
        "where a seed never got there.",
    ),
    "sequential_mnist": View(
        (Score("test error, %", scale=100.0, digits=2, more={"gap closed": "gap_closed"}),),
        {"error": ("test error, %", 100.0)},
        against_window=True,
        note="Gap closed: share of the way from truncated BPTT, `none` at the same window, to {full}.",
    ),
    "understanding": View((), {}),
}
_PLAIN = View((Score("score"),))  # of a program that is not in VIEWS


def _view(found: Mapping[str, Any]) -> View:
    return VIEWS.get(found["program"], _PLAIN)


def _rows(found: Mapping[str, Any], score: Score) -> list[tuple[dict[str, Any], dict[str, float | None]]]:
    """Rows of a summary, each with its scores by seed; none where a program's summary is of another kind."""
    summary = found["summary"]
    rows = [row for row in summary.get("rows", summary.get("cells", [])) if isinstance(row, dict)]
    scored = [(row, (row.get(score.key) if score.key else row) or {}) for row in rows]
    return [(row, part["per_seed"]) for row, part in scored if isinstance(part.get("per_seed"), dict)]


def _window(row: Mapping[str, Any]) -> int:
    return row["window"] if "window" in row else row["num_layers"]


def _is_as_published(found: Mapping[str, Any]) -> bool:
    """Whether the published figures are of these settings: those of images are not of random or unlocked updates."""
    configs = [found["settings"], *found["settings_of_runs"].values()]
    return not any(c.get("unlocked") or c.get("update_probability", 1.0) != 1.0 for c in configs)


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables of an entry: every cell by seed, mean, spread and interval, beside the published; or else the program's own."""
    view, entry_module = _view(found), importlib.import_module(f"dni_rl.experiments.{found['program']}")
    scored = [(score, _rows(found, score)) for score in view.scores]
    if not any(rows for _, rows in scored):
        yield entry_module.table(found["summary"])
        yield from _part_tables(found["summary"].get("parts", {}))
        return
    for score, rows in scored:
        published = score.published if score.published and _is_as_published(found) else None
        more = {title: key for title, key in score.more.items() if any(row.get(key) is not None for row, _ in rows)}
        header = ["arm", view.dial, f"{score.label}, by seed", "mean", "std", "95 % interval"]
        lines = []
        for row, per_seed in rows:
            estimate = mean(per_seed.values())
            line = [
                f"`{row['arm']}`",
                _window(row),
                " ".join(_number(value, score) or "-" for value in per_seed.values()),
                _number(estimate.value, score),
                _number(estimate.std, score),
                estimate.interval(score.digits, score.scale),
            ]
            line += [_number(row.get(published), score)] if published else []
            line += [_ratio(row.get(key)) for key in more.values()]
            lines.append([*line, None if row.get("seconds") is None else round(row["seconds"])])
        yield common.markdown([*header, *(["published"] if published else []), *more, "seconds"], lines)
    if view.note:
        named = {name: f"`{found['summary'].get(name)}`" for name in ("baseline", "full")}
        yield _wrapped(view.note.format_map(named))


def _part_tables(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Intervals of the errors in those parts of a summary that have some by seed."""
    for part, of_part in parts.items():
        rows = [row for row in of_part.get("rows", ()) if isinstance(row.get("per_seed"), list)]
        if rows:
            lines = []
            for row in rows:
                estimate = mean(row["per_seed"])
                by_seed = " ".join(_number(value, _ERROR) or "-" for value in row["per_seed"])
                figures = (_number(value, _ERROR) for value in (estimate.value, estimate.std))
                interval = estimate.interval(_ERROR.digits, _ERROR.scale)
                lines.append([f"`{row['arm']}`", by_seed, *figures, interval])
            header = (f"{part}: arm", f"{_ERROR.label}, by seed", "mean", "std", "95 % interval")
            yield common.markdown(header, lines)


def _number(value: float | None, score: Score) -> str | None:
    if value is None:
        return None
    return str(value) if isinstance(value, int) else f"{score.scale * value:.{score.digits}f}"


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


@dataclass(frozen=True)
class Comparison:
    """One line of what a page compares.

    Attributes:
        text: what is compared.
        estimate: of the difference or ratio.
        digits: of it, after the point.
        published: of the same.
        at_most: a bar, in the estimate's unit.
        at_least: the other kind.
    """

    text: str
    estimate: Estimate
    digits: int = 2
    published: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    def verdict(self) -> str | None:
        """ "yes" if the whole interval keeps the bar, "on average" if the mean does, otherwise "no"; None without a bar."""
        if self.estimate.value is None or self.bar() is None:
            return None

        def keeps(value: float | None) -> bool:
            if value is None:
                return False
            return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)

        whole = keeps(self.estimate.low) and keeps(self.estimate.high)
        return "yes" if whole else "on average" if keeps(self.estimate.value) else "no"

    def bar(self) -> str | None:
        """In words."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return None if self.at_least is None else f"at least {self.at_least:g}"


Scores = dict[tuple[str, int], dict[str, float | None]]  # by arm and window, then by seed


def _scores(found: Mapping[str, Any] | None, score: Score) -> Scores:
    if found is None:
        return {}
    return {(row["arm"], _window(row)): per_seed for row, per_seed in _rows(found, score)}


def _points(of: Mapping[str, float | None], baseline: Mapping[str, float | None]) -> Estimate:
    """Difference of two errors, in per cent."""
    as_percent = [{s: None if v is None else _ERROR.scale * v for s, v in errors.items()} for errors in (of, baseline)]
    return difference(*as_percent)


def _published(found: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    rows = _rows(found, _ERROR)
    return {(row["arm"], _window(row)): row["published"] for row, _ in rows if row.get("published") is not None}


def images_comparisons(sections: Mapping[str, dict[str, Any]]) -> Iterator[Comparison]:
    """Errors less backpropagation's, and those of random or unlocked updates less those of the same arm without."""
    for name, found in sections.items():
        scores, published = _scores(found, _ERROR), _published(found)
        for (arm, layers), errors in scores.items():
            baseline = ("backprop", layers)
            if arm != "backprop" and baseline in scores:
                known = (arm, layers) in published and baseline in published
                yield Comparison(
                    f"{name}: `{arm}` less `backprop`, {layers} layers, points",
                    _points(errors, scores[baseline]),
                    published=_ERROR.scale * (published[arm, layers] - published[baseline]) if known else None,
                    at_most={("images", "cdni"): 0.3, ("images", "dni"): 1.5}.get((name, arm)),
                )
    plain = _scores(sections.get("images"), _ERROR)
    for name, at_most in (("images_p0.2", 0.5), ("images_unlocked", None)):
        for cell, errors in _scores(sections.get(name), _ERROR).items():
            if cell in plain:
                text = f"{name} less images: `{cell[0]}`, {cell[1]} layers, points"
                yield Comparison(text, _points(errors, plain[cell]), at_most=at_most)


def copy_comparisons(sections: Mapping[str, dict[str, Any]]) -> Iterator[Comparison]:
    """Lengths solved over those of truncated BPTT at the same window."""
    (score,) = VIEWS["copy"].scores
    for name, found in sections.items():
        published = {(row["arm"], row["window"]): row["published_ratio"] for row, _ in _rows(found, score)}
        scores = _scores(found, score)
        for (arm, window), lengths in scores.items():
            baseline = [x for x in scores.get(("none", window), {}).values() if x is not None]
            if arm != "none" and baseline:
                yield Comparison(
                    f"{name}: `{arm}` over `none`, window {window}",
                    ratio([x for x in lengths.values() if x is not None], baseline),
                    published=published[arm, window],
                    at_least=1.7 if (name, arm) == ("copy", "dni") else None,
                )


def ptb_comparisons(sections: Mapping[str, dict[str, Any]]) -> Iterator[Comparison]:
    """Bits less those of truncated BPTT at its longest window, which is to be matched by DNI at window 5."""
    for name, found in sections.items():
        scores = _scores(found, VIEWS["ptb"].scores[0])
        published = {(row["arm"], row["window"]): row["published"] for row, _ in _rows(found, VIEWS["ptb"].scores[0])}
        windows = {window for arm, window in scores if arm == "none"}
        for longest in sorted({max(windows, default=0), 20} & windows):
            baseline = ("none", longest)
            for cell, bits in scores.items():
                if cell[0] != "none":
                    known = published[cell] is not None and published[baseline] is not None
                    yield Comparison(
                        f"{name}: `{cell[0]}` at window {cell[1]} less `none` at {longest}, bits",
                        difference(bits, scores[baseline]),
                        digits=4,
                        published=published[cell] - published[baseline] if known else None,
                        at_most=0.0 if (cell, longest) == (("dni", 5), 20) else None,
                    )


def sequential_comparisons(sections: Mapping[str, dict[str, Any]]) -> Iterator[Comparison]:
    """Errors less those of truncated BPTT at the same window."""
    for found in sections.values():
        scores = _scores(found, _ERROR)
        for (arm, window), errors in scores.items():
            if arm != "none" and ("none", window) in scores:
                text = f"`{arm}` less `none`, window {window}, points"
                yield Comparison(text, _points(errors, scores["none", window]))


COMPARISONS: dict[str, Callable[[Mapping[str, dict[str, Any]]], Iterator[Comparison]]] = {
    "images": images_comparisons,
    "copy": copy_comparisons,
    "ptb": ptb_comparisons,
    "sequential_mnist": sequential_comparisons,
}


def comparison_table(sections: Mapping[str, dict[str, Any]]) -> str | None:
    """What a page's program compares, with bars where there are some; None if there is nothing to compare."""
    compare = COMPARISONS.get(next(iter(sections.values()))["program"])
    lines = list(compare(sections)) if compare else []
    if not lines:
        return None
    has_published, has_bar = any(x.published is not None for x in lines), any(x.bar() for x in lines)
    header = ["comparison", "mean and 95 % interval", *(["published"] if has_published else [])]
    rows = [
        [
            line.text,
            line.estimate.shown(line.digits),
            *([None if line.published is None else f"{line.published:.{line.digits}f}"] if has_published else []),
            *([line.bar(), line.verdict()] if has_bar else []),
        ]
        for line in lines
    ]
    shown = common.markdown([*header, *(["bar", "kept"] if has_bar else [])], rows)
    return f"{shown}\n\nKept: by the whole interval (yes), or by the mean alone (on average)." if has_bar else shown


# Figures


def _lines(found: Mapping[str, Any], axis: str, name: str) -> dict[tuple[str, int], list[tuple[Any, Any]]]:
    """Curves by arm and window."""
    lines: dict[tuple[str, int], list[tuple[Any, Any]]] = {}
    for curve in found["curves"].values():
        if curve.get(axis) and curve.get(name):
            lines.setdefault((curve["arm"], curve["window"]), []).append((curve[axis], curve[name]))
    return lines


def curves_figure(sections: Mapping[str, dict[str, Any]], path: Path) -> bool:
    """Learning curves, a thin line for each seed and a thick one for their mean. Returns whether there was anything to draw."""
    panels: list[tuple[str, str, str, float, dict[tuple[str, int], list[tuple[Any, Any]]]]] = []
    for entry, found in sections.items():
        view = _view(found)
        for axis in view.axes:
            for name, (label, scale) in view.curves.items():
                lines = _lines(found, axis, name)
                windows = sorted({window for _, window in lines}) if view.each_window else [None]
                for window in windows:
                    chosen = {cell: drawn for cell, drawn in lines.items() if window in (None, cell[1])}
                    title = entry if window is None else f"{entry}, window {window}"
                    if chosen:
                        panels.append((title, axis, label, scale, chosen))
    if not panels:
        return False
    wide = min(4, len(panels))
    chart, axes = _chart(math.ceil(len(panels) / wide), wide)
    cells = list(dict.fromkeys(cell for *_, lines in panels for cell in lines))
    arms = list(dict.fromkeys(arm for arm, _ in cells))
    for panel, (title, axis, label, scale, lines) in zip(axes, panels, strict=False):
        several = len({window for _, window in lines}) > 1  # a colour for each cell, otherwise for each arm
        for cell, drawn in lines.items():
            number, count = (cells.index(cell), len(cells)) if several else (arms.index(cell[0]), len(arms))
            colour = _colour(number, count)
            for x, y in drawn:
                panel.plot(x, scale * np.asarray(y, float), color=colour, alpha=0.3, linewidth=0.7)
            grid = np.linspace(min(x[0] for x, _ in drawn), min(x[-1] for x, _ in drawn), 200)
            curve = scale * np.mean([np.interp(grid, x, y) for x, y in drawn], axis=0)
            panel.plot(grid, curve, color=colour, linewidth=1.8, label=f"{cell[0]}@{cell[1]}" if several else cell[0])
        panel.set_title(title, fontsize=8)
        panel.set_xlabel(axis, fontsize=7)
        panel.set_ylabel(label, fontsize=7)
        panel.legend(fontsize=6)
    _save(chart, axes[len(panels) :], path)
    return True


def windows_figure(sections: Mapping[str, dict[str, Any]], path: Path) -> bool:
    """Scores against windows, with their intervals, the published ones dashed. Returns whether there was anything to draw."""
    shown = []
    for entry, found in sections.items():
        view = _view(found)
        scores = _scores(found, view.scores[0]) if view.against_window else {}
        if len({window for _, window in scores}) > 1:
            shown.append((entry, view.scores[0], found, scores))
    if not shown:
        return False
    chart, axes = _chart(1, len(shown))
    for panel, (entry, score, found, scores) in zip(axes, shown, strict=True):
        arms = list(dict.fromkeys(arm for arm, _ in scores))
        published = {(row["arm"], _window(row)): row.get(score.published) for row, _ in _rows(found, score)}
        for number, arm in enumerate(arms):
            colour = _colour(number, len(arms))
            cells = sorted((window, mean(scores[a, window].values())) for a, window in scores if a == arm)
            points = [(window, estimate) for window, estimate in cells if estimate.value is not None]
            if points:
                x, y = zip(*[(w, score.scale * (e.value or 0.0)) for w, e in points], strict=True)
                panel.plot(x, y, "o-", color=colour, markersize=3, label=arm)
            for window, estimate in points:
                if estimate.low is not None and estimate.high is not None:
                    ends = [score.scale * estimate.low, score.scale * estimate.high]
                    panel.plot([window] * 2, ends, color=colour, linewidth=1.0)
            known = sorted((w, score.scale * v) for (a, w), v in published.items() if a == arm and v is not None)
            if known:
                panel.plot(*zip(*known, strict=True), "--", color=colour, linewidth=1.0, label=f"{arm}, published")
        panel.set_title(entry, fontsize=8)
        panel.set_xlabel(_view(found).dial, fontsize=7)
        panel.set_ylabel(score.label, fontsize=7)
        panel.legend(fontsize=6)
    _save(chart, (), path)
    return True


def _chart(rows: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    chart = Figure(figsize=(3.4 * columns, 2.7 * rows), dpi=100, layout="constrained")
    return chart, list(chart.subplots(rows, columns, squeeze=False).ravel())


def _save(chart: Any, empty: Iterable[Any], path: Path) -> None:
    for panel in chart.axes:
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=6)
    for panel in empty:
        panel.set_axis_off()
    chart.savefig(path)


def _colour(number: int, count: int) -> Any:
    from matplotlib import colormaps

    palette = colormaps["tab10" if count <= 10 else "tab20"]
    return palette(number % palette.N)


# Pages

Content = dict[str, dict[str, dict[str, Any]]]  # sections by preset and entry


def page_text(page: str, content: Content, pictures: Mapping[str, Sequence[str]]) -> str:
    """A page without what is written by hand.

    Args:
        page: its name.
        content: all that it shows.
        pictures: file names by preset.
    """
    title, intro = _words(page, content)
    lines = [
        f"# {title}",
        "",
        _wrapped(intro),
        "",
        _wrapped(
            f"Made by `{MADE_BY}` from the runs of the commands below; settings, curves and all figures are in [{page}.json]({page}.json). "
            "Intervals over seeds are t intervals, those of ratios percentile bootstraps. Seconds are of one run's training. Published "
            "figures are of the papers' settings, whatever the preset."
        ),
    ]
    for preset, sections in content.items():
        lines += ["", f"## Preset `{preset}`"]
        for entry, found in sections.items():
            lines += ["", f"### {entry}"] if len(sections) > 1 else []
            lines += ["", f"    {found['command']}", "", _about(found)]
            for table in tables(found):
                lines += ["", table]
        compared = comparison_table(sections)
        lines += ["", *(["### Compared", ""] if len(sections) > 1 else []), compared] if compared else []
        for picture in pictures[preset]:
            lines += ["", f"![{Path(picture).stem.replace('_', ' ')}]({picture})"]
    return "\n".join(lines) + "\n"


def _words(page: str, content: Content) -> tuple[str, str]:
    """Title and introduction."""
    if page in TITLES:
        return TITLES[page]
    found = next(iter(next(iter(content.values())).values()))
    documentation = importlib.import_module(f"dni_rl.experiments.{found['program']}").__doc__ or ""
    return page.replace("_", " ").capitalize(), documentation.strip().partition("\n")[0]


def _about(found: Mapping[str, Any]) -> str:
    """How complete the runs of an entry are, where they were made, and what they have in common."""
    seeds = ", ".join(map(str, found["seeds"]))
    state = "All" if found["finished"] == found["planned"] else "**Not complete:**"
    lines = [f"{state} {found['finished']} of {found['planned']} runs, seeds: {seeds}."]
    if found["missing"]:
        lines.append(_wrapped(f"Not finished when this page was made: {', '.join(found['missing'])}."))
    for name, why in found["left_out"].items():
        lines.append(f"Left out: {name} ({why}).")
    lines += _made_on(found["machines"])
    hidden = (*FREE_FIELDS, "arm", "seed")
    settings = [f"{name} {_setting(value)}" for name, value in found["settings"].items() if name not in hidden]
    return "\n".join(lines) + "\n\n" + _wrapped(f"Settings of all of them: {', '.join(settings)}.")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 140, break_long_words=False, break_on_hyphens=False)


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + " ".join(map(str, value)) + ")"
    return f"{value:,}" if type(value) is int else str(value)


def _made_on(machines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each machine that made runs, with the days."""
    days: dict[str, list[str]] = {}
    for call in machines:
        gpu = f"{call['gpu']}, " if call["gpu"] else ""
        what = f"{gpu}{call['processor']}, {call['cores']} cores, PyTorch {call['torch']}"
        days.setdefault(what, []).append(call["date"][:10])
    for what, dates in days.items():
        span = min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"
        yield f"Made on {what}, {span}."


def write_page(page: str, entries: Sequence[Entry], presets: Sequence[str], runs: Path, output: Path) -> str | None:
    """Writes a page with its figures and its JSON.

    Args:
        page: its name.
        entries: that it shows.
        presets: whose runs to look for.
        runs: folder of all.
        output: folder of the pages.

    Returns:
        In one line what there is, for the list of pages; None if there is nothing, or the page was written by hand.

    Raises:
        ValueError: if a program refuses an entry's options.
    """
    file, beside = output / f"{page}.md", output / f"{page}.json"
    earlier = file.read_text(encoding="utf-8") if file.exists() else ""
    new: Content = {}
    for preset in presets:
        found = {entry.name: section(entry, preset, runs / preset / entry.name) for entry in entries}
        new[preset] = {name: of_entry for name, of_entry in found.items() if of_entry is not None}
    if not any(new.values()):
        return None
    if earlier and MADE_BY not in earlier and READING not in earlier:
        print(
            f"{file}: found a page written by hand; left alone. Put {READING} before what is to stay, and it is made anew above it",
            file=sys.stderr,
        )
        return None
    kept = _read_json(beside, {}).get("presets", {})
    content: Content = {}
    for preset in PRESETS:
        of_old = {} if preset == "smoke" else kept.get(preset, {})
        both = {**of_old, **new.get(preset, {})}
        if both:
            content[preset] = {entry.name: both[entry.name] for entry in entries if entry.name in both}
    output.mkdir(parents=True, exist_ok=True)
    pictures = {preset: _draw(page, preset, content[preset], runs, output) for preset in content}
    text = page_text(page, content, pictures)
    _, mark, reading = earlier.partition(READING)
    file.write_text(text + (f"\n{mark}{reading}" if mark else ""), encoding="utf-8")
    beside.write_text(json.dumps({"presets": content}, indent=None) + "\n", encoding="utf-8")
    of_presets = []
    for preset, sections in content.items():
        finished, all_of_them = (sum(found[key] for found in sections.values()) for key in ("finished", "planned"))
        of_presets.append(f"`{preset}`, {finished} of {all_of_them} runs")
    return f"- [{page}]({page}.md): {_words(page, content)[0]}; {'; '.join(of_presets)}."


def _draw(page: str, preset: str, sections: Mapping[str, dict[str, Any]], runs: Path, output: Path) -> list[str]:
    """Draws the figures of a preset, takes over those that its programs drew, and returns the names of all that there are."""
    stem = f"{page}_{preset}"
    curves_figure(sections, output / f"{stem}.png")
    windows_figure(sections, output / f"{stem}_windows.png")
    for entry in sections:
        for drawn in (runs / preset / entry).glob("*.png"):
            copy = output / f"{stem}_{drawn.name}"
            shutil.copyfile(drawn, copy)
            if copy.stat().st_size > MAX_PICTURE_BYTES:
                with Image.open(drawn) as picture:
                    picture.convert("RGB").quantize(64).save(copy, optimize=True)
    return sorted(picture.name for picture in output.glob(f"{stem}*.png"))


def write_list(output: Path, lines: Mapping[str, str]) -> None:
    """Puts lines into the list of pages, README.md, between two marks; those of pages that were not made now stay."""
    path = output / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if LIST_START not in text or LIST_END not in text:
        return
    before, _, rest = text.partition(LIST_START)
    block, _, after = rest.partition(LIST_END)
    there = {line[3:].partition("]")[0]: line for line in block.strip().splitlines() if line.startswith("- [")}
    there |= lines
    block = "\n".join(there[page] for page in [*dict.fromkeys(_pages())] if page in there)
    path.write_text(f"{before}{LIST_START}\n\n{block}\n\n{LIST_END}{after}", encoding="utf-8")


def _pages() -> list[str]:
    return list(dict.fromkeys(entry.page or entry.name for entry in ENTRIES))


def report(presets: Sequence[str], runs: Path, output: Path) -> int:
    """Writes all pages. Returns 1 if there was nothing to write, otherwise 0."""
    lines: dict[str, str] = {}
    for page in _pages():
        of_page = [entry for entry in ENTRIES if (entry.page or entry.name) == page]
        try:
            line = write_page(page, of_page, presets, runs, output)
        except ValueError as problem:
            print(f"experiments.py: {problem}", file=sys.stderr)
            continue
        if line is not None:
            lines[page] = line
            print(line)
    if not lines:
        print(
            f"--runs: found no finished runs of preset {' or '.join(presets)} in {runs}; make some with `experiments.py run`",
            file=sys.stderr,
        )
        return 1
    write_list(output, lines)
    return 0


# Command line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    run = commands.add_parser("run", help="carry out what is left of the entries")
    run.add_argument("--preset", choices=PRESETS, default="smoke")
    run.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(entry.name for entry in ENTRIES)}")
    run.add_argument("--jobs", type=int, help="runs of an entry at a time; by default the preset's")
    run.add_argument("--device", help="cpu, cuda, ...; by default the preset's")
    write = commands.add_parser("report", help="write the pages from the runs that are there")
    write.add_argument("--preset", nargs="+", choices=PRESETS, default=["laptop", "paper"], dest="presets")
    write.add_argument("--output", type=Path, default=PAGES, help="folder of the pages")
    for command in (run, write):
        command.add_argument("--runs", type=Path, default=RUNS, help="folder of all runs, as <preset>/<entry>")
    option = parser.parse_args(arguments)
    if option.what == "report":
        if "smoke" in option.presets and option.output == PAGES:
            write.error(
                f"--preset: found smoke, whose runs show nothing but that they run; allowed with an --output beside {PAGES}"
            )
        return report(option.presets, option.runs, option.output)
    if option.jobs is not None and option.jobs < 1:
        run.error(f"--jobs: found {option.jobs}; allowed an integer of at least 1")
    names = [entry.name for entry in ENTRIES]
    if unknown := sorted(set(option.only or ()) - set(names)):
        run.error(f"--only: found {' '.join(unknown)}; allowed {', '.join(names)}")
    chosen = [entry for entry in ENTRIES if entry.name in (option.only or names)]
    return run_all(chosen, option.preset, option.runs, option.jobs, option.device)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    sys.exit(main())
