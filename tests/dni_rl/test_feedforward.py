"""Interfaces between layers, in any graph, and layers that update themselves."""

import copy
import io
import threading

import pytest
import torch
from core_cases import DOUBLE
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks as step_hooks
from torch.utils.checkpoint import checkpoint

import dni_rl

B, D, H, Z, Y = 6, 5, 4, 3, 2


class Oracle(nn.Module):
    """Answers with the gradients it was given, one for each call, and remembers what it is asked to learn."""

    def __init__(self, *gradients):
        super().__init__()
        self.gradients, self.calls = list(gradients), 0
        self.states, self.targets = [], []

    def synthetic_gradient(self, state, context=None):
        self.calls += 1
        return (self.gradients[(self.calls - 1) % len(self.gradients)],)

    def fit(self, state, target, context=None):
        self.states.append(state[0])
        self.targets.append(target[0])
        zero = target[0].new_zeros(())
        return dni_rl.CriticFit(*[zero] * 6)


def make_critic(trained=True, size=H, seed=7, **settings):
    torch.manual_seed(seed)
    critic = dni_rl.GradientCritic(state_sizes=(size,), **{"normalize_targets": False, **settings}).double()
    if trained:
        for p in critic.parameters():
            nn.init.normal_(p)
    return critic


def linear(inputs, outputs, seed):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, dtype=DOUBLE)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Chain(nn.Module):
    """Three layers; what `cross[i]` is stands between them."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([linear(D, H, 1), linear(H, H, 2), linear(H, Y, 3)])

    def forward(self, x, cross):
        h = cross[0](torch.tanh(self.parts[0](x)))
        h = cross[1](torch.tanh(self.parts[1](h)))
        return self.parts[2](h)


class Branches(Chain):
    """Two consumers of one h, one of which is cut again."""

    def forward(self, x, cross):
        h = cross[0](torch.tanh(self.parts[0](x)))
        return self.parts[2](cross[1](torch.tanh(self.parts[1](h)))) + self.parts[2](h).sin()


class Skip(Chain):
    """Skip connections: over a layer from behind the cut, and around both cuts."""

    def forward(self, x, cross):
        uncut = torch.tanh(self.parts[0](x))
        h = cross[0](uncut)
        h = cross[1](h + torch.tanh(self.parts[1](h)))
        return self.parts[2](h) + 0.3 * self.parts[2](uncut).square()


class Split(Chain):
    """Two interfaces on one h: both answers go to the same part."""

    def forward(self, x, cross):
        h = torch.tanh(self.parts[0](x))
        return self.parts[2](torch.tanh(self.parts[1](cross[0](h)))) + self.parts[2](cross[1](h)).sin()


class Shared(Chain):
    """One interface crossed twice in a pass."""

    def forward(self, x, cross):
        h = cross[0](torch.tanh(self.parts[0](x)))
        h = cross[0](torch.tanh(self.parts[1](h)))
        return self.parts[2](cross[1](h.sin()))


GRAPHS = [Chain, Branches, Skip, Split, Shared]
graphs = pytest.mark.parametrize("make_graph", GRAPHS)
WEIGHTS = {"mean": 1.0 / B, "sum": 1.0}
reductions = pytest.mark.parametrize("reduction", WEIGHTS)


def losses_of(output):
    return (output - draw(B, Y, seed=4)[: len(output)]).square().sum(-1)


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


class Watch:
    """The identity, keeping the gradients that plain backpropagation brings, in the order of the calls."""

    def __init__(self):
        self.seen = []

    def __call__(self, h):
        h = h.view_as(h)
        h.retain_grad()
        self.seen.append(h)
        return h


def backpropagation(model, x, reduction="sum"):
    """Gradients of all parameters, and those at each interface in units of one example's loss."""
    model.zero_grad()
    watches = Watch(), Watch()
    getattr(losses_of(model(x, watches)), reduction)().backward()
    found = gradients(model)
    model.zero_grad()
    return found, [[h.grad / WEIGHTS[reduction] for h in watch.seen] for watch in watches]


@graphs
@reductions
def test_with_an_oracle_every_gradient_is_that_of_backpropagation(make_graph, reduction):
    model, x = make_graph(), draw(B, D)
    expected, arriving = backpropagation(model, x, reduction)
    oracles = [Oracle(*gs) for gs in arriving]
    cross = [dni_rl.Interface(oracle) for oracle in oracles]
    with dni_rl.DecoupledPass(weight=WEIGHTS[reduction]):
        getattr(losses_of(model(x, cross)), reduction)().backward()
    assert_same(gradients(model), expected)
    for oracle, gs in zip(oracles, arriving, strict=True):  # and the critics are told the truth, in their own units
        assert_same(oracle.targets, [torch.cat(gs)])


@graphs
@reductions
def test_locked_is_backpropagation_and_critics_learn_the_true_gradient(make_graph, reduction):
    model, x = make_graph(), draw(B, D)
    expected, arriving = backpropagation(model, x, reduction)
    oracles = [Oracle(None), Oracle(None)]
    cross = [dni_rl.Interface(oracle, mode="locked") for oracle in oracles]
    with dni_rl.DecoupledPass(weight=WEIGHTS[reduction]):
        getattr(losses_of(model(x, cross)), reduction)().backward()
    assert_same(gradients(model), expected)
    for oracle, gs in zip(oracles, arriving, strict=True):
        assert oracle.calls == 0
        assert_same(oracle.targets, [torch.cat(gs)])


def test_the_synthetic_gradient_is_backpropagated_below_before_the_forward_pass_ends():
    model, x, critic = Chain(), draw(B, D), make_critic()
    interface = dni_rl.Interface(critic)
    with dni_rl.DecoupledPass(weight=0.25):
        h = torch.tanh(model.parts[0](x))
        sent_on = interface(h)
        expected = torch.autograd.grad(h, list(model.parts[0].parameters()), 0.25 * critic((h.detach(),))[0])
        assert_same(gradients(model.parts[0]), list(expected))
        assert sent_on.is_leaf and sent_on.requires_grad and torch.equal(sent_on, h)
        sent_on.sum().backward()
    assert_same(gradients(model.parts[0]), list(expected))  # what came later stopped at the leaf


def test_the_critic_regresses_on_what_arrived_at_the_leaf():
    model, x, critic = Chain(), draw(B, D), make_critic()
    same, interface = copy.deepcopy(critic), dni_rl.Interface(critic)
    with dni_rl.DecoupledPass(weight=1.0) as decoupled:
        h = torch.tanh(model.parts[0](x))
        (interface(h) * draw(B, H, seed=5)).sum().backward()
    fit = same.fit((h.detach(),), (draw(B, H, seed=5),))
    fit.loss.backward()
    assert_same(gradients(critic), gradients(same))
    assert_same(decoupled.fits[interface].loss, fit.loss)


def test_the_target_bootstraps_from_the_next_interface():
    model, x, critic = Chain(), draw(B, D), make_critic()
    oracle = Oracle(torch.zeros(B, H, dtype=DOUBLE))
    cross = [dni_rl.Interface(oracle), dni_rl.Interface(critic)]
    with dni_rl.DecoupledPass(weight=0.5):
        losses_of(model(x, cross)).sum().backward()
    h = torch.tanh(model.parts[0](x)).detach().requires_grad_()
    above = torch.tanh(model.parts[1](h))
    (expected,) = torch.autograd.grad(above, h, critic((above.detach(),))[0])
    assert_same(oracle.targets, [expected])


def test_a_new_critic_sends_exactly_zero_below():
    model, x = Chain(), draw(B, D)
    critics = [make_critic(trained=False, hidden_sizes=(8,)), make_critic(trained=False, normalize_targets=True)]
    cross = [dni_rl.Interface(critic) for critic in critics]
    with dni_rl.DecoupledPass():
        losses_of(model(x, cross)).mean().backward()
    for part in model.parts[:2]:
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in part.parameters())
    assert all(p.grad.norm() > 0 for p in model.parts[2].parameters())


def test_without_a_critic_nothing_is_sent_below():
    model, x = Chain(), draw(B, D)
    cross = [dni_rl.Interface(None), dni_rl.Interface(None)]
    losses_of(model(x, cross)).mean().backward()  # needs no pass
    assert all(p.grad is None for part in model.parts[:2] for p in part.parameters())
    locked = [dni_rl.Interface(None, mode="locked")] * 2
    expected, _ = backpropagation(model, x, "mean")
    losses_of(model(x, locked)).mean().backward()
    assert_same(gradients(model), expected)


@graphs
def test_critic_and_model_do_not_train_each_other(make_graph):
    model, x = make_graph(), draw(B, D)
    critics = [make_critic(seed=1), make_critic(seed=2)]
    cross = [dni_rl.Interface(critic) for critic in critics]
    with dni_rl.DecoupledPass():
        losses_of(model(x, cross)).mean().backward()
        assert all(g is None for critic in critics for g in gradients(critic))
        of_model = gradients(model)
    assert_same(gradients(model), of_model)
    of_critics = [gradients(critic) for critic in critics]
    assert all(g.norm() > 0 for gs in of_critics for g in gs)

    frozen = [dni_rl.Interface(critic.requires_grad_(False)) for critic in critics]
    model.zero_grad()
    with dni_rl.DecoupledPass():
        losses_of(model(x, frozen)).mean().backward()
    assert_same(gradients(model), of_model)  # whether the critics learn or not


def test_a_model_does_not_list_the_critics_of_its_interfaces():
    shared, other = make_critic(), make_critic(seed=8)
    model = nn.Sequential(
        linear(D, H, 1), dni_rl.Interface(shared), linear(H, H, 2), dni_rl.Interface(other), dni_rl.Interface(shared)
    )
    assert sum(1 for _ in model.parameters()) == 4 and len(model.state_dict()) == 4
    critics = dni_rl.interface_critics(model)
    assert list(critics) == [shared, other]
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "critics": critics.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin = copy.deepcopy(model)
    for p in [*twin.parameters(), *dni_rl.interface_critics(twin).parameters()]:
        nn.init.zeros_(p)
    assert not torch.equal(next(shared.parameters()), torch.zeros(()))
    twin.load_state_dict(saved["model"])
    dni_rl.interface_critics(twin).load_state_dict(saved["critics"])
    for m in (model, twin):
        with dni_rl.DecoupledPass():
            m(draw(B, D)).sum().backward()
    assert_same(gradients(twin), gradients(model))


@pytest.mark.parametrize("mode", ["decoupled", "locked"])
def test_critic_units_do_not_depend_on_reduction_or_batch_size(mode):
    model, x = Chain(), draw(B, D)
    targets = []
    for reduction, repeats in [("sum", 1), ("mean", 1), ("mean", 3)]:
        oracle = Oracle(torch.zeros(B * repeats, H, dtype=DOUBLE))
        cross = [dni_rl.Interface(None, mode="locked"), dni_rl.Interface(oracle, mode=mode)]
        with dni_rl.DecoupledPass(weight=1.0 if reduction == "sum" else None):
            output = model(x.repeat(repeats, 1), cross)
            losses = (output - draw(B, Y, seed=4).repeat(repeats, 1)).square().sum(-1)
            getattr(losses, reduction)().backward()
        targets.append(oracle.targets[0][:B])
    assert_same(targets[1:], [targets[0]] * 2)


def test_a_gradient_scalers_scale_goes_into_the_weight():
    model, x, oracle = Chain(), draw(B, D), Oracle(draw(B, H, seed=3))
    cross = [dni_rl.Interface(oracle), dni_rl.Interface(None)]
    found = []
    for scale in (1.0, 1024.0):
        model.zero_grad()
        with dni_rl.DecoupledPass(weight=torch.tensor(scale / B)):
            h = cross[0](torch.tanh(model.parts[0](x)))
            (losses_of(model.parts[2](h)).mean() * scale).backward()
        found.append([g / scale for g in gradients(model) if g is not None])
    assert_same(found[1], found[0])
    assert_same(oracle.targets[1], oracle.targets[0])


@pytest.mark.parametrize("mode", ["decoupled", "locked"])
def test_both_sides_leave_with_the_scale_of_a_scaler_and_come_back_without_it(mode):
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu", enabled=False)):
        model, x, critics = Chain(), draw(B, D), [make_critic(seed=s) for s in (7, 8)]
        cross = [dni_rl.Interface(critic, mode) for critic in critics]
        with dni_rl.DecoupledPass(scaler=scaler) as decoupled:
            loss = losses_of(model(x, cross)).mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
        scale = 1024.0 if scaler is not None and scaler.is_enabled() else 1.0
        found.append([[g / scale for g in gradients(m)] for m in (model, *critics)])
        found[-1] += [(fit.loss.detach(), fit.target_norm) for fit in decoupled.fits.values()]
    assert all(g.any() for gs in found[0][:3] for g in gs)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_conditioned_critics_get_the_label_from_the_pass_or_the_call():
    labels, x, layer = F.one_hot(torch.arange(B) % Z, Z), draw(B, D), linear(D, H, 1)
    critic, plain = make_critic(context_size=Z), make_critic()
    model = nn.Sequential(layer, dni_rl.Interface(critic), dni_rl.Interface(plain))

    def sent(labels, explicitly):
        layer.zero_grad(), critic.zero_grad()
        with dni_rl.DecoupledPass(weight=1.0, context=None if explicitly else labels):
            h = model[1](layer(x), labels) if explicitly else model[1](layer(x))
            model[2](h).sum().backward()
        return gradients(layer)

    h = layer(x)
    (prediction,) = critic((h.detach(),), labels)
    expected = torch.autograd.grad(h, list(layer.parameters()), prediction)
    assert_same(sent(labels, True), list(expected))
    assert_same(sent(labels, False), list(expected))
    assert not torch.allclose(sent(labels.flip(0), False)[0], expected[0])
    with pytest.raises(ValueError, match="context: expected"), dni_rl.DecoupledPass():
        model(x)


def test_a_context_that_no_critic_takes_is_refused():
    labels, x, layer = F.one_hot(torch.arange(B) % Z, Z), draw(B, D), linear(D, H, 1)
    plain, none = dni_rl.Interface(make_critic()), dni_rl.Interface(None)
    message = (
        r"context: found one, allowed None where every critic has context_size=0; build critics with context_size=Z"
    )
    with pytest.raises(ValueError, match=message), dni_rl.DecoupledPass(context=labels) as decoupled:
        plain(none(layer(x))).sum().backward()
    assert not decoupled.fits and all(p.grad is None for p in plain.critic.parameters())
    with dni_rl.DecoupledPass(context=labels):  # nobody learns without it
        none(layer(x))
        plain.eval()(layer(x))
    net = make_sequential()
    before = parameters_of(net)
    for context in (labels, labels.argmax(1)):
        with pytest.raises(ValueError, match=message):
            net.update(x, losses_of, context)
    assert_same(parameters_of(net), before)
    make_sequential(critics=[None] * 3).update(x, losses_of, labels)
    make_sequential(critics=[make_critic(), None, make_critic(context_size=Z)]).update(x, losses_of, labels)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_before_or_after_the_pass_is_the_same_and_in_its_middle_an_error(set_to_none):
    x, found = draw(B, D), []
    for before in (True, False):
        model, cross = Chain(), [dni_rl.Interface(make_critic(seed=s)) for s in (1, 2)]
        losses_of(model(x, [lambda h: h] * 2)).mean().backward()  # an update before, with its step left out
        if not before:
            model.zero_grad(set_to_none)
        for _ in range(2):
            if before:
                model.zero_grad(set_to_none)
            with dni_rl.DecoupledPass():
                losses_of(model(x, cross)).mean().backward()
            found.append(gradients(model))
            if not before:
                model.zero_grad(set_to_none)
    assert_same(found[1:], [found[0]] * 3)
    model.zero_grad()
    critic = cross[0].critic
    critic.zero_grad()
    with pytest.raises(RuntimeError, match="zero_grad before the block"), dni_rl.DecoupledPass():
        loss = losses_of(model(x, cross)).mean()
        model.zero_grad(set_to_none)
        loss.backward()
    with (
        pytest.raises(RuntimeError, match="zero_grad before the block"),
        dni_rl.DecoupledPass(scaler=torch.amp.GradScaler("cpu")),
    ):
        loss = losses_of(model(x, cross)).mean()
        model.zero_grad(set_to_none)
        loss.backward()
    assert gradients(critic) == [None] * len(list(critic.parameters()))


def around_in_one_loss(layer, interface, x, middle):
    h = layer(x)
    loss = interface(h).square().sum() + h.sin().sum()
    middle()
    loss.backward()


def around_in_a_loss_of_its_own(layer, interface, x, middle):
    h = layer(x)
    sent_on = interface(h)
    middle()
    h.sin().sum().backward(retain_graph=True)
    sent_on.square().sum().backward()


def around_twice_differentiable(layer, interface, x, middle):  # which puts another tensor into .grad
    h = layer(x)
    loss = interface(h).square().sum() + h.sin().sum()
    middle()
    loss.backward(create_graph=True, inputs=list(layer.parameters()))
    loss.backward()


def tied_weight(layer, interface, x, middle):
    h = interface(layer(x))
    middle()
    (h @ layer.weight + layer.bias.sum()).square().sum().backward()


def sent_again(layer, interface, x, middle):
    h = interface(layer(x))
    middle()
    (h + interface(layer(x))).square().sum().backward()


@pytest.mark.parametrize(
    "other_way",
    [around_in_one_loss, around_in_a_loss_of_its_own, around_twice_differentiable, tied_weight, sent_again],
)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_gradient_that_vanished_is_noticed_though_others_come_after_it(other_way):
    layer, interface, x = linear(D, H, 1), dni_rl.Interface(make_critic()), draw(B, D)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for set_to_none in (True, False):
        layer.zero_grad()
        with pytest.raises(RuntimeError, match="zero_grad before the block"), dni_rl.DecoupledPass():
            other_way(layer, interface, x, lambda set_to_none=set_to_none: optimizer.zero_grad(set_to_none))
            optimizer.step()
        assert all(p.grad is not None and p.grad.any() for p in layer.parameters())  # which is why it was hard to see

    def step():
        optimizer.step(), optimizer.zero_grad()

    for middle in (lambda: None, step):  # two passes, whose gradients add up, and the documented order
        with dni_rl.DecoupledPass():
            other_way(layer, interface, x, middle)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in layer.parameters())


def test_gradients_that_were_set_to_zero_are_noticed_though_a_step_is_taken_with_them():
    layer, interface, x = linear(D, H, 1), dni_rl.Interface(make_critic()), draw(B, D)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="zero_grad before the block"), dni_rl.DecoupledPass():
        h = interface(layer(x))
        optimizer.zero_grad(set_to_none=False)
        h.square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_a_part_may_step_and_zero_as_soon_as_it_has_its_gradient(settings):
    layer, critic = linear(D, H, 1), make_critic()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, **settings)
    interface, x = dni_rl.Interface(critic), draw(B, D)
    before = layer.weight.detach().clone()
    with dni_rl.DecoupledPass():
        h = interface(layer(x))
        expected = before - 0.1 * layer.weight.grad
        optimizer.step(), optimizer.zero_grad()
        h.square().sum().backward()
    assert_same(layer.weight.detach(), expected)


def test_a_fused_step_counts_where_it_has_used_the_gradient_and_only_in_passes_that_are_open():
    before = dict(step_hooks)
    layer, interface, x = linear(D, H, 1), dni_rl.Interface(make_critic()), draw(B, D)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1, fused=True)
    with dni_rl.DecoupledPass():
        h = interface(layer(x))
        with dni_rl.DecoupledPass():
            sent_on = dni_rl.Interface(make_critic())(h)
            optimizer.step(), optimizer.zero_grad()  # of the part below the outer interface
            sent_on.sum().backward()
    assert step_hooks == before
    for early in (True, False):  # a step before the gradient was sent, or after it was gone, has not used it
        layer.weight.grad = torch.ones_like(layer.weight)
        with pytest.raises(RuntimeError, match="zero_grad before the block"), dni_rl.DecoupledPass():
            if early:
                optimizer.step()
            h = interface(layer(x))
            optimizer.zero_grad()
            optimizer.step()
            h.square().sum().backward()
        assert step_hooks == before
    with pytest.raises(ZeroDivisionError), dni_rl.DecoupledPass():
        interface(layer(x))
        raise ZeroDivisionError
    assert step_hooks == before and not layer.weight._backward_hooks and not layer.weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("settings", [{}, {"fused": True}])
@pytest.mark.parametrize("weight", [1.0, 1e300])
def test_a_step_that_a_scaler_skips_inside_of_the_pass_has_used_its_gradient(weight, settings):
    layer, interface, x = linear(D, H, 1), dni_rl.Interface(make_critic()), draw(B, D)
    optimizer, before = torch.optim.SGD(layer.parameters(), 0.1, **settings), layer.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**64)
    with dni_rl.DecoupledPass(weight=weight, scaler=scaler):
        h = interface(layer(x))
        scaler.step(optimizer)
        optimizer.zero_grad()
        scaler.scale(h.square().sum()).backward()
    assert layer.weight.equal(before) == (weight > 1.0)  # an overflow


def test_no_grad_and_eval_are_the_identity_and_teach_nothing():
    model, x = Chain(), draw(B, D)
    critics = [make_critic(seed=1), make_critic(seed=2)]
    cross = nn.ModuleList(dni_rl.Interface(critic) for critic in critics)
    plain = model(x, [lambda h: h] * 2)
    with torch.no_grad():
        assert torch.equal(model(x, cross), plain)
        with dni_rl.DecoupledPass() as decoupled:
            assert torch.equal(model(x, cross), plain)
    assert decoupled.fits == {}
    cross.eval()
    expected, _ = backpropagation(model, x, "mean")
    losses_of(model(x, cross)).mean().backward()
    assert_same(gradients(model), expected)  # in eval mode gradients pass unchanged
    assert all(g is None for critic in critics for g in gradients(critic))
    cross.train()
    with pytest.raises(RuntimeError, match="no pass is open"):
        model(x, cross)


@pytest.mark.parametrize("mode", ["decoupled", "locked"])
def test_a_frozen_lower_part_gets_nothing_and_its_critic_still_learns(mode):
    model, x, critic = Chain(), draw(B, D), make_critic()
    model.parts[0].requires_grad_(False)
    interface = dni_rl.Interface(critic, mode=mode)
    with dni_rl.DecoupledPass():
        losses_of(model(x, [interface, dni_rl.Interface(None, mode="locked")])).mean().backward()
    assert all(p.grad is None for p in model.parts[0].parameters())
    assert all(p.grad.norm() > 0 for p in [*model.parts[1].parameters(), *critic.parameters()])


def test_accumulating_two_halves_is_one_batch():
    x, found = draw(B, D), []
    for pieces in (1, 2):
        model, critic = Chain(), make_critic()
        cross = [dni_rl.Interface(critic), dni_rl.Interface(None, mode="locked")]
        for rows in range(0, B, B // pieces):
            part = slice(rows, rows + B // pieces)
            with dni_rl.DecoupledPass(weight=1.0 / B):
                output = model(x[part], cross)
                ((output - draw(B, Y, seed=4)[part]).square().sum() / B).backward()
        # the critic's loss is a mean over rows, pass by pass
        found.append((gradients(model), [g / pieces for g in gradients(critic)]))
    assert_same(found[1], found[0])


def test_an_exception_leaves_nothing_behind():
    model, x, critic = Chain(), draw(B, D), make_critic()
    cross = [dni_rl.Interface(critic), dni_rl.Interface(None, mode="locked")]
    with pytest.raises(ZeroDivisionError), dni_rl.DecoupledPass() as failed:
        output = model(x, cross)
        losses_of(output).sum().backward(retain_graph=True)  # a gradient has even arrived
        raise ZeroDivisionError
    assert failed.fits == {} and all(g is None for g in gradients(critic))
    with pytest.raises(RuntimeError, match="no pass is open"):
        model(x, cross)
    model.zero_grad()
    with dni_rl.DecoupledPass() as decoupled:
        losses_of(model(x, cross)).mean().backward()
    fresh = make_critic()
    again = [dni_rl.Interface(fresh), dni_rl.Interface(None, mode="locked")]
    with dni_rl.DecoupledPass() as reference:
        losses_of(Chain()(x, again)).mean().backward()
    assert_same(gradients(critic), gradients(fresh))
    assert_same(decoupled.fits[cross[0]].loss, reference.fits[again[0]].loss)
    with pytest.raises(RuntimeError, match="second time"), decoupled:
        pass


def test_two_threads_do_not_interfere():
    model, barrier, targets = Chain(), threading.Barrier(2, timeout=10), {}
    oracle = [Oracle(torch.zeros(B, H, dtype=DOUBLE)) for _ in range(2)]

    def work(i):
        interface = dni_rl.Interface(oracle[i])
        barrier.wait()
        for _ in range(5):
            with dni_rl.DecoupledPass(weight=1.0) as decoupled:
                h = interface(torch.tanh(model.parts[0](draw(B, D, seed=i))))
                barrier.wait()  # both passes are open
                (h * (i + 1)).sum().backward()
                barrier.wait()
            assert list(decoupled.fits) == [interface]
        targets[i] = oracle[i].targets

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_same(targets[i], [torch.full((B, H), i + 1.0, dtype=DOUBLE)] * 5)


def test_passes_nest():
    layer, x = linear(D, H, 1), draw(B, D)
    outer, inner = dni_rl.Interface(make_critic()), dni_rl.Interface(make_critic())
    with dni_rl.DecoupledPass() as first:
        h = outer(layer(x))
        with dni_rl.DecoupledPass() as second:
            inner(h).sum().backward()
        assert list(second.fits) == [inner] and not first.fits
    assert list(first.fits) == [outer]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_goes_between_interfaces(reentrant):
    layer, interface, x = linear(D, H, 1), dni_rl.Interface(make_critic()), draw(B, D)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="Checkpoint the parts between"), dni_rl.DecoupledPass():
        checkpoint(lambda x: interface(layer(x)).sin(), leaf, use_reentrant=reentrant).sum().backward()
    found = []
    for call in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        with dni_rl.DecoupledPass():
            interface(call(leaf)).sum().backward()
        found.append(gradients(layer))
    assert_same(found[1], found[0])


def test_a_pass_without_backward_is_an_error():
    layer, interface = linear(D, H, 1), dni_rl.Interface(make_critic())
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\) inside the block"), dni_rl.DecoupledPass():
        interface(layer(draw(B, D)))


@pytest.mark.parametrize("mode", ["decoupled", "locked"])
def test_modifying_what_crossed_in_place_is_an_error(mode):
    layer, interface = linear(D, H, 1), dni_rl.Interface(make_critic(), mode=mode)
    with pytest.raises(RuntimeError, match=r"in-place|in place"), dni_rl.DecoupledPass():
        h = interface(layer(draw(B, D)))
        h.mul_(2.0).sum().backward()


def test_wrong_settings_and_inputs_are_refused():
    with pytest.raises(ValueError, match="mode: found 'open'"):
        dni_rl.Interface(None, mode="open")
    with pytest.raises(ValueError, match="found Linear, which has no synthetic_gradient"):
        dni_rl.Interface(linear(H, H, 1))
    with pytest.raises(ValueError, match=r"max_norm_ratio=0\.5"):
        dni_rl.Interface(make_critic(max_norm_ratio=0.5))
    for setting in ({"target_lambda": 0.5}, {"targets_per_window": 3}):
        with pytest.raises(ValueError, match=f"critic: found {next(iter(setting))}=.* there is no window of steps"):
            dni_rl.Interface(make_critic(**setting))
    for weight, message in [(0.0, "allowed above 0"), (torch.ones(2), "expected one number")]:
        with pytest.raises(ValueError, match=message):
            dni_rl.DecoupledPass(weight=weight)
    interface = dni_rl.Interface(make_critic())
    with dni_rl.DecoupledPass():
        with pytest.raises(ValueError, match=r"expected \[B, F\] for a GradientCritic, got \(2, 3, 4\)"):
            interface(torch.ones(2, 3, 4))
        with pytest.raises(ValueError, match=r"expected a floating-point tensor \[B, ...\]"):
            interface(torch.ones(B, H, dtype=torch.int64))
        with pytest.raises(ValueError, match="widths"):
            interface(linear(D, H + 1, 1)(draw(B, D)))


# DecoupledSequential


def make_sequential(mode="decoupled", optimizer=torch.optim.SGD, critics=None, learning_rate=0.05, **settings):
    layers = [
        nn.Sequential(linear(D, H, 1), nn.Tanh()),
        nn.Sequential(linear(H, H, 2), nn.Tanh()),
        nn.Sequential(linear(H, H, 4), nn.Tanh()),
        linear(H, Y, 3),
    ]
    if critics is None:
        critics = [make_critic(seed=s) for s in range(3)]
    input_models = [linear(D, H, 10 + i) for i in range(3)] if mode == "unlocked" else []

    def own(modules):
        return [
            None if m is None or not list(m.parameters()) else optimizer(m.parameters(), learning_rate) for m in modules
        ]

    return dni_rl.DecoupledSequential(
        layers, critics, own(layers), own(critics), mode=mode,
        input_models=input_models, input_optimizers=own(input_models), **settings,
    )  # fmt: skip


def parameters_of(module):
    return [p.detach().clone() for p in module.parameters()]


def test_sequential_locked_is_backpropagation_with_an_optimizer_for_each_layer():
    net, x = make_sequential("locked"), draw(B, D)
    plain = nn.Sequential(*copy.deepcopy(list(net.layers)))
    hidden = [x]
    for layer in plain:
        hidden.append(layer(hidden[-1]))
        hidden[-1].retain_grad()
    losses_of(hidden[-1]).mean().backward()
    torch.optim.SGD(plain.parameters(), 0.05).step()
    report = net.update(x, losses_of)
    assert_same(parameters_of(net.layers), parameters_of(plain))
    assert_same(report.outputs, hidden[-1].detach())
    for i, critic in enumerate(make_critic(seed=s) for s in range(3)):
        fit = critic.fit((hidden[i + 1].detach(),), (hidden[i + 1].grad * B,))
        assert_same(report.fits[i].loss.detach(), fit.loss.detach())


def test_sequential_with_oracles_is_backpropagation():
    x, locked = draw(B, D), make_sequential("locked", critics=[None] * 3)
    hidden = [x]
    for layer in locked.layers:
        hidden.append(layer(hidden[-1]))
    true = torch.autograd.grad(losses_of(hidden[-1]).sum(), hidden[1:-1])
    net = make_sequential("decoupled", critics=[Oracle(g) for g in true])
    locked.update(x, losses_of), net.update(x, losses_of)
    assert_same(parameters_of(net.layers), parameters_of(locked.layers))
    for critic, g in zip(net.critics, true, strict=True):
        assert_same(critic.targets, [g])


@pytest.mark.parametrize("seed", range(4))
def test_sequential_in_random_order_with_probability_one_is_a_chain_of_interfaces(seed):
    net, twin = make_sequential(seed=seed), make_sequential()
    cross = [dni_rl.Interface(critic) for critic in twin.critics]
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (twin.layers, twin.critics)]
    for step in range(3):
        x = draw(B, D, seed=20 + step)
        report = net.update(x, losses_of)
        for o in optimizers:
            o.zero_grad()
        with dni_rl.DecoupledPass() as decoupled:
            h = x
            for layer, interface in zip(twin.layers, [*cross, nn.Identity()], strict=True):
                h = interface(layer(h))
            losses_of(h).mean().backward()
        for o in optimizers:
            o.step()
        assert report.updated == (True,) * 4
        assert_same([f.loss.detach() for f in report.fits], [decoupled.fits[i].loss.detach() for i in cross])
        assert_same(parameters_of(net), parameters_of(twin))


def test_sequential_layers_that_are_not_drawn_stay_and_their_critics_below_hear_nothing():
    net = make_sequential(update_probability=0.5, seed=3)
    draws = []
    for step in range(40):
        before = [parameters_of(m) for m in (*net.layers, *net.critics)]
        report = net.update(draw(B, D, seed=step), losses_of)
        after = [parameters_of(m) for m in (*net.layers, *net.critics)]
        moved = [
            any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
            for old, new in zip(before, after, strict=True)
        ]
        assert moved[:4] == list(report.updated)
        assert moved[4:] == list(report.updated[1:]) == [fit is not None for fit in report.fits]
        draws += report.updated
    assert 60 < sum(draws) < 100  # of 160
    assert len({tuple(draws[i : i + 4]) for i in range(0, 160, 4)}) > 8  # each layer for itself


def test_sequential_unlocked_layers_compute_on_synthetic_inputs_that_learn_the_true_ones():
    net, x = make_sequential("unlocked"), draw(B, D)
    layers, critics = copy.deepcopy(list(net.layers)), copy.deepcopy(list(net.critics))
    inputs = [x, *(m(x).detach() for m in net.input_models)]
    leaves = [h.clone().requires_grad_() for h in inputs]
    outputs = [layer(leaf) for layer, leaf in zip(layers, leaves, strict=True)]
    expected = [(i - o).square().mean().detach() for i, o in zip(inputs[1:], outputs[:-1], strict=True)]
    report = net.update(x, losses_of)
    assert_same(list(report.input_losses), expected)
    assert_same(report.outputs, outputs[-1].detach())
    answers = [critic((o.detach(),))[0] / B for critic, o in zip(critics, outputs[:-1], strict=True)]
    torch.autograd.backward([*outputs[:-1], losses_of(outputs[-1]).mean()], [*answers, None])
    for i, critic in enumerate(
        critics
    ):  # the message up was the true output, the message down arrived at the synthetic input
        fit = critic.fit((outputs[i].detach(),), (leaves[i + 1].grad * B,))
        assert_same(report.fits[i].loss.detach(), fit.loss.detach())
    torch.optim.SGD([p for layer in layers for p in layer.parameters()], 0.05).step()
    assert_same(parameters_of(net.layers), [p.detach() for layer in layers for p in layer.parameters()])
    for _ in range(50):
        last = net.update(x, losses_of)
    assert all(now < then for now, then in zip(last.input_losses, expected, strict=True))
    chain = x
    for layer in net.layers:
        chain = layer(chain)
    assert torch.equal(net(x), chain)


def test_sequential_without_critics_trains_the_last_layer_only():
    net = make_sequential(critics=[None] * 3)
    before = [parameters_of(layer) for layer in net.layers]
    report = net.update(draw(B, D), losses_of)
    assert_same([parameters_of(layer) for layer in net.layers[:3]], before[:3])
    assert not torch.equal(net.layers[3].weight, before[3][0])
    assert report.fits == (None,) * 3
    assert report.updated == (False, False, False, True)  # all were drawn


@pytest.mark.parametrize("mode", ["locked", "decoupled"])
def test_sequential_with_a_frozen_first_layer(mode):
    net = make_sequential(mode)
    net.layers[0].requires_grad_(False)
    before = parameters_of(net.layers[0])
    report = net.update(draw(B, D), losses_of)
    assert_same(parameters_of(net.layers[0]), before)
    assert all(fit is not None for fit in report.fits)
    assert report.updated == (False, True, True, True)


@pytest.mark.parametrize("mode", ["locked", "decoupled", "unlocked"])
def test_sequential_saved_and_loaded_continues_as_if_never_stopped(mode):
    probability = 1.0 if mode == "locked" else 0.5
    settings = {"mode": mode, "optimizer": torch.optim.Adam, "learning_rate": 0.01, "update_probability": probability}
    net, resumed = make_sequential(**settings), make_sequential(**settings, seed=5)
    for step in range(6):
        if step == 3:
            buffer = io.BytesIO()
            torch.save(net.state_dict(), buffer)
            buffer.seek(0)
            resumed.load_state_dict(torch.load(buffer, weights_only=True))
        net.update(draw(B, D, seed=step), losses_of)
        if step >= 3:
            resumed.update(draw(B, D, seed=step), losses_of)
    for a, b in zip(net.state_dict().values(), resumed.state_dict().values(), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def test_sequential_shares_nothing_with_the_one_whose_state_it_took():
    settings = {"mode": "decoupled", "optimizer": torch.optim.Adam, "learning_rate": 0.01}
    net, first, second = (make_sequential(**settings) for _ in range(3))
    net.update(draw(B, D), losses_of)
    state = net.state_dict()
    first.load_state_dict(state)
    second.load_state_dict(copy.deepcopy(state))
    net.update(draw(B, D, seed=1), losses_of)  # which moves the moments that `state` refers to
    for step in (2, 3):
        for other in (first, second):
            other.update(draw(B, D, seed=step), losses_of)
    assert_same(parameters_of(first), parameters_of(second))


def test_sequential_draws_on_the_host_whatever_the_default_device(device_without_values):
    drawn = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = make_sequential("decoupled", update_probability=0.5)
            x = torch.ones(B, D, dtype=torch.float64)
            drawn.append([net.update(x, lambda h: h.square().sum(-1)).updated for _ in range(5)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("mode", ["decoupled", "unlocked"])
def test_sequential_conditioned_on_labels_learns(mode):
    labels = torch.arange(64) % Y
    x = draw(64, D) + 2.0 * F.one_hot(labels, D)
    critics = [make_critic(trained=False, context_size=Y, normalize_targets=True) for _ in range(3)]
    net = make_sequential(mode, optimizer=torch.optim.Adam, critics=critics, learning_rate=0.01)
    for _ in range(120):
        net.update(x, lambda output: F.cross_entropy(output, labels, reduction="none"), F.one_hot(labels, Y))
    assert F.cross_entropy(net(x), labels) < 0.35  # chance is 0.69


def test_sequential_refuses_wrong_settings_and_losses():
    for settings, message in [
        ({"mode": "open"}, "mode: found 'open'"),
        ({"update_probability": 0.0}, "update_probability: found 0.0"),
        ({"mode": "locked", "update_probability": 0.5}, "1 in mode 'locked'"),
        ({"critics": [None]}, "critics: expected 3 with 4 layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_sequential(**settings)
    net = make_sequential()
    with pytest.raises(ValueError, match=r"^x: found a batch of no examples; "):
        net.update(draw(B, D)[:0], losses_of)
    with pytest.raises(ValueError, match="do not reduce"):
        net.update(draw(B, D), lambda output: losses_of(output).mean())
    with pytest.raises(RuntimeError, match="switched off"), torch.no_grad():
        net.update(draw(B, D), losses_of)


@pytest.mark.parametrize("mode", ["locked", "decoupled", "unlocked"])
@pytest.mark.parametrize("frozen", [False, True])
def test_sequential_refuses_a_layer_that_overwrites_its_input(mode, frozen):
    net = make_sequential(mode)
    net.layers[0] = net.layers[0][0].requires_grad_(not frozen)  # linear: autograd itself has nothing against it
    net.layers[1] = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), net.layers[1])
    before = parameters_of(net)
    with pytest.raises(RuntimeError, match=r"^update: an activation was modified in place.* ReLU without inplace"):
        net.update(draw(B, D), losses_of)
    assert_same(parameters_of(net), before)
    net.layers[1][1].inplace = False
    net.layers[2] = nn.Sequential(linear(H, H, 4), nn.ReLU(inplace=True))  # before its output goes on
    assert all(fit is not None for fit in net.update(draw(B, D), losses_of).fits)


def test_sequential_leaves_other_errors_of_layers_and_what_no_critic_learns_from_alone():
    net = make_sequential("locked", critics=[None] * 3)
    plain = nn.Sequential(*copy.deepcopy(list(net.layers)))
    net.layers[1] = nn.Sequential(nn.Sigmoid(), net.layers[1])
    plain[1] = nn.Sequential(nn.Sigmoid(), plain[1])
    net.layers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0].sin_(),))
    plain[1].register_forward_pre_hook(lambda _, inputs: (inputs[0].sin(),))
    net.layers[0][1] = plain[0][1] = nn.Softplus()  # whose gradient does not need its output
    net.update(draw(B, D), losses_of)
    losses_of(plain(draw(B, D))).mean().backward()
    torch.optim.SGD(plain.parameters(), 0.05).step()
    assert_same(parameters_of(net.layers), parameters_of(plain))
    net.layers[1] = linear(H + 1, H, 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net.update(draw(B, D), losses_of)


@pytest.mark.parametrize("kind", ["optimizers", "critic_optimizers", "input_optimizers"])
def test_sequential_refuses_optimizers_that_are_not_those_of_their_modules(kind):
    def build(change, frozen=False):
        modules = {
            "optimizers": [linear(D, H, 1), linear(H, H, 2), linear(H, Y, 3)],
            "critic_optimizers": [make_critic(seed=1), make_critic(seed=2)],
            "input_optimizers": [linear(D, H, 4), linear(D, H, 5)],
        }
        optimizers = {k: [torch.optim.SGD(m.parameters(), 0.1) for m in ms] for k, ms in modules.items()}
        modules[kind][0].requires_grad_(not frozen)
        change(optimizers, modules)
        layers, critics, input_models = modules.values()
        return dni_rl.DecoupledSequential(
            layers, critics, optimizers["optimizers"], optimizers["critic_optimizers"], mode="unlocked",
            input_models=input_models, input_optimizers=optimizers["input_optimizers"],
        )  # fmt: skip

    def one_for_all(optimizers, modules):
        optimizers[kind] = [torch.optim.SGD(nn.ModuleList(modules[kind]).parameters(), 0.1)] * len(modules[kind])

    def of_another_kind(optimizers, modules):
        other = "critic_optimizers" if kind == "optimizers" else "optimizers"
        optimizers[other][1].add_param_group({"params": list(modules[kind][1].parameters())})
        optimizers[kind][1] = optimizers[other][1]

    def mixed_up(optimizers, modules):
        optimizers[kind].reverse()

    def one_module(optimizers, modules):
        modules[kind][1], optimizers[kind][1] = modules[kind][0], optimizers[kind][0]

    with pytest.raises(ValueError, match=rf"^{kind}\[1\]: found the same object as {kind}\[0\], allowed each once"):
        build(one_for_all)
    with pytest.raises(ValueError, match=r"optimizers\[1\]: found the same object as .*optimizers\[1\], allowed"):
        build(of_another_kind)
    with pytest.raises(ValueError, match=rf"^{kind}\[0\]: found none of the \d trainable parameters of its module"):
        build(mixed_up)
    with pytest.raises(ValueError, match=rf"^{kind}\[0\]: found none"):
        build(lambda optimizers, _: optimizers[kind].__setitem__(0, torch.optim.SGD([nn.Parameter(torch.ones(1))])))
    build(lambda optimizers, _: optimizers[kind].__setitem__(0, torch.optim.SGD([nn.Parameter(torch.ones(1))])), True)
    if kind != "input_optimizers":
        build(lambda optimizers, _: optimizers[kind].__setitem__(0, None))
    if kind == "critic_optimizers":  # one critic in two places steps after a regression of its own in each
        build(one_module).update(draw(B, D), losses_of)


def test_sequential_refuses_one_optimizer_for_a_layer_in_two_places():
    layer = linear(D, D, 1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"optimizers\[1\]: found the same object"):
        dni_rl.DecoupledSequential([layer] * 2, [None], [optimizer] * 2, [None], mode="locked")
    dni_rl.DecoupledSequential([layer, layer, nn.Tanh()], [None] * 2, [optimizer, None, None], [None] * 2)


def test_sequential_refuses_a_parameter_that_two_optimizers_would_step():
    layer, tied = linear(D, D, 1), linear(D, D, 2)
    tied.weight = layer.weight
    for layers in ([layer, layer], [layer, tied]):
        optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in layers]
        with pytest.raises(ValueError, match=r"^optimizers\[1\]: found a parameter that optimizers\[0\] holds as well"):
            dni_rl.DecoupledSequential(layers, [None], optimizers, [None], mode="locked")
    dni_rl.DecoupledSequential([layer, tied], [None], [optimizers[0], torch.optim.SGD([tied.bias], 0.1)], [None])


def test_sequential_exception_in_the_loss_changes_nothing():
    net, twin = make_sequential(), make_sequential()

    def broken(output):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        net.update(draw(B, D), broken)
    net.update(draw(B, D), losses_of), twin.update(draw(B, D), losses_of)
    assert_same(parameters_of(net), parameters_of(twin))
