"""Error critics: learned predictions of the gradient that would arrive from beyond the truncation window.

A critic M maps a core's state (and privileged context) to the expected gradient of all later losses of that sequence with
respect to that state: Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients" (2017), eq. 3 and sec. 3.2. It
also carries how its predictions are to be used (discount, scale, bound, warm-up), so that `dni_rl.backward` takes one object
and method and baseline differ in that argument alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dni_rl.cores.base import State


@dataclass(frozen=True, slots=True)
class CriticFit:
    """How well a critic met its targets; scalars without gradient except `loss`.

    Attributes:
        loss: mean squared error over rows and components, each component divided by the running RMS of its target.
        explained_variance: 1 - (squared error) / (variance of the targets), in the same units; 1 is perfect, 0 is a constant.
        cosine: mean over rows of the cosine between predicted and target gradient, rows with a zero target left out.
        predicted_norm: mean over rows of the norm of the prediction.
        target_norm: mean over rows of the norm of the target.
    """

    loss: Tensor
    explained_variance: Tensor
    cosine: Tensor
    predicted_norm: Tensor
    target_norm: Tensor


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _LinearPlusMLP(nn.Module):
    """A linear map plus an MLP, [..., inputs] -> [..., outputs], zero at the start."""

    def __init__(self, inputs: int, hidden_sizes: Sequence[int], outputs: int):
        super().__init__()
        self.linear = _zero_linear(inputs, outputs)
        layers: list[nn.Module] = []
        for size in hidden_sizes:
            layers += [nn.Linear(inputs, size), nn.Tanh()]
            inputs = size
        self.mlp = nn.Sequential(*layers, _zero_linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.mlp(x)


class GradientCritic(nn.Module):
    """Predicts dL/ds directly: a linear map, or a linear map plus an MLP, of (state, context) for the gradient of every state tensor.

        M(s, z) = rms * net([s, z])        with normalised targets, otherwise  M(s, z) = net([s, z])

    The linear path is not an ornament. Targets are nearly all noise (a few per cent of their variance can be explained), and an MLP
    alone spends its hidden layer on the noise of the first updates and never recovers the rest; docs/results/critic_fit.md has the figures.

    The last layers start at exactly zero, weight and bias, so the first synthetic gradient is zero and training starts as plain
    truncated BPTT.

    Args:
        state_sizes: width of each state tensor, as in `core.state_sizes`.
        hidden_sizes: widths of the hidden layers (tanh) beside the linear path; () is linear alone.
        context_size: Z, width of the context; 0 for none. With context this is cDNI.
        normalize_targets: divide each component of the target by a running RMS of it, and multiply predictions by it.
        dense_targets: regress on the gradient at every step of the window where the core recorded it, not only at its start.
        gradient_discount: g in [0, 1], multiplies the bootstrapped gradient at every cut.
        scale: multiplies the synthetic gradient where it is applied (the paper: 0.1 in recurrent nets); targets bootstrap from the
            scaled one, since they are the gradients that really flow.
        max_norm_ratio: bounds the norm of each sequence's synthetic gradient to this multiple of the running RMS norm of the
            gradient that losses inside a window send to its start; None for no bound. Scale-free: it follows the losses' units.
        warmup_updates: number of updates during which the critic learns but its predictions are not applied.
        statistics_decay: decay per update of the running statistics.

    Raises:
        ValueError: if a size, discount, scale, bound or count is out of range.
    """

    num_updates: Tensor
    target_rms: Tensor
    _target_square: Tensor
    _window_square: Tensor
    _window_weight: Tensor

    def __init__(
        self,
        *,
        state_sizes: Sequence[int],
        hidden_sizes: Sequence[int] = (),
        context_size: int = 0,
        normalize_targets: bool = True,
        dense_targets: bool = True,
        gradient_discount: float = 1.0,
        scale: float = 1.0,
        max_norm_ratio: float | None = None,
        warmup_updates: int = 0,
        statistics_decay: float = 0.99,
    ):
        super().__init__()
        if not state_sizes or any(size < 1 for size in (*state_sizes, *hidden_sizes)):
            raise ValueError(
                f"state_sizes, hidden_sizes: expected positive integers and at least one state tensor, got {tuple(state_sizes)}, "
                f"{tuple(hidden_sizes)}"
            )
        if context_size < 0:
            raise ValueError(f"context_size: found {context_size}, allowed 0 (no context) or more")
        if not 0.0 <= gradient_discount <= 1.0:
            raise ValueError(f"gradient_discount: found {gradient_discount}, allowed 0 to 1")
        if not scale >= 0.0:
            raise ValueError(f"scale: found {scale}, allowed 0 or more")
        if max_norm_ratio is not None and not max_norm_ratio > 0.0:
            raise ValueError(f"max_norm_ratio: found {max_norm_ratio}, allowed above 0, or None for no bound")
        if warmup_updates < 0:
            raise ValueError(f"warmup_updates: found {warmup_updates}, allowed 0 or more")
        if not 0.0 <= statistics_decay < 1.0:
            raise ValueError(f"statistics_decay: found {statistics_decay}, allowed 0 up to, not including, 1")
        self.state_sizes = tuple(state_sizes)
        self.context_size = context_size
        self.normalize_targets = normalize_targets
        self.dense_targets = dense_targets
        self.gradient_discount = gradient_discount
        self.scale = scale
        self.max_norm_ratio = max_norm_ratio
        self.warmup_updates = warmup_updates
        self.statistics_decay = statistics_decay

        inputs, outputs = sum(self.state_sizes) + context_size, sum(self.state_sizes)
        self.net = (
            _LinearPlusMLP(inputs, hidden_sizes, outputs)
            if hidden_sizes
            else nn.Sequential(_zero_linear(inputs, outputs))
        )
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("target_rms", torch.ones(sum(self.state_sizes)))
        self.register_buffer("_target_square", torch.zeros(sum(self.state_sizes)))
        self.register_buffer("_window_square", torch.zeros(()))
        self.register_buffer("_window_weight", torch.zeros(()))
        self._windows_seen = 0

    def forward(self, state: State, context: Tensor | None = None) -> State:
        """Predicts the gradient of each sequence's future loss with respect to its state.

        Args:
            state: tuple of [..., size] tensors, one for each of `state_sizes`.
            context: [..., Z], or None where `context_size` is 0.

        Returns:
            Tuple of predictions shaped as `state`. Gradients flow into the critic and into the arguments.

        Raises:
            ValueError: if state or context do not have the sizes the critic was built for.
        """
        return self._split(self._predict(self._join(state), context))

    def synthetic_gradient(self, state: State, context: Tensor | None = None, alive: Tensor | None = None) -> State:
        """The gradient to apply at the end of a window: discounted, scaled, bounded; without gradient.

            b = alive * g * scale * M(s_K, z_K),   then |b| <= max_norm_ratio * RMS of |d sum_t l_t / d s_0|

        Args:
            state: tuple of [B, size].
            context: [B, Z] or None.
            alive: [B], 0 where the sequence ended at this cut; None where none did.

        Returns:
            Tuple of [B, size].
        """
        with torch.no_grad():
            gradient = self._predict(self._join(state), context)
            gradient = gradient * (self.gradient_discount * self.scale)
            if self.max_norm_ratio is not None:
                bound = self.max_norm_ratio * self.window_norm
                norm = gradient.norm(dim=-1, keepdim=True)
                gradient = gradient * (bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
            if self.warmup_updates:
                gradient = gradient * (self.num_updates >= self.warmup_updates)
            if alive is not None:
                # where, not a product: a prediction at a state that has no future may be anything, not finite included
                gradient = torch.where(alive.bool().unsqueeze(-1), gradient, 0.0)
            return self._split(gradient)

    def fit(self, state: State, target: State, context: Tensor | None = None, valid: Tensor | None = None) -> CriticFit:
        """Regresses predictions on target gradients and updates the running statistics.

            loss = mean over valid rows and components of ((M(s_j, z_j) - stop_gradient(G_j)) / rms)^2

        Args:
            state: tuple of [N, size].
            target: tuple of [N, size], gradients of one sequence's later loss (a sum over time, not an average).
            context: [N, Z] or None.
            valid: [N] bool, rows to learn from; None for all.

        Returns:
            The fit; call `.loss.backward()` to fill the critic's gradients. No gradient reaches state or target.
        """
        with torch.no_grad():
            joined = self._join(tuple(s.detach() for s in state))
            goal = self._join(tuple(t.detach() for t in target))
            weight = goal.new_ones(len(goal)) if valid is None else valid.to(goal.dtype)
            weight = (weight / weight.sum().clamp_min(1.0)).unsqueeze(-1)  # [N, 1], sums to 1
            # where: an invalid row may hold anything
            goal = torch.where(weight > 0, goal, 0.0)
            self._update_target_statistics((weight * goal.square()).sum(0))
        predicted = self._predict(joined, None if context is None else context.detach())
        rms = self.target_rms if self.normalize_targets else torch.ones_like(self.target_rms)
        error = weight * ((predicted - goal) / rms).square()
        loss = error.sum() / goal.shape[-1]
        with torch.no_grad():
            normalized = goal / rms
            centred = normalized - (weight * normalized).sum(0)
            variance = (weight * centred.square()).sum() / goal.shape[-1]
            predicted_norm, target_norm = predicted.norm(dim=-1), goal.norm(dim=-1)
            tiny = torch.finfo(goal.dtype).tiny
            cosine = (predicted * goal).sum(-1) / (predicted_norm * target_norm).clamp_min(tiny)
            counted = weight.squeeze(-1) * (target_norm > 0)
            return CriticFit(
                loss=loss,
                explained_variance=1.0 - loss.detach() / variance.clamp_min(tiny),
                cosine=(counted * cosine).sum() / counted.sum().clamp_min(tiny),
                predicted_norm=(weight.squeeze(-1) * predicted_norm).sum(),
                target_norm=(weight.squeeze(-1) * target_norm).sum(),
            )

    def window_is_due(self) -> int:
        """How many windows the next `observe_window` stands for; 0 where this one need not be observed.

        The yardstick of the bound costs a second backward pass through the window, and moves slowly: the first 16 windows are
        observed, then every eighth. The count is kept on the host, so that asking is no synchronisation. 0 without a bound.
        """
        if self.max_norm_ratio is None:
            return 0
        self._windows_seen += 1
        if self._windows_seen <= 16:
            return 1
        return 8 if self._windows_seen % 8 == 0 else 0

    def observe_window(self, gradient: State, stands_for: int = 1) -> None:
        """Updates the running norm that bounds predictions.

        Args:
            gradient: tuple of [B, size]: d sum_t l_t / d s_0 of a window, without any synthetic gradient.
            stands_for: how many windows this one represents.
        """
        with torch.no_grad():
            square = self._join(tuple(g.detach() for g in gradient)).square().sum(-1).mean()
            # One overflow, which a gradient scaler expects and skips, must not stay in the statistics.
            step = (1.0 - self.statistics_decay**stands_for) * square.isfinite().to(square.dtype)
            self._window_square.add_(step * (square.nan_to_num(0.0, 0.0, 0.0) - self._window_square))
            self._window_weight.add_(step * (1.0 - self._window_weight))

    @property
    def window_norm(self) -> Tensor:
        """Running RMS norm of the gradient that a window's own losses send to its start, a scalar."""
        return (self._window_square / self._window_weight.clamp_min(torch.finfo(self._window_weight.dtype).tiny)).sqrt()

    def get_extra_state(self) -> dict[str, int]:
        """Part of `state_dict`: the count of windows, which lives on the host."""
        return {"windows_seen": self._windows_seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Part of `load_state_dict`."""
        self._windows_seen = state["windows_seen"]

    def _update_target_statistics(self, square: Tensor) -> None:
        # One overflow, which a gradient scaler expects and skips, must not stay in the statistics; the loss does show it.
        finite = square.isfinite().all()
        running = self._target_square.lerp(square, 1.0 - self.statistics_decay)
        self._target_square.copy_(torch.where(finite, running, self._target_square))
        self.num_updates += finite
        # to the dtype first: a power of an integer tensor is float32
        updates = self.num_updates.clamp_min(1).to(self._target_square.dtype)
        rms = (self._target_square / (1.0 - self.statistics_decay**updates)).sqrt()
        # A component that has never had a gradient keeps unit scale; one that almost never has cannot blow up the loss.
        floor = 1e-3 * rms.square().mean().sqrt()
        self.target_rms.copy_(torch.where(floor > 0, rms.maximum(floor), torch.ones_like(rms)))

    def _predict(self, joined: Tensor, context: Tensor | None) -> Tensor:
        if (context is None) != (self.context_size == 0) or (
            context is not None and context.shape != (*joined.shape[:-1], self.context_size)
        ):
            found = None if context is None else tuple(context.shape)
            wanted = (*joined.shape[:-1], self.context_size) if self.context_size else None
            raise ValueError(f"context: expected {wanted} (context_size={self.context_size}), got {found}")
        prediction = self.net(joined if context is None else torch.cat([joined, context.to(joined.dtype)], dim=-1))
        return prediction * self.target_rms if self.normalize_targets else prediction

    def _join(self, state: State) -> Tensor:
        if tuple(s.shape[-1] for s in state) != self.state_sizes:
            raise ValueError(f"state: expected widths {self.state_sizes}, got shapes {[tuple(s.shape) for s in state]}")
        return torch.cat(state, dim=-1)

    def _split(self, joined: Tensor) -> State:
        return joined.split(self.state_sizes, dim=-1)
