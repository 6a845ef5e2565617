"""Polish: the merged factors trained end to end, so that the model predicts with them what it predicts with each LoRA.

The layerwise optimum treats layers one by one; errors add up on the way to the picture. Here the loss is the paper's
positive term (Eq. 1 with d_p of Eq. 2) at the model's output instead of a layer's,
E ‖ε_merged(z_t, t, p_i) − ε_i(z_t, t, p_i)‖² over the concepts' own denoising runs, unconditional branch included, plus
the same on neutral prompts with the base model as teacher. The teachers' predictions were made during capture, so no
teacher is run again. A model that predicts v instead of ε is compared in v, as it was trained: at one z_t the two
differences are the same up to a factor, Δε = √ᾱ_t Δv.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraclr.capture import Bank, Changes, applied
from loraclr.hosts import Host

RATE = 0.03  # learning rate of a factor relative to its own root mean square, for short runs
LONG_RATE = 0.02  # the same for runs of 200 steps and more
LOSS_SCALE = 1024.0  # keeps gradients of a model in half precision above its smallest number


@dataclass(frozen=True)
class Row:
    """One line of training: entry `entry` of bank `bank`."""

    bank: int
    entry: int


def balanced(changes: Changes) -> dict[str, tuple[Tensor, Tensor]]:
    """The same products, with both factors of a layer of one root mean square, so that one learning rate fits both."""
    result = {}
    for name, (up, down) in changes.items():
        ratio = (_rms(down) / _rms(up)).clamp(1e-6, 1e6).sqrt()
        result[name] = (up * ratio, down / ratio)
    return result


def _rms(value: Tensor) -> Tensor:
    return value.float().square().mean().sqrt().clamp(min=1e-12)


def polish(
    host: Host,
    modules: Mapping[str, nn.Module],
    changes: Changes,
    banks: list[Bank],
    shares: list[float],
    steps: int,
    batch: int,
    seed: int,
    tick: Callable[[int, float], None],
    at_once: int | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Train the factors for `steps` steps and return them.

    Args:
        banks: what to learn from, one for each concept and last the neutral one.
        shares: how much of a batch comes from each bank, relative.
        batch: rows in a step.
        at_once: rows through the UNet at a time, None for all: fewer need less memory, and give the same gradients.
        tick: told (step, loss relative to the first steps) after each step; may raise to cancel.
    Returns:
        Factors by layer name, float32; the ranks are those of `changes`.
    """
    start = balanced(changes)
    names = list(start)
    factors = [
        value.detach().to(host.device, torch.float32).clone().requires_grad_()
        for pair in start.values()
        for value in pair
    ]
    live = {name: (factors[2 * place], factors[2 * place + 1]) for place, name in enumerate(names)}
    relative = RATE if steps < 200 else LONG_RATE
    groups = [{"params": [value], "lr": relative * _rms(value.detach()).item()} for value in factors]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]

    weights = torch.tensor([share if len(bank) else 0.0 for share, bank in zip(shares, banks, strict=True)])
    generator = torch.Generator().manual_seed(seed)
    first, scale = None, LOSS_SCALE
    for step in range(steps):
        chosen = torch.multinomial(weights, batch, replacement=True, generator=generator).tolist()
        rows = [Row(b, int(torch.randint(len(banks[b]), (1,), generator=generator))) for b in chosen]
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min((step + 1) / 5, 0.5 * (1 + math.cos(math.pi * step / steps)))
        # The hooks stay for the way back, on which a host may compute parts again.
        with torch.enable_grad(), applied(modules, live):
            loss = _descend(host, banks, rows, at_once or batch, factors, scale)
        norm = nn.utils.clip_grad_norm_(factors, 1.0)
        if norm.isfinite():
            optimizer.step()
        else:  # half precision overflowed on the way back: skip the step, and ask for less from the next
            scale = max(1.0, scale / 8)
        first = first or loss
        tick(step + 1, loss / max(first, 1e-20))
    return {name: (up.detach(), down.detach()) for name, (up, down) in live.items()}


def _descend(
    host: Host, banks: list[Bank], rows: list[Row], at_once: int, factors: list[Tensor], scale: float
) -> float:
    """Set the factors' gradients of the mean error over the rows, which is returned; `scale` is out of them again."""
    for value in factors:
        value.grad = torch.zeros_like(value)
    whole = 0.0
    for begin in range(0, len(rows), at_once):
        loss = error(host, banks, rows[begin : begin + at_once]).sum() / len(rows)
        for value, gradient in zip(factors, torch.autograd.grad(loss * scale, factors, allow_unused=True), strict=True):
            if gradient is not None:
                value.grad += gradient / scale
        whole += loss.item()
    return whole


def error(host: Host, banks: list[Bank], rows: list[Row]) -> Tensor:
    """Mean squared difference (B,) between what the host predicts now and the rows' teachers."""
    texts = [banks[row.bank].prompts[banks[row.bank].prompt[row.entry]] for row in rows]
    unique = list(dict.fromkeys(texts))
    context = host.encode(unique)[[unique.index(text) for text in texts]]
    x = torch.stack([banks[row.bank].x[row.entry] for row in rows]).to(context.tokens)
    t = torch.stack([banks[row.bank].t[row.entry] for row in rows]).to(x.device)
    teacher = torch.stack([banks[row.bank].prediction[row.entry] for row in rows]).to(x.device)
    return (host.predict(x, t, context).float() - teacher).square().flatten(1).mean(1)


@torch.no_grad()
def missed(
    host: Host, modules: Mapping[str, nn.Module], changes: Changes, banks: list[Bank], batch: int
) -> list[float]:
    """How much of each bank's effect the merge misses: Σ‖ε_merged − ε_i‖² / Σ‖ε_base − ε_i‖², 0 is perfect.

    For the last bank, the neutral one, whose teacher is the base itself, the plain mean squared difference is given.
    """
    results = []
    for place, bank in enumerate(banks):
        merged, base = [], []
        for begin in range(0, len(bank), batch):
            part = [Row(place, entry) for entry in range(begin, min(begin + batch, len(bank)))]
            base.append(error(host, banks, part))
            with applied(modules, changes):
                merged.append(error(host, banks, part))
        left, whole = torch.cat(merged).sum().item(), torch.cat(base).sum().item()
        results.append(left / whole if place < len(banks) - 1 and whole > 0 else left / len(bank))
    return results
