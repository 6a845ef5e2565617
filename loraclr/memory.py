"""Memory: how much a merge has needed at most."""

from __future__ import annotations

import sys

import torch

CARD, PROCESS = "graphics card", "process"


def begin(device: torch.device) -> None:
    """Count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, int]:
    """The most bytes that were in use at a time.

    `CARD`: of tensors on a CUDA device since `begin`. `PROCESS`: of RAM by the whole process since it was started, as
    systems count no other way; left out where Python cannot ask (Windows).
    """
    found = {CARD: torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    try:
        import resource
    except ImportError:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**found, PROCESS: most if sys.platform == "darwin" else 1024 * most}
