"""DoRA: the changed weight is brought to a trained length, along either axis (LyCORIS, PEFT; arXiv 2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraclr.formats.change import Change, Parts, on

#: kohya's and LyCORIS' name says the axis by its shape; PEFT's is always one length for each output channel.
SUFFIXES = frozenset({"dora_scale", "lora_magnitude_vector"})


@dataclass(frozen=True, eq=False)
class DoRA(Change):
    """ΔW = lengths · (W + ΔW₀) / ‖W + ΔW₀‖ − W, norms for each output channel, or for each input channel.

    inner: what changes the direction, ΔW₀. lengths: (o,), or (i,) with on_input. eps: what the trainer adds to a norm.
    """

    inner: Change
    lengths: Tensor
    on_input: bool = False
    eps: float = 0.0

    @property
    def format(self) -> str:
        return f"{self.inner.format} with DoRA"

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def size(self) -> tuple[int | None, int | None]:
        return self.inner.size

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.inner.fits(shape) and len(shape) > 1 and shape[1 if self.on_input else 0] == len(self.lengths)

    def rows(self, part: int, parts: int) -> Change:
        if self.on_input:
            return super().rows(part, parts)  # its norms run over all of the fused rows
        inner, lengths = self.inner.rows(part, parts), self.lengths.chunk(parts)[part]
        return replace(self, inner=inner, lengths=lengths, bias=self._bias_of(part, parts))

    def _delta(self, base: Tensor | None) -> Tensor:
        changed = base + self.inner.delta(base)
        axis = 1 if self.on_input else 0
        others = [k for k in range(base.ndim) if k != axis]
        (lengths,) = on(base, self.lengths.reshape([-1 if k == axis else 1 for k in range(base.ndim)]))
        norms = torch.linalg.vector_norm(changed, dim=others, keepdim=True) + self.eps
        return changed * (lengths / norms) - base


def decomposed(inner: Change, parts: Parts) -> Change:
    """The change with the trained lengths that lie beside it, if any. Raises ValueError if they cannot be such."""
    vector, scale = parts.get("lora_magnitude_vector"), parts.get("dora_scale")
    if vector is not None:
        return DoRA(inner, vector.flatten(), bias=inner.bias)
    if scale is None:
        return inner
    if scale.numel() not in scale.shape:
        raise ValueError(f"{parts.shapes('dora_scale')} is not one length for each channel")
    on_input = scale.shape[0] != scale.numel()
    return DoRA(inner, scale.flatten(), on_input, torch.finfo(torch.float32).eps, bias=inner.bias)
