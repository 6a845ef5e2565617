"""The name of the merged LoRA: which ones may be used, and what an unnamed one is called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from loraclr.files import UNUSABLE
from loraclr.webui import library
from loraclr.webui.language import say
from loraclr.webui.surroundings import here

# Refused on some system.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_LONGEST = 120  # characters of a name
_BYTES = 230  # of a name; file systems allow 255, and ".safetensors" or ".preview.png" comes behind it


def path_for(name: str, sources: Sequence[str], replace: bool) -> Path:
    """Where to write a merged LoRA: always directly in the LoRA folder.

    An empty name is made up from the sources'. Raises ValueError, one sentence, for a name that cannot be used, or that
    is taken: a file is replaced only if `replace` is set, and never one of the sources.
    """
    name = name.strip().removesuffix(".safetensors")
    folder = library.folder()
    if not name:
        return folder / f"{_made_up(sources)}.safetensors"
    unusable = sorted(set(UNUSABLE.findall(name)))
    if unusable:
        shown = " ".join(char if char.isprintable() else repr(char) for char in unusable)
        raise ValueError(say("The name must not contain {signs}; choose another one.", signs=shown))
    if name.startswith(".") or name.endswith((".", " ")) or _DEVICES.fullmatch(name):
        raise ValueError(say('"{name}" cannot be used as a file name; choose another one.', name=name))
    fits = _cut(name)
    if fits != name:
        raise ValueError(
            say("The name is {count} characters long; use at most {most}.", count=len(name), most=len(fits))
        )
    path = folder / f"{name}.safetensors"
    if name in sources or any(_is(path, source) for source in sources):
        raise ValueError(say("{name} is one of the LoRAs to merge; choose another name for the result.", name=name))
    if path.exists() and not replace:
        raise ValueError(
            say('{file} exists already; choose another name, or tick "Replace an existing file".', file=path.name)
        )
    listed = here().found(name)
    if listed is not None and listed.path.resolve() != path.resolve():
        raise ValueError(
            say("Another LoRA is already listed as {name} ({file}); choose another name.", name=name, file=listed.path)
        )
    return path


def _is(path: Path, source: str) -> bool:
    """Whether there is a file that is this LoRA's, which another name may mean where case makes no difference."""
    listed = here().found(source)
    return listed is not None and path.exists() and listed.path.exists() and path.samefile(listed.path)


def _made_up(sources: Sequence[str]) -> str:
    """A free name, after the LoRAs that are merged."""
    base = _cut(UNUSABLE.sub("_", "-".join(sources)), room=8).strip(" .") or "merged"
    taken = {entry.name.casefold() for entry in here().listed()}
    number, name = 1, base
    while name.casefold() in taken or (library.folder() / f"{name}.safetensors").exists():
        number += 1
        name = f"{base}-{number}"
    return name


def _cut(name: str, room: int = 0) -> str:
    """The beginning of a name, as much as a file's name takes with so many more signs behind it."""
    return name[: _LONGEST - room].encode(errors="ignore")[: _BYTES - room].decode(errors="ignore")
