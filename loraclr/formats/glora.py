"""GLoRA: a change that multiplies the base weight and one that is added (LyCORIS; arXiv 2306.07967)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.formats.change import Change, Parts, on, tucker
from loraclr.precision import without_autocast


@dataclass(frozen=True, eq=False)
class GLoRA(Change):
    """ΔW = scale · (W a_up a_down + b_up b_down); a_up (i, r), a_down (r, i), b_up (o, r), b_down (r, d)."""

    format = "GLoRA"
    marks = frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight"})
    owns = marks | {"bm.weight"}

    a_up: Tensor
    a_down: Tensor
    b_up: Tensor
    b_down: Tensor
    scale: float

    @classmethod
    def read(cls, parts: Parts) -> GLoRA:
        a1, a2, b1, b2 = (parts.need(f"{name}.weight") for name in ("a1", "a2", "b1", "b2"))
        if min(tensor.ndim for tensor in (a1, a2, b1, b2)) < 2:
            raise ValueError(f"{parts.shapes(*sorted(cls.marks))} do not fit together")
        # Until LyCORIS 2.2 number 1 was applied first, as a LoRA's down is; since then number 2 is.
        layouts = [order for order in ((a1, a2, b1, b2), (a2, a1, b2, b1)) if _is_product(*order)]
        if not layouts:
            raise ValueError(f"{parts.shapes(*sorted(cls.marks))} do not fit together")
        # A square layer's tensors fit both, one time with rank and width exchanged.
        a1, a2, b1, b2 = min(layouts, key=lambda order: order[1].shape[0])
        core = parts.get("bm.weight")
        b_down = b2.flatten(1) if core is None else tucker(core, b2.flatten(1))
        return cls(a1.flatten(1), a2.flatten(1), b1.flatten(1), b_down, parts.scaling(a2.shape[0]))

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def size(self) -> tuple[int, int]:
        return self.b_up.shape[0], self.b_down.shape[1]

    @property
    def rank(self) -> int:
        return self.a_down.shape[0]

    def fits(self, shape: tuple[int, ...]) -> bool:
        return super().fits(shape) and len(shape) > 1 and shape[1] == self.a_up.shape[0]

    def factors(self, base_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if base_weight is None or base_weight.ndim > 2 or 2 * self.rank >= min(self.size):
            return super().factors(base_weight)
        a_up, a_down, b_up, b_down = on(base_weight, self.a_up, self.a_down, self.b_up, self.b_down)
        with torch.no_grad(), without_autocast(base_weight.device):
            up = torch.cat([base_weight.float() @ a_up, b_up], dim=1)
        return self.scale * up, torch.cat([a_down, b_down])

    def _delta(self, base: Tensor | None) -> Tensor:
        a_up, a_down, b_up, b_down = on(base, self.a_up, self.a_down, self.b_up, self.b_down)
        multiplied = torch.einsum("oi...,ir,rj->oj...", base, a_up, a_down)
        return self.scale * (multiplied + (b_up @ b_down).reshape(multiplied.shape))


def _is_product(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> bool:
    """Whether the tensors are (i, r), (r, i), (o, r) and (r, i, …)."""
    rank = a2.shape[0]
    inner = a1.shape[1] == b1.shape[1] == b2.shape[0] == rank > 0
    return inner and a1.shape[0] == a2.shape[1] == b2.shape[1]
