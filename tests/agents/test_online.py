"""BP(lambda) and RTRL in the learner: what travels from window to window, and from rollout to rollout."""

import copy

import pytest
import torch
from torch import Tensor

import dni_rl
from agents.build import build_critic
from agents.config import AlgorithmConfig, CriticConfig
from agents.learner import Learner, make_windows, windows_in_order
from agents.losses import actor_critic_loss
from agents.rollout import Actor
from tests.agents.scripted_env import ScriptedEnv, make_model

B, T, DISCOUNT, LAMBDA = 4, 6, 0.9, 0.8
STILL = 1e-30  # a learning rate that moves nothing in float64, so that derivatives of the past stay exact
BP_LAMBDA = {"kind": "bp_lambda", "hidden_sizes": (), "normalize_targets": False, "gradient_discount": 0.8}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def act(model, rollouts, K, max_length=9, same_step=False):
    env = ScriptedEnv(num_envs=B, seed=3, max_length=max_length, same_step=same_step)
    actor = Actor(env, model, rollout_length=T, bptt_horizon=K, seed=1)
    return [actor.collect() for _ in range(rollouts)]


def make_learner(model, K, learning_rate=STILL, **critic):
    config = CriticConfig(learning_rate=learning_rate, **critic)
    algorithm = AlgorithmConfig(
        rollout_length=T,
        bptt_horizon=K,
        discount=DISCOUNT,
        gae_lambda=LAMBDA,
        entropy_cost=0.1,
        max_grad_norm=None,
        learning_rate=learning_rate,
    )
    learner = Learner(model, build_critic(config, model, ENV_SPEC), algorithm, config, num_envs=B, seed=0)
    if learner.critic is not None:
        torch.manual_seed(4)
        for p in learner.critic.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return learner


ENV_SPEC = ScriptedEnv(num_envs=1, seed=0).spec


def losses_of(learner: Learner, rollout, logits: Tensor, values: Tensor) -> Tensor:
    """[T, B] losses of a rollout's steps, given what the network says there."""
    whole = make_windows(rollout, T, DISCOUNT, LAMBDA)
    return actor_critic_loss(
        logits,
        values,
        whole.action,
        whole.advantage,
        whole.value_target,
        whole.valid,
        entropy_cost=learner.algorithm.entropy_cost,
        baseline_cost=learner.algorithm.baseline_cost,
    ).total


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


# RTRL


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("K", [1, 3, 6])
def test_rtrl_gives_the_core_the_gradient_since_the_start_of_each_episode(K, same_step):
    model = make_model("elementwise_lstm")
    rollouts = act(model, 3, K, same_step=same_step)
    learner = make_learner(model, K, kind="rtrl")
    for rollout in rollouts:
        learner.update(rollout)

    whole = copy.deepcopy(model)
    names = ("observation", "action_tm1", "reward", "first")
    inputs = [torch.cat([getattr(rollout, name)[:-1] for rollout in rollouts]) for name in names]
    logits, values, _ = whole.unroll(*inputs, whole.core.initial_state(B))
    whole.zero_grad()
    losses_of(learner, rollouts[-1], logits[-T:], values[-T:]).mean().backward()
    assert 0 < inputs[-1][T + 1 :].sum() < 20  # episodes start inside, and others reach across

    truncated = copy.deepcopy(model)
    make_learner(truncated, K, kind="none").update(rollouts[-1])
    actual, full, window = (gradients(m) for m in (model, whole, truncated))
    for name in actual:
        if name.startswith("torso"):
            torch.testing.assert_close(actual[name], window[name], rtol=1e-10, atol=1e-13, msg=name)
            assert not torch.allclose(actual[name], full[name], rtol=1e-4)
        else:
            torch.testing.assert_close(actual[name], full[name], rtol=1e-10, atol=1e-13, msg=name)
            if name.startswith("core"):
                assert not torch.allclose(actual[name], window[name], rtol=1e-4)


# BP(lambda)


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("K", [1, 3])
def test_bp_lambda_takes_one_trace_through_all_windows_of_all_rollouts(K, same_step):
    model = make_model("gru")
    rollouts = act(model, 2, K, same_step=same_step)
    learner = make_learner(model, K, **BP_LAMBDA, trace_lambda=0.7)
    reference, critic = copy.deepcopy(model), copy.deepcopy(learner.critic)

    trace, state = dni_rl.bp_lambda_trace(critic, B), reference.core.initial_state(B)
    for rollout in rollouts:
        learner.update(rollout)
        reference.zero_grad()
        critic.zero_grad()
        for t in range(0, T, K):
            step = slice(t, t + K)
            start = dni_rl.cut(state)
            logits, values, state = reference.unroll(
                *(getattr(rollout, name)[step] for name in ("observation", "action_tm1", "reward", "first")), start
            )
            padded = [torch.zeros(T, *x.shape[1:]).index_put((torch.arange(T)[step],), x) for x in (logits, values)]
            _, trace = dni_rl.bp_lambda_backward(
                losses_of(learner, rollout, *padded)[step],
                start=start,
                end=state,
                critic=critic,
                trace=trace,
                lambda_=0.7,
                first=rollout.first[step],
                alive=torch.cat([~rollout.last[step], ~(rollout.first | rollout.last)[t + K : t + K + 1]]),
                weight=1.0 / (T * B),
            )
    torch.testing.assert_close(learner.trace, trace, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=1e-9, atol=1e-12)
    for actual, expected in zip(learner.critic.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad * K / T, rtol=1e-9, atol=1e-12)  # the mean over windows
    assert trace.any()


def test_traces_that_do_not_fit_are_refused_in_the_words_of_a_configuration():
    model = make_model("lstm")
    critic = dni_rl.GradientCritic(state_sizes=(500, 500), normalize_targets=False)
    with pytest.raises(
        ValueError, match=r"^critic\.kind: found 'bp_lambda'; batch_size: .* GiB; .* lower env\.num_envs or"
    ):
        Learner(model, critic, AlgorithmConfig(), CriticConfig(**BP_LAMBDA), num_envs=64, seed=0)


# Both


def carried(learner):
    return [learner.trace] if learner.sensitivity is None else [learner.sensitivity.h, learner.sensitivity.c]


ONLINE = pytest.mark.parametrize("critic", [BP_LAMBDA, {"kind": "rtrl"}], ids=["bp_lambda", "rtrl"])


@ONLINE
def test_nothing_of_an_episode_is_carried_into_the_next_one(critic):
    results = []
    for noise in (0.0, 1.0):
        model = make_model("elementwise_lstm")
        (rollout,) = act(model, 1, 3, max_length=40)
        learner = make_learner(model, 3, **critic)
        torch.manual_seed(7)
        for tensor in carried(learner):
            tensor.copy_(noise * torch.randn_like(tensor))
        first = rollout.first.clone()
        first[0], first[3, :2] = False, True  # as if in the middle of episodes, of which two end at a window's start
        rollout.first = first
        learner.update(rollout)
        results.append([x.clone() for x in carried(learner)])
    starts = rollout.first[:-1].any(0)
    assert starts.any() and not starts.all()
    for without, with_noise in zip(*results, strict=True):
        assert torch.equal(without[starts], with_noise[starts])
        assert (without[~starts] != with_noise[~starts]).flatten(1).any(1).all()


@ONLINE
def test_a_learner_continues_exactly_from_its_saved_state(critic):
    rollouts = act(make_model("elementwise_lstm"), 4, 3)
    learners = [make_learner(make_model("elementwise_lstm", seed=seed), 3, 0.01, **critic) for seed in (0, 5)]
    for rollout in rollouts[:2]:
        learners[0].update(rollout)
    learners[1].load_state_dict(copy.deepcopy(learners[0].state_dict()))
    for rollout in rollouts[2:]:
        metrics = [learner.update(rollout) for learner in learners]
        assert metrics[0] == metrics[1]
    assert all(torch.equal(one, two) and one.any() for one, two in zip(*map(carried, learners), strict=True))
    for one, two in zip(learners[0].model.parameters(), learners[1].model.parameters(), strict=True):
        assert torch.equal(one, two)


@ONLINE
def test_normalised_advantages_are_those_of_the_whole_rollout(critic, monkeypatch):
    """One rollout in two windows: advantages have mean 0 in it, and not in each of them."""
    import agents.learner

    model = make_model("elementwise_lstm")
    (rollout,) = act(model, 1, 3)
    learner = make_learner(model, 3, **critic)
    learner.algorithm = AlgorithmConfig(rollout_length=T, bptt_horizon=3, normalize_advantages=True)
    seen = []
    loss = agents.learner.actor_critic_loss

    def record(*args, **kwargs):
        seen.append((args[3], args[5]))
        return loss(*args, **kwargs)

    monkeypatch.setattr(agents.learner, "actor_critic_loss", record)
    learner.update(rollout)
    advantage, valid = (torch.cat(x) for x in zip(*seen, strict=True))
    assert len(seen) == 2
    assert advantage[valid].mean().item() == pytest.approx(0, abs=1e-12)
    assert abs(seen[0][0][seen[0][1]].mean().item()) > 0.05


def test_windows_in_order_are_the_columns_of_all_windows():
    (rollout,) = act(make_model(), 1, 2)
    windows = make_windows(rollout, 2, DISCOUNT, LAMBDA)
    parts = list(windows_in_order(windows, B))
    assert len(parts) == 3
    for w, part in enumerate(parts):
        assert torch.equal(part.observation, rollout.observation[2 * w : 2 * w + 2])
        assert torch.equal(part.context, rollout.context[2 * w : 2 * w + 3])
        assert all(torch.equal(s, stored[w]) for s, stored in zip(part.state, rollout.states, strict=True))
        assert torch.equal(part.alive, windows.alive[:, w * B : (w + 1) * B])
