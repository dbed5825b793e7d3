"""What summary.json holds of each part, and its tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dni_rl.experiments import common
from dni_rl.experiments.theory.artificial import FORMS, Case, cases
from dni_rl.experiments.theory.config import PARTS, PUBLISHED_GAP
from dni_rl.experiments.theory.identities import identities


def summarize(matrix: Sequence[common.Member], results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What summary.json holds, by part."""
    parts: dict[str, Any] = {}
    for part in PARTS:
        of_part = [member for member in matrix if member.config.part == part]
        if of_part:
            by_arm = {cell.arm: list(by_seed.values()) for cell, by_seed in common.by_cell(of_part, results).items()}
            parts[part] = _SUMMARIES[part](by_arm)
    return {"experiment": "understanding", "seeds": sorted({member.config.seed for member in matrix}), "parts": parts}


def _linear_summary(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Gaps by data set; and for each loss and form the largest over data sets, models and seeds beside the published one."""
    rows: list[dict[str, Any]] = []
    largest: dict[str, dict[str, Any]] = {}
    for arm, found in by_arm.items():
        gaps = {name: common.spread([result["gaps"][name] for result in found]) for name in found[0]["gaps"]}
        in_the_end = common.spread([result["predicted_gap"] for result in found])
        rows.append({"data": arm, "gaps": gaps, "predicted_gap": in_the_end})
    for loss, forms in FORMS["linear"].items():
        for form in forms[1:]:
            gaps_of_form = [row["gaps"][str(Case(model, loss, form))] for row in rows for model in ("linear", "deep")]
            ends = [gap[end] for gap in gaps_of_form for end in ("min", "max")]
            largest[f"{loss}, {form}"] = {
                "gap": None if None in ends else max(map(abs, ends)),  # None: some run has diverged
                "published": PUBLISHED_GAP.get((loss, form)),
            }
    return {"rows": rows, "largest": largest}


def _surface_summary(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Mean errors of the implied loss, by data set, case and step; and the surfaces of the first seed, for the figure."""
    rows = []
    for arm, found in by_arm.items():
        for surfaces in zip(*(result["surfaces"] for result in found), strict=True):
            errors = [of_class["error"] for one in surfaces for of_class in one["classes"]]
            rows.append(
                {"data": arm, "case": surfaces[0]["case"], "step": surfaces[0]["step"], **common.spread(errors)}
            )
    return {"rows": rows, "first": {arm: found[0]["surfaces"] for arm, found in by_arm.items()}}


def _rdm_summary(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Test errors by signal, and by layer what the representations are like, as means over seeds."""
    rows = []
    for arm, found in by_arm.items():
        layers = [
            {name: common.mean(of_layer[name] for of_layer in of_seeds) for name in of_seeds[0]}
            for of_seeds in zip(*(result["layers"] for result in found), strict=True)
        ]
        errors = [result["error"] for result in found]
        seconds = common.mean(result["seconds"] for result in found)
        rows.append({"arm": arm, "per_seed": errors, **common.spread(errors), "seconds": seconds, "layers": layers})
    return {"rows": rows}


def _signals_summary(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Test errors and cosines with the true gradient by signal, and the identities."""
    rows = []
    for arm, found in by_arm.items():
        cosines = [common.mean(of_layer) for of_layer in zip(*(r["cosines"] for r in found), strict=True)]
        curve = [
            {"step": points[0]["step"], "error": common.mean(point["error"] for point in points)}
            for points in common.by_step([result["curve"] for result in found])
        ]
        errors = [result["error"] for result in found]
        rows.append({"arm": arm, "per_seed": errors, **common.spread(errors), "cosines": cosines, "curve": curve})
    return {"rows": rows, "identities": identities()}


_SUMMARIES: dict[str, Callable[[Mapping[str, Sequence[Mapping[str, Any]]]], dict[str, Any]]] = {
    "linear": _linear_summary,
    "surface": _surface_summary,
    "rdm": _rdm_summary,
    "signals": _signals_summary,
}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown, a section for each part."""
    return "\n\n".join(_TABLES[part](found) for part, found in summary["parts"].items())


def _digits(value: float | None) -> str:
    return common.DIVERGED if value is None else f"{value:.1e}"


def _measured(value: float | None) -> float | str:
    return common.DIVERGED if value is None else value


def _linear_table(found: Mapping[str, Any]) -> str:
    names = [str(case) for case in cases("linear") if case.form != "backprop"]
    gaps = common.markdown(
        ("data", *(name.replace("_", ", ") for name in names), "linear, log, linear: predicted"),
        [
            (
                row["data"],
                *(_digits(row["gaps"][name]["mean"]) for name in names),
                _digits(row["predicted_gap"]["mean"]),
            )
            for row in found["rows"]
        ],
    )
    largest = common.markdown(
        ("loss, critic", "largest gap", "published"),
        [
            (name, _digits(entry["gap"]), None if entry["published"] is None else _digits(entry["published"]))
            for name, entry in found["largest"].items()
        ],
    )
    note = (
        "Loss with a critic less loss of backpropagation after as many steps, by model, loss and critic; mean over seeds. Predicted: "
        "after training without end."
    )
    return f"{note}\n\n{gaps}\n\n{largest}"


def _surface_table(found: Mapping[str, Any]) -> str:
    shown = common.markdown(
        ("data", "model, loss, critic", "step", "error of the implied loss", "least", "largest"),
        [
            (row["data"], row["case"].replace("_", ", "), row["step"], _measured(row["mean"]), row["min"], row["max"])
            for row in found["rows"]
        ],
    )
    return f"Error: RMS where the data are, in standard deviations of the true loss there; over seeds and labels.\n\n{shown}"


def _rdm_table(found: Mapping[str, Any]) -> str:
    depth = len(found["rows"][0]["layers"])
    chosen = sorted({1, (depth + 2) // 4, depth // 2, depth // 2 + 1, (3 * depth + 2) // 4, depth} - {0})
    rows = []
    for row in found["rows"]:
        for name in ("probe_error", "within", "between", "distance_to_last"):
            values = [_measured(row["layers"][i - 1][name]) for i in chosen]
            rows.append((row["arm"], row["mean"], row["std"], name.replace("_", " "), *values))
    return common.markdown(("signal", "test error", "std", "measure", *(f"layer {i}" for i in chosen)), rows)


def _signals_table(found: Mapping[str, Any]) -> str:
    learned = common.markdown(
        ("signal", "test error, by seed", "mean", "cosine with the true gradient, by layer"),
        [
            (
                row["arm"],
                " ".join(common.shown(error, 4) for error in row["per_seed"]),
                common.shown(row["mean"], 4),
                " ".join(common.shown(cosine, 2) for cosine in row["cosines"]),
            )
            for row in found["rows"]
        ],
    )
    equal = common.markdown(
        ("identity with backpropagation", "relative difference"),
        [(name, f"{value:.0e}") for name, value in found["identities"].items()],
    )
    return f"{learned}\n\n{equal}"


_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "linear": _linear_table,
    "surface": _surface_table,
    "rdm": _rdm_table,
    "signals": _signals_table,
}
