"""Error critics: learned predictions of the gradient that would arrive from beyond the truncation window.

A critic M maps a core's state (and privileged context) to the expected gradient of all later losses of that sequence with
respect to that state: Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients" (2017), eq. 3 and sec. 3.2. It
also carries how its predictions are to be used (discount, scale, bound, warm-up), so that `dni_rl.backward` takes one object
and method and baseline differ in that argument alone.

`ErrorCritic` is the interface, with all of that use; the others differ in what they predict and regress on. A subclass of one of them
may bring another net, by `set_net`; for another way to read a gradient off it there is `GradientRegression`.

    GradientCritic            the gradient itself (DNI; cDNI with context)          start here
    ConvGradientCritic        the same for states that are feature maps
    RecurrentGradientCritic   the same from all states of the episode so far; in `dni_rl.recurrent_critic`
    LossCritic                the scalar future loss, and differentiates it
    SobolevCritic             the future loss, trained on its values and gradients

Context is whatever tells a critic more than the state does: a label, privileged state, or what `dni_rl.future_inputs` looks ahead to.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from dni_rl.cores.base import State, are_counts, evenly_spaced_steps, select_steps
from dni_rl.precision import HALF_PRECISION, check_precision, out_of_autocast
from dni_rl.statistics import update_running_mean
from dni_rl.targets import lambda_targets

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound="ErrorCritic")

_GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0  # its multiples, modulo 1, are spread evenly, and never repeat

_FIRST_WINDOWS = 16  # so many windows are all looked at, to make the yardstick of the bound
_RECENT_LOOKS = 32  # with which the next one is compared,
_LARGEST_RISE = 4.0  # and of whose largest mean square it counts at most so many times

_CONTEXT_BOUND = 100.0  # in units of the running RMS: 1 / sqrt(p) of a component that is there a fraction p of the time


def outside_of_autocast(method: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """A critic's method that users call, run in the critic's own precision: in float16, a gradient of 1e-9 is 0."""

    @wraps(method)
    def plainly(self: C, *arguments: P.args, **settings: P.kwargs) -> R:
        with out_of_autocast(self.target_rms.device):
            return method(self, *arguments, **settings)

    return plainly


def explained_variance(error: Tensor, variance: Tensor) -> Tensor:
    """1 - error / variance of scalars, NaN where there is no variance; of several windows it is that of the means of both."""
    return torch.where(variance > 0, 1.0 - error / variance, torch.nan)


def norm_ratio(predicted: Tensor, target: Tensor) -> Tensor:
    """predicted / target of mean norms, NaN where there is no target; of several windows it is that of the means of both."""
    return torch.where(target > 0, predicted / target, torch.nan)


@dataclass(frozen=True, slots=True)
class CriticFit:
    """How well a critic met its targets; scalars without gradient except `loss`.

    Attributes:
        loss: what the critic minimises. For those that regress on gradients alone the mean squared error over rows and components,
            each component divided by the running RMS of its target.
        error: mean squared error of the predicted gradients over rows and components, in the same units.
        target_variance: variance over rows of the target gradients, mean over components, in the same units.
        cosine: mean over rows of the cosine between predicted and target gradient, rows with a zero target left out; NaN if all are.
        predicted_norm: mean over rows of the norm of the prediction.
        target_norm: mean over rows of the norm of the target.
    """

    loss: Tensor
    error: Tensor
    target_variance: Tensor
    cosine: Tensor
    predicted_norm: Tensor
    target_norm: Tensor

    @property
    def explained_variance(self) -> Tensor:
        """1 - error / target_variance: 1 is perfect, 0 is a constant, NaN where targets have no variance."""
        return explained_variance(self.error, self.target_variance)

    def as_dict(self) -> dict[str, Tensor]:
        """What there is to log, without gradient."""
        names = ("loss", "explained_variance", "cosine", "predicted_norm", "target_norm")
        return {name: getattr(self, name).detach() for name in names}


def take_step(optimizer: torch.optim.Optimizer | None, loss: Tensor) -> None:
    """One step on a critic's loss, or another regression's; its backward pass is in the precision of the critic, wherever it runs.

    Args:
        optimizer: of the critic; its gradients are zeroed first. None for a critic that does not learn.
        loss: a scalar, such as `CriticFit.loss`; without gradient, as that of a frozen critic is, there is no step.
    """
    if optimizer is None or not loss.requires_grad:
        return
    optimizer.zero_grad()
    with out_of_autocast(loss.device):
        loss.backward()
    optimizer.step()


@dataclass(frozen=True, slots=True)
class Window:
    """What a window has to teach a critic, once its backward pass is done. Nothing in it carries gradient.

    R is the number of steps to learn at: T where the core recorded the states inside the window and the critic wants dense targets,
    fewer where it wants fewer (`targets_per_window`), otherwise 1.

    Attributes:
        states: tuple of [R, B, ...], the states that those steps started from, episode resets applied.
        gradients: tuple of [R, B, ...], target gradients there, in the units of one sequence's summed loss.
        valid: [R, B] bool, rows to learn from; None for all.
        losses: [T, B].
        first: [T, B] bool, True where a step started an episode; None if the core recorded nothing, then none did.
        end: tuple of [B, ...], the state after the window.
        alive: [B], 0 where the sequence ended exactly at `end`; None where none did.
        context: [T + 1, B, Z] or None.
        steps: R indices of the steps to learn at, in 0 .. T - 1; None for the first R.
    """

    states: State
    gradients: State
    valid: Tensor | None
    losses: Tensor
    first: Tensor | None
    end: State
    alive: Tensor | None
    context: Tensor | None
    steps: tuple[int, ...] | None = None

    def at_steps(self, values: Tensor) -> Tensor:
        """[R, B, ...] of values [T or more, B, ...]."""
        R = len(self.states[0])
        return values[:R] if self.steps is None or self.steps == tuple(range(R)) else select_steps(values, self.steps)

    def rows(self) -> tuple[State, State, Tensor | None, Tensor | None]:
        """States and gradients as tuples of [R * B, ...], context [R * B, Z] or None, valid [R * B] or None."""
        return (
            tuple(s.flatten(0, 1) for s in self.states),
            tuple(g.flatten(0, 1) for g in self.gradients),
            None if self.context is None else self.at_steps(self.context).flatten(0, 1),
            None if self.valid is None else self.valid.flatten(),
        )


class CriticSettings(TypedDict, total=False):
    """The settings that every critic has; see `ErrorCritic`."""

    context_size: int
    normalize_context: bool
    normalize_targets: bool
    dense_targets: bool
    gradient_discount: float
    scale: float
    max_norm_ratio: float | None
    warmup_updates: int
    statistics_decay: float
    slow_copy_rate: float | None
    target_lambda: float
    targets_per_window: int | None
    yardstick_interval: int


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _zero_conv(inputs: int, outputs: int) -> nn.Conv2d:
    layer = _conv(inputs, outputs)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class _LinearPlusMLP(nn.Module):
    """A linear map plus an MLP, [..., inputs] -> [..., outputs], zero at the start. Or the same of convolutions."""

    def __init__(
        self,
        inputs: int,
        hidden_sizes: Sequence[int],
        outputs: int,
        layer: Callable[[int, int], nn.Module] = nn.Linear,
        zero_layer: Callable[[int, int], nn.Module] = _zero_linear,
    ):
        super().__init__()
        self.linear = zero_layer(inputs, outputs)
        layers: list[nn.Module] = []
        for size in hidden_sizes:
            layers += [layer(inputs, size), nn.Tanh()]
            inputs = size
        self.mlp = nn.Sequential(*layers, zero_layer(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.mlp(x)


def dense_net(inputs: int, hidden_sizes: Sequence[int], outputs: int) -> nn.Module:
    """A linear map, or a linear map plus an MLP: what critics predict with, zero at the start."""
    if hidden_sizes:
        return _LinearPlusMLP(inputs, hidden_sizes, outputs)
    return nn.Sequential(_zero_linear(inputs, outputs))


class _Potential(nn.Module):
    """A number for each state s and context z, [..., S + Z] -> [..., 1], whose gradient with respect to s has a linear path.

        V(s, z) = w [s, z] + mlp([s, z]) + s W [s, z],    dV / ds = ... + W_s s + W_s^T s + W_z z

    A function that is linear in s has one and the same gradient everywhere, and the linear path is what finds the gradient that
    carries a memory (docs/results/critic_fit.md); so a network to be differentiated needs the quadratic form. Zero at the start.
    """

    def __init__(self, state_size: int, context_size: int, hidden_sizes: Sequence[int]):
        super().__init__()
        self.state_size = state_size
        self.net = dense_net(state_size + context_size, hidden_sizes, 1)
        self.form = nn.Linear(state_size + context_size, state_size, bias=False)
        nn.init.zeros_(self.form.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (x[..., : self.state_size] * self.form(x)).sum(-1, keepdim=True)


def is_compiled(module: nn.Module) -> bool:
    """Whether calling the module runs what `torch.compile(module)` or `module.compile()` made of it."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def check_unbounded(critic: object, name: str = "critic") -> None:
    """Raises ValueError if a critic whose window nobody observes bounds its predictions: by a norm of 0 it would answer with zeros."""
    ratio = getattr(critic, "max_norm_ratio", None)
    if ratio is not None:
        raise ValueError(
            f"{name}: found max_norm_ratio={ratio}, allowed None; only `dni_rl.backward` measures what it would be bounded by"
        )


def check_sizes(state_sizes: Sequence[int], hidden_sizes: Sequence[int]) -> None:
    """Refuses what is not positive widths, in one line."""
    if (
        not isinstance(state_sizes, Sequence)
        or not isinstance(hidden_sizes, Sequence)
        or not state_sizes
        or not are_counts(*state_sizes, *hidden_sizes)
    ):
        raise ValueError(
            f"state_sizes, hidden_sizes: expected positive integers and at least one state tensor, got {state_sizes}, {hidden_sizes}; "
            "those of a core are its state_sizes; for feature maps use ConvGradientCritic(state_shapes=...)"
        )


class ErrorCritic(nn.Module, ABC):
    """What every error critic is: a prediction, the way it is applied, and the statistics that this takes.

    A subclass hands its predictor to `set_net`, and says how a gradient is read off it (`_gradient`) and what it learns from a window
    (`fit_window`). One that regresses on gradients need only say the first: see `GradientRegression`.

    Args:
        state_sizes: width of each state tensor.
        context_size: Z, width of the context; 0 for none. With context this is cDNI.
        normalize_context: divide each component of the context by a running RMS of it, for contexts of no common scale, and bound it
            to +-100. A component that is there once in 10,000 times and 0 otherwise just reaches the bound; one that has been 0 for so
            long that its RMS has all but vanished would explode without it when it comes back.
        normalize_targets: divide each component of the target by a running RMS of it, and multiply predictions by it.
        dense_targets: regress on the target at every step of the window where the core recorded it, not only at its start.
        gradient_discount: g in [0, 1], multiplies the bootstrapped gradient at every cut.
        scale: multiplies the synthetic gradient where it is applied (the paper: 0.1 in recurrent nets); targets bootstrap from the
            scaled one, since they are the gradients that really flow.
        max_norm_ratio: bounds the norm of each sequence's synthetic gradient to this multiple of the running RMS norm of the
            gradient that losses inside a window send to its start, see `observe_window`; None for no bound. Scale-free: it follows the
            losses' units.
        warmup_updates: number of updates during which the critic learns but its predictions are not applied.
        statistics_decay: decay per update of the running statistics.
        slow_copy_rate: synthetic gradients and bootstraps come from a slow copy of the predictor, which moves by this fraction of the
            way towards it at every fit (Polyak averaging, as of the target networks in Lillicrap et al., "Continuous control with deep
            reinforcement learning" (2016)); None for the predictor itself.
        target_lambda: 1 for the target of the full, bootstrapped window; below, targets are mixed over the windows that could have
            been cut inside of it, each bootstrapped with the critic's own prediction (`dni_rl.targets.lambda_targets`). Needs dense
            targets. For target gradients this costs a second backward pass through the window; for future losses nothing. The
            model's gradient always comes from the full window.
        targets_per_window: of dense targets, at how many steps of a window the critic learns, evenly spaced, the first of them its
            start; None for every step. A fit at S numbers of state costs in proportion to this, and may cost more than the window
            itself (docs/results/overhead.md).
        yardstick_interval: windows from one look at the yardstick of the bound to the next, after the first 16; each costs a second
            backward pass through the window.

    Attributes:
        learns_gradients: whether target gradients are what `fit_window` learns from.
    """

    num_updates: Tensor
    target_rms: Tensor
    _target_square: Tensor
    _window_square: Tensor
    _window_weight: Tensor
    _recent_squares: Tensor
    context_rms: Tensor
    _context_square: Tensor
    _context_weight: Tensor

    learns_gradients = True
    net: nn.Module
    slow_net: nn.Module | None

    def __init__(
        self,
        *,
        state_sizes: Sequence[int],
        context_size: int = 0,
        normalize_context: bool = False,
        normalize_targets: bool = True,
        dense_targets: bool = True,
        gradient_discount: float = 1.0,
        scale: float = 1.0,
        max_norm_ratio: float | None = None,
        warmup_updates: int = 0,
        statistics_decay: float = 0.99,
        slow_copy_rate: float | None = None,
        target_lambda: float = 1.0,
        targets_per_window: int | None = None,
        yardstick_interval: int = 8,
    ):
        super().__init__()
        if context_size != 0 and not are_counts(context_size):
            raise ValueError(f"context_size: found {context_size}, allowed 0 (no context) or more")
        if normalize_context and not context_size:
            raise ValueError(
                "normalize_context: found True with context_size=0, allowed False; there is nothing to normalise"
            )
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
        if slow_copy_rate is not None and not 0.0 < slow_copy_rate <= 1.0:
            raise ValueError(f"slow_copy_rate: found {slow_copy_rate}, allowed above 0 to 1, or None for no slow copy")
        if not 0.0 <= target_lambda <= 1.0:
            raise ValueError(f"target_lambda: found {target_lambda}, allowed 0 to 1")
        if target_lambda < 1.0 and not dense_targets:
            raise ValueError(
                f"target_lambda: found {target_lambda} with dense_targets=False, allowed 1; mixed targets come from the steps "
                "inside the window, so use dense_targets=True"
            )
        if targets_per_window is not None and not (isinstance(targets_per_window, int) and targets_per_window >= 2):
            raise ValueError(
                f"targets_per_window: found {targets_per_window}, allowed an integer from 2 on, or None for every step; for one use "
                "dense_targets=False"
            )
        if targets_per_window is not None and (not dense_targets or target_lambda < 1.0):
            raise ValueError(
                f"targets_per_window: found {targets_per_window} with dense_targets={dense_targets} and "
                f"target_lambda={target_lambda}, allowed None; it thins out dense, unmixed targets"
            )
        if not isinstance(yardstick_interval, int) or yardstick_interval < 1:
            raise ValueError(f"yardstick_interval: found {yardstick_interval}, allowed an integer from 1 on")
        self.state_sizes = tuple(state_sizes)
        self.context_size = context_size
        self.normalize_context = normalize_context
        self.normalize_targets = normalize_targets
        self.dense_targets = dense_targets
        self.gradient_discount = gradient_discount
        self.scale = scale
        self.max_norm_ratio = max_norm_ratio
        self.warmup_updates = warmup_updates
        self.statistics_decay = statistics_decay
        self.slow_copy_rate = slow_copy_rate
        self.target_lambda = target_lambda
        self.targets_per_window = targets_per_window
        self.yardstick_interval = yardstick_interval

        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("target_rms", torch.ones(sum(self.state_sizes)))
        self.register_buffer("_target_square", torch.zeros(sum(self.state_sizes)))
        self.register_buffer("_window_square", torch.zeros(()))
        self.register_buffer("_window_weight", torch.zeros(()))
        self.register_buffer("_recent_squares", torch.zeros(_RECENT_LOOKS))
        if normalize_context:
            self.register_buffer("context_rms", torch.ones(context_size))
            self.register_buffer("_context_square", torch.zeros(context_size))
            self.register_buffer("_context_weight", torch.zeros(()))
        self.slow_net = None
        self._windows_seen = 0
        self._looks_at_start = _FIRST_WINDOWS
        self._mean: Callable[[Tensor], Tensor] | None = None

    @abstractmethod
    def _gradient(self, net: nn.Module, joined: Tensor, context: Tensor | None) -> Tensor:
        """The predicted gradient [..., S] at states [..., S], read off `net` (the predictor or its slow copy)."""

    @abstractmethod
    def fit_window(self, window: Window) -> CriticFit:
        """Regresses predictions on what a window teaches, and updates the running statistics.

        Returns:
            The fit; call `.loss.backward()` to fill the critic's gradients, and nothing else's.
        """

    @outside_of_autocast
    def forward(self, state: State, context: Tensor | None = None) -> State:
        """Predicts the gradient of each sequence's future loss with respect to its state.

        Args:
            state: tuple of [..., size] tensors, one for each of `state_sizes`, or of [..., C, Y, X] for a critic of feature maps.
            context: [..., Z], or None where `context_size` is 0.

        Returns:
            Tuple of predictions shaped as `state`. Gradients flow into the critic and into the arguments.

        Raises:
            ValueError: if state or context do not have the sizes the critic was built for.
        """
        return self._split(self._gradient(self.net, self._join(state), context))

    @outside_of_autocast
    def synthetic_gradient(self, state: State, context: Tensor | None = None, alive: Tensor | None = None) -> State:
        """The gradient to apply at the end of a window: discounted, scaled, bounded; without gradient.

            b = alive * g * scale * M(s_K, z_K),   then |b| <= max_norm_ratio * RMS of |d sum_t l_t / d s_0|

        Args:
            state: tuple of [B, size], or of [B, C, Y, X] for a critic of feature maps.
            context: [B, Z] or None.
            alive: [B], 0 where the sequence ended at this cut; None where none did.

        Returns:
            Tuple of tensors shaped as `state`.
        """
        with torch.no_grad():
            gradient = self._gradient(self._bootstrap_net(), self._join(state), context)
            factor: Tensor | float = self.gradient_discount * self.scale
            if self.max_norm_ratio is not None:
                bound = self.max_norm_ratio * self.window_norm
                norm = gradient.norm(dim=-1, keepdim=True)
                factor = (bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(factor)
            gradient = gradient * factor
            if self.warmup_updates:
                gradient = gradient * (self.num_updates >= self.warmup_updates)
            if alive is not None:
                # where, not a product: a prediction at a state that has no future may be anything, not finite included
                gradient = torch.where(alive.bool().unsqueeze(-1), gradient, 0.0)
            return self._split(gradient)

    def window_is_due(self) -> int:
        """How many windows the next `observe_window` stands for; 0 where this one need not be observed.

        The yardstick of the bound costs a second backward pass through the window, and moves slowly: the first 16 windows are
        observed, then one of every `yardstick_interval`. Which of them follows multiples of the golden ratio: were it always the same
        one, sequences of equal length that are learned from in step would always be looked at in the same place. The count is
        kept on the host, so that asking is no synchronisation. 0 without a bound.
        """
        if self.max_norm_ratio is None:
            return 0
        self._windows_seen += 1
        if self._windows_seen <= _FIRST_WINDOWS:
            return 1
        group, place = divmod(self._windows_seen - _FIRST_WINDOWS - 1, self.yardstick_interval)
        return self.yardstick_interval if place == int(group * _GOLDEN_RATIO % 1.0 * self.yardstick_interval) else 0

    @contextmanager
    def yardstick_kept_on_error(self) -> Iterator[None]:
        """Takes back what is observed while it lasts if it ends in an error: a window that failed was none."""
        buffers = (self._window_square, self._window_weight, self._recent_squares)
        before, seen = [] if self.max_norm_ratio is None else [b.clone() for b in buffers], self._windows_seen
        try:
            yield
        except BaseException:
            self._windows_seen = seen
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=False):
                    buffer.copy_(value)
            raise

    def start_is_due(self) -> bool:
        """Whether `backward` compares what comes to the window's start with what the core recorded there: in the first windows, since a
        program that reads the start by other ways does so from the beginning."""
        is_due = self._looks_at_start > 0
        self._looks_at_start -= is_due
        return is_due

    def target_steps(self, num_steps: int) -> tuple[int, ...]:
        """The steps of a window of so many at which a critic with dense targets learns; see `evenly_spaced_steps`."""
        return evenly_spaced_steps(num_steps, self.targets_per_window)

    def observe_window(self, gradient: State, stands_for: int = 1) -> None:
        """Updates the running norm that bounds predictions.

        The mean square of a window counts at most four times the largest of the last 32. Where rewards are rare, one failure of an agent
        that has learned its task sends back hundreds of times what is usual; the bound would be tenfold for the next hundred updates,
        and synthetic gradients as large as that undo what was learned (docs/results/log.md). What comes once in 32 looks counts in
        full, and so does what stays after a few of them.

        Args:
            gradient: tuple of [B, size]: d sum_t l_t / d s_0 of a window, without any synthetic gradient.
            stands_for: how many windows this one represents.
        """
        with torch.no_grad():
            squares = self._join_gradient(tuple(g.detach() for g in gradient)).square().sum(-1)
            square = squares.mean()
            if self._mean is not None:
                total, count = self._mean(torch.stack([squares.sum(), square.new_full((), float(len(squares)))]))
                square = total / count
            recent = self._recent_squares
            # no limit before there are as many looks, nor where zeros are usual
            is_limited = square.isfinite() & (recent.min() > 0.0)
            square = torch.where(is_limited, square.minimum(_LARGEST_RISE * recent.max()), square)
            recent.copy_(torch.where(square.isfinite(), torch.cat([recent[1:], square.unsqueeze(0)]), recent))
            step = 1.0 - self.statistics_decay**stands_for
            update_running_mean(self._window_square, self._window_weight, square, step)

    @property
    def window_norm(self) -> Tensor:
        """Running RMS norm of the gradient that a window's own losses send to its start, a scalar."""
        return (self._window_square / self._window_weight.clamp_min(torch.finfo(self._window_weight.dtype).tiny)).sqrt()

    def share_statistics(self, mean: Callable[[Tensor], Tensor] | None) -> None:
        """Takes all running statistics over several processes; see `dni_rl.distributed.synchronize`.

        Args:
            mean: of a tensor over the processes, each of which calls it in the same order; None for this process alone.
        """
        self._mean = mean

    def get_extra_state(self) -> Tensor:
        """Part of `state_dict`: the count of windows, which lives on the host, as a tensor like all of its values."""
        return torch.tensor(self._windows_seen, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor | dict[str, int]) -> None:
        """Part of `load_state_dict`; of older files, a dict."""
        self._windows_seen = state["windows_seen"] if isinstance(state, dict) else int(state)

    def _bootstrap_net(self) -> nn.Module:
        if self.slow_net is not None:
            return self.slow_net
        if self.slow_copy_rate is not None:
            raise RuntimeError(
                f"slow_copy_rate: found {self.slow_copy_rate}, but {type(self).__name__} has no slow copy; call set_net(net) in place of "
                "self.net = net, or use slow_copy_rate=None"
            )
        return self.net

    def set_net(self, net: nn.Module) -> None:
        """What a subclass predicts with, and where it is asked for, its slow copy."""
        self.net = net
        # its parameters require no gradient, and so no optimiser moves them
        self.slow_net = None if self.slow_copy_rate is None else copy.deepcopy(net).requires_grad_(False)

    def _update_slow_copy(self) -> None:
        if self.slow_net is not None and self.slow_copy_rate is not None:
            for slow, fast in zip(self.slow_net.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, self.slow_copy_rate)
            for slow_statistic, fast_statistic in zip(self.slow_net.buffers(), self.net.buffers(), strict=True):
                slow_statistic.copy_(fast_statistic)  # running statistics, which move slowly by themselves

    def _rows(self, state: State, target: State, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Joined states and targets [N, S], and weights [N, 1] that sum to 1. Updates the statistics of targets.

        Where statistics are shared, weights sum to 1 in the mean over processes, so that the mean of their gradients is that of
        all their rows.
        """
        with torch.no_grad():
            joined = self._join(tuple(s.detach() for s in state))
            goal = self._join_gradient(tuple(t.detach() for t in target))
            if self._mean is None:
                if valid is None:
                    weight = (goal.new_ones(()) / len(goal)).expand(len(goal), 1)
                else:
                    keep = valid.to(goal.dtype)
                    weight = (keep / keep.sum().clamp_min(1.0)).unsqueeze(-1)
                    # where: an invalid row may hold anything
                    goal = torch.where(weight > 0, goal, 0.0)
                square, count = (weight * goal.square()).sum(0), weight.sum()
            else:
                keep = (goal.new_ones(len(goal)) if valid is None else valid.to(goal.dtype)).unsqueeze(-1)
                goal = torch.where(keep > 0, goal, 0.0)
                means = self._mean(torch.cat([goal.square().sum(0), keep.sum(0)]))
                count = means[-1]
                divisor = count.clamp_min(torch.finfo(goal.dtype).tiny)
                weight, square = keep / divisor, means[:-1] / divisor
            # of no valid rows there is no mean, which is left out as an overflow is
            self._update_target_statistics(torch.where(count > 0, square, torch.nan))
            self._update_slow_copy()
        return joined, goal, weight

    @property
    def _target_unit(self) -> Tensor:
        # a copy: graphs keep it, and the next fit writes into the buffer
        return self.target_rms.clone() if self.normalize_targets else torch.ones_like(self.target_rms)

    def _in_target_units(self, prediction: Tensor) -> Tensor:
        return prediction * self._target_unit if self.normalize_targets else prediction

    @torch.no_grad()
    def describe_fit(self, loss: Tensor, error: Tensor, predicted: Tensor, goal: Tensor, weight: Tensor) -> CriticFit:
        """How well predictions met their targets.

        Args:
            loss: what the critic minimises.
            error: the mean squared error of gradients, in units of the targets.
            predicted: [N, S] gradients.
            goal: [N, S] their targets.
            weight: [N, 1], 0 for rows that do not count; they sum to 1.
        """
        if self._mean is not None:  # the report is that of this process's rows
            total = weight.sum().clamp_min(torch.finfo(goal.dtype).tiny)
            weight, error = weight / total, error / total
        # As few passes over [N, S] as there can be: on small nets the report would cost as much as the fit.
        squares, mean = goal.square(), (weight * goal).sum(0)
        variance = (((weight * squares).sum(0) - mean.square()) / self._target_unit.square()).sum() / goal.shape[-1]
        predicted_norm, target_norm = predicted.norm(dim=-1), squares.sum(-1).sqrt()
        tiny = torch.finfo(goal.dtype).tiny
        cosine = (predicted * goal).sum(-1) / (predicted_norm * target_norm).clamp_min(tiny)
        counted = weight.squeeze(-1) * (target_norm > 0)
        return CriticFit(
            loss=loss,
            error=error.detach(),
            target_variance=variance,
            cosine=(counted * cosine).sum() / counted.sum(),  # 0 / 0 where there is no target
            predicted_norm=(weight.squeeze(-1) * predicted_norm).sum(),
            target_norm=(weight.squeeze(-1) * target_norm).sum(),
        )

    def _update_target_statistics(self, square: Tensor) -> None:
        # One overflow, which a gradient scaler expects and skips, must not stay in the statistics; the loss does show it. Nor must a
        # window without valid rows, whose mean is no number, count as an update.
        running = self._target_square.lerp(square, 1.0 - self.statistics_decay)
        finite = running.isfinite().all()
        self._target_square.copy_(torch.where(finite, running, self._target_square))
        self.num_updates += finite
        # to the dtype first: a power of an integer tensor is float32
        updates = self.num_updates.clamp_min(1).to(self._target_square.dtype)
        rms = (self._target_square / (1.0 - self.statistics_decay**updates)).sqrt()
        # A component that has never, or almost never, had a gradient gets a thousandth of the root mean square over components, so that
        # it cannot blow up the loss; unit scale is kept only while no component has ever had one.
        floor = 1e-3 * rms.square().mean().sqrt()
        self.target_rms.copy_(torch.where(floor > 0, rms.maximum(floor), 1.0))

    @torch.no_grad()
    def _rows_of_context(self, context: Tensor | None, weight: Tensor) -> Tensor | None:
        """What is learned from of a context [N, Z], weight [N, 1] as `_rows` returns it. Updates the statistics of the context."""
        if context is None:
            return None
        context = torch.where(weight > 0, context, 0.0)  # an invalid row may hold anything
        if not self.normalize_context:
            return context
        square = (weight * context.to(weight.dtype).square()).sum(0)
        total = weight.sum()
        if self._mean is not None:
            square, total = self._mean(torch.cat([square, total.view(1)])).split([len(square), 1])
            total = total.squeeze(0)
        step = 1.0 - self.statistics_decay
        rms = update_running_mean(self._context_square, self._context_weight, square, step, total > 0).sqrt()
        self.context_rms.copy_(torch.where(rms > 0, rms, torch.ones_like(rms)))  # one that is always 0 stays 0
        return context

    def _join_context(self, joined: Tensor, context: Tensor | None) -> Tensor | None:
        """The context as the network reads it: checked against states [..., S], normalised, in their precision."""
        self._check_context(joined, context)
        if context is None:
            return None
        z = context.to(joined.dtype)
        return (z / self.context_rms).clamp(-_CONTEXT_BOUND, _CONTEXT_BOUND) if self.normalize_context else z

    def _check_context(self, joined: Tensor, context: Tensor | None) -> None:
        if (context is None) != (self.context_size == 0) or (
            context is not None and context.shape != (*joined.shape[:-1], self.context_size)
        ):
            found = None if context is None else tuple(context.shape)
            wanted = (*joined.shape[:-1], self.context_size) if self.context_size else None
            raise ValueError(f"context: expected {wanted} (context_size={self.context_size}), got {found}")

    def _join(self, state: State) -> Tensor:
        if tuple(s.shape[-1] for s in state) != self.state_sizes:
            raise ValueError(f"state: expected widths {self.state_sizes}, got shapes {[tuple(s.shape) for s in state]}")
        return self._in_own_precision(torch.cat(state, dim=-1))

    def _in_own_precision(self, joined: Tensor) -> Tensor:
        """Out of half precision, which autocast leaves states and gradients in; other types must agree with the critic's."""
        check_precision(self.target_rms.dtype, joined.dtype)
        return joined.to(self.target_rms.dtype) if joined.dtype in HALF_PRECISION else joined

    def _join_gradient(self, gradient: State) -> Tensor:
        """As `_join`, of what the critic predicts and keeps statistics of."""
        return self._join(gradient)

    def _split(self, joined: Tensor) -> State:
        """The inverse of `_join_gradient`."""
        return joined.split(self.state_sizes, dim=-1)


class GradientRegression(ErrorCritic):
    """What critics share that regress on target gradients and on nothing else: all of a critic but its network.

    One of your own has a network, with zeros in its last layer for a first synthetic gradient of 0, and says how a gradient [..., S] is
    read off it, at states [..., S] joined to one tensor:

        class MyCritic(dni_rl.GradientRegression):
            def __init__(self, state_sizes, **settings):
                super().__init__(state_sizes=state_sizes, **settings)
                size = sum(state_sizes)
                net = nn.Linear(size + self.context_size, size)
                nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
                self.set_net(net)

            def _gradient(self, net, joined, context):
                z = self._join_context(joined, context)          # checked and normalised; None without context
                return self._in_target_units(net(joined if z is None else torch.cat([joined, z], dim=-1)))

    `net` is the predictor, or its slow copy. Args and errors are those of `ErrorCritic`.
    """

    def fit_window(self, window: Window) -> CriticFit:
        """Regresses predictions on the window's target gradients; see `fit`."""
        states, gradients, context, valid = window.rows()
        return self.fit(states, gradients, context, valid)

    @outside_of_autocast
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
        joined, goal, weight = self._rows(state, target, valid)
        joined = joined if valid is None else torch.where(weight > 0, joined, 0.0)
        predicted = self._gradient(self.net, joined, self._rows_of_context(context, weight))
        return self._regress(predicted, goal, weight)

    def _regress(self, predicted: Tensor, goal: Tensor, weight: Tensor) -> CriticFit:
        deviation = (predicted - goal) / self._target_unit
        loss = (weight * deviation.square().sum(-1, keepdim=True)).sum() / goal.shape[-1]
        return self.describe_fit(loss, loss, predicted, goal, weight)


class GradientCritic(GradientRegression):
    """Predicts dL/ds directly: a linear map, or a linear map plus an MLP, of (state, context) for the gradient of every state tensor.

        M(s, z) = rms * net([s, z])        with normalised targets, otherwise  M(s, z) = net([s, z])

    The linear path is not an ornament. Targets are nearly all noise (a few per cent of their variance can be explained), and an MLP
    alone spends its hidden layer on the noise of the first updates and never recovers the rest; docs/results/critic_fit.md has the figures.

    The last layers start at exactly zero, weight and bias, so the first synthetic gradient is zero and training starts as plain
    truncated BPTT.

    Args:
        state_sizes: width of each state tensor, as in `core.state_sizes`.
        hidden_sizes: widths of the hidden layers (tanh) beside the linear path; () is linear alone.
        **settings: see `ErrorCritic`; with a context_size this is cDNI.

    Raises:
        ValueError: if a size, discount, scale, bound or count is out of range.
    """

    def __init__(
        self,
        *,
        state_sizes: Sequence[int],
        hidden_sizes: Sequence[int] = (),
        **settings: Unpack[CriticSettings],
    ):
        check_sizes(state_sizes, hidden_sizes)
        super().__init__(state_sizes=state_sizes, **settings)
        inputs, outputs = sum(self.state_sizes) + self.context_size, sum(self.state_sizes)
        self.set_net(dense_net(inputs, hidden_sizes, outputs))

    def _gradient(self, net: nn.Module, joined: Tensor, context: Tensor | None) -> Tensor:
        z = self._join_context(joined, context)
        return self._in_target_units(net(joined if z is None else torch.cat([joined, z], dim=-1)))


class ConvGradientCritic(GradientRegression):
    """Predicts dL/ds for states that are feature maps, such as those of a convolutional LSTM or between convolutional layers.

        M(s, z) = rms * (conv([s, z]) + conv(tanh(... conv([s, z]))))        3 x 3, padded: predictions have the size of the maps

    As the convolutional synthetic gradient models of Jaderberg et al. (2017), sec. 4.1, with a linear path beside them and the
    context (there: a label) as constant maps; linear within its receptive field and zero at the start as `GradientCritic`, whose
    other remarks hold. The rms is one number for each channel.

    Args:
        state_shapes: (C, Y, X) of each state tensor; Y and X alike in all of them.
        hidden_channels: channels of the hidden layers; () is the one linear convolution.
        **settings: see `ErrorCritic`.

    Raises:
        ValueError: if shapes or a setting are out of range.
    """

    def __init__(
        self,
        *,
        state_shapes: Sequence[tuple[int, int, int]],
        hidden_channels: Sequence[int] = (),
        **settings: Unpack[CriticSettings],
    ):
        shapes = tuple(tuple(shape) for shape in state_shapes)
        if (
            not shapes
            or any(len(shape) != 3 or min(shape) < 1 or shape[1:] != shapes[0][1:] for shape in shapes)
            or not isinstance(hidden_channels, Sequence)
            or not are_counts(*hidden_channels)
        ):
            raise ValueError(
                "state_shapes, hidden_channels: expected at least one (C, Y, X), Y and X alike in all, and positive integers, got "
                f"{shapes}, {hidden_channels}"
            )
        super().__init__(state_sizes=[math.prod(shape) for shape in shapes], **settings)
        self.state_shapes = shapes
        channels = sum(shape[0] for shape in shapes)
        inputs = channels + self.context_size
        self.set_net(
            _LinearPlusMLP(inputs, hidden_channels, channels, _conv, _zero_conv)
            if hidden_channels
            else nn.Sequential(_zero_conv(inputs, channels))
        )

    def _gradient(self, net: nn.Module, joined: Tensor, context: Tensor | None) -> Tensor:
        context = self._join_context(joined, context)
        leading, area = joined.shape[:-1], self.state_shapes[0][1:]
        maps = joined.reshape(-1, joined.shape[-1]).unflatten(
            -1, (-1, *area)
        )  # [N, C, Y, X], those of all tensors together
        if context is not None:
            z = context.reshape(len(maps), -1, 1, 1)
            maps = torch.cat([maps, z.expand(-1, -1, *area)], dim=1)
        return self._in_target_units(net(maps).flatten(1).unflatten(0, leading))

    def _update_target_statistics(self, square: Tensor) -> None:
        area = math.prod(self.state_shapes[0][1:])
        super()._update_target_statistics(square.view(-1, area).mean(-1).repeat_interleave(area))

    def _join(self, state: State) -> Tensor:
        if tuple(s.shape[-3:] for s in state) != self.state_shapes:
            raise ValueError(
                f"state: expected shapes [..., C, Y, X] with {self.state_shapes}, got {[tuple(s.shape) for s in state]}"
            )
        return self._in_own_precision(torch.cat([s.flatten(-3) for s in state], dim=-1))

    def _split(self, joined: Tensor) -> State:
        parts = joined.split(self.state_sizes, dim=-1)
        return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, self.state_shapes, strict=True))


class _ValueCritic(ErrorCritic):
    """What critics share that predict the future loss V(s, z) and use its gradient.

        V(s, z) = mean + unit * net([s, z]),    M(s, z) = dV / ds

    with running mean of the targets (which no gradient sees, so that the network need not learn it).
    """

    loss_mean: Tensor
    loss_std: Tensor
    _loss_moments: Tensor
    _loss_weight: Tensor

    def __init__(
        self,
        *,
        state_sizes: Sequence[int],
        hidden_sizes: Sequence[int],
        value_cost: float,
        gradient_cost: float,
        **settings: Unpack[CriticSettings],
    ):
        check_sizes(state_sizes, hidden_sizes)
        super().__init__(state_sizes=state_sizes, **settings)
        self._value_cost, self._gradient_cost = value_cost, gradient_cost
        self.set_net(_Potential(sum(self.state_sizes), self.context_size, hidden_sizes))
        self.register_buffer("loss_mean", torch.zeros(()))
        self.register_buffer("loss_std", torch.ones(()))
        self.register_buffer("_loss_moments", torch.zeros(2))
        self.register_buffer("_loss_weight", torch.zeros(()))

    @property
    @abstractmethod
    def _unit(self) -> Tensor:
        """Multiplies the network's output where targets are normalised."""

    @outside_of_autocast
    def value(self, state: State, context: Tensor | None = None) -> Tensor:
        """Predicts each sequence's future loss, [...], from states [..., size] and context [..., Z]."""
        return self._value(self.net, self._join(state), context)

    def _value(self, net: nn.Module, joined: Tensor, context: Tensor | None) -> Tensor:
        z = self._join_context(joined, context)
        x = joined if z is None else torch.cat([joined, z], dim=-1)
        value = net(x).squeeze(-1)
        return self.loss_mean + self._unit * value if self.normalize_targets else value

    def _gradient(self, net: nn.Module, joined: Tensor, context: Tensor | None) -> Tensor:
        keep_graph = torch.is_grad_enabled()
        if keep_graph and is_compiled(net):
            raise RuntimeError(
                f"{type(self).__name__}: found a compiled net, which torch.compile cannot differentiate twice; leave critic.net as it is"
            )
        with torch.enable_grad():
            if not (joined.requires_grad and keep_graph):
                joined = joined.detach().requires_grad_()
            total = self._value(net, joined, context).sum()
            return torch.autograd.grad(total, joined, create_graph=keep_graph)[0]

    @outside_of_autocast
    def fit_window(self, window: Window) -> CriticFit:
        """Regresses on the window's losses to go (and gradients); see the class. Updates the running statistics."""
        states, gradients, context, valid = window.rows()
        loss_to_go = self._loss_to_go(window)  # before the statistics that it is read with move
        joined, goal, weight = self._rows(states, gradients, valid)
        with torch.no_grad():
            joined = joined if valid is None else torch.where(weight > 0, joined, 0.0)
            share = weight.squeeze(-1)
            loss_to_go = torch.where(share > 0, loss_to_go, 0.0)
            self._update_loss_statistics((share * loss_to_go).sum(), (share * loss_to_go.square()).sum(), share.sum())
        context = self._rows_of_context(context, weight)
        value = self._value(self.net, joined, context)
        deviation = (value - loss_to_go) / (self.loss_std.clone() if self.normalize_targets else 1.0)
        loss = self._value_cost * (share * deviation.square()).sum()
        with torch.set_grad_enabled(self._gradient_cost > 0):
            predicted = self._gradient(self.net, joined, context)
            error = (weight * ((predicted - goal) / self._target_unit).square()).sum() / goal.shape[-1]
        if self._gradient_cost > 0:
            loss = loss + self._gradient_cost * error
        return self.describe_fit(loss, error, predicted, goal, weight)

    @torch.no_grad()
    def _loss_to_go(self, window: Window) -> Tensor:
        """[R * B] targets of the value; see `LossCritic`."""
        T, losses, context = len(window.losses), window.losses.detach(), window.context
        last = self._bootstrap(window.end, None if context is None else context[-1], window.alive)
        bootstraps = torch.zeros_like(losses)
        bootstraps[-1] = last
        if self.target_lambda < 1.0 and T > 1:
            inner = tuple(s[1:].flatten(0, 1) for s in window.states)
            z = None if context is None else context[1:-1].flatten(0, 1)
            alive = None if window.valid is None else window.valid[1:].flatten()
            bootstraps[:-1] = self._bootstrap(inner, z, alive).view(T - 1, -1)
        return window.at_steps(lambda_targets(losses, bootstraps, self.target_lambda, first=window.first)).flatten()

    def _bootstrap(self, state: State, context: Tensor | None, alive: Tensor | None) -> Tensor:
        """[N] alive * g * scale * V(s, z): the future loss whose gradient is the synthetic one, the bound apart."""
        joined = self._join(tuple(s.detach() for s in state))
        value = self._value(self._bootstrap_net(), joined, context) * (self.gradient_discount * self.scale)
        if self.warmup_updates:
            value = value * (self.num_updates >= self.warmup_updates)
        return value if alive is None else torch.where(alive.bool(), value, 0.0)

    def _update_loss_statistics(self, mean: Tensor, square: Tensor, total: Tensor) -> None:
        moments = torch.stack([mean, square])
        if self._mean is not None:
            moments, total = self._mean(torch.cat([moments, total.view(1)])).split([2, 1])
            total = total.squeeze(0)
        step = 1.0 - self.statistics_decay
        mean, square = update_running_mean(self._loss_moments, self._loss_weight, moments, step, total > 0)
        std = (
            (square - mean.square()).clamp_min(1e-6 * square).sqrt()
        )  # constant losses: no division by next to nothing
        self.loss_mean.copy_(mean)
        self.loss_std.copy_(torch.where(std > 0, std, torch.ones_like(std)))


class LossCritic(_ValueCritic):
    """Predicts the scalar future loss V(s, z) of a sequence; its gradient with respect to the state is the synthetic gradient.

        L_j  = sum_{t >= j} l_t + alive * g * scale * V(s_K, z_K)         up to the first episode start in the window, if there is one
        loss = mean over valid rows of ((V(s_j, z_j) - stop_gradient(L_j)) / std)^2
        M(s, z) = dV / ds

    Werbos' heuristic dynamic programming (HDP), in "Approximate dynamic programming for real-time control and neural modeling"
    (1992): the critic of rewards that a reinforcement learner has, differentiated. The target is one number in place of one for
    each component of the state, so it has much less to say about the gradient.

    What it predicts is the *value* of the losses. Where that is not what their gradient is the gradient of, it cannot help: the
    surrogate -A log pi of a policy gradient has expectation 0 in every state whatever its gradient is, and only value loss and
    entropy teach anything. With g = 1 and sequences without end, V is a sum without bound; take g < 1.

    `report` and `CriticFit` measure its gradient against the target gradients, as for every critic.

    Args:
        state_sizes: width of each state tensor, as in `core.state_sizes`.
        hidden_sizes: widths of the hidden layers (tanh) beside the quadratic form, whose gradient is linear in the state.
        **settings: see `ErrorCritic`; a slow copy bootstraps V as well, and the bound applies to the gradient alone.

    Raises:
        ValueError: if a size or setting is out of range.
    """

    learns_gradients = False

    def __init__(
        self, *, state_sizes: Sequence[int], hidden_sizes: Sequence[int] = (), **settings: Unpack[CriticSettings]
    ):
        super().__init__(
            state_sizes=state_sizes, hidden_sizes=hidden_sizes, value_cost=1.0, gradient_cost=0.0, **settings
        )

    @property
    def _unit(self) -> Tensor:
        return self.loss_std.clone()  # graphs keep it, and the next fit writes into the buffer


class SobolevCritic(_ValueCritic):
    """Predicts the future loss as `LossCritic`, and is trained on both its value and its gradient.

        loss = value_cost * mean over rows of ((V(s_j, z_j) - L_j) / std)^2
             + gradient_cost * mean over rows and components of ((dV(s_j, z_j) / ds - G_j) / rms)^2

    with L_j of `LossCritic` and G_j of `GradientCritic`. Werbos' globalised dual heuristic programming (GDHP, 1992); Czarnecki et
    al., "Sobolev training for neural networks" (2017), eq. 1. Its gradient field is that of a function, which the true expected
    gradient of differentiable losses is, and which is a wrong assumption for surrogates that are not their own expectation's
    gradient; value_cost = 0 keeps the field and drops the values. Training differentiates twice.

    Args:
        state_sizes: width of each state tensor, as in `core.state_sizes`.
        hidden_sizes: widths of the hidden layers (tanh) beside the quadratic form, whose gradient is linear in the state.
        value_cost: weight of the squared error of values, in units of their standard deviation.
        gradient_cost: weight of the squared error of gradients, in units of their RMS; above 0.
        **settings: see `ErrorCritic`.

    Raises:
        ValueError: if a size, weight or setting is out of range.
    """

    def __init__(
        self,
        *,
        state_sizes: Sequence[int],
        hidden_sizes: Sequence[int] = (),
        value_cost: float = 1.0,
        gradient_cost: float = 1.0,
        **settings: Unpack[CriticSettings],
    ):
        if not (value_cost >= 0.0 and gradient_cost > 0.0):
            raise ValueError(
                f"value_cost, gradient_cost: found {value_cost}, {gradient_cost}, allowed 0 or more and above 0; without gradients "
                "use LossCritic"
            )
        super().__init__(
            state_sizes=state_sizes,
            hidden_sizes=hidden_sizes,
            value_cost=value_cost,
            gradient_cost=gradient_cost,
            **settings,
        )

    @property
    def _unit(self) -> Tensor:
        # That of the gradients, which are what is used; values may be larger by orders of magnitude.
        return self.target_rms.square().mean().sqrt()
