import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from dni_rl import GRU, LSTM, Core, GradientCritic
from dni_rl.cores.timescales import MultiTimescaleCore
from dni_rl.horizon import CreditHorizon, credit_horizon

T, B, K = 13, 3, 4


class LinearRNN(Core):
    """s' = a s + x; output s'. Every gradient is a power of a."""

    def __init__(self, a: float):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.input_size = self.output_size = 1
        self.state_sizes = (1,)

    def forward(self, x, state):
        s = self.a * state[0] + x
        return s, (s,)


class Fixed:
    """Answers as a critic with known gradients, one for each cut [T, B, ...], in the order in which cuts are asked."""

    def __init__(self, gradients, cuts, scale=1.0):
        self.answer = tuple(scale * g[cuts].flatten(0, 1) for g in gradients)

    def synthetic_gradient(self, state, context=None, alive=None):
        assert [s.shape for s in state] == [a.shape for a in self.answer]
        return tuple(torch.where(alive.unsqueeze(-1), a, 0.0) for a in self.answer)


def sum_of_outputs(outputs: Tensor) -> Tensor:
    return outputs.sum(-1)


def squared(outputs: Tensor) -> Tensor:
    return outputs.square().sum(-1)


def oracle(core, loss_fn, inputs, first=None, scale=1.0):
    start = tuple(s.requires_grad_() for s in core.initial_state(inputs.shape[1]))
    outputs, end = core.unroll(inputs, start, first)
    loss_fn(outputs).sum().backward()
    return Fixed(end.history.gradients, slice(0, (len(inputs) - 1) // K * K + 1, K), scale)


@pytest.fixture
def inputs():
    return torch.randn(T, B, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def first():
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0], first[6, 1], first[8, 2] = True, True, True  # in a window, and at a cut
    return first


def naive(core, loss_fn, inputs, first) -> dict[tuple[int, int], Tensor]:
    """d l_t / d s_j by one graph for each pair, straight from the definition; only pairs in one episode."""
    gradients = {}
    for j in range(T):
        for t in range(j, T):
            state = core.initial_state(B)
            if j:
                _, state = core.unroll(inputs[:j], state, first[:j])
            leaves = tuple(s.detach().requires_grad_() for s in state)
            outputs, _ = core.unroll(inputs[j : t + 1], leaves, first[j : t + 1])
            g = torch.autograd.grad(loss_fn(outputs)[-1].sum(), leaves, allow_unused=True, materialize_grads=True)
            gradients[j, t] = torch.cat(g, -1)
    return gradients


def test_linear_rnn_has_the_closed_form(inputs):
    """d s_{t+1} / d s_j = a^(t + 1 - j) = a^n, delivered where t is far enough from the cut before it."""
    core, a = LinearRNN(0.8), 0.8
    horizon = credit_horizon(core, sum_of_outputs, inputs[:12], window=K, loss_times=range(12))
    lags = torch.arange(1, 13, dtype=torch.float64)
    torch.testing.assert_close(horizon.true_norm, a**lags)
    torch.testing.assert_close(horizon.num_pairs, B * (13 - lags))
    # of the 13 - n losses with a state n steps back, those with t mod K >= n
    share = torch.tensor([sum(t % K >= n for t in range(n - 1, 12)) / (13 - n) for n in range(1, 13)]).double()
    torch.testing.assert_close(horizon.delivered_norm, a**lags * share.sqrt())
    torch.testing.assert_close(horizon.cosine, share.sqrt())
    assert horizon.effective_horizon == 3 - (share[2] <= 0.25).int()
    assert horizon.delivered_norm[K - 1 :].eq(0).all()


def test_long_windows_tend_to_the_documented_cosine():
    long = torch.zeros(400, 1, 1, dtype=torch.float64)
    horizon = credit_horizon(LinearRNN(1.0), sum_of_outputs, long, window=10, num_lags=12)
    expected = torch.tensor([math.sqrt(max(10 - n, 0) / 10) for n in range(1, 13)]).double()
    torch.testing.assert_close(horizon.cosine, expected, atol=0.05, rtol=0)
    assert horizon.effective_horizon == 7


@pytest.mark.parametrize(
    "make", [lambda: LSTM(1, 3), lambda: LSTM(1, 2, 2), lambda: GRU(1, 3)], ids=["lstm", "2lstm", "gru"]
)
def test_true_gradient_matches_the_definition(make, inputs, first):
    torch.manual_seed(0)
    core = make().double()
    horizon = credit_horizon(core, squared, inputs, first=first, loss_times=range(T))
    gradients = naive(core, squared, inputs, first)
    for n in range(1, T + 1):
        connected = [(j, j + n - 1, b) for j in range(T - n + 1) for b in range(B) if not first[j : j + n, b].any()]
        assert horizon.num_pairs[n - 1] == len(connected)
        squares = [gradients[j, t][b].square().sum() for j, t, b in connected]
        torch.testing.assert_close(
            horizon.true_norm[n - 1], torch.stack(squares).mean().sqrt() if squares else torch.zeros(()).double()
        )


@pytest.mark.parametrize("make", [lambda: LSTM(1, 3), lambda: GRU(1, 3)], ids=["lstm", "gru"])
def test_an_oracle_delivers_everything(make, inputs, first):
    torch.manual_seed(0)
    core = make().double()
    horizon = credit_horizon(
        core, squared, inputs, first=first, window=K, critic=oracle(core, squared, inputs, first), loss_times=range(T)
    )
    torch.testing.assert_close(horizon.delivered_norm, horizon.true_norm, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(horizon.cosine, (horizon.true_norm > 0).double(), rtol=1e-10, atol=0)
    torch.testing.assert_close(horizon.delivered_share, torch.ones(()).double())
    uncut = credit_horizon(core, squared, inputs, first=first, loss_times=range(T))
    torch.testing.assert_close(uncut.delivered_norm, horizon.true_norm)


def test_no_critic_and_a_zero_critic_deliver_the_window(inputs, first):
    torch.manual_seed(0)
    core = LSTM(1, 3).double()
    plain = credit_horizon(core, squared, inputs, first=first, window=K, loss_times=range(T))
    gradients = naive(core, squared, inputs, first)
    for n in range(1, T + 1):
        rows = [(j, t, b) for j, t in gradients if t - j + 1 == n for b in range(B) if not first[j : t + 1, b].any()]
        inside = sum(gradients[j, t][b].square().sum() for j, t, b in rows if t < math.ceil(j / K) * K)
        expected = (torch.as_tensor(inside).double() / max(len(rows), 1)).sqrt()
        torch.testing.assert_close(plain.delivered_norm[n - 1], expected)
    assert plain.delivered_norm[: K - 1].gt(0).all() and plain.delivered_norm[K - 1 :].eq(0).all()
    critic = GradientCritic(state_sizes=core.state_sizes).double()
    zero = credit_horizon(core, squared, inputs, first=first, window=K, critic=critic, loss_times=range(T))
    for field in dataclasses.fields(CreditHorizon):
        assert getattr(zero, field.name).equal(getattr(plain, field.name))


def test_bootstrap_between_cuts_is_the_critics_vector_through_the_jacobian(inputs):
    """An LSTM, a random critic, one loss at the end: delivered is J^T M(s_k), formed here by hand."""
    torch.manual_seed(0)
    core, critic = LSTM(1, 2).double(), GradientCritic(state_sizes=(2, 2), gradient_discount=0.9).double()
    torch.nn.init.normal_(critic.net[-1].weight)
    T = K + 1  # cut at K, the only loss at K
    only_last = torch.zeros(T, 1, dtype=torch.float64)
    only_last[-1] = 1
    horizon = credit_horizon(
        core, lambda o: squared(o) * only_last, inputs[:T], window=K, critic=critic, loss_times=[T - 1]
    )
    start = tuple(s.requires_grad_() for s in core.initial_state(B))
    _, state = core.unroll(inputs[: K - 1], start)
    leaves = tuple(s.detach().requires_grad_() for s in state)  # s_{K-1}: lag 2
    _, at_cut = core.unroll(inputs[K - 1 : K], leaves)
    outputs, _ = core.unroll(inputs[K : K + 1], at_cut)
    truth = torch.cat(torch.autograd.grad(squared(outputs).sum(), leaves, retain_graph=True), -1)
    b = torch.cat(torch.autograd.grad(tuple(at_cut), leaves, critic.synthetic_gradient(tuple(at_cut))), -1)
    torch.testing.assert_close(horizon.delivered_norm[1], b.square().sum(-1).mean().sqrt())
    torch.testing.assert_close(horizon.cosine[1], torch.cosine_similarity(b.flatten(), truth.flatten(), dim=0))


def test_a_critic_is_told_where_episodes_ended(inputs, first):
    asked = []

    class Listener(GradientCritic):
        def synthetic_gradient(self, state, context=None, alive=None):
            asked.append((context, alive))
            return super().synthetic_gradient(state, context, alive)

    core, context = LSTM(1, 2).double(), torch.arange(T + 1.0).view(-1, 1, 1).expand(-1, B, 1).double()
    critic = Listener(state_sizes=(2, 2), context_size=1).double()
    credit_horizon(core, squared, inputs, first=first, window=K, critic=critic, context=context)
    ((steps, alive),) = asked
    assert steps.view(-1, B)[:, 0].tolist() == [0, K, 2 * K, 3 * K]
    assert alive.view(-1, B).equal(~first[::K])


def test_half_and_reversed_oracles(inputs):
    core = LinearRNN(0.9)
    measure = lambda scale: credit_horizon(  # noqa: E731
        core,
        sum_of_outputs,
        inputs,
        window=K,
        critic=oracle(core, sum_of_outputs, inputs, scale=scale),
        loss_times=[T - 1],
    )
    half, reverse = measure(0.5), measure(-1.0)
    torch.testing.assert_close(half.delivered_norm[K:], 0.5 * half.true_norm[K:])
    torch.testing.assert_close(half.cosine, torch.ones(T).double())
    torch.testing.assert_close(reverse.cosine[K:], -torch.ones(T - K).double())


def test_nothing_is_trained_and_no_grad_is_honoured(inputs):
    core = LSTM(1, 2).double()
    with torch.no_grad():
        credit_horizon(core, squared, inputs, window=2)
    assert all(p.grad is None for p in core.parameters())


def test_margin_leaves_out_late_states(inputs):
    horizon = credit_horizon(LinearRNN(0.9), sum_of_outputs, inputs, margin=5, loss_times=range(T))
    assert horizon.num_pairs[0] == (T - 5) * B and horizon.num_pairs[-1] == B


def test_scalars():
    norm = torch.tensor([4.0, 4.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    horizon = CreditHorizon(norm, norm / 2, torch.tensor([0.9, 0.2, 0.6, 0.5, 0.0]), torch.ones(5))
    scalars = horizon.scalars("credit/")
    assert scalars["credit/horizon"] == 3 and scalars["credit/lag_90"] == 3 and scalars["credit/true_lag_90"] == 3
    assert scalars["credit/delivered_share"] == 0.5
    nothing = CreditHorizon(norm, 0 * norm, 0 * norm, norm)
    assert nothing.effective_horizon == 0 and nothing.lag_90 == 0


def test_loss_times_are_few_and_meet_every_phase():
    horizon = credit_horizon(LinearRNN(0.9), sum_of_outputs, torch.zeros(256, 1, 1).double(), window=8, num_lags=1)
    assert horizon.num_pairs[0] <= 64
    assert horizon.cosine[0] == pytest.approx(math.sqrt(7 / 8), abs=0.02)


class StepOracle(GradientCritic):
    """True gradients [T, B, ...] of every state; the step comes as context."""

    def __init__(self, gradients):
        super().__init__(state_sizes=[g.shape[-1] for g in gradients], context_size=1)
        self.truth = gradients

    def synthetic_gradient(self, state, context=None, alive=None):
        return tuple(g[int(context[0])] * alive.unsqueeze(-1) for g in self.truth)


@pytest.fixture
def levels():
    torch.manual_seed(0)
    return MultiTimescaleCore(1, (3, 2), (1, 3)).double()


def test_one_level_in_ticks_is_a_window(inputs, first):
    core = MultiTimescaleCore(1, (3,), (1,)).double()
    settings = {"first": first, "loss_times": range(T)}
    in_ticks = credit_horizon(core, squared, inputs, unroll=partial(core.unroll_in_ticks, ticks=K), **settings)
    window = credit_horizon(core, squared, inputs, window=K, **settings)
    for field in dataclasses.fields(CreditHorizon):
        torch.testing.assert_close(getattr(in_ticks, field.name), getattr(window, field.name), rtol=1e-9, atol=1e-13)


def test_one_level_in_ticks_is_a_window_with_a_critic(inputs, first):
    """Apart from the state at step 0, which is a cut of the window but belongs to nobody in ticks."""
    torch.manual_seed(0)
    core = MultiTimescaleCore(1, (3,), (1,)).double()
    critic = GradientCritic(state_sizes=core.state_sizes).double()
    torch.nn.init.normal_(critic.net[-1].weight)
    with torch.no_grad():
        critic.net[-1].weight[-1] = 0.0  # no gradient for the clock
    settings = {"first": first, "loss_times": range(T)}
    in_ticks = credit_horizon(
        core, squared, inputs, unroll=partial(core.unroll_in_ticks, ticks=K, critic=critic), **settings
    )
    window = credit_horizon(core, squared, inputs, window=K, critic=critic, **settings)
    for field in dataclasses.fields(CreditHorizon):
        torch.testing.assert_close(getattr(in_ticks, field.name), getattr(window, field.name), rtol=1e-9, atol=1e-13)


def test_an_oracle_in_ticks_delivers_everything(levels, inputs, first):
    start = tuple(s.requires_grad_() for s in levels.initial_state(B))
    outputs, end = levels.unroll(inputs, start, first)
    squared(outputs).sum().backward()
    steps = torch.arange(T + 1.0).double().view(-1, 1, 1).expand(-1, B, 1)
    unroll = partial(levels.unroll_in_ticks, ticks=2, critic=StepOracle(end.history.gradients), context=steps)
    horizon = credit_horizon(levels, squared, inputs, first=first, unroll=unroll, loss_times=range(T))
    torch.testing.assert_close(horizon.delivered_norm, horizon.true_norm, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(horizon.cosine, (horizon.true_norm > 0).double(), rtol=1e-9, atol=0)


def test_slow_levels_deliver_beyond_the_ticks_of_the_lowest(levels, inputs):
    """Windows of 2 ticks: the lowest level alone reaches lag 1, the one of period 3 up to lag 5."""
    horizon = credit_horizon(
        levels, squared, inputs, unroll=partial(levels.unroll_in_ticks, ticks=2), loss_times=range(T)
    )
    assert horizon.delivered_norm[:5].gt(0).all() and horizon.delivered_norm[5:].eq(0).all()
    lowest = credit_horizon(levels, squared, inputs, window=2, loss_times=range(T))
    assert lowest.delivered_norm[1:].eq(0).all()


def test_unroll_replaces_window(levels, inputs):
    with pytest.raises(ValueError, match="unroll: it replaces window="):
        credit_horizon(levels, squared, inputs, window=2, unroll=partial(levels.unroll_in_ticks, ticks=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window: found 0"),
        ({"critic": GradientCritic(state_sizes=(1,))}, "give window="),
        ({"loss_times": [T]}, "loss_times: expected"),
        ({"num_lags": T + 1}, "num_lags: found"),
        ({"margin": T}, "margin: found"),
        ({"context": torch.zeros(T, B, 2)}, "context: expected"),
    ],
)
def test_errors(settings, message, inputs):
    with pytest.raises(ValueError, match=message):
        credit_horizon(LinearRNN(0.9), sum_of_outputs, inputs, **settings)


def test_reduced_losses_are_refused(inputs):
    with pytest.raises(ValueError, match="loss_fn: expected"):
        credit_horizon(LinearRNN(0.9), lambda outputs: outputs.sum(), inputs)
