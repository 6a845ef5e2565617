"""The paper's objective over a merge's layers, against Eq. 1-5 written out; and memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import loraclr
from loraclr import hinge, memory, merging
from loraclr.alignment import KINDS
from loraclr.concept import Concept
from loraclr.plan import Settings
from tests.toy import ToyHost, toy_lora

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
MARGIN, PENALTY = 2.0, 0.1


def layer(concepts: int = 3, rows: int = 10) -> tuple:
    """A linear layer, each concept's change of it, the merged one, and each concept's inputs."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    *asked, merged = ({NAME: (torch.randn(3, 2) / 2, torch.randn(2, 4) / 2)} for _ in range(concepts + 1))
    return {NAME: module}, asked, merged, [{NAME: torch.randn(rows, 4)} for _ in range(concepts)]


def by_definition(modules: dict, asked: list, delta: torch.Tensor, seen: list) -> tuple[float, float]:
    """Eq. 5 with a distance for each row, and the share of rows for which the hinge is above 0."""
    weight, losses, pushed = modules[NAME].weight.detach().double(), [], []
    target, found = [], []
    for changes, inputs in zip(asked, seen, strict=True):
        x, (up, down) = inputs[NAME].double(), changes[NAME]
        target.append(x @ (weight + (up @ down).double()).T)
        found.append(x @ (weight + delta).T)
    for i, mine in enumerate(target):
        for row, y in enumerate(mine):
            near = float((y - found[i][row]).norm())
            far = min(float((y - other[row]).norm()) for j, other in enumerate(found) if j != i)
            losses.append(near**2 + max(0.0, MARGIN - far) ** 2)
            pushed.append(far < MARGIN)
    return sum(losses) / len(losses) + PENALTY * float(delta.norm()), sum(pushed) / len(pushed)


def test_against_the_definition() -> None:
    modules, asked, merged, seen = layer()
    (told,) = hinge.objective(modules, asked, merged, seen, MARGIN, PENALTY).values()
    up, down = merged[NAME]
    value, active = by_definition(modules, asked, (up @ down).double(), seen)
    assert 0 < active < 1, "a layer on which it acts on some rows"
    assert told.merged == pytest.approx(value, rel=1e-5)
    assert told.active == pytest.approx(active)
    assert told.start == pytest.approx(by_definition(modules, asked, torch.zeros(3, 4).double(), seen)[0], rel=1e-5)
    assert told.layers == 1


def test_one_concept_is_never_pushed_and_rows_are_compared_as_far_as_there_are() -> None:
    modules, asked, merged, seen = layer(1)
    told = hinge.objective(modules, asked, merged, seen, MARGIN, PENALTY)["feed-forward"]
    assert told.active == 0
    modules, asked, merged, seen = layer(2)
    whole = hinge.objective(modules, asked, merged, [{NAME: each[NAME][:6]} for each in seen], MARGIN, PENALTY)
    cut = hinge.objective(modules, asked, merged, [seen[0], {NAME: seen[1][NAME][:6]}], MARGIN, PENALTY)
    assert cut == whole
    assert hinge.objective(modules, asked, merged, [seen[0], {}], MARGIN, PENALTY) == {}


def test_a_change_of_bias_and_a_convolution() -> None:
    module = nn.Conv2d(2, 3, 3)
    torch.manual_seed(1)
    asked = [{NAME: (torch.randn(3, 1), torch.randn(1, 19))} for _ in range(2)]
    seen = [{NAME: torch.randn(5, 18)} for _ in range(2)]
    told = hinge.objective({NAME: module}, asked, asked[0], seen, 0.0, 1.0)["feed-forward"]
    (up, down), (other, under) = (changes[NAME] for changes in asked)
    ones = torch.cat([seen[1][NAME], torch.ones(5, 1)], 1)
    missed = (ones @ (up @ down - other @ under).T).square().sum(1).mean() / 2
    assert told.merged == pytest.approx(float(missed + (up @ down[:, :18]).norm()), rel=1e-5)


def test_the_same_places_of_every_concept() -> None:
    rows = torch.arange(2 * 40).reshape(2, 40, 1).float()
    kept = hinge.some(rows)
    assert kept.shape == (2 * hinge.TOKENS, 1)
    assert torch.equal(kept, hinge.some(rows))
    assert torch.equal(kept[hinge.TOKENS :] - kept[: hinge.TOKENS], torch.full((hinge.TOKENS, 1), 40.0))
    assert hinge.some(rows[:, :3]).shape == (6, 1)


def test_it_can_be_stopped_at_any_layer() -> None:
    modules, asked, merged, seen = layer()

    def stop() -> None:
        raise loraclr.Cancelled

    with pytest.raises(loraclr.Cancelled):
        hinge.objective(modules, asked, merged, seen, MARGIN, PENALTY, stop)


def test_a_merge_reports_it() -> None:
    host = ToyHost()
    concepts = [
        Concept(toy_lora(host, name, seed), word) for seed, (name, word) in enumerate([("a", "sks"), ("b", "zyk")])
    ]
    merge = merging.merge(host, concepts, Settings(speed="closed", steps=3))
    assert list(merge.objective) == list(KINDS)
    whole = merge.overall
    assert whole.layers == len(merge.layers)
    assert 0 < whole.merged < whole.start
    assert merge.figures()["objective"]["feed-forward"]["layers"] == 1
    assert merge.memory[memory.PROCESS] > 2**20
    assert memory.CARD not in merge.memory
    assert merge.figures()["peak_bytes"] == merge.memory
