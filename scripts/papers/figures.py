"""Figures of a page: curves, and scores by window."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from papers.estimates import mean
from papers.tables import rows_of, scores_of, view_of, window_of


def _lines(found: Mapping[str, Any], axis: str, name: str) -> dict[tuple[str, int], list[tuple[Any, Any]]]:
    """Curves by arm and window."""
    lines: dict[tuple[str, int], list[tuple[Any, Any]]] = {}
    for curve in found["curves"].values():
        if curve.get(axis) and curve.get(name):
            # NaN where the run had diverged
            numbers = np.array(curve[axis], float), np.array(curve[name], float)
            lines.setdefault((curve["arm"], curve["window"]), []).append(numbers)
    return lines


def curves_figure(sections: Mapping[str, dict[str, Any]], path: Path) -> bool:
    """Learning curves, a thin line for each seed and a thick one for their mean. Returns whether there was anything to draw."""
    panels: list[tuple[str, str, str, float, dict[tuple[str, int], list[tuple[Any, Any]]]]] = []
    for entry, found in sections.items():
        view = view_of(found)
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
                panel.plot(x, scale * y, color=colour, alpha=0.3, linewidth=0.7)
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
        view = view_of(found)
        scores = scores_of(found, view.scores[0]) if view.against_window else {}
        if len({window for _, window in scores}) > 1:
            shown.append((entry, view.scores[0], found, scores))
    if not shown:
        return False
    chart, axes = _chart(1, len(shown))
    for panel, (entry, score, found, scores) in zip(axes, shown, strict=True):
        arms = list(dict.fromkeys(arm for arm, _ in scores))
        published = {(row["arm"], window_of(row)): row.get(score.published) for row, _ in rows_of(found, score)}
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
        panel.set_xlabel(view_of(found).dial, fontsize=7)
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
