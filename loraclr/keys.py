"""Layer names: every naming convention of LoRA files and models, mapped to one canonical name and back.

The canonical name of a layer is kohya's own stem: diffusers module paths for SD1 and SD2
(``lora_unet_down_blocks_0_attentions_0_...``), the original ("compvis") paths for SDXL
(``lora_unet_input_blocks_4_1_...``). Everything is computed from the block layout: each level has two resnets going
down and three going up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

Family = Literal["sd1", "sd2", "sdxl"]
Part = Literal["unet", "text_encoder", "text_encoder_2"]

_LEVELS: dict[Family, int] = {"sd1": 4, "sd2": 4, "sdxl": 3}

# Going up, a level without attention has its upsampler in the attention's place.
_UP_LEVELS_WITH_ATTENTION: dict[Family, tuple[int, ...]] = {"sd1": (1, 2, 3), "sd2": (1, 2, 3), "sdxl": (0, 1)}

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}

# Each table is looked up by the flat spelling, so that dotted and underscored names share one rule.
_RESNET_TO_DIFFUSERS = {compvis.replace(".", "_"): diffusers for compvis, diffusers in _RESNET.items()}
_RESNET_TO_COMPVIS = {diffusers: compvis for compvis, diffusers in _RESNET.items()}
_ENDS_TO_DIFFUSERS = {compvis.replace(".", "_"): diffusers for compvis, diffusers in _ENDS.items()}
_ENDS_TO_COMPVIS = {diffusers.replace(".", "_"): compvis for compvis, diffusers in _ENDS.items()}
_MIDDLE_TO_COMPVIS = {diffusers.replace(".", "_"): compvis for compvis, diffusers in _MIDDLE.items()}

_COMPVIS_BLOCK = re.compile(r"(input|output)_blocks[._](\d+)[._](\d+)[._](.+)")
_COMPVIS_MIDDLE = re.compile(r"middle_block[._]([012])[._](.+)")
_DIFFUSERS_BLOCK = re.compile(
    r"(down|up)_blocks[._](\d+)[._](resnets|attentions|downsamplers|upsamplers)[._](\d+)[._](.+)"
)
_DIFFUSERS_MIDDLE = re.compile(r"mid_block[._]((?:resnets|attentions)[._]\d)[._](.+)")


def diffusers_unet_name(compvis: str, family: Family = "sd1") -> str:
    """The diffusers path of a UNet layer given by its compvis path; dotted in, dotted out.

    ``input_blocks.1.1.proj_in`` → ``down_blocks.0.attentions.0.proj_in``. Raises ValueError for a path that is no layer
    of the family's layout.
    """
    name = _to_diffusers(compvis, ".", family)
    if name is None:
        raise ValueError(f"{compvis!r} is not a layer of the original {family} UNet")
    return name


def compvis_unet_name(diffusers: str, family: Family = "sd1") -> str:
    """The compvis path of a UNet layer given by its diffusers path; the inverse of `diffusers_unet_name`."""
    name = _to_compvis(diffusers, ".", family)
    if name is None:
        raise ValueError(f"{diffusers!r} is not a layer of the diffusers {family} UNet")
    return name


def kohya_name(part: Part, path: str, family: Family = "sd1") -> str:
    """The canonical name of the module at a dotted path of the UNet or of a text encoder.

    UNet paths may be diffusers' or compvis'. Text encoder paths may start with ``text_model.`` (transformers < 5) or
    directly with ``encoder.layers.`` (transformers ≥ 5).
    """
    return _stem(part, path.replace(".", "_"), family)


def canonical(key: str, family: Family = "sd1") -> tuple[str, str] | None:
    """Split a key of a LoRA file into the canonical layer name and kohya's suffix; None if it is not understood.

    The suffix is ``lora_up.weight``, ``lora_down.weight``, ``lora_mid.weight`` or ``alpha``. Understood are kohya's
    names (also with the other family's block names), A1111's full names, and dotted names of diffusers, PEFT and
    ComfyUI.
    """
    split = _split_suffix(key)
    if split is None:
        return None
    stem, suffix = split
    place = _place(stem.replace("base_model.model.", ""))
    if place is None:
        return None
    part, path = place
    return _stem(part, path, family), suffix


def layer_name(stem: str, family: Family = "sd1") -> str | None:
    """The canonical name of the layer that a key's stem names; None if it is not understood."""
    place = _place(stem.replace("base_model.model.", ""))
    return None if place is None else _stem(*place, family)


def fused(stem: str, family: Family = "sd1") -> tuple[str, str, str] | None:
    """The canonical names of q, k and v where a stem names OpenCLIP's fused projection of all three; else None."""
    match = re.fullmatch(r"(lora_te2?_text_model_encoder_layers_\d+_self_attn)_in_proj", layer_name(stem, family) or "")
    return tuple(f"{match[1]}_{letter}_proj" for letter in "qkv") if match else None


def detect_family(shapes: Mapping[str, Sequence[int]]) -> Family:
    """The model family that a LoRA file is for, from its keys and their tensor shapes.

    The width of the cross-attention's input decides when it is a known one (768, 1024, 2048), else the block layout, so
    that a model of the SD1 layout with another width is still "sd1". Raises ValueError naming the model for families
    that are not UNets (Flux, SD3 and the like).
    """
    for key in shapes:
        for pattern, model in _FOREIGN:
            if pattern.search(key):
                raise ValueError(model)
    flat = {key.replace(".", "_"): tuple(shape) for key, shape in shapes.items()}
    if any(_SECOND_ENCODER.search(key) for key in flat):
        return "sdxl"
    cross = _input_widths(flat, _CROSS_INPUT)
    for width, family in _CROSS_WIDTHS.items():
        if width in cross:
            return family
    if 1024 in _input_widths(flat, _TEXT_INPUT):
        return "sd2"
    if any(_ONLY_FOUR_LEVELS.search(key) for key in flat):
        return "sd1"
    if any(_ONLY_SDXL.search(key) for key in flat):
        return "sdxl"
    return "sd1"


# Ordered: a Flux file also has keys that look like SD3's.
_FOREIGN = [
    (re.compile(r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]"), "Flux"),
    (re.compile(r"(^|[._])joint_blocks[._]|^(lora_)?transformer[._]transformer_blocks[._]|^lora_te3_"), "SD3 or Flux"),
    (
        re.compile(r"^(lora_)?transformer[._]|^diffusion_model\.(blocks|layers)\.|^lora_unet_(blocks|layers)_"),
        "a transformer",
    ),
]
_SECOND_ENCODER = re.compile(r"(^|_)(lora_te2|text_encoder_2)_")
_CROSS_INPUT = re.compile(r"attn2_(processor_)?to_[kv]_?lora.*(down|_A)")
_TEXT_INPUT = re.compile(r"(^|_)(lora_te|text_encoder)_.*self_attn_[qkv]_proj_?lora.*(down|_A)")
_CROSS_WIDTHS: dict[int, Family] = {2048: "sdxl", 1024: "sd2", 768: "sd1"}
_ONLY_FOUR_LEVELS = re.compile(
    r"down_blocks_0_attentions|down_blocks_2_downsamplers|(down|up)_blocks_3_|input_blocks_[12]_1_|(in|out)put_blocks_(9|1\d)_"
)
_ONLY_SDXL = re.compile(
    r"(^|_)lora_te1_|transformer_blocks_[1-9]|up_blocks_0_attentions|output_blocks_[012]_1_(norm|proj|transformer)"
    r"|add_embedding|label_emb|^lora_unet_(input_blocks|middle_block|output_blocks|time_embed|out)_"
)

_SUFFIX = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<kohya>up|down|mid)"
    r"|\.lora_(?P<peft>[AB])(?:\.[^.]+)?"
    r"|[._]lora\.(?P<diffusers>up|down)"
    r"|\.lora_linear_layer\.(?P<linear>up|down)"
    r")\.weight"
)


def _split_suffix(key: str) -> tuple[str, str] | None:
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    match = _SUFFIX.fullmatch(key)
    if match is None:
        return None
    side = match["kohya"] or match["diffusers"] or match["linear"] or {"A": "down", "B": "up"}[match["peft"]]
    return match["stem"], f"lora_{side}.weight"


_PREFIXES: dict[str, Part] = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "diffusion_model_": "unet",
}
_BARE_UNET = re.compile(r"(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)[._]")
_BARE_TEXT = re.compile(r"(text_model[._])?encoder[._]layers[._]")


def _place(stem: str) -> tuple[Part, str] | None:
    """Which part of the model a stem belongs to, and its flat path inside that part."""
    for prefix, part in _PREFIXES.items():
        if stem.startswith(prefix):
            return part, _flatten(stem.removeprefix(prefix))
    stem = stem.removeprefix("lycoris_")
    if _BARE_UNET.match(stem):
        return "unet", _flatten(stem)
    if _BARE_TEXT.match(stem):
        return "text_encoder", _flatten(stem)
    return None


def _flatten(path: str) -> str:
    """Underscores for dots, and the names of diffusers' former attention processors as the modules they stood for."""
    path = path.replace(".processor.", ".").replace(".", "_")
    path = re.sub(r"(attn[12]_to_out)$", r"\1_0", path)
    path = re.sub(r"(self_attn)_to_([qkv])$", r"\1_\2_proj", path)
    return re.sub(r"(self_attn)_to_out$", r"\1_out_proj", path)


def _stem(part: Part, flat: str, family: Family) -> str:
    if part == "unet":
        convert = _to_compvis if family == "sdxl" else _to_diffusers
        return f"lora_unet_{convert(flat, '_', family) or flat}"
    prefix = "lora_te2" if part == "text_encoder_2" else "lora_te1" if family == "sdxl" else "lora_te"
    if flat.startswith(("encoder_", "embeddings_", "final_layer_norm")):
        flat = f"text_model_{flat}"
    return f"{prefix}_{flat}"


def _input_widths(shapes: Mapping[str, tuple[int, ...]], pattern: re.Pattern[str]) -> set[int]:
    return {shape[1] for key, shape in shapes.items() if len(shape) >= 2 and pattern.search(key)}


def _to_diffusers(name: str, sep: str, family: Family) -> str | None:
    path = _diffusers_path(name, family)
    return None if path is None else path.replace(".", sep)


def _to_compvis(name: str, sep: str, family: Family) -> str | None:
    path = _compvis_path(name, family)
    return None if path is None else path.replace(".", sep)


def _diffusers_path(name: str, family: Family) -> str | None:
    end = _ENDS_TO_DIFFUSERS.get(name.replace(".", "_"))
    if end is not None:
        return end
    middle = _COMPVIS_MIDDLE.fullmatch(name)
    if middle:
        return _join("mid_block", _MIDDLE[middle[1]], middle[2], to_compvis=False)
    block = _COMPVIS_BLOCK.fullmatch(name)
    if not block:
        return None
    number, child, rest = int(block[2]), int(block[3]), block[4]
    if block[1] == "input":
        # input_blocks.0 is conv_in; then per level: two layers and a downsampler.
        level, layer = divmod(number - 1, 3)
        if number == 0 or level >= _LEVELS[family]:
            return None
        if layer == 2:
            last = level == _LEVELS[family] - 1
            return None if last or child != 0 or rest != "op" else f"down_blocks.{level}.downsamplers.0.conv"
        side = "down_blocks"
    else:
        # Per level three layers; the upsampler sits behind the last one.
        level, layer = divmod(number, 3)
        if level >= _LEVELS[family]:
            return None
        if rest == "conv":
            fits = layer == 2 and child in (1, 2) and level < _LEVELS[family] - 1
            return f"up_blocks.{level}.upsamplers.0.conv" if fits else None
        side = "up_blocks"
    kind = {0: "resnets", 1: "attentions"}.get(child)
    return None if kind is None else _join(f"{side}.{level}", f"{kind}.{layer}", rest, to_compvis=False)


def _compvis_path(name: str, family: Family) -> str | None:
    end = _ENDS_TO_COMPVIS.get(name.replace(".", "_"))
    if end is not None:
        return end
    middle = _DIFFUSERS_MIDDLE.fullmatch(name)
    if middle:
        child = _MIDDLE_TO_COMPVIS.get(middle[1].replace(".", "_"))
        return None if child is None else _join("middle_block", child, middle[2], to_compvis=True)
    block = _DIFFUSERS_BLOCK.fullmatch(name)
    if not block:
        return None
    side, level, kind, layer, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    last = level == _LEVELS[family] - 1
    if level >= _LEVELS[family]:
        return None
    if kind == "downsamplers":
        fits = side == "down" and layer == 0 and rest == "conv" and not last
        return f"input_blocks.{3 * level + 3}.0.op" if fits else None
    if kind == "upsamplers":
        child = 2 if level in _UP_LEVELS_WITH_ATTENTION[family] else 1
        fits = side == "up" and layer == 0 and rest == "conv" and not last
        return f"output_blocks.{3 * level + 2}.{child}.conv" if fits else None
    if layer >= (2 if side == "down" else 3):
        return None
    number, block_name = (
        (1 + 3 * level + layer, "input_blocks") if side == "down" else (3 * level + layer, "output_blocks")
    )
    return _join(f"{block_name}.{number}", "0" if kind == "resnets" else "1", rest, to_compvis=True)


def _join(block: str, child: str, rest: str, to_compvis: bool) -> str | None:
    """Put a path together; the inside of an attention block is named alike on both sides, a resnet's is translated."""
    resnet = child in ("0", "2") if to_compvis else child.startswith("resnets")
    if resnet:
        translated = _RESNET_TO_COMPVIS.get(rest) if to_compvis else _RESNET_TO_DIFFUSERS.get(rest.replace(".", "_"))
        if translated is None:
            return None
        rest = translated
    return f"{block}.{child}.{rest}"
