"""What a LoRA file's tensors mean, checked against PEFT and against convolutions run as written."""

import json

import pytest
import torch
import torch.nn.functional as F

from loraclr.lora import Layer, LoRA, LoRAFormatError, parse, trigger_from

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(stem=STEM, rank=4, alpha=2.0):
    tensors = {f"{stem}.lora_up.weight": random(8, rank), f"{stem}.lora_down.weight": random(rank, 6, seed=1)}
    return tensors if alpha is None else tensors | {f"{stem}.alpha": torch.tensor(alpha)}


def test_delta_is_alpha_over_rank_times_the_product():
    layer = parse(linear(alpha=2.0), {}, "x").layers[STEM]
    assert (layer.rank, layer.alpha, layer.scale, layer.conv) == (4, 2.0, 0.5, False)
    torch.testing.assert_close(layer.delta(), 0.5 * random(8, 4) @ random(4, 6, seed=1))


def test_without_alpha_the_scale_is_one():
    assert parse(linear(alpha=None), {}, "x").layers[STEM].scale == 1.0


def test_half_precision_is_read_as_float32():
    layer = parse({key: tensor.bfloat16() for key, tensor in linear().items()}, {}, "x").layers[STEM]
    assert layer.up.dtype == layer.down.dtype == torch.float32


def test_layers_do_not_share_memory_with_the_file():
    tensors = linear()
    layer = parse(tensors, {}, "x").layers[STEM]
    tensors[f"{STEM}.lora_up.weight"].zero_()
    assert layer.up.abs().sum() > 0


@pytest.mark.parametrize("size", [1, 3])
def test_convolution_is_down_then_up(size):
    up, down, x = random(8, 4, 1, 1), random(4, 6, size, size, seed=1), random(1, 6, 5, 5, seed=2)
    layer = parse({f"{CONV}.lora_up.weight": up, f"{CONV}.lora_down.weight": down}, {}, "x").layers[CONV]
    assert layer.conv and layer.kernel == (size, size)
    merged = F.conv2d(x, layer.delta().reshape(8, 6, size, size))
    torch.testing.assert_close(merged, F.conv2d(F.conv2d(x, down), up), rtol=1e-4, atol=1e-4)


def test_tucker_convolution_is_down_then_mid_then_up():
    up, mid, down = random(8, 4, 1, 1), random(4, 4, 3, 3, seed=1), random(4, 6, 1, 1, seed=2)
    x = random(1, 6, 5, 5, seed=3)
    tensors = {f"{CONV}.lora_{side}.weight": tensor for side, tensor in (("up", up), ("mid", mid), ("down", down))}
    layer = parse(tensors, {}, "x").layers[CONV]
    merged = F.conv2d(x, layer.delta().reshape(8, 6, 3, 3))
    torch.testing.assert_close(merged, F.conv2d(F.conv2d(F.conv2d(x, down), mid), up), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("alpha", "rslora"), [(4, False), (2, False), (3, True)])
def test_deltas_are_those_of_peft(tmp_path, alpha, rslora):
    """A LoRA that diffusers saves from PEFT layers changes every layer as PEFT itself does."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from diffusers.training_utils import _collate_lora_metadata

    from loraclr import files, keys

    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        layers_per_block=2,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    targets = ["to_q", "to_out.0", "proj_in", "conv1"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=alpha,
        target_modules=targets,
        init_lora_weights=False,
        use_rslora=rslora,
        alpha_pattern={"down_blocks.1.attentions.0.proj_in": 7},
    )
    unet.add_adapter(config)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        safe_serialization=True,
        **_collate_lora_metadata({"unet": unet}),
    )
    lora = files.load(tmp_path / "pytorch_lora_weights.safetensors")
    assert lora.family == "sd1" and lora.unused == ()
    found = 0
    for path, module in unet.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            expected = module.get_delta_weight("default").flatten(1)
            torch.testing.assert_close(lora.layers[keys.kohya_name("unet", path)].delta(), expected)
            found += 1
    assert found == len(lora.layers) > 50


def test_unused_lists_every_key_that_is_not_understood():
    extra = {
        "bundle_emb.zyk.string_to_param.*": torch.zeros(2),
        "odd.key": torch.zeros(1),
        f"{CONV}.alpha": torch.tensor(1.0),
    }
    lora = parse(linear() | extra, {}, "x")
    assert lora.unused == tuple(sorted(extra)) and list(lora.layers) == [STEM]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("emb_params", "a textual inversion embedding"),
        ("clip_g", "a textual inversion embedding"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a checkpoint"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "a checkpoint"),
        ("first_stage_model.encoder.down.0.block.0.conv1.weight", "a VAE"),
        ("decoder.mid.attn_1.k.weight", "a VAE"),
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder"),
    ],
)
def test_other_files_are_refused_by_what_they_are(key, kind):
    with pytest.raises(LoRAFormatError, match=f"^bad is {kind}, not a LoRA; choose a LoRA file.$"):
        parse({key: torch.zeros(2, 2)}, {}, "bad")


def test_a_lora_of_another_model_is_refused_with_the_models_that_work():
    with pytest.raises(LoRAFormatError, match="bad is a LoRA for Flux; only SD 1.x, SD 2.x and SDXL can be merged"):
        parse(linear("lora_unet_double_blocks_0_img_attn_qkv"), {}, "bad")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{STEM}.lora_down.weight": None}, "is incomplete: .* no lora_down.weight"),
        ({f"{STEM}.lora_up.weight": None}, "is incomplete: .* no lora_up.weight"),
        ({f"{STEM}.lora_down.weight": torch.zeros(3, 6)}, r"lora_up \(8, 4\) and lora_down \(3, 6\) do not fit"),
        ({f"{STEM}.lora_down.weight": torch.zeros(4)}, "do not fit"),
        ({f"{STEM}.lora_down.weight": torch.zeros(0, 6), f"{STEM}.lora_up.weight": torch.zeros(8, 0)}, "do not fit"),
        ({f"{STEM}.lora_up.weight": torch.full((8, 4), torch.nan)}, "holds NaN or infinite"),
        ({f"{STEM}.lora_up.weight": torch.zeros(8, 4, dtype=torch.int8)}, "is int8; save it as float16"),
        ({f"{STEM}.alpha": torch.tensor(torch.inf)}, "holds NaN or infinite"),
        ({f"{STEM}.alpha": torch.zeros(2)}, "instead of one number"),
        ({f"{STEM}.lora_A.weight": torch.zeros(4, 6)}, "has one layer twice"),
    ],
)
def test_damaged_layers_are_named(change, message):
    tensors = {key: tensor for key, tensor in (linear() | change).items() if tensor is not None}
    with pytest.raises(LoRAFormatError, match=message) as error:
        parse(tensors, {}, "bad")
    assert str(error.value).startswith("bad ") and STEM in str(error.value)


@pytest.mark.parametrize("tensors", [{}, {"odd.key": torch.zeros(1)}, {f"{STEM}.alpha": torch.tensor(1.0)}])
def test_a_file_without_layers_is_refused(tensors):
    with pytest.raises(LoRAFormatError, match="choose a LoRA file"):
        parse(tensors, {}, "bad")


def test_layer_refuses_factors_that_do_not_fit():
    with pytest.raises(ValueError, match="are not"):
        Layer(torch.zeros(8, 4), torch.zeros(3, 6), 1.0)
    with pytest.raises(ValueError, match="are not"):
        Layer(torch.zeros(8, 0), torch.zeros(0, 6), 1.0)


@pytest.mark.parametrize(
    ("metadata", "trigger"),
    [
        ({}, ""),
        ({"modelspec.trigger_phrase": " zyk cat "}, "zyk cat"),
        ({"ss_tag_frequency": json.dumps({"10_a": {"zyk": 3, "cat": 2}, "5_b": {"cat": 4}})}, "cat"),
        ({"modelspec.trigger_phrase": "zyk", "ss_tag_frequency": json.dumps({"a": {"cat": 1}})}, "zyk"),
        ({"ss_tag_frequency": "{broken"}, ""),
        ({"ss_tag_frequency": "[1]"}, ""),
        ({"ss_tag_frequency": json.dumps({"a": 3, "b": {"cat": "many"}})}, ""),
    ],
)
def test_trigger_from_metadata(metadata, trigger):
    assert trigger_from(metadata) == trigger


def test_the_users_own_activation_text_comes_first():
    metadata = {"modelspec.trigger_phrase": "zyk"}
    assert LoRA("x", None, "sd1", {}, metadata, activation="mine").triggers() == "mine"
    assert LoRA("x", None, "sd1", {}, metadata).triggers() == "zyk"
