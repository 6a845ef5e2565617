"""How LoRAs stand in the list: found by name, folder and trigger words, without opening anything twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraclr.webui import labels

_opened: list[str] = []
_counting = [False]
sys.addaudithook(lambda event, args: _opened.append(str(args[0])) if _counting[0] and event == "open" else None)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that are opened within the test."""
    _opened.clear()
    _counting[0] = True
    yield _opened
    _counting[0] = False


def test_name_folder_and_words(tmp_path: Path) -> None:
    """All three are in the label; the name alone comes out of it again, whatever signs are in it."""
    file = tmp_path / "people" / "old, new: a - b.safetensors"
    file.parent.mkdir()
    told = labels.of("old, new: a - b", str(file), f"{tmp_path}/", {"modelspec.trigger_phrase": "sks\n woman "})
    assert told.split("\u2003") == ["old, new: a - b", "·", "people", "·", "sks woman"]
    assert labels.name_of(told) == "old, new: a - b"
    assert labels.name_of("plain") == "plain"
    assert labels.of("x", str(tmp_path / "x.safetensors"), str(tmp_path), {}) == "x"


def test_the_users_words_come_first_and_tags_may_be_decoded(tmp_path: Path) -> None:
    """The sidecar's activation text, else the most frequent tag, which the webui has decoded already."""
    file = tmp_path / "x.safetensors"
    metadata = {"ss_tag_frequency": {"10_a": {"person": 2, "zyk": 5}}}
    assert labels.of("x", str(file), str(tmp_path), metadata).endswith("zyk")
    (tmp_path / "x.json").write_text(json.dumps({"activation text": "mine"}))
    assert labels.of("x", str(file), str(tmp_path), metadata).endswith("mine")
    (tmp_path / "x.json").write_text(json.dumps({"activation text": "mine, too"}))
    assert labels.of("x", str(file), str(tmp_path), metadata).endswith("mine, too")
    (tmp_path / "x.json").unlink()
    assert labels.of("x", str(file), str(tmp_path), {"modelspec.trigger_phrase": "new"}).endswith("new")


def test_a_second_listing_opens_nothing(tmp_path: Path, opened: list[str]) -> None:
    """Of 2,000 LoRAs the first listing opens sidecars only, the second one none, a third one what has changed."""
    files = [tmp_path / f"lora {number}.safetensors" for number in range(2000)]
    for file in files[:500]:
        file.with_suffix(".json").write_text('{"activation text": "zyk"}')
    found = [[]] * 3
    for turn in range(3):
        if turn == 2:
            files[7].with_suffix(".json").write_text('{"activation text": "zyk cat"}')
        opened.clear()
        for file in files:
            labels.of(file.stem, str(file), str(tmp_path), {"modelspec.trigger_phrase": "words"})
        found[turn] = list(opened)
    assert sorted(found[0]) == sorted(str(file.with_suffix(".json")) for file in files[:500])
    assert found[1] == []
    assert found[2] == [str(files[7].with_suffix(".json"))]


@pytest.mark.parametrize(
    ("path", "folder", "hidden"),
    [
        ("/l/a.safetensors", "", False),
        ("/l/b/c/a.safetensors", "b/c", False),
        ("/l/.b/c/a.safetensors", ".b/c", True),
        ("/l/.a.safetensors", "", True),
        ("/lycoris/.x/a.safetensors", "", False),
        ("C:\\l\\b\\a.safetensors", "", False),
    ],
)
def test_folders(path: str, folder: str, hidden: bool) -> None:
    """Relative to the LoRA folder; one on the way to that folder counts as nothing."""
    assert labels.folder(path, "/l/") == folder
    assert labels.hidden(path, "/l") == hidden
