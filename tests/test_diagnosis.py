"""Why a concept stays weak: each sentence is there when its cause is, and not otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loraclr import capture, diagnosis, merging
from loraclr.bank import Bank, filing
from loraclr.concept import Concept
from loraclr.plan import Settings
from tests.toy import ToyHost, toy_lora


def reasons(host: ToyHost, concepts: list[Concept], place: int = 0) -> list[str]:
    """Of a concept in pictures of its own."""
    modules, asked = host.layers(), [concept.changes() for concept in concepts]
    bank = Bank([f"a photo of a {concepts[place].trigger}", ""])
    with capture.applied(modules, asked[place]):
        record = filing(bank, host.encode(bank.prompts))
        with host.watch(record):
            host.sample(bank.prompts[:1], 0, 8, 4.0, host.size, host.size)
    return diagnosis.reasons(host, modules, concepts, asked, place, bank)


@pytest.fixture
def host() -> ToyHost:
    return ToyHost()


@pytest.fixture
def concepts(host: ToyHost) -> list[Concept]:
    return [Concept(toy_lora(host, name, seed), word) for seed, (name, word) in enumerate([("a", "sks"), ("b", "zyk")])]


def test_nothing_is_said_of_concepts_that_do_not_disturb_each_other(host: ToyHost, concepts: list[Concept]) -> None:
    concepts[1] = replace(concepts[1], weight=0.3)
    assert reasons(host, concepts) == []


def test_a_lora_that_does_nothing(host: ToyHost, concepts: list[Concept]) -> None:
    concepts[0] = replace(concepts[0], weight=0.01)
    assert reasons(host, concepts) == [
        'With "sks", a hardly does anything: check the spelling of these words, or raise its weight.'
    ]


def test_the_same_words(host: ToyHost, concepts: list[Concept]) -> None:
    concepts[1] = replace(concepts[1], trigger="sks dog", weight=0.3)
    (sentence,) = reasons(host, concepts)
    assert sentence.startswith('The words of a ("sks") and b ("sks dog") are the same')


def test_a_stronger_lora_in_its_way(host: ToyHost, concepts: list[Concept]) -> None:
    concepts[1] = replace(concepts[1], weight=3.0)
    assert reasons(host, concepts) == [
        "Pictures of a are changed more by b than by a itself, most of all in M00, BASE: "
        "give b a lower weight, in these blocks at least.",
    ]
    assert reasons(host, concepts, 1) == []


def test_a_lora_that_is_stronger_in_one_block(host: ToyHost, concepts: list[Concept]) -> None:
    """The text encoder, BASE, which changes these pictures little: there is no other reason, and that one is named."""
    concepts[1] = replace(concepts[1], weight=0.5, text_weight=2.5)
    assert reasons(host, concepts) == [
        "In pictures of a, b does much more in BASE than a itself: give b a lower weight in these blocks."
    ]


def test_how_loud_a_lora_is(host: ToyHost, concepts: list[Concept]) -> None:
    """A LoRA with itself 1, and a copy of three times its weight 9, in every block."""
    loud = [concepts[0], replace(concepts[0], weight=3.0)]
    modules, asked = host.layers(), [concept.changes() for concept in loud]
    bank = Bank(["a photo of a sks", ""])
    with host.watch(filing(bank, host.encode(bank.prompts))):
        host.sample(bank.prompts[:1], 0, 4, 4.0, host.size, host.size)
    own, other = diagnosis.loudness(host, modules, asked, 0, bank)
    assert own == pytest.approx({"M00": 1, "BASE": 1})
    assert other == pytest.approx({"M00": 9, "BASE": 9}, rel=1e-5)


def test_a_thorough_merge_is_not_told_to_take_longer(
    host: ToyHost, concepts: list[Concept], monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = [concepts[0], replace(concepts[1], weight=3.0)]
    monkeypatch.setattr(Settings, "thorough", True)  # of one that stays as weak as the closed form leaves it
    notes = merging.merge(host, loud, Settings(speed="closed", steps=3, scenes=0)).notes
    assert notes and not any(note.startswith("A slower speed") for note in notes)


def test_a_merge_tells_of_its_weak_concepts_only(host: ToyHost, concepts: list[Concept]) -> None:
    loud = [concepts[0], replace(concepts[1], weight=3.0)]
    quick = Settings(speed="closed", steps=3, scenes=0)
    notes = merging.merge(host, loud, quick).notes
    assert any(note.startswith("Pictures of a are changed more by b") for note in notes)
    assert notes[-1].startswith("A slower speed")
    assert merging.merge(host, concepts[:1], quick).notes == []  # one alone is kept whole
