"""What the finished runs of an entry left: settings, scores and curves of those that its command plans."""

import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dni_rl.experiments import common
from papers.entries import Entry
from papers.running import RECORD_FILE, read_json

MAX_POINTS = 120  # of a curve, in the JSON
# Settings in which two runs may differ and be of the same experiment.
FREE_FIELDS = ("device", "log_every_steps", "checkpoint_every_steps", "timeout_sec")
# Where the result is that of the last step; elsewhere it is of the best evaluation, or of a curve.
TESTED_AT_THE_END = ("images", "asynchronous")


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


def planned_runs(entry: Entry, preset: str) -> list[str]:
    """Their names, of any program; ValueError as `planned`."""
    if entry.is_matrix:
        return [member.name for member in planned(entry, preset)]
    return [str(run) for run in entry.module.runs(entry.module.make_config(preset))]


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
        found = _finished(folder / member.name, member.config, _free(entry))
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
    machines = read_json(folder / RECORD_FILE, [])
    return {"program": entry.program, "command": entry.command(preset), "machines": machines}


def _free(entry: Entry) -> tuple[str, ...]:
    return (*FREE_FIELDS, "eval_every_steps") if entry.program in TESTED_AT_THE_END else FREE_FIELDS


def _finished(folder: Path, config: Any, free: Collection[str]) -> dict[str, Any] | str | None:
    """The result of a run; None if it is not finished; or why it is no run of this config, in one line."""
    found = read_json(folder / "config.json", None)
    result = read_json(folder / common.RESULT_FILE, None)
    if found is None or result is None:
        return None
    if differs := _difference(found, config, free):
        return f"{differs}; remove its folder and run the entry again"
    # it may be of a shorter run that is being lengthened
    return common.finite(result) if result["steps"] >= config.num_steps else None


def _difference(found: Mapping[str, Any], config: Any, free: Collection[str]) -> str:
    """The first setting in which a run is not of a config, a dataclass, in words; "" if there is none."""
    wanted, defaults = (json.loads(json.dumps(settings)) for settings in (asdict(config), common.defaults(config)))
    found = {**defaults, **found}  # of a setting that was added to the program later
    for name in wanted:
        if name not in free and found[name] != wanted[name]:
            return f"{name}: found a run with {found[name]!r}; allowed {wanted[name]!r}"
    return ""


def fits(entry: Entry, preset: str, found: Mapping[str, Any]) -> bool:
    """Whether the runs of a section, as `section` returned it, are among those that the entry's command stands for now."""
    if not entry.is_matrix:
        return not _difference(found["settings"], entry.module.make_config(preset), _free(entry))
    configs = {member.name: member.config for member in planned(entry, preset)}
    runs = {name: {**found["settings"], **found["settings_of_runs"].get(name, {})} for name in found["curves"]}
    return all(name in configs and not _difference(run, configs[name], _free(entry)) for name, run in runs.items())


def _asynchronous_section(entry: Entry, preset: str, folder: Path) -> dict[str, Any] | None:
    """As `section`, of the program whose runs are rows of one file."""
    results = read_json(folder / "results.json", None)
    if results is None or not results["runs"]:
        return None
    config = entry.module.make_config(preset)
    if differs := _difference(results["config"], config, _free(entry)):
        print(f"{entry.name}: left out: {differs}", file=sys.stderr)
        return None
    names = planned_runs(entry, preset)
    by_label = entry.module.by_label(results).items()
    errors = [{"arm": label, "per_seed": [run["test_error"] for run in runs]} for label, runs in by_label]
    return {
        **_head(entry, preset, folder),
        "planned": len(names),
        "finished": len(results["runs"]),
        "missing": [name for name in names if name not in results["runs"]],
        "left_out": {},
        "seeds": list(config.seeds),
        "settings": results["config"],
        "settings_of_runs": {},
        "summary": _rounded({**results, "parts": {"asynchronous": {"rows": errors}}}),
        "curves": {},
    }


def _shared(configs: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings that all runs have in common, and by run the others."""
    first = next(iter(configs.values()))
    same = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in configs.values())}
    return same, {name: {k: v for k, v in config.items() if k not in same} for name, config in configs.items()}


def _rounded(value: Any) -> Any:
    """Numbers with six digits, None for those that are not finite; the implied loss point by point is left out, as the figure has it."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
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
    names = [name for name in (points[0] if points else ()) if any(isinstance(p[name], int | float) for p in points)]
    numbers = {name: _rounded([point[name] for point in points]) for name in names}
    return {"arm": member.cell.arm, "window": member.cell.window, "seed": member.config.seed, **numbers}
