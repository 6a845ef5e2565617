"""LoRA files: reading with one clear sentence for whatever is wrong, and writing what A1111 and Forge understand."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraclr import edlora, embeddings, pickled
from loraclr.formats import Norm
from loraclr.formats.change import finite
from loraclr.formats.scaling import PEFT_CONFIG
from loraclr.keys import Family
from loraclr.lora import Layer, LoRA, LoRAFormatError, parse, tags_from

VERSION = "0.1.0"

# What the webui calls the families in a sidecar and, by metadata, in its Lora tab.
SD_VERSION: dict[Family, str] = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
_BASE_MODEL: dict[Family, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURE: dict[Family, str] = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}
_IMPLEMENTATION: dict[Family, str] = {
    "sd1": "diffusers",
    "sd2": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}

#: Refused in a file's name on some system, or by the webui's <lora:NAME:1>.
UNUSABLE = re.compile(r'[\\/:*?"<>|\x00-\x1f]')


def load(path: str | os.PathLike[str]) -> LoRA:
    """Read a LoRA from a .safetensors file, or from one of PyTorch's own without running what may be in it.

    PEFT's adapter_config.json beside an adapter_model.safetensors tells its scale. Raises LoRAFormatError with one
    sentence that names the file, what is wrong with it and what to do.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise LoRAFormatError(f"{path.name} {what} ({path}); choose a .safetensors file.")
    lora = _from_torch(path) if path.suffix.lower() in pickled.SUFFIXES else _from_safetensors(path)
    return replace(lora, activation=activation_text(path))


def _from_safetensors(path: Path) -> LoRA:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file handle, not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LoRAFormatError(f"{path.name} {_why_unreadable(path)}") from error
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        metadata = {PEFT_CONFIG: config.read_text(encoding="utf-8"), **metadata}
    return parse(tensors, metadata, path.stem, path)


def _from_torch(path: Path) -> LoRA:
    content = pickled.load(path)
    if edlora.is_edlora(content):
        return edlora.read(content, path.stem, path)
    nested = content.get("state_dict")
    flat = nested if isinstance(nested, dict) else content
    tensors = {str(key): tensor for key, tensor in flat.items() if isinstance(tensor, Tensor)}
    return parse(tensors, {}, path.stem, path)


def save(
    path: str | os.PathLike[str],
    layers: Mapping[str, Layer | Norm],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
    words: embeddings.Embeddings | None = None,
    apart: Path | None = None,
) -> Path:
    """Write layers under kohya's and LyCORIS' names as a .safetensors file, all or nothing.

    words: embeddings to bundle; apart: a folder to write them to instead, as `save_embeddings` does. The hashes that
    the webui trusts are computed as kohya does, after the cast, and title and output name default to the file's. The
    file appears complete under its name or not at all. Raises FileExistsError if it exists and `overwrite` is not set;
    ValueError for values that are not finite in `dtype`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} must end in .safetensors")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path.name} exists already; choose another name or allow overwriting.")
    wrong = sorted(key for key, value in metadata.items() if not isinstance(value, str))
    if wrong:
        raise ValueError(f"metadata values must be str; these are not: {', '.join(wrong)}")
    tensors = _tensors(layers, dtype)
    bundled = embeddings.bundle(words or {}) if apart is None else {}
    tensors |= {key: _cast(tensor, dtype, key) for key, tensor in bundled.items()}
    metadata = {"ss_output_name": path.stem, "modelspec.title": path.stem, **metadata}
    metadata |= _hashes(tensors, metadata)
    content = safetensors.torch.save(tensors, metadata)
    if apart is not None:
        save_embeddings(apart, words or {}, overwrite)
    _write(path, content)
    return path


def lora_metadata(
    family: Family,
    layers: Mapping[str, Layer | Norm],
    sources: Sequence[LoRA],
    triggers: Sequence[str],
    recipe: Mapping[str, Any],
) -> dict[str, str]:
    """The metadata of a merged LoRA: what A1111, Forge and kohya's tools look for, and how it was made.

    sources: the merged LoRAs; triggers: the words that call their concepts; recipe: anything JSON can hold.
    """
    plain = [layer for layer in layers.values() if isinstance(layer, Layer) and layer.bias is None]
    ranks = {str(layer.rank) for layer in plain}
    alphas = {f"{layer.alpha:g}" for layer in plain}
    return {
        "ss_base_model_version": _BASE_MODEL[family],
        "ss_v2": str(family == "sd2"),
        "ss_network_module": "networks.lora" if len(plain) == len(layers) else "lycoris.kohya",
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
        "ss_tag_frequency": json.dumps(_tags(sources, triggers), ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _ARCHITECTURE[family],
        "modelspec.implementation": _IMPLEMENTATION[family],
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.merged_from": ", ".join(source.name for source in sources),
        "modelspec.trigger_phrase": ", ".join(trigger for trigger in triggers if trigger),
        "loraclr.recipe": json.dumps(recipe, ensure_ascii=False),
    }


def _tags(sources: Sequence[LoRA], triggers: Sequence[str]) -> dict[str, dict[str, int]]:
    """The sources' training tags, counts of equal ones added up, and the triggers: what A1111 shows on the card.

    It wants folders of tags with counts.
    """
    tags: dict[str, Counter[str]] = {"merge": Counter({trigger: 1 for trigger in triggers if trigger})}
    for source in sources:
        for folder, counts in tags_from(source.metadata).items():
            tags.setdefault(folder, Counter()).update(counts)
    return {folder: dict(counts) for folder, counts in tags.items()}


def save_embeddings(
    folder: str | os.PathLike[str], words: embeddings.Embeddings, overwrite: bool = False
) -> list[Path]:
    """Write each word as an embedding file of its own, named after it.

    Raises FileExistsError, before anything is written, if one is there and `overwrite` is not set, and ValueError for a
    word that can be no file's name.
    """
    paths = [Path(folder) / f"{word}.safetensors" for word in words]
    for path, word in zip(paths, words, strict=True):
        if path.name != f"{word}.safetensors" or word.startswith("."):
            raise ValueError(f"The word {word} cannot be the name of an embedding's file; bundle it instead.")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path.name} exists already; choose another name or allow overwriting.")
    Path(folder).mkdir(exist_ok=True)
    for path, encoders in zip(paths, words.values(), strict=True):
        _write(path, safetensors.torch.save(embeddings.alone(encoders)))
    return paths


def model_hash(path: Path) -> str:
    """What kohya and the webui know a LoRA by: SHA-256 of a safetensors file behind its header, else of the file."""
    return file_hash(path, past_header=path.suffix == ".safetensors")


def file_hash(path: Path, past_header: bool = False) -> str:
    """SHA-256 of a file; past_header: of what comes behind its safetensors header."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if past_header:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def annotate(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Add entries to the metadata of a .safetensors file, or replace them; all or nothing, tensors and hashes stay."""
    path = Path(path)
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors that begin at a multiple of 8
    _write(path, b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[begin:])))


#: The field of a sidecar by which we know it again: a digest of its other fields as we wrote them.
_OURS = "loraclr"


def write_sidecar(
    path: str | os.PathLike[str],
    activation_text: str,
    family: Family,
    notes: str = "",
    preferred_weight: float = 1.0,
) -> Path | None:
    """Write the webui's user metadata (<name>.json) beside a LoRA file.

    None, and nothing written, if there is one already; but one that was written here and not edited since, beside a
    file that has been replaced, is renewed.
    """
    sidecar = Path(path).with_suffix(".json")
    if sidecar.exists() and not _is_ours(sidecar):
        return None
    fields = {
        "description": "",
        "sd version": SD_VERSION[family],
        "activation text": activation_text,
        "preferred weight": preferred_weight,
        "negative text": "",
        "notes": notes,
    }
    fields[_OURS] = _digest(fields)
    _write(sidecar, json.dumps(fields, indent=4, ensure_ascii=False).encode())
    return sidecar


def _is_ours(sidecar: Path) -> bool:
    """Whether a sidecar is as we wrote it."""
    try:
        fields = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.pop(_OURS, None) == _digest(fields)


def _digest(fields: Mapping[str, Any]) -> str:
    # The webui's editor writes a weight of 1.0 as 1, and every field again.
    told = {key: float(value) if isinstance(value, int) else value for key, value in fields.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _tensors(layers: Mapping[str, Layer | Norm], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        f"{name}.{suffix}": _cast(tensor, dtype, name)
        for name, layer in layers.items()
        for suffix, tensor in _parts(layer).items()
    }


def _parts(layer: Layer | Norm) -> dict[str, Tensor]:
    """A layer's tensors by suffix.

    The webui knows a change of bias beside a full difference only, and wants both tensors of a norm layer.
    """
    if isinstance(layer, Norm):
        bias = torch.zeros_like(layer.weight) if layer.bias is None else layer.bias
        return {"w_norm": layer.weight, "b_norm": bias}
    kernel = layer.kernel if layer.conv else ()
    if layer.bias is not None:
        delta = layer.delta()
        return {"diff": delta.reshape(len(delta), -1, *kernel), "diff_b": layer.bias}
    return {
        "lora_up.weight": layer.up[:, :, None, None] if layer.conv else layer.up,
        "lora_down.weight": layer.down.reshape(layer.rank, -1, *kernel),
        "alpha": torch.tensor(layer.alpha),
    }


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not finite(tensor):
        raise ValueError(f"layer {name} holds NaN or infinite values, so the LoRA cannot be saved")
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if not finite(cast):
        largest = float(tensor.abs().max())
        short = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"layer {name} holds values up to {largest:.3g}, too large for {short}; save as bfloat16 or float32"
        )
    return cast


def _hashes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's two hashes: of the bytes behind the header, and of 64 KiB at 1 MiB, both with ss_ metadata only."""
    content = safetensors.torch.save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    header = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(content)[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def _write(path: Path, content: bytes) -> None:
    # In the same folder, so that the final rename is atomic; with an ending that the webui does not list, and short,
    # so that every name that the file system takes can be written.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def activation_text(path: str | os.PathLike[str]) -> str:
    """The user's activation text from the webui's sidecar; a missing or broken sidecar is no reason to fail."""
    try:
        fields = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    text = fields.get("activation text", "") if isinstance(fields, dict) else ""
    return text.strip() if isinstance(text, str) else ""


def _why_unreadable(path: Path) -> str:
    """The rest of a sentence about a file that safetensors does not accept."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            if 2 <= length <= size - 8 and start[8:9] == b"{":
                file.seek(8)
                entries = json.loads(file.read(length))
                end = max(
                    (entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0
                )
                if end > size - 8 - length:
                    return f"is cut off: {size} bytes of {8 + length + end} are there; download or copy it again."
    except OSError as error:
        return f"cannot be read ({error.strerror}); check its permissions."
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "is damaged: its safetensors header makes no sense; download or copy it again."
    if size == 0:
        return "is empty; download or copy it again."
    if start.startswith((b"PK", b"\x80")):
        return "is a pickle file, which could run code, and is not read; convert it to .safetensors."
    if start.startswith(b"version https://git-lfs"):
        return "is only a Git LFS pointer; download the file itself."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not a LoRA; download the file again, logged in if the site asks for it."
    if start[8:9] == b"{" and length > size - 8:
        return "is cut off within its header; download or copy it again."
    return "is not a safetensors file; choose a LoRA in .safetensors format."
