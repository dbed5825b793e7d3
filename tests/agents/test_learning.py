"""Learning runs of minutes: the method passes a bar by a margin, and the baseline, which differs in one setting, fails it."""

from dataclasses import replace
from pathlib import Path

import pytest

from agents.config import TrainConfig, load_config
from agents.metrics import read_metrics
from agents.train import train

ROOT = Path(__file__).resolve().parents[2]
CORRIDOR = 40


def config_of(kind: str, folder: Path) -> TrainConfig:
    config = load_config(ROOT / "configs" / "tmaze.yaml")
    kwargs = {**config.env.kwargs, "corridor_length": CORRIDOR, "time_limit": CORRIDOR + 9}
    return replace(
        config,
        env=replace(config.env, kwargs=kwargs),
        model=replace(config.model, chrono_max=2.0 * CORRIDOR),
        critic=replace(config.critic, kind=kind),
        run=replace(config.run, total_steps=1_500_000, output_dir=str(folder), name=kind, tensorboard=False),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_conditioned_critic_learns_across_a_corridor_five_times_the_window_and_plain_bptt_does_not(tmp_path):
    success = {}
    for kind in ("cdni", "none"):
        rows = read_metrics(train(config_of(kind, tmp_path)))
        success[kind] = rows[-1]["charts/success_rate"]
    assert success["cdni"] > 0.95, success
    assert success["none"] < 0.7, success
