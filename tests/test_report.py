"""The report: one file that needs nothing else, says what it is given, and the statistics behind its ±."""

from __future__ import annotations

import base64
import io
import math
import re
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from loraclr.report import Gallery, Mean, Share, Shot, Table, inline, page, text

TABLE = Table("Figures", ("", "top-1"), [("merged", "90 %"), ("sum <b>", "4 %")], "a note", frozenset({0}))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))


class Balanced(HTMLParser):
    """Fails on a tag that is closed and was not open."""

    VOID = ("meta", "img")

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained() -> None:
    gallery = Gallery(
        "Pictures", ("one", "two"), [("tiger", "a sks", [Shot(picture(), "tiger", True), Shot(picture())])]
    )
    document = page("Title & more", "lead", [TABLE, gallery])
    parsed = Balanced(document)
    assert parsed.open == []
    assert len(parsed.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert not re.search(r"https?://|<script|<link", document)
    assert "prefers-color-scheme:dark" in document
    assert "image-rendering:pixelated" in document


def test_page_escapes_what_it_is_given() -> None:
    document = page("<i>", "<u>", [TABLE, Gallery("<s>", ("<q>",), [('"', "<p>", [Shot(picture(), "<em>", False)])])])
    assert not re.search(r"<(i|u|s|q|p|em|b)>", document)
    assert "sum &lt;b&gt;" in document


def test_verdicts_are_marked() -> None:
    shots = [Shot(picture(), "right", True), Shot(picture(), "wrong", False), Shot(picture(), "open")]
    document = page("t", "l", [Gallery("g", ("a", "b", "c"), [("x", "", shots)])])
    assert re.findall(r'<figcaption class="(\w*)">([^<]*)<', document) == [
        ("right", "✓ right"), ("wrong", "✗ wrong"), ("", "open"),
    ]  # fmt: skip


def test_pictures_come_back_as_they_were() -> None:
    before = picture()
    data = base64.b64decode(inline(before).partition(",")[2])
    assert Image.open(io.BytesIO(data)).tobytes() == before.tobytes()


def test_gallery_wants_a_shot_for_every_column() -> None:
    with pytest.raises(ValueError, match="zip"):
        page("t", "l", [Gallery("g", ("a", "b"), [("x", "", [Shot(picture())])])])


def test_text_aligns_columns() -> None:
    assert text(TABLE).splitlines() == [
        "Figures", "", "         top-1", "--------------", "merged   90 %", "sum <b>  4 %", "--------------", "a note",
    ]  # fmt: skip


def test_share_is_a_count_with_an_error_that_is_never_zero() -> None:
    assert str(Share(15, 16)) == "94 % ± 7 (15/16)"
    assert Share(16, 16).value == 1
    assert Share(16, 16).error == pytest.approx(math.sqrt(17 / 18 * 1 / 18 / 18))
    assert Share(0, 16).error == pytest.approx(Share(16, 16).error)
    assert str(Share(0, 0)) == "–"
    assert math.isnan(Share(0, 0).value)
    assert Share(1, 2) + Share(3, 4) == Share(4, 6)


def test_mean_has_the_standard_error_of_the_mean() -> None:
    values = (0.2, 0.5, 0.9, 0.4)
    assert Mean(values).value == pytest.approx(statistics.mean(values))
    assert Mean(values).error == pytest.approx(statistics.stdev(values) / 2)
    assert str(Mean((0.5,))) == "0.500"
    assert str(Mean(())) == "–"
