"""ED-LoRA with one text for all layers: what its embeddings for single layers do, folded into keys and values.

An ED-LoRA (Mix-of-Show, arXiv 2305.18292) gives every cross-attention layer a text of its own, encoded with the word's
embedding for that layer; other programs have one text for all. Where layer l sees features X of the text with the
word's one embedding, instead of X_l, its keys and values lack (X_l - X)(W + ΔW)ᵀ. The change that gives most of it back
is a least-squares answer over prompts with the word and, so that it acts on nothing else, prompts without it, and only
its strongest directions are kept: with all of them it fits the prompts that it has seen and spoils others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraclr import layout, prompts
from loraclr.capture import applied
from loraclr.changes import Changes, is_text
from loraclr.factor import decompose, truncate
from loraclr.hosts import Host
from loraclr.lora import LoRA
from loraclr.solve import Factors, closed_form

#: Measured by `benchmarks.edlora`: with less ridge and less weight on prompts without the word, keys and values of
#: prompts with it come out closer, the UNet's output hardly (by 0.02 on average), and other prompts' output moves about
#: twice as far.
RANK = 4
RIDGE = 1e-2
NEUTRAL = 72.0  # prompts that those without the word count as, together


def cross_layers() -> list[str]:
    """The cross-attention layers of the SD 1.x UNet by the canonical name before ``_to_k``, in the order of calls."""
    paths = [diffusers for diffusers, _ in layout.unet_paths("sd1") if diffusers.endswith("attn2.to_k")]
    return [f"lora_unet_{path.removesuffix('.to_k').replace('.', '_')}" for path in paths]


@dataclass(frozen=True)
class Texts:
    """What an ED-LoRA's text encoder says of prompts: with each word's one embedding, and with those of each layer.

    usual: (B, T, d). by_layer: one such for every name in `cross_layers`.
    """

    usual: Tensor
    by_layer: Mapping[str, Tensor]


@torch.no_grad()
def read(host: Host, modules: Mapping[str, nn.Module], lora: LoRA, changes: Changes, texts: Sequence[str]) -> Texts:
    """Encode prompts as the LoRA, with these changes, was trained to have them encoded."""
    by_layer = {}
    with applied(modules, {name: factors for name, factors in changes.items() if is_text(name)}):
        with host.words(lora.words):
            usual = host.encode(list(texts)).tokens.float()
        for place, layer in enumerate(cross_layers()):
            own = {word: {"clip_l": vectors[place : place + 1]} for word, vectors in lora.layer_embeddings.items()}
            with host.words({**lora.words, **own}):
                by_layer[layer] = host.encode(list(texts)).tokens.float()
    return Texts(usual, by_layer)


@torch.no_grad()
def folded(
    host: Host, modules: Mapping[str, nn.Module], lora: LoRA, changes: Changes, texts: Sequence[str]
) -> dict[str, Factors]:
    """A LoRA's changes with its embeddings for single layers folded in; `texts` are prompts with its words."""
    word = " ".join(lora.layer_embeddings)
    beside = [template.format(word, "dog") for template in prompts.PAIR]
    known = read(host, modules, lora, changes, list(dict.fromkeys([*texts, *beside])))
    with applied(modules, {name: factors for name, factors in changes.items() if is_text(name)}):
        unrelated = [*prompts.NEUTRAL, ""]
        others = host.encode(unrelated).tokens.float().flatten(0, 1)
    rows, result = known.usual.flatten(0, 1), dict(changes)
    gram = rows.T @ rows + NEUTRAL / len(unrelated) * others.T @ others
    for layer, own in known.by_layer.items():
        moved = (own - known.usual).flatten(0, 1).T @ rows
        for name in (f"{layer}_to_k", f"{layer}_to_v"):
            if name in modules:
                result[name] = _extended(result.get(name), modules[name].weight.float(), moved, gram)
    return result


def _extended(change: Factors | None, weight: Tensor, moved: Tensor, gram: Tensor) -> Factors:
    """A layer's change with what it lacks beside it; moved: Σ (x_l - x) xᵀ (d, d) over the rows of the gram matrix."""
    inputs = weight.shape[1]
    own_up, own_down = change or (weight.new_zeros(len(weight), 0), weight.new_zeros(0, inputs))
    own_up, own_down = own_up.to(weight), own_down.to(weight)
    lacking = weight @ moved + own_up @ (own_down[:, :inputs] @ moved)
    up, down = truncate(*decompose(closed_form(gram, lacking, RIDGE)), RANK, gram)
    wide = F.pad(down, (0, own_down.shape[1] - inputs))
    return torch.cat([own_up, up], 1).cpu(), torch.cat([own_down, wide]).cpu()


@contextmanager
def layered(modules: Mapping[str, nn.Module], texts: Texts) -> Iterator[None]:
    """Inside, every cross-attention layer reads these prompts as its own text, found by the one that all layers get."""

    def reading(own: Tensor) -> Callable:
        def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = args
            # A host may have padded what it read together further than what it draws together.
            read, layer = (each[:, : x.shape[1]].to(x.device) for each in (texts.usual, own))
            near = torch.cdist(x.detach().float().flatten(1), read.flatten(1)).argmin(1)
            return (layer.to(x)[near],)

        return before

    handles = [
        modules[f"{layer}_to_{side}"].register_forward_pre_hook(reading(own))
        for layer, own in texts.by_layer.items()
        for side in "kv"
        if f"{layer}_to_{side}" in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
