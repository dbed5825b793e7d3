"""The asynchronous experiment: its runs, in one process and in several, started by itself and by torchrun."""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dni_rl import data
from dni_rl.distributed import ProcessError, StageReport, launch
from dni_rl.experiments import asynchronous, images

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).parents[3]
SMALL = ["--num-steps", "12", "--no-unlocked"]


def results(folder):
    return json.loads((folder / asynchronous.RESULTS_FILE).read_text())["runs"]


def test_the_smoke_preset_learns_in_processes_and_resumes(tmp_path, capsys):
    asynchronous.main(["--preset", "smoke", "--run-folder", str(tmp_path)])
    table = capsys.readouterr().out
    found = results(tmp_path)
    assert list(found) == [
        f"{label}, seed 0"
        for label in (
            "backprop, 1 process",
            "cdni, 1 process, p = 0.5",
            "cdni, 1 process, unlocked",
            "backprop, 3 processes",
            "cdni, 3 processes, staleness up to 0",
            "cdni, 3 processes, staleness up to 2",
        )
    ]
    assert all(name.removesuffix(", seed 0") in table for name in found)
    assert table == (tmp_path / asynchronous.TABLE_FILE).read_text()
    # The same numbers in one process and in three, up to what summing in another order makes of them.
    one, three = found["backprop, 1 process, seed 0"], found["backprop, 3 processes, seed 0"]
    assert three["train_loss_at_the_end"] == pytest.approx(one["train_loss_at_the_end"], rel=1e-3)
    for bound in (0, 2):
        late = found[f"cdni, 3 processes, staleness up to {bound}, seed 0"]
        assert late["test_error"] < 0.6  # chance is 0.9
        assert max(late["highest_staleness"]) <= bound and late["updates_per_sec"] > 0
        assert [sum(counts.values()) for counts in late["staleness_counts"]] == [100, 100]
    with pytest.raises(SystemExit):
        asynchronous.main(["--preset", "smoke", "--run-folder", str(tmp_path)])
    assert "continue with --resume" in capsys.readouterr().err
    asynchronous.main(["--preset", "smoke", "--run-folder", str(tmp_path), "--resume"])
    assert capsys.readouterr().out == table  # nothing was done again
    with pytest.raises(SystemExit):
        asynchronous.main(["--preset", "smoke", "--run-folder", str(tmp_path), "--resume", "--seeds", "1"])
    assert "other settings (seeds)" in capsys.readouterr().err
    for name in ("cdni-1-process-p-0.5-seed-0", "cdni-3-processes-staleness-up-to-2-seed-0"):  # every run has its log
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "train/loss" in row] == [20, 40, 60, 80, 100]
        assert "critic_1/cosine" in {key for row in rows for key in row} and "test/error" in rows[-1]
        assert list((tmp_path / name).glob("events.out.tfevents.*"))


def test_a_run_in_one_process_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    arguments = ["--num-layers", "3", "--staleness-bounds", "--no-unlocked", "--seeds", "0", "1", "--no-tensorboard"]
    arguments += ["--update-probabilities", "1"]

    def alone(folder, *more):
        monkeypatch.setattr(asynchronous, "launch", lambda *_, **__: None)  # none of the runs with processes
        asynchronous.main([*arguments, "--run-folder", str(folder), *more])
        return results(folder)

    whole = alone(tmp_path / "whole")
    update, steps = images.Training.update, []

    def interrupted(self):
        steps.append(self.step)
        if self.config.arm == "cdni" and self.step == 60:
            raise KeyboardInterrupt
        return update(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(images.Training, "update", interrupted)
        alone(tmp_path / "pieces")
    assert stopped.value.code == 130 and list(results(tmp_path / "pieces")) == ["backprop, 1 process, seed 0"]
    with monkeypatch.context() as patch:
        patch.setattr(images.Training, "update", lambda self: (steps.append(self.step), update(self))[1])
        steps.clear()
        pieces = alone(tmp_path / "pieces", "--resume")
    assert steps[0] == 50  # not 0: there was a checkpoint
    names = ("test_error", "train_loss_at_the_end", "seed")
    assert list(pieces) == list(whole) and len(whole) == 4
    assert all(pieces[run][name] == whole[run][name] for run in whole for name in names)
    errors = [whole[f"cdni, 1 process, seed {seed}"]["test_error"] for seed in (0, 1)]
    assert errors[0] != errors[1]
    shown = (tmp_path / "whole" / asynchronous.TABLE_FILE).read_text()
    assert f"| cdni, 1 process | {100 * errors[0]:.2f} {100 * errors[1]:.2f} | {50 * sum(errors):.2f} |" in shown


def cut_off_at(step, config, todo, folder):
    """One of the processes of runs that end with an error once a checkpoint has been written at `step`."""
    save = asynchronous.common.save_checkpoint

    def save_and_end(path, state):
        save(path, state)
        if state["step"] == step:
            raise ValueError("cut off")

    asynchronous.common.save_checkpoint = save_and_end
    asynchronous.run_in_processes(config, todo, folder, tensorboard=False)


def going_on_from(step, config, todo, folder):
    """One of the processes of runs of which no batch before `step` may be learned from."""
    with_context = asynchronous.with_context

    def later(batches, steps, arm):
        assert steps.start >= step
        return with_context(batches, steps, arm)

    asynchronous.with_context = later
    asynchronous.run_in_processes(config, todo, folder, resume=True, tensorboard=False)


def test_a_run_with_processes_goes_on_from_its_checkpoint(tmp_path):
    config = asynchronous.make_config(
        "smoke",
        num_steps=30,
        checkpoint_every_steps=8,
        learning_rate_drop_steps=(20,),
        schedule="fixed",
        log_every_steps=1,
    )
    run = asynchronous.Run(arm="cdni", processes=3, max_staleness=2)

    def carry_out(folder, function, *step):
        launch(function, 3, *step, config, [run], folder, timeout_sec=100)
        return results(folder)[str(run)], (folder / run.folder / "metrics.jsonl").read_text()

    for name in ("whole", "pieces"):
        asynchronous._start_results(config, tmp_path / name, False)
    whole, log = carry_out(tmp_path / "whole", asynchronous.run_in_processes)
    with pytest.raises(ProcessError, match="cut off"):
        carry_out(tmp_path / "pieces", cut_off_at, 16)
    pieces, log_of_pieces = carry_out(tmp_path / "pieces", going_on_from, 16)
    assert log_of_pieces == log and len(log.splitlines()) == 31
    exact = ("test_error", "train_loss_at_the_end", "staleness_counts", "mean_staleness")
    assert {name: pieces[name] for name in exact} == {name: whole[name] for name in exact}
    # None is late at a checkpoint: of the last two batches before each of the four, gradients are used earlier.
    assert whole["staleness_counts"] == [{"0": 4, "1": 4, "2": 22}] * 2


def test_runs_that_waited_in_vain_are_resumed_with_a_longer_timeout(tmp_path):
    shorter, longer, other = (
        asynchronous.make_config("smoke", **settings)
        for settings in ({}, {"timeout_sec": 600.0}, {"timeout_sec": 600.0, "batch_size": 16})
    )
    assert asynchronous._start_results(shorter, tmp_path, False) == asynchronous._start_results(longer, tmp_path, True)
    with pytest.raises(ValueError, match=r"other settings \(batch_size\)"):
        asynchronous._start_results(other, tmp_path, True)


def test_a_command_line_that_leaves_no_run_is_refused_before_there_is_a_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--no-unlocked", "--no-backprop", "--staleness-bounds", "--update-probabilities"]
    with pytest.raises(SystemExit) as stopped:
        asynchronous.main([*options, "--run-folder", str(folder)])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and "allowed one run or more" in shown and shown.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize("damaged", ['{"config": {', "[]", '{"runs": {}}'])
def test_damaged_results_are_one_line_and_made_again_once_they_are_removed(damaged, tmp_path, capsys):
    arguments = ["--no-backprop", "--no-unlocked", "--staleness-bounds", "--num-steps", "4", "--no-tensorboard"]
    arguments += ["--update-probabilities", "1", "--run-folder", str(tmp_path)]
    asynchronous.main(arguments)
    whole, table = results(tmp_path), capsys.readouterr().out
    file = tmp_path / asynchronous.RESULTS_FILE
    file.write_text(damaged)
    with pytest.raises(SystemExit):
        asynchronous.main([*arguments, "--resume"])
    shown = capsys.readouterr().err
    assert f"{file}: found no results that can be read; remove it" in shown and shown.count("\n") == 1
    assert file.read_text() == damaged
    file.unlink()
    asynchronous.main([*arguments, "--resume"])
    assert results(tmp_path) == whole and capsys.readouterr().out == table


def test_critics_have_a_learning_rate_of_their_own_in_every_run(tmp_path, monkeypatch):
    config = asynchronous.make_config("smoke", critic_learning_rate=0.5, learning_rate_drop_steps=(50,))
    experiment = images.Experiment(config.net("cdni"), 64)
    bar = asynchronous.common.Progress("", 1, wanted=False)
    for step, factor in ((0, 1.0), (50, 0.1)):
        asynchronous._before_update(experiment, bar, 1, step - step % 7, step % 7)
        rates = [group["lr"] for optimizer in experiment.optimizers for group in optimizer.param_groups]
        assert rates == pytest.approx([factor * rate for rate in [1e-2] * 3 + [0.5] * 2])  # layers, critics
    assert asynchronous.make_config("laptop").critic_learning_rate == 1e-2  # ten times the layers', as in images
    assert asynchronous.make_config("laptop", arm="dni") == asynchronous.make_config(
        "laptop", arm="dni", critic_learning_rate=images.make_config("laptop", arm="dni").critic_learning_rate
    )


def test_runs_with_processes_learn_from_the_train_split_and_are_tested_on_the_other(tmp_path, monkeypatch):
    pictures = images.load("synthetic", "train").images[:64]
    splits = {split: data.Images(pictures, torch.full((64,), i)) for i, split in enumerate(("train", "test"))}
    monkeypatch.setattr(images, "load", lambda _, split: splits[split])
    alone = SimpleNamespace(rank=0, device=torch.device("cpu"), barrier=lambda: None)
    monkeypatch.setattr(asynchronous, "connect", lambda *_, **__: contextlib.nullcontext(alone))
    monkeypatch.setattr(asynchronous, "_told", lambda _, find: find())
    learned_from, found = [], []

    def pipeline(net, _, batches, *__, **___):
        learned_from.extend(label for *_, labels in batches for label in labels.tolist())
        net.layers[-1].bias.data[1] = 1e3  # takes everything for the class that the test split is of
        return [StageReport(2, 1.0, 0.0, 0.0, 1.0, {0: 2}, (0.5,), (1.0, 1.0))] * 3

    monkeypatch.setattr(asynchronous, "train_pipeline", pipeline)
    monkeypatch.setattr(asynchronous, "add_result", lambda folder, run, row: found.append(row["test_error"]))
    config = asynchronous.make_config("smoke", num_steps=2)
    todo = [asynchronous.Run(arm="cdni", processes=3, max_staleness=1)]
    asynchronous.run_in_processes(config, todo, tmp_path, tensorboard=False)
    assert learned_from == [0] * 64 and found == [0.0]


def test_batches_without_a_gradient_do_not_make_a_run_diverged():
    config = asynchronous.make_config("smoke")
    cosines = (math.nan, 0.25, 0.75)  # the first comes from a critic above that starts at zero
    below = StageReport(3, 1.0, 0.0, 0.0, 1.0, {0: 3}, cosines, ())
    top = StageReport(3, 1.0, 0.0, 0.0, 1.0, {}, (), (1.0, 1.0, 1.0))
    run = asynchronous.Run(arm="cdni", processes=2, max_staleness=0)
    assert asynchronous.row_of_processes(run, config, [below, top], 0.5)["cosine_at_the_end"] == [0.5]
    diverged = dataclasses.replace(below, cosines=(math.nan,) * 3)
    assert asynchronous.row_of_processes(run, config, [diverged, top], 0.5)["cosine_at_the_end"] == [None]


def test_runs_of_different_settings_have_different_names():
    probabilities = (0.2, 0.1234567, 0.1234568)
    found = [
        str(run) for run in asynchronous.runs(asynchronous.make_config("smoke", update_probabilities=probabilities))
    ]
    assert len(set(found)) == len(found) and "cdni, 1 process, p = 0.2, seed 0" in found


def torchrun(processes, *arguments, program=("-m", "dni_rl.experiments.asynchronous"), max_restarts=0):
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={max_restarts}"]
    return subprocess.run(
        [sys.executable, *command, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def test_torchrun_starts_the_runs_with_processes(tmp_path):
    done = torchrun(3, *SMALL, "--run-folder", str(tmp_path), "--staleness-bounds", "1")
    assert done.returncode == 0, done.stderr
    names = ["backprop, 3 processes, seed 0", "cdni, 3 processes, staleness up to 1, seed 0"]
    assert list(results(tmp_path)) == names and "staleness up to 1" in done.stdout


KILLED_ONCE = """
import os, signal
from dni_rl.experiments import asynchronous

train, calls = asynchronous.train_pipeline, []

def pipeline(*arguments, **settings):
    calls.append(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(*arguments, **settings)

asynchronous.train_pipeline = pipeline
asynchronous.main()
"""


def test_torchrun_restarts_processes_of_which_one_was_killed(tmp_path):
    program, folder = tmp_path / "program.py", tmp_path / "run"
    program.write_text(KILLED_ONCE)
    arguments = ["--num-layers", "2", "--num-steps", "12", "--checkpoint-every-steps", "6", "--no-tensorboard"]
    arguments += ["--no-backprop", "--staleness-bounds", "0", "--timeout-sec", "20"]
    arguments += ["--run-folder", str(folder), "--resume"]
    done = torchrun(2, *arguments, program=[str(program)], max_restarts=1)
    assert done.returncode == 0, done.stderr
    assert list(results(folder)) == ["cdni, 2 processes, staleness up to 0, seed 0"]
    # not from the beginning: what was learned before the checkpoint is in it
    assert next(iter(results(folder).values()))["staleness_counts"] == [{"0": 12}]


@pytest.fixture
def half_done(tmp_path):
    """The options of a command of which one run is done; its folder, and that run's row."""
    config = asynchronous.make_config("smoke", num_steps=12, unlocked=False, staleness_bounds=(1,))
    asynchronous._start_results(config, tmp_path, False)
    row = {
        "test_error": 0.25,
        "updates_per_sec": 1.0,
        "cpu_ms_per_update": [1.0] * 3,
        "arm": "backprop",
        "processes": 3,
    }
    asynchronous.add_result(tmp_path, asynchronous.Run(arm="backprop", processes=3), row)
    return [*SMALL, "--run-folder", str(tmp_path), "--staleness-bounds", "1"], tmp_path, row


def test_torchrun_resumes_what_is_left(half_done):
    arguments, folder, row = half_done
    done = torchrun(3, *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    first, second = results(folder).items()
    assert first[0] == "backprop, 3 processes, seed 0" and first[1] == row  # not run again
    assert second[0] == "cdni, 3 processes, staleness up to 1, seed 0" and "highest_staleness" in second[1]


def test_torchrun_without_resume_refuses_what_is_there_in_every_process(half_done):
    arguments, folder, row = half_done
    refused = torchrun(3, *arguments)
    lines = [line for line in refused.stderr.splitlines() if line.startswith("asynchronous:")]
    assert refused.returncode != 0 and lines and all("continue with --resume" in line for line in lines)
    assert results(folder) == {"backprop, 3 processes, seed 0": row}


def test_torchrun_with_a_wrong_number_of_processes_ends_with_one_line(tmp_path):
    done = torchrun(2, *SMALL, "--run-folder", str(tmp_path))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("asynchronous:")]
    assert lines and all("net: found 3 layers and 2 processes" in line for line in lines)


def test_presets_state_the_papers_settings():
    paper = asynchronous.make_config("paper", arm="dni")
    assert (paper.num_layers, paper.hidden_size, paper.batch_size, paper.num_steps) == (4, 256, 256, 500_000)
    assert paper.critic_hidden_sizes == (1024, 1024) and {0.2, 0.05} <= set(paper.update_probabilities)
    assert paper.staleness_bounds == (0, 1, 2, 4, 8)
    assert all(len(asynchronous.make_config(preset).seeds) == 3 for preset in ("laptop", "paper"))
    assert paper.net("backprop") == images.make_config("paper", arm="backprop", critic_hidden_sizes=(1024, 1024))
    for arm in ("dni", "cdni"):  # slower layers of one arm are no handicap of backpropagation
        laptop = asynchronous.make_config("laptop", arm=arm)
        assert laptop.net(arm).learning_rate == images.make_config("laptop", arm=arm).learning_rate
        assert laptop.net("backprop").learning_rate == images.make_config("laptop", arm="backprop").learning_rate
    given = asynchronous.make_config("laptop", arm="dni", learning_rate=1e-4)
    assert given.net("dni").learning_rate == given.net("backprop").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "none"], "arm: found 'none', allowed dni, cdni"),
        (["--staleness-bounds", "-1"], "staleness_bounds: found (-1,)"),
        (["--backprop-learning-rate", "0"], "backprop_learning_rate: found 0.0, allowed above 0"),
        (["--update-probabilities", "0"], "update_probabilities: found (0.0,)"),
        (["--num-layers", "1"], "num_layers: found 1"),
        (["--threads", "0"], "threads: found (0,)"),
        (["--seeds", "1", "1"], "seeds: found 1 1, allowed one or more, each once"),
        (["--seeds", "-1"], "seeds: found -1, allowed 0 to 2**32 - 1"),
        (["--device", "cuda:0"], "device: found 'cuda:0', allowed cpu, cuda"),
        (["--device", "gpu"], "device: found 'gpu', allowed cpu, cuda"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        asynchronous.main([*arguments, "--run-folder", str(tmp_path)])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1


def test_a_device_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        asynchronous.main(["--device", "cuda", "--run-folder", str(tmp_path / "run")])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "device: found 'cuda', which this machine lacks; allowed cpu; use --device cpu" in shown


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    images.load.cache_clear()
    with pytest.raises(SystemExit):
        asynchronous.main(["--dataset", "mnist", "--run-folder", str(tmp_path / "run")])
    assert capsys.readouterr().err.count("\n") == 1
