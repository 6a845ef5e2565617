"""What a LoRA is: its layers, each an exact change of weight, and how the tensors of a file become them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraclr import embeddings, formats, keys
from loraclr.formats import Change, Incomplete, Layer, Parts
from loraclr.formats.change import finite, in_words
from loraclr.formats.scaling import Scaling

__all__ = ["Change", "Layer", "LoRA", "LoRAFormatError", "parse", "trigger_from"]


class LoRAFormatError(ValueError):
    """A file that cannot be read as a LoRA; the message is one sentence for the user."""


@dataclass(frozen=True)
class LoRA:
    """A LoRA file's content: layers by canonical name (see `loraclr.keys`), metadata, and the keys nobody understood.

    activation is the activation text that the user has noted for the file, "" if none. embeddings are words that the
    file brings along: name → encoder → (tokens, width). layer_embeddings are ED-LoRA's: name → (16, width), one vector
    for each cross-attention layer in the order in which the UNet calls them.
    """

    name: str
    path: Path | None
    family: keys.Family
    layers: dict[str, Change]
    metadata: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    activation: str = ""
    embeddings: embeddings.Embeddings = field(default_factory=dict)
    layer_embeddings: dict[str, Tensor] = field(default_factory=dict)

    @property
    def words(self) -> embeddings.Embeddings:
        """The words that the file brings along with one embedding each: of one for each layer their mean."""
        means = {word: {"clip_l": vectors.mean(0, keepdim=True)} for word, vectors in self.layer_embeddings.items()}
        return {**self.embeddings, **means}

    def check_fits(self, layer_name: str, weight: Tensor) -> None:
        """Raise ValueError, one sentence with both shapes, if a layer's change does not fit the model's weight."""
        layer, there = self.layers[layer_name], tuple(weight.shape)
        if not layer.fits(there):
            raise ValueError(
                f"{self.name} does not fit the loaded model: its {layer_name} is {in_words(layer.size)}, "
                f"the model's {in_words((there[0], math.prod(there[1:])))}. It was made for another model family."
            )
        if layer.bias is not None and len(layer.bias) != there[0]:
            raise ValueError(
                f"{self.name} does not fit the loaded model: its {layer_name} has {len(layer.bias)} biases, the "
                f"model's {there[0]}. It was made for another model family."
            )

    def triggers(self) -> str:
        """What most likely calls the concept: the user's note, the metadata's, the words that come along, or ""."""
        return self.activation or trigger_from(self.metadata) or " ".join([*self.layer_embeddings, *self.embeddings])


def tags_from(metadata: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """``ss_tag_frequency``: training folder → tag → count; what is no such thing in it is left out.

    As JSON, or already decoded, as the webui has it.
    """
    folders = metadata.get("ss_tag_frequency")
    try:
        folders = json.loads(folders) if isinstance(folders, str) else folders
    except (ValueError, RecursionError):  # no JSON, a number without end, or brackets without end
        return {}
    return {
        folder: {tag.strip(): n for tag, n in tags.items() if isinstance(n, int) and tag.strip()}
        for folder, tags in (folders.items() if isinstance(folders, dict) else ())
        if isinstance(tags, dict)
    }


def trigger_from(metadata: Mapping[str, Any]) -> str:
    """``modelspec.trigger_phrase``, else the most frequent training tag of ``ss_tag_frequency``, else ""."""
    phrase = str(metadata.get("modelspec.trigger_phrase", "")).strip()
    if phrase:
        return phrase
    counts: Counter[str] = Counter()
    for tags in tags_from(metadata).values():
        counts.update(tags)
    return counts.most_common(1)[0][0] if counts else ""


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str, path: Path | None = None) -> LoRA:
    """Read the tensors of a LoRA file, of any kind in `loraclr.formats` and under any names in `loraclr.keys`.

    A layer whose scale neither alpha nor the metadata tell has scale 1. Raises LoRAFormatError, one sentence that names
    the file, for everything that is no such LoRA; keys that are not understood are listed in `LoRA.unused`.
    """
    title = path.name if path is not None else name
    if not tensors:
        raise LoRAFormatError(f"{title} is empty; choose a LoRA file.")
    try:
        family = keys.detect_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata)
    except ValueError as model:
        raise LoRAFormatError(f"{title} is a LoRA for {model}; only SD 1.x, SD 2.x and SDXL can be merged.") from model
    words, unused = embeddings.read(tensors, family)
    grouped, sources, lost = _grouped(tensors, family, title)
    unused += lost
    scaling = Scaling(metadata)
    layers: dict[str, Change] = {}
    for names, parts in grouped.items():
        changes, used = _changes(names, parts, sources[names], scaling, title)
        for layer_name in changes.keys() & layers.keys():
            raise LoRAFormatError(f"{title} has {layer_name} twice, alone and fused; save it again with one of them.")
        layers |= changes
        unused += [source for suffix, source in sources[names].items() if suffix not in used]
    if not layers:
        raise LoRAFormatError(f"{title} {_what_else(unused)}; choose a LoRA file.")
    return LoRA(name, path, family, layers, dict(metadata), tuple(sorted(unused)), embeddings=words)


#: The layers that one group of tensors changes: one, or q, k and v where the file has them fused.
Names = tuple[str, ...]


def _grouped(
    tensors: Mapping[str, Tensor], family: keys.Family, title: str
) -> tuple[dict[Names, dict[str, Tensor]], dict[Names, dict[str, str]], list[str]]:
    """Tensors by layer and suffix, the keys that they come from, and the keys that no layer has."""
    grouped: dict[Names, dict[str, Tensor]] = {}
    sources: dict[Names, dict[str, str]] = {}
    unused = []
    for key, tensor in tensors.items():
        if key.startswith(embeddings.PREFIX):
            continue
        split = formats.split(key)
        names = None if split is None else _names(split[0], family)
        if split is None or names is None:
            unused.append(key)
            continue
        suffix = split[1]
        before = sources.setdefault(names, {}).setdefault(suffix, key)
        if before != key:
            raise LoRAFormatError(
                f"{title} has one layer twice, as {before} and {key}; save it again with one naming scheme."
            )
        grouped.setdefault(names, {})[suffix] = tensor
    return grouped, sources, unused


def _names(stem: str, family: keys.Family) -> Names | None:
    layer_name = keys.layer_name(stem, family)
    return keys.fused(stem, family) or (None if layer_name is None else (layer_name,))


def _changes(
    names: Names, tensors: Mapping[str, Tensor], sources: Mapping[str, str], scaling: Scaling, title: str
) -> tuple[dict[str, Change], frozenset[str]]:
    """What a group of tensors changes, and the suffixes of it; every ValueError becomes a sentence about the file."""
    layer_name = " + ".join(names)
    alpha = tensors.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise LoRAFormatError(
            f"{title} is damaged: {layer_name}.alpha has shape {tuple(alpha.shape)} instead of one number;"
            " get the file again."
        )
    some = next((suffix for suffix in sources if suffix != "alpha"), "alpha")
    stem = formats.split(sources[some])[0]
    glora = formats.GLoRA.marks.issubset(tensors)
    parts = Parts(tensors, lambda rank: scaling.of(stem, alpha, rank, glora))
    if any(kind.claims(parts) for kind in formats.KINDS):
        _check_values(layer_name, tensors, title)
    try:
        change, used = formats.read(parts)
    except Incomplete as suffix:
        raise LoRAFormatError(f"{title} is incomplete: {layer_name} has no {suffix}; get the file again.") from suffix
    except ValueError as error:
        raise LoRAFormatError(f"{title} is damaged: in {layer_name}, {error}; get the file again.") from error
    if change is None or len(names) == 1:
        return {name: change for name in names if change is not None}, used
    try:
        return {name: change.rows(part, len(names)) for part, name in enumerate(names)}, used
    except ValueError as error:
        raise LoRAFormatError(f"{title} cannot be read: in {layer_name}, {error}; leave it out.") from error


def _check_values(layer_name: str, tensors: Mapping[str, Tensor], title: str) -> None:
    """Refuse number formats that are no weights, and NaN."""
    for suffix, tensor in tensors.items():
        if tensor.dtype not in _READABLE and suffix not in ("alpha", "on_input"):
            raise LoRAFormatError(
                f"{title} cannot be read: {layer_name}.{suffix} is {str(tensor.dtype).removeprefix('torch.')};"
                " save it as float16."
            )
        if not tensor.is_meta and not finite(tensor):
            raise LoRAFormatError(
                f"{title} is damaged: {layer_name}.{suffix} holds NaN or infinite values;"
                " use another epoch or copy of this LoRA."
            )


_READABLE = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}

_NOT_A_LORA = [
    (re.compile(r"^(emb_params|clip_[gl]|string_to_param.*)$"), "is a textual inversion embedding, not a LoRA"),
    (re.compile(r"^(control_model\.|controlnet_|input_hint_block)"), "is a ControlNet, not a LoRA"),
    (re.compile(r"^(model\.diffusion_model\.|cond_stage_model\.|conditioner\.)"), "is a checkpoint, not a LoRA"),
    (
        re.compile(r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv_in|conv_out)(_block)?"),
        "is a VAE, not a LoRA",
    ),
    (re.compile(r"\.(oft_R|boft_R|ia3_l)\b"), "is PEFT's OFT, BOFT or IA3, which are not read"),
    (re.compile(r"\.lambda_layer$"), "is a T-LoRA, which is not read"),
    (re.compile(r"^(unet\.)?(down_blocks|up_blocks|mid_block|conv_in|conv_out)\."), "is a UNet, not a LoRA"),
    (re.compile(r"^(text_encoder\.)?text_model\."), "is a text encoder, not a LoRA"),
]


def _what_else(keys_in_it: list[str]) -> str:
    """What a file is that holds no LoRA layers."""
    for pattern, kind in _NOT_A_LORA:
        if any(pattern.search(key) for key in keys_in_it):
            return kind
    return "holds no LoRA layers"
