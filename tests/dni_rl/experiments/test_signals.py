"""Signals: each is its definition, and backpropagation where it must be."""

import pytest
import torch
from torch import nn

from dni_rl import GradientCritic
from dni_rl.experiments import signals

B, D, H = 6, 5, 4


@pytest.fixture
def x():
    return torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def y():
    return torch.randn(B, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def net(num_hidden=3, num_outputs=1, normalize=False):
    torch.manual_seed(2)
    return [layer.double() for layer in signals.dense_layers(D, H, num_hidden, num_outputs, normalize=normalize)]


def squares(y):
    return lambda outputs: (outputs - y).square().sum(1)


def by_autograd(layers, x, y):
    """Gradients of the mean loss, and of every example's own loss at each hidden activation."""
    model = nn.Sequential(*layers)
    hidden, h = [], x
    for layer in layers:
        h = layer(h)
        hidden.append(h)
    losses = squares(y)(h)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(losses.mean(), parameters, retain_graph=True)
    return dict(zip(parameters, gradients, strict=True)), torch.autograd.grad(losses.sum(), hidden[:-1])


def assert_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_backprop_is_autograd(x, normalize, num_outputs):
    layers = net(num_outputs=num_outputs, normalize=normalize)
    y = torch.randn(B, num_outputs, dtype=torch.float64)
    found = signals.signal_pass(layers, signals.Backprop(), x, squares(y))
    gradients, deltas = by_autograd(layers, x, y)
    assert_gradients(found.gradients, gradients)
    for delta, true in zip(found.deltas, deltas, strict=True):
        torch.testing.assert_close(delta, true, rtol=1e-12, atol=1e-13)
    for layer in layers:
        assert all(p.grad is None for p in layer.parameters())
    found.add_gradients()
    found.add_gradients()
    torch.testing.assert_close(layers[0].linear.weight.grad, 2 * gradients[layers[0].linear.weight])


class Given(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def synthetic_gradient(self, state, context=None):
        return (self.answer,)

    def fit(self, state, target, context=None):
        raise AssertionError


@pytest.mark.parametrize("where", [(1,), (0, 1, 2), (0,), (2,)])
def test_with_oracle_critics_sg_and_sg_prop_are_backprop(x, y, where):
    layers = net(normalize=True)
    gradients, deltas = by_autograd(layers, x, y)
    signal = signals.SyntheticGradients([Given(deltas[i]) if i in where else None for i in range(3)])
    assert_gradients(signals.signal_pass(layers, signal, x, squares(y)).gradients, gradients)


def test_what_an_interface_of_sg_prop_says_is_propagated_below_it(x, y):
    layers = net()
    said = torch.randn(B, H, dtype=torch.float64)
    signal = signals.SyntheticGradients([None, Given(said), None])
    found = signals.signal_pass(layers, signal, x, squares(y))
    lower = layers[1](layers[0](x))
    weight = layers[0].linear.weight
    torch.testing.assert_close(found.gradients[weight], torch.autograd.grad(lower, weight, said)[0] / B)
    gradients, _ = by_autograd(layers, x, y)  # above it, nothing changes
    torch.testing.assert_close(found.gradients[layers[2].linear.weight], gradients[layers[2].linear.weight])


def test_critics_start_at_zero_learn_what_arrives_and_bootstrap_from_each_other(x, y):
    layers = [signals.Layer(a, b, rectify=False).double() for a, b in ((D, H), (H, H), (H, H), (H, 1))]
    signal = signals.make_signal("sg", layers, context_size=1).double()  # linear, which here can be exact
    found = signals.signal_pass(layers, signal, x, squares(y), y)
    assert all((delta == 0).all() for delta in found.deltas)
    _, deltas = by_autograd(layers, x, y)
    torch.testing.assert_close(found.junctions[2].pulled_back, deltas[2])  # from the loss
    assert all((junction.pulled_back == 0).all() for junction in found.junctions[:2])  # from critics that say 0
    optimizer = torch.optim.Adam(signal.parameters(), 0.03)
    for _ in range(300):
        found = signals.signal_pass(layers, signal, x, squares(y), y)
        optimizer.zero_grad()
        for i, junction in enumerate(found.junctions):
            signal.fit(i, junction).loss.backward()
        optimizer.step()
    for delta, true in zip(found.deltas, deltas, strict=True):
        assert (delta - true).norm() < 0.1 * true.norm()
    assert {name.split(".")[1] for name, _ in signal.named_parameters()} == {"0", "1", "2"}
    assert all(p.grad is None for layer in layers for p in layer.parameters())


def test_sg_prop_has_its_one_critic_in_the_middle():
    signal = signals.make_signal("sg_prop", net(num_hidden=4))
    assert {name.split(".")[1] for name, _ in signal.named_parameters()} == {"2"}
    layers = [*[signals.Layer(2, 2) for _ in range(20)], signals.Layer(2, 1, rectify=False)]
    assert list(signals.make_signal("sg_prop", layers).critics) == ["10"]  # the paper's: between layers 11 and 12
    assert isinstance(signals.make_signal("sg_prop", layers).critics["10"], GradientCritic)


def test_feedback_alignment_with_the_weights_themselves_is_backprop(x, y):
    layers = net(num_outputs=3, normalize=True)
    y = y.expand(-1, 3)
    signal = signals.make_signal("fa", layers)
    wanted, _ = by_autograd(layers, x, y)
    other = signals.signal_pass(layers, signal, x, squares(y)).gradients
    assert not torch.allclose(other[layers[0].linear.weight], wanted[layers[0].linear.weight])
    for i, layer in enumerate(layers[1:]):
        signal.get_buffer(f"feedback_{i}").copy_(layer.linear.weight.detach())
    assert_gradients(signals.signal_pass(layers, signal, x, squares(y)).gradients, wanted)


def test_feedback_alignment_by_hand(x, y):
    layers = net(num_hidden=2)
    signal = signals.make_signal("fa", layers, seed=3)
    found = signals.signal_pass(layers, signal, x, squares(y))
    feedback = dict(signal.named_buffers())
    h = layers[0](x)
    error = 2 * (nn.Sequential(*layers)(x) - y)
    upper = error @ feedback["feedback_1"]
    torch.testing.assert_close(found.deltas[1], upper)
    torch.testing.assert_close(found.deltas[0], (upper * (layers[1](h) > 0)) @ feedback["feedback_0"])


def test_direct_feedback_alignment_with_products_of_weights_is_backprop_in_a_linear_net(x):
    torch.manual_seed(4)
    sizes = ((D, H), (H, 3), (3, 2))
    layers = [signals.Layer(a, b, rectify=False).double() for a, b in sizes]
    y = torch.randn(B, 2, dtype=torch.float64)
    signal = signals.make_signal("dfa", layers)
    last, middle = layers[2].linear.weight.detach(), layers[1].linear.weight.detach()
    signal.get_buffer("feedback_0").copy_(last @ middle)
    signal.get_buffer("feedback_1").copy_(last)
    assert_gradients(signals.signal_pass(layers, signal, x, squares(y)).gradients, by_autograd(layers, x, y)[0])


def test_direct_feedback_alignment_sends_the_error_everywhere(x, y):
    layers = net()
    signal = signals.make_signal("dfa", layers, seed=3)
    found = signals.signal_pass(layers, signal, x, squares(y))
    error = (2 * (nn.Sequential(*layers)(x) - y)).detach()
    for i, delta in enumerate(found.deltas):
        torch.testing.assert_close(delta, error @ signal.get_buffer(f"feedback_{i}"))


def test_kickback_is_backprop_with_one_hidden_layer_and_the_error_times_the_influence_with_more(x, y):
    shallow = net(num_hidden=1)
    found = signals.signal_pass(shallow, signals.make_signal("kickback", shallow), x, squares(y))
    assert_gradients(found.gradients, by_autograd(shallow, x, y)[0])
    layers = net(num_hidden=2)
    found = signals.signal_pass(layers, signals.make_signal("kickback", layers), x, squares(y))
    error = 2 * (nn.Sequential(*layers)(x) - y)
    active = layers[1](layers[0](x)) > 0
    for row in range(B):
        for j in range(H):
            influence = sum(layers[1].linear.weight[k, j] for k in range(H) if active[row, k])
            torch.testing.assert_close(found.deltas[0][row, j], error[row, 0] * influence)


def test_random_feedback_depends_on_the_seed_alone():
    layers = net()
    for name in ("fa", "dfa"):
        first, second, other = (list(signals.make_signal(name, layers, seed=seed).buffers()) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_random_feedback_has_the_scale_of_the_units_below():
    layers = [signals.Layer(9, 400), signals.Layer(400, 100), signals.Layer(100, 40, rectify=False)]
    for name in ("fa", "dfa"):
        signal = signals.make_signal(name, layers)
        assert [buffer.std().item() for buffer in signal.buffers()] == pytest.approx([0.05, 0.1], rel=0.05)


def test_critics_have_the_hidden_layers_that_are_asked_for():
    for name in ("sg", "sg_prop"):
        signal = signals.make_signal(name, net(), critic_hidden_sizes=(7,))
        critics = list(signal.critics.values())
        assert critics and all(any(7 in p.shape for p in critic.parameters()) for critic in critics)


def test_what_makes_no_sense_is_refused(x, y):
    with pytest.raises(ValueError, match="signal: found 'magic', allowed backprop, sg"):
        signals.make_signal("magic", net())
    with pytest.raises(ValueError, match="kickback: found 3 outputs, allowed 1"):
        signals.make_signal("kickback", net(num_outputs=3))
    with pytest.raises(ValueError, match=r"losses_of: expected one loss per example \(6,\), got \(\)"):
        signals.signal_pass(net(), signals.Backprop(), x, lambda outputs: (outputs - y).square().mean())
