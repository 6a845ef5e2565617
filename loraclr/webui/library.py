"""The user's LoRA folder: what is in it, and for which model family the webui believes each file to be."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraclr.keys import Family
from loraclr.webui import labels
from loraclr.webui.language import say
from loraclr.webui.surroundings import here

# The webui lists neither; ED-LoRA's files are of the first kind.
_UNLISTED = (".pth", ".bin")
_TAG = re.compile(r"<(?:lora|lyco):([^:>]+)(?::([^>]*))?>")


def names() -> list[str]:
    """Every LoRA by the name that `<lora:NAME:1>` takes; those that only we can read, by their file names."""
    every = {*(entry.name for entry in here().listed()), *(path.name for path in _unlisted())}
    return sorted(every, key=str.casefold)


def listed(family: Family | None = None, hidden: bool = True) -> list[str]:
    """Every LoRA's label for the list, see `loraclr.webui.labels`.

    With a family, those that the webui believes to be of another one are left out; without `hidden`, those in hidden
    folders. No LoRA is opened for that.
    """
    root = str(folder())
    found = [] if family not in (None, "sd1") else [(path.name, str(path), {}) for path in _unlisted()]
    found += [
        (entry.name, str(entry.path), entry.metadata)
        for entry in here().listed()
        if family in (None, entry.family or family)
    ]
    shown = (labels.of(*each[:2], root, each[2]) for each in found if hidden or not labels.hidden(each[1], root))
    return sorted(shown, key=str.casefold)


def labelled(chosen: Sequence[str]) -> list[str]:
    """These LoRAs' labels as they are now; one that is gone keeps its name."""
    root, now = str(folder()), []
    for name in map(labels.name_of, chosen):
        entry = here().found(name)
        if entry is not None:
            now.append(labels.of(name, str(entry.path), root, entry.metadata))
        else:
            path = next((path for path in _unlisted() if path.name == name), None)
            now.append(name if path is None else labels.of(name, str(path), root, {}))
    return now


class Gone(ValueError):
    """A LoRA that is not in the folder, as far as the list of it knows."""


def refresh() -> None:
    """Look into the LoRA folder again."""
    here().refresh()


def path_of(name: str) -> Path:
    """The file of a LoRA. Raises Gone if there is none."""
    entry = here().found(name)
    path = entry.path if entry is not None else next((p for p in _unlisted() if p.name == name), None)
    if path is None or not path.is_file():
        raise Gone(say("{name} is no longer in the LoRA folder; press the refresh button and choose again.", name=name))
    return path


def folder_of(name: str) -> str:
    """The folder of a LoRA below the LoRA folder, with a slash before it; "" for one that lies directly there."""
    entry = here().found(name)
    place = "" if entry is None else labels.folder(str(entry.path), str(folder()))
    return f"/{place}" if place else ""


def believed(name: str) -> Family | None:
    """The family that the webui takes a LoRA to be of, by its metadata; None if it does not know."""
    entry = here().found(name)
    return None if entry is None else entry.family


def recipe(name: str | None) -> dict[str, Any]:
    """How a LoRA was merged here, {} for any other one."""
    entry = here().found(name) if name else None
    told = {} if entry is None else entry.metadata.get("loraclr.recipe", {})
    if isinstance(told, str):  # the webui has decoded what looks like JSON, but not in every version
        try:
            told = json.loads(told)
        except ValueError:
            return {}
    return told if isinstance(told, dict) and isinstance(told.get("concepts"), list) else {}


def loaded_family() -> Family | None:
    """The family of the checkpoint that is loaded now; None if none is, or one of another kind."""
    return here().family()


def missing_checkpoint() -> str:
    """The folder where a checkpoint belongs, if there is none yet; "" if there is one."""
    return here().missing_checkpoint()


def loaded_name() -> str:
    """The name of the checkpoint that is loaded now, "" if none is."""
    return here().checkpoint()


def named_in(prompt: str) -> dict[str, tuple[float, float | None]]:
    """The LoRAs that a prompt's tags name, with their weights for the UNet and, where it is another, the text encoder.

    As the webui reads ``<lora:NAME:TE:UNET>`` and ``<lora:NAME:te=…:unet=…>``; a name may be an alias.
    """
    found = {}
    for tag in _TAG.finditer(prompt):
        entry = here().meant(tag[1])
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
    return here().files(_UNLISTED)


def folder() -> Path:
    """Where the webui's LoRAs are."""
    return here().folder()
