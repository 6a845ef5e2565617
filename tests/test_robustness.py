"""The benchmark of LoRAs as people have them: what is done to the LoRAs, and what its table says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import robustness
from loraclr.changes import changes_of
from loraclr.plan import Settings
from miniature.demo import to_merge
from miniature.drawing import open_miniature
from miniature.judge import Judge
from miniature.vocabulary import CONCEPT

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def host():
    return open_miniature("cpu")


def delta(lora, name: str = LAYER) -> torch.Tensor:
    up, down = changes_of(lora)[name]
    return up @ down


@pytest.fixture
def tiger():
    return to_merge(CONCEPT["tiger"])


def test_undertrained_does_its_share_in_every_layer(host, tiger) -> None:
    half = robustness.undertrained(0.5)(host, tiger.lora, tiger.trigger)
    assert half.layers.keys() == tiger.lora.layers.keys()
    for name in half.layers:
        torch.testing.assert_close(delta(half, name), 0.5 * delta(tiger.lora, name))


def test_cut_is_the_best_of_that_rank(host, tiger) -> None:
    small = robustness.cut(1)(host, tiger.lora, tiger.trigger)
    values = torch.linalg.svdvals(delta(tiger.lora))
    left = torch.linalg.matrix_norm(delta(tiger.lora) - delta(small))
    assert torch.linalg.matrix_rank(delta(small), rtol=1e-4) == 1
    torch.testing.assert_close(left, values[1:].square().sum().sqrt(), rtol=1e-3, atol=1e-5)


def test_overtrained_is_trained_on_and_finite(host, tiger) -> None:
    before = delta(tiger.lora).clone()
    after = robustness.overtrained(2, pictures=1, rows=2)(host, tiger.lora, tiger.trigger)
    assert torch.equal(delta(tiger.lora), before), "the LoRA that was given stays"
    assert delta(after).isfinite().all() and not torch.allclose(delta(after), before)
    assert all(not value.requires_grad for pair in changes_of(after).values() for value in pair)


def test_every_concept_has_a_line_by_its_own_lora_and_merged(host) -> None:
    members = robustness.SETS["weights"][:2]
    settings = Settings(speed="closed", steps=2, scenes=0)
    found, _ = robustness.tried(host, Judge.load(), members, settings, 2)
    lines = [robustness.line("weights", member, one) for member, one in zip(members, found, strict=True)]
    assert [line[:3] for line in lines] == [["weights", "panda", "weight 0.7"], ["weights", "rocket", ""]]
    assert all(len(line) == len(robustness.COLUMNS) for line in lines)
    assert found[0].own.top1.of == 2 and found[0].own.identity.value != found[0].merged.identity.value


def test_every_set_is_of_concepts_that_there_are_each_once() -> None:
    for members in robustness.SETS.values():
        names = [member.name for member in members]
        assert set(names) <= CONCEPT.keys() and len(set(names)) == len(names)
