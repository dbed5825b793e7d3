import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from agents.checkpoint import load_checkpoint
from agents.metrics import read_metrics
from scripts.train import main

ROOT = Path(__file__).parents[2]
SCRIPTED = "tests.agents.scripted_env:ScriptedEnv"
TINY = {
    "env.num_envs": 4,
    "model.hidden_size": 6,
    "model.torso_sizes": "[5]",
    "algorithm.rollout_length": 8,
    "run.total_steps": 320,
    "run.log_every_steps": 32,
    "run.checkpoint_every_steps": 64,
    "run.tensorboard": "false",
    "run.progress": "false",
    "run.name": "run",
}


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    """Runs the command with a tiny configuration, returns exit code, stdout and stderr."""

    def run(*arguments, **options):
        settings = {**TINY, "run.output_dir": tmp_path, **options}
        argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["train.py", *argv, *map(str, arguments)])
        try:
            code = main()
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_run_leaves_its_results_and_says_where(train, tmp_path):
    code, out, err = train()
    assert (code, out, err) == (0, f"results in {tmp_path / 'run'}\n", "")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("config.yaml", "metrics.jsonl", "checkpoint.pt", "checkpoint.previous.pt", ".lock")
    }


def test_resume_continues_a_run(train, tmp_path):
    train(**{"algorithm.anneal_learning_rate": "false"})
    code, out, err = train("--resume", tmp_path / "run", **{"run.total_steps": 640})
    assert (code, out, err) == (0, f"results in {tmp_path / 'run'}\n", "")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(32, 641, 32))


def test_a_damaged_checkpoint_falls_back_on_the_last_good_one(train, tmp_path, caplog):
    train()
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-50])
    code, out, err = train("--resume", tmp_path / "run")
    assert (code, out, err) == (0, f"results in {tmp_path / 'run'}\n", "")
    (message,) = caplog.messages
    assert message.startswith(f"{path}: truncated or altered")
    assert message.endswith("continuing from the previous checkpoint, step 256")
    assert load_checkpoint(path)["step"] == 320


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm.learning_rat": 1}, "--algorithm.learning_rat: found an unknown option; did you mean --algorithm.learning_rate?"),
        ({"critic.kind": "dnl"}, "critic.kind: found 'dnl'; allowed none, dni, cdni, "),
        ({"algorithm.learning_rate": "fast"}, "algorithm.learning_rate: found 'fast'; allowed a number above 0"),
        ({"algorithm.bptt_horizon": 16}, "algorithm.bptt_horizon: found 16; allowed a divisor of algorithm.rollout_length, 8"),
        ({"algorithm.bptt_horizon": 3}, "algorithm.bptt_horizon: found 3; allowed a divisor of algorithm.rollout_length, 8"),
        ({"env.id": "PasiveTMaze"}, "env: unknown environment 'PasiveTMaze'; the nearest are ['PassiveTMaze'"),
        ({"env.kwargs": "{coridor: 3}"}, "env: PassiveTMaze has no argument 'coridor'; did you mean 'corridor_length'?"),
        ({"env.kwargs.corridor_length": 0}, "env.kwargs.corridor_length: found 0; allowed an integer of at least 1; leave it out"),
        ({"env.id": "Pendulum-v1"}, "env: the action space is Box(-2.0, 2.0, (1,), float32), but only Discrete is supported"),
        ({"env.id": "CartPole-v1", "critic.kind": "cdni"}, "critic.kind: found 'cdni', but this environment offers no"),
        ({"model.torso": "conv"}, "model.torso: found 'conv' for observations (3,)"),
        ({"env.id": "no_such_module:Maze"}, "env: no_such_module:Maze: there is no module 'no_such_module'"),
        ({"env.id": ".foo:Maze"}, "env: .foo:Maze: found the module name '.foo'; allowed a full one, as in package.module:Name"),
        ({"env.id": ":Maze"}, "env: :Maze: found the module name ''; allowed a full one, as in package.module:Name"),
        ({"run.output_dir": __file__}, f"run.output_dir: found {__file__}/run, which cannot be made or written (Not a directory); "),
        ({"run.output_dir": "/proc/x"}, "run.output_dir: found /proc/x/run, which cannot be made or written (No such file or "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(train, tmp_path, options, message):
    code, out, err = train(**options)
    assert (code, out) == (2, "")
    assert err.startswith(f"train.py: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("env_id", "package", "extra"),
    [("MiniGrid-MemoryS7-v0", "minigrid", ".[minigrid]"), ("ALE/Breakout-v5", "ale_py", ".[agents]")],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(train, monkeypatch, env_id, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = train(**{"env.id": env_id})
    assert (code, out) == (2, "")
    assert err.startswith("train.py: ")
    assert extra in err
    assert err.count("\n") == 1


def _foreign(folder):
    torch.save({"model": {}}, folder / "checkpoint.pt")
    (folder / "checkpoint.previous.pt").unlink()
    return "no usable checkpoint: "


def _of_another_environment(folder):
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("id: PassiveTMaze", "id: ActiveTMaze"))
    return "env.id: found 'ActiveTMaze'; allowed 'PassiveTMaze', as in the run to resume"


def _without_config(folder):
    (folder / "config.yaml").unlink()
    return "--resume: found no config.yaml in "


@pytest.mark.parametrize(
    ("option", "value"), [("run.total_steps", 640), ("run.total_steps", 64), ("run.name", "other")]
)
def test_a_run_cannot_go_on_as_another_one(train, tmp_path, option, value):
    train()
    code, out, err = train("--resume", tmp_path / "run", **{option: value})
    assert (code, out) == (2, "")
    assert err.startswith(f"train.py: {option}: found {value!r}; allowed ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("spoil", [_foreign, _of_another_environment, _without_config])
def test_what_cannot_be_resumed_is_refused_in_one_line(train, tmp_path, spoil):
    train()
    message = spoil(tmp_path / "run")
    code, out, err = train("--resume", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith(f"train.py: {message}")
    assert err.count("\n") == 1


def test_a_folder_that_is_taken_is_refused(train):
    train()
    code, _, err = train()
    assert code == 2
    assert re.fullmatch(r"train.py: .*metrics.jsonl: found metrics of an earlier run, .*\n", err)


@pytest.mark.parametrize("field", ["reward", "observation"])
def test_nan_stops_with_exit_code_1_and_the_name_of_the_tensor(train, tmp_path, field):
    nan = {"env.kwargs.nan_field": field, "env.kwargs.nan_step": 8 * 4 + 2}
    code, out, err = train(**{"env.id": SCRIPTED, "critic.kind": "cdni", **nan})
    assert (code, out) == (1, "")
    assert err.startswith(
        f"train.py: rollout.{field}: NaN or infinity at step 160; stopped, the last good checkpoint in "
    )
    assert err.count("\n") == 1
    state = load_checkpoint(tmp_path / "run")
    assert state["step"] == 128
    assert all(p.isfinite().all() for p in state["learner"]["model"].values())


# Another process


def _start(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(120)
def test_ctrl_c_saves_a_checkpoint_and_exits_with_130_and_no_traceback(tmp_path):
    settings = {**TINY, "run.total_steps": 10**9, "run.checkpoint_every_steps": 10**9, "run.output_dir": tmp_path}
    process = _start("train.py", *[part for name, value in settings.items() for part in (f"--{name}", value)])
    try:
        while not (tmp_path / "run" / "config.yaml").exists() and process.poll() is None:  # written as the loop starts
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    step = load_checkpoint(tmp_path / "run")["step"]
    assert step % 32 == 0
    saved = f"a checkpoint of step {step} was saved; continue with --resume {tmp_path / 'run'}"
    assert (out, err) == ("", f"train.py: interrupted; {saved}\n")
