"""Merges of research that look at a layer's inputs: gradient fusion, and the loop of the LoRACLR reference code.

Both take the place of `loraclr.solve.Statistics` in a merge (`loraclr.merging.merge(…, fit=…)`): told of the inputs,
asked for the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraclr.factor import decompose
from loraclr.objective import Distance, objective
from loraclr.precision import in_float64
from loraclr.solve import Factors, Statistics, width


def gradient_fusion(gram: Tensor, ups: Sequence[Tensor], crosses: Sequence[Tensor], steps: int) -> Factors:
    """min over ΔW of Σ_i ‖X_i(ΔW − ΔW_i)ᵀ‖² by L-BFGS from ΔW = 0 (Mix-of-Show, Gu et al., NeurIPS 2023, Eq. 5).

    gram: G = Σ X_iᵀX_i (d, d); ups: B_i (o, r_i); crosses: A_iG_i (r_i, d). The objective equals the one over samples.
    Its gradient 2(ΔW G − Σ B_iA_iG_i) lies in the span of the B_i, and so does every iterate, so it is enough to search
    M in ΔW = QM with an orthonormal basis Q of that span: the steps are those for the dense ΔW, but for the length
    tried first, which torch takes from the gradient's 1-norm. The ridge is 1e-6, against rounding only; what keeps
    directions without data small is that L-BFGS stops early. Returns (o, k) and (k, d), k ≤ Σr_i.
    """
    basis, mix = torch.linalg.qr(in_float64(torch.cat(list(ups), 1)))
    wanted = mix @ in_float64(torch.cat(list(crosses)))
    system = in_float64(gram).to(wanted.device)
    system = system.clone() if system is gram else system
    # Sums in float32 may leave the smallest eigenvalue a little below 0, and the objective without a minimum.
    system.diagonal().add_(1e-6 * float(system.diagonal().mean()))
    scale = float(wanted.abs().max())
    found = torch.zeros_like(wanted).requires_grad_()
    if scale > 0:
        search = torch.optim.LBFGS(
            [found], lr=1, max_iter=steps, max_eval=4 * steps, history_size=25, line_search_fn="strong_wolfe",
            tolerance_grad=1e-12, tolerance_change=1e-15,
        )  # fmt: skip

        def loss() -> Tensor:
            search.zero_grad()
            slope = found.detach() @ system
            found.grad = 2 * (slope - wanted) / scale
            return ((slope - 2 * wanted) * found.detach()).sum() / scale

        search.step(loss)
    return basis.to(ups[0]), found.detach().to(ups[0])


class GradientFusion(Statistics):
    """`Statistics` solved by L-BFGS, with the published number of iterations."""

    def __init__(self, steps: int, width: int, changes: Sequence[Factors | None], device: torch.device) -> None:
        super().__init__(width, changes, device=device)
        self.steps = steps

    def solve(self, ridge: float = 0.0) -> Factors:
        """The factors after `steps` iterations; the ridge is not used."""
        present = zip(self.ups, self.crosses, strict=True)
        pairs = [(up.to(self.device), cross) for up, cross in present if up is not None]
        return gradient_fusion(self.gram, [up for up, _ in pairs], [cross for _, cross in pairs], self.steps)


def by_gradient_fusion(
    name: str, module: nn.Module, changes: Sequence[Factors | None], device: torch.device
) -> GradientFusion:
    """A layer's fit as Mix-of-Show ships it: 500 iterations in the text encoder, 50 in the UNet."""
    steps = 500 if name.startswith("lora_te") else 50
    return GradientFusion(steps, width(changes), changes, device)


@dataclass(frozen=True)
class Loop:
    """Settings of the reference loop; the defaults are those of the code that its authors published.

    Attributes:
        distance: of what (`loraclr.objective`): a concept's whole features, or each of their rows.
        mse: weight of the mean squared error that the code adds to the paper's loss.
        rows: inputs kept for each concept and call of a layer, which the code does not limit.
    """

    steps: int = 50
    rate: float = 1e-4
    margin: float = 0.5
    penalty: float = 1e-3
    distance: Distance = "flat"
    mse: float = 0.1
    decay: float = 1e-4
    rows: int = 32


def reference(weight: Tensor, changes: Sequence[Factors], inputs: Sequence[Tensor], loop: Loop) -> Tensor:
    """LoRACLR's own optimisation of one layer (CVPR 2025, Eq. 1-5): AdamW on a dense ΔW from 0, the best kept.

    weight: W (o, d); changes: ΔW_i as factors; inputs: X_i (n, d), as many for every concept. The authors' code
    runs in float16 under autocast, this in float32. Returns ΔW (o, d).
    """
    targets = [x @ weight.T + x @ down.T @ up.T for x, (up, down) in zip(inputs, changes, strict=True)]
    delta = torch.zeros_like(weight).requires_grad_()
    optimizer = torch.optim.AdamW([delta], lr=loop.rate, weight_decay=loop.decay)
    best, lowest = delta.detach().clone(), float("inf")
    for _ in range(loop.steps):
        with torch.enable_grad():
            predictions = [x @ (weight + delta).T for x in inputs]
            error = torch.stack(predictions) - torch.stack(targets)
            loss = objective(targets, predictions, delta, loop.margin, loop.penalty, loop.distance)
            loss = loss + loop.mse * error.square().mean()
        if loss.item() < lowest:
            best, lowest = delta.detach().clone(), loss.item()
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        optimizer.step()
    return best


class Reference:
    """Rows of every concept's inputs to one layer, kept on the CPU, and the reference loop over them on the device."""

    def __init__(
        self, loop: Loop, weight: Tensor, changes: Sequence[Factors | None], device: torch.device | str
    ) -> None:
        self.loop, self.device = loop, torch.device(device)
        self.weight = weight.detach().flatten(1).to("cpu", torch.float32)
        outputs, width = self.weight.shape
        nothing = torch.zeros(outputs, 1), torch.zeros(1, width)
        self.changes = [tuple(f.to(device, torch.float32) for f in change or nothing) for change in changes]
        self.inputs: list[list[Tensor]] = [[] for _ in changes]

    def add(self, concept: int, rows: Tensor, weight: float = 1.0) -> None:
        """Keep some inputs (..., d). Concepts that make the same calls keep the same places: rows are compared."""
        rows = rows.detach().reshape(-1, self.weight.shape[1])
        if len(rows) > self.loop.rows:
            generator = torch.Generator().manual_seed(len(self.inputs[concept]))
            rows = rows[torch.randperm(len(rows), generator=generator)[: self.loop.rows].to(rows.device)]
        self.inputs[concept].append(rows.to("cpu", torch.float32))

    @property
    def gram(self) -> Tensor:
        """XᵀX (d, d) of all rows kept."""
        rows = torch.cat([rows for kept in self.inputs for rows in kept]).to(self.device)
        return rows.T @ rows

    def solve(self, ridge: float = 0.0) -> Factors:
        """The factors of ΔW at full rank; the ridge is not used."""
        kept = [(change, torch.cat(rows)) for change, rows in zip(self.changes, self.inputs, strict=True) if rows]
        seen = [(change, rows.to(self.device)) for change, rows in kept]
        fewest = min(len(rows) for _, rows in seen)
        delta = reference(
            self.weight.to(self.device), [change for change, _ in seen], [rows[:fewest] for _, rows in seen], self.loop
        )
        return decompose(delta)


def by_reference(
    name: str, module: nn.Module, changes: Sequence[Factors | None], device: torch.device, loop: Loop | None = None
) -> Reference:
    """A layer's fit as the reference code has it."""
    weight = module.weight.detach().flatten(1)
    weight = F.pad(weight, (0, width(changes) - weight.shape[1]))  # features are taken without the bias
    return Reference(loop or Loop(), weight, changes, device)
