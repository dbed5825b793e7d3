"""torch.compile of models, cores, critics and whole steps gives the numbers of plain PyTorch, or a clear error.

With the backend that traces, splits and differentiates as the default one does, and generates no code; the default one runs once.
"""

import shutil

import pytest
import torch
from core_cases import CORES, DOUBLE, D, make_core, random_state
from torch import nn

import dni_rl

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # PyTorch's own, while it traces
]
T, B = 2, 3
QUICK = ("LSTM", "GRU", "nn.LSTMCell", "a user's module", "element-wise LSTM", "2 timescales")
every_core = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CORES]
)
graphs = []


def BACKEND(graph, inputs):
    graphs.append(graph)
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


class Model(nn.Module):
    """What a user has: torso, core and head in one forward pass."""

    def __init__(self, core):
        super().__init__()
        self.torso, self.core, self.head = nn.Linear(D, D), core, nn.Linear(core.output_size, 1)

    def forward(self, x, state, first):
        outputs, end = self.core.unroll(torch.tanh(self.torso(x)), state, first)
        return self.head(outputs).squeeze(-1).square(), end


def make(name, kind=dni_rl.GradientCritic):
    core = make_core(name)
    if isinstance(core, dni_rl.WatchedCore):
        core, critic = core, core.critic
    else:
        critic = kind(state_sizes=core.state_sizes, hidden_sizes=(5,), max_norm_ratio=0.5).double()
    for p in critic.net.parameters():
        nn.init.normal_(p, std=0.5)
    return Model(core).double(), critic


def train(model, critic, forward, step=None):
    """Three windows, one of them with other resets: reports and gradients of both sides, and the statistics."""
    torch.manual_seed(1)
    state, tape = random_state(model.core, B), []

    def one(x, state, first):
        start = dni_rl.cut(state)
        losses, end = forward(x, start, first)
        return dni_rl.backward(losses, start=start, end=end, critic=critic), end

    step = one if step is None else step(one)
    for _ in range(3):
        report, state = step(torch.randn(T, B, D, dtype=DOUBLE), state, torch.rand(T, B) < 0.3)
        tape.append(report.as_dict())
    grads = [{key: p.grad for key, p in m.named_parameters() if p.grad is not None} for m in (model, critic)]
    return tape, grads, dict(critic.named_buffers())


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    graphs.clear()


@every_core
def test_a_compiled_model_learns_what_it_learns_uncompiled(name):
    model, critic = make(name)
    expected = train(model, critic, model)
    model, critic = make(name)
    assert_same(train(model, critic, torch.compile(model, backend=BACKEND)), expected)
    assert graphs


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("core", "LSTM"),
        ("core", "a user's module"),
        ("cell", "a user's module"),
        ("unroll", "LSTM"),
        ("unroll", "element-wise LSTM"),
        ("step", "LSTM"),
        ("step", "a user's module"),
    ],
)
def test_parts_and_whole_steps_can_be_compiled(what, name):
    model, critic = make(name)
    expected = train(model, critic, model)
    model, critic = make(name)
    step = None
    if what == "core":
        model.core = torch.compile(model.core, backend=BACKEND)
    elif what == "cell":
        model.core.compile(backend=BACKEND)
    elif what == "unroll":
        model.core.unroll = torch.compile(model.core.unroll, backend=BACKEND)
    else:
        step = lambda function: torch.compile(function, backend=BACKEND)  # noqa: E731
    tape, grads, statistics = train(model, critic, model, step)
    if what == "core":
        grads[0] = {key.replace("_orig_mod.", ""): g for key, g in grads[0].items()}
    assert_same((tape, grads, statistics), expected)
    assert graphs or what == "core"  # a wrapped core unrolls as it is written


@pytest.mark.parametrize("donated", [True, False])
def test_a_compiled_graph_that_gives_its_memory_away_is_refused_with_the_setting_that_keeps_it(donated):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.head = dni_rl.LSTM(D, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x, state):
            outputs, end = self.core.unroll(x, state)
            return self.head(outputs).squeeze(-1), end

    net = Net()
    critic = dni_rl.GradientCritic(state_sizes=net.core.state_sizes, max_norm_ratio=1.0)

    def windows():
        compiled, state = torch.compile(net, backend=BACKEND), net.core.initial_state(B)
        for number in range(3):
            start = dni_rl.cut(state)
            values, state = compiled(torch.randn(T, B, D), start)
            # a first window without a critic passes through the graph once, which then gives its memory away
            dni_rl.backward(values.square(), start=start, end=state, critic=critic if number else None)

    with torch._functorch.config.patch(donated_buffer=donated):
        if donated:
            with pytest.raises(
                RuntimeError, match=r"^torch\.compile: found a compiled graph .*donated_buffer = False$"
            ):
                windows()
        else:
            windows()


@pytest.mark.parametrize("kind", [dni_rl.GradientCritic, dni_rl.LossCritic])
@pytest.mark.parametrize("what", ["critic", "net"])
def test_a_compiled_critic_learns_what_it_learns_uncompiled(kind, what):
    model, critic = make("LSTM", kind)
    expected = train(model, critic, model)
    model, critic = make("LSTM", kind)
    if what == "net":
        critic.net.compile(backend=BACKEND)
    else:
        critic = torch.compile(critic, backend=BACKEND)
    tape, grads, statistics = train(model, critic, model)
    grads[1] = {key.replace("_orig_mod.", ""): g for key, g in grads[1].items()}
    assert_same((tape, grads, {k.replace("_orig_mod.", ""): v for k, v in statistics.items()}), expected)
    assert bool(graphs) == (what == "net")  # it is never called as a module
    assert critic.net.state_dict().keys() == make("LSTM", kind)[1].net.state_dict().keys()


@pytest.mark.parametrize("wrap", [False, True])
def test_what_cannot_be_compiled_says_so(wrap):
    model, critic = make("LSTM", dni_rl.SobolevCritic)
    if wrap:
        critic.net = torch.compile(critic.net, backend=BACKEND)
    else:
        critic.net.compile(backend=BACKEND)
    with pytest.raises(
        RuntimeError, match=r"SobolevCritic: found a compiled net, .* cannot differentiate twice; leave"
    ):
        train(model, critic, model)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of its own import
def test_the_default_backend():
    model, critic = make("element-wise LSTM")
    expected = train(model, critic, model)
    model, critic = make("element-wise LSTM")
    critic.net.compile()
    assert_same(train(model, critic, torch.compile(model)), expected)
