"""Tiny runs, how to stop them, and what they leave behind."""

import math
import signal
from typing import get_args, get_type_hints

import torch

from agents.config import CriticConfig, from_dict
from agents.metrics import read_metrics
from agents.train import Trainer

A2C = {"name": "a2c", "rollout_length": 8, "bptt_horizon": 4}
PPO = {"name": "ppo", "rollout_length": 8, "bptt_horizon": 4, "epochs": 2, "minibatches": 2}
# Settings of a run of every kind of critic, and of what else learners may have.
ARMS = {kind: {"critic": {"kind": kind}} for kind in get_args(get_type_hints(CriticConfig)["kind"])}
ARMS["rtrl"]["model"] = {"core": "elementwise_lstm"}
ARMS["bp_lambda"] = {
    "critic": {"kind": "bp_lambda", "hidden_sizes": [], "normalize_targets": False},
    "algorithm": A2C | {"bptt_horizon": 1},
}
ARMS["levels"] = {
    "critic": {"kind": "dni", "interfaces": True},
    "model": {"core": "multi_timescale", "periods": [1, 2]},
    "algorithm": A2C | {"bptt_horizon": 2},
}
ARMS["future inputs"] = {"critic": {"kind": "cdni", "future_steps": 3}}
ARMS["past inputs"] = {"critic": {"kind": "dni", "past_steps": [3, 20]}}


def make_config(folder, name="run", *, env=None, model=None, critic=None, algorithm=None, update_steps=32, **run):
    """20 updates, of 32 steps in each process, rows of metrics every 3, a checkpoint every 5, a maze of at most 7 steps.

    `update_steps` are those of all processes together.
    """
    return from_dict(
        {
            "env": {"id": "PassiveTMaze", "num_envs": 4, "kwargs": {"corridor_length": 3, "num_distractors": 1}}
            | (env or {}),
            "model": {"hidden_size": 6, "torso_sizes": [5]} | (model or {}),
            "critic": {"kind": "cdni", "hidden_sizes": [7]} | (critic or {}),
            "algorithm": A2C | (algorithm or {}),
            "run": {
                "output_dir": str(folder),
                "name": name,
                "total_steps": 20 * update_steps,
                "log_every_steps": 3 * update_steps,
                "checkpoint_every_steps": 5 * update_steps,
                "tensorboard": False,
                "progress": False,
            }
            | run,
        }
    )


def interrupt_after(monkeypatch, updates, number=signal.SIGINT):
    """Ctrl-C, or another signal, while the `updates`-th update from now is running."""
    update, calls = Trainer.update, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == updates:
            signal.raise_signal(number)
        return update(self)

    monkeypatch.setattr(Trainer, "update", interrupted)


def rows_of(directory):
    """Metrics with NaN, which is not equal to itself, as a word, and without the speed."""
    return [
        {k: "nan" if math.isnan(v) else v for k, v in row.items() if k != "charts/SPS"}
        for row in read_metrics(directory)
    ]


def assert_equal(one, two, where="checkpoint"):
    """Bit for bit, in nested containers, but for the time it took."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0)), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one.keys() - {"seconds"}:  # the stopwatch's
            assert_equal(one[key], two[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    else:
        assert one == two, where
