"""The user's LoRA folder: what is in it, and for which model family the webui believes each file to be."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networks  # the webui's own LoRA extension
from modules import sd_models, shared

from loraclr.keys import Family
from loraclr.webui import labels
from loraclr.webui.language import say

# The webui lists neither; ED-LoRA's files are of the first kind.
_UNLISTED = (".pth", ".bin")
_VERSIONS: dict[str, Family] = {"SD1": "sd1", "SD2": "sd2", "SDXL": "sdxl"}
_TAG = re.compile(r"<(?:lora|lyco):([^:>]+)(?::([^>]*))?>")


def names() -> list[str]:
    """Every LoRA by the name that `<lora:NAME:1>` takes; those that only we can read, by their file names."""
    return sorted({*networks.available_networks, *(path.name for path in _unlisted())}, key=str.casefold)


def listed(family: Family | None = None, hidden: bool = True) -> list[str]:
    """Every LoRA's label for the list, see `loraclr.webui.labels`.

    With a family, those that the webui believes to be of another one are left out; without `hidden`, those in hidden
    folders. No LoRA is opened for that.
    """
    root = str(folder())
    found = [] if family not in (None, "sd1") else [(path.name, str(path), {}) for path in _unlisted()]
    for name, entry in list(networks.available_networks.items()):
        if family in (None, believed(name) or family):
            found.append((name, entry.filename, entry.metadata))
    shown = (labels.of(*each[:2], root, each[2]) for each in found if hidden or not labels.hidden(each[1], root))
    return sorted(shown, key=str.casefold)


def labelled(chosen: Sequence[str]) -> list[str]:
    """These LoRAs' labels as they are now; one that is gone keeps its name."""
    root, now = str(folder()), []
    for name in map(labels.name_of, chosen):
        entry = networks.available_networks.get(name)
        if entry is not None:
            now.append(labels.of(name, entry.filename, root, entry.metadata))
        else:
            path = next((path for path in _unlisted() if path.name == name), None)
            now.append(name if path is None else labels.of(name, str(path), root, {}))
    return now


def refresh() -> None:
    """Look into the LoRA folder again."""
    networks.list_available_networks()


def path_of(name: str) -> Path:
    """The file of a LoRA. Raises ValueError if it is gone."""
    entry = networks.available_networks.get(name)
    path = Path(entry.filename) if entry is not None else next((p for p in _unlisted() if p.name == name), None)
    if path is None or not path.is_file():
        raise ValueError(
            say("{name} is no longer in the LoRA folder; press the refresh button and choose again.", name=name)
        )
    return path


def folder_of(name: str) -> str:
    """The folder of a LoRA below the LoRA folder, with a slash before it; "" for one that lies directly there."""
    entry = networks.available_networks.get(name)
    place = "" if entry is None else labels.folder(entry.filename, str(folder()))
    return f"/{place}" if place else ""


def believed(name: str) -> Family | None:
    """The family that the webui takes a LoRA to be of, by its metadata; None if it does not know."""
    entry = networks.available_networks.get(name)
    return None if entry is None else _VERSIONS.get(entry.sd_version.name)


def recipe(name: str | None) -> dict[str, Any]:
    """How a LoRA was merged here, {} for any other one."""
    entry = networks.available_networks.get(name)
    told = {} if entry is None else entry.metadata.get("loraclr.recipe", {})
    if isinstance(told, str):  # the webui has decoded what looks like JSON, but not in every version
        try:
            told = json.loads(told)
        except ValueError:
            return {}
    return told if isinstance(told, dict) and isinstance(told.get("concepts"), list) else {}


def loaded_family() -> Family | None:
    """The family of the checkpoint that is loaded now; None if none is, or one of another kind."""
    model = sd_models.model_data.sd_model
    for family in ("sdxl", "sd2", "sd1"):
        if model is not None and getattr(model, f"is_{family}", False):
            return family
    return None


def missing_checkpoint() -> str:
    """The folder where a checkpoint belongs, if there is none yet; "" if there is one."""
    return "" if sd_models.checkpoints_list else shared.cmd_opts.ckpt_dir or sd_models.model_path


def loaded_name() -> str:
    """The name of the checkpoint that is loaded now, "" if none is."""
    model = sd_models.model_data.sd_model
    return "" if model is None else model.sd_checkpoint_info.name_for_extra


def named_in(prompt: str) -> dict[str, tuple[float, float | None]]:
    """The LoRAs that a prompt's tags name, with their weights for the UNet and, where it is another, the text encoder.

    As the webui reads ``<lora:NAME:TE:UNET>`` and ``<lora:NAME:te=…:unet=…>``; a name may be an alias.
    """
    found = {}
    for tag in _TAG.finditer(prompt):
        entry = networks.available_network_aliases.get(tag[1])
        text, unet = _weights((tag[2] or "").split(":"))
        found[tag[1] if entry is None else entry.name] = (unet, None if text == unet else text)
    return found


def _weights(words: Sequence[str]) -> tuple[float, float]:
    """Strength for the text encoder and the UNet, from what stands behind a tag's name; 1 for what is no number."""
    named = dict(word.split("=", 1) for word in words if "=" in word)
    plain = [word for word in words if word and "=" not in word]
    text = _number(named.get("te", plain[0] if plain else ""), 1.0)
    return text, _number(named.get("unet", plain[1] if len(plain) > 1 else ""), text)


def _number(word: str, otherwise: float) -> float:
    try:
        return float(word)
    except ValueError:
        return otherwise


def _unlisted() -> list[Path]:
    return [Path(path) for path in shared.walk_files(folder(), allowed_extensions=_UNLISTED)]


def folder() -> Path:
    """Where the webui's LoRAs are."""
    return Path(shared.cmd_opts.lora_dir)
