"""Words that LoRAs bring along: into the merge, into its file, and into a host's prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import WIDTH, ToyHost, toy_lora

from loraclr import files
from loraclr.concept import Concept
from loraclr.formats import Norm
from loraclr.lora import Layer, LoRA
from loraclr.merging import merge
from loraclr.plan import Settings
from loraclr.recipe import read as recipe_of
from loraclr.result import Merge, write

WORD = "<potter1>"
CLOSED = Settings(speed="closed", steps=4, guidance=5.0, ridge=1e-8)


def embedded(host: ToyHost) -> LoRA:
    """A LoRA with a word of 16 embeddings; the toy has one cross-attention layer, the middle one."""
    vectors = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(5))
    return replace(toy_lora(host, "one", 1), layer_embeddings={WORD: vectors})


def test_a_merge_writes_the_words_and_renames_the_later_of_two(tmp_path) -> None:
    host = ToyHost()
    lora = embedded(host)
    clash = replace(toy_lora(host, "two", 2), embeddings={WORD: {"clip_l": torch.ones(1, WIDTH)}})
    result = merge(host, [Concept(lora, WORD), Concept(clash, f"big {WORD}")], CLOSED)
    assert result.triggers == f"{WORD}, big {WORD}_2"
    assert result.notes[:2] == [  # the others are on how well it went
        f"Of one's embeddings of {WORD} for single layers the mean is kept, and the rest made up for as far as one "
        "text for all layers allows.",
        f"The word {WORD} of two is called {WORD}_2 in the merged file.",
    ]
    assert result.words.keys() == {WORD, f"{WORD}_2"}
    torch.testing.assert_close(result.words[WORD]["clip_l"][0], lora.layer_embeddings[WORD].mean(0))
    assert result.missed["one"][0] < 0.9
    assert host.own_words == {}
    many = replace(result, words={f"w{k}": {"clip_l": torch.ones(1, 768)} for k in range(13)}, notes=[])
    write(many, tmp_path / "many.safetensors")
    assert files.load(tmp_path / "many.safetensors").embeddings == {}
    assert len(list((tmp_path / "many embeddings").iterdir())) == 13
    assert "Move the files in many embeddings" in many.notes[0]
    few = replace(many, words={"w0": many.words["w0"]}, notes=[])
    write(few, tmp_path / "few.safetensors")
    assert files.load(tmp_path / "few.safetensors").embeddings.keys() == {"w0"}


def test_words_that_are_no_files_names_get_others_in_files_of_their_own(tmp_path) -> None:
    """A merge of hours must not end with a name that Windows refuses; its recipe still means the LoRA's word."""
    one, two = ({"clip_l": torch.full((1, 768), float(k))} for k in range(2))
    lora = replace(toy_lora(ToyHost(), "one", 1), embeddings={WORD: one, "_potter1_": two, "a/b": two, "plain": one})
    concept = Concept(lora, f"{WORD} a/b", prompts=(f"a {WORD}",))
    result = Merge("sd1", [concept], Settings(), layers=lora.layers, words=lora.words)
    path = write(result, tmp_path / "it.safetensors", bundle=False)
    names = ["_potter1_", "_potter1__2", "a_b", "plain"]
    assert sorted(file.stem for file in (tmp_path / "it embeddings").iterdir()) == names
    assert result.words == dict(zip(names, (one, two, two, one), strict=True))
    assert result.triggers == files.load(path).triggers() == "_potter1_ a_b"
    assert result.concepts[0].prompts == ("a _potter1_",)
    assert recipe_of(path).entries[0]["trigger"] == f"{WORD} a/b"
    assert len(result.notes) == 4
    assert result.notes[0] == f"The word {WORD} of one is called _potter1_ in the merged file."
    bundled = replace(result, concepts=[concept], words=lora.words, notes=[])
    write(bundled, tmp_path / "whole.safetensors")
    assert files.load(tmp_path / "whole.safetensors").embeddings.keys() == lora.words.keys() and not bundled.notes


def test_nothing_is_written_if_the_lora_cannot_be(tmp_path) -> None:
    """A second try must not find the words of the first."""
    lora = toy_lora(ToyHost(), "one", 1)
    layers = {name: replace(layer, up=layer.up + 1e5) for name, layer in lora.layers.items()}
    words = {WORD: {"clip_l": torch.ones(1, 768)}}
    result = Merge("sd1", [Concept(lora, WORD)], Settings(), layers=layers, words=words)
    with pytest.raises(ValueError, match="too large for float16"):
        write(result, tmp_path / "it.safetensors", bundle=False)
    assert list(tmp_path.iterdir()) == [] and result.triggers == WORD
    write(result, tmp_path / "it.safetensors", torch.float32, bundle=False)
    assert len(list((tmp_path / "it embeddings").iterdir())) == 1


def test_what_forge_does_not_know_is_at_most_twelve_keys_or_said(tmp_path) -> None:
    """It knows neither embeddings nor norm layers of text encoders, which have two keys each."""
    lora = toy_lora(ToyHost(), "one", 1)
    norms = [f"lora_te_text_model_encoder_layers_{number}_layer_norm1" for number in range(7)]
    words = {"w": {"clip_l": torch.ones(1, 768)}}
    for count, bundled, said in ((5, True, []), (6, False, ["Move the files"]), (7, True, ["Forge does not"])):
        layers = lora.layers | {name: Norm(torch.ones(768)) for name in norms[:count]}
        result = Merge("sd1", [Concept(lora, "sks")], Settings(), layers=layers, words=words)
        path = write(result, tmp_path / f"{count}.safetensors")
        assert bool(files.load(path).embeddings) == bundled
        found = sorted(" ".join(note.split()[:3]) for note in result.notes)
        assert found == sorted(["diffusers does not", *said])


def test_a_word_of_sdxl_counts_for_each_of_its_encoders(tmp_path) -> None:
    layers = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": Layer(torch.ones(4, 1), torch.ones(1, 2048), 1)
    }
    lora = LoRA("one", None, "sdxl", layers)
    for count in (6, 7):
        word = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
        words = {f"w{number}": word for number in range(count)}
        result = Merge("sdxl", [Concept(lora, "sks")], Settings(), layers=layers, words=words)
        path = write(result, tmp_path / f"{count}.safetensors")
        assert len(files.load(path).embeddings) == (6 if count == 6 else 0)
        beside = tmp_path / f"{count} embeddings"
        assert (len(list(beside.iterdir())) if beside.exists() else 0) == (0 if count == 6 else 7)


@pytest.fixture(scope="module")
def host():
    """The miniature, run by diffusers."""
    pytest.importorskip("diffusers")
    from miniature import drawing

    return drawing.open_miniature("cpu")


def test_words_leave_tokenizer_and_encoder_as_they_were(host) -> None:
    tokenizer, encoder = host.pipeline.tokenizer, host.pipeline.text_encoder
    before = host.encode(["a tiger, sitting"]).tokens
    ids = tokenizer("tiger", add_special_tokens=False).input_ids
    vectors = encoder.get_input_embeddings().weight[ids].detach()
    with host.words({"<zyk>": {"clip_l": vectors}}):
        torch.testing.assert_close(host.encode(["a <zyk>, sitting"]).tokens, before)
        torch.testing.assert_close(host.encode(["a tiger, sitting"]).tokens, before)
    assert host.pipeline.tokenizer is tokenizer
    assert torch.equal(host.encode(["a tiger, sitting"]).tokens, before)
    assert not encoder._forward_pre_hooks and not encoder.get_input_embeddings()._forward_hooks
