"""Every fixed string of the tab is in every language file, and nothing else is."""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest
import torch
from safetensors.torch import save

from loraclr import files
from loraclr.methods import METHODS
from loraclr.webui import language
from loraclr.webui.sentences import CORE

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "loraclr" / "webui").glob("*.py"))
LANGUAGES = sorted((ROOT / "localizations").glob("*.json"))
#: Arguments that the user reads, by name; and calls whose first argument is read, by the called thing's name.
READ = ("label", "info", "placeholder")
SAID_FIRST = ("Button", "Accordion", "info", "say")
#: Constants with text in HTML.
TEXTS = ("HEADING", "EMPTY", "NOTHING", "NONE", "OTHER", "WELCOME")
#: Names and signs that are the same everywhere.
SAME = re.compile(r"LoRA|[^\w]*|exact|auto|\d+")


def strings() -> set[str]:
    """The fixed strings of the tab, as the page's text nodes and attributes have them."""
    found = {"Fast", "Balanced", "Best", "Subject", "Style", "Interrupting…", "LoRACLR Merge"}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            found.update(_strings(node))
    found.update(CORE)
    page = (ROOT / "loraclr" / "webui" / "alone" / "page.js").read_text(encoding="utf-8")
    found.update(re.findall(r'loraclrSay\("([^"]+)"', page))
    script = (ROOT / "javascript" / "loraclr_merge.js").read_text(encoding="utf-8")
    tips = re.search(r"const loraclrTips = {\n(.+?)\n};", script, re.S)[1].splitlines()
    found.update(re.fullmatch(r' +\w+: "(.+)",', line)[1] for line in tips)
    found.update(method.text for method in METHODS.values() if method.offered)
    return {text for text in found if not SAME.fullmatch(text)}


def _strings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call):
        said = [keyword.value for keyword in node.keywords if keyword.arg in READ]
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        said += node.args[:1] if called in SAID_FIRST else []
        said += node.args[1:2] if called == "OptionInfo" else []
        said += node.args[2:3] if called == "_text" else []
        yield from (value.value for value in said if isinstance(value, ast.Constant) and isinstance(value.value, str))
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in TEXTS:
        text = ast.literal_eval(node.value)
        yield from re.findall(r'title="([^"]+)"', text)
        yield from (html.unescape(part).strip() for part in re.findall(r">([^<>{}]+)<", text) if part.strip())


def test_the_strings_are_found() -> None:
    """The walk over the sources sees labels, buttons, placeholders, notes and texts."""
    assert {
        "LoRAs to merge", "Merge", "left empty: named after the LoRAs in it", "Compare with", "Text enc.",
        "Number format of merged LoRAs", "same", "Load settings", "{share} bled in",
    } <= strings()  # fmt: skip


@pytest.mark.parametrize("file", LANGUAGES, ids=lambda file: file.stem)
def test_nothing_is_missing_or_left_over(file: Path) -> None:
    """Each string is translated, none to itself or to nothing."""
    told = json.loads(file.read_text(encoding="utf-8"))
    assert not strings() - told.keys()
    assert not told.keys() - strings()
    assert all(value.strip() and value != key for key, value in told.items())


@pytest.mark.parametrize("file", LANGUAGES, ids=lambda file: file.stem)
def test_the_same_values_are_named(file: Path) -> None:
    """A translation has a place for each name and figure of the sentence, and for no other."""
    for sentence, translation in json.loads(file.read_text(encoding="utf-8")).items():
        names = [{name for _, name, _, _ in Formatter().parse(text) if name} for text in (sentence, translation)]
        assert names[0] == names[1], sentence


def test_no_sentence_is_put_together_where_it_is_said() -> None:
    """What is said is a constant: a sentence with values already in it would never be found."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "say" and source.name != "language.py":
                assert isinstance(node.args[0], ast.Constant), f"{source.name}, line {node.lineno}"


def test_what_the_core_says_is_still_what_it_says() -> None:
    """Each of these sentences is somewhere in the sources, whole or, where a part is put in later, without that."""
    said = set()
    for source in (ROOT / "loraclr").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if source.name != "sentences.py" else ():
            if isinstance(node, ast.JoinedStr):
                said.add("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    for sentence in CORE:
        plain = re.sub(r"{\w+}", "{}", sentence)
        rest = plain.removeprefix("Looking at ").removeprefix("{} ")
        assert {plain, rest, rest.removesuffix("; choose a LoRA file.")} & said, sentence


def test_the_languages() -> None:
    """Chinese, Japanese and German, under the names that the webui's other translations have."""
    assert {file.stem for file in LANGUAGES} >= {"zh_CN", "ja_JP", "de_DE"}


class German:
    """A program whose user reads German."""

    def option(self, name: str, usual: str) -> str:
        return {"localization": "de_DE"}.get(name, usual)


def test_a_sentence_of_the_core_is_retold_with_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "here", German)
    told = language.retell(
        "Pictures of ink are changed more by tiger 2 than by ink itself: give tiger 2 a lower weight."
    )
    assert told == "Bilder von ink ändert tiger 2 stärker als ink selbst: tiger 2 ein kleineres Gewicht geben."
    unknown = "Pictures of ink are changed more by tiger than by pen itself: give tiger a lower weight."
    assert language.retell(unknown) == unknown


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.safetensors", b"", "a.safetensors ist leer; bitte neu herunterladen oder kopieren."),
        ("b.safetensors", b"<html>", "b.safetensors ist eine Webseite, kein LoRA; bitte neu herunterladen"),
        ("c.pth", b"no", "c.pth ist abgeschnitten oder nicht von PyTorch 1.6"),
        ("d.safetensors", save({"model.diffusion_model.x": torch.zeros(1)}), "d.safetensors ist ein Checkpoint, kein"),
        (
            "e.safetensors",
            save({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.full((4, 1), float("nan"))}),
            "e.safetensors ist beschädigt: lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight enthält NaN",
        ),
        ("f.safetensors", save({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.ones(4, 1)}),
         "f.safetensors ist unvollständig: lora_unet_down_blocks_0_attentions_0_proj_in hat kein lora_down.weight"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_retold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    """As the reader says it."""
    monkeypatch.setattr(language, "here", German)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        files.load(tmp_path / name)
    assert language.retell(str(error.value)).startswith(told)
