"""Training of factors: in coordinates in which their layers' inputs are white, each at a rate relative to its size.

A factor's gradient has a few large directions, those in which the concepts agree, and a step along it hardly moves the
others. So every step is made orthogonal first (Muon; Jordan et al. 2024): all its directions are moved alike. With
AdamW, which evens out entries instead of directions, a merge of many LoRAs takes more than twice the steps to come as
near.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loraclr.changes import Changes
from loraclr.precision import without_autocast
from loraclr.whitening import Whitening

RATE = 0.02  # learning rate of a factor relative to its own root mean square
TOGETHER = 16  # factors of one shape whose steps are made orthogonal at a time
MOMENTUM = 0.6  # share of the steps before that is left in a step
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


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (B, m, n) with the same singular vectors and singular values near 1; zeros stay.

    By five steps of the Newton-Schulz iteration with the quintic of Jordan et al. 2024, so products only; values below
    a thousandth of a matrix's norm come out smaller.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x if wide is matrices else x.mT


class Orthogonal(torch.optim.Optimizer):
    """Steps of Nesterov momentum, made orthogonal, with the rate as their root mean square. Parameters are matrices."""

    def __init__(self, groups: list[dict]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter."""
        alike: dict[torch.Size, list[tuple[Tensor, float, Tensor]]] = {}
        for group in self.param_groups:
            for value in group["params"]:
                state = self.state[value]
                if not state:
                    state["momentum"] = torch.zeros_like(value)
                before = state["momentum"]
                before.lerp_(value.grad, 1 - MOMENTUM)
                ahead = before.lerp(value.grad, 1 - MOMENTUM)
                alike.setdefault(value.shape, []).append((value, group["lr"], ahead))
        for shape, every in alike.items():
            for begin in range(0, len(every), TOGETHER):
                part = every[begin : begin + TOGETHER]
                with without_autocast(part[0][0].device):
                    steps = orthogonal(torch.stack([ahead for _, _, ahead in part]))
                for (value, rate, _), step in zip(part, steps, strict=True):
                    value.sub_(step, alpha=rate * math.sqrt(max(shape)))


class Trained:
    """Factors while they are trained: for each layer up and the whitened down, and the optimiser of these."""

    def __init__(self, changes: Changes, whitenings: Mapping[str, Whitening], device: torch.device) -> None:
        self.names, self.whitenings = list(changes), [whitenings.get(name) for name in changes]
        self.factors: list[Tensor] = []
        for (up, down), whitening in zip(changes.values(), self.whitenings, strict=True):
            up, down = up.detach().to(device, torch.float32), down.detach().to(device, torch.float32)
            pair = balanced(up, down if whitening is None else whitening.whiten(down))
            self.factors += [value.clone().requires_grad_() for value in pair]
        groups = [{"params": [value], "lr": RATE * _rms(value.detach()).item()} for value in self.factors]
        self.optimizer = Orthogonal(groups)
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
