"""The report: Markdown and figures."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison.matrix import is_left_out, members
from comparison.outcome import REACHES, failed_members, settings_of, summarise
from dni_rl.files import write_text
from intervals import CONFIDENCE, FEWEST_VALUES, NUM_RESAMPLES
from reading import handwritten, write_above

PROGRAM = "python scripts/compare.py"  # begins every command of a page
MADE_BY = "Made by\n\n    "  # before that command


def markdown(
    matrix: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    summary: Sequence[dict[str, Any]],
    failures: Mapping[str, str],
    command: str,
) -> str:
    """The report's text."""
    bar, metric = matrix["bar"], matrix["metric"]
    failed = Counter((method, task) for method, task, _ in failed_members(matrix, rows, failures))
    lines = [
        f"# {matrix['title']}",
        "",
        f"`{metric}` at the *end* of training: seeds at or above {bar:g}, mean, and every seed. {MADE_BY}{command}",
        "",
        _how_complete(matrix, rows),
        "",
        f"| method | {' | '.join(matrix['tasks'])} | steps/s |",
        f"|---|{'---|' * (len(matrix['tasks']) + 1)}",
    ]
    for method in matrix["methods"]:
        cells = []
        for task in matrix["tasks"]:
            chosen = [row for row in rows if (row["method"], row["task"]) == (method, task)]
            cells.append(_cell(chosen, bar, failed[method, task]) or _no_runs(matrix, method, task))
        speeds = [row["steps_per_second"] for row in rows if row["method"] == method]
        speed = f"{np.median(speeds):,.0f}" if speeds else "-"
        lines.append(f"| {method} | {' | '.join(cells)} | {speed} |")
    budgets: dict[str, set[int]] = {}
    for row in rows:
        budgets.setdefault(row["task"], set()).add(row["total_steps"])
    lengths = (f"{task} {' or '.join(f'{steps:,}' for steps in sorted(budget))}" for task, budget in budgets.items())
    lines += ["", f"Steps: {', '.join(lengths)}."]
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
    if any(row["finished"] for row in rows):
        lines += ["", *_statistics(matrix, summary), "", *_until_bar(matrix, summary), "", *_costs(matrix, summary)]
        if told := foretelling(matrix, rows):
            lines += ["", *_foretelling(matrix, told)]
    return "\n".join(lines) + "\n"


def _how_complete(matrix: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """How many of the planned runs are finished, and which are not."""
    finished = {(row["method"], row["task"], row["seed"]) for row in rows if row["finished"]}
    planned = [(member.method, member.task, member.seed) for member in members(matrix)]
    each = []
    for method in matrix["methods"]:
        tasks_by_seeds: dict[str, list[str]] = {}
        for task in matrix["tasks"]:
            missing = [s for m, t, s in planned if (m, t) == (method, task) and (m, t, s) not in finished]
            if missing:
                tasks_by_seeds.setdefault(_seeds_text(missing), []).append(task)
        each += [f"{method}, {' and '.join(tasks)}: {seeds}" for seeds, tasks in tasks_by_seeds.items()]
    if not each:
        return f"All {len(planned)} of {len(planned)} planned runs are finished."
    return (
        f"**Not complete:** {len(finished)} of {len(planned)} planned runs are finished. Not finished when this page was made: "
        f"{'; '.join(each)}."
    )


def _seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in a few words: "seed 2", "seeds 1, 3", or "seeds 5 to 9" where none between is left out."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _cell(rows: Sequence[dict[str, Any]], bar: float, num_failed: int) -> str:
    """How many seeds ended above the bar, of those that ended or failed: leaving these out would flatter the method. Empty without any."""
    ends = [row["end"] for row in rows if row["finished"]]
    each = " ".join(f"{row['end']:.2f}{'' if row['finished'] else '*'}" for row in rows)
    parts = []
    if ends:
        parts.append(f"**{sum(end >= bar for end in ends)} of {len(ends) + num_failed}**, mean {np.mean(ends):.3f}")
    if num_failed:
        parts.append(f"{num_failed} failed" if ends else "failed")
    return ", ".join(parts or ["unfinished"] * bool(rows)) + (f" ({each})" if rows else "")


def _no_runs(matrix: dict[str, Any], method: str, task: str) -> str:
    """Why a cell is empty: on purpose, or not yet run."""
    return "left out" if is_left_out(matrix, method, task) else "not run"


def _statistics(matrix: dict[str, Any], summary: Sequence[dict[str, Any]]) -> list[str]:
    """Interquartile means of the end and of the area under the curve."""
    tasks, bar, dial = list(matrix["tasks"]), matrix["bar"], matrix["dial_name"]
    together = ["all of them"] if len(tasks) > 1 else []
    # Coverage of the true interquartile mean; of 0.5 or 1 by binomial weights, least where three quarters (at ten, two thirds) are alike.
    lines = [
        f"Interquartile mean over the n finished seeds (with fewer than four, the mean of all), with its {100 * CONFIDENCE:g} % bootstrap "
        f"interval (percentiles of {NUM_RESAMPLES:,} resamples; none under {FEWEST_VALUES} seeds). It covers less than it says: of normal "
        "values 89 % at five seeds and 93 % at ten; of values that are either chance or solved, 0.5 or 1, as little as 75 % and 88 %, "
        "depending on the share that is solved.",
    ]
    if together:
        lines[0] += (
            " *All of them* is of the seeds that are finished on every task, so that each task weighs the same (n: those seeds times the "
            f"tasks; stratified by task); incomplete where these are fewer than {FEWEST_VALUES}, or a task is left out."
        )
    for name, title in (("end", "at the end"), ("area", "area under the curve")):
        with_length = name == "end" and bool(dial)
        columns = [title, *tasks, *together, *([f"solved {dial}"] if with_length else [])]
        lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        for row in summary:
            cells = {task: row["tasks"].get(task) for task in tasks}
            texts = [
                _no_runs(matrix, row["method"], task)
                if cell is None
                else f"{cell[name] or ''}{', ' if cell[name] and cell['num_failed'] else ''}"
                f"{cell['num_failed'] or ''}{' failed' if cell['num_failed'] else ''}"
                for task, cell in cells.items()
            ]
            texts += [str(row[name] or "incomplete")] * len(together)
            if with_length:
                lengths = [row[name] for name in ("solved_length", "surely_solved_length")]
                texts.append("{} ({})".format(*("none" if length is None else length for length in lengths)))
            lines.append(f"| {row['method']} | {' | '.join(texts)} |")
    if dial:
        lines += [
            "",
            f"Solved {dial}: the longest of those above whose interquartile mean is at least {bar:g}, no seed having failed; in "
            f"brackets, the longest whose whole interval is. Area under the curve: the mean of `{matrix['metric']}` over the run.",
        ]
    else:
        lines += ["", f"Area under the curve: the mean of `{matrix['metric']}` over the run."]
    return lines


def _by_task(
    matrix: dict[str, Any], summary: Sequence[dict[str, Any]], title: str, describe: Callable[[dict[str, Any]], str]
) -> list[str]:
    """A table of methods by tasks; `describe` is what it says of a cell with finished runs."""

    def text(row: dict[str, Any], task: str) -> str:
        cell = row["tasks"].get(task)
        if cell is None:
            return _no_runs(matrix, row["method"], task)
        return describe(cell) if cell["num_finished"] else "none finished"

    lines = [f"| {title} | {' | '.join(matrix['tasks'])} |", f"|{'---|' * (len(matrix['tasks']) + 1)}"]
    for row in summary:
        lines.append(f"| {row['method']} | {' | '.join(text(row, task) for task in matrix['tasks'])} |")
    return lines


def _until_bar(matrix: dict[str, Any], summary: Sequence[dict[str, Any]]) -> list[str]:
    """Steps and seconds of training until the bar was first reached, by task."""

    def describe(cell: dict[str, Any]) -> str:
        reached = f"{cell['num_reached']} of {cell['num_finished']}"
        if not cell["num_reached"]:
            return reached
        return f"{cell['steps_to_bar']:,.0f} steps, {cell['seconds_to_bar']:,.0f} s ({reached})"

    return [
        f"Until {matrix['bar']:g} was first reached, whether or not it was kept: agent steps, and seconds of training, those steps "
        "at the run's mean speed, environments included; medians over the finished seeds that reached it, and how many did. Runs side "
        "by side slow each other down.",
        "",
        *_by_task(matrix, summary, f"until {matrix['bar']:g}", describe),
    ]


def _costs(matrix: dict[str, Any], summary: Sequence[dict[str, Any]]) -> list[str]:
    """Time and memory by task, and the credit horizons where they were measured."""
    cells = [cell for row in summary for cell in row["tasks"].values()]
    parts = ["microseconds for each agent step, environments included"]
    if any(cell["peak_memory_bytes"] is not None for cell in cells):
        parts.append("largest resident memory of the process in MiB (without what it holds on a GPU)")
    if any(cell["horizon"] is not None for cell in cells):
        parts.append("effective credit horizon in steps, at the end (and its median before the bar was reached)")
    if any(cell["expected_horizon"] is not None for cell in cells):
        parts.append("the longest expected credit horizon measured before that")

    def describe(cell: dict[str, Any]) -> str:
        memory = cell["peak_memory_bytes"]
        text = f"{1e6 / cell['steps_per_second']:.1f} µs" + ("" if memory is None else f", {memory / 2**20:,.0f} MiB")
        if cell["horizon"] is not None:
            learning = "" if cell["horizon_learning"] is None else f" ({cell['horizon_learning']:g})"
            text += f", horizon {cell['horizon']:g}{learning}"
        return text + ("" if cell["expected_horizon"] is None else f", expected {cell['expected_horizon']:g}")

    return [
        f"Cost: {'; '.join(parts)}. Medians over finished seeds; runs side by side slow each other down.",
        "",
        *_by_task(matrix, summary, "cost", describe),
    ]


def foretelling(matrix: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the expected horizon foretold what was learned, by method; of finished runs with a measurement before the bar was reached.

    A horizon of at least `REACHES` of the dial, at any of those measurements, says that the bar will be reached. `leads` are the shares
    of the budget from the first of them to the bar, of runs that were foretold and learned.
    """
    told = []
    for method in matrix["methods"]:
        chosen = [
            row for row in rows if row["method"] == method and row["finished"] and row["expected_horizon"] is not None
        ]
        if not chosen or not matrix["dials"]:
            continue
        verdicts = [(row["foretold_at"] is not None, row["steps_to_bar"] is not None) for row in chosen]
        told.append(
            {
                "method": method,
                **{
                    f"{'' if yes else 'not '}foretold, {'' if learned else 'not '}learned": verdicts.count(
                        (yes, learned)
                    )
                    for yes in (True, False)
                    for learned in (True, False)
                },
                "leads": [
                    (row["steps_to_bar"] - row["foretold_at"]) / row["total_steps"]
                    for row, verdict in zip(chosen, verdicts, strict=True)
                    if all(verdict)
                ],
            }
        )
    return told


def _foretelling(matrix: dict[str, Any], told: Sequence[dict[str, Any]]) -> list[str]:
    kinds = [name for name in told[0] if "learned" in name]

    def line(name: str, chosen: Sequence[dict[str, Any]]) -> str:
        leads = [lead for row in chosen for lead in row["leads"]]
        counts = " | ".join(str(sum(row[kind] for row in chosen)) for kind in kinds)
        return f"| {name} | {counts} | {f'{np.median(leads):.0%}' if leads else ''} |"

    return [
        f"What the expected credit horizon foretells: one of at least {REACHES:g} of the {matrix['dial_name']}, at any measurement "
        f"before {matrix['bar']:g} was reached, says that it will be; if there is none, that it will not. Runs, and the median share "
        "of the budget between the first such measurement and the bar:",
        "",
        f"| method | {' | '.join(kinds)} | lead |",
        f"|{'---|' * (len(kinds) + 2)}",
        *(line(row["method"], [row]) for row in told),
        line("all", told),
    ]


def figure(matrix: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Curves: a panel per task, a colour per method, a line per seed and a thick one for their mean."""
    plt = _pyplot()
    tasks, methods = list(matrix["tasks"]), list(matrix["methods"])
    size = (4.2 * len(tasks) + 2.8, 3.4)  # the names of the methods stand at the right
    chart, panels = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, task in zip(panels[0], tasks, strict=True):
        for method, colour in zip(methods, _colours(plt, len(methods)), strict=True):
            chosen = [row for row in rows if (row["method"], row["task"]) == (method, task)]
            for row in chosen:
                panel.plot(np.array(row["steps"]) / 1e6, row["curve"], color=colour, alpha=0.3, linewidth=0.8)
            if chosen:
                steps, mean = mean_curve(chosen)
                panel.plot(steps / 1e6, mean, color=colour, linewidth=2.2, label=method)
        panel.set(title=task, xlabel="million agent steps")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(matrix["metric"])
    lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines() if line.get_label()[0] != "_"}
    if lines:  # of all panels, as a method need not be in each
        chart.legend(lines.values(), lines, fontsize=7, loc="outside right upper")
    chart.savefig(path, dpi=110)
    plt.close(chart)


def mean_curve(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean over runs, from where all of them have been measured to where all of them have come."""
    steps = np.linspace(max(row["steps"][0] for row in rows), min(row["steps"][-1] for row in rows), 200)
    return steps, np.mean([np.interp(steps, row["steps"], row["curve"]) for row in rows], axis=0)


def dial_figure(matrix: dict[str, Any], summary: Sequence[dict[str, Any]], path: Path) -> bool:
    """Interquartile means with their intervals, and credit horizons, against the dial. Returns whether there was anything to draw."""
    if len(set(matrix["dials"].values())) < 2 or not any(
        cell["end"] for row in summary for cell in row["tasks"].values()
    ):
        return False
    all_cells = [cell for row in summary for cell in row["tasks"].values()]
    kinds = {
        "expected_horizon": "expected credit horizon before the bar",
        "horizon_learning": "effective credit horizon while learning",
        "horizon": "effective credit horizon at the end",
    }
    horizon = next((kind for kind in kinds if any(cell[kind] is not None for cell in all_cells)), None)
    has_horizon = horizon is not None
    plt = _pyplot()
    size = (4.0 * (2 + has_horizon) + 2.8, 3.4)  # the names of the methods stand at the right
    chart, panels = plt.subplots(1, 2 + has_horizon, figsize=size, squeeze=False, layout="constrained")
    dials = sorted(set(matrix["dials"].values()))
    for number, (row, colour) in enumerate(zip(summary, _colours(plt, len(summary)), strict=True)):
        shift = 1.0 + 0.012 * (number - (len(summary) - 1) / 2)  # intervals side by side, not on top of each other
        for panel, name in zip(panels[0], ("end", "area"), strict=False):
            cells = [cell for cell in row["tasks"].values() if cell[name] is not None]
            if cells:
                cells.sort(key=lambda cell: cell["dial"])
                values, x = [cell[name].value for cell in cells], np.array([cell["dial"] for cell in cells]) * shift
                panel.plot(x, values, "o-", color=colour, markersize=3, label=row["method"])
                for place, cell in zip(x, cells, strict=True):
                    if cell[name].low is not None:
                        panel.plot([place] * 2, [cell[name].low, cell[name].high], color=colour, linewidth=1.2)
        if horizon is not None:
            points = sorted((c["dial"], c[horizon]) for c in row["tasks"].values() if c[horizon] is not None)
            if points:
                panels[0][2].plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=row["method"])
    titles = [f"{matrix['metric']} at the end", "area under the curve", f"{kinds.get(horizon or '')}, in steps"]
    for panel, title in zip(panels[0], titles, strict=False):
        if dials[0] > 0:
            panel.set_xscale("log", base=2)
        panel.set_xticks(dials, [str(dial) for dial in dials], minor=False)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(matrix["dial_name"])
        panel.grid(alpha=0.3)
    panels[0][0].axhline(matrix["bar"], color="grey", linewidth=0.8, linestyle="--")
    chart.legend(*panels[0][0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    chart.savefig(path, dpi=110)
    plt.close(chart)
    return True


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _colours(plt: Any, count: int) -> list[Any]:
    """A colour for each method, and none twice as long as there are twenty."""
    palette = plt.cm.tab10.colors if count <= 10 else plt.cm.tab20.colors
    return [palette[i % len(palette)] for i in range(count)]


def reading_of(report: Path) -> str:
    """What was written by hand on an earlier page. ValueError if that page is not one of `compare.py`."""
    return handwritten(report.with_name(f"{report.name}.md"), f"{MADE_BY}{PROGRAM} ")


def command_of(report: Path) -> str | None:
    """The command that a page was made by; None if there is no page, or it names none."""
    page = report.with_name(f"{report.name}.md")
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return text.partition(MADE_BY)[2].partition("\n")[0] or None


def write_report(
    matrix: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    failures: Mapping[str, str],
    command: str,
    report: Path,
) -> str:
    """Writes page, figures and JSON beside each other, and keeps what was written by hand on an earlier page. Returns the text.

    Raises:
        ValueError: if the earlier page is not one of `compare.py`; nothing is written then.
    """
    kept = reading_of(report)
    summary = summarise(matrix, rows, failures)
    report.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(matrix, rows, summary, failures, command)
    page = report.with_name(f"{report.name}.md")
    figure(matrix, rows, report.with_name(f"{report.name}.png"))
    pictures = f"![curves]({report.name}.png)\n"
    if dial_figure(matrix, summary, report.with_name(f"{report.name}_dial.png")):
        pictures += f"\n![against the {matrix['dial_name']}]({report.name}_dial.png)\n"
    write_above(page, f"{text}\n{pictures}", kept)
    content = {
        "rows": rows,
        "settings": settings_of(matrix, rows),
        "summary": summary,
        "failures": dict(failures),
    }
    write_text(report.with_name(f"{report.name}.json"), json.dumps(content, default=vars))
    return text
