import pytest
import torch
from torch import nn

from agents.build import build_model
from agents.config import ModelConfig
from agents.model import CONVOLUTIONS, ActorCritic, Torso, conv_torso, mlp_torso
from dni_rl.cores import GRU, LSTM
from envs.timestep import EnvSpec
from tests.agents.scripted_env import make_model

CORES = [("lstm", 1), ("lstm", 2), ("gru", 1), ("gru", 2), ("elementwise_lstm", 1), ("multi_timescale", 1)]


def _inputs(T, B, generator):
    return (
        torch.randn(T, B, 3, generator=generator),
        torch.randint(3, (T, B), generator=generator),
        torch.randn(T, B, generator=generator),
        torch.rand(T, B, generator=generator) < 0.3,
    )


@pytest.mark.parametrize(("core", "num_layers"), CORES)
def test_unroll_equals_steps_across_episode_boundaries(core, num_layers):
    model = make_model(core, num_layers, head_sizes=(6,))
    generator = torch.Generator().manual_seed(0)
    inputs = _inputs(6, 4, generator)
    start = tuple(torch.randn(4, size, generator=generator) for size in model.core.state_sizes)
    state, logits, values = start, [], []
    for step in zip(*inputs, strict=True):
        step_logits, outputs, state = model.act(*step, state)
        logits.append(step_logits)
        values.append(model.value_of(outputs))
    unrolled_logits, unrolled_values, end = model.unroll(*inputs, start)
    torch.testing.assert_close(unrolled_logits, torch.stack(logits))
    torch.testing.assert_close(unrolled_values, torch.stack(values))
    torch.testing.assert_close(tuple(end), tuple(state))


def test_nothing_of_an_episode_reaches_the_next_one():
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    observation, action_tm1, reward, first = _inputs(1, 4, generator)
    first[:] = True
    zeros = model.core.initial_state(4)
    expected = model.act(observation[0], action_tm1[0], reward[0], first[0], zeros)
    other = tuple(torch.randn_like(s) for s in zeros)
    actual = model.act(observation[0], (action_tm1[0] + 1) % 3, reward[0] + 1, first[0], other)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("head_sizes", [(), (6,)])
def test_a_privileged_context_reaches_the_value_and_nothing_else(head_sizes):
    model = make_model(privileged_value=True, head_sizes=head_sizes)
    generator = torch.Generator().manual_seed(0)
    inputs, state = _inputs(6, 4, generator), model.core.initial_state(4)
    privileged = torch.randn(6, 4, 2, generator=generator).requires_grad_()
    logits, values, end = model.unroll(*inputs, state, privileged)
    outputs, _ = model.core.unroll(model.core_inputs(*inputs), state, inputs[-1])
    torch.testing.assert_close(values, model.value_head(torch.cat([outputs, privileged], -1)).squeeze(-1))
    (gradient,) = torch.autograd.grad(values.sum(), privileged, retain_graph=True)
    assert (gradient != 0).any(-1).all()
    for told_nothing in (logits, *end):
        assert torch.autograd.grad(told_nothing.sum(), privileged, allow_unused=True, retain_graph=True) == (None,)


@pytest.mark.parametrize(("built", "given"), [(True, 0), (True, 3), (False, 2)])
def test_a_context_of_another_size_than_the_value_function_was_built_with_is_refused(built, given):
    model = make_model(privileged_value=built)
    privileged = torch.zeros(4, given) if given else None
    message = (
        f"^privileged: found a context of {given} numbers; allowed {2 * built}, as the value function was built with; "
    )
    with pytest.raises(ValueError, match=message):
        model.value_of(torch.zeros(4, 5), privileged)


def test_the_core_reads_features_previous_action_and_clipped_previous_reward():
    torso = Torso(nn.Sequential(), (3,), 3, flat=True)
    model = ActorCritic(torso, LSTM(3 + 4 + 1, 5), 4)
    observation = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    first = torch.tensor([False, True])
    inputs = model.core_inputs(observation, torch.tensor([2, 1]), torch.tensor([-7.0, 0.5]), first)
    assert inputs.tolist() == [[1, 2, 3, 0, 0, 1, 0, -1], [4, 5, 6, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("action", "reward", "width"), [(False, False, 4), (True, False, 7), (False, True, 5)])
def test_previous_action_and_reward_are_optional(action, reward, width):
    model = make_model(previous_action=action, previous_reward=reward)
    assert model.core.input_size == width
    inputs = _inputs(2, 2, torch.Generator().manual_seed(0))
    assert model.core_inputs(*inputs).shape == (2, 2, width)
    assert model.unroll(*inputs, model.core.initial_state(2))[0].shape == (2, 2, 3)


def test_a_torso_keeps_leading_dimensions():
    images = torch.randint(256, (2, 3, 1, 40, 40), dtype=torch.uint8)
    convolutional = [conv_torso((1, 40, 40), layers, (8,)) for layers in CONVOLUTIONS.values()]
    for torso in (*convolutional, mlp_torso((1, 40, 40), (8,), 255.0)):
        features = torso(images)
        assert features.shape == (2, 3, 8)
        torch.testing.assert_close(features[1, 2], torso(images[1, 2]))
    assert mlp_torso((2, 3), ())(torch.ones(5, 4, 2, 3)).shape == (5, 4, 6)


def test_images_are_scaled_to_the_unit_interval():
    torso = mlp_torso((1, 1, 2), (), 255.0)
    assert torso(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_the_first_policy_is_nearly_uniform(kind):
    torch.manual_seed(0)
    config = ModelConfig(core=kind.__name__.lower(), hidden_size=16)
    model = build_model(config, EnvSpec((3,), torch.float32, num_actions=3))
    inputs = _inputs(4, 8, torch.Generator().manual_seed(0))
    logits, _, _ = model.unroll(*inputs, model.core.initial_state(8))
    torch.testing.assert_close(logits.softmax(-1), torch.full_like(logits, 1 / 3), rtol=0, atol=0.02)
