"""The matrix of a comparison: methods, windows, tasks and seeds of one YAML file, as runs."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.config import from_dict, load_config, load_yaml, to_dict

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {"title", "config", "metric", "bar", "seeds", "tasks", "methods"}
OPTIONAL = {"windows", "dial", "overrides"}
WINDOW = "algorithm.bptt_horizon"
METRICS = ("charts/", "losses/", "sg/", "credit/", "bptt/")  # groups of what train.py logs


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
        return "_".join(safe_name(part) for part in (self.method, self.task, f"seed{self.seed}"))

    @property
    def total_steps(self) -> int:
        """Length of the run in agent steps."""
        return self.resolved()["run"]["total_steps"]

    def resolved(self) -> dict[str, dict[str, Any]]:
        """The full configuration. ValueError if a setting is unknown or bad."""
        data = to_dict(load_config(ROOT / self.config))
        for name, value in {**self.settings, "run.seed": self.seed}.items():
            section, *inner, key = name.split(".") if "." in name else ("", name)
            if not section:
                raise ValueError(
                    f"{name}: found a setting without a section; allowed <section>.<name>, as train.py's options"
                )
            target = data.setdefault(section, {})
            for step in inner:
                target = target.setdefault(step, {})
            target[key] = value
        return to_dict(from_dict(data))


def load_matrix(path: Path) -> dict[str, Any]:
    """Reads the YAML file, with every window written out as a method and every dial as a number.

    Raises:
        SystemExit: with one line, if keys are unknown or missing, or say what cannot be.
    """
    try:
        matrix = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:  # which text that is not UTF-8 is
        raise SystemExit(f"compare.py: {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(matrix, Mapping):
        raise SystemExit(f"compare.py: {path}: found no keys; allowed {sorted(REQUIRED | OPTIONAL)}")
    unknown, missing = set(matrix) - REQUIRED - OPTIONAL, REQUIRED - set(matrix)
    if unknown or missing:
        raise SystemExit(
            f"compare.py: {path}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}; allowed {sorted(REQUIRED | OPTIONAL)}"
        )
    matrix = {"windows": [], "dial": None, "overrides": {}, **matrix}
    try:
        _check_seeds("seeds", matrix["seeds"])
        if isinstance(matrix["bar"], bool) or not isinstance(matrix["bar"], int | float):
            raise ValueError(f"bar: found {matrix['bar']!r}; allowed a number, in the metric's unit")
        if not str(matrix["metric"]).startswith(METRICS):
            raise ValueError(
                f"metric: found {matrix['metric']!r}; allowed a name of metrics.jsonl, beginning with {' or '.join(METRICS)}"
            )
        for group in ("tasks", "methods"):  # a name without settings is one that changes nothing
            if not isinstance(matrix[group], Mapping) or not matrix[group]:
                raise ValueError(f"{group}: found {matrix[group]!r}; allowed names with their settings")
            matrix[group] = {str(name): settings or {} for name, settings in matrix[group].items()}
        matrix["methods"] = _at_windows(matrix["methods"], matrix["windows"])
        matrix["dial_name"], matrix["dials"] = _dials(matrix["dial"], matrix["tasks"])
        pairs = [f"{method} / {task}" for method in matrix["methods"] for task in matrix["tasks"]]
        for pair, special in matrix["overrides"].items():
            if pair not in pairs:
                raise ValueError(f"overrides: found {pair!r}; allowed '<method> / <task>' of those above")
            _check_seeds(f"overrides: {pair}: seeds", (special or {}).get("seeds", matrix["seeds"]))
        folders = [member.name for member in members(matrix)]
        if twice := sorted({name for name in folders if folders.count(name) > 1}):
            raise ValueError(
                f"tasks, methods: found two runs for the folder {twice[0]!r}; allowed names that differ in letters or digits"
            )
        for (method, task), cell in {(m.method, m.task): m for m in members(matrix)}.items():
            try:
                cell.resolved()
            except ValueError as error:
                raise ValueError(f"{method} / {task}: {error}") from None
    except ValueError as error:
        raise SystemExit(f"compare.py: {path}: {error}") from None
    return matrix


def _check_seeds(name: str, seeds: Any) -> None:
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(seed) is int for seed in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise ValueError(f"{name}: found {seeds!r}; allowed a list of integers, each named once")


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
    cells = [(method, task) for task in matrix["tasks"] for method in matrix["methods"]]
    seeds = {cell: seeds_of(matrix, *cell) for cell in cells}
    for seed in dict.fromkeys(itertools.chain.from_iterable(seeds.values())):
        for method, task in cells:
            if seed in seeds[method, task]:
                special = matrix["overrides"].get(f"{method} / {task}", {})
                settings = {**matrix["tasks"][task], **matrix["methods"][method], **special}
                yield Member(method, task, seed, matrix["config"], {k: v for k, v in settings.items() if k != "seeds"})


def seeds_of(matrix: dict[str, Any], method: str, task: str) -> list[int]:
    """Of a method on a task: the matrix's, unless an override has others; none where it is left out."""
    special = matrix["overrides"].get(f"{method} / {task}", {})
    return [] if special is None else special.get("seeds", matrix["seeds"])


def is_left_out(matrix: dict[str, Any], method: str, task: str) -> bool:
    """Whether a method is on purpose not run on a task."""
    return not seeds_of(matrix, method, task)


def safe_name(text: str) -> str:
    """A text as part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in text)
