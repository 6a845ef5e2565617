"""LoRACLR's objective (CVPR 2025, Eq. 1-5) as pure functions.

For one layer, concept i has targets Y_i (what the layer puts out with LoRA i) and predictions Ŷ_i (what the merged
layer puts out for the same inputs), both (n_i, o). The paper says ‖Y − Ŷ‖ without saying of what; both readings are
here:

- "flat" is what the authors' code does: a concept's whole feature matrix is one vector, so there is one distance per
  concept.
- "token" takes every row as a vector of its own: one distance per row, and Eq. 1 is averaged over a concept's rows.

So "flat" is "token" with a single long row, and that is how it is computed. The negative distance compares Y_i with Ŷ_j
row by row and therefore needs the same number of rows for every concept, in both readings; the positive distance does
not. All functions are differentiable, and work in the dtype of their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

#: What ‖Y − Ŷ‖ is of, see above.
Distance = Literal["flat", "token"]


def positive_distances(targets: Sequence[Tensor], predictions: Sequence[Tensor], distance: Distance) -> list[Tensor]:
    """Eq. 2: d_p,i = ‖Y_i − Ŷ_i‖. N tensors (n_i, o) on both sides → N tensors, "flat" (1,) or "token" (n_i,)."""
    _check(targets, predictions)
    pairs = zip(targets, predictions, strict=True)
    return [_distance(target, prediction, distance) for target, prediction in pairs]


def negative_distances(targets: Sequence[Tensor], predictions: Sequence[Tensor], distance: Distance) -> list[Tensor]:
    """Eq. 3: d_n,i = min over j ≠ i of ‖Y_i − Ŷ_j‖, in "token" for each row apart. Shapes as in `positive_distances`.

    A concept that is alone has no negative: its distance is infinite. Raises ValueError if concepts differ in rows.
    """
    _check(targets, predictions)
    if len({target.shape for target in targets}) > 1:
        shapes = ", ".join(str(tuple(target.shape)) for target in targets)
        raise ValueError(f"the negative distance needs features of one shape for all concepts, not {shapes}")
    nearest = []
    for i, target in enumerate(targets):
        others = [_distance(target, prediction, distance) for j, prediction in enumerate(predictions) if j != i]
        alone = torch.full_like(_rows(target, distance)[:, 0], torch.inf)
        nearest.append(torch.stack(others).amin(0) if others else alone)
    return nearest


def hinge(distances: Tensor, margin: float) -> Tensor:
    """max(0, m − d), the push that ends at the margin; elementwise."""
    return (margin - distances).clamp(min=0)


def contrastive(targets: Sequence[Tensor], predictions: Sequence[Tensor], margin: float, distance: Distance) -> Tensor:
    """Eq. 1: 1/N Σ_i (d_p,i² + max(0, m − d_n,i)²), in "token" averaged over the rows of each concept. A scalar."""
    near = positive_distances(targets, predictions, distance)
    far = negative_distances(targets, predictions, distance)
    terms = [(p.square() + hinge(n, margin).square()).mean() for p, n in zip(near, far, strict=True)]
    return torch.stack(terms).mean()


def delta_penalty(delta: Tensor, weight: float) -> Tensor:
    """Eq. 4: λ‖ΔW‖ of one layer's change (o, d); the norm, not its square. A scalar with gradient 0 at ΔW = 0."""
    return weight * torch.linalg.vector_norm(delta)


def objective(
    targets: Sequence[Tensor],
    predictions: Sequence[Tensor],
    delta: Tensor,
    margin: float = 0.5,
    penalty: float = 1e-3,
    distance: Distance = "flat",
) -> Tensor:
    """Eq. 5 for one layer: contrastive loss plus delta penalty, with the paper's m = 0.5 and λ = 0.001. A scalar."""
    return contrastive(targets, predictions, margin, distance) + delta_penalty(delta, penalty)


def _rows(features: Tensor, distance: Distance) -> Tensor:
    if distance == "flat":
        return features.reshape(1, -1)
    if distance == "token":
        return features
    raise ValueError(f'distance is {distance!r}, but must be "flat" or "token"')


def _distance(target: Tensor, prediction: Tensor, distance: Distance) -> Tensor:
    return torch.linalg.vector_norm(_rows(target, distance) - _rows(prediction, distance), dim=1)


def _check(targets: Sequence[Tensor], predictions: Sequence[Tensor]) -> None:
    if not targets:
        raise ValueError("there are no concepts to compare")
    here, there = ([tuple(features.shape) for features in side] for side in (targets, predictions))
    if here != there or any(len(shape) != 2 or 0 in shape for shape in here):
        raise ValueError(f"targets {here} and predictions {there} must be equal lists of (rows, channels), none empty")
