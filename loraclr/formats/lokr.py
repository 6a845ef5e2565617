"""LoKr: the Kronecker product of two matrices, each whole or factorised (LyCORIS, PEFT; KronA, arXiv 2212.10650)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.formats.change import Change, Parts, on, tucker


@dataclass(frozen=True, eq=False)
class LoKr(Change):
    """ΔW = scale · (up1 @ down1) ⊗ (up2 @ down2); a matrix that is whole in the file is multiplied by an identity.

    A convolution's second matrix is flattened to (o₂, i₂·kh·kw), which is how the product is laid out too.
    """

    format = "LoKr"
    marks = frozenset(f"lokr_w{half}{side}" for half in "12" for side in ("", "_a", "_b"))
    owns = marks | {"lokr_t2"}

    up1: Tensor
    down1: Tensor
    up2: Tensor
    down2: Tensor
    scale: float
    stored: int | None

    @classmethod
    def read(cls, parts: Parts) -> LoKr:
        first, second = _half(parts, "1"), _half(parts, "2")
        # The trainers scale by the rank of whatever is factorised, the first matrix before the second.
        ranks = [down.shape[0] for half, (_, down) in zip("12", (first, second), strict=True)
                 if f"lokr_w{half}" not in parts]  # fmt: skip
        rank = ranks[0] if ranks else None
        return cls(*first, *second, parts.scaling(rank), rank)

    @property
    def size(self) -> tuple[int, int]:
        return self.up1.shape[0] * self.up2.shape[0], self.down1.shape[1] * self.down2.shape[1]

    @property
    def rank(self) -> int | None:
        return self.stored

    def factors(self, base_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.down1.shape[0] * self.down2.shape[0] >= min(self.size):
            return super().factors(base_weight)
        # (AB) ⊗ (CD) = (A ⊗ C)(B ⊗ D)
        up1, down1, up2, down2 = on(base_weight, self.up1, self.down1, self.up2, self.down2)
        return self.scale * torch.kron(up1, up2), torch.kron(down1, down2)

    def _delta(self, base: Tensor | None) -> Tensor:
        up1, down1, up2, down2 = on(base, self.up1, self.down1, self.up2, self.down2)
        return self.scale * torch.kron(up1 @ down1, up2 @ down2)


def _half(parts: Parts, half: str) -> tuple[Tensor, Tensor]:
    """One of the two matrices as up @ down."""
    whole = parts.get(f"lokr_w{half}")
    if whole is not None:
        if whole.ndim < 2 or whole.numel() == 0:
            raise ValueError(f"lokr_w{half} has shape {tuple(whole.shape)}")
        whole = whole.flatten(1)
        identity = torch.eye(min(whole.shape))
        return (identity, whole) if whole.shape[0] <= whole.shape[1] else (whole, identity)
    up, down = parts.need(f"lokr_w{half}_a"), parts.need(f"lokr_w{half}_b")
    core = parts.get("lokr_t2") if half == "2" else None
    names = [f"lokr_w{half}_a", f"lokr_w{half}_b"]
    if min(up.ndim, down.ndim) < 2 or 0 in (*up.shape, *down.shape):
        raise ValueError(f"{parts.shapes(*names)} do not fit together")
    if core is not None:
        if core.ndim != 4 or core.shape[:2] != (up.shape[0], down.shape[0]):
            raise ValueError(f"{parts.shapes(*names, 'lokr_t2')} do not fit together")
        up, down = up.flatten(1).T, tucker(core, down.flatten(1))
    if up.flatten(1).shape[1] != down.shape[0]:
        raise ValueError(f"{parts.shapes(*names)} do not fit together")
    return up.flatten(1), down.flatten(1)
