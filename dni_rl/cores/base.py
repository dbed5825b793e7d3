"""The contract of recurrent cores, and the one loop over time that serves them all.

A core maps an input and a state to an output and a next state. Its state is a flat tuple of [B, ...] tensors, which is what
an error critic reads and predicts gradients for: an LSTM layer contributes (h, c), a GRU layer (h,).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]


class StateHistory:
    """The states inside an unrolled window and, after a backward pass, the gradients that arrived there.

    Dense critic targets need dS/ds_j for every step j of the window, not only for its start. A core records them here
    while autograd passes by, so that they cost no second backward pass.

    Attributes:
        states: tuple of [T, B, ...], detached: the state each step started from, episode resets applied.
        valid: [T, B] bool, False where the step started an episode: the state before it has no future to be credited for.
    """

    def __init__(self, states: State, valid: Tensor):
        self.states = states
        self.valid = valid
        self._gradients: list[Tensor | None] = [None] * len(states)

    def record(self, index: int, gradient: Tensor) -> None:
        """Stores the gradients [T, B, ...] of state component `index`, replacing those of an earlier backward pass."""
        self._gradients[index] = gradient

    def record_step(self, index: int, step: int, gradient: Tensor | None) -> None:
        """Stores the gradient [B, ...] of state component `index` at one step; None, autograd's undefined gradient, is zero."""
        buffer = self._gradients[index]
        if buffer is None:
            buffer = self._gradients[index] = torch.zeros_like(
                self.states[index], dtype=None if gradient is None else gradient.dtype
            )
        buffer[step] = 0.0 if gradient is None else gradient

    def clear(self) -> None:
        """Forgets recorded gradients, so that a second backward pass cannot be mistaken for the first."""
        self._gradients = [None] * len(self.states)

    @property
    def gradients(self) -> State:
        """Tuple of [T, B, ...] gradients; zero for a component that no loss depends on."""
        return tuple(torch.zeros_like(s) if g is None else g for g, s in zip(self._gradients, self.states, strict=True))


class UnrolledState(tuple[Tensor, ...]):
    """The state after a window: an ordinary tuple that also remembers the window's history."""

    history: StateHistory

    @classmethod
    def of(cls, state: Sequence[Tensor], history: StateHistory) -> "UnrolledState":
        """Attaches `history` to `state`."""
        unrolled = cls(state)
        unrolled.history = history
        return unrolled


class Core(nn.Module, ABC):
    """A recurrent core.

    Attributes:
        input_size: D.
        output_size: H.
        state_sizes: width of each tensor of the state; each has shape [B, width].
    """

    input_size: int
    output_size: int
    state_sizes: tuple[int, ...]

    @abstractmethod
    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Takes one step.

        Args:
            x: [B, D].
            state: tuple of [B, ...].

        Returns:
            [B, H] output and the next state.
        """

    def initial_state(self, batch_size: int) -> State:
        """Zeros, on the device and in the precision of the parameters."""
        like = next(self.parameters())
        return tuple(like.new_zeros(batch_size, size) for size in self.state_sizes)

    def unroll(self, inputs: Tensor, state: State, first: Tensor | None = None) -> tuple[Tensor, State]:
        """Steps along time, clearing the state where an episode starts.

        Args:
            inputs: [T, B, D].
            state: tuple of [B, ...] tensors, the state before step 0.
            first: [T, B] bool, True where `inputs` starts an episode; None where no episode starts.

        Returns:
            [T, B, H] outputs, and the state after step T - 1, which carries the window's `history`.

        Raises:
            ValueError: if shapes disagree.
        """
        self.check_unroll(inputs, state, first)
        return unroll_stepwise(self, inputs, state, first)

    def check_unroll(self, inputs: Tensor, state: State, first: Tensor | None) -> None:
        """Checks the arguments of `unroll`; raises ValueError in one line."""
        if inputs.dim() < 3 or len(inputs) == 0:
            raise ValueError(f"inputs: expected [T, B, D] with T >= 1, got {tuple(inputs.shape)}")
        if first is not None and first.shape != inputs.shape[:2]:
            raise ValueError(f"first: expected [T, B] = {tuple(inputs.shape[:2])}, got {tuple(first.shape)}")
        if first is not None and first.dtype != torch.bool:
            raise ValueError(f"first: expected dtype torch.bool, got {first.dtype}; use `first.bool()`")
        expected = [(inputs.shape[1], size) for size in self.state_sizes]
        if [tuple(s.shape) for s in state] != expected:
            raise ValueError(f"state: expected shapes {expected}, got {[tuple(s.shape) for s in state]}")


def clear_state(state: State, first: Tensor) -> State:
    """Zeroes the rows of `state` [B, ...] where `first` [B] says that an episode starts; no gradient flows through them."""
    return tuple(s.masked_fill(first.view(-1, *[1] * (s.dim() - 1)), 0.0) for s in state)


def unroll_stepwise(core: Core, inputs: Tensor, state: State, first: Tensor | None = None) -> tuple[Tensor, State]:
    """The plain loop over time, for any core; faster paths are tested against it. See `Core.unroll`."""
    outputs, visited = [], []
    for t, x in enumerate(inputs):
        # A tensor of its own, even without resets: its gradient is that of *later* losses, whereas the tensor of the last step
        # may also serve as that step's output and would collect the gradient of its own loss as well.
        state = tuple(s.view_as(s) for s in state) if first is None else clear_state(state, first[t])
        visited.append(state)
        output, state = core(x, state)
        outputs.append(output)
    valid = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device) if first is None else ~first
    history = StateHistory(
        tuple(torch.stack([s.detach() for s in component]) for component in zip(*visited, strict=True)), valid
    )
    for t, step_state in enumerate(visited):
        for index, s in enumerate(step_state):
            if s.requires_grad:
                s.register_hook(lambda gradient, i=index, t=t: history.record_step(i, t, gradient))
    return torch.stack(outputs), UnrolledState.of(state, history)
