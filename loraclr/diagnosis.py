"""Diagnosis: why a concept stays weak in a merge, measured on a picture of it, and what to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraclr.bank import Bank
from loraclr.capture import applied
from loraclr.changes import Changes
from loraclr.concept import Concept
from loraclr.hosts import Host
from loraclr.precision import in_float64

WEAK = 0.8  # a concept of whose effect less than this share is kept is asked about
SILENT = 0.01  # an effect below this share of what the model predicts is none; the miniature's LoRAs have .06 to .19
ROWS = 4  # UNet calls that are looked at


@torch.no_grad()
def reasons(
    host: Host,
    modules: Mapping[str, nn.Module],
    concepts: Sequence[Concept],
    asked: Sequence[Changes],
    place: int,
    bank: Bank,
) -> list[str]:
    """Sentences for the user on what stands in the way of concept `place`, and what to do about it.

    On the concept's own prompt and picture, with e_j = v_j − v_base for what LoRA j alone does: the LoRA does nothing
    with these words if ‖e_i‖² is hardly anything, and LoRA j is in its way if ‖e_j‖ > ‖e_i‖.

    Args:
        asked: each LoRA's changes.
        bank: UNet calls of the concept's own pictures; some of them, spread over the steps, are looked at.
    """
    own, trigger = concepts[place].lora.name, concepts[place].trigger
    calls = bank.spread(ROWS)
    if calls is None:
        return []
    prompts, x, t = calls

    def predicted(changes: Changes) -> Tensor:
        with applied(modules, changes):
            return in_float64(host.predict(x.to(host.device), t.to(host.device), host.encode(prompts)))

    base = predicted({})
    effects = [float((predicted(changes) - base).square().sum()) for changes in asked]
    if effects[place] < SILENT * float(base.square().sum()):
        return [
            f'With "{trigger}", {own} hardly does anything: check the spelling of these words, or raise its weight.'
        ]
    found = []
    for other, concept in enumerate(concepts):
        mine, its = set(trigger.split()), set(concept.trigger.split())
        if other != place and its and (mine <= its or its <= mine):
            found.append(
                f'The words of {own} ("{trigger}") and {concept.lora.name} ("{concept.trigger}") are the same: '
                "give one of them words of its own."
            )
    strongest = max(range(len(effects)), key=effects.__getitem__)
    if strongest != place:
        other = concepts[strongest].lora.name
        found.append(
            f"Pictures of {own} are changed more by {other} than by {own} itself: give {other} a lower weight."
        )
    return found
