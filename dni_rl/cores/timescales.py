"""A core of several recurrent levels, each slower than the one below: memory, and credit, by the tick instead of the
step.

Use it where what must be remembered is much older than a truncation window: a window of K ticks of a level that ticks
every P steps covers K * P steps of the environment.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dni_rl.cores.base import Core, State, StateHistory, UnrolledState, are_counts, chrono_bias_, unroll_stepwise
from dni_rl.critics import CriticFit, GradientCritic, check_unbounded
from dni_rl.precision import out_of_autocast, out_of_half
from dni_rl.targets import before_each_step, check_weight, per_sequence, scaled_weight


class Bootstrap(Protocol):
    """What is needed of a critic: the synthetic gradient that it would apply at a cut."""

    def synthetic_gradient(self, state: State, context: Tensor | None = None, alive: Tensor | None = None) -> State:
        """Tuple of [B, size], see `GradientCritic.synthetic_gradient`."""


class LevelledState(UnrolledState):
    """The state after a window of `MultiTimescaleCore.unroll_in_ticks`.

    Attributes:
        interfaces: what passed upwards at each interface with a critic, from the lowest: messages [T, B, size] as
            `states`, True in `valid` where a level took the message in, and after a backward pass the gradients that
            arrived there.
        cuts: (step, tensors of the state, synthetic gradients or None) of every cut of a level inside the window, which
            replaced the gradient of these tensors of the state before that step.
        leaves: the tensors behind those cuts, each a leaf from which the graph goes on.
    """

    interfaces: tuple[StateHistory, ...] = ()
    cuts: tuple[tuple[int, slice, State | None], ...] = ()
    leaves: State = ()


class MultiTimescaleCore(Core):
    """Levels of LSTM cells; level i ticks every `periods[i]` steps of each environment's own clock.

    At the step whose clock reads k (0 where an episode starts, each row of the batch on its own), for i = 0, 1, ...
    upwards:

        k mod periods[i] = 0:   h_i, c_i <- LSTM_i([m_i, h_{i+1}], h_i, c_i)        tick
        otherwise:              h_i, c_i unchanged                                   held

    Message up: m_0 = x; m_i is the output h_{i-1} of this step ("last"), or the mean of the outputs since the last
    tick ("mean"). Context down: h_{i+1} as it stood before this step; the highest level has none. Output: h_0. Every
    level ticks at the first step of an episode, so that what starts it is told upwards at once. The levels of
    Schmidhuber, "Learning complex, extended sequences using the principle of history compression" (1992) and Koutnik
    et al., "A Clockwork RNN" (2014), with the two-way coupling of Jaderberg et al., "Human-level performance in 3D
    multiplayer games" (2019), here in LSTM cells.

    State, each [B, size]: h_i, c_i of every level from the lowest, and after those of a level i > 0 with "mean" its
    inbox, the running mean of h_{i-1}; last a clock of one float, a count of steps in the episode that goes 0, 1,
    ..., P, 1, ..., P with P = periods[-1], exact in any precision up to P = 256. It is part of the state so that it
    resets with the episode and travels with it; no gradient passes through it.

    Args:
        input_size: D.
        hidden_sizes: width of each level, the lowest first; at least one.
        periods: ticks of each level in steps, the lowest first: 1, then rising multiples of the period below.
        message: "last" or "mean", what a level sees of the one below.
        chrono_max: if given, the longest dependency expected, in steps, or one for each level: chrono initialisation
            (Tallec & Ollivier 2018, sec. 2.2) of each level for up to chrono_max / periods[i] ticks of its own, where
            those are more than 2. It nearly closes the input gates of a level with a long memory; where the memory is
            the upper levels' task, a lower one passes messages on better with one of its own.

    Raises:
        ValueError: if sizes, periods, message or chrono_max are not as above.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int],
        periods: Sequence[int],
        *,
        message: Literal["last", "mean"] = "last",
        chrono_max: float | Sequence[float] | None = None,
    ):
        super().__init__()
        if not isinstance(hidden_sizes, Sequence) or not hidden_sizes or not are_counts(input_size, *hidden_sizes):
            raise ValueError(f"input_size, hidden_sizes: expected positive integers, got {input_size}, {hidden_sizes}")
        is_ladder = (
            isinstance(periods, Sequence)
            and len(periods) == len(hidden_sizes)
            and are_counts(*periods)
            and periods[0] == 1
            and all(above > below and above % below == 0 for below, above in pairwise(periods))
        )
        if not is_ladder:
            raise ValueError(
                f"periods: expected one for each of {len(hidden_sizes)} levels: 1, then rising multiples of the one "
                f"below, such as (1, 8); got {periods}"
            )
        if message not in ("last", "mean"):
            raise ValueError(f"message: found {message!r}, allowed 'last' or 'mean'")
        self.input_size, self.output_size, self.hidden_sizes = input_size, hidden_sizes[0], tuple(hidden_sizes)
        self.periods, self.message = tuple(periods), message
        below, above = (input_size, *hidden_sizes[:-1]), (*hidden_sizes[1:], 0)
        self.levels = nn.ModuleList(nn.LSTMCell(b + a, h) for b, h, a in zip(below, hidden_sizes, above, strict=True))
        if chrono_max is not None:
            memories = chrono_max if isinstance(chrono_max, Sequence) else [chrono_max] * len(self.periods)
            if len(memories) != len(self.periods) or not 2 < max(memories) < math.inf:
                raise ValueError(
                    f"chrono_max: found {chrono_max}, allowed a finite number above 2; the longest memory in steps, or one for each level"
                )
            for cell, memory, period in zip(self.levels, memories, self.periods, strict=True):
                if memory / period > 2:  # shorter dependencies need no bias
                    chrono_bias_(cell.get_parameter("bias_ih"), 4, memory / period)
                    nn.init.zeros_(cell.get_parameter("bias_hh"))
        sizes: list[int] = []
        self._level_slices: list[slice] = []
        for i, size in enumerate(hidden_sizes):
            inbox = [below[i]] if message == "mean" and i else []
            self._level_slices.append(slice(len(sizes), len(sizes) + 2 + len(inbox)))
            sizes += [size, size, *inbox]
        self.state_sizes = (*sizes, 1)

    def level_state(self, state: State, level: int) -> State:
        """The part of `state` that belongs to one level: h, c, and with "mean" messages its inbox."""
        return tuple(state[self._level_slices[level]])

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step; see `Core.forward`."""
        self.check_step(x)
        return self._step(x, state, lambda level, message, heard: message)

    def _step(
        self, x: Tensor, state: State, interface: Callable[[int, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, State]:
        """One step. `interface(level, message, heard)` stands where h of the level below becomes a message to `level`."""
        clock = state[-1].detach().round()  # [B, 1]; a count, rounded so that its derivative is zero indeed
        next_state: list[Tensor] = []
        message = x
        for i, (cell, period) in enumerate(zip(self.levels, self.periods, strict=True)):
            h, c, *inbox = self.level_state(state, i)
            ticks = torch.remainder(clock, period) == 0  # [B, 1]
            if i:
                message = interface(i, message, torch.ones_like(ticks) if inbox else ticks)
            if inbox:
                total = inbox[0] + message / period
                message = torch.where(clock == 0, message, total)  # nothing came before the first step
                inbox = [total.masked_fill(ticks, 0.0)]
            if i + 1 < len(self.levels):
                message = torch.cat([message, self.level_state(state, i + 1)[0]], dim=-1)
            new_h, new_c = (
                new.to(old.dtype) for new, old in zip(cell(message, (h, c)), (h, c), strict=True)
            )  # autocast
            if period > 1:
                new_h, new_c = torch.where(ticks, new_h, h), torch.where(ticks, new_c, c)
            next_state += [new_h, new_c, *inbox]
            message = new_h
        wrapped = torch.where(clock == self.periods[-1], 1.0, clock + 1.0).to(clock.dtype)
        return next_state[0], (*next_state, wrapped)

    def unroll_in_ticks(
        self,
        inputs: Tensor,
        state: State,
        first: Tensor | None = None,
        *,
        ticks: int,
        critic: Bootstrap | None = None,
        context: Tensor | None = None,
        alive: Tensor | None = None,
        interface_critics: Sequence[Bootstrap] | None = None,
    ) -> tuple[Tensor, LevelledState, Tensor]:
        """Unrolls a long window in which each level is cut after every `ticks` ticks of its own.

        With K = ticks, level i is cut before steps K * periods[i], 2 K * periods[i], ... of the window: the gradient
        of its own recurrence stops there, whereas slower levels carry theirs across. A loss thus reaches the past
        through the levels as through a ladder: K steps along the lowest, up by a message, K * periods[1] steps along
        the next, down again by the message of an older tick. Unroll K * periods[-1] steps at a time, and `dni_rl.cut`
        between these windows cuts all levels at their own K ticks.

        With a critic M over the whole state, the cut part s_i of the state s_m is bootstrapped with its part of M(s_m):

            surrogate:  sum_t l_t + sum over cuts of <s_i, b_i>,    b = alive * g * stop_gradient(M(s_m, z_m))

        M estimates the gradient of all later losses with respect to s_m, total in each component, and the other
        components of s_m keep their graph; an oracle hence makes up for exactly what the cut removed, and the sum is
        full BPTT. It is the same critic that `dni_rl.backward` uses at the end of the window and trains, at every
        step, through the history.

        The bootstraps come as a third result, zero in value, to be added to the losses, which gives them the weight
        of losses:

            outputs, next_state, bootstraps = core.unroll_in_ticks(inputs, state, first, ticks=8, critic=critic)
            losses = my_losses(outputs, batch) + bootstraps
            report = dni_rl.backward(losses, start=state, end=next_state, critic=critic)

        A bound on the synthetic gradient (`max_norm_ratio`) takes its yardstick from the losses that `backward` is
        given, here with the bootstraps of inner cuts among them: keep the ratio below 1, or it may chase its own
        predictions.

        With interface critics I_1, I_2, ... every message upwards is cut as well: the level below a message m receives
        stop_gradient(I_i(m)) at once, where level i hears it, instead of waiting for what level i will send back when
        its window is done, and I_i learns from that later by `fit_interfaces`. Context downwards is never cut. After
        the multi-network system of Jaderberg et al. (2017), two networks that tick at different speeds.

        Args:
            inputs: [T, B, D].
            state: the state before step 0, from `dni_rl.cut`.
            first: [T, B] bool or None, as in `unroll`.
            ticks: K, at least 1.
            critic: predicts the gradient for every tensor of the state, or None for plain truncation.
            context: [T + 1, B, Z] as in `dni_rl.backward`; None without context.
            alive: [T, B], 0 where no loss follows the state before a step, for example at the last observation of an episode; None
                where that is so at the starts of episodes alone, which need not be marked. Or [T + 1, B] as in `dni_rl.backward`.
            interface_critics: one for each level but the lowest, of state_sizes (width of the level below,), without
                context; None to leave messages in the graph.

        Returns:
            [T, B, H] outputs, the next state, and [T, B] bootstraps.

        Raises:
            ValueError: if shapes disagree, ticks is below 1, or interface critics are not one for each interface.
        """
        self.check_unroll(inputs, state, first)
        if ticks < 1:
            raise ValueError(f"ticks: found {ticks}, allowed 1 or more")
        T, B = inputs.shape[:2]
        if context is not None and context.shape[:2] != (T + 1, B):
            raise ValueError(f"context: expected [T + 1, B, Z] = ({T + 1}, {B}, Z), got {tuple(context.shape)}")
        alive = before_each_step(alive, T, B)
        if interface_critics is not None and len(interface_critics) != len(self.levels) - 1:
            raise ValueError(
                f"interface_critics: expected one for each of {len(self.levels) - 1} interfaces, got {len(interface_critics)}"
            )
        for critic_of_level in interface_critics or ():
            check_unbounded(critic_of_level, "interface_critics")
        has_future = alive if first is None else ~first if alive is None else alive & ~first
        bootstraps = [out_of_half(inputs.new_zeros(B)) for _ in range(T)]
        messages: list[list[Tensor]] = [[] for _ in self.levels[1:]]
        heard: list[list[Tensor]] = [[] for _ in self.levels[1:]]
        cuts: list[tuple[int, slice, State | None]] = []
        leaves: list[Tensor] = []
        taken = 0

        def bootstrap(step: int, state: State, synthetic: State) -> None:
            value = torch.stack(
                # without a cast: a prediction may be too small for the precision of an activation
                [(s * b.detach()).sum(-1) for s, b in zip(state, synthetic, strict=True)]
            ).sum(0)
            bootstraps[step] = bootstraps[step] + (value - value.detach())

        def interface(level: int, message: Tensor, hears: Tensor) -> Tensor:
            if interface_critics is None:
                return message
            received = message.detach().requires_grad_(message.requires_grad)
            hears = hears.squeeze(-1)
            bootstrap(
                taken, (message,), interface_critics[level - 1].synthetic_gradient((received.detach(),), None, hears)
            )
            messages[level - 1].append(received)
            heard[level - 1].append(hears)
            return received

        def step(x: Tensor, state: State) -> tuple[Tensor, State]:
            nonlocal taken
            output, next_state = self._step(x, state, interface)
            taken += 1
            parts = [part for part, p in zip(self._level_slices, self.periods, strict=True) if taken % (ticks * p) == 0]
            if taken == T or not parts:
                return output, next_state
            cut = list(next_state)
            for part in parts:
                cut[part] = [s.detach().requires_grad_(s.requires_grad) for s in next_state[part]]
                leaves.extend(s for s in cut[part] if s.requires_grad)
            if critic is None:
                cuts.extend((taken, part, None) for part in parts)
            else:
                z = None if context is None else context[taken]
                b = critic.synthetic_gradient(
                    tuple(s.detach() for s in next_state), z, None if has_future is None else has_future[taken]
                )
                for part in parts:
                    bootstrap(taken - 1, next_state[part], b[part])
                    cuts.append((taken, part, b[part]))
            return output, tuple(cut)

        outputs, next_state = unroll_stepwise(step, inputs, state, first)  # type: ignore[arg-type]
        assert isinstance(next_state, UnrolledState)
        end = LevelledState(next_state)
        end.history, end.cuts, end.leaves = next_state.history, tuple(cuts), tuple(leaves)
        if interface_critics is not None:
            end.interfaces = tuple(_history(m, h) for m, h in zip(messages, heard, strict=True))
        return outputs, end, torch.stack(bootstraps)

    def extra_repr(self) -> str:
        """Settings that the submodules do not show."""
        return f"periods={self.periods}, message={self.message!r}"


def fit_interfaces(
    end: LevelledState,
    critics: Sequence[GradientCritic],
    *,
    weight: float | Tensor | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[CriticFit]:
    """Trains the interface critics on the gradients that a backward pass has brought to the messages of a window.

        L_i = mean ((I_i(m) - stop_gradient(dS / dm)) / rms)^2      over the messages that level i heard

    Call after `dni_rl.backward`. Adds dL_i / dparameters to the critics' `.grad`, nothing to the model's.

    Args:
        end: from `unroll_in_ticks` with these critics.
        critics: the interface critics, from the lowest.
        weight: the weight that `dni_rl.backward` was given; 1 / (T B) by default, as there.
        scaler: the scaler that it was given, not updated since. The critics' `.grad` are then multiplied by its scale, and their
            optimiser is stepped through it; targets are not, whatever the scale is.

    Returns:
        Each critic's fit.

    Raises:
        RuntimeError: if no gradient is there: before `dni_rl.backward`, or in a second call.
        ValueError: if the window was not unrolled with as many interface critics, or the weight is not one positive number.
    """
    check_weight(weight)
    interfaces = getattr(end, "interfaces", ())  # which the state that plain `unroll` returns does not have
    if len(interfaces) != len(critics):
        raise ValueError(f"critics: expected those of the window's {len(interfaces)} interfaces, got {len(critics)}")
    if any(not history.arrived and history.valid.any() for history in interfaces):
        raise RuntimeError(
            "fit_interfaces: found no gradient at the messages of this window, allowed one call for each window, after "
            "`dni_rl.backward`; without it critics would be taught 0"
        )
    fits = []
    for history, critic in zip(interfaces, critics, strict=True):
        arrived = history.gradients[0].flatten(0, 1)
        divisor = scaled_weight(1.0 / history.valid.numel() if weight is None else weight, arrived, scaler)
        fit = critic.fit(
            (history.states[0].flatten(0, 1),), per_sequence((arrived,), divisor), None, history.valid.flatten()
        )
        if fit.loss.requires_grad:  # not if the critic is frozen
            with out_of_autocast(arrived.device):
                (fit.loss if scaler is None else scaler.scale(fit.loss)).backward()
        history.clear()
        fits.append(fit)
    return fits


def _history(messages: list[Tensor], heard: list[Tensor]) -> StateHistory:
    """Records the gradients that arrive at the messages of one interface."""
    history = StateHistory((torch.stack([m.detach() for m in messages]),), torch.stack(heard))
    for t, message in enumerate(messages):
        if message.requires_grad:
            message.register_hook(lambda gradient, t=t: history.record_step(0, t, gradient))
    if not any(message.requires_grad for message in messages):  # of a frozen level
        history.record(0, torch.zeros_like(history.states[0]))
    return history
