"""What a picture is measured by, as pure functions of the judge's verdicts, its features, or pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniature.evaluate import Wanted
from miniature.judge import LOOKS, Verdict
from miniature.vocabulary import CLASSES, Concept

SPECKLE = 8.0  # noise, as a standard deviation in levels of 255, that costs a picture 1 − 1/e of its quality
END = 10  # levels from 0 and 255 that count as pushed to the end; the palette's white is just outside
VIVID = 160  # the palette's backgrounds stay below this difference of largest and smallest channel


def identity(verdict: Verdict, concept: Concept) -> float:
    """The judge's cosine with the concept's direction: a thing among objects, a style among looks."""
    return (verdict.looks if concept.is_style else verdict.objects)[concept.name]


def text_alignment(verdicts: Sequence[Verdict], wanted: Wanted) -> float:
    """The share of the prompt's ordinary words that are obeyed: the background, and objects of base classes.

    verdicts: of the whole picture, or of both halves if two objects are wanted. What a LoRA has taught (a thing, a
    style) does not count, that is identity's business.
    """
    obeyed = [verdict.ground == wanted.colour for verdict in verdicts]
    words = zip(verdicts, wanted.objects, strict=True)
    obeyed += [verdict.object == name for verdict, name in words if name in CLASSES]
    return sum(obeyed) / len(obeyed)


def crosstalk(verdict: Verdict, concept: Concept, merged: Sequence[Concept]) -> bool:
    """Whether the picture shows another of the merged concepts than the one that was asked for."""
    others = [other.name for other in merged if other.name != concept.name]
    return verdict.object in others or (verdict.look in others and verdict.look in LOOKS)


def alignment(features: Tensor, references: Tensor) -> list[float]:
    """Cosine (B,) between the features (B, C) of pictures and of their references: prompt and noise are the same."""
    return F.cosine_similarity(features, references, dim=1).tolist()


def drift(picture: Image.Image, reference: Image.Image) -> float:
    """Root mean square difference of the pixels, 0 to 1."""
    here, there = (np.asarray(one.convert("RGB"), np.float64) / 255 for one in (picture, reference))
    return float(np.sqrt(np.square(here - there).mean()))


def picture_quality(picture: Image.Image) -> float:
    """How clean a picture is, 0 to 1: exp(−speckle / SPECKLE) · (1 − excess).

    No judge takes part, and nothing is said about what is shown: a merge that pleases the judge with noise or garish
    colours loses here. For one set of prompts compare methods, not prompts.
    """
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    return float(np.exp(-speckle(pixels) / SPECKLE) * (1 - excess(pixels)))


def speckle(pixels: np.ndarray) -> float:
    """Noise of (H, W, 3) in levels, as a standard deviation.

    The second difference in both directions is blind to flat colours and slopes (Immerkær, 1996). Its median in blocks
    of 8×8 is blind to single edges; the mean over blocks also sees noise that is in one place only.
    """
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    second = np.diff(np.diff(grey, 2, axis=0), 2, axis=1)
    height, width = (side // 8 * 8 for side in second.shape)
    blocks = np.abs(second[:height, :width]).reshape(height // 8, 8, width // 8, 8)
    return float(np.median(blocks, axis=(1, 3)).mean() / (6 * 0.6745))


def excess(pixels: np.ndarray) -> float:
    """The share of (H, W, 3) that is overdriven, softly counted: channels at the ends of the range, vivid colours."""
    high, low = pixels.max(2), pixels.min(2)
    ends = np.maximum((END - low) / END, (high - (255 - END)) / END)
    vivid = (high - low - VIVID) / (255 - VIVID)
    return float(np.clip(np.maximum(ends, vivid), 0, 1).mean())
