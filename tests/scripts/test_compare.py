"""The matrix runner: what runs, what is skipped, what is reported."""

import json
import sys

import pytest
import yaml

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


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    return compare.main()


def row(method="critic", seed=0, curve=(0.5, 0.97), finished=True, total=1000):
    steps = [total * (i + 1) // len(curve) for i in range(len(curve))]
    reached = next((s for s, value in zip(steps, curve, strict=True) if value >= 0.95), None)
    return {
        "method": method,
        "task": "short",
        "seed": seed,
        "total_steps": total,
        "finished": finished,
        "end": curve[-1],
        "best": max(curve),
        "steps_to_bar": reached,
        "steps_per_second": 1000.0,
        "steps": steps,
        "curve": list(curve),
    }


def test_members_are_every_combination_with_the_most_special_setting_last(tmp_path):
    tasks = {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 2}}
    methods = {"m": {"y": 3}, "n": {}}
    matrix = compare.load_matrix(
        write(tmp_path, tasks=tasks, methods=methods, overrides={"m / b": {"y": 4}, "n / a": None})
    )
    found = [(m.seed, m.task, m.method, m.settings) for m in compare.members(matrix)]
    assert found == [
        (seed, *rest)
        for seed in (0, 1)
        for rest in (("a", "m", {"x": 1, "y": 3}), ("b", "m", {"x": 2, "y": 4}), ("b", "n", {"x": 2, "y": 2}))
    ]  # fmt: skip
    names = [m.name for m in compare.members(matrix)]
    assert len(set(names)) == 6 and all("/" not in name and " " not in name for name in names)


def test_unknown_and_missing_keys_are_one_line(tmp_path):
    path = tmp_path / "matrix.yaml"
    path.write_text("title: x\ncolour: red\n")
    with pytest.raises(SystemExit, match=r"unknown keys \['colour'\], missing keys \['bar', 'config'"):
        compare.load_matrix(path)


def test_the_page_counts_ends_marks_the_unfinished_and_names_who_fell(tmp_path):
    matrix = compare.load_matrix(write(tmp_path))
    rows = [row(), row(seed=1, curve=(0.99, 0.4)), row("plain", curve=(0.5,), finished=False)]
    page = compare.markdown(matrix, rows, {"name": "why"}, "COMMAND")
    assert "**1 of 2**, mean 0.685 (0.97 0.40)" in page
    assert "**0 of 1**, mean 0.500 (0.50*)" in page
    assert "ended below it: critic, short, seed 1 (0.99 to 0.40)" in page
    assert "unfinished when this page was made: plain, short, seed 0 at step 1,000" in page
    assert "first reached: 500 to 1,000" in page and "COMMAND" in page and "name: why" in page
    compare.figure(matrix, rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_matrix_runs_survives_a_failing_member_and_skips_what_is_done(tmp_path, monkeypatch, capsys):
    tasks = {"short": {**MATRIX["tasks"]["short"], **TINY}}
    methods = {**MATRIX["methods"], "broken": {"critic.kind": "dnl"}}
    path = write(tmp_path, seeds=[0], tasks=tasks, methods=methods)
    runs = tmp_path / "runs"
    assert main(monkeypatch, path, "--runs", runs, "--jobs", 2) == 1
    page = (runs / "report.md").read_text()
    assert "Failed: broken_short_seed0: train.py: critic.kind: found 'dnl'" in page
    rows = json.loads((runs / "report.json").read_text())
    assert [(r["method"], r["finished"], r["steps"][-1]) for r in rows] == [
        ("critic", True, 1024),
        ("plain", True, 1024),
    ]

    trained = []
    monkeypatch.setattr(compare.subprocess, "run", lambda command, **_: trained.append(command))
    assert main(monkeypatch, path, "--runs", runs, "--methods", "plain", "critic") == 0  # nothing is left to do
    assert main(monkeypatch, path, "--runs", runs, "--report-only") == 0
    assert not trained
    with pytest.raises(SystemExit):
        main(monkeypatch, path, "--runs", runs, "--methods", "nobody")
    assert "--methods: found ['nobody']; allowed ['critic', 'plain', 'broken']" in capsys.readouterr().err


def test_what_was_interrupted_is_resumed(tmp_path, monkeypatch):
    matrix = compare.load_matrix(write(tmp_path, seeds=[0]))
    member = next(compare.members(matrix))
    folder = tmp_path / member.name
    folder.mkdir()
    commands = []

    class Done:
        returncode = 0

    monkeypatch.setattr(compare.subprocess, "run", lambda command, **_: commands.append(command) or Done())
    (folder / "metrics.jsonl").write_text('{"step": 512}\n')
    assert compare.run(member, tmp_path) is None
    assert not (folder / "metrics.jsonl").exists()  # it had no checkpoint, so it begins again
    (folder / compare.CHECKPOINT_FILE).touch()
    assert compare.run(member, tmp_path) is None
    assert "--config" in commands[0] and commands[1][-2:] == ["--resume", str(folder)]
