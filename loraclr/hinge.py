"""Hinge: the paper's objective (Eq. 1-5) over a merged LoRA's layers, and where its negative term pushes at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraclr.alignment import KINDS, kind, output
from loraclr.changes import Changes
from loraclr.objective import contrastive, delta_penalty, negative_distances
from loraclr.precision import in_float64
from loraclr.solve import Factors

TOKENS = 8  # places of each UNet call, and of each prompt, that are looked at


@dataclass(frozen=True)
class Objective:
    """Eq. 5 over some layers, with a distance for each row ("token" in `loraclr.objective`).

    Attributes:
        layers: how many.
        start: its sum over them with ΔW = 0, where the paper's optimisation starts.
        merged: with the merged ΔW.
        active: share of their rows of all concepts that are nearer than m to what the merged layer makes of another
            concept's row, so that the negative term is not 0.
    """

    layers: int
    start: float
    merged: float
    active: float


def some(rows: Tensor) -> Tensor:
    """A few rows (k, d) of a layer's input (B, tokens, d), on the CPU: of every concept's the same places."""
    places = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))[:TOKENS]
    return rows[:, places.to(rows.device)].flatten(0, 1).cpu()


@torch.no_grad()
def objective(
    modules: Mapping[str, nn.Module],
    asked: Sequence[Changes],
    merged: Changes,
    seen: Sequence[Mapping[str, Tensor]],
    margin: float,
    penalty: float,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Objective]:
    """Eq. 5 of the merged layers by kind of layer (`loraclr.alignment.KINDS`), on some rows of their inputs.

    Args:
        asked: each concept's changes ΔW_i.
        merged: the merged changes ΔW.
        seen: for each concept, layer name → X_i (n, d), inputs taken while its own LoRA is at work.
        margin, penalty: m and λ.
        tick: called before every layer; may raise to cancel.
    """
    told: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for name, change in merged.items():
        tick()
        if all(name in inputs for inputs in seen):
            own = [changes.get(name) for changes in asked]
            told[kind(name)].append(_layer(modules[name], own, change, [i[name] for i in seen], margin, penalty))
    found = {}
    for what in filter(told.__contains__, KINDS):
        start, now, active = map(sum, zip(*told[what], strict=True))
        found[what] = Objective(len(told[what]), start, now, active / len(told[what]))
    return found


def _layer(
    module: nn.Module,
    own: Sequence[Factors | None],
    change: Factors,
    inputs: Sequence[Tensor],
    margin: float,
    penalty: float,
) -> tuple[float, float, float]:
    """One layer's objective at ΔW = 0 and now, and the share of its rows for which the negative term is active."""
    weight = module.weight.detach().flatten(1).float()
    fewest = min(map(len, inputs))  # the negative term compares row by row
    rows = [x[:fewest].to(weight.device, torch.float32) for x in inputs]
    base = [F.linear(x, weight) for x in rows]
    targets = [y + _of(ours, x) for y, ours, x in zip(base, own, rows, strict=True)]
    now = [y + _of(change, x) for y, x in zip(base, rows, strict=True)]
    start = contrastive(targets, base, margin, "token")
    penalised = float(delta_penalty(_size(change, weight.shape[1]), penalty))
    ended = float(contrastive(targets, now, margin, "token")) + penalised
    active = torch.stack(negative_distances(targets, now, "token")) < margin
    return float(start), ended, float(active.float().mean())


def _of(change: Factors | None, rows: Tensor) -> Tensor | float:
    made = output(change, rows)
    return 0.0 if made is None else made


def _size(change: Factors, inputs: int) -> Tensor:
    """‖up down‖, without the matrix: ‖BA‖² = tr(BᵀB AAᵀ). A column for a bias is no weight."""
    up, down = in_float64(change[0]), in_float64(change[1][:, :inputs])
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
