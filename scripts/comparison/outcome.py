"""What finished runs measured, and its statistics over seeds."""

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from agents.metrics import read_metrics
from comparison.matrix import Member, members
from comparison.running import (
    EXPERIMENT,
    full_settings,
    is_done,
    is_finished,
    made_with_other_settings,
    measured,
    missing_metric,
    other_setting,
    read_record,
)
from intervals import FEWEST_VALUES, percentile_interval

REACHES = 0.9  # of the dial: an expected horizon that long foretells success; see `foretelling`


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean and its interval.

    Attributes:
        value: the mean of the middle half, or with fewer than four values that of all.
        low: lower end of the 95 % interval; None with fewer than five values in a stratum, of which it would cover far less.
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


def refusal(matrix: dict[str, Any], member: Member, runs: Path) -> str | None:
    """Why a run that is there does not count as the member, in one line; None if it does, or there is none."""
    return made_with_other_settings(member, runs) or missing_metric(member, runs, matrix["metric"])


def _counts(matrix: dict[str, Any], member: Member, runs: Path) -> bool:
    """Whether a report has the member from its run."""
    return is_finished(member, runs) and missing_metric(member, runs, matrix["metric"]) is None


def kept_rows(matrix: dict[str, Any], runs: Path, file: Path) -> dict[str, dict[str, Any]]:
    """What an earlier report has of finished members that have no finished run here, by name.

    Args:
        matrix: of `load_matrix`.
        runs: folder of the runs.
        file: JSON of a report; rows that were made with other settings than the matrix's, or for another metric or bar, are left
            out.

    Raises:
        ValueError: if there is no such file, or it is not that of a report.
    """
    earlier = _earlier_report(matrix, runs, file)
    experiments, kept = {}, {}
    for pair, sections in earlier.settings.items():
        with contextlib.suppress(ValueError):  # which train.py refuses today
            experiments[pair] = full_settings(sections)
    for member in members(matrix):
        row, then = earlier.rows.get(member.name), experiments.get(f"{member.method} / {member.task}")
        if row is None or then is None or row["total_steps"] != member.total_steps:
            continue
        measures_the_same = all(row.get(name, matrix[name]) == matrix[name] for name in ("metric", "bar"))
        if measures_the_same and other_setting(member.resolved(), then) is None:
            kept[member.name] = row
    return kept


def check_nothing_is_lost(matrix: dict[str, Any], runs: Path, file: Path, found: Collection[str]) -> None:
    """Refuses to write a report over an earlier one that has more of the matrix.

    Args:
        matrix: of `load_matrix`.
        runs: folder of the runs.
        file: JSON of the report; there may be none.
        found: names of the members that the new report will have, whether or not they have a run here yet.

    Raises:
        ValueError: if finished members of the earlier report would be missing from the new one, or nobody can tell.
    """
    if not file.exists():
        return
    is_whole = all(member.name in found or _counts(matrix, member, runs) for member in members(matrix))
    try:
        earlier = _earlier_report(matrix, runs, file)
    except ValueError:
        if is_whole:
            return
        raise
    if earlier.unnamed:
        method, task, seed = earlier.unnamed[0]
        raise ValueError(
            f"found {file}, which has finished runs that the matrix does not name ({len(earlier.unnamed)}, such as {method!r} on {task!r}, "
            f"seed {seed}); allowed a report that loses none; name them as they are there, rename them there, or choose another --report"
        )
    lost = [name for name in earlier.rows if name not in found]
    if not lost:
        return
    kept = kept_rows(matrix, runs, file)
    others = [name for name in lost if name not in kept]
    way_out = "keep them with --keep, or choose another --report"
    if others:
        way_out = (
            f"those of other settings than the matrix's ({len(others)}, such as {others[0]}) cannot be kept: choose another --report, or "
            "remove that file to start anew"
        )
    refused = {m.name: why for m in members(matrix) if m.name in others and (why := refusal(matrix, m, runs))}
    if refused:
        name = next(iter(refused))
        way_out = f"undo the change of the matrix, or choose another --runs and --report; {name}: {refused[name]}"
    where = "" if lost[0] in refused else f", not in {runs}"
    raise ValueError(
        f"found {file}, which has finished runs that the new report would lack ({len(lost)}, such as {lost[0]}{where}); "
        f"allowed a report that loses none; {way_out}"
    )


def kept_failures(matrix: dict[str, Any], runs: Path, file: Path) -> dict[str, str]:
    """Why members failed that have no folder here, by name, as an earlier report has it; see `kept_rows`."""
    failures = _earlier_report(matrix, runs, file).failures
    return {m.name: failures[m.name] for m in members(matrix) if m.name in failures and not (runs / m.name).exists()}


@dataclass(frozen=True)
class _EarlierReport:
    """What the JSON of a report has.

    Attributes:
        rows: of members that have no finished run here, by name.
        unnamed: method, task and seed of finished runs that are no members.
        settings: sections of the configuration by "<method> / <task>".
        failures: reasons by name of the member.
    """

    rows: dict[str, dict[str, Any]]
    unnamed: list[tuple[str, str, int]]
    settings: dict[str, dict[str, Any]]
    failures: dict[str, str]


def _earlier_report(matrix: dict[str, Any], runs: Path, file: Path) -> _EarlierReport:
    """Reads it. ValueError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        earlier = {(row["method"], row["task"], row["seed"]): row for row in content["rows"] if row["finished"]}
        settings, failures = dict(content["settings"]), dict(content.get("failures", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        way_out = "remove it to start anew" if file.exists() else "leave --keep out"
        raise ValueError(
            f"found {file}, which cannot be read ({error!r}); allowed the JSON of a report with rows and settings; {way_out}, or choose "
            "another --report"
        ) from None
    rows = {
        member.name: earlier[member.method, member.task, member.seed]
        for member in members(matrix)
        if (member.method, member.task, member.seed) in earlier and not _counts(matrix, member, runs)
    }
    named = {(member.method, member.task, member.seed) for member in members(matrix)}
    return _EarlierReport(rows, [key for key in earlier if key not in named], settings, failures)


def settings_of(matrix: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What makes the experiments that the rows are of, by "<method> / <task>": sections of the configuration."""
    there = {(row["method"], row["task"]) for row in rows}
    pairs = {(m.method, m.task): m for m in members(matrix) if (m.method, m.task) in there}
    resolved = {f"{method} / {task}": member.resolved() for (method, task), member in pairs.items()}
    return {pair: {name: sections[name] for name in EXPERIMENT} for pair, sections in resolved.items()}


def collect(
    matrix: dict[str, Any], runs: Path, kept: Mapping[str, dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """One row per member that has begun, with its curve, or that is `kept`. Runs made with other settings are left out."""
    rows = []
    for member in members(matrix):
        if kept is not None and member.name in kept:
            rows.append(kept[member.name])
            continue
        folder = runs / member.name
        try:
            logged = read_metrics(folder)
        except ValueError:
            continue
        metrics = [row for row in logged if np.isfinite(row.get(matrix["metric"], np.nan))]
        speeds = [row["charts/SPS"] for row in logged if "charts/SPS" in row]  # a horizon may have a row of its own
        if not metrics or not speeds or made_with_other_settings(member, runs):
            continue
        record, horizons = read_record(folder), measured(logged, "credit/horizon")
        steps, curve = [int(row["step"]) for row in metrics], [row[matrix["metric"]] for row in metrics]
        reached = next((s for s, x in zip(steps, curve, strict=True) if x >= matrix["bar"]), None)
        learning = [value for step, value in horizons.items() if reached is None or step < reached]
        expected = {
            step: value
            for step, value in measured(logged, "credit/expected_horizon").items()
            if reached is None or step < reached
        }
        dial = matrix["dials"].get(member.task, math.inf)
        rows.append(
            {
                "method": member.method,
                "task": member.task,
                "seed": member.seed,
                "metric": matrix["metric"],
                "bar": matrix["bar"],
                "total_steps": member.total_steps,
                "finished": is_done(folder, member.total_steps),
                "end": curve[-1],
                "best": max(curve),
                "area": area_under(steps, curve, member.total_steps),
                "steps_to_bar": reached,
                "steps_per_second": speeds[-1],
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

    Seeds are drawn again within each stratum, so that every task keeps its weight (Agarwal et al. 2021, section 4.1): a task weighs as
    much as it has values. With fewer than four values nothing is cut off, and this is the mean. With fewer than five in a stratum there
    is no interval, which would cover far less than it says.

    Args:
        strata: the values of each task, at least one, and as many of each as of the others where tasks are to weigh the same.
    """
    samples = [np.asarray(values, float) for values in strata]
    pooled = np.concatenate(samples)
    value = float(trim_mean(pooled, 0.25))
    if min(map(len, samples)) < FEWEST_VALUES:
        return Estimate(value, None, None, len(pooled))
    low, high = percentile_interval(
        samples, lambda *drawn, axis: trim_mean(np.concatenate(drawn, axis=axis), 0.25, axis=axis)
    )
    return Estimate(value, low, high, len(pooled))


def failed_members(
    matrix: dict[str, Any], rows: Sequence[dict[str, Any]], failures: Mapping[str, str]
) -> set[tuple[str, str, int]]:
    """Method, task and seed of the members that have failed and did not finish: a measurement after the end that failed, or a second
    process that was refused, makes no second run of one that is there."""
    finished = {(row["method"], row["task"], row["seed"]) for row in rows if row["finished"]}
    return {(m.method, m.task, m.seed) for m in members(matrix) if m.name in failures} - finished


def summarise(
    matrix: dict[str, Any], rows: Sequence[dict[str, Any]], failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Statistics of every method: those of each task under "tasks", and those of all of them.

    Those of all tasks are of the seeds that are finished on every one, so that each task weighs the same for every method; None where
    these are fewer than five, or the method is left out on a task. Only finished seeds count. A task with a failed seed is not solved,
    whatever the others did: leaving out the runs that diverged would flatter the method.
    """
    failed = failed_members(matrix, rows, failures)
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
            reached = [row for row in chosen if row["steps_to_bar"] is not None]
            cells[task] = {
                "dial": matrix["dials"].get(task),
                "num_finished": len(chosen),
                "num_failed": num_failed,
                "num_reached": len(reached),
                "steps_to_bar": _median(row["steps_to_bar"] for row in reached),
                "seconds_to_bar": _median(row["steps_to_bar"] / row["steps_per_second"] for row in reached),
                "end": end,
                "area": area,
                "solved": end is not None and not num_failed and end.value >= matrix["bar"],
                "surely_solved": end is not None
                and not num_failed
                and end.low is not None
                and end.low >= matrix["bar"],
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
        finished = {(r["task"], r["seed"]): r for r in rows if r["method"] == method and r["finished"]}
        seeds = sorted(s for s in {seed for _, seed in finished} if all((t, s) in finished for t in matrix["tasks"]))
        together = {
            name: interquartile_mean([[finished[task, s][name] for s in seeds] for task in matrix["tasks"]])
            if len(seeds) >= FEWEST_VALUES
            else None
            for name in ("end", "area")
        }
        lengths = {name: [c["dial"] for c in cells.values() if c[name]] for name in ("solved", "surely_solved")}
        summary.append(
            {
                "method": method,
                "tasks": cells,
                **together,
                "solved_length": max(lengths["solved"], default=None) if matrix["dials"] else None,
                "surely_solved_length": max(lengths["surely_solved"], default=None) if matrix["dials"] else None,
            }
        )
    return summary


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
