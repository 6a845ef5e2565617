"""Block weights: every layer's block, and what a user may write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraclr import keys, layout
from loraclr.blocks import BLOCKS, block, block_weights


def blocks_of(family, pick=lambda path: True):
    return {block(keys.kohya_name("unet", ours, family), family) for ours, _ in layout.unet_paths(family) if pick(ours)}


def test_the_presets_are_the_blocks_that_the_families_have():
    """17 and 12 are the blocks with attention, 26 and 20 all blocks: counted on the layouts, not on the table."""
    for family, full, lora in (("sd1", 26, 17), ("sd2", 26, 17), ("sdxl", 20, 12)):
        assert blocks_of(family) == set(BLOCKS[full])
        assert blocks_of(family, lambda path: "attentions" in path) == set(BLOCKS[lora]) - {"BASE"}
    for count, names in BLOCKS.items():
        assert len(names) == len(set(names)) == count
        assert sorted(names, key=BLOCKS[26].index) == list(names)


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "sd1", "BASE"),
        ("lora_te2_text_projection", "sdxl", "BASE"),
        ("lora_unet_conv_in", "sd1", "IN00"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "sd1", "IN01"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "sd1", "IN03"),
        ("lora_unet_down_blocks_3_resnets_1_conv1", "sd2", "IN11"),
        ("lora_unet_mid_block_attentions_0_proj_in", "sd1", "M00"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "sd1", "OUT02"),
        ("lora_unet_up_blocks_3_attentions_2_proj_out", "sd1", "OUT11"),
        ("lora_unet_input_blocks_4_1_proj_in", "sdxl", "IN04"),
        ("lora_unet_output_blocks_5_2_conv", "sdxl", "OUT05"),
        ("lora_unet_time_embedding_linear_1", "sd1", "BASE"),
        ("lora_unet_conv_out", "sd1", "BASE"),
        ("lora_unet_label_emb_0_0", "sdxl", "BASE"),
    ],
)
def test_block_of_a_layer(name, family, expected):
    assert keys.layer_name(name, family) == name
    assert block(name, family) == expected


@settings(deadline=None)
@given(st.data(), st.sampled_from([("sd1", 17), ("sd2", 26), ("sdxl", 12), ("sdxl", 20), ("sdxl", 26)]))
def test_numbers_go_to_the_presets_blocks_in_order(data, preset):
    family, count = preset
    numbers = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    weights = block_weights(", ".join(map(repr, numbers)), family)
    assert weights == block_weights(numbers, family)
    assert [weights[name] for name in BLOCKS[count]] == numbers
    assert weights.keys() == set(BLOCKS[26])
    assert all(weights[name] == 0 for name in weights.keys() - set(BLOCKS[count]))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("0.5", dict.fromkeys(BLOCKS[26], 0.5)),
        ([0.5], dict.fromkeys(BLOCKS[26], 0.5)),
        ("OUT03=0.5", {"OUT03": 0.5}),
        (" out03 = -0.5 ,BASE:0 ", {"OUT03": -0.5, "BASE": 0.0}),
        ("IN10-OUT00=0", {"IN10": 0.0, "IN11": 0.0, "M00": 0.0, "OUT00": 0.0}),
        ("OUT00 - IN10 = 0", {"IN10": 0.0, "IN11": 0.0, "M00": 0.0, "OUT00": 0.0}),
        ("IN10-M00=0 MID=1.5", {"IN10": 0.0, "IN11": 0.0, "M00": 1.5}),
        ({"OUT03": 0.5, "BASE": 2}, {"OUT03": 0.5, "BASE": 2.0}),
    ],
)
def test_one_number_and_names(written, expected):
    assert block_weights(written) == dict.fromkeys(BLOCKS[26], 1.0) | expected


@pytest.mark.parametrize(
    ("written", "family", "message"),
    [
        ("", "sd1", "empty"),
        ([], "sd1", "0 block weights were given"),
        ("1,1", "sd1", "2 block weights were given, but SD 1.x takes 17 or 26"),
        (",".join("1" * 17), "sdxl", "17 block weights were given, but SDXL takes 12, 20 or 26"),
        (",".join("1" * 12), "sd2", "12 block weights were given, but SD 2.x takes 17 or 26"),
        (",".join("R" * 17), "sd1", "'R' is no block weight"),
        ([float("nan")] * 17, "sd1", "nan is no block weight"),
        ("OUT03=", "sd1", "'' is no block weight"),
        ("OUT03=inf", "sd1", "'inf' is no block weight"),
        ("OUT12=1", "sd1", "'OUT12' is no block; the blocks are BASE"),
        ("IN00-IN01-IN02=1", "sd1", "is no block"),
        ("OUT03=1 0.5", "sd1", "'0.5' is no block weight; write it like OUT03=0.5"),
        ({"nowhere": 1.0}, "sd1", "'nowhere' is no block"),
        ({"M00": None}, "sd1", "None is no block weight"),
    ],
)
def test_errors_say_what_is_wrong(written, family, message):
    with pytest.raises(ValueError, match=message):
        block_weights(written, family)
