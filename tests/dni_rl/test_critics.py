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
CRITICS = {
    "linear": lambda **settings: dni_rl.GradientCritic(state_sizes=SIZES, **settings),
    "MLP": lambda **settings: dni_rl.GradientCritic(state_sizes=SIZES, hidden_sizes=(8, 6), **settings),
    "linear, plain targets": lambda **settings: dni_rl.GradientCritic(
        state_sizes=SIZES, **{"normalize_targets": False, **settings}
    ),
}
every_critic = pytest.mark.parametrize("name", CRITICS)
contexts = pytest.mark.parametrize("context_size", [0, Z], ids=["no context", "context"])


def make_critic(name, trained=True, **settings):
    torch.manual_seed(0)
    critic = CRITICS[name](**settings).double()
    if trained:  # any critic that is no longer zero
        for p in critic.parameters():
            nn.init.normal_(p)
        critic.fit(*rows(seed=9)[:2], rows(seed=9)[2] if critic.context_size else None)
    return critic


def rows(n=N, seed=1):
    """State, target and context of n rows."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(n, width, generator=generator, dtype=DOUBLE) for width in (*SIZES, *SIZES, Z)]
    return tuple(draw[:2]), tuple(3.0 * g + 1.0 for g in draw[2:4]), draw[4]


def join(tensors):
    return torch.cat(tensors, -1)


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
        state = tuple(100.0 * torch.randn(5, size) for size in SIZES)
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
    state, _, z = rows(6)
    flat = critic(state, z if context_size else None)
    z = z.view(2, 3, Z).requires_grad_() if context_size else None
    state = tuple(s.view(2, 3, -1).requires_grad_() for s in state)
    prediction = critic(state, z)
    assert_same(tuple(g.flatten(0, 1) for g in prediction), tuple(flat))
    join(prediction).sum().backward()
    assert all(p.grad is not None for p in critic.parameters())
    assert all(s.grad.any() for s in state) and (z is None or z.grad.any())


@every_critic
def test_train_and_eval_mode_agree(name):
    critic = make_critic(name)
    expected = join(critic.train()(rows()[0]))
    assert_same(join(critic.eval()(rows()[0])), expected, rtol=0, atol=0)


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


@every_critic
@contexts
@pytest.mark.parametrize("masked", [True, False])
def test_fit_matches_the_definition(name, context_size, masked):
    critic = make_critic(name, context_size=context_size)
    state, target, z = rows()
    z = z if context_size else None
    valid = torch.tensor([True, False, True, True, False, True, False]) if masked else None
    fit = critic.fit(state, target, z, valid)
    rms = critic.target_rms if critic.normalize_targets else torch.ones(sum(SIZES))
    keep = valid if masked else torch.ones(N, dtype=torch.bool)
    expected = naive_fit(join(critic(state, z)).detach(), join(target), rms, keep)
    for key, value in expected.items():
        assert getattr(fit, key).item() == pytest.approx(value, rel=1e-10), key
        assert getattr(fit, key).requires_grad == (key == "loss")


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
    state, target, z = rows()
    arguments = [*state, *target, z]
    for x in arguments:
        x.requires_grad_()
    critic.fit(state, target, z if context_size else None).loss.backward()
    assert all(x.grad is None for x in arguments)
    assert all(p.grad is not None for p in critic.parameters())


@every_critic
@pytest.mark.parametrize("change", ["each row twice", "another order", "with invalid rows"])
def test_the_fit_depends_on_rows_neither_by_number_nor_by_order(name, change):
    state, target, _ = rows()
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
        fit = critic.fit(tuple(s[rows_taken] for s in state), goal, valid=mask)
        fit.loss.backward()
        metrics = torch.stack([fit.loss, fit.explained_variance, fit.cosine, fit.predicted_norm, fit.target_norm])
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
    state, target, _ = rows()
    fit = critic.fit(state, target, valid=torch.zeros(N, dtype=torch.bool))
    fit.loss.backward()
    assert fit.loss.item() == 0.0 and not any(g.any() for g in gradients(critic))


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
    state, target, _ = rows()
    critic.observe_window(target)
    before = copy.deepcopy(critic.state_dict())
    target[0][2, 1] = value
    critic.observe_window(target)
    assert not critic.fit(state, target).loss.isfinite()
    assert_same(critic.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear", "MLP"])
def test_normalised_learning_does_not_depend_on_the_unit_of_the_loss(name):
    results = []
    for unit in (1.0, 1000.0):
        critic = make_critic(name, trained=False)
        optimizer = torch.optim.Adam(critic.parameters(), 0.01)
        for seed in range(10):
            state, target, _ = rows(seed=seed)
            optimizer.zero_grad()
            fit = critic.fit(state, tuple(unit * g for g in target))
            fit.loss.backward()
            optimizer.step()
        results.append((fit.loss.detach(), join(critic(rows()[0])).detach() / unit))
    assert results[0][1].any()
    assert_same(results[0], results[1], rtol=1e-6, atol=1e-9)


@every_critic
@contexts
def test_a_critic_learns_a_linear_gradient(name, context_size):
    critic = make_critic(name, trained=False, context_size=context_size)
    optimizer = torch.optim.Adam(critic.parameters(), 0.02)
    mix = torch.randn(5 + context_size, 5, dtype=DOUBLE)
    for step in range(300):
        state, _, z = rows(32, seed=step)
        x = join(state) if not context_size else join([*state, z])
        optimizer.zero_grad()
        fit = critic.fit(state, (x @ mix).split(SIZES, -1), z if context_size else None)
        fit.loss.backward()
        optimizer.step()
    # chance is 0; the MLP is far from converged
    assert fit.explained_variance.item() > (0.8 if name == "MLP" else 0.99)
    assert fit.cosine.item() > (0.9 if name == "MLP" else 0.99)


# The synthetic gradient -----------------------------------------------------------------------------------------------


@every_critic
@contexts
def test_a_synthetic_gradient_is_the_prediction_times_discount_and_scale_without_graph(name, context_size):
    critic = make_critic(name, context_size=context_size, gradient_discount=0.5, scale=0.1)
    state, _, z = rows()
    z = z if context_size else None
    b = critic.synthetic_gradient(tuple(s.requires_grad_() for s in state), z)
    assert_same(join(b), 0.05 * join(critic(state, z)).detach())
    assert not any(g.requires_grad for g in b)


@every_critic
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_nothing_comes_from_beyond_an_end_not_even_nan(name, dtype):
    critic = make_critic(name)
    state, _, _ = rows(3)
    state[0][1] = math.nan
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


@every_critic
def test_the_bound_shortens_what_is_too_long_and_leaves_the_rest(name):
    critic = make_critic(name, max_norm_ratio=0.5)
    state, _, _ = rows(40)
    free = join(critic(state)).detach()
    critic.observe_window(
        (free[:, :3] * (2.0 * free.norm(dim=1).median() / free[:, :3].norm(dim=1, keepdim=True)), 0.0 * free[:, 3:])
    )
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


# Files ----------------------------------------------------------------------------------------------------------------

STATISTICS = ["num_updates", "target_rms", "_target_square", "_window_square", "_window_weight", "_extra_state"]
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
            state, target, z = rows(seed=seed)
            optimizer.zero_grad()
            critic.observe_window(target)
            critic.fit(state, target, z if context_size else None).loss.backward()
            optimizer.step()
        return [
            join(critic.synthetic_gradient(state, z if context_size else None)),
            critic.window_norm,
            *critic.buffers(),
        ]

    settings = {"context_size": context_size, "max_norm_ratio": 0.5, "warmup_updates": 6}
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


# Errors ---------------------------------------------------------------------------------------------------------------


def refuses(message, function, *arguments, **settings):
    with pytest.raises(ValueError) as error:
        function(*arguments, **settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_size": -1}, "context_size: found -1, allowed 0 (no context) or more"),
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
    ],
)
@every_critic
def test_settings_out_of_range_are_refused(name, settings, message):
    refuses(message, CRITICS[name], **settings)


@pytest.mark.parametrize(("state_sizes", "hidden_sizes"), [((), ()), ((3, 0), ()), ((3,), (4, 0))])
def test_sizes_out_of_range_are_refused(state_sizes, hidden_sizes):
    message = "state_sizes, hidden_sizes: expected positive integers and at least one state tensor, got "
    refuses(
        f"{message}{state_sizes}, {hidden_sizes}",
        dni_rl.GradientCritic,
        state_sizes=state_sizes,
        hidden_sizes=hidden_sizes,
    )


@every_critic
def test_states_and_contexts_of_other_sizes_are_refused(name):
    state, target, z = rows()
    critic = make_critic(name)
    for call in (critic, critic.synthetic_gradient, lambda s: critic.fit(s, target), critic.observe_window):
        refuses("state: expected widths (3, 2), got shapes [(7, 2), (7, 3)]", call, state[::-1])
        refuses("state: expected widths (3, 2), got shapes [(7, 3)]", call, state[:1])
    refuses("context: expected None (context_size=0), got (7, 4)", critic, state, z)
    critic = make_critic(name, context_size=Z)
    refuses("context: expected (7, 4) (context_size=4), got None", critic, state)
    refuses("context: expected (7, 4) (context_size=4), got (7, 3)", critic, state, z[:, 1:])
    refuses("context: expected (7, 4) (context_size=4), got (6, 4)", critic, state, z[1:])
