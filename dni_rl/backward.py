"""`cut` and `backward`: the two calls that put an error critic into any training loop with a recurrent core.

state = dni_rl.cut(state)                                   # a leaf: the window starts here
outputs, next_state = core.unroll(inputs, state, first)
losses = my_losses(outputs, batch)                          # [T, B], one loss per step and sequence, not reduced
report = dni_rl.backward(losses, start=state, end=next_state, critic=critic, alive=alive)
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial, reduce, wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from dni_rl.cores.base import State, StateHistory, UnrolledState, select_steps
from dni_rl.critics import CriticFit, ErrorCritic, Window, explained_variance, norm_ratio
from dni_rl.precision import HALF_PRECISION, check_precision, out_of_autocast
from dni_rl.targets import check_alive, check_weight, keeping_graph, per_sequence, scaled_weight, split_alive

P = ParamSpec("P")
R = TypeVar("R")


def cut(state: Sequence[Tensor]) -> State:
    """Starts a window: the same values as leaves of a new graph.

    Args:
        state: tuple or list of [B, ...] floating-point tensors, for example the state in which the last window ended.

    Returns:
        Tuple of leaves that require gradients; they share memory with `state`.

    Raises:
        ValueError: if `state` is not a tuple or list of floating-point tensors.
        RuntimeError: from PyTorch, if `state` was computed under `torch.inference_mode()`, whose tensors can never take part in a graph;
            act under `torch.no_grad()` instead, or clone the state outside of that mode.
    """
    if torch.compiler.is_compiling():  # a compiled graph must not run through the start of a window
        return torch.compiler.disable(cut)(state)
    if not isinstance(state, (tuple, list)) or not all(isinstance(s, Tensor) and s.is_floating_point() for s in state):
        found, way_out = type(state).__name__, "write (state,) for one"
        if isinstance(state, (tuple, list)):
            found += f" of {[s.dtype if isinstance(s, Tensor) else type(s).__name__ for s in state]}"
            way_out = "put them into one flat tuple, such as (h, c)"
        raise ValueError(f"state: expected a tuple of floating-point tensors [B, ...], got {found}; {way_out}")
    return tuple(s.detach().requires_grad_() for s in state)


@dataclass(frozen=True, slots=True)
class Report:
    """What one call of `backward` saw. Scalars without gradient; NaN where there was no critic. Ratios are also NaN where all
    targets were zero.

    Attributes:
        critic_loss: what the critic minimises, in normalised units.
        explained_variance: 1 - error / target_variance; 1 is perfect. Of several windows take that of the means of both, as `mean_of`
            does: where targets are nearly always zero, single ratios have no lower bound.
        cosine: mean cosine between predicted and target gradient.
        predicted_norm: mean norm of the predictions at the states that had a target.
        target_norm: mean norm of the targets, in the units of one sequence's summed loss.
        synthetic_norm: mean norm of the synthetic gradient applied at the end of the window.
        norm_ratio: predicted_norm / target_norm; of several windows as above.
        error: mean squared error of the predictions, in normalised units.
        target_variance: of the target gradients, in normalised units.
    """

    critic_loss: Tensor
    explained_variance: Tensor
    cosine: Tensor
    predicted_norm: Tensor
    target_norm: Tensor
    synthetic_norm: Tensor
    norm_ratio: Tensor
    error: Tensor
    target_variance: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        """Field names to tensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def mean_of(cls, reports: Sequence[Self]) -> Self:
        """One report of several windows: means over those that have a number, and the ratios of these means."""
        means = {f.name: torch.stack([getattr(report, f.name) for report in reports]).nanmean() for f in fields(cls)}
        means["explained_variance"] = explained_variance(means["error"], means["target_variance"])
        means["norm_ratio"] = norm_ratio(means["predicted_norm"], means["target_norm"])
        return cls(**means)


def in_own_precision(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """A function of losses that runs outside of autocast, in which the backward passes of custom functions would be as well, and between
    compiled graphs, which would lose the hooks that targets come from."""

    @wraps(function)
    def plainly(losses: Tensor, *arguments: P.args, **settings: P.kwargs) -> R:
        if not isinstance(losses, Tensor):
            raise ValueError(
                f"losses: found {type(losses).__name__}, allowed a tensor [T, B], one loss per step and sequence"
            )
        as_written = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        with out_of_autocast(losses.device):
            return as_written(losses, *arguments, **settings)

    return plainly


@in_own_precision
def backward(
    losses: Tensor,
    *,
    start: State,
    end: State,
    critic: ErrorCritic | None = None,
    alive: Tensor | None = None,
    context: Tensor | None = None,
    weight: float | Tensor | None = None,
    fit: bool = True,
    scaler: torch.amp.GradScaler | None = None,
) -> Report:
    """Backpropagates a window, with the critic's prediction standing in for what lies beyond it, and trains the critic.

        b   = alive * g * stop_gradient(M(s_K, z_K))                     synthetic gradient
        S   = sum_t l_t + <s_K, b>                                       per sequence
        G_j = dS / d s_j                                                 critic target, j = 0 or every j < K
        L   = mean ((M(s_j, z_j) - stop_gradient(G_j)) / rms)^2          critic loss, of a critic that regresses on gradients

    Jaderberg et al. (2017), sec. 3.2. Adds weight * dS/dparameters to `.grad` of the model and dL/dparameters to `.grad` of the critic;
    neither reaches the other. The caller zeroes, clips and steps each side. With `critic=None` this is truncated BPTT.

    With a critic of target_lambda < 1, the G_j that it learns from are mixed over shorter windows, and cost a backward pass of
    their own (`dni_rl.lambda_targets`); dS/dparameters stays that of the full window.

    Args:
        losses: [T, B], one loss per step and sequence, not reduced; multiply by 0 what must not count.
        start: the window's first state, from `cut`; the very tensors that `end` was unrolled from, or targets there are zero. Where the
            critic learns at the start alone, and where its bound is measured, that is noticed, and refused or warned of.
        end: the state after the window, from `core.unroll`. If the core recorded the window's history, and the critic wants dense
            targets, it learns at every step, otherwise at the start alone. A plain tuple has no history, nor tells whether an
            episode's first step clears the start: the critic is then taught target 0 there, unless the first row of an `alive`
            [T + 1, B] is 0 for that sequence. A critic that wants dense targets warns of it. A tensor of it that has no graph, such
            as a count of steps, receives nothing and has target 0.
        critic: the error critic, or None.
        alive: [B], 0 where the sequence ended exactly at the cut and nothing lies beyond it; None where none did. Or [T + 1, B], the
            same for the state before each step, the last row that of `end`: where there are steps between two sequences whose losses
            do not count, such as the last time step of dm_env, the critic must not learn there. A state does not always tell that it is
            followed by one; taught zero at these, and applied nowhere but at the others, the critic would count ends twice.
        context: [T + 1, B, Z] context of the state before each step, the last row that of `end`. None without context.
        weight: multiplies what enters the model's `.grad`; by default 1 / (T B), the mean over all losses. The critic never sees it:
            it is taken out of the targets. Above 0; of a tensor on an accelerator this is not checked, since it would have to wait.
        fit: False leaves the critic as it is, its `.grad` and its statistics too: it predicts, and does not learn from this
            window. For windows that are seen again, as in the later epochs of PPO.
        scaler: of mixed precision with float16. Both sides' `.grad` are then multiplied by its scale, and both optimisers are
            stepped through it; targets and predictions are not, whatever the scale was before.

    Several calls before one step of the optimisers, as in gradient accumulation: give each the weight of its share of all losses. The
    critic's `.grad` is then the sum of the calls' mean losses, to be divided by their number, and each call counts as an update of its
    statistics, which the next call's predictions are read with.

    Under `torch.autocast`, or behind it, the critic works in its own precision all the same, float32 as a rule, and results do not
    depend on whether this call is inside the block. Under `torch.compile` it runs as written, between compiled parts.

    Returns:
        A report of the critic's fit; without one, NaN but for `synthetic_norm`.

    Raises:
        ValueError: if shapes disagree, losses are reduced, in half precision or not those of the window that the core recorded, or
            the weight is not one positive number; if the critic is not in the states' precision and on their device.
        RuntimeError: if `start` is not from `cut`, or a second cut of the state that the window was unrolled from; if gradients are
            switched off, `end` does not depend on the graph, or the core did not record the steps at which the critic learns.
    """
    T, B = check_window(losses, start, end, critic, alive, context, weight, fit)
    if weight is None:
        weight = 1.0 / (T * B)
    weight = scaled_weight(weight, losses, scaler)
    if critic is None:
        with end.history.unwatched() if isinstance(end, UnrolledState) else nullcontext():
            torch.autograd.backward(losses, (torch.ones_like(losses) * weight,))
        return _report_of_no_fit(losses)
    with critic.yardstick_kept_on_error():
        return _bootstrap_and_fit(losses, start, end, critic, alive, context, weight, fit, scaler)


def _bootstrap_and_fit(
    losses: Tensor,
    start: State,
    end: State,
    critic: ErrorCritic,
    alive: Tensor | None,
    context: Tensor | None,
    weight: float | Tensor,
    fit: bool,
    scaler: torch.amp.GradScaler | None,
) -> Report:
    """What `backward` does where there is a critic; the scaler's scale is in `weight` already."""
    T = len(losses)
    history = end.history if isinstance(end, UnrolledState) else None
    has_future, alive = split_alive(alive)
    if history is not None:
        has_future = history.valid if has_future is None else history.valid & has_future
    stands_for = critic.window_is_due() if fit else 0
    if stands_for:
        critic.observe_window(per_sequence(_sent_by_losses(losses, start, end, history, weight), weight), stands_for)
    synthetic = critic.synthetic_gradient(
        tuple(s.detach() for s in end), None if context is None else context[-1], alive
    )
    mixed = None
    if fit and history is not None and critic.target_lambda < 1.0 and critic.learns_gradients:
        assert has_future is not None
        mixed = _mixed_gradients(losses, start, end, critic, synthetic, context, history, has_future, weight)
    dense = fit and history is not None and critic.dense_targets
    looks = (
        dense and losses.device.type == "cpu" and critic.start_is_due()
    )  # an accelerator would have to be waited for
    # A hook costs time, so there is none where nothing is learned at the start alone, nor looked at.
    with (
        gradients_of(start if fit and (looks or not dense) else ()) as (at_start, reached),
        nullcontext() if history is None or dense else history.unwatched(),
    ):
        torch.autograd.backward(*surrogate(losses, end, synthetic, weight))
    if fit and not dense and not reached:
        look_for_start(losses, start, end, stacklevel=5)
    with torch.no_grad():
        synthetic_norm = torch.cat([b.flatten(1) for b in synthetic], dim=1).norm(dim=1).mean()
    if not fit:
        return replace(_report_of_no_fit(losses), synthetic_norm=synthetic_norm)
    valid: Tensor | None
    if dense:
        assert history is not None and has_future is not None
        steps = critic.target_steps(T)
        states, targets = history.at(steps)
        valid = has_future if len(steps) == T else select_steps(has_future, steps)
        if looks:
            _check_nothing_else_reads_start(at_start, tuple(g[0] for g in targets), history.valid[0])
        if mixed is not None:
            targets = mixed
        history.clear()
    else:
        states, targets = tuple(s.detach().unsqueeze(0) for s in start), tuple(g.unsqueeze(0) for g in at_start)
        # of a start that an episode's first step clears, nothing comes back
        steps, valid = (0,), None if has_future is None else has_future[:1]
    fitted = critic.fit_window(
        Window(
            states=states,
            gradients=per_sequence(targets, weight),
            valid=valid,
            losses=losses.detach(),
            # without a history `alive` alone tells of starts
            first=~history.valid if history is not None else None if has_future is None else ~has_future,
            end=tuple(s.detach() for s in end),
            alive=alive,
            context=context,
            steps=steps,
        )
    )
    if fitted.loss.requires_grad:  # not if the critic is frozen
        (fitted.loss if scaler is None else scaler.scale(fitted.loss)).backward()
    with torch.no_grad():
        return report_of(fitted, synthetic_norm)


def _sent_by_losses(
    losses: Tensor, start: State, end: State, history: StateHistory | None, weight: float | Tensor
) -> State:
    """weight * d sum_t l_t / d s_0, what the losses inside the window alone send to its start: the bound's yardstick must not contain
    predictions. With the weight, at the scale at which half precision does not lose it."""
    with keeping_graph(), nullcontext() if history is None else history.unwatched():
        found = torch.autograd.grad(
            losses, start, torch.ones_like(losses) * weight, retain_graph=True, allow_unused=True
        )
    if all(g is None for g in found):
        look_for_start(losses, start, end, stacklevel=6)
    return tuple(torch.zeros_like(s) if g is None else g for g, s in zip(found, start, strict=True))


def _check_nothing_else_reads_start(arrived: Sequence[Tensor], recorded: State, valid: Tensor) -> None:
    """Warns where more comes to the window's start than through its first step: inside the window the same would not be recorded."""
    missed, whole = (
        torch.cat([g.flatten(1).to(torch.float32) for g in gradients], dim=1)[valid].norm()
        for gradients in ([a - r.to(a.dtype) for a, r in zip(arrived, recorded, strict=True)], arrived)
    )
    if missed > 0.02 * whole > 0:  # nothing at all has a warning of its own
        warnings.warn(
            "losses: found some that depend on `start` other than through `core.unroll`, such as one on a step's input state: inside the "
            "window the critic would not learn of them; let each step give out what losses read of the state before it, or use "
            "dense_targets=False",
            stacklevel=5,
        )


def _report_of_no_fit(losses: Tensor) -> Report:
    nan = losses.new_full((), torch.nan)
    return Report(**{field.name: nan for field in fields(Report)})


def report_of(fit: CriticFit, synthetic_norm: Tensor) -> Report:
    """The report of a backward pass after which the critic was fitted so."""
    return Report(
        critic_loss=fit.loss.detach(),
        explained_variance=fit.explained_variance,
        cosine=fit.cosine,
        predicted_norm=fit.predicted_norm,
        target_norm=fit.target_norm,
        synthetic_norm=synthetic_norm,
        norm_ratio=norm_ratio(fit.predicted_norm, fit.target_norm),
        error=fit.error,
        target_variance=fit.target_variance,
    )


def surrogate(
    losses: Tensor, end: State, synthetic: State, weight: float | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Roots of a backward pass and what to send into them: <losses, weight> + <end, weight b>, without building it.

    An end that is a part of the start (a core that does not change it) is a leaf, and right to receive it. One without graph, such as
    a count of steps, sends nothing back.
    """
    pairs = [(losses, torch.ones_like(losses) * weight)]
    pairs += [(s, (b * weight).to(s.dtype)) for b, s in zip(synthetic, end, strict=True) if s.requires_grad]
    return [root for root, _ in pairs], [vector for _, vector in pairs]


def _mixed_gradients(
    losses: Tensor,
    start: State,
    end: State,
    critic: ErrorCritic,
    synthetic: State,
    context: Tensor | None,
    history: StateHistory,
    alive: Tensor,
    weight: float | Tensor,
) -> State:
    """weight * G_j, tuple of [T, B, ...], mixed with the synthetic gradients b_j of every state on the way.

    One backward pass of the whole window cannot tell them: from its end, what b_j alone sends back from the middle cannot be had.
    The graph is kept, and no `.grad` is touched. A state behind a cut inside the window does not lead to its start, so the leaves of
    such cuts are asked for as well.
    """
    T, B = losses.shape
    inside = tuple(s.flatten(0, 1) for s in history.states)
    b = critic.synthetic_gradient(inside, None if context is None else context[:-1].flatten(0, 1), alive.flatten())
    with history.mixing(critic.target_lambda, tuple((g * weight).unflatten(0, (T, B)) for g in b)):
        roots, vectors = surrogate(losses, end, synthetic, weight)
        leaves = [*start, *getattr(end, "leaves", ())]
        with keeping_graph():
            found = torch.autograd.grad(roots, leaves, vectors, retain_graph=True, allow_unused=True)
        if all(g is None for g in found):
            look_for_start(losses, start, end, stacklevel=6)
    gradients = history.gradients
    history.clear()
    return gradients


@contextmanager
def gradients_of(leaves: State) -> Iterator[tuple[list[Tensor], set[int]]]:
    """Collects what one backward pass sends to `leaves`, whatever their `.grad` held before, and which of them it comes to."""
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    reached: set[int] = set()

    def record(i: int, gradient: Tensor | None) -> None:
        reached.add(i)
        if gradient is not None:  # autograd's undefined gradient is zero
            gradients[i] = gradient

    handles = [leaf.register_hook(partial(record, i)) for i, leaf in enumerate(leaves)]
    try:
        yield gradients, reached
    finally:
        for handle in handles:
            handle.remove()


def look_for_start(losses: Tensor, start: State, end: State, stacklevel: int) -> None:
    """Says so where neither losses nor end come from `start`, to which a backward pass has sent nothing.

    It walks the whole graph, so call it in that case alone. A core without memory, or a loop that puts another state in the place of the
    first one, is no mistake, and only warned of; a graph that ends in another leaf over the same memory was unrolled from another cut.

    Raises:
        RuntimeError: if the window was unrolled from another cut of the same state.
    """
    leaves = _leaves_behind((losses, *end))
    if any(leaf is s for leaf in leaves for s in start):
        return  # what comes back is zero, or undefined, for reasons of the core's own
    message = "start: no loss depends on it; unroll the core from the very tensors that `dni_rl.cut` returned"
    others = {(leaf.data_ptr(), leaf.shape) for leaf in leaves if not isinstance(leaf, torch.nn.Parameter)}
    if any(s.numel() and (s.data_ptr(), s.shape) in others for s in start):
        raise RuntimeError(message)
    warnings.warn(
        f"{message}. What the critic learns there is 0, and so is what its bound is measured by; ignore it if the core has no memory, "
        "or if your loop replaces the state at its first step",
        stacklevel=stacklevel,
    )


def _leaves_behind(roots: State) -> list[Tensor]:
    """All leaves that gradients of the roots would come to."""
    leaves = [root for root in roots if root.is_leaf and root.requires_grad]
    seen: set[Any] = set()
    nodes: list[Any] = [root.grad_fn for root in roots]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):  # of nodes that accumulate into a leaf
            leaves.append(leaf)
        nodes += [following for following, _ in node.next_functions]
    return leaves


def check_window(
    losses: Tensor,
    start: State,
    end: State,
    critic: ErrorCritic | None,
    alive: Tensor | None,
    context: Tensor | None,
    weight: float | Tensor | None,
    fit: bool,
) -> tuple[int, int]:
    """Checks the arguments of a backward pass over a window, before anything is touched; see `backward` for what it raises.

    Returns:
        T and B.
    """
    if losses.dim() != 2:
        raise ValueError(
            f"losses: expected [T, B], one loss per step and sequence, got {tuple(losses.shape)}; do not reduce them"
        )
    T, B = losses.shape
    if not (T and B):
        raise ValueError(f"losses: found [T, B] = ({T}, {B}), allowed one step and one sequence or more")
    if not torch.is_grad_enabled():
        raise RuntimeError("backward: gradients are switched off here; call it outside of torch.no_grad()")
    check_weight(weight)
    if losses.dtype in HALF_PRECISION:
        raise ValueError(
            f"losses: found {losses.dtype}, allowed torch.float32 or torch.float64, in which scaled gradients neither overflow nor "
            "vanish; call .float() on what they are computed from"
        )
    if not losses.requires_grad:
        raise RuntimeError("losses: no gradient flows from them; were they computed under torch.no_grad()?")
    for name, state in (("start", start), ("end", end)):
        if not isinstance(state, (tuple, list)) or not all(isinstance(s, Tensor) for s in state):
            raise ValueError(f"{name}: found {type(state).__name__}, allowed a state, a tuple of tensors [B, ...]")
    if [s.shape for s in start] != [s.shape for s in end]:
        raise ValueError(
            f"start, end: expected equal shapes, got {[tuple(s.shape) for s in start]} and {[tuple(s.shape) for s in end]}"
        )
    if any(len(s) != B for s in start):
        raise ValueError(f"start: expected batch size {B} as in losses, got {[tuple(s.shape) for s in start]}")
    if not all(s.is_leaf and s.requires_grad for s in start):
        raise RuntimeError(
            "start: expected the leaves that `dni_rl.cut(state)` returned before the window was unrolled"
        )
    check_alive(alive, T, B)
    if critic is None:
        return T, B
    history = end.history if isinstance(end, UnrolledState) else None
    if history is not None and history.valid.shape != (T, B):
        raise ValueError(
            f"losses: found [T, B] = ({T}, {B}), allowed {tuple(history.valid.shape)}, the window that `end` was unrolled over; unroll all "
            "of a window's steps in one call, and pass one loss for each of its steps and sequences, 0 where there is none"
        )
    if not hasattr(critic, "target_rms"):  # and not by its type, which torch.compile changes
        raise ValueError(
            f"critic: found {type(critic).__name__}, allowed one error critic for the whole state, or None"
        )
    graph = [s for s in end if s.requires_grad]  # a count of steps, say, may have none
    if not graph:
        raise RuntimeError("end: expected the state that `core.unroll` returned, with its graph; it was detached")
    if all(s.is_leaf and not any(s is leaf for leaf in start) for s in graph):
        raise RuntimeError(
            "end: expected the state that `core.unroll` returned, with its graph; it was cut; call `dni_rl.cut` after `backward`, where "
            "the next window starts"
        )
    check_precision(critic.target_rms.dtype, reduce(torch.promote_types, (s.dtype for s in end)))
    shapes = getattr(critic, "state_shapes", tuple((size,) for size in critic.state_sizes))
    of_core = tuple(tuple(s.shape[1:]) for s in start)
    if of_core == shapes[:-1] and hasattr(critic, "watch"):
        raise ValueError(
            f"critic: found a {type(critic).__name__} whose memory is not in the state; unroll `critic.watch(core)` in place of the core"
        )
    if of_core != shapes:
        raise ValueError(
            f"critic: found one for states [B, ...] of {shapes}, allowed {of_core} as the core's; build it with core.state_sizes, flatten "
            "in the cell what is no vector, or take ConvGradientCritic where all of them are feature maps (C, Y, X)"
        )
    if critic.target_rms.device != losses.device:
        raise ValueError(
            f"critic: found it on {critic.target_rms.device}, allowed {losses.device} as the losses; use critic.to({str(losses.device)!r})"
        )
    if critic.target_lambda < 1.0 and T > 1 and not isinstance(end, UnrolledState):
        raise ValueError(
            f"end: target_lambda={critic.target_lambda} needs the states inside the window, which the state that `core.unroll` "
            "returned carries; use it as it is, or target_lambda=1"
        )
    if history is None and T > 1 and fit and critic.dense_targets:
        warnings.warn(
            "end: found a plain tuple, without the history of the window: the critic learns at its start alone, and where an episode's "
            "first step clears that, it is taught 0; pass the state that `core.unroll` returned as it is, or use dense_targets=False and "
            "alive [T + 1, B] with 0 in its first row where the start is cleared",
            stacklevel=4,  # the line that calls backward
        )
    if history is not None and history.steps is not None and fit and critic.dense_targets:
        missing = sorted(set(critic.target_steps(T)) - set(history.steps))
        if missing:
            raise RuntimeError(
                f"end: found the states before the steps {history.steps} recorded, and the critic learns at {tuple(missing)} as well; "
                "set the core's targets_per_window to the critic's before it is unrolled, or to None"
            )
    if critic.context_size and (not isinstance(context, Tensor) or context.shape != (T + 1, B, critic.context_size)):
        found = (
            tuple(context.shape) if isinstance(context, Tensor) else None if context is None else type(context).__name__
        )
        raise ValueError(
            f"context: expected [T + 1, B, Z] = ({T + 1}, {B}, {critic.context_size}), the last row for `end`, got {found}"
        )
    if not critic.context_size and context is not None:
        raise ValueError(
            f"context: got {tuple(context.shape)}, but the critic was built with context_size=0; leave it out"
        )
    return T, B
