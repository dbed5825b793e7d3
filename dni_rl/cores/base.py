"""The contract of recurrent cores, and the one loop over time that serves them all.

A core maps an input and a state to an output and a next state. Its state is a flat tuple of [B, ...] tensors, which is what
an error critic reads and predicts gradients for: an LSTM layer contributes (h, c), a GRU layer (h,).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Self

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]


class StateHistory:
    """The states inside an unrolled window and, after a backward pass, the gradients that arrived there.

    Dense critic targets need dS/ds_j for every step j of the window, not only for its start. A core records them here
    while autograd passes by, so that they cost no second backward pass.

    Args:
        states: tuple of [T, B, ...], detached: the state each step started from, episode resets applied; or a function that
            computes it when it is first asked for. With `steps`, of those alone.
        valid: [T, B] bool, False where the step started an episode: the state before it has no future to be credited for.
        steps: the steps whose states and gradients are recorded, rising; None for all.

    Attributes:
        watches: whether backward passes are recorded; `unwatched` turns it off for a while.
    """

    def __init__(self, states: State | Callable[[], State], valid: Tensor, steps: tuple[int, ...] | None = None):
        self._states = states
        self.valid = valid
        self.steps = steps
        self.watches = True
        self._gradients: dict[int, Tensor] = {}
        self._mixture: tuple[float, State] | None = None
        self._mixed = False

    @property
    def states(self) -> State:
        """Tuple of [T, B, ...], detached."""
        self._check_complete()
        return self._recorded_states

    @property
    def _recorded_states(self) -> State:
        if not isinstance(self._states, tuple):
            self._states = self._states()
        return self._states

    def at(self, steps: tuple[int, ...]) -> tuple[State, State]:
        """States and gradients, tuples of [R, B, ...], at R steps; RuntimeError if one was not recorded."""
        states, gradients = self._recorded_states, self._recorded_gradients
        if self.steps is None:
            if len(steps) == len(self.valid):
                return states, gradients
            rows = steps
        elif set(steps) <= set(self.steps):
            rows = tuple(self.steps.index(step) for step in steps)
        else:
            self._check_complete()
        if self.steps == steps:
            return states, gradients
        return tuple(select_steps(s, rows) for s in states), tuple(select_steps(g, rows) for g in gradients)

    def _check_complete(self) -> None:
        if self.steps is not None:
            raise RuntimeError(
                f"history: found the steps {self.steps} recorded, and others were asked for; set the core's targets_per_window to None"
            )

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """While it lasts, backward passes need not be recorded, which lets a core take a faster one."""
        before, self.watches = self.watches, False
        try:
            yield
        finally:
            self.watches = before

    def add_component(self, states: Tensor) -> None:
        """One more tensor [T, B, ...] of the state, which no gradient reaches, behind those that were recorded."""
        self._states = (*self.states, states)

    @contextmanager
    def mixing(self, lambda_: float, gradients: State) -> Iterator[None]:
        """While it lasts, a backward pass hands (1 - lambda) b_t + lambda G_t on from state t instead of the G_t it records.

        This is the recursion of `dni_rl.targets.lambda_targets`. The states of step 0 are left alone, and a state of which no later
        step makes use has gradient zero, mixed or not.

        Args:
            lambda_: in [0, 1].
            gradients: tuple of [T, B, ...] b_0 .. b_{T-1}, zero where a step starts an episode; b_0 is not used.

        Raises:
            RuntimeError: at the end, if the core that recorded this history took no notice.
        """
        self._mixture, self._mixed = (lambda_, gradients), False
        try:
            yield
        finally:
            self._mixture = None
        if len(self.valid) > 1 and not self._mixed:
            raise RuntimeError(
                "target_lambda: this core's unroll hands gradients on without `StateHistory.hand_on`; use target_lambda=1"
            )

    @property
    def mixes(self) -> bool:
        """Whether `hand_on` changes gradients at the moment."""
        return self._mixture is not None

    def hand_on(self, index: int, step: int, gradient: Tensor | None) -> Tensor | None:
        """The gradient [B, ...] that goes on from state component `index` of one step to the steps before; see `mixing`."""
        if self._mixture is None or step == 0:
            return gradient
        self._mixed = True
        lambda_, gradients = self._mixture
        b = gradients[index][step]
        return (1.0 - lambda_) * b if gradient is None else torch.lerp(b.to(gradient.dtype), gradient, lambda_)

    def record(self, index: int, gradient: Tensor) -> None:
        """Stores the gradients [T, B, ...] of state component `index`, replacing those of an earlier backward pass."""
        self._gradients[index] = gradient

    def record_step(self, index: int, step: int, gradient: Tensor | None) -> None:
        """Stores the gradient [B, ...] of state component `index` at one step, or with `steps` at the step of that number among them;
        None, autograd's undefined gradient, is zero."""
        buffer = self._gradients.get(index)
        if buffer is None:
            buffer = self._gradients[index] = torch.zeros_like(
                self._recorded_states[index], dtype=None if gradient is None else gradient.dtype
            )
        buffer[step] = 0.0 if gradient is None else gradient

    @property
    def arrived(self) -> bool:
        """Whether a gradient was recorded that `clear` has not forgotten."""
        return bool(self._gradients)

    def clear(self) -> None:
        """Forgets recorded gradients, so that a second backward pass cannot be mistaken for the first."""
        self._gradients = {}

    @property
    def gradients(self) -> State:
        """Tuple of [T, B, ...] gradients; zero for a component that no loss depends on."""
        self._check_complete()
        return self._recorded_gradients

    @property
    def _recorded_gradients(self) -> State:
        found = self._gradients
        return tuple(found[i] if i in found else torch.zeros_like(s) for i, s in enumerate(self._recorded_states))


class UnrolledState(tuple[Tensor, ...]):
    """The state after a window: an ordinary tuple that also remembers the window's history."""

    history: StateHistory

    @classmethod
    def of(cls, state: Sequence[Tensor], history: StateHistory) -> Self:
        """Attaches `history` to `state`."""
        unrolled = cls(state)
        unrolled.history = history
        return unrolled


class Core(nn.Module, ABC):
    """A recurrent core.

    Attributes:
        input_size: D.
        output_size: H.
        state_sizes: width of each tensor of the state; each has shape [B, width], unless `state_shapes` says otherwise.
    """

    input_size: int
    output_size: int
    state_sizes: tuple[int, ...]

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each tensor of the state without its batch: (width,) each. A core of feature maps overrides it, with (C, Y, X) for
        example, and has their numbers of entries for `state_sizes`."""
        return tuple((size,) for size in self.state_sizes)

    @abstractmethod
    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Takes one step.

        Args:
            x: [B, D], or [B, ...] where the core reads feature maps.
            state: tuple of [B, ...].

        Returns:
            [B, H] output and the next state.
        """

    def initial_state(self, batch_size: int) -> State:
        """Zeros, on the device and in the precision of the parameters, if there are any.

        An episode that starts inside a window starts from zeros, too, whatever this returns. An initial state that is learned, or
        is not zero, belongs into the step, as what the state is counted from.
        """
        like = next(self.parameters(), torch.empty(()))
        return tuple(like.new_zeros(batch_size, *shape) for shape in self.state_shapes)

    def unroll(self, inputs: Tensor, state: State, first: Tensor | None = None) -> tuple[Tensor, State]:
        """Steps along time, clearing the state where an episode starts.

        Args:
            inputs: [T, B, D], or [T, B, ...] where the core reads feature maps.
            state: tuple of [B, ...] tensors, the state before step 0.
            first: [T, B] bool, True where `inputs` starts an episode; None where no episode starts.

        Returns:
            [T, B, H] outputs, and the state after step T - 1, which carries the window's `history`. What belongs into a checkpoint is
            `dni_rl.cut` of it, plain tensors without that history.

        Raises:
            ValueError: if shapes disagree.
            RuntimeError: if a step writes to the state in place.
        """
        self.check_unroll(inputs, state, first)
        return unroll_stepwise(self, inputs, state, first)

    @staticmethod
    def check_step(x: Tensor) -> None:
        """Checks the input of a core's `forward` that reads vectors; raises ValueError in one line."""
        if x.dim() != 2:
            raise ValueError(f"x: expected [B, D], got {tuple(x.shape)}; a window [T, B, D] goes through core.unroll")

    @staticmethod
    def check_window(inputs: Tensor) -> None:
        """Checks the inputs of an `unroll` that reads vectors and does not step; raises ValueError in one line."""
        if inputs.dim() != 3:  # fused kernels read past their memory otherwise
            raise ValueError(f"inputs: expected [T, B, D], got {tuple(inputs.shape)}; flatten what a step reads")

    def check_unroll(self, inputs: Tensor, state: State, first: Tensor | None) -> None:
        """Checks the arguments of `unroll`; raises ValueError in one line."""
        if not isinstance(inputs, Tensor):
            raise ValueError(
                f"inputs: found {type(inputs).__name__}, allowed a tensor [T, B, D]; join what an observation consists of, or encode it, "
                "before the core"
            )
        if inputs.dim() < 3 or len(inputs) == 0:
            raise ValueError(f"inputs: expected [T, B, D] with T >= 1, got {tuple(inputs.shape)}")
        if inputs.dim() == 3 and inputs.shape[2] != self.input_size:  # fused kernels read past their memory otherwise
            raise ValueError(f"inputs: expected D = {self.input_size} in [T, B, D], got {tuple(inputs.shape)}")
        if first is not None and not isinstance(first, Tensor):
            raise ValueError(
                f"first: found {type(first).__name__}, allowed a bool tensor [T, B]; use torch.as_tensor(first)"
            )
        if first is not None and first.shape != inputs.shape[:2]:
            raise ValueError(f"first: expected [T, B] = {tuple(inputs.shape[:2])}, got {tuple(first.shape)}")
        if first is not None and first.dtype != torch.bool:
            raise ValueError(f"first: expected dtype torch.bool, got {first.dtype}; use `first.bool()`")
        expected = [(inputs.shape[1], *shape) for shape in self.state_shapes]
        if state is None:
            raise ValueError(
                "state: expected a tuple of tensors, got None; start with `core.initial_state(batch_size)`"
            )
        found = [tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in state]
        if found != expected:
            raise ValueError(f"state: expected shapes {expected}, got {found}")


def evenly_spaced_steps(num_steps: int, wanted: int | None) -> tuple[int, ...]:
    """floor(i T / n) for i = 0 .. n - 1: n of T steps, the first of them 0; all where `wanted` is None or above T."""
    n = num_steps if wanted is None else min(wanted, num_steps)
    return tuple(i * num_steps // n for i in range(n))


def select_steps(values: Tensor, steps: Sequence[int]) -> Tensor:
    """[R, ...] of values [T, ...] at R steps. An index made of a list would be copied to the device, and the host wait for it."""
    return torch.stack([values[step] for step in steps])


def are_counts(*values: object) -> bool:
    """Whether all of them are integers of at least 1."""
    return all(isinstance(value, Integral) and int(value) >= 1 for value in values)


def check_chrono_max(chrono_max: float) -> None:
    """Raises ValueError unless it is above 2, and finite."""
    if not 2 < chrono_max < math.inf:
        raise ValueError(
            f"chrono_max: found {chrono_max}, allowed a finite number above 2; it is the longest expected memory in steps"
        )


@torch.no_grad()
def chrono_bias_(bias: Tensor, num_gates: int, memory: float) -> None:
    """Biases gates towards remembering for 1 to `memory` steps: b_f ~ log U(1, memory - 1), b_i = -b_f, all others 0.

    Tallec & Ollivier, "Can recurrent neural networks warp time?" (2018), sec. 2.2.

    Args:
        bias: [num_gates * H], in PyTorch's order: input, forget, cell, output of an LSTM; reset, update, new of a GRU, whose update gate
            is what remembers, and which has no input gate of its own.
        num_gates: 4 or 3.
        memory: above 2.
    """
    H = len(bias) // num_gates
    keep = torch.empty(H).uniform_(1.0, memory - 1.0).log().to(bias)
    bias.zero_()
    bias[H : 2 * H] = keep
    if num_gates == 4:
        bias[:H] = -keep


def clear_state(state: State, first: Tensor) -> State:
    """Zeroes the rows of `state` [B, ...] where `first` [B] says that an episode starts; no gradient flows through them."""
    rows = first.unsqueeze(-1)  # what most states need
    return tuple(s.masked_fill(rows if s.dim() == 2 else first.view(-1, *[1] * (s.dim() - 1)), 0.0) for s in state)


def unroll_stepwise(core: Core, inputs: Tensor, state: State, first: Tensor | None = None) -> tuple[Tensor, State]:
    """The plain loop over time, for any core; faster paths are tested against it. See `Core.unroll`."""
    outputs, visited = [], []
    for t, x in enumerate(inputs):
        # A tensor of its own, even without resets: its gradient is that of *later* losses, whereas the tensor of the last step
        # may also serve as that step's output and would collect the gradient of its own loss as well.
        state = tuple(s.view_as(s) for s in state) if first is None else clear_state(state, first[t])
        visited.append(state)
        versions = _versions(state)
        output, state = core(x, state)
        # the history would hold the state after the write, and so would the caller
        if _versions(visited[-1]) != versions:
            raise RuntimeError(
                "cell: found a state that it wrote to in place; allowed a next state of new tensors; write `m * 0.5 + h`, not "
                "`m.mul_(0.5).add_(h)`, or write to a clone"
            )
        outputs.append(output)
    valid = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device) if first is None else ~first
    history = StateHistory(
        tuple(torch.stack([s.detach() for s in component]) for component in zip(*visited, strict=True)), valid
    )
    for t, step_state in enumerate(visited):
        for index, s in enumerate(step_state):
            if s.requires_grad:
                s.register_hook(partial(_note_and_hand_on, history, index, t))
    return torch.stack(outputs), UnrolledState.of(state, history)


def _versions(state: State) -> list[int]:
    """How often each tensor was written to in place, where that is counted."""
    if torch.compiler.is_compiling():
        return []
    return [s._version for s in state if not s.is_inference()]


def _note_and_hand_on(history: StateHistory, index: int, step: int, gradient: Tensor | None) -> Tensor | None:
    history.record_step(index, step, gradient)
    return history.hand_on(index, step, gradient)
