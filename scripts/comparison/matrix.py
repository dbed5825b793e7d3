"""The matrix of a comparison: methods, windows, tasks and seeds of one YAML file, as runs."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.config import LONGEST_NAME, TrainConfig, from_dict, load_config, load_yaml, to_dict

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {"title", "config", "metric", "bar", "seeds", "tasks", "methods"}
OPTIONAL = {"windows", "dial", "overrides"}
WINDOW = "algorithm.bptt_horizon"
OF_SCRIPT = ("run.seed", "run.name", "run.output_dir")  # what makes each member a run of its own
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
        """The full configuration, the same mappings at every call: not to be changed. ValueError if a setting is unknown or bad."""
        return self._resolved

    @functools.cached_property
    def _resolved(self) -> dict[str, dict[str, Any]]:
        data = to_dict(_base_config(self.config))
        # As train.py has it, env.kwargs first, and then single arguments on top of it.
        for name, value in sorted(self.settings.items(), key=lambda item: item[0].count(".")):
            section, _, key = name.partition(".")
            if not key:
                raise ValueError(
                    f"{name}: found a setting without a section; allowed <section>.<name>, as train.py's options"
                )
            if name in OF_SCRIPT:
                raise ValueError(f"{name}: found {value!r}; allowed what compare.py makes of the matrix; leave it out")
            if not name.startswith("env.kwargs."):
                data.setdefault(section, {})[key] = value
            elif isinstance(kwargs := data["env"]["kwargs"], Mapping):  # otherwise the configuration tells
                data["env"]["kwargs"] = {**kwargs, key.removeprefix("kwargs."): value}
        data["run"]["seed"] = self.seed
        return to_dict(from_dict(data))


@functools.cache
def _base_config(config: str) -> TrainConfig:
    """What all members of a matrix start from."""
    return load_config(ROOT / config)


def load_matrix(path: Path) -> dict[str, Any]:
    """Reads the YAML file, with every window written out as a method, every dial as a number, and all members.

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
        if not isinstance(matrix["config"], str):
            raise ValueError(f"config: found {matrix['config']!r}; allowed a file of configs/")
        if (
            isinstance(matrix["bar"], bool)
            or not isinstance(matrix["bar"], int | float)
            or not math.isfinite(matrix["bar"])
        ):
            raise ValueError(f"bar: found {matrix['bar']!r}; allowed a number, in the metric's unit")
        if not str(matrix["metric"]).startswith(METRICS):
            raise ValueError(
                f"metric: found {matrix['metric']!r}; allowed a name of metrics.jsonl, beginning with {' or '.join(METRICS)}"
            )
        for group in ("tasks", "methods"):  # a name without settings is one that changes nothing
            if not isinstance(matrix[group], Mapping) or not matrix[group]:
                raise ValueError(f"{group}: found {matrix[group]!r}; allowed names with their settings")
            matrix[group] = {str(name): _settings(f"{group}: {name}", value) for name, value in matrix[group].items()}
        matrix["methods"] = _at_windows(matrix["methods"], matrix["windows"])
        matrix["dial_name"], matrix["dials"] = _dials(matrix["dial"], matrix["tasks"])
        pairs = [f"{method} / {task}" for method in matrix["methods"] for task in matrix["tasks"]]
        matrix["overrides"] = _settings("overrides", matrix["overrides"])
        for pair, special in matrix["overrides"].items():
            if pair not in pairs:
                raise ValueError(f"overrides: found {pair!r}; allowed '<method> / <task>' of those above")
            if special is not None:
                _check_seeds(
                    f"overrides: {pair}: seeds", _settings(f"overrides: {pair}", special).get("seeds", matrix["seeds"])
                )
        matrix["members"] = list(_members(matrix))
        folders = [member.name for member in matrix["members"]]
        if twice := sorted({name for name in folders if folders.count(name) > 1}):
            raise ValueError(
                f"tasks, methods: found two runs for the folder {twice[0]!r}; allowed names that differ in letters or digits"
            )
        if long := [name for name in folders if len(name.encode()) > LONGEST_NAME]:
            raise ValueError(
                f"tasks, methods: found names that make the folder {long[0]!r}; allowed {LONGEST_NAME} bytes; shorten either"
            )
        for member in matrix["members"]:
            try:
                member.resolved()
            except ValueError as error:
                raise ValueError(f"{member.method} / {member.task}: {error}") from None
    except ValueError as error:
        raise SystemExit(f"compare.py: {path}: {error}") from None
    return matrix


def _settings(name: str, value: Any) -> dict[str, Any]:
    """What stands under a name of the matrix, which may be nothing. ValueError if it is not settings by name."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: found {value!r}; allowed names with their settings, or nothing")
    return dict(value)


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
    if not isinstance(windows, Mapping | list) or not all(type(window) is int for window in windows):
        raise ValueError(f"windows: found {windows!r}; allowed a list of integers, or integers with their settings")
    if isinstance(windows, list):
        windows = dict.fromkeys(windows)
    expanded: dict[str, dict[str, Any]] = {}
    for name, settings in methods.items():
        if WINDOW in settings:
            expanded[name] = settings
        else:
            for window, special in windows.items():
                expanded[f"{name}, window {window}"] = {
                    WINDOW: window,
                    **_settings(f"windows: {window}", special),
                    **settings,
                }
    return expanded


def _dials(dial: Any, tasks: Mapping[str, dict[str, Any]]) -> tuple[str, dict[str, int]]:
    """The dial's name and its value by task; no values where there is no dial."""
    if dial is None:
        return "", {}
    if isinstance(dial, Mapping):
        name, values = "length", {str(task): value for task, value in dial.items()}
    else:
        name, values = str(dial).rsplit(".", 1)[-1].replace("_", " "), {t: s.get(str(dial)) for t, s in tasks.items()}
    if set(values) != set(tasks) or not all(type(value) is int and value >= 0 for value in values.values()):
        raise ValueError(
            f"dial: found {values}; allowed an integer for each of the tasks {list(tasks)}, or a setting that all of them have"
        )
    return name, {task: values[task] for task in tasks}


def members(matrix: dict[str, Any]) -> Iterator[Member]:
    """All runs, seeds outermost, so that an interrupted matrix has the same number of seeds everywhere."""
    return iter(matrix["members"])


def _members(matrix: dict[str, Any]) -> Iterator[Member]:
    cells = [(method, task) for task in matrix["tasks"] for method in matrix["methods"]]
    seeds = {cell: seeds_of(matrix, *cell) for cell in cells}
    for seed in dict.fromkeys(itertools.chain.from_iterable(seeds.values())):
        for method, task in cells:
            if seed in seeds[method, task]:
                special = {**matrix["overrides"].get(f"{method} / {task}", {})}
                special.pop("seeds", None)
                settings = {**matrix["tasks"][task], **matrix["methods"][method], **special}
                yield Member(method, task, seed, matrix["config"], settings)


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
