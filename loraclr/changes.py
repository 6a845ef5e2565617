"""What a LoRA asks of a model's layers at a strength, as factors; and factors as the layers of a LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraclr.blocks import block
from loraclr.formats import Change, Full, Layer, Norm
from loraclr.keys import Family
from loraclr.lora import LoRA
from loraclr.solve import Factors

#: Layer name → its factors, scale and strength folded in. A change of bias is one more input, which is always 1: `down`
#: then has one column more than the layer has inputs, its last.
Changes = Mapping[str, Factors]


def is_text(name: str) -> bool:
    """Whether a canonical layer name belongs to a text encoder."""
    return name.startswith("lora_te")


def strength(
    name: str,
    family: Family,
    weight: float = 1.0,
    text_weight: float | None = None,
    blocks: Mapping[str, float] | None = None,
) -> float:
    """How much of a LoRA's change a layer gets: `weight`, in text encoders `text_weight` (None: the same), both times
    the weight of the layer's block (see `loraclr.blocks`; a block without one has 1).
    """
    own = text_weight if text_weight is not None and is_text(name) else weight
    return own if blocks is None else own * blocks.get(block(name, family), 1.0)


def changes_of(
    lora: LoRA,
    modules: Mapping[str, nn.Module] | None = None,
    weight: float = 1.0,
    text_weight: float | None = None,
    blocks: Mapping[str, float] | None = None,
) -> Changes:
    """A LoRA's exact factors at its strength (see `strength`), on the CPU; a layer of strength 0 is left out.

    modules: the live layers by canonical name, on whose weights some kinds of change depend; None if none does. Raises
    ValueError, one sentence, if a change does not fit its layer.
    """
    changes = {}
    for name, layer in lora.layers.items():
        share = strength(name, lora.family, weight, text_weight, blocks)
        if share and modules is not None:
            lora.check_fits(name, modules[name].weight)
        if share:
            changes[name] = factors_of(layer, share, None if modules is None else modules[name].weight)
    return changes


def factors_of(change: Change, share: float, weight: Tensor | None = None) -> Factors:
    """A layer's change at a strength as factors, on the CPU; weight: the layer's own, if the change depends on it."""
    norm = isinstance(change, Full) and change.weight.ndim == 1 if weight is None else weight.ndim == 1
    if norm:
        scale = change.delta(weight).flatten().cpu()
        shift = torch.zeros_like(scale) if change.bias is None else change.bias
        return scale * share, shift * share
    up, down = (factor.cpu() for factor in change.factors(weight))
    if change.bias is not None:
        up, down = torch.cat([up, change.bias[:, None]], 1), torch.block_diag(down, torch.ones(1, 1))
    return up * share, down


def aligned(changes: Sequence[Factors | None]) -> list[Factors | None]:
    """One layer's changes with equally many inputs: if one has a column for a bias, all have, of zeros."""
    inputs = max(c[1].shape[-1] for c in changes if c is not None)
    return [c if c is None else (c[0], F.pad(c[1], (0, inputs - c[1].shape[-1]))) for c in changes]


def layer_of(factors: Factors, shape: Sequence[int]) -> Layer | Norm:
    """Factors as a layer of a LoRA; shape: that of the model's weight, (o, i), (o, i, kh, kw) or (n,)."""
    up, down = factors
    if up.ndim == 1:
        return Norm(up, bias=down)
    inputs = prod(shape[1:])
    bias = up @ down[:, inputs] if down.shape[1] > inputs else None
    kernel = tuple(shape[2:])
    return Layer(up, down[:, :inputs], float(up.shape[1]), bool(kernel), kernel or (1, 1), bias=bias)


def through(x: Tensor, change: Factors) -> Tensor:
    """What a change adds to a layer's output for inputs x (..., d); a change of bias is one more input, always 1."""
    up, down = change
    more = down.shape[1] - x.shape[-1]
    return F.linear(F.linear(F.pad(x, (0, more), value=1.0) if more else x, down), up)
