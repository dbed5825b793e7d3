"""Tables of a page, and what its results are compared with: other arms, published figures, bars."""

import importlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dni_rl.experiments import common, ptb
from papers.estimates import Estimate, difference, mean, ratio


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
        (Score("test bits"),),
        {"bits": ("validation bits per token", 1.0)},
        axes=("tokens", "seconds"),
        against_window=True,
        note="Seconds are those of training; runs side by side slow each other down.",
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


def view_of(found: Mapping[str, Any]) -> View:
    """What is shown of a section: by its program."""
    return VIEWS.get(found["program"], _PLAIN)


def rows_of(found: Mapping[str, Any], score: Score) -> list[tuple[dict[str, Any], dict[str, float | None]]]:
    """Rows of a summary, each with its scores by seed; none where a program's summary is of another kind."""
    summary = found["summary"]
    rows = [row for row in summary.get("rows", summary.get("cells", [])) if isinstance(row, dict)]
    scored = [(row, (row.get(score.key) if score.key else row) or {}) for row in rows]
    return [(row, part["per_seed"]) for row, part in scored if isinstance(part.get("per_seed"), dict)]


def window_of(row: Mapping[str, Any]) -> int:
    """The window of a row, or how many layers its net has: what rows of one arm differ in."""
    return row["window"] if "window" in row else row["num_layers"]


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables of an entry: every cell by seed, mean, spread and interval, beside the published; or else the program's own."""
    view, entry_module = view_of(found), importlib.import_module(f"dni_rl.experiments.{found['program']}")
    scored = [(score, rows_of(found, score)) for score in view.scores]
    if not any(rows for _, rows in scored):
        yield entry_module.table(found["summary"])
        yield from _part_tables(found["summary"].get("parts", {}))
        return
    for score, rows in scored:
        published = score.published if any(row.get(score.published) is not None for row, _ in rows) else None
        more = {title: key for title, key in score.more.items() if any(row.get(key) is not None for row, _ in rows)}
        header = ["arm", view.dial, f"{score.label}, by seed", "mean", "std", "95 % interval"]
        lines = []
        for row, per_seed in rows:
            estimate = mean(per_seed.values())
            line = [
                f"`{row['arm']}`",
                window_of(row),
                " ".join(_number(value, score) or common.DIVERGED for value in per_seed.values()),
                _number(estimate.value, score),
                _number(estimate.std, score),
                estimate.interval(score.digits, score.scale),
            ]
            line += [_number(row.get(published), score)] if published else []
            line += [_ratio(row.get(key)) for key in more.values()]
            lines.append([*line, None if row.get("seconds") is None else round(row["seconds"])])
        yield common.markdown([*header, *(["published"] if published else []), *more, "seconds"], lines)
    if view.note:
        yield wrapped(view.note.format_map({"full": f"`{found['summary'].get('full')}`"}))


def _part_tables(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Intervals of the errors in those parts of a summary that have some by seed."""
    for part, of_part in parts.items():
        rows = [row for row in of_part.get("rows", ()) if isinstance(row.get("per_seed"), list)]
        if rows:
            lines = []
            for row in rows:
                estimate = mean(row["per_seed"])
                by_seed = " ".join(_number(value, _ERROR) or common.DIVERGED for value in row["per_seed"])
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
        """ "yes" if the whole interval keeps the bar, "on average" if the mean does, otherwise "no"; None without a bar.

        Without an interval, or with one of no width, that of seeds that agree to the digit, it is "on average" at best.
        """
        if self.estimate.value is None or self.bar() is None:
            return None

        def keeps(value: float | None) -> bool:
            if value is None:
                return False
            return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)

        whole = self.estimate.has_width and keeps(self.estimate.low) and keeps(self.estimate.high)
        return "yes" if whole else "on average" if keeps(self.estimate.value) else "no"

    def bar(self) -> str | None:
        """In words."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return None if self.at_least is None else f"at least {self.at_least:g}"


Scores = dict[tuple[str, int], dict[str, float | None]]  # by arm and window, then by seed


def scores_of(found: Mapping[str, Any] | None, score: Score) -> Scores:
    """Every seed's score, by arm and window; {} of an entry without runs."""
    if found is None:
        return {}
    return {(row["arm"], window_of(row)): per_seed for row, per_seed in rows_of(found, score)}


def _points(of: Mapping[str, float | None], baseline: Mapping[str, float | None]) -> Estimate:
    """Difference of two errors, in per cent."""
    as_percent = [{s: None if v is None else _ERROR.scale * v for s, v in errors.items()} for errors in (of, baseline)]
    return difference(*as_percent)


def _published(found: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    rows = rows_of(found, _ERROR)
    return {(row["arm"], window_of(row)): row["published"] for row, _ in rows if row.get("published") is not None}


def images_comparisons(sections: Mapping[str, dict[str, Any]]) -> Iterator[Comparison]:
    """Errors less backpropagation's, and those of random or unlocked updates less those of the same arm without."""
    for name, found in sections.items():
        scores, published = scores_of(found, _ERROR), _published(found)
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
    plain = scores_of(sections.get("images"), _ERROR)
    for name, at_most in (("images_p0.2", 0.5), ("images_p0.05", None), ("images_unlocked", None)):
        for cell, errors in scores_of(sections.get(name), _ERROR).items():
            if cell in plain:
                text = f"{name} less images: `{cell[0]}`, {cell[1]} layers, points"
                yield Comparison(text, _points(errors, plain[cell]), at_most=at_most)


def copy_comparisons(sections: Mapping[str, dict[str, Any]]) -> Iterator[Comparison]:
    """Lengths solved over those of truncated BPTT at the same window, as ratios of geometric means; the published ones are plain.

    Sections that differ in their seeds are taken together.
    """
    (score,) = VIEWS["copy"].scores
    lengths: dict[str, dict[tuple[str, int], dict[str, float]]] = {}  # by task, arm and window, and seed
    published: dict[str, dict[tuple[str, int], float | None]] = {}
    for found in sections.values():
        task = found["summary"]["task"]
        for cell, of_seeds in scores_of(found, score).items():
            known = {seed: length for seed, length in of_seeds.items() if length is not None}
            lengths.setdefault(task, {}).setdefault(cell, {}).update(known)
        published.setdefault(task, {}).update(
            {(row["arm"], row["window"]): row["published_ratio"] for row, _ in rows_of(found, score)}
        )
    for task, cells in lengths.items():
        for (arm, window), solved in cells.items():
            baseline = cells.get(("none", window), {})
            if arm != "none" and baseline:
                yield Comparison(
                    f"{task}: `{arm}` over `none`, window {window} (seeds: {len(solved)}, {len(baseline)})",
                    ratio([*solved.values()], [*baseline.values()]),
                    published=published[task][arm, window],
                    at_least=1.7 if task == "copy" and arm in ("dni", "dni_recent") else None,
                )


def ptb_comparisons(sections: Mapping[str, dict[str, Any]]) -> Iterator[Comparison]:
    """Bits less those of truncated BPTT at window 20, which is to be matched by DNI at window 5, and at its longest window."""
    score = VIEWS["ptb"].scores[0]
    scores: Scores = {}
    published: dict[tuple[str, int], float | None] = {}
    for found in sections.values():
        scores |= scores_of(found, score)
        published |= {(row["arm"], window_of(row)): row.get("published") for row, _ in rows_of(found, score)}
    windows = {window for arm, window in scores if arm == "none"}
    for longest in sorted({max(windows, default=0), 20} & windows):
        baseline = ("none", longest)
        for cell, bits in scores.items():
            if cell[0] != "none":
                of_cell, of_baseline = published[cell], published[baseline]
                yield Comparison(
                    f"`{cell[0]}` at window {cell[1]} less `none` at {longest}, bits",
                    difference(bits, scores[baseline]),
                    digits=4,
                    published=None if of_cell is None or of_baseline is None else of_cell - of_baseline,
                    at_most=0.0 if (cell, longest) == (("dni", 5), 20) else None,
                )


def ptb_ratios(sections: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Tables of the shares of tokens and of seconds that cells took to the same bits, over all sections."""
    cells: dict[common.Cell, dict[int, dict[str, Any]]] = {}
    is_published = False
    hardware = {
        (call["gpu"], call["processor"], call["cores"], found["settings"].get("device"))
        for found in sections.values()
        for call in found["machines"]
    }
    for found in sections.values():
        is_published |= (found["summary"]["dataset"], found["summary"]["level"]) == ("ptb", "characters")
        for run in found["curves"].values():
            nothing = [None] * len(run.get("step", ()))
            columns = {name: run.get(name, nothing) for name in ("tokens", "seconds", "bits")}
            if len(hardware) > 1:  # seconds of two machines have no ratio
                columns["seconds"] = nothing
            points = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            best = min((point["bits"] for point in points if point["bits"] is not None), default=None)
            cell = common.Cell(run["arm"], run["window"])
            cells.setdefault(cell, {})[run["seed"]] = {"curve": points, "best_valid_bits": best}
    for shown in ptb.ratio_tables({"ratios": ptb.ratios(cells, is_published=is_published)}):
        yield shown if shown.startswith("|") else wrapped(shown)


def sequential_comparisons(sections: Mapping[str, dict[str, Any]]) -> Iterator[Comparison]:
    """Errors less those of truncated BPTT at the same window."""
    for found in sections.values():
        scores = scores_of(found, _ERROR)
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


MORE_COMPARISONS: dict[str, Callable[[Mapping[str, dict[str, Any]]], Iterator[str]]] = {"ptb": ptb_ratios}


def comparisons_shown(sections: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """What a page's program compares, as tables and notes: with bars where there are some; nothing if there is nothing to compare."""
    program = next(iter(sections.values()))["program"]
    lines = list(COMPARISONS[program](sections)) if program in COMPARISONS else []
    if lines:
        yield from _comparison_table(lines)
    if program in MORE_COMPARISONS:
        yield from MORE_COMPARISONS[program](sections)


def _comparison_table(lines: Sequence[Comparison]) -> Iterator[str]:
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
    yield common.markdown([*header, *(["bar", "kept"] if has_bar else [])], rows)
    if has_bar:
        yield wrapped(
            "Kept: by the whole interval (yes); or by the mean alone (on average), which is all that can be said where there is no "
            "interval, or one without width."
        )


def wrapped(text: str) -> str:
    """A paragraph, in the lines of a page."""
    return textwrap.fill(text, 140, break_long_words=False, break_on_hyphens=False)
