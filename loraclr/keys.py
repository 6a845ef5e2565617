"""Layer names: every naming convention of LoRA files and models, mapped to one canonical name and back.

The canonical name of a layer is kohya's own stem: diffusers module paths for SD1 and SD2
(``lora_unet_down_blocks_0_attentions_0_...``), the original ("compvis") paths for SDXL
(``lora_unet_input_blocks_4_1_...``), and transformers' paths for every text encoder.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

from loraclr import layout
from loraclr.families import Family
from loraclr.families import detect_family as detect_family

Part = Literal["unet", "text_encoder", "text_encoder_2"]


def diffusers_unet_name(compvis: str, family: Family = "sd1") -> str:
    """The diffusers path of a UNet layer given by its compvis path; dotted in, dotted out.

    ``input_blocks.1.1.proj_in`` → ``down_blocks.0.attentions.0.proj_in``. Raises ValueError for a path that is no layer
    of the family's layout.
    """
    try:
        return layout.to_diffusers(family)[compvis]
    except KeyError:
        raise ValueError(f"{compvis!r} is not a layer of the original {family} UNet") from None


def compvis_unet_name(diffusers: str, family: Family = "sd1") -> str:
    """The compvis path of a UNet layer given by its diffusers path; the inverse of `diffusers_unet_name`."""
    try:
        return layout.to_compvis(family)[diffusers]
    except KeyError:
        raise ValueError(f"{diffusers!r} is not a layer of the diffusers {family} UNet") from None


def compvis_unet_path(name: str, family: Family = "sd1") -> str | None:
    """The dotted compvis path of a UNet layer by its canonical name; None for a layer of a text encoder."""
    return _unet_layers(family).get(name.removeprefix("lora_unet_"))


def kohya_name(part: Part, path: str, family: Family = "sd1") -> str:
    """The canonical name of the module at a dotted path of the UNet or of a text encoder.

    UNet paths may be diffusers' or compvis', text encoder paths transformers' (with or without ``text_model.``) or
    OpenCLIP's. A module that the family's layout lacks keeps its own path.
    """
    flat = _flatten(path)
    return _name(part, flat, family) or f"{_prefix(part, family)}_{flat}"


def layer_name(stem: str, family: Family = "sd1") -> str | None:
    """The canonical name of the layer that a key of a LoRA file is about; None if there is no such layer.

    stem: the key without its algorithm's suffix (``.lora_up.weight``, ``.hada_w1_a``, ...). Understood are kohya's
    names (also with the other family's block names), the webui's full names, those of checkpoints and of LyCORIS'
    wrapper, and the dotted names of diffusers, PEFT, ComfyUI and OneTrainer. OpenCLIP's fused q, k and v are three
    layers: see `fused`.
    """
    place = _place(stem, family)
    return None if place is None else _name(*place, family)


def fused(stem: str, family: Family = "sd1") -> tuple[str, str, str] | None:
    """The canonical names of q, k and v if the stem is OpenCLIP's fused projection of them, else None.

    Rows 0..d of its ΔW (3d, d) are q's, then come k's and v's. OpenCLIP is the text encoder of SD2 and SDXL's second.
    """
    place = _place(stem, family)
    if place is None or place[0] == "unet" or (place[0] == "text_encoder_2" and family != "sdxl"):
        return None
    part, flat = place
    match = _TEXT_LAYER.fullmatch(flat)
    if match is None or match["inside"] not in _FUSED:
        return None
    layer = f"{_prefix(part, family)}_text_model_encoder_layers_{match['number']}_self_attn"
    return f"{layer}_q_proj", f"{layer}_k_proj", f"{layer}_v_proj"


def open_clip_name(name: str) -> str | None:
    """OpenCLIP's dotted path for a text encoder layer by its canonical name; None for any other layer.

    q, k and v share one path, ``transformer.resblocks.N.attn.in_proj``, whose thirds `fused` names.
    """
    match = _CANONICAL_TEXT.fullmatch(name)
    if match is None:
        return None
    if match["number"] is None:
        return _TEXT_ENDS_TO_OPEN_CLIP.get(match["end"])
    inside = _TEXT_TO_OPEN_CLIP.get(match["inside"])
    return None if inside is None else f"transformer.resblocks.{match['number']}.{inside}"


def kernel(name: str, family: Family = "sd1") -> tuple[int, int] | None:
    """The size of a convolution's kernel by its canonical name; None for a layer that is no convolution."""
    path = compvis_unet_path(name, family)
    return None if path is None else layout.kernel(layout.to_diffusers(family)[path], family)


# What stands before the path inside a part, with underscores for dots. The numbers alone are the webui's full names
# of SDXL's encoders; the name of a wrapper (PEFT's, LyCORIS') may stand before or within.
_PREFIXES: dict[str, Part] = {
    **dict.fromkeys(("lora_unet", "oft_unet", "unet", "diffusion_model", "model_diffusion_model"), "unet"),
    **dict.fromkeys(("lora_te", "lora_te1", "te", "te1", "text_encoder", "cond_stage_model"), "text_encoder"),
    **dict.fromkeys(("clip_l", "clip_h", "text_encoders_clip_l", "text_encoders_clip_h"), "text_encoder"),
    **dict.fromkeys(("conditioner_embedders_0", "0"), "text_encoder"),
    **dict.fromkeys(("lora_te2", "te2", "text_encoder_2", "clip_g", "text_encoders_clip_g"), "text_encoder_2"),
    **dict.fromkeys(("conditioner_embedders_1", "1"), "text_encoder_2"),
}
_PREFIX = re.compile(rf"({'|'.join(sorted(_PREFIXES, key=len, reverse=True))})_(.+)")

# Text encoder layers, OpenCLIP's path → transformers'.
_OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP_ENDS = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding",
    "ln_final": "final_layer_norm",
    "text_projection": "text_projection",
}
# A multi-head attention's projections are parameters, not modules: a file may name the attention itself.
_FUSED = ("attn", "attn_in_proj", "self_attn_in_proj")


def _flat(table: dict[str, str]) -> dict[str, str]:
    """Either spelling → transformers', both with underscores."""
    pairs = [(a.replace(".", "_"), b.replace(".", "_")) for a, b in table.items()]
    return dict(pairs) | {theirs: theirs for _, theirs in pairs}


_TEXT_INSIDES = _flat(_OPEN_CLIP)
_TEXT_ENDS = _flat(_OPEN_CLIP_ENDS)
_TEXT_TO_OPEN_CLIP = {theirs.replace(".", "_"): ours for ours, theirs in _OPEN_CLIP.items()} | {
    f"self_attn_{side}_proj": "attn.in_proj" for side in "qkv"
}
_TEXT_ENDS_TO_OPEN_CLIP = {theirs.replace(".", "_"): ours for ours, theirs in _OPEN_CLIP_ENDS.items()}

_TEXT_LAYER = re.compile(
    r"(?:(?:transformer_)?(?:text_model_)?encoder_layers|(?:model_)?transformer_resblocks)_(?P<number>\d+)_(?P<inside>.+)"
)
_TEXT_END = re.compile(r"(?:transformer_|model_)?(?:text_model_)?(?P<end>.+)")
_CANONICAL_TEXT = re.compile(
    r"lora_te[12]?_(?:text_model_encoder_layers_(?P<number>\d+)_(?P<inside>.+)|(?:text_model_)?(?P<end>.+))"
)


def _place(stem: str, family: Family) -> tuple[Part, str] | None:
    """Which part of the model a stem belongs to, and its flat path inside that part."""
    flat = _flatten(stem).removeprefix("lycoris_")
    match = _PREFIX.fullmatch(flat)
    if match:
        return _PREFIXES[match[1]], match[2]
    if flat in _unet_layers(family):
        return "unet", flat
    if _TEXT_LAYER.fullmatch(flat) or _text_end(flat):
        # Without a prefix only OpenCLIP's spelling tells SDXL's second encoder.
        second = family == "sdxl" and ("resblocks" in flat or flat.removeprefix("model_") in _OPEN_CLIP_ENDS)
        return "text_encoder_2" if second else "text_encoder", flat
    return None


def _flatten(path: str) -> str:
    """Underscores for dots, and the names of diffusers' former attention processors as the modules they stood for."""
    path = path.replace(".", "_").replace("base_model_model_", "").replace("_processor_", "_")
    path = re.sub(r"(attn[12]_to_out)$", r"\1_0", path)
    path = re.sub(r"(self_attn)_to_([qkv])$", r"\1_\2_proj", path)
    return re.sub(r"(self_attn)_to_out$", r"\1_out_proj", path)


@cache
def _unet_layers(family: Family) -> dict[str, str]:
    """Each flat path of a UNet layer, in either spelling, → its compvis path."""
    diffusers = layout.to_diffusers(family)
    compvis = layout.to_compvis(family)
    paths = compvis | {path: compvis[other] for path, other in diffusers.items()}
    return {path.replace(".", "_"): target for path, target in paths.items()}


def _name(part: Part, flat: str, family: Family) -> str | None:
    if part == "unet":
        compvis = _unet_layers(family).get(flat)
        if compvis is None:
            return None
        path = compvis if family == "sdxl" else layout.to_diffusers(family)[compvis]
        return f"lora_unet_{path.replace('.', '_')}"
    if part == "text_encoder_2" and family != "sdxl":
        return None
    match = _TEXT_LAYER.fullmatch(flat)
    if match:
        inside = _TEXT_INSIDES.get(match["inside"])
        path = None if inside is None else f"text_model_encoder_layers_{match['number']}_{inside}"
    else:
        path = _text_end(flat)
    return None if path is None else f"{_prefix(part, family)}_{path}"


def _text_end(flat: str) -> str | None:
    match = _TEXT_END.fullmatch(flat)
    end = _TEXT_ENDS.get(match["end"]) if match else None
    return end if end in (None, "text_projection") else f"text_model_{end}"


def _prefix(part: Part, family: Family) -> str:
    """How kohya's names of a part start."""
    if part == "unet":
        return "lora_unet"
    return "lora_te2" if part == "text_encoder_2" else "lora_te1" if family == "sdxl" else "lora_te"
