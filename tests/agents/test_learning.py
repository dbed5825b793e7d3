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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "corridor", "steps"), [("cdni", 40, 2_500_000), ("dni", 20, 2_000_000)])
def test_a_critic_learns_across_a_corridor_of_several_windows_and_plain_bptt_does_not(tmp_path, kind, corridor, steps):
    success = {}
    for arm in (kind, "none"):
        rows = read_metrics(train(config_of(arm, corridor, steps, tmp_path)))
        success[arm] = rows[-1]["charts/success_rate"]
    assert success[kind] > 0.95, success
    assert success["none"] < 0.7, success
