"""The judge: a small CNN that names the object, the style and the background of a picture, and measures identity."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miniature import JUDGE
from miniature.vocabulary import CLASSES, COLOURS, CONCEPT, STYLES, THINGS

OBJECTS: tuple[str, ...] = (*CLASSES, *(thing.name for thing in THINGS))
LOOKS: tuple[str, ...] = ("plain", *(style.name for style in STYLES))
GROUNDS: tuple[str, ...] = tuple(COLOURS)
SHARPNESS = 16.0  # what cosines are multiplied with before the softmax


class CosineHead(nn.Module):
    """Embeds pooled features and compares them with one direction per class.

    Args:
        pooled: (B, C).
    Returns:
        embedding (B, width) of unit length, cosines (B, classes).
    """

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.directions = nn.Parameter(torch.randn(classes, width))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        embedding = F.normalize(self.embed(pooled), dim=-1)
        return embedding, embedding @ F.normalize(self.directions, dim=-1).T


class Judge(nn.Module):
    """Pictures of any size (object boxes of 64 pixels) → object, style and background.

    Max pooling over places finds the object wherever it is; mean pooling sees the background.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        layers += [nn.Conv2d(128, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.object = CosineHead(256, 64, len(OBJECTS))
        self.look = CosineHead(256, 16, len(LOOKS))
        self.ground = CosineHead(256, 16, len(GROUNDS))

    def forward(self, picture: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, 3, H, W) in -1..1 → for `object`, `look`, `ground`: embedding and cosines."""
        pooled = self.pooled(picture)
        return {"object": self.object(pooled), "look": self.look(pooled), "ground": self.ground(pooled)}

    def pooled(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 → what the heads see, (B, 256): strongest and mean response of each feature."""
        features = self.trunk(picture)
        return torch.cat([features.amax((2, 3)), features.mean((2, 3))], dim=1)

    @classmethod
    def load(cls, path: Path = JUDGE) -> Judge:
        """The trained judge."""
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=False)
        return judge.eval()

    def save(self, path: Path = JUDGE) -> None:
        """Write it in half precision."""
        state = {name: value.half() for name, value in self.state_dict().items() if value.is_floating_point()}
        save_file({name: value.contiguous() for name, value in state.items()}, path)

    @torch.no_grad()
    def verdicts(self, pictures: list[Image.Image]) -> list[Verdict]:
        """What each picture (all of one size) shows."""
        seen = self.eval()(to_tensor(pictures))
        return [
            Verdict(**{part: dict(zip(names, cosines[row].tolist(), strict=True)) for part, names, cosines in (
                ("objects", OBJECTS, seen["object"][1]),
                ("looks", LOOKS, seen["look"][1]),
                ("grounds", GROUNDS, seen["ground"][1]),
            )})
            for row in range(len(pictures))
        ]  # fmt: skip

    @torch.no_grad()
    def features(self, pictures: list[Image.Image]) -> Tensor:
        """(B, 256) features of pictures of one size; see `pooled`."""
        return self.eval().pooled(to_tensor(pictures))

    @torch.no_grad()
    def identity(self, pictures: list[Image.Image], references: list[Image.Image], part: str = "object") -> Tensor:
        """Cosine (B,) between each picture's embedding and the mean embedding of `references`."""
        self.eval()
        mean = F.normalize(self(to_tensor(references))[part][0].mean(0), dim=0)
        return self(to_tensor(pictures))[part][0] @ mean


@dataclass(frozen=True)
class Verdict:
    """Cosines of one picture with every object, look and background by name."""

    objects: dict[str, float]
    looks: dict[str, float]
    grounds: dict[str, float]

    @property
    def object(self) -> str:
        return max(self.objects, key=self.objects.__getitem__)

    @property
    def look(self) -> str:
        return max(self.looks, key=self.looks.__getitem__)

    @property
    def ground(self) -> str:
        return max(self.grounds, key=self.grounds.__getitem__)

    def shows(self, name: str) -> bool:
        """Whether the best guess is `name`: an object, or for a style concept the look."""
        return self.look == name if name in CONCEPT and CONCEPT[name].is_style else self.object == name


def halves(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Left and right half, where a scene of two has its objects."""
    middle = picture.width // 2
    return picture.crop((0, 0, middle, picture.height)), picture.crop((middle, 0, picture.width, picture.height))


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """PIL pictures of one size → (B, 3, H, W) in -1..1."""
    stacked = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def spoil(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise, and change the colours a little, so that the judge forgives what the autoencoder loses."""
    rows = picture.shape[0]

    def chance(share: float) -> Tensor:
        return (torch.rand(rows, 1, 1, 1, generator=generator) < share).float()

    soft = F.interpolate(F.avg_pool2d(picture, 2), scale_factor=2, mode="bilinear")
    softer = F.interpolate(F.avg_pool2d(picture, 4), scale_factor=4, mode="bilinear")
    blurred = chance(0.4)
    picture = picture * (1 - blurred) + soft * blurred
    blurred = chance(0.15)
    picture = picture * (1 - blurred) + softer * blurred
    tint = 0.06 * torch.randn(rows, 3, 1, 1, generator=generator)
    noise = 0.08 * chance(0.5) * torch.randn(picture.shape, generator=generator)
    return picture * (1 + 0.08 * torch.randn(rows, 1, 1, 1, generator=generator)) + tint + noise


def labelled(rng: random.Random, count: int) -> tuple[list[Image.Image], list[tuple[int, int, int]]]:
    """`count` half pictures (64×128) or boxes on whole pictures, one size a call, with their three labels."""
    from miniature.scenes import any_scene  # the font is needed for training only

    whole, pictures, labels = rng.random() < 0.5, [], []
    while len(pictures) < count:
        scene = any_scene(rng)
        if whole != (len(scene.objects) == 1):
            continue
        picture = scene.render()
        for name, part in zip(scene.objects, [picture] if whole else halves(picture), strict=True):
            pictures.append(part)
            labels.append((OBJECTS.index(name), LOOKS.index(scene.style or "plain"), GROUNDS.index(scene.colour)))
    return pictures[:count], labels[:count]


def fit(run: Path, steps: int = 1500) -> Judge:
    """Train the judge (or go on with it)."""
    from miniature.training import train

    torch.manual_seed(0)
    judge = Judge().train()

    def loss(step: int) -> Tensor:
        pictures, labels = labelled(random.Random(step), 32)
        generator = torch.Generator().manual_seed(step)
        seen = judge(spoil(to_tensor(pictures), generator))
        target = torch.tensor(labels)
        parts = zip(("object", "look", "ground"), target.T, strict=True)
        return sum(F.cross_entropy(SHARPNESS * seen[part][1], wanted) for part, wanted in parts)

    train("judge", judge, [{"params": list(judge.parameters()), "lr": 3e-3}], loss, steps, run)
    return judge.eval()


def accuracy(judge: Judge, count: int = 600, seed: int = 10_000_000) -> dict[str, float]:
    """Top-1 on fresh real renders, by part."""
    rng, right = random.Random(seed), np.zeros(3)
    for _ in range(count // 50):
        pictures, labels = labelled(rng, 50)
        for verdict, label in zip(judge.verdicts(pictures), labels, strict=True):
            found = (verdict.object, verdict.look, verdict.ground)
            right += [f == names[i] for f, names, i in zip(found, (OBJECTS, LOOKS, GROUNDS), label, strict=True)]
    return dict(zip(("object", "look", "ground"), (right / (count // 50 * 50)).tolist(), strict=True))
