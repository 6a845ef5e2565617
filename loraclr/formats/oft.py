"""OFT and BOFT: the output channels are rotated in blocks (kohya, LyCORIS; arXiv 2306.07280 and 2311.06243)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.formats.change import Change, Parts, on


@dataclass(frozen=True, eq=False)
class OFT(Change):
    """ΔW = stretch · Rᵀ W − W, R block-diagonal; rotations (blocks, n, n), stretch (o,) or None."""

    format = "OFT"
    marks = frozenset({"oft_blocks", "oft_diag"})
    owns = marks | {"rescale"}

    rotations: Tensor
    stretch: Tensor | None

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return super().claims(parts) and not BOFT.claims(parts)

    @classmethod
    def read(cls, parts: Parts) -> OFT:
        # LyCORIS 2's oft_diag are the rotations themselves, oft_blocks what they are computed from.
        if "oft_blocks" in parts:
            return cls(_rotations(parts, 3), _stretch(parts))
        blocks = parts.need("oft_diag")
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
            raise ValueError(f"{parts.shapes('oft_diag')} are not square blocks")
        return cls(blocks, _stretch(parts))

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def size(self) -> tuple[int, None]:
        return self.rotations.shape[-3] * self.rotations.shape[-1], None

    def fits(self, shape: tuple[int, ...]) -> bool:
        return super().fits(shape) and (self.stretch is None or len(self.stretch) == shape[0])

    def _delta(self, base: Tensor | None) -> Tensor:
        rotated = self._rotated(base.flatten(1))
        if self.stretch is not None:
            rotated = rotated * self.stretch.to(rotated)[:, None]
        return rotated - base.flatten(1)

    def _rotated(self, rows: Tensor) -> Tensor:
        (rotations,) = on(rows, self.rotations)
        blocks = rows.reshape(rotations.shape[0], rotations.shape[1], -1)
        return (rotations.mT @ blocks).reshape(rows.shape)


@dataclass(frozen=True, eq=False)
class BOFT(OFT):
    """ΔW = stretch · R_m … R_1 W − W, a butterfly of block rotations (m, blocks, n, n).

    Stage k rotates blocks of channels that lie 2ᵏ·n/2 apart.
    """

    format = "BOFT"
    owns = frozenset({"oft_blocks", "rescale"})

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return "oft_blocks" in parts and parts.tensors["oft_blocks"].ndim == 4

    @classmethod
    def read(cls, parts: Parts) -> BOFT:
        change = cls(_rotations(parts, 4), _stretch(parts))
        stages, blocks, n, _ = change.rotations.shape
        if n % 2 or (blocks * n) % (2**stages * (n // 2)):
            raise ValueError(f"{parts.shapes('oft_blocks')} make no butterfly")
        return change

    def _rotated(self, rows: Tensor) -> Tensor:
        (rotations,) = on(rows, self.rotations)
        n, columns = rotations.shape[-1], rows.shape[1]
        for stage, blocks in enumerate(rotations):
            apart = 2**stage * (n // 2)
            mixed = rows.reshape(-1, 2, apart, columns).transpose(1, 2)
            mixed = blocks @ mixed.reshape(-1, n, columns)
            rows = mixed.reshape(-1, apart, 2, columns).transpose(1, 2).reshape(-1, columns)
        return rows


def _rotations(parts: Parts, dimensions: int) -> Tensor:
    """Cayley's (I + Q)(I − Q)⁻¹ of oft_blocks' skew part Q, held within the constraint that `alpha` stores."""
    blocks = parts.need("oft_blocks").double()
    if blocks.ndim != dimensions or blocks.shape[-1] != blocks.shape[-2] or blocks.numel() == 0:
        raise ValueError(f"{parts.shapes('oft_blocks')} are not square blocks")
    skew = blocks - blocks.mT
    alpha = parts.get("alpha")
    longest = 0.0 if alpha is None else float(alpha) * blocks.shape[-3] * blocks.shape[-1]
    if longest > 0 and skew.norm() > longest:
        skew = skew * (longest / skew.norm())
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return torch.linalg.solve(one - skew, one + skew, left=False).float()


def _stretch(parts: Parts) -> Tensor | None:
    stretch = parts.get("rescale")
    return None if stretch is None else stretch.flatten()
