"""Whitening against its definition by a whole eigendecomposition, and the polish's chain rule against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraclr.training import Trained
from loraclr.whitening import DAMPING, whitening

CPU = torch.device("cpu")


def gram(width: int = 24) -> Tensor:
    """Of inputs whose energies fall from 1 to 1e-4."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return basis @ torch.diag(torch.logspace(0, -4, width)) @ basis.T


def definition(matrix: Tensor, count: int) -> Tensor:
    """(G / mean + δ)^-½, all but the `count` largest eigenvalues replaced by their mean."""
    energies, vectors = torch.linalg.eigh(matrix.double() / matrix.double().diagonal().mean())
    if count < len(energies):
        energies[:-count] = energies[:-count].mean()
    return vectors @ torch.diag((energies + DAMPING).rsqrt()) @ vectors.T


@pytest.mark.parametrize("count", [4, 12, 24, 100])
def test_is_the_inverse_root_of_the_gram_matrix(count: int) -> None:
    matrix = gram()
    found = whitening(matrix, count, CPU).colour(torch.eye(24)).double()
    expected = definition(matrix, count)
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_inputs_are_white_where_they_have_energy() -> None:
    matrix = gram()
    scale = whitening(matrix, 64, CPU).colour(torch.eye(24))
    white = torch.linalg.eigvalsh(scale @ (matrix / matrix.diagonal().mean()) @ scale)
    assert white[-8:].min() > 0.9 and white.max() < 1.001
    assert torch.linalg.cond(scale @ matrix @ scale) < 0.02 * torch.linalg.cond(matrix)


def test_whiten_undoes_colour() -> None:
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    found = whitening(gram(), 6, CPU)
    torch.testing.assert_close(found.colour(found.whiten(rows)), rows, rtol=1e-4, atol=1e-5)


def test_inputs_that_were_never_seen_leave_the_directions_equal() -> None:
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    found = whitening(torch.zeros(8, 8), 64, CPU).colour(rows)
    torch.testing.assert_close(found / found.norm(), rows / rows.norm())


def test_gradients_of_what_is_trained_are_autograds() -> None:
    generator = torch.Generator().manual_seed(3)
    changes = {"a": (torch.randn(7, 2, generator=generator), torch.randn(2, 24, generator=generator))}
    wanted = torch.randn(7, 24, generator=generator)
    found = whitening(gram(), 6, CPU)
    trained = Trained(changes, {"a": found}, CPU)

    live = trained.live()
    up, down = live["a"]
    torch.testing.assert_close(up @ down, changes["a"][0] @ changes["a"][1], rtol=1e-4, atol=1e-4)
    up.grad, down.grad = torch.autograd.grad((up @ down - wanted).square().sum(), (up, down))
    left, white = (value.detach().clone().requires_grad_() for value in trained.factors)
    assert trained.descend(live, 0.0)

    whole = torch.autograd.grad((left @ found.colour(white) - wanted).square().sum(), (left, white))
    norm = torch.stack([gradient.square().sum() for gradient in whole]).sum().sqrt()
    assert norm > 1  # a step takes no more than that
    for value, expected in zip(trained.factors, whole, strict=True):
        torch.testing.assert_close(value.grad, expected / norm, rtol=1e-4, atol=1e-5)
