"""ED-LoRA with one context: what a word's embedding for each cross-attention layer does, folded into keys and values.

An ED-LoRA (Mix-of-Show, arXiv 2305.18292) gives every cross-attention layer a text of its own, encoded with the word's
embedding for that layer; other programs have one text for all. Let h be a token's feature with one embedding, and h_l
with that of layer l. Keys and values that should be (W + ΔW) h_l become (W + ΔW + D) h, where D = (W + ΔW) M and M is
the least-squares answer to M h ≈ h_l - h over the tokens of prompts with the word and without it. It is an
approximation: one linear map has to move the word's tokens and leave all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraclr import layout, prompts
from loraclr.capture import applied
from loraclr.changes import Changes
from loraclr.embeddings import Embeddings
from loraclr.factor import truncate
from loraclr.hosts import Host
from loraclr.lora import LoRA
from loraclr.solve import closed_form

RIDGE = 1e-3
SHARE = 0.999  # of the difference's energy, which the rank of M keeps


def cross_layers() -> list[str]:
    """The cross-attention layers of the SD 1.x UNet by the canonical name before ``_to_k``, in the order of calls."""
    paths = [diffusers for diffusers, _ in layout.unet_paths("sd1") if diffusers.endswith("attn2.to_k")]
    return [f"lora_unet_{path.removesuffix('.to_k').replace('.', '_')}" for path in paths]


def bundled(lora: LoRA) -> Embeddings:
    """A LoRA's words with one embedding each: of one for each layer their mean."""
    means = {word: {"clip_l": vectors.mean(0, keepdim=True)} for word, vectors in lora.layer_embeddings.items()}
    return {**lora.embeddings, **means}


@torch.no_grad()
def folded(
    host: Host, modules: Mapping[str, nn.Module], lora: LoRA, changes: Changes, texts: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA's changes with its embeddings for single layers folded in; `texts` are prompts with its words."""
    word = " ".join(lora.layer_embeddings)
    more = [*prompts.filled(word, "style"), *(template.format(word, "dog") for template in prompts.PAIR)]
    known = list(dict.fromkeys([*texts, *more, *prompts.NEUTRAL, ""]))
    result, words = dict(changes), bundled(lora)
    text = {name: factors for name, factors in changes.items() if name.startswith("lora_te")}
    with applied(modules, text):
        with host.words(words):
            usual = host.encode(known).tokens.float()
        # The first token stands before every word, so it stays; it also draws the most attention.
        first = F.normalize(usual[0, 0], dim=0)
        rows = usual.flatten(0, 1)
        rows = rows - torch.outer(rows @ first, first)
        gram = rows.T @ rows
        for place, layer in enumerate(cross_layers()):
            own = {word: {"clip_l": vectors[place : place + 1]} for word, vectors in lora.layer_embeddings.items()}
            with host.words({**words, **own}):
                moved = (host.encode(known).tokens.float() - usual).flatten(0, 1)
            move = closed_form(gram, moved.T @ rows, RIDGE)
            up, down = truncate(torch.eye(len(move), device=move.device), move, "auto", gram, SHARE)
            for name in (f"{layer}_to_k", f"{layer}_to_v"):
                if name in modules:
                    result[name] = _extended(result.get(name), modules[name].weight, up, down)
    return result


def _extended(change: tuple[Tensor, Tensor] | None, weight: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's change with (W + ΔW) M beside it, M = up @ down."""
    weight = weight.float()
    if change is None:
        return (weight @ up).cpu(), down.cpu()
    own_up, own_down = change
    inputs = weight.shape[1]
    added = weight @ up + (own_up.to(up) @ (own_down[:, :inputs].to(up) @ up))
    wide = F.pad(down.cpu(), (0, own_down.shape[1] - inputs))
    return torch.cat([own_up, added.cpu()], 1), torch.cat([own_down, wide])
