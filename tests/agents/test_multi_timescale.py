"""The multi-timescale core in the agent: windows of ticks, each environment's own clock, critics in time and between levels."""

import copy
import math

import pytest
import torch

import dni_rl
from agents.build import build_critic, build_interfaces
from agents.config import AlgorithmConfig, CriticConfig, from_dict
from agents.learner import Learner, make_windows
from agents.losses import actor_critic_loss
from agents.rollout import Actor
from agents.train import Trainer
from tests.agents.scripted_env import ScriptedEnv, make_model

B, K, PERIODS, DISCOUNT, LAMBDA = 4, 2, (1, 2, 4), 0.9, 0.8
WINDOW, T = 8, 16
SPEC = ScriptedEnv(num_envs=1, seed=0).spec


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def act(model, rollouts=2, same_step=False):
    env = ScriptedEnv(num_envs=B, seed=3, max_length=13, same_step=same_step)
    actor = Actor(env, model, rollout_length=T, bptt_horizon=WINDOW, seed=1)
    return [actor.collect() for _ in range(rollouts)]


def make_learner(model, **critic):
    config = CriticConfig(**critic)
    algorithm = AlgorithmConfig(
        rollout_length=T, bptt_horizon=K, discount=DISCOUNT, gae_lambda=LAMBDA, max_grad_norm=None
    )
    return Learner(
        model,
        build_critic(config, model, SPEC),
        algorithm,
        config,
        num_envs=B,
        seed=0,
        interfaces=build_interfaces(config, model),
    )


def make_levels(**settings):
    return make_model("multi_timescale", periods=PERIODS, level_sizes=(5, 4, 3), **settings)


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("message", ["last", "mean"])
def test_the_learner_computes_what_the_actor_computed(message, same_step):
    model = make_levels(message=message)
    learner = make_learner(model, kind="dni", interfaces=True)
    assert learner.window_length == WINDOW
    boundaries = 0
    for rollout in act(model, 3, same_step):
        windows = make_windows(rollout, WINDOW, DISCOUNT, LAMBDA)
        inputs = model.core_inputs(windows.observation, windows.action_tm1, windows.reward, windows.first)
        outputs, end, bootstraps = learner._unroll(windows, inputs, windows.state, None)
        logits, values = model.heads(outputs)
        for w in range(T // WINDOW):
            part, rows = slice(w * WINDOW, (w + 1) * WINDOW), slice(w * B, w * B + B)
            torch.testing.assert_close(logits[:, rows], rollout.logits[part])
            torch.testing.assert_close(values[:, rows], rollout.value[part])
        for component, stored in zip(end, rollout.states, strict=True):
            torch.testing.assert_close(component[:B], stored[1])
        assert not bootstraps.any()
        boundaries += rollout.first[:-1].sum().item()
    assert boundaries > 10


def test_every_environment_has_its_own_clock():
    model = make_levels()
    (rollout,) = act(model, 1)
    clocks, steps = rollout.states[-1].squeeze(-1), torch.zeros(B)
    for t in range(WINDOW):  # counts the steps of each episode by hand
        steps = torch.where(rollout.first[t], 1, steps + 1)
    assert torch.equal(clocks[1] % PERIODS[-1], steps % PERIODS[-1])
    assert len(clocks[1].unique()) > 1


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("interfaces", [False, True])
@pytest.mark.parametrize("kind", ["none", "dni", "cdni"])
def test_every_level_is_cut_after_its_own_ticks(kind, interfaces, same_step, double):
    """The update by plain autograd, step by step.

    Level i is detached every K * periods[i] steps, where the critic's prediction stands in for what was cut, and messages are
    detached always if they have interfaces.
    """
    model = make_levels()
    rollout = act(model, 2, same_step)[1]  # the second one starts with a memory
    learner, reference = make_learner(model, kind=kind, interfaces=interfaces), copy.deepcopy(model)
    critic = learner.critic
    if critic is not None:
        torch.manual_seed(5)
        for p in critic.parameters():
            torch.nn.init.normal_(p, std=0.3)
        critic = copy.deepcopy(critic)
    ended = rollout.first | rollout.last
    learner.update(rollout)

    state, logits, values = tuple(s[0] for s in rollout.states), [], []
    core, bootstrap = reference.core, torch.zeros(())
    for t in range(T + 1):
        parts, b = [], None
        if critic is not None and t:
            context = rollout.context[t].double() if kind == "cdni" else None
            b = critic.synthetic_gradient(tuple(s.detach() for s in state), context, ~ended[t])
        for i, period in enumerate(PERIODS):
            part = state[2 * i : 2 * i + 2]
            if t % (K * period):
                parts += part
            else:
                parts += [s.detach() for s in part]
                if b is not None:
                    bootstrap = bootstrap + sum((s * g).sum() for s, g in zip(part, b[2 * i : 2 * i + 2], strict=True))
        if t == T:
            break
        state = dni_rl.cores.clear_state((*parts, state[-1]), rollout.first[t])
        x = reference.core_inputs(
            *(r[t] for r in (rollout.observation, rollout.action_tm1, rollout.reward, rollout.first))
        )
        # a fresh interface critic predicts zero: the lower level hears nothing back
        output, state = core._step(x, state, lambda level, message, heard: message.detach() if interfaces else message)
        step_logits, value = reference.heads(output)
        logits.append(step_logits)
        values.append(value)
    whole = make_windows(rollout, T, DISCOUNT, LAMBDA)
    loss = actor_critic_loss(
        torch.stack(logits),
        torch.stack(values),
        whole.action,
        whole.advantage,
        whole.value_target,
        whole.valid,
        entropy_cost=learner.algorithm.entropy_cost,
        baseline_cost=learner.algorithm.baseline_cost,
    )
    assert ended[:-1].any() and (critic is None or bootstrap != 0.0)
    ((loss.total.sum() + bootstrap) / (T * B)).backward()
    for (name, p), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-9, atol=1e-13, msg=name)


def test_a_window_reaches_over_all_steps_of_its_ticks():
    """The gradient of the last loss climbs the ladder: to the tick of the upper level K * period steps before."""
    model = make_model("multi_timescale", periods=(1, 8))
    algorithm = AlgorithmConfig(rollout_length=64, bptt_horizon=8)
    learner = Learner(model, None, algorithm, CriticConfig(), num_envs=1, seed=0)
    assert learner.window_length == 64
    env = ScriptedEnv(num_envs=1, seed=0, max_length=200)
    rollout = Actor(env, model, rollout_length=64, bptt_horizon=64, seed=0).collect()
    rollout.first[1:] = False  # one long episode
    windows = make_windows(rollout, 64, DISCOUNT, LAMBDA)
    x = (
        model.core_inputs(windows.observation, windows.action_tm1, windows.reward, windows.first)
        .detach()
        .requires_grad_()
    )
    outputs, _, _ = learner._unroll(windows, x, dni_rl.cut(windows.state), None)
    (gradient,) = torch.autograd.grad(outputs[-1].sum(), x)
    reached = gradient.flatten(1).any(1).nonzero().flatten().tolist()
    # the ticks of the upper level, then the last window of the lower one; step 63 hears of the tick at step 56
    assert reached == [0, 8, 16, 24, 32, 40, 48, *range(56, 64)]


def make_trainer(kind="dni", algorithm="a2c", interfaces=True, periods=(1, 2), **model):
    return Trainer(
        from_dict(
            {
                "env": {"id": "PassiveTMaze", "num_envs": 4, "kwargs": {"corridor_length": 3, "num_distractors": 1}},
                "model": {
                    "core": "multi_timescale",
                    "periods": list(periods),
                    "hidden_size": 6,
                    "torso_sizes": [5],
                    **model,
                },
                "critic": {"kind": kind, "interfaces": interfaces},
                "algorithm": {
                    "name": algorithm,
                    "rollout_length": 16,
                    "bptt_horizon": 2,
                    "epochs": 2,
                    "minibatches": 2,
                    "learning_rate": 0.01,
                },
                "run": {"total_steps": 640, "tensorboard": False, "progress": False},
            }
        )
    )


@pytest.mark.parametrize("algorithm", ["a2c", "ppo"])
@pytest.mark.parametrize("interfaces", [False, True])
@pytest.mark.parametrize("kind", ["none", "dni", "cdni", "dni_aux", "loss_critic", "sobolev"])
def test_every_kind_trains_all_sides_and_continues_exactly(kind, interfaces, algorithm):
    trainer = make_trainer(kind, algorithm, interfaces)
    learner = trainer.learner
    sides = [learner.learned, *learner.critics]
    assert len(learner.critics) == (kind != "none") + interfaces
    before = [[p.detach().clone() for p in side.parameters()] for side in sides]
    for _ in range(4):
        metrics = trainer.update()
    assert trainer.first_non_finite(metrics, thorough=True) is None
    for side, values in zip(sides, before, strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(side.parameters(), values, strict=True))
    if interfaces:
        assert math.isfinite(metrics["sg/interface_1/loss"]) and metrics["sg/interface_1/loss"] > 0.0
    assert ("sg/loss" in metrics) == (kind != "none")

    state = copy.deepcopy(trainer.state_dict()) | {"step": trainer.step}
    expected = [trainer.update() for _ in range(2)][-1]
    other = make_trainer(kind, algorithm, interfaces)
    other.load_state_dict(state)
    actual = [other.update() for _ in range(2)][-1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_interfaces_learn_what_comes_down_from_above():
    trainer = make_trainer("none")
    (critic,) = trainer.learner.interfaces
    assert critic.state_sizes == (6,)
    fits = [trainer.update()["sg/interface_1/cosine"].item() for _ in range(40)]
    assert sum(fits[-10:]) / 10 > 0.3 > abs(fits[0])


def test_the_gain_acts_on_what_comes_from_below_and_not_on_context():
    cores = [make_trainer(input_gain=gain, previous_reward=False).learner.model.core for gain in (1.0, 3.0)]
    below = [cores[0].input_size, 6]
    for one, three, width in zip(*(core.levels for core in cores), below, strict=True):
        torch.testing.assert_close(3.0 * one.weight_ih[:, :width], three.weight_ih[:, :width])
        assert torch.equal(one.weight_ih[:, width:], three.weight_ih[:, width:])
    assert cores[0].levels[0].weight_ih.shape[1] == below[0] + 6


def test_marks_of_what_is_alive_must_fit_the_window():
    core = make_levels().core
    inputs, state = torch.zeros(8, B, core.input_size), core.initial_state(B)
    with pytest.raises(
        ValueError, match=r"^alive: expected \[T, B\] = \(8, 4\), or \[T \+ 1, B\] as in dni_rl.backward, got \(4,\)"
    ):
        core.unroll_in_ticks(inputs, state, ticks=2, alive=torch.ones(B, dtype=torch.bool))
