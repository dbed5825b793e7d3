import io

import pytest
import torch

import dni_rl
from dni_rl import GradientCritic
from dni_rl.cores.base import unroll_stepwise
from dni_rl.cores.rtrl import ElementwiseLSTM, Sensitivity

T, B, D, H = 20, 3, 2, 4


@pytest.fixture
def core():
    torch.manual_seed(0)
    return ElementwiseLSTM(D, H).double()


@pytest.fixture
def inputs():
    return torch.randn(T, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def first():
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0], first[6, 1], first[10, 1], first[15, 2] = True, True, True, True
    return first


def losses_of(outputs):
    return (outputs - 0.3).square().sum(-1)


def gradients_of(core):
    gradients = torch.cat([p.grad.flatten() for p in core.parameters()])
    core.zero_grad()
    return gradients


def full_bptt(core, inputs, first):
    outputs, _ = core.unroll(inputs, core.initial_state(B), first)
    losses_of(outputs).sum().backward()
    return gradients_of(core)


def train(core, inputs, first, length, exact=True, critic=None):
    state, sensitivity = core.initial_state(B), core.initial_sensitivity(B)
    for t in range(0, T, length):
        state = dni_rl.cut(state)
        start = core.attach(state, sensitivity) if exact else state
        x, starts = inputs[t : t + length], first[t : t + length]
        outputs, next_state = core.unroll(x, start, starts)
        dni_rl.backward(losses_of(outputs), start=state, end=next_state, critic=critic, weight=1.0)
        sensitivity = core.advance(sensitivity, x, next_state)
        state = next_state
    return gradients_of(core)


def test_matches_a_diagonal_lstm_cell(core, inputs):
    cell = torch.nn.LSTMCell(D, H).double()
    with torch.no_grad():
        cell.weight_ih.copy_(core.weight_ih)
        cell.weight_hh.copy_(torch.cat([torch.diag(v) for v in core.weight_hh.view(4, H)]))
        cell.bias_ih.copy_(core.bias)
        cell.bias_hh.zero_()
    state = (torch.randn(B, H).double(), torch.randn(B, H).double())
    output, next_state = core(inputs[0], state)
    h, c = cell(inputs[0], state)
    torch.testing.assert_close((output, *next_state), (h, h, c))


def test_unroll_equals_steps(core, inputs, first):
    fast, _ = core.unroll(inputs, core.initial_state(B), first)
    slow, _ = unroll_stepwise(core, inputs, core.initial_state(B), first)
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("length", [1, 4, 7, 20])
def test_windows_give_the_gradient_of_full_bptt(core, inputs, first, length):
    torch.testing.assert_close(
        train(core, inputs, first, length), full_bptt(core, inputs, first), rtol=1e-10, atol=1e-10
    )


def test_without_it_windows_are_truncated(core, inputs, first):
    """The test above is no tautology: without the sensitivity the gradient differs."""
    plain = train(core, inputs, first, 4, exact=False)
    assert (plain - full_bptt(core, inputs, first)).norm() > 1e-3 * plain.norm()


def test_sensitivity_is_the_derivative_of_the_state(core, inputs, first):
    """Unit by unit and sequence by sequence, by autograd through the whole past; other units' parameters have none."""
    _, end = core.unroll(inputs, core.initial_state(B), first)
    found = core.advance(core.initial_sensitivity(B), inputs, end)
    for part, sensitivity in zip(end, (found.h, found.c), strict=True):
        for b in range(B):
            for u in range(H):
                parameters = (core.weight_ih, core.weight_hh, core.bias)
                w, v, bias = torch.autograd.grad(part[b, u], parameters, retain_graph=True)
                expected = torch.cat([w.view(4, H, D), v.view(4, H, 1), bias.view(4, H, 1)], -1)
                torch.testing.assert_close(sensitivity[b, :, u], expected[:, u], rtol=1e-10, atol=1e-14)
                expected[:, u] = 0
                assert expected.eq(0).all()


def test_reset_at_an_episode_start(core, inputs, first):
    """What happened before an episode leaves no trace in its sensitivity."""
    _, end = core.unroll(inputs[:10], core.initial_state(B), first[:10])
    before = core.advance(core.initial_sensitivity(B), inputs[:10], end)
    _, end = core.unroll(inputs[10:], end, first[10:])
    carried = core.advance(before, inputs[10:], end)
    fresh = core.advance(core.initial_sensitivity(B), inputs[10:], end)
    assert carried.h[1].equal(fresh.h[1]) and carried.c[2].equal(fresh.c[2])  # reset at 10 and 15
    assert not carried.h[0].equal(fresh.h[0])


def test_what_was_not_finite_is_forgotten_with_its_episode(core, inputs, first):
    """One observation breaks one sequence; the update is thrown away, and after a reset nothing is left of it."""
    results = []
    for broken in (True, False):
        x = inputs.clone()
        x[5 if broken else [], 1] = (
            torch.nan
        )  # a step later its episode starts anew, inside the first window or right behind it
        for length in (6, 7):
            state, sensitivity = core.initial_state(B), core.initial_sensitivity(B)
            for window in (slice(0, length), slice(length, T)):
                state = dni_rl.cut(state)
                outputs, end = core.unroll(x[window], core.attach(state, sensitivity), first[window])
                core.zero_grad()
                dni_rl.backward(losses_of(outputs), start=state, end=end)
                sensitivity = core.advance(sensitivity, x[window], end)
                state = end
            results.append((gradients_of(core), sensitivity.h, sensitivity.c))
    assert all(values.isfinite().all() for values in results[0] + results[1])
    torch.testing.assert_close(results[:2], results[2:])


def test_a_sensitivity_survives_a_file(core, inputs, first):
    _, end = core.unroll(inputs, core.initial_state(B), first)
    sensitivity, file = core.advance(core.initial_sensitivity(B), inputs, end), io.BytesIO()
    torch.save({"sensitivity": sensitivity}, file)
    file.seek(0)
    loaded = torch.load(file)["sensitivity"]  # as it is called by default: weights_only=True
    assert isinstance(loaded, Sensitivity) and loaded.h.equal(sensitivity.h) and loaded.c.equal(sensitivity.c)


@pytest.mark.parametrize("fused", [False, True])  # whose steps a tensor's version does not count
def test_a_window_is_left_with_the_parameters_that_it_was_unrolled_with(core, inputs, first, fused):
    optimizer = torch.optim.Adam(core.parameters(), lr=0.1, fused=fused)
    outputs, end = core.unroll(inputs, core.initial_state(B), first)
    expected = core.advance(core.initial_sensitivity(B), inputs, end)
    losses_of(outputs).sum().backward()
    optimizer.step()
    found = core.advance(core.initial_sensitivity(B), inputs, end)
    assert found.h.equal(expected.h) and found.c.equal(expected.c)
    _, end = core.unroll(inputs, core.initial_state(B), first)
    assert not core.advance(core.initial_sensitivity(B), inputs, end).c.equal(expected.c)


def test_inputs_receive_the_gradient_of_the_window(core, inputs, first):
    _, end = core.unroll(inputs[:10], core.initial_state(B), first[:10])
    sensitivity = core.advance(core.initial_sensitivity(B), inputs[:10], end)
    found = []
    for attach in (False, True):
        x, state = inputs[10:].clone().requires_grad_(), dni_rl.cut(end)
        outputs, _ = core.unroll(x, core.attach(state, sensitivity) if attach else state, first[10:])
        losses_of(outputs).sum().backward()
        found.append((x.grad, *(s.grad for s in state)))
    torch.testing.assert_close(found[0], found[1])


def test_parameters_only_gain(core, inputs, first):
    """Gradients are added to what was there, and a frozen parameter is left alone."""
    once = train(core, inputs, first, 4)
    for p in core.parameters():
        p.grad = torch.ones_like(p)
    torch.testing.assert_close(train(core, inputs, first, 4), once + 1)
    core.bias.requires_grad_(False)
    state, sensitivity = core.initial_state(B), core.initial_sensitivity(B)
    outputs, _ = core.unroll(inputs, core.attach(dni_rl.cut(state), sensitivity), first)
    losses_of(outputs).sum().backward()
    assert core.bias.grad is None


def test_it_is_a_core_for_critics(core, inputs, first):
    critic = GradientCritic(state_sizes=core.state_sizes).double()
    train(core, inputs, first, 4, exact=False, critic=critic)
    assert critic.net[-1].weight.grad.ne(0).any()


@pytest.mark.parametrize("exact", [True, False])
def test_online_training_learns_to_remember(core, exact):
    """Window 1, an optimiser's step at each, a cue to report five steps later, to which the core is deaf at first:
    only RTRL
    sends credit back to the step that saw it."""
    with torch.no_grad():
        core.weight_ih[:, 0] = 0.0
    optimizer = torch.optim.Adam(core.parameters(), lr=0.02)
    state, sensitivity, losses = core.initial_state(B), core.initial_sensitivity(B), []
    x = torch.zeros(1, B, D, dtype=torch.float64)
    for t in range(360):
        starts = torch.full((1, B), t % 6 == 0)
        x[0, :, 0] = torch.tensor([-1.0, 0.0, 1.0]) * (t % 6 == 0)
        state = dni_rl.cut(state)
        outputs, end = core.unroll(x, core.attach(state, sensitivity) if exact else state, starts)
        loss = (outputs[..., 0] - 0.5 * torch.tensor([-1.0, 0.0, 1.0])).square() * (t % 6 == 5)
        optimizer.zero_grad()
        dni_rl.backward(loss, start=state, end=end)
        sensitivity = core.advance(sensitivity, x, end)
        optimizer.step()
        state = end
        losses.append(loss.sum().item())
    ratio = sum(losses[-24:]) / sum(losses[:24])
    assert ratio < 0.2 if exact else ratio > 0.5 and core.weight_ih[:, 0].eq(0).all()


def test_chrono_initialisation():
    core = ElementwiseLSTM(D, 64, chrono_max=100.0)
    b_i, b_f = core.bias.view(4, 64)[:2]
    assert b_i.equal(-b_f) and b_f.min() >= 0 and b_f.max() <= torch.tensor(99.0).log()


def test_errors(core, inputs):
    with pytest.raises(ValueError, match="hidden_size: expected positive"):
        ElementwiseLSTM(D, 0)
    with pytest.raises(ValueError, match="chrono_max: found 2"):
        ElementwiseLSTM(D, H, chrono_max=2)
    with pytest.raises(ValueError, match=rf"state: expected {B} sequences as in x, got 1; use initial_state\({B}\)"):
        core(inputs[0], core.initial_state(1))
    with pytest.raises(ValueError, match="sensitivity: found NoneType, allowed what `advance` returned"):
        core.attach(core.initial_state(B), None)
    with pytest.raises(ValueError, match="sensitivity: expected"):
        core.attach(core.initial_state(B), core.initial_sensitivity(B + 1))
    with pytest.raises(ValueError, match="end: expected the state that `unroll` returned"):
        core.advance(core.initial_sensitivity(B), inputs, core.initial_state(B))
    assert isinstance(core.initial_sensitivity(B), Sensitivity)
