"""The figures of each part."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dni_rl.experiments.theory.config import DISSIMILARITY_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(summary: Mapping[str, Any], folder: Path) -> None:
    """Writes the figures of the parts that were run, as PNG, beside the summary."""
    parts = summary["parts"]
    if "surface" in parts:
        for arm, surfaces in parts["surface"]["first"].items():
            surface_figure(surfaces).savefig(folder / f"surface-{arm}.png")
    if "rdm" in parts:
        matrices: dict[str, np.ndarray] = {}
        for name, config in summary["configs"].items():  # those of the first seed
            if config["part"] == "rdm" and config["arm"] not in matrices:
                matrices[config["arm"]] = np.load(folder / name / DISSIMILARITY_FILE)
        dissimilarity_figure(matrices).savefig(folder / "dissimilarity.png")
        layers_figure(parts["rdm"]["rows"]).savefig(folder / "layers.png")
    if "signals" in parts:
        signals_figure(parts["signals"]["rows"]).savefig(folder / "signals.png")


def surface_figure(surfaces: Sequence[Mapping[str, Any]]) -> "Figure":
    """A row for each model and step, a column for each loss and critic: true losses dashed, a colour for each label."""
    from matplotlib.figure import Figure

    names, steps = (list(dict.fromkeys(one[key] for one in surfaces)) for key in ("case", "step"))
    models = list(dict.fromkeys(name.partition("_")[0] for name in names))
    wide = len(names) // len(models)
    chart = Figure(figsize=(2.4 * wide, 1.7 * len(models) * len(steps)), dpi=110, layout="constrained")
    panels = chart.subplots(len(models) * len(steps), wide, squeeze=False)
    for one in surfaces:
        block, column = divmod(names.index(one["case"]), wide)
        panel = panels[block * len(steps) + steps.index(one["step"])][column]
        for label, (of_class, colour) in enumerate(zip(one["classes"], ("tab:blue", "tab:orange"), strict=True)):
            panel.plot(one["along"], of_class["true"], "--", color=colour, linewidth=1.0)
            panel.plot(one["along"], of_class["implied"], color=colour, label=f"label {label}")
        panel.set_title(f"{one['case'].replace('_', ', ')}; step {one['step']}", fontsize=7)
        panel.tick_params(labelsize=6)
    panels[0][0].legend(fontsize=6)
    chart.supxlabel("h, along the line through the classes' means", fontsize=8)
    chart.supylabel("loss (dashed: true)", fontsize=8)
    return chart


def dissimilarity_figure(matrices: Mapping[str, np.ndarray]) -> "Figure":
    """A row for each signal, some layers from the first to the last; images are in the order of their labels."""
    from matplotlib.figure import Figure

    depth = len(next(iter(matrices.values())))
    shown = sorted({round(i) for i in np.linspace(0, depth - 1, min(depth, 7))} | {depth // 2})
    chart = Figure(figsize=(1.5 * len(shown) + 1.0, 1.6 * len(matrices)), dpi=110, layout="constrained")
    panels = chart.subplots(len(matrices), len(shown), squeeze=False)
    for row, (arm, of_layers) in zip(panels, matrices.items(), strict=True):
        for panel, i in zip(row, shown, strict=True):
            drawn = panel.imshow(of_layers[i].astype(np.float32), vmin=0.0, vmax=1.5, cmap="viridis")
            panel.set(xticks=[], yticks=[])
            panel.set_title(f"layer {i + 1}", fontsize=7)
        row[0].set_ylabel(arm, fontsize=8)
    chart.colorbar(drawn, ax=panels.ravel().tolist(), shrink=0.6, label="1 - correlation")
    return chart


def layers_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """By layer: the error of linear probes, dissimilarity between less within classes, and distance to the last layer."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(11.0, 3.2), dpi=110, layout="constrained")
    probes, contrast, distance = chart.subplots(1, 3)
    for row in rows:
        layers = range(1, len(row["layers"]) + 1)
        probes.plot(layers, _numbers(row["layers"], "probe_error"), label=row["arm"])
        contrast.plot(layers, _numbers(row["layers"], "between") - _numbers(row["layers"], "within"))
        distance.plot(layers, _numbers(row["layers"], "distance_to_last"))
    probes.set(xlabel="layer", title="test error of a linear probe", yscale="log")
    contrast.set(xlabel="layer", title="dissimilarity between less within classes")
    distance.set(xlabel="layer", title="distance to the last layer's")
    probes.legend(fontsize=7)
    return chart


def _numbers(points: Sequence[Mapping[str, float | None]], name: str) -> np.ndarray:
    """What points have under a name; NaN where a seed diverged."""
    return np.array([point[name] for point in points], float)


def signals_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Test error against steps, and the cosine with the true gradient by layer."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(8.0, 3.2), dpi=110, layout="constrained")
    errors, cosines = chart.subplots(1, 2)
    for row in rows:
        errors.plot(_numbers(row["curve"], "step"), _numbers(row["curve"], "error"), label=row["arm"])
        cosines.plot(range(1, len(row["cosines"]) + 1), row["cosines"], "o-")
    errors.set(xlabel="step", title="test error", yscale="log")
    errors.legend(fontsize=7)
    cosines.set(xlabel="layer", title="cosine with the true gradient, at the end", ylim=(-0.25, 1.05))
    return chart
