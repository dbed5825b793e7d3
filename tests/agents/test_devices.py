"""The path of a GPU without one: collecting and learning on the device "meta", whose tensors have shapes and no values.

What the host would read of them is not there, and most operations refuse to mix them with a tensor made on the host by mistake (indices,
numbers without dimensions and copies pass, as they do on a GPU). It says nothing of a GPU's kernels.
"""

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import pytest
import torch

import dni_rl
import envs.gridworlds
from agents.config import CriticConfig, TrainConfig, from_dict
from agents.train import Trainer

KINDS = get_args(get_type_hints(CriticConfig)["kind"])
OF_KIND: dict[str, dict[str, Any]] = {
    "bp_lambda": {"critic.normalize_targets": False, "algorithm.bptt_horizon": 1},
    "rtrl": {"model.core": "elementwise_lstm"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "ppo": {"critic.kind": "dni", "algorithm.name": "ppo", "algorithm.minibatches": 2},
    "normalised advantages": {"critic.kind": "dni", "algorithm.normalize_advantages": True},
    "gru": {"critic.kind": "dni", "model.core": "gru"},
    "two levels": {"critic.kind": "dni", "model.core": "multi_timescale", "algorithm.bptt_horizon": 1},
    "past observations": {"critic.kind": "dni", "critic.past_steps": (10, 100)},
    "bound and slow copy": {"critic.kind": "cdni", "critic.max_norm_ratio": 1.0, "critic.slow_copy_rate": 0.1},
    "mixed targets": {"critic.kind": "dni", "critic.target_lambda": 0.5},
    "two targets": {"critic.kind": "dni", "critic.targets_per_window": 2},
}
GRIDWORLDS = [name for name in envs.gridworlds.__all__ if name != "BatchedGridworld"]


@pytest.fixture(autouse=True)
def trained_without_values(device_without_values, monkeypatch):
    """Trainers are on "meta"."""
    monkeypatch.setattr("agents.train.require_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.uniform_())
    # Actions out of range are looked for on the host, without a wait on CUDA: see `BatchedGridworld.step`.
    monkeypatch.setattr(envs.gridworlds.BatchedGridworld, "_checked", lambda self, actions: actions)


def config_of(settings: Mapping[str, Any], env: Mapping[str, Any] | None = None) -> TrainConfig:
    data: dict[str, dict[str, Any]] = {
        "env": dict(env or {"num_envs": 4, "kwargs": {"corridor_length": 4, "num_distractors": 4}}),
        "model": {"hidden_size": 8, "chrono_max": 40},
        "algorithm": {"rollout_length": 16, "bptt_horizon": 8},
        "critic": {},
    }
    for name, value in settings.items():
        section, key = name.split(".")
        data[section][key] = value
    return from_dict(data)


def learn(config: TrainConfig) -> None:
    trainer = Trainer(config)
    assert {p.device.type for p in trainer.learner.model.parameters()} == {"meta"}
    for _ in range(2):
        metrics = trainer.learner.update(trainer.actor.collect())
        assert {value.device.type for value in metrics.values()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_on_its_device_alone(kind):
    learn(config_of({"critic.kind": kind, **OF_KIND.get(kind, {})}))


@pytest.mark.parametrize("name", OTHERS)
def test_every_setting_learns_on_its_device_alone(name):
    learn(config_of(OTHERS[name]))


@pytest.mark.parametrize("name", GRIDWORLDS)
def test_every_gridworld_stays_on_its_device(name):
    learn(config_of({"critic.kind": "cdni"}, {"id": name, "num_envs": 4}))


@pytest.mark.parametrize(
    "mistake",
    [lambda h: h + torch.ones(4, 8), lambda h: h * h.sum().item()],
    ids=["made on the host", "read by the host"],
)
def test_a_mistake_is_found(mistake, monkeypatch):
    forward = dni_rl.LSTM.forward
    monkeypatch.setattr(dni_rl.LSTM, "forward", lambda self, x, state: forward(self, x, (mistake(state[0]), state[1])))
    trainer = Trainer(config_of({"critic.kind": "dni"}))
    with pytest.raises(RuntimeError, match="meta"):
        trainer.actor.collect()
