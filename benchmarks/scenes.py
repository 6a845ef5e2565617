"""What is drawn: prompts to report on and prompts to tune on, disjoint in prompt and noise, and what must be found."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loraclr import prompts
from miniature import demo
from miniature.evaluate import Wanted, alone, beside, singles
from miniature.vocabulary import CLASSES, CONCEPTS, Concept

REPORTING = demo.COLOURS  # no prompt that a merge looks at for a concept names these
TUNING = ("red", "green", "blue", "gray")
#: Noise begins here; a merge draws from its own small seed on.
REPORTING_NOISE, TUNING_NOISE, APART = 1_000_000, 2_000_000, 10_000
PARTS = ("concepts", "beside", "pairs", "base")
#: Base objects that are in a picture that merges look at, of any concept and at any speed.
FAMILIAR = frozenset(CLASSES) & frozenset(
    re.findall(
        r"\w+",
        " ".join((*prompts.SUBJECT, *prompts.STYLE, *prompts.NEUTRAL, *prompts.MORE_NEUTRAL, *prompts.STAND_INS)),
    )
)


@dataclass(frozen=True)
class Plan:
    """How many pictures, and in how many steps each.

    Attributes:
        concept: of each concept.
        beside: of each concept beside a base object.
        pairs: of two concepts; more, if each concept would else be in fewer of these than there are of itself.
        base: of base objects.
        tune: of each concept, to choose options by; of fewer than four concepts more, as many as of four.
    """

    concept: int = 8
    beside: int = 4
    pairs: int = 24
    base: int = 32
    tune: int = 2
    steps: int = demo.STEPS


QUICK = Plan(concept=4, beside=2, pairs=8, base=8, tune=0, steps=10)


@dataclass(frozen=True)
class Shot:
    """One picture to draw.

    Attributes:
        places: of the concepts that it is about, among the merged ones; of a base prompt, whose LoRA is on if each acts
            alone.
    """

    wanted: Wanted
    places: tuple[int, ...]
    noise: int

    @property
    def names(self) -> frozenset[str]:
        """What must be found: things, and the look if it is not the plain one."""
        return frozenset({*self.wanted.objects, self.wanted.look} - {"plain"})

    @property
    def is_new(self) -> bool:
        """Whether it asks for a base object of which merges look at no picture."""
        return bool(frozenset(CLASSES).intersection(self.wanted.objects) - FAMILIAR)


def chosen(count: int, seed: int) -> tuple[Concept, ...]:
    """`count` of the miniature's concepts, in its order; another seed takes others."""
    names = {concept.name for concept in random.Random(f"{count} {seed}").sample(CONCEPTS, count)}
    return tuple(concept for concept in CONCEPTS if concept.name in names)


def reporting(concepts: Sequence[Concept], plan: Plan, seed: int) -> dict[str, list[Shot]]:
    """Everything that is drawn for one row, by part.

    Base objects come in turn from concept to concept and from seed to seed: asked of every concept, a few words that
    come out well or badly would be the figure. If there are more pairs than pictures of pairs, each seed draws others.
    """
    turns = [(concept, place, 3 * seed + place) for place, concept in enumerate(concepts)]
    count, rng = max(plan.pairs, len(concepts) * plan.concept // 2), random.Random(f"pairs {seed}")
    two = [(_pair(*pair), tuple(map(concepts.index, pair[:2]))) for pair in demo.pairs_of(concepts, count, rng)]
    parts = {
        "concepts": [(w, (k,)) for c, k, n in turns for w in alone(c, plan.concept, REPORTING, n * plan.concept)],
        "beside": [(w, (k,)) for c, k, n in turns for w in beside(c, plan.beside, REPORTING, n * plan.beside)],
        "pairs": two,
        "base": [(w, (k * len(concepts) // plan.base,)) for k, w in enumerate(singles(plan.base, REPORTING))],
    }
    start = REPORTING_NOISE + seed * APART
    return {
        part: [Shot(wanted, places, start + 1000 * PARTS.index(part) + k) for k, (wanted, places) in enumerate(shots)]
        for part, shots in parts.items()
    }


def tuning(concepts: Sequence[Concept], plan: Plan, seed: int) -> list[Shot]:
    """What options are chosen on."""
    each = plan.tune * max(1, 4 // len(concepts))
    shots = [(w, (k,)) for k, c in enumerate(concepts) for w in alone(c, each, TUNING)]
    return [Shot(wanted, places, TUNING_NOISE + seed * APART + k) for k, (wanted, places) in enumerate(shots)]


def _pair(left: Concept, right: Concept, prompt: str) -> Wanted:
    colour = prompt.partition(" on a ")[2].partition(" ")[0]
    if right.is_style:
        return Wanted(prompt, (left.name,), right.name, colour)
    return Wanted(prompt, (left.name, right.name), colour=colour)
