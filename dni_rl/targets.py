"""What error critics regress on, as pure functions: bootstrapped targets, mixed over windows of different length, and their units.

The recursion is that of lambda-returns; what is carried from step to step is a loss, or a gradient through Jacobians.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dni_rl.precision import HALF_PRECISION, out_of_half


def lambda_targets(
    local: Tensor,
    bootstraps: Tensor,
    lambda_: float = 1.0,
    *,
    first: Tensor | None = None,
    pull_back: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Targets at every step of a window, mixed over the windows that could have been cut inside of it.

        G_t = r_t + P_t((1 - lambda) b_{t+1} + lambda G_{t+1}),    G_T = b_T,    t = T - 1, ..., 0

    With losses r_t, the values b_t of a loss critic and P_t the identity these are lambda-returns (Sutton & Barto,
    "Reinforcement Learning: An Introduction" (2018), eq. 12.20; here every bootstrap carries its discount already). With
    r_t = d l_t / d s_t, synthetic gradients b_t and P_t(v) = (d s_{t+1} / d s_t)^T v they are gradients (Pemberton & Costa,
    "BP(lambda)" (2024), forward view). Written out, n steps to the bootstrap,

        G_t = (1 - lambda) sum_{n=1}^{T-t-1} lambda^{n-1} G_t^(n)  +  lambda^{T-t-1} G_t^(T-t)

    a mixture of the targets G^(n) of windows cut n steps later. lambda = 1 is the target of the full window, lambda = 0 believes
    the very next prediction.

    Args:
        local: [T, B, ...] r_0 .. r_{T-1}.
        bootstraps: [T, B, ...] b_1 .. b_T, discounted. With lambda_ = 1 only the last one matters.
        lambda_: in [0, 1].
        first: [T, B] bool, True where an episode starts: nothing of that step or later reaches the steps before.
        pull_back: (t, v [B, ...]) -> P_t(v); None for the identity.

    Returns:
        [T, B, ...] targets G_0 .. G_{T-1}. Gradients flow into local and bootstraps; detach for targets.

    Raises:
        ValueError: if shapes disagree or lambda_ is out of range.
    """
    if not 0.0 <= lambda_ <= 1.0:
        raise ValueError(f"lambda_: found {lambda_}, allowed 0 to 1")
    if local.shape != bootstraps.shape or (first is not None and first.shape != local.shape[:2]):
        found = [tuple(x.shape) for x in (local, bootstraps)] + ([] if first is None else [tuple(first.shape)])
        raise ValueError(f"expected local and bootstraps [T, B, ...] alike, and first [T, B]; got {found}")
    targets: list[Tensor] = []
    carried = bootstraps[-1]
    for t in reversed(range(len(local))):
        if targets:
            # lambda = 1 must not touch the bootstraps: nobody may have computed them
            carried = targets[-1] if lambda_ == 1.0 else torch.lerp(bootstraps[t], targets[-1], lambda_)
            if first is not None:
                carried = carried.masked_fill(first[t + 1].view(-1, *[1] * (local.dim() - 2)), 0.0)
        targets.append(local[t] + (carried if pull_back is None else pull_back(t, carried)))
    return torch.stack(targets[::-1])


@contextmanager
def keeping_graph() -> Iterator[None]:
    """Around a backward pass that is not the last one through its graph: says what torch.compile has to know of it."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "torch.compile: found a compiled graph that gives its memory away in its first backward pass; allowed one that is kept, since "
            "max_norm_ratio, target_lambda, BP(lambda) and credit horizons pass through it more than once; before the model is "
            "compiled, import torch._functorch.config and set torch._functorch.config.donated_buffer = False"
        ) from error


def per_sequence(gradients: tuple[Tensor, ...], weight: float | Tensor) -> tuple[Tensor, ...]:
    """Gradients in the units of one sequence's summed loss; out of half precision first, in which those may be too small."""
    return tuple(out_of_half(g) / weight for g in gradients)


def check_weight(weight: float | Tensor | None) -> None:
    """Raises ValueError if it is not one positive number; of a tensor on an accelerator, whose value would have to be waited for, the
    shape alone is looked at."""
    if isinstance(weight, Tensor) and weight.numel() != 1:
        raise ValueError(f"weight: expected one number, got {tuple(weight.shape)}; weigh single steps in losses")
    if weight is None or (isinstance(weight, Tensor) and weight.device.type != "cpu"):
        return
    value = float(weight.detach() if isinstance(weight, Tensor) else weight)
    if not 0.0 < value < math.inf:
        raise ValueError(
            f"weight: found {value}, allowed above 0 and finite; multiply losses by 0 where they must not count"
        )


def check_alive(alive: Tensor | None, num_steps: int, batch_size: int) -> None:
    """Raises ValueError if it is not of one of the two shapes that `dni_rl.backward` takes."""
    shapes = ((batch_size,), (num_steps + 1, batch_size))
    if alive is not None and (not isinstance(alive, Tensor) or alive.shape not in shapes):
        found = tuple(alive.shape) if isinstance(alive, Tensor) else type(alive).__name__
        raise ValueError(f"alive: expected [B] = {shapes[0]} or [T + 1, B] = {shapes[1]}, got {found}")


def split_alive(alive: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of `alive` as `dni_rl.backward` takes it: [T, B] bool, whether the state before each step has a future, and [B], whether the state
    after the window has one. None where it does not say."""
    if alive is None or alive.dim() == 1:
        return None, alive
    return alive[:-1].bool(), alive[-1]


def before_each_step(alive: Tensor | None, num_steps: int, batch_size: int) -> Tensor | None:
    """[T, B] bool, whether the state before each step has a future: of `alive` as `dni_rl.backward` takes it, [T + 1, B], or without the
    row of the window's end, [T, B].

    Raises:
        ValueError: if it has another shape.
    """
    if alive is None:
        return None
    if alive.shape not in ((num_steps, batch_size), (num_steps + 1, batch_size)):
        raise ValueError(
            f"alive: expected [T, B] = ({num_steps}, {batch_size}), or [T + 1, B] as in dni_rl.backward, got {tuple(alive.shape)}"
        )
    return alive[:num_steps].bool()


def scaled_weight(weight: float | Tensor, like: Tensor, scaler: torch.amp.GradScaler | None) -> float | Tensor:
    """The weight times the scaler's scale, on the device of `like`, in its precision or in float32 where that is half."""
    if isinstance(weight, Tensor):
        weight = weight.detach().reshape(())  # or it would lend its shape and precision to what it multiplies
    if scaler is None or not scaler.is_enabled():
        return weight
    one = torch.ones((), device=like.device, dtype=torch.float32 if like.dtype in HALF_PRECISION else like.dtype)
    return weight * scaler.scale(one)
