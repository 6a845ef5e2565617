"""Statistics of a layer's inputs, and the one change of weight that fits every concept on them.

Per layer and concept i, with inputs X_i (rows) and change ΔW_i = B_i A_i, the merge minimises Σ_i ‖X_i(ΔW − ΔW_i)ᵀ‖²
(the positive term of LoRACLR's Eq. 1). No row has to be kept for it: G = Σ_i X_iᵀX_i and the small A_i G_i say
everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from loraclr.precision import in_float64, without_autocast

#: A change of weight as up (o, r) and down (r, d); a norm layer's is what is added to its weight and bias, both (n,).
Factors = tuple[Tensor, Tensor]


class LayerFit(Protocol):
    """What is told of a layer's inputs, and asked for the one change that suits all concepts: usually `Statistics`."""

    @property
    def gram(self) -> Tensor:
        """XᵀX of the inputs (d, d)."""

    def add(self, concept: int, rows: Tensor, weight: float = 1.0) -> None:
        """Inputs (..., d) that the layer saw while this concept was active, each counted `weight` times."""

    def solve(self, ridge: float) -> Factors:
        """The merged change."""


class NotFinite(ValueError):
    """A layer was fed with NaN or infinite values, as models in half precision may be."""


class Statistics:
    """Running sums over the inputs of one layer.

    changes: per concept the factors (B_i (o, r_i), A_i (r_i, d)) of the change it asks for, scale and strength folded
    in; None asks for no change (the neutral anchor, or a concept that leaves this layer alone).

    Memory: (d + 2 Σr_i) · d numbers of `dtype` on the device, however many rows are added. The Gram matrix of d = 5120,
    the widest layer of SD 1.x and SDXL, takes 105 MB in float32 and 210 MB in float64; `closed_form` needs two more
    d×d matrices of float64 while it runs. Of the Gram matrices of SDXL's attention and feed-forward layers that read
    the picture (582 layers, 9.5 GB in float32) `share` leaves 8.7 GB, of those that read the text (140, 2.3 GB) 17 MB,
    of its text encoders' (265, 5.0 GB) 4.5 GB; `rest` moves them out of the device's memory.
    """

    def __init__(
        self,
        width: int,
        changes: Sequence[Factors | None],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises ValueError if factors do not fit a layer of `width` inputs."""
        for change in changes:
            if change is not None and (change[1].shape[1] != width or change[0].shape[1] != change[1].shape[0]):
                shapes = tuple(change[0].shape), tuple(change[1].shape)
                raise ValueError(f"factors of shape {shapes[0]} and {shapes[1]} do not fit a layer of {width} inputs")
        self.gram = torch.zeros(width, width, dtype=dtype, device=device)
        self.device, self.shares = self.gram.device, False
        # Only asked for at the end, so they wait where there is room.
        self.ups = [None if change is None else change[0].to("cpu", dtype) for change in changes]
        self.downs = [None if change is None else change[1].to(device, dtype) for change in changes]
        self.crosses = [None if down is None else torch.zeros_like(down) for down in self.downs]

    def share(self, other: Statistics) -> None:
        """Take the Gram matrix of a layer that sees the same inputs, and is told of each of them first."""
        self.gram, self.shares = other.gram, True

    def rest(self, device: torch.device | str) -> None:
        """Keep the Gram matrix on another device; products are still computed where the inputs are."""
        self.gram = self.gram.to(device)

    def add(self, concept: int, rows: Tensor, weight: float = 1.0) -> None:
        """Add inputs (..., d) that the layer saw while this concept was active, each counted `weight` times."""
        rows = rows.reshape(-1, self.gram.shape[0]).to(self.device, self.gram.dtype)
        with without_autocast(rows.device):
            if self.gram.device == rows.device and not self.shares:
                self.gram.addmm_(rows.T, rows, alpha=weight)
            elif not self.shares:
                self.gram.add_((rows.T @ rows).to(self.gram.device), alpha=weight)
            down = self.downs[concept]
            if down is not None:
                self.crosses[concept].addmm_(down @ rows.T, rows, alpha=weight)

    def solve(self, ridge: float = 1e-3) -> Factors:
        """The factors (o, Σr_i) and (Σr_i, d) of the merged change; see `closed_form`.

        Raises ValueError if no concept changes the layer, and as `closed_form` does.
        """
        ups = [up.to(self.device) for up in self.ups if up is not None]
        crosses = [cross for cross in self.crosses if cross is not None]
        if not ups:
            raise ValueError("no concept changes this layer, so there is nothing to merge")
        return torch.cat(ups, 1), closed_form(self.gram, torch.cat(crosses), ridge)


class NormStatistics:
    """Running sums over what a norm layer has normalised, x̂, for the change of its weight γ and bias β.

    y = (γ + Δγ) x̂ + β + Δβ mixes no channels, so the same least squares as in `Statistics` has two unknowns for each
    channel. changes: per concept (Δγ_i, Δβ_i), both (n,), or None.
    """

    def __init__(self, width: int, changes: Sequence[Factors | None], device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(width, 2, 2, device=device)
        self.cross = torch.zeros(width, 2, device=device)
        self.changes = [None if change is None else torch.stack(change, 1).to(self.cross) for change in changes]

    def add(self, concept: int, rows: Tensor, weight: float = 1.0) -> None:
        """Add x̂ (..., n) of this concept, each counted `weight` times."""
        rows = rows.reshape(-1, len(self.cross)).to(self.cross)
        total = rows.sum(0)
        sums = torch.stack([rows.square().sum(0), total, total, torch.full_like(total, len(rows))], 1)
        gram = weight * sums.view(-1, 2, 2)
        self.gram += gram
        change = self.changes[concept]
        if change is not None:
            self.cross += (gram * change[:, None]).sum(-1)

    def solve(self, ridge: float = 1e-3) -> Factors:
        """Δγ and Δβ of the merge, (n,) each."""
        system, cross = in_float64(self.gram), in_float64(self.cross)
        mean = system.diagonal(dim1=1, dim2=2).mean(1)
        system = system + ridge * torch.diag_embed(mean[:, None].expand(-1, 2))
        # A channel that was never seen, or always the same, has no inverse.
        scale, shift = (torch.linalg.pinv(system, hermitian=True) @ cross[:, :, None])[:, :, 0].to(self.cross).unbind(1)
        return scale, shift


def width(changes: Sequence[Factors | None]) -> int:
    """Inputs of the layer that the changes are for, the 1 of a bias among them."""
    return next(change[1].shape[-1] for change in changes if change is not None)


def closed_form(gram: Tensor, cross: Tensor, ridge: float = 1e-3) -> Tensor:
    """cross (G + λI)⁻¹, with λ = ridge · the mean diagonal of G.

    gram: (d, d), symmetric; cross: (k, d). Returns (k, d) in cross' dtype. With cross = Σ ΔW_i G_i it is the minimum of
    Σ_i ‖X_i(ΔW − ΔW_i)ᵀ‖² + λ‖ΔW‖²; the rows A_i G_i give its right factor, the B_i being the left. Solved in float64
    by Cholesky. Where G + λI is not positive definite in float64, λ grows tenfold until it is. An empty or zero G gives
    zeros.

    Raises:
        NotFinite: G holds NaN or infinite values.
        ValueError: ridge is negative.
    """
    if ridge < 0:
        raise ValueError(f"ridge is {ridge}, but must not be negative")
    wanted = in_float64(cross)
    system = in_float64(gram).to(wanted.device)
    system = system.clone() if system is gram else system
    mean = float(system.diagonal().mean()) if system.numel() else 0.0
    if mean == 0.0:
        return torch.zeros_like(cross)
    if not torch.isfinite(system).all() or mean < 0.0:
        raise NotFinite("the layer's inputs hold NaN or infinite values")
    share = ridge
    system.diagonal().add_(share * mean)
    factor, failed = torch.linalg.cholesky_ex(system)
    while failed:
        larger = max(1e-12, 10 * share)
        system.diagonal().add_((larger - share) * mean)
        share = larger
        factor, failed = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(wanted.T, factor).T
    return solution.to(cross.device, cross.dtype).contiguous()
