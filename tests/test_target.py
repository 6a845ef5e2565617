"""The merged LoRA's name: one that can be written, and that replaces nothing that is merged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loraclr.webui import language, library, target
from loraclr.webui.alone.listing import Listing
from loraclr.webui.surroundings import Listed


class Around:
    """A program with a folder of LoRAs."""

    def __init__(self, folder: Path) -> None:
        self.folder = lambda: folder
        self.loras = Listing(folder)

    def listed(self) -> list[Listed]:
        return list(self.loras.entries.values())

    def found(self, name: str) -> Listed | None:
        return self.loras.entries.get(name)

    def option(self, name: str, usual: str) -> str:
        return usual


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Around:
    program = Around(tmp_path)
    for module in (library, target, language):
        monkeypatch.setattr(module, "here", lambda: program)
    return program


@pytest.mark.parametrize("sign", ["x", "ä", "老", "🐯"], ids=["1 byte", "2 bytes", "3 bytes", "4 bytes"])
def test_a_made_up_name_is_one_that_can_be_written(around: Around, sign: str) -> None:
    """In bytes, too; also the second one, its notes and its picture."""
    sources = [sign * 100, sign * 100]
    for number in ("", "-2"):
        path = target.path_for("", sources, False)
        assert path.stem.removesuffix(number) and "-".join(sources).startswith(path.stem.removesuffix(number))
        for ending in (".safetensors", ".json", ".preview.png"):
            path.with_suffix(ending).write_bytes(b"")
    assert target.path_for(path.stem, sources, True) == path, "it may be written again by hand"


def test_a_name_that_is_too_long(around: Around) -> None:
    """It is said how much of it would do."""
    for sign, most in (("x", 120), ("老", 76)):
        assert target.path_for(sign * most, [], False).stem == sign * most
        with pytest.raises(ValueError, match=rf"^The name is {most + 1} characters long; use at most {most}\.$"):
            target.path_for(sign * (most + 1), [], False)


def test_a_source_is_not_replaced_by_another_spelling_of_its_name(around: Around) -> None:
    """Two names for one file, as it is where case makes no difference."""
    folder = around.folder()
    (folder / "tiger.safetensors").write_bytes(b"")
    around.loras.refresh()
    if not (folder / "Tiger.safetensors").exists():
        os.link(folder / "tiger.safetensors", folder / "Tiger.safetensors")
    for name in ("tiger", "Tiger"):
        with pytest.raises(ValueError, match=f"^{name} is one of the LoRAs to merge; choose another name"):
            target.path_for(name, ["panda", "tiger"], True)
    assert target.path_for("Tiger", ["panda"], True) == folder / "Tiger.safetensors"
