"""A critic with a memory of its own: what it remembers, how it learns to, and that the core does not feel it."""

import copy
import io

import pytest
import torch
from core_cases import CORES, DOUBLE, D, H, make_core, random_state, resets
from torch import nn

import dni_rl

B, T, R, Z = 3, 6, 4, 2
FIRST = resets(T, (2, 0), (0, 1), (5, 1))
contexts = pytest.mark.parametrize("context_size", [0, Z], ids=["no context", "context"])


def make_critic(core, trained=True, **settings):
    torch.manual_seed(1)
    critic = dni_rl.RecurrentGradientCritic(state_sizes=core.state_sizes, memory_size=R, **settings).double()
    if trained:
        for p in critic.net.parameters():
            nn.init.normal_(p, std=0.5)
        critic.target_rms.uniform_(0.5, 2.0)
    return critic


def problem(trained=True, name="LSTM", **settings):
    """A watched core, its critic, inputs and a state before them."""
    core = make_core(name)
    critic = make_critic(core, trained, **settings)
    watched = critic.watch(core)
    return watched, critic, torch.randn(T, B, D, dtype=DOUBLE), random_state(watched, B)


def run(watched, critic, inputs, state, first=None, **settings):
    """The user's loop body; also the history, which `backward` uses up."""
    start = dni_rl.cut(state)
    outputs, end = watched.unroll(inputs, start, first)
    recorded = end.history.states
    report = dni_rl.backward(outputs.square().sum(-1), start=start, end=end, critic=critic, **settings)
    return report, end, recorded


def assert_same(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **(tolerances or {"rtol": 1e-10, "atol": 1e-12}))


# The memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORES)
def test_the_memory_has_read_every_state_of_its_episode_and_nothing_else(name):
    watched, critic, inputs, state = problem(name=name)
    inputs = inputs[:T]
    _, end = watched.unroll(inputs, state, FIRST)
    _, inner_end = watched.core.unroll(inputs, state[:-1], FIRST)
    states = inner_end.history.states
    for b in range(B):
        memory = state[-1][b : b + 1]
        for t in range(T):
            if FIRST[t, b]:
                memory = torch.zeros_like(memory)
            assert_same(end.history.states[-1][t, b : b + 1], memory)
            memory = critic.net.cell(torch.cat([s[t, b : b + 1] for s in states], -1), memory)
        assert_same(end[-1][b : b + 1], memory)


def test_two_windows_remember_as_one():
    watched, _, inputs, state = problem()
    _, end = watched.unroll(inputs, state, FIRST)
    _, middle = watched.unroll(inputs[:4], state, FIRST[:4])
    _, last = watched.unroll(inputs[4:], dni_rl.cut(middle), FIRST[4:])
    assert_same(last[-1], end[-1])
    _, fresh = watched.unroll(inputs[4:], watched.initial_state(B), FIRST[4:])
    assert (fresh[-1] - end[-1])[[0, 2]].abs().min() > 1e-6, "the carry is what made them equal"


def test_the_core_does_not_feel_that_it_is_watched():
    watched, _, inputs, state = problem()
    results = []
    for core, start in ((watched, dni_rl.cut(state)), (watched.core, dni_rl.cut(state[:-1]))):
        core.zero_grad()
        outputs, end = core.unroll(inputs, start, FIRST)
        (outputs.square().sum() + sum(s.sum() for s in end)).backward()
        results.append((outputs, tuple(end)[:2], [s.grad for s in start[:2]], [p.grad for p in core.parameters()]))
    assert_same(results[0], results[1], rtol=0, atol=0)
    assert not any("critic" in key for key in watched.state_dict())
    assert len(list(watched.parameters())) == len(list(watched.core.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_has_the_precision_of_the_state(dtype):
    core = dni_rl.GRU(D, H).to(dtype)
    critic = dni_rl.RecurrentGradientCritic(state_sizes=core.state_sizes, memory_size=R)
    watched = critic.watch(core)
    outputs, end = watched.unroll(torch.randn(T, B, D, dtype=dtype), watched.initial_state(B))
    assert [s.dtype for s in (outputs, *end, *end.history.states)] == [dtype] * 5


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_what_was_not_finite_is_forgotten_with_its_episode(dense):
    """One observation breaks one sequence; the update is thrown away, and after a reset nothing is left of it."""
    results = []
    for broken in (True, False):
        watched, critic, inputs, state = problem(dense_targets=dense, normalize_targets=False)
        if broken:
            inputs[1, 1] = torch.nan
        _, end, _ = run(watched, critic, inputs[:3], state)
        assert broken != bool(end[-1][1].isfinite().all()), "the memory has read it"
        watched.zero_grad(), critic.zero_grad()
        report, end, _ = run(watched, critic, inputs[3:], end, resets(3, (0, 1)))
        results.append((tuple(end), [p.grad for p in (*critic.parameters(), *watched.parameters())], report.as_dict()))
    assert all(g.isfinite().all() for g in results[0][1])
    assert_same(*results)


@pytest.mark.parametrize("dense", [True, False])
def test_a_row_that_does_not_count_may_hold_anything(dense):
    results = []
    for broken in (True, False):
        watched, critic, inputs, state = problem(dense_targets=dense)
        if broken:  # sequence 1 ended before; what is left of it is cleared in step 1
            for s in state:
                s[1] = torch.nan
        alive = torch.ones(T + 1, B)
        alive[0, 1] = 0.0
        run(watched, critic, inputs, state, resets(T, (1, 1)), alive=alive)
        results.append([p.grad for p in critic.parameters()])
    assert all(g.isfinite().all() for g in results[0])
    assert_same(*results)


@contexts
@pytest.mark.parametrize("dense", [True, False])
def test_the_recurrent_net_is_trained_through_the_window(context_size, dense):
    settings = {"context_size": context_size, "hidden_sizes": (3,), "dense_targets": dense, "gradient_discount": 0.9}
    watched, critic, inputs, state = problem(**settings)
    context = torch.randn(T + 1, B, Z, dtype=DOUBLE) if context_size else None
    fitted = []
    fit_window = critic.fit_window
    critic.fit_window = lambda window: fitted.append(window) or fit_window(window)
    reference = copy.deepcopy(critic)  # its fit is the definition, below
    report, _, recorded = run(watched, critic, inputs, state, FIRST, context=context)
    (window,) = fitted
    steps = T if dense else 1
    goal = torch.cat(window.gradients[:-1], -1)  # [steps, B, S]
    assert len(goal) == steps and not window.gradients[-1].any()

    net, memory, errors = reference.net, state[-1], []
    for t in range(steps):
        features = torch.cat([s[t] for s in recorded[:-1]], -1) if dense else torch.cat(state[:-1], -1)
        if dense:
            memory = torch.where(FIRST[t, :, None], torch.zeros_like(memory), memory)
        memory = net.cell(features, memory)
        z = [] if context is None else [context[t]]
        predicted = critic.target_rms * net.readout(torch.cat([features, *z, memory], -1))
        error = ((predicted - goal[t]) / critic.target_rms).square().mean(-1)
        errors.append(error[~FIRST[t]])
    loss = torch.cat(errors).mean()
    loss.backward()
    assert_same(report.critic_loss, loss.detach())
    for (key, p), q in zip(critic.named_parameters(), reference.parameters(), strict=True):
        assert_same(p.grad, q.grad)
        assert p.grad.any(), key


def test_windows_side_by_side_teach_what_they_teach_one_by_one():
    watched, critic, inputs, state = problem(normalize_targets=False)
    run_alone = []
    s = state
    for part in (slice(0, 3), slice(3, 6)):
        critic.zero_grad()
        _, end, _ = run(watched, critic, inputs[part], s, FIRST[part])
        run_alone.append(([p.grad.clone() for p in critic.parameters()], s))
        s = tuple(x.detach() for x in end)
    critic.zero_grad()
    beside = torch.cat([inputs[:3], inputs[3:]], 1)
    starts = tuple(torch.cat(pair) for pair in zip(run_alone[0][1], run_alone[1][1], strict=True))
    first = torch.cat([FIRST[:3], FIRST[3:]], 1)
    run(watched, critic, beside, starts, first)
    shares = [(~FIRST[part]).double().sum() / (~FIRST).sum() for part in (slice(0, 3), slice(3, 6))]
    for p, one, two in zip(critic.parameters(), run_alone[0][0], run_alone[1][0], strict=True):
        assert_same(p.grad, shares[0] * one + shares[1] * two)


def cue_windows(generator, N=64):
    """Two windows of states that are noise, but for the first one, which shows a cue; all target gradients are the cue."""
    states = 0.1 * torch.randn(2, T, N, 2, generator=generator, dtype=DOUBLE)
    cue = torch.where(torch.rand(N, generator=generator) < 0.5, 1.0, -1.0).double()
    states[0, 0, :, 0] += 3.0 * cue
    return states, cue.view(1, N, 1).expand(T, N, 2)


def fit(critic, states, gradients, memory):
    recurrent = isinstance(critic, dni_rl.RecurrentGradientCritic)
    memories = torch.zeros(*states.shape[:2], R, dtype=DOUBLE)
    memories[0] = memory
    extra = (memories,) if recurrent else ()
    window = dni_rl.Window(
        states=(states, *extra),
        gradients=(gradients, *(torch.zeros_like(m) for m in extra)),
        valid=torch.arange(T).view(-1, 1).expand(T, states.shape[1]) > 0,
        losses=gradients.sum(-1),
        first=None,
        end=(states[-1], *(m[-1] for m in extra)),
        alive=None,
        context=None,
    )
    return critic.fit_window(window)


def test_it_learns_what_no_critic_of_the_state_alone_can_even_a_window_later():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    explained = {}
    for name, critic in {
        "state": dni_rl.GradientCritic(state_sizes=(2,), hidden_sizes=(16,)).double(),
        "memory": dni_rl.RecurrentGradientCritic(state_sizes=(2,), memory_size=R).double(),
    }.items():
        optimizer = torch.optim.Adam(critic.parameters(), 0.02)
        for _ in range(150):
            windows, gradients = cue_windows(generator)
            memory = torch.zeros(windows.shape[2], R, dtype=DOUBLE)
            explained[name] = []
            for states in windows:
                optimizer.zero_grad()
                result = fit(critic, states, gradients, memory)
                result.loss.backward()
                optimizer.step()
                if name == "memory":
                    memory = critic.remember((states,), memory)[-1]
                explained[name].append(result.explained_variance.item())
    assert min(explained["memory"]) > 0.9, explained
    assert max(explained["state"]) < 0.2, explained


def test_the_slow_copy_writes_the_memory_and_bootstraps():
    watched, critic, inputs, state = problem(slow_copy_rate=0.5)
    with torch.no_grad():
        for p in critic.slow_net.parameters():
            p.mul_(0.5)
    _, end = watched.unroll(inputs, state)
    other = copy.deepcopy(critic)
    other.net.load_state_dict(critic.slow_net.state_dict())
    other.slow_net = other.slow_copy_rate = None
    _, expected = other.watch(watched.core).unroll(inputs, state)
    assert_same(tuple(end), tuple(expected))
    assert_same(critic.synthetic_gradient(tuple(end)), other.synthetic_gradient(tuple(end)))
    assert not torch.equal(critic(tuple(end))[0], other(tuple(end))[0])


def test_saved_in_the_middle_of_an_episode_it_continues_as_if_never_stopped():
    def build(seed):
        torch.manual_seed(seed)
        core = dni_rl.LSTM(D, H).double()
        critic = dni_rl.RecurrentGradientCritic(state_sizes=core.state_sizes, memory_size=R, slow_copy_rate=0.3)
        optimizers = [torch.optim.Adam(m.parameters(), 0.02) for m in (core, critic.double())]
        return critic.watch(core), critic, optimizers

    def train(watched, critic, optimizers, state, seeds):
        tape = []
        for seed in seeds:
            inputs = torch.randn(T, B, D, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
            for optimizer in optimizers:
                optimizer.zero_grad()
            report, state, _ = run(watched, critic, inputs, state)
            state = tuple(s.detach() for s in state)
            for optimizer in optimizers:
                optimizer.step()
            tape.append(torch.stack(list(report.as_dict().values())))
        return tape, state

    parts = build(0)
    _, middle = train(*parts, parts[0].initial_state(B), range(4))
    file = io.BytesIO()
    torch.save([[m.state_dict() for m in (parts[0], parts[1], *parts[2])], middle], file)
    expected = train(*parts, middle, range(4, 8))
    assert expected[0][-1][5] > 0.0, "synthetic gradients are applied"
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    parts = build(9)
    for part, value in zip((parts[0], parts[1], *parts[2]), values, strict=True):
        part.load_state_dict(value)
    assert_same(train(*parts, state, range(4, 8)), expected, rtol=0, atol=0)
    forgotten = (*state[:-1], torch.zeros_like(state[-1]))
    parts = build(9)
    for part, value in zip((parts[0], parts[1], *parts[2]), values, strict=True):
        part.load_state_dict(value)
    assert not torch.equal(train(*parts, forgotten, range(4, 5))[0][0], expected[0][0]), "the memory counts"


@pytest.mark.parametrize("lambda_", [0.0, 0.7])
def test_targets_are_mixed_as_those_of_the_core(lambda_):
    watched, critic, inputs, state = problem(target_lambda=lambda_)
    fitted = []
    fit_window = critic.fit_window
    critic.fit_window = lambda window: fitted.append(window) or fit_window(window)
    run(watched, critic, inputs, state, FIRST)

    class Same(dni_rl.GradientCritic):
        """Answers as the recurrent critic would: the memory comes as context."""

        def _gradient(self, net, joined, context):
            return torch.cat(critic((*joined.split(self.state_sizes, -1), context))[:-1], -1)

        def fit_window(self, window):
            fitted.append(window)
            return super().fit_window(window)

    critic.target_rms.copy_(make_critic(watched.core).target_rms)  # the fit has moved it
    same = Same(state_sizes=watched.core.state_sizes, context_size=R, target_lambda=lambda_, normalize_targets=False)
    start = dni_rl.cut(state[:-1])
    _, remembered = watched.unroll(inputs, state, FIRST)
    memories = torch.cat([remembered.history.states[-1], remembered[-1].detach().unsqueeze(0)])
    outputs, end = watched.core.unroll(inputs, start, FIRST)
    dni_rl.backward(outputs.square().sum(-1), start=start, end=end, critic=same.double(), context=memories)
    assert_same(fitted[0].gradients[:-1], fitted[1].gradients)


def test_the_horizon_of_a_watched_core_is_that_of_the_core():
    watched, _, inputs, state = problem()
    horizons = [
        dni_rl.credit_horizon(core, lambda y: y.square().sum(-1), inputs, s, FIRST, window=3)
        for core, s in ((watched, state), (watched.core, state[:-1]))
    ]
    assert_same(horizons[0].true_norm, horizons[1].true_norm)
    assert_same(horizons[0].cosine, horizons[1].cosine)


def test_the_horizon_asks_it_with_its_memory():
    watched, critic, inputs, state = problem()
    settings = {"loss_fn": lambda y: y.square().sum(-1), "inputs": inputs, "state": state, "window": 3}
    horizon = dni_rl.credit_horizon(watched, critic=critic, **settings)
    without = dni_rl.credit_horizon(watched, critic=None, **settings)
    assert not torch.equal(horizon.delivered_norm, without.delivered_norm)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_wrong_settings_and_cores_are_refused():
    with pytest.raises(
        ValueError, match="memory_size: found 0, allowed an integer of 1 or more; without memory use GradientCritic"
    ):
        dni_rl.RecurrentGradientCritic(state_sizes=(3,), memory_size=0)
    with pytest.raises(ValueError, match="state_sizes, hidden_sizes: expected positive integers"):
        dni_rl.RecurrentGradientCritic(state_sizes=(3, 0))
    critic = dni_rl.RecurrentGradientCritic(state_sizes=(3,))
    with pytest.raises(ValueError, match=r"core: found state_sizes \(4, 4\), but the critic was built for \(3,\)"):
        critic.watch(dni_rl.LSTM(D, 4))
    with pytest.raises(ValueError, match=r"core: found LSTM, allowed a core; make one of it with dni_rl\.wrap"):
        critic.watch(torch.nn.LSTM(D, 3))


def test_a_core_of_feature_maps_is_refused():
    class Maps(dni_rl.GRU):
        state_shapes = ((1, 2, 2),)

    critic = dni_rl.RecurrentGradientCritic(state_sizes=(4,))
    with pytest.raises(ValueError, match=r"core: found state_shapes \(\(1, 2, 2\),\), allowed vectors"):
        critic.watch(Maps(D, 4))


def test_a_core_that_records_nothing_is_refused():
    class Silent(dni_rl.LSTM):
        def unroll(self, inputs, state, first=None):
            outputs, end = super().unroll(inputs, state, first)
            return outputs, tuple(end)

    core = Silent(D, H).double()
    watched = make_critic(core).watch(core)
    with pytest.raises(RuntimeError, match="core: its unroll recorded no history for the critic to read"):
        watched.unroll(torch.randn(T, B, D, dtype=DOUBLE), watched.initial_state(B))


def test_a_core_that_is_not_watched_is_refused_by_its_widths():
    core = make_core("LSTM")
    critic = make_critic(core)
    start = dni_rl.cut(core.initial_state(B))
    outputs, end = core.unroll(torch.randn(T, B, D, dtype=DOUBLE), start)
    message = r"critic: found a RecurrentGradientCritic .*; unroll `critic.watch\(core\)` in place of the core"
    with pytest.raises(ValueError, match=message):
        dni_rl.backward(outputs.sum(-1), start=start, end=end, critic=critic)
