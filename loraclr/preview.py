"""The picture on a merged LoRA's card: its concepts as the merged file draws them."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loraclr.capture import applied
from loraclr.hosts import Host
from loraclr.plan import Settings
from loraclr.prompts import filled
from loraclr.result import Merge

#: What the webui takes for a LoRA's picture, with or without ".preview" before it.
_ENDINGS = ("png", "jpg", "jpeg", "webp", "gif", "avif")
MOST = 4  # concepts
#: By which a picture is known as one of ours.
_SIGNATURE = ("Software", "LoRACLR Merge")
_SEED = 10_000  # noise that the merge has not seen


def drawn(host: Host, merge: Merge, settings: Settings) -> Image.Image:
    """The merge's first concepts side by side, each by its first prompt."""
    side, modules = settings.size or host.size, host.layers()
    texts = [filled(concept.trigger, concept.kind, concept.prompts)[0] for concept in merge.concepts[:MOST]]
    with (
        host.session(),
        host.words(merge.words) if merge.words else nullcontext(),
        applied(modules, merge.changes(modules)),
    ):
        return sheet(host.sample(texts, _SEED, settings.steps, settings.guidance, side, side))


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in two columns; one alone as it is."""
    width, height = pictures[0].size
    columns = min(len(pictures), 2)
    whole = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for place, picture in enumerate(pictures):
        whole.paste(picture, (place % columns * width, place // columns * height))
    return whole


def save(picture: Image.Image, path: Path) -> Path | None:
    """Write the picture beside a LoRA file; None, and nothing written, if that has one that was not written here."""
    if not wanted(path):
        return None
    place = path.with_suffix(".preview.png")
    signed = PngInfo()
    signed.add_text(*_SIGNATURE)
    temporary = place.with_name(f".{place.name}.tmp")  # half a picture would be taken for the user's
    try:
        picture.save(temporary, "png", pnginfo=signed)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
    return place


def wanted(path: Path) -> bool:
    """Whether a LoRA file has no picture beside it but one that was written here, and is renewed."""
    every = (path.with_suffix(f"{middle}.{end}") for middle in ("", ".preview") for end in _ENDINGS)
    there = [picture for picture in every if picture.exists()]
    return all(picture == path.with_suffix(".preview.png") and _is_ours(picture) for picture in there)


def _is_ours(file: Path) -> bool:
    """Whether a picture was written here."""
    key, value = _SIGNATURE
    try:
        with Image.open(file) as picture:
            return picture.info.get(key) == value
    except OSError:
        return False
