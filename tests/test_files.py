"""Files: round trips, what other programs read from ours, and one clear sentence for every bad file."""

import errno
import hashlib
import json
import os
import re
import stat
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraclr import files
from loraclr.formats import Norm
from loraclr.lora import Layer, LoRA, LoRAFormatError

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers():
    return {
        LINEAR: Layer(random(8, 4), random(4, 6, seed=1), 2.0),
        CONV: Layer(random(8, 3, seed=2), random(3, 4 * 9, seed=3), 3.0, conv=True, kernel=(3, 3)),
        TEXT: Layer(random(6, 2, seed=4), random(2, 6, seed=5), 1.0),
    }


def metadata(family="sd1"):
    return files.lora_metadata(family, layers(), sources(), ["zyk cat", "sks"], {"ridge": 1e-3})


def sources():
    tags = {"ss_tag_frequency": json.dumps({"10_cat": {"fur ": 3, "zyk": 5}})}
    more = {"ss_tag_frequency": json.dumps({"10_cat": {"fur": 2}, "1_dog": {"tail": 1}, "odd": 3})}
    return [LoRA(name, None, "sd1", {}, told) for name, told in (("one", tags), ("two", more), ("three", {}))]


@pytest.fixture
def saved(tmp_path):
    return files.save(tmp_path / "merged.safetensors", layers(), metadata())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_round_trip(tmp_path, dtype, tolerance):
    path = files.save(tmp_path / "merged.safetensors", layers(), metadata(), dtype)
    lora = files.load(path)
    assert (lora.name, lora.path, lora.family, lora.unused) == ("merged", path, "sd1", ())
    assert lora.layers.keys() == layers().keys()
    for name, layer in layers().items():
        read = lora.layers[name]
        assert (read.alpha, read.conv, read.kernel) == (layer.alpha, layer.conv, layer.kernel)
        torch.testing.assert_close(read.up, layer.up, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(read.down, layer.down, rtol=tolerance, atol=tolerance)


def test_the_file_has_kohyas_keys_and_shapes_and_nothing_else(saved):
    tensors = safetensors.torch.load_file(saved)
    suffixes = ("lora_up.weight", "lora_down.weight", "alpha")
    assert tensors.keys() == {f"{name}.{suffix}" for name in layers() for suffix in suffixes}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors[f"{CONV}.lora_up.weight"].shape == (8, 3, 1, 1)
    assert tensors[f"{CONV}.lora_down.weight"].shape == (3, 4, 3, 3)
    assert tensors[f"{LINEAR}.alpha"].shape == ()


def test_biases_and_norm_layers_are_written_as_the_webui_reads_them(tmp_path):
    """It takes diff_b beside a diff only, and a norm layer with both of its tensors only."""
    biased = {
        LINEAR: replace(layers()[LINEAR], bias=random(8)),
        CONV: replace(layers()[CONV], bias=random(8)),
        "lora_unet_conv_norm_out": Norm(random(8)),
        TEXT: layers()[TEXT],
    }
    path = files.save(tmp_path / "x.safetensors", biased, files.lora_metadata("sd1", biased, [], [], {}), torch.float32)
    tensors = safetensors.torch.load_file(path)
    suffixes = {name: {key.split(".", 1)[1] for key in tensors if key.startswith(name + ".")} for name in biased}
    plain = {"lora_up.weight", "lora_down.weight", "alpha"}
    norm = {"w_norm", "b_norm"}
    assert list(suffixes.values()) == [{"diff", "diff_b"}, {"diff", "diff_b"}, norm, plain]
    assert tensors[f"{CONV}.diff"].shape == (8, 4, 3, 3)
    lora = files.load(path)
    for name, layer in biased.items():
        torch.testing.assert_close(lora.layers[name].delta(), layer.delta())
        if layer.bias is not None:
            torch.testing.assert_close(lora.layers[name].bias, layer.bias)
    assert (lora.metadata["ss_network_module"], lora.metadata["ss_network_dim"]) == ("lycoris.kohya", "2")


def test_diffusers_reads_the_same_change_from_the_file(saved):
    diffusers = pytest.importorskip("diffusers")
    tensors, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(saved)
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    up, down = (
        next(t for key, t in tensors.items() if key.startswith(path) and key.endswith(f"{side}.weight"))
        for side in ("up", "down")
    )
    alpha = next(value for key, value in alphas.items() if key.startswith(path))
    expected = files.load(saved).layers[LINEAR].delta()
    torch.testing.assert_close(alpha / down.shape[0] * up.float() @ down.float(), expected)


@pytest.mark.parametrize("layer", [replace(layers()[LINEAR], bias=random(8)), Norm(random(8))])
def test_diffusers_refuses_biases_and_norm_layers(tmp_path, layer):
    """As the docs say; the day it reads them the note about such a merge can go."""
    diffusers = pytest.importorskip("diffusers")
    path = files.save(tmp_path / "x.safetensors", layers() | {"lora_unet_conv_norm_out": layer}, metadata())
    with pytest.raises(ValueError, match="lora_unet_conv_norm_out"):
        diffusers.StableDiffusionPipeline.lora_state_dict(path)


def test_hashes_are_those_of_the_bytes_on_disk(saved):
    """The model hash is what A1111 would compute from the file; the legacy hash is kohya's, with ss_ metadata only."""
    content = saved.read_bytes()
    lora = files.load(saved)
    header = int.from_bytes(content[:8], "little")
    assert lora.metadata["sshs_model_hash"] == hashlib.sha256(content[8 + header :]).hexdigest()
    assert re.fullmatch("[0-9a-f]{8}", lora.metadata["sshs_legacy_hash"])


def test_legacy_hash_covers_64_kib_at_1_mib(tmp_path):
    big = {LINEAR: Layer(random(1024, 512), random(512, 1024, seed=1), 1.0)}
    lora = files.load(files.save(tmp_path / "big.safetensors", big, metadata()))
    tensors = safetensors.torch.load_file(lora.path)
    only_ss = {k: v for k, v in lora.metadata.items() if k.startswith("ss_")}
    window = safetensors.torch.save(tensors, only_ss)[0x100000:0x110000]
    assert len(window) == 0x10000
    assert lora.metadata["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


@pytest.mark.parametrize(
    ("family", "version", "v2", "architecture"),
    [
        ("sd1", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd2", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sdxl", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_metadata_tells_a1111_and_forge_the_family(family, version, v2, architecture):
    told = metadata(family)
    assert (told["ss_base_model_version"], told["ss_v2"], told["modelspec.architecture"]) == (version, v2, architecture)


def test_metadata_is_complete_and_all_text(saved):
    told = files.load(saved).metadata
    assert all(isinstance(value, str) for value in told.values())
    assert told["modelspec.merged_from"] == "one, two, three"
    assert told["modelspec.trigger_phrase"] == "zyk cat, sks"
    assert told["ss_output_name"] == told["modelspec.title"] == "merged"
    assert (told["ss_network_module"], told["ss_network_dim"]) == ("networks.lora", "Dynamic")
    tags = json.loads(told["ss_tag_frequency"])
    assert all(isinstance(count, int) for folder in tags.values() for count in folder.values())
    assert tags == {"merge": {"zyk cat": 1, "sks": 1}, "10_cat": {"fur": 5, "zyk": 5}, "1_dog": {"tail": 1}}
    assert json.loads(told["loraclr.recipe"]) == {"ridge": 1e-3}


def test_the_hash_of_a_file_is_the_one_in_its_metadata_and_of_others_that_of_the_bytes(saved):
    assert files.model_hash(saved) == files.load(saved).metadata["sshs_model_hash"]
    other = saved.with_suffix(".pth")
    other.write_bytes(b"abc")
    assert files.model_hash(other) == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize(
    ("family", "encoders"),
    [
        ("sd1", {"clip_l": (2, 768)}),
        ("sd2", {"clip_h": (1, 1024)}),
        ("sdxl", {"clip_l": (1, 768), "clip_g": (1, 1280)}),
    ],
)
def test_words_are_bundled_as_the_webui_reads_them_or_are_files_of_their_own(tmp_path, family, encoders):
    """The webui takes one tensor under any name, or two called clip_l and clip_g."""
    words = {"<zyk>": {encoder: random(*shape) for encoder, shape in encoders.items()}}
    width = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[family]
    name = {"sdxl": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"}.get(family, CROSS)
    cross = {name: Layer(random(4, 1), random(1, width), 1.0)}
    path = files.save(tmp_path / "x.safetensors", cross, {}, torch.float32, words=words)
    keys = {key for key in safetensors.torch.load_file(path) if key.startswith("bundle_emb.<zyk>.")}
    rests = {"emb_params"} if len(encoders) == 1 else set(encoders)
    assert keys == {f"bundle_emb.<zyk>.{rest}" for rest in rests}
    lora = files.load(path)
    assert lora.family == family and lora.unused == ()
    for encoder, vectors in words["<zyk>"].items():
        assert torch.equal(lora.embeddings["<zyk>"][encoder], vectors)
    (alone,) = files.save_embeddings(tmp_path / "words", words)
    assert alone.name == "<zyk>.safetensors" and safetensors.torch.load_file(alone).keys() == rests
    with pytest.raises(FileExistsError, match="exists already"):
        files.save_embeddings(tmp_path / "words", words)
    with pytest.raises(ValueError, match="The word a/b cannot be the name"):
        files.save_embeddings(tmp_path / "words", {"a/b": words["<zyk>"]})


def test_equal_ranks_and_alphas_are_named():
    same = {name: Layer(random(8, 4), random(4, 6), 2.0) for name in (LINEAR, TEXT)}
    told = files.lora_metadata("sd1", same, [], [], {})
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "2")


def test_save_refuses_to_overwrite_unless_told(saved):
    before = saved.read_bytes()
    with pytest.raises(FileExistsError, match="merged.safetensors exists already"):
        files.save(saved, {TEXT: layers()[TEXT]}, {})
    assert saved.read_bytes() == before
    files.save(saved, {TEXT: layers()[TEXT]}, {}, overwrite=True)
    assert list(files.load(saved).layers) == [TEXT]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_save_leaves_the_folder_as_it_was(saved, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        files.save(saved, {TEXT: layers()[TEXT]}, {}, overwrite=True)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_every_name_that_the_file_system_takes_can_be_written(tmp_path):
    """255 bytes with the ending."""
    path = files.save(tmp_path / f"{'老' * 81}.safetensors", layers(), {})
    assert files.load(path).name == "老" * 81


@pytest.mark.skipif(os.name == "nt", reason="POSIX file modes")
def test_the_file_is_readable_as_any_other_new_file(tmp_path):
    before = os.umask(0o022)
    try:
        path = files.save(tmp_path / "x.safetensors", layers(), {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, torch.float16, "values up to 1e[+]05, too large for float16; save as bfloat16 or float32"),
        (float("nan"), torch.float32, "NaN or infinite values"),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path, value, dtype, message):
    bad = {LINEAR: Layer(torch.full((8, 4), value), torch.ones(4, 6), 4.0)}
    with pytest.raises(ValueError, match=f"layer {LINEAR} holds {message}"):
        files.save(tmp_path / "x.safetensors", bad, {}, dtype)
    assert os.listdir(tmp_path) == []


def test_large_values_are_saved_in_bfloat16(tmp_path):
    large = {LINEAR: Layer(torch.full((8, 4), 1e5), torch.ones(4, 6), 4.0)}
    assert files.load(files.save(tmp_path / "x.safetensors", large, {}, torch.bfloat16)).layers[LINEAR].up.max() > 9e4


def test_save_names_wrong_metadata_and_wrong_endings(tmp_path):
    with pytest.raises(ValueError, match="metadata values must be str; these are not: a, b"):
        files.save(tmp_path / "x.safetensors", layers(), {"b": 1, "a": None, "c": "fine"})
    with pytest.raises(ValueError, match="x.pt must end in .safetensors"):
        files.save(tmp_path / "x.pt", layers(), {})


def test_sidecar_has_the_webuis_fields_and_is_read_back(saved):
    sidecar = files.write_sidecar(saved, "zyk cat", "sdxl", "two cats", 0.8)
    assert sidecar == saved.parent / "merged.json"
    fields = json.loads(sidecar.read_text(encoding="utf-8"))
    assert fields.pop("loraclr"), "by which it is known again"
    assert fields == {
        "description": "",
        "sd version": "SDXL",
        "activation text": "zyk cat",
        "preferred weight": 0.8,
        "negative text": "",
        "notes": "two cats",
    }
    assert files.load(saved).triggers() == "zyk cat"


def test_the_users_sidecar_is_left_alone(saved):
    sidecar = saved.with_suffix(".json")
    sidecar.write_text('{"activation text": "mine"}')
    assert files.write_sidecar(saved, "zyk", "sd1") is None
    assert sidecar.read_text() == '{"activation text": "mine"}'
    assert files.load(saved).triggers() == "mine"


def test_a_sidecar_that_holds_something_else_is_left_alone(saved):
    sidecar = saved.with_suffix(".json")
    for content in ("[]", '["loraclr"]', "3", "{"):
        sidecar.write_text(content)
        assert files.write_sidecar(saved, "zyk", "sd1") is None
        assert sidecar.read_text() == content


def test_a_sidecar_of_ours_is_renewed_until_the_user_edits_it(saved):
    """The webui's editor writes every field again; that alone is no edit."""
    sidecar = files.write_sidecar(saved, "zyk", "sd1", "zyk alone")
    fields = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**fields, "preferred weight": 1}, indent=4))
    assert files.write_sidecar(saved, "sks", "sd1", "sks alone") == sidecar
    assert json.loads(sidecar.read_text())["notes"] == "sks alone"
    for edit in ({"activation text": "mine"}, {"notes": "a note of mine"}, {"preferred weight": 0.7}, {"more": 1}):
        edited = json.dumps({**json.loads(sidecar.read_text()), **edit})
        sidecar.write_text(edited)
        assert files.write_sidecar(saved, "zyk", "sd1") is None
        assert sidecar.read_text() == edited
        sidecar.unlink()
        files.write_sidecar(saved, "sks", "sd1", "sks alone")


def test_metadata_is_added_to_a_file_whose_tensors_stay(saved):
    before, old = safetensors.torch.load_file(saved), files.model_hash(saved)
    told = files.load(saved).metadata
    files.annotate(saved, {"loraclr.recipe": '{"ä": 1}', "modelspec.title": "new"})
    assert files.load(saved).metadata == {**told, "loraclr.recipe": '{"ä": 1}', "modelspec.title": "new"}
    after = safetensors.torch.load_file(saved)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert files.model_hash(saved) == old
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("content", [b"{broken", b"\xff\xfe", b"[]", b'{"activation text": 3}'])
def test_a_broken_sidecar_does_not_keep_a_lora_from_loading(saved, content):
    saved.with_suffix(".json").write_bytes(content)
    assert files.load(saved).triggers() == "zyk cat, sks"


def header(text):
    return len(text).to_bytes(8, "little") + text


BAD_FILES = {
    "empty": (b"", "is empty"),
    "text": (b"This is my favourite LoRA, really.\n", "is not a safetensors file"),
    "page": (b"\n<!DOCTYPE html><html>Please log in</html>", "is a web page"),
    "zip": (b"PK\x03\x04" + bytes(100), "is a pickle file"),
    "pickle": (b"\x80\x02}q\x00." + bytes(100), "is a pickle file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is only a Git LFS pointer"),
    "header": (header(b'{"a": 1}'), "its safetensors header makes no sense"),
    "no json": (header(b'{"a": "b", c  }'), "its safetensors header makes no sense"),
    "no tensors": (header(b"{}" + b" " * 6), "is empty; choose a LoRA file"),
    "short": (
        header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}') + b"1234",
        "is cut off: 66 bytes of 70",
    ),
    "short header": ((1000).to_bytes(8, "little") + b'{"a":', "is cut off within its header"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_every_bad_file_gets_one_sentence(tmp_path, kind):
    content, message = BAD_FILES[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoRAFormatError, match=message) as error:
        files.load(path)
    assert re.fullmatch(r"bad\.safetensors [^\n]+; [^\n]+\.", str(error.value))


def test_missing_files_folders_and_other_models_are_named(tmp_path):
    with pytest.raises(LoRAFormatError, match=r"gone.safetensors does not exist \(.*\); choose"):
        files.load(tmp_path / "gone.safetensors")
    with pytest.raises(LoRAFormatError, match="is a folder"):
        files.load(tmp_path)
    safetensors.torch.save_file({"emb_params": torch.zeros(1, 4)}, tmp_path / "e.safetensors")
    with pytest.raises(LoRAFormatError, match="^e.safetensors is a textual inversion embedding, not a LoRA"):
        files.load(tmp_path / "e.safetensors")


def small_file(tmp_path):
    path = tmp_path / "small.safetensors"
    small = {LINEAR: Layer(random(3, 1), random(1, 2), 1.0)}
    return files.save(path, small, {}, overwrite=True)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = small_file(tmp_path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(LoRAFormatError, match="^small.safetensors is (cut off|empty|not a safetensors file)"):
            files.load(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_with_wrong_bytes_loads_or_is_refused(tmp_path, data):
    """Whatever the bytes, nothing but LoRAFormatError reaches the user."""
    content = bytearray(small_file(tmp_path).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.safetensors"
    path.write_bytes(content)
    try:
        assert files.load(path).layers
    except LoRAFormatError as error:
        assert str(error).startswith("changed.safetensors ") and "\n" not in str(error)
