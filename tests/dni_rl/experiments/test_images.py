"""The image experiment: every arm runs, resumes and refuses what makes no sense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dni_rl import data
from dni_rl.experiments import images

SMALL = {"num_steps": 8, "log_every_steps": 2, "eval_every_steps": 4, "checkpoint_every_steps": 4, "num_layers": 3}
RUNS = {
    "backprop": {"arm": "backprop"},
    "none": {"arm": "none"},
    "dni": {"arm": "dni", "critic_hidden_sizes": (16,)},
    "cdni": {"arm": "cdni"},
    "asynchronous": {"arm": "cdni", "update_probability": 0.5},
    "unlocked": {"arm": "cdni", "unlocked": True},
}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_one_that_never_stopped(name, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    settings = {**SMALL, **RUNS[name]}
    error = images.run(images.make_config("smoke", **settings), whole, tensorboard=False)
    images.run(images.make_config("smoke", **{**settings, "num_steps": 4}), pieces, tensorboard=False)
    with open(pieces / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/loss": 9.0}\n{"st')  # what a run that is cut off leaves
    resumed = images.run(images.make_config("smoke", **settings), pieces, resume=True, tensorboard=False)
    assert resumed == error and rows(pieces) == rows(whole)
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True)["net"] for folder in (whole, pieces)]
    tensors = [key for key, value in saved[0].items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in tensors)


def test_the_smoke_preset_learns_and_writes_everything(tmp_path, capsys):
    images.main(["--preset", "smoke", "--arm", "cdni", "--run-folder", str(tmp_path / "run")])
    assert "cdni on synthetic, 4 layers, 400 steps: test error" in capsys.readouterr().out
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "test/error" in row] == [200, 400]
    assert found[-1]["test/error"] < 0.45  # the last layer alone ends at 0.57; chance is 0.9
    assert {"train/loss", "critic_1/cosine", "critic_3/explained_variance"} <= found[0].keys()
    assert json.loads((tmp_path / "run/config.json").read_text())["arm"] == "cdni"
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_without_gradients_from_above_only_the_last_layer_moves():
    experiment = images.Experiment(images.make_config("smoke", arm="none", num_layers=3), 64)
    before = [p.detach().clone() for p in experiment.net.parameters()]
    x, labels = images.Batches(images.load("synthetic", "train"), 32, 0, "cpu")[0]
    experiment.update(0, x, labels)
    moved = [not torch.equal(p, q) for p, q in zip(experiment.net.parameters(), before, strict=True)]
    assert moved == [False] * (len(before) - 2) + [True] * 2


def test_learning_rates_drop_by_ten():
    config = images.make_config("smoke", learning_rate=1.0, learning_rate_drop_steps=(3, 5))
    experiment = images.Experiment(config, 64)
    batch = images.Batches(images.load("synthetic", "train"), 32, 0, "cpu")[0]
    found = []
    for step in (0, 2, 3, 4, 5):
        experiment.update(step, *batch)
        found.append({group["lr"] for o in experiment.optimizers for group in o.param_groups})
    assert [rates.pop() for rates in found] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    assert found == [set()] * 5


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    labels = torch.arange(10)
    batches = images.Batches(data.Images(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), labels), 5, 0, "cpu")
    first = torch.cat([batches[0][1], batches[1][1]])
    second = torch.cat([batches[2][1], batches[3][1]])
    assert first.sort().values.tolist() == second.sort().values.tolist() == labels.tolist()
    assert not torch.equal(first, second)
    assert torch.equal(batches[1][1], first[5:])  # the order depends on the step alone


def test_presets_state_the_papers_settings():
    paper = images.make_config("paper", arm="dni")
    assert (paper.learning_rate, paper.num_steps, paper.batch_size) == (3e-5, 500_000, 256)
    assert paper.learning_rate_drop_steps == (300_000, 400_000) and paper.critic_hidden_sizes == (1024, 1024)
    assert images.make_config("paper", arm="cdni").critic_hidden_sizes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "magic"], "arm: found 'magic', allowed backprop, none, dni, cdni"),
        (["--arm", "backprop", "--unlocked"], "'backprop' is locked"),
        (["--num-layers", "1"], "num_layers: found 1"),
        (["--update-probability", "0"], "update_probability: found 0.0"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        images.main([*arguments, "--run-folder", str(tmp_path), "--no-tensorboard"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1


def test_a_folder_with_another_run_is_refused(tmp_path):
    config = images.make_config("smoke", **SMALL)
    images.run(config, tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="continue it with --resume"):
        images.run(config, tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"other settings \(arm cdni -> none\)"):
        images.run(images.make_config("smoke", **SMALL, arm="none"), tmp_path, resume=True, tensorboard=False)


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit):
        images.main(["--dataset", "mnist", "--run-folder", str(tmp_path / "run")])
    assert "nowhere: no such folder" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_program_starts_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "dni_rl.experiments.images", "--help"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert "--update-probability" in done.stdout and done.stderr == ""
