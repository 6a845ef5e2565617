"""Changes stored whole: full differences, norm layers, and biases alone (LyCORIS, ComfyUI)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.formats.change import Change, Parts, on


@dataclass(frozen=True, eq=False)
class Full(Change):
    """ΔW as it is in the file (o, …); absolute: the file holds the new weight instead of the difference."""

    format = "full"
    marks = frozenset({"diff", "set_weight"})
    owns = marks

    weight: Tensor
    absolute: bool = False

    @classmethod
    def read(cls, parts: Parts) -> Full:
        name = next(suffix for suffix in ("diff", "set_weight") if suffix in parts)
        weight = parts.need(name)
        if weight.ndim == 0 or weight.numel() == 0:
            raise ValueError(f"{parts.shapes(name)} is no weight")
        return cls(weight, name == "set_weight")

    @property
    def needs_base(self) -> bool:
        return self.absolute

    @property
    def size(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight[0].numel()

    def _delta(self, base: Tensor | None) -> Tensor:
        (weight,) = on(base, self.weight.reshape(len(self.weight), -1))
        return weight - base.reshape(weight.shape) if self.absolute else weight


@dataclass(frozen=True, eq=False)
class Norm(Full):
    """A norm layer's change of weight (n,), its change of bias beside it."""

    format = "norm"
    marks = frozenset({"w_norm"})
    owns = marks

    @classmethod
    def read(cls, parts: Parts) -> Norm:
        weight = parts.need("w_norm")
        if weight.ndim != 1 or weight.numel() == 0:
            raise ValueError(f"{parts.shapes('w_norm')} is no norm layer's weight")
        return cls(weight)


@dataclass(frozen=True, eq=False)
class Bias(Change):
    """A change of bias alone: ΔW is zero."""

    format = "bias"
    marks = frozenset({"diff_b", "b_norm"})

    @classmethod
    def read(cls, parts: Parts) -> Bias:
        return cls()

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def size(self) -> tuple[None, None]:
        return None, None

    def factors(self, base_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if base_weight is None:
            return super().factors()
        rows, columns = base_weight.flatten(1).shape
        return torch.zeros(rows, 0), torch.zeros(0, columns)

    def rows(self, part: int, parts: int) -> Bias:
        return Bias(bias=self._bias_of(part, parts))

    def _delta(self, base: Tensor | None) -> Tensor:
        return torch.zeros_like(base)
