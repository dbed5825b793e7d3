import pytest
import torch

import dni_rl
from dni_rl import GradientCritic
from dni_rl.cores.base import unroll_stepwise
from dni_rl.cores.timescales import MultiTimescaleCore, fit_interfaces

T, B, D = 24, 3, 2
SETTINGS = [
    ((3, 2), (1, 3), "last"),
    ((3, 2, 4), (1, 2, 6), "last"),
    ((3, 2, 4), (1, 2, 6), "mean"),
    ((3,), (1,), "last"),
]


@pytest.fixture(params=SETTINGS, ids=["2 levels", "3 levels", "3 levels, mean", "1 level"])
def core(request):
    torch.manual_seed(0)
    hidden_sizes, periods, message = request.param
    return MultiTimescaleCore(D, hidden_sizes, periods, message=message).double()


@pytest.fixture
def inputs():
    return torch.randn(T, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def first():
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0], first[7, 1], first[12, 1], first[4, 2], first[9, 2] = True, True, True, True, True
    return first


def losses_of(outputs):
    return (outputs - 0.3).square().sum(-1)


def reference(core, inputs, first, ticks=None, cut_messages=False):
    """Row by row, with integer clocks and Python conditions; level i detached after every `ticks` of its own ticks."""
    rows = []
    for b in range(inputs.shape[1]):
        sizes = [cell.hidden_size for cell in core.levels]
        outputs = []
        for t in range(len(inputs)):
            if t == 0 or first[t, b]:
                h = [inputs.new_zeros(size) for size in sizes]
                c = [inputs.new_zeros(size) for size in sizes]
                heard = [[] for _ in sizes]
                clock = 0
            for i, period in enumerate(core.periods):
                if ticks is not None and t % (ticks * period) == 0:
                    h[i], c[i], heard[i] = h[i].detach(), c[i].detach(), [m.detach() for m in heard[i]]
            before = list(h)
            for i, (cell, period) in enumerate(zip(core.levels, core.periods, strict=True)):
                message = inputs[t, b] if i == 0 else h[i - 1].detach() if cut_messages else h[i - 1]
                heard[i].append(message)
                if clock % period == 0:
                    if core.message == "mean" and i:
                        message = torch.stack(heard[i]).mean(0)
                    heard[i] = []
                    below = torch.cat([message, before[i + 1]]) if i + 1 < len(sizes) else message
                    h[i], c[i] = (s[0] for s in cell(below[None], (h[i][None], c[i][None])))
            clock += 1
            outputs.append(h[0])
        rows.append(torch.stack(outputs))
    return torch.stack(rows, 1)


def gradients_of(core):
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in core.parameters()])


def full_bptt(core, inputs, first):
    core.zero_grad()
    start = dni_rl.cut(core.initial_state(B))
    outputs, end = core.unroll(inputs, start, first)
    losses_of(outputs).sum().backward()
    gradients = gradients_of(core)
    core.zero_grad()
    return gradients, end.history.gradients


class Oracle(GradientCritic):
    """Knows the true gradient [T + 1, B, ...] of every state; the step is told as context."""

    def __init__(self, state_sizes, gradients):
        super().__init__(state_sizes=state_sizes, context_size=1)
        self.truth = tuple(torch.cat([g, torch.zeros_like(g[:1])]) for g in gradients)

    def synthetic_gradient(self, state, context=None, alive=None):
        steps = context[:, 0].long()
        rows = torch.arange(len(steps))
        return tuple(torch.where(alive.bool().unsqueeze(-1), g[steps, rows], 0.0) for g in self.truth)


def in_windows(core, inputs, first, length, ticks, critic=None):
    """Trains through windows of `length` as a user does; summed model gradients and the reports."""
    state, reports = core.initial_state(B), []
    steps = torch.arange(T + 1.0, dtype=inputs.dtype).view(-1, 1, 1).expand(-1, B, 1)
    for t in range(0, T, length):
        window = slice(t, t + length)
        state = dni_rl.cut(state)
        context = steps[t : t + length + 1] if critic is not None and critic.context_size else None
        outputs, end, bootstraps = core.unroll_in_ticks(
            inputs[window], state, first[window], ticks=ticks, critic=critic, context=context
        )
        alive = ~first[t + length] if t + length < T else torch.zeros(B)
        reports.append(
            dni_rl.backward(
                losses_of(outputs) + bootstraps,
                start=state,
                end=end,
                critic=critic,
                context=context,
                alive=alive,
                weight=1.0,
            )
        )
        state = end
    gradients = gradients_of(core)
    core.zero_grad()
    return gradients, reports


def test_unroll_matches_row_by_row_clocks(core, inputs, first):
    outputs, _ = core.unroll(inputs, core.initial_state(B), first)
    torch.testing.assert_close(outputs, reference(core, inputs, first), rtol=1e-12, atol=1e-12)


def test_two_unrolls_equal_one(core, inputs, first):
    whole, _ = core.unroll(inputs, core.initial_state(B), first)
    head, state = core.unroll(inputs[:11], core.initial_state(B), first[:11])
    tail, _ = core.unroll(inputs[11:], state, first[11:])
    assert torch.cat([head, tail]).equal(whole)


def test_clock_counts_steps_of_the_episode_and_wraps(inputs, first):
    core = MultiTimescaleCore(D, (2, 2), (1, 3)).double()
    _, end = core.unroll(inputs, core.initial_state(B), first)
    clock = end.history.states[-1][:, :, 0].long()
    assert clock[:9, 0].tolist() == [0, 1, 2, 3, 1, 2, 3, 1, 2]
    assert clock[:9, 1].tolist() == [0, 1, 2, 3, 1, 2, 3, 0, 1]


def test_upper_level_moves_at_its_ticks_alone(inputs):
    core = MultiTimescaleCore(D, (2, 2), (1, 4)).double()
    _, end = core.unroll(inputs, core.initial_state(B))
    h = end.history.states[2]  # [T, B, 2], before each step
    moved = (h[1:] != h[:-1]).all(-1).all(-1)
    assert moved.nonzero().flatten().tolist() == list(range(0, T - 1, 4))


def test_clock_receives_no_gradient(core, inputs, first):
    _, gradients = full_bptt(core, inputs, first)
    assert gradients[-1].eq(0).all() and any(g.ne(0).any() for g in gradients[:-1])


@pytest.mark.parametrize(("length", "ticks"), [(24, 2), (12, 2), (6, 1), (8, 3), (1, 1)])
def test_an_oracle_critic_gives_full_bptt(core, inputs, first, length, ticks):
    truth, at_states = full_bptt(core, inputs, first)
    oracle = Oracle(core.state_sizes, at_states).double()
    found, _ = in_windows(core, inputs, first, length, ticks, oracle)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_an_oracle_critic_gives_full_bptt_with_plain_windows(core, inputs, first):
    truth, at_states = full_bptt(core, inputs, first)
    oracle = Oracle(core.state_sizes, at_states).double()
    found, _ = in_windows(core, inputs, first, length=4, ticks=T, critic=oracle)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_with_an_oracle_every_recorded_gradient_is_the_true_one(core, inputs, first):
    _, at_states = full_bptt(core, inputs, first)
    oracle = Oracle(core.state_sizes, at_states).double()
    steps = torch.arange(T + 1.0, dtype=inputs.dtype).view(-1, 1, 1).expand(-1, B, 1)
    state = dni_rl.cut(core.initial_state(B))
    outputs, end, bootstraps = core.unroll_in_ticks(inputs, state, first, ticks=1, critic=oracle, context=steps)
    (losses_of(outputs) + bootstraps).sum().backward()
    valid = end.history.valid.unsqueeze(-1)
    for found, true in zip(end.history.gradients, at_states, strict=True):
        torch.testing.assert_close(found * valid, true * valid, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ticks", [1, 2, 3])
def test_no_critic_and_a_zero_critic_cut_each_level_at_its_own_ticks(core, inputs, first, ticks):
    length = ticks * core.periods[-1]
    losses_of(reference(core, inputs, first, ticks)).sum().backward()
    expected = gradients_of(core)
    core.zero_grad()
    torch.testing.assert_close(in_windows(core, inputs, first, length, ticks)[0], expected, rtol=1e-10, atol=1e-12)
    zero = GradientCritic(state_sizes=core.state_sizes).double()
    zero.requires_grad_(False)
    found, _ = in_windows(core, inputs, first, length, ticks, zero)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_window_of_k_ticks_covers_k_times_period_steps():
    """K = 4, period 6: the last loss reaches the first of 24 inputs past the lower level's cuts, and none before."""
    torch.manual_seed(0)
    core = MultiTimescaleCore(D, (3, 3), (1, 6)).double()
    x = torch.randn(30, 1, D, dtype=torch.float64, requires_grad=True)
    _, state = core.unroll(x[:6], core.initial_state(1))
    outputs, _, _ = core.unroll_in_ticks(x[6:], dni_rl.cut(state), ticks=4)
    outputs[-1].sum().backward()
    assert x.grad[6].ne(0).all() and x.grad[:6].eq(0).all()
    single = MultiTimescaleCore(D, (3,), (1,)).double()
    x.grad = None
    outputs, _, _ = single.unroll_in_ticks(x, single.initial_state(1), ticks=4)
    outputs[-1].sum().backward()
    assert x.grad[28:].ne(0).all() and x.grad[:28].eq(0).all()


def test_bootstraps_have_no_value_and_the_weight_of_losses(core, inputs, first):
    critic = GradientCritic(state_sizes=core.state_sizes, normalize_targets=False).double()
    torch.nn.init.normal_(critic.net[-1].weight)

    def train(weight):
        core.zero_grad()
        state = dni_rl.cut(core.initial_state(B))
        outputs, end, bootstraps = core.unroll_in_ticks(inputs, state, first, ticks=2, critic=critic)
        assert bootstraps.eq(0).all()
        dni_rl.backward(losses_of(outputs) + bootstraps, start=state, end=end, critic=critic, weight=weight)
        return gradients_of(core)

    torch.testing.assert_close(train(1.0), 8.0 * train(1 / 8))


def test_critic_learns_from_dense_targets(core, inputs, first):
    critic = GradientCritic(state_sizes=core.state_sizes).double()
    _, reports = in_windows(core, inputs, first, 12, 2, critic)
    assert all(report.target_norm > 0 for report in reports)
    assert any(p.grad is not None and p.grad.ne(0).any() for p in critic.parameters())


@pytest.mark.parametrize("lambda_", [0.0, 0.6])
def test_mixed_targets_follow_their_recursion_across_the_cuts_of_levels(core, inputs, first, lambda_):
    ticks, taught = 2, []
    torch.manual_seed(2)
    critic = GradientCritic(
        state_sizes=core.state_sizes, target_lambda=lambda_, gradient_discount=0.9, normalize_targets=False
    ).double()
    for p in critic.parameters():
        torch.nn.init.normal_(p, std=0.3)
    fit = critic.fit
    critic.fit = lambda state, target, *rest: taught.append(target) or fit(state, target, *rest)
    start = dni_rl.cut(core.initial_state(B))
    outputs, end, bootstraps = core.unroll_in_ticks(inputs, start, first, ticks=ticks, critic=critic)
    dni_rl.backward(losses_of(outputs) + bootstraps, start=start, end=end, critic=critic, weight=0.5)
    found = [g.view(T, B, -1) for g in taught[0]]

    steps, state = [], core.initial_state(B)
    for x, starts in zip(inputs, first, strict=True):  # one step each, by autograd
        before = dni_rl.cut(tuple(s.detach().masked_fill(starts.unsqueeze(-1), 0.0) for s in state))
        output, state = core(x, before)
        steps.append((before, losses_of(output).sum(), state))
    carried = critic.synthetic_gradient(tuple(s.detach() for s in state))
    for t in reversed(range(T)):
        before, loss, after = steps[t]
        arrived = torch.autograd.grad(  # the clock has no graph
            [loss, *after[:-1]], before, [None, *carried[:-1]], allow_unused=True, materialize_grads=True
        )
        valid = ~first[t]
        for actual, expected in zip(found, arrived, strict=True):
            torch.testing.assert_close(actual[t, valid], expected[valid], rtol=1e-10, atol=1e-12)
        b = critic.synthetic_gradient(tuple(s.detach() for s in before), None, valid)
        mixed = [torch.lerp(there, here, lambda_) * valid.unsqueeze(-1) for there, here in zip(b, arrived, strict=True)]
        for part, period in zip(core._level_slices, core.periods, strict=True):
            if t % (ticks * period) == 0:  # what the cut replaced
                mixed[part] = b[part]
        carried = mixed


def test_steps_equal_unroll(core, inputs, first):
    fast, _ = core.unroll(inputs, core.initial_state(B), first)
    slow, _ = unroll_stepwise(core, inputs, core.initial_state(B), first)
    torch.testing.assert_close(fast, slow)


def test_autocast_keeps_the_precision_of_the_state():
    core = MultiTimescaleCore(D, (2, 2), (1, 3), message="mean")
    state = dni_rl.cut(core.initial_state(B))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, end, _ = core.unroll_in_ticks(torch.randn(6, B, D), state, ticks=2)
    assert outputs.dtype == torch.float32 and all(s.dtype == torch.float32 for s in end)
    outputs.sum().backward()
    assert all(s.grad.isfinite().all() for s in state[:-1])


def test_bfloat16_keeps_the_clock(inputs):
    core = MultiTimescaleCore(D, (2, 2), (1, 256)).bfloat16()
    x = torch.zeros(600, 1, D, dtype=torch.bfloat16)
    with torch.no_grad():
        _, end = core.unroll(x, core.initial_state(1))
    assert end[-1].item() == 600 - 2 * 256


def test_chrono_initialisation_counts_in_ticks():
    core = MultiTimescaleCore(D, (64, 64, 64), (1, 8, 40), chrono_max=80.0)
    default = core.levels[2]
    for cell, ticks in zip(core.levels[:2], (80.0, 10.0), strict=True):
        b_i, b_f, *rest = (cell.bias_ih + cell.bias_hh).view(4, 64)
        assert b_i.equal(-b_f) and b_f.min() >= 0 and b_f.max() <= torch.tensor(ticks - 1).log()
        assert not torch.stack(rest).any()
    assert default.bias_ih.abs().max() <= 64**-0.5  # two ticks: left as it was
    with pytest.raises(ValueError, match="chrono_max: found 2"):
        MultiTimescaleCore(D, (2,), (1,), chrono_max=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 3), (1,)), "periods: expected"),
        (((3, 3), (2, 4)), "periods: expected"),
        (((3, 3), (0, 8)), "periods: expected"),
        (((3, 3), ()), "periods: expected"),
        (((3, 3, 3), (1, 4, 6)), "periods: expected"),
        (((3, 3), 8), "periods: expected .* got 8"),
        (((3, 3), (1, 2.0)), "periods: expected"),
        (((3, 0), (1, 2)), "hidden_sizes: expected"),
        ((8, (1,)), "hidden_sizes: expected positive integers, got 2, 8"),
        (((3, 3), (1, 2), "sum"), "message: found 'sum'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiTimescaleCore(D, *arguments[:2], **({"message": arguments[2]} if len(arguments) > 2 else {}))


def test_ticks_below_one_are_refused(core, inputs):
    with pytest.raises(ValueError, match="ticks: found 0"):
        core.unroll_in_ticks(inputs, core.initial_state(B), ticks=0)


def test_interface_critics_without_a_window_to_be_bounded_by_are_refused(inputs):
    core = MultiTimescaleCore(D, (3, 2), (1, 2)).double()
    critics = [GradientCritic(state_sizes=(size,), max_norm_ratio=1.0).double() for size in core.hidden_sizes[:-1]]
    with pytest.raises(ValueError, match=r"interface_critics: found max_norm_ratio=1\.0, allowed None"):
        core.unroll_in_ticks(inputs, core.initial_state(B), ticks=2, interface_critics=critics)


# Interfaces between levels ---------------------------------------------------------------------------------------------


class MessageOracle(GradientCritic):
    """Knows the true gradient of every message of one interface, [T, B, size]; asked once a step, in order."""

    def __init__(self, truth):
        super().__init__(state_sizes=(truth.shape[-1],))
        self.answers = list(truth)

    def synthetic_gradient(self, state, context=None, alive=None):
        return (torch.where(alive.unsqueeze(-1), self.answers.pop(0), 0.0),)


def true_message_gradients(core, inputs, first):
    """From one graph over the whole sequence, by hooks on the edges from level to level."""
    found = [torch.zeros(T, B, cell.hidden_size).double() for cell in core.levels[:-1]]
    taken = 0

    def interface(level, message, heard):
        edge, t = message.view_as(message), taken
        edge.register_hook(lambda g: found[level - 1].__setitem__(t, torch.zeros_like(message) if g is None else g))
        return edge

    def step(x, state):
        nonlocal taken
        result = core._step(x, state, interface)
        taken += 1
        return result

    outputs, _ = unroll_stepwise(step, inputs, dni_rl.cut(core.initial_state(B)), first)
    losses_of(outputs).sum().backward()
    core.zero_grad()
    return found


def unroll_with_interfaces(core, inputs, first, interface_critics, critic=None, ticks=T, weight=1.0):
    core.zero_grad()
    state = dni_rl.cut(core.initial_state(B))
    steps = torch.arange(T + 1.0, dtype=inputs.dtype).view(-1, 1, 1).expand(-1, B, 1) if critic is not None else None
    outputs, end, bootstraps = core.unroll_in_ticks(
        inputs, state, first, ticks=ticks, critic=critic, context=steps, interface_critics=interface_critics
    )
    (weight * (losses_of(outputs) + bootstraps)).sum().backward()
    return gradients_of(core), end


@pytest.mark.parametrize("ticks", [T, 2])
def test_oracles_at_interfaces_and_over_time_give_full_bptt(core, inputs, first, ticks):
    truth, at_states = full_bptt(core, inputs, first)
    messages = true_message_gradients(core, inputs, first)
    critic = Oracle(core.state_sizes, at_states).double()
    found, end = unroll_with_interfaces(core, inputs, first, [MessageOracle(m) for m in messages], critic, ticks)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    for history, true in zip(end.interfaces, messages, strict=True):
        torch.testing.assert_close(history.gradients[0], true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ticks", [T, 2])
def test_zero_critics_at_interfaces_cut_the_messages(core, inputs, first, ticks):
    losses_of(reference(core, inputs, first, ticks, cut_messages=True)).sum().backward()
    expected = gradients_of(core)
    zeros = [GradientCritic(state_sizes=(cell.hidden_size,)).double() for cell in core.levels[:-1]]
    found, _ = unroll_with_interfaces(core, inputs, first, zeros, ticks=ticks)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_interface_critics_learn_what_arrives_where_it_is_heard(inputs, first):
    torch.manual_seed(0)
    core = MultiTimescaleCore(D, (3, 2), (1, 3)).double()
    losses = []
    for weight in (1.0, 0.25):
        critics = [GradientCritic(state_sizes=(3,), normalize_targets=False).double()]
        _, end = unroll_with_interfaces(core, inputs, first, critics, weight=weight)
        history = end.interfaces[0]
        target = history.gradients[0] / weight
        heard = history.valid
        assert heard.float().mean() < 0.5 and target[~heard].eq(0).all() and target[heard].ne(0).any()
        before = gradients_of(core)
        (fit,) = fit_interfaces(end, critics, weight=weight)
        torch.testing.assert_close(fit.loss, target[heard].square().mean())  # predictions are zero
        assert gradients_of(core).equal(before) and critics[0].net[-1].weight.grad.ne(0).any()
        losses.append(fit.loss)
    torch.testing.assert_close(*losses)
    with pytest.raises(RuntimeError, match="fit_interfaces: found no gradient at the messages"):
        fit_interfaces(end, critics)  # once more
    with pytest.raises(ValueError, match="critics: expected those of the window's 1"):
        fit_interfaces(end, [])
    with pytest.raises(ValueError, match="critics: expected those of the window's 0 interfaces, got 1"):
        fit_interfaces(core.unroll(inputs, core.initial_state(B))[1], critics)
    with pytest.raises(ValueError, match="interface_critics: expected one for each of 1"):
        core.unroll_in_ticks(inputs, core.initial_state(B), ticks=2, interface_critics=[])


def test_interface_critics_are_not_taught_before_the_backward_pass(inputs, first):
    core = MultiTimescaleCore(D, (3, 2), (1, 3)).double()
    critics = [GradientCritic(state_sizes=(3,)).double()]
    _, end, _ = core.unroll_in_ticks(inputs, core.initial_state(B), first, ticks=T, interface_critics=critics)
    with pytest.raises(RuntimeError, match="fit_interfaces: found no gradient at the messages of this window"):
        fit_interfaces(end, critics)


def test_a_window_in_which_nothing_is_heard_has_nothing_to_teach(inputs):
    core = MultiTimescaleCore(D, (3, 2), (1, 8)).double()
    critics = [GradientCritic(state_sizes=(3,)).double()]
    state = dni_rl.cut(core.initial_state(B))
    _, state = core.unroll(inputs[:1], state)  # the upper level ticks here, and 8 steps later
    start = dni_rl.cut(state)
    outputs, end, bootstraps = core.unroll_in_ticks(inputs[1:5], start, ticks=4, interface_critics=critics)
    dni_rl.backward(losses_of(outputs) + bootstraps, start=start, end=end)
    assert not end.interfaces[0].valid.any()
    (fit,) = fit_interfaces(end, critics)
    assert fit.loss == 0


def test_a_frozen_level_below_has_interfaces_that_nothing_arrives_at(inputs):
    core = MultiTimescaleCore(D, (3, 2), (1, 3)).double()
    core.levels[0].requires_grad_(False)
    core.levels[0].weight_ih.data[:, D:] = 0.0
    critics = [GradientCritic(state_sizes=(3,)).double()]
    state = core.initial_state(B)
    outputs, end, _ = core.unroll_in_ticks(inputs[:1], state, ticks=1, interface_critics=critics)
    assert not outputs.requires_grad
    (fit,) = fit_interfaces(end, critics)
    assert fit.target_norm == 0


def test_interface_critics_leave_with_the_scale_and_learn_targets_without_it(inputs, first):
    torch.manual_seed(0)
    core = MultiTimescaleCore(D, (3, 2), (1, 3)).double()
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        core.zero_grad()
        critics = [GradientCritic(state_sizes=(3,)).double()]
        state = dni_rl.cut(core.initial_state(B))
        outputs, end, bootstraps = core.unroll_in_ticks(inputs, state, first, ticks=T, interface_critics=critics)
        dni_rl.backward(losses_of(outputs) + bootstraps, start=state, end=end, weight=0.25, scaler=scaler)
        (fit,) = fit_interfaces(end, critics, weight=0.25, scaler=scaler)
        scale = 1.0 if scaler is None else 1024.0
        found.append((fit.loss.detach(), critics[0].target_rms, critics[0].net[-1].weight.grad / scale))
    assert found[0][2].ne(0).any()
    torch.testing.assert_close(found[1], found[0])
    with pytest.raises(ValueError, match=r"weight: found -1\.0, allowed above 0"):
        fit_interfaces(end, critics, weight=-1.0)
