"""What stays in full precision where a model runs under autocast: gradients, their predictions, and statistics of them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

HALF_PRECISION = (torch.float16, torch.bfloat16)


def out_of_half(values: Tensor) -> Tensor:
    """In float32 if they were in half precision, otherwise as they are."""
    return values.float() if values.dtype in HALF_PRECISION else values


def refuse_half(name: str, dtype: torch.dtype) -> None:
    """Raises ValueError where what keeps running statistics is in half precision, in which they stand still."""
    if dtype in HALF_PRECISION:
        raise ValueError(
            f"{name}: found {dtype}, allowed torch.float32 or torch.float64, since running statistics stand still in half precision; "
            "keep it in float32 and put the model under torch.autocast"
        )


def check_precision(critic: torch.dtype, states: torch.dtype) -> None:
    """Raises ValueError unless a critic in the first precision can read states in the second."""
    refuse_half("critic", critic)
    if states not in HALF_PRECISION and states != critic:
        raise ValueError(f"critic: found {critic}, allowed {states} as the states; use critic.to({states})")


def out_of_autocast(device: torch.device) -> AbstractContextManager:
    """While it lasts, there is no autocast on this kind of device."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
