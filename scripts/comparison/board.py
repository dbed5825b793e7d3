"""The TensorBoard of a comparison: success and credit horizon against the dial, for every method."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.matrix import Member, members, safe_name
from comparison.outcome import summarise


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
            with SummaryWriter(str(board / "methods" / safe_name(row["method"]))) as writer:
                for cell in sorted(row["tasks"].values(), key=lambda cell: cell["dial"]):
                    for name, value in _dial_scalars(cell).items():
                        writer.add_scalar(f"dial/{name}", value, global_step=cell["dial"])
    names = {(m.method, m.task, m.seed): m for m in members(matrix)}
    settings = {key: _flat_settings(member) for key, member in names.items()}
    every = dict.fromkeys(name for flat in settings.values() for name in flat)
    varied = [name for name in every if len({_plain(flat.get(name)) for flat in settings.values()}) > 1]
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
    """Every setting of a member, arguments of the environment one by one."""
    flat = {
        f"{section}.{key}": value for section, settings in member.resolved().items() for key, value in settings.items()
    }
    kwargs = flat.pop("env.kwargs")
    return flat | {f"env.kwargs.{key}": value for key, value in kwargs.items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
