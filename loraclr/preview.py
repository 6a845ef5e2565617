"""The picture on a merged LoRA's card: its concepts as the merged file draws them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from PIL import Image

from loraclr.capture import applied
from loraclr.changes import factors_of
from loraclr.hosts import Host
from loraclr.merging import Settings
from loraclr.prompts import filled
from loraclr.result import Merge

#: What the webui takes for a LoRA's picture, with or without ".preview" before it.
_ENDINGS = ("png", "jpg", "jpeg", "webp", "gif", "avif")
_MOST = 4  # concepts
_SEED = 10_000  # noise that the merge has not seen


def exists(path: Path) -> bool:
    """Whether a LoRA file has a picture beside it, which is not to be replaced."""
    return any(path.with_suffix(f"{middle}.{end}").exists() for middle in ("", ".preview") for end in _ENDINGS)


def drawn(host: Host, merge: Merge, settings: Settings) -> Image.Image:
    """The merge's first concepts side by side, each by its first prompt."""
    side, modules = settings.size or host.size, host.layers()
    changes = {name: factors_of(layer, 1.0, modules[name].weight) for name, layer in merge.layers.items()}
    texts = [filled(concept.trigger, concept.kind, concept.prompts)[0] for concept in merge.concepts[:_MOST]]
    with host.session(), host.words(merge.words) if merge.words else nullcontext(), applied(modules, changes):
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
    """Write the picture beside a LoRA file; None, and nothing written, if that has one."""
    if exists(path):
        return None
    place = path.with_suffix(".preview.png")
    picture.save(place)
    return place
