"""How factors are moved: by steps that are orthogonal, as large as is asked for, in all directions alike."""

from __future__ import annotations

import pytest
import torch

from loraclr.training import Orthogonal, orthogonal

RANDOM = torch.Generator().manual_seed(0)


def spread(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """A matrix with these singular values."""
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=RANDOM)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=RANDOM)).Q
    return left @ torch.diag(values) @ right.T


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (6, 40), (40, 6), (1, 9)])
def test_singular_values_become_one_and_vectors_stay(rows: int, columns: int) -> None:
    matrix = spread(rows, columns, torch.logspace(-1.5, 0, min(rows, columns)))
    left, found, right = torch.linalg.svd(orthogonal(matrix[None])[0], full_matrices=False)
    assert found.min() > 0.6 and found.max() < 1.3
    wanted = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(left @ right, wanted.U @ wanted.Vh, atol=1e-3)


def test_the_size_of_a_gradient_does_not_matter_but_zero_stays_zero() -> None:
    matrix = torch.randn(2, 5, 8, generator=RANDOM)
    assert torch.allclose(orthogonal(matrix * 1e-8), orthogonal(matrix), atol=1e-4)
    assert not orthogonal(torch.zeros(2, 5, 8)).any()


def test_the_rate_is_how_far_a_step_goes() -> None:
    values = [torch.zeros(shape, requires_grad=True) for shape in ((6, 40), (40, 6), (6, 40), (7, 7))]
    optimizer = Orthogonal([{"params": [value], "lr": 0.1 * place} for place, value in enumerate(values, 1)])
    for value in values:
        value.grad = torch.randn(value.shape, generator=RANDOM)
    optimizer.step()
    for place, value in enumerate(values, 1):
        assert value.square().mean().sqrt().item() == pytest.approx(0.1 * place, rel=0.15)
        assert (value * value.grad).sum() < 0


def test_directions_of_small_gradients_are_learnt_as_fast_as_those_of_large_ones() -> None:
    """Where entries are mixed AdamW evens out nothing: after as many steps most of the way is left."""
    wanted = torch.randn(8, 16, generator=RANDOM)
    stretch = spread(16, 16, torch.logspace(-1.5, 0, 16))

    def left(make) -> float:
        value = torch.zeros(8, 16, requires_grad=True)
        optimizer = make([{"params": [value], "lr": 0.1}])
        for step in range(60):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 60)
            optimizer.zero_grad()
            ((value - wanted) @ stretch).square().sum().backward()
            optimizer.step()
        return float((value.detach() - wanted).square().mean() / wanted.square().mean())

    assert left(Orthogonal) < 0.5 * left(lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0))
