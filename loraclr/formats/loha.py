"""LoHa: the elementwise product of two low-rank changes (LyCORIS, PEFT; FedPara, arXiv 2108.06098)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.formats.change import Change, Parts, on, tucker


@dataclass(frozen=True, eq=False)
class LoHa(Change):
    """ΔW = scale · (up1 @ down1) ⊙ (up2 @ down2), with ups (o, r) and downs (r, d)."""

    format = "LoHa"
    marks = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    owns = marks | {"hada_t1", "hada_t2"}

    up1: Tensor
    down1: Tensor
    up2: Tensor
    down2: Tensor
    scale: float

    @classmethod
    def read(cls, parts: Parts) -> LoHa:
        up1, down1, up2, down2 = (_half(parts, half, side) for half in "12" for side in "ab")
        shapes = (up1.shape[0], down1.shape[1]), (up2.shape[0], down2.shape[1])
        if shapes[0] != shapes[1] or up1.shape[1] != down1.shape[0] or up2.shape[1] != down2.shape[0]:
            raise ValueError(f"{parts.shapes(*sorted(cls.owns))} do not fit together")
        return cls(up1, down1, up2, down2, parts.scaling(down1.shape[0]))

    @property
    def size(self) -> tuple[int, int]:
        return self.up1.shape[0], self.down1.shape[1]

    @property
    def rank(self) -> int:
        return self.down1.shape[0]

    def factors(self, base_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.down1.shape[0] * self.down2.shape[0] >= min(self.size):
            return super().factors(base_weight)
        # The elementwise product of two sums is the sum over all pairs: rank r·r, and still thin.
        up1, down1, up2, down2 = on(base_weight, self.up1, self.down1, self.up2, self.down2)
        up = torch.einsum("oa,ob->oab", up1, up2).flatten(1)
        down = torch.einsum("ad,bd->abd", down1, down2).flatten(0, 1)
        return self.scale * up, down

    def _delta(self, base: Tensor | None) -> Tensor:
        up1, down1, up2, down2 = on(base, self.up1, self.down1, self.up2, self.down2)
        return self.scale * (up1 @ down1) * (up2 @ down2)


def _half(parts: Parts, half: str, side: str) -> Tensor:
    """A half's up (o, r) or down (r, d); in Tucker form the file has (r, o), (r, i) and the core (r, r, kh, kw)."""
    matrix, core = parts.need(f"hada_w{half}_{side}"), parts.get(f"hada_t{half}")
    if matrix.ndim < 2 or matrix.numel() == 0:
        raise ValueError(f"hada_w{half}_{side} has shape {tuple(matrix.shape)}")
    matrix = matrix.flatten(1)
    if core is None:
        return matrix
    if core.ndim != 4 or core.shape[:2] != (matrix.shape[0],) * 2:
        raise ValueError(f"{parts.shapes(f'hada_w{half}_{side}', f'hada_t{half}')} do not fit together")
    return matrix.T if side == "a" else tucker(core, matrix)
