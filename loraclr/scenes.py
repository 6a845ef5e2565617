"""Scenes of two concepts, drawn by their own LoRAs together: what the merged LoRA learns two in one picture from.

No LoRA of one concept can show two. But each can draw its own region of a picture: at every step the regions'
predictions, each by the LoRA of its concept, are put together into one (regional sampling, as in Mix-of-Show). A thing
in a style has no regions; there both LoRAs act at once, which two of them bear, unlike many. What is predicted on the
way, for the prompt that names both concepts, is one more teacher for the polish.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.bank import Bank
from loraclr.hosts import Context, Host
from loraclr.prompts import PAIR, STAND_INS, STYLED

#: Numbers of concepts → a context in which their LoRAs act.
Acting = Callable[[Sequence[int]], AbstractContextManager]


@dataclass(frozen=True)
class Part:
    """What some concepts' LoRAs draw of a scene.

    Attributes:
        concepts: their numbers; several act at once.
        prompt: what they are asked for.
        begin, end: the columns that are theirs, as shares of the picture's width.
    """

    concepts: tuple[int, ...]
    prompt: str
    begin: float = 0.0
    end: float = 1.0

    def columns(self, width: int) -> slice:
        """Of a picture that is `width` wide."""
        return slice(round(self.begin * width), round(self.end * width))


@dataclass(frozen=True)
class Scene:
    """One picture of two concepts: a prompt that names both, and the parts that it is put together from."""

    prompt: str
    parts: tuple[Part, ...]

    @property
    def concepts(self) -> frozenset[int]:
        """The numbers of all that it shows."""
        return frozenset(concept for part in self.parts for concept in part.concepts)


def side_by_side(triggers: Sequence[str | None], count: int) -> list[Scene]:
    """`count` scenes, all ordered pairs of concepts in turn, in an order that lets every concept come up early.

    Each half is drawn by its own concept's LoRA, asked for the same with something that the base model knows in the
    place of the other concept.

    Args:
        triggers: of each concept; None leaves it out.
    """
    usable = [place for place, trigger in enumerate(triggers) if trigger is not None]
    pairs = sorted(itertools.permutations(usable, 2), key=lambda pair: (pair[1] - pair[0]) % len(triggers))
    scenes = []
    for number in range(count if pairs else 0):
        left, right = pairs[number % len(pairs)]
        template, a, b = PAIR[number % len(PAIR)], triggers[left], triggers[right]
        halves = (
            Part((left,), template.format(a, STAND_INS[1]), 0.0, 0.5),
            Part((right,), template.format(STAND_INS[0], b), 0.5, 1.0),
        )
        scenes.append(Scene(template.format(a, b), halves))
    return scenes


def styled(things: Sequence[str | None], styles: Sequence[str | None], count: int) -> list[Scene]:
    """`count` pictures of things in styles, all pairs in turn; fewer if there are no more different ones.

    Args:
        things, styles: triggers of each concept; None leaves it out.
    """
    usable = ([place for place, trigger in enumerate(each) if trigger is not None] for each in (things, styles))
    pairs = list(itertools.product(*usable))
    scenes = []
    for number in range(min(count, len(pairs) * len(STYLED))):
        turn, place = divmod(number, len(pairs))
        thing, style = pairs[place]
        template = STYLED[(turn + place) % len(STYLED)]
        prompt = template.format(things[thing], styles[style])
        scenes.append(Scene(prompt, (Part((thing, style), prompt),)))
    return scenes


def asked_of(concept: int, scenes: Sequence[Scene]) -> list[str]:
    """The prompts that a concept's own LoRA draws its parts of the scenes by."""
    return [part.prompt for scene in scenes for part in scene.parts if part.concepts == (concept,)]


class Cast:
    """The LoRAs of some scenes, each with its parts."""

    def __init__(self, host: Host, acting: Acting, scenes: Sequence[Scene]) -> None:
        self.host, self.acting = host, acting
        self.jobs: dict[tuple[int, ...], list[tuple[int, Part]]] = {}  # whose LoRAs → number of the scene, and part
        for number, scene in enumerate(scenes):
            for part in scene.parts:
                self.jobs.setdefault(part.concepts, []).append((number, part))
        self.contexts: dict[tuple[int, ...], Context] = {}
        for concepts, jobs in self.jobs.items():
            with acting(concepts), torch.no_grad():
                self.contexts[concepts] = host.encode([*(part.prompt for _, part in jobs), ""])

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, tick: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """What is predicted in one state of each scene, with its prompt and without one, put together.

        Args:
            x, t: (B, 4, h, w) and (B,), one for each scene.
            tick: told how many rows went through the UNet.
        """
        told, untold = torch.zeros_like(x), torch.zeros_like(x)
        for concepts, jobs in self.jobs.items():
            rows, count = [number for number, _ in jobs], len(jobs)
            both = self.contexts[concepts][[*range(count), *[count] * count]]
            with self.acting(concepts):
                predicted = self.host.predict(torch.cat([x[rows]] * 2), torch.cat([t[rows]] * 2), both).to(x)
            for row, (number, part) in enumerate(jobs):
                region = part.columns(x.shape[-1])
                told[number, ..., region] = predicted[row, ..., region]
                untold[number, ..., region] = predicted[count + row, ..., region]
            tick(2 * count)
        return told, untold


@torch.no_grad()
def draw(
    host: Host,
    acting: Acting,
    scenes: Sequence[Scene],
    seed: int,
    steps: int,
    guidance: float,
    size: int,
    tick: Callable[[int], None],
) -> tuple[Bank, Tensor]:
    """Sample the scenes with DDIM (Song et al. 2020, η = 0), every part predicted by its own LoRAs.

    Returns:
        The predictions on the way, put together, for each scene's prompt and for the empty one; and the latents
        (B, 4, h, w) that come out.
    """
    bank = Bank([*(scene.prompt for scene in scenes), ""])
    side, cast = size // 8, Cast(host, acting, scenes)
    noise = [torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed + k)) for k in range(len(scenes))]
    x = torch.stack(noise).to(host.device)
    alphas = host.alphas.to(x)
    # Spaced as the pictures of one concept are: from the noisiest step, errors of guidance come out 15 times as large.
    times = torch.arange(steps).flip(0) * (len(alphas) // steps) + 1
    for place, t in enumerate(times.tolist()):
        told, untold = cast.predict(x, torch.full((len(scenes),), t).to(x), tick)
        for number in range(len(scenes)):
            for prompt, prediction in ((number, told[number]), (len(scenes), untold[number])):
                bank.add(x[number], torch.tensor(float(t)), prompt, prediction)
        clean, noise = _parts(x, untold + guidance * (told - untold), alphas[t], host.target)
        after = alphas[times[place + 1]] if place + 1 < steps else torch.ones_like(alphas[t])
        x = after.sqrt() * clean + (1 - after).sqrt() * noise
    return bank, x


def _parts(x: Tensor, prediction: Tensor, alpha: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise that x consists of, by what the UNet predicts."""
    if target == "v":
        return alpha.sqrt() * x - (1 - alpha).sqrt() * prediction, alpha.sqrt() * prediction + (1 - alpha).sqrt() * x
    return (x - (1 - alpha).sqrt() * prediction) / alpha.sqrt(), prediction
