"""Running means that critics and auxiliary task keep."""

import torch
from torch import Tensor


@torch.no_grad()
def update_running_mean(
    total: Tensor, weight: Tensor, value: Tensor, step: float, counts: Tensor | None = None
) -> Tensor:
    """Moves an exponential running mean by one value, in place, without waiting for a device.

        total := total + step (value - total),    weight := weight + step (1 - weight),    mean = total / weight

    Dividing by the weight corrects for the start at zero (Kingma & Ba, "Adam" (2015), sec. 3). A value that is not finite is left
    out: one overflow, which a gradient scaler expects and skips, must not stay in the statistics.

    Args:
        total: [...], zeros before the first value.
        weight: scalar, 0 before the first value.
        value: [...], as total.
        step: in (0, 1], 1 - the decay.
        counts: scalar bool, False where the value is to be left out whatever it is, as that of a window without valid rows.

    Returns:
        The mean [...]; zeros as long as nothing has counted.
    """
    keep = value.isfinite().all() if counts is None else value.isfinite().all() & counts
    share = step * keep.to(value.dtype)
    total.add_(share * (value.nan_to_num(0.0, 0.0, 0.0) - total))
    weight.add_(share * (1.0 - weight))
    return total / weight.clamp_min(torch.finfo(weight.dtype).tiny)
