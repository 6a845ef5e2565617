"""Smaller ranks against the singular value decomposition of the dense, weighted change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraclr.factor import energy, kept, truncate

DOUBLE = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def root(gram):
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def uneven_gram(width, rows, seed=2):
    rows = random(rows, width, seed=seed) * torch.logspace(0, 2, width, dtype=DOUBLE)
    return rows.T @ rows


def best_error(up, down, rank, gram):
    """‖(ΔW − best rank r)G^½‖² by Eckart-Young: the sum of the singular values' squares that are left out."""
    weighted = up @ down if gram is None else up @ down @ root(gram)
    return torch.linalg.svdvals(weighted)[rank:].square().sum().item()


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 9),
    width=st.integers(1, 9),
    inner=st.integers(1, 12),
    rank=st.integers(1, 12),
    rows=st.sampled_from([None, 2, 40]),
    seed=st.integers(0, 1000),
)
def test_no_factors_of_that_rank_are_better(outputs, width, inner, rank, rows, seed):
    up, down = random(outputs, inner, seed=seed), random(inner, width, seed=seed + 1)
    gram = None if rows is None else uneven_gram(width, rows, seed + 2)
    new_up, new_down = truncate(up, down, rank, gram)
    assert new_up.shape[1] == new_down.shape[0] <= rank
    whole = energy(up, down, gram)
    difference = up @ down - new_up @ new_down
    error = (difference if gram is None else difference @ root(gram)).square().sum().item()
    assert error == pytest.approx(best_error(up, down, rank, gram), rel=1e-6, abs=1e-9 * whole)
    assert kept(up, down, new_up, new_down, gram) == pytest.approx(1 - error / whole, abs=1e-9)


def test_the_weight_changes_what_is_kept():
    """An input direction that carries hardly any signal is given up first, though its weight is the larger."""
    up, down = torch.eye(2, dtype=DOUBLE), torch.diag(torch.tensor([3.0, 1.0], dtype=DOUBLE))
    gram = torch.diag(torch.tensor([0.01, 1.0], dtype=DOUBLE))
    plain, weighted = truncate(up, down, 1), truncate(up, down, 1, gram)
    torch.testing.assert_close(plain[0] @ plain[1], torch.diag(torch.tensor([3.0, 0.0], dtype=DOUBLE)))
    torch.testing.assert_close(weighted[0] @ weighted[1], torch.diag(torch.tensor([0.0, 1.0], dtype=DOUBLE)))
    assert kept(up, down, *weighted, gram) == pytest.approx(1 / 1.09)
    assert kept(up, down, *weighted) == pytest.approx(1 / 10)


@pytest.mark.parametrize("rank", [3, 4, 100, None])
@pytest.mark.parametrize("singular", [False, True])
def test_enough_rank_gives_the_change_itself(rank, singular):
    """The product has rank 3, though its factors have 6; also where the inputs never showed some directions."""
    up, down = random(7, 3) @ random(3, 6, seed=1), random(6, 8, seed=2)
    gram = uneven_gram(8, 2 if singular else 40)
    new_up, new_down = truncate(up, down, rank, gram)
    assert new_up.shape == (7, 3) and new_down.shape == (3, 8)
    torch.testing.assert_close(new_up @ new_down, up @ down)
    assert kept(up, down, new_up, new_down, gram) == pytest.approx(1.0)


@pytest.mark.parametrize("gram", [None, uneven_gram(8, 40)])
def test_singular_values_are_split_evenly(gram):
    up, down = truncate(1000 * random(7, 5), 1e-3 * random(5, 8, seed=1), 4, gram)
    singular = torch.linalg.svdvals(up @ down)[:4]
    torch.testing.assert_close(up.T @ up, torch.diag(singular))
    torch.testing.assert_close(down @ down.T, torch.diag(singular))


def test_a_change_of_zero_stays_zero():
    up, down = truncate(torch.zeros(4, 3), random(3, 5).float(), 2)
    assert (up.shape, down.shape) == ((4, 1), (1, 5)) and (up @ down == 0).all()
    assert kept(torch.zeros(4, 3), torch.zeros(3, 5), up, down) == 1.0


def test_dtype_and_layout_fit_a_file():
    up, down = truncate(random(6, 4).float(), random(4, 5).float(), 2, uneven_gram(5, 9).float())
    assert up.dtype == down.dtype == torch.float32 and up.is_contiguous() and down.is_contiguous()


def test_kept_sees_factors_that_are_worse_than_none():
    up, down = random(4, 2), random(2, 5)
    assert kept(up, down, -up, down) == pytest.approx(-3.0)
    assert kept(up, down, 0 * up, down) == pytest.approx(0.0)


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="rank is 0"):
        truncate(random(4, 2), random(2, 5), 0)


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 9),
    width=st.integers(1, 9),
    inner=st.integers(1, 12),
    share=st.sampled_from([0.3, 0.9, 0.995]),
    rows=st.sampled_from([None, 2, 40]),
    seed=st.integers(0, 1000),
)
def test_auto_is_the_smallest_rank_that_keeps_the_share(outputs, width, inner, share, rows, seed):
    up, down = random(outputs, inner, seed=seed), random(inner, width, seed=seed + 1)
    gram = None if rows is None else uneven_gram(width, rows, seed + 2)
    new_up, new_down = truncate(up, down, "auto", gram, share)
    rank, whole = new_up.shape[1], energy(up, down, gram)
    assert kept(up, down, new_up, new_down, gram) >= share - 1e-9
    assert rank == 1 or 1 - best_error(up, down, rank - 1, gram) / whole < share + 1e-9


def test_auto_keeps_what_counts_and_everything_where_nothing_can_go():
    strong = torch.diag(torch.tensor([10.0, 5.0, 0.1], dtype=DOUBLE))
    assert truncate(strong, torch.eye(3, dtype=DOUBLE), "auto")[0].shape == (3, 2)
    assert truncate(torch.eye(3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE), "auto")[0].shape == (3, 3)
    assert truncate(torch.zeros(3, 2), torch.zeros(2, 3), "auto")[0].shape == (3, 1)
    with pytest.raises(ValueError, match="share is 0"):
        truncate(strong, strong, "auto", share=0)
