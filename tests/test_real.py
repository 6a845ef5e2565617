"""The paper's comparison on a checkpoint of one's own: here the miniature, with a CLIP that has learnt nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from benchmarks import real
from benchmarks.similarity import Clip
from miniature import LORAS, checkpoint
from miniature.drawing import open_miniature

WORDS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
PLAN = real.Plan(pictures=1, steps=2)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**WORDS, "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {**WORDS, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(str(checkpoint.tokenizer_folder(folder / "words"))).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def concepts(tmp_path: Path) -> Path:
    for name in ("tiger", "panda"):
        shutil.copy(LORAS / f"{name}.safetensors", tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photos" / "one.png")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    entries = [
        {"lora": "tiger.safetensors", "trigger": "tgr", "class": "animal", "references": "photos"},
        {"lora": "panda.safetensors", "trigger": "pnd", "class": "bear"},
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    return tmp_path / "concepts.json"


def test_clip_is_the_whole_models_similarity(clip_folder: Path) -> None:
    clip, whole = Clip(str(clip_folder)), CLIPModel.from_pretrained(clip_folder).eval()
    pictures = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (40, 48, 3), np.uint8)) for k in range(20)]
    texts = ["a cat", "a dog on a red background"]
    inputs = {
        **clip.tokenizer(texts, padding=True, return_tensors="pt"),
        **clip.processor(pictures, return_tensors="pt"),
    }
    with torch.no_grad():
        expected = whole(**inputs).logits_per_image / whole.logit_scale.exp()
    torch.testing.assert_close(clip.pictures(pictures) @ clip.texts(texts).T, expected, atol=1e-5, rtol=1e-4)


def test_methods_are_compared_with_the_single_loras(concepts: Path, clip_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(real, "SUBJECT", ("a portrait of {}", "{} in a library"))
    looked: list[Image.Image] = []

    def faces(picture: Image.Image) -> np.ndarray:
        """Two faces, one of which is everybody's."""
        looked.append(picture)
        return np.array([[1.0, 0.0], [0.0, 1.0]])

    results = real.run(
        open_miniature("cpu"), real.read(concepts), ["sum", "orthogonal"], PLAN, Clip(str(clip_folder)), faces
    )
    rows = {row["method"]: row for row in real.rows(results)}
    assert list(rows) == ["single", "sum", "orthogonal"]
    assert rows["single"]["text_delta"] == rows["single"]["image_delta"] == 0
    assert rows["sum"]["text_delta"] != 0
    assert rows["sum"]["text"] == pytest.approx(rows["single"]["text"] + rows["sum"]["text_delta"])
    assert rows["sum"]["identity"] == rows["sum"]["two"] == rows["single"]["two"] == pytest.approx(1)
    references = [picture for picture in looked if picture.size == (64, 64)]
    assert len(references) == 1  # the photograph; the panda's references are drawn
    text = real.report.text(real.table(list(rows.values())))
    assert "identity alignment" in text and "single" in text
    titles = [gallery.title for gallery in real.galleries(results, real.read(concepts))]
    assert titles == ["tiger", "panda", "Two in one picture"]


def test_without_faces_identity_is_not_measured(concepts: Path, clip_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(real, "SUBJECT", ("a portrait of {}",))
    row = real.rows(real.run(open_miniature("cpu"), real.read(concepts), [], PLAN, Clip(str(clip_folder)), None))[0]
    assert row["identity"] is None and row["text"] is not None


def test_two_faces_are_asked_for(concepts: Path) -> None:
    people = [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    found = {0: np.eye(2), 1: np.array([[1.0, 0.0]]), 2: np.array([[1.0, 0.0], [0.6, 0.8]]), 3: np.empty((0, 2))}
    values = real._two(list(found), [*people, people[0]], [(0, 1), (1, 2)], found.__getitem__)
    assert values == pytest.approx([1, 0, 0.8, 0])


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([{"trigger": "tgr", "class": "animal"}], 'concept 1 has no "lora"'),
        ([{"lora": "tiger.safetensors", "trigger": "tgr"}], 'concept 1 has no "class"'),
        ([{"lora": "tiger.safetensors", "trigger": "t", "class": "a", "references": "none"}], "holds no pictures"),
        ([{"lora": "tiger.safetensors", "trigger": "t", "class": "a", "kind": "styl"}], 'of kind "styl"'),
        ([{"lora": "tiger.safetensors", "trigger": "t", "class": "a", "weight": "1"}], 'has weight "1"'),
    ],
)
def test_what_is_wrong_with_a_list_is_said(concepts: Path, entries: list, sentence: str) -> None:
    concepts.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=sentence):
        real.read(concepts)


def test_a_method_that_does_not_exist(concepts: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        real.main(["--checkpoint", "x.safetensors", "--concepts", str(concepts), "--methods", "sum,magic"])
    assert "there is no method magic" in capsys.readouterr().err
