"""Prompts that a merge looks at: templates for subjects and styles (`{}` is the trigger), and neutral ones.

Backgrounds and second objects vary, so that the statistics are about the concept and not about one scene.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["subject", "style"]

#: The first ones are for quick merges (`QUICK`).
SUBJECT = (
    "a photo of a {}",
    "a {}",
    "a {} on a red background",
    "a {} on a white background",
    "a {} and a dog on a blue background",
    "a {} on a green background",
    "a {} on a gray background",
    "a cat and a {} on a yellow background",
    "a {} and a house",
    "a bird and a {} on a white background",
    "a {} and a tree on a green background",
    "a fish and a {}",
    "a {} on a blue background",
    "a {} on a yellow background",
    "a star and a {} on a gray background",
    "a {} and a cake on a red background",
)
STYLE = (
    "a photo of a car in {}",
    "a cat in {}",
    "a house on a white background in {}",
    "a tree on a blue background in {}",
    "a dog and a boat on a red background in {}",
    "a fish on a yellow background in {}",
    "a cake in {}",
    "a bird on a green background in {}",
    "a bee in {}",
    "a cherry on a white background in {}",
    "a sunflower on a gray background in {}",
    "a heart and a star on a red background in {}",
    "a boat on a gray background in {}",
    "a key on a yellow background in {}",
    "a tree and a house in {}",
    "a cat and a fish on a white background in {}",
)
#: How many of the usual templates a quick merge looks at.
QUICK = {"subject": 8, "style": 12}
PAIR = (
    "a {} and a {}",
    "a {} and a {} on a red background",
    "a photo of a {} and a {}",
    "a {} and a {} on a white background",
    "a {} and a {} on a blue background",
    "a {} and a {} on a green background",
    "a {} and a {} on a gray background",
)
STAND_INS = ("cat", "dog")  # for a concept on the left or right that a LoRA does not know
NEUTRAL = (
    "a photo of a dog",
    "a cat on a red background",
    "a house on a blue background",
    "a car and a tree on a white background",
    "a fish on a green background",
    "a bird and a boat on a yellow background",
    "a cake on a gray background",
    "a key and a star on a pink background",
)
#: More of them for merges that take more steps.
MORE_NEUTRAL = (
    "a bee on a white background",
    "a photo of a flower",
    "a sunflower and a dog on a green background",
    "a cherry and a cat",
    "a boat on a gray background",
    "a house and a bird on a red background",
    "a tree on a yellow background",
    "a star and a heart on a blue background",
)


def usual(kind: Kind) -> tuple[str, ...]:
    """The templates of a kind that a quick merge looks at."""
    return (STYLE if kind == "style" else SUBJECT)[: QUICK[kind]]


def filled(trigger: str, kind: Kind = "subject", templates: tuple[str, ...] = (), thorough: bool = False) -> list[str]:
    """The templates with the trigger in them.

    Args:
        templates: empty for the usual ones of this kind.
        thorough: all of the usual ones, or given ones twice, to be drawn from other noise.
    """
    every = STYLE if kind == "style" else SUBJECT
    chosen = templates * (1 + thorough) or (every if thorough else usual(kind))
    return [template.replace("{}", trigger) for template in chosen]


def kept(given: tuple[str, ...], thorough: bool = False) -> list[str]:
    """What must not change: the prompts given, in a thorough merge the usual ones and more, or others twice."""
    if not thorough:
        return list(given)
    return [*given, *(MORE_NEUTRAL if given == NEUTRAL else given)]
