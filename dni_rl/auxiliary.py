"""DNI + Aux: the auxiliary task of predicting, at every step, the synthetic gradient that will be produced one window later.

Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients" (2017), sec. 3.2. A core that can tell now which gradient
a later state will receive has carried over what decides it: the task asks for memory beyond the window where the true
loss does not reach.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dni_rl.cores.base import State, UnrolledState, are_counts
from dni_rl.critics import ErrorCritic
from dni_rl.precision import refuse_half
from dni_rl.statistics import update_running_mean
from dni_rl.targets import check_alive, split_alive


def later_synthetic_gradients(
    critic: ErrorCritic,
    end: UnrolledState,
    num_windows: int,
    alive: Tensor | None = None,
    context: Tensor | None = None,
) -> tuple[State, Tensor]:
    """Targets of the auxiliary task, for windows that were unrolled side by side.

    With s_{t+1} the state after step t and windows of T steps,

        target at step t = b(s_{t+1+T})        the synthetic gradient there: discount, scale, bound and warm-up included

    which lies in the next window of the same sequence. All W windows of B sequences are columns of one batch, by window, then
    sequence, as `agents` unrolls a stored rollout; the last window has no next one. Neither has a step between which and its
    target an episode starts. Where the episode ends exactly at s_{t+1+T}, or its last loss lies before, the target is 0.

    Args:
        critic: the error critic.
        end: from `core.unroll` over [T, W * B, D], with its history.
        num_windows: W, at least 2.
        alive: [W * B] or [T + 1, W * B] as in `dni_rl.backward`.
        context: [T + 1, W * B, Z] as in `dni_rl.backward`.

    Returns:
        Targets, tuple of [T, W * B, size] without gradient, and [T, W * B] bool, where there is one.

    Raises:
        ValueError: if there are not at least two windows, the batch is none of them, or `alive` has another shape.
    """
    if not isinstance(end, UnrolledState):
        raise ValueError(
            f"end: found a plain {type(end).__name__}, without the window's history; pass the state that `core.unroll` returned as it is"
        )
    T, N = end.history.valid.shape
    if num_windows < 2 or N % num_windows:
        raise ValueError(
            f"num_windows: found {num_windows} for a batch of {N}, allowed a divisor of it from 2 on; the task needs the window after"
        )
    B = N // num_windows
    continues = end.history.valid  # [T, W * B]; False where the step starts an episode
    # s_1 .. s_T of every window, and whether its episode goes on there
    states = tuple(torch.cat([s[1:], e.detach().unsqueeze(0)]) for s, e in zip(end.history.states, end, strict=True))
    check_alive(alive, T, N)
    inside, last = split_alive(alive)
    inside = continues if inside is None else continues & inside
    goes_on = torch.cat([inside[1:], (continues.new_ones(N) if last is None else last.bool()).unsqueeze(0)])
    later = critic.synthetic_gradient(
        tuple(s[:, B:].flatten(0, 1) for s in states),
        None if context is None else context[1:, B:].flatten(0, 1),
        goes_on[:, B:].flatten(),
    )
    targets = tuple(torch.cat([g.unflatten(0, (T, N - B)), g.new_zeros(T, B, *g.shape[1:])], dim=1) for g in later)
    # No start in steps t + 1 .. T - 1 of this window and 0 .. t of the next.
    here = continues[:, :-B].flip(0).cumprod(0).flip(0).bool()  # no start in t .. T - 1
    here = torch.cat([here[1:], torch.ones_like(here[:1])])
    there = continues[:, B:].cumprod(0).bool()
    return targets, torch.cat([here & there, torch.zeros_like(continues[:, :B])], dim=1)


class AuxiliaryTask(nn.Module):
    """A head on a core's output that predicts later synthetic gradients; its loss trains head, core and all below.

        loss_t = cost * mean over components of (A(y_t) - stop_gradient(b(s_{t+1+T})) / rms)^2

    with a running RMS of the targets. The head predicts in units of it, as a critic does, so that neither the cost nor a step of the
    optimiser depends on how large gradients are: one step of Adam may change a raw prediction by a thousand times its target. The head
    starts at exactly zero, like the critic, whose first synthetic gradients are zero as well: the task sets in with the critic. It is a
    part of the model: put its parameters into the model's optimiser, and add its losses to the model's before `dni_rl.backward`. No
    gradient reaches the critic.

        targets, valid = dni_rl.later_synthetic_gradients(critic, next_state, num_windows, alive, context)
        losses = my_losses(outputs, batch) + auxiliary(outputs, targets, valid)

    The targets lie a window ahead, so windows must be at hand in pairs. The critic then learns the gradient of these losses
    too, as of all that are summed.

    Args:
        output_size: H of the core.
        state_sizes: width of each state tensor, as in `core.state_sizes`.
        hidden_sizes: widths of hidden layers (tanh) before the last; () for a linear head.
        cost: weight of the loss, in the unit of the losses it is added to; the paper gives none. 0.03 was the best of six on the T-maze
            (docs/results/log.md). The critic learns its gradient too: where true gradients are small, a large cost drowns them.
        statistics_decay: decay per update of the running RMS.

    Raises:
        ValueError: if a size, cost or decay is out of range.
    """

    target_rms: Tensor
    _square: Tensor
    _weight: Tensor

    def __init__(
        self,
        *,
        output_size: int,
        state_sizes: Sequence[int],
        hidden_sizes: Sequence[int] = (),
        cost: float = 0.03,
        statistics_decay: float = 0.99,
    ):
        super().__init__()
        lists = state_sizes, hidden_sizes
        if not all(isinstance(sizes, Sequence) for sizes in lists) or not are_counts(
            output_size, len(state_sizes), *state_sizes, *hidden_sizes
        ):
            raise ValueError(
                "output_size, state_sizes, hidden_sizes: expected positive integers and at least one state tensor, got "
                f"{output_size}, {state_sizes}, {hidden_sizes}"
            )
        if not cost >= 0.0:
            raise ValueError(f"cost: found {cost}, allowed 0 or more")
        if not 0.0 <= statistics_decay < 1.0:
            raise ValueError(f"statistics_decay: found {statistics_decay}, allowed 0 up to, not including, 1")
        self.state_sizes, self.cost, self.statistics_decay = tuple(state_sizes), cost, statistics_decay
        layers: list[nn.Module] = []
        width = output_size
        for size in hidden_sizes:
            layers += [nn.Linear(width, size), nn.Tanh()]
            width = size
        last = nn.Linear(width, sum(state_sizes))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(*layers, last)
        self.register_buffer("target_rms", torch.ones(()))
        self.register_buffer("_square", torch.zeros(()))
        self.register_buffer("_weight", torch.zeros(()))
        self._mean: Callable[[Tensor], Tensor] | None = None

    def share_statistics(self, mean: Callable[[Tensor], Tensor] | None) -> None:
        """As `ErrorCritic.share_statistics`."""
        self._mean = mean

    def forward(self, outputs: Tensor, target: State, valid: Tensor | None = None) -> Tensor:
        """The task's losses; updates the running RMS.

        Args:
            outputs: [T, B, H] of the core, with their graph.
            target: tuple of [T, B, size], later synthetic gradients; no gradient flows into them.
            valid: [T, B] bool, False where there is no target and the loss is 0; None where all have one.

        Returns:
            [T, B] losses, not reduced.

        Raises:
            ValueError: if shapes disagree, or the task is in half precision.
        """
        refuse_half("auxiliary task", self.target_rms.dtype)
        expected = [(*outputs.shape[:2], size) for size in self.state_sizes]
        if outputs.dim() != 3 or [tuple(g.shape) for g in target] != expected:
            raise ValueError(f"target: expected shapes {expected}, got {[tuple(g.shape) for g in target]}")
        if valid is not None and valid.shape != outputs.shape[:2]:
            raise ValueError(f"valid: expected [T, B] = {tuple(outputs.shape[:2])}, got {tuple(valid.shape)}")
        goal = torch.cat(target, dim=-1).detach()
        count = goal.new_full((), float(goal[..., 0].numel())) if valid is None else valid.sum().to(goal.dtype)
        if valid is not None:
            goal = goal.masked_fill(~valid.unsqueeze(-1), 0.0)
        self._update_statistics(goal.square().mean(-1).sum() / count.clamp_min(1.0), count)
        losses = self.cost * (self.head(outputs) - goal / self.target_rms).square().mean(-1)
        return losses if valid is None else losses.masked_fill(~valid, 0.0)

    @torch.no_grad()
    def _update_statistics(self, square: Tensor, count: Tensor) -> None:
        if self._mean is not None:
            total, count = self._mean(torch.stack([square * count, count]))
            square = total / count.clamp_min(torch.finfo(count.dtype).tiny)
        # Zeros, before the critic predicts anything, are no targets to take a scale from.
        counts = (square > 0) & (count > 0)
        rms = update_running_mean(self._square, self._weight, square, 1.0 - self.statistics_decay, counts).sqrt()
        self.target_rms.copy_(torch.where(rms > 0, rms, torch.ones_like(rms)))
