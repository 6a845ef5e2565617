"""Model families: which of SD 1.x, SD 2.x and SDXL a LoRA file is for, by the names and shapes in it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

Family = Literal["sd1", "sd2", "sdxl"]

Shape = tuple[int, ...]


def detect_family(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None) -> Family:
    """The model family that a LoRA file of any algorithm is for, from its keys and their tensor shapes.

    In this order: a second text encoder; the width of what cross-attention reads, where it is a known one (768, 1024,
    2048); the width and depth of the text encoder; the block layout, so that a model of the SD1 layout with another
    width is still "sd1". Only SD 1.x and SD 2.x can look alike in all of that (an OFT of the UNet alone does); then the
    trainer's note in the metadata decides, "sd1" without one. Raises ValueError naming the model for families that are
    not these (Flux, SD3 and the like).
    """
    flat = {key.replace(".", "_"): tuple(shape) for key, shape in shapes.items()}
    for pattern, model in _FOREIGN:
        if any(pattern.search(key) for key in flat):
            raise ValueError(model)
    if any(_SECOND_ENCODER.search(key) for key in flat):
        return "sdxl"
    cross = {_input_width(tensors) for tensors in _layers(flat, _CROSS_ATTENTION)}
    text = {_square_width(tensors) for tensors in _layers(flat, _TEXT_SQUARE)}
    for width, family in _CROSS_WIDTHS.items():
        if width in cross:
            return family
    for width, family in _TEXT_WIDTHS.items():
        if width in text:
            return family
    if any(_ONLY_SD2_TEXT.search(key) for key in flat):
        return "sd2"
    four_levels = any(_ONLY_FOUR_LEVELS.search(key) for key in flat)
    if not four_levels and any(_ONLY_SDXL.search(key) for key in flat):
        return "sdxl"
    return "sd2" if (metadata or {}).get("ss_v2") == "True" else "sd1"


# On flat names, in this order: a Flux file also has keys that look like SD3's.
_FOREIGN = [
    (re.compile(pattern), model)
    for pattern, model in [
        (r"(^|_)(double_blocks|single_blocks|single_transformer_blocks)_", "Flux"),
        (r"^lora_prior_|(^|_)(kv_mapper|down_downscalers|up_upscalers)_", "Stable Cascade"),
        (r"(^|_)(noise|context)_refiner_\d|(^|_)layers_\d+_attention_(qkv|out)_", "Lumina or Z-Image"),
        (r"(^|_)blocks_\d+_(attn[12]_(Wqkv|[qk]v?_proj)|skip_linear)_", "HunyuanDiT"),
        (
            r"(^|_)blocks_\d+_cross_attn_(q|kv)_linear_|^(lora_)?transformer_transformer_blocks_\d+_attn[12]_",
            "PixArt or a relative of it",
        ),
        (r"(^|_)joint_blocks_|^(lora_te3|te3|text_encoder_3)_", "SD3"),
        (r"^(lora_)?transformer_transformer_blocks_", "SD3 or Flux"),
        (
            # The webui's own names of text encoder layers start with "transformer" too.
            r"^(lora_)?transformer_(?!text_model_|encoder_layers_|resblocks_)"
            r"|^(diffusion_model|lora_unet)_(blocks|layers)_",
            "a transformer",
        ),
    ]
]
_SECOND_ENCODER = re.compile(
    r"(^|_)(lora_te2|te2|text_encoder_2|clip_g|conditioner_embedders_1)_|^(lora_)?1_model_transformer_"
)
_CROSS_ATTENTION = re.compile(r"attn2_(processor_)?to_[kv]_")
_TEXT_SQUARE = re.compile(
    r"layers_\d+_(self_attn_(to_)?(q|k|v|out)_(proj_)?|layer_norm[12]_)|resblocks_\d+_(attn_[a-z]+_proj|ln_[12])_"
)
_CROSS_WIDTHS: dict[int, Family] = {2048: "sdxl", 1024: "sd2", 768: "sd1"}
# 768 is no evidence: the first encoder of SDXL is that of SD 1.x.
_TEXT_WIDTHS: dict[int, Family] = {1280: "sdxl", 1024: "sd2"}
# SD 1.x and the first encoder of SDXL have 12 layers, and none in OpenCLIP's spelling.
_ONLY_SD2_TEXT = re.compile(r"encoder_layers_(1[2-9]|2\d)_|transformer_resblocks_\d|(^|_)clip_h_")
_ONLY_FOUR_LEVELS = re.compile(
    r"down_blocks_0_attentions|down_blocks_2_downsamplers|(down|up)_blocks_3_|up_blocks_2_(attentions|upsamplers)"
    r"|input_blocks_[12]_1_|(in|out)put_blocks_(9|1\d)_|output_blocks_[678]_1_"
)
_ONLY_SDXL = re.compile(
    r"(^|_)(lora_te1|te1|conditioner_embedders_0)_|^0_transformer_|transformer_blocks_[1-9]"
    r"|up_blocks_0_attentions|output_blocks_[012]_1_(norm|proj|transformer)|add_embedding|label_emb"
    r"|^(lora|oft)_unet_(input_blocks|middle_block|output_blocks|time_embed|out)_\d"
)


def _layers(shapes: Mapping[str, Shape], pattern: re.Pattern[str]) -> list[dict[str, Shape]]:
    """The tensors of each layer whose name ends as the pattern does: flat suffix → shape."""
    found: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    for key, shape in shapes.items():
        match = pattern.search(key)
        if match:
            found[key[: match.end()]][key[match.end() :]] = shape
    return list(found.values())


_INPUT_SIDE = re.compile(r"lora(_linear_layer)?_(down|A)(_.+)?|hada_w[12]_b|diff|diff_weight|set_weight")


def _input_width(tensors: Mapping[str, Shape]) -> int | None:
    """d of a Linear layer (o, d) from its tensors in a LoRA file; None where they depend on o only."""
    for suffix, shape in tensors.items():
        if len(shape) == 2 and _INPUT_SIDE.fullmatch(suffix):
            return shape[1]
    # Kronecker product: the widths of the two factors multiply.
    first, second = (tensors.get(f"lokr_w{n}") or tensors.get(f"lokr_w{n}_b") for n in (1, 2))
    if first and second:
        return first[1] * second[1]
    # GLoRA's A is a product of a (d, r) and an (r, d); which comes first differs between its two layouts.
    if "a1_weight" in tensors:
        return max(tensors["a1_weight"])
    return None


def _square_width(tensors: Mapping[str, Shape]) -> int | None:
    """d of a square Linear layer (d, d) or of a norm (d); also from what depends on its output only."""
    width = _input_width(tensors)
    if width is not None:
        return width
    if "oft_blocks" in tensors:
        blocks = tensors["oft_blocks"]
        # (blocks, b, b), for BOFT (m, blocks, b, b); PEFT's vectors of b(b-1)/2 are left out.
        return blocks[-3] * blocks[-1] if len(blocks) >= 3 else None
    # A scale or a bias per channel: IA3's weight (d, 1) or (1, d), DoRA's scale likewise, the others (d).
    channels = ("weight", "dora_scale", "diff_b", "w_norm", "b_norm")
    sizes = [max(tensors[suffix]) for suffix in channels if tensors.get(suffix)]
    return max(sizes, default=None)
