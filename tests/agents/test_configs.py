"""Every file in configs/ trains, and those of the kinds differ from the T-maze's settings in nothing that their method does not need."""

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from agents.config import CriticConfig, load_config, to_dict
from agents.train import Trainer
from comparison.matrix import load_matrix, members

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("kinds/*.yaml")])
KINDS = get_args(get_type_hints(CriticConfig)["kind"])
DIFFERENT = {
    "none": set(),
    "dni": set(),
    "cdni": set(),
    "dni_aux": {"env.num_envs", "algorithm.rollout_length"},
    "loss_critic": set(),
    "sobolev": set(),
    "bp_lambda": {
        "algorithm.bptt_horizon",
        "model.hidden_size",
        "critic.max_norm_ratio",
        "critic.learning_rate",
        "critic.normalize_targets",
    },
    "rtrl": {"model.core"},
    "multi_timescale": {
        "model.core",
        "env.num_envs",
        "algorithm.rollout_length",
        "critic.hidden_sizes",
        "critic.learning_rate",
        "critic.max_norm_ratio",
        "critic.targets_per_window",
    },
}


def shrunk(config):
    """The same run with few environments and two updates."""
    num_envs = min(4, config.env.num_envs)
    total_steps = 2 * num_envs * config.algorithm.rollout_length
    return replace(
        config,
        env=replace(config.env, num_envs=num_envs),
        run=replace(config.run, total_steps=total_steps, tensorboard=False, progress=False),
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_file_trains(path):
    config = load_config(path)
    for prefix, package in (
        ("ALE/", "ale_py"),
        ("MiniGrid-", "minigrid"),
        ("bsuite/", "bsuite"),
        ("popgym-", "popgym"),
    ):
        if config.env.id.startswith(prefix):
            pytest.importorskip(package, reason=f"{package} is an optional package, and not installed")
    if config.env.id.startswith("ALE/"):
        config = replace(config, algorithm=replace(config.algorithm, rollout_length=16, epochs=1))
    trainer = Trainer(shrunk(config))
    before = [p.detach().clone() for p in trainer.learner.model.core.parameters()]
    try:
        for _ in range(2):
            metrics = trainer.update()
        assert trainer.first_non_finite(metrics, thorough=True) is None
    finally:
        trainer.close()
    assert all((p != old).any() for p, old in zip(trainer.learner.model.core.parameters(), before, strict=True))


def test_there_is_a_file_for_every_kind_and_core():
    configs = {path.stem: load_config(path) for path in CONFIGS.glob("kinds/*.yaml")}
    assert {*KINDS, "multi_timescale"} == set(configs) == set(DIFFERENT)
    assert all(configs[kind].critic.kind == kind for kind in KINDS)


@pytest.mark.parametrize("name", DIFFERENT)
def test_files_of_kinds_share_the_settings_of_the_tmaze(name):
    base, config = (to_dict(load_config(CONFIGS / file)) for file in ("tmaze.yaml", f"kinds/{name}.yaml"))
    unused = {f"critic.{key}" for key in base["critic"]} if name in ("none", "rtrl") else set()
    different = {f"{s}.{key}" for s in base for key in base[s] if base[s][key] != config[s][key]}
    assert different - unused - {"critic.kind"} == DIFFERENT[name]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("compare/*.yaml")), ids=lambda path: path.stem)
def test_every_member_of_a_matrix_is_a_valid_configuration_of_its_own(path):
    resolved = [member.resolved() for member in members(load_matrix(path))]
    assert all(one not in others for one, *others in (resolved[i:] for i in range(len(resolved))))
