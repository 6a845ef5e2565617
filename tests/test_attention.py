"""OpenCLIP's fused attention taken apart: the same numbers, hooks that work, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraclr.capture import applied, observed
from loraclr.hosts.attention import Pooling, Split, opened

WIDTH, TOKENS = 12, 5


@pytest.fixture(params=[False, True], ids=["tokens first", "batch first"])
def attention(request) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(WIDTH, 3, batch_first=request.param).double().requires_grad_(False)
    nn.init.normal_(whole.in_proj_bias)
    nn.init.normal_(whole.out_proj.bias)
    return whole.eval()


def run(attention: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """As open_clip calls it, with its causal mask."""
    length = x.shape[1 if attention.batch_first else 0]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    return attention(x, x, x, need_weights=False, attn_mask=mask)[0]


def rows(attention: nn.MultiheadAttention, batch: int = 2) -> torch.Tensor:
    size = (batch, TOKENS, WIDTH) if attention.batch_first else (TOKENS, batch, WIDTH)
    return torch.randn(size, dtype=torch.float64)


def random_changes(split: Split, rank: int = 2) -> dict:
    return {
        name: (torch.randn(WIDTH, rank, dtype=torch.float64), torch.randn(rank, WIDTH, dtype=torch.float64))
        for name in split.projections
    }


def test_it_computes_what_the_fused_one_computes(attention) -> None:
    x = rows(attention)
    before = run(attention, x)
    with opened([Split(attention)]):
        inside = run(attention, x)
    torch.testing.assert_close(inside, before)
    assert torch.equal(run(attention, x), before)
    assert "forward" not in vars(attention)


def test_changes_of_q_k_v_and_out_equal_written_weights(attention) -> None:
    x, split = rows(attention), Split(attention)
    weights = {name: value.clone() for name, value in attention.state_dict().items()}
    changes = random_changes(split)
    with opened([split]), applied(split.projections, changes):
        inside = run(attention, x)
    assert all(torch.equal(value, weights[name]) for name, value in attention.state_dict().items())
    dense = {name: up @ down for name, (up, down) in changes.items()}
    attention.in_proj_weight += torch.cat([dense["q_proj"], dense["k_proj"], dense["v_proj"]])
    attention.out_proj.weight += dense["out_proj"]
    torch.testing.assert_close(inside, run(attention, x))
    torch.testing.assert_close(split.projections["k_proj"].weight, attention.in_proj_weight[WIDTH : 2 * WIDTH])


def test_hooks_see_every_input_and_gradients_reach_the_factors(attention) -> None:
    x, split, seen = rows(attention), Split(attention), {}
    changes = {name: tuple(f.requires_grad_() for f in pair) for name, pair in random_changes(split).items()}
    with opened([split]), observed(split.projections, seen.__setitem__), applied(split.projections, changes):
        loss = run(attention, x).square().sum()
    assert set(seen) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert torch.equal(seen["q_proj"], x) and torch.equal(seen["v_proj"], x)
    gradients = torch.autograd.grad(loss, [f for pair in changes.values() for f in pair])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_it_closes_also_when_the_run_fails_and_keeps_what_another_has_put_there(attention) -> None:
    def other(*_, **__):
        return None

    for before in (None, other):
        if before is not None:
            attention.forward = before
        with pytest.raises(RuntimeError, match="stop"), opened([Split(attention)]):
            raise RuntimeError("stop")
        assert vars(attention).get("forward") is before


def test_the_weight_follows_the_attention(attention) -> None:
    """With medvram a part moves between devices, and its parameters' memory is another one then."""
    projection = Split(attention).projections["q_proj"]
    attention.float()
    assert projection.weight.dtype == torch.float32
    assert not list(projection.children()) and not list(projection.parameters())


class Wrapper(nn.Module):
    """As sgm wraps OpenCLIP, whose text projection (d, P) is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.text_projection = nn.Parameter(torch.randn(WIDTH, 7, dtype=torch.float64), requires_grad=False)

    def pool(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return features[torch.arange(len(features)), tokens.argmax(-1)] @ self.model.text_projection


def test_the_text_projection_is_a_layer_that_can_be_seen_and_changed() -> None:
    torch.manual_seed(0)
    wrapper, seen = Wrapper(), {}
    features, tokens = (
        torch.randn(2, TOKENS, WIDTH, dtype=torch.float64),
        torch.tensor([[1, 9, 0, 0, 0], [1, 2, 3, 9, 0]]),
    )
    part, before = Pooling(wrapper), wrapper.pool(features, tokens)
    changes = {"text_projection": tuple(torch.randn(size, dtype=torch.float64) for size in ((7, 2), (2, WIDTH)))}
    with opened([part]):
        torch.testing.assert_close(wrapper.pool(features, tokens), before)
        with observed(part.projections, seen.__setitem__), applied(part.projections, changes):
            inside = wrapper.pool(features, tokens)
    assert "pool" not in vars(wrapper) and not list(part.projections["text_projection"].parameters())
    assert torch.equal(seen["text_projection"].flatten(0, 1), features[[0, 1], [1, 3]])
    up, down = changes["text_projection"]
    wrapper.model.text_projection += (up @ down).T
    torch.testing.assert_close(inside, wrapper.pool(features, tokens))
