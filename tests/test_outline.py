"""A LoRA's outline says of every kind of file what the whole file says, without reading its values."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_formats import ALGORITHMS, LAYERS, trained

from loraclr import files, outline
from loraclr.lora import LoRAFormatError
from loraclr.webui import card


def sizes(lora) -> dict:
    """What the outline is asked for."""
    return {name: (layer.format, layer.rank, layer.size) for name, layer in lora.layers.items()}


@pytest.mark.parametrize("kind", ["linear", "conv3"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_kind(tmp_path: Path, algorithm: str, kind: str) -> None:
    """Formats, ranks, shapes, metadata and triggers are those of the file read whole."""
    name, make = LAYERS[kind]
    module = trained(algorithm, make())
    tensors = {f"{name}.{key}": value.contiguous() for key, value in module.state_dict().items()}
    path = tmp_path / "one.safetensors"
    save_file(tensors, path, {"modelspec.trigger_phrase": "sks cat"})
    whole, outlined = files.load(path), outline.load(path)
    assert sizes(outlined) == sizes(whole)
    assert (outlined.family, outlined.unused, outlined.metadata) == (whole.family, whole.unused, whole.metadata)
    assert outlined.triggers() == "sks cat"


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x10\0\0\0\0\0\0\0{"])
def test_what_is_no_lora_gets_the_reader_s_sentence(tmp_path: Path, content: bytes) -> None:
    """The same refusal as when it is merged."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoRAFormatError) as whole:
        files.load(path)
    with pytest.raises(LoRAFormatError) as outlined:
        outline.load(path)
    assert str(outlined.value) == str(whole.value)


def test_words_that_a_file_brings_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names and shapes are known, so that the tab has a card for the file."""
    stem = LAYERS["linear"][0]
    path = tmp_path / "one.safetensors"
    tensors = {f"{stem}.lora_up.weight": torch.ones(16, 2), f"{stem}.lora_down.weight": torch.ones(2, 24)}
    save_file(tensors | {"bundle_emb.tiger.string_to_param.*": torch.ones(2, 768)}, path)
    outlined = outline.load(path)
    assert outlined.unused == () and outlined.triggers() == "tiger"
    assert outlined.words["tiger"]["clip_l"].shape == (2, 768) and outlined.words["tiger"]["clip_l"].is_meta
    monkeypatch.setattr(card, "here", lambda: SimpleNamespace(notes=lambda _: {}))
    told = card.of(path)
    assert (told.problem, told.trigger, told.noted) == ("", "tiger", "")


def test_values_are_not_read(tmp_path: Path) -> None:
    """Only single numbers are."""
    stem = LAYERS["linear"][0]
    path = tmp_path / "one.safetensors"
    save_file(
        {
            f"{stem}.lora_up.weight": torch.ones(16, 2),
            f"{stem}.lora_down.weight": torch.ones(2, 24),
            f"{stem}.alpha": torch.tensor(1.0),
        },
        path,
    )
    layer = outline.load(path).layers[stem]
    assert layer.up.is_meta and layer.down.is_meta
    assert layer.scale == 0.5
