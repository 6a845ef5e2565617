"""What OpenCLIP multiplies without a layer, q, k, v and the text projection, as layers for hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """A linear layer whose weight (o, d) and bias are another module's memory, wherever that is at the moment."""

    def __init__(self, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None] = lambda: None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    @property
    def weight(self) -> Tensor:
        return self._weight()

    @property
    def bias(self) -> Tensor | None:
        return self._bias()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Split:
    """An attention, whose q, k and v are one parameter, and its four projections by the names of transformers' CLIP.

    Torch computes all of it in one function, which calls no module: hooks on `projections` see something only inside
    `opened`. Raises ValueError if keys and values are not as wide as queries, which no CLIP has.
    """

    replaces = "forward"

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("only attention with one projection for q, k and v can be taken apart")
        self.owner = attention
        thirds = {f"{side}_proj": self._third(third) for third, side in enumerate("qkv")}
        self.projections: dict[str, nn.Module] = {**thirds, "out_proj": attention.out_proj}

    def _third(self, third: int) -> Projection:
        def bias() -> Tensor | None:
            fused = self.owner.in_proj_bias
            return None if fused is None else fused.chunk(3)[third]

        return Projection(lambda: self.owner.in_proj_weight.chunk(3)[third], bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """What `nn.MultiheadAttention.forward` gives, but for the attention's weights, projection by projection."""
        if key_padding_mask is not None:
            raise NotImplementedError("padding masks are not supported here")
        heads, first = self.owner.num_heads, self.owner.batch_first

        def split(x: Tensor) -> Tensor:
            """(B, T, d), or (T, B, d) → (B, heads, T, d / heads)."""
            return (x if first else x.transpose(0, 1)).unflatten(-1, (heads, -1)).transpose(1, 2)

        sides = zip("qkv", (query, key, value), strict=True)
        q, k, v = (split(self.projections[f"{side}_proj"](x)) for side, x in sides)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)
        return self.projections["out_proj"](mixed if first else mixed.transpose(0, 1)), None


class Pooling:
    """What the webui's wrapper of SDXL's second encoder makes of a whole prompt, and its projection as a layer."""

    replaces = "pool"

    def __init__(self, wrapper: nn.Module) -> None:
        self.owner = wrapper
        self.projections: dict[str, nn.Module] = {
            "text_projection": Projection(lambda: wrapper.model.text_projection.T)
        }

    def pool(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Features (B, T, d) at each prompt's end, its largest token in (B, T), projected: (B, P)."""
        ends = features[torch.arange(len(features), device=features.device), tokens.argmax(-1)]
        return self.projections["text_projection"](ends)


@contextmanager
def opened(parts: Sequence[Split | Pooling]) -> Iterator[None]:
    """Inside, these compute by their projections; on exit they are as before."""
    replaced = []
    try:
        for part in parts:
            replaced.append((part.owner, part.replaces, vars(part.owner).get(part.replaces)))
            setattr(part.owner, part.replaces, getattr(part, part.replaces))
        yield
    finally:
        for owner, name, before in replaced:
            if before is None:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, before)
