"""ED-LoRA files (Mix-of-Show, arXiv 2305.18292) and Orthogonal Adaptation's: what is in their `.pth`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loraclr import embeddings
from loraclr.lora import LoRA, parse

#: The cross-attention layers of the SD 1.x UNet: a word has one vector for each.
CROSS_LAYERS = 16

_WORDS, _PARTS = "new_concept_embedding", ("text_encoder", "unet")


def is_edlora(content: Mapping[str, Any]) -> bool:
    """Whether an unpickled file is one: ``{'params': {'new_concept_embedding': …, 'text_encoder': …, 'unet': …}}``."""
    params = content.get("params")
    return isinstance(params, dict) and any(isinstance(params.get(part), dict) for part in _PARTS)


def read(content: Mapping[str, Any], name: str, path: Path | None = None) -> LoRA:
    """The LoRA in an unpickled file, its words among the embeddings.

    A word with 16 vectors has one for each cross-attention layer in the order in which the UNet calls them. The file
    holds no alpha: ΔW = alpha · up @ down with the user's alpha, so that strength 1 is an alpha of 1. Raises
    LoRAFormatError as `loraclr.lora.parse` does.
    """
    params = content["params"]
    tensors = {
        f"{part}.{key}": tensor
        for part in _PARTS
        for key, tensor in _dict(params, part).items()
        if isinstance(tensor, Tensor)
    }
    lora = parse(tensors, {}, name, path)
    plain, by_layer, unused = dict(lora.embeddings), {}, list(lora.unused)
    for word, tensor in _dict(params, _WORDS).items():
        encoder = embeddings.encoder(tensor, lora.family) if isinstance(tensor, Tensor) else None
        if encoder is None:
            unused.append(f"{_WORDS}.{word}")
        elif tensor.shape[:-1] == (CROSS_LAYERS,):
            by_layer[str(word)] = embeddings.vectors(tensor)
        else:
            plain[str(word)] = {encoder: embeddings.vectors(tensor)}
    return replace(lora, embeddings=plain, layer_embeddings=by_layer, unused=tuple(sorted(unused)))


def _dict(params: Mapping[str, Any], name: str) -> dict:
    value = params.get(name)
    return value if isinstance(value, dict) else {}
