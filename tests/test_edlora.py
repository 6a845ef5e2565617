"""PyTorch's own files: ED-LoRAs read exactly, and no file can run code."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from loraclr import files
from loraclr.lora import LoRAFormatError

TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
PROJ = "mid_block.attentions.0.proj_in"


def edlora(vectors: int = 16) -> dict:
    """What Mix-of-Show's trainer saves: named parameters only, so there is no alpha."""
    torch.manual_seed(0)
    shapes = {"text_encoder": {TEXT: (8, 768)}, "unet": {CROSS: (320, 768), PROJ: (16, 24, 1, 1)}}
    params: dict = {"new_concept_embedding": {"<potter1>": torch.randn(vectors, 768)}}
    for part, layers in shapes.items():
        params[part] = {}
        for path, (o, i, *ones) in layers.items():
            params[part][f"{path}.lora_down.weight"] = nn.Parameter(torch.randn(4, i, *ones))
            params[part][f"{path}.lora_up.weight"] = nn.Parameter(torch.randn(o, 4, *ones))
    return {"params": params}


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_an_edlora_is_up_times_down_with_a_vector_for_each_cross_attention_layer(tmp_path):
    content = edlora()
    lora = files.load(save(content, tmp_path / "edlora_model-latest.pth"))
    assert (lora.family, lora.unused, lora.embeddings) == ("sd1", (), {})
    assert lora.triggers() == "<potter1>"
    torch.testing.assert_close(
        lora.layer_embeddings["<potter1>"], content["params"]["new_concept_embedding"]["<potter1>"]
    )
    names = {"lora_te_" + TEXT.replace(".", "_"): ("text_encoder", TEXT)}
    names |= {"lora_unet_" + path.replace(".", "_"): ("unet", path) for path in (CROSS, PROJ)}
    assert lora.layers.keys() == names.keys()
    for name, (part, path) in names.items():
        up, down = (content["params"][part][f"{path}.lora_{side}.weight"].detach() for side in ("up", "down"))
        torch.testing.assert_close(lora.layers[name].delta(), up.flatten(1) @ down.flatten(1))


def test_a_lora_model_has_one_vector_for_each_word(tmp_path):
    lora = files.load(save(edlora(1), tmp_path / "lora_model-latest.pth"))
    assert lora.layer_embeddings == {} and lora.embeddings["<potter1>"]["clip_l"].shape == (1, 768)


def test_what_is_no_word_is_said_by_name(tmp_path):
    content = edlora()
    content["params"]["new_concept_embedding"] |= {"<wide>": torch.ones(16, 99), "<none>": 3}
    lora = files.load(save(content, tmp_path / "x.pth"))
    assert lora.unused == ("new_concept_embedding.<none>", "new_concept_embedding.<wide>")


@pytest.mark.parametrize("nested", [False, True])
def test_a_kohya_lora_in_a_pt_file(tmp_path, nested):
    stem = "lora_unet_" + CROSS.replace(".", "_")
    tensors = {f"{stem}.lora_up.weight": torch.ones(8, 2), f"{stem}.lora_down.weight": torch.ones(2, 6)}
    lora = files.load(save({"state_dict": tensors} if nested else tensors, tmp_path / ("X.PT" if nested else "x.pt")))
    torch.testing.assert_close(lora.layers[stem].delta(), torch.full((8, 6), 2.0))


class Dangerous:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def zipped(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, member in members.items():
            archive.writestr(f"archive/{name}.pkl", member)
    return content.getvalue()


def test_a_host_that_replaces_torch_load_changes_nothing(tmp_path, monkeypatch):
    path = save(edlora(), tmp_path / "x.pth")
    monkeypatch.setattr(torch, "load", lambda *_, **__: None)
    assert files.load(path).triggers() == "<potter1>"


def saved(content: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


BAD = {
    "empty": (b"", "is cut off or is not a file"),
    "plain pickle": (pickle.dumps({"a": 1}), "is cut off or is not a file"),
    "old layout": (saved({"a": torch.ones(1)}, _use_new_zipfile_serialization=False), "is cut off or is not a file"),
    "cut": (saved(edlora())[:-100], "is cut off or is not a file"),
    "another zip": (zipped(readme=b"hello"), "holds no tensors"),
    "damaged": (zipped(data=b"hello"), "(is damaged|holds more than tensors)"),
    "a tensor": (saved(torch.ones(2)), "holds a Tensor, not a LoRA"),
    "no lora": (saved({"a": torch.ones(2)}), "holds no LoRA layers"),
    "nothing": (saved({}), "is empty"),
    "odd names": (saved({1: torch.ones(2), "state_dict": 3}), "holds no LoRA layers"),
    "odd parts": (saved({"params": {"unet": {}, "text_encoder": torch.ones(2)}}), "is empty"),
    "words only": (saved({"params": {"unet": {}}}), "is empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_every_bad_file_gets_one_sentence(tmp_path, kind):
    content, message = BAD[kind]
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(LoRAFormatError, match=message) as error:
        files.load(tmp_path / "bad.pth")
    assert re.fullmatch(r"bad\.pth [^\n]+; [^\n]+\.", str(error.value))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_with_wrong_bytes_loads_or_is_refused(tmp_path, data):
    small = {"params": {"unet": {f"{CROSS}.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")}}}
    content = bytearray(saved(small))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "bad.pth").write_bytes(content)
    try:
        assert files.load(tmp_path / "bad.pth").layers
    except LoRAFormatError as error:
        assert str(error).startswith("bad.pth ") and "\n" not in str(error)


def test_no_file_runs_code(tmp_path):
    mark = tmp_path / "ran"
    content = saved(edlora() | {"extra": Dangerous(mark)})
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(LoRAFormatError, match="holds more than tensors, which could run code"):
        files.load(tmp_path / "bad.pth")
    assert not mark.exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert mark.exists()  # the file is as dangerous as it should be


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_not_even_opened(tmp_path, monkeypatch):
    (tmp_path / "bad.pt").write_bytes(scripted())
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(LoRAFormatError, match="holds no tensors"):
        files.load(tmp_path / "bad.pt")


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return content.getvalue()


@pytest.mark.parametrize("front", [saved(edlora(), _use_new_zipfile_serialization=False), tarred()])
def test_an_old_layout_with_a_zip_file_behind_it_is_not_even_opened(tmp_path, monkeypatch, front):
    """Python finds the zip file at the end, PyTorch goes by the first bytes."""
    (tmp_path / "bad.pt").write_bytes(front + zipped(data=b"."))
    assert zipfile.is_zipfile(tmp_path / "bad.pt")
    monkeypatch.setattr(torch.serialization, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(LoRAFormatError, match=r"^bad\.pt is cut off or is not a file that PyTorch 1.6 or newer"):
        files.load(tmp_path / "bad.pt")


def test_torchscript_that_only_pytorch_sees_is_not_even_opened(tmp_path, monkeypatch):
    """Of two lists of names Python takes the one right before the end, PyTorch the one that the end tells."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, member in (("version", "3\n"), ("data.pkl", "."), ("constants.pkl", ".")):
            archive.writestr(f"archive/{name}", member)
    whole = content.getvalue()
    listed, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    harmless = whole[listed:end].replace(b"constants.pkl", b"something.pkl")
    path = tmp_path / "bad.pt"
    path.write_bytes(whole[:end] + harmless + whole[end:])
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["archive/version", "archive/data.pkl", "archive/something.pkl"]
    assert "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    monkeypatch.setattr(torch.serialization, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(LoRAFormatError, match=r"^bad\.pt is a zip file, but holds no tensors"):
        files.load(path)
