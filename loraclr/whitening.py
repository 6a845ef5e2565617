"""Whitening of a layer's inputs: the coordinates in which one learning rate fits all directions of a down factor.

Inputs of a layer are far from white: a few directions (the mean, the padding, the background) hold nearly all of their
energy. A step of one size for every entry of `down` then changes outputs along these by far too much, and along the
rest by hardly anything. With down = Z W, W ≈ (G / mean diagonal + δ)^-½ and G the inputs' Gram matrix, a step in Z
changes outputs alike along all of them (the input side of K-FAC, Martens & Grosse 2015, and of Shampoo, Gupta et al.
2018). Of G only the largest directions are kept; what is left is taken as white.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.precision import float64_device, without_autocast

DAMPING = 3e-2  # δ: energy, relative to the mean of all directions, below which they are no longer told apart
ROUNDS, SPARE = 4, 16  # of the subspace iteration, and columns beyond those that are wanted


@dataclass(frozen=True)
class Whitening:
    """W = rest · I + V diag(scales − rest) Vᵀ.

    Attributes:
        basis: V (d, k), orthonormal.
        scales: (k,), positive.
        rest: the scale of everything orthogonal to V.
    """

    basis: Tensor
    scales: Tensor
    rest: float

    def colour(self, white: Tensor) -> Tensor:
        """Z W of Z (r, d)."""
        return self._scaled(white, self.scales, self.rest)

    def whiten(self, down: Tensor) -> Tensor:
        """down W⁻¹ of a factor (r, d)."""
        return self._scaled(down, 1 / self.scales, 1 / self.rest)

    def _scaled(self, rows: Tensor, scales: Tensor, rest: float) -> Tensor:
        with without_autocast(rows.device):
            return rest * rows + (rows @ self.basis * (scales - rest)) @ self.basis.T


@torch.no_grad()
def whitening(gram: Tensor, directions: int, device: torch.device) -> Whitening:
    """The whitening of inputs with this Gram matrix (d, d), with the largest `directions` of it, on `device`.

    A zero matrix gives the identity up to a factor.

    The eigenvectors by subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4): d² k work, where all
    of them would take d³.
    """
    gram = gram.to(float64_device(gram.device), torch.float32)
    width, trace = len(gram), float(gram.diagonal().double().sum())
    count = min(directions, width)
    start = torch.randn(width, min(count + SPARE, width), generator=torch.Generator().manual_seed(0)).to(gram)
    with without_autocast(gram.device):
        basis = torch.linalg.qr(start).Q
        for _ in range(ROUNDS):
            basis = torch.linalg.qr(gram @ basis).Q
        energies, rotation = torch.linalg.eigh(basis.T.double() @ (gram @ basis).double())
        basis, energies = (basis.double() @ rotation).float()[:, -count:], energies[-count:]
    mean, energies = max(trace / width, 1e-30), energies.clamp(min=0)
    rest = max(0.0, trace - float(energies.sum())) / mean / max(1, width - count)
    scales = (energies / mean + DAMPING).rsqrt().float()
    return Whitening(basis.to(device), scales.to(device), (rest + DAMPING) ** -0.5)
