"""Two gloo processes, each with its part of a batch, against one process with all of it: gradients, statistics, every step."""

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from core_cases import DOUBLE, H
from test_conformance import CRITICS, ConvCore, D, Model, Z
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dni_rl
from dni_rl.distributed import average_gradients, launch, synchronize

pytestmark = pytest.mark.timeout(120)
T, B, UPDATES = 4, 6, 4
HALVES, UNEQUAL = (slice(0, 3), slice(3, 6)), (slice(0, 4), slice(4, 6))


@dataclass(frozen=True)
class Case:
    critic: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: tuple[slice, slice] = HALVES
    wrapped: bool = False
    auxiliary: bool = False


CASES = {
    "truncated": Case(None),
    "one target": Case("GradientCritic", {"dense_targets": False, "normalize_targets": False}),
    "one target, normalised": Case("GradientCritic", {"dense_targets": False}),
    "dense": Case("GradientCritic", {"normalize_targets": False}),
    "bound": Case("GradientCritic", {"max_norm_ratio": 0.3, "slow_copy_rate": 0.5}),
    "few targets": Case("GradientCritic", {"targets_per_window": 2, "max_norm_ratio": 0.3, "yardstick_interval": 2}),
    "mixed targets": Case("GradientCritic", {"target_lambda": 0.6}),
    "unequal batches": Case("GradientCritic", {"max_norm_ratio": 0.3}, rows=UNEQUAL),
    "DistributedDataParallel": Case("GradientCritic", {"max_norm_ratio": 0.3}, wrapped=True),
    "DistributedDataParallel, truncated": Case(None, wrapped=True),
    "auxiliary task": Case("GradientCritic", {"max_norm_ratio": 0.3}, auxiliary=True),
    **{name: Case(name, {"max_norm_ratio": 0.3, "context_size": Z}) for name in CRITICS},
}


def build(case, seed):
    torch.manual_seed(seed)
    core, critic = (dni_rl.LSTM(D, H), None) if case.critic is None else CRITICS[case.critic](**case.settings)
    model = Model(core).double()
    sides = [model]
    if critic is not None:
        for p in critic.double().net.parameters():
            nn.init.normal_(p, std=0.5)
        sides.append(critic)
    if case.auxiliary:
        sides.append(dni_rl.AuxiliaryTask(output_size=H, state_sizes=core.state_sizes).double())
    return sides


def make_batch(model, case, update):
    generator = torch.Generator().manual_seed(100 + update)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    inside = ConvCore.state_shapes[0] if isinstance(model.core, ConvCore) else (D,)
    first = torch.rand(T, B, generator=generator) < 0.2
    first[:, 0] = True  # rows of no use to a critic, and more of them in one process than in the other
    return {
        "x": draw(T, B, *inside),
        "y": draw(T, B),
        "state": tuple(draw(*s.shape) for s in model.core.initial_state(B)),
        "first": first,
        "alive": torch.rand(B, generator=generator) < 0.7,
        "context": draw(T + 1, B, Z) if case.settings.get("context_size") else None,
        "goal": tuple(draw(T, B, H) for _ in range(2)),
    }


def part_of(batch, rows):
    def part(item):
        if isinstance(item, tuple):
            return tuple(s[:, rows] if s.dim() == 3 and len(s) == T and s.shape[1] == B else s[rows] for s in item)
        return None if item is None else item[rows] if item.dim() == 1 else item[:, rows]

    return {name: part(item) for name, item in batch.items()}


def run_window(forward, sides, batch, **settings):
    start = dni_rl.cut(batch["state"])
    losses, end = forward(batch["x"], batch["y"], start, batch["first"])
    critic = sides[1] if len(sides) > 1 else None
    if len(sides) > 2:
        valid = ~batch["first"]
        losses = losses + sides[2](torch.tanh(batch["x"]) @ torch.ones(D, H, dtype=DOUBLE), batch["goal"], valid)
    return dni_rl.backward(
        losses, start=start, end=end, critic=critic, alive=batch["alive"], context=batch["context"], **settings
    )


def snapshot(sides, report):
    """What must agree: gradients, parameters, running statistics, the critic's loss."""
    grads = {
        f"{i} {k}": p.grad.clone() for i, m in enumerate(sides) for k, p in m.named_parameters() if p.grad is not None
    }
    values = {
        f"{i} {k}": v.clone()
        for i, m in enumerate(sides)
        for k, v in m.state_dict().items()
        if isinstance(v, torch.Tensor)
    }
    return {"gradients": grads, "values": values, "loss": report.critic_loss.clone()}


def train(sides, forward, batches, after_backward=lambda: None, **settings):
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in sides]
    tape = []
    for batch in batches:
        report = run_window(forward, sides, batch, **settings)
        after_backward()
        tape.append(snapshot(sides, report))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return tape


def in_one_process(case):
    sides = build(case, seed=0)
    return train(sides, sides[0], [make_batch(sides[0], case, update) for update in range(UPDATES)])


def in_this_of_two(case):
    rank = dist.get_rank()
    sides = build(case, seed=rank)
    if rank and len(sides) > 1:
        sides[1].set_extra_state(torch.tensor(17))  # as if no look at the yardstick were due
    synchronize(*sides)
    forward, averaged = sides[0], sides
    if case.wrapped:
        forward, averaged = DistributedDataParallel(sides[0]), sides[1:]
    rows = case.rows[rank]
    batches = [part_of(make_batch(sides[0], case, update), rows) for update in range(UPDATES)]
    settings = {"weight": 2 / (T * B)} if case.rows is UNEQUAL else {}
    tape = train(sides, forward, batches, lambda: average_gradients(*averaged), **settings)
    for step in tape:
        dist.all_reduce(step["loss"])
        step["loss"] /= 2
        if case.rows is UNEQUAL:
            step["loss"] = None
    return tape


def overflow():
    """One update with a gradient scaler where the losses of rank 1 overflow; what it changed, by side."""
    case = CASES["bound"]
    sides = build(case, seed=0)
    synchronize(*sides)
    batch = part_of(make_batch(sides[0], case, 0), HALVES[dist.get_rank()])
    if dist.get_rank() == 1:
        batch["y"][:] = torch.inf
    before = copy.deepcopy([dict(m.named_parameters()) for m in sides])
    statistics = {k: v.clone() for k, v in sides[1].named_buffers()}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in sides]
    run_window(sides[0], sides, batch, scaler=scaler)
    average_gradients(*sides)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    same = all(
        torch.equal(p, old[key])
        for m, old in zip(sides, before, strict=True)
        for key, p in m.named_parameters()
        if p.requires_grad  # a slow copy follows at every fit
    )
    return same, {k for k, v in sides[1].named_buffers() if not torch.equal(v, statistics[k])}, scaler.get_scale()


def missing_gradients():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    module = nn.ParameterList([a, b, c])
    if dist.get_rank() == 0:
        a.grad = torch.tensor([2.0, 4.0])
    else:
        b.grad = torch.tensor([6.0, 8.0])
    average_gradients(module, module)  # whatever is passed twice is averaged once
    return [None if p.grad is None else p.grad.tolist() for p in module]


def refusals():
    wrapped = DistributedDataParallel(nn.ModuleList(build(CASES["dense"], 0)))
    messages = []
    for refused in (lambda: average_gradients(wrapped), lambda: synchronize(wrapped)):
        with pytest.raises(ValueError) as error:
            refused()
        messages.append(str(error.value))
    synchronize(DistributedDataParallel(nn.ModuleList(build(CASES["auxiliary task"], 0)[::2])))  # model and task
    return messages


def worker():
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    results: dict[str, Any] = {name: in_this_of_two(case) for name, case in CASES.items()}
    for other in (overflow, missing_gradients, refusals):
        results[other.__name__] = other()
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, results)
    dist.destroy_process_group()
    return [[numbers(result) for result in one.items()] for one in everyone]


def numbers(item):
    """Without tensors, whose memory would go with the process."""
    if isinstance(item, torch.Tensor):
        return item.tolist()
    if isinstance(item, dict):
        return {key: numbers(value) for key, value in item.items()}
    return type(item)(numbers(i) for i in item) if isinstance(item, list | tuple) else item


@pytest.fixture(scope="module")
def two():
    """What each of two processes found, by case."""
    return [dict(one) for one in launch(worker, 2, timeout_sec=100.0)]


def tensors(item):
    if isinstance(item, dict):
        return {key: tensors(value) for key, value in item.items()}
    return torch.tensor(item, dtype=DOUBLE)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one_with_the_joined_batch(two, name):
    expected = in_one_process(CASES[name])
    for found in (one[name] for one in two):
        for step, reference in zip(found, expected, strict=True):
            if step["loss"] is None:
                step["loss"] = reference["loss"].item()
            step, reference = tensors(step), tensors(numbers(reference))
            torch.testing.assert_close(step, reference, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_an_overflow_in_one_process_is_skipped_by_all(two):
    for one in two:
        unchanged, moved, scale = one["overflow"]
        assert unchanged
        assert moved == set()
        assert scale == 4.0


def test_a_gradient_that_one_process_lacks_counts_as_zero_and_one_that_all_lack_stays_away(two):
    for one in two:
        assert one["missing_gradients"] == [[1.0, 2.0], [3.0, 4.0], None]


def test_what_DistributedDataParallel_wraps_is_left_to_it(two):
    for one in two:
        averaged, synchronized = one["refusals"]
        assert averaged.startswith("modules: found DistributedDataParallel, which averages its gradients itself")
        assert synchronized.startswith("modules: found GradientCritic inside of DistributedDataParallel")


def test_without_a_group_it_is_refused():
    for function in (average_gradients, synchronize):
        with pytest.raises(RuntimeError, match="belongs to no group; start the program with torchrun"):
            function(nn.Linear(1, 1))
