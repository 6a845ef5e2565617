"""Layer names: complete tables of the real architectures, and diffusers' own conversions as a second opinion."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraclr import formats, keys, layout

diffusers = pytest.importorskip("diffusers")
import architectures as real  # noqa: E402 (needs diffusers and transformers)

FAMILIES = ("sd1", "sd2", "sdxl")


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


def canonical(key, family="sd1"):
    """(canonical layer name, suffix) of a key; None if it is not understood."""
    split = formats.split(key)
    name = keys.layer_name(split[0], family) if split else None
    return (name, split[1]) if name else None


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_those_of_the_real_layers(family):
    for path, shape in real.diffusers_unet(family).items():
        assert keys.kernel(keys.kohya_name("unet", path, family), family) == (shape[2:] or None), path
    assert keys.kernel("lora_te_text_model_encoder_layers_0_mlp_fc1", family) is None


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
    assert {canonical(key, "sdxl")[0] for key in read} == {key.split(".")[0] for key in file}


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
        (f"{FLAT}_to_q.hada_w1_a", (f"{FLAT}_to_q", "hada_w1_a")),
        ("bundle_emb.zyk.string_to_param.*", None),
        ("something.else.lora_up.weight", None),
        ("alpha", None),
    ],
)
def test_every_spelling_has_one_canonical_name(key, expected):
    assert canonical(key) == expected


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
    assert canonical(key, "sdxl")[0] == stem


def flat(path):
    return path.replace(".", "_")


# Every convention that files and models spell a UNet layer in: from its path, diffusers' or compvis'.
DIFFUSERS_UNET: dict[str, Callable[[str], str]] = {
    "diffusers": "unet.{}".format,
    "bare diffusers": str,
    "PEFT": "base_model.model.{}".format,
    "PEFT, whole pipeline": "base_model.model.unet.{}".format,
    "PEFT, saved by diffusers": "unet.base_model.model.{}".format,
    "kohya": lambda path: f"lora_unet_{flat(path)}",
    "OneTrainer, dotted": "lora_unet.{}".format,
    "LyCORIS' wrapper": lambda path: f"lycoris_{flat(path)}",
    "kohya's OFT": lambda path: f"oft_unet_{flat(path)}",
}
COMPVIS_UNET: dict[str, Callable[[str], str]] = {
    "compvis": "diffusion_model.{}".format,
    "checkpoint": "model.diffusion_model.{}".format,
    "bare compvis": str,
    "OneTrainer's OMI": "unet.{}".format,
    "kohya": lambda path: f"lora_unet_{flat(path)}",
    "webui": lambda path: f"diffusion_model_{flat(path)}",
    "LyCORIS' wrapper": lambda path: f"lycoris_{flat(path)}",
    "kohya's OFT": lambda path: f"oft_unet_{flat(path)}",
}
# Text encoders: what stands before text_model.… and before transformer.resblocks.…
TRANSFORMERS_TEXT = {
    ("sd1", "text_encoder"): (
        *("text_encoder.", "", "lora_te_", "lora_te.", "te.", "te1.", "clip_l.", "text_encoders.clip_l.transformer."),
        *("base_model.model.", "text_encoder.base_model.model.", "base_model.model.text_encoder.", "lycoris_"),
        *("transformer_", "cond_stage_model.transformer.", "lora_te1_"),
    ),
    ("sd2", "text_encoder"): ("text_encoder.", "", "lora_te_", "clip_h.transformer.", "base_model.model.", "lycoris_"),
    ("sdxl", "text_encoder"): (
        *("text_encoder.", "", "lora_te1_", "lora_te1.", "te1.", "clip_l.", "text_encoders.clip_l.transformer."),
        *("0_transformer_", "conditioner.embedders.0.transformer.", "base_model.model.", "lycoris_"),
    ),
    ("sdxl", "text_encoder_2"): (
        *("text_encoder_2.", "lora_te2_", "lora_te2.", "te2.", "clip_g.", "text_encoders.clip_g.transformer."),
        *("text_encoder_2.base_model.model.", "base_model.model.text_encoder_2."),
    ),
}
OPEN_CLIP_TEXT = {
    ("sd2", "text_encoder"): ("model.", "", "cond_stage_model.model.", "lora_te_", "clip_h."),
    ("sdxl", "text_encoder_2"): ("1.model.", "model.", "conditioner.embedders.1.model.", "lora_te2_", "clip_g."),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def unet_pair(family):
    return real.diffusers_unet(family), real.original_unet(**real.ORIGINAL_UNETS[family])


def named(shapes, spell, family):
    """Canonical name → shape; every path must be understood and no two may share a name."""
    names = {path: keys.layer_name(spell(path), family) for path in shapes}
    assert [path for path, name in names.items() if name is None] == []
    assert len(set(names.values())) == len(shapes)
    return {name: shapes[path] for path, name in names.items()}


def test_the_two_real_unets_have_the_same_layers_of_the_same_shapes(family, unet_pair):
    ours, original = unet_pair
    assert named(ours, "unet.{}".format, family) == named(original, "diffusion_model.{}".format, family)


def test_every_unet_layer_has_one_name_in_every_convention(family, unet_pair):
    ours, original = unet_pair
    spellings = [*((ours, spell) for spell in DIFFUSERS_UNET.values())]
    spellings += [*((original, spell) for spell in COMPVIS_UNET.values())]
    tables = [named(shapes, spell, family) for shapes, spell in spellings]
    assert all(table == tables[0] for table in tables)
    assert all(keys.layer_name(name, family) == name for name in tables[0])
    assert {keys.compvis_unet_path(name, family) for name in tables[0]} == original.keys()


def test_the_layout_lists_the_real_unet_and_nothing_else(family, unet_pair):
    ours, original = unet_pair
    listed = dict(layout.unet_paths(family))
    assert {path: listed[path] for path in ours} == {path: keys.compvis_unet_name(path, family) for path in ours}
    assert set(original) <= set(listed.values())
    assert all(path.endswith("conv_shortcut") for path in listed.keys() - ours.keys())


@pytest.mark.parametrize(("family", "modules"), [("sd1", 192), ("sd2", 192), ("sdxl", 722)])
def test_as_many_attention_layers_as_kohya_reports(family, modules):
    """What kohya's trainer prints: "create LoRA for U-Net: 192 modules", 722 for SDXL."""
    linear = {path: shape for path, shape in real.diffusers_unet(family).items() if len(shape) > 1}
    assert sum(".attentions." in path for path in linear) == modules


ENCODERS = [(family, *encoder) for family in FAMILIES for encoder in real.TEXT_ENCODERS[family]]


@pytest.mark.parametrize(("family", "part", "width", "heads", "layers", "open_clip"), ENCODERS)
def test_every_text_encoder_layer_has_one_name_in_every_convention(family, part, width, heads, layers, open_clip):
    shapes = real.transformers_text_encoder(width, heads, layers, projection=part == "text_encoder_2")
    # transformers 5 leaves out text_model, files never do.
    shapes = {path.removeprefix("text_model."): shape for path, shape in shapes.items()}

    def spelled(path, prefix, inner="text_model."):
        path = path if path == "text_projection" else f"{inner}{path}"
        return prefix + (flat(path) if prefix.endswith("_") else path)

    table = {keys.kohya_name(part, path, family): shape for path, shape in shapes.items()}
    assert len(table) == len(shapes)
    for prefix in TRANSFORMERS_TEXT[family, part]:
        for inner in ("text_model.", ""):
            if not prefix and part == "text_encoder_2":
                continue
            assert named(shapes, lambda path, p=prefix, i=inner: spelled(path, p, i), family) == table, (prefix, inner)
    assert all(keys.layer_name(name, family) == name for name in table)
    if open_clip:
        original = real.open_clip_text_encoder(width, layers)
        for prefix in OPEN_CLIP_TEXT[family, part]:
            for spell in (str, flat):
                assert taken_apart(original, lambda path, p=prefix, s=spell: s(f"{p}{path}"), family) >= table.items()


def taken_apart(shapes, spell, family):
    """(canonical name, shape) of every layer of OpenCLIP's encoder, its fused projections as three layers each."""
    found = {}
    for path, shape in shapes.items():
        names = keys.fused(spell(path), family) or (keys.layer_name(spell(path), family),)
        assert None not in names and not found.keys() & set(names), path
        found |= dict.fromkeys(names, (shape[0] // len(names), *shape[1:]))
    return found.items()


@pytest.mark.parametrize(("family", "te"), [("sd2", "lora_te"), ("sdxl", "lora_te2")])
def test_a_fused_projection_is_taken_apart_and_put_together(family, te):
    stem = "1_model_transformer_resblocks_3_attn" if family == "sdxl" else "model_transformer_resblocks_3_attn"
    layer = f"{te}_text_model_encoder_layers_3_self_attn"
    names = (f"{layer}_q_proj", f"{layer}_k_proj", f"{layer}_v_proj")
    for spelling in (stem, f"{stem}_in_proj", f"{te}_text_model_encoder_layers_3_self_attn_in_proj"):
        assert keys.fused(spelling, family) == names
        assert keys.layer_name(spelling, family) is None
    # The webui's own names for the thirds are layers.
    assert tuple(keys.layer_name(f"{stem}_{side}_proj", family) for side in "qkv") == names
    assert {keys.open_clip_name(name) for name in names} == {"transformer.resblocks.3.attn.in_proj"}
    prefix = "1.model." if family == "sdxl" else "model."
    assert keys.fused(prefix + keys.open_clip_name(names[0]), family) == names
    assert keys.fused(f"{stem}_out_proj", family) is None


@pytest.mark.parametrize(("family", "width", "layers"), [("sd2", 1024, 24), ("sdxl", 1280, 32)])
def test_open_clip_names_go_there_and_back(family, width, layers):
    paths = real.open_clip_text_encoder(width, layers).keys()
    prefix = "1.model." if family == "sdxl" else "model."
    for path in paths:
        for name in keys.fused(prefix + path, family) or [keys.layer_name(prefix + path, family)]:
            assert keys.open_clip_name(name) == path
    assert keys.open_clip_name("lora_unet_conv_in") is None


@pytest.mark.parametrize(
    ("stem", "family"),
    [
        ("lora_unet_nowhere", "sd1"),
        ("lora_unet_down_blocks_3_attentions_0_proj_in", "sd1"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "sdxl"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_1_ff_net_2", "sd1"),
        ("lora_unet_down_blocks_0_motion_modules_0_proj_in", "sd1"),
        ("add_embedding.linear_1", "sd1"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "sd1"),
        ("1_model_transformer_resblocks_0_attn_in_proj", "sd2"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc3", "sd1"),
        ("first_stage_model.encoder.conv_in", "sd1"),
        ("lora_unet", "sd1"),
        ("", "sd1"),
    ],
)
def test_no_name_for_what_the_family_lacks(stem, family):
    assert keys.layer_name(stem, family) is None
    assert keys.fused(stem, family) is None


WORDS = "lora lycoris unet te1 te2 0 1 model transformer text_model encoder layers resblocks mlp.fc1 attn ln_1 conv_in"


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS.split()), max_size=8).map("_".join), st.sampled_from(FAMILIES))
def test_any_text_is_a_canonical_name_or_not_understood(stem, family):
    name = keys.layer_name(stem, family)
    assert name is None or keys.layer_name(name, family) == name


@pytest.mark.parametrize(("family", "number"), [("sd1", 1), ("sdxl", 2)])
@pytest.mark.parametrize("written", [1, 2])
def test_an_upsampler_is_found_under_the_other_familys_number_too(family, number, written):
    """OneTrainer writes 2.2 for SD1, the webui's converter 2.1 for SDXL."""
    assert keys.compvis_unet_name("up_blocks.0.upsamplers.0.conv", family) == f"output_blocks.2.{number}.conv"
    name = keys.layer_name(f"unet.output_blocks.2.{written}.conv", family)
    assert name == keys.kohya_name("unet", "up_blocks.0.upsamplers.0.conv", family)
