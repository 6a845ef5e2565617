"""Merges that look at weights only: the changes of one layer in, one change out, as pure functions.

A change is a pair of factors, up (o, r) and down (r, d), with ΔW = up @ down; scale and strength are folded into it, as
`loraclr.changes.Changes` has them. What works entry by entry takes dense ΔW (o, d) and gives one back. A LoRA that
leaves a layer alone is simply not in its list. A density is the share of entries that stay; ValueError if it is not in
(0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraclr.precision import in_float64
from loraclr.solve import Factors


def dense(change: Factors) -> Tensor:
    """ΔW = up @ down, (o, d)."""
    up, down = change
    return up @ down


def concat(changes: Sequence[Factors]) -> Factors:
    """The exact sum of all ΔW_i, as factors side by side: (o, Σr) and (Σr, d). LoRAs may differ in rank.

    This is what LoRAs stacked in one prompt do. A strength counts once, in `up`; tools that put it on both factors, or
    keep alpha while the rank grows, get another strength from the same words.
    """
    return torch.cat([up for up, _ in changes], 1), torch.cat([down for _, down in changes], 0)


def average(changes: Sequence[Factors], of: int) -> Factors:
    """The sum divided by the number of LoRAs, `of`, those counted that leave this layer alone (FedAvg)."""
    up, down = concat(changes)
    return up / of, down


def factor_sum(changes: Sequence[Factors]) -> Factors:
    """(Σ up_i)(Σ down_i), which several tools call a merge: it adds the cross terms up_i @ down_j nobody asked for.

    Raises:
        ValueError: the LoRAs differ in rank, so their factors cannot be added.
    """
    ranks = sorted({down.shape[0] for _, down in changes})
    if len(ranks) > 1:
        raise ValueError(f"factors of ranks {', '.join(map(str, ranks))} cannot be added: choose sum instead.")
    return torch.stack([up for up, _ in changes]).sum(0), torch.stack([down for _, down in changes]).sum(0)


def trim(delta: Tensor, density: float) -> Tensor:
    """The share `density` of entries with the largest magnitudes (all that are equal to the last); the others are 0."""
    _check(density)
    if density == 1:
        return delta
    sizes, count = delta.abs(), int(density * delta.numel())
    if count == 0:
        return torch.zeros_like(delta)
    least = sizes.flatten().kthvalue(delta.numel() - count + 1).values  # several times faster than topk
    return torch.where(sizes >= least, delta, 0.0)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry stays with probability `density`, scaled up by 1/density to keep the expected value, or becomes 0."""
    _check(density)
    if density == 1:
        return delta
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density


def elect(deltas: Sequence[Tensor]) -> Tensor:
    """Per entry the mean over those LoRAs that change it in the direction of the sum; 0 where none does.

    The second half of TIES (Yadav et al., NeurIPS 2023, section 4): elect the sign with more weight behind it, then
    average the values that have it.
    """
    stacked = torch.stack(list(deltas))
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0).to(stacked)
    agreeing = stacked.sign() == sign
    return (stacked * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """TIES: trim every ΔW_i, then `elect`. Strengths are part of ΔW_i, so they count in the election."""
    return elect([trim(delta, density) for delta in deltas])


def dare_ties(deltas: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al., ICML 2024) in front of TIES' election: `drop` at random, then `elect`."""
    return elect([drop(delta, density, generator) for delta in deltas])


def dare_linear(deltas: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """The sum of ΔW_i of which DARE has dropped entries at random."""
    return torch.stack([drop(delta, density, generator) for delta in deltas]).sum(0)


def magnitude_prune(deltas: Sequence[Tensor], density: float) -> Tensor:
    """The sum of ΔW_i of which only the largest entries are left."""
    return torch.stack([trim(delta, density) for delta in deltas]).sum(0)


def orthogonal(changes: Sequence[Factors]) -> Factors:
    """The sum after each LoRA is confined to inputs of its own, so that none answers to what another listens to.

    Orthogonal Adaptation (Po et al., CVPR 2024) trains LoRAs whose `down` are orthogonal, and adds them up; for LoRAs
    trained without that, their input subspaces are moved to the nearest orthogonal ones (Löwdin's orthogonalisation),
    and each ΔW_i keeps what lies in its own. Where they are orthogonal already, this is the exact sum.

    Raises:
        ValueError: the subspaces are not independent (more ranks than inputs, or a direction in two LoRAs), so no
            orthogonal ones are near.
    """
    bases = [_inputs(down) for _, down in changes]
    stacked = torch.cat(bases, 1)
    if not stacked.shape[1]:  # none of them does anything here
        return concat(changes)
    rows, singular, columns = torch.linalg.svd(stacked, full_matrices=False)
    if stacked.shape[1] > stacked.shape[0] or float(singular[-1]) < 1e-3:
        raise ValueError(
            f"the LoRAs' subspaces cannot be made orthogonal (ranks {stacked.shape[1]} in all for {stacked.shape[0]} "
            "inputs, or two of them share a direction): choose another method."
        )
    own = (rows @ columns).split([basis.shape[1] for basis in bases], 1)
    parts = [(up, (in_float64(down) @ q) @ q.T) for (up, down), q in zip(changes, own, strict=True)]
    return concat([(up, down.to(up)) for up, down in parts])


def _inputs(down: Tensor) -> Tensor:
    """An orthonormal basis (d, rank) in float64 of the inputs that a LoRA looks at."""
    rows, singular, _ = torch.linalg.svd(in_float64(down).T, full_matrices=False)
    return rows[:, singular > 1e-9 * singular.max()]


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density is {density:g}, but must be above 0 and at most 1")
