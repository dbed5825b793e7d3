import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.config import from_dict
from agents.train import train
from scripts.evaluate import main


def _train(folder, env, **settings):
    config = from_dict(
        {
            "env": {"num_envs": 2} | env,
            "model": {"hidden_size": 6, "torso_sizes": [5]},
            "algorithm": {"rollout_length": 8},
            "run": {"output_dir": str(folder), "total_steps": 32, "tensorboard": False} | settings,
        }
    )
    return train(config)


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("runs"), {"kwargs": {"corridor_length": 2}})


@pytest.fixture(scope="module")
def breakout(tmp_path_factory):
    env = {"id": "ALE/Breakout-v5", "kwargs": {"num_threads": 1, "max_frames": 60}}
    return _train(tmp_path_factory.mktemp("runs"), env)


def _evaluate(capsys, *arguments):
    capsys.readouterr()  # what training has said
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prints_returns_with_spread_lengths_and_success(maze, capsys):
    code, out, err = _evaluate(capsys, maze, "--episodes", 20)
    assert (code, err) == (0, "")
    title, header, *rows = out.splitlines()
    assert title == "PassiveTMaze after 32 agent steps: 20 episodes, sampled actions, seed 0"
    assert header.split() == ["mean", "95", "%", "interval", "std", "median", "min", "max"]
    assert [row.split()[0] for row in rows] == ["return", "length", "success"]


def test_equal_seeds_give_equal_results_and_others_do_not(maze, capsys):
    outs = [_evaluate(capsys, maze, "--episodes", 20, "--seed", seed)[1].splitlines()[2:] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_a_seed_is_of_the_global_generators_too(maze, capsys, monkeypatch):
    """From which an environment of the user's may draw."""
    drawn = []

    def draw(*_, **__):
        drawn.append((random.random(), np.random.random(), torch.rand(()).item()))
        raise ValueError("enough")

    monkeypatch.setattr("scripts.evaluate.evaluate", draw)
    for seed in (1, 1, 2):
        _evaluate(capsys, maze, "--seed", seed)
    assert drawn[0] == drawn[1] and all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))


def test_writes_all_returns_to_a_json_file(maze, capsys, tmp_path, on_disk):
    path = tmp_path / "out.json"
    code, out, _ = _evaluate(capsys, maze, "--episodes", 10, "--greedy", "--json", path)
    assert code == 0 and on_disk == ["out.json"]
    assert out.endswith(f"results in {path}\n")
    result = json.loads(path.read_text())
    assert (result["episodes"], result["greedy"], result["seed"], result["step"]) == (10, True, 0, 32)
    assert len(result["returns"]) == len(result["lengths"]) == 10
    assert result["return"]["mean"] == pytest.approx(sum(result["returns"]) / 10)
    assert result["return"].keys() == {"mean", "low", "high", "std", "median", "min", "max"}


def test_atari_scores_are_points_and_the_film_is_what_the_agent_saw(breakout, capsys, tmp_path):
    path = tmp_path / "out.gif"
    code, out, err = _evaluate(capsys, breakout, "--episodes", 3, "--video", path, "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    assert out.endswith(f"video in {path}\n")
    assert json.loads((tmp_path / "out.json").read_text())["lengths"] == [15, 15, 15]  # 60 frames
    with Image.open(path) as gif:
        assert gif.size == (336, 336)
        assert gif.n_frames > 1  # pillow merges equal ones


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--episodes", "0"],
            "argument --episodes: found '0'; allowed an integer of at least 1; --help lists the options",
        ),
        (
            ["--seed", "-1"],
            "argument --seed: found '-1'; allowed an integer from 0 to 2**32 - 1; --help lists the options",
        ),
        (["--gredy"], "unrecognized arguments: --gredy; --help lists the options"),
        (["--video", "out.gif"], "--video: found observations (3,), torch.float32; allowed for images [C, Y, X] of at"),
        (
            ["--json", "no/such/folder/out.json"],
            "--json: found no/such/folder/out.json; allowed a file in a folder that",
        ),
        (["--json", "."], "--json: found .; allowed a file in a folder that exists"),
        (
            ["--json", "/proc/x.json"],
            "--json: found /proc, which cannot be made or written (No such file or directory); ",
        ),
        (
            ["--video", "/proc/x.gif"],
            "--video: found /proc, which cannot be made or written (No such file or directory); ",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(maze, capsys, arguments, message):
    code, out, err = _evaluate(capsys, maze, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"evaluate.py: {message}")
    assert err.count("\n") == 1


def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    code, _, err = _evaluate(capsys, tmp_path / "nowhere")
    assert code == 2
    assert err.startswith(f"evaluate.py: no usable checkpoint: {tmp_path / 'nowhere'}: ")


def test_damaged_and_foreign_checkpoints_are_refused_in_one_line(capsys, tmp_path):
    run = _train(tmp_path, {"kwargs": {"corridor_length": 2}})
    state = load_checkpoint(run)
    state["config"]["model"]["hidden_size"] = 7
    save_checkpoint(run, state, state["step"])
    code, _, err = _evaluate(capsys, run)
    assert code == 2
    assert err.startswith(f"evaluate.py: {run}: found a checkpoint of another program or version (RuntimeError: ")
    assert err.count("\n") == 1
    torch.save({}, run / "checkpoint.pt")
    (run / "checkpoint.previous.pt").unlink()
    code, _, err = _evaluate(capsys, run)
    assert code == 2
    assert err.startswith("evaluate.py: no usable checkpoint: ")
    assert err.count("\n") == 1


def test_one_checkpoint_of_a_run_can_be_named(maze, capsys):
    assert _evaluate(capsys, maze / "checkpoint.pt", "--episodes", 2)[0] == 0
