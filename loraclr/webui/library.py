"""The user's LoRA folder: what is in it, and for which model family the webui believes each file to be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from loraclr.keys import Family
from loraclr.webui.surroundings import here

# The webui lists neither; ED-LoRA's files are of the first kind.
_UNLISTED = (".pth", ".bin")
_TAG = re.compile(r"<(?:lora|lyco):([^:>]+)(?::([^>]*))?>")


def names(family: Family | None = None) -> list[str]:
    """Every LoRA by the name that `<lora:NAME:1>` takes; those that only we can read, by their file names.

    With a family, those that the webui believes to be of another one are left out. Nothing is opened for that.
    """
    listed = [entry.name for entry in here().listed() if family in (None, entry.family or family)]
    more = [path.name for path in _unlisted()] if family in (None, "sd1") else []
    return sorted({*listed, *more}, key=str.casefold)


def refresh() -> None:
    """Look into the LoRA folder again."""
    here().refresh()


def path_of(name: str) -> Path:
    """The file of a LoRA. Raises ValueError if it is gone."""
    entry = here().found(name)
    path = entry.path if entry is not None else next((p for p in _unlisted() if p.name == name), None)
    if path is None or not path.is_file():
        raise ValueError(f"{name} is no longer in the LoRA folder; press the refresh button and choose again.")
    return path


def believed(name: str) -> Family | None:
    """The family that the webui takes a LoRA to be of, by its metadata; None if it does not know."""
    entry = here().found(name)
    return None if entry is None else entry.family


def loaded_family() -> Family | None:
    """The family of the checkpoint that is loaded now; None if none is, or one of another kind."""
    return here().family()


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
