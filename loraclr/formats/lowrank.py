"""LoRA and LoCon: up @ down, for Linear layers and convolutions, also in Tucker form (kohya, LyCORIS, PEFT)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from loraclr.formats.change import Change, Parts, on, tucker


@dataclass(frozen=True, eq=False)
class Layer(Change):
    """One layer's change of weight, ΔW = alpha/rank · up @ down, as float32 factors. What is written is of this kind.

    up: (o, r). down: (r, d), with d = channels · kernel height · kernel width for a convolution, flattened as
    ``weight.flatten(1)`` does. conv: whether the layer is a convolution, kernel: its size.
    """

    format = "LoRA"
    marks = frozenset({"lora_up.weight", "lora_down.weight"})
    owns = marks | {"lora_mid.weight"}

    up: Tensor
    down: Tensor
    alpha: float
    conv: bool = False
    kernel: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0] or self.rank == 0:
            raise ValueError(f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} are not (o, r) and (r, d)")

    @classmethod
    def read(cls, parts: Parts) -> Layer:
        up, down, mid = parts.need("lora_up.weight"), parts.need("lora_down.weight"), parts.get("lora_mid.weight")
        conv, kernel = up.ndim == 4 or down.ndim == 4, tuple(down.shape[2:]) or (1, 1)
        fits = up.ndim in (2, 4) and down.ndim in (2, 4) and up.shape[2:] in ((), (1, 1))
        if not fits or up.shape[1] != down.shape[0] or 0 in (*up.shape, *down.shape):
            shapes = f"lora_up {tuple(up.shape)} and lora_down {tuple(down.shape)}"
            raise ValueError(f"{shapes} do not fit together")
        up, down, rank = up.flatten(1), down.flatten(1), up.shape[1]
        if mid is not None:
            if mid.ndim != 4 or mid.shape[:2] != (rank, rank) or kernel != (1, 1):
                raise ValueError(f"{parts.shapes('lora_down.weight', 'lora_mid.weight')} do not fit together")
            down, conv, kernel = tucker(mid, down), True, tuple(mid.shape[2:])
        return cls(up, down, parts.scaling(rank) * rank, conv, kernel)

    @property
    def size(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self, base_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        up, down = on(base_weight, self.up, self.down)
        return up * self.scale, down

    def rows(self, part: int, parts: int) -> Change:
        if self.size[0] % parts:
            return super().rows(part, parts)
        up = self.up.chunk(parts)[part]
        return replace(self, up=up, bias=self._bias_of(part, parts))

    def norm(self) -> float:
        up, down = self.up.double(), self.down.double()  # ‖up @ down‖² = tr((upᵀ up)(down downᵀ)), no (o, d) matrix
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return abs(self.scale) * max(squared, 0.0) ** 0.5

    def _delta(self, base: Tensor | None) -> Tensor:
        device = self.up.device if base is None else base.device
        return self.scale * (self.up.to(device) @ self.down.to(device))


def scaled_bias(parts: Parts) -> Tensor | None:
    """PEFT's bias of lora_B, which is scaled as up @ down is."""
    bias = parts.get("lora_up.bias")
    return None if bias is None else bias.flatten() * parts.scaling(parts.need("lora_up.weight").shape[1])
