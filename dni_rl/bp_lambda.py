"""BP(lambda): an error critic that learns fully online by eligibility traces, without any backpropagation through time.

What TD(lambda) is to n-step returns, BP(lambda) is to windows of truncated BPTT: each step's error of the critic is
credited to all earlier predictions at once, through a trace that travels forward in time. Pemberton & Costa,
"BP(lambda): Online learning via synthetic gradients" (2024). Use it with windows of one step and small cores: a trace
costs state times critic parameters.
"""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dni_rl.backward import Report, check_window, gradients_of, in_own_precision, look_for_start, report_of, surrogate
from dni_rl.cores.base import Core, State, UnrolledState
from dni_rl.critics import GradientCritic
from dni_rl.precision import out_of_half
from dni_rl.targets import keeping_graph, per_sequence, scaled_weight, split_alive


def bp_lambda_trace(critic: GradientCritic, batch_size: int, *, max_bytes: int = 2 * 1024**3) -> Tensor:
    """The eligibility trace before the first step: zeros.

    As the state it belongs to, it goes into a checkpoint, a plain tensor: without it, what the critic learns after loading differs
    until all episodes have started anew.

    Args:
        critic: linear, see `bp_lambda_backward`.
        batch_size: B.
        max_bytes: what the trace may occupy; B S^2 (S + Z + 1) numbers, for a state of S numbers and a context of Z.

    Returns:
        [B, S, S, S + Z + 1]: sequence, component of the state, row and column of the critic's weight and bias.

    Raises:
        ValueError: if the critic cannot be trained so, or the trace would not fit.
    """
    head = _linear_head(critic)
    S, features = head.out_features, head.in_features + 1
    needed = batch_size * S * S * features * head.weight.element_size()
    if needed > max_bytes:
        raise ValueError(
            f"batch_size: a trace for {batch_size} sequences, a state of {S} and {S * features} critic parameters "
            f"takes {needed / 1024**3:.2f} GiB, allowed max_bytes={max_bytes / 1024**3:.2f} GiB; use fewer sequences, "
            "a smaller core, or dni_rl.backward, which needs no trace"
        )
    return head.weight.new_zeros(batch_size, S, S, features)


@in_own_precision
def bp_lambda_backward(
    losses: Tensor,
    *,
    start: State,
    end: State,
    critic: GradientCritic,
    trace: Tensor,
    lambda_: float,
    first: Tensor | None = None,
    alive: Tensor | None = None,
    context: Tensor | None = None,
    weight: float | Tensor | None = None,
    jacobian: Tensor | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Report, Tensor]:
    """Takes one step of BP(lambda): the backward view with eligibility traces.

    With s_{t-1} = start, s_t = end, J_t = d s_t / d s_{t-1}, r_t = d l_t / d s_{t-1} and a linear critic M with
    parameters theta:

        delta_t = r_t + g M(s_t) J_t - M(s_{t-1})                           [B, S]
        e_t     = g lambda J_{t-1} e_{t-1} + dM(s_{t-1}) / dtheta           [B, S, theta]
        theta  += alpha mean (delta_t . e_t)                                M(s_t) = 0 and J_t = 0 for e where alive is 0

    Pemberton & Costa (2024), backward view; the paper's l_t J_t is r_t for a loss that reads s_t, and holds for any
    core here. Summed over an episode with theta fixed, these updates equal those of the forward view, the regression
    of every M(s_k) on

        G_k = r_{k+1} + g ((1 - lambda) M(s_{k+1}) + lambda G_{k+1}) J_{k+1}

    Adds weight * (r_t + g M(s_t) J_t) and its like for parameters to the model's `.grad`, exactly as
    `dni_rl.backward` does, and the negative update, scaled as the gradient of the mean square error over rows and
    components, to the critic's, so that its optimiser descends. A longer window is taken as one step: l is its summed
    loss, J the Jacobian across it.

    J_t costs S backward passes through the step unless it is given, the trace B S^2 theta multiplications: S = 2 H for an LSTM.

    Args:
        losses: [T, B], not reduced; T = 1 is fully online.
        start: the window's first state, from `dni_rl.cut`.
        end: the state after the window.
        critic: linear (hidden_sizes=()), without normalised targets or context, bound or warm-up. g is gradient_discount * scale.
        trace: from `bp_lambda_trace` at first, then from the last call.
        lambda_: in [0, 1]. 0 learns from the next prediction alone, 1 from true gradients alone.
        first: [T, B] bool as in `unroll`: traces end where an episode starts. None for what `end` says, if the core recorded it.
        alive: [B], 0 where the sequence ended exactly at `end`: nothing is predicted there, and its trace ends. Or [T + 1, B] as in
            `dni_rl.backward`; the first row is that of `start`.
        context: [T + 1, B, Z] as in `dni_rl.backward`.
        weight: multiplies what enters the model's `.grad`, as in `dni_rl.backward`; 1 / (T B) by default.
        jacobian: [B, S, S] d end / d start, from `state_jacobian`, which is faster where steps are small.
        scaler: of mixed precision with float16, as in `dni_rl.backward`: both sides' `.grad` carry its scale, and both optimisers are
            stepped through it. The Jacobian, whose entries are of the order of 1, is taken without.

    Returns:
        The report, in which `critic_loss` is the mean square of delta, and the next trace, without gradient.

    Raises:
        ValueError: if the critic is not as above, shapes disagree, lambda_ is out of range, or the weight is not one positive number;
            as in `dni_rl.backward`, if losses are in half precision or the critic is not in the states'.
        RuntimeError: if `start` is not from `cut`, or `losses` or `end` have no graph.
    """
    head = _linear_head(critic)
    T, B = check_window(losses, start, end, critic, alive, context, weight, fit=False)
    _check(T, B, critic, trace, lambda_, first, jacobian)
    if first is None and isinstance(end, UnrolledState):
        first = ~end.history.valid
    has_future, alive = split_alive(alive)
    if weight is None:
        weight = 1.0 / (T * B)
    weight = scaled_weight(weight, losses, scaler)
    before = tuple(s.detach() for s in start)
    after = tuple(s.detach() for s in end)
    z_before, z_after = (None, None) if context is None else (context[0], context[-1])
    starts = torch.zeros(T, B, dtype=torch.bool, device=losses.device) if first is None else first

    if jacobian is None:
        jacobian = _jacobian(end, start)
    synthetic = critic.synthetic_gradient(after, z_after, alive)
    with gradients_of(start) as (arrived, reached):
        torch.autograd.backward(*surrogate(losses, end, synthetic, weight))
    if not reached:
        look_for_start(losses, start, end, stacklevel=4)

    with torch.no_grad():
        target = torch.cat(per_sequence(tuple(arrived), weight), dim=-1)  # [B, S]
        predicted = torch.cat(critic(before, z_before), dim=-1)
        # a state that an episode's start clears has no future, nor has one between two episodes
        counts = (~starts[0] if has_future is None else ~starts[0] & has_future[0]).unsqueeze(-1)  # [B, 1]
        row = counts.to(target.dtype)
        # where, not a product, here and below: what ended with an episode may be anything, not finite included
        target, predicted = torch.where(counts, target, 0.0), torch.where(counts, predicted, 0.0)
        delta = target - predicted
        features = torch.cat([*before, *(() if z_before is None else (z_before,)), torch.ones_like(row)], dim=-1)
        # the old trace neither learns nor lives on there
        trace = torch.where(counts.view(-1, 1, 1, 1), trace, 0.0)
        # dM_i / dweight[k, l] is features[l] where i = k
        trace.diagonal(dim1=1, dim2=2).add_(torch.where(counts, features, 0.0).unsqueeze(-1))
        rows = row.sum().clamp_min(1.0)
        descent = torch.einsum("bi,bikl->kl", delta, trace) * (-2.0 / (rows * delta.shape[-1]))
        if scaler is not None:
            descent = scaler.scale(descent)
        _add_gradient(head.weight, descent[:, :-1])
        _add_gradient(head.bias, descent[:, -1])
        decay = critic.gradient_discount * critic.scale * lambda_
        # What comes after the end of a sequence is no error of its predictions, also where steps are left before the next one starts.
        goes_on = ~starts.any(0) if alive is None else ~starts.any(0) & alive.bool()
        trace = torch.bmm(decay * out_of_half(jacobian), trace.flatten(2)).view_as(trace)
        trace = torch.where(goes_on.view(-1, 1, 1, 1), trace, 0.0)
        share = row / rows
        loss = (share * delta.square()).sum() / delta.shape[-1]
        fit = critic.describe_fit(loss, loss, predicted, target, share)
        report = report_of(fit, torch.cat(synthetic, dim=-1).norm(dim=-1).mean())
    return report, trace


def state_jacobian(core: Core, inputs: Tensor, state: State, first: Tensor | None = None) -> Tensor:
    """d (state after the window) / d (state before it) of every sequence, in one backward pass.

    The batch is repeated S times, and copy i of a sequence is asked for row i, so that a window of small steps costs one forward and
    one backward pass over S B sequences in place of S passes over B.

    Args:
        core: any that is deterministic; its parameters get no gradient.
        inputs: [T, B, D].
        state: before the window, [B, .] each, S numbers together.
        first: [T, B] bool as in `unroll`; the rows and columns of a sequence that begins anew inside the window are zero.

    Returns:
        [B, S, S], without graph.

    Raises:
        ValueError: if the core drops out or normalises over the batch: each copy would be another function. `bp_lambda_backward` finds
            the Jacobian on its own where none is given.
    """
    random = [type(m).__name__ for m in core.modules() if m.training and isinstance(m, (_DropoutNd, _BatchNorm))]
    if random:
        raise ValueError(
            f"core: found {random[0]} in training mode, allowed one that is deterministic; leave `jacobian` out, or call core.eval()"
        )
    B, S = inputs.shape[1], sum(s.shape[-1] for s in state)
    with torch.enable_grad():
        copies = tuple(s.detach().repeat_interleave(S, 0).requires_grad_() for s in state)
        repeated = None if first is None else first.repeat_interleave(S, 1)
        _, end = core.unroll(inputs.detach().repeat_interleave(S, 1), copies, repeated)
    units = (
        torch.eye(S, dtype=inputs.dtype, device=inputs.device).repeat(B, 1).split([s.shape[-1] for s in end], dim=-1)
    )
    roots = [(s, u.to(s.dtype)) for s, u in zip(end, units, strict=True) if s.requires_grad]
    rows = torch.autograd.grad(
        [s for s, _ in roots],
        copies,
        [u for _, u in roots],
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat(rows, dim=-1).view(B, S, S)


def _jacobian(end: State, start: State) -> Tensor:
    """[B, S, S] d end / d start of every sequence; the graph is kept.

    One backward pass for each component: it asks nothing of the core, neither rules for vmap nor a second forward pass.
    """
    rows = []
    for component in end:
        if not component.requires_grad:  # such as a count of steps
            zeros = torch.cat([torch.zeros_like(s) for s in start], dim=-1)
            rows += [zeros] * component.shape[-1]
            continue
        for column in range(component.shape[-1]):
            root = component[:, column].sum()
            with keeping_graph():
                gradient = torch.autograd.grad(
                    root, start, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            rows.append(torch.cat(gradient, dim=-1))
    return torch.stack(rows, dim=1)


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.requires_grad:
        gradient = gradient.to(parameter.dtype)
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


def _linear_head(critic: GradientCritic) -> torch.nn.Linear:
    """The critic's one layer; ValueError if it has settings for which the equations do not hold."""
    if not isinstance(critic, GradientCritic) or not isinstance(critic.net, torch.nn.Sequential):
        raise ValueError("critic: BP(lambda) needs a linear one, whose trace is exact; build it with hidden_sizes=()")
    settings = {
        "normalize_targets": (critic.normalize_targets, False),
        "normalize_context": (critic.normalize_context, False),
        "max_norm_ratio": (critic.max_norm_ratio, None),
        "warmup_updates": (critic.warmup_updates, 0),
        "slow_copy_rate": (critic.slow_copy_rate, None),
        "target_lambda": (critic.target_lambda, 1.0),
    }
    for name, (found, wanted) in settings.items():
        if found != wanted:
            reason = "is not linear in the critic's parameters"
            if name in ("slow_copy_rate", "target_lambda"):
                reason = "has no meaning in BP(lambda)"
            if name == "normalize_context":
                reason = "needs statistics that traces do not keep; divide the context yourself"
            raise ValueError(f"critic: {name}={found} {reason}; allowed {name}={wanted}")
    head = critic.net[0]
    assert isinstance(head, torch.nn.Linear)
    return head


def _check(
    T: int,
    B: int,
    critic: GradientCritic,
    trace: Tensor,
    lambda_: float,
    first: Tensor | None,
    jacobian: Tensor | None,
) -> None:
    """What `check_window` does not look at."""
    S = sum(critic.state_sizes)
    if not 0.0 <= lambda_ <= 1.0:
        raise ValueError(f"lambda_: found {lambda_}, allowed 0 to 1")
    if not isinstance(trace, Tensor):
        raise ValueError(
            f"trace: found {type(trace).__name__}, allowed what the last call returned; begin with `bp_lambda_trace`"
        )
    if trace.shape != (B, S, S, S + critic.context_size + 1):
        raise ValueError(
            f"trace: expected [B, S, S, S + Z + 1] = {(B, S, S, S + critic.context_size + 1)}, got {tuple(trace.shape)}"
        )
    if first is not None and first.dtype != torch.bool:
        raise ValueError(f"first: found {first.dtype}, allowed torch.bool; use `first.bool()`")
    for name, found, shape in (("first", first, (T, B)), ("jacobian", jacobian, (B, S, S))):
        if found is not None and found.shape != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(found.shape)}")
