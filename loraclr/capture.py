"""Hooks on a host's layers: apply a change without writing a weight, and watch inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraclr.changes import Changes, is_text

#: The layers that only scale and shift what they have normalised.
NORMS = (nn.LayerNorm, nn.GroupNorm)


def is_cross_kv(name: str) -> bool:
    """Whether a layer is a cross-attention key or value projection: its input is the text, not the picture."""
    return name.endswith(("attn2_to_k", "attn2_to_v"))


def reads_text(name: str) -> bool:
    """Whether a layer's input is text: one of a text encoder's, or a cross-attention key or value projection."""
    return is_text(name) or is_cross_kv(name)


_FUSABLE = re.compile(r"(.+_(?:attn1_to|self_attn))_[qkv](_proj)?")


def same_inputs(names: Iterable[str]) -> list[list[str]]:
    """Layer names in groups that read the very same rows: q, k and v of a self-attention."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = _FUSABLE.fullmatch(name)
        groups.setdefault(match[1] if match else name, []).append(name)
    return list(groups.values())


@contextmanager
def applied(modules: Mapping[str, nn.Module], changes: Changes) -> Iterator[None]:
    """Inside, every layer named in `changes` puts out what the change makes of it; on exit the hooks are gone.

    Gradients flow to the factors if they ask for them.
    """

    def hook(up: Tensor, down: Tensor) -> Callable:
        moved: list[tuple[Tensor, Tensor]] = []  # constant factors go to the input's device and type once

        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = args[0]
            if up.requires_grad or down.requires_grad:
                factors = up.to(x), down.to(x)
            else:
                if not moved or moved[0][0].dtype != x.dtype or moved[0][0].device != x.device:
                    moved[:] = [(up.to(x), down.to(x))]
                factors = moved[0]
            return output + _change(module, x, *factors).to(output.dtype)

        return add

    handles = [modules[name].register_forward_hook(hook(*factors)) for name, factors in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _change(module: nn.Module, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """up (down x), or up (down [x, 1]) where down has a column for a bias; up x̂ + down for a norm layer."""
    if isinstance(module, NORMS):
        return _normed(module, x, up, down)
    inputs = module.weight[0].numel()
    down, shift = (down, None) if down.shape[1] == inputs else (down[:, :inputs], down[:, inputs])
    if not isinstance(module, nn.Conv2d):
        return F.linear(F.linear(x, down, shift), up)
    kernel = down.reshape(down.shape[0], x.shape[1], *module.kernel_size)
    inner = F.conv2d(x, kernel, shift, module.stride, module.padding, module.dilation)
    return F.conv2d(inner, up[..., None, None])


def _normed(module: nn.Module, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """What a norm layer makes of x with another weight and bias (n,); without, x̂."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, scale, shift, module.eps)
    return F.layer_norm(x, module.normalized_shape, scale, shift, module.eps)


#: Which of a layer's places are looked at, by its name and how many it has: their numbers, or None for all.
Choose = Callable[[str, int], Tensor | None]


@contextmanager
def observed(
    modules: Mapping[str, nn.Module], tell: Callable[[str, Tensor], None], choose: Choose = lambda *_: None
) -> Iterator[None]:
    """Inside, `tell(name, rows)` gets the inputs of the given layers as rows (B, tokens, d), detached.

    A norm layer's are what it has normalised; a convolution's are what each place of its output sees.
    """

    def hook(name: str) -> Callable:
        def before(module: nn.Module, args: tuple) -> None:
            tell(name, _rows(module, args[0].detach(), lambda count: choose(name, count)))

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


PLACES = 256  # of a layer's input that a figure is taken at


def spread(_: str, count: int) -> Tensor | None:
    """A choice for `observed`: at most `PLACES` of a layer's `count` places, evenly; None if there are no more.

    Windows of all places of a 3×3 convolution take 2 GB in SDXL, for one layer and four rows.
    """
    return None if count <= PLACES else torch.arange(PLACES) * count // PLACES


def _rows(module: nn.Module, x: Tensor, choose: Callable[[int], Tensor | None]) -> Tensor:
    """A layer's input as (B, tokens, d) at the places that are chosen."""
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        return _windows(module, x, choose)
    if isinstance(module, NORMS):
        x = _normed(module, x)
    rows = x.flatten(2).mT if isinstance(module, nn.Conv2d | nn.GroupNorm) else x.reshape(len(x), -1, x.shape[-1])
    chosen = choose(rows.shape[1])
    return rows if chosen is None else rows[:, chosen.to(rows.device)]


def _windows(module: nn.Conv2d, x: Tensor, choose: Callable[[int], Tensor | None]) -> Tensor:
    """What a convolution sees at the places that are chosen; only these are copied: a window is 9 times its input."""
    tall, wide = module.padding
    x = F.pad(x, (wide, wide, tall, tall))
    for side, kernel, step, gap in zip((2, 3), module.kernel_size, module.stride, module.dilation, strict=True):
        x = x.unfold(side, gap * (kernel - 1) + 1, step)[..., ::gap]
    height, width = x.shape[2:4]
    chosen = choose(height * width)
    chosen = torch.arange(height * width) if chosen is None else chosen
    x = x[:, :, (chosen // width).to(x.device), (chosen % width).to(x.device)]
    return x.transpose(1, 2).flatten(2)
