"""A folder of LoRAs, listed without any webui."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loraclr.keys import Family
from loraclr.webui.surroundings import Listed

_SUFFIXES = (".safetensors", ".pt", ".ckpt")


class Listing:
    """The LoRAs of a folder and its sub-folders, as they were at the last `refresh`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[tuple[Path, int], Mapping[str, Any]] = {}
        self.entries: dict[str, Listed] = {}
        self.refresh()

    def files(self, suffixes: tuple[str, ...]) -> list[Path]:
        """Those with these endings; nothing hidden."""
        return sorted(
            path
            for path in self.folder.rglob("*")
            if path.suffix.lower() in suffixes
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(self.folder).parts)
        )

    def refresh(self) -> None:
        """Look again. Of several files of one name the first has it, the others are named with folder or ending too."""
        entries: dict[str, Listed] = {}
        for path in sorted(self.files(_SUFFIXES), key=lambda path: (len(path.parts), path.suffix != ".safetensors")):
            place = path.relative_to(self.folder)
            names = path.stem, place.with_suffix("").as_posix(), place.as_posix()
            name = next((name for name in names if name not in entries), str(path))
            metadata = self._header(path)
            entries[name] = Listed(name, path, metadata, _family(metadata))
        self.entries = entries

    def meant(self, word: str) -> Listed | None:
        """The one of this name, or that its trainer named so."""
        if word in self.entries:
            return self.entries[word]
        return next((entry for entry in self.entries.values() if entry.metadata.get("ss_output_name") == word), None)

    def _header(self, path: Path) -> Mapping[str, Any]:
        """A file's metadata; {} for one that has none, or that cannot be read, which its row will tell."""
        try:
            known = path, path.stat().st_mtime_ns
            if known not in self._headers:
                with safe_open(path, framework="pt") as file:
                    self._headers[known] = file.metadata() or {}
        except (SafetensorError, OSError):
            return {}
        return self._headers[known]


def notes(path: Path) -> Mapping[str, Any]:
    """The user's notes in the .json beside a LoRA."""
    try:
        noted = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _family(metadata: Mapping[str, Any]) -> Family | None:
    """By what trainers note; not by what is in the file."""
    base = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    if "sdxl" in base or "diffusion-xl" in base:
        return "sdxl"
    if metadata.get("ss_v2") == "True" or "sd_v2" in base or "diffusion-v2" in base:
        return "sd2"
    return "sd1" if "sd_v1" in base or "diffusion-v1" in base else None
