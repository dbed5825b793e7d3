"""The auxiliary task: later synthetic gradients as targets, and a loss that provably teaches the core."""

import pytest
import torch
from core_cases import DOUBLE, D, make_core, random_state
from torch import nn

import dni_rl

T, W, B = 3, 3, 2
every_core = pytest.mark.parametrize("name", ["LSTM", "GRU", "nn.LSTM, 2 layers", "2 timescales"])


def windows(x):
    """[W * T, B, ...] -> [T, W * B, ...], by window, then sequence."""
    return x.unflatten(0, (W, T)).transpose(0, 1).flatten(1, 2)


def problem(name="LSTM", context_size=0):
    """A sequence of W windows, unrolled as a whole and side by side."""
    core = make_core(name)
    critic = dni_rl.GradientCritic(state_sizes=core.state_sizes, context_size=context_size, gradient_discount=0.9)
    for p in critic.double().parameters():
        nn.init.normal_(p)
    inputs = torch.randn(W * T, B, D, dtype=DOUBLE)
    first = torch.zeros(W * T, B, dtype=torch.bool)
    first[4, 1] = first[6, 0] = True
    state, states = random_state(core, B), []
    with torch.no_grad():
        for t in range(W * T):  # the states after each step, before any reset
            states.append(state)
            state = core(inputs[t], tuple(s.masked_fill(first[t].unsqueeze(-1), 0.0) for s in state))[1]
        states.append(state)
    starts = dni_rl.cut(tuple(torch.cat(parts) for parts in zip(*states[:-1:T], strict=True)))
    outputs, end = core.unroll(windows(inputs), starts, windows(first))
    alive = torch.stack([~first[T], ~first[2 * T], torch.ones(B, dtype=torch.bool)]).flatten()
    return core, critic, outputs, starts, end, alive, states, first


@every_core
def test_targets_are_the_synthetic_gradients_of_states_one_window_later(name):
    _, critic, _, _, end, alive, states, first = problem(name)
    targets, valid = dni_rl.later_synthetic_gradients(critic, end, W, alive)
    expected_valid = torch.zeros(W * T, B, dtype=torch.bool)
    for t in range(W * T):
        for b in range(B):
            later = t + 1 + T
            if later > W * T or first[t + 1 : later, b].any():
                continue
            ends = later < W * T and bool(first[later, b])
            expected_valid[t, b] = True
            expected = critic.synthetic_gradient(tuple(s[b : b + 1] for s in states[later]))
            column = t // T * B + b
            for target, g in zip(targets, expected, strict=True):
                torch.testing.assert_close(target[t % T, column], 0.0 * g[0] if ends else g[0])
    assert torch.equal(valid, windows(expected_valid))
    assert valid.any() and not any(g.requires_grad for g in targets)


def test_a_state_without_a_future_inside_the_later_window_is_asked_for_nothing():
    """As `dni_rl.backward` takes it: where steps are left between two episodes, critics learn nothing there."""
    _, critic, _, _, end, alive, _, _ = problem()
    table = torch.cat([end.history.valid, alive.unsqueeze(0)])  # [T + 1, W * B]
    expected, valid = dni_rl.later_synthetic_gradients(critic, end, W, alive)
    same, _ = dni_rl.later_synthetic_gradients(critic, end, W, table)
    torch.testing.assert_close(same, expected, rtol=0, atol=0)
    t, b = 0, 0
    assert valid[t, b] and expected[0][t, b].any()
    table[t + 1, B + b] = False  # the state that this target is of
    found, still_valid = dni_rl.later_synthetic_gradients(critic, end, W, table)
    assert torch.equal(still_valid, valid)
    for g, e in zip(found, expected, strict=True):
        e[t, b] = 0.0
        torch.testing.assert_close(g, e, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"alive: expected \[B\]"):
        dni_rl.later_synthetic_gradients(critic, end, W, table[:-1])


def test_context_belongs_to_the_later_state():
    _, critic, _, _, end, _, states, _ = problem(context_size=2)
    context = torch.randn(W * T + 1, B, 2, dtype=DOUBLE)
    table = torch.cat([windows(context[:-1]), context[T::T].flatten(0, 1).unsqueeze(0)])
    targets, _ = dni_rl.later_synthetic_gradients(critic, end, W, None, table)
    for t in (0, 2):  # of the first window: the targets lie within the second and at its end
        later = t + 1 + T
        expected = critic.synthetic_gradient(tuple(s[:1] for s in states[later]), context[later, :1])
        for target, g in zip(targets, expected, strict=True):
            torch.testing.assert_close(target[t, 0], g[0])


@every_core
def test_the_task_provably_produces_gradients_in_core_and_head_and_none_in_the_critic(name):
    core, critic, outputs, starts, end, alive, _, _ = problem(name)
    auxiliary = dni_rl.AuxiliaryTask(output_size=core.output_size, state_sizes=core.state_sizes, cost=0.5).double()
    nn.init.normal_(auxiliary.head[-1].weight)
    targets, valid = dni_rl.later_synthetic_gradients(critic, end, W, alive)
    losses = auxiliary(outputs, targets, valid)
    assert losses.shape == (T, W * B) and not losses[~valid].any() and losses[valid].all()
    losses.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (*core.parameters(), *auxiliary.parameters()))
    assert all(p.grad is None for p in critic.parameters())
    assert any(s.grad.any() for s in starts)


def test_the_loss_matches_the_definition_and_its_gradient():
    torch.manual_seed(0)
    auxiliary = dni_rl.AuxiliaryTask(output_size=4, state_sizes=(3, 2), hidden_sizes=(3,), cost=0.5).double()
    nn.init.normal_(auxiliary.head[-1].weight)
    outputs = torch.randn(2, 3, 4, dtype=DOUBLE, requires_grad=True)
    target = (torch.randn(2, 3, 3, dtype=DOUBLE), torch.randn(2, 3, 2, dtype=DOUBLE))
    valid = torch.tensor([[True, False, True], [True, True, True]])
    goal = torch.cat(target, -1)
    rms = goal[valid].square().mean().sqrt()
    losses = auxiliary(outputs, target, valid)
    torch.testing.assert_close(auxiliary.target_rms, rms)
    for t in range(2):
        for b in range(3):
            error = auxiliary.head(outputs[t, b]) - goal[t, b] / rms
            expected = 0.5 * error.square().mean() if valid[t, b] else torch.zeros((), dtype=DOUBLE)
            torch.testing.assert_close(losses[t, b], expected)
    assert torch.autograd.gradcheck(lambda y: auxiliary(y, target, valid), outputs)


def test_neither_losses_nor_learning_depend_on_the_unit_of_the_targets():
    found = []
    for unit in (1.0, 1e-6):
        torch.manual_seed(0)
        auxiliary = dni_rl.AuxiliaryTask(output_size=4, state_sizes=(3,))
        optimizer = torch.optim.Adam(auxiliary.parameters(), 1e-2)
        outputs = torch.randn(50, 2, 4)
        targets = unit * (outputs @ torch.randn(4, 3))
        for _ in range(400):
            losses = auxiliary(outputs, (targets,))
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        found.append(losses)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)
    assert found[1].mean() < 1e-3 * auxiliary.cost


def test_it_starts_at_zero_and_teaches_the_core_from_its_second_update():
    core, critic, _, _, _, _, _, _ = problem()
    auxiliary = dni_rl.AuxiliaryTask(output_size=core.output_size, state_sizes=core.state_sizes).double()
    optimizer = torch.optim.SGD([*core.parameters(), *auxiliary.parameters()], 0.1)
    taught = []
    for _ in range(2):
        _, _, _, _, _, alive, states, first = problem()
        inputs = torch.randn(W * T, B, D, dtype=DOUBLE)
        start = dni_rl.cut(tuple(torch.cat(parts) for parts in zip(*states[:-1:T], strict=True)))
        outputs, end = core.unroll(windows(inputs), start, windows(first))
        losses = auxiliary(outputs, *dni_rl.later_synthetic_gradients(critic, end, W, alive))
        optimizer.zero_grad()
        dni_rl.backward(losses, start=start, end=end)
        taught.append(any(p.grad.any() for p in core.parameters()))
        assert any(p.grad.any() for p in auxiliary.parameters())
        optimizer.step()
    assert taught == [False, True]


def test_targets_of_zero_leave_losses_and_scale_alone():
    auxiliary = dni_rl.AuxiliaryTask(output_size=4, state_sizes=(3,))
    losses = auxiliary(torch.randn(2, 3, 4), (torch.zeros(2, 3, 3),))
    assert not losses.any() and auxiliary.target_rms == 1.0
    auxiliary(torch.randn(2, 3, 4), (torch.full((2, 3, 3), torch.inf),))
    assert auxiliary.target_rms == 1.0


def test_errors():
    core, critic, outputs, _, end, _, _, _ = problem()
    with pytest.raises(ValueError, match="num_windows: found 1 for a batch of 6, allowed a divisor of it from 2 on"):
        dni_rl.later_synthetic_gradients(critic, end, 1)
    with pytest.raises(ValueError, match="num_windows: found 4 for a batch of 6"):
        dni_rl.later_synthetic_gradients(critic, end, 4)
    with pytest.raises(ValueError, match="end: found a plain tuple, without the window's history"):
        dni_rl.later_synthetic_gradients(critic, tuple(end), 2)
    auxiliary = dni_rl.AuxiliaryTask(output_size=4, state_sizes=core.state_sizes).double()
    with pytest.raises(ValueError, match=r"target: expected shapes \[\(3, 6, 4\), \(3, 6, 4\)\], got \[\(3, 6, 4\)\]"):
        auxiliary(outputs, (torch.zeros(3, 6, 4),))
    with pytest.raises(ValueError, match=r"valid: expected \[T, B\] = \(3, 6\), got \(6,\)"):
        auxiliary(outputs, (torch.zeros(3, 6, 4),) * 2, torch.ones(6, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"auxiliary task: found torch.bfloat16, allowed torch.float32 or torch.float64"
    ):
        dni_rl.AuxiliaryTask(output_size=4, state_sizes=(4, 4)).bfloat16()(outputs, (torch.zeros(3, 6, 4),) * 2)
    with pytest.raises(ValueError, match=r"cost: found -1\.0, allowed 0 or more"):
        dni_rl.AuxiliaryTask(output_size=4, state_sizes=(4,), cost=-1.0)
    with pytest.raises(ValueError, match=r"statistics_decay: found 1\.0"):
        dni_rl.AuxiliaryTask(output_size=4, state_sizes=(4,), statistics_decay=1.0)
    with pytest.raises(ValueError, match="output_size, state_sizes, hidden_sizes: expected positive integers"):
        dni_rl.AuxiliaryTask(output_size=0, state_sizes=(4,))
    with pytest.raises(ValueError, match="expected positive integers and at least one state tensor, got 4, 5, "):
        dni_rl.AuxiliaryTask(output_size=4, state_sizes=5)
