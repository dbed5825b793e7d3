"""Cores: one suite over all of them, then what is special about each."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from core_cases import (
    CORES,
    DOUBLE,
    D,
    H,
    LeakyCell,
    gradient_of_the_rest,
    linear_core,
    make_core,
    naive_unroll,
    random_state,
    resets,
    states_before,
)
from torch import nn

import dni_rl
from dni_rl.cores import Core, UnrolledState, clear_state, unroll_stepwise

B = 3
FIRSTS = {
    "no resets": lambda T: None,
    "resets inside": lambda T: resets(T, (T // 2, 0), (T - 1, 0), (T - 1, 2)),
    "reset at step 0": lambda T: resets(T, (0, 1)),
    "all reset at once": lambda T: resets(T, (T // 2, 0), (T // 2, 1), (T // 2, 2)),
}
every_core = pytest.mark.parametrize("name", CORES)
every_first = pytest.mark.parametrize("first", FIRSTS)


def problem(name, T=5, first="resets inside", dtype=DOUBLE):
    core = make_core(name, dtype)
    inputs = torch.randn(T, B, D, dtype=dtype)
    return core, inputs, random_state(core, B, dtype), FIRSTS[first](T)


def assert_same(actual, expected, dtype=DOUBLE, **tolerances):
    tolerances = tolerances or ({"rtol": 1e-10, "atol": 1e-12} if dtype == DOUBLE else {"rtol": 1e-4, "atol": 1e-5})
    torch.testing.assert_close(actual, expected, **tolerances)


def objective_of(outputs, state):
    """A scalar in which every output and every component of the last state has its own weight."""
    total = (outputs * torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum()
    for k, s in enumerate(state):
        total = total + (s * torch.linspace(1, -1.5 - k, s.numel(), dtype=s.dtype).view_as(s)).sum()
    return total


# The suite ------------------------------------------------------------------------------------------------------------


def test_every_exported_core_is_in_this_suite():
    exported = {getattr(dni_rl, name) for name in dni_rl.__all__}
    cores = {c for c in exported if inspect.isclass(c) and issubclass(c, Core) and not inspect.isabstract(c)}
    assert cores == {type(make()) for make in CORES.values()}, "add the new core to core_cases.CORES"


@every_core
def test_a_step_keeps_the_contract(name):
    core = make_core(name)
    state = core.initial_state(B)
    assert [s.shape for s in state] == [(B, size) for size in core.state_sizes]
    assert all(s.dtype == DOUBLE and not s.any() for s in state)
    output, next_state = core(torch.randn(B, core.input_size, dtype=DOUBLE), state)
    assert output.shape == (B, core.output_size)
    assert isinstance(next_state, tuple) and [s.shape for s in next_state] == [s.shape for s in state]


@every_core
@every_first
@pytest.mark.parametrize("T", [1, 5])
def test_unroll_equals_steps(name, first, T):
    core, inputs, state, first = problem(name, T, first)
    outputs, end = core.unroll(inputs, state, first)
    expected_outputs, expected_end = naive_unroll(core, inputs, state, first)
    assert_same(outputs, expected_outputs)
    assert_same(tuple(end), expected_end)
    assert isinstance(end, UnrolledState)


@every_core
@every_first
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=["float64", "float32"])
def test_unroll_equals_the_plain_loop_in_values_gradients_and_history(name, first, T, dtype):
    core, inputs, state, first = problem(name, T, first, dtype)
    results = []
    for unroll in (core.unroll, lambda *arguments: unroll_stepwise(core, *arguments)):
        core.zero_grad()
        x, start = inputs.clone().requires_grad_(), dni_rl.cut(state)
        outputs, end = unroll(x, start, first)
        objective_of(outputs, end).backward()
        gradients = [x.grad, *(s.grad for s in start), *(p.grad for p in core.parameters())]
        history = end.history
        results.append((outputs, tuple(end), gradients, history.states, history.valid, history.gradients))
    assert_same(results[0], results[1], dtype)


@every_core
@every_first
def test_the_history_is_the_gradient_of_the_rest_of_the_window(name, first):
    core, inputs, state, first = problem(name, first=first)
    visited = states_before(core, inputs, state, first)
    outputs, end = core.unroll(inputs, dni_rl.cut(state), first)
    objective_of(outputs, end).backward()
    weights = torch.linspace(-1, 2, outputs.numel(), dtype=DOUBLE).view_as(outputs)

    def rest(j, s):
        tail, last = naive_unroll(core, inputs[j:], s, None if first is None else first[j:])
        return (tail * weights[j:]).sum() + objective_of(tail[:0], last)

    for j, expected in enumerate(gradient_of_the_rest(rest, visited, range(len(inputs)))):
        valid = end.history.valid[j]
        assert valid.tolist() == ([True] * B if first is None else (~first[j]).tolist())
        for recorded, kept, g, s in zip(end.history.gradients, end.history.states, expected, visited[j], strict=True):
            assert_same(recorded[j][valid], g[valid])
            assert_same(kept[j][valid], s[valid])
            assert not g[~valid].any() and not kept[j][~valid].any()  # an episode starts from zeros, and forgets
            assert not kept.requires_grad and not recorded.requires_grad


@every_core
def test_history_keeps_only_the_last_backward_pass_until_it_is_cleared(name):
    core, inputs, state, first = problem(name)
    outputs, end = core.unroll(inputs, dni_rl.cut(state), first)
    assert not any(g.any() for g in end.history.gradients)
    objective_of(outputs, end).backward(retain_graph=True)
    once = [g.clone() for g in end.history.gradients]
    (2.0 * objective_of(outputs, end)).backward()
    assert_same(list(end.history.gradients), [2.0 * g for g in once])
    end.history.clear()
    assert not any(g.any() for g in end.history.gradients)


@every_core
def test_no_grad_gives_the_same_values_without_a_graph(name):
    core, inputs, state, first = problem(name)
    expected_outputs, expected_end = core.unroll(inputs, state, first)
    with torch.no_grad():
        outputs, end = core.unroll(inputs, state, first)
    assert_same((outputs, tuple(end)), (expected_outputs, tuple(expected_end)), rtol=0, atol=0)
    assert_same(end.history.states, expected_end.history.states, rtol=0, atol=0)
    assert not outputs.requires_grad and not any(s.requires_grad for s in end)


@every_core
def test_writing_into_the_next_state_changes_nothing_else(name):
    core, inputs, state, first = problem(name)
    with torch.no_grad():
        outputs, end = core.unroll(inputs, state, first)
        before = [s.clone() for s in (outputs, *end.history.states)]
        for s in end:
            s.zero_()
    assert_same([outputs, *end.history.states], before, rtol=0, atol=0)


@every_core
def test_train_and_eval_mode_agree(name):
    core, inputs, state, first = problem(name)
    expected = core.train().unroll(inputs, state, first)[0]
    assert_same(core.eval().unroll(inputs, state, first)[0], expected, rtol=0, atol=0)


@every_core
def test_a_reset_forgets_everything_before_it(name):
    core, inputs, state, _ = problem(name)
    first = resets(5, (3, 0), (3, 1), (3, 2))
    x, start = inputs.clone().requires_grad_(), dni_rl.cut(state)
    outputs, end = core.unroll(x, start, first)
    objective_of(outputs[3:], end).backward()
    assert not x.grad[:3].any() and x.grad[3:].any()
    assert all(s.grad is None or not s.grad.any() for s in start)
    fresh, _ = core.unroll(inputs[3:], core.initial_state(B))
    assert_same(outputs[3:], fresh)


@every_core
def test_two_unrolls_equal_one(name):
    core, inputs, state, first = problem(name)
    outputs, end = core.unroll(inputs, state, first)
    head, middle = core.unroll(inputs[:2], state, first[:2])
    tail, last = core.unroll(inputs[2:], middle, first[2:])
    assert_same((torch.cat([head, tail]), tuple(last)), (outputs, tuple(end)))


@every_core
def test_gradients_pass_gradcheck(name):
    core, inputs, state, first = problem(name, T=3)
    parameters = {key: p.detach().clone().requires_grad_() for key, p in core.named_parameters()}

    class Unroll(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = core

        def forward(self, x, *s):
            outputs, end = self.core.unroll(x, s, first)
            if isinstance(core, dni_rl.WatchedCore):  # the memory's derivative is zero by decree, not by nature
                end = end[:-1]
            return (outputs, *end)

    def run(x, *rest):
        s, p = rest[: len(state)], rest[len(state) :]
        return torch.func.functional_call(
            Unroll(), {f"core.{k}": v for k, v in zip(parameters, p, strict=True)}, (x, *s)
        )

    # fast_mode: a random direction of each input; the exact gradients are compared with the plain loop above
    arguments = (inputs.requires_grad_(), *dni_rl.cut(state), *parameters.values())
    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)


@every_core
@pytest.mark.parametrize("frozen", ["the input weights", "the recurrent weights", "everything"])
def test_freezing_parameters_changes_no_other_gradient(name, frozen):
    core, inputs, state, first = problem(name)
    names = {
        "the input weights": ("ih", "W", "fast"),
        "the recurrent weights": ("hh", "A", "slow"),
        "everything": ("",),
    }[frozen]
    results = []
    for freeze in (False, True):
        core.zero_grad()
        for key, p in core.named_parameters():
            p.requires_grad_(not (freeze and any(part in key for part in names)))
        assert not freeze or not all(p.requires_grad for p in core.parameters())
        x, start = inputs.clone().requires_grad_(), dni_rl.cut(state)
        outputs, end = core.unroll(x, start, first)
        objective_of(outputs, end).backward()
        # of a clock, or a critic's memory, none comes back to the start
        arrived = [
            torch.zeros_like(s) if s.grad is None and not e.requires_grad else s.grad
            for s, e in zip(start, end, strict=True)
        ]
        results.append([x.grad, *arrived, *end.history.gradients, *(p.grad for p in core.parameters())])
    for plain, with_frozen in zip(*results, strict=True):
        if with_frozen is not None:
            assert_same(with_frozen, plain)
    assert [g is None for g in results[1]] == [False] * (1 + 2 * len(state)) + [
        not p.requires_grad for p in core.parameters()
    ]


@every_core
def test_state_dict_survives_a_file_and_the_core_a_copy(name):
    core, inputs, state, first = problem(name)
    expected = core.unroll(inputs, state, first)[0]
    file = io.BytesIO()
    torch.save(core.state_dict(), file)
    file.seek(0)
    torch.manual_seed(123)
    other = CORES[name]().to(DOUBLE)
    assert not torch.equal(other.unroll(inputs, state, first)[0], expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(core), pickle.loads(pickle.dumps(core))):
        assert_same(same.unroll(inputs, state, first)[0], expected, rtol=0, atol=0)


LAYER = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
LAYER_1 = ["weight_ih_l1", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1"]
CELL = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
KEYS = {
    "LSTM": [f"rnn.{key}" for key in LAYER],
    "LSTM, 2 layers": [f"rnn.{key}" for key in LAYER + LAYER_1],
    "LSTM, chrono": [f"rnn.{key}" for key in LAYER],
    "GRU": [f"rnn.{key}" for key in LAYER],
    "GRU, 2 layers, chrono": [f"rnn.{key}" for key in LAYER + LAYER_1],
    "nn.LSTM, 2 layers": [f"rnn.{key}" for key in LAYER + LAYER_1],
    "nn.LSTM, no bias": ["rnn.weight_ih_l0", "rnn.weight_hh_l0"],
    "nn.GRU, 2 layers": [f"rnn.{key}" for key in LAYER + LAYER_1],
    "nn.LSTMCell": ["cell.weight_ih", "cell.weight_hh", "cell.bias_ih", "cell.bias_hh"],
    "nn.GRUCell": ["cell.weight_ih", "cell.weight_hh"],
    "a user's module": [f"cell.{key}.{kind}" for key in ("fast", "slow", "readout") for kind in ("weight", "bias")],
    "linear, own step": ["cell.A", "cell.W"],
    "element-wise LSTM": ["weight_ih", "weight_hh", "bias"],
    "2 timescales": [f"levels.{i}.{key}" for i in range(2) for key in CELL],
    "3 timescales, mean": [f"levels.{i}.{key}" for i in range(3) for key in CELL],
    "LSTM with a critic's memory": [f"core.rnn.{key}" for key in LAYER],
}


@every_core
def test_state_dict_keys_are_stable(name):
    assert list(make_core(name).state_dict()) == KEYS[name]


def test_the_keys_written_out():
    assert KEYS["LSTM"] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"]


# LSTM and GRU against torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_matches_torch_on_a_sequence_without_resets(kind, layers):
    torch.manual_seed(0)
    module = getattr(nn, kind)(D, H, layers).double()
    core = dni_rl.wrap(module)
    inputs, state = torch.randn(5, B, D, dtype=DOUBLE), random_state(core, B)
    if kind == "LSTM":  # ours: h, c layer by layer; torch: all h, all c
        expected, (h, c) = module(inputs, (torch.stack(state[::2]), torch.stack(state[1::2])))
        expected_end = tuple(s for layer in range(layers) for s in (h[layer], c[layer]))
    else:
        expected, h = module(inputs, torch.stack(state))
        expected_end = tuple(h)
    outputs, end = core.unroll(inputs, state)
    assert_same((outputs, tuple(end)), (expected, expected_end))


def test_golden_step_of_an_lstm_without_weights():
    core = dni_rl.LSTM(1, 1).double()
    for p in core.parameters():
        nn.init.zeros_(p)
    start = dni_rl.cut((torch.tensor([[9.0]], dtype=DOUBLE), torch.tensor([[2.0]], dtype=DOUBLE)))
    outputs, end = core.unroll(torch.zeros(1, 1, 1, dtype=DOUBLE), start)
    # every gate is 1/2 and the candidate 0:  c' = c / 2,  h' = tanh(c') / 2
    assert end[1].item() == 1.0
    assert outputs.item() == end[0].item() == pytest.approx(0.5 * math.tanh(1.0), abs=1e-15)
    outputs.sum().backward()
    assert start[0].grad.item() == 0.0
    assert start[1].grad.item() == pytest.approx(0.25 * (1.0 - math.tanh(1.0) ** 2), abs=1e-15)


def test_fused_lstm_refuses_second_derivatives_which_the_plain_loop_has():
    core, inputs, state, first = problem("LSTM")
    x = inputs.requires_grad_()
    message = (
        "LSTM.unroll: create_graph=True found, but it has first derivatives only; use dni_rl.cores.unroll_stepwise"
    )
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(core.unroll(x, state, first)[0].sum(), x, create_graph=True)
    (g,) = torch.autograd.grad(unroll_stepwise(core, x, state, first)[0].sum(), x, create_graph=True)
    g.sum().backward()
    assert core.rnn.weight_hh_l0.grad.any()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_chrono_initialisation_remembers(kind):
    torch.manual_seed(0)
    core = getattr(dni_rl, kind)(D, 500, 2, chrono_max=50.0)
    for layer in range(2):
        bias, other = getattr(core.rnn, f"bias_ih_l{layer}"), getattr(core.rnn, f"bias_hh_l{layer}")
        keep = bias[500:1000]  # forget gate of an LSTM, update gate of a GRU
        assert keep.min() >= 0.0 and keep.max() <= math.log(49.0)
        memory = keep.exp()  # ~ U(1, 49)
        assert abs(memory.mean() - 25.0) < 3.0 and abs(memory.std() - 48.0 / 12**0.5) < 1.5
        assert_same(bias[:500], -keep if kind == "LSTM" else torch.zeros(500), rtol=0, atol=0)
        assert not bias[1000:].any() and not other.any()


# Wrapping -------------------------------------------------------------------------------------------------------------


def test_wrap_shares_parameters():
    for module in (nn.LSTM(D, H), nn.GRU(D, H), nn.LSTMCell(D, H), nn.GRUCell(D, H)):
        assert [id(p) for p in dni_rl.wrap(module).parameters()] == [id(p) for p in module.parameters()]


def test_wrap_returns_a_core_as_it_is():
    core = dni_rl.LSTM(D, H)
    assert dni_rl.wrap(core) is core


class Doubled(nn.LSTM):
    def forward(self, x, hx=None):
        outputs, state = super().forward(x, hx)
        return 2 * outputs, state


def patched(module):
    module.forward = lambda x, hx=None: None
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Doubled(D, H), "Doubled with a forward of its own"),
        (lambda: patched(nn.GRU(D, H)), "GRU with a forward of its own"),
        (lambda: hooked(nn.GRU(D, H), "forward"), "GRU with forward_hooks"),
        (lambda: hooked(nn.LSTM(D, H), "forward_pre"), "LSTM with forward_pre_hooks"),
        (lambda: hooked(nn.LSTM(D, H), "full_backward"), "LSTM with backward_hooks"),
        (lambda: nn.utils.weight_norm(nn.LSTM(D, H), "weight_hh_l0"), "LSTM with forward_pre_hooks"),
    ],
)
def test_a_module_whose_call_would_be_left_out_is_refused(make, found):
    module = make()
    kind = "GRU" if isinstance(module, nn.GRU) else "LSTM"
    refuses(
        f"module: found {found}, allowed nn.{kind} as it is, whose parameters a core reads without calling it; use parametrizations for "
        "its weights, or dni_rl.CellCore with a step of your own",
        dni_rl.wrap,
        module,
    )


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_what_is_hung_on_a_module_after_it_was_wrapped_is_refused_by_the_next_step(kind):
    module = getattr(nn, kind)(D, H)
    core = dni_rl.wrap(module)
    inputs, state = torch.randn(5, B, D), core.initial_state(B)
    core.unroll(inputs, state)
    nn.utils.spectral_norm(module, "weight_hh_l0")
    message = f"module: found {kind} with forward_pre_hooks, allowed nn.{kind} as it is, whose parameters a core reads"
    refuses(message, core.unroll, inputs, state)
    refuses(message, core, inputs[0], state)


@pytest.mark.parametrize("num_steps", [5, 64])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_parametrized_weight_is_computed_once_for_a_window(kind, num_steps):
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight + 0.0

    module, counted = getattr(nn, kind)(D, H), Counted()
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", counted)
    core = dni_rl.wrap(module)
    for targets in (None, 2):
        core.targets_per_window = targets  # of an LSTM: the window in stretches
        counted.calls = 0
        core.unroll(torch.randn(num_steps, B, D), core.initial_state(B))
        assert counted.calls == 1


def hooked(module, kind):
    getattr(module, f"register_{kind}_hook")(lambda *_: None)
    return module


def test_parametrized_weights_and_cells_that_do_more_are_cores():
    module = nn.utils.parametrizations.weight_norm(nn.LSTM(D, H).double(), "weight_hh_l0")
    x = torch.randn(5, B, D, dtype=DOUBLE)
    core = dni_rl.wrap(module)
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2.0)  # its length
    assert_same(core.unroll(x, core.initial_state(B))[0], module(x)[0])

    class Cell(nn.GRUCell):
        def forward(self, x, hx=None):
            return 2 * super().forward(x, hx)

    cell = hooked(Cell(D, H).double(), "forward")
    cell.register_forward_hook(lambda module, args, output: output + 1.0)
    core = dni_rl.wrap(cell)
    assert_same(core(x[0], core.initial_state(B))[0], 2 * nn.GRUCell.forward(cell, x[0]) + 1.0)


def test_sizes_are_those_of_the_module():
    for module in (nn.LSTM(D, H, 2), nn.LSTMCell(D, H), nn.GRU(D, H, 2), nn.GRUCell(D, H)):
        core = dni_rl.wrap(module)
        assert (core.input_size, core.output_size, set(core.state_sizes)) == (D, H, {H})
    assert len(dni_rl.wrap(nn.LSTM(D, H, 2)).state_sizes) == 4


def test_a_core_shows_its_state_sizes():
    assert "state_sizes=(4, 4)" in repr(dni_rl.LSTM(D, H))


def test_clear_state_keeps_trailing_dimensions():
    state = (torch.ones(2, 3), torch.ones(2, 3, 4, 5))
    flat, image = clear_state(state, torch.tensor([True, False]))
    assert flat.shape == (2, 3) and image.shape == (2, 3, 4, 5)
    for s in (flat, image):
        assert not s[0].any() and s[1].all()


# Errors ---------------------------------------------------------------------------------------------------------------


def refuses(message, function, *arguments, **settings):
    with pytest.raises(ValueError) as error:
        function(*arguments, **settings)
    assert "\n" not in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_what_cannot_be_cut_is_refused(kind):
    name = kind.__name__
    refuses(
        f"bidirectional: a bidirectional nn.{name} reads the future and has no state to cut at; "
        "use bidirectional=False",
        dni_rl.wrap,
        kind(D, H, bidirectional=True),
    )
    refuses(
        "dropout: found 0.5, allowed 0; put a Dropout before or behind the core",
        dni_rl.wrap,
        kind(D, H, 2, dropout=0.5),
    )
    refuses("batch_first: found True, allowed False", dni_rl.wrap, kind(D, H, batch_first=True))
    if kind is nn.LSTM:  # nn.GRU refuses it itself
        refuses(
            "proj_size: found 2, allowed 0; put a Linear behind the core instead", dni_rl.wrap, kind(D, H, proj_size=2)
        )


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_dropout_that_does_nothing_is_allowed():
    dni_rl.wrap(nn.LSTM(D, H, 1, dropout=0.5))


@pytest.mark.parametrize("kind", [dni_rl.LSTM, dni_rl.GRU])
def test_chrono_errors(kind):
    message = "chrono_max: found 2.0, allowed a finite number above 2; it is the longest expected memory in steps"
    refuses(message, kind, D, H, chrono_max=2.0)
    for value in (math.nan, math.inf):
        refuses(f"chrono_max: found {value}, allowed a finite number above 2", kind, D, H, chrono_max=value)
    module = (nn.LSTM if kind is dni_rl.LSTM else nn.GRU)(D, H, bias=False)
    refuses(
        "chrono_max: the module was built with bias=False; chrono initialisation sets biases",
        dni_rl.wrap(module).chrono_init_,
        10.0,
    )


def test_wrap_errors():
    message = (
        "module: LeakyCell is none of nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell; for a module of your own that maps "
        "(x, state) to (output, next_state), pass state_sizes=, input_size= and output_size="
    )
    refuses(message, dni_rl.wrap, LeakyCell())
    refuses(message, dni_rl.wrap, LeakyCell(), state_sizes=(4, 2), input_size=D)
    for sizes in ((4, 0), (4, -2), (4, 2.0), (), ((2, 5, 0),), ((),), (4, (2.0,))):
        refuses(
            f"state_sizes: expected positive integers, or tuples of them, got {sizes}",
            dni_rl.wrap,
            LeakyCell(),
            state_sizes=sizes,
            input_size=D,
            output_size=5,
        )


class NormedLSTMCell(nn.LSTMCell):
    """With the contract of a module of one's own, on top of a cell of PyTorch's."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x, state):
        h, c = super().forward(x, state)
        return self.norm(h), (h, c)


def test_a_subclass_of_a_cell_with_sizes_is_a_module_of_ones_own():
    cell = NormedLSTMCell(D, 4)
    core = dni_rl.wrap(cell, state_sizes=(4, 4), input_size=D, output_size=4)
    x, state = torch.randn(2, D), (torch.randn(2, 4), torch.randn(2, 4))
    output, (h, c) = core(x, state)
    expected, (h_of_cell, c_of_cell) = cell(x, state)
    assert torch.equal(output, expected) and torch.equal(h, h_of_cell) and torch.equal(c, c_of_cell)
    assert not torch.equal(output, h)


def test_sizes_that_a_module_has_by_itself_are_checked():
    for module in (nn.LSTM(D, 4), dni_rl.wrap(nn.LSTMCell(D, 4))):
        right = {"state_sizes": [4, 4], "input_size": D, "output_size": 4}
        assert dni_rl.wrap(module, **right).state_sizes == (4, 4)
        for name, wrong in {"state_sizes": (4,), "input_size": D + 1, "output_size": 5}.items():
            own = getattr(dni_rl.wrap(module), name)
            refuses(
                f"{name}: found {wrong}, allowed {own}, which the {type(module).__name__} has by itself; leave it out",
                dni_rl.wrap,
                module,
                **{**right, name: wrong},
            )


@every_core
def test_unroll_errors(name):
    core, inputs, state, first = problem(name)
    refuses("inputs: expected [T, B, D] with T >= 1, got (3, 3)", core.unroll, inputs[0], state)
    refuses("inputs: expected [T, B, D] with T >= 1, got (0, 3, 3)", core.unroll, inputs[:0], state)
    refuses("first: found list, allowed a bool tensor [T, B]", core.unroll, inputs, state, first.tolist())
    refuses("got ['float', ", core.unroll, inputs, (1.0, *state[1:], state[0]))
    refuses("first: expected [T, B] = (5, 3), got (4, 3)", core.unroll, inputs, state, first[1:])
    refuses(
        "first: expected dtype torch.bool, got torch.float32; use `first.bool()`",
        core.unroll,
        inputs,
        state,
        first.float(),
    )
    expected = [(3, size) for size in core.state_sizes]
    found = [(2, size) for size in core.state_sizes]
    refuses(f"state: expected shapes {expected}, got {found}", core.unroll, inputs, tuple(s[:2] for s in state))
    refuses(f"state: expected shapes {expected}, got []", core.unroll, inputs, ())
    refuses("got None; start with `core.initial_state(batch_size)`", core.unroll, inputs, None)


def test_a_core_says_what_shapes_its_state_has():
    class Maps(dni_rl.ElementwiseLSTM):
        state_shapes = ((1, 2, 2), (1, 2, 2))

    assert dni_rl.LSTM(D, H).state_shapes == ((H,), (H,))
    core = Maps(D, 4)
    assert [tuple(s.shape) for s in core.initial_state(2)] == [(2, 1, 2, 2)] * 2
    with pytest.raises(ValueError, match=r"state: expected shapes \[\(2, 1, 2, 2\), \(2, 1, 2, 2\)\], got"):
        core.unroll(torch.zeros(1, 2, D), (torch.zeros(2, 4),) * 2)


@pytest.mark.parametrize("first", [None, torch.tensor([[False] * B, [True] * B])])
@pytest.mark.parametrize("grad", [True, False])
def test_a_cell_that_writes_to_its_state_in_place_is_refused(first, grad):
    class Cell(nn.Module):
        def __init__(self, write):
            super().__init__()
            self.write = write

        def forward(self, x, state):
            memory = self.write(state[0] + 0.0 if self.write is decayed else state[0])
            return x, (memory + x,)

    def decayed(memory):
        return memory.mul_(0.5)

    def overwritten(memory):
        return memory.detach().mul_(0.5)  # the same storage, and nothing that autograd would refuse

    sizes = {"state_sizes": (D,), "input_size": D, "output_size": D}
    inputs, state = torch.ones(2, B, D), dni_rl.cut((torch.ones(B, D),))
    with torch.set_grad_enabled(grad):
        dni_rl.wrap(Cell(decayed), **sizes).unroll(inputs, state, first)  # a tensor of its own may be
        with pytest.raises(
            RuntimeError, match=r"^cell: found a state that it wrote to in place; allowed a next state of"
        ):
            dni_rl.wrap(Cell(overwritten), **sizes).unroll(inputs, state, first)


def test_inputs_that_are_no_tensor_are_refused():
    core = dni_rl.GRU(D, H)
    refuses(
        "inputs: found dict, allowed a tensor [T, B, D]", core.unroll, {"x": torch.ones(2, B, D)}, core.initial_state(B)
    )


def test_a_cell_whose_next_state_is_a_tensor_is_refused():
    class Cell(nn.Module):
        def forward(self, x, state):
            return x, x

    core = dni_rl.wrap(Cell(), state_sizes=(D,), input_size=D, output_size=D)
    state = core.initial_state(B)  # a module without parameters has one, too
    refuses(
        "cell: found a next state of type Tensor, allowed a tuple of tensors", core.unroll, torch.ones(2, B, D), state
    )


class Cell(nn.Module):
    """Returns what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, state):
        return self.answer(x, state[0])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, s: s, "cell: found a Tensor returned, allowed the pair (output, next_state); return (output, (state,))"),
        (lambda x, s: (s, (s,), x), "cell: found a tuple of 3 returned, allowed the pair (output, next_state)"),
        (lambda x, s: (s, (s, s)), "cell: found a next state [(3, 4), (3, 4)], allowed [(3, 4)] as the state before it"),
        (lambda x, s: (s, ((s,),)), "cell: found a next state ['tuple'], allowed [(3, 4)] as the state before it"),
        (lambda x, s: (s, (s[:, :2],)), "cell: found a next state [(3, 2)], allowed [(3, 4)]"),
        (lambda x, s: (s[:, :2], (s,)), "cell: found an output (3, 2), allowed (3, 4), [B, H]; set output_size to its width"),
        (lambda x, s: ((s, s), (s,)), "cell: found an output tuple, allowed (3, 4)"),
    ],
)  # fmt: skip
def test_a_cell_that_returns_something_else_is_refused(answer, message):
    core = dni_rl.wrap(Cell(answer), state_sizes=(H,), input_size=D, output_size=H)
    refuses(message, core.unroll, torch.ones(2, B, D), core.initial_state(B))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_of_torch_are_called_as_they_want(kind):
    cell = kind(D, H)
    x = torch.randn(B, D)
    wrapped = dni_rl.wrap(cell)
    own = dni_rl.CellCore(cell, state_sizes=wrapped.state_sizes, input_size=D, output_size=H)
    expected = cell(x)[0] if kind is nn.LSTMCell else cell(x)
    for core in (wrapped, own):
        assert_same(core(x, core.initial_state(B))[0], expected)


@pytest.mark.parametrize("kind", [dni_rl.LSTM, dni_rl.GRU, dni_rl.ElementwiseLSTM, dni_rl.MultiTimescaleCore])
def test_a_window_is_not_one_step(kind):
    core = kind(D, (H, H), (1, 2)) if kind is dni_rl.MultiTimescaleCore else kind(D, H)
    message = "x: expected [B, D], got (2, 3, 3); a window [T, B, D] goes through core.unroll"
    refuses(message, core, torch.ones(2, B, D), core.initial_state(B))


def test_a_convolutional_cell_has_shapes_for_sizes():
    class ConvCell(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x, state):
            h = torch.tanh(self.conv(torch.cat([x, state[0]], 1)))
            return h.flatten(1), (h, state[1] + h.mean((2, 3)))

    core = dni_rl.wrap(ConvCell(), state_sizes=((2, 5, 5), 2), input_size=1, output_size=50)
    assert core.state_shapes == ((2, 5, 5), (2,)) and core.state_sizes == (50, 2)
    outputs, end = core.unroll(torch.randn(4, B, 1, 5, 5), core.initial_state(B))
    assert outputs.shape == (4, B, 50) and [s.shape for s in end] == [(B, 2, 5, 5), (B, 2)]


def test_a_linear_core_needs_no_training_to_be_exact():
    core = linear_core().double()
    inputs, (s,) = torch.randn(4, B, D, dtype=DOUBLE), random_state(core, B)
    outputs, _ = core.unroll(inputs, (s,))
    A, W = core.cell.A.detach(), core.cell.W.detach()
    for t in range(4):
        s = s @ A.T + inputs[t] @ W.T
        assert_same(outputs[t].detach(), s)


@every_core
@pytest.mark.parametrize("num_steps", [4, 40])
@pytest.mark.parametrize("width", [D - 1, D + 1])
def test_inputs_of_another_width_are_refused(name, num_steps, width):
    core = make_core(name, torch.float32)
    for targets_per_window in (None, 0, 3):  # each has a kernel of its own
        if isinstance(core, dni_rl.LSTM):
            core.targets_per_window = targets_per_window
        message = rf"inputs: expected D = {D} in \[T, B, D\], got \({num_steps}, {B}, {width}\)"
        with pytest.raises(ValueError, match=message):
            core.unroll(torch.randn(num_steps, B, width), core.initial_state(B))


@every_core
@pytest.mark.parametrize("num_steps", [4, 40])
def test_inputs_of_another_number_of_dimensions_are_refused(name, num_steps):
    core = make_core(name, torch.float32)
    if isinstance(core, dni_rl.CellCore):
        pytest.skip("cells may read feature maps")
    for targets_per_window in (None, 0, 3):
        if isinstance(core, dni_rl.LSTM):
            core.targets_per_window = targets_per_window
        with pytest.raises(ValueError, match=rf"expected \[(T, )?B, D\], got \(({num_steps}, )?{B}, 7, {D}\)"):
            core.unroll(torch.randn(num_steps, B, 7, D), core.initial_state(B))


@pytest.mark.parametrize("first", [None, torch.tensor([[False, True], [True, False], [False, False]])])
def test_a_state_of_half_precision_starts_a_window(first):
    core = dni_rl.LSTM(2, 3)
    inputs = torch.randn(3, 2, 2)
    half = tuple(torch.randn(2, 3).bfloat16().requires_grad_() for _ in range(2))
    outputs, _ = core.unroll(inputs, half, first)
    expected, _ = core.unroll(inputs, tuple(s.float() for s in half), first)
    torch.testing.assert_close(outputs, expected)
    outputs.sum().backward()
    assert all(s.grad.dtype == torch.bfloat16 and s.grad.any() for s in half)


@pytest.mark.parametrize(
    ("module", "state_sizes", "message"),
    [
        (nn.Linear(3, 3), 3, "state_sizes: expected positive integers"),
        (nn.Linear(3, 3), (3.0,), "state_sizes: expected positive integers"),
        (lambda x, state: (x, state), (3,), "module: found function, allowed a torch.nn.Module"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(module, state_sizes, message):
    with pytest.raises(ValueError, match=message):
        dni_rl.wrap(module, state_sizes=state_sizes, input_size=3, output_size=3)
