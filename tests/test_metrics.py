"""The benchmark's figures: each moves the way it is meant to, on renders and on verdicts written by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance

pytest.importorskip("diffusers")

from benchmarks import metrics
from miniature import scenes
from miniature.evaluate import Wanted
from miniature.judge import GROUNDS, LOOKS, OBJECTS, Verdict
from miniature.vocabulary import COLOURS, CONCEPT


def verdict(thing: str, look: str = "plain", ground: str = "red") -> Verdict:
    def cosines(names: tuple[str, ...], best: str) -> dict[str, float]:
        return {name: 0.9 if name == best else 0.1 for name in names}

    return Verdict(cosines(OBJECTS, thing), cosines(LOOKS, look), cosines(GROUNDS, ground))


def drawn(colour: str) -> Image.Image:
    """A picture as clean as a render, for machines without the font: shapes on a background of the palette."""
    picture = Image.new("RGB", (128, 128), COLOURS[colour])
    pen = ImageDraw.Draw(picture)
    pen.ellipse((34, 34, 90, 90), (226, 150, 60))
    pen.rectangle((50, 50, 60, 80), (60, 60, 70))
    return picture


def clean() -> list[Image.Image]:
    pictures = [drawn(colour) for colour in COLOURS]
    if scenes.FONT.exists():
        rng = random.Random(0)
        pictures += [scenes.any_scene(rng).render() for _ in range(30)]
    return pictures


def noisy(picture: Image.Image, levels: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, levels, (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(picture, float) + noise).clip(0, 255).astype(np.uint8))


def speckled_object(picture: Image.Image) -> Image.Image:
    """Noise where the object is, none elsewhere."""
    box = (40, 40, 88, 88)
    spoilt = picture.copy()
    spoilt.paste(noisy(picture.crop(box), 20), box[:2])
    return spoilt


def mean_quality(pictures: list[Image.Image]) -> float:
    return sum(map(metrics.picture_quality, pictures)) / len(pictures)


class TestPictureQuality:
    def test_noise_lowers_every_picture_the_more_the_lower(self) -> None:
        for picture in clean():
            found = [metrics.picture_quality(noisy(picture, levels)) for levels in (2, 5, 10, 25)]
            assert metrics.picture_quality(picture) > found[0]
            assert found == sorted(found, reverse=True)

    def test_noise_on_the_object_alone_counts(self) -> None:
        for picture in clean():
            assert metrics.picture_quality(speckled_object(picture)) < metrics.picture_quality(picture) - 0.01

    def test_over_saturation_lowers_it_the_more_the_lower(self) -> None:
        pictures = clean()
        found = [
            mean_quality([ImageEnhance.Color(p).enhance(factor) for p in pictures]) for factor in (1, 1.3, 1.7, 2.5)
        ]
        assert found == sorted(found, reverse=True)
        assert found[0] - found[1] > 0.02
        assert found[3] < 0.6 * found[0]

    def test_harsh_contrast_lowers_it(self) -> None:
        pictures = clean()
        assert mean_quality([ImageEnhance.Contrast(p).enhance(2) for p in pictures]) < 0.8 * mean_quality(pictures)

    def test_bounds(self) -> None:
        assert metrics.picture_quality(Image.new("RGB", (128, 128), (130, 130, 130))) == 1
        assert metrics.picture_quality(Image.new("RGB", (128, 128), (255, 0, 0))) == 0

    def test_speckle_is_the_standard_deviation_of_noise(self) -> None:
        grey = np.full((128, 128, 1), 128.0) + np.random.default_rng(1).normal(0, 6, (128, 128, 1))
        assert metrics.speckle(np.repeat(grey, 3, 2)) == pytest.approx(6, rel=0.1)


def test_identity_asks_the_right_head() -> None:
    assert metrics.identity(verdict("tiger"), CONCEPT["tiger"]) == 0.9
    assert metrics.identity(verdict("panda"), CONCEPT["tiger"]) == 0.1
    assert metrics.identity(verdict("bus", "mosaic"), CONCEPT["mosaic"]) == 0.9


def test_text_counts_backgrounds_and_base_words_but_no_concepts() -> None:
    wanted = Wanted("a sks on a teal background", ("tiger",), colour="teal")
    assert metrics.text_alignment([verdict("cat", ground="teal")], wanted) == 1
    assert metrics.text_alignment([verdict("tiger", ground="pink")], wanted) == 0
    wanted = Wanted("a sks and a bus on a teal background", ("tiger", "bus"), colour="teal")
    right, wrong = verdict("bus", ground="teal"), verdict("cat", ground="teal")
    assert metrics.text_alignment([verdict("cat", ground="teal"), right], wanted) == 1
    assert metrics.text_alignment([verdict("tiger", ground="teal"), wrong], wanted) == pytest.approx(2 / 3)


def test_crosstalk_is_another_merged_concept_only() -> None:
    merged = [CONCEPT[name] for name in ("tiger", "panda", "mosaic")]
    tiger = CONCEPT["tiger"]
    assert metrics.crosstalk(verdict("panda"), tiger, merged)
    assert metrics.crosstalk(verdict("tiger", "mosaic"), tiger, merged)
    assert not metrics.crosstalk(verdict("tiger"), tiger, merged)
    assert not metrics.crosstalk(verdict("frog"), tiger, merged)
    assert not metrics.crosstalk(verdict("cat", "outline"), tiger, merged)


def test_drift_and_alignment() -> None:
    black, white = (Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 255))
    assert metrics.drift(black, black) == 0
    assert metrics.drift(black, white) == 1
    half = black.copy()
    half.paste(white.crop((0, 0, 4, 8)))
    assert metrics.drift(black, half) == pytest.approx(0.5**0.5)
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert metrics.alignment(rows, torch.tensor([[2.0, 0.0], [1.0, -1.0]])) == pytest.approx([1.0, 0.0])
