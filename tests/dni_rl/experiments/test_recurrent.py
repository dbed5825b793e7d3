"""What the programs with recurrent nets have in common."""

import math

import pytest
import torch
from torch import nn

from dni_rl.experiments import copy, ptb
from dni_rl.experiments.recurrent import ARMS, Learner, WindowConfig

CRITICS = [arm for arm in ARMS if arm not in ("none", "timescales")]


def learner(arm, **settings):
    linear = {"critic_hidden_sizes": (), "max_norm_ratio": None} if arm == "bp_lambda" else {}
    config = WindowConfig(arm=arm, **{"hidden_size": 6, "batch_size": 2, **settings, **linear})
    return Learner(config, nn.Identity, 4, 3)


@pytest.mark.parametrize("arm", CRITICS)
def test_critics_have_the_settings_of_the_run(arm):
    settings = {"critic_hidden_sizes": (5,), "critic_scale": 0.25, "gradient_discount": 0.5, "max_norm_ratio": 0.75}
    found = learner(arm, **settings, warmup_updates=3, learning_rate=0.5, critic_learning_rate=0.125)
    critic, is_linear = found.critic, arm == "bp_lambda"
    assert (critic.scale, critic.gradient_discount) == (0.25, 0.5)
    assert (critic.max_norm_ratio, critic.warmup_updates) == ((None, 0) if is_linear else (0.75, 3))
    assert is_linear or any(5 in parameter.shape for parameter in critic.parameters())
    assert [o.param_groups[0]["lr"] for o in (found.optimizer, found.critic_optimizer)] == [0.5, 0.125]


@pytest.mark.parametrize("arm", ["none", "timescales"])
def test_cores_have_the_memory_of_the_run(arm):
    plain, chrono = (
        nn.utils.parameters_to_vector(learner(arm, chrono_max=memory).core.parameters()) for memory in (None, 50.0)
    )
    assert plain.abs().max() < 1.0 < chrono.abs().max() < math.log(50.0)


@pytest.mark.parametrize("program", [copy, ptb], ids=["copy", "ptb"])
def test_the_auxiliary_task_is_told_of_the_window_that_is_read_next(program, tmp_path):
    plan = program.plan(["--preset", "smoke", "--cells", "dni_aux@4", "--run-folder", str(tmp_path)])
    experiment = program.Experiment(plan.matrix[0].config)
    learner, read, told = experiment.learner, [], []
    update, later = learner.update, learner._later_synthetic_gradients
    learner.update = lambda inputs, *rest: read.append(inputs) or update(inputs, *rest)
    learner._later_synthetic_gradients = lambda end, upcoming: told.append(upcoming) or later(end, upcoming)
    for _ in range(4):
        experiment.update()
    for upcoming, present, following in zip(told, read, read[1:], strict=False):
        assert torch.equal(upcoming, following) and not torch.equal(following, present)
    assert len(told) == 4
