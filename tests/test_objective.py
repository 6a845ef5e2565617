"""Eq. 1-5 against their definitions written out with loops, and against finite differences."""

import math

import pytest
import torch

from loraclr import objective

READINGS = ("flat", "token")


def features(concepts=3, rows=4, channels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets, predictions = torch.randn(2, concepts, rows, channels, generator=generator, dtype=torch.float64)
    return list(targets), list(predictions)


def distance_by_hand(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def vectors(matrix, reading):
    rows = matrix.tolist()
    return [[x for row in rows for x in row]] if reading == "flat" else rows


def contrastive_by_hand(targets, predictions, margin, reading):
    total = 0.0
    for i, target in enumerate(targets):
        own = 0.0
        rows = vectors(target, reading)
        for t, row in enumerate(rows):
            positive = distance_by_hand(row, vectors(predictions[i], reading)[t])
            negative = min(
                distance_by_hand(row, vectors(predictions[j], reading)[t]) for j in range(len(targets)) if j != i
            )
            own += positive**2 + max(0.0, margin - negative) ** 2
        total += own / len(rows)
    return total / len(targets)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("margin", [0.5, 3.0, 8.0])
def test_contrastive_is_its_definition(reading, margin):
    targets, predictions = features()
    expected = contrastive_by_hand(targets, predictions, margin, reading)
    assert objective.contrastive(targets, predictions, margin, reading).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_distances_are_their_definitions(reading):
    targets, predictions = features()
    near = objective.positive_distances(targets, predictions, reading)
    far = objective.negative_distances(targets, predictions, reading)
    for i, target in enumerate(targets):
        for t, row in enumerate(vectors(target, reading)):
            all_distances = [distance_by_hand(row, vectors(prediction, reading)[t]) for prediction in predictions]
            assert near[i][t].item() == pytest.approx(all_distances.pop(i))
            assert far[i][t].item() == pytest.approx(min(all_distances))
        assert near[i].shape == far[i].shape == ((1,) if reading == "flat" else (4,))


def test_the_readings_differ_when_rows_do():
    """One long row is no other reading; several are."""
    targets, predictions = features(rows=1)
    flat, token = (objective.contrastive(targets, predictions, 2.0, reading) for reading in READINGS)
    assert flat == token
    targets, predictions = features(rows=4)
    flat, token = (objective.contrastive(targets, predictions, 2.0, reading) for reading in READINGS)
    assert flat > token


def test_the_hinge_pushes_only_within_the_margin():
    distances = torch.tensor([0.0, 0.2, 0.5, 3.0, torch.inf])
    torch.testing.assert_close(objective.hinge(distances, 0.5), torch.tensor([0.5, 0.3, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("reading", READINGS)
def test_a_single_concept_has_no_negative(reading):
    targets, predictions = features(concepts=1)
    predictions[0].requires_grad_()
    assert objective.negative_distances(targets, predictions, reading)[0].isinf().all()
    loss = objective.contrastive(targets, predictions, 100.0, reading)
    mean = 1 if reading == "flat" else 4
    assert loss.item() == pytest.approx((targets[0] - predictions[0]).square().sum().item() / mean)
    loss.backward()
    torch.testing.assert_close(predictions[0].grad, 2 * (predictions[0] - targets[0]).detach() / mean)


@pytest.mark.parametrize("reading", READINGS)
def test_gradients(reading):
    """Against finite differences, with the hinge active for some concepts and not for others."""
    targets, predictions = features(concepts=3, rows=2, channels=3)
    far = torch.cat(objective.negative_distances(targets, predictions, reading))
    margin = far.sort().values[:2].mean().item()
    assert 0 < (far < margin).sum() < len(far)
    predictions = [prediction.requires_grad_() for prediction in predictions]
    delta = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss(delta, *predictions):
        return objective.objective(targets, predictions, delta, margin, 0.1, reading)

    assert torch.autograd.gradcheck(loss, (delta, *predictions))


@pytest.mark.parametrize("reading", READINGS)
def test_gradients_are_finite_where_distances_are_zero(reading):
    targets, _ = features()
    equal = [targets[0].clone().requires_grad_() for _ in targets]
    delta = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    objective.objective([targets[0]] * 3, equal, delta, 1.0, 1.0, reading).backward()
    assert all(prediction.grad.isfinite().all() for prediction in equal)
    assert (delta.grad == 0).all()


def test_objective_adds_the_norm_of_the_change():
    targets, predictions = features()
    delta = torch.full((3, 3), 2.0, dtype=torch.float64)
    with_delta = objective.objective(targets, predictions, delta, 0.5, 0.1, "flat")
    assert (with_delta - objective.contrastive(targets, predictions, 0.5, "flat")).item() == pytest.approx(0.1 * 6.0)


@pytest.mark.parametrize("reading", READINGS)
def test_concepts_may_differ_in_rows_for_the_positive_distance_only(reading):
    short, long = features(rows=2), features(rows=4)
    targets, predictions = [short[0][0], long[0][0]], [short[1][0], long[1][0]]
    assert len(objective.positive_distances(targets, predictions, reading)) == 2
    with pytest.raises(ValueError, match=r"one shape for all concepts, not \(2, 5\), \(4, 5\)"):
        objective.negative_distances(targets, predictions, reading)


def test_wrong_inputs_are_refused():
    targets, predictions = features()
    with pytest.raises(ValueError, match="no concepts"):
        objective.positive_distances([], [], "flat")
    with pytest.raises(ValueError, match="must be equal lists"):
        objective.positive_distances(targets, predictions[:2], "flat")
    with pytest.raises(ValueError, match="must be equal lists"):
        objective.positive_distances([torch.zeros(0, 3)], [torch.zeros(0, 3)], "token")
    with pytest.raises(ValueError, match="distance is 'rows'"):
        objective.contrastive(targets, predictions, 0.5, "rows")
