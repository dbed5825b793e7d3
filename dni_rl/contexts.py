"""Contexts for critics, as pure functions: what an error critic may know that the core does not.

A critic is a training aid, so it may see labels, privileged state, and in a stored rollout the future. A prediction that is
conditioned on more is closer to the gradient of the very sequence at hand, and on average over what it knows the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dni_rl.precision import out_of_half


def future_inputs(inputs: Tensor, first: Tensor | None, steps: int) -> Tensor:
    """The inputs that the core will read next, as a context for an error critic.

        z_t = [x_t v_t0, x_{t+1} v_t1, ..., x_{t+n-1} v_t(n-1),  v_t0, ..., v_t(n-1)]

    of the state before step t. The flag v_ti is 1 where step t + i is stored and belongs to the episode of that state, that is where
    no episode starts in steps t .. t + i. An input without is 0, whatever is stored there: the state before an episode's start has no
    future. A critic with this context sees part of the future that its target comes from; the synthetic gradient remains right
    in expectation, being that of the sequence which was drawn.

        context = dni_rl.future_inputs(inputs, first, steps=4)              # [T + 1, B, Z]
        critic = dni_rl.GradientCritic(state_sizes=core.state_sizes, context_size=context.shape[-1])
        report = dni_rl.backward(losses, start=state, end=next_state, critic=critic, context=context)

    The last row, of the state after the window, has all flags 0; to look beyond a window give the inputs of the whole stored rollout and
    take from the result the rows of the window and the one after.

    Args:
        inputs: [T, B, ...] floating point, what the core reads at each step, or a part of it.
        first: [T, B] bool, True where `inputs` starts an episode; None where none does.
        steps: n, at least 1.

    Returns:
        [T + 1, B, n (D + 1)] with D numbers in an input, in its dtype and without gradient.

    Raises:
        ValueError: if shapes or types disagree, or there are no steps.
    """
    _check(inputs, first)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"steps: found {steps}, allowed an integer from 1 on; without future inputs leave the context out"
        )
    T, B = inputs.shape[:2]
    x = inputs.detach().reshape(T, B, -1)
    starts = torch.zeros(T, B, dtype=torch.bool, device=x.device) if first is None else first
    x = torch.cat([x, x.new_zeros(steps, B, x.shape[-1])]).unfold(0, steps, 1)  # [T + 1, B, D, n]
    unknown = torch.cat([starts, starts.new_ones(steps, B)]).unfold(0, steps, 1).cumsum(-1) > 0  # [T + 1, B, n]
    # masked, not multiplied: what belongs to another episode may be anything, not finite included
    x = x.masked_fill(unknown.unsqueeze(2), 0.0).transpose(2, 3)  # [T + 1, B, n, D]
    return torch.cat([x.flatten(2), (~unknown).to(x.dtype)], dim=-1)


def past_inputs(inputs: Tensor, first: Tensor | None, steps: Sequence[int], *, before: Tensor | None = None) -> Tensor:
    """Fading averages of what the core has read, as a context for an error critic.

        z_{t+1} = d z_t + [sqrt(1 - d) x_t, 1 - d],    d = 1 - 1 / n,    z_t = 0 where step t starts an episode

    of the state before each step, for every n of `steps`. The critic learns what to make of an input that the core has not yet learned
    to keep, and so can tell the core to keep it; and from the last component, which approaches 1, how long the episode has
    lasted. Nothing in it is privileged: the agent has seen all of it. These are the traces of eligibility traces (Sutton 1988), of
    inputs in place of gradients; inputs of variance 1 that are independent in time have averages of variance up to 1.

        context = dni_rl.past_inputs(inputs, first, steps=(10, 50), before=context[-1])              # [T + 1, B, Z]

    Args:
        inputs: [T, B, ...] floating point, what the core reads at each step, or a part of it.
        first: [T, B] bool, True where `inputs` starts an episode; None where none does.
        steps: over about how many steps each average goes, integers of at least 2.
        before: [B, Z] the averages before the first step, the last row of the window before; None for zero.

    Returns:
        [T + 1, B, len(steps) (D + 1)] with D numbers in an input, in its dtype, or in float32 where that is half of one, without gradient.

    Raises:
        ValueError: if shapes or types disagree, or an average goes over fewer than 2 steps.
    """
    _check(inputs, first)
    if not isinstance(steps, Sequence) or not steps or any(n < 2 for n in steps):
        raise ValueError(f"steps: found {steps}, allowed a list of one or more numbers of at least 2, as in (10, 100)")
    T, B = inputs.shape[:2]
    x = out_of_half(inputs.detach()).reshape(T, B, -1)  # in which a small share of a step would be lost
    size = x.shape[-1] + 1
    if before is not None and before.shape != (B, len(steps) * size):
        raise ValueError(f"before: expected [B, Z] = ({B}, {len(steps) * size}), got {tuple(before.shape)}")
    share = torch.stack([x.new_full((), 1.0 / n) for n in steps])  # filled on the device, not copied to it
    read = torch.cat(
        [part for s in share for part in (x * s.sqrt(), s.expand(T, B, 1))], dim=-1
    )  # [T, B, len(steps) * size]
    decay = (1.0 - share).repeat_interleave(size)
    z = x.new_zeros(B, len(steps) * size) if before is None else before.detach().to(x.dtype)
    averages = []
    for t in range(T):
        if first is not None:
            z = z.masked_fill(first[t].unsqueeze(-1), 0.0)
        averages.append(z)
        z = torch.addcmul(read[t], decay, z)
    return torch.stack([*averages, z])


def recent_inputs(inputs: Tensor, first: Tensor | None, steps: int, *, before: Tensor | None = None) -> Tensor:
    """The last inputs that the core has read, as they are and in their order, as a context for an error critic.

        z_{t+1} = [x_t, 1, z_t without its last input],    z_t = 0 where step t starts an episode

    of the state before each step: n inputs, the latest first, each with a flag that is 1 where there was one in the episode. As with
    `past_inputs` nothing in it is privileged; it forgets at once where those fade, and tells what came when, which averages blur.

        context = dni_rl.recent_inputs(inputs, first, steps=12, before=context[-1])              # [T + 1, B, Z]

    Args:
        inputs: [T, B, ...] floating point, what the core reads at each step, or a part of it.
        first: [T, B] bool, True where `inputs` starts an episode; None where none does.
        steps: n, at least 1.
        before: [B, Z] the inputs before the first step, the last row of the window before; None for none.

    Returns:
        [T + 1, B, n (D + 1)] with D numbers in an input, in its dtype and without gradient.

    Raises:
        ValueError: if shapes or types disagree, or there are no steps.
    """
    _check(inputs, first)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"steps: found {steps}, allowed an integer from 1 on; without recent inputs leave the context out"
        )
    T, B = inputs.shape[:2]
    x = inputs.detach().reshape(T, B, -1)
    read = torch.cat([x, x.new_ones(T, B, 1)], dim=-1)
    size = steps * read.shape[-1]
    if before is not None and before.shape != (B, size):
        raise ValueError(f"before: expected [B, Z] = ({B}, {size}), got {tuple(before.shape)}")
    z = x.new_zeros(B, size) if before is None else before.detach().to(x.dtype)
    rows = []
    for t in range(T):
        if first is not None:
            z = z.masked_fill(first[t].unsqueeze(-1), 0.0)
        rows.append(z)
        z = torch.cat([read[t], z], dim=-1)[:, :size]
    return torch.stack([*rows, z])


def _check(inputs: Tensor, first: Tensor | None) -> None:
    if inputs.dim() < 2 or not inputs.is_floating_point():
        raise ValueError(f"inputs: expected floating-point [T, B, ...], got {inputs.dtype} {tuple(inputs.shape)}")
    if first is not None and (first.shape != inputs.shape[:2] or first.dtype != torch.bool):
        raise ValueError(
            f"first: expected bool [T, B] = {tuple(inputs.shape[:2])}, got {first.dtype} {tuple(first.shape)}"
        )
