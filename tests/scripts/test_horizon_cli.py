import json
import re
import shutil
from dataclasses import replace
from statistics import median

import pytest
import torch
from PIL import Image

from agents.checkpoint import PREVIOUS_FILE, load_checkpoint, save_checkpoint
from agents.config import from_dict
from agents.metrics import read_metrics
from agents.train import train
from dni_rl.horizon import CreditHorizon
from scripts import horizon
from scripts.horizon import Measured, _metrics, main, side_by_side, table


def _config(folder, kind="dni", corridor_length=3, seed=0, **run):
    return from_dict(
        {
            "env": {"id": "PassiveTMaze", "num_envs": 4, "kwargs": {"corridor_length": corridor_length}},
            "model": {"hidden_size": 6, "torso_sizes": [5]},
            "critic": {"kind": kind, "hidden_sizes": [7]},
            "algorithm": {"rollout_length": 8, "bptt_horizon": 4},
            "run": {
                "output_dir": str(folder),
                "name": f"{kind}_{corridor_length}_{seed}",
                "seed": seed,
                "total_steps": 320,
                "log_every_steps": 64,
                "checkpoint_every_steps": 160,
                "tensorboard": False,
                "credit_every_steps": 160,
                "credit_length": 24,
                "credit_num_envs": 3,
            }
            | run,
        }
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [train(_config(folder, "dni")), train(_config(folder, "none", credit_every_steps=None))]


def _horizon(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_repeats_what_training_logged_at_its_end(runs, capsys, tmp_path, on_disk):
    code, out, err = _horizon(capsys, runs[0], "--json", tmp_path / "out.json")
    assert (code, err, on_disk) == (0, "", ["out.json"])
    (result,) = json.loads((tmp_path / "out.json").read_text())
    rows = read_metrics(runs[0])
    for name in ("horizon", "expected_horizon", "lag_90", "true_lag_90", "delivered_share"):
        assert result[name] == rows[-1][f"credit/{name}"]
    assert result["success_rate"] == rows[-1]["charts/success_rate"]
    assert result["episodic_return"] == rows[-1]["charts/episodic_return"]
    assert (result["method"], result["window"], result["step"], result["run_seed"]) == ("dni, K = 4", 4, 320, 0)
    assert result["environment_kwargs"] == {"corridor_length": 3}
    curves = ("lags", "true_norm", "delivered_norm", "cosine", "expected_cosine", "num_pairs")
    assert [len(result[name]) for name in curves] == [12] * 6
    logged = [row for row in rows if "credit/horizon" in row]
    assert result["logged"]["step"] == [row["step"] for row in logged] == [0, 160, 320]
    assert result["logged"]["horizon"] == [row["credit/horizon"] for row in logged]
    assert result["logged"]["expected_horizon"] == [row["credit/expected_horizon"] for row in logged]

    header, _, row, last = out.splitlines()
    assert last == f"numbers in {tmp_path / 'out.json'}"
    shown = dict(zip(_cells(header), _cells(row), strict=True))
    assert shown["run"] == "dni_3_0"
    assert shown["expected horizon (cosine above 0.5)"] == f"{result['expected_horizon']:.0f} steps"
    assert shown["effective horizon"] == f"{result['horizon']:.0f} steps"
    assert shown["90 % of the norm within"] == f"{result['lag_90']:.0f} steps"
    learning = [row["credit/expected_horizon"] for row in logged[1:] if row.get("charts/success_rate", 0.0) < 0.95]
    assert shown["its median while learning"] == f"{median(learning):g} steps"
    assert result["horizon_while_learning"] == median(learning)


def test_options_override_the_run(runs, capsys, tmp_path):
    results = []
    for extra in ([], ["--seed", "5"], ["--length", "8"], ["--num_envs", "1"]):
        assert _horizon(capsys, runs[0], *extra, "--json", tmp_path / "out.json")[0] == 0
        results += json.loads((tmp_path / "out.json").read_text())
    assert results[0]["true_norm"] != results[1]["true_norm"]
    assert [len(result["lags"]) for result in results] == [12, 12, 4, 12]
    assert [result["num_envs"] for result in results] == [3, 3, 3, 1]
    assert sum(results[3]["num_pairs"]) < sum(results[0]["num_pairs"])


def test_several_runs_come_in_one_table_one_file_and_one_plot(runs, capsys, tmp_path):
    code, out, err = _horizon(capsys, *runs, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [_cells(line)[:2] for line in lines[2:4]] == [["dni_3_0", "dni, K = 4"], ["none_3_0", "none, K = 4"]]
    assert _cells(lines[3])[5] == ""  # that run logged no horizon
    assert "| method | PassiveTMaze |" in lines
    assert len(json.loads((tmp_path / "out.json").read_text())) == 2
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and image.width > 500


def test_the_critics_can_be_left_out(runs, capsys, tmp_path):
    code, out, _ = _horizon(capsys, *runs, "--bare", "--json", tmp_path / "out.json")
    assert code == 0
    results = json.loads((tmp_path / "out.json").read_text())
    names = [(result["run"], result["method"]) for result in results]
    without = ("dni_3_0", "dni, K = 4, critics left out")
    assert names == [("dni_3_0", "dni, K = 4"), without, ("none_3_0", "none, K = 4")]
    assert [result["critics_left_out"] for result in results] == [False, True, False]
    beyond = [sum(result["delivered_norm"][3:]) for result in results]
    assert beyond[0] > 0.0 and beyond[1:] == [0.0, 0.0]
    assert "left out" not in out.split("Mean success")[1]  # that agent's success is not the success of another method


def test_one_checkpoint_can_be_named(runs, capsys):
    code, out, err = _horizon(capsys, runs[0] / PREVIOUS_FILE)
    assert (code, err) == (0, "")
    assert _cells(out.splitlines()[2])[:3] == [f"dni_3_0/{PREVIOUS_FILE}", "dni, K = 4", "160"]


def test_runs_that_cannot_be_measured_do_not_stop_the_others(runs, capsys, tmp_path):
    foreign, damaged = tmp_path / "foreign", tmp_path / "damaged"
    save_checkpoint(foreign, {"x": 1}, 3)
    shutil.copytree(runs[1], damaged)
    state = load_checkpoint(damaged)
    state["learner"]["model"]["value_head.0.weight"] = torch.zeros(1, 99)
    save_checkpoint(damaged, state, state["step"])
    code, out, err = _horizon(capsys, tmp_path / "missing", foreign, damaged, runs[1])
    assert code == 2
    assert "| none_3_0 |" in out and "damaged" not in out
    errors = err.splitlines()
    assert len(errors) == 3
    assert errors[0].startswith(f"horizon.py: no usable checkpoint: {tmp_path / 'missing'}: ")
    for line, folder in zip(errors[1:], (foreign, damaged), strict=True):
        assert line.startswith(f"horizon.py: {folder}: found a checkpoint of another program or version (")


def test_sequences_that_would_not_fit_are_refused_by_the_options_of_this_script(runs, capsys):
    code, out, err = _horizon(capsys, runs[0], "--num_envs", 1000, "--length", 10**6)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"horizon.py: run.credit_num_envs: found 1000 .*; set --num_envs \d+, or a shorter length\n", err
    )


@pytest.mark.parametrize("num_measured", [0, 1])
def test_ctrl_c_keeps_what_has_been_measured(runs, capsys, tmp_path, monkeypatch, num_measured):
    measure = horizon.measure

    def interrupted(path, **settings):
        if path == runs[num_measured]:
            raise KeyboardInterrupt
        return measure(path, **settings)

    monkeypatch.setattr(horizon, "measure", interrupted)
    code, out, err = _horizon(capsys, *runs, "--json", tmp_path / "out.json")
    assert code == 130
    assert (
        err
        == f"horizon.py: interrupted; {('nothing had been measured', 'what had been measured follows')[num_measured]}\n"
    )
    assert ("| dni_3_0 |" in out) == (tmp_path / "out.json").exists() == bool(num_measured)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--length", "3"], "argument --length: found '3'; allowed an integer of at least 4"),
        (["--seed", "-1"], "argument --seed: found '-1'; allowed an integer from 0 to 2**32 - 1"),
        (["--json", "nowhere/x.json"], "--json: found nowhere/x.json; allowed a file in a folder that exists"),
        (["--json", "."], "--json: found .; allowed a file in a folder that exists"),
        (["--plot", "."], "--plot: found .; allowed a file in a folder that exists"),
        *(
            (
                [f"--{option}", "/proc/x"],
                f"--{option}: found /proc, which cannot be made or written (No such file or directory); allowed a folder that can",
            )
            for option in ("json", "plot")
        ),
    ],
)
def test_bad_options_end_in_one_line(capsys, option, message):
    code, out, err = _horizon(capsys, "run", *option)
    assert (code, out) == (2, "")
    assert err == f"horizon.py: {message}; --help lists the options\n"


def _measured(kind, corridor_length, seed, success, reach, bare=False, logged=()):
    cosine = torch.where(torch.arange(1, 11) <= reach, 0.8, 0.1).double()
    norm = torch.zeros(10, dtype=torch.float64).index_fill(0, torch.tensor([reach - 1]), 1.0)
    horizon = CreditHorizon(true_norm=norm, delivered_norm=norm, cosine=cosine, num_pairs=torch.ones(10))
    results = {} if success is None else {"charts/success_rate": success}
    config = _config("runs", kind, corridor_length, seed)
    rows = [{"step": step, "credit/horizon": h, "credit/lag_90": h, "solved": solved} for step, h, solved in logged]
    return Measured(str(seed), config, 320, results, rows, bare, horizon)


def test_methods_and_tasks_are_put_side_by_side():
    measured = [
        _measured("none", 10, 0, 0.5, 3),
        _measured("none", 10, 1, 0.7, 5),
        _measured("none", 10, 2, 0.6, 4),
        _measured("dni", 10, 0, 1.0, 9),
        _measured("dni", 20, 0, None, 8),
        _measured("dni", 10, 0, 1.0, 1, bare=True),
    ]
    assert side_by_side(measured).splitlines()[3:] == [
        "| method | PassiveTMaze corridor_length=10 | PassiveTMaze corridor_length=20 |",
        "|---|---|---|",
        "| none, K = 4 | 60%; *4* (3 5 4) | not measured |",
        "| dni, K = 4 | 100%; *9* (9) | *8* (8) |",
    ]


def test_runs_that_differ_in_more_than_the_seed_are_not_pooled():
    one, other = (_measured("dni", length, 0, 1.0, 9) for length in (10, 20))
    other = replace(other, config=replace(other.config, model=replace(other.config.model, chrono_max=40.0)))
    measured = [one, replace(one, name="1"), other]
    assert (
        horizon._methods(measured, horizon._tasks(measured)) == ["dni, K = 4"] * 3
    )  # what belongs to a task is no method
    few = replace(one, config=replace(one.config, env=replace(one.config.env, num_envs=3)))
    assert side_by_side([one, few]).splitlines()[5:] == [
        f"| dni, K = 4, env.num_envs={one.config.env.num_envs} | 100%; *9* (9) |",
        "| dni, K = 4, env.num_envs=3 | 100%; *9* (9) |",
    ]
    assert horizon._methods([one, replace(one, step=160)], ["maze"] * 2) == [
        "dni, K = 4, step=320",
        "dni, K = 4, step=160",
    ]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("none", "none, K = 4"),
        ("dni", "dni, past observations, future inputs, K = 4"),
        ("rtrl", "rtrl, K = 4, elementwise_lstm"),
    ],
)
def test_a_run_without_a_critic_is_not_labelled_with_what_one_would_be_told(kind, method):
    core = {"model": {"core": "elementwise_lstm"}} if kind == "rtrl" else {}
    config = from_dict(
        {"critic": {"kind": kind, "past_steps": [10], "future_steps": 2}, "algorithm": {"bptt_horizon": 4}} | core
    )
    assert replace(_measured("none", 10, 0, 1.0, 4), config=config).method == method


def test_the_horizon_while_learning_leaves_out_what_came_before_and_after():
    logged = [(0, 1.0, False), (10, 8.0, False), (20, 6.0, False), (30, 10.0, False), (40, 2.0, True), (50, 3.0, True)]
    run = _measured("dni", 10, 0, 1.0, 4, logged=logged)
    assert run.while_learning == 8.0
    assert side_by_side([run]).splitlines()[-1] == "| dni, K = 4 | 100%; 8 (8) |"
    solved_at_once = _measured("dni", 10, 0, 1.0, 4, logged=[(0, 1.0, False), (10, 8.0, True)])
    assert solved_at_once.while_learning is None
    # Of a run that logged none, the one at the checkpoint stands for all, so that like is compared with like.
    assert side_by_side([run, solved_at_once]).splitlines()[-1] == "| dni, K = 4 | 100%; *4* (4 4) |"


def test_the_expected_horizon_is_shown_where_there_is_one():
    logged = [(0, 1.0, False), (10, 8.0, False), (20, 6.0, False)]
    run = _measured("dni", 10, 0, 1.0, 4, logged=logged)
    expected = replace(run.horizon, expected_cosine=run.horizon.cosine.roll(3))  # 0.8 at lags 4 to 7
    rows = [row | {"credit/expected_horizon": row["credit/horizon"] + 2.0} for row in run.logged[:2]]
    other = replace(run, horizon=expected, logged=[*rows, run.logged[2]])
    assert (run.reach, run.while_learning) == (4.0, 7.0)
    assert (other.reach, other.while_learning) == (7.0, 10.0)
    cells = _cells(table([other]).splitlines()[2])
    assert cells[4:7] == ["7 steps", "10 steps", "4 steps"]
    assert _cells(table([run]).splitlines()[2])[4:7] == ["", "7 steps", "4 steps"]
    assert side_by_side([replace(other, logged=[])]).splitlines()[-1] == "| dni, K = 4 | 100%; *7* (7) |"
    assert "expected_cosine" not in run.as_dict() and "expected_horizon" not in run.as_dict()["logged"]


def test_a_task_is_solved_from_the_first_time_on(tmp_path):
    rows = [
        {"step": 0, "credit/horizon": 1.0, "credit/lag_90": 1.0},
        {"step": 1, "charts/success_rate": 0.9, "credit/horizon": 2.0, "credit/lag_90": 1.0},
        {"step": 2, "charts/success_rate": 0.95},
        {"step": 3, "charts/success_rate": 0.5, "credit/horizon": 3.0, "credit/lag_90": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    results, logged = _metrics(tmp_path, 3)
    assert results == {"charts/success_rate": 0.5}
    assert [(row["step"], row["solved"]) for row in logged] == [(0, False), (1, False), (3, True)]
    assert len(_metrics(tmp_path, 0)[1]) == 1
