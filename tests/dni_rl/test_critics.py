"""Error critics: predictions, regression, statistics, and how a prediction becomes a synthetic gradient."""

import copy
import inspect
import io
import math

import pytest
import torch
from core_cases import DOUBLE
from torch import nn

import dni_rl

SIZES, Z, N = (3, 2), 4, 7
MEMORY = 4  # of recurrent critics
MAPS = ((3, 2, 2), (2, 2, 2))  # the states of convolutional critics: C, Y, X
CRITICS = {
    "linear": lambda **settings: dni_rl.GradientCritic(state_sizes=SIZES, **settings),
    "MLP": lambda **settings: dni_rl.GradientCritic(state_sizes=SIZES, hidden_sizes=(8, 6), **settings),
    "linear, plain targets": lambda **settings: dni_rl.GradientCritic(
        state_sizes=SIZES, **{"normalize_targets": False, **settings}
    ),
    "convolutional": lambda **settings: dni_rl.ConvGradientCritic(state_shapes=MAPS, hidden_channels=(4,), **settings),
    "recurrent": lambda **settings: dni_rl.RecurrentGradientCritic(
        state_sizes=SIZES, memory_size=MEMORY, hidden_sizes=(4,), **settings
    ),
    "loss": lambda **settings: dni_rl.LossCritic(state_sizes=SIZES, hidden_sizes=(8, 6), **settings),
    "Sobolev": lambda **settings: dni_rl.SobolevCritic(state_sizes=SIZES, hidden_sizes=(8,), **settings),
}
VALUES = ("loss", "Sobolev")  # these predict the future loss
every_critic = pytest.mark.parametrize("name", CRITICS)
contexts = pytest.mark.parametrize("context_size", [0, Z], ids=["no context", "context"])


def make_critic(name, trained=True, **settings):
    torch.manual_seed(0)
    critic = CRITICS[name](**settings).double()
    if trained:  # any critic that is no longer zero
        for p in critic.parameters():
            nn.init.normal_(p)
        state, target, z = rows_of(name, seed=9)
        fit(critic, state, target, z if critic.context_size else None)
    return critic


def rows(n=N, seed=1):
    """State, target and context of n rows."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(n, width, generator=generator, dtype=DOUBLE) for width in (*SIZES, *SIZES, Z)]
    return tuple(draw[:2]), tuple(3.0 * g + 1.0 for g in draw[2:4]), draw[4]


def rows_of(name, n=N, seed=1):
    """State, target and context of n rows for one of the critics."""
    if name == "recurrent":  # no loss reaches the memory
        state, target, z = rows(n, seed)
        memory = torch.tanh(torch.randn(n, MEMORY, generator=torch.Generator().manual_seed(seed + 100), dtype=DOUBLE))
        return (*state, memory), (*target, torch.zeros_like(memory)), z
    if name != "convolutional":
        return rows(n, seed)
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(n, *shape, generator=generator, dtype=DOUBLE) for shape in (*MAPS, *MAPS, (Z,))]
    return tuple(draw[:2]), tuple(3.0 * g + 1.0 for g in draw[2:4]), draw[4]


def fit(critic, state, target, context=None, valid=None):
    """Fits on windows of one step, n of them side by side, in which every sequence ends; their losses follow from the targets."""
    losses = sum(g.flatten(1).sum(1) for g in target).detach()
    end = tuple(s.detach() for s in state)
    context = None if context is None else torch.stack([context, context])
    window = dni_rl.Window(
        states=tuple(s.unsqueeze(0) for s in state),
        gradients=tuple(g.unsqueeze(0) for g in target),
        valid=None if valid is None else valid.unsqueeze(0),
        losses=losses.unsqueeze(0),
        first=None,
        end=end,
        alive=torch.zeros(len(losses)),
        context=context,
    )
    return critic.fit_window(window)


def join(tensors):
    return torch.cat([x.flatten(-3) if x.dim() >= 4 else x for x in tensors], -1)


def split(name, joined):
    sizes = {"convolutional": [math.prod(shape) for shape in MAPS], "recurrent": (*SIZES, MEMORY)}.get(name, SIZES)
    parts = joined.split(sizes, -1)
    return tuple(p.unflatten(-1, s) for p, s in zip(parts, MAPS, strict=True)) if name == "convolutional" else parts


def assert_same(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **(tolerances or {"rtol": 1e-10, "atol": 1e-12}))


def gradients(critic):
    return [p.grad.clone() for p in critic.parameters()]


def test_every_exported_critic_is_in_this_suite():
    exported = {getattr(dni_rl, name) for name in dni_rl.__all__}
    critics = {c for c in exported if hasattr(c, "synthetic_gradient") and not inspect.isabstract(c)}
    assert critics == {type(make()) for make in CRITICS.values()}, "add the new critic to CRITICS"


# Predictions ----------------------------------------------------------------------------------------------------------


@every_critic
@contexts
def test_the_first_prediction_is_exactly_zero(name, context_size):
    for seed in range(3):
        torch.manual_seed(seed)
        critic = CRITICS[name](context_size=context_size)
        state = tuple(100.0 * s.float() for s in rows_of(name, 5, seed)[0])
        context = 100.0 * torch.randn(5, Z) if context_size else None
        for prediction in (critic(state, context), critic.synthetic_gradient(state, context)):
            assert [g.shape for g in prediction] == [s.shape for s in state]
            assert not any(g.any() for g in prediction)


@contexts
@pytest.mark.parametrize("normalize", [True, False])
def test_a_linear_critic_is_a_matrix_a_bias_and_a_unit(context_size, normalize):
    critic = make_critic("linear", context_size=context_size, normalize_targets=normalize)
    state, _, z = rows()
    layer = critic.net[-1]
    x = join(state) if not context_size else join([*state, z])
    expected = x @ layer.weight.T + layer.bias
    if normalize:
        expected = expected * critic.target_rms
        assert (critic.target_rms - 1.0).abs().min() > 0.1
    assert_same(join(critic(state, z if context_size else None)), expected)


@every_critic
@contexts
def test_the_forward_pass_takes_leading_dimensions_and_sends_gradients_everywhere(name, context_size):
    critic = make_critic(name, context_size=context_size)
    state, _, z = rows_of(name, 6)
    flat = critic(state, z if context_size else None)
    z = z.view(2, 3, Z).requires_grad_() if context_size else None
    state = tuple(s.unflatten(0, (2, 3)).requires_grad_() for s in state)
    prediction = critic(state, z)
    assert_same(tuple(g.flatten(0, 1) for g in prediction), tuple(flat))
    sum(g.square().sum() for g in prediction).backward()
    for key, p in critic.named_parameters():  # an offset of the future loss has no gradient
        assert p.grad is not None or (name in VALUES and p.shape == (1,) and key.endswith("bias"))
    assert all(s.grad.any() for s in state) and (z is None or z.grad.any())


@every_critic
def test_train_and_eval_mode_agree(name):
    critic = make_critic(name)
    expected = join(critic.train()(rows_of(name)[0]))
    assert_same(join(critic.eval()(rows_of(name)[0])), expected, rtol=0, atol=0)


# Regression -----------------------------------------------------------------------------------------------------------


def naive_fit(predicted, goal, rms, valid):
    """Row by row, component by component."""
    loss, count = 0.0, 0
    kept = [n for n in range(len(goal)) if valid[n]]
    for n in kept:
        for k in range(goal.shape[1]):
            loss += float((predicted[n, k] - goal[n, k]) / rms[k]) ** 2
            count += 1
    u = (goal / rms)[kept]
    return {
        "loss": loss / count,
        "explained_variance": 1.0 - (loss / count) / float((u - u.mean(0)).square().mean()),
        "cosine": float(nn.functional.cosine_similarity(predicted[kept], goal[kept]).mean()),
        "predicted_norm": float(predicted[kept].norm(dim=1).mean()),
        "target_norm": float(goal[kept].norm(dim=1).mean()),
    }


@torch.no_grad()
def naive_value_loss(critic, state, target, z, keep):
    losses = join(target).sum(-1)[keep]
    return float(((critic.value(state, z)[keep] - losses) / critic.loss_std).square().mean())


@every_critic
@contexts
@pytest.mark.parametrize("masked", [True, False])
def test_fit_matches_the_definition(name, context_size, masked):
    critic = make_critic(name, context_size=context_size)
    state, target, z = rows_of(name)
    z = z if context_size else None
    valid = torch.tensor([True, False, True, True, False, True, False]) if masked else None
    result = fit(critic, state, target, z, valid)
    rms = critic.target_rms if critic.normalize_targets else torch.ones(sum(SIZES))
    keep = valid if masked else torch.ones(N, dtype=torch.bool)
    predicted, goal = join(critic(state, z)).detach(), join(target)
    learned = len(critic.target_rms)  # all but a memory, which comes last and for which zero is predicted
    assert not predicted[:, learned:].any() and predicted.shape[1] - learned == (MEMORY if name == "recurrent" else 0)
    expected = naive_fit(predicted[:, :learned], goal[:, :learned], rms, keep)
    if name in VALUES:
        expected["loss"] = naive_value_loss(critic, state, target, z, keep) + (name == "Sobolev") * expected["loss"]
    for key, value in expected.items():
        assert getattr(result, key).item() == pytest.approx(value, rel=1e-10), key
        assert getattr(result, key).requires_grad == (key == "loss")


def test_golden_fit():
    critic = dni_rl.GradientCritic(state_sizes=(1,), normalize_targets=False).double()
    nn.init.ones_(critic.net[0].weight)  # M(s) = s
    state, target = torch.tensor([[2.0], [-4.0], [5.0], [77.0]]), torch.tensor([[1.0], [-3.0], [0.0], [math.nan]])
    fit = critic.fit((state.double(),), (target.double(),), valid=torch.tensor([True, True, True, False]))
    assert fit.loss.item() == pytest.approx((1 + 1 + 25) / 3)
    assert fit.cosine.item() == pytest.approx(1.0)  # the row with a zero target is left out
    assert fit.predicted_norm.item() == pytest.approx(11 / 3)
    assert fit.target_norm.item() == pytest.approx(4 / 3)
    assert fit.explained_variance.item() == pytest.approx(1.0 - 9.0 / (26 / 9))
    fit.loss.backward()
    assert critic.net[0].weight.grad.item() == pytest.approx(2 * (1 * 2 + -1 * -4 + 5 * 5) / 3)
    assert critic.net[0].bias.grad.item() == pytest.approx(2 * (1 - 1 + 5) / 3)


@every_critic
@contexts
def test_fit_sends_no_gradient_to_state_target_or_context(name, context_size):
    critic = make_critic(name, context_size=context_size)
    state, target, z = rows_of(name)
    arguments = [*state, *target, z]
    for x in arguments:
        x.requires_grad_()
    fit(critic, state, target, z if context_size else None).loss.backward()
    assert all(x.grad is None for x in arguments)
    assert all(p.grad is not None for p in critic.parameters())


@every_critic
@pytest.mark.parametrize("change", ["each row twice", "another order", "with invalid rows"])
def test_the_fit_depends_on_rows_neither_by_number_nor_by_order(name, change):
    state, target, _ = rows_of(name)
    index = {"each row twice": [*range(N), *range(N)], "another order": [3, 1, 6, 0, 2, 5, 4]}.get(
        change, [*range(N)] * 2
    )
    valid = torch.arange(len(index)) < N if change == "with invalid rows" else None
    results = []
    for rows_taken, mask in ((torch.arange(N), None), (torch.tensor(index), valid)):
        critic = make_critic(name)
        goal = tuple(g[rows_taken].clone() for g in target)
        if mask is not None:
            for g in goal:
                g[~mask] = math.nan  # an invalid row may hold anything
        result = fit(critic, tuple(s[rows_taken] for s in state), goal, valid=mask)
        result.loss.backward()
        metrics = [result.loss, result.explained_variance, result.cosine, result.predicted_norm, result.target_norm]
        metrics = torch.stack(metrics)
        results.append((metrics.detach(), gradients(critic), critic.target_rms.clone()))
    assert_same(results[0], results[1])


def test_the_loss_does_not_depend_on_the_number_of_layers():
    losses = []
    for copies in (1, 3):  # a core of three layers in which all layers have the same states and targets
        critic = dni_rl.GradientCritic(state_sizes=SIZES * copies).double()
        state, target, _ = rows()
        losses.append(critic.fit(state * copies, target * copies).loss.detach())
    assert_same(losses[0], losses[1])


@every_critic
def test_a_fit_without_valid_rows_learns_nothing_and_stays_finite(name):
    critic = make_critic(name)
    state, target, _ = rows_of(name)
    result = fit(critic, state, target, valid=torch.zeros(N, dtype=torch.bool))
    result.loss.backward()
    assert result.loss.item() == 0.0 and not any(g.any() for g in gradients(critic))


@every_critic
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_a_fit_without_valid_rows_is_no_update_of_the_statistics(name, shared):
    critic = make_critic(name, context_size=Z, normalize_context=True, warmup_updates=2)
    if shared:
        critic.share_statistics(lambda total: total / 2)  # of two processes, the other of which has no rows either
    state, target, z = rows_of(name)
    before = {key: value.clone() for key, value in critic.named_buffers()}
    fit(critic, state, target, z, valid=torch.zeros(N, dtype=torch.bool))
    assert_same(dict(critic.named_buffers()), before, rtol=0, atol=0)
    assert critic.num_updates == 1 and not join(critic.synthetic_gradient(state, z)).any()  # still warming up
    fit(critic, state, target, z, valid=torch.arange(N) == 2)
    assert critic.num_updates == 2 and join(critic.synthetic_gradient(state, z)).any()
    assert not torch.equal(critic.target_rms, before["target_rms"])
    assert not torch.equal(critic.context_rms, before["context_rms"])


@pytest.mark.parametrize("name", [name for name in CRITICS if name != "recurrent"])  # which reads on through such steps
def test_an_invalid_row_may_have_any_state(name):
    state, target, _ = rows_of(name)
    valid, found = torch.arange(N) != 2, []
    for value in (0.0, math.nan):
        critic = make_critic(name)
        result = fit(critic, tuple(s.index_fill(0, torch.tensor(2), value) for s in state), target, valid=valid)
        result.loss.backward()
        found.append((result.loss.detach(), gradients(critic), dict(critic.named_buffers())))
    assert_same(found[0], found[1])
    assert found[1][0].isfinite()


@every_critic
def test_two_fits_may_go_before_one_backward_pass(name):
    state, target, _ = rows_of(name)
    together, apart = make_critic(name), make_critic(name)
    sum(fit(together, state, tuple(n * g for g in target)).loss for n in (1.0, 2.0)).backward()
    for n in (1.0, 2.0):
        fit(apart, state, tuple(n * g for g in target)).loss.backward()
    assert_same(gradients(together), gradients(apart))


@every_critic
@pytest.mark.parametrize("normalize", [False, True])
def test_an_invalid_row_may_have_any_context(name, normalize):
    state, target, z = rows_of(name)
    valid, found = torch.arange(N) != 2, []
    for value in (0.0, math.nan):
        critic = make_critic(name, context_size=Z, normalize_context=normalize)
        context = z.clone()
        context[2] = value
        result = fit(critic, state, target, context, valid=valid)
        result.loss.backward()
        found.append((result.loss.detach(), gradients(critic), dict(critic.named_buffers())))
    assert_same(found[0], found[1])
    assert found[1][0].isfinite()


def test_targets_are_divided_by_a_running_rms_that_starts_unbiased():
    critic = dni_rl.GradientCritic(state_sizes=SIZES, statistics_decay=0.8).double()
    seen = []
    for seed in range(5):
        state, target, _ = rows(seed=seed)
        critic.fit(state, target)
        seen.append(join(target).square().mean(0))
        weights = torch.tensor([0.8**age for age in reversed(range(len(seen)))], dtype=DOUBLE)
        expected = ((weights[:, None] * torch.stack(seen)).sum(0) / weights.sum()).sqrt()
        assert_same(critic.target_rms, expected)
    assert critic.num_updates.item() == 5


def test_a_component_without_gradient_cannot_blow_up_the_loss():
    critic = dni_rl.GradientCritic(state_sizes=(2,)).double()
    critic.fit((torch.zeros(1, 2, dtype=DOUBLE),), (torch.zeros(1, 2, dtype=DOUBLE),))
    assert critic.target_rms.tolist() == [1.0, 1.0]  # nothing seen: unit scale
    critic = dni_rl.GradientCritic(state_sizes=(2,)).double()
    critic.fit((torch.zeros(1, 2, dtype=DOUBLE),), (torch.tensor([[4.0, 1e-12]], dtype=DOUBLE),))
    assert critic.target_rms[0].item() == 4.0
    assert critic.target_rms[1].item() == pytest.approx(1e-3 * 4.0 / 2**0.5)


@every_critic
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_overflow_shows_in_the_loss_and_stays_out_of_the_statistics(name, value):
    critic = make_critic(name, max_norm_ratio=0.5)
    state, target, _ = rows_of(name)
    critic.observe_window(target)
    before = copy.deepcopy(critic.state_dict())
    target[0][2, 1] = value
    critic.observe_window(target)
    assert not fit(critic, state, target).loss.isfinite()
    assert_same(critic.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear", "MLP", "convolutional", *VALUES])
def test_normalised_learning_does_not_depend_on_the_unit_of_the_loss(name):
    results = []
    for unit in (1.0, 1000.0):
        critic = make_critic(name, trained=False)
        optimizer = torch.optim.Adam(critic.parameters(), 0.01)
        for seed in range(10):
            state, target, _ = rows_of(name, seed=seed)
            optimizer.zero_grad()
            result = fit(critic, state, tuple(unit * g for g in target))
            result.loss.backward()
            optimizer.step()
        results.append((result.loss.detach(), join(critic(rows_of(name)[0])).detach() / unit))
    assert results[0][1].any()
    assert_same(results[0], results[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "MLP", "linear, plain targets"])
@contexts
def test_a_critic_learns_a_linear_gradient(name, context_size):
    critic = make_critic(name, trained=False, context_size=context_size)
    optimizer = torch.optim.Adam(critic.parameters(), 0.02)
    mix = torch.randn(5 + context_size, 5, dtype=DOUBLE)
    for step in range(300):
        state, _, z = rows_of(name, 32, seed=step)
        x = join(state) if not context_size else join([*state, z])
        optimizer.zero_grad()
        result = fit(critic, state, (x @ mix).split(SIZES, -1), z if context_size else None)
        result.loss.backward()
        optimizer.step()
    # chance is 0; the MLP is far from converged
    assert result.explained_variance.item() > (0.8 if name == "MLP" else 0.99)
    assert result.cosine.item() > (0.9 if name == "MLP" else 0.99)


# The synthetic gradient -----------------------------------------------------------------------------------------------


@every_critic
@contexts
def test_a_synthetic_gradient_is_the_prediction_times_discount_and_scale_without_graph(name, context_size):
    critic = make_critic(name, context_size=context_size, gradient_discount=0.5, scale=0.1)
    state, _, z = rows_of(name)
    z = z if context_size else None
    b = critic.synthetic_gradient(tuple(s.requires_grad_() for s in state), z)
    assert_same(join(b), 0.05 * join(critic(state, z)).detach())
    assert not any(g.requires_grad for g in b)


@every_critic
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_nothing_comes_from_beyond_an_end_not_even_nan(name, dtype):
    critic = make_critic(name)
    state, _, _ = rows_of(name, 3)
    state[0][1].fill_(math.nan)
    b = join(critic.synthetic_gradient(state, alive=torch.tensor([1, 0, 1]).to(dtype)))
    assert not b[1].any()
    assert_same(b[[0, 2]], join(critic(state))[[0, 2]].detach())


def test_the_predictions_are_applied_after_the_warmup():
    critic = make_critic("linear", trained=False, warmup_updates=2)
    nn.init.normal_(critic.net[0].weight)
    state, target, _ = rows()
    applied = []
    for _ in range(4):
        applied.append(bool(join(critic.synthetic_gradient(state)).any()))
        critic.fit(state, target)
    assert applied == [False, False, True, True]


def test_the_window_norm_is_an_unbiased_running_rms():
    critic = dni_rl.GradientCritic(state_sizes=SIZES, statistics_decay=0.8).double()
    assert critic.window_norm.item() == 0.0
    seen = []
    for seed in range(5):
        gradient = rows(seed=seed)[1]
        critic.observe_window(gradient)
        seen.append(join(gradient).square().sum(-1).mean())
        weights = torch.tensor([0.8**age for age in reversed(range(len(seen)))], dtype=DOUBLE)
        assert_same(critic.window_norm, ((weights * torch.stack(seen)).sum() / weights.sum()).sqrt())
        for _ in range(seed):  # however often the critic is fitted
            critic.fit(*rows(seed=seed)[:2])
        assert_same(critic.window_norm, ((weights * torch.stack(seen)).sum() / weights.sum()).sqrt())


def observed(norms, decay=0.9):
    """A critic that has looked at windows with gradients of these norms."""
    critic = dni_rl.GradientCritic(state_sizes=(2,), statistics_decay=decay).double()
    for norm in norms:
        critic.observe_window((torch.tensor([[0.6 * norm, 0.8 * norm]], dtype=DOUBLE),))
    return critic


def test_one_window_does_not_raise_the_window_norm_far_beyond_the_largest_of_the_last_32():
    usual = [1.0] * 31 + [3.0]
    assert_same(observed([*usual, 1000.0]).window_norm, observed([*usual, 6.0]).window_norm)  # twice the largest norm
    assert observed([*usual, 6.0]).window_norm > observed([*usual, 5.9]).window_norm
    assert_same(observed([3.0, *[1.0] * 32, 9.0]).window_norm, observed([3.0, *[1.0] * 32, 2.0]).window_norm)
    # what stays counts in full after a few looks, and what comes now and then always does
    assert observed(usual + [1000.0] * 60).window_norm > 990.0
    now_and_then = ([0.01] * 30 + [5.0]) * 20
    squares = torch.tensor([norm**2 for norm in now_and_then], dtype=DOUBLE)
    weights = 0.9 ** torch.arange(len(squares) - 1, -1, -1, dtype=DOUBLE)
    assert_same(observed(now_and_then).window_norm, ((weights * squares).sum() / weights.sum()).sqrt())


def test_the_window_norm_is_not_limited_while_nothing_usual_is_known():
    assert observed([1.0] * 31 + [1000.0]).window_norm > 300.0
    assert observed([0.0] * 40 + [1000.0]).window_norm > 300.0
    assert_same(observed([1.0] * 40 + [math.inf]).window_norm, torch.tensor(1.0, dtype=DOUBLE))  # is left out, as ever


@every_critic
def test_the_bound_shortens_what_is_too_long_and_leaves_the_rest(name):
    critic = make_critic(name, max_norm_ratio=0.5)
    state, _, _ = rows_of(name, 40)
    free = join(critic(state)).detach()
    window = torch.zeros_like(free)
    window[:, :3] = free[:, :3] * (2.0 * free.norm(dim=1).median() / free[:, :3].norm(dim=1, keepdim=True))
    critic.observe_window(split(name, window))
    bound = 0.5 * critic.window_norm
    assert_same(bound, free.norm(dim=1).median())
    b = join(critic.synthetic_gradient(state))
    too_long = free.norm(dim=1) > bound
    assert 10 < too_long.sum() < 30
    assert_same(b[~too_long], free[~too_long])
    assert_same(b[too_long], (bound * nn.functional.normalize(free, dim=1))[too_long])


def test_the_bound_is_zero_while_windows_have_no_gradient():
    critic = make_critic("linear", max_norm_ratio=0.5)
    assert not join(critic.synthetic_gradient(rows()[0])).any()
    critic.observe_window(tuple(torch.zeros_like(s) for s in rows()[0]))
    assert not join(critic.synthetic_gradient(rows()[0])).any()


# Slow copy and future losses ------------------------------------------------------------------------------------------


@every_critic
def test_the_slow_copy_follows_and_is_what_bootstraps(name):
    plain, critic = make_critic(name), make_critic(name, slow_copy_rate=0.25)
    state, target, _ = rows_of(name)
    assert list(critic.state_dict())[: len(KEYS[name])] == KEYS[name]
    assert all(key.startswith("slow_net.") for key in list(critic.state_dict())[len(KEYS[name]) :])
    before = [p.clone() for p in critic.slow_net.parameters()]
    fit(critic, state, target).loss.backward()
    for slow, old, fast in zip(critic.slow_net.parameters(), before, critic.net.parameters(), strict=True):
        assert_same(slow, (0.75 * old + 0.25 * fast).detach())
        assert not slow.requires_grad and slow.grad is None and fast.grad is not None
    expected = copy.deepcopy(critic)
    expected.net = critic.slow_net
    assert_same(join(critic.synthetic_gradient(state)), join(expected(state)).detach())
    fit(plain, state, target)
    with torch.no_grad():
        for p, fast in zip(plain.net.parameters(), critic.net.parameters(), strict=True):
            p.copy_(fast)
    assert_same(join(critic(state)), join(plain(state)))
    assert not torch.equal(join(critic.synthetic_gradient(state)), join(plain.synthetic_gradient(state)))


@pytest.mark.parametrize("kind", [dni_rl.LossCritic, dni_rl.SobolevCritic])
def test_without_hidden_layers_the_gradient_of_a_predicted_loss_is_linear_in_state_and_context(kind):
    critic = kind(state_sizes=(3, 2), context_size=4, normalize_targets=False).double()
    with torch.no_grad():
        for p in critic.net.parameters():
            p.normal_()
    linear, form = critic.net.net[0].weight[0], critic.net.form.weight
    state, z = (torch.randn(6, 3).double(), torch.randn(6, 2).double()), torch.randn(6, 4).double()
    quadratic, mixed = form[:, :5], form[:, 5:]
    expected = linear[:5] + join(state) @ (quadratic + quadratic.T) + z @ mixed.T
    with torch.no_grad():
        assert_same(join(critic(state, z)), expected)


@pytest.mark.parametrize("name", VALUES)
@contexts
def test_the_prediction_is_the_gradient_of_the_predicted_loss(name, context_size):
    critic = make_critic(name, context_size=context_size)
    state, _, z = rows()
    z = z if context_size else None
    for s in state:
        s.requires_grad_()
    expected = torch.autograd.grad(critic.value(state, z).sum(), state)
    with torch.no_grad():
        assert_same(critic(state, z), expected)
    assert torch.autograd.gradcheck(lambda *s: join(critic(s, z)), state)  # and may be differentiated again


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("lambda_", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("dense", [True, False])
def test_losses_to_go_end_where_an_episode_starts_and_bootstrap_from_the_value(name, lambda_, dense):
    if lambda_ < 1.0 and not dense:
        return
    T, B = 4, 3
    critic = make_critic(name, target_lambda=lambda_, gradient_discount=0.9, scale=0.5, dense_targets=dense)
    states = tuple(torch.randn(T + 1, B, size, dtype=DOUBLE) for size in SIZES)
    losses, first = torch.randn(T, B, dtype=DOUBLE), torch.zeros(T, B, dtype=torch.bool)
    first[2, 1] = first[0, 2] = True
    alive = torch.tensor([1.0, 1.0, 0.0])
    V = 0.45 * critic.value(states).detach()
    expected = torch.zeros(T, B, dtype=DOUBLE)
    for b in range(B):
        for t in range(T):  # the definition: a mixture of windows cut n steps later
            ends = [u for u in range(t + 1, T) if first[u, b]] or [T]
            survives = not any(first[t + 1 :, b]) and bool(alive[b])
            last = ends[0] - t
            for n in range(1, last + 1):
                weight = lambda_ ** (n - 1) * (1.0 if n == last else 1.0 - lambda_)
                bootstrap = V[t + n, b] if n < last or survives else 0.0
                expected[t, b] += weight * (losses[t : t + n, b].sum() + bootstrap)
    R = T if dense else 1
    window = dni_rl.Window(
        states=tuple(s[:R] for s in states),
        gradients=tuple(torch.randn_like(s[:R]) for s in states),
        valid=~first[:R],
        losses=losses,
        first=first,
        end=tuple(s[T] for s in states),
        alive=alive,
        context=None,
    )
    assert_same(critic._loss_to_go(window), expected[:R].flatten())
    if name == "loss":
        result, keep = critic.fit_window(window), ~first[:R].flatten()
        values = critic.value(tuple(s[:R].flatten(0, 1) for s in states))
        error = ((values - expected[:R].flatten()) / critic.loss_std)[keep].square().mean()
        assert_same(result.loss, error)


@pytest.mark.parametrize("name", VALUES)
def test_a_critic_of_losses_learns_their_gradient(name):
    critic = make_critic(name, trained=False)
    optimizer = torch.optim.Adam(critic.parameters(), 0.02)
    slope = torch.randn(5, dtype=DOUBLE)
    for step in range(400):  # L(s) = sin <slope, s>
        state = rows(64, seed=step)[0]
        angle = 0.3 * join(state) @ slope
        gradient = (0.3 * angle.cos().unsqueeze(-1) * slope).split(SIZES, -1)
        window = dni_rl.Window(
            tuple(s[None] for s in state),
            tuple(g[None] for g in gradient),
            None,
            angle.sin()[None],
            None,
            state,
            torch.zeros(64),
            None,
        )
        optimizer.zero_grad()
        result = critic.fit_window(window)
        result.loss.backward()
        optimizer.step()
    assert result.cosine.item() > 0.9 and result.explained_variance.item() > 0.5


@contexts
@pytest.mark.parametrize(("value_cost", "gradient_cost"), [(0.0, 1.0), (0.5, 2.0)])
def test_a_sobolev_critic_descends_on_values_and_gradients(context_size, value_cost, gradient_cost):
    settings = {"context_size": context_size, "value_cost": value_cost, "gradient_cost": gradient_cost}
    critic = make_critic("Sobolev", **settings)
    state, target, z = rows()
    z = z if context_size else None
    result = fit(critic, state, target, z)
    result.loss.backward()
    actual = [p.grad for p in critic.parameters()]
    leaves = tuple(s.clone().requires_grad_() for s in state)
    value = critic.value(leaves, z)
    slopes = join(torch.autograd.grad(value.sum(), leaves, create_graph=True))
    loss = value_cost * ((value - join(target).sum(-1)) / critic.loss_std).square().mean()
    loss = loss + gradient_cost * ((slopes - join(target)) / critic.target_rms).square().mean()
    assert_same(result.loss, loss)
    expected = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True, materialize_grads=True)
    assert_same(
        [torch.zeros_like(e) if a is None else a for a, e in zip(actual, expected, strict=True)], list(expected)
    )


def test_weights_of_a_sobolev_critic_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"value_cost, gradient_cost: found 1\.0, 0\.0, allowed 0 or more and above 0"):
        dni_rl.SobolevCritic(state_sizes=SIZES, gradient_cost=0.0)


@pytest.mark.parametrize("shapes", [(), ((3, 2, 2), (3, 2, 1)), ((0, 2, 2),)])
def test_shapes_of_feature_maps_out_of_range_are_refused(shapes):
    with pytest.raises(ValueError, match="state_shapes, hidden_channels: expected at least one"):
        dni_rl.ConvGradientCritic(state_shapes=shapes)


def test_a_convolutional_critic_treats_all_places_alike():
    critic = dni_rl.ConvGradientCritic(state_shapes=((2, 9, 9),), hidden_channels=(3,), context_size=Z).double()
    for p in critic.parameters():
        nn.init.normal_(p)
    maps, z = torch.zeros(1, 2, 9, 9, dtype=DOUBLE), torch.randn(1, Z, dtype=DOUBLE)
    maps[..., 3:5, 3:5] = torch.randn(2, 2, 2, dtype=DOUBLE)
    here = critic((maps,), z)[0]
    there = critic((maps.roll((1, 1), (-2, -1)),), z)[0]
    inner = slice(3, 7)
    assert_same(there[..., inner, inner], here.roll((1, 1), (-2, -1))[..., inner, inner])
    assert (here - critic((maps,), z + 1.0)[0]).abs().min() > 0.0  # the context reaches every place


GOLDEN = [
    1.5069692927349894,
    -0.06219170814132591,
    0.05007997816474716,
    0.06756513247120452,
    0.34197380274505806,
    0.0677076284101177,
    0.19757400107508943,
    1.5069692927349894,  # the error, which is its loss
    1.4187356963762754,
]


def test_the_numbers_of_a_gradient_critic_stay():
    """Golden values: long experiments continue across versions."""
    torch.manual_seed(0)
    core, head = dni_rl.LSTM(3, 4, 2).double(), nn.Linear(4, 1).double()
    critic = dni_rl.GradientCritic(
        state_sizes=core.state_sizes, hidden_sizes=(6,), gradient_discount=0.9, max_norm_ratio=0.5
    ).double()
    optimizers = [
        torch.optim.Adam([*core.parameters(), *head.parameters()], 0.01),
        torch.optim.Adam(critic.parameters(), 0.01),
    ]
    generator = torch.Generator().manual_seed(0)
    state = core.initial_state(5)
    for _ in range(20):
        x = torch.randn(6, 5, 3, dtype=DOUBLE, generator=generator)
        first = torch.rand(6, 5, generator=generator) < 0.15
        for optimizer in optimizers:
            optimizer.zero_grad()
        state = dni_rl.cut(state)
        outputs, end = core.unroll(x, state, first)
        losses = (head(outputs).squeeze(-1) - x.sum(-1)).square()
        report = dni_rl.backward(losses, start=state, end=end, critic=critic, alive=~first[0])
        for optimizer in optimizers:
            optimizer.step()
        state = end
    assert_same(torch.stack(list(report.as_dict().values())), torch.tensor(GOLDEN, dtype=DOUBLE), rtol=1e-9, atol=1e-12)


# Files ----------------------------------------------------------------------------------------------------------------

STATISTICS = [
    "num_updates",
    "target_rms",
    "_target_square",
    "_window_square",
    "_window_weight",
    "_recent_squares",
    "_extra_state",
]
OF_CONTEXTS = ["context_rms", "_context_square", "_context_weight"]
KEYS = {
    "linear": [*STATISTICS, "net.0.weight", "net.0.bias"],
    "MLP": [
        *STATISTICS,
        "net.linear.weight",
        "net.linear.bias",
        *(f"net.mlp.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")),
    ],
    "linear, plain targets": [*STATISTICS, "net.0.weight", "net.0.bias"],
}
OF_LOSSES = ["loss_mean", "loss_std", "_loss_moments", "_loss_weight"]
KEYS["convolutional"] = [key for key in KEYS["MLP"] if ".4." not in key]
KEYS["recurrent"] = [
    *STATISTICS,
    *(f"net.cell.{key}" for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
    *(key.replace("net.", "net.readout.") for key in KEYS["convolutional"][len(STATISTICS) :]),
]
KEYS["loss"] = [
    *STATISTICS[:-1],
    *OF_LOSSES,
    "_extra_state",
    *(f"net.{key}" for key in KEYS["MLP"][len(STATISTICS) :]),
    "net.form.weight",
]
KEYS["Sobolev"] = [key for key in KEYS["loss"] if ".4." not in key]


@every_critic
@contexts
def test_state_dict_keys_are_stable(name, context_size):
    assert list(make_critic(name, context_size=context_size).state_dict()) == KEYS[name]


@every_critic
@contexts
def test_save_load_and_continue_equals_never_having_stopped(name, context_size):
    def run(critic, seeds):
        optimizer = torch.optim.SGD(critic.parameters(), 0.01)
        for seed in seeds:
            state, target, z = rows_of(name, seed=seed)
            optimizer.zero_grad()
            critic.observe_window(target)
            fit(critic, state, target, z if context_size else None).loss.backward()
            optimizer.step()
        return [
            join(critic.synthetic_gradient(state, z if context_size else None)),
            critic.window_norm,
            *critic.buffers(),
            *critic.slow_net.parameters(),
        ]

    settings = {"context_size": context_size, "max_norm_ratio": 0.5, "warmup_updates": 6, "slow_copy_rate": 0.3}
    expected = run(make_critic(name, trained=False, **settings), range(8))
    stopped, file = make_critic(name, trained=False, **settings), io.BytesIO()
    run(stopped, range(4))
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    loaded = CRITICS[name](**settings).double()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for critic in (loaded, copy.deepcopy(stopped)):
        assert_same(run(critic, range(4, 8)), expected, rtol=0, atol=0)
    assert expected[0].any()


@every_critic
def test_a_state_dict_is_of_tensors_and_older_ones_load(name):
    critic = make_critic(name, max_norm_ratio=0.5)
    for _ in range(3):
        critic.window_is_due()
    values = {key: value.clone() for key, value in critic.state_dict().items()}
    assert values["_extra_state"].equal(torch.tensor(3)) and values["_extra_state"].device.type == "cpu"
    for extra in (values["_extra_state"], {"windows_seen": 3}):
        loaded = CRITICS[name](max_norm_ratio=0.5).double()
        loaded.load_state_dict(values | {"_extra_state": extra})
        assert loaded.get_extra_state() == 3


# Critics of one's own -------------------------------------------------------------------------------------------------


class Own(dni_rl.GradientRegression):
    """As the docstring of `GradientRegression` has it, with the predictor set in either way."""

    def __init__(self, how, **settings):
        super().__init__(state_sizes=(2, 1), **settings)
        net = nn.Linear(3, 3)
        if how == "set_net":
            self.set_net(net)
        elif how == "net":
            self.net = net

    def _gradient(self, net, joined, context):
        return self._in_target_units(net(joined))


def window_of_three():
    states = tuple(torch.randn(1, 4, size) for size in (2, 1))
    return dni_rl.Window(
        states, states, valid=None, losses=torch.zeros(1, 4), first=None, end=states, alive=None, context=None
    )


@pytest.mark.parametrize("how", ["set_net", "net"])
def test_a_critic_of_ones_own_needs_a_network_and_how_to_read_it(how):
    torch.manual_seed(0)
    critic = Own(how, max_norm_ratio=0.5)
    assert list(critic.state_dict())[-2:] == ["net.weight", "net.bias"]
    critic.fit_window(window_of_three()).loss.backward()
    assert critic.net.weight.grad.any()
    assert join(critic.synthetic_gradient((torch.randn(4, 2), torch.randn(4, 1)))).shape == (4, 3)


def test_a_slow_copy_of_ones_own_network_needs_set_net():
    critic, state = Own("set_net", slow_copy_rate=0.5), (torch.randn(4, 2), torch.randn(4, 1))
    with torch.no_grad():
        critic.net.bias.add_(1.0)
    assert not torch.equal(join(critic.synthetic_gradient(state)), join(critic(state)))
    critic.net.register_buffer("statistic", torch.zeros(1))
    critic.set_net(critic.net)
    critic.net.statistic.add_(7.0)
    critic.fit_window(window_of_three())
    assert critic.slow_net.statistic == 7.0
    with pytest.raises(RuntimeError, match=r"slow_copy_rate: found 0.5, but Own has no slow copy; call set_net\(net\)"):
        Own("net", slow_copy_rate=0.5).synthetic_gradient(state)
    with pytest.raises(AttributeError, match="no attribute 'net'"):
        Own("neither").synthetic_gradient(state)


# Errors ---------------------------------------------------------------------------------------------------------------


def refuses(message, function, *arguments, **settings):
    with pytest.raises(ValueError) as error:
        function(*arguments, **settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_size": -1}, "context_size: found -1, allowed 0 (no context) or more"),
        ({"context_size": 2.0}, "context_size: found 2.0, allowed 0 (no context) or more"),
        ({"gradient_discount": 1.5}, "gradient_discount: found 1.5, allowed 0 to 1"),
        ({"gradient_discount": -0.5}, "gradient_discount: found -0.5, allowed 0 to 1"),
        ({"gradient_discount": math.nan}, "gradient_discount: found nan, allowed 0 to 1"),
        ({"scale": -0.1}, "scale: found -0.1, allowed 0 or more"),
        ({"scale": math.nan}, "scale: found nan, allowed 0 or more"),
        ({"max_norm_ratio": 0.0}, "max_norm_ratio: found 0.0, allowed above 0, or None for no bound"),
        ({"max_norm_ratio": math.nan}, "max_norm_ratio: found nan, allowed above 0, or None for no bound"),
        ({"warmup_updates": -1}, "warmup_updates: found -1, allowed 0 or more"),
        ({"statistics_decay": 1.0}, "statistics_decay: found 1.0, allowed 0 up to, not including, 1"),
        ({"statistics_decay": -0.1}, "statistics_decay: found -0.1, allowed 0 up to, not including, 1"),
        ({"slow_copy_rate": 0.0}, "slow_copy_rate: found 0.0, allowed above 0 to 1, or None for no slow copy"),
        ({"slow_copy_rate": math.nan}, "slow_copy_rate: found nan, allowed above 0 to 1, or None for no slow copy"),
        ({"target_lambda": 1.5}, "target_lambda: found 1.5, allowed 0 to 1"),
        (
            {"target_lambda": 0.5, "dense_targets": False},
            "target_lambda: found 0.5 with dense_targets=False, allowed 1; mixed targets come from the steps inside the window, "
            "so use dense_targets=True",
        ),
    ],
)
@every_critic
def test_settings_out_of_range_are_refused(name, settings, message):
    refuses(message, CRITICS[name], **settings)


@pytest.mark.parametrize(
    ("state_sizes", "hidden_sizes"), [((), ()), ((3, 0), ()), ((3,), (4, 0)), ((3,), 4), (3, ()), (((3, 2, 2),), ())]
)
def test_sizes_out_of_range_are_refused(state_sizes, hidden_sizes):
    message = "state_sizes, hidden_sizes: expected positive integers and at least one state tensor, got "
    refuses(
        f"{message}{state_sizes}, {hidden_sizes}; those of a core are its state_sizes; for feature maps use "
        "ConvGradientCritic(state_shapes=...)",
        dni_rl.GradientCritic,
        state_sizes=state_sizes,
        hidden_sizes=hidden_sizes,
    )


@every_critic
def test_states_and_contexts_of_other_sizes_are_refused(name):
    state, target, z = rows_of(name)
    critic = make_critic(name)
    wanted = f"widths {critic.state_sizes}, got shapes"
    if name == "convolutional":
        wanted = f"shapes [..., C, Y, X] with {MAPS}, got"
    for call in (critic, critic.synthetic_gradient, lambda s: fit(critic, s, target), critic.observe_window):
        for wrong in (state[::-1], state[:1]):
            refuses(f"state: expected {wanted} {[tuple(s.shape) for s in wrong]}", call, wrong)
    refuses("context: expected None (context_size=0), got (7, 4)", critic, state, z)
    critic = make_critic(name, context_size=Z)
    refuses("context: expected (7, 4) (context_size=4), got None", critic, state)
    refuses("context: expected (7, 4) (context_size=4), got (7, 3)", critic, state, z[:, 1:])
    refuses("context: expected (7, 4) (context_size=4), got (6, 4)", critic, state, z[1:])


# Normalised contexts --------------------------------------------------------------------------------------------------


@every_critic
def test_normalised_contexts_are_divided_by_their_rms(name):
    """A critic of a context in other units predicts and learns the same."""
    units = torch.tensor([1e-3, 50.0, 2.0, 0.1], dtype=DOUBLE)
    critics = [make_critic(name, trained=False, context_size=Z, normalize_context=True) for _ in range(2)]
    for critic in critics:
        torch.manual_seed(3)
        for p in critic.net.parameters():
            nn.init.normal_(p)
    for seed in range(4):
        state, target, z = rows_of(name, seed=seed)
        fits = [fit(critic, state, target, z * u) for critic, u in zip(critics, (1.0, units), strict=True)]
        assert_same(fits[0].loss, fits[1].loss)
        for found in fits:
            found.loss.backward()
        for a, b in zip(critics[0].net.parameters(), critics[1].net.parameters(), strict=True):
            assert_same(a.grad, b.grad)
        assert_same(
            *(join(critic.synthetic_gradient(state, z * u)) for critic, u in zip(critics, (1.0, units), strict=True))
        )
    assert_same(critics[1].context_rms, critics[0].context_rms * units)


def test_the_rms_of_a_context_is_that_of_its_valid_rows():
    critic = make_critic("MLP", trained=False, context_size=Z, normalize_context=True, statistics_decay=0.5)
    state, target, z = rows()
    z[:, 2] = 0.0
    valid = torch.arange(len(z)) % 2 == 0
    z[~valid] = math.nan
    assert_same(critic.context_rms, torch.ones(Z, dtype=DOUBLE))
    critic.fit(state, target, z.nan_to_num(5.0), valid)
    expected = z[valid].square().mean(0).sqrt()
    assert_same(critic.context_rms[:2], expected[:2])
    assert critic.context_rms[2] == 1.0, "what is always 0 is left alone"
    critic.fit(state, target, torch.full_like(z, 7.0), valid)
    assert_same(critic.context_rms[0], ((0.25 * expected[0] ** 2 + 0.5 * 49.0) / 0.75).sqrt())


def test_a_context_that_comes_back_after_a_long_time_does_not_explode():
    critic = make_critic("linear", trained=False, context_size=Z, normalize_context=True, normalize_targets=False)
    with torch.no_grad():
        critic.net[0].weight[:, sum(SIZES)] = 1.0  # predicts the first component of the context as it reads it
    state, target, z = rows(n=10_000)
    z[:, 0] = 0.0
    z[17, 0] = -3.0
    critic.fit(state, target, z)
    assert_same(critic.synthetic_gradient(state, z)[0][17], torch.full((3,), -100.0, dtype=DOUBLE))  # one in 10,000
    critic.fit(state, target, z.clone().index_fill_(0, torch.tensor([17, 18]), 3.0))
    scaled = critic.synthetic_gradient(state, z)[0][17]
    assert_same(scaled, (z[17, 0] / critic.context_rms[0]).expand(3))  # rarer than that alone feels the bound
    assert scaled.abs().max() < 100.0
    for _ in range(3000):
        critic._rows_of_context(torch.zeros(1, Z), torch.ones(1, 1, dtype=DOUBLE))
    assert critic.context_rms[0] < 1e-6
    assert join(critic.synthetic_gradient(state, z)).abs().max() == 100.0


def test_normalised_contexts_are_in_the_state_dict_and_need_a_context():
    keys = list(make_critic("MLP", context_size=Z, normalize_context=True).state_dict())
    assert [key for key in keys if key not in KEYS["MLP"]] == OF_CONTEXTS
    with pytest.raises(ValueError, match="normalize_context: found True with context_size=0, allowed False"):
        make_critic("MLP", normalize_context=True)
