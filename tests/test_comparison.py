"""Earlier merges side by side: every LoRA of each, what was said of it, and a mark where they differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from loraclr.webui import comparison, surroundings
from loraclr.webui.surroundings import Listed


def recipe(method: str, *concepts: dict, **more: object) -> dict:
    usual = {"weight": 1.0, "text_weight": None, "kind": "subject", "prompts": [], "blocks": {"OUT03": 1.0}}
    return {"method": method, "concepts": [{**usual, **concept} for concept in concepts], **more}


FIRST = recipe(
    "loraclr",
    {"file": "tiger.safetensors", "trigger": "sks"},
    {"file": "<panda>.safetensors", "trigger": "zyk", "blocks": {"OUT03": 0.5}},
    settings={"speed": "fast", "seed": 0},
    missed={"tiger": [0.4, 0.125], "<panda>": [0.5, 0.25]},
    bled={"tiger": {"<panda>": -0.07}},
)
SECOND = recipe("sum", {"file": "tiger.safetensors", "trigger": "sks"}, settings={"seed": 0, "density": 0.5})


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that lists two merged LoRAs, one with its recipe decoded already, and one LoRA that is no merge."""
    told = {"one": {"loraclr.recipe": FIRST}, "two": {"loraclr.recipe": json.dumps(SECOND)}, "plain": {}}
    listed = {name: Listed(name, Path(name), metadata, None) for name, metadata in told.items()}
    monkeypatch.setattr(surroundings, "_around", [SimpleNamespace(found=listed.get, option=lambda _, usual: usual)])


def lines(*names: str | None) -> dict[str, tuple[bool, list[str]]]:
    """Title of a line → whether it is marked, and its cells."""
    found = re.findall(r"<tr( class=\"loraclr-differs\")?><th>(.*?)</th>(.*?)</tr>", comparison.table(*names))
    return {title.strip(): (bool(mark), re.findall(r"<t[dh]>(.*?)</t[dh]>", cells)) for mark, title, cells in found}


def test_two() -> None:
    told = lines("one", "two")
    assert told[""] == (False, ["one", "two"])
    assert told["tiger.safetensors"] == (False, ["Part of it", "Part of it"])
    assert told["&lt;panda&gt;.safetensors"] == (True, ["Part of it", "–"])
    assert told["Block weights"] == (True, ["OUT03=0.5", "–"])
    assert told["Bled in"] == (True, ["7%", "–"])
    assert told["Method of merging"] == (True, ["loraclr", "sum"])
    assert told["Speed"] == (True, ["fast", "–"]) and told["Density"] == (True, ["–", "0.5"])
    assert "Seed of the merge" not in told, "a setting that both share"


def test_one_alone_is_told_in_full_and_nothing_is_marked() -> None:
    told = lines("one", None)
    assert told["Seed of the merge"] == (False, ["0"]) and not any(mark for mark, _ in told.values())
    assert lines("one", "one") == told


def test_what_is_no_merge_is_left_out() -> None:
    assert comparison.table(None, None) == comparison.table("plain", "gone") == ""
    assert lines("plain", "two") == lines("two", None)
