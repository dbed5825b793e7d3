"""The fused LSTM kernel against the plain loop: values, gradients, history, in float32, the only type it takes."""

import gc
import weakref

import pytest
import torch
from torch import nn

import dni_rl
from dni_rl.cores import gated, unroll_stepwise

T, B, D, H = 40, 3, 5, 6
RESETS = {
    "no first": None,
    "none": [],
    "one at the start": [(0, 1)],
    "inside, at the end, two at once": [(7, 0), (7, 2), (8, 1), (T - 1, 0)],
    "five in a row for one, none for another": [*((t, 0) for t in range(8, 13)), (5, 2), (6, 2)],
}
every_reset = pytest.mark.parametrize("resets", RESETS.values(), ids=RESETS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Counts calls of the fused kernel; skips where the build of torch has none."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    counted, real = [], gated._fused_lstm
    monkeypatch.setattr(gated, "_fused_lstm", lambda *args: counted.append(1) or real(*args))
    return counted


def case(resets, layers=1, bias=True):
    torch.manual_seed(0)
    core = dni_rl.wrap(nn.LSTM(D, H, layers, bias=bias))
    inputs = torch.randn(T, B, D, requires_grad=True)
    state = tuple(torch.randn(B, H, requires_grad=True) for _ in range(2 * layers))
    first = None
    if resets is not None:
        first = torch.zeros(T, B, dtype=torch.bool)
        for t, b in resets:
            first[t, b] = True
    return core, inputs, state, first


@pytest.mark.parametrize("watch", [True, False])
def test_nothing_of_the_kernel_is_kept_after_the_backward_pass(watch, monkeypatch):
    """The tensors that a loop still names, until it unrolls the next window, must not hold this one's activations."""
    kept, real = [], gated._fused_lstm

    def noted(*arguments):
        results = real(*arguments)
        kept.extend(weakref.ref(result) for result in results)
        return results

    monkeypatch.setattr(gated, "_fused_lstm", noted)
    core, inputs, state, _ = case([(7, 0)])
    outputs, end = core.unroll(inputs, state)
    losses = outputs.square().sum(-1)
    assert kept and all(ref() is not None for ref in kept)
    if watch:
        losses.sum().backward()
    else:
        with end.history.unwatched():
            losses.sum().backward()
    gc.collect()
    assert all(ref() is None for ref in kept)  # and with them the graph behind them
    assert outputs is not None and losses is not None and end.history.states  # there until here, and still readable


def gradients(unroll, core, inputs, state, first, watch=True):
    outputs, end = unroll(core, inputs, state, first)
    torch.manual_seed(1)
    total = sum((x * torch.randn_like(x)).sum() for x in (outputs, *end))
    leaves = [inputs, *state, *core.parameters()]
    if watch:
        return outputs, end, torch.autograd.grad(total, leaves)
    with end.history.unwatched():
        return outputs, end, torch.autograd.grad(total, leaves)


def fused(core, inputs, state, first):
    return core.unroll(inputs, state, first)


@every_reset
@pytest.mark.parametrize("watch", [True, False], ids=["recorded", "not recorded"])
@pytest.mark.parametrize(("layers", "bias"), [(1, True), (2, True), (1, False)])
def test_equals_the_plain_loop(calls, resets, watch, layers, bias):
    arguments = case(resets, layers, bias)
    outputs, end, found = gradients(fused, *arguments, watch=watch)
    assert len(calls) == layers
    expected_outputs, expected_end, expected = gradients(unroll_stepwise, *arguments)
    torch.testing.assert_close(outputs, expected_outputs, **CLOSE)
    torch.testing.assert_close(tuple(end), tuple(expected_end), **CLOSE)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(end.history.states, expected_end.history.states, **CLOSE)
    if watch:
        torch.testing.assert_close(end.history.gradients, expected_end.history.gradients, **CLOSE)
    else:
        assert all(not g.any() for g in end.history.gradients)


def test_frozen_parts_get_no_gradient_and_change_no_other(calls):
    core, inputs, state, first = case([(7, 0)])
    _, _, expected = gradients(fused, core, inputs, state, first)
    core.rnn.weight_hh_l0.requires_grad_(False)
    core.rnn.bias_ih_l0.requires_grad_(False)
    for watch in (True, False):
        outputs, end = core.unroll(inputs.detach(), state, first)
        torch.manual_seed(1)
        total = sum((x * torch.randn_like(x)).sum() for x in (outputs, *end))
        kept = [*state, core.rnn.weight_ih_l0, core.rnn.bias_hh_l0]
        if watch:
            found = torch.autograd.grad(total, kept)
        else:
            with end.history.unwatched():
                found = torch.autograd.grad(total, kept)
        torch.testing.assert_close(found, (*expected[1:4], expected[6]), **CLOSE)
    assert len(calls) == 3


def test_two_backward_passes_over_one_window(calls):
    core, inputs, state, first = case([(7, 0)])
    outputs, end = core.unroll(inputs, state, first)
    with end.history.unwatched():
        once = torch.autograd.grad(outputs.sum(), state, retain_graph=True)
    again = torch.autograd.grad(outputs.sum(), state, retain_graph=True)
    torch.testing.assert_close(again, once, **CLOSE)
    torch.testing.assert_close(end.history.gradients[0][0], once[0], **CLOSE)
    assert len(calls) == 1


def test_many_resets_take_the_written_out_layer(calls):
    core, inputs, state, _ = case(None)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[::3, 0] = True
    core.unroll(inputs, state, first)
    assert not calls


def test_short_windows_with_dense_targets_take_the_written_out_layer(calls):
    core, inputs, state, _ = case(None)
    core.unroll(inputs[:8], state)
    assert not calls
    core.targets_per_window = 0
    core.unroll(inputs[:8], state)
    assert len(calls) == 1


@pytest.mark.parametrize("unfit", ["float64", "autocast"])
def test_other_types_take_the_written_out_layer(calls, unfit):
    core, inputs, state, first = case([])
    if unfit == "float64":
        core.double().unroll(inputs.double(), tuple(s.double() for s in state), first)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            core.unroll(inputs, state, first)
    assert not calls


def test_a_state_that_is_not_finite_is_forgotten_at_a_reset(calls):
    core, inputs, state, _ = case(None)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    broken = tuple(torch.full_like(s, torch.nan, requires_grad=True) for s in state)
    outputs, end, found = gradients(fused, core, inputs, broken, first)
    assert len(calls) == 1
    for x in (outputs, *end, *found, *end.history.states, *end.history.gradients):
        assert x.isfinite().all()


@pytest.mark.parametrize("what", ["state", "inputs", "weights too large for blank steps"])
def test_what_a_blank_step_cannot_forget_takes_the_written_out_layer(calls, what):
    core, inputs, state, first = case([(7, b) for b in range(B)])
    if what == "state":
        state = tuple(torch.full_like(s, torch.nan) for s in state)
    elif what == "inputs":
        inputs = inputs.clone()
        inputs[3] = torch.inf
    else:
        with torch.no_grad():
            core.rnn.weight_hh_l0.mul_(1000.0)
    outputs, _ = core.unroll(inputs, state, first)
    assert not calls
    expected, _ = core.unroll(inputs[7:], core.initial_state(B))
    torch.testing.assert_close(outputs[7:], expected)


def test_the_default_type_of_tensors_does_not_matter(calls):
    core, inputs, state, first = case([(7, 0)])
    expected, _ = core.unroll(inputs, state, first)
    torch.set_default_dtype(torch.float64)
    try:
        outputs, _ = core.unroll(inputs, state, first)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(calls) == 2
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [None, 2])
@pytest.mark.parametrize("resets", [None, [(7, 0)]])
def test_the_default_device_of_tensors_does_not_matter(calls, resets, wanted):
    core, inputs, state, first = case(resets)
    core.targets_per_window = wanted
    expected, end, _ = gradients(fused, core, inputs, state, first)
    with torch.device("meta"):
        outputs, elsewhere = core.unroll(inputs, state, first)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert calls and elsewhere.history.valid.equal(end.history.valid)


def test_writing_into_the_next_state_changes_nothing_else(calls):
    core, inputs, state, first = case([(7, 0)])
    with torch.no_grad():
        outputs, end = core.unroll(inputs, state, first)
        before = outputs.clone(), [s.clone() for s in end.history.states]
        for s in end:
            s.fill_(7.0)
    torch.testing.assert_close((outputs, list(end.history.states)), before, rtol=0, atol=0)
    assert len(calls) == 1


def test_inference_mode_gives_the_same(calls):
    core, inputs, state, first = case([(7, 0)])
    expected, expected_end = core.unroll(inputs, state, first)
    with torch.inference_mode():
        outputs, end = core.unroll(inputs, state, first)
        torch.testing.assert_close(end.history.states, expected_end.history.states)
    torch.testing.assert_close((outputs, tuple(end)), (expected, tuple(expected_end)))
    assert len(calls) == 2


def write(what, core, inputs, state, first, outputs):
    """Writes into one tensor that the window was computed from, or made."""
    with torch.no_grad():
        if what == "first":
            first[3, 1] = True
        else:
            {
                "parameters": core.rnn.weight_hh_l0,
                "outputs": outputs,
                "inputs": inputs,
                "state h": state[0],
                "state c": state[1],
            }[what].add_(1.0)


@pytest.mark.parametrize("what", ["parameters", "outputs", "inputs", "state h", "state c", "first"])
@pytest.mark.parametrize("by", ["reading", "backward"])
def test_what_changed_before_the_history_is_read_is_noticed(calls, what, by):
    core, inputs, state, first = case([(7, 0)])
    outputs, end = core.unroll(inputs, state, first)
    total = outputs.square().sum().view(())
    write(what, core, inputs, state, first, outputs)
    with pytest.raises(RuntimeError, match=r"changed in place before the window's|modified by an inplace operation"):
        _ = end.history.states if by == "reading" else total.backward()
    assert len(calls) == 1 and core.rnn.weight_hh_l0.grad is None


@pytest.mark.parametrize("what", ["parameters", "inputs", "first"])
def test_what_changed_between_reading_and_the_backward_pass_is_noticed(calls, what):
    core, inputs, state, first = case([(7, 0)])
    outputs, end = core.unroll(inputs, state, first)
    _ = end.history.states
    write(what, core, inputs, state, first, outputs)
    with pytest.raises(RuntimeError, match=f"LSTM.unroll: its {what} changed in place before the window's history"):
        outputs.sum().backward()
    assert len(calls) == 1 and core.rnn.weight_hh_l0.grad is None


@pytest.mark.parametrize("what", ["parameters", "inputs", "first"])
def test_the_written_out_layer_notices_what_changed_too(calls, monkeypatch, what):
    monkeypatch.setattr(gated, "_fused_is_possible", lambda *_: False)
    core, inputs, state, first = case([(7, 0)])
    outputs, _ = core.unroll(inputs, state, first)
    write(what, core, inputs, state, first, outputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()
    assert not calls


def test_the_written_out_layer_has_a_copy_of_the_state(calls, monkeypatch):
    monkeypatch.setattr(gated, "_fused_is_possible", lambda *_: False)
    found = []
    for what in ("state h", "state c", None):
        core, inputs, state, first = case([(7, 0)])
        outputs, end = core.unroll(inputs, state, first)
        if what is not None:
            write(what, core, inputs, state, first, outputs)
        outputs.square().sum().backward()
        found.append(([p.grad for p in core.parameters()], end.history.gradients))
    torch.testing.assert_close(found[:2], [found[2]] * 2, rtol=0, atol=0)
    assert not calls


def test_second_derivatives_are_refused(calls):
    core, inputs, state, first = case(None)
    outputs, _ = core.unroll(inputs, state, first)
    with pytest.raises(RuntimeError, match="unroll_stepwise"):
        torch.autograd.grad(outputs.sum(), state, create_graph=True)
    assert len(calls) == 1


def test_a_window_is_freed_with_its_last_reference(calls):
    core, inputs, state, first = case([(7, 0)])
    gc.disable()
    try:
        outputs, end = core.unroll(inputs, state, first)
        outputs.sum().backward()
        _ = end.history.states
        kept = weakref.ref(end.history)
        del outputs, end
        assert kept() is None
    finally:
        gc.enable()
    assert len(calls) == 1


@pytest.mark.parametrize("critic", ["none", "dense", "at the start"])
def test_backward_gives_the_same_by_either_layer(calls, monkeypatch, critic):
    core, inputs, state, first = case([(7, 0), (20, 1)])
    torch.manual_seed(2)
    error_critic = None
    if critic != "none":
        error_critic = dni_rl.GradientCritic(
            state_sizes=core.state_sizes, dense_targets=critic == "dense", normalize_targets=False
        )
        nn.init.normal_(error_critic.net[0].weight)
    found = []
    for possible in (gated._fused_is_possible, lambda *_: False):
        monkeypatch.setattr(gated, "_fused_is_possible", possible)
        module = nn.ModuleList([core] if error_critic is None else [core, error_critic])
        module.zero_grad()
        start = dni_rl.cut(state)
        outputs, end = core.unroll(inputs, start, first)
        dni_rl.backward(outputs.square().sum(-1), start=start, end=end, critic=error_critic)
        found.append([p.grad.clone() for p in module.parameters()])
    assert len(calls) == 1
    torch.testing.assert_close(found[0], found[1], **CLOSE)


@every_reset
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_stretches_between_targets_equal_the_plain_loop(calls, resets, layers, wanted):
    arguments = case(resets, layers)
    arguments[0].targets_per_window = wanted
    outputs, end, found = gradients(fused, *arguments)
    assert calls and end.history.steps == tuple(i * T // wanted for i in range(wanted))
    expected_outputs, expected_end, expected = gradients(unroll_stepwise, *arguments)
    torch.testing.assert_close((outputs, tuple(end)), (expected_outputs, tuple(expected_end)), **CLOSE)
    torch.testing.assert_close(found, expected, **CLOSE)
    steps = tuple(i * T // wanted for i in range(wanted))
    states, recorded = end.history.at(steps)
    expected_states, expected_recorded = expected_end.history.at(steps)
    torch.testing.assert_close(states, expected_states, **CLOSE)
    assert end.history.valid.equal(expected_end.history.valid)
    valid = end.history.valid[list(steps)]
    for x, y in zip(recorded, expected_recorded, strict=True):
        torch.testing.assert_close(x[valid], y[valid], **CLOSE)


def test_targets_closer_than_a_stretch_are_recorded_at_every_step(calls):
    core, inputs, state, first = case([(7, 0)])
    core.targets_per_window = 6
    end = core.unroll(inputs, state, first)[1]
    assert len(calls) == 1 and end.history.steps is None
    assert len(end.history.states[0]) == T


def test_a_critic_that_learns_at_other_steps_is_refused_before_any_gradient(calls):
    core, inputs, state, first = case(None)
    core.targets_per_window = 1
    critic, start = dni_rl.GradientCritic(state_sizes=core.state_sizes, targets_per_window=2), dni_rl.cut(state)
    outputs, end = core.unroll(inputs, start, first)
    losses = outputs.square().sum(-1)
    with pytest.raises(RuntimeError, match=r"end: found the states before the steps \(0,\) recorded, .* at \(20,\)"):
        dni_rl.backward(losses, start=start, end=end, critic=critic)
    assert all(p.grad is None for p in (*core.parameters(), *critic.parameters()))
    dni_rl.backward(losses, start=start, end=end, critic=critic, fit=False)  # which asks for none


def test_steps_that_no_stretch_starts_from_are_refused(calls):
    core, inputs, state, first = case(None)
    core.targets_per_window = 2
    end = core.unroll(inputs, state, first)[1]
    for ask in (lambda: end.history.states, lambda: end.history.gradients, lambda: end.history.at((0, 10, 20, 30))):
        with pytest.raises(
            RuntimeError, match=r"history: found the steps \(0, 20\) recorded, .* set the core's targets_per_window"
        ):
            ask()
    states, found = end.history.at((20,))
    assert [s.shape for s in (*states, *found)] == [(1, B, H)] * 4
