"""Cross-talk: how much of what the other LoRAs do shows where one concept is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraclr.bank import Bank
from loraclr.capture import applied
from loraclr.changes import Changes
from loraclr.hosts import Host
from loraclr.precision import in_float64


@torch.no_grad()
def crosstalk(
    host: Host,
    modules: Mapping[str, nn.Module],
    asked: Sequence[Changes],
    merged: Changes,
    place: int,
    bank: Bank,
    rows: int = 4,
) -> list[float]:
    """For concept `place`, the share of every other LoRA's effect that the merged one lets into its pictures.

    With e_j = ε_j − ε_base, the effect of LoRA j on what the UNet predicts for this concept's prompt, the merged effect
    e is its own e_i and something besides; entry j is the coefficient of that rest along e_j,
    ⟨e − e_i, e_j⟩ / ‖e_j‖². LoRAs that are stacked and do not disturb each other give 1, a LoRA alone gives 0. A
    negative share is an effect turned round.

    Args:
        asked: each LoRA's changes.
        bank: UNet calls of the concept's own pictures; `rows` of them, spread over the steps, are looked at.
    Returns:
        One number for each LoRA, NaN for the concept itself and for LoRAs that do nothing there.
    """
    calls = bank.spread(rows)
    if calls is None:
        return [float("nan")] * len(asked)
    prompts, x, t = calls

    def predicted(changes: Changes) -> Tensor:
        with applied(modules, changes):
            context = host.encode(prompts)
            return in_float64(host.predict(x.to(host.device), t.to(host.device), context)).flatten().cpu()

    base = predicted({})
    rest = predicted(merged) - predicted(asked[place])
    shares = []
    for other, changes in enumerate(asked):
        effect = predicted(changes) - base if other != place else torch.zeros_like(base)
        size = effect.square().sum().item()
        shares.append((rest @ effect).item() / size if size > 0 else float("nan"))
    return shares
