"""Diagnosis: why a concept stays weak in a merge, measured on a picture of it, and what to try."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraclr.alignment import output
from loraclr.bank import Bank
from loraclr.blocks import block
from loraclr.capture import NORMS, applied, observed, spread
from loraclr.changes import Changes
from loraclr.concept import Concept
from loraclr.hosts import Host
from loraclr.precision import in_float64

WEAK = 0.8  # a concept of whose effect less than this share is kept is asked about
SILENT = 0.01  # an effect below this share of what the model predicts is none; the miniature's LoRAs have .06 to .19
ROWS = 4  # UNet calls that are looked at
LOUD = 2.0  # a LoRA whose outputs in a block have this many times the energy of a concept's own drowns them there
NAMED = 3  # blocks that a sentence names at most


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
    with these words if ‖e_i‖² is hardly anything, and LoRA j is in its way if ‖e_j‖ > ‖e_i‖, or if it drowns LoRA i in
    some blocks of the model (`loudness`), which are named as block weights name them.

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
    shares = loudness(host, modules, asked, place, bank)
    drowned = [_drowned(each) for each in shares]
    if strongest != place:
        other, blocks = concepts[strongest].lora.name, ", ".join(drowned[strongest])
        found.append(
            f"Pictures of {own} are changed more by {other} than by {own} itself, most of all in {blocks}: "
            f"give {other} a lower weight, in these blocks at least."
            if blocks
            else f"Pictures of {own} are changed more by {other} than by {own} itself: give {other} a lower weight."
        )
    elif any(drowned):
        loudest = max(range(len(shares)), key=lambda other: sum(shares[other][name] for name in drowned[other]))
        other, blocks = concepts[loudest].lora.name, ", ".join(drowned[loudest])
        found.append(
            f"In pictures of {own}, {other} does much more in {blocks} than {own} itself: "
            f"give {other} a lower weight in these blocks."
        )
    return found


@torch.no_grad()
def loudness(
    host: Host,
    modules: Mapping[str, nn.Module],
    asked: Sequence[Changes],
    place: int,
    bank: Bank,
) -> list[dict[str, float]]:
    """For each LoRA j and each block of the model that concept `place`'s own LoRA i changes, Σ‖xΔW_jᵀ‖² / Σ‖xΔW_iᵀ‖².

    The sums are over the block's layers and their inputs x in the concept's own pictures, by its own LoRA, at some of
    their places (`capture.spread`); norm layers are left out.

    Args:
        asked, bank: as for `reasons`.
    """
    energies: list[dict[str, float]] = [defaultdict(float) for _ in asked]

    def tell(name: str, rows: Tensor) -> None:
        for energy, changes in zip(energies, asked, strict=True):
            put_out = output(changes.get(name), rows)
            if put_out is not None:
                energy[block(name, host.family)] += float(put_out.square().sum())

    calls = bank.spread(ROWS)
    if calls is None:
        return [{} for _ in asked]
    prompts, x, t = calls
    changed = {name: modules[name] for name in asked[place] if not isinstance(modules[name], NORMS)}
    with applied(modules, asked[place]), observed(changed, tell, spread):
        host.predict(x.to(host.device), t.to(host.device), host.encode(prompts))
    own = energies[place]
    return [{name: energy[name] / own[name] for name in own if own[name] > 0} for energy in energies]


def _drowned(shares: Mapping[str, float]) -> list[str]:
    """The blocks in which a LoRA is loudest, if it is louder there than `LOUD`."""
    return sorted((name for name in shares if shares[name] > LOUD), key=shares.__getitem__, reverse=True)[:NAMED]
