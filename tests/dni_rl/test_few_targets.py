"""Cheaper fits: dense targets at some steps of a window alone, and rarer looks at the yardstick of the bound."""

import pytest
import torch
from test_conformance import CRITICS, DOUBLE, B, Z, build, captured, contexts, data, exactly, gradients, run_window

import dni_rl

thinned = pytest.mark.parametrize("name", [name for name in CRITICS if name != "RecurrentGradientCritic"])
STEPS = {2: [0, 2], 3: [0, 1, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4], 9: [0, 1, 2, 3, 4]}  # of five


@thinned
@contexts
@pytest.mark.parametrize("n", STEPS)
def test_the_critic_learns_at_evenly_spaced_steps_what_dense_targets_teach_there(name, context_size, n):
    model, critic = build(name, context_size=context_size, targets_per_window=n)
    x, y, state, context = data(model, critic)
    windows = captured(critic)
    report, _ = run_window(model, critic, x, y, state, context=context)
    found = gradients(model), gradients(critic), dict(critic.named_buffers()), report.as_dict()

    steps = STEPS[n]
    model, critic = build(name, context_size=context_size, targets_per_window=n)
    dense = build(name, context_size=context_size)[1]
    dense.load_state_dict(critic.state_dict())
    all_windows = captured(dense)
    run_window(model, dense, x, y, state, context=context)
    exactly(found[0], gradients(model))  # what the critic is taught changes nothing for the model
    (few,), (full,) = windows, all_windows
    for part, whole in zip((*few.states, *few.gradients), (*full.states, *full.gradients), strict=True):
        exactly(part, whole[steps])
    exactly(few.valid, full.valid[steps])
    if context is not None:
        exactly(few.rows()[2].view(len(steps), B, Z), context[steps])
    if name in ("LossCritic", "SobolevCritic"):
        exactly(critic._loss_to_go(few).view(-1, B), critic._loss_to_go(full).view(-1, B)[steps])
    fit = critic.fit_window(few)
    fit.loss.backward()
    exactly((found[1], found[2]), (gradients(critic), dict(critic.named_buffers())))
    exactly(found[3]["critic_loss"], fit.loss.detach())


@pytest.mark.parametrize("interval", [1, 3, 8])
def test_the_yardstick_is_looked_at_in_the_first_windows_and_then_at_intervals(interval):
    model, critic = build("GradientCritic", trained=False, max_norm_ratio=0.5, yardstick_interval=interval)
    x, y, state, _ = data(model)
    looks, observe = [], critic.observe_window
    critic.observe_window = lambda gradient, stands_for: looks.append(stands_for) or observe(gradient, stands_for)
    seen = []
    for number in range(1, 41):
        before = len(looks)
        run_window(model, critic, x, y, state)
        seen += [(number, stands_for) for stands_for in looks[before:]]
    assert seen[:16] == [(number, 1) for number in range(1, 17)]
    groups = [(number - 17) // interval for number, _ in seen[16:]]
    assert groups == list(range(24 // interval)) and all(stands_for == interval for _, stands_for in seen[16:])


@pytest.mark.parametrize("period", [2, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_looks_do_not_keep_time_with_sequences_that_are_learned_from_in_step(period, place):
    """Of `period` windows each sequence has a loss in one; whichever that is, its mean square is 1 / period."""
    critic = dni_rl.GradientCritic(state_sizes=(1,), max_norm_ratio=1.0).double()
    squares = []
    for number in range(4000):
        if stands_for := critic.window_is_due():
            size = float(number % period == place % period)
            critic.observe_window((torch.full((3, 1), size, dtype=DOUBLE),), stands_for)
        squares.append(critic.window_norm.square().item())
    assert sum(squares[1000:]) / 3000 == pytest.approx(1.0 / period, rel=0.15)


def test_looks_stand_for_the_windows_between_them():
    norms = {}
    for interval in (1, 8):
        critic = dni_rl.GradientCritic(state_sizes=(2,), max_norm_ratio=1.0, yardstick_interval=interval).double()
        for number in range(1, 81):
            stands_for = critic.window_is_due()
            if stands_for:  # a level that changes after the first windows
                critic.observe_window((torch.full((3, 2), 1.0 if number <= 16 else 2.0, dtype=DOUBLE),), stands_for)
        norms[interval] = critic.window_norm
    torch.testing.assert_close(norms[8], norms[1], rtol=1e-12, atol=0.0)


def test_settings_out_of_range_are_refused():
    for settings, line in (
        (
            {"targets_per_window": 1},
            "targets_per_window: found 1, allowed an integer from 2 on, or None for every step; for one use",
        ),
        ({"targets_per_window": 2, "dense_targets": False}, "targets_per_window: found 2 with dense_targets=False"),
        ({"targets_per_window": 2, "target_lambda": 0.5}, "targets_per_window: found 2 with .* allowed None"),
        ({"yardstick_interval": 0}, "yardstick_interval: found 0, allowed an integer from 1 on"),
        ({"yardstick_interval": 2.5}, r"yardstick_interval: found 2\.5, allowed"),
        ({"targets_per_window": 2.5}, r"targets_per_window: found 2\.5, allowed"),
    ):
        with pytest.raises(ValueError, match=line):
            dni_rl.GradientCritic(state_sizes=(3,), **settings)
    with pytest.raises(ValueError, match="targets_per_window: found 2, allowed None; the memory reads every step"):
        dni_rl.RecurrentGradientCritic(state_sizes=(3,), targets_per_window=2)
