"""What critics may know beyond the state: inputs that lie ahead, and those that were read."""

import math

import pytest
import torch
from core_cases import DOUBLE, D, resets

import dni_rl

T, B = 5, 3
FIRST = resets(T, (2, 0), (0, 1), (4, 1))


def naive(inputs, first, steps):
    """Row by row, step by step, as the docstring says."""
    rows = []
    for t in range(T + 1):
        for b in range(B):
            values, flags = [], []
            for i in range(steps):
                known = t + i < T and not any(first[t + j, b] for j in range(i + 1))
                values.append(inputs[t + i, b].flatten() if known else torch.zeros(inputs[0, 0].numel(), dtype=DOUBLE))
                flags.append(float(known))
            rows.append(torch.cat([*values, torch.tensor(flags, dtype=DOUBLE)]))
    return torch.stack(rows).view(T + 1, B, -1)


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
@pytest.mark.parametrize("shape", [(D,), (2, 2), ()], ids=str)
@pytest.mark.parametrize("starts", [True, False])
def test_matches_the_definition(steps, shape, starts):
    inputs = torch.randn(T, B, *shape, dtype=DOUBLE)
    first = FIRST if starts else torch.zeros_like(FIRST)
    context = dni_rl.future_inputs(inputs, first if starts else None, steps)
    torch.testing.assert_close(context, naive(inputs, first, steps), rtol=0, atol=0)
    assert context.shape == (T + 1, B, steps * (math.prod(shape) + 1))


def test_golden():
    inputs = torch.tensor([1.0, 2.0, 3.0]).view(3, 1)
    first = torch.tensor([False, False, True]).view(3, 1)
    context = dni_rl.future_inputs(inputs, first, 2).squeeze(1)
    assert context.tolist() == [[1, 2, 1, 1], [2, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_what_belongs_to_another_episode_may_be_anything():
    inputs = torch.randn(T, B, D)
    expected = dni_rl.future_inputs(inputs, FIRST, 2)
    inputs[2, 0] = math.nan  # read by an episode that no earlier state has a part in
    assert torch.equal(dni_rl.future_inputs(inputs, FIRST, 2)[:3, 0], expected[:3, 0])


def test_it_is_a_constant():
    assert not dni_rl.future_inputs(torch.randn(T, B, D, requires_grad=True), FIRST, 2).requires_grad


def test_a_critic_that_looks_ahead_predicts_what_the_state_cannot_tell():
    # s' = s + x, l_t = s'^2 / 2: the gradient of the window is the sum of all s', which depends on the inputs to come.
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(1))

    core = dni_rl.CellCore(
        Sum(),
        state_sizes=(1,),
        input_size=1,
        output_size=1,
        step=lambda cell, x, s: (y := s[0] + cell.gain * x, (y,)),
    ).double()
    explained = {}
    for steps in (0, 3):
        torch.manual_seed(0)
        size = 0 if steps == 0 else 2 * steps
        critic = dni_rl.GradientCritic(state_sizes=(1,), context_size=size, gradient_discount=0.0).double()
        optimizer = torch.optim.Adam(critic.parameters(), 0.1)
        for _ in range(100):
            inputs = torch.randn(3, 64, 1, dtype=DOUBLE)
            start = dni_rl.cut((0.1 * torch.randn(64, 1, dtype=DOUBLE),))
            outputs, end = core.unroll(inputs, start)
            context = dni_rl.future_inputs(inputs, None, steps) if steps else None
            optimizer.zero_grad()
            losses = outputs.squeeze(-1).square() / 2
            report = dni_rl.backward(losses, start=start, end=end, critic=critic, context=context)
            optimizer.step()
        explained[steps] = report.explained_variance.item()
    assert explained[3] > 0.8 and explained[0] < 0.3, explained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(5), None, 1), r"inputs: expected floating-point \[T, B, \.\.\.\], got torch.float32 \(5,\)"),
        ((torch.zeros(5, 3, dtype=torch.uint8), None, 1), "inputs: expected floating-point .* got torch.uint8"),
        ((torch.zeros(5, 3), FIRST[:4], 1), r"first: expected bool \[T, B\] = \(5, 3\), got torch.bool \(4, 3\)"),
        ((torch.zeros(5, 3), FIRST.float(), 1), "first: expected bool .* got torch.float32"),
        ((torch.zeros(5, 3), None, 0), "steps: found 0, allowed an integer from 1 on; without future inputs leave the"),
        ((torch.zeros(5, 3), None, (2,)), r"steps: found \(2,\), allowed an integer from 1 on"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        dni_rl.future_inputs(*arguments)


# Past inputs


def naive_past(inputs, first, steps, before):
    rows = []
    for b in range(B):
        averages = before[b].clone()
        for t in range(T + 1):
            if t < T and first[t, b]:
                averages = torch.zeros_like(averages)
            rows.append(averages)
            if t < T:
                parts = []
                for n, part in zip(steps, averages.chunk(len(steps)), strict=True):
                    share = 1.0 / n
                    x = torch.cat([inputs[t, b].flatten() * share**0.5, torch.tensor([share], dtype=DOUBLE)])
                    parts.append((1.0 - share) * part + x)
                averages = torch.cat(parts)
    return torch.stack(rows).view(B, T + 1, -1).transpose(0, 1)


@pytest.mark.parametrize("steps", [(2,), (3, 10)])
@pytest.mark.parametrize("shape", [(D,), (2, 2), ()], ids=str)
@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("carried", [True, False])
def test_past_inputs_match_their_definition(steps, shape, starts, carried):
    inputs = torch.randn(T, B, *shape, dtype=DOUBLE)
    first = FIRST if starts else torch.zeros_like(FIRST)
    size = len(steps) * (math.prod(shape) + 1)
    before = torch.randn(B, size, dtype=DOUBLE) if carried else torch.zeros(B, size, dtype=DOUBLE)
    context = dni_rl.past_inputs(inputs, first if starts else None, steps, before=before if carried else None)
    torch.testing.assert_close(context, naive_past(inputs, first, steps, before), rtol=1e-12, atol=1e-12)
    assert context.shape == (T + 1, B, size)


def test_past_inputs_go_on_from_window_to_window():
    inputs = torch.randn(T, B, D)
    whole = dni_rl.past_inputs(inputs, FIRST, (4,))
    head = dni_rl.past_inputs(inputs[:2], FIRST[:2], (4,))
    tail = dni_rl.past_inputs(inputs[2:], FIRST[2:], (4,), before=head[-1])
    torch.testing.assert_close(torch.cat([head[:-1], tail]), whole)


def test_past_inputs_are_a_constant_and_do_not_cross_episodes():
    inputs = torch.randn(T, B, D)
    inputs[1, 0] = math.nan  # of an episode that ends before step 2 of sequence 0
    first = torch.zeros(T, B, dtype=torch.bool)
    first[2] = True
    context = dni_rl.past_inputs(inputs.requires_grad_(), first, (3,))
    assert not context.requires_grad and not context[2].any() and context[2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_past_inputs_of_half_precision_are_averaged_in_full(dtype):
    inputs = torch.randn(600, B, D).to(dtype)
    expected = dni_rl.past_inputs(inputs.float(), None, (100, 1000))
    head = dni_rl.past_inputs(inputs[:300], None, (100, 1000))
    tail = dni_rl.past_inputs(inputs[300:], None, (100, 1000), before=head[-1])
    torch.testing.assert_close(torch.cat([head[:-1], tail]), expected)


def test_past_inputs_remember_what_the_state_has_lost():
    """The last component tells the age of the episode, and the sum over many steps still holds the first input."""
    inputs = torch.zeros(30, 2, 1)
    inputs[0, :, 0] = torch.tensor([1.0, -1.0])
    context = dni_rl.past_inputs(inputs, None, (20,))
    assert context[-1, 0, 0] == -context[-1, 1, 0] and context[-1, 0, 0] > 0.04
    ages = context[:, 0, 1]
    assert (ages.diff() > 0).all() and ages[-1] == pytest.approx(1.0 - 0.95**30, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": ()}, r"steps: found \(\), allowed a list of one or more numbers of at least 2"),
        ({"steps": 10}, r"steps: found 10, allowed a list"),
        ({"steps": (1, 5)}, r"steps: found \(1, 5\), allowed"),
        ({"before": torch.zeros(B, 3)}, r"before: expected \[B, Z\] = \(3, 8\), got \(3, 3\)"),
        ({"inputs": torch.zeros(T, B, D, dtype=torch.int64)}, "inputs: expected floating-point"),
        ({"first": FIRST.float()}, r"first: expected bool"),
    ],
)
def test_bad_past_inputs_are_named(arguments, message):
    arguments = {"inputs": torch.zeros(T, B, 3), "first": FIRST, "steps": (2, 5)} | arguments
    with pytest.raises(ValueError, match=message):
        dni_rl.past_inputs(arguments.pop("inputs"), arguments.pop("first"), **arguments)


# Recent inputs


def naive_recent(inputs, first, steps, before):
    rows = []
    for b in range(B):
        read = list(before[b].view(steps, -1)) if before is not None else []
        for t in range(T + 1):
            if t < T and first[t, b]:
                read = []
            nothing = torch.zeros(inputs[0, 0].numel() + 1, dtype=DOUBLE)
            rows.append(torch.cat([*read, *[nothing] * steps][:steps]))
            if t < T:
                read = [torch.cat([inputs[t, b].flatten(), torch.ones(1, dtype=DOUBLE)]), *read]
    return torch.stack(rows).view(B, T + 1, -1).transpose(0, 1)


@pytest.mark.parametrize("steps", [1, 3, 9])
@pytest.mark.parametrize("shape", [(D,), (2, 2), ()], ids=str)
@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("carried", [True, False])
def test_recent_inputs_match_their_definition(steps, shape, starts, carried):
    inputs = torch.randn(T, B, *shape, dtype=DOUBLE)
    first = FIRST if starts else torch.zeros_like(FIRST)
    size = steps * (math.prod(shape) + 1)
    before = torch.randn(B, size, dtype=DOUBLE) if carried else None
    context = dni_rl.recent_inputs(inputs, first if starts else None, steps, before=before)
    torch.testing.assert_close(context, naive_recent(inputs, first, steps, before), rtol=0, atol=0)
    assert context.shape == (T + 1, B, size)


def test_recent_inputs_go_on_from_window_to_window():
    inputs = torch.randn(T, B, D)
    whole = dni_rl.recent_inputs(inputs, FIRST, 4)
    head = dni_rl.recent_inputs(inputs[:2], FIRST[:2], 4)
    tail = dni_rl.recent_inputs(inputs[2:], FIRST[2:], 4, before=head[-1])
    assert torch.equal(torch.cat([head[:-1], tail]), whole)


def test_recent_inputs_are_a_constant_and_do_not_cross_episodes():
    inputs = torch.randn(T, B, D)
    inputs[1, 0] = math.nan  # of an episode that ends before step 2
    first = torch.zeros(T, B, dtype=torch.bool)
    first[2] = True
    context = dni_rl.recent_inputs(inputs.requires_grad_(), first, 3)
    assert not context.requires_grad and not context[2].any() and context[2:].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"steps: found 0, allowed an integer from 1 on; without recent inputs leave the context out"),
        ({"steps": (10,)}, r"steps: found \(10,\), allowed an integer"),
        ({"before": torch.zeros(B, 3)}, r"before: expected \[B, Z\] = \(3, 8\), got \(3, 3\)"),
        ({"inputs": torch.zeros(T, B, D, dtype=torch.int64)}, "inputs: expected floating-point"),
        ({"first": FIRST.float()}, r"first: expected bool"),
    ],
)
def test_bad_recent_inputs_are_named(arguments, message):
    arguments = {"inputs": torch.zeros(T, B, 3), "first": FIRST, "steps": 2} | arguments
    with pytest.raises(ValueError, match=message):
        dni_rl.recent_inputs(arguments.pop("inputs"), arguments.pop("first"), **arguments)
