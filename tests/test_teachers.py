"""Teachers: how much of a merge is about what they have said."""

from __future__ import annotations

import itertools

import pytest
from toy import ToyHost, toy_lora

from loraclr.changes import changes_of
from loraclr.concept import Concept
from loraclr.merging import _Run, by_closed_form
from loraclr.plan import Settings


@pytest.fixture
def run() -> _Run:
    """Two things and a style, looked at in every way."""
    host = ToyHost()
    loras = (toy_lora(host, name, seed) for seed, name in enumerate(("one", "two", "ink"), 1))
    words = zip(loras, ("sks", "zyk", "inky"), ("subject", "subject", "style"), strict=True)
    concepts = [Concept(lora, word, kind=kind) for lora, word, kind in words]
    run = _Run(host, concepts, Settings(speed="balanced", steps=2), lambda *_: None, by_closed_form)
    for place in range(4):
        run.look(place, ())
    run.teachers.compose()
    run.teachers.look_astray()
    return run


def test_every_kind_of_lesson_has_the_weight_of_its_setting(run: _Run) -> None:
    teachers, settings = run.teachers, run.settings
    teachers.look_again(changes_of(toy_lora(run.host, "merged", 4), run.host.layers()))
    banks, shares = teachers.lessons([1.0, 1.0, 1.0])
    of = {id(bank): share for bank, share in zip(banks, shares, strict=True)}

    def weights(some) -> list[float]:
        return [of.pop(id(bank)) for bank in some]

    each = [1.0, 1.0, 1.0, 3 * settings.neutral]
    assert weights(teachers.own) == pytest.approx(each)
    assert weights(teachers.stray) == pytest.approx([settings.astray * share for share in each])
    assert weights(teachers.again[0]) == pytest.approx([settings.again * share for share in each])
    beside, styled = (sum(weights(banks)) for banks in teachers.joint)
    assert beside == pytest.approx(3 * settings.binding) and styled == pytest.approx(3 * settings.styled)
    assert not of


def test_more_care_for_one_concept_is_taken_in_all_that_is_about_it(run: _Run) -> None:
    teachers = run.teachers
    plain, cared = (dict(zip(map(id, banks), shares, strict=True)) for banks, shares in map(
        teachers.lessons, ([1.0, 1.0, 1.0], [0.5, 0.5, 2.0])
    ))  # fmt: skip
    for banks in (teachers.own, teachers.stray):
        assert [cared[id(bank)] / plain[id(bank)] for bank in banks] == pytest.approx([0.5, 0.5, 2.0, 1.0])
    for bank in itertools.chain(*teachers.joint):
        assert cared[id(bank)] == plain[id(bank)]


def test_before_anything_is_drawn_in_the_middle_there_are_no_lessons_of_it(run: _Run) -> None:
    banks, _ = run.teachers.lessons([1.0, 1.0, 1.0])
    assert len(banks) == 4 + 4 + sum(map(len, run.teachers.joint))
