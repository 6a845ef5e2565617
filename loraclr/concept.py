"""A concept: one LoRA to merge, with the words that call it, its strength, and what can be wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from loraclr import prompts
from loraclr.changes import Changes, changes_of, strength
from loraclr.embeddings import in_text
from loraclr.hosts import Host
from loraclr.lora import LoRA


@dataclass(frozen=True)
class Concept:
    """One LoRA to merge.

    Attributes:
        trigger: the words that call it.
        weight: strength for the UNet, and for the text encoder unless `text_weight` is given; any real number.
        blocks: for each block what its strength is multiplied by, as `loraclr.blocks.block_weights` returns it.
        kind: a style changes how everything is drawn, so other prompts are looked at.
        prompts: what to look at, `{}` standing for the trigger; empty for the usual ones.
    """

    lora: LoRA
    trigger: str
    weight: float = 1.0
    text_weight: float | None = None
    kind: prompts.Kind = "subject"
    prompts: tuple[str, ...] = ()
    blocks: Mapping[str, float] | None = None

    def strength(self, name: str) -> float:
        """How much of the LoRA's change a layer gets, 0 for a layer that is left alone."""
        return strength(name, self.lora.family, self.weight, self.text_weight, self.blocks)

    def changes(self, modules: Mapping[str, nn.Module] | None = None) -> Changes:
        """What the concept asks for, see `loraclr.changes.changes_of`."""
        return changes_of(self.lora, modules, self.weight, self.text_weight, self.blocks)

    def with_words(self, renamed: Mapping[str, str]) -> Concept:
        """The concept with its LoRA's embeddings under other names, old → new, in its trigger and prompts too."""
        if not renamed:
            return self
        words, by_layer = (
            {renamed.get(name, name): vectors for name, vectors in each.items()}
            for each in (self.lora.embeddings, self.lora.layer_embeddings)
        )
        lora = replace(self.lora, embeddings=words, layer_embeddings=by_layer)
        texts = tuple(in_text(text, renamed) for text in self.prompts)
        return replace(self, lora=lora, trigger=in_text(self.trigger, renamed), prompts=texts)


def check(host: Host, concepts: Sequence[Concept]) -> None:
    """Refuse what cannot be merged for the model that the host has loaded.

    Raises:
        ValueError: one sentence that names the LoRA and says what to do.
    """
    if not concepts:
        raise ValueError("No LoRA is chosen: choose at least one.")
    modules = host.layers()
    for concept in concepts:
        name, lora = concept.lora.name, concept.lora
        if not concept.trigger.strip():
            raise ValueError(f"{name} has no trigger words: write the words that call it into its row.")
        check_weights(concept)
        if lora.family != host.family:
            raise ValueError(
                f"{name} is for {lora.family.upper()}, but the loaded checkpoint is {host.family.upper()}."
            )
        check_layers(lora, modules)


def check_layers(lora: LoRA, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a LoRA with layers that the model lacks or has in another shape.

    Raises:
        ValueError: one sentence that names the LoRA and the layer.
    """
    missing = sorted(set(lora.layers) - set(modules))
    if missing:
        raise ValueError(f"{lora.name} has layers that the loaded model lacks ({missing[0]}): it is for another model.")
    for name in lora.layers:
        lora.check_fits(name, modules[name].weight)


def check_weights(concept: Concept) -> None:
    """Refuse weights that are no numbers, or that leave nothing of the LoRA.

    Raises:
        ValueError: one sentence that names the LoRA.
    """
    name, blocks = concept.lora.name, concept.blocks or {}
    given = {"weight": concept.weight, "text weight": concept.text_weight}
    given |= {f"block weight {block}": weight for block, weight in blocks.items()}
    for what, weight in given.items():
        if weight is not None and not math.isfinite(weight):
            raise ValueError(f"{name} has {what} {weight:g}: give it a number.")
    if not any(map(concept.strength, concept.lora.layers)):
        raise ValueError(f"{name} has weight 0 in every layer that it changes: give it another one, or leave it out.")
