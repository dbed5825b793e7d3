"""The levels of a multi-timescale core in processes of their own, without backward locking.

Each process owns one level of a `MultiTimescaleCore`. At steps at which some row ticks the level above,

    a message goes up       h_i, with the rows' clocks
    a context comes down    h_{i+1} after that tick, some time later

and neither carries a graph. A level answers itself, at once, with the synthetic gradients of what it has sent up (by
its message critic) and down (by its context critic), closes its window after K ticks of its own, learns, and sends
back the gradients that have arrived at the messages and contexts it was given; the critics on the other side learn
from those when they come. So nobody waits for the gradient of a tick. What a level may wait for is the context of its
last messages, if more than `max_staleness` of them are still unanswered.

The multi-network system of Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients" (2017), sec. 3.3
(two recurrent nets that tick at different speeds), in processes and with both directions decoupled.
"""

import collections
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dni_rl.backward import cut
from dni_rl.cores.base import State
from dni_rl.cores.timescales import MultiTimescaleCore
from dni_rl.critics import GradientCritic, check_unbounded, take_step
from dni_rl.distributed.pipeline import on_host
from dni_rl.distributed.processes import Message, Processes
from dni_rl.precision import out_of_autocast
from dni_rl.targets import per_sequence

MESSAGE, CONTEXT, MESSAGE_GRADIENTS, CONTEXT_GRADIENT, END = range(5)

Step = tuple[Tensor, Tensor | None, Tensor | None]
"""Input [B, D], `first` [B] bool or None, and targets [B, ...] of the losses or None."""


@dataclass(frozen=True, slots=True)
class LevelReport:
    """What one process did.

    Attributes:
        ticks: at how many steps some row of its level ticked.
        windows: from how many it learned.
        seconds: from the first step to the last message, idle time included.
        waiting_sec: of these, spent waiting for the level below.
        blocked_sec: of these, spent waiting for contexts from above.
        staleness: number of ticks by how many messages sent up were not yet answered in the context that was used.
        message_cosines: of the synthetic gradients of messages with those that came back, by the level above's windows.
        context_cosines: the same of contexts.
        losses: mean loss of each step; only in the report of the lowest level.
    """

    ticks: int
    windows: int
    seconds: float
    waiting_sec: float
    blocked_sec: float
    staleness: dict[int, int]
    message_cosines: tuple[float, ...]
    context_cosines: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def max_staleness(self) -> int:
        """0 where there was none."""
        return max(self.staleness, default=0)


class Level:
    """One level of a core, with what it needs to learn by itself. It keeps its state from one `train_levels` to the next.

        S_i = sum of own losses + <h, I(h)> at messages + <h, J(h)> at contexts + <s_end, M(s_end)>

    is what it backpropagates after every K ticks, with I, J, M its critics, all without gradient; a critic that is
    None counts as zero. Critic targets: I of what arrives at the message in the level above, J of what arrives at the
    context in the level below, M of what arrives at the states inside its own windows. Whether an episode ends at the
    next tick is not known yet where M is applied, so that M is trained, with targets zero, on states that were
    cleared as well: it expects the end with its probability.

    Args:
        core: built alike in every process; messages "last".
        index: which level, 0 the lowest.
        optimizer: over `core.levels[index]`, in the lowest also over what its losses need. None leaves gradients to
            add up.
        ticks: K, ticks of a window.
        critic: M, of state_sizes (H, H); None for plain truncation.
        message_critic: I, of state_sizes (H,); None also where there is no level above.
        context_critic: J, of state_sizes (H,); None also where there is no level below.
        critic_optimizer: over all its critics. It must skip parameters without gradient, as PyTorch's do.
        weight: multiplies one sequence's loss; by default 1 / (K B).

    Raises:
        ValueError: if the core sends means, the index or ticks are out of range, or there is a critic for a neighbour
            that is not there.
    """

    def __init__(
        self,
        core: MultiTimescaleCore,
        index: int,
        optimizer: torch.optim.Optimizer | None,
        *,
        ticks: int,
        critic: GradientCritic | None = None,
        message_critic: GradientCritic | None = None,
        context_critic: GradientCritic | None = None,
        critic_optimizer: torch.optim.Optimizer | None = None,
        weight: float | None = None,
    ):
        if core.message != "last":
            raise ValueError(
                f"core: found message={core.message!r}, allowed 'last'; a mean would have to wait for every step"
            )
        if not 0 <= index < len(core.levels):
            raise ValueError(f"index: found {index}, allowed 0 to {len(core.levels) - 1}")
        if ticks < 1:
            raise ValueError(f"ticks: found {ticks}, allowed 1 or more")
        if (message_critic is not None and index == len(core.levels) - 1) or (
            context_critic is not None and index == 0
        ):
            raise ValueError(
                "critics: the highest level sends no messages up, and the lowest no context down; leave theirs None"
            )
        for critic_of_level in (critic, message_critic, context_critic):
            check_unbounded(critic_of_level)
        self.core, self.index, self.optimizer, self.ticks = core, index, optimizer, ticks
        self.critic, self.message_critic, self.context_critic = critic, message_critic, context_critic
        self.critic_optimizer, self.weight = critic_optimizer, weight
        self.cell, self.period = core.levels[index], core.periods[index]
        self.period_above = core.periods[index + 1] if index + 1 < len(core.periods) else None
        self.state: State | None = None  # h, c
        self.clock: Tensor | None = None  # [B] steps in the episode; the lowest level's
        self.started: Tensor | None = None  # [B] the tag at which each row's episode started
        self.contexts: dict[int, Tensor] = {}  # leaves by tag, the last one in use
        self.messages: dict[int, tuple[Tensor, Tensor]] = {}  # sent up, until their gradients come: h, who heard
        self.sent_down: dict[int, Tensor] = {}  # contexts, until their gradients come
        self.num_sent = self.num_answered = 0
        self.next_tag = 0
        self._start_window()

    def _start_window(self) -> None:
        self.visited: list[State] = []
        self.heard: dict[int, Tensor] = {}  # messages from below by tag
        self.outputs: list[Tensor] = []  # with `gradients`, what is backpropagated
        self.gradients: list[Tensor] = []

    def tick(self, tag: int, x: Tensor, clock: Tensor) -> Tensor:
        """Takes a step where `clock` [B] says so, on an input or message [B, D]; returns h [B, H], with its graph."""
        B = len(x)
        if self.state is None:
            like = next(self.cell.parameters())
            self.state = cut(tuple(like.new_zeros(B, self.core.hidden_sizes[self.index]) for _ in range(2)))
            self.started = torch.full((B,), tag, dtype=torch.int64, device=x.device)
        assert self.started is not None
        # Tensors of their own: their gradient is that of later losses, without what h receives as an output of this step.
        visited = tuple(s.view_as(s) for s in self.state)
        for s in visited:
            s.retain_grad()
        self.visited.append(visited)
        first = clock == 0
        self.started = torch.where(first, tag, self.started)
        h, c = (s.masked_fill(first.unsqueeze(-1), 0.0) for s in visited)
        if self.period_above is not None:
            x = torch.cat([x, self._context(B, h)], dim=-1)
        new_h, new_c = self.cell(x, (h, c))
        if self.period > 1:
            ticks = (clock % self.period == 0).unsqueeze(-1)
            new_h, new_c = torch.where(ticks, new_h, h), torch.where(ticks, new_c, c)
        self.state = (new_h, new_c)
        return new_h

    def _context(self, B: int, like: Tensor) -> Tensor:
        """The newest one at hand; zero in rows whose episode started after it."""
        if not self.contexts:
            return like.new_zeros(B, self.core.hidden_sizes[self.index + 1])
        assert self.started is not None
        tag, leaf = next(reversed(self.contexts.items()))
        return leaf.masked_fill((self.started > tag).unsqueeze(-1), 0.0)

    def message(self, tag: int, h: Tensor, clock: Tensor) -> bool:
        """Whether h has to go up; if so it is answered here with its synthetic gradient."""
        if self.period_above is None:
            return False
        hears = clock % self.period_above == 0
        if not hears.any():  # waits for the device; whether to send cannot be decided there
            return False
        self.num_sent += 1
        if self.message_critic is not None:
            self.messages[tag] = (h.detach(), hears)
            self._answer(h, self.message_critic.synthetic_gradient((h.detach(),), None, hears))
        return True

    def context(self, tag: int, h: Tensor) -> None:
        """h goes down, and is answered here with its synthetic gradient."""
        if self.context_critic is not None:
            self.sent_down[tag] = h.detach()
            self._answer(h, self.context_critic.synthetic_gradient((h.detach(),)))

    def _answer(self, h: Tensor, gradient: State) -> None:
        self.outputs.append(h)
        self.gradients.append(gradient[0])

    def close_window(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Learns, and starts the next window.

        Returns:
            By tag, the gradients [B, D] of the messages heard in this window, and [B, H above] of the contexts that
            are out of use, in units of one sequence's loss.
        """
        assert self.state is not None
        weight = self.weight if self.weight is not None else 1.0 / (self.ticks * len(self.state[0]))
        outputs, gradients = list(self.outputs), list(self.gradients)
        if self.critic is not None:
            outputs += self.state
            gradients += self.critic.synthetic_gradient(tuple(s.detach() for s in self.state))
        pairs = [(o, (g * weight).to(o.dtype)) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        if pairs:
            with out_of_autocast(pairs[0][0].device):
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        if self.optimizer is not None:
            self.optimizer.step()
        if self.critic is not None:
            steps = list(zip(*self.visited, strict=True))
            states = tuple(torch.cat([s.detach() for s in component]) for component in steps)
            targets = tuple(torch.cat([_gradient(s, weight) for s in component]) for component in steps)
            self.fit(self.critic, states, targets)
        to_below = {tag: _gradient(m, weight) for tag, m in self.heard.items()}
        to_above = {}
        for tag in list(self.contexts)[:-1]:
            to_above[tag] = _gradient(self.contexts.pop(tag), weight)
        self.state = cut(self.state)
        self._start_window()
        return to_below, to_above

    def fit(self, critic: GradientCritic, state: State, target: State, valid: Tensor | None = None) -> Tensor:
        """One step of a critic; returns the cosine of its predictions with the targets."""
        fit = critic.fit(state, target, None, valid)
        take_step(self.critic_optimizer, fit.loss)
        return fit.cosine.detach()


def _gradient(leaf: Tensor, weight: float) -> Tensor:
    """What arrived at it, in units of one sequence's loss."""
    return torch.zeros_like(leaf) if leaf.grad is None else per_sequence((leaf.grad,), weight)[0]


def train_levels(
    level: Level,
    processes: Processes,
    steps: Iterable[Step],
    losses_of: Callable[[Tensor, Tensor | None], Tensor],
    *,
    max_staleness: int = 0,
    schedule: Literal["free", "fixed"] = "free",
) -> list[LevelReport] | None:
    """Trains a multi-timescale core with each level in its own process; level i is that of rank i. Called by every process.

    With `max_staleness=0` levels compute what the core computes in one process, number for number; only learning is
    decoupled. Above, contexts may be older than in the core, by as many messages as the bound allows; a context from
    before the start of a row's episode counts as zero there.

    A level's window ends after K steps at which any of its rows ticked: where episodes start at different times in
    different rows, windows of upper levels cover fewer steps than K periods.

    Args:
        level: of this process.
        processes: as many as the core has levels.
        steps: of the lowest level; only those of rank 0 are looked at. On the device.
        losses_of: maps the core's output [B, H] and the targets to losses [B], not reduced; only that of rank 0 is
            called. Its parameters, if any, belong into the optimiser of the lowest level.
        max_staleness: how many messages sent up may be unanswered when a level ticks again; 0 or more.
        schedule: "free": the newest context that has arrived is used, and gradients train critics as soon as they
            arrive. "fixed": the context that is exactly `max_staleness` messages old, and gradients in the order in
            which they were sent among contexts and messages, so that results do not depend on the machine.

    Returns:
        In rank 0, whose core then has all trained levels, the reports of all processes from the lowest level; None in
        the others.

    Raises:
        ValueError: if arguments are not as above.
        LostProcessError: if another process ends early.
    """
    if processes.world_size != len(level.core.levels) or processes.rank != level.index:
        raise ValueError(
            f"level: found level {level.index} of {len(level.core.levels)} in process {processes.rank} of {processes.world_size}, "
            "allowed one process for each level, of the same number"
        )
    if max_staleness < 0:
        raise ValueError(f"max_staleness: found {max_staleness}, allowed 0 or more")
    if schedule not in ("free", "fixed"):
        raise ValueError(f"schedule: found {schedule!r}, allowed 'free', 'fixed'")
    report = _Run(level, processes, losses_of, max_staleness, schedule == "free")(steps)
    gathered = processes.gather((report, on_host(level.cell.state_dict())))
    if gathered is None:
        return None
    for cell, (_, state) in zip(level.core.levels, gathered, strict=True):
        cell.load_state_dict(state)
    return [report for report, _ in gathered]


class _Run:
    """One process's part of `train_levels`."""

    def __init__(
        self,
        level: Level,
        processes: Processes,
        losses_of: Callable[[Tensor, Tensor | None], Tensor],
        max_staleness: int,
        free: bool,
    ):
        self.level, self.processes, self.losses_of = level, processes, losses_of
        self.max_staleness, self.free = max_staleness, free
        self.lowest, self.highest = processes.rank == 0, processes.rank == processes.world_size - 1
        self.inputs: collections.deque[tuple[int, Tensor, Tensor]] = collections.deque()
        # Fixed schedule: messages whose turn has not come. Each neighbour's are taken in the order in which it sent them.
        self.kept: dict[int, collections.deque[Message]] = collections.defaultdict(collections.deque)
        self.ended_below = self.ended_above = False
        self.ticks = self.windows = 0
        self.waiting_sec = self.blocked_sec = 0.0
        self.staleness: collections.Counter[int] = collections.Counter()
        self.message_cosines: list[Tensor] = []
        self.context_cosines: list[Tensor] = []
        self.losses: list[Tensor] = []

    def __call__(self, steps: Iterable[Step]) -> LevelReport:
        start = time.monotonic()
        if self.lowest:
            for x, first, targets in steps:
                self._step(x, first, targets)
        else:
            while self._next_input():
                self._hear(*self.inputs.popleft())
        if self.level.visited:
            self._close_window()
        rank = self.processes.rank
        if not self.highest:
            self.processes.send(rank + 1, END, 0)
            while not self.ended_above:
                self.blocked_sec += self._wait_for(rank + 1)
        if not self.lowest:
            self.processes.send(rank - 1, END, 0)
        return LevelReport(
            self.ticks,
            self.windows,
            time.monotonic() - start,
            self.waiting_sec,
            self.blocked_sec,
            dict(sorted(self.staleness.items())),
            tuple(torch.stack(self.message_cosines).tolist()) if self.message_cosines else (),
            tuple(torch.stack(self.context_cosines).tolist()) if self.context_cosines else (),
            tuple(torch.stack(self.losses).tolist()) if self.losses else (),
        )

    def _step(self, x: Tensor, first: Tensor | None, targets: Tensor | None) -> None:
        """A step of the lowest level."""
        level = self.level
        if level.clock is None:
            level.clock = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if first is not None:
            level.clock = level.clock.masked_fill(first, 0)
        tag, clock = level.next_tag, level.clock
        h = self._tick(tag, x, clock)
        losses = self.losses_of(h, targets)
        if losses.shape != (len(x),):
            raise ValueError(
                f"losses_of: expected one loss per row ({len(x)},), got {tuple(losses.shape)}; do not reduce"
            )
        level.outputs.append(losses)
        level.gradients.append(torch.ones_like(losses))
        self.losses.append(losses.detach().mean())
        level.next_tag, level.clock = tag + 1, clock + 1
        self._end_tick()

    def _hear(self, tag: int, message: Tensor, clock: Tensor) -> None:
        """A tick of an upper level; the answer goes down before anything is learned."""
        level = self.level
        message.requires_grad_()
        level.heard[tag] = message
        h = self._tick(tag, message, clock)
        self.processes.send(self.processes.rank - 1, CONTEXT, tag, h)
        level.context(tag, h)
        self._end_tick()

    def _tick(self, tag: int, x: Tensor, clock: Tensor) -> Tensor:
        level = self.level
        if not self.highest:
            self._take_in()
            while level.num_sent - level.num_answered > self.max_staleness:
                self.blocked_sec += self._wait_for(self.processes.rank + 1)
            self.staleness[level.num_sent - level.num_answered] += 1
        h = level.tick(tag, x, clock)
        if level.message(tag, h, clock):
            self.processes.send(self.processes.rank + 1, MESSAGE, tag, h, clock)
        self.ticks += 1
        return h

    def _end_tick(self) -> None:
        if len(self.level.visited) == self.level.ticks:
            self._close_window()

    def _close_window(self) -> None:
        to_below, to_above = self.level.close_window()
        self.windows += 1
        if to_below:
            tags = torch.tensor(list(to_below), device=self.processes.device)
            self.processes.send(
                self.processes.rank - 1, MESSAGE_GRADIENTS, 0, tags, torch.stack(list(to_below.values()))
            )
        for tag, gradient in to_above.items():
            self.processes.send(self.processes.rank + 1, CONTEXT_GRADIENT, tag, gradient)

    def _next_input(self) -> bool:
        """Waits for a message from below; False if none will come."""
        self._take_in()
        while not self.inputs and not self.ended_below:
            self.waiting_sec += self._wait_for(self.processes.rank - 1)
        return bool(self.inputs)

    def _take_in(self) -> None:
        """Free schedule: uses all that has arrived."""
        while self.free and (message := self.processes.receive(wait=False)) is not None:
            self._use(message)

    def _wait_for(self, sender: int) -> float:
        """Waits for a message and uses it, in the fixed schedule one of this sender; returns for how long, in seconds."""
        start = time.monotonic()
        if not self.free and self.kept[sender]:
            message = self.kept[sender].popleft()
        else:
            while (message := self._received()).sender != sender and not self.free:
                self.kept[message.sender].append(message)
        seconds = time.monotonic() - start
        self._use(message)
        return seconds

    def _received(self) -> Message:
        message = self.processes.receive()
        assert message is not None
        return message

    def _use(self, message: Message) -> None:
        level, tag, kind = self.level, message.tag, message.kind
        if kind == END:
            if message.sender < self.processes.rank:
                self.ended_below = True
            else:
                self.ended_above = True
            return
        tensors = [t for t in message.tensors if t is not None]
        if kind == MESSAGE:
            self.inputs.append((tag, tensors[0], tensors[1]))
        elif kind == CONTEXT:
            level.contexts[tag] = tensors[0].requires_grad_()
            level.num_answered += 1
        elif kind == CONTEXT_GRADIENT and level.context_critic is not None:
            self.context_cosines.append(level.fit(level.context_critic, (level.sent_down.pop(tag),), (tensors[0],)))
        elif kind == MESSAGE_GRADIENTS and level.message_critic is not None:
            sent = [level.messages.pop(t) for t in tensors[0].tolist()]
            h, hears = (torch.cat(parts) for parts in zip(*sent, strict=True))
            self.message_cosines.append(level.fit(level.message_critic, (h,), (tensors[1].flatten(0, 1),), hears))
