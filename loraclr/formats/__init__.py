"""Every kind of change that LoRA files hold, one file for each: tensors of a layer → a `Change` with its exact ΔW."""

from __future__ import annotations

from dataclasses import replace

from loraclr.formats import dora
from loraclr.formats.change import Change, Incomplete, Parts
from loraclr.formats.dora import DoRA
from loraclr.formats.full import Bias, Full, Norm
from loraclr.formats.glora import GLoRA
from loraclr.formats.ia3 import IA3
from loraclr.formats.loha import LoHa
from loraclr.formats.lokr import LoKr
from loraclr.formats.lowrank import Layer, scaled_bias
from loraclr.formats.oft import BOFT, OFT
from loraclr.formats.suffixes import splitter

#: In this order: the first kind that claims a layer's tensors reads them.
KINDS: tuple[type[Change], ...] = (Layer, LoHa, LoKr, GLoRA, IA3, BOFT, OFT, Full, Norm, Bias)

_BIASES = frozenset({"diff_b", "b_norm", "lora_up.bias"})

#: A key → (stem, suffix), None if it does not end as any kind's keys do.
split = splitter(KINDS)


def read(parts: Parts) -> tuple[Change | None, frozenset[str]]:
    """The change that a layer's tensors make, None if they make none, and the suffixes that are part of it.

    Raises Incomplete, or ValueError about what does not fit together.
    """
    kind = next((kind for kind in KINDS if kind.claims(parts)), None)
    if kind is None:
        return None, frozenset()
    change = kind.read(parts)
    used = kind.owns | {"alpha"} | _BIASES
    biases = [bias for bias in (scaled_bias(parts), parts.get("diff_b"), parts.get("b_norm")) if bias is not None]
    if biases:
        rows, lengths = change.size[0], {bias.numel() for bias in biases}
        if len(lengths | ({rows} - {None})) > 1:
            shapes = parts.shapes(*sorted(_BIASES))
            raise ValueError(f"{shapes} do not fit {'together' if rows is None else f'{rows} outputs'}")
        change = replace(change, bias=sum(bias.flatten() for bias in biases))
    if kind in (Layer, LoHa, LoKr):
        change, used = dora.decomposed(change, parts), used | dora.SUFFIXES
    return change, used


__all__ = [
    "BOFT", "IA3", "KINDS", "OFT", "Bias", "Change", "DoRA", "Full", "GLoRA", "Incomplete", "Layer", "LoHa", "LoKr",
    "Norm", "Parts", "read", "split",
]  # fmt: skip
