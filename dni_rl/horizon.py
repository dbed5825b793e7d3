"""How far back gradients really reach: the credit horizon of a core, a loss and a way of cutting, as numbers by lag.

Use it offline on a checkpoint, or on a schedule during training. Everything is measured on one batch of long
sequences with frozen parameters; no `.grad` is touched and nothing is trained.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dni_rl.cores.base import Core, State, UnrolledState
from dni_rl.cores.timescales import Bootstrap, LevelledState


@dataclass(frozen=True, slots=True)
class CreditHorizon:
    """Credit by lag; entry n - 1 of each curve belongs to lag n. Definitions in `credit_horizon`.

    Attributes:
        true_norm: [N] RMS norm of the true gradient over all pairs of a loss and a state n steps apart in one episode.
        delivered_norm: [N] RMS norm of the part of it that the method delivers.
        cosine: [N] between delivered and true gradient, all pairs joined into one vector; 0 where either vanishes.
        num_pairs: [N] how many pairs were averaged; where it is 0 the curves are 0.
    """

    true_norm: Tensor
    delivered_norm: Tensor
    cosine: Tensor
    num_pairs: Tensor

    @property
    def effective_horizon(self) -> Tensor:
        """Largest lag whose credit is delivered with cosine above 0.5; 0 if there is none. In steps, a scalar."""
        lags = torch.arange(1, len(self.cosine) + 1, device=self.cosine.device)
        return (lags * (self.cosine > 0.5)).amax()

    @property
    def lag_90(self) -> Tensor:
        """Smallest lag up to which 90 % of the delivered norm, summed over lags, lies; 0 if nothing is delivered."""
        return _lag_of_share(self.delivered_norm, 0.9)

    @property
    def true_lag_90(self) -> Tensor:
        """The same for the true gradient: how far the task and the core's own dynamics reach, without any cut."""
        return _lag_of_share(self.true_norm, 0.9)

    @property
    def delivered_share(self) -> Tensor:
        """Norm delivered over true norm, both summed over lags. Above 1 where a critic overestimates."""
        return self.delivered_norm.sum() / self.true_norm.sum().clamp_min(torch.finfo(self.true_norm.dtype).tiny)

    def scalars(self, prefix: str = "credit/") -> dict[str, Tensor]:
        """Numbers for a training log: scalar tensors, still on the device; the curves stay attributes."""
        return {
            f"{prefix}horizon": self.effective_horizon,
            f"{prefix}lag_90": self.lag_90,
            f"{prefix}true_lag_90": self.true_lag_90,
            f"{prefix}delivered_share": self.delivered_share,
        }


def credit_horizon(
    core: Core,
    loss_fn: Callable[[Tensor], Tensor],
    inputs: Tensor,
    state: State | None = None,
    first: Tensor | None = None,
    *,
    window: int | None = None,
    critic: Bootstrap | None = None,
    unroll: Callable[[Tensor, State, Tensor | None], tuple[Tensor, LevelledState, Tensor]] | None = None,
    context: Tensor | None = None,
    loss_times: Sequence[int] | None = None,
    num_lags: int | None = None,
    margin: int = 0,
) -> CreditHorizon:
    """Measures, by lag, the true gradient and the part of it that truncated windows with a critic deliver.

    Let s_j be the state that step j starts from, l_t the loss of step t, and lag the number of steps between the two:

        g_n(j) = d l_t / d s_j,    t = j + n - 1,  n >= 1         true gradient (full BPTT)

    s_j is what step j - 1 left behind, so g_n(j) is *delivered* if it enters the parameter gradient of step j - 1.
    Windows of K steps are cut at s_0, s_K, s_2K, ...; let k(j) >= j be the next cut. Then

        t <  k(j):  delivered exactly, d_n(j) = g_n(j)
        t >= k(j):  delivered by the bootstrap alone, as one vector for all these losses together:

            b(j) = J^T b_k,      b_k = alive * g * stop_gradient(M(s_k)),      J = d s_k / d s_j
            T(j) = J^T G_k,      G_k = sum_{t >= k} d l_t / d s_k              what b(j) stands for

    M predicts a sum, and no measurement can split one vector among the losses it was made of. What can be stated is
    how well it stands for their sum: by the factor |b| / |T| in norm and at the cosine <b, T> / |b| |T|. We let every
    loss in the sum share this one fate, a part g_n of T being delivered with

        |d_n| = |g_n| |b| / |T|,      <d_n, g_n> = |g_n|^2 <b, T> / |T|^2

    which is what the scaled rotation that carries T to b does to the parts of T that lie in its plane; the parts so
    delivered add up to b. Hence b = T (an oracle) delivers everything, b = 0 (no critic) exactly what lies inside the
    window, and lags are told apart by *where* they occur: lag n is measured at the states that have credit to receive
    from n steps later. Curves join all pairs (j, t) of one lag within one episode:

        true_norm = sqrt(mean |g_n|^2),    delivered_norm = sqrt(mean |d_n|^2)
        cosine    = sum <d_n, g_n> / sqrt(sum |d_n|^2  sum |g_n|^2)

    Where cuts are not of the whole state at once, as with `MultiTimescaleCore.unroll_in_ticks`, pass how the method
    unrolls. Credit then arrives in parts: i_n(j) through the graph with its cuts, the rest r_n = g_n - i_n by
    bootstraps alone, b(j) being all that they send to s_j and T(j) = sum_n r_n(j) what they stand for. With a = <b,
    T> / |T|^2, as above for r = g,

        |d_n|^2 = |i_n + a r_n|^2 + |r_n|^2 (|b|^2 / |T|^2 - a^2),      <d_n, g_n> = <i_n + a r_n, g_n>

    Losses fall on every phase of a window. Without a critic and with gradients of equal norm the cosine at lag n is
    therefore sqrt((K - n) / K), above 0.5 for n < 3 K / 4.

    What it does not see: synthetic gradient at states without any true later credit; and where losses are dense, a
    critic that meets the near part of T well is credited for the far part too, so read `lag_90` beside
    `effective_horizon`. The truth is a sample, a critic predicts its mean: noise in the losses lowers the cosine of a
    perfect critic.

    Cost: one unroll of the T steps and one backward pass per loss time; with a critic one more unroll and three passes.
    Memory as for full BPTT over T steps.

    Args:
        core: any core whose `unroll` records its history, as the contract asks.
        loss_fn: maps outputs [T, B, H] to losses [T, B]; the loss of step t depends on outputs up to step t.
        inputs: [T, B, D].
        state: state before step 0; the initial state if None.
        first: [T, B] bool, True where an episode starts; no credit crosses it.
        window: K, steps between cuts; None for no cuts, where delivered and true gradient agree.
        critic: bootstraps at cuts; None for plain truncated BPTT. Discount, scale and bound are part of what it
            delivers.
        unroll: instead of window and critic, how the method unrolls the whole batch: (inputs, state, first) to
            (outputs, next state, bootstraps), for example `partial(core.unroll_in_ticks, ticks=8, critic=critic)`.
        context: [T + 1, B, Z], as in `dni_rl.backward`.
        loss_times: which t to measure, each in [0, T); None for at most 64, evenly spread over the batch and over
            window phases.
        num_lags: N, the longest lag reported; T if None.
        margin: leaves out the states of the last `margin` steps. A critic also predicts losses after the batch, which
            the truth cannot contain; where sequences do not end with the batch, choose it longer than the memory of
            the task.

    Returns:
        The curves, float64, on the device of the losses, without synchronising with it.

    Raises:
        ValueError: if a shape, time or count is out of range, or window, critic and unroll do not go together.
        RuntimeError: if the core records no history.
    """
    T = _check(inputs, window, critic, context, loss_times, num_lags, margin)
    if unroll is not None and window is not None:
        raise ValueError("unroll: it replaces window= and critic=; leave those out")
    if loss_times is None:
        loss_times = _spread(T, window)
    start = tuple(
        s.detach().requires_grad_() for s in (core.initial_state(inputs.shape[1]) if state is None else state)
    )
    with torch.enable_grad():
        outputs, end = core.unroll(inputs.detach(), start, first)
        losses = loss_fn(outputs)
    if losses.shape != inputs.shape[:2]:
        raise ValueError(f"loss_fn: expected losses [T, B] = {tuple(inputs.shape[:2])}, got {tuple(losses.shape)}")
    if not isinstance(end, UnrolledState):
        raise RuntimeError(f"core: {type(core).__name__}.unroll returned no history; it must return an UnrolledState")
    starts = torch.zeros(losses.shape, dtype=torch.bool, device=losses.device) if first is None else first

    norm_ratio = alignment = torch.zeros(losses.shape, dtype=torch.float64, device=losses.device)
    if critic is not None and window is not None:
        total = _gradients(losses.sum(), start, end)
        norm_ratio, alignment = _bootstrap_quality(core, inputs, end, total, starts, window, critic, context)
    method = None if unroll is None else _Method(unroll, loss_fn, inputs, start, first)
    if method is not None:
        total = _gradients(losses.sum(), start, end)
        norm_ratio, alignment = method.bootstrap_quality(_join(total).double())

    N = T if num_lags is None else num_lags
    sums = torch.zeros(4, N, dtype=torch.float64, device=losses.device)  # true, delivered, inner product, count
    for t in loss_times:
        gradient = _join(_gradients(losses[t].sum(), start, end))[: t + 1].double()
        true = gradient.square().sum(-1)  # [t + 1, B], |g_n(j)|^2
        # no episode starts at j, ..., t: otherwise l_t does not depend on s_j
        connected = starts[: t + 1].flip(0).cumsum(0).flip(0) == 0
        connected[T - margin :] = False
        true = torch.where(connected, true, 0.0)
        delivered, inner = true.clone(), true.clone()
        if window is not None:
            reached = math.floor(t / window) * window + 1  # first j with t < k(j)
            delivered[:reached] *= norm_ratio[:reached]
            inner[:reached] *= alignment[:reached]
        if method is not None:
            inside = method.inside(t)[: t + 1]
            rest, a = gradient - inside, alignment[: t + 1]
            mixed = inside + a.unsqueeze(-1) * rest
            delivered = mixed.square().sum(-1) + rest.square().sum(-1) * (norm_ratio[: t + 1] - a.square())
            inner = (mixed * gradient).sum(-1)
            delivered, inner = (torch.where(connected, x, 0.0) for x in (delivered, inner))
        curves = torch.stack([true, delivered, inner, connected.to(true.dtype)]).sum(-1).flip(-1)  # [4, t + 1], by lag
        sums[:, : min(N, t + 1)] += curves[:, :N]
    true, delivered, inner, count = sums
    pairs = count.clamp_min(1.0)
    joint = (true * delivered).sqrt()
    return CreditHorizon(
        true_norm=(true / pairs).sqrt(),
        delivered_norm=(delivered / pairs).sqrt(),
        cosine=torch.where(joint > 0, inner / joint, 0.0),
        num_pairs=count,
    )


class _Method:
    """The graph of a method that cuts parts of the state; see the last equations of `credit_horizon`."""

    def __init__(
        self,
        unroll: Callable[[Tensor, State, Tensor | None], tuple[Tensor, LevelledState, Tensor]],
        loss_fn: Callable[[Tensor], Tensor],
        inputs: Tensor,
        start: State,
        first: Tensor | None,
    ):
        # States behind a cut lead back to inputs only, not to the start: both have to be asked for, so that the history is
        # passed on the way.
        inputs = inputs.detach().requires_grad_()
        start = tuple(s.detach().requires_grad_() for s in start)
        self.leaves = (*start, inputs)
        with torch.enable_grad():
            outputs, self.end, self.bootstraps = unroll(inputs, start, first)
            self.losses = loss_fn(outputs)
        # What the history notes at a cut is behind it; what the step before receives is the synthetic gradient.
        states = _join(self.end.history.states)
        self.cut = torch.zeros(states.shape, dtype=torch.bool, device=states.device)  # [T, B, S]
        self.synthetic = torch.zeros_like(states, dtype=torch.float64)
        edges = [0]
        for s in start:
            edges.append(edges[-1] + s.shape[-1])
        for step, part, synthetic in self.end.cuts:
            columns = slice(edges[part.start], edges[part.stop])
            self.cut[step, :, columns] = True
            if synthetic is not None:
                self.synthetic[step, :, columns] = _join(synthetic).double()
        self.cut[0] = True  # the window starts with a cut of its own, at which no critic is asked

    def inside(self, t: int) -> Tensor:
        """[T, B, S] what the loss of step t sends through the graph."""
        return self._arriving(self.losses[t].sum()).masked_fill(self.cut, 0.0)

    def bootstrap_quality(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """[T, B] |b|^2 / |T|^2 and <b, T> / |T|^2, for total [T, B, S], the true gradient of all losses."""
        inside = self._arriving(self.losses.sum()).masked_fill(self.cut, 0.0)
        b = torch.where(self.cut, self.synthetic, self._arriving(self.bootstraps.sum()))
        tail = total - inside
        square = tail.square().sum(-1)
        rounding = (64 * torch.finfo(self.losses.dtype).eps) ** 2 * total.square().sum(-1)  # of total - inside
        scale = torch.where(square > rounding, square, torch.inf)
        return b.square().sum(-1) / scale, (b * tail).sum(-1) / scale

    def _arriving(self, root: Tensor) -> Tensor:
        return _join(_gradients(root, self.leaves, self.end)).double()


def _bootstrap_quality(
    core: Core,
    inputs: Tensor,
    end: UnrolledState,
    total: State,
    starts: Tensor,
    window: int,
    critic: Bootstrap,
    context: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Carries M(s_k) and the truth G_k from every cut k through the window before it; see `credit_horizon`.

    Returns [T, B] |b|^2 / |T|^2 and [T, B] <b, T> / |T|^2 at every state; both 0 where T is 0, and in the window at
    the end of the batch, beyond which nothing is measured. All windows run side by side, as one batch.
    """
    T, B = starts.shape
    W = (T - 1) // window  # full windows that end in a cut inside the batch; W + 1 cuts: 0, window, ..., W window
    steps = slice(0, W * window)
    cuts = slice(0, W * window + 1, window)

    # At the cuts: the state is recorded with resets applied; where one was applied, there is no future.
    alive = ~starts[cuts].flatten()  # [(W + 1) * B]
    at_cuts = tuple(s[cuts].flatten(0, 1) for s in end.history.states)
    with torch.no_grad():
        synthetic = critic.synthetic_gradient(at_cuts, None if context is None else context[cuts].flatten(0, 1), alive)
    truth = tuple(g[cuts].flatten(0, 1) for g in total)
    b, tail = (_join(vector).unflatten(0, (W + 1, B)).double() for vector in (synthetic, truth))  # [W + 1, B, S]

    if W:  # between the cuts, by the Jacobians of each window
        by_window = [
            x[steps].unflatten(0, (W, window)).transpose(0, 1).flatten(1, 2) for x in (inputs.detach(), starts)
        ]
        start = tuple(s[:-B].clone().requires_grad_() for s in at_cuts)
        with torch.enable_grad():
            _, ends = core.unroll(by_window[0], start, by_window[1])
        assert isinstance(ends, UnrolledState)
        inside = []
        for vector, at_cut in ((synthetic, b), (truth, tail)):
            carried = _join(_gradients(tuple(ends), start, ends, tuple(v[B:] for v in vector))).double()
            carried = carried.unflatten(1, (W, B)).transpose(0, 1).flatten(0, 1)  # [W * window, B, S]
            carried = torch.cat([carried, at_cut[-1:]])
            carried[::window] = at_cut
            inside.append(carried)
        b, tail = inside
    square = tail.square().sum(-1)
    scale = torch.where(square > 0, square, torch.inf)
    quality = torch.zeros(2, T, B, dtype=torch.float64, device=starts.device)
    quality[:, : len(b)] = torch.stack([b.square().sum(-1), (b * tail).sum(-1)]) / scale
    return quality[0], quality[1]


def _gradients(
    roots: Tensor | State, leaves: State, end: UnrolledState, vectors: State | None = None
) -> tuple[Tensor, ...]:
    """Gradients [T, B, ...] that arrive at every state of a window; the graph is kept, no `.grad` is touched."""
    end.history.clear()
    roots = (roots,) if isinstance(roots, Tensor) else roots
    pairs = [(r, v) for r, v in zip(roots, vectors or (None,) * len(roots), strict=True) if r.requires_grad]
    if pairs:
        # Towards the leaves, hence past every state on the way, where the history takes notes.
        torch.autograd.grad([r for r, _ in pairs], leaves, [v for _, v in pairs], retain_graph=True, allow_unused=True)
    valid = end.history.valid
    gradients = tuple(
        torch.where(valid.view(*valid.shape, *[1] * (g.dim() - 2)), g, 0.0) for g in end.history.gradients
    )
    end.history.clear()
    return gradients


def _join(state: State) -> Tensor:
    """Tuple of [..., B, size] to one [..., B, S] of the sizes together."""
    return torch.cat(state, dim=-1)


def _lag_of_share(norm: Tensor, share: float) -> Tensor:
    below = norm.cumsum(0) < share * norm.sum()
    return (below.sum() + 1) * (norm.sum() > 0)


def _spread(T: int, window: int | None) -> list[int]:
    """At most 64 loss times from the last step backwards, at a stride that meets every phase of a window."""
    stride = math.ceil(T / 64)
    while window is not None and math.gcd(stride, window) > 1:
        stride += 1
    return list(range(T - 1, -1, -stride))


def _check(
    inputs: Tensor,
    window: int | None,
    critic: Bootstrap | None,
    context: Tensor | None,
    loss_times: Sequence[int] | None,
    num_lags: int | None,
    margin: int,
) -> int:
    T = len(inputs)
    if window is not None and window < 1:
        raise ValueError(f"window: found {window}, allowed 1 or more steps, or None for full BPTT")
    if critic is not None and window is None:
        raise ValueError("critic: it is used at cuts; give window=, the steps between them")
    if context is not None and context.shape[:2] != (T + 1, inputs.shape[1]):
        raise ValueError(
            f"context: expected [T + 1, B, Z] = ({T + 1}, {inputs.shape[1]}, Z), got {tuple(context.shape)}"
        )
    if loss_times is not None and (not loss_times or not all(0 <= t < T for t in loss_times)):
        raise ValueError(f"loss_times: expected at least one time, each in [0, {T}), got {list(loss_times)}")
    if num_lags is not None and not 1 <= num_lags <= T:
        raise ValueError(f"num_lags: found {num_lags}, allowed 1 to {T}, the length of the batch")
    if not 0 <= margin < T:
        raise ValueError(f"margin: found {margin}, allowed 0 to {T - 1}")
    return T
