"""The pictures to compare: which are drawn, with whose changes, and what an interruption leaves."""

from __future__ import annotations

import pytest
import torch
from toy import ToyHost, toy_lora

from loraclr.concept import Concept
from loraclr.hosts import Cancelled
from loraclr.merging import merge
from loraclr.methods import combine
from loraclr.plan import Settings
from loraclr.result import Merge
from loraclr.webui import pictures

NAMES = ("cat", "dog", "ink")


@pytest.fixture
def host() -> ToyHost:
    return ToyHost()


@pytest.fixture
def merged(host: ToyHost) -> Merge:
    concepts = [
        Concept(toy_lora(host, name, k), f"sks {name}", kind="style" if name == "ink" else "subject")
        for k, name in enumerate(NAMES)
    ]
    return merge(host, concepts, Settings(speed="closed", steps=2, size=32))


def test_every_concept_and_pairs(host: ToyHost, merged: Merge) -> None:
    """All concepts, then pairs, neighbours first; a style is asked for as one."""
    told: list[float] = []
    before = host.drawn
    found = pictures.compare(host, merged, merged.settings, lambda _, share: told.append(share))
    assert found.complete
    assert [row.label for row in found.concepts] == list(NAMES)
    assert [row.prompt for row in found.scenes] == [
        "a sks cat and a sks dog",
        "a sks dog in sks ink",
        "a sks cat in sks ink",
    ]
    assert told == sorted(told) and told[0] == 0 and told[-1] < 1
    assert len(found.crosstalk) == 3
    rows = 2 * merged.settings.steps * (host.drawn - before)
    assert rows == pictures.rows_through_unet(merged.concepts, merged.settings)


def test_against_the_weighted_sum(host: ToyHost, merged: Merge) -> None:
    """On wish every row is drawn by all LoRAs at once, too, with the same noise; nothing else changes."""
    usual = pictures.compare(host, merged, merged.settings, lambda *_: None)
    assert not any(row.by_sum for row in usual.concepts + usual.scenes)
    told: list[float] = []
    before = host.drawn
    found = pictures.compare(host, merged, merged.settings, lambda _, share: told.append(share), True)
    drawn = host.drawn - before
    assert 2 * merged.settings.steps * drawn == pictures.rows_through_unet(merged.concepts, merged.settings, True)
    assert told == sorted(told) and told[-1] < 1
    for old, new in zip(usual.concepts + usual.scenes, found.concepts + found.scenes, strict=True):
        assert [p.tobytes() for p in (*old.before, *old.after)] == [p.tobytes() for p in (*new.before, *new.after)]
    weights = combine(merged.concepts, "sum")
    same = pictures.compare(host, weights, merged.settings, lambda *_: None)
    for wanted, row in zip(same.concepts + same.scenes, found.concepts + found.scenes, strict=True):
        near = [
            torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).float() for p in (*wanted.after, *row.by_sum)
        ]
        assert len(near) == 4
        for ours, theirs in zip(near[2:], near[:2], strict=True):
            assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("end", [Cancelled, torch.cuda.OutOfMemoryError])
def test_an_early_end_keeps_what_is_finished(host: ToyHost, merged: Merge, end: type[Exception]) -> None:
    """Drawing stops at once, and no hook stays."""
    told = []

    def tell(what: str, share: float) -> None:
        told.append(what)
        if len(told) == 4:
            raise end("stop")

    found = pictures.compare(host, merged, merged.settings, tell)
    assert not found.complete
    assert [row.label for row in found.concepts] == ["cat"]
    assert not found.scenes
    assert not any(module._forward_hooks for module in host.layers().values())
    assert not host.records


def test_two_styles_are_not_drawn_together(host: ToyHost) -> None:
    """There is nothing to be seen side by side."""
    concepts = [Concept(toy_lora(host, name, 1), name, kind="style") for name in ("ink", "chalk")]
    assert pictures._pairs(concepts) == []


def test_a_merge_by_weights_alone_is_drawn_as_asked(host: ToyHost, merged: Merge) -> None:
    """Such a merge's own settings tell nothing of pictures."""
    summed = combine(merged.concepts, "sum")
    found = pictures.compare(host, summed, Settings(steps=1, size=16), lambda *_: None)
    assert found.complete
    assert found.scenes[0].after[0].size == (16, 16)
