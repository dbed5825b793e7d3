"""All sixteen traps of the design, over every exported critic, core and interface: here, or where this table says.

Paths are those below tests/. [cores] marks tests that run over every core, [critics] over every critic, [interfaces] over every
feed-forward interface; that they do, and that all of them exist, is checked at the end of this file.

     1  test_the_first_synthetic_gradient_is_exactly_zero [critics]
        test_an_interface_with_a_new_critic_sends_exactly_zero_below [interfaces]
        dni_rl/test_backward.py::test_an_untrained_critic_is_no_critic [cores]
        dni_rl/test_critics.py::test_the_first_prediction_is_exactly_zero [critics]
     2  test_with_an_oracle_windows_equal_full_backpropagation [critics]
        test_an_interface_with_an_oracle_is_backpropagation [interfaces]
        dni_rl/test_backward.py::test_with_an_oracle_windows_equal_full_backpropagation [cores]
        dni_rl/test_timescales.py::test_an_oracle_critic_gives_full_bptt
        dni_rl/test_timescales.py::test_oracles_at_interfaces_and_over_time_give_full_bptt
        dni_rl/test_feedforward.py::test_with_an_oracle_every_gradient_is_that_of_backpropagation
     3  test_with_a_critic_of_zeros_windows_are_truncated [critics]
        test_an_interface_with_a_new_critic_sends_exactly_zero_below [interfaces]
        dni_rl/test_backward.py::test_without_critic_it_is_truncated_backpropagation_and_differs_from_full [cores]
        dni_rl/test_timescales.py::test_zero_critics_at_interfaces_cut_the_messages
     4  test_neither_side_trains_the_other [critics]
        test_an_interface_trains_neither_side_by_the_other [interfaces]
        dni_rl/test_backward.py::test_neither_side_sends_gradient_into_the_other [cores]
     5  test_the_critic_feels_neither_batch_size_nor_reduction_nor_layout [critics]
        test_an_interface_has_the_units_of_one_example [interfaces]
        dni_rl/test_backward.py::test_the_critic_does_not_feel_the_batch_size [cores]
        dni_rl/test_critics.py::test_the_loss_does_not_depend_on_the_number_of_layers
     6  test_zero_grad_may_be_before_or_after_the_forward_pass [critics]
        dni_rl/test_feedforward.py::test_zero_grad_before_or_after_the_pass_is_the_same_and_in_its_middle_an_error
     7  test_clipping_and_weight_decay_act_on_one_side [critics]
        agents/test_learner.py::test_clipping_acts_per_side
     8  test_eval_mode_changes_nothing [critics]
        test_under_no_grad_it_is_refused_and_nothing_changes [critics]
        test_frozen_parts_change_nothing_else [critics]
        test_two_halves_of_a_batch_accumulate_to_the_whole [critics]
        test_activation_checkpointing_changes_nothing [critics]
        dni_rl/test_backward.py::test_parts_of_a_batch_accumulate_to_the_whole [cores]
        dni_rl/test_backward.py::test_activation_checkpointing_changes_nothing [cores]
        dni_rl/test_backward.py::test_eval_mode_changes_nothing [cores]
        dni_rl/test_feedforward.py::test_a_frozen_lower_part_gets_nothing_and_its_critic_still_learns
        dni_rl/test_feedforward.py::test_activation_checkpointing_goes_between_interfaces
     9  test_a_gradient_scaler_whose_scale_changes_changes_nothing [critics]
        dni_rl/test_critics.py::test_an_overflow_shows_in_the_loss_and_stays_out_of_the_statistics [critics]
        dni_rl/test_mixed_precision.py::test_a_changing_scale_changes_nothing_in_float16
        dni_rl/test_mixed_precision.py::test_an_overflow_is_skipped_on_the_side_that_it_happened_on_and_training_goes_on
        dni_rl/test_mixed_precision.py::test_inside_or_outside_of_the_block_is_the_same
        dni_rl/test_feedforward.py::test_a_gradient_scalers_scale_goes_into_the_weight
    10  test_saved_and_loaded_it_continues_as_if_never_stopped [critics]
        dni_rl/test_critics.py::test_state_dict_keys_are_stable [critics]
        dni_rl/test_cores.py::test_state_dict_keys_are_stable [cores]
        dni_rl/test_backward.py::test_save_load_and_continue_equals_never_having_stopped [cores]
        dni_rl/test_backward.py::test_importing_has_no_side_effects
        dni_rl/test_feedforward.py::test_sequential_saved_and_loaded_continues_as_if_never_stopped
    11  test_an_exception_inside_a_window_leaves_nothing_behind [critics]
        test_two_threads_do_not_interfere
        dni_rl/test_backward.py::test_an_exception_inside_a_window_leaves_nothing_behind [cores]
        dni_rl/test_feedforward.py::test_an_exception_leaves_nothing_behind
        dni_rl/test_feedforward.py::test_two_threads_do_not_interfere
    12  test_an_end_gives_the_windows_own_gradient_and_a_cut_the_bootstrapped_one [critics]
        dni_rl/test_backward.py::test_an_end_gives_zero_and_a_cut_the_bootstrapped_target_on_a_linear_rnn
        dni_rl/test_backward.py::test_targets_are_the_gradients_of_the_surrogate [cores]
    13  test_a_step_that_starts_an_episode_teaches_nothing [critics]
        dni_rl/test_cores.py::test_a_reset_forgets_everything_before_it [cores]
        dni_rl/test_cores.py::test_unroll_equals_steps [cores]
        dni_rl/test_cores.py::test_the_history_is_the_gradient_of_the_rest_of_the_window [cores]
        dni_rl/test_cores.py::test_what_cannot_be_cut_is_refused
    14  test_the_auxiliary_task_provably_produces_gradients [critics]
        dni_rl/test_auxiliary.py::test_the_task_provably_produces_gradients_in_core_and_head_and_none_in_the_critic
    15  agents/test_learner.py::test_unrolled_logits_and_values_equal_those_of_the_actor
        agents/test_rollout.py::test_the_actor_computes_what_a_fresh_memory_per_episode_would
    16  test_readme.py::test_the_snippet_trains_both_sides
        test_readme.py::test_its_training_commands_parse
"""

import ast
import copy
import importlib
import inspect
import io
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from core_cases import CORES, DOUBLE, D, H, resets
from torch import nn
from torch.utils.checkpoint import checkpoint

import dni_rl
from dni_rl.cores import Core, unroll_stepwise

B, T, K, Z = 3, 12, 5, 2
CUTS = (0, 5, 6, 12)
WINDOWS = list(itertools.pairwise(CUTS))
# Episodes start inside windows, exactly at both cuts, and the data end with the last one.
FIRST = resets(T, (2, 0), (8, 0), (5, 1), (6, 2), (9, 2))
ALIVE = {end: torch.zeros(B) if end == T else (~FIRST[end]).double() for _, end in WINDOWS}

# Critics, each with a core that it is made for ------------------------------------------------------------------------


class ConvCore(Core):
    """Feature maps [B, C, Y, X] for states: what convolutional critics predict gradients for."""

    state_shapes = ((2, 3, D), (1, 3, D))

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2 + 2 + 1, 3, 3, padding=1)
        self.input_size, self.output_size, self.state_sizes = D, 2 * 3 * D, (2 * 3 * D, 3 * D)

    def forward(self, x, state):
        z = self.conv(torch.cat([x, *state], 1))
        h, c = torch.tanh(z[:, :2]), 0.8 * state[1] + z[:, 2:]
        return h.flatten(1), (h, c)


def vector_subject(kind, **always):
    def make(**settings):
        core = dni_rl.LSTM(D, H)
        return core, kind(state_sizes=core.state_sizes, **always, **settings)

    return make


def watched_subject(**settings):
    core = dni_rl.LSTM(D, H)
    critic = dni_rl.RecurrentGradientCritic(state_sizes=core.state_sizes, memory_size=2, **settings)
    return critic.watch(core), critic


CRITICS = {
    "GradientCritic": vector_subject(dni_rl.GradientCritic, hidden_sizes=(5,)),
    "ConvGradientCritic": lambda **settings: (
        ConvCore(),
        dni_rl.ConvGradientCritic(state_shapes=ConvCore.state_shapes, hidden_channels=(3,), **settings),
    ),
    "RecurrentGradientCritic": watched_subject,
    "LossCritic": vector_subject(dni_rl.LossCritic, hidden_sizes=(5,)),
    "SobolevCritic": vector_subject(dni_rl.SobolevCritic, hidden_sizes=(5,)),
}
every_critic = pytest.mark.parametrize("name", CRITICS)
contexts = pytest.mark.parametrize("context_size", [0, Z], ids=["no context", "context"])


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


def build(name, trained=True, seed=0, **settings):
    """A model, and the critic of its core, which has already met one window if it is to be trained."""
    torch.manual_seed(seed)
    core, critic = CRITICS[name](**settings)
    model = Model(core).double()
    critic.double()
    if trained:
        for p in critic.net.parameters():
            nn.init.normal_(p, std=0.5)
        x, y, state, context = data(model, critic, seed=9)
        run_window(model, critic, x, y, state, context=context)
        model.zero_grad()
        critic.zero_grad()
    return model, critic


def data(model, critic=None, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    inside = ConvCore.state_shapes[0] if isinstance(model.core, ConvCore) else (D,)
    state = tuple(0.5 * draw(*s.shape) for s in model.core.initial_state(B))
    context = draw(T + 1, B, Z) if critic is not None and critic.context_size else None
    return draw(T, B, *inside), draw(T, B), state, context


def run_window(model, critic, x, y, state, lo=0, hi=K, first=FIRST, context=None, **settings):
    """The user's loop body over steps lo .. hi."""
    start = dni_rl.cut(state)
    losses, end = model(x[lo:hi], y[lo:hi], start, first[lo:hi])
    context = None if context is None else context[lo : hi + 1]
    settings.setdefault("alive", ALIVE[hi])
    return dni_rl.backward(losses, start=start, end=end, critic=critic, context=context, **settings), end


def run_sequence(model, critic, x, y, state, context=None, **settings):
    reports = []
    for lo, hi in WINDOWS:
        report, state = run_window(model, critic, x, y, state, lo, hi, context=context, **settings)
        reports.append(report)
    return reports


def train(model, critic, optimizers, seeds):
    """Some updates; returns what was reported on the way."""
    tape = []
    for seed in seeds:
        x, y, state, context = data(model, critic, seed)
        for optimizer in optimizers:
            optimizer.zero_grad()
        report, _ = run_window(model, critic, x, y, state, context=context)
        for optimizer in optimizers:
            optimizer.step()
        tape.append(torch.stack(list(report.as_dict().values())))
    return torch.stack(tape)


def captured(critic):
    """The windows that a critic is given to learn from."""
    windows, fit_window = [], critic.fit_window
    critic.fit_window = lambda window: windows.append(window) or fit_window(window)
    return windows


def gradients(module):
    return {key: None if p.grad is None else p.grad.clone() for key, p in module.named_parameters()}


def assert_same(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **(tolerances or {"rtol": 1e-10, "atol": 1e-10}))


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@every_critic
@contexts
def test_the_first_synthetic_gradient_is_exactly_zero(name, context_size):
    model, critic = build(name, trained=False, context_size=context_size, max_norm_ratio=0.5)
    x, y, state, context = data(model, critic)
    run_sequence(model, None, x, y, state)
    expected = gradients(model)
    model.zero_grad()
    for report in run_sequence(model, critic, x, y, state, context):
        assert report.synthetic_norm == 0.0 and report.predicted_norm == 0.0 and report.target_norm > 0.0
    assert_same(gradients(model), expected, rtol=1e-13, atol=1e-15)


@every_critic
@pytest.mark.parametrize("dense", [True, False], ids=["dense targets", "target at the start"])
@pytest.mark.parametrize("lambda_", [1.0, 0.6])
def test_with_an_oracle_windows_equal_full_backpropagation(name, dense, lambda_):
    if lambda_ < 1.0 and not dense:
        return
    model, critic = build(name, dense_targets=dense, target_lambda=lambda_)
    x, y, state, _ = data(model)
    losses, end = model(x, y, dni_rl.cut(state), FIRST)
    losses.sum().backward()
    expected = gradients(model)
    model.zero_grad()

    history = end.history
    states = [critic._join(history.states).flatten(0, 1), critic._join(tuple(s.detach() for s in end))]
    true = critic._join_gradient(history.gradients).flatten(0, 1)
    table = torch.cat(states), torch.cat([true, torch.full_like(true[:B], 1e6)])  # beyond the end the oracle raves

    def oracle(net, joined, context):
        nearest = (joined.detach().flatten(0, -2).unsqueeze(1) - table[0]).abs().sum(-1).argmin(1)
        return table[1][nearest].view(*joined.shape[:-1], -1)

    critic._gradient = oracle
    reports = run_sequence(model, critic, x, y, state, weight=1.0)
    assert_same(gradients(model), expected)
    assert reports[0].synthetic_norm > 1e-3
    truncated = copy.deepcopy(model)
    truncated.zero_grad()
    run_sequence(truncated, None, x, y, state, weight=1.0)
    assert any((expected[key] - g).abs().max() > 1e-4 for key, g in gradients(truncated).items())


@every_critic
@pytest.mark.parametrize("how", ["predicts zeros", "scale 0", "gradient discount 0", "warms up"])
def test_with_a_critic_of_zeros_windows_are_truncated(name, how):
    settings = {"scale 0": {"scale": 0.0}, "gradient discount 0": {"gradient_discount": 0.0}}
    model, critic = build(name, **({"warmup_updates": 100} if how == "warms up" else settings.get(how, {})))
    if how == "predicts zeros":
        critic._gradient = lambda net, joined, context: 0.0 * critic._join_gradient(critic_split(critic, joined))
    x, y, state, _ = data(model)
    s, total = state, 0.0
    for lo, hi in WINDOWS:  # truncated backpropagation written out
        outputs, s = unroll_stepwise(
            model.core, torch.tanh(model.torso(x[lo:hi])), tuple(c.detach() for c in s), FIRST[lo:hi]
        )
        total = total + model.losses_of(outputs, y[lo:hi]).mean()
    total.backward()
    expected = gradients(model)
    model.zero_grad()
    run_sequence(model, critic, x, y, state)
    assert_same(gradients(model), expected)


def critic_split(critic, joined):
    """The state of which `joined` is made."""
    shapes = getattr(critic, "state_shapes", [(size,) for size in critic.state_sizes])
    return tuple(p.unflatten(-1, s) for p, s in zip(joined.split(critic.state_sizes, -1), shapes, strict=True))


@every_critic
@contexts
def test_neither_side_trains_the_other(name, context_size):
    results = []
    for frozen in (False, True):
        model, critic = build(name, context_size=context_size)
        x, y, state, context = data(model, critic)
        twin, windows = copy.deepcopy(critic), captured(critic)
        critic.requires_grad_(not frozen)
        run_window(model, critic, x, y, state, context=context)
        results.append(gradients(model))
    assert all(g is None for g in gradients(critic).values()), "frozen"
    exactly(results[0], results[1])

    # The other way round: what the critic learns is a function of the window, which has no graph.
    (window,) = windows
    for part in (*window.states, *window.gradients, *window.end, window.losses):
        assert not part.requires_grad
    model.zero_grad()
    twin.fit_window(window).loss.backward()
    assert all(g is None for g in gradients(model).values())
    model, critic = build(name, context_size=context_size)
    run_window(model, critic, x, y, state, context=context)
    exactly(gradients(critic), gradients(twin))


@every_critic
@pytest.mark.parametrize("change", ["batch size", "reduction", "layout"])
def test_the_critic_feels_neither_batch_size_nor_reduction_nor_layout(name, change):
    results = []
    for changed in (False, True):
        model, critic = build(name, max_norm_ratio=0.5)
        x, y, state, _ = data(model)
        first, settings = FIRST, {"alive": ALIVE[K]}
        if changed and change == "batch size":
            x, y, first = (torch.cat([part] * 3, 1) for part in (x, y, first))
            state, settings = tuple(torch.cat([s] * 3) for s in state), {"alive": torch.cat([ALIVE[K]] * 3)}
        elif changed and change == "reduction":
            settings["weight"] = 77.0
        elif changed:
            x, y = x.transpose(0, 1).contiguous().transpose(0, 1), y.t().contiguous().t()
        report, _ = run_window(model, critic, x, y, state, first=first, **settings)
        results.append((report.as_dict(), gradients(critic), dict(critic.named_buffers())))
    assert_same(results[0], results[1])


@every_critic
def test_zero_grad_may_be_before_or_after_the_forward_pass(name):
    results = []
    for moment in ("before", "after"):
        model, critic = build(name)
        x, y, state, _ = data(model)
        run_window(model, critic, x, y, state)  # leaves gradients behind
        if moment == "before":
            model.zero_grad(), critic.zero_grad()
        start = dni_rl.cut(state)
        losses, end = model(x[:K], y[:K], start, FIRST[:K])
        if moment == "after":
            model.zero_grad(set_to_none=False), critic.zero_grad(set_to_none=False)
        dni_rl.backward(losses, start=start, end=end, critic=critic)
        results.append([{key: g for key, g in gradients(m).items() if g is not None} for m in (model, critic)])
    for before, after in zip(*results, strict=True):
        exactly(before, {key: after[key] for key in before})
        assert not any(after[key].any() for key in after.keys() - before.keys())


@every_critic
def test_clipping_and_weight_decay_act_on_one_side(name):
    model, critic = build(name, slow_copy_rate=0.5)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in critic.parameters()}
    run_window(model, critic, *data(model)[:3])
    for one, other in ((model, critic), (critic, model)):
        before, values = gradients(other), copy.deepcopy(other.state_dict())
        nn.utils.clip_grad_norm_(one.parameters(), 1e-3)
        torch.optim.AdamW(one.parameters(), 0.1, weight_decay=1.0).step()
        exactly(gradients(other), before)
        exactly(other.state_dict(), values)


@every_critic
def test_eval_mode_changes_nothing(name):
    results = []
    for mode in (True, False):
        model, critic = build(name)
        report, _ = run_window(model.train(mode), critic.train(mode), *data(model)[:3])
        results.append((report.as_dict(), gradients(model), gradients(critic), dict(critic.named_buffers())))
    exactly(results[0], results[1])


@every_critic
def test_under_no_grad_it_is_refused_and_nothing_changes(name):
    model, critic = build(name)
    before = copy.deepcopy((model.state_dict(), critic.state_dict()))
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are switched off here"):
        run_window(model, critic, *data(model)[:3])
    exactly((model.state_dict(), critic.state_dict()), before)
    assert all(g is None for m in (model, critic) for g in gradients(m).values())


@every_critic
@pytest.mark.parametrize("frozen", ["torso", "core", "head"])
def test_frozen_parts_change_nothing_else(name, frozen):
    results = []
    for freeze in (False, True):
        model, critic = build(name)
        model.get_submodule(frozen).requires_grad_(not freeze)
        report, _ = run_window(model, critic, *data(model)[:3])
        results.append((report.as_dict(), gradients(critic), gradients(model)))
    assert_same(results[0][:2], results[1][:2])
    for key, g in results[1][2].items():
        assert g is None if key.startswith(frozen) else torch.allclose(g, results[0][2][key], rtol=1e-10, atol=1e-12)


@every_critic
def test_two_halves_of_a_batch_accumulate_to_the_whole(name):
    model, critic = build(name, normalize_targets=False)
    x, y, state, _ = data(model)
    run_window(model, critic, x, y, state, weight=0.1)
    expected = gradients(model)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 3)):
        part = x[:, rows], y[:, rows], tuple(s[rows] for s in state)
        run_window(model, critic, *part, first=FIRST[:, rows], alive=ALIVE[K][rows], weight=0.1)
    assert_same(gradients(model), expected)


@every_critic
def test_activation_checkpointing_changes_nothing(name):
    results = []
    for checkpointed in (False, True):
        model, critic = build(name, max_norm_ratio=0.5)
        x, y, state, _ = data(model)
        start, inputs = dni_rl.cut(state), torch.tanh(model.torso(x[:K]))
        if checkpointed:
            outputs, end = checkpoint(model.core.unroll, inputs, start, FIRST[:K], use_reentrant=False)
        else:
            outputs, end = model.core.unroll(inputs, start, FIRST[:K])
        report = dni_rl.backward(model.losses_of(outputs, y[:K]), start=start, end=end, critic=critic)
        results.append((report.as_dict(), gradients(model), gradients(critic)))
    exactly(results[0], results[1])


@every_critic
def test_a_gradient_scaler_whose_scale_changes_changes_nothing(name):
    results = []
    for scaled in (False, True):
        model, critic = build(name)
        optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (model, critic)]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1, enabled=scaled)
        tape, scales = [], []
        for seed in range(4):
            x, y, state, _ = data(model, seed=seed)
            for optimizer in optimizers:
                optimizer.zero_grad()
            scale = scaler.scale(torch.ones((), dtype=DOUBLE))
            scales.append(float(scale))
            report, _ = run_window(model, critic, x, y, state, weight=scale / (K * B))
            scaler.unscale_(optimizers[0])
            scaler.step(optimizers[0])
            optimizers[1].step()  # never scaled
            scaler.update()
            tape.append(report.as_dict())
        results.append((tape, model.state_dict(), critic.state_dict()))
    assert scales == [1024.0, 2048.0, 4096.0, 8192.0]
    assert_same(results[0], results[1])


@every_critic
@contexts
def test_saved_and_loaded_it_continues_as_if_never_stopped(name, context_size):
    settings = {"context_size": context_size, "max_norm_ratio": 0.5, "slow_copy_rate": 0.3, "warmup_updates": 2}

    def fresh(seed):
        model, critic = build(name, trained=False, seed=seed, **settings)
        return model, critic, [torch.optim.Adam(m.parameters(), 0.01) for m in (model, critic)]

    model, critic, optimizers = fresh(0)
    train(model, critic, optimizers, range(4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, critic, *optimizers)], file)
    expected = train(model, critic, optimizers, range(4, 7))
    assert expected[-1][5] > 0.0  # it is applied
    file.seek(0)
    model, critic, optimizers = fresh(1)
    for part, values in zip((model, critic, *optimizers), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(values)
    exactly(train(model, critic, optimizers, range(4, 7)), expected)


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


@every_critic
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_inside_a_window_leaves_nothing_behind(name, where):
    model, critic = build(name)
    x, y, state, _ = data(model)
    run_window(model, critic, x, y, state)
    expected = gradients(model), gradients(critic), dict(critic.named_buffers())

    model, critic = build(name)
    before = copy.deepcopy(critic.state_dict())
    # In the forward pass behind the core; in the backward pass below it, when all its gradients have been on their way.
    handle = model.head.register_forward_hook(stop) if where == "forward" else model.torso.weight.register_hook(stop)
    with pytest.raises(Stop):
        run_window(model, critic, x, y, state)
    handle.remove()
    exactly(critic.state_dict(), before)
    assert all(g is None for g in gradients(critic).values())
    model.zero_grad()
    run_window(model, critic, x, y, state)
    exactly((gradients(model), gradients(critic), dict(critic.named_buffers())), expected)


def test_two_threads_do_not_interfere():
    def work(job):
        (model, critic), seed = job
        optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (model, critic)]
        return train(model, critic, optimizers, range(seed, seed + 5))

    def jobs():
        return [(build(name), 10 * i) for i, name in enumerate(CRITICS)]

    expected = [work(job) for job in jobs()]
    with ThreadPoolExecutor(len(CRITICS)) as pool:
        exactly(list(pool.map(work, jobs())), expected)


@every_critic
def test_an_end_gives_the_windows_own_gradient_and_a_cut_the_bootstrapped_one(name):
    model, critic = build(name, gradient_discount=0.9)
    x, y, state, _ = data(model)
    windows = captured(critic)
    answers, ask = [], critic.synthetic_gradient
    critic.synthetic_gradient = lambda *a: answers.append(ask(*a)) or answers[-1]
    alive = torch.tensor([1.0, 0.0, 1.0])
    run_window(model, critic, x, y, state, first=torch.zeros_like(FIRST), alive=alive)
    (window,), (b,) = windows, answers

    for j in range(K):  # the surrogate from s_j on, by the plain loop
        s_j = dni_rl.cut(tuple(s[j] for s in window.states))
        outputs, end = unroll_stepwise(model.core, torch.tanh(model.torso(x[j:K])).detach(), s_j)
        losses = model.losses_of(outputs, y[j:K]).sum(0)
        own, bootstrapped = (
            torch.autograd.grad(root.sum(), s_j, retain_graph=True, materialize_grads=True, allow_unused=True)
            for root in (losses, losses + sum((s * g).flatten(1).sum(1) for s, g in zip(end, b, strict=True)))
        )
        for target, inside, with_b in zip(window.gradients, own, bootstrapped, strict=True):
            assert_same(target[j][alive == 0], inside[alive == 0])
            assert_same(target[j][alive == 1], with_b[alive == 1])
    assert any(g[alive == 1].any() for g in b) and not any(g[alive == 0].any() for g in b)


@every_critic
def test_a_step_that_starts_an_episode_teaches_nothing(name):
    results = []
    for other in (False, True):
        model, critic = build(name)
        x, y, state, _ = data(model)
        first = torch.zeros_like(FIRST)
        first[0] = True  # every memory is cleared at once: what the state was before must not matter
        state = tuple(s + 5.0 for s in state) if other else state
        windows = captured(critic)
        report, _ = run_window(model, critic, x, y, state, first=first)
        results.append((report.as_dict(), gradients(critic), gradients(model)))
        assert not windows[0].valid[0].any() and windows[0].valid[1:].all()
    exactly(results[0], results[1])


@every_critic
def test_the_auxiliary_task_provably_produces_gradients(name):
    model, critic = build(name)
    x, _, state, _ = data(model)
    first = resets(T, (2, 0), (9, 2))
    side_by_side = [torch.cat([part[:6], part[6:]], 1) for part in (x, first)]  # two windows of six steps
    outputs, end = model.core.unroll(
        torch.tanh(model.torso(side_by_side[0])), dni_rl.cut(tuple(torch.cat([s, s]) for s in state)), side_by_side[1]
    )
    targets, valid = dni_rl.later_synthetic_gradients(critic, end, 2)
    assert any(g[valid].any() for g in targets) and not any(g.requires_grad for g in targets)
    widths = [g[0, 0].numel() for g in targets]
    task = dni_rl.AuxiliaryTask(output_size=model.core.output_size, state_sizes=widths).double()
    if isinstance(critic, dni_rl.ConvGradientCritic):
        with pytest.raises(ValueError, match=r"target: expected shapes \[\(6, 6, 18\), \(6, 6, 9\)\]"):
            task(outputs, targets, valid)
        targets = tuple(g.flatten(2) for g in targets)
    nn.init.normal_(task.head[-1].weight)
    task(outputs, targets, valid).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (*task.parameters(), *model.core.parameters()))
    assert all(g is None for g in gradients(critic).values())


# Interfaces between layers, with every critic that takes part ---------------------------------------------------------

FEATURES = (2, 3, D)  # of one example, where the critic wants feature maps


def interface_critic(name, trained=True):
    torch.manual_seed(3)
    if name == "ConvGradientCritic":
        critic = dni_rl.ConvGradientCritic(state_shapes=(FEATURES,), hidden_channels=(3,))
    else:
        critic = getattr(dni_rl, name)(state_sizes=(18,), hidden_sizes=(4,))
    critic.double()
    if trained:
        for p in critic.parameters():
            nn.init.normal_(p, std=0.5)
    return critic


INTERFACE_CRITICS = ["GradientCritic", "ConvGradientCritic"]
NOT_BETWEEN_LAYERS = {
    "RecurrentGradientCritic": "critic: found state_sizes .*, allowed one tensor",
    "LossCritic": "which has no synthetic_gradient or no fit",
    "SobolevCritic": "which has no synthetic_gradient or no fit",
}


class Net(nn.Module):
    """Two layers; what crosses from one to the other has the shape that the critic wants."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        shape = FEATURES if name == "ConvGradientCritic" else (18,)
        self.lower = nn.Sequential(nn.Linear(D, 18), nn.Tanh(), nn.Unflatten(1, shape)).double()
        self.upper = nn.Sequential(nn.Flatten(), nn.Linear(18, 1)).double()


def losses_of(outputs):
    return (outputs.squeeze(-1) - 1.0).square()


def run_interface(net, critic, x, scale=1.0):
    """Gradients of the mean loss in both layers, the report of the critic's fit, and its gradients."""
    interface = dni_rl.Interface(critic)
    with dni_rl.DecoupledPass(weight=scale / len(x)) as decoupled:
        (scale * losses_of(net.upper(interface(net.lower(x)))).mean()).backward()
    return gradients(net), decoupled.fits[interface], gradients(critic)


def run_sequential(net, critic, x, scale=1.0):
    """The same of layers that update themselves: by plain descent, a step is a gradient."""
    layers, values = [net.lower, net.upper], {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizers = [torch.optim.SGD(layer.parameters(), 1.0) for layer in layers]
    sequential = dni_rl.DecoupledSequential(layers, [critic], optimizers, [torch.optim.SGD(critic.parameters(), 0.0)])
    report = sequential.update(x, losses_of)
    steps = {key: scale * (values[key] - p.detach()) for key, p in net.named_parameters()}
    return steps, report.fits[0], gradients(critic)


INTERFACES = {"Interface": run_interface, "DecoupledSequential": run_sequential}
every_interface = pytest.mark.parametrize("interface", INTERFACES)
interface_critics = pytest.mark.parametrize("name", INTERFACE_CRITICS)


def examples(n=5):
    return torch.randn(n, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(4))


@every_interface
@interface_critics
def test_an_interface_with_an_oracle_is_backpropagation(interface, name):
    net, x, critic = Net(name), examples(), interface_critic(name)
    h = net.lower(x)
    h.retain_grad()
    losses_of(net.upper(h)).mean().backward()
    expected, true = gradients(net), len(x) * h.grad
    net.zero_grad()
    asked = []
    critic._gradient = lambda _, joined, context: asked.append(joined) or critic._join((true,))
    actual, fit, _ = INTERFACES[interface](net, critic, x)
    assert_same(actual, expected)
    assert fit.loss < 1e-20 and len(asked) == 2, "it was asked once, and what arrived is what it answers"


@every_interface
@interface_critics
def test_an_interface_with_a_new_critic_sends_exactly_zero_below(interface, name):
    net, x = Net(name), examples()
    losses_of(net.upper(net.lower(x))).mean().backward()
    expected = gradients(net)
    net.zero_grad()
    actual, fit, _ = INTERFACES[interface](net, interface_critic(name, trained=False), x)
    for key, g in actual.items():
        assert g.any() == key.startswith("upper")
        if key.startswith("upper"):
            assert_same(g, expected[key])
    assert fit.target_norm > 0.0, "and learns"


@every_interface
@interface_critics
def test_an_interface_trains_neither_side_by_the_other(interface, name):
    results = []
    for frozen in (False, True):
        net, critic = Net(name), interface_critic(name)
        twin = copy.deepcopy(critic)
        if frozen:
            critic.requires_grad_(False)
        results.append(INTERFACES[interface](net, critic, examples()))
    exactly(results[0][0], results[1][0])
    h = Net(name).lower(examples())
    leaf = h.detach().requires_grad_()
    losses_of(Net(name).upper(leaf)).sum().backward()
    twin.fit((leaf.detach(),), (leaf.grad,)).loss.backward()
    assert_same(results[0][2], gradients(twin))


@every_interface
@interface_critics
def test_an_interface_has_the_units_of_one_example(interface, name):
    x, results = examples(), []
    for batch, scale in ((x, 1.0), (torch.cat([x, x]), 64.0)):
        net, critic = Net(name), interface_critic(name)
        actual, fit, learned = INTERFACES[interface](net, critic, batch, scale)
        results.append(({key: g / scale for key, g in actual.items()}, fit.loss.detach(), fit.target_norm, learned))
    assert_same(results[0], results[1])


@every_critic
def test_a_critic_stands_between_layers_or_is_refused_there(name):
    assert (name in INTERFACE_CRITICS) != (name in NOT_BETWEEN_LAYERS)
    if name in NOT_BETWEEN_LAYERS:
        for make in (
            dni_rl.Interface,
            lambda c: dni_rl.DecoupledSequential([nn.Identity()] * 2, [c], [None] * 2, [None]),
        ):
            with pytest.raises(ValueError, match=NOT_BETWEEN_LAYERS[name]):
                make(interface_critic(name))


# The suite is complete ------------------------------------------------------------------------------------------------


def unregistered(namespace):
    """Names of exported critics, cores, interfaces and other modules that this suite does not know."""
    known = {getattr(dni_rl, name) for name in (*CRITICS, *INTERFACES, "AuxiliaryTask")}
    known |= {type(make()) for make in CORES.values()}
    exported = {name: getattr(namespace, name) for name in namespace.__all__}
    return {
        name
        for name, item in exported.items()
        if inspect.isclass(item)
        and not inspect.isabstract(item)
        and (issubclass(item, nn.Module) or hasattr(item, "synthetic_gradient"))
        and item not in known
    }


def test_every_export_is_in_this_suite():
    assert unregistered(dni_rl) == set(), "add the new one to CRITICS, INTERFACES or core_cases.CORES"
    for name, make in CRITICS.items():
        assert type(make()[1]).__name__ == name


class NewCritic(dni_rl.GradientCritic):
    pass


class NewCore(dni_rl.GRU):
    pass


class NewInterface(nn.Module):
    pass


class NewAnswer:
    def synthetic_gradient(self, state, context=None, alive=None):
        return state


@pytest.mark.parametrize("new", [NewCritic, NewCore, NewInterface, NewAnswer])
def test_a_new_export_that_is_in_no_suite_is_noticed(new):
    namespace = SimpleNamespace(**{name: getattr(dni_rl, name) for name in dni_rl.__all__})
    namespace.__all__ = [*dni_rl.__all__, "Fake"]
    namespace.Fake = new
    assert unregistered(namespace) == {"Fake"}
    namespace.Fake = dni_rl.ErrorCritic  # abstract
    assert unregistered(namespace) == set()


TESTS = Path(__file__).parents[1]
LINE = re.compile(r"^ *(\d+)? +(?:([\w/]+\.py)::)?(test_\w+)(?: \[(cores|critics|interfaces)\])?$", re.MULTILINE)


def table():
    """(trap, file, test, what it runs over) of every line of the table above."""
    rows, trap = [], 0
    for number, path, test, over in LINE.findall(__doc__):
        trap = int(number or trap)
        rows.append((trap, TESTS / (path or "dni_rl/test_conformance.py"), test, over))
    return rows


def test_the_table_names_all_traps_and_tests_that_exist():
    rows = table()
    assert len(rows) == len([line for line in __doc__.splitlines() if "test_" in line]), "a line that is not understood"
    assert sorted({trap for trap, *_ in rows}) == list(range(1, 17))
    for _, path, test, _ in rows:
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert test in functions, f"{path.name} has no {test}"
    here = {test for _, path, test, _ in rows if path == Path(__file__)}
    bookkeeping = {
        "test_every_export_is_in_this_suite",
        "test_a_new_export_that_is_in_no_suite_is_noticed",
        "test_the_table_names_all_traps_and_tests_that_exist",
        "test_tests_run_over_what_the_table_says",
        "test_a_critic_stands_between_layers_or_is_refused_there",
    }
    assert here | bookkeeping == {name for name in globals() if name.startswith("test_")}


@pytest.mark.parametrize(("path", "test", "over"), [row[1:] for row in table() if row[3]], ids=lambda x: str(x)[-40:])
def test_tests_run_over_what_the_table_says(path, test, over):
    module = importlib.import_module(path.stem)
    function = getattr(module, test)
    taken = [set(m.args[1]) for m in getattr(function, "pytestmark", []) if m.args[:1] in (("name",), ("interface",))]
    everything = {"cores": CORES, "interfaces": INTERFACES, "critics": getattr(module, "CRITICS", CRITICS)}[over]
    assert set(everything) in taken
