"""Learning runs of minutes: the method passes a bar by a margin, and the baseline, which differs in one setting, fails it."""

from dataclasses import replace
from pathlib import Path

import pytest

from agents.config import TrainConfig, load_config
from agents.metrics import read_metrics
from agents.train import train

ROOT = Path(__file__).resolve().parents[2]


def config_of(kind: str, corridor: int, steps: int, folder: Path) -> TrainConfig:
    config = load_config(ROOT / "configs" / "tmaze.yaml")
    kwargs = {**config.env.kwargs, "corridor_length": corridor, "time_limit": corridor + 9}
    return replace(
        config,
        env=replace(config.env, kwargs=kwargs),
        model=replace(config.model, chrono_max=2.0 * corridor),
        critic=replace(config.critic, kind=kind),
        run=replace(config.run, total_steps=steps, output_dir=str(folder), name=kind, tensorboard=False),
    )


def success_of(config: TrainConfig) -> float:
    return read_metrics(train(config))[-1]["charts/success_rate"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "corridor", "steps"), [("cdni", 40, 2_500_000), ("dni", 20, 2_000_000)])
def test_a_critic_learns_across_a_corridor_of_several_windows_and_plain_bptt_does_not(tmp_path, kind, corridor, steps):
    success = {arm: success_of(config_of(arm, corridor, steps, tmp_path)) for arm in (kind, "none")}
    assert success[kind] > 0.95, success
    assert success["none"] < 0.7, success


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_critic_learns_which_of_two_doors_a_key_taken_windows_ago_opens_and_plain_bptt_does_not(tmp_path):
    config = load_config(ROOT / "configs" / "gridworlds.yaml")
    env = replace(config.env, id="KeyToDoor", kwargs={"num_doors": 2, "room_size": 3})
    # an agent that sees its previous action could keep which door by repeating it
    config = replace(config, env=env, model=replace(config.model, chrono_max=80.0, previous_action=False))
    success = {}
    for arm in ("cdni", "none"):
        run = replace(config.run, total_steps=2_000_000, output_dir=str(tmp_path), name=arm, tensorboard=False)
        success[arm] = success_of(replace(config, critic=replace(config.critic, kind=arm), run=run))
    assert success["cdni"] > 0.85, success
    assert success["none"] < 0.5, success  # chance, once the agent takes the key and goes to a door
