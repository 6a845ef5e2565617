"""IA3: every input or output channel of the base weight grows or shrinks (LyCORIS; arXiv 2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraclr.formats.change import Change, Parts, on


@dataclass(frozen=True, eq=False)
class IA3(Change):
    """ΔW = W · growth, growth (n,) along the input channels (on_input) or the output channels."""

    format = "IA3"
    marks = frozenset({"on_input"})
    owns = marks | {"weight"}

    growth: Tensor
    on_input: bool

    @classmethod
    def read(cls, parts: Parts) -> IA3:
        if parts.need("on_input").numel() != 1:
            raise ValueError(f"{parts.shapes('on_input')} is not one number")
        return cls(parts.need("weight").flatten(), bool(parts.need("on_input")))

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def size(self) -> tuple[int | None, int | None]:
        return (None, len(self.growth)) if self.on_input else (len(self.growth), None)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and shape[1 if self.on_input else 0] == len(self.growth)

    def _delta(self, base: Tensor | None) -> Tensor:
        (growth,) = on(base, self.growth)
        axis = 1 if self.on_input else 0
        return base * growth.reshape([-1 if k == axis else 1 for k in range(base.ndim)])
