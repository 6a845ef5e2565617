"""Scenes of several concepts, drawn by their own LoRAs together: what the merged LoRA learns two in one picture from.

No LoRA of one concept can show two. But each can draw its own region of a picture: at every step the regions'
predictions, each by the LoRA of its concept, are put together into one (regional sampling, as in Mix-of-Show). What is
predicted on the way, for the prompt that names both concepts, is one more teacher for the polish.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.capture import Bank
from loraclr.hosts import Host
from loraclr.prompts import PAIR, STAND_INS


@dataclass(frozen=True)
class Scene:
    """Two concepts side by side.

    Attributes:
        left, right: numbers of the concepts.
        prompt: names both.
        halves: what the left and the right half's own LoRA is asked for: the same prompt with something that the base
            model knows in the place of the other concept.
    """

    left: int
    right: int
    prompt: str
    halves: tuple[str, str]


def plan(triggers: Sequence[str | None], count: int) -> list[Scene]:
    """`count` scenes, all ordered pairs of concepts in turn, in an order that lets every concept come up early.

    Args:
        triggers: of each concept; None leaves it out.
    """
    usable = [place for place, trigger in enumerate(triggers) if trigger is not None]
    pairs = sorted(itertools.permutations(usable, 2), key=lambda pair: (pair[1] - pair[0]) % len(triggers))
    scenes = []
    for number in range(count if pairs else 0):
        left, right = pairs[number % len(pairs)]
        template, a, b = PAIR[number % len(PAIR)], triggers[left], triggers[right]
        halves = template.format(a, STAND_INS[1]), template.format(STAND_INS[0], b)
        scenes.append(Scene(left, right, template.format(a, b), halves))
    return scenes


def asked_of(concept: int, scenes: Sequence[Scene]) -> list[str]:
    """The prompts that a concept's own LoRA draws its halves of the scenes by."""
    sides = (
        (side, half) for scene in scenes for side, half in zip((scene.left, scene.right), scene.halves, strict=True)
    )
    return [half for side, half in sides if side == concept]


@torch.no_grad()
def draw(
    host: Host,
    acting: Callable[[int], AbstractContextManager],
    scenes: Sequence[Scene],
    seed: int,
    steps: int,
    guidance: float,
    size: int,
    tick: Callable[[int], None],
) -> tuple[Bank, Tensor]:
    """Sample the scenes with DDIM (Song et al. 2020, η = 0), every half predicted by its own LoRA.

    Args:
        acting: gives a context in which one concept's LoRA acts.
    Returns:
        The predictions on the way, put together, for each scene's prompt and for the empty one; and the latents
        (B, 4, h, w) that come out.
    """
    bank = Bank([*(scene.prompt for scene in scenes), ""])
    side = size // 8
    noise = [torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed + k)) for k in range(len(scenes))]
    x = torch.stack(noise).to(host.device)
    mine: dict[int, list[tuple[int, int]]] = {}  # concept → (scene, 0 left or 1 right) that it draws
    for number, scene in enumerate(scenes):
        mine.setdefault(scene.left, []).append((number, 0))
        mine.setdefault(scene.right, []).append((number, 1))
    contexts = {}
    for concept, jobs in mine.items():
        with acting(concept):
            contexts[concept] = host.encode([*(scenes[number].halves[half] for number, half in jobs), ""])
    alphas = host.alphas.to(x)
    # Spaced as the pictures of one concept are: from the noisiest step, errors of guidance come out 15 times as large.
    times = torch.arange(steps).flip(0) * (len(alphas) // steps) + 1
    for place, t in enumerate(times.tolist()):
        told, untold = torch.zeros_like(x), torch.zeros_like(x)
        for concept, jobs in mine.items():
            rows = x[[number for number, _ in jobs]]
            both = contexts[concept][[*range(len(jobs)), *[len(jobs)] * len(jobs)]]
            with acting(concept):
                predicted = host.predict(torch.cat([rows, rows]), torch.full((2 * len(jobs),), t).to(x), both).to(x)
            for row, (number, half) in enumerate(jobs):
                region = slice(0, side // 2) if half == 0 else slice(side // 2, side)
                told[number, ..., region] = predicted[row, ..., region]
                untold[number, ..., region] = predicted[len(jobs) + row, ..., region]
            tick(2 * len(jobs))
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
