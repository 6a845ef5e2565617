"""The family of a LoRA file, from its keys and shapes alone."""

import pytest

from loraclr.families import detect_family


def shapes(*stems, width):
    return {f"{stem}.lora_down.weight": (4, width) for stem in stems}


@pytest.mark.parametrize(
    ("stem", "width", "family"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, "sd1"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 1024, "sd2"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 64, "sd1"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v", 64, "sd1"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 2048, "sdxl"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k", 640, "sdxl"),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k", 320, "sd1"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_7_attn1_to_q", 1280, "sdxl"),
        ("unet.mid_block.attentions.0.transformer_blocks.7.attn1.to_q", 1280, "sdxl"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, "sd1"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 32, "sd1"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 1024, "sd2"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768, "sdxl"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", 1280, "sdxl"),
    ],
)
def test_family_from_one_layer(stem, width, family):
    assert detect_family(shapes(stem, width=width)) == family


@pytest.mark.parametrize(
    ("key", "width"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 1024),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight", 1024),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight", 1024),
    ],
)
def test_the_width_is_seen_in_every_spelling(key, width):
    assert detect_family({key: (4, width)}) == "sd2"


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "SD3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "SD3"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "transformer"),
    ],
)
def test_families_without_unet_are_refused_by_name(key, model):
    with pytest.raises(ValueError, match=model):
        detect_family({key: (4, 64)})
