"""The matrix runner: what runs, what is skipped, what is reported."""

import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from agents.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE
from agents.config import from_dict, parse_train_config
from commandline import why_it_failed
from comparison import running
from comparison.board import write_board
from comparison.matrix import WINDOW, load_matrix, members
from comparison.outcome import area_under, collect, interquartile_mean, kept_rows, summarise
from comparison.report import figure, foretelling, markdown, mean_curve, write_report
from comparison.running import execute, made_with_other_settings, noted_failure, read_record, run, run_all
from scripts import compare

MATRIX = {
    "title": "A comparison",
    "config": "configs/tmaze.yaml",
    "metric": "charts/success_rate",
    "bar": 0.95,
    "seeds": [0, 1],
    "tasks": {"short": {"run.total_steps": 1024, "env.kwargs.corridor_length": 2, "env.kwargs.time_limit": 8}},
    "methods": {"critic": {"critic.kind": "dni"}, "plain": {"critic.kind": "none"}},
}
COMMAND = "python scripts/compare.py matrix.yaml"
TINY = {
    "run.log_every_steps": 512,
    "run.tensorboard": False,
    "critic.hidden_sizes": [],
    "critic.max_norm_ratio": None,
    "model.hidden_size": 8,
    "env.num_envs": 16,
}


def write(folder, **changes):
    matrix = {**MATRIX, **changes}
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump(matrix, sort_keys=False))
    return path


@pytest.fixture(autouse=True)
def not_stopping(monkeypatch):
    """What one test stopped is not stopped in the next."""
    monkeypatch.setattr("comparison.running._stopping", threading.Event())


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    return compare.main()


def save_settings(member, runs, **changes):
    """What train.py writes first; `changes` by section replace settings."""
    folder = runs / member.name
    folder.mkdir(exist_ok=True)
    settings = {name: {**section, **changes.get(name, {})} for name, section in member.resolved().items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def row(method="critic", seed=0, curve=(0.5, 0.97), finished=True, total=1000, task="short", **changes):
    steps = [total * (i + 1) // len(curve) for i in range(len(curve))]
    reached = next((s for s, value in zip(steps, curve, strict=True) if value >= 0.95), None)
    return {
        "method": method,
        "task": task,
        "seed": seed,
        "total_steps": total,
        "finished": finished,
        "end": curve[-1],
        "best": max(curve),
        "area": area_under(steps, curve, total),
        "steps_to_bar": reached,
        "steps_per_second": 1000.0,
        "peak_memory_bytes": 300 * 2**20,
        "horizon": None,
        "horizon_learning": None,
        "expected_horizon": None,
        "foretold_at": None,
        "steps": steps,
        "curve": list(curve),
    } | changes


def test_members_are_every_combination_with_the_most_special_setting_last(tmp_path):
    x, y = "env.kwargs.corridor_length", "model.hidden_size"
    tasks = {"a": {x: 1, y: 1}, "b": {x: 2, y: 2}}
    methods = {"m": {y: 3}, "n": {}}
    matrix = load_matrix(write(tmp_path, tasks=tasks, methods=methods, overrides={"m / b": {y: 4}, "n / a": None}))
    found = [(m.seed, m.task, m.method, m.settings) for m in members(matrix)]
    assert found == [
        (seed, *rest)
        for seed in (0, 1)
        for rest in (("a", "m", {x: 1, y: 3}), ("b", "m", {x: 2, y: 4}), ("b", "n", {x: 2, y: 2}))
    ]  # fmt: skip
    names = [m.name for m in members(matrix)]
    assert len(set(names)) == 6 and all("/" not in name and " " not in name for name in names)


def test_members_share_no_arguments_and_train_is_told_what_the_matrix_says(tmp_path, monkeypatch):
    kwargs = {"corridor_length": 2, "time_limit": 8}
    tasks = {name: {"run.total_steps": 1024} for name in "ab"}
    methods = {"m": {"env.kwargs.text": "8", "env.kwargs": kwargs}}
    overrides = {"m / a": {"env.kwargs.time_limit": 9}}
    matrix = load_matrix(write(tmp_path, seeds=[0], tasks=tasks, methods=methods, overrides=overrides))
    found = {member.task: member.resolved()["env"]["kwargs"] for member in members(matrix)}
    assert found == {"a": {**kwargs, "time_limit": 9, "text": "8"}, "b": {**kwargs, "text": "8"}}
    commands = []
    monkeypatch.setattr("comparison.running.execute", lambda command: commands.append(command) or (0, None, 5))
    for member in members(matrix):
        run(member, tmp_path)
        config, _ = parse_train_config(commands[-1][2:])
        assert config.env.kwargs == found[member.task]


def test_the_configuration_of_a_member_is_read_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("comparison.matrix.from_dict", lambda data: calls.append(data) or from_dict(data))
    matrix, report = load_matrix(write(tmp_path)), tmp_path / "report"
    write_report(matrix, [row(total=1024), row("plain", total=1024)], {}, COMMAND, report)
    kept_rows(matrix, tmp_path / "none", report.with_name("report.json"))
    collect(matrix, tmp_path / "none")
    assert len(calls) == len(list(members(matrix))) == 4


def test_a_method_can_have_seeds_of_its_own_on_a_task(tmp_path):
    tasks = {**MATRIX["tasks"], "long": MATRIX["tasks"]["short"]}
    overrides = {"critic / long": {"seeds": [1, 2, 3], "critic.scale": 0.5}}
    matrix = load_matrix(write(tmp_path, tasks=tasks, overrides=overrides))
    seeds = {}
    for member in members(matrix):
        seeds.setdefault((member.method, member.task), []).append(member.seed)
        assert "seeds" not in member.settings
        assert (member.settings.get("critic.scale") == 0.5) == ((member.method, member.task) == ("critic", "long"))
    assert seeds == {
        ("critic", "short"): [0, 1],
        ("plain", "short"): [0, 1],
        ("critic", "long"): [1, 2, 3],
        ("plain", "long"): [0, 1],
    }
    page = markdown(matrix, [row(method="critic", task="long", seed=2)], [], {}, "COMMAND")
    assert "1 of 9 planned" in page and "critic, long: seeds 1, 3; " in page


def test_seeds_that_failed_are_counted_among_those_that_ended(tmp_path):
    matrix = load_matrix(write(tmp_path, seeds=[0, 1, 2, 3, 4]))
    rows = [row(), row(seed=1), row(seed=2, curve=(1.0,), finished=False)]
    failures = {m.name: "why" for m in members(matrix) if m.method == "plain" or m.seed >= 2}
    page = markdown(matrix, rows, summarise(matrix, rows, failures), failures, "COMMAND")
    assert "| critic | **2 of 5**, mean 0.970, 3 failed (0.97 0.97 1.00*) |" in page
    assert "| plain | failed |" in page


def test_a_member_that_finished_counts_once_whatever_failed_after_it(tmp_path):
    """Such as a measurement after the end, or a second process that was refused its folder."""
    matrix = load_matrix(write(tmp_path, seeds=[0, 1]))
    rows = [row(), row(seed=1)]
    failures = {m.name: "why" for m in members(matrix) if m.method == "critic"}
    summary = summarise(matrix, rows, failures)
    page = markdown(matrix, rows, summary, failures, "COMMAND")
    assert "| critic | **2 of 2**, mean 0.970 (0.97 0.97) |" in page and "Failed: " in page
    assert next(iter(summary[0]["tasks"].values()))["num_failed"] == 0


def test_a_member_of_which_nothing_but_a_horizon_was_logged_has_not_begun(tmp_path):
    matrix = load_matrix(write(tmp_path, metric="credit/expected_horizon"))
    first, second, *_ = members(matrix)
    for member, rows in (
        (first, [{"step": 0}]),
        (second, [{"step": 0}, {"step": 512, "charts/SPS": 7.0}, {"step": 600}]),
    ):
        folder = save_settings(member, tmp_path)
        lines = (json.dumps(row | {"credit/expected_horizon": 3.0}) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text("".join(lines))
    (found,) = collect(matrix, tmp_path)
    assert (found["method"], found["steps_per_second"], found["end"]) == (second.method, 7.0, 3.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bar": float("nan")}, "bar: found nan; allowed a number"),
        ({"methods": {"m" * 300: {}}}, "tasks, methods: found names that make the folder .* allowed 200 bytes"),
    ],
)
def test_what_would_fail_after_training_is_found_before(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        load_matrix(write(tmp_path, **changes))


def test_unknown_and_missing_keys_are_one_line(tmp_path):
    path = tmp_path / "matrix.yaml"
    path.write_text("title: x\ncolour: red\n")
    with pytest.raises(SystemExit, match=r"unknown keys \['colour'\], missing keys \['bar', 'config'"):
        load_matrix(path)


def test_the_page_counts_ends_marks_the_unfinished_and_names_who_fell(tmp_path):
    matrix = load_matrix(write(tmp_path))
    rows = [row(), row(seed=1, curve=(0.99, 0.4)), row("plain", curve=(0.5,), finished=False)]
    page = markdown(matrix, rows, summarise(matrix, rows, {}), {"name": "why"}, "COMMAND")
    assert "**1 of 2**, mean 0.685 (0.97 0.40)" in page
    assert "| plain | unfinished (0.50*) |" in page
    assert "ended below it: critic, short, seed 1 (0.99 to 0.40)" in page
    assert "unfinished when this page was made: plain, short, seed 0 at step 1,000" in page
    assert "COMMAND" in page and "name: why" in page
    assert (
        "**Not complete:** 2 of 4 planned runs are finished. Not finished when this page was made: plain, short: seeds 0, 1."
        in page
    )
    figure(matrix, rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_page_names_every_length_of_a_task(tmp_path):
    rows = [row(total=2000), row("plain", total=1024), row("plain", 1, total=1024)]
    assert "Steps: short 1,024 or 2,000." in markdown(load_matrix(write(tmp_path)), rows, [], {}, "COMMAND")


def test_the_mean_of_curves_ends_where_the_shortest_does():
    rows = [row(curve=(0.0, 0.2, 0.4, 0.6)), row(seed=1, curve=(1.0, 0.8)) | {"steps": [300, 450]}]
    steps, mean = mean_curve(rows)
    assert (steps[0], steps[-1]) == (300, 450)
    assert mean[[0, -1]] == pytest.approx([(0.04 + 1.0) / 2, (0.16 + 0.8) / 2])


def test_the_page_says_which_planned_runs_are_missing_and_which_are_left_out_on_purpose(tmp_path):
    tasks = {"short": {}, "long": {}}
    matrix = load_matrix(write(tmp_path, tasks=tasks, seeds=list(range(5)), overrides={"plain / long": None}))
    rows = [row(task=task, seed=seed) for task in tasks for seed in range(5)]
    page = markdown(matrix, rows, summarise(matrix, rows, {}), {}, "COMMAND")
    assert (
        "10 of 15 planned runs are finished. Not finished when this page was made: plain, short: seeds 0 to 4.\n"
        in page
    )
    assert (
        page.count("| plain | not run | left out | - |\n") == 1
        and page.count("| plain | not run | left out | incomplete |") == 2
    )
    assert page.count("| plain | not run | left out |\n") == 2

    few = rows[:1] + rows[2:3]
    page = markdown(matrix, few, summarise(matrix, few, {}), {}, "COMMAND")
    assert "critic, short: seeds 1, 3, 4; critic, long: seeds 0 to 4; plain, short: seeds 0 to 4.\n" in page
    page = markdown(matrix, [], summarise(matrix, [], {}), {}, "COMMAND")
    assert "critic, short and long: seeds 0 to 4; plain, short: seeds 0 to 4.\n" in page
    rows += [row("plain", seed) for seed in range(5)]
    page = markdown(matrix, rows, summarise(matrix, rows, {}), {}, "COMMAND")
    assert "\nAll 15 of 15 planned runs are finished.\n" in page and "not run" not in page


def test_until_the_bar_are_medians_of_the_finished_seeds_that_reached_it(tmp_path):
    matrix = load_matrix(write(tmp_path))
    rows = [
        row(curve=(0.5, 0.97)),  # at 1,000 steps
        row(seed=1, curve=(0.99, 0.4), steps_per_second=100.0),  # at 500, and fell
        row(seed=2, curve=(0.5, 0.6)),
        row(seed=3, curve=(0.99, 0.99), finished=False),
    ]
    failures = {"plain_short_seed0": "why"}
    page = markdown(matrix, rows, summarise(matrix, rows, failures), failures, "COMMAND")
    until = page[page.index("| until 0.95 |") : page.index("Cost: ")]
    assert "| critic | 750 steps, 3 s (2 of 3) |" in until  # 1 s and 5 s
    assert "| plain | none finished |" in until
    rows = [row(curve=(0.5, 0.6))]
    page = markdown(matrix, rows, summarise(matrix, rows, {}), {}, "COMMAND")
    assert "| critic | 0 of 1 |" in page and "| plain | not run |" in page


def test_a_matrix_runs_survives_a_failing_member_and_skips_what_is_done(tmp_path, monkeypatch, capsys):
    tasks = {"short": {**MATRIX["tasks"]["short"], **TINY}}
    methods = {**MATRIX["methods"], "broken": {"env.id": "no_such_module:Maze"}}
    path = write(tmp_path, seeds=[0], tasks=tasks, methods=methods, dial="env.kwargs.corridor_length")
    runs = tmp_path / "runs"
    assert main(monkeypatch, path, "--runs", runs, "--jobs", 2) == 1
    failure = "Failed: broken_short_seed0: train.py: env: no_such_module:Maze: there is no module 'no_such_module'"
    page = (runs / "report.md").read_text()
    assert failure in page and "1 failed" in page
    content = json.loads((runs / "report.json").read_text())
    assert [(r["method"], r["finished"], r["steps"][-1]) for r in content["rows"]] == [
        ("critic", True, 1024),
        ("plain", True, 1024),
    ]
    # Python with PyTorch takes this much at least, and this small run not more.
    assert all(100 * 2**20 < r["peak_memory_bytes"] < 4 * 2**30 for r in content["rows"])
    assert content["failures"].keys() == {"broken_short_seed0"}

    trained = []
    monkeypatch.setattr("comparison.running.execute", lambda command: trained.append(command))
    assert main(monkeypatch, path, "--runs", runs, "--methods", "plain", "critic") == 0  # nothing is left to do
    assert main(monkeypatch, path, "--runs", runs, "--report-only") == 0
    assert not trained
    assert failure in (runs / "report.md").read_text()  # also without having been run again
    with pytest.raises(SystemExit):
        main(monkeypatch, path, "--runs", runs, "--methods", "nobody")
    assert "--methods: found ['nobody']; allowed ['critic', 'plain', 'broken']" in capsys.readouterr().err

    methods["plain"] = {"critic.kind": "none", "model.hidden_size": 9}
    write(tmp_path, seeds=[0], tasks=tasks, methods=methods)
    other = tmp_path / "other"  # a report that has lost nothing: a run of these settings does not exist
    assert main(monkeypatch, path, "--runs", runs, "--report", other, "--methods", "plain") == 1
    page = other.with_suffix(".md").read_text()
    assert "plain_short_seed0: model.hidden_size: found a run with 8; allowed 9" in page
    assert "| plain | failed | - |" in page and "| broken | failed | - |" in page and "not run" not in page
    assert [r["method"] for r in json.loads(other.with_suffix(".json").read_text())["rows"]] == ["critic"]
    assert not trained


@pytest.mark.parametrize(("method", "is_other"), [("critic", True), ("plain", False)])
def test_a_run_with_other_settings_is_no_member_unless_they_are_those_of_a_critic_that_is_not_there(
    tmp_path, method, is_other
):
    matrices = [load_matrix(write(tmp_path, tasks={"short": {"critic.learning_rate": rate}})) for rate in (0.001, 0.01)]
    then, now = (next(member for member in members(matrix) if member.method == method) for matrix in matrices)
    save_settings(then, tmp_path)
    assert made_with_other_settings(then, tmp_path) is None
    problem = made_with_other_settings(now, tmp_path)
    assert (problem is not None) == is_other
    assert problem is None or problem.startswith("critic.learning_rate: found a run with 0.001; allowed 0.01")


def test_interfaces_between_levels_are_critics_also_where_the_whole_state_has_none(tmp_path):
    levels = {"critic.kind": "none", "model.core": "multi_timescale", "algorithm.bptt_horizon": 1}
    method = [{"levels": {**levels, "critic.interfaces": wanted}} for wanted in (False, True)]
    then, now = (next(members(load_matrix(write(tmp_path, methods=methods)))) for methods in method)
    save_settings(then, tmp_path)
    assert made_with_other_settings(then, tmp_path) is None
    assert made_with_other_settings(now, tmp_path).startswith("critic.interfaces: found a run with False; allowed True")


@pytest.mark.parametrize("file", [CHECKPOINT_FILE, PREVIOUS_FILE])
def test_a_run_is_resumed_where_train_would(tmp_path, monkeypatch, file):
    member = next(members(load_matrix(write(tmp_path, seeds=[0]))))
    folder = save_settings(member, tmp_path)
    (folder / file).touch()
    (folder / "metrics.jsonl").write_text('{"step": 512}\n')
    commands = []
    monkeypatch.setattr("comparison.running.execute", lambda command: (commands.append(command), (0, None, 0))[1])
    run(member, tmp_path)
    assert commands[0][2:4] == ["--resume", str(folder)] and (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(("kind", "is_other"), [("dni_aux", True), ("dni", False), ("cdni", False)])
def test_settings_of_another_kind_of_critic_make_no_other_run(tmp_path, kind, is_other):
    shape = {"critic.kind": kind, "algorithm.rollout_length": 16, "algorithm.bptt_horizon": 8}
    method = [{"critic": {**shape, "critic.auxiliary_cost": cost}} for cost in (0.1, 0.03)]
    then, now = (next(members(load_matrix(write(tmp_path, methods=methods)))) for methods in method)
    save_settings(then, tmp_path)
    assert made_with_other_settings(then, tmp_path) is None
    problem = made_with_other_settings(now, tmp_path)
    assert (problem is not None) == is_other
    assert problem is None or problem.startswith("critic.auxiliary_cost: found a run with 0.1; allowed 0.03")


@pytest.mark.parametrize(
    ("steps", "anneals", "is_other"), [(512, True, True), (512, False, False), (2048, False, True), (1024, True, False)]
)
def test_a_run_of_another_length_is_continued_only_where_that_is_the_same_experiment(
    tmp_path, steps, anneals, is_other
):
    settings = {**MATRIX["tasks"]["short"], "algorithm.anneal_learning_rate": anneals}
    now = next(members(load_matrix(write(tmp_path, tasks={"short": settings}))))
    then = next(members(load_matrix(write(tmp_path, tasks={"short": {**settings, "run.total_steps": steps}}))))
    save_settings(then, tmp_path)
    problem = made_with_other_settings(now, tmp_path)
    assert (problem is not None) == is_other
    assert problem is None or problem.startswith(f"run.total_steps: found a run with {steps}; allowed 1024")


@pytest.mark.parametrize("damage", ["missing", "refused", "no YAML", "no mapping"])
def test_a_run_with_metrics_whose_settings_cannot_be_read_is_no_member(tmp_path, damage):
    matrix = load_matrix(write(tmp_path, seeds=[0]))
    member = next(members(matrix))
    file = save_settings(member, tmp_path) / "config.yaml"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text({"refused": "model: {size: 3}", "no YAML": "[", "no mapping": "- model"}[damage])
    assert made_with_other_settings(member, tmp_path) is None  # nothing has been measured
    line = {"step": 1024, "charts/success_rate": 1.0, "charts/SPS": 1.0}
    (file.parent / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    problem = made_with_other_settings(member, tmp_path)
    assert problem.startswith("config.yaml: found a run whose settings cannot be read (") and "\n" not in problem
    assert problem.endswith("; allowed those of the matrix; remove its folder, or choose another with --runs")
    assert run(member, tmp_path) == problem and collect(matrix, tmp_path) == []


def test_what_a_newer_version_refuses_does_no_harm_where_it_makes_no_other_experiment(tmp_path):
    refused = {"critic": {"targets_per_window": 1, "gone": 2}, "run": {"gone": 3}}
    for member in members(load_matrix(write(tmp_path, seeds=[0]))):
        folder = save_settings(member, tmp_path, **refused)
        (folder / "metrics.jsonl").write_text('{"step": 1024}\n')
        problem = made_with_other_settings(member, tmp_path)
        assert (problem is None) == (member.method == "plain"), "whose critic is not there"
        save_settings(member, tmp_path, run={"gone": 3})
        assert made_with_other_settings(member, tmp_path) is None
        save_settings(member, tmp_path, run={"gone": 3, "total_steps": 4096})
        assert made_with_other_settings(member, tmp_path).startswith("run.total_steps: found a run with 4096")


def test_a_matrix_with_bad_settings_has_no_members_among_the_runs(tmp_path):
    (member,) = members(load_matrix(write(tmp_path, seeds=[0], methods={"bad": {"critic.kind": "dni"}})))
    member = dataclasses.replace(member, settings={**member.settings, "critic.kind": "dnl"})
    folder = tmp_path / member.name
    folder.mkdir()
    assert made_with_other_settings(member, tmp_path) is None  # there is no run, and train.py will say it
    (folder / "metrics.jsonl").write_text('{"step": 1024}\n')
    assert made_with_other_settings(member, tmp_path).startswith("critic.kind: found 'dnl'")


def test_a_report_keeps_members_that_have_no_run_here_if_their_settings_are_those_of_the_matrix(
    tmp_path, monkeypatch, capsys
):
    path = write(tmp_path)
    runs, report = tmp_path / "runs", tmp_path / "report"
    file = report.with_name("report.json")
    matrix = load_matrix(path)
    earlier = [row(total=1024), row("plain", total=1024), row("critic", 1, finished=False, total=1024)]
    write_report(matrix, earlier, {}, COMMAND, report)
    kept = kept_rows(matrix, runs, file)
    assert kept == {
        "critic_short_seed0": earlier[0],
        "plain_short_seed0": earlier[1],
    }  # what is not finished is not kept

    trained = []
    monkeypatch.setattr("comparison.running.execute", lambda command: trained.append(command) or (1, "no", 0))
    main(monkeypatch, path, "--runs", runs, "--report", report, "--keep")
    names = [command[command.index("--run.name") + 1] for command in trained]
    assert names == ["critic_short_seed1", "plain_short_seed1"]  # the others are not run again
    rows = json.loads(file.read_text())["rows"]
    assert [(r["method"], r["seed"]) for r in rows] == [("critic", 0), ("plain", 0)]

    there = runs / "plain_short_seed0"
    there.mkdir()  # begun, and perhaps cut off at once
    assert list(kept_rows(matrix, runs, file)) == ["critic_short_seed0", "plain_short_seed0"]
    main(monkeypatch, path, "--runs", runs, "--report", report, "--keep", "--report-only")
    assert [(r["method"], r["seed"]) for r in json.loads(file.read_text())["rows"]] == [("critic", 0), ("plain", 0)]
    with pytest.raises(SystemExit):
        main(monkeypatch, path, "--runs", runs, "--report", report, "--report-only")
    assert "finished runs that the new report would lack (2" in capsys.readouterr().err
    plain = next(m for m in members(matrix) if m.name == there.name)
    (there / "metrics.jsonl").write_text('{"step": 1024, "charts/success_rate": 1.0}\n')
    save_settings(plain, runs)
    assert list(kept_rows(matrix, runs, file)) == ["critic_short_seed0"]  # a finished run that is here comes first
    longer = {"short": {**MATRIX["tasks"]["short"], "run.total_steps": 2048}}
    assert not kept_rows(load_matrix(write(tmp_path, tasks=longer)), runs, file)
    other = {"short": {**MATRIX["tasks"]["short"], "critic.learning_rate": 0.5}}
    assert not kept_rows(load_matrix(write(tmp_path, tasks=other)), runs, file)
    with pytest.raises(SystemExit):
        main(monkeypatch, path, "--runs", runs, "--report", tmp_path / "none", "--keep")
    assert "--keep: found " in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"bar": 0.5}, {"metric": "charts/episodic_return"}])
def test_rows_for_another_bar_or_metric_are_not_kept(tmp_path, change):
    runs, report = tmp_path / "runs", tmp_path / "report"
    matrix = load_matrix(write(tmp_path, seeds=[0]))
    for member in members(matrix):
        runs.mkdir(exist_ok=True)
        line = {"step": 1024, "charts/success_rate": 0.7, "charts/episodic_return": 0.6, "charts/SPS": 1.0}
        (save_settings(member, runs) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_report(matrix, collect(matrix, runs), {}, COMMAND, report)
    file = report.with_name("report.json")
    assert len(kept_rows(matrix, tmp_path / "none", file)) == 2
    assert not kept_rows(load_matrix(write(tmp_path, seeds=[0], **change)), tmp_path / "none", file)


def test_a_report_keeps_failures_of_members_that_have_no_run_here(tmp_path, monkeypatch):
    path, report = write(tmp_path, dial={"short": 7}), tmp_path / "report"
    failure = {"critic_short_seed1": "train.py: NaN"}
    write_report(load_matrix(path), [row(total=1024, curve=(1.0,))], failure, COMMAND, report)
    main(monkeypatch, path, "--runs", tmp_path / "none", "--report", report, "--report-only", "--keep")
    page, content = report.with_suffix(".md").read_text(), json.loads(report.with_suffix(".json").read_text())
    assert "Failed: critic_short_seed1: train.py: NaN" in page and "| none (none) |" in page
    assert content["failures"] == failure
    (tmp_path / "none" / "critic_short_seed1").mkdir()  # run again, and not failed
    main(monkeypatch, path, "--runs", tmp_path / "none", "--report", report, "--report-only", "--keep")
    assert not json.loads(report.with_suffix(".json").read_text())["failures"]


def test_a_report_with_less_than_the_one_in_its_place_is_refused_before_anything_is_run(tmp_path, monkeypatch, capsys):
    path = write(tmp_path)
    runs, report = tmp_path / "runs", tmp_path / "report"
    page, file = report.with_name("report.md"), report.with_name("report.json")
    earlier = [row(total=1024), row("plain", total=1024), row("critic", 1, finished=False, total=1024)]
    write_report(load_matrix(path), earlier, {}, COMMAND, report)
    page.write_text(page.read_text() + "\n**Reading.** It works.\n")
    before = page.read_text(), file.read_text()
    trained = []
    monkeypatch.setattr("comparison.running.execute", lambda command: trained.append(command) or (1, "no", 0))

    def refusal(*options):
        with pytest.raises(SystemExit):
            main(monkeypatch, path, "--runs", runs, "--report", report, *options)
        assert (page.read_text(), file.read_text()) == before and not trained
        (line,) = capsys.readouterr().err.splitlines()
        return line

    lacking = f"--report: found {file}, which has finished runs that the new report would lack ("
    assert f"{lacking}2, such as critic_short_seed0, not in {runs})" in refusal("--report-only")
    assert f"{lacking}1, such as plain_short_seed0" in refusal("--methods", "critic")
    assert refusal("--report-only").endswith(
        "keep them with --keep, or choose another --report; --help lists the options"
    )
    main(monkeypatch, path, "--runs", runs, "--report", report, "--report-only", "--keep")
    assert len(json.loads(file.read_text())["rows"]) == 2 and "It works." in page.read_text()
    before = page.read_text(), file.read_text()

    # nor are rows lost of what the matrix calls otherwise, or has no longer
    write(tmp_path, methods={"critic": MATRIX["methods"]["critic"], "plain windows": MATRIX["methods"]["plain"]})
    for options in (("--report-only",), ("--report-only", "--keep"), ("--keep",), ()):
        problem = refusal(*options)
        assert (
            "which has finished runs that the matrix does not name (1, such as 'plain' on 'short', seed 0)" in problem
        )

    # rows of other settings cannot be kept, and are not lost without a word either
    write(tmp_path, methods={**MATRIX["methods"], "plain": {"critic.kind": "none", "model.hidden_size": 9}})
    for options in (("--report-only",), ("--report-only", "--keep"), ("--keep", "--methods", "critic")):
        problem = refusal(*options)
        assert (
            lacking in problem and "(1, such as plain_short_seed0) cannot be kept: choose another --report" in problem
        )

    content = json.loads(file.read_text())
    for other in ([], {"rows": content["rows"]}):  # as older versions wrote it
        file.write_text(json.dumps(other))
        before = page.read_text(), file.read_text()
        assert f"--report: found {file}, which cannot be read (" in refusal("--report-only")
    main(monkeypatch, path, "--runs", runs, "--report", report)  # where all is run anew, nothing is lost
    assert len(trained) == 4


def finish(member, runs, **charts):
    """A run of the member that is done, as train.py leaves it."""
    runs.mkdir(exist_ok=True)
    line = {"step": member.total_steps, "charts/SPS": 1.0, **{f"charts/{name}": x for name, x in charts.items()}}
    (save_settings(member, runs) / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def refused(monkeypatch, capsys, *arguments):
    """The line of a call that ends before anything is written."""
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, *arguments)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"run.total_steps": 5000}, "run.total_steps: found a run with 3000; allowed 5000, as in the matrix"),
        ({"critic.kind": "cdni"}, "critic.kind: found a run with 'dni'; allowed 'cdni', as in the matrix"),
        ({}, "metric: found no charts/nonsense in metrics.jsonl, which has charts/SPS, charts/success_rate; allowed"),
    ],
)
def test_a_report_stays_if_its_runs_are_not_those_of_the_matrix_any_more(tmp_path, monkeypatch, capsys, changes, why):
    settings = {**MATRIX["tasks"]["short"], "critic.kind": "dni", "algorithm.anneal_learning_rate": True}
    of_matrix = {"seeds": [0], "methods": {"critic": None}, "tasks": {"short": {**settings, "run.total_steps": 3000}}}
    path, runs = write(tmp_path, **of_matrix), tmp_path / "runs"
    for member in members(load_matrix(path)):
        finish(member, runs, success_rate=0.5)
    monkeypatch.setattr("comparison.running.execute", lambda command: pytest.fail("ran"))
    assert main(monkeypatch, path, "--runs", runs) == 0
    before = [(runs / f"report.{kind}").read_bytes() for kind in ("md", "json", "png")]
    assert len(json.loads(before[1])["rows"]) == 1

    of_matrix["tasks"] = {"short": {**of_matrix["tasks"]["short"], **changes}}
    write(tmp_path, **of_matrix, **({} if changes else {"metric": "charts/nonsense"}))
    capsys.readouterr()
    for options in ((), ("--report-only",), ("--keep",), ("--report-only", "--keep")):
        (line,) = refused(monkeypatch, capsys, path, "--runs", runs, *options)
        assert (
            f"--report: found {runs / 'report.json'}, which has finished runs that the new report would lack (1" in line
        )
        assert "; undo the change of the matrix, or choose another --runs and --report; critic_short_seed0: " in line
        assert why in line
        assert before == [(runs / f"report.{kind}").read_bytes() for kind in ("md", "json", "png")]


def trains_without_the_metric(monkeypatch, path, **charts):
    """The names of the members that are started from now on, which log these alone."""
    started = []

    def execute(command):
        folder = command[command.index("--run.name") + 1]
        member = next(m for m in members(load_matrix(path)) if m.name == folder)
        started.append(folder)
        finish(member, Path(command[command.index("--run.output_dir") + 1]), **charts)
        return 0, None, 5

    monkeypatch.setattr("comparison.running.execute", execute)
    return started


@pytest.mark.parametrize(
    ("metric", "way_out"),
    [
        ("charts/nonsense", "allowed one that all members log; choose another metric"),
        (
            "charts/success_rate",
            "allowed one that all members log; set env.kwargs.success_reward, or choose another metric",
        ),
    ],
)
def test_a_metric_that_is_not_logged_shows_after_the_first_member(tmp_path, monkeypatch, capsys, metric, way_out):
    path, runs = write(tmp_path, metric=metric, seeds=[0, 1, 2]), tmp_path / "runs"
    started = trains_without_the_metric(monkeypatch, path, episodic_return=1.0)
    problem = f"metric: found no {metric} in metrics.jsonl, which has charts/SPS, charts/episodic_return; {way_out}"
    for _ in range(2):  # the second time it is known before anything is started
        assert main(monkeypatch, path, "--runs", runs) == 1
        assert started == ["critic_short_seed0"]
        errors = capsys.readouterr().err.splitlines()
        assert f"critic_short_seed0: {problem}" in errors[0]
        assert errors[1:] == [f"5 of 6: not started, as {metric} is not logged"]
        page, content = (runs / "report.md").read_text(), json.loads((runs / "report.json").read_text())
        assert f"Failed: critic_short_seed0: {problem}" in page
        assert "| critic | failed | - |" in page and "| plain | not run | - |" in page
        assert content["failures"] == {"critic_short_seed0": problem}


def test_a_member_without_a_number_fails_alone(tmp_path, monkeypatch):
    path, runs = write(tmp_path, seeds=[0]), tmp_path / "runs"
    started = trains_without_the_metric(monkeypatch, path, success_rate=None)
    assert main(monkeypatch, path, "--runs", runs) == 1
    assert started == ["critic_short_seed0", "plain_short_seed0"]
    failures = json.loads((runs / "report.json").read_text())["failures"]
    assert failures.keys() == set(started)
    assert failures["plain_short_seed0"].startswith("metric: found no number for charts/success_rate in metrics.jsonl")


def test_a_report_stays_if_runs_that_were_to_take_its_place_do_not_log_the_metric(tmp_path, monkeypatch, capsys):
    path, report = write(tmp_path, metric="charts/nonsense"), tmp_path / "report"
    write_report(load_matrix(write(tmp_path)), [row("plain", total=1024)], {}, COMMAND, report)
    before = report.with_suffix(".md").read_text(), report.with_suffix(".json").read_text()
    write(tmp_path, metric="charts/nonsense")
    started = trains_without_the_metric(monkeypatch, path, success_rate=1.0)
    lines = refused(monkeypatch, capsys, path, "--runs", tmp_path / "new", "--report", report)
    assert started == ["critic_short_seed0"] and "found no charts/nonsense" in lines[0]
    assert "has finished runs that the new report would lack (1, such as plain_short_seed0" in lines[-1]
    assert before == (report.with_suffix(".md").read_text(), report.with_suffix(".json").read_text())


def test_a_page_names_the_command_it_was_made_by_also_when_it_is_drawn_again(tmp_path, monkeypatch):
    path, runs, report = write(tmp_path, seeds=[0]), tmp_path / "my runs", tmp_path / "a page"
    for member in members(load_matrix(path)):
        finish(member, runs, success_rate=0.5)
    given = [path, "--jobs", 2, "--devices", "cpu", "cuda:0", "--runs", runs, "--report", report]
    monkeypatch.setattr("comparison.running.has_logged_horizons", lambda folder: True)
    assert main(monkeypatch, *given, "--credit") == 0
    page = report.with_name("a page.md")
    command = shlex.join(["python", "scripts/compare.py", *map(str, given), "--credit"])
    assert f"'{runs}'" in command and f"Made by\n\n    {command}\n\n" in page.read_text()
    before = page.read_text()
    elsewhere = ("--board", tmp_path / "board", "--report", report)
    main(monkeypatch, path, "--runs", tmp_path / "none", *elsewhere, "--report-only", "--keep")
    assert page.read_text() == before
    main(monkeypatch, path, "--runs", runs, "--methods", "plain")  # the page has all
    made_by = shlex.join(["python", "scripts/compare.py", str(path), "--runs", str(runs)])
    assert f"    {made_by}\n" in (runs / "report.md").read_text()


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_run(tmp_path, monkeypatch, capsys):
    path, runs = write(tmp_path), tmp_path / "runs"
    monkeypatch.setattr("comparison.running.execute", lambda command: pytest.fail("ran"))
    for options, message in (
        (("--runs", runs, "--report", path / "page"), f"--report: found {path}, which cannot be made or written ("),
        (("--runs", runs, "--report", "."), "--report: found '.'; allowed a name for the page"),
        (("--runs", runs, "--board", path / "board"), f"--board: found {path / 'board'}, which cannot be"),
        (("--runs", path, "--report", tmp_path / "page", "--board", tmp_path / "b"), f"--runs: found {path}, which"),
    ):
        with pytest.raises(SystemExit):
            main(monkeypatch, path, *options)
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_what_was_interrupted_is_resumed(tmp_path, monkeypatch):
    matrix = load_matrix(write(tmp_path, seeds=[0]))
    member = next(members(matrix))
    folder = save_settings(member, tmp_path)
    commands = []
    monkeypatch.setattr("comparison.running.execute", lambda command: commands.append(command) or (0, None, 5))
    (folder / "metrics.jsonl").write_text('{"step": 512}\n')
    assert run(member, tmp_path) is None
    assert not (folder / "metrics.jsonl").exists()  # it had no checkpoint, so it begins again
    (folder / CHECKPOINT_FILE).touch()
    assert run(member, tmp_path, "cuda:1") is None
    assert "--config" in commands[0] and "--run.device" not in commands[0]
    resumed = ["--resume", str(folder), "--run.total_steps", "1024", "--run.device", "cuda:1"]
    assert commands[1][2:] == resumed
    assert read_record(folder) == {"peak_memory_bytes": 5, "failure": None, "settings": member.settings}


def test_a_run_that_failed_after_its_last_step_is_gone_on_with(tmp_path, monkeypatch):
    member = next(members(load_matrix(write(tmp_path, seeds=[0]))))
    folder = save_settings(member, tmp_path)
    (folder / CHECKPOINT_FILE).touch()
    (folder / "metrics.jsonl").write_text('{"step": 1024}\n')
    (folder / "compare.json").write_text('{"failure": "No space left on device"}')
    commands = []
    monkeypatch.setattr("comparison.running.execute", lambda command: commands.append(command) or (0, None, 5))
    for _ in range(2):
        assert run(member, tmp_path) is None
    assert len(commands) == 1 and read_record(folder)["failure"] is None


@pytest.mark.parametrize(("code", "kept"), [(1, "no"), (-9, "no"), (130, None), (-15, None)])
def test_an_interrupted_member_is_not_kept_as_failed(tmp_path, monkeypatch, code, kept):
    member = next(members(load_matrix(write(tmp_path))))
    monkeypatch.setattr("comparison.running.execute", lambda command: (code, "no", 5))
    assert run(member, tmp_path) == "no"
    assert noted_failure(member, tmp_path) == kept
    relabelled = dataclasses.replace(member, settings={**member.settings, "model.hidden_size": 9})
    assert noted_failure(relabelled, tmp_path) is None  # of another matrix, in which the labels meant something else


def test_a_command_gives_its_code_its_last_line_and_its_memory():
    code, problem, memory = execute(
        [sys.executable, "-c", "import sys; x = bytearray(64 * 2**20); print('a\\nb', file=sys.stderr); sys.exit(3)"]
    )
    assert (code, problem) == (3, "b") and memory > 64 * 2**20
    assert execute([sys.executable, "-c", "pass"])[:2] == (0, None)
    assert execute([sys.executable, "-c", "import sys; sys.exit(4)"])[:2] == (4, "exit code 4")


def test_jobs_are_dealt_to_devices_and_each_has_one_member_at_a_time(tmp_path, monkeypatch):
    todo = list(members(load_matrix(write(tmp_path, seeds=list(range(6))))))
    busy, most, used, lock = {}, {}, [], threading.Lock()
    metric = {"metric": MATRIX["metric"]}

    def run(member, runs, device, measure):
        with lock:
            busy[device] = busy.get(device, 0) + 1
            most[device] = max(most.get(device, 0), busy[device])
            used.append(device)
        time.sleep(0.01)
        with lock:
            busy[device] -= 1
        return "bad luck" if member.seed == 3 and member.method == "plain" else None

    monkeypatch.setattr("comparison.running.run", run)
    failures = run_all(todo, tmp_path, **metric, jobs=3, devices=["cuda:0", "cuda:1"], measure=False)
    assert failures == {"plain_short_seed3": "bad luck"}
    assert len(used) == 12 and set(used) == {"cuda:0", "cuda:1"} and most["cuda:0"] <= 2 and most["cuda:1"] == 1
    run_all(todo, tmp_path, **metric, jobs=2, devices=None, measure=False)
    assert set(used[12:]) == {None}


def test_ctrl_c_starts_no_further_member(tmp_path, monkeypatch, capsys):
    started = []

    def run(member, *_):
        started.append(member.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        time.sleep(0.05)

    monkeypatch.setattr("comparison.running.run", run)
    assert main(monkeypatch, write(tmp_path, seeds=list(range(20))), "--runs", tmp_path) == 130
    assert len(started) < 10 and "the same command goes on" in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_members_in_flight_are_told_to_stop_by_whoever_told_this_process(tmp_path, monkeypatch):
    program = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    ended = []
    monkeypatch.setattr("comparison.running.run", lambda *_: ended.append(execute([sys.executable, "-c", program])[0]))
    todo = list(members(load_matrix(write(tmp_path))))

    def stop():
        while len(running._in_flight) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all(todo, tmp_path, metric=MATRIX["metric"], jobs=2, devices=None, measure=False)
    assert ended == [-signal.SIGTERM] * 2 and time.monotonic() - started < 30


@pytest.fixture
def pool_waits_and_ends(monkeypatch):
    """Two events: set when all members are submitted, and when the pool waits for its workers, behind all that Ctrl-C does."""
    waits, ends, shutdown = threading.Event(), threading.Event(), ThreadPoolExecutor.shutdown

    def shut(pool, wait=True, **options):
        if wait:
            ends.set()
        shutdown(pool, wait, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut)
    monkeypatch.setattr("comparison.running.wait", lambda *args, **options: waits.set() or wait(*args, **options))
    return waits, ends


@pytest.mark.usefixtures("interruptible")
def test_after_ctrl_c_a_member_starts_no_second_process(tmp_path, monkeypatch, pool_waits_and_ends):
    waits, ends = pool_waits_and_ends
    ended, second = [], tmp_path / "second"

    def run(*_):
        waits.wait(60)
        signal.pthread_kill(
            threading.get_ident(), signal.SIGINT
        )  # so that it does not end what the main thread waits in
        ended.append(ends.wait(60))
        execute([sys.executable, "-c", f"open({str(second)!r}, 'w')"])

    monkeypatch.setattr("comparison.running.run", run)
    todo = list(members(load_matrix(write(tmp_path))))
    with pytest.raises(KeyboardInterrupt):
        run_all(todo, tmp_path, metric=MATRIX["metric"], jobs=1, devices=None, measure=False)
    assert ended == [True] and not second.exists()


@pytest.mark.usefixtures("interruptible")
def test_a_process_that_is_just_being_started_at_ctrl_c_is_told_to_stop(tmp_path, monkeypatch, pool_waits_and_ends):
    waits, ends = pool_waits_and_ends
    ended, start = [], subprocess.Popen

    def start_and_interrupt(*arguments, **options):
        waits.wait(60)
        process = start(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        ends.wait(1.0)  # which is not to come before the process is known
        return process

    monkeypatch.setattr("subprocess.Popen", start_and_interrupt)
    program = "import time; time.sleep(20)"
    monkeypatch.setattr("comparison.running.run", lambda *_: ended.append(execute([sys.executable, "-c", program])[0]))
    todo = list(members(load_matrix(write(tmp_path))))
    with pytest.raises(KeyboardInterrupt):
        run_all(todo, tmp_path, metric=MATRIX["metric"], jobs=1, devices=None, measure=False)
    assert ended == [-signal.SIGTERM]


def test_methods_are_run_at_every_window_but_for_those_with_their_own(tmp_path):
    of_its_own = {WINDOW: 16, "algorithm.rollout_length": 16, "env.num_envs": 8}
    methods = {"plain": {"critic.kind": "none"}, "full BPTT": of_its_own}
    matrix = load_matrix(write(tmp_path, methods=methods, windows=[4, 8]))
    assert matrix["methods"] == {
        "plain, window 4": {"critic.kind": "none", WINDOW: 4},
        "plain, window 8": {"critic.kind": "none", WINDOW: 8},
        "full BPTT": of_its_own,
    }
    windows = {4: None, 16: {"algorithm.rollout_length": 16}}
    matrix = load_matrix(write(tmp_path, methods={"plain": None}, windows=windows))
    assert matrix["methods"]["plain, window 16"] == {WINDOW: 16, "algorithm.rollout_length": 16}
    assert matrix["methods"]["plain, window 4"] == {WINDOW: 4}


def test_the_dial_is_a_setting_or_a_number_by_task(tmp_path):
    matrix = load_matrix(write(tmp_path, dial="env.kwargs.corridor_length"))
    assert (matrix["dial_name"], matrix["dials"]) == ("corridor length", {"short": 2})
    assert load_matrix(write(tmp_path, dial={"short": 7}))["dials"] == {"short": 7}
    assert load_matrix(write(tmp_path))["dials"] == {}
    for dial in ("env.kwargs.delay", {"long": 7}, {"short": 2.5}):
        with pytest.raises(SystemExit, match=r"dial: found .*; allowed an integer for each of the tasks \['short'\]"):
            load_matrix(write(tmp_path, dial=dial))


def test_an_override_of_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="overrides: found 'plian / short'; allowed '<method> / <task>'"):
        load_matrix(write(tmp_path, overrides={"plian / short": None}))


# Statistics


def test_the_interquartile_mean_leaves_out_the_outer_quarters():
    assert interquartile_mean([[9.0, 1.0, 2.0, 3.0, -9.0]]).value == pytest.approx(2.0)
    assert interquartile_mean([[1.0, 3.0], [2.0, 90.0]]).value == pytest.approx(2.5)  # of 1, 2, 3, 90
    few = interquartile_mean([[1.0, 2.0, 6.0]])
    assert few.value == pytest.approx(3.0) and few.n == 3  # nothing to cut: the mean


def test_without_five_seeds_there_is_no_interval():
    assert str(interquartile_mean([[0.5]])) == "0.500 no interval n = 1"
    assert interquartile_mean([[0.5, 0.7, 0.6, 0.8]] * 2).low is None
    assert interquartile_mean([[0.5, 0.7, 0.6, 0.8, 0.9]] * 2).low is not None


def test_the_interval_is_that_of_the_percentile_bootstrap():
    values = np.random.default_rng(1).normal(size=12)
    found = interquartile_mean([values])
    generator = np.random.default_rng(2)
    drawn = np.sort(generator.choice(values, (20_000, 12)), axis=1)[:, 3:9].mean(1)  # the middle half of 12
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.03) and found.high == pytest.approx(high, abs=0.03)
    assert found.low < found.value < found.high
    assert interquartile_mean([values]) == found  # the page does not change by making it again


def test_the_page_says_how_little_the_interval_covers(tmp_path):
    def coverage(
        share, intervals
    ):  # of the interquartile mean of values that are 1 with this probability, otherwise 0.5
        truth = 0.5 + 0.5 * min(max(2 * share - 0.5, 0.0), 1.0)
        n = len(intervals) - 1
        return sum(
            math.comb(n, k) * share**k * (1 - share) ** (n - k)
            for k, found in enumerate(intervals)
            if found.low - 1e-9 <= truth <= found.high + 1e-9
        )

    worst = []
    for n in (5, 10):
        intervals = [interquartile_mean([[1.0] * k + [0.5] * (n - k)]) for k in range(n + 1)]
        worst.append(min(coverage(share, intervals) for share in np.linspace(0, 1, 1001)))
    matrix, rows = load_matrix(write(tmp_path)), [row()]
    page = markdown(matrix, rows, summarise(matrix, rows, {}), {}, "COMMAND")
    assert "chance or solved, 0.5 or 1, as little as {:.0%} and {:.0%},".format(*worst).replace("%", " %") in page


def test_strata_are_drawn_each_for_itself():
    # Within each task all seeds agree, so resampling within tasks changes nothing; across tasks it would.
    found = interquartile_mean([[0.0] * 5, [1.0] * 5])
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)


def test_the_area_under_a_curve_is_its_mean_over_the_whole_run():
    assert area_under([50, 100], [0.0, 1.0], 100) == pytest.approx(0.25)
    assert area_under([25, 75], [0.2, 0.6], 100) == pytest.approx(0.4)
    assert area_under([50, 104], [1.0, 1.0], 100) == pytest.approx(1.0)


def summary_of(tmp_path, rows, failures=()):
    dial = "env.kwargs.corridor_length"
    tasks = {name: {"run.total_steps": 1000, dial: n} for name, n in (("short", 2), ("middle", 4), ("long", 8))}
    matrix = load_matrix(write(tmp_path, tasks=tasks, dial=dial, seeds=list(range(10))))
    return matrix, {row["method"]: row for row in summarise(matrix, rows, dict.fromkeys(failures, "why"))}


def test_the_solved_length_is_the_longest_over_the_bar(tmp_path):
    rows = [row(task=task, seed=s, curve=(end,)) for task, end in (("short", 1), ("middle", 0.96)) for s in range(5)]
    rows += [row(task="long", seed=s, curve=(0.5 + 0.5 * (s > 2),)) for s in range(5)]
    rows += [row("plain", task="long", curve=(0.99,), finished=False)]
    matrix, summary = summary_of(tmp_path, rows)
    assert summary["critic"]["solved_length"] == summary["critic"]["surely_solved_length"] == 4
    assert summary["critic"]["end"].n == 15
    assert summary["plain"]["solved_length"] is None and not summary["plain"]["tasks"]  # unfinished does not count
    page = markdown(matrix, rows, list(summary.values()), {}, "COMMAND")
    assert "| critic | 1.000 [1.00, 1.00] n = 5 | 0.960 [0.96, 0.96] n = 5 | 0.667 [0.50, 1.00] n = 5 |" in page
    assert "| 4 (4) |" in page and "| plain | not run | not run | not run | incomplete | none (none) |" in page

    for seeds in (1, 4):  # which is no proof
        few = [row(task="long", seed=s, curve=(0.99,)) for s in range(seeds)]
        critic = summary_of(tmp_path, few)[1]["critic"]
        assert critic["solved_length"] == 8 and critic["surely_solved_length"] is None
        assert critic["tasks"]["long"]["end"].low is None


def test_over_all_tasks_count_the_seeds_that_are_finished_on_every_one(tmp_path):
    ends = {"short": 1.0, "middle": 0.8, "long": 0.5}
    rows = [row(task=task, seed=s, curve=(end,)) for task, end in ends.items() for s in range(5)]
    _, equal = summary_of(tmp_path, rows)
    more = [
        row(task="short", seed=s, curve=(1.0,)) for s in range(5, 10)
    ]  # more of the easy task make no method better
    _, unequal = summary_of(tmp_path, rows + more)
    for name in ("end", "area"):
        assert equal["critic"][name] == unequal["critic"][name] and unequal["critic"][name].n == 15
    assert equal["critic"]["end"].value == pytest.approx(7 / 9)  # of 1, 1, five 0.8, 0.5, 0.5
    assert unequal["critic"]["tasks"]["short"]["end"].n == 10

    other = [r | {"seed": r["seed"] + 1} if r["task"] == "long" else r for r in rows]  # four seeds that all tasks have
    matrix, few = summary_of(tmp_path, other)
    assert few["critic"]["end"] is None and few["critic"]["area"] is None
    assert "| 0.500 [0.50, 0.50] n = 5 | incomplete |" in markdown(matrix, other, list(few.values()), {}, "COMMAND")


def test_a_bar_of_zero_is_a_bar(tmp_path):
    matrix = load_matrix(write(tmp_path, bar=0.0))
    rows = [row(seed=s, curve=(0.0,)) for s in range(5)]
    assert summarise(matrix, rows, {})[0]["tasks"]["short"]["surely_solved"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 0]}, r"seeds: found \[0, 0\]; allowed a list of integers, each named once"),
        (
            {"overrides": {"plain / short": {"seeds": []}}},
            r"overrides: plain / short: seeds: found \[\]; allowed a list",
        ),
        ({"methods": {"x+": None, "x-": None}}, r"found two runs for the folder 'x-_short_seed0'"),
        ({"seeds": 3}, r"seeds: found 3; allowed a list of integers"),
        ({"methods": None}, r"methods: found None; allowed names with their settings"),
        ({"methods": {"bad": {"critic.kind": "dnl"}}}, r"bad / short: critic.kind: found 'dnl'"),
        ({"tasks": {"short": {"run.total_steps": 0}}}, r"critic / short: run.total_steps: found 0"),
        ({"tasks": {"short": {"delay": 3}}}, r"delay: found a setting without a section; allowed <section>.<name>"),
        ({"methods": {"m": {"seeds": [3]}}}, r"m / short: seeds: found a setting without a section"),
        (
            {"methods": {"m": {"run.seed": 3}}},
            r"m / short: run.seed: found 3; allowed what compare.py makes of the matrix",
        ),
        ({"methods": {"m": "none"}}, r"methods: m: found 'none'; allowed names with their settings"),
        ({"methods": {"m": {3: 4}}}, r"methods: m: found \{3: 4\}; allowed names with their settings"),
        ({"methods": {"m": {"model.hidden_size.x": 3}}}, r"model.hidden_size.x: found an unknown setting"),
        ({"methods": {"m": {"env.kwargs": None}}}, r"env.kwargs: found null; allowed a mapping"),
        ({"overrides": [1]}, r"overrides: found \[1\]; allowed names with their settings"),
        ({"overrides": {"plain / short": 3}}, r"overrides: plain / short: found 3; allowed names with their settings"),
        ({"windows": 8}, r"windows: found 8; allowed a list of integers"),
        ({"windows": {8: 3}}, r"windows: 8: found 3; allowed names with their settings"),
        ({"config": None}, r"config: found None; allowed a file of configs/"),
        ({"dial": ["a"]}, r"dial: found \{'short': None\}; allowed an integer for each"),
        ({"seeds": [-1, 0]}, r"critic / short: run.seed: found -1; allowed an integer from 0"),
        ({"bar": "95 %"}, r"bar: found '95 %'; allowed a number"),
        ({"metric": "success"}, r"metric: found 'success'; allowed a name of metrics.jsonl, beginning with charts/"),
    ],
)
def test_a_matrix_that_cannot_be_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        load_matrix(write(tmp_path, **changes))


def test_a_matrix_has_numbers_and_names_as_configuration_files_have_them(tmp_path):
    path = write(tmp_path, methods={"m": {"algorithm.learning_rate": 1e-3}}, tasks={"short": {}}, seeds=[0])
    text = path.read_text()
    path.write_text(text.replace("0.001", "1e-3"))
    (member,) = members(load_matrix(path))
    assert member.settings["algorithm.learning_rate"] == 1e-3
    assert member.total_steps == 2_000_000  # of the configuration file
    path.write_text(text.replace("  m:\n", "  m:\n    critic.kind: none\n  m:\n"))
    with pytest.raises(SystemExit, match="the key 'm' appears twice"):
        load_matrix(path)


def test_keys_with_nothing_under_them_and_tasks_named_by_numbers_are_fine(tmp_path):
    tasks = {length: {"env.kwargs.corridor_length": length, "env.kwargs.time_limit": 8} for length in (2, 3)}
    matrix = load_matrix(write(tmp_path, tasks=tasks, windows=None, overrides=None, dial={2: 2, 3: 3}))
    assert matrix["dials"] == {"2": 2, "3": 3} and len(list(members(matrix))) == 8


def test_a_file_that_is_no_matrix_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1,\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    for name, message in (
        ("nowhere.yaml", "cannot be read"),
        ("bad.yaml", "cannot be read"),
        ("list.yaml", "found no keys"),
    ):
        with pytest.raises(SystemExit, match=message) as error:
            load_matrix(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_task_with_a_failed_seed_is_not_solved(tmp_path):
    rows = [row(task="short", curve=(1.0,))]
    assert summary_of(tmp_path, rows)[1]["critic"]["solved_length"] == 2
    matrix, summary = summary_of(tmp_path, rows, ["critic_short_seed1"])
    assert summary["critic"]["solved_length"] is None
    page = markdown(matrix, rows, list(summary.values()), {}, "COMMAND")
    assert "| critic | 1.000 no interval n = 1, 1 failed |" in page


def test_cost_and_horizon_are_medians(tmp_path):
    rows = [row(task="short", seed=s, horizon=10.0 + s, horizon_learning=20.0, peak_memory_bytes=None) for s in (0, 1)]
    matrix, summary = summary_of(tmp_path, rows)
    page = markdown(matrix, rows, list(summary.values()), {}, "COMMAND")
    assert "| critic | 1000.0 µs, horizon 10.5 (20) | not run | not run |" in page and "resident" not in page


def test_a_page_keeps_what_was_written_by_hand(tmp_path):
    matrix = load_matrix(write(tmp_path))
    report = tmp_path / "page.v2"  # a dot in the name is part of it
    write_report(matrix, [row()], {}, COMMAND, report)
    page = tmp_path / "page.v2.md"
    page.write_text(page.read_text() + "\n**Reading.** It works.\n\nMore.\n")
    write_report(matrix, [row(), row("plain")], {}, f"{COMMAND} --jobs 2", report)
    text = page.read_text()
    assert text.endswith("![curves](page.v2.png)\n\n**Reading.** It works.\n\nMore.\n")
    assert f"    {COMMAND} --jobs 2\n" in text and text.count("**Reading.**") == 1
    content = json.loads((tmp_path / "page.v2.json").read_text())
    assert content["summary"][0]["tasks"]["short"]["end"] == {"value": 0.97, "low": None, "high": None, "n": 1}


@pytest.mark.parametrize(
    "above",
    [
        "# What was tried\n\nMuch.\n",
        "# Tables of another program\n\nMade by\n\n    python scripts/benchmark.py speed\n",
        "# What was tried\n\n**Reading.** Made by\n\n    python scripts/compare.py matrix.yaml\n",
        b"\xff\xfe",
    ],
    ids=["by hand", "another program", "named below the mark alone", "no text"],
)
def test_a_page_that_it_did_not_make_is_refused_before_anything_is_run(tmp_path, monkeypatch, capsys, above):
    path, page = write(tmp_path), tmp_path / "log.md"
    page.write_bytes(above if isinstance(above, bytes) else above.encode())
    before = page.read_bytes()
    monkeypatch.setattr("comparison.running.execute", lambda command: pytest.fail("ran"))
    with pytest.raises(SystemExit):
        main(monkeypatch, path, "--runs", tmp_path / "runs", "--report", tmp_path / "log")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compare.py: --report: {page}: found a ") and "; take another name" in line
    with pytest.raises(ValueError, match="allowed "):
        write_report(load_matrix(path), [row()], {}, COMMAND, tmp_path / "log")
    assert page.read_bytes() == before and sorted(file.name for file in tmp_path.iterdir()) == ["log.md", "matrix.yaml"]


def test_a_page_that_begins_with_the_mark_stays_below_the_report(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n**Reading.** Mine.\n")
    write_report(load_matrix(write(tmp_path)), [row()], {}, COMMAND, tmp_path / "page")
    assert page.read_text().startswith("# ") and page.read_text().endswith("(page.png)\n\n**Reading.** Mine.\n")


# The board


def test_the_board_shows_every_method_against_the_dial_and_every_member_with_its_settings(tmp_path):
    rows = [row(seed=s, curve=(0.9 + 0.025 * s,), horizon=6.0) for s in range(5)] + [row("plain", curve=(0.5,))]
    rows += [row(task="long", curve=(0.4,), peak_memory_bytes=None)]
    tasks = {
        name: {**MATRIX["tasks"]["short"], "env.kwargs.corridor_length": n} for name, n in (("short", 2), ("long", 6))
    }
    tasks["long"]["env.kwargs.max_cue_delay"] = 3  # which the first member does not have
    matrix = load_matrix(write(tmp_path, tasks=tasks, dial="env.kwargs.corridor_length", seeds=list(range(5))))
    board = tmp_path / "board"
    for _ in range(2):  # written anew, not added to
        write_board(matrix, rows, {}, board)

    events = read_events(board / "methods" / "critic")
    end = {name: [(e.step, e.value) for e in events.Scalars(f"dial/{name}")] for name in ("end", "end_low", "end_high")}
    assert end["end"] == [(2, pytest.approx(0.95)), (6, pytest.approx(0.4))]
    assert end["end_low"] == [(2, pytest.approx(0.908, abs=0.01)), (6, pytest.approx(0.4))]
    assert end["end_high"][0] == (2, pytest.approx(0.992, abs=0.01))
    assert [(e.step, e.value) for e in events.Scalars("dial/credit_horizon")] == [(2, 6.0)]
    assert [(e.step, e.value) for e in events.Scalars("dial/memory_mib")] == [(2, 300.0)]
    assert read_events(board / "methods" / "plain").Scalars("dial/end")[0].value == 0.5

    layout = read_events(board).SummaryMetadata("custom_scalars__config__")
    assert layout.plugin_data.plugin_name == "custom_scalars"
    layout = layout_pb2.Layout()
    layout.ParseFromString(read_events(board).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (tab,) = layout.category
    assert tab.title == "A comparison"
    series = {c.title: [(s.value, s.lower, s.upper) for s in c.margin.series] for c in tab.chart}
    assert series["charts/success_rate at the end against corridor length"] == [
        ("dial/end", "dial/end_low", "dial/end_high")
    ]
    patterns = [p for chart in tab.chart for p in chart.multiline.tag]
    tags = {f"{tag}" for tag in events.Tags()["scalars"]}
    assert tags <= {p.removesuffix("$") for p in patterns} | {tag for s in series.values() for t in s for tag in t}

    member = read_events(board / "members" / "critic_short_seed1")
    assert member.Scalars("report/end")[0].value == pytest.approx(0.925)
    start = HParamsPluginData.FromString(
        member.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    found = {name: value.string_value or value.number_value for name, value in start.items()}
    assert found == {
        "method": "critic",
        "task": "short",
        "critic.kind": "dni",
        "env.kwargs.corridor_length": 2,
        "env.kwargs.max_cue_delay": "null",
        "run.seed": 1,
    }

    (board / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"--board: found .*notes.txt; allowed a folder with nothing but TensorBoard"):
        write_board(matrix, rows, {}, board)
    assert (board / "notes.txt").exists()


def read_events(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_without_a_dial_the_board_has_the_members_alone(tmp_path):
    write_board(load_matrix(write(tmp_path)), [row()], {}, tmp_path / "board")
    assert [path.name for path in (tmp_path / "board").iterdir() if path.is_dir()] == ["members"]


def test_an_expected_horizon_of_the_dial_before_the_bar_foretells_success(tmp_path):
    task = {"env.kwargs.corridor_length": 10, "run.total_steps": 1000}
    matrix = load_matrix(write(tmp_path, dial="env.kwargs.corridor_length", tasks={"ten": task}, seeds=[0]))
    folder = save_settings(next(members(matrix)), tmp_path)

    def collected(horizons, success):
        lines = [
            {"step": step, "charts/success_rate": rate, "charts/SPS": 1.0}
            | ({} if horizon is None else {"credit/expected_horizon": horizon})
            for step, horizon, rate in zip((0, 300, 400, 500, 1000), horizons, success, strict=True)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (found,) = collect(matrix, tmp_path)
        return found["expected_horizon"], found["foretold_at"]

    learns, fails = (0.5, 0.5, 0.5, 0.5, 0.96), (0.5,) * 5
    assert collected((12.0, 1.0, 9.0, 4.0, 12.0), learns) == (9.0, 400), (
        "neither before the first update, nor after the bar"
    )
    assert collected((12.0, 1.0, 8.9, 4.0, 12.0), learns) == (8.9, None)
    assert collected((12.0, 1.0, 8.9, 4.0, 12.0), fails) == (12.0, 1000)
    assert collected((12.0, None, None, math.nan, 12.0), learns) == (None, None), "not measured in time"


def test_verdicts_of_the_expected_horizon_are_counted_by_method(tmp_path):
    matrix = load_matrix(
        write(tmp_path, dial="env.kwargs.corridor_length", tasks={"ten": {"env.kwargs.corridor_length": 10}})
    )
    rows = [
        row(task="ten", seed=0, expected_horizon=9.0, foretold_at=256),
        row(task="ten", seed=1, expected_horizon=8.9),
        row(task="ten", seed=2, expected_horizon=12.0, foretold_at=256, curve=(0.5, 0.5)),
        row(task="ten", seed=3, expected_horizon=12.0, foretold_at=256, finished=False),
        row(task="ten", seed=4),
    ]
    (told,) = foretelling(matrix, rows)
    lead = (rows[0]["steps_to_bar"] - 256) / rows[0]["total_steps"]
    assert told == {
        "method": "critic",
        "foretold, learned": 1,
        "foretold, not learned": 1,
        "not foretold, learned": 1,
        "not foretold, not learned": 0,
        "leads": [lead],
    }
    page = markdown(matrix, rows, summarise(matrix, rows, {}), {}, "compare.py")
    assert f"| critic | 1 | 1 | 1 | 0 | {lead:.0%} |" in page


def test_horizons_are_read_from_training_or_measured_once(tmp_path, monkeypatch):
    member = next(members(load_matrix(write(tmp_path, seeds=[0]))))
    folder = save_settings(member, tmp_path)
    line = {"step": 1024, "charts/success_rate": 0.5, "charts/SPS": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    def execute(command):
        commands.append(command)
        file = command[command.index("--json") + 1]
        with open(file, "w") as stream:
            json.dump([{"horizon": 7.0}], stream)
        return 0, None, 0

    commands = []
    monkeypatch.setattr("comparison.running.execute", execute)
    for measure, calls in ((False, 0), (True, 1), (True, 1)):
        assert run(member, tmp_path, measure=measure) is None and len(commands) == calls
    assert commands[0][1].endswith("horizon.py") and commands[0][2] == str(folder)
    matrix = load_matrix(write(tmp_path, seeds=[0]))
    assert [(r["horizon"], r["horizon_learning"]) for r in collect(matrix, tmp_path)] == [(7.0, None)]

    longer = dataclasses.replace(member, settings={**member.settings, "run.total_steps": 2048})
    monkeypatch.setattr("comparison.running.made_with_other_settings", lambda *_: None)
    monkeypatch.setattr("comparison.running.execute", lambda command: (0, None, 0))
    assert run(longer, tmp_path) is None and "horizon" not in read_record(folder)  # which was that of the shorter run
    monkeypatch.undo()

    rows = [{**line, "step": s, "credit/horizon": h} for s, h in ((0, 99.0), (256, 5.0), (512, 7.0), (1024, 3.0))]
    for success, learning in ((0.5, 5.0), (0.97, 6.0)):  # of all after the first update, or of those before the bar
        rows[-1]["charts/success_rate"] = success
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (found,) = collect(matrix, tmp_path)
        assert (found["horizon"], found["horizon_learning"]) == (3.0, learning)


@pytest.mark.parametrize(
    ("code", "output", "why"),
    [
        (1, "", "exit code 1"),
        (2, "warning\ntrain.py: no\n", "train.py: no"),
        (1, "10 %\r20 %\rNaN\n", "NaN"),
        (-9, "10 %", "ended by signal 9, Killed"),
        (1, 'Traceback (most recent call last):\n  File "a"\n    x()\nKeyError: 1\n', "KeyError: 1"),
        (
            1,
            'Traceback (most recent call last):\n  File "a"\nRuntimeError: loading:\n\n\tMissing key: "b"\n',
            'RuntimeError: loading: ... Missing key: "b"',
        ),
        (1, 'Traceback (most recent call last):\n  File "a"\nKeyError: 1\n3 failed\n', "KeyError: 1 ... 3 failed"),
    ],
)
def test_the_reason_of_a_failure_is_one_line_that_names_the_exception(code, output, why):
    assert why_it_failed(code, output) == why
