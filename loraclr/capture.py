"""Hooks on a host's layers: apply a change without writing a weight, watch inputs, and keep the UNet's predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraclr.blocks import block
from loraclr.hosts import Record
from loraclr.keys import Family
from loraclr.lora import LoRA

#: Layer name → (up (o, r), down (r, d)), scale and strength folded in.
Changes = Mapping[str, tuple[Tensor, Tensor]]


def is_text(name: str) -> bool:
    """Whether a canonical layer name belongs to a text encoder."""
    return name.startswith("lora_te")


def is_cross_kv(name: str) -> bool:
    """Whether a layer is a cross-attention key or value projection: its input is the text, not the picture."""
    return name.endswith(("attn2_to_k", "attn2_to_v"))


def strength(
    name: str,
    family: Family,
    weight: float = 1.0,
    text_weight: float | None = None,
    blocks: Mapping[str, float] | None = None,
) -> float:
    """How much of a LoRA's change a layer gets: `weight`, in text encoders `text_weight` (None: the same), both times
    the weight of the layer's block (see `loraclr.blocks`; a block without one has 1).
    """
    own = text_weight if text_weight is not None and is_text(name) else weight
    return own if blocks is None else own * blocks.get(block(name, family), 1.0)


def changes_of(
    lora: LoRA,
    modules: Mapping[str, nn.Module],
    weight: float = 1.0,
    text_weight: float | None = None,
    blocks: Mapping[str, float] | None = None,
) -> Changes:
    """A LoRA's exact factors at its strength (see `strength`), on the CPU; a layer of strength 0 is left out.

    modules: the live layers by canonical name; some kinds of change depend on their weights. Raises ValueError, one
    sentence, if a change does not fit its layer.
    """
    changes = {}
    for name, layer in lora.layers.items():
        share = strength(name, lora.family, weight, text_weight, blocks)
        if share:
            lora.check_fits(name, modules[name].weight)
            up, down = layer.factors(modules[name].weight)
            changes[name] = up.cpu() * share, down.cpu()
    return changes


@contextmanager
def applied(modules: Mapping[str, nn.Module], changes: Changes) -> Iterator[None]:
    """Inside, every layer named in `changes` puts out W x + up (down x); on exit the hooks are gone.

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
    if not isinstance(module, nn.Conv2d):
        return F.linear(F.linear(x, down), up)
    kernel = down.view(down.shape[0], x.shape[1], *module.kernel_size)
    inner = F.conv2d(x, kernel, None, module.stride, module.padding, module.dilation)
    return F.conv2d(inner, up[..., None, None])


@contextmanager
def observed(modules: Mapping[str, nn.Module], tell: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `tell(name, rows)` gets every input of the given layers as rows (B, tokens, d), detached."""

    def hook(name: str) -> Callable:
        def before(module: nn.Module, args: tuple) -> None:
            tell(name, _rows(module, args[0].detach()))

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as (B, tokens, d); a convolution's is unfolded into what each output place sees."""
    if not isinstance(module, nn.Conv2d):
        return x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
    if module.kernel_size == (1, 1):
        return x.flatten(2).mT
    return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT


@dataclass
class Bank:
    """UNet calls of one concept's own pictures: what it saw and what it predicted. Polish needs no other teacher.

    Lists of equal length, one entry for each picture and step, on the CPU: x (4, h, w), t (), prediction (4, h, w),
    and the number of the prompt in `prompts`.
    """

    prompts: list[str]
    x: list[Tensor] = field(default_factory=list)
    t: list[Tensor] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    prediction: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)

    def add(self, x: Tensor, t: Tensor, prompt: int, prediction: Tensor) -> None:
        """One entry more, copied to the CPU as float32."""
        for values, value in ((self.x, x), (self.t, t), (self.prediction, prediction)):
            values.append(value.detach().float().cpu().clone())
        self.prompt.append(prompt)


def filing(bank: Bank, contexts: Tensor) -> Record:
    """A `Record` that files UNet calls in `bank`.

    Hosts batch conditional and unconditional rows as they like, so a row's prompt is found by its context.

    Args:
        contexts: (P, T, C), what the host's text encoder gives for `bank.prompts`.
    """
    known = contexts.float().flatten(1)

    def record(x: Tensor, t: Tensor, context: Tensor, prediction: Tensor) -> None:
        if context.shape[1:] != contexts.shape[1:]:
            return
        near = torch.cdist(context.detach().float().flatten(1), known.to(context.device))
        times = t.reshape(-1).expand(x.shape[0])
        for row, place in enumerate(near.argmin(1).tolist()):
            bank.add(x[row], times[row], place, prediction[row])

    return record
