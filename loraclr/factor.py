"""Factors of a change of weight: brought to a smaller rank, up @ down → up', down', or found for a dense ΔW."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from loraclr.precision import in_float64

#: A number, "auto" for the smallest rank that keeps SHARE of a layer's output energy, None for ΔW's own rank.
Rank = int | Literal["auto"] | None

SHARE = 0.995


def truncate(
    up: Tensor, down: Tensor, rank: Rank = None, gram: Tensor | None = None, share: float = SHARE
) -> tuple[Tensor, Tensor]:
    """The best factors of at most the given rank, in the norm of what the layer puts out.

    up: (o, R), down: (R, d), gram: (d, d) = XᵀX of the layer's inputs. Returns (o, r) and (r, d), r ≤ rank, of the
    dtype of `up`, which minimise ‖(ΔW − ΔW')G^½‖_F; without gram, plain ‖ΔW − ΔW'‖_F (Eckart-Young). ΔW itself comes
    back, up to rounding, when its rank is at most `rank`, or when `rank` is None. With "auto" r is the smallest with
    which `kept` is at least `share`. Singular values are split evenly between the factors. The work is done in float64
    and never forms an (o, d) matrix. A ΔW of zero gives rank 1 factors of zeros.

    Raises:
        ValueError: rank is below 1, or share is not in (0, 1].
    """
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank is {rank}, but must be at least 1")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but must be above 0 and at most 1")
    base, rest = _orthonormal(in_float64(up), in_float64(down))
    if rank == "auto" or (rank is not None and base.shape[1] > rank):
        # The best ΔW' in the weighted norm is ΔW projected on the leading output directions of ΔW G^½, that is on the
        # leading eigenvectors of ΔW G ΔWᵀ: no square root of the d×d Gram is needed, only this R×R matrix.
        weighted = rest if gram is None else rest @ in_float64(gram).to(rest)
        energies, directions = torch.linalg.eigh(weighted @ rest.T)
        leading = directions[:, -(_enough(energies, share) if rank == "auto" else rank) :]
        base, rest = base @ leading, leading.T @ rest
    rows, singular, columns = torch.linalg.svd(rest, full_matrices=False)
    root = singular.sqrt()
    new_up, new_down = base @ rows * root, root[:, None] * columns
    return new_up.to(up).contiguous(), new_down.to(up).contiguous()


def _enough(energies: Tensor, share: float) -> int:
    """How many of the largest of the energies, given in rising order, make up the share of their sum; 1 at least."""
    largest = energies.flip(0).clamp_min(0).cumsum(0)
    return min(int((largest < share * largest[-1]).sum()) + 1, len(energies))


def decompose(delta: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Factors (o, r) and (r, d) of a dense ΔW (o, d), the best of at most the given rank (Eckart-Young).

    None: its numerical rank, singular values below 1e-7 of the largest taken for 0. Worked in float64 through the
    smaller of ΔWΔWᵀ and ΔWᵀΔW, which is many times faster than a singular value decomposition of a wide layer. A zero
    ΔW gives rank 1 factors of zeros.

    Raises:
        ValueError: rank is below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, but must be at least 1")
    wide = in_float64(delta)
    tall = wide.shape[0] > wide.shape[1]
    wide = wide.T if tall else wide
    squares, leading = _leading(wide @ wide.T, rank)
    count = max(1, int((squares > 1e-14 * squares[-1]).sum()))
    count = count if rank is None else min(count, rank)
    leading, root = leading[:, -count:].flip(1), squares[-count:].flip(0).clamp(min=0).pow(0.25)
    up, down = leading * root, (leading.T @ wide) / root.clamp(min=1e-30)[:, None]
    up, down = (down.T, up.T) if tall else (up, down)
    return up.to(delta.device, delta.dtype).contiguous(), down.to(delta.device, delta.dtype).contiguous()


_BESIDE = 16  # directions carried along, which make the wanted ones settle faster


def _leading(gram: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a Gram matrix, at least `count` of them in rising order, and their eigenvectors.

    Few of many are found by subspace iteration, to 1e-10 of their sum, several times faster than all at once.
    """
    size = len(gram)
    if count is None or 4 * (count + _BESIDE) > size:
        return torch.linalg.eigh(gram)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, count + _BESIDE, dtype=gram.dtype, generator=generator).to(gram.device)
    basis, found = torch.linalg.qr(gram @ start)[0], 0.0
    while True:
        image = gram @ basis
        values, rotation = torch.linalg.eigh(basis.T @ image)
        total = float(values[-count:].sum())
        if not total - found > 1e-10 * total:  # also ends for NaN
            return values[-count:], (basis @ rotation)[:, -count:]
        basis, found = torch.linalg.qr(image)[0], total


def energy(up: Tensor, down: Tensor, gram: Tensor | None = None) -> float:
    """‖up @ down G^½‖²_F, the summed square of the layer's change of output; without gram ‖up @ down‖²_F."""
    up, down = in_float64(up), in_float64(down)
    weighted = down if gram is None else down @ in_float64(gram).to(down)
    return float(((up.T @ up) * (weighted @ down.T)).sum())


def kept(up: Tensor, down: Tensor, new_up: Tensor, new_down: Tensor, gram: Tensor | None = None) -> float:
    """The share of the output's energy that new factors keep: 1 − ‖(ΔW − ΔW')G^½‖² / ‖ΔW G^½‖².

    Below 0 if the new factors are worse than none; 1 where ΔW does nothing.
    """
    whole = energy(up, down, gram)
    if whole <= 0.0:
        return 1.0
    lost = energy(torch.cat([up, -new_up.to(up)], 1), torch.cat([down, new_down.to(down)]), gram)
    return 1.0 - max(lost, 0.0) / whole


def _orthonormal(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal columns in the first factor, and no more of them than its numerical rank."""
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    rows, singular, columns = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    noise = torch.finfo(torch.float64).eps * max(up.shape[0], down.shape[1]) * singular.max()
    count = max(1, int((singular > noise).sum()))
    return left @ rows[:, :count], singular[:count, None] * (columns[:count] @ right.T)
