"""Layers in processes of their own: a decoupled net as a pipeline without backward locking.

Each process owns one layer of a `DecoupledSequential`, its optimiser, and the error critic above it. For every batch,
tagged with its number,

    1. the activation arrives from below        h_{i-1}, with the context and the targets of the batch
    2. its own goes up at once                  h_i = f_i(h_{i-1})
    3. it learns at once, by its critic         dL/dh_i := M_i(h_i, z)
    4. the gradient at its input goes down      dL/dh_{i-1}, for the critic below
    5. some time later that of h_i arrives from above, for this or an older batch:
       M_i learns from the pair (h_i, gradient) of that batch

Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients" (2017), sec. 2, with real processes instead
of a draw of who learns when. Nothing in 1 to 4 waits for a layer above. Only memory has to end somewhere: a layer
that is more than `max_staleness` batches ahead of the gradients it has got waits for the oldest of them.
"""

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dni_rl.critics import CriticFit, take_step
from dni_rl.distributed.processes import Processes
from dni_rl.feedforward import DecoupledSequential, InterfaceCritic, _check_context_is_taken, _takes_context
from dni_rl.precision import out_of_autocast
from dni_rl.targets import per_sequence

ACTIVATION, GRADIENT, END = range(3)

Batch = tuple[Tensor, Tensor | None, Tensor]
"""Input [B, ...], context [B, Z] of the critics or None, and targets [B, ...] of the losses."""


@dataclass(frozen=True, slots=True)
class StageReport:
    """What one process did. Staleness: how many newer batches its layer had taken up when a gradient from above was used.

    Attributes:
        batches: how many it learned from.
        seconds: from the first batch to the last gradient, idle time included.
        waiting_sec: of these, spent waiting for the layer below or the data.
        blocked_sec: of these, spent waiting for gradients from above: at the bound, and at the end.
        cpu_sec: processor time of all its threads meanwhile, those that carry messages included.
        staleness: number of gradients by their staleness; empty for the highest layer, which needs none.
        cosines: of the critic's prediction with the gradient that arrived, in the order of arrival.
        losses: mean loss of each batch; only in the report of the highest layer.
    """

    batches: int
    seconds: float
    waiting_sec: float
    blocked_sec: float
    cpu_sec: float
    staleness: dict[int, int]
    cosines: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def joined(cls, pieces: "Sequence[StageReport]") -> "StageReport":
        """What one process did in consecutive calls of `train_pipeline`, as if they had been one."""
        staleness: collections.Counter[int] = collections.Counter()
        for piece in pieces:
            staleness.update(piece.staleness)
        return cls(
            sum(piece.batches for piece in pieces),
            sum(piece.seconds for piece in pieces),
            sum(piece.waiting_sec for piece in pieces),
            sum(piece.blocked_sec for piece in pieces),
            sum(piece.cpu_sec for piece in pieces),
            dict(sorted(staleness.items())),
            tuple(itertools.chain.from_iterable(piece.cosines for piece in pieces)),
            tuple(itertools.chain.from_iterable(piece.losses for piece in pieces)),
        )

    @property
    def mean_staleness(self) -> float:
        """0 where there was none."""
        total = sum(self.staleness.values())
        return sum(age * count for age, count in self.staleness.items()) / total if total else 0.0

    @property
    def max_staleness(self) -> int:
        """0 where there was none."""
        return max(self.staleness, default=0)


@dataclass(slots=True)
class _Sent:
    """What a layer keeps of a batch until its gradient has come back."""

    output: Tensor  # with its graph if the layer is locked
    leaf: Tensor | None
    context: Tensor | None
    position: int  # how many batches came before


@dataclass(slots=True)
class Stage:
    """One layer with what it needs to learn by itself; who it talks to, and when, is `train_pipeline`'s affair.

    Attributes:
        layer: maps the output of the layer below to its own.
        optimizer: over the layer's parameters, None if it does not learn.
        critic: of its output, None for the highest layer and where it is to get no gradient.
        critic_optimizer: of the critic.
        locked: learn from the gradient that comes back instead of the critic's, which is backpropagation.
    """

    layer: nn.Module
    optimizer: torch.optim.Optimizer | None
    critic: InterfaceCritic | None
    critic_optimizer: torch.optim.Optimizer | None
    locked: bool = False
    sent: dict[int, _Sent] = field(default_factory=dict)

    @classmethod
    def of(cls, net: DecoupledSequential, index: int) -> "Stage":
        """The layer of a decoupled net, with the critic above it and both optimisers, not copied.

        Raises:
            ValueError: if the net's mode has no counterpart here.
        """
        if net.mode == "unlocked" or net.update_probability != 1.0:
            raise ValueError(
                f"net: found mode {net.mode!r} with update_probability {net.update_probability}, allowed 'locked' or 'decoupled' with 1; "
                "processes learn when they can, not when they are drawn"
            )
        critic: Any = None
        if index < len(net.layers) - 1 and net._has_critic[index]:
            critic = net.critics[index]
        return cls(
            net.layers[index],
            net._optimizers[index],
            critic,
            net._critic_optimizers[index] if critic is not None else None,
            net.mode == "locked",
        )

    def learn_highest(self, losses: Tensor, leaf: Tensor | None) -> Tensor | None:
        """Learns from losses [B]; returns the gradient of one example's loss at its input, or None if that is the net's."""
        return self._learn(losses, torch.ones_like(losses), leaf)

    def learn(self, tag: int) -> Tensor | None:
        """Learns from the synthetic gradient of a batch that was sent up; returns that of the input, None without a critic."""
        sent = self.sent[tag]
        output, sent.output = sent.output, sent.output.detach()  # the graph ends with this call
        if self.critic is None:
            return None
        (answer,) = self.critic.synthetic_gradient((sent.output,), sent.context)
        return self._learn(output, answer, sent.leaf)

    def arrive(self, tag: int, gradient: Tensor | None) -> tuple[Tensor | None, CriticFit | None]:
        """Takes the gradient of a batch that came back from above, in units of one example's loss; forgets the batch.

        Returns:
            The gradient at the input if the layer is locked, and the critic's fit; None where there is none.
        """
        sent = self.sent.pop(tag)
        below = None
        if self.locked and gradient is not None:
            below = self._learn(sent.output, gradient, sent.leaf)
        fit = None
        if self.critic is not None and gradient is not None:
            fit = self.critic.fit((sent.output.detach(),), (gradient,), sent.context)
            take_step(self.critic_optimizer, fit.loss)
        return below, fit

    def _learn(self, output: Tensor, gradient: Tensor, leaf: Tensor | None) -> Tensor | None:
        # The same operations in the same order as DecoupledSequential's, so that both give the same numbers.
        weight = 1.0 / len(output)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        if not output.requires_grad:
            return None
        with out_of_autocast(output.device):
            torch.autograd.backward([output], [(gradient * weight).to(output.dtype)])
        if self.optimizer is not None:
            self.optimizer.step()
        return None if leaf is None or leaf.grad is None else per_sequence((leaf.grad,), weight)[0]


def train_pipeline(
    net: DecoupledSequential,
    processes: Processes,
    batches: Iterable[Batch],
    losses_of: Callable[[Tensor, Tensor], Tensor],
    *,
    max_staleness: int = 0,
    schedule: Literal["free", "fixed"] = "free",
    before_update: Callable[[int], None] | None = None,
) -> list[StageReport] | None:
    """Trains a net with each layer in its own process; layer i is that of rank i. Called by every process with the same arguments.

    With `max_staleness=0` it does what `net.update` does in one process, number for number in mode "decoupled", and up to
    rounding in mode "locked"; only that in mode "decoupled" the layers work on different batches at the same time: a layer may
    take up the next batch as soon as the layer above it has sent back the gradient of the last one, and never waits
    for those further up.

    A net in mode "locked" is backpropagation through processes, where one layer works and the others wait: what the
    decoupled one is to be measured against.

    Args:
        net: built alike in every process, by the same seed. Trained is, in each, its own layer and the critic above
            that; afterwards rank 0 has everything, and its `net.state_dict()` is complete. On the device of
            `processes`.
        processes: as many as the net has layers.
        batches: of (input [B, ...], context [B, Z] or None, targets [B, ...]), on the device; only those of rank 0
            are looked at. A context is passed to the critics that have a `context_size`.
        losses_of: maps the last layer's output [B, ...] and the targets to losses [B], not reduced; only that of the
            last rank is called.
        max_staleness: how many newer batches a layer may take up before it uses the gradient of a batch; 0 or more.
        schedule: "free": gradients are used as soon as they arrive, and staleness is what it happens to be up to the
            bound; this is the fast one. "fixed": each is used exactly `max_staleness` batches late (at the end of the
            data earlier), so that results do not depend on the machine; for measurements of what staleness does.
        before_update: called with the batch's number before a layer takes it up, for example to set learning rates.

    Returns:
        In rank 0 the reports of all processes, from the lowest layer; None in the others.

    Raises:
        ValueError: if arguments are not as above, the losses are reduced, or there is a context that no critic takes.
        LostProcessError: if another process ends early.
    """
    if processes.world_size != len(net.layers):
        raise ValueError(
            f"net: found {len(net.layers)} layers and {processes.world_size} processes, allowed one process for each layer"
        )
    if max_staleness < 0 or (net.mode == "locked" and max_staleness):
        raise ValueError(
            f"max_staleness: found {max_staleness}, allowed {'0 in mode locked' if net.mode == 'locked' else '0 or more'}"
        )
    if schedule not in ("free", "fixed"):
        raise ValueError(f"schedule: found {schedule!r}, allowed 'free', 'fixed'")
    rank = processes.rank
    stage = Stage.of(net, rank)
    run = _Run(stage, processes, losses_of, max_staleness, schedule == "free", before_update)
    report = run(_checked(batches, net) if rank == 0 else None)
    interfaces = len(net.critics)
    mine = [module for module in (stage.layer, net.critics[rank] if rank < interfaces else None) if module is not None]
    optimizers = (stage.optimizer, stage.critic_optimizer)
    states = [module.state_dict() for module in mine], [None if o is None else o.state_dict() for o in optimizers]
    gathered = processes.gather((report, *on_host(states)))
    if gathered is None:
        return None
    for i, (_, states, optimizer_states) in enumerate(gathered[1:], start=1):
        other = Stage.of(net, i)
        modules = [other.layer] if i == interfaces else [other.layer, net.critics[i]]
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
        for optimizer, saved in zip((other.optimizer, other.critic_optimizer), optimizer_states, strict=True):
            if optimizer is not None:
                optimizer.load_state_dict(saved)
    return [report for report, _, _ in gathered]


def _checked(batches: Iterable[Batch], net: DecoupledSequential) -> Iterator[Batch]:
    critics = [critic for critic, there in zip(net.critics, net._has_critic, strict=True) if there]
    for batch in batches:
        if not len(batch[0]):
            raise ValueError("batches: found one of no examples; allowed at least one; leave out what is empty")
        if batch[1] is not None:
            _check_context_is_taken(critics)
        yield batch


def on_host(value: Any) -> Any:
    """The same nest of containers with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_host(v) for key, v in value.items()}
    return type(value)(on_host(v) for v in value) if isinstance(value, (list, tuple)) else value


class _Run:
    """One process's part of `train_pipeline`: what to do next, with what has arrived."""

    def __init__(
        self,
        stage: Stage,
        processes: Processes,
        losses_of: Callable[[Tensor, Tensor], Tensor],
        max_staleness: int,
        free: bool,
        before_update: Callable[[int], None] | None,
    ):
        self.stage, self.processes, self.losses_of = stage, processes, losses_of
        self.max_staleness, self.free, self.before_update = max_staleness, free, before_update
        self.lowest, self.highest = processes.rank == 0, processes.rank == processes.world_size - 1
        self.waiting: collections.deque[tuple[int, Batch]] = collections.deque()
        self.arrived: collections.deque[tuple[int, Tensor | None]] = collections.deque()
        self.ended = False
        self.batches = 0
        self.waiting_sec = self.blocked_sec = 0.0
        self.staleness: collections.Counter[int] = collections.Counter()
        self.cosines: list[Tensor] = []
        self.losses: list[Tensor] = []

    def __call__(self, data: Iterator[Batch] | None) -> StageReport:
        start, start_cpu = time.monotonic(), time.process_time()
        while True:
            self._take_in()
            if self.free or len(self.stage.sent) > self.max_staleness:
                self._use_gradients()
            if len(self.stage.sent) > self.max_staleness:
                self.blocked_sec += self._wait()
            elif self.waiting:
                self._take_up(*self.waiting.popleft())
            elif data is not None and not self.ended:
                self._read(data)
            elif not self.ended:
                self.waiting_sec += self._wait()
            else:
                break
        if not self.highest:
            self.processes.send(self.processes.rank + 1, END, self.batches)
        while self.stage.sent:
            self._use_gradients(all_of_them=True)
            if self.stage.sent:
                self.blocked_sec += self._wait()
        return StageReport(
            self.batches,
            time.monotonic() - start,
            self.waiting_sec,
            self.blocked_sec,
            time.process_time() - start_cpu,
            dict(sorted(self.staleness.items())),
            tuple(torch.stack(self.cosines).tolist()) if self.cosines else (),
            tuple(torch.stack(self.losses).tolist()) if self.losses else (),
        )

    def _read(self, data: Iterator[Batch]) -> None:
        start = time.monotonic()
        batch = next(data, None)
        self.waiting_sec += time.monotonic() - start
        if batch is None:
            self.ended = True
        else:
            self.waiting.append((self.batches, batch))

    def _wait(self) -> float:
        """Waits for the next message; returns for how long, in seconds."""
        start = time.monotonic()
        self._take_in(wait=True)
        return time.monotonic() - start

    def _take_in(self, *, wait: bool = False) -> None:
        while (message := self.processes.receive(wait=wait)) is not None:
            wait = False
            if message.kind == ACTIVATION:
                x, context, targets = message.tensors
                assert x is not None and targets is not None
                self.waiting.append((message.tag, (x, context, targets)))
            elif message.kind == GRADIENT:
                self.arrived.append((message.tag, message.tensors[0]))
            else:
                self.ended = True

    def _use_gradients(self, *, all_of_them: bool = False) -> None:
        """Those that have arrived; in the fixed schedule only as many as the bound asks for."""
        while self.arrived and (self.free or all_of_them or len(self.stage.sent) > self.max_staleness):
            tag, gradient = self.arrived.popleft()
            self.staleness[self.batches - 1 - self.stage.sent[tag].position] += 1
            below, fit = self.stage.arrive(tag, gradient)
            if fit is not None:
                self.cosines.append(fit.cosine.detach())
            if self.stage.locked and not self.lowest:
                self.processes.send(self.processes.rank - 1, GRADIENT, tag, below)

    def _take_up(self, tag: int, batch: Batch) -> None:
        """Steps 1 to 4 of the module's docstring."""
        stage, processes = self.stage, self.processes
        x, context, targets = batch
        if self.before_update is not None:
            self.before_update(tag)
        leaf = None if self.lowest else x.requires_grad_()
        h = stage.layer(x)
        self.batches += 1
        if self.highest:
            losses = self.losses_of(h, targets)
            if losses.shape != (len(x),):
                raise ValueError(
                    f"losses_of: expected one loss per example ({len(x)},), got {tuple(losses.shape)}; do not reduce"
                )
            self.losses.append(losses.detach().mean())
            gradient = stage.learn_highest(losses, leaf)
        else:
            processes.send(processes.rank + 1, ACTIVATION, tag, h, context, targets)
            own_context = context if stage.critic is not None and _takes_context(stage.critic) else None
            stage.sent[tag] = _Sent(h, leaf, own_context, self.batches - 1)
            if stage.locked:
                return
            gradient = stage.learn(tag)
        if not self.lowest:
            processes.send(processes.rank - 1, GRADIENT, tag, gradient)
