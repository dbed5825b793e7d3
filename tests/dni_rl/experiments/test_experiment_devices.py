"""The papers' experiments learn on the device "meta", which has no values: nothing is made on the host by mistake or read by it."""

import dataclasses
import functools
import importlib

import pytest

from dni_rl.experiments import common

PROGRAMS = {
    "images": ([], ["--arms", "dni", "--unlocked"], ["--model", "cnn", "--arms"], ["--model", "greedy_cnn", "--arms"]),
    "copy": ([], ["--task", "repeat_copy"]),
    "ptb": ([],),
    "timescales": ([], ["--carry-state"]),
    "sequential_mnist": ([],),
    "alignment": ([],),
    "understanding": ([],),
}
CALLS = [(program, options) for program, calls in PROGRAMS.items() for options in calls]


@pytest.fixture
def begin(monkeypatch):
    """The experiment that `run` of a program would carry out."""
    monkeypatch.setattr(common, "carry_out", lambda make, config, folder: make(config))

    def experiment(run, config, folder):
        return run.args[0](config) if isinstance(run, functools.partial) else run(config, folder)

    return experiment


@pytest.mark.parametrize(("program", "options"), CALLS, ids=[" ".join([p, *o]) for p, o in CALLS])
def test_every_arm_learns_on_its_device_alone(program, options, tmp_path, device_without_values, begin):
    module = importlib.import_module(f"dni_rl.experiments.{program}")
    matrix = module.plan(["--preset", "smoke", "--run-folder", str(tmp_path), *options]).matrix
    assert matrix
    for member in matrix:
        changes = {"average_episodes": 10**6} if program == "copy" else {}  # it reads its average behind so many
        experiment = begin(module.run, dataclasses.replace(member.config, device="meta", **changes), tmp_path)
        for _ in range(2):
            metrics = experiment.update()
        assert {value.device.type for value in metrics.values()} == {"meta"}
