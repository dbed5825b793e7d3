"""An error critic with a memory of its own, for when the core's state alone does not tell which gradient will come.

Early in training a core has not yet learned to keep what its later losses will be about. A critic that reads the core's states
one after the other, and remembers them, may still know: it conditions on the whole episode so far, as the recurrent critics of
Heess et al., "Memory-based control with recurrent neural networks" (2015) do for the value of an action.

critic = dni_rl.RecurrentGradientCritic(state_sizes=core.state_sizes, memory_size=32)
core = critic.watch(core)                                   # from here on nothing changes in a training loop
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from dni_rl.cores.base import Core, State, UnrolledState, are_counts
from dni_rl.critics import (
    CriticFit,
    CriticSettings,
    GradientRegression,
    Window,
    check_sizes,
    dense_net,
    outside_of_autocast,
)


class _Reader(nn.Module):
    """A recurrent cell over features, and a readout that is zero at the start."""

    def __init__(self, features: int, context_size: int, memory_size: int, hidden_sizes: Sequence[int]):
        super().__init__()
        self.cell = nn.GRUCell(features, memory_size)
        self.readout = dense_net(features + context_size + memory_size, hidden_sizes, features)

    def read(self, features: Tensor, memory: Tensor, first: Tensor | None = None) -> Tensor:
        """The memory after each step, [T, B, R], from features [T, B, S], the memory before step 0 and starts [T, B]."""
        memories = []
        memory = memory.to(self.cell.weight_hh.dtype)
        for t, x in enumerate(features.to(memory.dtype)):
            if first is not None:
                memory = memory.masked_fill(first[t].unsqueeze(-1), 0.0)
            memory = self.cell(x, memory)
            memories.append(memory)
        return torch.stack(memories)

    def forward(self, features: Tensor, context: Tensor | None, memory: Tensor) -> Tensor:
        """[..., S] from features [..., S], context [..., Z] or None, and the memory [..., R] that has read these features."""
        inputs = [features, memory.to(features.dtype)] if context is None else [features, context, memory]
        return self.readout(torch.cat([x.to(features.dtype) for x in inputs], dim=-1))


class RecurrentGradientCritic(GradientRegression):
    """Predicts dL/ds from all states of the episode so far, by a recurrent net that reads them.

        m_{t+1} = GRU(stop_gradient(s_t), m_t),     m = 0 where an episode starts
        M(s_t, m_t, z_t) = rms * net([s_t, z_t, m_{t+1}])

    Its memory m_t is a part of the state: `watch(core)` is a core whose state is (s_t, m_t), and whatever carries, stores, resets,
    shuffles or saves the state of a core does so with the memory. Hence M stays a function of one state, as that of every other
    critic, and one rollout cut into windows side by side needs no order. The gradient of the losses with respect to the memory is
    zero, and so is what is predicted for it; statistics and losses count the core's components alone.

    The regression trains the recurrent net through the window, back to the memory that was stored at its start (truncated BPTT, with
    the stored state of Kapturowski et al., "Recurrent experience replay in distributed reinforcement learning" (2019)). Without dense
    targets, or with a window written by hand, it sees one step. The readout starts at exactly zero, as in `GradientCritic`; with a
    slow copy, it is the copy that writes the memory, and bootstraps.

    Args:
        state_sizes: width of each state tensor of the core that is watched. The attribute of this name counts the memory as one more.
        memory_size: R, width of the memory.
        hidden_sizes: widths of hidden layers (tanh) of the readout, beside its linear path.
        **settings: see `ErrorCritic`.

    Raises:
        ValueError: if a size or setting is out of range.
    """

    def __init__(
        self,
        *,
        state_sizes: Sequence[int],
        memory_size: int = 32,
        hidden_sizes: Sequence[int] = (),
        **settings: Unpack[CriticSettings],
    ):
        check_sizes(state_sizes, hidden_sizes)
        if not are_counts(memory_size):
            raise ValueError(
                f"memory_size: found {memory_size}, allowed an integer of 1 or more; without memory use GradientCritic"
            )
        if settings.get("targets_per_window") is not None:
            raise ValueError(
                f"targets_per_window: found {settings['targets_per_window']}, allowed None; the memory reads every step of the window"
            )
        super().__init__(state_sizes=state_sizes, **settings)
        self.memory_size = memory_size
        self._widths = self.state_sizes  # of the core alone, which the statistics are of
        self.state_sizes = (*self.state_sizes, memory_size)
        self.set_net(_Reader(sum(self._widths), self.context_size, memory_size, hidden_sizes))

    def watch(self, core: Core) -> "WatchedCore":
        """The core, with this critic's memory as the last tensor of its state.

        Raises:
            ValueError: if it is no core, or the critic was built for one of other state sizes.
        """
        return WatchedCore(core, self)

    @torch.no_grad()
    @outside_of_autocast
    def remember(self, state: State, memory: Tensor, first: Tensor | None = None) -> Tensor:
        """The memory after each step: what `watch` does beside the core.

        Args:
            state: tuple of [T, B, size], the core's states before each step, episode resets applied.
            memory: [B, R] before step 0.
            first: [T, B] bool, True where an episode starts; None where none does.

        Returns:
            [T, B, R], without gradient.
        """
        net = self._bootstrap_net()
        assert isinstance(net, _Reader)
        return net.read(torch.cat(state, dim=-1), memory, first).to(memory.dtype)

    @outside_of_autocast
    def fit_window(self, window: Window) -> CriticFit:
        """Regresses on the window's target gradients, and trains the recurrent net through the window."""
        states, gradients, context, valid = window.rows()
        joined, goal, weight = self._rows(states, gradients, valid)
        z = self._join_context(joined, self._rows_of_context(context, weight))
        net, (R, B) = self.net, window.states[-1].shape[:2]
        assert isinstance(net, _Reader)
        # A row that does not count may hold anything, but one that can be read is: the rows after it remember it.
        joined = torch.where((weight > 0) | joined.isfinite(), joined, 0.0)
        features, memory = joined[:, : -self.memory_size], joined[:B, -self.memory_size :]
        first = None
        if window.first is not None:  # the memory stored for step 0 is the one to read with, cleared or not
            first = torch.cat([torch.zeros_like(window.first[:1]), window.first[1:R]])
        memories = net.read(features.unflatten(0, (R, B)), memory, first)
        predicted = self._in_target_units(net(features, z, memories.flatten(0, 1)))
        return self._regress(predicted, goal, weight)

    def _gradient(self, net: nn.Module, joined: Tensor, context: Tensor | None) -> Tensor:
        z = self._join_context(joined, context)
        assert isinstance(net, _Reader)
        features, memory = joined.split([sum(self._widths), self.memory_size], dim=-1)
        rows = (x.reshape(1, -1, x.shape[-1]) for x in (features, memory))
        memories = net.read(next(rows), next(rows)[0])
        return self._in_target_units(net(features, z, memories.reshape(memory.shape)))

    def _join_gradient(self, gradient: State) -> Tensor:
        return self._join(gradient)[..., : -self.memory_size]

    def _split(self, joined: Tensor) -> State:
        return *joined.split(self._widths, dim=-1), joined.new_zeros(*joined.shape[:-1], self.memory_size)


class WatchedCore(Core):
    """A core with the memory of a recurrent critic as the last tensor of its state; see `RecurrentGradientCritic.watch`.

    Outputs are those of the core, whatever the critic remembers. The memory has no graph and carries no gradient. The critic is not a
    submodule: parameters, files and devices of the model know nothing of it.

    Args:
        core: any core.
        critic: built with the core's `state_sizes`.

    Raises:
        ValueError: if the critic was built for other sizes.
    """

    def __init__(self, core: Core, critic: RecurrentGradientCritic):
        super().__init__()
        if not isinstance(core, Core):
            raise ValueError(f"core: found {type(core).__name__}, allowed a core; make one of it with dni_rl.wrap")
        if any(len(shape) > 1 for shape in core.state_shapes):
            raise ValueError(
                f"core: found state_shapes {core.state_shapes}, allowed vectors, which are what its critic remembers; use "
                "ConvGradientCritic for feature maps"
            )
        if critic.state_sizes[:-1] != tuple(core.state_sizes):
            raise ValueError(
                f"core: found state_sizes {tuple(core.state_sizes)}, but the critic was built for {critic.state_sizes[:-1]}; build it "
                "with state_sizes=core.state_sizes"
            )
        self.core = core
        self.input_size, self.output_size = core.input_size, core.output_size
        self.state_sizes = critic.state_sizes
        self._critic = (critic,)  # the tuple keeps it from becoming a submodule

    @property
    def critic(self) -> RecurrentGradientCritic:
        """Whose memory it is."""
        return self._critic[0]

    def initial_state(self, batch_size: int) -> State:
        """That of the core, and an empty memory."""
        state = self.core.initial_state(batch_size)
        return *state, state[0].new_zeros(batch_size, self.critic.memory_size)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step; see `Core.forward`."""
        *before, memory = state
        output, after = self.core(x, tuple(before))
        remembered = self.critic.remember(tuple(s.unsqueeze(0) for s in before), memory)[0]
        return output, (*after, remembered)

    def unroll(self, inputs: Tensor, state: State, first: Tensor | None = None) -> tuple[Tensor, State]:
        """As `Core.unroll`, on the core's own path; the memory then reads what was recorded of it.

        Raises:
            ValueError: if shapes disagree.
            RuntimeError: if the core's unroll recorded no history.
        """
        self.check_unroll(inputs, state, first)
        *before, memory = state
        outputs, after = self.core.unroll(inputs, tuple(before), first)
        if not isinstance(after, UnrolledState):
            raise RuntimeError(
                "core: its unroll recorded no history for the critic to read; use `unroll_stepwise` or leave `Core.unroll` as it is"
            )
        memories = self.critic.remember(after.history.states, memory, first)
        recorded = torch.cat([memory.detach().unsqueeze(0), memories[:-1]])
        if first is not None:
            recorded = recorded.masked_fill(first.unsqueeze(-1), 0.0)
        after.history.add_component(recorded)
        return outputs, UnrolledState.of((*after, memories[-1]), after.history)
