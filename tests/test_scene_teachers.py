"""The benchmark of what two concepts in one picture are learnt from: what counts as right."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from benchmarks.teachers import line
from loraclr.scenes import Part, Scene
from miniature.judge import GROUNDS, LOOKS, OBJECTS, Verdict
from miniature.vocabulary import CONCEPTS

PLACE = {concept.name: place for place, concept in enumerate(CONCEPTS)}


def seen(thing: str, look: str) -> Verdict:
    """A judge who is sure."""
    return Verdict(
        {name: float(name == thing) for name in OBJECTS},
        {name: float(name == look) for name in LOOKS},
        dict.fromkeys(GROUNDS, 0.0),
    )


def test_two_things_are_right_each_in_its_half_and_as_they_are() -> None:
    scene = Scene("", (Part((PLACE["tiger"],), "", 0, 0.5), Part((PLACE["frog"],), "", 0.5, 1)))
    tiger, frog, drawn = seen("tiger", "plain"), seen("frog", "plain"), seen("frog", "mosaic")
    cells = line("", [scene] * 4, [[tiger, frog], [frog, tiger], [tiger, tiger], [tiger, drawn]])
    assert [cell.split("(")[1] for cell in cells[1:]] == ["2/4)", "3/4)", "1/4)"]


def test_a_thing_in_a_style_needs_both() -> None:
    scene = Scene("", (Part((PLACE["tiger"], PLACE["mosaic"]), ""),))
    found = [[seen("tiger", "mosaic")], [seen("tiger", "plain")], [seen("frog", "mosaic")], [seen("tiger", "outline")]]
    cells = line("", [scene] * 4, found)
    assert [cell.split("(")[1] for cell in cells[1:]] == ["3/4)", "2/4)", "1/4)"]
