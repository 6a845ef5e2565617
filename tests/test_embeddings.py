"""Words that a LoRA file brings along, in every family and spelling."""

from __future__ import annotations

import pytest
import torch

from loraclr import embeddings
from loraclr.lora import parse

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CROSS = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


def lora_with(tensors, stem=LINEAR, width=6):
    factors = {f"{stem}.lora_up.weight": torch.ones(8, 2), f"{stem}.lora_down.weight": torch.ones(2, width)}
    return parse(factors | tensors, {}, "x")


@pytest.mark.parametrize(
    ("stem", "width", "keys"),
    [
        (LINEAR, 6, {"bundle_emb.zyk.string_to_param.*": (768, "clip_l")}),
        (LINEAR, 6, {"bundle_emb.zyk.emb_params": (768, "clip_l")}),
        (LINEAR, 6, {"bundle_emb.zyk.clip_l": (768, "clip_l")}),
        (CROSS, 1024, {"bundle_emb.zyk.string_to_param.*": (1024, "clip_h")}),
        (SDXL, 2048, {"bundle_emb.zyk.clip_l": (768, "clip_l"), "bundle_emb.zyk.clip_g": (1280, "clip_g")}),
        (SDXL, 2048, {"bundle_emb.<zyk>.string_to_param.clip_g": (1280, "clip_g")}),
    ],
)
def test_bundled_words_by_encoder(stem, width, keys):
    tensors = {key: torch.randn(3, size).half() for key, (size, _) in keys.items()}
    lora = lora_with(tensors, stem, width)
    (name,) = lora.embeddings
    assert name.strip("<>") == "zyk" and lora.unused == () and lora.triggers() == name
    assert lora.embeddings[name].keys() == {encoder for _, encoder in keys.values()}
    for key, (_, encoder) in keys.items():
        assert torch.equal(lora.embeddings[name][encoder], tensors[key].float())


def test_one_vector_is_one_token_and_two_words_stay_apart():
    lora = lora_with({"bundle_emb.a.emb_params": torch.ones(768), "bundle_emb.b.emb_params": torch.zeros(2, 768)})
    assert lora.embeddings["a"]["clip_l"].shape == (1, 768) and lora.embeddings["b"]["clip_l"].shape == (2, 768)
    assert lora.triggers() == "a b"


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("bundle_emb.zyk.clip_l_out", torch.ones(1, 768)),
        ("bundle_emb.zyk.clip_g", torch.ones(1, 1280)),
        ("bundle_emb.zyk.clip_g", torch.ones(1, 768)),
        ("bundle_emb.zyk.emb_params", torch.ones(1, 1, 768)),
        ("bundle_emb.zyk.emb_params", torch.full((1, 768), torch.nan)),
        ("bundle_emb.zyk.step", torch.tensor(100)),
        ("bundle_emb..emb_params", torch.ones(1, 768)),
    ],
)
def test_what_is_no_word_of_the_family_is_said_by_name(key, tensor):
    lora = lora_with({key: tensor})
    assert lora.embeddings == {} and lora.unused == (key,)


def test_onetrainers_output_vectors_do_not_hide_its_words():
    lora = lora_with({"bundle_emb.zyk.clip_l": torch.ones(1, 768), "bundle_emb.zyk.clip_l_out": torch.ones(1, 768)})
    assert lora.embeddings["zyk"].keys() == {"clip_l"} and lora.unused == ("bundle_emb.zyk.clip_l_out",)


def test_equal_names_of_different_words_get_numbers():
    one, two, three = ({"clip_l": torch.full((1, 768), float(k))} for k in range(3))
    sources = [{"zyk": one, "a.b": one}, {"zyk": two}, {"zyk": one}, {"zyk": three, "zyk_2": three}]
    renamed = embeddings.distinct(sources)
    assert renamed == [{"a.b": "a_b"}, {"zyk": "zyk_2"}, {}, {"zyk": "zyk_3"} | {"zyk_2": "zyk_2_2"}]


def test_words_in_a_text_are_renamed_as_whole_words():
    assert embeddings.in_text("a zyk, zyks and <zyk>", {"zyk": "zyk_2"}) == "a zyk_2, zyks and <zyk_2>"
    assert embeddings.in_text("a zyk_2", {"zyk": "zyk_2"}) == "a zyk_2"
    assert embeddings.in_text("x and x_2", {"x": "x_2", "x_2": "x_2_2"}) == "x_2 and x_2_2"
    assert embeddings.in_text("<p> <p> 1", {"<p>": "<p>_2", "<p> 1": "<p> 1_2"}) == "<p>_2 <p> 1_2"
    assert embeddings.in_text("a <p1> <p2>", {"<p1>": "<p1>_2"}) == "a <p1>_2 <p2>"
