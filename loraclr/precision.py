"""How exactly, and where, to compute: float64 and float32 beside hosts and devices that would have it otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64: the device, or the CPU for those that may lack it (Apple, Arc, DirectML)."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def in_float64(value: Tensor) -> Tensor:
    """A tensor in float64, where that can be had; itself if it is so already.

    Moved first: Apple's devices cannot even convert to float64.
    """
    return value.to(float64_device(value.device)).to(torch.float64)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, products keep their precision, which a host's autocast around the merge would turn into half."""
    try:
        return torch.autocast(device.type, enabled=False)
    except RuntimeError:  # PyTorch before 2.5 has no autocast for Apple's devices, so none is on
        return nullcontext()
