"""Blocks that compute again: the same output and gradients with fewer tensors kept, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loraclr.capture import applied
from loraclr.hosts.recompute import recomputed


class ResBlock(nn.Module):
    """Named as the original code names its block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.layers(x)


def test_the_way_back_computes_as_the_host_did() -> None:
    """A host's precision may be a patch that is gone by then (the webui's, where cards have no autocast)."""
    net, inside = ResBlock().requires_grad_(False), []

    @contextmanager
    def half() -> Iterator[None]:
        inside.append(True)
        before, nn.Tanh.forward = nn.Tanh.forward, lambda _, x: 0.5 * x
        try:
            yield
        finally:
            nn.Tanh.forward = before

    x = torch.randn(3, 6).requires_grad_()
    with half():
        (expected,) = torch.autograd.grad(net(x).square().sum(), [x])
    with recomputed(net, half):
        with half():
            loss = net(x).square().sum()
        (found,) = torch.autograd.grad(loss, [x])
    torch.testing.assert_close(found, expected)
    assert len(inside) == 4  # here twice, there and back


def test_gradients_are_the_same_and_less_is_kept() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), ResBlock(), ResBlock()).double().requires_grad_(False)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    factors = {
        name: tuple(torch.randn(6, 6, dtype=torch.float64).requires_grad_() for _ in range(2)) for name in layers
    }
    flat, x = [f for pair in factors.values() for f in pair], torch.randn(3, 6, dtype=torch.float64)
    kept: list[int] = []

    def run() -> tuple[torch.Tensor, ...]:
        count = 0

        def pack(value: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return value

        with applied(layers, factors):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
                loss = net(x).square().sum()
            kept.append(count)
            return loss.detach(), *torch.autograd.grad(loss, flat)

    plain = run()
    with recomputed(net):
        again = run()
        with torch.no_grad():
            net(x)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    assert kept[1] < kept[0] / 3
    assert not any("forward" in vars(module) for module in net.modules())
