"""ED-LoRA files (Mix-of-Show, arXiv 2305.18292) and Orthogonal Adaptation's: what is in their `.pth`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_WORDS, _PARTS = "new_concept_embedding", ("text_encoder", "unet")


def is_edlora(content: object) -> bool:
    """Whether an unpickled file is one: ``{'params': {'new_concept_embedding': …, 'text_encoder': …, 'unet': …}}``."""
    params = content.get("params") if isinstance(content, dict) else None
    return isinstance(params, dict) and any(isinstance(params.get(part), dict) for part in _PARTS)


def flattened(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The file's LoRA tensors under dotted diffusers names, and its trained words: name → (n, width).

    n is 16, one vector for each cross-attention layer in the order in which the UNet calls them, or 1. The file holds
    no alpha: ΔW = alpha · up @ down with the user's alpha, so a strength of 1 is an alpha of 1.
    """
    params = content["params"]
    tensors = {
        f"{part}.{key}": tensor
        for part in _PARTS
        for key, tensor in (params.get(part) or {}).items()
        if isinstance(tensor, Tensor)
    }
    words = params.get(_WORDS) or {}
    return tensors, {str(word): tensor for word, tensor in words.items() if isinstance(tensor, Tensor)}
