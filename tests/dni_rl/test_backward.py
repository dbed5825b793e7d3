"""`cut` and `backward` against full backpropagation through time, over every core."""

import copy
import importlib
import io
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from core_cases import (
    CORES,
    DOUBLE,
    D,
    gradient_of_the_rest,
    linear_core,
    make_core,
    naive_unroll,
    random_state,
    resets,
    states_before,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import dni_rl

B, T = 3, 12
CUTS = (0, 5, 6, 12)  # windows of 5, 1 and 6 steps
WINDOWS = list(itertools.pairwise(CUTS))
# Episodes start inside windows, exactly at both cuts, and the data end with the last one.
FIRST = resets(T, (2, 0), (8, 0), (5, 1), (6, 2), (9, 2))
ALIVE = {end: torch.zeros(B) if end == T else (~FIRST[end]).float() for _, end in WINDOWS}
every_core = pytest.mark.parametrize("name", CORES)
dense = pytest.mark.parametrize("dense", [True, False], ids=["dense targets", "target at the start"])


class Model(nn.Module):
    """Torso, core, head: what a user has."""

    def __init__(self, core):
        super().__init__()
        self.torso, self.core, self.head = nn.Linear(D, D), core, nn.Linear(core.output_size, 1)

    def losses_of(self, outputs, y):
        return (self.head(outputs).squeeze(-1) - y).square()

    def forward(self, x, y, state, first=None):
        """Losses [T, B] and the next state."""
        outputs, end = self.core.unroll(torch.tanh(self.torso(x)), state, first)
        return self.losses_of(outputs, y), end

    def naive(self, x, y, state, first=None):
        outputs, end = naive_unroll(self.core, torch.tanh(self.torso(x)), state, first)
        return self.losses_of(outputs, y), end


class Spy(dni_rl.GradientCritic):
    """A critic that keeps what it was asked."""

    def fit(self, state, target, context=None, valid=None):
        self.fitted = {"state": state, "target": target, "context": context, "valid": valid}
        return super().fit(state, target, context, valid)

    def synthetic_gradient(self, state, context=None, alive=None):
        b = super().synthetic_gradient(state, context, alive)
        self.asked = {"state": state, "context": context, "answer": b, "window_norm": self.window_norm.clone()}
        return b


class Lookup(nn.Module):
    """An oracle's network: answers with the gradient noted for the nearest state."""

    def __init__(self, states, gradients):
        super().__init__()
        self.states, self.gradients = states, gradients

    def forward(self, x):
        return self.gradients[(x.unsqueeze(1) - self.states).abs().sum(-1).argmin(1)]


def problem(name="LSTM"):
    model = Model(make_core(name)).double()
    x, y = torch.randn(T, B, D, dtype=DOUBLE), torch.randn(T, B, dtype=DOUBLE)
    return model, x, y, random_state(model.core, B)


def make_critic(model, trained=True, kind=Spy, **settings):
    torch.manual_seed(1)
    critic = kind(state_sizes=model.core.state_sizes, **settings).double()
    if trained:
        for p in critic.parameters():
            nn.init.normal_(p, std=0.5)
    return critic


def gradients(module):
    return {key: None if p.grad is None else p.grad.clone() for key, p in module.named_parameters()}


def assert_same(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **(tolerances or {"rtol": 1e-10, "atol": 1e-10}))


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def run_window(model, x, y, state, critic, lo=0, hi=5, first=FIRST, **settings):
    """The user's loop body over steps lo .. hi."""
    start = dni_rl.cut(state)
    losses, end = model(x[lo:hi], y[lo:hi], start, None if first is None else first[lo:hi])
    settings.setdefault("alive", ALIVE[hi])
    return dni_rl.backward(losses, start=start, end=end, critic=critic, **settings), end


def run_sequence(model, x, y, state, critic, **settings):
    reports = []
    for lo, hi in WINDOWS:
        report, state = run_window(model, x, y, state, critic, lo, hi, **settings)
        reports.append(report)
    return reports


def train(model, critic, optimizers, seeds, **settings):
    """Some updates on random windows; returns what it computed on the way."""
    tape = []
    state = model.core.initial_state(B)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(5, B, D, generator=generator, dtype=DOUBLE)
        y = torch.randn(5, B, generator=generator, dtype=DOUBLE)
        for optimizer in optimizers:
            optimizer.zero_grad()
        report, state = run_window(model, x, y, state, critic, alive=None, **settings)
        for optimizer in optimizers:
            optimizer.step()
        tape.append(torch.stack(list(report.as_dict().values())))
    return tape


# Traps 2, 3, 13: oracle, zero, none -----------------------------------------------------------------------------------


@every_core
@dense
@pytest.mark.parametrize("weight", [1.0, 1024.0 / (T * B)])
def test_with_an_oracle_windows_equal_full_backpropagation(name, dense, weight):
    model, x, y, state = problem(name)
    model.naive(x, y, state, FIRST)[0].sum().mul(weight).backward()
    expected = gradients(model)
    model.zero_grad()

    visited = states_before(model.core, torch.tanh(model.torso(x)).detach(), state, FIRST)
    future = gradient_of_the_rest(lambda j, s: model.naive(x[j:], y[j:], s, FIRST[j:])[0].sum(), visited, range(T))
    future.append(tuple(torch.zeros_like(s) for s in visited[T]))
    for j in CUTS[1:]:  # beyond an end the oracle raves: `alive` must stop it
        for g in future[j]:
            g[ALIVE[j] == 0] = 1e6
    critic = dni_rl.GradientCritic(
        state_sizes=model.core.state_sizes, normalize_targets=False, dense_targets=dense
    ).double()
    critic.net = Lookup(*(torch.cat([torch.cat(row, -1) for row in table]) for table in (visited, future)))

    reports = run_sequence(model, x, y, state, critic, weight=weight)
    assert_same(gradients(model), expected)
    if dense:  # and its answers are its targets
        assert all(report.critic_loss < 1e-20 and report.target_norm > 0.01 for report in reports)
        assert all(report.explained_variance > 1 - 1e-10 for report in reports)


@every_core
def test_without_critic_it_is_truncated_backpropagation_and_differs_from_full(name):
    model, x, y, state = problem(name)
    s, total = state, 0.0
    for lo, hi in WINDOWS:
        losses, s = model.naive(x[lo:hi], y[lo:hi], tuple(c.detach() for c in s), FIRST[lo:hi])
        total = total + losses.sum() / (len(losses) * B)
    total.backward()
    expected = gradients(model)
    model.zero_grad()
    run_sequence(model, x, y, state, None)
    assert_same(gradients(model), expected)
    model.zero_grad()
    sum(losses[lo:hi].mean() for losses in [model.naive(x, y, state, FIRST)[0]] for lo, hi in WINDOWS).backward()
    assert any((gradients(model)[key] - expected[key]).abs().max() > 1e-4 for key in expected)


@every_core
@dense
@pytest.mark.parametrize("context_size", [0, 2], ids=["no context", "context"])
@pytest.mark.parametrize("max_norm_ratio", [None, 0.5], ids=["no bound", "bound"])
def test_an_untrained_critic_is_no_critic(name, dense, context_size, max_norm_ratio):
    model, x, y, state = problem(name)
    run_sequence(model, x, y, state, None)
    expected = gradients(model)
    model.zero_grad()
    critic = make_critic(
        model,
        False,
        hidden_sizes=(5,),
        context_size=context_size,
        dense_targets=dense,
        max_norm_ratio=max_norm_ratio,
    )
    for lo, hi in WINDOWS:
        context = torch.randn(hi - lo + 1, B, 2, dtype=DOUBLE) if context_size else None
        report, state = run_window(model, x, y, state, critic, lo, hi, context=context)
        assert report.synthetic_norm == 0.0 and report.predicted_norm == 0.0
        assert report.target_norm > 0.0
    assert_same(gradients(model), expected, rtol=1e-13, atol=1e-15)


# Targets --------------------------------------------------------------------------------------------------------------


@every_core
@pytest.mark.parametrize("lo_hi", WINDOWS, ids=str)
@dense
@pytest.mark.parametrize("max_norm_ratio", [None, 0.5], ids=["no bound", "bound"])
def test_targets_are_the_gradients_of_the_surrogate(name, lo_hi, dense, max_norm_ratio):
    lo, hi = lo_hi
    model, x, y, state = problem(name)
    first = FIRST[lo:hi]
    critic = make_critic(model, dense_targets=dense, max_norm_ratio=max_norm_ratio, gradient_discount=0.9)
    _, end = run_window(model, x, y, state, critic, lo, hi)
    b = critic.asked["answer"]
    assert all(g[ALIVE[hi] == 1].any() for g in b) or not ALIVE[hi].any()

    def surrogate(j, s):
        losses, last = model.naive(x[lo + j : hi], y[lo + j : hi], s, first[j:])
        return losses.sum() + sum((c * g).sum() for c, g in zip(last, b, strict=True))

    visited = states_before(model.core, torch.tanh(model.torso(x[lo:hi])).detach(), state, first)
    steps = range(hi - lo) if dense else range(1)
    expected = gradient_of_the_rest(surrogate, visited, steps)
    keep = ~first[: len(steps)]
    for k in range(len(state)):
        target, at = (critic.fitted[key][k].view(len(steps), B, -1) for key in ("target", "state"))
        goal = torch.stack([g[k] for g in expected])
        assert_same(target[keep], goal[keep])
        assert_same(at[keep], torch.stack([s[k] for s in visited[: len(steps)]])[keep])
        assert not goal[~keep].any()
    exactly(critic.fitted["valid"].view(-1, B), keep)
    if dense:
        assert not any(g.any() for g in end.history.gradients), "the history is used once"


def test_an_end_gives_zero_and_a_cut_the_bootstrapped_target_on_a_linear_rnn():
    # s' = A s + W x,  l = <v, s'>:   G_j = sum_{k=1}^{K-j} (A^T)^k v  + alive (A^T)^{K-j} b
    core, K = linear_core().double(), 4
    A, v = core.cell.A.detach(), torch.randn(4, dtype=DOUBLE)
    critic = Spy(state_sizes=(4,)).double()
    nn.init.normal_(critic.net[0].weight)
    start = dni_rl.cut((torch.randn(B, 4, dtype=DOUBLE),))
    outputs, end = core.unroll(torch.randn(K, B, D, dtype=DOUBLE), start)
    count = torch.ones(K, B, dtype=DOUBLE)
    count[2:, 1] = 0.0  # sequence 1 ended after step 1; what follows is padding
    alive = torch.tensor([1.0, 0.0, 0.0])  # sequence 2 ended exactly at the cut
    b = (end[0] @ critic.net[0].weight.T)[0].detach()
    dni_rl.backward((outputs @ v) * count, start=start, end=end, critic=critic, alive=alive, weight=0.3)
    (targets,) = (g.view(K, B, 4) for g in critic.fitted["target"])
    power = torch.linalg.matrix_power
    for j in range(K):
        inside = sum((power(A.T, k) @ v for k in range(1, K - j + 1)), torch.zeros(4, dtype=DOUBLE))
        assert_same(targets[j, 0], inside + power(A.T, K - j) @ b)
        assert_same(targets[j, 2], inside)
        padded = sum((power(A.T, k) @ v for k in range(1, 2 - j + 1)), torch.zeros(4, dtype=DOUBLE))
        assert_same(targets[j, 1], padded)
    assert not targets[2:, 1].any() and targets[:, 0].any()


@dense
def test_a_critic_sees_beyond_its_windows_on_a_linear_rnn(dense):
    # s' = A s,  l = |s'|^2 / 2:  the gradient of the endless future is P s with P = sum_{k>=1} (A^T)^k A^k
    torch.manual_seed(0)
    core = linear_core(3).double()
    with torch.no_grad():
        core.cell.A.copy_(
            0.9 * torch.linalg.qr(torch.randn(3, 3, dtype=DOUBLE))[0]
        )  # P = 0.81 / 0.19, a window sees 0.81
    critic = dni_rl.GradientCritic(state_sizes=(3,), dense_targets=dense).double()
    optimizer = torch.optim.SGD(critic.parameters(), 0.5)
    for _ in range(60):
        start = dni_rl.cut((torch.randn(16, 3, dtype=DOUBLE),))
        outputs, end = core.unroll(torch.zeros(2, 16, D, dtype=DOUBLE), start)
        optimizer.zero_grad()
        report = dni_rl.backward(outputs.square().sum(-1) / 2, start=start, end=end, critic=critic)
        optimizer.step()
    assert report.explained_variance > 0.99 and report.cosine > 0.99
    s = torch.eye(3, dtype=DOUBLE)
    truth = 0.81 / 0.19 * s
    assert (critic((s,))[0] - truth).norm() < 0.1 * truth.norm()


def test_a_window_written_by_hand_teaches_at_its_start_alone():
    # No `unroll`, an ordinary tuple, and a state tensor handed on as it is: its end is the leaf of the start.
    torch.manual_seed(0)
    A, start = (
        torch.randn(2, 2, dtype=DOUBLE),
        dni_rl.cut((torch.randn(B, 2, dtype=DOUBLE), torch.randn(B, 2, dtype=DOUBLE))),
    )
    critic = Spy(state_sizes=(2, 2)).double()
    nn.init.normal_(critic.net[0].weight)
    moving, kept = start
    moving = moving @ A.T + kept
    dni_rl.backward(moving.sum(-1)[None], start=start, end=(moving, kept), critic=critic)
    b = critic.asked["answer"]
    assert critic.fitted["valid"] is None
    assert_same(critic.fitted["target"][0], (b[0] + 1.0) @ A)
    assert_same(critic.fitted["target"][1], (b[0] + 1.0) + b[1])


def test_a_plain_tuple_where_dense_targets_are_wanted_is_warned_of():
    model, x, y, state = problem()
    start = dni_rl.cut(state)
    losses, end = model(x[:5], y[:5], start)
    kwargs = {"start": start, "end": tuple(end)}
    with pytest.warns(UserWarning, match=r"end: found a plain tuple, .*; pass the state that `core.unroll`") as caught:
        dni_rl.backward(losses, critic=make_critic(model), **kwargs)
    assert caught[0].filename == __file__, "it shows the line of the call"
    for critic, T, settings in (  # warnings are errors here
        (None, 5, {}),
        (make_critic(model, dense_targets=False), 5, {}),
        (make_critic(model), 5, {"fit": False}),
        (make_critic(model), 1, {}),  # the start is all there is
    ):
        start = dni_rl.cut(state)
        losses, end = model(x[:T], y[:T], start)
        dni_rl.backward(losses, start=start, end=tuple(end), critic=critic, **settings)


def test_alive_tells_of_a_start_that_is_cleared_where_a_plain_tuple_cannot():
    model, x, y, state = problem()
    results = []
    for plain in (False, True):
        critic, start = make_critic(model, dense_targets=False), dni_rl.cut(state)
        losses, end = model(x[8:10], y[8:10], start, FIRST[8:10])
        alive = torch.ones(3, B)
        alive[0] = (~FIRST[8]).double()
        dni_rl.backward(losses, start=start, end=tuple(end) if plain else end, critic=critic, alive=alive)
        results.append((critic.fitted["valid"], gradients(critic)))
    assert results[0][0].tolist() == [False, True, True]
    exactly(*results)


def test_a_state_that_is_used_twice_or_has_an_old_gradient():
    model, x, y, state = problem()
    critics = [make_critic(model, dense_targets=False) for _ in range(2)]
    for critic, dirt in zip(critics, (False, True), strict=True):
        start = dni_rl.cut(state)
        if dirt:
            for s in start:
                s.grad = torch.full_like(s, 7.0)
        losses, end = model(x[:5], y[:5], start, FIRST[:5])
        dni_rl.backward(losses, start=start, end=end, critic=critic)
    exactly(critics[1].fitted["target"], critics[0].fitted["target"])


LOST_START = "start: no loss depends on it; unroll the core from the very tensors that `dni_rl.cut` returned"


@every_core
@pytest.mark.parametrize(
    "settings",
    [{"max_norm_ratio": 0.5}, {"dense_targets": False}, {"target_lambda": 0.5}],
    ids=["yardstick", "target at the start", "mixed targets"],
)
def test_a_start_that_was_cut_anew_is_refused(name, settings):
    model, x, y, state = problem(name)
    critic = make_critic(model, **settings)
    before = copy.deepcopy(critic.state_dict())
    losses, end = model(x[:5], y[:5], dni_rl.cut(state), FIRST[:5])
    refuses(RuntimeError, LOST_START, dni_rl.backward, losses, start=dni_rl.cut(state), end=end, critic=critic)
    exactly(critic.state_dict(), before)
    assert all(g is None for g in gradients(critic).values())


@pytest.mark.parametrize("settings", [{"max_norm_ratio": 0.5}, {"dense_targets": False}])
def test_a_start_that_nothing_was_unrolled_from_is_warned_of(settings):
    model, x, y, state = problem()
    for unrolled_from in (state, dni_rl.cut(tuple(s.clone() for s in state))):
        losses, end = model(x[:5], y[:5], unrolled_from)
        with pytest.warns(UserWarning, match=LOST_START) as caught:
            critic = make_critic(model, **settings)
            dni_rl.backward(losses, start=dni_rl.cut(state), end=end, critic=critic)
        assert [w.filename for w in caught] == [__file__], "once, and it shows the line of the call"


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_losses_on_the_state_before_a_step_are_warned_of_where_targets_inside_would_lack_them(reads, dense):
    """Their gradient comes to the window's start, and inside the window to no state that the core records."""
    torch.manual_seed(0)
    core = dni_rl.wrap(torch.nn.GRUCell(3, 6)).double()
    critic = dni_rl.GradientCritic(state_sizes=(6,), dense_targets=dense).double()
    start = dni_rl.cut((torch.randn(4, 6, dtype=DOUBLE),))
    outputs, end = core.unroll(torch.randn(5, 4, 3, dtype=DOUBLE), start)
    before = torch.cat([start[0].unsqueeze(0), outputs[:-1]])
    losses = (before if reads else outputs).square().sum(-1)
    says = pytest.warns(UserWarning, match="losses: found some that depend on `start` other than through `core.unroll`")
    with says if reads and dense else nullcontext() as caught:  # other warnings are errors
        dni_rl.backward(losses, start=start, end=end, critic=critic)
    assert not (reads and dense) or [w.filename for w in caught] == [__file__]


def test_without_a_history_losses_to_go_end_where_alive_says_that_an_episode_does():
    torch.manual_seed(0)
    core = dni_rl.wrap(torch.nn.GRUCell(3, 6)).double()
    state, inputs = (torch.randn(4, 6, dtype=DOUBLE),), torch.randn(5, 4, 3, dtype=DOUBLE)
    first = torch.zeros(5, 4, dtype=torch.bool)
    first[3, 1] = True
    alive = torch.cat([~first, torch.ones(1, 4, dtype=torch.bool)])
    found = []
    for plain in (False, True):
        critic = dni_rl.LossCritic(state_sizes=(6,), dense_targets=False).double()
        windows, start = [], dni_rl.cut(state)
        fit = critic.fit_window
        critic.fit_window = lambda window, windows=windows, fit=fit: (windows.append(window), fit(window))[1]
        outputs, end = core.unroll(inputs, start, first)
        losses = outputs.square().sum(-1)
        dni_rl.backward(losses, start=start, end=tuple(end) if plain else end, critic=critic, alive=alive)
        found.append(windows[0].first)
    assert found[0].equal(first) and found[1].equal(first)


@every_core
@dense
def test_a_start_that_is_cleared_or_that_no_loss_reads_is_no_mistake(name, dense):
    model, _, _, state = problem(name)  # warnings are errors here
    for T, all_new in ((5, True), (1, True), (40, True), (5, False)):
        start, first = dni_rl.cut(state), torch.zeros(T, B, dtype=torch.bool)
        first[0] = all_new
        inputs = torch.randn(T, B, D, dtype=DOUBLE)
        losses, end = model(inputs, torch.zeros(T, B, dtype=DOUBLE), start, first)
        if not all_new:  # a head behind the torso
            losses = model.torso(inputs).sum(-1)
        dni_rl.backward(
            losses, start=start, end=end, critic=make_critic(model, dense_targets=dense, max_norm_ratio=0.5)
        )


def test_fused_kernels_send_zeros_to_a_start_that_is_cleared():
    core = dni_rl.LSTM(D, 4)  # in float32, for which there is one
    critic = dni_rl.GradientCritic(state_sizes=core.state_sizes, max_norm_ratio=0.5, dense_targets=False)
    core.targets_per_window = 0
    first = torch.zeros(40, B, dtype=torch.bool)
    first[0] = True
    for _ in range(2):
        start = dni_rl.cut(core.initial_state(B))
        outputs, end = core.unroll(torch.randn(40, B, D), start, first)
        dni_rl.backward(outputs.sum(-1), start=start, end=end, critic=critic)  # warnings are errors here
    assert critic.window_norm == 0.0


def test_a_start_that_an_episode_clears_teaches_nothing():
    model, x, y, state = problem()
    critic = make_critic(model, dense_targets=False)
    start = dni_rl.cut(state)
    losses, end = model(x[8:10], y[8:10], start, FIRST[8:10])  # one of three sequences begins with it
    dni_rl.backward(losses, start=start, end=end, critic=critic)
    assert critic.fitted["valid"].tolist() == [False, True, True]


@dense
def test_a_state_between_two_sequences_teaches_nothing(dense):
    model, x, y, state = problem()
    alive = torch.ones(3, B)
    alive[0, 1] = alive[1, 0] = 0.0
    fitted = []
    for given in (None, alive):
        critic = make_critic(model, dense_targets=dense)
        start = dni_rl.cut(state)
        # Sequence 0 begins anew with the first step, 2 with the second.
        losses, end = model(x[8:10], y[8:10], start, FIRST[8:10])
        dni_rl.backward(losses, start=start, end=end, critic=critic, alive=given)
        fitted.append(critic.fitted)
    rows = slice(6 if dense else 3)
    assert fitted[0]["valid"].tolist() == [False, True, True, True, True, False][rows]
    assert fitted[1]["valid"].tolist() == [False, False, True, False, True, False][rows]
    exactly(fitted[0]["target"], fitted[1]["target"])


@pytest.mark.parametrize("kind", [dni_rl.LossCritic, dni_rl.GradientCritic])
def test_mixed_targets_end_where_a_sequence_does(kind, monkeypatch):
    """A critic that predicts 7 everywhere, losses of nothing: what the states before the end learn is 0."""
    model, x, _, state = problem()
    critic = kind(state_sizes=model.core.state_sizes, normalize_targets=False, target_lambda=0.0).to(x)
    for p in critic.parameters():
        torch.nn.init.constant_(p, 0.0 if p.dim() > 1 else 7.0)
    learned = []
    if kind is dni_rl.LossCritic:
        to_go = critic._loss_to_go
        monkeypatch.setattr(critic, "_loss_to_go", lambda window: learned.append(to_go(window)) or learned[-1])
    else:
        fit = critic.fit
        monkeypatch.setattr(
            critic, "fit", lambda state, target, *rest: learned.extend(target) or fit(state, target, *rest)
        )
    alive = torch.ones(5, B)
    alive[2, 0] = 0.0
    start = dni_rl.cut(state)
    outputs, end = model.core.unroll(x[:4], start)
    dni_rl.backward(0.0 * outputs.sum(-1), start=start, end=end, critic=critic, alive=alive)
    reached = learned[0].view(4, B, -1).abs().sum(-1) > 0
    assert reached[1].tolist() == [False, True, True]
    assert reached[0].all()


class Counting(dni_rl.Core):
    """Keeps its state, which knows nothing; with the state as loss, the gradient of all later losses is their number."""

    input_size = output_size = 1
    state_sizes = (1,)

    def forward(self, x, state):
        """One step."""
        s = state[0] + 0.0 * x
        return s, (s,)


@pytest.mark.parametrize("window", [1, 4])
def test_an_end_that_the_state_does_not_tell_is_counted_once(window):
    """Sequences end with probability 0.1, so ten losses are to come on average, with a step of its own behind the last one."""
    torch.manual_seed(0)
    core, num, steps = Counting(), 512, 400
    critic = dni_rl.GradientCritic(state_sizes=(1,), normalize_targets=False)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    state: dni_rl.State = (torch.zeros(num, 1),)
    last, first = torch.zeros(num, dtype=torch.bool), torch.ones(num, dtype=torch.bool)
    found = []
    for _ in range(steps // window):
        rows = []
        for _ in range(window + 1):
            rows.append((first, last))
            first, last = last, (torch.rand(num) < 0.1) & ~last
        first, last = rows[-1]  # the next window begins where this one ends
        firsts, lasts = (torch.stack(column) for column in zip(*rows, strict=True))
        state = dni_rl.cut(state)
        outputs, end = dni_rl.cores.unroll_stepwise(core, torch.zeros(window, num, 1), state, firsts[:-1])
        losses = outputs.squeeze(-1) * ~lasts[:-1]
        optimizer.zero_grad()
        dni_rl.backward(losses, start=state, end=end, critic=critic, alive=~(firsts | lasts))
        optimizer.step()
        state = end
        found.append(critic((torch.zeros(1, 1),))[0].item())
    assert sum(found[-20:]) / 20 == pytest.approx(10.0, abs=0.7)


@dense
def test_a_state_without_influence_has_target_zero(dense):
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, 2)

        def forward(self, x, state):
            h = self.linear(x)
            return h, (h, state[1])

    core = dni_rl.wrap(Deaf(), state_sizes=(2, 2), input_size=D, output_size=2).double()
    critic = Spy(state_sizes=(2, 2), dense_targets=dense).double()
    nn.init.ones_(critic.net[0].bias)
    start = dni_rl.cut(core.initial_state(B))
    outputs, end = core.unroll(torch.randn(2, B, D, dtype=DOUBLE), start)
    dni_rl.backward(outputs.sum(-1), start=start, end=end, critic=critic)
    assert not critic.fitted["target"][0].any()
    exactly(critic.fitted["target"][1], torch.ones_like(critic.fitted["target"][1]))


@dense
@pytest.mark.parametrize("lambda_", [1.0, 0.5])
def test_a_state_without_graph_is_no_root_and_has_target_zero(dense, lambda_):
    """A count of steps in the state, beside what learns."""
    if lambda_ < 1.0 and not dense:
        return

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D + 2, 2)

        def forward(self, x, state):
            h = torch.tanh(self.linear(torch.cat([x, state[0]], -1)))
            return h, (h, state[1].detach() + 1.0)

    torch.manual_seed(0)
    core = dni_rl.wrap(Counting(), state_sizes=(2, 1), input_size=D, output_size=2).double()
    critic = Spy(state_sizes=(2, 1), dense_targets=dense, target_lambda=lambda_, max_norm_ratio=0.5).double()
    nn.init.ones_(critic.net[0].bias)
    start = dni_rl.cut(core.initial_state(B))
    outputs, end = core.unroll(torch.randn(3, B, D, dtype=DOUBLE), start)
    dni_rl.backward(outputs.sum(-1), start=start, end=end, critic=critic)
    assert end[1].eq(3.0).all() and not end[1].requires_grad
    assert critic.fitted["target"][0].any() and not critic.fitted["target"][1].any()
    assert critic.asked["answer"][1].any(), "predicted it may be"


@dense
def test_undefined_gradients_are_zero(dense):
    class Mute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, 2)

        def forward(self, x, state):
            h = self.linear(x) + Mute.apply(state[0])
            return h, (h,)

    core = dni_rl.wrap(Cell(), state_sizes=(2,), input_size=D, output_size=2).double()
    critic = Spy(state_sizes=(2,), dense_targets=dense, max_norm_ratio=0.5).double()
    start = dni_rl.cut(core.initial_state(B))
    outputs, end = core.unroll(torch.randn(3, B, D, dtype=DOUBLE), start)
    dni_rl.backward(outputs.sum(-1), start=start, end=end, critic=critic)
    assert not critic.fitted["target"][0].any()
    assert core.cell.linear.weight.grad.any()


@dense
def test_context_belongs_to_the_state_before_each_step_and_its_last_row_to_the_end(dense):
    model, x, y, state = problem()
    critic = make_critic(model, context_size=2, dense_targets=dense)
    context = torch.randn(6, B, 2, dtype=DOUBLE)
    _, end = run_window(model, x, y, state, critic, context=context)
    exactly(critic.asked["context"], context[5])
    exactly(critic.asked["state"], tuple(s.detach() for s in end))
    exactly(critic.fitted["context"], context[:5].flatten(0, 1) if dense else context[0])


# Targets mixed over windows of different length -----------------------------------------------------------------------


@every_core
@pytest.mark.parametrize("lambda_", [0.0, 0.6])
def test_mixed_targets_follow_their_recursion_step_by_step(name, lambda_):
    model, x, y, state = problem(name)
    lo, hi = 6, 12
    first, K = FIRST[lo:hi], hi - lo
    settings = {"gradient_discount": 0.9, "context_size": 2, "max_norm_ratio": 0.5, "normalize_targets": False}
    critic = make_critic(model, target_lambda=lambda_, **settings)
    context = torch.randn(K + 1, B, 2, dtype=DOUBLE)
    alive = torch.tensor([1.0, 0.0, 1.0])
    run_window(model, x, y, state, critic, lo, hi, context=context, alive=alive)
    actual = critic.fitted["target"]

    inputs = torch.tanh(model.torso(x[lo:hi])).detach()
    visited = states_before(model.core, inputs, state, first)
    visited = [tuple(s.masked_fill(first[t].unsqueeze(-1), 0.0) for s in visited[t]) for t in range(K)]
    steps, local, b = [], [], []
    for t in range(K):  # one step each, by autograd
        start = tuple(s.clone().requires_grad_() for s in visited[t])
        output, after = model.core(inputs[t], start)
        loss = model.losses_of(output.unsqueeze(0), y[lo + t].unsqueeze(0)).sum()
        local.append(torch.cat(vjp([loss], start, None), -1))
        steps.append((start, after))
        with torch.no_grad():
            b.append(torch.cat(critic.synthetic_gradient(visited[t], context[t]), -1))
    ends = [*b[1:], torch.cat(bootstrap_of(critic, visited, model, inputs, context, alive), -1)]

    def pull_back(t, v):
        start, after = steps[t]
        return torch.cat(vjp(list(after), start, v.split(model.core.state_sizes, -1)), -1)

    expected = dni_rl.lambda_targets(torch.stack(local), torch.stack(ends), lambda_, first=first, pull_back=pull_back)
    actual = torch.cat(actual, -1).view(K, B, -1)
    assert_same(actual[~first], expected[~first])


def vjp(roots, leaves, vectors):
    pairs = [(r, v) for r, v in zip(roots, vectors or [None], strict=True) if r.requires_grad]  # a clock has no graph
    roots, vectors = [r for r, _ in pairs], [v for _, v in pairs]
    return torch.autograd.grad(roots, leaves, vectors, retain_graph=True, allow_unused=True, materialize_grads=True)


def bootstrap_of(critic, visited, model, inputs, context, alive):
    with torch.no_grad():
        end = model.core(inputs[-1], visited[-1])[1]
    return critic.synthetic_gradient(end, context[-1], alive)


@every_core
def test_mixing_targets_changes_no_gradient_of_the_model(name):
    results = []
    for lambda_ in (1.0, 0.5):
        model, x, y, state = problem(name)
        critic = make_critic(model, target_lambda=lambda_)
        _, end = run_window(model, x, y, state, critic)
        results.append((gradients(model), critic.fitted["target"]))
        assert not any(g.any() for g in end.history.gradients)
    exactly(results[0][0], results[1][0])
    assert any(not torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_mixing_needs_the_states_inside_the_window():
    model, x, y, state = problem()
    critic, start = make_critic(model, target_lambda=0.5), dni_rl.cut(state)
    losses, end = model(x[:5], y[:5], start)
    with pytest.raises(ValueError, match=r"end: target_lambda=0\.5 needs the states inside the window"):
        dni_rl.backward(losses, start=start, end=tuple(end), critic=critic)
    end.history.hand_on = lambda index, step, gradient: gradient  # a core that takes no notice
    with pytest.raises(RuntimeError, match="target_lambda: this core's unroll hands gradients on without"):
        dni_rl.backward(losses, start=start, end=end, critic=critic)
    assert all(g is None for g in gradients(model).values())


# Critics of losses ----------------------------------------------------------------------------------------------------

of_losses = pytest.mark.parametrize("kind", [dni_rl.LossCritic, dni_rl.SobolevCritic])


class Rest(nn.Module):
    """An oracle's network: what the rest of the sequences will cost, from states in order of their sequences."""

    def __init__(self, rest):
        super().__init__()
        self.rest = rest

    def forward(self, x):
        return self.rest(x).unsqueeze(-1)


@every_core
@of_losses
def test_with_an_oracle_of_losses_windows_equal_full_backpropagation(name, kind):
    model, x, y, state = problem(name)
    model.naive(x, y, state, FIRST)[0].sum().backward()
    expected = gradients(model)
    model.zero_grad()
    twin = copy.deepcopy(model).requires_grad_(False)
    critic = kind(state_sizes=model.core.state_sizes, normalize_targets=False, dense_targets=False).double()
    for lo, hi in WINDOWS:

        def rest(s, at=hi):
            if at == T or len(s) != B:
                return s.sum(-1) * 0.0
            s = s.split(model.core.state_sizes, -1)
            return twin.naive(x[at:], y[at:], s, FIRST[at:])[0].sum(0)

        critic.net = Rest(rest)
        _, state = run_window(model, x, y, state, critic, lo, hi, weight=1.0)
    assert_same(gradients(model), expected)


@every_core
@of_losses
def test_an_untrained_critic_of_losses_is_no_critic(name, kind):
    model, x, y, state = problem(name)
    run_sequence(model, x, y, state, None)
    expected = gradients(model)
    model.zero_grad()
    critic = make_critic(model, False, kind, hidden_sizes=(5,), max_norm_ratio=0.5)
    for report in run_sequence(model, x, y, state, critic):
        assert report.synthetic_norm == 0.0 and report.predicted_norm == 0.0 and report.target_norm > 0.0
    assert_same(gradients(model), expected, rtol=1e-13, atol=1e-15)


@of_losses
@dense
@pytest.mark.parametrize("lambda_", [1.0, 0.5])
def test_critics_of_losses_know_neither_the_model_nor_batch_size_nor_weight(kind, dense, lambda_):
    if lambda_ < 1.0 and not dense:
        return
    results = []
    for copies, weight in ((1, 1.0 / 15), (3, 64.0)):
        model, x, y, state = problem()
        critic = make_critic(model, True, kind, hidden_sizes=(5,), dense_targets=dense, target_lambda=lambda_)
        data = (x.repeat(1, copies, 1), y.repeat(1, copies), tuple(s.repeat(copies, 1) for s in state))
        settings = {"first": FIRST.repeat(1, copies), "alive": ALIVE[5].repeat(copies), "weight": weight}
        b = critic.synthetic_gradient(
            tuple(s.detach() for s in model(data[0][:5], data[1][:5], data[2], settings["first"][:5])[1]),
            None,
            settings["alive"],
        )
        report, _ = run_window(model, *data, critic, **settings)
        actual = gradients(model)
        model.zero_grad()  # the surrogate with its synthetic gradient as a constant
        losses, end = model.naive(data[0][:5], data[1][:5], data[2], settings["first"][:5])
        (weight * (losses.sum() + sum((s * g).sum() for s, g in zip(end, b, strict=True)))).backward()
        assert_same(actual, gradients(model))
        assert all(g.any() for g in b)
        results.append((report.as_dict(), gradients(critic), dict(critic.named_buffers())))
    assert_same(results[0], results[1])


@of_losses
def test_a_frozen_critic_of_losses_learns_nothing(kind):
    model, x, y, state = problem()
    critic = make_critic(model, True, kind, hidden_sizes=(5,)).requires_grad_(False)
    run_window(model, x, y, state, critic)
    assert all(g is None for g in gradients(critic).values())


@pytest.mark.parametrize("trained", [True, False])
def test_feature_maps_have_a_critic_too(trained):
    torch.manual_seed(0)
    cell = nn.Conv2d(2, 2, 3, padding=1).double()
    start = dni_rl.cut((torch.randn(B, 2, 4, 3, dtype=DOUBLE),))
    settings = {"hidden_channels": (3,), "max_norm_ratio": 0.5, "dense_targets": False}
    critic = dni_rl.ConvGradientCritic(state_shapes=((2, 4, 3),), **settings).double()
    if trained:
        for p in critic.parameters():
            nn.init.normal_(p)
    end = start[0]
    losses = []
    for _ in range(3):
        end = torch.tanh(cell(end))
        losses.append(end.square().sum((1, 2, 3)))
    losses = torch.stack(losses)
    critic.observe_window(torch.autograd.grad(losses.sum(), start, retain_graph=True))
    (b,) = critic.synthetic_gradient((end.detach(),), alive=torch.tensor([1, 1, 0]))
    objective = losses.sum() + (end * b).sum()
    expected = torch.autograd.grad(objective, [*cell.parameters(), *start], retain_graph=True)
    dni_rl.backward(losses, start=start, end=(end,), critic=critic, alive=torch.tensor([1, 1, 0]), weight=1.0)
    assert_same([p.grad for p in cell.parameters()], list(expected[:-1]))
    assert bool(b[:2].any()) == trained and not b[2].any()
    target_rms = expected[-1].square().mean((0, 2, 3)).sqrt().repeat_interleave(12)
    assert_same(critic.target_rms, target_rms)
    assert all(p.grad is not None for p in critic.parameters())


# Trap 4: who owns what ------------------------------------------------------------------------------------------------


@every_core
@dense
def test_neither_side_sends_gradient_into_the_other(name, dense):
    model, x, y, state = problem(name)
    critic = make_critic(model, dense_targets=dense)
    report, _ = run_window(model, x, y, state, critic, weight=0.25)
    actual, actual_critic = gradients(model), gradients(critic)

    model.zero_grad()  # the surrogate with its synthetic gradient as a constant
    losses, end = model.naive(x[:5], y[:5], state, FIRST[:5])
    b = critic.asked["answer"]
    (0.25 * (losses.sum() + sum((s * g).sum() for s, g in zip(end, b, strict=True)))).backward()
    assert_same(actual, gradients(model))

    critic.zero_grad()  # the regression alone
    prediction = torch.cat(critic(critic.fitted["state"]), -1)
    goal, valid = torch.cat(critic.fitted["target"], -1), critic.fitted["valid"]
    error = (((prediction - goal) / critic.target_rms).square()).mean(-1)
    loss = error.mean() if valid is None else error[valid].mean()
    assert_same(report.critic_loss, loss.detach())
    loss.backward()
    assert_same(actual_critic, gradients(critic))


def test_the_model_does_not_feel_how_the_critic_learns():
    results = []
    for settings in ({}, {"dense_targets": False}, {"statistics_decay": 0.0}, {"frozen": True}):
        model, x, y, state = problem()
        frozen = settings.pop("frozen", False)
        critic = make_critic(model, normalize_targets=False, **settings).requires_grad_(not frozen)
        run_window(model, x, y, state, critic)
        results.append(gradients(model))
        assert all((g is None) == frozen for g in gradients(critic).values())
    for other in results[1:]:
        exactly(other, results[0])


@every_core
def test_the_critic_does_not_feel_which_parameters_are_frozen(name):
    results = []
    for frozen in ("nothing", "torso", "core", "head", "all"):
        model, x, y, state = problem(name)
        critic = make_critic(model)
        for key, p in model.named_parameters():
            p.requires_grad_(not (frozen == "all" or key.startswith(frozen)))
        report, _ = run_window(model, x, y, state, critic)
        results.append((gradients(critic), critic.fitted["target"], report.as_dict()))
        for key, p in model.named_parameters():
            assert (p.grad is None) == (not p.requires_grad), key
    for other in results[1:]:
        assert_same(other, results[0])


def test_clipping_and_weight_decay_act_on_one_side():
    model, x, y, state = problem()
    critic = make_critic(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in critic.parameters()}
    run_window(model, x, y, state, critic)
    before = gradients(critic)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    exactly(gradients(critic), before)
    before = gradients(model)
    nn.utils.clip_grad_norm_(critic.parameters(), 1e-3)
    exactly(gradients(model), before)
    values = copy.deepcopy(critic.state_dict())
    torch.optim.AdamW(model.parameters(), 0.1, weight_decay=1.0).step()
    exactly(critic.state_dict(), values)


# Traps 5, 9: units ----------------------------------------------------------------------------------------------------


@every_core
@dense
def test_the_critic_does_not_feel_the_batch_size(name, dense):
    results = []
    for copies in (1, 4):
        model, x, y, state = problem(name)
        critic = make_critic(model, dense_targets=dense, max_norm_ratio=0.5)
        report, _ = run_window(
            model,
            x.repeat(1, copies, 1),
            y.repeat(1, copies),
            tuple(s.repeat(copies, 1) for s in state),
            critic,
            first=FIRST.repeat(1, copies),
            alive=ALIVE[5].repeat(copies),
        )
        results.append((report.as_dict(), gradients(critic), gradients(model), dict(critic.named_buffers())))
    assert_same(results[0], results[1])


@dense
@pytest.mark.parametrize(
    "weight", [1.0, 1024.0 / 15, 1e-6, torch.tensor(65536.0, dtype=DOUBLE), torch.tensor([3.0])], ids=str
)
def test_the_critic_does_not_feel_the_weight_and_the_model_does(dense, weight):
    results = []
    for w in (None, weight):
        model, x, y, state = problem()
        critic = make_critic(model, dense_targets=dense, max_norm_ratio=0.5)
        report, _ = run_window(model, x, y, state, critic, weight=w)
        factor = float(w) if w is not None else 1.0 / 15
        unscaled = {key: g / factor for key, g in gradients(model).items()}
        results.append(
            (unscaled, critic.fitted["target"], gradients(critic), report.as_dict(), dict(critic.named_buffers()))
        )
    assert_same(results[0], results[1])


def test_the_layout_of_losses_and_data_does_not_matter():
    results = []
    for batch_first in (False, True):
        model, x, y, state = problem()
        critic = make_critic(model)
        start = dni_rl.cut(state)
        if batch_first:  # data and losses as transposed views
            x, y = x.transpose(0, 1).contiguous().transpose(0, 1), y.t().contiguous().t()
        losses, end = model(x[:5], y[:5], start, FIRST[:5])
        if batch_first:
            losses = losses.t().contiguous().t()
            assert not losses.is_contiguous()
        dni_rl.backward(losses, start=start, end=end, critic=critic)
        results.append((gradients(model), gradients(critic)))
    assert_same(results[0], results[1])


@pytest.mark.parametrize("max_norm_ratio", [None, 0.3])
def test_training_does_not_depend_on_the_unit_of_the_losses(max_norm_ratio):
    tapes = []
    for unit in (1.0, 1000.0):
        model, *_ = problem()
        critic = make_critic(model, False, max_norm_ratio=max_norm_ratio)
        model.losses_of = lambda outputs, y, m=model, u=unit: u * Model.losses_of(m, outputs, y)
        optimizers = [torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(critic.parameters(), 0.01)]
        tape = torch.stack(train(model, critic, optimizers, range(8), weight=1.0 / (15 * unit)))
        tape[:, 3:6] /= unit  # the norms
        tapes.append((tape, [p.detach() for p in model.parameters()]))
    assert tapes[0][0][-1, 5] > 1e-3  # it is applied
    assert_same(tapes[0], tapes[1], rtol=1e-5, atol=1e-7)


# Discount, scale, bound, warm-up --------------------------------------------------------------------------------------


@every_core
@pytest.mark.parametrize("setting", ["gradient_discount", "scale"])
def test_discount_and_scale_interpolate_between_truncation_and_bootstrap(name, setting):
    results = {}
    for value in (0.0, 0.25, 1.0):
        model, x, y, state = problem(name)
        run_window(model, x, y, state, make_critic(model, **{setting: value}))
        results[value] = gradients(model)
    model, x, y, state = problem(name)
    run_window(model, x, y, state, None)
    assert_same(results[0.0], gradients(model))
    for key in results[0.0]:
        assert_same(results[0.25][key], 0.75 * results[0.0][key] + 0.25 * results[1.0][key])
    assert any((results[1.0][key] - results[0.0][key]).abs().max() > 1e-4 for key in results[0.0])


@every_core
def test_the_bound_follows_the_gradient_that_losses_inside_windows_send_to_their_start(name):
    model, x, y, state = problem(name)
    critic = make_critic(model, max_norm_ratio=0.2, statistics_decay=0.8)
    critic.net[0].bias.data.fill_(1e3)
    squares = []
    for lo, hi in WINDOWS:
        start = dni_rl.cut(state)
        inside = torch.autograd.grad(
            model.naive(x[lo:hi], y[lo:hi], start, FIRST[lo:hi])[0].sum(),
            start,
            allow_unused=True,
            materialize_grads=True,
        )
        squares.append(torch.cat(inside, -1).square().sum(-1).mean())
        report, state = run_window(model, x, y, state, critic, lo, hi, alive=None)
        ages = torch.tensor([0.8**age for age in reversed(range(len(squares)))], dtype=DOUBLE)
        norm = ((ages * torch.stack(squares)).sum() / ages.sum()).sqrt()
        assert_same(critic.window_norm, norm)
        applied = torch.cat(critic.asked["answer"], -1).norm(dim=-1)
        assert_same(applied, (0.2 * norm).expand(B))  # all of them were far too long
        assert_same(report.synthetic_norm, 0.2 * norm)


def test_training_stays_below_the_bound():
    model, *_ = problem()
    critic = make_critic(model, max_norm_ratio=0.3)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(critic.parameters(), 0.3)]
    lengths = []
    for seed in range(20):
        train(model, critic, optimizers, [seed])
        norm = torch.cat(critic.asked["answer"], -1).norm(dim=-1)
        bound = 0.3 * critic.asked["window_norm"]
        assert (norm <= bound * (1 + 1e-12)).all()
        lengths.append(float(norm.max() / bound))
    assert max(lengths) > 0.99 and min(lengths) > 0.0


def test_warm_up_learns_and_applies_nothing():
    model, x, y, state = problem()
    critic = make_critic(model, warmup_updates=2)
    report = [run_window(model, x, y, state, critic)[0] for _ in range(4)]
    assert [bool(r.synthetic_norm > 0) for r in report] == [False, False, True, True]
    assert all(r.predicted_norm > 0 for r in report)
    assert all(g.any() for g in gradients(critic).values())


@every_core
@pytest.mark.parametrize(
    "settings", [{}, {"dense_targets": False}, {"max_norm_ratio": 0.5}, {"target_lambda": 0.7}], ids=str
)
def test_a_window_may_be_used_without_learning_from_it(name, settings):
    model, x, y, state = problem(name)
    critic = make_critic(model, **settings)
    run_window(model, x, y, state, critic)  # statistics, of the bound too, have begun
    untouched = copy.deepcopy(critic)
    model.zero_grad()
    expected_report, _ = run_window(model, x, y, state, copy.deepcopy(critic))
    expected = gradients(model)
    model.zero_grad()
    critic.zero_grad()
    report, _ = run_window(model, x, y, state, critic, fit=False)
    if not settings.get("max_norm_ratio"):  # the yardstick of the bound moves when it learns
        assert_same(gradients(model), expected)
        assert_same(report.synthetic_norm, expected_report.synthetic_norm)
    assert report.synthetic_norm > 0
    assert all(math.isnan(v) for key, v in report.as_dict().items() if key != "synthetic_norm")
    assert all(p.grad is None for p in critic.parameters())
    exactly(critic.state_dict(), untouched.state_dict())


# Trap 6, 8: the user's loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["after the forward pass", "to zeros, not None"])
def test_zero_grad_may_be_anywhere_before_backward(when):
    results = []
    for moment in ("before the forward pass", when):
        model, x, y, state = problem()
        critic = make_critic(model)
        run_window(model, x, y, state, critic)  # leaves gradients behind
        if moment != "after the forward pass":
            model.zero_grad(set_to_none=moment != "to zeros, not None")
            critic.zero_grad(set_to_none=moment != "to zeros, not None")
        start = dni_rl.cut(state)
        losses, end = model(x[:5], y[:5], start, FIRST[:5])
        if moment == "after the forward pass":
            model.zero_grad()
            critic.zero_grad()
        dni_rl.backward(losses, start=start, end=end, critic=critic)
        results.append((gradients(model), gradients(critic)))
    exactly(results[0], results[1])


@dense
def test_two_calls_accumulate(dense):
    model, x, y, state = problem()
    critic = make_critic(model, normalize_targets=False, dense_targets=dense)
    alone = []
    for lo, hi in WINDOWS[::2]:
        model.zero_grad()
        critic.zero_grad()
        run_window(model, x, y, state, critic, lo, hi)
        alone.append((gradients(model), gradients(critic)))
    model.zero_grad()
    critic.zero_grad()
    for lo, hi in WINDOWS[::2]:
        run_window(model, x, y, state, critic, lo, hi)
    for side, total in enumerate((gradients(model), gradients(critic))):
        assert_same(total, {key: alone[0][side][key] + alone[1][side][key] for key in total})


@every_core
def test_parts_of_a_batch_accumulate_to_the_whole(name):
    model, x, y, state = problem(name)
    whole, critic = (make_critic(model, normalize_targets=False) for _ in range(2))
    run_window(model, x, y, state, whole, weight=1.0 / 15)
    expected = gradients(model)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 3)):
        run_window(
            model,
            x[:, rows],
            y[:, rows],
            tuple(s[rows] for s in state),
            critic,
            first=FIRST[:, rows],
            alive=ALIVE[5][rows],
            weight=1.0 / 15,
        )
    assert_same(gradients(model), expected)
    assert critic.num_updates == 2  # each part is an update of the statistics, see `backward`


def test_two_critics_for_one_core_are_refused():
    model, x, y, state = problem()
    critics = [make_critic(model), make_critic(model)]
    with pytest.raises(
        ValueError, match=r"^critic: found list, allowed one error critic for the whole state, or None$"
    ):
        run_window(model, x, y, state, critics)


def test_a_refused_call_does_not_count_as_a_window():
    model, x, y, state = problem()
    critic = dni_rl.GradientCritic(state_sizes=(7,), max_norm_ratio=1.0).double()
    before = copy.deepcopy(critic.state_dict())
    with pytest.raises(ValueError, match="critic: found one for states"):
        run_window(model, x, y, state, critic)
    exactly(critic.state_dict(), before)


def test_without_a_target_ratios_are_not_numbers():
    model, x, y, state = problem()
    start = dni_rl.cut(state)
    outputs, end = model.core.unroll(torch.tanh(model.torso(x[:5])), start)
    losses = 0.0 * model.losses_of(outputs, y[:5])
    report = dni_rl.backward(losses, start=start, end=end, critic=make_critic(model), alive=torch.zeros(3))
    ratios = ("explained_variance", "cosine", "norm_ratio")
    assert all(value.isnan() == (name in ratios) for name, value in report.as_dict().items())


@every_core
@dense
def test_activation_checkpointing_changes_nothing(name, dense):
    results = []
    for checkpointed in (False, True):
        model, x, y, state = problem(name)
        critic = make_critic(model, dense_targets=dense, max_norm_ratio=0.5)
        start = dni_rl.cut(state)
        inputs = torch.tanh(model.torso(x[:5]))
        if checkpointed:
            outputs, end = checkpoint(model.core.unroll, inputs, start, FIRST[:5], use_reentrant=False)
        else:
            outputs, end = model.core.unroll(inputs, start, FIRST[:5])
        report = dni_rl.backward(model.losses_of(outputs, y[:5]), start=start, end=end, critic=critic)
        results.append((gradients(model), gradients(critic), critic.fitted["target"], report.as_dict()))
    exactly(results[0], results[1])


def test_the_old_kind_of_checkpointing_is_refused():
    model, x, y, state = problem()
    start = dni_rl.cut(state)
    outputs, end = checkpoint(model.core.unroll, torch.tanh(model.torso(x)), start, FIRST, use_reentrant=True)
    with pytest.raises(RuntimeError, match="it was detached"):
        dni_rl.backward(model.losses_of(outputs, y), start=start, end=end, critic=make_critic(model))


@every_core
def test_eval_mode_changes_nothing(name):
    results = []
    for mode in (True, False):
        model, x, y, state = problem(name)
        critic = make_critic(model)
        run_window(model.train(mode), x, y, state, critic.train(mode))
        results.append((gradients(model), gradients(critic), dict(critic.named_buffers())))
    exactly(results[0], results[1])


def test_a_report_of_several_windows_has_the_ratios_of_their_means():
    """The mean of the ratios has no bound: in the second of these windows there is nearly nothing to predict."""
    nan = torch.tensor(torch.nan)
    base = dict.fromkeys(("critic_loss", "explained_variance", "norm_ratio", "synthetic_norm"), torch.tensor(0.5))
    windows = [
        dni_rl.Report(cosine=c, predicted_norm=p, target_norm=t, error=e, target_variance=v, **base)
        for c, p, t, e, v in (
            torch.tensor([[0.8, 1.0, 2.0, 1.0, 4.0], [torch.nan, 1.0, 0.0, 1.0, 0.0], [0.4, 1.0, 1.0, 1.0, 2.0]])
        )
    ]
    mean = dni_rl.Report.mean_of(
        [*windows, dni_rl.Report(**dict.fromkeys(windows[0].as_dict(), nan))]
    )  # the last not fitted
    assert (mean.norm_ratio, mean.explained_variance) == (pytest.approx(1.0), pytest.approx(0.5))
    assert (mean.cosine, mean.critic_loss) == (pytest.approx(0.6), pytest.approx(0.5))


def test_reports_are_scalars_without_gradient():
    model, x, y, state = problem()
    names = [
        "critic_loss",
        "explained_variance",
        "cosine",
        "predicted_norm",
        "target_norm",
        "synthetic_norm",
        "norm_ratio",
        "error",
        "target_variance",
    ]
    for critic in (None, make_critic(model)):
        report, _ = run_window(model, x, y, state, critic)
        assert list(report.as_dict()) == names
        for value in report.as_dict().values():
            assert value.shape == () and not value.requires_grad
            assert value.isnan() == (critic is None)
    assert_same(report.norm_ratio, report.predicted_norm / report.target_norm)
    assert_same(report.synthetic_norm, torch.cat(critic.asked["answer"], -1).norm(dim=-1).mean())


def test_cut_makes_leaves_that_share_memory():
    state = (torch.randn(2, 3).requires_grad_() * 2, torch.randn(2, 3))
    leaves = dni_rl.cut(state)
    for leaf, s in zip(leaves, state, strict=True):
        assert leaf.is_leaf and leaf.requires_grad and leaf.data_ptr() == s.data_ptr() and leaf is not s
    assert isinstance(dni_rl.cut(list(state)), tuple)
    with torch.no_grad():
        assert all(s.requires_grad for s in dni_rl.cut(state))


# Trap 10, 11: files, exceptions, threads, imports ---------------------------------------------------------------------


@every_core
@dense
def test_save_load_and_continue_equals_never_having_stopped(name, dense):
    def fresh(seed):
        torch.manual_seed(seed)
        model = Model(CORES[name]()).double()
        critic = Spy(
            state_sizes=model.core.state_sizes,
            hidden_sizes=(4,),
            dense_targets=dense,
            max_norm_ratio=0.5,
            warmup_updates=2,
        ).double()
        return model, critic, [torch.optim.Adam(m.parameters(), 0.01) for m in (model, critic)]

    model, critic, optimizers = fresh(0)
    train(model, critic, optimizers, range(4))
    expected = train(model, critic, optimizers, range(4, 7))
    assert expected[-1][5] > 0  # it is applied

    model, critic, optimizers = fresh(0)
    train(model, critic, optimizers, range(4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, critic, *optimizers)], file)
    file.seek(0)
    model, critic, optimizers = fresh(1)
    for part, values in zip((model, critic, *optimizers), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(values)
    exactly(train(model, critic, optimizers, range(4, 7)), expected)


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


@every_core
@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_inside_a_window_leaves_nothing_behind(name, where, bound):
    model, x, y, state = problem(name)
    critic = make_critic(model, max_norm_ratio=bound)
    run_window(model, x, y, state, critic)
    expected = gradients(model), gradients(critic), dict(critic.named_buffers())

    model, x, y, state = problem(name)
    critic = make_critic(model, max_norm_ratio=bound)
    before = copy.deepcopy(critic.state_dict())
    start = dni_rl.cut(state)
    # In the forward pass behind the core; in the backward pass below it, when all its gradients have been on their way.
    handle = model.head.register_forward_hook(stop) if where == "forward" else model.torso.weight.register_hook(stop)
    with pytest.raises(Stop):
        losses, end = model(x[:5], y[:5], start, FIRST[:5])
        dni_rl.backward(losses, start=start, end=end, critic=critic, alive=ALIVE[5])
    handle.remove()
    assert not any(s._backward_hooks for s in start)
    exactly(critic.state_dict(), before)
    assert all(g is None for g in gradients(critic).values())
    model.zero_grad()
    run_window(model, x, y, state, critic)
    exactly((gradients(model), gradients(critic), dict(critic.named_buffers())), expected)


def test_two_threads_do_not_interfere():
    def work(seed):
        model, critic = models[seed]
        optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (model, critic)]
        return torch.stack(train(model, critic, optimizers, range(10 * seed, 10 * seed + 10)))

    def build():
        for seed in range(2):
            model = problem("LSTM" if seed else "GRU")[0]
            models[seed] = (model, make_critic(model, max_norm_ratio=0.5))

    models = {}
    build()
    expected = [work(seed) for seed in range(2)]
    build()
    with ThreadPoolExecutor(2) as pool:
        actual = list(pool.map(work, range(2)))
    exactly(actual, expected)
    assert not torch.equal(expected[0], expected[1])


def test_importing_has_no_side_effects():
    def settings():
        return (
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_anomaly_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
            torch.get_default_device(),
            sys.getrecursionlimit(),
        )

    ours = {key: module for key, module in sys.modules.items() if key.split(".")[0] == "dni_rl"}
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    readable = torch.serialization.get_safe_globals()
    # values that nobody sets, so that setting anything shows
    torch.manual_seed(54321)
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    before = settings()
    try:
        for key in ours:
            del sys.modules[key]
        imported = importlib.import_module("dni_rl")
        assert imported is not ours["dni_rl"]
        assert settings() == before
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(precision)
        for key in [key for key in sys.modules if key.split(".")[0] == "dni_rl"]:
            del sys.modules[key]
        sys.modules.update(ours)
        # what torch.load may read it finds by name: the class that was imported first, not the one that is gone
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(readable)


# Errors ---------------------------------------------------------------------------------------------------------------


def refuses(kind, message, function, *arguments, **settings):
    with pytest.raises(kind) as error:
        function(*arguments, **settings)
    assert str(error.value) == message


def test_cut_errors():
    h = torch.zeros(2, 3)
    one, several = "write (state,) for one", "put them into one flat tuple, such as (h, c)"
    for state, found, way_out in (
        (h, "Tensor", one),
        (None, "NoneType", one),
        ((h, h.long()), "tuple of [torch.float32, torch.int64]", several),
        ([h, 3], "list of [torch.float32, 'int']", several),
        (((h, h),), "tuple of ['tuple']", several),
    ):
        refuses(
            ValueError,
            f"state: expected a tuple of floating-point tensors [B, ...], got {found}; {way_out}",
            dni_rl.cut,
            state,
        )


def test_a_state_of_inference_mode_cannot_be_cut_but_its_clone_can():
    with torch.inference_mode():
        state = (torch.zeros(2, 3),)
    with pytest.raises(RuntimeError, match="inference"):
        dni_rl.cut(state)
    assert dni_rl.cut(tuple(s.clone() for s in state))[0].requires_grad


WRONG_CALLS = {
    "reduced": (
        lambda w: {"losses": w["losses"].mean()},
        ValueError,
        "losses: expected [T, B], one loss per step and sequence, got (); do not reduce them",
    ),
    "reduced over time": (
        lambda w: {"losses": w["losses"].sum(0)},
        ValueError,
        "losses: expected [T, B], one loss per step and sequence, got (3,); do not reduce them",
    ),
    "no graph": (
        lambda w: {"losses": w["losses"].detach()},
        RuntimeError,
        "losses: no gradient flows from them; were they computed under torch.no_grad()?",
    ),
    "another start": (
        lambda w: {"start": w["start"][:1]},
        ValueError,
        "start, end: expected equal shapes, got [(3, 4)] and [(3, 4), (3, 4)]",
    ),
    "batch first": (
        lambda w: {"losses": w["losses"].t()},
        ValueError,
        "start: expected batch size 5 as in losses, got [(3, 4), (3, 4)]",
    ),
    "start not cut": (
        lambda w: {"start": tuple(s.detach() for s in w["start"])},
        RuntimeError,
        "start: expected the leaves that `dni_rl.cut(state)` returned before the window was unrolled",
    ),
    "start no leaf": (
        lambda w: {"start": tuple(s * 1 for s in w["start"])},
        RuntimeError,
        "start: expected the leaves that `dni_rl.cut(state)` returned before the window was unrolled",
    ),
    "end cut": (
        lambda w: {"end": tuple(s.detach() for s in w["end"])},
        RuntimeError,
        "end: expected the state that `core.unroll` returned, with its graph; it was detached",
    ),
    "end cut for the next window": (
        lambda w: {"end": dni_rl.cut(w["end"])},
        RuntimeError,
        "end: expected the state that `core.unroll` returned, with its graph; it was cut; call `dni_rl.cut` after `backward`, where "
        "the next window starts",
    ),
    "losses of a part of the window": (
        lambda w: {"losses": w["losses"][-1:], "context": torch.zeros(2, 3, 2)},
        ValueError,
        "losses: found [T, B] = (1, 3), allowed (5, 3), the window that `end` was unrolled over; unroll all of a window's steps in "
        "one call, and pass one loss for each of its steps and sequences, 0 where there is none",
    ),
    "alive": (
        lambda w: {"alive": torch.ones(5, 3)},
        ValueError,
        "alive: expected [B] = (3,) or [T + 1, B] = (6, 3), got (5, 3)",
    ),
    "alive in a list": (
        lambda w: {"alive": [True] * 3},
        ValueError,
        "alive: expected [B] = (3,) or [T + 1, B] = (6, 3), got list",
    ),
    "context of one step too few": (
        lambda w: {"context": torch.zeros(5, 3, 2)},
        ValueError,
        "context: expected [T + 1, B, Z] = (6, 3, 2), the last row for `end`, got (5, 3, 2)",
    ),
    "context of another library": (
        lambda w: {"context": torch.zeros(6, 3, 2).numpy()},
        ValueError,
        "context: expected [T + 1, B, Z] = (6, 3, 2), the last row for `end`, got ndarray",
    ),
    "no context": (
        lambda w: {"context": None},
        ValueError,
        "context: expected [T + 1, B, Z] = (6, 3, 2), the last row for `end`, got None",
    ),
    "context for a critic without": (
        lambda w: {"critic": make_critic(w["model"])},
        ValueError,
        "context: got (6, 3, 2), but the critic was built with context_size=0; leave it out",
    ),
    "a critic for another core": (
        lambda w: {"critic": dni_rl.GradientCritic(state_sizes=(4,), context_size=2).double()},
        ValueError,
        "critic: found one for states [B, ...] of ((4,),), allowed ((4,), (4,)) as the core's; build it with core.state_sizes, flatten in "
        "the cell what is no vector, or take ConvGradientCritic where all of them are feature maps (C, Y, X)",
    ),
    "a critic in another precision": (
        lambda w: {"critic": make_critic(w["model"], context_size=2).float()},
        ValueError,
        "critic: found torch.float32, allowed torch.float64 as the states; use critic.to(torch.float64)",
    ),
    "a critic on another device": (
        lambda w: {"critic": make_critic(w["model"], context_size=2).to("meta")},
        ValueError,
        "critic: found it on meta, allowed cpu as the losses; use critic.to('cpu')",
    ),
    "weight 0": (
        lambda w: {"weight": 0.0},
        ValueError,
        "weight: found 0.0, allowed above 0 and finite; multiply losses by 0 where they must not count",
    ),
    "weight nan": (
        lambda w: {"weight": math.nan},
        ValueError,
        "weight: found nan, allowed above 0 and finite; multiply losses by 0 where they must not count",
    ),
    "weight without bound": (
        lambda w: {"weight": 1.0 / torch.zeros(())},
        ValueError,
        "weight: found inf, allowed above 0 and finite; multiply losses by 0 where they must not count",
    ),
    "negative weight in a tensor": (
        lambda w: {"weight": torch.tensor(-1.0)},
        ValueError,
        "weight: found -1.0, allowed above 0 and finite; multiply losses by 0 where they must not count",
    ),
    "weight 0 in a tensor": (
        lambda w: {"weight": torch.zeros(1)},
        ValueError,
        "weight: found 0.0, allowed above 0 and finite; multiply losses by 0 where they must not count",
    ),
    "weights": (
        lambda w: {"weight": torch.ones(3)},
        ValueError,
        "weight: expected one number, got (3,); weigh single steps in losses",
    ),
}


@pytest.mark.parametrize("mistake", WRONG_CALLS)
def test_a_wrong_call_is_refused_and_leaves_nothing_behind(mistake):
    change, kind, message = WRONG_CALLS[mistake]
    model, x, y, state = problem()
    start = dni_rl.cut(state)
    losses, end = model(x[:5], y[:5], start, FIRST[:5])
    critic = make_critic(model, context_size=2, max_norm_ratio=0.5)
    call = {
        "losses": losses,
        "start": start,
        "end": end,
        "critic": critic,
        "alive": None,
        "context": torch.zeros(6, 3, 2),
    }
    call.update(change({**call, "model": model}))
    on_meta = call["critic"].target_rms.is_meta  # where there are no values to compare
    before = copy.deepcopy(call["critic"].state_dict())
    refuses(kind, message, dni_rl.backward, call.pop("losses"), **call)
    if not on_meta:
        exactly(call["critic"].state_dict(), before)
    assert all(g is None for module in (model, critic, call["critic"]) for g in gradients(module).values())
    dni_rl.backward(
        losses, start=start, end=end, critic=critic, context=torch.zeros(6, 3, 2)
    )  # the window is still good


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)])
def test_a_weight_in_a_tensor_is_a_number_whatever_its_shape_and_precision(shape):
    found = []
    for weight in (0.25, torch.full(shape, 0.25, dtype=torch.float64)):
        model, x, y, state = problem()
        model, start = model.float(), dni_rl.cut(tuple(s.float() for s in state))
        critic = dni_rl.GradientCritic(state_sizes=model.core.state_sizes)
        losses, end = model(x.float(), y.float(), start, FIRST)
        dni_rl.backward(losses, start=start, end=end, critic=critic, weight=weight)
        found.append((gradients(model), gradients(critic), critic.state_dict()))
    exactly(found[1], found[0])


def test_a_weight_on_an_accelerator_is_not_waited_for():
    dni_rl.targets.check_weight(torch.empty((), device="meta"))  # to read it would be an error
    with pytest.raises(ValueError, match="expected one number"):
        dni_rl.targets.check_weight(torch.empty(3, device="meta"))


@pytest.mark.parametrize("with_critic", [True, False])
def test_backward_under_no_grad_is_refused_and_leaves_nothing_behind(with_critic):
    model, x, y, state = problem()
    critic = make_critic(model) if with_critic else None
    start = dni_rl.cut(state)
    losses, end = model(x[:5], y[:5], start, FIRST[:5])
    message = "backward: gradients are switched off here; call it outside of torch.no_grad()"
    with torch.no_grad():
        refuses(RuntimeError, message, dni_rl.backward, losses, start=start, end=end, critic=critic)
    assert all(g is None for g in gradients(model).values())
    with torch.no_grad():
        losses, end = model(x[:5], y[:5], start, FIRST[:5])
    with pytest.raises(RuntimeError, match="were they computed under"):
        dni_rl.backward(losses, start=start, end=end, critic=critic)


def test_a_window_cannot_be_used_twice():
    model, x, y, state = problem()
    start = dni_rl.cut(state)
    losses, end = model(x[:5], y[:5], start, FIRST[:5])
    dni_rl.backward(losses, start=start, end=end, critic=make_critic(model))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        dni_rl.backward(losses, start=start, end=end, critic=make_critic(model))


def test_steps_unrolled_one_by_one_need_no_history_where_nothing_is_learned_from_it():
    core = dni_rl.wrap(nn.LSTM(3, 5))
    inputs = torch.randn(5, 4, 3)
    found = []
    for one_by_one in (False, True):
        core.zero_grad()
        start = state = dni_rl.cut(core.initial_state(4))
        pieces = inputs.split(1) if one_by_one else (inputs,)
        outputs = []
        for piece in pieces:
            output, state = core.unroll(piece, state)
            outputs.append(output)
        dni_rl.backward(torch.cat(outputs).square().sum(-1), start=start, end=state)
        found.append([p.grad.clone() for p in core.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": 1.0}, "losses: found float, allowed a tensor"),
        ({"end": None}, "end: found NoneType, allowed a state"),
    ],
)
def test_what_is_no_tensor_is_refused(arguments, message):
    core = dni_rl.wrap(nn.LSTM(3, 5))
    start = dni_rl.cut(core.initial_state(4))
    outputs, end = core.unroll(torch.randn(5, 4, 3), start)
    with pytest.raises(ValueError, match=message):
        dni_rl.backward(**{"losses": outputs.square().sum(-1), "start": start, "end": end, **arguments})
