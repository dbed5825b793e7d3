"""Contexts for critics, as pure functions: what an error critic may know that the core does not.

A critic is a training aid, so it may see labels, privileged state, and in a stored rollout the future. A prediction that is
conditioned on more is closer to the gradient of the very sequence at hand, and on average over what it knows the same.
"""

import torch
from torch import Tensor


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
    if inputs.dim() < 2 or not inputs.is_floating_point():
        raise ValueError(f"inputs: expected floating-point [T, B, ...], got {inputs.dtype} {tuple(inputs.shape)}")
    if first is not None and (first.shape != inputs.shape[:2] or first.dtype != torch.bool):
        raise ValueError(
            f"first: expected bool [T, B] = {tuple(inputs.shape[:2])}, got {first.dtype} {tuple(first.shape)}"
        )
    if steps < 1:
        raise ValueError(f"steps: found {steps}, allowed 1 or more; without future inputs leave the context out")
    T, B = inputs.shape[:2]
    x = inputs.detach().reshape(T, B, -1)
    starts = torch.zeros(T, B, dtype=torch.bool, device=x.device) if first is None else first
    x = torch.cat([x, x.new_zeros(steps, B, x.shape[-1])]).unfold(0, steps, 1)  # [T + 1, B, D, n]
    unknown = torch.cat([starts, starts.new_ones(steps, B)]).unfold(0, steps, 1).cumsum(-1) > 0  # [T + 1, B, n]
    # masked, not multiplied: what belongs to another episode may be anything, not finite included
    x = x.masked_fill(unknown.unsqueeze(2), 0.0).transpose(2, 3)  # [T + 1, B, n, D]
    return torch.cat([x.flatten(2), (~unknown).to(x.dtype)], dim=-1)
