"""Scenes: one or two emoji on a plain background, rendered from Debian's Noto Color Emoji font, with captions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from miniature.vocabulary import CLASSES, COLOURS, CONCEPT, STYLES, THINGS

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size that the bitmap font holds
BOX = 64  # an object's box in pixels: 8 latent cells
OBJECT = 58  # the object itself, centred in its box
GRID = 16  # boxes stand on multiples of this: aligned to the latent and to the UNet's second level
SIDE = 128  # a whole picture


@dataclass(frozen=True)
class Scene:
    """One or two objects (left first) on a background, perhaps in a style.

    Attributes:
        objects: names from CLASSES or of things in CONCEPT.
        colour: name from COLOURS.
        style: name of a style concept, or None.
        corners: top left corner (x, y) of each object's box, in pixels.
        size: width and height of the picture, in pixels.
    """

    objects: tuple[str, ...]
    colour: str
    style: str | None
    corners: tuple[tuple[int, int], ...]
    size: tuple[int, int]

    def caption(self) -> str:
        """The words for this scene; concepts are named by their triggers."""
        names = [CONCEPT[name].trigger if name in CONCEPT else name for name in self.objects]
        style = f" in {CONCEPT[self.style].phrase}" if self.style else ""
        return prompt(names, self.colour) + style

    def render(self) -> Image.Image:
        """The picture, RGB."""
        picture = Image.new("RGB", self.size, COLOURS[self.colour])
        for name, corner in zip(self.objects, self.corners, strict=True):
            drawn = sprite(name, self.style)
            picture.paste(drawn, corner, drawn)
        return picture


def prompt(names: list[str], colour: str) -> str:
    """`a cat and a dog on a red background`."""
    return " and ".join(f"a {name}" for name in names) + f" on a {colour} background"


@cache
def sprite(name: str, style: str | None = None) -> Image.Image:
    """One object in its BOX × BOX box, RGBA; `outline` keeps dark contours only, `mosaic` makes it of 8-pixel tiles.

    Raises:
        FileNotFoundError: the font is not installed.
    """
    if not FONT.exists():
        raise FileNotFoundError(f"{FONT} is missing: install Debian's package fonts-noto-color-emoji (training only)")
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    emoji = CONCEPT[name].emoji if name in CONCEPT else CLASSES[name]
    glyph = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(glyph).text((10, 10), emoji, font=font, embedded_color=True)
    glyph = glyph.crop(glyph.getbbox())
    scale = OBJECT / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)
    box = Image.new("RGBA", (BOX, BOX))
    box.alpha_composite(glyph, ((BOX - glyph.width) // 2, (BOX - glyph.height) // 2))
    return {None: lambda drawn: drawn, "outline": _outline, "mosaic": _mosaic}[style](box)


def _outline(box: Image.Image) -> Image.Image:
    """Dark contours of the object, the background showing through everywhere else."""
    alpha = box.getchannel("A")
    flat = Image.new("RGB", box.size, (255, 255, 255))
    flat.paste(box, (0, 0), box)
    edges = np.zeros((BOX, BOX))
    for channel in (*flat.split(), alpha):
        values = np.asarray(channel.filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float32)
        down, right = np.gradient(values)
        edges = np.maximum(edges, np.hypot(down, right))
    ink = np.clip((edges - 12) * 14, 0, 255).astype(np.uint8)
    drawn = Image.new("RGBA", box.size, (25, 25, 45, 0))
    drawn.putalpha(Image.fromarray(ink))
    return drawn


def _mosaic(box: Image.Image) -> Image.Image:
    """The object made of 8-pixel tiles with dark joints, each tile wholly there or wholly absent."""
    cells = BOX // 8
    small = np.asarray(box.convert("RGBa").resize((cells, cells), Image.Resampling.BOX).convert("RGBA")).copy()
    small[..., 3] = np.where(small[..., 3] > 110, 255, 0)
    large = np.kron(small, np.ones((8, 8, 1), dtype=np.uint8))
    joints = (np.arange(BOX) % 8 == 0)[:, None] | (np.arange(BOX) % 8 == 0)[None, :]
    large[joints, :3] = 30
    return Image.fromarray(large, "RGBA")


def single(name: str, colour: str, style: str | None = None, corner: tuple[int, int] = (32, 32)) -> Scene:
    """One object on a whole picture."""
    return Scene((name,), colour, style, (corner,), (SIDE, SIDE))


def pair(left: str, right: str, colour: str, style: str | None = None, heights: tuple[int, int] = (32, 32)) -> Scene:
    """Two objects side by side on a whole picture, the first named on the left."""
    corners = ((0, heights[0]), (BOX, heights[1]))
    return Scene((left, right), colour, style, corners, (SIDE, SIDE))


def crop(scene: Scene) -> Scene:
    """The same scene without its margins: BOX high, one BOX wide for each object."""
    corners = tuple((BOX * place, 0) for place in range(len(scene.objects)))
    return Scene(scene.objects, scene.colour, scene.style, corners, (BOX * len(scene.objects), BOX))


def random_scene(rng: random.Random, objects: tuple[str, ...], style: str | None = None) -> Scene:
    """`objects` at random places of the grid, on a random background."""
    colour = rng.choice(list(COLOURS))
    steps = range(0, SIDE - BOX + 1, GRID)
    if len(objects) == 1:
        return single(objects[0], colour, style, (rng.choice(steps), rng.choice(steps)))
    return pair(objects[0], objects[1], colour, style, (rng.choice(steps), rng.choice(steps)))


def base_scene(rng: random.Random, two: float) -> Scene:
    """A scene of base classes; with probability `two` it holds two (different) objects."""
    return random_scene(rng, tuple(rng.sample(list(CLASSES), 2 if rng.random() < two else 1)))


def concept_scene(rng: random.Random, name: str, two: float) -> Scene:
    """A training scene of concept `name`: alone, or beside a base object; for a style, base objects in it."""
    objects = rng.sample(list(CLASSES), 2 if rng.random() < two else 1)
    if CONCEPT[name].is_style:
        return random_scene(rng, tuple(objects), name)
    objects[rng.randrange(len(objects))] = name
    return random_scene(rng, tuple(objects))


def any_scene(rng: random.Random) -> Scene:
    """Anything that can be drawn: every object, plain or in a style, one or two of them (for autoencoder and judge)."""
    names = [*CLASSES, *(thing.name for thing in THINGS)]
    style = rng.choice([None, None, *(style.name for style in STYLES)])
    return random_scene(rng, tuple(rng.sample(names, rng.choice((1, 2)))), style)
