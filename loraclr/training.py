"""Training of factors: in coordinates in which their layers' inputs are white, each at a rate relative to its size."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loraclr.changes import Changes
from loraclr.whitening import Whitening

RATE = 0.02  # learning rate of a factor relative to its own root mean square
WARM = 5  # steps until it is reached
LOSS_SCALE = 1024.0  # keeps gradients of a model in half precision above its smallest number


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at a step, from 0 on: a short rise, then half a cosine."""
    return min((step + 1) / WARM, 0.5 * (1 + math.cos(math.pi * step / steps)))


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with both factors of one root mean square, so that one learning rate fits both."""
    ratio = (_rms(down) / _rms(up)).clamp(1e-6, 1e6).sqrt()
    return up * ratio, down / ratio


def _rms(value: Tensor) -> Tensor:
    return value.float().square().mean().sqrt().clamp(min=1e-12)


class Trained:
    """Factors while they are trained: for each layer up and the whitened down, and the optimiser of these (AdamW)."""

    def __init__(self, changes: Changes, whitenings: Mapping[str, Whitening], device: torch.device) -> None:
        self.names, self.whitenings = list(changes), [whitenings.get(name) for name in changes]
        self.factors: list[Tensor] = []
        for (up, down), whitening in zip(changes.values(), self.whitenings, strict=True):
            up, down = up.detach().to(device, torch.float32), down.detach().to(device, torch.float32)
            pair = balanced(up, down if whitening is None else whitening.whiten(down))
            self.factors += [value.clone().requires_grad_() for value in pair]
        groups = [{"params": [value], "lr": RATE * _rms(value.detach()).item()} for value in self.factors]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    @torch.no_grad()
    def live(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors by layer name, as leaves of a graph of their own, with gradients of zero."""
        pairs = zip(self.factors[::2], self.factors[1::2], self.whitenings, strict=True)
        values = [(up, white if whitening is None else whitening.colour(white)) for up, white, whitening in pairs]
        live = {}
        for name, pair in zip(self.names, values, strict=True):
            live[name] = tuple(value.detach().requires_grad_() for value in pair)
            for value in live[name]:
                value.grad = torch.zeros_like(value)
        return live

    def found(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors by layer name, as they are now."""
        return {name: (up.detach().clone(), down.detach().clone()) for name, (up, down) in self.live().items()}

    @torch.no_grad()
    def descend(self, live: Mapping[str, tuple[Tensor, Tensor]], share: float) -> bool:
        """One step at this share of the rate, by the gradients of `live`; W is symmetric, so dL/dZ = dL/d(Z W) W.

        False if they are not finite: then nothing changes.
        """
        for place, (up, down) in enumerate(live.values()):
            whitening = self.whitenings[place]
            self.factors[2 * place].grad = up.grad
            self.factors[2 * place + 1].grad = down.grad if whitening is None else whitening.colour(down.grad)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        norm = nn.utils.clip_grad_norm_(self.factors, 1.0)
        if norm.isfinite():
            self.optimizer.step()
        return bool(norm.isfinite())
