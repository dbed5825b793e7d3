"""`critic.future_steps`: the critic is given inputs that lie ahead in the stored rollout, and nobody else is."""

import math

import pytest
import torch

from agents.config import CriticConfig, from_dict
from agents.credit import measure_credit
from agents.learner import make_windows, with_inputs
from agents.rollout import Actor
from agents.train import Trainer
from tests.agents.scripted_env import ScriptedEnv, make_model

B, T, N = 4, 8, 3
ALGORITHMS = [
    {"name": "a2c", "rollout_length": T, "bptt_horizon": 4},
    {"name": "ppo", "rollout_length": T, "bptt_horizon": 4, "epochs": 2, "minibatches": 2},
]


def make_trainer(kind, algorithm=ALGORITHMS[0], model=None, **critic):
    return Trainer(
        from_dict(
            {
                "env": {"id": "PassiveTMaze", "num_envs": 4, "kwargs": {"corridor_length": 3, "num_distractors": 1}},
                "model": {"hidden_size": 6, "torso_sizes": [5], **(model or {})},
                "critic": {"kind": kind, **critic},
                "algorithm": algorithm,
                "run": {
                    "total_steps": 640,
                    "tensorboard": False,
                    "progress": False,
                    "credit_length": 16,
                    "credit_num_envs": 4,
                },
            }
        )
    )


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("kind", ["dni", "cdni"])
def test_the_context_holds_the_inputs_that_the_core_will_read_in_this_episode(same_step, kind):
    model = make_model()
    environment = ScriptedEnv(num_envs=B, seed=0, same_step=same_step)
    rollout = Actor(environment, model, rollout_length=T, bptt_horizon=4, seed=1).collect()
    ahead = with_inputs(rollout, model, CriticConfig(kind=kind, future_steps=N))[0]
    privileged = 2 if kind == "cdni" else 0
    assert ahead.context.shape == (T + 1, B, privileged + N * (model.core.input_size + 1))
    assert torch.equal(ahead.context[..., :privileged], rollout.context[..., :privileged])
    inputs, flags = ahead.context[..., privileged:].split(
        [N * model.core.input_size, N], -1
    )  # [T + 1, B, N * D], [T + 1, B, N]
    for t in range(T + 1):
        for b in range(B):
            for i in range(N):
                known = t + i <= T and not rollout.first[t : t + i + 1, b].any()
                assert flags[t, b, i] == known
                x = inputs[t, b].view(N, -1)[i]
                if not known:
                    assert not x.any()
                    continue
                row = (rollout.observation, rollout.action_tm1, rollout.reward, rollout.first)
                torch.testing.assert_close(x, model.core_inputs(*(y[t + i, b : b + 1] for y in row))[0].detach())
    assert 0.2 < flags.mean() < 0.8, "episodes end inside"
    windows = make_windows(ahead, 4, 0.9, 0.9)
    assert torch.equal(windows.context[-1, :B], windows.context[0, B:]), (
        "what a cut knows, the next window's start knows"
    )


def test_without_future_steps_or_critic_the_rollout_is_left_alone():
    model = make_model()
    rollout = Actor(ScriptedEnv(num_envs=B, seed=0), model, rollout_length=T, bptt_horizon=4, seed=1).collect()
    for config in (CriticConfig(kind="cdni"), CriticConfig(kind="none", future_steps=2)):
        assert with_inputs(rollout, model, config)[0] is rollout


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["a2c", "ppo"])
@pytest.mark.parametrize("kind", ["dni", "cdni", "dni_aux", "loss_critic", "sobolev"])
def test_every_kind_that_takes_context_trains_with_it(kind, algorithm):
    trainer = make_trainer(kind, algorithm, future_steps=N, learning_rate=0.01, hidden_sizes=(16,))
    before = parameters(trainer.learner.critic)
    metrics = [trainer.update() for _ in range(5)]
    assert all(math.isfinite(float(value)) for value in metrics[-1].values())
    assert metrics[-1]["sg/synthetic_norm"] > 0.0
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(trainer.learner.critic), strict=True))
    width = trainer.learner.model.core.input_size
    net = trainer.learner.critic.net
    first_layer = (net.net if kind in ("loss_critic", "sobolev") else net).linear.weight
    assert first_layer[:, -N * (width + 1) :].any(), "the critic makes use of what lies ahead"


@pytest.mark.parametrize("kind", ["dni", "cdni"])
def test_the_first_update_is_that_of_truncated_backpropagation_and_later_ones_are_not(kind):
    trainers = [make_trainer("none"), make_trainer(kind, future_steps=N), make_trainer(kind)]
    updates = []
    for trainer in trainers:
        trainer.update()
        updates.append([parameters(trainer.learner.model)])
        for _ in range(3):
            trainer.update()
        updates[-1].append(parameters(trainer.learner.model))
    torch.testing.assert_close(updates[0][0], updates[1][0], rtol=1e-6, atol=1e-9)
    for other in (updates[0], updates[2]):
        assert any(not torch.equal(a, b) for a, b in zip(other[1], updates[1][1], strict=True))


def test_a_multi_timescale_core_asks_with_it_inside_windows():
    algorithm = {"name": "a2c", "rollout_length": 8, "bptt_horizon": 2}
    model = {"core": "multi_timescale", "periods": [1, 2]}
    trainer = make_trainer("dni", algorithm, model, future_steps=N)
    metrics = [trainer.update() for _ in range(3)][-1]
    assert math.isfinite(metrics["sg/loss"]) and metrics["sg/synthetic_norm"] > 0.0


def test_the_credit_horizon_is_measured_with_it():
    trainer = make_trainer("dni", future_steps=N)
    for _ in range(3):
        trainer.update()
    assert measure_credit(trainer.config, trainer.learner).delivered_norm.isfinite().all()


def test_traces_take_no_context():
    with pytest.raises(ValueError, match=r"critic\.future_steps: found 2; allowed 0 with critic\.kind bp_lambda"):
        make_trainer("bp_lambda", hidden_sizes=[], normalize_targets=False, future_steps=2)
