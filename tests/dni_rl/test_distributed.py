"""Real processes: they do what one process does, number for number; staleness keeps its bound; and whatever fails ends all."""

import itertools
import multiprocessing
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dni_rl import DecoupledSequential, GradientCritic, MultiTimescaleCore, cut
from dni_rl.distributed import (
    Level,
    ProcessError,
    Stage,
    connect,
    launch,
    train_levels,
    train_pipeline,
)
from dni_rl.distributed.rendezvous import meet

pytestmark = pytest.mark.timeout(180)
WIDTHS = (5, 6, 7, 3)
B, STEPS = 4, 9


def make_net(mode="decoupled", context_size=0, without_critic=None, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.Tanh()) for a, b in itertools.pairwise(WIDTHS)]
    critics = [
        None if i == without_critic else GradientCritic(state_sizes=(w,), hidden_sizes=(8,), context_size=context_size)
        for i, w in enumerate(WIDTHS[1:-1])
    ]
    for module in (*layers, *critics):
        if module is not None:
            module.to(dtype)
    return DecoupledSequential(
        layers,
        critics,
        [torch.optim.Adam(layer.parameters(), 1e-2) for layer in layers],
        [None if c is None else torch.optim.Adam(c.parameters(), 1e-2) for c in critics],
        mode=mode,
    )


def make_batches(context_size=0, steps=STEPS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(B, WIDTHS[0], dtype=dtype, generator=generator)
        targets = torch.randn(B, WIDTHS[-1], dtype=dtype, generator=generator)
        context = torch.randn(B, context_size, dtype=dtype, generator=generator) if context_size else None
        yield x, context, targets


def losses_of(outputs, targets):
    return (outputs - targets).square().sum(-1)


def in_one_process(net, context_size=0, dtype=torch.float64):
    losses = []
    for x, context, targets in make_batches(context_size, dtype=dtype):
        losses.append(net.update(x, lambda h, targets=targets: losses_of(h, targets), context).losses.mean().item())
    return net, losses


def with_fixed_staleness(net, bound):
    """The definition, layer by layer: a critic is told of batch t when the layer has taken up batch t + bound."""
    stages = [Stage.of(net, i) for i in range(len(net.layers))]
    late = [[] for _ in stages]
    for x, _, targets in make_batches():
        h = x
        for i, stage in enumerate(stages):
            leaf = h.detach().requires_grad_(i > 0)
            h = stage.layer(leaf)
            if stage is stages[-1]:
                signal_above = torch.ones(B, dtype=h.dtype)
                output = losses_of(h, targets)
            else:
                output, (signal_above,) = h, stage.critic.synthetic_gradient((h.detach(),))
            stage.optimizer.zero_grad()
            output.backward(signal_above / B)
            stage.optimizer.step()
            if i:
                late[i - 1].append((leaf.detach(), leaf.grad * B))
        for stage, pairs in zip(stages[:-1], late, strict=False):
            if len(pairs) > bound:
                fit_critic(stage, *pairs.pop(0))
    for stage, pairs in zip(stages[:-1], late, strict=False):
        for pair in pairs:
            fit_critic(stage, *pair)
    return net


def fit_critic(stage, h, gradient):
    stage.critic_optimizer.zero_grad()
    stage.critic.fit((h,), (gradient,)).loss.backward()
    stage.critic_optimizer.step()


SCENARIOS = {
    "decoupled": ({}, {}),
    "conditioned": ({"context_size": 2}, {}),
    "without one critic": ({"without_critic": 1}, {}),
    "locked": ({"mode": "locked"}, {}),
    "fixed, 2 late": ({}, {"max_staleness": 2, "schedule": "fixed"}),
    "free, up to 2 late": ({}, {"max_staleness": 2}),
}


# Levels: the same system as one graph, where everything that crosses between processes, or a cut, is a node of its own.

SIZES, PERIODS, K, T, D = (3, 2, 4), (1, 2, 6), 2, 24, 2
LEVEL_SCENARIOS = {"oracles": 0, "oracles, 2 late": 2}


def make_core():
    torch.manual_seed(0)
    return MultiTimescaleCore(D, SIZES, PERIODS).double()


def make_sequence():
    inputs = torch.randn(T, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0], first[7, 1], first[12, 1], first[4, 2], first[9, 2] = True, True, True, True, True
    return inputs, first


def losses_of_levels(h, targets):
    return (h - 0.3).square().sum(-1)


class Nodes:
    """One graph of `core` with contexts `late` messages old; gradients of the summed loss with respect to every node."""

    def __init__(self, core, inputs, first, late):
        L = len(core.levels)
        state = [tuple(inputs.new_zeros(B, n) for _ in "hc") for n in SIZES]
        visited, messages, contexts = [[] for _ in SIZES], [[] for _ in SIZES], [[] for _ in SIZES]
        clock, started, losses = torch.zeros(B), torch.zeros(B), []
        for t in range(T):
            clock, started = clock.where(~first[t], 0.0), started.where(~first[t], t)
            x = inputs[t]
            usable = [len(messages[i]) - late for i in range(L)]  # those above have taken in nothing of this step yet
            for i, (cell, period) in enumerate(zip(core.levels, PERIODS, strict=True)):
                ticks = (clock % period == 0).unsqueeze(-1)
                if not ticks.any():
                    break
                visited[i].append(tuple(s.requires_grad_().view_as(s) if s.is_leaf else s.view_as(s) for s in state[i]))
                h, c = (s * (clock != 0).unsqueeze(-1) for s in visited[i][-1])
                if i + 1 < L:
                    above = inputs.new_zeros(B, SIZES[i + 1])
                    if usable[i] > 0:
                        tag, above = contexts[i + 1][usable[i] - 1]
                        above = above * (started <= tag).unsqueeze(-1)
                    x = torch.cat([x, above], -1)
                new = cell(x, (h, c))
                state[i] = tuple(torch.where(ticks, n, old) for n, old in zip(new, (h, c), strict=True))
                contexts[i].append((t, state[i][0].view_as(state[i][0])))
                x = state[i][0].view_as(state[i][0])
                if i + 1 < L and (clock % PERIODS[i + 1] == 0).any():
                    messages[i].append(x)
            losses.append(losses_of_levels(state[0][0], None))
            clock = clock + 1
        self.losses = torch.stack(losses)
        total, retain = self.losses.sum(), {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        self.of_cells = [torch.autograd.grad(total, list(cell.parameters()), **retain) for cell in core.levels]
        self.of_visited = [[torch.autograd.grad(total, v, **retain) for v in vs] for vs in visited]
        self.of_messages = [torch.autograd.grad(total, m, **retain) if m else () for m in messages]
        self.of_contexts = [torch.autograd.grad(total, [c for _, c in cs], **retain) for cs in contexts]


class Oracle(GradientCritic):
    """Answers its k-th question with the k-th truth, and keeps what it is taught."""

    def __init__(self, sizes, truth):
        super().__init__(state_sizes=sizes)
        self.double()
        self.truth, self.asked, self.taught = truth, 0, []

    def synthetic_gradient(self, state, context=None, alive=None):
        self.asked += 1
        if self.asked > len(self.truth):
            return tuple(torch.zeros_like(s) for s in state)
        keep = torch.ones(B, 1) if alive is None else alive.unsqueeze(-1)
        return tuple(g * keep for g in self.truth[self.asked - 1])

    def fit(self, state, target, context=None, valid=None):
        rows = slice(None) if valid is None else valid
        self.taught.append(tuple(g[rows] for g in target))
        return super().fit(state, target, context, valid)


def with_oracles(processes, late):
    """Gradients of this level's cell, and what its critics were taught."""
    core, i = make_core(), processes.rank
    inputs, first = make_sequence()
    nodes = Nodes(core, inputs, first, late)
    last = i == len(SIZES) - 1
    critics = {
        "critic": Oracle((SIZES[i],) * 2, nodes.of_visited[i][K::K]),
        "message_critic": None if last else Oracle((SIZES[i],), [(g,) for g in nodes.of_messages[i]]),
        "context_critic": Oracle((SIZES[i],), [(g,) for g in nodes.of_contexts[i]]) if i else None,
    }
    level = Level(core, i, None, ticks=K, weight=1.0, **critics)
    steps = [(x, f, None) for x, f in zip(inputs, first, strict=True)] if i == 0 else ()
    reports = train_levels(level, processes, steps, losses_of_levels, max_staleness=late, schedule="fixed")
    taught = {name: None if c is None else c.taught for name, c in critics.items()}
    return processes.gather(([p.grad for p in core.levels[i].parameters()], taught)), reports


def trained_levels(processes, late, schedule):
    core, i = make_core(), processes.rank
    torch.manual_seed(i)
    critics = {
        "critic": GradientCritic(state_sizes=(SIZES[i],) * 2).double(),
        "message_critic": GradientCritic(state_sizes=(SIZES[i],)).double() if i < len(SIZES) - 1 else None,
        "context_critic": GradientCritic(state_sizes=(SIZES[i],)).double() if i else None,
    }
    parameters = [p for c in critics.values() if c is not None for p in c.parameters()]
    level = Level(
        core,
        i,
        torch.optim.Adam(core.levels[i].parameters(), 1e-2),
        ticks=K,
        critic_optimizer=torch.optim.Adam(parameters, 1e-2),
        **critics,
    )
    inputs, first = make_sequence()
    for _ in range(2):  # in two parts, between which the levels keep their state
        steps = [(x, f, None) for x, f in zip(inputs, first, strict=True)] if i == 0 else ()
        reports = train_levels(level, processes, steps, losses_of_levels, max_staleness=late, schedule=schedule)
    return core.state_dict(), reports


def scenarios_in_processes():
    found = {}
    with connect(timeout_sec=30) as processes:
        for name, (of_net, of_run) in SCENARIOS.items():
            net = make_net(**of_net)
            batches = make_batches(of_net.get("context_size", 0)) if processes.rank == 0 else ()
            reports = train_pipeline(net, processes, batches, losses_of, **of_run)
            found[name] = (net.state_dict(), reports)
        with torch.autocast("cpu", torch.bfloat16):
            net = make_net(dtype=torch.float32)
            batches = make_batches(dtype=torch.float32) if processes.rank == 0 else ()
            reports = train_pipeline(net, processes, batches, losses_of)
        found["under autocast"] = (net.state_dict(), reports)
        for name, late in LEVEL_SCENARIOS.items():
            found[name] = with_oracles(processes, late)
        found["levels"] = [
            trained_levels(processes, *how) for how in ((1, "fixed"), (1, "fixed"), (0, "fixed"), (1, "free"))
        ]
    return found


@pytest.fixture(scope="module")
def found():
    return launch(scenarios_in_processes, 3, timeout_sec=50)


def assert_same(found, expected):
    """Parameters, statistics of batch normalisation, critics, and the state of every optimiser."""
    for state in (found, expected):
        state["_extra_state"]["generator"] = None  # that nobody is drawn, processes do not draw
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["decoupled", "conditioned", "without one critic", "locked"])
def test_without_staleness_processes_equal_one_process(found, name):
    of_net, _ = SCENARIOS[name]
    state, reports = found[name]
    net, losses = in_one_process(make_net(**of_net), of_net.get("context_size", 0))
    expected = net.state_dict()
    assert_same(state, expected)
    assert reports[-1].losses == pytest.approx(losses, rel=1e-12)
    assert all(report.staleness == {0: STEPS} for report in reports[:-1]) and reports[-1].staleness == {}
    before = make_net(**of_net).layers[0][0].weight
    assert torch.equal(state["layers.2.0.weight"], before) is False
    assert torch.equal(state["layers.1.0.weight"], make_net(**of_net).layers[1][0].weight) == (
        name == "without one critic"
    )


def test_a_fixed_schedule_is_late_by_exactly_the_bound(found):
    state, reports = found["fixed, 2 late"]
    assert_same(state, with_fixed_staleness(make_net(), 2).state_dict())
    assert [report.staleness for report in reports[:-1]] == [{0: 1, 1: 1, 2: STEPS - 2}] * 2
    undelayed, _ = in_one_process(make_net())
    assert not torch.equal(state["layers.0.0.weight"], undelayed.layers[0][0].weight)


def test_a_free_schedule_keeps_its_bound_and_accounts_for_every_gradient(found):
    _, reports = found["free, up to 2 late"]
    for report in reports[:-1]:
        assert sum(report.staleness.values()) == report.batches == STEPS == len(report.cosines)
        assert report.max_staleness <= 2 and 0 <= report.mean_staleness <= 2
    assert len(reports[-1].losses) == STEPS and reports[0].losses == ()


def test_under_autocast_processes_equal_one_process(found):
    state, reports = found["under autocast"]
    with torch.autocast("cpu", torch.bfloat16):
        net, losses = in_one_process(make_net(dtype=torch.float32), dtype=torch.float32)
    assert_same(state, net.state_dict())
    assert reports[-1].losses == tuple(losses)


def test_a_level_under_autocast_learns_from_a_window_as_it_does_elsewhere():
    """Backward passes run in full precision; what a level computes on is here what full precision computed."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        core = MultiTimescaleCore(D, SIZES, PERIODS)
        critic = GradientCritic(state_sizes=(SIZES[0],) * 2, hidden_sizes=(7,))
        nn.init.normal_(critic.net.linear.weight)
        optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (core.levels[0], critic)]
        level = Level(core, 0, optimizers[0], ticks=K, critic=critic, critic_optimizer=optimizers[1])
        for tag in range(K):
            level.tick(tag, torch.randn(B, D), torch.full((B,), tag))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            level.close_window()
        found.append([p.detach() for module in (core.levels[0], critic) for p in module.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("late", [0, 2])
def test_the_graph_that_levels_are_compared_with_is_the_core(late):
    core, (inputs, first) = make_core(), make_sequence()
    nodes = Nodes(core, inputs, first, late)
    outputs, _ = core.unroll(inputs, cut(core.initial_state(B)), first)
    losses = losses_of_levels(outputs, None)
    gradients = torch.autograd.grad(losses.sum(), list(core.parameters()))
    same = torch.allclose(losses, nodes.losses, rtol=1e-12)
    assert same == (late == 0)
    if late == 0:
        torch.testing.assert_close(gradients, sum(nodes.of_cells, ()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LEVEL_SCENARIOS)
def test_levels_with_oracle_critics_have_the_gradients_of_one_graph(found, name):
    core, (inputs, first) = make_core(), make_sequence()
    late = LEVEL_SCENARIOS[name]
    nodes = Nodes(core, inputs, first, late)
    per_level, reports = found[name]
    torch.testing.assert_close(torch.tensor(reports[0].losses).double(), nodes.losses.mean(1).detach())
    for i, (gradients, taught) in enumerate(per_level):
        torch.testing.assert_close(gradients, list(nodes.of_cells[i]), rtol=1e-10, atol=1e-12)
        # What arrives at the critics is what they should predict.
        states = [torch.cat(gs) for gs in zip(*nodes.of_visited[i], strict=True)]
        torch.testing.assert_close(
            [torch.cat(gs) for gs in zip(*taught["critic"], strict=True)], states, rtol=1e-10, atol=1e-12
        )
        if taught["message_critic"] is not None:
            arrived = torch.cat([g for (g,) in taught["message_critic"]])
            truth = torch.cat(nodes.of_messages[i])
            assert len(arrived) < len(truth)  # not every row hears every message
            arrived, truth = (g[g.abs().sum(-1) > 0] for g in (arrived, truth))  # zero: heard, but too late to matter
            torch.testing.assert_close(arrived, truth, rtol=1e-10, atol=1e-12)
        if taught["context_critic"] is not None:
            arrived = [g for (g,) in taught["context_critic"]]
            assert len(arrived) >= len(nodes.of_contexts[i]) - 2 - late  # the last ones are still in use
            torch.testing.assert_close(arrived, list(nodes.of_contexts[i][: len(arrived)]), rtol=1e-10, atol=1e-12)


def test_levels_learn_alike_in_a_fixed_schedule_and_keep_the_bound_in_a_free_one(found):
    (once, _), (again, _), (punctual, _), (free, reports) = found["levels"]
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    start = make_core().state_dict()
    for name in start:
        assert not torch.equal(once[name], start[name]) and not torch.equal(free[name], start[name])
        assert not torch.equal(once[name], punctual[name])
    for report in reports[:-1]:
        assert report.max_staleness <= 1 and sum(report.staleness.values()) == report.ticks
        assert report.message_cosines
    assert reports[0].ticks == T and reports[0].windows == T // K and len(reports[0].losses) == T
    assert all(report.context_cosines for report in reports[1:])


# Failures


def failing(how):
    net = make_net()
    with connect(timeout_sec=2.0 if how == "hangs" else 30.0) as processes:

        def losses(outputs, targets):
            if how == "raises":
                raise ZeroDivisionError("nothing to divide by")
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hangs":
                time.sleep(60)
            return losses_of(outputs, targets)

        train_pipeline(net, processes, make_batches(steps=1000), losses)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("raises", r"^process 2: ZeroDivisionError: nothing to divide by \(test_distributed.py:\d+\)$"),
        ("is killed", r"^process 2: ended with exit code -9$"),
        ("hangs", r"^process \d: (lost the connection to|heard nothing from|a neighbour did not end)[^\n]* 2 s[^\n]*$"),
    ],
)
def test_whatever_fails_in_one_process_ends_all_with_one_line(how, line):
    start = time.monotonic()
    with pytest.raises(ProcessError, match=line):
        launch(failing, 3, how, timeout_sec=40)
    assert time.monotonic() - start < 35


def with_context_for_none():
    with connect(timeout_sec=20) as processes:
        train_pipeline(make_net(), processes, make_batches(context_size=2), losses_of)


def test_a_context_that_no_critic_takes_is_refused_as_in_one_process():
    with pytest.raises(ProcessError, match="context: found one, allowed None where every critic has context_size=0"):
        launch(with_context_for_none, 3, timeout_sec=40)
    with pytest.raises(ValueError, match="context: found one, allowed None"):
        in_one_process(make_net(), context_size=2)


def with_a_batch_of_nothing():
    with connect(timeout_sec=20) as processes:
        batches = [tuple(None if part is None else part[:0] for part in batch) for batch in make_batches()]
        train_pipeline(make_net(), processes, batches, losses_of)


def test_a_batch_of_nothing_is_refused_as_in_one_process():
    with pytest.raises(ProcessError, match="batches: found one of no examples; allowed at least one"):
        launch(with_a_batch_of_nothing, 3, timeout_sec=40)


def idle_for_longer_than_pytorch_waits():
    default = dist.distributed_c10d.default_pg_timeout
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=1)
    try:
        with connect(timeout_sec=20) as processes:
            time.sleep(2.5)
            train_pipeline(make_net(), processes, make_batches(steps=2), losses_of)
    finally:
        dist.distributed_c10d.default_pg_timeout = default


def test_links_wait_as_long_as_they_were_told():
    launch(idle_for_longer_than_pytorch_waits, 3, timeout_sec=40)


def outlived(folder):
    (folder / f"{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(60)


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    parent = multiprocessing.get_context("spawn").Process(target=launch, args=(outlived, 2, tmp_path))
    parent.start()
    pids = [tmp_path / "0", tmp_path / "1"]
    waited_for(lambda: all(path.exists() and path.read_text() for path in pids))
    parent.kill()
    waited_for(lambda: not any(is_alive(int(path.read_text())) for path in pids))


def waited_for(condition, timeout_sec=30.0):
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wrong_number():
    with connect(timeout_sec=20) as processes:
        train_pipeline(make_net(), processes, (), losses_of)


def test_a_net_of_another_size_is_refused():
    with pytest.raises(ProcessError, match="net: found 3 layers and 1 processes, allowed one process for each layer"):
        launch(wrong_number, 1, timeout_sec=40)


def test_launch_ends_what_takes_too_long():
    with pytest.raises(ProcessError, match="processes 0 did not end within 1 s and were killed"):
        launch(time.sleep, 1, 50, timeout_sec=1)


@pytest.mark.parametrize(
    ("here", "address", "is_chosen"),
    [
        ("2", "a-name-of-this-machine", True),
        ("1", "127.0.0.1", False),  # the other process runs on another machine, for which the first is not localhost
        (None, "localhost", True),
        (None, "a-machine", False),
    ],
)
def test_messages_keep_to_the_loopback_where_all_processes_are_on_this_machine(here, address, is_chosen, monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": address, "MASTER_PORT": "1"}
    environment = {name: value for name, value in variables.items() if value is not None}
    monkeypatch.setattr(os, "environ", environment)

    def refused(*_, **__):
        raise RuntimeError("nobody is there")

    monkeypatch.setattr(dist, "rendezvous", refused)
    with (
        pytest.raises(ProcessError, match="process 0: could not meet the others: RuntimeError: nobody is there"),
        connect(),
    ):
        pass
    assert ("GLOO_SOCKET_IFNAME" in environment) == ("NCCL_SOCKET_IFNAME" in environment) == is_chosen


@pytest.mark.parametrize(
    ("wanted", "gpus", "device", "backend", "chosen"),
    [
        ("cpu", 4, "cpu", "gloo", []),
        ("cuda", 2, "cuda:1", "cpu:gloo,cuda:nccl", [1]),
        ("cuda", 1, "cuda:0", "gloo", [0]),  # shared, which NCCL refuses
        ("cuda:0", 2, "cuda:0", "gloo", []),  # perhaps that of the others, too
        ("cuda", 0, "cuda", "gloo", []),
    ],
)
def test_messages_of_gpus_travel_by_nccl_where_each_process_has_one(wanted, gpus, device, backend, chosen, monkeypatch):
    of_machine = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a-machine", "MASTER_PORT": "1"}
    monkeypatch.setattr(os, "environ", {"RANK": "3", "WORLD_SIZE": "4", **of_machine})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    set_to, backends = [], []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: set_to.append(device.index))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: backends.append(backend))
    meeting = meet(torch.device(wanted), timedelta(seconds=1))
    assert (str(meeting.device), backends, set_to) == (device, [backend], chosen)
    assert meeting.direct == (backend != "gloo") and (meeting.rank, meeting.world_size) == (3, 4)


def test_wrong_settings_are_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"connect: RANK.* start the program with torchrun"), connect():
        pass
    net = make_net()
    net.update_probability = 0.5
    with pytest.raises(ValueError, match=r"net: found mode 'decoupled' with update_probability 0.5"):
        Stage.of(net, 0)
    with pytest.raises(ValueError, match="message='mean'"):
        Level(MultiTimescaleCore(2, (3, 2), (1, 2), message="mean"), 0, None, ticks=1)
    with pytest.raises(ValueError, match="highest level sends no messages up"):
        Level(make_core(), 2, None, ticks=1, message_critic=GradientCritic(state_sizes=(4,)))


def test_levels_refuse_critics_that_nobody_gives_a_bound():
    bounded = {"max_norm_ratio": 1.0}
    for name, sizes in (("critic", (3, 3)), ("message_critic", (3,))):
        critic = GradientCritic(state_sizes=sizes, **bounded)
        with pytest.raises(ValueError, match=r"critic: found max_norm_ratio=1\.0, allowed None"):
            Level(make_core(), 0, None, ticks=1, **{name: critic})


def test_a_layer_of_half_precision_is_sent_what_the_net_in_one_process_sends():
    """The weight is in the gradient before it is rounded, and what goes down is divided by it in single precision."""
    nets = [make_net() for _ in range(2)]
    for net in nets:
        net.to(torch.bfloat16)
    h, gradient = torch.randn(3, WIDTHS[1]).bfloat16(), torch.randn(3, WIDTHS[2])
    leaf = h.clone().requires_grad_()
    sent = Stage.of(nets[0], 1)._learn(nets[0].layers[1](leaf), gradient, leaf)
    leaf = h.clone().requires_grad_()
    nets[1].layers[1](leaf).backward((gradient * (1.0 / 3.0)).bfloat16())
    torch.testing.assert_close(sent, leaf.grad.float() / (1.0 / 3.0), rtol=0, atol=0)
    found, expected = ([p.grad for p in net.layers[1].parameters()] for net in nets)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
