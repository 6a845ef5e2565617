"""What a LoRA is: its layers, each a pair of factors, and how the tensors of a file become them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from loraclr import keys


class LoRAFormatError(ValueError):
    """A file that cannot be read as a LoRA; the message is one sentence for the user."""


@dataclass(frozen=True)
class Layer:
    """One layer's change of weight, ΔW = alpha/rank · up @ down, as float32 factors.

    up: (o, r). down: (r, d), with d = channels · kernel height · kernel width for a convolution, flattened as
    ``weight.flatten(1)`` does. conv: whether the layer is a convolution, kernel: its size.
    """

    up: Tensor
    down: Tensor
    alpha: float
    conv: bool = False
    kernel: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0] or self.rank == 0:
            raise ValueError(f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} are not (o, r) and (r, d)")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """ΔW as a dense matrix (o, d)."""
        return self.scale * (self.up @ self.down)


@dataclass(frozen=True)
class LoRA:
    """A LoRA file's content: layers by canonical name (see `loraclr.keys`), metadata, and the keys nobody understood.

    activation is the activation text that the user has noted for the file, "" if none.
    """

    name: str
    path: Path | None
    family: keys.Family
    layers: dict[str, Layer]
    metadata: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    activation: str = ""

    def triggers(self) -> str:
        """The text that most likely calls the concept: the user's own note, else what the metadata tells, else ""."""
        return self.activation or trigger_from(self.metadata)


def trigger_from(metadata: Mapping[str, str]) -> str:
    """``modelspec.trigger_phrase``, else the most frequent training tag of ``ss_tag_frequency``, else ""."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return phrase
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except json.JSONDecodeError:
        return ""
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        if isinstance(tags, dict):
            counts.update({tag.strip(): n for tag, n in tags.items() if isinstance(n, int) and tag.strip()})
    return counts.most_common(1)[0][0] if counts else ""


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str, path: Path | None = None) -> LoRA:
    """Read the tensors of a LoRA file.

    Understood are Linear and convolution LoRAs under kohya's, diffusers', PEFT's and ComfyUI's key names. A layer
    without alpha has scale 1. Raises LoRAFormatError, one sentence that names the file, for everything that is not such
    a LoRA; keys that are not understood and hurt nobody are listed in `LoRA.unused`.
    """
    title = path.name if path is not None else name
    _refuse_foreign(tensors, title)
    try:
        family = keys.detect_family({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except ValueError as model:
        raise LoRAFormatError(f"{title} is a LoRA for {model}; only SD 1.x, SD 2.x and SDXL can be merged.") from model

    grouped: dict[str, dict[str, Tensor]] = {}
    sources: dict[tuple[str, str], str] = {}
    unused = []
    for key, tensor in tensors.items():
        place = keys.canonical(key, family)
        if place is None:
            unused.append(key)
            continue
        if place in sources:
            raise LoRAFormatError(
                f"{title} has one layer twice, as {sources[place]} and {key}; save it again with one naming scheme."
            )
        sources[place] = key
        stem, suffix = place
        grouped.setdefault(stem, {})[suffix] = tensor

    layers = {}
    for stem, parts in grouped.items():
        if "lora_up.weight" in parts or "lora_down.weight" in parts:
            layer = _layer(stem, parts, title)
            if "alpha" not in parts:
                layer = replace(layer, alpha=_peft_alpha(sources[stem, "lora_up.weight"], layer.rank, metadata))
            layers[stem] = layer
        else:
            unused.extend(sources[stem, suffix] for suffix in parts)
    if not layers:
        raise LoRAFormatError(f"{title} holds no LoRA layers; choose a LoRA file.")
    return LoRA(name, path, family, layers, dict(metadata), tuple(sorted(unused)))


def _layer(stem: str, parts: Mapping[str, Tensor], title: str) -> Layer:
    for side in ("up", "down"):
        if f"lora_{side}.weight" not in parts:
            raise LoRAFormatError(f"{title} is incomplete: {stem} has no lora_{side}.weight; get the file again.")
    for suffix, tensor in parts.items():
        if tensor.dtype not in _READABLE and suffix != "alpha":
            raise LoRAFormatError(
                f"{title} cannot be read: {stem}.{suffix} is {str(tensor.dtype).removeprefix('torch.')};"
                " save it as float16."
            )
        if not torch.isfinite(tensor.float()).all():
            raise LoRAFormatError(
                f"{title} is damaged: {stem}.{suffix} holds NaN or infinite values;"
                " use another epoch or copy of this LoRA."
            )
    up, down, mid = (parts.get(f"lora_{side}.weight") for side in ("up", "down", "mid"))
    up, down = up.to(torch.float32, copy=True), down.to(torch.float32, copy=True)
    conv = up.ndim == 4 or down.ndim == 4
    if mid is not None and mid.ndim == 4 and mid.shape[1] == down.shape[0] and down.shape[2:] in ((), (1, 1)):
        # Tucker form: 1×1 down, k×k mid, 1×1 up. The first two make one k×k down.
        down = torch.einsum("abkl,bd->adkl", mid.float(), down.flatten(1))
        conv = True
    kernel = tuple(down.shape[2:]) if down.ndim == 4 else (1, 1)
    fits = (
        up.ndim in (2, 4) and down.ndim in (2, 4) and up.shape[2:] in ((), (1, 1)) and 0 not in (*up.shape, *down.shape)
    )
    if not fits or up.shape[1] != down.shape[0]:
        raise LoRAFormatError(
            f"{title} is damaged: in {stem}, lora_up {tuple(up.shape)} and lora_down {tuple(down.shape)} do not fit"
            " together; get the file again."
        )
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise LoRAFormatError(
            f"{title} is damaged: {stem}.alpha has shape {tuple(alpha.shape)} instead of one number;"
            " get the file again."
        )
    return Layer(up.flatten(1), down.flatten(1), float(up.shape[1] if alpha is None else alpha), conv, kernel)


def _peft_alpha(key: str, rank: int, metadata: Mapping[str, str]) -> float:
    """The alpha of a layer that has none: PEFT's, if diffusers has stored it in the metadata, else the rank."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        part, _, module = re.sub(r"\.lora_B(\.\w+)?\.weight$", "", key).partition(".")
        alpha = config.get(f"{part}.lora_alpha", rank)
        for pattern, own in (config.get(f"{part}.alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = own
                break
        # Rank-stabilised LoRA divides by the root of the rank instead of the rank.
        return float(alpha) * (math.sqrt(rank) if config.get(f"{part}.use_rslora") else 1.0)
    except (ValueError, TypeError, AttributeError, re.error):
        return float(rank)


_READABLE = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}

# Formats that change a layer in another way than up @ down. Ignoring one silently would change the picture.
_FORMATS = [
    (re.compile(r"\.hada_(w|t)\d"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.dora_scale$|lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.on_input$|\.ia3_l(\.|$)"), "IA3"),
    (re.compile(r"\.oft_|\.boft_|\.oft_R\."), "OFT"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA"),
    (re.compile(r"\.(diff|diff_b|set_weight)$"), "full-difference"),
    (re.compile(r"\.(w_norm|b_norm)$"), "norm"),
    (re.compile(r"lora_(up|B(\.\w+)?)\.bias$"), "biased LoRA"),
]
_NOT_A_LORA = [
    (re.compile(r"^(emb_params|clip_[gl]|string_to_param.*)$"), "a textual inversion embedding"),
    (re.compile(r"^(control_model\.|controlnet_|input_hint_block)"), "a ControlNet"),
    (re.compile(r"^(model\.diffusion_model\.|cond_stage_model\.|conditioner\.)(?!.*lora)"), "a checkpoint"),
    (re.compile(r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv_in|conv_out)(_block)?"), "a VAE"),
    (re.compile(r"^(unet\.)?(down_blocks|up_blocks|mid_block|conv_in|conv_out)\.(?!.*(lora|alpha$))"), "a UNet"),
    (re.compile(r"^(text_encoder\.)?text_model\.(?!.*(lora|alpha$))"), "a text encoder"),
]


def _refuse_foreign(tensors: Mapping[str, Tensor], title: str) -> None:
    if not tensors:
        raise LoRAFormatError(f"{title} is empty; choose a LoRA file.")
    for key in tensors:
        for pattern, kind in _FORMATS:
            if pattern.search(key):
                raise LoRAFormatError(
                    f"{title} is of the {kind} format ({key}), which cannot be merged yet;"
                    " leave it out or convert it to a plain LoRA."
                )
    if any(keys.canonical(key) is not None for key in tensors):
        return
    for pattern, kind in _NOT_A_LORA:
        if any(pattern.search(key) for key in tensors):
            raise LoRAFormatError(f"{title} is {kind}, not a LoRA; choose a LoRA file.")
