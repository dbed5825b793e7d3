"""How far back gradients really reach: the credit horizon of a core, a loss and a way of cutting, as numbers by lag.

Use it offline on a checkpoint, or on a schedule during training. Everything is measured on one batch of long
sequences with frozen parameters; no `.grad` is touched and nothing is trained.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dni_rl.cores.base import Core, State, UnrolledState, are_counts
from dni_rl.cores.timescales import Bootstrap, LevelledState
from dni_rl.targets import before_each_step, keeping_graph


@dataclass(frozen=True, slots=True)
class CreditHorizon:
    """Credit by lag; entry n - 1 of each curve belongs to lag n. Definitions in `credit_horizon`.

    Attributes:
        true_norm: [N] RMS norm of the true gradient over all pairs of a loss and a state n steps apart in one episode.
        delivered_norm: [N] RMS norm of the part of it that the method delivers.
        cosine: [N] between delivered and true gradient, all pairs joined into one vector; 0 where either vanishes.
        num_pairs: [N] how many pairs were averaged; where it is 0 the curves are 0.
        expected_cosine: [N] the same cosine, the bootstraps judged by their averages over sequences instead of one by one; None where
            no probe was given.
    """

    true_norm: Tensor
    delivered_norm: Tensor
    cosine: Tensor
    num_pairs: Tensor
    expected_cosine: Tensor | None = None

    @property
    def effective_horizon(self) -> Tensor:
        """Largest lag whose credit is delivered with cosine above 0.5; 0 if there is none. In steps, a scalar."""
        return _largest_lag(self.cosine)

    @property
    def expected_horizon(self) -> Tensor | None:
        """The same of `expected_cosine`; None where there is none. It reaches a memory before it is learned."""
        return None if self.expected_cosine is None else _largest_lag(self.expected_cosine)

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
        expected = self.expected_horizon
        return {
            f"{prefix}horizon": self.effective_horizon,
            f"{prefix}lag_90": self.lag_90,
            f"{prefix}true_lag_90": self.true_lag_90,
            f"{prefix}delivered_share": self.delivered_share,
        } | ({} if expected is None else {f"{prefix}expected_horizon": expected})


@torch.enable_grad()  # what autograd is asked below would be zeros without a word under torch.no_grad()
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
    alive: Tensor | None = None,
    probe: Tensor | None = None,
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

    The truth is a sample, a critic predicts its mean: noise in the losses, and policy gradients are mostly noise, lowers the cosine
    of a perfect critic, and what parameters are moved by is the mean. With a probe z_j, something that the state s_j has to tell
    apart, for example the cue of a memory task, bootstraps are also judged by what they send to all states of one lag n together:

        X_n = sum z_j b(j)^T,    Y_n = sum z_j T(j)^T           [Z, S], over pairs (j, t = j + n - 1) that need a bootstrap
        a_n = <X_n, Y_n> / |Y_n|^2,    q_n = |X_n|^2 / |Y_n|^2

    z is centred and scaled to unit variance over the states measured, so that for a cue of +-1 X_n is the difference that the cue
    makes to the gradient: it is what the parameters get that write z into the state (d s = W z has the gradient sum T z^T), and of
    what differs from sequence to sequence for other reasons it keeps the less, the more sequences there are. With a_n and q_n in
    place of <b, T> / |T|^2 and |b|^2 / |T|^2, and r_n the part of g_n that is left to bootstraps (i_n the rest),

        expected_cosine = sum (<i_n, g_n> + a_n <r_n, g_n>) / sqrt(sum |g_n|^2  sum (|i_n|^2 + 2 a_n <i_n, r_n> + q_n |r_n|^2))

    beyond the window therefore <X_n, Y_n> / |X_n| |Y_n|, the cosine of expectations, and without a critic sqrt((K - n) / K) again. a_n
    counts as 0 where <X_n, Y_n> is not positive by three standard errors (jackknife over up to 16 groups of sequences): what
    cannot be told from chance is not delivered. So give it many sequences, 64 or more for policy gradients.

    What it does not see: synthetic gradient at states without any true later credit; and where losses are dense, a
    critic that meets the near part of T well is credited for the far part too, so read `lag_90` beside
    `effective_horizon`. The expected cosine says nothing about size: a bootstrap of the right direction that is a thousandth of what
    it stands for has a cosine of 1.

    Cost: one unroll of the T steps and one backward pass per loss time; with a critic one more unroll and three passes.
    Memory as for full BPTT over T steps; with a probe another 2 x N x 16 x Z x S numbers.

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
        alive: [T, B], 0 where the state before a step has no future although no episode starts there: nothing is bootstrapped from
            it. Or [T + 1, B] as in `dni_rl.backward`. None where there is no such step; with `unroll`, give it to that.
        probe: [T, B, Z], known before step j or not, what s_j is to tell apart; of any scale; two sequences or more. None for no
            expected cosine. Components that do not vary are left out of account.
        loss_times: which t to measure, each in [0, T); None for at most 64, evenly spread over the batch and over
            window phases.
        num_lags: N, the longest lag reported; T if None.
        margin: leaves out the states of the last `margin` steps. A critic also predicts losses after the batch, which
            the truth cannot contain; where sequences do not end with the batch, choose it longer than the memory of
            the task.

    Returns:
        The curves, float64, on the device of the losses, without synchronising with it.

    Raises:
        ValueError: if a shape, time or count is out of range, window, critic and unroll do not go together, or `core` is a module that
            was not wrapped.
        RuntimeError: if the core records no history, or under `torch.inference_mode()`; `torch.no_grad()` makes no difference.
    """
    if not hasattr(core, "unroll"):
        raise ValueError(f"core: found {type(core).__name__} without `unroll`, allowed a core; use dni_rl.wrap(module)")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "credit_horizon: found torch.inference_mode(), which records no graph, allowed torch.no_grad() or neither; call it outside"
        )
    if loss_times is not None:
        loss_times = [int(t) for t in loss_times]  # of a tensor or an array, too
    T = _check(inputs, window, critic, context, probe, loss_times, num_lags, margin)
    alive = before_each_step(alive, T, inputs.shape[1])
    if unroll is not None and not (window is None and context is None and alive is None):
        raise ValueError("unroll: it replaces window=, critic=, context= and alive=; give it those that it needs")
    start = tuple(
        s.detach().requires_grad_() for s in (core.initial_state(inputs.shape[1]) if state is None else state)
    )
    with torch.enable_grad():
        with _own_buffers(core):
            outputs, end = core.unroll(inputs.detach(), start, first)
        losses = loss_fn(outputs)
    if losses.shape != inputs.shape[:2]:
        raise ValueError(f"loss_fn: expected losses [T, B] = {tuple(inputs.shape[:2])}, got {tuple(losses.shape)}")
    if not isinstance(end, UnrolledState):
        raise RuntimeError(f"core: {type(core).__name__}.unroll returned no history; it must return an UnrolledState")
    starts = torch.zeros(losses.shape, dtype=torch.bool, device=losses.device) if first is None else first

    b = tail = None  # [T, B, S] what bootstraps send to each state, and what they stand for
    if critic is not None and window is not None:
        total = _gradients(losses.sum(), start, end)
        b, tail = _bootstraps(core, inputs, end, total, starts, window, critic, context, alive)
    method = None if unroll is None else _Method(unroll, loss_fn, inputs, start, first)
    if loss_times is None:
        loss_times = _spread(T, window if method is None else method.phases)
    if method is not None:
        total = _gradients(losses.sum(), start, end)
        b, tail = method.bootstraps_and_tail(_join(total).double())
    norm_ratio = alignment = torch.zeros(losses.shape, dtype=torch.float64, device=losses.device)
    if b is not None and tail is not None:
        square = tail.square().sum(-1)
        scale = torch.where(square > 0, square, torch.inf)
        norm_ratio, alignment = b.square().sum(-1) / scale, (b * tail).sum(-1) / scale

    N = T if num_lags is None else num_lags
    sums = torch.zeros(4, N, dtype=torch.float64, device=losses.device)  # true, delivered, inner product, count
    expected = None if probe is None else _Expected(probe, T - margin, N, b, tail)
    for t in loss_times:
        gradient = _join(_gradients(losses[t].sum(), start, end))[: t + 1].double()
        # no episode starts at j, ..., t: otherwise l_t does not depend on s_j
        connected = starts[: t + 1].flip(0).cumsum(0).flip(0) == 0
        connected[T - margin :] = False
        inside = gradient if method is None else method.inside(t)[: t + 1]  # i_n
        if window is not None:  # before the first j with t < k(j) all of it is left to the bootstrap
            inside = gradient.clone()
            inside[: t // window * window + 1] = 0.0
        rest, a = gradient - inside, alignment[: t + 1]
        mixed = inside + a.unsqueeze(-1) * rest
        delivered = mixed.square().sum(-1) + rest.square().sum(-1) * (norm_ratio[: t + 1] - a.square())  # [t + 1, B]
        measured = torch.stack([gradient.square().sum(-1), delivered, (mixed * gradient).sum(-1)])
        measured = torch.where(connected, measured, 0.0)
        curves = torch.cat([measured, connected.to(measured.dtype).unsqueeze(0)]).sum(-1).flip(-1)  # [4, t + 1], by lag
        sums[:, : min(N, t + 1)] += curves[:, :N]
        if expected is not None:
            expected.add(gradient, inside, connected)
    true, delivered, inner, count = sums
    pairs = count.clamp_min(1.0)
    joint = (true * delivered).sqrt()
    return CreditHorizon(
        true_norm=(true / pairs).sqrt(),
        delivered_norm=(delivered / pairs).sqrt(),
        cosine=torch.where(joint > 0, inner / joint, 0.0),
        num_pairs=count,
        expected_cosine=None if expected is None else expected.cosine(),
    )


class _Expected:
    """The expected cosine of `credit_horizon`, gathered one loss time after the other.

    Args:
        probe: [T, B, Z].
        num_states: states from that one on are not measured.
        num_lags: N.
        b: [T, B, S] what bootstraps send to each state, and tail, what they stand for; None where nothing bootstraps.
    """

    def __init__(self, probe: Tensor, num_states: int, num_lags: int, b: Tensor | None, tail: Tensor | None):
        z = probe.detach().double()
        deviation, mean = torch.std_mean(z[:num_states].flatten(0, 1), dim=0, correction=0)
        varies = deviation > 1e-6 * mean.abs()  # else it is rounding
        self.z = (z - mean) * (varies / torch.where(varies, deviation, 1.0))
        self.G = min(z.shape[1], 16)
        self.vectors = None if b is None or tail is None else self._grouped(torch.stack([b, tail]))
        width = 0 if b is None else b.shape[-1]
        self.sums = z.new_zeros(num_lags, 2, self.G, z.shape[-1] * width)  # X_n and Y_n, by group
        self.products = z.new_zeros(num_lags, 5)  # <g, g>, <i, g>, <i, i>, <i, r>, <r, r>

    def add(self, gradient: Tensor, inside: Tensor, connected: Tensor) -> None:
        """Adds the pairs of the loss of step t: gradient and inside [t + 1, B, S], connected [t + 1, B]."""
        steps, N = len(gradient), len(self.sums)
        g = torch.where(connected.unsqueeze(-1), gradient, 0.0)
        i = torch.where(connected.unsqueeze(-1), inside, 0.0)
        r = g - i
        products = torch.stack([(x * y).sum((1, 2)) for x, y in ((g, g), (i, g), (i, i), (i, r), (r, r))], -1)
        self.products[:steps] += products.flip(0)[:N]
        if self.vectors is None:
            return
        rounding = (64 * torch.finfo(torch.float32).eps) ** 2 * g.square().sum(-1)  # of gradient - inside
        weight = (r.square().sum(-1) > rounding).to(g.dtype)  # [t + 1, B], pairs that need a bootstrap
        probe = self._grouped(self.z[:steps] * weight.unsqueeze(-1))
        outer = torch.einsum("jmgz,ojmgs->jogzs", probe, self.vectors[:, :steps])
        self.sums[:steps] += outer.flatten(3).flip(0)[:N]

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., B, F] to [..., M, G, F], sequence b in group b mod G; zeros where there is none."""
        missing = -x.shape[-2] % self.G
        return torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, self.G))

    def cosine(self) -> Tensor:
        """[N], in [-1, 1] but for rounding."""
        x, y = self.sums.unbind(1)  # [N, G, Z * S]
        X, Y = x.sum(1), y.sum(1)
        product, G = (X * Y).sum(-1), x.shape[1]
        # the sum without one group, on the scale of the whole
        without = ((X.unsqueeze(1) - x) * (Y.unsqueeze(1) - y)).sum(-1) * (G / (G - 1)) ** 2
        error = ((G - 1) / G * (without - without.mean(1, keepdim=True)).square().sum(1)).sqrt()
        square = Y.square().sum(-1)
        scale = torch.where(square > 0, square, torch.inf)
        a = torch.where(product > 3.0 * error, product, 0.0) / scale
        q = X.square().sum(-1) / scale
        gg, ig, ii, ir, rr = self.products.unbind(-1)
        joint = (gg * (ii + 2.0 * a * ir + q * rr)).clamp_min(0.0).sqrt()
        return torch.where(joint > 0, (ig + a * (gg - ig)) / joint, 0.0)


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
        # States behind a cut lead back to inputs and to the leaf at the cut, those of an upper level whose messages are cut as well to
        # that leaf alone, and none of them to the start: all have to be asked for, so that the history is passed on the way.
        inputs = inputs.detach().requires_grad_()
        start = tuple(s.detach().requires_grad_() for s in start)
        with torch.enable_grad():
            outputs, self.end, self.bootstraps = unroll(inputs, start, first)
            self.losses = loss_fn(outputs)
        self.leaves = (*start, inputs, *self.end.leaves)
        # What the history notes at a cut is behind it; what the step before receives is the synthetic gradient.
        states = _join(self.end.history.states)
        self.cut = torch.zeros(states.shape, dtype=torch.bool, device=states.device)  # [T, B, S]
        self.synthetic = torch.zeros_like(states, dtype=torch.float64)
        edges = [0]
        for s in start:
            edges.append(edges[-1] + s[0].numel())
        last: dict[int, int] = {}  # cut of a part of the state
        gaps = []
        for step, part, synthetic in self.end.cuts:
            gaps.append(step - last.get(part.start, 0))
            last[part.start] = step
            columns = slice(edges[part.start], edges[part.stop])
            self.cut[step, :, columns] = True
            if synthetic is not None:
                self.synthetic[step, :, columns] = _join(synthetic, 1).double()
        self.cut[0] = True  # the window starts with a cut of its own, at which no critic is asked
        self.phases = math.lcm(*gaps)  # steps after which all cuts come again

    def inside(self, t: int) -> Tensor:
        """[T, B, S] what the loss of step t sends through the graph."""
        return self._arriving(self.losses[t].sum()).masked_fill(self.cut, 0.0)

    def bootstraps_and_tail(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """[T, B, S] b(j) and T(j), for total [T, B, S], the true gradient of all losses."""
        inside = self._arriving(self.losses.sum()).masked_fill(self.cut, 0.0)
        b = torch.where(self.cut, self.synthetic, self._arriving(self.bootstraps.sum()))
        tail = total - inside
        rounding = (64 * torch.finfo(self.losses.dtype).eps) ** 2 * total.square().sum(-1)  # of total - inside
        return b, tail.masked_fill((tail.square().sum(-1) <= rounding).unsqueeze(-1), 0.0)

    def _arriving(self, root: Tensor) -> Tensor:
        return _join(_gradients(root, self.leaves, self.end)).double()


def _bootstraps(
    core: Core,
    inputs: Tensor,
    end: UnrolledState,
    total: State,
    starts: Tensor,
    window: int,
    critic: Bootstrap,
    context: Tensor | None,
    has_future: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Carries M(s_k) and the truth G_k from every cut k through the window before it; see `credit_horizon`.

    Returns [T, B, S] b(j) and T(j) at every state; both 0 in the window at the end of the batch, beyond which nothing is
    measured. All windows run side by side, as one batch.
    """
    T, B = starts.shape
    W = (T - 1) // window  # full windows that end in a cut inside the batch; W + 1 cuts: 0, window, ..., W window
    steps = slice(0, W * window)
    cuts = slice(0, W * window + 1, window)

    # At the cuts: the state is recorded with resets applied; where one was applied, there is no future.
    alive = ~starts if has_future is None else ~starts & has_future
    alive = alive[cuts].flatten()  # [(W + 1) * B]
    at_cuts = tuple(s[cuts].flatten(0, 1) for s in end.history.states)
    with torch.no_grad():
        synthetic = critic.synthetic_gradient(at_cuts, None if context is None else context[cuts].flatten(0, 1), alive)
    truth = tuple(g[cuts].flatten(0, 1) for g in total)
    b, tail = (_join(vector, 1).unflatten(0, (W + 1, B)).double() for vector in (synthetic, truth))  # [W + 1, B, S]

    if W:  # between the cuts, by the Jacobians of each window
        by_window = [
            x[steps].unflatten(0, (W, window)).transpose(0, 1).flatten(1, 2) for x in (inputs.detach(), starts)
        ]
        start = tuple(s[:-B].clone().requires_grad_() for s in at_cuts)
        with torch.enable_grad(), _own_buffers(core):
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
    both = torch.zeros(2, T, *b.shape[1:], dtype=torch.float64, device=starts.device)
    both[:, : len(b)] = torch.stack([b, tail])
    return both[0], both[1]


@contextmanager
def _own_buffers(core: Core) -> Iterator[None]:
    """Meanwhile the core writes to copies of its buffers, such as running statistics: measuring trains nothing."""
    buffers = [(module, name, b) for module in core.modules() for name, b in module._buffers.items() if b is not None]
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _gradients(
    roots: Tensor | State, leaves: State, end: UnrolledState, vectors: State | None = None
) -> tuple[Tensor, ...]:
    """Gradients [T, B, ...] that arrive at every state of a window; the graph is kept, no `.grad` is touched."""
    end.history.clear()
    roots = (roots,) if isinstance(roots, Tensor) else roots
    pairs = [(r, v) for r, v in zip(roots, vectors or (None,) * len(roots), strict=True) if r.requires_grad]
    if pairs:
        # Towards the leaves, hence past every state on the way, where the history takes notes.
        with keeping_graph():
            torch.autograd.grad(
                [r for r, _ in pairs], leaves, [v for _, v in pairs], retain_graph=True, allow_unused=True
            )
    valid = end.history.valid
    gradients = tuple(
        torch.where(valid.view(*valid.shape, *[1] * (g.dim() - 2)), g, 0.0) for g in end.history.gradients
    )
    end.history.clear()
    return gradients


def _join(state: State, leading: int = 2) -> Tensor:
    """Tuple of [T, B, ...], or with another number of leading dimensions, to one [T, B, S] of all numbers of a state together."""
    return torch.cat([s.flatten(leading) for s in state], dim=-1)


def _largest_lag(cosine: Tensor) -> Tensor:
    lags = torch.arange(1, len(cosine) + 1, device=cosine.device)
    return (lags * (cosine > 0.5)).amax()


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
    probe: Tensor | None,
    loss_times: Sequence[int] | None,
    num_lags: int | None,
    margin: int,
) -> int:
    T = len(inputs)
    if T == 0:
        raise ValueError(f"inputs: found {tuple(inputs.shape)}, allowed [T, B, D] with T >= 1")
    if window is not None and not are_counts(window):
        raise ValueError(f"window: found {window}, allowed an integer of 1 or more steps, or None for full BPTT")
    if critic is not None and window is None:
        raise ValueError("critic: it is used at cuts; give window=, the steps between them")
    if context is not None and context.shape[:2] != (T + 1, inputs.shape[1]):
        raise ValueError(
            f"context: expected [T + 1, B, Z] = ({T + 1}, {inputs.shape[1]}, Z), got {tuple(context.shape)}"
        )
    if probe is not None and (probe.dim() != 3 or probe.shape[:2] != inputs.shape[:2]):
        raise ValueError(f"probe: expected [T, B, Z] = ({T}, {inputs.shape[1]}, Z), got {tuple(probe.shape)}")
    if probe is not None and inputs.shape[1] < 2:
        raise ValueError("probe: found 1 sequence; allowed 2 or more, over which to average; leave probe= out")
    if loss_times is not None and (not loss_times or not all(0 <= t < T for t in loss_times)):
        raise ValueError(f"loss_times: expected at least one time, each in [0, {T}), got {loss_times}")
    if num_lags is not None and not 1 <= num_lags <= T:
        raise ValueError(f"num_lags: found {num_lags}, allowed 1 to {T}, the length of the batch")
    if not 0 <= margin < T:
        raise ValueError(f"margin: found {margin}, allowed 0 to {T - 1}")
    return T
