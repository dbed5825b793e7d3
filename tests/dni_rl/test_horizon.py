import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import Tensor

import dni_rl
from dni_rl import GRU, LSTM, Core, GradientCritic
from dni_rl.cores.timescales import MultiTimescaleCore
from dni_rl.horizon import CreditHorizon, _Method, credit_horizon

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
            state = core.initial_state(inputs.shape[1])
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
    assert plain.expected_cosine is None
    settings = {"first": first, "window": K, "loss_times": range(T), "probe": inputs}
    plain = credit_horizon(core, squared, inputs, **settings)
    critic = GradientCritic(state_sizes=core.state_sizes).double()
    zero = credit_horizon(core, squared, inputs, critic=critic, **settings)
    for field in dataclasses.fields(CreditHorizon):
        assert getattr(zero, field.name).equal(getattr(plain, field.name))
    torch.testing.assert_close(plain.expected_cosine, plain.cosine)  # nothing to be judged one by one or together


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
    has_future = torch.ones(T, B, dtype=torch.bool)
    has_future[K, 0] = has_future[1, 1] = False  # at a cut, and at none
    settings = {"first": first, "window": K, "critic": critic, "context": context}
    credit_horizon(core, squared, inputs, alive=has_future, **settings)
    credit_horizon(
        core, squared, inputs, alive=torch.cat([has_future, torch.zeros(1, B, dtype=torch.bool)]).float(), **settings
    )
    torch.testing.assert_close(asked[-1], asked[-2], rtol=0, atol=0)
    assert asked[1][1].view(-1, B).equal((~first & has_future)[::K])


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


class Maps(Core):
    """Feature maps for states, or the same numbers in a row."""

    shapes = ((2, 3, 3), (1, 3, 3))

    def __init__(self, as_maps):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 3, 3, padding=1)
        self.as_maps, self.input_size, self.output_size, self.state_sizes = as_maps, 3, 18, (18, 9)

    @property
    def state_shapes(self):
        return self.shapes if self.as_maps else super().state_shapes

    def forward(self, x, state):
        h, c = (s.view(-1, *shape) for s, shape in zip(state, self.shapes, strict=True))
        z = self.conv(torch.cat([x, h, c], 1))
        h, c = torch.tanh(z[:, :2]), 0.8 * c + z[:, 2:]
        return h.flatten(1), (h, c) if self.as_maps else (h.flatten(1), c.flatten(1))


def test_feature_maps_have_the_horizon_of_their_numbers():
    torch.manual_seed(0)
    critic = dni_rl.ConvGradientCritic(state_shapes=Maps.shapes).double()
    for p in critic.parameters():
        torch.nn.init.normal_(p)

    class Flat:
        def synthetic_gradient(self, state, context=None, alive=None):
            maps = tuple(s.view(-1, *shape) for s, shape in zip(state, Maps.shapes, strict=True))
            return tuple(g.flatten(1) for g in critic.synthetic_gradient(maps, context, alive))

    x, cores = torch.randn(7, 2, 1, 3, 3).double(), [Maps(True).double(), Maps(False).double()]
    cores[1].load_state_dict(cores[0].state_dict())
    first = torch.zeros(7, 2, dtype=torch.bool)
    first[4, 1] = True
    probe = torch.randn(7, 2, 1)
    maps, flat = (
        credit_horizon(core, lambda y: y.square().sum(-1), x, first=first, window=3, critic=asked, probe=probe)
        for core, asked in zip(cores, (critic, Flat()), strict=True)
    )
    torch.testing.assert_close(dataclasses.asdict(maps), dataclasses.asdict(flat))
    assert maps.delivered_norm[5] > 0.0


def test_nothing_is_trained_and_no_grad_is_honoured(inputs):
    core, critic = LSTM(1, 2).double(), GradientCritic(state_sizes=(2, 2)).double()
    torch.nn.init.normal_(critic.net[0].weight)
    expected = credit_horizon(core, squared, inputs, window=2, critic=critic)
    with torch.no_grad():
        found = credit_horizon(core, squared, inputs, window=2, critic=critic)
    assert found.true_norm[0] > 0.0 and found.delivered_norm[3] > 0.0
    torch.testing.assert_close(dataclasses.asdict(found), dataclasses.asdict(expected))
    assert all(p.grad is None for p in (*core.parameters(), *critic.parameters()))


def test_inference_mode_is_refused(inputs):
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"credit_horizon: found torch\.inference_mode\(\), which records no graph"),
    ):
        credit_horizon(LinearRNN(0.9), sum_of_outputs, inputs)


def test_running_statistics_stay_as_they_were():
    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.norm = torch.nn.GRUCell(1, 4), torch.nn.BatchNorm1d(4)

        def forward(self, x, state):
            h = self.cell(x, state[0])
            return self.norm(h), (h,)

    torch.manual_seed(0)
    core = dni_rl.wrap(Cell(), state_sizes=(4,), input_size=1, output_size=4)
    before = {name: b.clone() for name, b in core.named_buffers()}
    critic = dni_rl.GradientCritic(state_sizes=(4,))
    credit_horizon(core, squared, torch.randn(12, 8, 1), window=4, critic=critic)
    torch.testing.assert_close(dict(core.named_buffers()), before, rtol=0, atol=0)
    core.unroll(torch.randn(2, 8, 1), core.initial_state(8))
    assert not core.cell.norm.running_mean.equal(before["cell.norm.running_mean"])


def test_a_module_that_was_not_wrapped_is_refused(inputs):
    for state in (None, (torch.zeros(B, 2),) * 2):
        with pytest.raises(
            ValueError, match=r"core: found LSTM without `unroll`, allowed a core; use dni_rl\.wrap\(module\)"
        ):
            credit_horizon(torch.nn.LSTM(1, 2), squared, inputs, state)


def test_margin_leaves_out_late_states(inputs):
    horizon = credit_horizon(LinearRNN(0.9), sum_of_outputs, inputs, margin=5, loss_times=range(T))
    assert horizon.num_pairs[0] == (T - 5) * B and horizon.num_pairs[-1] == B


def test_scalars():
    norm = torch.tensor([4.0, 4.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    horizon = CreditHorizon(norm, norm / 2, torch.tensor([0.9, 0.2, 0.6, 0.5, 0.0]), torch.ones(5))
    scalars = horizon.scalars("credit/")
    assert scalars["credit/horizon"] == 3 and scalars["credit/lag_90"] == 3 and scalars["credit/true_lag_90"] == 3
    assert scalars["credit/delivered_share"] == 0.5
    assert horizon.expected_horizon is None and "credit/expected_horizon" not in scalars
    nothing = CreditHorizon(norm, 0 * norm, 0 * norm, norm)
    assert nothing.effective_horizon == 0 and nothing.lag_90 == 0
    both = dataclasses.replace(horizon, expected_cosine=torch.tensor([0.9, 0.7, 0.6, 0.51, 0.5]))
    assert both.scalars("credit/") == scalars | {"credit/expected_horizon": 4}


def test_loss_times_are_few_and_meet_every_phase():
    horizon = credit_horizon(LinearRNN(0.9), sum_of_outputs, torch.zeros(256, 1, 1).double(), window=8, num_lags=1)
    assert horizon.num_pairs[0] <= 64
    assert horizon.cosine[0] == pytest.approx(math.sqrt(7 / 8), abs=0.02)


# Averages over sequences


def expected_by_hand(core, true, inputs, first, answer, probe):
    """The equations of the docstring from `true`, what `naive` found; b(j) and T(j) without the history of the core."""
    B = inputs.shape[1]
    z = (probe - probe.flatten(0, 1).mean(0)) / probe.flatten(0, 1).std(0, correction=0)
    state, states = core.initial_state(B), []
    for t in range(T):
        state = tuple(torch.where(first[t].unsqueeze(-1), 0.0, s) for s in state)
        states.append(tuple(s.detach() for s in state))
        state = core(inputs[t], state)[1]
    b, tail = torch.zeros(2, T, B, sum(core.state_sizes), dtype=torch.float64)
    for j in range(T):
        k = math.ceil(j / K) * K
        if k >= T:
            continue
        tail[j] = sum(true[j, t] * ~first[j : t + 1].any(0).unsqueeze(-1) for t in range(k, T))
        leaves = tuple(s.requires_grad_() for s in states[j])
        at_cut = leaves if k == j else core.unroll(inputs[j:k], leaves, first[j:k])[1]
        at_cut = tuple(torch.where(first[k].unsqueeze(-1), 0.0, s) for s in at_cut)
        synthetic = tuple(a.unflatten(0, (-1, B))[k // K] * ~first[k].unsqueeze(-1) for a in answer)
        carried = torch.autograd.grad(at_cut, leaves, synthetic, allow_unused=True, materialize_grads=True)
        b[j] = torch.cat(carried, -1) * ~first[j].unsqueeze(-1)
    cosines = []
    for n in range(1, T + 1):
        x, y = torch.zeros(2, B, z.shape[-1], b.shape[-1], dtype=torch.float64)
        near = rest = torch.zeros((), dtype=torch.float64)
        for j, i in [(j, i) for j in range(T - n + 1) for i in range(B) if not first[j : j + n, i].any()]:
            square = true[j, j + n - 1][i].square().sum()
            if j + n - 1 < math.ceil(j / K) * K:
                near = near + square
            else:
                rest = rest + square
                x[i] += torch.outer(z[j, i], b[j, i])
                y[i] += torch.outer(z[j, i], tail[j, i])
        X, Y = x.sum(0), y.sum(0)
        inner, square = (X * Y).sum(), Y.square().sum()
        without = torch.stack([((X - x[i]) * (Y - y[i])).sum() * (B / (B - 1)) ** 2 for i in range(B)])
        error = ((B - 1) / B * (without - without.mean()).square().sum()).sqrt()
        a = inner / square if inner > 3.0 * error else 0.0
        q = X.square().sum() / square if square else 0.0
        joint = ((near + rest) * (near + q * rest)).sqrt()
        cosines.append((near + a * rest) / joint if joint else joint)
    return torch.stack(cosines)


class Told(Fixed):
    """Answers with what it is told: the context is the synthetic gradient."""

    def __init__(self):
        pass

    def synthetic_gradient(self, state, context=None, alive=None):
        return (context * alive.unsqueeze(-1),)


def noisy(sequences, horizon=40, decay=0.95, noise=4.0, seed=0):
    """One loss at the end of a linear RNN, whose gradient is a cue of +-1 plus noise, by sequence: the truth is the cue."""
    generator = torch.Generator().manual_seed(seed)
    cue = torch.randint(2, (sequences,), generator=generator).double() * 2 - 1
    weight = cue + noise * torch.randn(sequences, dtype=torch.float64, generator=generator)
    last = torch.zeros(horizon, 1, dtype=torch.float64)
    last[-1] = 1.0
    to_end = decay ** torch.arange(horizon, -1, -1.0).double().view(-1, 1, 1)  # [T + 1, 1, 1]

    def measure(prediction, **settings):
        return credit_horizon(
            LinearRNN(decay),
            lambda outputs: outputs.sum(-1) * last * weight,
            torch.zeros(horizon, sequences, 1, dtype=torch.float64),
            window=K,
            critic=Told(),
            context=prediction.view(1, -1, 1) * to_end,
            loss_times=[horizon - 1],
            **{"probe": cue.view(1, -1, 1).expand(horizon, -1, -1)} | settings,
        )

    return cue, generator, measure


@pytest.fixture
def cued():
    """Inputs, a probe of a cue and of something else, and losses whose gradients have the cue's sign, of sixteen sequences."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(T, 16, 1, dtype=torch.float64, generator=generator)
    probe = torch.randn(T, 16, 2, dtype=torch.float64, generator=generator)
    probe[..., 0] = torch.tensor([-1.0, 1.0]).repeat(8)
    return inputs, probe, lambda outputs: outputs.sum(-1) * probe[: len(outputs), :, 0]


def test_expected_cosine_matches_the_definition(cued):
    """With the truth and ever more noise in the critic's place, so that some of it is told from chance and some is not."""
    torch.manual_seed(0)
    (inputs, probe, loss_fn), core = cued, LSTM(1, 2).double()
    first = torch.zeros(T, 16, dtype=torch.bool)
    first[0], first[6, 1], first[8, 2] = True, True, True
    measured, by_hand, true = [], [], naive(core, loss_fn, inputs, first)
    for noise in torch.linspace(0.0, 3.0, 10):
        critic = oracle(core, loss_fn, inputs, first)
        critic.answer = tuple(a + noise * a.std() * torch.randn_like(a) for a in critic.answer)
        settings = {"first": first, "window": K, "critic": critic, "loss_times": range(T)}
        measured.append(credit_horizon(core, loss_fn, inputs, probe=probe, **settings).expected_cosine)
        by_hand.append(expected_by_hand(core, true, inputs, first, critic.answer, probe))
    torch.testing.assert_close(torch.stack(measured), torch.stack(by_hand), rtol=1e-9, atol=1e-12)
    beyond = torch.stack(measured)[:, K:11]
    assert beyond.gt(0).any() and beyond.eq(0).any()


def test_what_critics_cannot_foresee_does_not_count_against_them():
    """A critic that predicts the expectation, where noise has four times its size: 1 / sqrt(17) one by one."""
    cue, _, measure = noisy(500)
    horizon = measure(cue)
    assert horizon.effective_horizon < K and horizon.cosine[20] == pytest.approx(1 / math.sqrt(17), abs=0.1)
    assert horizon.expected_horizon == 40 and horizon.expected_cosine[K:].min() > 0.99
    tiny = measure(1e-3 * cue)  # cosines know no size
    torch.testing.assert_close(tiny.expected_cosine[K:], horizon.expected_cosine[K:])


def test_critics_that_do_not_know_what_is_to_be_remembered_deliver_the_window():
    for seed in range(5):
        cue, generator, measure = noisy(500, seed=seed)
        for prediction in (
            torch.ones(500).double(),  # the same whatever the cue
            torch.randn(500, dtype=torch.float64, generator=generator),
            -cue,
        ):
            assert measure(prediction).expected_horizon < K
    right_in_half = torch.where(torch.rand(500, generator=generator) < 0.5, cue, 0.0)
    assert measure(right_in_half + torch.ones(500)).expected_horizon == 40


def test_what_cannot_be_told_from_chance_is_not_delivered():
    found = []
    for seed in range(20):
        cue, _, measure = noisy(8, noise=20.0, seed=seed)
        found.append(measure(cue).expected_horizon)
    assert sum(h > K for h in found) <= 3


def test_an_oracle_delivers_everything_in_expectation(cued, levels):
    torch.manual_seed(0)
    (inputs, probe, loss_fn), core = cued, LSTM(1, 3).double()
    first = torch.zeros(T, 16, dtype=torch.bool)
    first[0] = True
    settings = {"first": first, "loss_times": range(T), "probe": probe}
    window = credit_horizon(core, loss_fn, inputs, window=K, critic=oracle(core, loss_fn, inputs, first), **settings)
    torch.testing.assert_close(window.expected_cosine[: T - 1], torch.ones(T - 1).double(), rtol=1e-10, atol=0)
    outputs, end = levels.unroll(inputs, tuple(s.requires_grad_() for s in levels.initial_state(16)), first)
    loss_fn(outputs).sum().backward()
    steps = torch.arange(T + 1.0).double().view(-1, 1, 1).expand(-1, 16, 1)
    unroll = partial(levels.unroll_in_ticks, ticks=2, critic=StepOracle(end.history.gradients), context=steps)
    in_ticks = credit_horizon(levels, loss_fn, inputs, unroll=unroll, **settings)
    torch.testing.assert_close(in_ticks.expected_cosine[: T - 1], torch.ones(T - 1).double(), rtol=1e-9, atol=0)


def test_the_scale_of_a_probe_is_nothing_and_so_are_constant_components():
    cue, _, measure = noisy(64)
    probe = cue.view(1, -1, 1).expand(40, -1, -1)
    one = measure(cue)
    other = measure(cue, probe=torch.cat([7.0 - 1e-3 * probe, torch.full_like(probe, 0.1)], -1))
    torch.testing.assert_close(one.expected_cosine, other.expected_cosine)
    late = torch.where(
        torch.arange(40).view(-1, 1, 1) < 30, probe, 100.0 * torch.ones(64, 1)
    )  # of states that are left out
    torch.testing.assert_close(
        measure(cue, probe=late, margin=10).expected_cosine, measure(cue, margin=10).expected_cosine
    )


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
    settings = {"first": first, "loss_times": range(T), "probe": inputs}
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
    settings = {"first": first, "loss_times": range(T), "probe": inputs}
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


def test_loss_times_meet_every_phase_of_ticks_too():
    """By default at most 64 loss times: at 512 steps every eighth is one, which would always meet the same phase of windows of 8."""
    torch.manual_seed(0)
    core, inputs = MultiTimescaleCore(1, (3,), (1,)).double(), torch.randn(512, 2, 1).double()
    in_ticks = credit_horizon(core, squared, inputs, unroll=partial(core.unroll_in_ticks, ticks=8), num_lags=12)
    window = credit_horizon(core, squared, inputs, window=8, num_lags=12)
    for field in dataclasses.fields(CreditHorizon):
        torch.testing.assert_close(getattr(in_ticks, field.name), getattr(window, field.name), rtol=1e-9, atol=1e-13)


def test_levels_whose_messages_are_cut_keep_what_arrives_through_the_graph(inputs):
    """Behind the last message before a loss, cut messages make no difference: the loss reaches the upper level by its context alone."""
    torch.manual_seed(0)
    core, t = MultiTimescaleCore(1, (3, 2), (1, 3)).double(), 11
    zero = GradientCritic(state_sizes=(3,)).double()
    inside = []
    for interfaces in (None, [zero]):
        unroll = partial(core.unroll_in_ticks, ticks=2, interface_critics=interfaces)
        inside.append(_Method(unroll, squared, inputs, core.initial_state(B), None).inside(t))
    upper = slice(6, 10)  # h and c, behind those of the lower level
    assert inside[1][t - 1 : t + 1, :, upper].any(-1).all()
    torch.testing.assert_close(inside[1][t - 1 : t + 1, :, upper], inside[0][t - 1 : t + 1, :, upper])


def test_unroll_replaces_window(levels, inputs):
    with pytest.raises(ValueError, match="unroll: it replaces window="):
        credit_horizon(levels, squared, inputs, window=2, unroll=partial(levels.unroll_in_ticks, ticks=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window: found 0"),
        ({"window": 3.0}, "window: found 3.0, allowed an integer"),
        ({"critic": GradientCritic(state_sizes=(1,))}, "give window="),
        ({"loss_times": [T]}, "loss_times: expected"),
        ({"num_lags": T + 1}, "num_lags: found"),
        ({"margin": T}, "margin: found"),
        ({"context": torch.zeros(T, B, 2)}, "context: expected"),
        ({"alive": torch.ones(B, dtype=torch.bool)}, "alive: expected"),
        ({"alive": torch.ones(T + 2, B)}, "alive: expected"),
        ({"unroll": print, "alive": torch.ones(T, B)}, "unroll: it replaces"),
        ({"unroll": print, "context": torch.zeros(T + 1, B, 2)}, "unroll: it replaces"),
        ({"probe": torch.zeros(T + 1, B, 2)}, "probe: expected"),
        ({"probe": torch.zeros(T, B)}, "probe: expected"),
    ],
)
def test_errors(settings, message, inputs):
    with pytest.raises(ValueError, match=message):
        credit_horizon(LinearRNN(0.9), sum_of_outputs, inputs, **settings)


def test_times_may_be_a_tensor(inputs):
    found, expected = (
        credit_horizon(LinearRNN(0.9), sum_of_outputs, inputs, loss_times=times)
        for times in (torch.tensor([2, 4]), [2, 4])
    )
    assert torch.equal(found.true_norm, expected.true_norm)


def test_no_steps_are_refused(inputs):
    with pytest.raises(ValueError, match=r"inputs: found \(0, .*allowed \[T, B, D\] with T >= 1"):
        credit_horizon(LinearRNN(0.9), sum_of_outputs, inputs[:0])


def test_one_sequence_has_no_average(inputs):
    with pytest.raises(ValueError, match=r"probe: found 1 sequence; allowed 2 or more"):
        credit_horizon(LinearRNN(0.9), sum_of_outputs, inputs[:, :1], probe=inputs[:, :1])


def test_reduced_losses_are_refused(inputs):
    with pytest.raises(ValueError, match="loss_fn: expected"):
        credit_horizon(LinearRNN(0.9), lambda outputs: outputs.sum(), inputs)
