"""Layer names, checked against diffusers' own conversion of original checkpoints."""

import re

import pytest
import torch

from loraclr import keys

diffusers = pytest.importorskip("diffusers")


def tiny_unet(family):
    common = {"norm_num_groups": 4, "layers_per_block": 2, "attention_head_dim": 4, "cross_attention_dim": 8}
    if family == "sd1":
        return diffusers.UNet2DConditionModel(block_out_channels=(8, 16, 16, 16), **common)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
        **common,
    )


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def unet(request):
    return request.param, tiny_unet(request.param)


def test_every_unet_weight_is_found_by_diffusers_under_our_compvis_name(unet):
    """diffusers converts a checkpoint with our names back to exactly its own state dict."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    family, model = unet
    original = {}
    for key, tensor in model.state_dict().items():
        path, parameter = key.rsplit(".", 1)
        original[f"model.diffusion_model.{keys.compvis_unet_name(path, family)}.{parameter}"] = tensor
    converted = convert_ldm_unet_checkpoint(original, dict(model.config))
    assert converted.keys() == model.state_dict().keys()
    assert all(converted[key].data_ptr() == tensor.data_ptr() for key, tensor in model.state_dict().items())


def test_names_of_layers_go_there_and_back(unet):
    family, model = unet
    paths = {key.rsplit(".", 1)[0] for key in model.state_dict()}
    compvis = {keys.compvis_unet_name(path, family) for path in paths}
    assert len(compvis) == len(paths)
    assert {keys.diffusers_unet_name(name, family) for name in compvis} == paths


def test_diffusers_reads_our_sdxl_names_as_its_own():
    """diffusers' reader of kohya files arrives at the very layers that we started from, by another route."""
    from diffusers.loaders import lora_conversion_utils as reader

    model = tiny_unet("sdxl")
    paths = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "attentions" in name
    ]
    file = {}
    for path in paths:
        stem = keys.kohya_name("unet", path, "sdxl")
        assert stem.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_"))
        file |= {f"{stem}.lora_down.weight": torch.zeros(1), f"{stem}.lora_up.weight": torch.zeros(1)}
    mapped = reader._maybe_map_sgm_blocks_to_diffusers(dict(file), model.config)
    read, _ = reader._convert_non_diffusers_lora_to_diffusers(mapped)
    # diffusers' older spelling: attn1.processor.to_out_lora.up.weight stands for attn1.to_out.0.
    modules = {re.sub(r"(_lora|\.lora)\.(up|down)\.weight", "", key).replace(".processor", "") for key in read}
    assert modules == {f"unet.{path.replace('to_out.0', 'to_out')}" for path in paths}
    assert {keys.canonical(key, "sdxl")[0] for key in read} == {key.split(".")[0] for key in file}


@pytest.mark.parametrize(
    ("family", "diffusers_name", "compvis_name"),
    [
        ("sd1", "conv_in", "input_blocks.0.0"),
        ("sd1", "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("sd1", "down_blocks.3.resnets.1.conv2", "input_blocks.11.0.out_layers.3"),
        ("sd1", "mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("sd1", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("sd1", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("sd1", "up_blocks.2.upsamplers.0.conv", "output_blocks.8.2.conv"),
        ("sdxl", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("sdxl", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("sdxl", "add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_names_known_from_the_original_models(family, diffusers_name, compvis_name):
    assert keys.compvis_unet_name(diffusers_name, family) == compvis_name
    assert keys.diffusers_unet_name(compvis_name, family) == diffusers_name


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.4.resnets.0.conv1",
        "down_blocks.0.resnets.2.conv1",
        "down_blocks.3.downsamplers.0.conv",
        "up_blocks.3.upsamplers.0.conv",
        "down_blocks.0.resnets.0.nonlinearity",
        "text_model.encoder",
    ],
)
def test_no_compvis_name_for_what_the_layout_lacks(name):
    with pytest.raises(ValueError, match="is not a layer of the diffusers sd1 UNet"):
        keys.compvis_unet_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "input_blocks.12.0.op",
        "input_blocks.3.0.in_layers.2",
        "output_blocks.11.1.conv",
        "output_blocks.12.0.in_layers.2",
    ],
)
def test_no_diffusers_name_for_what_the_layout_lacks(name):
    with pytest.raises(ValueError, match="is not a layer of the original sd1 UNet"):
        keys.diffusers_unet_name(name)


def test_text_encoder_names_do_not_depend_on_the_transformers_version():
    new = keys.kohya_name("text_encoder", "encoder.layers.0.self_attn.q_proj")
    assert new == keys.kohya_name("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")
    assert new == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert (
        keys.kohya_name("text_encoder", "encoder.layers.0.mlp.fc1", "sdxl")
        == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    )
    assert keys.kohya_name("text_encoder_2", "text_projection", "sdxl") == "lora_te2_text_projection"


DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (f"{FLAT}_to_q.lora_up.weight", (f"{FLAT}_to_q", "lora_up.weight")),
        (f"{FLAT}_to_q.alpha", (f"{FLAT}_to_q", "alpha")),
        (f"{FLAT}_to_q.lora_A.weight", (f"{FLAT}_to_q", "lora_down.weight")),
        (f"unet.{DOWN}.to_q.lora_A.weight", (f"{FLAT}_to_q", "lora_down.weight")),
        (f"unet.{DOWN}.to_q.lora_B.default.weight", (f"{FLAT}_to_q", "lora_up.weight")),
        (f"unet.{DOWN}.to_q.alpha", (f"{FLAT}_to_q", "alpha")),
        (f"unet.base_model.model.{DOWN}.to_out.0.lora_B.weight", (f"{FLAT}_to_out_0", "lora_up.weight")),
        (f"base_model.model.{DOWN}.to_k.lora_B.weight", (f"{FLAT}_to_k", "lora_up.weight")),
        (f"base_model.model.unet.{DOWN}.to_k.lora_B.weight", (f"{FLAT}_to_k", "lora_up.weight")),
        (f"unet.{DOWN}.processor.to_out_lora.up.weight", (f"{FLAT}_to_out_0", "lora_up.weight")),
        (f"{DOWN}.processor.to_q_lora.down.weight", (f"{FLAT}_to_q", "lora_down.weight")),
        (f"unet.{DOWN}.to_v.lora.up.weight", (f"{FLAT}_to_v", "lora_up.weight")),
        (f"unet.{DOWN}.to_v.lora_linear_layer.down.weight", (f"{FLAT}_to_v", "lora_down.weight")),
        (
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.lora_up.weight",
            (f"{FLAT}_to_v", "lora_up.weight"),
        ),
        ("diffusion_model_input_blocks_1_1_transformer_blocks_0_attn1_to_v.alpha", (f"{FLAT}_to_v", "alpha")),
        (
            "lora_unet_input_blocks_1_0_in_layers_2.lora_mid.weight",
            ("lora_unet_down_blocks_0_resnets_0_conv1", "lora_mid.weight"),
        ),
        (f"lycoris_{FLAT.removeprefix('lora_unet_')}_to_q.lora_up.weight", (f"{FLAT}_to_q", "lora_up.weight")),
        (f"{TEXT}_q_proj.lora_down.weight", (f"{TEXT}_q_proj", "lora_down.weight")),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            (f"{TEXT}_q_proj", "lora_down.weight"),
        ),
        ("text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight", (f"{TEXT}_q_proj", "lora_down.weight")),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
            (f"{TEXT}_out_proj", "lora_up.weight"),
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_k_lora.up.weight",
            (f"{TEXT}_k_proj", "lora_up.weight"),
        ),
        (
            "base_model.model.text_model.encoder.layers.0.self_attn.v_proj.lora_B.weight",
            (f"{TEXT}_v_proj", "lora_up.weight"),
        ),
        (f"{FLAT}_to_q.hada_w1_a", None),
        ("bundle_emb.zyk.string_to_param.*", None),
        ("something.else.lora_up.weight", None),
        ("alpha", None),
    ],
)
def test_every_spelling_has_one_canonical_name(key, expected):
    assert keys.canonical(key) == expected


@pytest.mark.parametrize(
    ("key", "stem"),
    [
        ("lora_unet_input_blocks_4_1_proj_in.alpha", "lora_unet_input_blocks_4_1_proj_in"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in.alpha", "lora_unet_input_blocks_4_1_proj_in"),
        ("unet.up_blocks.0.upsamplers.0.conv.lora_A.weight", "lora_unet_output_blocks_2_2_conv"),
        (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        ),
        (
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        ),
    ],
)
def test_sdxl_layers_are_called_as_kohya_does(key, stem):
    assert keys.canonical(key, "sdxl")[0] == stem


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
    assert keys.detect_family(shapes(stem, width=width)) == family


@pytest.mark.parametrize(
    ("key", "width"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 1024),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight", 1024),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight", 1024),
    ],
)
def test_the_width_is_seen_in_every_spelling(key, width):
    assert keys.detect_family({key: (4, width)}) == "sd2"


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
        keys.detect_family({key: (4, 64)})
