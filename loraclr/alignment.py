"""Alignment: how near every layer's output comes to what a concept's own LoRA makes of it, by kind of layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from loraclr.bank import Bank
from loraclr.capture import NORMS, applied, is_cross_kv, observed, spread
from loraclr.changes import Changes, is_text, through
from loraclr.hosts import Host
from loraclr.precision import without_autocast
from loraclr.solve import Factors

ROWS = 4  # UNet calls that are looked at

TEXT, WORDS, ATTENTION, FEED_FORWARD, OTHER = KINDS = (
    "text encoder", "cross-attention k, v", "attention", "feed-forward", "other layers",
)  # fmt: skip


def kind(name: str) -> str:
    """The kind of layer, one of `KINDS`."""
    if is_text(name):
        return TEXT
    if is_cross_kv(name):
        return WORDS
    return ATTENTION if "_attn" in name else FEED_FORWARD if "_ff_" in name else OTHER


@torch.no_grad()
def alignment(
    host: Host,
    modules: Mapping[str, nn.Module],
    own: Changes,
    merged: Changes,
    bank: Bank,
    also: Callable[[str, Tensor], None] = lambda *_: None,
) -> dict[str, float]:
    """For each kind of layer 1 − Σ‖x(ΔW − ΔW_i)ᵀ‖² / Σ‖xΔW_iᵀ‖² over its layers, the positive term of Eq. 1 in shares.

    Sums are over some of a picture's places (`capture.spread`).
    1: the merged change does there what the concept's own does; 0: as far off as no change; below 0: further.

    Args:
        own: the concept's changes ΔW_i, which are applied while the inputs x are taken.
        merged: the merged changes ΔW.
        bank: UNet calls of the concept's own pictures; some of them, spread over the steps, are looked at.
        also: told the same, (layer name, inputs (B, tokens, d)).
    """
    wanted, missed = defaultdict(float), defaultdict(float)

    def tell(name: str, rows: Tensor) -> None:
        also(name, rows)
        asked, found = output(own.get(name), rows), output(merged.get(name), rows)
        wanted[kind(name)] += float(asked.square().sum()) if asked is not None else 0.0
        difference = found if asked is None else asked if found is None else found - asked
        missed[kind(name)] += float(difference.square().sum())

    calls = bank.spread(ROWS)
    if calls is None:
        return {}
    prompts, x, t = calls
    changed = {name: modules[name] for name in {**own, **merged} if not isinstance(modules[name], NORMS)}
    with applied(modules, own), observed(changed, tell, spread):
        host.predict(x.to(host.device), t.to(host.device), host.encode(prompts))
    return {name: 1 - missed[name] / wanted[name] for name in KINDS if wanted[name] > 0}


def output(change: Factors | None, rows: Tensor) -> Tensor | None:
    """What a change adds to a layer's output for rows (..., d), in float32; None if there is none."""
    if change is None:
        return None
    factors = tuple(factor.to(rows.device, torch.float32) for factor in change)
    with without_autocast(rows.device):
        return through(rows.float(), factors)
