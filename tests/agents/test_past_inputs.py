"""`critic.past_steps`: the critic is given averages of what the core has read in the episode, from rollout to rollout."""

import io
import itertools
import math

import pytest
import torch

import dni_rl
from agents.config import CriticConfig
from agents.credit import measure_credit
from agents.learner import with_inputs
from agents.rollout import Actor
from tests.agents.scripted_env import ScriptedEnv, make_model
from tests.agents.test_future_inputs import ALGORITHMS, B, T, make_trainer, parameters

STEPS = [3, 20]


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("future_steps", [0, 2])
@pytest.mark.parametrize("kind", ["dni", "cdni"])
def test_the_context_holds_averages_over_rollouts(same_step, future_steps, kind):
    model = make_model()
    actor = Actor(ScriptedEnv(num_envs=B, seed=0, same_step=same_step), model, rollout_length=T, bptt_horizon=4, seed=1)
    rollouts = [actor.collect() for _ in range(3)]
    config = CriticConfig(kind=kind, past_steps=(3, 20), future_steps=future_steps)
    size = len(STEPS) * (model.observed_size + 1)
    start = 2 if kind == "cdni" else 0
    inputs, first, found, averages = [], [], [], None
    for rollout in rollouts:
        told, averages = with_inputs(rollout, model, config, averages)
        assert told.context.shape == (T + 1, B, start + size + future_steps * (model.core.input_size + 1))
        assert torch.equal(told.context[..., :start], rollout.context[..., :start])
        found.append(told.context[..., start : start + size])
        with torch.no_grad():
            x = rollout.observation if model.torso.flat else model.torso(rollout.observation)
        inputs.append(x[:-1])
        first.append(rollout.first[:-1])
    expected = dni_rl.past_inputs(torch.cat(inputs), torch.cat(first), STEPS)
    torch.testing.assert_close(torch.cat([part[:-1] for part in found]), expected[:-1])
    for earlier, later in itertools.pairwise(found):
        assert torch.equal(earlier[-1], later[0]), "what a cut knows, the next window's start knows"


def test_without_past_steps_or_critic_the_rollout_is_left_alone():
    model = make_model()
    rollout = Actor(ScriptedEnv(num_envs=B, seed=0), model, rollout_length=T, bptt_horizon=4, seed=1).collect()
    for config in (CriticConfig(kind="cdni"), CriticConfig(kind="none", past_steps=(2,))):
        told, averages = with_inputs(rollout, model, config)
        assert told is rollout and averages is None


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["a2c", "ppo"])
@pytest.mark.parametrize("kind", ["dni", "cdni", "dni_aux", "loss_critic", "sobolev"])
def test_every_kind_that_takes_context_trains_with_it(kind, algorithm):
    trainer = make_trainer(kind, algorithm, past_steps=STEPS, learning_rate=0.01)
    before = parameters(trainer.learner.critic)
    metrics = [trainer.update() for _ in range(5)]
    assert all(math.isfinite(float(value)) for value in metrics[-1].values())
    assert metrics[-1]["sg/synthetic_norm"] > 0.0
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(trainer.learner.critic), strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["a2c", "ppo"])
def test_a_resumed_learner_knows_the_averages(algorithm):
    trainer, resumed = (make_trainer("dni", algorithm, past_steps=STEPS) for _ in range(2))
    for _ in range(3):
        trainer.update()
    file = io.BytesIO()
    torch.save({**trainer.state_dict(), "step": trainer.step}, file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.learner.averages, trainer.learner.averages) and trainer.learner.averages.any()
    for each in (trainer, resumed):
        each.update()
    assert all(
        torch.equal(a, b)
        for a, b in zip(parameters(trainer.learner.model), parameters(resumed.learner.model), strict=True)
    )


def test_the_credit_horizon_is_measured_with_them():
    trainer = make_trainer("dni", past_steps=STEPS)
    for _ in range(3):
        trainer.update()
    before = trainer.learner.averages.clone()
    assert measure_credit(trainer.config, trainer.learner).delivered_norm.isfinite().all()
    assert torch.equal(trainer.learner.averages, before)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"critic\.past_steps: found \[1\]; allowed .*of at least 2"):
        make_trainer("dni", past_steps=[1])
    with pytest.raises(ValueError, match=r"critic\.past_steps: .*allowed .* with critic\.kind bp_lambda"):
        make_trainer("bp_lambda", hidden_sizes=[], normalize_targets=False, past_steps=[2])
