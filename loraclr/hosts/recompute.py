"""Blocks of a UNet that compute again on the way back instead of keeping what is inside: less memory, more time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

LARGE = 512  # pixels on a side from which on a picture's activations do not fit into common cards

# Of diffusers, and of the original code, which names the first one alike.
_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "ResBlock")


@contextmanager
def recomputed(root: nn.Module, within: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[None]:
    """Inside, every transformer and residual block under `root` keeps only its inputs for the backward pass.

    Hooks inside the blocks run twice, and must still be there when the gradients are taken.

    Args:
        within: where the blocks are computed, both times: the host's own precision, which it has left by the way back.
    """
    blocks = [block for block in root.modules() if type(block).__name__ in _BLOCKS and "forward" not in vars(block)]
    for block in blocks:
        block.forward = _again(block.forward, within)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _again(forward: Callable, within: Callable[[], AbstractContextManager]) -> Callable:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with within():
            return forward(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(inside, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
