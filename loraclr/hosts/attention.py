"""OpenCLIP's attention, whose q, k and v are one parameter: as layers that hooks can see and change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """A third of `nn.MultiheadAttention`'s fused projection: 0 is q, 1 is k, 2 is v.

    Its weight (d, d) is the attention's own memory, wherever that is at the moment.
    """

    def __init__(self, attention: nn.MultiheadAttention, third: int) -> None:
        super().__init__()
        # In a tuple, so that the attention is no child of its own part.
        self._whole = (attention,)
        self._third = third

    @property
    def weight(self) -> Tensor:
        return self._whole[0].in_proj_weight.chunk(3)[self._third]

    @property
    def bias(self) -> Tensor | None:
        fused = self._whole[0].in_proj_bias
        return None if fused is None else fused.chunk(3)[self._third]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Split:
    """An attention, and its four projections by the names of transformers' CLIP.

    Torch computes all of it in one function, which calls no module: hooks on `projections` see something only inside
    `opened`. Raises ValueError if keys and values are not as wide as queries, which no CLIP has.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("only attention with one projection for q, k and v can be taken apart")
        self.attention = attention
        thirds = {f"{side}_proj": Projection(attention, third) for third, side in enumerate("qkv")}
        self.projections: dict[str, nn.Module] = {**thirds, "out_proj": attention.out_proj}

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
        heads, first = self.attention.num_heads, self.attention.batch_first

        def split(x: Tensor) -> Tensor:
            """(B, T, d), or (T, B, d) → (B, heads, T, d / heads)."""
            return (x if first else x.transpose(0, 1)).unflatten(-1, (heads, -1)).transpose(1, 2)

        sides = zip("qkv", (query, key, value), strict=True)
        q, k, v = (split(self.projections[f"{side}_proj"](x)) for side, x in sides)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)
        return self.projections["out_proj"](mixed if first else mixed.transpose(0, 1)), None


@contextmanager
def opened(splits: Sequence[Split]) -> Iterator[None]:
    """Inside, these attentions compute by their projections; on exit they are as before."""
    replaced = []
    try:
        for split in splits:
            replaced.append((split.attention, vars(split.attention).get("forward")))
            split.attention.forward = split.forward
        yield
    finally:
        for attention, before in replaced:
            if before is None:
                vars(attention).pop("forward", None)
            else:
                attention.forward = before
