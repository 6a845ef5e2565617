"""What every kind of LoRA layer can do: give its exact change of weight, and factors of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from loraclr.precision import without_autocast


class Incomplete(ValueError):
    """A tensor is missing without which the others make no layer; the message is its suffix."""


@dataclass(frozen=True)
class Parts:
    """The tensors of one layer in a file, by suffix, and how its trainer scales a change of a given rank.

    scaling: rank → factor; rank None stands for a change that has none (a full Kronecker product).
    """

    tensors: Mapping[str, Tensor]
    scaling: Callable[[int | None], float]

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.tensors

    def any(self, suffixes: Iterable[str]) -> bool:
        return any(suffix in self.tensors for suffix in suffixes)

    def get(self, suffix: str) -> Tensor | None:
        """The tensor as float32, sharing no memory with the file; None if it is not there."""
        tensor = self.tensors.get(suffix)
        return None if tensor is None else tensor.to(torch.float32, copy=True)

    def need(self, suffix: str) -> Tensor:
        """As `get`. Raises Incomplete if the tensor is not there."""
        tensor = self.get(suffix)
        if tensor is None:
            raise Incomplete(suffix)
        return tensor

    def shapes(self, *suffixes: str) -> str:
        """The shapes of the given tensors in words, for an error message."""
        there = [f"{suffix} {tuple(self.tensors[suffix].shape)}" for suffix in suffixes if suffix in self.tensors]
        return " and ".join(filter(None, [", ".join(there[:-1]), there[-1]]))


@dataclass(frozen=True, eq=False)
class Change:
    """One layer's change of weight ΔW, and of bias, at strength 1.

    Class attributes: format, its name for people; marks, the suffixes that say a layer is of this kind; owns, all
    that the kind reads; needs_base, whether ΔW depends on the base weight.
    """

    format: ClassVar[str]
    marks: ClassVar[frozenset[str]] = frozenset()
    owns: ClassVar[frozenset[str]] = frozenset()

    _: KW_ONLY
    bias: Tensor | None = None

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        """Whether these tensors are of this kind."""
        return parts.any(cls.marks)

    @classmethod
    def read(cls, parts: Parts) -> Change:
        """Put the tensors together. Raises Incomplete, or ValueError with the shapes that do not fit together."""
        raise NotImplementedError

    @property
    def needs_base(self) -> bool:
        return False

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Rows and columns of ΔW as a matrix (o, d); None where the base weight decides."""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """The rank that the file stores; None for a kind that has none."""
        return None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this can change a weight of the given shape: (o, i), (o, i, kh, kw) or (n,)."""
        rows, columns = self.size
        return rows in (None, shape[0]) and columns in (None, prod(shape[1:]))

    def delta(self, base_weight: Tensor | None = None) -> Tensor:
        """ΔW in float32, with the shape and on the device of the base weight.

        Without a base weight: as a matrix (o, d) on the CPU, for the kinds that do not depend on it. Raises ValueError,
        with both shapes, if the change does not fit the weight.
        """
        if base_weight is None:
            if self.needs_base:
                raise ValueError(f"a {self.format} change depends on the base weight")
            return self._delta(None).flatten(1)
        if not self.fits(tuple(base_weight.shape)):
            raise ValueError(
                f"a change of {in_words(self.size)} does not fit a weight of {in_words(base_weight.shape)}"
            )
        with torch.no_grad(), without_autocast(base_weight.device):
            return self._delta(base_weight.detach().float()).reshape(base_weight.shape)

    def bias_delta(self, base_bias: Tensor | None = None) -> Tensor | None:
        """The change of bias (o,) in float32, None if there is none. Raises ValueError if it does not fit the bias."""
        if self.bias is None or base_bias is None:
            return self.bias
        if self.bias.shape != base_bias.shape:
            raise ValueError(f"a change of {len(self.bias)} biases does not fit {len(base_bias)} biases")
        return self.bias.to(base_bias.device)

    def factors(self, base_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Exact factors of ΔW: up (o, r) and down (r, d) with up @ down = ΔW, in float32. Errors as `delta`.

        Kinds that are no product of thin factors give ΔW itself and the identity, so r is at most min(o, d).
        """
        delta = self.delta(base_weight)
        delta = delta.reshape(delta.shape[0], -1)
        identity = torch.eye(min(delta.shape), device=delta.device)
        return (identity, delta) if delta.shape[0] <= delta.shape[1] else (delta, identity)

    def rows(self, part: int, parts: int) -> Change:
        """The change of one of `parts` projections that a fused one holds, one below the other.

        Raises ValueError for kinds that look at the whole fused weight, and for rows that cannot be divided.
        """
        rows, _ = self.size
        if self.needs_base or rows is None or rows % parts:
            raise ValueError(f"a {self.format} change of {in_words(self.size)} cannot be taken apart into {parts}")
        return Rows(self, part, parts, bias=self._bias_of(part, parts))

    def _bias_of(self, part: int, parts: int) -> Tensor | None:
        return None if self.bias is None else self.bias.chunk(parts)[part]

    def norm(self) -> float:
        """‖ΔW‖, the Frobenius norm, for the kinds that do not depend on the base weight; else ValueError."""
        return float(torch.linalg.vector_norm(self.delta(), dtype=torch.float64))

    def _delta(self, base: Tensor | None) -> Tensor:
        """ΔW with two or more dimensions, its elements in the base weight's order."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Rows(Change):
    """The rows of a fused projection's change that belong to one of the projections in it: number `part` of `parts`."""

    fused: Change
    part: int
    parts: int

    @property
    def format(self) -> str:
        return self.fused.format

    @property
    def size(self) -> tuple[int | None, int | None]:
        rows, columns = self.fused.size
        return None if rows is None else rows // self.parts, columns

    @property
    def rank(self) -> int | None:
        return self.fused.rank

    def _delta(self, base: Tensor | None) -> Tensor:
        return on(base, self.fused.delta().chunk(self.parts)[self.part])[0]


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite in float32: their sum tells it faster, unless it is too large itself."""
    values = tensor.float()
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def in_words(size: Iterable[int | None]) -> str:
    """A shape as "320×768", with "?" for what is not known."""
    return "×".join("?" if length is None else str(length) for length in size)


def on(base: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors moved to the base weight's device."""
    return tensors if base is None else tuple(tensor.to(base.device) for tensor in tensors)


def tucker(core: Tensor, down: Tensor) -> Tensor:
    """A Tucker convolution's core (r, r, kh, kw) and down (r, i) as one k×k down, flattened to (r, i·kh·kw)."""
    return torch.einsum("abkl,bi->aikl", core, down).flatten(1)
