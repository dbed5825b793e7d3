import copy
import dataclasses

import pytest
import torch

import dni_rl
from dni_rl import GRU, LSTM, Core, GradientCritic
from dni_rl.bp_lambda import bp_lambda_backward, bp_lambda_trace, state_jacobian

T, B, D, Z = 7, 3, 2, 2
CORES = [lambda: LSTM(D, 2), lambda: GRU(D, 3), lambda: LSTM(D, 2, 2)]


@pytest.fixture(params=CORES, ids=["lstm", "gru", "2lstm"])
def core(request):
    torch.manual_seed(0)
    return request.param().double()


def random_critic(core, **settings):
    torch.manual_seed(1)
    settings = {"gradient_discount": 0.9, "scale": 0.8, "normalize_targets": False} | settings
    critic = GradientCritic(state_sizes=core.state_sizes, **settings).double()
    for p in critic.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return critic


@pytest.fixture
def inputs():
    return torch.randn(T, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def context():
    return torch.randn(T + 1, B, Z, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def losses_of(outputs):
    return (outputs - 0.3).square().sum(-1)


def start_state(core):
    """Not zeros: the first prediction has features to learn from."""
    torch.manual_seed(4)
    return tuple(torch.randn_like(s) for s in core.initial_state(B))


def run(core, inputs, critic, lambda_, first=None, alive=None, context=None, length=1, state=None, trace=None):
    """The backward view, online, parameters fixed: critic and model gradients, summed over steps."""
    steps = len(inputs)
    state = start_state(core) if state is None else state
    trace = bp_lambda_trace(critic, B) if trace is None else trace
    for t in range(0, steps, length):
        state = dni_rl.cut(state)
        window = slice(t, t + length)
        starts = None if first is None else first[window]
        outputs, end = core.unroll(inputs[window], state, starts)
        last = t + length == steps
        _, trace = bp_lambda_backward(
            losses_of(outputs),
            start=state,
            end=end,
            critic=critic,
            trace=trace,
            lambda_=lambda_,
            first=starts,
            alive=torch.zeros(B) if last else None if alive is None else alive[t],
            context=None if context is None else context[t : t + length + 1],
            weight=1.0,
        )
        state = end
    return take(critic), take(core)


def take(module):
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return gradients


def forward_view(core, inputs, critic, lambda_, context=None):
    """Straight from the definition: all states, Jacobians and lambda targets, then one regression."""
    states = [start_state(core)]
    jacobians, immediate = [], []
    for x in inputs:
        leaves = dni_rl.cut(states[-1])
        output, nxt = core(x, leaves)
        joined = torch.cat(nxt, -1)
        r = torch.autograd.grad(losses_of(output).sum(), leaves, retain_graph=True, materialize_grads=True)
        rows = [
            torch.cat(torch.autograd.grad(joined[:, i].sum(), leaves, retain_graph=True, materialize_grads=True), -1)
            for i in range(joined.shape[1])
        ]
        immediate.append(torch.cat(r, -1))
        jacobians.append(torch.stack(rows, 1))
        states.append(tuple(s.detach() for s in nxt))
    g = critic.gradient_discount * critic.scale
    predict = lambda t: torch.cat(critic(states[t], None if context is None else context[t]), -1)  # noqa: E731
    target = torch.zeros_like(immediate[0])  # G_T = 0
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(len(inputs) - 1, -1, -1):
        bootstrap = predict(t + 1).detach() if t + 1 < len(inputs) else torch.zeros_like(target)
        mixed = g * ((1 - lambda_) * bootstrap + lambda_ * target)
        target = immediate[t] + torch.einsum("bi,bij->bj", mixed, jacobians[t])
        loss = loss + (predict(t) - target).square().mean()
    loss.backward()
    return take(critic)


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_backward_view_equals_forward_view(core, inputs, lambda_):
    critic = random_critic(core)
    expected = forward_view(core, inputs, critic, lambda_)
    torch.testing.assert_close(run(core, inputs, critic, lambda_)[0], expected, rtol=1e-10, atol=1e-12)


def test_backward_view_equals_forward_view_with_context(core, inputs, context):
    critic = random_critic(core, context_size=Z)
    expected = forward_view(core, inputs, critic, 0.7, context)
    found, _ = run(core, inputs, critic, 0.7, context=context)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_lambda_one_regresses_on_full_bptt(core, inputs):
    critic = random_critic(core, gradient_discount=1.0, scale=1.0)
    outputs, end = core.unroll(inputs, dni_rl.cut(start_state(core)))
    losses_of(outputs).sum().backward()
    core.zero_grad()
    predicted = torch.cat(critic(end.history.states), -1)
    (predicted - torch.cat(end.history.gradients, -1)).square().mean((1, 2)).sum().backward()
    expected = take(critic)
    torch.testing.assert_close(run(core, inputs, critic, 1.0)[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 7])
def test_lambda_zero_is_the_plain_critic_and_the_model_always_is(core, inputs, length):
    critic = random_critic(core, dense_targets=False)
    state = start_state(core)
    reports = []
    for t in range(0, T, length):
        state = dni_rl.cut(state)
        outputs, end = core.unroll(inputs[t : t + length], state)
        alive = torch.zeros(B) if t + length == T else None
        reports.append(
            dni_rl.backward(losses_of(outputs), start=state, end=end, critic=critic, alive=alive, weight=1.0)
        )
        state = end
    expected = take(critic), take(core)
    torch.testing.assert_close(run(core, inputs, critic, 0.0, length=length), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(run(core, inputs, critic, 0.8, length=length)[1], expected[1], rtol=1e-10, atol=1e-12)


def test_reports_agree_with_the_plain_critic(inputs):
    core = LSTM(D, 2).double()
    reports = []
    for plain in (True, False):
        critic = random_critic(core, dense_targets=False)
        state = dni_rl.cut(start_state(core))
        outputs, end = core.unroll(inputs[:1], state)
        arguments = {"start": state, "end": end, "critic": critic}
        if plain:
            reports.append(dni_rl.backward(losses_of(outputs), **arguments))
        else:
            trace = bp_lambda_trace(critic, B)
            reports.append(bp_lambda_backward(losses_of(outputs), trace=trace, lambda_=0.5, **arguments)[0])
    torch.testing.assert_close(reports[0].as_dict(), reports[1].as_dict())


def test_episodes_do_not_mix(inputs):
    """Two episodes in one stream give the critic what they give one by one, each over rows of its own."""
    torch.manual_seed(0)
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    first, alive = torch.zeros(T, B, dtype=torch.bool), torch.ones(T, B)
    first[3], alive[2] = True, 0.0
    joined, joined_model = run(core, inputs, critic, 0.9, first=first, alive=alive)
    head, head_model = run(core, inputs[:3], critic, 0.9)
    tail_first = torch.zeros(T - 3, B, dtype=torch.bool)
    tail_first[0] = True
    tail, tail_model = run(core, inputs[3:], critic, 0.9, first=tail_first)
    torch.testing.assert_close(joined, [a + b for a, b in zip(head, tail, strict=True)])
    torch.testing.assert_close(joined_model, [a + b for a, b in zip(head_model, tail_model, strict=True)])


def test_where_episodes_start_is_read_off_the_window_unless_it_is_given(inputs):
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    first = torch.zeros(1, B, dtype=torch.bool)
    first[0, 0] = True
    found = []
    for given in ({"first": first}, {}):
        state = dni_rl.cut(start_state(core))
        outputs, end = core.unroll(inputs[:1], state, first)
        settings = {"start": state, "end": end, "critic": critic, "trace": bp_lambda_trace(critic, B), "lambda_": 0.5}
        report, trace = bp_lambda_backward(losses_of(outputs), **settings, **given)
        found.append((report.as_dict(), trace, take(critic)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_step_between_two_episodes_is_no_error_of_the_first(inputs):
    """As environments have it that end an episode with a step of its own, whose loss does not count."""
    torch.manual_seed(0)
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    first, alive = torch.zeros(5, B, dtype=torch.bool), torch.ones(5, B)
    first[4], alive[2], alive[3] = True, 0.0, 0.0  # step 3 is the one between
    joined = run(core, inputs[:5], critic, 0.9, first=first, alive=alive)[0]
    pieces = []
    for part in (slice(0, 3), slice(3, 5)):  # the end of the episode forgets
        state = start_state(core)
        if part.start:
            with torch.no_grad():
                state = tuple(core.unroll(inputs[: part.start], state)[1])
        pieces.append(run(core, inputs[part], critic, 0.9, first=first[part], alive=alive[part], state=state)[0])
    torch.testing.assert_close(joined, [a + b for a, b in zip(*pieces, strict=True)])


def test_a_state_between_two_episodes_teaches_nothing(inputs):
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    state = dni_rl.cut(start_state(core))
    outputs, end = core.unroll(inputs[:1], state)
    alive = torch.ones(2, B)
    alive[0] = 0.0
    report, _ = bp_lambda_backward(
        losses_of(outputs),
        start=state,
        end=end,
        critic=critic,
        trace=bp_lambda_trace(critic, B),
        lambda_=0.9,
        alive=alive,
    )
    assert all(p.grad.count_nonzero() == 0 for p in critic.parameters())
    assert report.critic_loss == 0.0


def test_alive_may_be_of_any_type_and_any_number(inputs):
    """0 or not, as everywhere."""
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    found = []
    for alive in (torch.tensor([True, False, True]), torch.tensor([1, 0, 1]), torch.tensor([0.5, 0.0, 7.0])):
        state = dni_rl.cut(start_state(core))
        outputs, end = core.unroll(inputs[:1], state)
        settings = {"trace": bp_lambda_trace(critic, B) + 0.1, "lambda_": 0.9, "alive": alive}
        report, trace = bp_lambda_backward(losses_of(outputs), start=state, end=end, critic=critic, **settings)
        found.append((report.as_dict(), trace, take(critic)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("module", [torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3)])
def test_the_jacobian_in_one_pass_is_that_of_a_deterministic_core(module):
    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.module = torch.nn.GRUCell(D, 3), module

        def forward(self, x, state):
            h = self.module(self.cell(x, state[0]))
            return h, (h,)

    core = dni_rl.wrap(Cell(), state_sizes=(3,), input_size=D, output_size=3)
    with pytest.raises(
        ValueError, match=rf"^core: found {type(module).__name__} in training mode, allowed one that is"
    ):
        state_jacobian(core, torch.randn(1, B, D), core.initial_state(B))
    assert state_jacobian(core.eval(), torch.randn(1, B, D), core.initial_state(B)).shape == (B, 3, 3)


@pytest.mark.parametrize("how", ["first", "alive"])
@pytest.mark.parametrize("length", [1, 3])
def test_what_was_not_finite_is_forgotten_with_its_episode(inputs, how, length):
    """One observation breaks one sequence; the update is thrown away, and after a reset nothing is left of it."""
    torch.manual_seed(0)
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    results = []
    for broken in (True, False):
        state, trace = start_state(core), bp_lambda_trace(critic, B)
        for t in range(0, 6, length):
            x = inputs[t : t + length].clone()
            if t == 0 and broken:
                x[0, 1] = torch.nan
            first = torch.zeros(length, B, dtype=torch.bool)
            first[0, 1] = t == 3
            state = dni_rl.cut(state)
            outputs, end = core.unroll(x, state, first)
            alive = torch.ones(length + 1, B)
            if how == "alive" and t + length == 3:
                alive[-1, 1] = 0.0
            if t == 3:
                take(core), take(critic)
            _, trace = bp_lambda_backward(
                losses_of(outputs), start=state, end=end, critic=critic, trace=trace, lambda_=0.9, alive=alive
            )
            state = end
        results.append((take(core), take(critic), trace))
    assert all(g.isfinite().all() for part in results[0][:2] for g in part) and results[0][2].isfinite().all()
    torch.testing.assert_close(*results)


def test_a_state_without_graph_has_no_jacobian(inputs):
    """A count of steps in the state, which no gradient passes through."""

    class Counting(Core):
        def __init__(self):
            super().__init__()
            self.cell = torch.nn.Linear(D + 2, 2)
            self.input_size, self.output_size, self.state_sizes = D, 2, (2, 1)

        def forward(self, x, state):
            h = self.cell(torch.cat([x, state[0]], -1)).tanh()
            return h, (h, state[1].detach() + 1.0)

    torch.manual_seed(0)
    core = Counting().double()
    critic = random_critic(core)
    state = dni_rl.cut(start_state(core))
    outputs, end = core.unroll(inputs[:1], state)
    jacobian = state_jacobian(core, inputs[:1], state)
    settings = {"start": state, "end": end, "critic": critic, "trace": bp_lambda_trace(critic, B), "lambda_": 0.9}
    _, trace = bp_lambda_backward(losses_of(outputs), **settings)
    assert jacobian[:, :2, :2].all() and not jacobian[:, 2].any() and not jacobian[:, :, 2].any()
    outputs, end = core.unroll(inputs[:1], state)
    settings |= {"end": end, "jacobian": jacobian}
    torch.testing.assert_close(bp_lambda_backward(losses_of(outputs), **settings)[1], trace)


def test_a_scaler_scales_both_sides_and_nothing_else(inputs):
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu", enabled=False)):
        state = dni_rl.cut(start_state(core))
        outputs, end = core.unroll(inputs[:1], state)
        settings = {"trace": bp_lambda_trace(critic, B), "lambda_": 0.9, "scaler": scaler}
        report, trace = bp_lambda_backward(losses_of(outputs), start=state, end=end, critic=critic, **settings)
        scale = 1024.0 if scaler is not None and scaler.is_enabled() else 1.0
        found.append((report.as_dict(), trace, [g / scale for g in (*take(critic), *take(core))]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_resets_of_single_sequences_at_lambda_zero(inputs):
    """Only rows whose state had a future count, as for the plain critic."""
    torch.manual_seed(0)
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[2, 0], first[4, 1:] = True, True
    results = []
    for plain in (True, False):
        state, trace, losses = start_state(core), bp_lambda_trace(critic, B), []
        for t in range(T):
            state = dni_rl.cut(state)
            outputs, end = core.unroll(inputs[t : t + 1], state, first[t : t + 1])
            alive = ~first[t + 1] if t + 1 < T else torch.zeros(B)
            arguments = {"start": state, "end": end, "critic": critic, "alive": alive}
            if plain:
                report = dni_rl.backward(losses_of(outputs), **arguments)
            else:
                report, trace = bp_lambda_backward(
                    losses_of(outputs), trace=trace, lambda_=0.0, first=first[t : t + 1], **arguments
                )
            losses.append(report.critic_loss)
            state = end
        results.append((take(critic), take(core), losses))
    torch.testing.assert_close(*results)


class Decay(Core):
    """s' = a s. With l = s'^2 / 2 at every step, the future gradient is a^2 / (1 - a^2) s."""

    def __init__(self, a):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.input_size = self.output_size = 1
        self.state_sizes = (1,)

    def forward(self, x, state):
        s = self.a * state[0] + 0.0 * x
        return s, (s,)


@pytest.mark.parametrize("lambda_", [0.0, 0.9])
def test_learns_the_closed_form_online(lambda_):
    torch.manual_seed(0)
    core, a = Decay(0.9), 0.9
    critic = GradientCritic(state_sizes=(1,), normalize_targets=False).double()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    first = torch.zeros(1, 16, dtype=torch.bool)
    trace = bp_lambda_trace(critic, 16)
    for _ in range(12):
        state, trace = (torch.randn(16, 1).double(),), torch.zeros_like(trace)
        for _ in range(12):
            state = dni_rl.cut(state)
            outputs, end = core.unroll(torch.zeros(1, 16, 1).double(), state, first)
            optimizer.zero_grad()
            losses = 0.5 * outputs.square().sum(-1)
            _, trace = bp_lambda_backward(
                losses, start=state, end=end, critic=critic, trace=trace, lambda_=lambda_, first=first
            )
            optimizer.step()
            state = end
    error = (critic.net[0].weight.item() - a**2 / (1 - a**2)) / (a**2 / (1 - a**2))
    assert abs(error) < 0.05 if lambda_ else error < -0.2  # traces are faster


@pytest.mark.parametrize("length", [1, 3])
def test_jacobian_of_any_core(core, inputs, length):
    """All rows at once, by automatic differentiation of one sequence at a time; a reset cuts its sequence alone."""
    first = torch.zeros(length, B, dtype=torch.bool)
    first[-1, 1] = True
    state = start_state(core)
    jacobian = state_jacobian(core, inputs[:length], state, first)
    assert not jacobian.requires_grad
    assert all(p.grad is None for p in core.parameters())
    for b in range(B):

        def after(*before, b=b):
            window = slice(b, b + 1)
            return torch.cat(tuple(core.unroll(inputs[:length, window], before, first[:, window])[1]), dim=-1)[0]

        rows = torch.autograd.functional.jacobian(after, tuple(s[b : b + 1] for s in state))
        torch.testing.assert_close(jacobian[b], torch.cat([r[:, 0] for r in rows], dim=-1), rtol=1e-10, atol=1e-12)
    assert jacobian[1].count_nonzero() == 0 < jacobian[0].count_nonzero()


def test_a_given_jacobian_changes_nothing(core, inputs):
    critic = random_critic(core)
    results = []
    for given in (False, True):
        state = dni_rl.cut(start_state(core))
        trace = bp_lambda_trace(critic, B) + 0.1
        outputs, end = core.unroll(inputs[:1], state)
        settings = {"jacobian": state_jacobian(core, inputs[:1], state)} if given else {}
        _, trace = bp_lambda_backward(
            losses_of(outputs), start=state, end=end, critic=critic, trace=trace, lambda_=0.9, **settings
        )
        results.append((trace, take(critic), take(core)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_autocast_around_it_changes_nothing(inputs):
    torch.manual_seed(0)
    core = LSTM(D, 3)
    found = []
    for enabled in (False, True):
        critic = random_critic(core).float()
        state, trace = tuple(s.float() for s in start_state(core)), bp_lambda_trace(critic, B)
        for t in range(3):
            state = dni_rl.cut(state)
            outputs, end = core.unroll(inputs[t : t + 1].float(), state)
            losses = losses_of(outputs)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                _, trace = bp_lambda_backward(losses, start=state, end=end, critic=critic, trace=trace, lambda_=0.9)
            state = end
        found.append((trace, take(critic), take(core)))
    assert found[1][0].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_only_adds_and_leaves_frozen_parameters_alone(inputs):
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    once = run(core, inputs, critic, 0.5)
    for p in (*core.parameters(), *critic.parameters()):
        p.grad = torch.ones_like(p)
    twice = run(core, inputs, critic, 0.5)
    torch.testing.assert_close([g for part in twice for g in part], [g + 1 for part in once for g in part])
    critic.requires_grad_(False)
    run(core, inputs, critic, 0.5)
    assert all(p.grad is None for p in critic.parameters())


def test_trace_is_not_changed_in_place(inputs):
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    trace = bp_lambda_trace(critic, B).normal_()
    kept = copy.deepcopy(trace)
    run(core, inputs[:1], critic, 0.5, trace=trace)
    assert trace.equal(kept)


def test_a_trace_that_does_not_fit_is_refused():
    critic = GradientCritic(state_sizes=(512, 512), normalize_targets=False)
    with pytest.raises(ValueError, match=r"trace for 64 sequences, .* takes 256.25 GiB, allowed max_bytes=2.00 GiB"):
        bp_lambda_trace(critic, 64)
    small = GradientCritic(state_sizes=(2, 2), normalize_targets=False)
    assert bp_lambda_trace(small, 3, max_bytes=3 * 4 * 4 * 5 * 4).shape == (3, 4, 4, 5)
    with pytest.raises(ValueError, match="max_bytes"):
        bp_lambda_trace(small, 3, max_bytes=3 * 4 * 4 * 5 * 4 - 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_sizes": (4,)}, r"hidden_sizes=\(\)"),
        ({"normalize_targets": True}, "allowed normalize_targets=False"),
        (
            {"normalize_context": True, "context_size": 2},
            "normalize_context=True needs statistics that traces do not keep; .*; allowed normalize_context=False",
        ),
        ({"max_norm_ratio": 1.0}, "allowed max_norm_ratio=None"),
        ({"warmup_updates": 3}, "allowed warmup_updates=0"),
    ],
)
def test_unfit_critics_are_refused(settings, message):
    critic = GradientCritic(state_sizes=(2, 2), **{"normalize_targets": False, **settings})
    with pytest.raises(ValueError, match=message):
        bp_lambda_trace(critic, B)


def test_errors(inputs):
    core = LSTM(D, 2).double()
    critic = random_critic(core)
    state = dni_rl.cut(core.initial_state(B))
    outputs, end = core.unroll(inputs[:1], state)
    good = {"start": state, "end": end, "critic": critic, "trace": bp_lambda_trace(critic, B), "lambda_": 0.5}
    losses = losses_of(outputs)
    for change, message in [
        ({"lambda_": 1.5}, "lambda_: found 1.5"),
        ({"weight": -1.0}, r"weight: found -1\.0, allowed above 0"),
        ({"weight": torch.tensor(0.0)}, r"weight: found 0\.0, allowed above 0"),
        ({"weight": torch.ones(2)}, "weight: expected one number"),
        ({"trace": torch.zeros(2)}, "trace: expected"),
        ({"trace": None}, "trace: found NoneType, allowed what the last call returned"),
        ({"alive": torch.ones(1)}, "alive: expected"),
        ({"context": torch.zeros(2, B, 1)}, "context: got"),
        ({"jacobian": torch.zeros(2)}, "jacobian: expected"),
        ({"first": torch.ones(1, B)}, r"first: found torch.float32, allowed torch.bool; use `first.bool\(\)`"),
    ]:
        with pytest.raises(ValueError, match=message):
            bp_lambda_backward(losses, **(good | change))
    with pytest.raises(ValueError, match=r"losses: expected \[T, B\]"):
        bp_lambda_backward(losses.sum(), **good)
    with pytest.raises(ValueError, match=r"losses: found torch\.float16, allowed torch\.float32"):
        bp_lambda_backward(losses.half(), **good)
    with pytest.raises(ValueError, match=r"critic: found torch\.float32, allowed torch\.float64"):
        bp_lambda_backward(losses, **(good | {"critic": copy.deepcopy(critic).float()}))
    with pytest.raises(RuntimeError, match="start: expected the leaves"):
        bp_lambda_backward(losses, **(good | {"start": tuple(end)}))
    with pytest.raises(RuntimeError, match="no gradient flows"):
        bp_lambda_backward(losses.detach(), **good)
    assert all(dataclasses.is_dataclass(r) for r in [bp_lambda_backward(losses, **good)[0]])


def test_a_start_that_nothing_was_unrolled_from_is_noticed(core, inputs):
    critic, state = random_critic(core), start_state(core)
    settings = {"critic": critic, "trace": bp_lambda_trace(critic, B), "lambda_": 0.5}
    message = "start: no loss depends on it; unroll the core from the very tensors that `dni_rl.cut` returned"
    outputs, end = core.unroll(inputs, dni_rl.cut(state))
    with pytest.raises(RuntimeError, match=message):
        bp_lambda_backward(losses_of(outputs), start=dni_rl.cut(state), end=end, **settings)
    outputs, end = core.unroll(inputs, state)
    with pytest.warns(UserWarning, match=message) as caught:
        bp_lambda_backward(losses_of(outputs), start=dni_rl.cut(state), end=end, **settings)
    assert [w.filename for w in caught] == [__file__], "once, and it shows the line of the call"
