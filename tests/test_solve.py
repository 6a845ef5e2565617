"""The closed form against least squares on the problem written out in full."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraclr import objective
from loraclr.precision import float64_device, in_float64, without_autocast
from loraclr.solve import NormStatistics, Statistics, closed_form

DOUBLE = torch.float64


def problem(width, outputs, ranks, rows, seed=0):
    """Changes (B_i, A_i), None where the rank is 0, and inputs X_i."""
    generator = torch.Generator().manual_seed(seed)
    make = partial(torch.randn, generator=generator, dtype=DOUBLE)
    changes = [(make(outputs, rank), make(rank, width)) if rank else None for rank in ranks]
    return changes, [make(count, width) for count in rows]


def dense(change, outputs, width):
    return torch.zeros(outputs, width, dtype=DOUBLE) if change is None else change[0] @ change[1]


def least_squares(changes, inputs, weights, outputs, width, ridge):
    """min Σ w_i ‖X_i(ΔW − ΔW_i)ᵀ‖² + λ‖ΔW‖² as one stacked system, by LAPACK's gelsd."""
    gram = sum(w * x.T @ x for w, x in zip(weights, inputs, strict=True))
    left = [w**0.5 * x for w, x in zip(weights, inputs, strict=True)]
    right = [x @ dense(change, outputs, width).T for x, change in zip(left, changes, strict=True)]
    left.append((ridge * gram.diagonal().mean()).sqrt() * torch.eye(width, dtype=DOUBLE))
    right.append(torch.zeros(width, outputs, dtype=DOUBLE))
    return torch.linalg.lstsq(torch.cat(left), torch.cat(right), driver="gelsd").solution.T


def statistics(changes, inputs, weights, width, chunk=3):
    sums = Statistics(width, changes, DOUBLE)
    for concept, (rows, weight) in enumerate(zip(inputs, weights, strict=True)):
        for part in rows.split(chunk):
            sums.add(concept, part, weight)
    return sums


@settings(max_examples=50, deadline=None)
@given(
    width=st.integers(1, 9),
    outputs=st.integers(1, 7),
    concepts=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 8), st.sampled_from([0.3, 1.0, 2.0])), min_size=1, max_size=4
    ),
    ridge=st.sampled_from([1e-4, 1e-3, 1e-1]),
    seed=st.integers(0, 1000),
)
def test_solution_is_the_least_squares_one(width, outputs, concepts, ridge, seed):
    ranks, rows, weights = zip(*concepts, strict=True)
    changes, inputs = problem(width, outputs, ranks, rows, seed)
    sums = statistics(changes, inputs, weights, width)
    if not any(ranks):
        with pytest.raises(ValueError, match="nothing to merge"):
            sums.solve(ridge)
        return
    up, down = sums.solve(ridge)
    assert up.shape == (outputs, sum(ranks)) and down.shape == (sum(ranks), width)
    expected = least_squares(changes, inputs, weights, outputs, width, ridge)
    torch.testing.assert_close(up @ down, expected, rtol=1e-6, atol=1e-8)


def test_without_ridge_one_concept_comes_back_itself():
    changes, inputs = problem(5, 4, [2], [20])
    up, down = statistics(changes, inputs, [1.0], 5).solve(ridge=0.0)
    torch.testing.assert_close(up @ down, changes[0][0] @ changes[0][1])


def test_the_anchor_keeps_the_base_on_its_inputs():
    """A concept without a change, alone on its direction of the inputs, holds ΔW near zero there."""
    changes = [None, (torch.ones(1, 1, dtype=DOUBLE), torch.ones(1, 2, dtype=DOUBLE))]
    sums = Statistics(2, changes, DOUBLE)
    sums.add(0, torch.tensor([[1.0, 0.0]]))
    sums.add(1, torch.tensor([[0.0, 1.0]]))
    up, down = sums.solve(1e-6)
    torch.testing.assert_close(up @ down, torch.tensor([[0.0, 1.0]], dtype=DOUBLE), rtol=1e-5, atol=1e-5)


def test_chunks_and_leading_dimensions_do_not_matter():
    changes, inputs = problem(4, 3, [2], [12])
    whole, parts = Statistics(4, changes, DOUBLE), Statistics(4, changes, DOUBLE)
    whole.add(0, inputs[0])
    parts.add(0, inputs[0][:4].reshape(2, 2, 4))
    parts.add(0, inputs[0][4:])
    parts.add(0, inputs[0][:0])
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(parts.crosses[0], whole.crosses[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float32_whatever_the_rows_are(dtype):
    changes, inputs = problem(4, 3, [2], [3000])
    rows = inputs[0].to(dtype)
    sums = Statistics(4, changes)
    sums.add(0, rows)
    torch.testing.assert_close(sums.gram.double(), rows.double().T @ rows.double(), rtol=1e-4, atol=1e-2)
    up, down = sums.solve()
    assert up.dtype == down.dtype == torch.float32


def test_no_other_change_has_a_smaller_ridged_error():
    """The gradient of the regularised objective vanishes at the solution."""
    changes, inputs = problem(6, 5, [2, 3], [7, 9])
    sums = statistics(changes, inputs, [1.0, 1.0], 6)
    up, down = sums.solve(1e-2)
    delta = (up @ down).requires_grad_()
    targets = [x @ dense(change, 5, 6).T for x, change in zip(inputs, changes, strict=True)]
    near = objective.positive_distances(targets, [x @ delta.T for x in inputs], "flat")
    ridge = 1e-2 * sums.gram.diagonal().mean()
    loss = torch.cat(near).square().sum() + ridge * delta.square().sum()
    (gradient,) = torch.autograd.grad(loss, delta)
    assert gradient.abs().max() < 1e-9 * sums.gram.diagonal().mean()


def test_no_rows_give_no_change():
    changes, _ = problem(5, 4, [2], [])
    up, down = Statistics(5, changes).solve()
    assert (up.shape, down.shape) == ((4, 2), (2, 5)) and (down == 0).all()


def test_a_singular_gram_is_solved_without_ridge():
    """Fewer rows than inputs: on the rows that were seen, the change is the one asked for."""
    changes, inputs = problem(8, 4, [2], [3])
    sums = statistics(changes, inputs, [1.0], 8)
    assert torch.linalg.matrix_rank(sums.gram) == 3
    up, down = sums.solve(ridge=0.0)
    asked = inputs[0] @ (changes[0][0] @ changes[0][1]).T
    torch.testing.assert_close(inputs[0] @ (up @ down).T, asked, rtol=1e-4, atol=1e-4)


def test_a_gram_that_is_slightly_indefinite_is_solved():
    """Rounding of float32 sums can push an eigenvalue below zero."""
    gram = torch.diag(torch.tensor([1.0, 1.0, -1e-7], dtype=DOUBLE))
    solution = closed_form(gram, torch.eye(3, dtype=DOUBLE), ridge=0.0)
    assert solution.isfinite().all()
    torch.testing.assert_close(solution[:2, :2], torch.eye(2, dtype=DOUBLE), rtol=1e-5, atol=1e-5)


def test_the_gram_is_not_changed():
    gram, cross = torch.eye(3, dtype=DOUBLE), torch.ones(2, 3, dtype=DOUBLE)
    closed_form(gram, cross)
    assert torch.equal(gram, torch.eye(3, dtype=DOUBLE)) and (cross == 1).all()


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="ridge is -1"):
        closed_form(torch.eye(2), torch.ones(1, 2), -1.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        closed_form(torch.full((2, 2), torch.nan), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(2, 5\) do not fit a layer of 6 inputs"):
        Statistics(6, [(torch.zeros(4, 2), torch.zeros(2, 5))])


class Apples(torch.Tensor):
    """A tensor on a device without float64: it cannot even be converted on its way to another."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.device.__get__:
            return torch.device("mps")
        told = [*args[1:], *kwargs.values()]
        if func is torch.Tensor.to and any(one == torch.device("cpu") for one in told):
            assert torch.float64 not in told, "converted before it was moved"
            return args[0].as_subclass(torch.Tensor)
        assert func is not torch.Tensor.double and torch.float64 not in told, "float64 on the device"
        return super().__torch_function__(func, types, args, kwargs)


def test_what_a_device_lacks_is_done_elsewhere() -> None:
    value = torch.randn(3, 4)
    found = in_float64(value.as_subclass(Apples))
    assert type(found) is torch.Tensor and torch.equal(found, value.double())
    double = value.double()
    assert in_float64(double) is double


def test_a_device_without_autocast_has_none_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_there(device_type: str, enabled: bool) -> None:
        raise RuntimeError(f"User specified an unsupported autocast device_type '{device_type}'")

    monkeypatch.setattr(torch, "autocast", none_there)
    with without_autocast(torch.device("mps")):
        pass


@pytest.mark.parametrize(("device", "solver"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("mps", "cpu"), ("xpu", "cpu")])
def test_float64_is_left_to_devices_that_have_it(device, solver):
    assert float64_device(torch.device(device)) == torch.device(solver)


def test_sums_stay_in_full_precision_inside_the_hosts_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(5, 2, generator=generator), torch.randn(2, 6, generator=generator)
    rows, plain, inside = torch.randn(40, 6, generator=generator), Statistics(6, [change]), Statistics(6, [change])
    plain.add(0, rows)
    with torch.autocast("cpu", torch.bfloat16):
        inside.add(0, rows)
    assert torch.equal(inside.gram, plain.gram)
    assert torch.equal(inside.crosses[0], plain.crosses[0])


def test_layers_that_read_the_same_share_one_gram() -> None:
    generator = torch.Generator().manual_seed(0)
    changes = [
        [(torch.randn(o, 2, generator=generator), torch.randn(2, 6, generator=generator)) for _ in range(2)]
        for o in (4, 3)
    ]
    alone = [Statistics(6, pair) for pair in changes]
    first, second = (Statistics(6, pair) for pair in changes)
    second.share(first)
    for concept in (0, 1, 0):
        rows = torch.randn(5, 6, generator=generator)
        for statistics in (*alone, first, second):
            statistics.add(concept, rows, 2.0)
    assert second.gram is first.gram
    for apart, together in zip(alone, (first, second), strict=True):
        torch.testing.assert_close(together.gram, apart.gram)
        for a, b in zip(apart.solve(), together.solve(), strict=True):
            torch.testing.assert_close(a, b)


def test_norm_statistics_are_least_squares_of_each_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    changes = [tuple(torch.randn(3, generator=generator) for _ in range(2)) for _ in range(2)]
    rows = [torch.randn(50, 3, generator=generator) + k for k in range(3)]
    statistics = NormStatistics(3, [*changes, None])
    for concept, seen in enumerate(rows):
        statistics.add(concept, seen[:20].view(2, 10, 3))
        statistics.add(concept, seen[20:])
    scale, shift = statistics.solve(0.0)
    asked = [*changes, (torch.zeros(3), torch.zeros(3))]
    for channel in range(3):
        inputs = torch.cat([torch.stack([seen[:, channel], torch.ones(50)], 1) for seen in rows])
        targets = torch.cat(
            [a[channel] * seen[:, channel] + b[channel] for seen, (a, b) in zip(rows, asked, strict=True)]
        )
        expected = torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]
        torch.testing.assert_close(torch.stack([scale, shift])[:, channel], expected, rtol=1e-4, atol=1e-4)


def test_norm_statistics_of_nothing_seen_are_zeros() -> None:
    scale, shift = NormStatistics(2, [(torch.ones(2), torch.ones(2))]).solve()
    assert torch.equal(scale, torch.zeros(2)) and torch.equal(shift, torch.zeros(2))
