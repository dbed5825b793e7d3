"""torch.autocast in bfloat16 and float16, and the gradient scaler, with real half precision on the CPU."""

import copy

import pytest
import torch
from core_cases import DOUBLE, D, H, LeakyCell
from test_conformance import CRITICS, B, build, data, exactly, gradients, run_window
from torch import nn

import dni_rl

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
T = 6


def make(kind=dni_rl.GradientCritic, core="cell", seed=0, **settings):
    """In float32; the states of the user's cell are in half precision under autocast, those of an LSTM are not."""
    torch.manual_seed(seed)
    module = (
        dni_rl.LSTM(D, H)
        if core == "LSTM"
        else dni_rl.wrap(LeakyCell(), state_sizes=(4, 2), input_size=D, output_size=5)
    )
    critic = kind(state_sizes=module.state_sizes, hidden_sizes=(7,), **settings)
    if kind is dni_rl.RecurrentGradientCritic:
        module = critic.watch(module)
    for p in critic.net.parameters():
        nn.init.normal_(p, std=0.5)
    model = nn.ModuleDict({"core": module, "head": nn.Linear(module.output_size, 1)})
    generator = torch.Generator().manual_seed(seed + 1)
    state = tuple(0.5 * torch.randn(B, size, generator=generator) for size in module.state_sizes)
    return model, critic, torch.randn(T, B, D, generator=generator), state


def window(model, critic, x, state, dtype=None, inside=False, factor=1.0, **settings):
    start = dni_rl.cut(state)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        outputs, end = model["core"].unroll(x, start)
        losses = factor * model["head"](outputs).squeeze(-1).float().square()
        if inside:
            report = dni_rl.backward(losses, start=start, end=end, critic=critic, **settings)
    if not inside:
        report = dni_rl.backward(losses, start=start, end=end, critic=critic, **settings)
    return report, end


KINDS = [getattr(dni_rl, name) for name in CRITICS if name != "ConvGradientCritic"]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@HALF
@kinds
@pytest.mark.parametrize("core", ["cell", "LSTM"])
def test_inside_or_outside_of_the_block_is_the_same(kind, core, dtype):
    results = []
    for inside in (False, True):
        model, critic, x, state = make(kind, core, max_norm_ratio=0.5)
        tape = []
        for _ in range(2):  # the second one starts in the precision that the first one ended in
            report, state = window(model, critic, x, state, dtype, inside)
            tape.append(report.as_dict())
        if core == "cell":
            assert state[0].dtype == dtype
        results.append((tape, gradients(model), gradients(critic), dict(critic.named_buffers())))
    exactly(*results)


@HALF
@kinds
def test_the_critic_sees_what_it_would_see_in_full_precision(kind, dtype):
    found = []
    for precision in (None, dtype):
        model, critic, x, state = make(kind, max_norm_ratio=0.5)
        report, _ = window(model, critic, x, state, precision)
        assert {p.dtype for p in critic.parameters()} == {torch.float32}
        assert all(b.dtype in (torch.float32, torch.int64) for b in critic.buffers())
        found.append((critic.target_rms.clone(), critic.window_norm, report.target_norm, report.synthetic_norm))
        found[-1] += tuple(g for g in gradients(critic).values() if g is not None)
    for half, full in zip(found[1], found[0], strict=True):
        assert torch.linalg.vector_norm(half - full) < 0.1 * torch.linalg.vector_norm(full)
        assert not torch.equal(half, full)


def scaler_of(scale, **settings):
    return torch.amp.GradScaler("cpu", init_scale=scale, **settings)


def test_a_scale_saves_targets_and_yardstick_from_vanishing_in_float16():
    found = {}
    for name, dtype, scale in (
        ("full", None, None),
        ("scaled", torch.float16, 2.0**30),
        ("unscaled", torch.float16, None),
    ):
        model, critic, x, state = make(max_norm_ratio=0.5)
        # Losses so small that their gradients, were they not scaled, would be below the least number of float16.
        scaler = None if scale is None else scaler_of(scale)
        window(model, critic, x, state, dtype, factor=1e-9, scaler=scaler)
        found[name] = (
            *(part.norm() for part in critic.target_rms.split(critic.state_sizes)),
            critic.window_norm,
            next(model["core"].parameters()).grad.norm() / (scale or 1.0),
        )
    for full, scaled, unscaled in zip(*found.values(), strict=True):
        assert abs(scaled - full) < 0.05 * full
        assert abs(unscaled - full) > 0.3 * full


@kinds
@pytest.mark.parametrize("core", ["cell", "LSTM"])
def test_a_changing_scale_changes_nothing_in_float16(kind, core):
    results, scales = [], {1: [], 1000: []}
    for growth_interval in (1, 1000):
        model, critic, x, state = make(kind, core, max_norm_ratio=0.5)
        optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, critic)]
        scaler, tape = scaler_of(1024.0, growth_interval=growth_interval), []
        for _ in range(4):
            report, state = window(model, critic, x, state, torch.float16, scaler=scaler)
            scales[growth_interval].append(scaler.get_scale())
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            tape.append(report.as_dict())
        results.append((tape, model.state_dict(), critic.state_dict()))
    assert scales == {1: [1024.0, 2048.0, 4096.0, 8192.0], 1000: [1024.0] * 4}
    # Powers of two do not round, but for the smallest numbers of float16.
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_both_sides_leave_with_the_scale_and_come_back_without_it():
    results = []
    for scale in (None, 1024.0):
        model, critic = build("GradientCritic", max_norm_ratio=0.5)
        x, y, state, _ = data(model)
        scaler = None if scale is None else scaler_of(scale)
        report, _ = run_window(model, critic, x, y, state, scaler=scaler)
        grads = [{k: g / (scale or 1.0) for k, g in gradients(m).items()} for m in (model, critic)]
        results.append((report.as_dict(), grads, dict(critic.named_buffers())))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    model, critic = build("GradientCritic", max_norm_ratio=0.5)
    off = torch.amp.GradScaler("cpu", enabled=False)
    report, _ = run_window(model, critic, *data(model)[:3], scaler=off)
    exactly((report.as_dict(), [gradients(m) for m in (model, critic)]), results[0][:2])


@kinds
def test_an_overflow_is_skipped_on_the_side_that_it_happened_on_and_training_goes_on(kind):
    model, critic, x, state = make(kind, max_norm_ratio=0.5)
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (model, critic)]
    scaler, skipped, targets_lost = scaler_of(2.0**36, backoff_factor=2.0**-6), [0, 0], 0
    for _ in range(8):
        before = copy.deepcopy([dict(m.named_parameters()) for m in (model, critic)])
        report, state = window(model, critic, x, state, torch.float16, scaler=scaler)
        targets_lost += not report.target_norm.isfinite()
        for side, (m, optimizer) in enumerate(zip((model, critic), optimizers, strict=True)):
            overflow = not all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
            skipped[side] += overflow
            scaler.step(optimizer)
            optimizer.zero_grad()
            assert overflow == all(torch.equal(p, before[side][key]) for key, p in m.named_parameters())
        scaler.update()
    assert 0 < skipped[0] < 7 and 0 < targets_lost < 7
    # Future losses do not come from a backward pass: a loss critic learns from them whatever the scale is.
    assert skipped[1] == (targets_lost if critic.learns_gradients else 0)
    assert int(critic.num_updates) == 8 - targets_lost
    assert all(v.isfinite().all() for m in (model, critic) for v in (*m.parameters(), *m.buffers()))


def test_losses_and_critics_in_half_precision_are_refused():
    model, critic, x, state = make()
    start = dni_rl.cut(state)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, end = model["core"].unroll(x, start)
        losses = model["head"](outputs).squeeze(-1)
        with pytest.raises(
            ValueError, match=r"losses: found torch.bfloat16, allowed torch.float32 .*; call .float\(\)"
        ):
            dni_rl.backward(losses, start=start, end=end, critic=critic)
    with pytest.raises(
        ValueError, match=r"critic: found torch.bfloat16, allowed .* keep it in float32 and put the model"
    ):
        dni_rl.backward(losses.float(), start=start, end=end, critic=critic.bfloat16())


def test_interfaces_in_half_precision_learn_targets_in_full():
    torch.manual_seed(0)
    layer, critic = nn.Linear(D, H), dni_rl.GradientCritic(state_sizes=(H,))
    interface, x = dni_rl.Interface(critic), torch.randn(B, D)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype), dni_rl.DecoupledPass(weight=1 / B) as decoupled:
            h = interface(layer(x))
            assert h.dtype == dtype
            h.float().square().sum(-1).mean().backward()
        assert decoupled.fits[interface].target_norm > 0.1
    assert critic.target_rms.dtype == torch.float32 and DOUBLE not in {p.grad.dtype for p in critic.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_critics_between_layers_are_taught_in_their_own_precision(dtype):
    """Their backward passes, which run where the user is, are in no half precision."""
    state, gradient = torch.randn(B, H), torch.randn(B, H)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        critic = dni_rl.GradientCritic(state_sizes=(H,), hidden_sizes=(7,))
        interface = dni_rl.Interface(critic)
        with torch.autocast("cpu", dtype, enabled=enabled), dni_rl.DecoupledPass(weight=1.0):
            h = interface(state.clone().requires_grad_())
            h.backward(gradient)
        found.append([p.grad for p in critic.parameters()])
    assert any(g.ne(0).any() for g in found[0])
    for plain, under_autocast in zip(*found, strict=True):
        assert plain.equal(under_autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interface_critics_of_levels_are_taught_in_their_own_precision(dtype):
    inputs, found = torch.randn(6, B, D), []
    for enabled in (False, True):
        torch.manual_seed(0)
        core = dni_rl.MultiTimescaleCore(D, (5, 3), (1, 2))
        critics = [dni_rl.GradientCritic(state_sizes=(5,))]
        state = dni_rl.cut(core.initial_state(B))
        outputs, end, bootstraps = core.unroll_in_ticks(inputs, state, ticks=2, interface_critics=critics)
        dni_rl.backward(outputs.square().sum(-1) + bootstraps, start=state, end=end)
        with torch.autocast("cpu", dtype, enabled=enabled):
            dni_rl.fit_interfaces(end, critics)
        found.append(critics[0].net[-1].weight.grad)
    assert found[0].ne(0).any() and found[0].equal(found[1])


def tiny(*sizes):
    """A critic whose gradient is below the least number of float16, and which keeps what arrives."""
    critic = dni_rl.GradientCritic(state_sizes=sizes, normalize_targets=False)
    nn.init.constant_(critic.net[0].bias, 1e-9)
    fit = critic.fit
    critic.fit = lambda state, target, *rest: setattr(critic, "target", target[0]) or fit(state, target, *rest)
    return critic


@HALF
@kinds
def test_a_critic_that_is_asked_under_autocast_answers_as_it_does_elsewhere(kind, dtype):
    found = []
    for enabled in (False, True):
        _, critic, _, state = make(kind)
        states = tuple(s.unsqueeze(0) for s in state)
        window = dni_rl.Window(
            states, states, valid=None, losses=state[0][:, :1].t(), first=None, end=state, alive=None, context=None
        )
        with torch.autocast("cpu", dtype, enabled=enabled):
            answers = [critic(state), critic.synthetic_gradient(state), critic.fit_window(window).as_dict()]
            if kind is dni_rl.RecurrentGradientCritic:
                answers.append(critic.remember(states[:-1], state[-1]))
            elif critic.learns_gradients and not hasattr(critic, "value"):
                answers.append(critic.fit(state, state).as_dict())
            else:
                answers.append(critic.value(state))
        found.append((answers, dict(critic.named_buffers())))
    exactly(*found)


def test_cuts_of_levels_have_bootstraps_that_float16_would_lose():
    core = dni_rl.MultiTimescaleCore(D, (H, 2), (1, 2))
    critic, message_critic = tiny(*core.state_sizes), tiny(H)
    with torch.autocast("cpu", torch.float16):
        _, end, bootstraps = core.unroll_in_ticks(
            torch.randn(T, B, D),
            dni_rl.cut(core.initial_state(B)),
            ticks=2,
            critic=critic,
            interface_critics=[message_critic],
        )
    for b in [b for _, _, part in end.cuts for b in part]:
        exactly(b, torch.full_like(b, 1e-9, dtype=torch.float32))
    (2.0**20 * bootstraps.sum()).backward()
    assert core.levels[0].bias_ih.grad.any()


def test_a_bootstrap_of_a_message_in_half_precision_keeps_the_scale_of_the_losses():
    core = dni_rl.MultiTimescaleCore(D, (H, 2), (1, 2)).bfloat16()
    critic = tiny(H)
    nn.init.constant_(critic.net[0].bias, 1e-44)  # below the least number of bfloat16
    x = torch.randn(T, B, D, dtype=torch.bfloat16)
    _, _, bootstraps = core.unroll_in_ticks(x, dni_rl.cut(core.initial_state(B)), ticks=T, interface_critics=[critic])
    assert bootstraps.dtype == torch.float32
    (2.0**100 * bootstraps.sum()).backward()
    assert core.levels[0].bias_ih.grad.any()


def test_later_synthetic_gradients_under_autocast_are_not_lost():
    core = dni_rl.GRU(D, H)
    _, end = core.unroll(torch.randn(T, 2 * B, D), core.initial_state(2 * B))
    with torch.autocast("cpu", torch.float16):
        (target,), valid = dni_rl.later_synthetic_gradients(tiny(H), end, 2)
    exactly(target[valid], torch.full_like(target[valid], 1e-9, dtype=torch.float32))


def test_layers_that_update_themselves_ask_their_critics_in_full_precision():
    layers, critic = [nn.Linear(D, H), nn.Linear(H, 1)], tiny(H)
    optimizers = [torch.optim.SGD(layer.parameters(), 0.1) for layer in layers]
    net = dni_rl.DecoupledSequential(layers, [critic], optimizers, [None])
    with torch.autocast("cpu", torch.float16):
        report = net.update(torch.randn(B, D), lambda y: 1e-3 * y.float().square().sum(-1))
    torch.testing.assert_close(report.fits[0].predicted_norm, torch.tensor(1e-9 * H**0.5), rtol=1e-3, atol=0.0)


def test_the_sensitivity_advances_in_full_precision():
    torch.manual_seed(0)
    core, x, found = dni_rl.ElementwiseLSTM(D, H), torch.randn(T, B, D), []
    for enabled in (False, True):
        _, end = core.unroll(x.half().float(), core.initial_state(B))
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            found.append(core.advance(core.initial_sensitivity(B), x.half() if enabled else x.half().float(), end))
    exactly((found[0].h, found[0].c), (found[1].h, found[1].c))


def test_a_scale_saves_what_crosses_interfaces_from_vanishing_in_float16():
    torch.manual_seed(0)
    layer, critic, scaler = nn.Linear(D, H), tiny(H), scaler_of(2.0**24)
    interface, x = dni_rl.Interface(critic), torch.randn(B, D)
    with torch.autocast("cpu", torch.float16), dni_rl.DecoupledPass(weight=1.0, scaler=scaler):
        h = interface(layer(x))
        assert h.dtype == torch.float16
        scaler.scale((1e-9 * h.float()).sum()).backward()
    torch.testing.assert_close(layer.bias.grad / 2.0**24, torch.full((H,), B * 1e-9), rtol=0.01, atol=0.0)
    torch.testing.assert_close(critic.target, torch.full((B, H), 1e-9), rtol=0.01, atol=0.0)


def test_a_large_weight_saves_the_synthetic_gradient_of_bp_lambda_from_vanishing_in_float16():
    found = []
    for dtype in (torch.float32, torch.float16):
        model, _, x, state = make()
        critic = dni_rl.GradientCritic(state_sizes=model["core"].state_sizes, normalize_targets=False)
        with torch.no_grad():
            critic.net[0].bias[:4] = 1e-9  # for the component that is in half precision
        start = dni_rl.cut(state)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            outputs, end = model["core"].unroll(x[:1], start)
        assert end[0].dtype == dtype
        dni_rl.bp_lambda_backward(
            0.0 * outputs.float().sum(-1),
            start=start,
            end=end,
            critic=critic,
            trace=dni_rl.bp_lambda_trace(critic, B),
            lambda_=0.5,
            weight=2.0**24,
        )
        found.append(model["core"].cell.fast.weight.grad / 2.0**24)
    assert found[0].norm() > 1e-10
    assert torch.linalg.vector_norm(found[1] - found[0]) < 0.05 * found[0].norm()
