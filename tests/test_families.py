"""The family of a LoRA file, from its keys and shapes alone."""

import pytest
from torch import nn

from loraclr import layout
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


CROSS = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
# LyCORIS' modules and what they are called with; lokr once with each factor whole and once with both taken apart.
WRITERS = {
    "LoConModule": [{}, {"weight_decompose": True}],
    "LohaModule": [{}],
    "LokrModule": [{}, {"factor": 8}, {"factor": 8, "decompose_both": True}, {"full_matrix": True}],
    "FullModule": [{}],
    "GLoRAModule": [{}],
}
SQUARE_WRITERS = {"DiagOFTModule": [{}], "ButterflyOFTModule": [{}], "IA3Module": [{}]} | WRITERS


def written(writer, stem, layer, options):
    """The shapes in a file that LyCORIS writes for one layer, of rank 16: with less, BOFT cannot cut 1280."""
    modules = pytest.importorskip("lycoris.modules")
    module = getattr(modules, writer)(stem, layer, 1.0, 16, 1, **options)
    return {f"{stem}.{key}": tuple(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl")])
@pytest.mark.parametrize(("writer", "options"), [(writer, each) for writer, all_ in WRITERS.items() for each in all_])
def test_the_width_of_cross_attention_is_seen_through_every_algorithm(writer, options, width, family):
    layer = nn.Linear(width, 640, bias=False)
    assert detect_family(written(writer, CROSS, layer, options)) == family


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (1280, "sdxl")])
@pytest.mark.parametrize(
    ("writer", "options"), [(writer, each) for writer, all_ in SQUARE_WRITERS.items() for each in all_]
)
def test_the_width_of_the_text_encoder_is_seen_through_every_algorithm(writer, options, width, family):
    layer = nn.Linear(width, width)
    assert detect_family(written(writer, TEXT, layer, options)) == family


def test_the_width_is_seen_in_a_file_of_peft():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(1024, 320)})})
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_k"]))
    shapes = {key: tuple(tensor.shape) for key, tensor in peft.get_peft_model_state_dict(model).items()}
    prefix = "unet.down_blocks.0.attentions.0.transformer_blocks.0."
    assert detect_family({key.replace("base_model.model.", prefix): shape for key, shape in shapes.items()}) == "sd2"


SPELLINGS = {
    "diffusers": "unet.{ours}",
    "diffusers, kohya": "lora_unet_{ours_flat}",
    "compvis": "diffusion_model.{theirs}",
    "webui": "diffusion_model_{theirs_flat}",
}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_the_blocks_tell_where_no_width_can(family, spelling):
    """A file that holds nothing but scalars, for every attention layer of the real UNet."""
    shapes = {}
    for ours, theirs in layout.unet_paths(family):
        if "attentions" in ours:
            stem = spelling.format(
                ours=ours, theirs=theirs, ours_flat=ours.replace(".", "_"), theirs_flat=theirs.replace(".", "_")
            )
            shapes[f"{stem}.alpha"] = ()
    # Only the trainer's note tells SD 2.x from SD 1.x here, and it tells nothing else.
    assert detect_family(shapes) == ("sdxl" if family == "sdxl" else "sd1")
    assert detect_family(shapes, {"ss_v2": "True"}) == ("sdxl" if family == "sdxl" else "sd2")
    assert detect_family(shapes, {"ss_v2": "False"}) == ("sdxl" if family == "sdxl" else "sd1")


@pytest.mark.parametrize(
    ("stem", "family"),
    [
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "sd1"),
        ("lora_te_text_model_encoder_layers_12_mlp_fc1", "sd2"),
        ("model_transformer_resblocks_0_mlp_c_fc", "sd2"),
        ("1_model_transformer_resblocks_0_mlp_c_fc", "sdxl"),
        ("0_transformer_text_model_encoder_layers_0_mlp_fc1", "sdxl"),
        ("transformer_text_model_encoder_layers_0_mlp_fc1", "sd1"),
        ("clip_l.text_model.encoder.layers.0.mlp.fc1", "sd1"),
        ("clip_g.text_model.encoder.layers.0.mlp.fc1", "sdxl"),
        ("lora_te2.text_model.encoder.layers.0.mlp.fc1", "sdxl"),
        ("oft_unet_input_blocks_4_1_proj_in", "sdxl"),
        ("oft_unet_down_blocks_0_attentions_0_proj_in", "sd1"),
    ],
)
def test_family_from_one_name_without_any_width(stem, family):
    assert detect_family({f"{stem}.alpha": ()}) == family


def test_a_norm_or_a_bias_of_the_text_encoder_shows_its_width():
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert detect_family({f"{stem}.diff_b": (1024,)}) == "sd2"
    assert detect_family({"lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": (1024,)}) == "sd2"


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "SD3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "SD3"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "transformer"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight", "SD3"),
        ("lora_prior_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight", "Stable Cascade"),
        ("lora_unet_blocks_0_cross_attn_kv_linear.lora_down.weight", "PixArt"),
        ("lora_transformer_transformer_blocks_0_attn2_to_k.lora_down.weight", "PixArt"),
        ("lora_unet_blocks_0_attn1_Wqkv.lora_down.weight", "HunyuanDiT"),
        ("lora_unet_layers_0_attention_qkv.lora_down.weight", "Lumina"),
        ("diffusion_model.noise_refiner.0.attention.out.lora_A.weight", "Lumina"),
    ],
)
def test_families_without_unet_are_refused_by_name(key, model):
    with pytest.raises(ValueError, match=model):
        detect_family({key: (4, 64)})


def test_the_first_key_does_not_decide_between_flux_and_sd3():
    flux = ("transformer.transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_q")
    with pytest.raises(ValueError, match="^Flux$"):
        detect_family({f"{stem}.lora_A.weight": (4, 64) for stem in flux})
