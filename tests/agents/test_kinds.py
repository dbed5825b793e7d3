"""Every kind of error critic in the agent: it trains, it continues from a file, and the plain ones keep their numbers."""

import copy
import math
from typing import get_args, get_type_hints

import pytest
import torch

import dni_rl
from agents.config import CriticConfig, from_dict
from agents.train import Trainer
from tests.agents.small_runs import A2C, PPO

KINDS = {
    "none": None,
    "dni": dni_rl.GradientCritic,
    "cdni": dni_rl.GradientCritic,
    "dni_aux": dni_rl.GradientCritic,
    "loss_critic": dni_rl.LossCritic,
    "sobolev": dni_rl.SobolevCritic,
    "bp_lambda": dni_rl.GradientCritic,
    "rtrl": None,
}
ONE_PASS = {"epochs": 1, "minibatches": 1}
NEEDS = {  # other settings than the defaults
    "bp_lambda": {"critic": {"hidden_sizes": [], "normalize_targets": False}, "algorithm": ONE_PASS},
    "rtrl": {"model": {"core": "elementwise_lstm"}, "algorithm": ONE_PASS},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
algorithms = pytest.mark.parametrize("algorithm", [A2C, PPO], ids=["a2c", "ppo"])


def make_trainer(kind, algorithm=A2C, model=None, **critic):
    needs = NEEDS.get(kind, {})
    return Trainer(
        from_dict(
            {
                "env": {"id": "PassiveTMaze", "num_envs": 4, "kwargs": {"corridor_length": 3, "num_distractors": 1}},
                "model": {"hidden_size": 6, "torso_sizes": [5], **needs.get("model", {}), **(model or {})},
                "critic": {"kind": kind, **needs.get("critic", {}), **critic},
                "algorithm": algorithm | needs.get("algorithm", {}),
                "run": {"total_steps": 640, "tensorboard": False, "progress": False},
            }
        )
    )


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def test_every_kind_is_in_this_suite():
    assert set(get_args(get_type_hints(CriticConfig)["kind"])) == set(KINDS)


@every_kind
@algorithms
def test_every_kind_trains_both_sides(kind, algorithm):
    trainer = make_trainer(kind, algorithm)
    learner = trainer.learner
    assert type(learner.critic) is (KINDS[kind] or type(None))
    first = parameters(learner.learned), [] if learner.critic is None else parameters(learner.critic)
    metrics = [trainer.update() for _ in range(5)]
    assert all(math.isfinite(float(value)) for value in metrics[-1].values())
    assert all(not torch.equal(a, b) for a, b in zip(first[0], parameters(learner.learned), strict=True))
    if learner.critic is not None:
        assert all(not torch.equal(a, b) for a, b in zip(first[1], parameters(learner.critic), strict=True))
        assert metrics[-1]["sg/synthetic_norm"] > 0.0
        one_pass = algorithm is A2C or kind == "bp_lambda"  # otherwise an update is several
        assert (metrics[0]["sg/synthetic_norm"] == 0.0) == one_pass
    assert ("losses/auxiliary_loss" in metrics[-1]) == (kind == "dni_aux")


@every_kind
def test_the_first_update_is_that_of_truncated_backpropagation(kind):
    models = []
    # RTRL knows more than that as soon as there is a window before
    algorithm = A2C | {"bptt_horizon": 8 if kind == "rtrl" else 4}
    for each in ("none", kind):
        trainer = make_trainer(each, algorithm, NEEDS.get(kind, {}).get("model"))
        trainer.update()
        models.append(parameters(trainer.learner.model))
    torch.testing.assert_close(models[0], models[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["dni_aux", "loss_critic", "sobolev", "bp_lambda", "rtrl"])
def test_the_file_of_a_run_holds_all_that_learns(kind):
    settings = {} if kind in ("bp_lambda", "rtrl") else {"slow_copy_rate": 0.5, "target_lambda": 0.8}
    trainer = make_trainer(kind, **settings)
    for _ in range(3):
        trainer.update()
    state = copy.deepcopy(trainer.state_dict()) | {"step": trainer.step}
    expected = [trainer.update() for _ in range(2)][-1]
    other = make_trainer(kind, **settings)
    other.load_state_dict(state)
    actual = [other.update() for _ in range(2)][-1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_auxiliary_task_teaches_the_core_and_not_the_critic():
    trainer = make_trainer("dni_aux", auxiliary_cost=10.0)
    without = make_trainer("dni_aux", auxiliary_cost=0.0)
    for _ in range(4):
        trainer.update()
        without.update()
    head = trainer.learner.auxiliary.head[-1].weight
    assert head.any() and not without.learner.auxiliary.head[-1].weight.any()
    a, b = (parameters(t.learner.model.core) for t in (trainer, without))
    assert all(not torch.equal(x, y) for x, y in zip(a, b, strict=True))
    plain = make_trainer("dni")
    for _ in range(4):
        plain.update()
    torch.testing.assert_close(b, parameters(plain.learner.model.core), rtol=0, atol=0)


def test_the_auxiliary_task_needs_a_next_window():
    with pytest.raises(ValueError, match=r"algorithm\.bptt_horizon: found 8; allowed a proper divisor of .* 8, with"):
        make_trainer("dni_aux", A2C | {"bptt_horizon": 8})


# Sums of the model's parameters after eight updates.
GOLDEN = {"none": -1.0822280540014617, "dni": -1.0823336262401426, "cdni": -1.0823614736291347}


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_numbers_of_the_plain_kinds_stay(kind):
    trainer = make_trainer(kind, hidden_sizes=(128,), learning_rate=3e-4)
    for _ in range(8):
        trainer.update()
    total = sum(p.double().sum() for p in parameters(trainer.learner.model))
    assert total.item() == pytest.approx(GOLDEN[kind], abs=2e-6)


def test_settings_reach_the_critic():
    trainer = make_trainer("sobolev", slow_copy_rate=0.25, target_lambda=0.5, gradient_discount=0.8)
    critic = trainer.learner.critic
    assert (critic.slow_copy_rate, critic.target_lambda, critic.gradient_discount) == (0.25, 0.5, 0.8)
