"""Runs a matrix of methods, tasks and seeds, and writes a report: table, curves, JSON.

    python scripts/compare.py configs/compare/tmaze.yaml --jobs 2 --report docs/results/tmaze

Every member of the matrix is a process of `scripts/train.py`. What is done is skipped, what was interrupted is resumed from its last
checkpoint, and a member that fails is reported and does not stop the others. `--report-only` writes the report of what is there.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agents.checkpoint import CHECKPOINT_FILE
from agents.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"title", "config", "metric", "bar", "seeds", "tasks", "methods", "overrides"}


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
        return "_".join(
            "".join(c if c.isalnum() else "-" for c in part) for part in (self.method, self.task, f"seed{self.seed}")
        )


def load_matrix(path: Path) -> dict[str, Any]:
    """Reads the YAML file; SystemExit with one line if keys are unknown or missing."""
    matrix = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown, missing = set(matrix) - KEYS, KEYS - {"overrides"} - set(matrix)
    if unknown or missing:
        raise SystemExit(
            f"compare.py: {path}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}; allowed {sorted(KEYS)}"
        )
    return {"overrides": {}, **matrix}


def members(matrix: dict[str, Any]) -> Iterator[Member]:
    """All runs, seeds outermost, so that an interrupted matrix has the same number of seeds everywhere."""
    for seed in matrix["seeds"]:
        for task, task_settings in matrix["tasks"].items():
            for method, method_settings in matrix["methods"].items():
                special = matrix["overrides"].get(f"{method} / {task}", {})
                if special is None:  # not to be run
                    continue
                yield Member(method, task, seed, matrix["config"], {**task_settings, **method_settings, **special})


def is_done(folder: Path, total_steps: int) -> bool:
    """Whether the run reached its last step."""
    try:
        return read_metrics(folder)[-1]["step"] >= total_steps
    except (ValueError, IndexError):
        return False


def run(member: Member, runs: Path) -> str | None:
    """Trains one member. Returns None, or the reason why it failed in one line."""
    folder = runs / member.name
    if is_done(folder, int(member.settings["run.total_steps"])):
        return None
    command = [sys.executable, str(ROOT / "scripts" / "train.py")]
    if (folder / CHECKPOINT_FILE).exists():
        command += ["--resume", str(folder)]
    else:
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        command += ["--config", str(ROOT / member.config), "--run.output_dir", str(runs), "--run.name", member.name]
        command += ["--run.seed", str(member.seed), "--run.progress", "false"]
        for key, value in member.settings.items():
            command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode == 0:
        return None
    return (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]


def collect(matrix: dict[str, Any], runs: Path) -> list[dict[str, Any]]:
    """What is there: one row per member that has begun, with its curve."""
    rows = []
    for member in members(matrix):
        try:
            metrics = [
                row for row in read_metrics(runs / member.name) if np.isfinite(row.get(matrix["metric"], np.nan))
            ]
        except ValueError:
            continue
        if metrics:
            rows.append(
                {
                    "method": member.method,
                    "task": member.task,
                    "seed": member.seed,
                    "total_steps": int(member.settings["run.total_steps"]),
                    "finished": is_done(runs / member.name, int(member.settings["run.total_steps"])),
                    "end": metrics[-1][matrix["metric"]],
                    "best": max(row[matrix["metric"]] for row in metrics),
                    "steps_to_bar": next(
                        (int(r["step"]) for r in metrics if r[matrix["metric"]] >= matrix["bar"]), None
                    ),
                    "steps_per_second": metrics[-1]["charts/SPS"],
                    "steps": [int(row["step"]) for row in metrics],
                    "curve": [round(row[matrix["metric"]], 4) for row in metrics],
                }
            )
    return rows


def markdown(matrix: dict[str, Any], rows: list[dict[str, Any]], failures: dict[str, str], command: str) -> str:
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
    return "\n".join(lines) + "\n"


def figure(matrix: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Curves: a panel per task, a colour per method, a line per seed and a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks, methods = list(matrix["tasks"]), list(matrix["methods"])
    chart, panels = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.4), sharey=True, squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        for method, colour in zip(methods, plt.cm.tab10.colors, strict=False):
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
        panels[0][-1].legend(lines.values(), lines, fontsize=7, loc="lower right")
    chart.tight_layout()
    chart.savefig(path, dpi=110)


def main() -> int:
    """Runs the matrix and writes the report. Returns 1 if a member failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, help="YAML file: config, methods, tasks, seeds")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default runs/<name of the file>")
    parser.add_argument("--report", type=Path, help="writes <report>.md, .json and .png; default <runs>/report")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="runs these only; the report has all")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="runs these only; the report has all")
    parser.add_argument("--report-only", action="store_true", help="runs nothing")
    arguments = parser.parse_args()
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
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for number, (member, problem) in enumerate(zip(todo, pool.map(lambda m: run(m, runs), todo), strict=True), 1):
            print(f"{number} of {len(todo)}: {member.name}: {problem or 'done'}", file=sys.stderr, flush=True)
            if problem:
                failures[member.name] = problem
    rows = collect(matrix, runs)
    report = arguments.report or runs / "report"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = f"python scripts/compare.py {arguments.matrix} --jobs {arguments.jobs} --report {report}"
    text = markdown(matrix, rows, failures, command)
    report.with_suffix(".json").write_text(json.dumps(rows), encoding="utf-8")
    figure(matrix, rows, report.with_suffix(".png"))
    report.with_suffix(".md").write_text(f"{text}\n![curves]({report.stem}.png)\n", encoding="utf-8")
    print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
